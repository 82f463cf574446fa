"""Runge-Kutta steps: orders of convergence, their known relatives, what they do at an end without velocity."""

import pytest
from solver_orders import GRIDS, observed_order

from pyflowmap import solvers

ORDERS = {"euler": 1, "heun": 2}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, grid):
    assert observed_order(solvers.named[name], grid) == pytest.approx(ORDERS[name], abs=0.3)
