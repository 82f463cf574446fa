"""Writes docs/solvers.md: what every solver of `pyflowmap.solvers.named` promises, and what was observed of it.

python tools/solver_table.py [name of a solver ...]      prints the rows of these alone, and writes nothing
"""

from __future__ import annotations

import math
import pathlib
import re
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from solver_orders import GRIDS, STEPS, observed_order, times  # noqa: E402

from pyflowmap import solvers  # noqa: E402
from pyflowmap.algebra import evaluate, lazy  # noqa: E402
from pyflowmap.combination import Lazy, NoiseField  # noqa: E402
from pyflowmap.solvers import driver  # noqa: E402

HEAD = """# Solvers

Written by `python tools/solver_table.py`. Any of them goes into `pfm.sample(..., solver="name")`, with its options as
`pfm.solvers.name.using(option=...)`, or runs alone: `pfm.solvers.name(velocity, x, grid)`.

- order: of convergence, as stated and as observed: the slope of log error against log step length in float64, at
  {steps} steps over a Gaussian mixture, {grids}. "-": none is stated, or the solver draws
  noise. A solver that takes a jump is as exact as its flow map.
- NFE: network evaluations per step once the history is full, and those that the first steps spend beyond it.
- launches, passes: kernel launches per step beside the network's own, and full-size tensors that they read or write;
  a pass over N float32 numbers moves 4 N bytes. Without guidance, in the steady state, on the linear path.

| solver | options | takes | order | observed | NFE | to start | launches | passes | source |
|---|---|---|---|---|---|---|---|---|---|
"""
SOURCE = re.compile(
    r"[A-Z][\w'’-]+(?: (?:&|and) [A-Z][\w'’-]+| et al\.)? (?:19|20)\d\d(?: \([^)]*\))?"
    r"(?:, (?:(?:eq|alg|sec|tab|app|prop)\.|sections?|[\w-]+-DEIS)(?: [\w.]*\w)?)?"
)
TABLE = ROOT / "docs" / "solvers.md"
STEPS_COUNTED = 12
READS = 8  # of one launch; wider combinations take several, 4 outputs at a time (pyflowmap/ops/combine_split.py)


def cost(combinations: tuple, outs: int) -> tuple[int, int]:
    """(launches, passes) of one `evaluate`; operands that are multiplied by 0 or drawn in the kernel are not read."""
    terms = [each if type(each) is Lazy else lazy(each) for each in combinations]
    launches = passes = 0
    widest = len({id(x) for term in terms for x in term.operands if type(x) is not NoiseField})
    group = outs if widest <= READS else 4
    for first in range(0, outs, group):
        part = terms[first : first + group]
        read = {
            id(x)
            for term in part
            for x, c in zip(term.operands, term.coefficients)
            if type(x) is not NoiseField and not (isinstance(c, float) and c == 0.0)
        }
        again = max(0, math.ceil((len(read) - READS) / (READS - len(part))))  # partial sums, written and read again
        launches += 1 + again
        passes += len(read) + len(part) + 2 * len(part) * again
    return launches, passes


def counted(solver: solvers.Solver) -> tuple[float, float]:
    """(launches, passes) per step, of a run with a network that returns another tensor each time."""
    steps: list[list[tuple[int, int]]] = []

    def step(*arguments, **options):
        steps.append([])
        return solver.step(*arguments, **options)

    def spy(*combinations, out=None, dtype=None):
        if steps:
            steps[-1].append(cost(combinations, len(combinations)))
        return evaluate(*combinations, out=out, dtype=dtype)

    def field(argument, x, *at):
        output = lazy(torch.zeros_like(argument))
        return output if len(at) == 1 else x + (at[1] - at[0]) * output

    before, driver.evaluate = driver.evaluate, spy
    try:
        # A plan may need the whole path, such as a restart's noise levels.
        whole = [k / STEPS_COUNTED for k in range(STEPS_COUNTED + 1)]
        grid = times("rough", STEPS_COUNTED) if solver.plan is None else whole
        solvers.integrate(replace(solver, step=step), field, torch.ones(2, 3), grid, seed=0)
    finally:
        driver.evaluate = before
    steady = steps[len(steps) // 2 : -1]
    launches, passes = (sum(each[i] for each_step in steady for each in each_step) / len(steady) for i in (0, 1))
    return launches, passes


def draws(solver: solvers.Solver) -> bool:
    """Whether it draws noise as its options are; with eta = 0 the SDE solvers do not."""
    return solver.stochastic and solver.options.get("eta", 1.0) != 0.0


def row(solver: solvers.Solver) -> str:
    text = " ".join((solver.__doc__ or "").split())
    options = ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value!r}"
        for name, value in solver.options.items()
    )
    observed, launches, passes = "-", "its own loop", "its own loop"
    if solver.loop is None:
        if solver.order is not None and not draws(solver) and solver.takes == "velocity" and solver.plan is None:
            observed = " / ".join(f"{observed_order(solver, grid):.2f}" for grid in GRIDS)
        launches, passes = (f"{each:.3g}" for each in counted(solver))
    cells = (
        f"`{solver.name}`",
        f"`{options}`" if options else "",
        solver.takes + (", noise" if draws(solver) else ""),
        "-" if solver.order is None else str(solver.order),
        observed,
        str(solver.nfe),
        str(solver.starting) if solver.starting else "",
        launches,
        passes,
        "; ".join(dict.fromkeys(SOURCE.findall(text))),
    )
    return "| " + " | ".join(cells) + " |"


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in solvers.named]
    if unknown:
        raise SystemExit(f"solver_table: no solver {unknown[0]!r}; there are {', '.join(solvers.named)}")
    chosen = names or sorted(solvers.named)
    rows = [row(solvers.named[name]) for name in tqdm(chosen, unit="solver", file=sys.stderr)]
    if names:
        print("\n".join(rows))
        return
    head = HEAD.format(steps=", ".join(map(str, STEPS)), grids=" / ".join(f"{grid} grid" for grid in GRIDS))
    TABLE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
