"""Sampling on the device: the token that was chosen is the decoder's next input, and never leaves on the way there.

The host reads it one step later, through a ring of page-locked memory, while the device already works on the next step.
Random numbers are the host's (`sampling.gumbel_noise`), so that the same seed gives the same tokens on every back end.

Dimensions: N slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import Chunk
from mllama_runtime.backends.blocks import Array, Arrived, Block
from mllama_runtime.backends.noise import NoiseAhead
from mllama_runtime.backends.slots import StaticSlots
from mllama_runtime.contract import SAMPLER_OPTIONS
from mllama_runtime.device import Session
from mllama_runtime.memory import tensor_bytes
from mllama_runtime.preprocessing import ImageTiles
from mllama_runtime.sampling import Sampled, Sampler, with_logprobs, write_gumbel_noise
from mllama_runtime.tokens import Outcome, Pending

SamplerGraph = Literal["greedy", "sampler"]

_STATE = ("counts", "bias", "in_prompt", "options")
_NO_LOGITS, _NO_TOKEN = 1, 2  # of the sampler graphs' status


class DevicePending:
    """One step's token ids, on their way into a mirror."""

    def __init__(self, rows: Sequence[tuple[int, Sampler, int]]) -> None:
        self._rows = rows  # slot, its sampler, and the number of tokens generated before
        self._outcomes: list[tuple[int, Outcome]] | None = None
        self._mirror: Mapping[str, Array] = {}
        self._arrived: Arrived | None = None
        self.logits: NDArray[np.float32] | None = None

    def expect(self, block: Block, mirror: Mapping[str, Array]) -> None:
        self._mirror, self._arrived = mirror, block.arrived()

    def read(self) -> Sequence[tuple[int, Outcome]]:
        if self._outcomes is None and self._arrived is not None:
            self._arrived.wait()
            self._outcomes = [(slot, self._outcome(slot, sampler, step)) for slot, sampler, step in self._rows]
        return self._outcomes or ()

    def _outcome(self, slot: int, sampler: Sampler, step: int) -> Outcome:
        row = slot if len(self._mirror["status"]) > 1 else 0
        status = int(self._mirror["status"][row])
        if status == _NO_LOGITS:
            return sampler.no_logits(step)
        if status == _NO_TOKEN:
            return sampler.no_token(step)
        token_id, num_top = int(self._mirror["token_ids"][row, 0]), sampler.params.logprobs
        if num_top is None or self.logits is None:
            return Sampled(token_id)
        return with_logprobs(token_id, self.logits[row], num_top)


class DeviceTokens:
    """The slots of a static back end, with the sampler graphs behind the decoder."""

    def __init__(self, slots: StaticSlots) -> None:
        self._slots, self.prefill_chunk = slots, slots.prefill_chunk
        self._loaded, self._blocks, self._compute = slots.loaded, slots.loaded.blocks, slots.loaded.compute
        num_slots = slots.limits.max_batch
        self._samplers: list[Sampler | None] = [None] * num_slots
        self._num_chosen = [0] * num_slots
        self._noise = NoiseAhead(num_slots, self._blocks["noise"].tensors["noise"].shape[1])
        self._sessions: dict[tuple[SamplerGraph, int, bool], Session] = {}

    @property
    def max_pending(self) -> int:
        """None where log-probabilities are asked for: they come from logits that the next step overwrites."""
        wanted = any(sampler is not None and sampler.params.logprobs is not None for sampler in self._samplers)
        return 0 if wanted else 1

    def run_at_limits(self, tiles: ImageTiles | None) -> None:
        """Run every graph once at the largest size: see `StaticSlots.run_at_limits`."""
        self._slots.run_at_limits(tiles)
        graphs: tuple[SamplerGraph, ...] = ("greedy", "sampler")
        for graph in graphs:
            self._session(graph, self._slots.limits.max_batch).run(self._compute)
        self._compute.synchronize()

    def extend(self, slot: int, chunk: Chunk) -> None:
        self._slots.extend(slot, chunk)

    def leave(self, slot: int) -> None:
        self._samplers[slot] = None
        self._slots.leave(slot)

    def first(self, slot: int, sampler: Sampler) -> Pending:
        self._samplers[slot], self._num_chosen[slot] = sampler, 1
        state, results = self._blocks["first_sampling"], self._blocks["first_results"]
        self._upload_state(sampler, state)
        if sampler.is_plain:
            self._session("greedy", 1, is_first=True).run(self._compute)
        else:
            self._upload_first_noise(sampler)
            self._session("sampler", 1, is_first=True).run(self._compute)
        self._move_in(slot, state, results)
        pending = DevicePending([(slot, sampler, 0)])
        pending.expect(results, results.turn(pending))
        results.download(self._compute)
        if sampler.params.logprobs is not None:
            pending.logits = self._slots.last_logits(1)
        return pending

    def step(self, slots: Sequence[int]) -> Pending:
        rows = [(slot, self._sampler(slot), self._num_chosen[slot]) for slot in slots]
        graph: SamplerGraph = "greedy" if all(sampler.is_plain for _, sampler, _ in rows) else "sampler"
        batch = self._slots.batch_size(max(slots) + 1)
        if graph == "sampler":
            for slot, sampler, step in rows:
                if 0 < sampler.params.min_new_tokens == step:
                    self._allow_stop_tokens(slot, sampler)
            self._upload_noise(rows)
        session = self._session(graph, batch)

        def choose() -> None:
            session.run(self._compute)
            if graph == "sampler":
                counts, present = (self._blocks["sampling"].tensors[name] for name in ("counts", "present_counts"))
                size = tensor_bytes((batch, *counts.shape[1:]), counts.dtype)
                self._compute.copy(counts.address, present.address, size)

        has_image = any(self._slots.has_picture(slot) for slot in slots)
        self._slots.step(batch, has_image=has_image, name=graph, then=choose)
        for slot in slots:
            self._slots.positions[slot] += 1
            self._num_chosen[slot] += 1
        results, pending = self._blocks["results"], DevicePending(rows)
        pending.expect(results, results.turn(pending))
        results.download(self._compute)
        if any(sampler.params.logprobs is not None for _, sampler, _ in rows):
            pending.logits = self._slots.logits(batch)
        return pending

    def _sampler(self, slot: int) -> Sampler:
        sampler = self._samplers[slot]
        if sampler is None:
            raise RuntimeError(f"slot {slot} has no request")
        return sampler

    def _upload_state(self, sampler: Sampler, block: Block) -> None:
        """What a request's sampling depends on, for one row; where nothing is asked for, what adds nothing."""
        mirror, tensors = block.turn(), block.tensors
        for index, name in enumerate(SAMPLER_OPTIONS):
            mirror["options"][0, index] = min(getattr(sampler.params, name), np.finfo(np.float32).max)
        block.upload_part(self._compute, mirror["options"], tensors["options"].address)
        self._compute.clear(tensors["counts"].address, tensors["counts"].num_bytes)
        if sampler.params.logit_bias or sampler.params.min_new_tokens:
            mirror["bias"][0] = sampler.bias_of_step(0)
            block.upload_part(self._compute, mirror["bias"], tensors["bias"].address)
        else:
            self._compute.clear(tensors["bias"].address, tensors["bias"].num_bytes)
        if sampler.params.repetition_penalty != 1:
            mirror["in_prompt"][0] = sampler.seen
            block.upload_part(self._compute, mirror["in_prompt"], tensors["in_prompt"].address)

    def _move_in(self, slot: int, state: Block, results: Block) -> None:
        """Give the slot the row's state behind its first token, and the token itself."""
        for name in _STATE:
            source = state.tensors["present_counts" if name == "counts" else name]
            self._compute.copy(self._blocks["sampling"].row(name, slot).address, source.address, source.num_bytes)
        token_id = results.tensors["token_ids"]
        target = self._blocks["results"].row("token_ids", slot).address
        self._compute.copy(target, token_id.address, token_id.num_bytes)

    def _allow_stop_tokens(self, slot: int, sampler: Sampler) -> None:
        block = self._blocks["first_sampling"]
        bias = block.turn()["bias"]
        bias[0] = sampler.bias_of_step(self._num_chosen[slot])
        block.upload_part(self._compute, bias, self._blocks["sampling"].row("bias", slot).address)

    def _upload_first_noise(self, sampler: Sampler) -> None:
        if sampler.params.temperature > 0:
            block = self._blocks["first_noise"]
            mirror = block.turn()["noise"]
            write_gumbel_noise(mirror[0], sampler.seed, 0)
            block.upload_part(self._compute, mirror, block.address)

    def _upload_noise(self, rows: Sequence[tuple[int, Sampler, int]]) -> None:
        block = self._blocks["noise"]
        mirror = block.turn()["noise"]
        for slot, sampler, step in rows:
            if sampler.params.temperature > 0:
                self._noise.write(mirror[slot], slot, sampler, step)
                block.upload_part(self._compute, mirror[slot], block.row("noise", slot).address)
                self._noise.draw(slot, sampler, step + 1)

    def _session(self, graph: SamplerGraph, batch: int, *, is_first: bool = False) -> Session:
        """A sampler graph over the decoder's logits of the first rows, or over those of a prompt's last token."""
        session = self._sessions.get((graph, batch, is_first))
        if session is None:
            session = self._sessions[graph, batch, is_first] = self._loaded.session(graph, "rows")
            prefix = "first_" if is_first else ""
            logits = self._blocks["last_logits" if is_first else "logits"]
            results, state = self._blocks[f"{prefix}results"], self._blocks[f"{prefix}sampling"]
            tensors = {
                "logits": logits.first("logits", batch, logits.tensors["logits"].shape[-1]),
                "token_ids": results.first("token_ids", batch, 1),
                "status": results.first("status", batch),
            }
            if graph == "sampler":
                sources = {**state.tensors, **self._blocks[f"{prefix}noise"].tensors}
                tensors |= {name: replace(each, shape=(batch, *each.shape[1:])) for name, each in sources.items()}
            session.bind(tensors)
        return session
