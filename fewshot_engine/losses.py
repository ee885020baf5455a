"""The loss of an episode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_SCALE = 10.0  # of the cosines before the softmax; learned from there


def prototypical_loss(
    cosines: Tensor, *, way: int, shot: int, scale: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the query images over `scale` times their cosines to the prototypes.

    A prototype is the mean of its class's normalised support embeddings, so both its product with a query and its own
    length follow from the cosines between photos, and the embeddings themselves are not needed. Cosine with a learned
    scale (Gidaris and Komodakis 2018) instead of the squared Euclidean distance of Snell et al. 2017, because cosine is
    what the studio answers with.

    Args:
        cosines: (b, p, p) between the p = way x (shot + query) photos of an episode, class by class, support first.
        scale: scalar, above 0.
        label_smoothing: the share of the truth that is spread evenly over all ways (Szegedy et al. 2016).

    Returns:
        Loss and accuracy, means over all query images.
    """
    each = cosines.shape[1] // way
    by_class = cosines.view(-1, way, each, way, each)
    products = by_class[:, :, shot:, :, :shot].mean(dim=4)  # (b, way, query, way)
    lengths = (
        by_class[:, :, :shot, :, :shot].diagonal(dim1=1, dim2=3).mean(dim=(1, 2)).clamp(min=1e-8).sqrt()
    )  # (b, way)
    logits = scale * products / lengths[:, None, None]
    truth = torch.arange(way, device=logits.device).view(1, way, 1).expand(logits.shape[:3])
    accuracy = (logits.detach().argmax(dim=3) == truth).float().mean()
    loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), label_smoothing=label_smoothing)
    return loss, accuracy
