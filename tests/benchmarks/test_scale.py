"""The parts of one rank's share, measured at a small size, and the model of a cluster."""

import pytest

SMALL = ["--rows", "6000", "--index", "IVF32,SQ8", "--world", "4", "--repeats", "2", "--no-plot"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    from pathlib import Path

    patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import scale

    folder = tmp_path_factory.mktemp("scale")
    yield scale.main([*SMALL, "--out", str(folder / "scale.json")]), folder
    patch.undo()


def test_a_share_is_measured_and_found_again(made):
    result, folder = made
    measured = result["measured"]
    assert (folder / "scale.json").is_file()
    assert 0.5 < measured["recall_at_64"] <= 1
    assert measured["stated"]["bank"] == 6000 * (2 * 128 + 16)
    assert min(measured[name] for name in ("train_s", "assign_s", "fill_s", "query_s", "update_s")) > 0


def test_the_model_adds_up_what_it_was_given(made):
    table = {(line["rows"], line["ranks"]): line for line in made[0]["computed"]}
    assert len(table) == 9
    large = 2**30
    # Memory falls with the ranks, traffic grows with them, and rank 0 saves all of it.
    assert table[large, 8]["rank_gib"] == pytest.approx(8 * table[large, 64]["rank_gib"], rel=0.01)
    assert table[large, 512]["received_mib"] > 3 * table[large, 64]["received_mib"]
    assert table[large, 64]["first_rank_saves_gib"] == 272
    assert all("saving" in line["breaks"] for key, line in table.items() if key[0] == large)
    for line in table.values():
        assert line["step_s"] == line["search_s"] + line["update_s"] + line["link_s"]
