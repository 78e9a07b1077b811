"""A score network that sees its measurement as a set of sensors, whatever their number and order."""

import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located, apply
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.network.mlp import ResidualMLP, ScoreModule
from fem_diffusion.errors import InputError

__all__ = ["SensorNetwork"]

# State coordinates, largest first, that describe what a sensor sees.
_SEEN = 32
_HEADS = 4


class SensorNetwork(ScoreModule):
    """N(v, angle) for a located measurement: attention over sensors once, then a residual network at every noise level.

    Every sensor is a token: what it sees of the state and of the base coordinates, its noise, its reading and how that
    misses the base. Learned queries attend to the tokens; what they gather, with mean and standard deviations of the
    base, conditions a residual network, which sees the noisy state both in base coordinates and as the latents that the
    base makes of it, and answers in both: a law of the latents is the same in latents, whatever the sensors. InputError
    if a size is not positive, or `tokens` no multiple of 4.

    Parameters
    ----------
    r, k, width, depth : int
        Numbers of latents and state coordinates, sizes of the residual network.
    tokens, queries : int
        Width of a token, number of learned queries.
    """

    families = True
    rate = 0.25   # attention learns nothing at the rate that suits the fully connected network

    def __init__(self, r: int, k: int, width: int = 128, depth: int = 3, tokens: int = 64, queries: int = 8):
        super().__init__(r=r, k=k, width=width, depth=depth, tokens=tokens, queries=queries)
        if tokens % _HEADS:
            raise InputError(f"tokens is {tokens}: give a multiple of {_HEADS}.")
        self.seen = min(k, _SEEN)
        self.embed = nn.Sequential(nn.Linear(self.seen + r + 3, tokens), nn.SiLU(),
                                   nn.Linear(tokens, tokens), nn.SiLU())
        # A token that is always there: attention over no sensors is defined, and their number can be felt.
        self.nothing = nn.Parameter(torch.zeros(tokens))
        self.queries = nn.Parameter(torch.randn(queries, tokens) / tokens**0.5)
        self.attention = nn.MultiheadAttention(tokens, _HEADS, batch_first=True)
        self.gather = nn.Sequential(nn.Linear(queries * tokens, tokens), nn.SiLU())
        self.flow = ResidualMLP(2 * r, 2 * r + tokens, width, depth)

    def see(self, base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> tuple[Tensor, ...]:
        """Tokens (B, k, .), which are there (B, k), and of the base mean and log std (B, 2 r) and factor (B, r, r)."""
        (layout, y), located = layout.standardised(y), base.standardised(located)
        numbers = torch.stack([y, located.misfit, torch.log(layout.variance.sqrt()).expand_as(y)], 2)
        # asinh bounds what a very precise sensor brings in.
        parts = layout.rows[:, :, :self.seen], torch.asinh(located.sensitivity), torch.asinh(numbers)
        token = torch.cat([x.expand(len(y), -1, -1) for x in parts], 2)
        centre = torch.cat([located.mean, torch.log(located.std).expand_as(located.mean)], 1)
        present = layout.present.expand(len(y), -1)
        return token.to(self.dtype), present, centre.to(self.dtype), located.factor.to(self.dtype)

    def context(self, *seen: Tensor) -> tuple[Tensor, ...]:
        """Mean, log std and gathered sensors (B, 2 r + tokens), and the factor (B, r, r)."""
        token, present, centre, factor = seen
        token = self.embed(token)
        token = torch.cat([self.nothing.expand(len(token), 1, -1), token], 1)
        hidden = torch.cat([present.new_zeros(len(token), 1), ~present], 1)
        gathered = self.attention(self.queries.expand(len(token), -1, -1), token, token, key_padding_mask=hidden,
                                  need_weights=False)[0]
        return torch.cat([centre, self.gather(gathered.flatten(1))], 1), factor

    def forward(self, v: Tensor, angle: Tensor, summary: Tensor, factor: Tensor) -> Tensor:
        """Network output (n, B, r) for states (n, B, r), angles and what `context` gives; see `ScoreNetwork`."""
        r = v.shape[2]
        latent = summary[:, :r] + torch.cos(angle) * apply(factor, v)
        output = self.flow(torch.cat([v, latent], 2), angle, summary)
        # A score of the latents becomes one of base coordinates by the transposed factor.
        return output[..., :r] + apply(factor.mT, output[..., r:])
