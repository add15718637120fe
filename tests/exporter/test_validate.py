"""`mllama validate`: what a right bundle measures, and that every planted fault fails where it is."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from exporter._faults import LAYER, change_weight, relist, slow_rotary, times
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.validate import (
    REPORT_NAME,
    Check,
    Report,
    page_from_report,
    questions_from_jsonl,
    report_from_bundle,
)
from mllama_exporter.validate import pipeline as pipeline_module
from mllama_exporter.validate import reference as reference_module
from mllama_exporter.validate.checks import (
    Observation,
    absolute_error,
    checks_from_observations,
    kl_divergences,
    relative_error,
)
from mllama_exporter.validate.samples import Sample, builtin_samples
from mllama_exporter.validate.task import accuracy_check, question_from_task
from mllama_exporter.validate.thresholds import (
    BF16,
    BF16_WEIGHTS,
    EXACT,
    FP16,
    FP16_WEIGHTS,
    QUANTIZED,
    Bound,
    bounds_of,
)
from mllama_runtime.backends import PREFILL_CHUNK
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main
from mllama_runtime.errors import EnvironmentFault, InputError, ResourceError
from mllama_runtime.evaluation.questions import Question
from mllama_runtime.images import load_image
from mllama_runtime.manifest import Quantization
from mllama_runtime.preprocessing import PreprocessorConfig, preprocess

FEW = ("canvas_1x1", "text_only", "text_before_picture", "canvas_2x2")


def mllama(*args: object) -> Result:
    return CliRunner().invoke(main, list(map(str, args)))


def samples(bundle: Path, names: tuple[str, ...] = FEW) -> list[Sample]:
    return [each for each in builtin_samples(Bundle.read(bundle).manifest.model.vision) if each.name in names]


def validated(bundle: Path, reference: Path, names: tuple[str, ...] = FEW) -> Report:
    return report_from_bundle(Bundle.open(bundle), reference, samples=samples(bundle, names), max_steps=16)


def checks(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


# Planted faults: a bundle's copy is changed, and its manifest made to agree.


def edit(bundle: Path, file: str, old: str, new: str) -> None:
    text = (bundle / file).read_text(encoding="utf-8")
    assert old in text
    (bundle / file).write_text(text.replace(old, new), encoding="utf-8")


def edit_json(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def one_nan(values: np.ndarray) -> np.ndarray:
    values[7] = np.nan
    return values


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done, and the first check that must fail
    "resampling": (lambda bundle: edit_json(bundle / "preprocessor.json", "resample", 3), "pixel_values"),
    "template": (lambda bundle: edit(bundle, "chat_template.jinja", "Today Date", "Date today"), "token_ids"),
    "cross value": (lambda bundle: times(bundle, f"{LAYER}3.cross_attn.v_proj.weight", 1.01), "cross_value_3"),
    "vision tower": (lambda bundle: times(bundle, "vision_model.class_embedding", 1.1), "cross_key_1"),
    "rotary": (slow_rotary, "past_key_0"),
    "self query": (lambda bundle: times(bundle, f"{LAYER}2.self_attn.q_proj.weight", 4), "past_key_4"),
    "self value": (lambda bundle: times(bundle, f"{LAYER}4.self_attn.v_proj.weight", 1.01), "past_value_4"),
    "cross gate": (lambda bundle: times(bundle, f"{LAYER}3.cross_attn_attn_gate", 0.9), "past_key_4"),
    "head": (lambda bundle: times(bundle, "language_model.lm_head.weight", 1.001), "prefill_logits"),
    "end tokens": (lambda bundle: edit_json(bundle / "generation.json", "eos_token_ids", [1]), "generation_identical"),
}
ALONE = {  # faults that fail nothing else: what comes behind is fed with the reference's own tokens
    "template": {"token_ids"},
    "end tokens": {"generation_identical", "standard_generation_identical"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_and_is_named(fault: str, bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    damage, first = FAULTS[fault]
    damage(bundle)
    relist(bundle)
    report = validated(bundle, miniature, FEW[:3])
    assert report.verdict == "fail"
    assert report.failed[0].name == first
    last = report.to_text().splitlines()[-1]
    assert last.startswith(f"fail: {len(report.failed)} of {len(report.checks)} checks")
    assert f"the first is {first} is " in last
    names = {check.name for check in report.failed}
    if fault in ALONE:
        assert names == ALONE[fault]
    if first.startswith(("past", "cross", "prefill")):
        assert f"standard_{first}" in names


def test_what_is_not_a_number_is_counted_and_is_null_in_the_report(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    change_weight(bundle, f"{LAYER}4.mlp.down_proj.weight", one_nan)
    relist(bundle)
    report = validated(bundle, miniature, FEW[:2])
    found = checks(report)
    assert report.failed[0].name == "past_key_5"
    assert found["past_key_5"].value is None
    assert found["num_nonfinite"].value
    assert found["generation_identical"].value == 0
    assert "the first is past_key_5 is not finite instead of" in report.to_text()
    json.dumps(report.to_plain(), allow_nan=False)


def test_an_activation_beyond_fp16_is_named(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of("fp16"), tmp_path / "bundle")
    times(bundle, f"{LAYER}4.mlp.up_proj.weight", 50000)
    relist(bundle)
    report = validated(bundle, miniature, FEW[:1])
    check = checks(report)["largest_activation"]
    assert not check.passed
    assert check.threshold == 65504 / 2
    assert f"{LAYER}4.mlp." in check.detail
    assert checks(report)["standard_num_nonfinite"].value


def test_the_wrong_mask_semantics_fail(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    relist(bundle, mask_semantics="meta")
    report = validated(bundle, miniature)
    assert report.failed[0].name == "past_key_2"  # behind the first cross-attention layer
    assert report.failed[0].detail == "text_before_picture"


# Right bundles.


def test_fp32_through_the_command(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    task = miniature.parent / "pictures" / "questions.jsonl"
    (bundle / "reports").mkdir()
    (bundle / REPORT_NAME).write_text("left behind by an interrupted run")
    result = mllama("validate", bundle, "--reference", miniature, "--task", task, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert report == json.loads((bundle / REPORT_NAME).read_text())
    assert report["verdict"] == "pass"
    assert (report["precision"], report["mask_semantics"], report["backend"]) == ("fp32", "hf", "cpu")
    assert report["reference"]["fingerprint"] == Checkpoint.open(miniature).fingerprint
    assert report["tools"]["transformers"] in report["reference"]["library"]
    assert [each["name"] for each in report["not_run"]] == ["device"]
    assert report["summary"].endswith("(fp32 on cpu, hf semantics, published vision states, against checkpoint)")
    assert report["num_samples"] == 54

    text = Bundle.open(bundle).manifest.model.text
    layered = [
        *("layers_vision", "layers_cross", "layers_rotary", "layers_decoder"),
        *(f"cross_{kind}_{layer}" for layer in text.cross_attention_layers for kind in ("key", "value")),
        *(f"past_{kind}_{layer}" for layer in text.self_attention_layers for kind in ("key", "value")),
        "prefill_logits",
        "teacher_forced_top1",
        "teacher_forced_kl_mean",
        "teacher_forced_kl",
        "generation_identical",
        "num_nonfinite",
    ]
    assert [check["name"] for check in report["checks"]] == [
        *("pixel_values", "aspect_ratios", "token_ids", "cross_attention_mask"),
        *layered,
        "largest_activation",
        *(f"standard_{name}" for name in layered),
        "task_accuracy",
    ]
    for check in report["checks"]:
        assert list(check) == ["name", "value", "threshold", "pass", "bound", "detail"]
        assert check["pass"] is True
        assert isinstance(check["value"], int | float)
        assert check["bound"] in ("at_least", "at_most")

    assert Bundle.open(bundle).verify(full=True).problems == ()
    shown = mllama("inspect", bundle).stdout
    assert f"pass: 0 of {len(report['checks'])} checks failed" in shown
    assert "loading transformers\nreference: 54 samples\n" in result.stderr


def test_a_failure_through_the_command(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    times(bundle, f"{LAYER}2.self_attn.q_proj.weight", 4)
    relist(bundle)
    result = mllama("validate", bundle, "--reference", miniature, "--steps", 2)
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "value", "threshold", "where"]
    assert lines[1].split()[:5] == ["pixel_values", "0", "<=", "1e-06", "ok"]
    assert next(line for line in lines if " FAIL " in line).startswith("layers_decoder ")
    assert "not run: task_accuracy: no task was given" in lines
    assert "the first is layers_decoder is " in lines[-1]
    assert "(decoder layer 2, self-attention, " in lines[-1]
    assert Bundle.open(bundle).manifest.validation.verdict == "fail"
    assert "checks failed against checkpoint (transformers" in mllama("inspect", bundle).stdout


def test_fp16_runs_the_standard_graphs_in_fp16(bundle_of, miniature: Path) -> None:
    report = validated(bundle_of("fp16"), miniature)
    assert report.verdict == "pass", report.to_text()
    found = checks(report)
    assert found["prefill_logits"].threshold == EXACT.logits  # float32 arithmetic on weights FP16 holds
    assert found["standard_prefill_logits"].threshold == FP16.logits
    assert found["standard_prefill_logits"].value > 1e-5 > found["prefill_logits"].value


def test_a_device_is_held_to_its_own_arithmetic(bundle_of, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double of a device: the standard graphs on the CPU, which compute in FP16, under another name."""

    class Double(OrtBackend):
        name = "double"

        def __init__(self, bundle: Bundle, num_threads: int | None) -> None:
            super().__init__(bundle, num_threads, standard=True)

    monkeypatch.setattr(
        pipeline_module, "backend_from_bundle", lambda bundle, name, threads: {"double": Double}[name](bundle, threads)
    )
    bundle = Bundle.open(bundle_of("fp16"))
    chosen = samples(bundle.root, (*FEW[:3], "long_prompt"))
    report = report_from_bundle(bundle, miniature, backend="double", samples=chosen, max_steps=16)
    assert report.verdict == "pass", report.to_text()
    assert report.to_plain()["backend"] == "double"
    found = checks(report)
    assert found["device_prefill_logits"].threshold == FP16.logits
    assert found["device_prefill_logits"] == replace(
        found["standard_prefill_logits"], name="device_prefill_logits"
    )  # the same graphs
    assert not any(name.startswith(("past_", "prefill_", "generation_")) for name in found)
    assert found["layers_decoder"].threshold == EXACT.layers  # the twins' on the CPU
    assert ("ort graphs", "double ran in their place; layers are the CPU's") in [
        (each.name, each.reason) for each in report.not_run
    ]
    assert b"On the device" in page_from_report(report.to_plain())


@pytest.mark.parametrize(("backend", "code"), [("gpu", 2), ("double", 4)])
def test_a_back_end_that_is_not_there(
    backend: str, code: int, bundle_of, miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test double: a back end whose package is missing; the reference is not run for it."""

    def missing(*args: object) -> None:
        raise EnvironmentFault("is not installed", where="double")

    if backend == "double":
        backend = "cpu"
        monkeypatch.setattr(pipeline_module, "backend_from_bundle", missing)
    result = mllama("validate", bundle_of(), "--reference", miniature, "--backend", backend)
    assert result.exit_code == code, result.output
    assert "reference:" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "rror: " in line]
    assert len(lines) == 1


@pytest.fixture(scope="module")
def truncated(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's first four layers in BF16."""
    output = tmp_path_factory.mktemp("truncated") / "bundle"
    return bundle_from_checkpoint(miniature, output, ExportOptions(precision="bf16", num_layers=4)).root


def test_bf16_truncated(miniature: Path, truncated: Path) -> None:
    """The reference is cut to the bundle's layers; what cannot run says why."""
    report = validated(truncated, miniature)
    assert report.verdict == "pass", report.to_text()
    assert "past_key_2" in checks(report)
    assert "past_key_4" not in checks(report)
    assert not any(name.startswith("standard_") for name in checks(report))
    assert [(each.name, each.reason) for each in report.not_run] == [
        ("device", "the back end is the CPU's; --backend chooses another"),
        ("standard graphs", "ONNX Runtime's CPU provider has no bf16 kernels"),
        ("task_accuracy", "no task was given"),
    ]


def test_a_layer_the_bundle_lacks_fails(miniature: Path, truncated: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(truncated, tmp_path / "bundle")
    relist(bundle, options={})
    report = validated(bundle, miniature, FEW[:1])
    assert [check.name for check in report.failed][:2] == ["past_key_4", "past_value_4"]
    assert report.failed[0].value is None


def test_meta_semantics(bundle_of, miniature: Path) -> None:
    report = validated(bundle_of("fp32", "meta"), miniature, ("text_before_picture", "picture_in_second_turn"))
    assert report.verdict == "pass", report.to_text()


def test_a_base_model_has_no_chat_template(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle, reference = (
        shutil.copytree(path, tmp_path / name) for path, name in ((bundle_of(), "b"), (miniature, "r"))
    )
    (bundle / "chat_template.jinja").unlink()
    (reference / "chat_template.jinja").unlink()
    relist(bundle, without=("chat_template.jinja",))
    report = validated(bundle, reference)
    assert report.verdict == "pass", report.to_text()
    assert checks(report)["token_ids"].value == 0


def test_a_sample_the_chat_template_refuses_is_named(bundle_of, miniature: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(miniature, tmp_path / "reference")
    template = reference / "chat_template.jinja"
    refusal = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    report = validated(bundle_of(), reference, ("canvas_1x1", "second_turn"))
    assert report.verdict == "pass", report.to_text()
    assert report.num_samples == 1
    assert report.not_run[0].name == "sample second_turn"
    assert "one turn only" in report.not_run[0].reason


# What is refused.


def test_another_checkpoint_is_refused(bundle_of, miniature: Path, tmp_path: Path) -> None:
    bundle, other = (shutil.copytree(path, tmp_path / name) for path, name in ((bundle_of(), "b"), (miniature, "r")))
    edit_json(other / "config.json", "transformers_version", "4.0.0")
    result = mllama("validate", bundle, "--reference", other, "--json")
    assert result.exit_code == 3
    message = json.loads(result.stdout)["error"]["message"]
    assert Checkpoint.open(miniature).fingerprint in message
    assert Checkpoint.open(other).fingerprint in message
    assert Bundle.open(bundle).manifest.validation is None


def test_a_read_only_bundle_is_refused_at_once(bundle_of, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    result = mllama("validate", bundle_of(), "--reference", miniature)
    assert result.exit_code == 3
    assert "read-only" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_reference_beyond_memory_is_refused(bundle_of, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(ResourceError, match="does not fit into memory"):
        validated(bundle_of(), miniature, FEW[:1])


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "mllama-deploy\[export\]"'):
        importlib.reload(reference_module)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no questions"),
        ("{", "line 1: not JSON"),
        ('{"image": null, "question": "Why?"}', "answer"),
        ('{"image": "absent.png", "question": "Why?", "answer": "So."}', "line 1: no such picture"),
    ],
)
def test_a_wrong_task_file_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        questions_from_jsonl(path)
    with pytest.raises(InputError, match=r"other\.jsonl: cannot be read"):
        questions_from_jsonl(tmp_path / "other.jsonl")


# The parts.


def test_samples_hit_every_canvas_and_a_second_chunk_of_prefill(bundle_of, miniature: Path) -> None:
    bundle = Bundle.open(bundle_of())
    config = PreprocessorConfig.from_dict(json.loads(bundle.path("preprocessor.json").read_text()), "preprocessor")
    chosen = builtin_samples(bundle.manifest.model.vision)
    ids = {preprocess(load_image(image), config).aspect_ratio_id for each in chosen for image in each.images}
    assert ids == set(range(1, len(bundle.manifest.model.vision.supported_aspect_ratios) + 1))
    processor = reference_module.ReferenceProcessor(miniature)
    lengths = {each.name: len(processor.inputs(each).token_ids) for each in chosen}
    assert lengths["long_prompt"] > PREFILL_CHUNK
    assert len(lengths) == len(chosen)
    again = builtin_samples(bundle.manifest.model.vision)
    pictures = [[image.tobytes() for each in some for image in each.images] for some in (chosen, again)]
    assert pictures[0] == pictures[1]


def test_errors_are_on_the_scale_of_the_tensor() -> None:
    expected = np.array([[1.0, -200.0], [3.0, 4.0]], np.float32)
    found = expected + np.array([[0.0, 0.0], [0.0, 1.0]], np.float32)
    assert relative_error(found, expected) == 1 / 200
    assert absolute_error(found, expected) == 1
    assert relative_error(found, np.zeros_like(found)) == 200
    assert relative_error(found[:1], expected) == math.inf
    found[0, 0] = np.nan
    assert relative_error(found, expected) == math.inf
    found[0, 0] = np.inf
    assert absolute_error(found, expected) == math.inf


def test_kl_divergence() -> None:
    even, certain = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl_divergences(certain, even) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert kl_divergences(certain + 7, certain) == pytest.approx(0, abs=1e-15)
    assert kl_divergences(np.array([[np.nan, 0.0]]), even).tolist() == [math.inf]


def test_checks_stand_in_the_order_of_the_data() -> None:
    bounds = {"past": Bound(0.5), "top1": Bound(0.9, of="mean", at_least=True), "count": Bound(0, of="sum")}
    observations = [
        Observation("count", 1, "a"),
        Observation("count", 2, "b"),
        Observation("top1", 1, "a", "step 0"),
        Observation("top1", 0, "b", "step 3"),
        *(Observation(f"past_{kind}_{layer}", layer / 10, "a") for layer in (10, 2) for kind in ("value", "key")),
        Observation("past_key_2", math.inf, "b"),
    ]
    found = checks_from_observations(observations, bounds, prefix="x_")
    assert [check.name for check in found] == [
        *("x_past_key_2", "x_past_value_2", "x_past_key_10", "x_past_value_10", "x_top1", "x_count"),
    ]
    assert [check.value for check in found] == [None, 0.2, 1.0, 1.0, 0.5, 3]
    assert [check.passed for check in found] == [False, True, False, False, False, False]
    assert [check.detail for check in found[::4]] == ["b", "b, step 3"]


@pytest.mark.parametrize(
    ("precision", "dtypes", "num_clamped", "twin", "standard"),
    [
        ("fp32", {"F32"}, 0, EXACT, EXACT),
        ("fp16", {"BF16"}, 0, EXACT, FP16),
        ("fp16", {"BF16"}, 1, FP16_WEIGHTS, FP16),
        ("fp16", {"BF16", "F32"}, 0, FP16_WEIGHTS, FP16),
        ("bf16", {"BF16"}, 0, EXACT, None),
        ("bf16", {"F16"}, 0, BF16_WEIGHTS, None),
    ],
)
def test_thresholds_follow_the_arithmetic(precision, dtypes, num_clamped, twin, standard) -> None:
    bounds = bounds_of(precision, None, dtypes, num_clamped)
    assert bounds["ort"]["past"].limit == twin.tensors
    assert (bounds["standard"]["past"].limit if standard else None) == (standard.tensors if standard else None)
    assert standard or "standard" not in bounds
    assert bounds["device"]["past"].limit == (standard or BF16).tensors


@pytest.mark.parametrize(("base", "vision"), [("fp16", None), ("fp32", "int8"), ("bf16", None)])
def test_what_is_not_quantised_is_held_to_the_base(base, vision) -> None:
    bounds = bounds_of("int4", Quantization(base, vision, (), None), {"BF16"}, 0)
    assert set(bounds) == ({"ort", "device"} if base == "bf16" else {"ort", "device", "standard"})
    for kind, each in bounds.items():
        kept = QUANTIZED[vision] if vision else EXACT if kind == "ort" else {"fp16": FP16, "bf16": BF16}[base]
        assert each["layers_vision"].limit == each["layers_cross"].limit == kept.layers
        assert each["cross"].limit == kept.tensors
        assert each["layers_decoder"].limit == QUANTIZED["int4"].layers
        assert each["teacher_forced_top1"].limit == 0.97
    assert (bounds["ort"]["largest_activation"].limit == 65504 / 2) == (base == "fp16")


def test_agreement_with_the_reference_is_asked_of_every_precision() -> None:
    """Shares of greedy steps, as the product promises them."""
    asked = {scheme: tolerance.top1 for scheme, tolerance in QUANTIZED.items()} | {"fp16": FP16.top1}
    assert asked == {"fp16": 0.999, "int8-weight": 0.995, "int8": 0.99, "fp8": 0.99, "int4": 0.97}


def test_task_accuracy_is_held_to_the_reference() -> None:
    questions = [question_from_task(Question(f"line {number}", "Yes?", ("Yes.",))) for number in range(10)]
    right, half = ["yes. "] * 10, ["Yes."] * 5 + ["No."] * 5
    assert accuracy_check(questions, right, right, 0.0).passed
    assert accuracy_check(questions, right, half, 0.0).passed
    assert not accuracy_check(questions, half, right, 0.01).passed
    check = accuracy_check(questions, [*right[:9], "No."], right, 0.11)
    assert check.passed
    assert check.value == 0.9
    assert "bundle 9/10" in check.detail


def test_task_questions_are_those_of_eval(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not looked at")
    path = tmp_path / "task.jsonl"
    line = {"images": ["a.png", "b.png"], "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
    path.write_text(json.dumps(line))
    (found,) = questions_from_jsonl(path)
    text = {"type": "text", "text": "Which?\nA. red\nB. blue"}
    assert found.sample.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text]}]
    assert found.sample.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert accuracy_check([found], ["The answer is (B)."], ["Blue"], 0.0).value == 1
    assert accuracy_check([found], ["(A)"], ["B"], 0.0).value == 0
    path.write_text(json.dumps(line) + '\n{"question": "Why?", "answer": "So."}\n')
    with pytest.raises(InputError, match="line 1: has options"):
        questions_from_jsonl(path)
