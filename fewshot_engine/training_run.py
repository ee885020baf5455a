"""A training run at one moment: what it learns from, what it is examined on, what it has learned, and how to keep it.

`training` drives it. Its learner is an `adaptation.Adapter` or a `networks.Network`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot_engine import checkpoints
from fewshot_engine.adaptation import Adapter
from fewshot_engine.config import ENGINE_VERSION, TrainConfig
from fewshot_engine.datasets import TrainData, split_for
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import CheckpointError, ConfigError, TrainingDiverged
from fewshot_engine.evaluation import Score
from fewshot_engine.exams import Exam, labels_of, plan_for, with_turns
from fewshot_engine.losses import FIRST_SCALE, prototypical_loss
from fewshot_engine.networks import Network
from fewshot_engine.optimisers import Average, Optimiser, rate_share
from fewshot_engine.pretraining import Pretraining
from fewshot_engine.recipes import load_model, save_model
from fewshot_engine.reports import Evaluated, Finished, Saved, Started
from fewshot_engine.standing import Standing, verdict

DRY_EPISODES = {"adapt": 20, "full": 2}  # for the training loss before there is any training

T = TypeVar("T")


class Learner(Protocol):
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


class Run:
    """Everything that a run is at one moment; `save` and `restore` keep all of it."""

    def __init__(self, config: TrainConfig, data: TrainData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.fingerprint = data.fingerprint()
        self.split = data.split or split_for(data.counts(), config)
        turns = 4 if config.rotations_as_classes else 1
        self.plan = plan_for(data, self.split.base, config.largest_episode, turns)
        repeats_base = self.split.optimistic or bool(set(self.split.base) & set(self.split.validation))
        self.validation = Exam(config, data, self.split.validation, repeats_base=repeats_base)
        self.test = Exam(config, data, self.split.test, name="test", seed=1) if self.split.test else None
        base = labels_of(data, self.split.base)
        labels, groups = with_turns(base, data.groups, len(data.classes), turns)
        self.sampler = EpisodeSampler(
            labels,
            episode=self.plan,
            generator=torch.Generator().manual_seed(config.seed),
            weights=np.bincount(labels[labels >= 0]).clip(min=1) if config.class_weights == "size" else None,
            groups=groups,
        )
        self.network: Network | None = None
        self.pretraining: Pretraining | None = None
        self.learner: Learner
        if config.kind == "adapt":
            test_photos = self.test.photos if self.test else torch.zeros(0, dtype=torch.long)
            self.learner = Adapter(config, data, base, self.validation.photos, test_photos, device)
        else:
            self.learner = self.network = Network(config, data, device)
            if config.pretrain_epochs:
                self.pretraining = Pretraining(config, self.network, labels, device)
        self.log_scale = torch.tensor(math.log(FIRST_SCALE), device=device, requires_grad=True)
        self.parameters = [*self.learner.parameters(), self.log_scale]
        self.optimiser = Optimiser(config, self.parameters)
        statistics = self.network.statistics() if self.network else []
        averaged = [*self.learner.parameters(), *statistics]
        self.average = Average(averaged, config.ema_decay) if config.ema_decay else None
        self.init_from: dict[str, Any] | None = None  # card of the model that the run started from
        self.episode = 0
        # Loss and accuracy, each times its weight, and the weights: since the last report
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.since_evaluation = torch.zeros_like(self.sums)
        self.standing = Standing(config)
        self.baseline_accuracies: NDArray[np.float64] = np.zeros(0)
        self.test_baseline_accuracies: NDArray[np.float64] = np.zeros(0)
        self._plan_next_evaluation()

    @property
    def epoch(self) -> int:
        """Epochs begun, from 1; 0 before the first episode."""
        return math.ceil(self.episode / self.config.episodes_per_epoch)

    @property
    def is_over(self) -> bool:
        return self.episode >= self.config.total_episodes or self.standing.has_stalled

    @property
    def baseline(self) -> Score:
        return self.validation.score(self.baseline_accuracies)

    def begin_from(self, path: Path) -> None:
        tensors, card = load_model(path)
        if self.network is None:
            raise ConfigError("adapt finds its start in closed form; only full starts from a finished model")
        self.network.begin_from(tensors, card)
        self.init_from = {name: card.get(name) for name in ("backbone", "fingerprint", "base_classes", "best")}
        if self.average is not None:
            self.average.start_over()

    def started(self, *, resumed: bool) -> Started:
        if not resumed:
            self.baseline_accuracies = self._within_memory(
                lambda: self.validation.accuracies(self.learner.embed_frozen)
            )
            if self.test is not None:
                exam = self.test
                self.test_baseline_accuracies = self._within_memory(lambda: exam.accuracies(self.learner.embed_frozen))
        names = self.data.classes
        return Started(
            plan=self.plan,
            base_classes=tuple(names[index] for index in self.split.base),
            validation_classes=tuple(names[index] for index in self.split.validation),
            test_classes=tuple(names[index] for index in self.split.test),
            chance=self.validation.plan.chance,
            baseline=self.baseline,
            resumed_at=self.episode if resumed else 0,
            notes=(
                *self.split.notes,
                *self.plan.notes,
                *self.validation.notes,
                *(self.test.notes if self.test else ()),
                *self._course_notes(),
            ),
        )

    def pretrain_step(self) -> None:
        assert self.pretraining is not None
        loss, accuracy, photos = self._within_memory(self.pretraining.step)
        self.sums += torch.stack([loss, accuracy, torch.ones_like(accuracy)]).double() * photos
        if self.average is not None:  # it is of the episodes' steps
            self.average.start_over()

    def step(self) -> None:
        """One step of the optimiser over the next few episodes, never beyond an epoch or the next evaluation."""
        config = self.config
        left = config.episodes_per_epoch - self.episode % config.episodes_per_epoch
        count = min(config.episodes_per_step, left, self.evaluate_at - self.episode)
        way, shot = self._shape()
        photos = self.sampler.sample(count, way=way, shot=shot).indices().flatten(1)  # (b, way * (shot + query))
        loss, accuracy, gradients = self._within_memory(lambda: self._gradients(photos, way, shot))
        self.optimiser.step(gradients, rate_share(config, self.episode, drops=self.standing.rate_drops))
        if self.average is not None:
            self.average.update()
        means = torch.stack([loss.detach(), accuracy, torch.ones_like(accuracy)]).double()
        self.sums += means * count
        self.since_evaluation += means * count
        self.episode += count

    def evaluate(self) -> Evaluated:
        self._check_finite()
        with self.average.in_place() if self.average is not None else nullcontext():
            if self.network is not None and self._is_untouched:  # what the run starts with is the baseline
                accuracies = self.baseline_accuracies
            else:
                accuracies = self._within_memory(lambda: self.validation.accuracies(self.learner.embed_trained))
            score = self.validation.score(accuracies)
            is_best = self.standing.take(score, accuracies, episode=self.episode, state=self.learner.state)
        self._plan_next_evaluation()
        loss_sum, _, count = self.since_evaluation.tolist()
        self.since_evaluation.zero_()
        loss = loss_sum / count if count else self._dry_loss()
        return Evaluated(self.epoch, self.episode, loss, score, is_best)

    def taken_sums(self) -> tuple[float, float, float]:
        """Mean loss and accuracy since this was last asked, and their weight: episodes, or photos in pretraining."""
        loss, accuracy, weight = self.sums.tolist()
        if not math.isfinite(loss):
            self._check_finite()
        self.sums.zero_()
        return loss / weight, accuracy / weight, weight

    def save(self, path: Path) -> Saved:
        self._check_finite()
        tensors = {
            "sampler": self.sampler.state(),
            "augmentation": self.learner.generator.get_state(),
            "log_scale": self.log_scale,
            "sums": self.sums,
            "since_evaluation": self.since_evaluation,
            "baseline_accuracies": torch.from_numpy(self.baseline_accuracies),
            "test_baseline_accuracies": torch.from_numpy(self.test_baseline_accuracies),
            "best_accuracies": torch.from_numpy(self.standing.accuracies),
            **_above("learner.", self.learner.state()),
            **_above("best.", self.standing.state),
            **_above("optimiser.", self.optimiser.state()),
            **_above("average.", self.average.state() if self.average else {}),
            **_above("pretraining.", self.pretraining.state() if self.pretraining else {}),
        }
        meta = {
            **self._description(),
            **self.standing.counters(),
            "episode": self.episode,
            "epoch": self.epoch,
            "best": asdict(self.standing.best) if self.standing.best else None,
            "at_once": self.network.at_once if self.network else None,
        }
        checkpoints.save(path, {name: _to_numpy(tensor) for name, tensor in tensors.items()}, meta)
        return Saved(path, self.episode)

    def restore(self, path: Path) -> None:
        arrays, meta = checkpoints.load(path)
        self._check_same_run(path, meta)
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self.learner.restore(_below("learner.", tensors))
            best_state = {name: tensor.to(self.device) for name, tensor in _below("best.", tensors).items()}
            best = Score(**meta["best"]) if meta["best"] else None
            self.standing.restore(best, arrays["best_accuracies"], best_state, meta)
            self.optimiser.restore(_below("optimiser.", tensors))
            if self.average is not None:
                self.average.restore(_below("average.", tensors))
            if self.pretraining is not None:
                self.pretraining.restore(_below("pretraining.", tensors))
            if self.network is not None:
                self.network.at_once = meta["at_once"]
            with torch.no_grad():
                for name in ("log_scale", "sums", "since_evaluation"):
                    getattr(self, name).copy_(tensors[name])
            self.sampler.restore(tensors["sampler"])
            self.learner.generator.set_state(tensors["augmentation"])
            self.baseline_accuracies = arrays["baseline_accuracies"]
            self.test_baseline_accuracies = arrays["test_baseline_accuracies"]
            self.episode = int(meta["episode"])
            self.init_from = meta["init_from"]
            self._plan_next_evaluation()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path.name} does not fit this run: {error}") from error

    def finish(self, model: Path) -> Finished:
        """Measure the best model on the test classes, say what it came to, and write it to this folder."""
        best, state = self.standing.best, self.standing.state
        assert best is not None  # the last episode is always evaluated
        recommends: Literal["trained", "frozen"] = "trained" if best.accuracy > self.baseline.accuracy else "frozen"
        best = best if self.test else replace(best, optimistic=True)
        tested, test_accuracies = None, None
        if self.test is not None:
            self.learner.restore(state)
            test_accuracies = self.test.accuracies(self.learner.embed_trained)
            tested = self.test.score(test_accuracies)
        notes = self._closing_notes(test_accuracies)
        tensors, description = self.learner.model(state)
        card = {
            **self._description(),
            **description,
            "best": asdict(best),
            "best_at": self.standing.best_at,
            "test": asdict(tested) if tested else None,
            "recommends": recommends,
            "notes": notes,
        }
        save_model(model, {name: _to_numpy(tensor) for name, tensor in tensors.items()}, card)
        return Finished(model, best, self.baseline, recommends, notes, tested, self._test_baseline())

    def _test_baseline(self) -> Score | None:
        return self.test.score(self.test_baseline_accuracies) if self.test else None

    def _course_notes(self) -> tuple[str, ...]:
        """What is unusual about the episodes, in a sentence each."""
        config, notes = self.config, []
        if config.curriculum is not None:
            notes.append(f"Curriculum, by share of the episodes: {config.curriculum}.")
        if config.vary is not None:
            notes.append(f"Each step draws {config.vary}.")
        if config.class_weights == "size":
            notes.append("Classes are drawn in proportion to their photos.")
        if config.rotations_as_classes:
            n = len(self.split.base)
            notes.append(f"{n} base classes, turned by 90, 180 and 270 degrees, count as {4 * n}.")
        memory = self.network.memory_note() if self.network else None
        return (*notes, memory) if memory else tuple(notes)

    def _closing_notes(self, test_accuracies: NDArray[np.float64] | None) -> tuple[str, ...]:
        # The same episodes before and after: a paired comparison
        if test_accuracies is None:
            gain, where = self.standing.accuracies - self.baseline_accuracies, "validation"
        else:
            gain, where = test_accuracies - self.test_baseline_accuracies, "test"
        choice = f"Best on the validation classes: {self._best_name()}."
        if test_accuracies is None:
            choice = f"{choice[:-1]}; being the best of several, its figure flatters a little."
        notes = [verdict(gain, self.validation.plan, where=where), choice]
        if self.standing.has_stalled:
            notes.append(
                f"Stopped early, after {self.episode:,} of {self.config.total_episodes:,} episodes: "
                f"{self.standing.since_best} evaluations without a better one."
            )
        memory = self.network.memory_note() if self.network else None
        return (*notes, *([memory] if memory else []), *self.split.notes)

    def _best_name(self) -> str:
        at = self.standing.best_at
        if self.network is None:
            return "the closed form" if at == 0 else f"the closed form refined by {at:,} episodes"
        return "the network before the first episode" if at == 0 else f"the network after {at:,} episodes"

    def _description(self) -> dict[str, Any]:
        test_baseline = self._test_baseline()
        return {
            "kind": self.config.kind,
            **self._identity(),
            "versions": {"engine": ENGINE_VERSION, "torch": torch.__version__},
            "init_from": self.init_from,
            "chance": self.validation.plan.chance,
            "baseline": asdict(self.baseline),
            "test_baseline": asdict(test_baseline) if test_baseline else None,
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run."""
        names = self.data.classes
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "base_classes": [names[index] for index in self.split.base],
            "validation_classes": [names[index] for index in self.split.validation],
            "test_classes": [names[index] for index in self.split.test],
        }

    def _check_same_run(self, path: Path, meta: dict[str, Any]) -> None:
        for name, value in self._identity().items():
            if meta.get(name) != value:
                raise CheckpointError(f"{path.name} is from another run: its {name.replace('_', ' ')} differ")

    def _check_finite(self) -> None:
        """Before anything is kept: a loss or a weight that is no number must not replace a good checkpoint."""
        watched = [*self.parameters, self.sums]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in watched):
            raise TrainingDiverged(
                f"the loss was no number any more by episode {self.episode:,} (learning rate "
                f"{self.config.learning_rate:g}); the last good checkpoint is kept. Try a smaller learning rate."
            )

    @property
    def _is_untouched(self) -> bool:
        return self.episode == 0 and (self.pretraining is None or self.pretraining.done == 0)

    def _shape(self) -> tuple[int, int]:
        """Ways and shots of the next step's episodes; drawn by the sampler's generator where they vary."""
        if self.config.curriculum is not None:
            stage = self.config.curriculum.at(self.episode / self.config.total_episodes)
            return stage.way, stage.shot
        if self.config.vary is not None:
            (least, most), (fewest, largest) = self.config.vary.ways, self.config.vary.shots
            generator = self.sampler.generator
            way = torch.randint(least, most + 1, (), generator=generator)
            return int(way), int(torch.randint(fewest, largest + 1, (), generator=generator))
        return self.plan.way, self.plan.shot

    def _gradients(self, photos: Tensor, way: int, shot: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        loss, accuracy = self._loss(photos, way, shot)
        return loss, accuracy, torch.autograd.grad(loss, self.parameters)

    def _loss(self, photos: Tensor, way: int, shot: int) -> tuple[Tensor, Tensor]:
        return prototypical_loss(
            self.learner.cosines(photos),
            way=way,
            shot=shot,
            scale=self.log_scale.exp(),
            label_smoothing=self.config.label_smoothing,
        )

    @torch.no_grad()
    def _dry_loss(self) -> float:
        """The loss on a few training episodes, without learning from them and without touching any generator."""
        sampler, augmentation = self.sampler.state(), self.learner.generator.get_state()
        statistics = [tensor.clone() for tensor in self.network.statistics()] if self.network else []
        way, shot = self._shape()
        photos = self.sampler.sample(DRY_EPISODES[self.config.kind], way=way, shot=shot).indices().flatten(1)
        losses = [
            float(self._within_memory(partial(self._loss, episode, way, shot))[0]) for episode in torch.split(photos, 1)
        ]
        if self.network is not None:
            torch._foreach_copy_(self.network.statistics(), statistics)
        self.sampler.restore(sampler)
        self.learner.generator.set_state(augmentation)
        return sum(losses) / len(losses)

    def _within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, in smaller portions from the moment that the device runs out of memory."""
        while True:
            before = self.learner.generator.get_state()
            try:
                result = work()
            except torch.OutOfMemoryError:
                if self.network is None or self.network.back_off() is None:
                    raise
            else:
                if self.network is not None:
                    self.network.memory_sufficed()
                return result
            # Outside of the handler, where nothing holds the failed attempt's tensors any more
            self.learner.generator.set_state(before)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _plan_next_evaluation(self) -> None:
        config = self.config
        every = config.eval_every_episodes or config.eval_every * config.episodes_per_epoch
        self.evaluate_at = min(config.total_episodes, (self.episode // every + 1) * every)


def _above(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array
