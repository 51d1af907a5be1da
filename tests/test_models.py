"""Models: one prompt for all scripts, pairs that may be compared, stop ids, masters, saved folders.

The folders here are made by hand with `tokenizers` and `transformers`; the references are the
model's own logits, file headers and arithmetic written out, never common.py.
"""

import dataclasses
import json
import math
import re
import string
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel,
                          DeepseekV3Config, DeepseekV3ForCausalLM, FalconConfig, FalconForCausalLM,
                          Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig,
                          GenerationConfig, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig,
                          GPTNeoXForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig,
                          MistralForCausalLM, MixtralConfig, MixtralForCausalLM,
                          PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, StableLmConfig, StableLmForCausalLM,
                          T5Config, T5ForConditionalGeneration)

import common
import evaluate
import fkl_warmup
import grpo
from common import LM, Rollout, StageConfig, UserError, build_prompt, check_pair

SPECIALS = ["<pad>", "<bos>", "<eos>", "<im_end>", "<user>", "<assistant>", "<think>", "</think>"]
TOKENS = [*SPECIALS, *string.printable]
# Writes its own BOS and a date line like Llama 3; thinking off appends an empty block like Qwen3.
TEMPLATE = (
    "<bos>{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    "{% for m in messages %}<user>{{ m.content }}<im_end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}")

def make_tokenizer(tokens=TOKENS, template=TEMPLATE, eos="<im_end>"):
    """One token per character; plain encoding puts a BOS in front, as Llama's tokenizer does."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos,
                                   bos_token="<bos>", chat_template=template)

TINY = {"vocab_size": len(TOKENS), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8, "tie_word_embeddings": False}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"tie_word_embeddings": True}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 2}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {}),
    "neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"num_key_value_heads": None}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"num_key_value_heads": None}),
    "falcon": (FalconConfig, FalconForCausalLM, {}),
    "mamba": (MambaConfig, MambaForCausalLM, {}),
    "bert": (BertConfig, BertLMHeadModel, {}),
    "t5": (T5Config, T5ForConditionalGeneration, {"d_model": 16, "d_ff": 32, "num_layers": 2}),
    "vision": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, {
        "text_config": TINY, "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2}}),
    "deepseek": (DeepseekV3Config, DeepseekV3ForCausalLM, {
        "n_routed_experts": 4, "moe_intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}),
}
EOS = GenerationConfig(eos_token_id=TOKENS.index("<im_end>"))

def make_folder(path, family="qwen3", rows=len(TOKENS), tokenizer=None, dtype=torch.float32,
                generation=EOS, seed=0, **config):
    """A tiny model folder; wide initialisation, so that logits are far from uniform."""
    config_class, model_class, fixed = FAMILIES[family]
    torch.manual_seed(seed)
    settings = {**TINY, "vocab_size": rows, "eos_token_id": 3, **fixed, **config}
    model = model_class(config_class(**{k: v for k, v in settings.items() if k not in {
        name for name in fixed if fixed[name] is None}}))
    if generation is not None:
        model.generation_config = generation
    model.to(dtype).save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)

def load_lm(folder, train=False, **settings):
    return common.load_lm(str(folder), StageConfig(**settings), train)

def encode(text):
    """Ids of a text, by hand."""
    return [TOKENS.index(t) for t in re.findall(r"</?\w+>|[\s\S]", text)]

def test_prompt_is_the_chat_template_with_one_bos_and_a_pinned_date():
    """The whole prompt, character by character: one BOS, the pinned date, no system message."""
    tokenizer = make_tokenizer()
    assert tokenizer("1")["input_ids"] == encode("<bos>1"), "the fixture must add a BOS by itself"
    want = ("<bos>26 Jul 2024<user>1+1=?\nPlease reason step by step, and put your final answer "
            "within \\boxed{}.<im_end><assistant>")
    off = build_prompt(tokenizer, "1+1=?", False)
    assert off == encode(want + "<think></think>") and all(type(i) is int for i in off)
    assert build_prompt(tokenizer, "1+1=?", True) == encode(want)

OPENS = TEMPLATE.replace("</think>{% endif %}", "</think>{% else %}<think>{% endif %}")

@pytest.mark.parametrize("template, thinking, response, verdict", [
    (OPENS, True, r"so \boxed{2}", "no_answer"),  # cut while it thinks, or never done with it
    (OPENS, True, r"so \boxed{1}</think>\boxed{2}", "correct"),
    (OPENS, True, r"so \boxed{2}</think>\boxed{1}", "wrong"),
    (OPENS.replace("else %}<think>", r"else %}<think>{{ '\n' }}"), True, r"\boxed{2}", "no_answer"),
    (OPENS, False, r"so \boxed{2}", "correct"),
    (TEMPLATE, True, r"so \boxed{2}", "correct"), (TEMPLATE, False, r"\boxed{2}", "correct"),
    (TEMPLATE, True, r"<think>\boxed{2}", "no_answer"),
    (TEMPLATE, True, r"<think>a</think>\boxed{2}", "correct")])
def test_a_thought_that_the_template_opens_is_no_answer(template, thinking, response, verdict,
                                                        tmp_path, monkeypatch):
    """The reward, --only-correct, the evaluation and --regrade of its file agree on the verdict."""
    tokenizer = make_tokenizer(template=template)
    row = Rollout(build_prompt(tokenizer, "1+1=?", thinking), encode(response), [], False)
    problem, lm = common.Problem("1+1=?", "2", row.prompt), SimpleNamespace(tokenizer=tokenizer)
    rewards, logged = grpo.reward_groups(tokenizer, [row, row], ["2"])
    assert rewards.tolist() == [[verdict == "correct"] * 2]
    assert logged["no_answer"] == (verdict == "no_answer")
    if verdict == "correct":
        assert fkl_warmup.correct_only([[row]], [problem], tokenizer) == [[row]]
    else:
        with pytest.raises(UserError, match="solves none"):
            fkl_warmup.correct_only([[row]], [problem], tokenizer)
    monkeypatch.setattr(evaluate, "sample_shared",
                        lambda lm, prompts, k, cfg, seed, write: write(0, [row]))
    cfg = evaluate.Config(samples=1, out=str(tmp_path))
    [line] = evaluate.answer_set(cfg, lm, [problem], tmp_path / "set.jsonl")
    assert line["verdicts"] == [verdict]
    stored = (tmp_path / "set.jsonl").read_bytes()
    evaluate.regrade(cfg, tmp_path)
    assert (tmp_path / "set.jsonl").read_bytes() == stored

# --- pairs

def lm_of(name, tokenizer=None, stop_ids=(3,), rows=len(TOKENS)):
    return LM(name, None, tokenizer or make_tokenizer(), rows, list(stop_ids), "float32")

SWAPPED = [*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]
REFUSED = {  # name: (what differs about the student, words of the message)
    "one token more": (dict(tokenizer=make_tokenizer([*TOKENS, "<extra>"]), rows=len(TOKENS) + 1),
                       "vocabulary .*<extra>"),
    "ids of two tokens swapped": (dict(tokenizer=make_tokenizer(SWAPPED)), "vocabulary"),
    "template": (dict(tokenizer=make_tokenizer(template=TEMPLATE.replace("<user>", "<user>:"))),
                 "chat template"),
    "template when thinking": (
        dict(tokenizer=make_tokenizer(template=TEMPLATE.replace(
            "<think></think>{% endif %}", "<think></think>{% else %}<think>{% endif %}"))),
        "chat template"),
    "stop tokens": (dict(stop_ids=(2,)), r"stop tokens \(\[3\] and \[2\]"),
}

@pytest.mark.parametrize("case", REFUSED)
def test_pair_is_refused_saying_what_differs(case):
    """Each difference alone refuses the pair; the one-line message names it and both models."""
    student, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        check_pair(lm_of("T"), lm_of("S", **student), thinking=case == "template when thinking")
    text = str(caught.value)
    assert "teacher T and student S" in text
    named = [r for r in ("vocabulary (", "chat template (", "stop tokens (") if r in text]
    assert len(named) == 1, "nothing but the difference is named"

def test_a_pair_may_differ_in_what_no_loss_sees(tmp_path):
    """Another eos_token, other lists of stop ids that meet, and a template that differs in the
    mode that is not in use."""
    teacher = make_folder(tmp_path / "t", generation=GenerationConfig(eos_token_id=[3, 2]))
    student = make_folder(tmp_path / "s", tokenizer=make_tokenizer(eos="<eos>"), eos_token_id=2,
                          generation=GenerationConfig(eos_token_id=2))
    check_pair(common.describe_lm(teacher), common.describe_lm(student))
    check_pair(lm_of("T", stop_ids=[2, 3]), lm_of("S", make_tokenizer(eos="<eos>"), [2]))
    thinks, _ = REFUSED["template when thinking"]
    check_pair(lm_of("T"), lm_of("S", **thinks), thinking=False)

@pytest.mark.parametrize("family", ["qwen3", "llama", "granite"])
def test_states_and_log_probs_are_those_of_the_models_own_logits_over_the_real_tokens(family,
                                                                                      tmp_path):
    """A teacher with 9 more embedding rows, which are made to win every softmax, and a student of
    the same tokens: the pair is accepted, and every softmax is over the shared tokens only.
    (Granite has a scale of its logits, which is 1 here.)"""
    V = len(TOKENS)
    teacher = load_lm(make_folder(tmp_path / "t", family, V + 9, tie_word_embeddings=False, seed=1))
    student = load_lm(make_folder(tmp_path / "s"))
    with torch.no_grad():
        teacher.model.lm_head.weight[V:] *= 30
    teacher.stop_ids = [2, 3]  # they need not be the same
    check_pair(teacher, student)
    rows = [Rollout(encode("<bos>1+1"), encode("=2<im_end>"), [], True),
            Rollout(encode("<bos>12345"), encode("="), [], False)]
    for lm in (teacher, student):
        with torch.no_grad():
            hidden, tokens = lm.states(rows)
            got = lm.logits(hidden, lm.head(), 0.7).log_softmax(-1)
            want = []
            for row in rows:  # one by one, with the model's own logits
                logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0, :, :V]
                want += (logits.double() / 0.7).log_softmax(-1)[len(row.prompt) - 1 : -1]
        assert tokens.tolist() == rows[0].tokens + rows[1].tokens
        assert got.shape == (4, V) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.stack(want), atol=1e-4, rtol=1e-4)

HASH = TOKENS.index("#")
SPECIAL = make_tokenizer(eos="<eos>")  # a base model's: eos is not what ends a turn
SPECIAL.add_special_tokens({"additional_special_tokens": ["<im_end>"]})

@pytest.mark.parametrize("generation, config, tokenizer, want", [
    (2, None, make_tokenizer(), [2, 3]),  # an int,
    ([3, 0], None, make_tokenizer(), [0, 3]),  # a list
    ([2, 0], None, make_tokenizer(eos=None), [0, 2]),
    (None, None, make_tokenizer(), [3]),  # or nothing in generation_config.json
    (None, [2, 3], make_tokenizer(eos="<eos>"), [2, 3]),  # which does not hide config.json's
    ([3], [2], make_tokenizer(), [2, 3]),
    (None, HASH, make_tokenizer(), [3]),  # but there transformers' default may be any text
    ([HASH], None, make_tokenizer(), [3, HASH]),
    (2, 2, SPECIAL, [2, 3])])  # the template ends a turn with <im_end>
def test_stop_ids_are_those_of_both_configs_the_tokenizer_and_the_template(
        generation, config, tokenizer, want, tmp_path):
    folder = make_folder(tmp_path, tokenizer=tokenizer, eos_token_id=config,
                         generation=GenerationConfig(eos_token_id=generation))
    assert common.describe_lm(folder).stop_ids == want

def test_worked_examples_end_as_the_template_ends_a_turn(tmp_path):
    """Not with eos, where that is another token; without both with any stop token."""
    (tmp_path / "data.json").write_text(json.dumps([{"problem": "1+1=?", "response": "2"}]))
    cfg = fkl_warmup.Config(student="", targets="data", data=str(tmp_path / "data.json"))
    for tokenizer, end in ((SPECIAL, 3), (make_tokenizer(eos=None), 2)):
        (row,), = fkl_warmup.worked_examples(cfg, lm_of("S", tokenizer, [2, 3]))
        assert row.tokens == [*encode("2"), end]

# --- weights: masters, saved dtype, ties

@dataclass
class Settings(StageConfig):
    out: str = ""  # output folder
    lr: float = 1e-6  # learning rate
    grad_clip: float = 1.0  # gradient norm limit

def dtypes(lm):
    return {p.dtype for p in lm.model.parameters()}

def train_steps(lm, steps=3):
    """A few updates on the log-probability of a fixed text."""
    optimizer = common.make_optimizer(lm, Settings())
    ids = torch.tensor([encode("<bos>1+1=2<im_end>")])
    for _ in range(steps):
        lm.model(ids, labels=ids).loss.backward()
        common.optimizer_step(lm, optimizer, Settings(), steps)
    return optimizer

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_fp32_masters_which_move_where_bf16_weights_stand_still(dtype, tmp_path):
    """Three steps at lr 1e-6 move over 90 % of the weights, bf16 folder or not; rounded to bf16,
    under 5 % would have moved."""
    lm = load_lm(make_folder(tmp_path, dtype=dtype), train=True)
    assert dtypes(lm) == {torch.float32}
    old = {n: p.detach().clone() for n, p in lm.model.named_parameters() if "embed" not in n}
    train_steps(lm)
    pairs = [(p, old[n]) for n, p in lm.model.named_parameters() if n in old]
    size = sum(p.numel() for p in old.values())
    assert sum((a != b).sum().item() for a, b in pairs) > 0.9 * size
    assert sum((a.bfloat16() != b.bfloat16()).sum().item() for a, b in pairs) < 0.05 * size

def test_frozen_models_are_kept_in_the_compute_dtype_and_take_no_gradient(tmp_path):
    """A teacher in bf16 needs no fp32 copy and is never trained."""
    folder = make_folder(tmp_path)
    assert dtypes(load_lm(folder, dtype="bf16")) == {torch.bfloat16}
    assert dtypes(load_lm(folder, dtype="fp32")) == {torch.float32}
    assert not any(p.requires_grad for p in load_lm(folder).model.parameters())
    assert all(p.requires_grad for p in load_lm(folder, train=True).model.parameters())

@pytest.mark.parametrize("family, dtype", [
    ("qwen3", torch.float32), ("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_a_saved_folder_loads_elsewhere_in_the_dtype_that_it_came_in(family, dtype, tmp_path):
    """Weights are the masters, rounded to that dtype; logits, prompt, stop ids and ties stay.

    Tied embeddings are one parameter of the optimizer and one tensor on disk, untied ones two.
    """
    generation = GenerationConfig(eos_token_id=[3, 2])
    lm = load_lm(make_folder(tmp_path / "in", family, dtype=dtype, generation=generation),
                 train=True)
    optimizer = train_steps(lm)
    common.save_lm(lm, tmp_path / "out", {"finished": True, "note": "kept"})
    assert dtypes(lm) == {torch.float32}, "saving must not touch the masters"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    masters = {name: p.detach() for name, p in lm.model.named_parameters()}
    assert stored.keys() == masters.keys()
    assert all(torch.equal(stored[name], p.to(dtype)) for name, p in masters.items())
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    assert shapes.count((len(TOKENS), 16)) == (1 if family == "qwen3" else 2)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family == "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([encode("<bos>what?")])
    with torch.no_grad():
        assert model.dtype == dtype
        error = (model.float()(ids).logits - lm.model(ids).logits).abs().max()
    assert error == 0 if dtype == torch.float32 else error < 0.1
    assert model.generation_config.eos_token_id == [3, 2]
    assert load_lm(tmp_path / "out").saved_dtype == str(dtype).removeprefix("torch.")
    assert build_prompt(tokenizer, "1+1", False) == build_prompt(lm.tokenizer, "1+1", False)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["run"]
    assert record == {"finished": True, "note": "kept"}
    kind = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind == "PreTrainedTokenizerFast", "transformers 4 knows no TokenizersBackend"

# --- what is refused

def cut_short(folder):
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

def change(folder, file="config.json", **settings):
    """Change settings of a json file, or make one."""
    path = Path(folder) / file
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **settings}))

def own_code(folder, **settings):
    """Code in the folder, which leaves a file when it is executed."""
    for name in ("configuration_own", "modeling_own"):
        (Path(folder) / f"{name}.py").write_text("open('executed', 'w')\nOwn = object")
    change(folder, **settings, auto_map={"AutoConfig": "configuration_own.Own",
                                         "AutoModelForCausalLM": "modeling_own.Own"})

def nan_at(part, value=float("nan")):
    def damage(folder):
        weights = load_file(Path(folder) / "model.safetensors")
        next(w for name, w in weights.items() if part in name)[-1] = value
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    return damage

def without(pattern):
    return lambda folder: [path.unlink() for path in Path(folder).glob(pattern)]

def template(text):
    return dict(tokenizer=make_tokenizer(template=text))

QUANTIZED = "quantized; take the bf16"
NO_TURN = "leaves out the problem or the start of the assistant.s turn"
CLOSED = "{% for m in messages %}<user>{{ m.content }}<im_end>{% endfor %}"
REFUSED_MODELS = {  # name: (what make_folder gets, words of the message)
    "scaled logits": (dict(family="granite", logits_scaling=4.0), "not head times hidden state"),
    "capped logits": (dict(family="gemma3", final_logit_softcapping=2.0), "not head times hidden"),
    "capped attention": (dict(family="gemma2"), "attention with softcap"),
    "a window that no prompt fits": (dict(family="mistral", sliding_window=4),
                                     "longer than sliding_window"),
    "gpt-neox": (dict(family="neox"), "AttributeError.*num_key_value_heads"),
    "gpt-2, absolute positions": (dict(family="gpt2"), "AttributeError"),
    "stablelm": (dict(family="stablelm"), "sampling gives other log-probs"),
    "deepseek-v3, latent attention": (dict(family="deepseek"), "RuntimeError.*shape mismatch"),
    "falcon": (dict(family="falcon"), "KeyError.*ours"),
    "state space": (dict(family="mamba"), "sampling gives other log-probs"),
    "an encoder": (dict(family="bert"), "not head times hidden state"),
    "seq2seq": (dict(family="t5"), "causal model: .*Unrecognized configuration class"),
    "vision": (dict(family="vision"), "causal model: .*Unrecognized configuration class"),
    "heads that do not divide": (dict(num_attention_heads=3), "RuntimeError"),
    "no vocab_size": (dict(damage=lambda f: change(f, vocab_size=None)), "vocab_size"),
    "an unknown type": (dict(damage=lambda f: change(f, model_type="own")), "model type `own`"),
    "code of its own": (dict(damage=lambda f: own_code(f, model_type="own")), "custom code"),
    "fp8": (dict(damage=lambda f: change(f, quantization_config={"quant_method": "fp8"})),
            QUANTIZED),
    "gptq": (dict(damage=lambda f: change(f, quantization_config={"quant_method": "gptq",
                                                                  "bits": 4})), QUANTIZED),
    "an adapter beside its base": (dict(damage=lambda f: change(f, "adapter_config.json")),
                                   "merge it first .*merge_and_unload"),
    "an adapter alone": (dict(damage=lambda f: [change(f, "adapter_config.json"),
                                                without("[!a]*")(f)]), "merge it first"),
    "nan": (dict(damage=nan_at("mlp.up_proj")), ": 1 tensors missing, NaN or inf, e.g. .*up_proj"),
    "nan in the row of a rare token": (dict(damage=nan_at("embed")), "NaN .*embed_tokens"),
    "infinite": (dict(damage=nan_at("o_proj", -math.inf)), "NaN .*o_proj"),
    "more tokens than embeddings": (dict(rows=len(TOKENS) - 1), "embeddings"),
    "no tokenizer.json": (dict(damage=without("tokenizer.json")), "backend tokenizer"),
    "no tokenizer": (dict(damage=without("tokenizer*")), NO_TURN),
    "a broken tokenizer.json": (dict(damage=lambda f: change(f, "tokenizer.json", model=1)),
                                "cannot be used"),
    "a broken generation_config.json": (
        dict(damage=lambda f: (Path(f) / "generation_config.json").write_text("{")),
        "generation_config.json. is not a valid JSON"),
    "no chat template": (dict(tokenizer=make_tokenizer(template=None)), "chat template"),
    "a template that raises": (template("{{ raise_exception('tools only') }}"), "tools only"),
    "a template that is none": (template("{% for m in %}"), "TemplateSyntaxError"),
    "a template for lists of parts": (template(TEMPLATE.replace(
        "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")), NO_TURN),
    "a template without the problem": (template(TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'assistant' }}")), NO_TURN),
    "a template that opens no turn": (template(CLOSED), NO_TURN),
    "the same in plain text": (template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"), NO_TURN),
    "a template that ends the turn": (template(
        CLOSED + "{% if add_generation_prompt %}<assistant><im_end>{% endif %}"), NO_TURN),
    "no stop token": (dict(tokenizer=make_tokenizer(eos=None), eos_token_id=None,
                           generation=GenerationConfig()), "stop token"),
    "a damaged file": (dict(damage=cut_short), "SafetensorError"),
}

@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_is_refused_in_one_readable_line(case, tmp_path, monkeypatch):
    """Its log-probs would not be those that the losses see, or it is not complete; its own code is
    not executed, and nobody is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.exit("it asks a question"))
    options, message = REFUSED_MODELS[case]
    damage = (options := dict(options)).pop("damage", lambda folder: None)
    damage(make_folder(tmp_path / "model", **options))
    with pytest.raises(UserError, match=message) as caught:
        load_lm(tmp_path / "model", train=True)
    text = str(caught.value)
    assert text.startswith(f"'{tmp_path}/model' cannot be used, take a") and "\n" not in text
    assert not Path("executed").exists()

USED_MODELS = {  # name: (what make_folder gets, positions)
    "a window": (dict(family="mistral", sliding_window=130), 130),
    "a window beyond the positions": (dict(family="mistral", sliding_window=500,
                                           max_position_embeddings=200), 200),
    "a window in some layers": (dict(family="gemma3", sliding_window=130), 130),
    "a window that no layer has": (dict(family="qwen3", sliding_window=4, use_sliding_window=False,
                                        max_position_embeddings=200), 200),
    "a window in layers beyond the last": (
        dict(family="qwen3", sliding_window=4, use_sliding_window=True, max_window_layers=2,
             max_position_embeddings=200), 200),
    "a tokenizer's class that does not fit": (dict(family="qwen2", rows=200,
                                                   max_position_embeddings=200), 200),
    "experts": (dict(family="mixtral", max_position_embeddings=200), 200),
    "one head": (dict(num_attention_heads=1, num_key_value_heads=1,
                      max_position_embeddings=200), 200),
    "quantization null": (dict(damage=lambda f: change(f, quantization_config=None),
                               max_position_embeddings=200), 200),
    "a type that transformers knows, and code": (dict(damage=own_code,
                                                      max_position_embeddings=200), 200),
    "a user's turn that opens the answer's": (
        dict(max_position_embeddings=200, **template(
            "<bos>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}<im_end>{% endif %}{% endfor %}")), 200),
    "a template of problems only": (dict(max_position_embeddings=200,
                                         **template("{{ messages[0].content }}")), 200),
}

@pytest.mark.parametrize("case", USED_MODELS)
@torch.no_grad()
def test_a_near_miss_is_used_as_far_as_it_is_exact(case, tmp_path, monkeypatch):
    """Up to its positions, or its window if it has one, the sampler's log-probs are those of the
    model's own attention, and one token more is refused, with its name and number."""
    monkeypatch.chdir(tmp_path)
    options, positions = USED_MODELS[case]
    damage = (options := dict(options)).pop("damage", lambda folder: None)
    damage(make_folder(tmp_path / "model", **options))
    lm = load_lm(tmp_path / "model")
    assert lm.context == positions and not Path("executed").exists()
    row, = common.sample(dataclasses.replace(lm, stop_ids=[]), [[5, 6, 7]], 1, temperature=1.0,
                         max_new_tokens=positions - 3, seed=(0,))
    lm.model.set_attn_implementation("eager")
    logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0, 2:-1, : lm.vocab]
    want = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(row.logp), want, atol=2e-3, rtol=0)
    cfg = grpo.Config(model="", max_new_tokens=9)
    common.check_context(lm, cfg, positions)
    with pytest.raises(UserError, match=f"model knows {positions} positions.*by 1"):
        common.check_context(lm, cfg, positions + 1)

def test_the_window_of_an_unknown_setting_is_refused(tmp_path, monkeypatch):
    """The attention itself says what it sees, whatever config.json calls it."""
    lm = load_lm(make_folder(tmp_path, "mistral", sliding_window=130))
    with pytest.raises(UserError, match="longer than sliding_window"):
        lm.states([Rollout([5] * 100, [5] * 31, [], False)])

def test_a_model_that_the_sampler_decodes_wrongly_is_refused(tmp_path, monkeypatch):
    """Here the attention over the cache is broken, as it would be in an unknown architecture."""
    folder, attend = make_folder(tmp_path), common.attend_pages
    monkeypatch.setattr(common, "attend_pages", lambda *args: [2 * x for x in attend(*args)])
    with pytest.raises(UserError, match="sampling gives other log-probs than training"):
        load_lm(folder)

def test_a_run_is_no_model_until_its_weights_are_whole(tmp_path, monkeypatch, trainable_lm):
    """Its folder is refused from the first step on, also after a kill while the weights are
    written; then the same command can go on. (transformers writes config.json first.)"""
    cfg = Settings(out=str(tmp_path / "run"))

    def begin():  # as a stage does, up to its first step
        run = common.Run(cfg, parents=[], data=[])
        optimizer = common.make_optimizer(trainable_lm, cfg)
        assert next(run.steps(1, trainable_lm, optimizer)) == 0
        return run

    run = begin()
    with pytest.raises(UserError, match="unfinished run"):
        load_lm(cfg.out)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file",
                      Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.finish()
    run.lock.close()  # as the kernel does
    with pytest.raises(UserError, match="unfinished run"):
        load_lm(cfg.out)
    begin().finish()
    load_lm(cfg.out)

@pytest.mark.parametrize("name", ["nobody-has/this", "./no/such/folder", "no such model!", "", "."])
def test_a_model_that_does_not_exist_is_one_readable_line(name, tmp_path, monkeypatch):
    """A typing error in a model name, or an empty folder: one line that repeats the name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(repr(name))) as caught:
        load_lm(name)
    assert "\n" not in str(caught.value)

@pytest.mark.parametrize("device", ["cuda:99", "gpu9", "mps"])
def test_a_device_that_is_not_there_is_one_readable_line(device, tmp_path):
    with pytest.raises(UserError, match=f"--device {device}"):
        load_lm(make_folder(tmp_path), device=device)

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [9.0] * 4, "original_max_position_embeddings": 150}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 150}

@pytest.mark.parametrize("rope, positions", [({"rope_type": "default", "rope_theta": 1e4}, 200),
                                             (YARN, 200), (DYNAMIC, 192), (LONGROPE, 142)])
def test_a_response_stays_inside_the_models_positions(rope, positions, tmp_path):
    """Up to them training sees the log-probs of the sampler, whatever stands beside a row; one
    more is refused. Of dynamic NTK and longrope they end where the angles begin to depend on the
    longest row, less the block that an ended row may go on for."""
    lm = load_lm(make_folder(tmp_path, max_position_embeddings=200, rope_parameters=rope))
    assert lm.context == positions
    prompts, longest = [[5, 6, 7], [5, 6, 7, 8, 9]], positions - 5
    rows = common.sample(lm, prompts, 4, max_new_tokens=longest, temperature=1.0, seed=(0,))
    assert max(len(r.prompt + r.tokens) for r in rows) == positions
    with torch.no_grad():
        logp = lm.token_logp(*lm.states(rows), 1.0, 0)
    assert (logp - torch.tensor([x for r in rows for x in r.logp])).abs().max() < 1e-4
    problems = [common.Problem("1", "1")]
    fits = positions - len(build_prompt(lm.tokenizer, "1", False))
    assert common.tokenize_problems(problems, grpo.Config(model="", max_new_tokens=fits), lm)
    with pytest.raises(UserError, match=f"knows {positions} positions.*--max-new-tokens .* by 1"):
        common.tokenize_problems(problems, grpo.Config(model="", max_new_tokens=fits + 1), lm)

def test_fingerprint_names_the_weights(tmp_path):
    """Equal for equal weights; another after one update at lr 1e-6, and for another model."""
    folder = make_folder(tmp_path / "a")
    lm = load_lm(folder, train=True)
    before = common.fingerprint(lm)
    assert before == common.fingerprint(load_lm(folder))
    assert before != common.fingerprint(load_lm(make_folder(tmp_path / "b", seed=1)))
    train_steps(lm, 1)
    assert common.fingerprint(lm) != before
