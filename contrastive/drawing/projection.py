"""Project features to two dimensions: principal components, t-SNE."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_FEWEST = 50  # rows of a t-SNE with perplexity 30


def principal_components(rows: Float[Tensor, "n d"], count: int = 2) -> Float[Tensor, "n c"]:
    """Project on the first ``count`` principal components; signs are fixed, so that maps can be compared.

    If there are fewer than ``count`` dimensions, the rest is 0.
    """
    centred = rows.double() - rows.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :count]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    projected = centred @ (axes * largest.sign())
    return F.pad(projected, (0, count - projected.shape[1])).float()


def embed(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n 2"], str]:
    """Map features to a plane; return the points and the method: t-SNE, or PCA for fewer than 50 rows.

    PCA is also used if scikit-learn cannot be imported.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return principal_components(features), "PCA"
    if len(features) < _FEWEST:
        return principal_components(features), "PCA"
    flat = principal_components(features, min(_FEWEST, features.shape[1]))
    return torch.from_numpy(
        TSNE(init="pca", random_state=0, perplexity=30).fit_transform(flat.numpy())
    ), "t-SNE"
