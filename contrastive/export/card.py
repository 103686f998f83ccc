"""Write the model card: network, data, recipe, scores, and how to load the file."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from contrastive.config import WHITE, DataConfig, PretrainConfig, UserError
from contrastive.config_files import load_saved
from contrastive.data.image_list import read_image_list
from contrastive.encoders.spec import OWN
from contrastive.export.config import ExportConfig
from contrastive.export.source import ExportedEncoder
from contrastive.methods.build import find_method, takes_from_bank
from contrastive.objectives.build import takes_labels
from eval.eval_data import place_of_result, title_of
from eval.protocol import accuracy_titles
from eval.registry import FORMER_NAMES
from eval.run_files import describe_epochs, read_json
from memory_bank.methods.base import method_of
from memory_bank.replacing import write_file

log = logging.getLogger(__name__)

_UNTOLD = ("wandb_id", "root")
"""Provenance that a card does not publish."""


def card_of(out: Path) -> Path:
    """Return the path of the card: the full name of ``out`` plus ``.md``, since ``notes.md`` may exist."""
    return out.with_name(f"{out.name}.md")


def write_card(config: ExportConfig, source: ExportedEncoder, out: Path, facts: dict[str, Any]) -> Path:
    """Write the card of ``out``; return its path."""
    path = card_of(out)
    text = "\n".join(_lines(config, source, out, facts)) + "\n"
    write_file(path, lambda file: file.write(text.encode()))
    return path


def _lines(config: ExportConfig, source: ExportedEncoder, out: Path, facts: dict[str, Any]) -> list[str]:
    saved = load_saved(PretrainConfig, source.run / "config.yaml") if source.run else None
    clips = source.input.frames > 1
    about = {
        "file": f"`{out.name}`, format {config.format}",
        "network": str(source.arch),
        "features": f"{source.encoder.dim} numbers {'a clip' if clips else 'an image'}, pooled, without the "
        "projector",
        "input": (f"{source.input.frames} frames, " if clips else "")
        + f"RGB, {source.input.size} x {source.input.size} px, float32 in [0, 1]"
        + _fed(config, source)
        + _scaled(source.input.white)
        + (_spaced(saved.data) if clips and saved else ""),
        "trained by": "contrastive pretraining" + (f", {_described(saved)}" if saved else ""),
        "encoder.safetensors": f"SHA-256 `{source.sha256}`",
    }
    lines = [f"# {source.run.name if source.run else out.stem}", "", *_table(about), "", "## Load it", ""]
    lines += ["```python", *facts["load"], "```", ""]
    lines += ["## Or the encoder itself, with this package", "", "```python", *_python(source), "```", ""]
    if config.format == "embeddings":
        lines += ["## Rows", "", *_table(_rows(facts)), ""]
    if source.run is None or saved is None:
        return [*lines, "The run that made it is not known: it was exported from the file alone."]
    return [*lines, *_recipe(source.run, saved), "## Scores", "", *_scores(source, source.run, saved.data)]


def _python(source: ExportedEncoder) -> list[str]:
    """Return the Python code from files, or the frames of clips, to features, by ``load_encoder``."""
    own = f", encoder={source.arch.name.removeprefix(OWN)}()" if source.arch.is_own else ""
    clips = source.input.frames > 1
    read = "read_file(path, info.input.decode_size, info.input.white)"
    read = f'torch.stack([{read} for path in ["photo.jpg"]])'
    return [
        "import torch",
        "from contrastive.augment.views import center_view",
        *["from contrastive.data.decode import read_file"] * (not clips),
        "from contrastive.encoders.weights import load_encoder",
        "",
        f"encoder, info = load_encoder({str(source.file.absolute())!r}{own})",
        "images = " + ("frames  # uint8 (b, t, 3, s, s), squares of any size" if clips else read),
        "with torch.inference_mode():",
        f"    features = encoder(center_view(images, info.input.data))  # (b, {source.encoder.dim})",
    ]


def _fed(config: ExportConfig, source: ExportedEncoder) -> str:
    if config.format in ("onnx", "embeddings"):
        return "; normalised inside" if config.format == "onnx" else ""
    return f", then minus mean {source.input.mean}, over std {source.input.std}"


def _scaled(white: int) -> str:
    """Describe how grey files of more than 8 bits become numbers, where it is not by all of their 16 bits."""
    return f"; of 16-bit grey files {white} and more is 1" if white != WHITE else ""


def _spaced(data: DataConfig) -> str:
    """Describe which frames of a video make a clip."""
    return f"; {data.fps:g} frames a second" if data.fps else f"; every frame_step = {data.frame_step} frames"


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    data = facts["data"]
    return {
        "data": f"{_place(data['name'], data['root'])}, {data['part']} part",
        "images": f"{facts['rows']}; {facts['unreadable']} more could not be read",
    }


def _place(name: str, root: str | None) -> str:
    return f"`{name}`" + (f" at `{root}`" if root else "")


def _described(saved: PretrainConfig) -> str:
    labels = "with labels" if takes_labels(saved.objective) else "without labels"
    source = "mined from a memory bank" if _mines(saved) else "are the other images of the batch"
    return f"{labels}, negatives {source}"


def _mines(saved: PretrainConfig) -> bool:
    return takes_from_bank(find_method(saved), method_of(saved.mining))


def _negatives(saved: PretrainConfig) -> str:
    """Describe the negatives by the settings that chose them."""
    mining = saved.mining
    if not _mines(saved):
        return "the other images of the batch"
    if mining.method != "ranked":
        return f"mined from a memory bank: {mining.method}"
    return (
        f"mined from a memory bank: ranked, {mining.num_hard} hard and {mining.num_uniform} uniform, band "
        f"{list(mining.band)}, class prior {mining.class_prior}, false negatives: {mining.false_negative}"
    )


def _recipe(run: Path, saved: PretrainConfig) -> list[str]:
    """Describe data, settings and versions, from config.yaml."""
    data, objective = saved.data, saved.objective
    images = ""
    if (run / "manifest.csv").is_file():
        manifest = read_image_list(run / "manifest.csv")
        images = f", {len(manifest.keys)} images, fingerprint `{manifest.fingerprint()[:16]}`"
    recipe = {
        "data": _place(data.name, data.root) + images,
        "starting weights": f"`{saved.encoder.weights}`" if saved.encoder.weights else "random",
        "length": f"{describe_epochs(run, saved.schedule)}, batches of {data.global_batch}, "
        f"seed {saved.run.seed}",
        "method": saved.method,
        "loss": f"{objective.name}, temperature {objective.temperature}",
        "negatives": _negatives(saved),
        "optimizer": f"{saved.optimizer.name}, base_lr {saved.optimizer.base_lr}, "
        f"weight decay {saved.optimizer.weight_decay}",
    }
    document = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(document, dict)
    provenance = document.get("provenance", {})
    versions = {name: f"`{value}`" for name, value in provenance.items() if value and name not in _UNTOLD}
    return ["## Recipe", "", *_table(recipe | versions), "", "Every setting is in the run's config.yaml.", ""]


@dataclass
class _Scores:
    """Results on one data set: lines of a table, or, without labels, the sentence of ``worth`` alone."""

    lines: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def add(self, protocol: str, result: dict[str, Any]) -> None:
        """Add a result; ``worth`` is the last, as it repeats numbers of others, which stand once."""
        scores = result["scores"]
        if isinstance(scores, dict):
            self.sentences.append(str(result["sentence"]))
            return
        known = self.seen if protocol == "worth" else []
        self.lines += [_score(protocol, row) for row in scores if row | {"name": ""} not in known]
        self.seen += [row | {"name": ""} for row in scores]

    def show(self, place: str) -> list[str]:
        """Return the table, or the sentences, below the name of the images if they are not the run's own."""
        other = f"other images than the run's (`{title_of(place)}`)"
        if not self.lines:
            return [f"On {other}: {text}" if place else text for text in self.sentences]
        head = ["| protocol | number | % | 95% interval | beside it |", "|---|---|---|---|---|"]
        return [f"On the test part{f' of {other}' if place else ''}, in percent.", "", *head, *self.lines]


def _scores(source: ExportedEncoder, run: Path, own: DataConfig) -> list[str]:
    """Tabulate the accuracies of exactly these weights by contrastive-eval, with their baselines.

    Of one protocol on the same images the latest result counts. Those on other images than the run's own are
    shown only where it has none on these.
    """
    accuracies, latest = accuracy_titles(), dict[tuple[bool, str, str], dict[str, Any]]()
    for file in sorted((run / "eval").rglob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        try:
            result = read_json(file)
            protocol = FORMER_NAMES.get(file.stem, file.stem)
            if result.get("encoder_sha256") != source.sha256 or protocol not in accuracies:
                continue
            latest[protocol == "worth", protocol, place_of_result(own, result["data"])] = result
        except UserError as error:
            log.warning("left out of the card: %s", error)
        except (KeyError, TypeError, ValueError):
            continue  # another program's file
    known = {"": _Scores()}
    for (_, protocol, place), result in sorted(latest.items(), key=lambda item: item[0]):
        known.setdefault(place, _Scores()).add(protocol, result)
    shown = {"": known[""]} if known[""].lines else known
    parts = [each.show(place) for place, each in shown.items() if each.lines or each.sentences]
    if not parts:
        return ["None yet: `contrastive-eval worth checkpoint=RUN` makes some."]
    return [line for part in parts for line in ["", *part]][1:]


def _score(protocol: str, row: dict[str, Any]) -> str:
    ours = row["encoder"]
    others = [
        f"{name.replace('_', ' ')} {100 * number['value']:.1f}"
        for name, number in row.items()
        if name != "encoder" and isinstance(number, dict) and "value" in number
    ]
    interval = f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}"
    value = f"**{100 * ours['value']:.1f}**"
    return f"| {' | '.join([protocol, row['name'], value, interval, ', '.join(others)])} |"


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
