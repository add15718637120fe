"""Every threshold of `mllama validate`, by what a graph computes in, with the measurement that justifies it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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


Bounds = Mapping[str, Bound]
"""By the name of the check without its layer, in the order of the report."""


def family(name: str) -> str:
    """The name of a check without its layer: `past` for `past_key_12`."""
    return re.sub(r"_(key|value)_\d+$", "", name)


_LARGEST_FINITE: Mapping[Precision, float] = {"fp32": 3.4028e38, "fp16": 65504.0, "bf16": 3.3895e38}
_ACTIVATION_HEADROOM = 2  # other prompts than the samples reach further

# A checkpoint's dtypes, by their safetensors names, whose values a precision holds. What FP16 loses of a BF16 weight is
# below 2**-25, which no measurement here can tell from nothing; what is beyond 65504 is counted as clamped.
_HELD: Mapping[Precision, frozenset[str]] = {
    "fp32": frozenset({"F32", "F16", "BF16"}),
    "fp16": frozenset({"F16", "BF16"}),
    "bf16": frozenset({"BF16"}),
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the arithmetic of a graph may change.

    tensors: keys, values and caches, each relative to the largest value of the tensor; logits: likewise. kl and
    kl_mean: nats, the largest and the mean over all steps. top1 and identical: shares of steps and of samples.
    """

    tensors: float
    logits: float
    kl: float
    kl_mean: float
    top1: float
    identical: float


# Measured on the trained miniature (6 text layers, 14 samples, 241 steps); in brackets, on random weights of the same
# width in 40 text and 40 vision layers, to see what depth adds. Wider models sum longer rows: their error grows with
# the square root of the width, four times from the miniature's to the 11B model's. Tokens were identical throughout;
# real models have closer calls than the miniature.

# Float32 arithmetic on the checkpoint's own numbers: tensors 1.3e-6 (2.2e-6), logits 1.4e-6 (1.5e-6), KL 4.0e-11, mean
# 6.8e-13.
EXACT = Tolerance(tensors=2e-5, logits=2e-5, kl=1e-7, kl_mean=1e-8, top1=1, identical=1)

# Float32 arithmetic on weights rounded to FP16, from a float32 checkpoint: tensors 8.1e-4, logits 6.6e-4, KL 1.9e-5,
# mean 1.8e-7.
FP16_WEIGHTS = Tolerance(tensors=4e-3, logits=4e-3, kl=1e-3, kl_mean=1e-5, top1=0.99, identical=0.9)

# Float32 arithmetic on weights rounded to BF16, from a float32 checkpoint: tensors 7.0e-3, logits 1.0e-2, KL 2.0e-3,
# mean 1.4e-5.
BF16_WEIGHTS = Tolerance(tensors=3e-2, logits=4e-2, kl=2e-2, kl_mean=2e-4, top1=0.97, identical=0.75)

# FP16 arithmetic: tensors 3.3e-3 (2.0e-3), logits 1.9e-3 (1.1e-3), KL 2.5e-5, mean 5.4e-7.
FP16 = Tolerance(tensors=1e-2, logits=1e-2, kl=1e-2, kl_mean=1e-4, top1=0.98, identical=0.75)

# Of the share of right answers, below the reference's on the same questions.
TASK_ACCURACY_DROP: Mapping[Precision, float] = {"fp32": 0.0, "fp16": 0.01, "bf16": 0.01}


def bounds_of(precision: Precision, checkpoint_dtypes: Collection[str], num_clamped: int) -> dict[GraphKind, Bounds]:
    """The bounds for every kind of graph that runs at a precision; none for a precision that is not known here.

    The twins compute in float32 whatever the precision, so theirs depend on what the weights lost in the export.
    """
    if precision not in _HELD:
        return {}
    is_exact = num_clamped == 0 and _HELD[precision].issuperset(checkpoint_dtypes)
    rounded = FP16_WEIGHTS if precision == "fp16" else BF16_WEIGHTS
    bounds: dict[GraphKind, Bounds] = {"ort": _bounds(EXACT if is_exact else rounded, precision)}
    if precision != "bf16":  # ONNX Runtime's CPU provider has no kernels for it
        bounds["standard"] = _bounds(EXACT if precision == "fp32" else FP16, precision)
    return bounds


def _bounds(tolerance: Tolerance, precision: Precision) -> Bounds:
    """In the order of the report, which is that of the data's way through the model."""
    return {
        "pixel_values": Bound(1e-6),  # measured 0: the same operations in the same order
        "aspect_ratios": Bound(0),
        "token_ids": Bound(0),
        "cross_attention_mask": Bound(0),
        "cross": Bound(tolerance.tensors),
        "past": Bound(tolerance.tensors),
        "prefill_logits": Bound(tolerance.logits),
        "teacher_forced_top1": Bound(tolerance.top1, of="mean", at_least=True),
        "teacher_forced_kl_mean": Bound(tolerance.kl_mean, of="mean"),
        "teacher_forced_kl": Bound(tolerance.kl),
        "generation_identical": Bound(tolerance.identical, of="mean", at_least=True),
        "num_nonfinite": Bound(0, of="sum"),
        "largest_activation": Bound(_LARGEST_FINITE[precision] / _ACTIVATION_HEADROOM),
    }
