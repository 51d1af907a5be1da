"""Models: one prompt for all scripts, pairs that may be compared, stop ids, masters, saved folders.

The folders here are made by hand with `tokenizers` and `transformers`; the references are the
model's own logits, file headers and arithmetic written out, never common.py.
"""

import datetime
import json
import re
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM,
                          GenerationConfig, GraniteConfig, GraniteForCausalLM, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

import common
from common import LM, Rollout, UserError, build_prompt, check_pair, load_lm

ROOT = Path(common.__file__).parent
SPECIALS = ["<pad>", "<bos>", "<eos>", "<im_end>", "<user>", "<assistant>", "<think>", "</think>"]
TOKENS = [*SPECIALS, *string.printable]
# Writes its own BOS and a date line like Llama 3; thinking off appends an empty block like Qwen3.
TEMPLATE = (
    "<bos>{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    "{% for m in messages %}<user>{{ m.content }}<im_end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}")


def make_tokenizer(tokens=TOKENS, template=TEMPLATE, eos="<im_end>", bos="<bos>"):
    """One token per character; plain encoding puts a BOS in front, as Llama's tokenizer does."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos,
                                   bos_token=bos, chat_template=template)


FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 8, "tie_word_embeddings": False}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
}
EOS = GenerationConfig(eos_token_id=TOKENS.index("<im_end>"))


def make_folder(path, family="qwen3", rows=len(TOKENS), tokenizer=None, dtype=torch.float32,
                generation=EOS, seed=0, **config):
    """A tiny model folder; wide initialisation, so that logits are far from uniform."""
    config_class, model_class, fixed = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5,
        pad_token_id=0, bos_token_id=1, **{"eos_token_id": 3, **fixed, **config}))
    if generation is not None:
        model.generation_config = generation
    model.to(dtype).save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


def encode(text):
    """Ids of a text, by hand."""
    return [TOKENS.index(t) for t in re.findall(r"</?\w+>|[\s\S]", text)]


# --- the prompt


def test_prompt_is_the_chat_template_with_one_bos_and_a_pinned_date():
    """The whole prompt, character by character: one BOS, the pinned date, no system message."""
    tokenizer = make_tokenizer()
    assert tokenizer("1")["input_ids"] == encode("<bos>1"), "the fixture must add a BOS by itself"
    want = ("<bos>26 Jul 2024<user>1+1=?\nPlease reason step by step, and put your final answer "
            "within \\boxed{}.<im_end><assistant>")
    off = build_prompt(tokenizer, "1+1=?", False)
    assert off == encode(want + "<think></think>") and all(type(i) is int for i in off)
    assert build_prompt(tokenizer, "1+1=?", True) == encode(want)
    assert datetime.date.today().strftime("%d %b %Y") not in tokenizer.decode(off)


def test_only_one_place_renders_a_chat():
    """One prompt builder: `apply_chat_template` is called at one line of the whole project."""
    calls = [path.name for path in ROOT.glob("*.py") for line in path.read_text().splitlines()
             if "apply_chat_template(" in line]
    assert calls == ["common.py"]


# --- pairs


def lm_of(name, tokenizer=None, stop_ids=(3,), rows=len(TOKENS)):
    return LM(name, None, tokenizer or make_tokenizer(), rows, list(stop_ids), False, "float32")


def test_pair_with_one_tokenizer_is_accepted():
    """Equal tokenizers pass, also when the stop sets only overlap."""
    check_pair(lm_of("T", stop_ids=(3, 2)), lm_of("S", stop_ids=(2,)))


SWAPPED = [*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]
REFUSED = {  # name: (what differs about the student, words of the message)
    "one token more": (dict(tokenizer=make_tokenizer([*TOKENS, "<extra>"]), rows=len(TOKENS) + 1),
                       "vocabulary .*<extra>"),
    "ids of two tokens swapped": (dict(tokenizer=make_tokenizer(SWAPPED)), "vocabulary"),
    "bos": (dict(tokenizer=make_tokenizer(bos=None)), "bos_token .*<bos>"),
    "eos": (dict(tokenizer=make_tokenizer(eos="<eos>")), "eos_token .*<im_end>.*<eos>"),
    "template": (dict(tokenizer=make_tokenizer(template=TEMPLATE.replace("<user>", "<user>:"))),
                 "chat template"),
    "template when thinking": (
        dict(tokenizer=make_tokenizer(template=TEMPLATE.replace(
            "<think></think>{% endif %}", "<think></think>{% else %}<think>{% endif %}"))),
        "chat template with --thinking"),
    "stop tokens": (dict(stop_ids=(2,)), r"stop tokens \(\[3\] and \[2\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pair_is_refused_saying_what_differs(case):
    """Each difference alone refuses the pair; the one-line message names it and both models."""
    student, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        check_pair(lm_of("T"), lm_of("S", **student))
    text = str(caught.value)
    assert "teacher T and student S" in text and "\n" not in text.split("they differ")[0]
    reasons = ("vocabulary (", "bos_token (", "eos_token (", "chat template (",
               "chat template with --thinking (", "stop tokens (")
    named = [r for r in reasons if r in text]
    assert len(named) == (2 if case == "template" else 1), "nothing but the difference is named"


def test_padded_embeddings_of_one_tokenizer_are_cut_to_the_real_vocabulary(tmp_path):
    """Teacher with 9 more embedding rows: accepted; every softmax is over the shared tokens only.

    The teacher's padding rows are made to win every softmax, so that one that saw them would show.
    """
    V = len(TOKENS)
    teacher = load_lm(make_folder(tmp_path / "t", rows=V + 9, tie_word_embeddings=False, seed=1))
    student = load_lm(make_folder(tmp_path / "s"))
    with torch.no_grad():
        teacher.model.lm_head.weight[V:] *= 30
    check_pair(teacher, student)
    rows = [Rollout(encode("<bos>1+1"), encode("=2<im_end>"), [], True),
            Rollout(encode("<bos>12345"), encode("="), [], False)]
    for lm in (teacher, student):
        with torch.no_grad():
            hidden, tokens = lm.states(rows)
            got = lm.log_probs(hidden, lm.head(), 0.7)
            want = []
            for row in rows:  # one by one, with the model's own logits
                logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0, :, :V]
                want += [torch.log_softmax(logits.double() / 0.7, -1)[i - 1]
                         for i in range(len(row.prompt), len(row.prompt) + len(row.tokens))]
        assert tokens.tolist() == rows[0].tokens + rows[1].tokens
        assert got.shape == (4, V) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.stack(want), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.exp().sum(-1), torch.ones(4))


# --- stop tokens


@pytest.mark.parametrize("generation, tokenizer_eos, want", [
    (2, "<im_end>", [2, 3]), ([3, 0], "<im_end>", [0, 3]), ([2, 0], None, [0, 2]),
    (None, "<im_end>", [3])])
def test_stop_ids_are_all_ids_of_generation_config_and_tokenizer(generation, tokenizer_eos, want,
                                                                 tmp_path):
    """An int, a list or None in generation_config.json: every id ends a response."""
    folder = make_folder(tmp_path, tokenizer=make_tokenizer(eos=tokenizer_eos), eos_token_id=None,
                         generation=GenerationConfig(eos_token_id=generation))
    assert load_lm(folder).stop_ids == want


def test_a_model_without_any_stop_token_is_refused(tmp_path):
    """Without a stop token every response would run to the limit."""
    folder = make_folder(tmp_path, tokenizer=make_tokenizer(eos=None), eos_token_id=None,
                         generation=GenerationConfig())
    with pytest.raises(UserError, match="stop token"):
        load_lm(folder)


# --- weights: masters, saved dtype, ties


def dtypes(lm):
    return {p.dtype for p in lm.model.parameters()}


def stored_tensors(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


OPTIMIZER = SimpleNamespace(lr=1e-6, adam_beta2=0.999, weight_decay=0.0, lr_schedule="constant",
                            warmup_steps=0)


def train_steps(lm, steps=3):
    """A few updates on the log-probability of a fixed text."""
    optimizer, scheduler = common.make_optimizer(lm, OPTIMIZER, steps)
    ids = torch.tensor([encode("<bos>1+1=2<im_end>")])
    for _ in range(steps):
        lm.model(ids, labels=ids).loss.backward()
        common.optimizer_step(lm, optimizer, scheduler, 1.0)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_fp32_masters_whatever_the_folder_holds(dtype, tmp_path):
    """At lr 1e-6 over 90 % of the weights move in three steps, bf16 folder or not."""
    lm = load_lm(make_folder(tmp_path, dtype=dtype), train=True)
    assert dtypes(lm) == {torch.float32}
    old = {n: p.detach().clone() for n, p in lm.model.named_parameters() if "embed" not in n}
    train_steps(lm)
    moved = sum((p != old[n]).sum().item() for n, p in lm.model.named_parameters() if n in old)
    assert moved > 0.9 * sum(p.numel() for p in old.values())


def test_frozen_models_are_kept_in_the_compute_dtype_and_take_no_gradient(tmp_path):
    """A teacher in bf16 needs no fp32 copy and is never trained."""
    folder = make_folder(tmp_path)
    assert dtypes(load_lm(folder, dtype="bf16")) == {torch.bfloat16}
    assert dtypes(load_lm(folder, dtype="fp32")) == {torch.float32}
    assert not any(p.requires_grad for p in load_lm(folder).model.parameters())
    assert all(p.requires_grad for p in load_lm(folder, train=True).model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_fp32_folder_loads_elsewhere_with_the_same_logits(family, tmp_path):
    """AutoModelForCausalLM and AutoTokenizer read the saved folder; logits, prompt, stops stay."""
    generation = GenerationConfig(eos_token_id=[3, 2])
    lm = load_lm(make_folder(tmp_path / "in", family, generation=generation), train=True)
    train_steps(lm)
    common.save_lm(lm, tmp_path / "out", {"finished": True, "note": "kept"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([encode("<bos>what?")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lm.model(ids).logits)
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == [3, 2]
    assert build_prompt(tokenizer, "1+1", False) == build_prompt(lm.tokenizer, "1+1", False)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["run"]
    assert record == {"finished": True, "note": "kept"}


def test_bf16_folder_is_saved_back_in_bf16_rounded_from_the_masters(tmp_path):
    """The folder keeps its dtype (half the disk): file, config.json and a later load agree."""
    lm = load_lm(make_folder(tmp_path / "in", dtype=torch.bfloat16), train=True)
    train_steps(lm)
    common.save_lm(lm, tmp_path / "out", {"finished": True})
    stored = stored_tensors(tmp_path / "out")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    masters = {n: p.detach() for n, p in lm.model.named_parameters()}
    assert all(torch.equal(stored[n], p.bfloat16()) for n, p in masters.items())
    assert load_lm(str(tmp_path / "out")).saved_dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert dtypes(lm) == {torch.float32}, "saving must not touch the masters"


def test_tied_weights_are_one_optimizer_parameter_and_one_tensor_on_disk(tmp_path):
    """Tied: one parameter, and still tied after a step, after saving and after loading."""
    lm = load_lm(make_folder(tmp_path / "in", dtype=torch.bfloat16), train=True)
    optimizer = train_steps(lm, 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len({p.data_ptr() for p in parameters})
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    assert embedding.weight is head.weight
    common.save_lm(lm, tmp_path / "out", {"finished": True})
    assert sum(t.shape == embedding.weight.shape
               for t in stored_tensors(tmp_path / "out").values()) == 1
    again = load_lm(str(tmp_path / "out"), train=True).model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_untied_head_is_trained_on_its_own(tmp_path):
    """A Llama without ties has two (V, D) parameters, and both reach the optimizer."""
    lm = load_lm(make_folder(tmp_path, "llama"), train=True)
    optimizer = train_steps(lm, 1)
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    assert shapes.count((len(TOKENS), 16)) == 2


# --- what is refused


def test_a_model_with_scaled_logits_is_refused(tmp_path):
    """Scaled logits would be another policy than the one the losses see."""
    with pytest.raises(UserError, match="support"):
        load_lm(make_folder(tmp_path, "granite", logits_scaling=4.0))


def test_a_model_with_capped_logits_is_refused(tmp_path):
    """Soft-capped logits as well (Gemma 2 has them, and a sliding window)."""
    folder = make_folder(tmp_path, "gemma2", final_logit_softcapping=2.0)
    lm = lm_of("capped")
    lm.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with pytest.raises(UserError, match="support"):
        common.check_head(lm)
    with pytest.raises(UserError, match="support"):
        load_lm(folder)


def test_granite_without_scaling_is_accepted(tmp_path):
    """The refusal is about the scaling, not about the name of the architecture."""
    load_lm(make_folder(tmp_path, "granite", logits_scaling=1.0))


def test_llama_states_and_log_probs_equal_its_own_logits(tmp_path):
    """An untied Llama gives the log-softmax of its logits, read at the right positions."""
    lm = load_lm(make_folder(tmp_path, "llama"))
    row = Rollout(encode("<bos>7*8"), encode("=56<im_end>"), [], True)
    with torch.no_grad():
        logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0]
        want = -F.cross_entropy(logits[3:-1], torch.tensor(row.tokens), reduction="none")
        hidden, tokens = lm.states([row])
        got = lm.log_probs(hidden, lm.head(), 1.0).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    """A tokenizer with ids beyond the embedding cannot belong to the model."""
    with pytest.raises(UserError, match="embeddings"):
        load_lm(make_folder(tmp_path, rows=len(TOKENS) - 1))


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    """Without a template there is no prompt format."""
    with pytest.raises(UserError, match="chat template"):
        load_lm(make_folder(tmp_path, tokenizer=make_tokenizer(template=None)))


@common.dataclass
class Settings:
    out: str = ""
    seed: int = 0
    save_every: int = 0


def begin(cfg, lm):
    """Open a run as a stage does, up to its first step."""
    run = common.Run(cfg, parents=[])
    assert run.resume(lm, *common.make_optimizer(lm, OPTIMIZER, 1)) == 0
    return run


def test_unfinished_run_folders_are_refused(tmp_path, trainable_lm):
    """The folder of a run that still goes on (or was killed) is not a model."""
    cfg = Settings(out=str(tmp_path / "run"))
    begin(cfg, trainable_lm)
    with pytest.raises(UserError, match="unfinished run"):
        load_lm(cfg.out)


def test_a_kill_while_the_weights_are_written_leaves_an_unfinished_run(tmp_path, monkeypatch,
                                                                       trainable_lm):
    """Until the weights are whole the folder is unfinished, and the same command can go on.

    (transformers writes config.json before the weights.)
    """
    cfg = Settings(out=str(tmp_path / "run"))
    run = begin(cfg, trainable_lm)
    (run.out / "metrics.jsonl").write_text('{"step": 0, "seconds": 1.0}\n')
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run.finish(trainable_lm)
    run.lock.close()  # as the kernel does
    assert common.is_unfinished(cfg.out)
    begin(cfg, trainable_lm).finish(trainable_lm)
    load_lm(cfg.out)


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["nobody-has/this", "./no/such/folder", "no such model!", ""])
def test_a_model_that_does_not_exist_is_one_readable_line(name):
    """A typing error in a model name is the user's mistake: one line that repeats the name."""
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        load_lm(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_readable_line(tmp_path):
    """An existing folder that is no model: the same one line."""
    with pytest.raises(UserError, match="cannot load model"):
        load_lm(str(tmp_path))


def test_a_damaged_weights_file_is_one_readable_line(tmp_path):
    """A download or copy that broke off is the user's to mend, not a stack trace."""
    weights = Path(make_folder(tmp_path)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load model"):
        load_lm(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_readable_line(tmp_path):
    """--device cuda without CUDA, or a device that does not exist, is a bad flag value."""
    folder = make_folder(tmp_path)
    for device in ("cuda", "gpu9"):
        with pytest.raises(UserError, match=device):
            load_lm(folder, device=device)


# --- fingerprint


def test_fingerprint_names_the_weights(tmp_path):
    """Equal for equal weights; another after one update at lr 1e-6, and for another model."""
    folder = make_folder(tmp_path / "a")
    lm = load_lm(folder, train=True)
    before = common.fingerprint(lm)
    assert before == common.fingerprint(load_lm(folder))
    assert before != common.fingerprint(load_lm(make_folder(tmp_path / "b", seed=1)))
    train_steps(lm, 1)
    assert common.fingerprint(lm) != before
