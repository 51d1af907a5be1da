"""The embedded world: small problems, a tokenizer and untrained models, for a recipe of minutes.

A problem is a chain of registers. `6a-0b-8c-6` starts with the digit 6; register a subtracts 0, b
then subtracts 8, c then subtracts 6, all modulo 10, with the operations + - *. The answer is the
tuple of all registers, (6,8,2), so that guessing succeeds with probability 10^-k. Careful work is

    a6-0=6,b6-8=8,c8-6=2,\\boxed{(6,8,2)}

Base models are trained on documents of mixed style: careful (all right), sloppy (the same form,
each result wrong with probability 0.3, then carried on), direct (the box at once, each digit wrong
with probability 0.5), and drills of 8 facts. So a base model can be careful, but mostly is not. The
student, moreover, has learned from a book with misprints: of the 300 facts (`3*7=1`) 35 % have a
misprint, which stands in the place of the right result 8 times out of 10. It must unlearn them one
by one, and a reward at the end of a chain says little about which one was wrong.

    python tests/world.py --out runs/world --seed 0

writes train.jsonl (128 labelled problems), valid.jsonl (200) and test.jsonl (500), all with chains
of 2, 2, 3, 3, 4 steps in turn, and hard.jsonl (200, all of 4 steps); each problem has its careful
work as `solution`, which no route reads. For the question how many labels it takes, pool.jsonl goes
on where train.jsonl ends, to 512. Then corpus-teacher.jsonl and corpus-student.jsonl and two
folders with random weights, init-teacher (335 k parameters) and init-student (85 k), that any tool
can load. All problem sets are drawn before the corpora, which leave their problems out. Everything
is a function of the seed.

--distance D (0 to 1) sets the base student's habits apart from its teacher's: it writes a share
D of its careful and sloppy documents in a form of its own, `(a6-0=6)(b6-8=8)(c8-6=2)` before the
box. All else is as at 0: problems, documents, facts, misprints, mistakes, the teacher's corpus.

--scale large is the same for a GPU: 512 labelled problems of 4 to 8 steps, hard ones of 8 steps, a
teacher of 26 M parameters and a student of 5 M.
"""

import argparse
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

transformers.utils.logging.disable_progress_bar()

REGISTERS = "abcdefgh"  # a step of a chain has one

@dataclass
class Scale:
    steps: tuple  # of the problems, in turn; the last is that of the hard ones
    train: int  # labelled problems
    documents: int  # of each corpus
    init: float  # standard deviation of random weights: wide, so that little training is enough
    sizes: dict  # hidden, layers, heads, head size, MLP

SCALES = {
    "small": Scale((2, 2, 3, 3, 4), 128, 38_400, 0.1, {
        "teacher": (96, 3, 4, 24, 256), "student": (48, 3, 3, 16, 128)}),
    "large": Scale((4, 5, 6, 7, 8), 512, 512_000, 0.04, {
        "teacher": (512, 8, 8, 64, 1408), "student": (256, 6, 4, 64, 704)}),
}
MISPRINTED = {"teacher": 0.0, "student": 0.35}  # share of the facts
TEACHERS_FORM, OWN_FORM = "{register}{fact},", "({register}{fact})"  # of a worked step
# The stage scripts append an instruction to each problem; these models have no tokens for it, so
# the template keeps the first line only.
TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content.split('\\n')[0] }}?"
            "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}")

def make_tokenizer(registers):
    """One token per symbol, `\\boxed{` being one; decoding gives the text back without spaces."""
    tokens = ["<pad>", "<eos>", "<unk>", "Q", "?", "=", ",", "(", ")", "}", "\\boxed{", *registers,
              *"+-*", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE,
                                   pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

def make_model(size, init, vocabulary, seed):
    """Untrained Qwen3ForCausalLM."""
    hidden, layers, heads, head_dim, mlp = size
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim,
        intermediate_size=mlp, initializer_range=init, tie_word_embeddings=True,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model

def compute(op, x, y):
    return {"+": x + y, "-": x - y, "*": x * y}[op] % 10

class Book:
    """Facts as a model's corpus has them: a share of the 300 has a misprint, met 8 times in 10."""

    def __init__(self, rng, share, stick=0.8):
        self.rng, self.stick, self.misprints = rng, stick, {}
        for op in "+-*":
            for x in range(10):
                for y in range(10):
                    if rng.random() < share:
                        wrong = (compute(op, x, y) + rng.randrange(1, 10)) % 10
                        self.misprints[op, x, y] = wrong

    def __call__(self, op, x, y):
        if (op, x, y) in self.misprints and self.rng.random() < self.stick:
            return self.misprints[op, x, y]
        return compute(op, x, y)

def make_problem(rng, k):
    """(start, [(operation, operand)] * k)"""
    return rng.randrange(10), tuple((rng.choice("+-*"), rng.randrange(10)) for _ in range(k))

def write(problem):
    start, steps = problem
    return f"{start}" + "".join(f"{r}{op}{y}" for r, (op, y) in zip(REGISTERS, steps))

def write_box(values):
    return f"({','.join(map(str, values))})"

def work(problem, fact=compute, rng=None, wrong=0.0, form=TEACHERS_FORM):
    """Worked lines and register values; a result is spoilt with probability `wrong`, then used."""
    x, lines, values = problem[0], "", []
    for register, (op, y) in zip(REGISTERS, problem[1]):
        z = fact(op, x, y)
        if wrong and rng.random() < wrong:
            z = (z + rng.randrange(1, 10)) % 10
        lines += form.format(register=register, fact=f"{x}{op}{y}={z}")
        values.append(z)
        x = z
    return lines, values

def make_document(rng, banned, fact, longest, form=TEACHERS_FORM, drill=0.17, careful=0.2,
                  sloppy=0.2):
    """One document of a corpus, {"problem", "response"}; its problem is in no problem set."""
    if rng.random() < drill:
        drawn = ((rng.choice("+-*"), rng.randrange(10), rng.randrange(10)) for _ in range(8))
        lines = "".join(f"{x}{op}{y}={fact(op, x, y)}," for op, x, y in drawn)
        return {"problem": "", "response": lines}
    problem = make_problem(rng, rng.randint(1, longest))
    while write(problem) in banned:
        problem = make_problem(rng, len(problem[1]))
    style = rng.random()
    if style < careful + sloppy:
        lines, values = work(problem, fact, rng, 0.0 if style < careful else 0.3, form)
    else:
        lines, values = "", work(problem, fact)[1]
        values = [(v + rng.randrange(1, 10)) % 10 if rng.random() < 0.5 else v for v in values]
    return {"problem": write(problem), "response": f"{lines}\\boxed{{{write_box(values)}}}"}

def make_set(rng, n, taken, steps):
    """n new problems of so many steps in turn, none of them in `taken`, to which they are added."""
    rows = []
    while len(rows) < n:
        problem = make_problem(rng, steps[len(rows) % len(steps)])
        if write(problem) not in taken:
            taken.add(write(problem))
            lines, values = work(problem)
            rows.append({"problem": write(problem), "answer": (box := write_box(values)),
                         "solution": f"{lines}\\boxed{{{box}}}"})
    return rows

def build(out, seed=0, scale="small", distance=0.0, *, valid=200, test=500, hard=200, **changes):
    """Write the world to the folder `out`, unless it is there already; returns it as a Path."""
    if not 0 <= distance <= 1:
        raise SystemExit(f"error: --distance {distance} is not in [0, 1]")
    out, rng, taken = Path(out), random.Random(seed), set()
    forms = random.Random(f"forms {seed}")  # of its own: nothing else depends on the distance
    record = {"seed": seed} | ({"distance": distance} if distance else {})
    record |= {"scale": scale} if scale != "small" else {}
    scale = replace(SCALES[scale], **changes)
    if (out / "world.json").exists():
        found = json.loads((out / "world.json").read_text())
        if found != record:
            raise SystemExit(f"error: {out} holds the world of {found}, not of {record}")
        return out
    out.mkdir(parents=True, exist_ok=True)
    files = {"test": make_set(rng, test, taken, scale.steps),
             "hard": make_set(rng, hard, taken, scale.steps[-1:]),
             "valid": make_set(rng, valid, taken, scale.steps)}
    files["pool"] = make_set(rng, 4 * scale.train, taken, scale.steps)
    files["train"] = files["pool"][: scale.train]
    tokenizer = make_tokenizer(REGISTERS[: scale.steps[-1]])
    for name, size in scale.sizes.items():
        book = Book(rng, MISPRINTED[name])
        own = distance if name == "student" else 0.0
        files[f"corpus-{name}"] = [
            make_document(rng, taken, book, scale.steps[-1],
                          OWN_FORM if forms.random() < own else TEACHERS_FORM)
            for _ in range(scale.documents)]
        tokenizer.save_pretrained(out / f"init-{name}")
        make_model(size, scale.init, len(tokenizer), seed).save_pretrained(out / f"init-{name}")
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "world.json").write_text(json.dumps(record) + "\n")  # last: it is complete
    return out

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/world", help="folder to write [default: runs/world]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [default: 0]")
    parser.add_argument("--scale", default="small", choices=SCALES,
                        help="of models and problems [default: small]")
    parser.add_argument("--distance", type=float, default=0.0,
                        help="of the student's habits from the teacher's, 0 to 1 [default: 0]")
    args = parser.parse_args()
    out = build(args.out, args.seed, args.scale, args.distance)
    print(f"the world of seed {args.seed} is in {out}")
