"""The sampler is the policy that the losses differentiate: same log-probs, right frequencies.

Statistical tests have fixed seeds, so they pass or fail for good; their docstrings give the odds
that a right sampler would fail with a fresh seed.
"""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
import grpo
from common import LM, inverse_cdf, sample

PROMPTS = [[3, 15, 11, 20, 4], [3, 7], [3, 25, 13, 16, 12, 17, 13, 18, 14, 19, 4], [3, 19, 14, 4]]


@pytest.fixture(scope="module")
def llama_lm(student_lm):
    """An untied Llama with grouped-query attention, three stop ids, and pad = eos."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.3,
        tie_word_embeddings=False, pad_token_id=1, eos_token_id=[1, 5, 9])).eval()
    return LM("llama", model, student_lm.tokenizer, 28, [1, 5, 9], False, "float32")


@pytest.fixture(params=["qwen3", "llama"])
def lm(request, student_lm, llama_lm):
    return {"qwen3": student_lm, "llama": llama_lm}[request.param]


def draw(lm, prompts=PROMPTS, k=6, n=40, temperature=1.0, seed=(0,), **kwargs):
    return sample(lm, prompts, k, max_new_tokens=n, temperature=temperature, seed=seed, **kwargs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_log_probs_equal_a_teacher_forced_forward(lm, temperature):
    """First token and stop token included, ragged prompts, in fp32 to 1e-5; against the training
    forward, and against plain `model(ids).logits` one row at a time."""
    rows = draw(lm, temperature=temperature)
    assert any(r.finished for r in rows) and len({len(r.tokens) for r in rows}) > 5
    cfg = grpo.Config(model="", temperature=temperature)
    for row, scored in zip(rows, grpo.score(cfg, lm, rows)):
        with torch.no_grad():
            logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0, :, : lm.vocab]
        plain = (logits / temperature).log_softmax(-1)[len(row.prompt) - 1 : -1]
        plain = plain.gather(-1, torch.tensor(row.tokens)[:, None]).squeeze(-1)
        assert len(row.logp) == len(row.tokens) == len(scored)
        torch.testing.assert_close(torch.tensor(row.logp), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(scored, plain, atol=1e-5, rtol=0)


def test_greedy_equals_generate_for_ragged_prompts(lm):
    rows = draw(lm, k=1, n=30, temperature=0.0)
    for row in rows:
        # the real vocabulary only: generate would also choose among the padded embeddings
        padding = list(range(lm.vocab, lm.model.config.vocab_size))
        ids = lm.model.generate(
            torch.tensor([row.prompt]), attention_mask=torch.ones(1, len(row.prompt)),
            do_sample=False, max_new_tokens=30, eos_token_id=lm.stop_ids, pad_token_id=0,
            suppress_tokens=padding or None)[0, len(row.prompt):].tolist()
        assert row.tokens == ids
        assert row.finished == (ids[-1] in lm.stop_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_the_softmax(lm, temperature):
    """Chi-square of 20,000 first tokens against softmax(logits / T), cells of fewer than 5 expected
    draws merged, bound at five standard deviations: a right sampler fails about once in 10^5."""
    n, prompt = 20_000, PROMPTS[0]
    rows = draw(lm, [prompt], k=n, n=1, temperature=temperature, sample_rows=n)
    counts = np.bincount([r.tokens[0] for r in rows], minlength=lm.vocab)
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1, : lm.vocab].double()
    expected = n * (logits / temperature).softmax(-1).numpy()
    rare = expected < 5
    have = np.append(counts[~rare], counts[rare].sum())
    want = np.append(expected[~rare], expected[rare].sum())
    have, want = (have, want) if want[-1] > 0 else (have[:-1], want[:-1])
    chi2, df = ((have - want) ** 2 / want).sum(), len(want) - 1
    assert df >= 5 and counts.shape == (lm.vocab,)
    assert chi2 < df + 5 * math.sqrt(2 * df)


def test_rollouts_do_not_depend_on_their_neighbours(lm):
    """Alone, in any order, in any batch: the same tokens; other seeds and samples differ."""
    rows = draw(lm)
    for sample_rows in (1, 12, 1000):
        assert [r.tokens for r in draw(lm, sample_rows=sample_rows)] == [r.tokens for r in rows]
    back = draw(lm, PROMPTS[::-1])
    assert [r.tokens for r in back[:6]] == [r.tokens for r in rows[-6:]]
    alone = draw(lm, [PROMPTS[2]])
    assert [r.tokens for r in alone] == [r.tokens for r in rows[12:18]]
    assert [r.tokens for r in draw(lm, k=2)] == [r.tokens for i, r in enumerate(rows) if i % 6 < 2]
    assert len({tuple(r.tokens) for r in rows[:6]}) > 3
    assert [r.tokens for r in draw(lm, seed=(0, 1))] != [r.tokens for r in rows]


def test_looking_for_ended_rows_more_or_less_often_changes_nothing(lm, monkeypatch):
    rows = draw(lm)
    for block in (1, 3, 64):
        monkeypatch.setattr(common, "BLOCK", block)
        assert [r.tokens for r in draw(lm)] == [r.tokens for r in rows]


def test_every_stop_id_ends_a_rollout_and_is_kept(llama_lm):
    """Also where pad is eos: the length is the index of the first stop token plus one."""
    rows = draw(llama_lm, k=60, n=25)
    assert {r.tokens[-1] for r in rows if r.finished} == {1, 5, 9}
    for r in rows:
        stops = [i for i, token in enumerate(r.tokens) if token in (1, 5, 9)]
        assert stops == ([len(r.tokens) - 1] if r.finished else [])
        assert r.finished or len(r.tokens) == 25
    assert not all(r.finished for r in rows)


def test_a_response_may_be_one_stop_token_and_still_counts(llama_lm):
    rows = [r for r in draw(llama_lm, k=200, n=3) if r.tokens[0] in (1, 5, 9)]
    assert rows and all(len(r.tokens) == 1 and r.finished for r in rows)
    assert llama_lm.states(rows)[1].tolist() == [r.tokens[0] for r in rows]


def test_the_padded_vocabulary_is_never_drawn(llama_lm):
    assert llama_lm.model.config.vocab_size > llama_lm.vocab
    assert max(t for r in draw(llama_lm, k=100) for t in r.tokens) < llama_lm.vocab


def test_nothing_is_taken_from_generation_config(student_lm, monkeypatch):
    """Qwen3's generation_config asks for temperature 0.6, top-k 20, top-p 0.95: ignored."""
    rows = draw(student_lm)
    for name, value in (("temperature", 0.1), ("top_k", 1), ("top_p", 0.1), ("do_sample", True)):
        monkeypatch.setattr(student_lm.model.generation_config, name, value, raising=False)
    assert [r.tokens for r in draw(student_lm)] == [r.tokens for r in rows]


def test_inverse_cdf_of_a_known_table():
    """p = (0, 1/2, 0, 1/4, 1/4, 0): each uniform has one right answer; p = 0 is never drawn."""
    logp = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).double().log().repeat(7, 1)
    uniform = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(logp, uniform).tolist() == [1, 1, 1, 3, 3, 4, 4]


def test_inverse_cdf_keeps_rare_tokens_of_a_large_vocabulary():
    """100,000 tokens of 1e-9 each behind one that has the rest: they get their 1e-4 of the draws. A
    sum in fp32 would have lost them all."""
    logp = torch.full((1, 100_001), 1e-9, dtype=torch.float64)
    logp[0, 0] = 1 - 1e-4
    uniform = 1 - torch.linspace(0.5e-5, 0.95e-4, 10, dtype=torch.float64)
    drawn = inverse_cdf(logp.log().float().repeat(10, 1), uniform)
    want = 100_000 - torch.linspace(0.5e-5, 0.95e-4, 10, dtype=torch.float64) * 1e9
    assert (drawn - want).abs().max() <= 2


def test_gradient_checkpointing_does_not_reach_the_sampler(world, student_lm):
    """In train mode transformers would silently decode without its cache, each token blindly."""
    lm = common.load_lm(str(world / "init-student"), train=True, gradient_checkpointing=True)
    assert [r.tokens for r in draw(lm)] == [r.tokens for r in draw(student_lm)]
    assert lm.model.training


def test_fewer_rows_are_decoded_where_memory_is_short(student_lm, monkeypatch):
    """A device without room for more than one prompt's rows: the same rollouts, in more batches."""
    rows, decode, sizes = draw(student_lm), common.decode_batch, []

    def with_little_memory(lm, prompts, *args):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(prompts))
        return decode(lm, prompts, *args)

    monkeypatch.setattr(common, "decode_batch", with_little_memory)
    assert [r.tokens for r in draw(student_lm)] == [r.tokens for r in rows]
    assert sizes == [1] * len(PROMPTS)


def test_bf16_sampling_and_scoring_agree(world):
    """Under bf16 compute sampler and trainer differ by rounding only: 0.03 nats on average."""
    lm = common.load_lm(str(world / "init-student"), dtype="bf16", train=True)
    rows = draw(lm)
    assert all(p.dtype == torch.float32 for p in lm.model.parameters())
    gaps = [(torch.tensor(r.logp) - scored).abs()
            for r, scored in zip(rows, grpo.score(grpo.Config(model=""), lm, rows))]
    assert 0 < torch.cat(gaps).mean() < 0.03
