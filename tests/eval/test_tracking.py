"""Names of scores on W&B; the run itself is read back in tests/contrastive/test_wandb.py."""

import pytest

import eval.tracking as tracking
from contrastive.logging.names import describe
from eval.config import EvalConfig
from eval.tracking import scalars


def score(name, encoder, raw):
    number = {"low": 0.0, "high": 1.0}
    return {
        "name": name,
        "interval": "",
        "encoder": number | {"value": encoder},
        "raw": number | {"value": raw},
    }


@pytest.mark.parametrize(
    ("protocol", "names", "expected"),
    [
        ("linear", ["top1", "top5"], ["probe/top1", "probe/top5"]),
        ("knn", ["top1 k=20"], ["knn/top1_k=20", "knn/top1"]),
        ("lowshot", ["top1 at 1 a class", "top1 at 10%"], ["probe/top1_at_1_a_class", "probe/top1_at_10%"]),
        ("finetune", ["top1"], ["probe/finetune_top1"]),
        ("worth", ["linear probe", "kNN k=20"], ["probe/worth_linear_probe", "probe/worth_kNN_k=20"]),
        ("linear_sgd", ["top1"], ["probe/sgd_augmented_top1"]),
    ],
)
def test_scores_have_documented_names_of_their_own(protocol, names, expected):
    rows = [score(name, 0.9 - place / 10, 0.5) for place, name in enumerate(names)]
    found = scalars({"protocol": protocol, "scores": rows})
    assert found.keys() == {*expected} | {f"{expected[place]}_raw" for place in range(len(names))}
    assert found[expected[0]] == 0.9
    assert found[f"{expected[0]}_raw"] == 0.5
    assert all(describe(name) for name in found)


def test_an_encoder_of_unknown_origin_and_w_and_b_off_log_nothing(shared_run, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(tracking, "start_run", lambda *args, **more: started.append(more))
    result = {"protocol": "linear", "scores": [], "details": {}, "data": {"name": "digits"}}
    lone = tmp_path / "encoder.safetensors"
    lone.write_bytes((shared_run / "encoder.safetensors").read_bytes())
    tracking.track(result, EvalConfig(checkpoint=str(lone)))
    tracking.track(result, EvalConfig(checkpoint=str(shared_run)))  # its config.yaml names no W&B run
    assert started == []
    config = (shared_run / "config.yaml").read_text()
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.yaml").write_text(config + "provenance: {wandb_id: abc}\n")
    (own / "encoder.safetensors").write_bytes(lone.read_bytes())
    tracking.track(result, EvalConfig(checkpoint=str(own)))
    other = {"name": "imagefolder", "root": "/data/sorted"}
    tracking.track(result | {"data": other}, EvalConfig(checkpoint=str(own)))
    assert [more["name"].split(" ", 1)[1] for more in started] == ["linear", "linear on sorted"]
    assert [more["pretrain_id"] for more in started] == ["abc", "abc"]
    assert len({more["id"] for more in started} | {"abc"}) == 3  # each evaluation is a run of its own
    with pytest.raises(ValueError, match="wandb='offlin'"):
        EvalConfig(checkpoint="x", wandb="offlin")


def test_statistics_have_names_beside_those_of_the_keys():
    numbers = {"rankme": 20.0, "verdict": "healthy"}
    found = scalars({"protocol": "stats", "scores": {"encoder": numbers, "raw_pixels": numbers}})
    assert found == {"stats/features_rankme": 20.0, "stats/features_rankme_raw_pixels": 20.0}
    assert all(describe(name) for name in found)
