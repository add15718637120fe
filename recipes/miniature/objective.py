"""What the miniature is trained on in one step: batches of three sorts, and the losses over them.

Between `batches.py` (tensors) and `train.py` (the loop). An auxiliary head names color, shape, row and column of the
thing under each patch; it grounds the vision tower early and is thrown away.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from batches import IGNORED, NUM_LABELS, Batch, Encoded, Encoder, Pictures, fill_row, pack, random_date, vision_inputs
from conversations import Message, picture_conversation, text_conversation, text_pairs, two_picture_conversation
from model import vision_config
from pictures import SPLITS, scene_from_seed
from torch import nn
from torch.nn import functional
from transformers import AutoProcessor, MllamaForConditionalGeneration


class Source:
    """Draws batches of the three sorts: one picture, two pictures, text only."""

    def __init__(self, pictures: Pictures, encoder: Encoder, *, batch: int, row_tokens: int, seed: int) -> None:
        self.pictures = pictures
        self.encode = encoder
        self.batch = batch
        self.row_tokens = row_tokens
        self.rng = random.Random(seed)
        self.pairs = text_pairs()

    def _encoded(self, messages: list[Message]) -> Encoded:
        return self.encode(messages, random_date(self.rng))

    def rows(self, makers: list[Callable[[], Encoded]]) -> Batch:
        return pack([fill_row(maker, self.row_tokens) for maker in makers], self.row_tokens)

    def one_picture(self) -> tuple[Batch, np.ndarray]:
        chosen = np.array([[self.rng.randrange(len(self.pictures))] for _ in range(self.batch)])
        scenes = [scene_from_seed(int(seed)) for seed in self.pictures.seeds[chosen[:, 0]]]
        rows = [lambda scene=scene: self._encoded(picture_conversation(scene, self.rng)) for scene in scenes]
        return self.rows(rows), chosen

    def two_pictures(self) -> tuple[Batch, np.ndarray]:
        count = self.batch // 4
        chosen = np.array([self.rng.sample(range(len(self.pictures)), 2) for _ in range(count)])
        seeds = self.pictures.seeds[chosen]
        pairs = [(scene_from_seed(int(first)), scene_from_seed(int(second))) for first, second in seeds]
        rows = [lambda pair=pair: self._encoded(two_picture_conversation(pair, self.rng)) for pair in pairs]
        return self.rows(rows), chosen

    def text(self) -> Batch:
        maker = lambda: self._encoded(text_conversation(self.rng, self.pairs))  # noqa: E731
        return self.rows([maker] * (self.batch // 4))


class Objective:
    """The losses: answer tokens, and patch labels through a head that is not saved."""

    def __init__(self, model: MllamaForConditionalGeneration, pictures: Pictures) -> None:
        self.model = model
        self.pictures = pictures
        self.head = nn.Linear(vision_config()["vision_output_dim"], sum(NUM_LABELS))

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.model.named_parameters(), *self.head.named_parameters(prefix="head")]

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
        tiles = vision_inputs(self.pictures.tiles[chosen][..., :1, :1], self.pictures.canvases[chosen])
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


def gradients_of_step(step: int, progress: float, source: Source, objective: Objective) -> dict[str, float]:
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


def matches_template(encoder: Encoder, folder: Path, count: int = 200) -> bool:
    """Whether the fast encoder writes what the processor's chat template and tokenizer write."""
    processor = AutoProcessor.from_pretrained(folder)
    rng = random.Random(1)
    pairs = text_pairs()
    scenes = [scene_from_seed(seed) for seed in SPLITS["train"][: count + 1]]
    for index in range(count):
        date = random_date(rng)
        messages = (
            picture_conversation(scenes[index], rng),
            text_conversation(rng, pairs),
            two_picture_conversation((scenes[index], scenes[index + 1]), rng),
        )[index % 3]
        text = processor.apply_chat_template(messages, date_string=date)
        if processor.tokenizer(text, add_special_tokens=False)["input_ids"] != encoder(messages, date).ids:
            return False
    return True
