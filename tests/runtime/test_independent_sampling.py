"""The sampler against the definitions themselves: exact decimals, integers and plain loops, with no library between.

test_sampling.py has the first judge: transformers, in one version.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from mllama_runtime.sampling import Sampler, SamplingParams, gumbel_noise, truncated, write_gumbel_noise
from mllama_runtime.streaming import TextStream
from mllama_runtime.tokenizer import Tokenizer
from numpy.typing import NDArray
from transformers import AutoTokenizer, StopStringCriteria
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

CHECKPOINT = Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint"
DIGITS = 40
CLOSE = Decimal("1e-12")  # where float64 may round to either side

# Truncation


def kept_by_definition(scores: Sequence[float], params: SamplingParams) -> dict[int, Decimal] | None:
    """Kept tokens and their probabilities; none where a boundary is within float64's rounding.

    Top-k (Fan et al. 2018): fewer than k tokens are likelier. Top-p (Holtzman et al. 2020): the smallest set of the
    likeliest that holds p, so a token is in while those before it hold less than p. Min-p (Nguyen et al. 2024): at
    least min_p times the likeliest. Each on what the one before it left, made to sum to 1 again.
    """
    temperature = Decimal(params.temperature)
    weights = {i: (Decimal(float(x)) / temperature).exp() for i, x in enumerate(scores)}
    if params.top_k:
        weights = {i: w for i, w in weights.items() if sum(x > scores[i] for x in scores) < params.top_k}
    if params.top_p < 1:
        wanted, before, nucleus = Decimal(str(params.top_p)) * sum(weights.values()), Decimal(0), {}
        for i in sorted(weights, key=lambda i: (-scores[i], i)):
            if abs(before - wanted) < CLOSE * wanted:
                return None
            if before < wanted:
                nucleus[i] = weights[i]
            before += weights[i]
        weights = nucleus
    least = Decimal(str(params.min_p)) * max(weights.values())
    if any(w != max(weights.values()) and abs(w - least) < CLOSE * least for w in weights.values()):
        return None
    weights = {i: w for i, w in weights.items() if w >= least}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def random_case(rng: np.random.Generator) -> tuple[NDArray[np.float32], SamplingParams]:
    size = int(rng.integers(1, 15))
    scores = rng.normal(0, rng.choice([0.3, 2.0, 8.0]), size).astype(np.float32)
    if rng.random() < 0.5:
        scores = np.round(scores)  # ties
    params = SamplingParams(
        temperature=float(rng.choice([0.3, 0.8, 1.0, 1.7])),
        top_k=int(rng.choice([0, 0, 1, 2, 5, 20])),
        top_p=float(rng.choice([1.0, 0.97, 0.9, 0.6, 0.3, 0.01])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.2, 1.0])),
    )
    return scores, params


def test_kept_tokens_and_probabilities_are_those_of_the_definitions() -> None:
    rng, num_close, num_tied = np.random.default_rng(0), 0, 0
    with localcontext(prec=DIGITS):
        for _ in range(1500):
            scores, params = random_case(rng)
            expected = kept_by_definition(scores.tolist(), params)
            if expected is None:
                num_close += 1
                continue
            token_ids, log_weights = truncated(scores, params)
            assert sorted(token_ids.tolist()) == sorted(expected), (scores, params)
            found = np.exp(log_weights) / np.exp(log_weights).sum()
            np.testing.assert_allclose(found, [float(expected[i]) for i in token_ids.tolist()], rtol=1e-12)
            num_tied += len(set(scores.tolist())) < scores.size
    assert num_tied > 500
    assert num_close < 15


@pytest.mark.parametrize("size", [1, 4, 8, 64, 1024])
@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.75])
def test_top_p_on_the_boundary_itself(size: int, top_p: float) -> None:
    """Equal tokens, whose sums are exact: the fewest that hold p, and not one more.

    Meta's own `sample_top_p` keeps a token while those before it hold at most p: one more, here and nowhere else.
    """
    token_ids, _ = truncated(np.zeros(size, np.float32), SamplingParams(temperature=1.0, top_p=top_p))
    assert token_ids.tolist() == list(range(math.ceil(top_p * size)))


def test_min_p_of_1_keeps_the_likeliest_and_its_equals() -> None:
    scores = np.array([1, 3, 3, 2.9999998, 3], np.float32)
    assert truncated(scores, SamplingParams(temperature=0.7, min_p=1.0))[0].tolist() == [1, 2, 4]


def test_ties_under_top_p_keep_as_many_of_each_as_transformers() -> None:
    """Which of them, torch's sort leaves open."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        scores, params = random_case(rng)
        params = dataclasses.replace(params, min_p=0.0)
        if params.top_p == 1 or kept_by_definition(scores.tolist(), params) is None:
            continue
        warped = torch.tensor(scores, dtype=torch.float64)[None]
        no_ids = torch.zeros(1, 0, dtype=torch.long)
        warped = TemperatureLogitsWarper(params.temperature)(no_ids, warped)
        if params.top_k:
            warped = TopKLogitsWarper(params.top_k)(no_ids, warped)
        warped = TopPLogitsWarper(params.top_p)(no_ids, warped)[0].numpy()
        assert sorted(scores[truncated(scores, params)[0]]) == sorted(scores[np.isfinite(warped)])


# Penalties


def taught(params: SamplingParams, vocab_size: int, prompt: Sequence[int], answer: Sequence[int]) -> Sampler:
    """A sampler that has chosen the answer."""
    sampler = Sampler(params, vocab_size, prompt)
    for token_id in answer:
        logits = np.full(vocab_size, -1e8, np.float32)
        logits[token_id] = 1e8
        assert sampler.sample(logits).token_id == token_id
    return sampler


def test_penalties_and_bias_are_those_of_the_definitions() -> None:
    """CTRL's repetition penalty in the sign-aware form of transformers and vLLM, over prompt and answer; OpenAI's
    mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, where c counts what was sampled: not the prompt.
    """
    rng = np.random.default_rng(2)
    for _ in range(300):
        size = 20
        prompt, answer = rng.integers(0, size, 5).tolist(), rng.integers(0, size, rng.integers(0, 9)).tolist()
        bias = {int(i): float(rng.uniform(-100, 100)) for i in rng.choice(size, 3, replace=False)}
        params = SamplingParams(
            repetition_penalty=float(rng.choice([0.5, 1.0, 1.3, 3.0])),
            presence_penalty=float(rng.uniform(-2, 2)),
            frequency_penalty=float(rng.uniform(-2, 2)),
            logit_bias=bias,
        )
        logits = rng.normal(0, 5, size).astype(np.float32)
        logits[rng.integers(size)] = 0
        expected = []
        for token_id, score in enumerate(logits.tolist()):
            if token_id in prompt or token_id in answer:
                score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
            score -= answer.count(token_id) * params.frequency_penalty
            score -= (token_id in answer) * params.presence_penalty
            expected.append(score + bias.get(token_id, 0.0))
        found = taught(params, size, prompt, answer).penalised(logits)
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-5)  # float32 up to 130


# Where a row ends


@pytest.mark.parametrize("least", [0, 1, 3])
def test_the_least_number_of_tokens_is_that_of_transformers(least: int) -> None:
    processor = MinNewTokensLengthLogitsProcessor(4, least, [2, 5], device="cpu")
    sampler = Sampler(SamplingParams(min_new_tokens=least, stop_token_ids=(5,)), 8, [7] * 4, eos_token_ids=[2])
    logits, ids = np.random.default_rng(3).normal(0, 1, 8).astype(np.float32), [7] * 4
    logits[[2, 5]] = 10, 9
    for _ in range(5):
        expected = processor(torch.tensor([ids]), torch.tensor(logits)[None])[0].numpy()
        np.testing.assert_array_equal(sampler.penalised(logits), expected)
        ids.append(sampler.sample(logits).token_id)
    assert (ids[4:] == [2] * 5) is (least == 0)  # or the test says nothing


def test_a_stop_string_ends_at_the_token_that_ends_it_in_transformers() -> None:
    reference = AutoTokenizer.from_pretrained(CHECKPOINT)
    ours = Tokenizer.from_file(CHECKPOINT / "tokenizer.json")
    rng, num_found = random.Random(4), 0
    stops = ["red", "e c", "\n\n", "aba"]
    criteria = StopStringCriteria(reference, stops)
    pieces = [ours.encode(text, special=False) for text in ("red", " red", "blue c", "ab", "a", "\n", "e", " c", "re")]
    pool = sorted(set(itertools.chain(*pieces)))
    for _ in range(200):
        token_ids, stream = [rng.choice(pool) for _ in range(12)], TextStream(ours.backend, stops)
        for count, token_id in enumerate(token_ids, start=1):
            stream.push(token_id)
            is_over = bool(criteria(torch.tensor([token_ids[:count]]), None)[0])  # type: ignore[arg-type]
            assert stream.finished is is_over, (token_ids, count)
            if is_over:
                num_found += 1
                break
    assert 20 < num_found < 200


# Random numbers and logarithms

MASK = 2**64 - 1


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox-4x64-10 as in Salmon et al. (2011): four words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & MASK, first >> 64 ^ c[3] ^ k[1], first & MASK]
        k = [k[0] + 0x9E3779B97F4A7C15 & MASK, k[1] + 0xBB67AE8584CAA73B & MASK]
    return c


def test_philox_gives_its_published_words() -> None:
    """The known answers that Random123 comes with (kat_vectors)."""
    zeros = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    ones = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox([0] * 4, [0] * 2) == zeros
    assert philox([MASK] * 4, [MASK] * 2) == ones


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (5, 7), (2**64 - 1, 3), (12345678901234567890, 2**40)])
def test_the_noise_is_that_of_the_papers_philox(seed: int, step: int) -> None:
    """Words in blocks of four; the first block's counter is 1, for NumPy counts before it draws."""
    token_ids = [*range(9), 1007, 128_255]
    with localcontext(prec=DIGITS):
        expected = []
        for token_id in token_ids:
            word = philox([token_id // 4 + 1, step, 0, 0], [seed, 0])[token_id % 4]
            uniform = (Decimal(word >> 12) + Decimal("0.5")) / 2**52
            expected.append(float(-(-uniform.ln()).ln()))
    np.testing.assert_allclose(gumbel_noise(seed, step, np.array(token_ids)), expected, rtol=0, atol=1e-13)
    rounded = np.empty(128_256, np.float32)
    write_gumbel_noise(rounded, seed, step)
    np.testing.assert_array_equal(rounded[token_ids], np.array(expected, np.float32))


def test_logprobs_are_exact() -> None:
    rng = np.random.default_rng(5)
    with localcontext(prec=DIGITS):
        for scale in (0.1, 3.0, 60.0):
            logits = rng.normal(0, scale, 50).astype(np.float32)
            sampled = Sampler(SamplingParams(logprobs=20), 50).sample(logits)
            total = sum(Decimal(x).exp() for x in logits.tolist()).ln()
            expected = sorted(((float(Decimal(x) - total), i) for i, x in enumerate(logits.tolist())), reverse=True)
            assert [i for i, _ in sampled.top_logprobs] == [i for _, i in expected[:20]]
            np.testing.assert_allclose([x for _, x in sampled.top_logprobs], [x for x, _ in expected[:20]], atol=1e-12)
            assert sampled.logprob == pytest.approx(expected[0][0], abs=1e-12)
