"""From a bundle in FP32, FP16 or BF16 to a quantised one: statistics, scales, weights, graphs.

    quantized_bundle_from_bundle(Bundle.open(path), output, QuantizeOptions("int8"), calibration_samples(pictures))

`scheme` says what the precisions are, `layers` what they apply to.
"""

from mllama_exporter.quantize.calibration import calibration_samples
from mllama_exporter.quantize.pipeline import QuantizeOptions, quantized_bundle_from_bundle

__all__ = ["QuantizeOptions", "calibration_samples", "quantized_bundle_from_bundle"]
