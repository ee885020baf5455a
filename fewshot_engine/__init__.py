"""Few-shot image classification with prototypical networks (Snell et al. 2017); knows nothing of the site."""
