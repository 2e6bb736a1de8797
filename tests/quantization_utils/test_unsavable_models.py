"""Models that no file can rebuild: `save_model` says what is in the way, and writes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build
from models.normalize import Normalize
from quantization_utils import calibrate_, pack_, quantize_, save_model
from tests.golden.make_version_1 import images


class WithAFunction(nn.Sequential):
    def forward(self, images):
        return self[3](torch.flatten(self[2](self[1](self[0](images))), 1))


def test_a_model_that_no_file_can_rebuild_is_told_why(tmp_path):
    model = WithAFunction(Normalize(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"\(flatten is no module, such as nn.Flatten"):
        save_model(pack_(calibrate_(quantize_(model), images())), tmp_path / "x")
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2))
    with pytest.raises(ValueError, match="of 3×32×32, and was not calibrated with others"):
        save_model(pack_(quantize_(model)), tmp_path / "x")
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 2))
    calibrate_(quantize_(model, act_bits=None), torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="has a float output inside the network"):
        save_model(pack_(model), tmp_path / "x")
    chain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"\(0 reads the image without a Normalize before it\)"):
        save_model(pack_(calibrate_(quantize_(chain), images())), tmp_path / "x")
    chain = nn.Sequential(Normalize(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"\(the input of 1 has no static scale: call calibrate_"):
        save_model(pack_(quantize_(chain)), tmp_path / "x")
    chain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"how to rebuild its model: .* \(not a chain of convolutions"):
        save_model(pack_(quantize_(chain)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def change_activation(model):
    model.relu = nn.SiLU()


def change_epsilon(model):
    model.bn1.eps = 0.5


def add_hook(model):
    model.bn1.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(change_activation, "its relu is SiLU"), (change_epsilon, "its bn1 is BatchNorm2d.*eps=0.5"),
     (add_hook, "bn1 has hooks")],
)  # fmt: skip
def test_what_was_changed_since_it_was_built_is_not_saved_as_what_was_built(change, sentence, tmp_path):
    model = build("resnet_18", 10).eval()
    change(model)
    with pytest.raises(ValueError, match=f"this model cannot be saved: {sentence}"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Pooled(nn.Sequential):
    def forward(self, images):
        return self[4](torch.flatten(self[3](self[2](self[1](self[0](images)))), 1))


def test_a_function_is_told_and_not_the_layer_before_it(tmp_path):
    model = Pooled(Normalize(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\(flatten is no module, such as nn.Flatten"):
        save_model(pack_(calibrate_(quantize_(model), images())), tmp_path / "x")
    model = nn.Sequential(Normalize(), nn.Conv2d(3, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(1800, 2))
    with pytest.raises(ValueError, match=r"\(not a chain of convolutions, batch norms and nn.ReLU modules\)"):
        save_model(pack_(calibrate_(quantize_(model), images())), tmp_path / "x")
