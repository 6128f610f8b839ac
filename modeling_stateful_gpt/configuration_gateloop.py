"""The decoder's configuration: the usual fields under their usual names, and one token mixer per layer."""

# Before all else: it says what is too old.
from .compat import ROPE_INIT_FUNCTIONS, RopeParameters, allow_layer_types

# isort: split
from collections.abc import Collection
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict

from .adapters import write_gateloop_rows
from .gateloop_layer import TRANSITIONS
from .mlp import MLPS
from .ranges import CheckedConfig, check_name, check_ranges, check_rope
from .reversible import FORMS
from .token_mixers import TOKEN_MIXERS

NAMES: dict[str, Collection[str]] = {
    "layer_types": TOKEN_MIXERS,
    "state_transition": TRANSITIONS,
    "reversible_form": FORMS,
    "position_embedding_type": ("rope", "none"),
    "mlp_type": MLPS,
}
"""What the fields may say."""

if TYPE_CHECKING:
    # Transformers imports a folder's code under the folder's name and a hash of the files it finds imported. With this
    # line, folders of the same name whose models differ do not share a configuration, for which it knows one model.
    from .modeling_gateloop import GateLoopModel  # noqa: F401


@strict
class GateLoopConfig(CheckedConfig):
    r"""
    A pre-norm decoder. `layer_types` names each layer's token mixer; with `"full_attention"` everywhere, the default,
    it is a plain GPT.

    Args:
        layer_types: one entry per layer, each a key of `TOKEN_MIXERS` in `token_mixers.py`: `"full_attention"`,
            `"gateloop"`, `"reversible"` or `"rwkv"`, in any mixture.
        gateloop_num_heads: heads of the GateLoop layers, each with one transition and a state of
            `(hidden_size / gateloop_num_heads)²` numbers; as many as channels by default.
        state_transition: what the GateLoop layers multiply their state by: `"complex"`, `"signed"` (real), `"positive"`
            or `"cartesian"`, a key of `TRANSITIONS` in `gateloop_layer.py`.
        gateloop_output_norm: a LayerNorm over what the GateLoop layers read from their state.
        reversible_form: how the reversible layers change their state: `"additive"` or `"forgetting"`, a key of `FORMS`
            in `reversible.py`.
        num_key_value_heads: fewer than `num_attention_heads` for grouped-query attention.
        position_embedding_type: `"rope"`, or `"none"`: no positions but those that the causal mask implies.
        mlp_type: `"gelu"` or `"swiglu"`, a key of `MLPS` in `mlp.py`; `mlp_bias`: whether it has biases.
        hidden_dropout: dropout on the embeddings and on what each block adds to the residual stream.
    """

    model_type = "gateloop"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 258
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    gateloop_num_heads: int | None = None
    state_transition: str = "complex"
    gateloop_output_norm: bool = True
    reversible_form: str = "additive"
    position_embedding_type: str = "rope"
    rope_parameters: RopeParameters | dict | None = None
    mlp_type: str = "gelu"
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.gateloop_num_heads is None:
            self.gateloop_num_heads = self.hidden_size
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # Saved with every checkpoint, so that each Auto class finds its class in the code beside the weights.
        self.auto_map = {
            "AutoConfig": "configuration_gateloop.GateLoopConfig",
            "AutoModel": "modeling_gateloop.GateLoopModel",
            "AutoModelForCausalLM": "modeling_gateloop.GateLoopForCausalLM",
            "AutoModelForSequenceClassification": "modeling_gateloop.GateLoopForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_gateloop.GateLoopForTokenClassification",
        }

    def to_dict(self):
        write_gateloop_rows(self.model_type)
        return super().to_dict()

    def validate_architecture(self):
        check_ranges(self)
        if self.rope_parameters:
            check_rope(self.rope_parameters, {"default", *ROPE_INIT_FUNCTIONS}, self.head_dim)
        for field, allowed in NAMES.items():
            value = getattr(self, field)
            for name in value if isinstance(value, list) else [value]:
                check_name(field, name, allowed)
        for whole, part in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
            ("hidden_size", "gateloop_num_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} ({getattr(self, whole)}) must be a multiple of {part} ({getattr(self, part)})."
                )
        if self.hidden_size % 2 and "reversible" in self.layer_types:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be even: a reversible state has two halves.")
        if self.head_dim % 2 and self.position_embedding_type == "rope" and "full_attention" in self.layer_types:
            raise ValueError(
                f"head_dim ({self.head_dim}; by default hidden_size / num_attention_heads) must be even: rotary "
                "positions turn pairs of numbers."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; it must be a token of the vocabulary, from 0 to "
                f"vocab_size - 1 = {self.vocab_size - 1}, or None."
            )

    def validate_layer_type(self):
        # transformers allows only the layer types of its own models; ours are among the names above.
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; num_hidden_layers is {self.num_hidden_layers}."
            )


allow_layer_types(tuple(TOKEN_MIXERS))
GateLoopConfig.register_for_auto_class()
