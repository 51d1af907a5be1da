"""How fast the sampler and the losses are on this device, beside what one would use instead.

Prints a table and writes it as JSON. A ratio is of two medians from one run, in which ours and the
reference take turns. Models have random weights: on CUDA Qwen3's shapes in bf16, on a CPU a small
one in fp32. An untrained model never stops, so lengths are forced: all equal, or drawn from a
log-normal whose 99th percentile is 8 times its median, as rollouts of a reasoning model are. (How
fast whole steps are, and where their time goes, is in the metrics.jsonl of every run.)

    python tests/lab/bench.py                            # sampling and losses
    python tests/lab/bench.py --parts sampling --size 8b # on a GPU
"""

import argparse
import platform
import statistics
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import fkl_warmup
import grpo
import opd
from common import LM, Rollout, Row, decode, random_stream

SHAPES = {  # hidden, layers, heads, kv heads, head dim, mlp, vocabulary, tied embeddings
    "small": (128, 4, 4, 4, 32, 384, 4096, True),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "8b": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
VOCAB = 151936  # of the losses

def make_model(size, device, dtype):
    hidden, layers, heads, kv_heads, dim, mlp, vocab, tied = SHAPES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, intermediate_size=mlp, pad_token_id=0,
        eos_token_id=1, tie_word_embeddings=tied, max_position_embeddings=40960)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).eval().requires_grad_(False)
    model.set_attn_implementation("ours")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model

def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

def turns(repeats, functions):
    """Median seconds of each function, called in turn, after one turn that does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = now()
            function()
            seconds[name].append(now() - started)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}

def row(part, case, unit, ours, **references):
    """A row of the table: ours, each reference, and how many times ours it is."""
    numbers = {name: value for name, value in references.items() if value}
    ratios = {f"ours / {name}": ours / value for name, value in numbers.items()}
    return {"part": part, "case": case, "unit": unit, "ours": ours, **numbers, **ratios}

# --- sampling -------------------------------------------------------------------------------------

def long_tailed(n, longest):
    """n lengths of a log-normal with p99 = 8 x median = longest, cut there; the same every time."""
    rng = np.random.default_rng(0)
    lengths = longest / 8 * np.exp(rng.standard_normal(n) * np.log(8) / 2.3263)
    return np.clip(lengths.astype(int), 1, longest).tolist()

def ours(lm, prompts, lengths, slots):
    """prompts: (tokens, rollouts) pairs; lengths: of all rollouts; slots: rows decoded at once."""
    limits = iter(lengths)
    rows = [Row(p, random_stream((0,), p, s), next(limits)) for p, k in prompts for s in range(k)]
    decode(lm, rows, 1.0, slots, 0.0)
    assert [len(row.rollout.tokens) for row in rows] == lengths

class StopAt(StoppingCriteria):
    """Ends each row of a batch at its own length."""

    def __init__(self, prompt, lengths):
        self.prompt, self.lengths = prompt, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt >= self.lengths

PLAIN = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

def generate(lm, prompts, lengths, slots):
    """transformers' generate, `slots` rows at a time."""
    ids = torch.tensor([p for p, k in prompts for _ in range(k)], device=lm.device)
    for i in range(0, len(ids), slots):
        part = torch.tensor(lengths[i : i + slots], device=lm.device)
        lm.model.generate(ids[i : i + slots], max_new_tokens=int(part.max()), **PLAIN,
                          stopping_criteria=[StopAt(ids.shape[1], part)])

def bench_sampling(args, device):
    cuda = device == "cuda"
    slots, length, equal, longest = (256, 256, 512, 2048) if cuda else (128, 32, 128, 256)
    model = make_model(args.size, device, torch.bfloat16 if cuda else torch.float32)
    lm = LM(args.size, model, None, model.config.vocab_size, [], "bfloat16", cuda)
    rng = np.random.default_rng(1)
    tail, tails = long_tailed(slots, longest), long_tailed(4 * slots, longest)
    for case, k, lengths in (
            (f"{slots} rows, all {equal} tokens", 1, [equal] * slots),
            (f"{slots} rows, all {equal} tokens, 8 of a prompt", 8, [equal] * slots),
            (f"{slots} rows, long-tailed to {longest}", 1, tail),
            (f"{slots} rows, long-tailed to {longest}, 8 of a prompt", 8, tail),
            (f"{4 * slots} rows, {slots} at once, long-tailed to {longest}", 1, tails)):
        ids = rng.integers(2, lm.vocab - 1, (len(lengths) // k, length)).tolist()
        what = lm, [(p, k) for p in ids], lengths, slots
        functions = {f.__name__: lambda f=f: f(*what) for f in (ours, generate)}
        seconds = turns(args.repeats, functions)
        speeds = {name: sum(lengths) / s for name, s in seconds.items()}
        yield row("sampling", case, "tokens/s", **speeds)

# --- losses ---------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Peak bytes of all tensors made inside, on any device; slow."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                inputs = (a.untyped_storage() for a in args if isinstance(a, torch.Tensor))
                if key and key not in self.seen | {x.data_ptr() for x in inputs}:
                    self.seen.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.drop, key, size)
        return out

    def drop(self, key, size):
        self.seen.discard(key)
        self.live -= size

class Given(LM):
    """An LM of hidden states that are given: (N, D), and a head (V, D)."""

    def __init__(self, N, D, device, train):
        self.hidden = torch.randn(N, D, device=device, requires_grad=train)
        weight = torch.nn.Parameter(torch.randn(VOCAB, D, device=device) / D**0.5, train)
        embedding = SimpleNamespace(weight=weight)
        model = SimpleNamespace(device=torch.device(device),
                                get_output_embeddings=lambda: embedding)
        super().__init__("given", model, None, VOCAB, [], "float32", device == "cuda")

    def states(self, rows):
        return self.hidden, torch.tensor([t for r in rows for t in r.tokens], device=self.device)

def loss_functions(N, D, device, **chunk):
    """name: (ours, plain), each a forward and backward pass over N tokens, with grads at hand."""
    student, teacher = Given(N, D, device, True), Given(N, D, device, False)
    tokens = np.random.default_rng(0).integers(0, VOCAB, N).tolist()
    rows = [Rollout([0], tokens, [-10.0] * N, True)]

    def plain(loss):  # of all tokens at once
        def log_probs(lm):
            with lm.autocast():
                weight = lm.model.get_output_embeddings().weight
                return F.linear(lm.hidden, weight).float().log_softmax(-1)  # (N, V)
        logp = log_probs(student)
        if loss is not grpo.policy_loss:
            return loss(logp, log_probs(teacher)).mean().backward()
        logp = logp.gather(-1, torch.tensor(tokens, device=device)[:, None])
        return loss(logp, logp.detach(), torch.ones_like(logp), 0.2, 0.2).mean().backward()

    def ours_grpo():
        cfg = grpo.Config(kl_coef=0, **chunk)
        grpo.accumulate(cfg, student, rows, torch.ones(1), grpo.row_weights(rows, cfg), None, None)

    def ours_distil(stage, *sparse):
        stage.accumulate(stage.Config(**chunk), student, teacher, rows, N, *sparse)

    return {"GRPO": (ours_grpo, lambda: plain(grpo.policy_loss)),
            "forward KL": (lambda: ours_distil(fkl_warmup), lambda: plain(fkl_warmup.forward_kl)),
            "reverse KL": (lambda: ours_distil(opd, torch.zeros(1)), lambda: plain(opd.reverse_kl))}

def peak_bytes(function, device):
    """Of what a call needs beside what is there before it (after a first call: its gradients)."""
    if device == "cuda":
        function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        function()
    return memory.peak

def bench_losses(args, device):
    few, D = (2048, 2048) if device == "cuda" else (512, 64)
    for name, (mine, plain) in loss_functions(few, D, device).items():
        seconds = turns(args.repeats, {"ours": mine, "plain": plain})
        yield row("losses", f"{name}, {few} tokens, D {D}, V {VOCAB}", "tokens/s",
                  **{k: few / s for k, s in seconds.items()})
        yield row("losses", f"{name}, {few} tokens", "peak GiB", peak_bytes(mine, device) / 2**30,
                  plain=peak_bytes(plain, device) / 2**30)
    mine, _ = loss_functions(16384, D, device)["reverse KL"]
    yield row("losses", "reverse KL, 16384 tokens", "peak GiB", peak_bytes(mine, device) / 2**30)

PARTS = {"sampling": bench_sampling, "losses": bench_losses}

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="[default: all]")
    parser.add_argument("--size", choices=SHAPES, default="1.7b" if device == "cuda" else "small",
                        help="model [default: 1.7b on a GPU, else small]")
    parser.add_argument("--repeats", type=int, default=3, help="turns [default: 3]")
    parser.add_argument("--out", default="bench.json", help="[default: bench.json]")
    args = parser.parse_args()
    chip = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    hardware = {"device": chip, "threads": torch.get_num_threads(), "torch": torch.__version__,
                "size": args.size}
    print(hardware)
    print("| part | case | unit | ours | reference | ours / reference |\n"
          "| --- | --- | --- | --: | --: | --: |")
    rows = []
    for part in args.parts.split(","):
        for line in PARTS[part](args, device):
            rows.append(line)
            names = [n for n in line if f"ours / {n}" in line] or [""]
            for name in names:
                cells = [part, line["case"], line["unit"], f"{line['ours']:.4g}",
                         f"{name} {line[name]:.4g}" if name else "-",
                         f"{line[f'ours / {name}']:.2f}" if name else "-"]
                print(f"| {' | '.join(cells)} |", flush=True)
            common.write_json(args.out, {**hardware, "rows": rows})

if __name__ == "__main__":
    main()
