"""Our graphs against transformers' own ONNX export of the same checkpoint (its `exporters` package)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.prompt import image_visibility
from reference import Reference, padded_mask

from .test_parity import BAR, CASES, pictures, run, token_ids

CASE = next(case for case in CASES if case.name == "text before the picture")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_agrees_with_the_export_of_transformers(bundle_of, miniature: Path, tmp_path: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with OrtBackend(Bundle.open(bundle_of()), 1) as backend:
        images = pictures(backend._bundle.root, CASE.canvases)
        logits, cached, features = run(backend, CASE, images, "hf")
        image_token_id = backend._bundle.manifest.model.image_token_id
    ids = token_ids(CASE, image_token_id)
    mask = padded_mask(image_visibility(ids, image_token_id, [tiles.num_tiles for tiles in images]), images)
    reference = Reference(miniature)
    inputs = reference.inputs(ids, images, mask) | {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}

    exported = OnnxExporter().export(reference.model, inputs, config=OnnxConfig(dynamic=False))
    ir.save(exported.program, tmp_path / "theirs.onnx")
    session = ort.InferenceSession(tmp_path / "theirs.onnx")
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    theirs = dict(zip(names, session.run(names, feeds), strict=True))

    assert np.abs(theirs["logits"][0, -1] - logits).max() <= BAR
    caches = [array for name, array in theirs.items() if name != "logits"]
    ours = [*cached.values(), *features[0].arrays().values()]
    assert len(caches) == len(ours), names
    for array in ours:  # theirs are named after their place in the cache object: find each by its content
        same_shape = [np.abs(array - other.reshape(array.shape)).max() for other in caches if other.size == array.size]
        assert min(same_shape) <= BAR
