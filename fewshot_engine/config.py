"""What the engine is told: frozen records that check themselves. Standard library only, so the site may import it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fewshot_engine.errors import ConfigError

Kind = Literal["adapt", "full"]

DEFAULT_ENCODER = "efficientnet-lite0"
# Names that stand for an encoder, and the backbones that are fused into it.
ENCODERS = {
    "accurate": ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"),
    "fast": ("efficientnet-lite0",),
}
TRAINABLE_BACKBONES = ("conv4", "efficientnet-lite0")
ENGINE_VERSION = "1"  # part of every key of what is computed from embeddings; raise it when results change


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
class TrainConfig:
    """One meta-training run; the defaults are the specification's typical values.

    `eval_every` counts epochs; `image_size` is in pixels and matters to *full* alone.
    """

    kind: Kind = "adapt"
    backbone: str = DEFAULT_ENCODER
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    epochs: int = 5
    episodes_per_epoch: int = 200
    episodes_per_step: int = 1
    image_size: int = 84
    learning_rate: float = 1e-3
    eval_every: int = 1
    eval_episodes: int = 600
    seed: int = 0
    flips: bool = True
    validation_share: float = 0.2

    def __post_init__(self) -> None:
        _require(self.kind in ("adapt", "full"), f"kind is {self.kind!r}: it is adapt or full")
        if self.kind == "full":
            known = ", ".join(TRAINABLE_BACKBONES)
            _require(self.backbone in TRAINABLE_BACKBONES, f"backbone is {self.backbone!r}: full knows {known}")
        _require(1 <= self.epochs <= 1000, f"epochs is {self.epochs}: use 1 to 1,000")
        per_epoch = self.episodes_per_epoch
        _require(1 <= per_epoch <= 100_000, f"episodes an epoch is {per_epoch}: use 1 to 100,000")
        _require(1 <= self.episodes_per_step <= 64, f"episodes a step is {self.episodes_per_step}: use 1 to 64")
        _require(28 <= self.image_size <= 384, f"image size is {self.image_size} px: use 28 to 384")
        _require(0 < self.learning_rate <= 1, f"learning rate is {self.learning_rate}: use above 0, up to 1")
        every = self.eval_every
        _require(1 <= every <= self.epochs, f"evaluation every {every} epochs: use 1 to {self.epochs}")
        _require(20 <= self.eval_episodes <= 10_000, f"evaluation episodes is {self.eval_episodes}: use 20 to 10,000")
        share = self.validation_share
        _require(0.05 <= share <= 0.5, f"validation share is {share}: use 0.05 to 0.5")

    @property
    def total_episodes(self) -> int:
        return self.epochs * self.episodes_per_epoch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; raises ConfigError for a name that is not known."""
        values = dict(values)
        try:
            episode = EpisodeConfig(**values.pop("episode", {}))
            return cls(episode=episode, **values)
        except TypeError as error:
            raise ConfigError(str(error)) from error


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
