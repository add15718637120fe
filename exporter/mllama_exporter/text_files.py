"""What a bundle takes from a checkpoint beside graphs and weights: tokenizer, chat template, configs and licence.

Everything is read as data and checked against the model here, so that a bundle that was made can be served.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.chat import ChatTemplate
from mllama_runtime.config import ModelConfig
from mllama_runtime.errors import CheckpointError, InputError
from mllama_runtime.preprocessing import PreprocessorConfig, supported_aspect_ratios
from mllama_runtime.tokenizer import Tokenizer

from mllama_exporter.checkpoints.hf_config import read_json_object
from mllama_exporter.licence import write_licence

T = TypeVar("T")

_TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def write_text_files(folder: Path, writer: BundleWriter, config: ModelConfig) -> None:
    """Write them all; `folder` is the checkpoint's. Raises CheckpointError naming the file and what is wrong."""
    tokenizer = _tokenizer(folder, writer, config)
    tokenizer_config = _optional_json(folder / "tokenizer_config.json")
    variables = _token_variables(tokenizer_config)
    template = _chat_template(folder, tokenizer_config)
    if template is not None:
        _checked(
            folder / "chat template",
            lambda: ChatTemplate(template, special_tokens=tokenizer.special_tokens, token_variables=variables),
        )
        _write(writer, "chat_template.jinja", template)
    if not config.is_text_only:
        _write_json(writer, "preprocessor.json", _preprocessor(folder, config).to_dict())
    eos_token_ids = _eos_token_ids(folder, config)
    _write_json(writer, "generation.json", {"eos_token_ids": eos_token_ids, "token_variables": variables})
    write_licence(folder, writer, lambda path: _checked(path, path.read_bytes))


def _tokenizer(folder: Path, writer: BundleWriter, config: ModelConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer = _checked(path, lambda: Tokenizer.from_file(path))
    if tokenizer.image_token_id != config.image_token_id:
        raise CheckpointError(
            "<|image|> has another id than config.json gives it",
            where=path,
            expected=config.image_token_id,
            found=tokenizer.image_token_id,
        )
    largest_id = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest_id >= config.text.num_embeddings:
        raise CheckpointError(
            "a token has no embedding",
            where=path,
            expected=f"ids below {config.text.num_embeddings}",
            found=largest_id,
        )
    (writer.path / path.name).write_bytes(path.read_bytes())
    writer.add_file(path.name)
    return tokenizer


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The processor's template; None for base models, which have none. Newest form first, as transformers looks."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _checked(path, lambda: path.read_text(encoding="utf-8"))
    template = _optional_json(folder / "chat_template.json").get("chat_template", tokenizer_config.get("chat_template"))
    if template is not None and not isinstance(template, str):
        raise CheckpointError("not one chat template", where=folder, expected="a string", found=type(template).__name__)
    return template


def _preprocessor(folder: Path, config: ModelConfig) -> PreprocessorConfig:
    path = folder / "preprocessor_config.json"
    preprocessor = PreprocessorConfig.from_dict(read_json_object(path), path, CheckpointError)
    for field, found, expected in (
        ("size", preprocessor.image_size, config.vision.image_size),
        ("max_image_tiles", preprocessor.max_num_tiles, config.vision.max_num_tiles),
        (
            "the canvases of max_image_tiles",
            list(supported_aspect_ratios(preprocessor.max_num_tiles)),
            list(config.vision.supported_aspect_ratios),
        ),
    ):
        if found != expected:
            raise CheckpointError("not what config.json says", where=f"{path}: {field}", expected=expected, found=found)
    return preprocessor


def _eos_token_ids(folder: Path, config: ModelConfig) -> list[int]:
    """From generation_config.json, else config.json, as transformers has it."""
    for name, section in (("generation_config.json", None), ("config.json", "text_config"), ("config.json", None)):
        values = _optional_json(folder / name)
        values = values.get(section, {}) if section else values
        found = values.get("eos_token_id") if isinstance(values, dict) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not ids or not all(type(token_id) is int and 0 <= token_id < config.text.vocab_size for token_id in ids):
            raise CheckpointError(
                "not end tokens of this vocabulary",
                where=f"{folder / name}: eos_token_id",
                expected=f"ids below {config.text.vocab_size}",
                found=found,
            )
        return ids
    raise CheckpointError("no eos_token_id", where=folder / "generation_config.json", hint="answers would never end")


def _token_variables(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Special tokens that templates name by a variable; older files spell them as an added token's record."""
    found = {name: tokenizer_config.get(name) for name in _TOKEN_VARIABLES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _checked(where: Path, read: Callable[[], T]) -> T:
    """What the runtime finds wrong with a bundle's file is the checkpoint's fault here."""
    try:
        return read()
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError("cannot be used", where=where, found=error) from error


def _write(writer: BundleWriter, name: str, text: str) -> None:
    (writer.path / name).write_text(text, encoding="utf-8")
    writer.add_file(name)


def _write_json(writer: BundleWriter, name: str, value: object) -> None:
    _write(writer, name, json.dumps(value, indent=2, sort_keys=True) + "\n")
