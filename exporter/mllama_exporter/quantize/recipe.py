"""A recipe: what to quantise and what to keep, in a file that can be reviewed and kept (YAML, data only)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from mllama_runtime.errors import InputError
from mllama_runtime.fields import parse, show
from mllama_runtime.manifest import QuantizedPrecision

_MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Recipe:
    """scheme: of the decoder. vision: of the vision graph, kept without. keep: patterns of weights to leave alone."""

    scheme: QuantizedPrecision | None = None
    vision: QuantizedPrecision | None = None
    keep: tuple[str, ...] = ()


def recipe_from_yaml(path: Path) -> Recipe:
    """Read a recipe. Raises InputError naming the field that is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("cannot be read", where=path, found=error.strerror) from error
    if len(data) > _MAX_BYTES:
        raise InputError("too large for a recipe", where=path, found=f"{len(data)} bytes")
    try:
        root = yaml.compose(data, yaml.SafeLoader)  # nodes alone: nothing is made of tags, anchors or merge keys
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("not YAML", where=path, found=error) from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError("not a recipe", where=path, expected="fields such as `scheme: int8`")
    value: dict[str, object] = {}
    for key, content in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in value:
            found = show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or an object"
            raise InputError("not a field, or one that stands twice", where=path, found=found)
        is_list = isinstance(content, yaml.SequenceNode)
        value[key.value] = [_scalar(each) for each in content.value] if is_list else _scalar(content)
    absent: dict[str, object] = {each.name: [] if each.name == "keep" else None for each in fields(Recipe)}
    return parse(Recipe, absent | value, where=path, error=InputError)


def _scalar(node: yaml.Node) -> object:
    """Text as it is written, or null; whatever else it is, of its type, and refused for it."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return [] if isinstance(node, yaml.SequenceNode) else {}
