"""`attention`: softmax attention of Tensors or Duals, with a tangent and gradients that never form the matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyflowmap import reference

from .fused import Fused, check
from .modulation import check_floating

__all__ = ["attention", "attention_dual"]

WIDEST = 256  # channels per head of the CUDA kernels


def attention(
    q: Any,  # (B, H, N, E) Tensor or Dual, any strides
    k: Any,  # (B, K, M, E), H a multiple of K: heads share keys and values (GQA)
    v: Any,  # (B, K, M, F)
    *,
    mask: Tensor | None = None,  # broadcastable to (B, H, N, M): True is seen; or numbers, added to the logits
    lengths: Tensor | None = None,  # (B,) integers from 0 to M: sample b has keys j < lengths[b]
    scale: float | None = None,
    causal: bool = False,
    **unknown: Any,
) -> Any:
    """o = softmax(scale q k^T + mask) v, shape (B, H, N, F); scale defaults to 1 / sqrt(E).

    causal    query i sees keys j <= i

    A query that sees nothing gives 0. Of Duals, value and tangent in one pass: with P = softmax(S),
    dS = scale (dq k^T + q dk^T),

        do = P dv + (P * dS) v - rowsum(P * dS) * o

    Memory is O(N): the matrices are formed a block at a time, in backward, too, through value and tangent. Right under
    torch.func.jvp and vmap, autograd and torch.compile. Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023;
    the tangent: Lu & Song 2024, app. F.

    Raises ValueError where shapes do not fit, TypeError for integers and mixed dtypes, NotImplementedError for a mask
    that requires a gradient.

    >>> q = torch.zeros(1, 1, 1, 4)
    >>> attention(q, torch.zeros(1, 1, 2, 4), torch.tensor([[[[1.0], [3.0]]]]))
    tensor([[[[2.]]]])
    """
    if unknown:
        _refuse(unknown)
    if has_torch_function((q, k, v, mask)):
        return handle_torch_function(
            attention, (q, k, v, mask), q, k, v, mask=mask, lengths=lengths, scale=scale, causal=causal
        )
    return _fused(*_call(q, k, v, mask, lengths, scale, causal))


def _refuse(unknown: dict[str, Any]) -> None:
    name = next(iter(unknown))
    hints = {
        "is_causal": "causal=",
        "attn_mask": "mask=",
        "enable_gqa": "no option: heads of q share those of k where these are fewer",
        "dropout_p": "no option: it has no dropout; torch's scaled_dot_product_attention under pfm.jvp has",
    }
    cure = f"; here that is {hints[name]}" if name in hints else "; it has mask, lengths, scale and causal"
    raise TypeError(f"attention has no argument {name!r}{cure}")


def attention_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tangents: tuple[Any, ...],  # dq, dk, dv; None is zero
    tracked: bool,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o, do)."""
    options, operands = _call(q, k, v, mask, lengths, scale, causal)
    dtype = operands[0].dtype
    return _fused(options, operands, tuple(None if dx is None else dx.to(dtype) for dx in tangents), tracked)


def _call(q: Any, k: Any, v: Any, mask: Any, lengths: Any, scale: Any, causal: bool) -> tuple[Any, Any]:
    check_floating("attention", q=q, k=k, v=v)
    if any(len(x.shape) != 4 for x in (q, k, v)):
        raise ValueError(f"attention: {_shapes(q, k, v)}; each is (B, heads, tokens, channels)")
    (b, heads, n, e), (bk, groups, m, ek), (bv, groups_v, mv, f) = q.shape, k.shape, v.shape
    if (b, b, e) != (bk, bv, ek) or (groups, m) != (groups_v, mv) or groups < 1 or heads % groups:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; q and k share batch and channels, k and v batch, heads and tokens, and "
            "the heads of q are a multiple of those of k"
        )
    if causal and n != m:
        raise ValueError(f"attention: causal with {n} queries and {m} keys; a causal mask needs as many of each")
    device = q.device.type
    if device != "cpu" and max(e, f) > WIDEST:
        raise ValueError(f"attention: {_shapes(q, k, v)}; on {device}, heads have at most {WIDEST} channels")
    if is_autocast_on(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must agree, e.g. k.to(q.dtype)")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: q, k, v are on {q.device}, {k.device}, {v.device}; they must agree")
    scale = 1.0 / math.sqrt(max(e, 1)) if scale is None else float(scale)
    return (scale, float(causal)), (q, k, v, _mask(q, m, mask), _lengths(q, m, lengths))


def is_autocast_on(device: str) -> bool:
    """Of devices without autocast (meta), torch would not say."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _mask(q: Any, keys: int, mask: Any) -> Any:
    """The mask with four dimensions."""
    if mask is None:
        return None
    want = (*q.shape[:3], keys)
    if not hasattr(mask, "shape"):
        raise TypeError(f"attention: mask is a {type(mask).__name__}; pass a tensor, or causal=True")
    shape = tuple(mask.shape)
    if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape[::-1], want[::-1], strict=False)):
        per_sample = f"; one row per sample is ({want[0]}, 1, 1, {keys}), or lengths="
        hint = per_sample if shape == (want[0], keys) else ""
        raise ValueError(f"attention: mask has shape {shape}, which does not broadcast to {want}{hint}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attention: mask is {mask.dtype}; it is bool (True is seen) or floats, added to the logits")
    if mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"attention: mask {shape} requires a gradient, which no kernel computes; pass mask.detach(), or write the "
            "attention with softmax and matmul"
        )
    if mask.device != q.device:
        raise ValueError(f"attention: mask is on {mask.device}, q on {q.device}; they must agree")
    return mask[(None,) * (4 - len(shape))]


def _lengths(q: Any, keys: int, lengths: Any) -> Any:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"attention: lengths is a {type(lengths).__name__}; pass an int64 tensor ({q.shape[0]},)")
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool or tuple(lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"attention: lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; it is one integer per sample, "
            f"({q.shape[0]},)"
        )
    known = type(lengths) is Tensor and lengths.is_cpu and not torch.compiler.is_compiling()  # without a wait
    if known and lengths.numel() and not torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        low, high = (int(x) for x in torch.aminmax(lengths))
        if low < 0 or high > keys:
            raise ValueError(f"attention: lengths are from {low} to {high}; there are {keys} keys, so 0 to {keys}")
    return lengths.to(device=q.device, dtype=torch.int64)


def _shapes(*operands: Any) -> str:
    return "q, k, v have shapes " + ", ".join(str(tuple(x.shape)) for x in operands)


def _dense(x: Tensor | None) -> Tensor | None:
    """x, whose heads are rows of adjacent numbers."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _room(x: Tensor) -> Tensor:
    """Empty, in the memory order of x if its heads are rows of adjacent numbers."""
    like = torch.empty_like(x)
    return like if _dense(like) is like else torch.empty_like(x, memory_format=torch.contiguous_format)


class _Attention(Fused):
    """Results: o, (do,) lse, (mu). Contract: csrc/attention/attention.h."""

    name = "attention"
    operands = ("q", "k", "v")
    saves_results, sums = True, 1

    def value(self, options, q, k, v, mask, lengths):
        scale, causal = options
        return reference.attention(q, k, v, mask=mask, lengths=lengths, scale=scale, causal=bool(causal))

    def empty(self, options, operands, pair):
        q, _, v, *_ = operands
        batch, heads, queries, _ = q.shape
        # (B, N, H, F) in memory, as flash kernels leave it: heads are joined without a copy
        # and no view, which autograd would not let anyone write to.
        shape, wide = (batch, heads, queries, v.shape[-1]), heads * v.shape[-1]
        strides = (queries * wide, v.shape[-1], wide, 1)
        out = [q.new_empty_strided(shape, strides) for _ in range(1 + pair)]
        sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        return out + [q.new_empty((batch, heads, queries), dtype=sums) for _ in range(1 + pair)]

    def forward(self, module, options, operands, tangents, results):
        q, k, v, mask, lengths = operands
        if k.numel() == 0 or v.numel() == 0:
            for x in results:
                x.zero_()
            return
        scale, causal = options
        o, do, lse, mu = results if tangents else (results[0], None, results[1], None)
        dq, dk, dv = tangents or (None,) * 3
        tensors = (*map(_dense, (q, k, v, dq, dk, dv)), mask, lengths, o, do, lse, mu)
        check(self.name, module.attention(tensors, scale, bool(causal)))

    def backward(self, module, options, operands, tangents, results, gy, gdy, needs):
        q, k, v, mask, lengths = operands
        dq, dk, dv = tangents or (None,) * 3
        inputs = (q, k, v, dq, dk, dv)
        wanted = (*needs[:3], *(needs[5:] or (False,) * 3))
        found = [_room(x) if need else None for x, need in zip(inputs, wanted, strict=True)]
        if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
            for x in found:
                if x is not None:
                    x.zero_()
        else:
            scale, causal = options
            o, do, lse, mu = results if tangents else (results[0], None, results[1], None)
            tensors = (*map(_dense, inputs), mask, lengths, o, do, lse, mu, _dense(gy), _dense(gdy), *found)
            check(self.name, module.attention_backward(tensors, scale, bool(causal)))
        return [*found[:3], None, None, *(found[3:] if tangents else ())]


_fused = _Attention()
