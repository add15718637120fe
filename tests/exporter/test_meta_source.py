"""Meta's own files: the miniature in Meta's form gives the bundle that it gives in Hugging Face's, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mllama_exporter.checkpoints import checkpoint_from_folder
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.validate import report_from_bundle
from mllama_exporter.validate.samples import builtin_samples
from mllama_runtime import CheckpointError
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from safetensors.torch import load_file, save_file

TABLES = (
    "vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision_model.pre_tile_positional_embedding.embedding.weight",
    "vision_model.post_tile_positional_embedding.embedding.weight",
)
# Meta's names of what stands outside of layers, and of a layer's parts.
NAMES = {
    "language_model.model.norm.weight": "text_model.norm.weight",
    "language_model.lm_head.weight": "text_model.output.weight",
    "multi_modal_projector.weight": "vision_model.vision_projection.weight",
    "multi_modal_projector.bias": "vision_model.vision_projection.bias",
    "vision_model.class_embedding": "vision_model.vision_encoder.class_embedding",
    "vision_model.patch_embedding.weight": "vision_model.vision_encoder.conv1._linear.weight",
    "vision_model.gated_positional_embedding.embedding": "vision_model.vision_encoder.positional_embedding",
    "vision_model.gated_positional_embedding.gate": "vision_model.vision_encoder.gated_positional_embedding_gate",
    "vision_model.pre_tile_positional_embedding.gate": "vision_model.vision_encoder.pre_tile_pos_embed.gate",
    "vision_model.post_tile_positional_embedding.gate": "vision_model.vision_encoder.post_tile_pos_embed.gate",
    TABLES[0]: "vision_model.vision_encoder.gated_positional_embedding",
    TABLES[1]: "vision_model.vision_encoder.pre_tile_pos_embed.embedding",
    TABLES[2]: "vision_model.vision_encoder.post_tile_pos_embed.embedding",
    **{
        f"vision_model.layernorm_{place}.{part}": f"vision_model.vision_encoder.ln_{place}.{part}"
        for place in ("pre", "post")
        for part in ("weight", "bias")
    },
}
TEXT_PARTS = {
    **{f"{kind}_attn.{side}_proj.weight": f"attention.w{side}.weight" for kind in ("self", "cross") for side in "qkvo"},
    **{f"cross_attn.{side}_norm.weight": f"attention.{side}_norm.weight" for side in "qk"},
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "cross_attn_attn_gate": "gate_attn",
    "cross_attn_mlp_gate": "gate_ffwd",
}
VISION_PARTS = {
    **{f"self_attn.{side}_proj.weight": f"attn.w{side}.weight" for side in "qkvo"},
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "gate_attn": "gate_attn",
    "gate_ffn": "gate_ffn",
}
SPLIT_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight", "attn.wo.weight", "mlp.c_proj.weight")
WHOLE = ("norm", "ln_", "gate", "embedding", "embed.", "c_proj.bias")  # the same on every rank


def tables(config: ModelConfig, shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A table by row and column of a tile, as Meta has it, and the one by aspect ratio that is made of it."""
    tiles = config.vision.max_num_tiles
    width = shape[1] // tiles
    by_place = torch.randn(tiles, tiles, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    by_ratio = torch.zeros(shape[0], tiles, width, dtype=torch.bfloat16)
    for index, (high, wide) in enumerate(config.vision.supported_aspect_ratios, start=1):
        for tile in range(high * wide):
            by_ratio[index, tile] = by_place[tile // wide, tile % wide]
    return by_place, by_ratio.reshape(shape)


def meta_name(name: str, config: ModelConfig) -> str:
    parts = name.split(".")
    if name.startswith("language_model.model.layers."):
        layer, part = int(parts[3]), ".".join(parts[4:])
        cross = config.text.cross_attention_layers
        kind = "cross_attention_layers" if layer in cross else "layers"
        number = (cross if layer in cross else config.text.self_attention_layers).index(layer)
        return f"text_model.{kind}.{number}.{TEXT_PARTS[part]}"
    if "layers" in parts:
        tower, layer, part = parts[1], parts[3], ".".join(parts[4:])
        known = next(each for each in VISION_PARTS if part == each or part.startswith(f"{each}."))
        return f"vision_model.vision_encoder.{tower}.resblocks.{layer}.{VISION_PARTS[known]}{part[len(known) :]}"
    return NAMES[name]


def unpermuted(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a head from halves to pairs: first half and second half, one from each in turn."""
    heads = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def write_meta(folder: Path, num_ranks: int) -> None:
    """From the Hugging Face checkpoint in a folder: its tables made such that Meta can have them, and `original/`."""
    config = Checkpoint.open(folder).config
    shards = {path: load_file(path) for path in folder.glob("*.safetensors")}
    given = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    by_place = {}
    for seed, name in enumerate(TABLES):
        by_place[name], given[name] = tables(config, given[name].shape, seed)
    for path, shard in shards.items():
        save_file({name: given[name] for name in shard}, path, metadata={"format": "pt"})

    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(num_ranks)]
    for name, tensor in given.items():
        if name == "language_model.model.embed_tokens.weight":
            pieces = {
                "text_model.tok_embeddings.weight": tensor[: config.text.vocab_size],
                "text_model.learnable_embedding.weight": tensor[config.text.vocab_size :],
            }
        else:
            key, value = meta_name(name, config), tensor
            if name in by_place:
                vision = config.vision
                patches = vision.num_patches if name == TABLES[0] else 1
                value = by_place[name].reshape(vision.max_num_tiles, vision.max_num_tiles, patches, -1)
            elif key.startswith("text_model.layers.") and key.endswith(("wq.weight", "wk.weight")):
                value = unpermuted(tensor, config.text.head_dim)
            elif key.endswith("conv1._linear.weight"):
                value = tensor.flatten(1)
            pieces = {key: value}
        for key, value in pieces.items():
            if key.endswith(SPLIT_COLUMNS):
                parts = value.chunk(num_ranks, dim=1)
            elif any(word in key for word in WHOLE) and not key.endswith(
                ("tok_embeddings.weight", "learnable_embedding.weight")
            ):
                parts = (value,) * num_ranks
            else:
                parts = value.chunk(num_ranks, dim=0)
            for rank, part in zip(ranks, parts, strict=True):
                rank[key] = part.clone()
    text = config.text
    params = {
        "dim": text.hidden_size,
        "n_layers": len(text.self_attention_layers),
        "n_heads": text.num_heads,
        "n_kv_heads": text.num_kv_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope.theta,
        "vision_chunk_size": config.vision.image_size,
        "vision_max_num_chunks": config.vision.max_num_tiles,
        "vision_num_cross_attention_layers": len(text.cross_attention_layers),
    }
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text(json.dumps(params))
    for index, rank in enumerate(ranks):
        rank["text_model.rope.freqs"] = torch.zeros(4)
        torch.save(rank, folder / "original" / f"consolidated.{index:02}.pth")


@pytest.fixture
def meta_of(miniature: Path, tmp_path: Path) -> Callable[[int], Path]:
    def make(num_ranks: int) -> Path:
        folder = shutil.copytree(miniature, tmp_path / "checkpoint")
        write_meta(folder, num_ranks)
        return folder

    return make


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_bundle_comes_of_either_form(num_ranks: int, meta_of: Callable[[int], Path], tmp_path: Path) -> None:
    """Of eight ranks the miniature has too few heads; how parts make a whole does not depend on their number."""
    folder = meta_of(num_ranks)
    options = ExportOptions(precision="bf16")
    expected = bundle_from_checkpoint(folder, tmp_path / "hf", options)
    found = bundle_from_checkpoint(folder / "original", tmp_path / "meta", options)
    assert found.manifest.files == expected.manifest.files
    assert (found.manifest.source.format, expected.manifest.source.format) == ("meta", "hf")
    assert found.manifest.name == expected.manifest.name
    assert found.verify(full=True).problems == ()
    assert Bundle.open(found.root).manifest == found.manifest
    few = [sample for sample in builtin_samples(found.manifest.model.vision) if sample.name == "text_before_picture"]
    report = report_from_bundle(found, folder / "original", samples=few, max_steps=4)
    assert report.verdict == "pass", report.summary


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (lambda o: (o / "consolidated.00.pth").unlink(), "not a whole set of files"),
    "truncated": (
        lambda o: (o / "consolidated.01.pth").write_bytes((o / "consolidated.01.pth").read_bytes()[:-1000]),
        r"consolidated\.01\.pth: cannot be read as weights",
    ),
    "empty": (
        lambda o: (o / "consolidated.01.pth").write_bytes(b""),
        r"consolidated\.01\.pth: cannot be read as weights",
    ),
    "other parameters": (
        lambda o: (o / "params.json").write_text(
            (o / "params.json").read_text().replace('"n_heads": 4', '"n_heads": 8')
        ),
        r"params\.json: n_heads: not what config\.json says: expected 4, found 8",
    ),
    "no config": (lambda o: (o.parent / "config.json").unlink(), "no config.json beside Meta's files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, meta_of: Callable[[int], Path]) -> None:
    folder = meta_of(2) / "original"
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_from_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rank: rank.pop("text_model.norm.weight"), r"lacks text_model\.norm\.weight"),
        (
            lambda rank: rank.update({"text_model.norm.weight": torch.zeros(3)}),
            r"text_model\.norm\.weight: of another shape",
        ),
        (lambda rank: rank.update(extra=torch.zeros(3)), "holds what no layer of the model has: 'extra'"),
        (lambda rank: rank.update(extra=Path("x")), "cannot be read as weights"),  # a pickle of something else
    ],
)
def test_tensors_that_are_not_the_models(
    change: Callable[[dict[str, object]], object], message: str, meta_of: Callable[[int], Path]
) -> None:
    path = meta_of(1) / "original" / "consolidated.00.pth"
    rank = torch.load(path, weights_only=True)
    change(rank)
    torch.save(rank, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_from_folder(path.parent)


def test_nothing_in_a_pickle_runs(meta_of: Callable[[int], Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))  # type: ignore[return-value]

    path = meta_of(1) / "original" / "consolidated.00.pth"
    torch.save({"text_model.norm.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        checkpoint_from_folder(path.parent)
    assert not (tmp_path / "touched").exists()
