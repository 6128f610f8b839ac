"""Training over unbounded context: the gradients are those of storing everything, whatever the pieces."""

import contextlib
import json
from array import array
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from data import byte_tokenizer
from fresh import run_fresh_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from test_training import TRAINING, options, run_and_kill, text_files  # noqa: F401
from tiny import MANY, NO_SPECIAL_TOKENS, VOCAB, tokens
from tokenizers.processors import TemplateProcessing
from train import RunError, parse, train
from transformers import DynamicCache, Trainer, TrainerCallback, TrainingArguments

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTForCausalLM
from modeling_stateful_gpt.documents import Documents, WholeDocuments, pad
from modeling_stateful_gpt.progress import Progress, digest_of, pack, unpack
from modeling_stateful_gpt.reversible import ReversibleCell
from modeling_stateful_gpt.unbounded import backward_through_time, same_dropout, truncated_backward

MIXTURES = {
    "reversible": {"layer_types": ["reversible"] * 2},
    "forgetting": {"layer_types": ["reversible"] * 2, "reversible_form": "forgetting"},
    "gateloop": {"layer_types": ["gateloop"] * 2},
    "gateloop, heads": {"layer_types": ["gateloop"] * 2, "gateloop_num_heads": 4, "state_transition": "signed"},
    "mixed": {"layer_types": ["gateloop", "reversible", "gateloop"]},
    "rwkv": {"layer_types": ["reversible", "rwkv"], "reversible_form": "forgetting"},
}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)


def decoder(mixture, dtype=torch.float64, dropout=0.1):
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "hidden_dropout": dropout}
    config |= {"num_hidden_layers": len(MIXTURES[mixture]["layer_types"]), **NO_SPECIAL_TOKENS, **MIXTURES[mixture]}
    return shaken(GateLoopForCausalLM(GateLoopConfig(**config)).to(dtype).train())


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def stored(model, ids, labels, chunk_size, mask=None):
    """Plain backpropagation through time, everything stored: one graph over the same pieces, their dropout drawn
    alike."""
    seed = int(torch.randint(2**62, ()))
    cache = DynamicCache(config=model.config)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    count = (targets != -100).sum()
    loss = 0.0
    for start in range(0, ids.shape[1], chunk_size):
        piece = slice(start, start + chunk_size)
        seen = None if mask is None else mask[:, : start + chunk_size]
        with same_dropout(seed + start):
            logits = model(ids[:, piece], attention_mask=seen, past_key_values=cache).logits
        shifted = targets[:, piece].contiguous()
        loss += model.loss_function(logits, None, VOCAB, shift_labels=shifted, num_items_in_batch=count)
    loss.backward()
    return loss.detach()


mixtures, dtypes = st.sampled_from(sorted(MIXTURES)), st.sampled_from([torch.float64, torch.float32])


@MANY
@given(mixtures, dtypes, st.integers(1, 40), st.integers(1, 45), st.booleans())
@example("mixed", torch.float64, 1, 4, False)
@example("rwkv", torch.float32, 37, 37, True)
def test_loss_and_gradients_are_those_of_storing_everything(mixture, dtype, length, chunk_size, ragged):
    check_gradients(mixture, dtype, length, chunk_size, ragged)


@pytest.mark.exhaustive
@every_mixture
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ragged", [False, True])
def test_loss_and_gradients_of_long_documents_are_those_of_storing_everything(mixture, dtype, ragged):
    check_gradients(mixture, dtype, 4096, 1000, ragged)


def check_gradients(mixture, dtype, length, chunk_size, ragged):
    model, ids = decoder(mixture, dtype), tokens(3, length)
    labels, mask = ids.clone(), None
    if ragged:
        mask = torch.ones_like(ids)
        mask[1, length // 2 + 1 :] = mask[2, 1:] = 0
        labels[mask == 0] = -100
    torch.manual_seed(1)
    expected_loss = stored(model, ids, labels, chunk_size, mask) if length > 1 else torch.tensor(0.0)
    expected = gradients(model)
    torch.manual_seed(1)
    loss = backward_through_time(model, ids, labels, chunk_size, mask)
    found = gradients(model)
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss, expected_loss.to(loss), rtol=limit, atol=limit)
    for name, gradient in found.items():
        if length == 1:
            assert gradient is None or not gradient.any()
        else:
            assert (gradient - expected[name]).norm() <= limit * expected[name].norm(), name


@every_mixture
def test_without_dropout_it_is_the_gradient_of_one_forward_over_the_whole(mixture):
    model, ids = decoder(mixture, dropout=0.0), tokens(2, 30)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    expected = gradients(model)
    ours = backward_through_time(model, ids, ids, 7)
    torch.testing.assert_close(ours, loss.detach().to(ours), rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_what_looks_back_at_every_token_is_refused():
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = GateLoopForCausalLM(GateLoopConfig(**config, layer_types=["reversible", "full_attention"]))
    with pytest.raises(ValueError, match=r"look back at every token, or are unknown: layers 1 \(full_attention\)"):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 2)


def test_gradient_checkpointing_which_leaves_out_the_cache_is_refused():
    model = decoder("gateloop")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="leave out gradient checkpointing"):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 2)


def test_a_stateful_gpt_without_feedback_is_its_decoder():
    model = StatefulGPTForCausalLM.from_backbone(decoder("mixed", dropout=0.0), feedback=None).train()
    ids = tokens(2, 9)
    expected = model(ids, labels=ids, use_cache=False).loss.detach()
    torch.testing.assert_close(backward_through_time(model, ids, ids, 4), expected.float())


@given(mixtures, st.integers(1, 14), st.integers(1, 15), st.booleans())
def test_feedback_that_is_stepped_has_the_gradient_of_backpropagation_through_the_whole(
    mixture, length, chunk_size, ragged
):
    model = StatefulGPTForCausalLM.from_backbone(
        decoder(mixture, dropout=0.0), feedback="gated_add", training_solver="sequential"
    )
    model, ids = shaken(model).train(), tokens(3, length)
    labels, mask = ids.clone(), None
    if ragged:
        mask = torch.ones_like(ids)
        mask[1, length // 2 + 1 :] = mask[2, 1:] = 0
        labels[mask == 0] = -100
    loss = backward_through_time(model, ids, labels, chunk_size, mask)
    found = gradients(model)
    if length == 1:
        assert loss == 0 and not any(g.any() for g in found.values() if g is not None)
        return
    expected_loss = model(ids, attention_mask=mask, labels=labels).loss
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach().to(loss), rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize(
    "config, message",
    [({}, "training_solver is 'cyclic'"), ({"training_solver": "sequential", "feedback_noise": 0.1}, "feedback_noise")],
)
def test_feedback_in_passes_or_with_noise_is_refused(config, message):
    model = StatefulGPTForCausalLM.from_backbone(decoder("mixed"), feedback="gated_add", **config)
    with pytest.raises(ValueError, match=message):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 2)


@every_mixture
def test_an_empty_document_beside_another_changes_nothing(mixture):
    model, ids, empty = decoder(mixture, dropout=0.0), tokens(1, 11), np.zeros(0, np.int32)
    loss = backward_through_time(model, ids, ids, 4)
    expected = gradients(model)
    batch = pad([{"input_ids": empty}, {"input_ids": ids[0].numpy()}, {"input_ids": empty}])
    torch.testing.assert_close(backward_through_time(model, chunk_size=4, **batch), loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


class Killed(Exception):
    pass


@given(mixtures, dtypes, st.sampled_from([backward_through_time, truncated_backward]), st.integers(0, 12))
def test_killed_anywhere_in_a_document_it_goes_on_from_there_to_the_same_bits(mixture, dtype, context, pieces):
    """Also where, as after a checkpoint that is older, another document comes first."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        check_resuming(mixture, dtype, context, pieces, Path(folder), monkeypatch)


def check_resuming(mixture, dtype, context, pieces, tmp_path, monkeypatch):
    model, ids, first, read = decoder(mixture, dtype), tokens(2, 30), tokens(2, 8, seed=2), []
    for cell in (module for module in model.modules() if isinstance(module, ReversibleCell) and module.form.rows > 1):
        cell.x_proj.bias.data.view(2, 3, -1)[:, 2] -= 6  # They forget so quickly that words leave the buffers.

    def steps(folder):
        torch.manual_seed(1)
        context(model, first, first, 5, progress=Progress(folder, seconds=0))
        return context(model, ids, ids, 5, progress=Progress(folder, seconds=0))

    loss = steps(None)
    expected = gradients(model)
    save = Progress.save

    def save_and_perhaps_die(self, *args):
        save(self, *args)
        read.append(1)
        if len(read) > pieces:
            raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Progress, "save", save_and_perhaps_die)
        steps(tmp_path)
    gradients(model)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", lambda *args: again.append(1) or save(*args))
        assert torch.equal(steps(tmp_path), loss)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
    whole, of_first = (18, 4) if context is backward_through_time else (8, 2)
    # The first document had been read to its end, and is read again.
    if of_first < len(read) == pieces + 1:
        assert len(again) <= whole - (len(read) - of_first)
    assert not list(tmp_path.iterdir())


def left_behind(model, ids, folder, seed=1):
    """The file of a run that has been killed after a few pieces."""
    save, saved = Progress.save, []

    def save_and_perhaps_die(self, *args):
        save(self, *args)
        saved.append(self.path)
        if len(saved) == 8:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Progress, "save", save_and_perhaps_die)
        if seed is not None:
            torch.manual_seed(seed)
        backward_through_time(model, ids, ids, 5, progress=Progress(folder, seconds=0))
    assert len(saved) == 8
    return saved[0]


def test_a_stepped_feedback_goes_on_as_well(tmp_path, caplog):
    model = StatefulGPTForCausalLM.from_backbone(decoder("mixed"), feedback="gated_add", training_solver="sequential")
    model, ids = shaken(model).train(), tokens(2, 30)
    torch.manual_seed(1)
    loss = backward_through_time(model, ids, ids, 5)
    expected = gradients(model)
    left_behind(model, ids, tmp_path)
    gradients(model)
    torch.manual_seed(1)
    assert torch.equal(backward_through_time(model, ids, ids, 5, progress=Progress(tmp_path)), loss)
    assert "Going on in the middle" in caplog.text
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


class Trap:
    """What runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_was_planted_runs_nothing(tmp_path):
    model, ids, run = decoder("mixed", torch.float32), tokens(2, 30), tmp_path / "run"
    torch.manual_seed(1)
    expected = backward_through_time(model, ids, ids, 5)
    run.mkdir()
    torch.save({"reading": Trap(tmp_path / "sprung"), "gradients": []}, left_behind(model, ids, run))
    gradients(model)
    torch.manual_seed(1)
    assert torch.equal(backward_through_time(model, ids, ids, 5, progress=Progress(run)), expected)
    assert not (tmp_path / "sprung").exists()


DTYPES = [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128]
# Views that are not contiguous, and empty ones.
views = st.builds(
    lambda dtype, rows: torch.arange(3 * rows).view(rows, 3).to(dtype).mT, st.sampled_from(DTYPES), st.integers(0, 3)
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | views


@given(st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6))
@settings(max_examples=40)
def test_what_is_packed_comes_back_to_the_same_bits(value):
    assert_same(unpacked(value), value)


def test_conjugates_buffers_and_what_is_no_number_come_back_as_well():
    z = [torch.randn(2, dtype=torch.complex128).conj(), torch.tensor([torch.nan, torch.inf, -0.0]), torch.tensor(3)]
    words = torch.tensor([97, 98], dtype=torch.uint8)
    assert_same(
        unpacked([*z, 2**62 + 1, bytearray(b"ab"), array("q", [2**62 + 1])]),
        [*z, 2**62 + 1, words, torch.tensor([2**62 + 1])],
    )


def unpacked(value):
    tensors, metadata = pack(value)
    return unpack(metadata, load(save(tensors)).__getitem__)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    else:
        assert repr(a) == repr(b)


@pytest.mark.parametrize(
    "other", ["documents", "order", "labels", "mask", "dropout", "weights", "pieces", "context", "config"]
)
def test_progress_of_something_else_is_not_taken_up(other, tmp_path):
    model, ids = decoder("mixed", torch.float32), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def step(folder, other=None):
        torch.manual_seed(2 if other == "dropout" else 1)
        documents = {"documents": tokens(2, 30, seed=9), "order": ids.flip(1)}.get(other, ids)
        labels = documents.masked_fill(documents == 3, -100) if other == "labels" else documents
        context = truncated_backward if other == "context" else backward_through_time
        return context(
            model,
            documents,
            labels,
            7 if other == "pieces" else 5,
            mask if other == "mask" else None,
            progress=Progress(folder, seconds=0),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "end", lambda self: None)
        step(tmp_path, other)
    if other == "weights":
        shaken(model)
    if other == "config":
        model.config.hidden_dropout = 0.5
        for module in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
            module.p = 0.5
    gradients(model)
    loss = step(tmp_path)
    found = gradients(model)
    assert torch.equal(loss, step(None))
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, found[name]), name


def test_progress_is_taken_up_by_a_model_that_has_not_been_saved_yet(tmp_path, monkeypatch, caplog):
    """As a run that was killed had saved checkpoints, and one that goes on has not."""
    monkeypatch.setattr(Progress, "end", lambda self: None)
    ids = tokens(1, 30)
    for saved in (True, False):
        model = decoder("mixed", torch.float32)
        if saved:
            model.save_pretrained(tmp_path / "checkpoint")
        torch.manual_seed(1)
        backward_through_time(model, ids, ids, 5, progress=Progress(tmp_path, seconds=0))
    assert len(list(tmp_path.glob("document-*"))) == 1
    assert "Going on in the middle of documents" in caplog.text


def test_a_run_that_is_over_leaves_no_progress_behind(tmp_path):
    for ending in ("progress", "unfinished", "pt"):
        (tmp_path / f"document-0123456789abcdef-0.{ending}").touch()
    (tmp_path / "document-1.txt").touch()  # Somebody's own.
    first_gradients(tmp_path, [{"input_ids": tokens(1, 9)[0].numpy()}])
    assert [path.name for path in tmp_path.glob("document-*")] == ["document-1.txt"]


def with_a_bit_turned_over(path, share):
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"?"),
        lambda path: save_file({"weight": torch.ones(2)}, path),
        lambda path: save_file({}, path, {"outline": "[]"}),
        lambda path: save_file(load_file(path), path, {"outline": "{}"}),
        *(partial(with_a_bit_turned_over, share=share) for share in (0.1, 0.4, 0.7, 0.999)),
        lambda path: retold(path, lambda saved: saved["reading"].pop("backwards")),
        lambda path: retold(path, lambda saved: saved["reading"]["layers"].pop()),
        lambda path: retold(path, lambda saved: saved["parameters"].reverse()),
    ],
)
def test_a_file_that_is_damaged_or_something_else_is_passed_over(damage, tmp_path, caplog):
    """And what was learned from the batches before stays."""
    model, ids, first = decoder("mixed", torch.float32), tokens(2, 30), tokens(2, 8, seed=2)

    def steps(folder):
        torch.manual_seed(1)
        backward_through_time(model, first, first, 5)
        return backward_through_time(model, ids, ids, 5, progress=Progress(folder, seconds=1e9))

    expected = steps(None)
    expected_gradients = gradients(model)
    torch.manual_seed(1)
    backward_through_time(model, first, first, 5)
    path = left_behind(model, ids, tmp_path, seed=None)
    damage(path)
    gradients(model)
    assert torch.equal(steps(tmp_path), expected)
    assert f"{path} is damaged, or something else" in caplog.text
    assert not path.exists()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected_gradients[name]), name


def retold(path, change):
    """The file again, with something else in its outline."""
    with safe_open(path, "pt") as file:
        outline = json.loads(file.metadata()["outline"])
    change(outline)
    tensors, metadata = load_file(path), {"outline": json.dumps(outline)}
    save_file(tensors, path, metadata | {"digest": digest_of(tensors, metadata)})


def test_what_is_frozen_gets_no_gradient():
    model, ids = decoder("gateloop"), tokens(2, 12)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    backward_through_time(model, ids, ids, 5)
    found = gradients(model)
    assert found.pop("model.norm.weight").any() and not any(g is not None for g in found.values())


def test_bad_arguments_are_refused():
    model = decoder("gateloop")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 0)
    with pytest.raises(ValueError, match="no tokens"):
        backward_through_time(model, tokens(1, 0), tokens(1, 0), 2)


@every_mixture
def test_truncated_gradients_stop_at_the_pieces_and_states_do_not(mixture):
    model, ids = decoder(mixture, dropout=0.0), tokens(2, 12)
    whole = model(ids, labels=ids, use_cache=False).loss
    loss = truncated_backward(model, ids, ids, 4)
    torch.testing.assert_close(loss, whole.detach().to(loss), rtol=1e-6, atol=0)
    truncated = gradients(model)
    backward_through_time(model, ids, ids, 4)
    exact = gradients(model)
    assert any((truncated[name] - exact[name]).norm() > 0.01 * exact[name].norm() for name in exact)
    truncated_backward(model, ids, ids, 12)
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() <= 1e-5 * exact[name].norm(), name


@given(st.lists(st.text(alphabet="ab\né", max_size=30), min_size=1, max_size=5), st.integers(1, 20))
def test_documents_are_tokenised_in_parts_to_what_they_are_as_a_whole(texts, part):
    tokenizer = byte_tokenizer()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "PART", part)
        documents = Documents(Path(folder, "tokens"), texts, tokenizer)
        assert len(documents) == len(texts)
        for document, text in zip(documents, texts, strict=False):
            assert document["input_ids"].tolist() == [*text.encode(), tokenizer.eos_token_id]


def test_a_tokenizers_start_token_is_not_in_the_middle_of_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(Documents, "PART", 2)
    tokenizer = byte_tokenizer()
    template = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    (document,) = Documents(tmp_path / "tokens", ["ab\ncd\nef"], tokenizer)
    assert document["input_ids"].tolist() == [tokenizer.pad_token_id, *b"ab\ncd\nef", tokenizer.eos_token_id]
    assert len(Documents(tmp_path / "again", ["a<|endoftext|>b"], tokenizer)) == 1


def test_documents_of_different_lengths_are_padded_and_the_padding_is_told():
    batch = pad([{"input_ids": np.array([5, 6, 7], np.int32)}, {"input_ids": np.array([8], np.int32)}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert "attention_mask" not in pad([{"input_ids": np.array([5, 6, 7], np.int32)}])


class DocumentTrainer(WholeDocuments, Trainer):
    """As a user would make it."""


def first_gradients(folder, documents, **options):
    """The gradients of the first step."""
    model = decoder("mixed", torch.float32, dropout=0.0)
    recorded = {}

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            recorded[state.global_step] = {name: p.grad.clone() for name, p in model.named_parameters()}

    arguments = TrainingArguments(
        str(folder),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        max_grad_norm=0.0,
        max_steps=1,
        **options,
    )
    DocumentTrainer(
        model, arguments, data_collator=pad, train_dataset=documents, chunk_size=5, callbacks=[Record()]
    ).train()
    return recorded[0]


def test_trainer_accumulates_the_gradient_of_the_mean_over_all_tokens(tmp_path):
    documents = [{"input_ids": tokens(1, length)[0].numpy()} for length in (17, 3)]
    accumulated = first_gradients(
        tmp_path / "a", documents, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    together = first_gradients(tmp_path / "b", documents, per_device_train_batch_size=2)
    for name, gradient in together.items():
        assert (accumulated[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_trainer_refuses_a_model_that_looks_back_at_every_token(tmp_path):
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"layers 0 \(full_attention\)"):
        DocumentTrainer(GateLoopForCausalLM(GateLoopConfig(**config)), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}, {"average_tokens_across_devices": False}],
)
def test_a_trainer_refuses_what_it_would_not_do(tmp_path, option):
    with pytest.raises(ValueError, match="mean loss over all tokens"):
        DocumentTrainer(decoder("gateloop"), TrainingArguments(str(tmp_path), use_cpu=True, **option))


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels are \(1, 4\), input_ids \(1, 9\)"):
        backward_through_time(decoder("gateloop"), tokens(1, 9), tokens(1, 4), 5)


# train.py

DOCUMENTS = ["--preset=reversible_forgetting", "--context=unbounded", "--chunk_size=50", "--hidden_size=16"]


@pytest.mark.parametrize("option", ["--fp16=true", "--gradient_checkpointing=true", "--label_smoothing_factor=0.1"])
def test_what_documents_do_not_go_with_is_refused_before_anything_is_written(option, text_files, tmp_path):  # noqa: F811
    with pytest.raises(RunError, match="hole documents are"):
        train(*parse(options(text_files, tmp_path / "run", *DOCUMENTS, option)))
    assert not (tmp_path / "run").exists()


def on_documents(text_files, folder, *more):  # noqa: F811
    """A document a step, of a few hundred tokens."""
    given = [a for a in options([], folder) if not a.startswith("--hidden_size")]
    texts = []
    for name in text_files:
        for number in range(4):
            path = Path(f"{name}.{number}")
            path.write_text(Path(name).read_text()[400 * number : 400 * number + 150 + 60 * number])
            texts.append(str(path))
    return ["--text_file", *texts, *given[1:], *DOCUMENTS, "--per_device_train_batch_size=1", *more]


@pytest.mark.parametrize("context", ["unbounded", "truncated"])
def test_whole_documents_are_learned_in_train_py(context, text_files, tmp_path):  # noqa: F811
    train(*parse(on_documents(text_files, tmp_path / "run", f"--context={context}")))
    results = json.loads((tmp_path / "run/results.json").read_text())
    log = [entry["eval_loss"] for entry in results["log"]]
    assert log[-1] < log[0]
    # Six documents, each with its end.
    assert 6 * 151 <= results["tokens"] <= 6 * 331


def test_two_processes_make_the_steps_of_one_over_documents(text_files, tmp_path):  # noqa: F811
    train(*parse(on_documents(text_files, tmp_path / "one", "--per_device_train_batch_size=2")))
    run_fresh_ranks("two_cpu_processes.yaml", TRAINING / "train.py", *on_documents(text_files, tmp_path / "two"))
    logs = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "checkpoint-6/trainer_state.json").read_text())
        logs.append([entry for entry in state["log_history"] if "loss" in entry])
    for what in ("loss", "grad_norm"):
        assert [e[what] for e in logs[1]] == pytest.approx([e[what] for e in logs[0]], rel=1e-4), what


def test_killed_in_the_middle_of_a_document_a_run_resumes_to_the_same_weights(
    text_files,  # noqa: F811
    tmp_path,
    capsys,
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--dropout=0.1", "--progress_seconds=0"]
    train(*parse(on_documents(text_files, whole, *more)))
    run_and_kill(on_documents(text_files, killed, *more), losses=3)
    train(*parse(on_documents(text_files, killed, *more)))
    assert "Resuming from" in capsys.readouterr().out
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list(killed.glob("document-*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--preset=gpt"], r"layers 0 \(full_attention\)"),
        (["--preset=stateful"], "layers 0"),
        (["--context=endless"], "choose from blocks, unbounded, truncated"),
        (["--chunk_size=0"], "at least 1"),
        (["--random_offsets=true"], "whole documents"),
    ],
)
def test_what_does_not_go_with_documents_is_refused(options, message, text_files, tmp_path):  # noqa: F811
    with pytest.raises(RunError, match=message):
        train(*parse(on_documents(text_files, tmp_path / "run", *options)))
    assert not (tmp_path / "run").exists()
