"""Numbers in fixed point, and the stack of bits that takes what a product of them loses."""

from array import array

import numpy as np
import torch

FRACTION_BITS = 30
"""The resolution is about 1e-9, and as an update is smaller than 1, 2^33 of them cannot overflow."""

GATE_BITS = 10
"""Of the gates by which a state is multiplied: the longest horizon but "for ever" is 1,024 steps."""

WORD_BITS = 32

FULL = 1 << 53
"""What has been lost is written into a buffer as the digits of a number (the coder rANS of Duda 2013, arXiv 1311.2540).
From here on, the next digits might not fit into an int64."""


Rows = tuple[torch.Tensor, ...]
"""What is known of each unit of (a half of) a state, `[B, S]` each: its values, and if it forgets, its buffers."""


class Words:
    """A stack of what has left the buffers of forgetting states, in words of `WORD_BITS` bits."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.steps = 0
        self.moves = array("q")
        """The steps after which words have left."""

    @property
    def nbytes(self) -> int:
        return len(self.bytes) + self.moves.itemsize * len(self.moves)

    def push(self, buffers: torch.Tensor, leaving: torch.Tensor) -> None:
        """A word of each buffer `[B, N]` where `leaving`: the words, then for each row that has any its places as a
        mask, then those rows and their number."""
        rows = leaving.any(-1).nonzero().flatten()
        self.bytes += buffers[leaving].to("cpu", torch.int32).numpy().tobytes()
        self.bytes += np.packbits(leaving[rows].cpu().numpy(), axis=1).tobytes()
        self.bytes += np.append(rows.cpu().numpy(), len(rows)).astype(np.int32).tobytes()
        self.moves.append(self.steps)

    def take(self, number: int, dtype: type) -> torch.Tensor:
        size = number * np.dtype(dtype).itemsize
        taken: np.ndarray = np.frombuffer(self.bytes[len(self.bytes) - size :], dtype)
        del self.bytes[len(self.bytes) - size :]
        return torch.from_numpy(taken.astype(np.int64))

    def pop(self, buffers: torch.Tensor) -> torch.Tensor:
        """What `push` was given, from what it has left behind."""
        self.moves.pop()
        rows = self.take(int(self.take(1, np.int32)), np.int32)
        width = -(-buffers.shape[1] // 8)
        masks = np.unpackbits(self.take(len(rows) * width, np.uint8).numpy().astype(np.uint8)).reshape(len(rows), -1)
        left = torch.zeros(buffers.shape, dtype=torch.bool)
        left[rows] = torch.from_numpy(masks[:, : buffers.shape[1]]).bool()
        words, left = self.take(int(left.sum()), np.uint32).to(buffers.device), left.to(buffers.device)
        return buffers.masked_scatter(left, (buffers[left] << WORD_BITS) + words)


def renormalize(buffers: torch.Tensor, words: Words | None) -> torch.Tensor:
    """Buffers `[B, N]` after a step. Where one of a row is full, a word leaves all of that row that have more than one,
    because to move many takes no longer than to move one. They are pushed onto `words`, if there are any."""
    if words is not None:
        words.steps += 1
    if not torch.compiler.is_compiling() and buffers.max().item() < FULL:
        return buffers
    leaving = (buffers >= FULL).any(-1, keepdim=True) & (buffers >> WORD_BITS > 0)
    if words is not None:
        words.push(buffers, leaving)
    return torch.where(leaving, buffers >> WORD_BITS, buffers)


def undo_renormalize(buffers: torch.Tensor, words: Words) -> torch.Tensor:
    if words.moves and words.moves[-1] == words.steps:
        buffers = words.pop(buffers)
    words.steps -= 1
    return buffers


def fixed_point(x: torch.Tensor) -> torch.Tensor:
    """`x`, smaller than 2^33, as int64 multiples of 2^-`FRACTION_BITS`."""
    return torch.mul(x, 2.0**FRACTION_BITS).round_().long()


def floating_point(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).mul_(2.0**-FRACTION_BITS)


def gate(z: torch.Tensor) -> torch.Tensor:
    """`z`, from 0 to 1, as int64 multiples of 2^-`GATE_BITS`, at least one."""
    return torch.mul(z, 2.0**GATE_BITS).round_().long().clamp_(min=1)


def multiply(values: torch.Tensor, buffer: torch.Tensor, z: torch.Tensor) -> Rows:
    """`z · values` for a gate `z` (see `gate`), and the buffers with the bits that are lost (MacKay et al. 2018,
    section 4).

    The lowest `GATE_BITS` bits of a value go into its buffer, the value is divided by 2^`GATE_BITS` and multiplied by
    z; and as the result is then a multiple of z, it can take log2(z) bits from the buffer. So a step loses
    `GATE_BITS - log2 z` bits for each unit.
    """
    full = torch.add(values & ((1 << GATE_BITS) - 1), buffer, alpha=1 << GATE_BITS)
    buffer = full.div(z, rounding_mode="trunc")
    rest = torch.addcmul(full, buffer, z, value=-1)
    return torch.addcmul(rest, values >> GATE_BITS, z), buffer


def divide(values: torch.Tensor, buffer: torch.Tensor, z: torch.Tensor) -> Rows:
    """Undoes `multiply`."""
    quotient = values.div(z, rounding_mode="floor")
    rest = torch.addcmul(values, quotient, z, value=-1)
    full = torch.addcmul(rest, buffer, z)
    return torch.add(full & ((1 << GATE_BITS) - 1), quotient, alpha=1 << GATE_BITS), full >> GATE_BITS
