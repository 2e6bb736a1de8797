"""Vision Transformer through `transformers`: a pretrained checkpoint, or a compact one for 32×32 images from scratch.

Reference: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .normalize import Normalize, require_pixels

Three = list[float]  # numbers, one a colour


class ViT(nn.Module):
    """Normalisation, resizing on the device, and a `transformers` ViT with a linear head on the class token."""

    def __init__(self, network: nn.Module, mean: Three, std: Three) -> None:
        super().__init__()
        self.normalize = Normalize([255 * m for m in mean], [255 * s for s in std])
        self.network = network
        self.encoder: Any = None  # packing puts a faster way through the network here

    def forward(self, images_NCHW: Tensor) -> Tensor:
        require_pixels(images_NCHW)
        if images_NCHW.dim() != 4:
            raise ValueError(f"images are a batch (B, 3, H, W), and these are {tuple(images_NCHW.shape)}")
        # Attention could not tell its heads apart; `len`, a plain int, would be a constant of an exported network.
        if images_NCHW.shape[0] == 0:
            return self.forward(images_NCHW.new_zeros(1, *images_NCHW.shape[1:]))[:0]
        side: Any = self.network.config.image_size  # type: ignore[union-attr]
        if images_NCHW.shape[-2:] != (side, side):
            # In float32, as the model: not every type can be resized everywhere.
            images_NCHW = F.interpolate(images_NCHW.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        if self.encoder is not None:
            return self.encoder.classify(images_NCHW)
        return self.network(self.normalize(images_NCHW)).logits

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        if self.encoder is not None:
            self.encoder.reset()
        return super()._apply(*args, **kwargs)


# The keys of a ViTConfig that decide structure and meaning, as opposed to where it came from or what else is returned.
ESSENTIAL = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "image_size", "patch_size", "num_channels",
    "qkv_bias", "num_labels",
)  # fmt: skip


def vit(
    num_classes: int,
    checkpoint: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    patch_size: int | None = None,
    config: dict[str, Any] | None = None,
    mean: Three | None = None,
    std: Three | None = None,
) -> nn.Module:
    """A Vision Transformer.

    `checkpoint`: name on the Hub or local folder, loaded with its weights; its head is a new one unless it has
    `num_classes` outputs. Images are resized to its size. Otherwise a compact ViT of `width` (384; 64 a head), `depth`
    (12) layers, for 32×32 images in patches of `patch_size` (4), from scratch. `config`, `mean`, `std`: a complete
    `ViTConfig` as a dictionary and the normalisation (by default the checkpoint's), as a saved file records them; they
    rebuild the structure of any of the two without weights.

    Raises:
        FileNotFoundError: the checkpoint is neither a folder nor to be had from the Hub.
        ValueError: a checkpoint of another kind of model or with files missing or damaged, or a normalisation that is
            not mean and deviation; an unknown key of `config`, sizes that make no compact ViT, or sizes for a ViT that
            has its own.
    """
    if checkpoint is not None and config is not None:
        raise ValueError("a ViT is of a checkpoint or of a config: give one of the two")
    if checkpoint is not None and not isinstance(checkpoint, str):
        raise ValueError(f"checkpoint is a name on the Hub, a local folder or none, not {checkpoint!r}")
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"config is a dictionary, not {config!r}")
    for name, size in (("width", width), ("depth", depth), ("patch_size", patch_size)):
        if size is not None and not isinstance(size, int):
            raise ValueError(f"{name} is a whole number, not {size!r}")
        if size is not None and (checkpoint is not None or config is not None):
            owner = f"the checkpoint {checkpoint!r}" if checkpoint is not None else "a config"
            raise ValueError(f"{owner} has a {name} of its own: for the compact ViT add checkpoint=none")
    sizes = [default if size is None else size for size, default in ((width, 384), (depth, 12), (patch_size, 4))]
    own_mean = own_std = [0.5] * 3
    if checkpoint is not None:
        network, own_mean, own_std = _from_checkpoint(checkpoint, num_classes)
    elif config is not None:
        network = _of_config(config | {"num_labels": num_classes})
    else:
        network = _compact(num_classes, *sizes)
    mean, std = own_mean if mean is None else mean, own_std if std is None else std
    for name, three in (("mean", mean), ("std", std)):
        if not (
            isinstance(three, (list, tuple)) and len(three) == 3
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in three)
        ):  # fmt: skip
            raise ValueError(f"{name} is three numbers, one a colour, as in {name}=[0.5,0.5,0.5], not {three!r}")
    model = ViT(network, mean, std)
    model.constructor = {  # type: ignore[assignment]
        "name": "vit",
        "num_classes": num_classes,
        "options": {"config": _essential(network.config), "mean": list(mean), "std": list(std)},
    }
    return model


def _compact(num_classes: int, width: int, depth: int, patch_size: int) -> Any:
    if width < 1 or width % 64:
        raise ValueError(f"the width of the compact ViT is a multiple of 64 (one attention head), not {width}")
    if depth < 1:
        raise ValueError(f"the compact ViT has a depth of one layer or more, not {depth}")
    if patch_size < 1 or 32 % patch_size:
        raise ValueError(f"the patches of the compact ViT tile 32×32 pixels: choose 4 or 8, not {patch_size}")
    return _of_config({
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width, "image_size": 32, "patch_size": patch_size, "num_labels": num_classes,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    })  # fmt: skip


def _of_config(config: dict[str, Any]) -> Any:
    """A `transformers` ViT of this config (keys of `ESSENTIAL`), with newly drawn weights."""
    # Imported where it is needed: it takes seconds, and the other models do not need it.
    from transformers import ViTConfig, ViTForImageClassification

    if unknown := sorted(set(config) - set(ESSENTIAL)):
        raise ValueError(f"a ViT's config has no {unknown[0]!r} here: give {', '.join(ESSENTIAL)}")
    made = ViTConfig(**config)
    made.image_size = _side("a ViT of this config", made)
    return ViTForImageClassification(made)


def _essential(config: Any) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ESSENTIAL}


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _no_vit(checkpoint: str, error: Exception) -> str:
    return f"{checkpoint!r} cannot be loaded as a ViT ({_said(error)}): name a folder that save_pretrained wrote"


def _from_checkpoint(checkpoint: str, num_classes: int) -> tuple[Any, Three, Three]:
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, ViTForImageClassification

    verbosity = hub_logging.get_verbosity()
    try:
        hub_logging.set_verbosity_error()  # it would warn of each of its tries, before our sentence
        config = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # OSError, and what a config.json of something else makes transformers raise
        if Path(checkpoint).is_dir():
            raise ValueError(_no_vit(checkpoint, error)) from error
        raise FileNotFoundError(
            f"the ViT checkpoint {checkpoint!r} is not a local folder and cannot be had from the Hub ({_said(error)}): "
            "name a local folder with --options checkpoint=FOLDER, or train the compact ViT with --options "
            "checkpoint=none"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    if config.model_type != "vit":
        raise ValueError(f"{checkpoint!r} is a {config.model_type} checkpoint: name one of a ViT")
    _side(repr(checkpoint), config)
    try:
        loaded: Any = ViTForImageClassification.from_pretrained(
            checkpoint, num_labels=num_classes, ignore_mismatched_sizes=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # no weights, damaged ones, a connection that broke
        raise ValueError(_no_vit(checkpoint, error)) from error
    given, loading = loaded
    # A new head is what `num_classes` asks for; any other tensor that is not there would silently be random.
    absent = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if lost := sorted(name for name in absent if not name.startswith("classifier.")):
        raise ValueError(f"{checkpoint!r} has no weights for {lost[0]} and {len(lost) - 1} more: name a whole ViT")
    if damaged := [name for name, tensor in given.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{checkpoint!r} has weights that are no finite numbers in {damaged[0]}: name a whole ViT")
    # What is trained is what a saved file rebuilds, whatever else the checkpoint's configuration says.
    network = _of_config(_essential(given.config))
    try:
        network.load_state_dict(given.state_dict())
    except RuntimeError as error:  # heads of a size of their own
        raise ValueError(_no_vit(checkpoint, error)) from error
    return network, *_normalisation(checkpoint)


def _side(which: str, config: Any) -> int:
    """Pixels a side of a config's images; a ValueError unless they are square, in colour, and no patch is larger."""
    sizes = (config.image_size, config.patch_size)
    sides, patch = ([size] * 2 if isinstance(size, int) else list(size) for size in sizes)
    if config.num_channels != 3 or sides != sides[:1] * 2 or max(patch) > sides[0]:
        raise ValueError(
            f"{which} takes images of {'×'.join(map(str, sides))} pixels and {config.num_channels} channels in patches "
            f"of {config.patch_size}: name a ViT for square colour images"
        )
    return sides[0]


def _normalisation(checkpoint: str) -> tuple[Three, Three]:
    """Mean and deviation of pixels in [0, 1] that the image processor of a checkpoint names."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:  # a folder that a model's `save_pretrained` wrote has no image processor
        if any(Path(checkpoint).glob("*processor_config.json")):
            raise ValueError(f"the image processor of {checkpoint!r} is damaged ({_said(error)})") from error
        return [0.5] * 3, [0.5] * 3
    factor = getattr(processor, "rescale_factor", None) or 1 / 255
    if not getattr(processor, "do_rescale", True) or abs(255 * factor - 1) > 1e-6:
        raise ValueError(f"the image processor of {checkpoint!r} leaves pixels beyond [0, 1]: name another ViT")
    if not getattr(processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return processor.image_mean, processor.image_std
