"""Back ends: what runs the graphs of a bundle. The decode loop sees the two protocols below and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends.private_trt import TENSORRT_BACKENDS, gpu_compute_capabilities, is_installed
from mllama_runtime.bundle import Bundle
from mllama_runtime.errors import EnvironmentFault, UsageError
from mllama_runtime.preprocessing import ImageTiles

if TYPE_CHECKING:
    from mllama_runtime.engine_record import Limits
    from mllama_runtime.memory import MemoryPlan
    from mllama_runtime.tokens import TokenSlots

PREFILL_CHUNK = 512  # tokens; bounds the memory of a prefill's activations where no engine's limits do
BACKENDS = ("auto", "cpu", "cuda", *TENSORRT_BACKENDS)


class Features(Protocol):
    """Keys and values of one picture for every cross-attention layer, wherever the back end keeps them.

    G key/value heads, P num_patches, D head_dim.
    """

    @property
    def num_tiles(self) -> int: ...

    @property
    def key(self) -> str: ...

    def arrays(self) -> Mapping[str, NDArray[np.float32]]:
        """On the host, by the vision graph's output names: [1, G, max_num_tiles*P, D], padding tiles included."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a prompt, as a slot takes them.

    token_ids: [seq]. position: of the first in the prompt; 0 begins a new request in the slot. visibility: bool
    [seq, tiles of all pictures], which tiles each token sees. features: the slot's pictures, the same for every chunk.
    with_padding_tiles: tokens before every picture are among them, which in hf semantics attend to all tiles of the
    tower's output, padding ones included.
    """

    token_ids: NDArray[np.int64]
    position: int
    visibility: NDArray[np.bool_]
    features: Sequence[Features] = ()
    with_padding_tiles: bool = False

    @property
    def stop(self) -> int:
        """The position behind the last."""
        return self.position + len(self.token_ids)

    def visibility_with_padding(self, max_num_tiles: int) -> NDArray[np.bool_]:
        """Which of each picture's max_num_tiles tiles each token sees: [seq, pictures * max_num_tiles]."""
        real = [
            index * max_num_tiles + tile
            for index, feature in enumerate(self.features)
            for tile in range(feature.num_tiles)
        ]
        mask = np.zeros((len(self.token_ids), len(self.features) * max_num_tiles), np.bool_)
        mask[:, real] = self.visibility
        return mask


class Slots(Protocol):
    """Rows of a static cache: each holds one request's self-attention cache and its pictures' keys and values.

    prefill_chunk: the most tokens that one prefill takes.
    """

    prefill_chunk: int

    def prefill(self, slot: int, chunk: Chunk, *, num_logits: int = 1) -> NDArray[np.float32]:
        """Append a chunk to a slot; returns the last tokens' logits [num_logits, vocab]."""
        ...

    def decode(self, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each of the first `len(token_ids)` slots: [batch], [batch] -> logits [batch, vocab].

        Each sees the tiles that the last token of its slot's prefill sees. The result is overwritten by the next call.
        """
        ...

    def cached(self, slot: int, num_tokens: int) -> Mapping[str, NDArray[np.float32]]:
        """A slot's first cache entries on the host, by the decoder's input names: [1, G, num_tokens, D]."""
        ...


class Backend(Protocol):
    """A context manager: entering loads the graphs, leaving frees them; leaving twice is fine.

    limits: the largest request and the number of slots, where they are fixed; None where slots are made to measure.
    """

    name: str

    @property
    def limits(self) -> Limits | None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def encode(self, tiles: ImageTiles) -> Features:
        """Run the vision graph on one picture."""
        ...

    def memory(self) -> MemoryPlan:
        """Every byte taken, of an entered back end with limits. Raises UsageError where memory is taken as it goes."""
        ...

    def slots(self, *, num_slots: int, cache_len: int, num_tiles: int) -> Slots:
        """Slots for up to cache_len tokens and num_tiles tiles each; the same ones again where there are limits.

        Raises ResourceError.
        """
        ...

    def tokens(self, *, num_slots: int, cache_len: int, num_tiles: int) -> TokenSlots:
        """Such slots with samplers, wherever this back end samples best."""
        ...


def backend_from_bundle(bundle: Bundle, name: str, num_threads: int | None, *, limits: Limits | None = None) -> Backend:
    """The back end of that name, not yet entered.

    Args:
        name: one of BACKENDS. "auto" is TensorRT where there are a GPU and engines for it in the bundle, else the CPU.
        num_threads: of the CPU.
        limits: what the "cuda" back end plans memory for; engines have their own, and the CPU none.

    Raises:
        UsageError: an unknown name, or limits for another back end.
        EnvironmentFault: what the back end needs is missing.
        BundleError: the bundle has no engine that can be used.
    """
    if name not in BACKENDS:
        raise UsageError("unknown back end", where="backend", expected=" or ".join(BACKENDS), found=repr(name))
    if limits is not None and name != "cuda":
        raise UsageError("only for the back end cuda", where="limits", found=name)
    chosen = _best(bundle) if name == "auto" else name
    for backend in TENSORRT_BACKENDS:
        if chosen == backend:
            from mllama_runtime.backends.gpu import tensorrt_backend

            return tensorrt_backend(bundle, backend)
    try:
        if chosen == "cuda":
            from mllama_runtime.backends.gpu import cuda_backend

            return cuda_backend(bundle, limits)
        from mllama_runtime.backends.ort import OrtBackend
    except ImportError as error:
        hint = f'run: pip install "mllama-deploy[{chosen}]"'
        raise EnvironmentFault("ONNX Runtime is not installed", where=chosen, found=error, hint=hint) from error
    return OrtBackend(bundle, num_threads)


def _best(bundle: Bundle) -> str:
    """A GPU with engines is not left aside silently: where just the package is missing, that will be said."""
    built_for = {entry.backend for entry in bundle.manifest.engines}
    engines = [backend for backend in TENSORRT_BACKENDS if backend in built_for]
    if not engines or not gpu_compute_capabilities():
        return "cpu"
    return next(filter(is_installed, engines), engines[0])
