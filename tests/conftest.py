"""Shared by all tests: the project on the path, one torch thread, tiny models and datasets.

    python -m pytest tests                   # everything
    python -m pytest tests -m "not slow"     # without kills, full disks, torchrun, whole scripts
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start; two on busy cores crawl
torch.set_num_threads(1)

import config  # noqa: E402
import data_loader  # noqa: E402
import train_baseline  # noqa: E402
import train_distillation  # noqa: E402
import utils  # noqa: E402

STUDENT = ["--student-model", "test_efficientnet"]
TEACHER = ["--teacher-model", "test_resnet"]
SCRIPTS = {"baseline": "train_baseline.py", "distillation": "train_distillation.py",
           "evaluate": "evaluate.py"}
TIMINGS = ("seconds", "images_per_second")  # columns of the history that no two runs share


# Markers ------------------------------------------------------------------------------------------

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# Training in this process -------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def restore_process_state():
    """utils.run_script sets signal handlers, and a Run leaves its progress there."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    utils.Run.resume_point = ""
    utils.Run.saved_names.clear()


def small_flags(script, folder, *flags):
    """`flags` after those of a short run: --quick with tiny models on digits, one seed, float32,
    no EMA, and all folders below `folder`."""
    given = [str(flag) for flag in flags]
    flags = ["--quick", "--device", "cpu"]
    flags += ["--checkpoint-dir", folder / "checkpoints"]
    flags += ["--results-dir", folder / "results"]
    flags += ["--data-dir", folder / "data"]
    if script != "evaluate":
        flags += [*STUDENT, "--dataset-name", "Digits", "--ema-decay", "0", "--warmup-epochs", "1"]
        if not {"--seed", "--seeds"} & set(given):
            flags += ["--seed", "42"]
    if script == "distillation":
        flags += [*TEACHER, "--alpha", "0.7"]
    return [*map(str, flags), *given]


@pytest.fixture
def arguments(tmp_path):
    """A function that parses flags for a script, with all folders below a temporary one."""
    def parse(script, *flags):
        args = config.parse_args(script, "", small_flags(script, tmp_path, *flags))
        if script != "evaluate":  # as utils.setup would choose on a CPU, and tests on a GPU want it
            args.cuda_graph = "--cuda-graph" in flags
            if args.amp_dtype == "auto":
                args.amp_dtype = "fp32"
        return args
    return parse


@pytest.fixture
def few_images(monkeypatch):
    """128 training images and 32 validation images at most, of any dataset: a moment's epoch."""
    open_dataset = data_loader.open_dataset

    def open_few(args):
        data = open_dataset(args)
        train = data.train.select(range(min(128, len(data.train.labels))))
        val = data.val.select(range(min(32, len(data.val.labels))))
        return data._replace(train=train, val=val)

    monkeypatch.setattr(data_loader, "open_dataset", open_few)


@pytest.fixture
def train(arguments, few_images, monkeypatch):
    """A function that trains as a script does, two epochs of four steps; it returns the checkpoint
    folder."""
    monkeypatch.setattr("models.min_useful_accuracy", lambda chance: 0.0)
    mains = {"baseline": train_baseline.main, "distillation": train_distillation.main}

    def call(script, *flags):
        short = ["--num-epochs", "2", "--batch-size", "32"]
        if script == "distillation":
            short += ["--teacher-epochs", "2"]
        args = arguments(script, *short, *flags)
        mains[script](args)
        return Path(args.checkpoint_dir)
    return call


# Scripts as processes -----------------------------------------------------------------------------

def run_command(command, own_session=False):
    """Start a process with pipes for its output, in the project's folder."""
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8",
                            start_new_session=own_session, env={**os.environ, "PYTHONUTF8": "1"})


def start(script, folder, *flags):
    """Start a script on tiny models, with all folders below `folder`."""
    return run_command([sys.executable, ROOT / SCRIPTS[script],
                        *small_flags(script, folder, *flags)])


def finish(process, seconds=300):
    """Wait for a process; return (exit status, stdout, stderr). It must show no traceback."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def assert_one_message(err, *words):
    """Standard error holds a single line, with each of `words` in it."""
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def live_processes():
    """(process, parent, group) numbers of all processes but those that have ended (zombies)."""
    columns = ["ps", "-e", "-o", "pid=,ppid=,pgid=,stat="]
    rows = []
    for line in subprocess.run(columns, capture_output=True, text=True).stdout.splitlines():
        process, parent, group, state = line.split()
        if not state.startswith("Z"):
            rows.append((int(process), int(parent), int(group)))
    return rows


def children_of(process):
    """Numbers of the processes that `process` has started, in their order."""
    return sorted(number for number, parent, _ in live_processes() if parent == process.pid)


def members_of_group(group):
    """Numbers of the processes in a process group: one that was started with own_session=True, and
    all that it has started in turn."""
    return [number for number, _, group_of_it in live_processes() if group_of_it == group]


def wait_until(condition, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


# What a run has written ---------------------------------------------------------------------------

def quick_folder(folder, run="baseline"):
    """Where a script started with `small_flags(script, folder)` saves the run."""
    return folder / "checkpoints" / "quick" / run


def has_epoch(run_folder):
    """Whether a run has saved an epoch."""
    last_path = run_folder / "last.pth"
    return last_path.exists() and len(utils.load_checkpoint(last_path)["history"]) > 0


def history_of(run_folder):
    return utils.load_checkpoint(run_folder / "last.pth")["history"]


def best_weights(run_folder):
    return torch.load(run_folder / "best_model.pth", weights_only=True)["state_dict"]


def save_best(target, model, info, val_accuracy=0.5):
    """A best_model.pth as a run writes it."""
    utils.save_checkpoint({**info, "state_dict": model.state_dict(), "epoch": 1,
                           "val_accuracy": val_accuracy}, target)


def without_timings(history):
    rows = []
    for row in history:
        rows.append({name: number for name, number in row.items() if name not in TIMINGS})
    return rows


def outcome(run_folder):
    """All that a run came to: its best weights, its last states, its history without timings."""
    last = utils.load_checkpoint(run_folder / "last.pth")
    return {"best": best_weights(run_folder), "states": last["states"],
            "history": without_timings(last["history"])}


def assert_equal_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_same_outcome(one, two):
    assert_equal_weights(one["best"], two["best"])
    assert_equal_weights(one["states"]["model"], two["states"]["model"])
    assert one["history"] == two["history"]


# Datasets -----------------------------------------------------------------------------------------

def write_pictures(folder, classes=("cat", "dog", "eel"), counts=(("train", 8), ("test", 3)),
                   sizes=((40, 60), (70, 50))):
    """An image-folder dataset of coloured noise, pictures of several sizes; a class is a tint."""
    random = np.random.default_rng(0)
    for part, count in counts:
        for c, name in enumerate(classes):
            for i in range(count):
                height, width = sizes[i % len(sizes)]
                pixels = random.integers(0, 200, (height, width, 3), dtype=np.uint8)
                pixels[..., c % 3] |= 55 + 128 * (c % 2)
                file = Path(folder, part, name, f"{i:03d}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    return Path(folder)
