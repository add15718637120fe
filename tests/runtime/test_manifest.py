"""The manifest: a strict parse, the same bytes every time, and one clear line for every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mllama_runtime.errors import BundleError
from mllama_runtime.manifest import (
    MAX_MANIFEST_BYTES,
    Calibration,
    EngineEntry,
    FileEntry,
    Manifest,
    Quantization,
    Validation,
    is_inner_path,
)

from ._bundle import MANIFEST, SHA

FUZZ = settings(max_examples=400, deadline=None, derandomize=True)

FILES = {name: FileEntry(10, SHA) for name in ("vision.onnx", "decoder.onnx", "reports/validation.json", "engines/k/e")}
FULL = replace(
    MANIFEST,
    files=FILES,
    engines=(EngineEntry("k", "tensorrt_rtx", ("engines/k/e",)),),
    validation=Validation("pass", "reports/validation.json", 12, 0, "model"),
)

Json = dict[str, Any]


def refused(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data, "b/manifest.json")
    line = str(caught.value)
    assert line.startswith("b/manifest.json: ")
    assert len(line) < 700
    assert line.isprintable()
    return line


def test_calibration_on_fewer_than_none_is_refused() -> None:
    seen = Quantization("fp16", None, (), Calibration(4, -1, 100, "0" * 64))
    message = refused(replace(FULL, precision="int8", quantization=seen).to_json())
    assert "quantization.calibration.num_images: negative" in message


def test_round_trip() -> None:
    for manifest in (FULL, replace(MANIFEST, files=FILES)):
        data = manifest.to_json()
        assert Manifest.from_json(data, "m") == manifest
        assert Manifest.from_json(data, "m").to_json() == data


def test_the_bytes_do_not_depend_on_the_order_of_making() -> None:
    again = replace(FULL, files=dict(reversed(FILES.items())), graphs=dict(reversed(FULL.graphs.items())))
    assert again.to_json() == FULL.to_json()
    assert FULL.to_json().endswith(b"}\n")
    assert list(json.loads(FULL.to_json())) == sorted(json.loads(FULL.to_json()))


def test_a_whole_number_may_stand_for_a_float() -> None:
    data = FULL.to_json().replace(b'"theta": 500000.0', b'"theta": 500000')
    assert data != FULL.to_json()
    assert Manifest.from_json(data, "m") == FULL


RAW = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b'{"name": "\xff"}', "not JSON"),
    "not an object": (b"[1]", "wrong type: expected an object, found a list"),
    "a key twice": (FULL.to_json().replace(b'"name": "fake"', b'"name": "fake", "name": "other"'), "twice .* 'name'"),
    "nested deeply": (b"[" * 200_000, "nested too deeply"),
    "NaN": (FULL.to_json().replace(b"1.5", b"NaN"), "expected a finite number, found NaN"),
    "infinite": (FULL.to_json().replace(b"1.5", b"1e999"), "weights.largest_abs: the number is out of range"),
    "an endless integer": (FULL.to_json().replace(b"1.5", b"1" * 5000), "not JSON"),
    "a large integer": (FULL.to_json().replace(b"1.5", b"1" * 400), "weights.largest_abs: the number is out of range"),
    "too large": (b" " * MAX_MANIFEST_BYTES + b"{}", "too large: expected at most 16777216 bytes"),
}


@pytest.mark.parametrize(("data", "message"), RAW.values(), ids=RAW)
def test_what_is_no_json_object_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=f"^b/manifest.json: .*{message}"):
        Manifest.from_json(data, "b/manifest.json")
    refused(data)


def put(path: str, value: object) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        *folders, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        target: Any = manifest
        for key in folders:
            target = target[key]
        target[last] = value

    return change


def drop(path: str) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        *folders, last = path.split("/")
        target: Any = manifest
        for key in folders:
            target = target[key]
        del target[last]

    return change


def listed(path: str, **entry: object) -> Callable[[Json], None]:
    return lambda manifest: manifest["files"].update({path: {"size_bytes": 1, "sha256": SHA, **entry}})


FIELDS = {
    "unknown version": (
        put("schema_version", 1),
        "schema_version: unknown schema version: expected 4, found 1; install the mllama-deploy",
    ),
    "huge version": (put("schema_version", 10**400), "unknown schema version"),
    "version of another type": (
        put("schema_version", "1"),
        "schema_version: wrong type: expected an integer, found '1'",
    ),
    "version true": (put("schema_version", True), "schema_version: wrong type"),
    "no version": (drop("schema_version"), "schema_version: the field is missing"),
    "missing": (drop("precision"), "precision: the field is missing"),
    "missing, nested": (drop("model/text/rope/factor"), "model.text.rope.factor: the field is missing"),
    "unknown": (put("extra", 1), "extra: the field is unknown"),
    "unknown, unprintable": (put("\x1b[2J", 1), r"\['\\x1b\[2J'\]: the field is unknown"),
    "ill-typed, deep": (
        put("graphs/decoder/inputs/2/dtype", 3),
        r"graphs.decoder.inputs\[2\].dtype: wrong type: expected float32 or .* found 3",
    ),
    "unknown dtype": (put("graphs/decoder/inputs/0/dtype", "f33"), r"inputs\[0\].dtype: unknown value: .* found 'f33'"),
    "unknown precision": (put("precision", "fp7"), "precision: unknown value: expected fp32 or fp16"),
    "unknown semantics": (put("mask_semantics", "other"), "mask_semantics: unknown value: expected hf or meta"),
    "unknown states": (put("vision_states", "4.56"), "vision_states: .* expected published or transformers-4.56"),
    "no states": (drop("vision_states"), "vision_states: the field is missing"),
    "unknown graph": (
        put("graphs/encoder", {}),
        "graphs: unknown value: expected vision or .*sampler, found 'encoder'",
    ),
    "no decoder": (drop("graphs/decoder"), "graphs: a graph is missing"),
    "graph not listed": (put("graphs/vision/file", "../v.onnx"), "graphs.vision.file: not one of the bundle's files"),
    "tensor twice": (
        put("graphs/vision/outputs", [{"name": "y", "dtype": "bool", "shape": []}] * 2),
        "graphs.vision.outputs: a name stands twice: found 'y'",
    ),
    "shape 0": (put("graphs/vision/inputs/0/shape", ["batch", 0]), r"inputs\[0\].shape: impossible shape"),
    "shape of no name": (put("graphs/vision/inputs/0/shape", [""]), r"inputs\[0\].shape: impossible shape"),
    "shape of a formula": (put("graphs/vision/inputs/0/shape", ["a-1"]), r"inputs\[0\].shape: impossible shape"),
    "shape of floats": (put("graphs/vision/inputs/0/shape", [1.5]), r"shape\[0\]: wrong type"),
    "name of control characters": (put("name", "a\x1b[2Jb"), "name: the string holds control characters"),
    "name with half a character": (put("name", "\ud800"), "name: the string holds control characters or half"),
    "tools as a list": (put("tools", ["onnx"]), "tools: wrong type: expected an object, found a list"),
    "an option as a list": (put("options/layers", [1]), "options.layers: wrong type"),
    "negative count": (put("weights/num_clamped", -1), "weights.num_clamped: negative"),
    "negative parameters": (put("source/num_parameters", -1), "source.num_parameters: negative"),
    "another source format": (put("source/format", "gguf"), "source.format: unknown value: expected hf"),
    "report not listed": (put("validation/report", "reports/x"), "validation.report: not one of the bundle's files"),
    "verdict": (put("validation/verdict", "maybe"), "validation.verdict: unknown value: expected pass or fail"),
    "engine not listed": (
        put("engines/0/files", ["/etc/passwd"]),
        r"engines\[0\].files: not one of the bundle's files",
    ),
    "hash too short": (listed("a", sha256="0" * 63), r"files\['a'\].sha256: not a SHA-256"),
    "hash too long": (listed("a", sha256="0" * 65), "not a SHA-256: expected 64 lower-case hexadecimal digits"),
    "hash not hexadecimal": (listed("a", sha256="g" * 64), "not a SHA-256"),
    "hash in capitals": (listed("a", sha256="A" * 64), "not a SHA-256"),
    "hash with a newline": (listed("a", sha256="0" * 64 + "\n"), "control characters"),
    "negative size": (listed("a", size_bytes=-1), r"size_bytes: impossible size: .* found -1"),
    "absurd size": (listed("a", size_bytes=2**63), "impossible size"),
    "size as text": (listed("a", size_bytes="1"), "size_bytes: wrong type: expected an integer, found '1'"),
    "case twice": (listed("Decoder.ONNX"), "the same file twice on some file systems: found 'decoder.onnx'"),
    "lists itself": (listed("manifest.json"), "files: the manifest lists itself"),
    "source path": (
        lambda manifest: manifest["source"]["files"].update({"../x": {"size_bytes": 1, "sha256": SHA}}),
        r"source.files\['../x'\]: not a path inside the bundle",
    ),
}


@pytest.mark.parametrize(("change", "message"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_field_is_named(change: Callable[[Json], None], message: str) -> None:
    manifest = json.loads(FULL.to_json())
    change(manifest)
    data = json.dumps(manifest).encode()
    with pytest.raises(BundleError, match=f"^b/manifest.json: .*{message}"):
        Manifest.from_json(data, "b/manifest.json")
    refused(data)


PATHS = ["../x", "a/../x", "..", ".", "./x", "/etc/passwd", "a//b", "a/", "", "a\\b", "C:x", "c:/x", "x:stream"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    manifest = json.loads(FULL.to_json())
    listed(path)(manifest)
    assert "not a path inside the bundle" in refused(json.dumps(manifest).encode())


@pytest.mark.parametrize("path", ["a\0b", "a\nb", "a\x1b", "\udcff"])
def test_a_path_of_control_characters_is_refused(path: str) -> None:
    assert not is_inner_path(path)
    manifest = json.loads(FULL.to_json())
    listed(path)(manifest)
    refused(json.dumps(manifest).encode())


def test_paths_that_unicode_makes_equal_are_refused() -> None:
    manifest = json.loads(FULL.to_json())
    listed("\u00fc.json")(manifest)
    Manifest.from_json(json.dumps(manifest).encode(), "m")
    listed("u\u0308.json")(manifest)
    assert "the same file twice" in refused(json.dumps(manifest).encode())


def test_ordinary_paths_are_taken() -> None:
    assert all(is_inner_path(path) for path in ("a", "engines/k/e.json", "weights-00001.safetensors", "..a", "中文 b"))


def test_an_old_manifest_is_read_as_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    old = json.loads(FULL.to_json())
    del old["vision_states"]
    old["schema_version"] = 3
    manifest = Manifest.from_json(json.dumps(old).encode(), "b/manifest.json")
    assert manifest == replace(FULL, vision_states="transformers-4.56")
    (line,) = caplog.messages
    assert line.startswith("b/manifest.json: ")
    assert "wrong for the published weights" in line
    caplog.clear()
    assert Manifest.from_json(manifest.to_json(), "m") == manifest  # kept in today's form, without a warning
    old["graphs"].pop("vision")
    old["model"]["is_text_only"] = True
    Manifest.from_json(json.dumps(old).encode(), "m")
    assert not caplog.messages


MODEL = {
    "zero": (put("model/text/hidden_size", 0), "text.hidden_size: .* expected 1 to .* found 0"),
    "negative": (put("model/vision/num_layers", -3), "vision.num_layers: .* found -3"),
    "absurd layers": (put("model/text/num_layers", 10**9), "text.num_layers: .* expected 1 to 1024"),
    "absurd vocabulary": (put("model/text/vocab_size", 2**40), "text.vocab_size"),
    "heads do not divide": (put("model/text/num_heads", 7), "text.num_heads: .* expected a divisor of 192, found 7"),
    "KV heads do not divide": (put("model/text/num_kv_heads", 2), "text.num_kv_heads: .* expected a divisor of 3"),
    "vision heads": (put("model/vision/num_heads", 7), "vision.num_heads: .* a divisor of 64"),
    "odd head size": (put("model/text/num_heads", 192), "even size per head"),
    "patch": (put("model/vision/patch_size", 15), "vision.patch_size: .* a divisor of the image size 56"),
    "channels": (put("model/vision/num_channels", 4), "vision.num_channels: .* expected 3, found 4"),
    "cross layer out of range": (put("model/text/cross_attention_layers", [1, 5]), "cross_attention_layers: .* 0 to 4"),
    "negative cross layer": (put("model/text/cross_attention_layers", [-1]), "cross_attention_layers"),
    "cross layers unsorted": (
        put("model/text/cross_attention_layers", [3, 1]),
        "cross_attention_layers: .* increasing",
    ),
    "cross layer twice": (put("model/text/cross_attention_layers", [1, 1]), "cross_attention_layers"),
    "no cross layers": (put("model/text/cross_attention_layers", []), "cross_attention_layers"),
    "no intermediate layer": (put("model/vision/intermediate_layers_indices", []), "expected one or more increasing"),
    "intermediate layer": (put("model/vision/intermediate_layers_indices", [3]), "intermediate_layers_indices"),
    "no canvas": (put("model/vision/supported_aspect_ratios", []), "supported_aspect_ratios"),
    "too many tiles": (put("model/vision/supported_aspect_ratios", [[2, 3]]), "canvases of 1 to 4 tiles"),
    "canvas of no tiles": (put("model/vision/supported_aspect_ratios", [[0, 1]]), "supported_aspect_ratios"),
    "canvas twice": (put("model/vision/supported_aspect_ratios", [[1, 1], [1, 1]]), "supported_aspect_ratios"),
    "canvas of one side": (put("model/vision/supported_aspect_ratios", [[1]]), "expected 2 entries, found 1"),
    "epsilon": (put("model/text/rms_norm_eps", 0.0), "text.rms_norm_eps"),
    "vision epsilon": (put("model/vision/norm_eps", -1e-5), "vision.norm_eps"),
    "image token": (put("model/image_token_id", 1032), "image_token_id: .* expected 0 to 1031, found 1032"),
    "RoPE type": (put("model/text/rope/rope_type", "yarn"), "rope.rope_type: .* found 'yarn'"),
    "RoPE theta": (put("model/text/rope/theta", 0.0), "rope.theta"),
    "RoPE factor": (put("model/text/rope/factor", -1.0), "rope.factor"),
    "RoPE frequencies": (put("model/text/rope/low_freq_factor", 4.0), "rope.low_freq_factor: .* below 4.0"),
    "RoPE length": (put("model/text/rope/original_max_position_embeddings", 0), "original_max_position_embeddings"),
}


@pytest.mark.parametrize(("change", "message"), MODEL.values(), ids=MODEL)
def test_an_impossible_model_is_refused(change: Callable[[Json], None], message: str) -> None:
    manifest = json.loads(FULL.to_json())
    change(manifest)
    with pytest.raises(BundleError, match=f"^b/manifest.json: model.*{message}"):
        Manifest.from_json(json.dumps(manifest).encode(), "b/manifest.json")


SEED = FULL.to_json()


def parse_or_refuse(data: bytes) -> None:
    try:
        manifest = Manifest.from_json(data, "m")
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@FUZZ
def test_mutated_bytes_never_surprise(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SEED)
    for at, byte in changes:
        data[at] = byte
    parse_or_refuse(bytes(data))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[{}]])
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


PLACES = places(json.loads(SEED))


@given(st.sampled_from(PLACES), JUNK)
@FUZZ
def test_junk_in_any_place_never_surprises(place: tuple[str | int, ...], junk: object) -> None:
    manifest = json.loads(SEED)
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = junk
    parse_or_refuse(json.dumps(manifest).encode())
