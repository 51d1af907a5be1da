"""When does the warmup matter? Base students near to their teacher's habits and further away.

    JOBS=2 python tests/lab/distance.py                         # the verdict: seeds 0 to 4
    python tests/lab/distance.py --seeds 100 --distances 0 1    # other seeds, to choose settings on

The base student of `tests/world.py --distance D` writes a share D of its worked documents in a form
of its own; all else is equal. From it, with the settings of run_all.sh and in as many updates: the
bridge (a third is warmup), OPD alone, the warmup alone. --out gets distance.md: avg@4 on `test`,
differences inside each seed with 95 % intervals (Student's t), and the KL, nats a token, between
base student and RL'd teacher; the last columns have the seeds one by one. With matplotlib it gets
distance.png, too. A stopped sweep goes on if run again.
"""

import argparse
import itertools
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a core each
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]
import numpy as np
import evaluate
import fkl_warmup
import grpo
import opd
import world
from common import (UserError, load_lm, load_problems, read_json, read_record, sample,
                    tokenize_problems, write_json, write_text)
from evidence import COLOURS, made_by, over_seeds
from why import state_kls

ROUTES = ("bridge", "opd-only", "warmup-only")
BASE = {"prompts": 64, "rollouts": 1, "warmup_steps": 50, "weight_decay": 0.01, "adam_beta2": 0.99}
SIZES = {"teacher": {"lr": 4e-3, "steps": 600}, "student": {"lr": 6e-3, "steps": 1200}}
RL = {"prompts": 32, "mini_batch": 32, "kl_coef": 0.0, "lr": 3e-4, "steps": 40}
DISTIL = {"prompts": 16, "rollouts": 4, "lr": 1e-3}
LENGTH = 48  # tokens of a response, at most

class Cell:
    """A seed at a distance: its world, its models, and their figures."""

    def __init__(self, out, seed, distance):
        self.folder, self.seed = Path(out) / f"seed{seed}" / f"{distance:g}", seed
        self.world = world.build(self.folder / "world", seed, distance=distance)
        self.ways = {"seed": seed, "lr_schedule": "linear", "show_every": 0}
        self.labels = {**self.ways, "data": str(self.world / "train.jsonl"), "exclude": "none",
                       "max_new_tokens": LENGTH}

    def train(self, module, name, **settings):
        """Run a stage and evaluate its model, each unless it is finished; returns its folder."""
        out = str(self.folder / name)
        score = {"model": out, "data": str(self.world / "test.jsonl"), "samples": 4,
                 "max_new_tokens": LENGTH, "seed": self.seed}
        for module, folder, flags in (module, out, settings), (evaluate, f"{out}/eval", score):
            made = read_record(folder)
            had = made.get("settings", {})
            if not made.get("finished") or any(had.get(k, v) != v for k, v in flags.items()):
                module.main(module.Config(out=folder, **flags))  # or it refuses
        return out

    def base(self, size):
        return self.train(fkl_warmup, f"base-{size}", **BASE, **SIZES[size], **self.ways,
                          student=str(self.world / f"init-{size}"), targets="data",
                          data=str(self.world / f"corpus-{size}.jsonl"))

    def routes(self, teacher, updates):
        """The base student and what becomes of it."""
        base = self.base("student")
        if not (self.folder / "kl.json").exists():
            write_json(self.folder / "kl.json", self.kls(base, teacher))

        def learn(module, name, student, steps):
            cache = {"cache": str(self.folder / "rollouts.jsonl")} if module is fkl_warmup else {}
            return self.train(module, name, teacher=teacher, student=student, steps=steps, **cache,
                              **DISTIL, **self.labels)

        for n in updates:
            warm = learn(fkl_warmup, f"bridge-{n}-warmup", base, n // 3)
            learn(opd, f"bridge-{n}", warm, n - n // 3)
            learn(opd, f"opd-only-{n}", base, n)
            learn(fkl_warmup, f"warmup-only-{n}", base, n)

    def kls(self, *models):
        """KL(student || teacher), KL(teacher || student), nats a token, each where its first is."""
        cfg = opd.Config(**self.labels)
        student, teacher = (load_lm(model, cfg) for model in models)
        prompts = [p.prompt for p in tokenize_problems(load_problems(cfg), cfg, student)]
        return [state_kls(a, b, sample(a, prompts, 4, temperature=1.0, max_new_tokens=LENGTH,
                                       seed=(self.seed,))).mean().item()
                for a, b in ((student, teacher), (teacher, student))]

    def figures(self):
        """{"s‖t", "t‖s": nats a token; a model's folder: avg in %} of all that is evaluated."""
        runs, kls = evaluate.evaluated_runs(self.folder), read_json(self.folder / "kl.json")
        return dict(zip(("s‖t", "t‖s"), kls)) | {
            path.name: 100 * sets["test"]["avg"] for path, sets in runs.items()}

def work(task):
    """The models of a cell that are not finished; the teacher is that of distance 0."""
    out, updates, seed, distance = task
    cell, first = (Cell(out, seed, d) for d in (distance, 0.0))
    with open(cell.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        teacher = first.train(grpo, "teacher-rl", model=first.base("teacher"), **RL, **first.labels)
        if updates:
            cell.routes(teacher, updates)
    print(f"seed {seed}, distance {distance:g}, updates {updates}: done", flush=True)

def table(figures, updates):
    """A row per number of updates and distance; figures: {distance: {name: (S,)}}."""
    rows = []
    for n, (d, of) in itertools.product(updates, figures.items()):
        bridge, *others = (of[f"{route}-{n}"] for route in ROUTES)
        means = [over_seeds(x) for x in (of["base-student"], bridge, *others)]
        ahead = [over_seeds(bridge - x) for x in others]
        rows.append([f"{n}", f"{d:g}", f"{of['s‖t'].mean():.2f}", f"{of['t‖s'].mean():.2f}",
                     *(f"{x.mean:.1f} ± {x.se:.1f}" for x in means), *(x.interval() for x in ahead),
                     " ".join(f"{x:.2f}" for x in of["t‖s"]),
                     " ".join(f"{x:+.1f}" for x in bridge - others[0])])
    head = ["updates", "distance", "KL(s‖t)", "KL(t‖s)", "base student", *ROUTES,
            *(f"bridge − {r}, points (95 %)" for r in ROUTES[1:]), "KL(t‖s) of each seed",
            "bridge − opd-only of each seed"]
    return evaluate.markdown(head, rows).replace(" ± nan", "")

def draw(figures, updates, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots(subplot_kw={"xscale": "log", "ylabel": "bridge − OPD, points", "xlabel":
                                       "KL(teacher ‖ student) of the base student, nats a token"})
    kl = np.array([of["t‖s"] for of in figures.values()])  # (distances, S)
    for colour, n in zip(COLOURS, updates):
        d = np.array([of[f"bridge-{n}"] - of[f"opd-only-{n}"] for of in figures.values()])
        means, _, halves, _ = zip(*map(over_seeds, d))
        axes.plot(kl, d, ".", color=colour, markersize=3)
        axes.errorbar(kl.mean(1), means, halves, fmt="o-", color=colour, label=f"{n} updates")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(path)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distance"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--distances", type=float, nargs="+", default=[0, 0.9, 0.99, 1])
    parser.add_argument("--updates", type=int, nargs="+", default=[120, 240])
    out, seeds, distances, updates = vars(parser.parse_args(argv)).values()
    if min(updates) < 3:
        parser.error("--updates: the bridge takes at least 3")
    with ProcessPoolExecutor(jobs := int(os.environ.get("JOBS", 1)), get_context("spawn")) as pool:
        every = pool.map if jobs > 1 else map
        try:
            list(every(work, [(out, [], seed, 0.0) for seed in seeds]))  # the teachers
            list(every(work, [(out, updates, seed, d) for d in distances for seed in seeds]))
        except UserError as error:
            sys.exit(f"error: {error}")
    cells = {d: [Cell(out, seed, d) for seed in seeds] for d in distances}
    figures = {}
    for d, of in cells.items():
        every = [cell.figures() for cell in of]
        names = set.intersection(*map(set, every))  # a seed may have been run alone, with others
        figures[d] = {name: np.array([x[name] for x in every]) for name in names}
    command = ["python", "tests/lab/distance.py", *(sys.argv[1:] if argv is None else argv)]
    made = made_by([cell.folder / f"{route}-{n}" for of in cells.values() for cell in of
                    for route in ROUTES for n in updates], shlex.join(command))
    write_text(out / "distance.md", "# Bridge, OPD alone and warmup alone at several distances\n\n"
               f"{made} avg@4 on `test` in %, differences in points, KL in nats a token.\n\n"
               f"{table(figures, updates)}\n")
    print((out / "distance.md").read_text())
    with suppress(ImportError):
        draw(figures, updates, out / "distance.png")

if __name__ == "__main__":
    main()
