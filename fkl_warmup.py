"""Stage 2a, forward-KL warmup: the student learns, token by token, what the teacher would say.

    L_F = E_{s ~ d_T} KL(pi_T(.|s) || pi_theta(.|s))                                        (Eq. 5)

The states s = (x, y_<t) come from the teacher's rollouts, sampled once and cached as token ids; the
forward direction is mode-covering: wherever the teacher puts mass the student must, too. That moves
the student into the teacher's support, from where OPD (opd.py) goes on with the student's own
states. `--targets` offers

    soft  the teacher's whole next-token distribution: Eq. 5, exact over the vocabulary
    hard  only the token that the teacher sampled: teacher-sample SFT (route R2); --only-correct
          keeps the responses that the verifier accepts (with one model as --teacher and --student:
          the SFT'd teacher of R6; ours, the paper does not say how that one was trained)
    data  the `response` (or `solution`) field of all of --data, without a teacher: plain SFT

Left out: mixing in labels or the student's own states. `diff fkl_warmup.py opd.py` shows where the
states come from and which way the KL points. Axes: P prompts, K rollouts each, N response tokens of
a micro-batch, n tokens of a vocabulary chunk, V vocabulary.

    python fkl_warmup.py --teacher ckpt/teacher_rl --student Qwen/Qwen3-1.7B --half 1 \\
        --out ckpt/warmup
    python fkl_warmup.py --teacher runs/world/teacher-rl --student runs/world/base-student \\
        --data runs/world/train.jsonl --exclude none --lr 1e-3 --steps 40 \\
        --out runs/world/bridge-warmup
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (Rollout, Run, Timer, append_json_line, batch_indices, check, check_pair,
                    count_steps, describe_lm, differences, dry_run, encode_examples, fingerprint,
                    from_rank_0, load_lm, load_problems, lock, make_optimizer, optimizer_step,
                    over_chunks, pick, progress, read_json_lines, rollout_stats, run_cli,
                    sample_and_write, shared_micro_batches, summed, tokenize_problems, verify)


@dataclass
class Config:
    # --- models and data
    teacher: str = ""  # ours: any; frozen teacher, model folder or hub name (not for data)
    student: str = None  # ours: any; student to train, model folder or hub name
    data: str = "dapo"  # problems, DAPO-Math-17K (Table 1): file, folder, hub name or alias
    half: Literal["1", "2", "all"] = "all"  # which half of the deduplicated problems (Table 1)
    exclude: str = "math500,aime24,aime25"  # ours: sets whose problems are dropped, or none
    split_seed: int = 0  # ours: seed of the halves; keep it over a whole recipe
    only_correct: bool = False  # ours: only responses that the verifier accepts (uses labels)
    cache: str = ""  # ours: file of the teacher's rollouts; empty is OUT/rollouts.jsonl
    out: str = "ckpt/warmup"  # ours: output folder
    # --- the paper's
    lr: float = 1e-6  # learning rate of AdamW (Table 10)
    epochs: int = 1  # passes over the prompts (Table 10)
    rollouts: int = 8  # rollouts per prompt, K (Table 10)
    prompts: int = 8  # prompts per step, P (Table 10: mini-batch 64; ours: that is P * K rows)
    max_prompt_tokens: int = 2048  # longer prompts are skipped (Table 10)
    max_new_tokens: int = 16384  # response limit in tokens (Table 10)
    temperature: float = 1.0  # of both policies, in sampling and loss alike (Table 10)
    # --- ours
    targets: Literal["soft", "hard", "data"] = "soft"  # ours: Eq. 5, or SFT on samples or on data
    steps: int = 0  # ours: number of updates; 0 means --epochs
    seed: int = 0  # ours: of prompt order and sampling
    thinking: bool = False  # ours: Qwen3's thinking mode
    grad_clip: float = 1.0  # ours: gradient norm limit, as in Table 9
    weight_decay: float = 0.0  # ours: AdamW's decoupled decay
    adam_beta2: float = 0.999  # ours: AdamW's beta2
    lr_schedule: Literal["constant", "linear"] = "constant"  # ours: linear decays to 0
    warmup_steps: int = 0  # ours: updates of linear learning-rate warmup
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # ours: compute; auto: bf16 on CUDA, else fp32
    # --- memory, speed and display only: they change no result beyond rounding
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    micro_tokens: int = 0  # padded tokens of a micro-batch; 0: 32,768 on a GPU, 1,024 on a CPU
    vocab_chunk: int = 0  # tokens whose (n, V) log-probs exist at once; 0: 256 MiB, on a CPU 16
    sample_rows: int = 256  # rows decoded at once
    kv_gib: float = 0.0  # GiB of the sampler's keys and values; 0: what the device can spare
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    save_every: int = 50  # steps between checkpoints; 0: only one when it is told to stop
    cpu_offload: bool = False  # several processes: masters and AdamW in host memory
    gather: Literal["full", "layer"] = "full"  # several processes: weights at hand while sampling
    dry_run: int = 0  # only print the computed memory and time on so many GPUs
    show_every: int = 10  # steps between printed rollouts; 0 is never


def forward_kl(logp, logq):
    """KL(pi_T || pi_theta) in every state, over the vocabulary (Eq. 5): (n, V), (n, V) -> (n,)."""
    return (logq.exp() * (logq - logp)).sum(-1)


def cached_rollouts(cfg, teacher, path, prompts):
    """K rollouts of the teacher per prompt: what the cache file has, the rest sampled and appended.

    prompts: tuples of token ids. The file holds ids, never text; its first line says whose rollouts
    they are and how they were made, and a file with any other first line is refused (UserError).
    Returns a list of Rollouts per prompt, and the seconds that sampling them took, now or earlier.
    """
    header = {"fingerprint": fingerprint(teacher), "seed": cfg.seed, "rollouts": cfg.rollouts,
              "temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens,
              "stop_ids": teacher.stop_ids}
    lines = from_rank_0(read_json_lines, path)
    if not lines:
        append_json_line(path, {"teacher": cfg.teacher, **header})
        lines = [{"teacher": cfg.teacher, **header}]
    maker = lines[0].pop("teacher", "?")
    differ = differences(lines[0], header)
    check(not differ, f"{path} holds rollouts of another policy or setting ({differ}; made by "
                      f"{maker}); choose another --cache or delete it")
    cache = {tuple(line["prompt"]): line for line in lines[1:]}
    missing = [p for p in dict.fromkeys(prompts) if p not in cache]
    print(f"{path}: {len(set(prompts)) - len(missing)} prompts reused, {len(missing)} to sample")
    bar = progress(total=len(missing), desc="teacher rollouts", disable=not missing)
    last = time.time()

    def write(prompt, rows):
        nonlocal last
        seconds, last = time.time() - last, time.time()
        cache[prompt] = {"prompt": prompt, "responses": [r.tokens for r in rows],
                         "finished": [r.finished for r in rows], "seconds": seconds}
        append_json_line(path, cache[prompt])
        bar.update()

    with bar:
        sample_and_write(teacher, missing, cfg.rollouts, lambda i, rows: write(missing[i], rows),
                         max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                         seed=(cfg.seed,), sample_rows=cfg.sample_rows, kv_gib=cfg.kv_gib,
                         gather=cfg.gather)
    groups = [[Rollout(list(p), tokens, [], done) for tokens, done in
               zip(cache[p]["responses"], cache[p]["finished"])] for p in prompts]
    return groups, sum(cache[p]["seconds"] for p in prompts)


def teacher_states(cfg, problems, teacher, path):
    """The teacher's rollouts, a list per problem, and the seconds that sampling them took.

    Prompts that no step will use are not sampled (their list is empty). --only-correct samples all
    and keeps the responses that the verifier accepts, and the problems that have one.
    """
    n, used = len(problems), range(len(problems))
    if not cfg.only_correct:
        steps = range(count_steps(cfg.steps, cfg.epochs, n, cfg.prompts))
        used = sorted({i for s in steps for i in batch_indices(n, cfg.prompts, s, cfg.seed)})
    groups = [[] for _ in problems]
    sampled, seconds = cached_rollouts(cfg, teacher, path, [problems[i].prompt for i in used])
    for i, rows in zip(used, sampled):
        groups[i] = rows
    if cfg.only_correct:
        text = teacher.tokenizer.decode
        groups = [[r for r in rows if verify(text(r.tokens, skip_special_tokens=True), p.answer)]
                  for p, rows in zip(problems, groups)]
        kept, groups = sum(map(len, groups)), [rows for rows in groups if rows]
        print(f"--only-correct: {kept} responses to {len(groups)} of {n} problems kept")
        check(groups, "--only-correct: the teacher solves none of these problems")
    return groups, seconds


def load_states(cfg, run, student):
    """The teacher (None if no step needs it) and what steps draw from: rows per prompt."""
    if cfg.targets == "data":
        return None, encode_examples(cfg.data, student, thinking=cfg.thinking,
                                     max_prompt_tokens=cfg.max_prompt_tokens)
    problems = load_problems(cfg.data, half=cfg.half, exclude=cfg.exclude,
                             split_seed=cfg.split_seed)
    if cfg.only_correct:
        run.use_labels(problems)
    teacher = load_lm(cfg.teacher, device=cfg.device, dtype=cfg.dtype)
    problems = tokenize_problems(problems, student.tokenizer, thinking=cfg.thinking,
                                 max_prompt_tokens=cfg.max_prompt_tokens)
    path = Path(cfg.cache or run.out / "rollouts.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock"), path):  # another run may share the cache
        groups, run.seconds_before = teacher_states(cfg, problems, teacher, path)
    return teacher if cfg.targets == "soft" else None, groups


def accumulate(cfg, student, teacher, rows, n_tokens):
    """Add the gradient of a micro-batch to the student's, for an update of n_tokens tokens.

    Returns sums over its tokens: of the loss (exact KL, or -log pi_theta(y)), of the entropy.
    """
    hidden, tokens = student.states(rows)  # (N, D), (N,)
    constants = [tokens]
    if cfg.targets == "soft":
        with torch.no_grad():
            hidden_teacher, _ = teacher.states(rows)
        head_teacher = teacher.head()  # (V, D)
        constants.append(hidden_teacher)

    def chunk(head, h, y, h_teacher=None):
        logp = student.log_probs(h, head, cfg.temperature)  # (n, V)
        if cfg.targets == "soft":
            logq = teacher.log_probs(h_teacher, head_teacher, cfg.temperature)
            loss = forward_kl(logp, logq)  # (n,)
        else:
            loss = -pick(logp, y)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return loss.sum() / n_tokens, (loss, entropy)

    return over_chunks(chunk, cfg.vocab_chunk, student, hidden, *constants)


def main(cfg):
    check(cfg.temperature > 0, "--temperature must be positive")
    check(cfg.teacher or cfg.targets == "data", f"--targets {cfg.targets} needs a --teacher")
    check(not cfg.cache or cfg.cache.endswith(".jsonl"), "--cache must name a .jsonl file")
    if cfg.targets == "data":
        check(cfg.half == "all" and not cfg.teacher and not cfg.only_correct,
              "--targets data takes all rows as they are: no --half, --teacher, --only-correct")
    else:
        check_pair(describe_lm(cfg.teacher), describe_lm(cfg.student))
    if cfg.dry_run:
        teachers = [cfg.teacher] if cfg.teacher else []
        return dry_run(cfg, cfg.student, teachers, sampler=cfg.teacher)
    run = Run(cfg, parents=[name for name in (cfg.teacher, cfg.student) if name])
    student = load_lm(cfg.student, device=cfg.device, dtype=cfg.dtype, train=True,
                      gradient_checkpointing=cfg.gradient_checkpointing,
                      cpu_offload=cfg.cpu_offload)
    teacher, groups = load_states(cfg, run, student)
    steps = count_steps(cfg.steps, cfg.epochs, len(groups), cfg.prompts)
    optimizer, scheduler = make_optimizer(student, cfg, steps)
    start = run.resume(student, optimizer, scheduler, teacher)

    for step in run.steps(start, steps):
        timer = Timer()
        indices = batch_indices(len(groups), cfg.prompts, step, cfg.seed)

        # states: cached rollouts of the teacher, d_T
        rows = [row for i in indices for row in groups[i]]

        # loss: the mean over all response tokens of the update, whatever the micro-batches
        timer("updating")
        n_tokens = sum(len(r.tokens) for r in rows)
        sums = torch.zeros(2, dtype=torch.float64)  # of loss, entropy
        for group in shared_micro_batches(rows, cfg.micro_tokens, student.device):
            sums += accumulate(cfg, student, teacher, [rows[i] for i in group], n_tokens).cpu()
        grad_norm = optimizer_step(student, optimizer, scheduler, cfg.grad_clip)

        loss, entropy = (summed(sums) / n_tokens).tolist()
        name = "kl" if cfg.targets == "soft" else "nll"
        run.log(step, name, "entropy", "length", **{name: loss}, entropy=entropy,
                grad_norms=[grad_norm], **rollout_stats(rows), **timer.stop())
        run.show(step, student, rows[0], f"{name} {loss:.3f} nats a token")
        run.save_state(step, student, optimizer, scheduler)
    run.finish(student)


if __name__ == "__main__":
    run_cli(main, Config, __doc__)
