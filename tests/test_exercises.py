"""Each bug of tests/lab/exercises.py fails the test that it names, which passes without it.

(That it passes without it is what the rest of the suite shows.)
"""

import importlib
import json
import subprocess
import sys

import exercises
import pytest
from conftest import ROOT
from exercises import EXERCISES

import common

# Imports what takes long once; each planted copy is then tested in a fork of its own.
DRIVER = """
import json, os, sys
import pytest, torch, transformers
from transformers import Qwen3ForCausalLM

class Failures:
    seen = []
    def pytest_exception_interact(self, node, call, report):
        self.seen.append([node.nodeid, report.when, call.excinfo.type.__name__])

def forked(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def judge(folder, test):
    os.chdir(folder)
    status = pytest.main(["-q", "-p", "no:cacheprovider", test], plugins=[Failures()])
    with open("verdict.json", "w") as file:
        json.dump([status, Failures.seen], file)

def judge_all(jobs):
    for job in jobs:
        os.waitpid(forked(lambda: judge(*job)), 0)

jobs = json.loads(sys.argv[1])
for child in [forked(lambda: judge_all(jobs[half::2])) for half in (0, 1)]:
    os.waitpid(child, 0)
"""

@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Of each exercise's test in a copy with its bug: exit status, [[test, phase, exception]]."""
    folders = [tmp_path_factory.mktemp("planted") for _ in EXERCISES]
    for exercise, folder in zip(EXERCISES, folders):
        exercises.plant(exercise, folder)
    jobs = json.dumps([(str(f), e.test) for f, e in zip(folders, EXERCISES)])
    done = subprocess.run([sys.executable, "-c", DRIVER, jobs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "verdict.json").read_text()) for folder in folders]

@pytest.mark.parametrize("number", range(1, len(EXERCISES) + 1))
def test_the_named_test_catches_the_bug(number, verdicts):
    """One failure: an assertion, while the test itself runs, not an error of import or fixture."""
    test = EXERCISES[number - 1].test
    assert verdicts[number - 1] == [1, [[test, "call", "AssertionError"]]]

@pytest.mark.parametrize("number", range(1, len(EXERCISES) + 1))
def test_a_copy_differs_in_the_planted_edit_only(number, tmp_path):
    """It has no list of exercises, which would tell. The command is told, the answer if asked."""
    exercise, folder = EXERCISES[number - 1], tmp_path / "copy"
    told = exercises.main("plant", str(number), str(folder))
    assert str(folder) in told and f"python {exercise.line}" in told
    assert not tells(told, exercise) and tells(exercises.main("answer", str(number)), exercise)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"opd.py", "README.md", "run_all.sh", "tests/world.py", "tests/lab/why.py"} <= files
    assert not {"tests/lab/exercises.py", "tests/test_exercises.py"} & files
    differ = [f for f in files if (folder / f).read_text() != (ROOT / f).read_text()]
    assert differ == [exercise.file]
    planted, text = (folder / exercise.file).read_text(), (ROOT / exercise.file).read_text()
    assert planted.replace(exercise.new, exercise.old) == text
    with pytest.raises(SystemExit, match="not an empty folder"):
        exercises.main("plant", "random", str(folder))

def test_an_edit_that_no_longer_fits_says_so():
    stale = EXERCISES[0]._replace(old="return")
    with pytest.raises(ValueError, match="stale exercise: opd.py has .* times 'return'"):
        exercises.planted(stale)

def tells(text, exercise):
    """Whether a text gives the answer away."""
    lines = [*exercise.old.split("\n"), *exercise.new.split("\n")]
    return any(x in text for x in (*lines, exercise.why, exercise.test))

def test_the_list_has_every_symptom_and_no_answer_and_commands_that_parse():
    text = exercises.main("list")
    for exercise in EXERCISES:
        assert exercise.symptom in text and exercise.measured in text and exercise.line in text
        assert not tells(text, exercise)
        script, *flags = exercise.line.split()
        module = importlib.import_module(script.removesuffix(".py"))
        common.parse_args(module.Config, module.__doc__, flags)

@pytest.mark.parametrize("words", ["", "answer 0", "plant 1", "answer 1 there", "show 1",
                                   "plant 1 here there"])
def test_other_words_get_the_usage(words):
    with pytest.raises(SystemExit, match="plant 3 runs/three"):
        exercises.main(*words.split())

def test_the_readme_has_every_exercise():
    readme = " ".join((ROOT / "tests" / "README.md").read_text().split())
    for number, exercise in enumerate(EXERCISES, 1):
        symptom = exercise.symptom[0].upper() + exercise.symptom[1:]
        assert f"{number}. {symptom}. Seen: {exercise.measured}" in readme
        assert not tells(readme, exercise)
