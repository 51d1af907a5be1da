"""Memory per GPU and rough seconds a step, from a model's shape alone: what --dry-run prints.

All of it is arithmetic; nothing is loaded or measured. Bytes, for P parameters, of which P_in are
in the layers and P_out are embedding, head and last norm, on n GPUs:

    masters, AdamW           4 P / n and 8 P / n; with --cpu-offload none
    gradients                4 P / n, in the update; with --cpu-offload none
    frozen models            2 P / n each, and for n > 1 their P_out gathered: 2 P_out
    weights of the update    n = 1: bf16 copies, 2 P; else two layers, and P_out in fp32: 2 * 2 P_in
                             / L + 4 P_out, and as much again for their gradients
    weights of the sampler   n = 1: bf16 copies, 2 P; else a copy of 2 P_in + 4 P_out (of a frozen
                             model nothing, or 2 P)
    head and chunk           8 V D: head in bf16, its gradient in bf16 and fp32; 6 blocks of logits
    activations              tokens of a micro-batch (or of the longest row) times: with
                             --gradient-checkpointing 4 L D and one layer, else L layers; a layer
                             keeps 24 D + 14 (H + H_kv) d + 8 F
    keys and values          4 L H_kv d a token; rows * longest at the very most (the sampler takes
                             fewer rows at once where they do not fit)

Seconds, for responses that are all as long as --max-new-tokens: 2 P operations a token for a
forward pass, 4 for a backward (2 more if recomputed), 4 L H d * length / 2 of attention as often;
sampling reads weights, and half of the keys and values of its rows, once a token; a micro-batch
moves 8 P bytes between the GPUs, of a node or of several. A GPU reaches 40 % of an H100's 989e12
operations and of 3.35e12 bytes a second, and 200e9 bytes to its neighbours, 25e9 across nodes of 8.

    python grpo.py --model Qwen/Qwen3-8B --gradient-checkpointing --dry-run 8
    python sizes.py                # the table of the README
"""

from dataclasses import dataclass
from types import SimpleNamespace

from transformers import AutoConfig

from common import describe_lm, explained

GB = 1e9
OPERATIONS, MEMORY, NODE, NETWORK = 0.4 * 989e12, 0.4 * 3.35e12, 200e9, 25e9  # a second


@dataclass
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
    "Qwen3-1.7B": Shape(2048, 28, 16, 8, 6144, 151936, True, qk_norm=True),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 12288, 151936, False, qk_norm=True),
    "Qwen3-14B": Shape(5120, 40, 40, 8, 17408, 151936, False, qk_norm=True),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256, False),
    "Llama-3.3-70B": Shape(8192, 80, 64, 8, 28672, 128256, False),
}


def read_shape(name):
    """Shape of a model folder or hub name; its config is read. Raises as `describe_lm` does."""
    describe_lm(name)
    with explained(name):
        c = AutoConfig.from_pretrained(name)
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Shape(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                 c.intermediate_size, c.vocab_size, c.tie_word_embeddings, dim,
                 "qwen3" in c.model_type)


def memory(trained, frozen, sampler, *, gpus, rows, longest, micro_tokens, checkpointing,
           cpu_offload=False, chunk=256 << 20):
    """{part: bytes} on one of `gpus` GPUs; trained: a Shape or None, frozen: Shapes.

    sampler: that one of them which samples. rows: that one GPU decodes at once; longest: tokens of
    prompt and response. The parts up to "frozen models" are always there, then come those of the
    update, then those of sampling.
    """
    n, many, t = gpus, gpus > 1, trained
    tokens, on_gpu = max(micro_tokens, longest), 0 if cpu_offload else 1
    copy = 2 * sampler.params + 2 * sampler.outer * many
    if sampler is not trained:
        copy = 2 * sampler.params * many
    if not trained:  # every process evaluates with a model of its own
        n, copy, many = 1, 0, False
    parts = {"masters": 4 * t.params / n * on_gpu if t else 0,
             "AdamW": 8 * t.params / n * on_gpu if t else 0,
             "frozen models": sum(2 * f.params / n + 2 * f.outer * many for f in frozen)}
    update = {}
    if t:
        gathered = 2 * (4 * t.layer + 4 * t.outer) if many else 2 * t.params
        kept = 4 * t.layers * t.hidden + t.activation
        update = {"gradients": 4 * t.params / n * on_gpu, "weights of the update": gathered,
                  "head and chunk": 8 * t.vocab * t.hidden + 6 * chunk,
                  "activations": tokens * (kept if checkpointing else t.layers * t.activation)}
    sampling = {"weights of the sampler": copy, "keys and values": rows * longest * sampler.cache}
    total = sum(parts.values())
    return {**parts, **update, "in the update": (total + sum(update.values())) * bool(t),
            **sampling, "while sampling": total + sum(sampling.values())}


def seconds(trained, frozen, sampler, *, gpus, rows, share, prompt, response, micro_tokens,
            checkpointing, sample_rows):
    """{part: seconds} of a step of `rows` rows in all, each of prompt + response tokens; share:
    rows that the process with most prompts samples."""
    length, mine, at_once = prompt + response, rows / gpus, min(share, sample_rows)
    read = 2 * sampler.params + at_once * (prompt + response / 2) * sampler.cache
    found = {"sampling": -(-share // at_once) * response * read / MEMORY}

    def passes(model, n):
        per_token = 2 * model.params + 4 * model.layers * model.heads * model.head_dim * length / 2
        return n * per_token * mine * length / OPERATIONS

    if trained:
        found["frozen models"] = sum(passes(model, 1) for model in frozen)
        found["update"] = passes(trained, 4 if checkpointing else 3)
        groups = max(1, mine * length / max(micro_tokens, length))
        wire = NODE if gpus <= 8 else NETWORK
        found["between GPUs"] = groups * 8 * trained.params / wire if gpus > 1 else 0.0
    return {**found, "a step": sum(found.values())}


def sizes(cfg, trained, frozen, sampler):
    """Memory and seconds for the settings of a stage, or of evaluate.py, on cfg.dry_run GPUs."""
    k = getattr(cfg, "rollouts", 0) or cfg.samples
    prompts = getattr(cfg, "prompts", 0) or max(1, cfg.sample_rows // k) * cfg.dry_run
    prompt = getattr(cfg, "max_prompt_tokens", 2048)
    share = -(-prompts // cfg.dry_run) * k  # rows of the process that has most
    both = dict(gpus=cfg.dry_run, micro_tokens=getattr(cfg, "micro_tokens", 0) or 32768,
                checkpointing=getattr(cfg, "gradient_checkpointing", False))
    return (memory(trained, frozen, sampler, **both, rows=min(cfg.sample_rows, share),
                   longest=prompt + cfg.max_new_tokens,
                   cpu_offload=getattr(cfg, "cpu_offload", False)),
            seconds(trained, frozen, sampler, **both, rows=prompts * k, share=share, prompt=prompt,
                    response=cfg.max_new_tokens, sample_rows=cfg.sample_rows))


def dry_run(cfg, trained, frozen, sampler=None):
    """Print the sizes; trained: a model's name or "", frozen: names; sampler: a frozen model's
    name, if it samples and not the trained one. Raises UserError as `read_shape` does."""
    shapes = {name: read_shape(name) for name in frozen}
    train = read_shape(trained) if trained else None
    found, times = sizes(cfg, train, list(shapes.values()), shapes[sampler] if sampler else train)
    print(f"computed, not measured: {cfg.dry_run} GPU(s), bf16 compute, responses as long as they "
          "may be")
    for name, size in found.items():
        print(f"{name:>24}  {size / GB:8.1f} GB")
    for name, value in times.items():
        print(f"{name:>24}  {value:8.0f} s")


def readme_table():
    """grpo.py with the paper's settings and --gradient-checkpointing, its KL reference included."""
    cfg = SimpleNamespace(rollouts=8, prompts=8, sample_rows=256, max_prompt_tokens=3072,
                          max_new_tokens=16384, gradient_checkpointing=True)
    rows = ["| model | GPUs | update, GB | sampling, GB | a row's cache, GB | fits 80 / 141 GB | "
            "a step, minutes |", "| --- | --: | --: | --: | --: | --- | --: |"]
    for name, shape in MODELS.items():
        for cfg.dry_run in (1, 8, 16):
            found, times = sizes(cfg, shape, [shape], shape)
            row = found["keys and values"] / min(64, -(-8 // cfg.dry_run) * 8)
            sampling = found["while sampling"] - found["keys and values"]
            need = max(found["in the update"], sampling + row) / GB
            fits = " / ".join("yes" if need < 0.95 * size else "no" for size in (80, 141))
            rows.append(f"| {name} | {cfg.dry_run} | {found['in the update'] / GB:.0f} | "
                        f"{sampling / GB:.0f} | {row / GB:.1f} | {fits} | "
                        f"{times['a step'] / 60:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(readme_table())
