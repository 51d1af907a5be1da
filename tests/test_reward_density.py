"""opd.py --sparse-weight: its ends are OPD and GRPO, on whole runs of the command line's `main`.

What lies between them is proved in test_equations.py and, through a model, in test_invariance.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import common
import grpo
import opd

@pytest.fixture
def step(taught, world, tmp_path, monkeypatch):
    """step(stage, flags) runs one step from `taught`, a policy that succeeds every second time.

    Returns its gradient, its weights, the line of metrics, and the labels in its record.
    """
    def run(stage, **flags):
        found, update = [], stage.optimizer_step

        def kept(lm, *args):
            found.extend(p.grad.flatten().clone() for p in lm.model.parameters())
            return update(lm, *args)

        monkeypatch.setattr(stage, "optimizer_step", kept)
        models = (dict(model=str(taught.model), kl_coef=0.0, mini_batch=6) if stage is grpo else
                  dict(student=str(taught.model), teacher=str(world / "init-teacher")))
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        stage.main(stage.Config(**models, data=str(taught.data), exclude="none", out=str(out),
                                prompts=6, rollouts=4, max_new_tokens=12, steps=1, lr=1e-4, seed=6,
                                micro_tokens=100, show_every=0, **flags))
        return SimpleNamespace(gradient=torch.cat(found),
                               weights=load_file(out / "model.safetensors"),
                               line=json.loads((out / "metrics.jsonl").read_text()),
                               labels=len(common.read_json_lines(out / "labels.jsonl")))

    return run

def test_weight_1_takes_the_step_of_grpo(step, taught):
    """The same gradient, weights within 1e-6 after a step of 1e-4, and the same figures of it.

    (At a larger rate Adam would turn rounding in gradients near 0 into more.)
    """
    want, got = step(grpo), step(opd, sparse_weight=1.0)
    assert 0.2 < want.line["reward"] < 0.8 and want.gradient.norm() > 0.1
    assert (got.gradient - want.gradient).norm() < 1e-6 * want.gradient.norm()
    old = load_file(taught.model / "model.safetensors")
    assert max((want.weights[n] - old[n]).abs().max() for n in old) > 5e-5
    assert max((want.weights[n] - got.weights[n]).abs().max() for n in old) < 1e-6
    for name in ("reward", "tokens", "entropy", "grad_norm"):
        assert got.line[name] == pytest.approx(want.line[name], rel=2e-3), name
    assert got.labels == want.labels == 6

@pytest.mark.parametrize("estimator", ["full", "token", "return"])
def test_weight_0_asks_no_verifier_and_records_no_label(estimator, step, monkeypatch):
    def never(*args):
        raise AssertionError("the verifier was asked")

    monkeypatch.setattr(common, "grade", never)
    got = step(opd, estimator=estimator)
    assert "reward" not in got.line and "seconds_verifying" not in got.line
    assert got.labels == 0

def test_each_response_is_graded_by_the_answer_of_its_own_prompt():
    """P = 3, K = 2, prompt by prompt: only the first response to each prompt is right."""
    texts = [r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", r"\boxed{9}", r"\boxed{9}", "no box"]
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: texts[tokens[0]])
    rows = [common.Rollout([0], [i], [0.0], True) for i in range(len(texts))]
    rewards, logged = grpo.reward_groups(tokenizer, rows, ["7", "8", "9"])
    assert rewards.tolist() == [[1, 0], [1, 0], [1, 0]]
    assert logged == {"reward": 0.5, "reward_std": pytest.approx(0.5**0.5), "zero_variance": 0.0,
                      "no_answer": pytest.approx(1 / 6), "gave_up": 0.0}
