"""Our pictures and prompts against Meta's own code: which tiles, which pixels, which tokens, and who sees what.

Where the two differ, the difference is pinned beside its reason. Text between special tokens is compared as text: the
miniature's tokenizer is not Meta's.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from mllama_runtime.chat import ChatTemplate, messages_from
from mllama_runtime.images import load_image
from mllama_runtime.preprocessing import (
    ImageTiles,
    PreprocessorConfig,
    preprocess,
    size_on_canvas,
    supported_aspect_ratios,
    tiled_canvas,
)
from mllama_runtime.prompt import image_visibility, prompt_from_messages, prompt_from_text
from mllama_runtime.tokenizer import Tokenizer
from oracles import environments
from PIL import Image

META = Path(environments.__file__).parent / "meta"
BAR = 1e-6  # of values up to 2.7; what was seen is 0
TILE = 224

SIZES = [(224, 224), (1, 1), (7, 3), (100, 30), (30, 100), (223, 225), (225, 223), (448, 224), (449, 224), (300, 800)]
SIZES += [(800, 300), (640, 480), (480, 640), (897, 100), (100, 897), (1000, 250), (250, 1000), (900, 900), (672, 673)]
SIZES += [(1, 150), (150, 1), (1200, 6), (6, 1200), (331, 517), (517, 331), (896, 224), (224, 672)]
MODES = {"L": "png", "P": "png", "1": "png", "I;16": "png", "RGBA": "png", "LA": "png", "CMYK": "jpeg"}
ALIKE = [*(f"{width}x{height}.png" for width, height in SIZES), *(f"{mode}.{kind}" for mode, kind in MODES.items())]
TRANSPARENT = ["transparent.RGBA.png", "transparent.LA.png", "transparent.P.png"]
THIN = {"2000x1.png": (1, 896), "1x2000.png": (896, 1)}  # pixels high and wide

SYSTEM = ["Be brief."]
DIALOGS: list[list[tuple[str, list[str | None]]]] = [  # None stands for a picture
    [("user", [None, "What is this?"])],
    [("user", ["Look:", None, " and say what it is."]), ("assistant", ["A cat."]), ("user", ["Where does it sit?"])],
    [("user", [None, "This?"]), ("assistant", ["One."]), ("user", ["And this?", None])],
    [("user", [None, None, "Which of the two says <|eot_id|> or <|image|>?"])],
    [("user", ["Good morning."])],
    [("system", SYSTEM), ("user", ["Good morning."]), ("assistant", ["Yes."]), ("user", ["What?"])],
    [("system", SYSTEM), ("user", [None, "What is this?"])],
    [("user", [None, " What is this?\n"])],
]
CONTENTS: list[list[str | None]] = [
    [None, "If I had to write a haiku for this one"],
    ["The caption of", None, " is"],
    ["No picture"],
]

Runs = list[list[str | bool]]
"""[text, whether it is a special token], and the text between special tokens in one."""


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Colours that rise to the right and downwards, under noise; opaque."""
    rng = np.random.default_rng(width * 10_000 + height)
    x, y = np.linspace(0, 100, width)[None, :, None], np.linspace(0, 100, height)[:, None, None]
    image = Image.fromarray((x + y * [1.0, 0.0, 0.5] + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))
    return image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for width, height in [*SIZES, (2000, 1), (1, 2000)]:
        picture(width, height).save(folder / f"{width}x{height}.png")
    for mode, kind in MODES.items():
        picture(300, 200, mode).save(folder / f"{mode}.{kind}")
    for mode in ("RGBA", "LA"):
        image = picture(300, 200, mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / f"transparent.{mode}.png")
    palette = picture(300, 200, "P")
    palette.save(folder / "transparent.P.png", transparency=palette.getpixel((0, 0)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: a quarter turn
    picture(300, 200).save(folder / "turned.jpeg", exif=exif)


@pytest.fixture(scope="session")
def judged(shared: Path) -> Path:
    """The folder in which Meta's code has cut the pictures and written the prompts."""
    folder = shared / "processor-against-meta"
    with FileLock(f"{folder}.lock"):
        if not (folder / "prompts.json").exists():
            folder.mkdir()
            write_pictures(folder / "pictures")
            sizes = np.random.default_rng(0).integers(10, 1200, (300, 2)).tolist()
            dialogs = [[{"role": role, "content": content} for role, content in dialog] for dialog in DIALOGS]
            for name, value in {"sizes": sizes, "dialogs": dialogs, "contents": CONTENTS}.items():
                (folder / f"{name}.json").write_text(json.dumps(value))
            python = environments.environment("meta", META / "requirements.txt")
            environments.run(python, META / "oracle.py", "processor", folder)
    return folder


@pytest.fixture(scope="session")
def config(miniature: Path) -> PreprocessorConfig:
    """The published settings, for smaller tiles."""
    settings = json.loads((miniature / "preprocessor_config.json").read_text())
    return PreprocessorConfig.from_dict(settings | {"size": {"height": TILE, "width": TILE}}, "test")


def difference(tiles: ImageTiles, judged: Path, name: str) -> float:
    """Largest difference between pixel values; the canvases are the same."""
    with np.load(judged / "tiles" / f"{name}.npz") as expected:
        assert supported_aspect_ratios(4)[tiles.aspect_ratio_id - 1] == tuple(expected["canvas"])
        assert tiles.num_tiles == len(expected["tiles"])
        return float(np.abs(tiles.pixel_values[: tiles.num_tiles] - expected["tiles"]).max())


@pytest.mark.parametrize("name", ALIKE)
def test_pictures_are_cut_alike(name: str, judged: Path, config: PreprocessorConfig) -> None:
    assert difference(preprocess(load_image(judged / "pictures" / name), config), judged, name) <= BAR


def test_canvases_and_sizes_are_alike(judged: Path) -> None:
    ours = []
    for width, height in json.loads((judged / "sizes.json").read_text()):
        canvas = tiled_canvas(height, width, TILE, 4)
        ours.append([*canvas, *size_on_canvas(height, width, *canvas, TILE)])
    assert ours == np.load(judged / "canvases.npy").tolist()


@pytest.mark.parametrize("name", TRANSPARENT)
def test_meta_drops_transparency(name: str, judged: Path, config: PreprocessorConfig) -> None:
    """Meta's code shows the colors that lie under transparent pixels. Transformers lays the picture over white."""
    image = load_image(judged / "pictures" / name)
    opaque = Image.fromarray(np.asarray(image.convert("RGB")))
    assert difference(preprocess(opaque, config), judged, name) <= BAR
    assert difference(preprocess(image, config), judged, name) > 0.1


def test_meta_takes_pictures_as_they_are_stored(judged: Path, config: PreprocessorConfig) -> None:
    """EXIF orientation: not applied by Meta's code; by us to files, and not to a caller's Pillow image."""
    path = judged / "pictures" / "turned.jpeg"
    assert difference(preprocess(load_image(Image.open(path)), config), judged, path.name) <= BAR
    assert preprocess(load_image(path), config).aspect_ratio_id != preprocess(Image.open(path), config).aspect_ratio_id


@pytest.mark.parametrize("name", THIN)
def test_meta_refuses_what_gets_thinner_than_a_pixel(name: str, judged: Path, config: PreprocessorConfig) -> None:
    assert not (judged / "tiles" / f"{name}.npz").exists()
    image = load_image(judged / "pictures" / name)
    canvas = tiled_canvas(image.height, image.width, TILE, 4)
    assert size_on_canvas(image.height, image.width, *canvas, TILE) == THIN[name]
    assert np.isfinite(preprocess(image, config).pixel_values).all()


@pytest.fixture(scope="session")
def tokenizer(miniature: Path) -> Tokenizer:
    return Tokenizer.from_file(miniature / "tokenizer.json")


@pytest.fixture(scope="session")
def template(miniature: Path, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_file(miniature / "chat_template.jinja", special_tokens=tokenizer.special_tokens)


def runs(token_ids: tuple[int, ...], tokenizer: Tokenizer) -> Runs:
    special = {tokenizer.id_of(token) for token in tokenizer.special_tokens}
    found: Runs = []
    for is_special, group in groupby(token_ids, lambda token_id: token_id in special):
        ids = list(group)
        pieces = [[token_id] for token_id in ids] if is_special else [ids]
        found += [[tokenizer.decode(piece, skip_special=False), is_special] for piece in pieces]
    return found


def rendered(index: int, template: ChatTemplate, tokenizer: Tokenizer) -> Runs:
    messages = [
        {
            "role": role,
            "content": [{"type": "image"} if item is None else {"type": "text", "text": item} for item in content],
        }
        for role, content in DIALOGS[index]
    ]
    num_pictures = sum(content.count(None) for _, content in DIALOGS[index])
    prompt = prompt_from_messages(
        messages_from(messages), template=template, tokenizer=tokenizer, images=["picture"] * num_pictures
    )
    return runs(prompt.token_ids, tokenizer)


def theirs(judged: Path, index: int) -> dict[str, Any]:
    prompts: list[dict[str, Any]] = json.loads((judged / "prompts.json").read_text())
    return prompts[index]


@pytest.mark.parametrize("index", range(4))
def test_dialogs_are_written_alike(index: int, judged: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    assert rendered(index, template, tokenizer) == theirs(judged, index)["runs"]


@pytest.mark.parametrize("index", [4, 5, 6])
def test_the_template_writes_dates_that_meta_does_not(
    index: int, judged: Path, template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    """The published templates put two lines of dates before the system message, and have one where none is given."""
    ours, expected = rendered(index, template, tokenizer), theirs(judged, index)["runs"]
    assert ours[:4] == [["<|begin_of_text|>", True], ["<|start_header_id|>", True], ["system", False], ours[3]]
    text = str(ours[4][0])
    assert text.startswith("\n\nCutting Knowledge Date: December 2023\nToday Date: ")
    if DIALOGS[index][0][0] == "system":
        assert [*ours[:4], ["\n\n" + text.split("\n\n")[2], False], *ours[5:]] == expected
    else:
        assert [ours[0], *ours[6:]] == expected


def test_the_template_trims_and_meta_does_not(judged: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    ours, expected = rendered(7, template, tokenizer), theirs(judged, 7)["runs"]
    differing = [(mine[0], other[0]) for mine, other in zip(ours, expected, strict=True) if mine != other]
    assert differing == [(" What is this?", " What is this?\n")]  # within the message: only its ends are trimmed


def test_raw_prompts_begin_otherwise(judged: Path, tokenizer: Tokenizer) -> None:
    """Meta's code puts `<|begin_of_text|>` before a picture, transformers' processor and we behind it.

    Who writes it gets it where it is written.
    """
    begin, image = ["<|begin_of_text|>", True], ["<|image|>", True]
    text = "If I had to write a haiku for this one"
    assert theirs(judged, len(DIALOGS))["runs"] == [begin, image, [text, False]]
    for written, expected in {
        f"<|image|>{text}": [image, begin, [text, False]],
        f"<|begin_of_text|><|image|>{text}": [begin, image, [text, False]],
    }.items():
        assert runs(prompt_from_text(written, ["picture"], tokenizer=tokenizer).token_ids, tokenizer) == expected
    for index, written in (1, "The caption of<|image|> is"), (2, "No picture"):
        ours = prompt_from_text(written, ["picture"] * (index == 1), tokenizer=tokenizer)
        assert runs(ours.token_ids, tokenizer) == theirs(judged, len(DIALOGS) + index)["runs"]


@pytest.mark.parametrize("index", range(len(DIALOGS) + len(CONTENTS)))
def test_who_sees_which_picture(index: int, judged: Path) -> None:
    """In the prompt both agree. Of several pictures the generated tokens see none in Meta's `generate`.

    There the last one's mask ends with the prompt, and where it stands alone it does not; in transformers, and here,
    what is generated sees what the prompt's last token sees.
    """
    prompt = theirs(judged, index)
    sees = np.array(prompt["sees"], np.bool_).reshape(len(prompt["tokens"]) + 3, -1)
    ours = image_visibility([*prompt["tokens"], 0, 0, 0], 128256, [1] * sees.shape[1])
    assert np.array_equal(ours[:-3], sees[:-3])
    assert ours[-3:].any() == (sees.shape[1] > 0)
    assert sees[-3:].any() == (sees.shape[1] == 1)
