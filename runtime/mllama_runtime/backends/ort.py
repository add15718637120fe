"""ONNX Runtime on the CPU: memory is numpy's, bound in place, so no tensor is copied or created per token.

Dimensions: N slots, B batch, G key/value heads, C cache length, T tiles, P num_patches, D head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import PREFILL_CHUNK, Chunk, Features
from mllama_runtime.backends.private_ort import ort, session_options
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from mllama_runtime.contract import decoder_shapes, vision_shapes
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import BundleError, MllamaError, ResourceError, UsageError
from mllama_runtime.preprocessing import ImageTiles
from mllama_runtime.tokens import HostTokens

Array = NDArray[Any]
_MAX_THREADS = 1024  # ONNX Runtime starts all that it is asked for, and thousands take minutes
_LOG_FATAL_ONLY = 4  # what fails is raised, and said once
_OUT_OF_MEMORY = ("Failed to allocate", "bad allocation", "bad_alloc")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, slots=True)
class OrtFeatures:
    """One picture's cross-attention keys and values, [1, G, max_num_tiles*P, D] by name, padding tiles included."""

    key: str
    num_tiles: int
    tensors: Mapping[str, Array]

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return {name: array.astype(np.float32) for name, array in self.tensors.items()}


class OrtBackend:
    """Runs a bundle's graphs for ONNX Runtime, or with `standard` the ones that define the product, for validation.

    Standard graphs need kernels for their precision: there are none for bfloat16 on the CPU.
    """

    name = "cpu"
    limits: Limits | None = None

    def __init__(self, bundle: Bundle, num_threads: int | None = None, *, standard: bool = False) -> None:
        self._bundle, self._suffix, self._standard = bundle, "" if standard else "_ort", standard
        self._num_threads = len(os.sched_getaffinity(0)) if num_threads is None else num_threads
        if not 1 <= self._num_threads <= _MAX_THREADS:
            expected = f"1 to {_MAX_THREADS}"
            raise UsageError("too few or too many threads", where="num_threads", expected=expected, found=num_threads)
        self._vision: ort.InferenceSession | None = None
        self._decoder: ort.InferenceSession | None = None

    def __enter__(self) -> Self:
        if not self._bundle.manifest.model.is_text_only:
            self._vision = self._session("vision")
        self._decoder = self._session("decoder")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vision = self._decoder = None

    def encode(self, tiles: ImageTiles) -> OrtFeatures:
        session = _opened(self._vision)
        inputs = {
            "pixel_values": tiles.pixel_values[None],
            "aspect_ratio_ids": np.array([tiles.aspect_ratio_id], np.int64),
            "aspect_ratio_mask": tiles.aspect_ratio_mask[None],
        }
        names = [output.name for output in session.get_outputs()]
        with _memory_faults("not enough memory to encode the picture"):
            outputs = session.run(names, inputs)
        return OrtFeatures(tiles.key, tiles.num_tiles, dict(zip(names, outputs, strict=True)))

    def slots(self, *, num_slots: int, cache_len: int, num_tiles: int) -> OrtSlots:
        model = self._bundle.manifest.model
        with _memory_faults(f"not enough memory for the key/value cache of {num_slots} rows of {cache_len} tokens"):
            session = _opened(self._decoder)
            return OrtSlots(session, model, num_slots, cache_len, num_tiles, skips_text=not self._standard)

    def memory(self) -> NoReturn:
        hint = "ask an engine on a GPU, or `mllama plan`"
        raise UsageError("ONNX Runtime on the CPU takes memory as it goes", where=self.name, hint=hint)

    def tokens(self, *, num_slots: int, cache_len: int, num_tiles: int) -> HostTokens:
        slots = self.slots(num_slots=num_slots, cache_len=cache_len, num_tiles=num_tiles)
        return HostTokens(slots, num_slots, cache_len)

    def _session(self, graph: Literal["vision", "decoder"]) -> ort.InferenceSession:
        options = session_options(log_severity_level=_LOG_FATAL_ONLY)
        options.intra_op_num_threads = self._num_threads
        key, graphs = f"{graph}{self._suffix}", self._bundle.manifest.graphs
        file = {str(known): spec.file for known, spec in graphs.items()}.get(key)
        if file is None:
            raise BundleError(f"the bundle has no graph {key}", where=self._bundle.root, hint="export it again")
        path = self._bundle.path(file)
        try:
            with _memory_faults("not enough memory to load the graph", where=path):
                session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except MllamaError:
            raise
        except Exception as error:  # ONNX Runtime raises its own types, which share no base class
            raise BundleError("ONNX Runtime cannot load the graph", where=path, found=str(error)) from error
        shapes = vision_shapes if graph == "vision" else decoder_shapes
        for expected, values in zip(
            shapes(self._bundle.manifest.model), (session.get_inputs(), session.get_outputs()), strict=True
        ):
            found = {value.name: tuple(value.shape) for value in values}
            for name in expected.keys() | found.keys():
                if found.get(name) != expected.get(name):
                    raise BundleError(
                        f"{name} is not what manifest.json makes of the model",
                        where=path,
                        expected=expected.get(name, "no such tensor"),
                        found=found.get(name, "no such tensor"),
                        hint="export the bundle again",
                    )
        return session


class OrtSlots:
    """Caches of N slots as numpy arrays; the decoder reads and writes views of them."""

    prefill_chunk = PREFILL_CHUNK

    def __init__(
        self,
        session: ort.InferenceSession,
        model: ModelConfig,
        num_slots: int,
        cache_len: int,
        num_tiles: int,
        *,
        skips_text: bool,
    ) -> None:
        self._skips_text = skips_text  # the standard Attention refuses a batch of no rows
        self._is_text_only = model.is_text_only
        text, self._num_patches, self._max_num_tiles = model.text, model.vision.num_patches, model.vision.max_num_tiles
        self._session, self._num_tiles, self._vocab_size = session, max(1, num_tiles), text.vocab_size
        heads, width = text.num_kv_heads, text.head_dim
        dtypes = {value.name: _DTYPES[value.type] for value in session.get_inputs() if value.type in _DTYPES}
        # np.zeros takes pages from the system as they are touched: an unused tail of the cache costs nothing.
        self._caches = {
            name: np.zeros((num_slots, heads, cache_len, width), dtype)
            for name, dtype in dtypes.items()
            if name.startswith("past_")
        }
        rows = self._num_tiles * self._num_patches
        self._cross = {
            name: np.zeros((num_slots, heads, rows, width), dtype)
            for name, dtype in dtypes.items()
            if name.startswith(("cross_key_", "cross_value_"))
        }
        self._has_image = np.zeros(num_slots, np.bool_)
        self._visibility = np.zeros((num_slots, 1, self._num_tiles), np.bool_)
        self._decode_steps: dict[tuple[int, bool], _Step] = {}

    def prefill(self, slot: int, chunk: Chunk, *, num_logits: int = 1) -> NDArray[np.float32]:
        if chunk.position == 0:
            self._load(slot, chunk.features)
        row, seq = slice(slot, slot + 1), len(chunk.token_ids)
        if chunk.with_padding_tiles:
            tensors = [_own(feature).tensors for feature in chunk.features]
            with _memory_faults("not enough memory for the pictures' keys and values"):
                cross = {name: _joined([each[name] for each in tensors]) for name in self._cross}
            mask = chunk.visibility_with_padding(self._max_num_tiles)[None]
        else:
            cross = self._cross_of(row)
            mask = np.zeros((1, seq, self._num_tiles), np.bool_)
            mask[0, :, : chunk.visibility.shape[1]] = chunk.visibility
        self._visibility[slot] = False
        self._visibility[slot, 0, : chunk.visibility.shape[1]] = chunk.visibility[-1]
        pictures = self._pictures(cross, self._has_image[row], mask)
        step = _Step(self._session, self._views(row), pictures, mask.shape[:2], (num_logits, self._vocab_size))
        logits: NDArray[np.float32] = step.run(chunk.token_ids[None], np.array([chunk.position], np.int64))[0]
        return logits

    def decode(self, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        row = slice(0, len(token_ids))
        key = len(token_ids), self._has_cross_rows(row)
        step = self._decode_steps.get(key)
        if step is None:
            pictures = self._pictures(self._cross_of(row), self._has_image[row], self._visibility[row])
            step = _Step(self._session, self._views(row), pictures, (len(token_ids), 1), (1, self._vocab_size))
            self._decode_steps[key] = step
        return step.run(token_ids[:, None], positions)[:, 0]

    def cached(self, slot: int, num_tokens: int) -> dict[str, NDArray[np.float32]]:
        return {name: cache[slot : slot + 1, :, :num_tokens].astype(np.float32) for name, cache in self._caches.items()}

    def _views(self, row: slice) -> dict[str, Array]:
        return {name: cache[row] for name, cache in self._caches.items()}

    def _pictures(
        self, cross: Mapping[str, Array], has_image: NDArray[np.bool_], mask: NDArray[np.bool_]
    ) -> dict[str, Array]:
        """What the decoder takes of pictures; a text-only one takes nothing."""
        return {} if self._is_text_only else {"cross_attention_mask": mask, "has_image": has_image, **cross}

    def _cross_of(self, row: slice) -> dict[str, Array]:
        """The pictures' keys and values of these slots; of no row where none has a picture."""
        rows = row if self._has_cross_rows(row) else slice(row.start, row.start)
        return {name: array[rows] for name, array in self._cross.items()}

    def _has_cross_rows(self, row: slice) -> bool:
        return not self._skips_text or bool(self._has_image[row].any())

    def _load(self, slot: int, features: Sequence[Features]) -> None:
        """Write the pictures' keys and values behind one another, without their padding tiles."""
        self._has_image[slot] = bool(features)
        start = 0
        for feature in features:
            own = _own(feature)
            stop = start + own.num_tiles * self._num_patches
            for name, array in self._cross.items():
                array[slot, :, start:stop] = own.tensors[name][0, :, : stop - start]
            start = stop


class _Step:
    """The decoder with every input and output bound; running it writes token ids and lengths into bound memory."""

    def __init__(
        self,
        session: ort.InferenceSession,
        caches: Mapping[str, Array],
        pictures: Mapping[str, Array],
        tokens_shape: tuple[int, ...],
        logits_shape: tuple[int, int],
    ) -> None:
        self.batch, seq = tokens_shape
        self._session, self._binding = session, session.io_binding()
        self._token_ids = np.zeros((self.batch, seq), np.int64)
        self._write_indices, self._kv_lengths = np.zeros(self.batch, np.int64), np.zeros(self.batch, np.int64)
        self._logits = np.zeros((self.batch, *logits_shape), np.float32)
        inputs = {
            "input_ids": self._token_ids,
            "write_indices": self._write_indices,
            "kv_lengths": self._kv_lengths,
            "logits_indices": np.tile(np.arange(seq - logits_shape[0], seq), (self.batch, 1)),
            **{name: np.ascontiguousarray(array) for name, array in pictures.items()},
        }
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        self._kept = (inputs, caches)  # the bound memory belongs to these arrays

    def run(self, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        self._token_ids[:] = token_ids
        self._write_indices[:] = positions
        self._kv_lengths[:] = positions + token_ids.shape[1]
        with _memory_faults(f"not enough memory for a step of {self.batch} rows of {token_ids.shape[1]} tokens"):
            self._session.run_with_iobinding(self._binding)
        return self._logits


@contextmanager
def _memory_faults(what: str, where: object = None) -> Iterator[None]:
    """Turn numpy's and ONNX Runtime's ways to say that memory ran out into ours."""
    try:
        yield
    except Exception as error:  # ONNX Runtime raises its own types, which share no base class
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            hint = "use fewer rows, a shorter prompt or fewer new tokens, or a larger machine"
            raise ResourceError(what, where=where, hint=hint) from error
        raise


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=2)


def _own(feature: Features) -> OrtFeatures:
    if not isinstance(feature, OrtFeatures):
        raise UsageError("a picture was encoded by another back end", found=type(feature).__name__)
    return feature


def _opened(session: ort.InferenceSession | None) -> ort.InferenceSession:
    if session is None:
        raise UsageError("the engine is closed", hint="use it inside its `with` block")
    return session
