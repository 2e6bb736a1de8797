"""What belongs to a filter: the tensors that must be zero with it for its channel to be zero.

A filter is one output channel of a convolution or linear layer. When its weights, its bias, and the weight and bias of
the batch norm behind it are all zero, the channel is exactly 0 whatever the image, in training and in evaluation;
nothing that reads it changes when it is physically removed. `quantization_utils.dead_channels` does that to a packed
network.

Not so where that batch norm has no weight and bias to mask (its running mean shifts the channel), or isn't found: a
model that can't be traced (`models.graph`; one without a ReLU module, say) has its layers' weights and biases masked
alone.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from models.graph import BATCH_NORMS, PASSES, module_of, trace
from models.select import select_layers

from .masks import apply_mask_


def mask_filters_(layer: nn.Module, kept_N: Tensor, batch_norms: list[nn.Module]) -> None:
    """Hold the filters where `kept_N` (bool) is false at zero, in place: weight, bias and the batch norms behind."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    apply_mask_(layer, "weight", kept_N.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
    if layer.bias is not None:
        apply_mask_(layer, "bias", kept_N)
    for batch_norm in batch_norms:
        apply_mask_(batch_norm, "weight", kept_N)
        apply_mask_(batch_norm, "bias", kept_N)


def batch_norms_behind(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The affine batch norms that read each layer's output directly, by the layer's name.

    Found by tracing the data flow (torch.fx). A model that cannot be traced (a transformer, a network of SiLUs) has
    none: filter pruning then zeroes weight and bias alone, which is enough only where no batch norm follows.
    """
    graph = trace(model)
    found: dict[str, list[nn.Module]] = {}
    for node in graph.nodes if graph else ():
        layer = module_of(model, node)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            filters = layer.weight.shape[0]  # a norm of another number normalises something else than channels
            behind = (m for m in _readers(model, node) if isinstance(m, BATCH_NORMS) and m.affine)
            behind = (m for m in behind if m.num_features == filters)
            found.setdefault(str(node.target), []).extend(behind)
    return found


def _readers(model: nn.Module, node: fx.Node) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for user in node.users:
        module = module_of(model, user)
        if isinstance(module, PASSES):
            modules += _readers(model, user)
        elif module is not None:
            modules.append(module)
    return modules


def without_classifier(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The layers whose filters may go: all but the last, whose outputs are the classes.

    That is the last one that runs, or where the data flow can't be traced the last one registered.
    """
    graph, every = trace(model), [layer for _, layer in select_layers(model)]
    ran = [layer for node in (graph.nodes if graph else ()) if (layer := module_of(model, node)) in every]
    return [(name, layer) for name, layer in layers if layer is not (ran or every)[-1]]
