"""transformers on the same random checkpoint, in BF16, one request at a time, with its static cache.

On a GPU `generate` compiles the steps over such a cache; the row says whether it did. Where that fails, the reason
stands in the row, and the dynamic cache is measured all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from gpu.full import MODELS, PROMPT_LEN, TILES, checkpoint
from gpu.runner import Context, Row, SkipError, Step
from mllama_runtime.bench import sample_tiles
from mllama_runtime.config import ModelConfig

_MODEL = MODELS[0]
_NEW_TOKENS, _REPEATS = 65, 3
_MODES = {"static cache": {"cache_implementation": "static"}, "dynamic cache": {}}


def steps() -> list[Step]:
    """A step for each number of tiles: compiling takes minutes."""
    return [Step(f"transformers-{tiles}-tiles", "transformers", partial(_beside, tiles)) for tiles in TILES]


def _beside(num_tiles: int, context: Context) -> list[Row]:
    try:
        import torch
        from transformers import MllamaForConditionalGeneration
    except ImportError as error:
        raise SkipError(str(error)) from error
    if not torch.cuda.is_available():
        raise SkipError("torch sees no GPU")
    folder = checkpoint(_MODEL, context)
    loaded = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    model = loaded.to("cuda").eval()
    inputs = _inputs(torch, _MODEL.config, num_tiles)
    rows = []
    for mode, options in _MODES.items():
        torch._dynamo.utils.counters.clear()

        def generate(count: int, options: dict[str, str] = options) -> None:
            with torch.inference_mode():
                model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False, **options)
            torch.cuda.synchronize()

        row: Row = {"mode": mode, "precision": "bf16", "num_tiles": num_tiles, "num_tokens": PROMPT_LEN, "reason": None}
        try:
            first, all_of_them = (_seconds(partial(generate, count)) for count in (1, _NEW_TOKENS))
            compiled = bool(torch._dynamo.utils.counters["frames"]["ok"])
            row |= {"mode": f"{mode}, {'compiled' if compiled else 'not compiled'}"}
            row |= {"first_token_seconds": first, "decode_seconds": (all_of_them - first) / (_NEW_TOKENS - 1)}
        except Exception as error:  # what a compiler or a cache cannot take shows in many ways
            row["reason"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def _inputs(torch: Any, config: ModelConfig, num_tiles: int) -> dict[str, Any]:
    """A prompt of which a picture is the first token; text alone without one."""
    token_ids = torch.arange(PROMPT_LEN)[None] % 1000
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    if num_tiles:
        token_ids[0, 0] = config.image_token_id
        tiles = sample_tiles(config, num_tiles)
        seen = (torch.arange(config.vision.max_num_tiles) < num_tiles).long()
        inputs |= {
            "pixel_values": torch.from_numpy(tiles.pixel_values)[None, None].bfloat16(),
            "aspect_ratio_ids": torch.tensor([[tiles.aspect_ratio_id]]),
            "aspect_ratio_mask": torch.from_numpy(tiles.aspect_ratio_mask)[None, None],
            "cross_attention_mask": seen.expand(1, PROMPT_LEN, 1, -1).contiguous(),
        }
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


def _seconds(work: Callable[[], None]) -> float:
    times = []
    for index in range(_REPEATS + 2):  # the first two compile and warm up
        start = time.perf_counter()
        work()
        if index >= 2:
            times.append(time.perf_counter() - start)
    return median(times)
