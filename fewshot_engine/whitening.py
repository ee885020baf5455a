"""Whitening in closed form, by what photos of one class differ in: within-class covariance normalisation.

Hatch, Kajarekar and Stolcke 2006, with a shrinkage, and with a damping of the one direction that tells kinds of classes
apart. What the numbers of a `Choice` are is decided in `cross_validation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 512  # of the scatter that the whitening keeps: all of them gain no more, 256 lose a tenth of a point
FITTED_PHOTOS = 1500  # about, evenly over the classes: more cost seconds, for the scatter hardly changes


@dataclass(frozen=True)
class Choice:
    """What cross-validation decides.

    Attributes:
        shrinkage: of the scatter, in units of its mean eigenvalue.
        damping: of the one direction in which the class means differ most, 0 to 1. It tells kinds of classes apart, as
            fruit from packages; new classes that come together share their place on it and differ elsewhere.
        share: of the adapted half, beside the frozen one.
    """

    shrinkage: float
    damping: float
    share: float


@dataclass(frozen=True, eq=False)
class Whitening:
    """z -> w = z + z A stretch A', then w - damping (w u) u: what photos of one class differ in, made small.

    Attributes:
        centre: (dim,), taken off first.
        axes: (dim, r), orthonormal: A.
        stretch: (r,), above -1 and at most 0.
        broad: (dim,), of length 1: u.
    """

    centre: Tensor
    axes: Tensor
    stretch: Tensor
    broad: Tensor
    damping: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        z = embeddings - self.centre
        z = z + (z @ self.axes * self.stretch) @ self.axes.mT
        return z - self.damping * torch.outer(z @ self.broad, self.broad)

    def core(self, basis: Tensor) -> Tensor:
        """(r, r): C, with z + z B C B' the same; the orthonormal basis B, (dim, r), spans the axes and u."""
        axes, broad = basis.mT @ self.axes, basis.mT @ self.broad
        stretched = (axes * self.stretch) @ axes.mT
        return stretched - self.damping * torch.outer(broad + stretched @ broad, broad)


@dataclass(frozen=True, eq=False)
class Scatter:
    """How photos of one class differ: the within-class scatter S of the base classes by its principal axes.

    Attributes:
        centre: (dim,), the mean of the class means.
        offsets: (n_classes, dim), the class means from there.
        axes: (dim, r), orthonormal, by ascending eigenvalue.
        values: (r,), the eigenvalues.
        mean_value: of all dim eigenvalues, the zeros included.
    """

    centre: Tensor
    offsets: Tensor
    axes: Tensor
    values: Tensor
    mean_value: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor) -> Scatter:
        """From (n, dim) L2-normalised embeddings and (n,) class indices; classes count alike, whatever their size."""
        _, index = torch.unique(labels, return_inverse=True)
        sizes = torch.bincount(index).to(embeddings.dtype)
        means = class_means(embeddings, index)
        residuals = (embeddings - means[index]) / (sizes[index, None] * len(sizes)).sqrt()
        axes, values = principal_axes(residuals, AXES)
        mean_value = (residuals.square().sum() / embeddings.shape[1]).clamp(min=1e-12)
        centre = means.mean(dim=0)
        return cls(centre, means - centre, axes, values, mean_value)

    def whitening(self, choice: Choice) -> Whitening:
        """By (s m)^(1/2) (S + s m)^(-1/2), m the mean value and s the shrinkage: what never differs stays as it is."""
        shrunk = choice.shrinkage * self.mean_value
        stretch = (shrunk / (self.values + shrunk)).sqrt() - 1
        whitened = self.offsets + (self.offsets @ self.axes * stretch) @ self.axes.mT
        broad = principal_axes(whitened, 1)[0]  # none where there is one class
        broad = broad.flatten() if broad.numel() else torch.zeros_like(self.centre)
        return Whitening(self.centre, self.axes, stretch, broad, choice.damping)


def fitted_scatter(embeddings: Tensor, labels: Tensor, seed: int) -> Scatter:
    """The scatter of FITTED_PHOTOS at most."""
    kept = thinned_evenly(labels, FITTED_PHOTOS, seed)
    return Scatter.of(embeddings[kept], labels[kept])


def thinned_evenly(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Rows of about `limit` photos at most, ascending: all of them, or at random as many of each class as still fit."""
    if len(labels) <= limit:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.sort(labels[order], stable=True).indices]  # class by class, each in random order
    sizes = torch.unique(labels, return_counts=True)[1]
    place = torch.cat([torch.arange(int(size)) for size in sizes])  # of each photo within its class
    each = 1
    while int(sizes.clamp(max=each + 1).sum()) <= limit:
        each += 1
    return order[place < each].sort().values


def principal_axes(rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors (dim, r) of rows' @ rows with the `most` largest eigenvalues (r,), by the smaller product.

    Those below a millionth of the largest are left out: single precision knows nothing of them.
    """
    small = len(rows) < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.mT if small else rows.mT @ rows)
    kept = values > 1e-6 * values[-1].clamp(min=1e-12)
    kept[:-most] = False
    values, vectors = values[kept], vectors[:, kept]
    return (rows.mT @ (vectors / values.sqrt()) if small else vectors), values


def class_means(embeddings: Tensor, index: Tensor) -> Tensor:
    """(n_classes, dim) from (n, dim) and (n,) in [0, n_classes), none of them empty."""
    sizes = torch.bincount(index).to(embeddings.dtype)
    sums = embeddings.new_zeros(len(sizes), embeddings.shape[1]).index_add_(0, index, embeddings)
    return sums / sizes[:, None]
