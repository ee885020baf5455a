"""What can go wrong in the engine, in words that a person can act on."""


class EngineError(Exception):
    """The root of the tree; its text is meant for people."""


class ConfigError(EngineError, ValueError):
    """A configuration that cannot work; raised when it is made, naming the bad value."""


class DataError(EngineError):
    """The photos at hand do not allow what was asked: too few classes, too few photos."""


class EmptyClassError(DataError):
    """A class has no support example, so it has no prototype."""


class ImageRefused(EngineError):
    """Bytes that are not taken as a photo.

    Attributes:
        code: a short, stable name of the reason, such as "truncated" or "too-large".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class WeightsMissing(EngineError):
    """Pretrained weights are neither on this machine nor to be had."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be read, or that belongs to something else."""


class TrainingDiverged(EngineError):
    """The loss is no number any more; the last good checkpoint is kept."""
