"""The linear recurrence h_t = a_t h_{t-1} + x_t over a sequence, elementwise, as a blocked scan."""

import re

import torch

SCAN_BLOCK = 8
"""Positions in a block of the scan: few, so that each of its steps is one long vector operation."""

NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)
"""Of the operators below. Each copy of this file, beside a checkpoint, needs one of its own: torch destroys an operator
when another of the same name is defined."""


# An operator of its own, so that compilers need not unroll its loops.
@torch.library.custom_op(f"{NAMESPACE}::linear_scan", mutates_args=())
def linear_scan(a: torch.Tensor, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """h_t = a_t h_{t-1} + x_t, elementwise.

    `x` is `[B, T, …]`; `a` may have 1 in the place of a later dimension; `initial`, h before the first position, is
    `[B, …]`. The result has the shape of x and the type of `a` and `initial`, fp32, fp64, or complex (x may be real all
    the same). The backward pass needs `a`, `initial` and the result, nothing in between.
    """
    h = torch.empty_like(x, dtype=a.dtype, memory_format=torch.contiguous_format)
    scan_into(h, a, x.to(a.dtype), initial)
    return h


@linear_scan.register_fake
def _(a, x, initial):
    return torch.empty_like(x, dtype=a.dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::linear_scan_backward", mutates_args=())
def linear_scan_backward(
    grad: torch.Tensor, a: torch.Tensor, initial: torch.Tensor, h: torch.Tensor, x_is_real: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a, x and initial. With e the conjugate of that of x: `e_t = conj(grad_t) + a_{t+1} e_{t+1}`, and
    that of a_t is `conj(e_t h_{t-1})`."""
    grad = grad.conj().resolve_conj()
    e = torch.empty_like(grad, memory_format=torch.contiguous_format)
    e[:, -1] = grad[:, -1]
    scan_into(e[:, :-1], a[:, 1:], grad[:, :-1], grad[:, -1], reverse=True)
    da = torch.empty_like(h, memory_format=torch.contiguous_format)
    torch.mul(e[:, 0], initial, out=da[:, 0])
    torch.mul(e[:, 1:], h[:, :-1], out=da[:, 1:])
    da = da.sum_to_size(a.shape)
    dinitial = (a[:, 0] * e[:, 0]).contiguous()
    if not a.is_complex():
        return da, e, dinitial
    return da.conj_physical_(), e.real.clone() if x_is_real else e.conj_physical_(), dinitial.conj_physical_()


@linear_scan_backward.register_fake
def _(grad, a, initial, h, x_is_real):
    like = (a, grad.real if x_is_real else grad, initial)
    return tuple(torch.empty_like(z, memory_format=torch.contiguous_format) for z in like)


def save_for_backward(ctx, inputs, output):
    a, x, initial = inputs
    ctx.save_for_backward(a, initial, output)
    ctx.x_is_real = not x.is_complex()


linear_scan.register_autograd(
    lambda ctx, grad: linear_scan_backward(grad, *ctx.saved_tensors, ctx.x_is_real), setup_context=save_for_backward
)


def scan_into(out: torch.Tensor, a: torch.Tensor, x: torch.Tensor, state: torch.Tensor, reverse: bool = False) -> None:
    """Writes out_t = a_t out_{t-1} + x_t, starting from `state`; with `reverse`, out_t = a_t out_{t+1} + x_t.

    Blocks run side by side, twice: from zero, for what each adds to the state and by how much it scales it; then, from
    the states before them, which a scan over the blocks gives, for the results.
    """

    def first(z: torch.Tensor, n: int) -> torch.Tensor:
        return z[:, z.shape[1] - n :] if reverse else z[:, :n]

    def rest(z: torch.Tensor, n: int) -> torch.Tensor:
        return z[:, : z.shape[1] - n] if reverse else z[:, n:]

    def order(n: int) -> range:
        return range(n - 1, -1, -1) if reverse else range(n)

    blocks = x.shape[1] // SCAN_BLOCK
    if blocks > 1:
        done = blocks * SCAN_BLOCK
        block_out, block_a, block_x = (first(z, done).unflatten(1, (blocks, SCAN_BLOCK)) for z in (out, a, x))
        but_last = blocks - 1
        a_, x_ = first(block_a, but_last), first(block_x, but_last)
        begin, *others = order(SCAN_BLOCK)
        added = x_[:, :, begin].clone()
        for i in others:
            torch.addcmul(x_[:, :, i], a_[:, :, i], added, out=added)
        states = torch.empty_like(block_out[:, :, 0])
        first(states, 1)[:, 0] = state
        scan_into(rest(states, 1), a_.prod(2), added, state, reverse)
        for i in order(SCAN_BLOCK):
            states = torch.addcmul(block_x[:, :, i], block_a[:, :, i], states, out=block_out[:, :, i])
        state = rest(states, but_last)[:, 0]
        out, a, x = (rest(z, done) for z in (out, a, x))
    for t in order(x.shape[1]):
        state = torch.addcmul(x[:, t], a[:, t], state, out=out[:, t])
