"""From a trained float network to a ternary one without training: a thousand unlabelled images, layer by layer.

Layers are taken in the order in which they run. Each gets its inputs from the network that is ternary up to there, and
aims at the outputs of the float network, so it makes up for the errors of earlier layers; the last one before a
residual sum aims at the sum, and makes up for the shortcut's errors too. Then its output is corrected to be nearest to
the float network's: in mean and slope by the batch norm that follows, or in the mean by the layer's bias.

References: E. Frantar et al., "GPTQ", arXiv 2210.17323; J. Zhang, Y. Zhou, R. Saab, arXiv 2201.11113 (GPFQ);
M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721;
I. Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", arXiv 2006.10518 (batch norms).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.normalize import require_pixels
from models.select import Selection, select_layers
from models.state import evaluating

from ..bit_layers import BitConv2d, BitLinear
from ..quantizers import as_is, dequantize, mse_optimal
from ..transform import calibrate_, check_replaceable, quantize_
from .layer_inputs import (
    ResidualSum,
    Stream,
    execution_order,
    positions_of,
    replayable_blocks,
    residual_sums,
    sums_last,
)
from .moments import Moments, MomentSum, images_wanted
from .reconstruction import Reconstruction, reconstruct_block
from .second_order import matching_weight, ternarize

MIN_IMAGES = 16
SMALL_SLOPE = 1e-3  # of a batch norm: with less, its channel can't make up for anything
NO_VARIANCE = 1e-10  # of an output that never changes
GAINS = 0.5, 2.0  # a batch norm's slope is changed by no more


@dataclass(frozen=True)
class Settings:
    """How layers are made ternary; the defaults were chosen on training images outside of the calibration."""

    feedback: bool = True  # error feedback against the float network's outputs; else the nearest codes (`mse_optimal`)
    search: int = 2**13  # ways to round a channel that feedback keeps, times its weights; 0: only the best one
    correct: bool = True  # means and slopes of outputs, in batch norms and biases
    damping: float = 0.01  # of the rounding, in mean input energies; above 0
    target_damping: float = 0.1  # of the weight that makes up for earlier layers: less follows the images more closely
    sweeps: int = 2  # of coordinate descent over the codes

    def __post_init__(self) -> None:
        if min(self.damping, self.target_damping) <= 0:  # an input that is always 0 would have no energy to divide by
            raise ValueError(f"damping is above 0, not {min(self.damping, self.target_damping)}")

    def __str__(self) -> str:
        codes = ("error feedback" + " with a search" * bool(self.search)) if self.feedback else "nearest codes"
        return ", ".join([codes] + ["corrected means and slopes"] * self.correct)


DEFAULT = Settings()


def ternarize_(
    model: nn.Module,
    images: Tensor,
    settings: Settings = DEFAULT,
    act_bits: int | None = None,
    only: Selection = None,
    keep: Sequence[str] = (),
    batch_size: int = 64,
    reconstruction: Reconstruction | None = None,
) -> nn.Module:
    """Make a trained float model ternary from unlabelled images (B, 3, H, W) in [0, 1], in place; return the model.

    The layers chosen (`models.select.select_layers`) become `BitLinear` and `BitConv2d` whose weights are ternary
    already, so that packing, saving and loading treat them as after training. Do not train them further: their
    quantizer makes ±1 of whatever is not 0 (`train_test_utils.transforms.CalibratedStart` is for that). Pruned weights
    stay pruned. `act_bits`: see `quantize_`. `batch_size`: images in one call of the model. `reconstruction`: if given,
    the rounding of every block is then learned further (`reconstruct_block`). A thousand images are enough for layers
    that are used at many positions of each. One with many inputs that is used once, behind a `Flatten`, gains by more.

    Raises:
        ValueError: too few images, a layer that does not run, a grouped convolution, activations that are not finite,
            reconstruction in inference mode, and what `quantize_` and `calibrate_` refuse; the model is as it was.
    """
    require_pixels(images)
    if reconstruction is not None and torch.is_inference_mode_enabled():
        raise ValueError("reconstruction learns by gradients: call this outside of torch.inference_mode()")
    if len(images) < MIN_IMAGES:
        raise ValueError(f"calibration needs at least {MIN_IMAGES} images (1024 are usual), not {len(images)}")
    with evaluating(model):
        followers = execution_order(model, images[:2])
    chosen = check_layers(model, followers, only, keep)
    float_model = copy.deepcopy(model)
    trial = quantize_(copy.deepcopy(model), as_is, act_bits, only, keep)  # what is refused is refused before the work
    if act_bits is not None:
        calibrate_(trial, images[:2])
    del trial
    with evaluating(model):
        try:
            short_of_columns = _ternarize_layers(
                float_model, model, images, batch_size, followers, chosen, settings, reconstruction
            )
        except BaseException:  # of its layers, some would be ternary
            model.load_state_dict(float_model.state_dict())
            raise
    if short_of_columns:
        warnings.warn(
            f"fewer positions than weights per channel in {', '.join(short_of_columns)}: the inputs' covariance has no "
            "full rank there and is damped; more images would help",
            stacklevel=2,
        )
    quantize_(model, as_is, act_bits, only, keep)
    return model if act_bits is None else calibrate_(model, images)


def _ternarize_layers(
    float_model: nn.Module, model: nn.Module, images: Tensor, batch_size: int, followers: dict[str, str | None],
    chosen: Sequence[str], settings: Settings, reconstruction: Reconstruction | None,
) -> list[str]:  # fmt: skip
    """Give the `chosen` layers ternary weights, block by block; return those with fewer positions than weights."""
    reference, stream = (Stream(m, images[:1], batch_size) for m in (float_model, model))  # until a layer wants more
    sums, positions = residual_sums(model), positions_of(model, images[:1])
    short_of_columns: list[str] = []
    for block_name, names in replayable_blocks(model, list(followers), images[:2]):
        wanted = max([images_wanted(positions[name]) for name in names if name in chosen], default=1)
        if reconstruction is not None:  # it learns from what all of them have to say
            wanted = len(images)
        for s in (reference, stream):
            if len(s.images) < min(wanted, len(images)):
                s.restart(images[:wanted])
            s.enter(block_name)
        names = sums_last([name for name in names if name in chosen], sums)
        for name in names:
            sum_at = sums.get(name)
            if sum_at is not None and not sum_at.reader.startswith(f"{block_name}." if block_name else ""):
                sum_at = None  # a block's inputs are all that is replayed
            moments = observe(reference, stream, name, sum_at)
            ternarize_layer_(float_model, model, name, followers[name], moments, settings)
            if moments.columns < len(moments.mean_K):
                short_of_columns.append(name)
        if reconstruction is not None and names:
            for name, weight in reconstruct_block(reference, stream, block_name, names, reconstruction).items():
                assign(model.get_submodule(name), "weight", weight)
                if name == block_name and settings.correct:  # what corrects it stands outside of the block
                    correct_(float_model, model, name, followers[name], moments)
        for s in (reference, stream):
            s.leave()
    return short_of_columns


def check_layers(model: nn.Module, ran: dict[str, str | None], only: Selection, keep: Sequence[str]) -> list[str]:
    """The names of the float layers to be made ternary.

    Raises:
        ValueError: none, one that does not run, has weights that are not float32, can't be replaced or has a batch norm
            without statistics behind it, or a convolution that is grouped or not padded with a number of zeros.
    """
    chosen = [(n, m) for n, m in select_layers(model, only, keep) if not isinstance(m, (BitConv2d, BitLinear))]
    if not chosen:
        raise ValueError(f"no float linear or convolution layer matches {only=}, {keep=}: nothing to quantize")
    check_replaceable(chosen)
    for name, module in chosen:
        if name not in ran:
            raise ValueError(f"{name} did not run on an image, so its inputs are unknown: leave it out (keep)")
        if module.weight.dtype != torch.float32:
            raise ValueError(f"{name} has {module.weight.dtype} weights: post-training takes float32 (model.float())")
        follower = ran[name]
        if follower is not None and model.get_submodule(follower).running_mean is None:
            raise ValueError(f"{follower} has no running statistics to correct: leave {name} out (keep)")
        if getattr(module, "groups", 1) != 1:
            raise ValueError(f"{name} is a grouped convolution, which error feedback is not for: leave it out (keep)")
        if isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
            raise ValueError(f"{name} is padded with other than a number of zeros: leave it out (keep)")
    return [name for name, _ in chosen]


@torch.no_grad()
def observe(reference: Stream, stream: Stream, name: str, sum_at: ResidualSum | None = None) -> Moments:
    """Moments of layer `name`: its inputs are those in `stream`, its targets its outputs, without bias, in `reference`.

    With `sum_at`, the targets are the outputs that would give the sum that `reference` has, shortcut's errors and all.
    """
    layer: Any = stream.model.get_submodule(name)
    float_layer: Any = reference.model.get_submodule(name)
    total = MomentSum(layer, len(stream.images))
    for float_call, call in zip(reference.calls, stream.calls, strict=True):
        if sum_at is None:
            targets = reference.output_of(float_layer, float_call)
        else:
            wanted = reference.input_of(reference.model.get_submodule(sum_at.reader), float_call)
            missing = wanted - stream.input_of(stream.model.get_submodule(sum_at.reader), call)
            if sum_at.norm is not None:
                missing = missing / _along_channels(layer, _slope(reference.model.get_submodule(sum_at.norm)))
            targets = stream.output_of(layer, call) + missing
        if float_layer.bias is not None:
            targets = targets - _along_channels(float_layer, float_layer.bias)
        total.add(stream.input_of(layer, call), targets)
    return total.result()


def _slope(norm: Any) -> Tensor:
    """A batch norm's factor for each channel, (N,); ∞ where it is next to 0, so that nothing is made up for there."""
    slope_N = (1.0 if norm.weight is None else norm.weight) / (norm.running_var + norm.eps).sqrt()
    return slope_N.where(slope_N.abs() > SMALL_SLOPE, torch.inf)


@torch.no_grad()
def ternarize_layer_(
    float_model: nn.Module, model: nn.Module, name: str, follower: str | None, moments: Moments, settings: Settings
) -> None:
    """Put a ternary weight in the layer `name` of `model`; correct the mean and slope of its output if wanted."""
    layer: Any = model.get_submodule(name)
    float_layer: Any = float_model.get_submodule(name)
    float_NK = float_layer.weight.flatten(1)
    if settings.feedback:
        kept_NK = float_NK != 0
        # Where the output's mean is corrected, in what follows or in a bias, codes need not care for it.
        mean_is_free = settings.correct and (follower is not None or layer.bias is not None)
        seen = moments.centred() if mean_is_free else moments
        target_NK = matching_weight(float_NK, seen.inputs_KK, seen.cross_NK, settings.target_damping)
        given = target_NK, seen.inputs_KK, settings.damping, kept_NK
        codes_NK, scale_N = ternarize(*given, sweeps=settings.sweeps, ways=settings.search)
    else:
        codes_NK, scale_N = mse_optimal(float_NK)
    weight_NK = dequantize(codes_NK, scale_N)
    assign(layer, "weight", weight_NK.view_as(layer.weight))
    if settings.correct:
        correct_(float_model, model, name, follower, moments)


@torch.no_grad()
def correct_(float_model: nn.Module, model: nn.Module, name: str, follower: str | None, moments: Moments) -> None:
    """Correct the output of layer `name`: mean and slope in the batch norm that follows, or the mean in its bias."""
    layer: Any = model.get_submodule(name)
    weight_NK = layer.weight.flatten(1)
    if follower is not None:
        norms = (model.get_submodule(follower), float_model.get_submodule(follower))
        correct_batch_norm_(*norms, moments, weight_NK, layer.bias)
    elif layer.bias is not None:
        float_layer: Any = float_model.get_submodule(name)
        assign(layer, "bias", float_layer.bias + moments.target_mean_N - moments.output_mean(weight_NK))


def correct_batch_norm_(
    norm: Any, float_norm: Any, moments: Moments, weight_NK: Tensor, bias_N: Tensor | None = None
) -> None:
    """Set a batch norm's statistics so that its output is nearest to what the float network's has, in mean square.

    Its mean becomes that of the float network, and its slope that of the regression of the targets on the ternary
    outputs: a slope that restored the variance would let the rounding error pass as if it were signal. Not the
    statistics of its input as such: those of training, on augmented images, differ from what calibration images give,
    and it is the float network in evaluation that is to be met. `bias_N`: the layer's, which `moments` do not include.
    """
    variance_N = moments.output_variance(weight_NK)
    gain_N = (moments.covariance(weight_NK) / variance_N.clamp_min(NO_VARIANCE)).clamp(*GAINS)
    gain_N = gain_N.where(variance_N > NO_VARIANCE, 1.0)
    float_mean_N, float_variance_N = float_norm.running_mean, float_norm.running_var
    norm.running_var.copy_(((float_variance_N + norm.eps) / gain_N.square() - norm.eps).clamp_min(0))
    bias_N = torch.zeros_like(float_mean_N) if bias_N is None else bias_N
    target_mean_N = moments.target_mean_N + bias_N - float_mean_N
    norm.running_mean.copy_(moments.output_mean(weight_NK) + bias_N - target_mean_N / gain_N)


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a tensor of a module a new value; where pruning has put a mask over it, the masked entries stay 0."""
    masked = parametrize.is_parametrized(module, name)
    tensor = module.parametrizations[name].original if masked else getattr(module, name)  # type: ignore[index, union-attr]
    tensor.data.copy_(value)


def _along_channels(layer: nn.Module, values_N: Tensor) -> Tensor:
    """(N,) → (N, 1, 1) for a convolution, so that it broadcasts over the layer's output."""
    return values_N.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values_N
