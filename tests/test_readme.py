"""The README and the help texts stay true: equation table, commands, flags, tables of numbers."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common

ROOT = Path(common.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("grpo", "fkl_warmup", "opd", "evaluate")


def commands():
    """Every `python script.py ...`, or with torchrun, of the README's code blocks and of the
    scripts' docstrings."""
    texts = re.findall(r"```sh\n(.*?)```", README, re.S)
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
    named = re.findall(r"`(grpo|fkl_warmup|opd|evaluate)\.py ([^`]*)`", README)
    assert len(named) > 10
    for script, flags in named:
        module = importlib.import_module(script)
        known = {"--" + f.replace("_", "-") for f in common.field_comments(module.Config)}
        known |= {flag.replace("--", "--no-", 1) for flag in known}
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, (script, flags)


def test_equation_table_points_at_the_lines():
    """Each row names file:line of a definition, which names the equation."""
    rows = re.findall(r"^\| (.*?) \| .*? \| `(\w+)` in \[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) \|$",
                      README, re.M)
    assert len(rows) >= 8
    for equation, name, file, line, linked, anchor in rows:
        lines = (ROOT / file).read_text().splitlines()
        assert (file, line) == (linked, anchor)
        right = 1 + next(i for i, text in enumerate(lines) if text.startswith(f"def {name}("))
        assert int(line) == right, f"{equation}: {name} is at {file}:{right}"
        if equation.startswith("Eq."):
            near = " ".join(lines[right - 1 : right + 9])
            assert equation in near, f"{equation} is not named in {name}"


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


def test_tests_named_in_the_table_of_promises_exist():
    """Each row names a test, in tests/test_faults.py or in the file in brackets after it."""
    section = README.split("## Rough weather")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!promise|---)(.*?) \| (.*) \|$", section, re.M)
    assert len(rows) > 20
    for promise, cell in rows:
        names = re.findall(r"`(test_\w+)`", cell)
        files = set(re.findall(r"`(test_\w+\.py)`", cell)) | {"test_faults.py"}
        text = "".join((ROOT / "tests" / file).read_text() for file in files)
        assert names, promise
        for name in names:
            assert f"def {name}(" in text, f"{promise}: {name}"


@pytest.mark.parametrize("name", ["common", *SCRIPTS])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
