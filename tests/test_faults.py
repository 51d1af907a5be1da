"""Rough weather: kills, signals, full disks, damaged files, diverged losses, folders in use.

A stage under fault runs in a forked child, which has this process's imports already (a fresh
interpreter needs seconds for them) and dies as a real process does. `-m soak` adds a longer run
with real command lines.
"""

import errno
import fcntl
import importlib
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import common
import evaluate
import fkl_warmup
import grpo
import opd
from common import UserError

STAGES = {"grpo": grpo, "fkl_warmup": fkl_warmup, "opd": opd}
FLAGS = {"grpo": "--mini-batch 4 --kl-coef 0.01 --lr-schedule linear",
         "fkl_warmup": "--targets soft --warmup-steps 4", "opd": ""}
STEPS = 7
TIMING = re.compile("seconds.*|tokens_per_second")
BAR = re.compile(r"\d+%\||^\S+: 0\S+ \[")  # a line of a progress bar
OURS = {str(ROOT / f"{name}.py") for name in ("common", "evaluate", *STAGES)}


def nothing(*args):
    pass


def forked(line, before=nothing, after=nothing, meanwhile=nothing):
    """Run a command line in a child, before() and after() around it; returns status, out, err.

    The status is as subprocess has it: negative for a signal. meanwhile(pid) runs in this process.
    """
    script, *words = shlex.split(line)
    outputs = [os.memfd_create(name) for name in ("out", "err")]
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in outputs)
            sys.argv = [script, *words]
            module = importlib.import_module(script.removesuffix(".py"))
            before()
            common.run_cli(module.main, module.Config, module.__doc__)
            status = 0
        except SystemExit as end:
            status = 1 if isinstance(end.code, str) else end.code or 0
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        except BaseException as error:  # what would be a stack trace
            print(f"Traceback {error!r}", file=sys.stderr)
        finally:
            sys.settrace(None)
            after()
            os._exit(status)
    meanwhile(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for fd in outputs:
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(fd, encoding="utf-8") as file:
            texts.append(file.read())
    err = [x for x in re.split(r"[\r\n]+", texts[1]) if x and not BAR.search(x)]
    return SimpleNamespace(status=status, out=texts[0], err="\n".join(err))


def metrics(folder):
    """The lines of metrics.jsonl without what the clock decides."""
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not TIMING.fullmatch(k)} for row in rows]


def rollouts(folder):
    """The lines of the teacher's cache, if there is one, without seconds."""
    path = Path(folder) / "rollouts.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def check_equal(a, b):
    """Finished runs: the same weights bit for bit, metrics, cached rollouts; nothing left over."""
    one, two = (load_file(Path(f) / "model.safetensors") for f in (a, b))
    assert set(one) == set(two) and all(torch.equal(one[n], two[n]) for n in one)
    assert metrics(a) == metrics(b) and [r["step"] for r in metrics(a)] == list(range(STEPS))
    assert rollouts(a) == rollouts(b)
    names = {p.name for p in Path(a).iterdir() if not p.name.endswith(".json.tmp")}
    assert names == {p.name for p in Path(b).iterdir()}
    assert not [n for n in names if n.startswith("state")]


@pytest.fixture(scope="module")
def line_of(world, taught):
    """line_of(stage, out, flags): a command line with small settings."""

    def line(stage, out, flags="--save-every 2"):
        models = (f"--model {taught.model}" if stage == "grpo"
                  else f"--teacher {taught.model} --student {world}/init-student")
        return (f"{stage}.py {models} --data {taught.data} --exclude none --out {out} --show-every "
                f"0 --max-new-tokens 12 --rollouts 4 --lr 1e-3 --steps {STEPS} --sample-rows 12 "
                f"{FLAGS[stage]} {flags}")

    return line


def trace(counts, act=nothing):
    """Count the lines of our code that this process comes to; act("file:line", count) before it."""

    def lines(frame, event, _):
        if event == "line":
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            counts[place] += 1
            act(place, counts[place])
        return lines

    sys.settrace(lambda frame, *_: lines if frame.f_code.co_filename in OURS else None)


@pytest.fixture(scope="module")
def whole(line_of, tmp_path_factory):
    """whole(stage): an uninterrupted run: its folder, and how often it came to each line of code."""
    done = {}

    def run(stage):
        if stage not in done:
            folder, counts = tmp_path_factory.mktemp(stage), Counter()
            got = forked(line_of(stage, folder / "out"), lambda: trace(counts),
                         lambda: (folder / "counts.json").write_text(json.dumps(counts)))
            assert got.status == 0, got.err
            counts = json.loads((folder / "counts.json").read_text())
            done[stage] = SimpleNamespace(out=folder / "out", counts=counts)
        return done[stage]

    return run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --- SIGKILL


def random_point(rng, counts, saving):
    """A line that was run, of those that write the run folder if `saving`, and one of its times."""
    source = (ROOT / "common.py").read_text().splitlines()
    first = source.index("# 8 run folder: settings, metrics, resume, progress")
    places = [p for p in sorted(counts) if not saving or (
        p.startswith("common.py:") and int(p.split(":")[1]) > first)]
    place = rng.choice(places)
    return place, rng.randint(1, counts[place])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_lines_is_bit_identical(stage, line_of, whole, tmp_path):
    """Three runs a stage, each killed up to four times before some line of our code.

    Every other kill falls into section 8, where checkpoints, metrics and models are written.
    """
    rng, kills = random.Random(stage), []
    for i in range(3):
        line = line_of(stage, tmp_path / f"out{i}")
        for n in range(4):
            point = random_point(rng, whole(stage).counts, saving=n % 2 == 1)
            got = forked(line, lambda: trace(Counter(), lambda *here: here == point and die()))
            if got.status != -signal.SIGKILL:  # a resumed run comes to fewer lines
                break
            kills.append(point)
        got = forked(line)
        assert got.status == 0, got.err
        check_equal(tmp_path / f"out{i}", whole(stage).out)
    assert len(kills) >= 7, kills
