"""Numbers of the comparison against independent references, and what evaluate.py does with pairs of
checkpoints that lack something.

    python -m pytest tests/test_evaluate.py                  # all
    python -m pytest tests/test_evaluate.py -m "not slow"    # without figures and simulations
"""
import csv
import io
import json
import math
import shutil
import time
import tracemalloc
import types
import warnings

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import timm
import torch
from PIL import Image

import config
import data_loader
import evaluate
import models
import train_baseline
import train_distillation
import utils
from conftest import ROOT, STUDENT, TEACHER

ROLES = ("baseline", "distilled", "teacher")
FIGURES = ("training_curves", "distillation_diagnostics", "accuracy_comparison",
           "reliability_diagram", "class_changes", "gallery", "confusion_matrix_baseline",
           "confusion_matrix_distilled", "confusion_matrix_teacher", "confusion_matrix_difference")


def folder_flags(folder, results=None):
    results = results or folder / "r"
    return ["--device", "cpu", "--data-dir", str(folder / "data"), "--checkpoint-dir",
            str(folder / "c"), "--results-dir", str(results)]


def run_evaluate(folder, *flags, results=None, figures=False, timing=False):
    """Evaluate the pair in `folder`; returns the folder of results."""
    results = results or folder / "r"
    argv = [*folder_flags(folder, results), *map(str, flags)]
    if not timing:
        argv.append("--no-timing")
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(evaluate, "write_figures", lambda *_: None)
        evaluate.main(config.parse_args("evaluate", "", argv))
    return results


def read_numbers(results):
    return json.loads((results / "comparison.json").read_text(encoding="utf-8"))


def read_report(results):
    """The report in one line, so that a line break splits no phrase."""
    text = (results / "comparison_report.txt").read_text(encoding="utf-8")
    return " ".join(text.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished pair on digits, evaluated once, without figures."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*folder_flags(folder), *STUDENT, "--dataset-name", "Digits", "--image-size", "32",
              "--no-pretrained", "--batch-size", "64", "--learning-rate", "3e-3",
              "--ema-decay", "0.95", "--num-epochs", "4"]
    train_baseline.main(config.parse_args("baseline", "", common))
    with pytest.MonkeyPatch.context() as patch:
        # Four epochs teach the teacher little.
        patch.setattr(models, "min_useful_accuracy", lambda chance: 0.0)
        teacher = [*TEACHER, "--teacher-epochs", "3", "--teacher-learning-rate", "3e-3"]
        train_distillation.main(config.parse_args("distillation", "", [*common, *teacher]))
    run_evaluate(folder)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the pair that a test may spoil."""
    shutil.copytree(trained / "c", tmp_path / "c")
    return tmp_path


def checkpoint_path(folder, run):
    return folder / "c" / run / "best_model.pth"


def change_checkpoint(folder, run, config=None, **values):
    """Change what a checkpoint records; `config` are settings of its training."""
    path = checkpoint_path(folder, run)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint |= values
    checkpoint["config"] |= config or {}
    torch.save(checkpoint, path)


# The scores of trained checkpoints ----------------------------------------------------------------

@pytest.mark.parametrize("role", ROLES)
def test_numbers_agree_with_an_independent_reading_of_the_checkpoints(trained, role):
    """timm and scikit-learn alone, from the checkpoint's own preprocessing to every score."""
    numbers = read_numbers(trained / "r")
    saved = np.load(trained / "r" / "predictions.npz")
    assert set(saved) == {"labels", "class_names", *ROLES}
    test, class_names = data_loader.load_split("Digits", "test", None)
    labels = test.labels.numpy()
    assert np.array_equal(saved["labels"], labels)
    assert saved["class_names"].tolist() == class_names

    path = checkpoint_path(trained, role)
    checkpoint = torch.load(path, weights_only=True)
    model = timm.create_model(checkpoint["model_name"], num_classes=10)
    model.load_state_dict(checkpoint["state_dict"])
    transform = data_loader.build_transform(checkpoint)
    images = [transform(data_loader.load_image(test, i)) for i in range(len(labels))]
    with torch.inference_mode():
        probabilities = model.eval()(torch.stack(images)).softmax(1).numpy()
    assert saved[role].dtype == np.float32
    # Resized on bytes there, on floats here.
    np.testing.assert_allclose(saved[role], probabilities, atol=0.05)

    scores = numbers["models"][role]
    assert_scores_are_scikit_learns(saved[role], labels, scores)
    assert scores["val_accuracy"] == checkpoint["val_accuracy"]
    assert scores["epochs"] == [checkpoint["epoch"]]
    assert scores["calibration_scaled"]["temperature"] > 0

    history = utils.load_checkpoint(path.with_name("last.pth"))["history"]
    hours = sum(row["seconds"] for row in history) / 3600
    assert numbers["timings"]["training_hours"][role] == pytest.approx(hours)

    cost = numbers["inference"][role]
    assert cost["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert cost["macs"] == macs_by_hooks(model, checkpoint["image_size"])
    assert cost["file_size_mb"] == pytest.approx(path.stat().st_size / 2**20)


def assert_scores_are_scikit_learns(probabilities, labels, scores):
    predictions = probabilities.argmax(1)
    normalised = probabilities.astype(float)
    normalised /= normalised.sum(1, keepdims=True)
    top5 = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=5)
    recall = sklearn.metrics.recall_score(labels, predictions, average=None)
    macro_f1 = sklearn.metrics.f1_score(labels, predictions, average="macro")
    nll = sklearn.metrics.log_loss(labels, normalised)
    assert scores["top1"] == pytest.approx((predictions == labels).mean())
    assert scores["top5"] == pytest.approx(top5)
    assert scores["macro_f1"] == pytest.approx(macro_f1)
    assert scores["calibration"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert list(scores["per_class_accuracy"].values()) == pytest.approx(recall.tolist())


def macs_by_hooks(model, size):
    """Multiply-accumulates of one image: outputs of each convolution and linear layer, times the
    weights that make one output."""
    macs = []

    def count(module, _, output):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            macs.append(output.numel() * module.weight[0].numel())

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(macs)


def test_temperature_is_fitted_on_the_validation_images(trained):
    """On the split that the students were not trained on."""
    argv = [*folder_flags(trained), *STUDENT, "--dataset-name", "Digits", "--no-pretrained"]
    val = data_loader.open_dataset(config.parse_args("baseline", "", argv)).val
    model, info = models.load_model(checkpoint_path(trained, "distilled"))
    args = config.parse_args("evaluate", "", folder_flags(trained))
    loader = data_loader.EvaluationLoader(val, info, args, torch.device("cpu"))
    logits, labels = models.infer(model, loader)
    expected = evaluate.best_temperature(logits.double().log_softmax(1).numpy(), labels.numpy())
    scaled = read_numbers(trained / "r")["models"]["distilled"]["calibration_scaled"]
    assert scaled["temperature"] == pytest.approx(expected, rel=1e-4)


def test_no_temperature_for_a_model_of_another_split(copied):
    """It was trained on some of the validation images, on which it is too sure."""
    change_checkpoint(copied, "baseline", split_fingerprint="other")
    scores = read_numbers(run_evaluate(copied))["models"]
    assert "calibration_scaled" not in scores["baseline"]
    assert "calibration_scaled" in scores["distilled"]


def test_report_names_models_dataset_and_best_student(trained):
    lines = (trained / "r" / "comparison_report.txt").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 100
    heading = " ".join(lines[:3])
    for word in ("test_efficientnet", "test_resnet", "Digits", "360", "seed 42"):
        assert word in heading
    assert lines.index("Details") > 5  # the verdict comes first
    assert not any(line.startswith("WARNING: This is not a fair pair") for line in lines)
    assert (trained / "c" / "best_model.pth").is_file()


@pytest.mark.slow
def test_figures_are_written_and_a_second_run_writes_the_same_files(trained, tmp_path):
    first = run_evaluate(trained, results=tmp_path / "1", figures=True)
    second = run_evaluate(trained, results=tmp_path / "2", figures=True)
    for name in FIGURES:
        with data_loader.Image.open(first / f"{name}.png") as image:
            assert round(image.info["dpi"][0]) == 200
            assert image.width > 800
        assert (first / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_teachers_figure_goes_when_the_teacher_is_gone(copied):
    results = run_evaluate(copied, figures=True)
    assert (results / "confusion_matrix_teacher.png").is_file()
    change_checkpoint(copied, "distilled", teacher=None)
    run_evaluate(copied, figures=True)
    assert not list(results.glob("confusion_matrix_teacher.*"))
    assert (results / "confusion_matrix_baseline.png").is_file()


def test_folder_of_someone_else_is_evaluated_all_the_same(copied, monkeypatch, capsys):
    """Where nothing may be written beside the checkpoints."""
    def refuse(folder, info):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(models, "export_best_student", refuse)
    run_evaluate(copied)
    out = capsys.readouterr().out
    assert "warning" in out and "Permission denied" in out
    assert "Report:" in out


def test_wrong_checkpoint_folder_is_said(tmp_path):
    with pytest.raises(utils.UserError, match="no folder .*--checkpoint-dir"):
        run_evaluate(tmp_path)


def test_damaged_history_costs_only_its_curves(copied, capsys):
    checkpoint_path(copied, "baseline").with_name("last.pth").write_bytes(b"damaged")
    numbers = read_numbers(run_evaluate(copied))
    assert "warning" in capsys.readouterr().out
    assert numbers["timings"]["training_hours"]["baseline"] is None
    assert numbers["timings"]["training_hours"]["distilled"] > 0


@pytest.mark.slow
def test_a_figure_that_fails_costs_no_number(copied, monkeypatch):
    monkeypatch.setattr(evaluate, "plot_training_curves", lambda trained: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_evaluate(copied, figures=True)
    for name in ("comparison_report.txt", "comparison.json", "predictions.npz"):
        assert (copied / "r" / name).is_file()
    assert (copied / "c" / "best_model.pth").is_file()


# What a pair may lack -----------------------------------------------------------------------------

@pytest.mark.parametrize("role, script", [("baseline", "train_baseline.py"),
                                          ("distilled", "train_distillation.py")])
def test_missing_checkpoint_names_the_command(copied, role, script):
    """With the settings of the other student, so that it makes a fair pair, and these folders."""
    shutil.rmtree(copied / "c" / role)
    with pytest.raises(utils.UserError) as error:
        run_evaluate(copied)
    command = str(error.value).partition("make it with: ")[2]
    assert command.startswith(f"python {script} ")
    assert f"--checkpoint-dir {copied / 'c'} --results-dir {copied / 'r'}" in command
    assert f"--student-model {STUDENT[1]}" in command and "--num-epochs 4" in command
    if role == "baseline":
        assert "--teacher" not in command
    assert not (copied / "r").exists()


def test_missing_checkpoints_of_a_new_project_name_the_first_command(tmp_path):
    with pytest.raises(utils.UserError, match="python train_baseline.py"):
        run_evaluate(tmp_path)


def test_seeds_of_one_role_alone_name_the_command_for_the_other(trained, tmp_path):
    for seed in (0, 4):
        target = tmp_path / "c" / "baseline" / f"seed_{seed}"
        shutil.copytree(trained / "c" / "baseline", target)
        change_checkpoint(tmp_path, f"baseline/seed_{seed}", config={"argv": ["--seeds", "4"]})
    # A run without --seeds stands beside them.
    shutil.copy(checkpoint_path(trained, "baseline"), tmp_path / "c" / "baseline")
    change_checkpoint(tmp_path, "baseline", config={"argv": ["--seed", "9"]})
    with pytest.raises(utils.UserError, match="python train_distillation.py --seeds 0 4 "):
        run_evaluate(tmp_path)


@pytest.mark.parametrize("role, other", [("baseline", "distilled"), ("distilled", "baseline")])
def test_the_same_checkpoint_twice_is_no_comparison(copied, role, other):
    with pytest.raises(utils.UserError, match="the same checkpoint"):
        run_evaluate(copied, f"--{role}-checkpoint", checkpoint_path(copied, other))


def test_last_pth_is_no_model(copied):
    last_path = checkpoint_path(copied, "baseline").with_name("last.pth")
    with pytest.raises(utils.UserError, match="last.pth"):
        run_evaluate(copied, "--baseline-checkpoint", last_path)


@pytest.mark.slow
def test_test_images_that_were_trained_on_are_named(copied, monkeypatch):
    load_split = data_loader.load_split

    def leaky(name, part, args, value_range=None):
        images, names = load_split(name, part, args)
        if part == "test":
            training_images, _ = load_split(name, "train", args)
            pixels = torch.cat([training_images.pixels[:6], images.pixels[6:]])
            images = images._replace(pixels=pixels)
        return images, names

    monkeypatch.setattr(data_loader, "load_split", leaky)
    results = run_evaluate(copied)
    names = [f"number {i}" for i in range(6)]
    assert read_numbers(results)["notes"]["trained_on"] == names
    report = read_report(results)
    assert "WARNING: 6 of the test images" in report
    assert names[4] in report and names[5] not in report


@pytest.mark.slow
@pytest.mark.parametrize("fault, found, word", [
    ("gone", False, "is gone"), ("other", False, "SHA-256"), ("moved", True, ""),
    ("moved aside", True, ""),
    ("emptied folder", True, ""), ("none", True, "")])
def test_teacher_that_is_gone_or_another_is_left_out(copied, fault, found, word):
    """The teacher is found by the path recorded when it taught, and checked by its SHA-256."""
    teacher = checkpoint_path(copied, "teacher")
    recorded = copied / "where it was" / "best_model.pth" if fault == "moved" else teacher
    if fault == "emptied folder":
        recorded = copied / "timm"
        recorded.mkdir()
        (recorded / "config.json").touch()
    change_checkpoint(copied, "distilled", teacher={
        "path": str(recorded), "val_accuracy": 0.5, "sha256": utils.sha256(teacher)})
    if fault == "moved aside":
        teacher.parent.rename(teacher.parent.with_name("teacher.1"))
    elif fault == "gone":
        teacher.unlink()
    elif fault == "other":
        teacher.write_bytes(teacher.read_bytes() + b"x")

    results = run_evaluate(copied)
    numbers = read_numbers(results)
    for key in ("models", "inference"):
        assert ("teacher" in numbers[key]) == found
    assert ("teacher_effect" in numbers) == ("fidelity" in numbers) == found
    report = read_report(results)
    assert ("teacher is not evaluated" in report) == (not found)
    assert word in report


def test_unfair_pair_is_named(copied):
    change_checkpoint(copied, "distilled", config={"learning_rate": 0.123},
                      split_fingerprint="other")
    report = read_report(run_evaluate(copied))
    for phrase in ("WARNING: This is not a fair pair", "learning_rate differs (0.003 and 0.123)",
                   "validation split differ"):
        assert phrase in report


@pytest.mark.slow
def test_weight_files_are_compared_by_content(copied):
    for run, path in (("baseline", "w.pth"), ("distilled", "./w.pth")):
        change_checkpoint(copied, run, config={"student_weights": path,
                                               "student_weights_sha256": "a"})
    assert "not a fair pair" not in read_report(run_evaluate(copied))
    change_checkpoint(copied, "distilled", config={"student_weights_sha256": "b"})
    assert "student_weights_sha256 differs" in read_report(run_evaluate(copied))
    change_checkpoint(copied, "distilled", config={"student_weights": None,
                                                   "student_weights_sha256": None})
    assert "student_weights_sha256 differs" in read_report(run_evaluate(copied))


@pytest.mark.slow
def test_teacher_from_elsewhere_is_not_calibrated(copied):
    """It may have been trained on the validation images."""
    _, info = models.load_model(checkpoint_path(copied, "teacher"))
    state = torch.load(checkpoint_path(copied, "teacher"), weights_only=True)["state_dict"]
    teacher = copied / "elsewhere.pth"
    torch.save(state, teacher)
    change_checkpoint(copied, "distilled", teacher={
        "path": str(teacher), "val_accuracy": 0.5, "sha256": utils.sha256(teacher), "info": info})
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "draw_reliability", lambda above, below, role, group, labels,
                      is_scaled, ece: drawn.append((role, is_scaled)))
        results = run_evaluate(copied, figures=True)
    assert drawn == [("baseline", False), ("distilled", False), ("teacher", False),
                      ("baseline", True), ("distilled", True)]
    scores = read_numbers(results)["models"]
    assert "calibration_scaled" in scores["distilled"]
    assert "calibration_scaled" not in scores["teacher"]
    assert "may have been trained on" in read_report(results)


def test_dataset_dir_is_refused_where_it_has_no_effect(copied):
    with pytest.raises(utils.UsageError, match="--dataset-dir"):
        run_evaluate(copied, "--dataset-dir", copied)


@pytest.mark.slow
def test_unfinished_run_is_named(copied):
    last_path = checkpoint_path(copied, "distilled").with_name("last.pth")
    content = utils.load_checkpoint(last_path)
    content["history"].pop()
    torch.save(content, last_path)
    report = read_report(run_evaluate(copied))
    assert "not a fair pair" in report
    assert "distilled is unfinished" in report


def test_other_classes_cannot_be_compared(copied):
    change_checkpoint(copied, "baseline", class_names=[*"01234567", "eight", "nine"])
    with pytest.raises(utils.UserError, match="cannot be compared .*8, 9, eight, nine"):
        run_evaluate(copied)
    change_checkpoint(copied, "baseline", class_names=list("1023456789"))
    with pytest.raises(utils.UserError, match="cannot be compared .*order"):
        run_evaluate(copied)
    change_checkpoint(copied, "distilled", class_names=list("abcdefghij"))
    with pytest.raises(utils.UserError, match="not trained on: 0, 1, 2"):
        run_evaluate(copied)


def test_test_images_are_labelled_in_the_order_of_the_checkpoint(trained):
    """A digit's class is called by it, whatever its number is."""
    _, info = models.load_model(checkpoint_path(trained, "distilled"))
    args = config.parse_args("evaluate", "", folder_flags(trained))
    digits = evaluate.open_images(info, args)[0].labels.tolist()
    info["class_names"] = list("1023456789")
    test, _, missing_classes, _ = evaluate.open_images(info, args)
    assert [int(info["class_names"][label]) for label in test.labels] == digits
    assert missing_classes == []


def lack_classes(monkeypatch, *lacking):
    """Let the test images of digits lack some classes, as a folder without them does."""
    load_split = data_loader.load_split

    def partial(name, part, args, value_range=None):
        images, names = load_split(name, part, args)
        if part != "test":
            return images, names
        present = [i for i, name in enumerate(names) if name not in lacking]
        rows = torch.isin(images.labels, torch.tensor(present))
        labels = torch.searchsorted(torch.tensor(present), images.labels[rows])
        images = images._replace(pixels=images.pixels[rows], labels=labels)
        return images, [names[i] for i in present]

    monkeypatch.setattr(data_loader, "load_split", partial)


@pytest.mark.parametrize("figures", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_classes_without_test_images_are_named_and_left_out(copied, monkeypatch, figures):
    """All scores are scikit-learn's over the classes that have test images."""
    lack_classes(monkeypatch, "0", "4")
    results = run_evaluate(copied, figures=figures)
    numbers = read_numbers(results)
    assert numbers["notes"]["missing_classes"] == ["0", "4"]
    assert "not scored: 2 (0, 4)" in read_report(results)

    saved = np.load(results / "predictions.npz")
    labels = saved["labels"]
    assert sorted(set(labels.tolist())) == [1, 2, 3, 5, 6, 7, 8, 9]
    for role in ROLES:
        scores = numbers["models"][role]
        predictions = saved[role].argmax(1)
        f1 = sklearn.metrics.f1_score(labels, predictions, average="macro",
                                      labels=np.unique(labels))
        assert scores["macro_f1"] == pytest.approx(f1)
        assert scores["top1"] == pytest.approx((predictions == labels).mean())
        assert list(scores["per_class_accuracy"]) == ["1", "2", "3", "5", "6", "7", "8", "9"]


def test_unknown_time_of_the_teacher_does_not_hide_those_of_the_students():
    hours = {"baseline": 1.5, "distilled": 2.0, "teacher": None}
    results = {"timings": {"training_hours": hours}, "seeds": [0],
               "inference": {"distilled_to_baseline": None}}
    line, = evaluate.cost_lines(results)
    assert "90 min" in line or "1.5 h" in line
    assert "2.0 h" in line and "unknown" in line


def test_students_of_the_same_teacher_may_have_got_it_in_different_ways():
    labels = np.arange(100) % 10
    trained = pair_of(labels, 6, 2, seeds=2)
    for path, student in zip((None, "t.pth"), trained["distilled"], strict=True):
        student.info["config"]["teacher_checkpoint"] = path
        student.info["teacher"] = {"sha256": "a"}
        student.info["split_fingerprint"] = "f"
    for student in trained["baseline"]:
        student.info["split_fingerprint"] = "f"
    assert evaluate.find_differences(trained) == []
    student.info["config"]["teacher_checkpoint"] = None
    trained["distilled"][1].info["teacher"] = {"sha256": "b"}
    assert any("different teachers" in phrase for phrase in evaluate.find_differences(trained))


def test_equal_students_are_said_to_be_equal():
    word, reason = evaluate.verdict([0.0, 0.0], 0, [1.0])
    assert word == "undecided"
    assert "same images" in reason


def test_dataset_is_called_by_the_folder_that_was_evaluated():
    labels = np.arange(100) % 10
    trained = pair_of(labels, 6, 2)
    for role, folder in (("baseline", "old"), ("distilled", "new")):
        trained[role][0].info["dataset"] = "ImageFolder"
        trained[role][0].info["config"]["dataset_dir"] = folder
    assert evaluate.compare(trained, labels)["dataset"]["name"] == "new"


def test_training_cost_is_unknown_without_a_history(copied):
    elsewhere = copied / "theirs.pth"
    shutil.copy(checkpoint_path(copied, "baseline"), elsewhere)
    results = run_evaluate(copied, "--baseline-checkpoint", elsewhere)
    assert read_numbers(results)["timings"]["training_hours"]["baseline"] is None
    assert "Training time is unknown for: baseline" in read_report(results)


def test_only_a_runs_own_last_pth_is_its_history(copied):
    path = checkpoint_path(copied, "baseline")
    assert len(evaluate.training_history(path)) == 4
    copy = shutil.copy(path, path.with_name("theirs.pth"))
    assert evaluate.training_history(copy) == []


def test_confused_pairs_with_long_names_stay_distinct():
    names = ["golden retriever puppy", "labrador retriever puppy", "curly-coated retriever"]
    labels = np.array([0, 0, 0])
    trained = {}
    for role in ("baseline", "distilled"):
        trained[role] = [model_of(sure_of(np.array([1, 2, 2]), 3), class_names=names)]
    rows = evaluate.confusion_table(evaluate.compare(trained, labels))[2:]
    assert len({row[:38] for row in rows}) == 2
    assert all("→ labrador" in row or "→ curly" in row for row in rows)


def test_seeds_of_both_roles_are_used_and_the_rest_is_named(trained, tmp_path):
    for role, seeds in (("baseline", (0, 1, 2, 5)), ("distilled", (1, 0, 2, 7))):
        for seed in seeds:
            target = tmp_path / "c" / role / f"seed_{seed}"
            shutil.copytree(trained / "c" / role, target)
            change_checkpoint(tmp_path, f"{role}/seed_{seed}", config={"seed": seed})
    shutil.copytree(trained / "c" / "baseline", tmp_path / "c" / "baseline" / "seed_0.1")
    shutil.copy(checkpoint_path(trained, "baseline"), tmp_path / "c" / "baseline")

    results = run_evaluate(tmp_path)
    numbers = read_numbers(results)
    assert numbers["seeds"] == [0, 1, 2]
    assert numbers["notes"]["left_out"] == ["the baseline run without --seeds", "baseline seed 5",
                                            "distilled seed 7"]
    report = read_report(results)
    assert "seeds 0, 1, 2" in report and "±" in report and "distilled seed 7" in report

    # A seed that is given by its path is compared, so it is not among those left out.
    folder = tmp_path / "c"
    flags = ["--baseline-checkpoint", folder / "baseline" / "seed_5" / "best_model.pth"]
    with pytest.raises(utils.UserError, match="--distilled-checkpoint.*seed_"):
        run_evaluate(tmp_path, *flags)
    flags += ["--distilled-checkpoint", folder / "distilled" / "seed_7" / "best_model.pth"]
    left_out = read_numbers(run_evaluate(tmp_path, *flags))["notes"]["left_out"]
    assert left_out == ["the baseline run without --seeds", "baseline seed 0", "baseline seed 1",
                        "baseline seed 2", "distilled seed 0", "distilled seed 1",
                        "distilled seed 2"]


# Synthetic models ---------------------------------------------------------------------------------

def model_of(log_probs, temperature=None, class_names=None, seed=0, history=(), run="baseline"):
    """A model whose answers to the test images are given."""
    num_classes = log_probs.shape[1]
    info = {
        "run": run, "model_name": "m", "dataset": "synthetic", "num_classes": num_classes,
        "class_names": class_names or [f"c{i}" for i in range(num_classes)], "versions": {},
        "config": {"seed": seed, "dataset_dir": None, "num_epochs": 8, "alpha": 0.7,
                   "distillation_loss": "kd", "temperature": 4.0, "label_smoothing": 0.1},
        "epoch": 1, "val_accuracy": 0.5, "image_size": 32, "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    return evaluate.TrainedModel(ROOT / "README.md", torch.nn.Linear(1, 1), info, log_probs,
                                 temperature, list(history))


def sure_of(predictions, num_classes, confidence=0.9):
    """Log-probabilities (N, C) of a model that gives `confidence` to each prediction (N,)."""
    rest = (1 - confidence) / (num_classes - 1)
    probabilities = np.full((len(predictions), num_classes), rest)
    probabilities[np.arange(len(predictions)), predictions] = confidence
    return np.log(probabilities)


def random_log_probs(n, num_classes, seed, scale=2.0):
    logits = scale * np.random.default_rng(seed).standard_normal((n, num_classes))
    return scipy.special.log_softmax(logits, axis=1)


def pair_of(labels, baseline_errors, distilled_errors, seeds=1):
    """A pair that errs on the first so many, and the last so many, images; more with each seed."""
    place = np.arange(len(labels))
    wrong_class = (labels + 1) % 10
    pair = {"baseline": [], "distilled": []}
    for seed in range(seeds):
        wrong = place < baseline_errors + seed
        predictions = np.where(wrong, wrong_class, labels)
        pair["baseline"].append(model_of(sure_of(predictions, 10), seed=seed))

        wrong = place >= len(labels) - distilled_errors - 2 * seed
        predictions = np.where(wrong, wrong_class, labels)
        pair["distilled"].append(model_of(sure_of(predictions, 10), seed=seed))
    return pair


# Metrics ------------------------------------------------------------------------------------------

def test_calibration_of_four_predictions_by_hand():
    """Confidences 0.95 right, 0.95 wrong, 0.55 right, 0.35 wrong in bins 15, 15, 9, 6 of 15."""
    probabilities = np.array([[0.95, 0.03, 0.02], [0.95, 0.03, 0.02], [0.25, 0.55, 0.20],
                              [0.33, 0.32, 0.35]])
    got = evaluate.calibration(np.log(probabilities), np.array([0, 1, 1, 0]))
    ece = 2 / 4 * abs(0.5 - 0.95) + 1 / 4 * abs(1 - 0.55) + 1 / 4 * abs(0 - 0.35)
    assert got["ece"] == pytest.approx(ece)
    brier = [0.05**2 + 0.03**2 + 0.02**2, 0.95**2 + 0.97**2 + 0.02**2,
             0.25**2 + 0.45**2 + 0.2**2, 0.67**2 + 0.32**2 + 0.35**2]
    assert got["brier"] == pytest.approx(np.mean(brier))
    assert got["nll"] == pytest.approx(-np.log([0.95, 0.03, 0.55, 0.33]).mean())


def test_bins_are_equal_in_width_and_closed_above():
    log_probs = np.log([[12 / 15, 1 - 12 / 15], [12 / 15 + 1e-6, 3 / 15 - 1e-6], [1.0, 1e-300],
                        [0.5, 0.5]])
    confidence, correct = evaluate.top_answers(np.array(log_probs), np.zeros(4, int))
    assert correct.all()
    _, _, counts = evaluate.reliability(confidence, correct)
    assert np.flatnonzero(counts).tolist() == [7, 11, 12, 14]


def test_scores_agree_with_scikit_learn():
    log_probs = random_log_probs(500, 7, 0)
    labels = np.random.default_rng(1).integers(0, 7, 500)
    got = evaluate.score_model(model_of(log_probs), labels)
    p = np.exp(log_probs)
    assert got["top5"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, p, k=5))
    assert got["calibration"]["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, p))
    brier = np.mean([np.sum((p[i] - np.eye(7)[labels[i]])**2) for i in range(500)])
    assert got["calibration"]["brier"] == pytest.approx(brier)


def test_temperature_scaling_finds_the_temperature():
    """Labels drawn from the probabilities; a model twice as sure as it may be needs T = 2."""
    log_probs = random_log_probs(20000, 10, 0)
    uniform = np.random.default_rng(1).random((20000, 1))
    labels = (uniform > np.exp(log_probs).cumsum(1)).sum(1).clip(max=9)
    overconfident = scipy.special.log_softmax(2 * log_probs, axis=1)
    temperature = evaluate.best_temperature(overconfident, labels)
    assert temperature == pytest.approx(2, rel=0.03)
    scores = evaluate.score_model(model_of(overconfident, temperature), labels)
    assert scores["calibration_scaled"]["ece"] < 0.02
    assert scores["calibration"]["ece"] > 0.1

    # Where all predictions are right, the lower the better, without end.
    assert evaluate.best_temperature(log_probs, log_probs.argmax(1)) is None


def test_scores_are_means_over_the_seeds_and_what_one_seed_lacks_is_left_out():
    labels = np.random.default_rng(1).integers(0, 7, 300)
    group = [model_of(random_log_probs(300, 7, seed), 1.5) for seed in (0, 1)]
    by_seed = [evaluate.score_model(model, labels) for model in group]
    got = evaluate.score_role(group, labels)
    for name in evaluate.SCORES:
        values = [scores[name] for scores in by_seed]
        assert got["by_seed"][name] == values
        assert got[name] == pytest.approx(np.mean(values))
        assert got["sd"][name] == pytest.approx(np.std(values, ddof=1))
    ece = [scores["calibration_scaled"]["ece"] for scores in by_seed]
    assert got["calibration_scaled"]["ece"] == pytest.approx(np.mean(ece))

    group[1].temperature = None
    assert "calibration_scaled" not in evaluate.score_role(group, labels)
    assert evaluate.score_role(group[:1], labels)["sd"] is None


def test_interval_of_an_accuracy_is_over_all_seeds():
    labels = np.arange(1000) % 10
    group = [pair_of(labels, errors, 0)["baseline"][0] for errors in (100, 150, 200)]
    scores = evaluate.score_role(group, labels)
    low, high = scores["top1_ci"]
    assert scores["top1"] == pytest.approx(0.85) == pytest.approx((low + high) / 2)
    over_seeds = scipy.stats.ttest_1samp([0.9, 0.85, 0.8], 0).confidence_interval()
    assert high - low == pytest.approx(over_seeds.high - over_seeds.low, rel=0.15)

    nearly_perfect = pair_of(labels, 1, 0)["baseline"]
    low, high = evaluate.score_role(nearly_perfect, labels)["top1_ci"]
    assert 0.99 < low < high == 1


def test_fidelity_by_hand_and_by_scipy():
    teacher = model_of(random_log_probs(200, 6, 0))
    student = model_of(random_log_probs(200, 6, 1))
    got = evaluate.fidelity(student, teacher)
    pairs = list(zip(np.exp(teacher.log_probs), np.exp(student.log_probs), strict=True))
    assert got["kl"] == pytest.approx(np.mean([scipy.stats.entropy(t, s) for t, s in pairs]))
    assert got["agreement"] == pytest.approx(np.mean([t.argmax() == s.argmax() for t, s in pairs]))
    assert evaluate.fidelity(teacher, teacher) == {"agreement": 1, "kl": 0}


# Which classes are confused, and what the teacher changed -----------------------------------------

def random_trained(num_classes, n=600, seeds=2, class_names=None):
    """Students of two seeds and a teacher with random answers, and labels."""
    trained = {"baseline": [], "distilled": [], "teacher": []}
    for number, role in enumerate(ROLES):
        for seed in range(1 if role == "teacher" else seeds):
            log_probs = random_log_probs(n, num_classes, 10 * number + seed)
            trained[role].append(model_of(log_probs, class_names=class_names, seed=seed))
    labels = np.random.default_rng(99).integers(0, num_classes, n)
    return trained, labels


def test_most_confused_pairs_agree_with_scikit_learn():
    trained, labels = random_trained(5)
    got = evaluate.most_confused_pairs(trained, labels)
    shares = {}
    counts = {}
    for role, group in trained.items():
        matrices = [sklearn.metrics.confusion_matrix(labels, model.predictions) for model in group]
        counts[role] = np.mean(matrices, axis=0)
        shares[role] = counts[role] / np.bincount(labels)[:, None]
    names = trained["baseline"][0].info["class_names"]
    for role in ROLES:
        errors = counts[role] - np.diag(np.diag(counts[role]))
        largest = sorted(errors.ravel(), reverse=True)[:evaluate.CONFUSED_PAIRS]
        assert [pair["images"] for pair in got[role]] == largest
        for pair in got[role]:
            place = names.index(pair["true"]), names.index(pair["predicted"])
            assert errors[place] == pair["images"]
            for other in ROLES:
                assert pair["share"][other] == pytest.approx(shares[other][place])


def test_a_model_without_errors_confuses_nothing():
    labels = np.arange(30) % 10
    trained = pair_of(labels, 3, 0)
    got = evaluate.most_confused_pairs(trained, labels)
    assert len(got["baseline"]) == 3 and got["distilled"] == []


def test_superclasses_are_cifar100s():
    """Superclass of each class in the order of names, as the dataset's own files number them."""
    coarse_labels = [
        4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13,
        15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4,
        17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13,
        15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
    superclass_of = {}
    for number, names in enumerate(evaluate.CIFAR100_SUPERCLASSES.values()):
        superclass_of |= dict.fromkeys(names, number)
    assert [superclass_of[name] for name in sorted(superclass_of)] == coarse_labels


def test_errors_within_the_right_superclass_by_hand():
    """A maple taken for an oak stays within, for a lion it does not."""
    names = sorted(sum(evaluate.CIFAR100_SUPERCLASSES.values(), ()))
    maple, oak, lion = names.index("maple_tree"), names.index("oak_tree"), names.index("lion")
    labels = np.array([maple] * 6)
    predictions = np.array([maple, maple, oak, oak, oak, lion])
    group = [model_of(sure_of(predictions, 100), class_names=names),
             model_of(sure_of(labels, 100), class_names=names)]
    got = evaluate.superclass_errors(group, labels)
    assert got == {"errors": 2, "errors_within": 1.5, "share_within": 0.75}
    assert evaluate.superclass_errors(group[1:], labels)["share_within"] is None

    trained, labels = random_trained(100, class_names=names)
    assert "superclasses" in evaluate.compare(trained, labels)
    trained, labels = random_trained(100)
    assert "superclasses" not in evaluate.compare(trained, labels)


def test_teacher_effect_counts_every_image_once():
    trained, labels = random_trained(4)
    got = evaluate.teacher_effect(trained, labels)
    found = {name: [] for name in got}  # whether the distilled student is right, image by image
    teacher = trained["teacher"][0].predictions
    for baseline, distilled in zip(trained["baseline"], trained["distilled"], strict=True):
        for i, label in enumerate(labels):
            word = {True: "right", False: "wrong"}
            name = (f"teacher_{word[bool(teacher[i] == label)]}"
                    f"_baseline_{word[bool(baseline.predictions[i] == label)]}")
            found[name].append(distilled.predictions[i] == label)
    for name, correct in found.items():
        assert got[name]["images"] == len(correct) / 2
        assert got[name]["distilled_accuracy"] == pytest.approx(np.mean(correct))
    assert sum(cell["images"] for cell in got.values()) == len(labels)
    gain = evaluate.compare_students(trained, labels)["gain"]
    gain_in_images = sum(cell["gain_in_images"] for cell in got.values())
    assert gain_in_images / len(labels) == pytest.approx(gain)


def test_teacher_effect_of_a_perfect_teacher():
    labels = np.arange(100) % 10
    trained = pair_of(labels, 8, 0) | {"teacher": [model_of(sure_of(labels, 10))]}
    got = evaluate.teacher_effect(trained, labels)
    assert got["teacher_right_baseline_wrong"] == {
        "images": 8, "distilled_accuracy": 1, "gain_in_images": 8}
    assert got["teacher_wrong_baseline_right"] == {
        "images": 0, "distilled_accuracy": None, "gain_in_images": 0}


# Inference ----------------------------------------------------------------------------------------

class Clock:
    """Stands still but for the models below, so that a busy machine changes no measurement."""
    now = 0.0

    def perf_counter(self):
        return self.now


class SlowModel(torch.nn.Module):
    """A model that takes so many milliseconds an image, and writes down how it was called."""
    overhead = 0  # milliseconds a call, however many images it has

    def __init__(self, role, milliseconds, clock, calls):
        super().__init__()
        self.register_buffer("pixel_scale", torch.ones(3, 1, 1))
        self.register_buffer("pixel_shift", torch.zeros(3, 1, 1))
        self.head = torch.nn.Linear(3, 10)
        self.role = role
        self.milliseconds = milliseconds
        self.clock = clock
        self.calls = calls

    def forward(self, images):
        self.clock.now += (self.overhead + self.milliseconds * len(images)) / 1000
        self.calls.append((self.role, len(images), images.shape[-1], self.training,
                           torch.is_inference_mode_enabled(),
                           images.is_contiguous(memory_format=torch.channels_last)))
        return self.head(images.mean((2, 3)))


@pytest.fixture
def slow_models(monkeypatch):
    """Three models of known speed, {role: [TrainedModel]}, and the list of their calls."""
    clock = Clock()
    monkeypatch.setattr(evaluate, "time", clock)
    calls = []
    trained = {}
    for role, milliseconds, size in (("baseline", 2, 32), ("distilled", 5, 40), ("teacher", 9, 48)):
        model = model_of(np.zeros((1, 10)))
        model.model = SlowModel(role, milliseconds, clock, calls).eval()
        model.info["image_size"] = size
        trained[role] = [model]
    return trained, calls


def test_inference_measures_each_model_as_evaluation_calls_it(slow_models):
    trained, calls = slow_models
    got = evaluate.measure_inference(trained, torch.device("cpu"))

    for role, milliseconds in (("baseline", 2), ("distilled", 5), ("teacher", 9)):
        assert got[role]["latency_ms"] == pytest.approx(milliseconds)
        assert got[role]["latency_ms_spread"] == pytest.approx([milliseconds] * 2)
        assert got[role]["images_per_second"] == pytest.approx(1000 / milliseconds)
        assert got[role]["images_per_second_spread"] == pytest.approx([1000 / milliseconds] * 2)
        assert got[role]["macs"] == 3 * 10
        assert got[role]["peak_memory_mb"] is None
    for kind in ("latency", "throughput"):
        assert got["distilled_to_baseline"][kind]["differ"]
        assert got["distilled_to_baseline"][kind]["ratio"] == pytest.approx(2.5)

    sizes = {role: group[0].info["image_size"] for role, group in trained.items()}
    for role, _, size, training, inference_mode, channels_last in calls:
        assert size == sizes[role]
        assert not training and inference_mode and channels_last

    # Interleaved: after warming up, every model has one turn a round, in all six orders.
    turns = [role for role, batch_size, *_ in calls if batch_size == 64][3:]
    rounds = [tuple(turns[i:i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == got["rounds"]["throughput"]
    assert len(set(rounds)) == 6
    assert all(set(one_round) == set(ROLES) for one_round in rounds)


def test_ratios_of_latency_and_throughput_are_their_own(slow_models):
    """A student that loses 8 ms a call is slow with one image, and hardly with 64."""
    trained, _ = slow_models
    trained["distilled"][0].model.milliseconds = trained["baseline"][0].model.milliseconds
    trained["distilled"][0].model.overhead = 8
    got = evaluate.measure_inference(trained, torch.device("cpu"))["distilled_to_baseline"]
    assert got["latency"]["ratio"] == pytest.approx((8 + 2) / 2)
    assert got["throughput"]["ratio"] == pytest.approx((8 + 2 * 64) / (2 * 64))


def test_slow_models_are_measured_in_bounded_time(slow_models):
    """A round of 64 images takes a second here; the limit holds, with three rounds at least."""
    trained, _ = slow_models
    first = {role: group[0] for role, group in trained.items()}
    seconds = evaluate.time_rounds(first, 64, torch.device("cpu"))
    assert len(seconds["baseline"]) == pytest.approx(evaluate.SECONDS_LIMIT, abs=1.5)
    for group in trained.values():
        group[0].model.milliseconds *= 100
    seconds = evaluate.time_rounds(first, 64, torch.device("cpu"))
    assert len(seconds["baseline"]) == evaluate.MIN_ROUNDS


def test_students_differ_only_beyond_the_noise_between_rounds():
    random = np.random.default_rng(0)
    slow_machine = random.uniform(1, 3, 30)  # both students are slower in the same rounds
    noise = random.uniform(0.98, 1.02, 30)
    baseline = 0.1 * slow_machine
    same = evaluate.compare_times({"baseline": baseline, "distilled": baseline * noise})
    slower = evaluate.compare_times({"baseline": baseline, "distilled": 1.1 * baseline * noise})
    assert same["differ"] is False and same["ratio"] == pytest.approx(1, abs=0.02)
    assert slower["differ"] is True and slower["ratio"] == pytest.approx(1.1, abs=0.02)
    few = evaluate.compare_times({"baseline": baseline[:3], "distilled": 2 * baseline[:3]})
    assert few["differ"] is None and few["ratio"] == pytest.approx(2)


def test_efficientnet_b0_has_the_published_number_of_macs():
    """0.39 billion at 224 px, 5.3 million parameters: Tan and Le 2019, table 1."""
    model = model_of(np.zeros((1, 1000)))
    model.model = models.build_model("efficientnet_b0", 1000).eval()
    model.info["image_size"] = 224
    trained = {"baseline": [model]}
    got = evaluate.measure_inference(trained, torch.device("cpu"), timed=False)["baseline"]
    assert round(got["macs"] / 1e9, 2) == 0.39
    assert round(got["parameters"] / 1e6, 1) == 5.3
    assert got["latency_ms"] is None


def test_macs_of_attention_are_counted():
    """Also where the CPU computes it in one operation."""
    counts = []
    for is_fused in (True, False):
        model = model_of(np.zeros((1, 10)))
        model.model = models.build_model("test_vit", 10).eval()
        model.info["image_size"] = 160
        for block in model.model.blocks:
            block.attn.fused_attn = is_fused
        counts.append(evaluate.count_macs(model, torch.device("cpu")))
    assert counts[0] == counts[1]


def test_report_has_inference_unless_no_timing(copied, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_ROUNDS", 3)
    without = run_evaluate(copied, results=copied / "without")
    with_timing = run_evaluate(copied, results=copied / "with", timing=True)
    assert "latency" not in read_report(without)
    assert "multiply-accumulates" in read_report(without)
    report = read_report(with_timing)
    for word in ("latency", "throughput", "Inference on CPU", "too few"):
        assert word in report
    assert read_numbers(with_timing)["inference"]["teacher"]["images_per_second"] > 0


@pytest.mark.cuda
def test_memory_on_a_gpu_is_at_least_that_of_weights_and_images():
    model = model_of(np.zeros((1, 10)))
    model.model = models.build_model("test_efficientnet", 10).eval().cuda()
    model.info["image_size"] = 64
    device = torch.device("cuda")
    got = evaluate.measure_inference({"baseline": [model], "distilled": [model]}, device)
    weights = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    images = 64 * 3 * 64 * 64 * 4
    assert got["baseline"]["peak_memory_mb"] > (weights + images) / 2**20
    assert got["baseline"]["peak_memory_mb"] < 500


# Statistics ---------------------------------------------------------------------------------------

def test_interval_over_images_agrees_with_scipys_t_and_bootstrap():
    gain = np.random.default_rng(0).choice([-1.0, 0, 1], size=800, p=[0.1, 0.75, 0.15])
    got = evaluate.confidence_interval(gain[None])
    assert got == pytest.approx(list(scipy.stats.ttest_1samp(gain, 0).confidence_interval()))
    drawn = scipy.stats.bootstrap([gain], np.mean, n_resamples=2000, batch=100, rng=1)
    assert got == pytest.approx(list(drawn.confidence_interval), abs=0.002)
    for seeds in (1, 3):
        assert evaluate.confidence_interval(np.zeros((seeds, 50))) == [0, 0]


def test_interval_over_seeds_and_images_by_hand():
    """Sums of squares written out."""
    gains = [[1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, -1, 0, 0, 0], [1, 1, 0, 1, 0, 1, 1, 0]]
    S, N = 3, 8
    mean = sum(map(sum, gains)) / 24
    seed_means = [sum(row) / N for row in gains]
    image_means = [sum(row[i] for row in gains) / S for i in range(N)]
    ms_seeds = N * sum((x - mean)**2 for x in seed_means) / (S - 1)
    ms_images = S * sum((x - mean)**2 for x in image_means) / (N - 1)
    squares = [(gains[s][i] - seed_means[s] - image_means[i] + mean)**2
               for s in range(S) for i in range(N)]
    ms_residual = sum(squares) / ((S - 1) * (N - 1))
    assert ms_seeds > ms_residual
    variance = (ms_seeds + ms_images - ms_residual) / (S * N)
    # Satterthwaite: the squared sum by the sum of the squares, each over its degrees of freedom
    parts = ((ms_seeds, S - 1), (ms_images, N - 1), (ms_residual, (S - 1) * (N - 1)))
    degrees = variance**2 / sum((ms / (S * N))**2 / df for ms, df in parts)
    assert S - 1 < degrees < N - 1
    half = scipy.stats.t.ppf(0.975, degrees) * math.sqrt(variance)
    got = evaluate.confidence_interval(np.array(gains))
    assert got == pytest.approx([mean - half, mean + half])

    equal_seeds = np.array([gains[0], gains[0][::-1]])  # no seed is better than another
    over_images = evaluate.confidence_interval(equal_seeds.mean(0)[None])
    assert evaluate.confidence_interval(equal_seeds) == pytest.approx(over_images)


def test_interval_of_an_accuracy_widens_gradually_when_the_seeds_begin_to_differ():
    """All seeds agree on most images. One image more or less then changes little, also across the
    border at which the variance between the seeds is estimated as 0."""
    images = np.random.default_rng(0).random(2000) < 0.6  # the same answers from all seeds ...
    widths = []
    for extra in range(60):
        correct = np.tile(images, (3, 1))
        correct[0, :300] = True   # ... but for a part
        correct[1, 300:600] = True
        correct[2, 600:900 + 5 * extra] = True
        low, high = evaluate.confidence_interval(correct)
        widths.append(high - low)
    changes = np.array(widths[1:]) / np.array(widths[:-1])
    assert widths[-1] > 1.5 * widths[0]
    assert changes.max() < 1.1 and changes.min() > 0.9


def test_interval_of_few_images_is_bounded():
    """Where the images happen to agree more than the residual explains, the degrees of freedom
    would fall below those of the seeds, in the end to 0."""
    for seed in range(3000):
        gains = np.random.default_rng(seed).choice([-1.0, 0, 1], size=(3, 20))
        low, high = evaluate.confidence_interval(gains)
        over_seeds = scipy.stats.t.ppf(0.975, 2) * gains.mean(1).std(ddof=1) / math.sqrt(3)
        over_images = scipy.stats.t.ppf(0.975, 19) * gains.mean(0).std(ddof=1) / math.sqrt(20)
        assert (high - low) / 2 < over_seeds + 3 * over_images


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("scatter", [0, 0.1])
def test_interval_over_both_covers_the_truth_as_often_as_it_says(seeds, scatter):
    """1,000 comparisons of equal methods on 1,000 images of unequal difficulty. A training run is
    better or worse by luck, and each method has images that suit it."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        difficulty = random.normal(1, 2, 1000)
        taste = random.normal(0, 0.5, 1000)
        luck = random.normal(0, scatter, (2, seeds, 1))
        right = []
        for side, run_luck in zip((taste, -taste), luck, strict=True):
            probability = scipy.special.expit(difficulty + side + run_luck)
            right.append(random.random((seeds, 1000)) < probability)
        low, high = evaluate.confidence_interval(right[0].astype(float) - right[1])
        covered += low <= 0 <= high
    lowest = {3: 0.92, 5: 0.94}[seeds]
    noise = 3 * math.sqrt(lowest * (1 - lowest) / 1000)
    assert lowest - noise <= covered / 1000 <= 0.97 + noise


def test_t_interval_agrees_with_the_formula():
    gains = [0.012, 0.02, 0.007, 0.015]
    interval, p = evaluate.t_test(gains)
    half = scipy.stats.t.ppf(0.975, 3) * np.std(gains, ddof=1) / 2
    assert interval == pytest.approx([np.mean(gains) - half, np.mean(gains) + half])
    assert p == pytest.approx(scipy.stats.ttest_rel(gains, [0] * 4).pvalue)
    for equal in ([0.1], [0.1, 0.1]):
        assert evaluate.t_test(equal) == (None, None)


@pytest.mark.parametrize("wrong, verdict", [
    ((60, 20), "better"), ((20, 60), "worse"), ((33, 30), "undecided"),
    ((20, 2), "undecided"), ((25, 5), "better")])
def test_verdict_follows_the_interval(wrong, verdict):
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, *wrong), labels)
    comparison = numbers["comparison"]
    low, high = comparison["ci_over_images"]
    assert comparison["gain"] == pytest.approx((wrong[0] - wrong[1]) / 1000)
    assert low < comparison["gain"] < high
    assert comparison["verdict"] == verdict
    assert comparison["only_baseline_correct"] == wrong[1]
    assert comparison["only_distilled_correct"] == wrong[0]
    p = scipy.stats.binomtest(wrong[0], sum(wrong)).pvalue
    assert comparison["mcnemar_p_by_seed"] == [pytest.approx(p)]
    sentence, *_ = evaluate.verdict_lines(numbers)
    assert f"{100 * comparison['gain']:+.2f}" in sentence
    assert f"{100 * low:+.2f} to {100 * high:+.2f}" in sentence
    assert verdict in sentence.lower()


def test_verdict_is_undecided_where_interval_and_exact_test_disagree():
    """At the edge, found by trying: 26 images against 13 of 40."""
    labels = np.arange(40) % 10
    edge = []
    for more in range(1, 40):
        for fewer in range(40 - more):
            gains = np.array([1.0] * more + [-1.0] * fewer + [0.0] * (40 - more - fewer))
            low, _ = evaluate.confidence_interval(gains[None])
            p = scipy.stats.binomtest(more, more + fewer).pvalue
            if low > 0 and p >= 0.05 and more + fewer >= evaluate.MIN_DISCORDANT:
                edge.append((more, fewer))
    assert edge
    for wrong in edge:
        numbers = evaluate.compare(pair_of(labels, *wrong), labels)
        assert numbers["comparison"]["ci_over_images"][0] > 0
        assert numbers["comparison"]["verdict"] == "undecided"
        assert "McNemar" in numbers["comparison"]["undecided_because"]


def test_few_differing_images_leave_the_verdict_undecided():
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, 24, 0), labels)
    comparison = numbers["comparison"]
    assert comparison["ci_over_images"][0] > 0 and comparison["mcnemar_p_by_seed"][0] < 1e-6
    assert comparison["verdict"] == "undecided" and comparison["discordant_images"] == 24
    assert "24 images" in evaluate.verdict_lines(numbers)[0]
    comparison = evaluate.compare(pair_of(labels, 25, 0), labels)["comparison"]
    assert comparison["verdict"] == "better" and comparison["undecided_because"] is None


@pytest.mark.slow
@pytest.mark.parametrize("images, discordant", [(300, 0.05), (300, 0.2), (2000, 0.02)])
def test_verdict_on_equal_methods_is_seldom_wrong(images, discordant):
    """2,000 pairs of one seed whose images differ by luck alone."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        share = discordant / 2
        gains = random.choice([-1, 0, 1], size=images, p=[share, 1 - discordant, share])
        p = evaluate.sign_test(int((gains < 0).sum()), int((gains > 0).sum()))
        ci = evaluate.confidence_interval(gains[None].astype(float))
        word, _ = evaluate.verdict(ci, int((gains != 0).sum()), [p])
        wrong += word != "undecided"
    assert wrong <= 0.06 * 2000


def test_classes_that_change_beyond_noise_are_found():
    """Three of ten classes of 100 images gain; p agrees with scipy, by hand for one class."""
    labels = np.arange(1000) % 10
    trained = {}
    wrong = (labels < 3) & (np.arange(1000) < 400)
    trained["baseline"] = [model_of(sure_of(np.where(wrong, 9, labels), 10))]
    wrong = (labels == 5) & (np.arange(1000) < 40)
    trained["distilled"] = [model_of(sure_of(np.where(wrong, 9, labels), 10))]
    changes = evaluate.gains_by_class(trained, labels)
    marked = [name for name, change in changes.items() if change["p"] < 0.05]
    assert marked == ["c0", "c1", "c2"]
    assert changes["c0"]["gain"] == pytest.approx(0.4)
    assert changes["c5"]["gain"] == pytest.approx(-0.04)
    p_values = [scipy.stats.binomtest(0, 40).pvalue] * 3 + [1.0] * 7
    p_values[5] = scipy.stats.binomtest(4, 4).pvalue
    expected = scipy.stats.false_discovery_control(p_values)
    assert [change["p"] for change in changes.values()] == pytest.approx(expected)


def test_images_are_compared_in_pairs():
    """Both err on the same 200 images, one on 20 more: sure in pairs, and only in pairs."""
    labels = np.arange(1000) % 10
    correct = {}
    trained = {}
    for role, errors in (("baseline", 220), ("distilled", 200)):
        predictions = np.where(np.arange(1000) < errors, (labels + 1) % 10, labels)
        correct[role] = (predictions == labels).astype(float)
        trained[role] = [model_of(sure_of(predictions, 10))]
    comparison = evaluate.compare(trained, labels)["comparison"]
    paired = scipy.stats.ttest_rel(correct["distilled"], correct["baseline"])
    assert comparison["ci_over_images"] == pytest.approx(list(paired.confidence_interval()))
    unpaired = scipy.stats.ttest_ind(correct["distilled"], correct["baseline"])
    assert paired.pvalue < 0.05 < 0.2 < unpaired.pvalue


def test_mcnemar_on_a_published_table():
    """Fagerland, Lydersen and Laake (BMC Medical Research Methodology 2013, 13:91): p = 0.0525."""
    for counts, p in (((6, 16), 0.0525), ((16, 6), 0.0525), ((0, 0), 1), ((0, 5), 2 / 32)):
        assert evaluate.sign_test(*counts) == pytest.approx(p, abs=5e-5)


def test_from_three_seeds_on_the_verdict_rests_on_seeds_and_images():
    labels = np.arange(1000) % 10
    two = evaluate.compare(pair_of(labels, 60, 20, seeds=2), labels)
    three = evaluate.compare(pair_of(labels, 60, 20, seeds=3), labels)
    assert two["comparison"]["verdict_ci"] == "images"
    assert any("does not cover" in line for line in evaluate.verdict_lines(two))
    assert not any("does not cover" in line for line in evaluate.verdict_lines(three))
    comparison = three["comparison"]
    assert comparison["verdict_ci"] == "both"

    gains = [0.040, 0.039, 0.038]
    assert comparison["gain_by_seed"] == pytest.approx(gains)
    over_seeds = scipy.stats.ttest_1samp(gains, 0).confidence_interval()
    assert comparison["ci_over_seeds"] == pytest.approx(list(over_seeds))
    low, high = comparison["ci_over_both"]
    assert low < over_seeds.low and over_seeds.high < high  # images are few, seeds nearly equal

    sentence, separate, *_ = evaluate.verdict_lines(three)
    assert f"{100 * low:+.2f} to {100 * high:+.2f}" in sentence and "3 seeds" in sentence
    assert "images only" in separate and "seeds only" in separate
    baseline = three["models"]["baseline"]
    assert baseline["top1"] == pytest.approx(0.939)
    assert baseline["sd"]["top1"] == pytest.approx(0.001)
    assert three["seeds"] == [0, 1, 2]


def test_seeds_with_equal_gains_do_not_prove_it():
    """One image of 360 more with each of three seeds, and seeds that all gain much."""
    labels = np.arange(360) % 10
    for more, verdict in ((1, "undecided"), (30, "better")):
        trained = {"baseline": [], "distilled": []}
        for seed in range(3):
            wrong = (np.arange(360) - 40 * seed) % 360 < more
            predictions = np.where(wrong, (labels + 1) % 10, labels)
            trained["baseline"].append(model_of(sure_of(predictions, 10), seed=seed))
            trained["distilled"].append(model_of(sure_of(labels, 10), seed=seed))
        comparison = evaluate.compare(trained, labels)["comparison"]
        assert comparison["gain_by_seed"] == pytest.approx([more / 360] * 3)
        assert comparison["ci_over_seeds"] is comparison["t_test_p"] is None
        low, high = comparison["ci_over_both"]
        assert high - low > 0.005
        assert comparison["verdict"] == verdict


def test_share_of_the_teachers_lead_and_training_cost():
    labels = np.arange(1000) % 10
    trained = pair_of(labels, 100, 70) | {"teacher": pair_of(labels, 50, 0)["baseline"]}
    for role, minutes in (("baseline", 90), ("distilled", 120), ("teacher", 300)):
        trained[role][0].history.append({"seconds": 60.0 * minutes})
    comparison = evaluate.compare(trained, labels)["comparison"]
    assert comparison["teacher_lead"] == pytest.approx(0.05)
    assert comparison["advantage_recovered"] == pytest.approx(0.03 / 0.05)
    assert evaluate.training_hours(trained) == {"baseline": 1.5, "distilled": 2, "teacher": 5}

    weak = trained | {"teacher": trained["baseline"]}
    comparison = evaluate.compare(weak, labels)["comparison"]
    assert comparison["teacher_lead"] == 0
    assert comparison["advantage_recovered"] is None

    worse = trained | {"teacher": pair_of(labels, 200, 0)["baseline"]}
    texts = evaluate.weakness_texts(evaluate.compare(worse, labels))
    assert any("teacher is worse" in text for text in texts)

    # A lead that may be noise is no divisor.
    near = trained | {"teacher": pair_of(labels, 99, 0)["baseline"]}
    numbers = evaluate.compare(near, labels)
    comparison = numbers["comparison"]
    low, high = comparison["teacher_lead_ci"]
    assert low < 0 < comparison["teacher_lead"] == pytest.approx(0.001) and high > 0
    assert comparison["advantage_recovered"] is None
    assert any("unclear" in text for text in evaluate.weakness_texts(numbers))


def test_lead_of_the_teacher_varies_with_the_seeds_of_the_baseline():
    """Baselines of 94, 84 and 74 % below a teacher of 95 %: the next may be above it."""
    labels = np.arange(1000) % 10
    trained = {"teacher": pair_of(labels, 50, 0)["baseline"], "baseline": [], "distilled": []}
    for errors in (60, 160, 260):
        for role, student in pair_of(labels, errors, 0).items():
            trained[role] += student
    comparison = evaluate.compare(trained, labels)["comparison"]
    over_seeds = scipy.stats.ttest_1samp([0.01, 0.11, 0.21], 0).confidence_interval()
    low, high = comparison["teacher_lead_ci"]
    assert comparison["teacher_lead"] == pytest.approx((low + high) / 2) == pytest.approx(0.11)
    assert low < 0 < high
    assert high - low == pytest.approx(over_seeds.high - over_seeds.low, rel=0.1)
    assert comparison["advantage_recovered"] is None


def test_students_near_chance_level_are_named():
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, 885, 100), labels)
    named = [text for text in evaluate.weakness_texts(numbers) if "chance level" in text]
    assert len(named) == 1 and "baseline" in named[0]


@pytest.mark.parametrize("classes, accuracy, told", [
    (2, 0.58, True), (2, 0.65, False), (4, 0.38, True), (4, 0.58, False), (10, 0.25, True),
    (10, 0.3, False), (1, 0.9, False)])
def test_chance_level_depends_on_the_classes_of_the_test_images(classes, accuracy, told):
    """58 % are near chance level with two classes, not with four. One class has no such level."""
    labels = np.arange(1000) % classes
    errors = round(1000 * (1 - accuracy))
    numbers = evaluate.compare(pair_of(labels, errors, errors), labels)
    texts = evaluate.weakness_texts(numbers)
    assert any("chance level" in text for text in texts) == told


def test_intervals_of_two_seeds_are_those_over_the_images():
    """Over two seeds, the interval of a lead of 10 points could reach from -300 to +300."""
    labels = np.arange(1000) % 10
    trained = {}
    for role, errors in (("baseline", (100, 300)), ("distilled", (50, 60)), ("teacher", (100,))):
        trained[role] = [pair_of(labels, count, 0)["baseline"][0] for count in errors]
    numbers = evaluate.compare(trained, labels)
    for low, high in (numbers["comparison"]["teacher_lead_ci"],
                      numbers["models"]["baseline"]["top1_ci"]):
        assert high - low < 0.1


@pytest.mark.parametrize("distilled_errors, val_accuracy, told", [
    (60, 0.51, False), (60, 0.6, True), (20, 0.6, False)])
def test_validation_gain_that_the_test_images_do_not_bear_out(
        distilled_errors, val_accuracy, told):
    """Where the distilled student is better, as with 20 errors for 60, nothing is left to confirm.
    """
    labels = np.arange(1000) % 10
    trained = pair_of(labels, 60, distilled_errors)
    trained["distilled"][0].info["val_accuracy"] = val_accuracy  # the baseline's is 0.5
    lines = evaluate.verdict_lines(evaluate.compare(trained, labels))
    assert any("do not confirm" in line for line in lines) == told


def test_equal_intervals_are_explained():
    """Seeds that gain the same, each on other images, add nothing to the images' own noise."""
    labels = np.arange(1000) % 10
    trained = {"baseline": [], "distilled": []}
    for seed in range(3):
        wrong = (np.arange(1000) - 107 * seed) % 1000 < 61
        predictions = np.where(wrong, (labels + 1) % 10, labels)
        trained["baseline"].append(model_of(sure_of(predictions, 10), seed=seed))
        trained["distilled"].append(model_of(sure_of(labels, 10), seed=seed))
    numbers = evaluate.compare(trained, labels)
    over_images = numbers["comparison"]["ci_over_images"]
    assert numbers["comparison"]["ci_over_both"] == pytest.approx(over_images)
    assert any("equals that over the images" in line for line in evaluate.verdict_lines(numbers))

    # A seed that is worse than the others widens it.
    trained["distilled"][2] = trained["baseline"][2]
    different = evaluate.compare(trained, labels)
    lines = evaluate.verdict_lines(different)
    assert not any("equals that over the images" in line for line in lines)


def test_report_names_images_settings_and_all_versions():
    labels = np.arange(1000) % 10
    trained = pair_of(labels, 60, 20, seeds=3)
    for role, threads in (("baseline", "1 thread"), ("distilled", "2 threads")):
        for model in trained[role]:
            model.info["versions"] = {"device": f"CPU, {threads}", "torch": "2.9"}
    part = types.SimpleNamespace(labels=labels)
    data = types.SimpleNamespace(train=types.SimpleNamespace(labels=range(7200)), val=part)
    numbers = evaluate.compare(trained, labels, data)
    assert numbers["versions"] == {"device": "CPU, 1 thread / CPU, 2 threads", "torch": "2.9"}
    heading = "\n".join(evaluate.heading_lines(numbers))
    for text in ("7,200 training", "1,000 validation", "1,000 test", "8 epochs", "kd", "T = 4",
                 "seeds 0, 1, 2"):
        assert text in heading
    without_data = evaluate.compare(trained, labels)
    assert "training" not in "\n".join(evaluate.heading_lines(without_data))

    # No model has a temperature. Without validation images, a warning says why.
    assert any("not fitted" in line for line in evaluate.calibration_table(numbers))
    assert not any("not fitted" in line for line in evaluate.calibration_table(without_data))


@pytest.mark.parametrize("direction, is_named", [("forward", False), ("reverse", True)])
def test_report_names_the_reversed_kl(direction, is_named):
    settings = {"num_epochs": 8, "distillation_loss": "kd", "temperature": 4.0, "alpha": 0.7,
                "kl_direction": direction}
    training = evaluate.training_settings({"config": settings})
    text = ", ".join(evaluate.training_parts({"training": training, "seeds": [0]}))
    assert ("reverse" in text) == is_named


def test_best_epochs_of_many_seeds_have_a_line_for_each_role():
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, 60, 20, seeds=6), labels)
    for scores in numbers["models"].values():
        scores["epochs"] = [45, 27, 30, 41, 50, 12]
    lines = [line for line in evaluate.score_table(numbers) if "best epoch" in line]
    assert len(lines) == 2
    for line, role in zip(lines, ("baseline", "distilled"), strict=True):
        assert role in line and line.endswith(" 45, 27, 30, 41, 50, 12")


def test_top5_needs_six_classes():
    for num_classes, known in ((5, False), (6, True)):
        trained, labels = random_trained(num_classes)
        numbers = evaluate.compare(trained, labels)
        assert ("top5" in numbers["models"]["teacher"]) == known
        assert any("top-5" in line for line in evaluate.score_table(numbers)) == known

    undecided = model_of(np.full((3, 9), -math.log(9)))  # a tie of all classes
    scores = evaluate.score_model(undecided, undecided.predictions)
    assert scores["top1"] == scores["top5"] == 1


# Tables -------------------------------------------------------------------------------------------

def numbers_with_costs(trained, labels):
    numbers = evaluate.compare(trained, labels)
    numbers["inference"] = {}
    for role in trained:
        numbers["inference"][role] = {"parameters": 5_288_548, "macs": 385_890_000}
    return numbers


def test_tables_hold_the_numbers_of_the_comparison():
    trained, labels = random_trained(7)
    for role, group in trained.items():
        for model in group:
            model.info["model_name"] = f"{role}_b0"
    numbers = numbers_with_costs(trained, labels)
    lines = evaluate.markdown_table(numbers).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    heads, _, *rows = table
    assert [row[0] for row in rows] == ["teacher", "baseline", "distilled"]
    assert all(len(row) == len(heads) for row in table)
    for row in rows:
        scores = numbers["models"][row[0]]
        cells = dict(zip(heads, row, strict=True))
        assert cells["model"] == f"{row[0]}_b0"
        assert float(cells["top-1 (%)"].split()[0]) == pytest.approx(100 * scores["top1"], abs=.005)
        assert float(cells["top-5 (%)"].split()[0]) == pytest.approx(100 * scores["top5"], abs=.005)
        assert cells["parameters (M)"] == "5.29" and cells["MACs (M)"] == "385.9"
    gain = rows[2][heads.index("gain, points (95 % CI)")]
    assert gain.startswith(f"{100 * numbers['comparison']['gain']:+.2f} (")

    latex = evaluate.latex_table(numbers)
    assert latex.count(r"\\") == 4 and latex.count("rule") == 3
    assert r"distilled\_b0" in latex and r"$\pm$" in latex and r"(\%)" in latex
    body = latex.split(r"\midrule")[1].splitlines()[1:4]
    assert all(line.count("&") == len(heads) - 1 for line in body)


def test_per_class_csv_has_every_class():
    """One without test images has an empty row; a name with a comma is quoted."""
    trained, labels = random_trained(4, class_names=["a, b", "c", "d", "e"])
    labels[labels == 3] = 0
    numbers = evaluate.compare(trained, labels)
    rows = list(csv.DictReader(io.StringIO(evaluate.per_class_csv(numbers))))
    assert [row["class"] for row in rows] == ["a, b", "c", "d", "e"]
    assert list(rows[3].values()) == ["e", "0", *[""] * 5]
    for label, row in enumerate(rows[:3]):
        assert int(row["test_images"]) == (labels == label).sum()
        accuracies = {}
        for role in ROLES:
            by_seed = [(model.predictions == label)[labels == label].mean()
                       for model in trained[role]]
            accuracies[role] = np.mean(by_seed)
            assert float(row[role]) == pytest.approx(accuracies[role])
        gain = accuracies["distilled"] - accuracies["baseline"]
        assert float(row["gain"]) == pytest.approx(gain)


def test_last_lines_on_the_screen_say_what_holds_and_where_to_look(copied, capsys):
    results = run_evaluate(copied)
    numbers = read_numbers(results)
    lines = capsys.readouterr().out.splitlines()[-8:]
    text = " ".join(lines)
    for role in ROLES:
        assert f"{role} {numbers['models'][role]['top1']:.2%}" in text
    assert numbers["comparison"]["verdict"] in text.lower()
    assert str(results / "accuracy_comparison.png") in text
    assert lines[-1].endswith(str(results / "comparison_report.txt"))


# Figures ------------------------------------------------------------------------------------------

def test_similar_classes_stand_together():
    """Four groups of six classes, confused within, shuffled: each group comes together."""
    order = np.random.default_rng(0).permutation(24)
    confusion = np.kron(np.eye(4), np.full((6, 6), 0.1)) + np.eye(24)
    groups = order[evaluate.class_order(confusion[np.ix_(order, order)])] // 6
    assert (np.diff(groups) != 0).sum() == 3
    assert evaluate.class_order(np.eye(20)).tolist() == list(range(20))


def history_of(start, *columns):
    rows = []
    for epoch in (1, 2, 3):
        values = dict.fromkeys(columns, (start + epoch) / 100)
        rows.append({"epoch": epoch, "ce_loss": start + epoch, **values})
    return rows


def drawn_lines(draw, *arguments):
    """(x, y) of every line that a panel's function draws, and the texts of its legend."""
    figure, axis = evaluate.plt.subplots()
    draw(axis, *arguments)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    _, labels = axis.get_legend_handles_labels()
    evaluate.plt.close(figure)
    return lines, labels


def assert_lines(lines, *expected):
    assert len(lines) == len(expected)
    for (x, y), (expected_x, expected_y) in zip(lines, expected, strict=True):
        assert x == expected_x and y == pytest.approx(expected_y)


def test_diagnostics_show_the_histories():
    """Two seeds, a line each, and their mean over the epochs that both have."""
    columns = ("distill_loss", "entropy", "train_accuracy", "teacher_entropy", "target_entropy",
               "teacher_accuracy")
    first = history_of(10, *columns)
    second = [*history_of(20, "distill_loss", "train_accuracy"), dict(first[-1], epoch=4)]
    second[0]["entropy"] = 0.5
    plain = history_of(30, "entropy", "train_accuracy")
    info = {"config": {"alpha": 0.75, "distillation_loss": "kd"}, "num_classes": 10,
            "teacher": {"val_accuracy": 0.5}}
    trained = {}
    for role, histories in (("baseline", [plain, []]), ("distilled", [first, second])):
        trained[role] = [types.SimpleNamespace(history=rows, info=info) for rows in histories]
    three = [1, 2, 3]
    four = [1, 2, 3, 4]

    lines, labels = drawn_lines(evaluate.draw_loss_parts, trained["distilled"])
    assert_lines(lines, (three, [.11 * .75, .12 * .75, .13 * .75]),
                 (four, [.21 * .75, .22 * .75, .23 * .75, .13 * .75]),
                 (three, [.16 * .75, .17 * .75, .18 * .75]),
                 (three, [11 / 4, 12 / 4, 13 / 4]), (four, [21 / 4, 22 / 4, 23 / 4, 13 / 4]),
                 (three, [16 / 4, 17 / 4, 18 / 4]))
    assert "0.75" in labels[0] and "kd" in labels[0] and "0.25" in labels[1]

    lines, _ = drawn_lines(evaluate.draw_entropies, trained)
    entropies = [(three, [.11, .12, .13]), ([1, 4], [.5, .13]), ([1], [(.11 + .5) / 2])]
    targets = [(three, [.11, .12, .13]), ([4], [.13]), ([], [])]
    uniform = ([0, 1], [math.log(10)] * 2)
    assert_lines(lines, (three, [.31, .32, .33]), *entropies, *targets, *targets, uniform)

    lines, labels = drawn_lines(evaluate.draw_training_accuracy, trained)
    assert_lines(lines, (three, [31, 32, 33]), (three, [11, 12, 13]), (four, [21, 22, 23, 13]),
                 (three, [16, 17, 18]), *[(x, [100 * value for value in y]) for x, y in targets],
                 ([0, 1], [50, 50]))
    assert labels[:3] == ["Baseline", "Distilled", "Teacher"]


def synthetic_comparison(num_classes, images):
    """Three models with histories, labels and test images of 8 px."""
    labels = np.arange(images) % num_classes
    signal = 4 * np.eye(num_classes)[labels]
    signal += np.random.default_rng(0).standard_normal((images, num_classes))
    history = [{"epoch": i, "ce_loss": 1 / i, "val_loss": 1 / i, "val_accuracy": i / 9,
                "seconds": 60.0} for i in range(1, 9)]
    names = [f"a class with a long name {i}" for i in range(num_classes)]
    trained = {}
    for i, role in enumerate(ROLES):
        noise = np.random.default_rng(i).standard_normal((images, num_classes))
        log_probs = scipy.special.log_softmax(signal + noise, axis=1)
        trained[role] = [model_of(log_probs, 1.5, names, history=history, run=role)]
    pixels = torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8)
    test = data_loader.Images(pixels, None, torch.from_numpy(labels))
    return trained, labels, test


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [40, 102, 1000])
def test_statistics_and_figures_are_bounded(tmp_path, num_classes):
    """10,000 images: 60 s of one core, pictures of a page's size, nothing images x images in memory
    and no figure left open."""
    trained, labels, test = synthetic_comparison(num_classes, 10_000)
    start = time.process_time()
    numbers = evaluate.compare(trained, labels)
    evaluate.write_figures(trained, labels, test, numbers, tmp_path)
    assert time.process_time() - start < 60
    assert not evaluate.plt.get_fignums()
    for name in FIGURES:
        with data_loader.Image.open(tmp_path / f"{name}.png") as image:
            assert max(image.size) < 2200
        assert (tmp_path / f"{name}.pdf").stat().st_size < 2**20

    tracemalloc.start()
    evaluate.compare(trained, labels)
    arrays = trained["baseline"][0].log_probs.nbytes
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20 + 6 * arrays
    tracemalloc.stop()


@pytest.mark.slow
def test_figures_fit_the_page(tmp_path):
    """7 inches wide at 200 dpi, so that nothing is scaled down on the page; no text below 6 pt, and
    none outside the saved area. Caption: dataset, models, loss, epochs, seeds."""
    trained, labels, _ = synthetic_comparison(60, 1200)
    numbers = evaluate.compare(trained, labels)
    evaluate.set_figure_style()
    shares = evaluate.confusion_shares(trained, labels)["distilled"]
    names = list(numbers["class_changes"])
    figures = [
        evaluate.plot_accuracy_comparison(numbers), evaluate.plot_training_curves(trained),
        evaluate.plot_distillation_diagnostics(trained), evaluate.plot_class_changes(numbers),
        evaluate.plot_reliability_diagram(trained, labels, numbers),
        evaluate.plot_confusion_matrix("title", shares, names, np.arange(60), list(range(20)),
                                       evaluate.SHARE_SCALE),
    ]
    for figure in figures:
        caption = evaluate.figure_caption(numbers, figure.get_figwidth())
        evaluate.add_caption(figure, caption)
        area = evaluate.drawn_area(figure)
        assert area.width == pytest.approx(7)
        figure.savefig(tmp_path / "figure.png", bbox_inches=area)
        with data_loader.Image.open(tmp_path / "figure.png") as image:
            assert image.width == 1400
        for text in figure.findobj(evaluate.matplotlib.text.Text):
            assert text.get_fontsize() >= 6 or not text.get_text()
        evaluate.plt.close(figure)

    training = numbers["training"]
    for part in (numbers["dataset"]["name"], numbers["models"]["teacher"]["model_name"],
                 training["distillation_loss"], f"{training['epochs']} epochs", "seed 0"):
        assert part in caption.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("counts, groups", [
    ([40, 0, 30], [[0], [2]]),
    ([10, 0, 15, 5, 90, 3, 4], [[0, 2, 3], [4, 5, 6]]),
    ([0, 7, 2], [[1, 2]]),
    ([0, 0], []),
])
def test_bins_with_few_images_are_merged(counts, groups):
    assert evaluate.MIN_BIN_IMAGES == 30
    assert evaluate.merge_bins(np.array(counts)) == groups


def test_long_names_are_cut_in_the_middle():
    assert evaluate.short_name("oak_tree", 8) == "oak_tree"
    assert evaluate.short_name("a class with a long name 36", 12) == "a class…e 36"


def test_gallery_has_whole_rows():
    for corrected, misclassified, shown in ((100, 100, 16), (3, 100, 8), (1, 2, 3), (5, 0, 4),
                                            (0, 0, 0), (7, 6, 12)):
        chosen = evaluate.choose_gallery_images(np.arange(corrected),
                                                1000 + np.arange(misclassified))
        assert len(chosen) == len(set(chosen)) == shown
        assert chosen == sorted(chosen, key=lambda i: i >= 1000)  # the corrected first


def test_gallery_shows_the_square_that_the_model_sees(monkeypatch):
    """Of a picture twice as wide as high; above it the class and each model's answer."""
    trained, labels, _ = synthetic_comparison(4, 40)
    wide = data_loader.Image.new("RGB", (80, 40))
    monkeypatch.setattr(data_loader, "load_image", lambda images, i: wide)
    figure = evaluate.plot_gallery(trained, labels, None)
    for axis in figure.axes:
        assert axis.images[0].get_array().shape[:2] == (32, 32)
        lines = axis.get_title(loc="left").splitlines()
        assert [line.split(":")[0] for line in lines] == [
            "Class", "Baseline", "Distilled", "Teacher"]
        is_corrected = "✗" in lines[1]  # else newly misclassified
        assert ("✓" in lines[2]) == is_corrected
    evaluate.plt.close(figure)


def test_gains_are_drawn_with_their_intervals():
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, 60, 20, seeds=3), labels)
    rows = evaluate.gain_rows(numbers)
    comparison = numbers["comparison"]
    assert [gain for _, gain, _ in rows] == [*comparison["gain_by_seed"], comparison["gain"]]
    assert rows[-1][2] == comparison["ci_over_both"]

    figure = evaluate.plot_accuracy_comparison(numbers)
    left, right = figure.axes
    assert comparison["verdict"] in right.get_title()
    low, high = left.get_xlim()
    assert low > 90 and high < 101  # fitted
    evaluate.plt.close(figure)


def test_many_classes_show_the_ends_of_the_changes():
    trained, labels, _ = synthetic_comparison(40, 2000)
    numbers = evaluate.compare(trained, labels)
    figure = evaluate.plot_class_changes(numbers)
    shown = [text.get_text().strip("* ") for text in figure.axes[0].get_yticklabels()]
    by_gain = sorted(numbers["class_changes"].items(), key=lambda item: item[1]["gain"])
    assert shown == [name for name, _ in by_gain[:15] + by_gain[-15:]]
    for label, (_, change) in zip(figure.axes[0].get_yticklabels(), by_gain[:15] + by_gain[-15:],
                                  strict=True):
        assert label.get_text().startswith("*") == (change["p"] < 0.05)
        assert (label.get_fontweight() == "bold") == (change["p"] < 0.05)
    evaluate.plt.close(figure)

    # Of the classes in the middle, which are not shown, one may be significant all the same.
    for change in numbers["class_changes"].values():
        change["p"] = 1.0
    for p, note in ((1.0, "no change is significant"), (0.01, "no change shown here")):
        by_gain[20][1]["p"] = p
        figure = evaluate.plot_class_changes(numbers)
        assert note in figure.axes[0].get_title()
        evaluate.plt.close(figure)


def test_most_confused_classes_by_hand():
    confusion = np.diag([9.0] * 6)
    confusion[4, 1] = 3
    confusion[2, 5] = 2
    confusion[5, 4] = 1
    assert evaluate.most_confused_classes(confusion, 2) == [1, 4]
    assert evaluate.most_confused_classes(confusion, 4) == [1, 2, 4, 5]
    assert evaluate.most_confused_classes(confusion, 9) == list(range(6))


def test_large_matrices_show_the_strongest_cell_of_each_block():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(7, 7))
    reduced = evaluate.strongest_of_blocks(matrix, 3)
    assert reduced.shape == (3, 3)
    for row, column in np.ndindex(3, 3):
        block = matrix[3 * row:3 * row + 3, 3 * column:3 * column + 3]
        assert reduced[row, column] == max(block.flat, key=abs)
    assert np.array_equal(evaluate.strongest_of_blocks(matrix, 1), matrix)


@pytest.mark.slow
def test_class_names_in_any_script(tmp_path):
    """Names that no installed font has, or that look like a formula, draw without a warning."""
    names = ["漢字", "a$b$c", "$\\frac{$", "ä, ж, ع"]
    labels = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    predictions = {"baseline": [0, 0, 1, 1, 1, 2, 3, 3], "distilled": [0, 0, 0, 1, 1, 3, 3, 2]}
    trained = {}
    for role, classes in predictions.items():
        log_probs = sure_of(np.array(classes), 4)
        trained[role] = [model_of(log_probs, 1.5, names, run=role)]
    test = data_loader.Images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = evaluate.compare(trained, labels)
        evaluate.write_figures(trained, labels, test, numbers, tmp_path)
    assert (tmp_path / "gallery.pdf").is_file()
    shares = evaluate.confusion_shares(trained, labels)
    assert np.allclose(shares["baseline"][0], [2 / 3, 1 / 3, 0, 0])
    assert np.allclose(shares["distilled"][2], [0, 0, 0, 1])


def test_report_names_the_folder_of_the_test_images(copied, monkeypatch):
    load_split = data_loader.load_split
    monkeypatch.setattr(data_loader, "load_split",
                        lambda name, part, *args: load_split("Digits", part, *args))
    for role in ("baseline", "distilled"):
        change_checkpoint(copied, role, dataset="ImageFolder", config={"dataset_dir": "pictures"},
                          teacher=None)
    (copied / "newer").mkdir()
    results = run_evaluate(copied, "--dataset-dir", copied / "newer")
    assert read_numbers(results)["dataset"]["name"] == "newer"


def write_12_bit_pictures(folder):
    """Pictures in 16-bit files whose training values reach 4,000 and whose test values reach 2,000.
    """
    random = np.random.default_rng(0)
    for part, highest in (("train", 4000), ("test", 2000)):
        for name in ("cat", "dog"):
            for i in range(8):
                pixels = random.integers(0, highest, (32, 32), endpoint=True, dtype=np.uint16)
                pixels[0, 0] = highest
                pixels[0, 1] = 0
                file = folder / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


def test_test_images_have_the_value_range_of_the_checkpoint(arguments, tmp_path):
    write_12_bit_pictures(tmp_path / "pictures")
    args = arguments("baseline", "--dataset-name", "ImageFolder", "--dataset-dir",
                     tmp_path / "pictures", "--batch-size", "4")
    data = data_loader.open_dataset(args)
    model = models.build_model("test_efficientnet", 2)
    info = models.build_info("baseline", model, "test_efficientnet", data, args)
    assert info["value_range"] == [0.0, 4000.0]

    test, *_ = evaluate.open_images(info, arguments("evaluate"))
    assert test.pixels[0].max() == round(255 * 2000 / 4000)
    transform = data_loader.build_transform(info)
    image = data_loader.read_image(tmp_path / "pictures" / "test" / "cat" / "0.png")
    loader = data_loader.EvaluationLoader(test, info, args, torch.device("cpu"))
    images, _ = next(iter(loader))
    mean = torch.tensor(info["mean"])[:, None, None]
    std = torch.tensor(info["std"])[:, None, None]
    assert torch.allclose(transform(image), (images[0] - mean) / std, atol=0.02)
