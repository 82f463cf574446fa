"""Hypothesis draws a call of `combine`: shapes, layouts, dtypes, coefficients. Numbers come from one drawn seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from tolerance import CHAIN, assert_within, bound
from torch import Tensor

from pyflowmap import reference

HALF = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "contiguous", "chunk", "reversed", "swapped", "gapped", "offset", "expanded")


def arrange(values: Tensor, layout: str) -> Tensor:
    """A tensor with these values (`expanded`: with the first row's) in another memory layout."""
    shape = values.shape
    if layout == "expanded" and values.ndim > 0 and shape[0] > 0:
        return values[:1].clone().expand(shape)
    if layout == "offset":
        return torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].view(shape)
    if values.ndim == 0 or values.numel() == 0 or layout in ("contiguous", "expanded"):
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "chunk":  # the first half of a chunk(2, 1): rows of one run, twice as far apart
        return torch.cat([values, values], min(1, values.ndim - 1)).narrow(
            min(1, values.ndim - 1), 0, shape[min(1, values.ndim - 1)]
        )
    if layout == "gapped":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "reversed":
        order = list(range(values.ndim))[::-1]
    else:  # the last two dimensions swapped in memory; for images this is one step from channels_last
        order = list(range(values.ndim))
        order[1:] = order[1:][::-1]
    return values.permute(order).contiguous().permute([order.index(d) for d in range(values.ndim)])


@dataclass
class Case:
    """Arguments of `combine`, on the CPU; `move` takes them to a device."""

    inputs: tuple[Tensor, ...]
    matrix: tuple[tuple[Any, ...], ...]
    leading: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def like(self) -> Tensor:
        return self.inputs[0] if self.inputs else self.options["like"]

    @property
    def terms(self) -> int:
        return len(self.inputs) + ("noise" in self.options)

    def exact(self, **asked: bool) -> tuple[reference.Combined, reference.Combined]:
        """The specification in float64, and the same of absolute values: the sums that rounding is relative to."""
        wide = {k: v for k, v in self.options.items() if k in ("noise", "mask", "clamp")}
        inputs = [x.double() for x in self.inputs]
        like = self.like.double()
        value = reference.combine(inputs, self.matrix, leading=self.leading, like=like, **wide, **asked)
        noise = wide.pop("noise", None)
        if noise is not None:
            inputs.append(reference.normal(noise, like.shape))
        wide.pop("clamp", None)
        if "mask" in wide:
            wide["mask"] = (wide["mask"][0].abs(), _absolute(wide["mask"][1]))
        size = reference.combine(
            [torch.nan_to_num(x, 0.0, 0.0, 0.0).abs() for x in inputs],
            _absolute(self.matrix),
            leading=self.leading,
            **wide,
            **asked,
        )
        return value, size

    def check(self, result: reference.Combined, stored: list[int], arithmetic: torch.dtype) -> None:
        asked = {name: getattr(result, name) is not None for name in ("gram", "cross", "sums")}
        value, size = self.exact(**asked)
        # a coefficient is a scalar times a vector plus the mask times another; then a product and J additions
        roundings = len(self.inputs) + 8
        noisy = self._noise_weight()
        for k, y in zip(stored, result.outputs, strict=True):
            allowed = bound(value.outputs[k], size.outputs[k], roundings, arithmetic, y.dtype, noisy[k])
            assert_within(y, value.outputs[k], allowed, f"output {k}")
        for name in ("gram", "cross", "sums"):
            if asked[name]:
                exact, magnitude = getattr(value, name), getattr(size, name)
                off = bound(exact, magnitude, 2 * roundings + CHAIN, arithmetic)
                if "noise" in self.options:  # an error of a normal number reaches every product that it enters
                    off = off + 8e-6 * (magnitude + sum(n.abs().sum() for n in noisy))
                assert_within(getattr(result, name), exact, off, name)

    def _noise_weight(self) -> list[Tensor]:
        shape = self.like.shape
        if "noise" not in self.options:
            return [torch.zeros(())] * len(self.matrix)
        at = len(self.inputs)
        weight = [
            reference.coefficient(row[at], len(shape), torch.float64, torch.device("cpu")).abs() for row in self.matrix
        ]
        if "mask" in self.options:
            mask, rows = self.options["mask"]
            extra = [reference.coefficient(r[at], len(shape), torch.float64, torch.device("cpu")).abs() for r in rows]
            weight = [w + mask.abs() * e for w, e in zip(weight, extra, strict=True)]
        return [w.expand(shape) for w in weight]


def _absolute(matrix: Any) -> tuple[tuple[Any, ...], ...]:
    def one(c: Any) -> Any:
        if isinstance(c, tuple):
            return abs(c[0]), None if c[1] is None else c[1].abs()
        return c.abs() if isinstance(c, Tensor) else abs(c)

    return tuple(tuple(one(c) for c in row) for row in matrix)


def coefficients(draw: Any, lead: tuple[int, ...], rng: torch.Generator) -> Any:
    """A number, a vector, or both; exact zeros often."""
    kind = draw(
        st.sampled_from(("zero", "int", "float", "float", "vector", "double", "shared", "pair", "dull", "half"))
    )
    number = draw(st.sampled_from((-1.5, 0.25, 1.0, 1 / 3, -2e-3)))
    vector = torch.randn(lead, generator=rng, dtype=torch.float64)
    vector = torch.where(torch.rand(lead, generator=rng) < 0.3, 0.0, vector)
    if kind == "zero":
        return 0.0
    if kind == "int":
        return -2
    if kind == "float":
        return number
    if kind == "vector":
        return arrange(vector.float(), draw(st.sampled_from(LAYOUTS)))
    if kind == "double":
        return vector
    if kind == "shared":
        return torch.tensor(number, dtype=torch.float32)
    if kind == "half":
        return vector.bfloat16()
    return (0.0 if kind == "dull" else number), vector.float()


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...] = HALF, most: int = 8, extras: bool = True) -> Case:
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    event = tuple(draw(st.lists(st.sampled_from((1, 1, 2, 3, 5, 8, 17, 33)), max_size=3)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    J, K = draw(st.integers(1, most)), draw(st.integers(1, most))
    one_order = draw(st.booleans())  # half of the cases run without a copy
    layout = draw(st.sampled_from(LAYOUTS))
    inputs = []
    for _ in range(J):
        x = torch.randn(lead + event, generator=rng, dtype=torch.float64).to(draw(st.sampled_from(dtypes)))
        inputs.append(arrange(x, layout if one_order else draw(st.sampled_from(LAYOUTS))))
    options: dict[str, Any] = {}
    terms = J
    if extras and draw(st.booleans()):
        samples = draw(st.integers(0, len(lead)))
        ids = None
        if draw(st.booleans()):
            ids = torch.randint(-(2**62), 2**62, (torch.Size(lead[:samples]).numel(),), generator=rng)
        options["noise"] = reference.Noise(
            draw(st.integers(-(2**63), 2**64 - 1)), draw(st.integers(0, 3)), ids, samples
        )
        terms += 1
    matrix = tuple(tuple(coefficients(draw, lead, rng) for _ in range(terms)) for _ in range(K))
    if extras and draw(st.booleans()):
        shape = [size if draw(st.booleans()) else 1 for size in lead + event]
        mask = torch.randint(0, 3, shape, generator=rng).float() / 2
        again = tuple(tuple(coefficients(draw, lead, rng) for _ in range(terms)) for _ in range(K))
        options["mask"] = (arrange(mask, draw(st.sampled_from(LAYOUTS))), again)
    if extras and draw(st.booleans()):
        options["clamp"] = tuple(
            draw(st.sampled_from((None, (-1.0, 0.5), (0.0, float("inf")), (0.3, 0.3)))) for _ in range(K)
        )
    return Case(tuple(inputs), matrix, len(lead), options)
