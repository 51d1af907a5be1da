"""CUDA on a CPU build of torch: what is recorded is played, what has no values has a device.

`Graph` and `graph` stand in for torch.cuda.CUDAGraph and torch.cuda.graph. As on a GPU, recording a
function executes none of its operations (its results are NaN or 0), and replaying executes those
operations, and no Python, on the tensors that were seen. What no recording can hold raises: waiting
for the host, shapes that depend on data, numbers from the host, random numbers.

`random_lm` and `losses` are what both `test_cuda.py` and `lab/gpu_check.py` look at.

`flash` stands in for the attention kernel and checks what that checks. `fake_cuda` gives tensors
on "cuda:0" that have shapes and no values: all operations check that their tensors are on one
device. Indexing such tensors needs a device guard, so the CPU's is lent to CUDA; and backward()
needs streams, so `backward` walks the graph of autograd itself.
"""

import contextlib
import ctypes
import dataclasses
import math
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import common
import fkl_warmup
import grpo
import opd

aten = torch.ops.aten
HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.tensor, torch.from_numpy}
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape,
         torch.Tag.nondeterministic_seeded}
recordings = []  # the Graphs recorded so far
recording = False

def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

class NoHost(TorchFunctionMode):
    """Raises RuntimeError where values would go to the host or come from it, unseen by torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST:
            raise RuntimeError(f"the host is needed while recording: {func.__name__}")
        return func(*args, **kwargs or {})

def refuse_waiting(func, inputs):
    waits = WAITS & set(func.tags) and func is not aten._flash_attention_forward.default
    if func is aten.index.Tensor:  # its shape depends on data where a mask is the index
        waits = any(x.dtype == torch.bool for x in inputs[1:])
    if waits:
        raise RuntimeError(f"the host would have to wait while recording: {func}")

class Graph:
    """A recorded function: its operations, in order, each with its arguments and its results."""

    def __init__(self):
        self.operations, self.replays = [], 0
        recordings.append(self)

    @torch.autocast("cpu", enabled=False)  # it chose the dtypes when they were recorded
    def replay(self):
        self.replays += 1
        for func, args, kwargs, outs in self.operations:
            for old, new in zip(outs, tensors(func(*args, **kwargs))):
                assert (old.shape, old.dtype) == (new.shape, new.dtype), func
                old.copy_(new)

class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, inputs = kwargs or {}, tensors((args, kwargs))
        refuse_waiting(func, inputs)
        with self:  # what inference mode gives in one piece
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if func._schema.is_mutable:  # in place
            self.graph.operations.append((func, args, kwargs, ()))
            return args[0]
        out = func(*args, **kwargs)
        seen = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
        new = [x for x in tensors(out) if x.numel() and x.untyped_storage().data_ptr() not in seen]
        if new:  # not a view of what it was given
            for x in new:
                x.fill_(math.nan if x.is_floating_point() else 0)
            self.graph.operations.append((func, args, kwargs, tensors(out)))
        return out

@contextlib.contextmanager
def graph(graph, pool=None, capture_error_mode="global"):
    """torch.cuda.graph: inside, everything is recorded."""
    global recording
    assert capture_error_mode == "thread_local"  # else a thread of another library ends it
    recording = True
    try:
        with NoHost(), Recorder(graph):
            yield
    finally:
        recording = False

@torch.autocast("cpu", enabled=False)
def flash(query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale,
          seqused_k):
    """aten::_flash_attention_forward with one query a sequence, as the kernel: (out, lse, ...)."""
    (n, H, D), kv_heads = query.shape, key.shape[1]
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert D <= 256 and D % 8 == 0 and H % kv_heads == 0 and 0 < n < 65536
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and dropout == 0
    assert cum_q.dtype == cum_k.dtype == seqused_k.dtype == torch.int32 and not causal
    assert cum_q.shape == cum_k.shape == (n + 1,) and seqused_k.shape == (n,)
    assert key.shape == value.shape == (n * max_k, kv_heads, D) and max_q == 1
    out, lse = torch.zeros_like(query), torch.full((H, n), math.inf)  # of an empty sequence
    if not recording:
        assert cum_q.tolist() == list(range(n + 1)) and cum_k.tolist()[1:] == [
            max_k * (i + 1) for i in range(n)] and seqused_k.max() <= max_k
        k, v = (x.view(n, max_k, kv_heads, D).float().repeat_interleave(H // kv_heads, 2)
                for x in (key, value))
        scores = scale * torch.einsum("mhd,mphd->mhp", query.float(), k)
        unused = torch.arange(max_k) >= seqused_k[:, None]
        scores.masked_fill_(unused[:, None], -math.inf)
        some = seqused_k > 0
        lse[:, some] = scores.logsumexp(-1)[some].T
        out[some] = torch.einsum("mhp,mphd->mhd", scores.softmax(-1), v)[some].to(out.dtype)
    return out, lse, *(torch.empty(0) for _ in range(3))

@contextlib.contextmanager
def cuda_on_cpu(monkeypatch):
    """Inside, a CPU is used as a GPU would be: recorded steps, its kernel, its layout of pages."""
    made = common.PagedCache.__init__

    def as_on_cuda(cache, *args):
        made(cache, *args)
        cache.pool = cache.pool.contiguous()

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", flash, "CPU")
    patches = {"CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: (0, 1),
               "current_stream": lambda: "stream", "set_stream": lambda stream: None}
    for name, function in patches.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(common.PagedCache, "__init__", as_on_cuda)
    monkeypatch.setattr(common, "has_bf16", lambda device: True)
    monkeypatch.setattr(common, "RECORDS", {"cpu"})
    recordings.clear()
    try:
        yield recordings
    finally:
        kernels._destroy()

# --- tensors on "cuda:0" without values

class NoDevice(FakeTensorMode):
    avoid_device_init = True  # though CUDA says that it is there

class FakeCuda(TorchDispatchMode):
    """Leaves the CPU's tensors as they are. Counts `reads` of values that are not there; each gives
    1, or raises if `strict`."""

    def __init__(self):
        super().__init__()
        self.reads, self.strict = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, inputs = kwargs or {}, tensors((args, kwargs))
        if not any(isinstance(x, FakeTensor) for x in inputs) and (
                torch.device(kwargs.get("device") or "cpu").type == "cpu"):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if self.strict:
            refuse_waiting(func, inputs)
        if func is aten._local_scalar_dense.default:
            self.reads += 1
            return 1.0
        return func(*args, **kwargs)

@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """Inside, new tensors have no values. Yields a FakeCuda. Needs no compiler and no GPU."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    old, fake = guards[1], NoDevice(allow_non_fake_inputs=True)
    for name, value in {"is_available": True, "is_bf16_supported": True,
                        "is_current_stream_capturing": False,
                        "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    guards[1] = guards[0]
    try:
        with fake, FakeCuda() as mode:
            yield mode
    finally:
        guards[1] = old

def backward(loss, gradient=None):
    """loss.backward(gradient), node by node; each gradient must lie where its tensor does."""
    root, order, seen = loss.grad_fn, [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                if following is not None:
                    visit(following)
            order.append(node)

    visit(root)
    grads = {(root, loss.output_nr): torch.ones_like(loss) if gradient is None else gradient}
    with torch.no_grad():
        for node in reversed(order):
            given = [grads.pop((node, i), None) for i in range(len(node._input_metadata))]
            if hasattr(node, "variable"):
                leaf, grad = node.variable, given[0]
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                continue
            results = node(*given)
            results = results if isinstance(results, tuple) else (results,)
            for (following, i), grad in zip(node.next_functions, results):
                if following is not None and grad is not None:
                    want = following._input_metadata[i]
                    assert grad.device == want.device, (node, grad.device, want.device)
                    grad = grad.sum_to_size(want.shape).to(want.dtype)
                    before = grads.get((following, i))
                    grads[following, i] = grad if before is None else before + grad

# --- models and losses

def random_lm(shape, device, bf16, train=False):
    """An LM of random weights and a sizes.Shape, a Qwen3 or a Llama; without stop tokens, and with
    three embeddings that are padding."""
    config = (Qwen3Config if shape.qk_norm else LlamaConfig)(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, intermediate_size=shape.ffn, tie_word_embeddings=shape.tied)
    dtype = torch.bfloat16 if bf16 and not train else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="ours")
    model.eval().requires_grad_(train)
    common.fuse_norms(model, model.device)
    return common.LM("random", model, None, shape.vocab - 3, [], "float32", bf16=bf16)

def losses(lm, teacher, rows, **flags):
    """{name: function that adds the gradient of a loss of the stages and returns its sums}."""
    def config(script, **more):
        known = {field.name for field in dataclasses.fields(script.Config)}
        every = {"model": "", "teacher": "", "student": "", **flags, **more}
        return script.Config(**{name: x for name, x in every.items() if name in known})
    n, ones = sum(len(row.tokens) for row in rows), torch.ones(len(rows))
    old = [[x - 0.1 for x in row.logp] for row in rows]
    found = {f"grpo {kl}": lambda kl=kl: grpo.accumulate(
        config(grpo, kl_loss=kl), lm, rows, ones, ones.double() / n, old, old)
        for kl in ("k2", "k3")}
    found["grpo fresh"] = lambda: grpo.accumulate(config(grpo), lm, rows, ones, ones.double() / n,
                                                  None, None)
    for name in ("full", "token", "return"):
        found[f"opd {name}"] = lambda name=name: opd.accumulate(
            config(opd, estimator=name, sparse_weight=0.5), lm, teacher, rows, n, ones)
    for name in ("soft", "hard"):
        found[f"warmup {name}"] = lambda name=name: fkl_warmup.accumulate(
            config(fkl_warmup, targets=name), lm, teacher, rows, n)
    return found
