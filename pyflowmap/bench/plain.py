"""The DiT block in plain torch: what a stranger would write, and what torch.func.jvp is at its best with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention

import pyflowmap as pfm

__all__ = ["PlainBlock", "plain"]


class PlainBlock(pfm.nn.DiTBlock):
    """The same parameters, the same mathematics, no function of ours."""

    def forward(self, x: Tensor, e: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        b, n, width = x.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(e)[:, None].chunk(6, -1)
        h = layer_norm(x, (width,), eps=1e-6) * (1.0 + scale) + shift
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (rms_norm(y, y.shape[-1:], w, 1e-6) for y, w in ((q, self.query_norm), (k, self.key_norm)))
        if cos is not None and sin is not None:
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + gate * self.out(attended)
        h = layer_norm(x, (width,), eps=1e-6) * (1.0 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.down(gelu(self.up(h), approximate="tanh"))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([cos * a - sin * b, cos * b + sin * a], -1)


def plain(network: Any) -> Any:
    """`network`, a DiT or one of its blocks, with plain blocks over the same parameters."""
    if isinstance(network, pfm.nn.DiTBlock):
        twin = PlainBlock.__new__(PlainBlock)
        twin.__dict__ = dict(network.__dict__)
        return twin
    kind: Any = type(network)
    twin = kind.__new__(kind)
    twin.__dict__ = {**network.__dict__, "_modules": dict(network._modules)}
    twin.blocks = torch.nn.ModuleList(plain(block) for block in network.blocks)
    return twin
