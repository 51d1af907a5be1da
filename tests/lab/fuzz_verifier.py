r"""Fuzzes the verifier, and times it.

    python tests/lab/fuzz_verifier.py --n 200000 --seed 0    # a minute or two on one core

A violation is an exception, a call of more than a second, a touched file, a changed environment, a
new thread, a started process, a call of eval, exec and their kin, or more processor time in all
than --budget; then the exit status is 1. Other work on the machine does not change these times.
"""
import argparse
import builtins
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from common import _equal, answers_equal, extract_answer, grade
from test_verifier import GOLDS, HOSTILE, INJECTIONS, RESPONSES, RIGHT, WRONG

SEEDS = [gold.strip() for gold in GOLDS] + [case[1] for case in RIGHT + WRONG + RESPONSES]
ATOMS = [
    *"0123456789abefinxyz+-*/^_=<>()[]{}|!,.;:'\"&$%~\\ ", *"−×·√π²½∞∪∈≤≥≠±°∅θ′，٣Ⅷﬃ①", "\x00",
    "\n", "\u200b", "\u202e", "\ud800", "\\frac", "\\sqrt", "\\boxed{", "\\text{", "\\left(",
    "\\right)",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\pm", "\\{", "\\}", "\\cup", "\\in", "\\infty",
    "\\pi", "\\sin", "\\log_", "^{", "_{", "\\binom", "\\lfloor", "\\rfloor", "\\overline{", "!",
    "10^", "99999", "e9", "1,000", "1e9999", " and ", " or ", "Answer:", "</think>", "<think>",
    "x_1"]
GROW = [
    "{0}^{{{0}}}", "({0})!", "\\sqrt{{{0}}}", "\\frac{{{0}}}{{{0}}}", "({0})({0})", "{0}+{0}",
    "|{0}|", "\\{{{0},{0}\\}}", "-{0}", "\\left({0}\\right)^{{99}}", "\\sin({0})", "\\pm {0}",
    "{0},{0}", "\\boxed{{{0}}}", "\\text{{{0}}}", "e^{{{0}}}", "\\log {0}",
]

def text_of(rng):
    """One hostile or nearly sensible text."""
    kind = rng.random()
    text = rng.choice(SEEDS)
    if kind < 0.55:  # mutations of golds: insert, delete, copy, swap
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            text = rng.choice((text[:i] + rng.choice(ATOMS) + text[i:], text[:i] + text[j:],
                               text[:j] + text[i:], text[:i] + rng.choice(SEEDS) + text[j:]))[:3000]
    elif kind < 0.8:  # random LaTeX
        text = "".join(rng.choices(ATOMS, k=rng.choice((1, 3, 8, 20, 60, 300))))
    elif kind < 0.96:  # towers, nesting, doubling
        for _ in range(rng.choice((1, 2, 3, 5, 9))):
            text = rng.choice(GROW).format(text if len(text) < 4000 else "9")
    elif kind < 0.9985:
        text = rng.choice(HOSTILE + INJECTIONS)[:5000]
    else:  # up to a megabyte
        text = rng.choice(HOSTILE + ATOMS + SEEDS) or "0"
        text = (text * (rng.choice((50_000, 1_000_000)) // len(text) + 1))[:1_000_000]
    return text

def traps(violations):
    """Makes everything that could run code or leave the process report itself."""
    def trap(name):
        def report(*args, **kwargs):
            violations.append(f"called {name}{args!r:.80}")
        return report

    for owner, names in ((os, ("system", "popen", "fork", "remove", "putenv")),
                         (subprocess, ("Popen", "run")),
                         (builtins, ("eval", "exec", "open", "input", "compile"))):
        for name in names:
            setattr(owner, name, trap(name))

def fuzz(n, seed, budget):
    rng, violations, seconds, verdicts, slowest = random.Random(seed), [], [], {}, (0, "")
    grade(r"\boxed{\sin \pi}", "1")  # imports first, then the traps
    originals = [(owner, dict(vars(owner))) for owner in (os, subprocess, builtins)]
    before = dict(os.environ), threading.active_count(), sorted(os.listdir())
    traps(violations)
    begin = time.process_time()
    for _ in range(n):
        text, gold = text_of(rng), rng.choice(SEEDS)
        form = rng.randrange(6)
        response = (rf"\boxed{{{text}}}", f"Answer: {text}", text, rf"\boxed{{{text}}}",
                    rf"\boxed{{{gold}}}", "")[form]
        _equal.cache_clear()
        start = time.process_time()
        try:
            if form == 5:
                verdict = f"answers_equal {answers_equal(text, gold)}"
            else:
                verdict = grade(response, text if form in (3, 4) else gold)
                kinds = ("correct", "wrong", "no_answer", "gave_up")
                if grade(response, text) not in kinds or extract_answer(response) == "":
                    violations.append(f"not a verdict: {response!r:.80}")
            took = (time.process_time() - start) / (1 if form == 5 else 2)
        except BaseException as error:  # the point of the exercise
            violations.append(f"{error!r:.60} on {response!r:.80}")
            continue
        seconds.append(took)
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        shown = response or text
        slowest = max(slowest, (took, f"{shown[:50]!r}... ({len(shown)} characters)"))
        if took > 1:
            violations.append(f"{took:.2f} s on {response!r:.80}")
    for owner, names in originals:
        vars(owner).update(names)
    if before != (dict(os.environ), threading.active_count(), sorted(os.listdir())):
        violations.append("the environment, the threads or the folder have changed")
    total = time.process_time() - begin
    if total > budget:
        violations.append(f"{total:.0f} s of processor time, the budget is {budget:.0f} s")
    print(f"{n} texts, seed {seed}, {total:.0f} s of a budget of {budget:.0f} s: {verdicts}")
    p99 = sorted(seconds)[len(seconds) * 99 // 100]
    print(f"median {statistics.median(seconds) * 1e3:.3f} ms, p99 {p99 * 1e3:.2f} ms, slowest "
          f"{slowest[0] * 1e3:.1f} ms: {slowest[1]}")
    print(f"violations: {len(violations)}", *violations[:20], sep="\n  ")
    return bool(violations)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=300,
                        help="seconds of processor time; a longer run fails (default 300)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a canary: the folder must stay empty
        failed = fuzz(arguments.n, arguments.seed, arguments.budget)
        os.chdir("/")
    sys.exit(failed)
