"""The classes of transformers that are our GPT with some config: their names, settings and values.

The tables are the content. OUTER_TABLE and BLOCK_TABLE: the names of the modules there.
FIELD_TABLE: the names of the settings in their config.json. ARCHITECTURES: for each class, where it
differs from its column, the settings it fixes, and the values of its other switches that our GPT
computes too. A class with several layouts, as Falcon's, has an entry for each. gpt.py reads and
writes by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tinyfm.hub.layout import name_pairs

# ---- names --------------------------------------------------------------------------------------

# tinyfm            GPT-1, GPT-2      Llama and others    BLOOM, Falcon
OUTER_TABLE = """
token_embedding     transformer.wte   model.embed_tokens  transformer.word_embeddings
position_embedding  transformer.wpe   -                   -
embed_norm          -                 -                   transformer.word_embeddings_layernorm
norm                transformer.ln_f  model.norm          transformer.ln_f
head                lm_head           lm_head             lm_head
"""
BLOCKS = ("blocks.*", "transformer.h.*", "model.layers.*", "transformer.h.*")
BLOCK_TABLE = """
norm1               ln_1              input_layernorm           input_layernorm
attention.q         attn.c_attn.q     self_attn.q_proj          self_attention.query_key_value.q
attention.k         attn.c_attn.k     self_attn.k_proj          self_attention.query_key_value.k
attention.v         attn.c_attn.v     self_attn.v_proj          self_attention.query_key_value.v
attention.q_norm    -                 self_attn.q_norm          -
attention.k_norm    -                 self_attn.k_norm          -
attention.out       attn.c_proj       self_attn.o_proj          self_attention.dense
norm2               ln_2              post_attention_layernorm  post_attention_layernorm
mlp.gate            -                 mlp.gate_proj             -
mlp.up              mlp.c_fc          mlp.up_proj               mlp.dense_h_to_4h
mlp.down            mlp.c_proj        mlp.down_proj             mlp.dense_4h_to_h
"""

# tinyfm        GPT-1, GPT-2         Llama and others         BLOOM, Falcon
FIELD_TABLE = """
vocab_size      vocab_size           vocab_size               vocab_size
context_length  n_positions          max_position_embeddings  max_position_embeddings
n_layer         n_layer              num_hidden_layers        num_hidden_layers
n_head          n_head               num_attention_heads      num_attention_heads
n_kv_head       -                    num_key_value_heads      -
d_model         n_embd               hidden_size              hidden_size
d_head          -                    head_dim                 -
d_ff            n_inner              intermediate_size        -
norm_eps        layer_norm_epsilon   rms_norm_eps             layer_norm_epsilon
tied            tie_word_embeddings  tie_word_embeddings      tie_word_embeddings
dropout         resid_pdrop          -                        -
dropout         embd_pdrop           -                        -
dropout         attn_pdrop           -                        -
"""
# The rotary extension that Llama 3.1 introduced.
ROPE_FIELD_TABLE = """
rope_factor            factor
rope_low_freq_factor   low_freq_factor
rope_high_freq_factor  high_freq_factor
rope_original_context  original_max_position_embeddings
"""
GPT2_COLUMN = 1
LLAMA_COLUMN = 2
BLOOM_COLUMN = 3


@dataclass(frozen=True)
class Architecture:
    """One class of transformers: which of our models it computes, and how to write them."""

    title: str  # name of the class
    model_type: str  # its name in config.json
    column: int  # its column in the tables
    fixed: dict[str, Any]  # our fields -> the only value that the class computes
    allowed: dict[str, tuple]  # their fields -> values that ours computes; the first is written
    defaults: dict[str, Any]  # their fields -> value that transformers takes if the field is absent
    biases: tuple[str, ...] = ()  # their fields that our `bias` sets
    other_names: dict[str, str] = field(default_factory=dict)  # our modules, not as in the column
    other_fields: dict[str, str] = field(default_factory=dict)  # the same of settings; "-" for none
    aliases: dict[str, str] = field(default_factory=dict)  # their older fields -> the newer ones

    def names(self) -> dict[str, str]:
        """Our modules -> theirs."""
        found = dict(name_pairs(OUTER_TABLE, self.column))
        for ours, theirs in name_pairs(BLOCK_TABLE, self.column):
            found[f"{BLOCKS[0]}.{ours}"] = f"{BLOCKS[self.column]}.{theirs}"
        return found | self.other_names

    def fields(self) -> list[tuple[str, str]]:
        """(our name, their name) of each setting."""
        pairs = [
            (ours, theirs)
            for ours, theirs in name_pairs(FIELD_TABLE, self.column)
            if ours not in self.other_fields
        ]
        pairs += [(ours, theirs) for ours, theirs in self.other_fields.items() if theirs != "-"]
        return pairs + [("bias", theirs) for theirs in self.biases]

    def needs(self, d_model: int, n_head: int) -> dict[str, Any]:
        """Our fields -> the value that a model of this width and number of heads must have.

        Sizes without a field follow from these two: heads fill the width, each has its own key and
        value, and the MLP is four times as wide.
        """
        d_head = d_model // n_head
        needed = {"n_kv_head": n_head, "d_head": d_head, "d_ff": 4 * d_model} | self.fixed
        for ours, _ in self.fields():
            needed.pop(ours, None)
        # In transformers, the heads of a Llama must divide the width too.
        if "d_head" in needed or self.model_type == "llama":
            needed["d_model"] = d_head * n_head
        if self.has_window():
            del needed["window"]
        return needed

    def has_window(self) -> bool:
        """Whether the class has a window, which gpt.read_window reads."""
        return "sliding_window" in self.defaults


# ---- values -------------------------------------------------------------------------------------

# What a class computes if its entry does not say otherwise.
USUAL = {
    "position": "rope", "rope_pairs": "halves", "window": 0, "block": "pre-norm",
    "norm": "rmsnorm", "norm_bias": False, "embed_norm": False, "mlp": "swiglu", "qk_norm": False,
    "bias": False, "embedding_scale": 1.0, "attention_scale": 0.0, "residual_scale": 1.0,
    "logit_scale": 1.0,
}  # fmt: skip
LAYERNORM = USUAL | {"norm": "layernorm", "norm_bias": True}
FALCON = LAYERNORM | {"mlp": "exact-gelu"}

UNQUANTISED = {"quantization_config": (None,)}
SILU = {"hidden_act": ("silu", "swish")} | UNQUANTISED
LLAMA_DEFAULTS = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
GPT2_DEFAULTS = {
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
FALCON_FIELDS = {"d_ff": "ffn_hidden_size"}
FALCON_ALLOWED = {
    "alibi": (False,),  # it rounds the slopes to bfloat16 and divides them by sqrt(d_head)
    "parallel_attn": (True,),
    "activation": ("gelu",),
} | UNQUANTISED
FALCON_DEFAULTS = {
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "bias": False,
    "ffn_hidden_size": None,
    "num_kv_heads": None,
    "new_decoder_architecture": False,
    "num_ln_in_parallel_attn": None,
}

# A model is saved as the first architecture that can express it.
ARCHITECTURES = (
    Architecture(
        title="Qwen3ForCausalLM",
        model_type="qwen3",
        column=LLAMA_COLUMN,
        fixed=USUAL | {"qk_norm": True},
        allowed=SILU | {"attention_bias": (False,)},
        defaults=LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    Architecture(
        title="LlamaForCausalLM",
        model_type="llama",
        column=LLAMA_COLUMN,
        fixed=USUAL,
        allowed=SILU,
        defaults=LLAMA_DEFAULTS
        | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
        biases=("attention_bias", "mlp_bias"),
    ),
    Architecture(
        title="MistralForCausalLM",
        model_type="mistral",
        column=LLAMA_COLUMN,
        fixed=USUAL,
        allowed=SILU
        | {"layer_types": (None,), "use_sliding_window": (True,), "max_window_layers": (0,)},
        defaults=LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    Architecture(
        title="GraniteForCausalLM",
        model_type="granite",
        column=LLAMA_COLUMN,
        fixed=USUAL,
        allowed=SILU,
        defaults=LLAMA_DEFAULTS
        | {
            "num_key_value_heads": None,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        biases=("attention_bias", "mlp_bias"),
        other_fields={
            "embedding_scale": "embedding_multiplier",
            "attention_scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",  # its inverse: see gpt.py
        },
    ),
    Architecture(
        title="CohereForCausalLM",
        model_type="cohere",
        column=LLAMA_COLUMN,
        fixed=USUAL | {"norm": "layernorm", "block": "parallel", "rope_pairs": "neighbours"},
        allowed=SILU | {"use_qk_norm": (False,), "attention_bias": (False,)},
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "logit_scale": 0.0625,
            "rope_theta": None,  # 10,000 for transformers 4, and 500,000 for transformers 5
        },
        other_fields={"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
    ),
    Architecture(
        title="OpenAIGPTLMHeadModel",
        model_type="openai-gpt",
        column=GPT2_COLUMN,
        fixed=LAYERNORM
        | {"position": "learned", "block": "post-norm", "mlp": "gelu", "bias": True},
        allowed={"afn": ("gelu",)} | UNQUANTISED,  # there "gelu" is the tanh formula
        defaults=GPT2_DEFAULTS,
        other_names={
            "token_embedding": "transformer.tokens_embed",
            "position_embedding": "transformer.positions_embed",
        },
        other_fields={"d_ff": "-"},
    ),
    Architecture(
        title="GPT2LMHeadModel",
        model_type="gpt2",
        column=GPT2_COLUMN,
        fixed=LAYERNORM | {"position": "learned", "mlp": "gelu", "bias": True},
        allowed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        | UNQUANTISED,
        defaults=GPT2_DEFAULTS,
    ),
    Architecture(
        title="BloomForCausalLM",
        model_type="bloom",
        column=BLOOM_COLUMN,
        fixed=LAYERNORM | {"position": "alibi", "embed_norm": True, "mlp": "gelu", "bias": True},
        allowed={"apply_residual_connection_post_layernorm": (False,)} | UNQUANTISED,
        defaults={"seq_length": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        other_fields={"context_length": "seq_length", "n_layer": "n_layer", "n_head": "n_head"},
        aliases={
            "n_embed": "hidden_size",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    # Falcon's layouts: that of 7B; that of 40B and 180B; and that of Falcon 2 11B.
    Architecture(
        title="FalconForCausalLM",
        model_type="falcon",
        column=BLOOM_COLUMN,
        fixed=FALCON | {"block": "parallel", "n_kv_head": 1},
        allowed=FALCON_ALLOWED
        | {
            "new_decoder_architecture": (False,),
            "multi_query": (True,),
            "num_ln_in_parallel_attn": (None, 1),
        },
        defaults=FALCON_DEFAULTS,
        biases=("bias",),
        other_fields=FALCON_FIELDS,
    ),
    Architecture(
        title="FalconForCausalLM",
        model_type="falcon",
        column=BLOOM_COLUMN,
        fixed=FALCON | {"block": "parallel-two-norms"},
        allowed=FALCON_ALLOWED
        | {"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2, None)},
        defaults=FALCON_DEFAULTS,
        biases=("bias",),
        other_names={
            "blocks.*.norm1": "transformer.h.*.ln_attn",
            "blocks.*.norm2": "transformer.h.*.ln_mlp",
        },
        other_fields=FALCON_FIELDS | {"n_kv_head": "num_kv_heads"},
    ),
    Architecture(
        title="FalconForCausalLM",
        model_type="falcon",
        column=BLOOM_COLUMN,
        fixed=FALCON | {"block": "parallel"},
        allowed=FALCON_ALLOWED
        | {"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (1,)},
        defaults=FALCON_DEFAULTS,
        biases=("bias",),
        other_fields=FALCON_FIELDS | {"n_kv_head": "num_kv_heads"},
    ),
)

# model_type of classes near to these -> the class, and what our GPT does not compute of it.
NEAR = {
    "cohere2": "Cohere2ForCausalLM has a window and rotary positions in three of four layers only",
    "falcon_h1": "FalconH1ForCausalLM has state-space layers",
    "falcon_mamba": "FalconMambaForCausalLM has state-space layers",
    "gemma": "GemmaForCausalLM gates its MLP by a GELU",
    "gemma2": "Gemma2ForCausalLM gates its MLP by a GELU and caps its logits",
    "gpt_neo": "GPTNeoForCausalLM has a window in every second layer only",
    "gpt_neox": "GPTNeoXForCausalLM rotates a part of each head only",
    "gptj": "GPTJForCausalLM rotates a part of each head only",
    "granitemoe": "GraniteMoeForCausalLM is a mixture of experts",
    "mixtral": "MixtralForCausalLM is a mixture of experts",
    "opt": "OPTForCausalLM has an MLP with ReLU",
    "phi": "PhiForCausalLM rotates a part of each head only",
    "qwen2": "Qwen2ForCausalLM has biases on queries, keys and values only",
    "RefinedWeb": "RWForCausalLM is Falcon under an older name: download a newer version",
    "RefinedWebModel": "RWForCausalLM is Falcon under an older name: download a newer version",
}
# Ends of the names of classes with another head than a language model's.
OTHER_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "DoubleHeadsModel")
