"""Files of a run, atomic: trained weights as safetensors, the state of an unfinished training as last.pt."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from quantization_utils.file_format import replacing

from .cli import is_out_of_memory
from .output import first_line


def save_weights(model: nn.Module, path: Path, config_hash: str) -> None:
    """Write the state of a model that was trained with this configuration as safetensors.

    Raises:
        OSError: the file cannot be written; it says what is there now.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        # Both in one entry: the library writes several in any order, and the same weights have to give the same bytes.
        file.write(save(state, {"config_hash": f"{config_hash} {_digest(state)}"}))


def load_weights(model: nn.Module, path: Path, config_hash: str | None = None) -> None:
    """Load what `save_weights` wrote into a model of the same structure. `config_hash`: None accepts any configuration.

    Raises:
        ValueError: a file that cannot be read, or one of another model or configuration.
    """
    try:
        with safe_open(path, "pt") as file:
            mark = (file.metadata() or {}).get("config_hash", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
        owner, _, digest = mark.partition(" ")  # older files lack one or both
        if digest and digest != _digest(state):
            raise ValueError("its weights do not agree with its SHA-256: the file is damaged")
        if owner and config_hash not in (None, owner):
            raise ValueError(f"it was trained with configuration {owner}, not {config_hash}")
        if other := state.keys() ^ model.state_dict().keys():
            raise ValueError(f"{min(other)} is in one of the two only")
        model.load_state_dict(state)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors and torch raise types of their own for damage and mismatch
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise ValueError(
            f"{path} is not a checkpoint of this model ({reason}): delete it to train the row again"
        ) from error


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write the state of an unfinished training.

    Raises:
        OSError: the file cannot be written; it says what is there now.
    """
    buffer = io.BytesIO()  # torch.save raises errors of its own on a full disk, a file an OSError
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_state(path: Path, map_location: torch.device) -> dict[str, Any] | None:
    """The state of an unfinished training, or None if there is none.

    Raises:
        ValueError: a file that cannot be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # PyTorch's own words are long, and advise to load it in a way that may run a program.
        reason = "it is no state of a training" if isinstance(error, UnpicklingError) else first_line(error)
        raise ValueError(f"{path} cannot be read ({reason}): delete it to start the row anew") from error
