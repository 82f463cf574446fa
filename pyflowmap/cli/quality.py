"""How good are generated digits? A classifier trained on real ones, and two distances to the real images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Classifier", "train_classifier", "frechet_distance", "sliced_wasserstein"]


class Classifier(nn.Module):
    """Three strided convolutions and 64 features: enough for 98 % on held-out digits after seconds of training."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels_in, channels, 3, stride=2, padding=1), nn.ReLU(), nn.BatchNorm2d(channels)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return (self(images).argmax(1) == labels).float().mean().item()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.body(images)


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 20, batch: int = 100, seed: int = 1) -> Classifier:
    """Train on real images only, shifted by up to two pixels; in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        steps = epochs * -(-len(images) // batch)
        optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch):
                shifted = torch.roll(images[rows], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
                loss = cross_entropy(model(shifted), labels[rows], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (N, D). Heusel et al. 2017, eq. 6.

    As FID, but on our classifier's features: compare numbers of one run, not with published FIDs.
    """
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()  # symmetric: real eigenvalues
    return float((a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2.0 * cross)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """Root mean square over random directions of the 1-D Wasserstein-2 distance. Bonneel et al. 2015.

    (N, ...) and (M, ...); quantiles are compared at the smaller count.
    """
    a, b = a.flatten(1).float(), b.flatten(1).float()
    direction = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed))
    direction = direction / direction.norm(dim=0)
    level = (torch.arange(min(len(a), len(b))) + 0.5) / min(len(a), len(b))
    quantiles = [torch.quantile(each @ direction, level, dim=0) for each in (a, b)]
    return math.sqrt((quantiles[0] - quantiles[1]).square().mean())
