"""What the stage scripts share: everything that has no equation of the method in it.

If it has an equation number, or removing it changes the maths, it stands in the stage script. The
rest stands here, in nine sections, in the order in which a training step uses it.

Axes, everywhere: P prompts, K rollouts per prompt, B = P*K rows, T padded time, N response tokens
of a micro-batch, n tokens of a vocabulary chunk, D hidden size, V vocabulary.
"""

import argparse, contextlib, copy, csv, dataclasses, datetime, fcntl, functools, glob, gzip
import hashlib, inspect, io, itertools, json, logging, math, operator, os, pickle, re, runpy
import shlex, shutil, signal, subprocess, sys, threading, time, unicodedata, warnings, zlib
from collections import Counter, deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
import transformers
from mpmath import MPContext
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints of one process

# ---------- 1 settings: a dataclass whose trailing comments are the help texts --------------------
class UserError(Exception):
    """A mistake that the user can mend; shown as one line, without a stack trace."""

def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)

@dataclass
class StageConfig:
    """The flags that all three stages have; each stage's Config adds its own."""
    # --- models and data
    data: str = "dapo"  # problems, DAPO-Math-17K (Table 1): file, folder, hub name or alias
    half: Literal["1", "2", "all"] = "all"  # which half of the deduplicated problems (Table 1)
    exclude: str = "math500,aime24,aime25"  # ours: sets whose problems are dropped, or none
    labels: int = 0  # ours: use only so many problems, halves are of these; 0 is all
    split_seed: int = 0  # ours: of --labels and --half; keep it over a whole recipe
    verifier: str = ""  # ours: FILE.py: deterministic verify(response, answer) -> reward, not maths
    # --- ours
    seed: int = 0  # ours: of prompt order and sampling
    thinking: bool = False  # ours: Qwen3's thinking mode
    weight_decay: float = 0.0  # ours: AdamW's decoupled decay
    adam_beta2: float = 0.999  # ours: AdamW's beta2
    lr_schedule: Literal["constant", "linear"] = "constant"  # ours: linear decays to 0
    warmup_steps: int = 0  # ours: updates of linear learning-rate warmup
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # ours: compute; auto: bf16 where a GPU has it
    # --- memory, speed and display only: they change no result beyond rounding
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    micro_tokens: int = 0  # padded tokens of a micro-batch; 0: 32,768 on a GPU, 1,024 on a CPU
    vocab_chunk: int = 0  # tokens whose (n, V) log-probs exist at once; 0: 256 MiB, on a CPU 16
    sample_rows: int = 256  # rows decoded at once
    kv_gib: float = 0.0  # GiB of the sampler's keys and values; 0: what the device can spare
    sample_parts: int = 0  # processes that share one copy while sampling; 0: as few as have room
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    save_every: int = 50  # steps between checkpoints; 0: only one when it is told to stop
    show_every: int = 10  # steps between printed rollouts; 0 is never

AT_LEAST_1 = {"epochs", "mini_batch", "prompts", "rollouts", "samples", "sample_rows",
              "max_new_tokens", "max_prompt_tokens"}  # no other number may be negative

def field_comments(config_class):
    """{field name: (title, comment)} from the source of a Config; `# --- title` opens a group."""
    comments, title = {}, "options"
    for base in config_class.__mro__[-2::-1]:  # all but object, the oldest first
        text = inspect.getsource(sys.modules[base.__module__])  # of the class alone it is slow
        for line in re.search(rf"(?ms)^class {base.__name__}\b.*?(?=^\S|\Z)", text)[0].split("\n"):
            if heading := re.match(r"\s*# --- (.*)", line):
                title = heading[1]
            elif field := re.match(r"    (\w+): .*?=.*?\s#\s*(\S.*)", line):
                comments[field[1]] = (title, field[2])
    return comments

def parse_args(config_class, doc, argv=None):
    """Command line -> Config. Every field is a flag: `max_new_tokens` is `--max-new-tokens`; the
    default None makes it required. Raises UserError for an unknown flag or a refused value."""
    comments, groups = field_comments(config_class), {}
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: check(False, f"{message} (--help lists the flags)")
    own = config_class.__annotations__  # the script's own flags come before those of all stages
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        check(field.name in comments, f"Config.{field.name} has no `# help text` in its line")
        (title, comment), default = comments[field.name], field.default
        group = groups.setdefault(title, parser.add_argument_group(title))
        shown = "" if default in (None, "") else f" [default: {default}]"
        options = {"help": comment.replace("%", "%%") + shown, "default": default}
        options |= ({"action": argparse.BooleanOptionalAction} if field.type is bool else
                    {"choices": get_args(field.type)} if get_origin(field.type) is Literal else
                    {"type": field.type, "metavar": field.type.__name__.upper()})
        group.add_argument("--" + field.name.replace("_", "-"), required=default is None, **options)
    cfg = config_class(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        least = int(name in AT_LEAST_1)
        check(isinstance(value, str) or least <= value < 2**32,
              f"--{name.replace('_', '-')} {value} is not in [{least}, 2^32)")
    check(getattr(cfg, "adam_beta2", 0) < 1, "--adam-beta2 must be below 1")
    check(getattr(cfg, "grad_clip", 1) > 0, "--grad-clip must be positive")
    return cfg

def on_stop(handler):
    """From now on SIGTERM and Ctrl-C call handler(signal number, frame)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

def stop_at_once(number, _frame=None, note=""):
    """Signal handler: raise KeyboardInterrupt, which `run_cli` turns into one line."""
    raise KeyboardInterrupt(number, note)

def run_cli(main, config_class, doc):
    """Run main(cfg). A user's mistake, a full disk or a signal ends it with one line; the status is
    1, or 128 + the signal. Rank 0 speaks at once, the others wait for torchrun to end them."""
    status, wait = 1, 5 if "RANK" in os.environ else 0  # seconds
    on_stop(stop_at_once)
    try:
        cfg = parse_args(config_class, doc)
        with process_group(cfg.device):
            return main(cfg)
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:  # a full disk, a file without permission
        message = f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except torch.OutOfMemoryError:
        message = ("error: out of GPU memory: lower --micro-tokens, --vocab-chunk or --kv-gib, "
                   "or add --gradient-checkpointing (they change no result beyond rounding)")
    except KeyboardInterrupt as stop:
        number, note = stop.args
        status, message = 128 + number, (f"stopped by {signal.Signals(number).name}{note}; the "
                                         "same command goes on from what is saved")
    except Exception:  # a defect; or another process has ended, whose message comes first
        on_stop(signal.SIG_DFL)
        time.sleep(wait)
        raise
    on_stop(signal.SIG_DFL)  # torchrun ends those that wait without a word of theirs
    time.sleep(wait * (os.environ.get("RANK") != "0"))
    print(message, file=sys.stderr)
    sys.exit(status)

# ---------- 2 models: weights, tokenizer, stop tokens, chat prompt --------------------------------
# Asks for the form that the verifier reads. ours: Qwen's own wording for mathematics.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
UNUSABLE = "{!r} cannot be used, take a whole, text-only, causal model"

@dataclass
class LM:
    """A causal language model with what every script needs beside its weights."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    vocab: int  # ids of the tokenizer; embeddings beyond it are padding, which no softmax sees
    stop_ids: list  # sorted ids that end a response
    saved_dtype: str  # of the folder that it came from, and of those that we write
    context: float = math.inf  # positions that it knows, for prompt and response
    bf16: bool = False  # compute in bfloat16 (masters stay fp32)
    recompute: bool = False  # gradient checkpointing
    replica: torch.nn.Module = None  # of a sharded model: the same modules without weights
    parts: int = 1  # processes that share one copy of the weights while they sample

    @property
    def device(self):
        return (self.replica or self.model).device
    @property
    def body(self):  # the model without its head
        return getattr(self.model, "sharded_body", self.model.base_model)
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def states(self, rows):
        """Last hidden states that predict the response tokens, and those tokens: (N, D), (N,).
        rows: B Rollouts; N = sum of their response lengths, row after row. Padding is on the right,
        where no real position sees it. No rows are one token of padding: `shared_micro_batches`."""
        ids = [torch.tensor(r.prompt + r.tokens) for r in rows] or [torch.tensor([0])]
        ids = pad_sequence(ids, batch_first=True).to(self.device)  # (B, T)
        states = [(i, len(r.prompt) - 1 + j)  # position t predicts token t + 1
                  for i, r in enumerate(rows) for j in range(len(r.tokens))]
        b, t = torch.tensor(states, dtype=torch.long, device=self.device).view(-1, 2).T
        self.model.train(self.recompute and torch.is_grad_enabled())  # see `load_lm`
        with self.autocast():
            hidden = self.body(input_ids=ids, use_cache=False)[0]  # (B, T, D)
        return hidden[b, t], ids[b, t + 1]

    def head(self):
        """Output embedding, (V, D), a constant; in bf16 V is rounded up to 8s, if rows are left."""
        weight = self.model.get_output_embeddings().weight.detach()
        return weight[: -(-self.vocab // 8) * 8].bfloat16() if self.bf16 else weight[: self.vocab]

    def chunk_size(self, chunk, D):
        """Tokens of a vocabulary chunk; 0 is 256 MiB of fp32 logits, on a CPU 16 (its caches), but
        there enough tokens for each pass over the head (V, D) to pay."""
        mib, least = (16, min(D // 2, 256)) if self.device.type == "cpu" else (256, 1)
        return chunk or max((mib << 20) // (4 * self.vocab), least)

    def logits(self, hidden, head, temperature):
        """logits / temperature in fp32: (n, D), (V, D) -> (n, V)."""
        with self.autocast():
            logits = F.linear(hidden, head)[:, : self.vocab].float()
        return logits if temperature == 1 else logits / temperature

    @torch.no_grad()
    def token_logp(self, hidden, tokens, temperature, chunk):
        """log pi(y_t|s_t) as a constant: (N, D), (N,) -> (N,), `chunk` tokens at once (0: auto)."""
        head, chunk = self.head(), self.chunk_size(chunk, hidden.shape[-1])
        blocks = zip(hidden.split(chunk), tokens.split(chunk))
        return torch.cat([pick(self.logits(h, head, temperature).log_softmax(-1), y)
                          for h, y in blocks])

def pick(logp, tokens):
    """The entries of these tokens: (n, V), (n,) -> (n,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)

def describe_lm(name):
    """An LM of a Hugging Face folder or hub name without its weights (model is None). Raises
    UserError if it cannot be found, is unfinished, or lacks what every script needs."""
    find = functools.partial(transformers.utils.cached_file, name,  # a file's path or None
                             _raise_exceptions_for_missing_entries=False)
    with errors_as_one_line(UNUSABLE.format(name)):
        check(read_record(name).get("finished", True), "an unfinished run, without weights yet")
        check(not find("adapter_config.json"), "an adapter; merge it first (merge_and_unload)")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
        check(not getattr(config, "quantization_config", None), "quantized; take the bf16 weights")
        kind = transformers.PreTrainedTokenizerFast if find("tokenizer.json") else AutoTokenizer
        tokenizer = kind.from_pretrained(name, trust_remote_code=False)  # whatever a config names
        vocab = max(tokenizer.get_vocab().values()) + 1
        check(vocab <= config.vocab_size, f"{vocab} tokens but {config.vocab_size} embeddings")
        eos = find("generation_config.json") and GenerationConfig.from_pretrained(name).eos_token_id
        stop_ids = {end_of_turn(tokenizer), tokenizer.eos_token_id, *np.ravel(eos).tolist()}
        stop_ids |= {i for i in np.ravel(config.eos_token_id).tolist()  # a default may be text
                     if i is not None and re.match(r"[<\[].", tokenizer.decode(i))}
        check(stop_ids - {None}, "no stop token; set eos_token_id in its generation_config.json")
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        slides = set(getattr(config, "layer_types", None) or ["sliding"]) != {"full_attention"}
        limits = ["max_position_embeddings"] + ["sliding_window", "attention_chunk_size"] * slides
        context = min(getattr(config, limit, None) or math.inf for limit in limits)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):  # a longer row changes all angles
            context = min(context, rope.get("original_max_position_embeddings", context) - BLOCK)
    return LM(name, None, tokenizer, vocab, sorted(stop_ids - {None}), dtype, context)

def check_context(lm, cfg, longest):
    """Raise UserError if `longest` tokens, a prompt and its response, are more than lm knows."""
    over = longest - lm.context
    check(over <= 0, f"{lm.name} knows {lm.context} positions (sliding_window counts), a prompt and"
          f" its response take {longest}: lower --max-new-tokens {cfg.max_new_tokens} by {over}")

@contextlib.contextmanager
def errors_as_one_line(problem):
    """Turn what we or the libraries raise into a UserError: the problem, then its cause."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, dist.DistError)) or "gloo" in str(error):
            raise  # another process has ended: that one has the message
        what = error if isinstance(error, UserError) else repr(error.__cause__ or error)
        raise UserError(f"{problem}: {getattr(error, 'strerror', 0) or what!s:.300}") from error

def load_lm(name, cfg, train=False, shard=True):
    """Load an LM, by its name or as described, sharded if shard=True or lm.parts > 1.
    train=True gives fp32 masters, because in bf16 an update of 1e-6 mostly rounds to nothing; a
    frozen model has the compute dtype. Raises UserError for what cannot be loaded or used."""
    lm = dataclasses.replace(name if isinstance(name, LM) else describe_lm(name))
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with errors_as_one_line(f"--device {device}"):  # "cuda" is what `process_group` chose
        device = torch.empty(0, dtype=torch.float64, device=device).device  # mps has no float64
    lm.bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and has_bf16(device))
    if cfg.dtype == "auto" and device.type == "cuda" and not lm.bf16:
        print(f"{lm.name}: computed in fp32, because this GPU has no bf16")
    dtype = torch.bfloat16 if lm.bf16 and not train else torch.float32
    shard = shard and world_size() > 1
    with errors_as_one_line(UNUSABLE.format(lm.name)):
        with torch.device("meta"):  # shapes only
            lm.model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(lm.name), dtype=dtype, attn_implementation="ours")
        lm.parts = on_rank_0(count_parts, lm, cfg, device)
        if shard or lm.parts > 1:  # rank 0 reads the weights, in the files' dtype
            source = read_weights(lm.name, "auto") if rank() == 0 else None
        else:
            lm.model = read_weights(lm.name, dtype).to(device)
        lm.model.eval().requires_grad_(train)
        fuse_norms(lm.model, device)
        if train and cfg.gradient_checkpointing:  # it works in train mode only; without dropout
            lm.recompute, old_name = True, getattr(lm.model, "gradient_checkpointing_enable", None)
            getattr(lm.model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
        if shard or lm.parts > 1:
            shard_model(lm, source, device)
        check_architecture(lm, sampled=train or not shard)
    return lm

def fuse_norms(model, device):
    """On CUDA, let one kernel in place of eight compute each RMSNorm of Llama's form (others have
    other names)."""
    def norm(module, x):
        dtype = torch.promote_types(x.dtype, module.weight.dtype)  # the kernel takes one
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(dtype), module.weight.to(dtype)
            return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)
    for module in model.modules() if device.type == "cuda" else ():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(norm, module)

def has_bf16(device):
    """Whether it is a GPU that has bf16 and its attention kernel; older ones have neither."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

def read_weights(name, dtype):
    """The model itself, on the CPU. Raises UserError, too, if it is incomplete or not finite."""
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, attn_implementation="ours", output_loading_info=True)
    bad = set(info["missing_keys"])  # transformers would put random numbers in their place
    bad |= {n for n, p in model.named_parameters() if not sum(p.aminmax()).isfinite()}
    check(not bad, f"{len(bad)} tensors missing, NaN or inf, e.g. {min(bad, default='')}")
    return model

@torch.no_grad()
def check_architecture(lm, sampled):
    """Raise UserError if the logits are not head times hidden state (scaled, soft-capped or biased
    ones), or, with sampled=True, if the sampler's log-probs are not those that training sees."""
    ids = torch.arange(min(8, lm.vocab), device=lm.device)[None]
    with lm.autocast():
        want = lm.model(input_ids=ids).logits[0, :, : lm.vocab].float()
        have = lm.logits(lm.body(input_ids=ids)[0][0], lm.head(), 1)
    rounding = (2**-6 if lm.bf16 else 1e-4) * want.abs().max()  # bf16 has 8 bits
    check((have - want).abs().max() <= rounding, "its logits are not head times hidden state")
    if sampled:
        n = 3 * BLOCK if lm.device.type in RECORDS and lm.context >= 4 * BLOCK else 4
        with gathered(dataclasses.replace(lm, stop_ids=[])) as full:
            row, = sample(full, ids.tolist(), 1, max_new_tokens=n, temperature=1.0, seed=(0,))
        gap = lm.token_logp(*lm.states([row]), 1.0, 4).cpu() - torch.tensor(row.logp)
        check(gap.abs().max() <= 4 * rounding, "sampling gives other log-probs than training")
    if isinstance(lm.model, fsdp.FSDPModule):
        lm.model.reshard()  # before `Run.steps` may load other weights

def check_pair(teacher, student, thinking=False):
    """Raise UserError, saying what differs, if a teacher and a student do not have the same tokens,
    prompts (of this mode) and some stop token: both KLs compare them id by id."""
    pair = f"teacher {teacher.name} and student {student.name} differ in their"
    t, s = teacher.tokenizer, student.tokenizer
    unlike = sorted(set(t.get_vocab().items()) ^ set(s.get_vocab().items()))
    check(not unlike, f"{pair} vocabulary ({len(unlike)} differences, e.g. {unlike[:1]})")
    a, b = (build_prompt(x, "1+1=?", thinking, tokenize=False) for x in (t, s))
    check(a == b, f"{pair} chat template ({a!r} and {b!r})")
    check(set(teacher.stop_ids) & set(student.stop_ids),
          f"{pair} stop tokens ({teacher.stop_ids} and {student.stop_ids})")

def build_prompt(tokenizer, problem, thinking, tokenize=True):
    """Problem text -> prompt token ids (with tokenize=False, text): the one format of all scripts.
    ours: one user message, no system prompt; the paper states none. Qwen3 thinks unless it is told
    not to; Llama 3 would write today's date. The template writes its own BOS."""
    messages = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize,
        return_dict=False, enable_thinking=thinking, date_string="26 Jul 2024")

def end_of_turn(tokenizer):
    """Id of the special token with which the chat template ends an answer, else eos, or None.
    Raises UserError if a prompt does not hold the problem and open the answer's turn."""
    text = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    turns = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "Two."}]
    closed, prompt = text(turns[:1]).strip(), text(turns[:1], add_generation_prompt=True).strip()
    before, _, after = (part.strip() for part in text(turns).partition("Two."))
    opened = prompt == before or (prompt != closed and not prompt.endswith(after))
    check(opened and "1+1=?" in tokenizer.decode(tokenizer.encode(prompt)), "its chat template "
          f"leaves out the problem or the start of the assistant's turn: {prompt!r}")
    return next((i for i, token in tokenizer.added_tokens_decoder.items()
                 if after.startswith(token.content)), tokenizer.eos_token_id)

def save_lm(lm, out, run_record):
    """Write a Hugging Face folder that any tool can load, in the dtype that the model came in. The
    files are written beside and then moved, config.json with `run_record` as the last: a model is
    finished exactly when that says so. All processes call this; rank 0 writes."""
    beside, weights = Path(out) / "saving", {}
    for name, parameter in lm.model.named_parameters():  # a tied matrix comes once
        tensor = full_tensor(parameter.detach())
        if rank() == 0:
            weights[name] = tensor.to("cpu", getattr(torch, lm.saved_dtype))
    if rank():
        return
    shutil.rmtree(beside, ignore_errors=True)
    with errors_as_one_line(f"cannot write the model to {out}"):
        lm.tokenizer.save_pretrained(beside)
        (lm.replica or lm.model).save_pretrained(beside, state_dict=weights)
        path = beside / "tokenizer_config.json"  # the class has another name in transformers 4
        write_json(path, {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"})
    config = {**read_json(beside / "config.json"), "dtype": lm.saved_dtype, "run": run_record}
    (beside / "config.json").unlink()
    for path in beside.iterdir():
        os.replace(path, Path(out) / path.name)
    beside.rmdir()
    write_json(Path(out) / "config.json", config)

def fingerprint(lm):
    """A short hash that names a policy: up to 8,191 evenly spaced entries of every tensor."""
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        tensor = full_tensor(parameter.detach())
        entries = tensor.flatten()[:: max(1, tensor.numel() // 4096)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + entries.tobytes())
    return digest.hexdigest()[:16]

# ---------- 3 data: any schema -> problems without copies and contradictions, in two halves -------
ALIASES = {  # name: hub dataset:split
    "dapo": "BytedTsinghua-SIA/DAPO-Math-17k:train", "math500": "HuggingFaceH4/MATH-500:test",
    "aime24": "HuggingFaceH4/aime_2024:train", "aime25": "math-ai/aime25:test"}
CONTEXTS = ("context", "passage", "body", "choices", "options")  # joined with the question
CHATS = ("prompt", "messages", "conversations")  # read where no text is a question
GOLDS = ("final_answer", "expected_answer", "answer", "ground_truth", "solution")  # surest first
KNOWN = {*CONTEXTS, *CHATS, *GOLDS, *"problem question response reward_model image images".split()}
NO_ANSWER = re.compile(r"(?is)none|null|n/a|nan|unknown|not ?found|-?(inf)?|\[['\"].*")
# A preparer's instruction says how to respond and in what form; "Give x as a fraction." does not.
_SAYS = (r"(please |let's |remember to |you (must|should) |make sure to )?((think|reason) step by "
         r"step|(put|output|return|present|write|give|provide|enclose|box) (your|the) (final )?"
         r"(answer|response))|(and )?(your|the) (final )?answer (must|should|will)|the last line "
         r"of your response|you first think|the reasoning process|solve the following math problem")
_FORM = r"\\boxed|Answer:|####|<answer>|</?think>|final answer\.|step by step|math problem"
_REST = r"(?:(?:answer|format): |(?![.?!:]\s| (?:as a|in the form|find|rounded)\b)[^\n]){0,400}"
_SENTENCE = rf"(?-i:(?=[A-Z]))(?={_REST}({_FORM}))({_SAYS})\b{_REST}([.:](?!\S)|$)\s*"
_WRAPPER = re.compile(rf"(?im)\A({_SENTENCE})+|(?<!\s)\s+({_SENTENCE})+\Z")

@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    prompt: tuple = dataclasses.field(default=(), repr=False)  # ids, by `tokenize_problems`

def read_rows(source):
    """Rows (dicts) of a data source; UserError if it cannot be found or read. A source is a .json,
    .jsonl, .csv or .tsv file (or .gz of these) or .parquet, a folder of them or of `save_to_disk`,
    an alias (see above) or `owner/name[[:config]:split]` of the hub; the only split, else train."""
    path, kind, split = Path(source), Path(source.removesuffix(".gz")).suffix.lower(), ""
    where = "" if path.exists() else " (no such file or folder here, nor on the hub)"
    with errors_as_one_line(f"cannot load data {source!r}{where}"):
        if kind in (".json", ".jsonl", ".csv", ".tsv"):
            data = read_text_rows(path, kind)
        else:
            check(kind == ".parquet" or not path.is_file(), "not json, jsonl, csv, tsv or parquet")
            import datasets  # takes a second
            datasets.utils.logging.disable_progress_bar()
            datasets.utils.logging.set_verbosity(logging.CRITICAL)
            if kind == ".parquet":
                data = datasets.load_dataset("parquet", data_files=glob.escape(source))
            elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
                data = datasets.load_from_disk(source)
            else:
                name, *at = [source] if path.is_dir() else ALIASES.get(source, source).split(":")
                *config, split = at or [""]
                data = datasets.load_dataset(name, *config)
    if isinstance(data, dict):
        split = split or (next(iter(data)) if len(data) == 1 else "train")
        check(split in data, f"data {source!r} has no split {split!r}, but: {', '.join(data)}")
        data = data[split]
    check(len(data), f"data {source!r} is empty")
    return data

def read_text_rows(path, kind):
    """Rows of a text file. `datasets` would fit each column to one type, guessed from the first
    10 MB: it changes long integers and dates, and fails at types that come later."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    if dialect := {".csv": "excel", ".tsv": "excel-tab"}.get(kind):
        rows = list(csv.DictReader(io.StringIO(text), dialect=dialect))
        check(not any(None in row for row in rows), "a row has more fields than the first")
        return rows
    if not text.lstrip().startswith("["):  # JSON lines
        text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"
    rows = json.loads(text)
    check(all(isinstance(row, dict) for row in rows), "it is not a list of JSON objects")
    return rows

def read_problems(source, parse, *more):
    """parse({column in lower case: cell}, *more) of each row of a source; equal rows take one call.
    What it refuses (UserError) is left out, counted by reason. UserError if nothing is left."""
    rows = data = read_rows(source)
    names = getattr(data, "column_names", None) or data[0]
    if not isinstance(data, list):  # as batches of Arrow they take a tenth of the time
        known = data.select_columns([x for x in names if x.lower() in KNOWN] or names[:1])
        batches = progress(known.with_format("arrow").iter(1000), total=len(data) // 1000, unit="k",
                           desc=f"reading {source}", leave=False, disable=len(data) < 50_000)
        rows = (row for batch in batches for row in batch.to_pylist())
    @functools.cache
    def parsed(row):
        try:
            return parse({name.lower(): x for name, x in pickle.loads(row).items()}, *more)
        except UserError as reason:
            return reason
    items = [parsed(pickle.dumps(row)) for row in rows]  # what is fast to make and to look up
    found = [item for item in items if not isinstance(item, UserError)]
    skipped = Counter(str(item) for item in items if isinstance(item, UserError)).most_common()
    reasons = ", ".join(f"{n} with {reason}" for reason, n in skipped) or "none"
    check(found, f"data {source!r} has no row to use: {reasons}; its columns: {', '.join(names)}")
    print(f"{source}: {len(data)} rows, skipped {reasons}; for example {str(found[0])[-500:]}")
    return found

def find_text(cell, who=("user", "human")):
    """The text of a cell or, of a chat, the one message of `who`; "" if that is not just text."""
    match cell:
        case str():
            return cell if "user" in who and not cell.startswith("[{") else ""
        case {"role": name, "content": [{"text": said}] | said} | {"from": name, "value": said}:
            return find_text(said) if name in who else ""
        case list():
            texts = list(filter(None, (find_text(item, who) for item in cell)))
            check(len(texts) < 2, "several texts in one cell")
            return "".join(texts)
    return ""

def find_question(row):
    """The question of a row: its texts, else its chat, without instructions. UserError without."""
    asks = ("problem", "question") if row.get("problem") or row.get("question") else CHATS
    texts = [_WRAPPER.sub("", find_text(row.get(name)).strip()) for name in (*CONTEXTS, *asks)]
    check(any(texts[len(CONTEXTS):]), "no question")
    for name in (*CONTEXTS, "image", "images"):
        check(not row.get(name) or name in CONTEXTS and find_text(row[name]), f"{name!r} not read")
    return "\n".join(filter(None, dict.fromkeys(texts)))

def find_answer(row, name):
    """The answer in a column, or "": text, an int, a finite float or a list of these. Of a text the
    last line if it has `####`, else the last box; a `solution` without both must be a number."""
    values, cell = [], row.get(name)
    for value in cell if isinstance(cell, list) else [cell]:
        cell = str(value).strip() if type(value) in (str, int, float) else ""
        line = re.search(r"####(.*)\Z", cell)
        text = line[1].strip() if line else extract_answer(cell) if "\\boxed" in cell else cell
        worked = name == "solution" and text == cell and not re.fullmatch(r"[\d.,/$-]+", text)
        values.append("" if not text or worked or NO_ANSWER.fullmatch(text) else text)
    return ", ".join(values) if all(values) else ""

def to_problem(row, verifier=""):
    """A row, {column: cell}, as a Problem; UserError if no response could be checked."""
    question, reward = find_question(row), row.get("reward_model")
    row = {**row, **reward} if isinstance(reward, dict) else row
    answer = next(filter(None, (find_answer(row, name) for name in GOLDS)), "")
    check(answer, "no answer")
    prose = r"(?i)\bproof\b|q\.?e\.?d|\\blacksquare|((?<![\\a-z])[a-z]{2,}\b[\s,.'-]+){12}"
    check(verifier or not re.search(prose, answer), "a proof as answer")
    return Problem(question, answer)

def problem_key(text, exact=False):
    """What makes problems the same: text without case, typesetting, spaces but `1 1`; or exact."""
    if exact:
        return text
    text = re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", r"^\g<0>", re.sub("[₀-₉]+", r"_\g<0>", text))  # x² is not x2
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\\!|(?<=\d)\\,(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?:\\(?:left|right)(?![a-z])|\\[,;: ]|[\s$])+", " ", text)
    return re.sub(r"(?<!\d)(?<!\d\.) |(?! \.?\d) ", "", text)

def deduplicate(problems, exact=False):
    """{key: Problem}, one per question, none with contradicting answers; and what was dropped."""
    first, answers, counts = {}, {}, Counter()
    for item, copies in Counter(problems).items():
        key = problem_key(item.problem, exact)
        counts["duplicates"] += copies - (key not in first)
        if key not in first or item.problem < first[key].problem:  # whatever the row order
            first[key] = item
        answers.setdefault(key, {})[item.answer] = None
    bad = {key for key, (a, *more) in answers.items() if not all(answers_equal(a, b) for b in more)}
    counts["with contradicting answers"] += len(bad)
    return {key: item for key, item in first.items() if key not in bad}, counts

def load_problems(cfg):
    """Problems of cfg.data: deduplicated, decontaminated, then halved in order of a hash of their
    texts and cfg.split_seed: keep data, exclude and split_seed over a recipe. UserError if none."""
    unique, counts = deduplicate(read_problems(cfg.data, to_problem, cfg.verifier), cfg.verifier)
    for name in sorted({*map(str.strip, cfg.exclude.split(","))} - {"", "none"}):
        with errors_as_one_line(f"--exclude {name} (--exclude none skips this)"):
            banned = {problem_key(x, cfg.verifier) for x in read_problems(name, find_question)}
        counts["in an evaluation set"] += len(banned & unique.keys())
        unique = {key: item for key, item in unique.items() if key not in banned}
    order = sorted(unique, key=lambda k: hashlib.sha256(f"{cfg.split_seed}:{k}".encode()).digest())
    check(cfg.labels <= len(order), f"--labels {cfg.labels}: {cfg.data} has only {len(order)}")
    used = order[: cfg.labels or None]
    chosen = {"all": used, "1": used[: len(used) // 2], "2": used[len(used) // 2 :]}[cfg.half]
    dropped = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none"
    print(f"{cfg.data}: dropped {dropped}; {len(order)} problems, using {len(chosen)} ({cfg.half})")
    check(chosen, f"data {cfg.data!r} (half {cfg.half}) holds no problem")
    return [unique[key] for key in chosen]

def tokenize_problems(problems, cfg, *lms):
    """Fill in the prompt ids, of the tokenizer of all lms; too long ones are counted and skipped.
    UserError if a response may leave the positions of an lm."""
    prompts = (tuple(build_prompt(lms[0].tokenizer, p.problem, cfg.thinking)) for p in problems)
    filled = [dataclasses.replace(p, prompt=ids) for p, ids in zip(problems, prompts)]
    filled = skip_long(filled, "prompt", "--max-prompt-tokens", cfg.max_prompt_tokens)
    for lm in lms:
        check_context(lm, cfg, max(len(p.prompt) for p in filled) + cfg.max_new_tokens)
    return filled

def skip_long(items, part, flag, limit):
    """The items whose part (prompt or tokens) has at most `limit`; UserError if none has."""
    short = [item for item in items if len(getattr(item, part)) <= limit]
    if len(short) < len(items):
        print(f"skipped {len(items) - len(short)} over {flag} {limit}")
    check(short, f"all {len(items)} are longer than {flag} {limit}")
    return short

def batch_indices(n_items, per_step, step, seed):
    """Which items step number `step` (from 0) uses: a pure function, so no iterator need be saved.
    Every epoch is a new permutation, without what does not fill its last batch."""
    epoch, i = divmod(step, n_items // per_step)
    order = np.random.default_rng([seed, epoch]).permutation(n_items)
    return order[i * per_step : (i + 1) * per_step].tolist()

def drawn(items, cfg, steps):
    """Those of the items that so many steps use, in their order."""
    batches = (batch_indices(len(items), cfg.prompts, s, cfg.seed) for s in range(steps))
    return [items[i] for i in sorted(set().union(*batches))]

def count_steps(cfg, n_items):
    """Steps: --steps, or if that is 0 --epochs of the items. UserError without a batch."""
    check(n_items >= cfg.prompts, f"--prompts {cfg.prompts} a step, but only {n_items} problems")
    return cfg.steps or max(1, cfg.epochs * (n_items // cfg.prompts))

# ---------- 4 verifier: response, answer -> right or wrong ----------------------------------------
# extract_answer takes the answer out of the response, _normalise rewrites it in one notation,
# _Reader computes it, _values_equal compares. A value is a number or a Composite, such as a list or
# a matrix; a number is a Fraction or, if not exact, has 400 digits. Letters get random numbers: two
# expressions are equal if they are at three points. Nothing is solved, expanded or executed.
# A unit behind a value may be missing on one side, but not differ. A bare list keeps its counts.
# Refused are answers outside the grammar, as what they mean would be a guess: words that are no
# unit (33 or more), `2 3`, improper mixed numbers, ellipses, sums. They equal only the same text.
# Given up are answers beyond a limit in characters, tokens, levels, bits or magnitude (10^±200).
_MAX_RESPONSE, _MAX_CHARS, _MAX_TOKENS, _MAX_DEPTH = 200_000, 2_000, 400, 30
_MAX_BITS, _MAX_LOG2, _DIGITS, _TOLERANCE = 25_000, 690, 400, 375  # 2^690 = 10^207
_Refused, _GivenUp = SyntaxError, RecursionError

def _require(condition, error=_Refused):  # returns the condition, raises the error if it is not met
    if not condition:
        raise error
    return condition

# --- where the answer stands
_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*)?(?<!\\)\{|(?<!\\)\}")
_AND_TEXT = r"\\(?:text|mbox)\{(?:[\s,]*|[a-z() ]*\b(?:and|or)\b[\s,]*)\}"
_LIST_SIGN = rf"(?:[\s$&,;*/]|\\[()\[\],;:! ]|\\q?quad|(?i:and|\(?or)\b|{_AND_TEXT})"
_GAP = re.compile(  # between boxes a new line only beside a conjunction; then a unit, signs, "x ="
    r"(?=[^\n]*\Z|[^,;]*(?:and|or|[,;]))(?: ?[a-z]{3,}(?= and ))?"
    rf"{_LIST_SIGN}*(?:[A-Za-z](?:_\{{?\w\}}?)?\s?=\s?)?\$?"  # or a hedge, but no correction:
    r"|(?i:(?!.*\b(?:wait|no|wrong|incorrect|mistake|actually)\b)[^\n]{0,40}"
    r"\b(?:maybe|perhaps|possibly|probably|or else|(?:may|might|could) (?:also )?be)\b[^\n]{0,40})")
_PLACEHOLDER = re.compile(  # \boxed{}, \boxed{\text{your answer}}
    r"(?i)(?:[\s.…?_{}()<>\[\]\"'$-]|\\(?:[lc]?dots|text|[ _])|your|the|final|answer|goes|here)*")
_ANSWER_LINE = re.compile(r"(?i)(?<![a-z])answer(?:\s{1,4}is)?[*_ \t]{0,6}[:：]"
                          r"(?: {0,4}the (?:final )?answer is:?)?")

def extract_answer(response: str) -> str | None:
    r"""The text of the last \boxed after </think>, else of the last "Answer:", else None."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    text = re.sub(r"(\\boxed|\\fbox) (-?\d+(?:\.\d+)?)", r"\1{\2}", text[-_MAX_RESPONSE:])
    answer = _last_boxes(text)
    if not answer:  # the line or formula behind the last "Answer:" without its markup
        line = ["", *_ANSWER_LINE.split(text)[1:]][-1][:_MAX_CHARS].lstrip(" \t\r\n*_`")
        closing = {"\\[": r"\\\]", "$$": r"\$\$"}.get(line[:2])
        line = re.split(rf"{closing or chr(10)}|<\||</|\. I hope", line[2 if closing else 0:])[0]
        answer = line.strip(" \t*_`")
    return answer.strip() or None

def _last_boxes(text):
    """Returns the text of the last complete box, with the boxes that form a list with it, or ""."""
    open_braces, boxes = [], []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(brace)
        elif open_braces and (start := open_braces.pop())[1]:
            boxes.append((start, brace))
    answer, edge = None, len(text)  # edge: where the boxes of the answer begin
    for start, end in reversed(boxes):
        box = text[start.end():end.start()]
        if end.end() > edge or _PLACEHOLDER.fullmatch(box):
            continue  # a box in a box, or without an answer
        gap = text[end.end():edge]
        if answer is not None and (len(gap + answer) > _MAX_CHARS or not _GAP.fullmatch(gap)):
            break  # an earlier thought
        answer, edge = box if answer in (None, box) else f"{box} and {answer}", start.start()
    return answer or ""

# --- normalisation: each notation is rewritten in one
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_FUNCTIONS = dict(ln="log", lg="log10", arcsin="asin", arccos="acos", arctan="atan", abs="fabs") | {
    name: name for name in "sin cos tan sec csc cot log floor ceil".split()}
_SPACES = r"""left right displaystyle mathbf mathbb mathcal mathit boldsymbol bm boxed fbox pounds
    euro big Big bigg Bigg bigl bigr Bigl Bigr rm bf it large Large underline text textbf mbox
    mathrm"""
_SPELLINGS = r"""* \times \cdot \ast | / \div | ∖ \setminus \backslash | ± \pm | ∓ \mp | ^ ** | :
    \colon | < \lt | > \gt | ≤ \le \leq \leqslant <= | ≥ \ge \geq \geqslant >= | ≠ \ne \neq != | ≈
    \approx | ∈ \in | ∪ \cup | ∞ \infty inf infty infinity | \{\} \emptyset \varnothing | ' \prime |
    ° \circ \degree | \{ \lbrace | \} \rbrace | ( \langle | ) \rangle \rfloor \rceil | \floor(
    \lfloor | \ceil( \lceil | ‖ \lvert \rvert \vert \mid | \frac \dfrac \tfrac \cfrac | \binom
    \dbinom \tbinom | e^ \exp exp | π pi | φ \varphi | ε \varepsilon | λ \lambda |
    l \ell"""  # the first of each row replaces the others
_SYMBOLS = {word: row.split()[0] for row in _SPELLINGS.split("|") for word in row.split()[1:]}
_SYMBOLS |= {name: f"\\{name} " for name in [*_FUNCTIONS, "sqrt"]}
_SYMBOLS |= {name: f" {number} " for number, name in enumerate(_NUMBERS)}
_SYMBOLS |= {f"\\{name}": " " for name in _SPACES.split()}
_SYMBOLS |= {f"\\{unicodedata.name(x).split()[-1].lower()}": x for x in "αβγδεζηθκμνξπρστφχψω"}
_CHARACTERS = str.maketrans(dict(zip("−–×·⋅÷⁄′⩽⩾∣|\"\u200b", "--***//'≤≥‖‖  ")) | {
    "√": "\\sqrt ", "∅": "\\{\\}", "\f": "\\f", "\b": "\\b"})
_UNITS = re.compile("[cmkn]m|kg|mL|ft|in|yd|lbs?|oz|hrs?|min|sec|[mk]ph|sq|deg|pts|day|[kM]?Hz|atm|"
                    "[kMG]?eV|[kG]?Pa|mol|k[JWV]|Mpc|AU|erg|USD|per|pct|yes|[nN]o|odd")
_UNIT_NAMES = r"""/ per | sq square | cu cubic | $ dollar usd | % percent pct | ¢ cent | ° degree
    | c celsius | f fahrenheit | m' m meter metre | g' g gram | l' l liter litre | s' s second sec
    | min' min minute | h' h hour hr | in' in inch | ft' ft foot feet | yd' yd yard | mi' mi mile
    | lb' lb pound | oz' oz ounce | n' n newton | j' j joule | mi'/h' mph | km'/h' kph"""
_UNIT_NAMES = {word: row.split()[0] for row in _UNIT_NAMES.split("|") for word in row.split()[1:]}
_QUALIFIER = r"\b(?:" + "|".join(r"""not? never none if when for mod\w* more less fewer least most
    than to but only half third quarter base twice times squared cubed factorial negative minus plus
    over under above below either wrong incorrect false
    \w*(?:ten|hundred|thousand|illion|dozen)(?:th)?""".split()) + r")s?\b"  # changes a value

def _symbol(m):  # the symbol of a command or a run of letters; a run that is no product gets quotes
    word = m[0]
    is_word = len(word) > 3 and word.isalpha() and not word.isupper() or _UNITS.fullmatch(word)
    return _SYMBOLS.get(word.strip('"')) or (f'"{word}"' if is_word else word)

def _is_unit(m):  # is a match of _UNITS_BEHIND a unit, no letter and no qualifier?
    unit = m[0].strip(' "').lower()
    before = re.sub('"[^"]*"', "", m.string[:m.start()].rpartition("=")[2])
    letter = re.fullmatch("[a-z]", unit) and re.search(r"(?i)(?<![\\a-z])[a-z](?![a-z])", before)
    return not (letter or re.search(_QUALIFIER + "|[=<>∪∨]", unit))

def _unit_words(unit):  # the words of a unit in one spelling, as far as _UNIT_NAMES knows them
    def name(m):
        singular = re.sub(r"(?<=[hx])es$|(?<=\w[^\Wu])s$", "", m[2])
        return (m[1] or "")[:1] + _UNIT_NAMES.get(singular, singular)
    text = re.sub(r'[\s"{}()~.*]+', " ", unit.lower())
    text = re.sub(r"(kilo|centi|milli|[kcm](?=[mgl]\b))?([^\W\d_]+|[$€£¥¢%°])", name, text)
    text = re.sub(r" ?([/^-]) ?", r"\1", text)
    text = re.sub(r"\b(sq|cu) (\S+)", lambda m: f"{m[2]}^{2 + (m[1] == 'cu')}", text)
    return re.sub(r"(?<=['\d]) (?=\S+')", "*", text).split()

_TEXT = r"\\(?:text\w{0,6}|mbox|mathrm|operatorname)\s*\{\s*"
_NO_DIGIT = r"(?:[^{}\d=^]|\^\{?-?\d\}?)*"  # but exponents, as in m^2
_SIDE = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)"  # of \over: its braces are closed
_WORDS_BEFORE = r"(?:[a-z][a-z()]*\s+){0,20}(?:is|are|equals|answer(?=:))\b\s*:?\s*"
_VALUE_AHEAD = r"(?=\s*(?:[-\d\\(.$€£¥]|[a-z](?![a-z])))"
_VALUE_BEHIND = r"""(?:(?<=[\d)}\]°'.π%¢])(?<!\([A-H]\))|(?<=(?<![A-Za-z])[b-zB-HJ-Z]))"""
_EXPONENT = r"(?: ?\^ ?(?:\{[^{}]*\}|-?\d))?"
_UNIT = rf'[/*]? ?"[^"]*"{_EXPONENT} ?(?:[/*] ?[mgshNJK](?![A-Za-z]){_EXPONENT} ?)*'
_UNITS_BEHIND = re.compile(  # 5 m/s, 0.99m^2, 15 "cm"^2; and the signs
    rf"[$€£¥¢%°]|{_VALUE_BEHIND} ?(?:{_UNIT})+(?! ?(?:[\w({{^]|\.\d|\\[a-z]))")
_TABLE = [(re.compile(pattern), replacement) for pattern, replacement in (
    # \\frac, the reals, bold names, thousands (10{,}080), 0.1\overline{6} -> (0.1+6/9/10)
    (r"(?s)(?<!\\)\\\\(?=[A-Za-z\\])(?!.*\\end)", r"\\"),
    (r"\\mathbb\s*\{?R\}?", r"(-∞,∞)"),
    (r"(?:\\(?:math(?:bf|cal|it)|boldsymbol|bm)\s*\{|\{\s*\\bf\s)\s*(\\?[A-Za-z]+)\s*\}", r"\1 "),
    (r"(\d)\s*(?:\{\s*,\s*\}|,\\!)\s*(?=\d{3})", r"\1"),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}",
     lambda m: f"({m[1] or 0}.{m[2]}+{m[3]}/{10 ** len(m[3]) - 1}/{10 ** len(m[2])})"),
    # formula signs \( \), colours, spaces
    (r"\\!|(?<!\\)\\[()\[\]]|\\(?:text)?color ?\{\w+\}|\\hspace\*? ?\{[^{}]*\}", ""),
    (r"(?<!\\)\$|~|\\q?quad|(?<!\\)\\(?:[,;:> ]|$)", " "), (r"\\([$%])", r"\1"),
    # words before the answer (The area of $x$ is 12 -> 12), matrices, powers of ten (1.5e-3)
    (rf"(?i)^(?!.*{_QUALIFIER})\s*(\\text\w*\s*\{{)?\s*{_WORDS_BEFORE}(?(1)\}}){_VALUE_AHEAD}", ""),
    (r"\\begin\s*\{\w+\*?\}(?:\s*\{[lcr|]*\})?", " ⟦ "),
    (r"(?:\\\\)?\s*\\end\s*\{\w+\*?\}", " ⟧ "),
    (r"(?<=\d)[eE]([+-]?\d+)", r"*10^{\1}"),
    # p.m., conjunctions (2, 3, and 5 -> 2, 3∨ 5), quotes for words in \text, but not for (B)
    (r"(?i)(?<=:\d\d)\s*(\\text\s*\{\s*)?([ap])\.?m(?!\w)\.?(?(1)\})", r'"\2m"'),
    (r"(?i)[,;]*\s*(?<![a-z\\])(?:and|or)(?![a-z])", "∨"),
    (rf"(?<=[\d}}/*])\s*{_TEXT}([A-Za-cf-hj-z](?:/[A-Za-z]+)?(?:\^\d)?)\s*\}}", r'"\1"'),
    (rf"{_TEXT}(?!(?:{'|'.join(_FUNCTIONS)})\b)({_NO_DIGIT}[A-Za-z]{{2}}{_NO_DIGIT})\}}", r'"\1"'),
    (_TEXT + r"([^{}]*)\}", r" \1 "), (r"[,;]\s*∨", "∨"),
    # a choice before its text; symbols (\le -> ≤), one space, degrees, primes, (12)_8, 6 base 7
    (r'"(\([A-H]\)|[A-H][).:](?= )) ?(?=[^"])', r'\1 "'),
    (r'"[^"]*"|\\?[^\W\d_]+|[<>]=|\*\*|(?<=[x-z ])!=', _symbol),
    (r"\s+", " "), (r"\^ ?\{ ?('[' ]*)\}|\^ ?('+)", r"\1\2"),
    (r" ?(?:\^ ?\{ ?° ?\}|\^? ?°)(?: ?([CF])(?!\w))?", lambda m: f'°"{m[1]}"' if m[1] else "°"),
    (r"(?:(?<![\w^}])[({] ?([\dA-F]+) ?[)}])? ?_ ?(?:\{ ?\((\d+)\) ?\})?", r"\1_\2"),
    (r'(?<!\d)\(?(\d+)\)? ?_? ?\{? ?"? ?base ?"? ?\{?(\d+)(?: ?\})*', r"\1_\2"),
    # fractions, binomials (\frac43, 5 \choose 3, {1 \over 2})
    (r"\\(frac|binom) ?(\d) ?(?=[\d{\\])", r"\\\1{\2}"),
    (r"\\(frac|binom) ?(\{[^{}]*\}) ?(\d)(?!\d)", r"\\\1\2{\3}"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    *[(rf"(?:\{{|^){_SIDE}\\over(?![a-z]){_SIDE}(?:\}}|$)", r"\\frac{\1}{\2}")] * 3,  # nested
    # sets with a condition (\{x \mid x > 5\} -> x > 5), x \ne 3, |x|, 2.5 x 10^3, 1/3 ≈ 0.33 -> 1/3
    (r"^ ?\\\{ ?[a-z] ?(?:∈ ?\(-∞,∞\) ?)?[‖:](.*)\\\} ?$", r"\1"),
    (r"^ ?(?:[a-z] ?≠|\(-∞,∞\) ?[∖-] ?\\\{)([^,{}]*?)(?:\\\})? ?$", r"(-∞,\1)∪(\1,∞)"),
    (r"‖([^‖]*)‖", r"\\abs(\1)"), (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
    (r"^ ?(?:\w ?)?≈| ?≈ ?-?[$€£¥]?\d[\d.]* ?[%¢°]? ?(?=$|[,;)}])", ""),
    # thousands (58,500); mixed numbers: 3\frac12 -> (3+1/2), but 3 5/2 -> ?3 5/2, which is refused
    (r"(?<![\d.,(\[{_])(?<!\d )[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d)\]}]|,\d|\\})",
     lambda m: re.sub(r"\D", "", m[0])),
    (r"(?<![\d.^_/])(\d+) ?(?:(\\frac ?\{) ?|(?<= ))(\d+) ?(?(2)\} ?\{ ?|/)(\d+)(?(2) ?\})",
     lambda m: f"({m[1]}+{m[3]}/{m[4]})" if 0 < int(m[3]) < int(m[4]) else f"?{m[0]}"),
    # words with repeats have an order (T, F, T)
    (r'^(?=((?:"[^"]*"|\b[A-Z]\b|[ ,])+)$).*("[^"]*"|\b[A-Z]\b) ?,.*(?<!\w)\2(?!\w).*', r"(\1)"),
    # the end of a sentence, but no ellipsis; units in single letters
    (r"[., :;]+$", lambda m: m[0] if ".." in m[0] else ""),
    (r"(?<=\d)( [mgshLJNWVK](?:/[smhL])?|m/s|(?:(?<=\.\d)|(?<=\.\d\d))m(?=\^))(\^?\{?\d\}?)? ?$",
     r' "\1\2"'),
)]

def _normalise(text):
    """Returns the answer in one notation, with words in quotes, and its units, a list of words."""
    _require(len(text) <= _MAX_CHARS, _GivenUp)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", r"^{\g<0>}", text))
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    for pattern, replacement in _TABLE:
        text = pattern.sub(replacement, text)
    units = [m[0] for m in _UNITS_BEHIND.finditer(text) if _is_unit(m)]
    text = _UNITS_BEHIND.sub(lambda m: m[0] if m[0] == "°" or not _is_unit(m) else " ", text)
    return " ".join(text.split()), sum(map(_unit_words, units), [])

# --- values
# A Composite's `form` is what equal values share beside their parts: the words of words, the
# brackets of a tuple or interval, the separators of a matrix, the signs of a chain f(1) < f(2), the
# name, if any, on the left of an equation; "set" of a list \{1, 2\}: its equal parts count once.
_NUMBER, _WORDS, _LIST, _TUPLE, _RATIO, _MATRIX, _EQUATION, _CHAIN = range(8)
Composite = dataclasses.make_dataclass("Composite", ["kind", "parts", ("form", str, "")])
_local = threading.local()  # its mp: mpmath (the numbers of sympy) at 400 digits, for this thread

def _kind(value):
    return value.kind if isinstance(value, Composite) else _NUMBER

def _approximate(x):  # with 400 digits; given up if it is too small or too large for them
    _require(_kind(x) == _NUMBER)
    value = _local.mp.convert(x)
    in_range = not isinstance(x, Fraction) or x == 0 or abs(_local.mp.mag(value)) <= _MAX_LOG2
    return _require(in_range, _GivenUp) and value

def _calculate(operation, x, y):  # x + y or x * y, exact if both are; y may be a matrix
    if _kind(y) == _MATRIX and operation is operator.mul:
        return Composite(_MATRIX, [_calculate(operation, x, part) for part in y.parts], y.form)
    if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return operation(_approximate(x), _approximate(y))
    value = operation(x, y)
    _require(max(map(int.bit_length, value.as_integer_ratio())) <= _MAX_BITS, _GivenUp)
    return value

# --- a parser that computes
#   answer := "{" item (separator item)* "}"     a separator is "," ";" "∪" or "∨" ("and", "or")
#   item   := expr (("=" | "∈" | "≠" | "<" | "≤" | ">" | "≥") expr)*
#   expr   := base, then from loose to tight: ":" | + - | * / and no sign | ^ ! °
#   base   := number | name | sign expr | "words" | \frac base base | \binom base base
#           | ( items ) and its kin [ ] { } \{ \} and matrices, ⟦ items ⟧ with "&" and "\\"
#           | \sqrt [expr] base | \sin^base expr and its kin (\abs, \floor)
#   name   := letter, \vec{...} or digits_base, with its primes and its subscript, is one token
_NAME = (r"(?:[^\W\d_]|\d+(?=_)|\\(?:hat|vec|d?dot|tilde|angle|bar|over[a-z]+|widehat)"
         r"(?:\s?\{[^{}]*\}|(?:\s?[^\W\d_])+))'*(?:_\s?(?:\d+|[^\W_]|\{[^{}]*\}))?'*")
_TOKEN = re.compile(rf'"[^"]*"|{_NAME}|\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|\\.|\S')
_FACTOR = re.compile(r"[^\W_]|[({[⟦∞]|\\(?:\{|..)")  # begins a factor without a sign before it
_QUANTITY = rf"(?:{_NAME}|[A-Z]+)"
_LEFT_SIDE = re.compile("|".join((  # what may stand left of "=" or "∈" as a name of the value
    rf"(?:m(?=\\angle))?{_NAME}(?:\^\{{?-1\}}?)?(?:\([\w,∩∪‖'\"]*\))?",  # a_1, y', f(x), f^{-1}(x)
    r"(?:\\abs)?[(\[]?[A-Z]{1,4}[)\]]?|\"[^\"]*\"",  # AB, |AB|, "Area"
    rf"(?:\(|\\\{{|⟦){_NAME}(?:(?:,|&|\\\\){_NAME})*(?:\)|\\\}}|⟧)",  # (x,y), \{x,y\}
    rf"\\frac\{{(?:d\w|[A-Z]+)\}}\{{(?:d\w|[A-Z]+)\}}|{_QUANTITY}(?::{_QUANTITY})+")))  # AB:CD
_UNKNOWN = re.compile(r"(?![πei∞])[^\W\d_](?:_\{?\w\}?|\([^\W\d_]\))?")  # x, x_1, f(x)
_BRACKETS = {"{": (", ; ∨ ∪", "}"), "(": (", ;", ") ]"), "[": (", ;", ") ]"),
             "\\{": (", ;", "\\}"), "⟦": (r"& \\", "⟧")}  # opening: separators, closings
_RATIOS, _SUMS, _PRODUCTS, _POWERS = range(4)  # what an expression may hold outside brackets

class _Reader:
    """Computes the value of an answer at a sample point, with random numbers for its letters."""

    def __init__(self, text, point):
        self.tokens, self.at = _TOKEN.findall("{" + text + "}") + [""], 0  # at: the next token
        self.point, self.letters = point, set()
        self.depth = self.functions = 0  # how many expressions and functions are not yet complete
        _require(len(self.tokens) <= _MAX_TOKENS, _GivenUp)

    def take(self, *wanted):  # the next token, and moves on, if it is one of those wanted; else ""
        token = self.tokens[self.at] if self.tokens[self.at] in wanted else ""
        self.at += token != ""
        return token

    def item(self):  # an expression, or several with signs of comparison between them
        outer, sides, signs = self.letters, [], ""
        while len(sides) == len(signs):
            start, self.letters = self.at, set()
            value, text = self.expression(_RATIOS), "".join(self.tokens[start:self.at])
            capitals = re.fullmatch(r"[({[]*([A-Z]{2,})[]})]*", text)
            beside = {self.tokens[start - 1], self.tokens[self.at]}
            if capitals and (not self.depth or beside & {",", ";", "∨"}):  # one name, no product
                self.tokens[start:self.at], self.at = [capitals[1]], start
                value = self.base()
            sides.append((value, text, self.letters))
            signs += self.take(*"=∈≠<≤>≥")
        if signs[:1] in tuple(">≥"):
            sides, signs = sides[::-1], signs[::-1].translate(str.maketrans("<≤>≥", ">≥<≤"))
        values, texts, letters = map(list, zip(*sides))
        value, name_at = _relation(values, texts, signs) if signs else (values[0], None)
        self.letters = outer.union(*(own for place, own in enumerate(letters) if place != name_at))
        return value

    def expression(self, loosest=_SUMS):
        """Reads an expression that ends before a sign that binds looser than `loosest`."""
        self.depth += 1
        _require(self.depth <= _MAX_DEPTH, _GivenUp)
        start, left = self.at, self.base()
        while token := self.tokens[self.at]:
            before, after = self.tokens[self.at - 1], self.tokens[self.at + 1]
            if token[0].isdecimal():  # 3 3 is neither 9 nor 33, (3)3 not 9; 2^{3} 3^{2} is 72
                _require(self.at > start + 1 and (before not in ")}" or after == "^"))
            if loosest <= _RATIOS and self.take(":"):
                left = Composite(_RATIO, [left, self.expression()])
            elif loosest <= _SUMS and token in "+-":
                left = _calculate(operator.add, left, self.expression(_PRODUCTS))
            elif loosest <= _PRODUCTS and (token in "*/" or _FACTOR.match(token)):
                sign, right = self.take("*", "/"), self.expression(_POWERS)
                right = self.power(right, Fraction(-1)) if sign == "/" else right
                left = _calculate(operator.mul, left, right)
            elif self.take("^"):
                left = self.power(left, self.base(_POWERS))
            elif self.take("!"):
                left = self.call("factorial", left)
            elif self.take("°"):
                left = _calculate(operator.mul, +_local.mp.degree, left) if self.functions else left
            else:
                break
        self.depth -= 1
        return left

    def base(self, loosest=_PRODUCTS):  # what has a power; behind a sign, a whole expression
        mp, token = _local.mp, _require(self.take(self.tokens[self.at]))
        if token in "+-":
            return _calculate(operator.mul, Fraction(token + "1"), self.expression(loosest))
        if token in "πei∞":
            return {"π": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1), "∞": mp.inf}[token]
        if re.fullmatch(_QUANTITY, token):
            name = re.sub(r"[{} ]", "", token)
            self.letters.add(name)  # it has the same random number wherever it stands
            random = zlib.crc32(f"{name} {self.point}".encode("utf-8", "replace"))
            signed = -10007 if random % 3 else 10007
            return Fraction(random % 20011 + 10007, (30029, 10007, signed, 97, 89, 83)[self.point])
        if token[0].isdecimal() or token[0] == "." and len(token) > 1:
            return Fraction(token)
        if token in _BRACKETS:
            return self.bracket(token)
        if token == "\\frac":
            top, bottom = self.base(_POWERS), self.base(_POWERS)
            return _calculate(operator.mul, self.power(bottom, Fraction(-1)), top)
        if token == "\\binom":
            return self.call("binomial", self.base(_POWERS), self.base(_POWERS))
        if token == "\\sqrt":
            index = self.expression() if (has_index := self.take("[")) else Fraction(2)
            _require(not has_index or self.take("]"))
            return self.power(self.base(_POWERS), self.power(index, Fraction(-1)))
        if token[0] == '"':
            return Composite(_WORDS, [], token)
        return self.function(_require(_FUNCTIONS.get(token[1:])))

    def bracket(self, opening):  # an item, a list, a tuple, an interval or a matrix
        separators, closings = map(str.split, _BRACKETS[opening])
        taken, items = "", [] if self.tokens[self.at] == "\\}" else [self.item()]
        while separator := self.take(*separators):
            taken += separator
            items.append(self.item())
        brackets = opening + _require(self.take(*closings))
        if len(items) == 1:
            return items[0]
        if opening in ("{", "\\{"):
            return Composite(_LIST, items, "set" if opening == "\\{" else "")
        kind, form = (_MATRIX, taken) if opening == "⟦" else (_TUPLE, brackets)
        return Composite(kind, items, form)

    def function(self, name):  # sin^2 x, log_2 8, sin b cos a: x ends before a function or bracket
        base = self.base() if self.take("_") else +_local.mp.e
        power = self.base() if self.take("^") else Fraction(1)
        self.functions += 1
        closed = self.tokens[self.at] in ("(", "[")
        x = self.base() if closed else self.expression(_POWERS)
        while not closed and _FACTOR.match(token := self.tokens[self.at]) and token[0] not in "(\\":
            x = _calculate(operator.mul, x, self.expression(_POWERS))
        self.functions -= 1
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = "a" + name, Fraction(1)
        value = self.call(name, x) / (_local.mp.log(_approximate(base)) if name == "log" else 1)
        return self.power(value, power)

    def power(self, x, y):  # x^y; given up before a large result is computed; odd roots are real
        if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
            size = max(map(int.bit_length, x.as_integer_ratio()))
            if size * abs(y) <= _MAX_BITS or abs(x) in (0, 1):
                return x ** int(y)
        base, exponent, mp = _approximate(x), _approximate(y), _local.mp
        _require(not base or not max(1, abs(mp.mag(base))) * abs(exponent) > _MAX_LOG2, _GivenUp)
        if isinstance(y, Fraction) and y.denominator % 2 and not mp.im(base) and base < 0:
            return (-1) ** y.numerator * self.call("power", -base, exponent)
        return self.call("power", base, exponent)

    def call(self, name, *args):  # a function of mpmath; given up if its value is too large
        exact = {"factorial": math.factorial, "binomial": math.comb}.get(name)
        whole = [int(x) for x in args if isinstance(x, Fraction) and x.denominator == 1]
        if exact and len(whole) == len(args) and 0 <= whole[-1] <= whole[0] <= 2_500:
            return Fraction(exact(*whole))
        mp, args = _local.mp, [_approximate(x) for x in args]
        value = getattr(mp, name)(*args)
        _require(not value or not mp.mag(value) > _MAX_LOG2, _GivenUp)
        if self.point == 2 and self.letters:  # a negative letter may make it complex: undefined
            _require(not mp.im(value) or any(map(mp.im, args)), ValueError)
        return value

def _relation(values, texts, signs):
    """Returns the value of sides with signs between them, and the place of its name or None."""
    name = _LEFT_SIDE.fullmatch(texts[0])
    if set(signs) == {"="}:
        return Composite(_EQUATION, values, name[0] if name else ""), 0 if name else None
    if signs == "∈" and name:
        return values[1], 0
    places = [place for place, text in enumerate(texts) if _UNKNOWN.fullmatch(text)]
    if (places, signs.replace("≤", "<")) not in (([0], "<"), ([1], "<"), ([1], "<<")):
        return Composite(_CHAIN, values, signs), None
    place, inf = places[0], _local.mp.inf
    numbers = [values[0] if place else -inf, values[-1] if place < len(signs) else inf]
    form = ("[" if signs[:place] == "≤" else "(") + ("]" if signs[place:] == "≤" else ")")
    return Composite(_TUPLE, numbers, form), place

# --- comparison
_LABEL = re.compile(r"\(?([A-H])(?:\)|[.:] ) ?((?=.*[\da-z])"  # (B) 12, B. 12, (B) "Plane"
                    r"(?:(?!\b(?:[A-H]|is|not|wrong|maybe)\b)[^∪∨])*)")

def _evaluate(text, point):  # the value of an answer at a sample point, its letters; ± is a list
    parts = []
    for signs in ("+-", "-+"):
        reader = _Reader(text.translate(str.maketrans("±∓", signs)), point)
        value = reader.base()
        _require(not reader.tokens[reader.at])
        if not re.search("[±∓]", text):
            return value, reader.letters
        parts += value.parts if _kind(value) == _LIST else [value]
    return Composite(_LIST, parts, "set"), reader.letters

def _values_equal(x, y):
    """Returns whether two values are equal; so are x = 5 and 5, and f(x) = 5 and y = 5."""
    x, y = sorted((x, y), key=lambda value: (_kind(value) != _EQUATION, _kind(value)))
    a, b = _kind(x), _kind(y)
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    if a == b == _NUMBER:
        x, y, mp = _approximate(x), _approximate(y), _local.mp
        tolerance = mp.mpf(10) ** -_TOLERANCE * max(1, abs(x))
        return bool(x == y or mp.isfinite(x) and abs(x - y) <= tolerance)
    if a == _EQUATION != b:  # a chain without a name must hold
        return all(_values_equal(side, y) for side in (x.parts[-1:] if x.form else x.parts))
    alike = a == b and x.form == y.form
    if a == b == _EQUATION and x.form and y.form and (alike or re.search('["(]', x.form + y.form)):
        return _values_equal(x.parts[-1], y.parts[-1])
    if a == b == _LIST:
        n, both = len(x.parts), x.parts + y.parts  # a part's number: the first one equal to it
        numbers = [next((i for i, other in enumerate(both) if _values_equal(part, other)), id(part))
                   for part in both]
        here, there = Counter(numbers[:n]), Counter(numbers[n:])
        return here == there or "set" in (x.form, y.form) and here.keys() == there.keys()
    if (a, b) == (_LIST, _TUPLE) and y.form == "()":  # x = 1, y = 2 is (1,2)
        names = {part.form for part in x.parts if _kind(part) == _EQUATION and part.form}
        alike = len(names) == len(y.parts)
    return alike and len(x.parts) == len(y.parts) and all(map(_values_equal, x.parts, y.parts))

def _text_key(text):
    """Returns the text without its spelling variants: case counts, but not in words and choices."""
    text = re.sub(r"([_^])\{(?:([^\W\d])\}|(\d)\}(?!\d))", r"\1\2\3", text)
    text = re.sub(r"\b([A-Z]) ?, ?(?=[A-Z]\b)", r"\1", text)  # A, C, D is ACD
    words = re.fullmatch(r'["\[({\s]*([A-Za-z"\s]+?)["\])}\s.]*', text)
    key = re.sub(r'"|(?<!\d)\s+|\s+(?![\d.])', "", words[1] if words else text)  # 3 3 is not 33
    return key.lower() if words and ('"' in text or len(key) > 2 or key in "ABCD") else key

@functools.lru_cache(maxsize=512)  # the samples of a problem often agree
def _equal(given, gold):
    """Returns whether two answers are equal: as texts, or as values at all sample points."""
    if given.strip() == gold.strip():
        return bool(gold.strip())
    if not hasattr(_local, "mp"):
        _local.mp = MPContext()
        _local.mp.dps = _DIGITS
    (given, units), (gold, gold_units) = _normalise(given), _normalise(gold)
    fewer, more = map(iter, sorted((units, gold_units), key=len))
    if not all(word in more for word in fewer):  # 20% is 20% loss, but that is not 20% gain
        return False
    for label, other in ((_LABEL.fullmatch(given), gold), (_LABEL.fullmatch(gold), given)):
        if label and not _LABEL.fullmatch(other):  # (B) 12 is B and 12
            given, gold = label[1 if re.fullmatch(r"\(?[A-Ha-h]\)?", other) else 2], other
    if _text_key(given) == _text_key(gold):
        return _text_key(given) != ""
    pairs, rounded = [], re.search(r"\\floor|\\ceil", given + gold)
    for point in range(3, 6) if rounded else range(3):  # large numbers or fractions
        try:
            (x, letters), (y, more_letters) = _evaluate(given, point), _evaluate(gold, point)
        except (ZeroDivisionError, ValueError, OverflowError):
            continue  # undefined at this point
        pairs.append((x, y))
        if bool(letters) != bool(more_letters) and not _kind(x) == _kind(y) == _EQUATION:
            return False  # a letter too many
        if not letters | more_letters:
            break
    if pairs and all(_values_equal(*pair) for pair in pairs):
        return True
    gaps = [[operator.sub(*map(_approximate, side.parts)) for side in pair] for pair in pairs
            if all(_kind(side) == _EQUATION and len(side.parts) == 2 for side in pair)]
    return len(gaps) > 1 and all(  # two equations are multiples of each other
        gaps[0][0] and b and _values_equal(a * gaps[0][1] / gaps[0][0], b) for a, b in gaps)

def answers_equal(a: str, b: str) -> bool:
    """Returns whether two answers have one value; False where that is not known. Never raises."""
    try:
        return _equal(a, b)
    except Exception:  # refused, given up, or an internal error
        return False

def grade(response: str, answer: str) -> str:
    """Returns "correct", "wrong", "no_answer" or "gave_up" (a limit, an error). Never raises."""
    try:
        given = extract_answer(response)
        if given is None:
            return "no_answer"
        return "correct" if _equal(given, _last_boxes(answer) or answer) else "wrong"
    except _Refused:
        return "wrong"
    except Exception:  # counted apart from wrong, and never raised into training
        return "gave_up"

REWARD = {"correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "gave_up": 0.0}
load_verifier = functools.cache(runpy.run_path)  # a --verifier FILE.py runs once

def judge(pairs, verifier=""):
    """`grade`'s words on (response, answer) pairs, or numbers: those of a --verifier FILE.py."""
    if not verifier:
        return [grade(*pair) for pair in pairs]
    with errors_as_one_line(f"--verifier {verifier}, verify(response, answer)"):
        verify = load_verifier(verifier)["verify"]
        values = [float(verify(*pair)) for pair in pairs]
        _require(all(map(math.isfinite, values)), ValueError("a value is not finite"))
        return values

def response_text(tokenizer, rollout):
    """The text of a response for `judge`: it begins with the <think> that its prompt ends with."""
    ends = tokenizer.decode(rollout.prompt[-8:], skip_special_tokens=False).rstrip()
    text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
    return f"<think>\n{text}" if ends.endswith("<think>") else text

# ---------- 5 sampler: prompts -> rollouts --------------------------------------------------------
# Sampling is most of a step of RL or OPD. What makes it fast, in reading order:
#   continuous batching  every BLOCK tokens, waiting rows take the places of ended ones
#   paged cache          memory is for tokens that exist; when it is full, the youngest rows wait
#   shared prefill       a prompt passes through the model once for the rows that start together
#   recorded steps       on CUDA a block replays one recorded step, ~1,700 launches a token less
#   one uniform a token  inverse CDF over sums of 64 weights: a V-wide pass, not V random numbers

BLOCK = 8  # tokens between two looks at which rows have ended; an ended row wastes half of them
PAGE = {"cpu": 32, "cuda": 256}  # tokens of a page; what suits `attend_pages` there
RECORDS = {"cuda"}  # types of device whose steps are recorded; set() is slower, but takes any

@dataclass
class Rollout:
    """One response to one prompt, as token ids."""
    prompt: list
    tokens: list  # the stop token, if there is one, is the last of them and is trained on
    logp: list  # log pi(token) when it was sampled, at the sampling temperature
    finished: bool  # ended by a stop token; False: cut at max_new_tokens

class Row:
    """A rollout that is being sampled: at most `limit` tokens with the uniforms of `stream`."""

    def __init__(self, prompt, stream, limit, index=0):
        self.rollout = Rollout(list(prompt), [], [], False)
        self.stream, self.limit, self.index = stream, limit, index
        self.pages = []  # of the cache, in order of positions

    def __len__(self):
        return len(self.rollout.prompt) + len(self.rollout.tokens)

    def add(self, tokens, logp, stops):
        """Append what a block has sampled, up to the first stop token or the limit."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in stops), BLOCK + 1)
        n = min(stop, BLOCK, self.limit - len(self.rollout.tokens))
        self.rollout.tokens += tokens[:n]
        self.rollout.logp += logp[:n]
        self.rollout.finished = n == stop
        self.ended = n == stop or len(self.rollout.tokens) == self.limit

def sample(lm, prompts, k, *, max_new_tokens, temperature, seed, sample_rows=256, kv_gib=0.0,
           done=None):
    """Sample k rollouts of each prompt from softmax(logits / temperature); temperature 0 is greedy.
    prompts: P lists of token ids; seed: a tuple of ints. Returns P*k Rollouts, prompt by prompt;
    done(i, rollouts) is called for prompts[i] as soon as its last one has ended. This is the policy
    that the losses differentiate: no top-k, no top-p. Its random numbers depend on (seed, prompt,
    sample index), not on neighbours. sample_rows, and kv_gib (0: all), bound the rows at once."""
    if not prompts:
        return []
    rows = [Row(p, np.random.default_rng(np.array((*seed, *p, j), np.uint32)), max_new_tokens, i)
            for i, p in enumerate(prompts) for j in range(k)]
    rollouts, left = [row.rollout for row in rows], [k] * len(prompts)
    for i in decode(lm, rows, temperature, sample_rows, kv_gib):
        left[i] -= 1
        if done and not left[i]:
            done(i, rollouts[i * k : (i + 1) * k])
    return rollouts

def decode(lm, rows, temperature, sample_rows, kv_gib):
    """Fill in the rollouts of the rows; yields the index of each as it ends."""
    waiting, live, stops = deque(rows), [], set(lm.stop_ids)  # live: the oldest first
    longest = max(len(row) + row.limit for row in rows)
    lm.model.eval()  # without gradient checkpointing
    # autocast makes bf16 copies of the weights once; in inference mode it would at every step
    with torch.inference_mode(not lm.bf16), torch.no_grad(), lm.autocast():
        cache = PagedCache(lm, min(sample_rows, len(rows)), longest, kv_gib)
        step = Step(lm, cache, temperature)
        while waiting or live:
            live, started = cache.reserve(live, waiting, sample_rows)
            cache.prefill(lm, started)
            for row, tokens, logp in zip(live, *step.run_block(live)):
                row.add(tokens, logp, stops)
            yield from (row.index for row in live if row.ended)
            live = [row for row in live if not row.ended]

class PagedCache:
    """Keys and values of the live rows, in pages 1 to `used` of a pool (layers, 2, pages, page, kv
    heads, head dim). Page 0 is scratch: padded rows write there. 65,535 are a kernel's limit."""

    def __init__(self, lm, rows, longest, kv_gib):
        config, device = lm.model.config, lm.device
        layers, heads = config.num_hidden_layers, config.num_key_value_heads // lm.parts
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = torch.bfloat16 if lm.bf16 else torch.float32
        self.page, self.used, self.dense = PAGE.get(device.type, 256), 0, device.type not in RECORDS
        a_row = self.pages_for(longest)
        a_page = 2 * layers * self.page * heads * dim * dtype.itemsize  # bytes
        room = torch.tensor(cache_bytes(lm, kv_gib) / a_page, dtype=torch.float64)
        if lm.parts > 1:  # all of them take the same steps
            dist.all_reduce(room, dist.ReduceOp.MIN, lm.model.group)
        self.capacity = min(rows * (a_row + 1), int(room), 65534)
        check(self.capacity >= a_row, f"the sampler's cache holds {self.capacity * self.page} "
              f"tokens and a row may take {longest}: lower --max-new-tokens or raise --kv-gib")
        if device.type == "cpu":  # a page of a head is one matrix, which is fast there
            shape = (layers, 2, self.capacity + 1, heads, self.page, dim)
            zeros = np.zeros((self.capacity + 1) * a_page, np.uint8)  # no memory until written
            self.pool = torch.from_numpy(zeros).view(dtype).view(shape).transpose(3, 4)
        else:  # the kernel on CUDA wants positions first
            shape = (layers, 2, self.capacity + 1, self.page, heads, dim)
            self.pool = torch.zeros(shape, dtype=dtype, device=device)

    def pages_for(self, tokens):
        """Pages of a row of so many tokens and its next BLOCK (the last token has no keys yet)."""
        return -(-(tokens - 1 + BLOCK) // self.page)

    def reserve(self, live, waiting, sample_rows):
        """Give rows the pages of their next BLOCK tokens: the live ones, the oldest first, and then
        those of `waiting` for which there is room. Returns all of them, and the latter. When the
        pool is full, the youngest live rows lose their pages and wait."""
        total = np.cumsum([self.pages_for(len(row)) for row in live])
        n = int((total <= self.capacity).sum())
        for row in reversed(live[n:]):
            row.pages = []
            waiting.appendleft(row)
        rows, used = live[:n], sum(self.pages_for(len(row)) for row in live[:n])
        while waiting and len(rows) < sample_rows:
            used += self.pages_for(len(waiting[0]))
            if rows and used + len(rows) > self.capacity:  # each may soon need one more page
                break
            rows.append(waiting.popleft())
        owners = {page: (row, i) for row in rows for i, page in enumerate(row.pages)}
        free = [page for page in range(1, used + 1) if page not in owners]  # enough of the lowest
        moved = [page for page in owners if page > len(owners) and self.dense]  # fill the gaps
        gaps, free = free[: len(moved)], iter(sorted(free[len(moved) :] + moved))
        for layer in self.pool if gaps else ():  # all layers at once would double the memory
            layer[:, gaps] = layer[:, moved]
        for page, gap in zip(moved, gaps):
            row, i = owners[page]
            row.pages[i] = gap
        for row in rows:
            row.pages += itertools.islice(free, self.pages_for(len(row)) - len(row.pages))
        self.used = max(page for row in rows for page in row.pages)
        return rows, rows[n:]

    def prefill(self, lm, rows):
        """Store keys and values of all known tokens but the last, once for rows with the same."""
        groups = {}
        for row in rows:
            known = (row.rollout.prompt + row.rollout.tokens)[:-1]
            groups.setdefault(tuple(known), []).append(row)
        groups.pop((), None)
        known, groups = list(groups), list(groups.values())
        for part in micro_batches([group[0].rollout for group in groups], 0, lm.device):
            ids = pad_sequence([torch.tensor(known[i]) for i in part], batch_first=True)
            copies = []  # from which place of `ids` to which page and offset
            for line, i in enumerate(part):
                t = np.arange(len(known[i]))
                copies += [(line * ids.shape[1] + t, np.array(row.pages)[t // self.page],
                            t % self.page) for row in groups[i]]
            source, pages, offsets = (torch.from_numpy(np.concatenate(x)).to(lm.device)
                                      for x in zip(*copies))

            def attend(module, query, key, value, scaling):
                for pool, new in zip(self.pool[module.layer_idx], (key, value)):
                    new = new.transpose(1, 2).flatten(0, 1)[source]  # (copies, kv heads, dim)
                    pool[pages, offsets] = new.to(pool.dtype)
                return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]

            lm.body(input_ids=ids.to(lm.device), use_cache=False, attend=attend)

def cache_bytes(lm, kv_gib):
    """Bytes for keys and values. kv_gib 0: half of a CPU's memory, 80 % of what a GPU can spare."""
    if kv_gib:
        return kv_gib * 2**30
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()
        copies = sum(2 * p.numel() for p in lm.model.parameters() if p.dtype != torch.bfloat16)
        return 0.8 * (torch.cuda.mem_get_info(lm.device)[0] - copies)
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

class Step:
    """One token for every live row. All that it reads and writes is in tensors of `state`, so that
    on CUDA it can be recorded once for each shape and then replayed without the host."""

    def __init__(self, lm, cache, temperature):
        self.lm, self.cache, self.temperature, self.head = lm, cache, temperature, lm.head()
        self.graphs, self.memory, self.records = {}, None, lm.device.type in RECORDS

    def run_block(self, live):
        """BLOCK tokens of every live row and their log-probs, two lists of lists."""
        shape, pages = (len(live), max(len(row.pages) for row in live)), self.cache.used
        if self.records:  # few shapes: powers of two
            shape, pages = tuple(1 << (n - 1).bit_length() for n in shape), self.cache.capacity
        state = self.make_state(live, *shape, pages)
        if self.records and shape in self.graphs:
            replay, recorded = self.graphs[shape] = self.graphs[shape] or self.record(state)
            for name, tensor in state.items():
                recorded[name].copy_(tensor)
            for _ in range(BLOCK):
                replay()
            state = recorded
        else:
            self.graphs[shape] = None  # recorded next time, when its kernels are loaded
            for _ in range(BLOCK):
                self(state)
        return [state[name][: len(live)].tolist() for name in ("tokens", "logps")]

    def make_state(self, live, B, W, pages):
        """Tensors of B rows of at most W pages each; rows beyond the live ones are padding."""
        state = {"table": np.zeros((B, W), int), "owner": np.zeros(pages + 1, int),
                 "first": np.full(pages + 1, 1 << 40), "position": np.zeros(B, int),
                 "token": np.zeros(B, int), "uniforms": np.zeros((B, BLOCK)), "t": np.zeros(1, int),
                 "tokens": np.zeros((B, BLOCK), int), "logps": np.zeros((B, BLOCK), np.float32)}
        for i, row in enumerate(live):
            state["table"][i, : len(row.pages)] = row.pages
            state["owner"][row.pages] = i
            state["first"][row.pages] = np.arange(len(row.pages)) * self.cache.page
            state["position"][i] = len(row) - 1
            state["token"][i] = (row.rollout.tokens or row.rollout.prompt)[-1]
            state["uniforms"][i] = row.stream.random(BLOCK)
        return {k: torch.from_numpy(v).to(self.lm.device) for k, v in state.items()}

    def record(self, state):
        """Record one step as a CUDA graph. Returns (its replay, the tensors that it works on)."""
        graph = torch.cuda.CUDAGraph()
        self.memory = self.memory or torch.cuda.graph_pool_handle()  # one for all graphs
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            self(state)
        return graph.replay, state

    def __call__(self, state):
        """Feed each row's last token, draw the next."""
        table, owner, position = state["table"], state["owner"], state["position"]
        page, at = self.cache.page, position[:, None]  # (B, 1)
        here, offset = table.gather(1, at // page).squeeze(1), position % page
        used = (position[owner] + 1 - state["first"]).clamp(0, page)  # keys in each page

        def attend(module, query, key, value, scaling):
            pools = self.cache.pool[module.layer_idx]  # (2, pages, page, kv heads, dim)
            for pool, new in zip(pools, (key, value)):
                pool[here, offset] = new[:, :, 0].to(pool.dtype)
            keys, values = (pool[: len(owner)] for pool in pools)
            q = query[:, :, 0].to(keys.dtype)[owner]
            out, lse = attend_pages(q, keys, values, used, scaling)  # (pages, H, dim), (pages, H)
            weight = lse[table].softmax(1)  # (B, W, H); page 0 and pages to come get 0
            return (weight[..., None] * out[table]).sum(1, keepdim=True)  # (B, 1, H, dim)

        hidden = self.lm.body(input_ids=state["token"][:, None], position_ids=at, use_cache=False,
                              attend=attend)[0][:, 0]
        logits = self.lm.logits(hidden, self.head, self.temperature or 1.0)
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (B, V); the largest is 1
        t = state["t"].expand_as(at)
        token = (inverse_cdf(weights, state["uniforms"].gather(1, t)) if self.temperature
                 else weights.argmax(-1, keepdim=True))
        if self.lm.parts > 1:  # rounding must not part them
            dist.broadcast(token, group=self.lm.model.group, group_src=0)
        logp = (weights.gather(1, token) / weights.sum(-1, keepdim=True)).log()
        state["tokens"].scatter_(1, t, token)
        state["logps"].scatter_(1, t, logp)
        state["token"].copy_(token[:, 0])
        state["position"] += 1
        state["t"] += 1

def attend_pages(q, keys, values, used, scaling):
    """Attention inside each page, of one query over the page's first `used` keys. q: (m, H, D),
    keys, values: (m, page, kv heads, D), used: (m,). Returns (m, H, D) and, to put pages together,
    the log of each softmax's denominator, (m, H); -1e30 for an empty page."""
    m, page, heads, dim = keys.shape
    if q.dtype == torch.bfloat16 and has_bf16(q.device) and dim <= 256 and dim % 8 == 0:  # fits it
        one = torch.arange(m + 1, dtype=torch.int32, device=q.device)  # a page is a sequence
        out, lse = torch.ops.aten._flash_attention_forward(
            q, keys.flatten(0, 1), values.flatten(0, 1), one, one * page, 1, page, 0.0, False,
            False, scale=scaling, seqused_k=used.int())[:2]
        return out, lse.T.masked_fill(used[:, None] == 0, -1e30)
    keys, values = (x.transpose(1, 2).float() for x in (keys, values))  # (m, kv heads, page, D)
    unused = torch.arange(page, device=q.device) >= used[:, None]
    scores = (q.float() * scaling).view(m, heads, -1, dim) @ keys.transpose(2, 3)
    scores = scores.masked_fill_(unused[:, None, None], -1e30)  # (m, kv heads, H / kv heads, page)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    mass = weights.sum(-1, keepdim=True)
    out, lse = weights @ values / mass, top + mass.log()  # -1e30 swallows the log
    return out.view(q.shape), lse.view(m, -1)

def inverse_cdf(weights, uniform):
    """Draw from (rows, V) weights with a uniform per row (rows, 1): the first id whose CDF exceeds
    it, (rows, 1), never one of weight 0. Summed in two levels, blocks of 64 and then inside one
    block, in float64: one running sum in fp32 would swallow the many rare tokens. NaN: any id."""
    last, spare = weights.shape[1] - 1, -weights.shape[1] % 64
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(-1, (-1, 64))
    mass = blocks.sum(-1, dtype=torch.float64)
    cdf = mass.cumsum(-1)
    target = uniform * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp(max=mass.shape[-1] - 1)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, 64))[:, 0].double().cumsum(-1)
    rest = target - (cdf.gather(1, block) - mass.gather(1, block))
    rest = torch.minimum(rest, inner[:, -1:] * (1 - 2**-52)).clamp(min=0)
    return (block * 64 + torch.searchsorted(inner, rest, right=True)).clamp(max=last)

def attention(module, query, key, value, attention_mask, scaling, attend=None, **kwargs):
    """The attention of all layers, causal, or the caller's: (B, H, T, dim) -> (B, T, H, dim)."""
    check(kwargs.get("softcap") is kwargs.get("s_aux") is None, "attention with softcap or s_aux")
    check(key.shape[2] <= (kwargs.get("sliding_window") or math.inf), "longer than sliding_window")
    return ((attend(module, query, key, value, scaling), None) if attend else
            sdpa_attention_forward(module, query, key, value, None, scaling=scaling))

transformers.AttentionInterface.register("ours", attention)

# ---------- 6 log-probs: rollouts -> micro-batches -> chunks of (n, V) ----------------------------
def micro_batches(rows, micro_tokens, device, share=None):
    """Row indices, all or a share's, alike in length, in groups of one row or of micro_tokens
    padded tokens (0: 1,024 on a CPU, for its caches, else 32,768). No split moves a gradient."""
    micro_tokens = micro_tokens or (1024 if device.type == "cpu" else 32768)
    lengths = [len(r.prompt) + len(r.tokens) for r in rows]
    groups = []
    for i in sorted(range(len(rows)) if share is None else share, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= micro_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups

def over_chunks(fn, lm, hidden, temperature, chunk, **constants):
    """Forward and backward of a loss, `chunk` tokens at once; returns what it logs, summed.
    hidden: (N, D), from lm's graph; constants: (N, ...) tensors or None. fn takes a chunk's
    log-probs (n, V) and, by name, its part of each constant that is not None. It returns the
    chunk's part of the loss, a scalar, and a tuple of (n,) tensors to log. (N, V) never exists: a
    chunk's gradient is taken at once, by autograd to the logits, then by products with the head."""
    sums, head, chunk = 0.0, lm.head(), lm.chunk_size(chunk, hidden.shape[-1])
    states, spare = hidden.detach().to(head.dtype), len(head) - lm.vocab
    constants = {k: v.to(hidden.device) for k, v in constants.items() if v is not None}
    grad, weight = torch.empty_like(hidden), lm.model.get_output_embeddings().weight
    if weight.requires_grad and weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    head_grad = weight.grad[: lm.vocab].split(4096) if weight.requires_grad else ()  # small sums
    for h, g, *part in zip(*(t.split(chunk) for t in (states, grad, *constants.values()))):
        logits = lm.logits(h, head, temperature).requires_grad_()
        loss, logged = fn(logits.log_softmax(-1), **dict(zip(constants, part)))
        # NaN if the loss is not finite: then the whole update is skipped, see `optimizer_step`
        scale = torch.where(loss.detach().isfinite(), 1 / temperature, math.nan)
        (loss * scale).backward()
        sums = sums + torch.stack([x.detach().sum(dtype=torch.float64) for x in logged])
        by_head = F.pad(logits.grad.bfloat16(), (0, spare)) if spare else logits.grad.to(head.dtype)
        g.copy_(by_head @ head)
        for total, by in zip(head_grad, by_head[:, : lm.vocab].split(4096, 1)):
            total.add_(by.T @ h) if lm.bf16 else total.addmm_(by.T, h)
    hidden.backward(grad)
    return sums.cpu()

# ---------- 7 optimizer ---------------------------------------------------------------------------
def make_optimizer(lm, cfg):
    """AdamW on the fp32 masters (tied weights once)."""
    parameters = list(lm.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, cfg.adam_beta2),
                                  weight_decay=cfg.weight_decay, fused=lm.device.type == "cuda")
    for p in parameters:  # AdamW would make these at its first step; `Run.steps` may load them
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer

def optimizer_step(lm, optimizer, cfg, updates):
    """Clip the gradient, update, drop the gradient. Returns its norm before clipping; if that is
    not finite, the update is skipped. The learning rate follows from the number of updates made:
    linear warmup, then constant or, over `updates` of them, linear decay to 0."""
    if isinstance(lm.model, fsdp.FSDPModule):
        lm.model.reshard()  # drops what is gathered, before the weights change
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(lm.model.parameters(), cfg.grad_clip))
    if norm.isfinite():
        group, = optimizer.param_groups
        made = optimizer.state[group["params"][0]]["step"].item()  # AdamW counts them
        decay = max(0.0, 1 - made / updates) if cfg.lr_schedule == "linear" else 1.0
        group["lr"] = cfg.lr * (min(1.0, (made + 1) / max(1, cfg.warmup_steps)) * decay)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()

# ---------- 8 run folder: settings, metrics, checkpoints, resume ----------------------------------
MAX_SKIPPED = 5  # steps in a row without an update end a run: the weights are at fault, not data

def write_text(path, text, append=False):
    """Rank 0 writes a text file whole or not at all, or appends to it. UserError names the file."""
    beside = path if append else f"{path}.tmp"
    with errors_as_one_line(f"cannot write {path}"):  # on a full disk an OSError names no file
        if rank() == 0:
            with open(beside, "a" if append else "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)

def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")
def json_line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"
def append_json_line(path, value):
    write_text(path, json_line(value), append=True)

def read_json_lines(path, limit=None):
    """The first `limit` objects of a .jsonl file, or []; what follows (half a line?) is cut off."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    lines = [line for line in data.splitlines(True)[:limit] if line.endswith(b"\n")]
    if len(data) > sum(map(len, lines)):
        os.truncate(path, sum(map(len, lines)))
    return [read_json(path, line) for line in lines]

def read_json(path, data=None):
    """The value of a JSON file, or of `data` from it. Raises UserError if it is damaged."""
    with errors_as_one_line(f"{path} is damaged"):
        return json.loads(data or Path(path).read_bytes())

def read_record(folder):
    """The "run" record in a folder's config.json, {} if there is none."""
    path = Path(folder) / "config.json"
    return read_json(path).get("run", {}) if path.is_file() else {}

def lock(path, name):
    """Lock a file until the process ends. UserError if another has locked it: `name` is in use."""
    file = open(os.devnull if rank() else path, "a")
    try:
        if rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{name} is in use by another run") from error
    except OSError as error:  # some clusters have file systems without locks
        print(f"{name} cannot be locked ({error.strerror}): let no other run write there")
    return file

def short_hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]

def describe_run(cfg, old):
    """How a folder came to be: command, settings that can change a result, versions, code."""
    comments = field_comments(type(cfg))
    settings = {name: value for name, value in vars(cfg).items()
                if not comments[name][0].startswith("memory") and name not in ("out", "cache")}
    judge([], cfg.verifier)  # its mistakes should not wait
    settings["verifier"] = cfg.verifier and short_hash(Path(cfg.verifier).read_bytes())
    git = subprocess.getoutput(f"git -C {shlex.quote(os.path.dirname(__file__))} describe --always "
                               "--abbrev=12 --exclude='*' --dirty 2> /dev/null || echo unknown")
    git += " " + short_hash([Path(x).read_bytes() for x in (__file__, inspect.getfile(type(cfg)))])
    if old.get("git", git) != git:
        print(f"warning: the code that began this folder was {old['git']}, is now {git}")
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    return {"command": shlex.join(sys.argv), "settings": settings, "git": git,
            "versions": {"python": sys.version.split()[0], **versions}}

def differences(old, new):
    """What differs between two dicts of settings, as text; "" if nothing does."""
    return "; ".join(f"{k} was {old.get(k)!r}, is now {new.get(k)!r}"
                     for k in sorted(old | new) if old.get(k) != new.get(k))

def progress(*args, disable=False, **kwargs):
    """tqdm; into a log file it writes a line every ten seconds only."""
    return tqdm(*args, disable=disable or rank() > 0, dynamic_ncols=True, maxinterval=60,
                mininterval=0.2 if sys.stderr.isatty() else 10, **kwargs)  # seconds

def rounded(value):
    """A number with four significant digits; ints stay, what JSON cannot hold becomes None."""
    value = value if math.isfinite(value) else None
    return float(f"{value:.4g}") if isinstance(value, float) else value

class Run:
    """An output folder while a stage writes to it, and the stage's progress on the screen.
    config.json holds the run's record, beside the model's own keys once there is a model;
    metrics.jsonl has one line a step; state-<steps>, until the end, is the newest checkpoint."""

    def __init__(self, cfg, parents, data):
        """parents: models to start from; data: all Problems or Rollouts. Ends the program if it has
        finished the run; UserError for a folder that is another program's or run's, or in use."""
        self.cfg, self.out, self.metrics, self.labels = cfg, Path(cfg.out), [], []
        self.stop_signal, self.seconds_before = 0, 0.0  # in which a teacher's rollouts were sampled
        self.record = on_rank_0(self.open, parents, data) or sys.exit(0)

    def open(self, parents, data):
        """Lock the folder and write the run's record. Returns it, None if the run has finished."""
        foreign = (self.out / "config.json").exists() and not read_record(self.out)
        check(not foreign, f"{self.out} holds a model of another program; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out / ".lock", self.out)
        parents = [str(Path(p).resolve()) if Path(p).is_dir() else p for p in parents]
        old = read_record(self.out)
        record = {**describe_run(self.cfg, old), "parents": parents, "finished": False}
        record["settings"]["data_hash"] = short_hash(data)
        if old and (old["finished"] or (self.out / "metrics.jsonl").exists()):
            differ = differences(old["settings"], record["settings"])
            check(not differ, f"{self.out} holds a run with other settings or data ({differ}); "
                              "choose another --out or delete it")
        if old and old["finished"]:
            self.delete_checkpoints()  # a kill at the very end leaves them
            print(f"{self.out}: already finished with these settings")
            return None
        write_json(self.out / "config.json", {"run": record})
        return record

    def steps(self, total, lm, optimizer, teacher=None):
        """The numbers of the steps still to make, of `total`, behind a progress bar. Loads the
        newest checkpoint, if there is one; after each step it may write one."""
        self.lm = lm
        self.tensors = {"model": dict(lm.model.named_parameters()),  # of a checkpoint, whatever
                        "optimizer": optimizer.state_dict()["state"]}  # they will hold
        self.made_with = {**self.record["settings"], "weights": fingerprint(lm),
                          "teacher_weights": teacher and fingerprint(teacher)}
        own = {short_hash(problem_key(p.problem, self.cfg.verifier)) for p in self.labels}
        used = set().union(*(read_json_lines(f"{p}/labels.jsonl") for p in self.record["parents"]))
        print(f"{self.out}: {len(own)} labelled problems, {len(own & used)} of them used before")
        write_text(self.out / "labels.jsonl", "".join(map(json_line, sorted(own | used))))
        path, start, self.metrics = on_rank_0(self.newest_checkpoint)
        if path:
            dcp.load(self.tensors, checkpoint_id=path)  # fills them in place
            print(f"{self.out}: continuing after {start} steps")
        self.bar = progress(range(start, total), initial=start, total=total, desc=self.out.name)
        on_stop(self.stop_after_step)
        for self.step in self.bar:
            self.started, self.parts = time.perf_counter(), []
            yield self.step
            if self.step + 1 < total:  # after the last step comes the model
                self.save_state(self.step + 1)
        on_stop(stop_at_once)

    def newest_checkpoint(self):
        """Its folder or None, its steps, their metrics. UserError if other models have made it."""
        path = max(self.out.glob("state-????????"), default=None)
        if path:
            differ = differences(read_json(path / "made_with.json"), self.made_with)
            check(not differ, f"{self.out} holds checkpoints of another model ({differ}); choose "
                              "another --out or delete it")
        (self.out / "metrics.jsonl").touch()
        steps = int(path.name.removeprefix("state-")) if path else 0
        return path, steps, read_json_lines(self.out / "metrics.jsonl", steps)

    def stop_after_step(self, number, _frame):
        """Signal handler: the current step ends and is saved; a second signal does not wait."""
        if self.stop_signal:
            stop_at_once(number)
        self.stop_signal = number
        if rank() == 0:  # os.write, because print fails inside another print
            os.write(2, b"\nstopping after this step; the same signal again stops at once\n")

    def time(self, name):
        """The part `name` of the step begins; the metrics tell its seconds as seconds_<name>."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parts.append((f"seconds_{name}", time.perf_counter()))

    def log(self, *shown, rows, note, grad_norms, **metrics):
        """Append a line of metrics to metrics.jsonl; the bar shows those named. Every show_every
        steps the first of the step's Rollouts is printed, decoded, with a note. grad_norms: of the
        step's updates; UserError when those of the last MAX_SKIPPED steps all were not finite."""
        self.time("end")
        parts = {part: end - begin for (part, begin), (_, end) in itertools.pairwise(self.parts)}
        seconds = self.parts[-1][1] - self.started
        tokens, cut = sum(len(r.tokens) for r in rows), sum(not r.finished for r in rows)
        finite = [norm for norm in grad_norms if math.isfinite(norm)]
        metrics |= {"length": tokens / len(rows), "truncated": cut / len(rows), "tokens": tokens,
                    "grad_norm": sum(finite) / len(finite) if finite else math.nan,
                    "skipped": len(grad_norms) - len(finite), **parts,
                    "tokens_per_second": tokens / seconds, "seconds": seconds}
        line = {"step": self.step, **{k: rounded(v) for k, v in metrics.items()}}
        append_json_line(self.out / "metrics.jsonl", line)
        self.metrics.append(line)
        self.bar.set_postfix({k: line[k] for k in shown}, refresh=False)
        if self.cfg.show_every and self.step % self.cfg.show_every == 0:
            text = " → ".join(map(self.lm.tokenizer.decode, (rows[0].prompt, rows[0].tokens)))
            text = re.sub("(.{300}).+(.{300})", r"\1 […] \2", text.replace("\n", "⏎"))
            self.bar.write(f"[{self.out.name}, step {self.step}, {note}] {text}")
        if self.step == 0 and metrics["truncated"] > 0.5:
            self.bar.write(f"warning: {metrics['truncated']:.0%} of the responses were cut: is "
                           "--max-new-tokens too small, or does the model not know when to stop?")
        if metrics["skipped"]:
            self.bar.write(f"warning: step {self.step}: {metrics['skipped']} of {len(grad_norms)} "
                           "updates skipped, their loss or gradient is not finite")
        last = [line["grad_norm"] for line in self.metrics[-MAX_SKIPPED:]]
        gap, bound = metrics.get("sampler_gap", 0), 0.2 if self.lm.bf16 else 1e-3
        check(not gap > bound, f"sampler_gap {gap:.3g}: sampling and training see other log-probs, "
              f"rounding explains {bound} at most: a model that is not supported, or a defect")
        check(last != [None] * MAX_SKIPPED, f"the last {MAX_SKIPPED} steps had a loss or gradient "
              "that is not finite: the run diverged (is --lr too high?)")

    def save_state(self, steps):
        """Write a checkpoint every save_every steps, and when SIGTERM or Ctrl-C asked for the end.
        Every process writes its shards beside; then the folder is renamed, and only then the older
        one is deleted. Any number of processes can load it. UserError if it cannot be written."""
        # all stop if one process has heard a signal; one that comes later is for the next step
        heard = max(all_gather_dict({rank(): self.stop_signal}).values())
        due = self.cfg.save_every and steps % self.cfg.save_every == 0
        if not (due or heard):
            return
        path = self.out / f"state-{steps:08d}"
        beside = path.with_suffix(".tmp")
        on_rank_0(shutil.rmtree, beside, True)  # a killed run may have left it
        try:
            dcp.save(self.tensors, checkpoint_id=beside)
        except dcp.api.CheckpointException as failed:
            on_rank_0(shutil.rmtree, beside, True)  # a full disk needs the room
            error = next(iter(failed.failures.values()))[0]
            raise error if isinstance(error, KeyboardInterrupt) else UserError(
                f"cannot write {path}, is the disk full? ({error!s:.200})") from failed
        write_json(beside / "made_with.json", self.made_with)
        if rank() == 0:
            os.rename(beside, path)
            self.delete_checkpoints(but=path)
        if heard:
            stop_at_once(heard, note=f" after {steps} steps, all saved")

    def delete_checkpoints(self, but=None):
        for path in set(self.out.glob("state-*")) - {but}:
            shutil.rmtree(path)

    def finish(self):
        """Write the model and how long it took. If it cannot be written, the checkpoint stays."""
        seconds = self.seconds_before + sum(line["seconds"] for line in self.metrics)
        self.record |= {"finished": True, "steps": len(self.metrics), "seconds": rounded(seconds)}
        save_lm(self.lm, self.out, self.record)
        if rank() == 0:
            self.delete_checkpoints()
            self.lock.close()
        print(f"{self.out}: {len(self.metrics)} steps in {seconds:.0f} s, model saved")

# ---------- 9 processes: torchrun starts them, FSDP2 shards the models ----------------------------
# Each process runs the same script and knows all rollouts of a step. The work is divided:
#   sampling   each, or each group that shares a copy of all weights, takes its share of the prompts
#   training   each takes its share of the rows; losses are divided by counts of the whole update
#   writing    rank 0 only; but of a checkpoint each process writes its shards

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1
def rank():
    return dist.get_rank() if dist.is_initialized() else 0

@contextlib.contextmanager
def process_group(device):
    """Inside, the processes that torchrun started are one group: NCCL on CUDA, gloo on a CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(hours=6)  # one may wait for the longest response of another
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    if rank():
        sys.stdout = open(os.devnull, "w")
    yield
    dist.barrier()  # nobody leaves while another still writes
    dist.destroy_process_group()

def on_rank_0(fn, *args):
    """fn(*args), called on rank 0 only. All processes return its result, or raise its UserError."""
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = fn(*args)
        except UserError as error:
            result[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]

def all_gather_dict(part):
    """A dict on each process -> all of them put together, on every process."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}

def all_reduce_sum(tensor):
    """The sum over the processes of a tensor that each has."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

def shared_micro_batches(rows, micro_tokens, device):
    """`micro_batches` of this process's share of the rows, dealt out by length. Empty groups, a
    token of padding without a loss, fill up: sharded models need as many passes everywhere."""
    n = world_size()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt + rows[i].tokens))
    groups = [micro_batches(rows, micro_tokens, device, order[i::n]) for i in range(n)]
    return groups[rank()] + [[]] * (max(map(len, groups)) - len(groups[rank()]))

def sample_shared(lm, prompts, k, cfg, seed, write=None):
    """`sample` with cfg's settings; prompts are divided among groups of lm.parts processes, and all
    return all rollouts: those of a single process. Or write(i, rollouts) takes them, where memory
    may not hold all: a single process calls it as they end, several after a part of the prompts."""
    alone, n, (group, part) = world_size() == 1, world_size() // lm.parts, divmod(rank(), lm.parts)
    result, size = [], max(1, (8 if alone else n) * cfg.sample_rows // k if write else len(prompts))
    for start in range(0, len(prompts), size):
        mine = range(start + group, min(start + size, len(prompts)), n)
        with gathered(lm) as full:
            rows = sample(full, [prompts[i] for i in mine], k, max_new_tokens=cfg.max_new_tokens,
                          temperature=cfg.temperature, seed=seed, sample_rows=cfg.sample_rows,
                          kv_gib=cfg.kv_gib, done=alone and write and (
                              lambda i, rollouts: write(mine[i], rollouts)))
        groups = {i: rows[j * k : (j + 1) * k] for j, i in enumerate(mine) if not part}
        for i, rows in sorted(all_gather_dict(groups).items()) if not (alone and write) else ():
            write(i, rows) if write else result.extend(rows)
    return result

SPLIT_DIM = dict(q_proj=0, k_proj=0, v_proj=0, gate_proj=0, up_proj=0, o_proj=1, down_proj=1)

def count_parts(lm, cfg, device):
    """How many processes share a copy of lm, which has shapes only yet, while they sample: as cfg
    says, or so few that a part takes a third of a GPU; no more than divide all of it but norms."""
    sizes = [getattr(lm.model.config, "num_key_value_heads", 1), world_size()]
    for name, p in lm.model.named_parameters():  # in a block: model.layers.0.mlp.up_proj.weight
        if name.count(".") > 4 and p.shape != (getattr(lm.model.config, "head_dim", 0),):
            sizes.append((*p.shape, 1)[SPLIT_DIM.get(name.split(".")[-2], -1)])
    n = math.gcd(cfg.sample_parts, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), *sizes)
    if cfg.sample_parts > n:
        print(f"{lm.name}: --sample-parts {n}, because {cfg.sample_parts} here cannot share")
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    least = cfg.sample_parts or 3 * lm.model.num_parameters() * (2 if lm.bf16 else 4) / memory
    return next(i for i in range(1, n + 1) if i == n or (n % i == 0 and i > least))

def shard_model(lm, source, device):
    """Shard lm.model, which has shapes only, and fill it from `source`, which only rank 0 has. Each
    layer is gathered while it computes; embedding, head and last norm until model.reshard()."""
    model, mesh = lm.model, dist.init_device_mesh(device.type, (world_size(),))
    empty = {id(p): torch.nn.Parameter(torch.empty(0, device=device), requires_grad=False)
             for p in model.parameters()}
    lm.replica = copy.deepcopy(model, empty)  # tied weights stay one parameter
    lm.replica.group = group = dist.new_subgroups(lm.parts)[0] if lm.parts > 1 else None
    for name, module in lm.replica.named_modules():
        if lm.parts > 1 and SPLIT_DIM.get(name.split(".")[-1]):  # each gives a part of the sum
            module.register_forward_hook(lambda _, x, out: dist.all_reduce(out, group=group))
    for module in (*model.base_model.layers, model):
        # as in one process under autocast, embedding and residual stream keep the masters' fp32
        inner = torch.bfloat16 if lm.bf16 and module is not model else None
        mp = fsdp.MixedPrecisionPolicy(inner, torch.float32, cast_forward_inputs=False)
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, mp_policy=mp)
        module.set_gradient_divide_factor(1.0)  # gradients add up
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    model.tie_weights()
    set_model_state_dict(model, source.state_dict() if source else {}, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    for path, buffer in list(model.named_buffers()):  # angles, which no state_dict has
        value = torch.empty_like(buffer, device=device)
        dist.broadcast(value.copy_(source.get_buffer(path)) if source else value, 0)
        owner, _, name = path.rpartition(".")
        for module in (model, lm.replica):
            setattr(module.get_submodule(owner), name, value)
    model.sharded_body = lambda **inputs: model.base_model(**inputs)[:1]
    fsdp.register_fsdp_forward_method(model, "sharded_body")

def full_tensor(tensor):
    """A sharded tensor put together, which all processes must call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor

@contextlib.contextmanager
def gathered(lm):
    """Inside, lm with all its weights, or its part; if sharded, in the forward pass's dtype."""
    if lm.replica is None:
        yield lm
        return
    for parameter, (name, shard) in zip(lm.replica.parameters(), lm.model.named_parameters()):
        inner = torch.bfloat16 if lm.bf16 and ".layers." in name else shard.dtype
        full, dim = full_tensor(shard.detach().to(inner)), SPLIT_DIM.get(name.split(".")[-2])
        whole = lm.parts == 1 or dim is None
        parameter.data = full if whole else full.chunk(lm.parts, dim)[rank() % lm.parts].clone()
    try:
        yield dataclasses.replace(lm, model=lm.replica, replica=None)
    finally:
        for parameter in lm.replica.parameters():
            parameter.data = parameter.data.new_empty(0)
