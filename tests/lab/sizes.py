"""Prints the README's table of computed sizes.

    python tests/sizes_table.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import GB, Shape, sizes

MODELS = {
    "Qwen3-1.7B": Shape(2048, 28, 16, 8, 6144, 151936, True, qk_norm=True),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 12288, 151936, False, qk_norm=True),
    "Qwen3-14B": Shape(5120, 40, 40, 8, 17408, 151936, False, qk_norm=True),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256, False),
    "Llama-3.3-70B": Shape(8192, 80, 64, 8, 28672, 128256, False),
}


def readme_table():
    """grpo.py with the paper's settings and --gradient-checkpointing, its KL reference included."""
    cfg = SimpleNamespace(rollouts=8, prompts=8, sample_rows=256, max_prompt_tokens=3072,
                          max_new_tokens=16384, gradient_checkpointing=True)
    rows = ["| model | GPUs | update, GB | sampling, GB | a row's cache, GB | fits 80 / 141 GB | "
            "a step, minutes |", "| --- | --: | --: | --: | --: | --- | --: |"]
    for name, shape in MODELS.items():
        for cfg.dry_run in (1, 8, 16):
            found, times = sizes(cfg, shape, [shape], shape)
            row = found["keys and values"] / min(64, -(-8 // cfg.dry_run) * 8)
            sampling = found["while sampling"] - found["keys and values"]
            need = max(found["in the update"], sampling + row) / GB
            fits = " / ".join("yes" if need < 0.95 * size else "no" for size in (80, 141))
            rows.append(f"| {name} | {cfg.dry_run} | {found['in the update'] / GB:.0f} | "
                        f"{sampling / GB:.0f} | {row / GB:.1f} | {fits} | "
                        f"{times['a step'] / 60:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(readme_table())
