"""Linear layers that differ from torch's in how precise they stay or in how they start."""

import torch
from torch import nn

from .compat import maybe_autocast


class FullPrecisionLinear(nn.Linear):
    """Computes in fp32 at least, whatever the type of input and weights and whatever autocast says. Transitions need
    it: they are multiplied with each other, and in bf16 0.998 and 1 are neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with maybe_autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


def residual_projection(width: int, hidden_size: int, bias: bool) -> nn.Linear:
    """The last layer of a branch of a block. Starts smaller, so that the sum over depth does not grow (GPT-2). A plain
    one with a mark: quantisers and adapters leave out a class of its own."""
    linear = nn.Linear(width, hidden_size, bias=bias)
    linear.closes_branch = True  # type: ignore[assignment]
    return linear
