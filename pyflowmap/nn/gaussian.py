"""The exact flow map of a Gaussian: where a network starts from."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gaussian_mean_velocity", "spread"]


def spread(t: Tensor, std: Tensor) -> Tensor:
    """sd_t = sqrt((1-t)^2 + t^2 S^2), the standard deviation of x_t when the data's is S."""
    return ((1.0 - t) ** 2 + (t * std) ** 2).sqrt()


def gaussian_mean_velocity(x: Tensor, s: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """u_{s,t}(x) of the linear path to N(mean, std^2) data, elementwise; all arguments broadcast against x.

        X_{s,t}(x) = t m + (x - s m) sd_t / sd_s
        u_{s,t}(x) = m + (x - s m) (S^2 (s+t) - (2-s-t)) / (sd_s (sd_s + sd_t))

    The second line is (X - x)/(t - s) with t - s divided out by hand, so that it is the velocity at t = s, not 0/0.
    A network that adds its output to this starts from the right mean and deviation of every pixel and learns only what
    is not Gaussian: on small images that saves about half of the training.
    """
    sd_s, sd_t = spread(s, std), spread(t, std)
    return mean + (x - s * mean) * ((std * std * (s + t) - (2.0 - s - t)) / (sd_s * (sd_s + sd_t)))
