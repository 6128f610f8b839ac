"""Bits per byte and perplexity of a checkpoint, for 1, 2, … passes and of the exact recurrence.

    python training/evaluate.py runs/stateful --passes 1 2 3 10 30
    python training/evaluate.py runs/stateful --text_file book.txt

Whether the passes approach the exact value shows whether the model that is decoded is the model that was trained. They
are made as in training, or as `--solver` says. The numbers are also left beside the checkpoint, in evaluation.json,
from where they go into its model card.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from data import bytes_per_token, load_corpus, read_text, sample_blocks, token_blocks
from datasets import Dataset
from records import write_json
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from train import RunError, exactly, load_model, load_tokenizer, run_command
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_stateful_gpt.generation_gateloop import position_limit


@torch.no_grad()
def mean_nats(
    model: PreTrainedModel,
    blocks: Dataset,
    num_passes: int | None,
    batch_size: int = 64,
    solver: str | None = None,
) -> float:
    """The mean loss per predicted token in nats; with `num_passes=None`, of the exact recurrence. All tokens
    of a block but its first are predicted."""
    model.eval()
    how = exactly(model) if num_passes is None else {"num_passes": num_passes, "solver": solver}
    batches = blocks.with_format("torch").iter(batch_size)
    what = "exact recurrence" if num_passes is None else f"{num_passes} pass(es)"
    total = 0.0
    for batch in tqdm(batches, total=math.ceil(len(blocks) / batch_size), desc=what, leave=False):
        ids = batch["input_ids"].to(model.device)
        total += model(input_ids=ids, labels=ids, use_cache=False, **how).loss.item() * len(ids)
    return total / len(blocks)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    passes: list[int],
    block_size: int = 256,
    batch_size: int = 64,
    max_blocks: int | None = None,
    solver: str | None = None,
) -> dict[str, dict[str, float]]:
    """`{"1": …, "2": …, "exact": …}`, each with `bits_per_byte` and `perplexity` (per token).

    Raises:
        RunError: the blocks are longer than the model has positions.
        DataError: the documents have less than one block.
    """
    limit = position_limit(model.config.get_text_config())
    if limit is not None and block_size > limit:
        raise RunError(f"--block_size {block_size} is more than the model's max_position_embeddings ({limit}).")
    blocks = sample_blocks(token_blocks(documents, tokenizer, block_size), max_blocks)
    width = bytes_per_token(documents, tokenizer)
    # A model without feedback has nothing to pass around: one pass is exact.
    plain = getattr(model.config, "feedback", None) is None
    results = {}
    for num_passes in [None] if plain else [*passes, None]:
        nats = mean_nats(model, blocks, num_passes, batch_size, solver)
        results["exact" if num_passes is None else str(num_passes)] = {
            "bits_per_byte": nats / math.log(2) / width,
            "perplexity": float(np.exp(nats)),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text_file", nargs="+", help="all of it is evaluated; default: the default validation text")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--solver", choices=["jacobi", "cyclic"], help="how the passes are made; default: as in training"
    )
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_blocks", type=int, help="a sample of the blocks; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    counts = {"passes": arguments.passes, "batch_size": [arguments.batch_size], "max_blocks": [arguments.max_blocks]}
    for name, values in counts.items():
        if any(value is not None and value < 1 for value in values):
            raise RunError(f"--{name} must be at least 1.")
    model = load_model(arguments.checkpoint).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    tokenizer = load_tokenizer(arguments.checkpoint)
    files = arguments.text_file
    documents = [read_text(Path(name)) for name in files] if files else load_corpus().validation
    results = evaluate(
        model,
        tokenizer,
        documents,
        arguments.passes,
        arguments.block_size,
        arguments.batch_size,
        arguments.max_blocks,
        arguments.solver,
    )
    if Path(arguments.checkpoint).is_dir():
        text = ", ".join(Path(name).name for name in files) if files else "Validation text of the default corpus"
        if arguments.max_blocks is not None:
            text += f", at most {arguments.max_blocks} blocks of it"
        if arguments.solver is not None:
            text += f" ({arguments.solver} passes)"
        record = {"text": text, "block_size": arguments.block_size, "results": results}
        write_json(Path(arguments.checkpoint, "evaluation.json"), record)
    if arguments.json:
        print(json.dumps(results))
        return
    table = Table("passes", "bits per byte", "perplexity", title=arguments.checkpoint)
    for name, row in results.items():
        table.add_row(name, f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
