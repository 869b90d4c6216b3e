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

import utils
from conftest import ROOT, STUDENT, TEACHER

FIGURES = ("training_curves", "distillation_diagnostics", "accuracy_comparison",
           "reliability_diagram", "class_changes", "gallery", "confusion_matrix_baseline",
           "confusion_matrix_distilled", "confusion_matrix_teacher")
RUNS = ("baseline", "distilled", "teacher")


def run(script, *flags, code=0):
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=ROOT, capture_output=True,
                          text=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_three_commands(tmp_path):
    """Digits, 8 epochs: numbers of models that learned, every file is there and says the same."""
    folder = tmp_path / "with space ü"
    place = ["--quick", "--checkpoint-dir", folder / "c", "--results-dir", folder / "r"]
    message = run("evaluate.py", *place, code=1)
    assert "make it with: python train_baseline.py --quick" in message
    long = ["--num-epochs", "8", "--batch-size", "16", *STUDENT]
    run("train_baseline.py", *place, *long)
    out = run("train_distillation.py", *place, *long, *TEACHER, "--teacher-epochs", "8")
    steps = [out.index(text) for text in ("teacher epoch   8/8", "on validation images",
                                          "distilled epoch   1/8")]
    assert steps == sorted(steps)
    report = run("evaluate.py", *place)

    checkpoints, results = folder / "c" / "quick", folder / "r" / "quick"
    found = {path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*.pth")}
    kept = {f"{name}/{file}.pth" for name in RUNS for file in ("best_model", "last")}
    assert found == {"best_model.pth", *kept}
    assert {path.name for path in results.iterdir()} == {
        "comparison_report.txt", "comparison.json", "predictions.npz",
        *(f"{name}_history.csv" for name in RUNS),
        *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf"))}
    whole = (results / "comparison_report.txt").read_text(encoding="utf-8")
    assert whole.partition("Details")[0] in report and "Scores" in whole
    last = report.strip().splitlines()[-2:]
    assert str(results / "comparison_report.txt") in last[0] and "train_baseline.py" in last[1]

    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    saved = np.load(results / "predictions.npz")
    accuracies = {}
    for name in RUNS:
        accuracies[name] = (saved[name].argmax(1) == saved["labels"]).mean()
        assert accuracies[name] == numbers["models"][name]["top1"] > 0.8
        info = torch.load(checkpoints / name / "best_model.pth", weights_only=True)
        with open(results / f"{name}_history.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        best = max(float(row["val_accuracy"]) for row in rows)
        assert len(rows) == 8 and best == info["val_accuracy"]
        assert float(rows[int(info["epoch"]) - 1]["val_accuracy"]) == best
        assert f"{accuracies[name]:.2%}" in whole
    students = [torch.load(checkpoints / name / "best_model.pth", weights_only=True)
                for name in RUNS[:2]]
    best = max(students, key=lambda info: info["val_accuracy"])
    chosen = torch.load(checkpoints / "best_model.pth", weights_only=True)
    assert chosen["run"] == best["run"]
    timms = json.loads((checkpoints / "best_model" / "config.json").read_text(encoding="utf-8"))
    assert timms["sha256"] == utils.sha256(checkpoints / "best_model.pth")
    assert f"{100 * (accuracies['distilled'] - accuracies['baseline']):+.2f} points" in report


def test_wrong_use_writes_nothing(tmp_path):
    """All scripts in one process, which imports once."""
    code = f"""
import runpy, sys
sys.argv = ["x", "--checkpoint-dir", "c", "--results-dir", "r", "--data-dir", "d", "--no-such-flag"]
for script in ("train_baseline.py", "train_distillation.py", "evaluate.py"):
    try:
        runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["2", "2", "2"] and "Traceback" not in done.stderr
    assert [("--no-such-flag" in line) for line in done.stderr.splitlines()] == [True] * 3
    assert not list(tmp_path.iterdir())
