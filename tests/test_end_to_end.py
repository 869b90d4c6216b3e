"""The three scripts as a person runs them: one command after the other, on tiny models.

    python -m pytest tests/test_end_to_end.py
"""
import csv
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

import utils
from conftest import ROOT, STUDENT, TEACHER, finish, run_command

RUNS = ("baseline", "distilled", "teacher")
TABLES = ("comparison_report.txt", "comparison.json", "comparison_table.md", "comparison_table.tex",
          "per_class_accuracy.csv", "predictions.npz", "baseline_history.csv",
          "distilled_history.csv", "teacher_history.csv")
FIGURES = ("training_curves", "distillation_diagnostics", "accuracy_comparison",
           "reliability_diagram", "class_changes", "gallery", "confusion_matrix_baseline",
           "confusion_matrix_distilled", "confusion_matrix_teacher", "confusion_matrix_difference")


def run(script, *flags, status=0):
    """Run a script to its end; return what it printed, or its error where it should fail."""
    actual_status, out, err = finish(run_command([sys.executable, script, *flags]), 900)
    assert actual_status == status, out + err
    return out if status == 0 else err


def read_history(file):
    with open(file, encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_start_up_takes_little_longer_than_importing_the_packages(tmp_path):
    """Prints the seconds of each start, the fastest of three; see tests/README.md."""
    quick_flags = ["--quick", "--seed", "0", "--data-dir", tmp_path / "data", "--checkpoint-dir",
                   tmp_path / "c", "--results-dir", tmp_path / "r"]
    flags = [str(flag) for flag in quick_flags]
    until_first_step = ("import sys, config, train_baseline, utils; "
                        "utils.EpochMetrics.add = lambda *_, **__: sys.exit(); "
                        f"train_baseline.main(config.parse_args('baseline', '', {flags}))")
    starts = {
        "import torch, torchvision, timm": ["-c", "import torch, torchvision, timm"],
        "train_baseline.py --help": ["train_baseline.py", "--help"],
        "evaluate.py --help": ["evaluate.py", "--help"],
        "train_baseline.py --quick, until its first step": ["-c", until_first_step],
    }
    seconds = {name: [] for name in starts}
    for _ in range(3):
        for name, words in starts.items():
            begin = time.perf_counter()
            run(*words)
            seconds[name].append(time.perf_counter() - begin)

    print()
    for name, times in seconds.items():
        print(f"{min(times):6.1f} s  {name} (the first time {times[0]:.1f} s)")
    imports, *starts_of_scripts = [min(times) for times in seconds.values()]
    assert max(starts_of_scripts) < 2 * imports + 3
    assert not (tmp_path / "c" / "quick" / "baseline").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a comparison on Digits, eight epochs each, and what the scripts printed."""
    folder = tmp_path_factory.mktemp("end to end ü")
    places = ["--quick", "--checkpoint-dir", folder / "c", "--results-dir", folder / "r"]
    longer = ["--dataset-name", "Digits", "--seed", "42", "--num-epochs", "8",
              "--warmup-epochs", "1", "--batch-size", "16", *STUDENT]
    printed = {"nothing yet": run("evaluate.py", *places, status=1)}
    printed["baseline"] = run("train_baseline.py", *places, *longer)
    printed["distillation"] = run("train_distillation.py", *places, *longer, *TEACHER,
                                  "--teacher-epochs", "8")
    printed["evaluate"] = run("evaluate.py", *places)
    return folder, printed


@pytest.mark.slow
def test_scripts_say_what_comes_next(trained):
    folder, printed = trained
    assert "python train_baseline.py --quick" in printed["nothing yet"]
    assert "python train_distillation.py --quick" in printed["baseline"]
    assert "python evaluate.py --quick" in printed["distillation"]
    assert str(folder / "r" / "quick" / "comparison_report.txt") in printed["evaluate"]

    # The teacher is trained, then measured, then it teaches.
    out = printed["distillation"]
    teacher_trained = out.index("teacher epoch   8/8")
    teacher_measured = out.index("on validation images")
    assert teacher_trained < teacher_measured < out.index("distilled epoch   1/8")


@pytest.mark.slow
def test_every_file_is_there_and_no_other(trained):
    folder, _ = trained
    checkpoints = folder / "c" / "quick"
    found = {path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*.pth")}
    expected = {"best_model.pth"}
    for name in RUNS:
        expected |= {f"{name}/best_model.pth", f"{name}/last.pth"}
    assert found == expected

    results = folder / "r" / "quick"
    expected = set(TABLES)
    for name in FIGURES:
        expected |= {f"{name}.png", f"{name}.pdf"}
    assert {path.name for path in results.iterdir()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_numbers_of_a_run_agree_everywhere(trained, name):
    """Of models that have learned: predictions, JSON, report; history and checkpoint."""
    folder, _ = trained
    results = folder / "r" / "quick"
    saved = np.load(results / "predictions.npz")
    accuracy = (saved[name].argmax(1) == saved["labels"]).mean()
    assert accuracy > 0.8
    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    assert numbers["models"][name]["top1"] == accuracy
    report = (results / "comparison_report.txt").read_text(encoding="utf-8")
    assert f"{accuracy:.2%}" in report

    history = read_history(results / f"{name}_history.csv")
    info = torch.load(folder / "c" / "quick" / name / "best_model.pth", weights_only=True)
    assert len(history) == 8
    assert info["val_accuracy"] == max(float(row["val_accuracy"]) for row in history)
    assert info["val_accuracy"] == float(history[info["epoch"] - 1]["val_accuracy"])


@pytest.mark.slow
def test_gain_is_the_difference_of_the_accuracies(trained):
    folder, printed = trained
    saved = np.load(folder / "r" / "quick" / "predictions.npz")
    correct = {name: saved[name].argmax(1) == saved["labels"] for name in ("baseline", "distilled")}
    gain = 100 * (correct["distilled"].mean() - correct["baseline"].mean())
    assert f"{gain:+.2f}" in printed["evaluate"]


@pytest.mark.slow
def test_best_student_is_exported(trained):
    folder, _ = trained
    checkpoints = folder / "c" / "quick"
    accuracies = {}
    for name in ("baseline", "distilled"):
        info = torch.load(checkpoints / name / "best_model.pth", weights_only=True)
        accuracies[name] = info["val_accuracy"]
    best_path = checkpoints / "best_model.pth"
    best = torch.load(best_path, weights_only=True)
    assert best["run"] == max(accuracies, key=accuracies.get)

    timm_config = (checkpoints / "best_model" / "config.json").read_text(encoding="utf-8")
    assert json.loads(timm_config)["sha256"] == utils.sha256(best_path)


# All scripts in one process, which imports once.
WRONG_FLAG = """
import runpy, sys

sys.argv = ["x", "--checkpoint-dir", "c", "--results-dir", "r", "--data-dir", "d", "--no-such-flag"]
for script in ("train_baseline.py", "train_distillation.py", "evaluate.py"):
    try:
        runpy.run_path({root!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.slow
def test_wrong_use_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = WRONG_FLAG.format(root=str(ROOT))
    script = f"import os; os.chdir({os.fspath(tmp_path)!r})\n{script}"
    status, out, err = finish(run_command([sys.executable, "-c", script]))
    assert status == 0, err
    assert out.split() == ["2", "2", "2"]
    messages = err.splitlines()
    assert len(messages) == 3
    assert all("--no-such-flag" in message for message in messages)
    assert not list(tmp_path.iterdir())
