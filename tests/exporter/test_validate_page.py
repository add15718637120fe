"""The validation page: made from the JSON alone, self-contained, inert, and readable by people and their tools."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mllama_exporter.validate import page_from_report, report_from_bundle
from mllama_exporter.validate.page import PAGE_NAME
from mllama_exporter.validate.pipeline import accuracy_drops
from mllama_exporter.validate.plot import Mark, Section, Series, plot
from mllama_exporter.validate.samples import builtin_samples
from mllama_runtime.bundle import Bundle
from mllama_runtime.evaluation.asking import AskOptions
from mllama_runtime.evaluation.result import Answered, Result, TaskInfo
from mllama_runtime.fields import Prose, dump_json

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
FOLDER = "<img src=x onerror=alert(3)> & co"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def plain(bundle_of, miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a right bundle, whose checkpoint lies in a folder with a hostile name."""
    reference = shutil.copytree(miniature, tmp_path_factory.mktemp("hostile") / FOLDER)
    bundle = Bundle.open(bundle_of())
    samples = [
        each
        for each in builtin_samples(bundle.manifest.model.vision)
        if each.name in ("canvas_1x1", "text_only", "two_pictures", "described_0")
    ]
    results = [result("fp32", 0.999), result("fp16", 0.9985)]
    report = report_from_bundle(bundle, reference, samples=samples, max_steps=2, accuracy=results)
    return json.loads(json.dumps(report.to_plain(), allow_nan=False))


def result(precision: str, score: float, *, bundle: str = "checkpoint", sha256: str = "0" * 64) -> Result:
    return Result(
        bundle=bundle,
        precision=precision,  # type: ignore[arg-type]
        mask_semantics="hf",
        vision_states="published",
        backend="cpu",
        metric="exact",
        task=TaskInfo("held-out.jsonl", sha256, 1),
        score=score,
        interval=(score - 0.002, score + 0.0009),
        interval_kind="bootstrap",
        groups={},
        questions=(Answered("1", Prose("Yes."), score),),
        options=AskOptions(),
        tools={},
    )


def failing(plain: dict[str, Any]) -> dict[str, Any]:
    """The same report with a layer past its threshold."""
    failed = copy.deepcopy(plain)
    table = failed["layers"][0]
    spot = next(spot for spot in table["spots"] if (spot["layer"], spot["branch"]) == ("decoder layer 3", "MLP"))
    spot.update({"added": None, "pass": False})
    table["first_divergence"] = {"layer": "decoder layer 3", "branch": "MLP"}
    check = next(check for check in failed["checks"] if check["name"] == "layers_decoder")
    check.update({"value": None, "pass": False, "detail": "decoder layer 3, MLP, two_pictures"})
    failed["verdict"] = "fail"
    return failed


def with_layers(plain: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The same report of a deeper model."""
    deep = copy.deepcopy(plain)
    for table in deep["layers"]:
        kept = [spot for spot in table["spots"] if not spot["layer"].startswith("decoder layer")]
        layer = [spot for spot in table["spots"] if spot["layer"] == "decoder layer 0"]
        table["spots"] = [
            *kept,
            *({**spot, "layer": f"decoder layer {n}"} for n in range(num_layers) for spot in layer),
        ]
    return deep


def test_equal_reports_give_equal_bytes_and_the_json_file_is_enough(plain: dict[str, Any]) -> None:
    assert page_from_report(plain) == page_from_report(json.loads(dump_json(plain)))


def test_nothing_from_outside_and_nothing_runs(plain: dict[str, Any]) -> None:
    page = page_from_report(plain)
    elements = Elements(page)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in elements.elements}
    for _, attributes in elements.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "xlink:href", "srcset")]
    sources = [image["src"] or "" for image in elements.of("img")]
    assert len(sources) == 3  # of canvas_1x1 and two_pictures
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", source) for source in sources)
    assert b"url(" not in page
    assert b"http:" not in page
    assert b"https:" not in page
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in elements.of("meta"))


def test_hostile_names_are_inert(plain: dict[str, Any]) -> None:
    assert plain["reference"]["name"] == FOLDER
    hostile = copy.deepcopy(plain)
    hostile["bundle"] = hostile["made_with"]["tool"] = HOSTILE
    hostile["answers"][0] |= {"bundle": HOSTILE, "reference": HOSTILE, "prompt": HOSTILE, "sample": HOSTILE}
    hostile["checks"][0]["detail"] = hostile["agreement"][0]["sample"] = HOSTILE
    hostile["accuracy"][0]["task"]["name"] = hostile["accuracy"][0]["bundle"] = HOSTILE
    for row in hostile["agreement"]:
        row["sample"] = HOSTILE if row["sample"] == plain["agreement"][0]["sample"] else row["sample"]
    clean, found = Elements(page_from_report(plain)), Elements(page_from_report(hostile))
    assert Counter(tag for tag, _ in found.elements) == Counter(tag for tag, _ in clean.elements)
    assert {name for _, each in found.elements for name in each} == {
        name for _, each in clean.elements for name in each
    }
    assert found.text.count(HOSTILE) >= 8
    assert FOLDER in found.text


def test_the_verdict_stands_first_and_says_what_fails(plain: dict[str, Any]) -> None:
    text = " ".join(Elements(page_from_report(plain)).text.split())
    assert f"Pass: this bundle is the model. All {len(plain['checks'])} checks" in text
    page = page_from_report(failing(plain))
    text = " ".join(Elements(page).text.split())
    sentence = (
        "Fail: this bundle is not the model. The first thing that fails: Error added by a layer of the decoder "
        "(graphs for ONNX Runtime) is not finite instead of ≤ 2e-05, at decoder layer 3, MLP, two_pictures . 1 of "
    )
    assert sentence in text
    assert text.index(sentence) < text.index("What was compared")
    assert b'<circle class="mark"' in page
    assert "the first past its threshold is decoder layer 3, MLP" in text
    assert "Standard graphs: no layer is past its threshold" in text


def test_all_of_it_is_there(plain: dict[str, Any]) -> None:
    text = " ".join(Elements(page_from_report(plain)).text.split())
    for each in plain["answers"]:
        assert each["reference"] in text
        assert " ".join(each["prompt"].split()) in text
    assert [each["sample"] for each in plain["answers"]] == ["canvas_1x1", "text_only", "two_pictures"]
    assert {each["sample"] for each in plain["agreement"]} == {"canvas_1x1", "text_only", "two_pictures", "described_0"}
    for layer in ("vision layer 2", "global vision layer 1", "projector", "decoder layer 5", "language head"):
        assert layer in text
    assert plain["reference"]["fingerprint"] in text
    assert "99.90% 99.70% to 99.99% +0.00 points" in text
    assert "-0.05 points" in text
    assert "device (the back end is the CPU's; --backend chooses another)" in text
    layers = {each["layer"]: each["largest"] for each in plain["activations"]["layers"]}
    assert set(layers) >= {"vision layer 0", "decoder layer 1", "decoder input", "language head"}
    assert max(layers.values()) < plain["activations"]["limit"]


def test_tools_for_reading_find_their_way(plain: dict[str, Any]) -> None:
    elements = Elements(page_from_report(plain))
    assert elements.of("html") == [{"lang": "en"}]
    assert len(elements.of("h1")) == len(elements.of("main")) == 1
    assert all(image.get("alt") for image in elements.of("img"))
    assert all(header.get("scope") for header in elements.of("th"))
    ids = {each["id"] for _, each in elements.elements if each.get("id")}
    for tag in ("table", "div"):
        labels = [each["aria-labelledby"] for each in elements.of(tag) if "aria-labelledby" in each]
        assert len(labels) == 4  # checks, agreement, accuracy, layers
        assert set(labels) <= ids
    drawings = [each for each in elements.of("svg") if "width" not in each]  # a legend's is hidden
    assert all(each.get("role") == "img" and each.get("aria-label") for each in drawings)
    assert len(drawings) == 2 * 2 + 2  # two plots for wide and narrow screens, and the bars of two results


def test_a_hundred_layers_are_one_page(plain: dict[str, Any]) -> None:
    page = page_from_report(with_layers(plain, 100))
    assert len(page) < 400_000
    text = Elements(page).text
    assert "decoder layer 99" in text
    narrow = re.search(r'<svg class="plot narrow".*?</svg>', page.decode(), re.DOTALL)
    assert narrow
    labels = re.findall(r'<text x="([\d.]+)" y="251" [^>]*>(\d+)</text>', narrow[0])
    decoder = [float(x) for x, _ in labels][-5:]
    assert [number for _, number in labels][-5:] == ["0", "20", "40", "60", "80"]
    assert min(right - left for left, right in pairwise(decoder)) >= 26  # pixels


def test_a_report_without_layers_answers_or_results(plain: dict[str, Any]) -> None:
    bare = copy.deepcopy(plain) | {"answers": [], "accuracy": [], "agreement": []}
    bare["activations"]["layers"] = []
    bare["layers"] = [table | {"spots": []} for table in bare["layers"]]
    text = Elements(page_from_report(bare)).text
    assert "Checks" in text
    for section in ("Where errors are made", "Activation ranges", "Accuracy by precision", "Answers side by side"):
        assert section not in text


def test_plot_breaks_its_line_at_zero_and_at_sections_and_draws_what_is_not_finite_on_top() -> None:
    drawn = plot(
        500,
        200,
        series=[Series("a", [1.0, 0.0, 0.1, None, 10.0])],
        limits=[[1.0] * 5],
        sections=[Section("First", [None, 0, 1]), Section("Second", [0, 1])],
        marks=[Mark(0, 3, "here")],
    )
    assert [len(piece.split()) for piece in drawn.lines[0]] == [1, 1, 2]
    heights = [y for _, y in drawn.points[0]]
    assert heights[1] == drawn.bottom
    assert heights[3] == drawn.top
    assert heights[2] > heights[0] > heights[4] > drawn.top
    assert (drawn.marks[0].x, drawn.marks[0].y) == drawn.points[0][3]
    assert drawn.marks[0].anchor == "end"
    assert [label.text for label in drawn.sections] == ["First", "Second"]
    assert len(drawn.borders) == 1


def test_the_drop_in_accuracy_is_checked_on_the_same_questions(bundle_of) -> None:
    manifest = Bundle.open(bundle_of("fp16")).manifest
    own, base = result("fp16", 0.995, bundle=manifest.name), result("fp32", 0.996)
    (check,) = accuracy_drops(manifest, [own, base])
    assert check.passed
    assert check.threshold == 0.002
    assert check.value == pytest.approx(0.001)
    (check,) = accuracy_drops(manifest, [own, result("fp32", 0.9975)])
    assert not check.passed
    assert check.detail == "held-out.jsonl, exact: 0.9950 against 0.9975 in fp32"
    assert accuracy_drops(manifest, [own, result("fp32", 1.0, sha256="1" * 64)]) == []
    assert accuracy_drops(manifest, [result("fp16", 0.5, bundle="another"), base]) == []
    assert PAGE_NAME.startswith("reports/")


def test_results_of_other_semantics_are_no_baseline(bundle_of) -> None:
    manifest = Bundle.open(bundle_of()).manifest
    own = result("fp32", 0.99, bundle=manifest.name)
    for other in ({"vision_states": "transformers-4.56"}, {"mask_semantics": "meta"}):
        assert accuracy_drops(manifest, [own, replace(result("fp32", 1.0), **other)]) == []  # type: ignore[arg-type]
