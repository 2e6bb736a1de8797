"""How the golden files were made, once, by the first program of format version 1. Do not run again: that is their
point.

python3 tests/golden/make_version_1.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.fuzz_files import small_models
from quantization_utils.storage import load_model, save_model


def images() -> torch.Tensor:
    """Four images of exact 8-bit pixels, without a random generator that could change."""
    return (torch.arange(4 * 3 * 32 * 32) * 7919 % 256).view(4, 3, 32, 32) / 255


if __name__ == "__main__":
    for name, model in small_models().items():
        path = Path(sys.argv[1]) / f"version_1_{name}.safetensors"
        save_model(model, path, {"classes": [f"class {i}" for i in range(10)], "test_accuracy_pct": 12.5})
        with torch.no_grad():
            logits = load_model(path)[0](images())
        path.with_suffix(".json").write_text(json.dumps(logits.tolist()) + "\n")
