"""Map the names that a config may use to where they are defined; add one line here for each new part."""

METHODS = {
    "moco": "contrastive.methods.moco:Moco",
    "simclr": "contrastive.methods.simclr:SimClr",
    "sogclr": "contrastive.methods.sogclr:SogClr",
    "nnclr": "contrastive.methods.nnclr:Nnclr",
    "neighbour": "contrastive.methods.neighbour:Neighbour",
}
"""``method``: subclasses of ``contrastive.methods.method.Method``."""

OBJECTIVES = {
    "info_nce": "contrastive.objectives.info_nce:build",
    "dcl": "contrastive.objectives.decoupled:build_dcl",
    "dclw": "contrastive.objectives.decoupled:build_dclw",
    "debiased": "contrastive.objectives.debiased:build_debiased",
    "hcl": "contrastive.objectives.debiased:build_hcl",
    "mixing": "contrastive.objectives.mixing:build",
    "neighbour_info_nce": "contrastive.objectives.neighbour_info_nce:build",
    "supcon": "contrastive.objectives.supcon:build",
}
"""``objective.name``: functions from ``contrastive.objectives.build.LossSettings`` to an Objective.

Further arguments are the loss's own settings: one that ``ObjectiveConfig`` has (``beta``) is taken from
there, ``labels`` is the class of each row of the data, the others are from ``objective.args``.
"""

DATASETS = {
    "digits": "contrastive.data.digits:open_digits",
    "imagefolder": "contrastive.data.files:open_imagefolder",
    "images": "contrastive.data.files:open_images",
    "shards": "contrastive.data.shards.images:open_shards",
    "hf": "contrastive.data.hf:open_hf",
    "cifar10": "contrastive.data.cifar:open_cifar10",
    "cifar100": "contrastive.data.cifar:open_cifar100",
    "stl10": "contrastive.data.stl10:open_stl10",
    "imagenet": "contrastive.data.imagenet:open_imagenet",
    "moving_digits": "contrastive.data.moving_digits:open_moving_digits",
    "clips": "contrastive.data.video:open_clips",
}
"""``data.name``: functions from ``DataConfig`` to a ``contrastive.data.dataset.Dataset``."""

ORDERS = {
    "global": "contrastive.data.order.global_:build",
    "blocks": "contrastive.data.order.blocks:build",
    "neighbours": "contrastive.data.order.neighbours:build",
}
"""``data.order``: functions from ``(Images, PretrainConfig)`` to a ``contrastive.data.order.base.Order``."""

ENCODERS = {
    "resnet10": "contrastive.encoders.resnet:build",
    "resnet18": "contrastive.encoders.resnet:build",
    "resnet34": "contrastive.encoders.resnet:build",
    "resnet50": "contrastive.encoders.resnet:build",
    "vit_tiny": "contrastive.encoders.vit:build",
    "vit_small": "contrastive.encoders.vit:build",
    "vit_base": "contrastive.encoders.vit:build",
    "convnext_tiny": "contrastive.encoders.convnext:build",
    "hybrid_resnet18": "contrastive.encoders.hybrid:build",
    "cpu_resnet": "contrastive.encoders.cpu_resnet:build",
    "r3d_10": "contrastive.encoders.r3d:build",
    "timm:": "contrastive.encoders.timm_model:build",
    "torchvision:": "contrastive.encoders.torchvision_model:build",
}
"""``encoder.name``: functions from the name, the image size and ``encoder.args`` to an Encoder.

For a key with a colon, the name of the library's network follows it, and the function gets only that. A
function with an argument ``frames`` gets the number of frames of a clip.
"""


TEMPORAL_HEADS = {
    "mean": "contrastive.encoders.temporal_heads:Mean",
    "attention": "contrastive.encoders.temporal_heads:Attention",
    "nuta": "contrastive.encoders.temporal_heads:Nuta",
}
"""``encoder.temporal``: functions from the size of a frame's features and ``encoder.temporal_args`` to a
``contrastive.encoders.temporal.TemporalHead``."""


def encoder_key(name: str) -> str:
    """Return the key of ``ENCODERS`` for an ``encoder.name``: up to its colon, or all of it."""
    library, colon, _ = name.partition(":")
    return library + colon
