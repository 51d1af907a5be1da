"""Stage 2a, forward-KL warmup: the student learns, token by token, what the teacher would say.

    L_F = E_{s ~ d_T} KL(pi_T(.|s) || pi_theta(.|s))                                        (Eq. 5)

The states s = (x, y_<t) come from the teacher's rollouts, sampled once and cached as token ids; the
forward direction is mode-covering: wherever the teacher puts mass the student must, too. That moves
the student into the teacher's support, from where OPD (opd.py) goes on with the student's own
states. `--targets` offers

    soft  the teacher's whole next-token distribution: Eq. 5, exact over the vocabulary
    hard  only the token that the teacher sampled: teacher-sample SFT (route R2); --only-correct
          keeps the responses with a reward above 0 (with one model as --teacher and --student:
          the SFT'd teacher of R6; ours, the paper does not say how that one was trained)
    data  the `response` (or `solution`) of all rows of --data, without a teacher: plain SFT

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

from common import (CHATS, REWARD, Rollout, Run, StageConfig, all_reduce_sum, append_json_line,
                    batch_indices, build_prompt, check, check_context, check_pair, count_steps,
                    describe_lm, differences, drawn, end_of_turn, find_question, find_text,
                    fingerprint, judge, load_lm, load_problems, lock, make_optimizer, on_rank_0,
                    optimizer_step, over_chunks, pick, progress, read_json_lines, read_problems,
                    response_text, run_cli, sample_shared, shared_micro_batches, skip_long,
                    tokenize_problems)

@dataclass
class Config(StageConfig):  # whose flags all three stages have
    # --- models and data
    teacher: str = ""  # ours: any; frozen teacher, model folder or hub name (not for data)
    student: str = None  # ours: any; student to train, model folder or hub name
    only_correct: bool = False  # ours: only responses with a reward above 0 (uses labels)
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
    grad_clip: float = 1.0  # ours: gradient norm limit, as in Table 9

def forward_kl(logp, logq):
    """KL(pi_T || pi_theta) in every state, over the vocabulary (Eq. 5): (n, V), (n, V) -> (n,)."""
    return (logq.exp() * (logq - logp)).sum(-1)

def teacher_rollouts(cfg, run, teacher, problems):
    """K rollouts of the teacher for each problem, [[Rollout]]; those that no step uses are []."""
    path = Path(cfg.cache or run.out / "rollouts.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    used = drawn(range(len(problems)), cfg, count_steps(cfg, len(problems)))
    if cfg.only_correct:  # the steps will draw from the problems that have a correct response
        used = range(len(problems))
    with lock(path.with_name(f".{path.name}.lock"), path):  # another run may share the cache
        cache = read_cache(cfg, teacher, path)
        missing = [problems[i].prompt for i in used if problems[i].prompt not in cache]
        print(f"{path}: {len(used) - len(missing)} prompts reused, {len(missing)} to sample")
        fill_cache(cfg, teacher, path, cache, missing)
    run.seconds_before = sum(cache[problems[i].prompt]["seconds"] for i in used)
    groups = [[] for _ in problems]
    for i in used:
        line = cache[problems[i].prompt]
        groups[i] = [Rollout(list(problems[i].prompt), tokens, [], finished)
                     for tokens, finished in zip(line["responses"], line["finished"])]
    return groups

def read_cache(cfg, teacher, path):
    """{prompt: line} of a cache file, of token ids. Its first line says whose rollouts they are and
    how they were made; raises UserError if that is not what cfg asks for."""
    header = {"fingerprint": fingerprint(teacher), "seed": cfg.seed, "rollouts": cfg.rollouts,
              "temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens,
              "stop_ids": teacher.stop_ids}
    lines = on_rank_0(read_json_lines, path)
    if not lines:
        append_json_line(path, header)
        return {}
    differ = differences(lines[0], header)
    check(not differ, f"{path} holds rollouts of another policy or setting ({differ}); choose "
                      "another --cache or delete it")
    return {tuple(line["prompt"]): line for line in lines[1:]}

def fill_cache(cfg, teacher, path, cache, prompts):
    """Sample the teacher; each prompt becomes a line of the file as soon as it has ended."""
    last = time.time()

    def write(i, rows):
        nonlocal last
        seconds, last = time.time() - last, time.time()
        cache[prompts[i]] = {"prompt": prompts[i], "responses": [r.tokens for r in rows],
                             "finished": [r.finished for r in rows], "seconds": seconds}
        append_json_line(path, cache[prompts[i]])
        bar.update()

    with progress(total=len(prompts), desc="teacher rollouts", disable=not prompts) as bar:
        sample_shared(teacher, prompts, cfg.rollouts, cfg, (cfg.seed,), write)

def correct_only(groups, problems, tokenizer, verifier=""):
    """The responses with a reward above 0, a list for each problem that has one."""
    pairs = [(response_text(tokenizer, r), p.answer)
             for p, rows in zip(problems, groups) for r in rows]
    verdicts = iter(judge(pairs, verifier))  # a verdict a row, problem by problem
    groups = [[r for r, v in zip(rows, verdicts) if REWARD.get(v, v) > 0] for rows in groups]
    correct = [rows for rows in groups if rows]
    print(f"--only-correct: {sum(map(len, correct))} responses to {len(correct)} of "
          f"{len(problems)} problems kept")
    check(correct, "--only-correct: the teacher solves none of these problems")
    return correct

def worked_example(row):
    """A question, which may be "", and its `response`, `solution` or an assistant's message."""
    texts = [find_text(row.get(name)) for name in ("response", "solution")]
    texts += [find_text(row.get(name), ("assistant", "gpt", "model")) for name in CHATS]
    response = next(filter(None, texts), "")
    check(response, "no response")
    return "" if row.get("problem") == "" else find_question(row), response

def worked_examples(cfg, lm):
    """All rows of --data, a question, a response to it, its stop, as [[Rollout]]."""
    rows, end = [], end_of_turn(lm.tokenizer) or lm.stop_ids[0]  # id 0 is the first of them, too
    for question, response in read_problems(cfg.data, worked_example):
        tokens = lm.tokenizer.encode(response, add_special_tokens=False)
        rows.append(Rollout(build_prompt(lm.tokenizer, question, cfg.thinking),
                            tokens + [end], [], True))
    rows = skip_long(rows, "prompt", "--max-prompt-tokens", cfg.max_prompt_tokens)
    rows = skip_long(rows, "tokens", "--max-new-tokens", cfg.max_new_tokens)
    check_context(lm, cfg, max(len(row.prompt + row.tokens) for row in rows))
    return [[row] for row in rows]

def load_states(cfg, run, teacher, student, data):
    """The loaded teacher (None if no step needs it) and what steps draw from: rows per prompt."""
    if cfg.targets == "data":
        return None, data
    teacher = load_lm(teacher, cfg)
    problems = tokenize_problems(data, cfg, student, teacher)
    groups = teacher_rollouts(cfg, run, teacher, problems)
    if cfg.only_correct:
        run.labels = problems  # all were looked at
        groups = correct_only(groups, problems, teacher.tokenizer, cfg.verifier)
    return teacher if cfg.targets == "soft" else None, groups

def accumulate(cfg, student, teacher, rows, n_tokens):
    """Add the gradient of a micro-batch to the student's, for an update of n_tokens tokens.

    Returns sums over its tokens: of the loss (exact KL, or -log pi_theta(y)), of the entropy.
    """
    hidden, tokens = student.states(rows)  # (N, D), (N,)
    hidden_teacher = None
    if cfg.targets == "soft":
        with torch.no_grad():
            hidden_teacher, _ = teacher.states(rows)
        head_teacher = teacher.head()  # (V, D)

    def chunk(logp, y, h_teacher=None):  # (n, V), (n,), (n, D)
        if cfg.targets == "soft":
            logq = teacher.logits(h_teacher, head_teacher, cfg.temperature).log_softmax(-1)
            loss = forward_kl(logp, logq)  # (n,)
        else:
            loss = -pick(logp, y)
        entropy = -logp.detach().exp().mul_(logp.detach()).sum(-1)
        return loss.sum() / n_tokens, (loss, entropy)

    return over_chunks(chunk, student, hidden, cfg.temperature, cfg.vocab_chunk, y=tokens,
                       h_teacher=hidden_teacher)

def main(cfg):
    check(cfg.temperature > 0, "--temperature must be positive")
    check(cfg.teacher or cfg.targets == "data", f"--targets {cfg.targets} needs a --teacher")
    check(not cfg.cache or cfg.cache.endswith(".jsonl"), "--cache must name a .jsonl file")
    teacher, student = None, describe_lm(cfg.student)
    if cfg.targets == "data":
        check(cfg.half == "all" and not cfg.teacher and not cfg.only_correct,
              "--targets data takes all rows as they are: no --half, --teacher, --only-correct")
        data = worked_examples(cfg, student)
    else:
        teacher = describe_lm(cfg.teacher)
        check_pair(teacher, student, cfg.thinking)
        data = load_problems(cfg)
    run = Run(cfg, parents=[name for name in (cfg.teacher, cfg.student) if name], data=data)
    student = load_lm(student, cfg, train=True)
    teacher, groups = load_states(cfg, run, teacher, student, data)
    steps = count_steps(cfg, len(groups))
    optimizer = make_optimizer(student, cfg)

    for step in run.steps(steps, student, optimizer, teacher):
        indices = batch_indices(len(groups), cfg.prompts, step, cfg.seed)

        # states: cached rollouts of the teacher, d_T
        rows = [row for i in indices for row in groups[i]]

        # loss: the mean over all response tokens of the update, whatever the micro-batches
        run.time("updating")
        n_tokens = sum(len(r.tokens) for r in rows)
        sums = torch.zeros(2, dtype=torch.float64)  # of loss, entropy
        for group in shared_micro_batches(rows, cfg.micro_tokens, student.device):
            sums += accumulate(cfg, student, teacher, [rows[i] for i in group], n_tokens)
        grad_norm = optimizer_step(student, optimizer, cfg, steps)

        loss, entropy = (all_reduce_sum(sums) / n_tokens).tolist()
        name = "kl" if cfg.targets == "soft" else "nll"
        run.log(name, "entropy", "length", **{name: loss}, entropy=entropy,
                grad_norms=[grad_norm], rows=rows, note=f"{name} {loss:.3f} nats a token")
    run.finish()

if __name__ == "__main__":
    run_cli(main, Config, __doc__)
