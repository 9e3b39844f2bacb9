"""k-means, which is scikit-learn's."""

import importlib
from typing import Any

import torch
from torch import Tensor


def k_means(points: Tensor, clusters: int, restarts: int = 20, seed: int = 0) -> Tensor:
    """The cluster of each point [N, D], int64 [N]: the best of `restarts` runs from k-means++ starts."""
    if clusters > len(points):
        raise ValueError(f"{len(points)} points do not make {clusters} clusters")
    found = scikit("cluster").KMeans(clusters, n_init=restarts, random_state=seed)
    return torch.as_tensor(found.fit_predict(points.detach().double().cpu().numpy()), dtype=torch.int64)


def scikit(module: str) -> Any:
    """sklearn.<module>, which is asked for only where it is used."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise ImportError('scikit-learn is not installed: pip install "fdiv[scikit]"') from None
