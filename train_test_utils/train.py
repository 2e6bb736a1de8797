"""One training run, from the first step to the last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

from quantization_utils.bit_layers import BitConv2d, BitLinear, fixed_weights

from . import distributed
from .checkpoint import load_state, save_state
from .crowding import Crowding
from .cuda_graph import Replayed
from .data import augment, epoch_order, to_float
from .dataset import ImageDataset
from .output import first_line
from .recipe import Recipe

LOOK_EVERY = 20  # steps between two looks at the loss, which are also when states are saved: a look makes a GPU wait


class NonFiniteLoss(ValueError):
    """Training diverged; the message names the step, and the last good checkpoint stays."""


class Totals:
    """Figures of the epoch so far: the sum of its losses, how many images were correct, and how many there were.

    And the first step whose loss was not finite, or -1. All four stay in one tensor on the device, which is seldom
    read: reading makes a GPU wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.empty(4, device=device)
        self.clear()

    def clear(self) -> None:
        self.tensor[:3] = 0
        self.tensor[3] = -1

    def add(self, loss: Tensor, correct: Tensor, images: int, step: Tensor) -> None:
        """Add one batch of every process: all see the same totals, and stop together when one diverges.

        `loss`, `correct`: of this process, (); `images`: how many it had; `step`: the number of the step, ().
        """
        figures = torch.stack([loss.detach() / distributed.world_size(), correct, torch.full_like(loss, images)])
        figures = distributed.summed(figures)
        self.tensor[:3] += figures
        self.tensor[3] = torch.where(torch.isfinite(figures[0]) | (self.tensor[3] >= 0), self.tensor[3], step)

    def means(self, batches: int) -> dict[str, float]:
        """Loss per batch and accuracy over the `batches` added.

        Raises:
            FloatingPointError: a loss was not finite; the message names the step.
        """
        loss, correct, images, bad_step = self.tensor.tolist()
        if bad_step >= 0:
            raise FloatingPointError(f"the loss was not finite at step {int(bad_step)}")
        return {"train_loss": loss / batches, "train_accuracy_pct": 100 * correct / images}


@dataclass(frozen=True)
class Setup:
    """Where and how a run computes. Nothing here is meant to change its result, beyond rounding."""

    device: torch.device
    precision: torch.dtype = torch.float32  # of the autocast regions
    compile: bool = False
    checkpoint_seconds: float = 60.0  # between two states that an interrupted run can continue from


def train(
    model: nn.Module,
    dataset: ImageDataset,
    recipe: Recipe,
    setup: Setup,
    *,
    seed: int = 0,
    budget: float = 1.0,
    teacher: nn.Module | None = None,
    state_path: Path | None = None,
    title: str = "",
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> nn.Module:
    """Train `model` in place by `recipe` and return it, in evaluation mode.

    `budget`: factor of the recipe's steps. `teacher`: what a recipe that distils learns from. `state_path`: where the
    state is saved and continued from. `title`: of the progress bar. `on_epoch`: gets each epoch's figures.
    Every random number depends on (seed, step) or (seed, epoch) alone, so a run that is interrupted and continues from
    `state_path` ends in the same weights, bit for bit, on a CPU with the same number of threads.

    Raises:
        ValueError: a recipe that distils, and no teacher.
        NonFiniteLoss: the loss was infinite or not a number; the last good state stays at `state_path`.
    """
    if recipe.distill and teacher is None:
        raise ValueError("the recipe distils from a teacher, and there is none: start the row from a trained one")
    device, rank, world = setup.device, distributed.rank(), distributed.world_size()
    train_split = dataset.train
    steps_per_epoch = recipe.steps_per_epoch(len(train_split))
    steps = recipe.steps(len(train_split), budget)
    model.to(device, memory_format=torch.channels_last).train()
    if teacher is not None:
        teacher.to(device, memory_format=torch.channels_last).eval()
    optimizer = recipe.build_optimizer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == torch.float16)
    averaged = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
    )
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"averaged": averaged} if averaged else {})
    totals = Totals(device)
    start, seconds_before = _resume(parts, totals, state_path, device)
    bit_layers = [m for m in model.modules() if isinstance(m, (BitLinear, BitConv2d))]
    runner = _runner(model, setup)
    autocast = (
        torch.autocast(device.type, setup.precision) if setup.precision != torch.float32 else nullcontext()
    )
    batch_of_all = min(recipe.batch_size, len(train_split))
    batch = torch.empty(len(range(rank, batch_of_all, world)), dtype=torch.int64, device=device)
    number = torch.empty((), device=device)  # of the step

    def do_step() -> None:
        """From `batch`, the numbers of images, to new weights and figures in `totals`; all of it on the device."""
        optimizer.zero_grad(set_to_none=True)
        images, labels = _augmented(dataset, batch, recipe, budget), train_split.labels[batch]
        with autocast:
            logits = runner(images)
            teacher_logits = _soft_targets(teacher, images)
        loss = _loss(logits.float(), labels, teacher_logits, recipe)
        _step(loss, model, optimizer, scaler, recipe)
        totals.add(loss, (logits.argmax(1) == labels).sum(), len(labels), number)

    # No graph where processes exchange gradients, nor with loss scaling: GPUs that need it are slow enough for Python
    # to keep up.
    replays = device.type == "cuda" and world == 1 and not scaler.is_enabled()
    repeated = Replayed(do_step) if replays else None
    for group in optimizer.param_groups:  # whatever a state that was saved elsewhere has there
        group["lr"] = torch.empty((), device=device) if repeated else 0.0
    saved_at = time.monotonic()
    began = saved_at - seconds_before
    progress = tqdm(
        total=steps * batch_of_all, initial=start * batch_of_all, unit=" images", unit_scale=True, desc=title,
        leave=False, disable=rank > 0, mininterval=1.0 if sys.stderr.isatty() else 60.0,
    )  # fmt: skip
    crowding = Crowding() if device.type == "cpu" and rank == 0 else None

    for step in range(start, steps):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == start:
            order = epoch_order(len(train_split), seed, epoch, device)
        batch.copy_(order[position * recipe.batch_size : (position + 1) * recipe.batch_size][rank::world])
        number.fill_(step)
        torch.manual_seed(hash((seed, step, rank)) & 0x7FFFFFFF)  # augmentation and dropout
        lr = recipe.lr_at(step, steps)
        _set_learning_rate(optimizer, lr)
        part = recipe.quantized_part_at(step, steps)
        for layer in bit_layers:
            layer.quantized_part = part
        if repeated:
            repeated(variant=part)
        else:
            do_step()
        if averaged is not None:
            averaged.update_parameters(model)

        last_of_epoch = position == steps_per_epoch - 1 or step == steps - 1
        looks = step % LOOK_EVERY == 0 or last_of_epoch
        if looks:  # all processes at the same steps, so that they stop together
            try:
                record = {"epoch": epoch + 1, "lr": lr} | totals.means(position + 1)
            except FloatingPointError as error:
                raise _diverged(str(error), state_path) from None
            shown = {"loss": f"{record['train_loss']:.3f}", "acc": f"{record['train_accuracy_pct']:.1f}%"}
            progress.set_postfix(shown, refresh=False, lr=f"{lr:.2g}")
            if crowding and (news := crowding.news()):
                progress.write(news, file=sys.stderr)
        progress.update(batch_of_all)
        if last_of_epoch:
            on_epoch(record | {"step": step + 1, "train_seconds": round(time.monotonic() - began, 3)})
            totals.clear()
        if looks and rank == 0 and state_path and time.monotonic() - saved_at > setup.checkpoint_seconds:
            if _is_finite(model):  # else the next loss will say so, and the last good state stays
                _save(parts, totals, step + 1, time.monotonic() - began, state_path)
            saved_at = time.monotonic()

    progress.close()
    for layer in bit_layers:
        layer.quantized_part = 1.0  # a ramp may have ended short of that
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    if recipe.statistics_images:
        _estimate_statistics(model, dataset, recipe, budget, seed)
    if not _is_finite(model):  # the last step, whose loss was finite, may have broken it
        raise _diverged("a weight was not finite at the end", state_path)
    return model.eval()


def _save(parts: dict[str, Any], totals: Totals, step: int, seconds: float, path: Path) -> None:
    """Save the state after so many steps, which took so many seconds, as `_resume` loads it."""
    reached = {"step": step, "sums": totals.tensor, "seconds": seconds}
    save_state(reached | {name: part.state_dict() for name, part in parts.items()}, path)


def _resume(
    parts: dict[str, Any], totals: Totals, path: Path | None, device: torch.device
) -> tuple[int, float]:
    """Load the state of an interrupted run into `parts` and `totals`; return (steps done, seconds they took)."""
    state = load_state(path, device) if path is not None else None
    if state is None:
        return 0, 0.0
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        totals.tensor.copy_(state["sums"])
        return state["step"], state["seconds"]
    except Exception as error:  # each part has its own way of saying that a state is not one of its own
        raise ValueError(
            f"{path} is not the state of this training ({first_line(error)}): delete it to start the row anew"
        ) from error


def _runner(model: nn.Module, setup: Setup) -> nn.Module:
    """What a step calls for the model: wrapped for several processes, and compiled if wanted."""
    if setup.device.type == "cuda":
        if setup.device.index is not None:
            torch.cuda.set_device(setup.device)  # for the streams and graphs of the training
        torch.backends.cudnn.benchmark = True  # all batches have one shape, so its fastest algorithms are found once
    runner = distributed.wrapped(model)
    if setup.compile:
        torch.compiler.reset()  # variants are counted over all models of a process, and the ninth would run uncompiled
        runner = torch.compile(runner)
    return runner


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group_lr = lr * group["lr_factor"]
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it there
            group["lr"].fill_(group_lr)
        else:
            group["lr"] = group_lr


def _augmented(dataset: ImageDataset, batch: Tensor, recipe: Recipe, budget: float) -> Tensor:
    """The training images of these numbers, altered at random, float32 in [0, 1]."""
    images = augment(
        dataset.train.images[batch], crop_padding=recipe.crop_padding, flip=dataset.flip,
        cutout=recipe.cutout_at(budget),
    )  # fmt: skip
    return to_float(images).contiguous(memory_format=torch.channels_last)


def _step(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, recipe: Recipe
) -> None:
    scaler.scale(loss).backward()
    if recipe.clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    for group in optimizer.param_groups:
        if "capturable" in group:  # AdamW wants to know beforehand whether a graph is taken
            group["capturable"] = loss.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    scaler.step(optimizer)
    scaler.update()


def _estimate_statistics(model: nn.Module, dataset: ImageDataset, recipe: Recipe, budget: float, seed: int) -> None:
    """Take batch norm's statistics anew: running averages lag behind moving weights, most of all after few steps.

    Images are augmented as in training. With the statistics of unaltered images a network that was trained for long
    gets worse: it knows these images by heart, and has only seen them with a blanked square.
    """
    torch.manual_seed(seed)  # augmentation and dropout; a run may have been interrupted after its last step
    chosen = epoch_order(len(dataset.train), seed, 0, dataset.train.images.device)[: recipe.statistics_images]
    if len(chosen) % recipe.batch_size == 1 < len(chosen):
        chosen = chosen[:-1]  # one image alone has no variance
    with fixed_weights(model):
        update_bn((_augmented(dataset, batch, recipe, budget) for batch in chosen.split(recipe.batch_size)), model)


def _soft_targets(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    if teacher is None:
        return None
    with torch.no_grad():
        return teacher(images).float()


def _loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross-entropy, mixed with the divergence from the teacher's softened classes (arXiv 1503.02531)."""
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if teacher_logits is None:
        return loss
    t = recipe.temperature
    divergence = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(teacher_logits / t, 1), reduction="batchmean", log_target=True
    )
    return (1 - recipe.distill) * loss + recipe.distill * t * t * divergence


def _is_finite(model: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def _diverged(what: str, state_path: Path | None) -> NonFiniteLoss:
    saved = state_path is not None and state_path.exists()
    kept = f"the last good state is {state_path}" if saved else "nothing was saved yet"
    return NonFiniteLoss(f"{what}; {kept}. Lower the recipe's learning rate.")

