"""From text to blocks of token ids: what is read, what is dropped, how it is split, how it is tokenised.

The unit is the document. Duplicates are dropped before the split, and the split is by document, so that no window of
validation text overlaps one of training.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

GRAM = 32
"""Bytes per window when texts are compared."""


class DataError(ValueError):
    """The text cannot be used as it is; the message says what to do."""


@dataclass
class Corpus:
    train: list[str]
    validation: list[str]
    report: dict
    """What was read and dropped, for people and for the run's records."""


def load_corpus(
    text_file: list[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    max_train_bytes: int | None = None,
) -> Corpus:
    """Reads text files, or a dataset of the Hub, or by default the text that ships with Python; drops duplicates and
    splits by document.

    A dataset that has a validation split keeps its own. A single document is cut once instead, its end for validation.
    At most `max_train_bytes` are left of the training text, and the validation text as it is.

    Raises:
        DataError: a file is missing, empty or not UTF-8 text; the dataset has no such column; too little text.
    """
    if max_train_bytes is not None and max_train_bytes < 1:
        raise DataError(f"--max_train_bytes is {max_train_bytes}; it must be at least 1.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"--validation_fraction is {validation_fraction}; it must lie between 0 and 1.")
    if text_file and dataset_name:
        raise DataError("Give either --text_file or --dataset_name, not both.")
    if text_file:
        source, documents = (
            ", ".join(Path(name).name for name in text_file),
            [read_text(Path(name)) for name in text_file],
        )
    elif dataset_name:
        # Without the folders of this machine: the report is published with the model.
        source = Path(dataset_name).name if Path(dataset_name).exists() else dataset_name
        splits = load_dataset(dataset_name, dataset_config_name)
        documents = read_column(source, splits, "train", text_column)
        if "validation" in splits:
            validation = read_column(source, splits, "validation", text_column)
            # What stands in both is dropped from training.
            kept, dropped = drop_duplicates([*validation, *documents], always=len(validation))
            train = first_bytes(kept[len(validation) :], max_train_bytes)
            return corpus(source, len(documents), dropped, train, validation)
    else:
        source, documents = "the text that ships with Python", python_documents()

    kept, dropped = drop_duplicates(documents)
    if len(kept) == 1:
        text = kept[0]
        cut = int(len(text) * (1 - validation_fraction))
        train, validation = [text[:cut]], [text[cut:]]
    else:
        train, validation = split_by_document(kept, validation_fraction)
    if not train or not validation:
        raise DataError(f"{source}: too little text to split into training and validation; add more documents.")
    return corpus(source, len(documents), dropped, first_bytes(train, max_train_bytes), validation)


def corpus(source: str, documents: int, dropped: dict, train: list[str], validation: list[str]) -> Corpus:
    report = {
        "source": source,
        "documents": documents,
        **dropped,
        "train_documents": len(train),
        "train_bytes": sum(len(text.encode()) for text in train),
        "validation_documents": len(validation),
        "validation_bytes": sum(len(text.encode()) for text in validation),
        f"validation_{GRAM}grams_in_train": round(share_in(validation, train), 4),
    }
    return Corpus(train, validation, report)


def read_column(source: str, splits: DatasetDict, split: str, column: str) -> list[str]:
    if split not in splits:
        raise DataError(f"{source} has the splits {sorted(splits)}, but none is called {split!r}.")
    if column not in splits[split].column_names:
        raise DataError(f"{source} has the columns {splits[split].column_names}; choose --text_column.")
    return [text for text in splits[split][column] if text and text.strip()]


def read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    if "\0" in text:
        raise DataError(f"{path} looks like a binary file (it has a zero byte); give a text file.")
    if not text.strip():
        raise DataError(f"{path} is empty; give a file with text.")
    return text


def python_documents() -> list[str]:
    """The topics of Python's manual and the sources of its standard library, without its tests: about 12 MB."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    sources = []
    for path in sorted(library.rglob("*.py")):
        if not skipped & set(path.relative_to(library).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                sources.append(text)
    return [topics[name] for name in sorted(topics)] + sources


def gram_hashes(text: str) -> np.ndarray:
    """A 64-bit hash of every window of `GRAM` bytes: windows of 2m bytes are hashed from two of m bytes."""
    rng = np.random.default_rng(0)
    table = rng.integers(2**64, size=256, dtype=np.uint64)
    hashes = table[np.frombuffer(text.encode(), dtype=np.uint8)]
    width = 1
    while width < GRAM:
        multiplier = rng.integers(2**64, dtype=np.uint64) | np.uint64(1)
        hashes = hashes[:-width] * multiplier + hashes[width:] if len(hashes) > width else hashes[:0]
        hashes ^= hashes >> np.uint64(29)
        width *= 2
    return hashes


def drop_duplicates(documents: list[str], always: int = 0, threshold: float = 0.5) -> tuple[list[str], dict]:
    """Drops documents that stand elsewhere: the same text, or more than `threshold` of their windows of `GRAM` bytes
    in documents that come before them when sorted by length, the longest first. The windows compared are the eighth
    whose hash is divisible by 8. The first `always` documents come before all others and are kept. The order stays.
    """
    places: dict[str, int] = {}
    for place, text in enumerate(documents):
        places.setdefault(text, place)
    unique = sorted(places, key=lambda text: (places[text] >= always, -len(text)))
    hashes = [sampled[sampled % np.uint64(8) == 0] for sampled in map(gram_hashes, unique)]
    owner = np.repeat(np.arange(len(unique)), [len(h) for h in hashes])
    _, first, which = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    seen_before = owner[first][which] < owner
    repeated = np.bincount(owner, weights=seen_before, minlength=len(unique))
    near = {text for text, h, n in zip(unique, hashes, repeated, strict=True) if n > threshold * max(len(h), 1)}
    kept = [
        text for place, text in enumerate(documents) if place < always or (places[text] == place and text not in near)
    ]
    exact = sum(places[text] != place for place, text in enumerate(documents) if place >= always)
    return kept, {"exact_duplicates": exact, "near_duplicates": len(documents) - exact - len(kept)}


def position(text: str) -> float:
    """A number from 0 to 1 that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def first_bytes(documents: list[str], number: int | None) -> list[str]:
    """The documents in the order of their hashes, so that they are of all kinds, up to `number` bytes."""
    if number is None:
        return documents
    kept = []
    for text in sorted(documents, key=position):
        content = text.encode()[:number]
        number -= len(content)
        kept.append(content.decode(errors="ignore"))  # A character may be cut in two.
    return [text for text in kept if text]


def split_by_document(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Splits by a hash of each document's text: a document stays on its side whatever else is in the corpus. At least
    one document is for validation."""
    bound = max(validation_fraction, min(map(position, documents)))
    train = [text for text in documents if position(text) > bound]
    return train, [text for text in documents if position(text) <= bound]


def share_in(texts: list[str], others: list[str]) -> float:
    """The share of the windows of `GRAM` bytes of `texts` that also stand in `others`."""
    windows = np.concatenate([gram_hashes(text) for text in texts])
    known = np.concatenate([gram_hashes(text) for text in others])
    return float(np.isin(windows, known).mean()) if len(windows) else 0.0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, whose id is the byte, and <|endoftext|> (256) and <|pad|> (257), in transformers' format."""
    # ByteLevel stands each byte for one printable character, in this order: the printable bytes, then the others.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in characters)
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(characters.values()) == set(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def token_blocks(documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """`input_ids` in blocks of `block_size` tokens: the documents one after the other, each closed by the end token.

    Raises:
        DataError: there are fewer than `block_size` tokens, or the tokenizer has no end token.
    """
    if block_size < 2:
        raise DataError(f"--block_size is {block_size}; at least 2 tokens are needed to predict one from another.")
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end token (eos_token), which closes each document; set one.")

    def tokenize(batch: dict) -> dict:
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    tokens = Dataset.from_dict({"text": documents}).map(tokenize, batched=True, remove_columns="text")
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens.with_format("numpy")["input_ids"]])
    if len(flat) < block_size:
        raise DataError(f"The text has {len(flat)} tokens, less than one block of {block_size}; lower --block_size.")
    return Dataset.from_dict({"input_ids": flat[: len(flat) // block_size * block_size].reshape(-1, block_size)})


def sample_blocks(blocks: Dataset, number: int | None) -> Dataset:
    """At most `number` blocks from all over the text, always the same ones."""
    return blocks if number is None or number >= len(blocks) else blocks.shuffle(seed=0).select(range(number))


def bytes_per_token(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Bytes of text per token, the documents' end tokens included."""
    tokens = sum(len(ids) + 1 for ids in tokenizer(documents)["input_ids"])
    return sum(len(text.encode()) for text in documents) / tokens
