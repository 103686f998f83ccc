"""Describe a saved bank: fill, age, norms, duplicates and examples of neighbours."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_bank.config import check_range
from memory_bank.retrieval.exact import Exact
from memory_bank.state import find_state, load_state, open_bank
from memory_bank.storage import Storage

# Largest number of rows whose duplicates are searched for; of more, evenly spaced ones are taken.
_EXAMINED = 20_000
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def inspect(
    path: Path,
    *,
    manifest: Path | None = None,
    duplicates: float = 0.99,
    examples: int = 5,
    neighbours: int = 5,
) -> dict[str, Any]:
    """Read the bank at ``path`` and describe it in plain values.

    Args:
        path: A run directory, a checkpoint directory, or a bank's file.
        manifest: csv with the columns row and key that names the rows; None looks for ``manifest.csv``
            beside the bank and above it.
        duplicates: Similarity from which two rows count as the same.
        examples: Rows whose neighbours are listed.
        neighbours: Number of neighbours of each.

    Raises:
        ValueError: no readable bank, a manifest without those columns, or an argument out of its range.
        OSError: from the file system.
    """
    check_range("duplicates", duplicates, -1, 1)
    check_range("examples", examples, 0)
    check_range("neighbours", neighbours, 1)
    file = find_state(path)
    state = load_state(file)
    try:
        bank, backend, num_issued = open_bank(state), _backend(state), len(_entries(state, "issued"))
    except ValueError as error:
        raise ValueError(f"{file}: not the state of a bank: {error}") from error
    names = _names(manifest or _beside(file))
    filled = torch.nonzero(bank.id >= 0)[:, 0]
    written = bank.written_at[filled]
    norms = bank.read(filled).norm(dim=1)
    # The squared norm bounds every product with another row, so all similarities searched are finite.
    finite = norms.square().isfinite()
    sound = filled[finite]
    return {
        "file": str(file),
        "kind": bank.kind,
        "capacity": bank.capacity,
        "dim": bank.dim,
        "dtype": str(bank.key.dtype).removeprefix("torch."),
        "rows": len(filled),
        "fill": len(filled) / bank.capacity,
        "refused": int(bank.refused),
        "last_step": int(written.max()) if len(filled) else None,
        "age": _quantiles((written.max() - written).float()) if len(filled) else None,
        "norm": _quantiles(norms[finite]) if len(sound) else None,
        "not_finite": int((~finite).sum()),
        "backend": backend,
        "look_ups_issued": num_issued,
        "duplicates": _duplicates(bank, sound, duplicates, names),
        "neighbours": _neighbours(bank, sound, examples, neighbours, names),
    }


def render(report: dict[str, Any]) -> str:
    """Format the description as text."""
    lines = [
        f"{report['file']}",
        f"  {report['kind']} bank, {report['capacity']} slots x {report['dim']}, {report['dtype']}",
        f"  fill      {report['fill']:.1%} ({report['rows']} rows), {report['refused']} keys refused, "
        f"{report['not_finite']} not finite",
        f"  search    {report['backend']}, {report['look_ups_issued']} look-ups issued ahead",
    ]
    for name in ("age", "norm"):
        if report[name] is not None:
            lines.append(
                f"  {name:9} " + "  ".join(f"{level} {value:.4g}" for level, value in report[name].items())
            )
    same = report["duplicates"]
    lines.append(
        f"  duplicates {same['rows']} of {same['examined']} rows have another at similarity "
        f">= {same['similarity']:g}"
    )
    lines += [f"    {pair['similarity']:.4f}  {pair['a']}  {pair['b']}" for pair in same["pairs"]]
    for example in report["neighbours"]:
        lines.append(f"  nearest to {example['row']}")
        lines += [f"    {near['similarity']:.4f}  {near['row']}" for near in example["nearest"]]
    return "\n".join(lines)


def _duplicates(bank: Storage, sound: Tensor, threshold: float, names: dict[int, str]) -> dict[str, Any]:
    examined = _spread(sound, _EXAMINED)
    best = _search(bank, sound, examined, 1) if len(examined) else None
    rows, pairs = 0, []
    if best is not None:
        similarity, slot = best.similarity[:, 0], best.slots[:, 0]
        same = similarity >= threshold
        rows = int(same.sum())
        closest = similarity.masked_fill(~same, -torch.inf).topk(min(10, rows)).indices
        closest_pairs = {
            tuple(sorted((int(examined[at]), int(slot[at])))): float(similarity[at]) for at in closest
        }
        pairs = [
            {"a": _name(bank, a, names), "b": _name(bank, b, names), "similarity": value}
            for (a, b), value in closest_pairs.items()
        ]
    return {"similarity": threshold, "examined": len(examined), "rows": rows, "pairs": pairs}


def _neighbours(
    bank: Storage, sound: Tensor, examples: int, count: int, names: dict[int, str]
) -> list[dict[str, Any]]:
    anchors = _spread(sound, examples)
    if not len(anchors):
        return []
    candidates = _search(bank, sound, anchors, count)
    listed = []
    for anchor, slots, similarity in zip(
        anchors.tolist(), candidates.slots, candidates.similarity, strict=True
    ):
        nearest = [
            {"row": _name(bank, slot, names), "similarity": value}
            for slot, value in zip(slots.tolist(), similarity.tolist(), strict=True)
            if slot >= 0
        ]
        listed.append({"row": _name(bank, anchor, names), "nearest": nearest})
    return listed


def _search(bank: Storage, sound: Tensor, slots: Tensor, k: int) -> Any:
    """Find neighbours of the rows in ``slots`` among ``sound`` rows of another id."""
    valid = torch.zeros_like(bank.id, dtype=torch.bool).index_fill(0, sound, True)
    parts = [
        Exact(bank).search(bank.read(part), bank.ids_of(part), k, admissible=valid)
        for part in torch.split(slots, 1024)
    ]
    whole = parts[0]
    whole.slots = torch.cat([part.slots for part in parts])
    whole.similarity = torch.cat([part.similarity for part in parts])
    return whole


def _spread(slots: Tensor, count: int) -> Tensor:
    """Return at most ``count`` of ``slots``, evenly spaced."""
    if len(slots) <= count:
        return slots
    return slots[torch.linspace(0, len(slots) - 1, count, dtype=torch.float64).long()]


def _quantiles(values: Tensor) -> dict[str, float]:
    ordered = values.sort().values
    return {f"q{level * 100:.0f}": float(ordered[round(level * (len(ordered) - 1))]) for level in _QUANTILES}


def _backend(state: dict[str, Any]) -> str:
    retrieval, name = _entries(state, "retrieval"), state.get("backend", "not said")
    recall = retrieval.get("recall", 0.0)
    if not isinstance(name, str) or not isinstance(recall, int | float):
        raise ValueError(f"backend is {name!r:.80}, recall {recall!r:.80}; text and a number are needed")
    if "recall" not in retrieval:
        return name
    trained = "centroids" in retrieval
    measured = f"recall {recall:.3f} when last measured"
    return f"{name}, {measured if trained else 'not trained yet'}"


def _entries(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an optional part of the state."""
    part = state.get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"{name} is {part!r:.80}, entries by name are needed")
    return part


def _beside(file: Path) -> Path | None:
    """Find the run's manifest.csv in the bank's folder or up to three folders above."""
    candidates = [folder / "manifest.csv" for folder in file.resolve().parents[:4]]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _names(manifest: Path | None) -> dict[int, str]:
    if manifest is None:
        return {}
    try:
        with manifest.open(newline="") as lines:
            return {int(line["row"]): line["key"] for line in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{manifest}: a csv with the columns row and key is needed ({error})") from error


def _name(bank: Storage, slot: int, names: dict[int, str]) -> str:
    row = int(bank.id[slot])
    return names.get(row, f"row {row}")
