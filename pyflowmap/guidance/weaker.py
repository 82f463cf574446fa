"""Guidance away from a worse network under the same condition: autoguidance, and layers left out (SLG, PAG)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..algebra import Lazy
from ..flow_map import FlowMap
from .guidance import Around, Ask, Guidance, check_interval, finite, outside, remembering

__all__ = ["autoguidance", "skip_layer"]


def _check_network(name: str, network: Any) -> None:
    if not isinstance(network, FlowMap) and not callable(network):
        raise TypeError(
            f"{name} is {type(network).__name__}; pass a FlowMap, or a network that is called like the model's"
        )


@dataclass(frozen=True)
class autoguidance(Guidance):
    """Autoguidance, v = v_weak + scale (v - v_weak). Karras et al. 2024, eq. 5.

    scale     1 is no guidance
    weak      a worse network for the same task: smaller, or trained for less long. A FlowMap on the model's path, of
              any prediction, or a network that is called like the model's own. It gets the same condition
    interval  as in `cfg`

    The same for velocity, data and noise. On a jump it guides the mean velocity.

    >>> autoguidance(2.0, lambda x, s, t: x).evaluations(0.5)
    2
    """

    scale: float
    weak: Any
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        finite("scale", self.scale, "2.0")
        _check_network("weak", self.weak)
        check_interval(self.interval)

    def evaluations(self, s: float) -> int:
        """Network evaluations at time s: 1 or 2."""
        return 1 if self.scale == 1.0 or outside(self.interval, s) else 2

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        strong = ask(0)[0]
        if self.evaluations(s) == 1:
            return strong
        weak = ask(0, model=self.weak)[0]
        return weak + self.scale * (strong - weak)


@dataclass(frozen=True)
class skip_layer(Around):
    """Skip-layer guidance (SLG), or with attention maps replaced by the identity, perturbed-attention guidance (PAG):
    v = v_of + scale (v_cond - v_skipped). Hyung et al. 2025 (STG), eq. 6; Ahn et al. 2024 (PAG), eq. 16.

    scale     0 is none. Not to be confused with the scale of `cfg`, for which 1 is none. Where there is no `of`,
              diffusers computes v_skipped + scale (v_cond - v_skipped): its scale is one larger. With `cfg` under it,
              the two agree
    skipped   the model with some layers left out: a FlowMap on the model's path, or a network that is called like the
              model's own. It gets the caller's condition
    of        a guidance to add this to, e.g. cfg(4.0, null=...); None: v_of = v_cond
    interval  as in `cfg`; of this part alone

    The same for velocity, data and noise. On a jump it guides the mean velocity.

    >>> from pyflowmap.guidance import cfg
    >>> skip_layer(2.8, lambda x, s, t: x, of=cfg(4.0, null={"label": 10}), interval=(0.01, 0.2)).evaluations(0.1)
    3
    """

    scale: float
    skipped: Any
    of: Guidance | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        finite("scale", self.scale, "2.8")
        _check_network("skipped", self.skipped)
        check_interval(self.interval)

    def _active(self, s: float) -> bool:
        return self.scale != 0.0 and not outside(self.interval, s)

    def evaluations(self, s: float) -> int:
        """Network evaluations at time s."""
        return self.inner.evaluations(s) + self._active(s)

    def __call__(self, ask: Ask, x: Lazy, s: Any, t: Any) -> Lazy:
        if not self._active(s):
            return self.inner(ask, x, s, t)
        asked, seen = remembering(ask)
        guided = self.inner(asked, x, s, t)
        conditional = seen[0] if 0 in seen else ask(0)[0]
        return guided + self.scale * (conditional - ask(0, model=self.skipped)[0])
