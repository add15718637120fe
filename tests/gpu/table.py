"""Results to one Markdown page: every figure with its share of the same GPU's best, every gap with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpu.runner import Result, Row

Cells = Callable[[Row], list[str]]


def table_from_results(
    environment: dict[str, Any], results: Sequence[Result], copy_rate: float | None, product_rate: float | None
) -> str:
    """The page.

    Args:
        copy_rate: bytes a second of the large copy.
        product_rate: operations a second of the large 16-bit matrix product.
    """

    def decode(row: Row) -> list[str]:
        bytes_a_second = row["read_bytes"] / row["seconds"]
        share = _share(bytes_a_second, copy_rate)
        rate = f"{row['tokens_per_second']:.1f}"
        return [*_engine(row), *_case(row), rate, _ms(row["seconds"]), f"{bytes_a_second / 1e9:.0f}", share]

    def first(row: Row) -> list[str]:
        share = _share(row["flops"] / row["seconds"], product_rate)
        return [*_engine(row), str(row["num_tokens"]), _picture(row), _ms(row["seconds"]), share]

    def rows(section: str, kind: str | None = None) -> list[Row]:
        found = [row for result in results if result.section == section for row in result.rows]
        return [row for row in found if kind is None or row.get("kind") == kind]

    lines = [*_header(environment), *_results(results)]
    lines += _section("Does it run", ("back end", "runs", "answer"), rows("Does it run"), _runs)
    lines += _section("Tests", ("passed", "failed", "skipped"), rows("Tests")[:1], _tests)
    lines += _section("Roofline", ("what", "best"), rows("Roofline"), _roofline)
    titles = ("back end", "precision", "verdict", "same next token", "KL, mean", "identical answers", "not finite")
    lines += _section("Validation", titles, rows("Validation"), _validation)
    for section in ("11B", "90B"):
        titles = (*_ENGINE, "batch", "cached", "picture", "tokens/s", "ms", "GB/s", "share of the copy")
        lines += _section(f"{section}, decode", titles, rows(section, "decode"), decode)
        titles = (*_ENGINE, "tokens", "picture", "ms", "share of the 16-bit product")
        lines += _section(f"{section}, first token", titles, rows(section, "first token"), first)
        titles = (*_ENGINE, "seconds", "GB")
        lines += _section(f"{section}, builds", titles, rows(section, "build"), _build)
    titles = ("mode", "picture", "decode, tokens/s", "first token, ms")
    lines += _section("transformers", titles, rows("transformers"), _beside)
    lines += _gaps(results)
    return "\n".join(lines) + "\n"


_ENGINE = ("precision", "back end", "engine's batch")


def _header(environment: dict[str, Any]) -> list[str]:
    gpu, packages = environment["gpu"], environment["packages"]
    memory, capability = gpu["memory.total"] or "unknown", environment["compute_capability"] or "unknown"
    backends = [f"{name} {each['version']}" for name, each in environment["backends"].items() if each["version"]]
    return [
        f"# {gpu['name'] or 'GPU of unknown name'}, {environment['date']}",
        "",
        f"Driver {gpu['driver_version'] or 'unknown'}, CUDA {environment['cuda'] or 'unknown'}, "
        f"compute capability {capability}, {memory} of memory. "
        f"Back ends: {', '.join(backends) or 'none'}. "
        f"Packages: {', '.join(f'{name} {version}' for name, version in packages.items())}.",
    ]


def _results(results: Sequence[Result]) -> list[str]:
    counts = {
        status: sum(result.status == status for result in results)
        for status in ("done", "failed", "timed out", "skipped")
    }
    return ["", "Steps: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + "."]


def _section(title: str, columns: Sequence[str], rows: Sequence[Row], cells: Cells) -> list[str]:
    """Rows without a figure are left to the list of gaps."""
    shown = [cells(row) for row in rows if not row.get("reason") or "runs" in row or "verdict" in row]
    if not shown:
        return []
    return ["", f"## {title}", "", _line(columns), "|---" * len(columns) + "|", *map(_line, shown)]


def _gaps(results: Sequence[Result]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}  # what and why -> steps
    for result in results:
        if result.status != "done":
            found.setdefault((result.status, result.reason or ""), []).append(result.step)
        for row in result.rows:
            if row.get("reason"):
                found.setdefault((_label(row), row["reason"]), []).append(result.step)
    if not found:
        return []
    lines = [_line((", ".join(steps), what, why)) for (what, why), steps in found.items()]
    return ["", "## Without a figure", "", _line(("steps", "what", "why")), "|---|---|---|", *lines]


def _label(row: Row) -> str:
    """What a row without a figure was to be."""
    known = ("what", "test", "mode", "backend", "precision")
    return next((str(row[key]) for key in known if row.get(key)), "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _engine(row: Row) -> list[str]:
    return [row["precision"], row["backend"], "any" if row["backend"] == "cuda" else str(row["max_batch"])]


def _case(row: Row) -> list[str]:
    return [str(row["batch"]), str(row["num_tokens"]), _picture(row)]


def _picture(row: Row) -> str:
    return f"{row['num_tiles']} tiles" if row["num_tiles"] else "none"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _share(value: float, best: float | None) -> str:
    return "not measured" if best is None else f"{value / best:.0%}"


def _runs(row: Row) -> list[str]:
    answer = row["answer"] if row["runs"] else f"at {row['at']}: {row['reason']}"
    return [row["backend"], "yes" if row["runs"] else "no", answer]


def _tests(row: Row) -> list[str]:
    return [str(row[key]) for key in ("passed", "failed", "skipped")]


def _roofline(row: Row) -> list[str]:
    unit = {"bytes/s": "TB/s", "operations/s": "T operations/s"}[row["unit"]]
    return [row["what"], f"{row['rate'] / 1e12:.2f} {unit}"]


def _validation(row: Row) -> list[str]:
    numbers = [row[name] for name in ("teacher_forced_top1", "teacher_forced_kl_mean", "generation_identical")]
    shown = ["not finite" if number is None else f"{number:.4g}" for number in numbers]
    return [row["backend"], row["precision"], row["verdict"], *shown, f"{row['num_nonfinite']:.0f}"]


def _build(row: Row) -> list[str]:
    return [*_engine(row), f"{row['seconds']:.0f}", f"{row['size_bytes'] / 1e9:.1f}"]


def _beside(row: Row) -> list[str]:
    return [row["mode"], _picture(row), f"{1 / row['decode_seconds']:.1f}", _ms(row["first_token_seconds"])]
