"""*Adapt*: a linear map of a frozen backbone's embeddings, in closed form first, then refined by episodes.

The learner is what `training` drives: it gives the cosines of an episode's photos and the numbers that may change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.errors import ConfigError, DataError

SHRINKAGE = 3.0  # of the within-class scatter, in units of its mean eigenvalue (measured on grocery)
RANK = 128  # of the correction that the episodes learn on top of the closed form
TABLE_PHOTOS = 6000  # up to this many, *adapt* keeps the products of all pairs: 144 MB at most


class Adapter:
    """The map of *adapt*: z = (x - centre) @ W in closed form, then y = z + (z D) M D', with M learned from zero.

    D holds the directions in which the base classes' means differ most, so M has few numbers to learn; and every photo
    is projected on D once, before the first episode, so a step never touches the long embeddings.
    """

    starts_trained = True

    def __init__(
        self,
        config: TrainConfig,
        data: TrainData,
        base: NDArray[np.int64],
        validation: Tensor,
        test: Tensor,
        device: torch.device,
    ) -> None:
        """The photos to learn from carry their label in `base`, (n,), and all others -1.

        `validation` and `test`, (m,) indices, are photos to embed later; a choice may be made on the first alone.
        """
        if data.embeddings is None:
            raise ConfigError("adapt learns from embeddings, and none were given")
        self.backbone = config.backbone
        self.generator = torch.Generator()  # adapt augments nothing
        rows = np.unique(np.concatenate([np.flatnonzero(base >= 0), validation.numpy(), test.numpy()]))
        self.place = torch.full((len(base),), -1, dtype=torch.long)  # photo -> row of what is kept here
        self.place[torch.from_numpy(rows)] = torch.arange(len(rows))
        self.place = self.place.to(device)
        used = torch.from_numpy(np.asarray(data.embeddings[rows], dtype=np.float32))
        if not bool(torch.isfinite(used).all()):
            raise DataError("some embeddings are no numbers; compute them again")
        self.frozen = F.normalize(used, dim=1).to(device)
        labels = torch.from_numpy(base[rows]).to(device)
        self.trained_on = labels >= 0
        self.labels = labels[self.trained_on]
        self.centre, self.map = closed_form(self.frozen[self.trained_on], self.labels)
        self.directions = principal_directions(self._features()[self.trained_on], self.labels, RANK)
        self.inner = torch.zeros(self.directions.shape[1], self.directions.shape[1], device=device, requires_grad=True)
        self._project_all()

    def parameters(self) -> list[Tensor]:
        return [self.inner]

    def cosines(self, photos: Tensor) -> Tensor:
        """By multiplying out y y' = z z' + p (M + M' + M M') p', with p = z D."""
        rows = self.place[photos.to(self.place.device)]  # (b, p)
        short = self.short[rows]  # (b, p, rank)
        metric = self.inner + self.inner.mT + self.inner @ self.inner.mT
        products = self._products(rows) + torch.bmm(short @ metric, short.mT)
        shrink = products.diagonal(dim1=1, dim2=2).clamp(min=1e-12).rsqrt()  # (b, p), 1 / length
        return products * shrink[:, :, None] * shrink[:, None, :]

    def embed_frozen(self, photos: Tensor) -> Tensor:
        return self.frozen[self.place[photos.to(self.place.device)]]

    @torch.no_grad()
    def embed_trained(self, photos: Tensor) -> Tensor:
        rows = self.place[photos.to(self.place.device)]
        return self.features[rows] + self.short[rows] @ self.inner @ self.directions.mT

    def state(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("inner", "directions", "centre", "map")}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name in ("inner", "directions", "centre", "map"):
                getattr(self, name).copy_(state[name])
        self._project_all()

    def model(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        directions = state["directions"]
        whole = state["map"] + (state["map"] @ directions) @ state["inner"] @ directions.mT  # (dim, dim)
        card = {"backbone": self.backbone, "dim": len(whole), "applies": "normalise((normalise(x) - centre) @ map)"}
        return {"centre": state["centre"], "map": whole}, card

    def _features(self) -> Tensor:
        """z, scaled to a length of about 1, so that a learning rate means the same for every backbone."""
        z = (self.frozen - self.centre) @ self.map
        length: Tensor = torch.linalg.vector_norm(z[self.trained_on], dim=1).mean()
        return z / length

    def _project_all(self) -> None:
        self.features = self._features()
        self.short = self.features @ self.directions
        small = len(self.features) <= TABLE_PHOTOS
        self.table = self.features @ self.features.mT if small else None

    def _products(self, rows: Tensor) -> Tensor:
        """(b, p) -> (b, p, p), z z'; looked up where a table of all pairs is small enough to keep."""
        if self.table is not None:
            return self.table[rows[:, :, None], rows[:, None, :]]
        z = self.features[rows]
        return torch.bmm(z, z.mT)


def closed_form(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centre by the mean, whiten by the within-class scatter S shrunk by its mean eigenvalue: (S + 3 m I)^(-1/2).

    Directions in which photos of one class differ count less; as many directions as there are classes gain from it.
    The map is scaled by sqrt(m), so that its size does not depend on the embeddings'.

    Args:
        embeddings: (n, dim), L2-normalised, of the base classes.
        labels: (n,) class indices.

    Returns:
        The centre (dim,) and the map (dim, dim), symmetric: an embedding x becomes (x - centre) @ map.
    """
    x = embeddings.double()
    _, index = torch.unique(labels, return_inverse=True)
    sizes = torch.bincount(index).double()
    residuals = (x - class_means(x, index)[index]) / sizes[
        index, None
    ].sqrt()  # classes count alike, whatever their size
    residuals /= len(sizes) ** 0.5  # S = residuals' @ residuals
    mean_eigenvalue = (residuals.square().sum() / x.shape[1]).clamp(min=1e-12)
    values, vectors = _principal_axes(residuals)
    rest = SHRINKAGE**-0.5  # what the stretch is where the scatter is zero
    stretch = (mean_eigenvalue / (values + SHRINKAGE * mean_eigenvalue)).sqrt() - rest
    whole = (vectors * stretch) @ vectors.T + rest * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return x.mean(dim=0).float(), whole.float()


def _principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,) above zero of rows' @ rows and their eigenvectors (dim, r), by way of the smaller product."""
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return values.clamp(min=0), vectors
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > 1e-10 * values[-1].clamp(min=1e-12)
    values = values[kept]
    return values, rows.T @ (vectors[:, kept] / values.sqrt())


def principal_directions(embeddings: Tensor, labels: Tensor, rank: int) -> Tensor:
    """(dim, r), orthonormal: where the class means differ most; r is `rank`, or less when there are few classes."""
    _, index = torch.unique(labels, return_inverse=True)
    means = class_means(embeddings.double(), index)
    _, values, directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
    kept: Tensor = directions[: max(1, min(rank, int((values > 1e-9 * values[0]).sum())))]
    return kept.mT.float().contiguous()


def class_means(embeddings: Tensor, index: Tensor) -> Tensor:
    """(n_classes, dim) from (n, dim) and (n,) in [0, n_classes), none of them empty."""
    sizes = torch.bincount(index).to(embeddings.dtype)
    sums = embeddings.new_zeros(len(sizes), embeddings.shape[1]).index_add_(0, index, embeddings)
    return sums / sizes[:, None]
