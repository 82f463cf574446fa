"""Guidance: several evaluations of a network become one velocity, as an unevaluated combination.

    cfg(scale, null)               v_null + scale (v_cond - v_null)                             2 evaluations
    cfg_zero(scale, null)          the same with the null rescaled per sample, zero-init         2
    apg(scale, null)               the part of cond - null along cond weighted by eta            2
    autoguidance(scale, weak)      v_weak + scale (v - v_weak), weak a worse network             2
    skip_layer(scale, skipped)     + scale (v - v_skipped), layers left out; alone or on top     +1
    rescale(of, phi)               any of these, its standard deviation brought back             +0
    erk(scale)                     damps stiff directions, from what Heun has computed anyway    +0
    contrastive_correction(strength, mean)   takes back what `objectives.contrastive` has shifted    +0

cfg, autoguidance and skip_layer are affine in the predictions: the same for velocity, data and noise, and free, folded
into the solver's update. The others use norms and inner products, which differ between these *spaces*: `space` says
which. They cost one reduction launch per evaluation, and nothing waits for the device.

One of one's own is a subclass of `Guidance`, whose help shows one in eight lines.

Those around another guidance compose: `rescale(skip_layer(2.8, skipped, of=cfg(4.0, null={"label": 10})))`.
"""

from .classifier_free import cfg, cfg_zero
from .contrastive_correction import contrastive_correction
from .embedded import erk
from .guidance import Guidance, without
from .projected import apg
from .rescaled import rescale
from .weaker import autoguidance, skip_layer

__all__ = [
    "Guidance",
    "apg",
    "autoguidance",
    "cfg",
    "cfg_zero",
    "contrastive_correction",
    "erk",
    "rescale",
    "skip_layer",
    "without",
]
