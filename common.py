"""Plumbing shared by the stage scripts: everything that has no equation of the method in it.

The rule that splits the code: if it has an equation number, or removing it changes the maths, it stands
in the stage script (grpo.py, fkl_warmup.py, opd.py); the rest stands here, in the order in which a
training step uses it:

    1 settings    a dataclass becomes a command line        5 sampler      prompts -> rollouts
    2 models      weights, tokenizer, chat prompt           6 log-probs    rollouts -> (n, V), in chunks
    3 data        any schema -> deduplicated halves         7 optimiser    AdamW on fp32 masters
    4 verifier    response, answer -> right or wrong        8 run folder   metrics, resume, progress

Axes, everywhere: P prompts, K rollouts per prompt, B = P*K rows, T padded time, N response tokens of a
micro-batch, n tokens of a vocabulary chunk, D hidden size, V vocabulary.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------
# 1 settings: a dataclass whose trailing comments are the help texts
# ---------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend; shown as one line, without a stack trace."""


def field_comments(config_class):
    """{field name: (group title, trailing comment)}, read from the source of a Config dataclass.

    A comment line of its own, `# --- title`, opens a group. The comments are the only help texts, so
    that what a reader of the code sees and what `--help` prints cannot drift apart.
    """
    comments, title = {}, "options"
    for line in inspect.getsource(config_class).splitlines():
        if heading := re.match(r"\s*# --- (.*)", line):
            title = heading[1]
        elif field := re.match(r"    (\w+): [^#]*=[^#]*  # (.*)", line):
            comments[field[1]] = (title, field[2])
    return comments


def parse_args(config_class, doc, argv=None):
    """Command line -> Config. Every field is a flag: `max_new_tokens` is `--max-new-tokens`.

    A field without a default is required; bool fields also get `--no-...`; Literal fields are choices.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments, groups = field_comments(config_class), {}
    for field in dataclasses.fields(config_class):
        title, comment = comments[field.name]
        group = groups.setdefault(title, parser.add_argument_group(title))
        required = field.default is dataclasses.MISSING or field.default is None
        shown = "" if required or field.default == "" else f" [default: {field.default}]"
        kind = field.type if get_origin(field.type) is None else str
        options = {"help": comment.replace("%", "%%") + shown, "required": required}
        if not required:
            options["default"] = field.default
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"], options["metavar"] = kind, kind.__name__.upper()
        if get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
            options["metavar"] = "|".join(options["choices"])
        group.add_argument("--" + field.name.replace("_", "-"), **options)
    return config_class(**vars(parser.parse_args(argv)))


def run_cli(main, config_class, doc):
    """Run `main(cfg)`; a user's mistake, a full disk or Ctrl-C ends it with one line."""
    try:
        main(parse_args(config_class, doc))
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --micro-tokens, --vocab-chunk or --sample-rows "
                 "(they change no result), or add --gradient-checkpointing")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from the last saved step")


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------------
# 2 models: weights, tokenizer, stop tokens, chat prompt
# ---------------------------------------------------------------------------------------------------

# Asks for the form that the verifier reads; Qwen's own wording for maths, used in training and evaluation.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass
class LM:
    """A causal language model with what every script needs beside its weights.

    `vocab` is the number of token ids that the tokenizer can produce. Embeddings are often padded beyond it
    (Qwen3: 151,936 rows for 151,669 tokens; Qwen2.5 pads differently per size), so every softmax in this
    project, in the sampler and in the losses alike, is taken over the first `vocab` logits only.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    vocab: int
    stop_ids: list  # sorted ids that end a response
    bf16: bool  # compute in bfloat16 (masters stay fp32)
    saved_dtype: str  # dtype of the folder it came from, and of the folders that we write

    @property
    def device(self):
        return self.model.device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def states(self, rows):
        """Last hidden states at the positions that predict response tokens, and those tokens.

        rows: B Rollouts. Returns (N, D) and (N,), N = sum of response lengths, row after row. Rows are padded
        on the right: under a causal mask no real position can see the padding, so no attention mask is needed,
        and lengths alone decide what counts (never `token != pad`: pad is often eos).
        """
        ids, picked = pad_rows(rows, self.device)
        with self.autocast():
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        b, t = picked
        return hidden[b, t], ids[b, t + 1]

    def head(self):
        """Output embedding rows of the real vocabulary, (V, D); take it once, before the chunk loop."""
        return self.model.get_output_embeddings().weight[: self.vocab]

    def log_probs(self, hidden, head, temperature):
        """log softmax(logits / temperature) in fp32: (n, D), (V, D) -> (n, V)."""
        with self.autocast():
            logits = F.linear(hidden, head)
        return (logits.float() / temperature).log_softmax(-1)


def pad_rows(rows, device):
    """Right-padded ids (B, T) and the index pair (row (N,), time (N,)) of the states before each response token."""
    T = max(len(r.prompt) + len(r.tokens) for r in rows)
    ids = np.zeros((len(rows), T), dtype=np.int64)
    b, t = [], []
    for i, row in enumerate(rows):
        start, stop = len(row.prompt), len(row.prompt) + len(row.tokens)
        ids[i, :stop] = row.prompt + row.tokens
        b += [i] * len(row.tokens)
        t += range(start - 1, stop - 1)  # position j predicts token j + 1
    return torch.from_numpy(ids).to(device), (torch.tensor(b, device=device), torch.tensor(t, device=device))


def load_lm(name, *, device="auto", dtype="auto", train=False, gradient_checkpointing=False):
    """Load a Hugging Face folder or hub name as an LM.

    train=True gives fp32 master weights (transformers would keep the checkpoint's bf16, in which a step of
    1e-6 mostly rounds to nothing); a frozen model is kept in the compute dtype. device: auto, cpu, cuda, ...
    dtype (of the computation): auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16.
    Raises UserError when the model cannot be found or read, or is not one that `states` and `head` describe.
    """
    check(not is_unfinished(name), f"{name} is an unfinished run: it has no weights yet")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    weights = torch.bfloat16 if bf16 and not train else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=weights, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load model {name!r} (neither a local model folder nor one that the hub "
                        f"gives us): {first_line(error)}") from error
    check(tokenizer.chat_template, f"{name}: the tokenizer has no chat template; use an instruct model")
    vocab = max(tokenizer.get_vocab().values()) + 1
    check(vocab <= config.vocab_size, f"{name}: {vocab} tokens, but only {config.vocab_size} embeddings")
    model = model.to(device).train(gradient_checkpointing).requires_grad_(train)
    if gradient_checkpointing:  # transformers checkpoints in train mode only; our models have no dropout
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eos = model.generation_config.eos_token_id  # an id, a list of ids or None: honour them all
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    check(stop_ids, f"{name}: neither generation_config.json nor the tokenizer names a stop token")
    saved = str(config.dtype or torch.float32).removeprefix("torch.")
    lm = LM(name, model, tokenizer, vocab, sorted(stop_ids), bf16, saved)
    check_head(lm)
    return lm


@torch.no_grad()
def check_head(lm):
    """Refuse models whose logits are not `head @ hidden` (logit scaling, soft capping, head bias)."""
    ids = torch.arange(min(8, lm.vocab), device=lm.device)[None]
    with lm.autocast():
        want = lm.model(input_ids=ids).logits[0, :, : lm.vocab].float().log_softmax(-1)
        hidden = lm.model.base_model(input_ids=ids).last_hidden_state[0]
    have = lm.log_probs(hidden, lm.head(), 1.0)
    check(torch.allclose(have, want, atol=1e-2, rtol=1e-2),
          f"{lm.name}: its logits are not output embedding times hidden state; this architecture is not supported")


def check_pair(teacher, student):
    """Refuse a teacher and a student that do not speak the same tokens, saying what differs.

    Both KLs compare the two models token id by token id. Padded embeddings of one tokenizer are fine (see LM).
    """
    t, s = teacher.tokenizer, student.tokenizer
    probe = "What is $1+1$?"
    stops = f"stop tokens {teacher.stop_ids} and {student.stop_ids} have none in common"
    compared = [
        ("vocabulary", t.get_vocab(), s.get_vocab()),
        ("special token bos", t.bos_token_id, s.bos_token_id),
        ("special token eos", t.eos_token_id, s.eos_token_id),
        ("chat template", build_prompt(t, probe, False), build_prompt(s, probe, False)),
        ("chat template with --thinking", build_prompt(t, probe, True), build_prompt(s, probe, True)),
    ]
    differ = [what for what, a, b in compared if a != b]
    if "vocabulary" in differ:
        apart = set(t.get_vocab().items()) ^ set(s.get_vocab().items())
        example = ", ".join(repr(token) for token, _ in sorted(apart)[:3])
        differ[0] += f" ({teacher.vocab} and {student.vocab} tokens; e.g. {example})"
    if not set(teacher.stop_ids) & set(student.stop_ids):
        differ.append(stops)
    check(not differ, f"teacher {teacher.name} and student {student.name} cannot be compared token by token; "
                      f"they differ in: {'; '.join(differ)}")


def build_prompt(tokenizer, problem, thinking):
    """Problem text -> prompt token ids: the one prompt format of training and evaluation.

    One user message, no system prompt (ours: the paper does not state one). `enable_thinking` must be given:
    undefined means on for Qwen3, and off appends an empty think block. `date_string` pins Llama 3's date line,
    which would otherwise change the prompt from day to day. The template writes its own BOS.
    """
    messages = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False,
                                         enable_thinking=thinking, date_string="26 Jul 2024")


def save_lm(lm, out, run_record):
    """Write a Hugging Face folder that any tool can load, in the dtype of the folder that the model came from.

    config.json is written last and also carries `run_record` under the key "run": a folder is a finished
    model exactly when its config.json says so.
    """
    dtype = getattr(torch, lm.saved_dtype)
    state = {name: tensor.to(dtype) for name, tensor in lm.model.state_dict().items()}
    lm.tokenizer.save_pretrained(out)
    lm.model.save_pretrained(out, state_dict=state)
    config = json.loads((Path(out) / "config.json").read_text())
    write_json(Path(out) / "config.json", {**config, "dtype": lm.saved_dtype, "run": run_record})


def fingerprint(lm):
    """A short hash of the weights: 4,096 evenly spaced entries of every tensor. Names a policy in a cache."""
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def first_line(error):
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------------
# 3 data: any schema -> problems; deduplicate, drop contradictions, decontaminate, halve
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    prompt: tuple = ()  # token ids, filled in by `tokenize_problems`


DATA_ALIASES = {  # name: hub dataset[:config]:split
    "dapo": "BytedTsinghua-SIA/DAPO-Math-17k:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
}
# DAPO wraps each bare problem in these two; we keep one prompt format of our own, so both are stripped.
DAPO_PREFIX = re.compile(r"^Solve the following math problem step by step\..*?answer to the problem\.\s*", re.S)
DAPO_SUFFIX = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.\s*$')


def read_rows(source):
    """Rows (dicts) of a data source.

    source: .json / .jsonl / .parquet file, `save_to_disk` folder, folder of such files, an alias
    (dapo, math500, aime24, aime25) or a hub name, `owner/name[:config][:split]`; without a split the only one,
    else train. Raises UserError when it cannot be found or read.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return read_json_rows(path)
    import datasets  # heavy, and local json needs none of it

    datasets.utils.logging.disable_progress_bar()
    try:
        if path.suffix == ".parquet" and path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if path.is_dir():
            if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
                return pick_split(datasets.load_from_disk(str(path)), "", source)
            return pick_split(datasets.load_dataset(str(path)), "", source)
        check(path.suffix not in (".json", ".jsonl", ".parquet"), f"no such data file: {source}")
        name, *rest = DATA_ALIASES.get(source, source).split(":")
        config, split = (rest + ["", ""])[:2] if len(rest) > 1 else ("", *rest, "")[:2]
        return pick_split(datasets.load_dataset(name, config or None), split, source)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load data {source!r} (no such file or folder here, and the hub does not give "
                        f"it to us): {first_line(error)}") from error


def read_json_rows(path):
    """Rows of a .jsonl (one object a line) or .json (one list, or {"data": list}) file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        return rows if isinstance(rows, list) else rows.get("data", [rows])
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def pick_split(dataset, split, source):
    if not hasattr(dataset, "keys"):
        return dataset
    splits = list(dataset.keys())
    split = split or (splits[0] if len(splits) == 1 else "train")
    check(split in splits, f"data {source!r} has no split {split!r}; it has: {', '.join(splits)}")
    return dataset[split]


def to_problem(row, source):
    """One row of any schema that we know -> Problem. Raises UserError when it has no question or no answer.

    Question: `problem`, `question` or `prompt` (text, or a chat of which the user's last message counts).
    Answer: `answer`, `reward_model.ground_truth` or `solution`; of a worked solution what follows `####`,
    else what its last box holds. Field names in any case.
    """
    row = {name.lower(): value for name, value in row.items()}
    question = next((row[f] for f in ("problem", "question", "prompt") if row.get(f)), None)
    if isinstance(question, list):
        question = next((m["content"] for m in reversed(question) if m["role"] == "user"), None)
    answer = row.get("answer")
    if answer is None and isinstance(row.get("reward_model"), dict):
        answer = row["reward_model"].get("ground_truth")
    if answer is None:
        answer = row.get("solution")
    check(isinstance(question, str) and answer is not None,
          f"data {source!r}: a row has no question (problem, question or prompt) or no answer (answer, "
          f"reward_model.ground_truth or solution); its fields: {', '.join(row)}")
    answer = str(answer)
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].replace(",", "")
    elif "\\boxed" in answer:
        answer = extract_answer(answer) or answer
    question = DAPO_SUFFIX.sub("", DAPO_PREFIX.sub("", question))
    return Problem(question.strip(), answer.strip())


def problem_key(text):
    """Text reduced to what makes two problems the same: no case, spaces, dollars, \\left or \\right.

    >>> problem_key("Find $x$ in  $\\\\left(0, 1\\\\right)$.") == problem_key("find x in (0,1).")
    True
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"\\left|\\right|\\[,;!: ]|[\s$]", "", text)


def deduplicate(problems, counts):
    """One Problem per question; a question with contradicting answers is dropped. counts is added to."""
    answers, kept = {}, {}
    for item in problems:
        key = problem_key(item.problem)
        counts["rows"] += 1
        kept.setdefault(key, item)
        answers.setdefault(key, {})[item.answer] = None
    unique = {}
    for key, found in answers.items():
        first, *others = found
        if all(answers_equal(first, other) for other in others):
            unique[key] = kept[key]
        else:
            counts["contradicting answers"] += 1
    counts["duplicates"] += counts["rows"] - len(kept)
    return unique


def load_problems(source, *, half="all", exclude="", split_seed=0, say=print):
    """Problems of a data source: deduplicated, without contradictions, decontaminated, then split.

    source, exclude: what `read_rows` takes; exclude may be several, separated by commas ("" or "none" for
    none), and no problem of theirs stays. half: "1", "2" or "all". The halves depend on the problems' texts and
    split_seed alone (rank of a hash), not on row order or duplicates. Returns a list of Problem in that order;
    `say` gets one line of counts. Raises UserError when nothing is left.
    """
    counts = Counter()
    unique = deduplicate((to_problem(row, source) for row in read_rows(source)), counts)
    for name in [] if exclude in ("", "none") else exclude.split(","):
        try:
            banned = {problem_key(to_problem(row, name).problem) for row in read_rows(name)}
        except UserError as error:
            raise UserError(f"--exclude {name}: {error} (--exclude none trains without this check)") from error
        counts["in an evaluation set"] += len(banned & unique.keys())
        unique = {key: item for key, item in unique.items() if key not in banned}
    order = sorted(unique, key=lambda key: hashlib.sha256(f"{split_seed}:{key}".encode()).digest())
    cut = {"all": slice(None), "1": slice(len(order) // 2), "2": slice(len(order) // 2, None)}[half]
    chosen = [unique[key] for key in order[cut]]
    dropped = ", ".join(f"{counts[w]} {w}" for w in counts if w != "rows" and counts[w]) or "nothing"
    say(f"{source}: {counts['rows']} rows, dropped {dropped}; {len(order)} problems, "
        f"{'all' if half == 'all' else 'half ' + half}: {len(chosen)}")
    check(chosen, f"data {source!r} (half {half}) holds no problem")
    return chosen


def tokenize_problems(problems, tokenizer, *, thinking, max_prompt_tokens, say=print):
    """Fill in the prompt ids; problems with a longer prompt than the limit are counted and skipped."""
    prompts = (tuple(build_prompt(tokenizer, p.problem, thinking)) for p in problems)
    filled = [dataclasses.replace(p, prompt=ids) for p, ids in zip(problems, prompts)]
    kept = [p for p in filled if len(p.prompt) <= max_prompt_tokens]
    if len(kept) < len(filled):
        say(f"skipped {len(filled) - len(kept)} problems with prompts over {max_prompt_tokens} tokens")
    check(kept, f"every prompt is longer than --max-prompt-tokens {max_prompt_tokens}")
    return kept


def batch_indices(n_items, per_step, step, seed):
    """Which items step number `step` (from 0) trains on: a pure function, so there is no iterator to save.

    Every epoch is a new permutation; what does not fill a last batch waits for the next epoch, so that no item
    stands in one batch twice. Raises UserError when n_items < per_step.

    >>> batch_indices(4, 2, 0, seed=0) + batch_indices(4, 2, 1, seed=0)
    [2, 0, 1, 3]
    """
    check(n_items >= per_step, f"--prompts {per_step} a step, but there are only {n_items} problems")
    epoch, i = divmod(step, n_items // per_step)
    order = np.random.default_rng([seed, epoch]).permutation(n_items)
    return order[i * per_step : (i + 1) * per_step].tolist()


def encode_examples(source, lm, *, thinking, max_prompt_tokens):
    """Rows with a question and a `response` (else `solution`) -> [[Rollout]], for SFT on data as it is.

    Nothing is deduplicated. The response gets the eos token as its end.
    """
    groups = []
    for row in read_rows(source):
        question = next((row[f] for f in ("problem", "question", "prompt") if f in row), None)
        response = row.get("response") or row.get("solution")
        check(isinstance(question, str) and response,
              f"data {source!r}: a row has no question (problem, question or prompt: text) or no response "
              f"(response or solution); its fields: {', '.join(row)}")
        prompt = build_prompt(lm.tokenizer, question, thinking)
        tokens = lm.tokenizer.encode(response, add_special_tokens=False) + [lm.tokenizer.eos_token_id]
        if len(prompt) <= max_prompt_tokens:
            groups.append([Rollout(prompt, tokens, [], True)])
    check(groups, f"data {source!r} holds no example within --max-prompt-tokens {max_prompt_tokens}")
    return groups


def count_steps(steps, epochs, n_items, per_step):
    """Number of updates: `steps` if positive, else that many epochs of n_items."""
    return steps if steps > 0 else max(1, epochs * (n_items // per_step))


# ---------------------------------------------------------------------------------------------------
# 4 verifier: response, answer -> right or wrong
# ---------------------------------------------------------------------------------------------------
def extract_answer(response):
    m = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", response)
    return m[-1] if m else None


def answers_equal(a, b):
    a, b = a.replace(" ", ""), b.replace(" ", "")
    return a == b


def grade(response, answer):
    got = extract_answer(response)
    return "no_answer" if got is None else "correct" if answers_equal(got, answer) else "wrong"


def verify(response, answer):
    return grade(response, answer) == "correct"


# ---------------------------------------------------------------------------------------------------
# 5 sampler: prompts -> rollouts
# ---------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One response: token ids, what the sampler thought of them, and whether it ended by a stop token."""

    prompt: list  # token ids
    tokens: list  # token ids; the stop token, when there is one, is the last and is trained on
    logp: list  # log pi(token) at sampling time, one float a token, at the sampling temperature
    finished: bool  # False: cut at max_new_tokens


BLOCK = 8  # tokens between two looks at which rows have ended (each look waits for the device)


@torch.no_grad()
def sample(lm, prompts, k, *, max_new_tokens, temperature, seed, sample_rows=256, samples=None):
    """Sample k rollouts of each prompt from softmax(logits / temperature); temperature 0 is greedy.

    prompts: P lists of token ids. Returns P*k Rollouts, prompt by prompt. This is exactly the policy that the
    losses differentiate: no top-k, no top-p, nothing taken from generation_config but the stop tokens.
    seed: a tuple of ints. A rollout's random numbers are a function of (seed, prompt, sample index) alone, so
    it does not depend on its neighbours in the batch. samples: the k sample indices, default 0..k-1.
    At most about sample_rows rows are decoded at once (memory and speed only).
    """
    samples = list(range(k)) if samples is None else samples
    per_batch = max(1, sample_rows // k)
    rollouts = []
    with lm.autocast():  # one context for the whole call, so that bf16 copies of the weights are made once
        for i in range(0, len(prompts), per_batch):
            batch = [list(p) for p in prompts[i : i + per_batch]]
            streams = [random_stream(seed, p, s) for p in batch for s in samples]
            rollouts += decode_batch(lm, batch, k, streams, max_new_tokens, temperature)
    return rollouts


def random_stream(seed, prompt, sample):
    """Generator of the uniforms of one rollout; a counter-based generator keyed by a hash of its identity."""
    digest = hashlib.blake2b(repr((tuple(seed), tuple(prompt), sample)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def decode_batch(lm, prompts, k, streams, max_new_tokens, temperature):
    """Prefill each prompt once, repeat its cache k times, decode; rows that have ended leave the batch."""
    B, T, device = len(prompts) * k, max(map(len, prompts)), lm.device
    ids = torch.zeros(len(prompts), T, dtype=torch.long)
    mask = torch.zeros(len(prompts), T + max_new_tokens, dtype=torch.long)
    for i, prompt in enumerate(prompts):  # left padding: all rows decode at the same column
        ids[i, T - len(prompt) :] = torch.tensor(prompt)
        mask[i, T - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    start = (mask[:, :T].cumsum(-1) - 1).clamp(min=0)  # positions count real tokens only
    stop = torch.tensor(lm.stop_ids, device=device)
    base, head, cache = lm.model.base_model, lm.head(), DynamicCache()
    hidden = base(input_ids=ids, attention_mask=mask[:, :T], position_ids=start,
                  past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    cache.batch_repeat_interleave(k)
    hidden, mask = hidden.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
    position = start[:, -1].repeat_interleave(k, 0)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    alive = torch.arange(B, device=device)  # row of the result that each row of the batch belongs to
    for t in range(max_new_tokens):
        if t % BLOCK == 0:
            keep = (~ended[alive]).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                cache.batch_select_indices(keep)
                alive, hidden, mask, position = alive[keep], hidden[keep], mask[keep], position[keep]
            draws = np.stack([streams[row].random(BLOCK) for row in alive.tolist()])
            uniforms = torch.from_numpy(draws).to(device)  # (rows, BLOCK) float64
        logp = lm.log_probs(hidden, head, temperature or 1.0)  # (rows, V)
        token = inverse_cdf(logp, uniforms[:, t % BLOCK]) if temperature else logp.argmax(-1)
        tokens[alive, t] = token
        logps[alive, t] = logp.gather(-1, token[:, None]).squeeze(-1)
        ended[alive] |= torch.isin(token, stop)
        if t + 1 < max_new_tokens:
            position = position + 1
            hidden = base(input_ids=token[:, None], attention_mask=mask[:, : T + t + 1],
                          position_ids=position[:, None], past_key_values=cache,
                          use_cache=True).last_hidden_state[:, -1]
    return cut_at_stop([p for p in prompts for _ in range(k)], tokens, logps, stop)


def inverse_cdf(logp, uniform):
    """Draw from (rows, V) log-probs with one uniform in [0, 1) a row: the first token whose CDF exceeds it.

    The CDF is summed in float64: in fp32 it would swallow rare tokens, of which a large vocabulary has many.
    A token of probability 0 is never drawn.
    """
    cdf = logp.exp().double().cumsum(-1)
    target = uniform[:, None].to(cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=logp.shape[-1] - 1)


def cut_at_stop(prompts, tokens, logps, stop):
    """(B, max_new_tokens) tensors -> Rollouts that end with their first stop token, which is kept."""
    is_stop = torch.isin(tokens, stop)
    finished = is_stop.any(-1)
    lengths = torch.where(finished, is_stop.int().argmax(-1) + 1, tokens.shape[1])
    columns = zip(prompts, tokens.tolist(), logps.tolist(), lengths.tolist(), finished.tolist())
    return [Rollout(p, tok[:n], lp[:n], done) for p, tok, lp, n, done in columns]


# ---------------------------------------------------------------------------------------------------
# 6 log-probs: rollouts -> micro-batches -> chunks of (n, V)
# ---------------------------------------------------------------------------------------------------


def micro_batches(rows, micro_tokens):
    """Split row indices so that a padded micro-batch holds at most micro_tokens tokens (or one row).

    Rows are sorted by length to waste little padding. Memory and speed only: the losses divide by counts of
    the whole update, so no split changes a gradient.
    """
    lengths = [len(r.prompt) + len(r.tokens) for r in rows]
    groups = []
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= micro_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def over_chunks(fn, chunk, *tensors):
    """fn over blocks of `chunk` rows of (N, ...) tensors, results concatenated along dim 0.

    fn goes from hidden states to a few numbers per token through (n, V) log-probs. The backward pass computes
    each block again instead of storing it, so (N, V) never exists: memory is bounded by chunk * V.
    """
    blocks = zip(*(t.split(chunk) for t in tensors))
    return torch.cat([checkpoint(fn, *b, use_reentrant=False, preserve_rng_state=False) for b in blocks])


def rollout_stats(rows):
    """What every stage logs of its rollouts: mean length in tokens, share cut at the limit, tokens in all."""
    lengths = [len(r.tokens) for r in rows]
    return {"length": sum(lengths) / len(rows), "truncated": sum(not r.finished for r in rows) / len(rows),
            "tokens": sum(lengths)}


def flat(values, rows, device):
    """One value a row (B,) -> one a response token (N,), in the order of `LM.states`."""
    lengths = torch.tensor([len(r.tokens) for r in rows], device=device)
    return torch.as_tensor(values, dtype=torch.float32, device=device).repeat_interleave(lengths)


# ---------------------------------------------------------------------------------------------------
# 7 optimiser
# ---------------------------------------------------------------------------------------------------


def make_optimizer(lm, cfg, steps):
    """AdamW over the fp32 masters (tied weights once) and its schedule: linear warmup, then constant or linear."""
    parameters = list(lm.model.parameters())
    check(all(p.dtype == torch.float32 for p in parameters), "optimizer parameters must be fp32")
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, cfg.adam_beta2),
                                  weight_decay=cfg.weight_decay, fused=lm.device.type == "cuda")

    def factor(update):  # of the learning rate at update number `update`, from 0
        decay = 1 - update / steps if cfg.lr_schedule == "linear" else 1.0
        return min(1.0, (update + 1) / max(1, cfg.warmup_steps)) * max(0.0, decay)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def optimizer_step(lm, optimizer, scheduler, grad_clip):
    """Clip the gradient's norm, update, zero the gradients. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), grad_clip)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ---------------------------------------------------------------------------------------------------
# 8 run folder: settings, metrics, resume, progress
# ---------------------------------------------------------------------------------------------------

# These fields change memory, speed or place, never a result: a run may be resumed with other values.
FREE_FIELDS = {"out", "device", "micro_tokens", "vocab_chunk", "sample_rows", "gradient_checkpointing",
               "save_every", "show_every"}


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def append_json_line(path, value):
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_json_lines(path):
    """Objects of a file that `append_json_line` wrote, [] when there is none.

    A last line without its end (the writer was killed) is cut off the file, so that appending can go on.
    """
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return read_json_rows(path)


def read_record(folder):
    """The "run" record in a folder's config.json, or {} when there is none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()).get("run", {}) if path.is_file() else {}


def is_unfinished(folder):
    record = read_record(folder)
    return bool(record) and not record["finished"]


def git_revision():
    """Commit of this code, with "+changes" when the working tree differs from it; "unknown" without git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), *words],
                              capture_output=True, text=True).stdout.strip()
    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return (revision + ("+changes" if git("status", "--porcelain", "-uno") else "")) or "unknown"
    except OSError:
        return "unknown"


def compared_settings(cfg):
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE_FIELDS}


def progress(*args, **kwargs):
    """tqdm; when the screen is a log file it writes a line every ten seconds only."""
    return tqdm(*args, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10, maxinterval=60, **kwargs)


class Run:
    """An output folder while a stage writes to it, and the stage's progress on the screen.

    config.json (record of the run; with the model's own keys once it is finished), metrics.jsonl (one line a
    step), state.pt (fp32 weights, optimiser and step, while unfinished), then the model folder. Opening the
    folder of a finished run with the same settings ends the program; other settings are refused.
    """

    def __init__(self, cfg, parents, labels=None):
        """parents: model folders or names that this run starts from; labels: {source: labelled problems used}."""
        self.cfg, self.out, self.warned = cfg, Path(cfg.out), False
        self.seconds_before = 0.0  # work done for this run outside its steps (a teacher's rollouts)
        old = read_record(self.out)
        settings = compared_settings(cfg)
        if old:
            keys = sorted(set(settings) | set(old["settings"]))
            new, was = ([d.get(k) for k in keys] for d in (settings, old["settings"]))
            differ = [f"{k} was {b!r}, is now {a!r}" for k, a, b in zip(keys, new, was) if a != b]
            check(not differ, f"{self.out} holds a run with other settings ({'; '.join(differ)}); "
                              "choose another --out or delete it")
            if old["finished"]:
                print(f"{self.out}: already finished with these settings")
                sys.exit(0)
        check(not (self.out / "config.json").exists() or old,
              f"{self.out} holds a model that this program did not write; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        self.record = {
            "command": shlex.join(sys.argv), "settings": settings, "git": git_revision(), "finished": False,
            "versions": {"python": platform.python_version(), **versions},
            "parents": [str(p) for p in parents], "labels": labels or {}}
        write_json(self.out / "config.json", {"run": self.record})

    def resume(self, lm, optimizer, scheduler):
        """Load the last saved state, if there is one; returns the step to start with."""
        path, start = self.out / "state.pt", 0
        if path.exists():
            state = torch.load(path, map_location=lm.device, weights_only=True)
            lm.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            start = state["step"]
            print(f"{self.out}: continuing after step {start}")
        lines = self.out / "metrics.jsonl"
        old = lines.read_text().splitlines(keepends=True)[:start] if lines.exists() else []
        lines.write_text("".join(old))
        return start

    def steps(self, start, total):
        """Step numbers start..total-1 behind a progress bar."""
        self.total = total
        self.bar = progress(range(start, total), initial=start, total=total, desc=self.out.name, unit="step")
        for step in self.bar:
            self.step_started = time.time()
            yield step

    def log(self, step, *bar_keys, **metrics):
        """Append one line {"step", metrics, "seconds"} to metrics.jsonl; show bar_keys in the progress bar."""
        seconds = time.time() - self.step_started
        metrics |= {"tokens_per_second": metrics["tokens"] / seconds, "seconds": seconds}
        line = {"step": step, **{k: sig(v) for k, v in metrics.items()}}
        append_json_line(self.out / "metrics.jsonl", line)
        self.bar.set_postfix({k: line[k] if line[k] is None else f"{line[k]:.3g}" for k in bar_keys}, refresh=False)
        if metrics["truncated"] > 0.5 and not self.warned:
            self.warned = True
            self.bar.write(f"warning: {metrics['truncated']:.0%} of the responses were cut at the limit; is "
                           "--max-new-tokens too small, or does the model not know when to stop?")

    def show(self, step, lm, rollout, note):
        """Print one decoded rollout every show_every steps, above the progress bar."""
        if self.cfg.show_every and step % self.cfg.show_every == 0:
            text = lm.tokenizer.decode(rollout.prompt) + " → " + lm.tokenizer.decode(rollout.tokens)
            self.bar.write(f"[{self.out.name}, step {step}, {note}] {shorten(text)}")

    def save_state(self, step, lm, optimizer, scheduler):
        """Every save_every steps: what the next step depends on, written to a temporary name and renamed."""
        if not self.cfg.save_every or (step + 1) % self.cfg.save_every or step + 1 == self.total:
            return
        state = {"model": lm.model.state_dict(), "optimizer": optimizer.state_dict(),
                 "scheduler": scheduler.state_dict(), "step": step + 1}
        torch.save(state, self.out / "state.pt.tmp")
        os.replace(self.out / "state.pt.tmp", self.out / "state.pt")

    def finish(self, lm):
        """Write the model folder; the record says how many seconds and steps the run took."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        self.record |= {"finished": True, "steps": len(lines),
                        "seconds": sig(self.seconds_before + sum(line["seconds"] for line in lines))}
        save_lm(lm, self.out, self.record)
        (self.out / "state.pt").unlink(missing_ok=True)
        print(f"{self.out}: {len(lines)} steps, {self.record['seconds']:.0f} s, model saved")


def sig(value):
    """A number with six significant digits; ints stay ints, non-finite numbers become None (JSON has none)."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def shorten(text, limit=600):
    """Long text with its middle left out, on one line."""
    text = text.replace("\n", "⏎")
    return text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


class Timer:
    """Seconds per named part of a step: `timer("sampling")` ends the part before it and starts the next.

    >>> timer = Timer(); timer("sampling"); timer("updating"); sorted(timer.stop())
    ['seconds_sampling', 'seconds_updating']
    """

    def __init__(self):
        self.seconds, self.name, self.since = {}, None, 0.0

    def __call__(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.name:
            key = f"seconds_{self.name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + now - self.since
        self.name, self.since = name, now

    def stop(self):
        self(None)
        return self.seconds
