"""What the feedback costs: training steps of K passes and decoded tokens, as ratios to the plain model.

    python training/benchmark.py

Both sides of a ratio run in turn in one process, and the ratio is taken pair by pair, so that it holds when the
machine's speed drifts. One JSON line per ratio: the median, and the smallest and largest pair. Close everything else.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig, StatefulGPTForCausalLM


def paired_ratio(measured: Callable[[], object], reference: Callable[[], object], pairs: int, what: str) -> dict:
    """How many times as long `measured` takes as `reference`."""
    measured()
    reference()
    ratios, seconds = [], []
    for _ in tqdm(range(pairs), desc=what, leave=False):
        times = []
        for work in (reference, measured):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    return {
        "what": what,
        "ratio": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
        "reference_ms": round(1000 * statistics.median(seconds), 2),
    }


def model(feedback: str | None, **decoder) -> StatefulGPTForCausalLM:
    torch.manual_seed(0)
    return StatefulGPTForCausalLM(StatefulGPTConfig(text_config=GateLoopConfig(**decoder), feedback=feedback))


def training_steps(feedback: str, passes: int, pairs: int) -> dict:
    """A step (forward, backward, AdamW) of K passes against a plain one: width 256, 4 layers, T = 256, batch 8."""
    ids = torch.randint(0, 256, (8, 256))
    steps = []
    for kind in (feedback, None):
        network = model(kind, hidden_size=256, num_hidden_layers=4).train()
        optimizer = torch.optim.AdamW(network.parameters())

        def step(network=network, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            network(ids, labels=ids, use_cache=False, num_passes=passes).loss.backward()
            optimizer.step()

        steps.append(step)
    measured, reference = steps
    result = paired_ratio(measured, reference, pairs, f"training step, {feedback}, {passes} passes")
    return {**result, "per_pass": round(result["ratio"] / passes, 3)}


def decoding(feedback: str, tokens: int, pairs: int) -> dict:
    """Greedy decoding of `tokens` tokens through `generate()`: width 512, 6 layers, batch 1, a prompt of 1 token."""
    prompt = torch.zeros(1, 1, dtype=torch.long)
    runs = []
    for kind in (feedback, None):
        network = model(kind, hidden_size=512, num_hidden_layers=6, num_attention_heads=8).eval()

        def run(network=network) -> None:
            network.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        runs.append(run)
    measured, reference = runs
    return paired_ratio(measured, reference, pairs, f"decoding {tokens} tokens, {feedback}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--feedback", nargs="+", default=["gated_add", "glu", "correction"])
    arguments = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
    for feedback in arguments.feedback:
        for passes in arguments.passes:
            print(json.dumps(training_steps(feedback, passes, arguments.pairs)), flush=True)
        print(json.dumps(decoding(feedback, 64, arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
