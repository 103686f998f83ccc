"""Write and parse mined.csv: the hardest negatives, mined or of the batch, by file and similarity."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from torch import Tensor

from memory_bank.replacing import replacing


@dataclass(frozen=True)
class HardNegative:
    """A negative of an anchor; the fields are the columns of mined.csv."""

    anchor_row: int  # of the data set
    anchor_key: str  # its file
    rank: int  # 0: the most similar of the anchor's negatives
    negative_row: int
    negative_key: str
    similarity: float

    @classmethod
    def parse(cls, row: Mapping[str, str]) -> "HardNegative":
        """Read a row of mined.csv.

        Raises:
            KeyError, TypeError, ValueError: a column is missing, or not a number.
        """
        anchor, rank, negative = (int(row[name]) for name in ("anchor_row", "rank", "negative_row"))
        similarity = float(row["similarity"])
        return cls(anchor, row["anchor_key"], rank, negative, row["negative_key"], similarity)

    def same_label(self, labels: Tensor | None) -> bool:
        """Return whether both rows have the same known label, so that it is probably a false negative."""
        rows = (self.anchor_row, self.negative_row)
        if labels is None or min(rows) < 0 or max(rows) >= len(labels):
            return False
        first, second = (int(labels[row]) for row in rows)
        return first == second >= 0


def write_mined(path: Path, rows: Iterable[HardNegative]) -> None:
    """Write mined.csv; a reader sees the old file or the new one."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(HardNegative))
        for row in rows:
            writer.writerow([*astuple(row)[:-1], f"{row.similarity:.4f}"])
