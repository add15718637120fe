"""manifest.json: what a bundle holds and promises. Written last by the exporter, read first by the runtime.

The same export gives the same bytes: sorted keys and no timestamps. Schema version 4; version 3 is still read: it had
no `vision_states`, and its graphs take them as transformers 4.56 does.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mllama_runtime.config import MaskSemantics, ModelConfig, VisionStates, check_model
from mllama_runtime.errors import BundleError
from mllama_runtime.fields import dump_json, is_clean, load_json, parse, show

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**50
_SYMBOL = re.compile(r"([1-9][0-9]*\*)?[A-Za-z_][A-Za-z0-9_]*")  # "batch", or a multiple: "1601*num_tiles"

_OLD_STATES = (
    "an older mllama-deploy made this bundle, with the vision states of transformers 4.56, which are wrong for the "
    "published weights; export again, with --vision-states transformers-4.56 if the weights were trained there"
)

BasePrecision = Literal["fp32", "fp16", "bf16"]
QuantizedPrecision = Literal["int8", "int8-weight", "int4", "fp8"]
Precision = Literal[BasePrecision, QuantizedPrecision]
SourceFormat = Literal["hf", "meta"]
"""A checkpoint as Hugging Face's libraries read it, or Meta's own files."""
GraphKey = Literal["vision", "vision_ort", "vision_cuda", "decoder", "decoder_ort", "decoder_cuda", "greedy", "sampler"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph; a string in `shape` is a symbol."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph file and its public contract."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be, to the byte; `sha256` is 64 lower-case hexadecimal digits."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint a bundle was made from."""

    fingerprint: str
    format: SourceFormat
    num_tensors: int
    num_parameters: int
    files: Mapping[str, FileEntry]


@dataclass(frozen=True, slots=True)
class WeightStats:
    """What the scan of the weights saw while they were streamed; `largest_abs` is that of the finite values."""

    num_clamped: int
    num_nonfinite: int
    largest_abs: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What activations were measured on; `sha256` is of the questions, answers and pixels, in order."""

    num_samples: int
    num_images: int
    num_tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a quantised bundle was made from one in `base` precision, which everything not quantised still has.

    vision: the vision graph's scheme, or None where it was kept. kept: the weights, of those that could have been
    quantised in a graph that is, which were not. calibration: None where none was needed.
    """

    base: BasePrecision
    vision: QuantizedPrecision | None
    kept: tuple[str, ...]
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """An ahead-of-time engine; `key` is its folder below engines/."""

    key: str
    backend: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """The verdict of `mllama validate`; `report` is a file of the bundle, `reference` what it was compared with."""

    verdict: Literal["pass", "fail"]
    report: str
    num_checks: int
    num_failed: int
    reference: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole manifest; paths are relative to the bundle's folder, with forward slashes."""

    name: str
    model: ModelConfig
    mask_semantics: MaskSemantics
    vision_states: VisionStates
    precision: Precision
    graphs: Mapping[GraphKey, GraphSpec]
    files: Mapping[str, FileEntry]
    tools: Mapping[str, str]
    source: Source
    options: Mapping[str, bool | int | float | str | None]
    weights: WeightStats
    quantization: Quantization | None = None
    engines: tuple[EngineEntry, ...] = ()
    validation: Validation | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_json(cls, data: bytes, where: object) -> Manifest:
        """Parse and check a manifest.

        Args:
            where: the file it came from, for errors.

        Raises:
            BundleError: naming `where` and the field.
        """
        if not data.strip():
            raise BundleError("the manifest is empty", where=where, hint="export the bundle again")
        if len(data) > MAX_MANIFEST_BYTES:
            expected, found = f"at most {MAX_MANIFEST_BYTES} bytes", f"{len(data)} bytes"
            raise BundleError("the manifest is too large", where=where, expected=expected, found=found)
        value = _upgraded(load_json(data, where=where, error=BundleError), where)
        version = value.get("schema_version", SCHEMA_VERSION) if isinstance(value, dict) else SCHEMA_VERSION
        if type(version) is int and version != SCHEMA_VERSION:
            raise BundleError(
                "unknown schema version",
                where=f"{where}: schema_version",
                expected=SCHEMA_VERSION,
                found=show(version),
                hint="install the mllama-deploy the bundle was made with, or export it again with this one",
            )
        manifest = parse(cls, value, where=where, error=BundleError)
        _Check(where).manifest(manifest)
        return manifest

    def to_json(self) -> bytes:
        """The file's bytes, the same for equal manifests."""
        return dump_json(self)


def _upgraded(value: object, where: object) -> object:
    """A manifest of schema version 3 as one of today's version says the same."""
    if not isinstance(value, dict) or value.get("schema_version") != 3 or type(value["schema_version"]) is not int:
        return value
    graphs = value.get("graphs")
    if isinstance(graphs, dict) and "vision" in graphs:
        logger.warning("%s: %s", where, _OLD_STATES)
    return {"vision_states": "transformers-4.56", **value, "schema_version": SCHEMA_VERSION}


class _Check:
    """What the types of the fields do not say."""

    def __init__(self, where: object) -> None:
        self.where = where

    def need(self, right: bool, what: str, field: str, *, expected: object = None, found: object = None) -> None:
        if not right:
            shown = None if found is None else show(found)
            raise BundleError(what, where=f"{self.where}: {field}", expected=expected, found=shown)

    def manifest(self, manifest: Manifest) -> None:
        check_model(manifest.model, f"{self.where}: model", BundleError)
        self.files("files", manifest.files)
        self.files("source.files", manifest.source.files)
        required = [*([] if manifest.model.is_text_only else ["vision"]), "decoder", "greedy", "sampler"]
        self.need(MANIFEST_NAME not in manifest.files, "the manifest lists itself", "files")
        self.need(manifest.graphs.keys() >= set(required), "a graph is missing", "graphs", expected=", ".join(required))
        for key, graph in manifest.graphs.items():
            self.graph(f"graphs.{key}", graph)
            self.listed(f"graphs.{key}.file", graph.file, manifest)
        is_quantized = manifest.precision in get_args(QuantizedPrecision)
        self.need(
            is_quantized == (manifest.quantization is not None),
            "precision and quantization contradict each other",
            "quantization",
            expected="one for each quantised precision, and for no other",
        )
        if manifest.quantization and (seen := manifest.quantization.calibration):
            self.counts("quantization.calibration", seen, "num_samples", "num_images", "num_tokens")
        for index, engine in enumerate(manifest.engines):
            for path in engine.files:
                self.listed(f"engines[{index}].files", path, manifest)
        if manifest.validation:
            self.listed("validation.report", manifest.validation.report, manifest)
            self.counts("validation", manifest.validation, "num_checks", "num_failed")
        self.counts("weights", manifest.weights, "num_clamped", "num_nonfinite", "largest_abs")
        self.counts("source", manifest.source, "num_tensors", "num_parameters")

    def files(self, field: str, files: Mapping[str, FileEntry]) -> None:
        seen: dict[str, str] = {}
        for path, entry in files.items():
            where = f"{field}[{show(path)}]"
            self.need(is_inner_path(path), "not a path inside the bundle", where, expected="relative, without ..")
            other = seen.setdefault(_folded(path), path)
            self.need(other == path, "the same file twice on some file systems", where, found=other)
            right = 0 <= entry.size_bytes <= MAX_FILE_BYTES
            size = f"0 to {MAX_FILE_BYTES}"
            self.need(right, "impossible size", f"{where}.size_bytes", expected=size, found=entry.size_bytes)
            right = re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
            digits = "64 lower-case hexadecimal digits"
            self.need(right, "not a SHA-256", f"{where}.sha256", expected=digits, found=entry.sha256)

    def graph(self, field: str, graph: GraphSpec) -> None:
        for side, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            names = Counter(spec.name for spec in specs)
            twice = next((name for name, count in names.items() if count > 1), None)
            self.need(twice is None, "a name stands twice", f"{field}.{side}", found=twice)
            for index, spec in enumerate(specs):
                right = all(dim > 0 if isinstance(dim, int) else _SYMBOL.fullmatch(dim) for dim in spec.shape)
                where = f"{field}.{side}[{index}].shape"
                self.need(right, "impossible shape", where, expected="sizes or symbols", found=list(spec.shape))

    def listed(self, field: str, path: str, manifest: Manifest) -> None:
        self.need(path in manifest.files, "not one of the bundle's files", field, found=path)

    def counts(self, field: str, record: object, *names: str) -> None:
        for name in names:
            value = getattr(record, name)
            self.need(value >= 0, "negative", f"{field}.{name}", expected="0 or more", found=value)


def is_inner_path(path: str) -> bool:
    """Whether `path` names a file inside a folder on every platform: relative, forward slashes, no `..`, no drive."""
    parts = path.split("/")
    return is_clean(path) and not re.search(r"[\\:]", path) and all(part not in ("", ".", "..") for part in parts)


def _folded(path: str) -> str:
    """Equal for paths that a file system blind to case or to Unicode composition cannot tell apart."""
    return unicodedata.normalize("NFC", path.casefold())
