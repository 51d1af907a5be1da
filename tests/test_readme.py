"""Both READMEs and the help texts stay true: commands, flags, line numbers, tables, links, budgets.

    PYTHONPATH=. python tests/test_readme.py    # writes today's line numbers, and the figures of
                                                # seeds.md, distance.md, into tables of the README
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
    assert with_right_lines(README) == README

def table_rows(text):
    """The cells of each row of the table that a text begins with, without its head."""
    lines = text.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

def seeds_table(head):
    """{first cell: the others} of the table below a heading of tests/seeds.md."""
    text = (ROOT / "tests/seeds.md").read_text().split(f"## {head}\n\n")[1]
    return {name: cells for name, *cells in table_rows(text)}

ROUTES = seeds_table("Routes")
PAPERS = seeds_table("Orderings of the paper")
DIFFERENCES = PAPERS | seeds_table("More differences")
PRINCIPLE = {  # the README's words for rows of tests/seeds.md
    "bridge from the base teacher < cold GRPO": "O1: raw-bridge < cold-grpo",
    "cold GRPO < bridge from the RL'd teacher": "O2: cold-grpo < bridge",
    "bridge from the base teacher < from the SFT'd teacher": "O3: raw-bridge < sft-teacher-bridge",
    "bridge from the SFT'd teacher < from the RL'd teacher": "O3: sft-teacher-bridge < bridge",
    "SFT on the teacher's samples < OPD alone, as many updates as the bridge":
        "O4: sft < opd-only-long",
    "OPD alone, as many updates as the bridge's OPD < bridge": "O4: opd-only < bridge",
    "OPD alone, as many updates as the bridge < bridge": "O4: opd-only-long < bridge",
    "bridge on 1H < the same, then GRPO on fresh labels": "O5: bridge-1h < fresh-2h",
    "bridge on 1H, then GRPO on 1H again < then GRPO on fresh labels": "O6: replay-1h < fresh-2h",
    "bridge on 1H ≈ the same, then GRPO on 1H again": "O7: bridge-1h ≈ replay-1h",
    "cold GRPO < bridge from that model into a fresh student": "O8: cold-grpo < same-size-bridge",
    "half of the labels kept for stage 3 ≤ all to the teacher": "O9: fresh-2h ≤ bridge",
    "what GRPO on 2H gains: the cold student < the bridge on 1H":
        "gain: cold-grpo-2h − base-student < fresh-2h − bridge-1h"}

def section(text, head):
    return re.split("\n##+ ", text.split(f"\n{head}\n")[1])[0]

def with_figures_of_the_seeds(text):
    """The README with the figures on `test` of tests/seeds.md in the table of its principle."""
    for words, name in PRINCIPLE.items():
        on_test, *_, paper = DIFFERENCES[name]
        said, figures = re.fullmatch(r"(.+): (.+), \d+ of \d+|-", on_test).groups("-")
        row = f"| {name.split(':')[0]} | {words} | {figures} | {said} | {paper} |"
        text, found = re.subn(rf"^\| \w+ \| {re.escape(words)} \|.*$", row, text, flags=re.M)
        assert found == 1, words
    return text

def with_figures_of_the_distances(text):
    """The README with the figures of tests/distance.md in the table of the warmup's worth."""
    cells = table_rows((ROOT / "tests/distance.md").read_text().split("\n\n", 2)[2])
    for distance in dict.fromkeys(d for _, d, *_ in cells):
        rows = [row for row in cells if row[1] == distance]
        figures = " | ".join([distance, rows[0][3], *(cell for row in rows for cell in row[8:10])])
        text, found = re.subn(rf"^\| {distance} \|.*\|$", f"| {figures} |", text, flags=re.M)
        assert found == 1, distance
    assert len(re.findall(r"^\| [\d.]+ \|", text, re.M)) == len({row[1] for row in cells})
    return text

def test_the_table_of_distances_has_the_figures_of_its_sweep():
    assert with_figures_of_the_distances(README) == README

def test_the_principles_table_has_the_figures_of_the_seeds():
    assert with_figures_of_the_seeds(README) == README
    table = re.findall(r"^\| \w+ \| .*[<≈≤].*$", section(README, "## The principle seen"), re.M)
    assert len(table) == len(PRINCIPLE)

def wrong_figures(text):
    """What prose says of several seeds and tests/seeds.md does not, of either set: `+1.0 (+0.0 to
    +1.9)`, the mean of a difference and its interval, must be that of a row which its paragraph
    names, by `O7` or by its routes in backquotes; `93.4 %` the mean of a route named so."""
    wrong, number = [], r"([+-]?\d+\.\d)"
    for paragraph in re.split(r"\n\n|\n- ", text.replace("−", "-")):
        if paragraph.startswith(("|", "#", "```")):
            continue
        plain = " ".join(paragraph.split())
        named = set(re.findall(r"`([^`]+)`", plain)) | set(re.findall(r"O\d|R\d|Table \d", plain))
        cells = [cell for name, row in DIFFERENCES.items() for cell in row[:2]
                 if name.split(": ")[0] in named
                 or set(re.split(" [<≈≤−] ", name.split(": ")[1])) <= named]
        for *found, end in re.findall(rf"(?:{number} \()?{number} to {number}(\)?)", plain):
            figures = "{} ({} to {})".format(*(x and f"{float(x):+.1f}" for x in found))
            if not (found[0] and end and any(figures in cell for cell in cells)):
                wrong.append(f"{figures} is none of {cells}")
        cells = [cell for route in named & ROUTES.keys() for cell in ROUTES[route][:2]]
        for mean in re.findall(r"(\d+\.\d) %", plain):
            if not any(cell.startswith(f"{mean} ±") for cell in cells):
                wrong.append(f"{mean} % is none of {cells}")
    return wrong

@pytest.mark.parametrize("text, head", [
    (README, "## The principle seen"), (LAB, "### Does the paper's ordering appear?"),
    (LAB, "### Two orderings that want another world"), (LAB, "### How many labels?"),
    (LAB, "### Between dense and sparse")])
def test_figures_in_the_prose_are_those_of_the_seeds(text, head):
    wrong = wrong_figures(section(text, head))
    assert not wrong, "\n".join(wrong)

def test_a_wrong_figure_is_found():
    """A changed digit, another row's figure, an interval without its mean, an unnamed route."""
    on_test, on_hard, _ = PAPERS["O7: bridge-1h ≈ replay-1h"]
    figures = [re.search(r"[+-].*\)", cell)[0] for cell in (on_test, on_hard)]
    mean = ROUTES["teacher-rl"][0].split(" ±")[0]
    right = f"O7: {figures[0]}, {figures[1].replace('-', '−')}; `teacher-rl` {mean} %"
    assert wrong_figures(right) == []
    digit = str((int(figures[0][1]) + 1) % 10)
    for old, new in (("O7", "O8"), (figures[0][1], digit), (" (", ", "), (")", ""), ("`", ""),
                     (figures[0][:6], "("), (f"{mean} %", f"9{mean} %")):
        assert wrong_figures(right.replace(old, new, 1)), new
    assert wrong_figures(f"`bridge-1h` and `replay-1h`: {figures[0]}") == []

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

GLOSSARY = set(re.findall(r"`(\w+)`", "\n".join(
    re.findall(r"^\| (`.*?) \|", section(README, "## Metrics"), re.M))))  # test_cli reads it, too

def test_metrics_named_in_the_glossary_are_logged():
    code = "".join((ROOT / f"{name}.py").read_text() for name in (*SCRIPTS, "common"))
    for word in GLOSSARY:
        assert re.search(rf"\b{word}=|\"{word}\"", code), word

def test_tests_named_in_the_tables_of_promises_exist():
    """A table a file, after a line "In `test_file.py`:"; each row names one of its tests. All other
    tests that are named are somewhere."""
    section, rows = LAB.split("## Promises")[1].split("\n## ")[0], 0
    for file, table in re.findall(r"[Ii]n `(test_\w+\.py)`:\n\n((?:\|.*\n)+)", section):
        text = (ROOT / "tests" / file).read_text()
        for line in table.splitlines()[2:]:
            promise, name = re.fullmatch(r"\| (.+) \| `(test_\w+)` \|", line).groups()
            assert f"def {name}(" in text, f"{file}: {promise}: {name}"
            rows += 1
    assert rows > 30
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", LAB):
        assert f"def {name}(" in code, name

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
    right = with_figures_of_the_distances(with_figures_of_the_seeds(with_right_lines(README)))
    (ROOT / "README.md").write_text(right)
