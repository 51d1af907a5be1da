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
            torch.set_num_threads(1)  # makes torch's pool again, before threads race to do it
            for fd, memory in enumerate(outputs, 1):
                os.dup2(memory, fd)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1) for fd in (1, 2))
            sys.argv = [script, *words]
            module = importlib.import_module(script.removesuffix(".py"))
            before()
            common.run_cli(module.main, module.Config, module.__doc__)
            status = 0
        except SystemExit as end:
            status = 1 if isinstance(end.code, str) else end.code or 0
            print("\n" + str(end.code if status == 1 else ""), file=sys.stderr)
        except BaseException as error:  # what would be a stack trace
            print(f"Traceback {error!r}", file=sys.stderr)
        finally:
            sys.settrace(None)
            after()
            os._exit(status)
    try:
        meanwhile(pid)
    except BaseException:  # leave no child behind that has stopped itself
        os.kill(pid, signal.SIGKILL)
        raise
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for fd in outputs:
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(fd, encoding="utf-8") as file:
            texts.append(file.read())
    err = [x for x in re.split(r"[\r\n]+", texts[1]) if x.strip() and not BAR.search(x)]
    return SimpleNamespace(status=status, out=texts[0], err="\n".join(err))


def metrics(folder):
    """The lines of metrics.jsonl without what the clock decides."""
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not TIMING.fullmatch(k)} for row in rows]


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
    """whole(stage): an uninterrupted run: its folder, and how often it came to each line."""
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


def limit_files(size, then=signal.SIG_IGN):
    """A function after which no file of this process can outgrow `size` bytes, as on a full disk.

    then: SIG_IGN, the write fails; SIG_DFL, the kernel kills the process in the middle of it.
    """

    def act():
        signal.signal(signal.SIGXFSZ, then)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return act


def checkpoints(folder):
    return sorted(p.name for p in Path(folder).glob("state*"))


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
    """Nine kills a stage before some line of our code, up to four in one run.

    Every other one falls into section 8, where checkpoints, metrics and models are written.
    """
    rng, kills = random.Random(stage), 0
    for i in itertools.count():
        line = line_of(stage, tmp_path / f"out{i}")
        for n in range(4):
            point = random_point(rng, whole(stage).counts, saving=n % 2 == 1)
            got = forked(line, lambda: trace(Counter(), lambda *here: here == point and die()))
            if got.status == 0:  # a resumed run comes to fewer lines
                break
            assert got.status == -signal.SIGKILL, got.err
            kills += 1
        got = forked(line)
        assert got.status == 0, got.err
        check_equal(tmp_path / f"out{i}", whole(stage).out)
        if kills >= 9:
            break


@pytest.mark.parametrize("save, size", [(1, 200_000), (2, 900_000)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_inside_a_checkpoint_write_is_bit_identical(stage, save, size, line_of, whole,
                                                            tmp_path):
    """The kernel ends the process when its checkpoint has grown to `size` bytes."""
    line, out = line_of(stage, tmp_path / "out"), tmp_path / "out"
    got = forked(line, at_call(torch, "save", save, limit_files(size, signal.SIG_DFL)))
    assert got.status == -signal.SIGXFSZ, got.err
    assert (out / "state.tmp").stat().st_size == size
    assert checkpoints(out) == ["state-00000002.pt"][: save - 1] + ["state.tmp"]
    got = forked(line)
    assert ("continuing after 2 steps" in got.out) == (save == 2)
    check_equal(out, whole(stage).out)


def tear(module, n):
    """A function after which this process dies in the middle of the n-th line that it appends."""

    def patch():
        real, count = module.append_json_line, itertools.count(1)

        def half(path, value):
            if next(count) < n:
                return real(path, value)
            text = common.json_line(value)
            with Path(path).open("a") as file:
                file.write(text[: len(text) // 2])
            die()

        module.append_json_line = half

    return patch


@pytest.mark.parametrize("stage, module, n", [
    ("opd", common, 4), ("grpo", common, 1), ("fkl_warmup", fkl_warmup, 1),
    ("fkl_warmup", fkl_warmup, 5)])
def test_killed_inside_a_line_is_bit_identical(stage, module, n, line_of, whole, tmp_path):
    """Of metrics.jsonl, and of the cache of the teacher's rollouts (its first line and a later)."""
    line = line_of(stage, tmp_path / "out")
    assert forked(line, tear(module, n)).status == -signal.SIGKILL
    got = forked(line)
    assert got.status == 0, got.err
    if (module, n) == (fkl_warmup, 5):  # a first line and three prompts were whole
        assert "3 prompts reused, 5 to sample" in got.out
    check_equal(tmp_path / "out", whole(stage).out)


def test_killed_before_the_checkpoints_are_deleted(line_of, whole, tmp_path):
    """The model is there and they are, too: the same command says "finished" and deletes them."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    assert forked(line, at_call(common.Run, "drop_checkpoints", 1, die)).status == -9
    assert len(checkpoints(out)) == 2
    assert "already finished" in forked(line).out
    check_equal(out, whole("opd").out)


def test_the_last_two_checkpoints_are_kept(line_of, tmp_path):
    """Of four that were written; and none after the end (check_equal looks)."""
    line = line_of("opd", tmp_path / "out", "--save-every 1")
    assert forked(line, at_call(opd, "optimizer_step", 5, die)).status == -signal.SIGKILL
    assert checkpoints(tmp_path / "out") == ["state-00000003.pt", "state-00000004.pt"]


# --- SIGTERM and Ctrl-C


@pytest.mark.parametrize("stage, number", [("grpo", signal.SIGTERM), ("opd", signal.SIGINT),
                                           ("fkl_warmup", signal.SIGTERM)])
def test_a_stop_signal_saves_the_step_and_says_how_to_go_on(stage, number, line_of, whole,
                                                             tmp_path):
    """In the third update (GRPO: the first of its second step), though --save-every is 0."""
    line, out = line_of(stage, tmp_path / "out", "--save-every 0"), tmp_path / "out"
    steps = 2 if stage == "grpo" else 3
    got = forked(line, at_call(STAGES[stage], "optimizer_step", 3, send(number)))
    assert got.status == 128 + number
    assert got.err.splitlines() == [
        "stopping after this step; the same signal again stops at once",
        f"stopped by {number.name} after {steps} steps, all saved; the same command goes on from "
        "what is saved"]
    assert checkpoints(out) == [f"state-{steps:08d}.pt"] and len(metrics(out)) == steps
    assert f"continuing after {steps} steps" in forked(line).out
    check_equal(out, whole(stage).out)


def test_a_second_signal_does_not_wait_for_the_step(line_of, tmp_path):
    """Ctrl-C twice ends at once, with nothing saved and no stack trace."""
    line = line_of("opd", tmp_path / "out")
    got = forked(line, at_call(opd, "optimizer_step", 1, send(signal.SIGINT, signal.SIGINT)))
    assert got.status == 130
    assert re.fullmatch("stopping .*\nstopped by SIGINT; .* goes on .*", got.err), got.err
    assert checkpoints(tmp_path / "out") == []


def test_a_signal_while_the_teacher_samples_keeps_its_rollouts(line_of, whole, tmp_path):
    """Before the first step there is nothing to wait for."""
    line = line_of("fkl_warmup", tmp_path / "out")
    got = forked(line, at_call(fkl_warmup, "append_json_line", 5, send(signal.SIGTERM)))
    assert got.status == 143 and got.err.startswith("stopped by SIGTERM; ")
    assert "3 prompts reused, 5 to sample" in forked(line).out
    check_equal(tmp_path / "out", whole("fkl_warmup").out)


# --- evaluate.py


@pytest.fixture(scope="module")
def evaluation(world, tmp_path_factory):
    """line(out): twelve problems, three at once; and the file that it writes, uninterrupted."""
    def line(out):
        return (f"evaluate.py --model {world}/init-student --data {world}/test.jsonl --samples 4 "
                f"--max-new-tokens 8 --sample-rows 12 --out {out}")

    folder, counts = tmp_path_factory.mktemp("evaluation"), Counter()
    got = forked(line(folder), lambda: trace(counts),
                 lambda: (folder / "counts").write_text(json.dumps(counts)))
    assert got.status == 0, got.err
    return SimpleNamespace(line=line, whole=(folder / "test.jsonl").read_bytes(),
                           counts=json.loads((folder / "counts").read_text()))


@pytest.mark.parametrize("before, lines, status", [
    (at_call(evaluate, "append_json_line", 7, die), 6, -9),
    (at_call(evaluate, "append_json_line", 7, send(signal.SIGTERM)), 6, 143),
    (at_call(evaluate, "append_json_line", 7, send(signal.SIGINT)), 6, 130),
    (tear(evaluate, 8), 7, -9)])
def test_evaluation_loses_only_the_problems_in_flight(before, lines, status, evaluation, tmp_path):
    """Whole lines stay as they are; the same command adds the same samples, byte for byte."""
    path = tmp_path / "test.jsonl"
    got = forked(evaluation.line(tmp_path), before)
    assert got.status == status and "Traceback" not in got.err
    kept = path.read_bytes()
    assert kept.count(b"\n") == lines
    assert set(kept.split(b"\n")[:6]) <= set(evaluation.whole.split(b"\n"))
    got = forked(evaluation.line(tmp_path))
    assert got.status == 0, got.err
    assert path.read_bytes() == evaluation.whole


def test_evaluation_killed_at_random_lines_gives_the_same_bytes(evaluation, tmp_path):
    """Four kills before some line of our code, one after another in the same folder."""
    rng, kills = random.Random(0), 0
    for n in range(8):
        point = random_point(rng, evaluation.counts, saving=n % 2 == 1)
        got = forked(evaluation.line(tmp_path / f"out{n // 4}"),
                     lambda: trace(Counter(), lambda *here: here == point and die()))
        assert got.status in (0, -signal.SIGKILL), got.err
        kills += got.status != 0
    for n in range(2):
        assert forked(evaluation.line(tmp_path / f"out{n}")).status == 0
        assert (tmp_path / f"out{n}" / "test.jsonl").read_bytes() == evaluation.whole
    assert kills >= 4


# --- a loss or gradient that is not finite


def poison(module, updates, how):
    """A function that makes this process's losses how(loss) in these updates, counted from 0."""

    def patch():
        done, backward, update = itertools.count(), common.backward, module.optimizer_step
        now = [next(done)]
        common.backward = lambda loss: backward(how(loss) if now[0] in updates else loss)

        def counted(*args):
            now[0] = next(done)
            return update(*args)

        module.optimizer_step = counted

    return patch


POISONS = {"NaN gradient": lambda loss: loss * float("nan"),
           "infinite gradient": lambda loss: loss * 1e38 * 1e38,
           "infinite loss, finite gradient": lambda loss: loss + float("inf")}


@pytest.mark.parametrize("how", POISONS)
def test_a_skipped_update_leaves_weights_optimizer_and_schedule(how, trainable_lm):
    """All states after it are those before it, bit for bit, and no gradient is left over."""
    cfg = opd.Config(lr_schedule="linear", lr=1e-3, out="")
    lm, ids = trainable_lm, torch.arange(1, 9)[None]
    optimizer, scheduler = common.make_optimizer(lm, cfg, 10)

    def step(change):
        common.backward(change(lm.model(ids, labels=ids).loss))
        return common.optimizer_step(lm, optimizer, scheduler, 1.0)

    def states():
        parts = [lm.model.state_dict(), optimizer.state_dict()["state"]]
        tensors = [t.clone() for part in parts for x in part.values()
                   for t in (x.values() if isinstance(x, dict) else [x])]
        return tensors, optimizer.state_dict()["param_groups"], dict(scheduler.state_dict())

    assert 0 < step(lambda loss: loss) < float("inf")
    before = states()
    assert not torch.tensor(step(POISONS[how])).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before[0], states()[0]))
    assert before[1:] == states()[1:]
    assert all(p.grad is None for p in lm.model.parameters())
    step(lambda loss: loss)
    assert not all(torch.equal(a, b) for a, b in zip(before[0], states()[0]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_update_is_counted_and_the_run_goes_on(stage, line_of, tmp_path):
    """Updates 1 to 4 (GRPO has two a step): in the lines of their steps, with warnings; no end."""
    got = forked(line_of(stage, tmp_path / "out"),
                 poison(STAGES[stage], (1, 2, 3, 4), POISONS["infinite loss, finite gradient"]))
    assert got.status == 0, got.err
    rows = metrics(tmp_path / "out")
    want = [1, 2, 1, 0, 0, 0, 0] if stage == "grpo" else [0, 1, 1, 1, 1, 0, 0]
    assert [row["skipped"] for row in rows] == want
    all_skipped = [n == 2 or (stage != "grpo" and n == 1) for n in want]
    assert [row["grad_norm"] is None for row in rows] == all_skipped
    assert len(re.findall("warning: step .* skipped", got.out + got.err)) == sum(map(bool, want))
    assert all(t.isfinite().all() for t in load_file(tmp_path / "out/model.safetensors").values())


@pytest.mark.parametrize("stage", STAGES)
def test_five_skipped_updates_in_a_row_end_the_run(stage, line_of, tmp_path):
    """The line of the last step is in metrics.jsonl. One line on the screen, and no model."""
    bad = {0, 1} | set(range(6, 99)) if stage == "grpo" else set(range(2, 99))
    spoil = poison(STAGES[stage], bad, POISONS["NaN gradient"])
    got = forked(line_of(stage, tmp_path / "out"), spoil)
    assert got.status == 1 and "Traceback" not in got.err
    n, last = 6 if stage == "grpo" else 5, got.err.splitlines()[-1]
    assert re.search(f"error: the last {n} updates had .* not finite.*--lr", last)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(6 if stage == "grpo" else 7))
    assert sum(row["skipped"] for row in rows) == (8 if stage == "grpo" else 5)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_count_of_skipped_updates_survives_a_kill(line_of, tmp_path):
    """Steps 1 to 3 skipped, a checkpoint, killed in step 4: after it, 4 and 5 are enough."""
    line, bad = line_of("opd", tmp_path / "out"), set(range(1, 99))
    spoil = poison(opd, bad, POISONS["NaN gradient"])
    got = forked(line, lambda: (spoil(), at_call(opd, "optimizer_step", 5, die)()))
    assert got.status == -signal.SIGKILL
    got = forked(line, poison(opd, set(range(99)), POISONS["NaN gradient"]))
    assert got.status == 1 and "the last 5 updates" in got.err
    assert [row["skipped"] for row in metrics(tmp_path / "out")] == [0, 1, 1, 1, 1, 1]


# --- a full disk


def fail(error):
    def act():
        raise error
    return act


FULL = {"file size limit": limit_files(300_000),
        "no space": fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        "torch's own error": fail(RuntimeError("PytorchStreamWriter failed writing file data/0"))}


@pytest.mark.parametrize("how, message", [
    ("file size limit", "File too large"), ("no space", "No space left"),
    ("torch's own error", "failed writing file")])
def test_a_full_disk_spares_the_old_checkpoint(how, message, line_of, whole, tmp_path):
    """At the second checkpoint: one line with file and reason, its room is given back; resumes."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    got = forked(line, at_call(torch, "save", 2, FULL[how]))
    assert got.status == 1 and "Traceback" not in got.err
    last = got.err.splitlines()[-1]
    assert re.search(f"error: cannot write .*state-00000004.pt: .*{message}.*GB free", last)
    assert checkpoints(out) == ["state-00000002.pt"]
    assert "continuing after 2 steps" in forked(line).out
    check_equal(out, whole("opd").out)


def test_a_full_disk_at_the_end_spares_the_checkpoints(line_of, whole, tmp_path):
    """The model cannot be written: one line, and with room the same command writes it."""
    line, out = line_of("opd", tmp_path / "out"), tmp_path / "out"
    got = forked(line, at_call(common, "save_lm", 1, limit_files(100_000)))
    assert got.status == 1 and re.search("error: cannot write .*out", got.err.splitlines()[-1])
    assert "Traceback" not in got.err
    assert checkpoints(out) == ["state-00000004.pt", "state-00000006.pt"]
    assert forked(line).status == 0
    check_equal(out, whole("opd").out)


def test_a_full_disk_under_a_line_is_one_line():
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        common.append_json_line("/dev/full", {"a": 1})


# --- a folder in use


def stopped(pid):
    """Wait until the child has stopped itself."""
    os.waitpid(pid, os.WUNTRACED)


@pytest.mark.parametrize("stage", [*STAGES, "evaluate"])
def test_a_folder_in_use_is_refused_until_its_process_is_gone(stage, line_of, evaluation, tmp_path):
    """The second process is told the first one's id and host; a SIGKILL frees the folder."""
    module = STAGES.get(stage, evaluate)
    out, refused = tmp_path / "out", []
    line = line_of(stage, out) if stage in STAGES else evaluation.line(out)

    def meanwhile(pid):
        stopped(pid)
        got = forked(line)
        refused.append((got.status, got.err, f"in use by another run (pid {pid} on "))
        os.kill(pid, signal.SIGKILL)

    name = "make_optimizer" if stage in STAGES else "sample_and_write"
    got = forked(line, at_call(module, name, 1, send(signal.SIGSTOP)), meanwhile=meanwhile)
    assert got.status == -signal.SIGKILL
    ((status, err, words),) = refused
    assert status == 1 and words in err and len(err.splitlines()) == 1, err
    assert forked(line).status == 0


def test_a_shared_cache_has_one_writer_at_a_time(line_of, tmp_path):
    """While one run samples into --cache another is refused; afterwards it reuses all."""
    a, b = (line_of("fkl_warmup", tmp_path / x, f"--cache {tmp_path}/shared.jsonl") for x in "ab")

    def meanwhile(pid):
        stopped(pid)
        got = forked(b)
        assert got.status == 1 and f"shared.jsonl is in use by another run (pid {pid}" in got.err
        os.kill(pid, signal.SIGCONT)

    stop = at_call(fkl_warmup, "append_json_line", 2, send(signal.SIGSTOP))
    got = forked(a, stop, meanwhile=meanwhile)
    assert got.status == 0, got.err
    assert "8 prompts reused, 0 to sample" in forked(b).out


def test_a_file_system_without_locks_is_said_and_used(line_of, monkeypatch, tmp_path, capsys):
    """Clusters have such: a line instead of a refusal."""
    monkeypatch.setattr(fcntl, "flock", lambda *a: fail(OSError(errno.ENOTSUP, "Not supported"))())
    common.lock(tmp_path / ".lock", tmp_path).close()
    assert "cannot be locked (Not supported)" in capsys.readouterr().out


# --- damaged and foreign files


@pytest.fixture(scope="module")
def broken_off(line_of, tmp_path_factory):
    """An OPD run killed in its sixth step, with checkpoints after 2 and 4 steps (copy it)."""
    out = tmp_path_factory.mktemp("broken-off") / "out"
    got = forked(line_of("opd", out), at_call(opd, "optimizer_step", 6, die))
    assert got.status == -signal.SIGKILL and len(checkpoints(out)) == 2
    return out


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {"a flipped bit": flip, "cut short": lambda data: data[:-1000], "empty": lambda data: b"",
          "no checkpoint": lambda data: b"x" * len(data)}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_ignored(how, broken_off, line_of, whole, tmp_path):
    """With a line that says so the one before is used, and nothing but time is lost."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    path = out / "state-00000004.pt"
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    got = forked(line_of("opd", out))
    assert got.status == 0, got.err
    assert f"{path} is damaged, not used: " in got.out and "continuing after 2 steps" in got.out
    check_equal(out, whole("opd").out)


def test_no_undamaged_checkpoint_begins_again(broken_off, line_of, whole, tmp_path):
    """Both damaged: said twice, and the run starts with its first step."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    for path in out.glob("state-*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    got = forked(line_of("opd", out))
    assert got.out.count("is damaged, not used") == 2 and "continuing" not in got.out
    check_equal(out, whole("opd").out)


@pytest.mark.parametrize("which", ["--student", "--teacher"])
@pytest.mark.parametrize("shape", ["same shape", "other shape"])
def test_a_checkpoint_of_another_model_is_refused(which, shape, line_of, world, taught, tmp_path):
    """A folder that holds another model than before, under the same name: named in one line."""
    copy, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(world / "init-student", copy)
    line = line_of("opd", out, f"--save-every 2 {which} {copy}")
    assert forked(line, at_call(opd, "optimizer_step", 4, die)).status == -signal.SIGKILL
    before = (out / "state-00000002.pt").read_bytes()
    if shape == "same shape":
        tensors = load_file(copy / "model.safetensors")
        save_file({k: v * 1.5 for k, v in tensors.items()}, copy / "model.safetensors",
                  metadata={"format": "pt"})
    else:
        shutil.rmtree(copy)
        shutil.copytree(world / "init-teacher", copy)
    got = forked(line)
    assert got.status == 1 and len(got.err.splitlines()) == 1, got.err
    name = "teacher_weights" if which == "--teacher" else "weights"
    assert re.search(rf"checkpoints of another model .*\({name} was '\w+', is now '\w+'\)", got.err)
    assert (out / "state-00000002.pt").read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_without_its_record(broken_off, line_of,
                                                                      tmp_path):
    """A checkpoint knows its settings, even where config.json and metrics.jsonl are gone."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    (out / "config.json").unlink()
    (out / "metrics.jsonl").unlink()
    got = forked(line_of("opd", out, "--seed 3 --lr 1e-4"))
    assert got.status == 1
    assert re.search("lr was 0.001, is now 0.0001; seed was 0, is now 3", got.err), got.err


@pytest.mark.parametrize("text", ["", "no JSON", '{"step": 0}\n{"st\n{"step": 2}\n'])
def test_damaged_metrics_are_written_again_from_the_checkpoint(text, broken_off, line_of, whole,
                                                               tmp_path):
    """The rule for metrics.jsonl: a checkpoint holds its lines, and a resumed run writes them."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    (out / "metrics.jsonl").write_text(text)
    assert forked(line_of("opd", out)).status == 0
    check_equal(out, whole("opd").out)


BAD_LINES = {"cut": b'{"prompt": [1, 2', "no text": b'{"problem": "\xff"}', "no object": b"[1]"}


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("stage", ["fkl_warmup", "evaluate"])
def test_a_damaged_line_of_the_cache_or_the_samples_is_named(bad, stage, whole, line_of, evaluation,
                                                             tmp_path):
    """In the middle of a file: one line, with the file, and nothing is changed."""
    path = tmp_path / "x" / ("rollouts.jsonl" if stage in STAGES else "test.jsonl")
    path.parent.mkdir()
    good = (whole(stage).out / path.name).read_bytes() if stage in STAGES else evaluation.whole
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], BAD_LINES[bad] + b"\n", *lines[3:]]))
    before = path.read_bytes()
    got = forked(line_of(stage, path.parent) if stage in STAGES else evaluation.line(path.parent))
    assert got.status == 1 and len(got.err.splitlines()) == 1 and "Traceback" not in got.err
    assert re.search(rf"{path}(, line 3 is| holds).*cut the file off", got.err), got.err
    assert path.read_bytes() == before


def test_a_data_file_that_is_no_text_is_one_line(tmp_path):
    """With the number of its line."""
    (tmp_path / "d.jsonl").write_bytes(b'{"problem": "a", "answer": 1}\n{"problem": "\xff"}\n')
    with pytest.raises(UserError, match="d.jsonl, line 2 is not UTF-8"):
        common.load_problems(str(tmp_path / "d.jsonl"))


def test_a_damaged_record_is_one_line(broken_off, line_of, tmp_path):
    """config.json of the output folder, or of a model's."""
    out = shutil.copytree(broken_off, tmp_path / "out")
    (out / "config.json").write_text('{"run": {')
    for line in (line_of("opd", out), line_of("opd", tmp_path / "new", f"--student {out}")):
        got = forked(line)
        assert got.status == 1 and len(got.err.splitlines()) == 1
        assert f"{out}/config.json is not JSON" in got.err


def test_weights_that_are_not_all_there_are_refused(world, tmp_path):
    """transformers would fill the gap with random numbers, and say so only in a log."""
    folder = shutil.copytree(world / "init-student", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(tensors)[3]
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 tensors of the model, e.g. {gone}"):
        common.load_lm(str(folder))


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
    one, two = metrics(tmp_path / "out")[0], metrics(whole("opd").out)[0]
    assert one.pop("grad_norm") > 0 and two.pop("grad_norm") > 0
    assert one == two


# --- the long run: real command lines, killed by the clock


def start(line):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_soak(stage, line_of, tmp_path, monkeypatch):
    """Ten signals a stage at random times, one in four a SIGTERM: bit-identical in the end."""
    steps, rng, ends, i = 60, random.Random(stage), Counter(), 0
    monkeypatch.setitem(globals(), "STEPS", steps)
    flags = f"--steps {steps} --save-every 3 --rollouts 8"
    began, process = time.time(), start(line_of(stage, tmp_path / "whole", flags))
    _, err = process.communicate()
    assert process.returncode == 0, err
    longest = time.time() - began
    while (sent := ends.total() - ends[0]) < 10 or not ends[0]:  # 0: runs that came to their end
        fresh, began = not (tmp_path / f"out{i}").exists(), time.time()
        process = start(line_of(stage, tmp_path / f"out{i}", flags))
        number = signal.SIGTERM if sent % 4 == 3 else signal.SIGKILL
        try:
            _, err = process.communicate(timeout=rng.uniform(0.1, 0.9) * longest)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, err = process.communicate()
        ends[process.returncode] += 1
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), err
        if process.returncode == 0:
            check_equal(tmp_path / f"out{i}", tmp_path / "whole")
            i += 1
            longest = min(longest, time.time() - began) if fresh else longest  # less load now
    print(stage, dict(ends), f"{longest:.0f} s in one piece")
