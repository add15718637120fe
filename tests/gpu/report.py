"""One Markdown page of a session: `python -m gpu.report TITLE RESULTS.jsonl... > page.md`.

What stands in a later file comes later in the page's tables; a case that failed is told, not left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_NUM_KERNELS = 8


def page(title: str, rows: Sequence[Row]) -> str:
    """The page."""
    found = [f"# {title}", *_machine(rows)]
    for heading, columns, lines in (
        ("The miniature against the CPU's answers", _MINI, _mini(_of(rows, "mini"))),
        ("transformers in float32 on the same weights, as a judge", _JUDGE, map(_judge, _of(rows, "judge"))),
        ("Decode", _DECODE, (_decode(row) for row in _of(rows, "speed") if row["case"] == "decode" and "ms" in row)),
        ("First token", _FIRST, (_first(row) for row in _of(rows, "speed") if row["case"] == "first token")),
        ("Vision graph", _VISION, (_vision(row) for row in _of(rows, "speed") if row["case"] == "vision")),
        ("Seeded sampling", _SAMPLER, (_sampler(row) for row in _of(rows, "speed") if row["case"] == "sampler")),
        ("Memory", _MEMORY, map(_memory, _opened(rows))),
        ("Kernels", _KERNELS, _kernels(rows)),
        ("TensorRT-RTX", _RTX, map(_rtx, _of(rows, "tensorrt-rtx"))),
        ("Faults", _FAULTS, (_fault(row) for row in rows if row.get("error"))),
    ):
        found += _table(heading, columns, [line for line in lines if line])
    return "\n".join(found) + "\n"


def _of(rows: Iterable[Row], work: str) -> list[Row]:
    return [row for row in rows if row["work"] == work and not row.get("error")]


def _machine(rows: Sequence[Row]) -> list[str]:
    facts = {row["case"]: row for row in rows if row["work"] == "facts"}
    gpu, packages = facts.get("gpu", {}), facts.get("packages", {})
    ort = facts.get("onnxruntime", {}).get("version")
    names = ("torch", "transformers", "numpy", "cuda-bindings", "nvidia-cublas", "nvidia-cudnn-cu13")
    versions = ", ".join(f"{name} {packages[name]}" for name in names if packages.get(name))
    return [
        "",
        f"{gpu.get('name')}, {gpu.get('memory.total')}, driver {gpu.get('driver_version')}, "
        f"{gpu.get('clocks.max.sm')}, {gpu.get('power.limit')}; "
        f"{f'onnxruntime-gpu {ort}, ' if ort else ''}{versions}. The copy rate is of the same process.",
    ]


def _table(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    rows = [columns, ["---"] * len(columns), *lines]
    return ["", f"## {heading}", "", *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]


_WAYS = ("greedy", "seeded", "penalised")
_MINI = ("precision", *(f"{way}: equal answers" for way in _WAYS), "logits: relative L2", "same next token")


def _mini(rows: Sequence[Row]) -> list[list[str]]:
    """A line a precision. Of each way to sample: alone and in batches of 4, captured and not."""
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        line = [precision]
        for way in _WAYS:
            runs = [row for row in own if row["case"].startswith(f"{way},") and "equal" in row]
            line.append(f"{', '.join(str(row['equal']) for row in runs)} of {runs[0]['of']}" if runs else "")
        logits: Row = next((row for row in own if "relative_l2" in row), {})
        lines.append([*line, _number(logits.get("relative_l2"), ".2g"), _number(logits.get("top1"), ".2%")])
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


_JUDGE = ("bundle", "case", "logits: relative L2", "largest error", "same next token", "keys and values, worst")


def _judge(row: Row) -> list[str] | None:
    if "relative_l2" not in row:
        return None
    worst = f"{row['cross_worst']:.2g}" if "cross_worst" in row else ""
    return [
        row["bundle"],
        row["case"],
        f"{row['relative_l2']:.2g}",
        f"{row['max_error']:.2g}",
        f"{row['top1']:.0%}",
        worst,
    ]


def _name(row: Row) -> str:
    return f"{row['bundle']}, {row['label']}" if row.get("label") else str(row["bundle"])


_DECODE = ("bundle", "batch", "tiles", "cached", "ms a step", "tokens/s", "GB read", "share of the copy rate")


def _decode(row: Row) -> list[str]:
    return [
        _name(row),
        *(str(row[key]) for key in ("batch", "tiles", "cached")),
        f"{row['ms']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['read_bytes'] / 1e9:.1f}",
        f"{row['share_of_copy']:.1%}",
    ]


_FIRST = ("bundle", "tiles", "tokens", "very first, ms", "ms", "TFLOP/s")


def _first(row: Row) -> list[str]:
    return [
        _name(row),
        str(row["tiles"]),
        str(row["tokens"]),
        f"{row['first_ms']:.1f}",
        f"{row['ms']:.1f}",
        f"{row['tflops']:.0f}",
    ]


_VISION = ("bundle", "ms, alone", "ms, in a row", "TFLOP/s")


def _vision(row: Row) -> list[str]:
    return [_name(row), f"{row['ms']:.1f}", f"{row['in_a_row_ms']:.1f}", f"{row['tflops_in_a_row']:.0f}"]


_SAMPLER = ("bundle", "rows", "ms a step")


def _sampler(row: Row) -> list[str]:
    cases = {key.removeprefix("ms_batch_"): value for key, value in row.items() if key.startswith("ms_batch_")}
    return [_name(row), ", ".join(cases), ", ".join(f"{value:.2f}" for value in cases.values())]


_MEMORY = ("bundle", "seconds to open", "planned, GB", "taken at the end, GB", "beyond the plan, MB")


def _opened(rows: Sequence[Row]) -> list[Row]:
    """Each opening joined with what was taken at its end."""
    found: list[Row] = []
    for row in _of(rows, "speed"):
        if row["case"] == "open":
            found.append(dict(row))
        elif row["case"] == "memory at the end" and found:
            found[-1] |= {key: row[key] for key in ("taken_bytes", "planned_bytes", "unplanned_bytes")}
    return [row for row in found if "planned_bytes" in row]


def _memory(row: Row) -> list[str]:
    return [
        _name(row),
        f"{row['open_seconds']:.1f}",
        f"{row['planned_bytes'] / 1e9:.2f}",
        f"{row['taken_bytes'] / 1e9:.2f}",
        f"{row['unplanned_bytes'] / 1e6:.0f}",
    ]


_KERNELS = ("bundle", "of", "kernel", "times", "us")


def _kernels(rows: Sequence[Row]) -> list[list[str]]:
    """The longest of each run."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for row in _of(rows, "speed"):
        if row["case"] == "kernel":
            line = [_name(row), row["of"], f"`{row['name'][:90]}`", f"{row['count']:.0f}", f"{row['us']:.0f}"]
            found.setdefault((line[0], line[1]), []).append(line)
    return [line for lines in found.values() for line in lines[:_NUM_KERNELS]]


_RTX = ("version", "case", "loaded", "said")


def _rtx(row: Row) -> list[str]:
    return [row.get("version", ""), row["case"], str(row.get("is_loaded")), row.get("said", "")]


_FAULTS = ("work", "case", "error")


def _fault(row: Row) -> list[str]:
    return [
        " ".join(str(row[key]) for key in ("work", "bundle", "precision") if row.get(key)),
        row["case"],
        row["error"],
    ]


def main(print_: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("title")
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    lines = [line for path in arguments.results for line in path.read_text(encoding="utf-8").splitlines()]
    print_(page(arguments.title, [json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
