"""Ternary (1.58-bit) weights: quantize, calibrate, pack, save, load.

    quantize_(model); calibrate_(model, images); ...train...; pack_(model); save_model(model, "model.safetensors")
    model, metadata = load_model("model.safetensors")
"""

from .file_format import ModelFileError
from .quantizers import absmean, absmean_fitted, absmean_per_tensor, absmedian, int8_absmax, mse_optimal, twn
from .storage import load_model, save_model
from .transform import calibrate_, pack_, quantize_

__all__ = [
    "ModelFileError", "absmean", "absmean_fitted", "absmean_per_tensor", "absmedian", "calibrate_", "int8_absmax",
    "load_model", "mse_optimal", "pack_", "quantize_", "save_model", "twn",
]  # fmt: skip
