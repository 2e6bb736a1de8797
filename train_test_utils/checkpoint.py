"""Files of a run, atomic: trained weights as safetensors, the state of an unfinished training as last.pt."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from quantization_utils.file_format import replacing


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state as safetensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save(state))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote into a model of the same structure.

    Raises:
        ValueError: a file that cannot be read, or one of another model.
    """
    try:
        state = load_file(path)
        if other := state.keys() ^ model.state_dict().keys():
            raise ValueError(f"{min(other)} is in one of the two only")
        model.load_state_dict(state)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors and torch raise types of their own for damage and mismatch
        reason = first_line(error)
        raise ValueError(
            f"{path} is not a checkpoint of this model ({reason}): delete it to train the row again"
        ) from error


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write the state of an unfinished training."""
    buffer = io.BytesIO()  # torch.save tells of a full disk in its own ways; a file tells it as OSError
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_state(path: Path, map_location: torch.device) -> dict[str, Any] | None:
    """The state of an unfinished training, or None if there is none."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}): delete it to start the row anew"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of its message, or its type if it has none (EOFError of an empty file)."""
    return next(iter(str(error).splitlines()), type(error).__name__)
