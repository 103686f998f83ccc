"""Test the decisions for many kinds of folders and machines, without reading a disk."""

from dataclasses import asdict, replace

import pytest

from contrastive.choosing.decide import Decision, decide, remarks
from contrastive.choosing.look import Folder
from contrastive.choosing.machine import Machine
from contrastive.choosing.rules import LEAST_STD, MINUTES, RULES, SAMPLED_ROWS, run_name
from contrastive.config import PretrainConfig, UserError
from contrastive.config_files import flat, read_stated
from contrastive.encoders.spec import ArchSpec

FOLDER = Folder(
    root="/data/photos",
    source="imagefolder",
    why="10 class folders",
    num_images=5000,
    labelled=True,
    looked_at=256,
    unreadable=0,
    side=300,
    small_side=200,
    grey=0.0,
    alpha=0.0,
    fourth_band=0.0,
    two_valued=0.0,
    deep=0.0,
    white=65535,
    dark=0.0,
    white_of_dark=65535,
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.2, 0.01],
)
LAPTOP = Machine("cpu", "CPU", 2, 16 * 2**30, False)
MAC = replace(LAPTOP, device="mps", name="Apple GPU")
OLD_GPU = Machine("cuda", "Tesla T4", 8, int(14.6 * 2**30), False)
H200 = Machine("cuda", "NVIDIA H200", 16, 139 * 2**30, True)


def decided(*overrides, machine=LAPTOP, network=None, **facts):
    """Return what the recipe ``own`` decides: settings by name."""
    stated = read_stated(PretrainConfig, "pretrain", "own", overrides)
    settings = flat(asdict(stated.config({"schedule.warmup_epochs": 0.0})))
    decisions = decide(replace(FOLDER, **facts), machine, settings, stated.keys, network)
    return {decision.key: decision for decision in decisions}


def value(key, *overrides, **facts):
    return decided(*overrides, **facts)[key].value


@pytest.mark.parametrize(
    ("machine", "sizes"),
    [
        (LAPTOP, {8: 16, 23: 16, 24: 32, 28: 32, 64: 32, 127: 32, 128: 64, 4000: 64}),
        (MAC, {8: 16, 300: 64}),
        (H200, {8: 16, 28: 32, 32: 32, 64: 64, 96: 96, 128: 128, 199: 128, 200: 224, 4000: 224}),
    ],
)
def test_the_image_size_follows_the_images_and_the_device(machine, sizes):
    for side, size in sizes.items():
        assert value("data.image_size", machine=machine, side=side) == size
        assert size <= max(16, 1.4 * side)


def test_the_white_is_what_was_seen_unless_it_is_stated():
    assert "data.white" not in decided()
    assert value("data.white", white=4095) == 4095
    assert "values of 12 bits" in decided(white=4095)["data.white"].reason
    assert "data.white" not in decided("data.white=65535", white=65535)


def test_images_are_not_decoded_to_more_pixels_than_they_have():
    assert value("data.decode_size", machine=H200, side=96) == 96
    assert value("data.decode_size", machine=H200, side=224) == 224
    for side in (64, 110, 256):  # up to 64 px the default is data.image_size; else there is enough
        assert "data.decode_size" not in decided(machine=H200, side=side)


@pytest.mark.parametrize(
    ("images", "batch"),
    [
        (16, 8),
        (31, 8),
        (32, 16),
        (63, 16),
        (64, 32),
        (255, 32),
        (256, 64),
        (1023, 128),
        (10**7, 128),
    ],
)
def test_the_batch_leaves_several_in_an_epoch(images, batch):
    assert value("data.global_batch", num_images=images) == batch
    assert value("data.global_batch", num_images=4 * 256, machine=H200) == 256


def test_too_few_images_are_refused_with_the_least_number():
    with pytest.raises(UserError, match=r"/data/photos: 15 training images, at least 16 are needed"):
        decided(num_images=15)
    assert "data.global_batch" not in decided("data.global_batch=4", num_images=15)


def test_pixels_are_normalised_by_what_was_measured():
    assert value("data.mean") == [0.5, 0.4, 0.3]
    assert value("data.std") == [0.2, 0.2, LEAST_STD]  # a channel without variance would be divided by 0
    assert "measured on 256 images" in decided()["data.mean"].reason


@pytest.mark.parametrize(
    ("machine", "side", "encoder", "width"),
    [
        (LAPTOP, 300, "cpu_resnet", None),
        (MAC, 300, "cpu_resnet", None),
        (OLD_GPU, 300, "resnet18", 64),
        (H200, 32, "resnet18", 64),
        (H200, 300, "resnet50", None),
    ],
)
def test_the_network_suits_device_and_image_size(machine, side, encoder, width):
    made = decided(machine=machine, side=side)
    assert made["encoder.name"].value == encoder
    assert (made["encoder.width"].value if "encoder.width" in made else None) == width


def test_a_stated_network_decides_whether_it_has_a_width():
    assert value("encoder.width", "encoder.name=resnet34", machine=H200) == 64
    assert "encoder.width" not in decided("encoder.name=resnet50")
    assert "encoder.width" not in decided("encoder.name=timm:vit_tiny_patch16_224")


def test_published_weights_see_images_as_they_were_trained_on():
    made = decided("encoder.name=resnet18", "encoder.weights=resnet18.pth", side=40)
    assert made["data.image_size"].value == 96  # with the first layers of the file
    assert not {"data.mean", "data.std", "encoder.width"} & made.keys()
    assert made["optimizer.base_lr"].value < value("optimizer.base_lr")


def test_weights_that_name_their_network_decide_it():
    narrow = ArchSpec("resnet18", {"width": 24, "stem": "imagenet"})
    weights = "encoder.weights=runs/other/encoder.safetensors"
    made = decided(weights, network=narrow, machine=H200)
    network = {key: made[key].value for key in made if key.startswith("encoder.")}
    assert network == {"encoder.name": "resnet18", "encoder.width": 24, "encoder.stem": "imagenet"}
    assert made["data.image_size"].value == value("data.image_size", machine=H200)
    assert made["optimizer.base_lr"].value < value("optimizer.base_lr")
    stated = decided(weights, "encoder.name=resnet18", "encoder.width=24", network=narrow)
    assert not {"encoder.name", "encoder.width"} & stated.keys()
    assert "data.mean" in stated  # they are no library's weights
    vit = decided(weights, network=ArchSpec("vit_tiny", {"patch_size": 4}))
    assert (vit["encoder.name"].value, vit["encoder.args"].value) == ("vit_tiny", {"patch_size": 4})
    assert not {"encoder.width", "encoder.stem"} & vit.keys()


def test_the_rate_is_that_of_the_optimizer():
    assert value("optimizer.base_lr", "optimizer.name=sgd") == 0.3
    assert value("optimizer.base_lr", "optimizer.name=adamw") == 0.004
    assert value("optimizer.base_lr", "optimizer.name=adamw", "encoder.weights=a.pth") == 0.0004
    said = decided("optimizer.name=sgd", "data.global_batch=64")["optimizer.base_lr"].reason
    assert said.endswith("it is per 256 images: 0.075 for the batch of 64")


def test_a_short_run_of_the_compact_network_takes_adamw():
    made = decided("schedule.minutes=15")
    rates = {key: made[key].value for key in made if key.startswith("optimizer.")}
    assert rates == {"optimizer.name": "adamw", "optimizer.weight_decay": 1e-4, "optimizer.base_lr": 0.004}
    for stated in ("optimizer.name=sgd", "optimizer.base_lr=0.1"):  # whose rate is not AdamW's
        kept = decided("schedule.minutes=15", stated)
        assert not {"optimizer.name", "optimizer.weight_decay"} & kept.keys()
    for other in ("schedule.minutes=16", "schedule.epochs=2"):
        assert not {"optimizer.name", "optimizer.weight_decay"} & decided(other).keys()
    assert value("optimizer.weight_decay", "optimizer.name=adamw") == 1e-4


def test_a_length_is_chosen_only_if_none_is_stated():
    assert value("schedule.minutes") == MINUTES
    assert "schedule.minutes" not in decided("schedule.minutes=2")
    assert "schedule.minutes" not in decided("schedule.epochs=7")


def test_warm_up_is_a_share_of_the_run():
    assert value("schedule.warmup_epochs", "schedule.epochs=3") == 0.15
    assert value("schedule.warmup_epochs", "schedule.epochs=100") == 5
    assert value("schedule.warmup_epochs", "schedule.epochs=1000") == 10


def test_every_row_is_a_negative_while_that_is_affordable():
    assert value("mining.method", "method=moco", num_images=250_000) == "all_rows"
    assert "mining.num_hard" not in decided("method=moco", num_images=250_000)
    assert value("mining.method", "method=moco", num_images=1_281_167, machine=H200) == "all_rows"
    for machine, images in ((LAPTOP, 251_000), (OLD_GPU, 400_000), (H200, 2_100_000)):
        made = decided("method=moco", num_images=images, machine=machine)
        assert made["mining.method"].value == "ranked"
        assert (made["mining.num_hard"].value, made["mining.num_uniform"].value) == (0, SAMPLED_ROWS)


@pytest.mark.parametrize("stated", ["mining.class_prior=0.1", "mining=band", "bank.max_age=4"])
def test_the_batch_has_the_negatives_unless_settings_of_the_bank_are_stated(stated):
    made = decided()
    assert made["method"].value == "simclr"
    assert not {key for key in made if key.startswith("mining.")}
    assert decided(stated)["method"].value == "moco"
    assert not {"method", "mining.method"} & decided("method=nnclr").keys()
    assert decided("method=sogclr").keys().isdisjoint({"method", "mining.method"})


@pytest.mark.parametrize(
    "stated", ["mining=band", "mining.query=stored", "mining.num_hard=8", "mining.class_prior=0.1"]
)
def test_settings_of_ranked_keep_ranked(stated):
    made = decided(stated, num_images=10**7)
    assert not {key for key in made if key.startswith("mining.")}


def test_a_stated_method_is_not_turned_into_a_sample():
    assert not {key for key in decided("mining.method=ranked") if key.startswith("mining.")}


def test_a_network_is_narrow_for_a_short_run_on_a_cpu():
    name = "encoder.name=resnet18"
    assert value("encoder.width", name, "schedule.minutes=15") == 16
    assert value("encoder.width", name, "schedule.minutes=16") == 32
    assert value("encoder.width", name, "schedule.minutes=16", machine=replace(LAPTOP, cores=1)) == 16
    assert value("encoder.width", name, "schedule.epochs=2") == 32
    assert value("encoder.width", name, "schedule.minutes=1", machine=H200, side=32) == 64


@pytest.mark.parametrize(("side", "sizes"), [(8, None), (64, (24, 16)), (300, (48, 32))])
@pytest.mark.parametrize("length", ["schedule.minutes=15", "schedule.minutes=16", "schedule.epochs=9"])
def test_a_cpu_trains_the_compact_network_on_growing_views(length, side, sizes):
    made = decided(length, side=side)
    assert made["encoder.name"].value == "cpu_resnet"
    widths = [48, 96, 192] if length == "schedule.minutes=15" else [64, 128, 256]
    assert made["encoder.args"].value == {"widths": widths, "features": 1024}
    assert "encoder.width" not in made
    views = [made[key].value for key in ("augment.global_size", "augment.first_size") if key in made]
    assert views == list(sizes or ())


def test_a_short_run_on_a_cpu_takes_adamw_and_no_online_probe():
    short, long = (decided(f"schedule.minutes={minutes}") for minutes in (15, 16))
    assert short["optimizer.name"].value == "adamw"
    assert "optimizer.name" not in long
    assert short["logging.probe_every_epochs"].value == 0 < short["logging.knn_every_epochs"].value
    assert long["logging.probe_every_epochs"].value > 0


@pytest.mark.parametrize(
    ("overrides", "facts", "name"),
    [
        (["schedule.minutes=1"], {"machine": H200, "side": 32}, "resnet18"),
        (["schedule.minutes=1", "encoder.width=8"], {}, "resnet10"),
        (["schedule.minutes=1", "encoder.stem=small"], {}, "resnet10"),
        (["schedule.minutes=1", "encoder.weights=a.pth"], {}, "resnet10"),
        (["schedule.minutes=1", "encoder.weights=a.pth"], {"network": ArchSpec("vit_tiny", {})}, "vit_tiny"),
        (["schedule.minutes=1", "encoder.name=resnet18"], {}, None),
    ],
)
def test_another_run_keeps_its_network_and_its_views(overrides, facts, name):
    made = decided(*overrides, **facts)
    assert (made["encoder.name"].value if "encoder.name" in made else None) == name
    assert not {"encoder.args", "augment.global_size", "augment.first_size"} & made.keys()
    assert made["logging.probe_every_epochs"].value > 0


def test_stated_sizes_of_views_or_images_are_kept():
    for stated in ("augment.global_size=28", "augment.first_size=12"):
        made = decided("schedule.minutes=1", stated)
        assert not {"augment.global_size", "augment.first_size"} & made.keys()
    made = decided("schedule.minutes=1", "data.image_size=40")
    assert (made["augment.global_size"].value, made["augment.first_size"].value) == (30, 20)


def test_bfloat16_where_the_device_has_it():
    assert "trainer.precision" not in decided()
    assert value("trainer.precision", machine=replace(LAPTOP, bfloat16=True)) == "bf16-mixed"
    assert "trainer.precision" not in decided(machine=MAC)
    assert value("trainer.precision", machine=H200) == "bf16-mixed"
    assert value("trainer.precision", machine=OLD_GPU) == "16-mixed"


def test_one_of_several_gpus_is_used():
    assert "trainer.devices" not in decided(machine=H200)
    made = decided(machine=replace(H200, devices=4))["trainer.devices"]
    assert made.value == 1
    assert "trainer.devices=4" in made.reason


def test_scores_are_rare_enough_to_be_cheap():
    assert value("logging.knn_every_epochs", "schedule.epochs=1000", num_images=50_000) == 100
    assert value("logging.knn_every_epochs", "schedule.epochs=4", num_images=50_000) == 1
    assert value("logging.knn_every_epochs", "schedule.epochs=10", num_images=5000) == 3
    short, long = (value("logging.knn_every_epochs", f"schedule.minutes={each}") for each in (1, 1000))
    assert 1 <= short < long
    names = {"logging.knn_every_epochs", "logging.probe_every_epochs", "logging.score_share"}
    assert decided()["logging.score_share"].value == 0.1
    assert "logging.score_share" not in decided("logging.knn_every_epochs=1")
    assert not names & decided(labelled=False).keys()


def test_a_blur_of_pixels_is_for_images_that_have_them():
    assert value("augment.view_1.blur") == value("augment.view_2.blur") == 0
    assert not {"augment.view_1.blur", "augment.view_2.blur"} & decided(machine=H200).keys()
    assert not {"augment.view_1.blur", "augment.view_2.blur"} & decided("augment.view_1.blur=0.3").keys()


def test_what_is_stated_is_never_decided():
    gpus, settings = replace(H200, devices=2), flat(asdict(PretrainConfig())) | {"method": "moco"}
    large, small = (
        replace(FOLDER, num_images=images, side=side, white=4095)
        for images, side in ((10**7, 96), (5000, 32))
    )
    network = ArchSpec("resnet18", {"width": 8, "stem": "small", "further": 1})
    cases = ((large, (), None), (small, (), None), (large, {"method"}, None), (small, (), network))
    everything = {
        made.key
        for folder, stated, network in cases
        for made in decide(folder, gpus, settings, stated, network)
    }
    short = settings | {"schedule.minutes": 1.0}
    everything |= {made.key for made in decide(small, LAPTOP, short, {"schedule.minutes"})}
    assert everything == RULES.keys()
    for key in everything:
        for folder in (large, small):
            assert key not in {made.key for made in decide(folder, gpus, settings, {key})}
            assert key not in {made.key for made in decide(folder, LAPTOP, short, {key})}


def test_a_decision_reads_as_it_is_typed():
    assert str(Decision("data.mean", [0.5, 0.25], "", "")) == "data.mean=[0.5,0.25]"
    assert str(Decision("encoder.name", "resnet10", "", "")) == "encoder.name=resnet10"


def test_every_decision_gives_a_reason():
    for machine in (LAPTOP, OLD_GPU, H200):
        for decision in decided(machine=machine).values():
            assert decision.reason
            assert "\n" not in decision.reason + decision.more


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("photos", "photos"),
        ("/data/My photos (2020)/", "My-photos-2020"),
        ("a/..hidden", "hidden"),
        ("/", "own"),
        ("photos/../b", "b"),
    ],
)
def test_a_run_is_named_after_its_folder(root, name):
    assert run_name(root) == name


@pytest.mark.parametrize(
    ("facts", "given", "left"),
    [
        ({}, (), ["views differ in colour and are mirrored", "hue=0", "flip=0"]),
        ({}, ("flip=0.1",), ["views differ in colour;", "hue=0"]),
        ({}, ("hue=0.1",), ["views are mirrored;", "flip=0"]),
        ({}, ("hue=0.1", "flip=0.1"), []),
        ({"grey": 1.0}, ("hue=0.1",), ["views are mirrored;", "flip=0"]),
        ({"grey": 1.0}, ("flip=0.1",), []),
        ({"two_valued": 1.0}, ("flip=0.1",), ["two brightnesses", "rotate=15"]),
        ({"two_valued": 1.0}, ("rotate=0",), ["two brightnesses", "flip=0"]),
        ({"two_valued": 1.0}, ("rotate=0", "flip=0.1"), []),
    ],
)
def test_what_the_user_gives_is_not_advised(facts, given, left):
    """Whatever its value is, and also where the recipe states the same setting."""
    overrides = [f"augment.view_1.{each}" for each in given]
    stated = read_stated(PretrainConfig, "pretrain", "own", overrides)
    settings = flat(asdict(stated.config({"schedule.warmup_epochs": 0.0})))
    said = remarks(replace(FOLDER, **facts), settings, stated.given)
    assert len(said) == bool(left)
    assert all(words in said[0] for words in left)
    absent = {"hue=0", "flip=0", "rotate=15"} - {*left}
    assert not [words for words in absent if said and words in said[0]]


def test_files_of_fewer_bits_than_others_are_named():
    settings = flat(asdict(PretrainConfig()))
    mixed = remarks(replace(FOLDER, deep=1.0, dark=0.5, white_of_dark=4095), settings)
    assert mixed[0].startswith(
        "50% of the 16-bit images have values of only 12 bits, nearly black where 65535"
    )
    assert "data.white=4095" in mixed[0]
    assert mixed[1:] == remarks(FOLDER, settings) == remarks(replace(FOLDER, dark=0.09), settings)


def test_a_fourth_band_is_named():
    settings = flat(asdict(PretrainConfig()))
    banded = remarks(replace(FOLDER, alpha=1.0, fourth_band=0.4), settings)
    assert banded[0].startswith("40% of the images have a fourth channel that looks like a picture")
    assert banded[1:] == remarks(replace(FOLDER, alpha=1.0, fourth_band=0.05), settings)


def test_what_may_carry_meaning_is_named_and_left_alone():
    settings = flat(asdict(PretrainConfig()))
    colours = remarks(FOLDER, settings)[0]
    assert "augment.view_1.hue=0 augment.view_1.grayscale=0" in colours
    assert colours.endswith("(view_2 follows)")
    assert "view_2" not in remarks(FOLDER, settings | {"augment.view_2.flip": 0.1})[0]
    grey = remarks(replace(FOLDER, grey=1.0), settings)
    assert grey == [
        "views are mirrored; if left and right carry meaning, add augment.view_1.flip=0 (view_2 follows)"
    ]
    writing = remarks(replace(FOLDER, grey=1.0, two_valued=0.9), settings)[0]
    assert "for written characters, add small motions: augment.view_1.rotate=15" in writing
    assert "digits" not in writing  # its jitter of 0 lets the views of a scan match by their brightness
    still = settings | {f"augment.view_1.{name}": 0.0 for name in ("jitter", "grayscale", "flip")}
    assert remarks(FOLDER, still) == remarks(replace(FOLDER, grey=1.0), still) == []
    small = {f"augment.view_1.{name}": 1.0 for name in ("rotate", "translate", "shear")}
    assert remarks(replace(FOLDER, two_valued=0.9), still | small) == []
    for facts in ({"grey": 1.0}, {"two_valued": 1.0}):
        assert not [key for key in decided(**facts) if key.endswith((".flip", ".jitter", ".grayscale"))]
