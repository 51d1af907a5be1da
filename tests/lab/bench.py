"""How fast the sampler, the losses and whole steps are here, beside what one would use instead.

Prints a table and writes it as JSON. A ratio is of two medians from one run, in which ours and the
reference take turns. Models have random weights: on CUDA Qwen3's shapes in bf16, on a CPU a small
one in fp32. An untrained model never stops, so lengths are forced: all equal, or drawn from a
log-normal whose 99th percentile is 8 times its median, as rollouts of a reasoning model are.

Steps are those of grpo.py and opd.py and of TRL's trainers (pip install trl): every turn a process
of its own, with the same model, prompts, lengths and dtype, no KL to a reference, and AdamW. The
update alone stands beside its floor, the matrix products of its linear layers.

    python tests/lab/bench.py                             # all parts
    python tests/lab/bench.py --size 0.6b                 # on a GPU
    python tests/lab/bench.py --parts steps --model FOLDER --dtype bf16 --repeats 1 --steps 1
"""

import argparse
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM,
                          StoppingCriteria, TrainerCallback)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import fkl_warmup
import grpo
import opd
from common import LM, Rollout, Row, decode

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
    rows = [Row(p, np.random.default_rng((*p, s)), next(limits))
            for p, k in prompts for s in range(k)]
    list(decode(lm, rows, 1.0, slots, 0.0))
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
    slots, length, equal, longest = (256, 256, 256, 1024) if cuda else (128, 32, 128, 256)
    lm, plain = (LM(args.size, model, None, model.config.vocab_size, [], "bfloat16", bf16=cuda)
                 for model
                 in (make_model(args.size, device, torch.bfloat16 if cuda else torch.float32)
                     for _ in range(2)))
    common.fuse_norms(lm.model, lm.device)  # as `load_lm` does
    rng = np.random.default_rng(1)
    tail, tails = long_tailed(slots, longest), long_tailed(4 * slots, longest)
    for case, k, lengths in (
            (f"{slots} rows, all {equal} tokens", 1, [equal] * slots),
            (f"{slots} rows, all {equal} tokens, 8 of a prompt", 8, [equal] * slots),
            (f"{slots} rows, long-tailed to {longest}", 1, tail),
            (f"{slots} rows, long-tailed to {longest}, 8 of a prompt", 8, tail),
            (f"{4 * slots} rows, {slots} at once, long-tailed to {longest}", 1, tails)):
        ids = rng.integers(2, lm.vocab - 1, (len(lengths) // k, length)).tolist()
        what = [(p, k) for p in ids], lengths, slots
        functions = {"ours": lambda: ours(lm, *what), "generate": lambda: generate(plain, *what)}
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
        super().__init__("given", model, None, VOCAB, [], "float32",
                         bf16=device == "cuda")

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

# --- whole steps ----------------------------------------------------------------------------------

GROUP = 8  # rollouts of a prompt

def model_folder(size, out):
    """A shape as a model folder, with a tokenizer of as many words as it has embeddings."""
    model = make_model(size, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    words["1+1=?"] = words.pop("w3")  # `end_of_turn` asks it
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2",
        chat_template="{{ messages[0]['content'] }}").save_pretrained(out)
    model.save_pretrained(out)
    return out

def questions(args):
    words = np.random.default_rng(2).integers(4, 4096, (args.rollouts // GROUP, 16))
    return [" ".join(f"w{i}" for i in line) for line in words]

def our_steps(kind, args, out):
    """Seconds of the steps of a run of grpo.py or opd.py, and of their updates."""
    verdicts, describe = itertools.cycle(["correct", "wrong"]), common.describe_lm
    common.grade = lambda text, answer: next(verdicts)  # every row has a gradient
    grpo.describe_lm = opd.describe_lm = lambda name: dataclasses.replace(
        describe(name), stop_ids=[-1])  # no token is
    common.Run.finish = lambda run: None
    common.write_json(f"{out}/data.json", [{"problem": q, "answer": 1} for q in questions(args)])
    stage = {"GRPO": grpo, "OPD": opd}[kind]
    own = ({"model": args.model, "mini_batch": args.rollouts // GROUP, "kl_coef": 0}
           if stage is grpo else {"teacher": args.model, "student": args.model})
    stage.main(stage.Config(
        **own, data=f"{out}/data.json", exclude="none", out=f"{out}/run", dtype=args.dtype,
        prompts=args.rollouts // GROUP, rollouts=GROUP, max_new_tokens=args.tokens,
        steps=args.steps, show_every=0, save_every=0))
    lines = common.read_json_lines(f"{out}/run/metrics.jsonl")
    assert all(line["tokens"] == args.rollouts * args.tokens for line in lines)
    return [line["seconds"] for line in lines], [line["seconds_updating"] for line in lines]

class StepClock(TrainerCallback):
    """Seconds of a trainer's steps."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.seconds.append(-now())

    def on_step_end(self, *_, **__):
        self.seconds[-1] += now()

def trl_steps(kind, args, out):
    """Seconds of the steps of TRL's trainers, and no more."""
    import datasets
    import trl

    bf16, clock = args.dtype == "bf16", StepClock()
    settings = dict(
        output_dir=out, max_steps=args.steps, max_completion_length=args.tokens, bf16=bf16,
        per_device_train_batch_size=args.trl_rows, use_cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.rollouts // args.trl_rows, gradient_checkpointing=False,
        lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, shuffle_dataset=False, generation_kwargs={"eos_token_id": None},
        top_k=0, temperature=1.0, model_init_kwargs={"dtype": "float32"})
    prompts = [[{"role": "user", "content": f"{question}\n{common.INSTRUCTION}"}]
               for question in questions(args) for _ in range(1 if kind == "GRPO" else GROUP)]
    what = dict(model=args.model, callbacks=[clock],
                train_dataset=datasets.Dataset.from_dict({"prompt": prompts}))
    if kind == "GRPO":
        trainer = trl.GRPOTrainer(
            args=trl.GRPOConfig(num_generations=GROUP, beta=0.0, **settings), **what,
            reward_funcs=lambda completions, **_: [i % 2.0 for i in range(len(completions))])
    else:  # as ours, the teacher has the dtype of its computation
        teacher_init = {"dtype": "bfloat16" if bf16 else "float32"}
        trainer = trl.DistillationTrainer(
            args=trl.DistillationConfig(beta=1.0, teacher_model_init_kwargs=teacher_init,
                                        **settings), teacher_model=args.model, **what)
    trainer.eos_token_ids, trainer.model.generation_config.eos_token_id = [-1], None
    trainer.train()
    assert trainer.state.log_history[-1]["completions/mean_length"] == args.tokens
    return clock.seconds, None

def floor_of_update(kind, args, out):
    """Seconds of the three products that each linear layer needs, in blocks as large as serve."""
    lm = common.load_lm(args.model, common.StageConfig(dtype=args.dtype))
    prompt = common.build_prompt(lm.tokenizer, questions(args)[0], False)
    head, seconds = lm.model.get_output_embeddings(), 0.0
    for layer in lm.model.modules():
        if isinstance(layer, torch.nn.Linear):
            block, each = (256, args.tokens) if layer is head else (1024, args.tokens + len(prompt))
            weight = lm.head() if layer is head else layer.weight
            x, grad = (torch.randn(block, n, device=lm.device, dtype=weight.dtype)
                       for n in reversed(weight.shape))
            products = {"": lambda: (x @ weight.T, grad @ weight, grad.T @ x)}
            seconds += turns(2, products)[""] * args.rollouts * each / block
    return [seconds], None

def memory(field):
    """VmRSS, or its peak VmHWM, of this process in GiB."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

def measured(function, *args):
    """What the function returns, and this process's peak memory beyond its imports, in GiB."""
    silence, before = os.open(os.devnull, os.O_WRONLY), memory("VmRSS")
    for fd in (1, 2):
        os.dup2(silence, fd)
    with tempfile.TemporaryDirectory() as out:
        result = function(*args, out)
    cuda = torch.cuda.is_available()
    return *result, torch.cuda.max_memory_allocated() / 2**30 if cuda else memory("VmHWM") - before

def in_child(*call):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, *call).result()

def bench_steps(args, device):
    sides = {"ours": our_steps}
    if importlib.util.find_spec("trl"):
        sides["trl"] = trl_steps
    else:
        print("TRL is not installed: its columns are left out")
    with tempfile.TemporaryDirectory() as out:
        name = Path(args.model).name or args.size
        args.model = args.model or model_folder(args.size, out)
        n = args.rollouts * args.tokens
        case = f"{name}, {args.dtype}, {args.rollouts} rows of {args.tokens}"
        for kind in ("GRPO", "OPD"):
            seconds, updates, peak = {s: [] for s in sides}, [], dict.fromkeys(sides, 0)
            for side in list(sides) * args.repeats:
                took, updating, gib = in_child(sides[side], kind, args)
                counts = slice(int(len(took) > 1), None)  # the first of several does not
                seconds[side] += took[counts]
                updates += (updating or [])[counts]
                peak[side] = max(peak[side], gib)
            yield row("steps", f"{kind} step, {case}", "tokens/s",
                      **{side: n / statistics.median(s) for side, s in seconds.items()})
            yield row("steps", f"{kind} step, {case}", "peak GiB", **peak)
            if kind == "GRPO":
                (least,), *_ = in_child(floor_of_update, kind, args)
                yield row("steps", f"GRPO update, {case}", "ms a token",
                          1000 * statistics.median(updates) / n, floor=1000 * least / n)

PARTS = {"sampling": bench_sampling, "losses": bench_losses, "steps": bench_steps}

def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="[default: all]")
    parser.add_argument("--size", choices=SHAPES, default="1.7b" if device == "cuda" else "small",
                        help="model [default: 1.7b on a GPU, else small]")
    parser.add_argument("--repeats", type=int, default=3, help="turns [default: 3]")
    parser.add_argument("--model", default="", help="folder, of the steps [default: of --size]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if device == "cuda" else
                        "fp32", help="of the steps [default: bf16 on a GPU, else fp32]")
    for flag, default, text in (
            ("--rollouts", 0, "rows of a step, 8 a prompt [default: 128, with --model 32]"),
            ("--tokens", 0, "of a row's response [default: 128, with --model 256]"),
            ("--steps", 3, "of a turn; the first of several does not count [default: 3]"),
            ("--trl-rows", 4, "of TRL's micro-batches [default: 4]")):
        parser.add_argument(flag, type=int, default=default, help=text)
    parser.add_argument("--out", default="bench.json", help="[default: bench.json]")
    args = parser.parse_args()
    args.rollouts = args.rollouts or (32 if args.model else 128)
    args.tokens = args.tokens or (256 if args.model else 128)
    os.environ["HF_HUB_OFFLINE"] = "1"
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
