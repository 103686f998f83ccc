"""The registry of protocols: what each name stands for, and their order."""

import pytest

from eval.protocol import Page, Protocol, accuracy_titles, find_protocol, warnings_of
from eval.registry import PROTOCOLS
from eval.scores import Scored


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_name_stands_for_a_protocol(name):
    found = find_protocol(name)
    assert isinstance(found, Protocol | Page)
    assert name == "report" or name in found.config.__dataclass_fields__


def test_accuracies_have_headings_in_the_order_of_the_registry():
    probes = ["worth", "linear", "linear_sgd", "knn", "lowshot", "finetune"]
    variants = [f"retrieval-{kind}" for kind in ("single", "mean", "best")]
    assert [*accuracy_titles()] == [*probes, "neighbours", "retrieval", *variants, "segment"]
    assert accuracy_titles()["retrieval-mean"] == "Identities found again, in the mean of each one's pictures"
    assert all(find_protocol(name) is find_protocol("retrieval") for name in variants)


def test_a_warning_that_is_not_of_all_representations_names_those_it_is_of():
    told = {
        "encoder": ["of all", "ours"],
        "raw_pixels": ["of all", "theirs"],
        "random_encoder": ["theirs", "of all"],
    }
    found = warnings_of({name: Scored([], {}, texts) for name, texts in told.items()})
    assert found == ["of all", "encoder: ours", "raw pixels, random encoder: theirs"]
