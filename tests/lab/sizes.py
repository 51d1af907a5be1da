"""Memory per GPU and rough seconds of a training step, computed from a model's shape alone.

    python tests/lab/sizes.py                          # a table of six models (as in the README)
    python tests/lab/sizes.py Qwen3-8B --gpus 8        # grpo.py with the paper's settings
    python tests/lab/sizes.py Qwen/Qwen3-1.7B --stage opd --teacher ckpt/teacher_rl --gpus 1
    python tests/lab/sizes.py --recipe small           # memory and hours of `run_all.sh small`

Nothing is measured, and no weights are loaded. A MODEL is a name in MODELS, a folder or a hub name.
A recipe is what `run_all.sh` would run, its flags included. Bytes on one of n GPUs, for P
parameters, of which P_in are in the L layers and P_out are embedding, head and last norm:

    masters, AdamW           4 P / n and 8 P / n
    gradients                4 P / n, in the update
    frozen models            2 P / n, and for n > 1 their P_out gathered: 2 P_out more
    weights of the update    n = 1: bf16 copies, 2 P; else two layers in bf16 and P_out in fp32,
                             2 * 2 P_in / L + 4 P_out, and as much again for their gradients
    weights of the sampler   of the trained model: n = 1: bf16 copies, 2 P; else with `parts` GPUs
                             that share a copy 2 P_in / parts + 4 P_out; of a frozen model: n = 1:
                             nothing; else 2 P_in / parts + 2 P_out
    head and chunk           8 V D, the head in bf16 and its gradient in bf16 and fp32, and 6 blocks
                             of logits
    activations              tokens of a micro-batch (or of the longest row) times what L layers
                             keep; with --gradient-checkpointing times 4 L D and one layer. A layer
                             keeps 24 D + 14 (H + H_kv) d + 8 F
    keys and values          4 L H_kv d / parts a token; rows * longest at the very most (what does
                             not fit waits)

Parameters of a folder or hub name are counted on the model without weights. A mixture of experts
holds them all, and many rows read all when they are sampled; but a token passes through its active
ones only: its share of the experts. Those alone count as P in the operations, and in F.

evaluate.py loads the whole model on each GPU, like n = 1, unless parts > 1. Parts are those that
the scripts choose (`count_parts` in common.py) in nodes of 8, or --sample-parts. Seconds, for
responses that are all as long as allowed: 2 P operations a token for a forward pass, 4 P for a
backward pass (2 P more with --gradient-checkpointing), and 4 L H d * length / 2 of attention as
often. Sampling reads a GPU's part of the weights, and half of the keys and values of its rows, once
a token; with parts it adds up 2 L times, which takes 20 us and 4 D bytes a row on the way. A
micro-batch moves 8 P bytes between GPUs. A GPU reaches 40 % of its bf16 operations (fp32 sums) and
bytes a second, as in the maker's data sheets: an H100 (SXM, 80 GB) 989e12 and 3.35e12, an RTX 4080
(16 GB) 97.5e12 and 717e9. It sends 200e9 bytes a second to its neighbours, 25e9 across nodes of 8.
In a recipe prompts have 200 tokens, and keys and values take 80 % of the memory that is free.
"""

import argparse
import dataclasses
import math
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import evaluate
import fkl_warmup
import grpo
import opd
from common import UserError, check, describe_lm, parse_args

GB = 1e9
NODE, NETWORK, LATENCY = 200e9, 25e9, 20e-6  # bytes a second; seconds until a sum is everywhere
STAGES = {"grpo": grpo.Config, "warmup": fkl_warmup.Config, "opd": opd.Config,
          "evaluate": evaluate.Config}

@dataclass(frozen=True)
class Card:
    name: str
    gb: int
    operations: float  # a second, in bf16 with fp32 sums
    memory: float  # bytes a second
    reached: float = 0.4

    def seconds(self, operations=0.0, read=0.0):
        return (operations / self.operations + read / self.memory) / self.reached

H100 = Card("H100", 80, 989e12, 3.35e12)
RTX_4080 = Card("RTX 4080", 16, 97.5e12, 716.8e9)

@dataclass(frozen=True)
class Shape:
    """What the sizes of a Qwen or Llama model follow from."""

    hidden: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # H_kv
    ffn: int  # F
    vocab: int  # V, rows of the embedding
    tied: bool  # one matrix is embedding and head
    head_dim: int = 128  # d
    qk_norm: bool = False
    counted: tuple = ()  # parameters in the layers, of them in experts, and in the rest; if known
    experts: float = 1.0  # share of the experts that a token passes through, nan if it is not known

    @property
    def layer(self):
        """Parameters of a layer, in the mean."""
        if self.counted:
            return self.counted[0] / self.layers
        D, d = self.hidden, self.head_dim
        attention = 2 * D * d * (self.heads + self.kv_heads) + 2 * d * self.qk_norm
        return attention + 3 * D * self.ffn + 2 * D

    @property
    def outer(self):
        """Parameters of embedding, head and last norm."""
        if self.counted:
            return self.counted[2]
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def params(self):
        return round(self.layers * self.layer) + self.outer

    @property
    def active(self):
        """Parameters that a token passes through. UserError if nobody says how many experts."""
        check(self.experts > 0, "no seconds: it has experts, and its config.json does not say how "
              "many there are (num_experts) and how many a token takes (num_experts_per_tok)")
        return self.params - (1 - self.experts) * (self.counted[1] if self.counted else 0)

    def part(self, parts):
        """Bytes of a part of a bf16 copy: of the layers only, the rest is on each GPU."""
        return 2 * (self.params - self.outer) / parts + 2 * self.outer

    @property
    def cache(self):
        """Bytes of keys and values a token."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation(self):
        """Bytes that a layer keeps for the backward pass, a token."""
        heads = (self.heads + self.kv_heads) * self.head_dim
        return 24 * self.hidden + 14 * heads + 8 * self.ffn

MODELS = {
    "Qwen3-0.6B": Shape(1024, 28, 16, 8, 3072, 151936, True, qk_norm=True),
    "Qwen3-1.7B": Shape(2048, 28, 16, 8, 6144, 151936, True, qk_norm=True),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 12288, 151936, False, qk_norm=True),
    "Qwen3-14B": Shape(5120, 40, 40, 8, 17408, 151936, False, qk_norm=True),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256, False),
    "Llama-3.3-70B": Shape(8192, 80, 64, 8, 28672, 128256, False),
    "SmolLM2-135M": Shape(576, 30, 9, 3, 1536, 49152, True, 64),
    "SmolLM2-360M": Shape(960, 32, 15, 5, 2560, 49152, True, 64),
}

def read_shape(name):
    """Shape of a model of MODELS, a folder or a hub name. Raises UserError if there is none."""
    short = name.split("/")[-1].removesuffix("-Instruct")
    if short in MODELS and not Path(name).is_dir():
        return MODELS[short]
    describe_lm(name)
    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    inside = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n}
    in_experts = sum(size for n, size in inside.items() if ".experts." in n)
    counted = sum(inside.values()), in_experts, model.num_parameters() - sum(inside.values())
    c = model.config
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    ffn, share = c.intermediate_size, 1.0
    if in_experts:
        many = (getattr(c, n, 0) for n in ("num_experts", "num_local_experts", "n_routed_experts"))
        taken, many = getattr(c, "num_experts_per_tok", 0), next(filter(None, many), 0)
        share = taken / many if taken and many else math.nan
        ffn = (taken or many or 1) * getattr(c, "moe_intermediate_size", ffn)
    return Shape(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                 ffn, c.vocab_size, c.tie_word_embeddings, dim, counted=counted, experts=share)

@dataclass
class Settings:
    """The flags that sizes depend on; None is the stage's own default."""

    stage: str = "grpo"
    gpus: int = 8
    prompts: int = None  # a step; of evaluate: in all, by default as many as fill --sample-rows
    rollouts: int = None
    max_prompt_tokens: int = None
    max_new_tokens: int = None
    micro_tokens: int = None
    sample_rows: int = None
    sample_parts: int = None
    gradient_checkpointing: bool = False

    def __post_init__(self):
        flags = dataclasses.fields(STAGES[self.stage])
        defaults = {"max_prompt_tokens": 2048, **{flag.name: flag.default for flag in flags}}
        defaults.setdefault("rollouts", defaults.get("samples"))
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.name in defaults:
                setattr(self, field.name, defaults[field.name])
        self.micro_tokens = self.micro_tokens or 32768
        if self.prompts is None:
            self.prompts = max(1, self.sample_rows // self.rollouts) * self.gpus

    @property
    def parts(self):
        return self.sample_parts or 1  # 0: see `divided`

    @property
    def longest(self):
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def share(self):
        """Rows of a step on the GPU that has most prompts."""
        return -(-self.prompts // (self.gpus // self.parts)) * self.rollouts

    @property
    def rows_at_once(self):
        """Rows that a GPU decodes at once; the warmup's teacher samples for many steps at once."""
        return self.sample_rows if self.stage == "warmup" else min(self.share, self.sample_rows)

    def roles(self, model, frozen):
        """The Shapes (trained, frozen, the one that samples), None if there is none."""
        if self.stage == "evaluate":
            return None, model, model
        return model, frozen, frozen if self.stage == "warmup" else model

    def divided(self, model, frozen, card):
        """The same with the parts that the scripts choose, as `count_parts` in common.py."""
        shape = self.roles(model, frozen)[2]
        n = 1 if shape.experts != 1 else math.gcd(self.sample_parts, self.gpus, 8, shape.kv_heads,
                                                  shape.ffn)
        least = self.sample_parts or 3 * 2 * shape.params / (card.gb * GB)
        return dataclasses.replace(self, sample_parts=next(
            i for i in range(1, n + 1) if i == n or (n % i == 0 and i > least)))

def step_bytes(s, model, frozen=None, chunk=256 << 20):
    """{part: bytes} on one GPU: what is always there, then the update's, then the sampler's."""
    trained, frozen, sampler = s.roles(model, frozen)
    n = s.gpus if trained or s.parts > 1 else 1
    many = n > 1
    always = {"masters": 4 * trained.params / n if trained else 0,
              "AdamW": 8 * trained.params / n if trained else 0,
              "frozen models": 2 * frozen.params / n + 2 * frozen.outer * many if frozen else 0}
    update = {}
    if trained:
        gathered = 2 * (4 * trained.layer + 4 * trained.outer) if many else 2 * trained.params
        every, one = trained.layers * trained.activation, trained.activation
        kept = 4 * trained.layers * trained.hidden + one if s.gradient_checkpointing else every
        update = {"gradients": 4 * trained.params / n, "weights of the update": gathered,
                  "head and chunk": 8 * trained.vocab * trained.hidden + 6 * chunk,
                  "activations": max(s.micro_tokens, s.longest) * kept}
    samples = s.stage in ("grpo", "opd")  # the trained model
    sampling = {"weights of the sampler": sampler.part(s.parts) * (many or samples)
                + 2 * sampler.outer * (many and samples),
                "keys and values": s.rows_at_once * s.longest * sampler.cache / s.parts}
    total = sum(always.values())
    return {**always, **update, "in the update": (total + sum(update.values())) * bool(trained),
            **sampling, "while sampling": total + sum(sampling.values())}

def step_seconds(s, model, frozen=None, card=H100):
    """{part: seconds} of a step in which every row is as long as allowed."""
    trained, frozen, sampler = s.roles(model, frozen)
    mine = s.prompts * s.rollouts / s.gpus  # rows of a step on one GPU
    live = s.max_prompt_tokens + s.max_new_tokens / 2  # tokens of a row, in the mean over time
    read = sampler.part(s.parts) + s.rows_at_once * live * sampler.cache / s.parts
    adding = 2 * sampler.layers * (LATENCY + 4 * sampler.hidden * s.rows_at_once / NODE)
    a_token = card.seconds(read=read) + adding * (s.parts > 1)
    parts = {"sampling": s.share / s.rows_at_once * s.max_new_tokens * a_token}

    def passes(shape, n):
        attention = 4 * shape.layers * shape.heads * shape.head_dim * s.longest / 2
        return card.seconds(n * (2 * shape.active + attention) * mine * s.longest)

    if trained:
        wire = NODE if s.gpus <= 8 else NETWORK
        groups = max(1, mine * s.longest / max(s.micro_tokens, s.longest))
        parts["frozen models"] = passes(frozen, 1) if frozen else 0.0
        parts["update"] = passes(trained, 4 if s.gradient_checkpointing else 3)
        parts["between GPUs"] = groups * 8 * trained.params / wire if s.gpus > 1 else 0.0
    return {**parts, "a step": sum(parts.values())}

def models_table():
    """grpo.py with the paper's settings, --gradient-checkpointing and its KL reference."""
    rows = ["| model | GPUs | parts | update, GB | sampling, GB | a row's cache, GB | "
            "fits 80 / 141 GB | a step, minutes |",
            "| --- | --: | --: | --: | --: | --: | --- | --: |"]
    for name, shape in list(MODELS.items())[:6]:
        for gpus in (1, 8, 16):
            s = Settings(gpus=gpus, gradient_checkpointing=True).divided(shape, shape, H100)
            size, seconds = step_bytes(s, shape, shape), step_seconds(s, shape, shape)["a step"]
            row = size["keys and values"] / s.rows_at_once
            sampling = size["while sampling"] - size["keys and values"]
            need = max(size["in the update"], sampling + row) / GB
            fits = " / ".join("yes" if need < 0.95 * card else "no" for card in (80, 141))
            rows.append(f"| {name} | {gpus} | {s.parts} | {size['in the update'] / GB:.0f} | "
                        f"{sampling / GB:.0f} | {row / GB:.1f} | {fits} | {seconds / 60:.0f} |")
    return "\n".join(rows)

RECIPES = {  # setting of run_all.sh: GPUs (0: --gpus), card, tokens of a response (0: its flag)
    "qwen3": (0, H100, (1024, 4096, 16384)), "small": (1, H100, (0,)), "tiny": (1, RTX_4080, (0,))}
PROBLEMS = {"dapo": 17_400, "openai/gsm8k:main:train": 7_473, "openai/gsm8k:main:test": 1_319,
            "math500": 500, "aime24": 30, "aime25": 30}
PROMPT = 200  # ours: tokens of a usual problem with its instruction
R5 = ("teacher-rl-1h", "bridge-1h-warmup", "bridge-1h", "fresh-2h", "fresh-2h/eval")

def commands(setting):
    """[(stage, Config)] of all that `run_all.sh SETTING` would run. Nothing is run or written."""
    script = 'python() { printf "%q " "$@"; echo; }\n' + (ROOT / "run_all.sh").read_text()
    with tempfile.TemporaryDirectory() as folder:
        lines = subprocess.run(["bash", "-c", script, "run_all.sh", setting], cwd=folder, text=True,
                               check=True, capture_output=True).stdout.splitlines()
    found = [shlex.split(line) for line in lines if re.match(r"\w+\.py .*--out", line)]
    stages = [name.removesuffix(".py").removeprefix("fkl_") for name, *_ in found]
    return [(s, parse_args(STAGES[s], "", flags)) for s, (_, *flags) in zip(stages, found)]

def run_costs(stage, cfg, gpus, card, model, frozen):
    """(most GB on a GPU, hours) of a whole run."""
    s = Settings(stage, gpus, **{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Settings)
                                 if hasattr(cfg, f.name)})
    s.max_prompt_tokens = PROMPT
    if stage == "evaluate":
        steps, s.rollouts = 1, cfg.samples
        s.prompts = sum(min(PROBLEMS[x], cfg.limit or PROBLEMS[x]) for x in cfg.data.split(","))
    else:
        problems = (cfg.labels or PROBLEMS[cfg.data]) // (1 if cfg.half == "all" else 2)
        steps = cfg.steps or cfg.epochs * (problems // s.prompts)
    s = s.divided(model, frozen, card)
    size, a_token = step_bytes(s, model, frozen), s.roles(model, frozen)[2].cache / s.parts
    others = size["while sampling"] - size["keys and values"]
    room = 0.8 * (0.95 * card.gb * GB - others)  # as in common.cache_bytes
    s.sample_rows = min(s.sample_rows, int(room / (PROMPT + s.max_new_tokens / 2) / a_token))
    check(s.sample_rows > 0, f"{gpus} GPUs of {card.gb} GB are too few")
    most = max(size["in the update"], others + min(room, size["keys and values"]))
    return most / GB, steps * step_seconds(s, model, frozen, card)["a step"] / 3600

def recipe_table(setting, gpus=8):
    """Memory and hours of the runs of `run_all.sh SETTING`, of route R5 from end to end, of all."""
    own, card, lengths = RECIPES[setting]
    gpus, shapes, costs = own or gpus, {}, {}
    for stage, cfg in commands(setting):
        trained = getattr(cfg, "student", "") or cfg.model
        frozen = getattr(cfg, "teacher", "") or (getattr(cfg, "kl_coef", 0) and trained)
        model, frozen = (name and (shapes.get(name) or read_shape(name))
                         for name in (trained, frozen))
        found = [run_costs(stage, dataclasses.replace(cfg, max_new_tokens=n or cfg.max_new_tokens),
                           gpus, card, model, frozen) for n in lengths]
        name = Path(cfg.out).name if stage != "evaluate" else f"{Path(cfg.out).parent.name}/eval"
        costs[name] = [max(gb for gb, _ in found), *(hours for _, hours in found)]
        shapes[cfg.out] = model
    every = [name for name in costs if name.endswith("/eval")]
    groups = {**{name: [name] for name in costs if name not in every},
              f"{len(every)} evaluations": every, "R5 from end to end": R5, "all": costs}
    rows = []
    for title, names in groups.items():
        gb, *hours = zip(*(costs[name] for name in names))
        rows.append([title, f"{max(gb):.0f}", *(f"{sum(column):,.1f}" for column in hours)])
    head = [f"{setting}, computed for {gpus} {card.name}", "GB at most",
            *(f"hours, {n:,} tokens" if n else "hours" for n in lengths)]
    return evaluate.markdown(head, rows)

def print_step(args, s):
    """Print the parts of memory and time of one step. Raises UserError as `read_shape` does."""
    frozen = args.teacher or (args.model if s.stage == "grpo" else "none")
    check(args.teacher or s.stage not in ("warmup", "opd"), f"--stage {s.stage} needs a --teacher")
    shapes = read_shape(args.model), None if frozen == "none" else read_shape(frozen)
    s = s.divided(*shapes, H100)
    shared = f", {s.parts} GPUs share a copy while sampling" if s.parts > 1 else ""
    print(f"computed, not measured: {s.stage} on {s.gpus} GPU(s), {s.prompts} prompts x "
          f"{s.rollouts} responses of {s.max_new_tokens:,} tokens{shared}")
    for name, shape in zip((args.model, frozen), shapes):
        if shape:
            active = f", {shape.active / GB:.2f} B active" if shape.experts < 1 else ""
            print(f"{name}: {shape.params / GB:.2f} B parameters{active}")
    for part, size in step_bytes(s, *shapes).items():
        print(f"{part:>24}  {size / GB:8.1f} GB")
    for part, value in step_seconds(s, *shapes).items():
        print(f"{part:>24}  {value:8.0f} s")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name of the table, a folder or a hub name")
    parser.add_argument("--teacher", help="frozen model: the teacher, or of grpo the KL reference, "
                        "by default MODEL; none is without")
    parser.add_argument("--recipe", choices=RECIPES, help="memory and hours of `run_all.sh RECIPE`")
    for field in dataclasses.fields(Settings):
        kind = (dict(choices=STAGES) if field.name == "stage" else
                dict(action="store_true") if field.type is bool else dict(type=int))
        note = "as the stage's" if field.default is None else field.default
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=f"[default: {note}]", **kind)
    args = parser.parse_args(argv)
    try:
        if args.recipe:
            print(recipe_table(args.recipe, args.gpus))
        elif args.model:
            print_step(args, Settings(**{f.name: getattr(args, f.name)
                                         for f in dataclasses.fields(Settings)}))
        else:
            print(models_table())
    except UserError as error:
        sys.exit(f"error: {error}")

if __name__ == "__main__":
    main()
