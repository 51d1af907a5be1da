"""Several processes do what one does: the stages and evaluate.py over gloo, on a CPU.

What they compute, write and resume is compared with one process: the same rollouts and metrics,
gradients and weights within 1e-5. The processes are forked children, see conftest.py.
"""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import checkpoints, children, group, metrics, nothing
from safetensors.torch import load_file, save_file
from test_faults import in_checkpoint, no_space, send
from test_models import make_folder
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

import common
from common import LM, Rollout, StageConfig, UserError, micro_batches, read_json_lines

@pytest.fixture(scope="module")
def line_of(small_line):
    """line_of(stage, out, flags): a small run of two steps that saves after each."""
    return lambda stage, out, flags="": small_line(
        stage, out, f"--max-new-tokens 16 --lr 1e-4 --micro-tokens 60 --save-every 1 {flags}")

def run(line, n=1, before=nothing):
    """The command line in n processes, which must all end well."""
    found = group(line, n, before)
    assert [(got.status, got.err) for got in found] == [(0, "")] * n
    return found

def two_a_node():
    """torchrun would say so on each of several machines with two processes."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"

def keep_all():
    """Let a stage keep its checkpoint, and write the rollouts of each step to its folder. Four
    processes are two machines of two."""
    if os.environ.get("WORLD_SIZE") == "4":
        two_a_node()
    common.Run.delete_checkpoints = nothing
    sample_shared, out = common.sample_shared, Path(sys.argv[sys.argv.index("--out") + 1])

    def kept(*args, **kwargs):
        rows = sample_shared(*args, **kwargs)
        common.append_json_line(out / "sampled.jsonl", [[r.prompt, r.tokens, r.logp] for r in rows])
        return rows

    common.sample_shared = kept

def first_state(out):
    """The checkpoint after the first step, put together: {"model": ..., "optimizer": ...}."""
    dcp_to_torch_save(out / "state-00000001", out / "state.pt")
    return torch.load(out / "state.pt", weights_only=False)

def weights(folder):
    return load_file(Path(folder) / "model.safetensors")

def assert_same_run(a, b):
    """The same metrics, and the same model."""
    one, two = metrics(a), metrics(b)
    assert len(one) > 1
    for x, y in zip(one, two, strict=True):
        assert x == pytest.approx(y, rel=2e-3, abs=1e-6)
    old, new = weights(a), weights(b)
    assert set(old) == set(new)
    for name in old:
        torch.testing.assert_close(old[name], new[name], atol=1e-5, rtol=0)

CASES = {
    "grpo, shared copy": ("grpo", 2, "--prompts 6 --mini-batch 3 --rollouts 3 --kl-coef 0.1 "
                                     "--sample-parts 2"),
    "grpo, no KL": ("grpo", 2, "--prompts 6 --mini-batch 3 --rollouts 2 --kl-coef 0 "
                               "--sample-rows 3"),
    # of the teacher only: the student has three heads
    "fkl_warmup, shared copy": ("fkl_warmup", 2, "--prompts 3 --rollouts 3 --sample-parts 2"),
    "opd": ("opd", 2, "--prompts 5 --rollouts 3"),
    "opd and reward, shared copy": (
        "opd", 4, "--prompts 5 --rollouts 3 --student {taught} --teacher {taught} "
                  "--sparse-weight 0.5 --sample-parts 2"),
    # two rows an update for three processes; and a row a micro-batch: some have nothing to sample
    "grpo, few rows": ("grpo", 3, "--prompts 2 --mini-batch 1 --rollouts 2 --kl-coef 0.1 "
                                  "--gradient-checkpointing --seed 1"),
    "opd, few rows": ("opd", 3, "--prompts 1 --rollouts 2 --estimator return"),
}

@pytest.mark.parametrize("case", CASES)
def test_several_processes_do_what_one_does(case, line_of, tmp_path, taught):
    """Also in the checkpoint: weights, and AdamW's moments, which hold the gradients."""
    stage, n, flags = CASES[case]
    one, many = tmp_path / "one", tmp_path / "many"
    for out, processes in ((one, 1), (many, n)):
        run(line_of(stage, out, flags.format(taught=taught.model)), processes, keep_all)
    assert_same_run(one, many)
    old, new = first_state(one), first_state(many)
    torch.testing.assert_close(old["model"], new["model"], atol=1e-5, rtol=0)
    torch.testing.assert_close(old["optimizer"], new["optimizer"], atol=1e-6, rtol=1e-3)
    end = weights(many)
    assert any((tensor - end[name]).abs().max() > 2e-5 for name, tensor in old["model"].items())
    rows, others = (sum(read_json_lines(x / "sampled.jsonl"), []) for x in (one, many))
    assert [row[:2] for row in rows] == [row[:2] for row in others]
    logp, other = (torch.tensor(sum((row[2] for row in x), [])) for x in (rows, others))
    torch.testing.assert_close(logp, other, atol=5e-6, rtol=0)

def on_rank_1(act):
    """A function that makes rank 1 call act() when its first checkpoint is half written."""
    return in_checkpoint(1, lambda: common.rank() == 1 and act())

STOP, KILL = (send(number) for number in (signal.SIGTERM, signal.SIGKILL))

@pytest.fixture(scope="module")
def whole(line_of, tmp_path_factory):
    """The folder of an OPD run of four steps, in one process and one piece."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(line_of("opd", out, "--prompts 4 --rollouts 3 --steps 4"))
    return out

@pytest.mark.parametrize("first, then, before, steps, message", [
    (2, 1, on_rank_1(STOP), 3, "stopped by SIGTERM after 3 steps, all saved"),
    (1, 2, in_checkpoint(1, STOP), 3, "stopped by SIGTERM after 3 steps, all saved"),
    (2, 2, on_rank_1(KILL), 0, ""),
    (2, 2, on_rank_1(no_space), 0, "error: cannot write .*state-00000002.* No space left")])
def test_a_run_goes_on_with_another_number_of_processes(first, then, before, steps, message,
                                                        line_of, whole, tmp_path):
    """One process of the first run hears a signal while it writes a checkpoint, and all end after
    the next step; or it is killed there, or its disk is full."""
    parts = tmp_path / "parts"
    line = line_of("opd", parts, "--prompts 4 --rollouts 3 --steps 4 --save-every 2")
    found = group(line, first, before)
    assert 0 not in [got.status for got in found]
    text = "\n".join(got.err for got in found)
    assert len(re.findall(message, text)) == 1 or not message, text
    # who heard torchrun's SIGTERM before it missed the other process says that it is gone
    assert not re.search(r"Traceback (?!RuntimeError.*Connection closed by peer)", text), text
    assert checkpoints(parts) == ([f"state-{steps:08d}"] if steps else checkpoints(parts))
    found = run(line, then)
    assert (f"continuing after {steps} steps" in found[0].out) == bool(steps)
    assert_same_run(whole, parts)
    assert "already finished" in run(line, 2)[0].out

def test_bf16_compute_with_fp32_masters(line_of, world, tmp_path):
    """Two processes round to bf16 at other places than one (weights of norms; gradients of other
    micro-batches): the first gradient is that of one process within 1 % (measured 0.2 %, and in
    fp32 2e-7), and the moves of two steps point the same way, cosine > 0.99 (0.996), though the
    second step has a few other rollouts.
    """
    ends, grads = [], []
    for n in (1, 2):
        out = tmp_path / str(n)
        run(line_of("opd", out, "--prompts 4 --rollouts 3 --dtype bf16 --lr 1e-3"), n, keep_all)
        state = first_state(out)
        moments = [values["exp_avg"] for values in state["optimizer"].values()]
        masters = torch.cat([value.flatten() for value in state["model"].values()])
        assert {x.dtype for x in [masters, *moments]} == {torch.float32}
        assert (masters == masters.bfloat16()).float().mean() < 0.01  # their last bits are in use
        start, end = weights(world / "init-student"), weights(out)
        ends.append(torch.cat([(end[name] - start[name]).flatten() for name in start]))
        grads.append(torch.cat([x.flatten() for x in moments]))
    assert 1e-4 < (grads[1] - grads[0]).norm() / grads[0].norm() < 0.01  # not 0: it is bf16
    assert torch.cosine_similarity(*ends, 0) > 0.99

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_model_is_that_of_its_files(tied, dtype, world, tmp_path):
    """Masters are the files' numbers in fp32; what is written has their names, dtypes and bits."""
    name = shutil.copytree(world / "init-student", tmp_path / "model")
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in weights(name).items()}
    if not tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((name / "config.json").read_text())
    (name / "config.json").write_text(json.dumps(
        {**config, "tie_word_embeddings": tied, "dtype": dtype}))

    def work():
        with common.process_group("cpu"):
            lm = common.load_lm(str(name), StageConfig(), train=True)
            full = {k: common.full_tensor(p.detach()) for k, p in lm.model.named_parameters()}
            common.save_lm(lm, tmp_path, {})
            torch.save(full, tmp_path / f"{common.rank()}.pt")

    assert [(got.status, got.err) for got in children(work, 2)] == [(0, "")] * 2
    saved = weights(tmp_path)
    for found in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        assert set(found) == set(saved) == set(tensors)
        for k, tensor in tensors.items():
            assert found[k].dtype == torch.float32 and torch.equal(found[k], tensor.float())
            assert saved[k].dtype == tensor.dtype and torch.equal(saved[k], tensor)

def read_once():
    """Four processes as two machines of two; only rank 0 may read weights."""
    two_a_node()
    common.read_weights = common.read_weights if os.environ["RANK"] == "0" else None

def test_evaluation_gives_the_same_bytes(taught, world, tmp_path):
    """Also the identity of the model, whether each process loads it or four share it."""
    found = []
    for n, before, parts in ((1, nothing, 0), (2, nothing, 0), (4, read_once, 2)):
        run(f"evaluate.py --model {taught.model} --data {world}/test.jsonl --samples 3 "
            f"--max-new-tokens 16 --sample-rows 15 --sample-parts {parts} --out {tmp_path}/{n}",
            n, before)
        identity = common.read_record(tmp_path / f"{n}")["identity"]
        found.append(((tmp_path / f"{n}" / "test.jsonl").read_bytes(), identity))
    assert found[0] == found[1] == found[2] and found[0][0].count(b"\n") == 12

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 12,
         "num_key_value_heads": 6, "head_dim": 8,
         "initializer_range": 0.1}
MODELS = [("llama", {"num_key_value_heads": 1}), ("qwen3", {}),
          ("qwen2", {"tie_word_embeddings": True}), ("llama", {})]

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model that nobody can share, and three for two or three processes, Qwen2 with biases."""
    paths = [make_folder(tmp_path_factory.mktemp(family), family, **{**SHAPE, **settings})
             for family, settings in MODELS]
    tensors = load_file(f"{paths[2]}/model.safetensors")
    assert sum("bias" in name for name in tensors) == 6
    for tensor in (value for name, value in tensors.items() if "bias" in name):
        tensor.normal_()
    save_file(tensors, f"{paths[2]}/model.safetensors", metadata={"format": "pt"})
    return paths

def sampled(path, parts=0):
    """Tokens and ends of 15 rollouts, their log-probs, and [parts, weights held, pages]."""
    cfg = StageConfig(sample_parts=parts, sample_rows=9)
    cfg.max_new_tokens, cfg.temperature, held = 10, 1.0, []
    lm, init = common.load_lm(path, cfg), common.PagedCache.__init__

    def kept(cache, lm, *args):
        init(cache, lm, *args)
        held[:] = lm.parts, sum(p.numel() for p in lm.model.parameters()), cache.capacity

    common.PagedCache.__init__ = kept
    rows = common.sample_shared(lm, [[5, 6, 7], [9], [11] * 30, [40, 8], [5] * 7], 3, cfg, (1,))
    common.PagedCache.__init__ = init
    logp = torch.tensor(sum((row.logp for row in rows), []))
    return [(row.tokens, row.finished) for row in rows], logp, held

def spoil():
    """This process draws other tokens, has room for a few rows only, and may not give rollouts."""
    sysconf, gather = os.sysconf, common.all_gather_dict
    os.sysconf = lambda name: 64 if name == "SC_PHYS_PAGES" else sysconf(name)
    common.inverse_cdf = lambda weights, uniform: torch.zeros_like(uniform, dtype=torch.long)
    common.all_gather_dict = lambda part: None if part else gather(part)

@pytest.mark.parametrize("n, parts", [(3, 3), (4, 2)])
def test_sharers_sample_what_one_does(n, parts, folders, tmp_path):
    """Of Qwen3, Qwen2 with biases and Llama, log-probs within 1e-6. Each holds its part of the
    layers only. The first draws the tokens; the cache is that of the one with least memory."""
    def work():
        os.environ["LOCAL_WORLD_SIZE"], this, found = str(parts), int(os.environ["RANK"]), []
        with common.process_group("cpu"):
            for path in folders:
                found.append(sampled(path, parts))
                if this == 1 and len(found) == 1:
                    spoil()
        torch.save(found, tmp_path / f"{this}.pt")

    assert [(got.status, got.err) for got in children(work, n)] == [(0, "")] * n
    found = [torch.load(tmp_path / f"{this}.pt") for this in range(n)]
    for i, path in enumerate(folders):
        rows, logp, (_, whole, most) = sampled(path)
        shared = parts if i else 1
        inside = sum(x.numel() for k, x in load_file(f"{path}/model.safetensors").items()
                     if "_proj." in k)
        for others, other, (*held, _) in (process[i] for process in found):
            assert others == rows and held == [shared, whole - inside + inside // shared]
            torch.testing.assert_close(other, logp, atol=1e-6, rtol=1e-6)
        assert (found[0][i][2][2] == found[1][i][2][2] < most) or not i

CONFIGS = transformers.models.auto.CONFIG_MAPPING
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "tie_word_embeddings": False}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}

@pytest.mark.parametrize("kind, changes, flag, gb, parts", [
    ("qwen3", {}, 6, 0, 6), ("qwen2", {}, 6, 0, 6), ("llama", {}, 6, 0, 6),
    ("qwen3", {}, 4, 0, 2), ("qwen3", {}, 5, 0, 1),  # 12 processes a machine, 6 key heads
    ("qwen3", {"num_key_value_heads": 4}, 6, 0, 2), ("llama", {"num_key_value_heads": 1}, 2, 0, 1),
    ("qwen3", {"intermediate_size": 62}, 6, 0, 2),
    ("qwen3", {"num_attention_heads": 24, "num_key_value_heads": 24}, 24, 0, 12),
    ("llama", {"attention_bias": True}, 2, 0, 1), ("llama", {"mlp_bias": True}, 2, 0, 1),
    ("qwen3_moe", {"num_experts": 4}, 2, 0, 1), ("qwen2_moe", {"num_experts": 4}, 2, 0, 1),
    ("phi3", {"pad_token_id": 0}, 2, 0, 1),  # one matrix for queries, keys and values
    ("olmo2", {}, 2, 0, 1),  # norms over all heads
    ("gpt2", {}, 2, 0, 1), ("bert", {}, 2, 0, 1),  # without `layers` or key heads
    ("llama", {}, 0, 0, 1), ("llama", {}, 0, 80, 1),
    ("qwen3", QWEN3_8B, 0, 80, 1), ("qwen3", QWEN3_8B, 0, 40, 2), ("qwen3", QWEN3_8B, 2, 80, 2),
    ("llama", LLAMA_70B, 0, 80, 8), ("llama", LLAMA_70B, 0, 141, 4),
    ("llama", LLAMA_70B, 0, 16, 8)])
def test_as_few_processes_as_have_room_share_a_copy(kind, changes, flag, gb, parts, monkeypatch,
                                                    capsys):
    """gb: a GPU's memory, 0 for a CPU. Where the flag asks for too many a line says so."""
    node = 8 if "vocab_size" in changes else 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    monkeypatch.setattr(common, "world_size", lambda: 2 * node)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gb * 10**9))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SHAPE, **changes}))
    lm = LM("it", model, None, 0, [], "", bf16=True)
    device = torch.device("cuda" if gb else "cpu")
    assert common.count_parts(lm, StageConfig(sample_parts=flag), device) == parts
    assert capsys.readouterr().out.count("\n") == (flag > parts)

def test_a_mistake_of_any_process_is_one_line(line_of, tmp_path):
    """Of all, in a flag or after models are loaded; of rank 1 alone, after a block of samples."""
    def spoil():
        run_block = common.Step.run_block

        def failing(step, live):
            found = run_block(step, live)
            if common.rank() == 1 and len(live) > 1:
                raise UserError("no room on this one")
            return found

        common.Step.run_block = failing

    for flags, before, message in (("--no-such-flag", nothing, "--no-such-flag"),
                                   ("--prompts 9", nothing, "--prompts 9 a step"),
                                   ("", spoil, "no room on this one")):
        found = group(line_of("opd", tmp_path / "out", flags), 2, before)
        assert 0 not in [got.status for got in found]
        text = "".join(got.err for got in found)
        assert text.count("error: ") == text.count(message) == 1 and "Traceback" not in text, text

def test_every_process_makes_as_many_passes(monkeypatch):
    rows = [Rollout([3] * 4, [5] * n, [], True) for n in (30, 2, 2, 2, 9, 1, 1)]
    device = torch.device("cpu")
    assert common.shared_micro_batches(rows, 20, device) == micro_batches(rows, 20, device)
    for n in (2, 3, 9):
        monkeypatch.setattr(common, "world_size", lambda: n)
        groups = []
        for this in range(n):
            monkeypatch.setattr(common, "rank", lambda: this)
            groups.append(common.shared_micro_batches(rows, 20, device))
        assert len({len(mine) for mine in groups}) == 1
        assert sorted(i for mine in groups for group in mine for i in group) == list(range(7))
