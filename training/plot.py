"""Pictures of training runs."""

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Validation bits per byte of the exact recurrence, against the tokens and the seconds of training: a line for each
    name, the mean of its runs (what `results.json` holds, one for each seed) over the steps at which all of them were
    evaluated; the runs are thin behind it."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4 + 0.25 * len(runs)), layout="constrained", sharey=True)
    for axes, spent, label in zip(panels, ("tokens", "train_seconds"), ("tokens seen", "seconds"), strict=True):
        for name, records in runs.items():
            curves = []
            for run in records:
                scale = 1 / math.log(2) / run["data"]["bytes_per_token"]
                curves.append({e["step"]: (e[spent], e["eval_loss"] * scale) for e in run["log"] if e["tokens"] > 0})
            common = sorted(set.intersection(*map(set, curves)))
            mean = np.array([[curve[step] for step in common] for curve in curves]).mean(axis=0).reshape(-1, 2)
            (line,) = axes.plot(*mean.T, label=name, linewidth=2)
            for curve in curves if len(curves) > 1 else []:
                points = np.array([*curve.values()]).reshape(-1, 2)
                axes.plot(*points.T, color=line.get_color(), linewidth=0.6, alpha=0.6)
        axes.set(xlabel=f"training {label}")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation bits per byte, exact recurrence")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_lengths(runs: dict[str, list[dict]], trained: int, path: Path) -> None:
    """The loss of each run (those of `state_tracking.py`, one for each seed) in training, and scaled accuracy against
    the length of the tested sequences: a line for each name, the mean of its runs, down to the worst of which it is
    shaded. `trained`: the longest length in training."""
    figure, (losses, axes) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, records in runs.items():
        lengths = [int(length) for length in records[0]["results"]]
        scores = np.array([[result["scaled"] for result in run["results"].values()] for run in records])
        (line,) = axes.plot(lengths, scores.mean(0), label=name, marker="o", markersize=3)
        axes.fill_between(lengths, scores.min(0), scores.mean(0), color=line.get_color(), alpha=0.15)
        for run in records:
            steps = [int(step) for step in run["losses"]]
            losses.plot(steps, run["losses"].values(), color=line.get_color(), linewidth=1)
    losses.set(xlabel="training step", ylabel="loss in nats, sequences of training")
    axes.axvline(trained, color="black", linewidth=0.8, linestyle=":", label="longest in training")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length in tokens", ylabel="scaled accuracy (0: chance)")
    axes.legend()
    for panel in (losses, axes):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_scores(scores: dict[str, dict[str, float]], path: Path) -> None:
    """Scaled accuracies, the worst seed's, of models (rows) in tasks (columns), as numbers on a colour."""
    tasks = list(next(iter(scores.values())))
    values = np.array([[of_model[task] for task in tasks] for of_model in scores.values()])
    figure, axes = pyplot.subplots(figsize=(3 + 0.9 * len(tasks), 2 + 0.35 * len(scores)), layout="constrained")
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_title("scaled accuracy, mean over the lengths, worst seed")
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
    axes.set_yticks(range(len(scores)), list(scores))
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
