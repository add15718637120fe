"""The kit for a session at a GPU (tests/gpu), as far as it runs without one: what it brings, fills, and tells."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from gpu import fill, judge, mini, pack, unpack
from gpu.forced import compared
from gpu.probe import main as probe
from gpu.record import Recorder
from gpu.report import page
from mllama_runtime import Engine
from mllama_runtime.bundle import Bundle
from mllama_runtime.errors import BundleError
from mllama_runtime.tensorfile import encode_header, read_header

RESULTS = Path(__file__).parent / "gpu" / "results"


def entry(kind: int, arch: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(code)).ljust(28, b"\1") + struct.pack("<I", arch)
    return header.ljust(64, b"\1") + code


def test_only_one_kind_of_machine_code_is_kept_and_nothing_moves() -> None:
    entries = entry(2, 80, b"old" * 8) + entry(2, 90, b"ours" * 6) + entry(1, 90, b"ptx " * 4)
    fatbin = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    data = bytearray(b"host" + fatbin + b"code" + struct.pack("<I", 0xBA55ED50) + b"text")
    before = bytes(data)
    assert pack.keep_machine_code(data, 90) == 24 + 16
    assert data == before.replace(b"old" * 8, bytes(24)).replace(b"ptx " * 4, bytes(16))


@pytest.mark.parametrize(
    "results", sorted(RESULTS.glob("*/*.jsonl")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_committed_page_is_what_its_results_say(results: Path) -> None:
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    committed = results.with_suffix(".md").read_text(encoding="utf-8")
    title = committed.splitlines()[0].removeprefix("# ")
    assert page(title, rows) + "\n" == committed
    decoded = next(row for row in rows if row["case"] == "decode" and "ms" in row)
    assert f"| {decoded['tokens_per_second']:.0f} |" in committed
    assert page(title, [{**decoded, "tokens_per_second": 1e6}]) != page(title, [decoded])


def test_a_fault_stands_on_the_page() -> None:
    row = {"work": "speed", "bundle": "b", "case": "decode", "error": "EnvironmentFault: | the GPU failed"}
    assert "| speed b | decode | EnvironmentFault: / the GPU failed |" in page("A title", [row])


def test_parts_are_opened_and_joined(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40
    for part, files in (
        ("a", [(f"{pack._PROVIDER}.0", whole[:700])]),
        ("b", [(f"{pack._PROVIDER}.1", whole[700:]), ("mini/x.json", b"{}")]),
    ):
        pack._write_part(tmp_path / part, files)
        unpack.unpack(tmp_path / part, tmp_path / "store")
        unpack.join(tmp_path / "store")
    assert (tmp_path / "store" / pack._PROVIDER).read_bytes() == whole
    assert (tmp_path / "store" / "mini" / "x.json").read_bytes() == b"{}"


def test_filled_weights_have_the_variance_of_a_model(tmp_path: Path) -> None:
    """Of floats, and of integers under their scales; norms are one, gates a half, and a seed gives the same again."""
    layout = [
        ("layers.0.mlp.up_proj.weight", "I8", (64, 512)),
        ("layers.0.mlp.up_proj.weight_scale", "F16", (64,)),
        ("layers.0.mlp.down_proj.weight", "U8", (64, 256)),
        ("layers.0.mlp.down_proj.weight_scale", "F16", (64, 4)),
        ("layers.0.self_attn.q_proj.weight", "F16", (64, 512)),
        ("layers.0.self_attn.k_proj.weight", "BF16", (64, 512)),
        ("layers.0.input_layernorm.weight", "F16", (64,)),
        ("layers.3.cross_attn_attn_gate", "F16", (1,)),
    ]
    header, infos = encode_header(layout)
    path = tmp_path / "weights.safetensors.header"
    path.write_bytes(header)
    assert fill.fill(path, device="cpu") == (tmp_path / "weights.safetensors").stat().st_size
    read_header(tmp_path / "weights.safetensors", error=BundleError)
    data = (tmp_path / "weights.safetensors").read_bytes()
    raw = {info.name: np.frombuffer(data, np.uint8, info.size_bytes, info.offset_bytes) for info in infos}
    prefix = "layers.0."
    up = raw[f"{prefix}mlp.up_proj.weight"].view(np.int8) * raw[f"{prefix}mlp.up_proj.weight_scale"].view("f2")[0]
    packed = raw[f"{prefix}mlp.down_proj.weight"]
    nibbles = np.concatenate([packed & 15, packed >> 4]).astype(np.int8)
    down = np.where(nibbles > 7, nibbles - 16, nibbles) * raw[f"{prefix}mlp.down_proj.weight_scale"].view("f2")[0]
    query = raw[f"{prefix}self_attn.q_proj.weight"].view("f2")
    key = (raw[f"{prefix}self_attn.k_proj.weight"].view("u2").astype("u4") << 16).view("f4")
    for matrix in (up, down, query, key):
        assert float(matrix.astype(np.float64).std()) == pytest.approx(512**-0.5, rel=0.03)
    assert (raw[f"{prefix}input_layernorm.weight"].view("f2") == 1).all()
    assert raw["layers.3.cross_attn_attn_gate"].view("f2")[0] == 0.5
    fill.fill(path, device="cpu")
    assert (tmp_path / "weights.safetensors").read_bytes() == data


def test_a_bundle_without_weights_is_filled_and_answers(tmp_path: Path, bundle_of) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("fp16"), folder)
    weights = folder / "weights.safetensors"
    size = min(info.offset_bytes for info in read_header(weights, error=BundleError).tensors.values())
    data = weights.read_bytes()
    (folder / "weights.safetensors.header").write_bytes(data[:size])
    weights.unlink()
    fill.fill(folder / "weights.safetensors.header", device="cpu")
    assert weights.stat().st_size == len(data)
    assert weights.read_bytes() != data


def test_findings_and_faults_are_lines(tmp_path: Path) -> None:
    record = Recorder(tmp_path, work="x")
    assert record.try_("good", lambda: {"ms": 1.5}) == {"ms": 1.5}
    assert record.try_("bad", lambda: {"ms": 1 / 0}) is None
    good, bad = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (good["work"], good["ms"], good["error"]) == ("x", 1.5, None)
    assert bad["error"] == "ZeroDivisionError: division by zero"


def test_logits_are_compared() -> None:
    wanted = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    same = compared(wanted, wanted)
    assert (same["relative_l2"], same["top1"], same["kl_mean"]) == (0, 1, 0)
    assert compared(wanted[::-1], wanted)["relative_l2"] > 1


def test_the_miniature_agrees_with_what_was_expected_of_it_and_is_told_where_not(
    tmp_path: Path, bundle_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = mini.requests
    monkeypatch.setattr(mini, "requests", lambda sampling: few(sampling)[2:5])
    bundle = bundle_of("fp32")
    expected = mini.expectation(bundle)
    expected["seeded/1"] = expected["seeded/1"].copy()
    expected["seeded/1"][0] += 1
    np.savez(tmp_path / "fp32.npz", **expected)
    (tmp_path / "fp32").symlink_to(bundle)
    monkeypatch.setattr("sys.argv", ["probe", "mini", str(tmp_path), "--backend", "cpu", "--out", str(tmp_path)])
    assert probe() == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {line["case"]: line for line in lines}
    assert [found[f"greedy, batch {batch}, captured"]["equal"] for batch in (1, 4)] == [3, 3]
    assert found["seeded, batch 1, captured"]["differ"] == "1@0"
    assert found["teacher-forced logits"]["top1"] == 1


def test_the_judge_agrees_and_notices_a_change(tmp_path: Path, bundle_of, miniature: Path) -> None:
    bundle = Bundle.open(bundle_of("fp32"))
    judged = judge.Judge(bundle, miniature / "config.json", "cpu", judge.torch.float32)
    record = Recorder(tmp_path)
    with judge.backend_from_bundle(bundle, "cpu", None) as backend:
        errors = judge.compare(bundle, judged, backend, record, "same")
        judged.disturb()
        disturbed = judge.compare(bundle, judged, backend, record, "disturbed")
    assert max(errors) < judge.AGREES["fp32"]
    assert min(disturbed) > 100 * max(errors)


def test_every_way_of_asking_is_an_engine_s(bundle_of) -> None:
    """The questions fit the engine: every canvas shape, text among pictures."""
    asked = mini.requests(mini.seeded)
    assert len(asked) == 22
    assert sum(not request.images for request in asked) == 4
    with Engine.load(bundle_of("fp32"), backend="cpu") as engine:
        assert {engine.tiles(image).num_tiles for request in asked for image in request.images} == {1, 2, 3, 4}
