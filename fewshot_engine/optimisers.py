"""How gradients become steps: the optimiser, the schedule of its rate, clipping, and the average of the weights.

The sums are torch.optim's own, through its functional form: constructing one of its classes imports the compiler, which
takes three seconds and more before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fewshot_engine.config import TrainConfig

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimiser:
    """AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov's momentum, as the configuration says.

    Matrices and filters decay; biases and normalisation, of one dimension, do not. The last parameter is the scale of
    the cosines: a single number, so it learns ten times as fast as the others.
    """

    def __init__(self, config: TrainConfig, parameters: Sequence[Tensor], *, rate: float | None = None) -> None:
        rate = config.learning_rate if rate is None else rate
        self.config, self.parameters = config, list(parameters)
        last = len(self.parameters) - 1
        matrices = [i for i, parameter in enumerate(self.parameters[:-1]) if parameter.ndim > 1]
        vectors = [i for i, parameter in enumerate(self.parameters[:-1]) if parameter.ndim <= 1]
        groups = (
            (matrices, rate, config.weight_decay),
            (vectors, rate, 0.0),
            ([last], min(10 * rate, 1e-2), 0.0),
        )
        self.groups = [group for group in groups if group[0]]
        self.moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        # On a GPU the fused kernel counts there; on the CPU counting costs least where the numbers are.
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        """One step at `share` of the learning rate; gradients in the order of the parameters."""
        gradients = clipped(gradients, self.config.clip_norm)
        for members, rate, decay in self.groups:
            parameters, steepest, moments = (
                [tensors[i] for i in members] for tensors in (self.parameters, gradients, self.moments)
            )
            if self.config.optimiser == "sgd":
                sgd(
                    parameters,
                    steepest,
                    moments,  # type: ignore[arg-type]  # a list of Tensor | None, of which none is None
                    foreach=True,
                    weight_decay=decay,
                    momentum=self.config.momentum,
                    lr=rate * share,
                    dampening=0.0,
                    nesterov=self.config.momentum > 0,
                    maximize=False,
                )
                continue
            fused = parameters[0].is_cuda
            adamw(
                parameters,
                steepest,
                moments,
                [self.squares[i] for i in members],
                [],
                [self.steps[i] for i in members],
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate * share,
                weight_decay=decay,
                eps=EPSILON,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        kept = {"moments": self.moments, "squares": self.squares, "steps": self.steps}
        return {f"{name}.{i}": tensor for name, tensors in kept.items() for i, tensor in enumerate(tensors)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def clipped(gradients: Sequence[Tensor], longest: float) -> list[Tensor]:
    """All gradients shortened alike, so that together they are at most this long (Pascanu et al. 2013); 0: as is."""
    gradients = list(gradients)
    if longest:
        total = torch.nn.utils.get_total_norm(gradients)
        gradients = list(torch._foreach_mul(gradients, (longest / (total + 1e-6)).clamp(max=1.0)))
    return gradients


def rate_share(config: TrainConfig, episode: int, *, drops: int = 0) -> float:
    """The share of the learning rate that the step after this many episodes takes, in [0, 1].

    Args:
        drops: how often the plateau has lowered it (see `Plateau`).
    """
    warmup = config.warmup_episodes
    if episode < warmup:
        return min(1.0, (episode + config.episodes_per_step) / warmup)
    if config.schedule == "cosine":  # Loshchilov and Hutter 2017, without restarts
        return cosine((episode - warmup) / (config.total_episodes - warmup))
    if config.schedule == "step":
        passed = sum(episode >= share * config.total_episodes for share in config.rate_steps)
        return float(config.rate_factor**passed)
    return float(config.rate_factor**drops)


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """An exponential moving average of tensors (Polyak and Juditsky 1992), younger while there is little to average.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so that the random start is soon forgotten.
    """

    def __init__(self, live: Sequence[Tensor], decay: float) -> None:
        self.live, self.decay, self.updates = [tensor.detach() for tensor in live], decay, 0
        self.mean = [tensor.clone() for tensor in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def start_over(self) -> None:
        """The average is what the live tensors are now."""
        self.updates = 0
        torch._foreach_copy_(self.mean, self.live)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average where the live tensors are, as long as this lasts."""
        kept = [tensor.clone() for tensor in self.live]
        torch._foreach_copy_(self.live, self.mean)
        try:
            yield
        finally:
            torch._foreach_copy_(self.live, kept)

    def state(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates), **{str(i): tensor for i, tensor in enumerate(self.mean)}}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        for i, tensor in enumerate(self.mean):
            tensor.copy_(state[str(i)])
