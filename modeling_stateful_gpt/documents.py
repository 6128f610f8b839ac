"""Documents of any length as a dataset, and what reads each whole in training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from .progress import DeleteProgress, Progress
from .unbounded import CONTEXTS, check_recurrent


class Documents(Dataset):
    """The tokens of whole documents, each closed by the end token, in a file that is memory-mapped.

    A document is tokenised in parts of about `PART` characters, cut after a line.

    An item is the `input_ids` of a document.
    """

    PART = 1_000_000

    def __init__(self, path: str | Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, write: bool = True):
        """`write`: False if another process has written the files."""
        path, ends_path = Path(path), Path(f"{path}.ends.npy")
        if write:
            ends = [0]
            with path.open("wb") as file:
                for text in texts:
                    for number, part in enumerate(self.parts(text)):
                        ids = tokenizer(part, add_special_tokens=number == 0)["input_ids"]
                        np.asarray(ids, dtype=np.int32).tofile(file)
                    np.array([tokenizer.eos_token_id], dtype=np.int32).tofile(file)
                    ends.append(file.tell() // 4)
            np.save(ends_path, ends)
        self.tokens, self.ends = np.memmap(path, dtype=np.int32, mode="r"), np.load(ends_path)

    def parts(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            end = text.find("\n", start + self.PART) + 1 or len(text)
            yield text[start:end]
            start = end

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.tokens[self.ends[index] : self.ends[index + 1]]}


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Documents of different lengths, right-padded; what is padding, the mask says."""
    ids = [torch.from_numpy(np.array(example["input_ids"], dtype=np.int64)) for example in examples]
    together = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(document) for document in ids])
    real = torch.arange(together.shape[1]) < lengths[:, None]
    batch = {"input_ids": together, "labels": together.masked_fill(~real, -100)}
    return batch if real.all() else {**batch, "attention_mask": real.long()}


def check_arguments(arguments: TrainingArguments) -> None:
    """Raises a ValueError for what steps over whole documents do not do."""
    if arguments.fp16 or arguments.n_gpu > 1:
        raise ValueError(
            "Whole documents are not trained on with fp16 or several GPUs a process; use fp32 or bf16, and DDP."
        )
    other_loss = arguments.label_smoothing_factor or not arguments.average_tokens_across_devices
    if other_loss or arguments.gradient_checkpointing:
        raise ValueError(
            "Whole documents are trained on with the mean loss over all tokens: leave out label_smoothing_factor, "
            "gradient_checkpointing and average_tokens_across_devices=False."
        )


class WholeDocuments:
    """Mixed into a Trainer: a step is one over whole documents, read in pieces of `chunk_size`; see `CONTEXTS`.

    Every `progress_seconds`, how far a document has been read is kept in the output folder. Resumed from a checkpoint,
    a run goes on from there when it comes to that document again.
    """

    def __init__(
        self, *args, context: str = "unbounded", chunk_size: int = 1024, progress_seconds: float = 300, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.context, self.chunk_size, self.progress_seconds = context, chunk_size, progress_seconds
        check_recurrent(self.model)  # type: ignore[attr-defined]
        self.add_callback(DeleteProgress())  # type: ignore[attr-defined]
        check_arguments(self.args)  # type: ignore[attr-defined]
        if self.compute_loss_func:  # type: ignore[attr-defined]
            raise ValueError("Whole documents are trained on with the mean loss: leave out compute_loss_func.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise ValueError("Whole documents are not trained on with FSDP or DeepSpeed; use DDP.")

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Leaves gradients as Trainer's own does: of the tokens' mean loss over accumulated batches and processes."""
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        whole = accelerator.unwrap_model(model)
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            loss = CONTEXTS[self.context](
                whole,
                chunk_size=self.chunk_size,
                num_items_in_batch=num_items_in_batch,
                progress=Progress(folder, self.progress_seconds),
                **inputs,
            )
        if accelerator.num_processes > 1 and accelerator.sync_gradients:
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad = accelerator.reduce(parameter.grad, "sum")
        # Trainer takes the mean over the processes of what it logs.
        return loss * accelerator.num_processes
