"""Which vision states a checkpoint's weights want, as far as its files tell.

No file says where weights were trained: config.json names the transformers that saved them last, and an adapter none.
"""

from __future__ import annotations

import re
from pathlib import Path

from mllama_exporter.checkpoints.hf_config import read_json_object
from mllama_exporter.checkpoints.meta import is_meta

_CHANGED = (4, 55)  # the first version that takes other states than Meta's code does
_LOWERED = [2, 6, 14, 22, 29]  # what makes 4.56 and newer take the states of the published [3, 7, 15, 23, 30]
_ADVICE = (
    "For the published weights, and for what was trained with 4.54 or older, this export is right. For weights trained "
    "with 4.56 or newer, export with --vision-states transformers-4.56 too, and compare both with `mllama eval`; for "
    "those trained with 4.55, neither is."
)


def vision_states_notice(folder: Path, adapter: Path | None) -> str | None:
    """What a user who has not chosen should know. folder: the checkpoint; adapter: of the LoRA to merge into it.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    path = (folder.resolve().parent if is_meta(folder) else folder) / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("intermediate_layers_indices") == _LOWERED:
        return (
            f"config.json has intermediate_layers_indices {_LOWERED}, one lower than published, as transformers 4.56 "
            "and newer needs them for the published weights. Export with --vision-states transformers-4.56."
        )
    if adapter is not None:
        return f"no file says which transformers the adapter was trained with. {_ADVICE}"
    version = config.get("transformers_version")
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})[\w.+]{,20}", version) if isinstance(version, str) else None
    if match is None or (int(match[1]), int(match[2])) < _CHANGED:
        return None
    return f"transformers {match[0]} saved this checkpoint last. {_ADVICE}"
