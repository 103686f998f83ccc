"""Rank a gallery for each query through the bank's retrieval code, and score the rankings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eval.finite import finite_float32
from memory_bank.backend import choose_backend
from memory_bank.config import MiningConfig
from memory_bank.retrieval.base import Retrieval
from memory_bank.retrieval.exact import Exact
from memory_bank.retrieval.ivf import Ivf, recall
from memory_bank.storage import DatasetBank

_CELLS = 1 << 22  # of a block of queries x ranks
_CHECKED = 256  # queries by which recall is measured


@dataclass(frozen=True)
class People:
    """Who is on each picture of a part.

    Attributes:
        identity: Number of the identity.
        camera: Number of the camera, 0 where none are known.
        row: The picture's own row of the gallery, -1 if it is not in the gallery.
    """

    identity: Int[Tensor, " n"]
    camera: Int[Tensor, " n"]
    row: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.identity)

    def take(self, index: Int[Tensor, " m"]) -> "People":
        """Return some of the pictures."""
        return People(self.identity[index], self.camera[index], self.row[index])


class Ranking(NamedTuple):
    """Rankings of some queries, closest first.

    Attributes:
        rows: Gallery rows, -1 where fewer were found.
        similarity: Their cosines.
        valid: Whether the entry counts, or is left out by the protocol.
        right: Whether it counts and has the query's identity.
        relevant: Number of right entries in the whole gallery.
    """

    rows: Int[Tensor, "m k"]
    similarity: Float[Tensor, "m k"]
    valid: Bool[Tensor, "m k"]
    right: Bool[Tensor, "m k"]
    relevant: Int[Tensor, " m"]


def score_rankings(found: Ranking, ks: Sequence[int]) -> dict[str, Float[Tensor, " m"]]:
    """Compute R@k, AP and INP of each query, as re-identification defines them.

    R@k: whether one of the first k valid entries is right. AP: the mean, over the right entries, of right by
    valid entries down to that one (Zheng et al. 2015, "Scalable person re-identification", section 5). INP:
    right by valid entries down to the last right one (Ye et al. 2021, arXiv:2001.04193, section 4.1); 0 if
    that one was not found.

    Args:
        found: Rankings; what the gallery has and they lack counts as never found.
        ks: The k of R@k.

    Returns:
        Float64 values in [0, 1] by ``R@k``, ``mAP`` and ``mINP``; nan for a query without a right entry.
    """
    place, hits, relevant = found.valid.cumsum(1), found.right.cumsum(1), found.relevant.double()
    scores = {f"R@{k}": (found.right & (place <= k)).any(1).double() for k in ks}
    precision = torch.where(found.right, hits.double() / place.clamp_min(1), 0.0)
    scores["mAP"] = precision.sum(1) / relevant
    last = torch.where(found.right, place, 0).amax(1).clamp_min(1)
    scores["mINP"] = torch.where(found.right.sum(1) == found.relevant, relevant / last, 0.0)
    return {name: values.masked_fill(relevant == 0, torch.nan) for name, values in scores.items()}


class Gallery:
    """A gallery of entries to search.

    Args:
        features: Features of its pictures, of any norm.
        people: Who is on them.
        cameras: Whether cameras are known; then a query finds no entry of its identity by its own camera
            (Zheng et al. 2015).
        kind: ``each`` picture is an entry; or one for an identity (and camera): ``single``, a picture drawn
            by ``seed``; ``mean``, the mean of its unit features; ``best``, its closest picture.
        seed: Decides the pictures of ``single``.

    Attributes:
        features: Unit rows of the entries.
        people: Who they are.
        row: Picture of each entry, for ``mean`` one of them.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        people: People,
        *,
        cameras: bool,
        kind: str = "each",
        seed: int = 0,
    ) -> None:
        self.features = F.normalize(finite_float32(features, "gallery"))
        self.people, self.row = people, torch.arange(len(people))
        self._cameras, self._one_each = cameras, kind == "best"
        self._num_cameras = int(people.camera.max()) + 1
        if kind in ("single", "mean"):
            self._merge(kind, seed)
        names = self._names(self.people)
        self._names_sorted = torch.unique(names) if self._one_each else names.sort().values
        self._identities_sorted = self._names_sorted // self._num_cameras

    def __len__(self) -> int:
        return len(self.people)

    def judge(self, slots: Int[Tensor, "m k"], similarity: Float[Tensor, "m k"], asking: People) -> Ranking:
        """Say which of the entries found for some queries count, and which are right."""
        known = self.people.take(slots.clamp_min(0).flatten())
        shape = slots.shape
        same = known.identity.view(shape) == asking.identity[:, None]
        valid = slots >= 0
        if self._cameras:
            valid &= ~(same & (known.camera.view(shape) == asking.camera[:, None]))
        if self._one_each:
            valid &= _first(self._names(known).view(shape).masked_fill(~valid, -1))
        return Ranking(slots, similarity, valid, same & valid, self._relevant(asking))

    def _merge(self, kind: str, seed: int) -> None:
        _, group, sizes = torch.unique(self._names(self.people), return_inverse=True, return_counts=True)
        order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
        self.row = torch.empty(len(sizes), dtype=torch.int64).index_copy_(0, group[order], order)
        if kind == "mean":
            sums = torch.zeros(len(sizes), self.features.shape[1]).index_add_(0, group, self.features)
            self.features = F.normalize(sums)
        else:
            self.features = self.features[self.row]
        self.people = self.people.take(self.row)

    def _names(self, people: People) -> Int[Tensor, " n"]:
        """Return a number for each pair of identity and camera."""
        return people.identity * self._num_cameras + people.camera.clamp_max(self._num_cameras - 1)

    def _relevant(self, asking: People) -> Int[Tensor, " m"]:
        """Count the entries that each query should find."""
        total = _count(self._identities_sorted, asking.identity)
        if self._cameras:
            seen = asking.camera < self._num_cameras  # another camera has no entry
            return total - torch.where(seen, _count(self._names_sorted, self._names(asking)), 0)
        if self._one_each:
            pictures = _count(self.people.identity.sort().values, asking.identity)
            return torch.where((asking.row >= 0) & (pictures == 1), 0, total)
        return total - (asking.row >= 0).long()


def _count(ordered: Int[Tensor, " n"], values: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Count how often each value is in an ascending list."""
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _first(names: Int[Tensor, "m k"]) -> Bool[Tensor, "m k"]:
    """Mark the first of equal names in each row."""
    ordered, order = names.sort(dim=1, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(starts).scatter_(1, order, starts)


class Search:
    """Search a gallery through the memory bank.

    Args:
        gallery: What is searched.
        queries: Features of the queries; by some of them the recall of an approximate search is measured.
        depth: Ranks that are looked at. All of the gallery is searched exactly; less, by what the bank's
            ``mining.backend=auto`` takes: from 65,536 entries on an inverted file.
        min_recall: Least share of the closest entries to find; lists are added until it is reached.

    Attributes:
        depth: As given, at most the size of the gallery.
        recall: Share of the closest ``depth`` entries that were found; 1 for an exact search.
        about: Description of the search.
    """

    def __init__(
        self, gallery: Gallery, queries: Float[Tensor, "m d"], *, depth: int, min_recall: float = 0.95
    ) -> None:
        size = len(gallery.features)
        self.gallery, self.depth, self.recall = gallery, min(depth, size), 1.0
        self._bank = DatasetBank.of(gallery.features)
        self._admissible = self._bank.admissible(0)
        self._search: Retrieval = Exact(self._bank)
        if self.depth < size:
            closest = MiningConfig(num_hard=self.depth, num_uniform=0, band=[0.0, 1e-6], min_fill=1.0)
            self._search = choose_backend(closest, self._bank, seed=0)
            self._search.update(torch.arange(size))
        if isinstance(self._search, Ivf):
            some = queries[:: -(-len(queries) // _CHECKED)]
            self._reach(self._search, F.normalize(finite_float32(some, "query")), min_recall)
        self.about = self._search.describe()

    def rank(self, queries: Float[Tensor, "m d"], people: People) -> Iterator[Ranking]:
        """Yield the rankings of some queries at a time; a query does not find its own picture."""
        blocks = torch.split(torch.arange(len(people)), max(1, _CELLS // self.depth))
        for block in blocks:
            asking = people.take(block)
            unit = F.normalize(finite_float32(queries[block], "query"))
            found = self._search.search(unit, asking.row, self.depth, admissible=self._admissible)
            yield self.gallery.judge(found.slots, found.similarity, asking)

    def _reach(self, search: Ivf, queries: Float[Tensor, "m d"], least: float) -> None:
        """Visit more lists until enough of the closest entries are found."""
        outside = torch.full((len(queries),), -1)
        closest = Exact(self._bank).search(queries, outside, self.depth, admissible=self._admissible)
        while True:
            found = search.search(queries, outside, self.depth, admissible=self._admissible)
            self.recall = recall(found, closest)
            if self.recall >= least or search.nprobe >= search.nlist:
                return
            search.nprobe = min(2 * search.nprobe, search.nlist)
