"""why.py: its estimate of signal and noise on gradients whose truth is known, its KL and gradients
against plain versions, and one whole run on untrained models."""

import re
import shutil

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import why
from common import sample

def gaussian_gram(rng, M, signal, noise, D=30):
    """Inner products of M draws from a normal with |mean|^2 = signal, trace of covariance = noise,
    spread unevenly over D directions."""
    scales = np.geomspace(1, 0.01, D)
    mean = np.full(D, (signal / D) ** 0.5)
    g = mean + rng.standard_normal((M, D)) * np.sqrt(noise * scales / scales.sum())
    return g @ g.T

@pytest.mark.parametrize("signal, noise", [(0.0, 1.0), (0.05, 1.0), (4.0, 0.5)])
def test_signal_and_noise_are_unbiased(signal, noise):
    """Means of 2,000 estimates from 8 batches, within 4 of their standard errors. The squared norm
    of the mean gradient would be noise / 8 too large: far outside."""
    rng = np.random.default_rng(0)
    found = np.array([why.signal_and_noise(gaussian_gram(rng, 8, signal, noise))
                      for _ in range(2000)])
    error = found.std(0) / len(found) ** 0.5
    assert (abs(found.mean(0) - (signal, noise)) < 4 * error).all(), found.mean(0)
    assert 4 * error[0] < noise / 8

def test_a_bootstrap_never_pairs_a_batch_with_itself():
    """Orthogonal gradients have no common direction, however often one of them is drawn."""
    for counts in ([3, 1, 0], [1, 1, 1], [2, 2, 5]):
        assert why.signal_and_noise(2.0 * np.eye(3), np.array(counts)) == (0.0, 2.0)

def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """SNR 0.2 from 32 batches, 100 times: a 95 % bootstrap interval of so few covers over 85 %."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(100):
        low, high = why.snr_interval(gaussian_gram(rng, 32, 0.2, 1.0), rng, draws=200)
        hits += low <= 0.2 <= high
    assert 85 <= hits < 100
    gram = np.zeros((8, 8))  # no gradient, as of a student that is never rewarded, is no signal
    assert why.snr(gram) == 0 and (why.snr_interval(gram, rng) == 0).all()

def test_group_shares():
    rewards = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert why.group_shares(rewards) == (0.5, 0.25, 0.25)

@pytest.fixture(scope="module")
def some_rows(world, student_lm):
    prompts = [[3, 4, 5, 6], [7, 8, 9], [3, 9, 9, 9, 9]]
    return sample(student_lm, prompts, 2, max_new_tokens=10, temperature=1.0, seed=(0,))

def distributions(lms, row):
    """Each model's distribution before every token of a row, from `model(ids).logits`."""
    ids, n = torch.tensor([row.prompt + row.tokens]), len(row.prompt)
    return [Categorical(logits=lm.model(ids).logits[0, n - 1 : -1, : lm.vocab]) for lm in lms]

def test_kl_of_each_state_is_that_of_all_logits(some_rows, student_lm, teacher_lm):
    """Row by row with all logits; the order of rows may differ."""
    want = [kl_divergence(*distributions((student_lm, teacher_lm), row)) for row in some_rows]
    found = why.state_kls(student_lm, teacher_lm, some_rows)
    torch.testing.assert_close(found.sort().values, torch.cat(want).sort().values,
                               atol=1e-5, rtol=1e-4)
    assert (why.state_kls(student_lm, student_lm, some_rows) == 0).all()

def test_gradients_are_those_of_the_losses_written_out(some_rows, trainable_lm, teacher_lm):
    """All three from all logits and autograd; rewards of one mixed group in three."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = why.batch_gradients(trainable_lm, teacher_lm, some_rows, rewards)
    losses = {name: 0.0 for name in why.ESTIMATORS}
    c = 0.5 / (0.5**0.5 + 1e-4)  # of one right in two
    for row, A in zip(some_rows, (c, -c, 0, 0, 0, 0)):
        pi, teacher = distributions((trainable_lm, teacher_lm), row)
        y = torch.tensor(row.tokens)
        logp = pi.log_prob(y)
        losses["reward"] -= (A * logp).sum()
        losses["token"] += ((logp - teacher.log_prob(y)).detach() * logp).sum()
        losses["full"] += kl_divergence(pi, teacher).sum()
    n_tokens = sum(len(r.tokens) for r in some_rows)
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss / n_tokens, list(trainable_lm.model.parameters()),
                                    retain_graph=True)
        want = torch.cat([g.flatten() for g in grads])
        assert (found[name] - want).norm() < 1e-5 * want.norm(), name

@pytest.fixture
def run(world, taught, tmp_path):
    """A folder like that of run_all.sh, of models that can be told apart."""
    folder = tmp_path / "run"
    for name in {*why.STUDENTS, *why.GROUPS, why.TEACHER}:
        source = world / "init-student" if name == "base-student" else taught.model
        shutil.copytree(source, folder / name)
    shutil.copy(taught.data, folder / "train.jsonl")
    return folder

def test_it_prints_three_tables_and_draws_three_pictures(run, tmp_path, capsys):
    """Students: untrained, and the teacher itself. The latter's KLs, and their gradients, are 0."""
    with np.errstate(all="raise"):
        why.main(f"{run} --prompts 2 --rollouts 2 --batches 8 --max-new-tokens 12 "
                 f"--pictures {tmp_path}/pictures".split())
    out = capsys.readouterr().out
    a, b, c = ([line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line][2:]
               for part in re.split(r"\n[abc]\. ", out)[1:])
    assert [row[0] for row in a] == ["without warmup", "after warmup"]
    assert float(a[0][2]) > 0.5 and [float(x) for x in a[1][2:]] == [0.0] * 7
    assert [row[0] for row in b] == ["cold student", "bridged student", "raw teacher"]
    assert all(sum(map(float, row[1:4])) == pytest.approx(100, abs=0.2) for row in b)
    assert float(b[0][1]) == 100 and float(b[1][4]) > 10  # untrained: all wrong
    assert [(row[0], row[1]) for row in c] == [(when, what) for when in why.STUDENTS.values()
                                               for what in why.ESTIMATORS.values()]
    assert [float(x) for x in c[0][2:5]] == [0.0] * 3  # never rewarded
    assert float(c[2][4]) > 0.1
    pytest.importorskip("matplotlib")
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures] == ["why-groups.png", "why-kl.png", "why-snr.png"]
    assert all(5_000 < p.stat().st_size <= 40_000 for p in pictures)

def test_mistakes_are_one_line(run, capsys):
    (run / "bridge" / "model.safetensors").unlink()
    for flags, message in (([], "no finished bridge in"), (["--batches", "7"], "at least 8"),
                           (["--rollouts", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            why.main([str(run), *flags])
        assert message in capsys.readouterr().err
