"""What all tests share: import paths, one thread, no network, the small world and its models."""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub name fails at once; nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and sums keep one order
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

import common  # noqa: E402
import fkl_warmup  # noqa: E402
import world as world_module  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: long; runs only with -m soak")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        skipped = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in skipped]
        config.hook.pytest_deselected(items=skipped)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with train (24), valid (8), test (12), corpora, init-teacher and init-student."""
    folder = tmp_path_factory.mktemp("world")
    return world_module.build(folder, seed=0, documents=200, train=24, valid=8, test=12)


@pytest.fixture(scope="session")
def taught(world, tmp_path_factory):
    """A model that solves eight problems about every second time, and their file: {model, data}."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [json.loads(x) for x in (world / "train.jsonl").read_text().splitlines()][:8]
    (folder / "data.jsonl").write_text("".join(json.dumps(
        {**row, "response": f"\\boxed{{{row['answer']}}}"}) + "\n" for row in rows))
    fkl_warmup.main(fkl_warmup.Config(
        student=str(world / "init-teacher"), targets="data", data=str(folder / "data.jsonl"),
        lr=4e-3, out=str(folder / "model"), prompts=8, steps=5, show_every=0))
    return SimpleNamespace(model=folder / "model", data=folder / "data.jsonl")


@pytest.fixture(scope="session")
def teacher_lm(world):
    """The world's frozen, untrained teacher. Shared: do not change it."""
    return common.load_lm(str(world / "init-teacher"))


@pytest.fixture(scope="session")
def student_lm(world):
    """The world's frozen, untrained student. Shared: do not change it."""
    return common.load_lm(str(world / "init-student"))


@pytest.fixture
def trainable_lm(world):
    """A fresh trainable copy of the world's student."""
    return common.load_lm(str(world / "init-student"), train=True)
