"""The embedded world: small problems, a tokenizer and untrained models, for a recipe that runs in minutes.

A problem is a chain of registers: `6a-0b-8c-6` starts with the digit 6; register a subtracts 0, b then
subtracts 8, c then subtracts 6, all modulo 10, with the operations + - *. The answer is the tuple of all
registers, (6,8,2), so that guessing succeeds with probability 10^-k only. The careful solution is

    a6-0=6,b6-8=8,c8-6=2,\\boxed{(6,8,2)}

The corpus that base models are trained on mixes styles, so that a base model *can* be careful but mostly is not:
careful (all right), sloppy (the same form, each result wrong with probability 0.3, then carried on), direct
(the box at once, each digit wrong with probability 0.5), and drills of 8 right facts.

    python tests/world.py --out runs/world --seed 0

writes train.jsonl (256 labelled problems), valid.jsonl (200), test.jsonl (500), corpus.jsonl, and two folders with
random weights, init-teacher (335 k parameters) and init-student (85 k), that any tool can load. The problem sets
are drawn first and never occur in the corpus. Everything is a function of the seed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TOKENS = ["<pad>", "<eos>", "Q", "?", "=", ",", "(", ")", "}", "\\boxed{", *"abcd", *"+-*", *"0123456789"]
# The stage scripts append an instruction to each problem; this world's models have no tokens for it, so the
# template keeps the first line only.
TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content.split('\\n')[0] }}?"
            "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}")
SIZES = {  # hidden, heads, head size, MLP
    "teacher": (96, 4, 24, 256),
    "student": (48, 3, 16, 128),
}


def make_tokenizer():
    """One token per symbol, `\\boxed{` being one symbol; decoding gives the text back without spaces."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   chat_template=TEMPLATE)


def make_model(size, seed):
    """Untrained Qwen3ForCausalLM of 3 layers. The wide initialisation (0.1) is what lets it learn in minutes."""
    hidden, heads, head_dim, mlp = SIZES[size]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(TOKENS), hidden_size=hidden, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=head_dim, intermediate_size=mlp, tie_word_embeddings=True,
        initializer_range=0.1, max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model


def apply(op, x, y):
    return {"+": x + y, "-": x - y, "*": x * y}[op] % 10


def make_problem(rng, k):
    """(start, [(op, operand)] * k)"""
    return rng.randrange(10), tuple((rng.choice("+-*"), rng.randrange(10)) for _ in range(k))


def text(problem):
    start, steps = problem
    return f"{start}" + "".join(f"{r}{op}{y}" for r, (op, y) in zip("abcd", steps))


def box(values):
    return f"({','.join(map(str, values))})"


def chain(problem, rng=None, wrong=0.0):
    """Worked lines and register values; each result is wrong with probability `wrong`, then carried on."""
    x, lines, values = problem[0], [], []
    for register, (op, y) in zip("abcd", problem[1]):
        z = apply(op, x, y)
        if wrong and rng.random() < wrong:
            z = (z + rng.randrange(1, 10)) % 10
        lines.append(f"{register}{x}{op}{y}={z},")
        x = z
        values.append(z)
    return "".join(lines), values


def make_document(rng, banned, drill=0.17, careful=0.2, sloppy=0.2):
    """One corpus document {"problem", "response"}; its problem is in no problem set."""
    if rng.random() < drill:
        facts = ((rng.randrange(10), rng.choice("+-*"), rng.randrange(10)) for _ in range(8))
        return {"problem": "", "response": "".join(f"{x}{op}{y}={apply(op, x, y)}," for x, op, y in facts)}
    problem = make_problem(rng, rng.randint(1, 4))
    while text(problem) in banned:
        problem = make_problem(rng, len(problem[1]))
    style = rng.random()
    if style < careful + sloppy:
        lines, values = chain(problem, rng, 0.0 if style < careful else 0.3)
    else:
        lines, values = "", chain(problem)[1]
        values = [(v + rng.randrange(1, 10)) % 10 if rng.random() < 0.5 else v for v in values]
    return {"problem": text(problem), "response": f"{lines}\\boxed{{{box(values)}}}"}


def make_set(rng, n, taken):
    """n new problems with k = 2, 2, 3, 3, 4 in turn, none of them in `taken`, to which they are added."""
    rows = []
    while len(rows) < n:
        problem = make_problem(rng, (2, 2, 3, 3, 4)[len(rows) % 5])
        if text(problem) not in taken:
            taken.add(text(problem))
            rows.append({"problem": text(problem), "answer": box(chain(problem)[1])})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(out, seed=0, documents=25600, train=256, valid=200, test=500):
    """Write the world's files and model folders to `out`; returns it as a Path. Done already: nothing."""
    out = Path(out)
    if (out / "world.json").exists():
        return out
    rng, taken = random.Random(seed), set()
    out.mkdir(parents=True, exist_ok=True)
    for name, n in (("test", test), ("valid", valid), ("train", train)):
        write_lines(out / f"{name}.jsonl", make_set(rng, n, taken))
    write_lines(out / "corpus.jsonl", (make_document(rng, taken) for _ in range(documents)))
    for size in SIZES:
        make_tokenizer().save_pretrained(out / f"init-{size}")
        make_model(size, seed).save_pretrained(out / f"init-{size}")
    (out / "world.json").write_text(json.dumps({"seed": seed, "documents": documents}) + "\n")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/world", help="folder to write [default: runs/world]")
    parser.add_argument("--seed", type=int, default=0, help="of problems, corpus and weights [default: 0]")
    args = parser.parse_args()
    sys.exit(0 if build(args.out, args.seed) else 1)
