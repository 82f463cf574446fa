"""What the guidance tests measure against: the papers' formulas, small networks, one of each guidance."""

import torch

from pyflowmap.algebra import Lazy, evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import apg, autoguidance, cfg, cfg_zero, erk, rescale, skip_layer
from pyflowmap.sampling import sample

NULL = {"label": 10}
LABEL = torch.tensor([0, 3])
SPACES = ("velocity", "data", "noise")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


# ---- the papers, in plain torch, on predictions P of any space -------------------------------------------------------


def dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))


def paper_cfg_zero(c, u, w):
    star = dot(c, u) / (dot(u, u) + 1e-8)
    return star * u + w * (c - star * u)


def paper_apg(c, u, w, eta, r=None, beta=0.0, before=0.0, base="conditional"):
    """The guided prediction, and the running average."""
    average = (c - u) + beta * before
    d = average if r is None else average * torch.clamp(r / dot(average, average).sqrt(), max=1.0)
    parallel = dot(d, c) / dot(c, c) * c
    update = d - parallel + eta * parallel
    return (c + (w - 1.0) * update if base == "conditional" else u + w * update), average


def paper_rescale(p, c, phi):
    dims = tuple(range(1, p.dim()))
    return phi * p * c.std(dims, keepdim=True) / p.std(dims, keepdim=True) + (1 - phi) * p


def into(space, x, v, s):
    return {"velocity": v, "data": x + (1 - s) * v, "noise": x - s * v}[space]


def back(space, x, p, s):
    return {"velocity": p, "data": (p - x) / (1 - s), "noise": (x - p) / s}[space]


def guided(guide, x, s, *velocities, skipped=None):
    """What the guidance makes of given velocities."""
    at = float(s)

    def ask(*which, model=None):
        return [lazy(skipped)] if model is not None else [lazy(velocities[i]) for i in which]

    made = guide(ask, lazy(x), at, at)
    assert type(made) is Lazy
    return evaluate(made)


# ---- networks and runs ----------------------------------------------------------------------------------------------


def labelled(x, s, t, label):
    """A velocity that is the label: 10 means none."""
    return torch.where(label == 10, 1.0, 2.0 + label.double()).reshape(-1, 1).expand_as(x).to(x)


def curved(x, s, label):
    """Elementwise and nonlinear; samples do not see each other. Rows are labels or labels of twice the batch."""
    gain, shift = (each.to(x).reshape(-1, 1) for each in (torch.where(label == 10, 0.4, 1.0 + label / 4), label / 8))
    return gain * torch.tanh(x + shift) - s.to(x).reshape(-1, 1) * x


def flat(x, s, label):
    return 0.5 * x - s.to(x).reshape(-1, 1)


CURVED = FlowMap(curved, prediction="velocity")
EVERY = {
    "cfg": cfg(3.0, NULL),
    "cfg_zero": cfg_zero(3.0, NULL),
    "cfg_zero-data": cfg_zero(3.0, NULL, space="data"),
    "apg": apg(3.0, NULL, eta=0.2, threshold=1.0),
    "apg-momentum": apg(3.0, NULL, momentum=-0.5, threshold=1.0, space="velocity"),
    "rescale": rescale(cfg(3.0, NULL)),
    "autoguidance": autoguidance(2.0, flat),
    "skip_layer": skip_layer(1.5, flat, of=cfg(3.0, NULL), interval=(0.0, 0.5)),
    "erk": erk(1.0, 0.1),
    "erk-noise": erk(0.5, 0.1, of=cfg(3.0, NULL), space="noise"),
}


def run(x, guide, steps=3, solver="heun", label=LABEL, **options):
    steps = None if "grid" in options else steps
    return sample(CURVED, x, steps, solver=solver, condition={"label": label}, guidance=guide, **options)


def ab2(velocity, x, s, t, old):
    v, h = velocity(x, s), t - s
    return (x + h * v if old is None else x + h * (1.5 * v - 0.5 * old)), v
