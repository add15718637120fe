"""The launches of a finished engine, read from what the builder says of them.

TensorRT's engine inspector tells the same, but only of a deserialised engine, which takes a GPU. The builder prints it
at the end of a build when asked for details: one line a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mllama_runtime.engine_record import Kernel

from mllama_exporter.engines.network import nodes_in

_LINE = re.compile(
    r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*?\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?, Metadata: ?(?P<metadata>.*)$"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")


def kernels_from_log(details: Iterable[str]) -> tuple[Kernel, ...]:
    """Every launch, in order, of all profiles; empty if this version says nothing, or something else."""
    return tuple(
        Kernel(
            name=found["name"],
            kind=found["kind"],
            tactic=found["tactic"],
            nodes=nodes_in(found["metadata"]),
            inputs=tuple(_TYPE.findall(found["inputs"])),
            outputs=tuple(_TYPE.findall(found["outputs"])),
        )
        for message in details
        for line in message.splitlines()
        if (found := _LINE.match(line))
    )


def memory_from_log(details: Iterable[str]) -> tuple[int, int]:
    """Device memory for weights and activations in bytes, of the profile that needs most; 0 where nothing was said."""
    said = [(what, int(count)) for message in details for what, count in _MEMORY.findall(message)]
    weights, activations = (
        max((count for what, count in said if what == kind), default=0) for kind in ("Weights", "Activation")
    )
    return weights, activations
