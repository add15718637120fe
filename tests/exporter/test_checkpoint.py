"""A checkpoint folder: both key spellings, every layout on disk, and faults 1 to 4, 8, 9 and 11 of a bad day."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mllama_exporter.checkpoints.checkpoint import Checkpoint, expected_tensors, published_name, truncate
from mllama_exporter.checkpoints.hf_config import model_config_from_hf
from mllama_runtime.config import check_model
from mllama_runtime.errors import CheckpointError, UsageError
from safetensors.torch import save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ._checkpoints import (
    TINY,
    as_transformers_5,
    full_size,
    read_index,
    tiny,
    tiny_tensors,
    write_checkpoint,
    write_index,
)

LM_HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"


def refused(folder: Path) -> str:
    """What opening and checking a folder says."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_transformers_5(name: str) -> str:
    """The new spelling of a published name, from the description of the renaming."""
    if name == LM_HEAD:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def sized(config: dict[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    (folder / "config.json").write_text(json.dumps(config))
    return expected_tensors(model_config_from_hf(folder))


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(
            text={"num_hidden_layers": 3, "cross_attention_layers": [0], "num_key_value_heads": 4},
            vision={
                "image_size": 56,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [2, 1]],
                "intermediate_layers_indices": [1],
                "vision_output_dim": 64,
            },
        ),
        full_size(),
        full_size(image_size=448),
        full_size(large=True),
        full_size(image_size=448, large=True),
    ],
    ids=["tiny", "other tiny", "11B Instruct", "11B base", "90B Instruct", "90B base"],
)
def test_expected_tensors_are_the_references(tmp_path: Path, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference = MllamaForConditionalGeneration(MllamaConfig.from_dict(config)).state_dict()
    expected = sized(config, tmp_path)
    assert {published_name(name): tuple(tensor.shape) for name, tensor in reference.items()} == expected
    assert {in_transformers_5(name) for name in expected} == set(reference)


@pytest.mark.parametrize("original", [True, False], ids=["published", "transformers 5"])
def test_what_transformers_saves_is_read(tmp_path: Path, original: bool) -> None:
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(tiny()))
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size="60KB")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert len(checkpoint.shards) > 1
    stored = {name for shard in checkpoint.shards for name in shard.tensors}
    assert (LM_HEAD in stored) is original
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(checkpoint.read(published_name(name)), tensor.numpy())


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_spellings_hold_the_same(tmp_path: Path, num_shards: int, dtype: torch.dtype) -> None:
    tensors = tiny_tensors()
    renamed = {in_transformers_5(name): tensor for name, tensor in tensors.items()}
    published = write_checkpoint(tmp_path / "mit Leerzeichen und ümläut" / "a", dtype=dtype, num_shards=num_shards)
    current = write_checkpoint(
        tmp_path / "b", renamed, config=as_transformers_5(TINY), dtype=dtype, num_shards=num_shards
    )
    checkpoints = [Checkpoint.open(published), Checkpoint.open(current)]
    for name, tensor in tensors.items():
        for checkpoint in checkpoints:
            array = checkpoint.read(name)
            assert array.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(array.astype(np.float32), tensor.to(dtype).float().numpy())
    for checkpoint in checkpoints:
        checkpoint.check()
        checkpoint.assert_unchanged()


def test_the_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    """The Hugging Face cache: blobs named by hash, and a snapshot of relative links to them."""
    source = write_checkpoint(tmp_path / "source", num_shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(source.iterdir())):
        shutil.move(path, blobs / f"{index:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:040}")
    checkpoint = Checkpoint.open(snapshot)
    checkpoint.check()
    np.testing.assert_array_equal(
        checkpoint.read(NORM).astype(np.float32), tiny_tensors()[NORM].bfloat16().float().numpy()
    )


@pytest.mark.parametrize("kept", [-1, 0, 7, 8, 100])
def test_a_truncated_shard_is_named_with_its_bytes(tmp_path: Path, kept: int) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    kept = size - 1 if kept == -1 else kept
    os.truncate(shard, kept)
    message = refused(folder)
    assert "model-00002-of-00002.safetensors" in message
    assert f"found {kept} bytes" in message
    assert "expected" in message


@pytest.mark.parametrize("length", [0, 100_000_001, 2**63, 2**64 - 1])
def test_an_impossible_header_is_refused(tmp_path: Path, length: int) -> None:
    folder = write_checkpoint(tmp_path / "c")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    message = refused(folder)
    assert "model.safetensors" in message
    assert str(length) in message


def test_all_absent_shards_are_listed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=5)
    for index in (2, 4):
        (folder / f"model-0000{index}-of-00005.safetensors").unlink()
    message = refused(folder)
    assert "2 of 5 shards" in message
    assert "model-00002-of-00005.safetensors, model-00004-of-00005.safetensors" in message


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    weight_map = read_index(folder)
    moved = weight_map[NORM]
    weight_map[NORM] = next(shard for shard in weight_map.values() if shard != moved)
    write_index(folder, weight_map)
    message = refused(folder)
    assert f"{weight_map[NORM]} lacks '{NORM}'" in message
    assert f"{moved} holds '{NORM}' beyond the index" in message

    weight_map.pop(NORM)
    write_index(folder, weight_map)
    assert f"holds '{NORM}' beyond the index" in refused(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    weight_map = read_index(folder)
    other = next(shard for shard in sorted(set(weight_map.values())) if shard != weight_map[NORM])
    held = {name: tiny_tensors()[name].bfloat16() for name, shard in weight_map.items() if shard == other}
    save_file(held | {NORM: tiny_tensors()[NORM].bfloat16()}, folder / other)
    assert NORM in refused(folder)


def test_a_tensor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny_tensors(), in_transformers_5(NORM): tiny_tensors()[NORM].clone()}
    message = refused(write_checkpoint(tmp_path / "c", tensors))
    assert "stored twice" in message
    assert NORM in message


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        "model.safetensors",
        {NORM: None},
        {NORM: "../model.safetensors"},
        {NORM: "/etc/passwd"},
        {NORM: "model.bin"},
        {NORM: ""},
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, weight_map: object) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    write_index(folder, weight_map)
    assert "model.safetensors.index.json: weight_map" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refused(folder)
    assert "pickled" in message
    assert name in message
    assert "safetensors" in message


def test_folders_without_whole_weights_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "no weights" in refused(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    message = refused(tmp_path)
    assert "adapter_model.safetensors" in message
    assert "merge" in message


def test_single_file_and_index_together_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")
    assert "both" in refused(folder)


def test_missing_left_over_and_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = dict(tiny_tensors())
    del tensors[NORM]
    tensors["language_model.model.layers.4.mlp.up_proj.weight"] = torch.ones(2)
    tensors[LM_HEAD] = torch.ones(72, 32)
    tensors["vision_model.class_embedding"] = torch.ones(32, dtype=torch.int64)
    message = refused(write_checkpoint(tmp_path / "c", tensors))
    assert f"missing {NORM} [32]" in message
    assert "left over 'language_model.model.layers.4.mlp.up_proj.weight'" in message
    assert f"{LM_HEAD} of shape [72, 32] instead of [64, 32]" in message
    assert "vision_model.class_embedding of dtype I64 instead of BF16 or F16 or F32" in message


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    """Eight cross-attention layers where the checkpoint has two: the fault that built models without a word."""
    layers = tiny(text={"num_hidden_layers": 16, "cross_attention_layers": [1, 3, 5, 7, 9, 11, 13, 15]})
    message = refused(write_checkpoint(tmp_path / "c", config=layers))
    assert message.count("missing ") == 10
    assert "and 122 more" in message  # 6 * 13 of cross-attention layers and 6 * 9 of the others, ten of them listed


def test_the_embedding_has_eight_rows_more_than_the_vocabulary(tmp_path: Path) -> None:
    name = "language_model.model.embed_tokens.weight"
    assert Checkpoint.open(write_checkpoint(tmp_path / "a")).info(name).shape == (72, 32)
    short = {**tiny_tensors(), name: tiny_tensors()[name][:64].clone()}
    assert f"{name} of shape [64, 32] instead of [72, 32]" in refused(write_checkpoint(tmp_path / "b", short))


def test_reading_never_gives_less_than_was_asked(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    checkpoint = Checkpoint.open(folder)
    last = max(checkpoint.shards[0].tensors.values(), key=lambda info: info.offset_bytes)
    os.truncate(folder / "model.safetensors", checkpoint.shards[0].size_bytes - 1)
    with pytest.raises(CheckpointError, match=rf"ends within {last.name}: expected {last.size_bytes} bytes, found"):
        checkpoint.read(last.name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"cannot read {last.name}"):
        checkpoint.read(last.name)


def test_reading_what_is_not_there_or_not_float(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c", {NORM: torch.ones(3, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: no such tensor"):
        checkpoint.read(LM_HEAD)
    with pytest.raises(CheckpointError, match="not a float tensor"):
        checkpoint.read(NORM)


def touch(folder: Path) -> str:
    os.utime(folder / "model-00002-of-00002.safetensors", ns=(0, 0))
    return "model-00002-of-00002.safetensors"


def replace(folder: Path) -> str:
    """Another file of the same size and time in its place."""
    path = folder / "model-00001-of-00002.safetensors"
    stat = path.stat()
    shutil.copy2(path, folder / "other")
    (folder / "other").rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path.name


def rewrite_config(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return "config.json"


@pytest.mark.parametrize("change", [touch, replace, rewrite_config])
def test_a_change_since_opening_is_noticed(tmp_path: Path, change: Any) -> None:
    folder = write_checkpoint(tmp_path / "c", num_shards=2)
    checkpoint = Checkpoint.open(folder)
    checkpoint.assert_unchanged()
    name = change(folder)
    with pytest.raises(CheckpointError, match=f"changed while it was read: {name}"):
        checkpoint.assert_unchanged()


def test_a_file_gone_since_opening_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.assert_unchanged()


def test_the_fingerprint_is_of_the_checkpoint_not_of_its_place(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", num_shards=2)
    before = Checkpoint.open(folder).fingerprint
    assert len(before) == 64
    assert Checkpoint.open(Path(shutil.copytree(folder, tmp_path / "b"))).fingerprint == before
    others = [
        write_checkpoint(tmp_path / "c", num_shards=3),
        write_checkpoint(tmp_path / "d", num_shards=2, dtype=torch.float16),
        write_checkpoint(tmp_path / "e", num_shards=2, config=tiny(text={"rope_theta": 10000.0})),
    ]
    assert len({before, *(Checkpoint.open(other).fingerprint for other in others)}) == 4


def test_truncation_keeps_the_first_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c"))
    config = truncate(checkpoint.config, 3)
    check_model(config, where="truncated", error=CheckpointError)
    assert (config.text.num_layers, config.text.cross_attention_layers) == (3, (1,))
    dropped = expected_tensors(checkpoint.config).keys() - expected_tensors(config).keys()
    assert dropped
    assert all(name.startswith("language_model.model.layers.3.") for name in dropped)
    checkpoint.check(config)  # what was dropped is not left over
    assert truncate(checkpoint.config, 4) == checkpoint.config


def test_a_truncated_model_may_lack_what_was_dropped(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if ".layers.3." not in name}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c", tensors))
    checkpoint.check(truncate(checkpoint.config, 3))
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.check()


@pytest.mark.parametrize("num_layers", [-1, 0, 1, 5])
def test_truncation_that_leaves_no_model_is_refused(tmp_path: Path, num_layers: int) -> None:
    config = Checkpoint.open(write_checkpoint(tmp_path / "c")).config
    with pytest.raises(UsageError, match="expected 2 to 4"):
        truncate(config, num_layers)
