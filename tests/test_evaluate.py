"""Numbers of the comparison against scikit-learn, and what evaluate.py says where something is missing.

    python -m pytest tests/test_evaluate.py
"""
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
import timm
import torch

import data_loader
import evaluate
import models
import train_baseline
import train_distillation
import utils
from conftest import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished pair on digits, evaluated once."""
    folder = tmp_path_factory.mktemp("trained")
    common = ["x", "--quick", "--device", "cpu", "--checkpoint-dir", str(folder / "c"), "--results-dir", str(folder / "r")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "least_accuracy", lambda classes: 0.0)
        patch.setattr("sys.argv", [*common, *TINY[:2], *TINY[4:], "--num-epochs", "4"])
        train_baseline.main()
        patch.setattr("sys.argv", [*common, *TINY, "--num-epochs", "4", "--teacher-epochs", "3"])
        train_distillation.main()
        patch.setattr("sys.argv", common)
        evaluate.main()
    return folder


def run_again(folder, target, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--device", "cpu", "--checkpoint-dir", str(folder / "c"),
                                     "--results-dir", str(target), *flags])
    evaluate.main()
    return target / "quick"


def test_numbers_agree_with_an_independent_reading_of_the_checkpoints(trained):
    """timm and scikit-learn alone, from the checkpoint's own preprocessing to every score."""
    results = trained / "r" / "quick"
    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    saved = np.load(results / "predictions.npz")
    assert set(saved) == {"labels", "class_names", "baseline", "distilled", "teacher"}
    test, names = data_loader.open_test("Digits", None)
    assert np.array_equal(saved["labels"], test.labels.numpy()) and saved["class_names"].tolist() == names
    for run in ("baseline", "distilled", "teacher"):
        path = trained / "c" / "quick" / run / "best_model.pth"
        checkpoint = torch.load(path, weights_only=True)
        model = timm.create_model(checkpoint["model_name"], num_classes=10)
        model.load_state_dict(checkpoint["state_dict"])
        transform = data_loader.build_transform(checkpoint)
        images = torch.stack([transform(data_loader.Image.fromarray(image.permute(1, 2, 0).numpy())) for image in test.pixels])
        with torch.inference_mode():
            probabilities = model.eval()(images).softmax(1).numpy()
        assert saved[run].dtype == np.float32 and saved[run].shape == (360, 10)
        np.testing.assert_allclose(saved[run], probabilities, atol=0.05)  # resized on bytes there, on floats here
        predictions, labels, scores = saved[run].argmax(1), test.labels.numpy(), numbers["models"][run]
        assert scores["top1"] == pytest.approx((predictions == labels).mean())
        assert scores["top5"] == pytest.approx(np.mean([label in row.argsort()[-5:] for row, label in zip(saved[run], labels)]))
        assert scores["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"))
        assert scores["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, saved[run].astype(float)), rel=1e-5)
        recall = sklearn.metrics.recall_score(labels, predictions, average=None)
        assert list(scores["per_class_accuracy"].values()) == pytest.approx(recall.tolist())
        assert scores["parameters"] == sum(p.numel() for p in model.parameters())
        assert scores["val_accuracy"] == checkpoint["val_accuracy"]
        assert numbers["timings"]["latency_ms"][run] > 0 and numbers["timings"]["throughput"][run] > 0
        assert numbers["timings"]["training_hours"][run] > 0


def test_report_and_figures(trained):
    results = trained / "r" / "quick"
    report = (results / "comparison_report.txt").read_text(encoding="utf-8")
    assert max(map(len, report.splitlines())) <= 100
    assert "test_efficientnet alone against test_efficientnet taught by test_resnet" in report
    assert "360 test images of 10 classes" in report and "the teacher's" in report
    for name in ("training_curves", "accuracy_comparison", "confusion_matrix_baseline", "confusion_matrix_distilled"):
        with data_loader.Image.open(results / f"{name}.png") as image:
            assert round(image.info["dpi"][0]) == 200 and image.width > 800
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (trained / "c" / "quick" / "best_model.pth").is_file()


@pytest.mark.parametrize("run, command", [("baseline", "python train_baseline.py --quick"),
                                          ("distilled", "python train_distillation.py --quick")])
def test_missing_checkpoint_names_the_command(trained, tmp_path, monkeypatch, run, command):
    shutil.copytree(trained / "c", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "quick" / run)
    with pytest.raises(utils.UserError, match=command):
        run_again(tmp_path, tmp_path / "r", monkeypatch)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("fault, words", [("gone", "is gone"), ("other", "SHA-256"), ("none", None)])
def test_teacher_that_is_gone_or_another_is_left_out(trained, tmp_path, monkeypatch, fault, words):
    """The teacher is found by the path recorded when it taught, and held to its SHA-256."""
    teacher = trained / "c" / "quick" / "teacher" / "best_model.pth"
    content = teacher.read_bytes()
    try:
        if fault == "gone":
            teacher.unlink()
        elif fault == "other":
            teacher.write_bytes(content + b"x")
        results = run_again(trained, tmp_path / "r", monkeypatch)
    finally:
        teacher.write_bytes(content)
    report = (results / "comparison_report.txt").read_text(encoding="utf-8")
    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    assert ("teacher" in numbers["models"]) == (fault == "none") == ("WARNING: No column for the teacher" not in report)
    assert words is None or words in report.replace("\n", " ")


def change(folder, run, **values):
    path = folder / "c" / "quick" / run / "best_model.pth"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, **values, "config": {**checkpoint["config"], **values.get("config", {})}}, path)


def test_unfair_pair_is_named(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "c", tmp_path / "c")
    change(tmp_path, "distilled", config={"learning_rate": 0.123}, split_fingerprint="other")
    results = run_again(tmp_path, tmp_path / "r", monkeypatch)
    head = (results / "comparison_report.txt").read_text(encoding="utf-8").replace("\n", " ")
    assert "The pair is not fair" in head and "learning_rate (0.004 and 0.123); the validation split" in head


def test_fair_pair_is_not_blamed(trained):
    assert "not fair" not in (trained / "r" / "quick" / "comparison_report.txt").read_text(encoding="utf-8")


def test_other_classes_cannot_be_compared(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "c", tmp_path / "c")
    change(tmp_path, "distilled", class_names=list("abcdefghij"))
    with pytest.raises(utils.UserError, match="other classes"):
        run_again(tmp_path, tmp_path / "r", monkeypatch)


def test_checkpoints_from_elsewhere(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth", tmp_path / "theirs.pth")
    results = run_again(trained, tmp_path / "r", monkeypatch, "--baseline-checkpoint", str(tmp_path / "theirs.pth"))
    assert "not known" in (results / "comparison_report.txt").read_text(encoding="utf-8")  # nobody has its history


def test_similar_classes_stand_together():
    """Four groups of six classes, confused within, shuffled: the order brings each group together."""
    order = np.random.default_rng(0).permutation(24)
    confusion = np.kron(np.eye(4), np.full((6, 6), 0.1)) + np.eye(24)
    found = order[evaluate.similarity_order(confusion[np.ix_(order, order)])] // 6
    assert (np.diff(found) != 0).sum() == 3
