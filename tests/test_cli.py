"""The command lines as a user types them: two tiny steps of each, mistakes, kills.

`typed` runs a script file as __main__ in this process, argument parsing and exit included, which
saves the seconds of imports each; where the process itself is the point (kill, exit status, a
fresh interpreter), `start` runs a real one.
"""

import dataclasses
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import evaluate
import fkl_warmup
import grpo
import opd

ROOT = Path(common.__file__).resolve().parent
SCRIPTS = {"grpo.py": grpo, "fkl_warmup.py": fkl_warmup, "opd.py": opd, "evaluate.py": evaluate}
STAGES = {name: module for name, module in SCRIPTS.items() if name != "evaluate.py"}


TIMING = re.compile("seconds.*|tokens_per_second")
BAR = re.compile(r"\d+%\||^\S+: 0\S+ \[")  # a line of a progress bar


def start(line):
    """A real process for the command line, in the project folder, as a user would have it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(line) runs it here -> status, out, err (with sys.exit's text, without bars)."""

    def run(line):
        words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        status, message = 0, ""
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                status, message = 1, end.code
            else:
                status = end.code or 0
        out, err = capsys.readouterr()
        err = [x for x in re.split(r"[\r\n]+", err + "\n" + message) if x and not BAR.search(x)]
        return SimpleNamespace(status=status, out=out, err="\n".join(err))

    return run


@pytest.fixture
def line_of(world, taught, tmp_path):
    """line_of(stage, flags): a command line of a stage with small settings and --out tmp/out."""

    def line(stage, flags=""):
        models = {"grpo.py": f"--model {taught.model}",
                  "fkl_warmup.py": f"--teacher {taught.model} --student {world}/init-student",
                  "opd.py": f"--teacher {taught.model} --student {world}/init-student"}[stage]
        return (f"{stage} {models} --data {taught.data} --exclude none --out {tmp_path}/out "
                f"--max-new-tokens 12 --rollouts 4 --lr 1e-3 --steps 2 {flags}")

    return line


def metrics(folder):
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def record(folder):
    return json.loads((Path(folder) / "config.json").read_text())["run"]


# --- two tiny steps of every command line

SMOKE = {  # name: (script, flags)
    "forward KL": ("fkl_warmup.py", ""),
    "teacher-sample SFT": ("fkl_warmup.py", "--targets hard"),
    "SFT on correct samples": ("fkl_warmup.py", "--targets hard --only-correct --prompts 2"),
    "OPD full": ("opd.py", ""),
    "OPD token": ("opd.py", "--estimator token"),
    "OPD return": ("opd.py", "--estimator return"),
    "OPD and reward": ("opd.py", "--sparse-weight 0.5"),
    "GRPO": ("grpo.py", ""),
    "GRPO, several updates with KL": ("grpo.py", "--mini-batch 2 --kl-coef 0.1"),
    "GRPO, Dr. GRPO": ("grpo.py", "--aggregation constant --no-adv-std --kl-coef 0"),
    "GRPO, DAPO": ("grpo.py", "--clip-high 0.28 --mask-truncated --kl-coef 0"),
    "GRPO, the other knobs": (
        "grpo.py", "--aggregation sequence --kl-loss k3 --lr-schedule linear --warmup-steps 1 "
        "--weight-decay 0.01 --temperature 0.9 --half 2 --prompts 4 --mini-batch 4 --dtype fp32 "
        "--gradient-checkpointing --micro-tokens 64 --vocab-chunk 7 --sample-rows 8 --thinking"),
}


def check_folder(folder, line, parent, steps=2):
    """What every stage leaves behind: a loadable changed model, a line a step, a full record."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "1a+1"}])
    old, new = weights(parent), weights(folder)
    assert set(old) == set(new) and any(not torch.equal(old[n], new[n]) for n in old)
    assert all(t.isfinite().all() for t in new.values())
    assert model.generation_config.eos_token_id == 1
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(steps))
    assert all(row["seconds"] > 0 for row in rows)
    # no figure may be NaN (which JSON has not; it would be stored as null)
    assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())
    run = record(folder)
    assert run["finished"] is True and run["steps"] == steps
    assert run["seconds"] >= sum(row["seconds"] for row in rows) * 0.999
    assert {"python", "torch", "transformers"} <= set(run["versions"])
    assert run["versions"]["torch"] == torch.__version__
    script, *flags = shlex.split(run["command"])
    assert [Path(script).name, *flags] == shlex.split(line)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(run["git"].split("+")[0])
    assert not list(Path(folder).glob("state*"))


@pytest.mark.parametrize("name", SMOKE)
def test_two_steps_of_the_command_line(name, typed, line_of, tmp_path, world, taught):
    """It ends well, the folder loads anywhere, the weights moved, the record is complete."""
    stage, flags = SMOKE[name]
    line = line_of(stage, flags)
    got = typed(line)
    assert (got.status, got.out.count("model saved")) == (0, 1), got.err
    parent = taught.model if stage == "grpo.py" else world / "init-student"
    check_folder(tmp_path / "out", line, parent)
    rows, run = metrics(tmp_path / "out"), record(tmp_path / "out")
    half, problems = ("2", 4) if "--half 2" in flags else ("all", 8)
    looks = "--only-correct" in flags or "--sparse-weight" in flags
    used = stage == "grpo.py" or looks  # who looks at the answers
    assert run["labels"] == ({f"{taught.data}:{half}": problems} if used else {})
    assert str(parent) in run["parents"] and (str(taught.model) in run["parents"])
    if stage == "grpo.py":
        assert 0 < rows[0]["reward"] < 1, "the fixture must succeed sometimes"
        assert rows[0]["sampler_gap"] < 1e-5
    elif "targets" in flags:
        assert all(row["nll"] > 0 for row in rows)
    else:
        assert all(row["kl"] > 0 for row in rows)
        assert all(("zero_variance" in row) == used for row in rows)
    if "only-correct" in flags:
        kept, problems = map(int, re.search(r"(\d+) responses to (\d+) of 8", got.out).groups())
        assert 0 < problems <= kept < 32, "some responses right, some wrong"


def test_real_processes_from_pretraining_to_the_table(world, taught, tmp_path):
    """Fresh interpreters: plain SFT, evaluate its model, regrade it, print the table."""
    folder = tmp_path / "world" / "bridge"
    line = (f"fkl_warmup.py --targets data --student {world}/init-student --data {taught.data} "
            f"--out {folder} --steps 2 --lr 1e-3")
    ask = (f"evaluate.py --model {folder} --data {world}/test.jsonl,{world}/valid.jsonl "
           "--samples 2 --max-new-tokens 8")
    outputs = []
    for command in (line, ask, f"evaluate.py --table {tmp_path}/world"):
        process = start(command)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append(out)
    check_folder(folder, line, world / "init-student")
    assert metrics(folder)[1]["nll"] < metrics(folder)[0]["nll"]  # the same eight examples again
    for n, name in ((12, "test"), (8, "valid")):
        assert re.search(rf"\| {name} \| {n} \| [\d.]+ ± [\d.]+ \|", outputs[1])
        assert len((folder / "eval" / f"{name}.jsonl").read_text().splitlines()) == n
    assert re.search(r"\| bridge \| .*79.3 / 25.2 / 20.2 \|", outputs[2])
    assert (tmp_path / "world" / "table.md").read_text().strip() == outputs[2].strip()


def test_regrade_command_line(typed, world, tmp_path):
    """evaluate.py, then --regrade --out: same figures, no verdict changed, no model needed."""
    line = f"--data {world}/valid.jsonl --samples 2 --max-new-tokens 4 --out {tmp_path}/eval"
    shutil.copytree(world / "init-student", tmp_path / "model")
    first = typed(f"evaluate.py --model {tmp_path}/model {line}")
    assert first.status == 0, first.err
    shutil.rmtree(tmp_path / "model")
    again = typed(f"evaluate.py --regrade --out {tmp_path}/eval")
    assert again.status == 0, again.err
    assert "0 verdicts changed" in again.out
    row = re.compile(r"\| valid \| 8 \|.*")
    assert row.search(again.out)[0] == row.search(first.out)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_memory_flags_change_no_result(stage, typed, line_of, tmp_path):
    """The help's last group: the same rollouts and rewards, and weights equal to fp32 rounding.

    (Adam turns a rounding error of a gradient that is near 0 into a step of up to lr = 1e-3.)
    """
    small = ("--gradient-checkpointing --micro-tokens 40 --vocab-chunk 7 --sample-rows 8 "
             "--save-every 1")
    for flags in ("", small):
        got = typed(line_of(stage, f"--steps 1 {flags} --out {tmp_path}/run{len(flags)}"))
        assert got.status == 0, got.err
    (a,), (b,) = (metrics(f) for f in sorted(tmp_path.glob("run*")))
    for key in set(a) - {k for k in a if TIMING.fullmatch(k)}:
        assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    a, b = (weights(f) for f in sorted(tmp_path.glob("run*")))
    far = sum(((a[n] - b[n]).abs() > 1e-5).sum().item() for n in a)
    assert far < 0.01 * sum(t.numel() for t in a.values())


# --- --help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_every_flag_a_text_a_source_and_its_default(script, typed, monkeypatch):
    """Every field: help text; its source (Table n, Section n, ours); its default, if it has one.

    The source may be missing where the field names what to read or write (the first group) or
    cannot change a result (the last).
    """
    monkeypatch.setenv("COLUMNS", "400")
    got = typed(f"{script} --help")
    assert got.status == 0 and SCRIPTS[script].__doc__.splitlines()[0] in got.out
    options = got.out.split("\n\n" + list(groups(script))[0] + ":")[1]
    blocks = {m[1]: m[0] for m in re.finditer(r"^  --([\w-]+)\b.*(?:\n {6,}.*)*", options, re.M)}
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(SCRIPTS[script].Config)}
    assert set(blocks) == set(fields)
    titles = list(groups(script).values())
    for flag, field in fields.items():
        title, text = common.field_comments(SCRIPTS[script].Config)[field.name]
        assert len(text) >= 10 and text in blocks[flag]
        free = title == titles[0] or title.startswith("memory")
        assert free or re.search(r"Tables? \d|Section \d|ours", text), f"--{flag} has no source"
        if field.default not in (None, ""):
            assert f"[default: {field.default}]" in blocks[flag]
    assert any(t.startswith("memory") for t in titles) and len(titles) >= 3


def groups(script):
    """{title as --help shows it: title} of a script's groups of settings, in order."""
    return {t: t for t, _ in common.field_comments(SCRIPTS[script].Config).values()}


def test_memory_flags_are_those_a_run_may_be_resumed_with():
    """The help's last group = what a resumed run may change, beside where its files stand."""
    for module in STAGES.values():
        shown = {name for name, (title, _) in common.field_comments(module.Config).items()
                 if title.startswith("memory")}
        free = {f.name for f in dataclasses.fields(module.Config)} & common.FREE_FIELDS
        assert shown <= free and free - shown <= {"out", "cache"}  # two places on the disk


def test_defaults_are_the_papers():
    """Tables 9 and 10, as the paper states them."""
    c = grpo.Config(model="m")
    assert (c.lr, c.epochs, c.mini_batch, c.clip, c.clip_high, c.grad_clip, c.kl_coef) == (
        1e-6, 10, 8, 0.2, 0.0, 1.0, 5e-4)  # clip_high 0: the same as clip
    assert (c.max_prompt_tokens, c.max_new_tokens, c.thinking) == (3072, 16384, False)
    for c in (opd.Config(teacher="t", student="s"), fkl_warmup.Config(teacher="t", student="s")):
        assert (c.lr, c.rollouts, c.epochs, c.prompts * c.rollouts) == (1e-6, 8, 1, 64)
        assert (c.max_prompt_tokens, c.max_new_tokens, c.temperature) == (2048, 16384, 1.0)
    c = evaluate.Config(model="m")
    assert (c.samples, c.data, c.max_new_tokens) == (16, "math500,aime24,aime25", 16384)


def test_shared_flags_have_one_name_everywhere():
    """The names that all stages share exist in each, and the models' where they belong."""
    shared = {"data", "half", "out", "steps", "seed", "lr", "prompts", "rollouts", "max_new_tokens",
              "temperature", "save_every", "thinking", "split_seed", "exclude"}
    names = {s: {f.name for f in dataclasses.fields(m.Config)} for s, m in SCRIPTS.items()}
    assert all(shared <= names[s] for s in STAGES)
    assert {"teacher", "student"} <= names["opd.py"] & names["fkl_warmup.py"]
    assert "model" in names["grpo.py"] & names["evaluate.py"]


# --- a user's mistakes: one line, no stack trace


MISTAKES = {  # name: (script, flags added to a good line, words of the message)
    "model that does not exist": ("grpo.py", "--model nobody-has/this", "nobody-has/this"),
    "teacher that does not exist": ("opd.py", "--teacher nobody-has/this", "nobody-has/this"),
    "data file that does not exist": ("opd.py", "--data nowhere.jsonl", "nowhere.jsonl"),
    "data set that does not exist": ("grpo.py", "--data nobody-has/data", "nobody-has/data"),
    "evaluation set to exclude": ("grpo.py", "--exclude no.jsonl", "no.jsonl.*--exclude none"),
    "empty data": ("grpo.py", "--data {empty}", "empty.jsonl.*no problem"),
    "empty SFT data": ("fkl_warmup.py", "--targets data --teacher '' --data {empty}", "empty"),
    "value that is no choice": ("opd.py", "--half 3", "--half.*3"),
    "value that is no number": ("opd.py", "--lr fast", "--lr.*fast"),
    "flag that does not exist": ("grpo.py", "--learning-rate 1", "--learning-rate"),
    "group of one": ("grpo.py", "--rollouts 1", "--rollouts 1"),
    "reward of weight above 1": ("opd.py", "--sparse-weight 1.5", "--sparse-weight 1.5"),
    "reward of weight below 0": ("opd.py", "--sparse-weight=-0.1", "--sparse-weight -0.1"),
    "reward without groups": ("opd.py", "--sparse-weight 1 --rollouts 1", "--rollouts 1"),
    "temperature 0": ("opd.py", "--temperature 0", "--temperature"),
    "prompts no multiple": ("grpo.py", "--mini-batch 3", "--prompts 8 .*--mini-batch 3"),
    "more prompts than problems": ("opd.py", "--prompts 9", "--prompts 9 .*8 problems"),
    "no prompts": ("opd.py", "--prompts 0", "--prompts"),
    "no prompts in GRPO": ("grpo.py", "--prompts 0", "--prompts"),
    "mini-batch 0": ("grpo.py", "--mini-batch 0", "--mini-batch"),
    "no rollouts": ("fkl_warmup.py", "--rollouts 0", "--rollouts"),
    "no new tokens": ("opd.py", "--max-new-tokens 0", "--max-new-tokens"),
    "negative vocabulary chunk": ("opd.py", "--vocab-chunk -1", "--vocab-chunk"),
    "negative learning rate": ("opd.py", "--lr -1", "--lr"),
    "negative seed": ("opd.py", "--seed -1", "--seed"),
    "prompt limit 1": ("opd.py", "--max-prompt-tokens 1", "--max-prompt-tokens 1"),
    "foreign model as --out": ("opd.py", "--out {foreign}", "foreign.*--out"),
    "student as teacher's folder": ("opd.py", "--student {empty}", "empty.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_without_a_stack_trace(name, typed, line_of, tmp_path, world):
    """The program ends with a status that is not 0 and one line that names the flag or file."""
    stage, flags, message = MISTAKES[name]
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(world / "init-student", tmp_path / "foreign")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "foreign").iterdir())
    got = typed(line_of(stage, flags.format(empty=tmp_path / "empty.jsonl",
                                            foreign=tmp_path / "foreign")))
    assert got.status not in (0, None)
    assert re.search(message, got.err), got.err
    assert "Traceback" not in got.err
    assert len(got.err.splitlines()) == 1, got.err
    after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "foreign").iterdir())
    assert after == before, "a folder that is not ours was changed"


@pytest.mark.parametrize("line, message", [
    ("opd.py --student {world}/init-student", "--teacher"),
    ("fkl_warmup.py --student {world}/init-student --data {world}/train.jsonl --exclude none "
     "--out {tmp}/out", "--teacher"),
    ("grpo.py", "--model"),
    ("evaluate.py", "--model"),
    ("evaluate.py --model nobody-has/this --data {world}/test.jsonl --out {tmp}/e", "nobody-has"),
    ("evaluate.py --model {world}/init-student --data nowhere.jsonl --out {tmp}/e", "nowhere"),
    ("evaluate.py --model {world}/init-student --data {tmp}/empty.jsonl --out {tmp}/e", "empty"),
    ("evaluate.py --model {world}/init-student --data {world}/test.jsonl --samples 0 --out {tmp}/e",
     "--samples"),
    ("evaluate.py --table {tmp}/nothing", "nothing"),
    ("evaluate.py --regrade --out {tmp}/nothing", "nothing"),
])
def test_a_missing_flag_or_file_is_one_line(line, message, typed, world, tmp_path):
    """What is missing is named in one line, before any work."""
    (tmp_path / "empty.jsonl").write_text("")
    got = typed(line.format(world=world, tmp=tmp_path))
    assert got.status not in (0, None) and "Traceback" not in got.err
    assert re.search(message, got.err) and len(got.err.splitlines()) == 1, got.err


@pytest.mark.parametrize("stage, mistake", [
    ("grpo.py", "--model nobody-has/this"), ("opd.py", "--teacher nobody-has/this"),
    ("fkl_warmup.py", "--student nobody-has/this"), ("opd.py", "--prompts 9"),
    ("fkl_warmup.py", "--prompts 9"), ("opd.py", "--data nowhere.jsonl")])
def test_a_mistake_does_not_occupy_the_output_folder(stage, mistake, typed, line_of):
    """After a mistake the corrected command runs in the same --out, with nothing to delete."""
    assert typed(line_of(stage, mistake)).status == 1
    got = typed(line_of(stage))
    assert got.status == 0, got.err


def test_same_command_twice_and_another_run_in_the_same_folder(typed, line_of, tmp_path):
    """Twice: "already finished", nothing rewritten. Other settings: refused by name.

    Memory flags are no other settings.
    """
    line = line_of("opd.py")
    assert typed(line).status == 0
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    for flags in ("", " --micro-tokens 100 --sample-rows 3 --vocab-chunk 5 --save-every 1"):
        again = typed(line + flags)
        assert (again.status, again.err) == (0, "") and "already finished" in again.out
    other = typed(line + " --seed 5")
    assert other.status == 1 and len(other.err.splitlines()) == 1
    assert re.search("seed was 0, is now 5", other.err)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_full_disk_is_one_line(typed, line_of, tmp_path):
    """/dev/full in the place of the state file: a real ENOSPC in the middle of a run."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.tmp").symlink_to("/dev/full")
    got = typed(line_of("opd.py", "--save-every 1"))
    assert got.status == 1 and "Traceback" not in got.err
    last = got.err.splitlines()[-1]
    assert re.search("error: .*(space|disk|write|writing)", last), got.err


# --- the teacher's rollouts on disk


def test_teacher_rollouts_are_reused_when_they_match_and_refused_when_not(typed, line_of, tmp_path,
                                                                           world):
    """One cache serves soft and hard targets; another temperature, seed or teacher is refused."""
    cache = f"--cache {tmp_path}/rollouts.jsonl"
    first = typed(line_of("fkl_warmup.py", f"{cache} --out {tmp_path}/a"))
    assert "0 prompts reused, 8 to sample" in first.out
    stored = (tmp_path / "rollouts.jsonl").read_bytes()
    second = typed(line_of("fkl_warmup.py", f"{cache} --out {tmp_path}/b --targets hard"))
    assert "8 prompts reused, 0 to sample" in second.out and second.status == 0
    other = f"--teacher {world}/init-teacher"
    for n, flags in enumerate(("--temperature 0.7", "--seed 3", "--rollouts 2", other)):
        got = typed(line_of("fkl_warmup.py", f"{cache} --out {tmp_path}/c{n} {flags}"))
        assert got.status == 1 and "rollouts.jsonl" in got.err.splitlines()[-1], got.err
    assert (tmp_path / "rollouts.jsonl").read_bytes() == stored


# --- killed and resumed


def test_killed_and_resumed_is_bit_identical_to_uninterrupted(typed, line_of, tmp_path):
    """SIGKILL after a saved state, then the same command again = a run in one piece.

    Same weights, bit for bit, and the same metrics but for timing. (Real processes; many more
    kills of all stages are in test_faults.py.)
    """
    line = line_of("opd.py", "--steps 24 --save-every 2 --show-every 0")
    out = tmp_path / "out"
    process, deadline = start(line), time.time() + 90
    while not list(out.glob("state-*.pt")):
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert record(out)["finished"] is False and not (out / "model.safetensors").exists()
    with pytest.raises(common.UserError, match="unfinished"):
        common.load_lm(str(out))
    saved = int(max(out.glob("state-*.pt")).stem.removeprefix("state-"))
    assert 2 <= saved < 24
    with (out / "metrics.jsonl").open("a") as file:  # what a kill later on leaves there
        file.write(json.dumps({"step": saved, "seconds": 9.0}) + '\n{"step": 7, "ent')

    process = start(line)
    resumed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(rf"continuing after (step )?{saved}\b", resumed)
    whole = typed(line.replace(str(out), str(tmp_path / "whole")))
    assert whole.status == 0, whole.err

    a, b = weights(out), weights(tmp_path / "whole")
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    rows = [[{k: v for k, v in row.items() if not TIMING.fullmatch(k)} for row in metrics(f)]
            for f in (out, tmp_path / "whole")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(24))
    moved = [row["entropy"] for row in rows[0][saved:]]
    assert len(set(moved)) == len(moved), "the policy must move in every step after the kill"


@pytest.mark.parametrize("config", [grpo.Config, fkl_warmup.Config, opd.Config])
def test_help_lists_the_flags_of_the_script_before_those_of_all_stages(config, capsys):
    with pytest.raises(SystemExit):
        common.parse_args(config, "", ["--help"])
    flags = re.findall(r"^  __(\w+)", capsys.readouterr().out.replace("-", "_"), re.M)
    titles = common.field_comments(config)
    for title in {titles[flag][0] for flag in flags}:
        group = [flag not in config.__annotations__ for flag in flags if titles[flag][0] == title]
        assert group == sorted(group), title
