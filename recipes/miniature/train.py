"""Trains the miniature from nothing on two CPU cores: `python recipes/miniature/train.py --out DIR --steps N`.

Draws its pictures up front (`batches.py`), trains transformers' own MllamaForConditionalGeneration on answers only
(`objective.py`), and writes checkpoints in the published form (`model.py`). Each worker is a process of one thread
with its share of the batch; they meet once a step to average their gradients.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from batches import Encoder, Pictures, draw_pictures
from model import HERE, build_model, save_checkpoint
from objective import Objective, Source, gradients_of_step, matches_template
from pictures import SPLITS
from tokenizer import build_tokenizer, write_json
from torch import distributed, nn


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
    workers: int
    compile: bool
    max_minutes: float


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings, norms, gates and heads; one schedule for both."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], learning_rate: float) -> None:
        self.parameters = [value for _, value in named]
        matrices = [value for name, value in named if self._is_matrix(name, value)]
        others = [value for name, value in named if not self._is_matrix(name, value)]
        self._learning_rate = learning_rate
        self._members: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    @staticmethod
    def _is_matrix(name: str, value: nn.Parameter) -> bool:
        return value.ndim == 2 and "embed" not in name and "head" not in name

    def step(self, step: int, progress: float) -> None:
        """Warm-up, a plateau, then a straight line to zero over the last half of the run."""
        rate = self._learning_rate * min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 2.0 * (1.0 - progress)))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for member in self._members:
            for group in member.param_groups:
                group["lr"] = rate
            member.step()
            member.zero_grad(set_to_none=True)


def averaged(parameters: list[nn.Parameter], progress: float, workers: int) -> float:
    """Averages gradients over the workers, and with them the progress, so that all stop at the same step."""
    if workers == 1:
        return progress
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.tensor([progress])])
    distributed.all_reduce(flat)
    flat /= workers
    pieces = flat[:-1].split([value.numel() for value in parameters])
    for value, piece in zip(parameters, pieces, strict=True):
        value.grad = piece.view_as(value)
    return float(flat[-1])


def run_steps(settings: Settings, source: Source, objective: Objective, save: Callable[[], None] | None) -> int:
    """Trains until the steps or the minutes are used up; returns the number of steps. Saves where told how to."""
    start = time.monotonic()
    named = objective.parameters()
    optimizers = Optimizers(named, settings.learning_rate)
    step, progress = 0, 0.0
    sums: dict[str, list[float]] = {}
    while progress < 1.0:
        for name, value in gradients_of_step(step, progress, source, objective).items():
            sums.setdefault(name, []).append(value)
        minutes = (time.monotonic() - start) / 60
        spent = max((step + 1) / settings.steps, minutes / settings.max_minutes)
        progress = averaged(optimizers.parameters, spent, settings.workers)
        optimizers.step(step, progress)
        step += 1
        if save is None:
            continue
        if step % 25 == 0:
            means = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
            print(json.dumps({"step": step, "minutes": round(minutes, 2), **means}), flush=True)
            sums.clear()
        if step % settings.save_every == 0 or progress >= 1.0:
            save()
    return step


def work(rank: int, settings: Settings, pictures: Pictures, rendezvous: str) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    if settings.workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=settings.workers
        )
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    model = build_model(settings.seed)
    objective = Objective(model, pictures)
    if settings.compile:
        text, vision = model.model.language_model, model.model.vision_model
        for layer in (*text.layers, *vision.transformer.layers, *vision.global_transformer.layers):
            layer.compile(dynamic=False)
    source = Source(
        pictures,
        encoder,
        batch=settings.batch // settings.workers,
        row_tokens=settings.row_tokens,
        seed=settings.seed + rank,
    )
    if rank > 0:
        run_steps(settings, source, objective, None)
        return
    save_checkpoint(model.state_dict(), settings.out, tokenizer)
    if not matches_template(encoder, settings.out):
        raise ValueError("the fast encoder and the chat template disagree")
    steps = run_steps(settings, source, objective, lambda: save_checkpoint(model.state_dict(), settings.out, tokenizer))
    write_json(settings.out.parent / "training.json", training_facts(settings, steps, time.monotonic() - start))


def training_facts(settings: Settings, steps: int, seconds: float) -> dict[str, object]:
    """What RESULTS.json says about how the checkpoint came to be; `evaluate.py` copies it there."""
    limit = f" --max-minutes {settings.max_minutes:g}" if settings.max_minutes < 1e9 else ""
    return {
        "command": f"python recipes/miniature/train.py --steps {settings.steps}" + limit,
        "steps": steps,
        "pictures_per_step": settings.batch,
        "distinct_pictures": settings.pictures,
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, bfloat16 autocast",
    }


def train(settings: Settings) -> None:
    torch.set_num_threads(1)  # before the fork: a forked process must not inherit a thread pool
    pictures = draw_pictures(SPLITS["train"][: settings.pictures])
    print(json.dumps({"pictures": len(pictures)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"{folder}/rendezvous"
        if settings.workers == 1:
            work(0, settings, pictures, rendezvous)
            return
        context = multiprocessing.get_context("fork")  # the pictures are shared, not copied
        workers = [
            context.Process(target=work, args=(rank, settings, pictures, rendezvous))
            for rank in range(settings.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode != 0 for worker in workers):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=100_000, help="training pictures drawn up front (37 kB each)")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step, over all workers")
    parser.add_argument("--row-tokens", type=int, default=256, help="tokens of conversations about one picture")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--max-minutes", type=float, default=1e9, help="the schedule ends here even with steps left")
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
