"""Objectives as one compiled graph: the eager values and gradients."""

from functools import partial

import pytest
import torch
from objectives.plain import Tiny, data, gradients, pairs

from pyflowmap.objectives import alpha_flow, embedded_guidance, eulerian, improved_mean_flow, mean_flow
from pyflowmap.training import Step

HEAD = {"velocity_head": lambda output: output[1]}


class Told(Tiny):
    def forward(self, x, s, t, label=None, omega=None):
        u, v = super().forward(x, s, t, label)
        return u if omega is None else (u * omega[:, None], v)


CASES = {
    "eulerian": (Tiny, partial(eulerian, diagonal=0.5)),
    "eulerian, nothing stopped": (Tiny, partial(eulerian, diagonal=0.5, stop_gradient="none")),
    "mean_flow, warm-up": (Tiny, partial(mean_flow, equal=0.5, tangent_scale=torch.tensor(0.5))),
    "improved_mean_flow": (Tiny, improved_mean_flow),
    "improved_mean_flow, head": (partial(Tiny, outputs=2), partial(improved_mean_flow, **HEAD)),
    "improved_mean_flow, guided": (
        partial(Told, outputs=2),
        partial(improved_mean_flow, guidance=embedded_guidance(null={"label": 9}), seed=1, **HEAD),
    ),
    "alpha_flow": (Tiny, partial(alpha_flow, alpha=0.3)),
    "alpha_flow, the limit": (Tiny, partial(alpha_flow, alpha=0.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_compiles_in_one_graph(name):
    build, objective = CASES[name]
    network, (x1, x0), (s, t) = build(), data(8), pairs(8)
    step = Step(network, objective, x0=x0, times=lambda x, **_: (s, t))
    condition = {"label": torch.arange(8) % 4} if "guided" in name else {}
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    losses = [each(x1, **condition)[0] for each in (step, compiled)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    for a, b in zip(*(gradients(network, loss) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
