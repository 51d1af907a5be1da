"""Real tokenizers, and a real chat model with its weights: what tiny models cannot show.

REAL_MODELS=FOLDER names a folder with tiny-qwen3, tiny-llama-3.1 (random weights, real tokenizers
and templates), qwen2.5-tokenizer and smollm2-135m-instruct (real weights). Without it these tests
are skipped.
"""

import functools
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import forked, metrics
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import common
import fkl_warmup

FOLDER = os.environ.get("REAL_MODELS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="REAL_MODELS names no folder of real models")
SMOLLM = "smollm2-135m-instruct"
QUESTION = "What is 12 + 30?"
ASKED = QUESTION + "\n" + common.INSTRUCTION
CHATML = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are {}<|im_end|>\n"
PROMPTS = [  # folder, thinking, the text that its template makes
    ("tiny-qwen3", True, CHATML),
    ("tiny-qwen3", False, CHATML + "<think>\n\n</think>\n\n"),
    ("qwen2.5-tokenizer", False, SYSTEM.format(
        "Qwen, created by Alibaba Cloud. You are a helpful assistant.") + CHATML),
    (SMOLLM, False, SYSTEM.format(
        "a helpful AI assistant named SmolLM, trained by Hugging Face") + CHATML),
    *[("tiny-llama-3.1", thinking, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
       f"{ASKED}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
      for thinking in (True, False)]]

def folder(name):
    return str(Path(FOLDER) / name)

@functools.cache
def tokenizer(name):
    return AutoTokenizer.from_pretrained(folder(name))

@functools.cache
def load(name, dtype="fp32"):
    """A frozen model. Shared: do not change it."""
    return common.load_lm(folder(name), common.StageConfig(dtype=dtype))

@pytest.mark.parametrize("name, thinking, text", PROMPTS)
def test_prompts_are_the_templates_byte_for_byte(name, thinking, text):
    """The ids are those of the text: no second BOS, no special token in pieces."""
    assert common.build_prompt(tokenizer(name), QUESTION, thinking, tokenize=False) == text
    ids = common.build_prompt(tokenizer(name), QUESTION, thinking)
    assert tokenizer(name).decode(ids) == text
    assert ids == tokenizer(name).encode(text, add_special_tokens=False)

@pytest.mark.parametrize("name, text", {name: text for name, _, text in PROMPTS}.items())
def test_worked_examples_are_the_templates_conversation(name, text, tmp_path):
    """Prompt, response and stop token of --targets data are what the template makes of a question
    and its answer; behind the stop token it may only end the line."""
    answer = "12 + 30 = 42, so \\boxed{42}."
    (tmp_path / "data.json").write_text(json.dumps([{"problem": QUESTION, "response": answer}]))
    cfg = fkl_warmup.Config(targets="data", data=str(tmp_path / "data.json"))
    (row,), = fkl_warmup.worked_examples(cfg, common.LM(name, None, tokenizer(name), 0, [], ""))
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
    whole = tokenizer(name).apply_chat_template(turns, tokenize=False)
    assert whole.startswith(text)
    assert tokenizer(name).decode(row.prompt + row.tokens) == whole.removesuffix("\n")
    ids = tokenizer(name).encode(whole.removesuffix("\n"), add_special_tokens=False)
    assert row.prompt + row.tokens == ids

@pytest.mark.parametrize("name, model_type, kind, fits", [
    ("qwen2.5-tokenizer", "qwen2", "Qwen2Tokenizer", True),
    ("qwen2.5-tokenizer", "llama", "PreTrainedTokenizerFast", True),
    ("qwen2.5-tokenizer", "llama", "GPT2Tokenizer", False),
    ("qwen2.5-tokenizer", "llama", "GemmaTokenizer", False),  # which loses all spaces
    (SMOLLM, "llama", "GPT2Tokenizer", True),
    (SMOLLM, "llama", "Qwen2Tokenizer", False),
    (SMOLLM, "qwen2", "PreTrainedTokenizerFast", False)])  # transformers goes by the model type
def test_the_ids_are_those_of_tokenizer_json(name, model_type, kind, fits, tmp_path):
    """Whatever class tokenizer_config.json names, and also where transformers' own choice would
    split text otherwise."""
    for path in Path(folder(name)).glob("*"):
        if "token" in path.name or "template" in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": kind}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type,
                                                      "vocab_size": 152_000}))
    text = "Let $x  = \\frac{3}{14}$\n\n  and\ty=2048, what's x?\n"
    want = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    lm = common.describe_lm(str(tmp_path))
    assert lm.tokenizer.encode(text) == want and lm.tokenizer.eos_token == "<|im_end|>"
    assert (AutoTokenizer.from_pretrained(tmp_path).encode(text) == want) == fits

@pytest.mark.parametrize("generation, config", [
    (None, None), ("<|endoftext|>", None), (None, "#")])  # "#" has id 2, a default of transformers
def test_a_base_model_stops_where_its_template_ends_a_turn(generation, config, tmp_path):
    """Qwen2.5-Math: eos is <|endoftext|>, the template writes <|im_end|>."""
    base = AutoTokenizer.from_pretrained(folder("qwen2.5-tokenizer"))
    ids = base.convert_tokens_to_ids
    base.eos_token = "<|endoftext|>"
    base.save_pretrained(tmp_path)
    for name, token, more in (("generation_config", generation, {}), (
            "config", config, {"model_type": "qwen2", "vocab_size": 152_000})):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            {"eos_token_id": token and ids(token), **more}))
    want = sorted(map(ids, ["<|endoftext|>", "<|im_end|>"]))
    assert common.describe_lm(str(tmp_path)).stop_ids == want
    assert common.end_of_turn(base) == ids("<|im_end|>")

@pytest.mark.parametrize("name, vocab, rows, stops", [
    ("tiny-qwen3", 151669, 151936, [151643, 151645]),
    ("tiny-llama-3.1", 128256, 128256, [128001, 128008, 128009]),
    (SMOLLM, 49152, 49152, [2])])
def test_vocabulary_and_stop_tokens(name, vocab, rows, stops):
    lm = load(name)
    assert (lm.vocab, lm.stop_ids) == (vocab, stops)
    assert lm.model.get_output_embeddings().weight.shape[0] == rows
    assert lm.head().shape[0] == vocab

def trained_logp(lm, rows):
    return lm.token_logp(*lm.states(rows), 1.0, 0)

@torch.no_grad()
def test_padding_of_the_embedding_is_never_seen():
    """All mass moves to the padded ids; the sampler and the trainer do as before."""
    lm = common.load_lm(folder("tiny-qwen3"), common.StageConfig(dtype="fp32"))
    prompt = common.build_prompt(lm.tokenizer, QUESTION, False)
    seen = []
    for _ in range(2):
        rows = common.sample(lm, [prompt], 2, max_new_tokens=8, temperature=1.0, seed=(0,))
        seen.append((rows, trained_logp(lm, rows).tolist()))
        lm.model.get_output_embeddings().weight[lm.vocab :] = 100.0
    assert seen[0] == seen[1]

@pytest.fixture(scope="module")
def prompts():
    questions = [QUESTION, "Name the capital of France."]
    return [common.build_prompt(tokenizer(SMOLLM), q, False) for q in questions]

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_greedy_equals_generate(dtype, prompts):
    """In bf16 two ways of adding up may part where two tokens are nearly as likely: their logits
    are then closer in fp32 than bf16 can tell, twice its error in that state."""
    lm = load(SMOLLM, dtype)
    ours = common.sample(lm, prompts, 1, max_new_tokens=16, temperature=0, seed=(0,))
    lm.model.set_attn_implementation("sdpa")
    with lm.autocast():
        theirs = [lm.model.generate(torch.tensor([p]), max_new_tokens=16, do_sample=False)[0]
                  [len(p) :].tolist() for p in prompts]
    lm.model.set_attn_implementation("ours")
    for row, tokens in zip(ours, theirs):
        if lm.bf16 and row.tokens != tokens:
            t = next(t for t, (a, b) in enumerate(zip(row.tokens, tokens)) if a != b)
            state = [common.Rollout(row.prompt, tokens[: t + 1], [], False)]
            rounded, exact = (x.logits(x.states(state)[0][-1], x.head(), 1.0)
                              for x in (lm, load(SMOLLM)))
            gap = (exact[row.tokens[t]] - exact[tokens[t]]).abs()
            assert gap <= 2 * (rounded - exact).abs().max(), t
        else:
            assert row.tokens == tokens

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_sampler_log_probs_are_the_trainers(dtype, prompts):
    """In bf16 both miss the exact value, that of fp32 (the weights are bf16), by about as much: so
    they are apart by at most twice the trainer's error, on the mean; the largest is noisier."""
    lm = load(SMOLLM, dtype)
    rows = common.sample(lm, prompts, 2, max_new_tokens=16, temperature=1.0, seed=(0,))
    trained = trained_logp(lm, rows)
    gap = (trained - torch.tensor([x for r in rows for x in r.logp])).abs()
    if lm.bf16:
        error = (trained - trained_logp(load(SMOLLM), rows)).abs()
        assert 0 < gap.mean() <= 2 * error.mean() and gap.max() <= 4 * error.max()
    else:
        assert gap.max() < 1e-4 and gap.mean() < 1e-5

SETTINGS = ("--max-new-tokens 8 --prompts 1 --rollouts 2 --steps 2 --lr 3e-5 --show-every 0 "
            "--dtype bf16 --exclude none --save-every")

def test_the_recipe_on_real_weights_and_a_kill(tmp_path):
    """Teacher's GRPO, warmup, distillation: two steps each, in bf16. The last is killed when both
    are logged and goes on after the first, from its checkpoint: the second has the same metrics."""
    data = [{"problem": f"What is {a} + 5?", "answer": a + 5} for a in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(data))

    def prepare():
        common.check_architecture = lambda lm, sampled: None  # takes seconds; `load` has checked
        verdicts = itertools.cycle(["correct", "wrong"])  # eight tokens are too few for an answer
        common.grade = lambda text, answer: next(verdicts)

    def die_at_the_end():
        prepare()
        common.Run.finish = lambda run: os.kill(os.getpid(), signal.SIGKILL)

    teacher, student = f"{tmp_path}/teacher", folder(SMOLLM)
    for stage, models in (("grpo", f"--mini-batch 1 --kl-coef 0 --model {student}"),
                          ("fkl_warmup", f"--teacher {teacher} --student {student}"),
                          ("opd", f"--teacher {teacher} --student {tmp_path}/fkl_warmup")):
        out = teacher if stage == "grpo" else f"{tmp_path}/{stage}"
        line = f"{stage}.py {models} --data {tmp_path}/data.json --out {out} {SETTINGS} "
        if stage == "opd":
            assert forked(line + "1", die_at_the_end).status == -signal.SIGKILL
            killed = metrics(out)
        ended = forked(line + str(int(stage == "opd")), prepare)
        assert ended.status == 0, ended.err
        assert len(metrics(out)) == 2
        assert all(step["grad_norm"] > 0 and step.get("kl", 1) > 0 for step in metrics(out))
    assert "continuing after 1 steps" in ended.out and metrics(out) == killed
    opd = common.load_lm(f"{tmp_path}/opd", common.StageConfig(dtype="bf16"))
    moved = {common.fingerprint(x) for x in (opd, load(SMOLLM, "bf16"))}
    assert len(moved) == 2 and opd.saved_dtype == "bfloat16"
