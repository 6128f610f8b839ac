"""What GateLoop costs, side by side with other implementations, on this machine's CPU.

    pip install ".[training,peers]" && python training/benchmark_gateloop.py

Both sides of a ratio run in turn in one process, and the ratio is taken pair by pair. Peak memory is that of one step
in a process of its own, the median of five (it varies with what the allocator keeps). One JSON line per comparison;
`times` is how many times as long, or as much memory, the other implementation takes: the median pair, and the smallest
and largest. Close everything else.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from benchmark import paired_ratio, reset_peak, resident
from data import byte_tokenizer
from torch import nn
from train import DataArguments, ModelArguments, build_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, Mamba2Config, PreTrainedModel, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, GateLoopLayer
from modeling_stateful_gpt.linear_scan import linear_scan

WIDTH = 512
Work = Callable[[], object]


def leaf(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, requires_grad=True)


def scan_of_ours(length: int) -> Work:
    """`h_t = a_t h_{t-1} + x_t`, forward and backward."""
    a, x, grad = leaf(1, length, WIDTH), leaf(1, length, WIDTH), torch.rand(1, length, WIDTH)
    start = torch.zeros(1, WIDTH)
    return lambda: torch.autograd.grad(linear_scan(a, x, start), (a, x), grad)


def scan_and_floor(length: int, dtype: torch.dtype) -> tuple[Work, Work]:
    """The scan alone, and one pass over its memory: reading a and x, and writing the result."""
    a, x = (torch.rand(1, length, WIDTH).to(dtype) for _ in range(2))
    start = torch.zeros(1, WIDTH, dtype=dtype)
    return lambda: linear_scan(a, x, start), lambda: torch.addcmul(x, a, x)


def scan_of_theirs(length: int, contiguous: bool = False) -> Work:
    """The same by gateloop-transformer, laid out as its SimpleGateLoopLayer does, or, better for it, contiguously."""
    from gateloop_transformer.simplified_gate_loop import associative_scan, binary_operator

    if contiguous:
        a, x = leaf(WIDTH, length, 1), leaf(WIDTH, length, 1)
    else:
        _, x, a = torch.rand(length, 3, WIDTH).permute(1, 2, 0)[..., None]
        a, x = a.sigmoid().requires_grad_(), x.requires_grad_()
    grad = torch.rand(WIDTH, length, 1)
    return lambda: torch.autograd.grad(associative_scan(binary_operator, (a, x))[1], (a, x), grad)


def step(layer: nn.Module, length: int) -> Work:
    """Forward and backward of a layer over `[1, length, WIDTH]`."""
    x, grad = leaf(1, length, WIDTH), torch.rand(1, length, WIDTH)

    def work() -> None:
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).backward(grad)

    return work


def layer_of_ours(length: int, heads: int, state_transition: str = "complex") -> Work:
    return step(GateLoopLayer(WIDTH, heads, state_transition, output_norm=False), length)


def layer_of_theirs(length: int, heads: int) -> Work:
    from gateloop_transformer.gateloop_transformer import GateLoopedAttention

    return step(GateLoopedAttention(WIDTH, heads=heads), length)


def projections(length: int, heads: int) -> Work:
    """The matrix products of the complex layer, alone: no implementation can be faster."""
    sizes = [WIDTH] * 5 + [heads] * 2
    layers = [nn.Linear(WIDTH, size, bias=False) for size in sizes]
    x, grads = leaf(1, length, WIDTH), [torch.rand(1, length, size) for size in sizes]
    inputs = (x, *(layer.weight for layer in layers))
    return lambda: torch.autograd.grad([layer(x) for layer in layers], inputs, grads)


def mamba2(length: int) -> Work:
    config = Mamba2Config(hidden_size=WIDTH, expand=1, num_heads=8, head_dim=64, state_size=64, n_groups=1)
    return step(Mamba2Mixer(config, layer_idx=0), length)


def delta_rule(length: int) -> Work:
    heads = {"linear_num_key_heads": 8, "linear_num_value_heads": 8}
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    config = Qwen3NextConfig(hidden_size=WIDTH, num_hidden_layers=1, layer_types=["linear_attention"], **heads, **sizes)
    return step(Qwen3NextGatedDeltaNet(config, layer_idx=0), length)


def peak_memory(make: Callable[..., Work], *arguments) -> float:
    """MiB that one step adds at its peak to a process that holds the inputs and the weights: the median of five."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return statistics.median(pool.apply(_peak_memory, (make, *arguments)) for _ in range(5))


def _peak_memory(make: Callable[..., Work], length: int, *arguments) -> float:
    make(8, *arguments)()  # what libraries allocate once does not count
    work = make(length, *arguments)
    reset_peak()
    before = resident("VmHWM")
    results = work()
    after = resident("VmHWM")
    del results
    return after - before


def report(what: str, **values) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def times(theirs: Work, ours: Work, pairs: int, what: str) -> dict:
    result = paired_ratio(theirs, ours, pairs, what)
    return {
        "times": result["ratio"],
        "min": result["min"],
        "max": result["max"],
        "ours_ms": result["reference_ms"],
        "theirs_ms": round(result["ratio"] * result["reference_ms"], 1),
    }


def compare(what: str, pairs: int, ours: tuple, theirs: tuple) -> None:
    """Time and peak memory; each side is a function and the arguments to make its work with."""
    report(what, **times(theirs[0](*theirs[1:]), ours[0](*ours[1:]), pairs, what))
    memory = [round(peak_memory(*side), 1) for side in (theirs, ours)]
    report(f"peak memory, {what}", times=round(memory[0] / memory[1], 2), ours_MiB=memory[1], theirs_MiB=memory[0])


def elementwise(pairs: int) -> None:
    for length in (4096, 16384, 65536):
        what = f"elementwise recurrence, forward and backward, T = {length}, against gateloop-transformer"
        compare(what, pairs, (scan_of_ours, length), (scan_of_theirs, length))
        compare(f"{what}, contiguous", pairs, (scan_of_ours, length), (scan_of_theirs, length, True))
        for name, dtype in (("real", torch.float32), ("complex", torch.complex64)):
            result = paired_ratio(*scan_and_floor(length, dtype), 4 * pairs, name)
            what = f"elementwise recurrence, forward, {name}, T = {length}, against one pass over its memory"
            report(what, **{k: result[k] for k in ("ratio", "min", "max")}, floor_ms=result["reference_ms"])


def layers(pairs: int) -> None:
    for length, heads in ((4096, WIDTH), (1024, 8)):
        what = f"complex layer, {heads} heads, forward and backward, T = {length}, against"
        ours = (layer_of_ours, length, heads)
        compare(f"{what} gateloop-transformer", pairs, ours, (layer_of_theirs, length, heads))
        report(
            f"{what} its matrix products alone",
            **times(projections(length, heads), layer_of_ours(length, heads), pairs, what),
        )


def other_recurrences(pairs: int) -> None:
    for name, theirs in (("Mamba-2", mamba2), ("Qwen3-Next's gated delta rule", delta_rule)):
        for kind in ("positive", "complex"):
            what = f"{kind} layer, 8 heads of 64, forward and backward, T = 4096, against transformers' {name}"
            compare(what, pairs, (layer_of_ours, 4096, 8, kind), (theirs, 4096))


@torch.no_grad()
def decoding(pairs: int) -> None:
    """Time per token and size of the cache after a context of 1k to 64k; width 512, 6 layers, batch 1."""
    torch.manual_seed(0)
    ours = GateLoopForCausalLM(
        GateLoopConfig(hidden_size=WIDTH, num_hidden_layers=6, layer_types=["gateloop"] * 6)
    ).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=WIDTH, n_layer=6, n_head=8, n_positions=17000)).eval()
    token = torch.zeros(1, 1, dtype=torch.long)
    works = {}
    for length in (1024, 4096, 16384, 65536):
        cache = ours(torch.randint(0, 256, (1, length)), use_cache=True, logits_to_keep=1).past_key_values
        works[length] = lambda cache=cache: decode(ours, token, cache, 16)
        size = sum(layer.state.numel() * layer.state.element_size() for layer in cache.layers)
        result = paired_ratio(works[length], works[1024], 2 * pairs, "decoding")
        per_token = result["ratio"] * result["reference_ms"] / 16
        report(
            f"decoding 16 tokens after {length}, against after 1024",
            **{k: result[k] for k in ("ratio", "min", "max")}, ms_per_token=round(per_token, 2), cache_bytes=size,
        )  # fmt: skip

    # Random keys and values stand for the context: they cost the same.
    cache = DynamicCache()
    for i in range(6):
        cache.update(torch.randn(1, 8, 16384, 64), torch.randn(1, 8, 16384, 64), i)
    theirs = lambda: decode(gpt2, token, cache, 16)  # noqa: E731
    what = "decoding 16 tokens after 16384, against transformers' GPT-2"
    report(what, **times(theirs, works[16384], pairs, what), cache_bytes=6 * 2 * 16384 * WIDTH * 4)


def decode(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache, number: int) -> None:
    for _ in range(number):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def presets(pairs: int) -> None:
    """A training step (forward, backward, AdamW) of the presets of train.py at the size of the comparison in
    docs/experiments.md: width 128, 2 layers, T = 256, batch 16."""
    ids = torch.randint(0, 256, (16, 256))
    steps = {}
    for preset in ("gpt", "gateloop", "gateloop_signed", "gateloop_positive", "hybrid"):
        sizes = ModelArguments(preset=preset, num_hidden_layers=2)
        model = build_model(sizes, DataArguments(), byte_tokenizer(), seed=0)
        steps[preset] = training_step(model, torch.optim.AdamW(model.parameters()), ids)
    for preset, work in steps.items():
        if preset != "gpt":
            result = paired_ratio(work, steps["gpt"], 4 * pairs, preset)
            what = f"training step, preset {preset}, against preset gpt"
            report(what, **{k: result[k] for k in ("ratio", "min", "max")}, gpt_ms=result["reference_ms"])


def training_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Work:
    def work() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return work


BENCHMARKS = {
    "presets": presets,
    "elementwise": elementwise,
    "layers": layers,
    "other_recurrences": other_recurrences,
    "decoding": decoding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    arguments = parser.parse_args()
    report("settings", torch=torch.__version__, threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"))
    for name in arguments.only:
        BENCHMARKS[name](arguments.pairs)


if __name__ == "__main__":
    main()
