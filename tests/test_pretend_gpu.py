"""Nothing mixes devices: the library, a training and rows of a script on a pretend GPU, held against the CPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pruning_utils import l1, l1_global, l2_filters, prune_, random
from quantization_utils import calibrate_, load_model, pack_, quantize_, save_model
from quantization_utils.post_training import ternarize_
from quantization_utils.post_training.reconstruction import Reconstruction
from quantization_utils.quantizers import TERNARY, absmean_fitted, as_is, int8_absmax
from tests.networks import KINDS, images, make
from tests.pretend_gpu import AVAILABLE, NAME
from train_test_utils import experiment, run
from train_test_utils.data import load_dataset
from train_test_utils.dataset import ImageDataset
from train_test_utils.evaluate import predict
from train_test_utils.recipe import Recipe
from train_test_utils.train import Setup, train

ROOT = Path(__file__).parent.parent
INSTALLED_FIRST = "from tests import pretend_gpu; pretend_gpu.install(); from tests.test_pretend_gpu import"


def weights_and_masks() -> None:
    weight = torch.randn(7, 3, 3, 3)
    weight[0] = 0
    for quantizer in (*TERNARY, as_is, int8_absmax):
        for here, there in zip(quantizer(weight), quantizer(weight.to(NAME)), strict=True):
            torch.testing.assert_close(there.cpu(), here)
    model = make("resnet_like")
    for score in (random, l1, l2_filters, l1_global):
        pruned = [
            prune_(copy.deepcopy(model).to(device), score, 0.5, seed=3).state_dict() for device in ("cpu", NAME)
        ]
        assert all(torch.equal(there.cpu(), here) for here, there in zip(*(p.values() for p in pruned), strict=True))


def quantized_and_packed(kind: str, path: Path) -> None:
    torch.manual_seed(0)
    here, batch = make(kind), images(32)
    there, moved = copy.deepcopy(here).to(NAME), batch.to(NAME)
    for model, x in ((here, batch), (there, moved)):
        calibrate_(quantize_(prune_(model, l2_filters, 0.5), absmean_fitted), x)
    torch.testing.assert_close(there(moved).cpu(), here(batch), rtol=0, atol=1e-3)
    there.train()(moved).sum().backward()
    assert all(p.grad is None or p.grad.device.type == NAME for p in there.parameters())
    there.load_state_dict(here.state_dict())
    packed = pack_(there)
    wanted = pack_(here)(batch)
    torch.testing.assert_close(packed(moved).cpu(), wanted, rtol=0, atol=2e-2)
    save_model(packed, path, None, batch)  # images of the CPU, as a user has them
    torch.testing.assert_close(load_model(path, NAME)[0](moved).cpu(), wanted, rtol=0, atol=2e-2)


def library(path: Path) -> None:
    weights_and_masks()
    for kind in KINDS:
        quantized_and_packed(kind, path / kind)


def post_training() -> None:
    torch.manual_seed(0)
    model, batch = make("resnet_like"), images(32)
    here, there = (
        ternarize_(copy.deepcopy(model).to(device), batch.to(device), act_bits=8, reconstruction=Reconstruction(2))
        for device in ("cpu", NAME)
    )
    torch.testing.assert_close(there(batch.to(NAME)).cpu(), here(batch), rtol=0, atol=2e-2)


def small(data: ImageDataset) -> ImageDataset:
    return replace(data, train=data.train[torch.arange(96)], test=data.test[torch.arange(32)])


def training_that_continues(path: Path) -> None:
    """Interrupted after an epoch and continued: bit for bit the weights of a whole training."""
    data = small(load_dataset("digits", path)).to(torch.device(NAME))
    recipe = Recipe(epochs=2, lr=0.01, batch_size=32, distill=0.5, ramp=0.3, ema=0.9, cutout=4, clip_norm=1.0)
    setup = Setup(torch.device(NAME), checkpoint_seconds=0)

    def trained(**more: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = calibrate_(quantize_(make("resnet_like")), images(16))
        model = train(model, data, recipe, setup, teacher=make("resnet_like"), **more)
        predict(model, data.test.images)
        return model.state_dict()

    def interrupt(record: dict) -> None:
        raise KeyboardInterrupt

    whole, state = trained(), path / "last.pt"
    train_module = sys.modules["train_test_utils.train"]
    looks, train_module.LOOK_EVERY = train_module.LOOK_EVERY, 1
    with pytest.raises(KeyboardInterrupt):
        trained(state_path=state, on_epoch=interrupt)
    train_module.LOOK_EVERY = looks
    assert state.exists()
    continued = trained(state_path=state)
    assert all(torch.equal(continued[name].cpu(), value.cpu()) for name, value in whole.items())


def rows_of_a_script(path: Path) -> None:
    import train_test_utils.cli
    import vit_experiments

    train_test_utils.cli.pick_device = lambda name: torch.device(NAME)
    experiment.load_dataset = lambda name, folder: small(load_dataset(name, folder))
    run.latency_beside = lambda *models, seconds: {}  # on the CPU
    rows = ["ptq_all_corrected_8bit_acts", "qat_all", "qat_linear_l2_filters_50"]
    options = ["--options", "checkpoint=none", "width=64", "depth=1", "patch_size=8", "--budget", "0.005"]
    where = ["--out", str(path), "--dataset", "digits", "--wandb", "disabled", "--precision", "fp32"]
    sys.argv = ["vit_experiments.py", "--only", *rows, *options, *where]
    experiment.main("vit", vit_experiments.rows, ())
    lines = (path / "vit-digits" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) + 1  # and the float network that they start from


@pytest.mark.skipif(not AVAILABLE, reason="this version of PyTorch can't have a device made in Python")
@pytest.mark.parametrize(
    "cases", ["library(path); post_training()", "training_that_continues(path); rows_of_a_script(path)"]
)
def test_on_a_pretend_gpu(cases: str, tmp_path: Path) -> None:
    """Two cases a process: it takes longer to start than some of them do."""
    code = f"{INSTALLED_FIRST} *; path = Path({str(tmp_path)!r}); {cases}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
