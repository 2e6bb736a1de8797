"""The models of the study: one file, one constructor, one name in file metadata.

    from models import build
    model = build("resnet_18", num_classes=10, stem="maxpool")
    logits = model(images)          # images: float32 in [0, 1], (N, 3, H, W)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
        ValueError: unknown model, unknown option, an option's value that makes no model, or fewer than two classes.
        FileNotFoundError: an option names a file that is not there.
    """
    check_options(name, options)
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, not {num_classes!r}")
    try:
        model = MODELS[name](num_classes, **options)
    except (ValueError, OSError):  # a sentence already
        raise
    except Exception as error:  # a word where a number belongs: torch and transformers raise types of their own
        said = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be built with {options} ({type(error).__name__}: {said})") from error
    # A constructor may have completed its options (a checkpoint's configuration, say); then it has set this itself.
    if not hasattr(model, "constructor"):
        constructor: Any = {"name": name, "num_classes": num_classes, "options": options}
        model.constructor = constructor
    return model


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Hold names against those there are, before anything is built.

    Raises:
        ValueError: unknown model, or an option that its constructor does not have.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    known = option_names(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: choose from {', '.join(known)}")


def option_names(name: str) -> list[str]:
    """The options that the constructor of a model has."""
    return [p for p in inspect.signature(MODELS[name]).parameters if p != "num_classes"]


__all__ = ["MODELS", "alexnet", "build", "check_options", "option_names", "resnet_18", "vit"]
