"""Episodes: which photos are support and which are query images (Vinyals et al. 2016), drawn many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot_engine.config import EpisodeConfig
from fewshot_engine.datasets import EpisodePlan, one_class_per_group
from fewshot_engine.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Episodes:
    """A batch of b episodes, as indices.

    Attributes:
        classes: (b, way), indices of the classes.
        support: (b, way, shot), indices of photos.
        query: (b, way, query), indices of photos, never one of the support's group.
    """

    classes: Tensor
    support: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def indices(self) -> Tensor:
        """(b, way, shot + query): support first."""
        return torch.cat([self.support, self.query], dim=2)


class EpisodeSampler:
    """Draws classes without replacement, then photos without replacement within each class.

    Photos of one group count as one: an episode holds at most one of them, so that a burst never has a frame in the
    support and another among the query images. A group with photos of several classes stays with one of them.

    Args:
        labels: (n,) class indices; negative ones are photos to leave alone.
        episode: way, shot and query; classes with fewer than shot + query photos are not drawn.
        generator: a CPU generator; its state is the sampler's whole state.
        weights: (n_classes,) relative chance of a class, by label; equal when None.
        groups: (n,) group numbers, or None.

    Raises:
        DataError: too few classes have shot + query photos.
    """

    def __init__(
        self,
        labels: NDArray[np.int64] | Tensor,
        *,
        episode: EpisodeConfig | EpisodePlan,
        generator: torch.Generator,
        weights: NDArray[np.float64] | Tensor | None = None,
        groups: NDArray[np.int64] | Tensor | None = None,
    ) -> None:
        self.way, self.shot, self.query = episode.way, episode.shot, episode.query
        self.generator = generator
        units = _units(np.asarray(labels), None if groups is None else np.asarray(groups))
        need = self.shot + self.query
        self.classes = torch.tensor([name for name, members in units.items() if len(members) >= need])
        if len(self.classes) < self.way:
            raise DataError(
                f"{self.way}-way needs {self.way} classes with {need} photos "
                f"({self.shot} support, {self.query} query); there are {len(self.classes)}"
            )
        self._fill_tables([units[int(name)] for name in self.classes])
        self._log_weights = self._logarithms(weights)

    def sample(self, count: int, *, way: int | None = None, shot: int | None = None) -> Episodes:
        """`count` episodes, independent of each other.

        Args:
            way, shot: for these episodes, at most what the sampler was made for; that itself where not given.
        """
        way, shot = way or self.way, shot or self.shot
        if way > self.way or shot > self.shot:
            raise ConfigError(f"{way}-way {shot}-shot of a sampler made for up to {self.way}-way {self.shot}-shot")
        rows = self._draw_classes(count, way)  # (b, way), rows of the tables
        size = self._sizes[rows]  # (b, way)
        keys = torch.rand(*rows.shape, self._first.shape[1], generator=self.generator)
        keys.masked_fill_(torch.arange(keys.shape[2]) >= size[..., None], 2.0)  # padding is never among the smallest
        chosen = keys.topk(shot + self.query, dim=2, largest=False).indices  # (b, way, shot + query)
        first = self._first[rows[..., None], chosen]
        photos = self._photos[first]
        if self._copies is not None:  # one photo of each group, at random
            copies = self._copies[rows[..., None], chosen]
            offset = (torch.rand(copies.shape, generator=self.generator) * copies).long()
            photos = self._photos[first + offset]
        return Episodes(self.classes[rows], photos[..., :shot], photos[..., shot:])

    def state(self) -> Tensor:
        """uint8; give it to `restore` and the same episodes follow."""
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def _draw_classes(self, count: int, way: int) -> Tensor:
        uniform = torch.rand(count, len(self.classes), generator=self.generator)
        if self._log_weights is None:
            return uniform.topk(way, dim=1).indices
        # Gumbel top-k: a weighted draw without replacement (Efraimidis and Spirakis 2006)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
        return (self._log_weights + gumbel).topk(way, dim=1).indices

    def _fill_tables(self, units: list[list[list[int]]]) -> None:
        """Photos in one row, a group's side by side; for each class where each group starts and its size."""
        widest = max(map(len, units))
        self._sizes = torch.tensor([len(groups) for groups in units])
        self._first = torch.zeros(len(units), widest, dtype=torch.long)
        copies = torch.ones(len(units), widest, dtype=torch.long)
        photos: list[int] = []
        for row, groups in enumerate(units):
            for column, members in enumerate(groups):
                self._first[row, column] = len(photos)
                copies[row, column] = len(members)
                photos.extend(members)
        self._photos = torch.tensor(photos)
        self._copies = copies if int(copies.max()) > 1 else None

    def _logarithms(self, weights: NDArray[np.float64] | Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        chosen = torch.as_tensor(weights, dtype=torch.float64)[self.classes]
        if not bool(((chosen > 0) & chosen.isfinite()).all()):
            raise ConfigError(
                f"class weights run from {chosen.min():g} to {chosen.max():g}: each is above 0 and finite"
            )
        return chosen.log().float()


def _units(labels: NDArray[np.int64], groups: NDArray[np.int64] | None) -> dict[int, list[list[int]]]:
    """Class -> its groups -> their photos, in the order of the photos."""
    kept = labels >= 0
    if groups is not None and kept.any():
        kept = kept.copy()
        kept[kept] = one_class_per_group(labels[kept], groups[kept])
    units: dict[int, dict[int, list[int]]] = {}
    for index in np.flatnonzero(kept):
        group = int(groups[index]) if groups is not None else int(index)
        units.setdefault(int(labels[index]), {}).setdefault(group, []).append(int(index))
    return {name: list(units[name].values()) for name in sorted(units)}
