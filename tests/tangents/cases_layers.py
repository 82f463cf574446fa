"""Products, layers with weights, normalisations, pooling, resampling, attention, dropout."""

from __future__ import annotations

from typing import Any

import torch
from tangents.case import Case, normal, positive
from torch import Tensor, nn
from torch.nn import functional as F


def of(*shapes: tuple[int, ...]) -> Any:
    return lambda: tuple(normal(*shape) for shape in shapes)


PRODUCTS = [
    Case("linear", F.linear, of((2, 3, 5), (4, 5), (4,))),
    Case("linear: no bias", F.linear, of((3, 5), (4, 5))),
    Case("bilinear", F.bilinear, of((3, 5), (3, 4), (2, 5, 4), (2,))),
    Case("matmul", torch.matmul, of((2, 3, 5), (5, 4))),
    Case("matmul: operator", lambda a, b: a @ b, of((2, 1, 3, 5), (2, 5, 4))),
    Case("matmul: constant left", lambda a: torch.ones(2, 3, dtype=a.dtype) @ a, of((3, 4))),
    Case("matmul: of one", lambda a: a @ a.mT, of((2, 3, 4))),
    Case("mm", torch.mm, of((3, 5), (5, 4))),
    Case("bmm", torch.bmm, of((2, 3, 5), (2, 5, 4))),
    Case("mv", torch.mv, of((3, 5), (5,))),
    Case("dot", torch.dot, of((5,), (5,))),
    Case("inner", torch.inner, of((3, 5), (4, 5))),
    Case("outer", torch.outer, of((3,), (5,))),
    Case("vecdot", torch.linalg.vecdot, of((3, 5), (3, 5))),
    Case("cross", lambda a, b: torch.linalg.cross(a, b), of((4, 3), (4, 3))),
    Case("kron", torch.kron, of((2, 3), (3, 2))),
    Case("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])), of((2, 3, 4), (3, 4, 5))),
    Case("addmm", lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), of((4,), (3, 5), (5, 4))),
    Case("baddbmm", lambda c, a, b: torch.baddbmm(c, a, b, alpha=3.0), of((2, 3, 4), (2, 3, 5), (2, 5, 4))),
    Case("baddbmm: forgotten", lambda c, a, b: torch.baddbmm(c, a, b, beta=0), of((2, 3, 4), (2, 3, 5), (2, 5, 4))),
    Case("addbmm", torch.addbmm, of((3, 4), (2, 3, 5), (2, 5, 4))),
    Case("addmv", torch.addmv, of((3,), (3, 5), (5,))),
    Case("addr", lambda c, a, b: torch.addr(c, a, b, beta=2.0), of((3, 5), (3,), (5,))),
    Case("einsum", lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), of((2, 3, 4, 5), (2, 3, 6, 5))),
    Case("einsum: lists", lambda a: torch.einsum(a, [0, 1], a, [2, 1], [0, 2]), of((2, 3)), compiled=False),
    Case("einsum: three", lambda a, b, c: torch.einsum("ij,jk,ki->i", a, b, c), of((2, 3), (3, 4), (4, 2))),
]


CONVOLUTIONS = [
    Case(
        f"conv{n}d",
        lambda x, w, b, n=n: getattr(F, f"conv{n}d")(x, w, b, stride=2, padding=1),
        of((2, 4, *(6, 5, 4)[:n]), (3, 4, *(3,) * n), (3,)),
    )
    for n in (1, 2, 3)
] + [
    Case(
        f"conv_transpose{n}d",
        lambda x, w, b, n=n: getattr(F, f"conv_transpose{n}d")(x, w, b, stride=2, padding=1, output_padding=1),
        of((2, 4, *(4, 3, 2)[:n]), (4, 3, *(3,) * n), (3,)),
    )
    for n in (1, 2, 3)
] + [
    Case("conv2d: groups", lambda x, w, b: F.conv2d(x, w, b, 1, "same", 2, 2), of((2, 4, 6, 5), (6, 2, 3, 3), (6,))),
    Case("conv1d: one sample", F.conv1d, of((4, 6), (3, 4, 3), (3,))),
    Case(
        "convolution",
        lambda x, w, b: torch.convolution(x, w, b, (1, 1), (0, 1), (1, 1), False, (0, 0), 1),
        of((2, 4, 6, 5), (3, 4, 3, 3), (3,)),
    ),
]  # fmt: skip


MEAN, VAR = torch.tensor([0.5, -0.25, 0.0, 1.0]), torch.tensor([1.0, 2.0, 0.5, 3.0])

NORMS = [
    Case("layer_norm", lambda x: F.layer_norm(x, (4, 6)), of((3, 4, 6))),
    Case("layer_norm: affine", lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-6), of((3, 4, 6), (6,), (6,))),
    Case("rms_norm", lambda x: F.rms_norm(x, (6,)), of((3, 4, 6))),
    Case("rms_norm: affine", lambda x, w: F.rms_norm(x, (4, 6), w, 1e-3), of((3, 4, 6), (4, 6))),
    Case("group_norm", lambda x: F.group_norm(x, 2), of((3, 4, 6))),
    Case("group_norm: affine", lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), of((3, 4, 5, 3), (4,), (4,))),
    Case("group_norm: strided", lambda x, w, b: F.group_norm(x, 2, w[:, 0], b[:, 1]), of((3, 4, 6), (4, 2), (4, 2))),
    Case(
        "group_norm: channels last",
        lambda x, w, b: F.group_norm(x.contiguous(memory_format=torch.channels_last), 2, w, b),
        of((3, 4, 5, 3), (4,), (4,)),
        func_jvp=False,
    ),
    Case("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), of((3, 4, 5, 2), (4,), (4,))),
    Case(
        "instance_norm: fixed",
        lambda x, w, b: F.instance_norm(x, MEAN.to(x), VAR.to(x), w, b, use_input_stats=False),
        of((3, 4, 5, 2), (4,), (4,)),
    ),
    Case("batch_norm", lambda x, w, b: F.batch_norm(x, MEAN.to(x), VAR.to(x), w, b), of((3, 4, 5), (4,), (4,))),
    Case("local_response_norm", lambda x: F.local_response_norm(x, 3), of((2, 5, 4)), compiled=False),
    Case("norm_except_dim", lambda v: v / torch.norm_except_dim(v, 2, 1), of((4, 5, 2))),
    Case(
        "weight_norm",
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda: (normal(4, 5, 2), positive(4, 1, 1)),
        func_jvp=False,
        compiled=False,
    ),
]

POOLS = [
    *(
        Case(f"{kind}_pool{n}d", lambda x, f=f"{kind}_pool{n}d": getattr(F, f)(x, 3, 2, 1), of((2, 3, *(7, 6, 5)[:n])))
        for kind in ("avg", "max")
        for n in (1, 2, 3)
    ),
    *(
        Case(f"adaptive_{kind}_pool{n}d", lambda x, f=f"adaptive_{kind}_pool{n}d": getattr(F, f)(x, 2),
             of((2, 3, *(7, 6, 5)[:n])))
        for kind in ("avg", "max")
        for n in (1, 2, 3)
    ),
    Case("max_pool2d: indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], of((2, 3, 4, 6))),
    Case("lp_pool2d", lambda x: F.lp_pool2d(x * x + 0.1, 3.0, 2), of((2, 3, 4, 6))),
]  # fmt: skip

GRID = torch.linspace(-0.9, 0.9, 2 * 3 * 4 * 2).sin().view(2, 3, 4, 2)

RESAMPLING = [
    *(
        Case(f"interpolate: {mode}", lambda x, m=mode: F.interpolate(x, scale_factor=2, mode=m), of((2, 3, *sizes)))
        for mode, sizes in {
            "nearest": (4, 3), "nearest-exact": (4, 3), "linear": (5,), "bilinear": (4, 3), "bicubic": (4, 3),
            "trilinear": (3, 2, 2), "area": (4, 3),
        }.items()
    ),
    Case(
        "interpolate: antialias",
        lambda x: F.interpolate(x, (3, 2), mode="bilinear", antialias=True, align_corners=False),
        of((2, 3, 6, 5)),
    ),
    Case("grid_sample", lambda x: F.grid_sample(x, GRID.to(x), align_corners=False), of((2, 3, 4, 5)), func_jvp=False),
    Case("affine_grid", lambda x: F.affine_grid(x, [2, 1, 3, 4], align_corners=True), of((2, 2, 3)), torch_error=1e-6),
]  # fmt: skip

HEADS = of((2, 3, 6, 4), (2, 3, 5, 4), (2, 3, 5, 8))
SEEN = torch.arange(30).view(6, 5) % 4 > 0
BIAS = torch.linspace(-2.0, 2.0, 60, dtype=torch.float64).view(2, 1, 6, 5)


def attention(name: str, arguments: Any = HEADS, flash: bool = True, **options: Any) -> Case:
    """torch.func.jvp has no derivative of the flash kernel, which a CPU takes where the heads of q, k and v agree."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = {
            n: x.to(q.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()
        }
        return F.scaled_dot_product_attention(q, k, v, **chosen)

    return Case(f"scaled_dot_product_attention: {name}", function, arguments, func_jvp=not flash)


SELF = of((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 4))

ATTENTION = [
    attention("self", SELF),
    attention("cross", flash=False),
    attention("causal", SELF, is_causal=True, scale=0.3),
    attention("boolean mask", flash=False, attn_mask=SEEN),
    attention("additive mask", flash=False, attn_mask=BIAS),
    attention("grouped heads", of((2, 4, 6, 4), (2, 2, 5, 4), (2, 2, 5, 4)), enable_gqa=True),
    attention("no heads", of((2, 6, 4), (2, 5, 4), (2, 5, 4)), flash=False),
]


def multihead(x: Tensor, context: Tensor) -> Tensor:
    torch.manual_seed(5)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).to(x.dtype).eval()
    return layer(x, context, context, need_weights=False)[0]


def multihead_weights(x: Tensor) -> Any:
    torch.manual_seed(5)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).to(x.dtype).eval()
    return layer(x, x, x)


def encoder_layer(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, dtype=torch.float64)
    return layer.to(x.dtype).eval()(x)


MODULES = [
    Case("multi_head_attention_forward: cross", multihead, of((2, 4, 8), (2, 3, 8)), func_jvp=False, compiled=False),
    Case("multi_head_attention_forward: weights", multihead_weights, of((2, 4, 8)), func_jvp=False, compiled=False),
    Case("multi_head_attention_forward: encoder layer", encoder_layer, of((2, 4, 8)), func_jvp=False, compiled=False),
]

DROPOUTS = [
    Case("dropout", lambda x: F.dropout(x, 0.3), of((4, 6)), random=True, compiled=False),
    Case("dropout: off", lambda x: F.dropout(x, 0.3, training=False), of((4, 6)), random=True),
    Case("dropout1d", lambda x: F.dropout1d(x, 0.3), of((3, 4, 6)), random=True, compiled=False),
    Case("dropout2d", lambda x: F.dropout2d(x, 0.3), of((3, 4, 6, 2)), random=True, compiled=False),
    Case("dropout3d", lambda x: F.dropout3d(x, 0.3), of((3, 4, 3, 2, 2)), random=True, compiled=False),
    Case("alpha_dropout", lambda x: F.alpha_dropout(x, 0.3, True), of((4, 6)), random=True, compiled=False),
    Case(
        "feature_alpha_dropout",
        lambda x: F.feature_alpha_dropout(x, 0.3, True),
        of((3, 4, 6)),
        random=True,
        compiled=False,
    ),
    Case(
        "scaled_dot_product_attention: dropout",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True),
        SELF,
        func_jvp=False,
        random=True,
        compiled=False,
    ),
]

CASES = [*PRODUCTS, *CONVOLUTIONS, *NORMS, *POOLS, *RESAMPLING, *ATTENTION, *MODULES, *DROPOUTS]
