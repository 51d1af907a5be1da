"""What several seeds of one setting say together: means, verdicts on orderings, pictures.

    python tests/lab/evidence.py runs/world runs/world-seed1 runs/world-seed2
    python tests/lab/evidence.py runs/world,runs/world-seed1 --pictures pictures --tables seeds.md

Each folder is one seed of the same runs, as run_all.sh makes them. Several folders give tables: the
mean of each route over the seeds, and for each ordering of the paper a verdict from the differences
inside each seed. They are printed, and written to seeds.md in the first folder (or --tables), with
more differences that are ours and the figures of every seed. Pictures (orderings, curves, labels,
density) need matplotlib; each is drawn if its runs exist. One folder gives the pictures that need
no second seed, and no table: `evaluate.py --table` has that.
"""

import argparse
import math
import os
import platform
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import UserError, check, read_json_lines, read_record, write_text
from evaluate import PAPER, evaluated_runs, labels_used, markdown, paper_row

# What the paper orders (Tables 3 to 6): `<` the second above the first, `≈` about equal, `≤`
# the second at least the first. A side is a route, or in `b − a` the gain of b over a.
ORDERINGS = (
    ("O1", "raw-bridge", "<", "cold-grpo"), ("O2", "cold-grpo", "<", "bridge"),
    ("O3", "raw-bridge", "<", "sft-teacher-bridge"), ("O3", "sft-teacher-bridge", "<", "bridge"),
    ("O4", "sft", "<", "opd-only"), ("O4", "sft", "<", "opd-only-long"),
    ("O4", "opd-only", "<", "bridge"),  # the bridge's OPD stage
    ("O4", "opd-only-long", "<", "bridge"),  # as many updates as both its stages have
    ("O4", "sft", "<", "bridge"),
    ("O5", "bridge-1h", "<", "fresh-2h"), ("O6", "replay-1h", "<", "fresh-2h"),
    ("O7", "bridge-1h", "≈", "replay-1h"), ("O8", "cold-grpo", "<", "same-size-bridge"),
    ("O9", "fresh-2h", "≤", "bridge"), ("Table 5", "sft-teacher-fresh-2h", "<", "fresh-2h"),
    ("Table 6", "sft-fresh-2h", "<", "opd-only-fresh-2h"),
    ("Table 6", "opd-only-fresh-2h", "<", "fresh-2h"))
GAIN = "gain", "cold-grpo-2h − base-student", "<", "fresh-2h − bridge-1h"  # the same steps, labels
FURTHER = (  # ours: what else the texts say
    ("R5", "cold-grpo", "<", "fresh-2h"),
    ("teachers", "sft-teacher", "<", "teacher-rl"),
    ("labels", "teacher-rl-32", "<", "teacher-rl-512"),
    ("labels", "cold-grpo-256", "<", "cold-grpo-512"), ("labels", "bridge-256", "<", "bridge-512"),
    ("labels", "bridge-32 − cold-grpo-32", "<", "bridge-512 − cold-grpo-512"),
    ("labels", "bridge-64 − cold-grpo-64", "<", "bridge − cold-grpo"),
    ("labels", "bridge-256 − cold-grpo-256", "<", "bridge-512 − cold-grpo-512"),
    *(("density", "bridge", "<", f"lambda-{weight}") for weight in ("0.25", "0.5", "0.75")),
    ("density", "lambda-1", "<", "bridge"))
MARGIN = 2.0  # ours: points of accuracy that `≈` and `≤` let pass

def split_series(route):
    """Base name and number of a route that is one of a series; the number of any other is None.

    >>> split_series("bridge-32"), split_series("lambda-0.25"), split_series("bridge-1h")
    (('bridge', 32.0), ('lambda', 0.25), ('bridge-1h', None))
    """
    name, number = re.fullmatch(r"(.+?)(?:-(\d+(?:\.\d+)?))?", route).groups()
    return name, float(number) if number else None

def route_order(route):
    """Sort key: routes that PAPER does not know, then those of PAPER, then the series."""
    name, number = split_series(route)
    order = list(PAPER["qwen3-8b"])
    return number is not None, order.index(name) if name in order else -1, name, number or 0.0

def averages(roots):
    """{route: {set: (S,) avg in %}} of S folders; nan where a folder lacks the route or the set.

    Raises UserError for a folder that is named twice or has no evaluated run, and if those of a set
    have not the same number of problems and of samples each.
    """
    check(len({root.resolve() for root in roots}) == len(roots), "a folder is named twice")
    seeds = [{f.name: figures for f, figures in evaluated_runs(root).items()} for root in roots]
    sizes = {}
    for root, runs in zip(roots, seeds):
        for route, sets in runs.items():
            for s, figures in sets.items():
                size = "{problems} problems of {samples} samples".format(**figures)
                other = sizes.setdefault(s, size)
                check(size == other, f"{root / route}: {s} has {size}, elsewhere {other}")
    return {route: {s: np.array([100 * runs[route][s]["avg"] if s in runs.get(route, {}) else np.nan
                                 for runs in seeds]) for s in sizes}
            for route in sorted(set().union(*seeds), key=route_order)}

def sets_of(routes):
    return list(next(iter(routes.values())))

@cache
def t95(df):
    """Student's t at 97.5 %: a 95 % interval is mean ± t95(n - 1) SE of n values; nan for df < 1.

    With t = sqrt(df) tan(a) its density in the angle a is proportional to cos(a)^(df - 1), which
    is summed here on a fine grid.

    >>> round(t95(1), 3), round(t95(4), 3)
    (12.706, 2.776)
    """
    if df < 1:
        return math.nan
    angle = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (df - 1)
    area = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(df) * math.tan(np.interp(0.95 * area[-1], area, angle))

class OverSeeds(NamedTuple):
    """A number over seeds. The mean of no seed is nan, and so are the errors of a single seed."""

    mean: float
    se: float  # standard error of the mean
    half: float  # half of its 95 % interval
    n: int  # seeds

    def interval(self):
        """+3.5 (+0.8 to +6.3): the mean and, of more than two seeds, its 95 % interval."""
        inside = f" ({self.mean - self.half:+.1f} to {self.mean + self.half:+.1f})"
        return f"{self.mean:+.1f}{inside if self.n > 2 else ''}"

def over_seeds(values):
    """OverSeeds of values (S,); those that are nan do not count."""
    v, se = values[~np.isnan(values)], math.nan
    if len(v) > 1:
        se = float(v.std(ddof=1)) / len(v) ** 0.5
    return OverSeeds(float(v.mean()) if len(v) else math.nan, se, t95(len(v) - 1) * se, len(v))

def verdict(sign, d):
    """The verdict on an ordering from the differences d = second - first in each seed, (S,) points.

    ours: the 95 % interval of the mean decides. `<` holds if the whole interval is above 0, `≤` if
    it is above -MARGIN; both are reversed if it is below 0. `≈` holds if the interval is inside
    ±MARGIN; otherwise it differs if the interval does not contain 0.
    """
    mean, _, half, n = over_seeds(d)
    low, high = mean - half, mean + half
    if n < 3:
        return "needs more seeds"
    if sign == "≈":
        apart = "differs" if low > 0 or high < 0 else "open"
        return "holds" if -MARGIN < low and high < MARGIN else apart
    if high < 0:
        return "reversed"
    return "holds" if low > (0 if sign == "<" else -MARGIN) else "open"

def side(get, name):
    """A side of an ordering: what `get` has of a route, or in `b − a` of b less that of a."""
    route, _, start = name.partition(" − ")
    return get(route) - get(start) if start else get(route)

def compared(routes, orderings=None):
    """(name, first, sign, second, {set: (S,) differences}) of each ordering whose routes were run.

    By default the ORDERINGS and, ours, the GAIN and O2 at each number of labels.
    """
    budgets = sorted({n for name, n in map(split_series, routes) if name == "bridge" and n})
    fewer = [("O2", f"cold-grpo-{n:g}", "<", f"bridge-{n:g}") for n in budgets]
    return [(name, a, sign, b, {s: side(lambda r: routes[r][s], b) - side(lambda r: routes[r][s], a)
                                for s in sets_of(routes)})
            for name, a, sign, b in orderings or (*ORDERINGS, GAIN, *fewer)
            if routes.keys() >= {*a.split(" − "), *b.split(" − ")}]

def verdict_table(root, routes, orderings=None):
    """A row per ordering. Each set has the verdict, the mean difference with its 95 % interval, and
    the number of seeds that agree; the last column is the paper's difference on MATH-500."""
    def cell(sign, d):
        seeds, agree = over_seeds(d), {"<": d > 0, "≤": d >= 0, "≈": abs(d) <= MARGIN}[sign].sum()
        return f"{verdict(sign, d)}: {seeds.interval()}, {agree} of {seeds.n}" if seeds.n else "-"

    def paper(route):
        return (paper_row(root / route) or [math.nan])[0]

    rows = []
    for name, a, sign, b, by_set in compared(routes, orderings):
        d = side(paper, b) - side(paper, a)
        rows.append([f"{name}: {a} {sign} {b}", *(cell(sign, d) for d in by_set.values()),
                     "-" if math.isnan(d) else f"{d:+.1f}"])
    head = ["ordering",
            *(f"{s}: difference, points (95 %), seeds that agree" for s in sets_of(routes))]
    return markdown([*head, "paper, MATH"], rows)

def means_table(roots, routes):
    """A row per route: the mean over seeds ± its standard error, which therefore contains the
    spread over worlds, models and samples. (In the table of one folder ± is over problems.)"""
    rows = []
    for route, by_set in routes.items():
        seeds = [over_seeds(values) for values in by_set.values()]
        cells = [("-", f"{x.mean:.1f}", f"{x.mean:.1f} ± {x.se:.1f}")[min(x.n, 2)] for x in seeds]
        rows.append([route, *cells, str(max(x.n for x in seeds)), str(labels_of(roots, route)),
                     " / ".join(map(str, paper_row(roots[0] / route))) or "-"])
    head = ["route", *(f"{s}, mean ± SE over seeds, %" for s in sets_of(routes)), "seeds", "labels"]
    return markdown([*head, "paper, %: MATH / AIME24 / AIME25"], rows)

def labels_of(roots, route):
    """Labelled problems behind a route, as the first folder that has it says."""
    folder = next(root / route for root in roots if (root / route / "eval/summary.json").exists())
    return labels_used(folder)

def seed_tables(roots, routes):
    """Headings and tables, one per set: every seed's avg in %, and differences of the orderings."""
    parts, differences = [], compared(routes) + compared(routes, FURTHER)
    for s in sets_of(routes):
        lines = {route: by_set[s] for route, by_set in routes.items()}
        for _, a, _, b, by_set in differences:
            lines[f"({b}) − ({a})" if " − " in a else f"{b} − {a}"] = by_set[s]
        rows = [[name, *("-" if np.isnan(v) else f"{v:.1f}" for v in values)]
                for name, values in lines.items()]
        parts += [f"## Every seed: {s}", markdown(["route", *(root.name for root in roots)], rows)]
    return parts

def made_by(folders, command):
    """Where tables come from: the command, the machine, the commits and versions of run folders."""
    records = [record for record in map(read_record, folders) if "git" in record]
    git = ", ".join(sorted({r["git"].split()[0] for r in records})) or "-"
    torch = ", ".join(sorted({r["versions"]["torch"] for r in records})) or "-"
    return (f"Written by `{command}` on a machine of {os.cpu_count()} cores "
            f"({platform.machine()}).\nThe runs: git {git}, torch {torch}.")

def write_tables(roots, path, command):
    """Print means and verdicts; write them, more differences and every seed's figures to `path`."""
    routes = averages(roots)
    made = made_by([root / route for root in roots for route in routes], command)
    parts = [f"{made} A folder is a seed of the same routes. Accuracies are in %, differences in "
             "points.", "## Routes", means_table(roots, routes)]
    if compared(routes):
        parts += ["## Orderings of the paper", verdict_table(roots[0], routes)]
    print("\n\n".join(parts))
    if compared(routes, FURTHER):
        parts += ["## More differences", verdict_table(roots[0], routes, FURTHER)]
    parts = [f"# What {len(roots)} seeds say", *parts, *seed_tables(roots, routes)]
    write_text(path, "\n\n".join(parts) + "\n")

# --- pictures: what the tables hold, and training curves

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

def draw(roots, out):
    """Write orderings.png, curves.png, labels.png, density.png into `out`, each if its runs exist.

    Prints a line, and draws nothing, if matplotlib is not installed.
    """
    routes = averages(roots)  # raises UserError for a folder without an evaluated run
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    except ImportError:
        return print("pictures left out: matplotlib is not installed")
    out.mkdir(parents=True, exist_ok=True)
    budgets = label_budgets(roots, routes)
    pictures = {"orderings": (draw_orderings, routes), "curves": (draw_curves, roots),
                "labels": (draw_series, routes, budgets, "labelled problems", False),
                "density": (draw_series, routes, densities(routes), "λ", True)}
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
                     "figure.constrained_layout.w_pad": 0.1}):
        for name, (fill, *data) in pictures.items():
            figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
            fill(figure, *data)
            if figure.axes:
                figure.savefig(out / f"{name}.png")
                with Image.open(out / f"{name}.png") as image:  # 128 colours: half the bytes
                    small = image.convert("RGB").quantize(128)
                small.save(out / f"{name}.png", optimize=True)

def draw_orderings(figure, routes):
    """The mean difference of each ordering of two routes with its 95 % interval; grey: allowed by
    `≈` and `≤`. (The gain is far out on this scale.)"""
    rows = [row for row in compared(routes)
            if row[1] in routes and any(over_seeds(d).n > 2 for d in row[-1].values())]
    if not rows:
        return
    markers = {"holds": "o", "reversed": "X", "differs": "X"}
    figure.set_size_inches(6, 0.8 + 0.26 * len(rows))
    axes = figure.subplots()
    for y, (_, _, sign, _, by_set) in enumerate(rows):
        for i, d in enumerate(by_set.values()):
            seeds, said = over_seeds(d), verdict(sign, d)
            axes.errorbar(seeds.mean, y + 0.34 * ((i + 0.5) / len(by_set) - 0.5), xerr=seeds.half,
                          fmt=markers.get(said, "o"), color=COLOURS[i], elinewidth=1.2,
                          markerfacecolor=COLOURS[i] if said in markers else "white",
                          markersize=7 if markers.get(said) == "X" else 4.5)
    left, right = axes.get_xlim()
    for y, (_, _, sign, _, _) in enumerate(rows):
        if sign != "<":
            axes.barh(y, (MARGIN if sign == "≈" else right) + MARGIN, left=-MARGIN, height=0.8,
                      color="0.9", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0.5)
    axes.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [f"{name}  {a} {sign} {b}" for name, a, sign, b, _ in rows])
    axes.tick_params(axis="y", length=0)
    for colour, s in zip(COLOURS, sets_of(routes)):
        axes.plot([], [], color=colour, label=s)
    axes.legend(frameon=False, loc="lower right")
    figure.supxlabel("second − first, points (filled: holds; cross: the contrary; empty: open)",
                     fontsize="medium")

def curve(roots, route, metric):
    """A metric in the finished runs of a route, cut to the shortest: (S, steps), None if no run."""
    finished = [root / route for root in roots if read_record(root / route).get("finished")]
    runs = [[line.get(metric) for line in read_json_lines(folder / "metrics.jsonl")]
            for folder in finished]
    steps = min(map(len, filter(None, runs)), default=0)
    return np.array([run[:steps] for run in runs if run], float) if steps else None

def draw_curves(figure, roots):
    """The reward of GRPO, and the KL to the teacher: the mean over seeds in a band of ± SE."""
    rewards = {route: [curve(roots, route, "reward")]
               for route in ("teacher-rl", "cold-grpo", "fresh-2h", "replay-1h")}
    kls = {route: [curve(roots, f"{route}-warmup", "kl"), curve(roots, route, "kl")]
           for route in ("bridge", "opd-only", "raw-bridge")}
    panels = {"reward of GRPO": rewards,
              "KL to the teacher, nats a token (dotted: warmup, forward)": kls}
    panels = {label: lines for label, lines in panels.items()
              if any(part is not None for parts in lines.values() for part in parts)}
    for i, (label, lines) in enumerate(panels.items()):
        axes, ends = figure.add_subplot(1, len(panels), i + 1), {}
        for colour, (route, parts) in zip(COLOURS, lines.items()):
            start = 0
            for part, style in zip(parts, (":", "-")[-len(parts):]):
                if part is not None:
                    steps = start + np.arange(part.shape[1])
                    mean, se, *_ = np.array([over_seeds(values) for values in part.T]).T
                    axes.plot(steps, mean, style, color=colour, linewidth=1.2)
                    axes.fill_between(steps, mean - se, mean + se, color=colour, alpha=0.15,
                                      linewidth=0)
                    start, ends[route] = steps[-1] + 1, (steps[-1], mean[-1], colour)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0)
        name_lines(axes, ends)

def name_lines(axes, ends):
    """Write the names of lines to their right, none over another; ends: {name: (x, y, colour)}."""
    low, high = axes.get_ylim()
    lowest = -math.inf
    known = {name: end for name, end in ends.items() if math.isfinite(end[1])}
    right = max((x for x, _, _ in known.values()), default=0)  # a short line's name beside others'
    for name, (_, y, colour) in sorted(known.items(), key=lambda item: item[1][1]):
        lowest = max(y, lowest + 0.05 * (high - low))  # a line of text
        axes.annotate(name, (right, lowest), xytext=(5, 0), textcoords="offset points",
                      color=colour, va="center", annotation_clip=False)

def label_budgets(roots, routes):
    """{"cold-grpo" or "bridge": [(labelled problems, route)]}, if several numbers were tried."""
    series = {name: sorted((labels_of(roots, route), route) for route in routes
                           if split_series(route)[0] == name) for name in ("cold-grpo", "bridge")}
    return {name: points for name, points in series.items() if len(points) > 1}

def densities(routes):
    """{"lambda": [(λ of Eq. 3, route)]}, of which λ = 0 is `bridge`, if several were tried."""
    series = [(*split_series(route), route) for route in routes]
    points = sorted((number, route) for name, number, route in series if name == "lambda")
    points = [(0.0, "bridge")] * ("bridge" in routes) + points
    return {"lambda": points} if len(points) > 1 else {}

def draw_series(figure, routes, series, xlabel, paired):
    """Accuracy over a number x, a panel per set: means with 95 % intervals; thin lines are seeds.

    series: {name: [(x, route)]}. paired: the intervals are not of the mean, but of the change from
    the first point inside each seed.
    """
    for i, s in enumerate(sets_of(routes) if series else ()):
        axes, ends = figure.add_subplot(1, len(sets_of(routes)), i + 1), {}
        for shift, (colour, (name, points)) in enumerate(zip(COLOURS, series.items())):
            x = np.array([number for number, _ in points]) * 1.04**shift  # bars beside each other
            values = np.array([routes[route][s] for _, route in points])  # (points, S)
            means = [over_seeds(v).mean for v in values]
            halves = [over_seeds(v - values[0] if paired else v).half for v in values]
            axes.plot(x, values, color=colour, linewidth=0.6, alpha=0.35)
            axes.errorbar(x, means, yerr=halves, fmt="o-", color=colour, markersize=4)
            ends[name] = x[-1], means[-1], colour
        ticks = sorted({number for points in series.values() for number, _ in points})
        note = f" (bars: change from {ticks[0]:g})" if paired else ""
        if not paired:
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            name_lines(axes, ends)
        axes.set_xticks(ticks, [f"{number:g}" for number in ticks])
        axes.set(xlabel=xlabel, ylabel=f"accuracy on {s}, %{note}")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="a folder of runs for each seed")
    parser.add_argument("--pictures", type=Path, help="their folder [default: the first folder]")
    parser.add_argument("--tables", type=Path, help="their file [default: seeds.md in the first]")
    args = parser.parse_args(argv)
    roots = [Path(folder) for argument in args.folders for folder in argument.split(",")]
    try:
        if len(roots) > 1:
            flags = shlex.join(sys.argv[1:] if argv is None else argv)
            write_tables(roots, args.tables or roots[0] / "seeds.md",
                         f"python tests/lab/evidence.py {flags}")
        draw(roots, args.pictures or roots[0])
    except UserError as error:
        sys.exit(f"error: {error}")

if __name__ == "__main__":
    main()
