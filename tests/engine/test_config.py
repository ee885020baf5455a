import pytest

from fewshot_engine.config import Augmentation, Curriculum, EpisodeConfig, Stage, TrainConfig, Variation
from fewshot_engine.errors import ConfigError


def test_full_has_the_specification_s_defaults_and_adapt_gentler_ones():
    full, adapt = TrainConfig(kind="full"), TrainConfig()
    assert (full.episode.way, full.episode.shot, full.episode.query, full.learning_rate) == (5, 5, 15, 1e-3)
    assert (full.epochs, full.image_size, full.weight_decay) == (5, 84, 5e-4)
    assert (adapt.learning_rate, adapt.total_episodes, adapt.weight_decay) == (1e-4, 400, 0)
    assert TrainConfig(learning_rate=1e-2).learning_rate == 1e-2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "both"}, "kind is 'both'"),
        ({"epochs": 0}, "epochs is 0: use 1 to 1,000"),
        ({"eval_every": 6, "epochs": 5}, "evaluation every 6 epochs: use 1 to 5"),
        ({"eval_every_episodes": 401}, "evaluation every 401 episodes: use 0 to 400"),
        ({"kind": "full", "backbone": "vgg"}, "backbone is 'vgg': full knows conv4, resnet12"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"pretrain_epochs": 3}, "only full pretrains"),
        ({"rotations_as_classes": True}, "rotations as classes need pixels"),
        ({"optimiser": "lion"}, "optimiser is 'lion'"),
        ({"schedule": "linear"}, "schedule is 'linear': it is one of constant, cosine, step, plateau"),
        ({"warmup_episodes": 400}, "warm-up is 400 episodes of 400"),
        ({"rate_steps": (0.7, 0.3)}, r"rate steps are \(0.7, 0.3\)"),
        ({"label_smoothing": 1.0}, "label smoothing is 1.0"),
        ({"ema_decay": 1.0}, "EMA decay is 1.0"),
        ({"validation_share": 0.01}, "validation share is 0.01"),
        ({"class_weights": "odd"}, "class weights are 'odd'"),
        ({"patience": -1}, "patience is -1"),
    ],
)
def test_a_mistake_raises_at_construction_with_the_numbers(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_a_configuration_survives_json():
    config = TrainConfig(
        kind="full",
        augmentation=Augmentation(flips=False, colour=0),
        curriculum=Curriculum((Stage(0, 5, 5), Stage(0.5, 10, 1))),
        rate_steps=(0.2, 0.4),
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    varied = TrainConfig(vary=Variation((3, 8), (1, 5)))
    assert TrainConfig.from_dict(varied.to_dict()) == varied
    with pytest.raises(ConfigError, match="unknown"):
        TrainConfig.from_dict({"unknown": 1})


def test_runs_of_the_first_version_can_still_be_read():
    assert not TrainConfig.from_dict({"kind": "full", "flips": False}).augmentation.flips


def test_a_curriculum_says_which_episodes_come_when():
    curriculum = Curriculum((Stage(0, 5, 10), Stage(0.3, 5, 5), Stage(0.6, 10, 1)))
    shapes = {progress: curriculum.at(progress) for progress in (0, 0.29, 0.3, 0.6, 1)}
    assert [(stage.way, stage.shot) for stage in shapes.values()] == [(5, 10), (5, 10), (5, 5), (10, 1), (10, 1)]
    assert str(curriculum) == "from 0% 5-way 10-shot, then from 30% 5-way 5-shot, then from 60% 10-way 1-shot"
    assert TrainConfig(curriculum=curriculum).largest_episode == EpisodeConfig(10, 10, 15)


def test_a_curriculum_towards_an_episode_ends_with_it():
    stages = Curriculum.towards(EpisodeConfig(10, 2), stages=3).stages
    assert [(round(stage.since, 2), stage.way, stage.shot) for stage in stages] == [
        (0, 5, 4),
        (0.33, 8, 3),
        (0.67, 10, 2),
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "has no stages"),
        ((Stage(0.1, 5, 5),), "begins at 10%"),
        ((Stage(0, 5, 5), Stage(0, 6, 5)), "each stage begins after the one before"),
        ((Stage(0, 5, 1), Stage(0.5, 5, 5)), "5-way 1-shot to 5-way 5-shot: ways go up and shots go down"),
        ((Stage(0, 1, 5),), "way is 1"),
    ],
)
def test_a_curriculum_that_is_none_raises(stages, message):
    with pytest.raises(ConfigError, match=message):
        Curriculum(stages)


def test_a_curriculum_and_varying_episodes_exclude_each_other():
    with pytest.raises(ConfigError, match="use one of them"):
        TrainConfig(curriculum=Curriculum((Stage(0, 5, 5),)), vary=Variation((2, 5), (1, 5)))
    with pytest.raises(ConfigError, match="ways vary from 5 to 2"):
        Variation((5, 2), (1, 5))
