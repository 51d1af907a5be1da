"""Exercises: bugs that this field really has, each planted alone, to be found by its figures.

    python tests/lab/exercises.py list                 what each of them does to the figures
    python tests/lab/exercises.py plant 3 runs/three   a copy of the project with bug 3 (or: random)
    python tests/lab/exercises.py answer 3             the edit, why it is wrong, a test that fails

No run stops at them: the curves look like learning, or like bad luck. `plant` prints the command
that shows the fault. Run it here and in the copy, and compare metrics.jsonl (in both first:
export W=/path/to/runs/world, which `bash run_all.sh` makes).
"""

import difflib
import random
import shutil
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = "--data $W/train.jsonl --exclude none --max-new-tokens 48"
OPD = (f"opd.py --teacher $W/teacher-rl --student $W/bridge-warmup {DATA} --prompts 16 "
       "--rollouts 4 --lr 1e-3")
GRPO = f"grpo.py --model $W/base-student {DATA} --prompts 32 --mini-batch 32 --lr 5e-4"
GRADIENT, EQUATION = "tests/test_invariance.py::test_", "tests/test_equations.py::test_"

# symptom: what the figures do; measured: clean → planted; line: the command that shows it; edit:
# `old`, which is in `file` exactly once, becomes `new`; test: pytest's name of one that fails.
Exercise = namedtuple("Exercise", "symptom measured line file old new why test")
EXERCISES = [
    Exercise(
        "OPD's `kl` looks better from the first step on, but `entropy` hardly falls",
        "`kl` at step 0: 0.055 → 0.035; `entropy`, from 0.055, last 10 steps: 0.022 → 0.035",
        f"{OPD} --steps 40",
        "opd.py", "kl = reverse_kl(logp, logq)", "kl = reverse_kl(logq, logp)",
        "The KL points the wrong way: KL(teacher || student), in the student's states.",
        GRADIENT + "losses_equal_the_plain_version_with_all_logits[1.0]"),
    Exercise(
        "OPD's `grad_norm` depends on --micro-tokens, which should cost memory only",
        "--micro-tokens 256: 0.22 → 2.57; 1024: 0.22 → 0.65; 4096: 0.22 → 0.22",
        f"{OPD} --steps 1 --micro-tokens 256",
        "opd.py", "loss.sum() / n_tokens, (kl", "loss.sum() / len(tokens), (kl",
        "Each micro-batch is divided by its own tokens: a sum of means, not the update's mean.",
        GRADIENT + "memory_knobs_padding_and_row_order_never_move_a_gradient[opd-full]"),
    Exercise(
        "OPD's `kl` rises where it should fall, and `entropy` with it",
        "`kl`, from 0.055, last 10 steps: 0.011 → 1.7; `entropy`, from 0.055: 0.022 → 0.257",
        f"{OPD} --steps 40",
        "opd.py", "loss = kl if", "loss = kl.detach() * pick(logp, y) if",
        "The KL over the vocabulary is one number for all tokens of a state. As an advantage it "
        "has no expected gradient, only noise; it must be differentiated.",
        GRADIENT + "losses_equal_the_plain_version_with_all_logits[1.0]"),
    Exercise(
        "GRPO's groups differ in reward, yet `grad_norm` is 0 and nothing is learnt",
        "`grad_norm` at step 0: 0.14 → exactly 0", f"{GRPO} --kl-coef 0 --steps 5",
        "grpo.py", "old = logp.detach() if old is None", "old = logp if old is None",
        "pi_old must be a constant: the gradient of pi / pi is 0.",
        GRADIENT + "grpo_loss_equals_the_plain_version[k2-True]"),
    Exercise(
        "GRPO's `grad_norm` is not 0 in steps whose `zero_variance` is 1",
        "such steps with `grad_norm` > 0: 0 of 10 → 4 of 11, up to 0.35",
        f"grpo.py --model $W/bridge-warmup {DATA} --prompts 4 --mini-batch 4 --rollouts 2 "
        "--kl-coef 0 --lr 1e-4 --steps 40",
        "grpo.py", "- rewards.mean(-1, keepdim=True)\n    return centred / (rewards.std(-1, keepdim"
        "=True)", "- rewards.mean()\n    return centred / (rewards.std()",
        "Mean and std are the batch's: all of an easy prompt is praised, all of a hard one blamed.",
        EQUATION + "advantages_see_their_own_group_only_and_a_constant_group_is_exactly_zero"),
    Exercise(
        "GRPO with --temperature 0.7 ends at its first step; with 1 nothing is wrong",
        "`sampler_gap`: 1e-7 → 0.019, an error", f"{GRPO} --kl-coef 0 --temperature 0.7 --steps 5",
        "grpo.py", "policy, hidden, cfg.temperature", "policy, hidden, 1.0",
        "The sampler draws from softmax(logits / T), the loss differentiates softmax(logits).",
        GRADIENT + "grpo_loss_equals_the_plain_version[k2-True]"),
    Exercise(
        "GRPO with several updates a step and a KL ends at its second step, without a KL it does "
        "not",
        "step 1: `sampler_gap` 1e-7 → 0.021, an error; `k3_ref` 0.0039 → 0.0003",
        f"{GRPO} --mini-batch 8 --kl-coef 0.1 --steps 10",
        "grpo.py", "old=per_token(old), ref=per_token(ref)",
        "old=per_token(ref), ref=per_token(old)",
        "The ratio is to the reference and the KL to pi_old: one policy in the first step only.",
        GRADIENT + "grpo_loss_equals_the_plain_version[k2-False]"),
    Exercise(
        "GRPO's `reward` starts far below the model's accuracy, and stays there",
        "step 0: 0.133 → 0.004; step 4: 0.156 → 0", f"{GRPO} --kl-coef 0 --steps 5",
        "grpo.py", "(text, answers[i // k])", "(text, answers[i % len(answers)])",
        "Responses come prompt by prompt, these answers round by round (`repeat` in place of "
        "`repeat_interleave`): most are compared with another problem's answer.",
        "tests/test_reward_density.py::"
        "test_each_response_is_graded_by_the_answer_of_its_own_prompt"),
    Exercise(
        "GRPO's `zero_variance` is 1 and `grad_norm` 0, whatever the model and the problems",
        "`zero_variance` at step 0: 0.50 → 1", f"{GRPO} --kl-coef 0 --steps 5",
        "common.py", "(*seed, *p, j)", "(*seed, *p)",
        "All rollouts of a prompt use the same random numbers: one response, K times.",
        "tests/test_sampler.py::test_rollouts_do_not_depend_on_their_neighbours[llama]"),
    Exercise(
        "a base model's `nll` looks fine, but in the next stage nothing it writes ends",
        "`nll`, last 10 steps: 1.05 → 1.10; opd.py from it (as in 1, --student ckpt/10), step 0: "
        "`truncated` 0.05 → 1",
        "fkl_warmup.py --targets data --student $W/init-student --data $W/corpus-student.jsonl "
        "--prompts 64 --lr 6e-3 --warmup-steps 50 --lr-schedule linear --steps 100",
        "fkl_warmup.py", "tokens + [end], [], True", "tokens, [], True",
        "The stop token is left out of the loss: nothing teaches the model to end.",
        "tests/test_data.py::test_sft_examples_end_with_eos_and_keep_the_text"),
    Exercise(
        "GRPO's `k3_ref` is many times too large; every other figure is unchanged",
        "step 9: 0.075 → 123; largest of the 10 steps: 0.089 → 391",
        f"{GRPO} --mini-batch 8 --temperature 0.5 --steps 10",
        "grpo.py", "log_ratio = logp_ref - logp", "log_ratio = logp - logp_ref",
        "k3 needs ref / pi; only then is its mean over pi's samples KL(pi || ref). k2, a square, "
        "does not notice; with --kl-loss k3 the loss would.",
        EQUATION + "kl_estimators_descend_what_they_say"),
]

def planted(exercise):
    """The text of its file with the bug in it; ValueError when the edit no longer fits."""
    text = (ROOT / exercise.file).read_text()
    if text.count(exercise.old) != 1:
        raise ValueError(f"stale exercise: {exercise.file} has {text.count(exercise.old)} times "
                         f"{exercise.old!r}")
    return text.replace(exercise.old, exercise.new)

def plant(exercise, folder):
    """A copy of the project with the bug in it, and without the exercises, which would tell."""
    for place in (ROOT, ROOT / "tests", ROOT / "tests" / "lab"):
        (folder / place.relative_to(ROOT)).mkdir(parents=True, exist_ok=True)
        for path in place.iterdir():
            if path.suffix in (".py", ".sh", ".md", ".txt") and "exercises" not in path.name:
                shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / exercise.file).write_text(planted(exercise))

def answer(exercise):
    texts = [text.splitlines() for text in ((ROOT / exercise.file).read_text(), planted(exercise))]
    diff = difflib.unified_diff(*texts, exercise.file, exercise.file, n=1, lineterm="")
    return "\n".join([*diff, "", exercise.why, f"caught by {exercise.test}"])

def main(command="", number="", folder="", *more):
    symptoms = [f"{i}. {e.symptom}\n   {e.measured}\n   python {e.line} --out ckpt/{i}\n"
                for i, e in enumerate(EXERCISES, 1)]
    if command == "list":
        return "\n".join(symptoms)
    numbers = {str(i + 1): i for i in range(len(EXERCISES))}
    i = random.randrange(len(EXERCISES)) if number == "random" else numbers.get(number)
    if more or (command, bool(folder)) not in (("plant", True), ("answer", False)) or i is None:
        sys.exit(__doc__)
    if command == "answer":
        return f"{symptoms[i]}\n{answer(EXERCISES[i])}"
    if Path(folder).is_file() or list(Path(folder).glob("*")):
        sys.exit(f"error: {folder} is not an empty folder")
    plant(EXERCISES[i], Path(folder))
    return f"planted in {folder}; run here and there:\n   python {EXERCISES[i].line} --out ckpt/run"

if __name__ == "__main__":
    print(main(*sys.argv[1:]))
