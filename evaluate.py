"""Evaluation: avg@16 with its standard error, pass@k, and the tables of a whole recipe.

Each problem is answered `--samples` times at the policy's own temperature. Its score is the share of right
samples; a set's avg@n is the mean over problems, and +- is the standard error over problems (not over seeds).
pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k) from c right samples of n. A response that the limit
cut off counts as it stands: wrong unless its box was already closed.

Every problem becomes one line of OUT/<set>.jsonl with all its samples, so an interrupted evaluation goes on
where it was, and --regrade runs the verifier again on stored text, without the model. The random numbers of a
sample depend on (seed, prompt, sample index) only, not on batch size or order.

    python evaluate.py --model ckpt/bridge --data math500,aime24,aime25
    python evaluate.py --model runs/world/bridge --data runs/world/test.jsonl
    python evaluate.py --table runs/world            # every evaluated run below a folder, beside the paper
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common import (DATA_ALIASES, append_json_line, build_prompt, check, compared_settings, fingerprint, grade,
                    load_lm, progress, read_json_lines, read_record, read_rows, run_cli, sample, sig, to_problem,
                    write_json)


@dataclass
class Config:
    # --- what to evaluate
    model: str = ""  # model folder or hub name; needed unless --table
    data: str = "math500,aime24,aime25"  # sets, separated by commas: files, folders, hub names, aliases
    out: str = ""  # output folder; empty is MODEL/eval for a local model, else eval/MODEL
    table: str = ""  # only print the table of all runs in this folder (and write it to table.md there)
    regrade: bool = False  # only run the verifier again on the stored samples of --out (or MODEL/eval)
    # --- settings; the paper states avg@16 and no decoding settings
    samples: int = 16  # samples per problem (Section 4: avg@16)
    temperature: float = 1.0  # ours: the trained policy itself; 0 is greedy
    max_new_tokens: int = 16384  # response limit in tokens (Tables 9 and 10)
    thinking: bool = False  # ours: Qwen3's thinking mode
    seed: int = 0  # ours: of the sampling
    limit: int = 0  # ours: only the first so many problems of each set; 0 is all
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # ours: compute; auto is bf16 on CUDA, else fp32
    # --- memory and speed only: they change no result
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    sample_rows: int = 512  # rows decoded at once


# The paper's avg@16 in % on MATH-500, AIME 2024, AIME 2025 (Tables 2-6, 8), by teacher and route. The routes'
# names are the folders that run_all.sh writes.
PAPER = {
    "8b": {"cold-grpo": (75.9, 19.8, 17.1), "raw-bridge": (71.5, 15.0, 10.6), "sft-teacher-bridge": (76.9, 22.1, 17.6),
           "same-size-bridge": (76.5, 20.6, 17.1), "sft": (76.0, 22.4, 19.4), "opd-only": (77.6, 23.0, 18.9),
           "bridge": (79.3, 25.2, 20.2), "bridge-1h": (75.4,), "replay-1h": (75.7,), "fresh-2h": (78.5,),
           "sft-teacher-bridge-1h": (74.3,), "sft-teacher-replay-1h": (74.0,), "sft-teacher-fresh-2h": (77.2,),
           "opd-only-fresh-2h": (77.8,), "sft-fresh-2h": (77.3,), "teacher-rl": (88.4, 47.7, 36.7)},
    "14b": {"cold-grpo": (75.9, 19.8, 17.1), "raw-bridge": (72.8, 16.7, 13.5), "sft-teacher-bridge": (77.6, 23.2, 18.4),
            "same-size-bridge": (76.5, 20.6, 17.1), "sft": (76.5, 21.5, 17.0), "opd-only": (77.1, 22.8, 18.6),
            "bridge": (78.6, 24.6, 20.8), "bridge-1h": (76.3,), "replay-1h": (75.6,), "fresh-2h": (78.7,),
            "sft-teacher-bridge-1h": (75.8,), "sft-teacher-replay-1h": (75.6,), "sft-teacher-fresh-2h": (76.9,),
            "opd-only-fresh-2h": (77.5,), "sft-fresh-2h": (77.2,), "teacher-rl": (89.5, 47.1, 39.0)},
    "llama": {"cold-grpo": (59.8, 12.5, 7.2), "raw-bridge": (55.4, 8.8, 3.1), "bridge": (62.1, 14.9, 9.2)},
}


def pass_at_k(n, c, k):
    """Probability that k of n samples, c of them right, hold a right one.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarise(entries):
    """Figures of one set from its stored lines: shares in [0, 1], lengths in tokens."""
    right = [sum(v == "correct" for v in e["verdicts"]) for e in entries]
    n = len(entries[0]["verdicts"])
    scores = np.array(right) / n
    verdicts = [v for e in entries for v in e["verdicts"]]
    return {
        "problems": len(entries), "samples": n, "avg": float(scores.mean()),
        "se": float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None,
        "pass": {str(k): float(np.mean([pass_at_k(n, c, k) for c in right]))
                 for k in (1, 2, 4, 8, 16, 32, 64) if k <= n},
        "finished": float(np.mean([f for e in entries for f in e["finished"]])),
        "length": float(np.mean([x for e in entries for x in e["lengths"]])),
        "no_answer": verdicts.count("no_answer") / len(verdicts),
        "gave_up": verdicts.count("gave_up") / len(verdicts)}


def set_name(source):
    """File name of a set: an alias as it is, else the last part of the path or hub name."""
    return source if source in DATA_ALIASES else Path(source).stem.replace(":", "-")


def answer_set(cfg, lm, source, path):
    """Sample the problems of one set that `path` does not hold yet; returns all lines."""
    problems = [to_problem(row, source) for row in read_rows(source)]
    problems = problems[: cfg.limit or None]
    check(problems, f"data {source!r} holds no problem")
    done = read_json_lines(path)
    size = max(1, cfg.sample_rows // cfg.samples)
    bar = progress(total=len(problems), initial=len(done), desc=set_name(source), unit="problem")
    right = sum(v == "correct" for e in done for v in e["verdicts"])
    for i in range(len(done), len(problems), size):
        batch = problems[i : i + size]
        prompts = [build_prompt(lm.tokenizer, p.problem, cfg.thinking) for p in batch]
        rows = sample(lm, prompts, cfg.samples, max_new_tokens=cfg.max_new_tokens,
                      temperature=cfg.temperature, seed=(cfg.seed,), sample_rows=cfg.sample_rows)
        for j, p in enumerate(batch):
            group = rows[j * cfg.samples : (j + 1) * cfg.samples]
            responses = [lm.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in group]
            verdicts = [grade(text, p.answer) for text in responses]
            entry = {"problem": p.problem, "answer": p.answer, "verdicts": verdicts,
                     "lengths": [len(r.tokens) for r in group], "finished": [r.finished for r in group],
                     "responses": responses}
            append_json_line(path, entry)
            done.append(entry)
            right += verdicts.count("correct")
        bar.update(len(batch))
        bar.set_postfix(avg=f"{100 * right / (len(done) * cfg.samples):.1f} %", refresh=False)
    bar.close()
    return done


def regrade(path):
    """Replace the verdicts in a file of samples by the verifier's present ones; returns (lines, changed)."""
    entries, changed = read_json_lines(path), 0
    check(entries, f"no stored samples in {path}")
    for e in entries:
        verdicts = [grade(text, e["answer"]) for text in e["responses"]]
        changed += sum(a != b for a, b in zip(verdicts, e["verdicts"]))
        e["verdicts"] = verdicts
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
    temporary.replace(path)
    return entries, changed


def percent(figures):
    """avg ± se of a set in %, e.g. 47.2 ± 1.8"""
    se = f" ± {100 * figures['se']:.1f}" if figures["se"] is not None else ""
    return f"{100 * figures['avg']:.1f}{se}"


def paper_row(folder):
    """The paper's numbers for a run folder, by its name and its parent's: () when the paper has none."""
    folder = Path(folder).resolve()
    place = folder.parent.name.lower()
    return PAPER["llama" if "llama" in place else "14b" if "14b" in place else "8b"].get(folder.name, ())


def markdown(head, rows):
    """A markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_model_table(model, summary):
    paper = dict(zip(("math500", "aime24", "aime25"), paper_row(model)))
    rows = []
    for name, f in summary.items():
        k = max(map(int, f["pass"]))
        rows.append([name, str(f["problems"]), percent(f), f"{100 * f['pass'][str(k)]:.1f}",
                     f"{100 * f['finished']:.1f}", f"{f['length']:.0f}", f"{paper[name]}" if name in paper else "-"])
    n = next(iter(summary.values()))["samples"]
    head = ["set", "problems", f"avg@{n} ± SE, %", f"pass@{k}, %", "finished, %", "mean length", "paper, %"]
    return markdown(head, rows)


def ancestry(folder):
    """Records of a run and of every run it builds on, {folder: record}; base models (plain SFT) left out."""
    record = read_record(folder)
    if not record or record["settings"].get("targets") == "data":
        return {}
    found = {str(folder): record}
    for parent in record["parents"]:
        found |= ancestry(parent)
    return found


def labels_used(records):
    """Distinct labelled problems behind a run: per source the whole, or the sum of the halves used."""
    used = {key: n for record in records for key, n in record["labels"].items()}
    whole = {key.rsplit(":", 1)[0] for key in used if key.endswith(":all")}
    return sum(n for key, n in used.items() if key.endswith(":all") or key.rsplit(":", 1)[0] not in whole)


def runs_table(root):
    """Table of every evaluated run below `root`, in the order of the paper's routes, others first."""
    found = {p.parent.parent: json.loads(p.read_text())["sets"] for p in Path(root).glob("*/eval/summary.json")}
    check(found, f"no evaluated run below {root} (no */eval/summary.json)")
    order = list(PAPER["8b"])
    folders = sorted(found, key=lambda f: (order.index(f.name) if f.name in order else -1, f.name))
    sets = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = []
    for folder in folders:
        chain = ancestry(folder).values()
        paper = " / ".join(map(str, paper_row(folder))) or "-"
        rows.append([folder.name, *(percent(found[folder][s]) if s in found[folder] else "-" for s in sets),
                     str(labels_used(chain)), f"{sum(r.get('seconds', 0) for r in chain):.0f}", paper])
    n = next(iter(found[folders[0]].values()))["samples"]
    head = ["route", *(f"{s}, avg@{n} ± SE, %" for s in sets), "labels", "seconds", "paper: MATH / AIME24 / AIME25"]
    return markdown(head, rows)


def main(cfg):
    if cfg.table:
        table = runs_table(cfg.table)
        (Path(cfg.table) / "table.md").write_text(table + "\n")
        print(table)
        return
    check(cfg.model or (cfg.regrade and cfg.out), "--model is needed (or --table, or --regrade with --out)")
    out = Path(cfg.out or (Path(cfg.model) / "eval" if Path(cfg.model).is_dir() else Path("eval") / cfg.model))
    sources = {set_name(source): source for source in cfg.data.split(",")}
    record = {"model": cfg.model, "settings": compared_settings(cfg)}
    summary, started = {}, time.time()
    if cfg.regrade:
        stored = sorted(out.glob("*.jsonl"))
        check(stored, f"no stored samples in {out}")
        for path in stored:
            entries, changed = regrade(path)
            summary[path.stem] = summarise(entries)
            print(f"{path}: {changed} verdicts changed")
    else:
        lm = load_lm(cfg.model, device=cfg.device, dtype=cfg.dtype)
        out.mkdir(parents=True, exist_ok=True)
        # samples of another policy or setting must not be mixed in
        identity = {"fingerprint": fingerprint(lm), **{k: v for k, v in record["settings"].items()
                    if k in ("samples", "temperature", "max_new_tokens", "thinking", "seed", "dtype")}}
        old = read_record(out).get("identity", identity)
        differ = [f"{k} was {old.get(k)}, is now {v}" for k, v in identity.items() if old.get(k) != v]
        check(not differ, f"{out} holds samples of another model or setting ({'; '.join(differ)}); choose "
                          "another --out or delete it")
        write_json(out / "config.json", {"run": {**record, "identity": identity, "finished": True}})
        for name, source in sources.items():
            summary[name] = summarise(answer_set(cfg, lm, source, out / f"{name}.jsonl"))
    write_json(out / "summary.json", {"model": cfg.model, "sets": summary, "seconds": sig(time.time() - started)})
    print(one_model_table(cfg.model, summary))


if __name__ == "__main__":
    run_cli(main, Config, __doc__)
