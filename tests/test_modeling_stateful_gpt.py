"""The invariants: what must hold for every fusion, backbone, padding side and length, in fp64 and fp32."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BACKBONES, FUSIONS, LLAMA_LIKE, VOCAB, shared, stateful, text_config, tokens, tolerance
from torch.nn.functional import linear, pad
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen3ForCausalLM,
)

from modeling_stateful_gpt import GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.modeling_stateful_gpt import LanguageModelRecurrence
from modeling_stateful_gpt.solvers import jacobi, sequential

DTYPES = [torch.float64, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def padded(batch, length, pads, side):
    """Token ids `[batch, length + max(pads)]` with junk on the padding, the mask, and each row's real positions."""
    width = length + max(pads)
    ids, mask = tokens(batch, width), torch.zeros(batch, width, dtype=torch.long)
    real = []
    for row, n in enumerate(pads):
        if side == "left":
            real.append(torch.arange(n, width))
        elif side == "right":
            real.append(torch.arange(width - n))
        else:  # a hole in the middle
            real.append(torch.cat([torch.arange(length // 2), torch.arange(length // 2 + n, length + n)]))
        mask[row, real[-1]] = 1
    return ids, mask, real


def targets(ids, mask):
    """Labels on real tokens but each row's first, which padding would have to predict."""
    first = mask.argmax(1, keepdim=True) == torch.arange(ids.shape[1])
    return ids.masked_fill((mask == 0) | first, -100)


def states(model, ids, **kwargs):
    with torch.no_grad():
        return model.model(ids, **kwargs).last_hidden_state


def stepped(model, ids, **kwargs):
    """The reference: the recurrence stepped token by token."""
    return states(model, ids, solver="sequential", **kwargs)


@every_dtype
@every_backbone
@pytest.mark.parametrize("solver", ["jacobi", "sequential"])
def test_without_feedback_it_is_the_language_model_bit_for_bit(backbone, dtype, solver):
    model = shared(backbone, dtype, feedback=None, solver=solver)
    ids, mask, _ = padded(2, 7, [0, 3], "left")
    for kwargs in ({}, {"attention_mask": mask}, {"num_passes": 3}):
        with torch.no_grad():
            own = {k: v for k, v in kwargs.items() if k != "num_passes"}
            expected = model.model.language_model(ids, **own).last_hidden_state
            assert torch.equal(model(ids, **kwargs).logits, model.lm_head(expected))


@every_dtype
@every_backbone
@every_fusion
@given(
    st.integers(1, 13), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["left", "right", "hole"])
)
def test_padding_changes_no_real_token_and_solving_is_stepping(fusion, backbone, dtype, length, pads, side):
    model = shared(backbone, dtype, feedback=fusion)
    ids, mask, real = padded(len(pads), length, pads, side)
    solved, by_steps = states(model, ids, attention_mask=mask), stepped(model, ids, attention_mask=mask)
    for row, where in enumerate(real):
        alone = stepped(model, ids[row : row + 1, where])[0]
        torch.testing.assert_close(solved[row, where], alone, **tolerance(dtype))
        torch.testing.assert_close(by_steps[row, where], alone, **tolerance(dtype))


@every_dtype
@every_backbone
@every_fusion
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(0, 4), min_size=1, max_size=2))
def test_a_prompt_in_pieces_is_the_prompt_at_once(fusion, backbone, dtype, pieces, pads):
    model = shared(backbone, dtype, feedback=fusion)
    ids, mask, real = padded(len(pads), sum(pieces), pads, "left")
    pieces = [pieces[0] + max(pads), *pieces[1:]]
    whole, cache, parts, end = stepped(model, ids, attention_mask=mask), None, [], 0
    for piece in pieces:
        start, end = end, end + piece
        with torch.no_grad():
            out = model.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.last_hidden_state)
    for row, where in enumerate(real):
        torch.testing.assert_close(torch.cat(parts, 1)[row, where], whole[row, where], **tolerance(dtype))


@every_dtype
@every_backbone
@every_fusion
@given(st.integers(2, 12), st.data())
def test_no_evaluation_leaks_the_future(fusion, backbone, dtype, length, data):
    model = shared(backbone, dtype, feedback=fusion)
    changed = data.draw(st.integers(1, length - 1))
    ids = tokens(1, length)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    for kwargs in ({}, {"num_passes": 1}, {"num_passes": 2}, {"num_passes": 4}):
        a, b = states(model, ids, **kwargs), states(model, other, **kwargs)
        torch.testing.assert_close(a[:, :changed], b[:, :changed], **tolerance(dtype))
        assert not torch.allclose(a[:, changed], b[:, changed])
    a, b = stepped(model, ids), stepped(model, other)
    torch.testing.assert_close(a[:, :changed], b[:, :changed], **tolerance(dtype))


@every_dtype
@every_backbone
@every_fusion
def test_packed_sequences_do_not_see_their_neighbours_state(fusion, backbone, dtype):
    model = shared(backbone, dtype, feedback=fusion)
    ids, cuts = tokens(1, 12), (0, 5, 6, 12)
    # The last sequence goes on from elsewhere: what does not follow its predecessor is another sequence, too.
    positions = torch.cat([torch.arange(b - a) + (20 if a == 6 else 0) for a, b in pairwise(cuts)])[None]
    for evaluate in (states, stepped):
        packed = evaluate(model, ids, position_ids=positions, use_cache=False)
        for a, b in pairwise(cuts):
            alone = stepped(model, ids[:, a:b], position_ids=positions[:, a:b])
            torch.testing.assert_close(packed[:, a:b], alone, **tolerance(dtype))


@every_dtype
@every_backbone
@every_fusion
def test_gradients_of_the_solved_recurrence_are_those_of_backpropagation_through_time(fusion, backbone, dtype):
    model = stateful(backbone, dtype, feedback=fusion)
    ids, mask, _ = padded(2, 7, [0, 2], "left")
    labels = targets(ids, mask)
    gradients = []
    for solver in ("jacobi", "sequential"):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, solver=solver).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if dtype == torch.float32:
            bound = {"atol": 1e-3, "rtol": 1e-2}
        elif backbone in ("llama", "qwen3"):  # their norms round to fp32 whatever the model's type
            bound = {"atol": 1e-6, "rtol": 1e-4}
        else:
            bound = {"atol": 1e-10, "rtol": 1e-8}
        torch.testing.assert_close(gradient, gradients[1][name], **bound, msg=lambda m, n=name: f"{n}: {m}")


@every_backbone
@every_fusion
def test_the_feedback_is_felt_and_k_passes_are_exact_for_the_first_k_positions(fusion, backbone):
    model, ids = shared(backbone, feedback=fusion), tokens(2, 9)
    exact = stepped(model, ids)
    for k in (1, 2, 5):
        passes = states(model, ids, num_passes=k)
        torch.testing.assert_close(passes[:, :k], exact[:, :k], **tolerance(torch.float64))
        assert not torch.allclose(passes[:, k], exact[:, k], atol=1e-6)
    solved, before = model.model(ids), states(model, ids, num_passes=8)
    assert solved.passes == 9
    assert solved.residual == pytest.approx((solved.last_hidden_state - before).abs().max().item())
    assert model(ids, num_passes=3).passes == 3


@pytest.mark.parametrize("depth", range(5))
@every_dtype
def test_the_seeds_own_model_written_out(dtype, depth):
    """Stateful GPT as its author wrote it down: pass 0 plain, each further pass enriched with the states of the one
    before, shifted by one; then GPT-2's blocks, here in plain torch."""
    config = GPT2Config(
        vocab_size=VOCAB, activation_function="relu", n_positions=33, n_embd=64, n_head=8, n_layer=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config, feedback="gated_add")).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    w = {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}
    ids = tokens(3, 33)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"language_model.{name}.weight"] + w[f"language_model.{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"language_model.{name}.weight"] + w[f"language_model.{name}.bias"]

    def fusion_linear(x, name):
        return linear(x, w[f"feedback.{name}.weight"], w[f"feedback.{name}.bias"])

    e = w["language_model.wte.weight"][ids]
    future = torch.ones(33, 33, dtype=torch.bool).triu(1)
    h = None
    for _ in range(depth + 1):
        x = e
        if h is not None:
            before = h[:, :-1]
            gate = (fusion_linear(before, "key") * fusion_linear(e[:, 1:], "query")).clamp(min=0)
            x = e + pad(fusion_linear(before, "value") * gate, (0, 0, 1, 0))
        x = x + w["language_model.wpe.weight"]
        for block in ("h.0", "h.1"):
            q, k, v = (
                t.unflatten(-1, (8, 8)).transpose(1, 2)
                for t in conv1d(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(64, -1)
            )
            scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(future, float("-inf"))
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + conv1d(mixed, f"{block}.attn.c_proj")
            x = x + conv1d(conv1d(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc").relu(), f"{block}.mlp.c_proj")
        h = norm(x, "ln_f")

    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(states(model, ids, num_passes=depth + 1), h, atol=bound, rtol=bound)
    training = model.train()
    for module in training.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    every_pass = training.model(ids, num_passes=depth + 1).pass_hidden_states
    assert len(every_pass) == depth + 1
    torch.testing.assert_close(every_pass[-1].detach(), h, atol=bound, rtol=bound)


def test_the_token_shift_control_is_one_pass_and_reads_only_the_previous_token():
    model, ids = shared("gateloop-nope", feedback_source="embedding"), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    shifted = torch.cat([embeds[:, :1], model.model.feedback(embeds[:, 1:], embeds[:, :-1])], dim=1)
    expected = model.model.language_model(inputs_embeds=shifted).last_hidden_state.detach()
    for evaluate in (states, stepped):
        torch.testing.assert_close(evaluate(model, ids), expected)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    for t in range(4, 9):
        out = model.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.last_hidden_state[:, 0].detach(), expected[:, t])


def test_a_fixed_number_of_prefill_passes_replaces_the_tolerance():
    model, ids = stateful(prefill_passes=3), tokens(2, 9)
    assert torch.equal(states(model, ids), states(model, ids, num_passes=3))
    cache = model(ids, use_cache=True).past_key_values
    out = model(ids[:, :1], past_key_values=cache)
    assert out.passes == 1, "a single token is stepped"


def test_in_training_mode_a_cache_is_decoded_with_as_in_eval_mode():
    model, ids = stateful(pass_probabilities=[0.5, 0.5], feedback="glu"), tokens(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model.generate(ids, **options), expected)
    assert model.model.batches_seen == 0


def test_recorded_states_and_attentions_are_those_of_the_solution():
    model = stateful(feedback="glu")
    model.set_attn_implementation("eager")
    ids, flags = tokens(2, 6), {"output_hidden_states": True, "output_attentions": True}
    for solver in ("jacobi", "sequential"):
        out = model(ids, solver=solver, **flags)
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
        assert [h.shape for h in out.hidden_states] == [(2, 6, 32)] * 3
        assert [a.shape for a in out.attentions] == [(2, 4, 6, 6)] * 2


def test_input_embeddings_may_be_given_instead_of_tokens():
    model, ids = shared(feedback="glu"), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


# Training


def train(**config):
    return stateful(**{"num_passes": 3, **config}).train()


def test_the_loss_is_the_mean_over_the_passes_and_each_is_reported():
    model, ids = train(), tokens(2, 9)
    out = model(ids, labels=ids)
    assert out.pass_losses.shape == (3,)
    torch.testing.assert_close(out.loss.detach(), out.pass_losses.mean())
    model.eval()
    for k in (1, 2, 3):
        torch.testing.assert_close(model(ids, labels=ids, num_passes=k).loss.detach(), out.pass_losses[k - 1])


def test_the_loss_follows_transformers_normalisation_over_accumulated_batches():
    model, ids = train(), tokens(4, 9)
    items = torch.tensor(4 * 8)
    halves = sum(model(part, labels=part, num_items_in_batch=items).loss for part in ids.split(2))
    torch.testing.assert_close(halves, model(ids, labels=ids).loss)


def test_gradients_go_through_the_passes_unless_detached():
    ids = tokens(2, 9)

    def gradients(model):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    through, detached = gradients(train()), gradients(train(detach_between_passes=True))
    plain_passes = []
    model = train()
    previous = None
    for _ in range(3):
        # The detached recipe by hand: every pass is a plain batch whose inputs are constants.
        model.zero_grad()
        e = model.get_input_embeddings()(ids).detach()
        inputs = e
        if previous is not None:
            inputs = torch.cat([e[:, :1], model.model.feedback(e[:, 1:], previous[:, :-1])], dim=1)
        h = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        previous = h.detach()
        model.loss_function(model.lm_head(h), ids, VOCAB).backward()
        plain_passes.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in detached.items():
        by_hand = sum(passed.get(name, torch.zeros(())) for passed in plain_passes) / 3
        torch.testing.assert_close(gradient, by_hand)
    name = "model.feedback.value.weight"
    assert not torch.allclose(through[name], detached[name])


def test_pass_counts_are_drawn_from_their_probabilities_and_reproducible(tmp_path):
    probabilities = [0.5, 0.3, 0.2]

    def draw(model, n):
        return [model.model.draw_num_passes() for _ in range(n)]

    model = train(pass_probabilities=probabilities)
    torch.manual_seed(1)
    drawn = draw(model, 400)
    assert [drawn.count(k) / 400 for k in (1, 2, 3)] == pytest.approx(probabilities, abs=0.07)
    other = train(pass_probabilities=probabilities)
    torch.manual_seed(2)  # another process may be anywhere in its random numbers
    assert draw(other, 400) == drawn
    assert draw(train(pass_probabilities=probabilities, pass_seed=1), 400) != drawn

    other.save_pretrained(tmp_path)  # a resumed run goes on where it was
    resumed = StatefulGPTForCausalLM.from_pretrained(tmp_path)
    assert draw(resumed, 50) == draw(model, 50)

    ids = tokens(1, 5)
    counts = [len(model(ids, labels=ids).pass_losses) for _ in range(20)]
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("share", [True, False])
def test_dropout_masks_are_the_same_in_every_pass_if_shared(share):
    model = train(share_dropout_masks=share)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    # Without feedback the passes differ by their dropout masks alone.
    for name in ("weight", "bias"):
        getattr(model.model.feedback.value, name).data.zero_()
    first, second, third = model.model(tokens(2, 9)).pass_hidden_states
    assert torch.equal(first, second) == torch.equal(first, third) == share
    again = model.model(tokens(2, 9)).pass_hidden_states[0]
    assert not torch.equal(first, again), "the next batch has masks of its own"


def test_noise_is_added_to_what_is_fed_back_only_in_training():
    ids = tokens(2, 9)
    noisy, clean = train(feedback_noise=0.5), train()
    torch.manual_seed(1)
    a, b = noisy.model(ids).pass_hidden_states, clean.model(ids).pass_hidden_states
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])
    assert torch.equal(a[1][:, 0], b[1][:, 0]), "the first position has nothing fed back"
    torch.testing.assert_close(noisy.eval()(ids).logits, clean.eval()(ids).logits)


def test_a_plain_prefix_reads_no_state():
    ids = tokens(64, 9)
    mixed, clean = train(prefix_mixin=1.0), train()
    torch.manual_seed(1)
    first, second, _ = mixed.model(ids).pass_hidden_states
    plain, fed, _ = clean.model(ids).pass_hidden_states
    assert torch.equal(first, plain)
    same_as_plain = (second == plain).all(-1).long().cummin(1).values.sum(1)
    assert set(same_as_plain.tolist()) == set(range(1, 10)), "prefixes of every length"
    whole = [row for row, n in enumerate(same_as_plain) if n == 1]
    torch.testing.assert_close(second[whole], fed[whole])


def test_padding_in_training_leaves_gradients_finite_and_equal():
    ids, mask, (real,) = padded(1, 7, [4], "left")
    ones = torch.ones(1, 7, dtype=torch.long)
    gradients = []
    for i, m in ((ids, mask), (ids[:, real], ones)):
        model = train()
        model(i, attention_mask=m, labels=targets(i, m)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Configuration, tying, and what is refused


@pytest.mark.parametrize("tied", [True, False])
@every_backbone
def test_the_head_is_tied_whatever_the_backbone_calls_its_embedding(backbone, tied, tmp_path):
    config = text_config(backbone)
    config.tie_word_embeddings = tied
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config))
    model.save_pretrained(tmp_path)
    loaded = StatefulGPTForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert (m.lm_head.weight is m.get_input_embeddings().weight) == tied
        assert m.get_input_embeddings() is m.model.language_model.get_input_embeddings()
    assert torch.equal(loaded(tokens(1, 5)).logits, model.eval()(tokens(1, 5)).logits)
    loaded.resize_token_embeddings(VOCAB + 3)
    assert loaded.config.vocab_size == VOCAB + 3 == loaded(tokens(1, 5)).logits.shape[-1]


@every_backbone
def test_clients_find_the_usual_fields_at_the_top_level(backbone):
    config = StatefulGPTConfig(text_config=text_config(backbone))
    read = [config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads]
    assert [*read, config.max_position_embeddings] == [VOCAB, 32, 2, 4, 64]
    assert config.get_text_config() is config.text_config


def test_the_default_is_a_small_plain_gpt_with_feedback():
    config = StatefulGPTConfig()
    assert set(config.text_config.layer_types) == {"full_attention"} and config.feedback == "gated_add"
    assert isinstance(AutoModelForCausalLM.from_config(config), StatefulGPTForCausalLM)


@pytest.mark.parametrize("feedback", ["gated_add", "correction"])
@pytest.mark.parametrize(
    "backbone,model_class",
    [
        ("gateloop", GateLoopForCausalLM),
        ("gpt2", GPT2LMHeadModel),
        ("llama", LlamaForCausalLM),
        ("qwen3", Qwen3ForCausalLM),
    ],
)
def test_put_around_a_trained_model_it_starts_out_computing_the_same(backbone, model_class, feedback, tmp_path):
    torch.manual_seed(0)
    plain = model_class(text_config(backbone)).eval()
    plain.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    expected = plain(ids).logits
    for given_as in (plain, str(tmp_path)):
        model = StatefulGPTForCausalLM.from_backbone(given_as, feedback=feedback)
        assert torch.equal(model(ids).logits, expected)
        model.save_pretrained(tmp_path / "stateful")
        assert torch.equal(StatefulGPTForCausalLM.from_pretrained(tmp_path / "stateful")(ids).logits, expected)
        model.train()(ids, labels=ids, num_passes=2).loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.model.feedback.parameters())


def test_the_backbone_attends_as_it_did_before():
    plain = LlamaForCausalLM._from_config(text_config("llama"), attn_implementation="eager")
    model = StatefulGPTForCausalLM.from_backbone(plain)
    assert plain.config._attn_implementation == "eager"
    assert model(tokens(1, 5), output_attentions=True).attentions[0].shape == (1, 4, 5, 5)


@pytest.mark.parametrize(
    "config,message",
    [
        (MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1), "MambaModel cannot take feedback"),
        (OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=2), "OpenAIGPTModel cannot take feedback"),
        (BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "not causal"),
        (Lfm2Config(**LLAMA_LIKE, layer_types=["conv", "full_attention"]), "recurrent or convolution layers"),
        (
            OPTConfig(vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
                      num_attention_heads=2),
            "embeds tokens 16 wide",
        ),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_be_solved_around_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config))


def test_what_is_no_plain_language_model_is_refused_as_a_backbone():
    for other in (shared(), shared("llama").model.language_model):
        with pytest.raises(ValueError, match="not a plain language model with a head"):
            StatefulGPTForCausalLM.from_backbone(other)


def test_a_backbone_whose_head_does_more_is_refused():
    granite = GraniteForCausalLM(GraniteConfig(**LLAMA_LIKE, logits_scaling=8.0))
    with pytest.raises(ValueError, match="GraniteForCausalLM does more in its head"):
        StatefulGPTForCausalLM.from_backbone(granite)


@pytest.mark.parametrize(
    "config,message",
    [
        ({"feedback": "concat"}, r"'concat' does not exist; choose from \['correction', 'gated_add', 'glu'\]"),
        ({"feedback_source": "logits"}, "must be 'hidden_state' or 'embedding'"),
        ({"num_passes": 0}, "num_passes is 0; it must be at least 1"),
        ({"prefill_passes": 0}, "prefill_passes is 0; it must be at least 1"),
        ({"pass_probabilities": [0.5, 0.4]}, "must sum to 1"),
        ({"pass_probabilities": []}, "must sum to 1"),
        ({"solver": "newton"}, r"'newton' does not exist; choose from \['jacobi', 'sequential'\]"),
        ({"prefix_mixin": 1.5}, "prefix_mixin is a probability"),
        ({"feedback_noise": -1.0}, "standard deviation"),
        ({"tolerance": -1.0}, "must be at least 0"),
        ({"tolerance": float("nan")}, "must be at least 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(config, message):
    with pytest.raises(Exception, match=message):
        StatefulGPTConfig(**config)


@every_backbone
def test_bad_input_is_refused_by_name(backbone):
    model = shared(backbone)
    with pytest.raises(ValueError, match="num_passes is 0; it must be at least 1"):
        model(tokens(1, 5), num_passes=0)
    if backbone == "gateloop-pure":
        model(tokens(1, 65))  # It has no positions that could run out.
    else:
        with pytest.raises(ValueError, match="max_position_embeddings is 64"):
            model(tokens(1, 65))
    with pytest.raises(IndexError, match=f"contains {VOCAB}.*{VOCAB} tokens"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(ValueError, match="'newton' does not exist"):
        model(tokens(1, 5), solver="newton")
    with pytest.raises(ValueError, match="has no tokens"):
        model(tokens(1, 0))
    with pytest.raises(ValueError, match="all padding"):
        model(tokens(1, 5), attention_mask=torch.zeros(1, 5, dtype=torch.long))


def test_an_interrupted_solve_leaves_the_cache_as_it_was():
    model, ids = stateful(), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        expected = stepped(model, ids)[:, 3:]
        sweep, calls = LanguageModelRecurrence.sweep, []

        def interrupted(self, states):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sweep(self, states)

        LanguageModelRecurrence.sweep = interrupted
        try:
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 3:], past_key_values=cache)
        finally:
            LanguageModelRecurrence.sweep = sweep
        torch.testing.assert_close(model.model(ids[:, 3:], past_key_values=cache).last_hidden_state, expected)


def test_the_solvers_see_the_models_recurrence_as_any_other():
    model, ids = shared(), tokens(2, 7)
    with torch.no_grad():
        make = lambda: LanguageModelRecurrence(  # noqa: E731
            model.model, model.get_input_embeddings()(ids), None, None, None
        )
        torch.testing.assert_close(jacobi(make()).hidden_states, sequential(make()).hidden_states)
