"""Meta-training of prototypical networks (Snell et al. 2017): one episodic loop over two kinds of input.

*adapt* keeps the backbone frozen and learns a linear map of its embeddings: in closed form first, then by episodes.
*full* learns the backbone from pixels. The caller iterates over reports and stops by not iterating any further.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewshot_engine import checkpoints
from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import ENGINE_VERSION, EpisodeConfig, TrainConfig
from fewshot_engine.datasets import (
    ClassSplit,
    EpisodePlan,
    check_episode,
    check_labels,
    count_photos,
    one_class_per_group,
    split_for,
)
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from fewshot_engine.evaluation import Score, episode_accuracies
from fewshot_engine.recipes import save_model

Pixels = NDArray[np.uint8] | Callable[[NDArray[np.int64]], NDArray[np.uint8]]

CHECKPOINT_EVERY_S = 60.0
REPORT_EVERY_S = 0.25
SHRINKAGE = 3.0  # of the within-class scatter, in units of its mean eigenvalue (measured on grocery)
RANK = 128  # of the correction that the episodes learn on top of the closed form
TABLE_PHOTOS = 6000  # up to this many, *adapt* keeps the products of all pairs: 144 MB at most
FIRST_SCALE = 10.0  # of the cosines before the softmax; learned from there
EVALUATION_PHOTOS = 100  # a class at most: more photos of a class cost time and hardly narrow the interval
EVALUATION_SEED = 1_000_003  # keeps the episodes of evaluation apart from those of training


@dataclass(frozen=True, eq=False)
class TrainData:
    """What a run learns from.

    Attributes:
        classes: class names.
        labels: (n,) int64, indices into `classes`.
        groups: (n,) or None; see `LabelledImages`.
        embeddings: (n, dim) float32 of the frozen backbone, for *adapt*; may be a memory map.
        pixels: for *full*: (n, s, s, 3) uint8, may be a memory map; or a function from (m,) indices to (m, s, s, 3).
        split: base and validation classes; drawn from the configuration's seed when None.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None
    embeddings: NDArray[np.float32] | None = None
    pixels: Pixels | None = None
    split: ClassSplit | None = None

    def __post_init__(self) -> None:
        check_labels(self.classes, self.labels, self.groups)
        for name, rows in (("embeddings", self.embeddings), ("pixels", self.pixels)):
            if rows is not None and not callable(rows) and len(rows) != len(self.labels):
                raise ConfigError(f"{len(rows)} rows of {name} for {len(self.labels)} labels: each photo has one row")
        if self.embeddings is not None and self.embeddings.ndim != 2:
            raise ConfigError(f"embeddings are of shape {self.embeddings.shape}: they are (n, dim)")

    def counts(self) -> dict[str, int]:
        """Class name -> photos that an episode can tell apart."""
        return count_photos(self.classes, self.labels, self.groups)

    def fingerprint(self) -> str:
        """Says whether two runs learn from the same data: names, labels, groups and a sample of the rows."""
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(b"" if self.groups is None else np.ascontiguousarray(self.groups).tobytes())
        sample = np.unique(np.linspace(0, len(self.labels) - 1, num=64, dtype=np.int64))
        for rows in (self.embeddings, self.pixels):
            if rows is not None:
                digest.update(np.ascontiguousarray(rows(sample) if callable(rows) else rows[sample]).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Started:
    """The first report. `baseline` is the backbone before any training, on the episodes that every score uses."""

    plan: EpisodePlan
    base_classes: tuple[str, ...]
    validation_classes: tuple[str, ...]
    chance: float
    baseline: Score
    resumed_at: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """At most four a second; loss and accuracy are means over the training episodes since the last one."""

    epoch: int
    episode: int
    loss: float
    accuracy: float
    episodes_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """Accuracy on the validation classes; `loss` is the mean training loss since the evaluation before.

    Epoch 0 is what *adapt* has from its closed form, before the first episode.
    """

    epoch: int
    episode: int
    loss: float
    score: Score
    best: bool


@dataclass(frozen=True)
class Saved:
    """From this checkpoint the run goes on exactly as if it had not been stopped."""

    path: Path
    episode: int


@dataclass(frozen=True)
class Finished:
    """`model` is a folder that `recipes.load_model` reads; `recommends` frozen where training did not help."""

    model: Path
    best: Score
    baseline: Score
    recommends: Literal["trained", "frozen"]
    notes: tuple[str, ...]


Report = Started | Step | Evaluated | Saved | Finished


def meta_train(
    config: TrainConfig,
    data: TrainData,
    *,
    checkpoint: Path,
    resume: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    save_now: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Report]:
    """Train, reporting as it goes; closing the iterator stops the run, its last checkpoint stays.

    Args:
        checkpoint: a file, replaced in one step at each evaluation and at least every minute. The finished model is a
            folder beside it, of the same name with "-model" for its suffix.
        resume: a checkpoint of the same configuration and data to go on from.
        device: "cpu", "cuda", …; for *full* a GPU where there is one, for *adapt* the CPU.
        threads: of torch on the CPU, while this runs. *Adapt* takes one unless told: its steps are too small to share,
            and on busy cores two threads that wait for each other were ten times slower than one.
        save_now: asked after each step; a checkpoint is written at once when it says so, for a caller about to leave.
        clock: monotonic seconds.

    Raises:
        ConfigError, DataError: at the first step, before any work, with the numbers.
        CheckpointError: `resume` is damaged or of another run; or a checkpoint cannot be written.
        TrainingDiverged: the loss is no number; the last checkpoint is from before.
    """
    checkpoint = Path(checkpoint)
    with _limited_threads(threads or (1 if config.kind == "adapt" else None)):
        run = _Run(config, data, _chosen_device(config, device))
        if resume is not None:
            run.restore(Path(resume))
        yield run.started(resumed=resume is not None)
        yield from _episodes(run, checkpoint, save_now, clock)
        yield run.finish(checkpoint.with_name(checkpoint.stem + "-model"))


def _episodes(
    run: _Run, checkpoint: Path, save_now: Callable[[], bool], clock: Callable[[], float]
) -> Iterator[Report]:
    """The loop: a step, now and then a report, an evaluation, a checkpoint."""
    config = run.config
    pace = _Pace(run, clock)
    saved_at = clock()
    if run.learner.starts_trained and run.best is None:
        yield run.evaluate()
        yield run.save(checkpoint)
        pace.pause_over()
    while run.episode < config.total_episodes:
        run.step()
        at_epoch_end = run.episode % config.episodes_per_epoch == 0
        finished = run.episode == config.total_episodes
        evaluate = finished or (at_epoch_end and run.epoch % config.eval_every == 0)
        if pace.is_due() or evaluate:
            yield pace.report()
        if evaluate:
            yield run.evaluate()
        if evaluate or clock() - saved_at >= CHECKPOINT_EVERY_S or save_now():
            yield run.save(checkpoint)
            saved_at = clock()
            pace.pause_over()


class _Learner(Protocol):
    """What the loop trains. Photos are given as indices into the data."""

    starts_trained: bool  # worth an evaluation before the first episode

    def parameters(self) -> list[Tensor]: ...
    def cosines(self, photos: Tensor) -> Tensor:
        """(b, p) -> (b, p, p): between the photos of an episode, augmented, with gradient."""
        ...

    def embed_frozen(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, dim): the backbone before any training."""
        ...

    def embed_trained(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, dim): as it is now, without augmentation or gradient."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that training changes, the augmentation's generator apart; copies."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None: ...
    def model(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and description of the finished model."""
        ...

    generator: torch.Generator  # of the augmentation


class _Run:
    """Everything that a run is at one moment; `save` and `restore` keep all of it."""

    def __init__(self, config: TrainConfig, data: TrainData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.fingerprint = data.fingerprint()
        self.split = data.split or split_for(data.counts(), config)
        self.plan = _plan(data, self.split.base, config.episode)
        self.validation = _Validation(config, data, self.split)
        base = _labels_of(data, self.split.base)
        self.sampler = EpisodeSampler(
            base, episode=self.plan, generator=torch.Generator().manual_seed(config.seed), groups=data.groups
        )
        make = _Adapter if config.kind == "adapt" else _Network
        self.learner: _Learner = make(config, data, base, self.validation.photos, device)
        self.log_scale = torch.tensor(math.log(FIRST_SCALE), device=device, requires_grad=True)
        self.parameters = [*self.learner.parameters(), self.log_scale]
        self.optimiser = _AdamW(config, self.parameters)
        self.episode = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, accuracy, episodes: since the last Step
        self.since_evaluation = torch.zeros_like(self.sums)
        self.best: Score | None = None
        self.best_at = 0
        self.best_accuracies: NDArray[np.float64] = np.zeros(0)
        self.best_state: dict[str, Tensor] = {}
        self.baseline_accuracies: NDArray[np.float64] = np.zeros(0)

    @property
    def epoch(self) -> int:
        """Epochs begun, from 1; 0 before the first episode."""
        return math.ceil(self.episode / self.config.episodes_per_epoch)

    @property
    def baseline(self) -> Score:
        return self.validation.score(self.baseline_accuracies)

    def started(self, *, resumed: bool) -> Started:
        if not resumed:
            self.baseline_accuracies = self.validation.accuracies(self.learner.embed_frozen)
        names = self.data.classes
        return Started(
            plan=self.plan,
            base_classes=tuple(names[index] for index in self.split.base),
            validation_classes=tuple(names[index] for index in self.split.validation),
            chance=self.validation.plan.chance,
            baseline=self.baseline,
            resumed_at=self.episode if resumed else 0,
            notes=(*self.split.notes, *self.plan.notes, *self.validation.notes),
        )

    def step(self) -> None:
        """One step of the optimiser over the next few episodes, never beyond the end of an epoch."""
        config = self.config
        left = config.episodes_per_epoch - self.episode % config.episodes_per_epoch
        count = min(config.episodes_per_step, left)
        loss, accuracy = self._loss(count)
        gradients = torch.autograd.grad(loss, self.parameters)
        self.optimiser.step(gradients, _cosine(self.episode / config.total_episodes))
        means = torch.stack([loss.detach(), accuracy, torch.ones_like(accuracy)]).double()
        self.sums += means * count
        self.since_evaluation += means * count
        self.episode += count

    def evaluate(self) -> Evaluated:
        self._check_finite()
        accuracies = self.validation.accuracies(self.learner.embed_trained)
        score = self.validation.score(accuracies)
        is_best = self.best is None or score.accuracy > self.best.accuracy
        if is_best:
            self.best, self.best_at, self.best_accuracies = score, self.episode, accuracies
            self.best_state = self.learner.state()
        loss_sum, _, count = self.since_evaluation.tolist()
        self.since_evaluation.zero_()
        loss = loss_sum / count if count else self._dry_loss()
        return Evaluated(self.epoch, self.episode, loss, score, is_best)

    def save(self, path: Path) -> Saved:
        self._check_finite()
        tensors = {
            "sampler": self.sampler.state(),
            "augmentation": self.learner.generator.get_state(),
            "log_scale": self.log_scale,
            "sums": self.sums,
            "since_evaluation": self.since_evaluation,
            "baseline_accuracies": torch.from_numpy(self.baseline_accuracies),
            "best_accuracies": torch.from_numpy(self.best_accuracies),
            **{f"learner.{name}": tensor for name, tensor in self.learner.state().items()},
            **{f"best.{name}": tensor for name, tensor in self.best_state.items()},
            **self.optimiser.state(),
        }
        meta = {
            **self._description(),
            "episode": self.episode,
            "epoch": self.epoch,
            "best": asdict(self.best) if self.best else None,
            "best_at": self.best_at,
        }
        checkpoints.save(path, {name: _to_numpy(tensor) for name, tensor in tensors.items()}, meta)
        return Saved(path, self.episode)

    def restore(self, path: Path) -> None:
        arrays, meta = checkpoints.load(path)
        self._check_same_run(path, meta)
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self.learner.restore(_below("learner.", tensors))
            self.best_state = {name: tensor.to(self.device) for name, tensor in _below("best.", tensors).items()}
            self.optimiser.restore(_below("optimiser.", tensors))
            with torch.no_grad():
                for name in ("log_scale", "sums", "since_evaluation"):
                    getattr(self, name).copy_(tensors[name])
            self.sampler.restore(tensors["sampler"])
            self.learner.generator.set_state(tensors["augmentation"])
            self.baseline_accuracies = arrays["baseline_accuracies"]
            self.best_accuracies = arrays["best_accuracies"]
            self.best = Score(**meta["best"]) if meta["best"] else None
            self.episode, self.best_at = int(meta["episode"]), int(meta["best_at"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path.name} does not fit this run: {error}") from error

    def finish(self, model: Path) -> Finished:
        assert self.best is not None  # the last episode is always evaluated
        recommends: Literal["trained", "frozen"] = (
            "trained" if self.best.accuracy > self.baseline.accuracy else "frozen"
        )
        notes = self._closing_notes()
        tensors, description = self.learner.model(self.best_state)
        card = {
            **self._description(),
            **description,
            "best": asdict(self.best),
            "best_at": self.best_at,
            "recommends": recommends,
            "notes": notes,
        }
        save_model(model, {name: _to_numpy(tensor) for name, tensor in tensors.items()}, card)
        return Finished(model, self.best, self.baseline, recommends, notes)

    def _closing_notes(self) -> tuple[str, ...]:
        assert self.best is not None
        gain = self.best_accuracies - self.baseline_accuracies  # the same episodes: a paired comparison
        mean, margin = Score.of(gain, self.validation.plan).accuracy, Score.of(gain, self.validation.plan).ci95
        if mean > margin:
            verdict = f"Training gained {100 * mean:.1f} ± {100 * margin:.1f} points on the validation classes."
        elif mean > 0:
            verdict = f"The gain of {100 * mean:.1f} ± {100 * margin:.1f} points is within the noise."
        else:
            verdict = (
                f"Training gained nothing ({100 * mean:+.1f} ± {100 * margin:.1f} points): keep the frozen backbone."
            )
        if self.learner.starts_trained:
            best = "the closed form" if self.best_at == 0 else f"the closed form refined by {self.best_at:,} episodes"
        else:
            best = f"the network after {self.best_at:,} episodes"
        choice = f"Best on the validation classes: {best}; being the best of several, its figure flatters a little."
        return (verdict, choice, *self.split.notes)

    def _description(self) -> dict[str, Any]:
        names = self.data.classes
        return {
            "kind": self.config.kind,
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "versions": {"engine": ENGINE_VERSION, "torch": torch.__version__},
            "base_classes": [names[index] for index in self.split.base],
            "validation_classes": [names[index] for index in self.split.validation],
            "chance": self.validation.plan.chance,
            "baseline": asdict(self.baseline),
        }

    def _check_same_run(self, path: Path, meta: dict[str, Any]) -> None:
        wanted = self._wanted()
        for name, value in wanted.items():
            if meta.get(name) != value:
                raise CheckpointError(f"{path.name} is from another run: its {name.replace('_', ' ')} differ")

    def _wanted(self) -> dict[str, Any]:
        names = self.data.classes
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "base_classes": [names[index] for index in self.split.base],
            "validation_classes": [names[index] for index in self.split.validation],
        }

    def _check_finite(self) -> None:
        """Before anything is kept: a loss or a weight that is no number must not replace a good checkpoint."""
        watched = [*self.parameters, self.sums]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in watched):
            raise TrainingDiverged(
                f"the loss was no number any more by episode {self.episode:,} (learning rate "
                f"{self.config.learning_rate:g}); the last good checkpoint is kept. Try a smaller learning rate."
            )

    def _loss(self, count: int) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the next `count` episodes."""
        photos = self.sampler.sample(count).indices().flatten(1)  # (b, way * (shot + query))
        cosines = self.learner.cosines(photos)
        return prototypical_loss(cosines, way=self.plan.way, shot=self.plan.shot, scale=self.log_scale.exp())

    @torch.no_grad()
    def _dry_loss(self) -> float:
        """The loss on a few training episodes, without learning from them and without touching the sampler."""
        state = self.sampler.state()
        loss, _ = self._loss(20)
        self.sampler.restore(state)
        return float(loss)


def prototypical_loss(cosines: Tensor, *, way: int, shot: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the query images over `scale` times their cosines to the prototypes.

    A prototype is the mean of its class's normalised support embeddings, so both its product with a query and its own
    length follow from the cosines between photos, and the embeddings themselves are not needed. Cosine with a learned
    scale (Gidaris and Komodakis 2018) instead of the squared Euclidean distance of Snell et al. 2017, because cosine is
    what the studio answers with.

    Args:
        cosines: (b, p, p) between the p = way x (shot + query) photos of an episode, class by class, support first.
        scale: scalar, above 0.

    Returns:
        Loss and accuracy, means over all query images.
    """
    each = cosines.shape[1] // way
    by_class = cosines.view(-1, way, each, way, each)
    products = by_class[:, :, shot:, :, :shot].mean(dim=4)  # (b, way, query, way)
    lengths = (
        by_class[:, :, :shot, :, :shot].diagonal(dim1=1, dim2=3).mean(dim=(1, 2)).clamp(min=1e-8).sqrt()
    )  # (b, way)
    logits = scale * products / lengths[:, None, None]
    truth = torch.arange(way, device=logits.device).view(1, way, 1).expand(logits.shape[:3])
    accuracy = (logits.detach().argmax(dim=3) == truth).float().mean()
    return F.cross_entropy(logits.flatten(0, 2), truth.flatten()), accuracy


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


class _Adapter:
    """The map of *adapt*: z = (x - centre) @ W in closed form, then y = z + (z D) M D', with M learned from zero.

    D holds the directions in which the base classes' means differ most, so M has few numbers to learn; and every photo
    is projected on D once, before the first episode, so a step never touches the long embeddings.
    """

    starts_trained = True

    def __init__(
        self, config: TrainConfig, data: TrainData, base: NDArray[np.int64], validation: Tensor, device: torch.device
    ) -> None:
        if data.embeddings is None:
            raise ConfigError("adapt learns from embeddings, and none were given")
        self.backbone = config.backbone
        self.generator = torch.Generator()  # adapt augments nothing
        rows = np.union1d(np.flatnonzero(base >= 0), validation.numpy())
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


class _Network:
    """The backbone of *full*, from pixels: uint8 until they are on the device, where all of them stay if they fit."""

    starts_trained = False

    def __init__(
        self, config: TrainConfig, data: TrainData, base: NDArray[np.int64], validation: Tensor, device: torch.device
    ) -> None:
        if data.pixels is None:
            raise ConfigError("full learns from pixels, and none were given")
        entry = get_backbone(config.backbone)
        self.entry, self.config, self.device = entry, config, device
        self.pixels = _on_device(data.pixels, device)
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net: nn.Module = entry.build(config.image_size).to(device)
        if device.type == "cuda":
            self.net = self.net.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(entry.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(entry.std, device=device).view(3, 1, 1)

    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    def cosines(self, photos: Tensor) -> Tensor:
        self.net.train()
        if self.entry.pretrained:  # an episode's few classes would make poor statistics of batch normalisation
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        x = augment(self._pictures(photos.flatten()), self.generator, flips=self.config.flips)
        z = F.normalize(self._forward(x), dim=1).view(*photos.shape, -1)  # (b, p, dim)
        return torch.bmm(z, z.mT)

    def embed_frozen(self, photos: Tensor) -> Tensor:
        return self.embed_trained(photos)  # asked for before the first step only

    @torch.no_grad()
    def embed_trained(self, photos: Tensor) -> Tensor:
        self.net.eval()
        size = 256 if self.device.type == "cuda" else 32
        return torch.cat([self._forward(self._pictures(part)) for part in torch.split(photos, size)])

    def _pictures(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, 3, s, s) float32 in [0, 1]."""
        if callable(self.pixels):
            raw = torch.from_numpy(np.ascontiguousarray(self.pixels(photos.numpy())))
        elif isinstance(self.pixels, Tensor):
            raw = self.pixels[photos.to(self.pixels.device)]
        else:
            raw = torch.from_numpy(np.ascontiguousarray(self.pixels[photos.numpy()]))
        side = self.config.image_size
        if raw.shape[1:] != (side, side, 3) or raw.dtype != torch.uint8:
            raise ConfigError(f"pixels are {raw.dtype} {tuple(raw.shape[1:])}: they are uint8 ({side}, {side}, 3)")
        return raw.to(self.device).permute(0, 3, 1, 2).float() / 255

    def _forward(self, pictures: Tensor) -> Tensor:
        x = (pictures - self.mean) / self.std
        cuda = self.device.type == "cuda"
        x = x.contiguous(memory_format=torch.channels_last if cuda else torch.contiguous_format)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cuda):
            features: Tensor = self.net(x)
        return features.float()

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(state)

    def model(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        size = self.config.image_size
        card = {
            "backbone": self.entry.name,
            "image_size": size,
            "mean": list(self.entry.mean),
            "std": list(self.entry.std),
            "dim": self.entry.dim(size),
        }
        return state, card


def augment(pictures: Tensor, generator: torch.Generator, *, flips: bool) -> Tensor:
    """Each picture turned by up to 10°, scaled by up to 10 %, moved by up to 6 %, and mirrored half of the time.

    Small enough to change no meaning, but that mirrored letters are others: hence `flips`.

    Args:
        pictures: (n, 3, s, s) float in any range; what comes in at the border repeats its edge.
    """
    n = len(pictures)
    uniform = torch.rand(5, n, generator=generator, device=pictures.device) * 2 - 1
    angle, scale = uniform[0] * math.radians(10), 1 + 0.1 * uniform[1]
    mirror = torch.where(uniform[4] < 0, -1.0, 1.0) if flips else torch.ones_like(scale)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos * mirror, -sin, 0.12 * uniform[2], sin * mirror, cos, 0.12 * uniform[3]]  # 2 is the picture's width
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


class _AdamW:
    """AdamW (Loshchilov and Hutter 2019). torch.optim's would import the compiler: 5 s and more before the first step.

    The last parameter is the scale: a single number, so it learns faster than weights do, and nothing pulls it to zero.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, config: TrainConfig, parameters: list[Tensor]) -> None:
        decay = 5e-4 if config.kind == "full" else 0.0
        weights, scale = parameters[:-1], parameters[-1:]
        self.groups = [(weights, config.learning_rate, decay), (scale, min(10 * config.learning_rate, 1e-2), 0.0)]
        self.moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self.squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], share: float) -> None:
        """One step at `share` of the learning rate; gradients in the order of the parameters."""
        self.steps += 1
        slow, slower = self.BETAS
        torch._foreach_lerp_(self.moments, gradients, 1 - slow)
        torch._foreach_mul_(self.squares, slower)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - slower)
        first = 0
        for parameters, rate, decay in self.groups:
            part = slice(first, first + len(parameters))
            first = part.stop
            rate *= share
            if decay:
                torch._foreach_mul_(parameters, 1 - rate * decay)
            divisors = torch._foreach_sqrt(self.squares[part])
            torch._foreach_div_(divisors, (1 - slower**self.steps) ** 0.5)
            torch._foreach_add_(divisors, self.EPSILON)
            torch._foreach_addcdiv_(parameters, self.moments[part], divisors, -rate / (1 - slow**self.steps))

    def state(self) -> dict[str, Tensor]:
        both = {"moments": self.moments, "squares": self.squares}
        tensors = {f"optimiser.{name}.{i}": tensor for name, kept in both.items() for i, tensor in enumerate(kept)}
        return {**tensors, "optimiser.steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, kept in (("moments", self.moments), ("squares", self.squares)):
            for i, tensor in enumerate(kept):
                tensor.copy_(state[f"{name}.{i}"])
        self.steps = int(state["steps"])


class _Validation:
    """The episodes that every score of a run is made on: the same ones, so that scores can be compared in pairs."""

    def __init__(self, config: TrainConfig, data: TrainData, split: ClassSplit) -> None:
        labels = _thinned(_labels_of(data, split.validation), config.seed)
        counts = {data.classes[index]: 0 for index in split.validation}
        counts |= {
            name: count
            for name, count in count_photos(data.classes, *_only(labels, data.groups)).items()
            if name in counts
        }
        large = sum(count > config.episode.shot for count in counts.values())
        if large < 2:
            raise DataError(
                f"validation needs 2 classes with at least {config.episode.shot + 1} photos; it has {large} of "
                f"{len(counts)} held out"
            )
        way = min(config.episode.way, large)
        self.plan = check_episode(counts, replace(config.episode, way=way))
        self.notes = tuple(f"Validation: {note}" for note in self.plan.notes)
        self.optimistic = split.optimistic or bool(set(split.base) & set(split.validation))
        self.seed, self.episodes = config.seed + EVALUATION_SEED, config.eval_episodes
        self.photos = torch.from_numpy(np.flatnonzero(labels >= 0))
        self.labels, self.groups = _only(labels, data.groups)

    def accuracies(self, embed: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
        """(episodes,)."""
        return episode_accuracies(
            embed(self.photos), self.labels, self.plan, episodes=self.episodes, seed=self.seed, groups=self.groups
        )

    def score(self, accuracies: NDArray[np.float64]) -> Score:
        return Score.of(accuracies, self.plan, optimistic=self.optimistic)


class _Pace:
    """When the next Step is due, and what it says."""

    def __init__(self, run: _Run, clock: Callable[[], float]) -> None:
        self.run, self.clock = run, clock
        self.since, self.episode = clock(), run.episode
        self.reported_at = -math.inf
        self.rate = 0.0

    def is_due(self) -> bool:
        return self.clock() - self.reported_at >= REPORT_EVERY_S

    def report(self) -> Step:
        run, now = self.run, self.clock()
        current = (run.episode - self.episode) / max(now - self.since, 1e-9)
        self.rate = 0.7 * self.rate + 0.3 * current if self.rate else current
        self.since, self.episode, self.reported_at = now, run.episode, now
        loss, accuracy, count = run.sums.tolist()
        if not math.isfinite(loss):
            run._check_finite()
        run.sums.zero_()
        left = (run.config.total_episodes - run.episode) / max(self.rate, 1e-9)
        return Step(run.epoch, run.episode, loss / count, accuracy / count, self.rate, left)

    def pause_over(self) -> None:
        """Evaluations and checkpoints do not count as training."""
        self.since, self.episode = self.clock(), self.run.episode


def _plan(data: TrainData, classes: tuple[int, ...], episode: EpisodeConfig) -> EpisodePlan:
    counts = data.counts()
    return check_episode({data.classes[index]: counts[data.classes[index]] for index in classes}, episode)


def _labels_of(data: TrainData, classes: tuple[int, ...]) -> NDArray[np.int64]:
    """(n,): the labels of these classes' photos, -1 for all others and for what a group keeps in another class."""
    labels = np.where(np.isin(data.labels, classes), data.labels, -1)
    if data.groups is not None:
        labels[~one_class_per_group(data.labels, data.groups)] = -1
    return labels.astype(np.int64)


def _thinned(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """At most EVALUATION_PHOTOS of each class, at random; the others become -1."""
    labels = labels.copy()
    random = np.random.default_rng(seed)
    for name in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == name)
        if len(members) > EVALUATION_PHOTOS:
            labels[random.permutation(members)[EVALUATION_PHOTOS:]] = -1
    return labels


def _only(
    labels: NDArray[np.int64], groups: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    kept = labels >= 0
    return labels[kept], None if groups is None else groups[kept]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _on_device(pixels: Pixels, device: torch.device) -> Pixels | Tensor:
    """All of the photos on the GPU if they take less than a third of what is free there."""
    if device.type != "cuda" or callable(pixels):
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    return torch.tensor(np.asarray(pixels), device=device) if pixels.nbytes < free / 3 else pixels


def _chosen_device(config: TrainConfig, device: str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if config.kind == "full" and torch.cuda.is_available() else "cpu")


def _cosine(progress: float) -> float:
    """1 at the start, 0 at the end (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _limited_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
