"""From a row's logits to its next token: the step between the decoder graph and the text stream.

`SamplingParams` is what a request asks for, checked once at the edge; `Sampler` is one row's state while it runs. The
docstring of `Sampler` is the reference of the order of operations, `gumbel_noise` that of the random numbers.
"""

from __future__ import annotations

import math
import reprlib
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.errors import GateError, RequestError, UsageError

MAX_STOP_STRINGS = 64  # each costs time per character of text
MAX_LOGPROBS = 20  # the limit of OpenAI's interface

_FLOATS: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, sys.float_info.max, "a finite number of at least 0"),
    "top_p": (math.ulp(0.0), 1.0, "a number above 0 and at most 1"),
    "min_p": (0.0, 1.0, "a number from 0 to 1"),
    "repetition_penalty": (0.01, 100.0, "a number from 0.01 to 100"),
    "presence_penalty": (-2.0, 2.0, "a number from -2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "a number from -2 to 2"),
}
_INTEGERS: dict[str, tuple[int, float, str]] = {
    "top_k": (0, math.inf, "a whole number of at least 0"),
    "min_new_tokens": (0, math.inf, "a whole number of at least 0"),
    "max_new_tokens": (1, math.inf, "a whole number of at least 1"),
}
_OPTIONAL_INTEGERS: dict[str, tuple[int, float, str]] = {
    "seed": (0, 2**64 - 1, "none or a whole number from 0 to 2**64 - 1"),
    "logprobs": (0, MAX_LOGPROBS, f"none or a whole number from 0 to {MAX_LOGPROBS}"),
}
_BITS_OF_ONE = np.float64(1).view(np.uint64)
_NOISE_PIECE = 8192  # words
_TOKEN_ID = (0, math.inf, "a list of token ids, whole numbers of at least 0")
_BIAS_SHAPE = "a mapping from token ids to numbers from -100 to 100, each id once"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when a row ends. Frozen, and valid once it exists.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); 1 samples the model's own distribution.
        top_k: keep the k likeliest tokens, and those tied with the k-th; 0 is off.
        top_p: keep the fewest likeliest tokens that hold this probability; 1 is off.
        min_p: keep tokens at least this likely, relative to the likeliest; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of every token of the prompt and the answer
            so far; 1 is off.
        presence_penalty: subtracted from the logit of every token of the answer so far; 0 is off.
        frequency_penalty: subtracted from a token's logit once per occurrence in the answer so far; 0 is off.
        logit_bias: token id -> number from -100 to 100 added to its logit; kept as a tuple of pairs, sorted by id.
        seed: same seed, same tokens; none draws one from the operating system.
        stop: the text ends right before the first of these to appear in it.
        stop_token_ids: tokens that end the row, beside the model's own end tokens.
        min_new_tokens: no end or stop token before this many tokens; a stop string ends a row all the same (both as in
            transformers).
        max_new_tokens: the row ends after this many tokens, or where the context is full.
        logprobs: how many of the likeliest tokens to report with every token, beside its own log-probability.

    Raises:
        RequestError: a value of the wrong type or out of range; it names the field, the range and what was found.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    max_new_tokens: int = 512
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        if self.min_new_tokens > self.max_new_tokens:
            raise _refused("min_new_tokens", f"at most max_new_tokens, {self.max_new_tokens}", self.min_new_tokens)


def _refused(name: str, expected: str, found: object) -> RequestError:
    return RequestError("sampling option refused", where=name, expected=expected, found=reprlib.repr(found))


def _checked(name: str, value: object) -> object:
    """The value of one field in its plain Python type."""
    if name in _FLOATS:
        return _float(name, value, *_FLOATS[name])
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in _OPTIONAL_INTEGERS:
        return None if value is None else _integer(name, value, *_OPTIONAL_INTEGERS[name])
    if name == "logit_bias":
        return _bias(name, value)
    if not isinstance(value, list | tuple):
        raise _refused(name, "a list", value)
    if name == "stop_token_ids":
        return tuple(_integer(name, token_id, *_TOKEN_ID) for token_id in value)
    if len(value) > MAX_STOP_STRINGS or not all(isinstance(text, str) and text for text in value):
        raise _refused(name, f"at most {MAX_STOP_STRINGS} strings, none of them empty", value)
    return tuple(value)


def _float(name: str, value: object, low: float, high: float, expected: str) -> float:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:  # NaN is outside
        raise _refused(name, expected, value)
    return float(number)


def _integer(name: str, value: object, low: int, high: float, expected: str) -> int:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise _refused(name, expected, value)
    return number


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise _refused(name, _BIAS_SHAPE, value)
    bias = {
        _integer(name, token_id, 0, math.inf, _BIAS_SHAPE): _float(name, amount, -100.0, 100.0, _BIAS_SHAPE)
        for token_id, amount in pairs
    }
    if len(bias) < len(pairs):
        raise _refused(name, _BIAS_SHAPE, value)
    return tuple(sorted(bias.items()))


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token.

    `logprob` (none unless asked for) and `top_logprobs` (pairs of token id and log-probability, likeliest first, the
    lower id first among equals) are natural logarithms of the model's own distribution: the log-softmax, in float64, of
    the logits before any penalty, bias, temperature or truncation. Tokens of probability 0 are not listed.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def gumbel_noise(seed: int, step: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise of the given tokens: a pure function of (seed, step, token id).

    Word number `token_id` of the Philox-4x64-10 stream (Salmon et al., 2011) with key `seed`, counter `step * 2**64`,
    gives `u = ((word >> 12) + 1/2) / 2**52`, never 0 or 1, and the noise is `-log(-log(u))`. NumPy counts before it
    draws: words 0 to 3 are the block of the counter plus 1. The raw words are used because NumPy fixes them for good,
    unlike the methods of `Generator` (NEP 19).

    Args:
        seed: 0 to 2**64 - 1.
        step: number of tokens generated before.
        token_ids: [n], at least one.

    Returns:
        [n] float64.
    """
    words = np.random.Philox(key=seed, counter=step << 64).random_raw(int(token_ids.max()) + 1)[token_ids]
    return _noise_from_words(words)


def write_gumbel_noise(out: NDArray[np.float32], seed: int, step: int) -> None:
    """`gumbel_noise` of a whole vocabulary, rounded: [vocab]. In pieces, for fresh pages cost more than arithmetic."""
    stream = np.random.Philox(key=seed, counter=step << 64)
    for start in range(0, out.size, _NOISE_PIECE):
        piece = out[start : start + _NOISE_PIECE]
        piece[:] = _noise_from_words(stream.random_raw(piece.size))


def _noise_from_words(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """In place. 52 bits behind the exponent of 1 are the number 1 + (word >> 12) / 2**52: the quick way to a float."""
    words >>= np.uint64(12)
    words |= _BITS_OF_ONE
    noise = words.view(np.float64)
    noise -= 1 - 2.0**-53
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


def truncated(scores: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Temperature (above 0), top-k, top-p and min-p, in this order.

    Args:
        scores: [vocab] float32, the largest of them finite.

    Returns:
        Kept token ids [kept] and their unnormalised log-probabilities [kept] float64, the largest 0: their softmax is
        the distribution to sample from.
    """
    peak = scores.max()
    if 0 < params.top_k < scores.size:
        token_ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
    else:
        token_ids = np.arange(scores.size)
    log_weights = scores[token_ids].astype(np.float64)
    log_weights -= peak
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to minus infinity
        log_weights /= params.temperature
    if params.top_p < 1:
        kept = _nucleus(log_weights, params.top_p)
        token_ids, log_weights = token_ids[kept], log_weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(log_weights >= math.log(params.min_p))
        token_ids, log_weights = token_ids[kept], log_weights[kept]
    return token_ids, log_weights


def _nucleus(log_weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Positions of the fewest largest weights that hold `top_p` of their sum; among equals the first come first.

    They are ordered by their logarithms, which differ where a huge temperature makes weights round to the same.
    """
    weights = np.exp(log_weights)
    total = weights.sum()
    # Whatever weighs less than an equal share of the tail's mass is all tail, so only the rest need be sorted.
    head = np.flatnonzero(weights >= (1 - top_p) * total / weights.size)
    head = head[np.argsort(-log_weights[head], kind="stable")]
    return head[: int(np.searchsorted(np.cumsum(weights[head]), top_p * total)) + 1]


class Sampler:
    """Chooses the tokens of one row. Nothing outside the row (its place in a batch, other rows) changes the choice.

    The order of operations on the float32 logits of step t, t tokens having been generated:

    1. repetition penalty r over the distinct tokens of prompt and answer: x / r where x >= 0, x * r where x < 0
       (Keskar et al., CTRL, 2019; transformers);
    2. presence and frequency penalties over the answer alone: x - frequency * count - presence * (count > 0)
       (OpenAI; vLLM);
    3. logit bias: x + bias; after the penalties, so that they do not scale it;
    4. t < min_new_tokens: end and stop tokens become minus infinity;
    5. temperature 0: the largest, the lowest id among equals, and that is all;
    6. otherwise, in float64, (x - max x) / temperature;
    7. top-k: keep x >= the k-th largest, ties included;
    8. top-p over the softmax of what is left: by falling probability, the lower id first among equals, keep a token
       while the mass before it is below top_p (Holtzman et al., 2020);
    9. min-p: keep tokens with at least min_p times the largest probability (Nguyen et al., 2024);
    10. the largest of log-probability + `gumbel_noise(seed, t, token id)`, which samples the softmax of what is left.

    Steps 6 to 9 follow transformers; vLLM applies min-p before top-k and top-p. Tokens without a logit
    (`<|image|>`) may be in the prompt; they have nothing to penalise.

    Args:
        params: what the request asks for.
        vocab_size: number of logits.
        prompt_token_ids: the row's prompt.
        eos_token_ids: the model's own end tokens.
        row: the row's number, for error messages.

    Attributes:
        params: what the request asks for.
        seed: the seed in use, also when the request gave none.
        stop_token_ids: the tokens that end this row: the model's own and the request's.
        num_generated: number of tokens chosen so far.

    Raises:
        RequestError: a token id of the request is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_token_ids: Iterable[int] = (),
        eos_token_ids: Iterable[int] = (),
        *,
        row: int = 0,
    ) -> None:
        bias = dict(params.logit_bias)
        for name, token_ids in (("logit_bias", bias), ("stop_token_ids", params.stop_token_ids)):
            if outside := [token_id for token_id in token_ids if token_id >= vocab_size]:
                raise _refused(name, f"token ids below {vocab_size}, the size of the vocabulary", outside)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.stop_token_ids = frozenset((*eos_token_ids, *params.stop_token_ids))
        self.num_generated = 0
        self.params, self._row = params, row
        self._bias_ids = np.array(list(bias), dtype=np.int64)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        self._masked_ids = np.array([i for i in self.stop_token_ids if i < vocab_size], dtype=np.int64)
        self._counts = np.zeros(vocab_size, dtype=np.float32)  # of each token in the answer
        self._seen = np.zeros(vocab_size, dtype=np.bool_)  # in the prompt or the answer
        self._seen[[i for i in prompt_token_ids if 0 <= i < vocab_size]] = True

    def sample(self, logits: NDArray[np.float32]) -> Sampled:
        """Choose the next token.

        Args:
            logits: [vocab] float32, not changed and not kept.

        Raises:
            UsageError: logits of another shape or dtype.
            GateError: NaN or plus infinity among the logits, or minus infinity throughout. The request is not to blame
                and no file is known to be broken: what fails is the check that the engine still is the model.
            RequestError: penalties, bias and min_new_tokens leave no token to choose.
        """
        self._check(logits)
        scores = self.penalised(logits)
        if not np.isfinite(scores.max()):
            raise self.no_token(self.num_generated)
        if self.params.temperature == 0:
            token_id = int(scores.argmax())
        else:
            token_ids, log_weights = truncated(scores, self.params)
            noise = gumbel_noise(self.seed, self.num_generated, token_ids)
            token_id = int(token_ids[np.argmax(log_weights + noise)])
        self._seen[token_id] = True
        self._counts[token_id] += 1
        self.num_generated += 1
        if self.params.logprobs is None:
            return Sampled(token_id)
        return with_logprobs(token_id, logits, self.params.logprobs)

    @property
    def is_plain(self) -> bool:
        """Whether the token is the likeliest one, with nothing added to any logit."""
        plain = SamplingParams(temperature=0)
        names = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
        changes = any(getattr(self.params, name) != getattr(plain, name) for name in names)
        return not changes and self.params.min_new_tokens == 0

    def bias_of_step(self, step: int) -> NDArray[np.float32]:
        """Steps 3 and 4 as what they add to each logit, minus infinity included: [vocab]."""
        bias = np.zeros(self._counts.shape, np.float32)
        bias[self._bias_ids] = self._bias
        if step < self.params.min_new_tokens:
            bias[self._masked_ids] = -np.inf
        return bias

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Tokens of the prompt, and of the answer as far as `sample` chose it: [vocab]."""
        return self._seen

    def no_logits(self, step: int) -> GateError:
        """What to raise for logits of which the device said only that they cannot be sampled."""
        hint = "validate the bundle; fp16 overflows on some checkpoints, try bf16 or fp32"
        what, expected = "the model computed logits that cannot be sampled", "finite numbers"
        return GateError(what, where=f"row {self._row}, step {step}", expected=expected, hint=hint)

    def no_token(self, step: int) -> RequestError:
        """What to raise when penalties, bias and min_new_tokens leave no token to choose."""
        return RequestError(
            "no token is left to choose after penalties, logit_bias and min_new_tokens",
            where=f"row {self._row}, step {step}",
            hint="relax them, or name fewer stop_token_ids",
        )

    def _where(self) -> str:
        return f"row {self._row}, step {self.num_generated}"

    def _check(self, logits: NDArray[np.float32]) -> None:
        if logits.shape != self._counts.shape or logits.dtype != np.float32:
            raise UsageError(
                "these are not one row's logits",
                where=self._where(),
                expected=f"float32 {self._counts.shape}",
                found=f"{logits.dtype} {logits.shape}",
            )
        if not np.isfinite(logits.max()):  # NaN is the maximum of anything it is in
            kinds = (("NaN", np.isnan(logits)), ("+Inf", np.isposinf(logits)), ("-Inf", np.isneginf(logits)))
            raise GateError(
                "the model computed logits that cannot be sampled",
                where=self._where(),
                expected="finite numbers",
                found=", ".join(f"{name} x {hits.sum()}" for name, hits in kinds if hits.any()),
                hint="validate the bundle; fp16 overflows on some checkpoints, try bf16 or fp32",
            )

    def penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Steps 1 to 4, on a copy: [vocab] float32."""
        params, scores = self.params, logits.copy()
        if params.repetition_penalty != 1:
            seen = scores[self._seen]
            penalty = np.float32(params.repetition_penalty)
            scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if params.presence_penalty or params.frequency_penalty:
            token_ids = np.flatnonzero(self._counts > 0)
            scores[token_ids] -= params.presence_penalty + params.frequency_penalty * self._counts[token_ids]
        scores[self._bias_ids] += self._bias
        if self.num_generated < params.min_new_tokens:
            scores[self._masked_ids] = -np.inf
        return scores


def with_logprobs(token_id: int, logits: NDArray[np.float32], num_top: int) -> Sampled:
    weights = logits.astype(np.float64)
    weights -= logits.max()
    log_total = float(logits.max()) + math.log(np.exp(weights, out=weights).sum())
    top = tuple((i, float(logits[i]) - log_total) for i in _likeliest(logits, num_top))
    return Sampled(token_id, float(logits[token_id]) - log_total, top)


def _likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    if count == 0:
        return []
    count = min(count, logits.size)
    token_ids = np.flatnonzero((logits >= np.partition(logits, -count)[-count]) & (logits > -np.inf))
    order = np.argsort(-logits[token_ids], kind="stable")  # the ids rise: the lower comes first among equals
    return [int(i) for i in token_ids[order[:count]]]
