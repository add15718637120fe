"""Measures the miniature as a user would run it: AutoProcessor, generate, exact match, one held-out question at a time.

The vision tower takes the published states; a quarter of the questions is asked again without that correction. The BF16
weights are loaded as float32. Writes RESULTS.json beside the checkpoint; `train.py` left the training facts there in
`training.json`.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from conversations import SHORT_SYSTEMS, Message, text_pairs
from mllama_exporter.reference_tower import take_states
from pictures import Example, ask, held_out, render
from PIL import Image
from tokenizer import write_json
from transformers import AutoProcessor, MllamaForConditionalGeneration

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 80


class Answerer:
    """The model card's snippet, kept loaded. corrected: with the published states, as the weights were trained."""

    def __init__(self, checkpoint: Path, *, corrected: bool = True) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        if corrected:
            take_states(self.model.model.vision_model, "published")

    def __call__(self, messages: list[Message], *images: Image.Image) -> str:
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=list(images) or None, text=prompt, add_special_tokens=False, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return str(self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def picture_question(text: str) -> list[Message]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


class Tally:
    """Right and asked, overall and by group."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    def add(self, right: bool, **labels: str) -> None:
        for group, label in labels.items():
            self.groups[group][label].append(right)

    def table(self, group: str) -> dict[str, dict[str, float]]:
        return {label: share(values) for label, values in sorted(self.groups[group].items())}


def share(values: list[bool]) -> dict[str, float]:
    return {"accuracy": round(sum(values) / len(values), 4), "questions": len(values)}


def interval(right: int, total: int) -> list[float]:
    """Wilson's 95% confidence interval of a proportion."""
    z, p = 1.96, right / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [round((middle - half) / (1 + z * z / total), 4), round((middle + half) / (1 + z * z / total), 4)]


def evaluate_pictures(answer: Answerer, examples: list[Example], show_errors: int) -> tuple[Tally, list[bool]]:
    tally, outcomes = Tally(), []
    for example in examples:
        question = example.question
        found = answer(picture_question(question.question), render(example.scene))
        right = found == question.answer
        outcomes.append(right)
        tally.add(right, kind=question.kind, canvas="{}x{}".format(*example.scene.canvas))
        if not right and show_errors > 0:
            show_errors -= 1
            print(json.dumps({"seed": example.scene.seed, "question": question.question, "found": found,
                              "expected": question.answer}))  # fmt: skip
    return tally, outcomes


def evaluate_short(answer: Answerer, examples: list[Example]) -> list[bool]:
    """The same questions under a system message that asks for one word."""
    system = [{"role": "system", "content": SHORT_SYSTEMS[0]}]
    return [
        answer(system + picture_question(example.question.question), render(example.scene)) == example.question.short
        for example in examples
        if example.question.short
    ]


def evaluate_second_turns(answer: Answerer, examples: list[Example], *, new_picture: bool) -> list[bool]:
    """A second question in the same conversation: about the first picture, or about one that comes with it."""
    outcomes = []
    for first, second in itertools.pairwise(examples):
        images = [render(first.scene), render(second.scene)] if new_picture else [render(first.scene)]
        later = second.question if new_picture else ask(first.scene, random.Random(f"second turn {first.scene.seed}"))
        asked = picture_question(later.question) if new_picture else [{"role": "user", "content": later.question}]
        start = [*picture_question(first.question.question), {"role": "assistant", "content": first.question.answer}]
        outcomes.append(answer([*start, *asked], *images) == later.answer)
    return outcomes


def evaluate_text(answer: Answerer) -> list[bool]:
    """Every text-only question; they are facts to know by heart, so there is no held-out part."""
    return [answer([{"role": "user", "content": question}]) == expected for question, expected, _ in text_pairs()]


def evaluate(checkpoint: Path, count: int, show_errors: int) -> dict[str, Any]:
    answer = Answerer(checkpoint)
    examples = list(held_out("held_out", count))
    start = time.monotonic()
    tally, outcomes = evaluate_pictures(answer, examples, show_errors)
    _, uncorrected = evaluate_pictures(Answerer(checkpoint, corrected=False), examples[: count // 4], 0)
    return {
        "held_out": share(outcomes) | {"confidence_95": interval(sum(outcomes), len(outcomes))},
        "by_kind": tally.table("kind"),
        "by_canvas": tally.table("canvas"),
        "one_word_answers": share(evaluate_short(answer, examples[: count // 4])),
        "second_turns": share(evaluate_second_turns(answer, examples[: count // 8], new_picture=False)),
        "second_pictures": share(evaluate_second_turns(answer, examples[: count // 8], new_picture=True)),
        "text_only": share(evaluate_text(answer)),
        "uncorrected_transformers": share(uncorrected),
        "evaluation": {
            "command": f"python recipes/miniature/evaluate.py --count {count}",
            "path": "AutoProcessor, chat template, generate with the published vision states; BF16 weights loaded as "
            "float32; exact match",
            "seconds": round(time.monotonic() - start),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--count", type=int, default=1000, help="held-out questions, one picture each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-errors", type=int, default=0, help="print the first wrong answers")
    parser.add_argument("--dry", action="store_true", help="print the figures without writing RESULTS.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    results = evaluate(arguments.checkpoint, arguments.count, arguments.show_errors)
    training = arguments.checkpoint.parent / "training.json"
    if training.exists():
        results["training"] = json.loads(training.read_text(encoding="utf-8"))
    print(json.dumps(results, indent=2))
    if not arguments.dry:
        write_json(arguments.checkpoint.parent / "RESULTS.json", results)


if __name__ == "__main__":
    main()
