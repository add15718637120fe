"""Every threshold of `mllama validate`, by precision and kind of graph, with the measurement that justifies it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mllama_runtime.manifest import Precision

GraphKind = Literal["ort", "standard"]
"""ONNX Runtime's twins, which a session on the CPU runs; or the graphs that define the product."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a check holds its observations to.

    of: whether the worst of them counts, their mean, or their sum. perfect: the value that needs no explanation.
    """

    limit: float
    of: Literal["worst", "mean", "sum"] = "worst"
    at_least: bool = False

    @property
    def perfect(self) -> float:
        return 1.0 if self.at_least else 0.0


def family(name: str) -> str:
    """The name of a check without its layer: `past` for `past_key_12`."""
    return re.sub(r"_(key|value)_\d+$", "", name)


_LARGEST_FINITE = {"fp32": 3.4028e38, "fp16": 65504.0, "bf16": 3.3895e38}


def _bounds(
    precision: str, *, tensors: float, logits: float, kl: float, kl_mean: float, top1: float, identical: float
) -> Mapping[str, Bound]:
    """In the order of the report, which is that of the data's way through the model.

    tensors: of keys, values and caches, relative to the tensor's largest value; logits: likewise.
    """
    return {
        "pixel_values": Bound(1e-6),
        "aspect_ratios": Bound(0),
        "token_ids": Bound(0),
        "cross_attention_mask": Bound(0),
        "cross": Bound(tensors),
        "past": Bound(tensors),
        "prefill_logits": Bound(logits),
        "teacher_forced_top1": Bound(top1, of="mean", at_least=True),
        "teacher_forced_kl_mean": Bound(kl_mean, of="mean"),
        "teacher_forced_kl": Bound(kl),
        "generation_identical": Bound(identical, of="mean", at_least=True),
        "num_nonfinite": Bound(0, of="sum"),
        "largest_activation": Bound(_LARGEST_FINITE[precision] / 2),
    }


THRESHOLDS: Mapping[tuple[Precision, GraphKind], Mapping[str, Bound]] = {
    ("fp32", "ort"): _bounds("fp32", tensors=1e-5, logits=1e-5, kl=1e-8, kl_mean=1e-9, top1=1, identical=1),
    ("fp32", "standard"): _bounds("fp32", tensors=1e-5, logits=1e-5, kl=1e-8, kl_mean=1e-9, top1=1, identical=1),
    ("fp16", "ort"): _bounds("fp16", tensors=1e-5, logits=1e-5, kl=1e-8, kl_mean=1e-9, top1=1, identical=1),
    ("fp16", "standard"): _bounds("fp16", tensors=1e-2, logits=1e-2, kl=1e-2, kl_mean=1e-3, top1=0.9, identical=0.9),
    ("bf16", "ort"): _bounds("bf16", tensors=1e-5, logits=1e-5, kl=1e-8, kl_mean=1e-9, top1=1, identical=1),
}

TASK_ACCURACY_DROP: Mapping[Precision, float] = {"fp32": 0.0, "fp16": 0.01, "bf16": 0.01}
