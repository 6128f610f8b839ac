"""What the records of a comparison say of equal time, whatever ran beside it.

    python training/by_the_clock.py docs/results/data_limited.jsonl --costs 1 1 1.11 2.64 1.38

Prints for every arm its best bits per byte and, over runs of the same seed, its differences to the first arm (or to
the one of --baseline): of the best evaluations; of the best means of three evaluations in a row, which owe less to
chance; and of what each has when the first arm is at its best, by the seconds of the records and, given --costs, by
tokens times these. What an arm went on from counts as plain.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from compare import in_seconds, paired_difference, print_table
from records import read_records
from train import RunError, run_command


def best_of_three(record: dict) -> float:
    """The lowest mean bits per byte of three evaluations in a row; nan if there were not so many."""
    losses = [entry["eval_loss"] for entry in record["log"] if entry["step"] > 0]
    means = np.convolve(losses, np.ones(3) / 3, mode="valid") if len(losses) >= 3 else [math.nan]
    return np.min(means) / math.log(2) / record["data"]["bytes_per_token"]


def best(record: dict) -> float:
    return record["bits_per_byte"]["exact"]


def with_cost(record: dict, cost: float) -> dict:
    """As if a token had taken a second, and `cost` seconds in this run's own training."""
    before = record.get("before", {}).get("tokens", 0)

    def seconds(tokens: float) -> float:
        return before + (tokens - before) * cost

    log = [{**entry, "train_seconds": seconds(entry["tokens"])} for entry in record["log"]]
    return {**record, "seconds": seconds(record["tokens"]), "before": {"seconds": before}, "log": log}


def tabulate(records: list[dict], baseline: int = 0, costs: list[float] | None = None) -> list[list[str]]:
    """The heading and a row for each arm, in the order of the records; of several of one arm and seed the last counts.

    Raises:
        RunError: there are no records of runs, no such arm, or not a cost for each.
    """
    fields = {"arm", "seed", "log", "bits_per_byte"}
    if not records or not all(isinstance(record, dict) and fields <= record.keys() for record in records):
        raise RunError("These are no records of compare.py (comparison.jsonl), of which each names its arm.")
    arms: dict[str, dict[int, dict]] = {}
    for record in records:
        arms.setdefault(record["arm"], {})[record["seed"]] = record
    names = [*arms]
    if not 0 <= baseline < len(names):
        raise RunError(f"There are {len(names)} arms; --baseline {baseline} must be one of them, counted from 0.")
    if costs and (len(costs) != len(names) or not all(0 < cost < math.inf for cost in costs)):
        raise RunError(f"--costs are {costs}; give one above 0 for each of the {len(names)} arms: {names}.")
    cost_of = dict(zip(names, costs, strict=True)) if costs else {}
    first = arms[names[0]]

    def by_cost(run: dict) -> float:
        budget = with_cost(first[run["seed"]], cost_of[names[0]])["seconds"]
        return in_seconds(with_cost(run, cost_of[run["arm"]]), budget)

    measures: dict[str, Callable[[dict], float]] = {
        "difference": best,
        "… of three": best_of_three,
        "… in the seconds": lambda run: in_seconds(run, first[run["seed"]]["seconds"]),
    }
    if costs:
        measures["… by the costs"] = by_cost
    rows = [["arm", *(["cost"] if costs else []), "seeds", "exact", "worst seed", *measures]]
    for name, runs in arms.items():
        exact = [*map(best, runs.values())]
        row = [name, *([f"{cost_of[name]:g}"] if costs else [])]
        row += [" ".join(map(str, runs)), f"{np.mean(exact):.4f}", f"{np.max(exact):.4f}"]
        against = arms[names[baseline]]
        seeds = [seed for seed in runs if seed in against and seed in first]
        for measure in measures.values():
            same = runs is against or not seeds
            values = ([measure(of[seed]) for seed in seeds] for of in (runs, against))
            row.append("" if same else paired_difference(*values))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="comparison.jsonl of a folder of compare.py, or several in one file")
    parser.add_argument("--baseline", type=int, default=0, help="number of the arm that the others are compared with")
    parser.add_argument(
        "--costs", type=float, nargs="+", help="of a training step of each arm, in those of a plain one"
    )
    arguments = parser.parse_args()
    if not arguments.records.is_file():
        raise RunError(f"{arguments.records} does not exist or is not a file.")
    try:
        records = read_records(arguments.records)
    except UnicodeDecodeError as error:
        raise RunError(f"{arguments.records} is no file of records ({error}).") from error
    print_table(tabulate(records, arguments.baseline, arguments.costs))


if __name__ == "__main__":
    run_command(main)
