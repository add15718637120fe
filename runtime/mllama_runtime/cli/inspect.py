"""`mllama inspect`: what a bundle holds, read from its manifest and from the records of its engines."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.config import ModelConfig, VisionStates
from mllama_runtime.engine_record import EngineRecord, GraphEngine, read_record
from mllama_runtime.fields import printable, to_plain
from mllama_runtime.manifest import GraphSpec, Manifest, Quantization, TensorSpec

Rows = list[tuple[str, ...]]
_STATES: Mapping[VisionStates, str] = {
    "published": "before each listed block, as Llama 3.2 Vision was trained",
    "transformers-4.56": "after each listed block, as in transformers since 4.56; wrong for the published weights",
}


@click.command(epilog=example("mllama inspect my-bundle", "mllama inspect my-bundle --json | jq .manifest.model"))
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Show a bundle's dimensions, graphs, engines, files, precision, semantics and verdict.

    The files are checked quickly first; `mllama verify` does it in full.
    """
    opened = Bundle.open(bundle)
    total = sum(entry.size_bytes for entry in opened.manifest.files.values())
    records = [read_record(opened, entry) for entry in opened.manifest.engines]
    if as_json:
        plain = {"manifest": to_plain(opened.manifest), "engines": to_plain(records)}
        click.echo(json.dumps({"bundle": str(opened.root), "total_size_bytes": total, **plain}))
        return
    manifest = opened.manifest
    sections = [
        ("", _summary(manifest)),
        ("model", _model(manifest.model)),
        *((f"graph {key}: {graph.file}", _graph(graph)) for key, graph in sorted(manifest.graphs.items())),
        *((f"engine {record.key[:12]}", _engine(record)) for record in records),
        ("files", [*_files(manifest), ("total", f"{total:,} bytes", "")]),
    ]
    click.echo(printable(opened.manifest.name) + "\n" + "\n".join(_section(title, rows) for title, rows in sections))


def _summary(manifest: Manifest) -> Rows:
    source, weights, verdict = manifest.source, manifest.weights, manifest.validation
    rows: Rows = [
        ("precision", manifest.precision),
        *_quantization(manifest.quantization),
        ("mask semantics", manifest.mask_semantics),
        *_vision_states(manifest),
        ("source", f"{source.format}, {source.num_tensors:,} tensors, {source.num_parameters:,} parameters"),
        ("fingerprint", source.fingerprint),
        (
            "weights",
            f"largest {weights.largest_abs:g}, {weights.num_clamped} clamped, {weights.num_nonfinite} not finite",
        ),
        ("options", _pairs(manifest.options.items())),
        ("tools", _pairs(manifest.tools.items())),
        ("engines", ", ".join(f"{engine.key[:12]} ({engine.backend})" for engine in manifest.engines) or "none"),
    ]
    if verdict is None:
        rows.append(("validation", "none; run `mllama validate`"))
    else:
        counts = f"{verdict.num_failed} of {verdict.num_checks} checks failed"
        rows.append(("validation", f"{verdict.verdict}: {counts} against {verdict.reference}; see {verdict.report}"))
    return rows


def _vision_states(manifest: Manifest) -> Rows:
    if manifest.model.is_text_only:
        return []
    return [("vision states", f"{manifest.vision_states} ({_STATES[manifest.vision_states]})")]


def _quantization(made: Quantization | None) -> Rows:
    if made is None:
        return []
    data = made.calibration
    seen = f"{data.num_samples} questions, {data.num_images} pictures, {data.num_tokens} tokens" if data else "none"
    kept = f"{len(made.kept)} matrices" + (f", {made.kept[0]} the first" if made.kept else "")
    return [("quantized from", f"{made.base}; vision {made.vision or 'kept'}"), ("kept", kept), ("calibration", seen)]


def _model(model: ModelConfig) -> Rows:
    vision, text = model.vision, model.text
    rope = f"{text.rope.rope_type}, theta {text.rope.theta:g}"
    rows: Rows = [
        ("", "vision", "text"),
        ("hidden size", f"{vision.hidden_size}", f"{text.hidden_size}"),
        ("intermediate size", f"{vision.intermediate_size}", f"{text.intermediate_size}"),
        ("layers", f"{vision.num_layers} + {vision.num_global_layers} global", f"{text.num_layers}"),
        ("heads x size", f"{vision.num_heads} x {vision.head_dim}", f"{text.num_heads} x {text.head_dim}"),
        ("KV heads", "", f"{text.num_kv_heads}"),
        ("cross-attention", "", ", ".join(map(str, text.cross_attention_layers))),
        ("vocabulary", "", f"{text.vocab_size}"),
        ("max length", "", f"{text.max_seq_len} tokens"),
        ("RoPE", "", rope),
        ("image", f"{vision.image_size} px, patch {vision.patch_size}, {vision.max_num_tiles} tiles", ""),
        ("rows per tile", f"{vision.num_patches}", ""),
    ]
    if not model.is_text_only:
        return rows
    left_out = f"vision, and layers {', '.join(map(str, text.cross_attention_layers))}"
    of_text = [(title, value) for title, _, value in rows if value and title != "cross-attention"]
    return [*of_text, ("left out", left_out)]


def _graph(graph: GraphSpec) -> Rows:
    return [row for side, specs in (("in", graph.inputs), ("out", graph.outputs)) for row in _tensors(side, specs)]


def _tensors(side: str, specs: Iterable[TensorSpec]) -> Rows:
    """One row for tensors that differ in their layer alone."""
    shapes = Counter(
        (re.sub(r"_\d+$", "_*", spec.name), spec.dtype, f"[{', '.join(map(str, spec.shape))}]") for spec in specs
    )
    return [
        (side, name, dtype, shape, f"x {count}" if count > 1 else "") for (name, dtype, shape), count in shapes.items()
    ]


def _engine(record: EngineRecord) -> Rows:
    inputs, limits = record.inputs, record.inputs.limits
    extras = [("stripped of weights", inputs.strip_weights), ("streams weights", inputs.weight_streaming)]
    built_for = ", ".join(inputs.compute_capabilities) or "every GPU the back end supports"
    rows: Rows = [
        ("built by", f"{inputs.backend} {inputs.version}", ", ".join(name for name, chosen in extras if chosen)),
        ("built for", built_for, ""),
        (
            "limits",
            f"batch {limits.max_batch}, {limits.max_seq_len} tokens, chunks of {limits.prefill_chunk}, "
            f"{limits.max_tiles} tiles",
            "",
        ),
    ]
    for graph, engine in record.engines.items():
        rows += [
            (graph, f"{engine.size_bytes:,} bytes, weights {engine.weights_bytes:,}", ""),
            ("", f"activations {engine.activation_bytes:,} bytes at most", ""),
            ("", f"kernels: {_kernels(engine)}", ""),
            *((f"  {found.check}", found.detail, "") for found in engine.findings),
        ]
    return rows


def _kernels(engine: GraphEngine) -> str:
    """How many of each class, such as "12 gemm, 5 attention"; attention is told by its name alone."""
    kinds = Counter("attention" if "_mha_" in kernel.name else kernel.kind for kernel in engine.kernels)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "not told"


def _files(manifest: Manifest) -> Rows:
    return [(name, f"{entry.size_bytes:,} bytes", entry.sha256[:12]) for name, entry in sorted(manifest.files.items())]


def _pairs(items: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(items)) or "none"


def _section(title: str, rows: Rows) -> str:
    """Rows in columns as wide as their widest entry; the last is left as it is, and sizes are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"\n{title}"] if title else []
    for row in rows:
        cells = [
            cell.rjust(width) if cell.endswith(" bytes") else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(printable("  " + "  ".join(cells).rstrip()))
    return "\n".join(lines)
