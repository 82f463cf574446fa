"""Contrastive flow matching: the paper's gradient, its derived minimum, which rows are pushed from what, bad input."""

import pytest
import torch
from mean_gradient import feature, row_gradients, sigmas
from oracles import Gaussian

from pyflowmap import FlowMap, evaluate, guidance, lazy, sample
from pyflowmap.objectives import contrastive, flow_matching
from pyflowmap.objectives.negatives import other_rows, other_rows_of

ORACLE = Gaussian()
TIMES = {"times": lambda x: 0.05 + 0.9 * torch.rand(len(x), dtype=torch.float64)}


def velocity_map(network):
    return FlowMap(network, prediction="velocity")


@pytest.mark.parametrize("case", ["any", "null", "label", "label and null"])
def test_the_gradient_is_the_papers(case):
    torch.manual_seed(1)
    x1, x0 = torch.randn(2, 8, 3, dtype=torch.float64).unbind(0)
    t, strength = torch.rand(8, dtype=torch.float64), 0.2
    label = torch.tensor([0, 1, 9, 0, 2, 9, 1, 0])
    net = torch.nn.Linear(3, 3).double()
    options = {}
    if "null" in case:
        options["null"] = {"label": 9}
    if "label" in case:
        options["label"] = "label"
    ours = contrastive(
        velocity_map(lambda x, t, label: net(x) + t[:, None]), x1, x0=x0, condition={"label": label},
        times=lambda x, seed: t, strength=strength, seed=3, **options,
    )  # fmt: skip
    found = torch.autograd.grad(ours.mean(), list(net.parameters()))

    if "label" in case:
        allowed = torch.tensor(
            [[a != b and ("null" not in case or 9 not in (a, b)) for b in label.tolist()] for a in label.tolist()]
        )
        n, _ = other_rows_of(allowed, x1, 3, None)
        assert all(allowed[i, n[i]] for i in range(8) if "null" not in case or label[i] != 9)
    else:
        n = other_rows(x1, 3, None)
    m = (label != 9).double() if "null" in case else torch.ones(8, dtype=torch.float64)
    u, v = x1 - x0, net((1 - t[:, None]) * x0 + t[:, None] * x1) + t[:, None]
    near, apart = (v - u).square().sum(1), (v - u[n]).square().sum(1)
    paper = (near - strength * m * 8 / m.sum() * apart).mean() / 3
    for a, b in zip(found, torch.autograd.grad(paper, list(net.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.raw_error, near.detach() / 3)
    if case == "any":
        torch.testing.assert_close(ours.parts["flow_matching"] - 0.2 * ours.parts["negative"], paper.detach())
    else:
        assert float(ours.parts["contrasted"]) == float(m.mean())


def test_the_derived_minimum_has_no_mean_gradient_and_its_loss_is_the_conditional_variance():
    """v* = (v - k m)/(1 - k). Rows of one batch share each other's targets, so batches are the independent values."""
    k, means, errors = 0.3, {True: [], False: []}, []
    torch.manual_seed(0)
    for _ in range(1000):
        x1 = ORACLE.m + ORACLE.S * torch.randn(32, 2, dtype=torch.float64)
        for shifted in (True, False):

            def loss_of(theta, x1=x1, shifted=shifted):
                def network(x, t):
                    v = ORACLE.velocity(x, t[:, None])
                    v = (v - k * ORACLE.m) / (1 - k) if shifted else v
                    if shifted:
                        # || v* - target ||^2 (1 - k): the variances of u given x_t, and of another's u, 1 + S^2
                        expected = (0.25 / ORACLE.sd(t) ** 2 + k * k * 1.25) / (1 - k)
                        errors.append(-expected.mean())
                    return v + theta[:, None] * feature(x, t)

                loss = contrastive(velocity_map(network), x1, strength=k, **TIMES)
                if shifted:
                    errors[-1] += loss.per_sample.detach().mean()
                return loss

            means[shifted].append(row_gradients(loss_of, 32).mean())
    assert sigmas(torch.stack(means[True])) < 4.0
    assert sigmas(torch.stack(means[False])) > 8.0
    assert sigmas(torch.stack(errors)) < 4.0


def test_other_rows_are_uniform_and_drawn_by_sample_id():
    x = torch.zeros(5, 2)
    drawn = torch.stack([other_rows(x, seed, None) for seed in range(4000)])
    assert not bool((drawn == torch.arange(5)).any())
    counts = torch.stack([(drawn == j).sum(0) for j in range(5)]).double()
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert ((off - 1000).square() / 1000).sum() < 37.7  # chi^2, 15 degrees of freedom, 0.1 %
    ids = torch.tensor([4, 0, 2, 1, 3])
    ahead = (other_rows(x, 7, None) - torch.arange(5)) % 5
    assert torch.equal((other_rows(x, 7, ids) - torch.arange(5)) % 5, ahead[ids])
    assert torch.equal(other_rows(torch.zeros(2, 1), None, None), torch.tensor([1, 0]))


def test_rows_without_another_label_are_not_pushed():
    x1, net = torch.randn(6, 3), lambda x, t, label: torch.sin(x)
    one_label = contrastive(
        velocity_map(net), x1, condition={"label": torch.zeros(6).long()}, label="label", strength=0.5, seed=1
    )
    plain = flow_matching(velocity_map(net), x1, condition={"label": torch.zeros(6).long()}, seed=1)
    torch.testing.assert_close(one_label.per_sample, plain.per_sample)
    assert float(one_label.parts["contrasted"]) == 0.0
    # all null but one: pushed with (1 + 0.5)/2 at most, where 0.5 * 6 has no lower bound
    label = torch.tensor([9, 9, 2, 9, 9, 9])
    loss = contrastive(
        velocity_map(net), x1, condition={"label": label}, null={"label": 9}, strength=0.5, seed=1
    ).per_sample
    torch.testing.assert_close(loss[label == 9], plain.per_sample[label == 9])
    assert bool((loss >= 0).all()) and bool(loss.isfinite().all())


def test_the_correction_undoes_the_shift():
    k, mean = 0.05, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def exact(x, t):
        return torch.sin(x) * (1 + t[:, None])

    trained = velocity_map(lambda x, t: (exact(x, t) - k * mean) / (1 - k))
    x = torch.randn(4, 3, dtype=torch.float64)
    corrected = sample(trained, x, steps=5, solver="heun", guidance=guidance.contrastive_correction(k, mean))
    torch.testing.assert_close(corrected, sample(velocity_map(exact), x, steps=5, solver="heun"))
    outside = guidance.contrastive_correction(k, mean, interval=(0.05, 0.07))  # between the times
    torch.testing.assert_close(
        sample(trained, x, steps=5, solver="heun", guidance=outside), sample(trained, x, steps=5, solver="heun")
    )
    # around another: (1 - k) (null + 3 (conditional - null)) + k mean
    guide = guidance.contrastive_correction(k, mean, of=guidance.cfg(3.0, null={"label": 9}))
    assert guide.evaluations(0.5) == 2
    made = evaluate(guide(lambda *which: [lazy(x + i) for i in which], lazy(x), 0.5, 0.5))
    torch.testing.assert_close(made, (1 - k) * (x - 2.0) + k * mean)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (1, {}, "batch of one row"),
        (4, {"strength": 1.0}, "strength = 1.0"),
        (4, {"null": {"label": 9}}, "null names 'label' = 9.*NoneType"),
        (4, {"label": "label"}, "label = 'label' but the condition has nothing"),
        (4, {"label": "y", "condition": {"y": 3}}, "'y' .int. is not a label"),
    ],
)
def test_bad_options(rows, options, words):
    with pytest.raises(ValueError, match=words):
        contrastive(velocity_map(lambda x, t, **_: x), torch.zeros(rows, 3), **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: guidance.contrastive_correction(1.0, torch.zeros(3)), ValueError, "strength = 1.0"),
        (lambda: guidance.contrastive_correction(0.1, 0.3), TypeError, "mean is float"),
        (
            lambda: sample(
                velocity_map(lambda x, t: x), torch.zeros(2, 3), steps=1, solver="euler",
                guidance=guidance.contrastive_correction(0.1, torch.zeros(2, 3)),
            ),
            ValueError,
            r"mean has shape \(2, 3\)",
        ),
    ],
)  # fmt: skip
def test_bad_corrections(make, error, words):
    with pytest.raises(error, match=words):
        make()
