"""Exact solutions the tests measure against, in float64: a Gaussian (closed-form flow map), a mixture (velocity)."""

import torch


class Gaussian:
    """Data N(m, S^2), noise N(0, 1), linear path, elementwise.

    b_t(x) = m + (x - t m) sd'_t / sd_t,    X_{s,t}(x) = t m + (x - s m) sd_t / sd_s,    sd_t^2 = (1-t)^2 + t^2 S^2
    """

    def __init__(self, m=0.7, S=0.5):
        self.m, self.S = m, S

    def sd(self, t):
        return ((1 - t) ** 2 + (t * self.S) ** 2) ** 0.5

    def velocity(self, x, t):
        return self.m + (x - t * self.m) * (t * self.S**2 - (1 - t)) / self.sd(t) ** 2

    def jump(self, x, s, t):
        return t * self.m + (x - s * self.m) * self.sd(t) / self.sd(s)

    def data(self, x, t):
        """E[x1 | x_t = x]."""
        return self.m + t * self.S**2 / self.sd(t) ** 2 * (x - t * self.m)

    def mean_velocity(self, x, s, t):
        """A network u(x, s, t): times (B,), the velocity where s = t."""
        s, t = (each.reshape(-1, *[1] * (x.dim() - 1)) for each in (s, t))
        span = torch.where(s == t, torch.ones_like(s), t - s)
        return torch.where(s == t, self.velocity(x, s), (self.jump(x, s, t) - x) / span)


# (s, t, x, b_s(x), X_{s,t}(x), v_{s,t}(x), b_t(X)) with m = 0.7, S = 0.5; from the specification, not from this file.
GOLDEN = [
    (0.0, 1.0, 1.3, -0.60000000, 1.35000000, 0.05000000, 1.35000000),
    (0.23, 0.81, 1.3, -0.63889462, 1.22147536, -0.13538732, 0.74087916),
    (0.23, 0.81, -0.4, 1.35945556, 0.24464647, 1.11145942, 0.67986549),
    (0.6, 1.0, 0.9, 0.22000000, 1.18000000, 0.70000000, 1.18000000),
]


class Mixture:
    """Data sum_k W_k N(M_k, S_k^2), elementwise; b = (D - x)/(1 - t) with the exact D = E[x1 | x_t = x]."""

    W, M, S = (0.3, 0.5, 0.2), (-1.2, 0.4, 1.7), (0.35, 0.5, 0.3)

    def data(self, x, t):
        W, M, S = (torch.tensor(v, dtype=torch.float64) for v in (self.W, self.M, self.S))
        x = x.double()[..., None]
        variance = (t * S) ** 2 + (1 - t) ** 2
        share = torch.softmax(W.log() - 0.5 * variance.log() - (x - t * M) ** 2 / (2 * variance), -1)
        return (share * (M + t * S**2 / variance * (x - t * M))).sum(-1)

    def velocity(self, x, t):
        return (self.data(x, t) - x.double()) / (1 - t)


# (x, t, D, b, eps, score) of the mixture
MIXTURE_GOLDEN = [
    (0.3, 0.3, 0.352063522710, 0.074376461015, 0.277687061696, -0.396695802422),
    (-1.1, 0.5, -1.138544973311, -0.077089946622, -1.061455026689, 2.122910053378),
    (0.8, 0.9, 0.870596297101, 0.705962971014, 0.164633326087, -1.646333260872),
    (0.25, 0.05, 0.196582039985, -0.056229431595, 0.252811471580, -0.266117338505),
]
MIXTURE_FLOW = ((-2.0, 0.0, 1.0), (-1.668721132631, 0.249653887895, 1.452106672171))  # exact flow from 0.05 to 0.95


def slope(sizes, errors):
    """Least-squares slope of log(error) against log(size): the observed order of convergence."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
