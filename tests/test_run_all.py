"""run_all.sh runs every route with valid flags, matched where compared, and skips what is done.

The script runs with a stand-in for `python` that writes down each command line and leaves what a
finished stage leaves; the command lines are then parsed by the real scripts.
"""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import sizes
from conftest import ROOT, children

import common
import evaluate

STAND_IN = r"""#!/usr/bin/env bash
echo "$(printf '%q ' "$@")" >> "$COMMANDS"
script=$1 line=$*; out=
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
[ "$script" = "${FAIL:-}" ] && exit 1
[ "$script" = "${HANG:-}" ] && exec sleep 60
[ -n "$out" ] && mkdir -p "$out"
[ -n "$out" ] && printf '{"command": "%s",\n"finished": true}' "$line" > "$out/config.json"
exit 0
"""

@pytest.fixture
def start(tmp_path):
    """start(setting, **environment) -> the process, its commands in tmp_path/commands."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN)
    (tmp_path / "bin" / "python").chmod(0o755)

    def start(setting, **environment):
        (tmp_path / "commands").write_text("")
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
               "COMMANDS": str(tmp_path / "commands"), **environment}
        return subprocess.Popen(["bash", str(tmp_path / "run_all.sh"), setting], env=env, text=True,
                                stderr=subprocess.PIPE, start_new_session=True)

    return start

@pytest.fixture
def run_all(start, tmp_path):
    """run_all(setting, **environment) -> (status, [(script, Config)] of the commands, errors)."""
    def run(setting, **environment):
        with start(setting, **environment) as process:
            errors, commands = process.stderr.read(), []
        for line in (tmp_path / "commands").read_text().splitlines():
            script, *flags = shlex.split(line)
            if not script.startswith("tests/"):
                module = importlib.import_module(script.removesuffix(".py"))
                commands.append((script, common.parse_args(module.Config, "", flags)))
        return process.returncode, commands, errors

    return run

def stages(commands):
    """{run name: (script, Config)} of the training stages."""
    return {cfg.out.split("/")[-1]: (script, cfg) for script, cfg in commands
            if script != "evaluate.py"}

CORE = {"cold-grpo", "teacher-rl", "teacher-rl-1h", "raw-bridge", "bridge", "opd-only", "sft",
        "bridge-1h", "fresh-2h", "replay-1h"}

@pytest.mark.parametrize("setting", ["world", "world-gpu", "tiny", "small", "qwen3",
                                     "llama"])
def test_every_route_runs_is_evaluated_and_is_matched(setting, run_all):
    status, commands, errors = run_all(setting)
    assert status == 0, errors
    found = stages(commands)
    assert CORE <= set(found)
    evaluated = {cfg.out.split("/")[-2] for script, cfg in commands
                 if script == "evaluate.py" and cfg.model}
    assert evaluated == {n for n in found if "warmup" not in n} | {"base-teacher", "base-student"}
    fresh, replay = (common.describe_run(found[name][1], {})["settings"]
                     for name in ("fresh-2h", "replay-1h"))
    assert common.differences(fresh, replay) == "half was '2', is now '1'"  # R5 against R7
    warmup, opd = found["bridge-warmup"][1], found["bridge"][1]
    assert not difference(found, "opd-only", "bridge")  # R8: the bridge's OPD, of the base student
    for name in {"opd-only-long", "sft"} & set(found):  # the updates and rows of both its stages
        cfg = found[name][1]
        assert (cfg.steps, cfg.epochs) in {(warmup.steps + opd.steps, 1), (0, 2)}
        assert (cfg.lr, cfg.prompts, cfg.rollouts) == (opd.lr, opd.prompts, opd.rollouts)
    assert ("opd-only-long" in found) == (setting in ("qwen3", "llama"))
    assert found["opd-only"][1].student == found["bridge-warmup"][1].student
    assert found["teacher-rl-1h"][1].half == found["bridge-1h"][1].half == "1"

OTHERS = {"opd-only-long", "sft-1h", "sft-fresh-2h", "opd-only-1h", "opd-only-fresh-2h",
          "sft-teacher", "sft-teacher-bridge", "sft-teacher-1h", "sft-teacher-bridge-1h",
          "sft-teacher-fresh-2h", "sft-teacher-replay-1h", "same-size-bridge"}

def difference(found, a, b, but=()):
    """Settings in which two stages differ, apart from the folders and those named."""
    a, b = (common.describe_run(found[name][1], {})["settings"] for name in (a, b))
    return {k for k in a if a[k] != b[k]} - {"model", "teacher", "student", "out", *but}

def test_the_full_world_runs_all_of_table_1_and_beyond_matched(run_all, world):
    """R2, R6, R8 against R5; the SFT'd teacher against the RL'd one; label budgets; Eq. 3."""
    status, commands, errors = run_all("world-full", SEED="3")
    assert status == 0, errors
    found = stages(commands)
    assert CORE | OTHERS <= set(found)
    for name in ("sft-fresh-2h", "opd-only-fresh-2h", "sft-teacher-fresh-2h", "cold-grpo-2h"):
        assert not difference(found, name, "fresh-2h")
    assert found["cold-grpo-2h"][1].model == found["cold-grpo"][1].model
    assert not difference(found, "sft-teacher-replay-1h", "replay-1h")
    for name in ("sft-teacher-bridge-1h", "bridge-1h"):
        assert not difference(found, name, "bridge", but={"half"})
    assert not difference(found, "opd-only-1h", "bridge-1h")
    assert difference(found, "opd-only-long", "opd-only") == {"steps"}
    same = ("lr", "lr_schedule", "steps", "prompts", "seed", "temperature", "data")
    for a, b in (("sft-teacher", "teacher-rl"), ("sft-teacher-1h", "teacher-rl-1h")):
        assert all(getattr(found[a][1], k) == getattr(found[b][1], k) for k in same)
        assert found[a][1].rollouts == 4 * found[b][1].rollouts  # of which a quarter is correct
    train, pool = ((world / f"{name}.jsonl").read_text() for name in ("train", "pool"))
    assert pool.startswith(train) and pool.count("\n") == 4 * train.count("\n")
    for n in (32, 64, 256, 512):
        for a in ("teacher-rl", "bridge", "bridge-warmup", "cold-grpo"):
            b = a.replace("bridge", f"bridge-{n}") if "bridge" in a else f"{a}-{n}"
            assert difference(found, a, b) == {"labels"} | ({"data"} if n > 128 else set())
            cfg = found[b][1]
            assert cfg.labels == n and Path(cfg.data).stem == ("pool" if n > 128 else "train")
        assert found[f"bridge-{n}"][1].teacher.endswith(f"/teacher-rl-{n}")
    for weight in ("0.25", "0.5", "0.75", "1"):
        name = f"lambda-{weight}"
        assert difference(found, "bridge", name) == {"sparse_weight"}
        assert found[name][1].student == found["bridge"][1].student

def test_several_seeds_of_the_full_world_are_run_and_compared(run_all, tmp_path):
    status, commands, errors = run_all("world-full", SEEDS="0 2")
    assert status == 0, errors
    trained = {cfg.out for script, cfg in commands if script == "grpo.py"}
    assert {"runs/world/fresh-2h", "runs/world-seed2/fresh-2h"} <= trained
    last = (tmp_path / "commands").read_text().splitlines()[-1].strip()
    assert last == "tests/lab/evidence.py runs/world runs/world-seed2"
    status, _, errors = run_all("world-full", SEEDS="0 3", FAIL="opd.py")
    assert status == 123 and "seed 3 failed: see runs/logs/seed3.txt" in errors

def test_the_papers_settings_run_all_of_table_1_with_the_defaults(run_all):
    """Routes R1-R8, raw, SFT'd and same-size teacher; only place, models, routes and memory differ
    from the defaults."""
    found = stages(run_all("qwen3")[1])
    assert OTHERS <= set(found)
    assert found["same-size-bridge"][1].teacher.endswith("/cold-grpo")
    route = {"model", "teacher", "student", "half", "targets", "only_correct", "out", "cache",
             "epochs", "gradient_checkpointing"}
    for script, cfg in found.values():
        default = importlib.import_module(script.removesuffix(".py")).Config()
        changed = {k for k, v in vars(cfg).items() if v != getattr(default, k)}
        assert changed <= route, (script, changed)

def test_the_small_setting_runs_to_its_table(world, taught, tmp_path, monkeypatch):
    """Every command line, for two steps, with other models and data; their labels are counted."""
    other = {"TEACHER": taught.model, "STUDENT": world / "init-student", "RUNS": tmp_path,
             "DATA": world / "train.jsonl", "SETS": world / "test.jsonl", "EVAL_FLAGS":
             "--samples 2 --limit 2 --max-new-tokens 8", "FLAGS": "--labels 18 --prompts 8 "
             "--rollouts 2 --steps 2 --max-new-tokens 8 --show-every 0"}
    for name, value in other.items():
        monkeypatch.setenv(name, str(value))
    for _, cfg in sizes.commands("small"):
        ran, = children(lambda: importlib.import_module(type(cfg).__module__).main(cfg))
        assert ran.status == 0, ran.err
    rows = [line.split(" | ") for line in evaluate.runs_table(tmp_path).splitlines()[2:]]
    labels = {row[0].removeprefix("| "): int(row[2]) for row in rows}
    bases = {"base-teacher", "base-student", "raw-bridge"}
    assert labels == {name: 0 if name in bases else 9 if name.endswith("-1h") else 16
                      for name in CORE | bases} | {"fresh-2h": 18}  # of 18, two steps draw 16

def test_the_second_run_does_nothing_and_a_failure_stops_with_a_message(run_all):
    """After a failure its line stops, and the other one ends its phase; the next run does what is
    missing, the third the table."""
    status, commands, errors = run_all("world", FAIL="opd.py")
    assert status == 1 and not {"fresh-2h", "sft"} & set(stages(commands))
    assert "baselines failed: see runs/world/logs/baselines.txt" in errors
    status, commands, _ = run_all("world")
    assert status == 0 and "fresh-2h" in stages(commands) and "cold-grpo" not in stages(commands)
    status, commands, _ = run_all("world")
    assert status == 0 and [script for script, _ in commands] == ["evaluate.py"]

def test_what_another_command_has_finished_is_judged_by_its_script(run_all):
    """Other flags, models, sets and seeds are asked for again; the script refuses them."""
    def asked(**other):
        return [cfg.out for _, cfg in run_all("tiny", **other)[1][:-1]]  # the last is the table

    every = asked()
    trained = [out for out in every if not out.endswith("/eval")]
    assert asked() == [] and asked(FLAGS="--lr 9") == trained
    first = [f"runs/tiny/{name}" for name in ("base-student/eval", "cold-grpo", "opd-only")]
    for other, some in ({"SETS": "aime24"}, every), ({"SEED": "1", "RUNS": "runs/tiny"}, every), (
            {"STUDENT": "other/student"}, first):
        assert asked() and asked() == []
        assert set(some) <= set(asked(**other))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_both_lines(number, start, tmp_path):
    """Also what runs in the background, where a shell ignores Ctrl-C."""
    with start("world", HANG="fkl_warmup.py") as process:
        while (tmp_path / "commands").read_text().count("fkl_warmup.py") < 2:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(10) != 0
    time.sleep(0.2)
    left = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True)
    assert all(state.startswith(b"Z") for state in left.stdout.split()), "something still runs"

@pytest.mark.parametrize("setting, seeds, message", [
    ("worlds", "", "usage:"), ("a b", "", "usage:"), ("world", "0 1", "SEEDS is for world-full")])
def test_what_it_does_not_know_is_refused(setting, seeds, message, run_all):
    status, commands, errors = run_all(setting, SEEDS=seeds)
    assert status == 2 and not commands and errors.startswith(message)
