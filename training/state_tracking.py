"""Train models on tasks that need a state, and test them on sequences far longer than those they were trained on.

    python training/state_tracking.py --tasks parity s3 --models stateful gpt --seeds 0 1 2

Takes transformers' TrainingArguments besides its own options; all models get the same. Appends a line per run to
`runs.jsonl` in the output folder, draws a picture per task and prints a table. Finished runs are not repeated: after
Ctrl-C, the same command goes on with the others.
"""

import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from errors import RunError, trying
from plot import draw_lengths, draw_scores
from records import append_record, read_records
from rich.console import Console
from rich.table import Table
from runs import LOCK, locked
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from train import (
    OF_A_STEP,
    PRESETS,
    SEEDS,
    DataArguments,
    DocumentTrainer,
    LanguageModelTrainer,
    Preset,
    TrainArguments,
    WindowTrainer,
    as_json,
    batch_size,
    check_context,
    check_options,
    check_place,
    check_trainer,
    count_parameters,
    exactly,
    matched_model,
    repeated,
    run_command,
)
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import CausalLMOutput

from modeling_stateful_gpt import GateLoopConfig
from modeling_stateful_gpt.warm_start import StateStore

# Wide enough for the table where the output is not a terminal.
console = Console(width=None if sys.stdout.isatty() else 120)

NOTHING = -100
"""The target where nothing is asked, as in transformers."""


# ---- Tasks ----


@dataclass(kw_only=True)
class Task:
    """Sequences of the tokens `0 … num_tokens - 1`, and questions whose answers are the tokens `0 … num_classes - 1`.

    Lengths are numbers of tokens. `test_lengths` are those of the published tables, `beyond` what they do not test.
    """

    num_tokens: int
    num_classes: int
    least: int = 1
    """The fewest tokens in which something is asked that has an answer."""
    train_lengths: tuple[int, int] = (3, 40)
    test_lengths: tuple[int, ...] = (40, 64, 96, 128, 192, 256)
    beyond: tuple[int, ...] = (512,)
    silence: int | None = None
    """A token whose embedding is 0 and stays so."""
    one_length_a_batch: bool = True
    """In training; else each sequence has its own, and a batch takes the time of its longest."""

    def draw(self, random: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """A sequence of `length` tokens (one less where the task has none of that length), and what is asked at each:
        the target when this token has been read, or `NOTHING`."""
        raise NotImplementedError

    def longest(self, grown: float) -> int:
        """The greatest length in training, after a share of the time in which it grows: geometrically, so that half of
        that time is spent on lengths below the geometric mean of the shortest and the longest."""
        shortest, longest = self.train_lengths
        return round(shortest * (longest / shortest) ** grown)

    def train_length(self, random: np.random.Generator, longest: int) -> int:
        """The length of a sequence of training, up to `longest`. Short ones are frequent: it is uniform from the
        shortest to a bound that is itself uniform."""
        shortest = self.train_lengths[0]
        bound = random.integers(shortest, longest + 1)
        return int(random.integers(shortest, bound + 1))

    @property
    def vocab_size(self) -> int:
        return max(self.num_tokens, self.num_classes)

    def scaled(self, accuracy: float) -> float:
        """0 at chance, 1 where all is right."""
        chance = 1 / self.num_classes
        return (accuracy - chance) / (1 - chance)


@dataclass(kw_only=True)
class FinalAnswer(Task):
    """Random tokens, a question at the last one; these are of Delétang et al., "Neural Networks and the Chomsky
    Hierarchy" (arXiv 2207.02098)."""

    answer: Callable[[list[int]], int]

    def draw(self, random, length):
        tokens = random.integers(self.num_tokens, size=length).tolist()
        return tokens, at_the_end(length, self.answer(tokens))


def at_the_end(length: int, answer: int) -> list[int]:
    return [NOTHING] * (length - 1) + [answer]


def parity(bits: list[int]) -> int:
    """Whether the number of ones is odd."""
    return sum(bits) % 2


def even_pairs(bits: list[int]) -> int:
    """Whether the number of pairs 01 and 10 is odd."""
    return sum(a != b for a, b in pairwise(bits)) % 2


def cycle_navigation(moves: list[int]) -> int:
    """The place on a circle of five after moves that stay (0), go on (1) or go back (2)."""
    return (moves.count(1) - moves.count(2)) % 5


MODULUS = 5
SYMBOLS = "01234+-*()"
"""The tokens of the arithmetic tasks."""


def tokens_of(expression: str) -> list[int]:
    return [SYMBOLS.index(symbol) for symbol in expression]


class ModularArithmetic(Task):
    """`2+3*4-1` modulo 5, products first; only odd lengths exist."""

    def draw(self, random, length):
        length -= 1 - length % 2
        numbers = random.integers(MODULUS, size=length // 2 + 1).tolist()
        operators = random.choice(list("+-*"), size=length // 2).tolist()
        terms = [numbers[0]]
        for operator, number in zip(operators, numbers[1:], strict=True):
            if operator == "*":
                terms[-1] *= number
            else:
                terms.append(number if operator == "+" else -number)
        rest = "".join(f"{operator}{number}" for operator, number in zip(operators, numbers[1:], strict=True))
        return tokens_of(f"{numbers[0]}{rest}"), at_the_end(length, sum(terms) % MODULUS)


class BracketedArithmetic(Task):
    """`((1+-4)*(3-(2)))` modulo 5. Products make 0 the most frequent value: to answer it always scores about 0.14."""

    def draw(self, random, length):
        expression, value = self.expression(random, length)
        return tokens_of(expression), at_the_end(length, value % MODULUS)

    def expression(self, random: np.random.Generator, length: int) -> tuple[str, int]:
        """One of exactly `length` symbols, and its value: two smaller ones with an operator in brackets, which takes at
        least five; shorter ones are a number, its negative, or one of these in brackets."""
        if length == 1:
            number = int(random.integers(MODULUS))
            return str(number), number
        if length == 2:
            text, value = self.expression(random, 1)
            return f"-{text}", -value
        if length < 5:
            text, value = self.expression(random, length - 2)
            return f"({text})", value
        left_length = int(random.integers(1, length - 3))
        left, a = self.expression(random, left_length)
        right, b = self.expression(random, length - 3 - left_length)
        operator = "+-*"[random.integers(3)]
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] % MODULUS
        return f"({left}{operator}{right})", value


Permutation = tuple[int, ...]


class GroupWords(Task):
    """The word problem: a token is an element of the group, and at each is asked for the product of all so far, the
    first applied first. (Barrington 1989; as a test of language models Merrill et al., arXiv 2404.08819.)"""

    def __init__(self, elements: Sequence[Permutation]):
        super().__init__(
            num_tokens=len(elements),
            num_classes=len(elements),
            train_lengths=(3, 80),
            test_lengths=(80, 128, 256),
        )
        number = {element: i for i, element in enumerate(elements)}
        self.elements = elements
        self.products = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]

    def draw(self, random, length):
        word = random.integers(self.num_tokens, size=length).tolist()
        targets = word[:1]
        for element in word[1:]:
            targets.append(self.products[targets[-1]][element])
        return word, targets


def symmetric_group(degree: int) -> list[Permutation]:
    return list(permutations(range(degree)))


def alternating_group(degree: int) -> list[Permutation]:
    """The permutations with an even number of inversions."""
    return [p for p in symmetric_group(degree) if sum(a > b for i, b in enumerate(p) for a in p[:i]) % 2 == 0]


WRITE, READ, IGNORE = 2, 3, 4


class FlipFlop(Task):
    """Instructions, each followed by a bit: write keeps the bit, ignore does not, and at read is asked for the bit that
    was last written, which then follows. The first writes, the last reads (Liu et al., arXiv 2306.00946, FFL(0.8)).

    A longer sequence than those of training has as many writes and reads as they have: with the length grow the gaps.
    """

    def draw(self, random, length):
        active = 0.2 * min(1, self.train_lengths[1] / length)
        kinds = random.choice([WRITE, READ, IGNORE], p=[active / 2, active / 2, 1 - active], size=length // 2)
        kinds[0], kinds[-1] = WRITE, READ
        tokens, targets, memory = [], [], 0
        for kind, bit in zip(kinds.tolist(), random.integers(2, size=len(kinds)).tolist(), strict=True):
            if kind == WRITE:
                memory = bit
            tokens += [kind, memory if kind == READ else bit]
            targets += [memory if kind == READ else NOTHING, NOTHING]
        return tokens, targets


@dataclass(kw_only=True)
class Recall(Task):
    """The first token, asked for by the last, after noise of all the kinds of tokens that are left, and silence (the
    copying problem of Hochreiter and Schmidhuber 1997, and Arjovsky et al. 2016, arXiv 1511.06464, with one symbol).

    Longer sequences have more noise: through much of it gradients get lost until the model keeps it out, which it can
    learn from little.
    """

    noise: int
    """How many tokens of it are in the longest sequences of training, and in longer ones; below, it goes with the
    square of the length."""

    def draw(self, random, length):
        symbol, question = int(random.integers(self.num_classes)), self.num_tokens - 1
        amount = int(self.noise * min(1, length / self.train_lengths[1]) ** 2)
        noise = random.integers(self.silence + 1, question, size=amount).tolist()
        tokens = [symbol, *noise, *[self.silence] * (length - amount - 2), question]
        return tokens, at_the_end(length, symbol)

    def train_length(self, random, longest):
        """Uniform: short ones would save no time, a batch takes that of its longest."""
        return int(random.integers(self.train_lengths[0], longest + 1))


TASKS: dict[str, Task] = {
    "parity": FinalAnswer(num_tokens=2, num_classes=2, answer=parity, beyond=(512, 2048)),
    "even_pairs": FinalAnswer(num_tokens=2, num_classes=2, answer=even_pairs),
    "cycle_navigation": FinalAnswer(num_tokens=3, num_classes=5, answer=cycle_navigation),
    "modular_arithmetic": ModularArithmetic(num_tokens=len(SYMBOLS), num_classes=MODULUS),
    "modular_arithmetic_brackets": BracketedArithmetic(num_tokens=len(SYMBOLS), num_classes=MODULUS),
    "s3": GroupWords(symmetric_group(3)),
    "a5": GroupWords(alternating_group(5)),
    "s5": GroupWords(symmetric_group(5)),
    "flip_flop": FlipFlop(
        num_tokens=5, num_classes=2, least=4, train_lengths=(4, 128), test_lengths=(128, 512), beyond=()
    ),
    "recall": Recall(
        num_tokens=256,
        num_classes=8,
        silence=8,
        least=2,
        # Longer than a piece of the default size, so that what is asked for is never in that of the question.
        train_lengths=(1_100, 10_001),
        noise=1_000,
        test_lengths=(10_001,),
        beyond=(),
        # It gets few steps, which would jump between short and long.
        one_length_a_batch=False,
    ),
}


def example(task: Task, random: np.random.Generator, length: int) -> dict[str, list[int]]:
    """A sequence with one more token at its end: transformers compares `labels[t + 1]` with what the model says when it
    has read `input_ids[t]`."""
    tokens, targets = task.draw(random, length)
    return {"input_ids": [*tokens, 0], "labels": [NOTHING, *targets]}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Shorter sequences are filled up at their end, where a causal model cannot see it and nothing is asked."""
    batch = {name: torch.tensor([e[name] for e in examples]) for name in ("start", "epoch") if name in examples[0]}
    for name, filling in (("input_ids", 0), ("labels", NOTHING)):
        batch[name] = pad_sequence([torch.tensor(e[name]) for e in examples], True, filling)
    return batch


class FreshSequences(Dataset):
    """New sequences all the time. The longest length grows to that of the task over the first `curriculum` (a share)
    of the training. `batch` sequences after one another have the same length."""

    def __init__(self, task: Task, size: int, seed: int, curriculum: float, batch: int = 1):
        self.task, self.size, self.seed, self.curriculum, self.batch = task, size, seed, curriculum, batch

    def __len__(self) -> int:
        return self.size

    def longest(self, progress: float) -> int:
        """After a share of the training."""
        return self.task.longest(min(1.0, progress / max(self.curriculum, 1e-9)))

    def __getitem__(self, index: int) -> dict:
        first = index - index % self.batch
        return self.draw(index, self.longest(first / self.size))

    def draw(self, index: int, longest: int) -> dict:
        random = np.random.default_rng([self.seed, index])
        # 1, because a seed that ends in zeros is the same without them.
        of_batch = np.random.default_rng([self.seed, index // self.batch, 1]) if self.batch > 1 else random
        return example(self.task, random, self.task.train_length(of_batch, longest))


class RevisitedSequences(FreshSequences):
    """The same sequences in every epoch, so that each token can start from its state of the epoch before. All are there
    from the beginning, for their states to settle, but nothing is asked of those that are still too long.

    A sequence's states stand at `start` in a `StateStore` of `num_tokens`.
    """

    def __init__(self, task: Task, size: int, seed: int, curriculum: float, epochs: int):
        super().__init__(task, size, seed, curriculum)
        self.epochs, self.room = epochs, task.train_lengths[1] + 1
        self.num_tokens = size * self.room
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        item = self.draw(index, self.task.train_lengths[1])
        # From the beginning a few lengths, so that there is hardly ever a batch in which nothing is asked.
        longest = max(self.longest(self.epoch / self.epochs), self.task.train_lengths[0] + 2)
        if len(item["input_ids"]) - 1 > longest:
            item["labels"] = [NOTHING] * len(item["labels"])
        return {**item, "start": index * self.room, "epoch": self.epoch}


# ---- Models ----

NO_POSITIONS = {"position_embedding_type": "none"}
SEQUENTIAL = {**PRESETS["stateful"].stateful, "training_solver": "sequential"}

MODELS: dict[str, Preset | None] = {
    "gpt": PRESETS["gpt"],
    "gpt_nope": Preset(NO_POSITIONS),
    **{name: PRESETS[name] for name in ("gateloop", "gateloop_signed", "gateloop_positive", "hybrid")},
    **{name: PRESETS[name] for name in ("reversible", "reversible_forgetting")},
    "token_shift": replace(PRESETS["token_shift"], decoder=NO_POSITIONS),
    "stateful": Preset(NO_POSITIONS, {**PRESETS["stateful"].stateful, "num_groups": 16}),
    # However long the sequence is, 17 runs of the model one after another: the plain pass, and one over 16 groups.
    "stateful_two_passes": Preset(
        NO_POSITIONS, {**PRESETS["stateful"].stateful, "num_groups": 16, "num_no_grad_passes": 1}
    ),
    "stateful_sequential": Preset(NO_POSITIONS, SEQUENTIAL),
    # The noise teaches it to mend small errors, which in sequences longer than those of training would add up.
    "stateful_sequential_noise": Preset(NO_POSITIONS, {**SEQUENTIAL, "feedback_noise": 0.1}),
    # What a GateLoop layer holds of the past fades, so a longer one is nothing new to it.
    "stateful_gateloop": Preset({"layer_types": ["gateloop"]}, {**SEQUENTIAL, "feedback_noise": 0.05}),
    # Through one pass no gradient reaches the state before: a state learns only to answer what is asked at its own
    # token. From three bits on, not every seed learns parity so; two and three passes help, not surely.
    "warm_start": Preset(NO_POSITIONS, {**PRESETS["warm_start"].stateful, "pass_probabilities": [0.4, 0.4, 0.2]}, True),
    # From one bit on, it is enough.
    "warm_start_one_pass": replace(PRESETS["warm_start"], decoder=NO_POSITIONS),
    "lstm": None,
}
"""None for the one that is no model of ours."""


class LSTMConfig(PreTrainedConfig):
    model_type = "lstm"


class LSTMForCausalLM(PreTrainedModel):
    """Embedding, `torch.nn.LSTM`, and the embedding again as the head."""

    config_class = LSTMConfig

    def __init__(self, vocab_size: int, width: int, layers: int):
        super().__init__(LSTMConfig())
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> CausalLMOutput:
        logits = self.head(self.lstm(self.embedding(input_ids))[0])
        loss = None if labels is None else self.loss_function(logits, labels, self.embedding.num_embeddings, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


def preset_of(name: str, task: Task) -> Preset | None:
    preset = MODELS[name]
    if name != "stateful":
        return preset
    # A cyclic pass carries a state over as many positions as it has groups, the plain first one over none.
    passes = math.ceil(task.train_lengths[1] / preset.stateful["num_groups"])
    return replace(preset, stateful={**preset.stateful, "num_no_grad_passes": passes})


def build_model(name: str, task: Task, arguments: "StateTrackingArguments", seed: int) -> PreTrainedModel:
    """All with about as many parameters as `gpt` of the given width and layers."""
    layers, preset = arguments.num_hidden_layers, preset_of(name, task) or Preset()
    decoder = dict(preset.decoder)
    if pattern := decoder.get("layer_types"):
        decoder["layer_types"] = repeated(pattern, layers)
    config = GateLoopConfig(
        vocab_size=task.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=arguments.num_attention_heads,
        max_position_embeddings=max(*task.train_lengths, *lengths_of(task, arguments)) + 1,
        pad_token_id=task.silence,
        # What the head learns would be in the embedding.
        tie_word_embeddings=task.silence is None,
        **decoder,
    )
    set_seed(seed)
    model = matched_model(config, preset.stateful)
    if MODELS[name] is not None:
        return model
    # The embedding, and 8 (D² + D) numbers a layer.
    parameters, sizes = count_parameters(model), range(1, 4 * arguments.hidden_size)
    width = min(sizes, key=lambda d: abs(task.vocab_size * d + 8 * layers * (d * d + d) - parameters))
    return LSTMForCausalLM(task.vocab_size, width, layers)


# ---- Training and testing ----


@dataclass
class StateTrackingArguments:
    tasks: list[str] = field(default_factory=lambda: ["parity"], metadata={"help": f"Of {', '.join(TASKS)}."})
    models: list[str] = field(
        default_factory=lambda: ["stateful", "gpt"], metadata={"help": f"Of {', '.join(MODELS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [0])
    hidden_size: int = 64
    num_hidden_layers: int = 1
    num_attention_heads: int = 4
    shortest_length: int | None = field(
        default=None, metadata={"help": "Of training, instead of that of the task; --curriculum starts there."}
    )
    curriculum: float = field(
        default=0.8, metadata={"help": "Share of the training during which the longest sequences become longer."}
    )
    warm_start_epochs: int = field(
        default=100, metadata={"help": "How often a warm start visits its sequences; the others never see one twice."}
    )
    context: str = field(
        default="blocks",
        metadata={
            "help": "How gradients get through a sequence: all at once (blocks), or in pieces of --chunk_size tokens, "
            "through all of them (unbounded) or within each (truncated)."
        },
    )
    chunk_size: int = 1000
    test_sequences: int = field(default=256, metadata={"help": "Sequences for each test length."})
    test_lengths: list[int] | None = field(default=None, metadata={"help": "Instead of those of the task."})


@dataclass
class StateTrackingTraining(TrainArguments):
    learning_rate: float = 3e-3
    max_steps: int = 1000
    per_device_train_batch_size: int = 64
    weight_decay: float = 0.0
    eval_strategy: str = "no"
    eval_on_start: bool = False
    save_strategy: str = "no"
    logging_steps: float = 100
    output_dir: str = "runs/state_tracking"

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"--max_steps is {self.max_steps}; it must be at least 1.")
        if self.max_seconds is not None or self.patience is not None or self.num_train_epochs > 0:
            raise ValueError("Every run takes --max_steps; leave out --max_seconds, --patience and --num_train_epochs.")
        if self.seed != TrainArguments.seed or self.data_seed is not None:
            raise ValueError("The seeds are those of --seeds; leave out --seed and --data_seed.")
        if self.eval_strategy != "no" or self.save_strategy != "no":
            raise ValueError(
                "A run is tested at its end and leaves its record; leave out --eval_strategy and --save_strategy."
            )
        super().__post_init__()


def task_of(name: str, arguments: StateTrackingArguments) -> Task:
    """With the lengths that are asked for."""
    # Not `replace`, because `GroupWords` has an `__init__` of its own.
    task = copy.copy(TASKS[name])
    if arguments.shortest_length is not None:
        task.train_lengths = (arguments.shortest_length, task.train_lengths[1])
    return task


def lengths_of(task: Task, arguments: StateTrackingArguments) -> list[int]:
    return arguments.test_lengths or [*task.test_lengths, *task.beyond]


def make_trainer(
    task_name: str,
    model_name: str,
    seed: int,
    arguments: StateTrackingArguments,
    training: StateTrackingTraining,
    folder: str,
) -> LanguageModelTrainer:
    task = task_of(task_name, arguments)
    model = build_model(model_name, task, arguments, seed)
    batch = batch_size(training)
    run = copy.copy(training)
    run.seed, run.output_dir = seed, folder
    preset = MODELS[model_name]
    if preset is not None and preset.warm_start:
        steps = math.ceil(training.max_steps / arguments.warm_start_epochs)
        epochs = math.ceil(training.max_steps / steps)
        revisited = RevisitedSequences(task, steps * batch, seed, arguments.curriculum, epochs)
        store = StateStore(Path(folder, "states"), revisited.num_tokens, arguments.hidden_size)
        return WindowTrainer(model, run, collate, revisited, state_store=store)
    run.train_sampling_strategy = "sequential"
    of_one_length = batch if task.one_length_a_batch else 1
    fresh = FreshSequences(task, training.max_steps * batch, seed, arguments.curriculum, of_one_length)
    if arguments.context == "blocks":
        return LanguageModelTrainer(model, run, collate, fresh)
    return DocumentTrainer(model, run, collate, fresh, context=arguments.context, chunk_size=arguments.chunk_size)


def train_and_test(
    task_name: str, model_name: str, seed: int, arguments: StateTrackingArguments, training: StateTrackingTraining
) -> dict:
    """A run: the record of what was done and what came out."""
    started, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task_name, model_name, seed, arguments, training, folder)
        trainer.train()
    task, model = task_of(task_name, arguments), trainer.model
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    results = {length: test(model, task, length, arguments.test_sequences) for length in lengths_of(task, arguments)}
    return {
        "parameters": count_parameters(model),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "test_seconds": round(time.perf_counter() - started - seconds),
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "results": results,
    }


@torch.no_grad()
def test(model: PreTrainedModel, task: Task, length: int, number: int) -> dict:
    """On the same `number` sequences of one length for every model; what has feedback is evaluated exactly."""
    model.eval()
    answers = wrong = sequences_with_an_error = 0
    batch_size = max(1, 2**17 // length)
    for first in tqdm(range(0, number, batch_size), desc=f"length {length}", leave=False, disable=None):
        numbers = range(first, min(first + batch_size, number))
        batch = collate([example(task, np.random.default_rng([2**32, length, i]), length) for i in numbers])
        ids, targets = batch["input_ids"][:, :-1].to(model.device), batch["labels"][:, 1:].to(model.device)
        asked = targets != NOTHING
        errors = (model(input_ids=ids, use_cache=False, **exactly(model)).logits.argmax(-1) != targets) & asked
        answers += int(asked.sum())
        wrong += int(errors.sum())
        sequences_with_an_error += int(errors.any(1).sum())
    accuracy = 1 - wrong / answers
    return {
        "accuracy": accuracy,
        "scaled": task.scaled(accuracy),
        "answers": answers,
        "wrong": wrong,
        "sequences_with_an_error": sequences_with_an_error,
    }


def settings_of(
    task: str, model: str, arguments: StateTrackingArguments, training: StateTrackingTraining
) -> dict[str, Any]:
    """What decides the result of a run, besides the names and the seed."""
    settings = as_json({name: getattr(training, name) for name in OF_A_STEP})
    settings["train_batch_size"] = batch_size(training)
    settings |= {k: v for k, v in asdict(arguments).items() if k not in ("tasks", "models", "seeds")}
    # At the beginning, half-way and at the end of the time in which it grows.
    chosen = task_of(task, arguments)
    settings["longest_in_training"] = [chosen.longest(grown) for grown in (0, 0.5, 1)]
    preset = preset_of(model, chosen)
    revisits = preset is not None and preset.warm_start
    settings["one_length_a_batch"] = chosen.one_length_a_batch and not revisits
    settings["preset"] = None if preset is None else asdict(preset)
    return json.loads(json.dumps(settings, default=str))


def check(arguments: StateTrackingArguments, training: StateTrackingTraining) -> None:
    """Says before the first run what is wrong with the last.

    Raises:
        RunError: an unknown task or model, one named twice, or what cannot be trained or tested.
    """
    for kind, names, table in (("task", arguments.tasks, TASKS), ("model", arguments.models, MODELS)):
        for name in names:
            if name not in table:
                raise RunError(f"There is no {kind} {name!r}; choose from {', '.join(table)}.")
    for option in ("tasks", "models", "seeds", "test_lengths"):
        values = getattr(arguments, option) or []
        if len(set(values)) < len(values):
            raise RunError(f"--{option} names something twice.")
    counts = {"test_sequences": arguments.test_sequences, "warm_start_epochs": arguments.warm_start_epochs}
    for name, count in counts.items():
        if count < 1:
            raise RunError(f"--{name} must be at least 1.")
    if not 0 <= arguments.curriculum <= 1:
        raise RunError(f"--curriculum is {arguments.curriculum}; it must lie between 0 and 1.")
    if any(seed not in SEEDS for seed in arguments.seeds):
        raise RunError(f"--seeds must lie between 0 and {SEEDS[-1]}.")
    check_place(Path(training.output_dir))
    check_options(training)
    for name in arguments.tasks:
        task = task_of(name, arguments)
        shortest, longest = task.train_lengths
        if not task.least <= shortest <= longest:
            raise RunError(f"--shortest_length of {name} must lie between {task.least} and {longest}.")
        if any(length < task.least for length in lengths_of(task, arguments)):
            raise RunError(f"--test_lengths of {name} must be at least {task.least}.")
    for name in arguments.models:
        preset = MODELS[name]
        warm = preset is not None and preset.warm_start
        if any(TASKS[task].silence is not None for task in arguments.tasks) and (warm or preset is None):
            raise RunError(f"recall is for models of ours that never see a sequence twice; leave out {name}.")
        with trying(), torch.device("meta"):
            model = build_model(name, TASKS[arguments.tasks[0]], arguments, seed=0)
        data = DataArguments(context=arguments.context, chunk_size=arguments.chunk_size)
        check_context(model, warm, data, training)
        with trying(), tempfile.TemporaryDirectory() as folder:
            check_trainer(make_trainer(arguments.tasks[0], name, 0, arguments, training, folder))


def run_all(arguments: StateTrackingArguments, training: StateTrackingTraining) -> list[dict]:
    """The records of all runs, of which those in the output folder are not done again.

    Raises:
        RunError: what cannot be trained or tested, a run in the folder that was made with other settings, or a folder
            that another command holds.
    """
    check(arguments, training)
    folder = Path(training.output_dir)
    with locked(folder):
        runs = run_in(folder, arguments, training)
        (folder / LOCK).unlink(missing_ok=True)
    return runs


def run_in(folder: Path, arguments: StateTrackingArguments, training: StateTrackingTraining) -> list[dict]:
    file = folder / "runs.jsonl"
    before = read_records(file)
    runs = []
    for task in arguments.tasks:
        for model in arguments.models:
            for seed in arguments.seeds:
                settings = settings_of(task, model, arguments, training)
                run: dict[str, Any] = {"task": task, "model": model, "seed": seed, "settings": settings}
                done = next((r for r in before if all(r[k] == run[k] for k in ("task", "model", "seed"))), run)
                then = done["settings"]
                if then["preset"] is not None:  # A run made before a field was there did what is its default now.
                    then = {**then, "preset": {**asdict(Preset()), **then["preset"]}}
                changed = [f"{k}: {then.get(k)!r} then" for k in settings if then.get(k) != settings[k]]
                if changed:
                    raise RunError(
                        f"{file} has {task}, {model}, seed {seed} with other settings ({', '.join(changed)}). Use the "
                        f"same settings, or another --output_dir."
                    )
                runs.append(done)
    for number, run in enumerate(runs, start=1):
        if "results" in run:
            continue
        console.rule(f"{run['task']}, {run['model']}, seed {run['seed']} ({number} of {len(runs)})")
        run |= train_and_test(run["task"], run["model"], run["seed"], arguments, training)
        append_record(file, run)
        accuracies = ", ".join(f"{length}: {result['scaled']:.3f}" for length, result in run["results"].items())
        console.print(f"{run['cpu_seconds']} s of CPU time. Scaled accuracy at length {accuracies}")
    # As they will be read.
    return json.loads(json.dumps(runs))


def tested_lengths(task: str, run: dict) -> list[str]:
    """Those of the published tables, or all where none of them was tested."""
    return [n for n in run["results"] if int(n) not in TASKS[task].beyond] or list(run["results"])


def score(run: dict) -> float:
    """Scaled accuracy, the mean over the lengths."""
    return mean(run["results"][n]["scaled"] for n in tested_lengths(run["task"], run))


def show_table(task: str, runs: list[dict]) -> None:
    """A row for each model; the tests are those of the published tables, and the longest sequences beyond them."""
    lengths = tested_lengths(task, runs[0])
    longest = max(runs[0]["results"], key=int)
    title = f"{task}: scaled accuracy, mean over the lengths {', '.join(lengths)}; and at {longest}"
    columns = ("model", "parameters", "CPU seconds", "worst seed", "mean", "wrong answers", f"{longest}, worst seed")
    table = Table(*columns, title=title)
    for model in dict.fromkeys(run["model"] for run in runs):
        seeds = [run for run in runs if run["model"] == model]
        scores = [score(run) for run in seeds]
        wrong, answers = (sum(run["results"][n][k] for run in seeds for n in lengths) for k in ("wrong", "answers"))
        table.add_row(
            model,
            f"{seeds[0]['parameters']:,}",
            f"{mean(run['cpu_seconds'] for run in seeds):.0f}",
            f"{min(scores):.3f}",
            f"{mean(scores):.3f}",
            f"{wrong:,} of {answers:,}",
            f"{min(run['results'][longest]['scaled'] for run in seeds):.3f}",
        )
    console.print(table)


def scores_of(runs: list[dict]) -> dict[str, dict[str, float]]:
    """The worst seed's score of each model in each task."""
    scores: dict[str, dict[str, float]] = {}
    for run in runs:
        of_model = scores.setdefault(run["model"], {})
        of_model[run["task"]] = min(score(run), of_model.get(run["task"], math.inf))
    return scores


def show_overview(scores: dict[str, dict[str, float]]) -> None:
    """A row for each model, a column for each task."""
    tasks = next(iter(scores.values()))
    table = Table("model", *tasks, title="scaled accuracy, mean over the lengths, worst seed")
    for model, of_model in scores.items():
        table.add_row(model, *(f"{of_model[task]:.2f}" for task in tasks))
    console.print(table)


def main() -> None:
    types = (StateTrackingArguments, StateTrackingTraining)
    parser = HfArgumentParser(types, description=__doc__, allow_abbrev=False)
    with trying():
        arguments, training = parser.parse_args_into_dataclasses()
    try:
        runs = run_all(arguments, training)
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished runs are kept; run the same command again to go on with the others.")
    for task in arguments.tasks:
        done = [run for run in runs if run["task"] == task]
        show_table(task, done)
        models = {model: [run for run in done if run["model"] == model] for model in arguments.models}
        picture = Path(training.output_dir, f"{task}.png")
        draw_lengths(models, TASKS[task].train_lengths[1], picture)
        console.print(f"Accuracy against length: {picture}")
    if len(arguments.tasks) > 1:
        scores = scores_of(runs)
        show_overview(scores)
        picture = Path(training.output_dir, "overview.png")
        draw_scores(scores, picture)
        console.print(f"All tasks and models: {picture}")


if __name__ == "__main__":
    run_command(main)
