"""Stages 1 and 3, GRPO: reinforcement learning from a sparse, checkable reward.

For each prompt x draw a group of K responses y_i from pi_theta, let the verifier give R_i in
{0, 1}, and compare inside the group only:

    A_i = (R_i - mean R) / std R,     rho_t = pi_theta(y_t|s_t) / pi_old(y_t|s_t)
    maximise, per token,
    min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i) - kl_coef KL(pi_theta || pi_ref)

A group of only right or only wrong responses has A = 0 and teaches nothing: that is why the paper
spends its labels on a teacher that already succeeds sometimes (stage 1, `--model` the teacher), and
on the student only after the bridge (stage 3, `--model` the bridged student, with labels not used
so far). On the base student the same script is the baseline, cold GRPO (route R1); on stage 1's
labels again it is replay (R7). It is the end lambda = 1 of Eq. 3, as OPD is lambda = 0; what lies
between them is opd.py --sparse-weight.

Ablations in one flag: --aggregation sequence (GRPO's first form) or constant (Dr. GRPO),
--no-adv-std (Dr. GRPO), --clip-high 0.28 (DAPO), --mask-truncated (DAPO), --kl-coef 0, --kl-loss
k3; several updates per batch: --prompts 64 with --mini-batch 8; another reward: --verifier FILE.py.
Left out: a value network, asynchronous sampling. Axes: P prompts, K rollouts each, B = P*K rows, N
response tokens of a micro-batch, n tokens of a vocabulary chunk, V vocabulary.

    python grpo.py --model Qwen/Qwen3-8B --half 1 --out ckpt/teacher_rl
    python grpo.py --model runs/world/base-teacher --data runs/world/train.jsonl --exclude none \\
        --prompts 32 --mini-batch 32 --kl-coef 0 --lr 3e-4 --steps 40 --out runs/world/teacher-rl
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import (REWARD, Run, StageConfig, all_gather_dict, all_reduce_sum, batch_indices,
                    check, count_steps, describe_lm, drawn, judge, load_lm, load_problems,
                    make_optimizer, optimizer_step, over_chunks, pick, response_text, run_cli,
                    sample_shared, shared_micro_batches, tokenize_problems)

@dataclass
class Config(StageConfig):  # whose flags all three stages have
    # --- models and data
    model: str = None  # ours: any; policy to train, model folder or hub name; also the KL reference
    out: str = "ckpt/grpo"  # ours: output folder
    # --- the paper's
    lr: float = 1e-6  # learning rate of AdamW (Table 9)
    epochs: int = 10  # passes over the prompts (Table 9)
    mini_batch: int = 8  # prompts per update (Table 9: mini-batch 8; ours: that counts prompts)
    clip: float = 0.2  # lower clip, ratio >= 1 - clip (Table 9); idle with one update per step
    clip_high: float = 0.0  # upper clip, ratio <= 1 + clip_high; 0: as --clip (Table 9; DAPO 0.28)
    grad_clip: float = 1.0  # gradient norm limit (Table 9)
    kl_coef: float = 5e-4  # coefficient of the KL to the reference; 0 is off (Table 9)
    max_prompt_tokens: int = 3072  # longer prompts are skipped (Table 9)
    max_new_tokens: int = 16384  # response limit in tokens (Table 9)
    # --- ours
    prompts: int = 8  # ours: prompts per step, P: updates * --mini-batch; one has ratio 1
    rollouts: int = 8  # ours: rollouts per prompt, K, the group; Table 10 has 8 too
    temperature: float = 1.0  # ours: of the policy, in sampling and loss alike; Table 10 has 1 too
    aggregation: Literal["token", "sequence", "constant"] = "token"  # ours: what the loss averages
    adv_std: bool = True  # ours: divide the advantage by the group's std, as the paper's A_i does
    mask_truncated: bool = False  # ours: leave responses cut at the limit out of the loss
    kl_loss: Literal["k2", "k3"] = "k2"  # ours: KL estimator in the loss; k2 has the right gradient
    steps: int = 0  # ours: number of steps (rollout batches); 0 means --epochs

def reward_groups(tokenizer, rows, answers, verifier=""):
    """The verifier's rewards of K rollouts for each of P answers, (P, K), and what to log."""
    k = len(rows) // len(answers)
    texts = [response_text(tokenizer, r) for r in rows]
    verdicts = judge([(text, answers[i // k]) for i, text in enumerate(texts)], verifier)
    rewards = torch.tensor([REWARD.get(v, v) for v in verdicts]).double().view(-1, k)
    spread = rewards.std(-1)
    shares = {name: verdicts.count(name) / len(rows) for name in ("no_answer", "gave_up")}
    return rewards, {"reward": rewards.mean().item(), "reward_std": spread.mean().item(),
                     "zero_variance": (spread == 0).double().mean().item(), **shares}

def advantages(rewards, adv_std=True, eps=1e-4):
    """A_i = (R_i - mean) / (std + eps) inside each group: (P, K) -> (P, K).

    ours: std over K - 1 and eps 1e-4 (one success in eight: 2.4742). A constant group is exactly 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + eps) if adv_std else centred

def policy_loss(logp, logp_old, adv, clip, clip_high):
    """-min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) per token, all (N,); gradient by logp."""
    ratio = (logp - logp_old).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip_high) * adv)

def kl_penalty(logp, logp_ref, estimator, ratio=1.0):
    """Estimate of KL(pi_theta || pi_ref) from the sampled token, as a loss: (N,), (N,) -> (N,).

    k2 = (log pi - log ref)^2 / 2: its expected gradient, on pi's samples, is that of KL(pi || ref).
    pi_old drew the samples, so it is weighted by rho = pi / pi_old, `ratio`, a constant here.
    k3 = ref/pi - 1 - log(ref/pi): the usual GRPO term and a good estimate of the value, but as a
    loss it descends KL(ref || pi), at rho = 1. (k1 = log pi - log ref has no expected gradient.)
    """
    log_ratio = logp_ref - logp
    return ratio * log_ratio.square() / 2 if estimator == "k2" else log_ratio.exp() - 1 - log_ratio

def row_weights(rows, cfg):
    """Weight of each row's tokens, (B,); the loss of an update is sum(weight * token loss).

    token: one mean over all tokens of the update. sequence: the mean over rows of each row's mean.
    constant: the sum over rows * --max-new-tokens (Dr. GRPO). --mask-truncated rows count nowhere.
    """
    lengths = torch.tensor([len(r.tokens) for r in rows]).double()
    counts = torch.tensor([r.finished or not cfg.mask_truncated for r in rows]).double()
    if cfg.aggregation == "token":
        return counts / (lengths * counts).sum().clamp(min=1)
    per_row = lengths if cfg.aggregation == "sequence" else cfg.max_new_tokens
    return counts / counts.sum().clamp(min=1) / per_row

@torch.no_grad()
def score(cfg, lm, rows):
    """log pi(y_t|s_t) as constants: a list of floats for each row."""
    logps = {}
    for group in shared_micro_batches(rows, cfg.micro_tokens, lm.device):
        hidden, tokens = lm.states([rows[i] for i in group])
        logp = lm.token_logp(hidden, tokens, cfg.temperature, cfg.vocab_chunk)
        for i, row_logp in zip(group, logp.split([len(rows[i].tokens) for i in group])):
            logps[i] = row_logp.tolist()
    logps = all_gather_dict(logps)
    return [logps[i] for i in range(len(rows))]

def accumulate(cfg, policy, rows, adv, weights, old, ref):
    """Add the gradient of a micro-batch to the policy's.

    adv, weights: A_i and `row_weights` of its rows, (B,). old, ref: log pi_old and log pi_ref of
    its rows, lists of floats, or None. Without old, pi_old is the policy as it is: the ratio is 1,
    but its gradient is not 0. Returns sums over its tokens: of 1, clipped, entropy, k3 to the
    reference, and |log pi_old - the sampler's log-prob|.
    """
    hidden, tokens = policy.states(rows)  # (N, D), (N,)
    clip_high = cfg.clip_high or cfg.clip

    def each(values):  # of a row (B,) -> of its tokens (N,)
        lengths = torch.tensor([len(r.tokens) for r in rows], dtype=torch.long)
        return values.float().repeat_interleave(lengths)

    def per_token(lists):  # (N,)
        if lists is not None:  # [] is a micro-batch without rows
            return torch.tensor([x for row in lists for x in row], device=tokens.device)

    def chunk(all_logp, y, sampled, A, weight, old=None, ref=None):  # (n, V), the others (n,)
        entropy = -all_logp.detach().exp().mul_(all_logp.detach()).sum(-1)
        logp = pick(all_logp, y)  # (n,)
        old = logp.detach() if old is None else old
        ref = logp.detach() if ref is None else ref
        ratio = (logp - old).exp().detach()
        loss = policy_loss(logp, old, A, cfg.clip, clip_high)
        loss = loss + cfg.kl_coef * kl_penalty(logp, ref, cfg.kl_loss, ratio)
        clipped = torch.where(A > 0, ratio > 1 + clip_high, ratio < 1 - cfg.clip) & (A != 0)
        k3 = kl_penalty(logp, ref, "k3")
        return (weight * loss).sum(), (torch.ones_like(logp), clipped, entropy, k3,
                                       (old - sampled).abs())

    return over_chunks(chunk, policy, hidden, cfg.temperature, cfg.vocab_chunk, y=tokens,
                       sampled=per_token([r.logp for r in rows]), A=each(adv),
                       weight=each(weights), old=per_token(old), ref=per_token(ref))

def main(cfg):
    check(cfg.rollouts > 1, "--rollouts 1: a group of one has no advantage; take at least 2")
    check(cfg.temperature > 0, "--temperature must be positive")
    check(cfg.prompts % cfg.mini_batch == 0,
          f"--prompts {cfg.prompts} is not a multiple of --mini-batch {cfg.mini_batch}")
    model = describe_lm(cfg.model)  # a wrong name should not wait for the data
    problems = load_problems(cfg)
    run = Run(cfg, parents=[cfg.model], data=problems)
    policy = load_lm(model, cfg, train=True)
    reference = load_lm(model, cfg) if cfg.kl_coef else None
    problems = tokenize_problems(problems, cfg, policy)
    steps = count_steps(cfg, len(problems))
    updates = cfg.prompts // cfg.mini_batch  # per step
    optimizer = make_optimizer(policy, cfg)
    run.labels = drawn(problems, cfg, steps)

    for step in run.steps(steps, policy, optimizer):
        indices = batch_indices(len(problems), cfg.prompts, step, cfg.seed)

        # states: fresh rollouts of the policy
        run.time("sampling")
        rows = sample_shared(policy, [problems[i].prompt for i in indices], cfg.rollouts, cfg,
                             seed=(cfg.seed, step))

        # reward: one verdict a response; advantage: inside the group of one prompt
        run.time("verifying")
        answers = [problems[i].answer for i in indices]
        rewards, rewarded = reward_groups(policy.tokenizer, rows, answers, cfg.verifier)  # (P, K)
        adv = advantages(rewards, cfg.adv_std).flatten()  # (B,)

        # constants: pi_old only if a later update will see a moved policy, pi_ref only if it counts
        run.time("scoring")
        old = score(cfg, policy, rows) if updates > 1 else None
        ref = score(cfg, reference, rows) if reference else None

        # loss: each mini-batch of prompts has its own update, whatever the micro-batches
        run.time("updating")
        sums, grad_norms, size = torch.zeros(5, dtype=torch.float64), [], len(rows) // updates
        for first in range(0, len(rows), size):
            weights = torch.zeros(len(rows), dtype=torch.float64)
            weights[first : first + size] = row_weights(rows[first : first + size], cfg)
            # a row without weight, or without advantage and reference, has no gradient; one row
            # stays in any case: a gradient of zeros is still an update, by AdamW's momentum
            taught = [i for i in range(len(rows)) if weights[i] and (adv[i] or ref)] or [first]
            for group in shared_micro_batches([rows[i] for i in taught], cfg.micro_tokens,
                                              policy.device):
                group = [taught[i] for i in group]
                sums += accumulate(cfg, policy, [rows[i] for i in group], adv[group],
                                   weights[group], old and [old[i] for i in group],
                                   ref and [ref[i] for i in group])
            grad_norms.append(optimizer_step(policy, optimizer, cfg, steps * updates))

        n, *sums = all_reduce_sum(sums).tolist()  # n: tokens of the rows with a gradient
        clipped, entropy, k3, gap = (x / n for x in sums)
        run.log("reward", "zero_variance", "length", **rewarded, entropy=entropy, k3_ref=k3,
                clip_fraction=clipped, sampler_gap=gap, grad_norms=grad_norms, rows=rows,
                note=f"answer {answers[0]}, reward {rewards[0, 0]:g}")
    run.finish()

if __name__ == "__main__":
    run_cli(main, Config, __doc__)
