"""Word problems in English, for a real model on a CPU.

    Rosa has 3 boxes of 6 shells, gives 7 to Ali, finds 9 more. How many shells has Rosa now?

A problem is a story of two operations + - * / (each third one of three) on whole numbers up to 20;
its solution has a line for each, `3*6=18`, and at the end the box, `\\boxed{20}`.

    python tests/words.py --out runs/words --model HuggingFaceTB/SmolLM2-135M-Instruct

writes train.jsonl (256 labelled problems), valid.jsonl (100), test.jsonl (200), and corpus.jsonl
(1,280 worked examples: problem, response, answer). No two problems are alike. Then half-student:
the model without the middle half of its layers (words.json names those that stay). Any tool loads
it, but it writes no sense before it is trained. Everything is a function of the seed and the model.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()

NAMES = "Ali Ben Clara Dina Emil Farah Greta Hugo Ines Jonas Kofi Lena Mona Nils Olga Rosa".split()
OBJECTS = "apples books buttons cards coins eggs flowers marbles pencils shells stamps toys".split()
SIZES = {"test": 200, "valid": 100, "train": 256, "corpus": 1280}  # of the sets
LARGEST = 20  # number of a story
STARTS = ("{a} has {n} {o}", "{a} owns {n} {o}", "{a} starts with {n} {o}", "{a} takes {n} {o}")
PACKS = ("{a} has {x} boxes of {y} {o}", "{a} buys {x} bags of {y} {o}",
         "{a} gets {y} {o} from each of {x} friends", "{a} takes {y} {o} on each of {x} days")
EVENTS = {
    "+": ("buys {y} more", "gets {y} from {b}", "finds {y} more", "wins {y}"),
    "-": ("gives {y} to {b}", "sells {y}", "loses {y}", "lends {b} {y}"),
    "*": ("makes them {y} times as many", "works until there are {y} times as many"),
    "/": ("keeps one of {y} equal piles", "keeps one of {y} equal shares"),
}
ENDS = ("How many {o} has {a} now?", "How many {o} are left?", "How many {o} has {a} in the end?")

def compute(op, x, y):
    return {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[op]

def draw_operand(rng, op, x):
    """A number y for which x op y is a whole number from 1 to LARGEST, or None if there is none."""
    if op == "+":
        return rng.randint(3, LARGEST - x) if x <= LARGEST - 3 else None
    if op == "-":
        return rng.randint(2, x - 1) if x > 5 else None
    fits = [y for y in range(2, 6) if (x % y == 0 if op == "/" else x * y <= LARGEST)]
    return rng.choice(fits) if fits and x > 5 else None

def make_problem(rng, k):
    """The row of a story of k operations."""
    (a, b), o = rng.sample(NAMES, 2), rng.choice(OBJECTS)
    x, lines = rng.randint(6, LARGEST), []
    story = [rng.choice(STARTS).format(a=a, n=x, o=o)]
    if rng.random() < 0.4:  # packs: the first operation is x * y
        x = rng.randint(2, 9)
        y = rng.randint(2, LARGEST // x)
        story, lines = [rng.choice(PACKS).format(a=a, x=x, y=y, o=o)], [f"{x}*{y}={x * y}"]
        x *= y
    while len(lines) < k:
        op = rng.choice("++--*/")
        if y := draw_operand(rng, op, x):
            story.append(rng.choice(EVENTS[op]).format(b=b, y=y))
            lines.append(f"{x}{op}{y}={(x := compute(op, x, y))}")
    return {"problem": ", ".join(story) + ". " + rng.choice(ENDS).format(a=a, o=o),
            "response": "\n".join([*lines, f"\\boxed{{{x}}}"]), "answer": str(x)}

def make_set(rng, n, taken):
    """n new rows, none of their problems in `taken`, to which they are added."""
    rows = []
    while len(rows) < n:
        row = make_problem(rng, 2 + (len(rows) % 3 == 2))
        if row["problem"] not in taken:
            taken.add(row["problem"])
            rows.append(row)
    return rows

def halve(model, out):
    """Write a model without the middle half of its layers to `out`; returns which it has kept."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config, n = whole.config, whole.config.num_hidden_layers
    kept = [*range(n // 4), *range(n // 4 + n - n // 2, n)]
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in kept)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    whole.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return kept

def build(out, seed=0, model="", **sizes):
    """Write the problems, and the student if a model is named, to the folder `out`."""
    out, rng, taken = Path(out), random.Random(seed), set()
    out.mkdir(parents=True, exist_ok=True)
    for name, n in (SIZES | sizes).items():
        rows = make_set(rng, n, taken)
        if name != "corpus":
            rows = [{k: row[k] for k in ("problem", "answer")} for row in rows]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = halve(model, out / "half-student") if model else []
    (out / "words.json").write_text(json.dumps({"seed": seed, "layers": kept}) + "\n")
    return out

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/words", help="folder to write [default: runs/words]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [default: 0]")
    parser.add_argument("--model", default="", help="folder or hub name of a model to halve")
    args = parser.parse_args()
    print(f"the word problems of seed {args.seed} are in {build(args.out, args.seed, args.model)}")
