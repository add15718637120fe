"""Standard ONNX graphs from a model's dimensions: no weight is read and none is allocated.

The modules are traced under fake tensors; constants are folded while every weight is still unknown (folding would
swallow it otherwise); `weights_attached` then points each initializer at the bundle's weights file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from mllama_runtime.config import MaskSemantics, ModelConfig, VisionStates
from mllama_runtime.contract import Shape, decoder_shapes, vision_shapes
from mllama_runtime.tensorfile import TensorInfo
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from mllama_exporter.graph_edit import IR_DTYPES, point_at
from mllama_exporter.modules import Decoder, VisionEncoder
from mllama_exporter.modules.text import inverse_frequencies

OPSET = 24  # the first with TensorScatter and with Attention's nonpad_kv_seqlen
IR_VERSION = 10
PRODUCER = "mllama-deploy"


def vision_graph_from_config(config: ModelConfig, dtype: torch.dtype, vision_states: VisionStates) -> ir.Model:
    """`vision.onnx`: pictures -> keys and values of every cross-attention layer (design: the vision graph)."""
    vision, (inputs, outputs) = config.vision, vision_shapes(config)
    images = Dim("images")
    with _fake_weights(dtype):
        module = VisionEncoder(config, vision_states)
        arguments = (
            torch.zeros(2, *_static(inputs["pixel_values"][1:]), dtype=torch.float32),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, vision.max_num_tiles, dtype=torch.int64),
        )
        model = _traced(module, arguments, tuple({0: images} for _ in arguments))
    return _finished(model, "vision", inputs, outputs, {})


def decoder_graph_from_config(config: ModelConfig, dtype: torch.dtype, mask_semantics: MaskSemantics) -> ir.Model:
    """`decoder.onnx`: new tokens, caches and cross keys and values -> logits and caches (design: the decoder graph)."""
    text, num_patches = config.text, config.vision.num_patches
    inputs, outputs = decoder_shapes(config)
    batch, seq, num_logits, cache_len = Dim("batch"), Dim("seq"), Dim("num_logits"), Dim("cache_len")
    cross_rows, num_tiles = Dim("cross_rows"), Dim("num_tiles")
    num_past, num_cross = 2 * len(text.self_attention_layers), 2 * len(config.cross_layers)
    with _fake_weights(dtype):
        module = Decoder(config, mask_semantics)
        arguments = (
            torch.zeros(5, 3, dtype=torch.int64),
            *(torch.zeros(5, dtype=torch.int64) for _ in range(2)),
            torch.zeros(5, 4, dtype=torch.int64),
            None if config.is_text_only else (torch.zeros(5, 3, 2, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)),
            [torch.zeros(5, text.num_kv_heads, 16, text.head_dim, dtype=dtype) for _ in range(num_past)],
            [torch.zeros(2, text.num_kv_heads, 2 * num_patches, text.head_dim, dtype=dtype) for _ in range(num_cross)],
        )
        dynamic_shapes = (
            {0: batch, 1: seq},
            *({0: batch} for _ in range(2)),
            {0: batch, 1: num_logits},
            None if config.is_text_only else ({0: batch, 1: seq, 2: num_tiles}, {0: batch}),
            [{0: batch, 2: cache_len}] * num_past,
            [{0: cross_rows, 2: num_patches * num_tiles}] * num_cross,
        )
        model = _traced(module, arguments, dynamic_shapes)
    constants = {"inv_freq": inverse_frequencies(text.rope, text.head_dim).numpy()}
    return _finished(model, "decoder", inputs, outputs, constants)


def weight_names(model: ir.Model) -> list[str]:
    """Names of the checkpoint's tensors a graph from this module uses, in the order of first use."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def weights_attached(model: ir.Model, located: Mapping[str, tuple[str, TensorInfo]]) -> ir.Model:
    """Point every weight at its bytes in a weights file (ONNX external data), in place; returns the model.

    located: file and place by name.
    """
    for name in weight_names(model):
        location, tensor = located[name]
        point_at(model.graph.initializers[name], tensor, IR_DTYPES[tensor.dtype], location)
    return model


def _static(shape: Shape) -> tuple[int, ...]:
    return tuple(dim for dim in shape if isinstance(dim, int))


@contextmanager
def _fake_weights(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have parameters of `dtype` with a shape and no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_default_dtype(before)


def _traced(module: torch.nn.Module, arguments: tuple[object, ...], dynamic_shapes: tuple[object, ...]) -> ir.Model:
    """Trace, translate, forget the fake weights, then fold what is constant."""
    program = torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes)
    with _quiet():
        exported = torch.onnx.export(program, opset_version=OPSET, optimize=False, verbose=False)
        if exported is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        model = exported.model
        for value in model.graph.initializers.values():
            if value.name in program.state_dict:
                value.const_value = None
        onnxscript.optimizer.optimize_ir(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's and the optimizer's notices are about absent optional packages and absent weights."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _finished(
    model: ir.Model,
    name: str,
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    constants: Mapping[str, np.ndarray],
) -> ir.Model:
    """Give inputs and outputs their public names and shapes, and drop what tracing left behind (paths, shapes).

    What remains depends on the configuration alone, so the same export gives the same bytes.
    """
    graph = model.graph
    public = {**inputs, **outputs}
    for value, (public_name, shape) in zip(
        [*graph.inputs, *graph.outputs], [*inputs.items(), *outputs.items()], strict=True
    ):
        value.name, value.shape = public_name, ir.Shape(shape)
    for constant_name, array in constants.items():
        graph.initializers[constant_name].const_value = ir.tensor(array, name=constant_name)
    for index, node in enumerate(graph):
        node.name = f"{node.op_type}_{index}"
        node.doc_string = None
        node.metadata_props.clear()
        node.meta.clear()
        for output_index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value.name not in public:
                value.name, value.type, value.shape = f"{node.name}_output_{output_index}", None, None
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, graph.doc_string = name, None
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, PRODUCER, None
    model.doc_string = None
    return model
