"""Networks of one kind with all of their weights in one tensor, a row for each: losses and gradients side by side."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fem_diffusion.errors import InputError

__all__ = ["Batched", "flat", "into"]


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: x for name, x in network.named_parameters() if x.requires_grad}


def flat(network: nn.Module) -> Tensor:
    """The trained weights of a network as a vector (P,), a copy."""
    return parameters_to_vector(_trained(network).values()).detach()


def into(network: nn.Module, weights: Tensor) -> None:
    """Let the weights of a network be views of a vector (P,), which follow what becomes of it."""
    vector_to_parameters(weights, _trained(network).values())


class _Loss(nn.Module):
    """A function of a network and a batch as a module, whose weights torch.func can exchange."""

    def __init__(self, network: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *batch: Tensor) -> Tensor:
        return self.function(self.network, *batch)


class Batched:
    """A loss of networks like `network`, as a function of their weights alone.

    Parameters
    ----------
    network : nn.Module
        Pattern of all; it stays as it is.
    loss : Callable
        Loss of a network on the tensors of a batch, a scalar.
    """

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor]):
        self.pattern = _Loss(deepcopy(network), loss).train()
        self.buffers = [x.clone() for x in self.pattern.buffers()]
        trained = _trained(self.pattern)
        self.names, self.shapes = list(trained), [x.shape for x in trained.values()]
        self.sizes = [x.numel() for x in trained.values()]

    def _one(self, weights: Tensor, *batch: Tensor) -> Tensor:
        parts = zip(self.names, weights.split(self.sizes), self.shapes)
        return functional_call(self.pattern, {name: x.view(shape) for name, x, shape in parts}, batch)

    def __call__(self, weights: Tensor, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Losses (M,) of the networks with these weights (M, P), each on its own batch.

        InputError where several networks of this kind cannot be evaluated at once.
        """
        if len(batches) == 1:
            return self._one(weights[0], *batches[0])[None]
        try:
            # Fused attention knows no batches of weights on the CPU.
            with sdpa_kernel(SDPBackend.MATH):
                return vmap(self._one, randomness="different")(weights, *map(torch.stack, zip(*batches)))
        except RuntimeError as error:
            name = type(self.pattern.network).__name__
            raise InputError(f"Several networks {name} cannot be trained side by side, as torch.vmap refuses them "
                             f"({str(error).splitlines()[0]}): set members=1 in TrainingOptions.") from error

    def check(self) -> None:
        """Raise InputError where buffers of the network have moved, which belong to no row of weights."""
        if any(not torch.equal(x, old) for x, old in zip(self.pattern.buffers(), self.buffers)):
            raise InputError(f"The network {type(self.pattern.network).__name__} changes its buffers in training, "
                             "which are not kept: take layers without such, LayerNorm in place of BatchNorm.")
