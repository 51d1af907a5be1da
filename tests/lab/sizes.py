"""Memory per GPU and rough seconds of a training step, computed from a model's shape alone.

    python tests/lab/sizes.py                          # a table of five models (as in the README)
    python tests/lab/sizes.py Qwen3-8B --gpus 8        # grpo.py with the paper's settings
    python tests/lab/sizes.py Qwen/Qwen3-1.7B --stage opd --teacher ckpt/teacher_rl --gpus 1
    python tests/lab/sizes.py --recipe qwen3           # hours of the paper's whole recipe

Nothing is measured, and no weights are loaded. A MODEL is a name of that table, a folder or a hub
name. Bytes on one of n GPUs, for P parameters, of which P_in are in the L layers and P_out are
embedding, head and last norm:

    masters, AdamW           4 P / n and 8 P / n
    gradients                4 P / n, in the update
    frozen models            2 P / n, and for n > 1 their P_out gathered: 2 P_out more
    weights of the update    n = 1: bf16 copies, 2 P; else two layers in bf16 and P_out in fp32,
                             2 * 2 P_in / L + 4 P_out, and as much again for their gradients
    weights of the sampler   of the trained model: n = 1: bf16 copies, 2 P; else 2 P_in + 4 P_out;
                             of a frozen model: n = 1: nothing; else 2 P
    head and chunk           8 V D, the head in bf16 and its gradient in bf16 and fp32, and 6 blocks
                             of logits
    activations              tokens of a micro-batch (or of the longest row) times what L layers
                             keep; with --gradient-checkpointing times 4 L D and one layer. A layer
                             keeps 24 D + 14 (H + H_kv) d + 8 F
    keys and values          4 L H_kv d a token; rows * longest at the very most (what does not fit
                             waits)

evaluate.py loads the whole model on each GPU, like n = 1. Seconds, for responses that are all as
long as allowed: 2 P operations a token for a forward pass, 4 P for a backward pass (2 P more with
--gradient-checkpointing), and 4 L H d * length / 2 of attention as often. Sampling reads the
weights, and half of the keys and values of its rows, once a token. A micro-batch moves 8 P bytes
between GPUs. A GPU reaches 40 % of an H100's 989e12 operations and 3.35e12 bytes a second, and
sends 200e9 bytes a second to its neighbours, 25e9 across nodes of 8.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
import fkl_warmup
import grpo
import opd
from common import UserError, check, describe_lm

GB = 1e9
OPERATIONS, MEMORY, NODE, NETWORK = 0.4 * 989e12, 0.4 * 3.35e12, 200e9, 25e9  # a second
H100 = 0.95 * 80 * GB  # what can be used of it
STAGES = {"grpo": grpo.Config, "warmup": fkl_warmup.Config, "opd": opd.Config,
          "evaluate": evaluate.Config}

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

    @property
    def layer(self):
        """Parameters of a layer."""
        D, d = self.hidden, self.head_dim
        attention = 2 * D * d * (self.heads + self.kv_heads) + 2 * d * self.qk_norm
        return attention + 3 * D * self.ffn + 2 * D

    @property
    def outer(self):
        """Parameters of embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def params(self):
        return self.layers * self.layer + self.outer

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
}

def read_shape(name):
    """Shape of a model of the table, a folder or a hub name. Raises UserError if there is none."""
    if name in MODELS:
        return MODELS[name]
    describe_lm(name)
    c = AutoConfig.from_pretrained(name)
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Shape(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                 c.intermediate_size, c.vocab_size, c.tie_word_embeddings, dim,
                 "qwen3" in c.model_type)

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
    def longest(self):
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def share(self):
        """Rows of a step on the GPU that has most prompts."""
        return -(-self.prompts // self.gpus) * self.rollouts

    @property
    def rows_at_once(self):
        """Rows that a GPU decodes at once; the warmup's teacher samples for many steps at once."""
        return self.sample_rows if self.stage == "warmup" else min(self.share, self.sample_rows)

    def roles(self, model, frozen):
        """The Shapes (trained, frozen, the one that samples), None if there is none."""
        if self.stage == "evaluate":
            return None, model, model
        return model, frozen, frozen if self.stage == "warmup" else model

def step_bytes(s, model, frozen=None, chunk=256 << 20):
    """{part: bytes} on one GPU: what is always there, then the update's, then the sampler's."""
    trained, frozen, sampler = s.roles(model, frozen)
    n = s.gpus if trained else 1
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
    sampling = {"weights of the sampler": 2 * sampler.params * (many or samples)
                + 2 * sampler.outer * (many and samples),
                "keys and values": s.rows_at_once * s.longest * sampler.cache}
    total = sum(always.values())
    return {**always, **update, "in the update": (total + sum(update.values())) * bool(trained),
            **sampling, "while sampling": total + sum(sampling.values())}

def step_seconds(s, model, frozen=None):
    """{part: seconds} of a step in which every row is as long as allowed."""
    trained, frozen, sampler = s.roles(model, frozen)
    mine = s.prompts * s.rollouts / s.gpus  # rows of a step on one GPU
    live = s.max_prompt_tokens + s.max_new_tokens / 2  # tokens of a row, in the mean over time
    read = 2 * sampler.params + s.rows_at_once * live * sampler.cache
    parts = {"sampling": s.share / s.rows_at_once * s.max_new_tokens * read / MEMORY}

    def passes(shape, n):
        attention = 4 * shape.layers * shape.heads * shape.head_dim * s.longest / 2
        return n * (2 * shape.params + attention) * mine * s.longest / OPERATIONS

    if trained:
        wire = NODE if s.gpus <= 8 else NETWORK
        groups = max(1, mine * s.longest / max(s.micro_tokens, s.longest))
        parts["frozen models"] = passes(frozen, 1) if frozen else 0.0
        parts["update"] = passes(trained, 4 if s.gradient_checkpointing else 3)
        parts["between GPUs"] = groups * 8 * trained.params / wire if s.gpus > 1 else 0.0
    return {**parts, "a step": sum(parts.values())}

def models_table():
    """grpo.py with the paper's settings, --gradient-checkpointing and its KL reference."""
    rows = ["| model | GPUs | update, GB | sampling, GB | a row's cache, GB | fits 80 / 141 GB | "
            "a step, minutes |", "| --- | --: | --: | --: | --: | --- | --: |"]
    for name, shape in MODELS.items():
        for gpus in (1, 8, 16):
            s = Settings(gpus=gpus, gradient_checkpointing=True)
            size, seconds = step_bytes(s, shape, shape), step_seconds(s, shape, shape)["a step"]
            row = size["keys and values"] / s.rows_at_once
            sampling = size["while sampling"] - size["keys and values"]
            need = max(size["in the update"], sampling + row) / GB
            fits = " / ".join("yes" if need < 0.95 * card else "no" for card in (80, 141))
            rows.append(f"| {name} | {gpus} | {size['in the update'] / GB:.0f} | "
                        f"{sampling / GB:.0f} | {row / GB:.1f} | {fits} | {seconds / 60:.0f} |")
    return "\n".join(rows)

RECIPES = {"qwen3": ("Qwen3-8B", "Qwen3-1.7B")}  # teacher, student
PROBLEMS, EVALUATED = 17_400, 560  # DAPO-Math-17K; MATH-500, AIME 2024 and 2025
PROMPT = 200  # ours: tokens of a usual problem with its instruction

def recipe_hours(stage, gpus, length, model, frozen):
    """Hours of a whole stage on half of the problems (of evaluate: 16 samples of all its sets)."""
    s = Settings(stage, gpus, EVALUATED if stage == "evaluate" else None, max_prompt_tokens=PROMPT,
                 max_new_tokens=length, gradient_checkpointing=True)
    size, sampler = step_bytes(s, model, frozen), s.roles(model, frozen)[2]
    room = H100 - size["while sampling"] + size["keys and values"]
    s.sample_rows = min(s.sample_rows, int(room / (PROMPT + length / 2) / sampler.cache))
    check(s.sample_rows > 0, f"{gpus} GPUs of 80 GB are too few")
    steps = 1 if stage == "evaluate" else STAGES[stage].epochs * (PROBLEMS // 2 // s.prompts)
    return steps * step_seconds(s, model, frozen)["a step"] / 3600

def recipe_table(name, gpus, lengths=(1024, 4096, 16384)):
    """Hours of the paper's recipe by stage and response length, on H100s, and their total."""
    big, small = RECIPES[name]
    teacher, student = MODELS[big], MODELS[small]
    hours = {title: [recipe_hours(stage, gpus, length, model, frozen) for length in lengths]
             for title, stage, model, frozen in (
                 (f"1 GRPO on {big}", "grpo", teacher, teacher),
                 (f"2a warmup of {small}", "warmup", student, teacher),
                 (f"2b OPD into {small}", "opd", student, teacher),
                 (f"3 GRPO on {small}", "grpo", student, student),
                 (f"evaluation, {EVALUATED} problems x 16", "evaluate", student, None))}
    hours["total"] = [sum(column) for column in zip(*hours.values())]
    head = [f"hours on {gpus} H100, responses of", *(f"{n:,} tokens" for n in lengths)]
    return evaluate.markdown(head, [[title, *(f"{x:,.1f}" for x in row)]
                                    for title, row in hours.items()])

def print_step(args, s):
    """Print the parts of memory and time of one step. Raises UserError as `read_shape` does."""
    frozen = args.teacher or (args.model if s.stage == "grpo" else "none")
    check(args.teacher or s.stage not in ("warmup", "opd"), f"--stage {s.stage} needs a --teacher")
    shapes = read_shape(args.model), None if frozen == "none" else read_shape(frozen)
    print(f"computed, not measured: {s.stage} on {s.gpus} GPU(s), {s.prompts} prompts x "
          f"{s.rollouts} responses of {s.max_new_tokens:,} tokens")
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
    parser.add_argument("--recipe", choices=RECIPES, help="hours of the paper's whole recipe")
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
