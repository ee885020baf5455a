"""*Adapt*: a frozen backbone's embeddings, whitened by what photos of one class differ in, then refined by episodes.

A centre and a `whitening` in closed form come first, with what has to be chosen for them chosen by `cross_validation`;
then a correction of low rank is learned from episodes, on embeddings that were whitened without their own class, for on
those that were not there is nothing left to learn. The learner is what `training_run` trains; the finished model is a
`recipes.Recipe`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine.config import TrainConfig
from fewshot_engine.cross_validation import FALLBACK, choose, familiar, leave_classes_out
from fewshot_engine.datasets import TrainData
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.recipes import familiarity_of
from fewshot_engine.whitening import FITTED_PHOTOS, fitted_scatter, principal_axes, thinned_evenly

RANK = 64  # of the correction that the episodes learn; 128 gains nothing
CORRECTION_GAIN = 4.0  # scales the correction so that a learning rate of 1e-4 and a few hundred episodes suit it
TABLE_PHOTOS = 6000  # up to this many, the products of all pairs are kept: 144 MB at most
SHORT_PHOTOS = 1500  # up to this many, rows are brought to coordinates: beyond, that takes longer than it saves


class Adapter:
    """y = z + D M' p: z whitened, p the coordinates of the centred embedding in the directions D, M learned from zero.

    D holds the principal directions of the base photos, so M has few numbers to learn. With the part of z outside of D
    called r, the products of two photos are r r' + u u' with u = z D + p M: the first from a table, the second short. A
    step never touches the long embeddings. What is evaluated is what the finished model gives: the frozen embedding and
    y, weighted as in `recipes.Recipe`.
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
        """The finished model: its closed form is fitted once more, with the validation classes among the base ones.

        That is honest because nothing is measured on what it took in: every figure reported, on validation and on test
        classes, is of what `embed_trained` gives, whose closed form knows the base classes alone. What was chosen and
        what the episodes learned stays as it was, so the finished model is the measured one with more classes to go by,
        and is itself measured nowhere. Test classes are in nothing, and neither are validation classes that the caller
        set apart, for they may be measured on again.
        """
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


def fitted_directions(centred: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(dim, r), orthonormal: the RANK directions in which photos differ most; fewer where there are fewer photos."""
    directions, _ = principal_axes(centred[thinned_evenly(labels, FITTED_PHOTOS, seed)], RANK)
    return directions.contiguous()


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
