"""config.json -> ModelConfig: equal to what transformers reads, and every field that cannot be honoured is named."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mllama_exporter.checkpoints.hf_config import model_config_from_hf
from mllama_runtime.config import ModelConfig
from mllama_runtime.errors import CheckpointError
from transformers import MllamaConfig

from ._checkpoints import ROPE, as_transformers_5, full_size, tiny


def parse(folder: Path, config: object) -> ModelConfig:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return model_config_from_hf(folder)


def refused(folder: Path, config: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(folder, config)
    return str(caught.value)


def as_reference_reads(config: dict[str, Any]) -> dict[str, object]:
    """The reference's own parse, flattened to the names of `ModelConfig`."""
    reference = MllamaConfig.from_dict(copy.deepcopy(config))
    text, vision = reference.text_config, reference.vision_config
    rope = text.rope_parameters
    return {
        "image_token_id": reference.image_token_index,
        "vision.hidden_size": vision.hidden_size,
        "vision.num_heads": vision.attention_heads,
        "vision.num_layers": vision.num_hidden_layers,
        "vision.num_global_layers": vision.num_global_layers,
        "vision.intermediate_size": vision.intermediate_size,
        "vision.intermediate_layers_indices": tuple(vision.intermediate_layers_indices),
        "vision.image_size": vision.image_size,
        "vision.patch_size": vision.patch_size,
        "vision.max_num_tiles": vision.max_num_tiles,
        "vision.supported_aspect_ratios": tuple(map(tuple, vision.supported_aspect_ratios)),
        "vision.norm_eps": vision.norm_eps,
        "vision.hidden_act": vision.hidden_act,
        "vision.num_channels": vision.num_channels,
        "text.vocab_size": text.vocab_size,
        "text.hidden_size": text.hidden_size,
        "text.num_layers": text.num_hidden_layers,
        "text.num_heads": text.num_attention_heads,
        "text.num_kv_heads": text.num_key_value_heads,
        "text.intermediate_size": text.intermediate_size,
        "text.rms_norm_eps": text.rms_norm_eps,
        "text.max_seq_len": text.max_position_embeddings,
        "text.cross_attention_layers": tuple(text.cross_attention_layers),
        "text.hidden_act": text.hidden_act,
        "text.rope.rope_type": rope["rope_type"],
        "text.rope.theta": rope["rope_theta"],
        **{f"text.rope.{key}": rope[key] for key in ROPE if key != "rope_type" and key in rope},
    }


def as_we_read(config: ModelConfig, fields: dict[str, object]) -> dict[str, object]:
    values = {}
    for field in fields:
        value: object = config
        for name in field.split("."):
            value = getattr(value, name)
        values[field] = value
    return values


PLAIN_ROPE = tiny(text={"rope_scaling": None, "rope_theta": 10000.0})


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        PLAIN_ROPE,
        full_size(),
        full_size(image_size=448),
        full_size(large=True),
        full_size(image_size=448, large=True),
    ],
    ids=["tiny", "plain rope", "11B Instruct", "11B base", "90B Instruct", "90B base"],
)
def test_both_spellings_equal_the_reference(tmp_path: Path, config: dict[str, Any]) -> None:
    expected = as_reference_reads(config)
    published, current = parse(tmp_path, config), parse(tmp_path, as_transformers_5(config))
    assert as_we_read(published, expected) == expected
    assert current == published


def test_what_transformers_saves_is_read_back(tmp_path: Path) -> None:
    MllamaConfig.from_dict(tiny()).save_pretrained(tmp_path)
    assert model_config_from_hf(tmp_path) == parse(tmp_path, tiny())


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (section, key)
        for section in ("text_config", "vision_config")
        for key in full_size()[section]
        if key not in ("rope_theta", "rope_scaling", "model_type")
    ],
)
def test_an_absent_field_takes_the_references_default(tmp_path: Path, section: str, key: str) -> None:
    config = full_size(image_size=448)
    del config[section][key]
    expected = as_reference_reads(config)
    assert as_we_read(parse(tmp_path, config), expected) == expected


def test_absent_vision_config_and_image_token_take_the_references_default(tmp_path: Path) -> None:
    config = full_size()
    del config["vision_config"], config["image_token_index"]
    expected = as_reference_reads(config)
    assert as_we_read(parse(tmp_path, config), expected) == expected


def test_other_spellings_of_a_field(tmp_path: Path) -> None:
    config = tiny(vision={"image_size": [28, 28], "patch_size": [14, 14], "num_attention_heads": 2})
    del config["vision_config"]["attention_heads"]
    config["image_token_id"] = config.pop("image_token_index")
    config["text_config"]["cross_attention_layers"] = [3, 1]  # a set, to the reference
    rope = config["text_config"]["rope_scaling"]
    config["text_config"]["rope_scaling"] = {"type": rope["rope_type"], **rope}
    del config["text_config"]["rope_scaling"]["rope_type"]
    assert parse(tmp_path, config) == parse(tmp_path, tiny())


def test_keys_without_effect_are_ignored(tmp_path: Path) -> None:
    """`tie_word_embeddings` is one: the reference never ties (the tables differ in height) and reads lm_head.weight."""
    extra = {"attention_bias": False, "use_cache": True, "tie_word_embeddings": True, "head_dim": 8, "dropout": 0.1}
    config = tiny(text=extra, vision={"head_dim": 16}, tie_word_embeddings=True, transformers_version="4.45.0")
    assert parse(tmp_path, config) == parse(tmp_path, tiny())


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "proportional", "", None, 3])
def test_other_rope_types_are_refused(tmp_path: Path, rope_type: object) -> None:
    config = tiny(text={"rope_scaling": ROPE | {"rope_type": rope_type}})
    message = refused(tmp_path, config)
    assert "text_config.rope_scaling.rope_type" in message
    assert repr(rope_type) in message
    assert "'llama3'" in message
    assert "text_config.rope_parameters.rope_type" in refused(tmp_path, as_transformers_5(config))


@pytest.mark.parametrize("key", ROPE)
def test_absent_rope_scaling_parameters_are_refused(tmp_path: Path, key: str) -> None:
    config = tiny(text={"rope_scaling": {name: value for name, value in ROPE.items() if name != key}})
    assert ("type" if key == "rope_type" else key) in refused(tmp_path, config)
    assert ("type" if key == "rope_type" else key) in refused(tmp_path, as_transformers_5(config))


@pytest.mark.parametrize("gone", [("rope_theta",), ("rope_scaling",), ("rope_theta", "rope_scaling")])
@pytest.mark.parametrize("base", [tiny(), PLAIN_ROPE], ids=["llama3", "plain"])
def test_absent_rope_is_refused(tmp_path: Path, base: dict[str, Any], gone: tuple[str, ...]) -> None:
    config = copy.deepcopy(base)
    for key in gone:
        del config["text_config"][key]
    assert "rope_" in refused(tmp_path, config)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"rope_parameters": ROPE | {"factor": 4.0}}, "text_config.rope_scaling: contradicts"),
        ({"rope_scaling": ROPE | {"rope_theta": 1e4}}, "text_config.rope_theta: contradicts"),
        ({"original_max_position_embeddings": 32}, "text_config.original_max_position_embeddings: contradicts"),
        ({"partial_rotary_factor": 0.5}, "text_config.partial_rotary_factor"),
        ({"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": ROPE | {"factor": 0}}, "factor"),
        ({"rope_scaling": ROPE | {"factor": 10**400}}, "factor"),
        ({"rope_scaling": "llama3"}, "text_config.rope_scaling"),
        ({"rope_theta": "500000"}, "text_config.rope_theta"),
    ],
)
def test_rope_that_cannot_be_honoured_is_refused(tmp_path: Path, text: dict[str, Any], named: str) -> None:
    assert named in refused(tmp_path, tiny(text=text))


@pytest.mark.parametrize("model_type", ["llava", "llama", "mllama_text_model", "Mllama", None, 1, ["mllama"]])
def test_other_models_are_refused(tmp_path: Path, model_type: object) -> None:
    message = refused(tmp_path, tiny(model_type=model_type))
    assert "config.json: model_type" in message
    assert "expected 'mllama'" in message
    assert repr(model_type) in message


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("text", "cross_attention_layers", [1, 4], "cross_attention_layers"),
        ("text", "cross_attention_layers", [-1, 1], "cross_attention_layers"),
        ("text", "cross_attention_layers", [1, 1, 3], "cross_attention_layers"),
        ("text", "cross_attention_layers", [], "cross_attention_layers"),
        ("text", "cross_attention_layers", "1", "text_config.cross_attention_layers"),
        ("text", "cross_attention_layers", [1.0], "text_config.cross_attention_layers"),
        ("text", "num_attention_heads", 5, "num_heads"),
        ("text", "num_attention_heads", 32, "num_heads"),  # one dimension a head cannot be rotated
        ("text", "num_key_value_heads", 3, "num_kv_heads"),
        ("text", "num_key_value_heads", 8, "num_kv_heads"),
        ("text", "num_key_value_heads", None, "num_key_value_heads"),
        ("text", "head_dim", 16, "text_config.head_dim"),
        ("text", "hidden_act", "gelu", "text_config.hidden_act"),
        ("text", "hidden_size", 10**12, "hidden_size"),
        ("text", "hidden_size", -32, "text_config.hidden_size"),
        ("text", "hidden_size", 32.0, "text_config.hidden_size"),
        ("text", "hidden_size", True, "text_config.hidden_size"),
        ("text", "vocab_size", 0, "text_config.vocab_size"),
        ("text", "vocab_size", 10**12, "vocab_size"),
        ("text", "vocab_size", 8, "image_token_id"),
        ("text", "num_hidden_layers", 10**12, "num_layers"),
        ("text", "max_position_embeddings", 10**12, "max_seq_len"),
        ("text", "rms_norm_eps", 0, "rms_norm_eps"),
        ("text", "model_type", "llama", "text_config.model_type"),
        ("text", "quantization_config", {"quant_method": "awq"}, "text_config.quantization_config"),
        ("vision", "attention_heads", 3, "num_heads"),
        ("vision", "head_dim", 8, "vision_config.head_dim"),
        ("vision", "hidden_act", "quick_gelu", "vision_config.hidden_act"),
        ("vision", "hidden_act", "gelu_pytorch_tanh", "vision_config.hidden_act"),
        ("vision", "image_size", 30, "patch_size"),
        ("vision", "image_size", 10**12, "image_size"),
        ("vision", "image_size", [28, 56], "vision_config.image_size"),
        ("vision", "image_size", [28], "vision_config.image_size"),
        ("vision", "patch_size", 0, "vision_config.patch_size"),
        ("vision", "num_channels", 4, "num_channels"),
        ("vision", "vision_output_dim", 64, "vision_config.vision_output_dim"),
        ("vision", "intermediate_layers_indices", [0, 3], "intermediate_layers_indices"),
        ("vision", "intermediate_layers_indices", [-1, 0], "intermediate_layers_indices"),
        ("vision", "max_num_tiles", 2, "supported_aspect_ratios"),
        ("vision", "supported_aspect_ratios", [[1, 1], [1]], "vision_config.supported_aspect_ratios"),
        ("vision", "supported_aspect_ratios", [[1, 1], [1, 1]], "supported_aspect_ratios"),
        ("vision", "supported_aspect_ratios", [[1, 5]], "supported_aspect_ratios"),
        ("vision", "num_global_layers", 10**12, "num_global_layers"),
        ("root", "image_token_index", 72, "image_token_id"),
        ("root", "image_token_index", -1, "image_token_index"),
        ("root", "text_config", [], "text_config"),
        ("root", "vision_config", "none", "vision_config"),
        ("root", "quantization_config", {"quant_method": "bitsandbytes"}, "quantization_config"),
    ],
)
def test_what_cannot_be_right_is_named(tmp_path: Path, section: str, key: str, value: object, named: str) -> None:
    change = {key: value}
    config = tiny(**change) if section == "root" else tiny(**{section: change})
    message = refused(tmp_path, config)
    assert f"{tmp_path / 'config.json'}: " in message
    assert named in message
    assert "\n" not in message


def test_default_aspect_ratios_need_their_four_tiles(tmp_path: Path) -> None:
    config = tiny(vision={"max_num_tiles": 8})
    del config["vision_config"]["supported_aspect_ratios"]
    assert "supported_aspect_ratios" in refused(tmp_path, config)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    wrong = tiny(text={"hidden_act": "relu", "vocab_size": -1}, vision={"patch_size": "14"})
    message = refused(tmp_path, wrong | {"quantization_config": {}})
    assert "4 fields are wrong" in message
    for key in (
        "text_config.hidden_act",
        "text_config.vocab_size",
        "vision_config.patch_size",
        "config.json: quantization_config",
    ):
        assert key in message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"mllama"', '{"model_type": NaN}', "[" * 100_000, '{"a": 1, "a": 2}', "\ufeff{}"],
    ids=["empty", "open", "list", "null", "string", "NaN", "deep", "twice", "BOM"],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "config.json") in refused(tmp_path, text)


def test_absent_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        model_config_from_hf(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not a plain file"):
        model_config_from_hf(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room, and reading it would take a terabyte of memory
    with pytest.raises(CheckpointError, match="too large"):
        model_config_from_hf(tmp_path)


def test_remote_code_is_ignored_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    with caplog.at_level(logging.WARNING):
        config = parse(tmp_path, tiny(auto_map={"AutoModel": "evil.Model"}))
    assert config == parse(tmp_path, tiny())
    assert "auto_map" in caplog.text
    assert "never executed" in caplog.text


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-3, 100), st.text(max_size=2), st.lists(st.integers(0, 5), max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "factor"]), st.integers(0, 9), max_size=3),
)
KEYS = [(section, key) for section in ("text_config", "vision_config") for key in tiny()[section]]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
def test_junk_is_read_or_refused_and_nothing_else(tmp_path: Path, changes: dict[tuple[str, str], object]) -> None:
    config = tiny()
    for (section, key), value in changes.items():
        config[section][key] = value
    try:
        parsed: ModelConfig | None = parse(tmp_path, config)
    except CheckpointError:
        parsed = None
    assert parsed is None or isinstance(parsed, ModelConfig)
