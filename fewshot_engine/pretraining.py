"""Learning the base classes as such before the first episode: Baseline++ of Chen et al. 2019, a cosine classifier.

Deep networks find good features sooner by telling all of the base classes apart than by episodes of a few of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fewshot_engine.config import TrainConfig
from fewshot_engine.losses import FIRST_SCALE
from fewshot_engine.networks import Network
from fewshot_engine.optimisers import Optimiser, cosine


class Pretraining:
    """Where the stage is: the classifier, its optimiser, and how many steps are done. The network is the learner's."""

    def __init__(self, config: TrainConfig, network: Network, labels: NDArray[np.int64], device: torch.device) -> None:
        """`labels`: (n,), -1 for photos to leave alone."""
        self.config, self.network, self.device = config, network, device
        self.photos = torch.from_numpy(np.flatnonzero(labels >= 0))
        names, classes = np.unique(labels[labels >= 0], return_inverse=True)
        self.classes = torch.from_numpy(classes)
        dim = network.entry.dim(config.image_size)
        generator = torch.Generator().manual_seed(config.seed)
        self.weights = F.normalize(torch.randn(len(names), dim, generator=generator), dim=1).to(device)
        self.weights.requires_grad_()
        self.log_scale = torch.tensor(math.log(FIRST_SCALE), device=device, requires_grad=True)
        self.parameters = [*network.parameters(), self.weights, self.log_scale]
        self.optimiser = Optimiser(config, self.parameters, rate=config.pretrain_learning_rate)
        self.done = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: batch normalisation of what is left over would be noise."""
        return max(1, len(self.photos) // self.config.pretrain_batch)

    @property
    def steps(self) -> int:
        return self.config.pretrain_epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs begun, from 1."""
        return min(self.config.pretrain_epochs, self.done // self.steps_per_epoch + 1)

    def step(self) -> tuple[Tensor, Tensor, int]:
        """Loss, accuracy, and of how many photos."""
        epoch, batch = divmod(self.done, self.steps_per_epoch)
        # Drawn anew from seed and epoch, so that the position is all there is to keep.
        order = torch.randperm(
            len(self.photos), generator=torch.Generator().manual_seed(self.config.seed * 1000 + epoch)
        )
        rows = order[batch * self.config.pretrain_batch :][: self.config.pretrain_batch]
        z = self.network.embed_training(self.photos[rows])  # (m, dim)
        cosines = z @ F.normalize(self.weights, dim=1).mT  # (m, n_classes)
        truth = self.classes[rows].to(self.device)
        loss = F.cross_entropy(self.log_scale.exp() * cosines, truth, label_smoothing=self.config.label_smoothing)
        gradients = torch.autograd.grad(loss, self.parameters)
        self.optimiser.step(gradients, cosine(self.done / self.steps))
        self.done += 1
        accuracy = (cosines.detach().argmax(dim=1) == truth).float().mean()
        return loss.detach(), accuracy, len(rows)

    def state(self) -> dict[str, Tensor]:
        kept = {"weights": self.weights, "log_scale": self.log_scale, "done": torch.tensor(self.done)}
        return {**kept, **{f"optimiser.{name}": tensor for name, tensor in self.optimiser.state().items()}}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.weights.copy_(state["weights"])
        self.log_scale.copy_(state["log_scale"])
        self.done = int(state["done"])
        self.optimiser.restore(
            {name.removeprefix("optimiser."): tensor for name, tensor in state.items() if name.startswith("optimiser.")}
        )
