"""tests/lab/evidence.py: means, verdicts and pictures over seeds, on folders made by hand."""

import contextlib
import doctest
import functools
import hashlib
import json
import math
import re
import runpy
import sys

import distance
import evidence
import numpy as np
import pytest
import world as world_module
from conftest import ROOT
from test_evaluate import cells, fake_run

import common
import evaluate

@pytest.mark.parametrize("df, quantile", [
    (1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (100_000, 1.960)])
def test_quantile_of_students_t(df, quantile):
    """Against the printed tables; the last is the normal distribution's."""
    assert evidence.t95(df) == pytest.approx(quantile, abs=6e-4)
    assert doctest.testmod(evidence).failed == 0

def test_mean_error_and_interval_over_seeds():
    """1, 2, 6 by hand: mean 3, sd sqrt(7), 4.303 standard errors each way; nan is no seed."""
    found = evidence.over_seeds(np.array([1.0, math.nan, 2.0, 6.0]))
    error = math.sqrt(7 / 3)
    assert found == pytest.approx((3.0, error, 4.3027 * error, 3), abs=1e-3)

@pytest.mark.parametrize("sign, mean, sd, said", [
    # differences mean - sd, mean, mean + sd: half an interval is 4.303 sd / sqrt(3) = 2.484 sd
    ("<", 2.6, 1.0, "holds"), ("<", 2.4, 1.0, "open"), ("<", -2.4, 1.0, "open"),
    ("<", -2.6, 1.0, "reversed"),
    ("≈", 0.0, 0.8, "holds"), ("≈", 0.0, 0.9, "open"), ("≈", 1.7, 0.1, "holds"),
    ("≈", -1.7, 0.1, "holds"), ("≈", 1.8, 0.1, "differs"), ("≈", -1.8, 0.1, "differs"),
    ("≈", 1.8, 1.0, "open"),
    ("≤", 3.0, 1.0, "holds"), ("≤", 0.0, 0.8, "holds"), ("≤", -0.2, 0.7, "holds"),
    ("≤", 0.0, 0.9, "open"), ("≤", -2.4, 1.0, "open"),
    ("≤", -2.6, 1.0, "reversed"), ("≤", -1.7, 0.1, "reversed")])
def test_verdict_of_three_seeds(sign, mean, sd, said):
    """`≈` and `≤` let 2 points pass, but what is surely below 0 is not `≤`, however little. Two
    seeds are too few."""
    assert evidence.verdict(sign, np.array([mean - sd, mean, mean + sd])) == said
    assert evidence.verdict(sign, np.array([mean, math.nan, mean])) == "needs more seeds"

def test_the_papers_own_numbers_have_its_orderings():
    """On MATH-500 each of the ORDERINGS is what its tables print, so no pair is the wrong way."""
    paper = evaluate.PAPER["qwen3-8b"]
    for name, a, sign, b in evidence.ORDERINGS:
        d = paper[b][0] - paper[a][0]
        assert abs(d) < 0.5 if sign == "≈" else d > 0, (name, a, b)
    assert {name for name, *_ in evidence.ORDERINGS} == {*(f"O{i}" for i in range(1, 10)),
                                                         "Table 5", "Table 6"}

def test_o2_is_asked_at_each_number_of_labels():
    """Where both routes were run; ours, so no part of the paper's orderings."""
    routes = {name: {"test": np.array([1.0, 2.0]) * i} for i, name in enumerate(
        ["bridge", "cold-grpo", "bridge-512", "cold-grpo-64", "bridge-64", "bridge-1h"])}
    found = [(name, a, b, by_set["test"].tolist())
             for name, a, _, b, by_set in evidence.compared(routes)]
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
            parents, labels = about.get(route.replace("-", "_"), ((), ()))
            fake_run(folder, route, [folder / p for p in parents], labels, 1.0, sets)
    return folders

def test_tables_have_means_verdicts_and_every_seed(tmp_path, capsys):
    """Three seeds by hand. Differences are paired: bridge is 10, 11 and 12 above cold GRPO, whose
    own spread would hide that. opd-only was evaluated in two seeds only."""
    folders = fake_seeds(tmp_path, {
        "bridge": (0.3, 0.51, 0.72), "cold-grpo": (0.2, 0.4, 0.6), "opd-only": (0.26, None, 0.7),
        "mine": (0.5, 0.5, 0.5)}, cold_grpo=((), range(256)))
    evidence.main([",".join(map(str, folders)), "--pictures", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out
    written = (tmp_path / "world" / "seeds.md").read_text()
    assert printed.split("\npictures")[0].rstrip() in written
    title, made_by, _, means, _, verdicts, _, test, _, hard = written.split("\n\n")
    assert title == "# What 3 seeds say" and "git -, torch -" in made_by
    assert made_by.startswith(f"Written by `python tests/lab/evidence.py {folders[0]},")
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

def test_a_gain_is_compared_with_a_gain(tmp_path):
    """By hand: the cold student gains 45, 46, 50 points and the bridged 10, 10, 13; so −36 ± 2.5
    (4.303 · 1.0 / √3). The paper has no base student. FURTHER rows follow in --tables, which also
    has the commits and versions that the runs have recorded."""
    folders = fake_seeds(tmp_path, {
        "base-student": (0.1, 0.11, 0.12), "cold-grpo-2h": (0.55, 0.57, 0.62),
        "bridge-1h": (0.6, 0.7, 0.6), "fresh-2h": (0.7, 0.8, 0.73), "cold-grpo": (0.6, 0.6, 0.6)})
    for folder, git in zip(folders, ("one-dirty 123", "two 123", "two 456")):
        config = folder / "fresh-2h" / "config.json"
        record = json.loads(config.read_text())
        record["run"] |= {"git": git, "versions": {"torch": "2.13.0+cpu"}}
        config.write_text(json.dumps(record))
    evidence.main([*map(str, folders), "--tables", str(tmp_path / "told.md")])
    written = (tmp_path / "told.md").read_text()
    assert not (folders[0] / "seeds.md").exists()
    assert "The runs: git one-dirty, two, torch 2.13.0+cpu." in written
    rows = cells(written.split("## Orderings of the paper\n\n")[1].split("\n\n")[0])[1]
    assert rows["gain: cold-grpo-2h − base-student < fresh-2h − bridge-1h"] == [
        "reversed: -36.0 (-38.5 to -33.5), 0 of 3", "reversed: -18.0 (-19.2 to -16.8), 0 of 3", "-"]
    assert "| (fresh-2h − bridge-1h) − (cold-grpo-2h − base-student) | -35.0 | -36.0 | -37.0 |" in (
        written.split("## Every seed: test")[1])
    further = cells(written.split("## More differences\n\n")[1].split("\n\n")[0])[1]
    assert list(further) == ["R5: cold-grpo < fresh-2h"]

@pytest.mark.parametrize("which, changed, message", [
    ([0, 1, 0], {}, "a folder is named twice"),
    ([0, 1, 2], {"problems": 8}, "world-seed1/bridge: hard has 8 problems of 16 samples, elsewhere "
                                 "9 problems of 16 samples"),
    ([0, 1, 2], {"samples": 4}, "hard has 9 problems of 4 samples, elsewhere 9 problems of 16")])
def test_what_cannot_be_compared_is_refused(which, changed, message, tmp_path):
    folders = fake_seeds(tmp_path, {"cold-grpo": (0.2, 0.4, 0.6), "bridge": (0.3, 0.5, 0.7)})
    path = folders[1] / "bridge/eval/summary.json"
    summary = json.loads(path.read_text())
    summary["sets"]["hard"] |= changed
    path.write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match=message):
        evidence.main([str(folders[i]) for i in which])

def test_seeds_that_agree_are_counted_by_the_sign(tmp_path):
    """`<` counts those above 0, `≈` those inside ±2, `≤` those not below 0."""
    folders = fake_seeds(tmp_path, {
        "bridge-1h": (0.5, 0.5, 0.5), "replay-1h": (0.51, 0.49, 0.45), "fresh-2h": (0.6, 0.4, 0.7),
        "bridge": (0.7, 0.4, 0.6)})
    rows = cells(evidence.verdict_table(folders[0], evidence.averages(folders)))[1]
    agree = {name.split(":")[0]: row[0].rsplit(", ")[-1] for name, row in rows.items()}
    assert agree == {"O5": "2 of 3", "O6": "2 of 3", "O7": "2 of 3", "O9": "2 of 3"}

def test_order_of_the_routes():
    """Other names, the paper's routes, then the series by their numbers, not their spelling."""
    want = ["mine", "base-student", "cold-grpo", "bridge", "bridge-1h", "lambda-0.25", "lambda-1",
            "cold-grpo-32", "cold-grpo-128"]
    assert sorted(sorted(want), key=evidence.route_order) == want

def test_label_budgets_are_those_of_the_whole_chain(tmp_path):
    """A bridge has its teacher's labels; a half is no budget; one is no series."""
    folders = fake_seeds(tmp_path, {
        "teacher-rl": (None,), "teacher-rl-16": (None,), "bridge-128": (0.4,), "bridge": (0.5,),
        "bridge-16": (0.3,), "bridge-1h": (0.4,), "cold-grpo": (0.3,)},
        teacher_rl=((), range(256)), teacher_rl_16=((), range(16)), bridge=(["teacher-rl"], ()),
        bridge_16=(["teacher-rl-16"], ()), bridge_128=((), range(128)), bridge_1h=((), range(128)))
    assert evidence.label_budgets(folders, evidence.averages(folders)) == {
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
    got = evidence.curve(folders, "cold-grpo", "reward")
    np.testing.assert_array_equal(got, [[0.1, math.nan], [0.5, 0.6]])
    assert (running / "metrics.jsonl").read_text() == '{"step": 0, "rew'
    assert evidence.curve(folders, "fresh-2h", "reward") is None

@pytest.fixture
def every_picture(tmp_path):
    """Four seeds of what the four pictures show."""
    names = ["raw-bridge", "cold-grpo", "bridge-1h", "replay-1h", "fresh-2h", "bridge",
             "cold-grpo-16", "bridge-16", "lambda-0.5", "lambda-1"]
    many, few = ((), range(256)), ((), range(16))
    folders = fake_seeds(tmp_path, {name: [0.2 + 0.05 * i + 0.1 * s + 0.01 * (i * s % 3)
                                           for s in range(4)] for i, name in enumerate(names)},
                         cold_grpo=many, bridge=many, cold_grpo_16=few, bridge_16=few)
    for s, folder in enumerate(folders):
        noise = np.random.default_rng(s).normal(size=(2, 80))
        metrics(folder / "cold-grpo", "reward", 0.5 + 0.1 * noise[0])
        metrics(folder / "bridge", "kl", np.exp(0.3 * noise[1]))
    return folders

@pytest.mark.parametrize("seeds, drawn", [
    (4, ["curves.png", "density.png", "labels.png", "orderings.png"]),
    (1, ["curves.png", "density.png", "labels.png"])])
def test_pictures_are_drawn_and_small(seeds, drawn, every_picture, tmp_path):
    """PNG files of some 600 x 400 pixels and at most 45 kB; one seed orders nothing, and leaves the
    tables of several as they are."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    out = tmp_path / "pictures"
    evidence.main([*map(str, every_picture[:seeds]), "--pictures", str(out)])
    assert sorted(p.name for p in out.iterdir()) == drawn
    assert (every_picture[0] / "seeds.md").exists() == (seeds > 1)
    for path in out.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= 45_000
        with image.open(path) as picture:
            width, height = picture.size
            assert width == 600 and 200 <= height <= 500
            assert len(picture.convert("RGB").getcolors(1 << 16)) > 8, "empty"

def test_pictures_without_their_runs_or_matplotlib_are_left_out(tmp_path, monkeypatch, capsys):
    """Two orderings' routes only: no curves, budgets, densities. Pictures are beside the table."""
    folders = fake_seeds(tmp_path, {"cold-grpo": (0.1, 0.2, 0.3), "bridge": (0.2, 0.3, 0.5)})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        evidence.main(list(map(str, folders)))
    assert "pictures left out: matplotlib" in capsys.readouterr().out.splitlines()[-1]
    assert (folders[0] / "seeds.md").exists() and not list(tmp_path.rglob("*.png"))
    pytest.importorskip("matplotlib")
    evidence.main(list(map(str, folders)))
    assert list(tmp_path.rglob("*.png")) == [folders[0] / "orderings.png"]

def test_a_folder_without_evaluations_is_one_readable_line(tmp_path):
    with pytest.raises(SystemExit, match="error: no evaluated run in"):
        evidence.main([str(tmp_path)])

def test_a_problems_solution_is_right(world):
    rows = common.read_json_lines(world / "pool.jsonl") + common.read_json_lines(
        world / "hard.jsonl")
    for row in rows:
        chain, results = re.findall(r"[a-h]([-+*]\d)", row["problem"]), row["problem"][0]
        *lines, box = row["solution"].split(",", len(chain))
        for line, step in zip(lines, chain, strict=True):
            results += str(eval(results[-1] + step) % 10)
            assert line[1:] == f"{results[-2]}{step}={results[-1]}"
        assert box == f"\\boxed{{{row['answer']}}}" == f"\\boxed{{({','.join(results[1:])})}}"

# --- the student's distance from its teacher

def test_a_worlds_distance_changes_the_students_form_and_nothing_else(tmp_path):
    """Own form undone, all files are those of the world of 0, and those of every machine. The
    documents in the student's own form are a half of those at 1; there, no other form is left."""
    small = functools.partial(world_module.build, seed=5, documents=400, test=12, valid=8, hard=4)
    folders = {d: small(tmp_path / f"{d:g}", distance=d) for d in (0.0, 0.5, 1.0)}
    own, found = re.compile(r"\(([a-h]\d[-+*]\d=\d)\)"), {}
    for d, folder in folders.items():
        text = (folder / "corpus-student.jsonl").read_text()
        found[d] = {i for i, line in enumerate(text.splitlines()) if own.search(line)}
        digest = hashlib.md5(own.sub(r"\1,", text).encode())
        for name in ("corpus-teacher", "train", "pool", "valid", "test", "hard"):
            digest.update((folder / f"{name}.jsonl").read_bytes())
        digest.update((folder / "init-student" / "tokenizer.json").read_bytes())
        assert digest.hexdigest() == "b422eed9c8450f5a3ac4f64d7db02744"
    assert not found[0] and found[0.5] < found[1] and 100 < len(found[1]) < 160
    assert 0.4 < len(found[0.5]) / len(found[1]) < 0.6
    assert not re.search(r"[a-h]\d[-+*]\d=\d,", text)
    lm = common.describe_lm(str(folders[1.0] / "init-student"))
    chains = [row["response"] for row in map(json.loads, text.splitlines()) if row["problem"]]
    tokens = [lm.tokenizer.encode(response) for response in chains]
    assert max(map(len, tokens)) == 43 and not any(lm.tokenizer.unk_token_id in x for x in tokens)

@pytest.mark.parametrize("flags, message", [
    ("--distance 1.5", "--distance 1.5 is not in"), ("--distance -0.1", "is not in"),
    ("--distance 0.5", "holds the world of {'seed': 0}, not of {'seed': 0, 'distance': 0.5}"),
    ("--seed 3", "holds the world of {'seed': 0}, not of {'seed': 3}"), ("--seed 0", ""),
    ("--scale large", "holds the world of {'seed': 0}, not of {'seed': 0, 'scale': 'large'}")])
def test_a_folder_keeps_its_world(flags, message, world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["world.py", "--out", str(world), *flags.split()])
    with pytest.raises(SystemExit, match=message) if message else contextlib.nullcontext():
        runpy.run_path(str(ROOT / "tests/world.py"), run_name="__main__")

def test_the_sweep_is_matched_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    """A distance of a tiny world, three updates a route; the teacher is that of distance 0."""
    monkeypatch.setattr(world_module, "build", functools.partial(
        world_module.build, documents=64, train=6, valid=2, test=4, hard=2))
    monkeypatch.setattr(distance, "SIZES", {x: {"lr": 1e-3, "steps": 1} for x in distance.SIZES})
    monkeypatch.setattr(distance, "RL", {"prompts": 2, "mini_batch": 2, "kl_coef": 0.0, "steps": 1})
    monkeypatch.setattr(distance, "DISTIL", {"prompts": 2, "rollouts": 2, "lr": 1e-3})
    monkeypatch.setattr(distance, "LENGTH", 6)
    monkeypatch.setenv("JOBS", "1")
    flags = ["--out", str(tmp_path), "--seeds", "3", "--distances", "1", "--updates", "3"]
    distance.main(flags)
    folder = tmp_path / "seed3" / "1"
    runs = {p.parent.name: common.read_record(p.parent) for p in folder.glob("*/config.json")}
    steps = {name: run["settings"]["steps"] for name, run in runs.items() if name[:4] != "base"}
    assert steps == {"bridge-3-warmup": 1, "bridge-3": 2, "opd-only-3": 3, "warmup-only-3": 3}
    for name in steps:
        student = folder / ("bridge-3-warmup" if name == "bridge-3" else "base-student")
        assert runs[name]["parents"] == [str(tmp_path / "seed3/0/teacher-rl"), str(student)]
    for a, b in (("opd-only-3", "bridge-3"), ("warmup-only-3", "bridge-3-warmup")):
        a, b = (runs[name]["settings"] for name in (a, b))
        assert {k for k in a if a[k] != b[k]} <= {"steps", "student", "out"}
    printed = capsys.readouterr().out
    for module in (distance.fkl_warmup, distance.opd, distance.grpo, distance.evaluate):
        monkeypatch.setattr(module, "main", lambda cfg: pytest.fail(f"{cfg.out} runs again"))
    distance.main(flags)
    assert capsys.readouterr().out == printed and "\n| 3 | 1 | " in printed
    monkeypatch.setattr(distance, "RL", {**distance.RL, "steps": 2})
    with pytest.raises(pytest.fail.Exception, match="0/teacher-rl runs again"):
        distance.main(flags)

def test_a_sweep_that_is_in_use_is_one_line(tmp_path, monkeypatch):
    def used(task):
        raise common.UserError("it is in use")

    monkeypatch.setenv("JOBS", "1")
    monkeypatch.setattr(distance, "work", used)
    with pytest.raises(SystemExit, match="error: it is in use"):
        distance.main(["--out", str(tmp_path)])

def test_the_sweeps_table_has_paired_differences(tmp_path):
    """Three seeds by hand: the bridge is 10, 11, 12 above OPD alone, whose own spread is larger."""
    near = {"s‖t": [0.1, 0.2, 0.3], "t‖s": [1, 1, 4], "base-student": [5, 5, 5],
            "bridge-9": [20, 41, 62], "opd-only-9": [10, 30, 50], "warmup-only-9": [20, 41, 62]}
    figures = {0.5: {name: np.array(values) for name, values in near.items()}}
    assert distance.table(figures, [9]).splitlines()[2] == (
        "| 9 | 0.5 | 0.20 | 2.00 | 5.0 ± 0.0 | 41.0 ± 12.1 | 30.0 ± 11.5 | 41.0 ± 12.1 | "
        "+11.0 (+8.5 to +13.5) | +0.0 (+0.0 to +0.0) | 1.00 1.00 4.00 | +10.0 +11.0 +12.0 |")
    pytest.importorskip("matplotlib")
    distance.draw(figures, [9], tmp_path / "distance.png")
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")
