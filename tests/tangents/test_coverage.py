"""No function of torch gives a plain tensor for a Dual in silence: it has a rule, or it raises."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tangents import table
from tangents.walk import all_cases, outputs
from torch import Tensor

import pyflowmap as pfm
from pyflowmap.tangents import Dual, MissingRule, TensorDual
from pyflowmap.tangents.registry import RULES, Kind, find, name_of

OVERRIDABLE = torch.overrides.get_testing_overrides()
X = torch.tensor([[0.31, -0.72], [1.37, 0.58]], dtype=torch.float64)
DX = torch.tensor([[1.0, 0.5], [-2.0, 0.3]], dtype=torch.float64)


def fillings(signature: inspect.Signature) -> Iterator[tuple[Any, ...]]:
    """Arguments for a signature, in which "x" stands for the Dual."""
    required = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = max(1, sum(p.default is p.empty for p in required))
    whole = torch.tensor([[0, 1], [1, 0]])
    candidates = ("x", 1, X + 0.137, whole)
    if count <= 3:
        yield from (c for c in itertools.product(candidates, repeat=count) if any(a is candidates[0] for a in c))
    else:
        yield from (("x",) + (other,) * (count - 1) for other in candidates)
    yield (["x", "x"],) + (0,) * (count - 1)
    yield ("x",) * (count + 1)
    yield ("x",) + (1,) * count


def put(tree: Any, x: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(put(each, x) for each in tree)
    return x if isinstance(tree, str) else tree.clone() if isinstance(tree, Tensor) else tree


def rule_of(function: Any) -> Any:
    rule = find(function)
    return None if rule is None else rule.kind


@pytest.mark.parametrize("kind", [Dual, TensorDual])
def test_every_overridable_function_has_a_rule_or_raises(kind: Any) -> None:
    silent, missing, calls = [], 0, 0
    for function, dummy in OVERRIDABLE.items():
        ruled = rule_of(function)
        if ruled is None:
            with pytest.raises((MissingRule, TypeError)) as raised:
                pfm.tangents.call(function, (kind(X, DX),))
            missing += raised.type is MissingRule
        if ruled is Kind.CONSTANT:
            continue
        for arguments in fillings(inspect.signature(dummy)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    result = function(*put(arguments, kind(X.clone(), DX.clone())))
                except Exception:  # refused, or no arguments for this function
                    continue
            calls += 1
            if ruled is None:
                silent += [f"{name_of(function)}: no rule, but {result}"[:200]] if outputs(_plain(result)) else []
            elif _no_derivative(function, arguments) or ruled is Kind.FRESH:
                continue
            elif outputs(_plain(result)):
                silent.append(f"{name_of(function)}{arguments}: a plain tensor"[:200])
    assert not silent, "\n".join(silent)
    assert calls > 500 and missing > 300


def _no_derivative(function: Any, arguments: Any) -> bool:
    """plain.view_as(x) takes the shape of x alone; the angle of a real number is 0 or pi."""
    return table.short(function) == "angle" or (
        table.short(function) in ("expand_as", "reshape_as", "view_as", "to", "type_as")
        and isinstance(arguments[0], Tensor)
    )


def _plain(result: Any) -> Any:
    """What in a result is a tensor and no Dual."""
    if isinstance(result, (tuple, list)):
        return [_plain(each) for each in result]
    return result if type(result) is Tensor else None


def test_constants_do_not_depend_on_anything() -> None:
    """Every function that is said to have no tangent: a small step changes nothing."""
    asked = ("detach",)  # the value itself, without its tangent
    changed, floating = [], set()
    for function, rule in RULES.items():
        if rule.kind is not Kind.CONSTANT or table.short(function) in asked or function not in OVERRIDABLE:
            continue
        for arguments in fillings(inspect.signature(OVERRIDABLE[function])):
            try:
                ends = [outputs(function(*put(arguments, X + h * DX))) for h in (1e-7, 0.0, -1e-7)]
            except Exception:
                continue
            if ends[0]:
                floating.add(table.short(function))
            if not all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True)):
                changed.append(f"{name_of(function)}{arguments}")
    assert not changed, changed
    assert {"floor", "round", "sign", "floor_divide"} <= floating  # or nothing was tried


@pytest.mark.parametrize("kind", [Dual, TensorDual])
@pytest.mark.parametrize(
    "function",
    [
        torch.tensor,
        lambda x: _no_dual(torch.as_tensor(x)),
        lambda x: _no_dual(torch.asarray(x)),
        lambda x: torch.tensor([x[0], x[1]]),
        lambda x: torch.full((2,), x[0]),
        lambda x: torch.full_like(torch.zeros(2), x[0]),
        lambda x: x.new_full((2,), x[0]),
        lambda x: x.new_tensor([x[0], 1.0]),
        lambda x: torch.linspace(0.0, x[0], 3),
        lambda x: torch.arange(x[0]),
        lambda x: torch.from_numpy(x),
        lambda x: x.numpy(),
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: float(x[0].exp()),
        lambda x: x.data,
        lambda x: torch.Tensor(x),
        lambda x: torch.zeros(2).new(x),
        lambda x: torch.normal(x, 1.0),
        lambda x: torch.quantile(x, 0.5),
        lambda x: torch.nn.functional.gumbel_softmax(x, -1),
        lambda x: torch.nn.Parameter(x),
        lambda x: x.view(torch.int32),
        lambda x: torch.linalg.norm(x.outer(x), 2),
        lambda x: torch.norm(x.outer(x), "nuc"),
        lambda x: torch.nn.functional.leaky_relu(x, x[0]),
        lambda x: torch.nn.functional.softplus(torch.ones(2), beta=x[0]),
        lambda x: torch.add(x, x, alpha=x[0]),
        lambda x: torch.addcmul(x, x, x, value=x[0]),
        lambda x: torch.norm(x, x[0]),
        lambda x: x.nan_to_num(x[0]),
    ],
)
def test_ways_around_are_shut(kind: Any, function: Any) -> None:
    with pytest.raises((TypeError, AttributeError, MissingRule, NotImplementedError, RuntimeError)):
        print(function(kind(torch.tensor([0.5, 1.5]), torch.ones(2))))


def _no_dual(result: Any) -> None:
    """A Dual was handed through, or something is wrong."""
    if type(result) is TensorDual:
        raise TypeError
    return result


def test_every_attribute_of_a_tensor() -> None:
    """None hands out the value or the storage of a Dual."""
    x = Dual(X, DX)
    for name in dir(Tensor):
        if name.startswith("__"):
            continue
        try:
            value = getattr(x, name)
        except (AttributeError, MissingRule, RuntimeError):
            continue
        assert not isinstance(value, Tensor), name


# ---- the page in docs/ ----


def test_every_rule_is_on_the_page_and_nothing_else() -> None:
    text = table.PAGE.read_text().partition("## With a tangent")[2]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    lists = re.findall(r"^`.*`\.$", text, re.MULTILINE)
    on_page = [name for part in rows + lists for name in re.findall(r"`([^`]+)`", part)]
    in_code = table.table()
    assert len(on_page) == len(set(on_page))
    assert set(on_page) == set(in_code), "run python tests/tangents/table.py"


def test_every_rule_has_a_case() -> None:
    seen = set().union(*(table.visited(case) for case in all_cases()))
    unseen = [names for names, kind in table.groups() if kind in table.DERIVED and not seen & set(names)]
    assert not unseen
