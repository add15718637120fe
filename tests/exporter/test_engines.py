"""Real TensorRT-RTX engines of the miniature, built without a GPU: every precision, structural check and fault.

Nothing is run: what only a GPU can show is marked `gpu`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from mllama_exporter.engines import EngineOptions, builder, engine_for_bundle, pipeline, plan, preflight
from mllama_exporter.engines.checks import findings_from_network
from mllama_exporter.engines.kernels import kernels_from_log, memory_from_log
from mllama_exporter.engines.network import Network, network_from_graph
from mllama_runtime.backends.private_trt import TensorRT, tensorrt_from_backend
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine_record import Kernel, Limits, engine_from_bundle
from mllama_runtime.errors import BundleError, EnvironmentFault, GateError, InputError, ResourceError, UsageError
from mllama_runtime.manifest import Validation

from ._networks import BROKEN, load

pytest.importorskip("tensorrt_rtx")

OPTIONS = EngineOptions("tensorrt-rtx", max_batch=2, max_seq_len=256, prefill_chunk=32)
PRECISIONS = [
    ("fp32", None),
    ("fp16", None),
    ("bf16", None),
    ("int8", None),
    ("int8", "int8"),
    ("int8-weight", None),
    ("int4", None),
    ("fp8", None),
    ("fp8", "fp8"),
]
BundleOf = Callable[..., Path]


@pytest.fixture
def folder(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """A copy of the FP16 bundle, to build into."""
    return shutil.copytree(bundle_of("fp16"), tmp_path / "bundle")


@pytest.fixture
def trt() -> TensorRT:
    return tensorrt_from_backend("tensorrt-rtx")


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, hashed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def parsed(trt: TensorRT, path: Path) -> Network:
    with trt.logged() as log:
        return network_from_graph(trt, trt.api.Builder(trt.logger), path, 64, log)


@pytest.mark.parametrize(("precision", "vision"), PRECISIONS)
def test_every_precision_builds(precision: str, vision: str | None, bundle_of: BundleOf, tmp_path: Path) -> None:
    # TensorRT itself reads the weights, from beside the graph: any path must do.
    folder = shutil.copytree(bundle_of(precision, vision=vision), tmp_path / "mein Bündel 模型")
    before = contents(folder)
    built = engine_for_bundle(folder, OPTIONS)
    after = contents(folder)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}

    engine = engine_from_bundle(Bundle.open(folder, full=True), "tensorrt-rtx", version=built.record.inputs.version)
    record = engine.record
    assert record == built.record
    assert (record.precision, record.inputs.limits) == (precision, Limits(2, 256, 32, 4))
    vision_engine, decoder = record.engines["vision"], record.engines["decoder"]
    assert [len(engine.read(graph)) for graph in ("vision", "decoder")] == [
        vision_engine.size_bytes,
        decoder.size_bytes,
    ]
    assert not vision_engine.warnings + decoder.warnings

    details = {finding.check: finding.detail for finding in decoder.findings}
    assert details["caches"] == "8 caches updated in place"
    assert details["positions"] == "4 attentions know which cache entries are written"
    assert details["inputs"] == "all 18 inputs are used"
    how = "decomposed, for FP32 has no kernel of its own" if precision == "fp32" else "each one kernel"
    assert details["attention"] == f"6 attentions, {how}"
    assert {finding.check: finding.detail for finding in vision_engine.findings}["attention"] == f"5 attentions, {how}"

    if precision != "fp32":  # what the network demands is what the builder says it made, in every profile
        fused = Counter(node for kernel in decoder.kernels if "_mha_" in kernel.name for node in kernel.nodes)
        assert sorted(fused.values()) == [2, 2, 4, 4, 4, 4]  # cross-attention is not in the two text profiles

    # Products take the types they were quantised to; weights take that many bits. A step has 37 products: seven in each
    # of four layers, five in each of two, less what is fused, and the head. Keys and queries at least are merged.
    moved = {"int8": "Int8", "fp8": "FP8"}.get(precision)
    products = [kernel for kernel in decoder.kernels if kernel.kind == "gemm"]
    if moved:
        assert {kernel.inputs[:1] for kernel in products} == {(moved,)}
        assert len(products) >= 2 * 20
    bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int4": 4}.get(precision, 8)
    assert decoder.weights_bytes == pytest.approx(DECODER_WEIGHTS * bits / 8 + KEPT_BYTES, rel=0.15)
    if vision:
        assert moved in {name for kernel in vision_engine.kernels if kernel.kind == "gemm" for name in kernel.inputs}


# The miniature's decoder: products that can be quantised, and what cannot in 16 bits (the embedding, scales, norms).
DECODER_WEIGHTS = 3_670_016
KEPT_BYTES = 2 * 1032 * 256


def test_building_again_does_nothing(folder: Path) -> None:
    verdict = Validation("pass", "reports/validation.json", 3, 0, "the model")
    Bundle.open(folder).stamp(verdict, {"reports/validation.json": b"{}"})
    first = engine_for_bundle(folder, OPTIONS)
    before = contents(folder)
    steps: list[str] = []
    again = engine_for_bundle(folder, OPTIONS, lambda step, done, total: steps.append(step))
    assert (first.already_built, again.already_built, steps) == (False, True, [])
    assert again.record == first.record
    assert contents(folder) == before
    assert Bundle.open(folder).manifest.validation == verdict

    other = engine_for_bundle(folder, replace(OPTIONS, compute_capabilities=("12.0", "8.9", "8.9")))
    assert other.record.inputs.compute_capabilities == ("8.9", "12.0")
    assert [entry.key for entry in Bundle.open(folder).manifest.engines] == [first.record.key, other.record.key]


@pytest.mark.parametrize("damage", ["emptied", "gone"])
def test_a_damaged_engine_is_built_again(damage: str, folder: Path) -> None:
    first = engine_for_bundle(folder, OPTIONS)
    file = folder / first.record.engines["decoder"].file
    file.unlink()
    if damage == "emptied":
        file.touch()
    with pytest.raises(BundleError, match=r"decoder\.engine"):
        Bundle.open(folder)
    again = engine_for_bundle(folder, OPTIONS)
    assert not again.already_built
    assert [entry.key for entry in Bundle.open(folder, full=True).manifest.engines] == [first.record.key]


def test_profiles_hold_the_limits(folder: Path) -> None:
    limits = Limits(max_batch=3, max_seq_len=100, prefill_chunk=20, max_tiles=8)
    graphs = Bundle.open(folder).manifest.graphs
    (images,) = plan.profiles_from_limits("vision", graphs["vision"], limits)
    shapes = images.shapes["pixel_values"]
    assert (shapes.smallest[:2], shapes.usual[:2], shapes.largest[:2]) == ((1, 4), (1, 4), (3, 4))
    profiles = {each.name: each.shapes for each in plan.profiles_from_limits("decoder", graphs["decoder"], limits)}
    assert list(profiles) == ["prefill", "decode", "text_prefill", "text_decode"]
    for name, shapes in profiles.items():
        batch, seq, rows = (2, 20, 2) if "prefill" in name else (3, 1, 3)
        smallest, largest = ((0, 17), (0, 17)) if "text" in name else ((1, 17), (rows, 8 * 17))
        assert (shapes["input_ids"].smallest, shapes["input_ids"].largest) == ((1, 1), (batch, seq))
        assert shapes["past_key_0"].smallest == (1, 2, 100, 64)
        assert shapes["past_key_0"].largest == (batch, 2, 100, 64)
        assert shapes["cross_key_1"].smallest == (smallest[0], 2, smallest[1], 64)
        assert shapes["cross_key_1"].largest == (largest[0], 2, largest[1], 64)
        assert shapes["cross_attention_mask"].largest == (batch, seq, largest[1] // 17)
        assert shapes["logits_indices"].largest == (batch, min(16, seq))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_structure_is_found_and_named(name: str, folder: Path, trt: TensorRT) -> None:
    damage, message = BROKEN[name]
    model = load(str(folder / "decoder.onnx"))
    damage(model)
    onnx.save(model, folder / "broken.onnx")
    network = parsed(trt, folder / "broken.onnx")
    with pytest.raises(GateError, match=message) as caught:
        findings_from_network(network, "decoder", Bundle.read(folder).manifest.model, low_precision=True)
    assert str(caught.value.where).endswith("broken.onnx")


def test_decomposable_attention_is_found(folder: Path, trt: TensorRT) -> None:
    network = parsed(trt, folder / "decoder.onnx")
    next(network.attentions()).decomposable = True
    with pytest.raises(GateError, match=r"Attention_\d+ may be decomposed"):
        findings_from_network(network, "decoder", Bundle.read(folder).manifest.model, low_precision=True)


def test_a_broken_structure_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    model = replace(Bundle.read(folder).manifest.model.text, num_layers=7)
    monkeypatch.setattr(
        pipeline,
        "findings_from_network",
        lambda network, graph, config, **given: findings_from_network(
            network, graph, replace(config, text=model), **given
        ),
    )
    with pytest.raises(GateError, match="6 attentions where 7 are expected"):
        engine_for_bundle(folder, OPTIONS)
    assert contents(folder) == before


def test_an_operator_that_tensorrt_does_not_know_is_named(folder: Path, trt: TensorRT) -> None:
    model = load(str(folder / "decoder.onnx"))
    model.graph.node[0].op_type, model.graph.node[0].name = "NoSuchThing", "the_culprit"
    onnx.save(model, folder / "broken.onnx")
    with pytest.raises(BundleError, match=r"cannot take the graph.*the_culprit"):
        parsed(trt, folder / "broken.onnx")


class Lazy:
    """A test double: TensorRT's builder, whose build gives nothing, or no bytes, and says why or not."""

    def __init__(self, real: Any, result: Any, said: str, trt: TensorRT) -> None:
        self._real, self._result, self._said, self._trt = real, result, said, trt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def build_serialized_network(self, network: object, config: object) -> Any:
        if self._said:
            self._trt.logger.log(self._trt.api.ILogger.Severity.ERROR, self._said)
        return self._result


@pytest.mark.parametrize(
    ("result", "said", "error", "message"),
    [
        (
            None,
            "Error Code 10: no kernel for it",
            BundleError,
            "cannot build the engine: found Error Code 10: no kernel",
        ),
        (SimpleNamespace(nbytes=0), "", BundleError, "cannot build the engine: found TensorRT gave no reason"),
        (None, "Error Code 2: OutOfMemory", ResourceError, "ran out of memory: found Error Code 2: OutOfMemory"),
    ],
)
def test_a_builder_that_returns_nothing_leaves_nothing(
    result: object,
    said: str,
    error: type[Exception],
    message: str,
    folder: Path,
    trt: TensorRT,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(folder)
    real = trt.api.Builder
    monkeypatch.setattr(trt.api, "Builder", lambda logger: Lazy(real(logger), result, said, trt))
    with pytest.raises(error, match=message):
        engine_for_bundle(folder, OPTIONS)
    assert contents(folder) == before


def test_tensorrts_own_error_is_quoted(bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real failure: attention in FP32 has no kernel, and is not allowed to be decomposed."""
    folder = shutil.copytree(bundle_of("fp32"), tmp_path / "bundle")
    before = contents(folder)

    def strict(*args: Any) -> Network:
        network = network_from_graph(*args)
        for attention in network.attentions():
            attention.decomposable = False
        return network

    monkeypatch.setattr(pipeline, "network_from_graph", strict)
    with pytest.raises(
        BundleError, match=r"vision\.onnx: TensorRT-RTX cannot build .* not supported by a dedicated kernel"
    ):
        engine_for_bundle(folder, OPTIONS)
    assert contents(folder) == before


def test_an_interrupt_stops_the_build_and_leaves_nothing(folder: Path) -> None:
    before = contents(folder)
    seen: list[tuple[str, int, int]] = []

    def interrupt(step: str, done: int, total: int) -> None:
        seen.append((step, done, total))
        if (step, done) == ("decoder", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_for_bundle(folder, OPTIONS, interrupt)
    assert seen[-1][:2] == ("decoder", 1)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "damage"), [("weights.safetensors", b"\x7f"), ("decoder.onnx", b"\x00"), ("tokenizer.json", b" ")]
)
def test_a_damaged_bundle_is_not_built(name: str, damage: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1] + damage)
    before = contents(folder)
    with pytest.raises(BundleError, match=name):
        engine_for_bundle(folder, OPTIONS)
    assert contents(folder) == before


def test_another_engine_needs_no_room_but_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = preflight.estimate_from_bundle(Bundle.open(folder))
    weights = (folder / "weights.safetensors").stat().st_size
    assert weights < estimate.disk_bytes < weights + 2**27
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: estimate.memory_bytes - 1)
    with pytest.raises(ResourceError, match=r"not enough memory to build: expected 1\.1 GB available, found 1\.1 GB"):
        engine_for_bundle(folder, OPTIONS)
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: None)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=estimate.disk_bytes - 1))
    with pytest.raises(ResourceError, match="not enough disk for the engines"):
        engine_for_bundle(folder, OPTIONS)


def test_memory_is_the_smaller_of_the_systems_and_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  4 kB\n"}
    monkeypatch.setattr(preflight, "_text", lambda path: texts.get(path, ""))
    assert preflight.available_memory_bytes() == 4096
    texts |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "9\n"}
    assert preflight.available_memory_bytes() == 4096
    texts["/sys/fs/cgroup/memory.max"] = "1000\n"
    assert preflight.available_memory_bytes() == 991
    texts.clear()
    assert preflight.available_memory_bytes() is None


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pipeline, "write_whole", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        engine_for_bundle(folder, OPTIONS)
    assert contents(folder) == before


def test_a_file_in_the_place_of_engines_is_refused(folder: Path) -> None:
    (folder / "engines").write_text("")
    with pytest.raises((InputError, BundleError), match="engines"):
        engine_for_bundle(folder, OPTIONS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"max_seq_len": 131_073},
            UsageError,
            r"--max-seq-len: longer than the model's positions: expected at most 131072",
        ),
        (
            {"compute_capabilities": ("9.9",)},
            UsageError,
            r"--compute-capability: .* expected 7\.5 or 8\.0 or .*found 9\.9",
        ),
        ({"strip_weights": True}, EnvironmentFault, "a stripped engine needs an NVIDIA GPU"),
    ],
)
def test_options_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "gpu_compute_capabilities", lambda: ())
    with pytest.raises(error, match=message):
        engine_for_bundle(folder, replace(OPTIONS, **changes))


@pytest.fixture
def data_centre(trt: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT proper comes from NVIDIA's own index: what differs is tested on the other flavour's module."""
    flavour = replace(
        trt.flavour, backend="tensorrt", title="TensorRT", builds_without_gpu=False, has_timing_cache=True
    )
    monkeypatch.setattr(trt, "flavour", flavour)
    monkeypatch.setattr(pipeline, "tensorrt_from_backend", lambda backend: trt)


def test_tensorrt_proper_needs_a_gpu(data_centre: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_compute_capabilities", lambda: ())
    with pytest.raises(EnvironmentFault, match="TensorRT needs an NVIDIA GPU and its driver to build"):
        engine_for_bundle(folder, replace(OPTIONS, backend="tensorrt"))


def test_tensorrt_proper_builds_for_the_gpu_that_is_there(
    data_centre: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "gpu_compute_capabilities", lambda: ("9.0", "8.9"))
    options = replace(OPTIONS, backend="tensorrt")
    with pytest.raises(UsageError, match="only for tensorrt-rtx"):
        engine_for_bundle(folder, replace(options, compute_capabilities=("8.9",)))
    record = engine_for_bundle(folder, options).record
    assert (record.inputs.backend, record.inputs.compute_capabilities) == ("tensorrt", ("9.0",))


@pytest.mark.filterwarnings("ignore:Use Deprecated")
def test_a_corrupt_timing_cache_is_ignored_and_replaced(
    data_centre: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "gpu_compute_capabilities", lambda: ("9.0",))
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"garbage" * 100)
    built = engine_for_bundle(folder, replace(OPTIONS, backend="tensorrt", timing_cache=cache))
    assert any("timing cache will not be used" in text for text in built.record.engines["vision"].warnings)
    assert cache.read_bytes()[:7] not in (b"", b"garbage")


@pytest.mark.parametrize("refuses", ["create", "set"])
def test_a_timing_cache_from_elsewhere_is_passed_over(refuses: str, tmp_path: Path, trt: TensorRT) -> None:
    """A test double of a configuration that takes an empty cache alone, in the two ways TensorRT can say so."""
    used = []
    config = SimpleNamespace(
        create_timing_cache=lambda data: None if data and refuses == "create" else data or b"empty",
        set_timing_cache=lambda cache, mismatch: used.append(cache) or cache == b"empty",
    )
    path = tmp_path / "foreign.cache"
    path.write_bytes(b"of another GPU")
    with trt.logged() as log:
        builder.load_timing_cache(config, path, log)
    assert used[-1] == b"empty"
    assert log.warnings == [f"the timing cache {path} is damaged or from elsewhere and is not used"]
    with trt.logged() as log:
        builder.load_timing_cache(config, tmp_path, log)
    assert "cannot be read" in log.warnings[0]


def test_kernels_are_read_from_what_the_builder_says() -> None:
    line = (
        "Name: MatMul_1 [profile 1]+MatMul_2_myl1_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,256], "
        "Datatype: FP8, Format: (Linear) Row }], Constants: [ { Name: w, Dimensions: [2], Datatype: Float }], "
        "Outputs: [ { Name: y, Dimensions: [1], Datatype: Half, Format: F }, { Name: z, Datatype: Int8 }], "
        "TacticName: sm80_xmma, StreamId: 0, Metadata: [ONNX Layer: MatMul_1][ONNX Layer: MatMul_2]"
    )
    bare = "Name: c_0, LayerType: call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
    details = ["Layers:\n" + line + "\n" + bare + "\n\nBindings:\n", "Total Weights Memory: 12 bytes", "nothing"]
    assert kernels_from_log(details) == (
        Kernel(
            "MatMul_1 [profile 1]+MatMul_2_myl1_2",
            "gemm",
            "sm80_xmma",
            ("MatMul_1", "MatMul_2"),
            ("FP8",),
            ("Half", "Int8"),
        ),
        Kernel("c_0", "call", "", (), (), ()),
    )
    assert memory_from_log(details) == (12, 0)
    profiles = [
        "Total Activation Memory: 40 bytes",
        "Total Activation Memory: 30 bytes",
        "Total Weights Memory: 5 bytes",
    ]
    assert memory_from_log(profiles) == (5, 40)
    assert kernels_from_log(["a version that says nothing"]) == ()


@pytest.mark.gpu
def test_a_stripped_engine_is_small(folder: Path) -> None:
    """Stripping takes a GPU to build: TensorRT-RTX 1.7.1 compiles refittable weights on the device."""
    whole, stripped = (engine_for_bundle(folder, replace(OPTIONS, strip_weights=strip)) for strip in (False, True))
    saved = whole.record.engines["decoder"].size_bytes - stripped.record.engines["decoder"].size_bytes
    assert saved > whole.record.engines["decoder"].weights_bytes / 2
