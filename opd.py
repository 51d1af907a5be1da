"""Stage 2b, on-policy distillation (OPD): the student writes, the teacher judges every token.

    L_R = E_{s ~ d_theta} KL(pi_theta(.|s) || pi_T(.|s))                                    (Eq. 4)

The states s = (x, y_<t) are the student's own, so the loss is paid exactly where the student goes;
the reverse direction is mode-seeking: the student need not cover all that the teacher might do. It
is RL with a dense reward, r_T(s_t, y_t) = beta log pi_T(y_t|s_t) (Eq. 1), since at sequence level

    E sum_t r_T + beta H(pi_theta) = -beta KL(pi_theta || pi_T)                             (Eq. 2)

As a loss, Eq. 4 treats the sampled states as constants; Eq. 2 does not. They have the same value
and different gradients. `--estimator` offers

    full    the exact sum over the vocabulary in every sampled state: Eq. 4, no noise in the action
    token   score function, advantage log pi_T(y_t|s_t) - log pi_theta(y_t|s_t): Eq. 4, one token
    return  score function, the sum of these advantages over u >= t: the full gradient of Eq. 2

OPD and sparse RL are the ends lambda = 0 and 1 of one axis, the density of the reward:

    J_lambda = E[(1 - lambda) sum_t r_T + lambda R] + beta H(pi_theta)                      (Eq. 3)

`--sparse-weight LAMBDA` takes (1 - lambda) of the loss above and lambda of GRPO's, on the same
rollouts; above 0 it uses labels. ours, as the paper has the two ends only: beta is 1; H is weighted
with r_T, by 1 - lambda, so that 1 is grpo.py without a KL to the reference; and R stands in as its
advantage A_i inside its group. So lambda weighs unlike units and is no share of the gradient: the
dense part is in nats a token and fades as the student nears the teacher, A_i is in standard
deviations of R and as large in any mixed group. One lambda leans further to R late than early.

Left out: replaying old rollouts (each is used once, so there is no importance ratio) and top-k KL
(truncated reverse KL goes negative). `diff fkl_warmup.py opd.py` shows where the states come from
and which way the KL points. Axes: P prompts, K rollouts each, N response tokens of a micro-batch,
n tokens of a vocabulary chunk, V vocabulary.

    python opd.py --teacher ckpt/teacher_rl --student ckpt/warmup --half 1 --out ckpt/bridge
    python opd.py --teacher runs/world/teacher-rl --student runs/world/bridge-warmup \\
        --data runs/world/train.jsonl --exclude none --lr 1e-3 --steps 80 --out runs/world/bridge
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import (REWARD, Run, StageConfig, all_reduce_sum, batch_indices, check, check_pair,
                    count_steps, describe_lm, drawn, judge, load_lm, load_problems, make_optimizer,
                    optimizer_step, over_chunks, pick, response_text, run_cli, sample_shared,
                    shared_micro_batches, tokenize_problems)

@dataclass
class Config(StageConfig):  # whose flags all three stages have
    # --- models and data
    teacher: str = None  # ours: any; frozen teacher, model folder or hub name
    student: str = None  # ours: any; student to train, model folder or hub name
    out: str = "ckpt/opd"  # ours: output folder
    # --- the paper's
    lr: float = 1e-6  # learning rate of AdamW (Table 10)
    epochs: int = 1  # passes over the prompts (Table 10)
    rollouts: int = 8  # rollouts per prompt, K (Table 10)
    prompts: int = 8  # prompts per step, P (Table 10: mini-batch 64; ours: that is P * K rows)
    max_prompt_tokens: int = 2048  # longer prompts are skipped (Table 10)
    max_new_tokens: int = 16384  # response limit in tokens (Table 10)
    temperature: float = 1.0  # of both policies, in sampling and loss alike (Table 10)
    # --- ours
    estimator: Literal["full", "token", "return"] = "full"  # ours: Eq. 4 exact or sampled, Eq. 2
    sparse_weight: float = 0.0  # ours: lambda of Eq. 3; 0 is OPD, 1 sparse RL (above 0: labels)
    steps: int = 0  # ours: number of updates; 0 means --epochs
    grad_clip: float = 1.0  # ours: gradient norm limit, as in Table 9

def reverse_kl(logp, logq):
    """KL(pi_theta || pi_T) in every state, over the vocabulary (Eq. 4): (n, V), (n, V) -> (n,)."""
    return (logp.exp() * (logp - logq)).sum(-1)

def dense_advantages(logp, logq, lengths, returns):
    """log pi_T - log pi_theta of the sampled tokens: the reward of Eq. 1 and the entropy's, (N,).

    returns=False takes it as it is: with it, the score function has the gradient of Eq. 4.
    returns=True sums it over u >= t inside each row of these lengths: the gradient of Eq. 2.
    """
    advantages = (logq - logp).detach()
    if returns and lengths:
        rows = advantages.split(lengths)
        advantages = torch.cat([row.flip(0).cumsum(0).flip(0) for row in rows])
    return advantages

def sparse_advantages(rewards, eps=1e-4):
    """A_i = (R_i - mean) / (std + eps) inside each group, as in grpo.py: (P, K) -> (P, K)."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)

def mixed_loss(dense, logp, adv, sparse_weight):
    """Between the ends of Eq. 3, per token: (1 - lambda) dense + lambda (-A log pi(y)), all (N,).

    The second is GRPO's loss: the rollouts are fresh, so its ratio is 1 and its clip is idle.
    """
    return (1 - sparse_weight) * dense - sparse_weight * adv * logp

def accumulate(cfg, student, teacher, rows, n_tokens, sparse):
    """Add the gradient of a micro-batch to the student's, for an update of n_tokens tokens.

    sparse: A_i of its rows, (B,), which counts with --sparse-weight only. Returns sums over its
    tokens: of the exact KL, its square, the student's entropy, |log pi_theta - when sampled|.
    """
    hidden, tokens = student.states(rows)  # (N, D), (N,)
    with torch.no_grad():
        hidden_teacher, _ = teacher.states(rows)
    head_teacher = teacher.head()  # (V, D)
    lengths, dense = [len(r.tokens) for r in rows], None
    if cfg.estimator != "full":  # constants, of all tokens before the first has its loss
        logp, logq = (lm.token_logp(h, tokens, cfg.temperature, cfg.vocab_chunk)
                      for lm, h in ((student, hidden), (teacher, hidden_teacher)))
        dense = dense_advantages(logp, logq, lengths, returns=cfg.estimator == "return")

    def chunk(logp, h_teacher, y, sampled, A_sparse, A=None):  # (n, V), (n, D), the others (n,)
        logq = teacher.logits(h_teacher, head_teacher, cfg.temperature).log_softmax(-1)
        kl = reverse_kl(logp, logq)  # (n,)
        entropy = -logp.detach().exp().mul_(logp.detach()).sum(-1)
        logp_y = pick(logp, y)  # (n,)
        loss = kl if cfg.estimator == "full" else -A * logp_y
        if cfg.sparse_weight:
            loss = mixed_loss(loss, logp_y, A_sparse, cfg.sparse_weight)
        return loss.sum() / n_tokens, (kl, kl**2, entropy, (logp_y - sampled).abs())

    sampled = torch.tensor([x for r in rows for x in r.logp])
    A_sparse = sparse.repeat_interleave(torch.tensor(lengths, dtype=torch.long))  # (N,)
    return over_chunks(chunk, student, hidden, cfg.temperature, cfg.vocab_chunk, y=tokens,
                       h_teacher=hidden_teacher, sampled=sampled, A=dense, A_sparse=A_sparse)

def main(cfg):
    check(cfg.temperature > 0, "--temperature must be positive")
    check(0 <= cfg.sparse_weight <= 1, f"--sparse-weight {cfg.sparse_weight} is not in [0, 1]")
    check(cfg.rollouts > 1 or not cfg.sparse_weight,
          "--rollouts 1: a group of one has no advantage for --sparse-weight; take at least 2")
    teacher, student = describe_lm(cfg.teacher), describe_lm(cfg.student)
    check_pair(teacher, student, cfg.thinking)
    problems = load_problems(cfg)
    run = Run(cfg, parents=[cfg.teacher, cfg.student], data=problems)
    teacher = load_lm(teacher, cfg)
    student = load_lm(student, cfg, train=True)
    problems = tokenize_problems(problems, cfg, student, teacher)
    steps = count_steps(cfg, len(problems))
    optimizer = make_optimizer(student, cfg)
    run.labels = drawn(problems, cfg, steps) if cfg.sparse_weight else []

    for step in run.steps(steps, student, optimizer, teacher):
        indices = batch_indices(len(problems), cfg.prompts, step, cfg.seed)

        # states: fresh rollouts of the student, d_theta
        run.time("sampling")
        rows = sample_shared(student, [problems[i].prompt for i in indices], cfg.rollouts, cfg,
                             seed=(cfg.seed, step))

        # reward: the verifier's, where Eq. 3 wants it; the teacher's is a part of the loss
        sparse, rewarded = torch.zeros(len(rows)), {}
        if cfg.sparse_weight:
            run.time("verifying")
            answers = [problems[i].answer for i in indices for _ in range(cfg.rollouts)]  # (B,)
            texts = [response_text(student.tokenizer, r) for r in rows]
            verdicts = judge(list(zip(texts, answers)), cfg.verifier)
            rewards = torch.tensor([REWARD.get(v, v) for v in verdicts]).double()
            sparse = sparse_advantages(rewards.view(-1, cfg.rollouts)).flatten().float()  # (B,)
            rewarded = {"reward": rewards.mean().item()}

        # loss: the mean over all response tokens of the update, whatever the micro-batches
        run.time("updating")
        n_tokens = sum(len(r.tokens) for r in rows)
        sums = torch.zeros(4, dtype=torch.float64)  # of kl, kl^2, entropy, gap
        for group in shared_micro_batches(rows, cfg.micro_tokens, student.device):
            sums += accumulate(cfg, student, teacher, [rows[i] for i in group], n_tokens,
                               sparse[group])
        grad_norm = optimizer_step(student, optimizer, cfg, steps)

        kl, square, entropy, gap = (all_reduce_sum(sums) / n_tokens).tolist()
        kl_std = max(0.0, square - kl**2) ** 0.5
        run.log("kl", "entropy", "length", **rewarded, kl=kl, kl_std=kl_std, entropy=entropy,
                sampler_gap=gap, grad_norms=[grad_norm], rows=rows,
                note=f"KL to the teacher {kl:.3f} nats a token")
    run.finish()

if __name__ == "__main__":
    run_cli(main, Config, __doc__)
