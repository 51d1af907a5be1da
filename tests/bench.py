"""How fast the sampler, the losses and whole steps are on the device at hand, beside what one would
use instead. Prints a table and writes it as JSON.

Every ratio is of two medians measured in one run, ours and the reference taking turns. Models have
random weights: on CUDA of Qwen3's shapes in bf16, on a CPU small and in fp32. An untrained model
never stops, so lengths are forced: all equal, or drawn from a log-normal whose 99th percentile is
8 times its median, as rollouts of a reasoning model are, and cut at that percentile.

    python tests/bench.py                          # all parts, 6 minutes on two CPU cores
    python tests/bench.py --parts sampling --size 8b
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import LM, Rollout, Row, decode, random_stream

SHAPES = {  # hidden, layers, heads, kv heads, head dim, mlp, vocabulary, tied
    "small": (128, 4, 4, 4, 32, 384, 4096, True),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "8b": (4096, 36, 32, 8, 128, 12288, 151936, False),
}


def make_lm(size, device):
    hidden, layers, heads, kv_heads, dim, mlp, vocab, tied = SHAPES[size]
    bf16 = device.startswith("cuda")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, intermediate_size=mlp, pad_token_id=0,
        tie_word_embeddings=tied, max_position_embeddings=40960, eos_token_id=None)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32).eval()
    model.set_attn_implementation("sdpa")
    return LM(size, model.requires_grad_(False), None, vocab, [], bf16, "bfloat16")


def turns(repeats, **functions):
    """Median seconds of each function, called in turn after one call that does not count."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


# --- sampling


def long_tailed(n, longest):
    """n lengths of a log-normal with p99 = 8 x median = longest, cut there; the same every time."""
    rng = np.random.default_rng(0)
    lengths = longest / 8 * np.exp(rng.standard_normal(n) * np.log(8) / 2.3263)
    return np.clip(lengths.astype(int), 1, longest).tolist()


class StopAt(StoppingCriteria):
    def __init__(self, prompt, lengths):
        self.prompt, self.lengths = prompt, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt >= self.lengths


def ours(lm, prompts, k, lengths, slots):
    limits = iter(lengths)
    groups = [[Row(Rollout(p, [], [], False), random_stream((0,), p, s), next(limits))
               for s in range(k)] for p in prompts]
    decode(lm, groups, 1.0, slots, 0.0)
    assert [len(r.rollout.tokens) for g in groups for r in g] == lengths


def generate(lm, prompts, k, lengths, slots):
    """transformers' generate, `slots` rows at a time."""
    rows = torch.tensor([p for p in prompts for _ in range(k)], device=lm.device)
    for i in range(0, len(rows), slots):
        part = torch.tensor(lengths[i : i + slots], device=lm.device)
        lm.model.generate(rows[i : i + slots], max_new_tokens=int(part.max()), do_sample=True,
                          top_k=0, top_p=1.0, temperature=1.0,
                          stopping_criteria=[StopAt(rows.shape[1], part)])


def generate_batch(lm, prompts, k, lengths, slots):
    """transformers' continuous batching."""
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                              eos_token_id=-1, max_new_tokens=max(lengths))
    with lm.model.continuous_batching_context_manager(config) as manager:
        for prompt, length in zip([p for p in prompts for _ in range(k)], lengths):
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        done = 0
        while done < len(lengths):
            result = manager.get_result(timeout=1)
            done += result is not None and result.is_finished()


def bench_sampling(lm, args):
    cuda, rng = lm.device.type == "cuda", np.random.default_rng(1)
    slots, prompt, equal, longest = (256, 256, 512, 2048) if cuda else (128, 32, 128, 512)
    for name, rollouts, k, lengths in (
            (f"equal lengths of {equal}", slots, 1, [equal] * slots),
            (f"equal lengths of {equal}, 8 rollouts a prompt", slots, 8, [equal] * slots),
            (f"long-tailed to {longest}", slots, 1, long_tailed(slots, longest)),
            (f"long-tailed to {longest}, 8 rollouts a prompt", slots, 8, long_tailed(slots, longest)),
            (f"long-tailed to {longest}, {4 * slots} rollouts", 4 * slots, 1,
             long_tailed(4 * slots, longest))):
        prompts = rng.integers(2, lm.vocab - 1, (rollouts // k, prompt)).tolist()
        case = (lm, prompts, k, lengths, slots)
        names = dict(ours=ours, generate=generate) | (dict(generate_batch=generate_batch) if args.batch else {})
        seconds = turns(args.repeats, **{n: lambda f=f: f(*case) for n, f in names.items()})
        tokens = sum(lengths)
        print(name, {n: round(tokens / s) for n, s in seconds.items()}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", action="store_true")
    args = parser.parse_args()
    lm = make_lm("small", "cpu")
    bench_sampling(lm, args)
