"""What a state gives a trained model: to follow a coin, a ball under cups or a clock over many moves.

    python -m training.experiments.give_a_state HuggingFaceTB/SmolLM2-135M-Instruct --output_dir runs/coin
    python -m training.experiments.give_a_state HuggingFaceTB/SmolLM2-135M-Instruct --quick --output_dir runs/quick

A text describes the beginning and then names moves, one token each. After each move the model is to name the state
as the next token. Training begins with two moves. Where the loss has become small, it goes on to more, up to
`--max_moves`.
`--quick` trains the coin on up to eight moves, for at most 160 steps.

| arm | what is trained |
|---|---|
| `state` | the fusion; the language model is frozen |
| `lora` | LoRA on queries and values; there is no state |
| `state+lora` | both |
| `control+lora` | both, but the fusion reads the embedding of the token before, which is no state |

`log.jsonl` in the output folder has a line every ten steps, and the accuracies at the end. If it is interrupted, the
same command goes on from the last of these lines. The folder `state` is for `from_backbone(…, state=…)`.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_stateful_gpt import StatefulGPTForCausalLM, save_state


@dataclass(frozen=True)
class Task:
    beginning: str
    moves: dict[str, Callable[[int], int]]
    """What each move, a word, makes of a state."""
    states: tuple[str, ...]
    """What they are called; it begins with the first."""


def swap(a: int, b: int) -> Callable[[int], int]:
    return lambda state: b if state == a else a if state == b else state


TASKS = {
    "coin": Task(
        "The coin shows heads. Then:",
        {" flip": lambda state: 1 - state, " stay": lambda state: state},
        (" heads", " tails"),
    ),
    "shell_game": Task(
        "The ball is under the left cup. First: the left and the middle cup change places. Last: the middle and the "
        "right cup change places. Moves:",
        {" first": swap(0, 1), " last": swap(1, 2)},
        (" left", " middle", " right"),
    ),
    "clock": Task(
        "It is one o'clock of twelve. Later: an hour more. Back: an hour less. Then:",
        {" later": lambda state: (state + 1) % 12, " back": lambda state: (state - 1) % 12},
        (" one", " two", " three", " four", " five", " six", " seven", " eight", " nine", " ten", " eleven", " twelve"),
    ),
}

ARMS = ("state", "lora", "state+lora", "control+lora")


class Words:
    """A task in the tokens of a model.

    Raises:
        SystemExit: if a word is more than one token.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        def token(word: str) -> int:
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise SystemExit(
                    f"error: {word!r} is {len(ids)} tokens for this model; the tasks need words of one token."
                )
            return ids[0]

        self.beginning = tokenizer(task.beginning)["input_ids"]
        self.moves = [(token(word), step) for word, step in task.moves.items()]
        self.states = torch.tensor([token(word) for word in task.states])

    def batch(self, rows: int, moves: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` `[rows, T]`, and at each move the number of the state after it, `[rows, moves]`."""
        ids, states = [], []
        for _ in range(rows):
            state, row, seen = 0, list(self.beginning), []
            for move, step in rng.choices(self.moves, k=moves):
                state = step(state)
                row.append(move)
                seen.append(state)
            ids.append(row)
            states.append(seen)
        return torch.tensor(ids), torch.tensor(states)


def make_model(checkpoint: str, arm: str, rank: int) -> Any:
    """The model of an arm, with gradients where it is trained."""
    source = {"feedback_source": "embedding"} if arm.startswith("control") else {}
    feedback = {"feedback": None} if arm == "lora" else {"training_solver": "sequential", "num_no_grad_passes": 0}
    model = StatefulGPTForCausalLM.from_backbone(checkpoint, **feedback, **source)
    model.requires_grad_(False)
    if "lora" in arm:
        saved = None if arm == "lora" else ["feedback"]
        targets = r".*language_model.*\.(q_proj|v_proj|c_attn|query_key_value)"
        config = LoraConfig(r=rank, task_type="CAUSAL_LM", target_modules=targets, modules_to_save=saved)
        return get_peft_model(model, config)
    model.model.feedback.requires_grad_(True)
    return model


@torch.no_grad()
def accuracy(model: Any, words: Words, moves: int, rows: int = 32) -> float:
    """Of the last state, among the states of the task, after so many moves."""
    ids, states = words.batch(rows, moves, random.Random(10_000 + moves))
    model.eval()
    logits = torch.cat(
        [model(input_ids=part, logits_to_keep=1, use_cache=False).logits[:, -1] for part in ids.split(8)]
    )
    model.train()
    return (logits[:, words.states].argmax(-1) == states[:, -1]).float().mean().item()


class Run:
    """A training run, which can be interrupted after any step."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        self.options, self.folder = options, Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.words = Words(TASKS[options.task], AutoTokenizer.from_pretrained(options.checkpoint))
        self.model = make_model(options.checkpoint, options.arm, options.lora_rank).train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)
        self.step, self.moves, self.average, self.seconds = 0, 2, 1.0, 0.0
        self.log, self.kept = self.folder / "log.jsonl", self.folder / "resume.safetensors"
        if self.kept.exists():
            self.resume()

    def write(self, line: dict) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def train(self) -> None:
        options = self.options
        while self.step < options.max_steps:
            began, rng = time.perf_counter(), random.Random(f"{options.seed} {self.step}")
            ids, states = self.words.batch(options.batch_size, rng.randint(1, self.moves), rng)
            begin = len(self.words.beginning)
            targets = torch.full_like(ids, -100)
            targets[:, begin:] = self.words.states[states]
            loss = self.model(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.seconds += time.perf_counter() - began
            self.average = 0.9 * self.average + 0.1 * loss.item()
            if self.average < 0.1 and self.moves < options.max_moves:
                self.moves, self.average = min(self.moves + 2, options.max_moves), 0.3
            if self.step % 10 == 0:
                line = {"step": self.step, "loss": round(loss.item(), 4), "moves": self.moves}
                self.write({**line, "seconds": round(self.seconds)})
                self.keep()
            if self.moves == options.max_moves and self.average < options.stop_at:
                break

    def keep(self) -> None:
        """Writes all that `resume` needs, as a whole or not at all."""
        tensors = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{i}": value for name, value in moments.items()}
        numbers = {name: getattr(self, name) for name in ("step", "moves", "average", "seconds")}
        unfinished = self.kept.with_suffix(".unfinished")
        save_file({name: z.contiguous() for name, z in tensors.items()}, unfinished, {"numbers": json.dumps(numbers)})
        unfinished.replace(self.kept)

    def resume(self) -> None:
        with safe_open(self.kept, "pt") as file:
            vars(self).update(json.loads(file.metadata()["numbers"]))
        tensors = load_file(self.kept)
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{i}"])
            names = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {name: tensors[f"{name}.{i}"] for name in names}
        print(f"Going on from step {self.step}.", flush=True)

    def finish(self) -> dict:
        result = {
            **{name: value for name, value in vars(self.options).items() if name not in ("output_dir", "checkpoint")},
            "steps": self.step,
            "trained": sum(parameter.numel() for parameter in self.parameters),
            "seconds": round(self.seconds),
            "moves": self.moves,
            "accuracy": {str(length): accuracy(self.model, self.words, length) for length in self.options.test_moves},
        }
        self.write(result)
        if self.options.arm != "lora":
            save_state(self.model, self.folder / "state")
        return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="name or folder of a causal language model")
    parser.add_argument("--task", choices=TASKS, default="coin")
    parser.add_argument("--arm", choices=ARMS, default="state")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_moves", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--stop_at", type=float, default=0.01, help="the average loss at which training ends")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--lora_rank", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_moves", type=int, nargs="+", default=[20, 40, 100])
    parser.add_argument("--quick", action="store_true", help="the coin, up to eight moves, in under ten minutes")
    options = parser.parse_args(arguments)
    if options.quick:
        options.task, options.arm, options.max_moves, options.max_steps = "coin", "state", 8, 160
        options.test_moves = [8, 16, 32]
    if min(options.max_moves, options.max_steps, options.batch_size, options.lora_rank, *options.test_moves) < 1:
        raise SystemExit("error: numbers of moves, steps and rows, and the rank, must be at least 1.")
    return options


def main(arguments: list[str] | None = None) -> dict:
    run = Run(parse(arguments))
    run.train()
    return run.finish()


if __name__ == "__main__":
    main()
