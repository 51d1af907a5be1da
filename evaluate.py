"""Evaluation: avg@16 with its standard error, pass@k, and the table of a whole recipe.

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
"""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    table: str = ""  # ours: print (and write) the table of the runs in this folder, or in several
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
# route (Tables 2-6 and 8). Routes are named as the folders that run_all.sh writes.
PAPER = {
    "8b": {
        "teacher-rl": (88.4, 47.7, 36.7), "cold-grpo": (75.9, 19.8, 17.1),
        "raw-bridge": (71.5, 15.0, 10.6), "same-size-bridge": (76.5, 20.6, 17.1),
        "sft-teacher-bridge": (76.9, 22.1, 17.6), "sft": (76.0, 22.4, 19.4),
        "opd-only": (77.6, 23.0, 18.9), "bridge": (79.3, 25.2, 20.2), "bridge-1h": (75.4,),
        "replay-1h": (75.7,), "fresh-2h": (78.5,), "sft-fresh-2h": (77.3,),
        "opd-only-fresh-2h": (77.8,), "sft-teacher-bridge-1h": (74.3,),
        "sft-teacher-replay-1h": (74.0,), "sft-teacher-fresh-2h": (77.2,)},
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


def percent(figures):
    """avg ± standard error of a set, in %: 47.2 ± 1.8"""
    se = f" ± {100 * figures['se']:.1f}" if figures["se"] is not None else ""
    return f"{100 * figures['avg']:.1f}{se}"


def paper_row(folder):
    """The paper's numbers for a run of run_all.sh, by the names of its folders; () if none."""
    folder = Path(folder).resolve()
    setting = re.sub(r"-seed\d+$", "", folder.parent.name)
    teachers = {"world": "8b", "qwen3-8b": "8b", "qwen3-14b": "14b",
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


def evaluated_runs(root):
    """{run folder: its figures by set}: routes in PAPER's order, before them the others."""
    found = {p.parent.parent: read_json(p)["sets"]
             for p in Path(root).glob("*/eval/summary.json")}
    check(found, f"no evaluated run in {root} (no {root}/*/eval/summary.json)")
    order = list(PAPER["8b"])
    place = {f: order.index(f.name) if f.name in order else -1 for f in found}
    return {f: found[f] for f in sorted(found, key=lambda f: (place[f], f.name))}


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


# What the paper orders: the second route above the first.
ORDERINGS = [("raw-bridge", "cold-grpo"), ("cold-grpo", "bridge"), ("sft", "opd-only"),
             ("opd-only", "bridge"), ("sft", "bridge"), ("bridge-1h", "fresh-2h"),
             ("replay-1h", "fresh-2h"), ("bridge-1h", "replay-1h"), ("fresh-2h", "bridge")]


def seeds_table(roots):
    """Several folders of the same runs, a column each: avg in % on their first set, and the paired
    differences of the ORDERINGS; over the folders the mean ± its standard error.

    Here ± holds the spread over seeds (worlds, models, samples); elsewhere it is over problems.
    """
    columns = [{folder.name: next(iter(figures.values()))["avg"] * 100
                for folder, figures in evaluated_runs(root).items()} for root in roots]
    columns = [{**c, **{f"{b} − {a}": c[b] - c[a] for a, b in ORDERINGS if a in c and b in c}}
               for c in columns]
    rows = []
    for name in columns[0]:
        values = np.array([column.get(name, np.nan) for column in columns])
        mean, se = np.nanmean(values), np.nanstd(values, ddof=1) / (~np.isnan(values)).sum() ** 0.5
        rows.append([name, *(f"{v:.1f}" for v in values), f"{mean:.1f} ± {se:.1f}"])
    return markdown(["route", *(Path(root).name for root in roots), "mean ± SE over seeds"], rows)


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


def show_table(roots):
    """Print the table of one folder's runs, or of several seeds', and write it there."""
    table = runs_table(roots[0]) if len(roots) == 1 else seeds_table(roots)
    (Path(roots[0]) / ("table.md" if len(roots) == 1 else "seeds.md")).write_text(table + "\n")
    print(table)


def main(cfg):
    check(cfg.model or (cfg.regrade and cfg.out) or (cfg.table and not cfg.regrade),
          "--model is needed (or --table)")
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
        show_table(cfg.table.split(","))


if __name__ == "__main__":
    run_cli(main, Config, __doc__)
