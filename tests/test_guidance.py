"""One evaluation of each guidance, against the papers' formulas in float64 and against diffusers; bad input."""

import pytest
import torch
from guidance_cases import (
    CLOSE,
    NULL,
    SPACES,
    back,
    dot,
    flat,
    guided,
    into,
    paper_apg,
    paper_cfg_zero,
    paper_rescale,
    run,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from pyflowmap.algebra import Lazy, evaluate, lazy
from pyflowmap.flow_map import FlowMap
from pyflowmap.guidance import apg, autoguidance, cfg, cfg_zero, erk, rescale, skip_layer
from pyflowmap.sampling import sample


@st.composite
def points(draw):
    """x, v_cond, v_null of one drawn shape and float64, a time, a scale."""
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), 2)
    torch.manual_seed(draw(st.integers(0, 10_000)))
    x, c, u = (torch.randn(shape, dtype=torch.float64) + shift for shift in (0.0, 0.3, 0.2))
    return x, c, u, draw(st.floats(0.02, 0.98)), draw(st.floats(-2.0, 12.0))


@given(points(), st.sampled_from(SPACES))
def test_cfg_zero_is_the_papers(point, space):
    x, c, u, s, w = point
    P = [into(space, x, v, s) for v in (c, u)]
    expected = back(space, x, paper_cfg_zero(*P, w), s)
    made = guided(cfg_zero(w, NULL, space=space), x, s, c, u)
    torch.testing.assert_close(made, c if w == 1.0 else expected, rtol=1e-6, atol=1e-6)  # 1e-8 in the denominator


@given(
    points(), st.sampled_from(SPACES), st.floats(0.0, 1.5), st.sampled_from([None, 0.3, 5.0]),
    st.sampled_from(["conditional", "null"]),
)  # fmt: skip
def test_apg_is_the_papers(point, space, eta, r, base):
    x, c, u, s, w = point
    P = [into(space, x, v, s) for v in (c, u)]
    expected = back(space, x, paper_apg(*P, w, eta, r, base=base)[0], s)
    made = guided(apg(w, NULL, eta=eta, threshold=r, base=base, space=space), x, s, c, u)
    torch.testing.assert_close(made, expected, rtol=1e-7, atol=1e-7)


@given(points(), st.sampled_from(SPACES), st.floats(0.0, 1.0))
def test_rescale_is_the_papers(point, space, phi):
    x, c, u, s, w = point
    v = u + w * (c - u)
    expected = back(space, x, paper_rescale(into(space, x, v, s), into(space, x, c, s), phi), s)
    torch.testing.assert_close(guided(rescale(cfg(w, NULL), phi, space), x, s, c, u), expected, rtol=1e-6, atol=1e-6)


@given(points(), st.floats(-1.0, 4.0))
def test_weaker_networks(point, w2):
    x, c, u, s, w = point
    skipped = torch.randn_like(x)
    both = skip_layer(w2, lambda: None, of=cfg(w, NULL))
    torch.testing.assert_close(guided(both, x, s, c, u, skipped=skipped), u + w * (c - u) + w2 * (c - skipped), **CLOSE)
    alone = skip_layer(w2, lambda: None)
    torch.testing.assert_close(guided(alone, x, s, c, skipped=skipped), c + w2 * (c - skipped), **CLOSE)
    auto = autoguidance(w, lambda: None)
    torch.testing.assert_close(guided(auto, x, s, c, skipped=skipped), skipped + w * (c - skipped), **CLOSE)


@given(points(), st.sampled_from(SPACES))
def test_what_is_cfg_and_what_is_not(point, space):
    x, c, u, s, w = point
    plain = guided(cfg(w, NULL), x, s, c, u)
    for same in (
        apg(w, NULL, eta=1.0, space=space),
        apg(w, NULL, eta=1.0, base="null", space=space),
        apg(w, NULL, eta=1.0, threshold=1e9, space=space),
        rescale(cfg(w, NULL), phi=0.0, space=space),
        skip_layer(0.0, lambda: None, of=cfg(w, NULL)),
    ):
        torch.testing.assert_close(guided(same, x, s, c, u), plain, rtol=1e-7, atol=1e-7)
    inside = into(space, x, u, s) + w * (into(space, x, c, s) - into(space, x, u, s))
    torch.testing.assert_close(back(space, x, inside, s), plain, rtol=1e-7, atol=1e-7)  # cfg: any space
    parallel = u * dot(c, u) / dot(u, u)  # s* is 1 where cond - null is orthogonal to null
    torch.testing.assert_close(
        guided(cfg_zero(w, NULL), x, s, c - parallel + u, u), guided(cfg(w, NULL), x, s, c - parallel + u, u),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


def test_spaces_differ_where_there_are_norms():
    torch.manual_seed(0)
    x, c, u = torch.randn(3, 2, 9, dtype=torch.float64)
    for make in (
        lambda space: cfg_zero(3.0, NULL, space=space),
        lambda space: apg(3.0, NULL, space=space),
        lambda space: rescale(cfg(3.0, NULL), space=space),
    ):
        v = [guided(make(space), x, 0.4, c, u) for space in SPACES]
        assert min(float((v[i] - v[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


@pytest.mark.parametrize("s", [0.0, 1.0])
@pytest.mark.parametrize("space", ["data", "noise"])
def test_the_ends_are_limits(space, s):
    """At s = 1 data is x itself, at s = 0 noise is: 0/0 by the formula, its limit here."""
    torch.manual_seed(1)
    x, c, u = torch.randn(3, 3, 7, dtype=torch.float64)
    for guide in (
        cfg_zero(3.0, NULL, space=space),
        apg(3.0, NULL, eta=0.3, threshold=1.0, space=space),
        rescale(cfg(3.0, NULL), space=space),
    ):
        near = abs(s - 1e-7)
        torch.testing.assert_close(guided(guide, x, s, c, u), guided(guide, x, near, c, u), rtol=1e-5, atol=1e-5)


def test_degenerate_samples_stay_finite_with_finite_gradients():
    x = torch.zeros(2, 6, dtype=torch.float64)
    for guide in (
        cfg_zero(3.0, NULL),
        apg(3.0, NULL, threshold=1.0, space="velocity"),
        rescale(cfg(3.0, NULL)),
        rescale(cfg(0.0, NULL)),
    ):
        for c, u in ((x, x), (x + 1.0, x), (x, x + 1.0)):
            c, u = c.clone().requires_grad_(), u.clone().requires_grad_()
            out = guided(guide, x, 0.5, c, u)
            out.sum().backward()
            assert all(each.isfinite().all() for each in (out, c.grad, u.grad)), guide


def test_half_precision_predictions_are_reduced_in_float32():
    torch.manual_seed(2)
    x = torch.randn(4, 3, 50)
    c, u = (torch.randn(4, 3, 50).bfloat16() for _ in range(2))
    wide = [v.double() for v in (x, c, u)]
    for guide in (cfg_zero(4.0, NULL), apg(4.0, NULL, threshold=3.0), rescale(cfg(4.0, NULL), space="data")):
        made = guided(guide, x, 0.3, c, u)
        expected = guided(guide, wide[0], 0.3, *wide[1:])
        bound = 2**-7 if made.dtype == torch.bfloat16 else 1e-5  # all operands half: so is the result
        torch.testing.assert_close(made.double(), expected, rtol=bound, atol=bound)


# ---- diffusers ------------------------------------------------------------------------------------------------------


def test_diffusers_has_the_same_guiders():
    guiders = pytest.importorskip("diffusers.guiders")
    torch.manual_seed(3)
    x, c, u, k = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64)
    ours = lambda guide: guided(guide, x, 0.5, c, u, skipped=k)  # noqa: E731

    def theirs(name, *predictions, step=1, **options):
        guider = getattr(guiders, name)(**options)
        guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(0))
        return guider.forward(*predictions).pred

    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    close(ours(cfg(4.0, NULL)), theirs("ClassifierFreeGuidance", c, u, guidance_scale=4.0))
    close(
        ours(rescale(cfg(4.0, NULL), 0.7)),
        theirs("ClassifierFreeGuidance", c, u, guidance_scale=4.0, guidance_rescale=0.7),
    )
    close(ours(cfg_zero(4.0, NULL)), theirs("ClassifierFreeZeroStarGuidance", c, u, guidance_scale=4.0))
    # APG: by default from the null with the whole scale, in the network's own space; the paper's: from cond, scale - 1.
    options = {"eta": 0.2, "adaptive_projected_guidance_rescale": 2.0}
    name = "AdaptiveProjectedGuidance"
    close(
        ours(apg(4.0, NULL, eta=0.2, threshold=2.0, base="null", space="velocity")),
        theirs(name, c, u, guidance_scale=4.0, **options),
    )
    close(
        ours(apg(4.0, NULL, eta=0.2, threshold=2.0, space="velocity")),
        theirs(name, c, u, guidance_scale=3.0, use_original_formulation=True, **options),
    )
    # SLG: the same on top of cfg, their scale one larger without.
    layers = {"skip_layer_guidance_layers": [0], "skip_layer_guidance_scale": 2.0}
    close(
        ours(skip_layer(2.0, lambda: None, of=cfg(4.0, NULL))),
        theirs("SkipLayerGuidance", c, u, k, guidance_scale=4.0, **layers),
    )
    close(ours(skip_layer(1.0, lambda: None)), theirs("SkipLayerGuidance", c, None, k, guidance_scale=1.0, **layers))
    auto = {"guidance_scale": 2.5, "auto_guidance_layers": [0], "dropout": 0.1}
    close(ours(autoguidance(2.5, lambda: None)), theirs("AutoGuidance", c, k, **auto))
    # the zero-init of theirs counts steps, one by default
    assert not theirs("ClassifierFreeZeroStarGuidance", c, u, step=0).any()
    assert cfg_zero(4.0, NULL, zero_init=1).idle([0.0, 0.5, 1.0]) == 1


def test_momentum_is_that_of_diffusers():
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    torch.manual_seed(4)
    buffer = module.MomentumBuffer(-0.5)
    guide = apg(4.0, NULL, eta=0.0, momentum=-0.5, threshold=2.0, base="null", space="velocity").begin()
    for _ in range(4):
        x, c, u = torch.randn(3, 2, 3, 4, dtype=torch.float64)
        expected = module.normalized_guidance(c, u, 4.0, buffer, 0.0, 2.0)
        torch.testing.assert_close(guided(guide, x, 0.5, c, u), expected, **CLOSE)


def test_guidance_stays_unevaluated():
    guide = cfg(3.0, null=NULL)
    x = torch.ones(2, 3)
    made = guide(lambda *which: [lazy((i + 1) * x) for i in which], lazy(x), 0.0, 1.0)
    assert isinstance(made, Lazy)
    torch.testing.assert_close(evaluate(made), torch.full((2, 3), -1.0))


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 3)
FLOW = FlowMap(lambda x, s, t: x)
NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cfg(NAN, NULL), ValueError, "scale = nan"),
        (lambda: cfg(None, NULL), TypeError, "scale is NoneType"),
        (lambda: cfg(torch.tensor([1.0, 2.0]), NULL), TypeError, "scale is Tensor"),
        *[(lambda g=g: g(2.0), ValueError, "name the condition") for g in (cfg, cfg_zero, apg)],
        *[(lambda g=g: g(2.0, null=10), ValueError, "null = 10") for g in (cfg, cfg_zero, apg)],
        *[(lambda g=g: g(2.0, NULL, (0.8, 0.2)), ValueError, "lower time") for g in (cfg, cfg_zero, apg)],
        *[(lambda g=g: g(2.0, NULL, space="dta"), ValueError, "space = 'dta'") for g in (cfg_zero, apg)],
        (lambda: rescale(cfg(2.0, NULL), space=None), ValueError, "space = None"),
        (lambda: erk(1.0, space="data"), ValueError, "space = 'data'; it is 'velocity' or 'noise'"),
        (lambda: cfg_zero(2.0, NULL, zero_init=1.5), ValueError, "zero_init = 1.5"),
        (lambda: cfg_zero(2.0, NULL, zero_init=-1), ValueError, "zero_init = -1"),
        (lambda: cfg_zero(2.0, NULL, zero_init=True), TypeError, "zero_init is bool"),
        (lambda: apg(2.0, NULL, eta=NAN), ValueError, "eta = nan"),
        (lambda: apg(2.0, NULL, momentum=-1.0), ValueError, "momentum = -1.0"),
        (lambda: apg(2.0, NULL, threshold=0.0), ValueError, "threshold = 0.0"),
        (lambda: apg(2.0, NULL, base="cond"), ValueError, "base = 'cond'"),
        (lambda: rescale(3.0), TypeError, "of = 3.0"),
        (lambda: rescale(None), TypeError, "of = None"),
        (lambda: rescale(cfg), TypeError, "pass another guidance"),
        (lambda: rescale(cfg(2.0, NULL), phi=1.2), ValueError, "phi = 1.2"),
        (lambda: autoguidance(2.0, 3), TypeError, "weak is int"),
        (lambda: autoguidance(NAN, flat), ValueError, "scale = nan"),
        (lambda: autoguidance(2.0, flat, (0.5, 0.5)), ValueError, "lower time"),
        (lambda: skip_layer(2.0, None), TypeError, "skipped is NoneType"),
        (lambda: skip_layer(2.0, flat, of=flat), TypeError, "of = "),
        (lambda: erk(-1.0), ValueError, "scale = -1.0"),
        (lambda: sample(FLOW, GOOD, guidance=cfg(2.0, NULL)), ValueError, "null names 'label'"),
        (lambda: sample(FLOW, GOOD, guidance=rescale(apg(2.0, NULL, space="velocity"))), ValueError, "names 'label'"),
        (lambda: sample(FLOW, GOOD, guidance=cfg), TypeError, "pass an object"),
        (lambda: sample(FLOW, GOOD, guidance=lambda ask, x, s, t: x), TypeError, "guidance is function"),
        (lambda: run(GOOD[:, :1], rescale(cfg(2.0, NULL))), ValueError, "no standard deviation"),
        (
            lambda: sample(FLOW, GOOD, condition={"text": "a cat"}, guidance=cfg(2.0, null={"text": ""})),
            ValueError,
            "batched=False",
        ),
    ],
)
def test_bad_guidance(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
