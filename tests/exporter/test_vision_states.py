"""Which vision states a tower takes: what is installed is told by running it, corrected where wrong, and reported."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporter._faults import relist
from filelock import FileLock
from mllama_exporter import reference_tower as states_module
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.modules.vision import VisionTower
from mllama_exporter.reference_tower import installed_states, states_of, take_states
from mllama_exporter.validate import Report, page_from_report, report_from_bundle
from mllama_exporter.validate import reference as reference_module
from mllama_exporter.validate.reference import ReferenceModel
from mllama_exporter.validate.report import ReferenceInfo
from mllama_exporter.validate.samples import builtin_samples, text_samples
from mllama_runtime.bundle import Bundle
from mllama_runtime.errors import EnvironmentFault

STATES = ("published", "transformers-4.56")
DIM = 8  # of the probe's tower, with two intermediate states


def earlier_bundle(shared: Path, miniature: Path) -> Path:
    """A planted fault: a bundle whose graphs take the states one block too early, and whose manifest says nothing."""
    output = shared / "bundles" / "earlier-vision-states"
    output.parent.mkdir(exist_ok=True)
    build = VisionTower.__init__

    def one_too_early(self: VisionTower, *args: Any) -> None:
        build(self, *args)
        self.taken_states = [index - 1 for index in self.taken_states]

    with FileLock(output.with_suffix(".lock")):
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(VisionTower, "__init__", one_too_early)
                bundle_from_checkpoint(miniature, output, ExportOptions())
    return output


def validated(bundle: Path, reference: Path) -> Report:
    opened = Bundle.open(bundle)
    names = ("canvas_2x2", "text_only", "two_pictures")  # layers are measured in the last
    samples = [each for each in builtin_samples(opened.manifest.model.vision) if each.name in names]
    return report_from_bundle(opened, reference, samples=samples, max_steps=8)


# What is installed.


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], object]], None]]:
    """`install(change)`: test double of another transformers, whose towers `change` has changed."""
    build = states_module._tiny_tower

    def install(change: Callable[[Any], object]) -> None:
        def changed() -> Any:
            change(tower := build())
            return tower

        monkeypatch.setattr(states_module, "_tiny_tower", changed)
        installed_states.cache_clear()

    yield install
    installed_states.cache_clear()


def giving(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], object]:
    """A tower with another output."""

    def put(_: object, args: object, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    return lambda tower: tower.register_forward_hook(put)


def last_repeated(features: torch.Tensor) -> torch.Tensor:
    """As in transformers 4.55: the last of the states stands in the place of each."""
    last = features[..., DIM + 1 :: 2]
    return torch.cat([features[..., :DIM], torch.stack([last, last], dim=-1).flatten(-2)], dim=-1)


def without_a_block(tower: Any) -> None:
    tower.transformer.layers = tower.transformer.layers[:2]


def without_an_encoder(tower: Any) -> None:
    tower.encoder = tower.transformer
    del tower.transformer


def test_the_installed_tower_takes_the_states_after_a_block() -> None:
    """True of transformers 4.56 to 5.23; test_against_older_transformers.py knows it from elsewhere."""
    assert installed_states() == "transformers-4.56"


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (lambda tower: take_states(tower, "published"), "published"),
        (lambda tower: take_states(tower, "transformers-4.56"), "transformers-4.56"),
        (giving(last_repeated), "other"),
    ],
    ids=["repaired", "as it is", "4.55"],
)
def test_another_installation_is_told_and_can_be_corrected(change: Any, states: str, install: Any) -> None:
    install(change)
    assert installed_states() == states
    for wanted in STATES:
        take_states(tower := states_module._tiny_tower(), wanted)  # type: ignore[arg-type]
        assert states_of(tower) == wanted


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (giving(lambda features: features.roll(-DIM, -1)), "the final state does not stand in front"),
        (giving(lambda features: features[..., :-DIM]), "the output is 16 wide, and 2 intermediate states of 8"),
        (giving(lambda features: features[0]), "no tensor of five axes"),
        (without_a_block, "transformer.layers.2 is missing"),
        (without_an_encoder, "transformer.layers.1 is missing"),
        (lambda tower: delattr(tower, "patch_embedding"), "AttributeError: .*patch_embedding"),
    ],
    ids=["final state behind", "narrower", "fewer axes", "fewer blocks", "another name", "broken"],
)
def test_a_tower_of_no_known_kind_is_an_environment_fault(change: Any, found: str, install: Any) -> None:
    install(change)
    with pytest.raises(EnvironmentFault, match=found) as raised:
        installed_states()
    assert str(raised.value).startswith(f"transformers {transformers.__version__}: cannot tell which")
    assert "expected the tower of 4.54 to 5.23" in str(raised.value)


def test_a_correction_that_does_nothing_is_an_environment_fault(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "take_states", lambda tower, semantics: None)
    install(lambda tower: None)
    with pytest.raises(EnvironmentFault, match="made to take published states does not"):
        installed_states()


def test_the_probe_draws_nothing_from_torchs_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    installed_states.cache_clear()
    installed_states()
    assert torch.equal(torch.rand(4), expected)


def test_transformers_before_4_54_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: a cache without layers, as transformers 4.53 has it."""
    installed = importlib.import_module("transformers")  # which puts another module in its own place as it goes
    monkeypatch.setattr(installed, "DynamicCache", lambda: object())
    with pytest.raises(EnvironmentFault, match=r"too old: expected 4\.54 or newer, found .*; pip install"):
        importlib.reload(reference_module)


def test_a_checkpoint_that_transformers_cannot_load(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: what 4.54 says of a config.json that transformers 5 wrote."""

    def fail(*args: object, **options: object) -> None:
        raise TypeError("'NoneType' object is not subscriptable")

    kind = reference_module.transformers.MllamaForConditionalGeneration
    monkeypatch.setattr(kind, "from_pretrained", fail)
    with pytest.raises(EnvironmentFault, match="cannot load this checkpoint: found TypeError: 'None"):
        ReferenceModel(miniature, mask_semantics="hf", vision_states=None)


# What is corrected, and what is said of it.


def test_the_reference_is_corrected_where_it_is_wrong_and_only_there(
    miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrected: list[str] = []
    monkeypatch.setattr(reference_module, "take_states", lambda tower, semantics: corrected.append(semantics))
    for own in (*STATES, "other"):
        monkeypatch.setattr(reference_module, "installed_states", lambda own=own: own)
        for wanted in (*STATES, None):
            ReferenceModel(miniature, mask_semantics="hf", vision_states=wanted, num_layers=1)  # type: ignore[arg-type]
    assert corrected == ["transformers-4.56", "published", *STATES]


@pytest.mark.parametrize("states", STATES)
def test_a_right_bundle_passes_and_the_report_says_what_was_corrected(states: str, bundle_of, miniature: Path) -> None:
    report = validated(bundle_of(vision_states=states), miniature)
    assert report.verdict == "pass", report.to_text()
    library = f"transformers {transformers.__version__}"
    taken = f"{library} takes the vision tower's states after the block"
    note, corrected_to = {
        "published": (f"{taken}; corrected to published (before the block)", "published"),
        "transformers-4.56": (f"{taken}, as the bundle does, and needs no correction", None),
    }[states]
    plain = report.to_plain()
    assert plain["vision_states"] == states
    assert plain["reference"] == {
        "name": "checkpoint",
        "fingerprint": report.manifest.source.fingerprint,
        "library": library,
        "dtype": "float32",
        "attention": "sdpa",
        "vision_states": "transformers-4.56",
        "corrected_to": corrected_to,
        "note": note,
    }
    assert report.to_text().splitlines()[-2:] == [f"reference: {note}", plain["summary"]]
    assert f"hf semantics, {states} vision states, against" in report.to_text().splitlines()[-1]
    page = page_from_report(plain).decode()
    assert note.replace("'", "&#39;") in page
    assert f"<dt>Vision states</dt><dd>{states}</dd>" in page
    assert ("vision states corrected" in report.validation().reference) == (states == "published")


def test_of_text_alone_nothing_is_said(miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is asked: a tower of no known kind would do no harm."""
    monkeypatch.setattr(states_module, "_tiny_tower", lambda: None)
    bundle = bundle_from_checkpoint(miniature, tmp_path / "bundle", ExportOptions(num_layers=2, text_only=True))
    report = report_from_bundle(bundle, miniature, samples=text_samples()[:1], max_steps=1)
    plain = report.to_plain()
    assert (plain["vision_states"], plain["reference"]["vision_states"], report.reference.note) == (None, None, None)  # type: ignore[index]
    assert "states" not in report.to_text()
    assert "Vision states" not in page_from_report(plain).decode()


def test_states_of_neither_kind_have_words_of_their_own() -> None:
    info = ReferenceInfo("checkpoint", "0" * 64, "transformers 4.55.4", "float32", "sdpa", "other", "published")
    assert info.note == (
        "transformers 4.55.4 takes the vision tower's states neither before nor after the block; "
        "corrected to published (before the block)"
    )


@pytest.mark.parametrize("fault", ["one block late", "one block early", "taken for 4.56's"])
def test_the_wrong_states_fail_at_the_projector(
    fault: str, bundle_of, shared: Path, miniature: Path, tmp_path: Path
) -> None:
    """The blocks agree; what the projector is fed with does not, and everything behind it follows."""
    graphs = {
        "one block late": lambda: bundle_of(vision_states="transformers-4.56"),
        "one block early": lambda: earlier_bundle(shared, miniature),
        "taken for 4.56's": bundle_of,
    }[fault]()
    bundle = shutil.copytree(graphs, tmp_path / "bundle")
    relist(bundle, vision_states="transformers-4.56" if fault == "taken for 4.56's" else "published")
    report = validated(bundle, miniature)
    assert report.verdict == "fail"
    assert [table.first_divergence.where for table in report.layers if table.first_divergence] == [
        "projector, intermediate states and projection"
    ] * 2
    assert "the first is layers_vision is " in report.to_text().splitlines()[-1]
    assert "(projector, intermediate states and projection, two_pictures)" in report.to_text().splitlines()[-1]
    failed = {check.name for check in report.failed}
    assert {"layers_vision", "cross_key_1", "cross_value_3", "standard_cross_key_1"} <= failed
    assert not failed & {"layers_cross", "layers_decoder", "pixel_values"}  # which are fed with the reference's
