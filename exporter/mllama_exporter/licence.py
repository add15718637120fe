"""A checkpoint's licence travels with what is made of it.

The Llama 3.2 Community License Agreement (section 1.b) wants a copy of itself, a notice of its own words and "Built
with Llama" with what is distributed, and names of derived models that begin with "Llama".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.manifest import Manifest

_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_LLAMA = re.compile(rb"llama\s+3(?:\.\d)?\s+community\s+license", re.IGNORECASE)
_NOTICE = """\
Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.

Built with Llama
"""


def write_licence(folder: Path, writer: BundleWriter, read: Callable[[Path], bytes]) -> None:
    """Copy a checkpoint's licence files into a bundle, and add the notice that Llama's wants where there is none.

    read: a file's bytes, or an error for people.
    """
    names = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _is_licence(path.name)}
    is_llama = False
    for name, path in names.items():
        data = read(path)
        is_llama |= name.upper().startswith(_PREFIXES[:2]) and bool(_LLAMA.search(data))
        (writer.path / name).write_bytes(data)
        writer.add_file(name)
    if is_llama and not any(name.upper().startswith("NOTICE") for name in names):
        (writer.path / "NOTICE").write_text(_NOTICE, encoding="utf-8")
        writer.add_file("NOTICE")


def licence_notices(manifest: Manifest, read: Callable[[str], bytes]) -> list[str]:
    """What whoever passes a bundle on should know. read: a file of the bundle."""
    licences = [name for name in manifest.files if name.upper().startswith(_PREFIXES[:2])]
    if not licences:
        return ["the checkpoint has no licence file: what is made of a Llama model must carry the Llama licence"]
    if not any(_LLAMA.search(read(name)) for name in licences) or manifest.name.lower().startswith("llama"):
        return []
    return [f'"{manifest.name}" does not begin with "Llama", which the licence wants of models made from Llama']


def _is_licence(name: str) -> bool:
    return name.upper().startswith(_PREFIXES)
