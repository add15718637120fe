"""Every threshold of `mllama validate`, by what a graph computes in, with the measurement that justifies it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from mllama_runtime.manifest import BasePrecision, Precision, Quantization, QuantizedPrecision

GraphKind = Literal["ort", "device", "standard"]
"""ONNX Runtime's twins on the CPU; what a back end for a GPU runs; the graphs that define the product, on the CPU."""
PREFIXES: Mapping[GraphKind, str] = {"ort": "", "device": "device_", "standard": "standard_"}
"""Of the names of checks."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a check holds its observations to.

    of: whether the worst of them counts, their mean, their sum, or the first that is past the limit (the worst if none
    is). perfect: the value that needs no explanation.
    """

    limit: float
    of: Literal["worst", "first", "mean", "sum"] = "worst"
    at_least: bool = False

    @property
    def perfect(self) -> float:
        return 1.0 if self.at_least else 0.0


Bounds = Mapping[str, Bound]
"""By the name of the check without its layer, in the order of the report."""


def family(name: str) -> str:
    """The name of a check without its layer: `past` for `past_key_12`."""
    return re.sub(r"_(key|value)_\d+$", "", name)


_LARGEST_FINITE: Mapping[BasePrecision, float] = {"fp32": 3.4028e38, "fp16": 65504.0, "bf16": 3.3895e38}
_ACTIVATION_HEADROOM = 2  # other prompts than the samples reach further

# A checkpoint's dtypes, by their safetensors names, whose values a precision holds. What FP16 loses of a BF16 weight is
# below 2**-25, which no measurement here can tell from nothing; what is beyond 65504 is counted as clamped.
_HELD: Mapping[BasePrecision, frozenset[str]] = {
    "fp32": frozenset({"F32", "F16", "BF16"}),
    "fp16": frozenset({"F16", "BF16"}),
    "bf16": frozenset({"BF16"}),
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the arithmetic of a graph may change.

    layers: the error that a branch adds to its worst row (see layers.added_error). tensors: keys, values and caches,
    each relative to the largest value of the tensor; logits: likewise. kl and kl_mean: nats, the largest and the mean
    over all steps. top1 and identical: shares of steps and of samples.
    """

    layers: float
    tensors: float
    logits: float
    kl: float
    kl_mean: float
    top1: float
    identical: float


# Measured on the trained miniature (6 text layers, 54 samples, 1,316 steps); in brackets, on random weights of the same
# width in 40 text and 40 vision layers, to see what depth adds. Wider models sum longer rows: their error grows with
# the square root of the width, four times from the miniature's to the 11B model's. Tokens were identical wherever no
# number stands; real models have closer calls than the miniature.

# Float32 arithmetic on the checkpoint's own numbers: layers 1.5e-6, tensors 2.8e-6 (2.2e-6), logits 1.4e-6 (1.5e-6),
# KL 4.0e-11, mean 6.8e-13.
EXACT = Tolerance(layers=2e-5, tensors=2e-5, logits=2e-5, kl=1e-7, kl_mean=1e-8, top1=1, identical=1)

# Float32 arithmetic on weights rounded to FP16, from a float32 checkpoint: layers 1.7e-3, tensors 8.1e-4, logits
# 6.6e-4, KL 5.7e-5, mean 1.8e-7.
FP16_WEIGHTS = Tolerance(layers=1e-2, tensors=4e-3, logits=4e-3, kl=1e-3, kl_mean=1e-5, top1=0.99, identical=0.9)

# Float32 arithmetic on weights rounded to BF16, from a float32 checkpoint: layers 7.5e-3, tensors 7.0e-3, logits
# 1.0e-2, KL 5.0e-3, mean 1.4e-5, top1 0.9992, identical 0.98.
BF16_WEIGHTS = Tolerance(layers=6e-2, tensors=3e-2, logits=4e-2, kl=2e-2, kl_mean=2e-4, top1=0.97, identical=0.75)

# FP16 arithmetic: layers 1.4e-3, tensors 3.3e-3 (2.0e-3), logits 1.9e-3 (1.1e-3), KL 8.6e-5, mean 5.4e-7; from a
# float32 checkpoint top1 0.9992, identical 0.98.
FP16 = Tolerance(layers=1e-2, tensors=1e-2, logits=1e-2, kl=1e-2, kl_mean=1e-4, top1=0.999, identical=0.75)

# BF16 arithmetic: transformers in BF16 against itself in float32, on the CPU: tensors 2.1e-2, logits 2.0e-2, KL 1.0e-2,
# mean 4.8e-5, top1 0.9985, identical 0.96. Layers are not measured on devices, which alone compute in BF16 here: eight
# times FP16's, which has three bits more. Not yet held against a GPU.
BF16 = Tolerance(layers=8e-2, tensors=8e-2, logits=8e-2, kl=0.1, kl_mean=5e-4, top1=0.99, identical=0.75)

_ARITHMETIC: Mapping[BasePrecision, Tolerance] = {"fp32": EXACT, "fp16": FP16, "bf16": BF16}

# Quantised decoders on FP16; the worse of float32 and FP16 arithmetic around them. What a layer adds does not grow with
# depth, so it is held tightly: to two or three times what was measured, for a scale that is wrong by 4x adds 1.1 at
# least. What reaches caches and logits does grow, and is held loosely.

# INT8 weights: layers 2.6e-2, tensors 2.2e-2, logits 3.0e-2, KL 6.5e-3, mean 3.2e-5, top1 0.9992, identical 0.98.
INT8_WEIGHT = Tolerance(layers=0.1, tensors=0.2, logits=0.2, kl=0.1, kl_mean=1e-3, top1=0.995, identical=0.75)

# INT8 weights and activations: layers 0.28 (0.088 in the vision tower), tensors 0.47 (a prompt without picture), logits
# 0.17, KL 0.18, mean 8.3e-4, top1 0.994, identical 0.85.
INT8 = Tolerance(layers=0.6, tensors=1, logits=0.6, kl=1, kl_mean=1e-2, top1=0.99, identical=0.6)

# FP8: layers 9.6e-2 (0.16 in the vision tower), tensors 0.11, logits 0.10, KL 9.1e-2, mean 3.7e-4, top1 0.995,
# identical 0.94.
FP8 = Tolerance(layers=0.3, tensors=0.6, logits=0.4, kl=0.5, kl_mean=5e-3, top1=0.99, identical=0.6)

# INT4 weights in blocks of 128: layers 0.22, tensors 0.26, logits 0.20, KL 0.22, mean 1.8e-3, top1 0.992, identical
# 0.83.
INT4 = Tolerance(layers=0.5, tensors=1, logits=0.6, kl=1.5, kl_mean=2e-2, top1=0.97, identical=0.5)

# With a quantised vision tower the errors of both add up, at single close calls most: KL 0.60 with FP8 in both graphs
# (mean 1.9e-3, top1 0.9954), 0.13 with INT8 (7.6e-4, 0.9962). Both KL bounds are this many times wider then.
_KL_WITH_TOWER = 3

QUANTIZED: Mapping[QuantizedPrecision, Tolerance] = {
    "int8-weight": INT8_WEIGHT,
    "int8": INT8,
    "fp8": FP8,
    "int4": INT4,
}

# Of a score, below the reference's, or below FP32's, on the same questions.
ACCURACY_DROP: Mapping[Precision, float] = {
    "fp32": 0.0,
    "fp16": 0.002,
    "bf16": 0.002,
    "int8-weight": 0.005,
    "int8": 0.005,
    "fp8": 0.005,
    "int4": 0.015,
}


def bounds_of(
    precision: Precision, quantization: Quantization | None, checkpoint_dtypes: Collection[str], num_clamped: int
) -> dict[GraphKind, Bounds]:
    """The bounds for every kind of graph that runs at a precision.

    The twins compute in float32 whatever the precision, so theirs depend on what the weights lost in the export. A
    device computes in the base precision, as the standard graphs do.
    quantization: of a quantised precision; what it has not quantised is held to its base precision.
    """
    base = base_of(precision, quantization)
    is_exact = num_clamped == 0 and _HELD[base].issuperset(checkpoint_dtypes)
    rounded = FP16_WEIGHTS if base == "fp16" else BF16_WEIGHTS
    arithmetic = _bounds(_ARITHMETIC[base], precision, quantization)
    bounds: dict[GraphKind, Bounds] = {
        "ort": _bounds(EXACT if is_exact else rounded, precision, quantization),
        "device": arithmetic,
    }
    if base != "bf16":  # ONNX Runtime's CPU provider has no kernels for it
        bounds["standard"] = arithmetic
    return bounds


def base_of(precision: Precision, quantization: Quantization | None) -> BasePrecision:
    """The precision of what is not quantised. The manifest's reader has seen that a quantised one has a base."""
    return quantization.base if quantization is not None else cast(BasePrecision, precision)


def _bounds(base: Tolerance, precision: Precision, quantization: Quantization | None) -> Bounds:
    """In the order of the report, which is that of the data's way through the model."""
    tower = decoder = base
    if quantization is not None:
        decoder = QUANTIZED[cast(QuantizedPrecision, precision)]
        if quantization.vision is not None:
            tower = QUANTIZED[quantization.vision]
            decoder = replace(decoder, kl=_KL_WITH_TOWER * decoder.kl, kl_mean=_KL_WITH_TOWER * decoder.kl_mean)
    largest = _LARGEST_FINITE[base_of(precision, quantization)]
    return {
        "pixel_values": Bound(1e-6),  # measured 0: the same operations in the same order
        "aspect_ratios": Bound(0),
        "token_ids": Bound(0),
        "cross_attention_mask": Bound(0),
        "layers_vision": Bound(tower.layers, of="first"),
        "layers_cross": Bound(tower.layers, of="first"),
        "layers_rotary": Bound(EXACT.layers, of="first"),  # in float32 whatever the precision
        "layers_decoder": Bound(decoder.layers, of="first"),
        "cross": Bound(tower.tensors),
        "past": Bound(decoder.tensors),
        "prefill_logits": Bound(decoder.logits),
        "teacher_forced_top1": Bound(decoder.top1, of="mean", at_least=True),
        "teacher_forced_kl_mean": Bound(decoder.kl_mean, of="mean"),
        "teacher_forced_kl": Bound(decoder.kl),
        "generation_identical": Bound(decoder.identical, of="mean", at_least=True),
        "num_nonfinite": Bound(0, of="sum"),
        "largest_activation": Bound(largest / _ACTIVATION_HEADROOM),
    }
