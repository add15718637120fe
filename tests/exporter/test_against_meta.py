"""Our graphs against Meta's own model code, with which the published weights were trained.

Meta's code makes random weights and writes them in its own form, we export that folder, and both answer the same
requests. Pictures have tiles of 224 pixels and of the published 448 and 560; width and depth are the published ones in
the slow test. Both sides get the tiles from our preprocessing; test_processor_against_meta.py judges that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import MaskSemantics, VisionStates
from mllama_runtime.decode import prefill
from mllama_runtime.preprocessing import ImageTiles, PreprocessorConfig, preprocess, supported_aspect_ratios
from mllama_runtime.prompt import image_visibility
from numpy.typing import NDArray
from oracles import environments
from PIL import Image

from .test_parity import IMAGE, Case, PromptRow, token_ids

BAR = 2e-5  # of the largest value of a tensor; 1.6e-6 is the largest that was seen
META = Path(environments.__file__).parent / "meta"
ANSWER = [70, 71, 72, 73]
IMAGE_TOKEN_ID = 1024  # and the size of the vocabulary
TEXT = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vision_num_cross_attention_layers": 2}
CROSS_LAYERS = [1, 4]  # Meta's places, before the layers 1 and 3, where cross-attention layers are counted too
SMALL = {"width": 64, "heads": 2, "layers": 4, "n_global_layers": 2, "return_intermediate": [1, 2]}
OWN = {"width": 1280, "heads": 16, "layers": 32, "n_global_layers": 8, "return_intermediate": [3, 7, 15, 23, 30]}

ONE_TILE = Case("one tile", (IMAGE, *range(40, 52)), ((1, 1),))
FOUR_TILES = Case("four tiles", (1008, IMAGE, *range(40, 52)), ((2, 2),))
TEXT_BEFORE = Case("text before the picture", (*range(30, 41), IMAGE, *range(60, 70)), ((1, 3),))
TWO = Case("two pictures", (9, 8, IMAGE, 50, 51, 52, IMAGE, 60, 61, 62, 63), ((4, 1), (1, 2)))
THREE = Case("three pictures", (9, 8, IMAGE, IMAGE, 60, 61, IMAGE, 62, 63), ((1, 1), (1, 4), (2, 1)))
TEXT_ONLY = Case("text only", tuple(range(100, 117)), ())
CASES = {
    "224": [ONE_TILE, FOUR_TILES, TEXT_BEFORE, TWO, THREE, TEXT_ONLY],
    "448": [TEXT_BEFORE, TWO],
    "560": [TEXT_BEFORE, THREE],
    "own width": [TEXT_BEFORE],
}
# Exports are slow: not every size has every variant.
ANSWERS: dict[str, dict[str, tuple[MaskSemantics, list[int] | None]]] = {
    "224": {
        "hf": ("hf", None),
        "meta": ("meta", None),
        "one block earlier": ("hf", [0, 1]),
        "one block later": ("hf", [2, 3]),
    },
    "448": {"hf": ("hf", None), "meta": ("meta", None)},
    "560": {"hf": ("hf", None), "meta": ("meta", None)},
    "own width": {"meta": ("meta", None)},
}
SLOW = {("448", "meta"), ("560", "hf"), ("own width", "meta")}
PARAMETERS = [
    pytest.param(
        *(model, semantics, case),
        id=f"{model}-{semantics}-{case.name}",
        marks=[pytest.mark.slow] if (model, semantics) in SLOW else [],
    )
    for model, cases in CASES.items()
    for semantics in ("hf", "meta")
    if semantics in ANSWERS[model]
    for case in cases
]

JudgedOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def judged_of(shared: Path, miniature: Path) -> JudgedOf:
    """`judged_of(model)`: a Hugging Face folder around Meta's `original/`, with `requests/` and Meta's `answers/`."""

    def judged_of(model: str) -> Path:
        folder = shared / "against-meta" / model.replace(" ", "-")
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "is-answered").exists():
                shutil.rmtree(folder, ignore_errors=True)
                write_folder(folder, miniature, model)
                python = environments.environment("meta", META / "requirements.txt")
                environments.run(python, META / "oracle.py", "model", folder)
                (folder / "is-answered").touch()
        return folder

    return judged_of


def write_folder(folder: Path, miniature: Path, model: str) -> None:
    """Everything but the weights: the miniature's text files, configurations of other sizes, and the requests."""
    size, vision = (224, OWN) if model == "own width" else (int(model), SMALL)
    shutil.copytree(miniature, folder, ignore=shutil.ignore_patterns("model*"))
    change_json(folder / "preprocessor_config.json", {"size": {"height": size, "width": size}})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": TEXT["dim"],
        "intermediate_size": 176,  # two thirds of four times the width, rounded up to a multiple of 16
        "num_hidden_layers": TEXT["n_layers"] + len(CROSS_LAYERS),
        "cross_attention_layers": CROSS_LAYERS,
    }
    config["vision_config"] |= {
        "hidden_size": vision["width"],
        "intermediate_size": 4 * vision["width"],
        "attention_heads": vision["heads"],
        "num_hidden_layers": vision["layers"],
        "num_global_layers": vision["n_global_layers"],
        "intermediate_layers_indices": vision["return_intermediate"],
        "vision_output_dim": vision["width"] * (1 + len(vision["return_intermediate"])),
        "image_size": size,
    }
    change_json(folder / "config.json", config)
    params = TEXT | {"vocab_size": IMAGE_TOKEN_ID, "multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 5e5}
    params |= {"use_scaled_rope": True, "vision_chunk_size": size, "vision_max_num_chunks": 4}
    params |= {"max_batch_size": 1, "max_seq_len": 64}
    tower = SMALL | {"max_num_tiles": 4, "image_size": size, "patch_size": 14, "global_model": True}
    spec = {"params": params, "vision": None if vision is OWN else tower, "answers": ANSWERS[model]}
    (folder / "model.json").write_text(json.dumps(spec))
    (folder / "requests").mkdir()
    for case in CASES[model]:
        request: dict[str, Any] = {
            "token_ids": [*token_ids(case, IMAGE_TOKEN_ID), *ANSWER],
            "num_prompt": len(case.tokens),
        }
        for i, image in enumerate(pictures(folder, case)):
            canvas = supported_aspect_ratios(4)[image.aspect_ratio_id - 1]
            request |= {f"pixels_{i}": image.pixel_values[: image.num_tiles], f"canvas_{i}": canvas}
        np.savez(folder / "requests" / f"{case.name}.npz", **request)


def change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pictures(folder: Path, case: Case) -> list[ImageTiles]:
    """Noise, a little smaller than its canvas."""
    config = PreprocessorConfig.from_dict(json.loads((folder / "preprocessor_config.json").read_text()), "test")
    rng = np.random.default_rng(7)
    images = []
    for high, wide in case.canvases:
        shape = (high * config.image_size - 9, wide * config.image_size - 6, 3)
        images.append(preprocess(Image.fromarray(rng.integers(0, 255, shape, np.uint8)), config))
        assert images[-1].num_tiles == high * wide
    return images


def exported(folder: Path, semantics: MaskSemantics, vision_states: VisionStates = "published") -> Bundle:
    output = folder / "bundles" / f"{semantics}-{vision_states}"
    output.parent.mkdir(exist_ok=True)
    with FileLock(f"{output}.lock"):
        if output.exists():
            return Bundle.open(output)
        options = ExportOptions(mask_semantics=semantics, vision_states=vision_states)
        return bundle_from_checkpoint(folder / "original", output, options)


def run(bundle: Bundle, folder: Path, case: Case, *, standard: bool = False) -> dict[str, NDArray[np.float32]]:
    """Our answer, in the form of Meta's."""
    images = pictures(folder, case)
    ids = [*token_ids(case, IMAGE_TOKEN_ID), *ANSWER]
    visibility = image_visibility(ids, IMAGE_TOKEN_ID, [image.num_tiles for image in images])
    num_prompt = len(case.tokens)
    with OrtBackend(bundle, 1, standard=standard) as backend:
        features = [backend.encode(image) for image in images]
        slots = backend.slots(num_slots=1, cache_len=len(ids), num_tiles=visibility.shape[1])
        row = PromptRow(np.array(ids[:num_prompt]), visibility[:num_prompt], features)
        logits = [prefill(slots, 0, row, bundle.manifest.mask_semantics).copy()]
        for position in range(num_prompt, len(ids)):
            logits.append(slots.decode(np.array([ids[position]]), np.array([position]))[0].copy())
        answer = {"logits": np.stack(logits)}
        for i, layer in enumerate(CROSS_LAYERS if images else []):
            for kind in ("key", "value"):
                arrays = [feature.arrays()[f"cross_{kind}_{layer}"][0] for feature in features]
                answer[f"{kind}_{i}"] = np.concatenate(arrays, axis=1)
    return answer


def errors(found: Mapping[str, NDArray[np.float32]], folder: Path, answers: str, case: Case) -> dict[str, float]:
    """Largest difference to each of Meta's tensors, over its largest value."""
    with np.load(folder / "answers" / answers / f"{case.name}.npz") as answer:
        expected = {name: array for name, array in answer.items() if array.size}
    assert {name: array.shape for name, array in found.items()} == {n: array.shape for n, array in expected.items()}
    return {n: float(np.abs(found[n] - array).max() / np.abs(array).max()) for n, array in expected.items()}


@pytest.mark.parametrize("standard", [False, True], ids=["twin", "standard"])
@pytest.mark.parametrize(("model", "semantics", "case"), PARAMETERS)
def test_graphs_are_metas_model(
    model: str, semantics: MaskSemantics, case: Case, standard: bool, judged_of: JudgedOf
) -> None:
    folder = judged_of(model)
    found = errors(run(exported(folder, semantics), folder, case, standard=standard), folder, semantics, case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", [ONE_TILE, FOUR_TILES], ids=lambda case: case.name)
def test_states_of_other_blocks_would_be_seen(case: Case, judged_of: JudgedOf) -> None:
    """Behind a block is before the next: what `transformers-4.56` takes is Meta's state with indices one higher."""
    folder = judged_of("224")
    for vision_states, same in ("published", "hf"), ("transformers-4.56", "one block later"):
        found = run(exported(folder, "hf", vision_states), folder, case)  # type: ignore[arg-type]
        for answers in ("hf", "one block earlier", "one block later"):
            differences = errors(found, folder, answers, case)
            if answers == same:
                assert max(differences.values()) <= BAR, differences
            else:
                assert min(differences.values()) >= 1000 * BAR, (answers, differences)


@pytest.mark.parametrize(("ours", "metas"), [("hf", "meta"), ("meta", "hf")])
def test_other_mask_semantics_would_be_seen(ours: MaskSemantics, metas: MaskSemantics, judged_of: JudgedOf) -> None:
    folder = judged_of("224")
    found = errors(run(exported(folder, ours), folder, TEXT_BEFORE), folder, metas, TEXT_BEFORE)
    assert found["logits"] >= 1000 * BAR, found
