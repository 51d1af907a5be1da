"""The computed sizes, against numbers worked out by hand and the published ones."""

import dataclasses

import pytest

import common
import evaluate
import grpo
from conftest import ROOT
from sizes_table import MODELS, readme_table

# D 8, L 2, H 4 of which 2 have keys, d 2, F 10, V 20: a layer has 2 * 8 * 2 * 6 + 3 * 80 + 16 = 448
# parameters, what is not in a layer 20 * 8 + 8 = 168 tied, 328 not
TINY = common.Shape(8, 2, 4, 2, 10, 20, True, head_dim=2)
LARGE = common.Shape(8, 2, 4, 2, 10, 20, False, head_dim=2)


def test_parameters_by_hand_and_of_models_that_exist(world):
    assert (TINY.layer, TINY.outer, TINY.params) == (448, 168, 1064)
    assert LARGE.params == 1224 and TINY.cache == 4 * 2 * 2 * 2
    assert TINY.activation == 24 * 8 + 14 * 12 + 8 * 10 == 440
    published = {"Qwen3-1.7B": 1.721, "Qwen3-8B": 8.191, "Qwen3-14B": 14.768,
                 "Llama-3.1-8B": 8.030, "Llama-3.3-70B": 70.554}
    for name, shape in MODELS.items():
        assert shape.params / 1e9 == pytest.approx(published[name], abs=6e-4)
    lm = common.load_lm(str(world / "init-teacher"))
    shape = common.read_shape(str(world / "init-teacher"))
    assert shape.params == sum(p.numel() for p in lm.model.parameters())


def test_memory_by_hand():
    both = dict(rows=3, longest=5, micro_tokens=10, chunk=7)
    one = common.step_bytes(TINY, [LARGE], TINY, gpus=1, checkpointing=False, **both)
    assert one == {
        "masters": 4256, "AdamW": 8512, "frozen models": 2448, "gradients": 4256,
        "weights of the update": 2128, "head and chunk": 8 * 160 + 42, "activations": 8800,
        "in the update": 15216 + 4256 + 2128 + 1322 + 8800,
        "weights of the sampler": 2128, "keys and values": 15 * 32,
        "while sampling": 15216 + 2128 + 480}
    two = common.step_bytes(TINY, [LARGE], TINY, gpus=2, checkpointing=True, **both)
    assert two == {
        "masters": 2128, "AdamW": 4256, "frozen models": 1224 + 656, "gradients": 2128,
        "weights of the update": 2 * (2 * 2 * 448 + 4 * 168), "head and chunk": 1322,
        "activations": 10 * (4 * 2 * 8 + 440), "in the update": 8264 + 2128 + 4928 + 1322 + 5040,
        "weights of the sampler": 2 * 896 + 4 * 168, "keys and values": 480,
        "while sampling": 8264 + 2464 + 480}
    far = common.step_bytes(TINY, [], TINY, gpus=2, checkpointing=True, cpu_offload=True, **both)
    assert far["masters"] == far["AdamW"] == far["gradients"] == 0
    alone = common.step_bytes(None, [LARGE], LARGE, gpus=2, checkpointing=False, **both)
    assert alone["while sampling"] == 2448 + 480 and alone["in the update"] == 0


def test_sampling_layer_by_layer_by_hand():
    """In place of a copy: two layers in bf16, and what is not in a layer as it is gathered, in fp32
    of the trained model (and counted already of a frozen one). A token moves all layers."""
    both = dict(rows=3, longest=5, micro_tokens=10, chunk=7, checkpointing=True)
    full, two = (common.step_bytes(TINY, [LARGE], TINY, gpus=2, gather=gather, **both)
                 for gather in ("full", "layer"))
    assert two["weights of the sampler"] == 2 * 2 * 448 + 4 * 168
    assert two == {**full, "weights of the sampler": 2464, "while sampling": 8264 + 2464 + 480}
    frozen = common.step_bytes(TINY, [LARGE], LARGE, gpus=2, gather="layer", **both)
    assert frozen["weights of the sampler"] == 2 * 2 * 448
    alone = common.step_bytes(None, [LARGE], LARGE, gpus=2, gather="layer", **both)
    assert alone["frozen models"] == 2448 / 2 + 2 * 328
    assert alone["while sampling"] == 1224 + 656 + 2 * 2 * 448 + 480
    one = [common.step_bytes(TINY, [], TINY, gpus=1, gather=g, **both) for g in ("full", "layer")]
    assert one[0] == one[1]  # one process gathers nothing
    times = [common.step_seconds(TINY, [], TINY, gpus=gpus, rows=8, share=4, prompt=2, response=6,
                                 micro_tokens=16, checkpointing=False, sample_rows=2, gather=gather)
             for gpus, gather in ((8, "full"), (8, "layer"), (16, "layer"), (1, "layer"))]
    moved = 2 * 6 * 2 * 2 * 448  # two batches, six tokens each: two layers of bf16
    seconds = [time["sampling"] - times[0]["sampling"] for time in times]
    assert seconds == pytest.approx([0, moved / common.NODE, moved / common.NETWORK, 0])


def test_seconds_by_hand():
    found = common.step_seconds(TINY, [LARGE], TINY, gpus=2, rows=8, share=4, prompt=2, response=6,
                          micro_tokens=16, checkpointing=False, sample_rows=2)
    reads = 2 * 6 * (2 * 1064 + 2 * (2 + 3) * 32)  # two batches, six tokens each
    assert found["sampling"] == pytest.approx(reads / common.MEMORY)
    attention = 4 * 2 * 4 * 2 * 8 / 2  # 4 L H d * length / 2, a token of 32
    assert found["update"] == pytest.approx(3 * (2128 + attention) * 32 / common.OPERATIONS)
    assert found["frozen models"] == pytest.approx((2448 + attention) * 32 / common.OPERATIONS)
    assert found["between GPUs"] == pytest.approx(2 * 8 * 1064 / common.NODE)
    assert found["a step"] == pytest.approx(sum(list(found.values())[:-1]))


def test_dry_run_reads_no_weights(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "read_weights", lambda *args: pytest.fail("weights were read"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ["--model", str(world / "init-teacher"), "--out", str(tmp_path / "out"), "--dry-run"]
    cfg = common.parse_args(grpo.Config, "", flags)
    assert cfg.dry_run == 4 and common.parse_args(grpo.Config, "", [*flags, "8"]).dry_run == 8
    grpo.main(cfg)
    out = capsys.readouterr().out
    assert "computed, not measured: 4 GPU(s)" in out and "while sampling" in out
    assert not (tmp_path / "out").exists()


def test_dry_run_knows_how_sampling_gathers():
    """Llama-3.3-70B on 8 GPUs: 2 * 70.55 + 2 * 2.10 GB of whole weights, or 4 * 0.86 + 4 * 2.10;
    evaluate.py has a model in each process, or an eighth of it, 2 * 2.10 and 4 * 0.86."""
    shape = MODELS["Llama-3.3-70B"]
    for cfg, trained, frozen, full, layer in (
            (grpo.Config(model="", dry_run=8), shape, [], 145.3, 11.8),
            (evaluate.Config(dry_run=8), None, [shape], 141.1, 25.3)):
        seconds = []
        for gather, want in (("full", full), ("layer", layer)):
            found, times = common.sizes(dataclasses.replace(cfg, gather=gather), trained, frozen,
                                        shape)
            have = found["weights of the sampler"] + (found["frozen models"] if frozen else 0)
            assert have / common.GB == pytest.approx(want, abs=0.05)
            seconds.append(times["sampling"])
        assert seconds[1] - seconds[0] == pytest.approx(16384 * 136.9 / 200, rel=1e-3)


def test_the_table_of_the_readme_is_the_computed_one():
    assert readme_table() in (ROOT / "README.md").read_text()
