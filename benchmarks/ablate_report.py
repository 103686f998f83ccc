"""Compute the ablation's statistics, table and plot from its finished cells."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import pyplot, save_plot
from scipy import stats

from eval.scores import t_interval

TITLES = {
    "classes": {"linear": "linear probe", "knn": "kNN, k=20", "lowshot": "10 labels a class"},
    "instances": {"map": "mAP", "r1": "R@1", "sibling": "before its sibling"},
}
"""Kind of scores -> score -> title. The first score chooses temperatures and the winner."""
REFERENCES = ("all_rows", "uniform")

Run = dict[str, Any]
Scores = Mapping[int, float]  # seed -> score


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and the ends of its 95% t-interval."""
    low, high = t_interval(torch.tensor(values, dtype=torch.float64))
    return {"mean": statistics.mean(values), "low": low, "high": high}


def paired(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """Return the mean difference over common seeds, its 95% t-interval, and p of the paired t-test."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    found: dict[str, Any] = {**mean_interval(differences), "seeds": seeds, "differences": differences}
    spread = statistics.stdev(differences)
    if spread == 0:
        return found | {"p": 1.0 if found["mean"] == 0 else 0.0}
    t = found["mean"] / (spread / len(seeds) ** 0.5)
    return found | {"p": float(2 * stats.t.sf(abs(t), len(seeds) - 1))}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return adjusted p-values: rejecting those up to alpha has a family-wise error of alpha (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, made monotone and capped at 1.
    """
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def by_seed(runs: Sequence[Run], score: str) -> dict[int, float]:
    return {run["seed"]: run["scores"][score] for run in runs}


def compare(runs: Mapping[str, Sequence[Run]], scores: Iterable[str]) -> dict[str, Any]:
    """Return reference -> score -> arm -> paired difference; ``p_holm`` is over the arms of that score.

    Arms of another K, ``NAME@K``, are compared with ``uniform@K``.
    """
    table: dict[str, Any] = {}
    for reference in runs:
        k = _other_k(reference)
        if reference not in (*REFERENCES, f"{REFERENCES[1]}{k}"):
            continue
        alike = {arm: own for arm, own in runs.items() if arm != reference and _other_k(arm) == k}
        table[reference] = {}
        for score in scores:
            theirs = by_seed(runs[reference], score)
            arms = {arm: paired(by_seed(own, score), theirs) for arm, own in alike.items()}
            corrected = holm({arm: found["p"] for arm, found in arms.items()})
            table[reference][score] = {arm: found | {"p_holm": corrected[arm]} for arm, found in arms.items()}
    return table


def _other_k(arm: str) -> str:
    """Return ``@K`` of an arm ``NAME@K``, else nothing."""
    k = arm.rpartition("@")[2]
    return f"@{k}" if k.isdigit() else ""


def summarise(runs: Sequence[Run], scores: Iterable[str]) -> dict[str, Any]:
    """Return scores with intervals, seconds and mining metrics, over the seeds of one arm."""
    rates = [run["mined"]["same_label_rate"] for run in runs]
    return {
        "temperature": runs[0]["temperature"],
        "seeds": [run["seed"] for run in runs],
        "scores": {score: mean_interval(list(by_seed(runs, score).values())) for score in scores},
        "train_s": statistics.median(run["train_s"] for run in runs),
        "train_cpu_s": statistics.median(run["train_cpu_s"] for run in runs),
        "same_label_rate": None if None in rates else statistics.mean(rates),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Return the tables of a result; every number in them is from ``document``."""
    parts = [_heading(document), _score_table(document)]
    for reference, scores in document["differences"].items():
        title = f"Paired difference to `{reference}`, points"
        parts.append(f"## {title}\n\n{_difference_table(scores, document['titles'])}")
    if document["confirmation"]:
        found = document["confirmation"]
        title = f"Confirmation of `{found['winner']}` on fresh seeds {_listed(document['fresh_seeds'])}"
        tables = [
            f"Difference to `{name}`:\n\n{_difference_table(scores, document['titles'])}"
            for name, scores in found["differences"].items()
        ]
        parts.append(f"## {title}\n\n" + "\n\n".join(tables))
    return "\n\n".join(parts) + "\n"


def _heading(document: Mapping[str, Any]) -> str:
    open_arms, diverged = (
        ", ".join(f"`{arm}`" for arm in document[what]) or "none" for what in ("open", "diverged")
    )
    first = next(iter(document["titles"].values()))
    lines = [
        f"# Mining ablation, preset `{document['preset']}`",
        "",
        "Written by `benchmarks/ablate.py`; what it says in words is in [README.md](README.md).",
        "",
        f"- {document['description']}",
        f"- {document['samples']:,} training samples a cell ({document['steps']} optimizer steps), the same "
        "for every arm; data order, views and initial weights are those of the seed.",
        f"- Temperature: the best of {_listed(document['temperatures'])} for each arm by {first} on "
        f"validation images, seed {_listed(document['tuning_seeds'])}, not reported"
        + (f"; {document['tuning_share']:.0%} of the epochs." if document["tuning_share"] < 1 else "."),
        *(f"- {_made_by(one)}" for one in document["made_by"]),
        f"- Seeds of an arm: up to {_listed(document['seeds'])}. Arms with fewer: {open_arms}. "
        f"Diverged: {diverged}. Confirmation on fresh seeds: "
        + ("below." if document["confirmation"] else "open."),
    ]
    return "\n".join(lines)


def _made_by(one: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return f"Commit `{one['commit']}`, {one['device']} ({one['cores']} cores, 1 thread a cell), {versions}."


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _score_table(document: Mapping[str, Any]) -> str:
    titles = document["titles"]
    rows = [
        "| arm | T | seeds | " + " | ".join(titles.values()) + " | same label | train s | CPU s |",
        "|---|---|---|" + "---|" * (len(titles) + 3),
    ]
    for arm, found in document["arms"].items():
        scores = " | ".join(_with_half(found["scores"][score]) for score in titles)
        rate = found["same_label_rate"]
        mined = "" if rate is None else f"{100 * rate:.0f}%"
        rows.append(
            f"| `{arm}` | {found['temperature']:g} | {len(found['seeds'])} | {scores} | {mined} | "
            f"{found['train_s']:.0f} | {found['train_cpu_s']:.0f} |"
        )
    for name, scores in document["baselines"].items():
        values = " | ".join(f"{100 * scores[score]:.1f}" for score in titles)
        rows.append(f"| {name.replace('_', ' ')} | | | {values} | | | |")
    note = (
        "Scores in %, mean and half width of the 95% t-interval over seeds. Same label: share of the hard "
        "negatives that show their query's class, second half of the training; empty for arms that rank "
        "nothing and for images without labels. Seconds: median of the training alone; the machine may be "
        "shared, so compare CPU seconds."
    )
    return "\n".join(rows) + f"\n\n{note}"


def _with_half(found: Mapping[str, float]) -> str:
    return f"{100 * found['mean']:.1f} ± {50 * (found['high'] - found['low']):.1f}"


def _difference_table(scores: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Return a table with a row for each arm: difference, interval, Holm's p; bold if p is at most 0.05."""
    rows = ["| arm | " + " | ".join(titles.values()) + " |", "|---|" + "---|" * len(titles)]
    for arm in next(iter(scores.values())):
        cells = []
        for score in titles:
            found = scores[score][arm]
            mean = f"{100 * found['mean']:+.1f}"
            mean = f"**{mean}**" if found["p_holm"] <= 0.05 else mean
            interval = f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
            cells.append(f"{mean} {interval} p={found['p_holm']:.3f}")
        rows.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    note = "Mean [95% t-interval, uncorrected] and Holm's p over the arms of the table; bold: p at most 0.05."
    return "\n".join(rows) + f"\n\n{note}"


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Plot the arms: score over K where there are several K, else paired differences to all_rows."""
    draw = _plot_budgets if len(document["budgets"]) > 1 else _plot_differences
    plt, titles = pyplot(), document["titles"]
    figure, axes = plt.subplots(
        1, len(titles), figsize=(4.4 * len(titles), 5), sharey=draw is _plot_differences
    )
    for axis, (score, title) in zip(axes, titles.items(), strict=True):
        draw(axis, document, score)
        axis.set_title(title)
    figure.suptitle(f"preset {document['preset']}: mean and 95% interval over seeds")
    figure.tight_layout(rect=(0, 0, 0.92 if draw is _plot_budgets else 1, 1))
    if draw is _plot_budgets:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=9)
    save_plot(figure, path)
    plt.close(figure)


def _plot_differences(axis: Any, document: Mapping[str, Any], score: str) -> None:
    """Draw each arm's paired differences to all_rows: seeds as dots, mean and interval as a bar."""
    arms = document["differences"][REFERENCES[0]][score]
    for row, found in enumerate(arms.values()):
        colour = "tab:blue" if found["p_holm"] <= 0.05 else "0.5"
        axis.plot([100 * d for d in found["differences"]], [row] * len(found["seeds"]), ".", color="0.75")
        axis.plot([100 * found["low"], 100 * found["high"]], [row, row], color=colour, lw=2)
        axis.plot(100 * found["mean"], row, "o", color=colour)
    axis.axvline(0, color="k", lw=0.8)
    axis.set_xlabel(f"points above all_rows; blue: Holm's p at most 0.05\n{_limits(document, score)}")
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)


def _limits(document: Mapping[str, Any], score: str) -> str:
    """Return the ceiling and the floor in words: on the axes they would leave no room for the differences."""
    levels = {REFERENCES[0]: document["arms"][REFERENCES[0]]["scores"][score]["mean"]}
    levels |= {name.replace("_", " "): scores[score] for name, scores in document["baselines"].items()}
    return ", ".join(f"{name} {100 * level:.1f}" for name, level in levels.items())


def _plot_budgets(axis: Any, document: Mapping[str, Any], score: str) -> None:
    """Draw the score of each arm over its number of negatives; arms without one are lines."""
    budgets = sorted(document["budgets"])
    known = {*document["arms"], *document["open"]}
    curves = {arm for arm in known if f"{arm}@{budgets[-1]}" in known}
    for place, arm in enumerate(document["arms"]):
        if "@" in arm:
            continue
        colour, found = f"C{place % 10}", document["arms"][arm]["scores"][score]
        if arm in curves:
            _plot_curve(axis, document, score, arm, colour, 1 + 0.03 * (place - 4))
        else:
            style = "-" if arm == REFERENCES[0] else "--"
            axis.axhline(100 * found["mean"], color=colour, ls=style, lw=1, label=arm)
            axis.axhspan(100 * found["low"], 100 * found["high"], color=colour, alpha=0.06, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, budgets)
    axis.set_xlabel(f"negatives of a query, K\n{_limits(document, score)}")
    axis.set_ylabel("%")


def _plot_curve(
    axis: Any, document: Mapping[str, Any], score: str, arm: str, colour: str, shift: float
) -> None:
    """Draw one arm's scores over K, moved sideways by ``shift``, off those of other arms."""
    names = {k: arm if k == document["budgets"][0] else f"{arm}@{k}" for k in sorted(document["budgets"])}
    found = {
        k: document["arms"][name]["scores"][score] for k, name in names.items() if name in document["arms"]
    }
    places = [k * shift for k in found]
    axis.plot(places, [100 * one["mean"] for one in found.values()], "o-", color=colour, ms=3, label=arm)
    axis.vlines(
        places,
        [100 * one["low"] for one in found.values()],
        [100 * one["high"] for one in found.values()],
        color=colour,
    )
