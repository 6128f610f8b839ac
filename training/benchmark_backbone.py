"""What feedback around a trained model costs: prompts, decoded tokens, training steps and their memory.

    python training/benchmark_backbone.py HuggingFaceTB/SmolLM2-135M-Instruct
    python training/benchmark_backbone.py FOLDER --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --length 256
    python training/benchmark_backbone.py HuggingFaceTB/SmolLM2-135M-Instruct --measure solvers --pairs 2
    python training/benchmark_backbone.py --vocab_size 151936 --length 1024 --measure losses

One JSON line per ratio to the plain model: the median, and the smallest and largest pair. Both sides run in turn in one
process. `solvers` measures each solver against the default. `peak_mib` is how much more memory a step takes at its peak
than the process held before (Linux). For `losses` a small random model with a large vocabulary makes a training step
with one pass and with three. Close everything else.
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmark import paired_ratio, reset_peak, resident
from data import load_corpus, sample_blocks, token_blocks
from peft import LoraConfig, get_peft_model
from train import RunError, run_command
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_stateful_gpt import StatefulGPTForCausalLM
from modeling_stateful_gpt.solvers import SOLVERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak(work: Callable[[], object]) -> int:
    """MiB at the peak of `work` above what the process held before. It has run once before, so that all is there that
    stays."""
    work()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Or what is freed and held would be taken for what is in use.
    reset_peak()
    before = resident("VmRSS")
    work()
    return round(resident("VmHWM") - before)


def with_feedback(plain: PreTrainedModel, **config) -> StatefulGPTForCausalLM:
    """Its fusion is not zero any more, so that states matter."""
    model = StatefulGPTForCausalLM.from_backbone(plain, **config)
    torch.manual_seed(0)
    with torch.no_grad():
        weight = model.model.feedback.get_parameter("down.weight")
        weight.add_(0.1 * torch.randn(weight.shape).to(weight) / weight.shape[1] ** 0.5)
    return model


def text(tokenizer: PreTrainedTokenizerBase, length: int, batch: int = 1) -> torch.Tensor:
    """`[batch, length]` of the default validation text."""
    blocks = sample_blocks(token_blocks(load_corpus().validation, tokenizer, length), batch)
    if len(blocks) < batch:
        raise RunError(f"The text has no {batch} blocks of {length} tokens; lower --length.")
    return torch.tensor(blocks["input_ids"])


@torch.no_grad()
def prompts(plain: PreTrainedModel, model: Any, ids: torch.Tensor, pairs: int) -> list[dict]:
    reference = partial(plain.eval(), ids, use_cache=True, logits_to_keep=1)
    model.eval()
    lines = [{"what": f"prompt of {ids.shape[1]} tokens, the plain model", "peak_mib": peak(reference)}]
    for mode in ("plain_prompt", "passes", "solved"):
        read = partial(model, ids, use_cache=True, logits_to_keep=1, decode_mode=mode)
        line = paired_ratio(read, reference, pairs, f"prompt of {ids.shape[1]} tokens, {mode}")
        lines.append({**line, "passes": read().passes, "peak_mib": peak(read)})
    return lines


@torch.no_grad()
def decoding(plain: PreTrainedModel, model: StatefulGPTForCausalLM, ids: torch.Tensor, pairs: int) -> list[dict]:
    """A token after the text; the cache grows by as many tokens on either side."""
    steps = []
    for one, how in ((model.eval(), {"decode_mode": "plain_prompt"}), (plain.eval(), {})):
        cache = one(ids, use_cache=True, logits_to_keep=1, **how).past_key_values
        steps.append(partial(one, ids[:, :1], past_key_values=cache, use_cache=True))
    measured, reference = steps
    line = paired_ratio(measured, reference, 8 * pairs, f"a decoded token after {ids.shape[1]}")
    return [
        {"what": "a decoded token, the plain model", "peak_mib": peak(reference)},
        line | {"peak_mib": peak(measured)},
    ]


@torch.no_grad()
def solvers(plain: PreTrainedModel, model: Any, ids: torch.Tensor, pairs: int) -> Iterator[dict]:
    """Each solver, against the default."""
    model.eval()
    for batch, length in ((1, 16), (1, 64), (1, 256), (4, 64), (4, 256)):
        evaluate = partial(model, ids[:batch, :length], use_cache=False, logits_to_keep=1)
        default = evaluate()
        shape = {"batch": batch, "tokens": length}
        yield {**shape, "default_passes": default.passes, "default_stepped_from": default.stepped_from}
        for name in SOLVERS:
            yield {**shape, **paired_ratio(partial(evaluate, solver=name), evaluate, pairs, name)}


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def training(plain: PreTrainedModel, model: StatefulGPTForCausalLM, ids: torch.Tensor, pairs: int) -> list[dict]:
    """The default of training with all weights, with LoRA and with the fusion alone, against the plain model's step."""
    reference = partial(training_step, plain, ids)
    lines = [{"what": "training step, the plain model", "peak_mib": peak(reference)}]
    every = list(model.parameters())
    of_fusion = {id(p) for p in model.model.feedback.parameters()}
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["feedback"], task_type="CAUSAL_LM")
    for name in ("all", "fusion only", "LoRA"):
        trained = get_peft_model(model, lora) if name == "LoRA" else model
        for parameter in every if name != "LoRA" else ():
            parameter.requires_grad_(name == "all" or id(parameter) in of_fusion)
        # The plain model shares its weights with the other, and is to train all of them.
        step = partial(training_step, trained, ids)
        memory = peak(step)
        line = {} if name != "all" else paired_ratio(step, reference, pairs, "")
        lines.append({**line, "what": f"training step of {ids.shape[1]} tokens, {name}", "peak_mib": memory})
    return lines


def losses(vocab_size: int, length: int, hidden_size: int) -> list[dict]:
    """The peak of a step with the loss of three passes, against transformers' own with one."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=length,
    )  # fmt: skip
    plain, ids = LlamaForCausalLM(config), torch.randint(vocab_size, (1, length))
    least = peak(partial(training_step, plain, ids))
    lines: list[dict] = [{"what": "training step, one pass of the plain model", "peak_mib": least}]
    for passes in (1, 3):
        model = with_feedback(plain, num_passes=passes, num_no_grad_passes=0)
        memory = peak(partial(training_step, model, ids))
        ratio = round(memory / least, 3)
        lines.append({"what": f"training step, the loss of {passes} passes", "peak_mib": memory, "ratio": ratio})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="name or folder of a causal language model")
    parser.add_argument("--gguf_file", help="the file in the folder, if the weights are in that format")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--train_length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=151_936, help="of the model for the losses")
    parser.add_argument("--hidden_size", type=int, default=64, help="of the model for the losses")
    kinds = ["prompts", "decoding", "training", "solvers", "losses"]
    parser.add_argument("--measure", nargs="+", choices=kinds, default=kinds[:3])
    arguments = parser.parse_args()
    if min(arguments.length, arguments.train_length, arguments.pairs, arguments.vocab_size) < 2:
        raise RunError("--length, --train_length, --pairs and --vocab_size must be at least 2.")
    if arguments.hidden_size < 8 or arguments.hidden_size % 8:
        raise RunError("--hidden_size must be a multiple of 8.")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(arguments)}))
    if "losses" in arguments.measure:
        for line in losses(arguments.vocab_size, arguments.length, arguments.hidden_size):
            print(json.dumps(line), flush=True)
    rest = [kind for kind in kinds[:-1] if kind in arguments.measure]
    if not rest:
        return
    if arguments.checkpoint is None:
        raise RunError("Name a checkpoint: a causal language model, on the Hub or in a folder.")
    how = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    plain = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=DTYPES[arguments.dtype], **how)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, **how)
    model = with_feedback(plain)
    shapes = {"training": (arguments.train_length, 1), "solvers": (256, 4)}
    measures: dict[str, Any] = {"prompts": prompts, "decoding": decoding, "training": training, "solvers": solvers}
    for kind in rest:
        given = text(tokenizer, *shapes.get(kind, (arguments.length, 1)))
        for line in measures[kind](plain, model, given, arguments.pairs):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_command(main)
