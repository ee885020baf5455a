import numpy as np
import pytest

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.evaluation import Score
from fewshot_engine.standing import Standing, verdict

PLAN = EpisodePlan(way=5, shot=1, query=5)


def take(standing, accuracy, episode):
    accuracies = np.full(10, accuracy)
    return standing.take(
        Score.of(accuracies, PLAN), accuracies, episode=episode, state=lambda: {"after": np.array(episode)}
    )


def test_the_best_evaluation_is_kept_and_of_equals_the_first():
    standing = Standing(TrainConfig())
    assert [take(standing, accuracy, at) for at, accuracy in enumerate([0.5, 0.7, 0.7, 0.6])] == [
        True,
        True,
        False,
        False,
    ]
    assert (standing.best.accuracy, standing.best_at, int(standing.state["after"])) == (pytest.approx(0.7), 1, 1)
    assert standing.since_best == 2


def test_patience_begins_with_the_first_episode():
    standing = Standing(TrainConfig(patience=2))
    for episode in (0, 0, 0, 10):
        take(standing, 0.5, episode)
    assert not standing.has_stalled
    take(standing, 0.5, 20)
    assert standing.has_stalled


def test_the_rate_drops_once_for_each_plateau():
    standing = Standing(TrainConfig(schedule="plateau", rate_patience=2))
    drops = []
    for episode, accuracy in enumerate([0.5, 0.5, 0.5, 0.4, 0.6, 0.6, 0.6, 0.6]):
        take(standing, accuracy, episode)
        drops.append(standing.rate_drops)
    assert drops == [0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (np.full(4, 0.02), "Training gained 2.0 ± 0.0 points on the test classes."),
        (np.array([0.2, -0.18]), "within the noise"),
        (
            np.full(4, -0.01),
            "Training gained nothing on the test classes (-1.0 ± 0.0 points): keep the frozen backbone.",
        ),
    ],
)
def test_the_verdict_goes_by_the_interval(gain, said):
    assert said in verdict(gain, PLAN, where="test")
