import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import build_miner
from tests.memory_bank.worlds import BATCH, CPU, DIM, ROWS, World, assert_equal, miner, run, unit
from tests.reference.bank import nearest, policy_window

POLICIES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["ranked", "ranked", "all_rows", "full_bank"]),
        "backend": st.sampled_from(["exact", "faiss", "inverted", "subsample", "auto"]),
        "sample": st.sampled_from([20, 1000]),
        "num_hard": st.integers(0, 9),
        "num_uniform": st.integers(0, 9),
        "band": st.sampled_from([[0.0, 0.05], [0.0, 0.000001], [0.1, 0.3]]),
        "band_end": st.sampled_from([None, [0.2, 0.4]]),
        "band_steps": st.just(9),
        "class_prior": st.sampled_from([0.0, 0.1]),
        "skip_top": st.sampled_from([None, 0.02]),
        "false_negative": st.sampled_from(["off", "drop", "attract"]),
        "false_negative_threshold": st.sampled_from([0.3, 0.8]),
        "refill": st.booleans(),
        "min_similarity": st.sampled_from([None, -0.2]),
        "max_similarity": st.sampled_from([None, 0.8]),
        "absolute_margin": st.sampled_from([None, 0.1]),
        "relative_margin": st.sampled_from([None, 0.0, 0.3]),
        "min_fill": st.sampled_from([0.0, 0.25, 1.0]),
        "query": st.sampled_from(["fresh", "stored"]),
        "lag": st.integers(1, 3),
        "overlap": st.booleans(),
    }
)
BANKS = st.sampled_from([{}, {"max_age": 3}, {"kind": "queue", "capacity": 40}])


@settings(max_examples=40, deadline=None)
@given(POLICIES, BANKS, st.integers(0, 5))
def test_what_may_not_come_back_never_does(policy, bank, seed):
    """Own id, missing, empty, over-age and refused rows, over random policies and steps."""
    policy = possible(policy, bank)
    world = World(seed)
    subject = miner(world, bank, **policy)
    written = {}
    for step in range(14):
        ids, query, key = world.step(step)
        found = subject.negatives(query, key, ids, step)
        check(found, ids, set(written) | set(ids.tolist()), twice=bank.get("kind") == "queue")
        own = subject.bank.read(subject.bank.slots_of(ids))[:, None]
        assert not ((found.extra_positives == own).all(2) & (found.extra_positive_weight > 0)).any()
        max_age = bank.get("max_age")
        if max_age is not None:
            old = {row for row, at in written.items() if step - at > max_age} - set(ids.tolist())
            assert not old & used_ids(found)
        key = key.clone()
        if step % 3 == 1:
            key[0] = torch.nan
        subject.write(key, ids, step)
        for position, row in enumerate(ids.tolist()):
            if not (step % 3 == 1 and position == 0):
                written[row] = step
    subject.close()


def possible(policy, bank):
    """The nearest policy that is not refused."""
    policy = dict(policy)
    if bank.get("kind") == "queue" or policy["method"] == "all_rows":
        policy["query"] = "fresh"
    if policy["method"] == "ranked" and not policy["num_hard"]:
        policy["num_uniform"] = max(1, policy["num_uniform"])
    if policy["query"] == "fresh":
        policy["overlap"] = False
    if policy["backend"] == "subsample" and policy["false_negative"] == "attract":
        policy["false_negative"] = "drop"
    if policy["backend"] == "inverted":
        lists = 1 if bank.get("kind") == "queue" else 2
        policy |= {"backend": "faiss", "index": f"IVF{lists},SQ8", "nprobe": 1}
        policy |= {"min_fill": 1.0 if lists == 1 else 0.85, "recall_every": 4, "min_recall": 0.99}
    return policy


def used_ids(found):
    hard = found.hard_ids[found.hard_log_weight > -torch.inf]
    shared = found.shared_ids[(found.shared_log_weight > -torch.inf).any(0)]
    return set(hard.tolist()) | set(shared.tolist())


def check(found, ids, allowed, twice):
    own = ids[:, None]
    assert not ((found.hard_ids == own) & (found.hard_log_weight > -torch.inf)).any()
    assert not ((found.shared_ids[None] == own) & (found.shared_log_weight > -torch.inf)).any()
    assert used_ids(found) <= allowed
    attracted = found.extra_positives[found.extra_positive_weight > 0]
    torch.testing.assert_close(attracted.norm(dim=-1), torch.ones(len(attracted)), atol=2e-3, rtol=0)
    assert ((found.hard_ids == -1) == (found.hard_log_weight == -torch.inf)).all()
    assert (found.shared_log_weight[:, found.shared_ids == -1] == -torch.inf).all()
    for rows in (
        found.hard[found.hard_index][found.hard_log_weight > -torch.inf],
        found.shared[found.shared_ids >= 0],
    ):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)), atol=2e-3, rtol=0)
    for row in range(len(ids)):  # no row counts twice
        hard = found.hard_ids[row][found.hard_log_weight[row] > -torch.inf].tolist()
        shared = found.shared_ids[found.shared_log_weight[row] > -torch.inf].tolist()
        if not twice:  # a queue may hold an id in two slots
            assert not set(hard) & set(shared)


@pytest.mark.parametrize("backend", ["exact", "faiss", "subsample"])
@pytest.mark.parametrize("band", [[0.0, 0.000001], [0.1, 0.3]])
def test_hard_negatives_come_from_the_band(backend, band):
    world, subject = World(), miner(backend=backend, band=band, class_prior=0.05)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    keys, rows = subject.bank.key.float().numpy(), subject.bank.id.numpy()
    for at in range(BATCH):
        order = nearest(query[at].numpy(), keys, rows, rows >= 0, int(ids[at]), ROWS)
        similarities = [float(np.dot(query[at].numpy(), keys[slot])) for slot in order]
        window, _ = policy_window(similarities, 1.0, subject.config, 0.05, band)
        assert set(found.hard_ids[at].tolist()) <= {order[rank] for rank in window}
        assert len(set(found.hard_ids[at].tolist())) == 6


@pytest.mark.parametrize("bank", [{}, {"kind": "queue", "capacity": 50}])
def test_all_rows_is_every_row_once_with_fresh_keys_for_the_batch(bank):
    world, subject = World(), miner(bank=bank, method="all_rows")
    run(subject, world, 11)
    ids, query, key = world.step(11)
    found = subject.negatives(query, key, ids, 11)
    held = set(subject.bank.id[subject.bank.id >= 0].tolist())
    assert found.hard_index.shape == (BATCH, 0)
    for at in range(BATCH):
        used = found.shared_log_weight[at] == 0
        expected = (held | set(ids.tolist())) - {int(ids[at])}
        assert set(found.shared_ids[used].tolist()) == expected
        if not bank:
            assert int(used.sum()) == len(expected)
    torch.testing.assert_close(found.shared[-BATCH:], key, rtol=0, atol=0)
    stale = torch.isin(found.shared_ids[:-BATCH], ids)
    assert (found.shared_log_weight[:, :-BATCH][:, stale] == -torch.inf).all()


def test_until_min_fill_the_other_keys_of_the_batch_are_the_negatives():
    world, subject = World(), miner(min_fill=0.25)
    for step in range(3):
        ids, query, key = world.step(step)
        found = subject.negatives(query[:4], key[:4], ids[:4], step, batch_keys=key, batch_ids=ids)
        if step < 2:  # 24 of 96 rows are written after two steps
            assert found.hard_index.shape[1] == 0
            assert torch.equal(found.shared, key)
            own = torch.eye(BATCH, dtype=torch.bool)[:4]
            assert (found.shared_log_weight == torch.where(own, -torch.inf, 0.0)).all()
        subject.write(key, ids, step)
    assert found.hard_index.shape == (4, 6)


def test_a_bank_grown_too_old_falls_back_to_the_batch():
    world, subject = World(), miner(bank={"max_age": 2})
    run(subject, world, 4)
    ids, query, key = world.step(4)
    found = subject.negatives(query, key, ids, 40)
    assert (found.hard_log_weight == -torch.inf).all()
    for at in range(BATCH):
        used = found.shared_ids[found.shared_log_weight[at] > -torch.inf].tolist()
        assert sorted(used) == sorted(set(ids.tolist()) - {int(ids[at])})


def test_attract_hands_out_capped_positives_and_takes_them_from_the_negatives():
    world = World()
    subject = miner(
        false_negative="attract", false_negative_rank=3, false_negative_threshold=0.85, num_uniform=90
    )
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    similarity = (found.extra_positives * query[:, None]).sum(2)
    present = found.extra_positive_weight > 0
    assert present.any()
    assert not present.all()
    assert (similarity[present] > 0.85).all()
    assert (found.extra_positive_weight.sum(1) <= 1 + 1e-6).all()
    floor = similarity.masked_fill(~present, torch.inf).amin(1)
    hard = (
        (found.hard[found.hard_index] * query[:, None])
        .sum(2)
        .masked_fill(found.hard_log_weight == -torch.inf, -1)
    )
    shared = (query @ found.shared.T).masked_fill(found.shared_log_weight == -torch.inf, -1)
    assert (hard.amax(1) < floor).all()
    assert (shared.amax(1) < floor).all()


@pytest.mark.parametrize(
    ("name", "value"), [("relative_margin", 0.3), ("absolute_margin", 0.2), ("max_similarity", 0.6)]
)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"backend": "faiss"},
        {"query": "stored"},
        {"false_negative": "attract"},
        {"refill": False, "band": [0.0, 0.5]},
    ],
)
def test_no_negative_is_closer_than_an_upper_bound(name, value, extra):
    world, subject = World(), None
    subject = miner(world, **{name: value}, num_uniform=90, **extra)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    positive = (query * key).sum(1)
    limit = {
        "relative_margin": positive - value * positive.abs(),
        "absolute_margin": positive - value,
        "max_similarity": torch.full_like(positive, value),
    }[name]
    hard = (
        (found.hard[found.hard_index] * query[:, None])
        .sum(2)
        .masked_fill(found.hard_log_weight == -torch.inf, -1)
    )
    shared = (query @ found.shared.T).masked_fill(found.shared_log_weight == -torch.inf, -1)
    assert (hard <= limit[:, None] + 1e-6).all()
    assert (shared <= limit[:, None] + 1e-6).all()
    assert (found.hard_log_weight > -torch.inf).any()
    assert float(subject.metrics()[f"mining/drop_{name}"]) > 0


@pytest.mark.parametrize("extra", [{}, {"backend": "faiss"}, {"query": "stored"}])
def test_no_hard_negative_is_farther_than_the_least_similarity(extra):
    """Uniform ones may be."""
    world = World()
    subject = miner(world, min_similarity=0.3, band=[0.0, 1.0], num_hard=40, num_uniform=90, **extra)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    hard = (found.hard[found.hard_index] * query[:, None]).sum(2)
    used = found.hard_log_weight > -torch.inf
    assert used.any(1).all()
    assert not used.all()
    assert (hard[used] >= 0.3).all()
    assert (query @ found.shared.T)[found.shared_log_weight > -torch.inf].min() < 0
    assert float(subject.metrics()["mining/drop_min_similarity"]) > 0


@pytest.mark.parametrize("policy", [{}, {"method": "full_bank"}, {"backend": "subsample", "sample": 30}])
def test_a_query_gets_the_same_alone_as_in_its_batch(policy):
    world, subject = World(), miner(**policy)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    whole = subject.negatives(query, key, ids, 9)
    part = subject.negatives(query[4:7], key[4:7], ids[4:7], 9, batch_keys=key, batch_ids=ids)
    assert torch.equal(whole.hard_ids[4:7], part.hard_ids)
    assert torch.equal(whole.shared_ids, part.shared_ids)
    assert torch.equal(whole.shared_log_weight[4:7], part.shared_log_weight)


def test_draws_follow_the_seed_and_leave_the_global_random_state_alone():
    world, before = World(), torch.get_rng_state()
    runs = [run(miner(), world, 12)[-1] for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert_equal(*runs)
    other = build_miner(
        BankConfig(),
        MiningConfig(num_hard=6, num_uniform=5, min_fill=0.25),
        rows=ROWS,
        dim=DIM,
        seed=4,
        device=CPU,
    )
    assert not torch.equal(run(other, world, 12)[-1].shared_ids, runs[0].shared_ids)


def test_autocast_and_gradients_of_the_caller_do_not_reach_the_search():
    world, plain, cast = World(), miner(), miner()
    expected = run(plain, world, 10)[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(10):
            ids, query, key = world.step(step)
            found = cast.negatives(query.requires_grad_(), key, ids, step)
            cast.write(key, ids, step)
    assert not any(value.requires_grad for value in vars(found).values())
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "policy", [{}, {"backend": "subsample", "sample": 10, "num_hard": 1, "band": [0.0, 1.0]}]
)
def test_nearest_equals_brute_force_and_pads(policy):
    """Also where the policy is served by a sample, which hardly holds the very closest."""
    world, subject = World(), miner(**policy)
    run(subject, world, 4)
    ids, query, _ = world.step(4)
    rows, similarity = subject.nearest(query, ids, 4, 60)
    held = subject.bank.id[subject.bank.id >= 0]
    keys = subject.bank.key.float().numpy()
    for at in range(BATCH):
        order = nearest(
            query[at].numpy(), keys, subject.bank.id.numpy(), subject.bank.id.numpy() >= 0, int(ids[at]), 60
        )
        assert rows[at].tolist() == order + [-1] * (60 - len(order))
        assert (similarity[at, len(order) :] == -torch.inf).all()
    assert len(held) == 48
    outside, _ = subject.nearest(unit(torch.ones(1, DIM)), torch.tensor([-1]), 4, 1)
    assert outside[0, 0] >= 0


def test_nothing_is_near_until_min_fill_so_that_an_index_is_trained_on_enough():
    world, subject = World(), miner(backend="faiss", index="IVF2,Flat", nprobe=2, min_fill=0.85)
    for step in range(8):
        ids, query, key = world.step(step)
        rows, _ = subject.nearest(query, ids, step, 2)  # nearest-neighbour positives ask from the first step
        assert (rows >= 0).all() == subject.ready() == (step * BATCH >= 0.85 * ROWS)
        assert (subject.retrieval.state_dict().keys() >= {"centroids"}) == subject.ready()
        subject.write(key, ids, step)


def test_rows_that_the_step_has_written_anew_do_not_count_as_young_negatives():
    world, subject = World(), miner(bank={"dtype": "float32"}, num_uniform=0)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    kept = ~torch.isin(found.hard_ids, ids)
    assert not kept.all()
    age = (9 - subject.bank.written_at[found.hard_ids])[kept].float().mean()
    subject.write(key, ids, 9)
    assert float(subject.metrics()["mining/age_mean"]) == pytest.approx(float(age), rel=1e-6)


def test_metrics_say_what_was_mined():
    world, subject = World(), miner(bank={"dtype": "float32"}, num_uniform=0)
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    metrics = {name: float(value) for name, value in subject.metrics().items()}
    similarity = (found.hard[found.hard_index] * query[:, None]).sum(2)
    age = 9 - subject.bank.written_at[found.hard_ids]
    expected = {
        "mining/positive_similarity": (query * key).sum(1).mean(),
        "mining/similarity_mean": similarity.mean(),
        "mining/similarity_q10": similarity.quantile(0.1),
        "mining/similarity_q50": similarity.quantile(0.5),
        "mining/similarity_q90": similarity.quantile(0.9),
        "mining/age_mean": age.float().mean(),
        "bank/age_mean": (9 - subject.bank.written_at).float().mean(),
        "bank/fill": 1.0,
        "bank/admissible": 1.0,
        "bank/refused": 0.0,
        # 95 admissible rows: 6 of them are taken, since 5% are fewer.
        "mining/drop_band": 89 / 95,
        "mining/drop_skip_top": 0.0,
        "mining/drop_false_negative": 0.0,
        "mining/drop_max_similarity": 0.0,
        "mining/drop_absolute_margin": 0.0,
        "mining/drop_relative_margin": 0.0,
        "mining/drop_min_similarity": 0.0,
    }
    assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_metrics_before_anything_was_mined_and_of_all_rows():
    world, subject = World(), miner(method="all_rows")
    assert float(subject.metrics()["bank/fill"]) == 0
    run(subject, world, 9)
    ids, query, key = world.step(9)
    found = subject.negatives(query, key, ids, 9)
    seen = (query @ found.shared.T)[found.shared_log_weight > -torch.inf]
    assert float(subject.metrics()["mining/similarity_mean"]) == pytest.approx(float(seen.mean()), abs=1e-5)


@pytest.mark.parametrize(
    "policy",
    [{}, {"query": "stored", "lag": 3}, {"method": "full_bank"}, {"backend": "faiss"}],
)
def test_a_resumed_run_is_the_run(policy):
    world = World()
    whole, first, second = (miner(world, **policy) for _ in range(3))
    expected = run(whole, world, 20)
    run(first, world, 11)
    second.load_state_dict(first.state_dict())
    for found, wanted in zip(run(second, world, 9, start=11), expected[11:], strict=True):
        assert_equal(found, wanted)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"needs bank\.kind=dataset and the plan's rows"):
        miner(query="stored")
    with pytest.raises(ValueError, match=r"needs bank\.kind=dataset"):
        miner(World(), {"kind": "queue", "capacity": 9}, query="stored")
    with pytest.raises(ValueError, match="reach rank 5000 of 10000, an index looks up 2048"):
        build_miner(
            BankConfig(),
            MiningConfig(backend="faiss", band=[0.0, 0.5]),
            rows=10_000,
            dim=4,
            seed=0,
            device=CPU,
        )
    with pytest.raises(ValueError, match="attract needs the closest rows"):
        MiningConfig(false_negative="attract", backend="subsample")
    with pytest.raises(ValueError, match="all_rows looks nothing up"):
        MiningConfig(method="all_rows", query="stored")


@pytest.mark.parametrize(
    "band", [{"band": [0.1, 0.3], "class_prior": 0.1}, {"band": [0.0, 0.9]}, {"relative_margin": 0.3}]
)
def test_a_sample_is_looked_at_as_deep_as_its_band_reaches_and_deeper_changes_nothing(band):
    """As deep as the band is in the sample's rows, not in the bank's: the rest is most of the time."""
    world, policy = World(2), {"backend": "subsample", "sample": 40, "num_hard": 3, **band}
    subject, deep = miner(world, **policy), miner(world, **policy)
    deep.depth = ROWS
    assert subject.depth < ROWS / 2
    for found, expected in zip(run(subject, world, 14), run(deep, world, 14), strict=True):
        assert_equal(found, expected)
