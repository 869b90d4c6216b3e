"""All that waits for an NVIDIA GPU, in one command; its last lines are a table to paste.

    python tests/check_gpu.py           # some ten minutes on a card of 6 GB

Runs the tests marked cuda, which hold peak memory to its limits too, then
tests/benchmark_training.py at 224 px with and without --cuda-graph. What fails is said there too.
"""
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent


def ran(*command):
    """(whether it ended well, last line, whole output) of a Python command."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=TESTS.parent, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    print(done.stdout, flush=True)
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1], done.stdout


def main():
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no NVIDIA GPU here")
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
    lines = [f"{torch.cuda.get_device_name()}, {gigabytes:.0f} GB, torch {torch.__version__}, "
             f"{sys.platform}", "tests: " + ran("-m", "pytest", "tests", "-m", "cuda", "-q")[1]]
    for batch in (16, 128):
        for graph in ([], ["--cuda-graph"]):
            good, last, output = ran(TESTS / "benchmark_training.py", "--batch-size", batch, *graph)
            lines.append(f"batch {batch} {' '.join(graph)}".strip() + ("" if good else f": {last}"))
            lines += [line for line in output.splitlines() if line.startswith("|")]
    print("\n".join(["", "To paste:", "", *lines]))


if __name__ == "__main__":
    main()
