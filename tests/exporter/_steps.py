"""Arbitrary inputs of one decoder step, and how near two graphs must come on them."""

from __future__ import annotations

import numpy as np
from mllama_runtime.config import ModelConfig

BAR = 2e-5  # absolute, the bar of the graphs themselves; measured 1.2e-5 on logits of order ten


def inputs(model: ModelConfig, lengths: list[int], seq: int, num_tiles: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """One step of `seq` tokens for rows with so many cached entries each."""
    rng, text, batch = np.random.default_rng(seed), model.text, len(lengths)
    shapes = {
        **{f"past_{kind}_{layer}": 48 for layer in text.self_attention_layers for kind in ("key", "value")},
        **{
            f"cross_{kind}_{layer}": num_tiles * model.vision.num_patches
            for layer in text.cross_attention_layers
            for kind in ("key", "value")
        },
    }
    caches = {
        name: rng.standard_normal((batch, text.num_kv_heads, rows, text.head_dim), np.float32)
        for name, rows in shapes.items()
    }
    return {
        "input_ids": rng.integers(0, text.vocab_size, (batch, seq)),
        "write_indices": np.array(lengths),
        "kv_lengths": np.array(lengths) + seq,
        "logits_indices": np.full((batch, 1), seq - 1),
        "cross_attention_mask": rng.random((batch, seq, num_tiles)) > 0.4,
        "has_image": np.arange(batch) % 3 != 2,
        **caches,
    }
