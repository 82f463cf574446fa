"""docs/solvers.md names every solver, with the order and the evaluations that it declares."""

import pathlib

import pytest

from pyflowmap import solvers

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "solvers.md").read_text().splitlines()
    if line.startswith("| `")
]


def test_the_table_is_complete():
    assert sorted(row[0] for row in ROWS) == sorted(solvers.named), "run python tools/solver_table.py"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_what_the_solver_declares(row):
    each = solvers.named[row[0]]
    assert row[3] == ("-" if each.order is None else str(each.order))
    assert (row[5], row[6] or "0") == (str(each.nfe), str(each.starting))
    assert row[9], "its docstring names no paper"
