"""Bench on a back end with limits, and the arithmetic that its times are held against."""

from __future__ import annotations

import math

import pytest
from bench.random_checkpoint import INSTRUCT_11B
from host_device import host_backend
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bench import bench
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine_record import Limits
from mllama_runtime.roofline import cache_bytes, decode_bytes, decode_weight_bytes, first_token_flops, vision_flops

OPTIONS = {"batches": (1, 2, 8), "tiles": (0, 1, 4), "prompt_len": 8, "cache_len": 64, "steps": 2}


def test_a_back_end_with_limits_leaves_out_what_it_cannot_take(bundle_of) -> None:
    """On the host double: the path of a device, work ahead included."""
    bundle = Bundle.open(bundle_of())
    limits = Limits(max_batch=2, max_seq_len=64, prefill_chunk=6, max_tiles=4)
    with host_backend(bundle, limits=limits) as backend:
        rows = list(bench(bundle, backend, **OPTIONS))
        again = [row.kind for row in bench(bundle, backend, **OPTIONS)]  # every slot was freed
    assert [row.kind for row in rows] == again == ["first token"] * 3 + ["decode"] * 9
    for row in rows:
        assert (row.seconds is None) == (row.batch == 8)
        assert row.reason == ("8 rows: the engine takes 2" if row.batch == 8 else None)


def test_no_limits_no_reasons(bundle_of) -> None:
    bundle = Bundle.open(bundle_of())
    with OrtBackend(bundle, 1) as backend:
        assert all(row.reason is None for row in bench(bundle, backend, **{**OPTIONS, "batches": (1,)}))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-weight"])
def test_bytes_of_a_step_of_the_miniature(bundle_of, precision: str) -> None:
    """Counted by hand: what is not quantised takes the base's size, a quantised matrix a byte and a scale a row."""
    bundle = Bundle.open(bundle_of(precision))
    text = bundle.manifest.model.text
    item = 4 if precision == "fp32" else 2
    width, kv, inner = text.hidden_size, text.num_kv_heads * text.head_dim, text.intermediate_size

    def matrix(rows: int, columns: int) -> int:
        return rows * columns + item * rows if precision == "int8-weight" else item * rows * columns

    norms = 2 * item * width
    mlp = 2 * matrix(inner, width) + matrix(width, inner)
    own = 2 * matrix(width, width) + 2 * matrix(kv, width) + mlp + norms
    cross = 2 * matrix(width, width) + mlp + norms + item * (text.head_dim + 2)  # q_norm and two gates
    head = matrix(text.vocab_size, width) + item * width
    for batch in (1, 5):
        least = len(text.self_attention_layers) * own + head + batch * item * width
        assert decode_weight_bytes(bundle, batch=batch, has_image=False) == least
        least += len(text.cross_attention_layers) * cross
        assert decode_weight_bytes(bundle, batch=batch, has_image=True) == least


def test_bytes_of_a_step_grow_with_rows_tokens_and_tiles(bundle_of) -> None:
    bundle = Bundle.open(bundle_of("fp16"))
    model = bundle.manifest.model

    def read(batch: int, num_cached: int, num_tiles: int, on_cpu: bool = False) -> int:
        return decode_bytes(bundle, batch=batch, num_cached=num_cached, num_tiles=num_tiles, on_cpu=on_cpu)

    head = 2 * model.text.num_kv_heads * model.text.head_dim * 2  # a key and a value of one layer in FP16
    token = head * len(model.text.self_attention_layers)
    tile = head * len(model.text.cross_attention_layers) * model.vision.num_patches
    line = 2 * model.text.hidden_size  # of the embedding table
    assert read(1, 101, 0) - read(1, 100, 0) == token
    assert read(3, 100, 2) - read(3, 100, 1) == 3 * tile
    assert read(2, 100, 1) - read(1, 100, 1) == 100 * token + tile + line
    twin = next(spec.dtype for spec in bundle.manifest.graphs["decoder_ort"].inputs if spec.name == "past_key_0")
    assert read(1, 101, 0, on_cpu=True) - read(1, 100, 0, on_cpu=True) == token * (2 if twin == "float32" else 1)


def test_sizes_of_the_11b_model() -> None:
    """Against the published model: 128 KiB of cache a token, 50 MiB of keys and values a tile, in 16 bits."""
    mebibyte = 2**20
    assert cache_bytes(INSTRUCT_11B, num_cached=1, num_tiles=0, dtype="bfloat16") == 2**17
    tile = cache_bytes(INSTRUCT_11B, num_cached=0, num_tiles=1, dtype="bfloat16")
    assert math.isclose(tile, 50 * mebibyte, rel_tol=0.01)
    # Over 6,432 rows: two operations for each of the tower's 0.86e9 parameters, and nearly as many in its attention.
    flops = vision_flops(INSTRUCT_11B.vision, INSTRUCT_11B.text)
    assert 18e12 < flops < 22e12
    text = first_token_flops(INSTRUCT_11B, num_tokens=128, num_tiles=0)
    assert math.isclose(text, 2 * 128 * 7.0e9, rel_tol=0.05)  # the matrices of 32 layers, the head apart
    assert first_token_flops(INSTRUCT_11B, num_tokens=128, num_tiles=4) > text + flops
