from pydoc_data.topics import topics

import numpy as np
import pytest
from data import (
    GRAM,
    DataError,
    byte_tokenizer,
    bytes_per_token,
    drop_duplicates,
    gram_hashes,
    load_corpus,
    sample_blocks,
    share_in,
    split_by_document,
    token_blocks,
)
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

PROSE = [topics[name] for name in sorted(topics)][:40]


@given(st.text(alphabet="ab", min_size=0, max_size=120), st.text(alphabet="ab", min_size=0, max_size=120))
def test_hashes_are_equal_exactly_where_windows_are(first, second):
    def windows(text):
        return [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]

    both = windows(first) + windows(second)
    hashes = np.concatenate([gram_hashes(first), gram_hashes(second)])
    assert len(hashes) == len(both)
    assert len(set(hashes.tolist())) == len(set(both))
    assert len({*zip(hashes.tolist(), both, strict=True)}) == len(set(both))


def test_duplicates_and_near_duplicates_are_dropped_and_the_longest_kept():
    long = "".join(chr(97 + i * i % 23) + str(i) for i in range(2000))
    part = long[1000:4000]
    other = "".join(chr(97 + i * i % 19) + str(7 * i) for i in range(2000))
    mixed = other[: len(other) // 2] + long[:500]  # each half stands elsewhere
    kept, dropped = drop_duplicates([part, long, other + "!", long, mixed, "short", "short"])
    assert kept == [long, other + "!", "short"], "in the order given"
    assert dropped == {"exact_duplicates": 2, "near_duplicates": 2}
    assert drop_duplicates([part, long, other], always=1)[0] == [part, long, other], "little of long stands in part"
    assert drop_duplicates([long, part, other], always=1)[0] == [long, other]


def test_the_share_of_known_windows_is_measured():
    text = "".join(str(i) for i in range(1000))
    assert share_in([text], [text]) == 1
    assert share_in([text], ["x" * 500]) == 0
    assert share_in([text], [text[: len(text) // 2]]) == pytest.approx(0.5, abs=0.02)


def test_the_split_is_by_document_and_stays_as_a_corpus_grows():
    train, validation = split_by_document(PROSE, 0.25)
    assert sorted(train + validation) == sorted(PROSE) and train and validation
    assert split_by_document(PROSE[:2], 0.0001)[1], "at least one document is for validation"
    fewer_train, _ = split_by_document(PROSE[::2], 0.25)
    assert set(fewer_train) <= set(train)


@pytest.mark.exhaustive
def test_the_default_corpus_is_python_itself_without_overlap():
    corpus = load_corpus()
    report = corpus.report
    assert report["source"] == "the text that ships with Python"
    assert report["train_bytes"] > 5e6 and report["validation_bytes"] > 1e5
    assert report["near_duplicates"] > 0
    assert not set(corpus.train) & set(corpus.validation)
    assert report["validation_32grams_in_train"] == pytest.approx(share_in(corpus.validation, corpus.train), abs=1e-4)
    assert report["validation_32grams_in_train"] < 0.12


@given(st.text(max_size=80))
def test_the_byte_tokenizer_maps_text_to_its_bytes_and_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_byte_tokenizer_loads_without_custom_code(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer("hé")["input_ids"] == list("hé".encode())
    assert not list(tmp_path.glob("*.py"))


def test_blocks_are_the_documents_one_after_the_other():
    tokenizer = byte_tokenizer()
    blocks = token_blocks(["abc", "défg"], tokenizer, 5)["input_ids"]
    assert blocks == [[97, 98, 99, 256, 100], [195, 169, 102, 103, 256]]
    assert bytes_per_token(["abc", "défg"], tokenizer) == 8 / 10


def test_files_are_documents_and_a_single_file_is_cut_once(tmp_path):
    for i, text in enumerate(PROSE[:30]):
        (tmp_path / f"{i}.txt").write_text(text)
    names = [str(tmp_path / f"{i}.txt") for i in range(30)]
    corpus = load_corpus(names, validation_fraction=0.3)
    assert set(corpus.train) | set(corpus.validation) <= set(PROSE[:30])
    alone = load_corpus(names[:1], validation_fraction=0.3)
    assert alone.train[0] + alone.validation[0] == PROSE[0]


def test_the_training_text_can_be_cut_and_the_validation_text_stays(tmp_path):
    for i, text in enumerate(PROSE[:30]):
        (tmp_path / f"{i}.txt").write_text(text + "é")
    names = [str(tmp_path / f"{i}.txt") for i in range(30)]
    whole, *cut = (load_corpus(names, validation_fraction=0.3, max_train_bytes=n) for n in (None, 9_000, 20_000, 10**9))
    assert all(corpus.validation == whole.validation for corpus in cut)
    assert [corpus.report["train_bytes"] for corpus in cut] == [9_000, 20_000, whole.report["train_bytes"]]
    joined = ["".join(corpus.train) for corpus in cut]
    assert joined[2].startswith(joined[1]) and joined[1].startswith(joined[0]), "less text is a part of more"
    assert sorted(cut[2].train) == sorted(whole.train)
    (tmp_path / "é.txt").write_text("é" * 100)
    assert load_corpus([str(tmp_path / "é.txt")], max_train_bytes=5).train == ["éé"]


@pytest.mark.parametrize("with_validation", [False, True])
def test_a_dataset_is_read_with_its_own_validation_split_if_it_has_one(with_validation, tmp_path):
    Dataset.from_dict({"body": [*PROSE[:20], PROSE[20], None, ""]}).to_parquet(tmp_path / "train.parquet")
    if with_validation:
        Dataset.from_dict({"body": PROSE[20:25]}).to_parquet(tmp_path / "validation.parquet")
    corpus = load_corpus(dataset_name=str(tmp_path), text_column="body", validation_fraction=0.3)
    if with_validation:
        assert corpus.validation == PROSE[20:25] and set(corpus.train) <= set(PROSE[:20])
        assert corpus.report["exact_duplicates"] == 1
    else:
        assert set(corpus.train) | set(corpus.validation) <= set(PROSE[:21]) and corpus.validation
    with pytest.raises(DataError, match=r"has the columns \['body'\]; choose --text_column"):
        load_corpus(dataset_name=str(tmp_path))


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"a\0b", "binary"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_not_text_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"book.txt.*{message}"):
        load_corpus([str(path)])


def test_a_sample_of_blocks_is_from_all_over_the_text():
    blocks = token_blocks(PROSE, byte_tokenizer(), 64)
    sample = sample_blocks(blocks, 64)
    assert len(sample) == 64 and sample["input_ids"] == sample_blocks(blocks, 64)["input_ids"]
    every = list(blocks["input_ids"])
    places = [every.index(block) / len(blocks) for block in sample["input_ids"]]
    assert min(places) < 0.1 and max(places) > 0.9
    assert len(sample_blocks(blocks, None)) == len(sample_blocks(blocks, 10**9)) == len(blocks)


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="less than one block of 100; lower --block_size"):
        token_blocks(["abc"], byte_tokenizer(), 100)
    with pytest.raises(DataError, match="--block_size is 1; at least 2"):
        token_blocks(["abc"], byte_tokenizer(), 1)
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        load_corpus(validation_fraction=0.0)
    with pytest.raises(DataError, match="--max_train_bytes is 0"):
        load_corpus(max_train_bytes=0)
    with pytest.raises(DataError, match="either --text_file or --dataset_name"):
        load_corpus(["a"], "b")
