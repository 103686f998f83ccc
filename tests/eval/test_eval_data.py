import pytest

from eval.eval_data import title_of


@pytest.mark.parametrize(
    ("place", "title"),
    [
        ("imagefolder /data/my birds", "my birds"),
        ("images /", "images"),
        ("shards s3://bucket/birds", "birds"),
        ("hf someone/birds", "birds"),
        ("cifar10 /home/me/.data", "cifar10"),
        ("imagenet /data/ILSVRC2012", "imagenet"),
        ("digits", "digits"),
        ("dataset-0a1b2c3d", "dataset-0a1b2c3d"),
    ],
)
def test_a_title_is_the_folders_name_or_that_of_a_source_that_is_one_data_set(place, title):
    assert title_of(place) == title
