"""The export pipeline: the same bytes every time, whole or not there, and what a checkpoint may get wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from mllama_exporter import export as export_module
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.licence import licence_notices
from mllama_runtime import CheckpointError, Engine, Request, RequestError, SamplingParams
from mllama_runtime.bundle import Bundle
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file


@pytest.fixture
def checkpoint(miniature: Path, tmp_path: Path) -> Path:
    """A copy of the miniature, to be damaged."""
    return shutil.copytree(miniature, tmp_path / "checkpoint")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def hashes(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(bundle.iterdir())}


def test_the_same_checkpoint_gives_the_same_bytes(miniature: Path, bundle_of, tmp_path: Path) -> None:
    again = bundle_from_checkpoint(miniature, tmp_path / "again", ExportOptions()).root
    assert hashes(again) == hashes(bundle_of())


def test_both_key_spellings_give_the_same_weights_and_graphs(checkpoint: Path, bundle_of, tmp_path: Path) -> None:
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_torch_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model.model."):
            name = name.replace("language_model.model.", "model.language_model.", 1)
        elif name.startswith("language_model.lm_head"):
            name = name.removeprefix("language_model.")
        else:
            name = f"model.{name}"
        renamed[name] = tensor
    save_file(renamed, checkpoint / "model.safetensors", {"format": "pt"})
    found = hashes(bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions()).root)
    expected = hashes(bundle_of())
    del found["manifest.json"], expected["manifest.json"]  # its source fingerprint is the files' own
    assert found == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_are_standard_onnx_over_one_weights_file(bundle_of, precision: str) -> None:
    bundle = bundle_of(precision)
    for name, domains in (("vision", {""}), ("decoder", {""}), ("decoder.ort", {"", "com.microsoft"})):
        onnx.checker.check_model(bundle / f"{name}.onnx", full_check=domains == {""})
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} == domains
        assert {opset.version for opset in model.opset_import if opset.domain == ""} == {24}
        external = [tensor for tensor in model.graph.initializer if tensor.data_location]
        assert {e.value for t in external for e in t.external_data if e.key == "location"} == {"weights.safetensors"}
        assert len(model.SerializeToString()) < 200_000
        assert "/" not in "".join(node.name + node.doc_string for node in model.graph.node)
    specs = Bundle.open(bundle).manifest.graphs
    width = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    prefixes = ("past_", "cross_key", "cross_value")
    caches = {spec.dtype for spec in specs["decoder"].inputs if spec.name.startswith(prefixes)}
    assert caches == {width}
    assert specs["decoder"].outputs[0].dtype == "float32"
    assert {spec.dtype for spec in specs["decoder_ort"].inputs if spec.name.startswith("past_")} == {"float32"}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_weights_are_the_checkpoints(bundle_of, miniature: Path, precision: str, dtype: type) -> None:
    written = load_file(bundle_of(precision) / "weights.safetensors")
    source = {}
    for shard in miniature.glob("*.safetensors"):
        source |= load_torch_file(shard)
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert np.array_equal(written[name], tensor.float().numpy().astype(dtype)), name


def test_the_mask_semantics_change_the_decoder_alone(bundle_of) -> None:
    hf, meta = hashes(bundle_of("fp32", "hf")), hashes(bundle_of("fp32", "meta"))
    different = {name for name in hf if hf[name] != meta[name]}
    assert different == {"decoder.onnx", "decoder.ort.onnx", "decoder.cuda.onnx", "manifest.json"}
    assert Bundle.open(bundle_of("fp32", "meta")).manifest.mask_semantics == "meta"


def test_the_vision_states_change_the_vision_graph_alone(bundle_of) -> None:
    published, after = (hashes(bundle_of(vision_states=states)) for states in ("published", "transformers-4.56"))
    different = {name for name in published if published[name] != after[name]}
    assert different == {"vision.onnx", "vision.ort.onnx", "vision.cuda.onnx", "manifest.json"}
    assert Bundle.open(bundle_of(vision_states="transformers-4.56")).manifest.vision_states == "transformers-4.56"


def test_a_truncated_model_runs(miniature: Path, tmp_path: Path) -> None:
    bundle = bundle_from_checkpoint(miniature, tmp_path / "short", ExportOptions(num_layers=3))
    assert bundle.manifest.model.text.num_layers == 3
    assert bundle.manifest.options["num_layers"] == 3
    with Engine.load(bundle.root, num_threads=1) as engine:
        assert len(engine.generate("Hello", sampling=SamplingParams(max_new_tokens=2)).token_ids) in (1, 2)


def test_a_base_model_without_chat_template_continues_text(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint.rename(tmp_path / "any\n\x1b[31mname")  # whatever the folder is called
    (checkpoint / "chat_template.jinja").unlink()
    edit(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert "chat_template.jinja" not in bundle.manifest.files
    with Engine.load(bundle.root, num_threads=1) as engine:
        prompt = engine.prompt(Request("The circle is"))
        assert prompt.token_ids[0] == engine.tokenizer.bos_token_id
        assert engine.tokenizer.decode(prompt.token_ids) == "The circle is"
        with pytest.raises(RequestError, match="no chat template"):
            engine.generate([{"role": "user", "content": "Hello"}])
        with pytest.raises(RequestError, match="system"):
            engine.generate("Hello", system="Be short.")


def test_older_places_of_the_chat_template_are_read(checkpoint: Path, bundle_of, tmp_path: Path) -> None:
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert bundle.path("chat_template.jinja").read_bytes() == (bundle_of() / "chat_template.jinja").read_bytes()


FAULTS = {
    "another image token": ("config.json", lambda c: c.update(image_token_index=7), "<\\|image\\|> has another id"),
    "another tile size": (
        "preprocessor_config.json",
        lambda c: c.update(size={"height": 112, "width": 112}),
        "size: not what config.json says: expected 56, found 112",
    ),
    "more tiles": ("preprocessor_config.json", lambda c: c.update(max_image_tiles=2), "max_image_tiles"),
    "no end token": ("generation_config.json", lambda c: c.pop("eos_token_id"), "eos_token_id"),
    "an end token without logit": ("generation_config.json", lambda c: c.update(eos_token_id=[10**6]), "end tokens"),
    "a chat template that is none": ("chat_template.json", lambda c: c.update(chat_template=["a"]), "chat template"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_the_model_are_named(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    if name == "chat_template.json":
        (checkpoint / "chat_template.jinja").unlink()
        (checkpoint / name).write_text("{}")
    if name == "generation_config.json" and "no end" in fault:
        edit(checkpoint / "config.json", lambda c: (c.pop("eos_token_id", 0), c["text_config"].pop("eos_token_id", 0)))
    edit(checkpoint / name, change)
    with pytest.raises(CheckpointError, match=message):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_files_that_are_not_what_they_should_be_are_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).write_text("{% if {")
    with pytest.raises(CheckpointError, match="checkpoint"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_graphs = export_module.saved_graphs

    def touch_then_write(*arguments):  # stands for another program that writes at the wrong moment
        shard = next(checkpoint.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes())
        return saved_graphs(*arguments)

    monkeypatch.setattr(export_module, "saved_graphs", touch_then_write)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


LLAMA = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"


def test_a_llama_licence_travels_along_with_its_notice(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE"):
        (checkpoint / name).unlink()
    (checkpoint / "LICENSE.txt").write_text(LLAMA)
    (checkpoint / "USE_POLICY.md").write_text("Be good.")
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    assert bundle.path("LICENSE.txt").read_text() == LLAMA
    assert bundle.path("USE_POLICY.md").read_text() == "Be good."
    notice = bundle.path("NOTICE").read_text()
    assert "licensed under the Llama 3.2 Community License, Copyright (c) Meta Platforms, Inc." in notice
    assert "Built with Llama" in notice

    def notices(name: str) -> list[str]:
        return licence_notices(replace(bundle.manifest, name=name), lambda name: bundle.path(name).read_bytes())

    assert notices("Llama-mine") == []
    assert notices("mine") == ['"mine" does not begin with "Llama", which the licence wants of models made from Llama']


def test_a_checkpoint_without_a_licence_is_said_to_have_none(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "LICENSE").unlink()
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions())
    (notice,) = licence_notices(bundle.manifest, lambda name: bundle.path(name).read_bytes())
    assert notice.startswith("the checkpoint has no licence file")
