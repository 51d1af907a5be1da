"""Rough weather: kills, signals, full disks, diverged losses, folders in use, foreign files.

A command line under fault runs in a forked child (see conftest.py), which dies as a real process
does. `-m soak` adds a longer run of real ones.
"""

import errno
import fcntl
import functools
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
from conftest import ROOT, STAGES, checkpoints, forked, metrics, nothing
from safetensors.torch import load_file, save_file

import common
import opd
from common import StageConfig, UserError

FLAGS = {"grpo": "--mini-batch 4 --kl-coef 0.01 --lr-schedule linear",
         "fkl_warmup": "--targets soft --warmup-steps 4 --sample-rows 12",  # three prompts at once
         "opd": "--prompts 4"}
STEPS = 7
OURS = {str(ROOT / f"{name}.py") for name in ("common", "evaluate", *STAGES)}
KILLED = -signal.SIGKILL

@pytest.fixture(scope="module")
def line_of(small_line):
    """line_of(stage, out, flags): seven steps, with a checkpoint after every second one."""
    return lambda stage, out, flags="": small_line(
        stage, out, f"--steps {STEPS} --save-every 2 {FLAGS[stage]} {flags}")

def rollouts(folder):
    """The lines of the teacher's cache, if there is one, by prompt, without seconds.

    They are written as prompts end, which those sampled beside them decide.
    """
    path = Path(folder) / "rollouts.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k != "seconds"}
            for row in sorted(rows, key=lambda row: row.get("prompt", []))]

def check_equal(a, b):
    """Finished runs: the same weights bit for bit, metrics, cached rollouts; nothing left over."""
    one, two = (load_file(Path(f) / "model.safetensors") for f in (a, b))
    assert set(one) == set(two) and all(torch.equal(one[n], two[n]) for n in one)
    assert metrics(a) == metrics(b) and [r["step"] for r in metrics(a)] == list(range(STEPS))
    assert rollouts(a) == rollouts(b)
    names = {p.name for p in Path(a).iterdir()}
    assert names == {p.name for p in Path(b).iterdir()}
    assert not [name for name in names if re.search("state|tmp|saving", name)]

def check_goes_on(line, out, whole, steps=0):
    """The same command continues after so many steps, and ends as a run in one piece."""
    got = forked(line)
    assert got.status == 0, got.err
    assert (f"continuing after {steps} steps" in got.out) == bool(steps)
    check_equal(out, whole.out)

def trace(counts, act=nothing):
    """Count the lines of our code that this process comes to; act("file:line", count) before it."""

    def lines(frame, event, _):
        if event == "line":
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            counts[place] += 1
            act(place, counts[place])
        return lines

    sys.settrace(lambda frame, *_: lines if frame.f_code.co_filename in OURS else None)

def traced(line, folder):
    """Run a command line; returns how often it came to each line of our code."""
    path, counts = folder / "counts.json", Counter()
    got = forked(line, lambda: trace(counts), lambda: path.write_text(json.dumps(counts)))
    assert got.status == 0, got.err
    return json.loads(path.read_text())

@pytest.fixture(scope="module")
def whole(line_of, tmp_path_factory):
    """whole(stage): an uninterrupted run: its folder, and how often it came to each line."""
    @functools.cache
    def run(stage):
        out = tmp_path_factory.mktemp(stage) / "out"
        return SimpleNamespace(counts=traced(line_of(stage, out), out.parent), out=out)

    return run

@pytest.fixture(scope="module")
def evaluation(world, tmp_path_factory):
    """line(out): twelve problems, three at once; and the file that it writes, uninterrupted."""
    def line(out):
        return (f"evaluate.py --model {world}/init-student --data {world}/test.jsonl --samples 4 "
                f"--max-new-tokens 8 --sample-rows 12 --out {out}")

    folder = tmp_path_factory.mktemp("evaluation")
    counts = traced(line(folder), folder)
    return SimpleNamespace(line=line, whole=(folder / "test.jsonl").read_bytes(), counts=counts)

# --- faults: functions that a child calls before its command line

def send(*numbers):
    """A function that sends this process these signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]

die = send(signal.SIGKILL)

def at_call(module, name, n, act):
    """A function that makes this process call act() before the n-th call of module.name."""

    def patch():
        real, count = getattr(module, name), itertools.count(1)

        def wrapper(*args, **kwargs):
            if next(count) == n:
                act()
            return real(*args, **kwargs)

        setattr(module, name, wrapper)

    return patch

def in_checkpoint(n, act):
    """A function that makes this process call act() when the n-th checkpoint is half written."""
    return at_call(common.dcp, "save", n, at_call(os, "fsync", 1, act))

def limit_files(size, then=signal.SIG_IGN):
    """A function after which no file of this process can outgrow `size` bytes, as on a full disk.

    then: SIG_IGN, the write fails; SIG_DFL, the kernel kills the process in the middle of it.
    """

    def act():
        signal.signal(signal.SIGXFSZ, then)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return act

def tear(n):
    """A function after which this process dies in the middle of the n-th line that it appends."""

    def patch():
        real, count = common.append_json_line, itertools.count(1)

        def half(path, value):
            if next(count) < n:
                return real(path, value)
            text = common.json_line(value)
            with Path(path).open("a") as file:
                file.write(text[: len(text) // 2])
            die()

        common.append_json_line = half

    return patch

def kill_at_random(rng, counts, saving):
    """A function after which this process dies before one of the lines that were counted; with
    `saving` before one of those that write the run folder."""
    source = (ROOT / "common.py").read_text().splitlines()
    first = next(n for n, text in enumerate(source) if "- 8 run folder" in text)
    place = rng.choice([p for p in sorted(counts) if not saving or (
        p.startswith("common.py:") and int(p.split(":")[1]) > first)])
    point = place, rng.randint(1, counts[place])
    return lambda: trace(Counter(), lambda *here: here == point and die())

# --- SIGKILL

@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_lines_is_bit_identical(stage, line_of, whole, tmp_path):
    """Three kills a stage before some line of our code, up to three in one run.

    Every other one falls into section 8, where checkpoints, metrics and models are written.
    """
    rng, kills, whole = random.Random(stage), 0, whole(stage)
    for i in itertools.count():
        line = line_of(stage, tmp_path / f"out{i}")
        for n in range(3):
            got = forked(line, kill_at_random(rng, whole.counts, saving=n % 2 == 1))
            if got.status == 0:  # a resumed run comes to fewer lines
                break
            assert got.status == KILLED, got.err
            kills += 1
        got = forked(line)
        assert got.status == 0, got.err
        check_equal(tmp_path / f"out{i}", whole.out)
        if kills >= 3:
            break

@pytest.mark.parametrize("stage, n, size", [("opd", 1, 200_000), ("fkl_warmup", 2, 900_000),
                                            ("grpo", 2, 900_000)])
def test_killed_inside_a_checkpoint_write_is_bit_identical(stage, n, size, line_of, whole,
                                                            tmp_path):
    """The kernel ends the process when its n-th checkpoint has grown to `size` bytes."""
    line, out = line_of(stage, tmp_path / "out"), tmp_path / "out"
    got = forked(line, at_call(common.dcp, "save", n, limit_files(size, signal.SIG_DFL)))
    assert got.status == -signal.SIGXFSZ, got.err
    torn = out / f"state-{2 * n:08d}.tmp"
    assert [p.stat().st_size for p in torn.iterdir()] == [size]
    assert checkpoints(out) == ["state-00000002"][: n - 1] + [torn.name]
    check_goes_on(line, out, whole(stage), steps=2 * n - 2)

@pytest.mark.parametrize("stage, n, steps", [("opd", 4, 2), ("grpo", 1, 0), ("fkl_warmup", 1, 0),
                                             ("fkl_warmup", 5, 0), ("fkl_warmup", 13, 2)])
def test_killed_inside_a_line_is_bit_identical(stage, n, steps, line_of, whole, tmp_path):
    """Of metrics.jsonl. The warmup first writes nine lines, the cache of the teacher's rollouts."""
    line = line_of(stage, tmp_path / "out")
    assert forked(line, tear(n)).status == KILLED
    check_goes_on(line, tmp_path / "out", whole(stage), steps)

@pytest.mark.parametrize("n, there", [(2, [2, 4]), (4, [6])])
def test_killed_before_old_checkpoints_are_deleted(n, there, line_of, whole, tmp_path):
    """With two the newer is used. With a finished model the same command deletes the last one."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    assert forked(line, at_call(common.Run, "delete_checkpoints", n, die)).status == KILLED
    assert checkpoints(out) == [f"state-{steps:08d}" for steps in there]
    check_goes_on(line, out, whole("opd"), steps=0 if n == 4 else 4)

def test_evaluation_killed_at_random_lines_gives_the_same_bytes(evaluation, tmp_path):
    """Up to four kills before some line of our code in each of two folders."""
    rng, kills = random.Random(0), 0
    for out in (tmp_path / "a", tmp_path / "b"):
        for n in range(4):
            got = forked(evaluation.line(out), kill_at_random(rng, evaluation.counts, n % 2 == 1))
            assert got.status in (0, KILLED), got.err
            kills += got.status != 0
        assert forked(evaluation.line(out)).status == 0
        assert (out / "test.jsonl").read_bytes() == evaluation.whole
    assert kills >= 4

@pytest.mark.parametrize("before, lines, status", [
    (at_call(common, "append_json_line", 7, send(signal.SIGTERM)), 6, 143),
    (at_call(common, "append_json_line", 7, send(signal.SIGINT)), 6, 130),
    (tear(8), 7, KILLED)])
def test_evaluation_loses_only_the_problems_in_flight(before, lines, status, evaluation, tmp_path):
    """Whole lines stay; the same command adds only what lacks, the same samples byte for byte."""
    path = tmp_path / "test.jsonl"
    got = forked(evaluation.line(tmp_path), before)
    assert got.status == status and "Traceback" not in got.err
    *kept, _ = path.read_bytes().split(b"\n")
    assert len(kept) == lines and set(kept) <= set(evaluation.whole.split(b"\n"))
    too_many = at_call(common, "append_json_line", 12 - lines + 1, die)
    assert forked(evaluation.line(tmp_path), too_many).status == 0
    assert path.read_bytes() == evaluation.whole

# --- SIGTERM and Ctrl-C

@pytest.mark.parametrize("stage, number, at, steps, every", [
    ("grpo", signal.SIGTERM, lambda act: at_call(common, "optimizer_step", 3, act), 2, 0),
    ("opd", signal.SIGINT, lambda act: at_call(common, "optimizer_step", 3, act), 3, 0),
    ("fkl_warmup", signal.SIGTERM, lambda act: in_checkpoint(1, act), 3, 2)])
def test_a_stop_signal_saves_the_step_and_says_how_to_go_on(stage, number, at, steps, every,
                                                             line_of, whole, tmp_path):
    """In an update, though --save-every is 0; or while a checkpoint is written."""
    line, out = line_of(stage, tmp_path / "out", f"--save-every {every}"), tmp_path / "out"
    got = forked(line, at(send(number)))
    assert got.status == 128 + number
    assert got.err.splitlines() == [
        "stopping after this step; the same signal again stops at once",
        f"stopped by {number.name} after {steps} steps, all saved; the same command goes on from "
        "what is saved"]
    assert checkpoints(out) == [f"state-{steps:08d}"] and len(metrics(out)) == steps
    check_goes_on(line, out, whole(stage), steps)

@pytest.mark.parametrize("at, steps", [
    (lambda act: at_call(common, "optimizer_step", 4, act), 2),
    (lambda act: in_checkpoint(2, act), 2)])
def test_a_second_signal_does_not_wait(at, steps, line_of, whole, tmp_path):
    """Ctrl-C twice ends an update or the write of a checkpoint at once, without a stack trace."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    got = forked(line, at(send(signal.SIGINT, signal.SIGINT)))
    assert got.status == 130
    assert re.fullmatch("stopping .*\nstopped by SIGINT; .* goes on .*", got.err), got.err
    assert checkpoints(out) == [f"state-{steps:08d}"]
    check_goes_on(line, out, whole("opd"), steps)

def test_a_signal_while_the_teacher_samples_keeps_its_rollouts(line_of, whole, tmp_path):
    """Before the first step there is nothing to wait for."""
    line = line_of("fkl_warmup", tmp_path / "out")
    got = forked(line, at_call(common, "append_json_line", 5, send(signal.SIGTERM)))
    assert got.status == 143 and got.err.startswith("stopped by SIGTERM; ")
    assert "3 prompts reused, 5 to sample" in forked(line).out
    check_equal(tmp_path / "out", whole("fkl_warmup").out)

# --- a loss or gradient that is not finite

POISONS = {"NaN gradient": lambda loss: loss * float("nan"),
           "infinite gradient": lambda loss: loss * 1e38 * 1e38,
           "infinite loss, finite gradient": lambda loss: loss + float("inf")}

def poison(updates, how):
    """A function that makes this process's losses how(loss) in these updates, counted from 0."""

    def patch():
        over_chunks, update, done = common.over_chunks, common.optimizer_step, []

        def spoiled(fn, *args, **constants):
            def worse(*args, **block):
                loss, logged = fn(*args, **block)
                return how(loss), logged

            return over_chunks(worse if len(done) in updates else fn, *args, **constants)

        common.over_chunks = spoiled
        common.optimizer_step = lambda *args: done.append(1) or update(*args)

    return patch

@pytest.mark.parametrize("how", POISONS)
def test_a_skipped_update_leaves_weights_optimizer_and_schedule(how, trainable_lm):
    """All states after it are those before it, bit for bit, and no gradient is left over."""
    lm, rows = trainable_lm, [common.Rollout([1, 2, 3], [4, 5, 6, 7], [], True)]
    cfg = opd.Config(lr_schedule="linear", lr=1e-3)
    optimizer = common.make_optimizer(lm, cfg)

    def step(change=lambda loss: loss):
        hidden, tokens = lm.states(rows)
        def loss(logp, y):
            return change(-logp.mean()), (y,)
        common.over_chunks(loss, lm, hidden, 1.0, 0, y=tokens)
        return common.optimizer_step(lm, optimizer, cfg, 10)

    def states():
        parts = [lm.model.state_dict(), optimizer.state_dict()["state"]]
        tensors = [t.clone() for part in parts for x in part.values()
                   for t in (x.values() if isinstance(x, dict) else [x])]
        return tensors, optimizer.state_dict()["param_groups"]

    assert 0 < step() < float("inf")
    before = states()
    assert not torch.tensor(step(POISONS[how])).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before[0], states()[0]))
    assert before[1:] == states()[1:]
    assert all(p.grad is None for p in lm.model.parameters())
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before[0], states()[0]))

@pytest.mark.parametrize("stage, updates, skipped", [  # GRPO has two updates a step
    ("grpo", {1, 2, 3, 4}, [1, 2, 1, 0, 0, 0, 0]),
    ("fkl_warmup", {1, 2, 3, 4}, [0, 1, 1, 1, 1, 0, 0]),
    ("grpo", {0, 1, *range(4, 99)}, [2, 0, 2, 2, 2, 2, 2]),
    ("opd", range(2, 99), [0, 0, 1, 1, 1, 1, 1])])
def test_skipped_updates_are_counted_and_five_in_a_row_end_the_run(stage, updates, skipped, line_of,
                                                                    tmp_path):
    """Each step has its line, with a warning; the end is one more line, and leaves no model."""
    how = POISONS["infinite loss, finite gradient"]
    got, out = forked(line_of(stage, tmp_path / "out"), poison(updates, how)), tmp_path / "out"
    assert [row["skipped"] for row in metrics(out)] == skipped
    all_skipped = [n == (2 if stage == "grpo" else 1) for n in skipped]
    assert [row["grad_norm"] is None for row in metrics(out)] == all_skipped
    assert len(re.findall("warning: step .* skipped", got.out + got.err)) == sum(map(bool, skipped))
    assert "Traceback" not in got.err
    if 98 in updates:
        last = "error: the last 5 steps had .* not finite.*--lr"
        assert got.status == 1 and re.search(last, got.err.splitlines()[-1])
        assert not (out / "model.safetensors").exists()
    else:
        assert got.status == 0, got.err
        assert all(t.isfinite().all() for t in load_file(out / "model.safetensors").values())

@pytest.mark.parametrize("stage, gap, ends", [("grpo", 0.003, True), ("opd", 0.003, True),
                                              ("opd", 0.0003, False)])
def test_a_sampler_gap_beyond_rounding_ends_the_run(stage, gap, ends, line_of, tmp_path):
    """Whatever is wrong, training must not go on with other log-probs than sampling saw."""
    def shift():
        decode = common.decode

        def shifted(lm, rows, *args):
            yield from decode(lm, rows, *args)
            for row in rows:
                row.rollout.logp[:] = [x - gap for x in row.rollout.logp]
        common.decode = shifted
        common.check_architecture = lambda *args, **kwargs: None  # it would find this one

    got = forked(line_of(stage, tmp_path / "out", "--steps 2"), shift)
    gaps = [row["sampler_gap"] for row in metrics(tmp_path / "out")]
    assert gaps[0] == pytest.approx(gap, rel=0.1) and (len(gaps) == 1) == ends
    assert (got.status == 1) == ends
    assert not ends or re.fullmatch("error: sampler_gap 0.003: .*, rounding .*", got.err), got.err

# --- a full disk

def no_space():
    raise OSError(errno.ENOSPC, "No space left")

def full_metrics():
    """The next line of metrics.jsonl can only be begun."""
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    limit_files((out / "metrics.jsonl").stat().st_size + 20)()

@pytest.mark.parametrize("fault, message, steps", [
    (at_call(common.dcp, "save", 2, limit_files(300_000)), "state-00000004, is the disk full", 2),
    (in_checkpoint(2, no_space), "state-00000004, is the disk full.*No space left", 2),
    (at_call(common, "append_json_line", 4, full_metrics), "metrics.jsonl: File too large", 2),
    (at_call(common, "save_lm", 1, limit_files(100_000)), "out: .*File too large", 6)])
def test_a_full_disk_spares_the_checkpoint(fault, message, steps, line_of, whole, tmp_path):
    """One line names the file, no half of a checkpoint keeps its room, and the run goes on."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    got = forked(line, fault)
    assert got.status == 1 and "Traceback" not in got.err
    assert re.fullmatch(f"error: cannot write .*{message}.*", got.err), got.err
    assert checkpoints(out) == [f"state-{steps:08d}"]
    check_goes_on(line, out, whole("opd"), steps)

# --- a folder in use

@pytest.mark.parametrize("what, name", [
    ("folder of a stage", "make_optimizer"), ("folder of evaluate.py", "sample_shared"),
    ("shared.jsonl", "sample_shared")])
def test_what_is_in_use_is_refused_until_its_process_is_gone(what, name, line_of, evaluation,
                                                             tmp_path):
    """An output folder, or the teacher's rollouts in a shared --cache; a SIGKILL frees both."""
    a, b, path = tmp_path / "a", tmp_path / "b", tmp_path / "a"
    lines = [line_of("opd", a)] * 2 if "stage" in what else [evaluation.line(a)] * 2
    if what == "shared.jsonl":
        path = tmp_path / what
        lines = [line_of("fkl_warmup", out, f"--cache {path}") for out in (a, b)]

    def meanwhile(pid):
        os.waitpid(pid, os.WUNTRACED)  # until it has stopped itself
        refused.append(forked(lines[1]))
        os.kill(pid, signal.SIGKILL)

    refused = []
    stop = at_call(common, name, 1, send(signal.SIGSTOP))
    assert forked(lines[0], stop, meanwhile=meanwhile).status == KILLED
    assert refused[0].status == 1 and refused[0].err == f"error: {path} is in use by another run"
    assert forked(lines[1]).status == 0

def test_a_file_system_without_locks_is_said_and_used(monkeypatch, tmp_path, capsys):
    """Clusters have such: a line instead of a refusal."""
    monkeypatch.setattr(fcntl, "flock", lambda *a: no_space())
    common.lock(tmp_path / ".lock", tmp_path).close()
    assert "cannot be locked (No space left)" in capsys.readouterr().out

# --- foreign and damaged files

@pytest.fixture(scope="module")
def broken_off(line_of, tmp_path_factory):
    """An OPD run killed in its sixth step, with a checkpoint after the fourth (copy it)."""
    out = tmp_path_factory.mktemp("broken-off") / "out"
    assert forked(line_of("opd", out), at_call(common, "optimizer_step", 6, die)).status == KILLED
    return out

def test_an_unfinished_run_is_no_model_and_its_later_lines_are_written_again(broken_off, line_of,
                                                                             whole, tmp_path):
    """metrics.jsonl may have steps that the checkpoint has not, and half a line."""
    with pytest.raises(UserError, match="unfinished"):
        common.load_lm(str(broken_off), StageConfig())
    out = shutil.copytree(broken_off, tmp_path / "out")
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "seconds": 9.0}) + '\n{"step": 6, "ent')
    check_goes_on(line_of("opd", out), out, whole("opd"), steps=4)

@pytest.mark.parametrize("which, name, other", [("--student", "weights", "init-student"),
                                                ("--teacher", "teacher_weights", "init-teacher")])
def test_a_checkpoint_of_another_model_is_refused(which, name, other, line_of, world, tmp_path):
    """Another model under the same name, of the same shape or another: one line names it."""
    copy, out = shutil.copytree(world / "init-student", tmp_path / "model"), tmp_path / "out"
    line = line_of("opd", out, f"{which} {copy}")
    assert forked(line, at_call(common, "optimizer_step", 4, die)).status == KILLED
    before = {p.name: p.read_bytes() for p in (out / "state-00000002").iterdir()}
    shutil.rmtree(copy)
    shutil.copytree(world / other, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({k: v * 1.5 for k, v in tensors.items()}, copy / "model.safetensors",
              metadata={"format": "pt"})
    got = forked(line)
    assert got.status == 1 and len(got.err.splitlines()) == 1, got.err
    assert re.search(rf"checkpoints of another model .*\({name} was '\w+', is now '\w+'\)", got.err)
    assert before == {p.name: p.read_bytes() for p in (out / "state-00000002").iterdir()}

@pytest.mark.parametrize("lost", [(), ("config.json", "metrics.jsonl")])
def test_a_checkpoint_of_other_settings_is_refused(lost, broken_off, line_of, tmp_path):
    """A checkpoint knows its settings, even where the run's other files are gone."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    for name in lost:
        (out / name).unlink()
    got = forked(line_of("opd", out, "--seed 3 --lr 1e-4"))
    assert got.status == 1 and len(got.err.splitlines()) == 1, got.err
    assert re.search("lr was 0.001, is now 0.0001; seed was 0, is now 3", got.err), got.err

# --- what a run was made from: data and code

CHANGES = {  # name: (what is done to the rows of the data file, whether the run is another one)
    "another answer": (
        lambda rows: [{**rows[0], "answer": "1", "response": "\\boxed{1}"}, *rows[1:]], True),
    "a row less": (lambda rows: rows[1:], True),
    "a row more": (lambda rows: [*rows, {**rows[0], "problem": "9a+9b?"}], True),
    "another question": (lambda rows: [*rows[1:], {**rows[0], "problem": "9a+9b?"}], True),
    "fields that nobody reads": (lambda rows: [{**row, "note": 1} for row in rows], False),
    "another order": (lambda rows: rows[::-1], "data"),  # plain SFT takes the rows as they stand
    "rows twice": (lambda rows: rows * 2, "data")}

@pytest.mark.parametrize("stage, flags", [("grpo", ""), ("opd", ""), ("fkl_warmup", ""),
                                          ("fkl_warmup", "--targets data --teacher ''")])
def test_a_changed_data_file_is_told(stage, flags, line_of, taught, tmp_path):
    """By a finished run, and by one that would go on; not if the problems are the same."""
    data, out = shutil.copy(taught.data, tmp_path / "data.jsonl"), tmp_path / "out"
    rows = [json.loads(x) for x in data.read_text().splitlines()]
    kind = f"--mini-batch 2 --prompts 2 {flags}" if stage == "grpo" else f"--prompts 2 {flags}"
    line = line_of(stage, out, f"--data {data} {kind} --steps 2 --save-every 1")
    for finished, names in ((False, list(CHANGES)[:1]), (True, CHANGES)):
        got = forked(line, nothing if finished else at_call(common, "optimizer_step", 2, die))
        assert got.status == (0 if finished else KILLED), got.err
        for name in names:
            change, other = CHANGES[name]
            data.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
            before, got = (out / "config.json").read_bytes(), forked(line)
            if other is True or other == "data" and "data" in flags:
                assert got.status == 1 and re.fullmatch(
                    f"error: {out} holds .*data_hash was '\\w+', is now '\\w+'.*", got.err), name
            else:
                assert got.status == 0 and "already finished" in got.out, (name, got.err)
            assert (out / "config.json").read_bytes() == before
        shutil.copy(taught.data, data)

def test_changed_scripts_are_told(line_of, whole, broken_off, monkeypatch, tmp_path):
    """With both revisions, by a finished run and by one that goes on. The hash is of the two
    scripts, so that changes count that are not committed."""
    now = common.describe_run(opd.Config(), {})["git"]
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(common, "__file__", str(tmp_path / "common.py"))
        assert common.describe_run(opd.Config(), {})["git"].split()[1] != now.split()[1]
    old = "0123456789ab 0123456789ab"
    done = whole("opd").out
    for name, made, was, told in (("a", done, now, False), ("b", broken_off, now, False),
                                  ("c", done, old, True), ("d", broken_off, old, True)):
        out = shutil.copytree(made, tmp_path / name)
        config = json.loads((out / "config.json").read_text())
        config["run"]["git"] = was
        (out / "config.json").write_text(json.dumps(config))
        got = forked(line_of("opd", out))
        assert got.status == 0 and (made == broken_off) != ("already finished" in got.out), got.err
        assert (f"warning: the code that began this folder was {was}, is now {now}"
                in got.out) == told
        assert common.read_record(out)["git"] == (was if made == done else now)

@pytest.mark.parametrize("bad", [b'{"prompt": [1, 2\n', b'{"problem": "\xff"}\n'])
@pytest.mark.parametrize("stage", ["fkl_warmup", "evaluate"])
def test_a_damaged_line_of_the_cache_or_the_samples_is_one_line(bad, stage, whole, line_of,
                                                                evaluation, tmp_path):
    """In the middle of a file: the message has the file's name, and nothing is changed."""
    path = tmp_path / ("rollouts.jsonl" if stage in STAGES else "test.jsonl")
    good = (whole(stage).out / path.name).read_bytes() if stage in STAGES else evaluation.whole
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
    before = path.read_bytes()
    got = forked(line_of(stage, tmp_path) if stage in STAGES else evaluation.line(tmp_path))
    assert got.status == 1 and len(got.err.splitlines()) == 1, got.err
    assert f"error: {path} is damaged" in got.err and path.read_bytes() == before

def test_a_damaged_record_is_one_line(broken_off, line_of, tmp_path):
    """config.json of the output folder, or of a model's."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    (out / "config.json").write_text('{"run": {')
    for line in (line_of("opd", out), line_of("opd", tmp_path / "new", f"--student {out}")):
        got = forked(line)
        assert got.status == 1 and len(got.err.splitlines()) == 1
        assert f"{out}/config.json is damaged" in got.err

def test_weights_that_are_not_all_there_are_refused(world, tmp_path):
    """transformers would fill the gap with random numbers, and say so only in a log."""
    folder = shutil.copytree(world / "init-student", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(tensors)[3]
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors missing, NaN or inf, e.g. {gone}"):
        common.load_lm(str(folder), StageConfig())

def test_a_model_without_pad_token_trains(world, line_of, whole, tmp_path):
    """The rule: no script needs one, because lengths decide what is padding.

    Compared is what needs no gradient: torch gives an embedding none where its id is the pad
    token's, and this student of noise samples that one, too.
    """
    folder = shutil.copytree(world / "init-student", tmp_path / "model")
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((folder / name).read_text())
        settings = {k: v for k, v in settings.items() if not k.startswith("pad_token")}
        (folder / name).write_text(json.dumps(settings))
    assert common.describe_lm(str(folder)).tokenizer.pad_token is None
    got = forked(line_of("opd", tmp_path / "out", f"--student {folder}"))
    assert got.status == 0, got.err
    one, two = ({**metrics(out)[0], "grad_norm": 0} for out in (tmp_path / "out", whole("opd").out))
    assert one == two

# --- the long run: real processes, killed by the clock

@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_soak(stage, line_of, tmp_path, monkeypatch):
    """Ten signals a stage at random times, one in four a SIGTERM: bit-identical in the end."""
    steps, rng, ends, i = 60, random.Random(stage), Counter(), 0
    monkeypatch.setitem(globals(), "STEPS", steps)

    def run(name, seconds=None, number=signal.SIGKILL):
        line = line_of(stage, tmp_path / name, f"--steps {steps} --save-every 3 --rollouts 8")
        began = time.time()
        process = subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        ends[process.wait()] += 1
        assert process.returncode in (0, KILLED, -signal.SIGTERM, 143)
        return time.time() - began if process.returncode == 0 else 0

    longest = run("whole")
    while (sent := ends.total() - ends[0]) < 10 or ends[0] < 2:  # 0: runs that came to their end
        number = signal.SIGTERM if sent % 4 == 3 else signal.SIGKILL
        if run(f"out{i}", rng.uniform(0.1, 0.9) * longest, number):
            check_equal(tmp_path / f"out{i}", tmp_path / "whole")
            i += 1
