import csv
import os

import pytest

from contrastive.run_dir import UnreadableFiles


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrupt.csv"


def test_ranks_and_resumes_share_one_list_of_unreadable_files(path):
    first, second = UnreadableFiles(path), UnreadableFiles(path)
    assert (len(first), path.exists()) == (0, False)
    first.add(7, 'a,"b".png', "torn\nin two lines")
    second.add(3, "c.png", "empty")
    first.add(3, "c.png", "empty")
    second.add(7, 'a,"b".png', "torn\nin two lines")
    UnreadableFiles(path).add(7, "again.png", "after a resume")
    assert len(first) == len(second) == len(UnreadableFiles(path)) == 2
    assert rows(path) == [
        ["row", "key", "reason"],
        ["7", 'a,"b".png', "torn\nin two lines"],
        ["3", "c.png", "empty"],
    ]


def test_a_known_unreadable_file_is_not_looked_up_and_a_new_one_reads_no_line_twice(path, monkeypatch):
    listed, other, parsed = UnreadableFiles(path), UnreadableFiles(path), []
    reader = csv.reader
    monkeypatch.setattr(csv, "reader", lambda file: parsed.append(len(found := [*reader(file)])) or found)
    for row in range(50):
        listed.add(row, f"{row}.png", "torn")
    assert sum(parsed) == 0  # its own lines it knows
    other.add(50, "50.png", "torn")
    assert sum(parsed) == 51  # with the header
    assert len(listed) == 51
    assert sum(parsed) == 52
    opened = len(parsed)
    listed.add(4, "4.png", "torn")
    assert (len(listed), len(parsed)) == (51, opened)


def test_a_list_of_unreadable_files_that_was_removed_begins_anew(path):
    listed = UnreadableFiles(path)
    for row in range(3):
        listed.add(row, "a.png", "torn")
    os.unlink(path)
    assert len(listed) == 0
    listed.add(9, "b.png", "torn")
    assert (len(listed), rows(path)) == (1, [["row", "key", "reason"], ["9", "b.png", "torn"]])
