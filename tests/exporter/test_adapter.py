"""LoRA adapters merged on the way, against PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from mllama_exporter.checkpoints import checkpoint_from_folder
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.validate import report_from_bundle
from mllama_exporter.validate.samples import builtin_samples
from mllama_runtime import CheckpointError, InputError, UsageError
from mllama_runtime.bundle import Bundle
from safetensors.torch import load_file, save_file

TARGETS = ["q_proj", "v_proj", "down_proj", "fc1", "lm_head"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return transformers.MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def write_adapter(checkpoint: Path, folder: Path, **options: Any) -> Path:
    """An adapter of random numbers, written by PEFT; an untrained B would be zero."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS} | options)
    model = peft.get_peft_model(model_of(checkpoint), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(checkpoint: Path, adapter: Path, dtype: torch.dtype, output: Path) -> Path:
    model = peft.PeftModel.from_pretrained(model_of(checkpoint, dtype), adapter).merge_and_unload()
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(output)
    return output


def weights_of(bundle: Bundle) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def adapter(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(miniature, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def copy_of(adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copy")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"self_attn.q_proj": 3, "fc1": 40}},
    ],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_the_merge_is_pefts_to_the_last_bit(options: dict[str, Any], miniature: Path, tmp_path: Path) -> None:
    adapter = write_adapter(miniature, tmp_path / "adapter", **options)
    merged = merged_by_peft(miniature, adapter, torch.bfloat16, tmp_path / "merged")
    for precision in ("bf16", "fp32"):
        expected = bundle_from_checkpoint(
            merged, tmp_path / f"expected-{precision}", ExportOptions(precision=precision)
        )
        found = bundle_from_checkpoint(
            miniature, tmp_path / f"found-{precision}", ExportOptions(precision=precision, adapter=adapter)
        )
        plain = bundle_from_checkpoint(miniature, tmp_path / f"plain-{precision}", ExportOptions(precision=precision))
        assert weights_of(found) == weights_of(expected)
        assert weights_of(found) != weights_of(plain)
        assert found.manifest.options["adapter"] == "adapter"
        assert found.manifest.source.fingerprint != plain.manifest.source.fingerprint


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_checkpoints_of_other_types(dtype: str, miniature: Path, adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(miniature, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    model_of(miniature, DTYPES[dtype]).save_pretrained(base)
    merged = merged_by_peft(base, adapter, DTYPES[dtype], tmp_path / "merged")
    expected = bundle_from_checkpoint(merged, tmp_path / "expected", ExportOptions(precision=dtype))  # type: ignore[arg-type]
    options = ExportOptions(precision=dtype, adapter=adapter)  # type: ignore[arg-type]
    assert weights_of(bundle_from_checkpoint(base, tmp_path / "found", options)) == weights_of(expected)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict[str, torch.Tensor], side: str = "A") -> str:
    return sorted(name for name in tensors if f"lora_{side}" in name)[0]


def make_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = torch.nan


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "not a PEFT adapter"),
    "DoRA": (
        lambda folder: edit(folder, use_dora=True),
        "use_dora: not plain LoRA: found True; merge the adapter with",
    ),
    "biases": (lambda folder: edit(folder, bias="all"), "bias: not plain LoRA"),
    "modules": (lambda folder: edit(folder, modules_to_save=["lm_head"]), "modules_to_save: not plain LoRA"),
    "another kind": (lambda folder: edit(folder, peft_type="IA3"), "peft_type: not plain LoRA"),
    "a pattern": (lambda folder: edit(folder, rank_pattern={"(a+)+$": 4}), "rank_pattern: not a module's name"),
    "another rank": (lambda folder: edit(folder, r=5), "another rank than the weights have: expected 4, found 5"),
    "no alpha": (lambda folder: edit(folder, lora_alpha="many"), "lora_alpha: not a number"),
    "half": (lambda folder: change_weights(folder, lambda t: t.pop(first(t, "B"))), "holds what is not LoRA.*half of"),
    "others": (lambda folder: change_weights(folder, lambda t: t.update(x=torch.zeros(2))), "holds what is not LoRA"),
    "another width": (
        lambda folder: change_weights(folder, lambda t: t.update({first(t): torch.zeros(4, 3)})),
        "of another model: expected a product of shape",
    ),
    "another module": (
        lambda folder: change_weights(
            folder, lambda t: [t.__setitem__(n.replace("layers.0.", "layers.99."), t.pop(n)) for n in list(t)]
        ),
        "of another model: expected a matrix",
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1234567"),
        "adapter_model.safetensors: truncated",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_is_named(fault: str, copy_of: Path, miniature: Path) -> None:
    damage, message = FAULTS[fault]
    damage(copy_of)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_from_folder(miniature, copy_of)


def test_an_adapter_with_nan(copy_of: Path, miniature: Path, tmp_path: Path) -> None:
    change_weights(copy_of, make_nan)
    with pytest.raises(CheckpointError, match=r"NaN or Inf in the adapter"):
        bundle_from_checkpoint(miniature, tmp_path / "bundle", ExportOptions(adapter=copy_of))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_what_is_merged_cannot_be_moved(adapter: Path, miniature: Path, tmp_path: Path) -> None:
    options = ExportOptions(precision="bf16", adapter=adapter, weights="move")
    with pytest.raises(UsageError, match="its weights are made on the way, and cannot be moved"):
        bundle_from_checkpoint(miniature, tmp_path / "bundle", options)


def test_a_merged_bundle_is_validated_against_the_merged_model(miniature: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = bundle_from_checkpoint(miniature, tmp_path / "bundle", ExportOptions(adapter=adapter))
    with pytest.raises(InputError, match=r"not the checkpoint that .* was made from.*; give the adapter lora too"):
        report_from_bundle(bundle, miniature)
    few = [sample for sample in builtin_samples(bundle.manifest.model.vision) if sample.name.startswith("canvas_1")]
    report = report_from_bundle(bundle, miniature, adapter=adapter, samples=few, max_steps=4)
    assert report.verdict == "pass", report.summary
