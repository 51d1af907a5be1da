"""For whoever has a GPU first: does every CUDA path compute what the plain one does, and how fast?

    python tests/lab/gpu_check.py                           # one GPU: some minutes, 30 GB
    python tests/lab/gpu_check.py --model SmolLM2-135M      # a smaller shape: 8 GB
    torchrun --nproc_per_node 2 tests/lab/gpu_check.py      # also that several do what one does
    python tests/lab/gpu_check.py --rehearse                # all of it on a CPU, tiny shapes

It prints one table: of each path pass or FAIL, what was measured, and what to do if it fails. A
FAIL is exit status 1. Weights are random, in the shape of --model, a name of `sizes.MODELS`, and
nothing is downloaded. References are float64 on the same device, or the CPU, whose results the test
suite proves. A rehearsal plays recorded steps and the attention kernel (`emulate.py`) and tells no
times or bytes.
"""

import argparse
import contextlib
import io
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]
import common
import emulate
import fkl_warmup
import grpo
import opd
import sizes
import world
from common import Rollout, StageConfig
from emulate import random_lm

CHECKS = []  # (path, what to do if it fails, function)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# pages, tokens of a page; pages of the small cache; rows a prompt; tokens of a response; rows at
# once; tokens of the vocabulary chunks, of the update; bytes of the copy; steps of a stage
REAL = dict(pages=600, page=256, room=8, k=4, tokens=320, rows=256, chunk=512, micro=8192,
            copy=2**30, steps=2)
TINY = dict(pages=9, page=32, room=6, k=2, tokens=24, rows=3, chunk=9, micro=512, copy=2**20,
            steps=1, shape=sizes.Shape(64, 2, 4, 2, 96, 100, True, 16, qk_norm=True))

def path(name, otherwise):
    """Adds a check, called with the settings. It returns what it measured, or raises."""
    def add(function):
        CHECKS.append((name, otherwise, function))
        return function
    return add

def error_of(have, want, most, what="a"):
    """|have - want| / |want|. Raises AssertionError beyond `most`, and for what is not finite."""
    error = ((have.double() - want.double()).norm() / want.double().norm()).item()
    assert error <= most, f"{what} relative error of {error:.1e}, at most {most:g} was expected"
    return error

def prompts(s, n, length=24):
    return torch.randint(3, s.shape.vocab - 3, (n, length)).tolist()

def draw(lm, prompts, k, n, rows, kv_gib=0.0):
    return common.sample(lm, prompts, k, max_new_tokens=n, temperature=1.0, seed=(0,),
                         sample_rows=rows, kv_gib=kv_gib)

def seconds(s, function):
    """Of a call, with the device's work."""
    wait = torch.cuda.synchronize if s.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start

@path("attention in pages", "let common.attend_pages take its plain path; report the error")
def attention(s):
    """The kernel (bf16) and the plain path; empty and full pages, several head counts and sizes."""
    worst, device = dict.fromkeys(DTYPES, 0.0), s.device
    for heads, kv_heads, dim in ((s.shape.heads, s.shape.kv_heads, s.shape.head_dim), (4, 4, 64),
                                 (6, 2, 128), (9, 3, 64), (4, 2, 20), (2, 2, 264)):
        for name, dtype in DTYPES.items():
            q = torch.randn(s.pages, heads, dim, device=device, dtype=dtype)
            pools = torch.randn(2, s.pages, s.page, kv_heads, dim, device=device, dtype=dtype)
            used = torch.randint(0, s.page + 1, (s.pages,), device=device)
            used[:3] = torch.tensor([0, 1, s.page])
            out, lse = common.attend_pages(q, *pools, used, dim**-0.5)
            assert (lse[used == 0] == -1e30).all() and out.isfinite().all(), "an empty page counts"
            for part in torch.arange(s.pages, device=device)[used > 0].split(64):
                k, v = pools[:, part].repeat_interleave(heads // kv_heads, 3).double()
                scores = torch.einsum("mhd,mphd->mhp", q[part].double(), k) * dim**-0.5
                beyond = torch.arange(s.page, device=device) >= used[part, None]
                scores = scores.masked_fill(beyond[:, None], -math.inf)
                want = torch.einsum("mhp,mphd->mhd", scores.softmax(-1), v)
                most = 2e-2 if name == "bf16" else 1e-5
                worst[name] = max(worst[name], error_of(out[part], want, most),
                                  error_of(lse[part], scores.logsumexp(-1), most))
    return ", ".join(f"{name} error {error:.0e}" for name, error in worst.items())

@path("drawing a token", "compare common.inverse_cdf's sums with the CPU's, line by line")
def drawing(s):
    weights, u = torch.rand(64, s.shape.vocab) ** 8, torch.rand(64, 1, dtype=torch.float64)
    drawn = common.inverse_cdf(weights.to(s.device), u.to(s.device)).cpu()
    same = (drawn == common.inverse_cdf(weights, u)).double().mean().item()
    assert same > 0.95, f"{same:.0%} of the tokens are the CPU's"
    nothing = torch.full_like(weights, math.nan, device=s.device)
    assert common.inverse_cdf(nothing, u.to(s.device)).max() < s.shape.vocab
    return f"{same:.0%} are the CPU's"

@path("recorded steps", "RECORDS = set() in common.py samples without; report what was told")
def recorded(s):
    """Rows end, wait for room and start anew; log-probs are those of the training forward."""
    told, record = [], common.Step.record
    for name, dtype in DTYPES.items():
        lm, x = random_lm(s.shape, s.device, name == "bf16"), s.shape
        a_page = 2 * x.layers * s.page * x.kv_heads * x.head_dim * dtype.itemsize
        args = lm, prompts(s, 5), s.k, s.tokens, 6, (s.room + 0.5) * a_page / 2**30
        rows = draw(*args)
        logp = torch.cat([lm.token_logp(*lm.states([row]), 1.0, 0) for row in rows]).cpu()
        gap = (logp - torch.tensor([p for row in rows for p in row.logp])).abs().mean().item()
        assert gap < (0.1 if lm.bf16 else 1e-4), f"{name}: training has log-probs {gap:.1e} apart"
        try:  # the same shapes, not recorded
            common.Step.record = lambda step, state: (lambda: step(state), state)
            plain = draw(*args)
        finally:
            common.Step.record = record
        same = sum(a.tokens == b.tokens for a, b in zip(rows, plain)) / len(rows)
        assert same > 0.9 or lm.bf16, f"{same:.0%} of the rows are those of unrecorded steps"
        told.append(f"{name} gap {gap:.0e}, {same:.0%} as unrecorded")
    return "; ".join(told)

@path("every loss", "--dtype fp32, --vocab-chunk 16; the first loss that fails is named")
def every_loss(s):
    """Gradients of the world's student on the device against the CPU's."""
    rows = [Rollout([3, 15, 11], [20, 4, 7, 9, 1], [-1.0] * 5, True),
            Rollout([3], [5, 6], [-1.0] * 2, False)]
    wanted, worst = {}, {}
    for device, dtype in (("cpu", "fp32"), (str(s.device), "fp32"), (str(s.device), "bf16")):
        cfg = StageConfig(device=device, dtype=dtype)
        lm, teacher = (common.load_lm(str(s.world / name), cfg, train=train, shard=False)
                       for name, train in (("init-student", True), ("init-teacher", False)))
        for name, loss in emulate.losses(lm, teacher, rows, vocab_chunk=3, temperature=0.7).items():
            loss()
            grad = torch.cat([p.grad.flatten() for p in lm.model.parameters()]).cpu()
            lm.model.zero_grad()
            error = error_of(grad, wanted.setdefault(name, grad), 0.1 if lm.bf16 else 1e-4,
                             f"{name}, {dtype}:")
            worst[dtype] = max(worst.get(dtype, 0), error)
    return f"{len(wanted)} losses, " + ", ".join(f"{k} error {v:.0e}" for k, v in worst.items())

@path("chunks of the vocabulary", "--vocab-chunk 64, or --dtype fp32; report the error")
def chunks(s):
    """Both KLs: gradients of states and head, against those of all logits at once in float64."""
    errors = []
    for name in DTYPES:
        lm = random_lm(s.shape, s.device, name == "bf16", train=True)
        states = torch.randn(s.chunk, s.shape.hidden, device=s.device)
        weight = lm.model.get_output_embeddings().weight
        logq = torch.randn(s.chunk, lm.vocab, device=s.device).log_softmax(-1)
        for kl in (opd.reverse_kl, fkl_warmup.forward_kl):
            leaf, exact = states.clone().requires_grad_(), states.double().requires_grad_()
            common.over_chunks(lambda logp, logq: (kl(logp, logq).sum(), (logp[:, 0],)), lm,
                               leaf * 1, 1.0, 0, logq=logq)
            head = weight.detach()[: lm.vocab].double().requires_grad_()
            kl(F.linear(exact, head).log_softmax(-1), logq.double()).sum().backward()
            most = 3e-2 if lm.bf16 else 1e-4
            errors += [error_of(leaf.grad, exact.grad, most),
                       error_of(weight.grad[: lm.vocab], head.grad, most)]
            weight.grad = None
    return "fp32 error {:.0e}, bf16 error {:.0e}".format(max(errors[:4]), max(errors[4:]))

@path("AdamW", "fused=False in common.make_optimizer")
def adamw(s):
    """Three updates of the fused kernel against the formula in float64."""
    lm = random_lm(s.shape, s.device, False, train=True)
    cfg = SimpleNamespace(lr=1e-2, adam_beta2=0.99, weight_decay=0.1, grad_clip=1e9,
                          lr_schedule="constant", warmup_steps=0)
    optimizer, p = common.make_optimizer(lm, cfg), lm.model.base_model.norm.weight
    x, m, v = p.detach().double(), 0, 0
    for t in range(1, 4):
        for q in lm.model.parameters():
            q.grad = torch.randn_like(q)
        g = p.grad.double()
        common.optimizer_step(lm, optimizer, cfg, updates=3)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x * (1 - 1e-3) - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    return f"error {error_of(p, x, 1e-5):.0e}"

@path("whole stages", "run that stage alone; several GPUs: NCCL_DEBUG=INFO, then one process")
def stages(s):
    """Steps of each, fp32 and bf16; of several processes what one logs, in fp32."""
    def run(script, folder, dtype):
        models = {"model": s.world / "init-student"} if script is grpo else {
            "student": s.world / "init-student", "teacher": s.world / "init-teacher"}
        out = s.folder / folder / script.__name__
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            script.main(script.Config(
                **{name: str(model) for name, model in models.items()}, out=str(out), dtype=dtype,
                data=str(s.world / "train.jsonl"), exclude="none", device=s.kind, steps=s.steps,
                max_new_tokens=12, rollouts=2, show_every=0, save_every=0))
        return common.read_json_lines(out / "metrics.jsonl")

    gaps, kept = [], (common.world_size, common.rank)
    for script in (grpo, fkl_warmup, opd):
        fp32, bf16 = (run(script, dtype, dtype) for dtype in DTYPES)
        assert all(math.isfinite(line["grad_norm"]) for line in fp32 + bf16), script.__name__
        gaps += [line["sampler_gap"] for line in fp32 + bf16 if "sampler_gap" in line]
        if kept[0]() > 1 and kept[1]() == 0:
            common.world_size, common.rank = lambda: 1, lambda: 0
            one = run(script, "one", "fp32")
            common.world_size, common.rank = kept
            for a, b in zip(fp32, one):
                for name in {"kl", "nll", "entropy", "length", "grad_norm"} & set(a):
                    assert abs(a[name] - b[name]) <= 1e-2 * abs(b[name]) + 1e-4, (name, a, b)
        if kept[0]() > 1:
            torch.distributed.barrier()
    return f"{kept[0]()} process(es), sampler_gap at most {max(gaps):.0e}"

@path("speed of sampling", "no defect; report it, and what `nvidia-smi dmon` shows meanwhile")
def speed(s):
    """Tokens a second; bytes read a second, as a share of those that a copy moves."""
    lm = random_lm(s.shape, s.device, True)
    args = lm, prompts(s, s.rows), 1, s.tokens, s.rows
    draw(*args)  # loads kernels
    took, x = seconds(s, lambda: draw(*args)), torch.ones(s.copy // 4, device=s.device)
    y = x.clone()
    bandwidth = 16 * s.copy / seconds(s, lambda: [y.copy_(x) for _ in range(8)])
    read = s.tokens * (2 * s.shape.params + s.rows * (24 + s.tokens / 2) * s.shape.cache)
    return (f"{s.rows * s.tokens / took:,.0f} tokens/s, {read / took / bandwidth:.0%} of a copy's "
            f"{bandwidth / 1e9:,.0f} GB/s") if s.kind == "cuda" else "not measured"

@path("speed and memory of an update", "lower --micro-tokens; mend the formula of lab/sizes.py")
def update(s):
    """One micro-batch of OPD from states to AdamW; its most bytes against those computed."""
    lm, teacher = (random_lm(s.shape, s.device, True, train) for train in (True, False))
    cfg, length = opd.Config(teacher="", student=""), s.micro // 8
    optimizer = common.make_optimizer(lm, cfg)
    rows = [Rollout(p[:24], p[24:], [-1.0] * (length - 24), True) for p in prompts(s, 8, length)]

    def step():
        opd.accumulate(cfg, lm, teacher, rows, 8 * length, torch.zeros(8))
        common.optimizer_step(lm, optimizer, cfg, 1)

    step()
    took = seconds(s, step)
    if s.kind == "cpu":
        return "not measured"
    flags = sizes.Settings("opd", gpus=1, max_prompt_tokens=24, max_new_tokens=length - 24,
                           micro_tokens=s.micro)
    computed = sizes.step_bytes(flags, s.shape, s.shape)["in the update"] / 1e9
    used = torch.cuda.max_memory_allocated(s.device) / 1e9
    told = f"{s.micro / took:,.0f} tokens/s, {used:.1f} GB, computed {computed:.1f}"
    assert used < 1.15 * computed, told
    return told

def report(s):
    """Run all checks and print the table. Returns 1 if one has failed, else 0."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    card = "CPU, a rehearsal"
    if s.kind == "cuda":
        gpu = torch.cuda.get_device_properties(s.device)
        card = f"{gpu.name} ({gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB)"
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers "
          f"{transformers.__version__}, {common.world_size()} x {card}, commit {commit}\n\n"
          "| path | result | measured | if it fails |\n| --- | --- | --- | --- |", flush=True)
    failed = 0
    for name, otherwise, function in CHECKS:
        if s.kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(s.device)
        try:
            result, told = "pass", function(s)
        except Exception as error:  # whatever it is, the next path is looked at
            result, failed = "FAIL", 1
            told = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        print(f"| {name} | {result} | {told} | {otherwise} |", flush=True)
        if failed and common.world_size() > 1:
            raise SystemExit(f"rank {common.rank()}: {name}: {told}")  # the others would wait
    return failed

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B", choices=sizes.MODELS)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    args = parser.parse_args(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        sys.exit("error: no GPU here (torch.cuda.is_available() is False); --rehearse needs none")
    s = SimpleNamespace(kind="cuda", shape=sizes.MODELS[args.model], **REAL)
    with contextlib.ExitStack() as stack:
        if args.rehearse:
            import pytest  # for its patches
            torch.set_num_threads(1)
            s = SimpleNamespace(kind="cpu", **TINY)
            patches = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(emulate.cuda_on_cpu(patches))
        stack.enter_context(common.process_group(s.kind))
        torch.manual_seed(0)
        s.device = torch.empty(0, device=s.kind).device
        folder = common.on_rank_0(tempfile.mkdtemp)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        s.folder, s.world = Path(folder), Path(folder) / "world"
        common.on_rank_0(lambda: str(world.build(s.world, documents=50, train=24, test=12)))
        return report(s)

if __name__ == "__main__":
    sys.exit(main())
