"""Training over unbounded context: the gradients are those of storing everything, whatever the pieces."""

import pytest
import torch
from tiny import NO_SPECIAL_TOKENS, VOCAB, tokens
from transformers import DynamicCache
from unbounded import backward_through_time, same_dropout

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM

MIXTURES = {
    "reversible": {"layer_types": ["reversible"] * 2},
    "forgetting": {"layer_types": ["reversible"] * 2, "reversible_form": "forgetting"},
    "gateloop": {"layer_types": ["gateloop"] * 2},
    "gateloop, heads": {"layer_types": ["gateloop"] * 2, "gateloop_num_heads": 4, "state_transition": "signed"},
    "mixed": {"layer_types": ["gateloop", "reversible", "gateloop"]},
}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)


def decoder(mixture, dtype=torch.float64, dropout=0.1):
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "hidden_dropout": dropout}
    config |= {"num_hidden_layers": len(MIXTURES[mixture]["layer_types"]), **NO_SPECIAL_TOKENS, **MIXTURES[mixture]}
    model = GateLoopForCausalLM(GateLoopConfig(**config)).to(dtype).train()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def stored(model, ids, labels, chunk_size, mask=None):
    """Plain backpropagation through time, everything stored: the same pieces, whose dropout is drawn alike, one graph.
    Between them, the gradients of reversible states, which are integers, go through carriers."""
    seed = int(torch.randint(2**62, ()))
    cache = DynamicCache(config=model.config)
    carriers = {}
    for number, layer in enumerate(model.model.layers):
        if layer.layer_type == "reversible":
            layer.mixer.recur = carrying(layer.mixer, carriers, number)
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
    for layer in model.model.layers:
        vars(layer.mixer).pop("recur", None)
    return loss.detach()


def carrying(mixer, carriers, number):
    def recur(state, x, real=None, starts=None):
        y, state, carriers[number] = mixer.cell(x, state, real, starts, carrier=carriers.get(number))
        return y, state

    return recur


@every_mixture
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length, chunk_size", [(37, 8), (37, 37), (37, 100), (5, 1), (1, 4)])
@pytest.mark.parametrize("ragged", [False, True])
def test_loss_and_gradients_are_those_of_storing_everything(mixture, dtype, length, chunk_size, ragged):
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
    limit = 1e-10 if dtype == torch.float64 else 2e-5
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


def test_states_on_disk_give_the_same_gradients_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, ids = decoder("mixed"), tokens(2, 30)
    torch.manual_seed(1)
    backward_through_time(model, ids, ids, 7)
    expected = gradients(model)
    torch.manual_seed(1)
    backward_through_time(model, ids, ids, 7, offload=True)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name])
    assert not list(tmp_path.iterdir())


def test_what_looks_back_at_every_token_is_refused():
    config = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = GateLoopForCausalLM(GateLoopConfig(**config, layer_types=["reversible", "full_attention"]))
    with pytest.raises(ValueError, match=r"look back at every token, or are unknown: layers 1 \(full_attention\)"):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 2)


def test_bad_arguments_are_refused():
    model = decoder("gateloop")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        backward_through_time(model, tokens(1, 5), tokens(1, 5), 0)
    with pytest.raises(ValueError, match="no tokens"):
        backward_through_time(model, tokens(1, 0), tokens(1, 0), 2)
