"""Which vision states a checkpoint's weights want, as far as its files tell.

No file says where weights were trained: config.json names the transformers that saved them last, and an adapter none.
"""

from __future__ import annotations

import re
from pathlib import Path

from mllama_exporter.checkpoints.hf_config import read_json_object

_CHANGED = (4, 55)  # the first version that takes other states than Meta's code does
_ADVICE = (
    "trained with 4.56 or newer may want --vision-states transformers-4.56; "
    "`mllama eval` of both on a few hundred questions tells"
)


def vision_states_notice(folder: Path, adapter: Path | None) -> str | None:
    """What a user who has not chosen should know. folder: the checkpoint; adapter: of the LoRA merged into it.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    if adapter is not None:
        return f"an adapter does not say which transformers it was trained with: one {_ADVICE}"
    path = folder / "config.json"
    version = read_json_object(path).get("transformers_version") if path.is_file() else None
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None or (int(match[1]), int(match[2])) < _CHANGED:
        return None
    return (
        f"transformers {version} saved this checkpoint: published weights that were only saved again are right as they "
        f"are exported, weights {_ADVICE}"
    )
