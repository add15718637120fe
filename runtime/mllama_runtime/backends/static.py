"""A back end whose memory is planned once, when it is entered: static caches, fixed addresses, captured steps.

It runs over any device and programs (`mllama_runtime.device`): TensorRT and ONNX Runtime on a GPU; a double in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self
from weakref import WeakMethod

from mllama_runtime.backends.blocks import Block
from mllama_runtime.backends.device_tokens import DeviceTokens
from mllama_runtime.backends.pictures import StaticFeatures
from mllama_runtime.backends.slots import Loaded, StaticSlots
from mllama_runtime.bundle import Bundle
from mllama_runtime.device import Device, GraphName, Program, ProgramLoader, Stream
from mllama_runtime.engine_record import Limits, graphs_of
from mllama_runtime.errors import ResourceError, UsageError
from mllama_runtime.memory import MemoryPlan, gigabytes, memory_plan
from mllama_runtime.preprocessing import ImageTiles, blank_tiles


class StaticBackend:
    """Runs a bundle's graphs within the limits they were built for.

    Args:
        name: for people and results.
        open_device, load_programs: called when the back end is entered; the stream is where programs will run.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        limits: Limits,
        open_device: Callable[[], Device],
        load_programs: Callable[[Device, Stream], ProgramLoader],
    ) -> None:
        self.name, self.limits = name, limits
        self._bundle, self._open_device, self._load_programs = bundle, open_device, load_programs
        self._device: Device | None = None
        self._loaded: Loaded | None = None
        self._slots: StaticSlots | None = None
        self._memory: MemoryPlan | None = None

    def __enter__(self) -> Self:
        """Load the programs and allocate everything.

        Raises:
            EnvironmentFault: there is no device, or it fails.
            ResourceError: its memory is too small; the plan is told.
            BundleError: a program cannot be loaded.
        """
        self._device = self._open_device()
        try:
            self._loaded = self._load(self._device)
            self._slots = StaticSlots(self._loaded, self._bundle.manifest.model, self.limits)
            self._memory = self._measured(self._loaded, self._slots)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        device, loaded, slots = self._device, self._loaded, self._slots
        self._device = self._loaded = self._slots = None
        if slots is not None:
            slots.close()
        if loaded is not None:  # programs keep their weights, and an error's traceback would keep programs
            loaded.programs.clear()
        if device is not None:
            device.close()

    def _load(self, device: Device) -> Loaded:
        compute, copies = device.stream(), device.stream()
        load = self._load_programs(device, compute)
        free, total = device.memory()
        programs: dict[GraphName, Program] = {}
        graphs = graphs_of(self._bundle.manifest.model)
        try:
            for graph in graphs:
                programs[graph] = load(graph)
            plan = self._plan(programs)
            if plan.device_bytes - plan.weights_bytes > device.memory()[0]:
                raise ResourceError("it does not fit")
            blocks = {region.name: Block(device, region) for region in plan.regions}
            workspace = device.allocate(plan.workspace_bytes)
        except ResourceError as fault:
            left = [graph for graph in graphs if graph not in programs]
            beside = f", and the weights of {' and '.join(left)}" if left else ""
            found = f"{gigabytes(total)}, {gigabytes(free)} of them free before loading ({fault})"
            expected = f"{self._plan(programs)}{beside}"
            programs.clear()
            raise self._not_enough(device, expected, found) from fault
        return Loaded(device, compute, copies, programs, blocks, workspace, plan)

    def _measured(self, loaded: Loaded, slots: StaticSlots) -> MemoryPlan:
        """The plan, with what programs allocate by themselves when they run."""
        if all(program.workspace_bytes is not None for program in loaded.programs.values()):
            return loaded.plan
        model, free = self._bundle.manifest.model, loaded.device.memory()[0]
        try:
            DeviceTokens(slots).run_at_limits(None if model.is_text_only else blank_tiles(model.vision))
        except ResourceError as fault:
            expected = f"{loaded.plan}, and activations of the largest prompt and step"
            raise self._not_enough(loaded.device, expected, str(fault)) from fault
        taken = max(0, free - loaded.device.memory()[0])
        return replace(loaded.plan, workspace_bytes=loaded.plan.workspace_bytes + taken)

    def _plan(self, programs: Mapping[GraphName, Program]) -> MemoryPlan:
        """Of these programs, which may not be all."""
        model, decoder = self._bundle.manifest.model, self._bundle.manifest.graphs["decoder"]
        name = f"past_key_{model.text.self_attention_layers[0]}"
        cache_dtype = next(spec.dtype for spec in decoder.inputs if spec.name == name)
        return memory_plan(
            model,
            self.limits,
            cache_dtype=programs["decoder"].dtypes[name] if "decoder" in programs else cache_dtype,
            weights_bytes=sum(program.weights_bytes for program in programs.values()),
            workspace_bytes=max((program.workspace_bytes or 0 for program in programs.values()), default=0),
        )

    def _not_enough(self, device: Device, expected: str, found: str) -> ResourceError:
        smaller = (
            "open it with smaller limits"
            if self.name == "cuda"
            else "build with a smaller --max-batch or --max-seq-len"
        )
        hint = f"{smaller}, or in a smaller precision"
        return ResourceError("not enough memory", where=device.name, expected=expected, found=found, hint=hint)

    def memory(self) -> MemoryPlan:
        """Every byte this back end has taken."""
        self._opened()
        if self._memory is None:
            raise RuntimeError("an open back end has a plan")
        return self._memory

    def encode(self, tiles: ImageTiles) -> StaticFeatures:
        """A handle; the vision graph runs when a prompt first needs the picture."""
        return StaticFeatures(tiles.key, tiles.num_tiles, tiles, WeakMethod(self._opened().picture_arrays))

    def slots(self, *, num_slots: int, cache_len: int, num_tiles: int) -> StaticSlots:
        """The slots of this back end, of which there is one set.

        Raises:
            ResourceError: more than it was built for.
        """
        limits = self.limits
        for what, asked, limit in (
            ("slots", num_slots, limits.max_batch),
            ("tokens", cache_len, limits.max_seq_len),
            ("tiles", num_tiles, limits.max_tiles),
        ):
            if asked > limit:
                hint = "build an engine with larger limits (`mllama build`)"
                raise ResourceError(
                    f"too many {what}", where=self.name, expected=f"at most {limit}", found=asked, hint=hint
                )
        return self._opened()

    def tokens(self, *, num_slots: int, cache_len: int, num_tiles: int) -> DeviceTokens:
        """Those slots, with sampling on the device."""
        return DeviceTokens(self.slots(num_slots=num_slots, cache_len=cache_len, num_tiles=num_tiles))

    def _opened(self) -> StaticSlots:
        if self._slots is None:
            raise UsageError("the engine is closed", hint="use it inside its `with` block")
        return self._slots
