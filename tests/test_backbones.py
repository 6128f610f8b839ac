"""Feedback around the causal language models of transformers (see backbones.py)."""

import pytest
import torch
from backbones import NO_DECODERS, check_all, small_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA_LIKE, few, stateful, tolerance
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_stateful_gpt import (
    GateLoopConfig,
    StatefulGPTConfig,
    StatefulGPTForCausalLM,
    language_modeling,
    verify_agreement,
)
from modeling_stateful_gpt.probe import why_no_groups

OTHERS = {name for names in NO_DECODERS.values() for name in names.split()}
DECODERS = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS]
DOZEN = [
    "bamba", "bloom", "cohere2", "ctrl", "falcon_h1", "gemma4_text", "gpt_neox", "llama4_text", "mamba", "phi",
    "qwen3_moe", "qwen3_next",
]  # fmt: skip
REFUSED = {
    "cpmant": "needs inputs_embeds, attention_mask and a Cache",
    "deepseek_v4": "chooses experts by the tokens",
    "minimax": "no other cache",
    "openai-gpt": "and a Cache",
    "recurrent_gemma": "keeps its state in the modules",
    "rwkv": "and a Cache",
    "xlstm": "and a Cache",
}


@pytest.mark.parametrize("model_type", few(DECODERS, DOZEN))
def test_a_decoder_takes_feedback_or_is_refused_by_name(model_type):
    (row,) = check_all([model_type])
    if not row.built and "took more than" not in row.fault:
        pytest.skip(f"no small model of this type: {row.fault}")
    assert not row.fault, row.fault
    if model_type in REFUSED:
        assert REFUSED[model_type] in row.refused
    else:
        assert row.works and row.padding, row


@pytest.mark.parametrize("model_type", few(sorted(OTHERS - {"blt"}), ["bert", "bart", "git"]))
def test_what_is_no_decoder_of_text_is_refused_in_a_sentence(model_type):
    (row,) = check_all([model_type])
    assert row.refused or row.works or (not row.built and "took more than" not in row.fault), row


def ids(batch, length, seed=0):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


# Masks of windows, in groups of positions


WINDOWED = {
    "windows": lambda: Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=5, layer_types=TWO_TYPES),
    "all windows": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=4),
}
TWO_TYPES = ["sliding_attention", "full_attention"]


@given(
    name=st.sampled_from(sorted(WINDOWED)),
    attention=st.sampled_from(["eager", "sdpa"]),
    past=st.integers(0, 9),
    length=st.integers(2, 14),
    padding=st.integers(0, 4),
)
def test_windows_are_kept_in_groups_of_positions(name, attention, past, length, padding):
    # In eager attention, which computes its softmax in fp32, the lowest number of fp64 is −∞.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = stateful(WINDOWED[name](), dtype, attn_implementation=attention, num_groups=3)
    padding = min(padding, past + length - 1)
    tokens, mask = ids(2, past + length), torch.ones(2, past + length, dtype=torch.long)
    mask[0, :padding] = 0
    with torch.no_grad():
        results = []
        for how in ({}, {"solver": "sequential"}):
            cache = DynamicCache(config=model.config)
            if past:
                model(tokens[:, :past], attention_mask=mask[:, :past], past_key_values=cache, **how)
            results.append(model(tokens[:, past:], attention_mask=mask, past_key_values=cache, **how))
            after = model(tokens[:, :1], attention_mask=nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)
            results.append(after)
    solved, next_solved, stepped, next_stepped = results
    assert why_no_groups(model.model.backbone) is None
    real = mask[:, past:].bool()
    torch.testing.assert_close(solved.logits[real], stepped.logits[real], **tolerance(dtype))
    torch.testing.assert_close(next_solved.logits, next_stepped.logits, **tolerance(dtype))


# Layers with a state of their own


HYBRIDS = ["bamba", "falcon_h1", "lfm2", "mamba2", "qwen3_next"]


def with_feedback(model_type: str) -> StatefulGPTForCausalLM:
    model = StatefulGPTForCausalLM.from_backbone(small_model(model_type)).eval()
    with torch.no_grad():
        for parameter in model.model.feedback.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", few(HYBRIDS, ["falcon_h1", "qwen3_next"]))
def test_padding_anywhere_leaves_the_states_of_a_hybrid_as_they_are(model_type):
    model = with_feedback(model_type)
    tokens, following = ids(1, 7), ids(1, 3, seed=1)

    def in_a_row(where: list[int]) -> dict[str, torch.Tensor]:
        """The tokens in the slots `where` of a row of ten, the others padding."""
        row, mask = torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10, dtype=torch.long)
        row[0, where], mask[0, where] = tokens[0], 1
        return {"input_ids": row, "attention_mask": mask}

    def go_on(inputs: dict[str, torch.Tensor], **how) -> torch.Tensor:
        """The logits of the following tokens."""
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache, **how)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        return model(following, attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad():
        expected = go_on({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, solver="sequential")
        alone = model(tokens, use_cache=False).logits
        for where in ([0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 4, 5, 7, 8]):
            inputs = in_a_row(where)
            for solver in ("jacobi", "sequential"):
                got = go_on(inputs, solver=solver)
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            got = model.eval()(**inputs, use_cache=False).logits[:, where]
            torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
            got = model.train()(**inputs, labels=inputs["input_ids"], num_passes=2).logits[:, where]
            torch.testing.assert_close(got, model(tokens, labels=tokens, num_passes=2).logits, atol=1e-4, rtol=1e-4)
            model.eval()


@pytest.mark.parametrize("model_type", few([*HYBRIDS, "zamba2"], ["falcon_h1"]))
def test_a_hybrid_computes_with_a_static_cache_what_it_computes_without(model_type):
    model = with_feedback(model_type)
    tokens, mask = ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        for pieces in ([13, 3], [5, 8, 1, 2]):
            for solver in ("jacobi", "sequential"):
                found = []
                for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)):
                    logits, end = [], 0
                    for piece in tokens.split(pieces, 1):
                        end += piece.shape[1]
                        how = {"attention_mask": mask[:, :end], "past_key_values": cache, "solver": solver}
                        logits.append(model(piece, **how).logits)
                    found.append(torch.cat(logits, 1)[mask.bool()])
                torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(tokens, **how)
    got = model.generate(tokens, **how, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, expected)


def test_what_a_hybrid_cannot_do_is_refused_by_name():
    model = StatefulGPTForCausalLM.from_backbone(small_model("qwen3_next")).eval()
    tokens = ids(1, 8)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"which packed sequences would share. Give each sequence a row"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)
    with pytest.raises(ValueError, match="cannot be trained token by token"):
        model.train()(tokens, solver="sequential")
    cache = DynamicCache(config=model.config)
    model.eval()(tokens, past_key_values=cache)
    with pytest.raises(RuntimeError, match="states of linear attention, which have read them"):
        cache.crop(-1)


@pytest.mark.parametrize("model_type", ["mamba", "phi"])
def test_a_backbone_in_half_precision_takes_feedback_in_it(model_type):
    backbone = small_model(model_type).bfloat16()
    model = StatefulGPTForCausalLM.from_backbone(backbone)
    assert model(ids(1, 6), labels=ids(1, 6)).loss.isfinite()
    with torch.no_grad():
        assert torch.equal(model(ids(1, 6), num_passes=1).logits, backbone(ids(1, 6)).logits)


def test_states_that_are_not_finite_agree_with_nothing():
    model = stateful("llama", torch.float32, tolerance=1e-4)
    assert verify_agreement(model, ids(2, 9)).agrees
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    report = verify_agreement(model, ids(2, 9))
    assert not report.agrees and "NO" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_leaves_feedback_out_where_it_solves_does_not_agree(dtype, monkeypatch):
    model = StatefulGPTForCausalLM.from_backbone(made(LlamaConfig(**LLAMA_LIKE)).to(dtype)).eval()
    assert not verify_agreement(model, ids(2, 9)).tells, "feedback starts at zero"
    with torch.no_grad():
        model.model.feedback.down.weight.normal_(std=0.5)
    report = verify_agreement(model, ids(2, 9))
    assert report.agrees and report.tells, report
    forward = model.forward

    def without(*args, solver=None, decode_mode=None, **kwargs):
        return forward(*args, solver=solver, num_passes=None if solver == "sequential" else 1, **kwargs)

    monkeypatch.setattr(model, "forward", without)
    report = verify_agreement(model, ids(2, 9))
    assert report.tells and not report.agrees, report


# What is unlike a Llama in a way that only some configurations or texts show


def made(config) -> nn.Module:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def fed_back(config) -> StatefulGPTForCausalLM:
    model = StatefulGPTForCausalLM.from_backbone(made(config))
    nn.init.normal_(model.model.feedback.down.weight, std=0.02)
    return model


ROTARY = {
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16, "factor": 4.0,
    },
    "dynamic": {"factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("config_class", [LlamaConfig, GateLoopConfig])
def test_a_text_whose_length_changes_the_rotary_positions_is_refused(kind, config_class):
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]}
    limits = {"max_position_embeddings": 64 if kind == "longrope" else 16}
    model = fed_back(config_class(**{**LLAMA_LIKE, **limits, "rope_parameters": rope}))
    assert verify_agreement(model, ids(2, 16)).agrees
    message = rf"rotary positions \({kind}\) change at 16, .* so feedback needs shorter ones"
    cache = model(ids(1, 10)).past_key_values
    for call in (
        lambda: model(ids(1, 17)),
        lambda: model(ids(1, 7), past_key_values=cache),
        lambda: model.generate(ids(1, 10), max_new_tokens=8),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.generate(ids(1, 10), max_new_tokens=6, do_sample=False).shape == (1, 16)


def test_a_head_that_looks_a_number_up_in_its_decoder_finds_it(tmp_path):
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    backbone = made(FalconH1Config(**LLAMA_LIKE, **mamba, lm_head_multiplier=0.05))
    model = StatefulGPTForCausalLM.from_backbone(backbone)
    model.save_pretrained(tmp_path)
    for again in (model, StatefulGPTForCausalLM.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            assert torch.equal(again(ids(1, 6), num_passes=1).logits, backbone(ids(1, 6)).logits)


def test_a_decoder_of_the_bert_family_takes_feedback():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    assert verify_agreement(fed_back(config), ids(2, 9)).agrees


def test_attention_that_counts_the_tokens_it_is_given_is_not_run_in_groups():
    config = {
        **LLAMA_LIKE,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "no_rope_layers": [1, 0],
    }
    model = fed_back(Llama4TextConfig(**config, floor_scale=10, attn_scale=0.5))
    assert "attn_temperature_tuning" in why_no_groups(model.model.backbone)
    assert verify_agreement(model, ids(2, 30)).agrees


@pytest.mark.parametrize("use_bias", [False, True])
def test_padding_that_a_backbone_takes_in_is_refused(use_bias):
    model = fed_back(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, use_bias=use_bias))
    mask = torch.ones(2, 12, dtype=torch.long)
    assert verify_agreement(model, ids(2, 12), mask).agrees
    mask[0, :3] = 0
    if use_bias:
        with pytest.raises(ValueError, match="takes padding into its state here, as it does without feedback"):
            model(ids(2, 12), attention_mask=mask)
    else:
        assert verify_agreement(model, ids(2, 12), mask).agrees


@pytest.mark.parametrize(
    "make",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48)),
        lambda: BertLMHeadModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)),
    ],
    ids=["t5", "xlnet", "bert"],
)
def test_what_is_no_decoder_is_refused_before_anything_is_run(make):
    with pytest.raises(ValueError, match=r"encoder-decoder model|forward needs inputs_embeds|is an encoder"):
        StatefulGPTForCausalLM.from_backbone(make())


# The arguments of from_backbone


def test_a_name_takes_what_from_pretrained_takes(tmp_path):
    made(LlamaConfig(**LLAMA_LIKE)).save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        model = StatefulGPTForCausalLM.from_backbone(
            folder, dtype=torch.bfloat16, attn_implementation="eager", num_groups=4
        )
        assert model.dtype == model.config.dtype == torch.bfloat16 and model.config.num_groups == 4
        assert model.model.language_model.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="num_pases"):
        StatefulGPTForCausalLM.from_backbone(str(tmp_path), num_pases=3)
    for wrong in ({"num_pases": 3}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: no field of StatefulGPTConfig"):
            StatefulGPTForCausalLM.from_backbone(made(LlamaConfig(**LLAMA_LIKE)), **wrong)


# What a mixture of experts adds to the loss


def mixture(**config) -> StatefulGPTForCausalLM:
    torch.manual_seed(0)
    backbone = MixtralConfig(**LLAMA_LIKE, num_local_experts=4, router_aux_loss_coef=0.5, sliding_window=None)
    model = AutoModelForCausalLM.from_config(backbone)
    return StatefulGPTForCausalLM.from_backbone(model, feedback="gated_add", head="language_model", **config)


EXPERTS = [
    *("dbrx", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jamba", "jetmoe"),
    *("laguna", "mellum", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
]


@pytest.mark.parametrize("model_type", few(EXPERTS, ["gpt_oss", "jetmoe", "mixtral"]))
def test_experts_are_balanced_by_the_loss_of_the_backbone(model_type):
    backbone = small_model(model_type)
    model = StatefulGPTForCausalLM.from_backbone(
        backbone, head="language_model", num_passes=1, num_no_grad_passes=0
    ).train()
    backbone.train()
    for padding in (0, 3):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :padding] = 0
        labels = ids(2, 9).masked_fill(mask == 0, -100)
        labels[0, padding] = -100  # What padding predicts is nobody's concern.
        inputs = {"input_ids": ids(2, 9), "attention_mask": mask, "labels": labels, "output_router_logits": True}
        expected, got = (fixed_draws(one, inputs) for one in (backbone, model))
        assert expected.aux_loss > 0
        torch.testing.assert_close(got.aux_loss, expected.aux_loss)
        torch.testing.assert_close(got.loss, expected.loss)


def fixed_draws(model, inputs):
    torch.manual_seed(0)
    return model(**inputs)


def test_experts_are_balanced_once_however_many_the_passes():
    model = mixture(num_passes=3, num_no_grad_passes=0).train()
    inputs = {"input_ids": ids(2, 9), "labels": ids(2, 9)}
    model.config.text_config.output_router_logits = True
    out = model(**inputs)
    torch.testing.assert_close(out.loss, out.pass_losses.mean() + 0.5 * out.aux_loss)
    out.loss.backward()
    assert model.model.language_model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    model.config.text_config.output_router_logits = False
    assert model(**inputs).aux_loss is None


def test_a_linear_head_refuses_the_loss_of_experts_by_name():
    config = MixtralConfig(**LLAMA_LIKE, num_local_experts=2, output_router_logits=True)
    with pytest.raises(ValueError, match="set head='language_model' in the configuration"):
        StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config))(ids(1, 4), labels=ids(1, 4))


# What is read of tokens besides their embeddings


@pytest.mark.parametrize("feedback", [None, "correction"])
def test_a_model_that_reads_tokens_in_every_layer_gets_them(feedback):
    backbone = small_model("gemma3n_text")
    model = StatefulGPTForCausalLM.from_backbone(backbone, feedback=feedback)
    with torch.no_grad():
        assert torch.equal(model(ids(2, 9)).logits, backbone(ids(2, 9)).logits)
    with pytest.raises(ValueError, match=r"Gemma3nTextModel reads the tokens themselves.*pass input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids(2, 9)))
    assert isinstance(model.config.text_config, Gemma3nTextConfig)


# One type of numbers


def test_all_of_a_model_is_of_one_type_whatever_the_decoder_says():
    config = StatefulGPTConfig(text_config=LlamaConfig(**LLAMA_LIKE, dtype="bfloat16"))
    for model, dtype in (
        (StatefulGPTForCausalLM(config), torch.float32),
        (AutoModelForCausalLM.from_config(StatefulGPTConfig(text_config=config.text_config), dtype="bfloat16"), None),
    ):
        dtype = dtype or torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        model(ids(2, 6), labels=ids(2, 6)).loss.backward()


def test_made_from_its_configuration_a_model_is_of_the_type_that_the_decoder_says():
    config = StatefulGPTConfig(text_config=LlamaConfig(**LLAMA_LIKE, dtype="bfloat16"))
    assert AutoModelForCausalLM.from_config(config).dtype == torch.bfloat16


# Losses of several passes hold few logits


@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 11),
    at_a_time=st.integers(1, 12),
    counted=st.booleans(),
    backbone=st.sampled_from(["llama", "gateloop"]),
)
def test_a_loss_in_chunks_is_the_loss(batch, length, at_a_time, counted, backbone):
    model = stateful(backbone, num_passes=3).train()
    tokens = ids(batch, length)
    labels = tokens.masked_fill(ids(batch, length, seed=1) % 3 == 0, -100)
    labels[:, -1] = tokens[:, -1]
    more = {"num_items_in_batch": torch.tensor(7)} if counted else {}
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "TOKENS_AT_A_TIME", at_a_time)
        for most in (language_modeling.MANY_LOGITS, 0):
            patch.setattr(language_modeling, "MANY_LOGITS", most)
            model.zero_grad()
            out = model(tokens, labels=labels, **more)
            out.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([out.pass_losses, out.logits, *gradients])
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole)


# Heads, and what quantisers know


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "phi", "modernbert-decoder"])
def test_the_head_is_that_of_the_backbone_bit_for_bit_saved_or_not(model_type, tmp_path):
    """A scale, a cap, a bias, a transform."""
    backbone = small_model(model_type)
    model = StatefulGPTForCausalLM.from_backbone(backbone)
    model.save_pretrained(tmp_path)
    again = StatefulGPTForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = backbone(ids(2, 9)).logits
        assert model.config.head == "language_model"
        mask = torch.arange(18).view(2, 9) % 3 == 0
        assert torch.equal(model(ids(2, 9), num_passes=1, logits_to_keep=mask).logits, expected[mask])
        for ours in (model, again.eval()):
            assert torch.equal(ours(ids(2, 9), num_passes=1).logits, expected)
            assert torch.equal(ours(ids(2, 9), num_passes=1, logits_to_keep=2).logits, expected[:, -2:])
    tied = backbone.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    again.resize_token_embeddings(70)
    assert again(ids(2, 9)).logits.shape == (2, 9, 70)


def test_no_linear_layer_that_a_quantiser_should_know_is_of_a_class_of_its_own():
    for backbone in ("gateloop-hybrid", "llama"):
        for feedback in ("gated_add", "glu", "correction"):
            model = stateful(backbone, torch.float32, feedback=feedback)
            own = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
            assert all("transition" in name for name in own), own


def test_a_decoder_that_does_not_read_is_decoder_is_no_encoder():
    config = GPTNeoXConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=False)
    StatefulGPTForCausalLM(StatefulGPTConfig(text_config=config))(ids(1, 5))


def test_a_configuration_that_is_no_language_models_is_refused_by_name():
    with pytest.raises(Exception, match=r"has no vocab_size; it must be that of a language model.*get_text_config"):
        StatefulGPTConfig(text_config={"model_type": "got_ocr2"})
