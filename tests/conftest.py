"""What all tests share: import paths, one thread, no network, the small world, forked processes."""

import json
import os
import re
import runpy
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub name fails at once; nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and sums keep one order
os.environ["TOKENIZERS_PARALLELISM"] = "false"
datasets_cache = tempfile.TemporaryDirectory(prefix="datasets-cache-")  # removed at the end
os.environ["HF_DATASETS_CACHE"] = datasets_cache.name

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
    return common.load_lm(str(world / "init-teacher"), common.StageConfig())

@pytest.fixture(scope="session")
def student_lm(world):
    """The world's frozen, untrained student. Shared: do not change it."""
    return common.load_lm(str(world / "init-student"), common.StageConfig())

@pytest.fixture
def trainable_lm(world):
    """A fresh trainable copy of the world's student."""
    return common.load_lm(str(world / "init-student"), common.StageConfig(), train=True)

# --- command lines in forked processes

STAGES = ("grpo", "fkl_warmup", "opd")
TIMING = re.compile("seconds.*|tokens_per_second")
BAR = re.compile(r"\d+%\||^\S+: 0\S+ \[")  # a line of a progress bar

@pytest.fixture(scope="session")
def small_line(world, taught):
    """small_line(stage, out, flags): a command line of two short steps; later flags win."""

    def line(stage, out, flags=""):
        models = (f"--model {taught.model}" if stage == "grpo" else
                  f"--teacher {taught.model} --student {world}/init-student")
        return (f"{stage}.py {models} --data {taught.data} --exclude none --out {out} --show-every "
                f"0 --max-new-tokens 12 --rollouts 4 --lr 1e-3 --steps 2 {flags}")

    return line

def nothing(*_, **__):
    pass

def forked(line, before=nothing, after=nothing, meanwhile=nothing):
    """Run a command line in one child; see `children`. before() comes first, in the child."""
    return group(line, 1, before, after, meanwhile)[0]

def group(line, n, before=nothing, after=nothing, meanwhile=nothing):
    """Run a command line in n children, as torchrun would; see `children`.

    The script runs as __main__ and takes all it imports from common.py: before() can change that.
    """
    script, *words = shlex.split(line)

    def work():
        sys.argv = [script, *words]
        before()
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return children(work, n, after, meanwhile)

def children(work, n=1, after=nothing, meanwhile=nothing):
    """work() and then after() in each of n forked children, which are one group if there are more.

    A child has this process's imports, which take seconds, and dies as a real process does. As
    torchrun does, we hold the store, and end all when one has failed. meanwhile(pid) runs here.
    Returns status (negative for a signal), out and err of each, err without progress bars.
    """
    store = n > 1 and torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    outputs = [[os.memfd_create(name) for name in ("out", "err")] for _ in range(n)]
    pids = [os.fork() or run_child(work, after, store, rank, n, outputs[rank]) for rank in range(n)]
    statuses, ending = {}, False
    try:
        meanwhile(pids[0])
        while len(statuses) < n:
            for pid in set(pids) - set(statuses):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            if any(statuses.values()) and not ending:
                time.sleep(0.1)  # as torchrun's, which looks ten times a second
                ending = [os.kill(pid, signal.SIGTERM) for pid in set(pids) - set(statuses)]
            time.sleep(0.005)
    finally:  # leave no child behind
        for pid in set(pids) - set(statuses):
            os.kill(pid, signal.SIGKILL)
    found = []
    for pid, fds in zip(pids, outputs):
        texts = []
        for fd in fds:
            os.lseek(fd, 0, os.SEEK_SET)
            with os.fdopen(fd, encoding="utf-8") as file:
                texts.append(file.read())
        err = [x for x in re.split(r"[\r\n]+", texts[1]) if x.strip() and not BAR.search(x)]
        found.append(SimpleNamespace(status=statuses[pid], out=texts[0], err="\n".join(err)))
    return found

def run_child(work, after, store, rank, n, outputs):
    """The child's part of `children`; it does not return."""
    status, sleep = 1, time.sleep
    signal.alarm(120)  # processes that wait for each other for ever are a failed test
    try:
        torch.set_num_threads(1)  # makes torch's pool again, before threads race to do it
        for fd, memory in enumerate(outputs, 1):
            os.dup2(memory, fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1) for fd in (1, 2))
        time.sleep = lambda seconds: sleep(seconds / 5)  # who fails after rank 0 waits for less
        if n > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                              LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
        work()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:  # what would be a stack trace
        print(f"Traceback {error!r}", file=sys.stderr)
    finally:
        sys.settrace(None)
        after()
        os._exit(status)

def metrics(folder):
    """The lines of metrics.jsonl without what the clock decides."""
    rows = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not TIMING.fullmatch(k)} for row in rows]

def checkpoints(folder):
    """Names of the checkpoints in a run folder, written or half written."""
    return sorted(p.name for p in Path(folder).glob("state*"))
