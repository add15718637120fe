"""config.json of a Hugging Face checkpoint -> `ModelConfig`: the first step of an export, before any weight is touched.

Both spellings are read: the published one (`rope_theta` with `rope_scaling`) and transformers 5's (`rope_parameters`).
Absent fields take the reference configuration's class defaults, except RoPE, which is honoured or refused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from mllama_runtime.config import ModelConfig, RopeConfig, TextConfig, VisionConfig, check_model
from mllama_runtime.errors import CheckpointError
from mllama_runtime.fields import load_json, show

logger = logging.getLogger(__name__)

Json = dict[str, object]

_MAX_JSON_BYTES = 64 << 20  # an index of a hundred thousand tensors is a tenth of this
_DEFAULT_CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
_DEFAULT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def model_config_from_hf(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json.

    Raises:
        CheckpointError: the file is absent or not JSON, is of another model, or asks for something that cannot be
            honoured. Every faulty field is named, not just the first.
    """
    path = folder / "config.json"
    faults: list[CheckpointError] = []
    root = _Section(read_json_object(path), str(path), faults)
    if (found := root.values.get("model_type")) != "mllama":
        raise CheckpointError(
            "this model is not supported", where=f"{path}: model_type", expected="'mllama'", found=show(found)
        )
    sections = (root, root.section("text_config"), root.section("vision_config"))
    for section in sections:
        section.refuse_quantized()
        section.ignore_code()
    config = ModelConfig(
        vision=_vision(sections[2]),
        text=_text(sections[1]),
        image_token_id=root.integer("image_token_index", 128256, alias="image_token_id", low=0),
    )
    if not faults:
        check_model(config, where=path, error=CheckpointError)
        _check_derived(config, *sections[1:])
    if len(faults) > 1:
        raise CheckpointError(f"{len(faults)} fields are wrong: " + " | ".join(map(str, faults)), where=path)
    if faults:
        raise faults[0]
    return config


def read_json_object(path: Path) -> Json:
    """The JSON object a file holds.

    Raises:
        CheckpointError: the file is absent, unreadable, unreasonably large, not JSON, or not an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("not a plain file", where=path)
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise CheckpointError("too large", where=path, expected=f"at most {_MAX_JSON_BYTES} bytes", found=size)
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, hint="name a Hugging Face checkpoint folder") from None
    except OSError as error:
        raise CheckpointError("cannot be read", where=path, found=error.strerror) from error
    value = load_json(data, where=path, error=CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError("wrong content", where=path, expected="a JSON object", found=show(value))
    return value


class _Section:
    """One JSON object of config.json. Look-ups note a fault and carry on, so that one message can name them all."""

    def __init__(self, values: Json, where: str, faults: list[CheckpointError]) -> None:
        self.values, self.where, self.faults = values, where, faults

    def fault(self, key: str, what: str, *, expected: object = None, hint: str | None = None) -> None:
        found = show(self.values[key]) if key in self.values else None
        self.faults.append(CheckpointError(what, where=self._path(key), expected=expected, found=found, hint=hint))

    def section(self, key: str) -> _Section:
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            self.fault(key, "wrong type", expected="a JSON object")
        return _Section(values if isinstance(values, dict) else {}, self._path(key), self.faults)

    def integer(self, key: str, default: int | None = None, *, alias: str = "", low: int = 1) -> int:
        if key not in self.values and alias in self.values:
            key = alias
        value = self.values.get(key, default)
        if type(value) is int and value >= low:
            return value
        self._refuse(key, f"an integer, at least {low}")
        return low

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) in (int, float) and 0 < cast(float, value) < 1e30:
            return float(cast(float, value))
        self._refuse(key, "a positive number")
        return 1.0

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
        self._refuse(key, "a list of integers")
        return ()

    def side(self, key: str, default: int) -> int:
        """A square's side in pixels, written as one integer or as an equal pair."""
        value = self.values.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is int and value > 0:
            return value
        self._refuse(key, "a square: one positive integer, or two equal ones")
        return 1

    def word(self, key: str, supported: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key, default)
        if isinstance(value, str) and value in supported:
            return value
        self._refuse(key, " or ".join(map(repr, supported)))
        return supported[0]

    def refuse_quantized(self) -> None:
        if self.values.get("quantization_config") is not None:
            hint = "export the original checkpoint and quantise the bundle with `mllama quantize`"
            self.fault("quantization_config", "another tool has quantised and packed the weights", hint=hint)

    def ignore_code(self) -> None:
        if "auto_map" in self.values:
            logger.warning("%s: ignored: code that comes with a checkpoint is never executed", self._path("auto_map"))

    def _refuse(self, key: str, expected: str) -> None:
        self.fault(key, "not supported" if key in self.values else "absent", expected=expected)

    def _path(self, key: str) -> str:
        return f"{self.where}: {key}" if self.where.endswith(".json") else f"{self.where}.{key}"


def _vision(section: _Section) -> VisionConfig:
    section.word("model_type", ("mllama_vision_model",), "mllama_vision_model")
    max_num_tiles = section.integer("max_num_tiles", 4)
    return VisionConfig(
        hidden_size=section.integer("hidden_size", 1280),
        num_heads=section.integer("attention_heads", 16, alias="num_attention_heads"),
        num_layers=section.integer("num_hidden_layers", 32),
        num_global_layers=section.integer("num_global_layers", 8),
        intermediate_size=section.integer("intermediate_size", 5120),
        intermediate_layers_indices=section.integers("intermediate_layers_indices", (3, 7, 15, 23, 30)),
        image_size=section.side("image_size", 448),
        patch_size=section.side("patch_size", 14),
        max_num_tiles=max_num_tiles,
        supported_aspect_ratios=_aspect_ratios(section, max_num_tiles),
        norm_eps=section.number("norm_eps", 1e-5),
        hidden_act=section.word("hidden_act", ("gelu",), "gelu"),
        num_channels=section.integer("num_channels", 3),
    )


def _aspect_ratios(section: _Section, max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    key, value = "supported_aspect_ratios", section.values.get("supported_aspect_ratios")
    if value is None:
        if max_num_tiles != 4:
            section.fault(key, "absent, and the default is for max_num_tiles 4", expected="a list of [high, wide]")
        return _DEFAULT_RATIOS
    pairs: list[list[int]] = value if isinstance(value, list) else [[]]
    if all(isinstance(pair, list) and [type(side) for side in pair] == [int, int] for pair in pairs):
        return tuple((high, wide) for high, wide in pairs)
    section.fault(key, "not supported", expected="a list of [tiles high, tiles wide]")
    return _DEFAULT_RATIOS


def _text(section: _Section) -> TextConfig:
    section.word("model_type", ("mllama_text_model",), "mllama_text_model")
    return TextConfig(
        vocab_size=section.integer("vocab_size", 128256),
        hidden_size=section.integer("hidden_size", 4096),
        num_layers=section.integer("num_hidden_layers", 40),
        num_heads=section.integer("num_attention_heads", 32),
        num_kv_heads=section.integer("num_key_value_heads", 8),
        intermediate_size=section.integer("intermediate_size", 14336),
        rms_norm_eps=section.number("rms_norm_eps", 1e-5),
        max_seq_len=section.integer("max_position_embeddings", 131072),
        cross_attention_layers=tuple(sorted(section.integers("cross_attention_layers", _DEFAULT_CROSS_LAYERS))),
        rope=_rope(section),
        hidden_act=section.word("hidden_act", ("silu",), "silu"),
    )


def _rope(text: _Section) -> RopeConfig:
    """RoPE from `rope_parameters`, or from `rope_theta` and `rope_scaling` (where null means plain RoPE)."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if text.values.get(key) is not None]
    if len(keys) == 2 and text.values[keys[0]] != text.values[keys[1]]:
        text.fault("rope_scaling", "contradicts rope_parameters", expected=show(text.values["rope_parameters"]))
    if not keys and ("rope_scaling" not in text.values or "rope_theta" not in text.values):
        hint = "copy them from the model this one was tuned from; write rope_scaling: null for plain RoPE"
        text.fault("rope_parameters", "RoPE is not fully given, and guessing it would change the model", hint=hint)
        return RopeConfig("default", 1.0)
    rope = text.section(keys[0]) if keys else _Section({"rope_type": "default"}, text.where, text.faults)
    theta = _home("rope_theta", rope, text).number("rope_theta")
    for section in (rope, text):
        if section.values.get("partial_rotary_factor", 1) not in (1, None):
            section.fault("partial_rotary_factor", "not supported", expected="1")
    rope_type = rope.word("rope_type" if "rope_type" in rope.values else "type", ("default", "llama3"))
    if rope_type == "default":
        return RopeConfig("default", theta)
    return _llama3_rope(rope, text, theta)


def _llama3_rope(rope: _Section, text: _Section, theta: float) -> RopeConfig:
    trained = "original_max_position_embeddings"
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if "low_freq_factor" in rope.values and "high_freq_factor" in rope.values and high <= low:
        rope.fault("high_freq_factor", "not supported", expected=f"more than low_freq_factor ({low})")
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_home(trained, rope, text).integer(trained),
    )


def _home(key: str, rope: _Section, text: _Section) -> _Section:
    """Where a RoPE field stands that may stand beside `rope_type` or one level up."""
    homes = [section for section in (rope, text) if section.values.get(key) is not None]
    if len(homes) == 2 and rope.values[key] != text.values[key]:
        text.fault(key, "contradicts the value beside rope_type", expected=show(rope.values[key]))
    return homes[0] if homes else rope


def _check_derived(config: ModelConfig, text: _Section, vision: _Section) -> None:
    """Fields that repeat what others already say must agree with them."""
    for section, key, value in (
        (text, "head_dim", config.text.head_dim),
        (vision, "head_dim", config.vision.head_dim),
        (vision, "vision_output_dim", config.vision.output_dim),
    ):
        if section.values.get(key, value) not in (value, None):
            section.fault(key, "contradicts the other sizes", expected=value)
