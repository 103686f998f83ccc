"""Log an evaluation as a W&B run of its own, linked to the pretraining whose encoder it scored."""

import json
import logging
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from contrastive.config import DataConfig, PretrainConfig, WandbConfig
from contrastive.config_files import load_saved
from contrastive.drawing.figures import confusion
from contrastive.logging.names import STEP_AXIS
from contrastive.logging.wandb_run import describe_run, encoder_name, forgiving, start_run, use_encoder
from eval.config import EvalConfig
from eval.eval_data import place_of_result, title_of
from eval.frozen import resolve

log = logging.getLogger(__name__)

_PREFIXES = {
    "worth": "probe/worth_",
    "linear": "probe/",
    "lowshot": "probe/",
    "finetune": "probe/finetune_",
    "linear_sgd": "probe/sgd_augmented_",
    "neighbours": "probe/neighbours_",
    "retrieval": "probe/retrieval_",
    "segment": "probe/segment_",
    "stats": "stats/features_",
    "attention": "stats/attention_",
}
"""Prefix of the names on W&B, if it is not ``PROTOCOL/``."""


def track(result: dict[str, Any], config: EvalConfig) -> None:
    """Log a result of :func:`eval.evaluate.evaluate` to W&B, by the pretraining's W&B settings or ``wandb``.

    The W&B run is in the pretraining's group, its job type is the protocol, and it consumes the encoder's
    artifact. Nothing is logged if W&B is off, or the encoder is not in a run directory.
    """
    location = resolve(config.checkpoint, config.out)
    if location.run is None:
        return
    saved = load_saved(PretrainConfig, location.run / "config.yaml")
    pretrain_id = OmegaConf.select(OmegaConf.load(location.run / "config.yaml"), "provenance.wandb_id")
    if pretrain_id is None:  # a config.yaml that a person wrote
        return
    run = start_run(
        _settings(saved.logging.wandb, config),
        location.run,
        pretrain_id=pretrain_id,
        quiet=True,
        id=secrets.token_hex(4),  # or WANDB_RUN_ID, where a sweep has set it, would make it the pretraining's
        name=f"{saved.run.name} {result['protocol']}{_on_other(saved.data, result)}",
        job_type=result["protocol"],
        config={"run": {"name": saved.run.name}, "pretrain": pretrain_id, "eval": _origin(result)},
    )
    if run is None:
        return
    assert isinstance(location.encoder, Path)  # a run's own
    use_encoder(run, location.encoder, _artifact(pretrain_id, location.encoder, location.run))
    with forgiving("the result"):
        run.define_metric("*", step_metric=STEP_AXIS)
        run.log(scalars(result) | _confusion(result) | _step(location.encoder))
    with forgiving("the end of the run"):
        run.finish()
        log.info(describe_run(run))


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """Return numbers by their names on W&B: ``probe/top1``, ``knn/top1_k=20``; a baseline's name is appended.

    The first number of ``knn`` is also ``knn/top1``, the name of the online score. ``stats`` are named
    ``stats/features_rankme`` and so on: they are of the encoder's features, online statistics of the keys.
    """
    prefix = _prefix(result)
    if isinstance(result["scores"], dict):  # no accuracies
        return {
            f"{prefix}{number}" + ("" if which == "encoder" else f"_{which}"): value
            for which, numbers in result["scores"].items()
            for number, value in numbers.items()
            if not isinstance(value, str)
        }
    found = {}
    for row in result["scores"]:
        name = prefix + row["name"].replace(" ", "_")
        for which, number in row.items():
            if isinstance(number, dict) and "value" in number:
                found[name if which == "encoder" else f"{name}_{which}"] = number["value"]
    if result["protocol"] == "knn":
        found["knn/top1"] = result["scores"][0]["encoder"]["value"]
    return found


def _settings(own: WandbConfig, config: EvalConfig) -> WandbConfig:
    return own if config.wandb is None else replace(own, mode=config.wandb)


def _prefix(result: dict[str, Any]) -> str:
    return _PREFIXES.get(result["protocol"], f"{result['protocol']}/")


def _on_other(own: DataConfig, result: dict[str, Any]) -> str:
    """Return `` on NAME`` if the images are not the run's own."""
    place = place_of_result(own, result["data"])
    return f" on {title_of(place)}" if place else ""


def _origin(result: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, hashes and versions that produced the numbers."""
    return {name: value for name, value in result.items() if name not in ("scores", "details")}


def _artifact(pretrain_id: str, encoder: Path, run: Path) -> str:
    """Return the name of the run's encoder artifact; an earlier checkpoint has one of its own."""
    folder = encoder.absolute().parent
    return encoder_name(pretrain_id, "" if folder == run.absolute() else folder.name)


def _step(encoder: Path) -> dict[str, int]:
    """Return the encoder's training step, so that checkpoints make a curve."""
    folder, summary = encoder.absolute().parent, encoder.parent / "summary.json"
    name, _, number = folder.name.partition("-")
    if name == "step" and number.isdecimal():
        return {STEP_AXIS: int(number)}
    return {STEP_AXIS: int(json.loads(summary.read_text())["steps"])} if summary.is_file() else {}


def _confusion(result: dict[str, Any]) -> dict[str, Any]:
    import wandb

    counts = result["details"].get("encoder", {}).get("confusion")
    if counts is None:
        return {}
    picture = confusion(counts, result["data"]["classes"]).pixels()
    caption = "rows are true classes, columns are predicted ones"
    return {f"{_prefix(result)}confusion": wandb.Image(picture.permute(1, 2, 0).numpy(), caption=caption)}
