"""Quantised bundles of the miniature: still the model, deterministic, and refused where they could not be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from mllama_exporter.quantize import (
    QuantizeOptions,
    calibration,
    calibration_samples,
    pipeline,
    quantized_bundle_from_bundle,
)
from mllama_exporter.quantize.layers import groups_of, kept
from mllama_exporter.quantize.weights import WeightsPlan, WeightsReader, write_quantized_weights
from mllama_exporter.validate import report_from_bundle
from mllama_exporter.validate.samples import builtin_samples
from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import Row, prefill
from mllama_runtime.errors import BundleError, ImageError, InputError, ResourceError, UsageError
from mllama_runtime.evaluation.asking import AskOptions, answers_from_engine
from mllama_runtime.evaluation.metrics import exact
from mllama_runtime.evaluation.questions import Question, task_from_jsonl
from mllama_runtime.prompt import image_visibility
from mllama_runtime.sampling import Sampler
from mllama_runtime.streaming import TextStream
from mllama_runtime.tensorfile import encode_header, read_header
from PIL import Image

SCHEMES = ("int8", "int8-weight", "int4", "fp8")
QuestionsOf = Callable[[str, int], Path]


def score(bundle: Path, questions: tuple[Question, ...]) -> float:
    with Engine.load(bundle, num_threads=1) as engine:
        answers = answers_from_engine(engine, questions, AskOptions())
    return float(np.mean([exact(answer, each.answers) for answer, each in zip(answers, questions, strict=True)]))


@pytest.fixture
def source(bundle_of) -> Bundle:
    return Bundle.open(bundle_of("fp16"))


@pytest.mark.parametrize(("scheme", "vision"), [*((each, None) for each in SCHEMES), ("int8", "int8"), ("fp8", "fp8")])
def test_answers_stay_right(scheme: str, vision: str | None, bundle_of, questions_of: QuestionsOf) -> None:
    """The bars on 2,000 questions are 0.5 to 1.5 points and are measured by `mllama eval`; 200 tell a broken one."""
    questions = task_from_jsonl(questions_of("held_out", 200)).questions
    assert score(bundle_of(scheme, vision=vision), questions) >= score(bundle_of("fp32"), questions) - 0.02


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_base_is_quantised(base: str, scheme: str, bundle_of, tmp_path: Path, questions_of: QuestionsOf) -> None:
    """Schemes that scale columns leave what was read alone: its hash says that it is the bundle's."""
    source = Bundle.open(bundle_of(base))
    samples = calibration_samples(questions_of("calibration", 128))[:48]
    bundle = quantized_bundle_from_bundle(source, tmp_path / "out", QuantizeOptions(scheme), samples)
    assert bundle.manifest.quantization.base == base
    questions = task_from_jsonl(questions_of("held_out", 200)).questions[:50]
    assert score(bundle.root, questions) >= score(source.root, questions) - 0.04


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_of_the_decoder_is_quantised_once(scheme: str, bundle_of) -> None:
    bundle = Bundle.open(bundle_of(scheme))
    matrices = {
        name for group in groups_of(ir.load(bundle_of("fp16") / "decoder.onnx").graph) for name in group.members
    }
    assert "language_model.lm_head.weight" in matrices
    assert len(matrices) == 4 * 7 + 2 * 5 + 1  # four self-attention layers, two of cross-attention, the head
    graph = ir.load(bundle.path("decoder.onnx")).graph
    nodes = [node for node in graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()]
    assert {node.inputs[0].name for node in nodes} == matrices
    rounded = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert len(rounded) == (4 * 4 + 2 * 4 + 1 if scheme in ("int8", "fp8") else 0)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize(
    ("scheme", "operator"), [("int4", "MatMulNBits"), ("int8-weight", "MatMulNBits"), ("int8", "MatMulInteger")]
)
def test_the_twin_uses_the_kernels_for_quantised_weights(scheme: str, operator: str, bundle_of) -> None:
    found = operators(bundle_of(scheme) / "decoder.ort.onnx")
    assert found.count(operator) == 4 * 7 + 2 * 5 + 1
    assert "DequantizeLinear" not in found
    assert "Gemm" not in found


def test_weights_shrink_and_the_rest_stays(bundle_of, source: Bundle) -> None:
    sizes = {scheme: Bundle.open(bundle_of(scheme)).manifest.files["weights.safetensors"] for scheme in SCHEMES}
    before = source.manifest.files["weights.safetensors"].size_bytes
    assert sizes["int4"].size_bytes < sizes["int8"].size_bytes < 0.7 * before
    for scheme in SCHEMES:
        quantised = Bundle.open(bundle_of(scheme)).manifest
        assert quantised.precision == scheme
        assert quantised.quantization is not None
        assert quantised.quantization.base == "fp16"
        assert quantised.source == source.manifest.source
        assert quantised.files["tokenizer.json"] == source.manifest.files["tokenizer.json"]


def test_the_same_input_gives_the_same_bytes(source: Bundle, tmp_path: Path, questions_of: QuestionsOf) -> None:
    samples = calibration_samples(questions_of("calibration", 128))[:8]
    made = [
        quantized_bundle_from_bundle(source, tmp_path / name, QuantizeOptions("int8", "int8"), samples)
        for name in ("one", "two")
    ]
    assert made[0].manifest == made[1].manifest


def test_what_is_kept_is_as_it_was(source: Bundle, tmp_path: Path) -> None:
    options = QuantizeOptions("int8-weight", keep=("lm_head", "layers.0.*"))
    bundle = quantized_bundle_from_bundle(source, tmp_path / "out", options, None)
    assert bundle.manifest.quantization is not None
    assert "language_model.lm_head.weight" in bundle.manifest.quantization.kept
    assert len(bundle.manifest.quantization.kept) == 8
    report = operators(bundle.path("decoder.ort.onnx"))
    assert report.count("MatMulNBits") == 3 * 7 + 2 * 5


def test_patterns_take_names_with_or_without_prefixes() -> None:
    names = ["language_model.lm_head.weight", "language_model.model.layers.0.mlp.up_proj.weight"]
    for pattern in ("lm_head", "language_model.lm_head", "*.lm_head.weight"):
        assert kept(names, [pattern]) == {names[0]}
    assert kept(names, ["layers.0.*"]) == {names[1]}
    with pytest.raises(UsageError, match=r"layers\.7\.\*: names no matrix"):
        kept(names, ["layers.7.*"])


def prefill_logits(path: Path, questions: tuple[Question, ...]) -> np.ndarray:
    """Logits of each prompt's last token, [questions, vocab]."""
    bundle, found = Bundle.open(path), []
    backend, model = OrtBackend(bundle, 1), bundle.manifest.model
    with Engine(bundle, backend) as engine:
        for each in questions:
            prompt = engine.prompt(Request(each.prompt, images=each.images))
            features = [engine.encode_image(image).features for image in prompt.images]
            visibility = image_visibility(prompt.token_ids, model.image_token_id, [one.num_tiles for one in features])
            row = Row(
                np.array(prompt.token_ids),
                visibility,
                features,
                Sampler(SamplingParams(), model.text.vocab_size),
                TextStream(engine.tokenizer.backend),
                max_new_tokens=1,
            )
            slots = backend.slots(num_slots=1, cache_len=row.cache_len, num_tiles=visibility.shape[1])
            found.append(prefill(slots, 0, row, bundle.manifest.mask_semantics).copy())
    return np.stack(found)


def test_activation_aware_scales_beat_rounding_to_nearest(
    source: Bundle, bundle_of, questions_of: QuestionsOf, tmp_path: Path
) -> None:
    quantized_bundle_from_bundle(source, tmp_path / "nearest", QuantizeOptions("int4"), None)
    questions = task_from_jsonl(questions_of("held_out", 200)).questions
    exact_logits = prefill_logits(bundle_of("fp32"), questions)
    aware, nearest = (
        float(np.sqrt(((prefill_logits(path, questions) - exact_logits) ** 2).mean()))
        for path in (bundle_of("int4"), tmp_path / "nearest")
    )
    assert aware < 0.97 * nearest  # measured 0.94; on the miniature before this one 0.80


# --- what is refused


def text_only(samples: tuple[Question, ...]) -> tuple[Question, ...]:
    return tuple(replace(each, images=()) for each in samples)


def refusal(source: Bundle, output: Path, scheme: str, samples, error: type[Exception] = InputError) -> str:
    with pytest.raises(error) as caught:
        quantized_bundle_from_bundle(source, output, QuantizeOptions(scheme), samples)  # type: ignore[arg-type]
    assert not list(output.parent.iterdir())
    return str(caught.value)


def test_text_alone_calibrates_nothing(source: Bundle, tmp_path: Path, questions_of: QuestionsOf) -> None:
    samples = text_only(calibration_samples(questions_of("calibration", 128))[:4])
    assert "there is no picture among the calibration samples" in refusal(source, tmp_path / "out", "int8", samples)


def test_what_the_guard_is_for(
    source: Bundle,
    bundle_of,
    miniature: Path,
    questions_of: QuestionsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every guard forced off, text alone makes a bundle that no longer sees, and validation says so."""

    def floor(statistics: calibration.ChannelStatistics, group: object) -> None:
        statistics.max_abs = np.maximum(statistics.max_abs, 1e-4)

    monkeypatch.setattr(calibration, "check_pictures", lambda samples: None)
    monkeypatch.setattr(calibration, "check_statistics", floor)
    samples = text_only(calibration_samples(questions_of("calibration", 128))[:16])
    bundle = quantized_bundle_from_bundle(source, tmp_path / "out", QuantizeOptions("int8"), samples)
    few = [each for each in builtin_samples(source.manifest.model.vision) if each.depth == "layers"]
    report = report_from_bundle(bundle, miniature, samples=few, max_steps=8)
    assert report.verdict == "fail"
    first = next(check for check in report.failed if check.name.startswith("layers"))
    assert "decoder layer 1" in first.detail  # the first cross-attention layer
    questions = task_from_jsonl(questions_of("held_out", 200)).questions[:100]
    assert score(bundle.root, questions) < 0.6 < score(bundle_of("int8"), questions)


def test_no_samples(source: Bundle, tmp_path: Path) -> None:
    assert "no calibration samples" in refusal(source, tmp_path / "out", "int8", ())
    for scheme in ("int8", "fp8"):
        assert "needs data" in refusal(source, tmp_path / "out", scheme, None, UsageError)


def test_a_model_of_other_widths_than_blocks(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: a scheme whose blocks divide none of the miniature's widths, as 128 divides none of some models'."""
    monkeypatch.setattr(pipeline, "SCHEMES", {"int4": replace(pipeline.SCHEMES["int4"], block_size=192)})
    assert "scheme: int4 fits none of the model's matrices" in refusal(source, tmp_path / "out", "int4", None)


def test_a_quantised_bundle_is_not_quantised_again(bundle_of, tmp_path: Path) -> None:
    assert "is quantised already" in refusal(Bundle.open(bundle_of("int4")), tmp_path / "out", "int8-weight", None)


def test_an_activation_of_zeros_is_named(
    source: Bundle, tmp_path: Path, questions_of: QuestionsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = calibration.ChannelStatistics.add
    blind = next(
        group for group in groups_of(ir.load(source.path("decoder.onnx")).graph) if "layers.3.cross" in group.members[0]
    )

    def blinded(self, max_abs, sum_squares, num_rows):  # stands for a layer whose input is zero on every sample
        add(self, max_abs * (len(max_abs) != blind.width), sum_squares, num_rows)

    monkeypatch.setattr(calibration.ChannelStatistics, "add", blinded)
    samples = calibration_samples(questions_of("calibration", 128))[:2]
    message = refusal(source, tmp_path / "out", "int8", samples)
    assert (
        "self_attn.q_proj.weight: calibration gives no usable scale" in message.replace(", ", " ")
        or "no usable scale" in message
    )


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255)])
def test_pictures_of_one_color_are_survived(color: tuple[int, int, int], source: Bundle, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (60, 60), color).save(tmp_path / "pictures" / "plain.png")
    samples = calibration_samples(tmp_path / "pictures")
    bundle = quantized_bundle_from_bundle(source, tmp_path / "out", QuantizeOptions("int8", "int8"), samples)
    for name in ("vision.onnx", "decoder.onnx"):
        for node in ir.load(bundle.path(name)).graph:
            if node.op_type == "QuantizeLinear":
                scale = float(node.inputs[1].const_value.numpy())
                assert np.isfinite(scale)
                assert scale > 0


def test_folders_and_files_that_hold_no_pictures(source: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        calibration_samples(folder)
    (folder / "not.png").write_text("a text file")
    with pytest.raises(ImageError, match=r"not\.png"):
        quantized_bundle_from_bundle(source, tmp_path / "out", QuantizeOptions("int8"), calibration_samples(folder))
    with pytest.raises(InputError, match="cannot be read"):
        calibration_samples(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question": 3}\n')
    with pytest.raises(InputError, match="line 1"):
        calibration_samples(tmp_path / "bad.jsonl")
    line = {"image": "pictures/not.png", "question": "What is this?"}
    (tmp_path / "open.jsonl").write_text(json.dumps(line) + "\n")
    assert calibration_samples(tmp_path / "open.jsonl")[0].answers == ()  # a question without an answer will do


def test_a_base_model_is_asked_without_a_template(bundle_of, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of("fp16"), tmp_path / "base")
    (copy / "chat_template.jinja").unlink()
    manifest = Bundle.read(copy).manifest
    files = {name: entry for name, entry in manifest.files.items() if name != "chat_template.jinja"}
    (copy / "manifest.json").write_bytes(replace(manifest, files=files).to_json())
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "pictures" / "noise.png")
    samples = calibration_samples(tmp_path / "pictures")
    bundle = quantized_bundle_from_bundle(Bundle.open(copy), tmp_path / "out", QuantizeOptions("int8"), samples)
    assert bundle.manifest.quantization.calibration.num_images == 1


def test_a_question_that_cannot_be_asked_is_named(source: Bundle, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    images = (tmp_path / "a.png",)
    samples = (Question("first", "What?", (), images), Question("second", "word " * 140_000, (), images))
    with pytest.raises(InputError, match="second: prompt: the prompt is too long"):
        quantized_bundle_from_bundle(source, tmp_path / "out", QuantizeOptions("int8"), samples)


def test_damaged_weights_are_not_quantised(source: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(source.root, tmp_path / "copy")
    opened = Bundle.open(copy)
    weights = copy / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="not what the manifest says"):
        quantized_bundle_from_bundle(opened, tmp_path / "out", QuantizeOptions("int8-weight"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_language_head_is_measured_on_every_token_of_the_answers(source: Bundle, questions_of: QuestionsOf) -> None:
    samples = calibration_samples(questions_of("calibration", 128))[:4]
    groups = groups_of(ir.load(source.path("decoder.onnx")).graph)
    with Engine(source, OrtBackend(source, 1)) as engine:
        found = calibration.measured(source, engine, samples, {"decoder": groups}, lambda done, total: None)
        asked = [Request(each.prompt, images=each.images) for each in samples]
        num_tokens = sum(len(answer.token_ids) for answer in engine.generate_batch(asked))
    head = next(group for group in groups if "lm_head" in group.members[0])
    assert found.statistics[head].num_rows == num_tokens


def test_a_small_disk_is_noticed_before_calibration(
    source: Bundle, tmp_path: Path, questions_of: QuestionsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    samples = calibration_samples(questions_of("calibration", 128))
    steps: list[str] = []
    options = QuantizeOptions("int8")
    with pytest.raises(ResourceError, match=r"the disk is full.*found 1000 bytes free"):
        quantized_bundle_from_bundle(source, tmp_path / "out", options, samples, lambda step, *_: steps.append(step))
    assert (steps, list(tmp_path.iterdir())) == ([], [])


def test_a_norm_that_smoothing_takes_beyond_fp16_is_named(tmp_path: Path) -> None:
    header, _ = encode_header([("norm.weight", "F16", (4,))])
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header + np.array([1, 2, 60000, 3], np.float16).tobytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    plan = WeightsPlan({}, {"norm.weight": np.array([1, 1, 0.5, 1], np.float32)})
    with (
        WeightsReader([read_header(path, error=InputError)]) as reader,
        pytest.raises(InputError, match=r"norm\.weight"),
    ):
        write_quantized_weights(reader, {path: digest}, plan, tmp_path / "out.safetensors")
