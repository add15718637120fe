"""The slots of a back end with fixed limits: prompts into a slot's own memory, and steps over the first rows of all.

Dimensions: N slots, B batch, G key/value heads, T tiles, P num_patches, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import Chunk, Features
from mllama_runtime.backends.blocks import Array, Block
from mllama_runtime.backends.captured import CapturedWork
from mllama_runtime.backends.pictures import Pictures, StaticFeatures
from mllama_runtime.config import ModelConfig
from mllama_runtime.contract import MAX_LOGITS
from mllama_runtime.device import Device, GraphName, ProfileName, Program, Session, Stream, Tensor
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import UsageError
from mllama_runtime.manifest import DType
from mllama_runtime.memory import MemoryPlan, tensor_bytes
from mllama_runtime.preprocessing import ImageTiles


@dataclass(frozen=True, slots=True)
class Loaded:
    """What entering the back end brings: programs on a device, and all the memory they will ever use."""

    device: Device
    compute: Stream
    copies: Stream
    programs: dict[GraphName, Program]
    blocks: Mapping[str, Block]
    workspace: int
    plan: MemoryPlan

    def session(self, graph: GraphName, profile: ProfileName) -> Session:
        return self.programs[graph].session(profile, self.workspace)


class StaticSlots:
    """N rows of a static cache, and the steps over their first B rows.

    The pictures' keys and values of all slots lie as [N, G, T*P, D], where T is the largest number of real tiles in
    use: padding tiles are dropped, and a request of more tiles that joins moves the others apart.
    """

    def __init__(self, loaded: Loaded, model: ModelConfig, limits: Limits) -> None:
        self.loaded, self.limits, self.prefill_chunk = loaded, limits, limits.prefill_chunk
        self._model, self._compute, self._blocks = model, loaded.compute, loaded.blocks
        dtype = next(iter(self._blocks["cache"].tensors.values())).dtype
        self._tile_bytes = tensor_bytes((model.vision.num_patches, model.text.head_dim), dtype)
        can_capture = all(program.capturable for program in loaded.programs.values())
        self._captured = CapturedWork(loaded.compute, can_capture=can_capture)
        self._pictures = Pictures(
            lambda: loaded.session("vision", "images"),
            self._captured,
            [block for name, block in self._blocks.items() if name.startswith("pixels_")],
            [block for name, block in self._blocks.items() if name.startswith("picture_")],
            loaded.compute,
            loaded.copies,
            [loaded.device.event() for name in self._blocks if name.startswith("pixels_")],
        )
        self.positions = np.zeros(limits.max_batch, np.int64)  # of each slot's next token
        self._tiles = np.zeros(limits.max_batch, np.int64)  # real tiles of each slot
        self._visible = np.zeros((limits.max_batch, limits.max_tiles), np.bool_)
        self._num_tiles = 1  # T
        self._seen_is_old = True
        self._prompts: dict[str, Session] = {}
        self._sessions: dict[tuple[int, int], Session] = {}
        self._sizes = _batch_sizes(limits.max_batch)
        self._landing: Array = np.empty(0, np.uint8)

    # Prompts

    def prefill(self, slot: int, chunk: Chunk, *, num_logits: int = 1) -> NDArray[np.float32]:
        self.extend(slot, chunk, num_logits=num_logits)
        return self.last_logits(num_logits)

    def last_logits(self, num_logits: int) -> NDArray[np.float32]:
        """Of the chunk before, on the host: [num_logits, V]."""
        block = self._blocks["last_logits"]
        mirror = block.turn()["logits"][0, :num_logits]
        self._compute.download(mirror, block.address)
        self._compute.synchronize()
        return mirror.copy()

    def extend(self, slot: int, chunk: Chunk, *, num_logits: int = 1) -> None:
        """Append a chunk of a prompt to a slot; its logits stay on the device, at the start of `last_logits`."""
        own = [_own(feature) for feature in chunk.features]
        if chunk.position == 0:
            self._begin(slot, own)
        seq, block, visibility = len(chunk.token_ids), self._blocks["prompt"], chunk.visibility
        has_image = self.has_picture(slot)
        num_tiles, cross = self._cross_of_prompt(slot, own, chunk.with_padding_tiles)
        mirror = block.turn()
        mirror["input_ids"][0, :seq] = chunk.token_ids
        mirror["write_indices"][0] = chunk.position
        mirror["kv_lengths"][0] = chunk.stop
        mirror["logits_indices"][0, :num_logits] = np.arange(seq - num_logits, seq)
        mirror["has_image"][0] = has_image
        mask = mirror["cross_attention_mask"].reshape(-1)[: seq * num_tiles].reshape(seq, num_tiles)
        mask[:] = False
        if has_image:
            if chunk.with_padding_tiles:
                mask[:] = chunk.visibility_with_padding(self._model.vision.max_num_tiles)
            else:
                mask[:, : visibility.shape[1]] = visibility
            self._visible[slot] = False
            self._visible[slot, : visibility.shape[1]] = visibility[-1]
            self._seen_is_old = True
        block.upload(self._compute)
        profile: ProfileName = "prefill" if has_image else "text_prefill"
        session = self._prompts.get(profile)
        if session is None:
            session = self._prompts[profile] = self.loaded.session("decoder", profile)
        session.bind(
            {
                "input_ids": block.first("input_ids", 1, seq),
                "write_indices": block.tensors["write_indices"],
                "kv_lengths": block.tensors["kv_lengths"],
                "logits_indices": block.first("logits_indices", 1, num_logits),
                **self._of_pictures(block.first("cross_attention_mask", 1, seq, num_tiles), block, cross),
                **self._caches(lambda name: self._blocks["cache"].row(name, slot)),
                "logits": self._blocks["last_logits"].first("logits", 1, num_logits, self._model.text.vocab_size),
            }
        )
        session.run(self._compute)
        self.positions[slot] = chunk.stop

    def _begin(self, slot: int, features: Sequence[StaticFeatures]) -> None:
        """Give the slot its pictures' keys and values behind one another, without their padding tiles."""
        self.leave(slot)
        if not features:
            return
        num_tiles = sum(feature.num_tiles for feature in features)
        self._make_room(num_tiles)
        self._tiles[slot] = num_tiles
        per_head, start = self._model.vision.max_num_tiles * self._tile_bytes, 0
        for feature in features:
            encoded = self._pictures.encoded(feature, {each.key for each in features})
            for name, source in encoded.items():
                self._compute.copy(
                    self._cross_address(name, slot) + start,
                    source.address,
                    feature.num_tiles * self._tile_bytes,
                    num_rows=self._model.text.num_kv_heads,
                    target_pitch=self._num_tiles * self._tile_bytes,
                    source_pitch=per_head,
                )
            start += feature.num_tiles * self._tile_bytes

    def close(self) -> None:
        """Let go of everything that holds on to programs, whoever still holds this."""
        self._prompts.clear()
        self._sessions.clear()
        self._pictures.close()

    def leave(self, slot: int) -> None:
        """Forget a slot's request; its memory is there for the next."""
        self.positions[slot] = 0
        self._tiles[slot] = 0
        self._visible[slot] = False
        self._seen_is_old = True

    def _make_room(self, num_tiles: int) -> None:
        """Let T hold a request of so many tiles: exactly if no other slot has a picture, else by moving the others."""
        others = np.flatnonzero(self._tiles)
        before, after = self._num_tiles, max(num_tiles, self._num_tiles if len(others) else 1)
        self._num_tiles = after
        if before >= after or not len(others):
            return
        heads, size = self._model.text.num_kv_heads, self._tile_bytes
        for tensor in self._blocks["cross"].tensors.values():
            for head in reversed([slot * heads + index for slot in others.tolist() for index in range(heads)]):
                if head == 0:
                    continue  # it stays where it is
                for tile in reversed(range(before)):  # a tile at a time, the last first: old and new places overlap
                    target = tensor.address + (head * after + tile) * size
                    self._compute.copy(target, tensor.address + (head * before + tile) * size, size)

    def _cross_of_prompt(
        self, slot: int, features: Sequence[StaticFeatures], with_padding_tiles: bool
    ) -> tuple[int, dict[str, Tensor]]:
        """Number of tiles, and keys and values: of the slot, or with padding tiles the vision graph's own outputs."""
        if not self.has_picture(slot):
            return 1, self._cross(0, 1)
        if not with_padding_tiles:
            shape = self._cross_shape(1, self._num_tiles)
            return self._num_tiles, {
                name: Tensor(self._cross_address(name, slot), shape, tensor.dtype)
                for name, tensor in self._blocks["cross"].tensors.items()
            }
        needed = {feature.key for feature in features}
        encoded = [self._pictures.encoded(feature, needed) for feature in features]
        num_tiles = self._model.vision.max_num_tiles
        if len(encoded) == 1:
            return num_tiles, encoded[0]
        row, joined = num_tiles * self._tile_bytes, self._blocks["joined"]
        for index, tensors in enumerate(encoded):
            for name, source in tensors.items():
                self._compute.copy(
                    joined.tensors[name].address + index * row,
                    source.address,
                    row,
                    num_rows=self._model.text.num_kv_heads,
                    target_pitch=len(encoded) * row,
                    source_pitch=row,
                )
        num_tiles *= len(encoded)
        return num_tiles, {name: joined.first(name, *self._cross_shape(1, num_tiles)) for name in joined.tensors}

    # Single tokens

    def decode(self, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        batch, results = len(token_ids), self._blocks["results"]
        mirror = results.turn()["token_ids"][:batch]
        mirror[:, 0] = token_ids
        results.upload_part(self._compute, mirror, results.address)
        self.positions[:batch] = positions
        self.step(batch, has_image=bool(self._tiles[:batch].any()))
        logits = self.logits(batch)
        self.positions[:batch] += 1
        return logits

    def logits(self, batch: int) -> NDArray[np.float32]:
        """Of the step before, on the host: [B, V], overwritten by the next call."""
        block = self._blocks["logits"]
        mirror = block.turn()["logits"][:batch]
        self._compute.download(mirror, block.address)
        self._compute.synchronize()
        return mirror[:, 0]

    def batch_size(self, num_rows: int) -> int:
        """Rows that a step for the first num_rows takes: steps are captured for a few sizes."""
        return next(size for size in self._sizes if size >= num_rows)

    def step(self, batch: int, *, has_image: bool, name: str = "", then: Callable[[], None] = lambda: None) -> None:
        """Run the decoder for one token of each of the first `batch` slots, from the token ids of the step before.

        has_image: whether a row that counts has a picture. then: what follows in the same captured work; `name` is its
        own. All rows write at `positions`, which the caller moves on.
        """
        lengths = self._blocks["lengths"]
        mirror = lengths.turn()
        np.minimum(self.positions, self.limits.max_seq_len - 1, out=mirror["write_indices"])
        np.add(mirror["write_indices"], 1, out=mirror["kv_lengths"])
        lengths.upload(self._compute)
        if has_image and self._seen_is_old:
            self._upload_seen()
        num_tiles = self._num_tiles if has_image else 0
        session = self._sessions.get((batch, num_tiles))
        if session is None:
            session = self._sessions[batch, num_tiles] = self._decode_session(batch, num_tiles)
        key = (batch, num_tiles, name)

        def work() -> None:
            session.run(self._compute)
            then()

        self._captured.run(key, work)

    def _decode_session(self, batch: int, num_tiles: int) -> Session:
        """Its addresses never change: a session for each batch size and number of tiles, 0 for text alone."""
        lengths, seen = self._blocks["lengths"], self._blocks["seen"]
        session = self.loaded.session("decoder", "decode" if num_tiles else "text_decode")
        shape = self._model.text.vocab_size
        cache = self._blocks["cache"]
        session.bind(
            {
                "input_ids": self._blocks["results"].first("token_ids", batch, 1),
                "write_indices": lengths.first("write_indices", batch),
                "kv_lengths": lengths.first("kv_lengths", batch),
                "logits_indices": self._blocks["zeros"].first("logits_indices", batch, 1),
                **self._of_pictures(
                    seen.first("cross_attention_mask", batch, 1, max(1, num_tiles)),
                    seen,
                    self._cross(batch if num_tiles else 0, max(1, num_tiles)),
                ),
                **self._caches(lambda name: cache.first(name, batch, *cache.tensors[name].shape[1:])),
                "logits": self._blocks["logits"].first("logits", batch, 1, shape),
            }
        )
        return session

    def _upload_seen(self) -> None:
        seen, (num_rows, num_tiles) = self._blocks["seen"], (len(self._visible), self._num_tiles)
        mirror = seen.turn()
        np.greater(self._tiles, 0, out=mirror["has_image"])
        flat = mirror["cross_attention_mask"].reshape(-1)[: num_rows * num_tiles]
        flat.reshape(num_rows, num_tiles)[:] = self._visible[:, :num_tiles]
        seen.upload(self._compute)
        self._seen_is_old = False

    def has_picture(self, slot: int) -> bool:
        return bool(self._tiles[slot])

    # Memory

    def run_at_limits(self, tiles: ImageTiles | None) -> None:
        """Run vision and decoder once at the largest size, so that what programs allocate by themselves is allocated.

        tiles: a picture, which stands for as many as a request may have; None for a text-only model.
        """
        chunk = np.zeros(min(self.limits.prefill_chunk, self.limits.max_seq_len), np.int64)
        pictures = []
        if tiles is not None:
            pictures = [
                StaticFeatures(f"largest {index}", tiles.num_tiles, tiles, WeakMethod(self.picture_arrays))
                for index in range(self.limits.max_tiles // self._model.vision.max_num_tiles)
            ]
        for features in (pictures, []) if pictures else ([],):
            visibility = np.ones((len(chunk), sum(each.num_tiles for each in features)), np.bool_)
            self.extend(0, Chunk(chunk, 0, visibility, features), num_logits=min(len(chunk), MAX_LOGITS))
            self.step(self.limits.max_batch, has_image=bool(features))
            self.leave(0)
        if tiles is not None:
            self._pictures.warm_up(tiles)

    def _caches(self, tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        past = {name: tensor_of(name) for name in self._blocks["cache"].tensors}
        return past | {name.replace("past_", "present_"): tensor for name, tensor in past.items()}

    def _of_pictures(self, mask: Tensor, block: Block, cross: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder takes of pictures; a text-only one takes nothing."""
        if self._model.is_text_only:
            return {}
        return {"cross_attention_mask": mask, "has_image": block.first("has_image", mask.shape[0]), **cross}

    def _cross(self, num_rows: int, num_tiles: int) -> dict[str, Tensor]:
        if self._model.is_text_only:
            return {}
        block, shape = self._blocks["cross"], self._cross_shape(num_rows, num_tiles)
        return {name: block.first(name, *shape) for name in block.tensors}

    def _cross_shape(self, num_rows: int, num_tiles: int) -> tuple[int, int, int, int]:
        text = self._model.text
        return num_rows, text.num_kv_heads, num_tiles * self._model.vision.num_patches, text.head_dim

    def _cross_address(self, name: str, slot: int) -> int:
        row = self._model.text.num_kv_heads * self._num_tiles * self._tile_bytes
        return self._blocks["cross"].tensors[name].address + slot * row

    # For validation: read back, slowly, through memory that is taken for it and kept for the next time

    def cached(self, slot: int, num_tokens: int) -> dict[str, NDArray[np.float32]]:
        cache = self._blocks["cache"]
        return {name: self._read(cache.row(name, slot))[:, :, :num_tokens] for name in cache.tensors}

    def picture_arrays(self, features: StaticFeatures) -> dict[str, NDArray[np.float32]]:
        return {name: self._read(each) for name, each in self._pictures.encoded(features, {features.key}).items()}

    def _read(self, tensor: Tensor) -> NDArray[np.float32]:
        if self._landing.nbytes < tensor.num_bytes:
            self._landing = self.loaded.device.pinned((tensor.num_bytes,), np.uint8)
        raw = self._landing[: tensor.num_bytes]
        self._compute.download(raw, tensor.address)
        self._compute.synchronize()
        return _floats(raw, tensor.dtype).reshape(tensor.shape)


def _floats(raw: Array, dtype: DType) -> NDArray[np.float32]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    known: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16}
    floats: NDArray[np.float32] = raw.view(known[dtype]).astype(np.float32)
    return floats


def _batch_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and the limit itself."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(2 * sizes[-1], limit))
    return tuple(sizes)


def _own(feature: Features) -> StaticFeatures:
    if not isinstance(feature, StaticFeatures):
        raise UsageError("a picture was encoded by another back end", found=type(feature).__name__)
    return feature
