"""Several processes do what one does: the stages and evaluate.py over gloo, on a CPU.

The processes are forked children with torchrun's environment: they have this process's imports, so
that a run takes two seconds and not ten. What they compute, write and resume is compared with one
process: the same rollouts and metrics, gradients and weights within 1e-5.
"""

import importlib
import json
import os
import re
import shlex
import socket
import sys
import time

import pytest
import torch

import common
from common import Rollout, UserError, micro_batches, shares

TIMING = re.compile("seconds.*|tokens_per_second|sampler_gap")


def nothing():
    pass


def run(line, n=1, before=nothing):
    """A command line in n children that are one group, before() in each. Returns a list of (exit
    status, what it wrote to stderr); 1 child has no group."""
    script, *words = shlex.split(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for this in range(n):
        memory = os.memfd_create("err")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(memory, 2)
                sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", buffering=1)
                sys.argv = [script, *words]
                if n > 1:
                    os.environ.update(RANK=str(this), LOCAL_RANK=str(this), WORLD_SIZE=str(n),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                before()
                module = importlib.import_module(script.removesuffix(".py"))
                common.run_cli(module.main, module.Config, module.__doc__)
                status = 0
            except SystemExit as end:
                status = 1 if isinstance(end.code, str) else end.code or 0
                print("\n" + str(end.code if isinstance(end.code, str) else ""), file=sys.stderr)
            except BaseException as error:
                print(f"Traceback {error!r}", file=sys.stderr)
            finally:
                if n > 1 and this == 0:
                    time.sleep(0.3)  # it holds the store, as torchrun does for real processes
                os._exit(status)
        children.append((pid, memory))
    found = []
    for pid, memory in children:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.lseek(memory, 0, os.SEEK_SET)
        with os.fdopen(memory, encoding="utf-8") as file:
            found.append((status, file.read()))
    return found


def keep_checkpoints():
    common.Run.drop_checkpoints = lambda run: None


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
    "grpo, no KL": ("grpo", 2, "--prompts 6 --mini-batch 3 --rollouts 2 --kl-coef 0"),
    "fkl_warmup": ("fkl_warmup", 2, "--prompts 3 --rollouts 3"),
    "opd": ("opd", 2, "--prompts 5 --rollouts 3"),
    "opd and reward": ("opd", 2, "--prompts 5 --rollouts 3 --student {taught} --teacher {taught} "
                                 "--sparse-weight 0.5"),
    # two rows an update for three processes; and a row a micro-batch
    "grpo, few rows": ("grpo", 3, "--prompts 2 --mini-batch 1 --rollouts 2 --kl-coef 0.1 "
                                  "--gradient-checkpointing"),
    "opd, few rows": ("opd", 3, "--prompts 1 --rollouts 2 --estimator return --cpu-offload"),
}


@pytest.mark.parametrize("case", CASES)
def test_several_processes_do_what_one_does(case, line_of, tmp_path, taught):
    stage, n, flags = CASES[case]
    flags = flags.format(taught=taught.model)
    outs = [tmp_path / "one", tmp_path / "many"]
    for out, processes in zip(outs, (1, n)):
        found = run(line_of(stage, out, flags), processes, keep_checkpoints)
        assert [status for status, _ in found] == [0] * processes, found
    assert len(list(outs[0].glob("state-*.pt"))) == 1
    assert_same_run(*outs)
    start = torch.load(outs[0] / "state-00000001.pt", weights_only=True)["model"]
    end = common.load_lm(str(outs[1])).model.state_dict()
    assert any((start[name] - end[name]).abs().max() > 2e-5 for name in start)  # it moves
    if stage == "fkl_warmup":
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


def test_evaluation_gives_the_same_bytes(taught, world, tmp_path):
    for n in (1, 2):
        line = (f"evaluate.py --model {taught.model} --data {world}/test.jsonl --samples 3 "
                f"--max-new-tokens 16 --sample-rows 15 --out {tmp_path}/{n}")
        assert [status for status, _ in run(line, n)] == [0] * n
    one, two = ((tmp_path / str(n) / "test.jsonl").read_bytes() for n in (1, 2))
    assert one == two and one.count(b"\n") == 12


def test_a_mistake_of_any_process_is_one_line(line_of, tmp_path):
    def spoil():
        sample = common.sample

        def failing(lm, prompts, *args, **kwargs):
            if common.rank() == 1 and len(prompts) > 1:
                raise UserError("no room on this one")
            return sample(lm, prompts, *args, **kwargs)

        common.sample = failing

    line = line_of("opd", tmp_path / "out", "--prompts 4 --rollouts 2")
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
