"""The models of the study: one file, one constructor, one name in file metadata.

    from models import build
    model = build("resnet_18", num_classes=10, stem="maxpool")
    logits = model(images)          # images: float32 in [0, 1], (N, 3, H, W)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .alexnet import alexnet
from .resnet_18 import resnet_18
from .vit import vit

MODELS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (alexnet, resnet_18, vit)}


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Return the freshly initialised model `name` for `num_classes` classes.

    `options` are the constructor's keyword arguments (JSON values); they travel with the model as
    `model.constructor`, so that a file can rebuild it.

    Raises:
        ValueError: unknown model, unknown option, or fewer than two classes.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, not {num_classes}")
    known = [p for p in inspect.signature(MODELS[name]).parameters if p != "num_classes"]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: choose from {', '.join(known)}")
    model = MODELS[name](num_classes, **options)
    # A constructor may have completed its options (a checkpoint's configuration, say); then it has set this itself.
    if not hasattr(model, "constructor"):
        constructor: Any = {"name": name, "num_classes": num_classes, "options": options}
        model.constructor = constructor
    return model


__all__ = ["MODELS", "alexnet", "build", "resnet_18", "vit"]
