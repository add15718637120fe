"""Training batches: pictures as pixel tiles, conversations as token ids, several conversations packed in one row.

Feeds `train.py`. A row holds one picture and as many independent conversations about it as fit. Each attends only to
itself and counts its positions from zero, so that the model sees exactly what single requests look like; the tokens up
to the picture, which most conversations begin with, stand in the row once.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from conversations import MONTHS, Message
from pictures import CANVASES, COLORS, SHAPES, TILE, Scene, render, scene_from_seed
from PIL import Image
from tokenizer import IMAGE_TOKEN, TOKEN_IDS
from tokenizers import Tokenizer

PATCHES_PER_SIDE = 4
MAX_TILES = 4
IGNORED = -100
NUM_LABELS = (len(COLORS), len(SHAPES), 8, 8)  # per patch: color and shape of its thing, row and column of its cell
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Drawn once, used many times. `tiles` is uint8 [pictures, 4, 3, 56, 56], `labels` int8 [pictures, 4, 16, 4]."""

    seeds: np.ndarray
    tiles: np.ndarray
    canvases: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation: ids, where answers are, and for each token which picture it sees (-1 for none).

    The first `num_common` tokens are those of every conversation that begins with the picture.
    """

    ids: list[int]
    learned: list[bool]
    picture: list[int]
    num_common: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors [rows, tokens] and the boolean attention mask [rows, 1, tokens, tokens]."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    picture: torch.Tensor


def _fitted_size(scene: Scene) -> tuple[int, int]:
    """Width and height after the image processor's resize: shrunk to the canvas, enlarged only to fill one tile."""
    canvas_height, canvas_width = TILE * scene.canvas[0], TILE * scene.canvas[1]
    target_width = min(max(scene.width, TILE), canvas_width)
    target_height = min(max(scene.height, TILE), canvas_height)
    scale_x, scale_y = target_width / scene.width, target_height / scene.height
    if scale_x < scale_y:
        return target_width, min(int(scene.height * scale_x) or 1, target_height)
    return min(int(scene.width * scale_y) or 1, target_width), target_height


def picture_tiles(scene: Scene) -> np.ndarray:
    """uint8 [4, 3, 56, 56]: what MllamaImageProcessor makes of the picture before it rescales and normalizes."""
    rows, columns = scene.canvas
    size = _fitted_size(scene)
    image = render(scene)
    canvas = Image.new("RGB", (TILE * columns, TILE * rows))
    canvas.paste(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR), (0, 0))
    pixels = np.asarray(canvas).reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    tiles = np.zeros((MAX_TILES, 3, TILE, TILE), dtype=np.uint8)
    tiles[: rows * columns] = pixels.reshape(rows * columns, 3, TILE, TILE)
    return tiles


def patch_labels(scene: Scene) -> np.ndarray:
    """int8 [4, 16, 4]: color, shape, row and column of the thing around each patch's middle, or IGNORED."""
    rows, columns = scene.canvas
    labels = np.full((MAX_TILES, PATCHES_PER_SIDE**2, len(NUM_LABELS)), IGNORED, dtype=np.int8)
    width, height = _fitted_size(scene)
    cell_width, cell_height = width / scene.num_columns, height / scene.num_rows
    patch = TILE // PATCHES_PER_SIDE
    things = {(thing.row, thing.column): thing for thing in scene.things}
    for y in range(rows * PATCHES_PER_SIDE):
        for x in range(columns * PATCHES_PER_SIDE):
            thing = things.get((int((y + 0.5) * patch / cell_height), int((x + 0.5) * patch / cell_width)))
            if thing is None:
                continue
            tile = (y // PATCHES_PER_SIDE) * columns + x // PATCHES_PER_SIDE
            index = (y % PATCHES_PER_SIDE) * PATCHES_PER_SIDE + x % PATCHES_PER_SIDE
            color, shape = list(COLORS).index(thing.color), SHAPES.index(thing.shape)
            labels[tile, index] = (color, shape, thing.row, thing.column)
    return labels


def draw_pictures(seeds: range) -> Pictures:
    count = len(seeds)
    tiles = np.zeros((count, MAX_TILES, 3, TILE, TILE), dtype=np.uint8)
    labels = np.zeros((count, MAX_TILES, PATCHES_PER_SIDE**2, len(NUM_LABELS)), dtype=np.int8)
    canvases = np.zeros(count, dtype=np.int64)
    for index, seed in enumerate(seeds):
        scene = scene_from_seed(seed)
        tiles[index], labels[index] = picture_tiles(scene), patch_labels(scene)
        canvases[index] = CANVASES.index(scene.canvas)
    return Pictures(np.array(seeds), tiles, canvases, labels)


def vision_inputs(tiles: np.ndarray, canvases: np.ndarray) -> dict[str, torch.Tensor]:
    """The image processor's tensors for pictures [...]: values of padding tiles are zero after normalization."""
    counts = torch.tensor([rows * columns for rows, columns in CANVASES])[torch.from_numpy(canvases)]
    mask = (torch.arange(MAX_TILES) < counts[..., None]).long()
    values = (torch.from_numpy(tiles).float() / 255 - MEAN) / STD
    return {
        "pixel_values": values * mask[..., None, None, None],
        "aspect_ratio_ids": torch.from_numpy(canvases) + 1,
        "aspect_ratio_mask": mask,
    }


class Encoder:
    """Conversations to token ids, piece by piece (`matches_template` in `train.py` holds it against the template)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )

    def __call__(self, messages: list[Message], date: str) -> Encoded:
        ids, learned, picture = [TOKEN_IDS["<|begin_of_text|>"]], [False], [-1]
        seen, num_common = -1, 0
        for message in _with_default_system(messages, date):
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            pieces = [f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"]
            pieces += [IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in parts]
            for index, piece in enumerate([*pieces, "<|eot_id|>"]):
                seen += piece == IMAGE_TOKEN
                fresh = self._pieces(piece)
                ids += fresh
                learned += [message["role"] == "assistant" and index > 0] * len(fresh)
                picture += [seen] * len(fresh)
                if message is messages[0] and index == 1 and piece == IMAGE_TOKEN:
                    num_common = len(ids)
        return Encoded(ids, learned, picture, num_common)


def _with_default_system(messages: list[Message], date: str) -> list[Message]:
    with_picture = any(isinstance(message["content"], list) for message in messages)
    own = messages[0]["role"] == "system"
    if with_picture and not own:
        return messages
    text = f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    if own:
        text += messages[0]["content"]
    return [{"role": "system", "content": text}, *messages[own:]]


def random_date(rng: random.Random) -> str:
    month = rng.choice(MONTHS)
    return f"{rng.randint(1, 28):02d} {month} {rng.randint(2024, 2028)}"


def fill_row(make: Callable[[], Encoded], length: int) -> list[Encoded]:
    """Conversations until one does not fit any more. Those with the common beginning come first."""
    row: list[Encoded] = []
    used = 0
    while True:
        conversation = make()
        used += len(conversation.ids)
        if row:
            used -= min(conversation.num_common, max(other.num_common for other in row))
        if used > length:
            return sorted(row, key=lambda conversation: -conversation.num_common)
        row.append(conversation)


def pack(rows: list[list[Encoded]], length: int) -> Batch:
    """Rows of conversations as tensors; the rest of a row is one more block, of padding that nobody learns.

    Block 0 is the common beginning: every conversation that has it may look there, and in its own block.
    """
    shape = (len(rows), length)
    ids = np.full(shape, TOKEN_IDS["<|finetune_right_pad_id|>"], dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    blocks = np.full(shape, -1, dtype=np.int64)
    picture = np.full(shape, -1, dtype=np.int64)
    in_common = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        end = 0
        for block, conversation in enumerate(row, start=1):
            skipped = conversation.num_common if block > 1 else 0
            start, end = end, end + len(conversation.ids) - skipped
            ids[index, start:end] = conversation.ids[skipped:]
            positions[index, start:end] = range(skipped, len(conversation.ids))
            blocks[index, start:end] = block
            in_common[index, start:end] = conversation.num_common > 0
            picture[index, start:end] = conversation.picture[skipped:]
            answers = [*conversation.learned[1:], False]
            following = [*conversation.ids[1:], IGNORED]
            targets[index, start:end] = np.where(answers, following, IGNORED)[skipped:]
        if row:
            blocks[index, : row[0].num_common] = 0
    block_ids, looks_back = torch.from_numpy(blocks), torch.from_numpy(in_common)
    same = block_ids[:, :, None] == block_ids[:, None, :]
    same |= looks_back[:, :, None] & (block_ids[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        (same & causal)[:, None],
        torch.from_numpy(picture),
    )
