"""What all tests share: import paths, one thread, no network, the small world and its models."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub name fails at once; nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and sums keep one order
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

import common  # noqa: E402
import world as world_module  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with train (24), valid (8), test (12), corpora, init-teacher and init-student."""
    folder = tmp_path_factory.mktemp("world")
    return world_module.build(folder, seed=0, documents=200, train=24, valid=8, test=12)


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
