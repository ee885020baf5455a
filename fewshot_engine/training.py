"""Meta-training of prototypical networks (Snell et al. 2017): one episodic loop over two kinds of input.

*adapt* keeps the backbone frozen and learns a linear map of its embeddings: in closed form first, then by episodes.
*full* learns the backbone from pixels. The caller iterates over reports and stops by not iterating any further.
"""

from __future__ import annotations

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
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine import checkpoints
from fewshot_engine.adaptation import Adapter
from fewshot_engine.config import ENGINE_VERSION, EpisodeConfig, TrainConfig
from fewshot_engine.datasets import (
    ClassSplit,
    EpisodePlan,
    TrainData,
    check_episode,
    count_photos,
    one_class_per_group,
    split_for,
)
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import CheckpointError, DataError, TrainingDiverged
from fewshot_engine.evaluation import Score, episode_accuracies
from fewshot_engine.networks import Network
from fewshot_engine.optimisers import AdamW
from fewshot_engine.recipes import save_model

CHECKPOINT_EVERY_S = 60.0
REPORT_EVERY_S = 0.25
FIRST_SCALE = 10.0  # of the cosines before the softmax; learned from there
EVALUATION_PHOTOS = 100  # a class at most: more photos of a class cost time and hardly narrow the interval
EVALUATION_SEED = 1_000_003  # keeps the episodes of evaluation apart from those of training


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
        make = Adapter if config.kind == "adapt" else Network
        self.learner: _Learner = make(config, data, base, self.validation.photos, device)
        self.log_scale = torch.tensor(math.log(FIRST_SCALE), device=device, requires_grad=True)
        self.parameters = [*self.learner.parameters(), self.log_scale]
        self.optimiser = AdamW(config, self.parameters)
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
