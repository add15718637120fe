"""`mllama quantize`: what it says, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mllama_exporter.quantize.recipe import recipe_from_yaml
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main
from mllama_runtime.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes" / "quantize"
PICTURES = Path(__file__).parents[2] / "recipes" / "miniature" / "pictures"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, args)])


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_quantise(recipe: Path, bundle_of, tmp_path: Path) -> None:
    output = tmp_path / "mein Bündel"
    result = run(bundle_of("fp16"), output, "--recipe", recipe, "--calibration", PICTURES, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    bundle = Bundle.open(output, full=True)
    chosen = recipe_from_yaml(recipe)
    assert said["precision"] == bundle.manifest.precision == chosen.scheme
    assert said["quantization"]["vision"] == chosen.vision
    assert said["quantization"]["calibration"]["num_images"] == len(list(PICTURES.glob("*.png")))
    assert bool(said["quantization"]["kept"]) == bool(chosen.keep)
    assert list(said["seconds"]) == ["reading", "calibrating", "scaling", "weights", "saving"]


def test_the_summary_says_what_comes_next(bundle_of, tmp_path: Path) -> None:
    result = run(bundle_of("bf16"), tmp_path / "out", "--scheme", "int8-weight")
    assert result.exit_code == 0, result.output
    assert "int8-weight on bf16; vision kept in bf16" in result.stdout
    assert f"Next: mllama validate {tmp_path / 'out'} --reference" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "--scheme: no scheme"),
        (["--scheme", "int4"], 2, "int4 chooses its scales by what the model sees"),
        (["--scheme", "int8"], 2, "int8 quantises activations and needs data"),
        (["--scheme", "fp8", "--calibration", "none"], 2, "fp8 quantises activations and needs data"),
        (["--scheme", "int4", "--calibration", "absent"], 3, "absent: cannot be read"),
        (["--scheme", "int8-weight", "--keep", "layers.99.*"], 2, "keep: layers.99.*: names no matrix"),
        (["--scheme", "int8-weight", "--keep", "*"], 2, "nothing is left to quantise"),
        (["--recipe", "absent.yaml"], 3, "absent.yaml: cannot be read"),
    ],
)
def test_mistakes(args: list[str], code: int, message: str, bundle_of, tmp_path: Path) -> None:
    result = run(bundle_of("fp16"), tmp_path / "out", *args)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not YAML"),
        ("- int8", "not a recipe"),
        ("scheme: int3", "scheme"),
        ("scheme: int8\nsmooth: 1", "smooth"),
        ("scheme: int8\nkeep: lm_head", "keep"),
        ("scheme: !!python/object/apply:os.system [echo]", "scheme: wrong type"),
        ("scheme: int8\nscheme: int4", "stands twice"),
        ("? [scheme]\n: int8", "not a field"),
        ("1: int8", "unknown"),
        ("scheme: 2024-13-45", "scheme"),
        ("scheme: !!int four", "scheme"),
        ("keep: !!timestamp now", "keep"),
        ("keep: &a [*a]", "keep"),
        ("keep: [" + "9" * 5000 + ", []]", "keep"),
        ("a0: &a0 {x: y}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{f'*a{i}, ' * 9}]}}\n" for i in range(30)), "a0"),
        ("scheme: \xff", "not YAML"),
    ],
)
def test_recipes_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        recipe_from_yaml(path)
