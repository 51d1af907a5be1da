"""The equations of the method, against torch.distributions and against exact enumeration.

The enumerated world has V = 3 tokens and responses of T = 2 tokens: 4 states, 9 responses. A policy
is a table of logits, so every expectation is a finite sum, and autograd in float64 gives the exact
gradient of every objective to compare an estimator's with.
"""

import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from common import Rollout
from fkl_warmup import forward_kl
from grpo import Config, advantages, kl_penalty, policy_loss, row_weights
from opd import dense_advantages, mixed_loss, reverse_kl, sparse_advantages

V, T = 3, 2
RESPONSES = list(itertools.product(range(V), repeat=T))

def random_logp(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)

# --- the two KLs ----------------------------------------------------------------------------------

def test_kls_equal_torch_distributions_in_their_direction():
    logp, logq = random_logp(50, 11, seed=1), random_logp(50, 11, seed=2)
    pi, teacher = Categorical(logits=logp), Categorical(logits=logq)
    torch.testing.assert_close(reverse_kl(logp, logq), kl_divergence(pi, teacher))
    torch.testing.assert_close(forward_kl(logp, logq), kl_divergence(teacher, pi))

def test_kl_gradients_are_the_known_ones_on_every_token_and_the_teacher_gets_none():
    """By the student's logit v: p_v (log p_v - log q_v - KL) for the reverse KL and p_v - q_v for
    the forward KL, also for tokens that were never sampled. Both are 0 where p = q."""
    logits, logq = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), random_logp(4, 9)
    logq[0] = logits[0].detach().log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl, p = reverse_kl(logp, logq), logp.exp()
    for value, want in ((kl, p * (logp - logq - kl[:, None])),
                        (forward_kl(logp, logq), p - logq.exp())):
        got = torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(got, want.detach())
        assert got[0].abs().max() < 1e-15 and (got[1:] != 0).all()

def test_kls_of_bf16_logits_are_within_a_percent_of_float64_at_full_vocabulary():
    """V = 151,936, KL about 0.01, both directions; the same sums in bf16 are off by over 20 %."""
    torch.manual_seed(0)
    base = torch.randn(4, 151_936) * 2
    a, b = base.bfloat16(), (base + 0.15 * torch.randn_like(base)).bfloat16()
    for kl in (reverse_kl, forward_kl):
        ours = kl(a.float().log_softmax(-1), b.float().log_softmax(-1)).double()
        exact = kl(a.double().log_softmax(-1), b.double().log_softmax(-1))
        naive = kl(a.log_softmax(-1), b.log_softmax(-1)).double()
        assert 0.003 < exact.mean() < 0.03
        assert ((ours - exact) / exact).abs().max() < 0.01
        assert ((naive - exact) / exact).abs().max() > 0.2

# --- Eqs. 1, 2 and 4 by enumeration ---------------------------------------------------------------

class Tabular:
    """Policies on the enumerated world: row 0 is the first state, row 1 + y_1 the second."""

    def __init__(self):
        torch.manual_seed(3)
        self.theta = torch.randn(1 + V, V, dtype=torch.float64, requires_grad=True)
        self.logq = random_logp(1 + V, V, seed=4)

    def rows(self, y):
        """log-probs (T,) of student and teacher along the response y."""
        logp = self.theta.log_softmax(-1)
        states, tokens = [0, 1 + y[0]], list(y)
        return logp[states, tokens], self.logq[states, tokens]

    def expectation(self, value):
        """sum_y pi(y) value(y), pi(y) a constant: what the mean over many samples converges to."""
        return sum(self.rows(y)[0].detach().sum().exp() * value(y) for y in RESPONSES)

    def gradient(self, value):
        return torch.autograd.grad(value, self.theta)[0]

def sequence_kl(world):
    """KL(pi_theta || pi_T) over whole responses, differentiable everywhere."""
    total = 0.0
    for y in RESPONSES:
        logp, logq = world.rows(y)
        total = total + logp.sum().exp() * (logp.sum() - logq.sum())
    return total

def state_kl(world):
    """Eq. 4: the KL in each state, weighted by how often the student visits it, as a constant."""
    kl = reverse_kl(world.theta.log_softmax(-1), world.logq)  # (states,)
    visits = torch.cat([torch.ones(1), world.theta.log_softmax(-1)[0].exp()]).detach()
    return (visits * kl).sum()

def test_eq_2_and_eq_4_have_the_same_value_and_different_gradients():
    """Dense reward plus entropy is minus the KL of whole responses, which is that of the states."""
    world, beta = Tabular(), 0.7
    reward = world.expectation(lambda y: beta * world.rows(y)[1].sum())  # Eq. 1, summed over t
    entropy = -world.expectation(lambda y: world.rows(y)[0].sum())
    torch.testing.assert_close(reward + beta * entropy, -beta * sequence_kl(world))
    torch.testing.assert_close(state_kl(world), sequence_kl(world))
    apart = world.gradient(state_kl(world)) - world.gradient(sequence_kl(world))
    assert apart.abs().max() > 0.05

def dense_loss(world, y, estimator):
    """The loss of opd.py in the two states of response y: (T,)."""
    logp, logq = world.rows(y)
    if estimator == "full":
        return reverse_kl(world.theta.log_softmax(-1), world.logq)[[0, 1 + y[0]]]
    return -dense_advantages(logp, logq, [T], estimator == "return") * logp

@pytest.mark.parametrize("estimator, objective", [
    ("full", state_kl), ("token", state_kl), ("return", sequence_kl)])
def test_opd_estimators_descend_eq_4_eq_4_and_eq_2(estimator, objective):
    world = Tabular()
    loss = world.expectation(lambda y: dense_loss(world, y, estimator).sum())
    torch.testing.assert_close(world.gradient(loss), world.gradient(objective(world)))

def test_return_to_go_stays_inside_its_row():
    """Two rows in one batch, by hand: the sums of the first do not reach into the second."""
    logp = torch.tensor([-1.0, -2.0, -1.0, -3.0, -0.5])
    logq = torch.tensor([-0.5, -1.0, -2.0, -1.0, -1.5])  # advantages 0.5, 1, -1 | 2, -1
    both = dense_advantages(logp, logq, [3, 2], True)
    torch.testing.assert_close(both, torch.tensor([0.5, 0.0, -1.0, 1.0, -1.0]))

# --- GRPO -----------------------------------------------------------------------------------------

def test_advantages_see_their_own_group_only_and_a_constant_group_is_exactly_zero():
    """One success in eight: 2.4742 with K - 1 in the std (2.6450 with K), eps 1e-4."""
    one, two = [1.0] + [0.0] * 7, [1.0, 0.0] * 4
    rewards = torch.tensor([one, two, [1.0] * 8, [0.0] * 8])
    adv = advantages(rewards)
    assert adv[0, 0].item() == pytest.approx(2.4742, abs=5e-5)
    assert advantages(rewards, adv_std=False)[0, 0].item() == pytest.approx(0.875)
    assert (adv[2:] == 0).all() and (adv[:2].sum(-1).abs() < 1e-6).all()
    assert torch.equal(sparse_advantages(rewards), adv), "opd.py has the same"

def test_grpo_gradient_at_ratio_one_is_the_policy_gradient():
    """At pi = pi_old the loss is -A and its gradient -A grad log pi(y), whatever the clip."""
    logp = random_logp(6).requires_grad_()
    adv = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0], dtype=torch.float64)
    loss = policy_loss(logp, logp.detach(), adv, 0.2, 0.28)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -adv)
    torch.testing.assert_close(logp.grad, -adv)

def test_grpo_expected_gradient_is_that_of_the_expected_reward():
    """With a fixed baseline, on the enumerated world: E[grad loss] = -grad E[R]."""
    world = Tabular()
    reward = {y: float(y == (1, 2) or y == (0, 0)) for y in RESPONSES}

    def loss(y):
        logp, _ = world.rows(y)
        adv = torch.full((T,), reward[y] - 0.3, dtype=torch.float64)
        return policy_loss(logp, logp.detach(), adv, 0.2, 0.2).sum()

    objective = sum(world.rows(y)[0].sum().exp() * reward[y] for y in RESPONSES)
    torch.testing.assert_close(world.gradient(world.expectation(loss)), -world.gradient(objective))

# --- Eq. 3: between OPD and sparse reward ---------------------------------------------------------

@pytest.mark.parametrize("estimator", ["full", "token", "return"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.8, 1.0])
def test_eq_3_expected_gradient_is_the_mixture_of_the_two_objectives(weight, estimator):
    """All 81 groups of two responses, with opd.py's own advantages. Where just one of two is right,
    A = +-c with c = (1/2) / (sqrt(1/2) + 1e-4), so c E[R] stands for E[R]. `return` ascends Eq. 3
    as the paper writes it, with beta = 1 and 1 - lambda as the weight of H; the others have Eq. 4
    in its dense part."""
    world, right = Tabular(), {(1, 2), (0, 0)}
    c = 0.5 / (0.5**0.5 + 1e-4)
    mean_loss = 0.0
    for pair in itertools.product(RESPONSES, repeat=2):
        rewards = torch.tensor([[float(y in right) for y in pair]], dtype=torch.float64)
        chance = torch.stack([world.rows(y)[0].detach().sum() for y in pair]).sum().exp()
        for y, adv in zip(pair, sparse_advantages(rewards)[0]):
            loss = mixed_loss(dense_loss(world, y, estimator), world.rows(y)[0], adv, weight)
            mean_loss = mean_loss + chance * loss.sum() / 2

    objective = 0.0 if estimator == "return" else -(1 - weight) * state_kl(world)
    for y in RESPONSES:
        logp, logq = (x.sum() for x in world.rows(y))
        dense = logq - logp if estimator == "return" else 0.0  # r_T of Eq. 1, and the entropy's
        J = (1 - weight) * dense + weight * c * (y in right)
        objective = objective + logp.exp() * J
    torch.testing.assert_close(world.gradient(mean_loss), -world.gradient(objective))

@pytest.mark.parametrize("adv, ratio, moves", [
    (1.0, 1.10, True), (1.0, 1.19, True), (1.0, 1.21, True), (1.0, 1.29, False), (1.0, 0.5, True),
    (-1.0, 0.9, True), (-1.0, 0.81, True), (-1.0, 0.79, False), (-1.0, 1.5, True),
])
def test_clip_stops_only_moves_that_have_gone_far_enough(adv, ratio, moves):
    """clip 0.2 below, 0.28 above: a good token stops being raised above 1.28, a bad one stops being
    lowered below 0.8; the way back is always open."""
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    old = -torch.tensor([ratio], dtype=torch.float64).log()
    loss = policy_loss(logp, old, torch.tensor([adv], dtype=torch.float64), 0.2, 0.28)
    loss.sum().backward()
    assert (logp.grad.item() != 0) == moves
    if moves:
        assert logp.grad.item() == pytest.approx(-adv * ratio)

def test_kl_estimators_descend_what_they_say():
    """V = 5: the expected gradient of k2 is that of KL(pi || ref), of k3 that of KL(ref || pi); k1
    would have none; and the expected value of k3 is KL(pi || ref)."""
    logits, ref = torch.randn(1, 5, dtype=torch.float64, requires_grad=True), random_logp(1, 5)
    logp = logits.log_softmax(-1)
    weights = logp.detach().exp()

    def gradient(value):
        return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]

    to_ref, from_ref = gradient(reverse_kl(logp, ref)), gradient(forward_kl(logp, ref))
    assert (to_ref - from_ref).abs().max() > 0.01
    torch.testing.assert_close(gradient(weights * kl_penalty(logp, ref, "k2")), to_ref)
    torch.testing.assert_close(gradient(weights * kl_penalty(logp, ref, "k3")), from_ref)
    assert gradient(weights * (logp - ref)).abs().max() < 1e-12
    mean_k3 = (weights * kl_penalty(logp, ref, "k3")).sum(-1)
    torch.testing.assert_close(mean_k3, reverse_kl(logp, ref))

@pytest.mark.parametrize("seed", [5, 6, 7])
def test_k2_descends_the_kl_to_the_reference_also_after_the_policy_has_moved(seed):
    """All 9 responses of pi_old, the states being constants as in Eq. 4: the gradient of the loss
    equals that of KL(pi || ref) by finite differences, worked out number by number. Without the
    ratio it is another one; at pi = pi_old the ratio changes nothing."""
    world, step = Tabular(), 1e-6
    old, ref = random_logp(1 + V, V, seed=seed), random_logp(1 + V, V, seed=seed + 10)
    world.theta.data = old + 0.4 * random_logp(1 + V, V, seed=seed + 20)
    visits = [1.0, *old[0].exp().tolist()]  # of pi_old

    def kl(theta, s):
        p = [math.exp(x) for x in theta[s]]
        return sum(x / sum(p) * (math.log(x / sum(p)) - r) for x, r in zip(p, ref[s].tolist()))

    want = torch.zeros_like(world.theta)
    for s, v in itertools.product(range(1 + V), range(V)):
        up, down = (world.theta.tolist() for _ in range(2))
        up[s][v], down[s][v] = up[s][v] + step, down[s][v] - step
        want[s, v] = visits[s] * (kl(up, s) - kl(down, s)) / (2 * step)

    def gradient(weighted):
        loss = 0.0
        for y in RESPONSES:
            states, tokens = [0, 1 + y[0]], list(y)
            logp, logp_old = world.rows(y)[0], old[states, tokens]
            ratio = (logp - logp_old).exp().detach() if weighted else 1.0
            penalty = kl_penalty(logp, ref[states, tokens], "k2", ratio)
            loss = loss + logp_old.sum().exp() * penalty.sum()
        return world.gradient(loss)

    torch.testing.assert_close(gradient(True), want, atol=1e-8, rtol=1e-7)
    assert (gradient(False) - want).norm() > 0.05 * want.norm()
    world.theta.data = old
    torch.testing.assert_close(gradient(True), gradient(False))

@pytest.mark.parametrize("aggregation, short, long", [
    ("token", 1 / 12, 1 / 12), ("sequence", 1 / 4, 1 / 20), ("constant", 1 / 40, 1 / 40)])
def test_aggregation_of_a_short_and_a_long_row(aggregation, short, long):
    """Rows of 2 and 10 tokens, limit 20: the weight of one token of each, by hand. A truncated row
    that is masked counts nowhere, and where all are masked there is no NaN."""
    rows = [Rollout([0], [1] * n, [], True) for n in (2, 10)]
    cut = Rollout([0], [1] * 7, [], False)
    keep, mask = (Config(aggregation=aggregation, max_new_tokens=20, mask_truncated=masked)
                  for masked in (False, True))
    want = torch.tensor([short, long], dtype=torch.float64)
    torch.testing.assert_close(row_weights(rows, keep), want)
    masked = row_weights([*rows, cut], mask)
    torch.testing.assert_close(masked, torch.cat([want, torch.zeros(1)]))
    assert row_weights([*rows, cut], keep)[2] > 0
    assert (row_weights([cut, cut], mask) == 0).all()
