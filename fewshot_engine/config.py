"""What the engine is told: frozen records that check themselves. Standard library only, so the site may import it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fewshot_engine.errors import ConfigError

Kind = Literal["adapt", "full"]

DEFAULT_ENCODER = "efficientnet-lite0"
# Names that stand for an encoder, and the backbones that are fused into it. Behind @ stands how a backbone frames a
# photo where it is not the centre square. Three framings cost no more than one, and tell more: 0.6 points at 1 shot on
# grocery's clutter, 0.2 to 0.5 on miniImageNet and omniglot, nothing on clothing that fills the picture.
ENCODERS = {
    "accurate": ("efficientnet-lite0@crop", "efficientnet-lite1@pad", "efficientnet-lite2"),
    "fast": ("efficientnet-lite0",),
}
# What *full* trains: networks that start from random weights or from those of a package, and others whose pretrained
# weights are fetched first, with `weights`.
READY_BACKBONES = ("conv4", "resnet12", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
FETCHED_BACKBONES = ("resnet18", "resnet50", "mobilenet-v3-small", "mobilenet-v3-large", "vit-b-16")
TRAINABLE_BACKBONES = (*READY_BACKBONES, *FETCHED_BACKBONES)
ENGINE_VERSION = "3"  # part of every key of what is computed from embeddings; raise it when results change


@dataclass(frozen=True)
class EpisodeConfig:
    """An N-way K-shot episode with Q query images a class (Vinyals et al. 2016)."""

    way: int = 5
    shot: int = 5
    query: int = 15

    def __post_init__(self) -> None:
        _require(2 <= self.way <= 100, f"way is {self.way}: an episode needs 2 to 100 classes")
        _require(1 <= self.shot <= 100, f"shot is {self.shot}: a class needs 1 to 100 support examples")
        _require(1 <= self.query <= 100, f"query is {self.query}: a class needs 1 to 100 query images")

    @property
    def chance(self) -> float:
        """The accuracy of guessing, 1/N."""
        return 1 / self.way


@dataclass(frozen=True)
class Stage:
    """From this share of the episodes on, in [0, 1), they are `way`-way `shot`-shot."""

    since: float
    way: int
    shot: int


@dataclass(frozen=True)
class Curriculum:
    """Easy to hard: ways go up, shots go down, from stage to stage; see `at` and `str()`."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "curriculum has no stages: it needs 1 or more")
        first = self.stages[0].since
        _require(first == 0, f"curriculum begins at {first:.0%}: its first stage begins at 0")
        for stage in self.stages:
            _require(0 <= stage.since < 1, f"curriculum has a stage at {stage.since}: use 0 up to, but not, 1")
            EpisodeConfig(stage.way, stage.shot)
        for one, next_ in zip(self.stages, self.stages[1:], strict=False):
            _require(
                one.since < next_.since,
                f"curriculum goes from {one.since:.0%} to {next_.since:.0%}: each stage begins after the one before",
            )
            _require(
                one.way <= next_.way and one.shot >= next_.shot,
                f"curriculum goes from {one.way}-way {one.shot}-shot to {next_.way}-way {next_.shot}-shot: "
                "ways go up and shots go down",
            )

    @classmethod
    def towards(cls, episode: EpisodeConfig, *, stages: int = 3) -> Curriculum:
        """In equal parts from half of the ways and twice the shots to `episode` itself."""
        _require(2 <= stages <= 10, f"curriculum of {stages} stages: use 2 to 10")
        easy_way, easy_shot = max(2, (episode.way + 1) // 2), min(100, 2 * episode.shot)
        shares = [number / (stages - 1) for number in range(stages)]
        return cls(
            tuple(
                Stage(
                    number / stages,
                    round(easy_way + share * (episode.way - easy_way)),
                    round(easy_shot + share * (episode.shot - easy_shot)),
                )
                for number, share in enumerate(shares)
            )
        )

    def at(self, progress: float) -> Stage:
        """The stage at this share of the episodes, in [0, 1]."""
        return next(stage for stage in reversed(self.stages) if stage.since <= progress)

    def __str__(self) -> str:
        return ", then ".join(f"from {stage.since:.0%} {stage.way}-way {stage.shot}-shot" for stage in self.stages)


@dataclass(frozen=True)
class Variation:
    """Ways and shots drawn anew for each step, evenly from these ranges, both ends included."""

    ways: tuple[int, int]
    shots: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (low, high) in (("ways", self.ways), ("shots", self.shots)):
            _require(low <= high, f"{name} vary from {low} to {high}: the smaller number comes first")
        EpisodeConfig(self.ways[0], self.shots[0])
        EpisodeConfig(self.ways[1], self.shots[1])

    def __str__(self) -> str:
        return f"{self.ways[0]} to {self.ways[1]} ways and {self.shots[0]} to {self.shots[1]} shots"


@dataclass(frozen=True)
class Augmentation:
    """By how much a training picture may change, at random; zero switches a change off.

    Attributes:
        flips: mirrored half of the time; not for letters and whatever else a mirror turns into another thing.
        rotation: up to this many degrees, either way.
        crop: scaled by up to this share, and moved by up to six tenths of it.
        colour: brightness, contrast and saturation changed by up to this share each.
    """

    flips: bool = True
    rotation: float = 10.0
    crop: float = 0.1
    colour: float = 0.2

    def __post_init__(self) -> None:
        _require(0 <= self.rotation <= 180, f"rotation is {self.rotation}: use 0 to 180 degrees")
        _require(0 <= self.crop <= 0.5, f"crop is {self.crop}: use 0 to 0.5")
        _require(0 <= self.colour <= 0.9, f"colour is {self.colour}: use 0 to 0.9")


@dataclass(frozen=True)
class TrainConfig:
    """One meta-training run. The defaults of *full* are the specification's typical values, those of *adapt* gentler.

    Attributes:
        kind: *adapt* learns a map of a frozen backbone's embeddings, *full* the backbone itself.
        episode: of training where neither `curriculum` nor `vary` says otherwise; always of validation and test.
        epochs: 5; of *adapt* 2.
        episodes_per_step: averaged by each step of the optimiser.
        image_size: in pixels; matters to *full* alone, as all that is about pixels.
        learning_rate: 1e-3; of *adapt* 1e-4.
        eval_every: epochs from one evaluation to the next; or `eval_every_episodes`, where that is above 0.
        validation_share: of the classes, for choosing the checkpoint; 0 holds nothing out, and every figure is
            optimistic.
        test_share: of the classes, for the final figure and nothing else, where there are enough.
        class_weights: "balanced" draws every class alike, "size" in proportion to its photos.
        curriculum, vary: episodes that change on the way; one of them or none.
        rotations_as_classes: each base class turned by 90, 180 and 270 degrees counts as three more (Santoro et al.
            2016), for drawings and textures. Classes that are held out are not turned.
        weight_decay: of weights, not of biases and normalisation; 5e-4, of *adapt* 0.
        schedule: of the learning rate: "constant"; "cosine" to zero; "step": times `rate_factor` at each of
            `rate_steps`, shares of the episodes; "plateau": times `rate_factor` after every `rate_patience` evaluations
            without a better one. `warmup_episodes` go before, from zero up.
        clip_norm: the gradient is shortened to this length; 0 leaves it.
        ema_decay: where above 0, a moving average of the weights is what is evaluated and kept.
        mixed_precision: bfloat16 on a GPU.
        compiled: the network, on a GPU; None: when at least 2,000 episodes are there to gain the minute back.
        pretrain_epochs: passes over the base classes' photos with a cosine classifier before the first episode (Chen
            et al. 2019), `pretrain_batch` photos a step, at `pretrain_learning_rate`; `learning_rate` where not given.
        patience: evaluations without a better one after which the run stops; 0: never.
    """

    kind: Kind = "adapt"
    backbone: str = DEFAULT_ENCODER
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    epochs: int = None  # type: ignore[assignment]  # None: what is typical of the kind, here and below
    episodes_per_epoch: int = 200
    episodes_per_step: int = 1
    image_size: int = 84
    learning_rate: float = None  # type: ignore[assignment]
    eval_every: int = 1
    eval_every_episodes: int = 0
    eval_episodes: int = 600
    seed: int = 0
    validation_share: float = 0.2
    test_share: float = 0.1
    class_weights: Literal["balanced", "size"] = "balanced"
    curriculum: Curriculum | None = None
    vary: Variation | None = None
    rotations_as_classes: bool = False
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = None  # type: ignore[assignment]
    schedule: Literal["constant", "cosine", "step", "plateau"] = "cosine"
    warmup_episodes: int = 0
    rate_steps: tuple[float, ...] = (0.5, 0.75)
    rate_factor: float = 0.1
    rate_patience: int = 3
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixed_precision: bool = True
    compiled: bool | None = None
    pretrain_epochs: int = 0
    pretrain_batch: int = 128
    pretrain_learning_rate: float = None  # type: ignore[assignment]
    patience: int = 0

    def __post_init__(self) -> None:
        _require(self.kind in ("adapt", "full"), f"kind is {self.kind!r}: it is adapt or full")
        for name, value in TYPICAL[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.pretrain_learning_rate is None:
            object.__setattr__(self, "pretrain_learning_rate", self.learning_rate)
        self._check_course()
        self._check_classes()
        self._check_optimiser()
        if self.kind == "full":
            known = ", ".join(TRAINABLE_BACKBONES)
            _require(self.backbone in TRAINABLE_BACKBONES, f"backbone is {self.backbone!r}: full knows {known}")
        else:
            _require(not self.rotations_as_classes, "rotations as classes need pixels: use them with full")
            _require(self.pretrain_epochs == 0, f"pretraining is {self.pretrain_epochs} epochs: only full pretrains")

    def _check_course(self) -> None:
        _require(1 <= self.epochs <= 1000, f"epochs is {self.epochs}: use 1 to 1,000")
        per_epoch = self.episodes_per_epoch
        _require(1 <= per_epoch <= 100_000, f"episodes an epoch is {per_epoch}: use 1 to 100,000")
        _require(1 <= self.episodes_per_step <= 64, f"episodes a step is {self.episodes_per_step}: use 1 to 64")
        _require(28 <= self.image_size <= 384, f"image size is {self.image_size} px: use 28 to 384")
        every, episodes = self.eval_every, self.eval_every_episodes
        _require(1 <= every <= self.epochs, f"evaluation every {every} epochs: use 1 to {self.epochs}")
        _require(
            0 <= episodes <= self.total_episodes,
            f"evaluation every {episodes} episodes: use 0 to {self.total_episodes}",
        )
        _require(20 <= self.eval_episodes <= 10_000, f"evaluation episodes is {self.eval_episodes}: use 20 to 10,000")
        _require(0 <= self.pretrain_epochs <= 1000, f"pretraining is {self.pretrain_epochs} epochs: use 0 to 1,000")
        _require(2 <= self.pretrain_batch <= 4096, f"pretraining batch is {self.pretrain_batch}: use 2 to 4,096")
        _require(self.patience >= 0, f"patience is {self.patience}: use 0 (never stop early) or more evaluations")

    def _check_classes(self) -> None:
        share = self.validation_share
        _require(share == 0 or 0.05 <= share <= 0.5, f"validation share is {share}: use 0.05 to 0.5, or 0 for none")
        _require(0 <= self.test_share <= 0.5, f"test share is {self.test_share}: use 0 to 0.5")
        _require(
            self.class_weights in ("balanced", "size"),
            f"class weights are {self.class_weights!r}: they are balanced or size",
        )
        _require(
            self.curriculum is None or self.vary is None,
            "a curriculum and varying ways and shots are both given: use one of them",
        )

    def _check_optimiser(self) -> None:
        _require(self.optimiser in ("adamw", "sgd"), f"optimiser is {self.optimiser!r}: it is adamw or sgd")
        for name in ("learning_rate", "pretrain_learning_rate"):
            rate = getattr(self, name)
            _require(0 < rate <= 1, f"{name.replace('_', ' ')} is {rate}: use above 0, up to 1")
        _require(0 <= self.momentum < 1, f"momentum is {self.momentum}: use 0 up to, but not, 1")
        _require(0 <= self.weight_decay <= 1, f"weight decay is {self.weight_decay}: use 0 to 1")
        schedules = ("constant", "cosine", "step", "plateau")
        _require(self.schedule in schedules, f"schedule is {self.schedule!r}: it is one of {', '.join(schedules)}")
        warmup = self.warmup_episodes
        _require(0 <= warmup < self.total_episodes, f"warm-up is {warmup} episodes of {self.total_episodes}")
        increasing = list(self.rate_steps) == sorted(set(self.rate_steps))
        _require(
            increasing and all(0 < share < 1 for share in self.rate_steps),
            f"rate steps are {self.rate_steps}: they are increasing shares of the episodes, between 0 and 1",
        )
        _require(0 < self.rate_factor < 1, f"rate factor is {self.rate_factor}: use a number between 0 and 1")
        _require(self.rate_patience >= 1, f"rate patience is {self.rate_patience}: use 1 or more evaluations")
        _require(0 <= self.label_smoothing < 1, f"label smoothing is {self.label_smoothing}: use 0 up to, but not, 1")
        _require(self.clip_norm >= 0, f"clip norm is {self.clip_norm}: use 0 (off) or more")
        _require(0 <= self.ema_decay < 1, f"EMA decay is {self.ema_decay}: use 0 (off) up to, but not, 1")

    @property
    def total_episodes(self) -> int:
        return self.epochs * self.episodes_per_epoch

    @property
    def largest_episode(self) -> EpisodeConfig:
        """The most ways and the most shots that training asks for at any time."""
        if self.curriculum is not None:
            ways, shots = zip(*((stage.way, stage.shot) for stage in self.curriculum.stages), strict=True)
            return EpisodeConfig(max(ways), max(shots), self.episode.query)
        if self.vary is not None:
            return EpisodeConfig(self.vary.ways[1], self.vary.shots[1], self.episode.query)
        return self.episode

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, and gives back as it was: lists, no tuples."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; raises ConfigError for a name that is not known."""
        values = dict(values)
        if "flips" in values:  # runs of the first version kept it here
            values["augmentation"] = {"flips": values.pop("flips")}
        try:
            values["episode"] = EpisodeConfig(**values.get("episode", {}))
            values["augmentation"] = Augmentation(**values.get("augmentation", {}))
            if values.get("curriculum"):
                stages = tuple(Stage(**stage) for stage in values["curriculum"]["stages"])
                values["curriculum"] = Curriculum(stages)
            if values.get("vary"):
                values["vary"] = Variation(**{name: tuple(ends) for name, ends in values["vary"].items()})
            if "rate_steps" in values:
                values["rate_steps"] = tuple(values["rate_steps"])
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ConfigError(str(error)) from error


TYPICAL: dict[Kind, dict[str, Any]] = {
    "adapt": {"epochs": 2, "learning_rate": 1e-4, "weight_decay": 0.0},
    "full": {"epochs": 5, "learning_rate": 1e-3, "weight_decay": 5e-4},
}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
