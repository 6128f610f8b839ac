"""Decoders with GateLoop layers, pure and mixed with attention: what generation asks of their state."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generation import MODES, NEW, generate
from tiny import LLAMA_LIKE, few, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTForCausalLM

MIXTURES = {
    "pure": {"layer_types": ["gateloop"] * 2},
    "pure, signed, 4 heads": {"layer_types": ["gateloop"] * 2, "state_transition": "signed", "gateloop_num_heads": 4},
    "gateloop first": {"layer_types": ["gateloop", "full_attention"], "gateloop_num_heads": 2},
    "attention first": {"layer_types": ["full_attention", "gateloop"], "state_transition": "positive"},
    "reversible": {"layer_types": ["reversible"] * 2},
    "reversible, forgetting": {"layer_types": ["reversible", "gateloop"], "reversible_form": "forgetting"},
    "rwkv": {"layer_types": ["reversible", "rwkv"]},
    "attention first, then reversible": {"layer_types": ["full_attention", "reversible"]},
    "cartesian": {"layer_types": ["gateloop"] * 2, "state_transition": "cartesian", "gateloop_num_heads": 8},
}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)


def decoder(mixture, dtype=torch.float64, **config):
    torch.manual_seed(0)
    config = {**LLAMA_LIKE, **MIXTURES[mixture], **config}
    model = GateLoopForCausalLM(GateLoopConfig(**config)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@every_mixture
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_tokens_with_and_without_a_cache_and_in_pieces(mode, mixture):
    model, ids = decoder(mixture), tokens(2, 7)
    without = generate(model, ids, **MODES[mode], use_cache=False)
    assert torch.equal(generate(model, ids, **MODES[mode]), without)
    for chunk in (1, 3):
        assert torch.equal(generate(model, ids, **MODES[mode], prefill_chunk_size=chunk), without)


@every_mixture
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_left_padded_prompts_generate_as_each_alone(cache_implementation, mixture):
    model, ids, mask = decoder(mixture), tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 2, 5)):
        mask[row, : 7 - length] = 0
    for options in ({}, {"prefill_chunk_size": 2}):
        together = generate(model, ids, attention_mask=mask, cache_implementation=cache_implementation, **options)
        for row, length in enumerate((7, 2, 5)):
            alone = generate(model, ids[row : row + 1, 7 - length :])
            assert torch.equal(together[row, 7:], alone[0, length:])


@every_mixture
@pytest.mark.parametrize("make_cache", [None, DynamicCache, "config", "static"])
def test_generation_goes_on_from_a_returned_cache(make_cache, mixture):
    model, ids = decoder(mixture), tokens(2, 5)
    whole = generate(model, ids)
    cache = {
        None: lambda: None,
        DynamicCache: DynamicCache,
        "config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[make_cache]()
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True, past_key_values=cache)
    second = generate(model, first.sequences, max_new_tokens=NEW - 4, past_key_values=first.past_key_values)
    assert torch.equal(second, whole)


@given(st.sampled_from(sorted(MIXTURES)), st.sampled_from(sorted(MIXTURES)), st.booleans())
def test_prompt_lookup_and_assisted_decoding_are_exact(mixture, other, do_sample):
    model, ids = decoder(mixture), tokens(1, 4).repeat(1, 3)
    options = {"do_sample": True, "top_k": 1} if do_sample else {}
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(generate(model, ids, assistant_model=decoder(other), **options), expected)
    assert torch.equal(generate(model, ids, assistant_early_exit=1, **options), expected)


@every_mixture
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_cropping_while_the_past_is_recorded_restores_the_state(keep, mixture):
    model, ids = decoder(mixture), tokens(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        cache = model(ids[:, :5], use_cache=True).past_key_values
        cache.activate_past_recording()
        wrong = torch.cat([ids[:, 5 : 5 + keep], tokens(2, 4, seed=1)], dim=1)
        model(wrong[:, :2], past_key_values=cache)
        model(wrong[:, 2:], past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 5 + keep
        out = model(ids[:, 5 + keep : 9], past_key_values=cache).logits
        torch.testing.assert_close(out, expected[:, 5 + keep : 9])
        cache.crop(0)
        torch.testing.assert_close(model(ids[:, 9:], past_key_values=cache).logits, expected[:, 9:])


def test_cropping_what_was_not_recorded_is_refused():
    model, ids = decoder("pure"), tokens(1, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match=r"Cannot remove 2 tokens: 0 were recorded.*activate_past_recording"):
            cache.crop(-2)
        cache.activate_past_recording()
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="Cannot remove 7 tokens: 6 were recorded"):
            cache.crop(-7)
        cache.crop(11)  # So many remain, for transformers up to 5.16.
        assert cache.get_seq_length() == 11


@every_mixture
def test_a_crop_that_is_refused_has_cut_nothing_and_one_of_everything_needs_no_record(mixture):
    model, ids = decoder(mixture), tokens(2, 9)
    with torch.no_grad():
        expected, cache = model(ids).logits, model(ids[:, :6], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, 6:8], past_key_values=cache)
        with pytest.raises(RuntimeError, match="Cannot remove 3 tokens: 2 were recorded"):
            cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]
        torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:])
        cache.crop(-100)
        assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.skipif(
    not hasattr(StaticLayer, "crop"), reason="before transformers 5.24, static caches cannot be cropped"
)
@pytest.mark.parametrize("mixture", ["gateloop first", "attention first"])
def test_a_static_cache_is_cropped_exactly(mixture):
    model, ids = decoder(mixture), tokens(2, 8)
    with torch.no_grad():
        expected, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=10)
        cache.activate_past_recording()
        model(ids[:, :6], past_key_values=cache)
        cache.crop(-2)
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache).logits, expected[:, 4:])


@pytest.mark.parametrize("mixture", ["gateloop first", "attention first"])
def test_what_a_static_cache_cannot_do_changes_no_layer(mixture):
    model, ids = decoder(mixture), tokens(2, 8)
    with torch.no_grad():
        expected, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=10)
        model(ids[:, :6], past_key_values=cache)
        for attempt in (
            lambda: cache.crop(-1),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with pytest.raises((AttributeError, RuntimeError), match=r"StaticLayer|0 were recorded since"):
                attempt()
        with pytest.raises(ValueError, match="has room for 10 tokens; 6 are in it, and 5 more do not fit"):
            model(tokens(2, 5), past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, expected[:, 6:])


@pytest.mark.parametrize("mixture", ["pure", "gateloop first", "attention first", "rwkv"])
def test_another_number_of_sequences_than_the_cache_holds_is_refused_and_changes_nothing(mixture):
    model, ids = decoder(mixture), tokens(2, 8)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        for others in (ids[:1, 6:], tokens(3, 1)):
            with pytest.raises((ValueError, RuntimeError), match=r"holds 2 sequences, the input|Sizes of tensors"):
                model(others, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [6, 6]
        torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, model(ids).logits[:, 6:])


def test_the_cache_of_another_decoder_is_refused_and_stays_as_it_was():
    ids = tokens(2, 6)
    names = ["pure", "gateloop first", "attention first", "reversible", "rwkv"]
    models = {name: decoder(name) for name in names}
    models["attention"] = decoder("pure", layer_types=["full_attention"] * 2)
    models["three"] = decoder("pure", num_hidden_layers=3, layer_types=["gateloop"] * 3)
    with torch.no_grad():
        for giver in models.values():
            cache = giver(ids, use_cache=True).past_key_values
            before = copy.deepcopy(cache)
            for taker in models.values():
                if taker is not giver:
                    with pytest.raises(ValueError, match=r"The cache (holds|has).*DynamicCache\(config=model.config\)"):
                        taker(ids, past_key_values=cache)
            expected = giver(ids, past_key_values=before).logits
            assert torch.equal(giver(ids, past_key_values=cache).logits, expected)


def test_the_cache_of_a_pure_model_does_not_grow_and_can_be_used_again():
    model, ids = decoder("pure"), tokens(1, 60)

    def size(cache):
        return sum(layer.state.numel() for layer in cache.layers)

    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        before = size(cache)
        model(ids[:, 2:], past_key_values=cache)
        assert (size(cache), cache.get_seq_length()) == (before, 60)
        model(ids.repeat(1, 3), past_key_values=cache)  # past max_position_embeddings, which it does not have
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@every_mixture
def test_a_batch_that_is_repeated_reordered_and_thinned_out_takes_its_state_along(mixture):
    model, ids = decoder(mixture), tokens(3, 8)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, 5:6], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([5, 4, 2, 2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2, 4]))
        rows = [2, 1, 0]
        expected = model(ids[rows]).logits
        torch.testing.assert_close(model(ids[rows, 6:], past_key_values=cache).logits, expected[:, 6:])
        cache.crop(-2)
        torch.testing.assert_close(model(ids[rows, 6:], past_key_values=cache).logits, expected[:, 6:])


@every_mixture
def test_masks_that_cannot_tell_what_is_padding_are_refused(mixture):
    model, ids = decoder(mixture), tokens(2, 5)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 1, 5, 5\]; layers with a state need \[batch, past"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 3\]; .* here \[2, 5 \+ 3\]"):
        model(ids[:, :3], attention_mask=torch.ones(2, 3), past_key_values=cache)


@every_mixture
def test_layers_with_a_state_need_a_mask_of_past_and_new_tokens(mixture):
    model, ids = decoder(mixture), tokens(2, 9)
    for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)):
        cache = make(config=model.config)
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
            for mask in (torch.ones(2, 16), torch.ones(2, 4), torch.ones(1, 9), torch.ones(9), torch.ones(2, 1, 4, 9)):
                with pytest.raises(
                    ValueError, match=r"attention_mask is \[.*\]; layers with a state need .* \[2, 5 \+ 4"
                ):
                    model(ids[:, 5:], attention_mask=mask, past_key_values=cache)
            expected = model(ids).logits[:, 5:]
            torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, expected)


@every_mixture
@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, "halves"])
def test_all_that_is_not_zero_in_a_mask_is_a_token(kind, mixture):
    model, ids, mask = decoder(mixture), tokens(2, 9), torch.ones(2, 9)
    mask[1, :3] = 0
    other = mask / 2 if kind == "halves" else mask.to(kind)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long()).logits
        assert torch.equal(model(ids, attention_mask=other).logits[mask.bool()], expected[mask.bool()])
        cache = model(ids[:, :5], attention_mask=other[:, :5], use_cache=True).past_key_values
        found = model(ids[:, 5:], attention_mask=other, past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, 5:])


@every_mixture
def test_what_cannot_be_generated_is_refused_at_once(mixture):
    model, ids = decoder(mixture), tokens(1, 5)
    with pytest.raises(NotImplementedError, match="cannot carry the model's state"):
        model.generate_batch([[1, 2, 3]])
    if mixture.startswith(("gateloop", "attention")):
        with pytest.raises(ValueError, match=r"may become 69 tokens.*max_position_embeddings is 64"):
            generate(model, ids, max_new_tokens=64)
    else:
        assert generate(model, ids, max_new_tokens=64, min_new_tokens=64).shape[1] == 69


@pytest.mark.parametrize("mixture", few(MIXTURES, ["reversible, forgetting"]))
def test_a_compiled_training_step_has_no_graph_breaks_and_the_same_gradients(mixture):
    torch.compiler.reset()  # For fear of the limit on how often one function is compiled.
    ids, gradients = tokens(2, 11), []
    for compiled in (False, True):
        model = decoder(mixture).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced)


@every_mixture
def test_labels_and_hidden_states_are_those_of_a_causal_language_model(mixture):
    model, ids = decoder(mixture), tokens(2, 9)
    out = model(ids, labels=ids, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    logits = model(changed).logits
    torch.testing.assert_close(logits[:, :6], out.logits[:, :6])
    assert not torch.allclose(logits[:, 6:], out.logits[:, 6:])


@pytest.mark.parametrize("mixture", ["pure", "reversible", "reversible, forgetting", "rwkv"])
def test_in_pieces_gradients_are_those_of_the_whole(mixture):
    model, ids = decoder(mixture), tokens(2, 11)
    model(ids, use_cache=False).logits.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(3, 1)]
    torch.cat(pieces, 1).square().sum().backward()
    for whole, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, whole, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mixture", ["reversible", "reversible, forgetting", "rwkv"])
@pytest.mark.parametrize("feedback", ["gated_add", "glu"])
def test_a_stateful_gpt_around_reversible_layers_is_solved_and_trained_as_it_is_stepped(mixture, feedback):
    backbone, ids = decoder(mixture), tokens(2, 9)
    model = StatefulGPTForCausalLM.from_backbone(backbone, feedback=feedback, training_solver="sequential")
    with torch.no_grad():
        for parameter in model.model.feedback.parameters():
            parameter.normal_(std=0.3)
        solved = model.eval()(ids, solver="jacobi").logits
        torch.testing.assert_close(solved, model(ids, solver="sequential").logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    gradients = []
    for how in ({"solver": "sequential"}, {"solver": "jacobi", "num_passes": 9}):
        last = model.train().model(ids, use_cache=False, **how).pass_hidden_states[-1]
        model.lm_head(last).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for stepped, passed in zip(*gradients, strict=True):
        assert (stepped - passed).norm() <= 1e-5 * stepped.norm() + 1e-8


@pytest.mark.parametrize("mixture", ["pure", "reversible", "reversible, forgetting", "rwkv"])
def test_cropping_remembers_which_tokens_were_padding(mixture):
    model, ids = decoder(mixture), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 5:7] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, 8:]
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        for start, end in ((0, 4), (4, 8)):
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        wrong = torch.cat([mask, torch.ones_like(mask[:, :2])], 1)[:, :10]
        model(tokens(2, 2, seed=1), attention_mask=wrong, past_key_values=cache)
        cache.crop(-2)
        found = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
