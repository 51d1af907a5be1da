"""Evaluation: the figures against hand-made references, resuming, regrading, and the tables.

The model here is the world's untrained student: its samples are noise, which is what a test of
independence, order and resuming wants.
"""

import itertools
import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path

import pytest

import common
import evaluate
from common import UserError
from evaluate import Config, pass_at_k, runs_table, summarise

# --- figures

@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    """Unbiased pass@k = share of all k-subsets of the n samples that hold a right one."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = [any(s) for s in itertools.combinations([True] * c + [False] * (n - c), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)

W, C, N, G = "wrong", "correct", "no_answer", "gave_up"

def stored(*verdicts):
    return [{"verdicts": list(v), "finished": [True] * (len(v) - 1) + [False],
             "lengths": list(range(1, len(v) + 1))} for v in verdicts]

def test_avg_and_se_are_over_problems():
    """Scores 1/4, 4/4, 0, 2/4: mean 0.4375; se = sd over problems / sqrt(4), not over samples. The
    error over one problem is unknown, not 0."""
    figures = summarise(stored((W, C, N, G), (C, C, C, C), (W, W, W, N), (C, W, W, C)))
    scores = [0.25, 1.0, 0.0, 0.5]
    assert figures["avg"] == pytest.approx(statistics.mean(scores))
    assert figures["se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(4))
    assert (figures["problems"], figures["samples"]) == (4, 4)
    assert (figures["no_answer"], figures["gave_up"]) == (2 / 16, 1 / 16)
    assert (figures["finished"], figures["length"]) == (3 / 4, 2.5)
    # pass@2 by hand: 1 of 4 right -> 3/6 pairs; all -> 1; none -> 0; 2 of 4 -> 5/6
    assert figures["pass"] == pytest.approx({"1": 0.4375, "2": (0.5 + 1 + 5 / 6) / 4, "4": 0.75})
    assert summarise(stored((C, W)))["se"] is None

# --- sampling, resuming, settings

def settings(world, out, **changes):
    return Config(**{"model": str(world / "init-student"), "data": str(world / "test.jsonl"),
                     "out": str(out), "samples": 4, "max_new_tokens": 8, **changes})

@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A finished evaluation of two sets (shared: `copy` is for those who change it)."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate.main(settings(world, out, data=f"{world / 'test.jsonl'},{world / 'valid.jsonl'}"))
    return out

@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "eval")

def lines(folder, name="test"):
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]

def summary(folder):
    return json.loads((folder / "summary.json").read_text())

def test_every_problem_of_every_set_is_one_line_with_all_samples(world, done):
    """test (12) and valid (8): lines in the order of the file, 4 samples each, lengths in range.
    The samples of a problem differ: 8 noise tokens collide about never."""
    for name, n in (("test", 12), ("valid", 8)):
        want, got = lines(world, name), lines(done, name)
        assert len(got) == n
        assert [(e["problem"], e["answer"]) for e in got] == [
            (r["problem"], r["answer"]) for r in want]
        for e in got:
            assert {len(e[f]) for f in ("verdicts", "lengths", "finished", "responses")} == {4}
            assert all(1 <= x <= 8 for x in e["lengths"])
            assert all(x == 8 for x, f in zip(e["lengths"], e["finished"]) if not f)
            long = [r for r, n in zip(e["responses"], e["lengths"]) if n == 8]
            assert len(set(long)) == len(long) > 0
    assert {s: f["problems"] for s, f in summary(done)["sets"].items()} == {"test": 12, "valid": 8}

def test_length_counts_the_stop_token(world, done):
    """A finished response's length includes its eos, as the losses count it."""
    tokenizer = common.describe_lm(str(world / "init-student")).tokenizer
    finished = [(len(tokenizer.encode(r, add_special_tokens=False)) + 1, n) for e in lines(done)
                for r, n, f in zip(e["responses"], e["lengths"], e["finished"])
                if f and "<" not in r]  # <: a sampled <pad> or <unk> is not shown
    assert finished and all(a <= n for a, n in finished) and any(a == n for a, n in finished)

def test_an_interrupted_evaluation_continues_with_identical_samples(world, done, copy):
    """Lines deleted and one cut in its middle: the same command restores the same bytes."""
    kept = (copy / "test.jsonl").read_bytes().splitlines(keepends=True)[:6]
    (copy / "test.jsonl").write_bytes(b"".join(kept[:5]) + kept[5][:40])
    evaluate.main(settings(world, copy))
    assert (copy / "test.jsonl").read_bytes() == (done / "test.jsonl").read_bytes()

@pytest.mark.parametrize("sample_rows", [1, 12, 20])
def test_samples_do_not_depend_on_sample_rows(sample_rows, world, done, tmp_path):
    """Batches of 1, 3 and 5 problems instead of all 12: the same file. Memory and speed only."""
    evaluate.main(settings(world, tmp_path / "eval", sample_rows=sample_rows))
    assert (tmp_path / "eval" / "test.jsonl").read_bytes() == (done / "test.jsonl").read_bytes()

def test_seed_and_temperature_decide_the_samples(world, done, tmp_path):
    """Another --seed gives other samples; at temperature 0 there is nothing to draw."""
    evaluate.main(settings(world, tmp_path / "seed", seed=1, limit=3))
    for a, b in zip(lines(tmp_path / "seed"), lines(done)):
        assert a["problem"] == b["problem"] and a["responses"] != b["responses"]
    evaluate.main(settings(world, tmp_path / "greedy", temperature=0.0, limit=2))
    assert all(len(set(e["responses"])) == 1 for e in lines(tmp_path / "greedy"))

@pytest.mark.parametrize("change, word", [
    ({"temperature": 0.5}, "temperature"), ({"seed": 1}, "seed"), ({"samples": 2}, "samples"),
    ({"max_new_tokens": 9}, "max_new_tokens"), ({"thinking": True}, "thinking"),
    ({"model": "{world}/init-teacher"}, "weights"), ({"data": "{other}", "limit": 12}, "set test")])
def test_samples_of_other_settings_are_not_mixed_in(change, word, world, copy, tmp_path):
    """Another model, setting, or set of the same name in a folder is refused, named, and changes
    nothing there."""
    shutil.copy(world / "train.jsonl", tmp_path / "test.jsonl")
    change = {k: v.format(world=world, other=tmp_path / "test.jsonl") if isinstance(v, str) else v
              for k, v in change.items()}
    before = (copy / "test.jsonl").read_bytes()
    with pytest.raises(UserError, match=word):
        evaluate.main(settings(world, copy, **change))
    assert (copy / "test.jsonl").read_bytes() == before

@pytest.mark.parametrize("change, told", [
    (lambda rows: [*rows, {**rows[0], "problem": "9a+9b?"}], True),
    (lambda rows: rows[:-1], True), (lambda rows: rows[::-1], True),
    (lambda rows: [*rows[:-1], {**rows[-1], "answer": "0"}], True),
    (lambda rows: [{**row, "note": 1} for row in rows], False)])
@pytest.mark.parametrize("limit", [0, 3])
def test_a_changed_set_is_told(limit, change, told, world, copy, tmp_path):
    """Longer, shorter, other problems, another order, also beyond --limit. A copy elsewhere of the
    same problems is the same set, and the other set in the folder does not matter."""
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(lines(world))))
    before = {p.name: p.read_bytes() for p in copy.glob("*.json*")}
    if told:
        with pytest.raises(UserError, match=r"\(set test was '\w+', is now '\w+'\)"):
            evaluate.main(settings(world, copy, data=str(path), limit=limit))
        assert before == {p.name: p.read_bytes() for p in copy.glob("*.json*")}
    else:
        evaluate.main(settings(world, copy, data=str(path), limit=limit))
        assert {"set test", "set valid"} < set(common.read_record(copy)["identity"])

def test_a_verifier_of_ones_own_is_part_of_what_samples_are(world, done, copy, tmp_path):
    """avg is the mean of its values, pass@k counts those of at least 1. A folder that it has graded
    is refused without it; --regrade changes that, all sets or, at a mistake, none."""
    mine = tmp_path / "mine.py"
    mine.write_text("def verify(response, answer):\n    return len(response) / 10\n")
    evaluate.main(settings(world, tmp_path / "own", verifier=str(mine)))
    got, figures = lines(tmp_path / "own"), summary(tmp_path / "own")["sets"]["test"]
    assert [e["responses"] for e in got] == [e["responses"] for e in lines(done)]
    want = [[len(r) / 10 for r in e["responses"]] for e in got]
    assert [e["verdicts"] for e in got] == want
    assert figures["avg"] == pytest.approx(statistics.mean(statistics.mean(x) for x in want))
    assert figures["pass"]["1"] == pytest.approx(
        statistics.mean(statistics.mean(v >= 1 for v in x) for x in want))
    assert 0 < figures["pass"]["1"] < 1
    with pytest.raises(UserError, match="verifier was '"):
        evaluate.main(settings(world, tmp_path / "own"))
    evaluate.main(Config(regrade=True, out=str(copy), verifier=str(mine)))
    assert [e["verdicts"] for e in lines(copy)] == want
    with pytest.raises(UserError, match="verifier was '"):
        evaluate.main(settings(world, copy))
    before = {p.name: p.read_bytes() for p in copy.glob("*.json*")}
    mine.write_text("n = 0\ndef verify(response, answer):\n    global n\n    n += 1\n"
                    "    return 1 / (50 - n)\n")  # in the second set
    other = mine.rename(tmp_path / "other.py")
    with pytest.raises(UserError, match="other.py, .*ZeroDivisionError"):
        evaluate.main(Config(regrade=True, out=str(copy), verifier=str(other)))
    assert before == {p.name: p.read_bytes() for p in copy.glob("*.json*")}
    evaluate.main(Config(regrade=True, out=str(copy)))
    evaluate.main(settings(world, copy))
    assert (copy / "test.jsonl").read_bytes() == (done / "test.jsonl").read_bytes()

@pytest.mark.parametrize("files, names", [
    (["a/test.jsonl", "b/test.jsonl"], ["a-test", "b-test"]),
    (["test.jsonl", "valid.jsonl"], ["test", "valid"]),
    (["x/a/test.jsonl", "y/a/test.jsonl", "y/a/v1.2.jsonl"], ["x-a-test", "y-a-test", "v1.2"]),
    (["test.jsonl", "a/test.jsonl"], ["{here}-test", "a-test"])])
def test_sets_of_one_name_are_told_apart_by_their_folders(files, names, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps({"problem": file, "answer": 1}))
    sets = evaluate.read_sets(Config(data=",".join(str(tmp_path / file) for file in files)))
    want = [name.replace("{here}", tmp_path.name) for name in names]
    assert [(name, p.problem) for name, (p,) in sets.items()] == list(zip(want, files))
    with pytest.raises(UserError, match="two sets have one name"):
        evaluate.read_sets(Config(data=f"{tmp_path / files[0]},{tmp_path / files[0]}"))

def test_no_set_takes_the_name_of_another(tmp_path, monkeypatch):
    """x/a and y/a are told apart as x-a and y-a, which is what x-a is called already."""
    monkeypatch.chdir(tmp_path)
    for file in ("x/a.jsonl", "y/a.JSONL", "x-a.jsonl"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(json.dumps({"problem": file, "answer": 1}))
    assert list(evaluate.read_sets(Config(data="x/a.jsonl, y/a.JSONL,"))) == ["x-a", "y-a"]
    with pytest.raises(UserError, match="two sets are named x-a"):
        evaluate.read_sets(Config(data="x/a.jsonl,y/a.JSONL,x-a.jsonl"))

def test_a_smaller_limit_reports_on_that_many_problems(world, copy):
    """--limit 3 on a folder with 12 stored lines is about 3 problems; the stored ones stay."""
    evaluate.main(settings(world, copy, limit=3))
    assert summary(copy)["sets"]["test"]["problems"] == 3
    assert len(lines(copy)) == 12

# --- regrading

def test_regrade_changes_verdicts_only_and_needs_no_model(world, done, copy, monkeypatch, capsys):
    """A verifier that accepts everything: verdicts become correct, all else stays as stored. The
    real one then restores the same bytes. The summary names whose samples they are."""
    monkeypatch.setattr(evaluate, "load_lm", lambda *a, **k: pytest.fail("loaded a model"))
    with monkeypatch.context() as patch:
        patch.setattr(common, "grade", lambda text, answer: "correct")
        evaluate.main(Config(regrade=True, out=str(copy)))
    for name in ("test", "valid"):
        old, new = lines(done, name), lines(copy, name)
        assert [e["verdicts"] for e in new] == [["correct"] * 4] * len(old)
        assert [{**e, "verdicts": 0} for e in new] == [{**e, "verdicts": 0} for e in old]
    changed = 48 - Counter(v for e in lines(done) for v in e["verdicts"])["correct"]
    assert f"test.jsonl: {changed} verdicts changed" in capsys.readouterr().out
    assert [f["avg"] for f in summary(copy)["sets"].values()] == [1.0, 1.0]
    assert summary(copy)["model"] == str(world / "init-student")
    evaluate.main(Config(regrade=True, out=str(copy)))
    assert (copy / "test.jsonl").read_bytes() == (done / "test.jsonl").read_bytes()

# --- tables

def fake_run(root, name, parents=(), labels=(), seconds=0.0, sets=None, targets="soft"):
    """A finished run folder with what the table reads, and an evaluation if `sets` is given.

    labels: numbers that stand for the run's own labelled problems.
    """
    folder = root / name
    folder.mkdir(parents=True)
    record = {"settings": {"targets": targets}, "parents": [str(p) for p in parents],
              "seconds": seconds, "finished": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "run": record}))
    before = (common.read_json_lines(Path(p) / "labels.jsonl") for p in parents)
    (folder / "labels.jsonl").write_text("".join(
        json.dumps(n) + "\n" for n in set(labels).union(*before)))
    if sets:
        (folder / "eval").mkdir()
        figures = {s: {"avg": a, "se": e, "problems": 9, "samples": 16, "pass": {"16": 1.0}}
                   for s, (a, e) in sets.items()}
        (folder / "eval" / "summary.json").write_text(json.dumps({"sets": figures}))
    return folder

def cells(table):
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}

def test_runs_table_counts_labels_and_seconds_over_ancestors(tmp_path):
    """A tree like run_all.sh's; every figure below is added up by hand.

    base (pretraining, 900 s, left out) -> teacher-1h (GRPO on 1H, 128 labels, 60 s) -> warmup
    (10 s) -> bridge-1h (20 s) -> fresh-2h (128 labels of 2H, 40 s) and replay-1h (1H again, 40 s).
    The teacher is an ancestor twice (of warmup, where it is typed in another way, and of
    bridge-1h), and counts once.
    """
    root = tmp_path / "world"
    first, second = range(128), range(128, 256)
    base = fake_run(root, "base", targets="data", seconds=900, sets={"test": (0.03, 0.01)})
    teacher = fake_run(root, "teacher-1h", [base], first, 60)
    warmup = fake_run(root, "warmup", [f"{root}/../world/teacher-1h", base], [], 10)
    bridge = fake_run(root, "bridge-1h", [teacher, warmup], [], 20, {"test": (0.435, 0.0178)})
    fake_run(root, "fresh-2h", [bridge], second, 40, {"test": (0.554, 0.02)})
    fake_run(root, "replay-1h", [bridge], first, 40, {"test": (0.484, 0.018)})
    fake_run(root, "cold-grpo", [base], range(256), 75.4,
             {"test": (0.206, 0.011), "hard": (0.01, None)})
    evaluate.main(Config(table=str(root)))
    head, rows = cells((root / "table.md").read_text())
    test, hard = (next(i for i, h in enumerate(head) if h.startswith(name)) - 1
                  for name in ("test, avg@16", "hard, avg@16"))
    assert head[0] == "route" and head[3:5] == ["labels", "seconds"] and "paper" in head[5]
    got = {name: [row[test], row[hard], *row[2:]] for name, row in rows.items()}
    want = {
        "cold-grpo": ["20.6 ± 1.1", "1.0", "256", "75", "75.9 / 19.8 / 17.1"],
        "bridge-1h": ["43.5 ± 1.8", "-", "128", "90", "75.4"],
        "replay-1h": ["48.4 ± 1.8", "-", "128", "130", "75.7"],
        "fresh-2h": ["55.4 ± 2.0", "-", "256", "130", "78.5"],
        "base": ["3.0 ± 1.0", "-", "0", "0", "-"]}
    assert list(got.items()) == list(want.items()), "the paper's routes in order, then others"

def test_labels_of_halves_and_whole_are_a_union(tmp_path):
    """all + 1H = all; 1H + 2H = both; others add up. Runs may be moved."""
    root = tmp_path / "there"
    one = fake_run(root, "t1", [], range(10))
    whole = fake_run(root, "t", [one], range(21), sets={"s": (0, 0)})
    fake_run(root, "halves", [one], range(10, 21), sets={"s": (0, 0)})
    fake_run(root, "other", [whole], range(50, 55), sets={"s": (0, 0)})
    moved = root.rename(tmp_path / "here")
    labels = {name: row[1] for name, row in cells(runs_table(moved))[1].items()}
    assert labels == {"t": "21", "halves": "21", "other": "26"}

@pytest.mark.parametrize("setting, sums", [
    ("qwen3-8b", (1232.3, 195.8, 157.6)), ("qwen3-14b", (1238.1, 196.3, 161.5)),
    ("llama-3.3-70b-instruct", (177.3, 36.2, 19.5))])
def test_papers_numbers_add_up(setting, sums):
    """MATH-500, AIME 2024 and AIME 2025 of Tables 2 to 6 and 8, added up from the paper, each once:
    the paper has one R8, for two readings of it."""
    paper = evaluate.PAPER[setting]
    assert paper.get("opd-only-long") == paper.get("opd-only")
    rows = [numbers for name, numbers in paper.items() if numbers and name != "opd-only-long"]
    assert {len(numbers) for numbers in rows} <= {1, 3}
    columns = [sum(n[i] for n in rows if i < len(n)) for i in range(3)]
    assert columns == pytest.approx(sums)

@pytest.mark.parametrize("folder, numbers", [
    ("qwen3-8b/bridge", (79.3, 25.2, 20.2)), ("qwen3-14b/bridge-1h", (76.3,)),
    ("llama-3.3-70b-instruct/raw-bridge", (55.4, 8.8, 3.1)), ("world/base-student", ()),
    ("world-seed1/bridge", (79.3, 25.2, 20.2)), ("ckpt/bridge", ()), ("qwen3-4b/bridge", ())])
def test_papers_numbers_stand_beside_the_routes(folder, numbers):
    """By the folders that run_all.sh writes; a world stands beside the 8B teacher's."""
    assert evaluate.paper_row(f"runs/{folder}") == numbers
