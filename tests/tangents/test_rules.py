"""The walk through the table of tangent rules: every case of cases_*.py, in every way that a Dual is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tangents import table
from tangents.case import Case
from tangents.walk import all_cases, by_differences, by_duals, by_torch, draw, norm, outputs
from torch import Tensor

import pyflowmap as pfm
from pyflowmap.tangents import Kind

CASES = all_cases()
DIFFERENCE = 1e-7  # of a central difference with h = 1e-5 in float64
EXACT = 1e-11  # of two orders of the same float64 arithmetic

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Both are the same up to `tolerance` times their size."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors, expected {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        torch.testing.assert_close(
            a.detach(),
            e.detach().to(a.dtype),
            rtol=tolerance,
            atol=tolerance * (1.0 + float(e.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax() if e.numel() else 0.0)),
            equal_nan=True,
            msg=lambda text: f"{what}: {text}",
        )


@each_case
def test_tangent_is_the_derivative(case: Case) -> None:
    drawn = draw(case)
    _, dy = by_duals(drawn)
    assert_close(dy, by_differences(drawn), DIFFERENCE, "against central differences")
    if case.func_jvp:
        assert_close(dy, by_torch(drawn), case.torch_error, "against torch.func.jvp")


@each_case
def test_tangent_in_one_argument_alone(case: Case) -> None:
    drawn = draw(case)
    for i in drawn.moved if len(drawn.moved) > 1 else ():
        alone = [dx if j == i else None for j, dx in enumerate(drawn.tangents)]
        assert_close(by_duals(drawn, alone)[1], by_differences(drawn, alone), DIFFERENCE, f"argument {i} alone")


@each_case
def test_linear_in_the_tangent(case: Case) -> None:
    drawn = draw(case)
    once = by_duals(drawn)[1]
    other = [None if dx is None else torch.randn_like(dx) for dx in drawn.tangents]
    both = [None if dx is None else 2.5 * dx - other[i] for i, dx in enumerate(drawn.tangents)]
    expected = [2.5 * a - b for a, b in zip(once, by_duals(drawn, other)[1], strict=True)]
    assert_close(by_duals(drawn, both)[1], expected, EXACT, "J (2.5 a - b)")


@each_case
def test_primal_is_the_function_itself(case: Case) -> None:
    drawn, same = draw(case, grad=True), draw(case, grad=True)
    y = by_duals(drawn)[0]
    plain = outputs(same(*same.primals))
    fused = case.name.startswith(("scaled_dot_product_attention", "multi_head_attention"))  # by a kernel of ours
    for a, b in zip(y, plain, strict=True):
        assert a.dtype == b.dtype and (fused or a.stride() == b.stride())
        if fused:
            assert_close([a], [b], EXACT, "the primal")
        else:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), "the primal has other bits than the function"
    assert_close(_gradients(drawn, y), _gradients(same, plain), EXACT, "gradient of the primal")


@each_case
def test_as_tensor(case: Case) -> None:
    drawn = draw(case)
    assert_close(by_duals(drawn, as_tensor=True)[1], by_duals(drawn)[1], EXACT, "as_tensor=True")


@each_case
def test_backward_through_a_tracked_tangent(case: Case) -> None:
    if not case.second:
        pytest.skip("has no second derivative here")
    drawn = draw(case, grad=True)
    for dx in drawn.tangents:
        if dx is not None:
            dx.requires_grad_()
    dy = by_duals(drawn, track_tangent=True)[1]
    weights = _weights(dy)
    directions = [torch.randn_like(drawn.primals[i]) for i in drawn.moved]
    leaves = [drawn.primals[i] for i in drawn.moved] + [drawn.tangents[i] for i in drawn.moved]
    gradients = torch.autograd.grad(_inner(weights, dy), leaves, allow_unused=True)
    of_primals, of_tangents = gradients[: len(directions)], gradients[len(directions) :]

    # w . J(x) dx is linear in dx: its gradient along dx is its value
    value = _inner(weights, dy).detach()
    assert_close(
        [_inner(of_tangents, [drawn.tangents[i] for i in drawn.moved])], [value], EXACT, "gradient in the tangent"
    )

    # d/de w . J(x + e v) dx, of tangents that the test above has compared with differences
    ends = []
    for step in (1e-5, -1e-5):
        moved = draw(case)
        for i, v in zip(moved.moved, directions, strict=True):
            moved.primals[i] = moved.primals[i] + step * v
        ends.append(_inner(weights, by_duals(moved)[1]))
    expected = (ends[0] - ends[1]) / 2e-5
    size = float(value.abs() + sum(g.abs().sum() for g in of_primals if g is not None))
    actual = _inner(of_primals, directions)
    assert abs(float((actual - expected).detach())) < 1e-6 * (1.0 + size), (
        f"gradient in the primal: {actual}, expected {expected}"
    )


@each_case
def test_backward_through_an_untracked_tangent_raises(case: Case) -> None:
    y, dy = by_duals(draw(case, grad=True))
    assert all(not d.requires_grad for v, d in zip(y, dy, strict=True) if not v.requires_grad)
    with pytest.raises(RuntimeError, match="track_tangent=True"):
        _inner(_weights(dy), dy).backward()


@each_case
def test_float32(case: Case) -> None:
    drawn = draw(case, torch.float32)
    dy = by_duals(drawn)[1]
    exact = by_duals(drawn.to(torch.float64))[1]
    assert norm([a - b for a, b in zip(dy, exact, strict=True)]) <= 3e-5 * norm(exact)


@each_case
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16(case: Case, autocast: bool) -> None:
    drawn = draw(case, torch.bfloat16)
    exact = by_duals(drawn.to(torch.float64))[1]
    if autocast:
        drawn = drawn.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            plain = outputs(drawn(*drawn.primals))
        except RuntimeError as error:
            pytest.skip(f"torch itself: {error}")
        y, dy = by_duals(drawn)
    assert [d.dtype for d in dy] == [v.dtype for v in y] == [v.dtype for v in plain]
    assert norm([a - b for a, b in zip(dy, exact, strict=True)]) <= 0.05 * norm(exact) + 0.01


# ---- compiled: many cases in one graph, because tracing is what takes the time ----

GROUP = 30
LINEAR = {name for names, kind in table.groups() if kind is Kind.LINEAR for name in names}


def groups() -> list[Any]:
    """All cases untracked, and tracked the first one of each rule that is more than the function itself."""
    first: dict[str, Case] = {}
    for case in CASES:
        if case.compiled and case.second and table.own_row(case) not in LINEAR:
            first.setdefault(table.own_row(case), case)
    found = []
    for tracked, cases in ((False, [case for case in CASES if case.compiled]), (True, list(first.values()))):
        for i in range(0, len(cases), GROUP):
            group = cases[i : i + GROUP]
            name = f"{'tracked' if tracked else 'untracked'}: {group[0].name} to {group[-1].name}"
            found.append(pytest.param(group, tracked, id=name.replace(" ", "_")))
    return found


@pytest.mark.parametrize("group, tracked", groups())
def test_compiled(group: list[Case], tracked: bool) -> None:
    try:
        _compare_compiled(group, tracked)
    except Exception as error:
        failed = {}
        for case in group:
            try:
                _compare_compiled([case], tracked)
            except Exception as reason:
                failed[case.name] = str(reason).strip().splitlines()[0]
        raise AssertionError(f"compiled: {failed or 'only all together'}") from error


def _compare_compiled(group: list[Case], tracked: bool) -> None:
    torch._dynamo.reset()
    functions = [case.function for case in group]

    def together(primals: Any, tangents: Any) -> Any:
        return [pfm.jvp(f, x, dx, track_tangent=tracked) for f, x, dx in zip(functions, primals, tangents, strict=True)]

    results = []
    for run in (together, torch.compile(together, backend="aot_eager", fullgraph=True)):
        drawn = [draw(case, grad=tracked) for case in group]
        torch.manual_seed(0)
        found = run([tuple(d.primals) for d in drawn], [tuple(d.tangents) for d in drawn])
        gradients: Any = ()
        if tracked:
            loss = sum(_inner(_weights(part), part) for pair in found for part in map(outputs, pair))
            leaves = [d.primals[i] for d in drawn for i in d.moved]
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((found, gradients))
    for case, eager, compiled in zip(group, results[0][0], results[1][0], strict=True):
        assert_close(outputs(compiled[0]), outputs(eager[0]), EXACT, f"{case.name}: primal")
        assert_close(outputs(compiled[1]), outputs(eager[1]), EXACT, f"{case.name}: tangent")
    names = [case.name for case in group for _ in draw(case).moved]
    for name, eager, compiled in zip(names if tracked else (), results[0][1], results[1][1], strict=True):
        assert_close(outputs(compiled), outputs(eager), EXACT, f"{name}: gradient")


# ---- help ----


def _weights(like: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in like]


def _inner(a: Sequence[Any], b: Sequence[Any]) -> Tensor:
    products = [(x * y).real.sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(products, torch.zeros((), dtype=torch.float64))


def _gradients(drawn: Any, y: Sequence[Tensor]) -> list[Tensor]:
    leaves = [drawn.primals[i] for i in drawn.moved]
    found = torch.autograd.grad(_inner(_weights(y), y), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
