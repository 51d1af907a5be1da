"""Both READMEs and the help texts stay true: commands, flags, line numbers, tables, links, budgets.

    PYTHONPATH=. python tests/test_readme.py    # writes today's line numbers into the README
"""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common

ROOT = Path(common.__file__).parent
README, LAB = ((ROOT / path).read_text() for path in ("README.md", "tests/README.md"))
SCRIPTS = ("grpo", "fkl_warmup", "opd", "evaluate")

def commands():
    """Every `python script.py ...`, or with torchrun, of the READMEs' code blocks and of the
    scripts' docstrings."""
    texts = re.findall(r"```sh\n(.*?)```", README + LAB, re.S)
    texts += [importlib.import_module(name).__doc__ for name in SCRIPTS]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^torchrun .*?(\w+\.py)", r"python \1", line.strip()) for line in lines]
    found = [line.split("#")[0].strip() for line in lines if line.startswith("python ")]
    return [line for line in found if line.split()[1].removesuffix(".py") in SCRIPTS]

@pytest.mark.parametrize("line", commands())
def test_commands_parse_as_a_user_types_them(line):
    _, script, *flags = shlex.split(line)
    module = importlib.import_module(script.removesuffix(".py"))
    common.parse_args(module.Config, module.__doc__, flags)

def test_flags_named_in_the_tables_exist():
    """`grpo.py --clip-high 0.28` and the like: the flag belongs to that script."""
    named = re.findall(r"`(grpo|fkl_warmup|opd|evaluate)\.py ([^`]*)`", README + LAB)
    assert len(named) > 10
    for script, flags in named:
        module = importlib.import_module(script)
        known = {"--" + f.replace("_", "-") for f in common.field_comments(module.Config)}
        known |= {flag.replace("--", "--no-", 1) for flag in known}
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, (script, flags)

def with_right_lines(text):
    """The README with the lines of today in its equation table: `name` in [file:n](file#Ln)."""
    def row(match):
        equation, name, file = match.group(1, 2, 3)
        lines = (ROOT / file).read_text().splitlines()
        n = 1 + next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        near = " ".join(lines[n - 1 : n + 9])
        assert not equation.startswith("Eq.") or equation in near, f"{equation} not in {name}"
        return re.sub(r" in \[.*", f" in [{file}:{n}]({file}#L{n}) |", match[0])

    pattern = r"^\| (.*?) \| .*? \| `(\w+)` in \[(\w+\.py):\d+\]\(\w+\.py#L\d+\) \|$"
    text, found = re.subn(pattern, row, text, flags=re.M)
    assert found >= 8
    return text

def test_equation_table_points_at_the_lines():
    """Each row names file:line of a definition, which names the equation."""
    assert set(with_right_lines(README).splitlines()) - set(README.splitlines()) == set()

def test_every_knob_says_where_its_value_comes_from():
    for script in SCRIPTS:
        for name, (group, comment) in common.field_comments(
                importlib.import_module(script).Config).items():
            sourced = re.search(r"Table|ours|Section", comment)
            assert sourced or "change no result" in group, f"{script}: --{name}: {comment}"

def test_shared_flags_have_one_help_text():
    """What opd.py and fkl_warmup.py both have, they describe in the same words."""
    opd, fkl = (common.field_comments(importlib.import_module(n).Config) for n in SCRIPTS[1:3])
    for name in set(opd) & set(fkl) - {"teacher"}:
        assert opd[name][1] == fkl[name][1], name

def test_metrics_named_in_the_glossary_are_those_that_are_logged():
    glossary = README.split("## Metrics")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", glossary, re.M))))
    for word in ("reward", "zero_variance", "kl", "kl_std", "entropy", "k3_ref", "clip_fraction",
                 "sampler_gap", "grad_norm", "skipped", "length", "truncated", "tokens", "seconds",
                 "nll"):
        assert word in named
    code = "".join((ROOT / f"{name}.py").read_text() for name in (*SCRIPTS, "common"))
    for word in named - {"tokens_per_second"}:
        assert re.search(rf"\b{word}\b", code), word

def test_tests_named_in_the_tables_of_promises_exist():
    """A table a file, after a line "In `test_file.py`:"; each row names one of its tests."""
    section, rows = LAB.split("## Promises")[1].split("\n## ")[0], 0
    for file, table in re.findall(r"[Ii]n `(test_\w+\.py)`:\n\n((?:\|.*\n)+)", section):
        text = (ROOT / "tests" / file).read_text()
        for line in table.splitlines()[2:]:
            promise, name = re.fullmatch(r"\| (.+) \| `(test_\w+)` \|", line).groups()
            assert f"def {name}(" in text, f"{file}: {promise}: {name}"
            rows += 1
    assert rows > 30

@pytest.mark.parametrize("path", ["README.md", "tests/README.md"])
def test_links_and_files_that_are_named_exist(path):
    text, folder = (ROOT / path).read_text(), (ROOT / path).parent
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (folder / target).exists(), target
    for name in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / name).exists(), name
    assert "TODO" not in text

@pytest.mark.parametrize("files, most", [
    ("common.py", 1900), ("evaluate.py", 300), ("grpo.py fkl_warmup.py opd.py", 640),
    ("run_all.sh", 150), ("README.md", 320)])
def test_budgets_of_lines(files, most):
    assert sum(len((ROOT / f).read_text().splitlines()) for f in files.split()) <= most

@pytest.mark.parametrize("folder", ["", "tests", "tests/lab"])
def test_lines_are_short(folder):
    for glob, most in (("*.py", 100), ("README.md", 119)):
        for path in (ROOT / folder).glob(glob):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert len(line) <= most, f"{path}:{number}"

@pytest.mark.parametrize("name", ["common", *SCRIPTS])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0

if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_right_lines(README))
