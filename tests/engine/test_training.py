import json

import numpy as np
import pytest
import torch

from fewshot_engine import checkpoints, training
from fewshot_engine.config import Augmentation, Curriculum, EpisodeConfig, Stage, TrainConfig
from fewshot_engine.datasets import ClassSplit, TrainData
from fewshot_engine.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from fewshot_engine.evaluation import evaluate
from fewshot_engine.exams import EVALUATION_SEED
from fewshot_engine.networks import Network
from fewshot_engine.recipes import load_model, load_recipe
from fewshot_engine.reports import Evaluated, Finished, Pretrained, Saved, Started, Step
from fewshot_engine.training import meta_train

EPISODE = EpisodeConfig(way=3, shot=2, query=4)
ADAPT = TrainConfig(
    kind="adapt", episode=EPISODE, epochs=2, episodes_per_epoch=20, learning_rate=1e-3, eval_episodes=60
)
FULL = TrainConfig(
    kind="full",
    backbone="conv4",
    image_size=28,
    episode=EPISODE,
    epochs=2,
    episodes_per_epoch=6,
    eval_episodes=60,
    augmentation=Augmentation(flips=False),
)


def nuisance_embeddings(n_classes=14, photos=12, dim=24, seed=0):
    """Classes differ in 6 directions, but photos of one class differ more in 6 others: adapting must find out."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    x = 0.1 * rng.standard_normal((len(labels), dim))
    x[:, :6] += rng.standard_normal((n_classes, 6))[labels]
    x[:, 6:12] += 1.5 * rng.standard_normal((len(labels), 6))
    x[:, 12] += 5  # what all photos share, which centring takes away
    return TrainData(tuple(f"c{i}" for i in range(n_classes)), labels, embeddings=x.astype(np.float32))


def bars(n_classes=10, photos=10, size=28, seed=0):
    """A bar at an angle for each class, at any place and in any colour."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    y, x = np.mgrid[:size, :size] - size / 2
    pictures = np.empty((len(labels), size, size, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        angle, shift = np.pi * label / n_classes, rng.uniform(-5, 5)
        bar = np.abs(x * np.sin(angle) - y * np.cos(angle) - shift) < 2
        pictures[i] = np.where(bar[..., None], rng.integers(0, 120, 3), rng.integers(150, 255, 3))
    return TrainData(tuple(f"c{i}" for i in range(n_classes)), labels, pixels=pictures)


def reports(config, data, path, **options):
    return list(meta_train(config, data, checkpoint=path, device="cpu", threads=1, **options))


def of_kind(found, kind):
    return [report for report in found if isinstance(report, kind)]


def test_adapting_learns_what_a_class_is(tmp_path):
    data = nuisance_embeddings()
    found = reports(ADAPT, data, tmp_path / "run.safetensors")
    started, finished = found[0], found[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert finished.recommends == "trained"
    assert finished.best.accuracy > started.baseline.accuracy + 0.1
    assert (finished.best.way, finished.best.shot, finished.best.query) == (3, 2, 4)
    assert not finished.best.optimistic
    assert not set(started.base_classes) & set(started.validation_classes)
    assert [report.epoch for report in of_kind(found, Evaluated)] == [0, 1, 2]
    assert max(e.score.accuracy for e in of_kind(found, Evaluated)) == finished.best.accuracy

    # The model on disk gives what the run measured, without torch.
    recipe = load_recipe(finished.model)
    adapted = recipe.apply(data.embeddings, familiarity=recipe.familiarity(data.embeddings))
    assert np.linalg.norm(adapted, axis=1) == pytest.approx(1, abs=1e-5)
    held_out = np.isin(data.labels, [data.classes.index(name) for name in started.validation_classes])
    options = {"way": 3, "shot": 2, "query": 4, "episodes": 60, "seed": ADAPT.seed + EVALUATION_SEED}
    again = evaluate(adapted[held_out], data.labels[held_out], **options)
    assert again.accuracy == pytest.approx(finished.best.accuracy, abs=0.01)
    card = json.loads((finished.model / "model.json").read_text())
    assert (card["kind"], card["recommends"], card["chance"]) == ("adapt", "trained", 1 / 3)
    assert card["config"] == ADAPT.to_dict()


def test_full_training_learns_from_pixels(tmp_path):
    config = TrainConfig(**{**FULL.__dict__, "epochs": 1, "episodes_per_epoch": 60, "learning_rate": 3e-3})
    found = reports(config, bars(), tmp_path / "run.safetensors")
    finished = found[-1]
    assert finished.recommends == "trained"
    assert finished.best.accuracy > finished.baseline.accuracy + 0.1
    tensors, card = load_model(finished.model)
    assert (card["backbone"], card["image_size"], card["dim"]) == ("conv4", 28, 64)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize(("config", "data"), [(ADAPT, nuisance_embeddings()), (FULL, bars())], ids=["adapt", "full"])
@pytest.mark.parametrize("stop_after", ["epoch", "middle"])
def test_resuming_is_bit_for_bit(tmp_path, config, data, stop_after, monkeypatch):
    straight = reports(config, data, tmp_path / "straight.safetensors")
    if stop_after == "middle":  # a checkpoint after every step, and a stop within an epoch
        monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
    run = meta_train(config, data, checkpoint=tmp_path / "stopped.safetensors", device="cpu", threads=1)
    wanted = config.episodes_per_epoch + (3 if stop_after == "middle" else 0)
    for report in run:
        if isinstance(report, Saved) and report.episode == wanted:
            break
    run.close()
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on the global generator
    path = tmp_path / "resumed.safetensors"
    resumed = reports(config, data, path, resume=tmp_path / "stopped.safetensors")
    assert resumed[0].resumed_at == wanted
    assert resumed[0].baseline == straight[0].baseline
    assert resumed[-1].best == straight[-1].best
    ones, one_meta = checkpoints.load(tmp_path / "straight.safetensors")
    others, other_meta = checkpoints.load(path)
    assert one_meta == other_meta
    assert ones.keys() == others.keys()
    for name in ones.keys() - {"sums"}:  # since the last Step, and Steps follow the clock
        assert np.array_equal(ones[name], others[name]), name


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    def weights(seed, name):
        config = TrainConfig(**{**ADAPT.__dict__, "seed": seed})
        data = TrainData(**{**nuisance_embeddings().__dict__, "split": ClassSplit(tuple(range(10)), (10, 11, 12, 13))})
        reports(config, data, tmp_path / name)
        return checkpoints.load(tmp_path / name)[0]["learner.inner"]

    assert np.array_equal(weights(1, "a"), weights(1, "b"))
    assert not np.array_equal(weights(1, "a"), weights(2, "c"))


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    path = tmp_path / "run.safetensors"
    reports(ADAPT, nuisance_embeddings(), path)
    other = TrainConfig(**{**ADAPT.__dict__, "learning_rate": 1e-4})
    with pytest.raises(CheckpointError, match="from another run: its config"):
        reports(other, nuisance_embeddings(), tmp_path / "x", resume=path)
    with pytest.raises(CheckpointError, match="its fingerprint"):
        reports(ADAPT, nuisance_embeddings(seed=1), tmp_path / "x", resume=path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        reports(ADAPT, nuisance_embeddings(), tmp_path / "x", resume=tmp_path / "absent")


def test_validation_classes_are_never_learned_from(tmp_path):
    """Spoiling the validation classes' embeddings changes the scores, and nothing that is learned."""
    data = nuisance_embeddings()
    found = reports(ADAPT, data, tmp_path / "a.safetensors")
    spoiled = data.embeddings.copy()
    held_out = np.isin(data.labels, [data.classes.index(name) for name in found[0].validation_classes])
    spoiled[held_out] = np.random.default_rng(9).standard_normal((held_out.sum(), spoiled.shape[1]))
    reports(ADAPT, TrainData(data.classes, data.labels, embeddings=spoiled), tmp_path / "b.safetensors")
    one, other = (checkpoints.load(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    for name in ("learner.inner", "learner.directions"):
        assert np.array_equal(one[name], other[name])


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    run = meta_train(ADAPT, nuisance_embeddings(), checkpoint=path, device="cpu")
    next(report for report in run if isinstance(report, Saved) and report.episode == 20)
    with torch.no_grad():
        run.gi_frame.f_locals["run"].learner.inner.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"learning rate 0\.001"):
        list(run)
    tensors, meta = checkpoints.load(path)
    assert meta["episode"] == 20
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_too_few_classes_fall_back_and_say_so(tmp_path):
    found = reports(ADAPT, nuisance_embeddings(n_classes=4), tmp_path / "run.safetensors")
    assert found[0].baseline.optimistic
    assert found[-1].best.optimistic
    assert any("optimistic" in note for note in found[0].notes)
    fewer = reports(ADAPT, nuisance_embeddings(n_classes=5), tmp_path / "run.safetensors")[0]
    assert (fewer.plan.way, fewer.baseline.way, fewer.chance) == (3, 2, 0.5)
    with pytest.raises(DataError, match="3-way needs 3 classes with at least 3 photos; this collection has 2"):
        reports(ADAPT, nuisance_embeddings(n_classes=2), tmp_path / "run.safetensors")


def test_frozen_is_recommended_where_training_gains_nothing(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    data = TrainData(tuple(map(str, range(12))), labels, embeddings=np.eye(12, 16, dtype=np.float32)[labels])
    data.embeddings[:] += 1e-3 * rng.standard_normal(data.embeddings.shape)
    finished = reports(ADAPT, data, tmp_path / "run.safetensors")[-1]
    assert finished.baseline.accuracy == 1
    assert finished.recommends == "frozen"
    assert "gained nothing" in finished.notes[0]


def test_steps_are_throttled_and_checkpoints_come_every_minute(tmp_path):
    class Clock:
        def __init__(self, tick):
            self.now, self.tick = 0.0, tick

        def __call__(self):
            self.now += self.tick
            return self.now

    config = TrainConfig(**{**ADAPT.__dict__, "epochs": 1, "episodes_per_epoch": 300})
    found = reports(config, nuisance_embeddings(), tmp_path / "run", clock=Clock(tick=0.02))
    steps = of_kind(found, Step)
    assert len(steps) < 300 * 0.1 / 0.2
    assert steps[-1].episode == 300
    assert steps[-1].seconds_left == 0
    assert all(0 <= step.accuracy <= 1 and step.episodes_per_s > 0 for step in steps)
    slow = Clock(tick=15)
    saved = [
        report.episode
        for report in of_kind(reports(config, nuisance_embeddings(), tmp_path / "run", clock=slow), Saved)
    ]
    assert len(saved) > 50


def test_missing_inputs_raise(tmp_path):
    labels = np.repeat(np.arange(8), 8)
    with pytest.raises(ConfigError, match="adapt learns from embeddings"):
        reports(ADAPT, TrainData(tuple(map(str, range(8))), labels), tmp_path / "run")
    with pytest.raises(ConfigError, match="full learns from pixels"):
        reports(FULL, TrainData(tuple(map(str, range(8))), labels), tmp_path / "run")
    with pytest.raises(ConfigError, match="7 rows of embeddings for 64 labels"):
        TrainData(tuple(map(str, range(8))), labels, embeddings=np.zeros((7, 2), dtype=np.float32))
    wrong_size = bars(size=32)
    with pytest.raises(ConfigError, match=r"they are uint8 \(28, 28, 3\)"):
        reports(FULL, wrong_size, tmp_path / "run")


def test_pixels_may_be_a_function(tmp_path):
    data = bars()
    config = TrainConfig(**{**FULL.__dict__, "epochs": 1, "episodes_per_epoch": 2, "episodes_per_step": 2})
    pictures = data.pixels
    by_function = TrainData(data.classes, data.labels, pixels=lambda indices: pictures[indices])
    one = reports(config, data, tmp_path / "a")[-1]
    assert reports(config, by_function, tmp_path / "b")[-1].best == one.best


EVERYTHING = TrainConfig(
    **{
        **FULL.__dict__,
        "episodes_per_step": 2,
        "optimiser": "sgd",
        "momentum": 0.8,
        "schedule": "plateau",
        "rate_patience": 1,
        "warmup_episodes": 3,
        "label_smoothing": 0.1,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "eval_every_episodes": 4,
        "patience": 10,
        "pretrain_epochs": 2,
        "pretrain_batch": 16,
        "rotations_as_classes": True,
        "class_weights": "size",
        "curriculum": Curriculum((Stage(0, 2, 3), Stage(0.4, 3, 2))),
    }
)


@pytest.mark.parametrize("stop_at", ["pretraining", "episodes"])
def test_a_run_with_everything_switched_on_resumes_bit_for_bit(tmp_path, stop_at, monkeypatch):
    data = bars(n_classes=12)
    straight = reports(EVERYTHING, data, tmp_path / "straight")
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
    run = meta_train(EVERYTHING, data, checkpoint=tmp_path / "stopped", device="cpu", threads=1)
    wanted = (3, 0) if stop_at == "pretraining" else (None, 6)
    saved = 0
    for report in run:
        saved += isinstance(report, Saved)
        if isinstance(report, Saved) and (saved == wanted[0] or report.episode == wanted[1] != 0):
            break
    run.close()
    monkeypatch.undo()
    meta = checkpoints.load(tmp_path / "stopped")[1]
    assert meta["episode"] == wanted[1]
    resumed = reports(EVERYTHING, data, tmp_path / "resumed", resume=tmp_path / "stopped")
    for name in ("best", "test", "baseline", "notes"):
        assert getattr(resumed[-1], name) == getattr(straight[-1], name)
    ones, one_meta = checkpoints.load(tmp_path / "straight")
    others, other_meta = checkpoints.load(tmp_path / "resumed")
    assert one_meta == other_meta
    for name in ones.keys() - {"sums"}:
        assert np.array_equal(ones[name], others[name]), name


def test_three_ways_of_classes_and_the_final_figure_from_the_third(tmp_path):
    data = nuisance_embeddings()
    found = reports(ADAPT, data, tmp_path / "run")
    started, finished = found[0], found[-1]
    parts = [set(p) for p in (started.base_classes, started.validation_classes, started.test_classes)]
    assert set.union(*parts) == set(data.classes)
    assert sum(map(len, parts)) == len(data.classes)
    assert finished.final == finished.test
    assert "on the test classes" in finished.notes[0]
    card = load_model(finished.model)[1]
    assert card["test"]["accuracy"] == finished.test.accuracy
    assert card["test_baseline"]["accuracy"] == finished.test_baseline.accuracy

    # Spoiling the test classes changes their figure, and nothing that is learned or chosen.
    spoiled = data.embeddings.copy()
    tested = np.isin(data.labels, [data.classes.index(name) for name in started.test_classes])
    spoiled[tested] = np.random.default_rng(9).standard_normal((tested.sum(), spoiled.shape[1]))
    other = reports(ADAPT, TrainData(data.classes, data.labels, embeddings=spoiled), tmp_path / "other")[-1]
    assert other.best == finished.best
    assert other.test.accuracy < finished.test.accuracy
    ones, others = (load_model(report.model)[0] for report in (finished, other))
    assert all(np.array_equal(ones[name], others[name]) for name in ones)


def test_a_figure_of_the_classes_that_chose_the_checkpoint_is_called_optimistic(tmp_path):
    finished = reports(ADAPT, nuisance_embeddings(n_classes=8), tmp_path / "run")[-1]
    assert finished.test is None
    assert finished.final == finished.best
    assert finished.best.optimistic
    assert not finished.baseline.optimistic
    assert any("is optimistic" in note for note in finished.notes)


def test_running_out_of_memory_backs_off_and_says_so(tmp_path, monkeypatch):
    forward, sizes = Network._forward, []

    def scarce(self, x, network):
        if len(x) > 12 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(x))
        return forward(self, x, network)

    monkeypatch.setattr(Network, "_forward", scarce)
    config = TrainConfig(**{**FULL.__dict__, "epochs": 1, "episodes_per_epoch": 4, "episodes_per_step": 2})
    finished = reports(config, bars(), tmp_path / "run")[-1]
    assert any("9 photos go through the network at a time" in note for note in finished.notes)  # 36, 18, 9
    assert max(sizes) >= 9
    assert checkpoints.load(tmp_path / "run")[1]["at_once"] == 9
    assert any("Batch normalisation sees" in note for note in load_model(finished.model)[1]["notes"])


def test_memory_that_never_suffices_is_an_error(tmp_path, monkeypatch):
    def never(self, x, network):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Network, "_forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        reports(FULL, bars(), tmp_path / "run")


def test_fine_tuning_is_never_worse_than_the_model_it_began_with(tmp_path):
    config = TrainConfig(**{**FULL.__dict__, "epochs": 1, "episodes_per_epoch": 30, "learning_rate": 3e-3})
    data = bars()
    model = reports(config, data, tmp_path / "first")[-1].model
    ruinous = TrainConfig(**{**config.__dict__, "episodes_per_epoch": 4, "learning_rate": 1.0, "seed": 1})
    found = reports(ruinous, data, tmp_path / "second", init_from=model)
    started, finished = found[0], found[-1]
    first = of_kind(found, Evaluated)[0]
    assert (first.epoch, first.score) == (0, started.baseline)
    assert finished.best.accuracy == started.baseline.accuracy
    assert finished.recommends == "frozen"
    kept, original = load_model(finished.model)[0], load_model(model)[0]
    assert all(np.array_equal(kept[name], original[name]) for name in original)
    assert load_model(finished.model)[1]["init_from"]["fingerprint"] == data.fingerprint()
    with pytest.raises(ConfigError, match="only full starts from a finished model"):
        reports(ADAPT, nuisance_embeddings(), tmp_path / "x", init_from=model)


def test_pretraining_learns_the_base_classes_before_the_first_episode(tmp_path):
    values = {"pretrain_epochs": 8, "pretrain_batch": 32, "pretrain_learning_rate": 3e-3, "epochs": 1, "ema_decay": 0.9}
    config = TrainConfig(**{**FULL.__dict__, **values, "episodes_per_epoch": 2, "learning_rate": 1e-5})
    found = reports(config, bars(photos=20), tmp_path / "run")
    stages = of_kind(found, Pretrained)
    assert stages[-1].epoch == stages[-1].epochs == 8
    assert stages[-1].seconds_left == 0
    evaluated = of_kind(found, Evaluated)
    assert [report.epoch for report in evaluated] == [0, 1]
    assert evaluated[0].score.accuracy > found[0].baseline.accuracy + 0.1


def test_a_run_without_progress_stops_early_and_lowers_the_rate(tmp_path):
    values = {"epochs": 6, "episodes_per_epoch": 2, "patience": 3, "schedule": "plateau", "rate_patience": 2}
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    data = TrainData(tuple(map(str, range(12))), labels, embeddings=np.eye(12, 16, dtype=np.float32)[labels])
    data.embeddings[:] += 1e-3 * rng.standard_normal(data.embeddings.shape)
    found = reports(TrainConfig(**{**ADAPT.__dict__, **values}), data, tmp_path / "run")
    assert [report.epoch for report in of_kind(found, Evaluated)] == [0, 1, 2, 3]  # all of them 100 %
    assert any("Stopped early, after 6 of 12 episodes" in note for note in found[-1].notes)
    assert checkpoints.load(tmp_path / "run")[1]["rate_drops"] == 1


def test_an_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path):
    config = TrainConfig(**{**FULL.__dict__, "epochs": 1, "ema_decay": 0.99})
    finished = reports(config, bars(), tmp_path / "run")[-1]
    tensors, _ = checkpoints.load(tmp_path / "run")
    kept, _ = load_model(finished.model)
    assert np.array_equal(kept["0.0.weight"], tensors["average.0"])
    assert not np.array_equal(kept["0.0.weight"], tensors["learner.0.0.weight"])
