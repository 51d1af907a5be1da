"""Several processes do what one does: the stages and evaluate.py over gloo, on a CPU.

The processes are forked children with torchrun's environment: they have this process's imports, so
that a run takes two seconds and not ten. What they compute, write and resume is compared with one
process: the same rollouts and metrics, gradients and weights within 1e-5.
"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface

import common
from common import Rollout, UserError, micro_batches, shares

TIMING = re.compile("seconds.*|tokens_per_second|sampler_gap")


def nothing():
    pass


def run(line, n=1, before=nothing):
    """A command line in n children that are one group, before() in each. Returns a list of (exit
    status, what it wrote to stderr); 1 child has no group."""
    script, *words = shlex.split(line)

    def work():
        sys.argv = [script, *words]
        before()
        module = importlib.import_module(script.removesuffix(".py"))
        common.run_cli(module.main, module.Config, module.__doc__)

    return children(work, n)


def children(work, n):
    """work() in n children that are one group; returns as `run` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, sleep = [], time.sleep
    for this in range(n):
        memory = os.memfd_create("err")
        pid = os.fork()
        if pid == 0:
            status = 1
            signal.alarm(120)  # processes that wait for each other for ever are a failed test
            try:
                torch.set_num_threads(1)  # makes torch's pool again, before threads race to do it
                os.dup2(memory, 2)
                sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", buffering=1)
                time.sleep = lambda seconds: sleep(seconds / 10)  # who fails last need not wait
                if n > 1:
                    os.environ.update(RANK=str(this), LOCAL_RANK=str(this), WORLD_SIZE=str(n),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                work()
                status = 0
            except SystemExit as end:
                status = 1 if isinstance(end.code, str) else end.code or 0
                print("\n" + str(end.code if isinstance(end.code, str) else ""), file=sys.stderr)
            except BaseException as error:
                print(f"Traceback {error!r}", file=sys.stderr)
            finally:
                if n > 1 and this == 0:
                    sleep(0.3)  # it holds the store, as torchrun does for real processes
                os._exit(status)
        started.append((pid, memory))
    found = []
    for pid, memory in started:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.lseek(memory, 0, os.SEEK_SET)
        with os.fdopen(memory, encoding="utf-8") as file:
            found.append((status, file.read()))
    return found


def keep_all():
    """Let a stage keep its checkpoints, and write the rollouts of each step to its folder."""
    common.Run.drop_checkpoints = lambda run: None
    sample_shared, out = common.sample_shared, Path(sys.argv[sys.argv.index("--out") + 1])

    def kept(*args, **kwargs):
        rows = sample_shared(*args, **kwargs)
        if common.rank() == 0:
            common.append_json_line(out / "sampled.jsonl", [[r.prompt, r.tokens] for r in rows])
        return rows

    for stage in ("grpo", "opd"):
        importlib.import_module(stage).sample_shared = kept


@pytest.fixture
def line_of(world, taught):
    """line_of(stage, out, flags): a small run of two steps that saves after each."""

    def line(stage, out, flags=""):
        models = (f"--model {taught.model}" if stage == "grpo" else
                  f"--teacher {taught.model} --student {world}/init-student")
        return (f"{stage}.py {models} --data {taught.data} --exclude none --max-new-tokens 16 "
                f"--steps 2 --lr 1e-4 --micro-tokens 60 --show-every 0 --save-every 1 --out {out} "
                f"{flags}")

    return line


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not TIMING.fullmatch(k)} for line in lines]


def assert_same_run(a, b):
    """Metrics, and the checkpoints: weights, and AdamW's moments, which hold the gradients."""
    one, two = metrics(a), metrics(b)
    assert len(one) == 2
    for x, y in zip(one, two, strict=True):
        assert x == pytest.approx(y, rel=2e-3, abs=1e-6)
    for path in sorted(a.glob("state-*.pt")):
        old, new = (torch.load(p, weights_only=True) for p in (path, b / path.name))
        assert list(old["model"]) == list(new["model"])
        for name in old["model"]:
            torch.testing.assert_close(old["model"][name], new["model"][name], atol=1e-5, rtol=0)
        assert list(old["optimizer"]["state"]) == list(new["optimizer"]["state"])
        for i, state in old["optimizer"]["state"].items():
            torch.testing.assert_close(state, new["optimizer"]["state"][i], atol=1e-6, rtol=1e-3)
    old, new = (common.load_lm(str(x)).model.state_dict() for x in (a, b))
    for name in old:
        torch.testing.assert_close(old[name], new[name], atol=1e-5, rtol=0)


CASES = {
    "grpo": ("grpo", 2, "--prompts 6 --mini-batch 3 --rollouts 3 --kl-coef 0.1"),
    # rows without an advantage: passes without a gradient between the backward pass and the update
    "grpo, no KL": ("grpo", 2, "--prompts 6 --mini-batch 3 --rollouts 2 --kl-coef 0 "
                               "--gather layer --sample-rows 3"),
    "fkl_warmup": ("fkl_warmup", 2, "--prompts 3 --rollouts 3 --gather layer"),
    "opd": ("opd", 2, "--prompts 5 --rollouts 3"),
    "opd and reward": ("opd", 2, "--prompts 5 --rollouts 3 --student {taught} --teacher {taught} "
                                 "--sparse-weight 0.5"),
    # two rows an update for three processes; and a row a micro-batch: some have nothing to sample
    "grpo, few rows": ("grpo", 3, "--prompts 2 --mini-batch 1 --rollouts 2 --kl-coef 0.1 "
                                  "--gradient-checkpointing --seed 1"),
    "opd, few rows": ("opd", 3, "--prompts 1 --rollouts 2 --estimator return --cpu-offload "
                                "--gather layer"),
}


@pytest.mark.parametrize("case", CASES)
def test_several_processes_do_what_one_does(case, line_of, tmp_path, taught):
    stage, n, flags = CASES[case]
    flags = flags.format(taught=taught.model)
    outs = [tmp_path / "one", tmp_path / "many"]
    for out, processes in zip(outs, (1, n)):
        found = run(line_of(stage, out, flags), processes, keep_all)
        assert [status for status, _ in found] == [0] * processes, found
    assert len(list(outs[0].glob("state-*.pt"))) == 1
    assert_same_run(*outs)
    start = torch.load(outs[0] / "state-00000001.pt", weights_only=True)["model"]
    end = common.load_lm(str(outs[1])).model.state_dict()
    assert any((start[name] - end[name]).abs().max() > 2e-5 for name in start)  # it moves
    if stage != "fkl_warmup":
        one, two = ((out / "sampled.jsonl").read_text() for out in outs)
        assert one == two and one.count("\n") == 2
    else:
        one, two = ([{**json.loads(line), "seconds": 0} for line in open(out / "rollouts.jsonl")]
                    for out in outs)  # one process writes a prompt when it has ended
        assert one[0] == two[0] and len(one) == len(two)
        assert sorted(one[1:], key=str) == sorted(two[1:], key=str)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, line_of, tmp_path):
    """One process of the first run hears of a signal; all end after that step with it saved."""
    flags = "--prompts 4 --rollouts 3"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(line_of("opd", whole, flags))[0][0] == 0

    def hear():
        log = common.Run.log

        def stopped(self, *args, **kwargs):
            log(self, *args, **kwargs)
            self.stop_signal = 15 if common.rank() == first - 1 else None

        common.Run.log = stopped

    found = run(line_of("opd", parts, flags), first, hear)
    assert [status for status, _ in found] == [143] * first
    assert sum("stopped by SIGTERM after 1 steps" in err for _, err in found) == 1
    assert [p.name for p in parts.glob("state-*.pt")] == ["state-00000001.pt"]
    found = run(line_of("opd", parts, flags), then)
    assert [status for status, _ in found] == [0] * then, found
    assert_same_run(whole, parts)
    found = run(line_of("opd", parts, flags), 2)  # it has finished already
    assert [(status, err.strip()) for status, err in found] == [(0, "")] * 2


def test_bf16_compute_with_fp32_masters(line_of, world, tmp_path):
    """Two processes round to bf16 at other places than one (weights of norms; gradients of other
    micro-batches): the first gradient is that of one process within 1 % (measured 0.2 %, and in
    fp32 2e-7), and the moves of two steps point the same way, cosine > 0.99 (0.996), though the
    second step has a few other rollouts. Gathering layer by layer changes no bit.
    """
    ends, grads, sampled = {}, {}, {}
    for name, n, flags in (("one", 1, ""), ("full", 2, ""), ("layer", 2, "--gather layer")):
        out = tmp_path / name
        line = line_of("opd", out, f"--prompts 4 --rollouts 3 --dtype bf16 --lr 1e-3 {flags}")
        found = run(line, n, keep_all)
        assert [status for status, _ in found] == [0] * n, found
        state = torch.load(out / "state-00000001.pt", weights_only=True)
        moments = [values["exp_avg"] for values in state["optimizer"]["state"].values()]
        masters = torch.cat([value.flatten() for value in state["model"].values()])
        assert {x.dtype for x in [masters, *moments]} == {torch.float32}
        assert (masters == masters.bfloat16()).float().mean() < 0.01  # their last bits are in use
        ends[name] = common.load_lm(str(out)).model.state_dict()
        grads[name] = torch.cat([x.flatten() for x in moments])
        sampled[name] = (out / "sampled.jsonl").read_text()
    gap = (grads["full"] - grads["one"]).norm() / grads["one"].norm()
    assert 1e-4 < gap < 0.01  # not 0: it is bf16
    start = common.load_lm(f"{world}/init-student").model.state_dict()
    one, two = (torch.cat([(ends[x][k] - start[k]).flatten() for k in start])
                for x in ("one", "full"))
    assert torch.cosine_similarity(one, two, 0) > 0.99
    assert sampled["full"] == sampled["layer"]
    assert all(torch.equal(ends["full"][k], ends["layer"][k]) for k in start)


def test_evaluation_gives_the_same_bytes(taught, world, tmp_path):
    def read_nothing():
        """A sharded model is read by rank 0 only."""
        if os.environ["RANK"] == "1":
            common.read_weights = None

    runs = {"one": (1, nothing, ""), "two": (2, nothing, ""),
            "layer": (2, read_nothing, "--gather layer")}
    for name, (n, before, flags) in runs.items():
        line = (f"evaluate.py --model {taught.model} --data {world}/test.jsonl --samples 3 "
                f"--max-new-tokens 16 --sample-rows 15 --out {tmp_path}/{name} {flags}")
        assert [status for status, _ in run(line, n, before)] == [0] * n
    one, two, layer = ((tmp_path / name / "test.jsonl").read_bytes() for name in runs)
    assert one == two == layer and one.count(b"\n") == 12


# --- layer by layer: nobody ever has the whole model, and all pass through it equally often

SHARED = {  # prompts, flags: shares of 3 and 2 prompts; of one and none; rows that wait for pages
    "uneven": (5, dict(k=5, sample_rows=9, temperature=1.0)),
    "one has none": (1, dict(k=3, sample_rows=256, temperature=0.8)),
    "nobody has any": (0, dict(k=3, sample_rows=256, temperature=1.0)),
    "little room": (3, dict(k=3, sample_rows=20, temperature=1.0)),
}


def watch(lm):
    """A dict that will tell the most numbers of lm's weights that were not shards at once, seen
    from inside the attention of each layer while lm is sampled from, and how often that was."""
    seen, paged_attention = {"most": 0, "passes": 0}, common.paged_attention

    def watched(*args, **kwargs):
        models = [lm.model] + ([lm.replica] if lm.replica else [])
        there = sum(p.numel() for m in models for p in m.parameters() if not isinstance(p, DTensor))
        seen.update(most=max(seen["most"], there), passes=seen["passes"] + 1)
        return paged_attention(*args, **kwargs)

    AttentionInterface.register("paged", watched)
    return seen


def test_layer_by_layer_gives_the_rollouts_of_one_process(world, tmp_path, monkeypatch):
    """Prompts of 2 to 5 tokens, responses of 1 to 40: ranks end after different numbers of blocks.
    While full weights are gathered a process has them all, else a layer beside the outer ones."""
    monkeypatch.setitem(common.PAGE, "cpu", 4)
    name = str(world / "init-teacher")
    prompts = [[3, 15, 11, 20, 4], [3, 7], [3, 25, 13, 16, 12], [3, 19, 14, 4], [3, 4]]
    shape = common.read_shape(name)
    pages = 2 * 4 * 3 * 4 * 24 * 4 / 2**30  # GiB: a page of 4 tokens of 3 layers
    cases = {case: (prompts[:n], {**flags, "max_new_tokens": 40, "seed": (1,)})
             for case, (n, flags) in SHARED.items()}
    cases["little room"][1]["kv_gib"] = 24.5 * pages

    def work():
        with common.processes("cpu"):
            lm, found = common.load_lm(name), {}
            for gather in ("full", "layer"):
                for case, (some, settings) in cases.items():
                    common.reshard(lm)
                    seen = watch(lm)
                    rows = common.sample_shared(lm, some, gather=gather, **settings)
                    found[gather, case] = [dataclasses.astuple(r) for r in rows], seen
            torch.save(found, tmp_path / f"{common.rank()}.pt")

    assert [status for status, _ in children(work, 2)] == [0, 0]
    ranks = [torch.load(tmp_path / f"{this}.pt") for this in range(2)]
    lm = common.load_lm(name)
    for case, (some, settings) in cases.items():
        rows = common.sample(lm, some, **settings)
        assert case != "uneven" or {1, 40} <= {len(r.tokens) for r in rows}
        for gather in ("full", "layer"):
            for found, _ in (of[gather, case] for of in ranks):
                assert len(found) == len(rows)
                for row, (prompt, tokens, logp, finished) in zip(rows, found):
                    assert (row.prompt, row.tokens, row.finished) == (prompt, tokens, finished)
                    assert row.logp == pytest.approx(logp, abs=1e-5)
        full, layer = ([of[gather, case][1] for of in ranks] for gather in ("full", "layer"))
        assert layer[0]["passes"] == layer[1]["passes"]
        if some:
            assert max(one["most"] for one in full) == shape.params
            assert [one["most"] for one in layer] == [shape.outer + shape.layer] * 2


def test_a_mistake_of_any_process_is_one_line(line_of, tmp_path):
    def spoil():
        """Rank 1 fails when it has sampled a block: the other is in the middle of the next."""
        run_block = common.Step.run_block

        def failing(step, live):
            found = run_block(step, live)
            if common.rank() == 1 and len(live) > 1:
                raise UserError("no room on this one")
            return found

        common.Step.run_block = failing

    for gather in ("full", "layer"):
        line = line_of("opd", tmp_path / gather, f"--prompts 4 --rollouts 2 --gather {gather}")
        found = run(line, 2, spoil)
        assert [status for status, _ in found] == [1, 1]
        text = "".join(err for _, err in found)
        assert text.count("error: no room on this one") == 1 and "Traceback" not in text
    found = run("grpo.py --model nowhere/at-all --no-such-flag", 2)
    assert [status for status, _ in found] == [1, 1]
    assert sum(err.count("error:") for _, err in found) == 1 and "Traceback" not in str(found)


def test_shares_are_whole_and_balanced():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 8):
        for items in (0, 1, 2, 7, 40):
            costs = torch.randint(1, 100, (items,), generator=generator).tolist()
            found = shares(costs, n)
            assert len(found) == n and sorted(sum(found, [])) == list(range(items))
            totals = [sum(costs[i] for i in share) for share in found]
            assert max(totals) - min(totals) <= max(costs, default=0)


def test_every_process_makes_as_many_passes(monkeypatch):
    rows = [Rollout([3] * 4, [5] * n, [], True) for n in (30, 2, 2, 2, 9, 1, 1)]
    for n in (2, 3, 9):
        monkeypatch.setattr(common, "world_size", lambda: n)
        groups = []
        for this in range(n):
            monkeypatch.setattr(common, "rank", lambda: this)
            groups.append(common.shared_micro_batches(rows, 20, torch.device("cpu")))
        assert len({len(mine) for mine in groups}) == 1
        assert sorted(i for mine in groups for group in mine for i in group) == list(range(7))
    monkeypatch.setattr(common, "world_size", lambda: 1)
    device = torch.device("cpu")
    assert common.shared_micro_batches(rows, 20, device) == micro_batches(rows, 20, device)
