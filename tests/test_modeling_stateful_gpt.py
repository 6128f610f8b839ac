"""The invariants: what must hold for every fusion, backbone, padding side and length, in fp64 and fp32."""

import copy
import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import (
    BACKBONES,
    DTYPES,
    FUSIONS,
    JACOBI,
    LLAMA_LIKE,
    MANY,
    VOCAB,
    WINDOWED,
    models,
    shared,
    stateful,
    text_config,
    tokens,
    tolerance,
)
from torch.nn.functional import linear, pad
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Qwen3ForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.compat import checkpointing
from modeling_stateful_gpt.evaluation import logger
from modeling_stateful_gpt.probe import why_no_groups
from modeling_stateful_gpt.recurrence import LanguageModelRecurrence
from modeling_stateful_gpt.solvers import SOLVERS, jacobi, relative_change, sequential

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
solvers = st.sampled_from(
    [{"solver": None}, {"solver": "jacobi"}] + [{"solver": "cyclic", "num_groups": n} for n in (2, 3, 8)]
)
HAVE_GROUPS = [name for name in BACKBONES if name not in ("gateloop-pure", "gateloop-hybrid")]


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


@MANY
@given(
    models(),
    st.integers(1, 13),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.sampled_from(["left", "right", "hole"]),
    solvers,
)
def test_padding_changes_no_real_token_and_solving_is_stepping(drawn, length, pads, side, solver):
    model, dtype = shared(**drawn, **solver), drawn["dtype"]
    ids, mask, real = padded(len(pads), length, pads, side)
    solved, by_steps = states(model, ids, attention_mask=mask), stepped(model, ids, attention_mask=mask)
    for row, where in enumerate(real):
        alone = stepped(model, ids[row : row + 1, where])[0]
        torch.testing.assert_close(solved[row, where], alone, **tolerance(dtype))
        torch.testing.assert_close(by_steps[row, where], alone, **tolerance(dtype))


@MANY
@given(
    models(),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=2),
    solvers,
)
def test_a_prompt_in_pieces_is_the_prompt_at_once(drawn, pieces, pads, solver):
    model, dtype = shared(**drawn, **solver), drawn["dtype"]
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


ways = st.sampled_from(
    [{}, {"solver": "jacobi"}, {"solver": "sequential"}]
    + [{"num_passes": k, "solver": solver} for k in (1, 2, 4) for solver in ("jacobi", "cyclic")]
)


@MANY
@given(models(), ways, st.integers(2, 12), st.data())
def test_no_evaluation_leaks_the_future(drawn, how, length, data):
    model = shared(**drawn, num_groups=3)
    changed = data.draw(st.integers(1, length - 1))
    ids = tokens(1, length)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    a, b = states(model, ids, **how), states(model, other, **how)
    torch.testing.assert_close(a[:, :changed], b[:, :changed], **tolerance(drawn["dtype"]))
    assert not torch.allclose(a[:, changed], b[:, changed])


@MANY
@given(models(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([0, 20]))
@example({"backbone": "llama", "feedback": "glu", "dtype": torch.float64}, [5, 1, 6], 20)
def test_packed_sequences_do_not_see_their_neighbours_state(drawn, lengths, elsewhere):
    model, dtype = shared(**drawn, num_groups=3), drawn["dtype"]
    cuts = [0, *accumulate(lengths)]
    ids = tokens(1, cuts[-1])
    # The last sequence may go on from elsewhere: what does not follow its predecessor is another sequence, too.
    positions = torch.cat(
        [torch.arange(n) + (elsewhere if i == len(lengths) - 1 else 0) for i, n in enumerate(lengths)]
    )[None]
    for solver in ("jacobi", "cyclic", "sequential"):
        packed = states(model, ids, position_ids=positions, use_cache=False, solver=solver)
        for a, b in pairwise(cuts):
            alone = stepped(model, ids[:, a:b], position_ids=positions[:, a:b])
            torch.testing.assert_close(packed[:, a:b], alone, **tolerance(dtype))


@MANY
@given(models(), st.integers(2, 9), st.lists(st.integers(0, 3), min_size=1, max_size=2))
def test_gradients_of_the_solved_recurrence_are_those_of_backpropagation_through_time(drawn, length, pads):
    model, dtype, backbone = stateful(**drawn, num_groups=3), drawn["dtype"], drawn["backbone"]
    ids, mask, _ = padded(len(pads), length, pads, "left")
    labels = targets(ids, mask)
    gradients = []
    for solver in ("sequential", "jacobi", "cyclic"):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, solver=solver).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, exact in gradients[0].items():
        if dtype == torch.float32:
            bound = {"atol": 1e-3, "rtol": 1e-2}
        elif backbone in ("llama", "qwen3"):  # their norms round to fp32 whatever the model's type
            bound = {"atol": 1e-6, "rtol": 1e-4}
        else:
            bound = {"atol": 1e-10, "rtol": 1e-8}
        for solved in gradients[1:]:
            torch.testing.assert_close(solved[name], exact, **bound, msg=lambda m, n=name: f"{n}: {m}")


@given(models(dtypes=[torch.float64]))
def test_the_feedback_is_felt_and_k_passes_are_exact_for_the_first_k_positions(drawn):
    model, ids = shared(**drawn), tokens(2, 9)
    exact = stepped(model, ids)
    for k in (1, 2, 5):
        passes = states(model, ids, num_passes=k)
        torch.testing.assert_close(passes[:, :k], exact[:, :k], **tolerance(torch.float64))
        assert not torch.allclose(passes[:, k], exact[:, k], atol=1e-6)
    solved = model.model(ids, solver="jacobi")
    assert solved.passes == 9 and solved.residual == 0.0
    assert model(ids, num_passes=3).passes == 3


@given(models(HAVE_GROUPS))
def test_cyclic_passes_carry_a_state_as_far_as_there_are_groups(drawn):
    model, ids, dtype = shared(**drawn, num_groups=3), tokens(2, 11), drawn["dtype"]
    exact = stepped(model, ids)
    for k in (1, 2, 3):
        passes = states(model, ids, num_passes=k, solver="cyclic")
        sure = max(1, 3 * (k - 1))
        torch.testing.assert_close(passes[:, :sure], exact[:, :sure], **tolerance(dtype))
        assert not torch.allclose(passes[:, sure], exact[:, sure], atol=1e-6)
    solved = model.model(ids)
    assert solved.passes == 2 + -(-11 // 3) and solved.residual == 0.0
    torch.testing.assert_close(solved.last_hidden_state.detach(), exact, **tolerance(dtype))


def cyclic_passes_written_out(model, ids, passes, num_groups):
    """What the cyclic solver does, one position at a time: each runs over the keys and values that the positions before
    it had when they last ran."""
    network, e = model.model, model.get_input_embeddings()(ids)
    length = ids.shape[1]
    h, past = [None] * length, [[None] * length for _ in range(network.config.num_hidden_layers)]
    for number in range(passes):
        before = list(h)
        groups = [range(length)] if number == 0 else [range(n, length, num_groups) for n in range(num_groups)]
        for t in (t for group in groups for t in group):
            inputs = (
                e[:, t]
                if number == 0 or t == 0
                else network.feedback(e[:, t], h[t - 1] if num_groups > 1 else before[t - 1])
            )
            cache = DynamicCache()
            for layer, kv in enumerate(past):
                if t > 0:
                    cache.update(torch.cat([k for k, _ in kv[:t]], 2), torch.cat([v for _, v in kv[:t]], 2), layer)
            out = network.language_model(
                inputs_embeds=inputs[:, None], past_key_values=cache, position_ids=torch.tensor([[t]]), use_cache=True
            )
            h[t] = out.last_hidden_state[:, 0]
            for layer, kv in zip(cache.layers, past, strict=True):
                kv[t] = layer.keys[:, :, -1:], layer.values[:, :, -1:]
    return torch.stack(h, 1)


@given(models(HAVE_GROUPS), st.sampled_from([(2, 3), (3, 2), (8, 3)]))
def test_cyclic_training_passes_and_their_gradients_written_out(drawn, groups_and_passes):
    num_groups, passes = groups_and_passes
    backbone, dtype = drawn["backbone"], drawn["dtype"]
    model = train(**drawn, training_solver="cyclic", num_passes=passes, num_groups=num_groups)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = tokens(2, 7)
    target = torch.randn(2, 7, 32, dtype=dtype)
    outputs, gradients = [], []
    for h in (
        model.model(ids).pass_hidden_states[-1],
        cyclic_passes_written_out(model, ids, passes, num_groups),
    ):
        model.zero_grad()
        (h * target).sum().backward()
        outputs.append(h.detach())
        gradients.append({name: p.grad for name, p in model.model.named_parameters() if p.grad is not None})
    rounded = backbone in ("llama", "qwen3")  # their norms round to fp32 whatever the model's type
    bound = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 and not rounded else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(*outputs, **bound)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], **bound)


@pytest.mark.parametrize("backbone", ["gateloop-pure", "gateloop-hybrid"])
def test_recurrent_layers_are_solved_by_jacobi_and_that_is_said_once(backbone, caplog):
    logging.enable_propagation()
    model, ids = stateful(backbone), tokens(2, 9)
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert torch.equal(states(model, ids, solver="cyclic"), states(model, ids, solver="jacobi"))
    logging.disable_propagation()
    assert len([r for r in caplog.records if "falls back to Jacobi" in r.message]) == 1


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        ),
        MistralConfig(**LLAMA_LIKE, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_attention_that_cannot_be_split_is_solved_all_the_same(cached, config):
    torch.manual_seed(0)
    config = StatefulGPTConfig(text_config=config, tolerance=0.0, num_groups=3)
    model, ids = StatefulGPTForCausalLM(config).eval(), tokens(2, 20)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    exact = stepped(model, ids)
    for solver in ("jacobi", "cyclic"):
        cache = None
        if cached:  # one that knows nothing of windows
            cache = DynamicCache()
            with torch.no_grad():
                model.model(ids[:, :7], past_key_values=cache, use_cache=True)
        solved = states(model, ids[:, 7 if cached else 0 :], solver=solver, past_key_values=cache)
        torch.testing.assert_close(solved, exact[:, 7 if cached else 0 :], **tolerance(torch.float32))


def test_attention_that_turns_out_to_make_masks_of_its_own_is_solved_by_jacobi(monkeypatch):
    model, ids = stateful("llama"), tokens(2, 9)
    attend = LlamaModel.forward

    def reads_less(self, *args, attention_mask=None, **kwargs):
        """As if the mask of the last rows were meant, whichever positions are asked for."""
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask.tril(attention_mask.shape[-1] - attention_mask.shape[-2] - 1) | (
                torch.arange(attention_mask.shape[-1]) == 0
            )
        return attend(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", reads_less)
    assert torch.equal(states(model, ids, solver="cyclic"), states(model, ids, solver="jacobi"))
    assert why_no_groups(model.model.backbone) == "it makes masks of its own"
    torch.testing.assert_close(states(model, ids), stepped(model, ids), **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_no_more_is_asked_for_than_rounding_allows(dtype):
    model = stateful("llama", torch.float32 if dtype == "autocast" else dtype, tolerance=1e-12, feedback="correction")
    ids = tokens(2, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        for parameter in model.model.feedback.parameters():
            parameter.mul_(0.1)
        out, exact = model(ids), stepped(model, ids)
        change = relative_change(states(model, ids), exact, torch.ones_like(ids, dtype=torch.bool))
    eps = torch.finfo(torch.float32 if dtype == torch.float32 else torch.bfloat16).eps
    assert eps / 4 < out.rounding_floor < 64 * eps
    assert out.stepped_from is None and out.passes < 12 and change.median() < 8 * out.rounding_floor
    # Asked for 0, it goes on until nothing changes.
    model.config.tolerance = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        out = model(ids)
    assert out.residual == 0 or out.stepped_from is not None


def test_a_vocabulary_may_have_two_tokens_only():
    config = GateLoopConfig(vocab_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config)).train()
    assert model(torch.tensor([[0, 1, 1]])).logits.shape == (1, 3, 2) and why_no_groups(model.model.backbone) is None


def test_probing_the_language_model_leaves_it_as_it_was():
    model = stateful(training_solver="cyclic").train()
    model.model.language_model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert why_no_groups(model.model.backbone) is None
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("mode", ["no_feedback", "plain_prompt", "passes", "solved"])
def test_stepping_that_is_asked_for_is_stepping_in_every_mode(mode):
    ids = tokens(2, 9)
    assert torch.equal(stepped(stateful(decode_mode=mode), ids), stepped(stateful(), ids))
    with pytest.raises(ValueError, match="makes no passes; leave out num_passes"):
        shared()(ids, solver="sequential", num_passes=2)


def test_large_elements_in_half_precision_do_not_hide_what_changes():
    model, ids = stateful(dtype=torch.float16, tolerance=1e-4, feedback="correction"), tokens(2, 60)
    with torch.no_grad():
        model.model.language_model.norm.weight[3] = 400.0
        for parameter in model.model.feedback.down.parameters():
            parameter.mul_(0.02)
    assert model.model(ids).residual > 0 or model.model(ids).passes > 2


@pytest.mark.parametrize("backbone,dtype", [("gateloop", torch.float64), ("llama", torch.float32)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("solver", ["jacobi", "cyclic"])
def test_every_attention_reads_the_same(solver, attention, backbone, dtype):
    model = stateful(backbone, dtype, num_groups=3)
    model.set_attn_implementation(attention)
    ids, mask, real = padded(3, 9, [0, 4, 2], "left")
    solved = states(model, ids, attention_mask=mask, solver=solver)
    for row, where in enumerate(real):
        alone = stepped(model, ids[row : row + 1, where])[0]
        torch.testing.assert_close(solved[row, where], alone, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_solved_to_its_own_rounding(dtype):
    model, ids = stateful(dtype=dtype, tolerance=1e-4, feedback="correction"), tokens(2, 60)
    with torch.no_grad():
        for parameter in model.model.feedback.down.parameters():
            parameter.mul_(0.1)  # a recurrence that contracts
    solved = model.model(ids)
    assert 1 < solved.passes <= 5
    exact = stepped(copy.deepcopy(model).float(), ids)
    errors = [(h - exact).abs().max() for h in (solved.last_hidden_state, stepped(model, ids))]
    assert errors[0] < 2 * errors[1]


@given(models(fusions=["glu"]), st.sampled_from(["jacobi", "cyclic", "sequential"]))
def test_a_first_guess_of_the_states_may_be_given(drawn, solver):
    model, ids, dtype = shared(**drawn, num_groups=3), tokens(2, 11), drawn["dtype"]
    exact = stepped(model, ids)
    random = torch.randn_like(exact)
    partly = exact * (torch.arange(11) < 6)[:, None]
    for guess in (exact, random, partly, torch.zeros_like(exact)):
        out = model.model(ids, initial_states=guess, solver=solver)
        torch.testing.assert_close(out.last_hidden_state.detach(), exact, **tolerance(dtype))
    if solver != "sequential":
        passes = lambda k, guess: states(model, ids, num_passes=k, solver=solver, initial_states=guess)  # noqa: E731
        torch.testing.assert_close(passes(1, exact), exact, **tolerance(dtype))
        # Zeros are no guess; a part of the states is exact one position further.
        assert torch.equal(passes(2, torch.zeros_like(exact)), states(model, ids, num_passes=2, solver=solver))
        torch.testing.assert_close(passes(1, partly)[:, :7], exact[:, :7], **tolerance(dtype))
        torch.testing.assert_close(passes(1, partly)[:, 7:], plain_from(model, ids, exact, 7), **tolerance(dtype))
    spoilt = exact.clone()
    spoilt[0, 3, 5] = float("nan")
    out = model.model(ids, initial_states=spoilt, solver=solver)
    torch.testing.assert_close(out.last_hidden_state.detach(), exact, **tolerance(dtype))
    for mode in ("no_feedback", "plain_prompt"):
        assert torch.equal(states(model, ids, decode_mode=mode, initial_states=exact), states(model, ids, num_passes=1))
    with pytest.raises(ValueError, match=r"initial_states is \[2, 10, 32\]; it must be \[2, 11, 32\]"):
        model.model(ids, initial_states=exact[:, :10])


def plain_from(model, ids, exact, start):
    """The states from `start` on where the inputs before it have feedback, and those after it have not."""
    e = model.get_input_embeddings()(ids)
    inputs = torch.cat([e[:, :1], model.model.feedback(e[:, 1:start], exact[:, : start - 1]), e[:, start:]], 1)
    return model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, start:].detach()


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
    model = (
        StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config, feedback="gated_add", **JACOBI)).to(dtype).eval()
    )
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


@pytest.mark.parametrize("given_as", ["argument", "field"])
def test_decode_modes(given_as):
    ids = tokens(2, 9)
    next_token = ids[:, :1]
    for mode, passes in (("no_feedback", 1), ("plain_prompt", 1), ("passes", 3), ("solved", None)):
        model = stateful(prefill_passes=3, **({"decode_mode": mode} if given_as == "field" else {}))
        argument = {"decode_mode": mode} if given_as == "argument" else {}
        with torch.no_grad():
            prompt = model.model(ids, use_cache=True, **argument)
            expected = states(model, ids, num_passes=passes) if passes else stepped(model, ids)
            torch.testing.assert_close(prompt.last_hidden_state, expected)
            new = model.model(next_token, past_key_values=prompt.past_key_values, **argument).last_hidden_state
        e = model.get_input_embeddings()(torch.cat([ids, next_token], 1))
        before = prompt.last_hidden_state
        inputs = e.clone()
        if mode != "no_feedback":
            inputs[:, -1] = model.model.feedback(e[:, -1], before[:, -1])
        if mode in ("passes", "solved"):
            fed = before if mode == "solved" else states(model, ids, num_passes=2)
            inputs[:, 1:-1] = model.model.feedback(e[:, 1:-1], fed[:, :-1])
        by_hand = model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, -1:].detach()
        torch.testing.assert_close(new, by_hand)


def test_a_prompt_goes_through_the_trained_number_of_passes_unless_told_otherwise():
    ids = tokens(2, 9)
    for config, passes in (
        ({"num_passes": 2}, 2),
        ({"num_passes": 2, "num_no_grad_passes": 1}, 3),
        ({"pass_probabilities": [0.5, 0.3, 0.1, 0.1]}, 4),
    ):
        model = stateful(**config)
        assert torch.equal(states(model, ids, decode_mode="passes"), states(model, ids, num_passes=passes))


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
    exact = {"solver": "jacobi"}, {"solver": "cyclic"}, {"solver": "sequential"}
    for how in (*exact, {"num_passes": 2, "solver": "jacobi"}, {"num_passes": 2, "solver": "cyclic"}):
        out = model(ids, **how, **flags)
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
        torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
        assert all((attention.triu(1) == 0).all() for attention in out.attentions)
        assert [h.shape for h in out.hidden_states] == [(2, 6, 32)] * 3
        assert [a.shape for a in out.attentions] == [(2, 4, 6, 6)] * 2


def test_input_embeddings_may_be_given_instead_of_tokens():
    model, ids = shared(feedback="glu"), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


# Training


def train(backbone="gateloop", dtype=torch.float64, **config):
    return stateful(backbone, dtype, **{"num_passes": 3, **config}).train()


@given(models(fusions=["glu"]))
def test_training_token_by_token_is_backpropagation_through_time(drawn):
    model, dtype, backbone = train(**drawn, training_solver="sequential"), drawn["dtype"], drawn["backbone"]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = tokens(2, 7)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert len(out.pass_losses) == 1
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    network, e = model.model, model.get_input_embeddings()(ids)
    model.zero_grad()
    inputs, h = [], None
    for t in range(7):
        inputs.append(e[:, t] if h is None else network.feedback(e[:, t], h))
        h = network.language_model(inputs_embeds=torch.stack(inputs, 1)).last_hidden_state[:, -1]
    hidden = network.language_model(inputs_embeds=torch.stack(inputs, 1)).last_hidden_state
    model.loss_function(model.lm_head(hidden), ids, VOCAB).backward()
    rounded = dtype == torch.float32 or backbone in ("llama", "qwen3")
    bound = {"atol": 1e-4, "rtol": 1e-3} if rounded else {"atol": 1e-10, "rtol": 1e-8}
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, **bound)


def test_token_by_token_every_position_has_a_dropout_mask_of_its_own():
    model = train(training_solver="sequential")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for name in ("weight", "bias"):
        getattr(model.model.feedback.value, name).data.zero_()
    # Without feedback and with the same token everywhere, positions differ by their masks alone.
    (h,) = model.model(torch.zeros(1, 6, dtype=torch.long)).pass_hidden_states
    assert all(not torch.allclose(h[:, 0], h[:, t]) for t in range(1, 6))


def test_token_by_token_training_refuses_checkpointed_activations():
    model, ids = train(training_solver="sequential"), tokens(2, 9)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"Set gradient_checkpointing=False \(trl's trainers"):
        model(ids, labels=ids, use_cache=False)


SCHEMES = {
    "jacobi": {"training_solver": "jacobi"},
    "cyclic": {"training_solver": "cyclic"},
    "as by default": {"training_solver": "cyclic", "num_no_grad_passes": 2, "num_passes": 1},
    "solved": {"training_solver": "cyclic", "num_no_grad_passes": None, "num_passes": 1},
    "solved by Jacobi": {"training_solver": "jacobi", "num_no_grad_passes": None, "num_passes": 2},
}


@given(
    models(dtypes=[torch.float64]),
    st.sampled_from(sorted(SCHEMES)),
    st.lists(st.integers(0, 3), min_size=1, max_size=2),
    st.sampled_from(["eager", "sdpa"]),
)
@example({"backbone": "llama", "feedback": "glu", "dtype": torch.float64}, "cyclic", [0, 2], "sdpa")
def test_checkpointed_activations_change_neither_what_is_trained_nor_its_gradient(drawn, scheme, pads, attention):
    ids, mask, _ = padded(len(pads), 9, pads, "right")
    found = []
    for checkpointed in (False, True):
        model = train(**drawn, **SCHEMES[scheme], num_groups=3)
        model.set_attn_implementation(attention)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        out = model(ids, attention_mask=mask, labels=targets(ids, mask), use_cache=False)
        out.loss.backward()
        assert all(module.gradient_checkpointing == checkpointed for module in checkpointing(model)), "left as it was"
        found.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@MANY
@given(
    models([*BACKBONES, *WINDOWED]),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(2, 9),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.sampled_from(["left", "right", "hole"]),
)
def test_padding_changes_neither_training_passes_nor_their_gradients(drawn, scheme, length, pads, side):
    ids, mask, real = padded(len(pads), length, pads, side)
    model = train(**drawn, **SCHEMES[scheme], num_groups=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = torch.randn(ids.shape[1], 32, dtype=drawn["dtype"])
    whole = model.model(ids, attention_mask=mask).pass_hidden_states[-1]
    sum((whole[row, where] * weights[: len(where)]).sum() for row, where in enumerate(real)).backward()
    together = [p.grad for p in model.model.parameters()]
    model.zero_grad()
    for row, where in enumerate(real):
        alone = model.model(ids[row : row + 1, where]).pass_hidden_states[-1][0]
        (alone * weights[: len(where)]).sum().backward()
        torch.testing.assert_close(whole[row, where], alone, **tolerance(drawn["dtype"]))
    bound = {"atol": 1e-3, "rtol": 1e-2} if drawn["dtype"] == torch.float32 else {"atol": 1e-6, "rtol": 1e-4}
    for a, p in zip(together, model.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, **bound)


@MANY
@given(
    models(),
    st.sampled_from(sorted(SCHEMES)),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=2),
    st.sampled_from([0, 1, 20]),
)
@example({"backbone": "llama", "feedback": "glu", "dtype": torch.float64}, "cyclic", [[5, 4], [9]], 0)
@example({"backbone": "llama", "feedback": "glu", "dtype": torch.float64}, "cyclic", [[5, 4]], 1)
def test_packing_changes_neither_training_passes_nor_their_gradients(drawn, scheme, rows, begin):
    length = max(map(sum, rows))
    rows = [[*lengths, *[length - sum(lengths)] * (sum(lengths) < length)] for lengths in rows]
    ids, positions = tokens(len(rows), length), torch.stack([torch.cat([*map(torch.arange, row)]) for row in rows])
    # What does not follow its predecessor is another sequence, wherever it begins.
    if len(rows) == 1:
        positions += begin * (torch.arange(length) >= length - rows[0][-1])
    model = train(**drawn, **SCHEMES[scheme], num_groups=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = torch.randn(length, 32, dtype=drawn["dtype"])
    whole = model.model(ids, position_ids=positions, use_cache=False, output_hidden_states=True)
    packed = whole.pass_hidden_states[-1]
    assert packed.shape == whole.hidden_states[-1].shape == (len(rows), length, 32)
    parts = [(row, a, b) for row, lengths in enumerate(rows) for a, b in pairwise([0, *accumulate(lengths)])]
    sum((packed[row, a:b] * weights[: b - a]).sum() for row, a, b in parts).backward()
    together = [p.grad for p in model.model.parameters()]
    model.zero_grad()
    for row, a, b in parts:
        its = {"position_ids": positions[row : row + 1, a:b], "use_cache": False}
        alone = model.model(ids[row : row + 1, a:b], **its).pass_hidden_states[-1][0]
        (alone * weights[: b - a]).sum().backward()
        torch.testing.assert_close(packed[row, a:b], alone, **tolerance(drawn["dtype"]))
    bound = {"atol": 1e-3, "rtol": 1e-2} if drawn["dtype"] == torch.float32 else {"atol": 1e-6, "rtol": 1e-4}
    for a, p in zip(together, model.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, **bound)


@given(
    models([*BACKBONES, *WINDOWED]),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.sampled_from(["left", "right", "hole"]),
)
def test_padding_changes_no_fixed_number_of_passes_nor_what_is_decoded_after_them(drawn, pads, side):
    model = shared(**drawn, num_groups=3, training_solver="cyclic", decode_mode="passes", prefill_passes=3)
    ids, mask, real = padded(len(pads), 9, pads, side)
    more = torch.ones(len(pads), 1, dtype=torch.long)
    with torch.no_grad():
        prompt = model.model(ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
        cache = prompt.past_key_values
        after = model.model(more, attention_mask=torch.cat([mask, more], 1), past_key_values=cache).last_hidden_state
        for row, where in enumerate(real):
            alone = model.model(ids[row : row + 1, where], use_cache=True)
            torch.testing.assert_close(
                prompt.last_hidden_state[row, where], alone.last_hidden_state[0], **tolerance(drawn["dtype"])
            )
            torch.testing.assert_close(prompt.hidden_states[-1][row, where], alone.last_hidden_state[0])
            last = model.model(more[:1], past_key_values=alone.past_key_values).last_hidden_state
            torch.testing.assert_close(after[row], last[0], **tolerance(drawn["dtype"]))


@given(models(), st.sampled_from(["cyclic", "jacobi"]), st.lists(st.integers(0, 3), min_size=1, max_size=2))
def test_trained_by_the_solved_recurrence_log_probabilities_are_those_of_evaluation(drawn, solver, pads):
    ids, mask, real = padded(len(pads), 9, pads, "left")
    solved = {"training_solver": solver, "num_no_grad_passes": None, "num_passes": 1}
    model = train(**drawn, **solved, num_groups=3, feedback_noise=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = model(ids, attention_mask=mask)
    assert all(module.training for module in model.modules()), "left as it was"
    evaluated = model.eval()(ids, attention_mask=mask)
    for row, where in enumerate(real):
        torch.testing.assert_close(
            trained.logits[row, where], evaluated.logits[row, where], **tolerance(drawn["dtype"])
        )


def test_the_solved_recurrence_is_trained_by_one_pass_from_its_states():
    ids = tokens(2, 9)
    model = train(training_solver="cyclic", num_no_grad_passes=None, num_passes=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # Only the pass with gradient drops anything.
    exact = stepped(model.eval(), ids)
    model.train()
    torch.manual_seed(1)
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    e = model.get_input_embeddings()(ids)
    inputs = torch.cat([e[:, :1], model.model.feedback(e[:, 1:], exact[:, :-1])], dim=1)
    torch.manual_seed(1)
    h = model.model.language_model(inputs_embeds=inputs).last_hidden_state
    model.loss_function(model.lm_head(h), ids, VOCAB).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("solver", ["jacobi", "cyclic"])
def test_passes_without_gradient_come_first_and_have_no_loss(solver):
    ids = tokens(2, 9)
    every = train(training_solver=solver, num_groups=3).model(ids).pass_hidden_states
    model = train(training_solver=solver, num_groups=3, num_no_grad_passes=2, num_passes=1)
    out = model(ids, labels=ids)
    assert out.pass_losses.shape == (1,)
    torch.testing.assert_close(out.states, every[-1].detach())
    if solver == "jacobi":  # By hand: one pass from constants.
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        e = model.get_input_embeddings()(ids)
        inputs = torch.cat([e[:, :1], model.model.feedback(e[:, 1:], every[-2].detach()[:, :-1])], dim=1)
        h = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        model.loss_function(model.lm_head(h), ids, VOCAB).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)


def test_a_warm_start_is_one_pass_from_the_states_of_before():
    model, ids = train(num_passes=1), tokens(2, 9)
    first = model(ids, labels=ids)
    assert torch.equal(first.pass_losses[0], train(num_passes=2)(ids, labels=ids).pass_losses[0]), "plain"
    assert not first.states.requires_grad
    second = model(ids, labels=ids, initial_states=first.states)
    assert second.pass_losses.shape == (1,)
    torch.testing.assert_close(second.loss.detach(), train(num_passes=2)(ids, labels=ids).pass_losses[1])
    second.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.model.feedback.parameters())
    third = model(ids, labels=ids, initial_states=second.states, num_passes=2)
    every = train(num_passes=4)(ids, labels=ids)
    torch.testing.assert_close(third.pass_losses, every.pass_losses[2:])


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


def test_gradients_go_through_the_passes():
    ids, model = tokens(2, 9), train()
    embeds = model.get_input_embeddings()(ids).detach()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    inputs, losses = embeds, []
    for _ in range(3):
        h = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        losses.append(model.loss_function(model.lm_head(h), ids, VOCAB))
        inputs = torch.cat([embeds[:, :1], model.model.feedback(embeds[:, 1:], h[:, :-1])], dim=1)
    expected = gradients(sum(losses) / 3)
    for config in ({}, {"training_solver": "cyclic", "num_groups": 1}):
        model.config.update(config)
        got = gradients(model(inputs_embeds=embeds, labels=ids).loss)
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("num_no_grad_passes", [2, None])
def test_passes_without_gradient_take_none_from_those_with_it_under_autocast(num_no_grad_passes):
    """Older versions of torch give a later product the weights that an earlier one has cast without gradient."""
    model = stateful("llama", torch.float32, num_no_grad_passes=num_no_grad_passes).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


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

    with torch.no_grad():  # Looking at a batch draws nothing from training.
        other(tokens(1, 5))
    other.save_pretrained(tmp_path)
    resumed = StatefulGPTForCausalLM.from_pretrained(tmp_path)
    resumed.model.batches_seen = 400  # A training loop says so; then a resumed run goes on where it was.
    assert draw(resumed, 50) == draw(model, 50)

    ids = tokens(1, 5)
    counts = [len(model(ids, labels=ids).pass_losses) for _ in range(20)]
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_is_added_to_what_is_fed_back_only_in_training(solver):
    ids = tokens(2, 9)
    noisy, clean = train(feedback_noise=0.5, training_solver=solver), train(training_solver=solver)
    torch.manual_seed(1)
    noisy_passes, clean_passes = noisy.model(ids).pass_hidden_states, clean.model(ids).pass_hidden_states
    last, clean_last = noisy_passes[-1], clean_passes[-1]
    assert not torch.isclose(last[:, 1:], clean_last[:, 1:]).all(-1).any()
    assert torch.equal(last[:, 0], clean_last[:, 0]), "the first position has nothing fed back"
    if solver != "sequential":
        assert torch.equal(noisy_passes[0], clean_passes[0]), "nor has the first pass"
    torch.testing.assert_close(noisy.eval()(ids).logits, clean.eval()(ids).logits)


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
    for checkpointed in (False, True):
        model = train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        if checkpointed:
            model.gradient_checkpointing_enable()
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
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config, **JACOBI))
    model.save_pretrained(tmp_path)
    loaded = StatefulGPTForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert (m.lm_head.weight is m.get_input_embeddings().weight) == tied
        assert m.get_input_embeddings() is m.model.language_model.get_input_embeddings()
    assert torch.equal(loaded(tokens(1, 5), num_passes=3).logits, model.eval()(tokens(1, 5), num_passes=3).logits)
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
        (OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=1, n_head=2), "OpenAIGPTModel cannot take feedback"),
        (BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "is an encoder"),
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


@pytest.mark.parametrize("backbone", ["gpt2", "llama", "gateloop-hybrid"])
def test_initialised_after_the_meta_device_a_model_starts_as_one_that_is_built_at_once(backbone):
    config = stateful(backbone, feedback="glu").config
    torch.manual_seed(0)
    at_once = StatefulGPTForCausalLM(config).state_dict()
    with torch.device("meta"):
        model = StatefulGPTForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    for name, weight in model.state_dict().items():
        weight, other = weight.double(), at_once[name].double()
        spread = other.std(correction=0).item()
        assert weight.mean().item() == pytest.approx(other.mean().item(), abs=spread), name
        if weight.ndim > 1:
            assert weight.std(correction=0).item() == pytest.approx(spread, rel=0.3), name


def test_what_is_no_plain_language_model_is_refused_as_a_backbone():
    for other in (shared(), shared("llama").model.language_model):
        with pytest.raises(ValueError, match="not a plain language model with a head"):
            StatefulGPTForCausalLM.from_backbone(other)


@pytest.mark.parametrize(
    "config,message",
    [
        ({"feedback": "concat"}, r"'concat' does not exist; choose from \[None, 'correction', 'gated_add', 'glu'\]"),
        ({"feedback_source": "logits"}, r"'logits' does not exist; choose from \['embedding', 'hidden_state'\]"),
        ({"num_passes": 0}, "num_passes is 0; it must be at least 1"),
        ({"prefill_passes": 0}, "prefill_passes is 0; it must be at least 1"),
        ({"pass_probabilities": [0.5, 0.4]}, "must sum to 1"),
        ({"pass_probabilities": []}, "must sum to 1"),
        ({"pass_probabilities": [float("nan")]}, "must sum to 1"),
        (
            {"solver": "newton"},
            r"solver 'newton' does not exist; choose from \[None, 'cyclic', 'jacobi', 'sequential'\]",
        ),
        ({"training_solver": "newton"}, "training_solver 'newton' does not exist"),
        ({"decode_mode": "fast"}, "decode_mode 'fast' does not exist; choose from .*'plain_prompt', 'solved'"),
        ({"num_groups": 0}, "num_groups is 0; it must be at least 1"),
        ({"num_no_grad_passes": -1}, "num_no_grad_passes is -1; it must be at least 0"),
        ({"feedback_noise": -1.0}, "feedback_noise is -1.0; it must be at least 0 and finite"),
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
    with pytest.raises(ValueError, match="decode_mode 'fast' does not exist"):
        model(tokens(1, 5), decode_mode="fast")
    with pytest.raises(ValueError, match="has no tokens"):
        model(tokens(1, 0))
    with pytest.raises(ValueError, match="all padding"):
        model(tokens(1, 5), attention_mask=torch.zeros(1, 5, dtype=torch.long))


ATTENDING = ["gateloop", "gateloop-nope", "gpt2", "llama", "qwen3"]


def attending(backbone, feedback):
    if feedback != "plain":
        return shared(backbone, feedback=feedback)
    torch.manual_seed(0)
    return GateLoopForCausalLM(text_config(backbone)).double().eval()


@given(st.data())
def test_columns_of_a_mask_after_the_new_tokens_say_nothing_and_all_but_zero_is_a_token(data):
    backbone = data.draw(st.sampled_from(ATTENDING))
    feedback = data.draw(
        st.sampled_from(["glu", "plain"] if backbone.startswith("gateloop") else ["glu", "correction"])
    )
    model, past, new = attending(backbone, feedback), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 4))
    ids, mask = tokens(2, past + new), torch.ones(2, past + new)
    mask[1, : data.draw(st.integers(0, past + new - 1))] = 0
    unused = torch.full((2, data.draw(st.integers(0, 4))), data.draw(st.sampled_from([0.0, 1.0])))
    kind = data.draw(st.sampled_from([torch.bool, torch.int64, torch.float32, torch.float64]))
    longer = torch.cat([mask, unused], 1).to(kind)
    if kind.is_floating_point:
        longer = longer * data.draw(st.sampled_from([1.0, 0.5, -1.0, torch.finfo(kind).max]))
    static = data.draw(st.booleans())
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    solver = {} if feedback == "plain" else {"solver": data.draw(st.sampled_from(["cyclic", "jacobi", "sequential"]))}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long(), use_cache=False).logits[:, past:]
        if past:
            model(ids[:, :past], attention_mask=longer[:, :past], past_key_values=cache)
        found = model(ids[:, past:], attention_mask=longer, past_key_values=cache, **solver).logits
    real = mask[:, past:].bool()
    torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gateloop", "gateloop-pure"])
def test_a_mask_of_another_shape_is_refused_by_name(backbone):
    model, ids = shared(backbone, feedback="glu"), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        masks = [torch.ones(2, 4), torch.ones(2, 8), torch.ones(1, 9), torch.ones(9), torch.ones(2, 4, 9)]
        masks += [torch.ones(2, 1, 3, 9), torch.ones(2, 1, 4, 8)]
        masks += [torch.ones(2, 12)] if backbone == "gateloop-pure" else []
        for mask in masks:
            with pytest.raises(ValueError, match=r"attention_mask is \[.*\]; .* \[2, 5 \+ 4\]"):
                model(ids[:, 5:], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask is \[2, 12\]; .* \[2, 0 \+ 9\]"):
            model(ids, attention_mask=torch.ones(2, 12), use_cache=False)
        expected = model(ids).logits[:, 5:]
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gateloop"])
def test_a_4d_mask_is_taken_where_it_lets_each_token_read_the_one_before_it(backbone, kind):
    model, ids = shared(backbone, feedback="glu"), tokens(2, 9)

    def as_4d(reads):
        reads = reads.expand(2, 1, -1, -1)
        return reads if kind is torch.bool else torch.where(reads, 0.0, -torch.inf).to(kind)

    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(ids).logits
        for solver in SOLVERS:
            torch.testing.assert_close(model(ids, attention_mask=as_4d(causal), solver=solver).logits, expected)
        cache = model(ids[:, :5], use_cache=True).past_key_values
        later = model(ids[:, 5:], attention_mask=as_4d(causal[5:]), past_key_values=cache).logits
        torch.testing.assert_close(later, expected[:, 5:])

        # Two sequences, packed: the positions say where the second begins.
        apart = causal & ((torch.arange(9) < 4)[:, None] == (torch.arange(9) < 4))
        positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
        packed = model(ids, attention_mask=as_4d(apart), position_ids=positions).logits
        torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits)
        with pytest.raises(ValueError, match="hides from a token the one before it, whose state it would read"):
            model(ids, attention_mask=as_4d(apart))
        with pytest.raises(ValueError, match=r"4-D attention_mask cannot be of type torch.int64"):
            model(ids, attention_mask=causal.long().expand(2, 1, -1, -1))


@given(models(HAVE_GROUPS), st.sampled_from(sorted(SCHEMES)), st.integers(2, 12))
def test_a_causal_4d_mask_changes_nothing_in_training(drawn, scheme, length):
    model, ids = train(**drawn, **SCHEMES[scheme], num_groups=3), tokens(2, length)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    expected, found = model(ids, labels=ids), model(ids, attention_mask=causal, labels=ids)
    torch.testing.assert_close(found.pass_losses, expected.pass_losses, **tolerance(drawn["dtype"]))


def test_a_4d_mask_with_a_static_cache_is_solved_and_not_stepped():
    model, ids = shared("llama", feedback="glu"), tokens(2, 6)
    mask = torch.ones(6, 16, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        for solver in ("cyclic", "jacobi"):
            cache = StaticCache(config=model.config, max_cache_len=16)
            found = model(ids, attention_mask=mask, past_key_values=cache, solver=solver).logits
            torch.testing.assert_close(found, model(ids).logits)
        with pytest.raises(ValueError, match="needs a 2-D attention_mask here"):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(ids, attention_mask=mask, past_key_values=cache, solver="sequential")


def test_with_eager_attention_a_4d_mask_of_booleans_would_be_added_as_ones_and_is_refused():
    model = StatefulGPTForCausalLM(
        StatefulGPTConfig(text_config=BACKBONES["llama"](), attn_implementation="eager")
    ).eval()
    with pytest.raises(ValueError, match=r"cannot be of type torch.bool here. It must be of a floating-point type"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("backbone,name", [("gateloop", "sweep_groups"), ("gateloop-hybrid", "sweep")])
def test_an_interrupted_solve_leaves_the_cache_as_it_was(backbone, name):
    model, ids = stateful(backbone, num_groups=2), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        expected = stepped(model, ids)[:, 3:]
        sweep, calls = getattr(LanguageModelRecurrence, name), []

        def interrupted(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sweep(self, *args)

        setattr(LanguageModelRecurrence, name, interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 3:], past_key_values=cache)
        finally:
            setattr(LanguageModelRecurrence, name, sweep)
        torch.testing.assert_close(model.model(ids[:, 3:], past_key_values=cache).last_hidden_state, expected)


def test_the_solvers_see_the_models_recurrence_as_any_other():
    model, ids = shared(), tokens(2, 7)
    with torch.no_grad():
        make = lambda: LanguageModelRecurrence(  # noqa: E731
            model.model.backbone, model.model.feedback, model.get_input_embeddings()(ids)
        )
        torch.testing.assert_close(jacobi(make()).hidden_states, sequential(make()).hidden_states)


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_are_not_finite_leave_nothing_solved(solver, caplog):
    logging.enable_propagation()
    logger.warning_once.cache_clear()
    model, ids = stateful(tolerance=1e-4), tokens(2, 40)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan  # Of the head: no state depends on it.
        assert model(ids, solver=solver).residual <= 1e-4
        model.model.feedback.value.weight[0, 0] = torch.nan
    outputs = model(ids, labels=ids, solver=solver)
    assert outputs.residual != outputs.residual and outputs.loss.isnan()
    assert solver == "sequential" or (outputs.passes <= 4 and outputs.stepped_from is None)
    assert "hidden states are not finite" in caplog.text
    logging.disable_propagation()
    # As in generate(), where nobody looks.
    assert model(ids[:, :1], past_key_values=model(ids).past_key_values).residual is None


def contracting(dtype=torch.float32, **config):
    """Of which a few passes are enough."""
    torch.manual_seed(0)
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=text_config("llama"), **config)).to(dtype).eval()
    model.model.feedback.value.weight.data *= 0.1
    return model


@pytest.mark.parametrize("solver", ["jacobi", "cyclic"])
@pytest.mark.parametrize("where", [0, 20, 59])
def test_a_sequence_that_is_not_finite_leaves_the_others_as_they_are(solver, where):
    model, ids = contracting(), tokens(3, 60).clamp(max=VOCAB - 2)
    ids[1, where] = VOCAB - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = torch.nan
    alone, together = model(ids[::2], solver=solver), model(ids, solver=solver)
    assert 0 < alone.residual <= model.config.tolerance and math.isnan(together.residual)
    assert together.stepped_from is None and together.passes <= alone.passes + 3
    torch.testing.assert_close(together.logits[::2], alone.logits, atol=1e-5, rtol=1e-4)
    finite = together.states.isfinite().all(-1)
    # Attention takes 0 times what is not finite into the sums of earlier positions as well.
    assert finite[::2].all() and not finite[1, where:].any()


def test_what_overflows_in_half_precision_is_said():
    model, ids = contracting(), tokens(1, 40)
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(3e4)
    assert model(ids).residual <= model.config.tolerance
    solved = model.to(torch.float16)(ids)
    assert math.isnan(solved.residual) and solved.passes <= 5 and solved.stepped_from is None


def test_a_backbone_whose_weights_are_not_finite_is_refused_for_them():
    backbone = AutoModelForCausalLM.from_config(text_config("llama"))
    weights = backbone.state_dict()
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.weight\. Load"):
        StatefulGPTForCausalLM.from_backbone(backbone)
    for name in weights:
        weights[name].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight, .* and \d+ more"):
        StatefulGPTForCausalLM.from_backbone(backbone)


def test_a_backbone_that_overflows_is_refused_for_that():
    backbone = AutoModelForCausalLM.from_config(text_config("llama")).half()
    backbone.state_dict()["model.layers.0.mlp.down_proj.weight"].fill_(6e4)
    backbone.state_dict()["model.layers.0.mlp.up_proj.weight"].fill_(6e4)
    with pytest.raises(ValueError, match=r"overflows in torch\.float16\. Load it with dtype"):
        StatefulGPTForCausalLM.from_backbone(backbone)


@given(
    solver=st.sampled_from(list(SOLVERS)),
    batch=st.sampled_from([(2, 2), (2, 1), (1, 1)]),
    cut=st.integers(1, 8),
    pads=st.integers(0, 2),
)
@settings(max_examples=15)
def test_kinds_of_tokens_go_with_their_tokens(solver, batch, cut, pads):
    """At once, in pieces from a cache, and padded: as stepped token by token."""
    model, ids, kinds = shared("gpt2"), tokens(batch[0], 9), tokens(batch[1], 9, seed=1)
    mask = torch.ones_like(ids)
    mask[1:, :pads] = 0
    cache, steps = None, []
    for t in range(9):
        here = {"attention_mask": mask[:, : t + 1], "token_type_ids": kinds[:, t : t + 1]}
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True, **here)
        cache = out.past_key_values
        steps.append(out.logits)
    expected, real = torch.cat(steps, 1), mask.bool()
    whole = model(ids, attention_mask=mask, token_type_ids=kinds, solver=solver, use_cache=False)
    torch.testing.assert_close(whole.logits[real], expected[real], **tolerance(torch.float64))
    first = model(
        ids[:, :cut], attention_mask=mask[:, :cut], token_type_ids=kinds[:, :cut], solver=solver, use_cache=True
    )
    rest = model(
        ids[:, cut:],
        attention_mask=mask,
        token_type_ids=kinds[:, cut:],
        past_key_values=first.past_key_values,
        solver=solver,
    )
    pieces = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(pieces[real], expected[real], **tolerance(torch.float64))


@pytest.mark.parametrize("training_solver", SOLVERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_kinds_of_tokens_train_as_in_backpropagation_through_time(training_solver, checkpointed):
    model, ids, kinds = stateful("gpt2", training_solver="sequential").train(), tokens(2, 9), tokens(2, 9, seed=1)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        module.p = 0.0
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def loss_and_gradient(**how):
        loss = model(inputs_embeds=embeds, labels=ids, token_type_ids=kinds, **how).pass_losses[-1]
        logits = model.model(inputs_embeds=embeds, token_type_ids=kinds, **how).pass_hidden_states[-1]
        return loss, torch.autograd.grad(logits.square().sum(), embeds)[0]

    expected = loss_and_gradient()
    model.config.training_solver = training_solver
    if checkpointed and training_solver != "sequential":
        model.gradient_checkpointing_enable()
    found = loss_and_gradient(**({} if training_solver == "sequential" else {"num_passes": 9}))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float64))
    assert not torch.equal(found[0], model(inputs_embeds=embeds, labels=ids).pass_losses[-1])


def test_what_is_of_another_sequence_is_not_cut():
    """Though it is as long."""
    config = GPT2Config(**{**text_config("gpt2").to_dict(), "add_cross_attention": True})
    torch.manual_seed(0)
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config, tolerance=0.0)).double().eval()
    ids, other = tokens(2, 9), torch.randn(2, 9, 32, dtype=torch.float64)
    expected = model(ids, encoder_hidden_states=other, solver="jacobi", use_cache=False).logits
    stepped = model(ids, encoder_hidden_states=other, solver="sequential", use_cache=False).logits
    torch.testing.assert_close(stepped, expected, **tolerance(torch.float64))


def test_kinds_of_tokens_are_for_the_new_tokens_alone():
    model, ids = shared("gpt2"), tokens(2, 9)
    cache = model(ids[:, :5], token_type_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"token_type_ids is \[2, 9\]; it must be \[2, 4\]"):
        model(ids[:, 5:], token_type_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_trainer_passes_kinds_of_tokens(tmp_path):
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=text_config("gpt2")))
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "token_type_ids": [0, 0, 0, 1, 1, 1], "labels": [1, 2, 3, 4, 5, 6]}
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, max_steps=2, report_to="none", use_cpu=True, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 4, eval_dataset=[row] * 2)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("feedback", [None, "glu"])
def test_a_mask_that_is_no_tensor_is_refused_by_name(feedback):
    with pytest.raises(ValueError, match="attention_mask is of type dict; it must be a tensor"):
        shared("gateloop", feedback=feedback)(tokens(1, 5), attention_mask={"full_attention": torch.ones(1, 5)})


def test_the_default_steps_only_where_that_keeps_gradients_and_states():
    """A cache that is written in place, and layers in training mode that would checkpoint away their keys."""
    model, ids = stateful("llama", solver=None, feedback="correction"), tokens(2, 3)
    exact = model(ids, labels=ids, solver="sequential", use_cache=False)
    parameter = model.model.feedback.down.weight
    (expected,) = torch.autograd.grad(exact.loss, parameter)
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    (found,) = torch.autograd.grad(model(ids, labels=ids, past_key_values=cache).loss, parameter)
    torch.testing.assert_close(found, expected)

    model.gradient_checkpointing_enable()
    logits = model.train()(ids, past_key_values=DynamicCache(config=model.config.text_config)).logits
    torch.testing.assert_close(logits, exact.logits)
    assert model.model.language_model.layers[0].gradient_checkpointing
