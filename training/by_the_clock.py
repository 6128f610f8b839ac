"""What the records of a comparison say of equal time, whatever ran beside it.

    python training/by_the_clock.py docs/results/data_limited.jsonl --costs 1 1 1.11 2.64 1.38

Prints for every arm its best bits per byte and, over runs of the same seed, its differences to the first arm (or to
the one of --baseline): of the best evaluations; of the best means of three evaluations in a row, which owe less to
chance; and of the best until the second at which the baseline is at its best, by the seconds of the records and by
their tokens times --costs.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from compare import console, in_seconds, paired_difference
from records import read_records
from rich.markup import escape
from rich.table import Table
from train import RunError, run_command


def best_of_three(record: dict) -> float:
    """The lowest mean bits per byte of three evaluations in a row; nan if there were not so many."""
    losses = [entry["eval_loss"] for entry in record["log"] if entry["step"] > 0]
    means = np.convolve(losses, np.ones(3) / 3, mode="valid") if len(losses) >= 3 else [math.nan]
    return np.min(means) / math.log(2) / record["data"]["bytes_per_token"]


def timed(record: dict, cost: float) -> dict:
    """As if each token had taken `cost` seconds."""
    log = [{**entry, "train_seconds": entry["tokens"] * cost} for entry in record["log"]]
    return {**record, "seconds": record["tokens"] * cost, "log": log}


def tabulate(records: list[dict], baseline: int = 0, costs: list[float] | None = None) -> list[list[str]]:
    """The heading and a row for each arm, in the order of the records.

    Raises:
        RunError: there are no records, no such arm, or not a cost for each.
    """
    arms = list(dict.fromkeys(record["arm"] for record in records))
    if not 0 <= baseline < len(arms):
        raise RunError(f"There are {len(arms)} arms; --baseline {baseline} must be one of them, counted from 0.")
    costs = costs or [1.0] * len(arms)
    if len(costs) != len(arms) or not min(costs) > 0:
        raise RunError(f"--costs are {len(costs)}; give one above 0 for each of the {len(arms)} arms: {arms}.")
    against = {record["seed"]: record for record in records if record["arm"] == arms[baseline]}
    rows = [["arm", "seeds", "best", "worst seed", "difference", "… of three", "… in the seconds", "… by the costs"]]
    for arm, cost in zip(arms, costs, strict=True):
        runs = [record for record in records if record["arm"] == arm]
        exact = [run["bits_per_byte"]["exact"] for run in runs]
        row = [arm, " ".join(str(run["seed"]) for run in runs), f"{np.mean(exact):.4f}", f"{np.max(exact):.4f}"]
        pairs = [(run, against[run["seed"]]) for run in runs if run["seed"] in against]
        if arm == arms[baseline] or not pairs:
            rows.append([*row, "", "", "", ""])
            continue
        by_cost = [(timed(run, cost), timed(base, costs[baseline])) for run, base in pairs]
        for measure in (
            [(run["bits_per_byte"]["exact"], base["bits_per_byte"]["exact"]) for run, base in pairs],
            [(best_of_three(run), best_of_three(base)) for run, base in pairs],
            [(in_seconds(run, base["seconds"]), in_seconds(base, base["seconds"])) for run, base in pairs],
            [(in_seconds(run, base["seconds"]), in_seconds(base, base["seconds"])) for run, base in by_cost],
        ):
            row.append(paired_difference(*map(list, zip(*measure, strict=True))))
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
    heading, *rows = tabulate(read_records(arguments.records), arguments.baseline, arguments.costs)
    table = Table(*map(escape, heading))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
