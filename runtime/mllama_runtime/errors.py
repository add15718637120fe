"""The one exception tree, shared by the runtime and the exporter.

    MllamaError
    ├── GateError               exit 1   a validation or verification gate failed
    ├── UsageError              exit 2   the call itself is wrong
    ├── InputError              exit 3   what was handed in is wrong
    │   ├── CheckpointError              ... a checkpoint folder or one of its tensors
    │   ├── BundleError                  ... a bundle or its manifest
    │   ├── ImageError                   ... a picture
    │   └── RequestError                 ... a prompt, a message list or a sampling option
    ├── EnvironmentFault        exit 4   a package, GPU or driver is missing or too old
    └── ResourceError           exit 5   disk or memory ran out, or would

`mllama_runtime.cli` turns one of these into a single line on stderr and the exit code above.
"""

from __future__ import annotations


class MllamaError(Exception):
    """Root of everything this project raises on purpose.

    Args:
        what: what is wrong, as a short sentence without a final full stop.
        where: the file, field, tensor, argument or limit it is about.
        expected: what would have been right.
        found: what was there instead.
        hint: what to do about it, as an imperative.

    `str()` is one line: "where: what: expected E, found F; hint".
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.hint = what, where, expected, found, hint
        sides = [f"{side} {value}" for side, value in (("expected", expected), ("found", found)) if value is not None]
        line = what if where is None else f"{where}: {what}"
        if sides:
            line += ": " + ", ".join(sides)
        if hint:
            line += f"; {hint}"
        super().__init__(" ".join(line.split()))


class GateError(MllamaError):
    """A validation or verification gate failed."""

    exit_code = 1


class UsageError(MllamaError):
    """The call itself is wrong: an argument, or a combination of arguments."""

    exit_code = 2


class InputError(MllamaError):
    """What was handed in is wrong."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint folder, its config or one of its tensors is wrong."""


class BundleError(InputError):
    """A bundle, its manifest or one of its files is wrong."""


class ImageError(InputError):
    """A picture cannot be used."""


class RequestError(InputError):
    """A prompt, a message list or a sampling option is wrong."""


class EnvironmentFault(MllamaError):  # noqa: N818 - EnvironmentError is a Python built-in
    """A package, GPU or driver is missing or too old."""

    exit_code = 4


class ResourceError(MllamaError):
    """Disk or memory ran out, or would."""

    exit_code = 5
