"""reports/validation.html: the report as one page for people, made from the JSON object alone.

No script and no external resource; every text from a bundle, a checkpoint or an answer is escaped by the template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from mllama_exporter.validate.plot import Mark, Plot, Section, Series, plot
from mllama_exporter.validate.thresholds import PREFIXES, GraphKind, family

PAGE_NAME = "reports/validation.html"
Plain = Mapping[str, Any]
"""The report's JSON object, or a part of it."""

KINDS: Mapping[GraphKind, str] = {
    "ort": "Graphs for ONNX Runtime",
    "device": "On the device",
    "standard": "Standard graphs",
}
_SIZES = {"wide": (1000, 320), "narrow": (340, 260)}  # of plots, in pixels
_SECTIONS = {"vision": "Vision", "global": "Global", "decoder": "Decoder"}
_ACCURACY = ("task_accuracy", "accuracy_drop")
_TITLES = {
    "pixel_values": "Pixel values",
    "aspect_ratios": "Canvas shapes",
    "token_ids": "Token ids",
    "cross_attention_mask": "Cross-attention mask",
    "layers_vision": "Error added by a layer of the vision tower",
    "layers_cross": "Error added to cross-attention keys and values",
    "layers_rotary": "Error of the rotary angles",
    "layers_decoder": "Error added by a layer of the decoder",
    "cross": "Cross-attention keys and values",
    "past": "Key and value caches",
    "prefill_logits": "Logits after the prompt",
    "teacher_forced_top1": "Same next token, when fed with the reference's",
    "teacher_forced_kl_mean": "KL divergence in nats, mean",
    "teacher_forced_kl": "KL divergence in nats, largest",
    "generation_identical": "Identical answers",
    "num_nonfinite": "Values that are not finite",
    "largest_activation": "Largest activation",
    "task_accuracy": "Task accuracy",
    "accuracy_drop": "Accuracy below FP32's",
}


def page_from_report(report: Plain) -> bytes:
    """The page of a report's JSON object; equal reports give equal bytes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mllama_exporter.validate", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, threshold=_threshold, percent=_percent)
    layers = _layers(report)
    text = environment.get_template("validation.html.jinja").render(
        report=report,
        kinds=KINDS,
        failed=[check for check in report["checks"] if not check["pass"]],
        first=_first_failure(report["checks"]),
        groups=_check_groups(report["checks"]),
        layers=layers,
        error_plots=_error_plots(report, list(layers)),
        activation_plots=_activation_plots(report["activations"]),
        agreement=_agreement(report["agreement"]),
        totals=_totals(report["agreement"]),
        accuracy=_accuracy(report["accuracy"]),
    )
    return f"{text}\n".encode()


def _check_groups(checks: Sequence[Plain]) -> dict[str, list[dict[str, Any]]]:
    """Checks by kind of graphs; those that differ in the layer alone as one, but for the ones that fail."""
    groups: dict[str, dict[tuple[str, bool], list[Plain]]] = {}
    for check in checks:
        kind, name = _kind(check)
        title = "Accuracy" if name in _ACCURACY else KINDS[kind]
        key = (family(name), True) if check["pass"] else (name, False)
        groups.setdefault(title, {}).setdefault(key, []).append(check)
    return {
        title: [
            {"title": _title(name), "num_checks": len(same), **max(same, key=lambda check: check["value"] or 0.0)}
            for (name, _), same in rows.items()
        ]
        for title, rows in groups.items()
    }


def _first_failure(checks: Sequence[Plain]) -> dict[str, Any] | None:
    """The first check that fails, and its title with the kind of graphs."""
    first = next((check for check in checks if not check["pass"]), None)
    if first is None:
        return None
    kind, name = _kind(first)
    return {**first, "title": _title(name), "kind": None if name in _ACCURACY else KINDS[kind]}


def _kind(check: Plain) -> tuple[GraphKind, str]:
    """The kind of graphs that was checked, and the name of the check without it."""
    name = str(check["name"])
    kind: GraphKind = next((kind for kind, prefix in PREFIXES.items() if prefix and name.startswith(prefix)), "ort")
    return kind, name.removeprefix(PREFIXES[kind])


def _title(name: str) -> str:
    title = _TITLES.get(family(name), name)
    found = re.search(r"_(key|value)_(\d+)$", name)
    return title if found is None else f"{title}: {found[1]}, layer {found[2]}"


def _layers(report: Plain) -> dict[str, dict[str, dict[str, Any]]]:
    """Layer -> kind of graphs -> its worst branch, with the drift behind the layer, and all branches that fail."""
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for table in report["layers"]:
        by_layer: dict[str, list[Plain]] = {}
        for spot in table["spots"]:
            by_layer.setdefault(spot["layer"], []).append(spot)
        for layer, spots in by_layer.items():
            worst = max(spots, key=_excess)
            drift = {key: spots[-1][key] for key in ("cosine", "max_abs", "relative")}
            failing = [spot["branch"] for spot in spots if not spot["pass"]]
            layers.setdefault(layer, {})[table["backend"]] = {**worst, **drift, "failing": failing}
    return layers


def _excess(spot: Plain) -> float:
    return float("inf") if spot["added"] is None else float(spot["added"] / spot["threshold"])


def _error_plots(report: Plain, layers: Sequence[str]) -> dict[str, Plot]:
    """The largest error that each layer adds, one line a kind of graphs, with thresholds and first divergences."""
    series: list[Series] = []
    limits, marks = [], []
    for table in report["layers"]:
        values: dict[str, Plain] = {}
        for spot in table["spots"]:
            if spot["layer"] not in values or _excess(spot) > _excess(values[spot["layer"]]):
                values[spot["layer"]] = spot
        if not values:
            continue
        if (first := table["first_divergence"]) is not None:
            label = f"{first['layer']}, {first['branch']}"
            marks.append(Mark(len(series), layers.index(first["layer"]), label))
        series.append(Series(table["backend"], [values[layer]["added"] for layer in layers]))
        limits.append([values[layer]["threshold"] for layer in layers])
    return _plots(layers, series, limits, marks[:1] if len({mark.label for mark in marks}) == 1 else marks)


def _activation_plots(activations: Plain) -> dict[str, Plot]:
    layers = _ordered([each["layer"] for each in activations["layers"]])
    largest = {each["layer"]: each["largest"] for each in activations["layers"]}
    series = [Series("largest", [largest[layer] for layer in layers])]
    return _plots(layers, series, [[activations["limit"]] * len(layers)], [])


def _ordered(layers: Sequence[str]) -> list[str]:
    """In the order of the data: a decoder layer's keys for pictures are seen before the decoder's first layer."""
    order = (
        "vision input",
        "vision",
        "global vision input",
        "global vision",
        "projector",
        "decoder input",
        "self-attention layers",
        "decoder",
    )

    def place(layer: str) -> tuple[int, int]:
        number, kind = _number_of(layer), re.sub(r" layer \d+$", "", layer)
        return order.index(kind) if kind in order else len(order), -1 if number is None else number

    return sorted(layers, key=place)


def _plots(
    layers: Sequence[str], series: Sequence[Series], limits: Sequence[Sequence[float]], marks: Sequence[Mark]
) -> dict[str, Plot]:
    """For wide screens and for narrow ones; none when nothing was measured."""
    if not series or not layers:
        return {}
    numbers: dict[str, list[int | None]] = {title: [] for title in _SECTIONS.values()}
    for layer in layers:
        start = (
            "vision"
            if layer.startswith("vision")
            else "decoder"
            if layer.startswith(("dec", "self", "lang"))
            else "global"
        )
        numbers[_SECTIONS[start]].append(_number_of(layer))
    sections = [Section(title, each) for title, each in numbers.items() if each]
    return {
        size: plot(width, height, series=series, limits=limits, sections=sections, marks=marks)
        for size, (width, height) in _SIZES.items()
    }


def _number_of(layer: str) -> int | None:
    found = re.search(r" layer (\d+)$", layer)
    return None if found is None else int(found[1])


def _agreement(rows: Sequence[Plain]) -> dict[str, dict[str, Plain]]:
    """Sample -> kind of graphs -> row."""
    samples: dict[str, dict[str, Plain]] = {}
    for row in rows:
        samples.setdefault(row["sample"], {})[row["kind"]] = row
    return samples


def _totals(rows: Sequence[Plain]) -> dict[str, dict[str, float]]:
    """Kind of graphs -> steps, and the shares of steps and of answers that are the same."""
    kinds = {row["kind"]: [each for each in rows if each["kind"] == row["kind"]] for row in rows}
    totals = {}
    for kind, own in kinds.items():
        num_steps = sum(row["num_steps"] for row in own)
        agreed, same = sum(row["num_agreed"] for row in own), sum(row["diverges_at"] is None for row in own)
        totals[kind] = {"num_steps": num_steps, "agreed": agreed / max(1, num_steps), "same": same / len(own)}
    return totals


def _accuracy(results: Sequence[Plain]) -> dict[str, Any]:
    """Results by task, each with its distance from FP32's on the same questions, on one axis from `low` to `high`."""
    low = math.floor(100 * min((each["interval"][0] for each in results), default=0.0)) / 100
    high = math.ceil(100 * max((each["interval"][1] for each in results), default=1.0)) / 100
    baselines = {_questions(each): each["score"] for each in results if each["precision"] == "fp32"}

    def place(share: float) -> float:
        return round(8 + 184 * (share - low) / (high - low or 1.0), 1)

    rows = []
    for each in sorted(results, key=lambda result: (result["task"]["name"], result["metric"])):
        baseline, bar = baselines.get(_questions(each)), tuple(map(place, (*each["interval"], each["score"])))
        rows.append({**each, "difference": None if baseline is None else each["score"] - baseline, "bar": bar})
    return {"low": low, "high": high, "rows": rows}


def _questions(result: Plain) -> tuple[object, ...]:
    return result["task"]["sha256"], result["task"]["num_questions"], result["metric"]


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _threshold(check: Plain) -> str:
    return f"{'≥' if check['bound'] == 'at_least' else '≤'} {_number(check['threshold'])}"
