"""Warm-started training: every token keeps its last hidden state from one epoch to the next, as the first guess of the
passes. A training step is then one pass, at little more than the price of a plain one, and the recurrence that the
model is trained on grows one token deeper with every epoch. In the first, where there are no states, it is plain.

`train.py --preset warm_start` uses it. For a Trainer of your own:

    class WarmTrainer(WarmStart, Trainer): ...

    windows = Windows(tokens, block_size=256, seed=0)
    store = StateStore("states", num_tokens=windows.num_tokens, width=model.config.hidden_size)
    arguments = TrainingArguments(..., remove_unused_columns=False)
    WarmTrainer(model, arguments, data_collator=collate, train_dataset=windows, state_store=store).train()
"""

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerState


class Windows(Dataset):
    """A text as a circle of tokens, cut into windows of `block_size`; each epoch visits every token once.

    With `random_offsets`, each epoch cuts elsewhere, at a place that follows from `seed` and the epoch. The tokens that
    do not fill a window are left out for good.

    An item is `input_ids`, the place `start` of its first token in the text, and the `epoch`.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int = 0, random_offsets: bool = True):
        if len(tokens) < block_size:
            raise ValueError(f"The text has {len(tokens)} tokens, less than one window of {block_size}.")
        self.num_tokens = len(tokens) // block_size * block_size
        self.tokens, self.block_size = tokens[: self.num_tokens], block_size
        self.seed, self.random_offsets = seed, random_offsets
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        random = np.random.default_rng([self.seed, epoch])
        self.offset = int(random.integers(self.num_tokens)) if self.random_offsets else 0

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def __getitem__(self, index: int) -> dict:
        start = (self.offset + index * self.block_size) % self.num_tokens
        places = (start + np.arange(self.block_size)) % self.num_tokens
        return {"input_ids": self.tokens[places], "start": start, "epoch": self.epoch}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks of equal length, every token of which counts."""
    batch = {name: torch.tensor(np.array([example[name] for example in examples])) for name in examples[0]}
    return {**batch, "labels": batch["input_ids"].clone()}


class StatesMissing(FileNotFoundError):
    """States that the run goes on from are gone or damaged; the message says what to do."""


class StateStore:
    """The last hidden state of every token of a text, in bf16: a memory-mapped file for each epoch in `folder`.

    An epoch reads the file of the one before and writes its own. So a run that is killed and resumed in the middle of
    an epoch reads what it read before, and processes of one machine that share the folder never read what another is
    writing. A checkpoint keeps a checksum of the states of each window that was written until then.

    Raises:
        OSError: if the disk has no room for `epochs` files, or the folder has states of another text or width.
    """

    def __init__(self, folder: str | Path, num_tokens: int, width: int, epochs: int = 2):
        self.folder, self.shape = Path(folder), (num_tokens, width)
        self.files: dict[int, np.memmap] = {}
        self.checksums: dict[int, dict[tuple[int, int], int]] = {}
        present = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.bf16"))
        needed, free = epochs * self.size - present, shutil.disk_usage(above(self.folder)).free
        if needed > free:
            raise OSError(
                f"The states of {num_tokens:,} tokens, {width} wide, take {epochs} times {self.size / 1e9:,.2f} GB; "
                f"{free / 1e9:,.2f} GB are left for {self.folder}. Use less text, a narrower model or another disk."
            )

    @property
    def size(self) -> int:
        """Bytes of a file."""
        return 2 * self.shape[0] * self.shape[1]

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}.bf16"

    def read(self, epoch: int, start: torch.Tensor, length: int) -> torch.Tensor | None:
        """The states `[B, length, D]` that the `length` tokens from each place in `start` `[B]` on had in the epoch
        before; None in the first. Zeros where a token was not visited.

        Raises:
            StatesMissing: if the file of the epoch before is gone or damaged.
        """
        if epoch == 0:
            return None
        if epoch - 1 not in self.files:
            self.check_file(epoch - 1)
        return self.file(epoch - 1)[self.places(start, length)]

    def write(self, epoch: int, start: torch.Tensor, states: torch.Tensor) -> None:
        """Keeps the states `[B, T, D]` of the T tokens from each place in `start` `[B]` on."""
        states = states.detach().to("cpu", torch.bfloat16)
        length = states.shape[1]
        self.file(epoch)[self.places(start, length)] = states
        written = self.checksums.setdefault(epoch, {})
        written |= {(place, length): checksum(rows) for place, rows in zip(start.tolist(), states, strict=True)}

    def check_file(self, epoch: int) -> None:
        path = self.path(epoch)
        if not path.exists() or path.stat().st_size != self.size:
            raise StatesMissing(lost_states(path, "damaged" if path.exists() else "missing"))

    def save_checksums(self, file: Path, epochs: set[int]) -> None:
        """Writes to `file` the checksums of the states that this process has written in these epochs; the states are on
        the disk then."""
        for written in self.files.values():
            written.flush()
        tables = {
            str(epoch): torch.tensor([(*window, digest) for window, digest in written.items()])
            for epoch, written in self.checksums.items()
            if epoch in epochs
        }
        save_file(tables, file)

    def check(self, files: list[Path]) -> None:
        """Compares the states with the checksums in `files`, and goes on from those.

        Raises:
            StatesMissing: if states are gone or damaged.
        """
        for file in files:
            try:
                tables = load_file(file)
            except (SafetensorError, OSError) as error:
                raise StatesMissing(
                    f"{file}, the checksums of states, is damaged: go on from another checkpoint."
                ) from error
            for epoch, rows in ((int(name), table.tolist()) for name, table in tables.items()):
                self.check_file(epoch)
                for start, length, expected in tqdm(rows, desc=f"Checking the states of epoch {epoch}", delay=5):
                    if checksum(self.file(epoch)[self.places(torch.tensor([start]), length)[0]]) != expected:
                        raise StatesMissing(lost_states(self.path(epoch), "damaged"))
                    self.checksums.setdefault(epoch, {})[start, length] = expected

    def places(self, start: torch.Tensor, length: int) -> torch.Tensor:
        return (start.cpu()[:, None] + torch.arange(length)) % self.shape[0]

    def file(self, epoch: int) -> torch.Tensor:
        """The file of an epoch as a tensor `[N, D]`; made, full of zeros, if it does not exist."""
        if epoch not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path(epoch), os.O_RDWR | os.O_CREAT)
            if os.fstat(descriptor).st_size not in (0, self.size):
                os.close(descriptor)
                raise OSError(f"{self.path(epoch)} has states of another text or width; use another folder.")
            try:
                # Another process may have made it: then this changes nothing.
                if hasattr(os, "posix_fallocate"):  # Not on macOS.
                    # A sparse file would end the process that writes to it where the disk is full.
                    os.posix_fallocate(descriptor, 0, self.size)
                else:
                    os.ftruncate(descriptor, self.size)
            finally:
                os.close(descriptor)
            self.files[epoch] = np.memmap(self.path(epoch), dtype=np.uint16, mode="r+", shape=self.shape)
        return torch.from_numpy(self.files[epoch]).view(torch.bfloat16)

    def forget(self, epochs: set[int]) -> None:
        """Lets go of all other epochs."""
        for held in (self.files, self.checksums):
            for number in held.keys() - epochs:
                del held[number]

    def keep(self, epochs: set[int]) -> None:
        """Deletes the files of all other epochs."""
        self.forget(epochs)
        for path in self.folder.glob("epoch-*.bf16"):
            if int(path.stem.removeprefix("epoch-")) not in epochs:
                path.unlink(missing_ok=True)


def above(folder: Path) -> Path:
    """The folder itself or, if it does not exist yet, the nearest one in which it will be."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def checksum(states: torch.Tensor) -> int:
    """Of states `[T, D]` in bf16."""
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)


def lost_states(path: Path, what: str) -> str:
    return (
        f"{path} is {what}, and training cannot go on without the states that it holds. Put it back, or start anew in "
        f"another output folder."
    )


class WarmStart:
    """Mixed into a Trainer: it reads a batch's states before the step and writes them after it.

    Args:
        state_store: None to only cut the text anew in each epoch, for models that read no states.
    """

    def __init__(self, *args, state_store: StateStore | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.state_store = state_store
        arguments = self.args  # type: ignore[attr-defined]
        if arguments.dataloader_persistent_workers:
            raise ValueError(
                "Persistent workers keep the text as it was cut at first, and each epoch cuts it anew. Leave out "
                "dataloader_persistent_workers."
            )
        if state_store is not None and arguments.world_size > 1 and not arguments.dataloader_drop_last:
            raise ValueError(
                "Several processes need dataloader_drop_last=True: filled up to whole batches for each of them, tokens "
                "would be visited twice in an epoch."
            )
        self.add_callback(NextEpoch(self.train_dataset, state_store))  # type: ignore[attr-defined]

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, **kwargs):
        start, epoch = inputs.pop("start", None), inputs.pop("epoch", None)
        if start is None or self.state_store is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        ids, epoch = inputs["input_ids"], int(epoch[0])
        states = self.state_store.read(epoch, start, ids.shape[1])
        inputs["initial_states"] = None if states is None else states.to(ids.device)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        self.state_store.write(epoch, start, outputs.states)
        return (loss, outputs) if return_outputs else loss

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.state_store is not None:
            file = Path(output_dir, f"states_{PartialState().process_index}.safetensors")
            self.state_store.save_checksums(file, epochs_of(self.state))  # type: ignore[attr-defined]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if self.state_store is not None and checkpoint is not None:
            process = PartialState()
            files = sorted(Path(checkpoint).glob("states_*.safetensors"))
            if not files:
                raise StatesMissing(
                    f"{checkpoint} has no checksums of states (states_*.safetensors): go on from another checkpoint."
                )
            self.state_store.check(files[process.process_index :: process.num_processes])


@torch.no_grad()
def losses_from_states(
    model: PreTrainedModel, windows: Windows, store: StateStore, epochs: int, batch: int = 64
) -> dict:
    """Whether the model that was trained is the one that is decoded: the loss in nats of the first `batch` windows of
    the epoch that comes after `epochs`.

    Returns:
        `from_states`: in one pass from the states that the last of those epochs left, under dropout and by a model that
        was still learning. `from_states_computed_anew`: in one pass from those that a first such pass gives, without
        dropout and by the finished model. `stepped`: as the model decodes.
    """
    windows.set_epoch(epochs)
    inputs = collate([windows[i] for i in range(min(batch, len(windows)))])
    states = store.read(epochs, inputs.pop("start"), windows.block_size)
    del inputs["epoch"]
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    model.eval()
    kept = model(**inputs, initial_states=states.to(model.device), num_passes=1, use_cache=False)
    anew = model(**inputs, initial_states=kept.states, num_passes=1, use_cache=False)
    stepped = model(**inputs, solver="sequential", use_cache=False)
    return {
        "from_states": kept.loss.item(),
        "from_states_computed_anew": anew.loss.item(),
        "stepped": stepped.loss.item(),
    }


class NextEpoch(TrainerCallback):
    """Cuts the text for the epoch that begins, and deletes states that no checkpoint needs any more."""

    def __init__(self, windows: Windows, store: StateStore | None):
        self.windows, self.store = windows, store

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        if self.store is not None and state.global_step == 0:
            with PartialState().main_process_first():
                self.store.keep(set())  # Of a run that came to nothing.

    def on_epoch_begin(self, args, state: TrainerState, control, **kwargs):
        epoch = int(state.epoch or 0)
        self.windows.set_epoch(epoch)
        if self.store is None:
            return
        processes = PartialState()
        processes.wait_for_everyone()  # What another process has written is read from now on.
        self.store.forget(epochs_of(state))
        if processes.is_main_process:
            saved = filter(None, map(saved_state, Path(args.output_dir).glob("checkpoint-*")))
            self.store.keep(set().union(*map(epochs_of, [state, *saved])))


def epochs_of(state: TrainerState) -> set[int]:
    """Whose states a run goes on from: it reads those of the epoch before, and has written some of this one."""
    epoch = int(state.epoch or 0)
    return {epoch - 1, epoch}


def saved_state(checkpoint: str | Path) -> TrainerState | None:
    """That of a checkpoint; None if it was not written to its end, before a run was killed perhaps."""
    try:
        return TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))  # Trainer writes it last.
    except (OSError, ValueError):
        return None
