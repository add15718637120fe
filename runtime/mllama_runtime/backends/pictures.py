"""Pictures on a device: pixels in, keys and values of every cross-attention layer out, the latest of them kept.

Dimensions: G key/value heads, P num_patches, D head_dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends.blocks import Block
from mllama_runtime.backends.captured import WARM_UP_RUNS, CapturedWork
from mllama_runtime.device import Event, Session, Stream, Tensor
from mllama_runtime.errors import UsageError
from mllama_runtime.preprocessing import ImageTiles


@dataclass(frozen=True, slots=True)
class StaticFeatures:
    """A picture, encoded when a prompt needs it: what was encoded lately need not be encoded again.

    read: weakly, for a picture may be kept longer than the engine, and must not keep that on the device.
    """

    key: str
    num_tiles: int
    tiles: ImageTiles = field(repr=False)
    read: WeakMethod[Callable[[StaticFeatures], dict[str, NDArray[np.float32]]]] = field(repr=False)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        if (read := self.read()) is None:
            raise UsageError("the engine is closed", hint="use its pictures inside its `with` block")
        return read(self)


class Pictures:
    """Encoded pictures: [1, G, max_num_tiles*P, D] by the vision graph's output names, padding tiles included.

    Pixels go up in a stream of their own, while the device still works on earlier steps. vision: makes sessions, one
    for each way from a block of pixels to a block of keys and values.
    """

    def __init__(
        self,
        vision: Callable[[], Session],
        captured: CapturedWork,
        pixels: Sequence[Block],
        pictures: Sequence[Block],
        compute: Stream,
        copies: Stream,
        events: Sequence[Event],
    ) -> None:
        self._vision, self._captured, self._sessions = vision, captured, dict[tuple[int, int], Session]()
        self._pixels, self._compute, self._copies = pixels, compute, copies
        self._blocks, self._free = pictures, list(range(len(pictures)))
        self._kept: OrderedDict[str, int] = OrderedDict()  # key -> block, the latest used last
        self._has_read = events  # of the vision graph, one for each block of pixels
        self._turn = 0

    def encoded(self, features: StaticFeatures, needed: Collection[str]) -> dict[str, Tensor]:
        """A picture's keys and values. `needed` are the keys of pictures that must stay meanwhile."""
        index = self._kept.get(features.key)
        if index is None:
            index = self._free.pop() if self._free else self._forget(needed)
            self._encode(features.tiles, index)
            self._kept[features.key] = index
        self._kept.move_to_end(features.key)
        return self._blocks[index].tensors

    def _forget(self, needed: Collection[str]) -> int:
        oldest = next(key for key in self._kept if key not in needed)
        return self._kept.pop(oldest)

    def warm_up(self, tiles: ImageTiles) -> None:
        """Encode into every block from every other, until each way is captured; then remember no picture."""
        for index in range(len(self._blocks)):
            for _ in range((WARM_UP_RUNS + 1) * len(self._pixels)):
                self._encode(tiles, index)
        self._free += self._kept.values()
        self._kept.clear()

    def close(self) -> None:
        """Let go of every session."""
        self._sessions.clear()

    def _encode(self, tiles: ImageTiles, index: int) -> None:
        self._turn = (self._turn + 1) % len(self._pixels)
        pixels, has_read = self._pixels[self._turn], self._has_read[self._turn]
        mirror = pixels.turn()
        mirror["pixel_values"][0] = tiles.pixel_values
        mirror["aspect_ratio_ids"][0] = tiles.aspect_ratio_id
        mirror["aspect_ratio_mask"][0] = tiles.aspect_ratio_mask
        self._copies.wait(has_read)
        pixels.upload(self._copies)
        pixels.wait(self._compute)
        key = self._turn, index
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = self._vision()
            session.bind({**pixels.tensors, **self._blocks[index].tensors})
        self._captured.run(("picture", *key), partial(session.run, self._compute))
        self._compute.record(has_read)
