"""``contrastive-shards``: pack images into indexed tar shards, index and check shards."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrastive.config import DataConfig, RemoteConfig, UserError, check_path
from contrastive.config_files import Stated, read_stated
from contrastive.console import log_to_stderr, print_result
from memory_bank.config import check_range

logger = logging.getLogger("contrastive.shards")  # also as python -m contrastive.shards

USAGE = """\
usage: contrastive-shards pack [DIR] OUT [data.name=NAME] [shard_mib=256] [shuffle=true] [key=value ...]
       contrastive-shards index DIR|TAR|URL ... [out=DIR]
       contrastive-shards check DIR|URL

Indexed tar shards: data in a few large files, on a disk or behind a URL, trained on with
data.name=shards data.root=DIR-or-URL. The layout is WebDataset's: KEY.jpg, KEY.cls.

  pack   write images into shards below OUT; their test part, if there is one, goes to OUT/test, the others
         to OUT/train. Unless data.name is given, class folders are read as imagefolder, which holds some
         images out, and other trees as images. Each is decoded once: those that cannot be read are
         named with the reason, counted, and left out
  index  index uncompressed tar files that are there, by reading each once; the index is written beside
         them, or to out=DIR, which is then the data.root
  check  compare every sample with its hash, and look for keys that a shard has twice

  out=DIR  data.image_size=...  remote.retry_s=300  remote.timeout_s=30

URLs (s3://, gs://, https://) need pip install 'contrastive-pretrain[remote]'; credentials are taken from
where each service's own tools have them. The last line of stdout is one JSON object. Exit codes: 0 done,
2 wrong input or damaged shards, 130 interrupted, 1 a fault of the program.
"""


@dataclass
class ShardsConfig:
    """Settings of contrastive-shards.

    Attributes:
        data: Of ``pack``: the images.
        shard_mib: Of ``pack``: MiB at which the next shard begins.
        shuffle: Of ``pack``: write them in random order.
        out: Of ``index``: folder of the index, if not that of the shards.
        remote: How URLs are read.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(name="images"))
    shard_mib: float = 256.0
    shuffle: bool = True
    out: str | None = None
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        check_range("shard_mib", self.shard_mib, 0.001)
        self.out = None if self.out is None else check_path("out", self.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    log_to_stderr()
    try:
        if not given or {"--help", "-h"} & {*given}:
            print_result(USAGE.rstrip())
            return 0
        code, result = _run(*given)
        print_result(json.dumps(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    return code


def _run(command: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    commands = {"pack": _pack, "index": _index, "check": _check}
    if command not in commands:
        raise UserError(f"{command!r}: no such command; there are {', '.join(commands)}")
    # Behind the protocol of a URL an equals sign belongs to a name.
    settings = [text for text in arguments if "=" in text.partition("://")[0]]
    places = [check_path(command, text) for text in arguments if text not in settings]
    return commands[command](places, read_stated(ShardsConfig, "shards", None, settings))


def _pack(places: Sequence[str], stated: Stated[ShardsConfig]) -> tuple[int, dict[str, Any]]:
    if not 1 <= len(places) <= 2:
        raise UserError(f"pack {' '.join(places)}: a folder of images and one for the shards are needed")
    from contrastive.data.dataset import open_dataset
    from contrastive.data.shards.pack import pack

    config = stated.config()
    if len(places) == 2:
        config.data.root = places[0]
    _check_local(config.data, places[-1])
    if "data.name" not in stated.keys and config.data.root:
        config.data.name = _find_source(config.data.root)
    data, out = open_dataset(config.data), Path(places[-1])
    parts = {"train": data.train} | ({"test": data.test} if data.test is not None else {})
    size, sets = int(config.shard_mib * 2**20), {}
    for name, images in parts.items():
        held_out = name == "test" and data.held_out_by_hash
        folder = out / name if len(parts) > 1 else out
        sets[name] = pack(images, folder, shard_bytes=size, shuffle=config.shuffle, held_out=held_out)
    counts = {name: sum(entry.samples for entry in found.shards) for name, found in sets.items()}
    shards = {name: len(found.shards) for name, found in sets.items()}
    left_out = {name: len(images) - counts[name] for name, images in parts.items()}
    logger.info("%s: %s", out, _describe(counts, sum(left_out.values()), sets["train"].classes))
    return 0, {"root": str(out), "samples": counts, "shards": shards, "left_out": left_out}


def _check_local(data: DataConfig, out: str) -> None:
    """Refuse URLs where ``pack`` reads or writes files.

    Raises:
        UserError: ``out`` is a URL, or ``data.root`` is one and the source reads none.
    """
    from contrastive.data.shards.ranges import check_url, is_local

    if not is_local(check_url(out)):
        raise UserError(
            f"pack: shards are written to a folder of this machine, and {out} is a URL; give a folder, and "
            "copy it there"
        )
    if data.root and not is_local(check_url(data.root)) and data.name not in ("shards", "hf"):
        raise UserError(
            f"pack: data.name={data.name} reads files of this machine, and {data.root} is a URL; copy the "
            "images here, or, where tar shards are behind the URL, index them there: contrastive-shards "
            "index URL ... out=DIR"
        )


def _describe(counts: dict[str, int], left_out: int, classes: Sequence[str] | None) -> str:
    kind = "without labels" if classes is None else f"of {len(classes)} classes"
    test = f", {counts['test']:,} of them in the test part" if "test" in counts else ""
    lacking = f"; {left_out:,} more cannot be read and were left out, see above" if left_out else ""
    return f"{sum(counts.values()):,} samples {kind}{test}{lacking}"


def _find_source(root: str) -> str:
    """Choose how a folder is read as ``--config own`` does; return ``data.name``.

    Raises:
        UserError: see ``look.find_source``; also a training and a test part that are no class folders.
    """
    from contrastive.choosing.look import find_source
    from contrastive.data.files import find_parts

    source, why = find_source(root)
    if source == "images" and (parts := find_parts(Path(root)))[1] is not None:
        train, test = parts
        raise UserError(
            f"pack {root}: {train} and {test} are parts of one data set, and would be mixed; add "
            "data.name=imagefolder, which keeps both with the labels of their class folders, or pack each "
            "into a folder of its own, OUT/train and OUT/test, or add data.name=images to mix them"
        )
    logger.info("%s: data.name=%s, as %s", root, source, why)
    return source


def _index(places: Sequence[str], stated: Stated[ShardsConfig]) -> tuple[int, dict[str, Any]]:
    from contrastive.data.shards.pack import index_shards
    from contrastive.data.shards.ranges import Ranges, check_url, is_local

    config = stated.config()
    urls = [url for place in map(check_url, places) for url in _tars(place)]
    folders = {str(Path(url).parent) if is_local(url) else "" for url in urls}
    if not urls or (config.out is None and (len(folders) > 1 or "" in folders)):
        raise UserError(
            f"index {' '.join(places)}: the index cannot be written beside these; add out=DIR"
            if urls
            else "index: tar files, a folder of them, or URLs are needed"
        )
    out = Path(config.out or folders.pop())
    found = index_shards(Ranges(config.remote), urls, out)
    return 0, {"root": str(out), "samples": sum(e.samples for e in found.shards), "shards": len(found.shards)}


def _tars(place: str) -> list[str]:
    """List the tar files of a folder; return any other place as it is.

    Raises:
        UserError: a folder without a tar file, or a URL that looks like a folder's.
    """
    name = place.rsplit("/", 1)[-1]
    if "://" in place and "." not in name:
        raise UserError(
            f"index {place}: folders behind a URL are not listed; give the URL of each tar file, e.g. "
            f"{place}/shard-000000.tar"
        )
    if not Path(place).is_dir():
        return [place]
    inside = sorted(map(str, Path(place).glob("*.tar")))
    if not inside:
        below = sorted({str(path.parent) for path in Path(place).glob("*/*.tar")})
        raise UserError(
            f"index {place}: no .tar file in it; "
            + (
                f"index each of its folders that has some: {', '.join(below)}"
                if below
                else "give one that has"
            )
        )
    return inside


def _check(places: Sequence[str], stated: Stated[ShardsConfig]) -> tuple[int, dict[str, Any]]:
    from contrastive.data.shards.index import SET_FILE, read_set
    from contrastive.data.shards.pack import check_set
    from contrastive.data.shards.ranges import Ranges, check_url

    if len(places) != 1:
        raise UserError(f"check {' '.join(places)}: one folder or URL is needed")
    root, ranges = check_url(places[0]), Ranges(stated.config().remote)
    roots = (root, *(f"{root}/{part}" for part in ("train", "val", "test")))
    sets = {place: found for place in roots if (found := read_set(ranges, place)) is not None}
    if not sets:
        raise UserError(
            f"{root}: no {SET_FILE} in it, nor in its train/; run contrastive-shards index {root}"
        )
    problems: dict[str, str] = {}
    for place, found in sets.items():
        problems |= {f"{place}/{name}": why for name, why in check_set(ranges, place, found).items()}
    for name, why in problems.items():
        print(f"{name}: {why}", file=sys.stderr)
    entries = [entry for found in sets.values() for entry in found.shards]
    counts = {"samples": sum(entry.samples for entry in entries), "shards": len(entries)}
    return 2 if problems else 0, {"root": root, **counts, "damaged": len(problems)}


if __name__ == "__main__":
    sys.exit(main())
