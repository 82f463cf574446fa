"""Is the expected gradient zero? The gradient of each sample at an exact network, in a direction that could move it."""

import torch


def feature(x, t):
    """A direction without symmetry: it differs between elements of a sample, and has a mean."""
    place = torch.arange(1, x[0].numel() + 1, dtype=x.dtype).reshape(1, *x.shape[1:])
    return torch.sin(1.3 * x + t.reshape(-1, *[1] * (x.dim() - 1))) + place


def row_gradients(loss_of, rows):
    """d per_sample[i] / d theta[i] at theta = 0, (rows,): `loss_of(theta)` has the network exact + theta * feature."""
    theta = torch.zeros(rows, dtype=torch.float64, requires_grad=True)
    loss_of(theta).per_sample.sum().backward()
    return theta.grad


def sigmas(values):
    """How many standard errors the mean of independent values is away from 0."""
    return float(values.mean().abs() / (values.std() / len(values) ** 0.5))
