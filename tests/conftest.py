"""Shared by all tests: the project on the path, one torch thread, small datasets and models.

    python -m pytest tests
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
import train_baseline  # noqa: E402
import train_distillation  # noqa: E402
import utils  # noqa: E402

STUDENT, TEACHER = ["--student-model", "test_efficientnet"], ["--teacher-model", "test_resnet"]
SCRIPTS = {"baseline": "train_baseline.py", "distillation": "train_distillation.py",
           "evaluate": "evaluate.py"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def handlers_stay():
    """A script in this process ends it at Ctrl-C; afterwards pytest answers again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def flags_of(script, folder):
    """--quick on tiny models in float32, its weights not averaged, all folders below `folder`."""
    flags = ["--quick", "--checkpoint-dir", folder / "checkpoints", "--results-dir",
             folder / "results", "--data-dir", folder / "data", "--device", "cpu"]
    if script != "evaluate":
        flags += [*STUDENT, "--ema-decay", "0"]
    if script == "distillation":
        flags += [*TEACHER, "--alpha", "0.7"]
    return [str(flag) for flag in flags]


@pytest.fixture
def arguments(tmp_path):
    """A function that parses flags for a script, with all folders below a temporary one."""
    def parse(script, *flags):
        args = config.parse_args(script, "", [*flags_of(script, tmp_path), *map(str, flags)])
        if script != "evaluate" and args.amp_dtype == "auto":
            args.amp_dtype = "fp32"
        return args
    return parse


@pytest.fixture
def train(arguments, monkeypatch):
    """A function that trains as a script does, two short epochs; it returns the folder."""
    monkeypatch.setattr("models.min_teacher_accuracy", lambda classes: 0.0)  # two epochs teach little
    mains = {"baseline": train_baseline.main, "distillation": train_distillation.main}

    def call(script, *flags):
        few = ["--num-epochs", "2", "--batch-size", "128"]
        if script == "distillation":
            few += ["--teacher-epochs", "2"]
        args = arguments(script, *few, *flags)
        mains[script](args)
        return Path(args.checkpoint_dir)
    return call


def start(script, folder, *flags, own_group=False):
    """A script as a process of its own, on tiny models below `folder`."""
    command = [sys.executable, ROOT / SCRIPTS[script], *flags_of(script, folder), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, encoding="utf-8", start_new_session=own_group,
                            env={**os.environ, "PYTHONUTF8": "1"})


def ended(process, seconds=300):
    """(exit status, stdout, stderr) of a process, which has met no traceback."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def children_of(process):
    """Numbers of the processes that `process` has started, in their order."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,stat="], capture_output=True,
                            text=True).stdout.split()
    rows = list(zip(listed[::3], listed[1::3], listed[2::3], strict=True))
    return sorted(int(pid) for pid, parent, state in rows
                  if int(parent) == process.pid and not state.startswith("Z"))


def wait_for(condition, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def weights(folder):
    return torch.load(folder / "best_model.pth", weights_only=True)["state_dict"]


def save_best(target, model, info, val_accuracy=0.5):
    """A best_model.pth as a run writes it."""
    utils.save_checkpoint({**info, "state_dict": model.state_dict(), "epoch": 1,
                     "val_accuracy": val_accuracy}, target)


def assert_equal_weights(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def untimed(history):
    """Rows of a history without what a clock measured."""
    timed = ("seconds", "images_per_second")
    return [{name: value for name, value in row.items() if name not in timed} for row in history]


def result(folder):
    """All that a run came to: its best weights, its last states, its history but for timings."""
    last = utils.load_checkpoint(folder / "last.pth")
    return weights(folder), last["states"], untimed(last["history"])


def assert_same_result(one, two):
    assert_equal_weights(one[0], two[0])
    assert_equal_weights(one[1]["model"], two[1]["model"])
    assert one[2] == two[2]


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
