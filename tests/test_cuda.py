"""What runs on CUDA, without a GPU: recorded steps are played on a CPU, and everything that CUDA
runs passes with tensors that have a device and no values. `emulate.py` says what that can show."""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import math
import textwrap

import pytest
import numpy as np
import torch

import common
import emulate
import gpu_check
import grpo
from common import PagedCache, Rollout, Row, StageConfig, Step, UserError, load_lm, sample
from emulate import losses, random_lm
from sizes import Shape

PROMPTS = [[3, 15, 11, 20, 4], [3, 7], [3, 25, 13, 16, 12, 17, 13, 18, 14, 19, 4], [3, 19, 14, 4]]

def draw(lm, k=6, n=40, **kwargs):
    return sample(lm, PROMPTS, k, max_new_tokens=n, temperature=1.0, seed=(0,), sample_rows=7,
                  **kwargs)

@pytest.fixture(scope="module")
def cpu_lm(world):
    """The world's student, in fp32, on the CPU of a machine with a GPU as well."""
    return load_lm(str(world / "init-student"), StageConfig(device="cpu", dtype="fp32"))

@pytest.fixture
def cuda(monkeypatch):
    """A CPU that is used as a GPU. Gives the graphs recorded so far."""
    with emulate.cuda_on_cpu(monkeypatch) as recordings:
        yield recordings

def unrecorded(monkeypatch):
    """From now on the same steps, of the same shapes, are not recorded but run."""
    def record(step, state):
        return lambda: step(state), state
    monkeypatch.setattr(Step, "record", record)

# --- recorded steps, played

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recorded_steps_draw_the_tokens_that_steps_draw(world, cuda, monkeypatch, dtype):
    """Bit for bit, where rows end, wait for room, and start anew; bf16 with the kernel's checks."""
    lm = load_lm(str(world / "init-student"), StageConfig(device="cpu", dtype=dtype))
    monkeypatch.setitem(common.PAGE, "cpu", 4)
    heads = lm.model.config.num_key_value_heads * lm.model.config.head_dim
    page = 2 * lm.model.config.num_hidden_layers * 4 * heads * (2 if lm.bf16 else 4)
    cuda.clear()
    rows = draw(lm, kv_gib=24.5 * page / 2**30)  # 24 pages; a row takes up to 15
    assert len(cuda) > 2 and sum(graph.replays for graph in cuda) > 10 * common.BLOCK
    unrecorded(monkeypatch)
    assert draw(lm, kv_gib=24.5 * page / 2**30) == rows
    assert len({len(row.tokens) for row in rows}) > 5
    monkeypatch.setattr(common, "RECORDS", set())  # other shapes: sums round otherwise
    plain = draw(lm)
    same = [row.tokens == other.tokens for row, other in zip(rows, plain)]
    assert all(same) if dtype == "fp32" else sum(same) > len(rows) / 2

def plant(monkeypatch, old, new):
    """Step.__call__ with another line."""
    source = textwrap.dedent(inspect.getsource(Step.__call__))
    assert source.count(old) == 1
    space = dict(vars(common))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(Step, "__call__", space["__call__"])

T = 't = state["t"].expand_as(at)'
WAITS = {
    "int(tensor)": (T, 't = torch.full_like(at, int(state["t"]))'),
    "a list": (T, 't = at * 0 + state["t"].tolist()[0]'),
    "if tensor": (T, T + '\nif (position > 5).any(): t = t + 0'),
    "a mask": (T, T + "[at > -1][:, None]"),
    "nonzero": (T, T + "[(at[:, 0] > -1).nonzero()[:, 0]]"),
    "lengths": (T, T + "[: position.max() + 1]"),
    "from the host": (T, T + " + torch.tensor(0)"),
    "to the host": (T, T + "; position.cpu()"),
    "other random numbers": (T, T + "; torch.rand(2)"),
}
WRONG = {
    "a counter of Python": (T, 'self.n = (getattr(self, "n", -1) + 1) % BLOCK; '
                               "t = torch.full_like(at, self.n)"),
    "a token that is not fed back": ('state["token"].copy_(token[:, 0])',
                                     'state["token"] = token[:, 0]'),
    "a position that stays": ('state["position"] += 1',
                              'state["position"] = state["position"] + 1'),
}

def replaced(line, new):
    """A line and its replacement in the source, whose lines have four spaces."""
    return line, new.replace("\n", "\n    ")

@pytest.mark.parametrize("fault", WAITS)
def test_what_no_recording_can_hold_is_told_at_loading(cpu_lm, cuda, monkeypatch, fault):
    plant(monkeypatch, *replaced(*WAITS[fault]))
    with pytest.raises(RuntimeError, match="the host"):
        common.check_architecture(cpu_lm, sampled=True)
    monkeypatch.setattr(common, "RECORDS", set())  # the way out
    common.check_architecture(cpu_lm, sampled=True)

@pytest.mark.parametrize("fault", WRONG)
def test_wrong_recorded_steps_are_seen_when_a_model_is_loaded(world, cuda, monkeypatch, fault):
    """Loading takes three blocks: one as it is, one recorded and played, one played again."""
    lm = load_lm(str(world / "init-student"), StageConfig(device="cpu"))
    assert [graph.replays for graph in cuda] == [2 * common.BLOCK]
    plant(monkeypatch, *WRONG[fault])
    with pytest.raises(UserError, match="sampling gives other log-probs than training"):
        common.check_architecture(lm, sampled=True)

def test_no_stop_token_ends_the_check_of_a_model(world, cuda):
    lm = load_lm(str(world / "init-student"), StageConfig(device="cpu"))
    cuda.clear()
    common.check_architecture(dataclasses.replace(lm, stop_ids=list(range(lm.vocab))), sampled=True)
    assert [graph.replays for graph in cuda] == [2 * common.BLOCK]
    short = dataclasses.replace(lm, context=4 * common.BLOCK - 1)  # positions that it has
    cuda.clear()
    common.check_architecture(short, sampled=True)
    assert not cuda

@pytest.mark.parametrize("records", [True, False])
def test_pages_move_only_where_steps_are_not_recorded(cpu_lm, cuda, monkeypatch, records):
    """Recorded steps read the whole pool, others the pages up to the last that is used."""
    monkeypatch.setattr(common, "RECORDS", {"cpu"} if records else set())
    cache = PagedCache(cpu_lm, 4, 100, 0.01)
    rows = [Row([3] * n, None, 100) for n in (30, 60, 90)]
    with torch.inference_mode():
        cache.reserve([], common.deque(rows), 4)
        assert [row.pages for row in rows] == [[1, 2], [3, 4, 5], [6, 7, 8, 9]]
        cache.pool += torch.arange(10 + cache.capacity - 9)[:, None, None, None]
        assert cache.reserve([rows[0], rows[2]], [], 4) == ([rows[0], rows[2]], [])
        last = Row([3] * 10, None, 100)
        cache.reserve([rows[0], rows[2]], common.deque([last]), 4)
    content = [int(cache.pool[0, 0, page].flatten()[0]) for page in rows[2].pages]
    assert content == [6, 7, 8, 9]  # what they wrote, wherever it lies
    assert rows[0].pages == [1, 2] and sorted(rows[2].pages) == ([6, 7, 8, 9] if records
                                                                 else [3, 4, 5, 6])
    assert last.pages == ([3] if records else [7]) and cache.used == (9 if records else 7)

def test_no_more_pages_than_a_call_of_the_kernel_takes(cpu_lm, monkeypatch):
    monkeypatch.setitem(common.PAGE, "cpu", 1)
    cache = PagedCache(cpu_lm, 10**4, 100, 1.0)
    assert cache.capacity == 65534 and cache.pool.shape[2] == 65535

@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_without_a_value_give_tokens_of_the_vocabulary(world, bad, temperature):
    lm = load_lm(str(world / "init-student"), StageConfig(device="cpu"))
    lm.model.model.norm.weight.data[0] = bad
    for row in sample(lm, PROMPTS, 2, max_new_tokens=9, temperature=temperature, seed=(0,)):
        assert all(0 <= token < lm.vocab for token in row.tokens)

@pytest.mark.parametrize("V", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_inverse_cdf_stays_inside_the_vocabulary(V, bad):
    for weights in (torch.full((2, V), bad), torch.ones(2, V)):
        weights[0, -1] = bad
        for u in (0.0, 0.5, 1 - 2**-53):
            drawn = common.inverse_cdf(weights, torch.full((2, 1), u, dtype=torch.float64))
            assert 0 <= drawn.min() and drawn.max() < V

@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_angles_that_depend_on_length_are_told_or_right(cpu_lm, cuda, monkeypatch, rope):
    """A library may look at the longest row in every step: then steps cannot be recorded."""
    more = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8) if rope == "longrope" else {}
    lm = random_lm(SHAPES["llama"], "cpu", False)
    parameters = {"rope_type": rope, "factor": 2.0, "rope_theta": 1e4,
                  "original_max_position_embeddings": 1024, **more}
    lm.model.config.rope_parameters = parameters
    lm.model.model.rotary_emb = type(lm.model.model.rotary_emb)(lm.model.config)
    try:
        rows = draw(lm, k=2)
    except RuntimeError as told:
        assert "the host" in str(told)
        monkeypatch.setattr(common, "RECORDS", set())
        rows = draw(lm, k=2)
    logp = torch.cat([lm.token_logp(*lm.states([row]), 1.0, 0) for row in rows])
    torch.testing.assert_close(logp, torch.tensor([x for row in rows for x in row.logp]), atol=1e-5,
                               rtol=0)

# --- the check for whoever has a GPU first

def test_the_check_of_a_gpu_is_rehearsed(capsys):
    """All of it, on a CPU; every path passes."""
    assert gpu_check.main(["--rehearse"]) == 0
    head, _, titles, _, *lines = capsys.readouterr().out.splitlines()
    assert torch.__version__ in head and titles.startswith("| path | result |")
    assert len(lines) == len(gpu_check.CHECKS) and all("| pass |" in line for line in lines)
    torch.cuda.is_available() or pytest.raises(SystemExit, gpu_check.main, [])

def worse(owner, name, change):
    """A patch: owner.name(...) gives change(what it gave)."""
    function = getattr(owner, name)
    return lambda m: m.setattr(owner, name, lambda *a, **k: change(function(*a, **k)))

@contextlib.contextmanager
def fails(*_, **__):
    raise RuntimeError("no graphs here")
    yield

SEEN = {
    "attention in pages": worse(common, "attend_pages", lambda x: (x[0], x[1] * 1.1)),
    "recorded steps": lambda m: m.setattr(emulate, "graph", fails),
    "chunks of the vocabulary": worse(common.LM, "logits", lambda logits: logits * 1.01),
    "AdamW": worse(common, "make_optimizer", lambda o: o.param_groups[0].update(eps=1e-2) or o),
    "whole stages": worse(grpo, "policy_loss", lambda loss: loss * math.nan),
}

@pytest.mark.parametrize("name", SEEN)
def test_the_check_of_a_gpu_tells_what_is_wrong(name, monkeypatch, capsys):
    """With a fault in a path its line says FAIL and what to do, and the exit status is 1."""
    SEEN[name](monkeypatch)
    monkeypatch.setattr(gpu_check, "CHECKS", [c for c in gpu_check.CHECKS if c[0] == name])
    assert gpu_check.main(["--rehearse"]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"| {name} | FAIL |") and gpu_check.CHECKS[0][1] in line

# --- tensors on "cuda:0" that have no values

@pytest.fixture
def fake(monkeypatch):
    try:
        with emulate.fake_cuda(monkeypatch) as mode:
            yield mode
    except (AttributeError, ValueError) as error:  # a libc10 without such a table
        pytest.skip(f"this torch has no place for a device guard: {error}")

SHAPES = {"qwen3": Shape(64, 1, 4, 2, 96, 100, True, 16, qk_norm=True),
          "llama": Shape(64, 1, 4, 2, 96, 100, False, 16)}

def make_lm(kind="qwen3", bf16=True, train=True):
    """An LM on cuda:0 whose weights have no values."""
    lm = random_lm(SHAPES[kind], "cuda:0", bf16, train)
    assert {p.device.type for p in lm.model.parameters()} == {"cuda"}
    return lm

ROWS = [Rollout([3, 4, 5], [6, 7, 8, 9], [-1.0] * 4, False), Rollout([3], [1], [-1.0], True)]
both = pytest.mark.parametrize("bf16", [True, False])

@pytest.mark.parametrize("family", ["qwen3", "llama", "olmo2", "gemma", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_is_the_models_own(family, dtype):
    """To rounding, its gradients, too, and a copy has its own weight. Others stay as they are."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = next(value for name, value in vars(module).items()
                if name.endswith(("RMSNorm", "LayerNorm")))(64)
    torch.nn.init.normal_(norm.weight)
    fused = copy.deepcopy(norm)
    common.fuse_norms(fused, torch.device("cpu"))
    assert "forward" not in vars(fused)
    common.fuse_norms(fused, torch.device("cuda"))
    assert ("forward" in vars(fused)) == (family not in ("gemma", "cohere"))
    copied, exact, x = copy.deepcopy(fused), copy.deepcopy(norm).double(), torch.randn(9, 64)
    x = x.to(dtype).float()
    fused.weight.data.zero_()  # a copy must not compute with it
    results = []
    for f in (norm, copied, exact):
        wide = torch.float64 if f is exact else torch.float32
        leaf = x.clone().to(wide if f is exact else dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = f(leaf)
        (out.to(wide) * x.to(wide).cos()).sum().backward()
        results.append((out.detach(), leaf.grad, f.weight.grad))
    for own, ours, want in zip(*[[x.double() for x in result] for result in results]):
        error = (ours - want).norm() / want.norm()
        assert error <= 1.1 * (own - want).norm() / want.norm() + 1e-6

@both
@pytest.mark.parametrize("kind", SHAPES)
def test_prefill_and_a_step_pass_on_cuda_without_waiting(fake, kind, bf16):
    """And a step changes its state in place: nothing else would be seen by a replay."""
    lm = make_lm(kind, bf16, train=False)
    rows = [Row(list(range(1, 2 + n)), np.random.default_rng(n), 9) for n in (270, 3, 3)]
    with torch.no_grad(), lm.autocast():
        cache = PagedCache(lm, 4, 600, 0.01)
        assert not cache.dense and cache.page == 256 and cache.pool.device.type == "cuda"
        _, started = cache.reserve([], common.deque(rows), 4)
        cache.prefill(lm, started)
        for temperature in (0.0, 0.7, 1.0):
            step = Step(lm, cache, temperature)
            state = step.make_state(rows, 4, 2, cache.capacity)
            before, old_reads = dict(state), fake.reads
            fake.strict = True
            with emulate.NoHost():
                step(state)
            fake.strict = False
            assert step.records and fake.reads == old_reads
            assert all(state[name] is tensor for name, tensor in before.items())

@both
@pytest.mark.parametrize("dim, m", [(64, 40), (12, 40), (264, 3)])
def test_attention_over_pages_passes_on_cuda(fake, bf16, dim, m, monkeypatch):
    """The kernel takes bf16 and most head sizes; the plain path takes the rest."""
    dtype, called = torch.bfloat16 if bf16 else torch.float32, []
    kernel = torch.ops.aten._flash_attention_forward
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward",
                        lambda *a, **k: called.append(1) or kernel(*a, **k))
    q, keys = (torch.randn(m, *shape, device="cuda:0", dtype=dtype)
               for shape in ((8, dim), (256, 2, dim)))
    used = torch.ones(m, dtype=torch.long, device="cuda:0")
    out, lse = common.attend_pages(q, keys, keys, used, 0.1)
    assert (out.shape, lse.shape, out.device) == (q.shape, q.shape[:2], q.device)
    assert bool(called) == (bf16 and dim == 64)
    with pytest.raises(RuntimeError, match="device"):
        common.attend_pages(q, keys, keys, used.cpu(), 0.1)

@pytest.mark.parametrize("kind, bf16", [("qwen3", True), ("llama", False)])
def test_every_loss_and_the_optimizer_pass_on_cuda(fake, kind, bf16):
    """In chunks of 2 of 5 tokens; each tensor gets a gradient of its shape, beside it. The fused
    AdamW then needs three numbers of the device: is the norm finite, the norm, its own count."""
    lm, teacher = make_lm(kind, bf16), make_lm(kind, bf16, train=False)
    for name, loss in losses(lm, teacher, ROWS, vocab_chunk=2, temperature=0.7).items():
        sums = loss()
        assert sums.device.type == "cpu" and sums.dtype == torch.float64, name
        for p in lm.model.parameters():
            assert (p.grad.device, p.grad.dtype) == (p.device, torch.float32), name
            p.grad = None
    cfg = StageConfig()
    cfg.lr, cfg.grad_clip = 1e-3, 1.0
    optimizer = common.make_optimizer(lm, cfg)
    loss()
    fake.reads = 0
    norm = common.optimizer_step(lm, optimizer, cfg, updates=10)
    assert optimizer.defaults["fused"] and norm == 1.0 and fake.reads <= 3
    assert all(p.grad is None for p in lm.model.parameters())
    assert {x.device.type for s in optimizer.state.values() for x in s.values()} == {"cuda"}

def test_a_loss_whose_constants_stay_on_the_cpu_is_seen(fake, monkeypatch):
    """The same without the line of `over_chunks` that moves them."""
    source = inspect.getsource(common.over_chunks)
    assert source.count("v.to(hidden.device)") == 1
    space = dict(vars(common))
    exec(source.replace("v.to(hidden.device)", "v"), space)
    monkeypatch.setattr(grpo, "over_chunks", space["over_chunks"])
    lm = make_lm()
    with pytest.raises(RuntimeError, match="device"):
        losses(lm, lm, ROWS)["grpo k2"]()
