"""`mllama bench` measures what it names; how fast is not a matter for tests."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result
from mllama_runtime.cli import main

FEW = ("--steps", "2", "--prompt-len", "8", "--cache-len", "64", "--threads", "1")


def bench(bundle: object, *options: str) -> Result:
    return CliRunner().invoke(main, ["bench", str(bundle), *FEW, *options])


def test_bench(bundle_of) -> None:
    result = bench(bundle_of(), "--batch", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["what", "ms", "tokens/s", "GB/s"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "vision, picture of 4 tiles",
        *(f"first token, 8 tokens, {picture}" for picture in ("text only", "picture of 1 tile", "picture of 4 tiles")),
        *(
            f"decode, batch 2, 32 cached, {picture}"
            for picture in ("text only", "picture of 1 tile", "picture of 4 tiles")
        ),
    ]


def test_every_batch_size_with_every_picture(bundle_of) -> None:
    result = bench(bundle_of(), "--batch", "1", "--batch", "3", "--tiles", "0", "--tiles", "2", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["measured"]
    assert [(row["kind"], row["batch"], row["num_tiles"], row["num_tokens"]) for row in rows] == [
        ("vision", 1, 4, 0),
        *(("first token", 1, tiles, 8) for tiles in (0, 2)),
        *(("decode", batch, tiles, 32) for batch in (1, 3) for tiles in (0, 2)),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["reason"] is None
        assert (row["read_bytes"] is None) == (row["kind"] != "decode")
        tokens = {"vision": None, "first token": 8, "decode": row["batch"]}[row["kind"]]
        assert row["tokens_per_second"] == (tokens and tokens / row["seconds"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "30"), "steps: more steps than the cache has room for"),
        (("--tiles", "5"), "tiles: no picture has so many tiles: expected 1 or 2 or 3 or 4, found 5"),
    ],
)
def test_what_cannot_be_measured_is_said(bundle_of, options: tuple[str, ...], message: str) -> None:
    result = bench(bundle_of(), *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"mllama: error: {message}")


def test_bench_of_nothing(tmp_path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "absent")])
    assert result.exit_code == 3
    assert "Traceback" not in result.output
