"""Export the features of a data set, with the id and the file path of each image."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.config import UserError
from contrastive.data.dataset import open_dataset
from contrastive.data.images import Images
from contrastive.export.config import ExportConfig
from contrastive.export.source import ExportedEncoder
from eval.config import EvalConfig
from eval.eval_data import choose_data
from eval.features import choose_device, extract, num_decoders
from memory_bank.replacing import write_file

Columns = dict[str, Any]  # NumPy arrays of equal length


def write_embeddings(config: ExportConfig, source: ExportedEncoder, out: Path) -> dict[str, Any]:
    """Write columns ``id`` (data set row), ``path``, ``label`` (if there are labels) and ``embedding``."""
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"out={config.out}: pyarrow is not installed; pip install pyarrow, or end in .npz")
    asked = EvalConfig(checkpoint=config.checkpoint, data=config.data)
    data = choose_data(asked, source.run, source.input)
    dataset = open_dataset(data)
    images = dataset.train if config.part == "train" else dataset.test
    if images is None:
        raise UserError(
            f"part=test: data.name={data.name} has no test part, all of its images are in part=train; use "
            "that, or a data set with classes (data.name=imagefolder data.root=DIR)"
        )
    features, rows = extract(
        source.encoder,
        images,
        data,
        batch_size=config.batch_size,
        num_workers=num_decoders(data, len(images)),
        device=choose_device(config.device),
        title="embeddings" if config.progress else "",
    )
    if not len(rows):
        raise UserError(f"none of the {len(images)} images can be read; check data.root and the files")
    columns = _columns(images, features, rows)
    (_write_parquet if out.suffix == ".parquet" else _write_npz)(out, columns)
    return {
        "data": {"name": data.name, "root": data.root, "part": config.part},
        "rows": len(rows),
        "unreadable": len(images) - len(rows),
        "load": _lines(out),
    }


def _columns(images: Images, features: torch.Tensor, rows: torch.Tensor) -> Columns:
    columns = {"id": rows.numpy(), "path": np.array([images.key(row) for row in rows.tolist()])}
    if images.labels is not None:
        columns["label"] = images.labels[rows].numpy()
    return columns | {"embedding": features.numpy()}


def _write_npz(out: Path, columns: Columns) -> None:
    def save(file: Any) -> None:
        np.savez(file, **columns)

    write_file(out, save)


def _write_parquet(out: Path, columns: Columns) -> None:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    width = columns["embedding"].shape[1]
    flat = arrow.array(columns["embedding"].ravel())
    plain = {name: arrow.array(values) for name, values in columns.items() if name != "embedding"}
    table = arrow.table(plain | {"embedding": arrow.FixedSizeListArray.from_arrays(flat, width)})
    write_file(out, lambda file: parquet.write_table(table, file))


def _lines(out: Path) -> list[str]:
    if out.suffix == ".parquet":
        return ["import pandas", f"table = pandas.read_parquet({out.name!r})  # id, path, label, embedding"]
    return [
        "import numpy",
        f'table = numpy.load({out.name!r})  # table["embedding"][i] is of table["path"][i]',
    ]
