"""Features computed by two processes equal those of one, and one of them scores."""

import json
import os
import socket
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import eval.subject
from eval.__main__ import main
from tests import tiny
from tests.contrastive.ranks import run_ranks
from tests.eval.conftest import make_run


def evaluate(rank, run, port):
    """The command as torchrun starts it; returns exit code, stdout, and the decoded rows of this process."""
    dist.destroy_process_group()  # the command makes its own
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen, extract = [], eval.subject.extract

    def noted(module, images, *arguments, **options):
        seen.extend(images.rows.tolist())
        return extract(module, images, *arguments, **options)

    eval.subject.extract = noted
    out = StringIO()
    with redirect_stdout(out):
        code = main(["knn", f"checkpoint={run}", "device=cpu", "progress=false", "knn.k=[1]"])
    assert not dist.is_initialized()
    again = Path(run).parent / "again"
    dist.init_process_group("gloo", init_method=f"file://{again}", rank=rank, world_size=2)
    return {"code": code, "out": out.getvalue(), "seen": seen}


def test_two_processes_equal_one(tmp_path, capsys):
    # Odd shares, and in one of them nothing readable.
    for seed, (part, count) in enumerate((("train", 5), ("val", 1))):
        tiny.write_classes(tmp_path / "data" / part, count, names=("cat", "dog"), size=(20, 20), seed=seed)
    (tmp_path / "data/val/cat/0.png").write_bytes(b"no image")
    (tmp_path / "data/train/dog/2.png").write_bytes(b"no image")
    one, two = (
        make_run(tmp_path / name, name="imagefolder", root=str(tmp_path / "data")) for name in ("one", "two")
    )
    assert main(["knn", f"checkpoint={one}", "device=cpu", "progress=false", "knn.k=[1]"]) == 0
    capsys.readouterr()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = run_ranks(evaluate, tmp_path, str(two), port)
    assert (first["code"], second["code"]) == (0, 0)
    assert second["out"] == ""
    assert json.loads(first["out"])["protocol"] == "knn"
    train = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    for process, own, test in zip((first, second), train, ([0], [1]), strict=True):
        assert process["seen"] == 3 * (own + test)  # encoder, raw pixels, random encoder
    results = [json.loads((run / "eval" / "knn.json").read_text()) for run in (one, two)]
    assert results[0]["scores"] == results[1]["scores"]
    assert results[0]["data"]["unreadable"] == results[1]["data"]["unreadable"] == {"train": 1, "test": 1}
    caches = [{file.name: np.load(file) for file in (run / "eval/cache").iterdir()} for run in (one, two)]
    assert len(caches[0]) == 6
    for name, wanted in caches[0].items():
        found = caches[1][name]
        assert torch.equal(torch.tensor(found["rows"]), torch.tensor(wanted["rows"]))
        np.testing.assert_allclose(found["features"], wanted["features"], rtol=1e-5, atol=1e-6)
