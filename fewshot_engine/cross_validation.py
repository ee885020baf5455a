"""What *adapt* decides by leaving base classes out: how to whiten, how much of it to use, which photos are familiar.

Validation and test classes are not looked at, so that figures made on them say what new classes will find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.episodes import Episodes, EpisodeSampler
from fewshot_engine.whitening import Choice, Scatter, class_means, fitted_scatter, principal_axes, thinned_evenly

SHRINKAGES = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the within-class scatter, in units of its mean eigenvalue
DAMPINGS = (0.0, 0.25, 0.5)  # of the direction in which the class means differ most
SHARES = (1.0, 0.75, 0.5)  # of the adapted half, beside the frozen one
FALLBACK = Choice(shrinkage=3.0, damping=0.0, share=0.5)  # where there are too few classes to leave any out
FOLDS = 4  # of the base classes
EXAM_PHOTOS = 1000  # of a fold of classes, at most, that a choice is judged by
CHOICE_WAY, CHOICE_SHOTS, CHOICE_QUERY, CHOICE_EPISODES = 5, (1, 5), 10, 500  # of the episodes that a choice is made by
UNFAMILIAR_SHARE = 0.03  # of the base photos, their fold of classes left out, are farther off than `familiar_from`


@dataclass(frozen=True, eq=False)
class Fold:
    """Base classes that are left out together: `rows`, (m,), are their photos, `scatter` is that of the others."""

    rows: Tensor
    scatter: Scatter


def leave_classes_out(embeddings: Tensor, labels: Tensor, seed: int) -> list[Fold]:
    """Each class is in one fold; there is none where classes are too few to leave two of them out and keep two."""
    _, index = torch.unique(labels, return_inverse=True)
    fold_of = folds_of_kin(class_means(embeddings, index))[index]  # (n,)
    if int(fold_of.max()) == 0:
        return []
    parts = [(fold_of == number, fold_of != number) for number in range(int(fold_of.max()) + 1)]
    return [
        Fold(torch.nonzero(out).flatten(), fitted_scatter(embeddings[kept], labels[kept], seed)) for out, kept in parts
    ]


def folds_of_kin(means: Tensor) -> Tensor:
    """(n_classes,): FOLDS folds of about equal size, alike classes together, as new classes of one kind come together.

    Halves along the direction in which the class means, (n_classes, dim), differ most, then halves of these; a part of
    fewer than four classes stays whole.
    """
    parts = [torch.arange(len(means))]
    while len(parts) < FOLDS and max(map(len, parts)) >= 4:
        largest = parts.pop(max(range(len(parts)), key=lambda n: len(parts[n])))
        offsets = means[largest] - means[largest].mean(dim=0)
        order = largest[(offsets @ principal_axes(offsets, 1)[0]).flatten().argsort(stable=True)]
        parts += [order[: len(order) // 2], order[len(order) // 2 :]]
    folds = torch.empty(len(means), dtype=torch.long)
    for number, part in enumerate(parts):
        folds[part] = number
    return folds


def choose(
    folds: list[Fold], embeddings: Tensor, labels: Tensor, groups: NDArray[np.int64] | None, seed: int
) -> Choice:
    """The shrinkage, then the damping, then the share that tell left-out classes apart best, at 1 shot and 5 alike."""
    exams = [exam for fold in folds for exam in _exams(fold, embeddings, labels, groups, seed)]
    if not exams:
        return FALLBACK

    def accuracy(choice: Choice) -> float:
        return sum(exam.accuracy(choice) for exam in exams)

    choice = max((Choice(shrinkage, 0.0, 1.0) for shrinkage in SHRINKAGES), key=accuracy)
    choice = max((replace(choice, damping=damping) for damping in DAMPINGS), key=accuracy)
    return max((replace(choice, share=share) for share in SHARES), key=accuracy)


def familiar(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Class means of length 1, (n_classes, dim), and from which mean cosine to the nearest one photos are familiar.

    That is what nearly all base photos reach without the classes of their own fold: new classes of the same kind come
    about as near. By the nearest class, not by one centre, which is near to nothing when a collection holds two kinds.
    """
    _, index = torch.unique(labels, return_inverse=True)
    means = F.normalize(class_means(embeddings, index), dim=1)
    cosines = embeddings @ means.mT
    folds = folds_of_kin(means)
    if int(folds.max()) > 0:
        cosines[folds[index][:, None] == folds] = -1
    return means, float(torch.quantile(cosines.amax(dim=1), UNFAMILIAR_SHARE))


@dataclass(frozen=True, eq=False)
class _Exam:
    """Episodes of classes that a scatter does not know, by the products of their photos alone.

    Attributes:
        embeddings: (m, dim), L2-normalised, which the episodes' indices are rows of.
        frozen: (m, m), their products.
        centred: (m, m), those of the centred ones.
        along: (m, r), the centred ones along the axes of the scatter.
    """

    scatter: Scatter
    embeddings: Tensor
    frozen: Tensor
    centred: Tensor
    along: Tensor
    episodes: Episodes

    def accuracy(self, choice: Choice) -> float:
        whitening = self.scatter.whitening(choice)
        products = self.centred + (self.along * (2 * whitening.stretch + whitening.stretch.square())) @ self.along.mT
        if choice.damping:
            broad = replace(whitening, damping=0.0)(self.embeddings) @ whitening.broad
            products -= (1 - (1 - choice.damping) ** 2) * torch.outer(broad, broad)
        lengths = products.diagonal().clamp(min=1e-12).sqrt()
        adapted = products / (lengths[:, None] * lengths)
        return accuracy_by_products((1 - choice.share) * self.frozen + choice.share * adapted, self.episodes)


def _exams(
    fold: Fold, embeddings: Tensor, labels: Tensor, groups: NDArray[np.int64] | None, seed: int
) -> Iterator[_Exam]:
    scatter, rows = fold.scatter, fold.rows[thinned_evenly(labels[fold.rows], EXAM_PHOTOS, seed)]
    x, own_labels = embeddings[rows], labels[rows]
    own_groups = None if groups is None else groups[rows.numpy()]
    sizes = torch.tensor([len(np.unique(photos)) for photos in _groups_of_classes(own_labels, own_groups)])
    z = x - scatter.centre
    frozen, centred, along = x @ x.mT, z @ z.mT, z @ scatter.axes
    for shot in CHOICE_SHOTS:
        large = sizes[sizes > shot]
        if len(large) < 2:
            continue
        plan = EpisodePlan(min(CHOICE_WAY, len(large)), shot, min(CHOICE_QUERY, int(large.min()) - shot))
        generator = torch.Generator().manual_seed(seed)
        sampler = EpisodeSampler(own_labels, episode=plan, generator=generator, groups=own_groups)
        yield _Exam(scatter, x, frozen, centred, along, sampler.sample(CHOICE_EPISODES))


def _groups_of_classes(labels: Tensor, groups: NDArray[np.int64] | None) -> Iterator[NDArray[np.int64]]:
    """For each class its photos' groups; each photo is one of its own where there are none."""
    units = np.arange(len(labels)) if groups is None else groups
    for label in torch.unique(labels):
        yield units[(labels == label).numpy()]


def accuracy_by_products(products: Tensor, episodes: Episodes) -> float:
    """Share of query images whose nearest prototype by cosine is that of their class.

    Args:
        products: (n, n) of embeddings of length 1, which the episodes' indices are rows of.
    """
    support, query = episodes.support, episodes.query.flatten(1)  # (b, way, shot), (b, way * query)
    way, shot = support.shape[1:]
    scores = products[query[:, :, None], support.flatten(1)[:, None, :]]  # (b, way * query, way * shot)
    scores = scores.view(*query.shape, way, shot).mean(dim=3)
    lengths = products[support[..., :, None], support[..., None, :]].mean(dim=(2, 3)).clamp(min=1e-12).sqrt()
    predicted = (scores / lengths[:, None, :]).argmax(dim=2)  # (b, way * query)
    truth = torch.arange(way).repeat_interleave(episodes.query.shape[2])
    return float((predicted == truth).double().mean())
