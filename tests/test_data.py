"""Data: every schema of the field, file formats, deduplication, decontamination, halves, order.

Each expected value is written down by hand; nothing is computed with the function under test.
"""

import csv
import datetime
import decimal
import gzip
import json
import math
import os
import random
import re
import time
from collections import Counter

import datasets
import pytest

import common
import evaluate
from common import (UserError, batch_indices, find_question, grade, read_json_lines, read_problems,
                    read_rows, to_problem, tokenize_problems)
from fkl_warmup import Config, worked_examples

PREFIX = ("Solve the following math problem step by step. The last line of your response should be "
          "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
          "\n\n")
SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

def dapo(problem, answer, index="9a9b6eb4"):
    return {"data_source": "math_dapo", "ability": "MATH",
            "prompt": [{"role": "user", "content": PREFIX + problem + SUFFIX}],
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": index}}

SCHEMAS = {  # name: (row, its question, its answer)
    "dapo": (dapo("In $\\triangle ABC$ find $a$.\nGive an integer.", "-1024"),
             "In $\\triangle ABC$ find $a$.\nGive an integer.", "-1024"),
    "open-r1 processed": (
        {**dapo("Find $x$.", "4"), "prompt": "Find $x$.", "solution": "4"}, "Find $x$.", "4"),
    "math-500": (
        {"problem": "Convert $(0,3)$.", "answer": "\\left(3,\\pi\\right)", "level": 2,
         "solution": "We have $r=3$, so \\boxed{\\left( 3, \\pi \\right)}."},
        "Convert $(0,3)$.", "\\left(3,\\pi\\right)"),
    "aime24 HuggingFaceH4": (
        {"id": 60, "problem": "Aya walks.", "solution": "... \\boxed{204}", "answer": "033"},
        "Aya walks.", "033"),
    "aime24 Maxwell-Jia": (
        {"ID": "2024-II-4", "Problem": "Let $x,y$ be reals.", "Solution": "We get \\boxed{33}.",
         "Answer": 0}, "Let $x,y$ be reals.", "0"),
    "aime25 opencompass": (
        {"question": "Find the sum.", "answer": "336^\\circ"}, "Find the sum.", "336^\\circ"),
    "gsm8k": (
        {"question": "Ann sells 1,000 pens and 234 more. How many?",
         "answer": "She sells 1000+234 = <<1000+234=1234>>1,234 pens.\n#### 1,234"},
        "Ann sells 1,000 pens and 234 more. How many?", "1,234"),
    "MATH, boxed solution only": (
        {"problem": "Add halves.", "level": "Level 1",
         "solution": "First \\boxed{1} is wrong; the sum is $\\boxed{\\frac{3}{2}}$."},
        "Add halves.", "\\frac{3}{2}"),
    "the last message of the user": (
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
                    {"role": "assistant", "content": "Let me think."}], "answer": 4}, "2+2?", "4"),
}

def settings(**changes):
    return Config(student="", **{"exclude": "none", **changes})

def load_problems(path, **changes):
    """Problems as (question, answer)."""
    found = common.load_problems(settings(data=str(path), **changes))
    return [(p.problem, p.answer) for p in found]

def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

def write_as(kind, folder, rows):
    """Store rows in one of the formats that --data takes; returns what a user would type."""
    path = folder / ("d" if "folder" in kind else f"d[1].{kind}")
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_lines(path, rows)
    elif kind == "folder of files":
        path.mkdir()
        write_lines(path / "train.jsonl", rows)
    else:
        table = datasets.Dataset.from_list(rows)
        (table.to_parquet if kind == "parquet" else table.save_to_disk)(str(path))
    return str(path)

@pytest.mark.parametrize("schema, kind", [
    *((schema, "jsonl") for schema in SCHEMAS), ("gsm8k", "csv"), ("aime24 Maxwell-Jia", "csv"),
    *((schema, kind) for schema in ("dapo", "aime24 Maxwell-Jia")
      for kind in ("json", "parquet", "folder of files", "saved folder"))])
def test_every_schema_gives_the_bare_question_and_the_final_answer(schema, kind, tmp_path):
    """Nested, plain and capitalised fields read the same from every file format."""
    row, question, answer = SCHEMAS[schema]
    got = read_problems(write_as(kind, tmp_path, [row, row]), to_problem)
    assert [(p.problem, p.answer) for p in got] == [(question, answer)] * 2

@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_files_are_read_as_they_stand(kind, tmp_path):
    """Answers keep their digits and look, though `datasets` would fit a column to one type: dates,
    numbers of 30 digits, a type that comes after 10 MB, a field that only later rows have."""
    answers = ["2024-01-02", "007", "1.50", "NA", "true", "1,234", "9" * 30, "(1,\n2)"]
    rows = [{"problem": f"{i}?", "answer": answer, "note": ""} for i, answer in enumerate(answers)]
    if kind != "csv":
        rows[4:7] = [{**rows[4], "answer": 10**30 - 1}, {**rows[5], "note": {"a": 1}},
                     {"Question": "6?", "solution": 7, "extra": "x" * 10_500_000}]
        rows += [{"problem": "8?", "answer": 2.5}, {"prompt": [{"role": "user", "content": "9?"}],
                                                     "answer": "\\pi", "extra": [3]}]
        answers[4], answers[6] = "9" * 30, "7"
        answers += ["2.5", "\\pi"]
    got = read_problems(write_as(kind, tmp_path, rows), to_problem)
    assert [(p.problem, p.answer) for p in got] == [(f"{i}?", a) for i, a in enumerate(answers)]

@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_rewritten_under_its_name_is_read_anew(kind, tmp_path):
    """`datasets` keeps copies of what it has read, which must not stand in for a new file."""
    for answer in "12":
        path = write_as(kind, tmp_path, [{"problem": "a?", "answer": answer}])
        os.utime(path, (int(answer),) * 2)
        assert load_problems(path) == [("a?", answer)]

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b'\xef\xbb\xbf{"problem": "a?", "answer": 1}\n'),
    ("a.csv", b"\xef\xbb\xbfproblem,answer\r\na?,1\r\n"),
    ("a.tsv", b"problem\tanswer\na?\t1\n"), ("a.CSV", b"Problem,Final_Answer\na?,1\n"),
    ("a.jsonl.gz", gzip.compress(b'{"problem": "a?", "answer": 1}\n', mtime=0)),
    ("a.csv.gz", gzip.compress(b"problem,answer\na?,1\n", mtime=0)),
    ("a.json", b'{"problem": "a?", "answer": 1}\n{"problem": "a?", "answer": 1}\n'),
    ("a.json", b'{"prompt": [{"role": "user", "content": "a?"}], "answer": 1}'),
    ("a.jsonl", b'[{"problem": "a?", "answer": 1}]')])
def test_files_as_people_write_them_are_read(name, content, tmp_path):
    """Byte-order marks, gzip, tabs, capitals, JSON lines in a .json."""
    (tmp_path / name).write_bytes(content)
    assert load_problems(tmp_path / name) == [("a?", "1")]

def test_a_table_without_a_column_that_we_know_is_refused_by_name(tmp_path):
    path = write_as("parquet", tmp_path, [{"text": "a?", "label": 1}] * 2)
    with pytest.raises(UserError, match="2 with no question; its columns: text, label"):
        load_problems(path)

# --- questions in several columns, chats, answers

def read(*rows):
    """(question, answer) of rows as they stand in a file, or why there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "read_rows", lambda source: list(rows))
        try:
            return [(p.problem, p.answer) for p in read_problems("x", to_problem)]
        except UserError as error:
            return str(error)

PACKS = ("Each pack of dvds costs 76 dollars with a discount of 25.", "How much for each pack?")
VERL = " Let's think step by step and output the final answer within \\boxed{}."

def chat(*turns, role="role", content="content"):
    return [{role: who, content: text} for who, text in turns]

@pytest.mark.parametrize("row, want", [
    ({"Body": PACKS[0], "Question": PACKS[1]}, "\n".join(PACKS)),
    ({"question": PACKS[1], "context": PACKS[0]}, "\n".join(PACKS)),
    ({"Passage": PACKS[0], "Problem": PACKS[1]}, "\n".join(PACKS)),
    ({"context": PACKS[0], "prompt": chat(("user", PACKS[1] + VERL))}, "\n".join(PACKS)),
    ({"problem": "2x = 4.", "question": "Find x."}, "2x = 4.\nFind x."),
    ({"problem": "Find x.", "question": "Find x."}, "Find x."),
    ({"problem": "P?", "prompt": chat(("user", "P?" + VERL))}, "P?"),
    ({"problem": "P?", "prompt": chat(("user", PREFIX + "P?" + SUFFIX))}, "P?"),
    ({"problem": "P?", "prompt": chat(("user", "A wrapper that nobody knows: P?"))}, "P?"),
    ({"problem": "P?", "image": None, "choices": []}, "P?"),
    ({"problem": "P?", "image": {"bytes": "x"}}, "'image' not read"),
    ({"problem": "P?", "images": [1]}, "'images' not read"),
    ({"problem": "P?", "image": "plot.png"}, "'image' not read"),
    ({"problem": "P?", "options": {"A": "1", "B": "2"}}, "'options' not read"),
    ({"question": "P?", "context": {"text": 5}}, "'context' not read"),
    ({"question": "Which?", "choices": ["1", "2"]}, "several texts"),
    ({"context": "Only that."}, "no question"), ({"problem": 5}, "no question"),
    ({"instruction": "Find x.", "input": "2x = 4"}, "no question"),
    ({"prompt": chat(("user", [{"type": "text", "text": "P?"}]))}, "P?"),
    ({"prompt": chat(("human", "P?"), role="from", content="value")}, "P?"),
    ({"prompt": json.dumps(chat(("user", "P?")))}, "no question"),
    ({"prompt": str(chat(("user", "P?")))}, "no question"),
    ({"prompt": chat(("user", "P?"))[0]}, "P?"),
    ({"messages": chat(("system", "Be brief."), ("user", "P?"), ("assistant", "A."))}, "P?"),
    ({"conversations": chat(("human", "P?"), ("gpt", "A."), role="from", content="value")}, "P?"),
    ({"prompt": chat(("user", "P?"), ("assistant", "A."), ("user", "And Q?"))}, "several texts"),
    ({"prompt": chat(("user", [{"type": "image", "image": "x"}, {"type": "text", "text": "P?"}]))},
     "no question"),
    ({"prompt": [{"text": "P?"}]}, "no question"), ({"prompt": []}, "no question"),
    ({"prompt": [{"role": "user"}]}, "no question"), ({"prompt": {"a": 1}}, "no question"),
    ({"problem": "In [1, 2] and {3}, what?"}, "In [1, 2] and {3}, what?")])
def test_a_question_is_read_whole_or_refused_by_name(row, want):
    """Columns are joined, a repetition is not; of a chat the user's message in every spelling."""
    got = read({**row, "answer": "1"})
    assert got == [(want, "1")] or isinstance(got, str) and want in got

@pytest.mark.parametrize("row, want", [
    ({"solution": ["By symmetry ..."], "final_answer": ["$\\frac34$"]}, "$\\frac34$"),
    ({"answer": ["70"]}, "70"), ({"answer": "['70']"}, None), ({"answer": '["\\\\pi"]'}, None),
    ({"answer": [7]}, "7"), ({"answer": ["2", -1]}, "2, -1"),
    ({"answer": "[1, 2]"}, "[1, 2]"), ({"answer": 51.0}, "51.0"),
    ({"answer": 10**20}, "100000000000000000000"),
    ({"answer": 0}, "0"), ({"answer": True}, None), ({"answer": [True]}, None),
    ({"answer": datetime.date(2024, 1, 2)}, None), ({"answer": decimal.Decimal(2)}, None),
    ({"answer": {"value": 3}}, None), ({"answer": b"3"}, None), ({"answer": []}, None),
    ({"answer": [["1"], ["2"]]}, None), ({"answer": ["1", None]}, None), ({"answer": "  "}, None),
    ({"answer": math.nan}, None), ({"answer": math.inf}, None),
    ({"answer": [1.5, -math.inf]}, None), ({"answer": "-"}, None),
    ({"answer": math.nan, "solution": "So \\boxed{3}."}, "3"),
    ({"answer": "N/A"}, None), ({"answer": "None"}, None),
    ({"answer": "NA"}, "NA"), ({"answer": "no solution"}, "no solution"), ({"answer": "0"}, "0"),
    ({"answer": "\\{\\}"}, "\\{\\}"), ({"answer": "∞"}, "∞"),
    ({"reward_model": {"ground_truth": ["72"]}}, "72"), ({"reward_model": "rule"}, None),
    ({"reward_model": {"ground_truth": '["-3"]'}}, None), ({"ground_truth": "5"}, "5"),
    ({"Expected_Answer": 5}, "5"), ({"gold": "5"}, None),
    ({"solution": "By symmetry it is so."}, None), ({"solution": " By symmetry.\n"}, None),
    ({"solution": " 4\n"}, "4"), ({"solution": "4"}, "4"), ({"solution": 4}, "4"),
    ({"solution": "First \\boxed{1}, then\n#### 1,234"}, "1,234"),
    ({"solution": "#### Step 1\nWe get \\boxed{7}."}, "7"), ({"solution": "so \\boxed{7"}, None),
    ({"answer": "So it is.\n#### (1,200)"}, "(1,200)"),
    ({"answer": "proof"}, None), ({"answer": "\\text{Proof.}"}, None),
    ({"answer": "Q.E.D."}, None), ({"answer": "not found"}, None), ({"answer": "null"}, None),
    ({"answer": "By symmetry we see that the two areas are equal, so that the claim holds."}, None),
    ({"answer": "The area of the shaded region is 12"}, "The area of the shaded region is 12"),
    ({"answer": "proof", "solution": "Thus \\boxed{x>0}."}, None),
    ({"answer": "so \\boxed{7", "solution": "7"}, "7"),
    ({"answer": "waterproof"}, "waterproof"), ({"answer": "\\text{even}"}, "\\text{even}")])
def test_an_answer_is_a_value_that_a_response_can_be_checked_by(row, want):
    """Text, a finite number, or a list of them; of a worked text `####` or the last box."""
    got = read({"problem": "P?", **row})
    assert got[0][1] == want if want else "no row to use" in got

def test_a_list_of_answers_needs_all_of_them(tmp_path):
    """The gold of ["2", "-1"] is one answer of two values; order does not matter."""
    (_, gold), = read({"problem": "P", "answer": ["2", "$-1$"]})
    verdicts = [grade(f"\\boxed{{{given}}}", gold) for given in ("2, -1", "-1 and 2", "2", "2, 1")]
    assert verdicts == ["correct", "correct", "wrong", "wrong"]

def test_rows_that_cannot_be_checked_are_counted_by_reason(tmp_path, capsys):
    """They refuse no set and pass none unseen, in evaluation too; a set of them is refused."""
    rows = [*numbered(3), {"problem": "Prove it.", "answer": "proof"}, {"problem": "a"},
            {"problem": "b", "solution": "Clear."}, {"text": "c"}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert len(load_problems(path)) == 3
    assert len(evaluate.read_sets(evaluate.Config(data=path))["d"]) == 3
    said = capsys.readouterr().out
    skipped = "7 rows, skipped 2 with no answer, 1 with a proof as answer, 1 with no question; "
    example = "for example Problem(problem='Problem 0', answer='0')"
    assert said.count(skipped + example) == 2
    with pytest.raises(UserError, match="no row to use: 2 with no answer"):
        load_problems(write_lines(tmp_path / "e.jsonl", rows[4:6]))
    # an evaluation problem needs no answer to be kept out of training
    assert len(load_problems(path, exclude=write_lines(tmp_path / "f.jsonl", [
        {"problem": "Problem 1"}, {"problem": "Problem 2", "answer": "proof"}]))) == 1

def test_a_saved_format_is_read_as_plain_values(tmp_path):
    table = datasets.Dataset.from_dict({"problem": ["a?", "b?"], "answer": [[1.5], [2.0]],
                                        "date": [datetime.date(2024, 1, 2)] * 2})
    table.with_format("numpy").save_to_disk(str(tmp_path / "d"))
    assert sorted(load_problems(tmp_path / "d")) == [("a?", "1.5"), ("b?", "2.0")]

# --- instructions of preparers

HEADS = ["", PREFIX, "Please reason step by step, and put your final answer within \\boxed{}.\n",
         "Solve the following math problem step by step:\n", """Solve the following math problem. \
Make sure to put the answer (and only answer) inside \\boxed{}.\n\n"""]
TAILS = ["", SUFFIX, VERL, "\nLet's think step by step.", " Think step by step before answering",
         "\nPlease reason step by step, and put your final answer within \\boxed{}.",
         ' Let\'s think step by step and output the final answer after "####".',
         "\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
         "\nReturn your final response within \\boxed{}.", " Provide your answer in \\boxed{}.",
         "\nThe final answer MUST BE put in \\boxed{}.",
         " Enclose your final answer in \\boxed{}.", """ You FIRST \
think about the reasoning process as an internal monologue and then provide the final answer. The \
reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \
\\boxed{}.""", """ You must put your answer inside \
<answer> </answer> tags, i.e., <answer> answer here </answer>. And your final answer will be \
extracted automatically by the \\boxed{} tag."""]

@pytest.mark.parametrize("problem", ["How many primes are below 10?", "Find $x$, where $x^2=4$",
                                     "What is 3+4? Express your answer as a common fraction."])
def test_instructions_of_preparers_are_no_part_of_a_problem(problem):
    for head in HEADS:
        for tail in TAILS:
            assert find_question({"prompt": head + problem + tail}) == problem, (head, tail)

@pytest.mark.parametrize("text", [
    "Find x. Put your answer in simplest form.", "Enter your answer as a fraction.", "What is x?",
    "Consider primes. Give the number of primes below ten within \\boxed{}.", "Solve: 2x = 4",
    "A child climbs the stairs step by step", "Let x = 5. Solve 2x = y step by step.",
    "What goes into the \\boxed{}?", "Please find x and put your final answer within \\boxed{}.",
    "Find x. Put your answer in \\boxed{}, rounded to two decimals.", "If it is \\boxed{a}, what?",
    "Solve x. Write your answer in the form \\boxed{a}+b.", "Let x be 2. Is the answer \\boxed{x}?",
    "Let's think step by step and find x.", "Put 3 balls into the \\boxed{} urn.",
    "Put your answer as a fraction into \\boxed{}.", "Solve this equation step by step: x = 4",
    "Find x and put your final answer within \\boxed{}.",
    "Write your answer.", "How many steps? Give your answer in the form (a,b)."])
def test_what_asks_for_something_stays_in_the_problem(text):
    assert find_question({"problem": text}) == text

@pytest.mark.parametrize("text", ["Put the answer " * 3000, " " * 15_000 + "x", "Answer: " * 5000])
def test_a_long_text_is_searched_in_linear_time(text):
    started = time.process_time()
    find_question({"problem": "x" + text + "?"})
    assert time.process_time() - started < 2  # quadratic would be 6 or more

def test_a_wrapped_evaluation_problem_leaves_the_training_set(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [
        {"prompt": "How many primes are below 10?" + VERL, "answer": "4"}, *numbered(1)])
    bare = write_lines(tmp_path / "e.jsonl", [{"question": "How many primes are below 10?"}])
    assert load_problems(path, exclude=bare) == [("Problem 0", "0")]

@pytest.mark.parametrize("a, b, same", [
    ("1 1/2 + 1", "11/2 + 1", False), ("x² = 4", "x2 = 4", False), ("x₂ = 4", "x2 = 4", False),
    ("1½", "11/2", False), ("Ann has 5. 3 more", "Ann has 5.3 more", False),
    ("$1$ $2$", "12", False),
    ("1\\ 1/2", "11/2", False), ("f\\leftarrow", "f\\rightarrow", False), ("2³", "23", False),
    ("10\\,000", "10000", True), ("\\left( 0, 1\\right)", "(0,\\;1)", True), ("2 + 3", "2+3", True),
    ("a\\! b", "A b", True), ("1  1/2\n", "1 1/2", True), ("Find $x$ .", "find x.", True),
    ("x² = 4", "x^2 = 4", True)])
def test_only_typesetting_is_lost_in_the_key(a, b, same):
    assert (common.problem_key(a) == common.problem_key(b)) == same

# --- splits and hub names

def splits(*names):
    return datasets.DatasetDict({name: datasets.Dataset.from_list([{"problem": name}])
                                 for name in names})

@pytest.mark.parametrize("names, want", [("test", "test"), ("test train", "train"),
                                         ("test validation", None)])
def test_of_a_saved_folder_the_only_split_is_read_else_train(names, want, tmp_path):
    splits(*names.split()).save_to_disk(str(tmp_path / "d"))
    if want:
        assert read_rows(str(tmp_path / "d"))[0]["problem"] == want
    else:
        with pytest.raises(UserError, match="no split 'train'.*test, validation"):
            read_rows(str(tmp_path / "d"))

@pytest.mark.parametrize("typed, want", [
    ("own/set", ("own/set", None, "train")),
    ("own/set:test", ("own/set", None, "test")),
    ("own/set:AIME2025-I:test", ("own/set", "AIME2025-I", "test")),
    ("dapo", ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train")),
    ("math500", ("HuggingFaceH4/MATH-500", None, "test")),
    ("aime24", ("HuggingFaceH4/aime_2024", None, "train")),
    ("aime25", ("math-ai/aime25", None, "test"))])
def test_hub_name_config_and_split_reach_the_hub(typed, want, monkeypatch):
    """owner/name[:config][:split] and the aliases ask the hub for exactly that set."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: (
        asked.append((name, config)) or splits("train", "test")))
    rows = read_rows(typed)
    assert (*asked[0], rows[0]["problem"]) == want

# --- deduplication, contradictions

def test_hundredfold_dapo_repeats_become_one_problem_each(tmp_path, capsys):
    """DAPO's parquet repeats each problem about 100 times: each stays once, and is counted."""
    rows = [dapo(f"Problem number {i}.", str(i), f"{i}-{j}") for j in range(100) for i in range(5)]
    got = load_problems(write_as("parquet", tmp_path, rows))
    assert sorted(got) == [(f"Problem number {i}.", str(i)) for i in range(5)]
    said = capsys.readouterr().out
    assert "500 rows" in said and "495 duplicates" in said and "5 problems" in said

def test_contradicting_answers_drop_the_problem_altogether(tmp_path, capsys):
    """Neither answer is trusted. 5 and 5.0 are one answer: that problem stays, once."""
    rows = [{"problem": q, "answer": a} for q, a in
            [("a?", "5"), ("b?", "1"), ("a?", "6"), ("a?", "5"), ("c?", "5"), ("c?", "5.0")]]
    got = load_problems(write_lines(tmp_path / "d.jsonl", rows))
    assert sorted(got) == [("b?", "1"), ("c?", "5")]
    assert re.search(r"\b1 with contradict", capsys.readouterr().out)

def test_spacing_case_and_dollars_do_not_hide_a_duplicate(tmp_path):
    """The same problem typeset differently is a duplicate; another number is not."""
    texts = ["Find $x$ in $\\left(0, 1\\right)$.", "find x in  (0,1).", "Find $x$ in\n$(0, 2)$."]
    rows = [{"problem": t, "answer": "1"} for t in texts]
    assert len(load_problems(write_lines(tmp_path / "d.jsonl", rows))) == 2

# --- halves, decontamination

def numbered(n):
    return [{"problem": f"Problem {i}", "answer": str(i)} for i in range(n)]

def halves(path, **options):
    return [load_problems(path, half=h, **options) for h in ("1", "2", "all")]

def test_halves_are_disjoint_exhaustive_and_ignore_row_order_and_duplicates(tmp_path):
    """1H and 2H share nothing, together are everything, and differ by at most one problem; shuffled
    rows and extra copies give the same halves in the same order (Table 1)."""
    rows = numbered(21)
    first, second, everything = halves(write_lines(tmp_path / "a.jsonl", rows))
    assert first + second == everything and len(set(everything)) == 21
    assert {len(first), len(second)} == {10, 11}
    shuffled = rows * 3 + rows[:7]
    random.Random(1).shuffle(shuffled)
    assert halves(write_lines(tmp_path / "b.jsonl", shuffled)) == [first, second, everything]

def test_split_is_the_same_on_every_machine_and_day(tmp_path):
    """Pinned members of 1H for split_seed 0 and 1: a recipe's stages run days apart."""
    path = write_lines(tmp_path / "d.jsonl", numbered(12))
    got = [{int(a) for _, a in halves(path, split_seed=s)[0]} for s in (0, 1)]
    assert got == [{3, 4, 6, 7, 10, 11}, {2, 4, 5, 6, 8, 11}]

def test_a_label_budget_is_the_first_problems_and_its_halves_are_halves_of_these(tmp_path):
    """So budgets are nested, whatever the row order, and copies do not count."""
    rows = numbered(21)
    path = write_lines(tmp_path / "a.jsonl", rows[::-1] + rows)
    everything = load_problems(path)
    for n in (21, 10, 3):
        first, second, budget = halves(path, labels=n)
        assert first + second == budget == everything[:n] and len(second) - len(first) in (0, 1)
    with pytest.raises(UserError, match="--labels 22: .* has only 21"):
        load_problems(path, labels=22)

def test_evaluation_problems_leave_before_the_split(tmp_path, capsys):
    """Halves of a decontaminated set are those of a set that never held the evaluation problems."""
    rows = numbered(20)
    clean = write_lines(tmp_path / "clean.jsonl", [rows[i] for i in range(20) if i not in (2, 11)])
    everything = write_lines(tmp_path / "all.jsonl", rows)
    one = write_lines(tmp_path / "eval1.jsonl", [{"question": "problem  $2$", "answer": "x"}])
    two = write_lines(tmp_path / "eval2.jsonl", [{"Problem": "Problem 11", "Answer": 0}])
    assert halves(everything, exclude=f"{one},{two}") == halves(clean)
    load_problems(everything, exclude=f"{one},{two}")
    said = capsys.readouterr().out
    assert "2 in an evaluation set" in said and "18 problems" in said

def test_a_missing_evaluation_set_is_an_error_with_the_way_out(tmp_path):
    """Training without the check must be asked for: --exclude none, or the empty string."""
    path = write_lines(tmp_path / "d.jsonl", numbered(4))
    with pytest.raises(UserError, match="--exclude .*gone.jsonl.*--exclude none"):
        load_problems(path, exclude=str(tmp_path / "gone.jsonl"))
    assert len(load_problems(path, exclude="none")) == len(load_problems(path, exclude="")) == 4
    assert len(load_problems(path, exclude="none, ")) == 4  # a comma too many

# --- prompts, plain SFT data, batches

def test_too_long_prompts_are_counted_and_skipped(student_lm, capsys):
    """A prompt at the limit stays, a longer one goes and is counted (Q and ? are two tokens)."""
    problems = [common.Problem(t, "1") for t in ("5a+3", "5a+3b", "5a+3b-1")]  # 6, 7, 9 tokens
    kept = tokenize_problems(problems, settings(max_prompt_tokens=7, max_new_tokens=8), student_lm)
    assert [(p.problem, len(p.prompt)) for p in kept] == [("5a+3", 6), ("5a+3b", 7)]
    assert "skipped 1 over --max-prompt-tokens 7" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-prompt-tokens 5"):
        tokenize_problems(problems, settings(max_prompt_tokens=5), student_lm)

def test_sft_examples_end_with_eos_and_keep_the_text(tmp_path, student_lm, capsys):
    """A `response`, else `solution`, else what the assistant says, becomes response ids that end
    with eos; prompts and responses over their limits, rows without one are counted and skipped."""
    said = chat(("user", "1a+3"), ("assistant", "\\boxed{(4)}"))
    rows = [{"problem": "1a+1", "response": "a1+1=2,\\boxed{(2)}"}, {"problem": "1a+1b+1",
            "response": "2"}, {"problem": "1a+2", "solution": "\\boxed{(3)}"}, {"messages": said},
            {"problem": "", "response": "1+3=4"}, {"problem": None, "response": "1"},
            {"problem": "1a+1", "response": "a1+1=2,a1+1=2,\\boxed{(2)}"}, {"problem": "1a+1"},
            {"problem": "1a+1", "response": 5}, {"prompt": "1a+1"}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    limits = {"max_prompt_tokens": 6, "max_new_tokens": 13}  # the first response has 13 tokens
    groups = worked_examples(settings(data=path, **limits), student_lm)
    got = [(student_lm.tokenizer.decode(g.prompt), student_lm.tokenizer.decode(g.tokens))
           for (g,) in groups]
    assert got == [("Q1a+1?", "a1+1=2,\\boxed{(2)}<eos>"), ("Q1a+2?", "\\boxed{(3)}<eos>"),
                   ("Q1a+3?", "\\boxed{(4)}<eos>"), ("Q?", "1+3=4<eos>")]
    assert all(g.finished for (g,) in groups)
    out = capsys.readouterr().out
    for part in ("3 with no response, 1 with no question", "1 over --max-prompt-tokens 6",
                 "1 over --max-new-tokens"):
        assert f"skipped {part}" in out
    with pytest.raises(UserError, match="--max-new-tokens 1"):
        worked_examples(settings(data=path, max_new_tokens=1), student_lm)

def test_batches_are_a_pure_function_of_seed_and_step():
    """The same step gives the same batch in any order of calls and for any global random state;
    every epoch is another permutation."""
    want = [batch_indices(12, 4, step, seed=7) for step in range(6)]
    common.np.random.seed(5)
    assert [batch_indices(12, 4, step, seed=7) for step in reversed(range(6))] == want[::-1]
    assert want != [batch_indices(12, 4, step, seed=8) for step in range(6)]
    epochs = sum(want[:3], []), sum(want[3:], [])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))

def test_incomplete_batches_never_repeat_an_item_nor_starve_one():
    """10 items, 4 a step: no repeat within an epoch of two steps; 60 epochs use all fairly."""
    used = Counter()
    for epoch in range(60):
        items = sum((batch_indices(10, 4, 2 * epoch + i, seed=3) for i in (0, 1)), [])
        assert len(set(items)) == 8
        used.update(items)
    assert set(used) == set(range(10)) and min(used.values()) >= 35  # 48 +- 3.1

# --- one-line errors

@pytest.mark.parametrize("name, content, message", [
    ("gone.jsonl", None, "no such file"),
    ("nobody-has/this-set", None, "cannot load data"),
    ("not a name at all", None, "cannot load data"),
    ("bad.json", "{", "bad.json.*property name"),
    ("bad.jsonl", '{"problem": "a", "answer": 1}\n{"problem"\n', "bad.jsonl.*line 2"),
    ("latin.jsonl", b'{"problem": "\xe9"}', "latin.jsonl.*utf-8"),
    ("empty.jsonl", "", "is empty"),
    ("empty.csv", "", "is empty"),
    ("wide.csv", "problem,answer\na,1,2\n", "wide.csv.*more fields"),
    ("noanswer.csv", "problem,answer\na\n", "no answer"),
    ("noquestion.jsonl", '{"text": "a", "answer": "1"}\n', "no question.*text, answer"),
    ("noanswer.jsonl", '{"problem": "a", "level": 3}\n', "no answer.*problem, level"),
    ("number.jsonl", "5\n", "number.jsonl"),
    ("words.txt", "a", "words.txt.*not json, jsonl, csv"),
    ("book.xlsx", b"PK", "book.xlsx.*not json, jsonl, csv"),
    ("two.csv", "problem;answer\na?;1\n", "no question.*problem;answer"),
    ("wide.jsonl", '{"problem": "a"}'.encode("utf-16"), "wide.jsonl.*utf-8"),
    ("bad.jsonl.gz", "no gzip", "bad.jsonl.gz.*gzip"),
    ("table.json", '{"data": [{"problem": "a", "answer": 1}]}', "no question.*data"),
    ("columns.json", '{"problem": ["a", "b"], "answer": ["1", "2"]}', "several texts in one cell"),
    ("bad.parquet", "no parquet", "bad.parquet"),
    ("folder/a.jsonl", '{"problem": "a"\n', "folder.*JSON parse error"),
])
def test_data_mistake_is_one_readable_line(name, content, message, tmp_path):
    """Each mistake is a UserError of one line that names the file or field."""
    source = str(tmp_path / name.partition("/")[0]) if "." in name else name
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_problems(source)
    assert "\n" not in str(caught.value)

def test_too_little_data_is_an_error(tmp_path):
    """One problem has an empty first half; a step of 8 prompts cannot be drawn from 5 problems."""
    path = write_lines(tmp_path / "d.jsonl", numbered(1))
    with pytest.raises(UserError, match="half 1"):
        load_problems(path, half="1")
    with pytest.raises(UserError, match="--prompts 8.*only 5"):
        common.count_steps(settings(prompts=8), 5)

def test_only_a_newline_ends_a_line_and_a_half_written_last_line_is_cut(tmp_path):
    """After a kill in the middle of a line the whole lines stay and the file can grow again."""
    path = tmp_path / "d.jsonl"
    assert read_json_lines(path) == []
    text = {"problem": "a\u2028b\u2029c\x85d"}
    common.append_json_line(path, text)
    with path.open("a") as file:
        file.write('{"a": "é')
    assert read_json_lines(path) == [text]
    common.append_json_line(path, {"a": 2})
    assert read_json_lines(path) == [text, {"a": 2}]
