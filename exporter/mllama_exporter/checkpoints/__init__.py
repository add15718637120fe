"""Whatever a user names as a checkpoint, opened."""

from __future__ import annotations

from pathlib import Path

from mllama_exporter.checkpoints.adapter import merged_checkpoint
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.checkpoints.meta import is_meta, meta_checkpoint


def checkpoint_from_folder(folder: Path, adapter: Path | None = None) -> Checkpoint:
    """A Hugging Face folder or Meta's `original/`, with a LoRA adapter merged into it.

    Raises:
        CheckpointError: it is neither, incomplete, damaged, or the adapter is not its own.
    """
    checkpoint = meta_checkpoint(folder) if is_meta(folder) else Checkpoint.open(folder)
    return checkpoint if adapter is None else merged_checkpoint(checkpoint, adapter)
