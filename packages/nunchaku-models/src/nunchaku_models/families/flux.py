"""FLUX.1: dev, schnell, fill, canny, depth, kontext, krea and their finetunes (checkpoint_format.md section 3)."""

from torch import nn

from nunchaku_models.families.base import Block, Family, LowRankLinear, Modulation

STREAMS = ("encoder_hidden_states", "hidden_states")

JOINT_BLOCK = Block(
    prefix="transformer_blocks",
    count="num_layers",
    modulation=(Modulation("norm1.linear", 6), Modulation("norm1_context.linear", 6)),
    low_rank=(
        LowRankLinear("attn.to_qkv", "qkv_proj", ("attn.to_q", "attn.to_k", "attn.to_v"), judged_by="attn"),
        LowRankLinear(
            "attn.add_qkv_proj",
            "qkv_proj_context",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            judged_by="attn",
        ),
        LowRankLinear("attn.to_out.0", "out_proj", ("attn.to_out.0",), judged_by="attn"),
        LowRankLinear(
            "attn.to_add_out",
            "out_proj_context",
            ("attn.to_add_out",),
            smooth_with="attn.to_out.0",
            other_input=True,
            judged_by="attn",
        ),
        LowRankLinear("ff.net.0.proj", "mlp_fc1", ("ff.net.0.proj",)),
        LowRankLinear("ff.net.2", "mlp_fc2", ("ff.net.2",), after_gelu=True),
        LowRankLinear("ff_context.net.0.proj", "mlp_context_fc1", ("ff_context.net.0.proj",)),
        LowRankLinear("ff_context.net.2", "mlp_context_fc2", ("ff_context.net.2",), after_gelu=True),
    ),
    renamed=(
        ("norm_q", "attn.norm_q"),
        ("norm_k", "attn.norm_k"),
        ("norm_added_q", "attn.norm_added_q"),
        ("norm_added_k", "attn.norm_added_k"),
    ),
    returns=STREAMS,
)

SINGLE_BLOCK = Block(
    prefix="single_transformer_blocks",
    count="num_single_layers",
    modulation=(Modulation("norm.linear", 3),),
    low_rank=(
        LowRankLinear("attn.to_qkv", "qkv_proj", ("attn.to_q", "attn.to_k", "attn.to_v"), judged_by=""),
        # proj_out reads [attention | MLP]: its columns become two layers, its bias goes to the second
        LowRankLinear("attn.to_out", "out_proj", ("proj_out",), columns="head"),
        LowRankLinear("mlp_fc1", "mlp_fc1", ("proj_mlp",), smooth_with="attn.to_qkv", judged_by=""),
        LowRankLinear("mlp_fc2", "mlp_fc2", ("proj_out",), columns="tail", after_gelu=True),
    ),
    renamed=(("norm_q", "attn.norm_q"), ("norm_k", "attn.norm_k")),
    returns=STREAMS,
)


def prepare(model: nn.Module) -> None:
    """Give every attention of `model` that still has diffusers' own processor the one that uses fused projections."""
    # imported here: diffusers takes seconds to import, and reading a file header should not
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

    from nunchaku_kernels.nn import LinearSlice
    from nunchaku_models.families.flux_attention import NunchakuFluxAttnProcessor

    for module in model.modules():
        if not isinstance(module, FluxAttention):
            continue
        if isinstance(module.to_q, LinearSlice):
            # fused already; `fuse_qkv_projections` would put a linear made of placeholder weights in the owner's place
            module._supports_qkv_fusion = False
        if type(module.processor) is FluxAttnProcessor:
            module.set_processor(NunchakuFluxAttnProcessor())


FLUX = Family(
    name="flux",
    transformer_class="FluxTransformer2DModel",
    blocks=(JOINT_BLOCK, SINGLE_BLOCK),
    prepare=prepare,
)
