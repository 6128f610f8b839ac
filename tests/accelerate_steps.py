"""What the tests start with `accelerate launch`: train.py itself, or a few steps of tiny models on padded batches.

accelerate launch … accelerate_steps.py train <options of train.py>
accelerate launch … accelerate_steps.py steps <options of TrainingArguments>
accelerate launch … accelerate_steps.py solve <options of TrainingArguments>
"""

import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import stateful, text_config, tokens
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from modeling_stateful_gpt import GateLoopForCausalLM

MIXTURE = [0.4, 0.3, 0.3]
LENGTH = 12


def hybrid() -> PreTrainedModel:
    torch.manual_seed(0)
    return GateLoopForCausalLM(text_config("gateloop-hybrid"))


MODELS = {
    "two passes": lambda: stateful("gateloop", torch.float32, num_passes=2),
    "cyclic": lambda: stateful("llama", torch.float32, training_solver="cyclic", num_no_grad_passes=2, num_groups=4),
    "mixture": lambda: stateful("llama", torch.float32, feedback="glu", pass_probabilities=MIXTURE),
    "mixture around a hybrid": lambda: stateful("gateloop-hybrid", torch.float32, pass_probabilities=MIXTURE),
    "hybrid": hybrid,
}


def examples(number: int) -> list[dict[str, torch.Tensor]]:
    """Padded on either side, and with tokens that have no loss, so that batches count unequally many."""
    rows = []
    for row, input_ids in enumerate(tokens(number, LENGTH)):
        padding = 5 * row % 8
        attention_mask = (torch.arange(LENGTH) < LENGTH - padding).long()
        labels = input_ids.masked_fill((attention_mask == 0) | (torch.arange(LENGTH) < row % 3), -100)
        example = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        rows.append({name: value.flip(0) if row % 2 else value for name, value in example.items()})
    return rows


FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"
# The Trainer shall use the state made here, not one of its own.
FSDP_OPTIONS = ["--accelerator_config", '{"use_configured_state": true}'] if FSDP else []


def prepare_state() -> None:
    """accelerate has FSDP for accelerators only, and runs DDP on CPUs. Told that these CPU processes are accelerators',
    it does what it would do with GPUs, but for the transport. It must be told again for each model."""
    if FSDP:
        AcceleratorState._reset_state()
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def steps(options: list[str], names: Iterable[str] = MODELS) -> dict[str, dict]:
    """What each model showed its user, also written to `seen.json` in the output folder."""
    defaults = ["--max_steps=5", "--logging_steps=1", "--learning_rate=1e-2", "--save_strategy=no", "--use_cpu=true"]
    defaults += ["--disable_tqdm=true", "--report_to=none", "--ddp_find_unused_parameters=true"]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*defaults, *options])
    seen = {}
    for name in names:
        prepare_state()
        trainer = Trainer(MODELS[name](), arguments, train_dataset=examples(80))
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        parameters = list(trainer.model.parameters())
        here = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        seen[name] = {
            "losses": [entry["loss"] for entry in log],
            "grad_norms": [entry["grad_norm"] for entry in log],
            "share": sum(p.numel() for p in here) / sum(p.numel() for p in parameters),
            "text": trainer.model.eval().generate(tokens(2, 5), max_new_tokens=8, do_sample=False).tolist(),
        }
    if arguments.process_index == 0:
        Path(arguments.output_dir).mkdir(exist_ok=True)
        (Path(arguments.output_dir) / "seen.json").write_text(json.dumps(seen))
    return seen


SOLVED = {
    "training": {"training_solver": "cyclic", "num_no_grad_passes": None, "num_passes": 1},
    "evaluation": {},
    "stepping": {"solver": "sequential"},
}


def solve(options: list[str]) -> list[dict]:
    """What each of two texts, of which one is longer and takes more passes, gives: each process has one; a process
    alone, one after the other. Also written to `seen-RANK.json` in the output folder."""
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--use_cpu=true", *options])
    texts = [tokens(1, 4), tokens(2, 19)]
    if arguments.world_size > 1:
        texts = [texts[arguments.process_index]]
    seen = []
    for config in SOLVED.values():
        prepare_state()
        trainer = Trainer(stateful("llama", torch.float32, num_groups=2, tolerance=1e-5, **config), arguments)
        parameters = torch.optim.SGD(trainer.model.parameters())
        model, _ = trainer.accelerator.prepare(trainer.model, parameters)
        for text in texts:
            with torch.set_grad_enabled("training_solver" in config):
                outputs = model.train("training_solver" in config)(text, labels=text)
            generated = model.eval().generate(text[:1, :4], max_new_tokens=4, do_sample=False)
            seen.append({"loss": outputs.loss.item(), "passes": outputs.passes, "text": generated.tolist()})
    if arguments.world_size > 1:
        for solver, length in (("sequential", 9), ("cyclic", 1)):
            prepare_state()
            model = stateful("llama", torch.float32, training_solver=solver, num_groups=2)
            accelerator = Trainer(model, arguments).accelerator
            model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
            with pytest.raises(ValueError, match="their batches are too unequally long"):
                model.train()(tokens(1, length + arguments.process_index))
    Path(arguments.output_dir, f"seen-{arguments.process_index}.json").write_text(json.dumps(seen))
    return seen


def train_py(options: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
    from train import parse, run_command, train

    run_command(lambda: train(*parse(options)))


if __name__ == "__main__":
    command, *options = sys.argv[1:]
    prepare_state()
    few_steps = partial(steps, names=["cyclic", "mixture around a hybrid"])
    commands = {"train": train_py, "steps": steps, "few_steps": few_steps, "solve": solve}
    commands[command](options + FSDP_OPTIONS)
