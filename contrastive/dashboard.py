"""``contrastive-dashboard``: create a W&B workspace for pretraining runs."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

from contrastive.config import UserError, first_line
from contrastive.console import print_result
from contrastive.logging.names import STEP_AXIS
from contrastive.logging.wandb_run import wandb_problem

USAGE = """\
usage: contrastive-dashboard --entity E --project P [--name NAME] [--json]

Creates a Weights & Biases workspace that shows whether runs learn, collapse or mine rubbish, and which
files they find hardest.

  --entity E   team or user
  --project P  project, logging.wandb.project of the runs
  --name NAME  of the workspace; "Contrastive pretraining" unless given
  --json       print the workspace instead of creating it; needs no network

Each call creates a new workspace. Needs pip install 'contrastive-pretrain[dashboards]'. The last line of
stdout is one JSON object. Exit codes: 0 done, 2 wrong input, 1 a fault of the program.
"""

_FLAGS = ("--entity", "--project", "--name")

LINES = {
    "Learning": {
        "Loss": ["train/loss"],
        "Query closer to its key than to every negative": ["train/accuracy"],
        "Similarity of positives and negatives": ["train/positive_similarity", "train/negative_similarity"],
        "Negatives that carry the gradient": ["train/effective_negatives"],
        "Learning rate": ["train/lr"],
    },
    "Probe over time": {
        "Nearest neighbours, top-1": ["knn/top1"],
        "Linear probe, top-1": ["probe/top1"],
    },
    "Mining": {
        "Mined negatives between their quantiles, below the positives": [
            "mining/positive_similarity",
            "mining/similarity_q90",
            "mining/similarity_q50",
            "mining/similarity_q10",
        ],
        "Mined negatives with their query's label": ["mining/same_label_rate"],
        "Share that each filter drops": ["mining/drop_*"],
        "Age of mined keys and of all keys, steps": ["mining/age_mean", "bank/age_mean"],
        "Recall of the search": ["mining/recall"],
        "Lists visited by the search": ["mining/nprobe"],
    },
    "Collapse": {
        "Effective rank of the keys": ["stats/rankme"],
        "Spread of the keys, 1 is isotropic": ["stats/std"],
        "Uniformity of the keys, lower is better": ["stats/uniformity"],
        "Views of an image, seen from other images": ["views/distance"],
    },
    "Throughput": {
        "Images a second": ["perf/images_per_s"],
        "Milliseconds of a step": ["perf/step_ms"],
        "Share of the time spent waiting for data": ["perf/data_wait"],
        "Memory, MiB": ["system/host_memory_mib", "system/device_memory_mib"],
    },
    "Data health": {
        "Unreadable files": ["data/unreadable"],
        "Steps skipped, loss not finite": ["train/skipped_steps"],
        "Keys refused, not finite": ["bank/refused"],
        "Slots of the bank in use": ["bank/fill", "bank/admissible"],
        "Contrast of the views": ["views/std"],
    },
}
"""Line plots of the workspace: section -> title -> metrics; ``*`` stands for the filters of the policy."""

MEDIA = {
    "Probe over time": ["probe/confusion", "knn/confusion"],
    "Mining": ["mining/gallery", "mining/hardest"],
    "Collapse": ["bank/map"],
    "Data health": ["views/grid", "views/attention"],
}
"""Pictures and tables of the workspace: section -> names."""

COMPARED = {
    "settings": ["objective.temperature", "mining.class_prior", "mining.num_hard", "optimizer.base_lr"],
    "results": ["stats/rankme", "mining/similarity_mean", "knn/top1"],
}
"""Settings and results by which runs are compared."""


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Parse the command line: values of the flags, and whether to print.

    Raises:
        UserError: unknown flag, missing value, no entity or project.
    """
    given = {"--name": "Contrastive pretraining"}
    printed = False
    rest = iter(arguments)
    for text in rest:
        name, equals, value = text.partition("=")
        if text == "--json":
            printed = True
        elif name in _FLAGS:
            given[name] = value if equals else next(rest, "")
            if not given[name] or given[name].startswith("--"):
                raise UserError(f"{name}: a value is needed, e.g. {name} NAME")
        else:
            raise UserError(f"{text!r}: no such flag; flags are {', '.join(_FLAGS)}, --json, --help")
    for name in ("--entity", "--project"):
        if name not in given:
            raise UserError(f"{name} is not given; contrastive-dashboard --entity E --project P")
    return {name.removeprefix("--"): value for name, value in given.items()}, printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if {"--help", "-h"} & {*given}:
            print_result(USAGE.rstrip())
            return 0
        where, printed = parse(given)
        workspace = build(**where)
        print_result(json.dumps(to_json(workspace) if printed else _create(workspace)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(entity: str, project: str, name: str) -> Any:
    """Build the workspace without sending it.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "wandb-workspaces is not installed; run pip install 'contrastive-pretrain[dashboards]'"
        )
    import wandb_workspaces.workspaces as ws

    sections = []
    for title in LINES:
        panels = [*_line_plots(LINES[title]), *_media(MEDIA.get(title, []))]
        sections.append(_section(title, panels, is_open=title != "Throughput"))
    sections.append(_section("Runs compared", _comparison(), is_open=False))
    settings = ws.WorkspaceSettings(x_axis=STEP_AXIS, group_by_prefix="first")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def to_json(workspace: Any) -> dict[str, Any]:
    """Return the workspace as the JSON that W&B receives."""
    # A private method, but the only way without a network; wandb-workspaces is pinned because of it.
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)
    return dict(json.loads(text))


def _section(title: str, panels: list[Any], *, is_open: bool) -> Any:
    import wandb_workspaces.workspaces as ws

    for index, panel in enumerate(panels):
        # The library draws random ids; these make two calls give the same workspace.
        panel._id = hashlib.sha256(f"{title}/{index}".encode()).hexdigest()[:11]
    axis = ws.SectionPanelSettings(x_axis=STEP_AXIS)
    return ws.Section(name=title, panels=panels, is_open=is_open, panel_settings=axis)


def _line_plots(plots: dict[str, list[str]]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=title, x=STEP_AXIS, y=[each for metric in metrics for each in spelt_out(metric)])
        for title, metrics in plots.items()
    ]


def spelt_out(metric: str) -> list[str]:
    """Return the metrics that a name in ``LINES`` stands for."""
    from memory_bank.policy import FILTERS  # imports torch

    return [metric.replace("*", name) for name in FILTERS] if "*" in metric else [metric]


def _media(names: list[str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.MediaBrowser(title=name, media_keys=[name]) for name in names]


def _comparison() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name)) for name in COMPARED["settings"]]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name)) for name in COMPARED["results"]]
    return [
        wr.RunComparer(diff_only=True),
        wr.ParallelCoordinatesPlot(title="Settings and results", columns=columns),
        wr.BarPlot(title="Nearest neighbours, top-1", metrics=["knn/top1"]),
        wr.BarPlot(title="Linear probe, top-1", metrics=["probe/top1"]),
    ]


def _create(workspace: Any) -> dict[str, Any]:
    """Create the workspace on W&B.

    Raises:
        UserError: not logged in, or W&B refuses the workspace.
    """
    problem = wandb_problem("online")
    if problem is not None:
        raise UserError(f"{problem}; --json prints the workspace without an account")
    try:
        workspace.save()
    except Exception as error:  # network, client and server raise a dozen types
        reason = first_line(error)
        raise UserError(
            f"W&B did not take the workspace for {workspace.entity}/{workspace.project} ({reason}); check "
            "--entity and --project, your rights there, and the network"
        ) from error
    return {
        "entity": workspace.entity,
        "project": workspace.project,
        "name": workspace.name,
        "url": workspace.url,
    }


if __name__ == "__main__":
    sys.exit(main())
