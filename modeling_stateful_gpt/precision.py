"""Where fp32 is needed whatever the model computes in."""

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
