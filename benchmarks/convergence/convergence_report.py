"""Tables and figures of ``convergence.py`` from its finished runs."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dmjd.figures.panels import DPI

PROBES = {"linear": "linear probe", "knn": "kNN"}
AXES = {"minutes": "minutes of training", "images": "images seen", "epochs": "epochs"}
Run = dict[str, Any]  # variant, seed, blr, probes: [{share, step, images, minutes, epochs, knn, linear}], test


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Variant -> its runs that did not diverge, one for each seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["variant"], [])
        if run["probes"] and not run["diverged"]:
            groups[run["variant"]].append(run)
    return groups


def curve(runs: Sequence[Run], x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Means over seeds at each probe: x, y, and the lowest and highest y."""
    columns = list(zip(*(run["probes"] for run in runs), strict=False))
    xs = [statistics.fmean(p[x] for p in column) for column in columns]
    ys = [[p[y] for p in column] for column in columns]
    return xs, [statistics.fmean(v) for v in ys], [min(v) for v in ys], [max(v) for v in ys]


def time_to_reach(xs: Sequence[float], ys: Sequence[float], level: float) -> float | None:
    """x at which a curve first reaches a level, interpolated linearly; None if it never does."""
    for i, y in enumerate(ys):
        if y >= level:
            if i == 0:
                return xs[0]
            return xs[i - 1] + (xs[i] - xs[i - 1]) * (level - ys[i - 1]) / (y - ys[i - 1])
    return None


def summarize(runs: Sequence[Run], baseline: str) -> dict[str, dict[str, Any]]:
    """Variant -> learning rate, length, accuracies (mean, std), and the time to the baseline's final accuracy.

    Times are interpolated between probes on held-out images along one long schedule. A shorter schedule
    (``name@share``) decays earlier and is the fairer test of a speed-up.
    """
    groups = by_variant(runs)
    rows: dict[str, dict[str, Any]] = {}
    for name, own in groups.items():
        if not own:
            rows[name] = {"seeds": 0, "diverged": True}
            continue
        last = [run["probes"][-1] for run in own]
        rows[name] = {
            "seeds": len(own),
            "diverged": sum(run["variant"] == name for run in runs) > len(own),
            "blr": own[0]["blr"],
            **{x: statistics.fmean(p[x] for p in last) for x in ("step", *AXES)},
            "held_out": {y: mean_and_std([p[y] for p in last]) for y in PROBES},
        }
        if all(run.get("test") for run in own):
            rows[name]["test"] = {y: mean_and_std([run["test"][y]["result"]["top1"] for run in own]) for y in PROBES}
            rows[name]["untrained"] = {
                who: {y: {"mean": own[0]["test"][y][who]["top1"]} for y in PROBES}
                for who in ("random_init", "raw_pixels")
            }
        for y in PROBES:
            if groups.get(baseline):
                level = curve(groups[baseline], "minutes", y)[1][-1]
                reached = time_to_reach(*curve(own, "minutes", y)[:2], level)
                rows[name][f"minutes_to_baseline_{y}"] = reached
    return rows


def _untrained(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Test-set results of random weights (the first variant's) and raw pixels."""
    scores = next((row["untrained"] for row in rows.values() if "untrained" in row), None)
    return {"random weights": scores["random_init"], "raw pixels": scores["raw_pixels"]} if scores else {}


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and, for several values, the sample standard deviation."""
    std = {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values)} | std


def final_score(run: Run) -> float:
    """Linear probe at the end of a run; 0 if it diverged."""
    return 0.0 if run["diverged"] or not run["probes"] else run["probes"][-1]["linear"]


def _percent(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * value['std']:.1f}" if "std" in value else "")


def result_table(rows: dict[str, dict[str, Any]], baseline: str) -> str:
    """The result of :func:`summarize` as a Markdown table."""
    titles = ["variant", "seeds", "blr", "steps", "epochs", "minutes", "held-out kNN", "held-out linear"]
    titles += ["test kNN", "test linear", f"minutes to {baseline}'s linear", "times faster"]
    lines = [titles, ["---"] * len(titles)]
    whole = rows[baseline].get("minutes")
    for name, row in rows.items():
        if not row["seeds"]:
            lines.append([name, "diverged", *[""] * (len(titles) - 2)])
            continue
        reached, test = row.get("minutes_to_baseline_linear"), row.get("test", {})
        cells = [name, str(row["seeds"]), f"{row['blr']:g}", f"{row['step']:.0f}"]
        cells += [f"{row['epochs']:.2f}", f"{row['minutes']:.2f}"]
        cells += [_percent(scores.get(y)) for scores in (row["held_out"], test) for y in ("knn", "linear")]
        cells += [f"{reached:.2f}" if reached is not None else "never"]
        lines.append([*cells, f"{whole / reached:.2f}" if reached and whole else ""])
    for title, scores in _untrained(rows).items():
        lines.append([title, *[""] * 7, *(_percent(scores[y]) for y in ("knn", "linear")), "", ""])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def curves_figure(runs: Sequence[Run], title: str) -> Figure:
    """Accuracy on held-out images against time, images and epochs; bands from the lowest to the highest seed."""
    figure = Figure(figsize=(4.4 * len(AXES), 3.6 * len(PROBES) + 0.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(PROBES), len(AXES), squeeze=False)
    groups = {name: own for name, own in by_variant(runs).items() if own}
    for row, (y, y_title) in zip(panels, PROBES.items(), strict=True):
        for axes, (x, x_title) in zip(row, AXES.items(), strict=True):
            for number, (name, own) in enumerate(groups.items()):
                xs, mean, low, high = curve(own, x, y)
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                axes.plot(xs, [100 * v for v in mean], marker=".", linewidth=1.2, label=name, **style)
                axes.fill_between(xs, [100 * v for v in low], [100 * v for v in high], alpha=0.15, color=style["color"])
            axes.set(xlabel=x_title, ylabel=f"{y_title}, top-1 in % (held-out images)")
            axes.grid(alpha=0.3)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
