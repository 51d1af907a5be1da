"""Evaluation: avg@16 with its standard error, unbiased pass@k, and a table of all evaluated runs.

Each problem is answered `--samples` times; its score is the share of right samples. avg@n is the
mean score over the problems of a set, and ± its standard error over problems (not over seeds). A
response that the limit cut off counts as it stands: wrong unless its answer was already there. With
a --verifier, avg@n is the mean of its values, and a sample of at least 1 is right for pass@k.

Every problem becomes one line of OUT/<set>.jsonl with all its samples. So an interrupted evaluation
continues where it stopped, and --regrade runs the verifier again on stored text, without the model.
The random numbers of a sample depend on (seed, prompt, sample index), not on batch size or order.

    python evaluate.py --model ckpt/bridge --data math500,aime24,aime25
    python evaluate.py --model runs/world/bridge --data runs/world/test.jsonl --max-new-tokens 48
    python evaluate.py --table runs/world    # the runs of a folder; several: tests/lab/evidence.py
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from common import (REWARD, append_json_line, build_prompt, check, check_context, describe_run,
                    differences, fingerprint, json_line, judge, load_lm, lock, on_rank_0, progress,
                    rank, read_json, read_json_lines, read_problems, read_record, response_text,
                    run_cli, sample_shared, short_hash, to_problem, write_json, write_text)

@dataclass
class Config:
    # --- what to do
    model: str = ""  # ours: any; model folder or hub name to evaluate
    data: str = "math500,aime24,aime25"  # sets (Tables 2-8): files, folders, hub names, aliases
    out: str = ""  # ours: output folder; empty is MODEL/eval, or eval/MODEL for a hub name
    table: str = ""  # ours: print (and write) the table of the evaluated runs in this folder
    regrade: bool = False  # ours: only run the verifier again on the samples stored in --out
    verifier: str = ""  # ours: FILE.py: deterministic verify(response, answer) -> reward, not maths
    # --- settings
    samples: int = 16  # samples per problem (Tables 2-8: avg@16)
    temperature: float = 1.0  # ours: the trained policy itself; 0 is greedy
    max_new_tokens: int = 16384  # response limit in tokens (Tables 9 and 10)
    limit: int = 0  # ours: only so many problems of each set, from the first; 0 is all
    seed: int = 0  # ours: of the sampling
    thinking: bool = False  # ours: Qwen3's thinking mode
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # ours: compute; auto: bf16 where a GPU has it
    # --- memory and speed only: they change no result beyond rounding
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    sample_rows: int = 512  # rows decoded at once
    kv_gib: float = 0.0  # GiB of the sampler's keys and values; 0: what the device can spare
    sample_parts: int = 0  # processes that share one copy while sampling; 0: as few as have room

# The paper's avg@16 in %, (MATH-500, AIME 2024, AIME 2025) or MATH-500 alone (Tables 2-6 and 8); ()
# where it prints none. Settings and routes are named as the folders that run_all.sh writes. The
# routes stand in the order of our tables; opd-only-long is another reading of the same R8.
PAPER = {
    "qwen3-8b": {
        "base-student": (), "base-teacher": (), "teacher-rl-1h": (),
        "teacher-rl": (88.4, 47.7, 36.7), "sft-teacher": (), "sft-teacher-1h": (),
        "cold-grpo": (75.9, 19.8, 17.1), "raw-bridge": (71.5, 15.0, 10.6),
        "same-size-bridge": (76.5, 20.6, 17.1), "sft-teacher-bridge": (76.9, 22.1, 17.6),
        "sft": (76.0, 22.4, 19.4), "opd-only": (77.6, 23.0, 18.9),
        "opd-only-long": (77.6, 23.0, 18.9), "bridge": (79.3, 25.2, 20.2),
        "sft-teacher-bridge-1h": (74.3,), "sft-1h": (), "opd-only-1h": (), "bridge-1h": (75.4,),
        "sft-teacher-replay-1h": (74.0,), "replay-1h": (75.7,), "sft-teacher-fresh-2h": (77.2,),
        "sft-fresh-2h": (77.3,), "opd-only-fresh-2h": (77.8,), "fresh-2h": (78.5,)},
    "qwen3-14b": {
        "teacher-rl": (89.5, 47.1, 39.0), "cold-grpo": (75.9, 19.8, 17.1),
        "raw-bridge": (72.8, 16.7, 13.5), "same-size-bridge": (76.5, 20.6, 17.1),
        "sft-teacher-bridge": (77.6, 23.2, 18.4), "sft": (76.5, 21.5, 17.0),
        "opd-only": (77.1, 22.8, 18.6), "opd-only-long": (77.1, 22.8, 18.6),
        "bridge": (78.6, 24.6, 20.8), "bridge-1h": (76.3,),
        "replay-1h": (75.6,), "fresh-2h": (78.7,), "sft-fresh-2h": (77.2,),
        "opd-only-fresh-2h": (77.5,), "sft-teacher-bridge-1h": (75.8,),
        "sft-teacher-replay-1h": (75.6,), "sft-teacher-fresh-2h": (76.9,)},
    "llama-3.3-70b-instruct": {"cold-grpo": (59.8, 12.5, 7.2), "raw-bridge": (55.4, 8.8, 3.1),
                               "bridge": (62.1, 14.9, 9.2)},
}

def pass_at_k(n, c, k):
    """Probability that k of n samples, of which c are right, contain a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def summarise(lines):
    """{figure: value} of a set's lines: shares in [0, 1], tokens; "se" is None for one problem."""
    rewards = np.array([[REWARD.get(v, v) for v in line["verdicts"]] for line in lines])
    verdicts = np.array([line["verdicts"] for line in lines], dtype=str)  # both (problems, n)
    n_problems, n = rewards.shape
    scores, right = rewards.mean(1), (rewards >= 1).sum(1)  # (problems,)
    return {
        "problems": n_problems, "samples": n, "avg": float(scores.mean()),
        "se": float(scores.std(ddof=1) / n_problems ** 0.5) if n_problems > 1 else None,
        "pass": {str(k): float(np.mean([pass_at_k(n, int(c), k) for c in right]))
                 for k in (1, 2, 4, 8, 16, 32, 64) if k <= n},
        "finished": float(np.mean([line["finished"] for line in lines])),
        "length": float(np.mean([line["lengths"] for line in lines])),
        "no_answer": float((verdicts == "no_answer").mean()),
        "gave_up": float((verdicts == "gave_up").mean())}

def read_sets(cfg):
    """{set name: problems} of --data. A set has its file's name, with folders where two have one.
    Raises UserError for a set that is missing, empty or there twice."""
    sources, sets = list(filter(None, map(str.strip, cfg.data.split(",")))), {}
    paths = [Path(re.sub(r"(?i)\.(jsonl?|csv|tsv|parquet)(\.gz)?$", "", s)).parts for s in sources]
    for source, path in zip(sources, paths):
        tails = (path[-n:] for n in range(1, 1 + len(path)))
        own = next((x for x in tails if sum(x == p[-len(x):] for p in paths) == 1), None)
        check(own, f"--data {cfg.data}: two sets have one name")
        name = re.sub("[:/]", "-", "-".join(own))
        check(name not in sets, f"--data {cfg.data}: two sets are named {name}")
        sets[name] = read_problems(source, to_problem, cfg.verifier)
    check(sets, f"--data {cfg.data!r} names no set")
    return sets

def answer_set(cfg, lm, problems, path):
    """Sample the problems that the file at `path` lacks; returns the lines of all problems.

    A problem is written when its last sample has ended, so a stop loses only the problems in
    flight. Raises UserError if the file holds other problems.
    """
    lines = {e.get("index"): e for e in on_rank_0(read_json_lines, path)}
    same = all((lines[i].get("problem"), lines[i].get("answer")) == (p.problem, p.answer)
               for i, p in enumerate(problems) if i in lines) and None not in lines
    check(same, f"{path} holds samples of other problems; choose another --out or delete it")
    missing = [i for i in range(len(problems)) if i not in lines]
    bar = progress(total=len(problems), initial=len(problems) - len(missing), desc=path.stem)

    def write(j, rollouts):
        i, p = missing[j], problems[missing[j]]
        texts = [response_text(lm.tokenizer, r) for r in rollouts]
        lines[i] = {"index": i, "problem": p.problem, "answer": p.answer,
                    "verdicts": judge([(text, p.answer) for text in texts], cfg.verifier),
                    "lengths": [len(r.tokens) for r in rollouts],
                    "finished": [r.finished for r in rollouts], "responses": texts}
        append_json_line(path, lines[i])
        bar.set_postfix(avg=percent(summarise(list(lines.values()))), refresh=False)
        bar.update()

    prompts = [problems[i].prompt for i in missing]
    with bar:
        sample_shared(lm, prompts, cfg.samples, cfg, (cfg.seed,), write)
    if missing:  # they were written in the order in which they ended
        write_text(path, "".join(json_line(lines[i]) for i in sorted(lines)))
    return [lines[i] for i in range(len(problems))]

def save_summary(out, model, sets):
    """Add the figures of some sets to OUT/summary.json."""
    path = out / "summary.json"
    stored = read_json(path)["sets"] if path.exists() and not rank() else {}
    write_json(path, {"model": model, "sets": {**stored, **sets}})

def evaluate(cfg, out):
    """Answer the sets of --data into the folder `out`; returns {set name: figures}.

    Raises UserError if `out` holds samples of another model, setting or state of a set.
    """
    sets, summary = read_sets(cfg), {}
    lm = load_lm(cfg.model, cfg, shard=False)
    names = ("samples", "temperature", "max_new_tokens", "seed", "thinking")
    identity = {"weights": fingerprint(lm), "bf16": lm.bf16, **{n: getattr(cfg, n) for n in names}}
    for name, problems in sets.items():
        identity[f"set {name}"] = short_hash(problems)
        problems = problems[: cfg.limit or None]
        prompts = (tuple(build_prompt(lm.tokenizer, p.problem, cfg.thinking)) for p in problems)
        sets[name] = [replace(p, prompt=ids) for p, ids in zip(problems, prompts)]
        check_context(lm, cfg, max(len(p.prompt) for p in sets[name]) + cfg.max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out / ".lock", out):
        old = on_rank_0(read_record, out)
        run, had = on_rank_0(describe_run, cfg, old), old.get("identity", {})
        identity["verifier"] = run["settings"]["verifier"]
        differ = differences({**identity, **had}, {**had, **identity})  # each may lack a set
        check(not differ, f"{out} holds samples of another model, setting or set ({differ}); "
                          "choose another --out or delete it")
        record = {**run, "model": cfg.model, "identity": {**had, **identity}, "finished": False}
        write_json(out / "config.json", {"run": record})
        for name, problems in sets.items():
            summary[name] = summarise(answer_set(cfg, lm, problems, out / f"{name}.jsonl"))
            save_summary(out, cfg.model, {name: summary[name]})
        write_json(out / "config.json", {"run": {**record, "finished": True}})
    return summary

def regrade(cfg, out):
    """Judge all samples in `out` again; returns {set name: figures}. UserError without samples."""
    paths, graded, summary = sorted(out.glob("*.jsonl")), {}, {}
    check(paths, f"no stored samples in {out}")
    with lock(out / ".lock", out):
        record = read_record(out)
        settings = describe_run(cfg, record)["settings"]
        record["identity"] = {**record.get("identity", {}), "verifier": settings["verifier"]}
        for path in paths:
            lines, changed = read_json_lines(path), 0
            check(all("responses" in line for line in lines), f"{path} holds no samples")
            for line in lines:
                verdicts = judge([(x, line["answer"]) for x in line["responses"]], cfg.verifier)
                changed += sum(a != b for a, b in zip(verdicts, line["verdicts"]))
                line["verdicts"] = verdicts
            print(f"{path}: {changed} verdicts changed")
            graded[path], summary[path.stem] = lines, summarise(lines)
        for path, lines in graded.items():  # all are judged by now, or none is written
            write_text(path, "".join(map(json_line, lines)))
        write_json(out / "config.json", {"run": record})
        save_summary(out, record.get("model", cfg.model), summary)
    return summary

def percent(figures):
    """avg ± standard error of a set, in %: 47.2 ± 1.8"""
    se = f" ± {100 * figures['se']:.1f}" if figures["se"] is not None else ""
    return f"{100 * figures['avg']:.1f}{se}"

def paper_row(folder):
    """The paper's numbers for a run of run_all.sh, () if it has none; a world is like qwen3-8b."""
    folder = Path(folder).resolve()
    setting = re.sub(r"-seed\d+$", "", folder.parent.name)
    setting = "qwen3-8b" if setting in ("world", "world-gpu") else setting
    return PAPER.get(setting, {}).get(folder.name, ())

def markdown(head, rows):
    """A markdown table of strings, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def model_table(model, summary):
    """The table of one model, a row per set."""
    paper, rows = dict(zip(("math500", "aime24", "aime25"), paper_row(model))), []
    n = next(iter(summary.values()))["samples"]
    for name, figures in summary.items():
        k = max(figures["pass"], key=int)
        rows.append([name, str(figures["problems"]), percent(figures),
                     f"{100 * figures['pass'][k]:.1f}", f"{100 * figures['finished']:.1f}",
                     f"{figures['length']:.0f}", str(paper.get(name, "-"))])
    return markdown(["set", "problems", f"avg@{n} ± SE, %", f"pass@{k}, %", "finished, %",
                     "mean length", "paper, %"], rows)

def ancestry(folder):
    """{folder: record} of a run and all runs that it builds on, without base models (plain SFT).

    If a parent is not where it was, it is looked for beside the run: runs may be moved together.
    """
    record = read_record(folder)
    if not record or record["settings"].get("targets") == "data":
        return {}
    records = {str(Path(folder).resolve()): record}
    for parent in map(Path, record["parents"]):
        records |= ancestry(parent if parent.is_dir() else Path(folder).parent / parent.name)
    return records

def labels_used(folder):
    """Distinct labelled problems behind a model, its teacher's included."""
    return len(read_json_lines(Path(folder) / "labels.jsonl"))

def evaluated_runs(root):
    """{run folder: {set: figures}}, PAPER's routes first, in its order. UserError if none."""
    runs = {p.parent.parent: read_json(p)["sets"] for p in Path(root).glob("*/eval/summary.json")}
    check(runs, f"no evaluated run in {root} (no {root}/*/eval/summary.json)")
    order = {route: i for i, route in enumerate(PAPER["qwen3-8b"])}
    return {f: runs[f] for f in sorted(runs, key=lambda f: (order.get(f.name, 99), f.name))}

def runs_table(root):
    """The table of a folder's evaluated runs, a row each; written to table.md there, too.

    Labels and training seconds are those of all runs behind a model, its teacher's included, but
    without the base models. Raises UserError as `evaluated_runs` does.
    """
    runs, rows = evaluated_runs(root), []
    sets = list(dict.fromkeys(name for figures in runs.values() for name in figures))
    counts = {f["samples"] for figures in runs.values() for f in figures.values()}
    samples = counts.pop() if len(counts) == 1 else "n"
    for folder, figures in runs.items():
        chain = ancestry(folder).values()
        rows.append([folder.name, *(percent(figures[s]) if s in figures else "-" for s in sets),
                     str(labels_used(folder)), f"{sum(r.get('seconds', 0) for r in chain):.0f}",
                     " / ".join(map(str, paper_row(folder))) or "-"])
    head = ["route", *(f"{s}, avg@{samples} ± SE, %" for s in sets), "labels", "seconds"]
    table = markdown([*head, "paper, %: MATH / AIME24 / AIME25"], rows)
    (Path(root) / "table.md").write_text(table + "\n", encoding="utf-8")
    return table

def main(cfg):
    check(cfg.model or (cfg.regrade and cfg.out) or (cfg.table and not cfg.regrade),
          "--model is needed (or --table)")
    inside = Path(cfg.model) / "eval" if Path(cfg.model).is_dir() else Path("eval") / cfg.model
    out = Path(cfg.out or inside)
    if cfg.model or cfg.regrade:
        summary = regrade(cfg, out) if cfg.regrade else evaluate(cfg, out)
        print(model_table(cfg.model or out.parent, summary))
    if cfg.table:
        print(on_rank_0(runs_table, cfg.table))

if __name__ == "__main__":
    run_cli(main, Config, __doc__)
