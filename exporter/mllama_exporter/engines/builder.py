"""Network to engine bytes: the one place where TensorRT works for long, can be interrupted, and can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from mllama_runtime.backends.private_trt import Log, TensorRT
from mllama_runtime.disk import disk_faults, write_whole
from mllama_runtime.engine_record import EngineInputs, Profile
from mllama_runtime.errors import BundleError, ResourceError

from mllama_exporter.engines.network import Network
from mllama_exporter.engines.plan import compute_capability_names

Progress = Callable[[int, int], object]
"""Called with steps done, and how many there are."""

_OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "bad_alloc", "Error Code 2")
_WHOLE_BUILD = "Building engine"  # TensorRT's name of the outermost phase


def engine_from_network(
    network: Network,
    builder: Any,
    profiles: Sequence[Profile],
    inputs: EngineInputs,
    log: Log,
    *,
    timing_cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Any:
    """The engine's bytes, as a buffer of TensorRT's.

    Raises:
        BundleError: TensorRT cannot build it; its last error is quoted.
        ResourceError: it ran out of memory.
        KeyboardInterrupt, SystemExit: of a signal; the build is stopped first.
    """
    trt, config = network.trt, builder.create_builder_config()
    config.profiling_verbosity = trt.api.ProfilingVerbosity.DETAILED  # names, and the launches told at the end
    flags = trt.api.BuilderFlag
    config.clear_flag(flags.TF32)  # FP32 products of 10 bits would not be what FP32 is validated as
    if hasattr(flags, "REQUIRE_USER_ALLOCATION"):  # or TensorRT-RTX allocates in a step, which cannot be captured
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    if inputs.strip_weights:
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)
    if inputs.weight_streaming:
        config.set_flag(flags.WEIGHT_STREAMING)
    _set_targets(config, inputs, trt)
    for profile in profiles:
        config.add_optimization_profile(_trt_profile(builder, profile))
    if timing_cache is not None and trt.flavour.has_timing_cache:
        load_timing_cache(config, timing_cache, log)
    monitor = _new_monitor(trt, progress)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as pool:  # the builder lets go of the interpreter: signals arrive here meanwhile
        future = pool.submit(builder.build_serialized_network, network.definition, config)
        try:
            engine = future.result()
        except BaseException as fault:
            monitor.fault = fault
            while not future.done():
                with suppress(KeyboardInterrupt):  # one is under way; leaving while the builder works would abort
                    wait([future])
            raise
    if monitor.fault is not None:
        raise monitor.fault
    if engine is None or engine.nbytes == 0:
        reason = log.last_error()
        if any(sign in reason for sign in _OUT_OF_MEMORY):
            raise ResourceError(f"{trt.flavour.title} ran out of memory", found=reason, hint="lower the limits")
        raise BundleError(f"{trt.flavour.title} cannot build the engine", where=network.path, found=reason)
    if timing_cache is not None and trt.flavour.has_timing_cache:
        with disk_faults(timing_cache):
            write_whole(timing_cache, bytes(config.get_timing_cache().serialize()))
    return engine


def load_timing_cache(config: Any, path: Path, log: Log) -> None:
    """Use a file of earlier timings; a damaged one, or one from elsewhere, is passed over with a warning in the log."""
    data = b""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        pass  # the first build writes it
    except OSError as fault:
        log.warnings.append(f"the timing cache {path} cannot be read ({fault.strerror}) and is not used")
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warnings.append(f"the timing cache {path} is damaged or from elsewhere and is not used")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _set_targets(config: Any, inputs: EngineInputs, trt: TensorRT) -> None:
    names = compute_capability_names(inputs, trt)
    if names:
        config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.api.ComputeCapability, name), index)


def _trt_profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, shape in profile.shapes.items():
        made.set_shape(name, shape.smallest, shape.usual, shape.largest)
    return made


def _new_monitor(trt: TensorRT, progress: Progress) -> Any:
    class Monitor(trt.api.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Tells how far the outermost phase is, and stops the build once there is a fault to be raised instead."""

        def __init__(self) -> None:
            super().__init__()
            self.fault: BaseException | None = None
            self._total = 0

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            if phase == _WHOLE_BUILD:
                self._total = num_steps
                self._tell(0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == _WHOLE_BUILD:
                self._tell(step + 1)
            return self.fault is None

        def phase_finish(self, phase: str) -> None:
            pass

        def _tell(self, done: int) -> None:
            try:
                progress(done, self._total)
            except BaseException as fault:  # TensorRT would print and forget it
                self.fault = fault

    return Monitor()
