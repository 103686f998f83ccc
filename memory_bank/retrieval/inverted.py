"""Build, fill and save FAISS inverted-file indexes as raw tensors, without FAISS's own file format.

FAISS's reader trusts the bytes it is given (facebookresearch/faiss #5400); tensors can be checked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Its annotations cover only some of its classes.
faiss: Any = _faiss

# Number of queries from which FAISS multiplies matrices instead of looping; with its own default of 128000 it
# would hardly ever, measured 14 times slower for 256 queries.
faiss.cvar.distance_compute_blas_threshold = 20

# FAISS asks for at least this many training rows per centroid; more improve little.
ROWS_PER_LIST = 39
_PIECE = 65_536
_FACTORY = re.compile(r"IVF(?P<nlist>[1-9]\d*),(?P<code>Flat|SQ8|SQfp16|PQ[1-9]\d*(x\d+)?|RaBitQ)")


@dataclass
class Trained:
    """Hold the result of training: centroids of the lists, parameters of the code (empty if none)."""

    centroids: Tensor
    code: Tensor


def parse(factory: str) -> tuple[int, str]:
    """Return number of lists and code of a factory string.

    Raises:
        ValueError: an index whose vectors cannot be replaced in place, or not an index.
    """
    match = _FACTORY.fullmatch(factory)
    if match is None:
        raise ValueError(
            f"mining.index={factory!r}: allowed are auto, Flat and IVF<lists>,<code> with code Flat, SQ8, "
            "SQfp16, PQ<bytes> or RaBitQ, e.g. IVF1024,SQ8; HNSW and FastScan cannot replace vectors"
        )
    return int(match["nlist"]), match["code"]


def rows_looked_up(code: str, k: int) -> int:
    """Return how many rows to request from the index, so that they contain the best ``k``.

    Coarse codes rank badly; flat and scalar codes cost no measurable recall.
    """
    return 4 * k if code.startswith(("PQ", "RaBitQ")) else k


def code_bytes(factory: str, dim: int) -> int:
    """Return the bytes of a row's code."""
    return int(_empty(factory, dim).code_size)


class Cancelled(Exception):
    """Raised in a training that was cancelled."""


def train(
    factory: str, rows: NDArray[np.float32], seed: int, cancelled: Callable[[], bool] = lambda: False
) -> Trained:
    """Train centroids (k-means) and code on ``rows``; deterministic for one FAISS build and thread count.

    Raises:
        Cancelled: ``cancelled()``, called before each round of k-means, returned True.
    """
    index = _empty(factory, rows.shape[1])
    index.quantizer.add(_centroids(rows, index, seed, cancelled))  # existing centroids are not trained again
    if hasattr(index, "pq"):  # no search here uses it, and it takes most of the time
        index.do_polysemous_training = False
    index.train(rows)
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    return Trained(torch.from_numpy(centroids.copy()), torch.from_numpy(_code_parameters(index)))


def _centroids(
    rows: NDArray[np.float32], index: Any, seed: int, cancelled: Callable[[], bool]
) -> NDArray[np.float32]:
    """Run k-means round by round: one FAISS call for all rounds could not be cancelled."""
    once = faiss.ClusteringParameters()
    once.niter, once.seed, once.spherical = 1, seed % (1 << 31), True
    once.max_points_per_centroid = 2 * ROWS_PER_LIST
    clustering = faiss.Clustering(index.d, index.nlist, once)
    for _ in range(index.cp.niter):
        if cancelled():
            raise Cancelled
        clustering.train(rows, faiss.IndexFlatIP(index.d))  # continues from its current centroids
    return _values(clustering.centroids).reshape(index.nlist, index.d)


def assign(trained: Trained, rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the list of each row: that of its most similar centroid."""
    quantizer = faiss.IndexFlatIP(trained.centroids.shape[1])
    quantizer.add(trained.centroids.numpy())
    lists: NDArray[np.int64] = quantizer.search(rows, 1)[1][:, 0]
    return lists


def fill(
    factory: str,
    trained: Trained,
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    slots: NDArray[np.int64],
    lists: NDArray[np.int64],
    dim: int,
) -> Any:
    """Build an index of the rows that ``read`` returns for ``slots``, appended to their lists in order."""
    index = _empty(factory, dim)
    if tuple(trained.centroids.shape) != (index.nlist, index.d):
        raise ValueError(
            f"centroids {tuple(trained.centroids.shape)}: mining.index={factory!r} of dimension {index.d} "
            f"needs ({index.nlist}, {index.d})"
        )
    if not ((lists >= 0) & (lists < index.nlist)).all():
        raise ValueError(f"a row is in none of the {index.nlist} lists; the index's state is damaged")
    index.quantizer.add(trained.centroids.numpy())
    _set_code_parameters(index, trained.code.numpy())
    index.is_trained = True
    # A hash table: slots may be missing, and a vector is replaced by removing and adding it.
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    for part, numbers in zip(pieces(slots), pieces(lists), strict=True):
        # Through names: swig_ptr keeps no reference, a temporary would be freed before it is read.
        arrays = [np.ascontiguousarray(array) for array in (read(part), part, numbers)]
        index.add_core(len(part), *(faiss.swig_ptr(array) for array in arrays))
    return index


def pieces(slots: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split ``slots``, so that float32 rows of all of them are never in memory at once."""
    return [slots[start : start + _PIECE] for start in range(0, len(slots), _PIECE)]


def row_lists(index: Any) -> tuple[Tensor, Tensor]:
    """Return slots in list order, and list lengths; with Trained and the bank this is the whole index."""
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    parts = [
        faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy() if size else np.zeros(0, np.int64)
        for number, size in enumerate(sizes)
    ]
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(sizes)


def _empty(factory: str, dim: int) -> Any:
    code = parse(factory)[1]
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"mining.index={factory!r}: FAISS cannot make it for dimension {dim}; "
            f"{code} needs a number of parts that divides the dimension, e.g. PQ{max(1, dim // 4)}"
        ) from error


def _code_parameters(index: Any) -> NDArray[np.float32]:
    if hasattr(index, "sq"):
        return _values(index.sq.trained)
    if hasattr(index, "pq"):
        return _values(index.pq.centroids)
    return np.zeros(0, np.float32)


def _set_code_parameters(index: Any, values: NDArray[np.float32]) -> None:
    # FAISS reads as many values as it needs, past the end if there are fewer, so the number is checked here.
    needed = 0
    if hasattr(index, "pq"):
        needed = index.pq.centroids.size()
    elif hasattr(index, "sq") and index.sq.qtype == faiss.ScalarQuantizer.QT_8bit:
        needed = 2 * index.d
    if values.shape != (needed,):
        raise ValueError(
            f"code parameters of shape {values.shape}: ({needed},) is needed; the state is damaged"
        )
    if needed:
        faiss.copy_array_to_vector(values, (index.pq.centroids if hasattr(index, "pq") else index.sq.trained))


def _values(vector: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = faiss.vector_to_array(vector)
    return values
