"""`greedy.onnx` and `sampler.onnx` against the numpy sampler, in ONNX Runtime; and as engines, which are not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.engines.checks import findings_from_network
from mllama_exporter.engines.network import network_from_graph
from mllama_exporter.sampling_graphs import greedy_graph_from_config, sampler_graph_from_config
from mllama_runtime.backends.private_trt import tensorrt_from_backend
from mllama_runtime.config import ModelConfig
from mllama_runtime.contract import SAMPLER_OPTIONS
from mllama_runtime.errors import GateError, RequestError
from mllama_runtime.sampling import Sampler, SamplingParams, write_gumbel_noise
from numpy.typing import NDArray

MODEL = Checkpoint.open(Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint").config
VOCAB = 1000
Logits = NDArray[np.float32]


def config_of(vocab_size: int) -> ModelConfig:
    return replace(MODEL, text=replace(MODEL.text, vocab_size=vocab_size))


def session_of(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


class Device:
    """What a back end keeps for the sampler graph, row by row, with the numpy samplers beside it."""

    def __init__(self, params: list[SamplingParams], prompts: list[list[int]], vocab_size: int = VOCAB) -> None:
        self.samplers = [
            Sampler(each, vocab_size, prompt, eos_token_ids=[7]) for each, prompt in zip(params, prompts, strict=True)
        ]
        shape = (len(params), vocab_size)
        self.counts, self.noise = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.in_prompt = np.stack([sampler.seen.copy() for sampler in self.samplers])
        self.options = np.array([[getattr(each, name) for name in SAMPLER_OPTIONS] for each in params], np.float32)
        self.graph = session_of(sampler_graph_from_config(config_of(vocab_size)))

    def step(self, step: int, logits: Logits) -> tuple[list[int], list[int]]:
        """Chosen tokens and statuses."""
        for row, sampler in zip(self.noise, self.samplers, strict=True):
            write_gumbel_noise(row, sampler.seed, step)
        feeds = {
            "logits": logits,
            "counts": self.counts,
            "in_prompt": self.in_prompt,
            "bias": np.stack([sampler.bias_of_step(step) for sampler in self.samplers]),
            "noise": self.noise,
            "options": self.options,
        }
        token_ids, status, counts = self.graph.run(["token_ids", "status", "present_counts"], feeds)
        one = np.zeros_like(self.counts)
        np.put_along_axis(one, token_ids, 1, axis=1)
        np.testing.assert_array_equal(counts, self.counts + one)
        self.counts = counts
        return token_ids[:, 0].tolist(), status.tolist()


def random_params(rng: np.random.Generator) -> SamplingParams:
    def one_of(*choices: float) -> float:
        return float(choices[rng.integers(len(choices))])

    bias = {int(token): float(rng.uniform(-100, 100)) for token in rng.integers(0, VOCAB, rng.integers(0, 6))}
    return SamplingParams(
        temperature=one_of(0, 0.01, 0.3, 0.7, 1, 1, 1.5, 5),
        top_k=int(one_of(0, 0, 1, 2, 5, 40, 200, VOCAB - 1, VOCAB, 10 * VOCAB)),
        top_p=one_of(1, 1, 0.999, 0.95, 0.9, 0.5, 1e-6, rng.uniform(0.01, 1)),
        min_p=one_of(0, 0, 0.01, 0.1, 0.5, 1, rng.uniform(0, 1)),
        repetition_penalty=one_of(1, 1, 1.1, 1.3, 0.8, 2),
        presence_penalty=one_of(0, 0, 0.5, -1, 2),
        frequency_penalty=one_of(0, 0, 0.3, -0.7, 2),
        logit_bias=bias if rng.random() < 0.4 else {},
        seed=int(rng.integers(0, 2**63)),
        min_new_tokens=int(one_of(0, 0, 2, 5)),
    )


def random_logits(rng: np.random.Generator) -> Logits:
    """Of one row: spread, of few values (many ties), all equal, all close, or mostly forbidden."""
    logits = rng.normal(size=VOCAB) * rng.choice([0.5, 2, 3, 6])
    kind = rng.integers(6)
    if kind == 0:
        logits = logits.astype(np.float16)
    elif kind == 1:
        logits = np.round(logits)
    elif kind == 2:
        logits = np.zeros(VOCAB)
    elif kind == 3:
        logits = logits * 1e-5 + 20
    elif kind == 4:
        logits[1:][rng.random(VOCAB - 1) < 0.3] = -np.inf
    return logits.astype(np.float32)


def test_ten_thousand_draws_are_those_of_numpy() -> None:
    rng, num_rows, num_steps = np.random.default_rng(4), 50, 20
    different, num_sampled = [], 0
    for _ in range(10):
        params = [random_params(rng) for _ in range(num_rows)]
        device = Device(params, [rng.integers(0, VOCAB, rng.integers(0, 30)).tolist() for _ in params])
        for step in range(num_steps):
            logits = np.stack([random_logits(rng) for _ in params])
            found, status = device.step(step, logits)
            expected = [sampler.sample(row).token_id for sampler, row in zip(device.samplers, logits, strict=True)]
            different += [
                (step, params[row], expected[row], found[row]) for row in range(num_rows) if found[row] != expected[row]
            ]
            assert status == [0] * num_rows
            num_sampled += sum(each.temperature > 0 for each in params)
    assert num_sampled > 8_000
    assert different == []


def test_a_row_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(1)
    params = [random_params(rng) for _ in range(12)]
    logits = np.stack([random_logits(rng) for _ in params])
    together, _ = Device(params, [[] for _ in params]).step(0, logits)
    alone = [Device([each], [[]]).step(0, row[None])[0][0] for each, row in zip(params, logits, strict=True)]
    assert together == alone


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_cannot_be_sampled_is_told(temperature: float) -> None:
    rows = {
        "NaN": np.full(VOCAB, np.nan),
        "one NaN": np.where(np.arange(VOCAB) == 500, np.nan, 1),
        "one +Inf": np.where(np.arange(VOCAB) == 3, np.inf, 1),
        "all -Inf": np.full(VOCAB, -np.inf),
        "the end token alone": np.where(np.arange(VOCAB) == 7, 1, -np.inf),
        "fine": np.zeros(VOCAB),
    }
    logits = np.stack(list(rows.values())).astype(np.float32)
    params = SamplingParams(temperature=temperature, min_new_tokens=1, seed=0)
    device = Device([params] * len(rows), [[]] * len(rows))
    _, status = device.step(0, logits)
    assert dict(zip(rows, status, strict=True)) == dict(zip(rows, (1, 1, 1, 1, 2, 0), strict=True))
    for sampler, row, code in zip(device.samplers, logits, status, strict=True):
        if code:
            with pytest.raises({1: GateError, 2: RequestError}[code]):
                sampler.sample(row)

    graph = session_of(greedy_graph_from_config(config_of(VOCAB)))
    token_ids, status = graph.run(["token_ids", "status"], {"logits": logits})
    assert status.tolist() == [1, 1, 1, 1, 0, 0]
    assert token_ids[-2:].tolist() == [[7], [0]]


@pytest.mark.parametrize("vocab_size", [VOCAB, 999, 1008])  # in 8 blocks, 1 and 16
def test_greedy_gives_the_lowest_of_the_likeliest(vocab_size: int) -> None:
    rng = np.random.default_rng(2)
    logits = np.round(rng.normal(size=(500, vocab_size)) * 2).astype(np.float32)
    graph = session_of(greedy_graph_from_config(config_of(vocab_size)))
    token_ids, status = graph.run(["token_ids", "status"], {"logits": logits})
    assert token_ids.dtype == np.int64
    assert token_ids[:, 0].tolist() == logits.argmax(axis=1).tolist()
    assert not status.any()


def test_draws_follow_their_distribution_over_the_whole_vocabulary() -> None:
    """Of a model's own size; a rank of the vocabulary that the search lost would be missing from the draws."""
    vocab_size, num_rows = 128_256, 32
    rng = np.random.default_rng(3)
    params = [SamplingParams(temperature=1, top_k=50_000, top_p=0.98, seed=seed) for seed in range(num_rows)]
    device = Device(params, [[]] * num_rows, vocab_size)
    logits = np.tile(rng.normal(size=vocab_size).astype(np.float32) * 3, (num_rows, 1))
    found, _ = device.step(0, logits)
    assert found == [sampler.sample(row).token_id for sampler, row in zip(device.samplers, logits, strict=True)]


@pytest.mark.parametrize("make", [greedy_graph_from_config, sampler_graph_from_config])
def test_the_only_reductions_are_sums(make: Callable[[ModelConfig], ir.Model]) -> None:
    """ONNX Runtime's CUDA provider leaves the others of several rows to cuDNN, in milliseconds each."""
    operators = {node.op_type for node in make(config_of(128_256)).graph}
    assert {each for each in operators if each.startswith(("Reduce", "Arg"))} <= {"ReduceSum"}


@pytest.mark.parametrize("name", ["greedy", "sampler"])
def test_tensorrt_takes_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    make = {"greedy": greedy_graph_from_config, "sampler": sampler_graph_from_config}[name]
    path, trt = tmp_path / f"{name}.onnx", tensorrt_from_backend("tensorrt-rtx")
    ir.save(make(config_of(VOCAB)), path)
    with trt.logged() as log:
        network = network_from_graph(trt, trt.api.Builder(trt.logger), path, 64, log)
        findings = findings_from_network(network, name, MODEL, low_precision=False)  # type: ignore[arg-type]
    assert {finding.detail for finding in findings} >= {"no caches", "no attentions"}
    assert not log.errors
