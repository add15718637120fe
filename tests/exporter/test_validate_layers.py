"""The first-divergence table: a right bundle's is green, a planted fault is named where it is and only there."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from exporter._faults import LAYER, relist, shift_mask, slow_rotary, swap_weights, times
from mllama_exporter.quantize.calibration import calibration_samples
from mllama_exporter.quantize.pipeline import QuantizeOptions, quantized_bundle_from_bundle
from mllama_exporter.validate import PAGE_NAME
from mllama_exporter.validate.checks import checks_from_observations
from mllama_exporter.validate.compare import Candidate
from mllama_exporter.validate.layers import LayerTable, added_error, drift, layer_observations, table_from_errors
from mllama_exporter.validate.observed import ObservedBundle
from mllama_exporter.validate.reference import ReferenceModel, ReferenceProcessor, ReferenceRun
from mllama_exporter.validate.samples import builtin_samples
from mllama_exporter.validate.spots import GROUPS, add_states, layer_of_weight, reference_modules, spots_of
from mllama_exporter.validate.thresholds import GraphKind, bounds_of
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main
from mllama_runtime.errors import BundleError

CROSS, SELF = (1, 3), (0, 2, 4, 5)  # the miniature's layers by kind


@pytest.fixture(scope="module")
def runs(bundle_of, miniature: Path) -> list[ReferenceRun]:
    """What the reference makes of the samples whose layers are measured."""
    config = Bundle.open(bundle_of()).manifest.model
    processor = ReferenceProcessor(miniature)
    model = ReferenceModel(miniature, mask_semantics="hf", vision_states="published")
    samples = [each for each in builtin_samples(config.vision) if each.depth == "layers"]
    return [model.run(processor.inputs(each), 1, reference_modules(config)) for each in samples]


def tables(bundle: Path, runs: Sequence[ReferenceRun]) -> dict[GraphKind, LayerTable]:
    """The table of each kind of graphs."""
    opened = Bundle.open(bundle)
    known = bounds_of(opened.manifest.precision, opened.manifest.quantization, {"BF16"}, 0)
    bounds = {kind: each for kind, each in known.items() if kind != "device"}  # layers are measured on the CPU
    candidate = Candidate(opened, OrtBackend(opened))
    observed = {kind: ObservedBundle(opened, candidate, kind) for kind in bounds}
    return {
        kind: table_from_errors(kind, [each.layer_errors(run) for run in runs], bounds[kind])
        for kind, each in observed.items()
    }


def failing(table: LayerTable) -> list[str]:
    """The places past their thresholds."""
    return [error.where for error in table.errors if error.added > table.limits[error.spot.group]]


@pytest.fixture(scope="module")
def quantized(bundle_of, tmp_path_factory: pytest.TempPathFactory, miniature: Path) -> Callable[[str], Path]:
    """`quantized(scheme)`: the miniature's quantised bundle."""
    root = tmp_path_factory.mktemp("quantized")

    def quantize(scheme: str) -> Path:
        if not (root / scheme).exists():
            samples = calibration_samples(miniature.parent / "pictures" / "questions.jsonl")
            options = QuantizeOptions(scheme=scheme)  # type: ignore[arg-type]
            quantized_bundle_from_bundle(Bundle.open(bundle_of("fp16")), root / scheme, options, samples)
        return root / scheme

    return quantize


# What is done to a bundle of a precision; the first place past its threshold; and a pattern of all that may be: the
# faults of masks and angles are in every layer of their kind.
FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "int4 scales, down": (
        "int4",
        lambda bundle: times(bundle, f"{LAYER}3.mlp.down_proj.weight_scale", 4),
        "decoder layer 3, MLP",
        "decoder layer 3, MLP",
    ),
    "int8 scales, query": (
        "int8",
        lambda bundle: times(bundle, f"{LAYER}4.self_attn.q_proj.weight_scale", 4),
        "decoder layer 4, self-attention",
        "decoder layer 4, self-attention",
    ),
    "int8-weight scales, value": (
        "int8-weight",
        lambda bundle: times(bundle, f"{LAYER}2.self_attn.v_proj.weight_scale", 4),
        "decoder layer 2, self-attention value",
        "decoder layer 2, self-attention( value)?",
    ),
    "fp8 scales, head": (
        "fp8",
        lambda bundle: times(bundle, "language_model.lm_head.weight_scale", 4),
        "language head, norm and projection",
        "language head, norm and projection",
    ),
    "swapped norms": (
        "fp32",
        lambda bundle: swap_weights(bundle, *(f"{LAYER}3.cross_attn.{side}_norm.weight" for side in "qk")),
        "decoder layer 3, cross-attention key",
        "decoder layer 3, cross-attention( key)?",
    ),
    "shifted mask": (
        "int4",
        shift_mask,
        "decoder layer 1, cross-attention",
        "decoder layer [13], (cross-attention|MLP)",
    ),
    "rotary": (
        "int8",
        slow_rotary,
        "self-attention layers, rotary angles",
        "self-attention layers, rotary angles|decoder layer [0245], self-attention.*",
    ),
    "rotary, exact": (
        "fp32",
        slow_rotary,
        "self-attention layers, rotary angles",
        "self-attention layers, rotary angles|decoder layer [0245], self-attention.*",
    ),
    "gate": (
        "fp16",
        lambda bundle: times(bundle, f"{LAYER}1.cross_attn_mlp_gate", 0.5),
        "decoder layer 1, MLP",
        "decoder layer 1, MLP",
    ),
    "projector": (
        "fp32",
        lambda bundle: times(bundle, "multi_modal_projector.weight", 1.01),
        "projector, intermediate states and projection",
        "projector, intermediate states and projection",
    ),
    "vision": (
        "fp32",
        lambda bundle: times(bundle, "vision_model.transformer.layers.1.self_attn.v_proj.weight", 1.01),
        "vision layer 1, self-attention",
        "vision layer 1, self-attention",
    ),
    "global vision": (
        "fp32",
        lambda bundle: times(bundle, "vision_model.global_transformer.layers.0.mlp.fc1.weight", 1.01),
        "global vision layer 0, MLP",
        "global vision layer 0, MLP",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_nothing_else(fault: str, bundle_of, quantized, runs, tmp_path: Path) -> None:
    precision, damage, first, others = FAULTS[fault]
    whole = bundle_of(precision) if precision in ("fp32", "fp16", "bf16") else quantized(precision)
    bundle = shutil.copytree(whole, tmp_path / "bundle")
    damage(bundle)
    relist(bundle)
    for table in tables(bundle, runs).values():
        found = failing(table)
        assert found[0] == table.first_divergence.where == first
        assert all(re.fullmatch(others, where) for where in found), found


@pytest.mark.parametrize("precision", ["int8-weight", "int8", "fp8", "int4"])
def test_a_right_bundle_has_no_divergence(precision: str, quantized, runs) -> None:
    found = tables(quantized(precision), runs)
    assert set(found) == {"ort", "standard"}
    assert [failing(table) for table in found.values()] == [[], []]
    assert [table.first_divergence for table in found.values()] == [None, None]


def test_what_a_layer_inherits_is_not_what_it_adds(bundle_of, runs, tmp_path: Path) -> None:
    """Behind a damaged layer every state drifts, and no other branch adds an error."""
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    times(bundle, f"{LAYER}0.mlp.up_proj.weight", 4)
    relist(bundle)
    errors = {error.where: error for error in tables(bundle, runs)["ort"].errors}
    assert errors["decoder layer 0, MLP"].added == pytest.approx(3, rel=0.05)  # four times up, so three too much
    last = errors["decoder layer 5, MLP"]
    assert last.added < 1e-5 < 1e-2 < last.drift.relative
    assert last.drift.cosine < 0.999
    assert last.drift.max_abs > 0.1
    before = errors["decoder layer 0, self-attention"]
    assert before.drift.relative < 1e-5
    assert before.drift.cosine > 0.99999


def test_a_check_that_fails_tells_the_first_place_and_its_error(bundle_of, runs, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle_of(), tmp_path / "bundle")
    for layer, factor in ((2, 2), (4, 4)):
        times(bundle, f"{LAYER}{layer}.mlp.down_proj.weight", factor)
    relist(bundle)
    table = tables(bundle, runs)["ort"]
    checks = checks_from_observations(layer_observations(table), bounds_of("fp32", None, {"BF16"}, 0)["ort"])
    assert [check.name for check in checks] == [f"layers_{group}" for group in GROUPS]
    assert [check.passed for check in checks] == [True, True, True, False]
    assert checks[-1].value == pytest.approx(1, rel=0.01)  # of layer 2, though layer 4's is 3
    assert checks[-1].detail.startswith("decoder layer 2, MLP, ")


def test_the_command_names_the_layer_in_text_json_and_page(quantized, miniature: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(quantized("int4"), tmp_path / "bundle")
    times(bundle, f"{LAYER}3.mlp.down_proj.weight_scale", 4)
    relist(bundle)
    arguments = ["validate", str(bundle), "--reference", str(miniature), "--steps", "1", "--layers"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "ort",
        "graphs",
        "branch",
        "added",
        "error",
        "threshold",
        "cosine",
        "max",
        "abs",
        "relative",
    ]
    assert [line.split("  ")[0] for line in lines if " FIRST " in line] == ["decoder layer 3"] * 2
    assert "ort graphs: the first past its threshold is decoder layer 3, MLP" in lines
    assert "the first is layers_decoder is " in lines[-1]
    assert "(decoder layer 3, MLP, " in lines[-1]
    report = json.loads((bundle / "reports/validation.json").read_text())
    assert report["verdict"] == "fail"
    assert [each["first_divergence"] for each in report["layers"]] == [
        {"layer": "decoder layer 3", "branch": "MLP"}
    ] * 2
    assert "decoder layer 3, MLP" in (bundle / PAGE_NAME).read_text()
    assert Bundle.open(bundle).verify(full=True).problems == ()


def test_every_layer_has_its_places(bundle_of) -> None:
    model = Bundle.open(bundle_of()).manifest.model
    spots = spots_of(model)
    assert len({spot.tensor for spot in spots}) == len(spots)
    branches = {layer: [spot.branch for spot in spots if spot.layer == f"decoder layer {layer}"] for layer in range(6)}
    for layers, kind in ((CROSS, "cross-attention"), (SELF, "self-attention")):
        for layer in layers:
            assert branches[layer] == [f"{kind} key", f"{kind} value", kind, "MLP"]
    towers = [spot.layer for spot in spots if spot.group == "vision"]
    assert towers.count("vision layer 2") == towers.count("global vision layer 1") == 2
    assert towers[-1] == "projector"
    named = {spot.layer for spot in spots}
    for weight, graph in (
        ("vision_model.patch_embedding.weight", "vision"),
        ("vision_model.layernorm_post.weight", "vision"),
        ("vision_model.transformer.layers.2.mlp.fc1.weight", "vision"),
        ("vision_model.global_transformer.layers.1.gate_ffn", "vision"),
        (f"{LAYER}3.cross_attn.k_proj.weight", "vision"),
        ("language_model.model.embed_tokens.weight", "decoder"),
        ("language_model.lm_head.weight", "decoder"),
    ):
        assert layer_of_weight(weight, graph) in named  # type: ignore[arg-type]


def test_a_graph_of_another_model_is_refused(bundle_of) -> None:
    bundle = Bundle.open(bundle_of())
    model = ir.load(bundle.path("decoder.onnx"))
    model.graph.initializers[f"{LAYER}2.post_attention_layernorm.weight"].name = "another"
    with pytest.raises(BundleError, match=r"layers\.2\.post_attention_layernorm\.weight has no LayerNorm"):
        add_states(model, bundle.manifest.model, "decoder")


def test_added_error_is_that_of_the_worst_row_over_what_the_branch_adds() -> None:
    start = np.array([[3.0, 4.0], [0.0, 0.1]])
    expected = start + np.array([[1.0, 0.0], [0.0, 0.2]])
    found = expected + np.array([[0.1, 0.0], [0.0, 0.06]])
    assert added_error(found, expected, start) == pytest.approx(0.06 / 0.2)
    assert added_error(expected, expected, start) == 0
    # A branch that adds nothing to a row is measured against a 64th of the row.
    assert added_error(start + np.array([[0.05, 0], [0, 0]]), start, start) == pytest.approx(0.05 / (5 / 64))
    # Without a start, rows are measured against themselves, and small ones against a 64th of the largest.
    assert added_error(found, expected, None) == pytest.approx(0.06 / 0.3)
    tiny = np.array([[64.0, 0.0], [0.0, 0.0]])
    assert added_error(tiny + np.array([[0, 0], [0.5, 0]]), tiny, None) == pytest.approx(0.5)
    assert added_error(np.ones((1, 2)), np.zeros((1, 2)), None) == math.inf
    assert added_error(np.zeros((1, 2)), np.zeros((1, 2)), None) == 0
    for wrong in (np.full_like(expected, np.nan), expected[:1], np.full_like(expected, np.inf)):
        assert added_error(wrong, expected, start) == math.inf
    assert added_error(np.empty(0), np.empty(0), None) == math.inf  # nothing was there to be compared


def test_drift_is_on_the_scale_of_the_tensor() -> None:
    expected = np.array([[1.0, 0.0], [0.0, -200.0], [0.0, 0.0]])
    found = expected + np.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert drift(found, expected).cosine == pytest.approx(math.sqrt(0.5))
    assert drift(found, expected).max_abs == 1
    assert drift(found, expected).relative == 1 / 200
    assert drift(expected, expected).cosine == 1
    assert drift(-expected, expected).cosine == pytest.approx(-1)
    assert drift(expected[:2], expected).relative == math.inf
