"""`mllama plan`: weights are those of real bundles, memory the runtime's, activations near those of real engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mllama_exporter import sizing
from mllama_exporter.engines import EngineOptions, engine_for_bundle
from mllama_runtime import BundleError
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main
from mllama_runtime.config import check_model
from mllama_runtime.engine_record import Limits
from mllama_runtime.manifest import Precision
from mllama_runtime.memory import memory_plan
from mllama_runtime.roofline import cache_bytes, decode_weight_bytes
from mllama_runtime.tensorfile import read_header


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, args)])


@pytest.mark.parametrize("precision", sizing.PRECISIONS)
def test_weights_are_those_of_bundles(precision: Precision, bundle_of: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundle_of(precision))
    header = read_header(bundle.path("weights.safetensors"), error=BundleError)
    found = sizing.weights_of(bundle.manifest.model, precision)
    assert found.total_bytes == sum(info.size_bytes for info in header.tensors.values())
    assert found.picture_bytes == decode_weight_bytes(bundle, batch=1, has_image=True)
    assert found.text_bytes == decode_weight_bytes(bundle, batch=1, has_image=False)


def test_memory_is_that_of_an_engine(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """But for activations, which are an estimate: the engine's own are put in their place."""
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(bundle_of("fp16"), tmp_path / "bundle")
    for max_batch in (1, 4):
        limits = Limits(max_batch, 1024, 512, 4)
        options = EngineOptions("tensorrt-rtx", max_batch=max_batch, max_seq_len=1024, prefill_chunk=512)
        engines = engine_for_bundle(folder, options).record.engines.values()
        model = Bundle.open(folder).manifest.model
        activations = max(engine.activation_bytes for engine in engines)
        weights = sum(engine.weights_bytes for engine in engines)
        planned = sizing.plan_of(model, limits, "fp16")
        real = memory_plan(model, limits, cache_dtype="float16", weights_bytes=weights, workspace_bytes=activations)
        assert planned.weights_bytes == pytest.approx(weights, rel=0.01)  # TensorRT keeps copies of a few small ones
        assert planned.regions == real.regions
        assert planned.device_bytes - planned.workspace_bytes + activations == pytest.approx(
            real.device_bytes, rel=0.03
        )
        assert 0.9 * activations < planned.workspace_bytes < 1.5 * activations


def test_the_published_models(tmp_path: Path) -> None:
    small, large = sizing.PUBLISHED["11b"], sizing.PUBLISHED["90b"]
    for model in (small, large):
        check_model(model, tmp_path, BundleError)
    assert sizing.weights_of(small, "bf16").total_bytes == 2 * 10_670_220_835
    assert sizing.weights_of(large, "bf16").total_bytes == 2 * 88_593_355_323  # as exported: parameters of 90B
    assert cache_bytes(small, num_cached=1, num_tiles=0, dtype="float16") == 2 * 2 * 32 * 8 * 128
    assert cache_bytes(large, num_cached=0, num_tiles=4, dtype="float16") == 2 * 2 * 20 * 8 * 128 * 4 * 1601


def test_a_fit_is_the_largest() -> None:
    model, limits, gpu = sizing.PUBLISHED["11b"], Limits(4, 8192, 512, 4), sizing.GPUS["l40s"]
    found = sizing.fit(model, limits, "fp16", gpu)
    assert found.fits
    room = gpu.memory_bytes - 2**30
    for batch, holds in ((found.batch, True), (found.batch + 1, False)):
        assert (sizing.plan_of(model, Limits(batch, 8192, 512, 4), "fp16").device_bytes <= room) is holds
    assert not sizing.fit(model, limits, "fp32", sizing.GPUS["l4"]).fits
    assert sizing.fit(model, limits, "fp32", sizing.GPUS["l4"]).batch == 0
    assert found.text_tokens_per_second is not None
    assert found.picture_tokens_per_second is not None
    assert (
        found.picture_tokens_per_second < found.text_tokens_per_second < 864e9 / 14e9
    )  # without cross-attention and embedding


def test_tables(bundle_of: Callable[..., Path]) -> None:
    every = run("11b")
    assert every.exit_code == 0, every.output
    assert all(name in every.stdout for name in (*sizing.GPUS, *sizing.PRECISIONS))
    one = run("90b", "--gpu", "NVIDIA H200")
    assert one.exit_code == 0, one.output
    words = [line.split() for line in one.stdout.splitlines()]
    assert next(line for line in words if line[:1] == ["fp16"] and "no" in line)[3:5] == ["no", "0"]
    assert next(line for line in words if line[:1] == ["fp8"] and "yes" in line)
    assert run(bundle_of(), "--memory", "2GB", "--max-batch", 2).exit_code == 0


def test_json(miniature: Path) -> None:
    result = run(miniature / "config.json", "--memory", "24GiB", "--max-seq-len", 1024, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["limits"] == {"max_batch": 4, "max_seq_len": 1024, "prefill_chunk": 512, "max_tiles": 4}
    fits = found["gpus"]["24GiB"]["fits"]
    assert [each["precision"] for each in fits] == list(sizing.PRECISIONS)
    for each in fits:
        assert each["memory"]["device_bytes"] == sum(each["memory"]["parts"].values())
        assert each["text_tokens_per_second"] is None
    assert len(found["picture_bytes"]) == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("7b",), 2, "MODEL: no such model: expected a bundle, a checkpoint folder, a config.json, or 11b or 90b"),
        (("11b", "--gpu", "v100"), 2, "--gpu: unknown GPU: expected l4, "),
        (("11b", "--memory", "much"), 2, "--memory: not a size"),
        (("11b", "--memory", "1GB", "--gpu", "l4"), 2, "one or the other"),
        (("11b", "--max-tiles", 3), 2, "--max-tiles: not whole pictures: expected a multiple of 4"),
        (("11b", "--max-seq-len", 200_000), 2, "longer than the model's positions"),
    ],
)
def test_mistakes_are_one_line(args: tuple[object, ...], code: int, message: str) -> None:
    result = run(*args)
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run(tmp_path)
    assert result.exit_code == 3
    assert "model_type: this model is not supported: expected 'mllama', found 'llama'" in result.stderr
