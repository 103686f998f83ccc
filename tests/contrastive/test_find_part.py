import pytest

from contrastive.config import UserError
from contrastive.find_part import find_part

TABLE = {"first": f"{__name__}:TABLE", "second": "math:pi"}


def test_a_part_is_imported_by_its_name():
    assert find_part("group.part", TABLE, "first") is TABLE
    assert find_part("group.part", TABLE, "second") == pytest.approx(3.14159, abs=1e-5)


def test_an_unknown_part_is_refused_with_the_nearest_name_and_all_names():
    with pytest.raises(UserError) as caught:
        find_part("group.part", TABLE, "Frist")
    assert str(caught.value) == (
        "group.part='Frist': unknown; did you mean 'first'? allowed are first, second"
    )
