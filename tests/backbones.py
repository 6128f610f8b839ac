"""Feedback around every causal language model of transformers: small random ones, each in a process of its own.

python tests/backbones.py                 # all of them, into docs/backbones.md
python tests/backbones.py llama gemma2    # some, to the terminal
"""

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_stateful_gpt import StatefulGPTForCausalLM
from modeling_stateful_gpt.probe import why_no_groups

TABLE = Path(__file__).parents[1] / "docs" / "backbones.md"
MEMORY = 12 * 2**30
SECONDS = 120

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "sliding_window": 8, "attention_chunk_size": 8, "chunk_size": 8,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
    "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "n_groups": 1, "state_size": 8, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16,
    "mamba_expand": 2, "mamba_dt_rank": 4, "time_step_rank": 4, "lru_width": 32, "attention_window_size": 8,
    "num_memory_heads": 2,
    # inputs of each layer
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8,
    # other names of the same
    "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "dff": 48, "ffn_hidden_size": 48, "dim_ff": 48, "word_embed_proj_dim": 32,
    "rotary_dim": 4, "n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 64, "attention_hidden_size": 32,
    "global_head_dim": 8, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "dim_model": 32, "dim_head": 8, "encoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPECIAL: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"layer_group_size": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere": {"logit_scale": 0.5},
    "falcon_h1": {"lm_head_multiplier": 0.05},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {"logits_scaling": 8.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_model": 32, "d_inner": 48},
    "xlstm": {"num_heads": 4, "chunk_size": 64},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "attention_head_dim": 16,
        "attention_hidden_size": 64, "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_key_value_heads": 4,
        "attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 4, "mamba_headdim": 16,
    },
}  # fmt: skip
"""Fields that follow from no general rule."""

VARIANTS = ({}, {"num_key_value_heads": 4}, {"num_hidden_layers": 6}, {"num_key_value_heads": 1})
"""Tried in turn, until one can be built and run."""

NO_DECODERS = {
    "encoder": "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod",
    "encoder and decoder": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet trocr whisper",
    "of images, sound or bytes": "blt fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified "
    "gemma4_unified_assistant git got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody "
    "phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp dots3_note emu3",
}


def small_config(model_type: str, variant: dict | None = None) -> PreTrainedConfig:
    """A configuration of this type with two to six narrow layers."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    nested = default.sub_configs.get("text_config") and default.text_config
    fields = vars(nested or default)
    names = getattr(type(nested or default), "attribute_map", {})
    sizes = {names.get(name, name): value for name, value in {**SIZES, **(variant or {})}.items()}
    given = {name: value for name, value in sizes.items() if name in fields} | SPECIAL.get(model_type, {})
    return kind(text_config={"model_type": nested.model_type, **given}) if nested else kind(**given)


def small_model(model_type: str) -> AutoModelForCausalLM:
    """A random one, with weights large enough for every path to matter."""
    for variant in VARIANTS:
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small_config(model_type, variant)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
                model.get_input_embeddings().weight[SIZES["pad_token_id"]] = 0  # As some models load it.
                model(input_ids=tokens())
            return model
        except Exception as error:
            reason = error
    raise reason


def tokens(padding: int = 0) -> torch.Tensor:
    """Two rows of thirteen; of the first, `padding` on the left."""
    ids = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))
    ids[0] = torch.cat([torch.ones(padding, dtype=torch.long), ids[0, : 13 - padding]])
    return ids


@dataclass
class Row:
    model_type: str
    built: bool = False
    """Whether a small one could be made and run at all."""
    refused: str = ""
    """Why feedback cannot be put around it."""
    solver: str = ""
    head: str = ""
    padding: bool = False
    """Whether padding changes nothing."""
    training: bool = False
    fault: str = ""

    @property
    def works(self) -> bool:
        return self.built and not self.refused and not self.fault and self.training


def check(model_type: str) -> Row:
    """Puts feedback around a small model, and holds solving against stepping, with padding and without, generating
    with a cache against without, a saved model against itself; makes a training step."""
    row = Row(model_type)
    try:
        backbone = small_model(model_type)
    except Exception as error:
        row.fault = short(error)
        return row
    row.built = True
    try:
        model = StatefulGPTForCausalLM.from_backbone(backbone)
    except ValueError as error:
        row.refused = short(error)
        return row
    except Exception as error:
        row.fault = f"from_backbone: {short(error)}"
        return row
    try:
        try_out(model, backbone, row)
    except Exception as error:
        row.fault = short(error)
    return row


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removeprefix("ValueError: ").splitlines()[0][:160]


@torch.no_grad()
def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def try_out(model: StatefulGPTForCausalLM, backbone: AutoModelForCausalLM, row: Row) -> None:
    ids, row.head = tokens(), model.config.head
    with torch.no_grad():
        assert torch.equal(model(ids, num_passes=1).logits, backbone(input_ids=ids).logits), "other logits at first"
        for parameter in model.model.feedback.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
        solved, stepped = model(ids), model(ids, solver="sequential")
        assert not same(stepped.logits, backbone(input_ids=ids).logits), "feedback changes nothing"
        assert same(solved.logits, stepped.logits), "solving is not stepping"
        row.solver = "cyclic" if why_no_groups(model.model.backbone, 2) is None else "Jacobi"
        greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with_cache, without = (model.generate(ids, use_cache=cache, **greedy) for cache in (True, False))
        assert torch.equal(with_cache, without), "other tokens with a cache"
        padded, short_ids = tokens(padding=3), ids[:1, :10]
        mask = torch.ones_like(padded)
        mask[0, :3] = 0
        alone = model(short_ids).logits[0]
        row.padding = all(
            same(model(padded, attention_mask=mask, solver=solver).logits[0, 3:], alone)
            for solver in (None, "sequential")
        ) and torch.equal(
            model.generate(padded, attention_mask=mask, **greedy)[0, -5:], model.generate(short_ids, **greedy)[0, -5:]
        )
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = StatefulGPTForCausalLM.from_pretrained(folder).eval()
        # Kernels of experts are not the same twice, to the last bit.
        assert torch.allclose(again(ids).logits, solved.logits, atol=1e-5), "other logits after loading"
    loss = model.train()(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    row.training = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients) and len(gradients) > 3


def in_a_process(model_type: str, results: multiprocessing.Queue) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results.put(check(model_type))


def check_all(model_types: list[str]) -> Iterator[Row]:
    context = multiprocessing.get_context("fork")
    for model_type in model_types:
        results = context.Queue()
        process = context.Process(target=in_a_process, args=(model_type, results))
        process.start()
        try:
            yield results.get(timeout=SECONDS)
        except Exception:
            yield Row(model_type, fault=f"took more than {SECONDS} s or {MEMORY >> 30} GiB")
        process.kill()
        process.join()


def line(row: Row) -> str:
    what = "works" if row.works else f"refused: {row.refused}" if row.refused else f"fails: {row.fault}"
    how = [row.solver, row.head.replace("_", " "), "exact" if row.padding else "", "yes" if row.training else ""]
    return f"| {row.model_type} | {what} | " + " | ".join(how) + " |"


def write(rows: list[Row]) -> str:
    others = {name for names in NO_DECODERS.values() for name in names.split()}
    decoders = [row for row in rows if row.model_type not in others]
    built = [row for row in decoders if row.built]
    works = sum(row.works for row in built)
    head = ["| model type | feedback around it | solver | head | padding | training |", "|---|---|---|---|---|---|"]
    unbuilt = [row for row in decoders if not row.built]
    sections = [
        "# Backbones",
        "`python tests/backbones.py` writes this page. It puts feedback around a small random model of every type that "
        f"`AutoModelForCausalLM` of transformers {transformers.__version__} knows. For each it checks:",
        "- the logits at first are those of the backbone, bit for bit;\n"
        "- solving the recurrence gives what stepping through it gives;\n"
        "- generating with a cache and without gives the same tokens;\n"
        "- padding on the left changes nothing (column “padding”);\n"
        "- a saved model loads to the same logits;\n"
        "- a training step gives finite gradients.",
        f"Of {len(built)} types of decoders, {works} work ({100 * works / max(len(built), 1):.0f} %).",
        "The solver is what cyclic passes come down to: Jacobi takes more of them. The head is one "
        "linear layer, or the language model's own.",
        "Attention by an index (DeepSeek-V3.2 and others) was tried on texts that are no longer than what it keeps "
        "(`index_topk`). On longer ones, the steps of these models by themselves differ from their pass.",
        "\n".join(head + [line(row) for row in built]),
    ]
    if unbuilt:
        sections += [
            "## Not tried",
            "No small model of these types could be made from general sizes:",
            "\n".join(f"- {row.model_type}: {row.fault}" for row in unbuilt),
        ]
    sections += ["## No decoders of text"]
    for kind, names in NO_DECODERS.items():
        here = [row for row in rows if row.model_type in names.split()]
        lines = "\n".join(f"- {row.model_type}: {row.refused or row.fault or 'works'}" for row in here)
        sections += [f"### {kind.capitalize()}", lines]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    asked = sys.argv[1:]
    rows = []
    for row in check_all(asked or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        rows.append(row)
        print(line(row), flush=True)
    if not asked:
        TABLE.write_text(write(rows))
