"""tests/lab/sizes.py against numbers worked out by hand and the published ones."""

import shutil

import pytest
import sizes
import transformers
from conftest import ROOT
from sizes import MODELS, Settings, Shape, step_bytes, step_seconds

import common

# D 8, L 2, H 4 of which 2 have keys, d 2, F 10, V 20: a layer has 2 * 8 * 2 * 6 + 3 * 80 + 16 = 448
# parameters, what is not in a layer 20 * 8 + 8 = 168 tied, 328 not
TINY = Shape(8, 2, 4, 2, 10, 20, True, head_dim=2)
LARGE = Shape(8, 2, 4, 2, 10, 20, False, head_dim=2)

def test_parameters_by_hand_and_of_models_that_exist(world):
    assert (TINY.layer, TINY.outer, TINY.params) == (448, 168, 1064)
    assert LARGE.params == 1224 and TINY.cache == 4 * 2 * 2 * 2
    assert TINY.activation == 24 * 8 + 14 * 12 + 8 * 10 == 440
    published = {"Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-8B": 8.191, "Qwen3-14B": 14.768,
                 "Llama-3.1-8B": 8.030, "Llama-3.3-70B": 70.554, "SmolLM2-135M": 0.1345,
                 "SmolLM2-360M": 0.3618}
    for name, shape in MODELS.items():
        assert shape.params / 1e9 == pytest.approx(published[name], abs=6e-4)
    lm = common.load_lm(str(world / "init-teacher"), common.StageConfig())
    shape = sizes.read_shape(str(world / "init-teacher"))
    assert shape.params == sum(p.numel() for p in lm.model.parameters())

def settings(stage, gpus, **changes):
    """8 rows, each of 2 + 6 tokens; a GPU decodes 2 at once; micro-batches of 16 tokens."""
    return Settings(stage, gpus, **{"prompts": 4, "rollouts": 2, "max_prompt_tokens": 2,
                                    "max_new_tokens": 6, "micro_tokens": 16, "sample_rows": 2,
                                    **changes})

def test_memory_by_hand():
    one = step_bytes(settings("grpo", 1), TINY, LARGE, chunk=7)
    assert one == {
        "masters": 4256, "AdamW": 8512, "frozen models": 2448, "gradients": 4256,
        "weights of the update": 2128, "head and chunk": 8 * 160 + 42, "activations": 16 * 2 * 440,
        "in the update": 15216 + 4256 + 2128 + 1322 + 14080,
        "weights of the sampler": 2128, "keys and values": 16 * 32,
        "while sampling": 15216 + 2128 + 512}
    two = step_bytes(settings("opd", 2, gradient_checkpointing=True), TINY, LARGE, chunk=7)
    assert two == {
        "masters": 2128, "AdamW": 4256, "frozen models": 1224 + 656, "gradients": 2128,
        "weights of the update": 2 * (2 * 2 * 448 + 4 * 168), "head and chunk": 1322,
        "activations": 16 * (4 * 2 * 8 + 440), "in the update": 8264 + 2128 + 4928 + 1322 + 8064,
        "weights of the sampler": 2 * 896 + 4 * 168, "keys and values": 512,
        "while sampling": 8264 + 2464 + 512}
    for gpus, copy in ((1, 0), (2, 2 * 1224)):  # the teacher samples: no copy in fp32
        warmup = step_bytes(settings("warmup", gpus), TINY, LARGE)
        assert warmup["weights of the sampler"] == copy
    alone = step_bytes(settings("evaluate", 2), LARGE)  # each GPU has the whole model
    assert alone["while sampling"] == 2448 + 512 and alone["in the update"] == 0
    shared = step_bytes(settings("opd", 2, sample_parts=2), TINY, LARGE)  # half of the layers
    assert shared["weights of the sampler"] == 896 + 4 * 168 and shared["keys and values"] == 256
    shared = step_bytes(settings("evaluate", 2, sample_parts=2), LARGE)  # and half of the files
    assert shared["while sampling"] == 1224 + 656 + 896 + 656 + 256

@pytest.mark.parametrize("name, gpus, gb, flag, parts", [
    ("Qwen3-8B", 16, 80, 0, 1), ("Qwen3-14B", 16, 80, 0, 2), ("Qwen3-14B", 1, 80, 0, 1),
    ("Llama-3.3-70B", 16, 80, 0, 8), ("Llama-3.3-70B", 16, 141, 0, 4),
    ("Llama-3.3-70B", 4, 80, 0, 4), ("Qwen3-8B", 8, 80, 2, 2), ("SmolLM2-135M", 8, 80, 2, 1)])
def test_parts_are_those_that_the_scripts_choose(name, gpus, gb, flag, parts):
    """The cases of these models in test_distributed.py give the same."""
    card = sizes.Card("card", gb, 1, 1)
    assert Settings(gpus=gpus, sample_parts=flag).divided(MODELS[name], None, card).parts == parts

OPERATIONS, MEMORY = 0.4 * 989e12, 0.4 * 3.35e12

def test_seconds_by_hand():
    found = step_seconds(settings("grpo", 2), TINY, LARGE)
    reads = 2 * 6 * (2 * 1064 + 2 * (2 + 3) * 32)  # two batches, six tokens each
    assert found["sampling"] == pytest.approx(reads / MEMORY)
    a_part = 896 + 2 * 168 + 2 * (2 + 3) * 32 / 2  # four batches for both; four sums a token
    assert step_seconds(settings("grpo", 2, sample_parts=2), TINY)["sampling"] == pytest.approx(
        4 * 6 * (a_part / MEMORY + 4 * (20e-6 + 2 * 4 * 8 / sizes.NODE)))
    attention = 4 * 2 * 4 * 2 * 8 / 2  # 4 L H d * length / 2, a token of 32
    assert found["update"] == pytest.approx(3 * (2128 + attention) * 32 / OPERATIONS)
    assert found["frozen models"] == pytest.approx((2448 + attention) * 32 / OPERATIONS)
    assert found["between GPUs"] == pytest.approx(2 * 8 * 1064 / sizes.NODE)
    assert found["a step"] == pytest.approx(sum(list(found.values())[:-1]))
    # the warmup's teacher fills 16 rows with several steps' prompts: a step is a quarter of them
    found = step_seconds(settings("warmup", 2, sample_rows=16), TINY, LARGE)
    assert found["sampling"] == pytest.approx(6 / 4 * (2448 + 16 * 5 * 32) / MEMORY)

MOE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
           head_dim=16, vocab_size=128, tie_word_embeddings=False)
KINDS = {  # name: (config, parameters, of a token; None: not known)
    "Qwen3-30B-A3B": (transformers.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, vocab_size=151936, tie_word_embeddings=False), 30_532_122_624,
        30_532_122_624 - 48 * 120 * 3 * 2048 * 768),
    "Mixtral": (transformers.MixtralConfig(**MOE, intermediate_size=96, num_local_experts=4,
                                           num_experts_per_tok=1),
                # norms, attention, router, experts; embedding, head, last norm
                3 * (2 * 64 + 2 * 64 * 16 * 6 + 4 * 64 + 4 * 3 * 64 * 96) + 2 * 128 * 64 + 64,
                3 * (2 * 64 + 2 * 64 * 16 * 6 + 4 * 64 + 1 * 3 * 64 * 96) + 2 * 128 * 64 + 64),
    "nobody says how many": (transformers.MixtralConfig(
        **MOE, intermediate_size=96, num_local_experts=4, num_experts_per_tok=0),
        3 * (2 * 64 + 2 * 64 * 16 * 6 + 4 * 64 + 4 * 3 * 64 * 96) + 2 * 128 * 64 + 64, None),
    "Qwen2, whose attention has biases": (transformers.Qwen2Config(
        **{k: v for k, v in MOE.items() if k != "head_dim"}, intermediate_size=96),
        3 * (2 * 64 + 2 * 64 * 16 * 6 + 16 * 8 + 3 * 64 * 96) + 2 * 128 * 64 + 64, "all")}

@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_any_kind_is_counted_and_its_active_part_takes_the_time(name, world, tmp_path,
                                                                           capsys):
    """Memory is of all parameters, the update's operations of those that a token passes through."""
    config, params, active = KINDS[name]
    folder = shutil.copytree(world / "init-student", tmp_path / "model")
    config.save_pretrained(folder)
    shape = sizes.read_shape(str(folder))
    assert shape.params == params and step_bytes(Settings(gpus=1), shape)["AdamW"] == 8 * params
    flags = [str(folder), "--gpus", "1", "--teacher", "none"]
    if active is None:
        with pytest.raises(SystemExit, match="no seconds: .*num_experts_per_tok"):
            sizes.main(flags)
        assert " GB" in capsys.readouterr().out  # memory is known
        return
    assert shape.active == (params if active == "all" else active)
    sizes.main(flags)
    assert ("B active" in capsys.readouterr().out) == (active != "all")
    attention = 4 * shape.layers * shape.heads * shape.head_dim * 8 / 2
    found = step_seconds(settings("grpo", 1), shape)
    assert found["update"] == pytest.approx(
        3 * (2 * shape.active + attention) * 64 / OPERATIONS)
    assert found["sampling"] > 2 * params / MEMORY  # many rows read all experts

def recipe(*args):
    """{row: [GB, hours...]} of `sizes.recipe_table`."""
    lines = [line.strip("| ").split(" | ") for line in sizes.recipe_table(*args).splitlines()[2:]]
    return {row[0]: [float(x.replace(",", "")) for x in row[1:]] for row in lines}

def test_a_recipe_is_the_sum_of_what_run_all_runs():
    """10 epochs of 8,700 problems, 8 a step, are 10,870 steps; rows that do not fit 80 GB wait."""
    rows = recipe("qwen3", 8)
    shape = MODELS["Qwen3-8B"]
    s = Settings("grpo", 8, max_prompt_tokens=sizes.PROMPT, gradient_checkpointing=True)
    hours = 10_870 * step_seconds(s, shape, shape)["a step"] / 3600
    assert rows["teacher-rl-1h"][3] == pytest.approx(hours, abs=0.05)
    *stages, whole, every = rows.values()
    assert len(stages) == 29 and every[1:] == pytest.approx(
        [sum(x) for x in list(zip(*stages))[1:]], abs=1)
    assert sum(rows[name][3] for name in sizes.R5[:4]) == pytest.approx(whole[3], rel=0.01)
    s = Settings("warmup", 8, max_prompt_tokens=sizes.PROMPT, gradient_checkpointing=True)
    crowded = 1087 * step_seconds(s, MODELS["Qwen3-1.7B"], shape)["a step"] / 3600
    assert rows["bridge-1h-warmup"][3] > 1.2 * crowded  # 256 rows of 16,384 tokens do not

@pytest.mark.parametrize("setting, gb", [("tiny", 16), ("small", 80)])
def test_small_settings_fit_their_card_as_the_readme_says(setting, gb, monkeypatch):
    rows = recipe(setting)
    most, hours = rows["all"]
    row = next(x for x in (ROOT / "README.md").read_text().splitlines() if f".sh {setting}`" in x)
    assert most < 0.95 * gb and f" {gb} GB | {most:.0f} GB | {hours:.0f} |" in row
    monkeypatch.setenv("EVAL_FLAGS", "--samples 32")  # of 16
    assert recipe(setting)["all"][1] == pytest.approx(hours + rows["12 evaluations"][1], abs=0.2)

def test_the_command_reads_no_weights_and_takes_the_defaults_of_the_stage(world, monkeypatch,
                                                                          capsys):
    monkeypatch.setattr(common, "read_weights", lambda *args: pytest.fail("weights were read"))
    sizes.main(["Qwen3-1.7B", "--stage", "opd", "--teacher", str(world / "init-teacher"),
                "--gpus", "4", "--max-new-tokens", "100"])
    out = capsys.readouterr().out
    assert "opd on 4 GPU(s), 8 prompts x 8 responses of 100 tokens" in out
    assert "while sampling" in out
    assert [Settings(s).max_prompt_tokens for s in sizes.STAGES] == [3072, 2048, 2048, 2048]
    evaluation = Settings("evaluate", gpus=2)
    assert (evaluation.rollouts, evaluation.prompts) == (16, 2 * 512 // 16)
    for flags, message in (["Qwen3-1.7B", "--stage", "opd"], "needs a --teacher"), (
            ["nobody-has/this"], "cannot be used"):
        with pytest.raises(SystemExit, match=message):
            sizes.main(flags)

def test_the_table_of_the_readme_is_the_computed_one():
    assert sizes.models_table() in (ROOT / "tests" / "README.md").read_text()
