"""The word problems: right, all different, a function of the seed; and the student of half a model.

The problems are judged by another reader than their writer: it knows the sentences by a few words.
"""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import words
from conftest import children
from world import make_model

SIZES = {"train": 200, "valid": 20, "test": 40, "corpus": 800}
OPERATIONS = {  # the first that fits
    "{x} * {y}": "boxes|bags|friends|days|times as many", "{x} / {y}": "piles|shares",
    "{x} - {y}": "gives|sells|loses|lends", "{x} + {y}": "buys|gets|finds|wins"}

def read(folder):
    return {name: [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in SIZES}

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return words.build(tmp_path_factory.mktemp("words"), seed=3, **SIZES)

def solve(problem):
    """The answer to a story, from its numbers and its verbs."""
    (story, question), value = problem.split(". "), None
    assert story.split()[0] in question.split() or "left" in question
    for part in story.split(", "):
        numbers = [int(n) for n in re.findall(r"\d+", part)]
        if value is None and len(numbers) == 1:
            value = numbers[0]
            continue
        x, y = numbers if value is None else [value, *numbers]
        value = eval(next(op for op, verbs in OPERATIONS.items() if re.search(verbs, part))
                     .format(x=x, y=y))
    return value

def test_answers_are_right(folder):
    """The answer of every problem, and the box of every worked one, is what the text asks for."""
    for name, rows in read(folder).items():
        for row in rows:
            answer = f"{solve(row['problem']):g}"
            assert row["answer"] == answer and ("response" in row) == (name == "corpus"), row
            if name == "corpus":
                assert row["response"].endswith(f"\n\\boxed{{{answer}}}"), row

def test_worked_lines_chain(folder):
    """Each line of a solution is true by Python's arithmetic and starts from the result before."""
    for row in read(folder)["corpus"]:
        *lines, box = row["response"].split("\n")
        result = None
        for line in lines:
            x, op, y, z = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            assert eval(f"{x} {op} {y}") == int(z) and result in (None, x), row
            result = z
        assert box == f"\\boxed{{{result}}}" and 1 <= int(result) <= words.LARGEST
        assert len(lines) in (2, 3)

def test_sets_are_disjoint(tmp_path, monkeypatch):
    """No problem occurs twice, in whatever sets, even where 80 are drawn from 84."""
    monkeypatch.setattr(words, "make_problem", lambda rng, k: dict.fromkeys(
        ("problem", "response", "answer"), str(rng.randrange(84))))
    sets = read(words.build(tmp_path, **dict.fromkeys(SIZES, 20)))
    assert len({row["problem"] for rows in sets.values() for row in rows}) == 80

def test_problems_vary(folder):
    """Every name, thing and operation occurs; most stories differ in more than these."""
    rows = read(folder)["corpus"]
    text = " ".join(row["problem"] + row["response"] for row in rows)
    assert all(word in text for word in [*words.NAMES, *words.OBJECTS, *"+-*/"])
    shapes = {re.sub("|".join([r"\d+", *words.NAMES, *words.OBJECTS]), "_", row["problem"])
              for row in rows}
    assert len(shapes) > len(rows) / 2

def test_same_seed_same_files(folder, tmp_path):
    """A seed gives the same bytes each time; another seed gives other problems."""
    again, other = (words.build(tmp_path / str(s), seed=s, **SIZES) for s in (3, 4))
    for name in SIZES:
        assert (again / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()
        assert (other / f"{name}.jsonl").read_bytes() != (folder / f"{name}.jsonl").read_bytes()

def test_no_seed_hangs():
    """Every start leads to an end: 5,000 stories, in a child that has two minutes."""
    rng = words.random.Random(0)
    assert children(lambda: [words.make_problem(rng, 3) for _ in range(5_000)])[0].status == 0

def test_half_of_the_layers(world, tmp_path):
    """The student is the layers that words.json names, the model's other weights and its tokenizer,
    and any tool loads it."""
    tokenizer = AutoTokenizer.from_pretrained(world / "init-teacher")
    make_model((16, 9, 2, 8, 32), 0.1, len(tokenizer), 0).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    out = words.build(tmp_path / "out", model=str(tmp_path / "whole"), train=1, corpus=1)
    kept = json.loads((out / "words.json").read_text())["layers"]
    assert len(kept) == 4 and kept == sorted(set(kept)) and (kept[0], kept[-1]) == (0, 8)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    half = AutoModelForCausalLM.from_pretrained(out / "half-student")
    assert len(half.model.layers) == half.config.num_hidden_layers == len(half.config.layer_types)
    for name, weight in half.state_dict().items():
        source = re.sub(r"layers\.(\d+)", lambda m: f"layers.{kept[int(m[1])]}", name)
        assert torch.equal(weight, whole[source]), name
    assert AutoTokenizer.from_pretrained(out / "half-student").get_vocab() == tokenizer.get_vocab()
