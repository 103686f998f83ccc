import pytest
import torch

from contrastive.distributed import (
    Collectives,
    all_true,
    from_first_rank,
    gather_rows,
    gather_sizes,
    gather_with_grad,
    rows_of_first_rank,
    world_size,
)
from contrastive.distributed import rank as own_rank
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import build_miner
from memory_bank.negatives import Negatives
from tests.contrastive.ranks import run_ranks
from tests.memory_bank import test_sharded


def rows_of(rank, b):
    return torch.arange(b * 3, dtype=torch.float32).reshape(b, 3) + 100 * rank


def collect(rank):
    """Everything the collectives give on this rank; compared in the test's own process."""
    results = {"world": world_size(), "rank": own_rank()}
    for label, sizes in {"equal": (2, 2), "unequal": (1, 3), "empty": (0, 2)}.items():
        rows = rows_of(rank, sizes[rank]).requires_grad_()
        results[f"{label} sizes"] = gather_sizes(len(rows), rows.device)
        results[f"{label} rows"] = gather_rows(rows)
        results[f"{label} ids"] = gather_rows(torch.full((len(rows),), rank), sizes)
        results[f"{label} flags"] = gather_rows(rows.detach()[:, 0] % 2 == 0)
        gathered = gather_with_grad(rows)
        results[f"{label} equal"] = torch.equal(gathered.detach(), results[f"{label} rows"])
        # Rank r weighs gathered row i by (r + 1) (i + 1).
        ((rank + 1) * torch.arange(1, len(gathered) + 1)[:, None] * gathered).sum().backward()
        results[f"{label} gradient"] = rows.grad
    results |= exchange(rank)
    for name, mining in MINED.items():
        results[name] = mined(mining, talk=Collectives())
    results["first"] = from_first_rank(10**12 + rank, torch.device("cpu"))
    results["from first"] = rows_of_first_rank(torch.arange(3) + 10 * rank)
    results["both"] = all_true(torch.tensor(True))
    results["one"] = all_true(torch.tensor(rank == 0))
    results["gathered grad"] = results["unequal rows"].requires_grad
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(collect, tmp_path_factory.mktemp("ranks"))


def exchange(rank):
    """Rank 0 sends one row to itself and two to rank 1, rank 1 none and three."""
    talk = Collectives()
    sizes = ((1, 2), (0, 3))[rank]
    results = {"place": (talk.rank, talk.world)}
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
        parts = [torch.full((size, 3), 2 * rank + to).to(dtype) for to, size in enumerate(sizes)]
        results[f"swap {dtype}"] = talk.swap(parts)
    results["swap ids"] = talk.swap([torch.full((size,), 2 * rank + to) for to, size in enumerate(sizes)])
    results["gather"] = talk.gather(rows_of(rank, 1 + rank))
    results["total"] = talk.total(torch.tensor([rank, 5]))
    return results


MINED = {
    "stored, overlapped, inverted file": {
        "query": "stored",
        "overlap": True,
        "lag": 2,
        "min_fill": 0.5,
        "recall_every": 3,
        "backend": "faiss",
        "index": "IVF2,Flat",
        "nprobe": 1,
        "min_recall": 0.99,
    },
    "all rows": {"method": "all_rows", "min_fill": 0.3},
    "estimate": {"method": "full_bank", "min_fill": 0.3},
    "queue": {"min_fill": 0.3, "band": [0.0, 0.4]},
}


def mined(mining, talk=None):
    """Negatives of this rank's share of each step, and what is saved."""
    bank = {"kind": "queue", "capacity": 170} if mining == MINED["queue"] else {}
    miner = test_sharded.make(MiningConfig(num_hard=5, num_uniform=9, **mining), talk, **bank)
    rank, world = (0, 1) if talk is None else (talk.rank, talk.world)
    found = test_sharded.steps(miner, rank, world, last=9)
    state = miner.state_dict()
    miner.close()
    return {
        "found": [vars(each) for each in found],
        "bank": state["bank"],
        "metrics": miner.retrieval.metrics(),
    }


@pytest.mark.parametrize("name", MINED)
def test_a_bank_in_two_processes_mines_as_one(ranks, name):
    one = mined(MINED[name])
    shares = [[Negatives(**each) for each in rank[name]["found"]] for rank in ranks]
    test_sharded.assert_equal([Negatives(**each) for each in one["found"]], shares)
    assert all(rank[name]["metrics"] == one["metrics"] for rank in ranks)
    saved = ranks[0][name]["bank"]
    assert saved.keys() == one["bank"].keys()
    assert all(torch.equal(saved[key], value) for key, value in one["bank"].items() if key != "kind")


CASES = {"equal": (2, 2), "unequal": (1, 3), "empty": (0, 2)}


def test_who_is_who(ranks):
    assert [result["rank"] for result in ranks] == [0, 1]
    assert [result["world"] for result in ranks] == [2, 2]


@pytest.mark.parametrize("label", CASES)
def test_rows_come_by_rank_without_padding(ranks, label):
    sizes = CASES[label]
    rows = torch.cat([rows_of(rank, b) for rank, b in enumerate(sizes)])
    for result in ranks:
        assert result[f"{label} sizes"] == list(sizes)
        assert torch.equal(result[f"{label} rows"], rows)
        assert result[f"{label} ids"].tolist() == [0] * sizes[0] + [1] * sizes[1]
        assert torch.equal(result[f"{label} flags"], rows[:, 0] % 2 == 0)
        assert result[f"{label} flags"].dtype == torch.bool
        assert not result["gathered grad"]


@pytest.mark.parametrize("label", CASES)
def test_a_row_gets_the_gradients_of_all_ranks(ranks, label):
    sizes = CASES[label]
    for rank, result in enumerate(ranks):
        start = sum(sizes[:rank])
        places = torch.arange(start + 1, start + sizes[rank] + 1, dtype=torch.float32)
        expected = ((1 + 2) * places)[:, None].expand(-1, 3)
        assert result[f"{label} equal"]
        assert torch.equal(result[f"{label} gradient"], expected)


def test_an_exchange_swaps_gathers_and_sums(ranks):
    for me, result in enumerate(ranks):
        assert result["place"] == (me, 2)
        sizes = [(1, 2)[me], (0, 3)[me]]
        for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
            for sender, got in enumerate(result[f"swap {dtype}"]):
                assert torch.equal(got, torch.full((sizes[sender], 3), 2 * sender + me).to(dtype))
        assert [got.tolist() for got in result["swap ids"]] == [
            [2 * sender + me] * size for sender, size in enumerate(sizes)
        ]
        assert all(torch.equal(rows, rows_of(r, 1 + r)) for r, rows in enumerate(result["gather"]))
        assert result["total"].tolist() == [1, 10]


def test_a_flag_holds_only_if_it_holds_everywhere(ranks):
    assert all(bool(result["both"]) for result in ranks)
    assert not any(bool(result["one"]) for result in ranks)


def test_the_number_of_the_first_rank_is_everybodys(ranks):
    assert [result["first"] for result in ranks] == [10**12] * 2
    assert from_first_rank(7, torch.device("cpu")) == 7


def test_the_rows_of_the_first_rank_reach_all(ranks):
    assert [result["from first"].tolist() for result in ranks] == [[0, 1, 2]] * 2


def test_one_process_is_the_identity():
    from contrastive.distributed import (
        Collectives,
        all_true,
        gather_rows,
        gather_sizes,
        gather_with_grad,
        rank,
        world_size,
    )

    rows = rows_of(0, 4).requires_grad_()
    talk = Collectives()
    assert (talk.rank, talk.world, talk.total(rows)) == (0, 1, rows)
    assert torch.equal(talk.swap([rows])[0], rows)
    assert torch.equal(talk.gather(rows)[0], rows)
    assert (rank(), world_size(), gather_sizes(4, rows.device)) == (0, 1, [4])
    assert gather_with_grad(rows) is rows
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert bool(all_true(torch.tensor(True)))
    assert not bool(all_true(torch.tensor(False)))


def test_a_part_of_the_bank_can_be_planned_before_the_ranks_are_there():
    miner = build_miner(
        BankConfig(placement="sharded"),
        MiningConfig(),
        rows=10,
        dim=4,
        seed=0,
        device=torch.device("cpu"),
        exchange=Collectives(0, 4),
    )
    assert miner.bank.local.capacity == 3


def fail_on_rank_one(rank):
    if rank == 1:
        raise RuntimeError("rank one fails on purpose")


def test_the_harness_reports_a_failing_rank(tmp_path):
    with pytest.raises(Exception, match="rank one fails on purpose"):
        run_ranks(fail_on_rank_one, tmp_path)
