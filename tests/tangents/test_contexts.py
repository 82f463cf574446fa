"""Where `pfm.jvp` must live: compiled, checkpointed, under autocast, accumulating; values, tangents and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tangents.by_torch import jvp as jvp_by_torch
from tangents.small_dit import SmallDiT, checkpointed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyflowmap as pfm

COMPILER = "aot_eager"  # graphs, decompositions and the backward pass as of any compiler, without generating code


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def network(dtype: torch.dtype = torch.float64) -> SmallDiT:
    torch.manual_seed(0)
    return SmallDiT(depth=1).to(dtype)


def point(dtype: torch.dtype = torch.float64, rows: int = 4) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """(x, s, t) and their tangents (v, 1, 0): that of a MeanFlow loss."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, rows, 6, 4, generator=generator, dtype=torch.float64)
    s, t = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    return (x.to(dtype), s.to(dtype), t.to(dtype)), (v.to(dtype), 1.0, None)


def loss_of(y: Tensor, dy: Tensor, tracked: bool) -> Tensor:
    """Through the tangent only where it is tracked; else the tangent is the target, as in MeanFlow."""
    return (y - 0.5 * (dy if tracked else dy.detach())).square().mean()


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == [], "parameters without a gradient"
    return {name.replace("_orig_mod.", ""): p.grad.clone() for name, p in net.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name].double() - b[name].double()).norm() / b[name].double().norm()
        assert error <= rtol, f"{name}: {error:.1e} of the gradient"


# ---- compile x checkpoint x what is tracked ------------------------------------------------------------------------


def compiled_blocks(net: SmallDiT) -> None:
    for block in net.blocks:
        block.compile(fullgraph=True, backend=COMPILER)


def placed(run: Callable, compiler: str, checkpoints: str, net: SmallDiT) -> Callable:
    """`run(primals, tangents)`, compiled and checkpointed as asked."""
    if checkpoints == "block":
        net.around = checkpointed
    if checkpoints == "whole":
        inside = run
        run = lambda *args: checkpoint(inside, *args, use_reentrant=False)  # noqa: E731
    if compiler == "block":
        compiled_blocks(net)
    if compiler == "whole":
        run = torch.compile(run, fullgraph=True, backend=COMPILER)
    return run


WHERE = ("none", "block", "whole")
MATRIX = [(compiler, checkpoints, "primal") for compiler in WHERE for checkpoints in WHERE]
MATRIX += [(compiler, checkpoints, "tangent") for compiler in WHERE for checkpoints in ("none", "block")]
# Under autocast, what differs from the above: whose casts are recorded, and where.
AUTOCAST = [(compiler, checkpoints, "primal") for compiler in WHERE for checkpoints in ("none", "block")]
AUTOCAST += [("none", "none", "tangent"), ("none", "block", "tangent"), ("whole", "none", "tangent")]


def matrix(cases: list[tuple[str, str, str]]) -> Any:
    return pytest.mark.parametrize(
        ("compiler", "checkpoints", "through"), cases, ids=lambda word: word
    )  # fmt: skip


@matrix(MATRIX)
def test_compile_and_checkpoint(compiler, checkpoints, through):
    tracked = through == "tangent"
    primals, tangents = point()
    net = network()
    y, dy = jvp_by_torch(net, primals, tangents)
    expected = gradients(net, loss_of(y, dy, tracked))

    run = placed(lambda *args: pfm.jvp(net, args, tangents, track_tangent=tracked), compiler, checkpoints, net)
    value, tangent = run(*primals)
    torch.testing.assert_close(value, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tangent, dy, rtol=1e-10, atol=1e-10)
    same(gradients(net, loss_of(value, tangent, tracked)), expected, 1e-10)


@pytest.mark.parametrize("compiler", ["none", "whole"])
def test_backward_through_an_untracked_tangent_raises(compiler):
    primals, tangents = point()
    net = network()
    run = placed(lambda *args: pfm.jvp(net, args, tangents), compiler, "none", net)
    value, tangent = run(*primals)
    with pytest.raises(RuntimeError, match="track_tangent=True"):
        loss_of(value, tangent, tracked=True).backward()


# ---- autocast ------------------------------------------------------------------------------------------------------


@matrix(AUTOCAST)
def test_autocast(compiler, checkpoints, through):
    """bfloat16 products: eps = 2^-8 each, and no gradient is lost to weights that were cast without autograd."""
    exact = network()
    tracked = through == "tangent"
    primals, tangents = point()
    y, dy = jvp_by_torch(exact, primals, tangents)
    expected = gradients(exact, loss_of(y, dy, tracked))

    net = network(torch.float32)
    primals, tangents = point(torch.float32)
    run = placed(lambda *args: pfm.jvp(net, args, tangents, track_tangent=tracked), compiler, checkpoints, net)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(*primals)
        value, tangent = run(*primals)
        loss = loss_of(value.float(), tangent.float(), tracked)
    assert value.dtype == tangent.dtype == plain.dtype == torch.bfloat16
    if compiler == "none":
        torch.testing.assert_close(value, plain, rtol=2**-6, atol=2**-6)  # attention is a kernel of its own
    assert (value - y).norm() / y.norm() < 0.02
    assert (tangent - dy).norm() / dy.norm() < 0.05
    same(gradients(net, loss), expected, 0.2)


def test_autocast_gradients_are_those_of_the_plain_model():
    """The tangent is only a target: then the gradient is the plain model's, to bfloat16's rounding."""
    net = network(torch.float32)
    primals, tangents = point(torch.float32)
    target = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (lambda: net(*primals), lambda: pfm.jvp(net, primals, tangents)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (run().float() - target).square().mean()
        found.append(gradients(net, loss))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2**-6, atol=2**-7, msg=name)


def test_autocast_after_a_pass_without_grad():
    """autocast keeps cast weights; casts kept from a pass under no_grad have no gradient."""
    net = network(torch.float32)
    primals, tangents = point(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            pfm.jvp(net, primals, tangents)
        value, tangent = pfm.jvp(net, primals, tangents)
        loss = loss_of(value.float(), tangent.float(), False)
    gradients(net, loss)  # none is missing


# ---- GradScaler, accumulation, no_grad, inference mode -------------------------------------------------------------


def test_grad_scaler():
    """The scale goes through both halves of a loss and is taken out again."""
    results = []
    for scale in (1.0, 2.0**12):
        net = network()
        primals, tangents = point()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale(loss_of(*pfm.jvp(net, primals, tangents, track_tangent=True), True)).backward()
            scaler.step(optimiser)
            scaler.update()
        results.append({name: p.detach() for name, p in net.named_parameters()})
    reference = network()
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        gradients(reference, loss_of(*jvp_by_torch(reference, primals, tangents), True))
        optimiser.step()
    for result in results:
        same(result, {name: p.detach() for name, p in reference.named_parameters()}, 1e-12)


@pytest.mark.parametrize("tracked", [False, True], ids=["primal", "tangent"])
def test_accumulated_gradients(tracked):
    """Four backward passes over one row each, added up, are one over four rows."""
    net = network()
    primals, tangents = point()
    expected = gradients(net, loss_of(*jvp_by_torch(net, primals, tangents), tracked))
    net.zero_grad(set_to_none=True)
    for row in range(4):
        part = slice(row, row + 1)
        y, dy = pfm.jvp(net, tuple(x[part] for x in primals), (tangents[0][part], *tangents[1:]), track_tangent=tracked)
        (loss_of(y, dy, tracked) / 4).backward()
    same({name: p.grad for name, p in net.named_parameters()}, expected, 1e-10)


@pytest.mark.parametrize(
    ("mode", "compiler"),
    [("no_grad", "none"), ("no_grad", "whole"), ("inference_mode", "none"), ("inference_mode", "block")],
)
def test_without_gradients(mode, compiler):
    net = network()
    primals, tangents = point()
    y, dy = jvp_by_torch(net, primals, tangents)
    run = placed(lambda *args: pfm.jvp(net, args, tangents), compiler, "none", net)
    with getattr(torch, mode)():
        value, tangent = run(*primals)
    assert not value.requires_grad and not tangent.requires_grad
    torch.testing.assert_close(value, y.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tangent, dy.detach(), rtol=1e-10, atol=1e-10)


# ---- compiled code on other shapes -----------------------------------------------------------------------------------


def test_one_compilation_for_other_sizes():
    net = network()
    graphs = []

    def counted(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(
        lambda x, s, t, v: pfm.jvp(net, (x, s, t), (v, 1.0, None)), fullgraph=True, dynamic=True, backend=counted
    )
    for rows in (3, 5, 7):
        primals, tangents = point(rows=rows)
        y, dy = jvp_by_torch(net, primals, tangents)
        value, tangent = run(*primals, tangents[0])
        torch.testing.assert_close(value, y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(tangent, dy, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


# ---- memory --------------------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Any], parameters: Any) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, the parameters' own left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    held = []  # what is saved must live until it is counted: an address may be used again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return sum(kept.values())


def test_gradients_of_the_primal_keep_what_the_plain_forward_keeps():
    torch.manual_seed(0)
    net = SmallDiT(width=64, heads=4, depth=2)
    x, v = torch.randn(2, 4, 32, 4)
    s, t = torch.rand(2, 4)
    plain = saved_bytes(lambda: net(x, s, t), net.parameters())
    dual = saved_bytes(lambda: pfm.jvp(net, (x, s, t), (v, 1.0, None)), net.parameters())
    tracked = saved_bytes(lambda: pfm.jvp(net, (x, s, t), (v, 1.0, None), track_tangent=True), net.parameters())
    assert dual <= 1.2 * plain
    assert tracked > 1.5 * plain  # what the tangent would keep is counted at all
