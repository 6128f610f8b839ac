"""Pictures of training runs."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Validation bits per byte, stepped exactly, against the tokens seen: a line for each name, the mean of its runs
    (what `results.json` holds, one for each seed), which are thin behind it."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, records in runs.items():
        curves = []
        for run in records:
            scale = 1 / math.log(2) / run["data"]["bytes_per_token"]
            tokens_per_step = run["tokens"] / max(entry["step"] for entry in run["log"])
            curves.append({e["step"] * tokens_per_step: e["eval_loss"] * scale for e in run["log"] if e["step"] > 0})
        # A run that was interrupted has one more evaluation, where it was resumed.
        common = sorted(set.intersection(*map(set, curves)))
        mean = [sum(curve[tokens] for curve in curves) / len(curves) for tokens in common]
        (line,) = axes.plot(common, mean, label=name, linewidth=2)
        for curve in curves if len(curves) > 1 else []:
            axes.plot(list(curve), list(curve.values()), color=line.get_color(), linewidth=0.6, alpha=0.6)
    axes.set(xlabel="training tokens seen", ylabel="validation bits per byte, stepped exactly")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_lengths(runs: dict[str, list[dict]], trained: int, path: Path) -> None:
    """Scaled accuracy against the length of the tested sequences: a line for each name, the mean of its runs (those of
    `state_tracking.py`, one for each seed), down to the worst of which it is shaded. `trained`: the longest length in
    training."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, records in runs.items():
        lengths = [int(length) for length in records[0]["results"]]
        curves = [[result["scaled"] for result in run["results"].values()] for run in records]
        at_length = list(zip(*curves, strict=True))
        mean = [sum(values) / len(values) for values in at_length]
        (line,) = axes.plot(lengths, mean, label=name, marker="o", markersize=3)
        axes.fill_between(lengths, list(map(min, at_length)), mean, color=line.get_color(), alpha=0.15)
    axes.axvline(trained, color="black", linewidth=0.8, linestyle=":", label="longest in training")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length in tokens", ylabel="scaled accuracy (0: chance)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
