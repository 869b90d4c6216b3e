"""Numbers of the comparison against scikit-learn, and what evaluate.py says where something is missing.

    python -m pytest tests/test_evaluate.py
"""
import json
import math
import shutil
import time
import types
import tracemalloc

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import timm
import torch

import data_loader
import evaluate
import models
import train_baseline
import train_distillation
import utils
from conftest import ROOT, TINY


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
        images = torch.stack([transform(data_loader.picture(test, i)) for i in range(360)])
        with torch.inference_mode():
            probabilities = model.eval()(images).softmax(1).numpy()
        assert saved[run].dtype == np.float32 and saved[run].shape == (360, 10)
        np.testing.assert_allclose(saved[run], probabilities, atol=0.05)  # resized on bytes there, on floats here
        predictions, labels, scores = saved[run].argmax(1), test.labels.numpy(), numbers["models"][run]
        double = saved[run].astype(float) / saved[run].astype(float).sum(1, keepdims=True)
        assert scores["top1"] == pytest.approx((predictions == labels).mean())
        assert scores["top5"] == pytest.approx(np.mean([label in row.argsort()[-5:] for row, label in zip(saved[run], labels)]))
        assert scores["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"))
        assert scores["calibration"]["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, double), rel=1e-5)
        recall = sklearn.metrics.recall_score(labels, predictions, average=None)
        assert list(scores["per_class_accuracy"].values()) == pytest.approx(recall.tolist())
        assert scores["parameters"] == sum(p.numel() for p in model.parameters())
        assert scores["val_accuracy"] == checkpoint["val_accuracy"] and scores["calibration_scaled"]["temperature"] > 0
        assert numbers["timings"]["latency_ms"][run] > 0 and numbers["timings"]["throughput"][run] > 0
        assert numbers["timings"]["training_hours"][run] > 0


FIGURES = ("training_curves", "distillation_diagnostics", "accuracy_comparison", "reliability_diagram", "class_changes", "gallery",
           "confusion_matrix_baseline", "confusion_matrix_distilled", "confusion_matrix_teacher")


def test_report_and_figures(trained):
    results = trained / "r" / "quick"
    report = (results / "comparison_report.txt").read_text(encoding="utf-8")
    assert max(map(len, report.splitlines())) <= 100
    assert "test_efficientnet alone against test_efficientnet taught by test_resnet" in report
    assert "360 test images of 10 classes, seed 42" in report and "its teacher's" in report
    for name in FIGURES:
        with data_loader.Image.open(results / f"{name}.png") as image:
            assert round(image.info["dpi"][0]) == 200 and image.width > 800
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (trained / "c" / "quick" / "best_model.pth").is_file()


def test_rerun_gives_the_same_files_but_for_timings(trained, tmp_path, monkeypatch):
    results = run_again(trained, tmp_path / "r", monkeypatch)
    for name in (*(f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")), "predictions.npz"):
        assert (results / name).read_bytes() == (trained / "r" / "quick" / name).read_bytes(), name
    one, two = (json.loads((folder / "comparison.json").read_text(encoding="utf-8")) for folder in (results, trained / "r" / "quick"))
    assert one.pop("timings").keys() == two.pop("timings").keys() and one == two
    texts = [(folder / "comparison_report.txt").read_text(encoding="utf-8").split("Timings on")[0] for folder in (results, trained / "r" / "quick")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("run, command", [("baseline", "python train_baseline.py --quick"),
                                          ("distilled", "python train_distillation.py --quick")])
def test_missing_checkpoint_names_the_command(trained, tmp_path, monkeypatch, run, command):
    shutil.copytree(trained / "c", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "quick" / run)
    with pytest.raises(utils.UserError, match=command):
        run_again(tmp_path, tmp_path / "r", monkeypatch)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("fault, words", [("gone", "is gone"), ("other", "SHA-256"), ("moved", None), ("none", None)])
def test_teacher_that_is_gone_or_another_is_left_out(trained, tmp_path, monkeypatch, fault, words):
    """The teacher is found by the path recorded when it taught, and held to its SHA-256."""
    shutil.copytree(trained / "c", tmp_path / "c")
    teacher = tmp_path / "c" / "quick" / "teacher" / "best_model.pth"
    recorded = teacher if fault != "moved" else tmp_path / "where it was" / "best_model.pth"
    change(tmp_path, "distilled", teacher={"path": str(recorded), "sha256": utils.sha256(teacher), "val_accuracy": 0.5})
    if fault == "gone":
        teacher.unlink()
    elif fault == "other":
        teacher.write_bytes(teacher.read_bytes() + b"x")
    results = run_again(tmp_path, tmp_path / "r", monkeypatch)
    report = (results / "comparison_report.txt").read_text(encoding="utf-8")
    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    assert ("teacher" in numbers["models"]) == (fault in ("moved", "none")) == ("WARNING: No teacher in this report" not in report)
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
    assert "WARNING: This is no fair pair" in head and "learning_rate (0.004 and 0.123); the validation split" in head


def test_fair_pair_is_not_blamed(trained):
    assert "no fair pair" not in (trained / "r" / "quick" / "comparison_report.txt").read_text(encoding="utf-8")


def test_unfinished_run_is_named(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "c", tmp_path / "c")
    last = tmp_path / "c" / "quick" / "distilled" / "last.pth"
    content = utils.load_file(last)
    content["progress"]["epoch"] -= 1
    torch.save(content, last)
    results = run_again(tmp_path, tmp_path / "r", monkeypatch)
    head = (results / "comparison_report.txt").read_text(encoding="utf-8").replace("\n", " ")
    assert "no fair pair" in head and "distilled is not trained to its end" in head


def test_seeds_of_one_run_alone_name_the_command_for_the_other(trained, tmp_path, monkeypatch):
    for seed in (0, 4):
        shutil.copytree(trained / "c" / "quick" / "baseline", tmp_path / "c" / "quick" / "baseline" / f"seed_{seed}")
    with pytest.raises(utils.UserError, match="python train_distillation.py --seeds 0 4"):
        run_again(tmp_path, tmp_path / "r", monkeypatch)


def test_checkpoint_of_before_a_setting_came_is_read(trained, tmp_path, monkeypatch):
    """Settings are added as the project grows; only those of the split are needed again."""
    shutil.copytree(trained / "c", tmp_path / "c")
    path = tmp_path / "c" / "quick" / "distilled" / "best_model.pth"
    checkpoint = torch.load(path, weights_only=True)
    needed = {"dataset_name", "dataset_dir", "val_fraction", "split_seed", "seed"}
    torch.save({**checkpoint, "config": {name: value for name, value in checkpoint["config"].items() if name in needed}}, path)
    results = run_again(tmp_path, tmp_path / "r", monkeypatch)
    numbers = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    assert numbers["models"]["distilled"]["calibration_scaled"]["temperature"] > 0


def test_last_pth_is_no_model(trained, tmp_path, monkeypatch):
    with pytest.raises(utils.UserError, match="last.pth holds no model"):
        run_again(trained, tmp_path / "r", monkeypatch, "--baseline-checkpoint", str(trained / "c" / "quick" / "baseline" / "last.pth"))


def test_other_classes_cannot_be_compared(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "c", tmp_path / "c")
    change(tmp_path, "distilled", class_names=list("abcdefghij"))
    with pytest.raises(utils.UserError, match="other classes"):
        run_again(tmp_path, tmp_path / "r", monkeypatch)


def test_checkpoints_from_elsewhere(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth", tmp_path / "theirs.pth")
    results = run_again(trained, tmp_path / "r", monkeypatch, "--baseline-checkpoint", str(tmp_path / "theirs.pth"))
    assert "training (h)                                   not known" in (results / "comparison_report.txt").read_text(encoding="utf-8")  # nobody has its history


def test_similar_classes_stand_together():
    """Four groups of six classes, confused within, shuffled: the order brings each group together."""
    order = np.random.default_rng(0).permutation(24)
    confusion = np.kron(np.eye(4), np.full((6, 6), 0.1)) + np.eye(24)
    found = order[evaluate.similarity_order(confusion[np.ix_(order, order)])] // 6
    assert (np.diff(found) != 0).sum() == 3


# Statistics -------------------------------------------------------------------------------------------------------

def entry_of(log_probabilities, val=None, names=None, seed=0, history=()):
    """A model that says what it is told to."""
    classes = log_probabilities.shape[1]
    info = {"class_names": names or [f"c{i}" for i in range(classes)], "num_classes": classes, "dataset": "made up",
            "versions": {}, "config": {"seed": seed}, "model_name": "m", "epoch": 1, "val_accuracy": 0.5, "image_size": 32}
    return evaluate.Entry(ROOT / "README.md", torch.nn.Linear(1, 1), info, log_probabilities, val, list(history))


def answers(predicted, classes, sure=0.9):
    """Log-probabilities (N, C) of a model that gives `sure` to each of `predicted` (N,) and shares out the rest."""
    probabilities = np.full((len(predicted), classes), (1 - sure) / (classes - 1))
    probabilities[np.arange(len(predicted)), predicted] = sure
    return np.log(probabilities)


def random_log_probabilities(n, classes, seed, scale=2.0):
    return scipy.special.log_softmax(scale * np.random.default_rng(seed).standard_normal((n, classes)), axis=1)


def test_calibration_of_four_predictions_by_hand():
    """Confidences 0.95 right, 0.95 wrong, 0.55 right, 0.35 wrong in bins 15, 15, 9, 6 of 15; three classes."""
    probabilities = np.array([[0.95, 0.03, 0.02], [0.95, 0.03, 0.02], [0.25, 0.55, 0.20], [0.33, 0.32, 0.35]])
    labels = np.array([0, 1, 1, 0])
    got = evaluate.calibration(np.log(probabilities), labels)
    assert got["ece"] == pytest.approx(2 / 4 * abs(0.5 - 0.95) + 1 / 4 * abs(1 - 0.55) + 1 / 4 * abs(0 - 0.35))
    brier = (0.05**2 + 0.03**2 + 0.02**2) + (0.95**2 + 0.97**2 + 0.02**2) + (0.25**2 + 0.45**2 + 0.2**2) + \
        (0.67**2 + 0.32**2 + 0.35**2)
    assert got["brier"] == pytest.approx(brier / 4)
    assert got["nll"] == pytest.approx(-np.log([0.95, 0.03, 0.55, 0.33]).mean())


def test_bins_are_equal_in_width_and_closed_above():
    log_probabilities = np.log([[1 / 15 * 12, 1 - 12 / 15], [12 / 15 + 1e-6, 3 / 15 - 1e-6], [1.0, 1e-300], [0.5, 0.5]])
    _, _, share = evaluate.reliability(log_probabilities, np.zeros(4, int))
    assert np.flatnonzero(share).tolist() == [7, 11, 12, 14]


def test_scores_agree_with_scikit_learn():
    log_probabilities, labels = random_log_probabilities(500, 7, 0), np.random.default_rng(1).integers(0, 7, 500)
    got = evaluate.measure(entry_of(log_probabilities), labels, None)
    p = np.exp(log_probabilities)
    assert got["top5"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, p, k=5))
    assert got["calibration"]["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, p))
    assert got["calibration"]["brier"] == pytest.approx(np.mean([np.sum((p[i] - np.eye(7)[labels[i]])**2) for i in range(500)]))
    assert np.allclose(evaluate.confusions([entry_of(log_probabilities)], labels),
                       sklearn.metrics.confusion_matrix(labels, p.argmax(1), normalize="true"))


def test_temperature_scaling_finds_the_temperature():
    """Labels drawn from the probabilities; the model that says it all twice as surely needs T = 2."""
    log_probabilities = random_log_probabilities(20000, 10, 0)
    uniform = np.random.default_rng(1).random((20000, 1))
    labels = (uniform > np.exp(log_probabilities).cumsum(1)).sum(1).clip(max=9)
    too_sure = scipy.special.log_softmax(2 * log_probabilities, axis=1)
    temperature = evaluate.best_temperature(too_sure, labels)
    assert temperature == pytest.approx(2, rel=0.03)
    scaled = evaluate.soften(too_sure, temperature)
    assert np.allclose(np.exp(scaled).sum(1), 1)
    assert evaluate.calibration(scaled, labels)["ece"] < 0.02 < 0.1 < evaluate.calibration(too_sure, labels)["ece"]


def test_temperature_is_fitted_on_validation_images_alone():
    log_probabilities, labels = random_log_probabilities(300, 5, 0), np.random.default_rng(1).integers(0, 5, 300)
    val, val_labels = random_log_probabilities(200, 5, 2), np.random.default_rng(3).integers(0, 5, 200)
    got = evaluate.measure(entry_of(log_probabilities, val), labels, val_labels)["calibration_scaled"]
    assert got["temperature"] == evaluate.best_temperature(val, val_labels) != evaluate.best_temperature(log_probabilities, labels)


def test_mcnemar_on_a_published_table():
    """Fagerland, Lydersen and Laake (BMC Medical Research Methodology 2013, 13:91): 59, 6, 16, 80 gives exact p = 0.0525."""
    assert evaluate.mcnemar_p(6, 16) == evaluate.mcnemar_p(16, 6) == pytest.approx(0.0525, abs=5e-5)
    assert evaluate.mcnemar_p(0, 0) == evaluate.mcnemar_p(5, 5) == 1.0
    assert evaluate.mcnemar_p(0, 5) == pytest.approx(2 / 32)


def test_bootstrap_agrees_with_drawing_images():
    gain = np.random.default_rng(0).choice([-1, -0.5, 0, 0.5, 1], size=400, p=[0.1, 0.1, 0.5, 0.1, 0.2])
    drawn = np.random.default_rng(1).choice(gain, (10000, 400)).mean(1)
    assert evaluate.bootstrap_interval(gain) == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.004)
    assert evaluate.bootstrap_interval(gain) == evaluate.bootstrap_interval(gain)
    assert evaluate.bootstrap_interval(np.zeros(50)) == [0, 0]


def test_bootstrap_interval_covers_the_truth_95_times_in_100():
    random, covered = np.random.default_rng(0), 0
    for i in range(1000):
        gain = random.choice([-1.0, 0.0, 1.0], size=1000, p=[0.06, 0.85, 0.09])
        low, high = evaluate.bootstrap_interval(gain, seed=i)
        covered += low <= 0.03 <= high
    assert 930 <= covered <= 970


def test_t_interval_agrees_with_scipy():
    values = [0.012, 0.02, 0.007, 0.015]
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert evaluate.t_interval(values) == pytest.approx(list(wanted))


def test_fidelity_by_hand_and_by_scipy():
    teacher, student = random_log_probabilities(200, 6, 0), random_log_probabilities(200, 6, 1)
    labels = np.random.default_rng(2).integers(0, 6, 200)
    got = evaluate.fidelity(student, teacher, labels)
    assert got["kl"] == pytest.approx(np.mean([scipy.stats.entropy(np.exp(t), np.exp(s)) for t, s in zip(teacher, student)]))
    same = [t.argmax() == s.argmax() for t, s in zip(teacher, student)]
    wrong = [t.argmax() != label for t, label in zip(teacher, labels)]
    assert got["agreement"] == pytest.approx(np.mean(same))
    assert got["agreement_where_teacher_errs"] == pytest.approx(sum(a and b for a, b in zip(same, wrong)) / sum(wrong))
    assert evaluate.fidelity(teacher, teacher, labels) == {"agreement": 1, "kl": 0, "agreement_where_teacher_errs": 1}
    assert evaluate.fidelity(student, teacher, teacher.argmax(1))["agreement_where_teacher_errs"] is None


def pair_of(labels, wrong_baseline, wrong_distilled, seeds=1):
    """Entries of a pair that err on the first so many, and the last so many, of the images; one more with each seed."""
    def group(chosen):
        return [entry_of(answers(np.where(chosen(seed), (labels + 1) % 10, labels), 10), seed=seed) for seed in range(seeds)]
    place = np.arange(len(labels))
    return {"baseline": group(lambda seed: place < wrong_baseline + seed),
            "distilled": group(lambda seed: place >= len(labels) - wrong_distilled - 2 * seed)}


@pytest.mark.parametrize("wrong, verdict, words", [((60, 20), "better", "is better than the baseline: +4.00 points"),
                                                   ((20, 60), "worse", "is worse than the baseline: -4.00 points"),
                                                   ((33, 30), "undecided", "cannot tell whether distillation helped: +0.30")])
def test_verdict_follows_the_interval(wrong, verdict, words):
    labels = np.arange(1000) % 10
    comparison = evaluate.compare(pair_of(labels, *wrong), labels, None)["comparison"]
    low, high = comparison["interval_over_images"]
    assert comparison["difference"] == pytest.approx((wrong[0] - wrong[1]) / 1000)
    assert comparison["verdict"] == verdict and low < comparison["difference"] < high
    assert (comparison["baseline_alone_right"], comparison["distilled_alone_right"]) == (wrong[1], wrong[0])
    assert comparison["mcnemar_p_by_seed"] == [pytest.approx(scipy.stats.binomtest(wrong[0], sum(wrong)).pvalue)]
    sentence = evaluate.verdict_sentence(comparison)
    assert words in sentence and "over test images" in sentence and ("better" in sentence) == (verdict == "better")


def test_from_three_seeds_on_the_verdict_rests_on_them():
    labels = np.arange(1000) % 10
    two, three = (evaluate.compare(pair_of(labels, 60, 20, seeds), labels, None) for seeds in (2, 3))
    assert two["comparison"]["rests_on"] == "images" and three["comparison"]["rests_on"] == "seeds"
    assert three["comparison"]["difference_by_seed"] == pytest.approx([0.040, 0.039, 0.038])
    assert three["comparison"]["interval_over_seeds"] == pytest.approx(
        list(scipy.stats.ttest_1samp([0.040, 0.039, 0.038], 0).confidence_interval()))
    assert "over 3 seeds, paired t-test" in evaluate.verdict_sentence(three["comparison"])
    baseline = three["models"]["baseline"]
    assert baseline["top1"] == pytest.approx(0.939) and baseline["sd"]["top1"] == pytest.approx(0.001) and three["seeds"] == [0, 1, 2]


def test_confused_pairs_and_changed_classes_by_hand():
    labels = np.repeat(np.arange(3), 10)
    before, after = labels.copy(), labels.copy()
    before[:4], after[:1], after[20:23] = 1, 1, 0
    entries = {"baseline": [entry_of(answers(before, 3))], "distilled": [entry_of(answers(after, 3))]}
    numbers = evaluate.compare(entries, labels, None)
    assert numbers["confused_pairs"] == [{"true": "c0", "predicted": "c1", "baseline": pytest.approx(0.4), "distilled": pytest.approx(0.1)},
                                         {"true": "c2", "predicted": "c0", "baseline": 0, "distilled": pytest.approx(0.3)}]
    lines = "\n".join(evaluate.changes_lines(numbers["models"]))
    assert lines.index("c0") < lines.index("c2") and "+30.00" in lines and "-30.00" in lines and "c1" not in lines


def test_superclasses_are_cifar100s():
    members = [name for line in data_loader.CIFAR100_SUPERCLASSES.values() for name in line.split()]
    assert len(data_loader.CIFAR100_SUPERCLASSES) == 20 and len(set(members)) == len(members) == 100
    assert all(len(line.split()) == 5 for line in data_loader.CIFAR100_SUPERCLASSES.values())
    names = sorted(members)
    labels = np.arange(100)
    predicted = labels.copy()
    predicted[names.index("oak_tree")], predicted[names.index("baby")] = names.index("maple_tree"), names.index("tank")
    entries = {run: [entry_of(answers(predicted, 100), names=names)] for run in ("baseline", "distilled")}
    numbers = evaluate.compare(entries, labels, None)
    assert numbers["superclasses"]["distilled"] == {"errors": 2, "within_superclass": 1}
    assert evaluate.superclass_errors(entries, labels, [f"c{i}" for i in range(100)]) is None


def test_diagnostics_figure_shows_the_histories():
    """Two seeds, one of them from before there were diagnostics, an epoch of it gone on with: what is there is drawn, as it is."""
    def history(start, *columns):
        return [{"epoch": i, "ce_loss": start + i, **{name: (start + i) / 100 for name in columns}} for i in (1, 2, 3)]
    new = history(10, "kd_loss", "entropy", "train_accuracy", "teacher_entropy", "target_entropy", "teacher_accuracy")
    mixed = history(20, "kd_loss", "train_accuracy") + [dict(new[-1], epoch=4)]
    plain = history(30, "entropy", "train_accuracy")
    info = {"config": {"alpha": 0.75}, "num_classes": 10, "teacher": {"val_accuracy": 0.5}}
    entries = {run: [types.SimpleNamespace(history=rows, info=info) for rows in group]
               for run, group in (("baseline", [plain, []]), ("distilled", [new, mixed]), ("teacher", [plain]))}
    figure = evaluate.diagnostics_figure(entries)
    drawn = {axis.get_title(): [(list(line.get_xdata()), pytest.approx(list(line.get_ydata()))) for line in axis.lines] for axis in figure.axes}
    labels = {axis.get_title(): [text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes}
    evaluate.plt.close(figure)
    all_epochs, later, across = [1, 2, 3], [4], [0, 1]
    assert drawn["Cross-entropy with the labels"] == [(all_epochs, [31, 32, 33]), (all_epochs, [11, 12, 13]), ([1, 2, 3, 4], [21, 22, 23, 13])]
    assert drawn["Parts of the distilled student's loss"] == [
        (all_epochs, [.11 * .75, .12 * .75, .13 * .75]), ([1, 2, 3, 4], [.21 * .75, .22 * .75, .23 * .75, .13 * .75]),
        (all_epochs, [11 / 4, 12 / 4, 13 / 4]), ([1, 2, 3, 4], [21 / 4, 22 / 4, 23 / 4, 13 / 4])]
    assert drawn["Entropy of the predictions"] == [(all_epochs, [.31, .32, .33]), *[(all_epochs, [.11, .12, .13]), (later, [.13])] * 3,
                                                   (across, [math.log(10)] * 2)]
    assert drawn["Accuracy"] == [(all_epochs, [31, 32, 33]), (all_epochs, [11, 12, 13]), ([1, 2, 3, 4], [21, 22, 23, 13]),
                                 (all_epochs, [11, 12, 13]), (later, [13]), (across, [50, 50])]
    assert labels["Parts of the distilled student's loss"] == ["0.75 × soft part (kd)", "0.25 × cross-entropy"]
    assert labels["Accuracy"] == ["Baseline", "Distilled", "Teacher", "Teacher on validation images"]


@pytest.mark.parametrize("classes, images", [(100, 10000), (102, 2000)])
def test_statistics_and_figures_are_quick_and_small(tmp_path, classes, images):
    """Three models, 10,000 images, 100 classes: under 60 s, and nothing images x images or images x resamples in memory."""
    labels = np.arange(images) % classes
    logits = 4 * np.eye(classes)[labels] + np.random.default_rng(0).standard_normal((images, classes))
    history = [{"epoch": i, "ce_loss": 1 / i, "val_accuracy": i / 9, "seconds": 60.0} for i in range(1, 9)]
    entries = {run: [entry_of(scipy.special.log_softmax(
        logits + np.random.default_rng(i).standard_normal((images, classes)), axis=1), random_log_probabilities(500, classes, 9),
        names=[f"a class with a long name {i}" for i in range(classes)], history=history)]
        for i, run in enumerate(("baseline", "distilled", "teacher"))}
    test = data_loader.Images(torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8), None, torch.from_numpy(labels), [])
    val_labels = np.arange(500) % classes
    start = time.perf_counter()
    numbers = evaluate.compare(entries, labels, val_labels)
    evaluate.write_figures(entries, labels, val_labels, test, numbers, tmp_path)
    assert time.perf_counter() - start < 60
    tracemalloc.start()
    evaluate.compare(entries, labels, val_labels)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20  # 10,000 x 10,000 numbers would be 800 MB
    tracemalloc.stop()
    numbers |= {"notes": {"unfair": [], "no_teacher": None, "no_validation": None, "left_out": []}, "timings": {
        "device": "none", **evaluate.training_hours(entries), "latency_ms": dict.fromkeys(entries, 1.0), "throughput": dict.fromkeys(entries, 1.0)}}
    assert max(map(len, evaluate.write_report(numbers).splitlines())) <= 100


def test_seeds_of_both_runs_are_used_and_the_rest_is_named(trained, tmp_path, monkeypatch):
    for run, seeds in (("baseline", (0, 1, 2, 5)), ("distilled", (1, 0, 2, 7))):
        for seed in seeds:
            shutil.copytree(trained / "c" / "quick" / run, tmp_path / "c" / "quick" / run / f"seed_{seed}")
            path = tmp_path / "c" / "quick" / run / f"seed_{seed}" / "best_model.pth"
            checkpoint = torch.load(path, weights_only=True)
            torch.save({**checkpoint, "config": {**checkpoint["config"], "seed": seed}}, path)
    shutil.copytree(trained / "c" / "quick" / "baseline",
                    tmp_path / "c" / "quick" / "baseline" / "seed_0.1")
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth", tmp_path / "c" / "quick" / "baseline")
    results = run_again(tmp_path, tmp_path / "r", monkeypatch)
    report = (results / "comparison_report.txt").read_text(encoding="utf-8").replace("\n", " ")
    assert "seeds 0, 1, 2" in report and "±" in report and "over 3 seeds" in report
    assert "Left out: baseline seed 5 (the other run lacks it), distilled seed 7 (the other run lacks it), the plain baseline run." in report
