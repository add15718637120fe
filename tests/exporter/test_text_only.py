"""A text-only export: the text model alone, the same tokens as transformers' text path, and nothing of pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from host_device import host_backend
from mllama_exporter.engines import EngineOptions, engine_for_bundle
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.quantize import QuantizeOptions, quantized_bundle_from_bundle
from mllama_exporter.validate import report_from_bundle
from mllama_runtime import BundleError, Engine, Limits, Request, RequestError, SamplingParams, UsageError
from mllama_runtime.bundle import Bundle
from mllama_runtime.tensorfile import read_header
from PIL import Image

LIMITS = Limits(max_batch=4, max_seq_len=160, prefill_chunk=32, max_tiles=4)
PICTURE = Image.fromarray(np.zeros((40, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def text_only(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_from_checkpoint(
        miniature, tmp_path_factory.mktemp("text") / "bundle", ExportOptions(precision="fp16", text_only=True)
    )


def asked() -> list[Request]:
    sampled = SamplingParams(temperature=0.9, seed=3, max_new_tokens=15)
    return [
        Request("What comes after three?"),
        Request("Hello", sampling=sampled),
        Request("a " * 60, sampling=SamplingParams(max_new_tokens=4)),
    ]


def test_it_holds_the_text_model_alone(text_only: Bundle, bundle_of: Callable[..., Path]) -> None:
    whole = Bundle.open(bundle_of("fp16"))
    text = text_only.manifest.model.text
    names = set(read_header(text_only.path("weights.safetensors"), error=BundleError).tensors)
    dropped = set(read_header(whole.path("weights.safetensors"), error=BundleError).tensors) - names
    cross = tuple(f"language_model.model.layers.{layer}." for layer in text.cross_attention_layers)
    assert all(name.startswith(("vision_model.", "multi_modal_projector.", *cross)) for name in dropped)
    assert not any(name.startswith(("vision_model.", "multi_modal_projector.", *cross)) for name in names)
    assert "preprocessor.json" not in text_only.manifest.files
    assert set(text_only.manifest.graphs) == {"decoder", "decoder_ort", "decoder_cuda", "greedy", "sampler"}


def test_it_is_transformers_text_path(text_only: Bundle, miniature: Path) -> None:
    report = report_from_bundle(text_only, miniature)
    assert report.verdict == "pass", report.summary
    names = {check.name for check in report.checks}
    assert {"prefill_logits", "generation_identical", "standard_generation_identical"} <= names
    assert not any("cross" in name or "pixel" in name for name in names)
    assert [each.name for each in report.not_run].count("layers") == 1


def test_it_answers_as_the_whole_model_answers_text(text_only: Bundle, bundle_of: Callable[..., Path]) -> None:
    with (
        Engine.load(bundle_of("fp16"), num_threads=1) as whole,
        Engine.load(text_only.root, num_threads=1) as engine,
        Engine(text_only, host_backend(text_only, limits=LIMITS)) as static,
    ):
        expected = [answer.token_ids for answer in whole.generate_batch(asked())]
        assert [answer.token_ids for answer in engine.generate_batch(asked())] == expected
        assert [answer.token_ids for answer in static.generate_batch(asked())] == expected
        assert not {"cross", "pixels_0", "picture_0"} & {region.name for region in static.memory().regions}


def test_pictures_are_refused(text_only: Bundle) -> None:
    with Engine.load(text_only.root, num_threads=1) as engine:
        for ask in (
            lambda: engine.generate("What is this?", images=[PICTURE]),
            lambda: engine.generate("What is this?<|image|>", images=[PICTURE], raw=True),
            lambda: engine.encode_image(PICTURE),
        ):
            with pytest.raises(
                RequestError, match=r"images: the model is text-only, and sees no pictures; ask without"
            ):
                ask()


def test_it_is_quantised_and_built(text_only: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(text_only.root, tmp_path / "copy")
    with pytest.raises(UsageError, match="--vision: the model is text-only, and has no vision graph"):
        quantized_bundle_from_bundle(Bundle.open(folder), tmp_path / "no", QuantizeOptions("int8-weight", "int8"), None)
    made = quantized_bundle_from_bundle(Bundle.open(folder), tmp_path / "int8", QuantizeOptions("int8-weight"), None)
    built = engine_for_bundle(made.root, EngineOptions("tensorrt-rtx", max_batch=2, max_seq_len=64, prefill_chunk=16))
    assert set(built.record.engines) == {"decoder", "greedy", "sampler"}
    assert [profile.name for profile in built.record.engines["decoder"].profiles] == ["text_prefill", "text_decode"]
    details = {finding.check: finding.detail for finding in built.record.engines["decoder"].findings}
    assert details["attention"] == "4 attentions, each one kernel"
    with Engine.load(made.root, num_threads=1) as engine:
        assert engine.generate("What comes after three?").text
