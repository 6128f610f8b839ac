"""Train transformers' RWKV as train.py trains our models: the same text, order and budget.

    python training/rwkv.py --seed 0 --num_hidden_layers 2 --output_dir runs/transformers_rwkv

Takes the options of train.py. The model has as many parameters as the preset `gpt` of the same sizes; what its time
mixing does not take, its channel mixing gets. Prints a JSON line with its bits per byte.

On a CPU, transformers evaluates the memory in a loop that copies the whole output for the gradient of each token: a
step takes most of a minute. Here it goes through a parallel scan, which gives the same.
"""

import json
import sys
from pathlib import Path

import torch
from compare import Run, final_evaluation
from data import byte_tokenizer
from train import build_model, count_parameters, parse, prepare_data, run_command, train
from transformers import PreTrainedTokenizerBase, RwkvConfig, RwkvForCausalLM, set_seed
from transformers.models.rwkv import modeling_rwkv

from modeling_stateful_gpt.linear_scan import linear_scan

by_a_loop = modeling_rwkv.rwkv_linear_attention


def by_a_scan(time_decay, time_first, key, value, state=None, return_state=False):
    """What `by_a_loop` computes, `[B, T, D]`, without a state before or after, for keys that differ by less than 80:
    the largest of all is taken from each, where the loop has a running maximum."""
    if state is not None or return_state:
        return by_a_loop(time_decay, time_first, key, value, state, return_state)
    key = key.float()
    e = (key - key.amax(1, keepdim=True)).exp()
    z, nothing = torch.exp(-torch.exp(time_decay)).expand_as(e), torch.zeros_like(e[:, 0])
    written = torch.stack([e * value, e])
    num, den = (torch.nn.functional.pad(linear_scan(z, w, nothing)[:, :-1], (0, 0, 1, 0)) for w in written)
    num, den = torch.stack([num, den]) + time_first.exp() * written
    return (num / den).to(value.dtype), None


def start(sizes, tokenizer: PreTrainedTokenizerBase, parameters: int, seed: int) -> RwkvForCausalLM:
    """A random model with about so many parameters."""

    def config(intermediate_size: int) -> RwkvConfig:
        return RwkvConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            intermediate_size=intermediate_size,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    with torch.device("meta"):
        one, two = (count_parameters(RwkvForCausalLM(config(size))) for size in (1, 2))
    set_seed(seed)
    return RwkvForCausalLM(config(1 + round((parameters - one) / (two - one))))


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse([*sys.argv[1:], "--preset", "gpt"])
    tokenizer, seed = byte_tokenizer(), training_arguments.seed
    with torch.device("meta"):
        parameters = count_parameters(build_model(model_arguments, data_arguments, tokenizer, seed))
    beginning = Path(f"{training_arguments.output_dir}-start")
    start(model_arguments, tokenizer, parameters, seed).save_pretrained(beginning)
    tokenizer.save_pretrained(beginning)
    model_arguments.model_name_or_path = str(beginning)
    # The order in which compare.py has all arms read.
    training_arguments.data_seed = seed
    modeling_rwkv.rwkv_linear_attention = by_a_scan
    results = train(model_arguments, data_arguments, training_arguments)
    if results is not None:
        data = prepare_data(data_arguments, str(beginning))
        folder = Path(training_arguments.output_dir)
        run = Run("transformers_rwkv", seed, folder, model_arguments, data_arguments, training_arguments)
        bits = final_evaluation(run, data, max_blocks=10**6)
        print(json.dumps({"arm": run.arm, **results, "bits_per_byte": bits}))


if __name__ == "__main__":
    run_command(main)
