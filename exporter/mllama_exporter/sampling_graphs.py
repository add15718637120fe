"""`greedy.onnx` and `sampler.onnx`: logits -> next tokens, as `mllama_runtime.sampling.Sampler` chooses them.

They are the same in every precision and on every back end: standard operators, float32 throughout (TensorRT has no
float64), every row by its own options, no row touched by another's. Nothing is sorted, for TensorRT's TopK gives 3,840
values at most: what top-k and top-p keep is found by searching for the lowest score that is kept, all rows at once.
There is no ReduceMax or ReduceMin either, see `_extreme`.

The reference computes in float64. What differs is the last bits of (x - max x) / temperature + noise and of the mass
that top-p counts, each about 1e-7 of its value: a draw whose two likeliest outcomes are closer than that may flip,
which is about one in a million.

Engines of TensorRT have been built, see `tests/exporter/test_sampling_graphs.py`, and never run.

Dimensions: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig
from mllama_runtime.contract import SAMPLER_OPTIONS, Shape, greedy_shapes, sampler_shapes
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.graphs import IR_VERSION, OPSET, PRODUCER

# A pass over the vocabulary cuts the range of scores that holds the boundary into _NUM_PARTS: in one kernel, and for
# one row about as quickly as into two. Nine of them leave 2**-27 of the range, which at a temperature of 1 is 3e-7: no
# more than the distance of neighbouring float32 numbers from 4 on, so that hardly ever two scores are left in it.
_NUM_PARTS = 8
_NUM_PASSES = 9

# Scores this many temperatures below the largest are out of reach: noise of `gumbel_noise` is between -3.7 and 36.8.
_REACH = 42.0

# To find the largest or smallest, the vocabulary is cut into so many blocks, or fewer where they would differ in size.
_MAX_BLOCKS = 16

_TYPES = {
    "token_ids": ir.DataType.INT64,
    "status": ir.DataType.INT64,
    "in_prompt": ir.DataType.BOOL,
}  # of inputs and outputs; the others are float32

_Operand = ir.Value | np.ndarray | float


def greedy_graph_from_config(config: ModelConfig) -> ir.Model:
    """`greedy.onnx`: the likeliest token, the lowest id among equals.

    logits [R, V] -> token_ids [R, 1], status [R]: 1 where the largest logit is NaN or infinite, else 0. There the token
    is any.
    """
    inputs, outputs = greedy_shapes(config)
    ops = _Operators(inputs)
    logits = ops.inputs["logits"]
    peak, is_finite = _peak(ops, logits, config)
    token_ids = _lowest_id(ops, logits, peak, config)
    status = ops.add("Where", is_finite, _STATUS_FINE, _STATUS_NO_LOGITS)
    return ops.model("greedy", outputs, {"token_ids": token_ids, "status": _one_axis(ops, status)})


def sampler_graph_from_config(config: ModelConfig) -> ir.Model:
    """`sampler.onnx`: the steps of `Sampler`, numbered as there.

    Args, beside logits [R, V]:
        counts: [R, V] float32, how often each token is in the answer.
        in_prompt: [R, V] bool.
        bias: [R, V] float32, steps 3 and 4: what is added to each logit, minus infinity included.
        noise: [R, V] float32, `gumbel_noise` of every token; not looked at where the temperature is 0.
        options: [R, 7] float32, columns as in SAMPLER_OPTIONS.

    Gives token_ids [R, 1]; status [R]: 1 where the largest logit is NaN or infinite, 2 where steps 1 to 4 leave no
    token, else 0 (any token otherwise); present_counts [R, V], counts with the chosen token.
    """
    inputs, outputs = sampler_shapes(config)
    ops = _Operators(inputs)
    logits, counts = ops.inputs["logits"], ops.inputs["counts"]
    option = dict(zip(SAMPLER_OPTIONS, _columns(ops, ops.inputs["options"], len(SAMPLER_OPTIONS)), strict=True))
    _, has_logits = _peak(ops, logits, config)
    scores = _penalised(ops, ops.add("Where", has_logits, logits, 0.0), option)  # [R, V]
    top = _extreme(ops, scores, config)
    has_token = _is_finite(ops, top)
    top = ops.add("Where", has_token, top, 0.0)

    is_sampled = ops.add("Greater", option["temperature"], 0.0)
    temperature = ops.add("Where", is_sampled, option["temperature"], 1.0)
    log_weights = ops.add("Div", ops.add("Sub", scores, top), temperature)  # step 6
    weights = ops.add("Exp", log_weights)
    lowest = _lowest_bound(ops, scores, top, temperature, config)

    # Step 7. `below` is under every score that is kept and not under the next one, here and in step 8.
    top_k = ops.add("Where", ops.add("Greater", option["top_k"], 0.0), option["top_k"], math.inf)
    below = _search(ops, scores, None, top_k, lowest, top)
    mass = ops.sum(ops.add("Where", ops.add("Greater", scores, below), weights, 0.0))

    # Step 8. Of the scores equal to the last that is kept, some may be in and some not.
    share = ops.add("Where", ops.add("Less", option["top_p"], 1.0), ops.add("Max", option["top_p"], _TINY), 2.0)
    wanted = ops.add("Mul", mass, share)
    below = ops.add("Max", below, _search(ops, scores, weights, wanted, lowest, top))
    last = _extreme(ops, ops.add("Where", ops.add("Greater", scores, below), scores, top), config, largest=0)
    is_above, is_last = ops.add("Greater", scores, last), ops.add("Equal", scores, last)
    mass_above = ops.sum(ops.add("Where", is_above, weights, 0.0))
    mass_before = ops.add("Add", mass_above, ops.add("Mul", weights, _count_before(ops, is_last, config)))
    is_in = ops.add("Or", is_above, ops.add("And", is_last, ops.add("Less", mass_before, wanted)))

    # Steps 9 and 10, or 5.
    is_in = ops.add("And", is_in, ops.add("GreaterOrEqual", log_weights, ops.add("Log", option["min_p"])))
    drawn = ops.add("Where", is_in, ops.add("Add", log_weights, ops.inputs["noise"]), -math.inf)
    choice = ops.add("Where", is_sampled, drawn, scores)
    token_ids = _lowest_id(ops, choice, _extreme(ops, choice, config), config)

    status = ops.add("Where", has_token, _STATUS_FINE, _STATUS_NO_TOKEN)
    status = ops.add("Where", has_logits, status, _STATUS_NO_LOGITS)
    chosen = ops.add("Equal", ops.add("Cast", token_ids, to=ir.DataType.FLOAT), _ids(ops, config.text.vocab_size))
    present = ops.add("Add", counts, ops.add("Cast", chosen, to=ir.DataType.FLOAT))
    results = {"token_ids": token_ids, "status": _one_axis(ops, status), "present_counts": present}
    return ops.model("sampler", outputs, results)


_STATUS_FINE, _STATUS_NO_LOGITS, _STATUS_NO_TOKEN = (np.array([[code]]) for code in range(3))
_TINY = 1e-30  # next to nothing, and yet not 0
_ROUNDING = 2.0**-20  # more than a few operations in float32 can be off, relatively


class _Operators:
    """The nodes of a graph under construction. Numbers among a node's inputs become constants, float32 if Python's."""

    def __init__(self, inputs: Mapping[str, Shape]) -> None:
        self.inputs = {name: ir.Value(name=name) for name in inputs}
        for name, shape in inputs.items():
            _describe(self.inputs[name], name, shape)
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def add(self, op_type: str, *inputs: _Operand, **attributes: int) -> ir.Value:
        return self._tape.op(op_type, [self._value(each) for each in inputs], attributes)

    def add_many(self, num_outputs: int, op_type: str, *inputs: _Operand, **attributes: int) -> Sequence[ir.Value]:
        values = [self._value(each) for each in inputs]
        return self._tape.op_multi_out(op_type, values, attributes, num_outputs=num_outputs)

    def sum(self, x: _Operand, axis: int = 1, *, keepdims: int = 1) -> ir.Value:
        return self.add("ReduceSum", x, _axis(axis), keepdims=keepdims)

    def _value(self, operand: _Operand) -> ir.Value:
        if isinstance(operand, ir.Value):
            return operand
        array = operand if isinstance(operand, np.ndarray) else np.array(operand, dtype=np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def model(self, name: str, outputs: Mapping[str, Shape], results: Mapping[str, ir.Value]) -> ir.Model:
        for index, node in enumerate(self._tape.nodes):
            node.name = f"{node.op_type}_{index}"
        for output, shape in outputs.items():
            _describe(results[output], output, shape)
        graph = ir.Graph(
            list(self.inputs.values()),
            [results[output] for output in outputs],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER)
        RemoveUnusedNodesPass()(model)  # the last score of each search that is kept
        return model


def _describe(value: ir.Value, name: str, shape: Shape) -> None:
    value.name, value.dtype, value.shape = name, _TYPES.get(name, ir.DataType.FLOAT), ir.Shape(shape)


def _axis(index: int) -> np.ndarray:
    return np.array([index])


def _columns(ops: _Operators, x: ir.Value, num_columns: int) -> Sequence[ir.Value]:
    """[R, C] -> C times [R, 1]."""
    return ops.add_many(num_columns, "Split", x, np.ones(num_columns, dtype=np.int64), axis=1)


def _one_axis(ops: _Operators, x: ir.Value) -> ir.Value:
    """[R, 1] -> [R]."""
    return ops.add("Squeeze", x, _axis(1))


def _extreme(ops: _Operators, x: ir.Value, config: ModelConfig, *, largest: int = 1) -> ir.Value:
    """The largest x [R, V] of each row, or the smallest: [R, 1]. For x without NaN.

    ONNX Runtime's CUDA provider leaves ReduceMax and ReduceMin of several rows to cuDNN, where each takes milliseconds.
    TopK is a kernel of its own: for one value of more than 4,096 a quick one, so the blocks of Llama's vocabulary are
    larger than that, and so many that one row occupies a GPU. Up to 256 values it fills up to a power of two with the
    number that is lowest among the finite, so of minus infinity alone may make that number: `_is_finite` takes both for
    the same.
    """
    num_blocks = math.gcd(config.text.vocab_size, _MAX_BLOCKS)
    for shape in [0, num_blocks, config.text.vocab_size // num_blocks], [0, num_blocks]:
        x, _ = ops.add_many(2, "TopK", ops.add("Reshape", x, np.array(shape)), _axis(1), largest=largest)
    return x


def _is_finite(ops: _Operators, x: ir.Value) -> ir.Value:
    """Whether a maximum is; the largest and the lowest float32 count as infinite, see `_extreme`."""
    return ops.add("Less", ops.add("Abs", x), float(np.finfo(np.float32).max))


def _peak(ops: _Operators, logits: ir.Value, config: ModelConfig) -> tuple[ir.Value, ir.Value]:
    """The largest logit [R, 1] and whether it is finite; infinite where a NaN is, which maxima need not give."""
    peak = _extreme(ops, ops.add("Where", ops.add("Less", logits, math.inf), logits, math.inf), config)
    return peak, _is_finite(ops, peak)


def _lowest_id(ops: _Operators, x: ir.Value, largest: ir.Value, config: ModelConfig) -> ir.Value:
    """The lowest id of the largest x: [R, 1].

    ArgMax does not say which of several it gives. And as a compiler may compute x anew to compare it, fusing it
    differently, a value within rounding of the largest stands in where none is equal to it.
    """
    vocab_size = config.text.vocab_size
    near = ops.add("Sub", largest, ops.add("Mul", ops.add("Add", ops.add("Abs", largest), 1.0), _ROUNDING))
    ids = _ids(ops, vocab_size)
    behind = ops.add("Where", ops.add("Greater", x, near), ops.add("Add", ids, vocab_size), 2.0 * vocab_size)
    found = _extreme(ops, ops.add("Where", ops.add("Equal", x, largest), ids, behind), config, largest=0)
    return ops.add("Mod", ops.add("Cast", found, to=ir.DataType.INT64), np.array(vocab_size))


def _ids(ops: _Operators, vocab_size: int) -> ir.Value:
    """[V] float32, exact below 2**24."""
    return ops.add("Range", 0.0, float(vocab_size), 1.0)


def _penalised(ops: _Operators, logits: ir.Value, option: Mapping[str, ir.Value]) -> ir.Value:
    """Steps 1 to 4: [R, V]."""
    counts, bias, penalty = ops.inputs["counts"], ops.inputs["bias"], option["repetition_penalty"]
    is_in_answer = ops.add("Greater", counts, 0.0)
    is_seen = ops.add("Or", ops.inputs["in_prompt"], is_in_answer)
    is_negative = ops.add("Less", logits, 0.0)
    weakened = ops.add("Where", is_negative, ops.add("Mul", logits, penalty), ops.add("Div", logits, penalty))
    scores = ops.add("Where", is_seen, weakened, logits)
    amount = ops.add("Add", option["presence_penalty"], ops.add("Mul", option["frequency_penalty"], counts))
    scores = ops.add("Sub", scores, ops.add("Where", is_in_answer, amount, 0.0))
    return ops.add("Where", ops.add("Greater", bias, -math.inf), ops.add("Add", scores, bias), -math.inf)


def _lowest_bound(
    ops: _Operators, scores: ir.Value, top: ir.Value, temperature: ir.Value, config: ModelConfig
) -> ir.Value:
    """A score below every finite one, or below those in reach: [R, 1]. Never far off, or the search would be coarse."""
    finite = ops.add("Where", ops.add("Greater", scores, -math.inf), scores, top)
    least = _extreme(ops, finite, config, largest=0)
    margin = ops.add("Mul", ops.add("Sub", top, least), 1 / 16)
    margin = ops.add("Max", margin, ops.add("Mul", ops.add("Abs", least), _ROUNDING), _TINY)  # where all are equal
    return ops.add("Max", ops.add("Sub", least, margin), ops.add("Sub", top, ops.add("Mul", temperature, _REACH)))


def _search(
    ops: _Operators, scores: ir.Value, weights: ir.Value | None, limit: ir.Value, lowest: ir.Value, top: ir.Value
) -> ir.Value:
    """The boundary t above which the scores that come before a token make too little to leave it out: [R, 1].

    A score s is kept if the others above it have less than `limit` [R, 1], in weights [R, V] or in number. That is so
    for top and, going down, up to some score. t is below that score, and not below the next; or it is `lowest`.
    """
    shares = np.arange(1, _NUM_PARTS, dtype=np.float32)[None] / np.float32(_NUM_PARTS)
    scores = ops.add("Unsqueeze", scores, _axis(1))  # [R, 1, V]
    amounts = 1.0 if weights is None else ops.add("Unsqueeze", weights, _axis(1))
    kept, below = top, lowest
    for _ in range(_NUM_PASSES):
        tried = ops.add("Add", below, ops.add("Mul", ops.add("Sub", kept, below), shares))  # [R, parts - 1]
        is_above = ops.add("Greater", scores, ops.add("Unsqueeze", tried, _axis(2)))
        found = ops.sum(ops.add("Where", is_above, amounts, 0.0), axis=2, keepdims=0)
        is_kept = ops.add("Less", found, limit)
        kept, below = (
            ops.add("Min", *_columns(ops, ops.add("Where", is_kept, tried, kept), _NUM_PARTS - 1)),
            ops.add("Max", *_columns(ops, ops.add("Where", is_kept, below, tried), _NUM_PARTS - 1)),
        )
    return below


def _count_before(ops: _Operators, mask: ir.Value, config: ModelConfig) -> ir.Value:
    """How many of the tokens with a lower id are in the mask: [R, V]. In two levels, so that no sum runs over all."""
    vocab_size = config.text.vocab_size
    width = next(size for size in range(math.isqrt(vocab_size - 1) + 1, vocab_size + 1) if vocab_size % size == 0)
    blocks = ops.add("Reshape", ops.add("Cast", mask, to=ir.DataType.FLOAT), np.array([0, vocab_size // width, width]))
    within = ops.add("CumSum", blocks, np.array(2), exclusive=1)
    sums = ops.sum(blocks, axis=2)
    return ops.add(
        "Reshape", ops.add("Add", within, ops.add("CumSum", sums, np.array(1), exclusive=1)), np.array([0, vocab_size])
    )
