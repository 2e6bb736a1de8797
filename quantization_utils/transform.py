"""`quantize_` makes layers trainable ternary, `calibrate_` fixes activation scales, `pack_` ends training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from models.graph import PASSES, module_of, put_module, remove_parametrization, replace_module, trace
from models.normalize import Normalize, require_pixels
from models.select import Selection, refuse_compiled, select_layers
from models.state import evaluating

from .bit_layers import BitConv2d, BitLinear, PackedConv2d, PackedLinear, Quantized, StaticQuantizer, fixed_weights
from .dead_channels import remove_dead_channels
from .network import NotANetwork, PackedNetwork, to_nodes
from .nodes import IMAGE_SHAPE
from .packed_encoder import fuse_encoder_, remove_dead_neurons_
from .quantizers import Quantizer, absmean, fits_int32, is_finite

# What may stand before a layer whose input has a static scale; pixels, behind the normalisation, are 8-bit already.
NODE_ENDS = (nn.ReLU, nn.AdaptiveAvgPool2d, Quantized, Normalize)
SAMPLES = 50_000  # activations of a tensor that decide its step
BIT_TO_PACKED: dict[type[nn.Module], Any] = {BitLinear: PackedLinear, BitConv2d: PackedConv2d}


def quantize_(
    model: nn.Module,
    quantizer: Quantizer = absmean,
    act_bits: int | None = 8,
    only: Selection = None,
    keep: Sequence[str] = (),
) -> nn.Module:
    """Replace linear and convolution layers by trainable quantized ones, in place; return the model.

    The new layers take over the float weights, biases and pruning masks. `act_bits`: bits of each layer's input, scaled
    dynamically (see `calibrate_` for static scales); None leaves activations alone. `only`, `keep`: which layers
    (`models.select.select_layers`); layers that are quantized already stay as they are, so that a second call with
    another quantizer takes the rest.

    Raises:
        ValueError: `act_bits` outside 2 … 8, nothing to quantize, a quantizer that returns something else than
            `quantizers` says, a layer of a class derived from PyTorch's, which may do something else, one whose weight
            is computed from several tensors, or one whose sums 32 bits can't hold; the model is as it was.
    """
    if act_bits is not None and not (isinstance(act_bits, int) and 2 <= act_bits <= 8):
        raise ValueError(f"activations can have 2 to 8 bits or None (float), not {act_bits!r}")
    layers = select_layers(model, only, keep)
    if not layers:
        raise ValueError(f"no linear or convolution layer matches only={only!r}, keep={keep!r}: nothing to quantize")
    _refuse_a_layer(model)
    layers = [(name, layer) for name, layer in layers if not isinstance(layer, (BitLinear, BitConv2d))]
    check_replaceable(layers)
    weights: list[Any] = [layer.weight for _, layer in layers]
    if weights:
        _check_quantizer(quantizer, min(weights, key=torch.numel).detach())
    quantized: dict[str, BitLinear | BitConv2d] = {}
    for name, layer in layers:
        bit_class = BitLinear if isinstance(layer, nn.Linear) else BitConv2d
        quantized[name] = bit_class.from_float(layer, quantizer, act_bits)  # type: ignore[arg-type]
    for name, layer in quantized.items():
        inputs = layer.weight.shape[1:].numel()
        # At 8 bits first: what fits then does so with any codes, and no quantizer need run to tell its bits.
        if act_bits is not None and not (fits_int32(inputs, 8) or fits_int32(inputs, layer.weight_bits)):
            raise ValueError(f"{name} has {inputs:,} inputs, whose sums 32 bits can't hold: make it ternary or keep it")
    for name, layer in quantized.items():
        replace_module(model, name, layer)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fast path would read the float weights, past the layers
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which the layers do not take
    return model


def _refuse_a_layer(model: nn.Module) -> None:
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise ValueError("the model is a layer itself, which cannot take its own place: put it into an nn.Sequential")


def _check_quantizer(quantizer: Quantizer, weight: Tensor) -> None:
    """Raise a ValueError unless it returns for this weight what a quantizer has to return."""
    if not callable(quantizer):
        raise ValueError(f"a quantizer is a function such as quantization_utils.absmean, not {quantizer!r}")
    made = quantizer(weight)
    is_right = isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made)
    if is_right:
        codes, scale = made
        is_right = (codes.dtype, codes.shape) == (torch.int8, weight.shape)
        is_right &= (scale.dtype, scale.shape) == (torch.float32, weight.shape[:1])
        if weight.isfinite().all():
            is_right &= bool((scale.isfinite() & (scale > 0)).all())
    if not is_right:
        raise ValueError(
            f"{getattr(quantizer, '__name__', quantizer)} is no quantizer: of a weight (N, ...) one returns codes, "
            "int8 of that shape, and a scale of each channel, float32 (N,), positive and finite"
        )


def check_replaceable(layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise a ValueError for a layer (name, module) whose class or weight a quantized layer can't take over."""
    for name, layer in layers:
        if (kind := type_before_parametrizations(layer)) not in (nn.Linear, nn.Conv2d):
            raise ValueError(f"{name} is a {kind.__name__}, whose own computation would be lost: leave it out (keep)")
        parametrizations = getattr(layer, "parametrizations", {})
        for tensor in ("weight", "bias"):
            if tensor in parametrizations:
                plain = hasattr(parametrizations[tensor], "original")  # one tensor, as a mask has; weight_norm has two
            else:
                plain = tensor in layer._parameters
            if not plain:
                raise ValueError(
                    f"{name} computes its {tensor} from other tensors (weight_norm, torch.nn.utils.prune): make it a "
                    "parameter again first (remove_parametrizations, torch.nn.utils.prune.remove)"
                )
        _refuse_hooks(name, layer)


def _refuse_hooks(name: str, layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError(f"{name} has hooks, which the layer that takes its place would not have: remove them first")


@torch.inference_mode(False)  # steps that are made there could not be learned
@torch.no_grad()
def calibrate_(model: nn.Module, images: Tensor, batch_size: int = 128) -> nn.Module:
    """Give a quantized convolution network static activation scales, in place; return the model.

    `images`: unlabelled, float (B, 3, H, W) in [0, 1]; `pack_` makes the network for images of their size.
    `batch_size`: how many of them the model gets at once.

    The quantizer of a layer's input moves to the end of the node before it (after its ReLU or average pool), so that
    all readers of that tensor share it. Its step is the one of least squared error on these images, out of 60 that are
    tried; called again, `calibrate_` sets the steps anew. Layers that read the normalised image need no quantizer:
    pixels are 8-bit already. Models that torch.fx can't trace (transformers) keep their dynamic scales per token.

    Raises:
        ValueError: no images, images of bytes, a model without quantized layers, activations that are not finite,
            readers of one tensor with different bits, or a ReLU or pool that is used twice; the model is as it was.
    """
    require_pixels(images)
    if len(images) == 0 or batch_size < 1:
        raise ValueError("calibration needs at least one image, and batches of at least one")
    refuse_compiled(model)
    if not any(isinstance(module, (BitLinear, BitConv2d)) for module in model.modules()):
        raise ValueError("no layer is quantized, or all are packed: calibrate_ comes between quantize_ and pack_")
    with _as_it_was_after_an_error(model):
        producers = _insert_static_quantizers(model)
        samples = _observe(model, producers, images, batch_size) if producers else {}
        for name, sample in samples.items():
            if not sample.isfinite().all():
                raise ValueError(f"{name} is not finite on the calibration images: has training diverged?")
    for name, quantized in producers.items():
        quantized.quantizer.step.fill_(_best_step(samples[name], quantized.quantizer.code_max))
    model.calibrated_shape = tuple(images.shape[1:])  # type: ignore[assignment]  # of images to pack_ the network for
    return model


@contextmanager
def _as_it_was_after_an_error(model: nn.Module) -> Iterator[None]:
    """Take the static quantizers that the block has inserted out again if it raises."""
    readers = {m: m.input_quantizer for m in model.modules() if isinstance(m, (BitLinear, BitConv2d))}
    before = {m for m in model.modules() if isinstance(m, Quantized)}
    try:
        yield
    except BaseException:
        for layer, quantizer in readers.items():
            layer.input_quantizer = quantizer
        for quantized in [m for m in model.modules() if isinstance(m, Quantized) and m not in before]:
            put_module(model, quantized, quantized.module)
        raise


@torch.inference_mode(False)  # what is made there could not take part in gradients
def pack_(model: nn.Module) -> nn.Module:
    """Turn a quantized model into its integer inference form, in place; return the model.

    A chain network that was calibrated and whose layers are all quantized becomes a `PackedNetwork` (the object itself
    changes class), without the channels that pruning has silenced; any other model keeps its modules and has its
    quantized layers replaced by packed ones, those of a ViT's MLPs without silenced neurons. Packing twice changes
    nothing.

    Raises:
        ValueError: a weight that is not finite or still on its way from float to quantized, or a layer that can't be
            packed; the model is as it was.
    """
    if isinstance(model, PackedNetwork):
        return model.eval()  # type: ignore[return-value]
    refuse_compiled(model)
    if isinstance(model, (BitLinear, BitConv2d)):
        _refuse_a_layer(model)
    for name, layer in model.named_modules():
        if isinstance(layer, (BitLinear, BitConv2d)):
            _check_packable(name, layer)
    model.eval().float()  # what packed layers compute in; codes stay as they are
    image_shape: Any = getattr(model, "calibrated_shape", IMAGE_SHAPE)
    try:
        nodes = remove_dead_channels(to_nodes(model, image_shape))
    except NotANetwork as error:
        model.why_no_network = str(error)  # type: ignore[assignment]  # told if it can't be saved either
        _pack_layers(model)
        return fuse_encoder_(remove_dead_neurons_(model.requires_grad_(False)))
    packed = PackedNetwork(nodes, getattr(model, "constructor", None), image_shape=image_shape)
    model.__dict__.clear()
    model.__dict__.update(packed.__dict__)
    model.__class__ = PackedNetwork
    return model


def _check_packable(name: str, layer: BitLinear | BitConv2d) -> None:
    if layer.weight.is_meta:
        raise ValueError(f"{name} has no values, it is on the device meta: load them first")
    if not is_finite(layer.weight):
        raise ValueError(f"{name} has a weight that is not finite: has training diverged?")
    if layer.quantized_part != 1.0:
        raise ValueError(f"{name} is quantized in part ({layer.quantized_part:g}): set its quantized_part to 1 first")
    if isinstance(layer, BitConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        raise ValueError(f"{name} can't be packed: only convolutions with zero padding, given as numbers, can")
    _refuse_hooks(name, layer)


def _pack_layers(model: nn.Module) -> None:
    for name in [name for name, module in model.named_modules() if isinstance(module, tuple(BIT_TO_PACKED))]:
        layer: Any = model.get_submodule(name)  # held here alone, so that its float weight goes with it
        act_bits = getattr(layer.input_quantizer, "bits", None)
        packed_class = next(packed for kind, packed in BIT_TO_PACKED.items() if isinstance(layer, kind))
        put_module(model, layer, packed_class.from_bit_layer(layer, act_bits))
    for module in list(model.modules()):
        for tensor in list(getattr(module, "parametrizations", ())):  # masks, of what is left in float
            remove_parametrization(module, tensor)


def _insert_static_quantizers(model: nn.Module) -> dict[str, Quantized]:
    """Put a `Quantized` at the end of every node that a quantized layer reads; return them by name."""
    found: dict[str, Quantized] = {}
    graph = trace(model)
    if graph is None:
        return found
    uses = Counter(str(fx_node.target) for fx_node in graph.nodes if fx_node.op == "call_module")
    readers: dict[Any, list[fx.Node]] = {}  # each layer's uses
    for fx_node in graph.nodes:
        layer = module_of(model, fx_node)
        if isinstance(layer, Quantized):
            found[str(fx_node.target)] = layer
        if isinstance(layer, (BitLinear, BitConv2d)) and layer.input_quantizer is not None:
            readers.setdefault(layer, []).append(fx_node)
    for layer, fx_nodes in readers.items():
        ends_of_each = [_ends(model, fx_node) for fx_node in fx_nodes]
        if not all(ends_of_each):
            continue  # an input that no node ends (a model of another kind): it keeps its dynamic scale
        bits = int(layer.input_quantizer.bits)
        for name, module in ((str(e.target), module_of(model, e)) for ends in ends_of_each for e in ends):
            if isinstance(module, Quantized) and module.quantizer.bits != bits:
                raise ValueError(f"{fx_nodes[0].target} reads with {bits} bits what another layer reads with others")
            if isinstance(module, (nn.ReLU, nn.AdaptiveAvgPool2d)):
                if uses[name] > 1:
                    raise ValueError(f"{name} runs more than once and can have one scale: give each use its own module")
                found[name] = Quantized(module, StaticQuantizer(bits, 1.0).to(layer.weight.device))
                replace_module(model, name, found[name].train(module.training))
        layer.input_quantizer = None
    return found


def _ends(model: nn.Module, fx_node: fx.Node) -> list[fx.Node]:
    """The fx nodes behind which the input of a layer is quantized: its producer, and the producers of average pools.

    Empty if the input can't be quantized there.
    """
    ends = [_producer(model, fx_node.all_input_nodes[0])]
    while isinstance(module_of(model, ends[-1]), nn.AdaptiveAvgPool2d):
        ends.append(_producer(model, ends[-1].all_input_nodes[0]))  # of integers, so what it reads is quantized too
    if len(ends) > 1 and isinstance(module_of(model, ends[-1]), Normalize):
        return []  # signed pixels, whose average is no unsigned code
    return ends if all(type(module_of(model, end)) in NODE_ENDS for end in ends) else []


def _producer(model: nn.Module, fx_node: Any) -> fx.Node:
    """The node whose values `fx_node` passes on: back through pools, flattening, dropout."""
    while isinstance(module_of(model, fx_node), (nn.MaxPool2d, nn.Flatten, *PASSES)):
        fx_node = fx_node.all_input_nodes[0]
    return fx_node


def _observe(model: nn.Module, producers: dict[str, Quantized], images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """A sample of each producer's outputs, (about `SAMPLES`,), with quantized weights but float activations."""
    samples: dict[str, list[Tensor]] = {name: [] for name in producers}
    per_batch = max(1, SAMPLES * batch_size // max(len(images), batch_size))

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            values = output.flatten().float()
            stride = max(1, values.numel() // per_batch) | 1  # odd, so that it does not fall in step with a dimension
            samples[name].append(values[::stride].clone())  # a view would keep them all, and see later changes in place

        return hook

    handles = [q.module.register_forward_hook(keep(name)) for name, q in producers.items()]
    quantizers = {name: q.quantizer for name, q in producers.items()}
    try:
        for q in producers.values():
            q.quantizer = nn.Identity()  # type: ignore[assignment]
        with evaluating(model), fixed_weights(model):
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, q in producers.items():
            q.quantizer = quantizers[name]
    return {name: torch.cat(parts) for name, parts in samples.items()}


def _best_step(values: Tensor, code_max: int) -> float:
    """The step of least squared error for codes 0 … code_max: top / code_max, for 60 fractions `top` of the maximum."""
    top = float(values.max())
    if top <= 0:
        return 1.0 / code_max  # a dead output: any step represents it
    steps = [top * fraction / 60 / code_max for fraction in range(1, 61)]
    errors = [(values - (values / s).round().clamp(0, code_max) * s).square().sum() for s in steps]
    return steps[int(torch.stack(errors).argmin())]  # one look at them: each makes a GPU wait
