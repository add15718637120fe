"""`mllama bench` measures what it names; how fast is not a matter for tests."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from mllama_runtime.cli import main


@pytest.mark.parametrize("as_json", [True, False])
def test_bench(bundle_of, as_json: bool) -> None:
    options = ["--steps", "2", "--prompt-len", "8", "--cache-len", "64", "--batch", "2", "--threads", "1"]
    result = CliRunner().invoke(main, ["bench", str(bundle_of()), *options, *["--json"] * as_json])
    assert result.exit_code == 0, result.output
    if as_json:
        rows = json.loads(result.stdout)["measured"]
        assert [row["what"].split(",")[0] for row in rows] == ["vision", "prefill", "decode", "decode", "decode"]
        assert all(row["ms"] > 0 for row in rows)
    else:
        assert "decode, batch 2, 32 of 64 cached, picture of 4 tiles" in result.stdout


def test_bench_of_nothing(tmp_path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "absent")])
    assert result.exit_code == 3
    assert "Traceback" not in result.output
