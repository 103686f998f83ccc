import pytest
import torch

from memory_bank.draw import domain, draw_slots, mix, noise, permuted, shuffled


def test_noise_is_splitmix64():
    # First outputs of SplitMix64 seeded with 1234567 (the published test vector), less its top two bits.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = noise(torch.arange(1, 5), 1234567)
    assert drawn.tolist() == [value & ((1 << 62) - 1) for value in published]


def test_mix_depends_on_every_part_and_their_order():
    keys = {mix(*parts) for parts in [(1, 2), (2, 1), (1, 3), (1,), (1, 2, 0), (0, 1, 2)]}
    assert len(keys) == 6


def test_drawn_slots_are_admissible_and_different():
    admissible = torch.arange(100) % 3 == 0
    drawn = draw_slots(admissible, 20, key=5)
    assert len(set(drawn.tolist())) == 20
    assert admissible[drawn].all()


def test_too_few_admissible_slots_are_filled_up_with_minus_one():
    admissible = torch.tensor([False, True, False, True])
    assert sorted(draw_slots(admissible, 3, key=0).tolist()) == [-1, 1, 3]
    assert draw_slots(admissible, 9, key=0).shape == (4,)


def test_every_slot_is_drawn_equally_often():
    admissible = torch.ones(20, dtype=torch.bool)
    drawn = torch.stack([draw_slots(admissible, 5, key=mix(0, step)) for step in range(4000)])
    counts = drawn.flatten().bincount(minlength=20).double()
    # Each slot: binomial(4000, 1/4); 5 standard deviations are 137.
    assert (counts - 1000).abs().max() < 137
    # And pairs too: neighbours in the counter are not drawn together more often than others.
    both = ((drawn == 3).any(1) & (drawn == 4).any(1)).double().mean()
    assert abs(float(both) - 5 / 20 * 4 / 19) < 0.02


@pytest.mark.parametrize("n", [4, 16])
def test_of_few_slots_every_ordered_pair_is_drawn_equally_often(n):
    admissible, draws = torch.ones(n, dtype=torch.bool), 15_000
    drawn = torch.stack([draw_slots(admissible, 2, key=mix(0, step, 3)) for step in range(draws)])
    pairs = n * (n - 1)
    counts = (drawn[:, 0] * n + drawn[:, 1]).bincount(minlength=n * n).double()
    counts = counts.view(n, n)[~torch.eye(n, dtype=torch.bool)]
    squared = ((counts - draws / pairs) ** 2 / (draws / pairs)).sum()
    # Chi-square with pairs - 1 degrees of freedom: its mean and 5 standard deviations.
    assert squared < pairs - 1 + 5 * (2 * (pairs - 1)) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_the_order_holds_every_place_once_and_depends_on_the_key(n):
    orders = [shuffled(torch.arange(domain(n)), n, key).tolist() for key in range(5)]
    assert all(sorted(order) == list(range(domain(n))) for order in orders)
    assert n < 7 or len(set(map(tuple, orders))) == 5


@pytest.mark.parametrize("every", [1, 3, 250])
def test_a_short_look_finds_what_a_look_at_all_would(every):
    admissible = torch.arange(1000) % every == 0
    order = shuffled(torch.arange(domain(1000)), 1000, 7).tolist()
    wanted = [slot for slot in order if slot < 1000 and admissible[slot]][:40]
    assert draw_slots(admissible, 40, key=7).tolist() == wanted + [-1] * (40 - len(wanted))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 257, 1001, 65_537])
def test_a_permutation_of_any_size_holds_each_element_once_and_depends_on_the_key(n):
    orders = [permuted(torch.arange(n), n, key) for key in range(4)]
    assert all(torch.equal(order.sort().values, torch.arange(n)) for order in orders)
    assert n < 7 or len({tuple(order.tolist()) for order in orders}) == 4


def test_an_element_of_a_permutation_is_computed_alone():
    n, places = 10**9 + 7, torch.tensor([0, 1, 2, 123_456_789, 10**9 + 6])
    together = permuted(places, n, 3)
    assert torch.equal(together, torch.cat([permuted(place[None], n, 3) for place in places]))
    assert ((together >= 0) & (together < n)).all()


def test_neighbouring_places_of_a_large_permutation_get_independent_elements():
    """Chi-square over 16 x 16 cells of (element, next element), at 2^30 less some, for several keys."""
    n, count = 2**30 - 12_345, 2**17
    for key in range(3):
        cell = permuted(torch.arange(5_000_000, 5_000_000 + count), n, mix(key)) * 16 // n
        pairs = (cell[:-1] * 16 + cell[1:]).bincount(minlength=256).double()
        expected = (count - 1) / 256
        assert ((pairs - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5
