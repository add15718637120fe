"""`mllama verify`: are these the bytes that were exported? A gate for pipelines: exit 1 when they are not."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from mllama_runtime.bundle import Bundle, Verification
from mllama_runtime.cli import example, json_option
from mllama_runtime.errors import GateError
from mllama_runtime.fields import printable


@click.command(epilog=example("mllama verify my-bundle", "mllama verify my-bundle --quick --json"))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--full/--quick",
    default=True,
    show_default=True,
    help="Hash every byte; or look at links, sizes and headers, and hash small files only.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, bundle: Path, full: bool, as_json: bool) -> None:
    """Check every file of a bundle against its manifest, and name those that are wrong, missing or not listed."""
    opened = Bundle.read(bundle)
    total = sum(entry.size_bytes for entry in opened.manifest.files.values())
    with click.progressbar(
        length=total,
        label="verify",
        file=sys.stderr,
        hidden=not (full and sys.stderr.isatty()),
        update_min_steps=max(1, total // 200),
    ) as bar:
        result = opened.verify(full=full, progress=bar.update)
    click.echo(_json(opened, result) if as_json else _text(opened, result))
    if result.problems:
        ctx.exit(GateError.exit_code)


def _json(bundle: Bundle, result: Verification) -> str:
    return json.dumps(
        {
            "bundle": str(bundle.root),
            "mode": "full" if result.full else "quick",
            "ok": not result.problems,
            "num_files": result.num_files,
            "num_hashed_bytes": result.num_hashed_bytes,
            "problems": [asdict(problem) for problem in result.problems],
        }
    )


def _text(bundle: Bundle, result: Verification) -> str:
    lines = [printable(str(problem)) for problem in result.problems]
    mode = "full" if result.full else "quick"
    verdict = f"{len(lines)} problems" if lines else "all as exported"
    where = printable(str(bundle.root))
    lines.append(
        f"{where}: {result.num_files} files, {mode} check, {result.num_hashed_bytes:,} bytes hashed: {verdict}"
    )
    return "\n".join(lines)
