"""Transformers of diffusers with small random weights, and conditions for them. Every weight is random, so that a wrong
time, sign or argument shows in the output (diffusers leaves some projections at zero)."""

import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)


def _random(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5))
    return network.eval()


def flux(guidance=False):
    return _random(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        )
    )


def sd3():
    return _random(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )


def wan():
    return _random(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        )
    )


def anyflow():
    return _random(
        AnyFlowTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        )
    )


def dit():
    return _random(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
    )


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
