"""The three scripts as a person runs them: processes, from another folder's data, on tiny models.

    python -m pytest tests/test_end_to_end.py
"""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import torch

from conftest import ROOT, TINY

STUDENT = TINY[:2]


def run(script, *flags, code=0):
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_three_commands(tmp_path):
    """Digits, 14 epochs: the numbers are those of models that learned, every file is there and says the same."""
    place = ["--quick", "--checkpoint-dir", str(tmp_path / "with space ü" / "c"), "--results-dir", str(tmp_path / "with space ü" / "r")]
    assert "make it with: python train_baseline.py --quick" in run("evaluate.py", *place, code=1)
    run("train_baseline.py", *place, *STUDENT, "--num-epochs", "14", "--batch-size", "16")
    out = run("train_distillation.py", *place, *TINY, "--num-epochs", "14", "--teacher-epochs", "14", "--batch-size", "16")
    assert out.index("teacher epoch  14/14") < out.index("on validation images") < out.index("distilled epoch   1/14")
    report = run("evaluate.py", *place)

    checkpoints, results = tmp_path / "with space ü" / "c" / "quick", tmp_path / "with space ü" / "r" / "quick"
    assert {str(path.relative_to(checkpoints)).replace("\\", "/") for path in checkpoints.rglob("*.pth")} == {
        "best_model.pth", *(f"{run}/{name}.pth" for run in ("baseline", "teacher", "distilled") for name in ("best_model", "last"))}
    figures = ("training_curves", "distillation_diagnostics", "accuracy_comparison", "reliability_diagram", "class_changes", "gallery",
               "confusion_matrix_baseline", "confusion_matrix_distilled", "confusion_matrix_teacher")
    assert {path.name for path in results.iterdir()} == {
        "comparison_report.txt", "comparison.json", "predictions.npz", *(f"{run}_history.csv" for run in (
            "baseline", "teacher", "distilled")), *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf"))}
    assert (results / "comparison_report.txt").read_text(encoding="utf-8") in report

    numbers, saved = json.loads((results / "comparison.json").read_text(encoding="utf-8")), np.load(results / "predictions.npz")
    accuracies = {}
    for name in ("baseline", "distilled", "teacher"):
        accuracies[name] = (saved[name].argmax(1) == saved["labels"]).mean()
        assert accuracies[name] == numbers["models"][name]["top1"] > 0.8
        info = torch.load(checkpoints / name / "best_model.pth", weights_only=True)
        with open(results / f"{name}_history.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 14 and max(float(row["val_accuracy"]) for row in rows) == info["val_accuracy"]
        assert float(rows[int(info["epoch"]) - 1]["val_accuracy"]) == info["val_accuracy"]
        assert f"{accuracies[name]:.2%}" in report
    students = {name: torch.load(checkpoints / name / "best_model.pth", weights_only=True) for name in ("baseline", "distilled")}
    best = max(students.values(), key=lambda info: info["val_accuracy"])
    assert torch.load(checkpoints / "best_model.pth", weights_only=True)["run"] == best["run"]
    assert f"{100 * (accuracies['distilled'] - accuracies['baseline']):+.2f} points" in report


def test_wrong_use_writes_nothing(tmp_path):
    for script in ("train_baseline.py", "train_distillation.py", "evaluate.py"):
        message = run(script, "--checkpoint-dir", str(tmp_path / "c"), "--results-dir", str(tmp_path / "r"),
                      "--data-dir", str(tmp_path / "d"), "--no-such-flag", code=2)
        assert message.count("\n") == 1 and "--no-such-flag" in message
        assert "Traceback" not in message and not list(tmp_path.iterdir())
