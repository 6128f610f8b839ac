"""How the previous step's state enters the next step's token embedding.

Every fusion is a module called as `fusion(e, h)` with the token embeddings `e` and the previous steps' states `h`,
both `[..., D]`, and returns the language model's input `[..., D]`. It is applied at each position separately. Where
there is no previous step the caller uses `e` itself.

A new fusion is one class below and one entry in `FUSIONS`.
"""

import torch
from torch import nn


class Fusion(nn.Module):
    """Its layers are plain ones, so that quantisers and adapters know them."""

    def reset_parameters(self) -> None:
        """PyTorch's own initialisation: scaled to the width, with biases.

        With transformers' `initializer_range` the products of small numbers below would start near 1e-4 of the
        embedding and be learned late.
        """
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]

    def start_at_identity(self) -> None:
        """Zeroes what makes `fusion(e, h) == e`, for a fusion put around a trained model. A no-op where impossible."""


def zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class GatedAdd(Fusion):
    """`e + value(h) * relu(key(h) * query(e))`: component-wise key-query attention, from the "Stateful GPT" proposal
    (E. Dereynal de Saint Michel, 2025)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return e + self.value(h) * torch.relu(self.key(h) * self.query(e))

    def start_at_identity(self) -> None:
        zero(self.value)


class GLU(Fusion):
    """`RMSNorm(value(h) * sigmoid(gate(e)))`: the state is on the value path and cannot be ignored (arXiv 2608.08888).

    It cannot start as the identity: where there is a previous state, the embedding acts through the gate alone.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.value = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.norm(self.value(h) * torch.sigmoid(self.gate(e)))


class Correction(Fusion):
    """`e + ffn([e; h])` whose last layer starts at zero, so that training starts from the plain model
    (after arXiv 2606.27538)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up = nn.Linear(2 * hidden_size, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)
        self.start_at_identity()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.start_at_identity()

    def forward(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return e + self.down(nn.functional.gelu(self.up(torch.cat([e, h], dim=-1))))

    def start_at_identity(self) -> None:
        zero(self.down)


FUSIONS: dict[str, type[Fusion]] = {"gated_add": GatedAdd, "glu": GLU, "correction": Correction}


def linear_layers(feedback: str) -> list[str]:
    """The names of a fusion's linear layers."""
    with torch.device("meta"):
        modules = FUSIONS[feedback](1).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear)]
