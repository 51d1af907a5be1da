"""The command lines as a user types them: two tiny steps of each, --help, mistakes, twice the same.

Each runs in a forked child, see conftest.py; one test has fresh interpreters.
"""

import dataclasses
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STAGES, forked, metrics
from safetensors.torch import load_file
from test_readme import GLOSSARY
from transformers import AutoModelForCausalLM, AutoTokenizer

import common

SCRIPTS = {name: importlib.import_module(name) for name in (*STAGES, "evaluate")}

@pytest.fixture
def line_of(small_line, tmp_path):
    """line_of(stage, flags): a small command line with --out tmp/out."""
    return lambda stage, flags="": small_line(stage, tmp_path / "out", flags)

def weights(folder):
    return load_file(Path(folder) / "model.safetensors")

# --- two tiny steps of every command line

SMOKE = {  # name: (stage, flags)
    "forward KL": ("fkl_warmup", ""),
    "teacher-sample SFT": ("fkl_warmup", "--targets hard"),
    "SFT on correct samples": ("fkl_warmup", "--targets hard --only-correct --prompts 2"),
    "OPD full": ("opd", ""),
    "OPD token": ("opd", "--estimator token"),
    "OPD return": ("opd", "--estimator return"),
    "OPD and reward": ("opd", "--sparse-weight 0.5"),
    "GRPO": ("grpo", ""),
    "GRPO, several updates with KL": ("grpo", "--mini-batch 2 --kl-coef 0.1"),
    "GRPO, Dr. GRPO": ("grpo", "--aggregation constant --no-adv-std --kl-coef 0"),
    "GRPO, DAPO": ("grpo", "--clip-high 0.28 --mask-truncated --kl-coef 0"),
    "GRPO, the other knobs": (
        "grpo", "--aggregation sequence --kl-loss k3 --lr-schedule linear --warmup-steps 1 "
        "--weight-decay 0.01 --temperature 0.9 --half 2 --prompts 4 --mini-batch 4 --dtype fp32 "
        "--gradient-checkpointing --micro-tokens 64 --vocab-chunk 7 --sample-rows 8 --thinking"),
}

def check_folder(folder, line, parent):
    """What every stage leaves behind: a loadable changed model, a line a step, a full record."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "1a+1"}])
    old, new = weights(parent), weights(folder)
    assert set(old) == set(new) and any(not torch.equal(old[n], new[n]) for n in old)
    assert all(t.isfinite().all() for t in new.values())
    assert model.generation_config.eos_token_id == 1
    rows = common.read_json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["seconds"] > 0 for row in rows)
    assert {k for k in rows[0] if not k.startswith("seconds_")} - {"step"} <= GLOSSARY
    # no figure may be NaN (which JSON has not; it would be stored as null)
    assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())
    run = common.read_record(folder)
    assert run["finished"] is True and run["steps"] == 2
    assert run["seconds"] >= sum(row["seconds"] for row in rows) * 0.999
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["python"]
    script, *flags = shlex.split(run["command"])
    assert [Path(script).name, *flags] == shlex.split(line)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(re.split("[- ]", run["git"])[0])
    assert not list(folder.glob("state*"))

@pytest.mark.parametrize("name", SMOKE)
def test_two_steps_of_the_command_line(name, line_of, tmp_path, world, taught):
    """It ends well, the folder loads anywhere, the weights moved, the record is complete."""
    stage, flags = SMOKE[name]
    line = line_of(stage, flags)
    got = forked(line)
    assert (got.status, got.out.count("model saved")) == (0, 1), got.err
    parent = taught.model if stage == "grpo" else world / "init-student"
    check_folder(tmp_path / "out", line, parent)
    rows, run = metrics(tmp_path / "out"), common.read_record(tmp_path / "out")
    problems = 4 if "--half 2" in flags else 8
    looks = "--only-correct" in flags or "--sparse-weight" in flags
    used = stage == "grpo" or looks  # who looks at the answers
    labels = common.read_json_lines(tmp_path / "out/labels.jsonl")
    assert len(set(labels)) == len(labels) == (problems if used else 0)
    assert str(parent) in run["parents"] and (str(taught.model) in run["parents"])
    if stage == "grpo":
        assert 0 < rows[0]["reward"] < 1, "the fixture must succeed sometimes"
        assert rows[0]["sampler_gap"] < 1e-5
    elif "targets" in flags:
        assert all(row["nll"] > 0 for row in rows)
    else:
        assert all(row["kl"] > 0 for row in rows)
        assert all(("reward" in row) == used for row in rows)
    if "only-correct" in flags:
        kept, problems = map(int, re.search(r"(\d+) responses to (\d+) of 8", got.out).groups())
        assert 0 < problems <= kept < 32, "some responses right, some wrong"

def test_fresh_interpreters_from_pretraining_to_the_table(world, taught, tmp_path):
    """Plain SFT; evaluate its model; print the table."""
    folder = tmp_path / "world" / "bridge"
    line = (f"fkl_warmup.py --targets data --student {world}/init-student --data {taught.data} "
            f"--out {folder} --steps 2 --lr 1e-3")
    ask = (f"evaluate.py --model {folder} --data {world}/test.jsonl,{world}/valid.jsonl "
           "--samples 2 --max-new-tokens 8")
    outputs = []
    for command in (line, ask):
        got = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                             capture_output=True, timeout=120)
        assert got.returncode == 0, got.stderr
        outputs.append(got.stdout)
    outputs.append(forked(f"evaluate.py --table {tmp_path}/world").out)
    check_folder(folder, line, world / "init-student")
    assert metrics(folder)[1]["nll"] < metrics(folder)[0]["nll"]  # the same eight examples again
    for n, name in ((12, "test"), (8, "valid")):
        assert re.search(rf"\| {name} \| {n} \| [\d.]+ ± [\d.]+ \|", outputs[1])
        assert len((folder / "eval" / f"{name}.jsonl").read_text().splitlines()) == n
    assert re.search(r"\| bridge \| .*79.3 / 25.2 / 20.2 \|", outputs[2])
    assert (tmp_path / "world" / "table.md").read_text().strip() == outputs[2].strip()

@pytest.mark.parametrize("stage", STAGES)
def test_memory_flags_change_no_result(stage, line_of, tmp_path):
    """The help's last group: the same rollouts and rewards, and weights equal to fp32 rounding.

    (Adam turns a rounding error of a gradient that is near 0 into a step of up to lr = 1e-3.)
    """
    small = ("--gradient-checkpointing --micro-tokens 40 --vocab-chunk 7 --sample-rows 8 "
             "--save-every 1")
    for flags in ("", small):
        got = forked(line_of(stage, f"--steps 1 {flags} --out {tmp_path}/run{len(flags)}"))
        assert got.status == 0, got.err
    (a,), (b,) = (metrics(f) for f in sorted(tmp_path.glob("run*")))
    for key in a:
        assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    a, b = (weights(f) for f in sorted(tmp_path.glob("run*")))
    far = sum(((a[n] - b[n]).abs() > 1e-5).sum().item() for n in a)
    assert far < 0.01 * sum(t.numel() for t in a.values())

# --- --help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_every_flag_a_text_a_source_and_its_default(script, monkeypatch):
    """Every field: help text; its source (Table n, Section n, ours); its default, if it has one.

    The source may be missing where the field names what to read or write (the first group) or
    cannot change a result (the last).
    """
    monkeypatch.setenv("COLUMNS", "400")
    module, got = SCRIPTS[script], forked(f"{script}.py --help")
    assert got.status == 0 and module.__doc__.splitlines()[0] in got.out
    comments = common.field_comments(module.Config)
    titles = list(dict.fromkeys(title for title, _ in comments.values()))
    options = got.out.split(f"\n\n{titles[0]}:")[1]
    blocks = {m[1]: m[0] for m in re.finditer(r"^  --([\w-]+)\b.*(?:\n {6,}.*)*", options, re.M)}
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(module.Config)}
    assert set(blocks) == set(fields)
    for flag, field in fields.items():
        title, text = comments[field.name]
        assert len(text) >= 10 and text in blocks[flag]
        free = title == titles[0] or title.startswith("memory")
        assert free or re.search(r"Tables? \d|Section \d|ours", text), f"--{flag} has no source"
        if field.default not in (None, ""):
            assert f"[default: {field.default}]" in blocks[flag]
    assert any(t.startswith("memory") for t in titles) and len(titles) >= 3

def test_memory_flags_are_those_a_run_may_be_resumed_with():
    """The help's last group = what a resumed run may change, beside where its files stand."""
    for name in STAGES:
        comments = common.field_comments(SCRIPTS[name].Config)
        shown = {field for field, (title, _) in comments.items() if title.startswith("memory")}
        cfg = SCRIPTS[name].Config()
        settings = common.describe_run(cfg, {})["settings"]
        assert set(comments) - set(settings) - shown <= {"out", "cache"}

def test_defaults_are_the_papers():
    """Tables 9 and 10, as the paper states them."""
    c = SCRIPTS["grpo"].Config(model="m")
    assert (c.lr, c.epochs, c.mini_batch, c.clip, c.clip_high, c.grad_clip, c.kl_coef) == (
        1e-6, 10, 8, 0.2, 0.0, 1.0, 5e-4)  # clip_high 0: the same as clip
    assert (c.max_prompt_tokens, c.max_new_tokens, c.thinking) == (3072, 16384, False)
    for c in (SCRIPTS[name].Config(teacher="t", student="s") for name in ("opd", "fkl_warmup")):
        assert (c.lr, c.rollouts, c.epochs, c.prompts * c.rollouts) == (1e-6, 8, 1, 64)
        assert (c.max_prompt_tokens, c.max_new_tokens, c.temperature) == (2048, 16384, 1.0)
    c = SCRIPTS["evaluate"].Config(model="m")
    assert (c.samples, c.data, c.max_new_tokens) == (16, "math500,aime24,aime25", 16384)

# --- a user's mistakes: one line, no stack trace

MISTAKES = {  # name: (script, flags added to a good line, words of the message)
    "model that does not exist": ("grpo", "--model nobody-has/this", "nobody-has/this"),
    "teacher that does not exist": ("opd", "--teacher nobody-has/this", "nobody-has/this"),
    "data file that does not exist": ("opd", "--data nowhere.jsonl", "nowhere.jsonl"),
    "data set that does not exist": ("grpo", "--data nobody-has/data", "nobody-has/data"),
    "evaluation set to exclude": ("grpo", "--exclude no.jsonl", "no.jsonl.*--exclude none"),
    "empty data": ("grpo", "--data {empty}", "empty.jsonl"),
    "empty SFT data": ("fkl_warmup", "--targets data --teacher '' --data {empty}", "empty"),
    "value that is no choice": ("opd", "--half 3", "--half.*3"),
    "value that is no number": ("opd", "--lr fast", "--lr.*fast"),
    "flag that does not exist": ("grpo", "--learning-rate 1", "--learning-rate"),
    "group of one": ("grpo", "--rollouts 1", "--rollouts 1"),
    "reward of weight above 1": ("opd", "--sparse-weight 1.5", "--sparse-weight 1.5"),
    "reward of weight below 0": ("opd", "--sparse-weight=-0.1", "--sparse-weight -0.1"),
    "reward without groups": ("opd", "--sparse-weight 1 --rollouts 1", "--rollouts 1"),
    "temperature 0": ("opd", "--temperature 0", "--temperature"),
    "prompts no multiple": ("grpo", "--mini-batch 3", "--prompts 8 .*--mini-batch 3"),
    "more prompts than problems": ("opd", "--prompts 9", "--prompts 9 .*8 problems"),
    "the same in the warmup": ("fkl_warmup", "--prompts 9", "--prompts 9 .*8 problems"),
    "mini-batch 0": ("grpo", "--mini-batch 0", "--mini-batch"),
    "negative learning rate": ("opd", "--lr -1", "--lr"),
    "a seed of 33 bits": ("opd", "--seed 4294967296", r"--seed 4294967296 is not in \[0, 2\^32\)"),
    "prompt limit 1": ("opd", "--max-prompt-tokens 1", "--max-prompt-tokens 1"),
    "device that is not there": ("opd", "--device nothing", "--device nothing"),
    "foreign model as --out": ("opd", "--out {foreign}", "foreign.*--out"),
    "a file as --out": ("opd", "--out {empty}", "empty.jsonl"),
    "student as teacher's folder": ("opd", "--student {empty}", "empty.jsonl"),
    "no teacher": ("fkl_warmup", "--teacher ''", "--teacher"),
}
LINES = {  # name: (command line, words of the message)
    "no flags": ("opd.py", "--teacher, --student"),
    "nothing to evaluate": ("evaluate.py", "--model"),
    "evaluate a model that does not exist": ("{ask} --model nobody-has/this", "nobody-has"),
    "evaluate on no file": ("{ask} --data nowhere.jsonl", "nowhere"),
    "evaluate on an empty file": ("{ask} --data {empty}", "empty"),
    "no samples": ("{ask} --samples 0", "--samples"),
    "table of nothing": ("evaluate.py --table {empty}/nothing", "nothing"),
    "regrade nothing": ("evaluate.py --regrade --out {empty}/nothing", "nothing"),
}

@pytest.mark.parametrize("name", [*MISTAKES, *LINES])
def test_a_mistake_is_one_line_and_occupies_no_folder(name, line_of, tmp_path, world):
    """The line names the flag or file. A foreign folder is as it was, ours is free for a run."""
    empty, foreign = tmp_path / "empty.jsonl", tmp_path / "foreign"
    empty.write_text("")
    shutil.copytree(world / "init-student", foreign)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in foreign.iterdir())
    if name in LINES:
        line, message = LINES[name]
        line = line.replace("{ask}", f"evaluate.py --model {world}/init-student --data "
                                     f"{world}/test.jsonl --out {tmp_path}/out")
    else:
        stage, flags, message = MISTAKES[name]
        line = line_of(stage, flags)
    got = forked(line.format(empty=empty, foreign=foreign))
    assert got.status == 1 and re.search(f"error: .*{message}", got.err), got.err
    assert len(got.err.splitlines()) == 1 and "Traceback" not in got.err, got.err
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in foreign.iterdir())
    assert not (tmp_path / "out" / "metrics.jsonl").exists()  # see Run.open
    if name in ("the same in the warmup", "data file that does not exist"):
        assert forked(line_of(stage)).status == 0

@pytest.mark.parametrize("field, told", [
    ("extra: int = 1  # ours: a knob", False), ("extra: float = 0.5 # ours: one space", False),
    ('extra: str = "#"  # ours: a sign', False), ("extra: int = 1", True),
    ("# ours: the comment above\n    extra: int = 1", True), ("extra: int = 1  #", True)])
def test_a_field_without_its_comment_is_one_line(field, told, tmp_path, monkeypatch):
    """A fork's author meets it, in any script: the line names the field."""
    for name, base in (("fork_a", "common.StageConfig"), ("fork_b", "grpo.Config")):
        path = tmp_path / f"{name}.py"
        path.write_text("import common, grpo\nfrom dataclasses import dataclass\n\n@dataclass\n"
                        f"class Config({base}):\n    {field}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        config = importlib.import_module(name).Config
        flags = ["--model", "m"] if base == "grpo.Config" else []
        if told:
            with pytest.raises(common.UserError, match="Config.extra has no `# help text`"):
                common.parse_args(config, "", flags)
        else:
            assert common.parse_args(config, "", [*flags, "--extra", "2"]).extra in (2, "2")
            assert common.field_comments(config)["extra"][1].startswith("ours: ")

# --- a verifier of one's own

VERIFIER = """import math

def verify(response, answer):
    return len(response) / 100 - 0.05
"""
BAD_VERIFIERS = {  # name: (the file, what the message says)
    "import error": ("import nobody\n", "ModuleNotFoundError.*nobody"),
    "syntax error": ("def verify(response, answer):\n    return (1\n", "SyntaxError.*closed"),
    "no verify": ("def verified(response, answer):\n    return 1\n", "KeyError.*verify"),
    "exception": ("def verify(r, a):\n    return r[99_999]\n", "IndexError"),
    "NaN": ("def verify(r, a):\n    return float('nan')\n", "ValueError.*not finite"),
    "infinite": ("def verify(r, a):\n    return float('inf')\n", "ValueError.*not finite"),
    "None": ("def verify(r, a):\n    pass\n", "TypeError.*NoneType"),
    "a word": ("def verify(r, a):\n    return 'correct'\n", "ValueError.*'correct'"),
    "one argument": ("def verify(r):\n    return 1\n", "TypeError.*argument")}

@pytest.mark.parametrize("name", BAD_VERIFIERS)
def test_a_mistake_in_a_verifier_is_one_line(name, line_of, tmp_path):
    text, message = BAD_VERIFIERS[name]
    path, out = tmp_path / "my.py", tmp_path / "out"
    path.write_text(text)
    with pytest.raises(common.UserError, match=f"--verifier {path}, .*: {message}") as told:
        common.judge([("some text", "7")], str(path))
    assert "\n" not in str(told.value)
    if name in ("import error", "exception", "None"):  # before a step, and in the first
        got = forked(line_of("grpo", f"--verifier {path} --steps 1"))
        assert got.status == 1 and re.fullmatch(f"error: --verifier {path}.*{message}.*", got.err)
        assert (out / "config.json").exists() != (name == "import error")

@pytest.mark.parametrize("stage, flags", [("grpo", ""), ("opd", "--sparse-weight 0.5"),
                                          ("fkl_warmup", "--targets hard --only-correct")])
def test_a_verifier_of_ones_own(stage, flags, line_of, tmp_path):
    """Its values are the rewards; above 0 a response is kept. Another one is another run."""
    path, out = tmp_path / "my.py", tmp_path / "out"
    path.write_text(VERIFIER)
    line = line_of(stage, f"--verifier {path} --steps 1 --prompts 2 {flags}"
                   + " --mini-batch 2" * (stage == "grpo"))
    got = forked(line)
    assert got.status == 0, got.err
    record, (row,) = common.read_record(out), metrics(out)
    assert len(record["settings"]["verifier"]) == 12
    if stage == "fkl_warmup":
        tokens = common.describe_lm(str(out)).tokenizer
        cache = common.read_json_lines(out / "rollouts.jsonl")[1:]
        texts = [tokens.decode(r, skip_special_tokens=True) for x in cache for r in x["responses"]]
        assert len(texts) == 32
        assert f"{sum(len(text) > 5 for text in texts)} responses to" in got.out
    else:
        assert 0 < row["reward"] < 0.5 and row["reward"] * 800 % 100
    path.write_text(VERIFIER + "# a remark\n")
    got = forked(line)
    assert got.status == 1 and re.search(r"verifier was '\w+', is now '\w+'", got.err), got.err

def test_a_constant_group_of_any_reward_has_no_advantage(tmp_path, teacher_lm):
    """In fp32 the mean of seven 0.1 is not 0.1. Labels of exact problems; values beyond 0 and 1."""
    path = tmp_path / "my.py"
    path.write_text("def verify(response, answer):\n    return float(answer)\n")
    for k in (2, 3, 5, 7, 8, 16):
        rows = [common.Rollout([5], [6, 7], [], True)] * (3 * k)
        rewards, logged = SCRIPTS["grpo"].reward_groups(
            teacher_lm.tokenizer, rows, ["0.1", "-7.7", "1e7"], str(path))
        assert rewards.tolist() == [[pytest.approx(float(x))] * k for x in ("0.1", "-7.7", "1e7")]
        assert logged["zero_variance"] == 1
        for adv in (SCRIPTS["grpo"].advantages(rewards), SCRIPTS["opd"].sparse_advantages(rewards)):
            assert not adv.any()

def test_with_a_verifier_texts_that_differ_are_two_problems(tmp_path):
    """Case may matter there; spaces around a text do not."""
    data, path = tmp_path / "d.jsonl", tmp_path / "my.py"
    path.write_text(VERIFIER)
    data.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in (
        ("Reverse: Abc", "cbA"), ("Reverse: abc", "cba"), (" Reverse: abc ", "cba"),
        ("Half?", "1/2"), ("Half?", "0.5"), ("$x$", "1"), ("x", "1"))))
    def texts(verifier):
        cfg = common.StageConfig(data=str(data), exclude="none", verifier=verifier)
        return sorted(p.problem for p in common.load_problems(cfg))
    assert texts("") == ["$x$", "Half?", "Reverse: Abc"]
    assert texts(str(path)) == ["$x$", "Half?", "Reverse: Abc", "Reverse: abc", "x"]

# --- labels

def test_labels_are_what_steps_and_parents_drew(small_line, taught, tmp_path, world):
    """Stage 3 after a stage 1 on 1H that drew two of its four problems. Fresh are those of 2H; the
    same half again, also from a copy of the file, or the whole have some of them: it is told."""
    copy = shutil.copy(taught.data, tmp_path / "copy.jsonl")

    def run(name, line):
        got = forked(small_line(*line))
        assert got.status == 0, got.err
        own, again = re.search(r"(\d+) labelled problems, (\d+) of them used", got.out).groups()
        labels = common.read_json_lines(tmp_path / name / "labels.jsonl")
        return int(own), int(again), len(set(labels))

    def grpo(name, flags, model="bridge", n=4):
        return run(name, ("grpo", tmp_path / name, f"--prompts {n} --mini-batch {n} --steps 1 "
                          f"--kl-coef 0 --model {tmp_path / model} {flags}"))

    assert grpo("teacher", "--half 1", taught.model, n=2) == (2, 0, 2)
    shutil.copytree(world / "init-student", tmp_path / "student")
    assert run("bridge", ("opd", tmp_path / "bridge", f"--teacher {tmp_path}/teacher --half 1 "
                          "--steps 1 --prompts 2")) == (0, 0, 2)
    assert grpo("fresh", "--half 2") == (4, 0, 6)
    assert grpo("replay", "--half 1") == (4, 2, 4)
    assert grpo("copied", f"--half 1 --data {copy}") == (4, 2, 4)
    assert grpo("all", "--half all", n=8) == (8, 2, 8)

def test_same_command_twice_and_another_run_in_the_same_folder(line_of, tmp_path):
    """Twice: "already finished", nothing rewritten. Other settings: refused by name.

    Memory flags are no other settings.
    """
    line = line_of("opd")
    assert forked(line).status == 0
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    for flags in ("", " --micro-tokens 100 --sample-rows 3 --vocab-chunk 5 --save-every 1"):
        again = forked(line + flags)
        assert (again.status, again.err) == (0, "") and "already finished" in again.out
    other = forked(line + " --seed 5")
    assert other.status == 1 and len(other.err.splitlines()) == 1
    assert re.search("seed was 0, is now 5", other.err)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp

def test_teacher_rollouts_are_reused_when_they_match_and_refused_when_not(line_of, tmp_path, world):
    """One cache serves soft and hard targets; another temperature, seed or teacher is refused."""
    path = tmp_path / "rollouts.jsonl"

    def run(name, flags):
        return forked(line_of("fkl_warmup", f"--cache {path} --out {tmp_path}/{name} {flags}"))

    assert "0 prompts reused, 8 to sample" in run("a", "").out
    stored = path.read_bytes()
    assert "8 prompts reused, 0 to sample" in run("b", "--targets hard").out
    other = f"--teacher {world}/init-teacher"
    for flags in ("--temperature 0.7", "--seed 3", "--rollouts 2", other):
        got = run("c", flags)
        assert got.status == 1 and "rollouts.jsonl holds rollouts of another" in got.err, got.err
    assert path.read_bytes() == stored

@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_the_flags_of_the_script_before_those_of_all_stages(stage, capsys):
    config = importlib.import_module(stage).Config
    with pytest.raises(SystemExit):
        common.parse_args(config, "", ["--help"])
    flags = re.findall(r"^  __(\w+)", capsys.readouterr().out.replace("-", "_"), re.M)
    titles = common.field_comments(config)
    for title in {titles[flag][0] for flag in flags}:
        group = [flag not in config.__annotations__ for flag in flags if titles[flag][0] == title]
        assert group == sorted(group), title
