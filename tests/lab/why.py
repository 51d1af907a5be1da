"""Why the recipe works, measured on the models of a finished run_all.sh: three tables, and pictures
of them where matplotlib is installed.

    python tests/lab/why.py runs/world
    python tests/lab/why.py runs/world-seed1 --seed 1 --pictures runs/pictures

a  KL(student || teacher) in every state that the student itself visits, at the start of on-policy
   distillation: of the base student, and of the same after the forward-KL warmup. "1st" is the
   mean in the first state alone, the bare prompt: how differently the two begin.
b  The groups of K responses that are all wrong or all right: they have no advantage, so that sparse
   reward teaches nothing on them.
c  How much of a step's gradient is signal. A batch is a step's: P random training prompts with K
   fresh rollouts each. Three losses give its gradient g on the same rollouts: GRPO's advantage; the
   KL from the sampled token alone (score function, `--estimator token`); the KL over the whole
   vocabulary. Over M independent batches, each estimated without bias,

       signal = |E g|^2      noise = tr Cov g = E|g|^2 - |E g|^2      SNR = signal / noise

   A step goes the right way as far as g points along E g; 1 / SNR batches must be averaged for as
   much signal as noise.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo
import opd
from common import UserError, load_lm, load_problems, micro_batches, sample, tokenize_problems
from evaluate import markdown

STUDENTS = {"base-student": "without warmup", "bridge-warmup": "after warmup"}  # at OPD's start
GROUPS = {"base-student": "cold student", "bridge": "bridged student",
          "base-teacher": "raw teacher"}
TEACHER = "teacher-rl"
ESTIMATORS = {"reward": "sparse reward, GRPO", "token": "KL, sampled token",
              "full": "KL, whole vocabulary"}
QUANTILES = (0.5, 0.9, 0.99)
COLOURS = ("#c44e52", "#8c8c8c", "#4c72b0")

# --- a: the KL in each state ----------------------------------------------------------------------

@torch.no_grad()
def state_kls(student, teacher, rows):
    """KL(student || teacher) before every token of these rollouts: (N,) on the CPU."""
    found = []
    for group in micro_batches(rows, 0, student.device):
        h, h_teacher = (lm.states([rows[i] for i in group])[0] for lm in (student, teacher))
        n = student.chunk_size(0, h.shape[-1])
        for a, b in zip(h.split(n), h_teacher.split(n)):
            logp, logq = (lm.logits(x, lm.head(), 1.0).log_softmax(-1)
                          for lm, x in ((student, a), (teacher, b)))
            found.append(opd.reverse_kl(logp, logq).cpu())
    return torch.cat(found)

# --- b: groups that teach nothing -----------------------------------------------------------------

def group_shares(rewards):
    """Shares of the groups that are all wrong, mixed, all right: (P, K) -> 3 floats."""
    wrong, right = ((rewards == x).all(-1).float().mean().item() for x in (0, 1))
    return wrong, 1 - wrong - right, right

# --- c: signal and noise of gradients -------------------------------------------------------------

def batch_gradients(student, teacher, rows, rewards):
    """{estimator: the gradient of one step's loss on these rollouts, flat, on the CPU}."""
    n_tokens = sum(len(r.tokens) for r in rows)

    adv, cfg = grpo.advantages(rewards).flatten(), grpo.Config(kl_coef=0)
    weights = grpo.row_weights(rows, cfg)

    def distil(estimator, part, _):
        opd.accumulate(opd.Config(estimator=estimator), student, teacher, part, n_tokens,
                       torch.zeros(len(part)))

    def reward(_, part, group):
        grpo.accumulate(cfg, student, part, adv[group], weights[group], None, None)

    found = {}
    for name in ESTIMATORS:
        student.model.zero_grad()
        for group in micro_batches(rows, 0, student.device):
            (reward if name == "reward" else distil)(name, [rows[i] for i in group], group)
        found[name] = torch.cat([p.grad.flatten().cpu() for p in student.model.parameters()])
    return found

def signal_and_noise(gram, counts=None):
    """|E g|^2 and tr Cov g from the inner products of M independent gradients: (M, M) -> 2 floats.

    Two different batches have the mean product E g . E g', which is |E g|^2 exactly (the squared
    norm of the mean gradient would have noise / M on top); one with itself has signal + noise.
    counts: how often a bootstrap has drawn each (M,); a batch is never paired with itself.
    """
    counts = np.ones(len(gram)) if counts is None else counts
    pairs = np.outer(counts, counts)
    np.fill_diagonal(pairs, 0)
    signal = (pairs * gram).sum() / pairs.sum()
    return signal, (counts * np.diag(gram)).sum() / counts.sum() - signal

def snr(gram, counts=None):
    signal, noise = signal_and_noise(gram, counts)
    return signal / noise if noise > 0 else 0.0  # no reward anywhere: no gradient, no noise

def snr_interval(gram, rng, draws=2000):
    """Bootstrap over the batches, 95 %: (M, M) -> the SNR's lower and upper end."""
    M = len(gram)
    drawn = [snr(gram, np.bincount(rng.integers(0, M, M), minlength=M)) for _ in range(draws)]
    return np.quantile(drawn, (0.025, 0.975))

# --- what it prints -------------------------------------------------------------------------------

def rollouts(args, lm, problems, *seed):
    """K rollouts of each of these problems, and their rewards (P, K)."""
    rows = sample(lm, [p.prompt for p in problems], args.rollouts, temperature=1.0,
                  max_new_tokens=args.max_new_tokens, seed=(args.seed, *seed))
    return rows, grpo.reward_groups(lm.tokenizer, rows, [p.answer for p in problems])[0]

def at_the_start(args, student, teacher, problems):
    """Of M batches, the KL in every state (N,), its mean in the first states, and {estimator: the
    gradients' inner products (M, M)}."""
    kls, first, gradients = [], [], {estimator: [] for estimator in ESTIMATORS}
    for m in range(args.batches):
        rng = np.random.default_rng([args.seed, m])  # the same prompts for every student
        chosen = [problems[i] for i in rng.permutation(len(problems))[: args.prompts]]
        rows, rewards = rollouts(args, student, chosen, 1, m)
        kls.append(state_kls(student, teacher, rows))
        begun = [dataclasses.replace(r, tokens=r.tokens[:1]) for r in rows[:: args.rollouts]]
        first.append(state_kls(student, teacher, begun))
        for estimator, g in batch_gradients(student, teacher, rows, rewards).items():
            gradients[estimator].append(g)
    stacked = {estimator: torch.stack(g).double() for estimator, g in gradients.items()}
    grams = {estimator: (g @ g.T).numpy() for estimator, g in stacked.items()}
    return torch.cat(kls).numpy(), torch.cat(first).mean().item(), grams

def print_table(title, head, *rows):
    cells = [[x if isinstance(x, str) else f"{x:.3g}" for x in row] for row in rows]
    print(f"\n{title}\n\n{markdown(head, cells)}", flush=True)

def measure(args):
    """Print the tables; returns what the pictures show of each."""
    cfg = opd.Config(data=str(args.run / "train.jsonl"), exclude="none", dtype="fp32",
                     max_new_tokens=args.max_new_tokens)
    lms = {name: load_lm(str(args.run / name), cfg, train=name in STUDENTS)
           for name in dict.fromkeys((*STUDENTS, *GROUPS, TEACHER))}
    problems = tokenize_problems(load_problems(cfg), cfg, lms[TEACHER])

    found = {when: at_the_start(args, lms[name], lms[TEACHER], problems)
             for name, when in STUDENTS.items()}
    print_table("a. KL(student ‖ teacher) in the student's own states at the start of OPD, nats",
                ("student", "states", "mean", "std", *(f"{q:.0%}" for q in QUANTILES), "largest",
                 "1st"),
                *((when, f"{len(x):,}", x.mean(), x.std(), *np.quantile(x, QUANTILES), x.max(),
                   first) for when, (x, first, _) in found.items()))

    shares, table = {}, []
    for name, what in GROUPS.items():
        rewards = rollouts(args, lms[name], problems, 0)[1]
        shares[what] = group_shares(rewards)
        table.append((what, *(f"{100 * x:.1f}" for x in (*shares[what], rewards.mean().item()))))
    print_table(f"b. Groups of {args.rollouts} responses to a training prompt, %",
                ("policy", "all wrong", "mixed: they teach", "all right", "mean reward"), *table)

    snrs, table = {}, []
    for when, (_, _, grams) in found.items():
        for estimator, gram in grams.items():
            signal, noise = signal_and_noise(gram)
            low, high = snr_interval(gram, np.random.default_rng(args.seed))
            snrs[when, ESTIMATORS[estimator]] = snr(gram), low, high
            table.append((when, ESTIMATORS[estimator], max(signal, 0.0)**0.5, noise**0.5, snr(gram),
                          f"{low:.3g} to {high:.3g}"))
    print_table(f"c. Gradient of a batch, {args.prompts} prompts x {args.rollouts} rollouts, from "
                f"{args.batches} batches",
                ("student", "loss", "√signal", "√noise", "SNR", "95 %"), *table)
    return {when: x for when, (x, _, _) in found.items()}, shares, snrs

def draw(folder, kls, shares, snrs):
    """why-kl.png, why-groups.png, why-snr.png: 500 x 300 pixels each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.figsize": (5, 3), "figure.dpi": 100, "font.size": 9,
                         "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "figure.constrained_layout.use": True})
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, name):
        figure.savefig(folder / name)
        plt.close(figure)

    figure, ax = plt.subplots()
    least = 1e-5  # nats; what is below stands in the first bin
    edges = np.geomspace(least, max(x.max() for x in kls.values()) * 1.01, 50)
    for (when, x), colour in zip(kls.items(), (COLOURS[0], COLOURS[2])):
        weights = np.full(len(x), 100 / len(x))
        ax.hist(x.clip(least), edges, weights=weights, color=colour, alpha=0.25)
        ax.hist(x.clip(least), edges, weights=weights, color=colour, histtype="step", lw=1.3,
                label=f"{when}, mean {x.mean():.2f}")
        ax.axvline(x.mean(), color=colour, ls="--", lw=1)
    ax.set(xscale="log", xlabel="KL(student ‖ teacher) in a state, nats", ylabel="% of states")
    figure.legend(loc="outside upper center", ncols=2)
    save(figure, "why-kl.png")

    figure, ax = plt.subplots()
    y, left = np.arange(len(shares)), np.zeros(len(shares))
    for i, (what, colour) in enumerate(zip(("all wrong", "mixed: they teach", "all right"),
                                           (COLOURS[0], COLOURS[2], COLOURS[1]))):
        width = 100 * np.array([values[i] for values in shares.values()])
        ax.barh(y, width, left=left, color=colour, label=what, height=0.6)
        for j in y[width >= 6]:
            ax.text(left[j] + width[j] / 2, j, f"{width[j]:.0f}", color="white", ha="center",
                    va="center")
        left += width
    ax.set_yticks(y, list(shares))
    ax.invert_yaxis()
    ax.set(xlabel="% of groups", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3)
    save(figure, "why-groups.png")

    figure, ax = plt.subplots()
    floor = min(min(x for x, low, high in snrs.values() if x > 0) / 3, 0.01)
    for i, (what, colour) in enumerate(zip(ESTIMATORS.values(), COLOURS)):
        # what is not above 0 has no place on a log axis: a bar or whisker that reaches the floor
        x, low, high = np.array([snrs[when, what] for when in STUDENTS.values()]).clip(floor).T
        at = np.arange(len(STUDENTS)) + 0.27 * (i - 1)
        ax.bar(at, x, 0.25, color=colour, label=what)
        ax.errorbar(at, x, np.maximum((x - low, high - x), 0), fmt="none", color="black", lw=1,
                    capsize=2)
    ax.set_xticks(range(len(STUDENTS)), list(STUDENTS.values()))
    ax.set(yscale="log", ylabel="signal / noise of a batch", ylim=(floor, None))
    figure.legend(loc="outside upper center", ncols=3, columnspacing=1, handlelength=1)
    save(figure, "why-snr.png")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run_all.sh, as runs/world")
    parser.add_argument("--prompts", type=int, default=16, help="of a batch, P [default: 16]")
    parser.add_argument("--rollouts", type=int, default=8, help="per prompt, K [default: 8]")
    parser.add_argument("--batches", type=int, default=32, help="M [default: 32]")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="[default: 48]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [default: 0]")
    parser.add_argument("--pictures", type=Path, help="their folder [default: that of the run]")
    args = parser.parse_args(argv)
    if args.batches < 8:
        parser.error("--batches: a bootstrap needs at least 8")
    if args.rollouts < 2:
        parser.error("--rollouts: a group has at least 2")
    for name in (*STUDENTS, *GROUPS, TEACHER):
        if not (args.run / name / "model.safetensors").is_file():
            parser.error(f"no finished {name} in {args.run}")
    try:
        draw(args.pictures or args.run, *measure(args))
    except ImportError:
        print("\nno matplotlib, no pictures")
    except UserError as error:
        sys.exit(f"error: {error}")

if __name__ == "__main__":
    main()
