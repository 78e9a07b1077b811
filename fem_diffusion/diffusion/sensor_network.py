"""A score network that sees its measurement as a set of sensors, whatever their number and order."""

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_count
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.operator_base import Located
from fem_diffusion.diffusion.sensors import Sensors
from fem_diffusion.errors import InputError

__all__ = ["SensorNetwork"]

# State coordinates, largest first, that describe what a sensor sees.
_SEEN = 32
_HEADS = 4


class SensorNetwork(nn.Module):
    """N(v, angle) for a located measurement: attention over sensors once, then a residual network at every noise level.

    Every sensor is a token: what it sees of the state and of the base coordinates, its noise, its reading and how that
    misses the base. Learned queries attend to the tokens; what they gather, with mean and standard deviations of the
    base, conditions a residual network, which sees the noisy state both in base coordinates and as the latents that the
    base makes of it, and answers in both: a law of the latents is the same in latents, whatever the sensors.

    Parameters
    ----------
    r : int
        Number of latents.
    s : int
        Number of state coordinates.
    width, depth : int
        Of the residual network.
    tokens : int
        Width of a token.
    queries : int
        Number of learned queries.

    Raises
    ------
    InputError
        If a size is not positive, or `tokens` no multiple of 4.
    """

    def __init__(self, r: int, s: int, width: int = 128, depth: int = 3, tokens: int = 64, queries: int = 8):
        super().__init__()
        sizes = {"r": r, "s": s, "width": width, "depth": depth, "tokens": tokens, "queries": queries}
        self.config = {name: check_count(size, name) for name, size in sizes.items()}
        if tokens % _HEADS:
            raise InputError(f"tokens is {tokens}: give a multiple of {_HEADS}.")
        self.seen = min(s, _SEEN)
        self.embed = nn.Sequential(nn.Linear(self.seen + r + 3, tokens), nn.SiLU(),
                                   nn.Linear(tokens, tokens), nn.SiLU())
        # A token that is always there: attention over no sensors is defined, and their number can be felt.
        self.nothing = nn.Parameter(torch.zeros(tokens))
        self.queries = nn.Parameter(torch.randn(queries, tokens) / tokens**0.5)
        self.attention = nn.MultiheadAttention(tokens, _HEADS, batch_first=True)
        self.gather = nn.Sequential(nn.Linear(queries * tokens, tokens), nn.SiLU())
        self.flow = ResidualMLP(2 * r, 2 * r + tokens, width, depth)

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights."""
        return self.flow.dtype

    def context(self, sensors: Sensors, located: Located, y: Tensor) -> Tensor:
        """What the network knows of each measurement, shape (B, 2 r + tokens): mean, log std, gathered sensors.

        `located` is in units of the prior, see `OperatorBase.standardised`.
        """
        sensors, y = sensors.standardised(y)
        numbers = [y, located.misfit, torch.log(sensors.variance.sqrt())]
        # asinh bounds what a very precise sensor brings in.
        token = torch.cat([sensors.rows[:, :, :self.seen], torch.asinh(located.sensitivity),
                           torch.asinh(torch.stack(numbers, 2))], 2)
        token = self.embed(token.to(self.dtype))
        token = torch.cat([self.nothing.expand(len(token), 1, -1), token], 1)
        hidden = torch.cat([sensors.present.new_zeros(len(token), 1), ~sensors.present], 1)
        gathered = self.attention(self.queries.expand(len(token), -1, -1), token, token, key_padding_mask=hidden,
                                  need_weights=False)[0]
        base = torch.cat([located.mean, torch.log(located.std)], 1).to(self.dtype)
        return torch.cat([base, self.gather(gathered.flatten(1))], 1)

    def forward(self, v: Tensor, angle: Tensor, context: Tensor, factor: Tensor) -> Tensor:
        """Network output.

        Parameters
        ----------
        v : Tensor
            Unit-variance states in base coordinates, shape (R, B, r): R of each measurement.
        angle : Tensor
            arctan(sigma), shape (R, B, 1).
        context : Tensor
            From `context`, shape (B, 2 r + tokens).
        factor : Tensor
            Of the base in units of the prior, shape (B, r, r).

        Returns
        -------
        Tensor
            Shape (R, B, r).
        """
        r = v.shape[2]
        latent = context[:, :r] + torch.cos(angle) * torch.einsum("bij,nbj->nbi", factor, v)
        output = self.flow(torch.cat([v, latent], 2), angle, context.expand(len(v), -1, -1))
        # A score of the latents becomes one of base coordinates by the transposed factor.
        return output[..., :r] + torch.einsum("bij,nbi->nbj", factor, output[..., r:])
