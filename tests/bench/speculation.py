"""Drafts from the text itself, against none, on prompts that copy and on prompts that do not.

    python tests/bench/speculation.py BUNDLE QUESTIONS.jsonl

asks each question of a file (`recipes/miniature/task.py` writes them) as it is, and again after two turns that hold its
answer, first without drafts and then with them, in turns. What counts are the ratios; times are of the moment.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.engine import Stream
from mllama_runtime.evaluation.questions import Question, task_from_jsonl

DRAFT = 8  # tokens
LENGTH = 24  # tokens of an answer at most, and of every other answer at least


def requests(questions: Sequence[Question]) -> list[Request]:
    """Two of each question: as it is, some of them drawn by chance; and asked again after two turns with its answer."""
    made = []
    for index, question in enumerate(questions):
        parts = [{"type": "image"} for _ in question.images]
        shown = {"role": "user", "content": [*parts, {"type": "text", "text": question.prompt}]}
        told = {"role": "assistant", "content": question.answers[0]}
        asked = {"role": "user", "content": question.prompt}
        least = LENGTH if index % 2 else 0
        greedy = SamplingParams(max_new_tokens=LENGTH, min_new_tokens=least)
        by_chance = SamplingParams(max_new_tokens=LENGTH, min_new_tokens=least, temperature=0.8, top_p=0.95, seed=index)
        sampling = greedy if index % 5 else by_chance
        made.append(Request(question.prompt, images=question.images, sampling=sampling))
        made.append(Request([shown, told, asked, told, asked], images=question.images, sampling=greedy))
    return made


def is_copying(request: Request) -> bool:
    return not isinstance(request.prompt, str)


def answer(engine: Engine, request: Request) -> tuple[tuple[int, ...], str, int, float]:
    """Token ids, text, the decoder's steps, and seconds from the first token to the last."""
    with Stream(engine, [request]) as stream:
        start = 0.0
        for _ in stream:
            start = start or time.perf_counter()
        seconds, generation = time.perf_counter() - start, stream.generation()
        return generation.token_ids, generation.text, stream._loop.num_steps, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    steps: Counter[tuple[bool, bool]] = Counter()
    seconds: dict[tuple[bool, bool], float] = {}
    num_different = 0
    with (
        Engine.load(options.bundle, backend="cpu", num_threads=options.threads) as plain,
        Engine.load(options.bundle, backend="cpu", num_threads=options.threads, speculate=DRAFT) as drafting,
    ):
        asked = requests(task_from_jsonl(options.questions).questions)
        answer(plain, asked[0]), answer(drafting, asked[0])
        for request in asked:
            found = [answer(engine, request) for engine in (plain, drafting)]
            num_different += found[0][:2] != found[1][:2]
            for drafts, (_, _, num_steps, took) in enumerate(found):
                key = is_copying(request), bool(drafts)
                steps[key] += num_steps
                seconds[key] = seconds.get(key, 0.0) + took
    print(f"{len(asked)} prompts, drafts of {DRAFT}: {num_different} answers differ")
    for copies in (True, False):
        before, after = (copies, False), (copies, True)
        print(
            f"{'copying' if copies else 'not copying'}: {steps[before]} steps without drafts, {steps[after]} with;"
            f" time {seconds[after] / seconds[before]:.2f} of that without"
        )


if __name__ == "__main__":
    main()
