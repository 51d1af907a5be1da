"""The sampler is the policy that the losses differentiate: same log-probs, right frequencies.

Statistical tests have fixed seeds, so they pass or fail for good; their docstrings give the odds
that a right sampler would fail with a fresh seed.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import common
import grpo
from common import LM, StageConfig, inverse_cdf, sample

PROMPTS = [[3, 15, 11, 20, 4], [3, 7], [3, 25, 13, 16, 12, 17, 13, 18, 14, 19, 4], [3, 19, 14, 4]]

@pytest.fixture(scope="module")
def llama_lm(student_lm):
    """An untied Llama with grouped-query attention, three stop ids, and pad = eos."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.3,
        tie_word_embeddings=False, pad_token_id=1, eos_token_id=[1, 5, 9])).eval()
    model.set_attn_implementation("ours")
    return LM("llama", model, student_lm.tokenizer, 28, [1, 5, 9], "float32")

@pytest.fixture(params=["qwen3", "llama"])
def lm(request, student_lm, llama_lm):
    return {"qwen3": student_lm, "llama": llama_lm}[request.param]

def texts(rows):
    return [r.tokens for r in rows]

def gaps(lm, rows, temperature=1.0):
    """|log-prob of the sampler - log-prob of the training forward| of every token."""
    scored = grpo.score(grpo.Config(model="", temperature=temperature), lm, rows)
    assert [len(r.logp) for r in rows] == [len(r.tokens) for r in rows] == list(map(len, scored))
    return (torch.tensor(sum((r.logp for r in rows), [])) - torch.tensor(sum(scored, []))).abs()

def draw(lm, prompts=PROMPTS, k=6, n=40, temperature=1.0, seed=(0,), **kwargs):
    return sample(lm, prompts, k, max_new_tokens=n, temperature=temperature, seed=seed, **kwargs)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_log_probs_equal_a_teacher_forced_forward(lm, temperature):
    """First token and stop token included, ragged prompts, one of a single token, in fp32 to 1e-5;
    against the training forward, and against plain `model(ids).logits` one row at a time."""
    rows = draw(lm, [*PROMPTS, [3]], temperature=temperature)
    assert any(r.finished for r in rows) and len({len(r.tokens) for r in rows}) > 5
    assert gaps(lm, rows, temperature).max() < 1e-5
    for row in rows:
        with torch.no_grad():
            logits = lm.model(torch.tensor([row.prompt + row.tokens])).logits[0, :, : lm.vocab]
        plain = (logits / temperature).log_softmax(-1)[len(row.prompt) - 1 : -1]
        plain = plain.gather(-1, torch.tensor(row.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(row.logp), plain, atol=1e-5, rtol=0)
    assert draw(lm, []) == []

def test_bf16_sampling_and_scoring_agree(world):
    """Under bf16 compute sampler and trainer differ by rounding only: 0.03 nats on average."""
    lm = common.load_lm(str(world / "init-student"), StageConfig(dtype="bf16"), train=True)
    assert all(p.dtype == torch.float32 for p in lm.model.parameters())
    assert 0 < gaps(lm, draw(lm)).mean() < 0.03

class Casts(TorchDispatchMode):
    """Counts the copies of matrices from fp32 to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and torch.is_tensor(args[0]) and out.dim() == 2:
            is_cast = (args[0].dtype, out.dtype) == (torch.float32, torch.bfloat16)
            self.counts[tuple(out.shape)] += is_cast
        return out

def test_each_weight_is_cast_to_bf16_once_a_sampling_phase(world):
    """And not once a decoding step, which took twice the time: 40 tokens are 5 blocks."""
    lm = common.load_lm(str(world / "init-student"), StageConfig(dtype="bf16"), train=True)
    shapes = Counter(tuple(p.shape) for p in lm.model.parameters() if p.dim() == 2)
    with Casts() as casts:
        draw(lm, PROMPTS[:1], k=2, n=40)
    assert sum(shapes.values()) > 20
    assert all(casts.counts[shape] <= n for shape, n in shapes.items())

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
    """Chi-square of 5,000 first tokens against softmax(logits / T), cells of fewer than 5 expected
    draws merged, bound at five standard deviations: a right sampler fails about once in 10^5."""
    n, prompt = 5_000, PROMPTS[0]
    rows = draw(lm, [prompt], k=n, n=1, temperature=temperature, sample_rows=n)
    counts = np.bincount([r.tokens[0] for r in rows], minlength=lm.vocab)
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1, : lm.vocab].double()
    expected = n * (logits / temperature).softmax(-1).numpy()
    rare = expected < 5
    have = np.append(counts[~rare], counts[rare].sum())
    want = np.append(expected[~rare], expected[rare].sum())
    n = len(want) - (want[-1] == 0)  # cells
    chi2, df = ((have - want)[:n] ** 2 / want[:n]).sum(), n - 1
    assert len(counts) == lm.vocab and df >= 5 and chi2 < df + 5 * math.sqrt(2 * df)

def test_rollouts_do_not_depend_on_their_neighbours(lm, monkeypatch):
    """Alone, in any order, in any batch, looking for ended rows more or less often: the same
    tokens; other seeds and samples differ."""
    rows = texts(draw(lm))
    for sample_rows in (1, 12, 1000):
        assert texts(draw(lm, sample_rows=sample_rows)) == rows
    assert texts(draw(lm, PROMPTS[::-1]))[:6] == rows[-6:]
    assert texts(draw(lm, [PROMPTS[2]])) == rows[12:18]
    assert texts(draw(lm, k=2)) == [tokens for i, tokens in enumerate(rows) if i % 6 < 2]
    assert len(set(map(tuple, rows[:6]))) > 3
    assert texts(draw(lm, seed=(0, 1))) != rows
    first = [tokens[:2] for seed in ((0,), (1,)) for tokens in texts(draw(lm, seed=seed))]
    assert len(set(map(tuple, first))) > 20  # seed, prompt and index count
    for block in (1, 3, 64):
        monkeypatch.setattr(common, "BLOCK", block)
        assert texts(draw(lm)) == rows

def test_every_stop_id_ends_a_rollout_and_is_kept(llama_lm):
    """Also where pad is eos, and where it is the only token: the length is the index of the first
    stop token plus one. Tokens of the padded vocabulary are never drawn."""
    assert llama_lm.model.config.vocab_size > llama_lm.vocab
    rows = draw(llama_lm, k=100, n=25)
    assert {r.tokens[-1] for r in rows if r.finished} == {1, 5, 9}
    for r in rows:
        stops = [i for i, token in enumerate(r.tokens) if token in (1, 5, 9)]
        assert stops == ([len(r.tokens) - 1] if r.finished else [])
        assert r.finished or len(r.tokens) == 25
        assert max(r.tokens) < llama_lm.vocab
    assert not all(r.finished for r in rows)
    short = [r for r in rows if len(r.tokens) == 1]
    assert short and llama_lm.states(short)[1].tolist() == [r.tokens[0] for r in short]

def test_neither_generation_config_nor_train_mode_reach_the_sampler(world, student_lm):
    """Qwen3's generation_config asks for temperature 0.6, top-k 20, top-p 0.95: ignored. A model
    trained with gradient checkpointing has the same rollouts."""
    lm = common.load_lm(str(world / "init-student"), StageConfig(gradient_checkpointing=True),
                        train=True)
    lm.model.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, do_sample=True)
    lm.model.train()
    assert texts(draw(lm)) == texts(draw(student_lm))

@pytest.mark.parametrize("V", [1, 3, 63, 64, 65, 1000])
def test_inverse_cdf_is_the_first_id_whose_float64_cdf_exceeds_the_uniform(V):
    rng = np.random.default_rng(V)
    weights = rng.random((400, V)).astype(np.float32) ** 8 * (rng.random((400, V)) < 0.9)
    weights[0, : V // 2] = 0  # u = 0 draws no token of weight 0
    weights[:, V // 2] += 1e-3  # no row of zeros
    uniform = rng.random((400, 1))
    uniform[0], uniform[200:] = 0, np.nextafter(1, 0)  # the end, where rounding could lead outside
    cdf = weights.astype(np.float64).cumsum(-1)
    want = (cdf > uniform * cdf[:, -1:]).argmax(-1)
    drawn = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniform)).squeeze(1).numpy()
    assert (drawn == want)[:200].all() and (weights[np.arange(400), drawn] > 0).all()

def test_inverse_cdf_keeps_rare_tokens_of_a_large_vocabulary():
    """100,000 tokens of 1e-9 each behind one that has the rest: they get their 1e-4 of the draws. A
    sum in fp32 would have lost them all."""
    weights = torch.full((10, 100_001), 1e-9)
    weights[:, 0] = 1 - 1e-4
    left = torch.linspace(0.5e-5, 0.95e-4, 10, dtype=torch.float64)
    drawn = inverse_cdf(weights, 1 - left[:, None]).squeeze(1)
    assert (drawn - (100_000 - left * 1e9)).abs().max() <= 2

# --- rows that come and go ------------------------------------------------------------------------

def same(rows, others):
    """The same tokens, log-probs to 1e-5 (another batch sums in another order)."""
    assert texts(rows) == texts(others)
    assert [r.finished for r in rows] == [r.finished for r in others]
    for row, other in zip(rows, others):
        np.testing.assert_allclose(row.logp, other.logp, atol=1e-5)

@pytest.fixture
def blocks(monkeypatch):
    """How many rows each block of BLOCK tokens had, and how many pages of the cache they used.

    Pages of live rows are distinct and without gaps.
    """
    seen, run_block = [], common.Step.run_block

    def watched(step, live):
        used = step.cache.used
        assert used <= step.cache.capacity
        assert sorted(page for row in live for page in row.pages) == list(range(1, used + 1))
        seen.append((len(live), used))
        return run_block(step, live)

    monkeypatch.setattr(common.Step, "run_block", watched)
    return seen

def with_pages(lm, n, monkeypatch, page=4):
    """kv_gib of a cache of n pages of so many tokens."""
    monkeypatch.setitem(common.PAGE, "cpu", page)
    c = lm.model.config
    size = 2 * c.num_hidden_layers * page * c.num_key_value_heads * c.head_dim * 4
    return (n + 0.5) * size / 2**30

def test_ended_rows_are_replaced_at_once(lm, blocks):
    """With 8 places for 48 rows, 2 of a prompt: all but one place are taken while rows wait, and
    the whole takes about as many blocks as the tokens need."""
    prompts = [[3, 15 + i % 10, 11 + i // 10, 20, 4] for i in range(24)]
    rows = draw(lm, prompts, k=2, sample_rows=8)
    live = [n for n, _ in blocks]
    last_full = max(i for i, n in enumerate(live) if n >= 7)
    assert all(7 <= n <= 8 for n in live[:last_full]) and last_full > 4
    needed = sum(-(-len(r.tokens) // common.BLOCK) for r in rows)
    assert sum(live) == needed  # no row stays a block longer than it lives
    same(rows, draw(lm, prompts, k=2, sample_rows=1000))

@pytest.mark.parametrize("pages", [15, 18, 500])
def test_rows_wait_where_the_cache_is_small_and_nothing_changes(lm, blocks, monkeypatch, pages):
    """A row of 11 + 40 tokens takes up to 15 pages of 4 tokens; 14 are refused."""
    rows = draw(lm)
    continued, reserve = [], common.PagedCache.reserve

    def watched(*args):
        rows, started = reserve(*args)
        continued.append(any(row.rollout.tokens for row in started))
        return rows, started

    monkeypatch.setattr(common.PagedCache, "reserve", watched)
    blocks.clear()
    same(draw(lm, sample_rows=9, kv_gib=with_pages(lm, pages, monkeypatch)), rows)
    # where there is little room, rows lost their places, and were continued later
    assert any(continued) == (pages < 500)
    with pytest.raises(common.UserError, match="cache holds 56 tokens"):
        draw(lm, kv_gib=with_pages(lm, 14, monkeypatch))

def test_each_prompt_passes_the_model_once_for_its_rollouts(lm, monkeypatch):
    fed, forward = [], lm.model.base_model.forward

    def watched(input_ids=None, **kwargs):
        fed.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(lm.model.base_model, "forward", watched)
    draw(lm, k=50, n=3)
    assert [shape for shape in fed if shape[1] > 1] == [(4, max(map(len, PROMPTS)) - 1)]
    assert all(shape[0] <= 200 for shape in fed)

def test_a_limit_cuts_a_rollout_and_changes_nothing_before_it(lm):
    """Limits around the block size; a rollout that ends by itself earlier keeps its stop token."""
    whole = draw(lm, k=6, n=40)
    for limit in (1, 2, 7, 8, 9):
        for row, other in zip(draw(lm, k=6, n=limit), whole):
            assert row.tokens == other.tokens[:limit] and len(row.logp) == len(row.tokens)
            assert row.finished == (other.finished and len(other.tokens) <= limit)

def test_recorded_steps_with_rows_and_pages_to_spare(lm, monkeypatch):
    """What CUDA does, with the graph played by a function: shapes are powers of two, state is
    copied into the tensors of the first recording, spare rows and pages do nothing."""
    rows, recorded = draw(lm, sample_rows=7), []

    def record(step, state):
        recorded.append(tuple(state["table"].shape))
        own = dict(state)  # a graph keeps the tensors that it has seen
        return (lambda: step(own)), state

    always = property(lambda step: True, lambda step, value: None)
    monkeypatch.setattr(common.Step, "records", always, raising=False)
    monkeypatch.setattr(common.Step, "record", record)
    same(draw(lm, sample_rows=7), rows)
    assert (8, 1) in recorded and all(n & (n - 1) == 0 for shape in recorded for n in shape)

@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention_inside_pages_equals_float64(heads, kv_heads):
    """Each page's result and its log-sum-exp against a plain softmax over the keys in use."""
    torch.manual_seed(0)
    page, dim, used = 8, 16, torch.tensor([1, 8, 3, 5, 0])
    q = torch.randn(5, heads, dim)
    keys, values = torch.randn(2, 5, page, kv_heads, dim)
    out, lse = common.attend_pages(q, keys, values, used, 0.3)
    assert (lse[4] == -1e30).all() and out[4].isfinite().all()
    k, v = (x[:4].repeat_interleave(heads // kv_heads, 2).double() for x in (keys, values))
    scores = 0.3 * torch.einsum("mhd,mphd->mhp", q[:4].double(), k)
    scores[(torch.arange(page) >= used[:4, None])[:, None].expand_as(scores)] = -math.inf
    torch.testing.assert_close(lse[:4].double(), scores.logsumexp(-1), atol=1e-5, rtol=0)
    want = torch.einsum("mhp,mphd->mhd", scores.softmax(-1), v)
    torch.testing.assert_close(out[:4].double(), want, atol=1e-5, rtol=0)

@pytest.mark.parametrize("dim, fits", [(64, True), (12, False), (264, False)])
def test_what_the_kernel_refuses_takes_the_plain_path(dim, fits, monkeypatch):
    """As if this CPU were a GPU that has bf16: the kernel, which is not there, raises."""
    monkeypatch.setattr(common, "has_bf16", lambda device: True)
    q, keys = torch.randn(5, 2, dim).bfloat16(), torch.randn(5, 1, 2, dim).bfloat16()
    args = q, keys, keys, torch.ones(5, dtype=torch.long), 1.0
    if fits:
        with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
            common.attend_pages(*args)
    else:
        torch.testing.assert_close(common.attend_pages(*args)[0], keys[:, 0].float())

@pytest.mark.parametrize("capability, bf16", [((7, 0), False), ((7, 5), False), ((8, 0), True),
                                              ((8, 9), True), ((12, 0), True)])
def test_which_gpus_have_bf16(capability, bf16, monkeypatch):
    """V100 and T4 do not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.has_bf16(torch.device("cuda", 0)) == bf16
    assert not common.has_bf16(torch.device("cpu"))

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@cuda
def test_flash_attention_inside_pages_equals_the_plain_one():
    torch.manual_seed(0)
    q = torch.randn(40, 16, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, 40, 256, 8, 128, device="cuda", dtype=torch.bfloat16)
    used = torch.randint(0, 257, (40,), device="cuda")
    used[0] = 0
    out, lse = common.attend_pages(q, keys, values, used, 0.1)
    assert out.isfinite().all()
    want, want_lse = common.attend_pages(*(x.float() for x in (q, keys, values)), used, 0.1)
    some = used > 0
    torch.testing.assert_close(out.float()[some], want[some], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=0)

@cuda
def test_on_cuda_recorded_steps_give_what_steps_give(world):
    """Log-probs of the same tokens, bf16 and fp32, against the training forward."""
    for dtype, tolerance in (("fp32", 1e-3), ("bf16", 0.3)):
        cfg = StageConfig(device="cuda", dtype=dtype)
        lm = common.load_lm(str(world / "init-student"), cfg)
        gap = gaps(lm, draw(lm, PROMPTS * 10, k=8, n=60, sample_rows=64))
        assert gap.max() < tolerance and gap.mean() < tolerance / 10
