"""Optimisers, in the few lines that they are: torch.optim would import the compiler, 5 s before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot_engine.config import TrainConfig


class AdamW:
    """AdamW (Loshchilov and Hutter 2019).

    The last parameter is the scale: a single number, so it learns faster than weights do, and nothing pulls it to zero.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, config: TrainConfig, parameters: list[Tensor]) -> None:
        decay = 5e-4 if config.kind == "full" else 0.0
        weights, scale = parameters[:-1], parameters[-1:]
        self.groups = [(weights, config.learning_rate, decay), (scale, min(10 * config.learning_rate, 1e-2), 0.0)]
        self.moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self.squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], share: float) -> None:
        """One step at `share` of the learning rate; gradients in the order of the parameters."""
        self.steps += 1
        slow, slower = self.BETAS
        torch._foreach_lerp_(self.moments, gradients, 1 - slow)
        torch._foreach_mul_(self.squares, slower)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - slower)
        first = 0
        for parameters, rate, decay in self.groups:
            part = slice(first, first + len(parameters))
            first = part.stop
            rate *= share
            if decay:
                torch._foreach_mul_(parameters, 1 - rate * decay)
            divisors = torch._foreach_sqrt(self.squares[part])
            torch._foreach_div_(divisors, (1 - slower**self.steps) ** 0.5)
            torch._foreach_add_(divisors, self.EPSILON)
            torch._foreach_addcdiv_(parameters, self.moments[part], divisors, -rate / (1 - slow**self.steps))

    def state(self) -> dict[str, Tensor]:
        both = {"moments": self.moments, "squares": self.squares}
        tensors = {f"optimiser.{name}.{i}": tensor for name, kept in both.items() for i, tensor in enumerate(kept)}
        return {**tensors, "optimiser.steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, kept in (("moments", self.moments), ("squares", self.squares)):
            for i, tensor in enumerate(kept):
                tensor.copy_(state[f"{name}.{i}"])
        self.steps = int(state["steps"])
