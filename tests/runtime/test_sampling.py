"""The sampler against transformers' processors, torch's log-softmax, written-out formulas and exact probabilities."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from mllama_runtime.errors import GateError, RequestError, UsageError
from mllama_runtime.sampling import Sampled, Sampler, SamplingParams, gumbel_noise, truncated
from numpy.typing import NDArray
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 1000


def random_logits(seed: int, size: int = VOCAB, scale: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def reference_probabilities(scores: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """transformers' own warpers in their own order; in float64, where no rounding decides who is kept."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    warped = warpers(torch.zeros(1, 0, dtype=torch.long), torch.tensor(scores, dtype=torch.float64)[None])
    return warped[0].softmax(dim=-1).numpy()


def probabilities(scores: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    token_ids, log_weights = truncated(scores, params)
    result = np.zeros(scores.size)
    result[token_ids] = np.exp(log_weights) / np.exp(log_weights).sum()
    return result


TRUNCATIONS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 0.7, "top_k": 10**6},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 0.8, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 400, "top_p": 0.95},
]


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_distribution_equals_transformers(options: dict[str, float]) -> None:
    params = SamplingParams(**options)
    for seed in range(30):
        scores = random_logits(seed, scale=(0.5, 3.0, 8.0)[seed % 3])
        ours, reference = probabilities(scores, params), reference_probabilities(scores, params)
        assert np.array_equal(ours > 0, reference > 0)
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-12)  # float64 on both sides


def test_tied_logits_equal_transformers() -> None:
    # Without top-p, whose choice among equals torch.sort leaves open.
    for seed in range(30):
        scores = np.round(random_logits(seed))
        for options in ({"top_k": 7}, {"min_p": 0.1}, {"top_k": 200, "min_p": 0.02}):
            params = SamplingParams(temperature=0.9, **options)
            ours, reference = probabilities(scores, params), reference_probabilities(scores, params)
            assert np.array_equal(ours > 0, reference > 0)


def test_top_p_keeps_the_lower_ids_among_equals() -> None:
    # Four values, each hundreds of times: the largest holds about 0.6 of the mass, the two largest 0.9.
    scores = np.random.default_rng(0).integers(0, 4, VOCAB).astype(np.float32)
    by_value = np.lexsort((np.arange(VOCAB), -scores))
    for top_p in (0.1, 0.3, 0.5, 0.7, 0.8):
        kept, _ = truncated(scores, SamplingParams(temperature=1.0, top_p=top_p))
        assert kept.tolist() == by_value[: kept.size].tolist()


def test_masked_logits_keep_probability_zero() -> None:
    scores = random_logits(0)
    scores[10:] = -np.inf
    for options in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.001}):
        params = SamplingParams(temperature=1.0, **options)
        np.testing.assert_allclose(probabilities(scores, params), reference_probabilities(scores, params), atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-30, 5e-324, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    scores = random_logits(1)
    result = probabilities(scores, SamplingParams(temperature=temperature, top_p=0.5))
    assert np.isfinite(result).all()
    if temperature < 1:
        assert result.argmax() == scores.argmax()
        assert np.count_nonzero(result) == 1


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(3)
    prompt = [5, 7, 7, 900, VOCAB - 1]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), VOCAB, [*prompt, VOCAB, VOCAB + 7])
    answer = [sampler.sample(random_logits(seed)).token_id for seed in (10, 11, 12)]
    reference = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), torch.tensor(logits)[None])
    np.testing.assert_array_equal(sampler.penalised(logits), reference[0].numpy())


def forced(token_id: int) -> NDArray[np.float32]:
    logits = np.zeros(VOCAB, np.float32)
    logits[token_id] = 1000.0
    return logits


def test_presence_and_frequency_penalties_follow_the_formula() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25), VOCAB, [1, 2, 3])
    for token_id in (3, 4, 4, 4):
        assert sampler.sample(forced(token_id)).token_id == token_id
    logits = random_logits(0)
    expected = logits.copy()
    expected[3] -= 0.5 - 0.25 * 1  # in the prompt as well, which does not count
    expected[4] -= 0.5 - 0.25 * 3
    np.testing.assert_allclose(sampler.penalised(logits), expected, rtol=0, atol=1e-6)


def test_logit_bias_is_added_after_the_penalties() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias={3: 10, 5: -100.0, 9: 0.5})
    logits = random_logits(0)
    expected = logits.copy()
    expected[3] = (logits[3] / 2 if logits[3] >= 0 else logits[3] * 2) + np.float32(10)
    expected[5] -= 100
    expected[9] += np.float32(0.5)
    np.testing.assert_array_equal(Sampler(params, VOCAB, [3]).penalised(logits), expected)


def test_min_new_tokens_masks_end_and_stop_tokens_whatever_their_bias() -> None:
    params = SamplingParams(min_new_tokens=2, stop_token_ids=(8,), logit_bias={7: 100.0})
    sampler = Sampler(params, VOCAB, eos_token_ids=(6, 7, VOCAB))  # one without a logit
    assert sampler.stop_token_ids == {6, 7, 8, VOCAB}
    logits = random_logits(0)
    logits[[6, 7, 8]] = (50.0, 60.0, 70.0)
    for _ in range(2):
        assert np.isneginf(sampler.penalised(logits)[[6, 7, 8]]).all()
        assert sampler.sample(logits).token_id == np.argsort(-logits)[3]
    assert sampler.sample(logits).token_id == 7


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.minimum(random_logits(0), np.float32(6))
    assert Sampler(SamplingParams(top_k=3, top_p=0.1), VOCAB).sample(logits) == Sampled(int(logits.argmax()))
    assert np.flatnonzero(logits == logits.max()).size > 1  # or the test says nothing


def reference_noise(seed: int, step: int, token_id: int) -> float:
    """One token's noise by random access: Philox gives four words per count."""
    words = np.random.Philox(key=seed, counter=(step << 64) + token_id // 4).random_raw(4)
    uniform = (int(words[token_id % 4]) // 2**12 + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def reference_choice(
    logits: NDArray[np.float32], params: SamplingParams, prompt: list[int], answer: list[int], seed: int
) -> int:
    """The ten steps of the docstring, each done the long way."""
    processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    scores = processor(torch.tensor([prompt + answer]), torch.tensor(logits)[None])[0].numpy()
    for token_id in set(answer):
        penalty = params.presence_penalty + params.frequency_penalty * answer.count(token_id)
        scores[token_id] -= np.float32(penalty)
    for token_id, bias in params.logit_bias:
        scores[token_id] += np.float32(bias)
    if len(answer) < params.min_new_tokens:
        scores[list(params.stop_token_ids)] = -np.inf
    if params.temperature == 0:
        return int(scores.argmax())
    kept = {int(i): p for i, p in enumerate(reference_probabilities(scores, params)) if p > 0}
    return max(kept, key=lambda i: math.log(kept[i]) + reference_noise(seed, len(answer), i))


def test_every_step_together_equals_the_long_way() -> None:
    rng = np.random.default_rng(0)
    for case in range(60):
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.5, 1.0, 1.5])),
            top_k=int(rng.choice([0, 5, 60])),
            top_p=float(rng.choice([1.0, 0.9, 0.4])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([0.8, 1.3])),
            presence_penalty=float(rng.choice([0.0, 0.7])),
            frequency_penalty=float(rng.choice([0.0, -0.4])),
            logit_bias={int(i): float(rng.normal(0, 5)) for i in rng.choice(100, 3, replace=False)},
            min_new_tokens=3,
            stop_token_ids=(1, 2),
            seed=int(rng.integers(2**63)),
        )
        prompt = [int(i) for i in rng.integers(0, 100, 6)]
        sampler = Sampler(params, 100, prompt)
        answer: list[int] = []
        for step in range(6):
            logits = random_logits(100 * case + step, size=100)
            expected = reference_choice(logits, params, prompt, answer, sampler.seed)
            assert sampler.sample(logits).token_id == expected, (params, step)
            answer.append(expected)


def test_noise_is_pinned() -> None:
    # The same seed must give the same text on every machine and with every NumPy: words of Philox-4x64-10.
    words = np.random.Philox(key=5, counter=7 << 64).random_raw(2)
    assert words.tolist() == [9250372777377134966, 812872311857779332]
    largest = int(gumbel_noise(5, 7, np.arange(128_256)).argmax())  # where u is so near 1 that its last bits matter
    for token_id in (0, 1, 128_255, largest):
        noise = gumbel_noise(5, 7, np.array([token_id]))
        np.testing.assert_allclose(noise, [reference_noise(5, 7, token_id)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        gumbel_noise(5, 7, np.arange(2)), [0.37073905151723247, -1.1384959620462314], rtol=0, atol=1e-12
    )


def test_noise_depends_on_seed_step_and_token_alone() -> None:
    everything = gumbel_noise(2**64 - 1, 3, np.arange(5000))
    some = np.array([4999, 0, 17, 17, 1234])
    np.testing.assert_array_equal(gumbel_noise(2**64 - 1, 3, some), everything[some])
    assert not np.isin(everything, gumbel_noise(2**64 - 1, 4, np.arange(5000))).any()
    assert not np.isin(everything, gumbel_noise(2**64 - 2, 3, np.arange(5000))).any()


def test_noise_is_gumbel() -> None:
    for noise in (
        gumbel_noise(11, 0, np.arange(20_000)),  # over tokens
        np.array([gumbel_noise(11, step, np.array([3]))[0] for step in range(5000)]),  # over steps
        np.array([gumbel_noise(seed, 0, np.array([3]))[0] for seed in range(5000)]),  # over seeds
    ):
        assert np.isfinite(noise).all()
        assert stats.kstest(noise, "gumbel_r").pvalue > 0.01
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(noise.size)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 12},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 15, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("over", ["steps", "seeds"])
def test_samples_have_the_exact_distribution(options: dict[str, float], over: str) -> None:
    num_samples, logits = 8000, random_logits(5, size=20, scale=1.0)
    params = SamplingParams(seed=1, **options)
    if over == "steps":
        sampler = Sampler(params, 20)
        tokens = [sampler.sample(logits).token_id for _ in range(num_samples)]
    else:
        tokens = [
            Sampler(dataclasses.replace(params, seed=seed), 20).sample(logits).token_id for seed in range(num_samples)
        ]
    exact = reference_probabilities(logits, params)
    counts = np.bincount(tokens, minlength=20)
    assert not counts[exact == 0].any()
    kept = exact > 0
    assert exact[kept].min() * num_samples > 5  # chi-square's own condition
    assert stats.chisquare(counts[kept], exact[kept] * num_samples).pvalue > 0.001


def draw(sampler: Sampler, num_tokens: int = 30) -> list[int]:
    return [sampler.sample(random_logits(step)).token_id for step in range(num_tokens)]


def test_the_seed_decides() -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=42)
    assert draw(Sampler(params, VOCAB)) == draw(Sampler(params, VOCAB))
    assert draw(Sampler(params, VOCAB)) != draw(Sampler(dataclasses.replace(params, seed=43), VOCAB))


def test_without_a_seed_rows_differ_and_can_be_repeated() -> None:
    params = SamplingParams(temperature=1.5)
    one, other = Sampler(params, VOCAB), Sampler(params, VOCAB)
    tokens = draw(one)
    assert tokens != draw(other)
    assert tokens == draw(Sampler(dataclasses.replace(params, seed=one.seed), VOCAB))


def test_rows_do_not_change_each_other() -> None:
    rows = [
        (SamplingParams(temperature=1.2, seed=1, repetition_penalty=1.2), [1, 2]),
        (SamplingParams(temperature=0.7, seed=2, top_k=30, frequency_penalty=0.3), [3]),
        (SamplingParams(temperature=1.0, seed=1, logit_bias={4: 3.0}), []),
    ]
    alone = [draw(Sampler(params, VOCAB, prompt)) for params, prompt in rows]
    for order in ([0, 1, 2], [2, 0, 1]):
        samplers = [Sampler(params, VOCAB, prompt) for params, prompt in rows]
        together: list[list[int]] = [[], [], []]
        for step in range(30):
            for row in order:
                together[row].append(samplers[row].sample(random_logits(step)).token_id)
        assert together == alone


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=3.0, logit_bias={1: 50.0}, logprobs=5, seed=0)
    logits = random_logits(8)
    before = logits.copy()
    sampled = Sampler(params, VOCAB, range(VOCAB)).sample(logits)
    np.testing.assert_array_equal(logits, before)
    reference = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    top = torch.topk(reference, 5)
    assert [token_id for token_id, _ in sampled.top_logprobs] == top.indices.tolist()
    np.testing.assert_allclose([value for _, value in sampled.top_logprobs], top.values, rtol=0, atol=1e-12)
    assert sampled.token_id == 1
    assert sampled.logprob == pytest.approx(float(reference[1]), abs=1e-12)


def test_logprobs_list_lower_ids_first_among_equals_and_nothing_impossible() -> None:
    logits = np.array([0, 1, -np.inf, 1, 0, 1, -np.inf], np.float32)

    def listed(count: int) -> list[int]:
        sampled = Sampler(SamplingParams(logprobs=count), 7).sample(logits)
        assert sampled.logprob is not None
        return [token_id for token_id, _ in sampled.top_logprobs]

    assert (listed(0), listed(2), listed(4), listed(20)) == ([], [1, 3], [1, 3, 5, 0], [1, 3, 5, 0, 4])
    logits = np.random.default_rng(0).integers(0, 4, VOCAB).astype(np.float32)
    logits[[900, 50, 400]] = 4
    sampled = Sampler(SamplingParams(logprobs=20), VOCAB).sample(logits)
    expected = [50, 400, 900, *np.flatnonzero(logits == 3)[:17]]
    assert [token_id for token_id, _ in sampled.top_logprobs] == expected


def test_no_logprobs_unless_asked_for() -> None:
    assert Sampler(SamplingParams(), VOCAB).sample(random_logits(0)).logprob is None


NUMBER_FAULTS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32("inf"),
    np.True_,
    10**400,
    "0.5",
    None,
    True,
    [0.5],
    1j,
]
FAULTS = [
    *(("temperature", value) for value in (-0.1, -1e-300, *NUMBER_FAULTS)),
    *(("top_p", value) for value in (0, 0.0, -0.5, 1.0001, 2, *NUMBER_FAULTS)),
    *(("min_p", value) for value in (-0.1, 1.1, *NUMBER_FAULTS)),
    *(("repetition_penalty", value) for value in (0, -1.0, 101, *NUMBER_FAULTS)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, *NUMBER_FAULTS)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, *NUMBER_FAULTS)),
    *(("top_k", value) for value in (-1, 1.0, "5", True, None, float("nan"))),
    *(("max_new_tokens", value) for value in (0, -1, 1.5, "10", True, None, float("inf"))),
    *(("min_new_tokens", value) for value in (-1, 1.5, "10", True, None, 513)),
    *(("seed", value) for value in (-1, 2**64, 1.0, "1", True)),
    *(("logprobs", value) for value in (-1, 21, 1.0, "5", True)),
    *(("stop", value) for value in ("", "###", ("",), ("a", ""), (1,), (None,), None, {"a"}, ("a",) * 65)),
    *(("stop_token_ids", value) for value in (5, "5", (-1,), (1.0,), ("5",), (True,), None, {5})),
    *(
        ("logit_bias", value)
        for value in (5, "5", {"5": 1.0}, {-1: 1.0}, {5: 100.5}, {5: float("nan")}, {5: "1"}, None)
    ),
    *(("logit_bias", value) for value in ([5], ((5, 1.0, 2.0),), ((5, 1.0), (5, 2.0)), {5: None}, {True: 1.0})),
]


@pytest.mark.parametrize(("name", "value"), FAULTS)
def test_faulty_options_are_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{name}: sampling option refused: expected .*, found ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250


def test_messages_say_what_is_allowed() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_p=0)
    assert str(caught.value) == ("top_p: sampling option refused: expected a number above 0 and at most 1, found 0")
    with pytest.raises(RequestError, match=r"^min_new_tokens: .*expected at most max_new_tokens, 4, found 5"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)


def test_what_is_allowed_is_kept_in_plain_types() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=1,
        top_k=np.int64(3),
        stop=["a"],
        stop_token_ids=[np.int64(3)],
        logit_bias={9: 1, 2: -100},
        max_new_tokens=10**9,
        seed=2**64 - 1,
    )
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (3,), ((2, -100.0), (9, 1.0)))
    assert [type(value) for value in (params.temperature, params.top_p, params.top_k)] == [float, float, int]
    assert dataclasses.replace(params) == params
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3


@pytest.mark.parametrize("options", [{"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (1, VOCAB)}], ids=str)
def test_token_ids_outside_the_vocabulary_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=rf"^{next(iter(options))}: .*below 1000.* found \[1000\]"):
        Sampler(SamplingParams(**options), VOCAB)


@pytest.mark.parametrize(
    ("value", "found"), [(np.nan, "NaN x 2"), (np.inf, r"\+Inf x 2"), (-np.nan, "NaN x 2")], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, found: str, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), VOCAB, row=3)
    sampler.sample(random_logits(0))
    logits = random_logits(1)
    logits[[4, 500]] = value
    with pytest.raises(GateError, match=f"^row 3, step 1: .*found {found};"):
        sampler.sample(logits)


def test_logits_of_minus_infinity_throughout_are_an_error() -> None:
    with pytest.raises(GateError, match=r"^row 0, step 0: .*-Inf x 1000"):
        Sampler(SamplingParams(), VOCAB).sample(np.full(VOCAB, -np.inf, np.float32))


def test_a_request_that_leaves_no_token_is_refused() -> None:
    params = SamplingParams(min_new_tokens=1, stop_token_ids=(0, 1), temperature=1.0)
    with pytest.raises(RequestError, match=r"^row 0, step 0: no token is left to choose"):
        Sampler(params, 2).sample(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "logits", [np.zeros((1, VOCAB), np.float32), np.zeros(VOCAB - 1, np.float32), np.zeros(VOCAB, np.float16)]
)
def test_other_shapes_and_dtypes_are_refused(logits: NDArray[np.float32]) -> None:
    with pytest.raises(UsageError, match=r"expected float32 \(1000,\), found "):
        Sampler(SamplingParams(), VOCAB).sample(logits)
