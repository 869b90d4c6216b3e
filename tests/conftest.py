"""Shared by all tests: the project's folder on the path, one torch thread, small datasets with the real layouts.

    python -m pytest
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start; two threads on busy cores crawl
torch.set_num_threads(1)

import utils  # noqa: E402

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


TINY = ["--student-model", "test_efficientnet", "--teacher-model", "test_resnet", "--image-size", "32"]


@pytest.fixture
def arguments(tmp_path):
    """A function that parses flags for a script, with all folders below a temporary one."""
    def parse(script, *flags):
        folders = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--results-dir", str(tmp_path / "results"),
                   "--data-dir", str(tmp_path / "data"), "--device", "cpu"]
        tiny = TINY if script == "distillation" else TINY[:2] + TINY[4:] if script == "baseline" else []
        args = utils.parse_args(script, "", ["--quick", *folders, *tiny, *flags])
        if script != "evaluate":
            args.amp_dtype = "fp32"
        return args
    return parse


@pytest.fixture(autouse=True)
def no_pending_signal(monkeypatch):
    monkeypatch.setattr(utils, "_signal_code", None)
    monkeypatch.setattr(utils, "_can_save", False)


def write_pictures(folder, classes=("cat", "dog", "eel"), counts=(("train", 8), ("test", 3)), sizes=((40, 60), (70, 50))):
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
