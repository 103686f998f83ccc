from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_bank import policy
from memory_bank.config import MiningConfig
from memory_bank.policy import overruled
from memory_bank.retrieval.base import Candidates
from tests.reference.bank import policy_window, upper_limits

FRACTION = st.floats(0, 1).map(lambda value: round(value, 3))


def candidates(similarity, total=None):
    """Candidates in slots 10, 11, ...; ``total`` rows where the list is cut short."""
    similarity = torch.tensor(similarity, dtype=torch.float32)[None]
    count = similarity.shape[1]
    rows = torch.tensor([count if total is None else total])
    return Candidates(torch.arange(10, 10 + count)[None], similarity, rows, torch.tensor([0]), share=1.0)


def select(found, config, positive=0.9, step=0, key=1, row=0):
    return policy.select(found, torch.tensor([positive]), torch.tensor([row]), config, step=step, key=key)


# As keywords: the config's own checks draw on the global random state, which strategies must not.
CONFIGS = st.fixed_dictionaries(
    {
        "num_hard": st.integers(0, 12),
        "skip_top": st.none() | FRACTION,
        "class_prior": FRACTION,
        "band": st.lists(FRACTION, min_size=2, max_size=2, unique=True).map(sorted),
        "false_negative": st.sampled_from(["off", "drop", "attract"]),
        "false_negative_rank": st.integers(1, 8),
        "false_negative_threshold": st.floats(-1, 1),
        "refill": st.booleans(),
        "min_similarity": st.none() | st.floats(-1, -0.01),
        "max_similarity": st.none() | st.floats(0, 1),
        "absolute_margin": st.none() | st.floats(0, 2),
        "relative_margin": st.none() | st.floats(0, 1),
    }
)


@settings(max_examples=300, deadline=None)
@given(CONFIGS, st.integers(0, 40), st.floats(-1, 1), st.integers(0, 9))
def test_select_agrees_with_loops(keywords, total, positive, seed):
    config = MiningConfig(**keywords)
    similarity = np.sort(np.random.default_rng(seed).uniform(-1, 1, total).astype(np.float32))[::-1]
    positive = float(np.float32(positive))
    skip = config.class_prior if config.skip_top is None else config.skip_top
    limits = upper_limits(positive, config)
    if config.min_similarity is not None:
        limits.append(config.min_similarity)
    for limit in limits if total else ():  # they are float32 in the library: keep clear of a tie
        if np.abs(similarity - limit).min() < 1e-5:
            return
    window, alike = policy_window(similarity.tolist(), positive, config, skip, config.band)
    chosen = select(candidates(similarity.copy()), config, positive)
    taken = [slot - 10 for slot in chosen.slots[0].tolist() if slot >= 0]
    assert set(taken) <= set(window)
    assert len(taken) == min(config.num_hard, len(window))
    assert taken == sorted(taken)
    assert [slot - 10 for slot in chosen.alike[0].tolist() if slot >= 0] == alike
    assert chosen.similarity[0, : len(taken)].tolist() == similarity[taken].tolist()


def test_the_first_depth_candidates_are_enough():
    rng = np.random.default_rng(0)
    for config in (
        MiningConfig(num_hard=7, band=[0.1, 0.3], skip_top=0.05),
        MiningConfig(num_hard=30, band=[0.01, 0.02], false_negative="drop", false_negative_threshold=0.0),
        MiningConfig(num_hard=5, band=[0.6, 0.9], band_end=[0.0, 0.1], band_steps=10),
    ):
        similarity = np.sort(rng.uniform(-1, 1, 200))[::-1].copy()
        needed = policy.depth(config, 200)
        assert needed < 200
        for step in (0, 5, 10):
            whole, cut = candidates(similarity), candidates(similarity[:needed], total=200)
            for key in range(5):
                assert select(whole, config, step=step, key=key).slots.tolist() == (
                    select(cut, config, step=step, key=key).slots.tolist()
                )


def test_the_draw_is_uniform_over_the_band_and_depends_on_seed_step_and_row_only():
    config = MiningConfig(num_hard=4, band=[0.25, 0.5])
    found = candidates(np.linspace(1, -1, 40).copy())
    repeated = Candidates(
        *(torch.cat([part] * 3000) for part in (found.slots, found.similarity, found.rows, found.above)), 1.0
    )
    rows = policy.select(repeated, torch.ones(3000), torch.arange(3000), config, step=0, key=7)
    same = policy.select(repeated, torch.ones(3000), torch.zeros(3000).long(), config, step=0, key=7)
    counts = rows.slots.flatten().bincount(minlength=50)
    assert (same.slots == same.slots[0]).all()
    assert counts[:20].sum() == counts[30:].sum() == 0
    # Each of the ten: binomial(3000, 0.4), standard deviation 27.
    assert (counts[20:30] - 1200).abs().max() < 135
    steps = torch.stack([select(found, config, key=key).slots[0] for key in range(300)])
    assert (steps.flatten().bincount(minlength=50)[20:30] - 120).abs().max() < 43


def test_a_query_draws_the_same_whatever_the_batch():
    config = MiningConfig(num_hard=3, band=[0.0, 0.5])
    found = candidates(np.linspace(1, -1, 20).copy())
    alone = select(found, config, row=5).slots
    twice = Candidates(
        *(torch.cat([part, part]) for part in (found.slots, found.similarity, found.rows, found.above)), 1.0
    )
    both = policy.select(twice, torch.ones(2), torch.tensor([9, 5]), config, step=0, key=1)
    assert both.slots[1].tolist() == alone[0].tolist()


def test_rows_hidden_above_a_ceiling_count_as_the_same_rows_in_the_list():
    config = MiningConfig(
        num_hard=4, band=[0.1, 0.4], relative_margin=0.5, false_negative="drop", false_negative_threshold=0.0
    )
    similarity = np.linspace(0.95, -0.95, 40)
    hidden = int((similarity > 0.45).sum())
    assert hidden > 5
    whole = candidates(similarity.copy())
    cut = candidates(similarity[hidden:].copy())
    cut = Candidates(cut.slots + hidden, cut.similarity, whole.rows, torch.tensor([hidden]), 1.0)
    for refill in (True, False):
        config = replace(config, refill=refill)
        assert (select(whole, config).slots >= 0).any()
        assert select(whole, config).slots.tolist() == select(cut, config).slots.tolist()


def test_in_a_sample_the_rank_of_a_false_negative_is_scaled():
    config = MiningConfig(num_hard=2, band=[0.0, 1.0], false_negative="drop", false_negative_rank=10)
    found = candidates([0.9, 0.85, 0.8, 0.1])
    found.share = 0.2
    dropped = select(found, config).dropped["false_negative"]
    assert float(dropped) == pytest.approx(2 / 4)


def test_the_band_moves_linearly_and_stays():
    config = MiningConfig(band=[0.0, 0.5], band_end=[0.1, 0.2], band_steps=100)
    assert policy.band_at(config, 0) == (0.0, 0.5)
    assert policy.band_at(config, 50) == pytest.approx((0.05, 0.35))
    assert policy.band_at(config, 1000) == pytest.approx((0.1, 0.2))
    assert policy.band_at(MiningConfig(band=[0.2, 0.3]), 50) == (0.2, 0.3)


def test_attraction_is_capped_at_the_weight_of_one_key():
    weight = policy.attract_weight(torch.tensor([[4, 5, -1], [-1, -1, -1], [3, -1, -1]]))
    assert weight.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_contains_never_finds_minus_one():
    slots, index = torch.tensor([-1, 2, 3, 7, 9]), torch.tensor([[2, 0, 3], [0, 0, 1]])
    held = policy.contains(slots, index, torch.tensor([7, -1, 2, 3]))
    assert held.tolist() == [[True, False, False, True], [False, False, True, False]]


def test_the_draw_is_that_of_whole_rows_where_windows_leave_columns_empty():
    """Columns that no query's window reaches are left out of the work, not of the numbering."""
    rows, width = 5, 60
    similarity = torch.rand(rows, width).sort(dim=1, descending=True).values
    slots = torch.stack([torch.randperm(900)[:width] for _ in range(rows)])
    found = Candidates(slots, similarity, torch.full((rows,), width), torch.zeros(rows).long(), share=1.0)
    start = torch.tensor([20, 25, 22, 57, 60])[:, None]
    window = (torch.arange(width) >= start) & (torch.arange(width) < start + 9)
    drawn, drawn_similarity = policy._draw(found, window, torch.arange(rows), 6, key=4)
    chance = policy.noise(slots ^ policy.noise(torch.arange(rows), 4)[:, None], 4)
    for row in range(rows):
        allowed = [column for column in range(width) if window[row, column]]
        taken = sorted(sorted(allowed, key=lambda column: -int(chance[row, column]))[:6])
        missing = 6 - len(taken)
        assert drawn[row].tolist() == [*slots[row, taken].tolist(), *[-1] * missing]
        assert drawn_similarity[row].tolist() == [*similarity[row, taken].tolist(), *[-torch.inf] * missing]


def test_drop_rates_are_shares_of_the_admissible_rows():
    config = MiningConfig(
        num_hard=2, band=[0.1, 0.3], skip_top=0.1, false_negative="drop", false_negative_rank=2,
        false_negative_threshold=0.7, relative_margin=0.5,
    )  # fmt: skip
    similarity = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1]
    dropped = {
        name: float(share)
        for name, share in select(candidates(similarity), config, positive=1.0).dropped.items()
    }
    # 2 alike, 2 above the margin, 1 skipped, then ranks 1 and 2 of the five left: 3 outside the band.
    assert dropped == pytest.approx(
        {
            "false_negative": 0.2,
            "max_similarity": 0.0,
            "absolute_margin": 0.0,
            "relative_margin": 0.2,
            "min_similarity": 0.0,
            "skip_top": 0.1,
            "band": 0.3,
        }
    )
    assert tuple(dropped) == policy.FILTERS


def test_a_new_bound_is_a_setting_and_a_function(monkeypatch):
    config = MiningConfig(num_hard=3, band=[0.0, 1.0], max_similarity=0.85)
    found = candidates([0.9, 0.8, 0.7, 0.3])
    config.half_positive = 0.5
    monkeypatch.setitem(policy.UPPER_BOUNDS, "half_positive", lambda positive, share: share * positive)
    selection = select(found, config)  # the positive has 0.9, so the bound is 0.45
    assert selection.slots.tolist() == [[13, -1, -1]]
    assert float(selection.dropped["half_positive"]) == pytest.approx(3 / 4)
    assert float(selection.dropped["max_similarity"]) == 0  # the lower bound counts
    config.max_similarity = None
    assert policy.is_bounded_above(config)
    config.half_positive = None
    assert not policy.is_bounded_above(config)


def test_rows_above_several_bounds_count_for_the_lowest_and_those_too_far_for_their_own():
    config = MiningConfig(
        num_hard=2, band=[0.0, 0.1], max_similarity=0.55, absolute_margin=0.15, relative_margin=0.9,
        min_similarity=0.15,
    )  # fmt: skip
    similarity = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1]
    found = select(candidates(similarity), config, positive=2.0)  # limits 0.55, 1.85 and 0.2
    assert [slot - 10 for slot in found.slots[0].tolist()] == [6, -11]  # one is left
    dropped = {name: float(share) for name, share in found.dropped.items() if share}
    assert dropped == pytest.approx({"relative_margin": 0.6, "min_similarity": 0.3})
    low = select(candidates(similarity), config, positive=0.5).dropped  # limits 0.55, 0.35 and 0.05
    assert float(low["relative_margin"]) == pytest.approx(0.8)
    assert float(low["max_similarity"]) == float(low["absolute_margin"]) == 0


def test_a_band_end_that_is_not_set_is_not_spoken_of():
    (line,) = overruled(MiningConfig(num_hard=50, band=[0.0, 0.1]), 20)
    assert line.startswith("mining.band=")


def test_rows_below_the_least_similarity_are_counted_also_where_the_look_up_ends():
    config = MiningConfig(num_hard=2, band=[0.0, 0.2], min_similarity=0.5)
    found = select(candidates([0.9, 0.6, 0.4], total=10), config).dropped
    assert float(found["min_similarity"]) == pytest.approx(0.8)
    assert float(found["band"]) == 0
    out_of_reach = select(candidates([0.9, 0.8, 0.6], total=10), config).dropped
    assert float(out_of_reach["min_similarity"]) == 0
    assert float(out_of_reach["band"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("settings", "ranks", "refilled"),
    [
        ({"band": [0.0, 0.2]}, [0, 1], [0, 1, 2, 3]),  # two rows for four
        ({"band": [0.0, 0.4], "max_similarity": 0.75}, [2, 3], [2, 3, 4, 5]),
        ({"band": [0.1, 0.5], "skip_top": 0.2, "absolute_margin": 0.45}, [5, 6], [8, 9, 6, 7]),
        ({"band": [0.0, 0.4], "min_similarity": 0.65}, [0, 1, 2], [0, 1, 2]),
        ({"band": [0.8, 1.0], "skip_top": 0.1}, [9], [6, 7, 8, 9]),
    ],
)
def test_without_refill_ranks_are_those_of_all_rows_and_fewer_come_back(settings, ranks, refilled):
    similarity = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]

    def chosen(refill):
        config = MiningConfig(num_hard=4, refill=refill, **settings)
        return [slot - 10 for slot in select(candidates(similarity), config).slots[0].tolist() if slot >= 0]

    assert chosen(refill=False) == ranks
    assert chosen(refill=True) == sorted(refilled)


@pytest.mark.parametrize(
    ("settings", "rows", "lines"),
    [
        ({"band": [0.5, 0.51], "num_hard": 200}, 1335, ["has 13 of 1335 rows, mining.num_hard=200 widens"]),
        ({"band": [0.5, 0.51], "num_hard": 13}, 1335, []),
        ({"band": [0.5, 0.51], "num_hard": 200, "refill": False}, 1335, []),
        (
            {"band": [0.501, 0.51], "num_hard": 200, "refill": False},
            60,
            ["has 0 of 60 rows, mining.num_hard=200 finds none (refill=false)"],
        ),
        ({"band": [0.0, 0.000001], "num_hard": 200}, 1335, []),
        ({"band": [0.5, 0.51], "num_hard": 0}, 1335, []),
        ({"band": [0.5, 0.51], "num_hard": 200, "method": "full_bank"}, 1335, []),
        (
            {"band": [0.0, 0.5], "band_end": [0.0, 0.1], "band_steps": 9, "num_hard": 200},
            1335,
            ["mining.band_end=[0.0, 0.1] has 134 of 1335 rows"],
        ),
        (
            {"band": [0.0, 0.5], "band_end": [0.0, 0.4], "num_hard": 8},
            1335,
            ["mining.band=[0.0, 0.5] is unused: band_steps=0"],
        ),
        (
            {"class_prior": 0.9, "band": [0.0, 1.0], "num_hard": 200},
            1000,
            ["mining.class_prior=0.9 leaves out the closest 900 of 1000 rows, mining.num_hard=200 lowers"],
        ),
    ],
)
def test_settings_that_others_overrule_are_named(settings, rows, lines):
    found = overruled(MiningConfig(**settings), rows)
    assert len(found) == len(lines)
    for text, part in zip(found, lines, strict=True):
        assert part in text
