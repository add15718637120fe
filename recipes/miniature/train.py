"""Trains the miniature from nothing on two CPU cores: `python recipes/miniature/train.py --out DIR --steps N`.

Draws its pictures up front (`batches.py`), trains transformers' own MllamaForConditionalGeneration on answers only, and
writes checkpoints in the published form (`model.py`). An auxiliary head names color, shape, row and column of the
thing under each patch, which grounds the vision tower early; it is thrown away.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from batches import (
    IGNORED,
    NUM_LABELS,
    Batch,
    Encoded,
    Encoder,
    Pictures,
    draw_pictures,
    fill_row,
    pack,
    random_date,
    vision_inputs,
)
from conversations import Message, picture_conversation, text_conversation, text_pairs, two_picture_conversation
from model import HERE, build_model, save_checkpoint, vision_config
from pictures import SPLITS, scene_from_seed
from tokenizer import build_tokenizer, write_json
from torch import nn
from torch.nn import functional
from transformers import MllamaForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Settings:
    out: Path
    steps: int
    pictures: int
    batch: int
    row_tokens: int
    learning_rate: float
    seed: int
    save_every: int
    threads: int
    max_minutes: float


class Source:
    """Draws batches of the three sorts: one picture, two pictures, text only."""

    def __init__(self, pictures: Pictures, settings: Settings, encoder: Encoder) -> None:
        self.pictures = pictures
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self.encode = encoder
        self.pairs = text_pairs()

    def _encoded(self, messages: list[Message]) -> Encoded:
        return self.encode(messages, random_date(self.rng))

    def _rows(self, makers: list[Callable[[], Encoded]]) -> Batch:
        length = self.settings.row_tokens
        return pack([fill_row(maker, length) for maker in makers], length)

    def one_picture(self) -> tuple[Batch, np.ndarray]:
        chosen = np.array([[self.rng.randrange(len(self.pictures))] for _ in range(self.settings.batch)])
        scenes = [scene_from_seed(int(seed)) for seed in self.pictures.seeds[chosen[:, 0]]]
        rows = [lambda scene=scene: self._encoded(picture_conversation(scene, self.rng)) for scene in scenes]
        return self._rows(rows), chosen

    def two_pictures(self) -> tuple[Batch, np.ndarray]:
        count = self.settings.batch // 4
        chosen = np.array([self.rng.sample(range(len(self.pictures)), 2) for _ in range(count)])
        seeds = self.pictures.seeds[chosen]
        pairs = [(scene_from_seed(int(first)), scene_from_seed(int(second))) for first, second in seeds]
        rows = [lambda pair=pair: self._encoded(two_picture_conversation(pair, self.rng)) for pair in pairs]
        return self._rows(rows), chosen

    def text(self) -> Batch:
        maker = lambda: self._encoded(text_conversation(self.rng, self.pairs))  # noqa: E731
        return self._rows([maker] * (self.settings.batch // 4))


class Objective:
    """The losses: answer tokens, and patch labels through a head that is not saved."""

    def __init__(self, model: MllamaForConditionalGeneration, pictures: Pictures) -> None:
        self.model = model
        self.pictures = pictures
        self.head = nn.Linear(vision_config()["vision_output_dim"], sum(NUM_LABELS))

    def _features(self, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(vision output, cross-attention states) of pictures [rows, pictures per row]."""
        inputs = vision_inputs(self.pictures.tiles[chosen], self.pictures.canvases[chosen])
        features = self.model.model.vision_model(**inputs).last_hidden_state
        states = self.model.model.multi_modal_projector(features)
        return features, states.reshape(-1, *states.shape[-2:])

    def _answers(self, batch: Batch, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        wanted = batch.targets != IGNORED
        return functional.cross_entropy(self.model.lm_head(hidden[wanted]).float(), batch.targets[wanted])

    def text(self, batch: Batch) -> torch.Tensor:
        return self._answers(batch)

    def with_pictures(self, batch: Batch, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of the answers, loss of the patch labels)."""
        features, states = self._features(chosen)
        seen = batch.picture[..., None] == torch.arange(chosen.shape[1])  # [rows, tokens, pictures]
        tiles = vision_inputs(self.pictures.tiles[chosen][:, :, :, :, :1, :1], self.pictures.canvases[chosen])
        mask = seen[..., None] & tiles["aspect_ratio_mask"].bool()[:, None]  # [rows, tokens, pictures, tiles]
        answers = self._answers(batch, cross_attention_states=states, cross_attention_mask=mask.long())
        return answers, self._labels(features[..., 1:, :], self.pictures.labels[chosen])

    def _labels(self, patches: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
        wanted = torch.from_numpy(labels).long()
        present = wanted[..., 0] != IGNORED
        parts = self.head(patches[present]).float().split(NUM_LABELS, dim=-1)
        truth = wanted[present]
        losses = [functional.cross_entropy(part, truth[:, index]) for index, part in enumerate(parts)]
        return torch.stack(losses).mean()


def matches_template(encoder: Encoder, source: Source, folder: Path, count: int = 200) -> bool:
    """Whether the fast encoder writes what the processor's chat template and tokenizer write."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    rng = random.Random(1)
    scenes = [scene_from_seed(seed) for seed in SPLITS["train"][: count + 1]]
    for index in range(count):
        date = random_date(rng)
        messages = (
            picture_conversation(scenes[index], rng),
            text_conversation(rng, source.pairs),
            two_picture_conversation((scenes[index], scenes[index + 1]), rng),
        )[index % 3]
        text = processor.apply_chat_template(messages, date_string=date)
        if processor.tokenizer(text, add_special_tokens=False)["input_ids"] != encoder(messages, date).ids:
            return False
    return True


def learning_rate(step: int, settings: Settings, progress: float) -> float:
    """Warm-up, a plateau, then a straight line to zero over the last half of the run."""
    warm = min(1.0, (step + 1) / 100)
    return settings.learning_rate * warm * min(1.0, max(0.0, 2.0 * (1.0 - progress)))


def weights_for_optimizer(objective: Objective) -> list[dict[str, object]]:
    named = [*objective.model.named_parameters(), *objective.head.named_parameters()]
    matrices = [value for name, value in named if value.ndim > 1 and "embed" not in name]
    others = [value for name, value in named if not (value.ndim > 1 and "embed" not in name)]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def train(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(settings.seed)
    save_checkpoint(model.state_dict(), settings.out, tokenizer)
    pictures = draw_pictures(SPLITS["train"][: settings.pictures])
    print(json.dumps({"pictures": len(pictures), "seconds": round(time.monotonic() - start)}), flush=True)
    encoder = Encoder(tokenizer)
    source = Source(pictures, settings, encoder)
    if not matches_template(encoder, source, settings.out):
        raise ValueError("the fast encoder and the chat template disagree")
    objective = Objective(model, pictures)
    optimizer = torch.optim.AdamW(weights_for_optimizer(objective), lr=0.0, betas=(0.9, 0.98))
    steps = run_steps(
        settings, source, objective, optimizer, lambda: save_checkpoint(model.state_dict(), settings.out, tokenizer)
    )
    write_json(settings.out.parent / "training.json", training_facts(settings, steps, time.monotonic() - start))


def training_facts(settings: Settings, steps: int, seconds: float) -> dict[str, object]:
    """What RESULTS.json says about how the checkpoint came to be; `evaluate.py` copies it there."""
    return {
        "command": f"python recipes/miniature/train.py --steps {steps}",
        "steps": steps,
        "pictures_per_step": settings.batch,
        "distinct_pictures": settings.pictures,
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, bfloat16 autocast",
    }


def run_steps(
    settings: Settings,
    source: Source,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    save: Callable[[], None],
) -> int:
    """Trains until the steps or the minutes are used up; returns the number of steps."""
    start = time.monotonic()
    step, progress = 0, 0.0
    sums: dict[str, list[float]] = {}
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, progress)
        for name, value in one_step(step, progress, source, objective).items():
            sums.setdefault(name, []).append(value)
        nn.utils.clip_grad_norm_([value for group in optimizer.param_groups for value in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        minutes = (time.monotonic() - start) / 60
        progress = max(step / settings.steps, minutes / settings.max_minutes)
        if step % 25 == 0:
            means = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
            print(json.dumps({"step": step, "minutes": round(minutes, 2), **means}), flush=True)
            sums.clear()
        if step % settings.save_every == 0 or progress >= 1.0:
            save()
    return step


def one_step(step: int, progress: float, source: Source, objective: Objective) -> dict[str, float]:
    """Gradients of a batch about one picture and, in turn, of a small one about two pictures or of plain text."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers, labels = objective.with_pictures(*source.one_picture())
        loss = answers + 0.3 * (1.0 - progress) * labels
        losses = {"answers": answers.item(), "labels": labels.item()}
        if step % 4 == 1:
            text = objective.text(source.text())
            loss = loss + 0.3 * text
            losses["text"] = text.item()
        elif step % 4 == 3:
            two, _ = objective.with_pictures(*source.two_pictures())
            loss = loss + 0.3 * two
            losses["two_pictures"] = two.item()
    loss.backward()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--pictures", type=int, default=100_000, help="training pictures drawn up front (37 kB each)")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step")
    parser.add_argument("--row-tokens", type=int, default=256, help="tokens of conversations about one picture")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-minutes", type=float, default=1e9, help="the schedule ends here even with steps left")
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
