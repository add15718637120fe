"""A bundle gets its engines: plan, preflight, each graph in turn; all of it lands in the bundle at once, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.backends.private_trt import TensorRT, tensorrt_from_backend
from mllama_runtime.bundle import Bundle
from mllama_runtime.device import GraphName
from mllama_runtime.disk import disk_faults, partial_path, write_whole
from mllama_runtime.engine_record import (
    RECORD_NAME,
    EngineInputs,
    EngineRecord,
    GraphEngine,
    read_record,
)
from mllama_runtime.manifest import EngineEntry, Manifest

from mllama_exporter.engines.builder import engine_from_network
from mllama_exporter.engines.checks import check_fused, findings_from_network
from mllama_exporter.engines.kernels import kernels_from_log, memory_from_log
from mllama_exporter.engines.network import network_from_graph
from mllama_exporter.engines.plan import EngineOptions, inputs_from_options, profiles_from_limits
from mllama_exporter.engines.preflight import check_room

Progress = Callable[[str, int, int], object]
"""Called with a step's name, and how much of it is done out of how much."""

# Said of every graph, and about nothing a user could change: the contract is int64.
_EXPECTED_WARNINGS = ("Int64 binding",)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a build gives. already_built: the bundle had it, and nothing was done."""

    bundle: Bundle
    record: EngineRecord
    already_built: bool
    notices: tuple[str, ...] = ()


def engine_for_bundle(
    path: Path, options: EngineOptions, progress: Progress = lambda step, done, total: None
) -> BuiltEngine:
    """Build the graphs of a bundle into engines, check them, and add them to the bundle.

    Raises:
        EnvironmentFault: the TensorRT package, its libraries or a GPU is missing.
        UsageError: options that do not fit.
        BundleError: the bundle is damaged, or TensorRT cannot take its graphs.
        ResourceError: memory or disk is too small.
        GateError: an engine is not what it must be; the layer is named.
    """
    trt = tensorrt_from_backend(options.backend)
    bundle = Bundle.open(path, engines=False)
    inputs = inputs_from_options(options, bundle.manifest, trt)
    notices = _notices(options, trt)
    key = inputs.key()
    entry = next((entry for entry in bundle.manifest.engines if entry.key == key), None)
    if entry and not any(problem.path in entry.files for problem in bundle.verify(full=False).problems):
        return BuiltEngine(bundle, read_record(bundle, entry), True, notices)
    check_room(bundle)
    with _partial_folder(bundle.root / "engines" / key) as folder:
        Bundle.open(path, full=True, engines=False)  # the key promises the weights' hashes
        engines = {
            graph: _graph_engine(trt, bundle, graph, inputs, folder, options.timing_cache, progress)
            for graph in inputs.graphs
        }
        record = EngineRecord(key, inputs, bundle.manifest.precision, engines)
        with disk_faults(bundle.root):
            write_whole(folder / RECORD_NAME, record.to_json())
        files = (*(engine.file for engine in engines.values()), f"engines/{key}/{RECORD_NAME}")
        bundle = bundle.add_engine(folder, EngineEntry(key, options.backend, files))
    return BuiltEngine(bundle, record, False, notices)


def _graph_engine(
    trt: TensorRT,
    bundle: Bundle,
    graph: GraphName,
    inputs: EngineInputs,
    folder: Path,
    timing_cache: Path | None,
    progress: Progress,
) -> GraphEngine:
    spec = bundle.manifest.graphs[graph]
    profiles = profiles_from_limits(graph, spec, inputs.limits)
    with trt.logged() as log:
        builder = trt.api.Builder(trt.logger)
        network = network_from_graph(trt, builder, bundle.path(spec.file), inputs.limits.max_seq_len, log)
        low = low_precision(bundle.manifest) and graph in ("vision", "decoder")  # sampling is in float32 anywhere
        findings = findings_from_network(network, graph, bundle.manifest.model, low_precision=low)
        engine = engine_from_network(
            network,
            builder,
            profiles,
            inputs,
            log,
            timing_cache=timing_cache,
            progress=lambda done, total: progress(graph, done, total),
        )
    kernels = kernels_from_log(log.details)
    if low:
        check_fused(network, kernels, profiles)
    file = f"{graph}.engine"
    with disk_faults(bundle.root):
        (folder / file).write_bytes(engine)
    weights_bytes, activation_bytes = memory_from_log(log.details)
    return GraphEngine(
        file=f"engines/{inputs.key()}/{file}",
        size_bytes=engine.nbytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation_bytes,
        profiles=profiles,
        findings=findings,
        warnings=tuple(
            dict.fromkeys(
                " ".join(text.split())
                for text in log.warnings
                if not any(expected in text for expected in _EXPECTED_WARNINGS)
            )
        ),
        kernels=kernels,
    )


def low_precision(manifest: Manifest) -> bool:
    """Whether what is not quantised is in 16 bits: FP32 then needs a reason."""
    base = manifest.quantization.base if manifest.quantization else manifest.precision
    return base != "fp32"


def _notices(options: EngineOptions, trt: TensorRT) -> tuple[str, ...]:
    if options.timing_cache is not None and not trt.flavour.has_timing_cache:
        return (
            f"{trt.flavour.title} times nothing while it builds; --timing-cache {options.timing_cache} is not used",
        )
    return ()


@contextmanager
def _partial_folder(home: Path) -> Iterator[Path]:
    """A folder to fill beside `home`; gone at the end, unless it was moved away.

    Raises:
        InputError: the bundle is read-only.
    """
    folder = partial_path(home)
    with disk_faults(home.parent):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            home.parent.rmdir()  # it was made for this alone
