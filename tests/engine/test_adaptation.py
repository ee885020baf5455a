"""*Adapt*: what episodes add to the closed form, and what the finished model is, against slow references."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fewshot_engine import adaptation
from fewshot_engine.adaptation import Adapter, coordinates
from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.cross_validation import leave_classes_out
from fewshot_engine.datasets import ClassSplit, TrainData
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.evaluation import evaluate
from fewshot_engine.recipes import Recipe, load_recipe
from fewshot_engine.reports import Finished
from fewshot_engine.training import meta_train
from fewshot_engine.whitening import Scatter

CONFIG = TrainConfig(kind="adapt", episode=EpisodeConfig(3, 2, 4), epochs=1, episodes_per_epoch=20, eval_episodes=60)


def shop(n_classes=16, photos=10, dim=40, seed=0, shared=12, first=0):
    """Classes differ in 8 directions, photos of one class more in 8 others, and all share one: their kind."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    x = 0.15 * rng.standard_normal((len(labels), dim))
    x[:, first : first + 8] += rng.standard_normal((n_classes, 8))[labels]
    x[:, first + 8 : first + 16] += 1.5 * rng.standard_normal((len(labels), 8))
    x[:, first + 16] += shared
    return x.astype(np.float32), labels


def adapter(data, base, validation, *, groups=None, split=None):
    x, labels = data
    train = TrainData(tuple(f"c{i}" for i in range(labels.max() + 1)), labels, groups, x, split=split)
    chosen = np.where(np.isin(labels, base), labels, -1)
    photos = torch.from_numpy(np.flatnonzero(np.isin(labels, validation)))
    return Adapter(CONFIG, train, chosen, photos, torch.zeros(0, dtype=torch.long), torch.device("cpu"))


def taught(learner, seed=1):
    """The same, with a correction as if it had learned something."""
    with torch.no_grad():
        learner.inner.copy_(0.02 * torch.randn(learner.inner.shape, generator=torch.Generator().manual_seed(seed)))
    return learner


def finished_recipe(learner):
    tensors, card = learner.model(learner.state())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Recipe(**arrays, share=card["share"], familiar_from=card["familiar_from"], card=card)


def test_coordinates_keep_the_products():
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    short = coordinates(rows)
    assert short.shape == (7, 7)
    assert torch.allclose(short @ short.mT, rows @ rows.mT, atol=1e-4)


def test_cosines_are_those_of_embeddings_whitened_without_their_own_fold():
    learner = taught(adapter(shop(), range(12), range(12, 16)))
    photos = torch.randint(0, 120, (2, 30), generator=torch.Generator().manual_seed(0))
    y = torch.empty(120, 40)
    for fold in leave_classes_out(learner.frozen, learner.labels, CONFIG.seed):
        y[fold.rows] = fold.scatter.whitening(learner.choice)(learner.frozen[fold.rows]) / learner.length
    centred = (learner.frozen - learner.scatter.centre) @ learner.directions
    y += learner.gain * centred @ learner.inner.detach() @ learner.directions.mT
    z = normalize(y, dim=1)[photos]
    assert torch.allclose(learner.cosines(photos), z @ z.mT, atol=1e-5)


def test_cosines_without_a_table_are_the_same(monkeypatch):
    learner = taught(adapter(shop(), range(12), range(12, 16)))
    photos = torch.randint(0, 120, (2, 30), generator=torch.Generator().manual_seed(0))
    looked_up = learner.cosines(photos)
    learner.learned.table = None
    monkeypatch.setattr(adaptation, "TABLE_PHOTOS", 0)
    assert torch.allclose(learner.cosines(photos), looked_up, atol=1e-5)


def test_what_is_evaluated_is_what_the_finished_model_gives():
    data = shop()
    apart = ClassSplit(tuple(range(12)), tuple(range(12, 16)))  # set apart by the caller: not in the last fit either
    learner = taught(adapter(data, range(12), range(12, 16), split=apart))
    recipe = finished_recipe(learner)
    photos = torch.arange(120, 160)
    frozen, trained = learner.embed_frozen(photos), learner.embed_trained(photos)
    x = data[0][120:]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert (frozen @ frozen.mT).numpy() == pytest.approx(unit @ unit.T, abs=1e-4)
    adapted = recipe.apply(x, familiarity=recipe.familiarity(x))
    assert (trained @ trained.mT).numpy() == pytest.approx(adapted @ adapted.T, abs=1e-4)


def test_the_last_fit_takes_in_the_classes_that_were_drawn_to_validate_with():
    x, labels = shop()
    recipe = finished_recipe(adapter((x, labels), range(12), range(12, 16)))
    everything = Scatter.of(normalize(torch.from_numpy(x), dim=1), torch.from_numpy(labels))
    assert recipe.centre == pytest.approx(everything.centre.numpy(), abs=1e-6)
    assert len(recipe.class_means) == 16
    assert recipe.card["adapted_to"] == [f"c{i}" for i in range(16)]
    apart = ClassSplit(tuple(range(12)), tuple(range(12, 16)))
    assert len(finished_recipe(adapter((x, labels), range(12), range(12, 16), split=apart)).class_means) == 12


def test_restoring_brings_the_directions_back_with_the_signs_they_had():
    data = shop()
    learner, other = taught(adapter(data, range(12), range(12, 16))), adapter(data, range(12), range(12, 16))
    other.directions = -other.directions  # another machine
    other.learned.project(other)
    other.restore(learner.state())
    photos = torch.arange(60)[None]
    assert torch.allclose(other.cosines(photos), learner.cosines(photos), atol=1e-6)
    held_out = torch.arange(120, 160)
    one, two = learner.embed_trained(held_out), other.embed_trained(held_out)
    assert torch.allclose(one @ one.mT, two @ two.mT, atol=1e-5)


def test_away_from_what_it_was_adapted_to_the_frozen_encoder_answers(tmp_path):
    """New classes of the kind gain, and another kind of photo, whose classes are what was noise, loses nothing."""
    x, labels = shop(n_classes=22)
    data = TrainData(tuple(map(str, range(16))), labels[:160], embeddings=x[:160])
    (finished,) = [
        report
        for report in meta_train(CONFIG, data, checkpoint=tmp_path / "run.safetensors")
        if isinstance(report, Finished)
    ]
    recipe = load_recipe(finished.model)
    fresh, other = (x[160:], labels[160:]), shop(6, seed=5, first=8)
    for (photos, of), gains in ((fresh, True), (other, False)):
        shape = {"way": 5, "shot": 1, "query": 5, "episodes": 300}
        frozen = evaluate(photos, of, **shape).accuracy
        blended = evaluate(recipe.apply(photos, familiarity=recipe.familiarity(photos)), of, **shape).accuracy
        alone = evaluate(recipe.apply(photos, familiarity=1.0), of, **shape).accuracy
        if gains:
            assert blended > frozen + 0.1
        else:
            assert blended > frozen - 0.005
            assert alone < frozen - 0.05


def test_bad_embeddings_are_named():
    x, labels = shop(4, 4)
    data = TrainData(("a", "b", "c", "d"), labels)
    nothing = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ConfigError, match="none were given"):
        Adapter(CONFIG, data, labels, nothing, nothing, torch.device("cpu"))
    x[3, 3] = np.nan
    with pytest.raises(DataError, match="no numbers"):
        adapter((x, labels), range(4), range(4))
