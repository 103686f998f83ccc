"""Define the lines of the GPU's table: which commands to run, and what to show of their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_presets import PRESETS, REGIMES

from contrastive.config import PretrainConfig
from contrastive.config_files import load_config, recipes

ROOT = Path(__file__).parents[1]
MINUTES = (2, 5, 15)
LARGE = 96  # px; above, a recipe's network is large and its step on the CPU takes a minute
QUIET = ("logging.progress=false", "logging.wandb.mode=disabled")

Result = dict[str, Any]
Figures = dict[str, float | str]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Name of the line and of its files.
        commands: Arguments of Python, run one after another. ``{work}`` becomes the row's own folder,
            ``{left}`` the seconds left. The result of a command is the JSON file it leaves in ``{work}``,
            else the last line of its stdout.
        read: Figures to show, from the results of all commands; None if the commands must run again.
        seconds: Estimate of the time; a row that resumes is started with less.
        resumes: Whether commands that were stopped by SIGTERM continue when they are run again.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    read: Callable[[list[Result]], Figures | None]
    seconds: float
    resumes: bool = False


def all_rows(device: str, data: Path | None, tiny: bool) -> list[Row]:
    """Return all lines, most valuable first; the ablation is last, because it takes hours.

    Args:
        device: ``cuda`` or ``cpu``.
        data: CIFAR-10 as image files, ``train/CLASS`` and ``test/CLASS``, and maybe ``outfits``; None leaves
            out what is scored on them, except what torchvision's copy in ``.data`` serves.
        tiny: Replace sizes by the smallest that run everything, to check the commands.
    """
    smokes = [smoke(recipe, device, tiny) for recipe in recipes("pretrain")]
    return [
        *sorted(smokes, key=lambda row: row.seconds),
        *trained(device, data, tiny),
        *benchmarks(device, tiny),
        nccl(device),
        ddp(device),
        *ablations(data, tiny),
    ]


def smoke(recipe: str, device: str, tiny: bool) -> Row:
    command = ("benchmarks/gpu_checks.py", "smoke", recipe, "--device", device, *["--tiny"] * tiny)
    large = load_config(PretrainConfig, "pretrain", recipe, []).data.image_size > LARGE
    return Row(f"smoke-{recipe}", (command,), read_smoke, 240 if large else 120)


def read_smoke(results: list[Result]) -> Figures:
    (found,) = results
    equal = "equal" if found["equal"] else "NOT EQUAL"
    first = (found["losses"][0], found["float32_loss"], found["cpu_loss"])
    return {
        "losses": f"{'finite' if found['finite'] else 'NOT FINITE'} for {found['steps']} steps",
        "first": "{:.4f}, in float32 {:.4f}, on the CPU {:.4f}: ".format(*first) + equal,
        "images/s": found["images_per_s"],
    }


def trained(device: str, data: Path | None, tiny: bool) -> list[Row]:
    """Return runs of cifar10_fast with a time budget, and their probes."""
    source: Sequence[str] = () if data is None else ("data.name=imagefolder", f"data.root={data.absolute()}")
    if tiny:
        source = ("data.name=digits", "data.root=null", "data.global_batch=64", "encoder.width=8")
    elif data is None and not (ROOT / ".data" / "cifar-10-batches-py").is_dir():
        return []
    on = f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"
    run = ("-m", "contrastive", "--config", "cifar10_fast", "run.root={work}", "run.name=run", on, *QUIET)
    probes = tuple(
        ("-m", "eval", protocol, "checkpoint={work}/run", "progress=false") for protocol in ("linear", "knn")
    )
    return [
        Row(
            f"cifar10_fast-{minutes}min",
            ((*run, f"schedule.minutes={minutes / 60 if tiny else minutes:g}", *source), *probes),
            read_trained,
            60 * minutes + 120,
            resumes=True,
        )
        for minutes in MINUTES
    ]


def read_trained(results: list[Result]) -> Figures:
    run, linear, knn = results
    return {
        "linear probe": _percent(linear["scores"]["top1"]["encoder"]),
        "kNN": _percent(knn["scores"]["top1 k=20"]["encoder"]),
        "epochs": run["epochs"],
        "minutes": run["seconds"] / 60,
    }


def benchmarks(device: str, tiny: bool) -> list[Row]:
    """Return the benchmarks; each measures its network, or the library it is compared with, beside it."""
    networks = ("resnet18", "resnet50") if device == "cuda" else ("resnet10",)
    banks, few = ("50000", "1280000"), ("--repeats", "2")
    if tiny:
        banks = ("3000",)
    step, augment, mining = (
        (f"benchmarks/bench_{name}.py", "--device", device, "--out", "{work}/result.json")
        for name in ("step", "augment", "mining")
    )
    smaller = (*few, "--steps", "1", "--batch", "16") if tiny else ()
    return [
        *(
            Row(f"step-{name}", ((*step, "--networks", name, *["--rounds", "2"] * tiny),), read_step, 300)
            for name in networks
        ),
        Row("views", ((*augment, *("--sizes", "32", *few) * tiny),), read_augment, 240),
        *(Row(f"mining-{rows}", ((*mining, "--rows", rows, *smaller),), read_mining, 240) for rows in banks),
    ]


def read_step(results: list[Result]) -> Figures:
    arms = {row["arm"]: row for row in results[0]["rows"]}
    figures: Figures = {"images/s": arms["ours"]["images_per_s"]}
    for name in ("limit", "lightly"):
        if name in arms:
            title = "over its networks alone" if name == "limit" else "over lightly"
            figures[title] = f"{arms[name]['ours_over_this']:.2f}"
    return figures


def read_augment(results: list[Result]) -> Figures:
    return {
        f"{row['size']} px, {row['arm'].replace('ours', 'views')}": (
            f"{row['views_per_s']:,.0f}/s, {row['over_stock_kornia']:.1f} times Kornia"
        )
        for row in results[0]["rows"]
        if row["arm"].startswith("ours")
    }


def read_mining(results: list[Result]) -> Figures:
    steps = {row["mining"]: row for row in results[0]["rows"]}
    added = {name: f"{row['added']:+.1%}" for name, row in steps.items() if name != "off"}
    return {"step without a bank, ms": steps["off"]["step_ms"], **added}


def nccl(device: str) -> Row:
    return Row("nccl", (("benchmarks/gpu_checks.py", "nccl", "--device", device),), read_nccl, 60)


def read_nccl(results: list[Result]) -> Figures:
    (found,) = results
    wrong = [name for name, right in found["collectives"].items() if not right]
    figures: Figures = {found["backend"]: f"WRONG: {', '.join(wrong)}" if wrong else "collectives unchanged"}
    if "sync_batch_norm_error" in found:
        figures["largest error of SyncBatchNorm"] = f"{found['sync_batch_norm_error']:.1e}"
    return figures


def ddp(device: str) -> Row:
    """Return a run of one rank under torchrun with its probe, which needs no data."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--module")
    on = (
        ("trainer.accelerator=gpu", "encoder.batch_norm=sync")
        if device == "cuda"
        else ("trainer.accelerator=cpu",)
    )
    run = (
        "contrastive",
        "run.root={work}",
        "run.name=run",
        "trainer.strategy=ddp",
        "trainer.max_steps=20",
        *QUIET,
    )
    probe = ("-m", "eval", "linear", "checkpoint={work}/run", "progress=false")
    return Row("ddp", ((*launch, *run, *on, "profile=true"), probe), read_ddp, 90)


def read_ddp(results: list[Result]) -> Figures:
    run, linear = results
    return {
        "steps": run["steps"],
        "loss": run["metrics"]["train/loss"],
        "linear probe": _percent(linear["scores"]["top1"]["encoder"]),
    }


def ablations(data: Path | None, tiny: bool) -> list[Row]:
    """Return the comparisons of ways to choose negatives; ``core`` and ``all`` share their cells."""
    if data is None:
        return []
    regimes = [name for name in REGIMES if (data / PRESETS[name].data.source).is_dir()]
    asked = {"ablate-core": ("gpu", "core", 15_000), "ablate-all": ("gpu", "all", 12_000)}
    asked |= {f"ablate-{name}": (f"{name}-gpu", "all", 30_000) for name in regimes}
    return [ablation(name, *how, data, tiny) for name, how in asked.items()]


def ablation(name: str, preset: str, arms: str, seconds: float, data: Path, tiny: bool) -> Row:
    command = ("benchmarks/ablate.py", "--preset", preset, "--arms", arms, "--data", str(data.absolute()))
    kept = ("--cache", "{work}/../ablate-cells", "--cells", "{work}/../ablate-cells", "--out", "{work}")
    how = ("--slice", "{left}", "--no-plot", *["--report"] * tiny)
    return Row(name, ((*command, *kept, *how),), read_ablation, seconds, resumes=True)


def read_ablation(results: list[Result]) -> Figures | None:
    (document,) = results
    if not document.get("confirmation") or document.get("missing"):
        return None
    winner = document["confirmation"]["winner"]
    score = next(iter(document.get("titles", ["linear"])))
    figures: Figures = {
        arm: _percent(found["scores"][score]["mean"]) for arm, found in document["arms"].items()
    }
    found = document["confirmation"]["differences"]["all_rows"][score].get(winner)
    if found is not None:
        low, mean, high = (f"{100 * found[name]:+.1f}" for name in ("low", "mean", "high"))
        figures[f"{winner} over all_rows on fresh seeds"] = f"{mean} [{low}, {high}]"
    return figures


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
