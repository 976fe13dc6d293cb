"""`config.json` of the families with learned positions (GPT-2, OPT) -> `ArchConfig`; torch-free.

Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

from replicas.models.arch import ArchConfig, LayerSpec, NormKind, PositionKind
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_fields import activation_name, default_head_dim, shared_fields


def gpt2_from_hf(fields: ConfigFields) -> ArchConfig:
    """GPT2LMHeadModel, under its own key names or the general ones."""
    if fields.flag("add_cross_attention", default=False):
        raise fields.wrong(
            "add_cross_attention", True, "false: only decoder-only models are served"
        )
    model_dim = fields.integer("n_embd", "hidden_size")
    num_heads = fields.integer("n_head", "num_attention_heads")
    width_key = "n_embd" if "n_embd" in fields else "hidden_size"
    head_dim = default_head_dim(fields, width_key, num_heads)
    ffn_dim = fields.integer("n_inner", default=4 * model_dim)
    # reorder_and_upcast_attn asks for fp32 scores and softmax, which every backend does anyway.
    fields.flag("reorder_and_upcast_attn", default=False)
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", default=True) else 1.0
    by_depth = fields.flag("scale_attn_by_inverse_layer_idx", default=False)
    num_layers = fields.integer("n_layer", "num_hidden_layers")
    return ArchConfig(
        family="gpt2",
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        layers=tuple(
            LayerSpec(ffn_dim=ffn_dim, attention_scale=scale / (index + 1 if by_depth else 1))
            for index in range(num_layers)
        ),
        max_position=fields.integer("n_positions", "max_position_embeddings", default=1024),
        norm=NormKind.LAYER,
        norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
        activation=activation_name(fields, "activation_function", "gelu_new"),
        gated_mlp=False,
        position=PositionKind.LEARNED,
        rope=None,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **shared_fields(fields, bos=50256, eos=(50256,)),
    )


def opt_from_hf(fields: ConfigFields) -> ArchConfig:
    """OPTForCausalLM, OPT-350m's post-norm and projections included."""
    model_dim = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    ffn_dim = fields.integer("ffn_dim")
    norm_before = fields.flag("do_layer_norm_before", default=True)
    bias = fields.flag("enable_bias", default=True)
    embed_dim = fields.integer("word_embed_proj_dim", default=model_dim)
    final_norm = norm_before and not fields.flag("_remove_final_layer_norm", default=False)
    return ArchConfig(
        family="opt",
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=default_head_dim(fields, "hidden_size", num_heads),
        layers=(LayerSpec(ffn_dim=ffn_dim),) * fields.integer("num_hidden_layers"),
        max_position=fields.integer("max_position_embeddings", default=2048),
        norm=NormKind.LAYER,
        norm_eps=1e-5,  # torch's default: OPT's config has no key for it
        activation=activation_name(fields, "activation_function", "relu"),
        gated_mlp=False,
        position=PositionKind.LEARNED,
        rope=None,
        position_offset=2,
        embed_dim=0 if embed_dim == model_dim else embed_dim,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        norm_before=norm_before,
        final_norm=final_norm,
        norm_affine=fields.flag("layer_norm_elementwise_affine", default=True),
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        **shared_fields(fields, bos=2, eos=(2,)),
    )
