"""Meta-training of prototypical networks (Snell et al. 2017): one episodic loop over two kinds of input.

*adapt* keeps the backbone frozen and learns a linear map of its embeddings: in closed form first, then by episodes.
*full* learns the backbone from pixels. The caller iterates over reports and stops by not iterating any further. This is
the loop and its clock; what is learned, measured and kept is in `training_run`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.networks import worth_compiling
from fewshot_engine.reports import Pretrained, Report, Step
from fewshot_engine.training_run import Run

CHECKPOINT_EVERY_S = 60.0
REPORT_EVERY_S = 0.25


def meta_train(
    config: TrainConfig,
    data: TrainData,
    *,
    checkpoint: Path,
    resume: Path | None = None,
    init_from: Path | None = None,
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
        init_from: the folder of a finished model, of the kind *full*, whose weights the run starts with; they are also
            what it ends with, unless something better is found.
        device: "cpu", "cuda", …; for *full* a GPU where there is one, for *adapt* the CPU.
        threads: of torch on the CPU, while this runs. *Adapt* takes one unless told: its steps are too small to share,
            and on busy cores two threads that wait for each other were ten times slower than one.
        save_now: asked after each step; a checkpoint is written at once when it says so, for a caller about to leave.
        clock: monotonic seconds.

    Raises:
        ConfigError, DataError: at the first step, before any work, with the numbers.
        CheckpointError: `resume` or `init_from` is damaged or does not fit; or a checkpoint cannot be written.
        TrainingDiverged: the loss is no number; the last checkpoint is from before.
    """
    checkpoint = Path(checkpoint)
    with _limited_threads(threads or (1 if config.kind == "adapt" else None)), _fastest_convolutions(config):
        run = Run(config, data, _chosen_device(config, device))
        if init_from is not None:
            run.begin_from(Path(init_from))
        if resume is not None:
            run.restore(Path(resume))
        yield run.started(resumed=resume is not None)
        yield from _before_episodes(run, checkpoint, save_now, clock)
        yield from _episodes(run, checkpoint, save_now, clock)
        yield run.finish(checkpoint.with_name(checkpoint.stem + "-model"))


def _before_episodes(
    run: Run, checkpoint: Path, save_now: Callable[[], bool], clock: Callable[[], float]
) -> Iterator[Report]:
    """What the run starts with is evaluated where it is worth it; then the class-pretraining stage."""
    if run.learner.starts_trained and run.standing.best is None:
        yield run.evaluate()
        yield run.save(checkpoint)
    stage = run.pretraining
    if stage is None or stage.done == stage.steps:
        return
    pace = _Pace(stage.done, stage.steps, clock)
    saved_at = clock()
    while stage.done < stage.steps:
        run.pretrain_step()
        finished = stage.done == stage.steps
        if finished or pace.is_due():
            loss, accuracy, photos = run.taken_sums()
            pace.measure(stage.done)
            per_step = photos / max(1, pace.since_last)
            yield Pretrained(
                stage.epoch, run.config.pretrain_epochs, loss, accuracy, pace.rate * per_step, pace.seconds_left
            )
        if finished:
            yield run.evaluate()
        if finished or clock() - saved_at >= CHECKPOINT_EVERY_S or save_now():
            yield run.save(checkpoint)
            saved_at = clock()
            pace.pause_over(stage.done)


def _episodes(run: Run, checkpoint: Path, save_now: Callable[[], bool], clock: Callable[[], float]) -> Iterator[Report]:
    """The loop: a step, now and then a report, an evaluation, a checkpoint."""
    config = run.config
    pace = _Pace(run.episode, config.total_episodes, clock)
    saved_at = clock()
    while not run.is_over:
        run.step()
        evaluate = run.episode == config.total_episodes or run.episode >= run.evaluate_at
        if pace.is_due() or evaluate:
            loss, accuracy, _ = run.taken_sums()
            pace.measure(run.episode)
            yield Step(run.epoch, run.episode, loss, accuracy, pace.rate, pace.seconds_left)
        if evaluate:
            yield run.evaluate()
        if evaluate or clock() - saved_at >= CHECKPOINT_EVERY_S or save_now():
            yield run.save(checkpoint)
            saved_at = clock()
            pace.pause_over(run.episode)


class _Pace:
    """How fast it goes, and whether the next report is due; pauses for evaluations and checkpoints do not count."""

    def __init__(self, done: int, total: int, clock: Callable[[], float]) -> None:
        self.done, self.total, self.clock = done, total, clock
        self.since = clock()
        self.reported_at = -math.inf
        self.rate = 0.0  # a second
        self.since_last = 0

    def is_due(self) -> bool:
        return self.clock() - self.reported_at >= REPORT_EVERY_S

    def measure(self, done: int) -> None:
        now = self.clock()
        self.since_last = done - self.done
        current = self.since_last / max(now - self.since, 1e-9)
        self.rate = 0.7 * self.rate + 0.3 * current if self.rate else current
        self.since, self.done, self.reported_at = now, done, now

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / max(self.rate, 1e-9)

    def pause_over(self, done: int) -> None:
        self.since, self.done = self.clock(), done


def _chosen_device(config: TrainConfig, device: str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if config.kind == "full" and torch.cuda.is_available() else "cpu")


@contextmanager
def _limited_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fastest_convolutions(config: TrainConfig) -> Iterator[None]:
    """Let cuDNN try its algorithms on the shapes of a long run: few shapes, met often."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = config.kind == "full" and worth_compiling(config)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
