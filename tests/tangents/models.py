"""Other people's networks, tiny and random: what `pfm.jvp` must take as it stands, and what each of them needs.

`python tests/tangents/models.py` prints docs/models.md, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DUAL, AS_TENSOR = "Dual", "as_tensor=True"


class Model(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Any]  # (net, x, t) -> its output, a tensor or what holds one
    x: tuple[int, ...]  # the shape of x
    t: tuple[float, ...] = (0.3, 0.7)
    in_x: str = DUAL  # what it needs for a tangent in x alone
    in_both: str = DUAL  # and for tangents in x and time
    reason: str = ""  # why, for docs/models.md
    reference: str = "func.jvp"  # or "double backward", where forward-mode AD fails on the plain model
    single: bool = False  # computes in float32 inside, whatever it is given
    compiled: bool = False  # holds compiled parts, which torch.func.jvp refuses


def text(*shape: int) -> Tensor:
    """A condition without a tangent, the same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inner(width: int, heads: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "attention_head_dim": width}


# ---- diffusers ------------------------------------------------------------------------------------------------------


def unet_2d() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet_2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        **inner(8, 2), in_channels=2, out_channels=2, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        **inner(8, 2), sample_size=8, patch_size=2, in_channels=2, out_channels=2, num_layers=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        **inner(16, 2), patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
        pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def call_flux(net: nn.Module, x: Tensor, t: Tensor) -> Any:
    places = torch.stack([torch.zeros(9), torch.arange(9) // 3, torch.arange(9) % 3], dim=1).double()
    guidance = torch.full((2,), 3.5, dtype=torch.float64)
    return net(x, text(2, 5, 12), text(2, 10), t, places, torch.zeros(5, 3, dtype=torch.float64), guidance)


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        **inner(12, 2), in_channels=2, out_channels=2, text_dim=12, freq_dim=8, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip


def any_flow() -> nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(
        **inner(12, 2), in_channels=2, out_channels=2, text_dim=12, freq_dim=8, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip


def call_any_flow(net: nn.Module, x: Tensor, t: Tensor) -> Any:
    s = t[:, None].expand(2, 2)  # per frame; the end of the jump moves with its start
    return net(x, s, 0.5 * s, text(2, 5, 12))


# ---- the ways in which image transformers are written ---------------------------------------------------------------


class TimeToken(nn.Module):
    """Sinusoids and a linear layer, as a token."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("frequencies", 2.0 ** torch.arange(width // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return F.silu(self.linear(torch.cat([angles.cos(), angles.sin()], dim=-1)))[:, None]


class ViTAttention(nn.Module):
    """One product for q, k and v, reshape and permute, unbind; with q and k normed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)
            x = weights.softmax(dim=-1) @ v
        return self.out(x.transpose(1, 2).reshape(B, N, C))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = ViTAttention(width, heads)
        self.attention.fused = fused
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * width, width))
        self.scale1, self.scale2 = nn.Parameter(0.5 * torch.ones(width)), nn.Parameter(0.5 * torch.ones(width))
        self.drop_path = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attention(self.norm1(x)).mul_(self.scale1))  # layer scale in place
        return x + self._dropped(self.mlp(self.norm2(x)) * self.scale2)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)  # stochastic depth
        return x * keep.div_(0.5)


class ViT(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(2, width, kernel_size=2, stride=2)
        self.time, self.cls = TimeToken(width), nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 18, width))
        self.blocks = nn.Sequential(ViTBlock(width, heads, True), ViTBlock(width, heads, False))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), self.time(t), x), dim=1)
        x = self.norm(self.blocks(x + self.positions))[:, 2:]
        x = torch.einsum("bhwpqc->bchpwq", self.head(x).reshape(-1, 4, 4, 2, 2, 2))
        return x.reshape(x.shape[0], 2, 8, 8)


class Einops(nn.Module):
    """rearrange, reduce, repeat, einsum and the layer form."""

    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import Rearrange

        self.patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        self.qkv, self.time, self.out = nn.Linear(8, 24, bias=False), TimeToken(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        from einops import einsum, rearrange, reduce, repeat

        x = self.patches(x)
        x = x + repeat(self.time(t), "b 1 c -> b n c", n=x.shape[1])
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=2)
        weights = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(dim=-1)
        x = x + rearrange(weights @ v, "b h n d -> b n (h d)") + reduce(x, "b n c -> b 1 c", "mean")
        return rearrange(self.out(x), "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=2, q=2)


class AsksForTensors(nn.Module):
    """Takes numbers and lists as well as tensors: its branches ask for torch.Tensor."""

    def __init__(self, whole: bool):
        super().__init__()
        self.whole = whole
        self.linear, self.time = nn.Linear(6, 6), TimeToken(6)

    def forward(self, x: Any, t: Any) -> Tensor:
        if self.whole and not isinstance(x, torch.Tensor):
            x = torch.tensor(x)
        if not torch.is_tensor(t):
            t = torch.tensor([t, t], dtype=torch.float64)
        return torch.tanh(self.linear(x)) * self.time(t)[:, 0]


class Mixer(nn.Module):
    """Tokens weighted by `q @ k`, then channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qk, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(self.norm(x)).chunk(2, dim=-1)
        return x + self.out((q @ k.mT).softmax(dim=-1) @ x)


class Compiled(nn.Module):
    """Its blocks are compiled each, as training recipes do."""

    def __init__(self, compiled: bool = True):
        super().__init__()
        self.time = TimeToken(8)
        self.blocks = nn.ModuleList([Mixer(8), Mixer(8)])
        for block in self.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(t)
        for block in self.blocks:
            x = block(x)
        return x


class WithTime(nn.Module):
    """A layer of torch.nn between a time token and nothing else."""

    def __init__(self, layer: nn.Module, attends: bool = False):
        super().__init__()
        self.time, self.layer, self.attends = TimeToken(8), layer, attends

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(t)
        return self.layer(x, x, x, need_weights=False)[0] if self.attends else self.layer(x)


class WithWeights(nn.Module):
    """Cross-attention of nn.MultiheadAttention with masks, keys of another width and averaged weights as output."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeToken(8)
        self.layer = nn.MultiheadAttention(8, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        keys = text(2, 5, 12)
        hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return self.layer(x + self.time(t), keys, keys, key_padding_mask=hidden, average_attn_weights=True)


def encoder_layer(**options: Any) -> nn.Module:
    return WithTime(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options))


_IMAGE, _VIDEO, _TOKENS = (2, 2, 8, 8), (2, 2, 2, 4, 4), (2, 5, 8)
_ASKS = "asks torch.is_tensor(timestep); what is no tensor is copied by torch.tensor"


def plain(net: nn.Module, x: Tensor, t: Tensor) -> Any:
    return net(x, t)


MODELS = [
    Model(
        "diffusers UNet2DModel", unet_2d, plain, _IMAGE,
        in_both=AS_TENSOR, reason=_ASKS, reference="double backward",
    ),
    Model(
        "diffusers UNet2DConditionModel", unet_2d_condition, lambda net, x, t: net(x, t, text(2, 5, 12)), _IMAGE,
        in_both=AS_TENSOR, reason=_ASKS,
    ),
    Model(
        "diffusers DiTTransformer2DModel", dit, lambda net, x, t: net(x, t, torch.tensor([1, 3])), _IMAGE,
    ),
    Model(
        "diffusers SD3Transformer2DModel", sd3, lambda net, x, t: net(x, text(2, 5, 12), text(2, 10), t), _IMAGE,
        single=True,
    ),
    Model("diffusers FluxTransformer2DModel", flux, call_flux, (2, 9, 4)),
    Model(
        "diffusers WanTransformer3DModel", wan, lambda net, x, t: net(x, t, text(2, 5, 12)), _VIDEO,
        single=True,
    ),
    Model("diffusers AnyFlowTransformer3DModel", any_flow, call_any_flow, _VIDEO, single=True),
    Model("image transformer in timm's manner", ViT, plain, _IMAGE),
    Model("einops: rearrange, reduce, repeat, einsum, layers", Einops, plain, _IMAGE),
    Model(
        "code that asks torch.is_tensor(time)", lambda: AsksForTensors(False), plain, (2, 6),
        in_both=AS_TENSOR, reason="the branch for numbers would be taken",
    ),
    Model(
        "code that asks isinstance(x, torch.Tensor)", lambda: AsksForTensors(True), plain, (2, 6),
        in_x=AS_TENSOR, in_both=AS_TENSOR, reason="the branches for lists and numbers would be taken",
    ),
    Model("blocks compiled each (fullgraph)", Compiled, plain, _TOKENS, compiled=True),
    Model("torch.nn.TransformerEncoderLayer", encoder_layer, plain, _TOKENS),
    Model(
        "torch.nn.TransformerEncoderLayer, norm first, gelu",
        lambda: encoder_layer(norm_first=True, activation="gelu"), plain, _TOKENS,
    ),
    Model(
        "torch.nn.MultiheadAttention",
        lambda: WithTime(nn.MultiheadAttention(8, 2, batch_first=True), attends=True), plain, _TOKENS,
    ),
    Model("torch.nn.MultiheadAttention, cross, masked, with weights", WithWeights, plain, _TOKENS),
]  # fmt: skip


# ---- docs/models.md -------------------------------------------------------------------------------------------------

_HEAD = """# Which models `pfm.jvp` takes as they stand

Each row is a test (`tests/tangents/test_models.py`) on a small random model: its value equal to the plain model's (in
bits; to rounding where attention runs, which is a kernel of ours), its tangent and its gradients, also through the
tangent, equal to those of torch (`torch.func.jvp` with plain attention, or reverse mode twice where forward mode
fails). The tests fail if what a model needs changes.
This page is printed by `python tests/tangents/models.py`.

- **Dual**: `pfm.jvp(net, primals, tangents)` as it is. `as_tensor=True` works too.
- **as_tensor=True**: the model asks whether it was given a `torch.Tensor`. Without the option, torch's functions that
  want one raise, and the error says so; the model's own `if torch.is_tensor(t):` raises nothing, and takes the branch
  for numbers. One call of `pfm.tangents.check(net, primals, tangents)` settles it: it compares value and tangent with
  plain calls of the model, and names the option where they differ. Calls with the option go
  neither through the border of a module wrapped by DDP or FSDP2 nor into compiled code; where that is needed, take the
  question out of the model: it is then a Dual's again.

| model | tangent in x | in x and time | why |
|---|---|---|---|
"""

_TAIL = """
What does not pass, and why:

- code that leaves torch: `x.item()`, `float(x)`, `x.numpy()`, `x.data_ptr()`, `if x:`. It raises, since the
  tangent would be lost; `x.detach()` says that the value alone is meant. Comparisons act on the value, as in torch:
  `if (x > 0).any():` takes the branch of the value, and the tangent is that branch's.
- a custom `torch.autograd.Function`, a Triton or C++ operator: raises until it has a rule (`pfm.tangents.rule`).
- reentrant checkpointing, which is such a function: `use_reentrant=False` passes.
- `torch.jit.script` and `torch.jit.trace`: their code is made for tensors. Programs of `torch.export` take
  `as_tensor=True` after `run_decompositions()`.
- `torch.func.grad` inside the model: raises. `torch.func.vmap` passes, and `torch.func.jvp` where both or
  neither of its primal and tangent depend on x.
- recurrent layers (`nn.LSTM`, `nn.GRU`), `torch.fft`, `torch.linalg.inv` and the like: no rule; they raise, and
  `fallback="finite_difference"` takes them, at some cost in digits.
- `nn.BatchNorm` in training: its statistics join the samples; it raises. `eval()` passes.
- `flex_attention`, nested tensors, an attention mask that is itself a function of x: no rule; they raise.
- a module that keeps an activation (a cache, `self.last = x`): raises after the call.

One thing passes and should not: `torch.utils._pytree.tree_map(f, x)` of a Dual applies f to value and tangent, because
DDP needs Duals to be trees of tensors. Only a linear f is right there.
"""


def table() -> str:
    rows = [f"| {m.name} | {m.in_x} | {m.in_both} | {m.reason} |" for m in MODELS]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


if __name__ == "__main__":
    print(table(), end="")
