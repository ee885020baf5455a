"""*Adapt*: a frozen backbone's embeddings, whitened by what photos of one class differ in, then refined by episodes.

A centre and a whitening in closed form come first (within-class covariance normalisation, Hatch et al. 2006), with what
has to be chosen for them chosen by leaving base classes out; then a correction of low rank is learned from episodes, on
embeddings that were whitened without their own class, for on those that were not there is nothing left to learn. The
learner is what `training` drives; the finished model is a `recipes.Recipe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import EpisodePlan, TrainData
from fewshot_engine.episodes import Episodes, EpisodeSampler
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.recipes import familiarity_of

SHRINKAGES = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the within-class scatter, in units of its mean eigenvalue
DAMPINGS = (0.0, 0.25, 0.5)  # of the direction in which the class means differ most
SHARES = (1.0, 0.75, 0.5)  # of the adapted half, beside the frozen one
AXES = 512  # of the scatter that the whitening keeps: all of them gain no more, 256 lose a tenth of a point
RANK = 64  # of the correction that the episodes learn; 128 gains nothing
CORRECTION_GAIN = 4.0  # scales the correction so that a learning rate of 1e-4 and a few hundred episodes suit it
FITTED_PHOTOS = 1500  # about, evenly over the classes: more cost seconds, for the scatter hardly changes
TABLE_PHOTOS = 6000  # up to this many, the products of all pairs are kept: 144 MB at most
EXAM_PHOTOS = 1000  # of a fold of classes, at most, that a choice is judged by
SHORT_PHOTOS = 1500  # up to this many, rows are brought to coordinates: beyond, that takes longer than it saves

FOLDS = 4  # of the base classes
CHOICE_WAY, CHOICE_SHOTS, CHOICE_QUERY, CHOICE_EPISODES = 5, (1, 5), 10, 500  # of the episodes that a choice is made by
UNFAMILIAR_SHARE = 0.03  # of the base photos, their fold of classes left out, are farther off than `familiar_from`


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


FALLBACK = Choice(shrinkage=3.0, damping=0.0, share=0.5)  # where there are too few classes to leave any out


@dataclass(frozen=True, eq=False)
class Fold:
    """Base classes that are left out together: `rows`, (m,), are their photos, `scatter` is that of the others."""

    rows: Tensor
    scatter: Scatter


class Adapter:
    """y = z + D M' p: z whitened, p the coordinates of the centred embedding in the directions D, M learned from zero.

    D holds the principal directions of the base photos, so M has few numbers to learn. With the part of z outside of D
    called r, the products of two photos are r r' + u u' with u = z D + p M: the first from a table, the second short. A
    step never touches the long embeddings. What is evaluated is what the finished model gives: the frozen embedding and
    y, weighted as in `recipes.Recipe`.

    Where the classes to validate with were drawn from the data, and not set apart by the caller, the finished model's
    whitening is fitted once more with them: its figures are those of the one without. Test classes are in nothing.
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

        `validation` and `test`, (m,) indices, are photos to embed later; no choice is made on either.
        """
        if data.embeddings is None:
            raise ConfigError("adapt learns from embeddings, and none were given")
        self.backbone, self.seed, self.device, self.classes = config.backbone, config.seed, device, data.classes
        self.generator = torch.Generator()  # adapt augments nothing
        learned = np.flatnonzero(base >= 0)
        examined = np.unique(np.concatenate([validation.numpy(), test.numpy()]))
        self.frozen, self.labels = _unit_rows(data.embeddings, learned), torch.from_numpy(base[learned])
        self.extra: tuple[Tensor, Tensor] | None = None  # embeddings and labels that the last fit takes in
        exam = _unit_rows(data.embeddings, examined)
        if data.split is None:
            new = np.isin(examined, validation.numpy()) & (base[examined] < 0)
            self.extra = exam[torch.from_numpy(new)], torch.from_numpy(data.labels[examined[new]])
        groups = None if data.groups is None else data.groups[learned]

        folds = leave_classes_out(self.frozen, self.labels, self.seed)
        self.choice = choose(folds, self.frozen, self.labels, groups, self.seed) if folds else FALLBACK
        self.scatter = fitted_scatter(self.frozen, self.labels, self.seed)
        centred = self.frozen - self.scatter.centre
        self.directions = fitted_directions(centred, self.labels, self.seed)
        whitening = self.scatter.whitening(self.choice)
        whitened = whitening(self.frozen)
        self.length, self.gain = _mean_length(whitened), CORRECTION_GAIN / _mean_length(centred)
        for fold in folds:
            whitened[fold.rows] = fold.scatter.whitening(self.choice)(self.frozen[fold.rows])
        self.learned = _Projected(self, self.frozen, whitened, learned, len(base))

        self.class_means, self.familiar_from = familiar(self.frozen, self.labels)
        self.examined = _Projected(self, exam, whitening(exam), examined, len(base))
        self.exam_frozen = coordinates(exam).to(device)
        self.exam_rest = coordinates(self.examined.rest()).to(device)
        self.exam_nearest = (exam @ self.class_means.mT).amax(dim=1)
        rank = self.directions.shape[1]
        self.inner = torch.zeros(rank, rank, device=device, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        return [self.inner]

    def cosines(self, photos: Tensor) -> Tensor:
        part = self.learned
        rows = part.rows(photos)  # (b, p)
        short = part.features[rows] + part.centred[rows] @ self.inner  # (b, p, rank): u
        products = part.rest_products(rows) + torch.bmm(short, short.mT)
        shrink = products.diagonal(dim1=1, dim2=2).clamp(min=1e-12).rsqrt()  # (b, p), 1 / length
        return products * shrink[:, :, None] * shrink[:, None, :]

    def embed_frozen(self, photos: Tensor) -> Tensor:
        """(m,) photos to validate or test with -> (m, k): shorter than the embeddings, with the same products."""
        return self.exam_frozen[self.examined.rows(photos)]

    @torch.no_grad()
    def embed_trained(self, photos: Tensor) -> Tensor:
        """As `embed_frozen`; the photos count as one set when it is asked how familiar they are."""
        rows = self.examined.rows(photos)
        short = self.examined.features[rows] + self.examined.centred[rows] @ self.inner
        adapted = F.normalize(torch.cat([self.exam_rest[rows], short], dim=1), dim=1)
        nearest = float(self.exam_nearest[rows.cpu()].mean())
        weight = self.choice.share * familiarity_of(nearest, self.familiar_from)
        return coordinates(torch.cat([(1 - weight) ** 0.5 * self.exam_frozen[rows], weight**0.5 * adapted], dim=1))

    def state(self) -> dict[str, Tensor]:
        return {"inner": self.inner.detach().clone(), "directions": self.directions.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The directions too, for another machine may find the same ones with other signs."""
        with torch.no_grad():
            self.inner.copy_(state["inner"])
        if not torch.equal(self.directions, state["directions"].cpu()):
            self.directions = state["directions"].cpu()
            self.learned.project(self)
            self.examined.project(self)
            self.exam_rest = coordinates(self.examined.rest()).to(self.device)

    def model(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        scatter, means, familiar_from, labels = self.scatter, self.class_means, self.familiar_from, self.labels
        if self.extra is not None and len(self.extra[1]):
            embeddings, labels = torch.cat([self.frozen, self.extra[0]]), torch.cat([self.labels, self.extra[1]])
            scatter = fitted_scatter(embeddings, labels, self.seed)
            means, familiar_from = familiar(embeddings, labels)
        whitening = scatter.whitening(self.choice)
        inner, directions = state["inner"].cpu(), state["directions"].cpu()
        spanning = torch.cat([whitening.axes, whitening.broad[:, None], directions], dim=1)
        basis = torch.linalg.qr(spanning).Q  # (dim, r)
        correction = basis.mT @ directions
        core = whitening.core(basis) + self.length * self.gain * correction @ inner @ correction.mT
        tensors = {"centre": scatter.centre, "basis": basis, "core": core, "class_means": means}
        card = {
            "backbone": self.backbone,
            "dim": 2 * len(basis),
            "applies": "[(1 - w)^(1/2) x; w^(1/2) normalise(z + z basis core basis')], z = x - centre, x of length 1",
            **asdict(self.choice),
            "familiar_from": familiar_from,
            "adapted_to": [self.classes[label] for label in torch.unique(labels)],  # in the order of the class means
        }
        return tensors, card


class _Projected:
    """Photos as the learner needs them: short coordinates in its directions, and the products of what lies outside."""

    def __init__(
        self, learner: Adapter, frozen: Tensor, whitened: Tensor, photos: NDArray[np.int64], n_photos: int
    ) -> None:
        self.frozen, self.whitened = frozen, whitened / learner.length
        place = torch.full((n_photos,), -1, dtype=torch.long)  # photo -> row
        place[torch.from_numpy(photos)] = torch.arange(len(photos))
        self.place = place.to(learner.device)
        self.project(learner)

    def project(self, learner: Adapter) -> None:
        directions, device = learner.directions, learner.device
        self.features = (self.whitened @ directions).to(device)  # (n, rank): z D
        self.centred = ((self.frozen - learner.scatter.centre) @ directions * learner.gain).to(device)  # (n, rank): p
        self.directions = directions
        self.table: Tensor | None = None

    def rows(self, photos: Tensor) -> Tensor:
        return self.place[photos.to(self.place.device)]

    def rest(self) -> Tensor:
        """(n, dim): what of the whitened embeddings lies outside of the directions."""
        outside: Tensor = self.whitened - self.features.cpu() @ self.directions.mT
        return outside

    def rest_products(self, rows: Tensor) -> Tensor:
        """(b, p) -> (b, p, p); looked up where a table of all pairs is small enough to keep."""
        if self.table is None and len(self.whitened) <= TABLE_PHOTOS:
            rest = self.rest()
            self.table = (rest @ rest.mT).to(rows.device)
        if self.table is not None:
            return self.table[rows[:, :, None], rows[:, None, :]]
        z, short = self.whitened[rows.cpu()].to(rows.device), self.features[rows]
        return torch.bmm(z, z.mT) - torch.bmm(short, short.mT)


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


def fitted_scatter(embeddings: Tensor, labels: Tensor, seed: int) -> Scatter:
    """The scatter of FITTED_PHOTOS at most."""
    kept = thinned_evenly(labels, FITTED_PHOTOS, seed)
    return Scatter.of(embeddings[kept], labels[kept])


def fitted_directions(centred: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(dim, r), orthonormal: the RANK directions in which photos differ most; fewer where there are fewer photos."""
    directions, _ = principal_axes(centred[thinned_evenly(labels, FITTED_PHOTOS, seed)], RANK)
    return directions.contiguous()


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


def coordinates(embeddings: Tensor) -> Tensor:
    """(n, dim) -> (n, k) with the same products, k at most dim: few photos need not carry long rows about."""
    if len(embeddings) >= min(embeddings.shape[1], SHORT_PHOTOS):
        return embeddings
    values, vectors = torch.linalg.eigh((embeddings @ embeddings.mT).double())
    short: Tensor = vectors * values.clamp(min=0).sqrt()
    return short.float().contiguous()


def _mean_length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1).mean()
    return length.clamp(min=1e-6)


def _unit_rows(embeddings: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
    used = torch.from_numpy(np.asarray(embeddings[rows], dtype=np.float32))
    if not bool(torch.isfinite(used).all()):
        raise DataError("some embeddings are no numbers; compute them again")
    return F.normalize(used, dim=1)
