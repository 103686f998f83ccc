"""The registry of protocols: what each name stands for, and which variant a config asks for."""

import pytest

from contrastive.config_files import load_config
from eval import linear_probe, linear_sgd
from eval.protocol import Page, Protocol, accuracy_titles, find_protocol, warnings_of
from eval.registry import PROTOCOLS, VARIANTS
from eval.scores import Scored


@pytest.mark.parametrize("name", [*PROTOCOLS, *VARIANTS])
def test_every_name_stands_for_a_protocol(name):
    found = find_protocol(name)
    assert isinstance(found, Protocol | Page)
    group = name.partition("-")[0]
    assert name == "report" or group in found.config.__dataclass_fields__


@pytest.mark.parametrize(
    ("way", "kind", "score"),
    [
        ("cached", "linear", linear_probe.score),
        ("sgd_augmented", "linear-sgd_augmented", linear_sgd.score),
    ],
)
def test_a_setting_chooses_the_variant(way, kind, score):
    given = ["checkpoint=x", f"linear.protocol={way}"]
    config = load_config(find_protocol("linear").config, "eval", "linear", given)
    assert "-".join(filter(None, ["linear", config.variant])) == kind
    assert find_protocol(kind).score is score


def test_accuracies_have_headings_in_the_order_of_the_registry():
    probes = ["worth", "linear", "linear-sgd_augmented", "knn", "lowshot", "finetune"]
    assert [*accuracy_titles()] == [*probes, "neighbours", "retrieval", "segment"]


def test_a_warning_that_is_not_of_all_representations_names_those_it_is_of():
    told = {
        "encoder": ["of all", "ours"],
        "raw_pixels": ["of all", "theirs"],
        "random_encoder": ["theirs", "of all"],
    }
    found = warnings_of({name: Scored([], {}, texts) for name, texts in told.items()})
    assert found == ["of all", "encoder: ours", "raw pixels, random encoder: theirs"]
