"""Rounding to each scheme's grid, against what ONNX Runtime's own DequantizeLinear makes of the stored bytes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mllama_exporter.quantize.calibration import ChannelStatistics
from mllama_exporter.quantize.rounding import dequantized, quantized, row_scales
from mllama_exporter.quantize.scheme import SCHEMES
from mllama_exporter.quantize.smoothing import smoothing_scales
from mllama_runtime.backends.private_ort import ort, session_options
from mllama_runtime.errors import InputError
from onnx import TensorProto, helper

_TYPES = {"I8": TensorProto.INT8, "I4": TensorProto.INT4, "F8_E4M3": TensorProto.FLOAT8E4M3FN}
ROWS, COLUMNS = 6, 256


def weights(seed: int, *, spread: float = 1.0) -> np.ndarray:
    """Rows of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.standard_normal((ROWS, 1)))
    return (rng.standard_normal((ROWS, COLUMNS)) * sizes * 0.02).astype(np.float32)


def through_onnx(data: np.ndarray, scales: np.ndarray, scheme) -> np.ndarray:
    """Stored bytes and scales through DequantizeLinear, as the graphs have it."""
    weight = TensorProto(name="w", data_type=_TYPES[scheme.dtype], dims=[ROWS, COLUMNS], raw_data=data.tobytes())
    attributes = {"axis": 0} if scheme.block_size is None else {"axis": 1, "block_size": scheme.block_size}
    scale = onnx.numpy_helper.from_array(scales[:, 0] if scheme.block_size is None else scales, "s")
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **attributes)],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [weight, scale],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), session_options(log_severity_level=3))
    return session.run(None, {})[0]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_stored_bytes_are_what_onnx_reads(scheme, dtype: str) -> None:
    weight = weights(1)
    scales = row_scales(weight, scheme, dtype)
    expected = through_onnx(quantized(weight, scales, scheme), scales, scheme)
    np.testing.assert_array_equal(dequantized(weight, scales, scheme), expected)
    # Half a step of the grid; E4M3 has three bits of mantissa, and the scale itself is rounded to eight bits at worst.
    step = np.repeat(scales, COLUMNS // scales.shape[1], axis=1)
    bound = np.maximum(np.abs(weight) * 2**-4, step * 2**-9) if scheme.dtype == "F8_E4M3" else step / 2
    assert (np.abs(expected - weight) <= bound * 1.01 + np.abs(weight) * (2**-7 if dtype == "BF16" else 2**-10)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 6))
def test_scales_are_finite_and_positive_whatever_the_rows(seed: int, spread: float) -> None:
    weight = weights(seed, spread=spread)
    weight[0] = 0
    assume(np.abs(weight).max() < 7 * float(np.finfo(np.float16).max))  # or int4 has no scale in FP16, and is refused
    for scheme in SCHEMES.values():
        scales = row_scales(weight, scheme, "F16")
        assert (scales > 0).all()
        assert np.isfinite(scales).all()
        assert (dequantized(weight, scales, scheme)[0] == 0).all()


def test_a_scale_that_is_not_finite_is_refused() -> None:
    weight = weights(1)
    weight[2, 3] = np.inf
    with pytest.raises(InputError, match="not finite"):
        row_scales(weight, SCHEMES["int8"], "F32")


def test_clipping_by_importance_lowers_the_error_of_the_product() -> None:
    rng = np.random.default_rng(5)
    weight, importance = weights(2), np.exp(2 * rng.standard_normal(COLUMNS)).astype(np.float32)
    weight[:, ::64] *= 6  # outliers, in columns that hardly matter
    importance[::64] = 1e-3
    errors = []
    for given_importance in (None, importance):
        off = (
            dequantized(weight, row_scales(weight, SCHEMES["int4"], "F16", given_importance), SCHEMES["int4"]) - weight
        )
        errors.append(float((off**2 * importance).sum()))
    assert errors[1] < 0.8 * errors[0]


def statistics(rows: np.ndarray) -> ChannelStatistics:
    return ChannelStatistics(np.abs(rows).max(axis=0), (rows.astype(np.float64) ** 2).sum(axis=0), len(rows))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_smoothing_lowers_the_error_on_inputs_with_outliers(name: str) -> None:
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((64, COLUMNS)).astype(np.float32)
    rows[:, ::50] *= 30
    weight, scheme, seen = weights(3, spread=0.3), SCHEMES[name], statistics(rows)
    scales = smoothing_scales(scheme, seen, [weight], "F32")
    assert scales is not None
    exact = rows @ weight.T

    def error(scales: np.ndarray) -> float:
        inputs, matrix = rows / scales, weight * scales
        if scheme.activations:
            step = np.abs(inputs).max() / scheme.largest
            inputs = np.rint(inputs / step) * step
        stored = dequantized(matrix, row_scales(matrix, scheme, "F32", seen.mean_square / scales**2), scheme)
        return float(((inputs @ stored.T - exact) ** 2).mean())

    np.testing.assert_allclose((rows / scales) @ (weight * scales).T, exact, rtol=0, atol=1e-4)
    assert error(scales) < 0.7 * error(np.ones(COLUMNS, np.float32))


@pytest.mark.parametrize("name", ["fp8", "int8-weight"])
def test_what_needs_no_smoothing_gets_none(name: str) -> None:
    assert smoothing_scales(SCHEMES[name], statistics(np.ones((2, COLUMNS), np.float32)), [weights(1)], "F32") is None
