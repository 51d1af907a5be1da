"""What must not matter does not: micro-batches, chunks, padding, recomputation.

Every gradient is compared over a whole model, in fp32, for knobs of the group "memory, speed and
display only", with rows of very different lengths.
"""

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import fkl_warmup
import grpo
import opd
from common import LM, Rollout, load_lm, micro_batches, over_chunks, sample

@pytest.fixture(scope="module")
def rows():
    """Seven rows with prompts of 3-9 tokens and responses of 1-20 tokens, one of them truncated."""
    rng = random.Random(0)
    rows = []
    for i, n in enumerate((1, 20, 3, 7, 7, 12, 2)):
        prompt = [rng.randrange(3, 28) for _ in range(3 + i)]
        tokens = [rng.randrange(3, 28) for _ in range(n - 1)] + [1]
        rows.append(Rollout(prompt, tokens, [-1.5] * n, i != 1))
    return rows

def gradients(lm):
    return torch.cat([p.grad.flatten() for p in lm.model.parameters()])

def gradient_of(stage, world, rows, teacher_lm, adv, **flags):
    """The gradient of one update over these rows, in micro-batches as `main` makes them.

    adv: an advantage of each row. GRPO's old and reference log-probs depend on the row alone.
    """
    name, _, option = stage.partition("-")
    module = {"grpo": grpo, "fkl": fkl_warmup, "opd": opd}[name]
    cfg = (grpo.Config(model="", kl_coef=0.1, **flags) if name == "grpo" else
           fkl_warmup.Config(student="", targets=option, **flags) if name == "fkl" else
           opd.Config(student="", teacher="", estimator=option, **flags))
    lm = load_lm(str(world / "init-student"), cfg, train=True)
    n_tokens = sum(len(r.tokens) for r in rows)
    for group in micro_batches(rows, cfg.micro_tokens, lm.device):
        some = [rows[i] for i in group]
        if name == "grpo":
            old, ref = ([torch.linspace(a, b, len(r.tokens)).tolist() for r in some]
                        for a, b in ((-3, -1), (-1, -4)))
            weights = torch.full((len(some),), 1 / n_tokens)
            grpo.accumulate(cfg, lm, some, adv[group], weights, old, ref)
        else:
            sparse = [adv[group]] if name == "opd" else []
            module.accumulate(cfg, lm, teacher_lm, some, n_tokens, *sparse)
    return gradients(lm)

STAGES = ["grpo", "fkl-soft", "fkl-hard", "opd-full", "opd-token", "opd-return"]

def close(a, b):
    return (a - b).norm() <= 2e-6 * b.norm()

@pytest.mark.parametrize("stage", STAGES)
def test_memory_knobs_padding_and_row_order_never_move_a_gradient(stage, world, rows, teacher_lm):
    """Reversed rows have other neighbours, and with micro_tokens=1 there is no padding at all."""
    args = world, rows, teacher_lm, torch.linspace(-2, 1.5, len(rows))
    whole = gradient_of(stage, *args)
    assert whole.norm() > 1e-3
    for knobs in (dict(micro_tokens=1), dict(micro_tokens=60), dict(vocab_chunk=1),
                  dict(vocab_chunk=7), dict(micro_tokens=45, vocab_chunk=3),
                  dict(gradient_checkpointing=True)):
        assert close(gradient_of(stage, *args, **knobs), whole), knobs
    assert close(gradient_of(stage, world, rows[::-1], teacher_lm, args[-1].flip(0)), whole)
    assert all(p.grad is None for p in teacher_lm.model.parameters())

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_losses_equal_the_plain_version_with_all_logits(temperature, trainable_lm, rows,
                                                        teacher_lm):
    """Row by row, `model(ids).logits`, torch.distributions and autograd: no head, no chunks, no
    padding. What is logged, and the whole gradient."""
    lm, lengths = trainable_lm, [len(r.tokens) for r in rows]
    pi, teacher = [], []
    for row in rows:
        ids, n = torch.tensor([row.prompt + row.tokens]), len(row.prompt)
        for model, found in ((lm, pi), (teacher_lm, teacher)):
            found.append(model.model(ids).logits[0, n - 1 : -1, : model.vocab] / temperature)
    tokens = torch.tensor([token for row in rows for token in row.tokens])
    pi, teacher = Categorical(logits=torch.cat(pi)), Categorical(logits=torch.cat(teacher).detach())
    kl, nll = kl_divergence(pi, teacher), -pi.log_prob(tokens)
    log_ratio = (teacher.log_prob(tokens) + nll).detach()
    to_go = torch.cat([x.flip(0).cumsum(0).flip(0) for x in log_ratio.split(lengths)])
    sparse = torch.linspace(-2, 1.5, len(rows))  # an advantage of each row
    A = sparse.repeat_interleave(torch.tensor(lengths))
    for stage, option, loss in (
            (opd, dict(estimator="full"), kl),
            (opd, dict(estimator="token"), log_ratio * nll),
            (opd, dict(estimator="return"), to_go * nll),
            (opd, dict(estimator="full", sparse_weight=0.5), (kl + A * nll) / 2),
            (opd, dict(estimator="token", sparse_weight=0.5), (log_ratio + A) * nll / 2),
            (fkl_warmup, dict(targets="soft"), kl_divergence(teacher, pi)),
            (fkl_warmup, dict(targets="hard"), nll)):
        cfg = stage.Config(teacher="", student="", temperature=temperature, vocab_chunk=7, **option)
        lm.model.zero_grad()
        (loss.sum() / len(tokens)).backward(retain_graph=True)
        want = gradients(lm)
        lm.model.zero_grad()
        advantages = [sparse] if stage is opd else []
        sums = stage.accumulate(cfg, lm, teacher_lm, rows, len(tokens), *advantages)
        assert (gradients(lm) - want).norm() <= 1e-5 * want.norm(), option
        gap = (-nll - torch.tensor([x for row in rows for x in row.logp])).abs()
        logged = (kl, kl**2, pi.entropy(), gap) if stage is opd else (loss, pi.entropy())
        want = torch.stack([x.sum() for x in logged])
        torch.testing.assert_close(sums.float(), want, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kl_loss", ["k2", "k3"])
def test_grpo_loss_equals_the_plain_version(first, kl_loss, trainable_lm):
    """Rows as a run samples them, at temperature 0.7: the clipped ratio to pi_old and the KL to
    pi_ref, each with its own log-probs, row by row with `model(ids).logits`. `first` is the first
    update after sampling, where pi_old is the policy itself and its log-probs are not given."""
    lm = trainable_lm
    rows = sample(lm, [[3, 15, 11], [3, 7, 20, 4]], 4, max_new_tokens=20, temperature=0.7, seed=())
    old = [torch.tensor(r.logp) for r in rows]
    if not first:  # a policy that has moved, on some tokens beyond the clip
        old = [x + torch.linspace(-0.5, 0.5, len(x)) for x in old]
    ref = [torch.linspace(-1, -4, len(r.tokens)) for r in rows]
    adv = torch.linspace(-2, 1.5, len(rows))
    weights = torch.linspace(0, 0.02, len(rows))
    loss, clipped = 0.0, 0
    for row, A, weight, logp_old, logp_ref in zip(rows, adv, weights, old, ref):
        ids, n = torch.tensor([row.prompt + row.tokens]), len(row.prompt)
        logits = lm.model(ids).logits[0, n - 1 : -1, : lm.vocab] / 0.7
        logp = Categorical(logits=logits).log_prob(torch.tensor(row.tokens))
        ratio, bound = (logp - logp_old).exp(), 1.2 if A > 0 else 0.8
        beyond = (ratio - bound) * A > 0  # constant there
        clipped += beyond.sum().item()
        x = logp_ref - logp
        kl = ratio.detach() * x**2 / 2 if kl_loss == "k2" else x.exp() - x - 1
        loss = loss + weight * (0.1 * kl - torch.where(beyond, bound, ratio) * A).sum()
    loss.backward()
    want = gradients(lm)
    lm.model.zero_grad()
    cfg = grpo.Config(model="", temperature=0.7, kl_coef=0.1, kl_loss=kl_loss, vocab_chunk=7)
    old_lists, ref_lists = ([x.tolist() for x in logps] for logps in (old, ref))
    sums = grpo.accumulate(cfg, lm, rows, adv, weights, None if first else old_lists, ref_lists)
    assert (gradients(lm) - want).norm() <= 1e-5 * want.norm() and want.norm() > 1e-3
    assert sums[:2].tolist() == [sum(len(r.tokens) for r in rows), clipped]
    assert (clipped == 0) == first
    gap = sum((x - torch.tensor(r.logp)).abs().sum().item() for x, r in zip(old, rows))
    assert sums[4].item() == pytest.approx(gap, abs=1e-4)

def test_micro_batches_keep_every_row_once_within_the_budget(rows):
    for budget in (1, 30, 60, 200, 10_000):
        groups = micro_batches(rows, budget, torch.device("cpu"))
        assert sorted(i for g in groups for i in g) == list(range(len(rows)))
        for g in groups:
            longest = max(len(rows[i].prompt) + len(rows[i].tokens) for i in g)
            assert len(g) == 1 or longest * len(g) <= budget
    assert len(micro_batches(rows, 10_000, torch.device("cpu"))) == 1

def test_a_frozen_head_gets_no_gradient_and_changes_no_other(trainable_lm, rows, teacher_lm):
    """A fork with adapters trains other weights only (the world's head is its embedding, too)."""
    lm, head = trainable_lm, trainable_lm.model.get_output_embeddings().weight
    cfg, found = opd.Config(teacher="", student=""), []
    for learns in (True, False):
        lm.model.zero_grad()
        head.requires_grad_(learns)
        opd.accumulate(cfg, lm, teacher_lm, rows, 50, torch.zeros(len(rows)))
        assert (head.grad is not None) == learns
        found.append(torch.cat([p.grad.flatten() for p in lm.model.parameters() if p is not head]))
    head.requires_grad_()
    assert found[0].norm() > 0 and torch.equal(*found)

class WideTensors(TorchDispatchMode):
    """The most bytes that tensors with a dimension of size V had at one time."""

    def __init__(self, V):
        super().__init__()
        self.V, self.live, self.peak = V, weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] >= self.V:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live.values()))
        return out

@pytest.mark.parametrize("chunk, bounded", [(8, True), (512, False)])
def test_log_probs_of_all_tokens_never_exist_at_once(chunk, bounded):
    """Forward and backward of the reverse KL at N = 512 tokens, V = 4,096: with chunks of 8 the
    live (n, V) tensors stay under ten blocks of 8 rows; in one chunk they are over 512 rows."""
    N, D, V = 512, 16, 4096
    torch.manual_seed(0)
    h, h_teacher = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    embedding = torch.nn.Linear(D, V, bias=False)
    model = SimpleNamespace(get_output_embeddings=lambda: embedding, device=h.device)
    lm = LM("head", model, None, V, [], "")

    def block(logp, b):
        kl = opd.reverse_kl(logp, lm.logits(b, lm.head(), 1.0).log_softmax(-1))
        return kl.sum(), (kl,)

    with WideTensors(V) as wide:
        over_chunks(block, lm, h, 1.0, chunk, b=h_teacher)
    row = 4 * V
    assert (wide.peak <= 10 * 8 * row) == bounded and (wide.peak >= N * row) != bounded
