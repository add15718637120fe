"""engine.json: what an engine was made from and for, what is in it, and whether it may be used here and now.

The build writes it beside the engine files. An engine is native code, so the runtime compares this record, the bundle
and the machine first, and hashes the very bytes that are then deserialised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mllama_runtime.backends.private_trt import TensorRTBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from mllama_runtime.device import GraphName, ProfileName
from mllama_runtime.errors import BundleError
from mllama_runtime.fields import dump_json, load_json, parse
from mllama_runtime.manifest import EngineEntry, Manifest, Precision

ENGINE_SCHEMA_VERSION = 1
RECORD_NAME = "engine.json"
MAX_RECORD_BYTES = 64 * 2**20

Check = Literal["caches", "attention", "positions", "precision", "inputs"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step an engine takes.

    max_batch: rows of a step, and pictures encoded at once. max_seq_len: entries of a cache row; every cache has this
    length. prefill_chunk: new tokens of a step. max_tiles: tiles of all pictures of a row, padding tiles included.
    """

    max_batch: int
    max_seq_len: int
    prefill_chunk: int
    max_tiles: int


def graphs_of(model: ModelConfig) -> tuple[GraphName, ...]:
    """The graphs that engines are made of."""
    return ("decoder", "greedy", "sampler") if model.is_text_only else ("vision", "decoder", "greedy", "sampler")


def default_limits(model: ModelConfig) -> Limits:
    """Four rows of at most 8,192 tokens and one picture each."""
    max_seq_len = min(8192, model.text.max_seq_len)
    return Limits(4, max_seq_len, min(512, max_seq_len), model.vision.max_num_tiles)


@dataclass(frozen=True, slots=True)
class EngineInputs:
    """Everything an engine depends on; equal inputs make engines that can replace each other.

    version: of TensorRT. compute_capabilities: of the GPUs it is for; empty for all that the back end supports. graphs
    and weights: SHA-256 of the bundle's files. rules: how this project builds, counted up when that changes.
    """

    backend: TensorRTBackend
    version: str
    compute_capabilities: tuple[str, ...]
    graphs: Mapping[GraphName, str]
    weights: Mapping[str, str]
    limits: Limits
    strip_weights: bool
    weight_streaming: bool
    rules: int

    def key(self) -> str:
        """The engine's folder below engines/: SHA-256 of all of this."""
        return hashlib.sha256(dump_json(self)).hexdigest()


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """What one input may be in one profile."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A range of shapes that kernels were chosen for; its place in the list is TensorRT's index."""

    name: ProfileName
    shapes: Mapping[str, ShapeRange]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of the engine, as TensorRT tells it: its class, the ONNX nodes in it, and the types it moves."""

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A structural check that the network passed; one that it fails ends the build. `detail` is for people."""

    check: Check
    detail: str


@dataclass(frozen=True, slots=True)
class GraphEngine:
    """One engine file. weights_bytes and activation_bytes: device memory, as TensorRT reports it."""

    file: str
    size_bytes: int
    weights_bytes: int
    activation_bytes: int
    profiles: tuple[Profile, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A whole engine.json."""

    key: str
    inputs: EngineInputs
    precision: Precision
    engines: Mapping[GraphName, GraphEngine]
    schema_version: int = ENGINE_SCHEMA_VERSION

    @classmethod
    def from_json(cls, data: bytes, where: object) -> EngineRecord:
        """Parse and check a record.

        Raises:
            BundleError: naming `where` and the field, or a key that does not belong to the inputs.
        """
        value = load_json(data, where=where, error=BundleError)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != ENGINE_SCHEMA_VERSION:
            raise _refused("unknown schema version", where, expected=ENGINE_SCHEMA_VERSION, found=repr(version)[:40])
        record = parse(cls, value, where=where, error=BundleError)
        if record.key != record.inputs.key():
            raise _refused("the engine's key is not that of its inputs", where, record.inputs.key(), record.key)
        graphs = record.inputs.graphs
        if missing := [graph for graph in graphs if graph not in record.engines]:
            raise _refused("an engine is missing", where, expected=", ".join(graphs), found=f"no {missing[0]}")
        return record

    def to_json(self) -> bytes:
        """The file's bytes, the same for equal records."""
        return dump_json(self)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of a bundle that may be used here; `read` gives the bytes to deserialise."""

    bundle: Bundle
    record: EngineRecord

    def read(self, graph: GraphName) -> bytes:
        """The bytes of one engine file, hashed: what is checked is what is used, whoever writes the file meanwhile.

        Raises:
            BundleError: it is not what the build wrote.
        """
        engine = self.record.engines[graph]
        path, entry = self.bundle.path(engine.file), self.bundle.manifest.files[engine.file]
        try:
            data = path.read_bytes()
        except OSError as fault:
            raise _refused(f"cannot be read ({fault.strerror})", path) from fault
        digest = hashlib.sha256(data).hexdigest()
        if not data or digest != entry.sha256:
            raise _refused(
                "not the engine that was built", path, f"sha256 {entry.sha256}", f"{len(data)} bytes, {digest}"
            )
        return data


def graph_hashes(manifest: Manifest) -> dict[GraphName, str]:
    """SHA-256 of the graphs that engines are made from."""
    return {graph: manifest.files[manifest.graphs[graph].file].sha256 for graph in graphs_of(manifest.model)}


def weights_hashes(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of every weights file."""
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}


def read_record(bundle: Bundle, entry: EngineEntry) -> EngineRecord:
    """The record of a listed engine.

    Raises:
        BundleError: it is missing, changed, or wrong.
    """
    name = f"engines/{entry.key}/{RECORD_NAME}"
    path, listed = bundle.path(name), bundle.manifest.files[name]
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as fault:
        raise _refused(f"cannot be read ({fault.strerror})", path) from fault
    digest = hashlib.sha256(data).hexdigest()
    if digest != listed.sha256:
        raise _refused("not the record that was built", path, f"sha256 {listed.sha256}", digest)
    record = EngineRecord.from_json(data, path)
    if record.key != entry.key:
        raise _refused("the record of another engine", path, entry.key, record.key)
    if strange := [engine.file for engine in record.engines.values() if engine.file not in entry.files]:
        raise _refused("the record names a file of something else", path, ", ".join(entry.files), strange[0])
    return record


def engine_from_bundle(
    bundle: Bundle, backend: TensorRTBackend, *, version: str, compute_capability: str | None = None
) -> Engine:
    """The newest engine of a back end that fits the bundle as it is, this TensorRT and this GPU.

    Args:
        version: of the TensorRT that would deserialise it.
        compute_capability: of the GPU that would run it, such as "8.9"; None asks for no GPU.

    Raises:
        BundleError: there is none, and why. Nothing is deserialised here, nor before.
    """
    entries = [entry for entry in reversed(bundle.manifest.engines) if entry.backend == backend]
    if not entries:
        raise _refused(f"the bundle has no engine for {backend}", bundle.root, hint=_rebuild(backend))
    refusals = []
    for entry in entries:
        try:
            record = read_record(bundle, entry)
            _check_fit(bundle, record, version, compute_capability)
        except BundleError as refusal:
            refusals.append(refusal)
        else:
            return Engine(bundle, record)
    raise refusals[0]


def _check_fit(bundle: Bundle, record: EngineRecord, version: str, compute_capability: str | None) -> None:
    inputs, where = record.inputs, bundle.root / "engines" / record.key
    again = _rebuild(inputs.backend)
    if inputs.graphs != graph_hashes(bundle.manifest) or inputs.weights != weights_hashes(bundle.manifest):
        raise _refused("the engine was built from other graphs or weights", where, hint=again)
    if inputs.version != version:
        raise _refused("the engine was built by another version", where, version, inputs.version, again)
    built_for = inputs.compute_capabilities
    if built_for and compute_capability is not None and compute_capability not in built_for:
        found = f"one for {', '.join(built_for)}"
        raise _refused("the engine is for other GPUs", where, f"compute capability {compute_capability}", found, again)


def _rebuild(backend: TensorRTBackend) -> str:
    return f"run: mllama build BUNDLE --backend {backend}"


def _refused(
    what: str, where: object, expected: object = None, found: object = None, hint: str | None = None
) -> BundleError:
    hint = hint or "build the engine again (`mllama build`)"
    return BundleError(what, where=where, expected=expected, found=found, hint=hint)
