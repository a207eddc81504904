"""Activations that are computed again in the backward pass, where that is cheaper than keeping them.

A linear layer keeps its input for the backward pass. What a GELU or a LayerNorm gave can be had again, to the bit, from what these
keep of their own, for one pass over the values: a third of a transformer's activations. torch's own GELU and LayerNorm are
recognised, in any architecture; everything else is kept as ever. On a CPU alone: a GPU is done with a small step before Python has
asked for the next, so there every further step costs what it does on the host, where memory of a step is cheap (docs/numbers.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gelu, layer_norm

# Names of autograd's nodes. Should torch rename one, its output is kept again and a test says so.
_GELU, _LAYER_NORM, _VIEW = "GeluBackward0", "NativeLayerNormBackward0", "ViewBackward0"


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Keep no output of a GELU or LayerNorm for the backward pass of ``model``'s transformers on a CPU while the context lasts.

    Values and gradients stay the same to the bit. Second derivatives (create_graph) do not pass through.
    """
    from sentence_transformers.base.modules import Transformer

    # Autograd keeps all that a LayerNorm needs but its epsilon; the weight, updated in place, says whose it is.
    epsilons = {
        module.weight.data_ptr(): module.eps
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None
    }
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Transformer):
                stack.enter_context(_hooked(module, epsilons))
        yield


class _Output:
    """What a node gave, had again: once for all that want it, which come one after the other, as query, key and value do."""

    def __init__(self, node: Any, epsilon: float | None) -> None:
        self.node = node  # lives as long as the nodes that want what it gave do
        self.epsilon = epsilon
        self.num_wanting = 0
        self._left = 0
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        value = self._computed() if self._value is None else self._value
        self._left = (self._left or self.num_wanting) - 1
        self._value = value if self._left else None
        return value

    def _computed(self) -> Tensor:
        node = self.node
        if self.epsilon is None:
            return gelu(node._saved_self, approximate=node._saved_approximate)
        width = list(node._saved_normalized_shape)
        return layer_norm(node._saved_input, width, node._saved_weight, node._saved_bias, self.epsilon)


class _Again:
    """How to have a tensor again, in the shape in which it was wanted."""

    def __init__(self, output: _Output, shape: tuple[int, ...]) -> None:
        self.output = output
        self.shape = shape
        output.num_wanting += 1

    def tensor(self) -> Tensor:
        return self.output.tensor().view(self.shape)


@contextlib.contextmanager
def _hooked(module: nn.Module, epsilons: Mapping[int, float]) -> Iterator[None]:
    """Run the module's forward pass, or what an outer context put in its place, under the hooks."""
    outer, forward = vars(module).get("forward"), module.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if next(module.parameters()).device.type != "cpu":
            return forward(*args, **kwargs)
        outputs: dict[Any, _Output] = {}
        with saved_tensors_hooks(lambda tensor: _pack(tensor, epsilons, outputs), _unpack):
            return forward(*args, **kwargs)

    module.forward = hooked
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


def _pack(tensor: Tensor, epsilons: Mapping[int, float], outputs: dict[Any, _Output]) -> Tensor | _Again:
    node: Any = tensor.grad_fn
    while node is not None and node.name() == _VIEW:
        node = node.next_functions[0][0]
    name = node.name() if node is not None else ""
    if name == _GELU:
        return _Again(outputs.setdefault(node, _Output(node, None)), tuple(tensor.shape))
    # The mean and the deviation that a LayerNorm keeps for itself are outputs of its node too.
    if name == _LAYER_NORM and tensor.shape[-1] == node._saved_normalized_shape[-1] and node._saved_weight is not None:
        epsilon = epsilons.get(node._saved_weight.data_ptr())
        if epsilon is not None:
            return _Again(outputs.setdefault(node, _Output(node, epsilon)), tuple(tensor.shape))
    # Detached: a node that keeps what it gave, graph and all, would keep itself alive.
    return tensor if tensor.is_leaf else tensor.detach()


def _unpack(packed: Tensor | _Again) -> Tensor:
    return packed.tensor() if isinstance(packed, _Again) else packed
