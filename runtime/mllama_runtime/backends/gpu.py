"""The back ends on an NVIDIA GPU: a bundle's TensorRT engines, or its graphs in ONNX Runtime's CUDA provider.

What is missing is said before anything is loaded, in this order: a package, a driver or GPU, an engine.
"""

from __future__ import annotations

from mllama_runtime.backends.private_trt import TensorRTBackend, gpu_compute_capabilities, tensorrt_from_backend
from mllama_runtime.backends.static import StaticBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from mllama_runtime.device.cuda import cuda_driver, open_cuda_device
from mllama_runtime.device.trt import trt_programs
from mllama_runtime.engine_record import Limits, default_limits, engine_from_bundle
from mllama_runtime.errors import UsageError


def tensorrt_backend(bundle: Bundle, name: TensorRTBackend) -> StaticBackend:
    """The newest engine of that back end that fits the bundle, the installed TensorRT and the GPU.

    Raises:
        EnvironmentFault: TensorRT, cuda-bindings, a driver or a GPU is missing or too old.
        BundleError: there is no such engine, and why.
    """
    trt = tensorrt_from_backend(name)
    cuda_driver()
    engine = engine_from_bundle(
        bundle, name, version=trt.version, compute_capability=next(iter(gpu_compute_capabilities()), None)
    )
    return StaticBackend(bundle, name, engine.record.inputs.limits, open_cuda_device, trt_programs(engine, trt))


def cuda_backend(bundle: Bundle, limits: Limits | None) -> StaticBackend:
    """ONNX Runtime's CUDA provider. limits: what memory is planned for; by default `default_limits`.

    Raises:
        EnvironmentFault: onnxruntime-gpu, cuda-bindings, a driver or a GPU is missing or too old.
        UsageError: limits that do not fit the model.
    """
    if limits is not None:
        _check(limits, bundle.manifest.model)
    from mllama_runtime.device.ort import cuda_provider, need_cuda_provider, ort_programs

    need_cuda_provider()
    cuda_driver()
    return StaticBackend(
        bundle,
        "cuda",
        limits or default_limits(bundle.manifest.model),
        open_cuda_device,
        lambda device, stream: ort_programs(bundle, cuda_provider(stream), device),
    )


def _check(limits: Limits, model: ModelConfig) -> None:
    """A cache longer than the model's positions has no rotary angles, and pictures take whole sets of tiles."""
    num_tiles = model.vision.max_num_tiles
    for name, is_right, expected in (
        ("max_batch", limits.max_batch >= 1, "at least 1"),
        ("max_seq_len", 1 <= limits.max_seq_len <= model.text.max_seq_len, f"1 to {model.text.max_seq_len}"),
        ("prefill_chunk", 1 <= limits.prefill_chunk <= limits.max_seq_len, "1 to max_seq_len"),
        (
            "max_tiles",
            model.is_text_only or (limits.max_tiles >= 1 and limits.max_tiles % num_tiles == 0),
            f"a multiple of {num_tiles}, the tiles of one picture with its padding",
        ),
    ):
        if not is_right:
            raise UsageError("not a limit for this model", where=name, expected=expected, found=getattr(limits, name))
