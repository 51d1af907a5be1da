"""Evaluation: avg@16 with its standard error, pass@k; a recipe's table, verdicts and pictures.

Each problem is answered `--samples` times. Its score is the share of right samples; avg@n of a set
is the mean over problems, and ± its standard error over problems (not over seeds). pass@k is the
unbiased estimate 1 - C(n - c, k) / C(n, k) from c right samples of n. A response that the limit cut
off counts as it stands: it is wrong unless its answer was already there.

Every problem becomes one line of OUT/<set>.jsonl with all its samples, so an interrupted evaluation
goes on where it was, and --regrade runs the verifier again on stored text, without the model. The
random numbers of a sample depend on (seed, prompt, sample index), not on batch size or order.

    python evaluate.py --model ckpt/bridge --data math500,aime24,aime25
    python evaluate.py --model runs/world/bridge --data runs/world/test.jsonl --max-new-tokens 48
    python evaluate.py --table runs/world        # every evaluated run of a folder, beside the paper
    python evaluate.py --table runs/world,runs/world-seed1,runs/world-seed2   # and over seeds

Several folders are seeds of one setting. Their table has means over seeds and, for each ordering of
the paper, a verdict from the differences inside each seed. Pictures of them need matplotlib.
"""

import math
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common import (DATA_ALIASES, append_json_line, build_prompt, check, describe_run, differences,
                    dry_run, fingerprint, from_rank_0, grade, json_line, load_lm, lock, progress,
                    rank, read_json, read_json_lines, read_record, read_rows, rounded, run_cli,
                    sample_and_write, to_problem, world_size, write_json, write_text)


@dataclass
class Config:
    # --- what to do
    model: str = ""  # ours: any; model folder or hub name to evaluate
    data: str = "math500,aime24,aime25"  # sets (Tables 2-8): files, folders, hub names, aliases
    out: str = ""  # ours: output folder; empty is MODEL/eval, or eval/MODEL for a hub name
    table: str = ""  # ours: print (and write) the table of the runs in this folder, or over several
    pictures: str = ""  # ours: folder of --table's pictures; empty is the first of several folders
    regrade: bool = False  # ours: only run the verifier again on the samples stored in --out
    # --- settings
    samples: int = 16  # samples per problem (Tables 2-8: avg@16)
    temperature: float = 1.0  # ours: the trained policy itself; 0 is greedy
    max_new_tokens: int = 16384  # response limit in tokens (Tables 9 and 10)
    limit: int = 0  # ours: only so many problems of each set, from the first; 0 is all
    seed: int = 0  # ours: of the sampling
    thinking: bool = False  # ours: Qwen3's thinking mode
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # ours: compute; auto: bf16 on CUDA, else fp32
    # --- memory and speed only: they change no result beyond rounding
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    sample_rows: int = 512  # rows decoded at once
    kv_gib: float = 0.0  # GiB of the sampler's keys and values; 0: what the device can spare
    gather: Literal["full", "layer"] = "full"  # several processes: weights at hand while sampling
    dry_run: int = 0  # only print the computed memory and time on so many GPUs


# The paper's avg@16 in %, (MATH-500, AIME 2024, AIME 2025) or MATH-500 alone, by the teacher and by
# route (Tables 2-6 and 8), () where it prints none. Routes are named as the folders that run_all.sh
# writes, and stand in the order of our tables.
PAPER = {
    "8b": {
        "base-student": (), "base-teacher": (), "teacher-rl-1h": (),
        "teacher-rl": (88.4, 47.7, 36.7), "sft-teacher": (), "sft-teacher-1h": (),
        "cold-grpo": (75.9, 19.8, 17.1), "raw-bridge": (71.5, 15.0, 10.6),
        "same-size-bridge": (76.5, 20.6, 17.1), "sft-teacher-bridge": (76.9, 22.1, 17.6),
        "sft": (76.0, 22.4, 19.4), "opd-only": (77.6, 23.0, 18.9), "bridge": (79.3, 25.2, 20.2),
        "sft-teacher-bridge-1h": (74.3,), "sft-1h": (), "opd-only-1h": (), "bridge-1h": (75.4,),
        "sft-teacher-replay-1h": (74.0,), "replay-1h": (75.7,), "sft-teacher-fresh-2h": (77.2,),
        "sft-fresh-2h": (77.3,), "opd-only-fresh-2h": (77.8,), "fresh-2h": (78.5,)},
    "14b": {
        "teacher-rl": (89.5, 47.1, 39.0), "cold-grpo": (75.9, 19.8, 17.1),
        "raw-bridge": (72.8, 16.7, 13.5), "same-size-bridge": (76.5, 20.6, 17.1),
        "sft-teacher-bridge": (77.6, 23.2, 18.4), "sft": (76.5, 21.5, 17.0),
        "opd-only": (77.1, 22.8, 18.6), "bridge": (78.6, 24.6, 20.8), "bridge-1h": (76.3,),
        "replay-1h": (75.6,), "fresh-2h": (78.7,), "sft-fresh-2h": (77.2,),
        "opd-only-fresh-2h": (77.5,), "sft-teacher-bridge-1h": (75.8,),
        "sft-teacher-replay-1h": (75.6,), "sft-teacher-fresh-2h": (76.9,)},
    "llama": {"cold-grpo": (59.8, 12.5, 7.2), "raw-bridge": (55.4, 8.8, 3.1),
              "bridge": (62.1, 14.9, 9.2)},
}


# --- a model's figures


def pass_at_k(n, c, k):
    """Probability that k of n samples, c of them right, hold a right one.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarise(entries):
    """Figures of one set from its stored lines: shares in [0, 1], lengths in tokens."""
    n, right = len(entries[0]["verdicts"]), [e["verdicts"].count("correct") for e in entries]
    scores = np.array(right) / n
    verdicts = [v for e in entries for v in e["verdicts"]]
    return {
        "problems": len(entries), "samples": n, "avg": float(scores.mean()),
        "se": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        "pass": {str(k): float(np.mean([pass_at_k(n, c, k) for c in right]))
                 for k in (1, 2, 4, 8, 16, 32, 64) if k <= n},
        "finished": float(np.mean([x for e in entries for x in e["finished"]])),
        "length": float(np.mean([x for e in entries for x in e["lengths"]])),
        "no_answer": verdicts.count("no_answer") / len(verdicts),
        "gave_up": verdicts.count("gave_up") / len(verdicts)}


def set_name(source):
    """File name of a set: an alias as it is, else the last part of the path or hub name."""
    return source if source in DATA_ALIASES else Path(source).stem.replace(":", "-")


def answer_set(cfg, lm, problems, path):
    """Sample the problems of a set that the file at `path` does not hold yet; returns its lines.

    A problem is written when its last sample has ended: a stop loses those in flight and no other.
    """
    done = {e.get("index"): e for e in from_rank_0(read_json_lines, path)}
    same = all((e.get("problem"), e.get("answer")) == (p.problem, p.answer)
               for i, p in enumerate(problems) if (e := done.get(i))) and None not in done
    check(same, f"{path} holds samples of other problems; choose another --out or delete it")
    missing = [i for i in range(len(problems)) if i not in done]
    right = sum(e["verdicts"].count("correct") for e in done.values())
    bar = progress(total=len(problems), initial=len(problems) - len(missing), desc=path.stem)

    def write(i, rows):
        nonlocal right
        p, decode = problems[i], lm.tokenizer.decode
        texts = [decode(r.tokens, skip_special_tokens=True) for r in rows]
        done[i] = {"index": i, "problem": p.problem, "answer": p.answer,
                   "verdicts": [grade(text, p.answer) for text in texts],
                   "lengths": [len(r.tokens) for r in rows],
                   "finished": [r.finished for r in rows], "responses": texts}
        append_json_line(path, done[i])
        right += done[i]["verdicts"].count("correct")
        bar.set_postfix(avg=f"{100 * right / len(done) / cfg.samples:.1f} %", refresh=False)
        bar.update()

    prompts = [build_prompt(lm.tokenizer, problems[i].problem, cfg.thinking) for i in missing]
    with bar:
        sample_and_write(lm, prompts, cfg.samples, lambda j, rows: write(missing[j], rows),
                         max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                         seed=(cfg.seed,), sample_rows=cfg.sample_rows, kv_gib=cfg.kv_gib,
                         gather=cfg.gather)
    if missing:  # in the order of the problems
        write_text(path, "".join(json_line(done[i]) for i in sorted(done)))
    return [done[i] for i in range(len(problems))]


def regrade(path):
    """Replace the verdicts in a file of samples by the verifier's of today; returns its lines."""
    entries, changed = read_json_lines(path), 0
    check(all("responses" in e for e in entries), f"{path} holds no samples")
    for e in entries:
        verdicts = [grade(text, e["answer"]) for text in e["responses"]]
        changed += sum(a != b for a, b in zip(verdicts, e["verdicts"]))
        e["verdicts"] = verdicts
    write_text(path, "".join(map(json_line, entries)))
    print(f"{path}: {changed} verdicts changed")
    return entries


def read_sets(cfg):
    """{file name: problems} of every set of --data; UserError for one that is missing or empty."""
    sets = {}
    for source in cfg.data.split(","):
        problems = [to_problem(row, source) for row in read_rows(source)][: cfg.limit or None]
        check(problems, f"data {source!r} holds no problem")
        check(set_name(source) not in sets, f"--data {cfg.data}: two sets have one name")
        sets[set_name(source)] = problems
    return sets


def start_record(cfg, lm, out):
    """Write an evaluation's record; UserError where `out` has one of another model or setting."""
    names = ("samples", "temperature", "max_new_tokens", "seed", "thinking")
    identity = {"weights": fingerprint(lm), "bf16": lm.bf16, **{n: getattr(cfg, n) for n in names}}
    old = from_rank_0(read_record, out).get("identity")
    differ = differences(old, identity) if old else ""
    check(not differ, f"{out} holds samples of another model or setting ({differ}); choose another "
                      "--out or delete it")
    record = {**describe_run(cfg), "model": cfg.model, "identity": identity, "finished": False}
    write_json(out / "config.json", {"run": record})
    return record


def save_summary(out, model, sets, seconds):
    """Add the figures of some sets to those that OUT/summary.json has."""
    path = out / "summary.json"
    old = read_json(path) if path.exists() and not rank() else {"sets": {}, "seconds": 0.0}
    new = {"model": model, "sets": {**old["sets"], **sets}, "seconds": old["seconds"] + seconds}
    write_json(path, {**new, "seconds": rounded(new["seconds"])})


# --- tables


def percent(figures):
    """avg ± standard error of a set, in %: 47.2 ± 1.8"""
    se = f" ± {100 * figures['se']:.1f}" if figures["se"] is not None else ""
    return f"{100 * figures['avg']:.1f}{se}"


def paper_row(folder):
    """The paper's numbers for a run of run_all.sh, by the names of its folders; () if none."""
    folder = Path(folder).resolve()
    setting = re.sub(r"-seed\d+$", "", folder.parent.name)
    teachers = {"world": "8b", "world-gpu": "8b", "qwen3-8b": "8b", "qwen3-14b": "14b",
                "llama-3.3-70b-instruct": "llama"}
    return PAPER[teachers[setting]].get(folder.name, ()) if setting in teachers else ()


def markdown(head, rows):
    """A markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model_table(model, summary):
    """One model: a row per set."""
    paper, rows = dict(zip(("math500", "aime24", "aime25"), paper_row(model))), []
    k = n = next(iter(summary.values()))["samples"]
    for name, f in summary.items():
        k = max(map(int, f["pass"]))
        rows.append([name, str(f["problems"]), percent(f), f"{100 * f['pass'][str(k)]:.1f}",
                     f"{100 * f['finished']:.1f}", f"{f['length']:.0f}", str(paper.get(name, "-"))])
    return markdown(["set", "problems", f"avg@{n} ± SE, %", f"pass@{k}, %", "finished, %",
                     "mean length", "paper, %"], rows)


def ancestry(folder):
    """{folder: record} of a run and of all that it builds on; base models (plain SFT) left out.

    A parent that is not where it was is looked for beside the run: runs may be moved together.
    """
    record = read_record(folder)
    if not record or record["settings"].get("targets") == "data":
        return {}
    found = {str(Path(folder).resolve()): record}
    for parent in record["parents"]:
        beside = Path(folder).parent / Path(parent).name
        found |= ancestry(parent if Path(parent).is_dir() else beside)
    return found


def labels_used(records):
    """Distinct labelled problems behind a run: of each source all, or the halves that were used."""
    used = {key: n for record in records for key, n in record["labels"].items()}
    whole = {key.removesuffix(":all") for key in used if key.endswith(":all")}
    return sum(n for key, n in used.items() if key.endswith(":all") or key[:-2] not in whole)


def sweep(route):
    """Base name and value of a route that is one of a series; the value is None for any other.

    >>> sweep("bridge-32"), sweep("lambda-0.25"), sweep("bridge-1h")
    (('bridge', 32.0), ('lambda', 0.25), ('bridge-1h', None))
    """
    name, number = re.fullmatch(r"(.+?)(?:-(\d+(?:\.\d+)?))?", route).groups()
    return name, float(number) if number else None


def place(route):
    """Sort key: names that PAPER does not know, then its routes in their order, then the series."""
    name, value = sweep(route)
    order = list(PAPER["8b"])
    return value is not None, order.index(name) if name in order else -1, name, value or 0.0


def evaluated_runs(root):
    """{run folder: its figures by set}, in the order of the table."""
    found = {p.parent.parent: read_json(p)["sets"]
             for p in Path(root).glob("*/eval/summary.json")}
    check(found, f"no evaluated run in {root} (no {root}/*/eval/summary.json)")
    return {f: found[f] for f in sorted(found, key=lambda f: place(f.name))}


def runs_table(root):
    """All evaluated runs in a folder, a row each.

    Labels and seconds are of the whole chain of runs, teacher included, without the base models.
    """
    found, rows = evaluated_runs(root), []
    sets = list(dict.fromkeys(name for figures in found.values() for name in figures))
    counts = {f["samples"] for figures in found.values() for f in figures.values()}
    samples = counts.pop() if len(counts) == 1 else "n"
    for folder in found:
        chain = ancestry(folder).values()
        rows.append([folder.name,
                     *(percent(found[folder][s]) if s in found[folder] else "-" for s in sets),
                     str(labels_used(chain)), f"{sum(r.get('seconds', 0) for r in chain):.0f}",
                     " / ".join(map(str, paper_row(folder))) or "-"])
    head = ["route", *(f"{s}, avg@{samples} ± SE, %" for s in sets), "labels", "seconds"]
    return markdown([*head, "paper, %: MATH / AIME24 / AIME25"], rows)


# --- several folders: seeds of one setting

# What the paper orders (Tables 3 to 6): `<` the second above the first, `≈` about equal, `≤`
# the second at least the first.
ORDERINGS = (
    ("O1", "raw-bridge", "<", "cold-grpo"), ("O2", "cold-grpo", "<", "bridge"),
    ("O3", "raw-bridge", "<", "sft-teacher-bridge"), ("O3", "sft-teacher-bridge", "<", "bridge"),
    ("O4", "sft", "<", "opd-only"), ("O4", "opd-only", "<", "bridge"), ("O4", "sft", "<", "bridge"),
    ("O5", "bridge-1h", "<", "fresh-2h"), ("O6", "replay-1h", "<", "fresh-2h"),
    ("O7", "bridge-1h", "≈", "replay-1h"), ("O8", "cold-grpo", "<", "same-size-bridge"),
    ("O9", "fresh-2h", "≤", "bridge"), ("Table 5", "sft-teacher-fresh-2h", "<", "fresh-2h"),
    ("Table 6", "sft-fresh-2h", "<", "opd-only-fresh-2h"),
    ("Table 6", "opd-only-fresh-2h", "<", "fresh-2h"))
MARGIN = 2.0  # ours: points of accuracy that `≈` and `≤` let pass


def averages(roots):
    """{route: {set: (S,) avg in %}} over S folders of the same runs; nan where one lacks that."""
    found = [{f.name: figures for f, figures in evaluated_runs(root).items()} for root in roots]
    sets = dict.fromkeys(s for runs in found for figures in runs.values() for s in figures)
    return {route: {s: np.array([100 * runs[route][s]["avg"] if s in runs.get(route, {}) else np.nan
                                 for runs in found]) for s in sets}
            for route in sorted(set().union(*found), key=place)}


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
    """What seeds say of a number; nan is what they cannot: the mean of none, the errors of one."""

    mean: float
    se: float  # standard error of the mean
    half: float  # half of its 95 % interval
    n: int  # seeds


def over_seeds(values):
    """OverSeeds of (S,) values, of which those that are nan do not count."""
    v, se = values[~np.isnan(values)], math.nan
    if len(v) > 1:
        se = float(v.std(ddof=1)) / len(v) ** 0.5
    return OverSeeds(float(v.mean()) if len(v) else math.nan, se, t95(len(v) - 1) * se, len(v))


def verdict(sign, d):
    """What the differences d = second - first, (S,) points, say of an ordering, in a word or two.

    ours: a 95 % interval decides. `<` holds where all of it is above 0, and `≤` where it is above
    -MARGIN; both are reversed where it is below 0. `≈` holds where it is inside ±MARGIN, and else
    differs where it is without 0.
    """
    mean, _, half, n = over_seeds(d)
    low, high = mean - half, mean + half
    if n < 3:
        return "needs more seeds"
    if sign == "≈":
        apart = "differs" if low > 0 or high < 0 else "not separated"
        return "holds" if -MARGIN < low and high < MARGIN else apart
    if high < 0:
        return "reversed"
    return "holds" if low > (0 if sign == "<" else -MARGIN) else "not separated"


def compared(routes):
    """The ORDERINGS between routes that there are: (name, first, sign, second, {set: (S,) d}).

    ours: O2 also for each number of labels.
    """
    budgets = sorted({n for name, n in map(sweep, routes) if name == "bridge" and n})
    fewer = [("O2", f"cold-grpo-{n:g}", "<", f"bridge-{n:g}") for n in budgets]
    return [(name, a, sign, b, {s: routes[b][s] - routes[a][s] for s in routes[a]})
            for name, a, sign, b in (*ORDERINGS, *fewer) if a in routes and b in routes]


def verdict_table(root, routes):
    """A row per ordering: for each set the verdict, the mean difference with its 95 % interval, and
    in how many seeds the difference agrees; beside them the paper's difference on MATH-500."""
    def cell(sign, d):
        mean, _, half, n = over_seeds(d)
        agree = {"<": d > 0, "≤": d >= 0, "≈": abs(d) <= MARGIN}[sign].sum()
        inside = f" ({mean - half:+.1f} to {mean + half:+.1f})" if n > 2 else ""
        return f"{verdict(sign, d)}: {mean:+.1f}{inside}, {agree} of {n}" if n else "-"

    rows = []
    for name, a, sign, b, by_set in compared(routes):
        papers = [paper_row(root / route)[:1] for route in (a, b)]
        paper = f"{papers[1][0] - papers[0][0]:+.1f}" if all(papers) else "-"
        rows.append([f"{name}: {a} {sign} {b}", *(cell(sign, d) for d in by_set.values()), paper])
    head = ["ordering",
            *(f"{s}: difference, points (95 %), seeds that agree" for s in sets_of(routes))]
    return markdown([*head, "paper, MATH"], rows)


def means_table(roots, routes):
    """A row per route: mean over seeds ± its standard error. In the table of one folder ± is over
    problems; here it holds worlds, models and samples too."""
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
    return labels_used(ancestry(folder).values())


def seed_tables(roots, routes):
    """A table per set: every seed's avg in %, and the differences of the ORDERINGS."""
    parts = []
    for s in sets_of(routes):
        lines = {route: by_set[s] for route, by_set in routes.items()}
        lines |= {f"{b} − {a}": by_set[s] for _, a, _, b, by_set in compared(routes)}
        rows = [[name, *("-" if np.isnan(v) else f"{v:.1f}" for v in values)]
                for name, values in lines.items()]
        parts.append(f"{s}:\n\n" + markdown(["route", *(root.name for root in roots)], rows))
    return "\n\n".join(parts)


def show_table(roots, pictures=""):
    """Print the table of one folder's runs and write it there as table.md; for several folders, as
    seeds.md in the first, means, verdicts and (only written) every seed. Pictures go beside them.
    """
    if len(roots) == 1:
        table = runs_table(roots[0])
        (roots[0] / "table.md").write_text(table + "\n", encoding="utf-8")
    else:
        routes = averages(roots)
        table = means_table(roots, routes)
        if compared(routes):
            table += "\n\n" + verdict_table(roots[0], routes)
        write_text(roots[0] / "seeds.md", f"{table}\n\n{seed_tables(roots, routes)}\n")
    print(table)
    if pictures or len(roots) > 1:
        draw(roots, Path(pictures or roots[0]))


# --- pictures: what the tables hold, and training curves

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def draw(roots, out):
    """Write orderings, curves, labels and density as .png into `out`, each if its runs exist."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    except ImportError:
        return print("pictures left out: matplotlib is not installed")
    out.mkdir(parents=True, exist_ok=True)
    routes = averages(roots)
    pictures = {"orderings": (draw_orderings, routes), "curves": (draw_curves, roots),
                "labels": (draw_budgets, routes, label_budgets(roots, routes)),
                "density": (draw_density, routes)}
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
    """The differences of the ORDERINGS, 95 %; grey is what `≈` and `≤` let pass."""
    rows = [row for row in compared(routes) if any(over_seeds(d).n > 2 for d in row[-1].values())]
    if not rows:
        return
    decided = {"holds": "o", "reversed": "X", "differs": "X"}
    figure.set_size_inches(6, 0.8 + 0.26 * len(rows))
    axes = figure.subplots()
    for y, (_, _, sign, _, by_set) in enumerate(rows):
        for i, d in enumerate(by_set.values()):
            found, said = over_seeds(d), verdict(sign, d)
            axes.errorbar(found.mean, y + 0.34 * ((i + 0.5) / len(by_set) - 0.5), xerr=found.half,
                          fmt=decided.get(said, "o"), color=COLOURS[i], elinewidth=1.2,
                          markerfacecolor=COLOURS[i] if said in decided else "white",
                          markersize=7 if decided.get(said) == "X" else 4.5)
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
    """(S, steps) of a metric in a route's finished runs, cut to the shortest; None without runs."""
    finished = [root / route for root in roots if read_record(root / route).get("finished")]
    runs = [[line.get(metric) for line in read_json_lines(folder / "metrics.jsonl")]
            for folder in finished]
    steps = min(map(len, filter(None, runs)), default=0)
    return np.array([run[:steps] for run in runs if run], float) if steps else None


def draw_curves(figure, roots):
    """Left the reward of GRPO, right the KL to the teacher: means over seeds in a band of ± SE."""
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
    """Write the names of lines at the right, {name: (x, y, colour)} of ends, none upon another."""
    low, high = axes.get_ylim()
    lowest = -math.inf
    known = {name: end for name, end in ends.items() if math.isfinite(end[1])}
    right = max((x for x, _, _ in known.values()), default=0)  # a short line's name beside others'
    for name, (_, y, colour) in sorted(known.items(), key=lambda item: item[1][1]):
        lowest = max(y, lowest + 0.05 * (high - low))  # a line of text
        axes.annotate(name, (right, lowest), xytext=(5, 0), textcoords="offset points",
                      color=colour, va="center", annotation_clip=False)


def label_budgets(roots, routes):
    """{"cold-grpo" or "bridge": [(labelled problems, route)]}, where several numbers were tried."""
    series = {name: sorted((labels_of(roots, route), route) for route in routes
                           if sweep(route)[0] == name) for name in ("cold-grpo", "bridge")}
    return {name: points for name, points in series.items() if len(points) > 1}


def draw_budgets(figure, routes, budgets):
    """Accuracy over the number of labels, a panel per set: means, 95 %; thin lines are seeds."""
    for i, s in enumerate(sets_of(routes) if budgets else ()):
        axes, ends = figure.add_subplot(1, len(sets_of(routes)), i + 1), {}
        for shift, (colour, (name, points)) in enumerate(zip(COLOURS, budgets.items())):
            x = np.array([n for n, _ in points]) * 1.04**shift  # so that no bar hides another
            values = np.array([routes[route][s] for _, route in points])
            found = [over_seeds(v) for v in values]
            axes.plot(x, values, color=colour, linewidth=0.6, alpha=0.35)
            axes.errorbar(x, [f.mean for f in found], yerr=[f.half for f in found], fmt="o-",
                          color=colour, markersize=4)
            ends[name] = x[-1], found[-1].mean, colour
        axes.set_xscale("log", base=2)
        ticks = sorted({n for points in budgets.values() for n, _ in points})
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel="labelled problems", ylabel=f"accuracy on {s}, %")
        axes.set_ylim(bottom=0)
        name_lines(axes, ends)


def draw_density(figure, routes):
    """Accuracy over λ of Eq. 3 (lambda-λ; 0 is `bridge`), a panel per set: means; thin: seeds.

    The bars are of the differences from the first point, inside each seed, 95 %.
    """
    points = sorted((sweep(route)[1], route) for route in routes if sweep(route)[0] == "lambda")
    points = [(0.0, "bridge")] * ("bridge" in routes) + points
    for i, s in enumerate(sets_of(routes) if len(points) > 1 else ()):
        axes = figure.add_subplot(1, len(sets_of(routes)), i + 1)
        x, values = [n for n, _ in points], np.array([routes[route][s] for _, route in points])
        axes.plot(x, values, color=COLOURS[0], linewidth=0.6, alpha=0.35)
        axes.errorbar(x, [over_seeds(v).mean for v in values], fmt="o-", color=COLOURS[0],
                      yerr=[over_seeds(v - values[0]).half for v in values], markersize=4)
        axes.set(xlabel="λ", ylabel=f"accuracy on {s}, % (bars: change from λ = {x[0]:g})")
        axes.set_xticks(x)


def main(cfg):
    check(cfg.model or (cfg.regrade and cfg.out) or (cfg.table and not cfg.regrade),
          "--model is needed (or --table)")
    check(cfg.table or not cfg.pictures, "--pictures needs --table")
    check(world_size() == 1 or not cfg.regrade, "--regrade needs no torchrun")
    inside = Path(cfg.model) / "eval" if Path(cfg.model).is_dir() else Path("eval") / cfg.model
    out, summary = Path(cfg.out or inside), {}
    if cfg.dry_run:
        return dry_run(cfg, "", [cfg.model], sampler=cfg.model)
    if cfg.regrade:
        paths = sorted(out.glob("*.jsonl"))
        check(paths, f"no stored samples in {out}")
        with lock(out / ".lock", out):
            summary = {path.stem: summarise(regrade(path)) for path in paths}
            save_summary(out, read_record(out).get("model", cfg.model), summary, 0.0)
    elif cfg.model:
        sets = read_sets(cfg)
        lm = load_lm(cfg.model, device=cfg.device, dtype=cfg.dtype,
                     shard=cfg.gather == "layer")
        out.mkdir(parents=True, exist_ok=True)
        with lock(out / ".lock", out):
            record = start_record(cfg, lm, out)
            for name, problems in sets.items():
                started = time.time()
                summary[name] = summarise(answer_set(cfg, lm, problems, out / f"{name}.jsonl"))
                save_summary(out, cfg.model, {name: summary[name]}, time.time() - started)
            write_json(out / "config.json", {"run": {**record, "finished": True}})
    if summary:
        print(model_table(cfg.model or out.parent, summary))
    if cfg.table:
        from_rank_0(show_table, [Path(root) for root in cfg.table.split(",")], cfg.pictures)


if __name__ == "__main__":
    run_cli(main, Config, __doc__)
