"""The same tokens, whichever way the same computation is cut up."""

import copy
import pickle

import pytest
import torch
from data import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import BACKBONES, FUSIONS, LLAMA_LIKE, VOCAB, models, shared, stateful, tokens
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    MistralConfig,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.cache import last_hidden_state_layer

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
NEW = 10
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.5},
}


def generate(model, ids, **options):
    set_seed(0)
    # With a mask given, token 0 counts as padding only where the mask says so.
    defaults = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False, "max_new_tokens": NEW}
    return model.generate(ids, **{**defaults, **options})


def stepped_greedily(model, ids):
    """The reference: no cache, no solver, the whole sequence stepped anew for every token."""
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(ids, use_cache=False, solver="sequential").logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@every_backbone
@every_fusion
def test_greedy_decoding_is_the_exact_recurrence_and_not_the_plain_model(fusion, backbone):
    model, ids = shared(backbone, feedback=fusion), tokens(8, 5)
    expected = stepped_greedily(model, ids)
    assert torch.equal(generate(model, ids), expected)
    assert not torch.equal(generate(model, ids, num_passes=1), expected)


@pytest.mark.client("transformers", "`generate()`: greedy, sampling, beams, prefill in pieces")
@given(models(dtypes=[torch.float64]), st.sampled_from(sorted(MODES)), st.integers(1, 7))
def test_every_mode_gives_the_same_tokens_with_and_without_a_cache_and_in_pieces(drawn, mode, chunk):
    model, ids = shared(**drawn), tokens(2, 7)
    at_once = generate(model, ids, **MODES[mode])
    assert torch.equal(generate(model, ids, **MODES[mode], use_cache=False), at_once)
    assert torch.equal(generate(model, ids, **MODES[mode], prefill_chunk_size=chunk), at_once)
    assert torch.equal(generate(model, ids, **MODES[mode], solver="sequential"), at_once)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, ids, inputs_embeds=embeds, **MODES[mode])[:, -NEW:], at_once[:, -NEW:])


@every_backbone
def test_each_decode_mode_generates_what_it_says(backbone):
    model, ids = shared(backbone, feedback="glu"), tokens(2, 7)
    for mode, passes in (("plain_prompt", 1), ("passes", 2)):
        with torch.no_grad():
            out = model(ids, num_passes=passes, use_cache=True)
            sequence = ids
            for _ in range(NEW):
                sequence = torch.cat([sequence, out.logits[:, -1:].argmax(-1)], 1)
                out = model(sequence[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        assert torch.equal(generate(model, ids, decode_mode=mode), sequence)
    assert torch.equal(generate(model, ids, decode_mode="no_feedback"), generate(model, ids, num_passes=1))
    assert torch.equal(generate(model, ids, decode_mode="solved"), stepped_greedily(model, ids))


@pytest.mark.client("transformers", "`generate()`: left-padded batches")
@every_backbone
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_left_padded_prompts_of_different_lengths_generate_as_each_alone(mode, backbone):
    model = shared(backbone, feedback="glu", solver=None)
    lengths, width = [7, 2, 5], 7
    ids, mask = tokens(3, width), torch.ones(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    together = generate(model, ids, attention_mask=mask, **MODES[mode])
    in_pieces = generate(model, ids, attention_mask=mask, **MODES[mode], prefill_chunk_size=2)
    assert torch.equal(in_pieces, together)
    returns = len(together) // 3
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, width - length :], **MODES[mode])
        for i in range(returns):
            assert torch.equal(together[row * returns + i, width:], alone[i, length:])


@every_backbone
@pytest.mark.parametrize(
    "make_cache", [None, lambda config: DynamicCache(), lambda config: DynamicCache(config=config)]
)
def test_generation_goes_on_from_a_returned_cache(make_cache, backbone):
    model, ids = shared(backbone, feedback="glu"), tokens(2, 5)
    whole = generate(model, ids)
    cache = make_cache(model.config) if make_cache else None
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True, past_key_values=cache)
    second = generate(model, first.sequences, max_new_tokens=NEW - 4, past_key_values=first.past_key_values)
    assert torch.equal(second, whole)


@pytest.mark.client("transformers", "`generate()`: static caches")
@every_backbone
def test_a_static_cache_gives_the_same_tokens(backbone):
    model, ids = shared(backbone, feedback="glu"), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for kwargs in ({}, {"attention_mask": mask}, {"prefill_chunk_size": 3}):
        expected = generate(model, ids, **kwargs)
        assert torch.equal(generate(model, ids, cache_implementation="static", **kwargs), expected)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


@pytest.mark.client("transformers", "`generate()`: prompt lookup, assisted decoding")
@given(models(dtypes=[torch.float64]), st.booleans())
def test_prompt_lookup_and_assisted_decoding_are_exact(drawn, do_sample):
    model, drafter = shared(**drawn), shared(**drawn, solver="sequential")
    other = shared("llama", feedback="correction")
    ids = tokens(1, 4).repeat(1, 3)
    # Sampling from the one best token: accepting drafts goes another way, the text must be the same.
    options = {"do_sample": True, "top_k": 1} if do_sample else {}
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(generate(model, ids, assistant_model=drafter, **options), expected)
    assert torch.equal(generate(model, ids, assistant_model=other, **options), expected)


@pytest.mark.parametrize("how", [{"decode_mode": "no_feedback"}, {"decode_mode": "solved"}, {"solver": "sequential"}])
def test_a_plain_model_may_draft_however_the_stateful_one_is_evaluated(how):
    model, ids = shared("llama", feedback="glu"), tokens(1, 4).repeat(1, 3)
    drafter = LlamaForCausalLM(model.config.text_config).double()
    assert torch.equal(generate(model, ids, assistant_model=drafter, **how), generate(model, ids, **how))


@pytest.mark.parametrize("backbone", ["gateloop", "llama"])
def test_early_exit_drafts_are_exact_and_leave_the_model_as_it_was(backbone):
    model, ids = shared(backbone, feedback="glu"), tokens(1, 6)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, assistant_early_exit=1), expected)
    assert torch.equal(generate(model, ids), expected)


@every_backbone
def test_a_stateful_model_may_draft_for_a_plain_one(backbone):
    plain, drafter = shared(backbone, feedback=None), shared(backbone, feedback="glu")
    ids = tokens(1, 6)
    assert torch.equal(generate(plain, ids, assistant_model=drafter), generate(plain, ids))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_state_in_the_cache_is_one_vector_however_long_the_prompt(batch):
    model = shared("llama")
    with torch.no_grad():
        cache = model(tokens(batch, 20), use_cache=True).past_key_values
    storage = last_hidden_state_layer(cache, model.config.text_config).keys.untyped_storage()
    assert storage.nbytes() == batch * model.config.hidden_size * 8


def test_cropping_while_the_past_is_recorded_restores_the_state_exactly():
    model, ids = shared(feedback="glu"), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        expected = model(ids[:, 4:6], past_key_values=cache).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, [4, 7, 8]], past_key_values=cache)  # one right token, two wrong ones
        cache.crop(-2)
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(model(ids[:, 5:6], past_key_values=cache).logits, expected[:, 1:])


@every_backbone
@pytest.mark.parametrize("value", [0.5, 2, True])
def test_all_that_is_not_zero_in_a_mask_is_a_token(value, backbone):
    model, ids, mask = shared(backbone, feedback="glu"), tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    other = torch.where(mask.bool(), torch.tensor(value), torch.zeros((), dtype=torch.tensor(value).dtype))
    assert torch.equal(generate(model, ids, attention_mask=other), generate(model, ids, attention_mask=mask))


def sliding():
    """Around a language model whose own layers may refuse to be cropped."""
    torch.manual_seed(0)
    config = MistralConfig(**LLAMA_LIKE, sliding_window=4)
    return StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config, feedback="glu", tolerance=0.0)).double().eval()


@given(st.data())
def test_a_crop_is_exact_or_refused_and_then_nothing_has_changed(data):
    """Of a cache whose past is recorded from some token on: exact as far as it was, and where all is removed."""
    backbone = data.draw(st.sampled_from([*BACKBONES, "sliding"]))
    model = sliding() if backbone == "sliding" else shared(backbone, feedback="glu")
    ids, before, recorded = tokens(2, 12), data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
    recording = data.draw(st.booleans())
    length, remove = before + recorded, data.draw(st.integers(1, 12))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if before:
            model(ids[:, :before], past_key_values=cache)
        else:
            last_hidden_state_layer(cache, model.config.text_config)
        if recording:
            cache.activate_past_recording()
        model(ids[:, before:length], past_key_values=cache)
        try:
            cache.crop(-remove)
        except RuntimeError as error:
            assert "activate_past_recording" in str(error)
            assert remove > recorded or not recording
            left = length
        else:
            left = max(length - remove, 0)
            # What removes all is exact in any case.
            assert (recording and remove <= recorded) or left == 0
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {left}
        expected = model(ids, solver="sequential", use_cache=False).logits[:, left:]
        torch.testing.assert_close(model(ids[:, left:], past_key_values=cache).logits, expected)


def test_more_than_there_is_can_be_taken_back_as_llama_does_it():
    model, ids = shared("llama", feedback="glu"), tokens(1, 11)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        cache.activate_past_recording()
        cache.crop(-100)
        assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)


def test_what_copies_a_cache_keeps_refusing():
    model, ids = shared("gpt2", feedback="glu"), tokens(2, 6)
    with torch.no_grad():
        expected, cache = model(ids).logits, model(ids[:, :4], use_cache=True).past_key_values
        for duplicate in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            with pytest.raises(RuntimeError, match=r"Cannot remove 2 tokens: 0 were recorded.*activate_past_recording"):
                duplicate.crop(-2)
            torch.testing.assert_close(model(ids[:, 4:], past_key_values=duplicate).logits, expected[:, 4:])


def test_a_copy_of_a_recorded_cache_takes_tokens_back_without_a_copy_of_the_model():
    layers = ["reversible", "full_attention"]
    model, ids = GateLoopForCausalLM(GateLoopConfig(**LLAMA_LIKE, layer_types=layers)).eval(), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, 4:], past_key_values=cache)
        duplicate = copy.deepcopy(cache)
        weights = {id(p) for p in model.parameters()}
        for number, one in enumerate((duplicate, cache)):
            assert {id(p) for p in one.layers[0].recur.__self__.parameters()} <= weights
            one.crop(-2 - number)
            torch.testing.assert_close(
                model(ids[:, 7 - number :], past_key_values=one).logits, model(ids).logits[:, 7 - number :]
            )


def guided(model, ids, negative, scale, **how):
    """The reference: two decoders, of the prompt and of the negative one, whose scores are mixed."""
    caches, inputs, out = [None, None], [ids, negative], ids
    for _ in range(NEW):
        scores = []
        for number in (0, 1):
            outputs = model(inputs[number], past_key_values=caches[number], use_cache=True, **how)
            caches[number] = outputs.past_key_values
            scores.append(outputs.logits[:, -1].log_softmax(-1))
        chosen = (scale * (scores[0] - scores[1]) + scores[1]).argmax(-1, keepdim=True)
        inputs, out = [chosen, chosen], torch.cat([out, chosen], dim=1)
    return out


@pytest.mark.parametrize(
    "how",
    [{"decode_mode": mode} for mode in ("solved", "passes", "plain_prompt", "no_feedback")] + [{"num_passes": 1}],
    ids=str,
)
def test_guidance_evaluates_the_negative_prompt_as_the_prompt(how):
    model, ids, negative = shared("llama", feedback="glu"), tokens(2, 7), tokens(2, 5, seed=1)
    with torch.no_grad():
        expected = guided(model, ids, negative, 3.0, **how)
    found = generate(model, ids, guidance_scale=3.0, negative_prompt_ids=negative, **how)
    assert torch.equal(found, expected)
    other = {"decode_mode": "no_feedback" if how == {"decode_mode": "solved"} else "solved"}
    with torch.no_grad():
        assert not torch.equal(guided(model, ids, negative, 3.0, **other), expected)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "gpt2"])
def test_early_exit_is_exact_around_layers_with_a_state_too(backbone, tmp_path):
    model, ids = stateful(backbone, feedback="glu"), tokens(1, 6)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, assistant_early_exit=1), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(generate(loaded, ids), expected)


@pytest.mark.parametrize("backbone", ["gateloop-pure", "llama"])
def test_an_error_in_a_draft_leaves_the_model_as_it_was(backbone, monkeypatch):
    model, ids = stateful(backbone, feedback="glu"), tokens(1, 6)
    expected, forward = generate(model, ids), type(model).forward

    def interrupted(self, *args, **kwargs):
        if self.config.num_hidden_layers == 1:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2 and torch.equal(generate(model, ids), expected)


def test_early_exit_fails_around_gpt2_as_it_does_for_gpt2_and_changes_nothing():
    model, ids = stateful("gpt2", feedback="glu"), tokens(1, 6)
    expected = generate(model, ids)
    with pytest.raises(IndexError):
        generate(model, ids, assistant_early_exit=1)
    assert torch.equal(generate(model, ids), expected)


@every_backbone
def test_a_cache_that_another_model_has_filled_is_refused_and_stays_as_it_was(backbone):
    model, plain, ids = shared(backbone, feedback="glu"), shared(backbone, feedback=None), tokens(2, 6)
    wider = stateful(backbone, feedback="glu", dtype=torch.float32)
    config = wider.config.text_config
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.num_hidden_layers = 1
    with torch.no_grad():
        for giver, taker, message in (
            (plain, model, "6 tokens, and no last hidden state to feed back"),
            (model, plain, "holds a last hidden state to feed back, but this model has no feedback"),
            (model, wider, "The cache has 2 layers, the model 1"),
        ):
            cache, expected = giver(ids, use_cache=True).past_key_values, giver(ids.repeat(1, 2)).logits[:, 6:]
            with pytest.raises(ValueError, match=message):
                taker(ids, past_key_values=cache)
            if taker is not wider:
                with pytest.raises(ValueError, match=message):
                    generate(taker, ids.repeat(1, 2), past_key_values=cache)
            torch.testing.assert_close(giver(ids, past_key_values=cache).logits, expected)
        cache = model(ids, use_cache=True).past_key_values
        for rows in (slice(1), [0, 1, 1]):
            with pytest.raises(ValueError, match=r"The cache holds 2 sequences, the input \d"):
                model(ids[rows, :1], past_key_values=cache)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids.repeat(1, 2)).logits[:, 6:])
        for no_cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), ((ids, ids),)):
            with pytest.raises(ValueError, match=r"past_key_values is of type \w+; it must be a DynamicCache"):
                model(ids, past_key_values=no_cache)


def test_beams_reorder_the_state_with_the_keys():
    """Beam search equals scoring its own result: the returned score is the log-probability of the returned text."""
    model, ids = shared(feedback="glu"), tokens(2, 5)
    out = generate(
        model, ids, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0,
    )  # fmt: skip
    with torch.no_grad():
        logprobs = model(out.sequences).logits.log_softmax(-1)[:, 4:-1]
    chosen = logprobs.gather(-1, out.sequences[:, 5:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores.double(), chosen, atol=1e-4, rtol=1e-4)


def test_streaming_and_the_pipeline_give_the_generated_text():
    torch.manual_seed(0)
    decoder = GateLoopConfig(hidden_size=32, num_hidden_layers=1)
    model, tokenizer = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=decoder)).eval(), byte_tokenizer()
    inputs = tokenizer("Hello", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = model.generate(**inputs, streamer=streamer, max_new_tokens=8, do_sample=False)
    assert "".join(streamer) == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("Hello", max_new_tokens=8, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(ids[0])


def test_what_cannot_be_done_is_refused_with_a_reason():
    model, ids = shared(), tokens(1, 5)
    for attempt in (
        lambda: model.generate_batch([[1, 2, 3]]),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(ids, cache_implementation="paged"),
    ):
        with pytest.raises(NotImplementedError, match="cannot carry the model's state"):
            attempt()
    with pytest.raises(ValueError, match=r"may become 69 tokens.*max_position_embeddings is 64.*lower max_new_tokens"):
        generate(model, ids, max_new_tokens=64)
    for mode in ("passes", "plain_prompt"):
        for how in ({"prompt_lookup_num_tokens": 2}, {"use_cache": False}, {"prefill_chunk_size": 2}):
            with pytest.raises(ValueError, match="needs the prompt in one piece, a cache, and no drafts"):
                generate(model, ids, decode_mode=mode, **how)
    with pytest.raises(ValueError, match="initial_states are a first guess for one forward"):
        generate(model, ids, initial_states=torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="prompts are all padding"):
        generate(model, ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(IndexError, match="resize_token_embeddings"):
        generate(model, torch.tensor([[VOCAB + 1]]))


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("read", [0, 3])
def test_a_fixed_number_of_passes_leaves_the_same_state_whatever_pads_there_are(record, read):
    """In the beginning and after a past of 3 tokens, with a record to crop from and without."""
    model, ids = shared("llama", num_groups=2, training_solver="cyclic"), tokens(1, read + 9)
    logits = []
    for pads in (0, 3):
        cache, mask = DynamicCache(config=model.config), torch.ones(1, read + pads + 9, dtype=torch.long)
        mask[:, read : read + pads] = 0
        padded = torch.cat([ids[:, :read], tokens(1, pads, seed=5), ids[:, read:]], dim=1)
        with torch.no_grad():
            if read:
                model(padded[:, :read], past_key_values=cache)
            if record:
                last_hidden_state_layer(cache, model.config.text_config)
                cache.activate_past_recording()
            whole = model(padded[:, read:], attention_mask=mask, past_key_values=cache, num_passes=2).logits[:, pads:]
            if record:
                cache.crop(-2)
                mask = mask[:, :-2]
            mask = torch.cat([mask, torch.ones(1, 2, dtype=torch.long)], dim=1)
            after = model(tokens(1, 2, seed=1), attention_mask=mask, past_key_values=cache).logits
        logits.append(torch.cat([whole, after], dim=1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}])
def test_a_number_of_passes_needs_the_prompt_in_one_piece(options):
    model, ids = shared("llama"), tokens(1, 7)
    with pytest.raises(ValueError, match="num_passes=2 computes several tokens at once otherwise than one by one"):
        generate(model, ids, num_passes=2, **options)


class Mine(DynamicCache):
    """Somebody's own kind of cache."""


def test_caches_of_every_kind_refuse_as_one_and_can_be_copied():
    model, ids = shared("llama"), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :6], past_key_values=Mine(config=model.config)).past_key_values
        with pytest.raises(RuntimeError, match="Cannot remove 3 tokens"):
            cache.crop(-3)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [6] * 3 and isinstance(cache, Mine)
        expected = model(ids).logits[:, 6:]
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            torch.testing.assert_close(model(ids[:, 6:], past_key_values=copied).logits, expected)
            assert isinstance(copied, Mine)


@pytest.mark.parametrize("backbone", ["gateloop", "llama"])
def test_a_cache_with_windows_is_another_models(backbone):
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    with pytest.raises(ValueError, match="keeps a window of keys and values for layer 0, which attends to all"):
        shared(backbone)(tokens(1, 8), past_key_values=DynamicCache(config=config))
