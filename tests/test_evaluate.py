"""Evaluation: the figures against hand-made references, resuming, regrading, and the tables.

The model here is the world's untrained student: its samples are noise, which is what a test of
independence, order and resuming wants.
"""

import itertools
import json
import math
import shutil
import statistics
import sys
from collections import Counter

import numpy as np
import pytest

import common
import evaluate
from common import UserError
from evaluate import Config, pass_at_k, runs_table, summarise

# --- figures


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    """Unbiased pass@k = share of all k-subsets of the n samples that hold a right one."""
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


W, C, N, G = "wrong", "correct", "no_answer", "gave_up"


def entries(*verdicts):
    return [{"verdicts": list(v), "finished": [True] * (len(v) - 1) + [False],
             "lengths": list(range(1, len(v) + 1))} for v in verdicts]


def test_avg_and_se_are_over_problems():
    """Scores 1/4, 4/4, 0, 2/4: mean 0.4375; se = sd over problems / sqrt(4), not over samples."""
    figures = summarise(entries((W, C, N, G), (C, C, C, C), (W, W, W, N), (C, W, W, C)))
    scores = [0.25, 1.0, 0.0, 0.5]
    assert figures["avg"] == pytest.approx(statistics.mean(scores))
    assert figures["se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(4))
    assert (figures["problems"], figures["samples"]) == (4, 4)
    assert figures["no_answer"] == pytest.approx(2 / 16)
    assert figures["gave_up"] == pytest.approx(1 / 16)
    assert figures["finished"] == pytest.approx(3 / 4)
    assert figures["length"] == pytest.approx(2.5)
    # pass@2 by hand: 1 of 4 right -> 3/6 pairs; all -> 1; none -> 0; 2 of 4 -> 5/6
    assert figures["pass"] == pytest.approx({"1": 0.4375, "2": (0.5 + 1 + 5 / 6) / 4, "4": 0.75})


def test_one_problem_has_no_standard_error():
    """The error over one problem is unknown, not 0."""
    assert summarise(entries((C, W)))["se"] is None


# --- sampling, resuming, settings


def settings(world, out, **changes):
    return Config(**{"model": str(world / "init-student"), "data": str(world / "test.jsonl"),
                     "out": str(out), "samples": 4, "max_new_tokens": 8, **changes})


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A finished evaluation of two sets (shared: copy it before changing it)."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate.main(settings(world, out, data=f"{world / 'test.jsonl'},{world / 'valid.jsonl'}"))
    return out


def lines(folder, name="test"):
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_every_problem_of_every_set_is_one_line_with_all_samples(world, done):
    """test (12) and valid (8): lines in the order of the file, 4 samples each, lengths in range."""
    for name, n in (("test", 12), ("valid", 8)):
        want = [json.loads(x) for x in (world / f"{name}.jsonl").read_text().splitlines()]
        got = lines(done, name)
        assert len(got) == n
        assert [(e["problem"], e["answer"]) for e in got] == [
            (r["problem"], r["answer"]) for r in want]
        for e in got:
            assert {len(e[f]) for f in ("verdicts", "lengths", "finished", "responses")} == {4}
            assert all(1 <= x <= 8 for x in e["lengths"])
            assert all(x == 8 for x, f in zip(e["lengths"], e["finished"]) if not f)
    summary = json.loads((done / "summary.json").read_text())["sets"]
    assert {name: f["problems"] for name, f in summary.items()} == {"test": 12, "valid": 8}


def test_samples_of_a_problem_differ_from_one_another(done):
    """Equal samples would be a seeding bug. 8 noise tokens collide about never."""
    for e in lines(done):
        long = [r for r, n in zip(e["responses"], e["lengths"]) if n == 8]
        assert len(set(long)) == len(long) > 0


def test_an_interrupted_evaluation_continues_with_identical_samples(world, done, tmp_path):
    """Lines deleted and one cut in its middle: the same command restores the same bytes."""
    shutil.copytree(done, tmp_path / "eval")
    path = tmp_path / "eval" / "test.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:6]
    path.write_bytes(b"".join(kept[:5]) + kept[5][:40])
    evaluate.main(settings(world, tmp_path / "eval"))
    assert path.read_bytes() == (done / "test.jsonl").read_bytes()


@pytest.mark.parametrize("sample_rows", [1, 12, 20])
def test_samples_do_not_depend_on_sample_rows(sample_rows, world, done, tmp_path):
    """Batches of 1, 3 and 5 problems instead of all 12: the same file. Memory and speed only."""
    evaluate.main(settings(world, tmp_path / "eval", sample_rows=sample_rows))
    assert (tmp_path / "eval" / "test.jsonl").read_bytes() == (done / "test.jsonl").read_bytes()


def test_samples_depend_on_the_seed(world, done, tmp_path):
    """Another --seed gives other samples."""
    evaluate.main(settings(world, tmp_path / "eval", seed=1, limit=3))
    for a, b in zip(lines(tmp_path / "eval"), lines(done)):
        assert a["problem"] == b["problem"] and a["responses"] != b["responses"]


@pytest.mark.parametrize("change, word", [
    ({"temperature": 0.5}, "temperature"), ({"seed": 1}, "seed"), ({"samples": 2}, "samples"),
    ({"max_new_tokens": 9}, "max_new_tokens"), ({"thinking": True}, "thinking"),
    ({"model": "init-teacher"}, "another model|weights|fingerprint")])
def test_samples_of_other_settings_are_not_mixed_in(change, word, world, done, tmp_path):
    """Another model or setting on the same folder is refused, named, and changes nothing there."""
    shutil.copytree(done, tmp_path / "eval")
    if "model" in change:
        change = {"model": str(world / change["model"])}
    before = (tmp_path / "eval" / "test.jsonl").read_bytes()
    with pytest.raises(UserError, match=word):
        evaluate.main(settings(world, tmp_path / "eval", **change))
    assert (tmp_path / "eval" / "test.jsonl").read_bytes() == before


def test_stored_samples_of_other_problems_are_not_taken_for_these(world, done, tmp_path):
    """A set of the same file name but with other problems must not be reported with old samples."""
    shutil.copytree(done, tmp_path / "eval")
    other = tmp_path / "test.jsonl"
    other.write_text((world / "train.jsonl").read_text())
    with pytest.raises(UserError):
        evaluate.main(settings(world, tmp_path / "eval", data=str(other), limit=12))


def test_two_sets_of_one_name_are_not_silently_merged(world, tmp_path):
    """a/test.jsonl and b/test.jsonl in one call: both or an error, never one of them dropped."""
    other = tmp_path / "test.jsonl"
    other.write_text((world / "valid.jsonl").read_text())
    try:
        evaluate.main(settings(world, tmp_path / "eval", data=f"{world / 'test.jsonl'},{other}",
                               max_new_tokens=2))
    except UserError as error:
        assert "test" in str(error)
    else:
        summary = json.loads((tmp_path / "eval" / "summary.json").read_text())["sets"]
        assert sorted(f["problems"] for f in summary.values()) == [8, 12]


def test_a_smaller_limit_reports_on_that_many_problems(world, done, tmp_path):
    """--limit 3 on a folder with 12 stored lines is about 3 problems; the stored ones stay."""
    shutil.copytree(done, tmp_path / "eval")
    evaluate.main(settings(world, tmp_path / "eval", limit=3))
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())["sets"]
    assert summary["test"]["problems"] == 3
    assert len(lines(tmp_path / "eval")) == 12


def test_temperature_zero_is_greedy_and_equal_in_all_samples(world, tmp_path):
    """At temperature 0 there is nothing to draw."""
    evaluate.main(settings(world, tmp_path / "eval", temperature=0.0, limit=2))
    assert all(len(set(e["responses"])) == 1 for e in lines(tmp_path / "eval"))


# --- regrading


def test_regrade_changes_verdicts_only_and_needs_no_model(done, tmp_path, monkeypatch, capsys):
    """A verifier that accepts everything: verdicts become correct, all else stays as stored."""
    shutil.copytree(done, tmp_path / "eval")
    monkeypatch.setattr(evaluate, "grade", lambda text, answer: "correct")
    monkeypatch.setattr(evaluate, "load_lm", lambda *a, **k: pytest.fail("loaded a model"))
    before = {n: lines(done, n) for n in ("test", "valid")}
    evaluate.main(Config(regrade=True, out=str(tmp_path / "eval")))
    for name, old in before.items():
        new = lines(tmp_path / "eval", name)
        assert [e["verdicts"] for e in new] == [["correct"] * 4] * len(old)
        assert [{**e, "verdicts": 0} for e in new] == [{**e, "verdicts": 0} for e in old]
    changed = Counter(v for e in before["test"] for v in e["verdicts"])
    assert f"test.jsonl: {48 - changed['correct']} verdicts changed" in capsys.readouterr().out
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert [f["avg"] for f in summary["sets"].values()] == [1.0, 1.0]


def test_regrade_restores_what_the_verifier_says(done, tmp_path):
    """Regrading with the same verifier undoes an edited verdict and gives the same bytes."""
    shutil.copytree(done, tmp_path / "eval")
    path = tmp_path / "eval" / "test.jsonl"
    first, *rest = lines(tmp_path / "eval")
    first["verdicts"] = ["gave_up"] * 4
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in [first, *rest]))
    evaluate.main(Config(regrade=True, out=str(tmp_path / "eval")))
    assert path.read_bytes() == (done / "test.jsonl").read_bytes()


def test_regrade_keeps_whose_samples_they_are(world, done, tmp_path):
    """The summary still names the model and the seconds of sampling after --regrade."""
    shutil.copytree(done, tmp_path / "eval")
    old = json.loads((done / "summary.json").read_text())
    evaluate.main(Config(regrade=True, out=str(tmp_path / "eval")))
    new = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert new["model"] == old["model"] == str(world / "init-student")
    assert new["seconds"] == old["seconds"]


# --- tables


def fake_run(root, name, parents=(), labels=None, seconds=0.0, sets=None, targets="soft"):
    """A finished run folder with what the table reads, and an evaluation if `sets` is given."""
    folder = root / name
    folder.mkdir(parents=True)
    record = {"settings": {"targets": targets}, "parents": [str(p) for p in parents],
              "labels": labels or {}, "seconds": seconds, "finished": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "run": record}))
    if sets:
        (folder / "eval").mkdir()
        figures = {s: {"avg": a, "se": e, "samples": 16, "pass": {"16": 1.0}} for s, (a, e)
                   in sets.items()}
        (folder / "eval" / "summary.json").write_text(json.dumps({"sets": figures}))
    return folder


def cells(table):
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


DATA = "d.jsonl"


def test_runs_table_counts_labels_and_seconds_over_ancestors(tmp_path):
    """A tree like run_all.sh's; every figure below is added up by hand.

    base (pretraining, 900 s, left out) -> teacher-1h (GRPO on 1H, 128 labels, 60 s) -> warmup
    (10 s) -> bridge-1h (20 s) -> fresh-2h (128 labels of 2H, 40 s) and replay-1h (1H again, 40 s).
    The teacher is an ancestor twice (of warmup and of bridge-1h) and counts once.
    """
    root = tmp_path / "world"
    base = fake_run(root, "base", targets="data", seconds=900, labels={f"{DATA}:all": 999},
                    sets={"test": (0.03, 0.01)})
    teacher = fake_run(root, "teacher-1h", [base], {f"{DATA}:1": 128}, 60)
    warmup = fake_run(root, "warmup", [teacher, base], {}, 10)
    bridge = fake_run(root, "bridge-1h", [teacher, warmup], {}, 20, {"test": (0.435, 0.0178)})
    fake_run(root, "fresh-2h", [bridge], {f"{DATA}:2": 128}, 40, {"test": (0.554, 0.02)})
    fake_run(root, "replay-1h", [bridge], {f"{DATA}:1": 128}, 40, {"test": (0.484, 0.018)})
    fake_run(root, "cold-grpo", [base], {f"{DATA}:all": 256}, 75.4,
             {"test": (0.206, 0.011), "hard": (0.01, None)})
    head, rows = cells(runs_table(root))
    test, hard = (next(i for i, h in enumerate(head) if h.startswith(name)) - 1
                  for name in ("test, avg@16", "hard, avg@16"))
    assert head[0] == "route" and head[3:5] == ["labels", "seconds"] and "paper" in head[5]
    got = {name: [row[test], row[hard], *row[2:]] for name, row in rows.items()}
    assert got == {
        "base": ["3.0 ± 1.0", "-", "0", "0", "-"],
        "cold-grpo": ["20.6 ± 1.1", "1.0", "256", "75", "75.9 / 19.8 / 17.1"],
        "bridge-1h": ["43.5 ± 1.8", "-", "128", "90", "75.4"],
        "fresh-2h": ["55.4 ± 2.0", "-", "256", "130", "78.5"],
        "replay-1h": ["48.4 ± 1.8", "-", "128", "130", "75.7"]}
    assert list(rows)[0] == "base", "others first, then the paper's routes"


def test_labels_of_halves_and_whole_are_a_union(tmp_path):
    """all + 1H = all; 1H + 2H = both; two sources add up."""
    root = tmp_path / "world"
    one = fake_run(root, "t1", [], {f"{DATA}:1": 10})
    whole = fake_run(root, "t", [one], {f"{DATA}:all": 21}, sets={"s": (0, 0)})
    fake_run(root, "halves", [one], {f"{DATA}:2": 11}, sets={"s": (0, 0)})
    fake_run(root, "other", [whole], {"C:/x.jsonl:2": 5}, sets={"s": (0, 0)})
    labels = {name: row[1] for name, row in cells(runs_table(root))[1].items()}
    assert labels == {"t": "21", "halves": "21", "other": "26"}


def test_an_ancestor_typed_with_another_spelling_counts_once(tmp_path):
    """`--teacher runs/t/` (tab completion) and `--teacher runs/t` are one run: 60 s, not 120."""
    root = tmp_path / "world"
    teacher = fake_run(root, "teacher", [], {f"{DATA}:1": 128}, 60)
    warmup = fake_run(root, "warmup", [f"{teacher}/"], {}, 10)
    fake_run(root, "bridge", [teacher, warmup], {}, 20, {"test": (0.5, 0.01)})
    assert cells(runs_table(root))[1]["bridge"][1:3] == ["128", "90"]


def test_a_folder_without_evaluations_is_one_readable_line(tmp_path):
    """--table of an empty folder says that nothing is evaluated there."""
    with pytest.raises(UserError, match="no evaluated run"):
        runs_table(tmp_path)


PAPER = [  # the paper's Tables 2 to 6 and 8: (folder above, route, numbers)
    ("qwen3-8b", "cold-grpo", (75.9, 19.8, 17.1)), ("qwen3-14b", "cold-grpo", (75.9, 19.8, 17.1)),
    ("qwen3-8b", "teacher-rl", (88.4, 47.7, 36.7)), ("qwen3-14b", "teacher-rl", (89.5, 47.1, 39.0)),
    ("qwen3-8b", "raw-bridge", (71.5, 15.0, 10.6)), ("qwen3-14b", "raw-bridge", (72.8, 16.7, 13.5)),
    ("qwen3-8b", "sft-teacher-bridge", (76.9, 22.1, 17.6)),
    ("qwen3-14b", "sft-teacher-bridge", (77.6, 23.2, 18.4)),
    ("qwen3-8b", "same-size-bridge", (76.5, 20.6, 17.1)),
    ("qwen3-8b", "bridge", (79.3, 25.2, 20.2)), ("qwen3-14b", "bridge", (78.6, 24.6, 20.8)),
    ("qwen3-8b", "opd-only", (77.6, 23.0, 18.9)), ("qwen3-14b", "opd-only", (77.1, 22.8, 18.6)),
    ("qwen3-8b", "sft", (76.0, 22.4, 19.4)), ("qwen3-14b", "sft", (76.5, 21.5, 17.0)),
    ("qwen3-8b", "bridge-1h", (75.4,)), ("qwen3-14b", "bridge-1h", (76.3,)),
    ("qwen3-8b", "fresh-2h", (78.5,)), ("qwen3-14b", "fresh-2h", (78.7,)),
    ("qwen3-8b", "replay-1h", (75.7,)), ("qwen3-14b", "replay-1h", (75.6,)),
    ("qwen3-8b", "sft-teacher-bridge-1h", (74.3,)), ("qwen3-14b", "sft-teacher-bridge-1h", (75.8,)),
    ("qwen3-8b", "sft-teacher-fresh-2h", (77.2,)), ("qwen3-14b", "sft-teacher-fresh-2h", (76.9,)),
    ("qwen3-8b", "sft-teacher-replay-1h", (74.0,)), ("qwen3-14b", "sft-teacher-replay-1h", (75.6,)),
    ("qwen3-8b", "opd-only-fresh-2h", (77.8,)), ("qwen3-14b", "opd-only-fresh-2h", (77.5,)),
    ("qwen3-8b", "sft-fresh-2h", (77.3,)), ("qwen3-14b", "sft-fresh-2h", (77.2,)),
    ("llama-3.3-70b-instruct", "cold-grpo", (59.8, 12.5, 7.2)),
    ("llama-3.3-70b-instruct", "raw-bridge", (55.4, 8.8, 3.1)),
    ("llama-3.3-70b-instruct", "bridge", (62.1, 14.9, 9.2)),
    ("llama-3.3-70b-instruct", "fresh-2h", ()),
    ("world", "base-student", ()), ("world-seed1", "bridge", (79.3, 25.2, 20.2)),
    ("ckpt", "bridge", ()), ("qwen3-4b", "bridge", ()),
]


@pytest.mark.parametrize("place, route, numbers", PAPER)
def test_papers_numbers_stand_beside_the_routes(place, route, numbers):
    """Each number of the paper, by the folder that run_all.sh writes."""
    assert tuple(evaluate.paper_row(f"runs/{place}/{route}")) == numbers


def test_mean_response_length_counts_the_stop_token(world, done):
    """A finished response's length includes its eos, as the losses count it."""
    lm = common.load_lm(str(world / "init-student"))
    finished = [(r, n) for e in lines(done) for r, n, f in
                zip(e["responses"], e["lengths"], e["finished"]) if f]
    plain = [(len(lm.tokenizer.encode(r, add_special_tokens=False)) + 1, n) for r, n in finished
             if "<" not in r]
    assert plain and all(a <= n for a, n in plain)  # <: a sampled <pad> or <unk> is not shown
    assert any(a == n for a, n in plain)


# --- several seeds


@pytest.mark.parametrize("df, quantile", [
    (1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (100_000, 1.960)])
def test_quantile_of_students_t(df, quantile):
    """Against the printed tables; the last is the normal distribution's."""
    assert evaluate.t95(df) == pytest.approx(quantile, abs=6e-4)


def test_mean_error_and_interval_over_seeds():
    """1, 2, 6 by hand: mean 3, sd sqrt(7), 4.303 standard errors each way; nan is no seed."""
    mean, se, half, n = evaluate.over_seeds(np.array([1.0, math.nan, 2.0, 6.0]))
    assert (mean, n) == (3.0, 3)
    assert se == pytest.approx(math.sqrt(7 / 3))
    assert half == pytest.approx(4.3027 * math.sqrt(7 / 3), abs=1e-3)


@pytest.mark.parametrize("sign, mean, sd, said", [
    # differences mean - sd, mean, mean + sd: half an interval is 4.303 sd / sqrt(3) = 2.484 sd
    ("<", 2.6, 1.0, "holds"), ("<", 2.4, 1.0, "not separated"), ("<", -2.4, 1.0, "not separated"),
    ("<", -2.6, 1.0, "reversed"),
    ("≈", 0.0, 0.8, "holds"), ("≈", 0.0, 0.9, "not separated"), ("≈", 1.7, 0.1, "holds"),
    ("≈", -1.7, 0.1, "holds"), ("≈", 1.8, 0.1, "differs"), ("≈", -1.8, 0.1, "differs"),
    ("≈", 1.8, 1.0, "not separated"),
    ("≤", 3.0, 1.0, "holds"), ("≤", 0.0, 0.8, "holds"), ("≤", -0.2, 0.7, "holds"),
    ("≤", 0.0, 0.9, "not separated"), ("≤", -2.4, 1.0, "not separated"),
    ("≤", -2.6, 1.0, "reversed"), ("≤", -1.7, 0.1, "reversed")])
def test_verdict_of_three_seeds(sign, mean, sd, said):
    """`≈` and `≤` let 2 points pass, but what is surely below 0 is not `≤`, however little."""
    assert evaluate.verdict(sign, np.array([mean - sd, mean, mean + sd])) == said


def test_two_seeds_and_a_missing_one_are_too_few():
    for sign in "<≈≤":
        assert evaluate.verdict(sign, np.array([5.0, math.nan, 5.1])) == "needs more seeds"


def test_the_papers_own_numbers_have_its_orderings():
    """On MATH-500 each of the ORDERINGS is what its tables print, so no pair is the wrong way."""
    paper = evaluate.PAPER["8b"]
    for name, a, sign, b in evaluate.ORDERINGS:
        d = paper[b][0] - paper[a][0]
        assert abs(d) < 0.5 if sign == "≈" else d > 0, (name, a, b)
    assert {name for name, *_ in evaluate.ORDERINGS} == {*(f"O{i}" for i in range(1, 10)),
                                                         "Table 5", "Table 6"}


def test_o2_is_asked_at_each_number_of_labels():
    """Where both routes were run; ours, so no part of the paper's orderings."""
    routes = {name: {"test": np.array([1.0, 2.0]) * i} for i, name in enumerate(
        ["bridge", "cold-grpo", "bridge-512", "cold-grpo-64", "bridge-64", "bridge-1h"])}
    found = [(name, a, b, by_set["test"].tolist())
             for name, a, _, b, by_set in evaluate.compared(routes)]
    assert found == [("O2", "cold-grpo", "bridge", [-1, -2]),
                     ("O2", "cold-grpo-64", "bridge-64", [1, 2])]


def fake_seeds(root, routes, **about):
    """Folders world, world-seed1, ... of runs: {route: a share per seed, None where it is not run};
    on the set `hard` each is half of that on `test`. `about` has fake_run's arguments by route."""
    count = max(map(len, routes.values()))
    folders = [root / ("world" if not i else f"world-seed{i}") for i in range(count)]
    for route, shares in routes.items():
        for folder, share in zip(folders, shares):
            sets = share is not None and {"test": (share, 0.01), "hard": (share / 2, 0.01)}
            parents, labels = about.get(route.replace("-", "_"), ((), None))
            fake_run(folder, route, [folder / p for p in parents], labels, 1.0, sets)
    return folders


def test_seeds_table_has_means_verdicts_and_every_seed(tmp_path, capsys):
    """Three seeds by hand. Differences are paired: bridge is 10, 11 and 12 above cold GRPO, whose
    own spread would hide that. opd-only was evaluated in two seeds only."""
    folders = fake_seeds(tmp_path, {
        "bridge": (0.3, 0.51, 0.72), "cold-grpo": (0.2, 0.4, 0.6), "opd-only": (0.26, None, 0.7),
        "mine": (0.5, 0.5, 0.5)}, cold_grpo=((), {f"{DATA}:all": 256}))
    evaluate.show_table(folders, str(tmp_path / "pictures"))
    printed = capsys.readouterr().out
    written = (tmp_path / "world" / "seeds.md").read_text()
    assert written.startswith(printed.split("\npictures")[0].rstrip())
    means, verdicts, _, test, _, hard = written.split("\n\n")
    assert means.splitlines()[2:] == [
        "| mine | 50.0 ± 0.0 | 25.0 ± 0.0 | 3 | 0 | - |",
        "| cold-grpo | 40.0 ± 11.5 | 20.0 ± 5.8 | 3 | 256 | 75.9 / 19.8 / 17.1 |",
        "| opd-only | 48.0 ± 22.0 | 24.0 ± 11.0 | 2 | 0 | 77.6 / 23.0 / 18.9 |",
        "| bridge | 51.0 ± 12.1 | 25.5 ± 6.1 | 3 | 0 | 79.3 / 25.2 / 20.2 |"]
    assert verdicts.splitlines()[2:] == [
        "| O2: cold-grpo < bridge | holds: +11.0 (+8.5 to +13.5), 3 of 3 "
        "| holds: +5.5 (+4.3 to +6.7), 3 of 3 | +3.4 |",
        "| O4: opd-only < bridge | needs more seeds: +3.0, 2 of 2 "
        "| needs more seeds: +1.5, 2 of 2 | +1.7 |"]
    assert test.splitlines()[0] == "| route | world | world-seed1 | world-seed2 |"
    assert test.splitlines()[3:] == [
        "| cold-grpo | 20.0 | 40.0 | 60.0 |", "| opd-only | 26.0 | - | 70.0 |",
        "| bridge | 30.0 | 51.0 | 72.0 |", "| bridge − cold-grpo | 10.0 | 11.0 | 12.0 |",
        "| bridge − opd-only | 4.0 | - | 2.0 |"]
    assert hard.splitlines()[-2] == "| bridge − cold-grpo | 5.0 | 5.5 | 6.0 |"


def test_seeds_that_agree_are_counted_by_the_sign(tmp_path):
    """`<` counts those above 0, `≈` those inside ±2, `≤` those not below 0."""
    folders = fake_seeds(tmp_path, {
        "bridge-1h": (0.5, 0.5, 0.5), "replay-1h": (0.51, 0.49, 0.45), "fresh-2h": (0.6, 0.4, 0.7),
        "bridge": (0.7, 0.4, 0.6)})
    rows = cells(evaluate.verdict_table(folders[0], evaluate.averages(folders)))[1]
    agree = {name.split(":")[0]: row[0].rsplit(", ")[-1] for name, row in rows.items()}
    assert agree == {"O5": "2 of 3", "O6": "2 of 3", "O7": "2 of 3", "O9": "2 of 3"}


def test_order_of_the_routes(tmp_path):
    """Other names, the paper's routes, then the series by their numbers, not their spelling."""
    want = ["mine", "base-student", "cold-grpo", "bridge", "bridge-1h", "lambda-0.25", "lambda-1",
            "cold-grpo-32", "cold-grpo-128"]
    for route in sorted(want):
        fake_run(tmp_path, route, sets={"test": (0.5, 0.1)})
    assert [folder.name for folder in evaluate.evaluated_runs(tmp_path)] == want


def test_label_budgets_are_those_of_the_whole_chain(tmp_path):
    """A bridge has its teacher's labels; a half is no budget; one is no series."""
    folders = fake_seeds(tmp_path, {
        "teacher-rl": (None,), "teacher-rl-16": (None,), "bridge-128": (0.4,), "bridge": (0.5,),
        "bridge-16": (0.3,), "bridge-1h": (0.4,), "cold-grpo": (0.3,)},
        teacher_rl=((), {f"{DATA}:all": 256}), teacher_rl_16=((), {f"{DATA}:all": 16}),
        bridge=(["teacher-rl"], None), bridge_16=(["teacher-rl-16"], None),
        bridge_128=((), {f"{DATA}:1": 128}), bridge_1h=((), {f"{DATA}:1": 128}))
    routes = evaluate.averages(folders)
    assert evaluate.label_budgets(folders, routes) == {
        "bridge": [(16, "bridge-16"), (128, "bridge-128"), (256, "bridge")]}


def metrics(folder, name, values):
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, name: v}) + "\n" for i, v in enumerate(values)))


def test_curves_are_of_finished_runs_and_cut_to_the_shortest(tmp_path):
    """A run that is still writing is neither read nor repaired; a metric's null becomes nan."""
    folders = fake_seeds(tmp_path, {"cold-grpo": (0.1, 0.2, 0.3)})
    metrics(folders[0] / "cold-grpo", "reward", [0.1, None, 0.3])
    metrics(folders[1] / "cold-grpo", "reward", [0.5, 0.6])
    running = folders[2] / "cold-grpo"
    (running / "config.json").write_text(json.dumps({"run": {"finished": False}}))
    (running / "metrics.jsonl").write_text('{"step": 0, "rew')
    got = evaluate.curve(folders, "cold-grpo", "reward")
    np.testing.assert_array_equal(got, [[0.1, math.nan], [0.5, 0.6]])
    assert (running / "metrics.jsonl").read_text() == '{"step": 0, "rew'
    assert evaluate.curve(folders, "fresh-2h", "reward") is None


@pytest.fixture
def every_picture(tmp_path):
    """Four seeds of what the four pictures show."""
    names = ["raw-bridge", "cold-grpo", "bridge-1h", "replay-1h", "fresh-2h", "bridge",
             "cold-grpo-16", "bridge-16", "lambda-0.5", "lambda-1"]
    folders = fake_seeds(tmp_path, {name: [0.2 + 0.05 * i + 0.1 * s + 0.01 * (i * s % 3)
                                           for s in range(4)] for i, name in enumerate(names)},
                         cold_grpo=((), {f"{DATA}:all": 256}), bridge=((), {f"{DATA}:all": 256}),
                         cold_grpo_16=((), {f"{DATA}:all": 16}),
                         bridge_16=((), {f"{DATA}:all": 16}))
    for s, folder in enumerate(folders):
        noise = np.random.default_rng(s).normal(size=(2, 80))
        metrics(folder / "cold-grpo", "reward", 0.5 + 0.1 * noise[0])
        metrics(folder / "bridge", "kl", np.exp(0.3 * noise[1]))
    return folders


PICTURES = ["curves.png", "density.png", "labels.png", "orderings.png"]


@pytest.mark.parametrize("seeds, drawn", [
    (4, PICTURES), (1, ["curves.png", "density.png", "labels.png"])])
def test_pictures_are_drawn_and_small(seeds, drawn, every_picture, tmp_path):
    """PNG files of some 600 x 400 pixels and at most 45 kB; one seed orders nothing."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    out = tmp_path / "pictures"
    evaluate.main(Config(table=",".join(map(str, every_picture[:seeds])), pictures=str(out)))
    assert sorted(p.name for p in out.iterdir()) == drawn
    for path in out.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= 45_000
        with image.open(path) as picture:
            width, height = picture.size
            assert width == 600 and 200 <= height <= 500
            assert len(picture.convert("RGB").getcolors(1 << 16)) > 8, "empty"


def test_pictures_without_their_runs_are_left_out(tmp_path):
    """Two orderings' routes only: no curves, budgets or densities; beside the table by default."""
    pytest.importorskip("matplotlib")
    folders = fake_seeds(tmp_path, {"cold-grpo": (0.1, 0.2, 0.3), "bridge": (0.2, 0.3, 0.5)})
    evaluate.main(Config(table=",".join(map(str, folders))))
    assert [p.name for p in tmp_path.rglob("*.png")] == ["orderings.png"]
    assert (folders[0] / "orderings.png").exists()


def test_without_matplotlib_the_table_stands_and_a_line_says_so(every_picture, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate.main(Config(table=",".join(map(str, every_picture))))
    assert "pictures left out: matplotlib" in capsys.readouterr().out.splitlines()[-1]
    assert (every_picture[0] / "seeds.md").exists()
    assert not list(every_picture[0].glob("*.png"))


def test_pictures_alone_are_refused():
    with pytest.raises(UserError, match="--table"):
        evaluate.main(Config(model="m", pictures="p"))
