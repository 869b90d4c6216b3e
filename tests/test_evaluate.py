"""Numbers of the comparison against scikit-learn, and what evaluate.py says of what is missing.

    python -m pytest tests/test_evaluate.py
"""
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
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

import config
import data_loader
import evaluate
import models
import train_baseline
import train_distillation
import utils
from conftest import ROOT, STUDENT, TEACHER

RUNS = ("baseline", "distilled", "teacher")


def flags_of(folder, results=None):
    return ["--quick", "--device", "cpu", "--checkpoint-dir", str(folder / "c"), "--results-dir",
            str(results or folder / "r")]


def run_again(folder, target, *flags):
    """Evaluate the pair in `folder`; returns the folder of results."""
    evaluate.main(config.parse_args("evaluate", "", [*flags_of(folder, target), *map(str, flags)]))
    return target / "quick"


def numbers_in(results):
    return json.loads((results / "comparison.json").read_text(encoding="utf-8"))


def report_in(results):
    return (results / "comparison_report.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small finished pair on digits, evaluated once."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*flags_of(folder), *STUDENT, "--num-epochs", "4"]
    train_baseline.main(config.parse_args("baseline", "", common))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "min_teacher_accuracy", lambda classes: 0.0)  # four epochs teach little
        train_distillation.main(config.parse_args(
            "distillation", "", [*common, *TEACHER, "--teacher-epochs", "3"]))
    run_again(folder, folder / "r")
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the pair that a test may spoil."""
    shutil.copytree(trained / "c", tmp_path / "c")
    return tmp_path


def change(folder, run, **values):
    """Change what a checkpoint says of itself."""
    path = folder / "c" / "quick" / run / "best_model.pth"
    checkpoint = torch.load(path, weights_only=True)
    settings = {**checkpoint["config"], **values.get("config", {})}
    torch.save({**checkpoint, **values, "config": settings}, path)


def test_numbers_agree_with_an_independent_reading_of_the_checkpoints(trained):
    """timm and scikit-learn alone, from the checkpoint's own preprocessing to every score."""
    results = trained / "r" / "quick"
    numbers, saved = numbers_in(results), np.load(results / "predictions.npz")
    assert set(saved) == {"labels", "class_names", *RUNS}
    test, names = data_loader.load_split("Digits", "test", None)
    labels = test.labels.numpy()
    assert np.array_equal(saved["labels"], labels) and saved["class_names"].tolist() == names
    for run in RUNS:
        path = trained / "c" / "quick" / run / "best_model.pth"
        checkpoint = torch.load(path, weights_only=True)
        model = timm.create_model(checkpoint["model_name"], num_classes=10)
        model.load_state_dict(checkpoint["state_dict"])
        transform = data_loader.build_transform(checkpoint)
        images = torch.stack([transform(data_loader.load_image(test, i)) for i in range(360)])
        with torch.inference_mode():
            probabilities = model.eval()(images).softmax(1).numpy()
        assert saved[run].dtype == np.float32 and saved[run].shape == (360, 10)
        # Resized on bytes there, on floats here.
        np.testing.assert_allclose(saved[run], probabilities, atol=0.05)
        assert_scores_are_scikit_learns(saved[run], labels, numbers["models"][run])
        scores = numbers["models"][run]
        assert scores["parameters"] == sum(p.numel() for p in model.parameters())
        assert scores["val_accuracy"] == checkpoint["val_accuracy"]
        assert scores["calibration_scaled"]["temperature"] > 0
        history = utils.load_checkpoint(path.with_name("last.pth"))["history"]
        hours = sum(row["seconds"] for row in history) / 3600
        assert numbers["timings"]["training_hours"][run] == pytest.approx(hours)


def assert_scores_are_scikit_learns(probabilities, labels, scores):
    predictions = probabilities.argmax(1)
    double = probabilities.astype(float)
    double /= double.sum(1, keepdims=True)
    top5 = [label in row.argsort()[-5:] for row, label in zip(probabilities, labels, strict=True)]
    recall = sklearn.metrics.recall_score(labels, predictions, average=None)
    assert scores["top1"] == pytest.approx((predictions == labels).mean())
    assert scores["top5"] == pytest.approx(np.mean(top5))
    assert scores["macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro"))
    assert scores["calibration"]["nll"] == pytest.approx(
        sklearn.metrics.log_loss(labels, double), rel=1e-5)
    assert list(scores["per_class_accuracy"].values()) == pytest.approx(recall.tolist())


FIGURES = ("training_curves", "distillation_diagnostics", "accuracy_comparison",
           "reliability_diagram", "class_changes", "gallery", "confusion_matrix_baseline",
           "confusion_matrix_distilled", "confusion_matrix_teacher")


def test_report_and_figures(trained):
    results = trained / "r" / "quick"
    report = report_in(results)
    assert max(map(len, report.splitlines())) <= 100
    assert "test_efficientnet alone against test_efficientnet taught by test_resnet" in report
    assert "360 test images of 10 classes, seed 42" in report and "its teacher's" in report
    for name in FIGURES:
        with data_loader.Image.open(results / f"{name}.png") as image:
            assert round(image.info["dpi"][0]) == 200 and image.width > 800
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (trained / "c" / "quick" / "best_model.pth").is_file()


def test_rerun_gives_the_same_files(trained, tmp_path):
    first, again = trained / "r" / "quick", run_again(trained, tmp_path / "r")
    files = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")]
    for name in (*files, "predictions.npz", "comparison.json", "comparison_report.txt"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.parametrize("run, script", [("baseline", "train_baseline.py"),
                                         ("distilled", "train_distillation.py")])
def test_missing_checkpoint_names_the_command(copied, run, script):
    """With the settings of the other run, so that it makes a fair pair, and this call's folders."""
    shutil.rmtree(copied / "c" / "quick" / run)
    with pytest.raises(utils.UserError) as error:
        run_again(copied, copied / "r")
    command = str(error.value).partition("; make it with: ")[2]
    settings = f"--student-model {STUDENT[1]} --num-epochs 4"
    if run == "baseline":
        assert "--teacher" not in command
    assert command == (f"python {script} --quick --device cpu --checkpoint-dir {copied / 'c'} "
                       f"--results-dir {copied / 'r'} {settings}")
    assert not (copied / "r").exists()


def test_missing_checkpoints_of_a_new_project_name_the_first_command(tmp_path):
    with pytest.raises(utils.UserError, match="make it with: python train_baseline.py --quick"):
        run_again(tmp_path, tmp_path / "r")


def test_the_same_checkpoint_twice_is_no_comparison(copied):
    for run in ("baseline", "distilled"):
        path = copied / "c" / "quick" / run / "best_model.pth"
        flags = [f"--{other}-checkpoint" for other in ("baseline", "distilled") if other != run]
        with pytest.raises(utils.UserError, match="one and the same checkpoint"):
            run_again(copied, copied / "r", *flags, path)


def test_test_images_that_were_trained_on_are_named(copied, monkeypatch):
    load_split = data_loader.load_split

    def leaky(name, part, args):
        images, names = load_split(name, part, args)
        if part == "test":
            pixels = torch.cat([load_split(name, "train", args)[0].pixels[:6], images.pixels[6:]])
            images = images._replace(pixels=pixels)
        return images, names
    monkeypatch.setattr(data_loader, "load_split", leaky)
    results = run_again(copied, copied / "r")
    report = report_in(results).replace("\n", " ")
    assert numbers_in(results)["notes"]["trained_on"] == [f"number {i}" for i in range(6)]
    assert ("WARNING: 6 test images are, to the bit, among the training or validation images too: "
            "number 0, number 1, number 2, number 3, number 4, ….") in report


@pytest.mark.parametrize("fault, words", [("gone", "is gone"), ("other", "SHA-256"),
                                          ("moved", None), ("none", None)])
def test_teacher_that_is_gone_or_another_is_left_out(copied, fault, words):
    """The teacher is found by the path recorded when it taught, and held to its SHA-256."""
    teacher = copied / "c" / "quick" / "teacher" / "best_model.pth"
    recorded = teacher if fault != "moved" else copied / "where it was" / "best_model.pth"
    change(copied, "distilled", teacher={"path": str(recorded), "val_accuracy": 0.5,
                                         "sha256": utils.sha256(teacher)})
    if fault == "gone":
        teacher.unlink()
    elif fault == "other":
        teacher.write_bytes(teacher.read_bytes() + b"x")
    results = run_again(copied, copied / "r")
    report, there = report_in(results), fault in ("moved", "none")
    assert ("teacher" in numbers_in(results)["models"]) == there
    assert ("WARNING: No teacher in this report" not in report) == there
    assert words is None or words in report.replace("\n", " ")


def test_unfair_pair_is_named(copied):
    change(copied, "distilled", config={"learning_rate": 0.123}, split_fingerprint="other")
    head = report_in(run_again(copied, copied / "r")).replace("\n", " ")
    assert "WARNING: This is no fair pair" in head
    assert "learning_rate (0.003 and 0.123); the validation split" in head


def test_fair_pair_is_not_blamed(trained):
    assert "no fair pair" not in report_in(trained / "r" / "quick")
    assert "to the bit" not in report_in(trained / "r" / "quick")


def test_unfinished_run_is_named(copied):
    last = copied / "c" / "quick" / "distilled" / "last.pth"
    content = utils.load_checkpoint(last)
    content["history"].pop()
    torch.save(content, last)
    head = report_in(run_again(copied, copied / "r")).replace("\n", " ")
    assert "no fair pair" in head and "distilled is not trained to its end" in head


def test_seeds_of_one_run_alone_name_the_command_for_the_other(trained, tmp_path):
    for seed in (0, 4):
        shutil.copytree(trained / "c" / "quick" / "baseline",
                        tmp_path / "c" / "quick" / "baseline" / f"seed_{seed}")
        change(tmp_path, f"baseline/seed_{seed}", config={"argv": ["--seeds", "4", "--quick"]})
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth",
                tmp_path / "c" / "quick" / "baseline")
    change(tmp_path, "baseline", config={"argv": ["--seed", "9"]})  # a plain run beside the seeds
    with pytest.raises(utils.UserError, match="python train_distillation.py --seeds 0 4 --quick"):
        run_again(tmp_path, tmp_path / "r")


def test_last_pth_is_no_model(trained, tmp_path):
    last = trained / "c" / "quick" / "baseline" / "last.pth"
    with pytest.raises(utils.UserError, match="last.pth holds no model"):
        run_again(trained, tmp_path / "r", "--baseline-checkpoint", last)


def test_other_classes_cannot_be_compared(copied):
    change(copied, "baseline", class_names=[*"01234567", "eight", "nine"])
    with pytest.raises(utils.UserError, match="cannot be compared .*; 4 differ: 8, 9, eight, nine"):
        run_again(copied, copied / "r")
    change(copied, "baseline", class_names=list("1023456789"))
    with pytest.raises(utils.UserError, match="cannot be compared .*; their order differs"):
        run_again(copied, copied / "r")
    change(copied, "distilled", class_names=list("abcdefghij"))
    with pytest.raises(utils.UserError, match="other classes .*; 20 differ: 0, 1, "):
        run_again(copied, copied / "r")


def test_checkpoints_from_elsewhere(trained, tmp_path):
    theirs = tmp_path / "theirs.pth"
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth", theirs)
    report = report_in(run_again(trained, tmp_path / "r", "--baseline-checkpoint", theirs))
    assert "What training cost is not known of: baseline." in report  # nobody has its history


def test_seeds_of_both_runs_are_used_and_the_rest_is_named(trained, tmp_path):
    folder = tmp_path / "c" / "quick"
    for run, seeds in (("baseline", (0, 1, 2, 5)), ("distilled", (1, 0, 2, 7))):
        for seed in seeds:
            shutil.copytree(trained / "c" / "quick" / run, folder / run / f"seed_{seed}")
            change(tmp_path, f"{run}/seed_{seed}", config={"seed": seed})
    shutil.copytree(trained / "c" / "quick" / "baseline", folder / "baseline" / "seed_0.1")
    shutil.copy(trained / "c" / "quick" / "baseline" / "best_model.pth", folder / "baseline")
    report = report_in(run_again(tmp_path, tmp_path / "r")).replace("\n", " ")
    assert "seeds 0, 1, 2" in report and "±" in report
    assert "over 3 seeds and the test images" in report
    assert "Left out: the plain baseline run, baseline seed 5, distilled seed 7." in report


def test_similar_classes_stand_together():
    """Four groups of six classes, confused within, shuffled: each group comes together."""
    order = np.random.default_rng(0).permutation(24)
    confusion = np.kron(np.eye(4), np.full((6, 6), 0.1)) + np.eye(24)
    found = order[evaluate.class_order(confusion[np.ix_(order, order)])] // 6
    assert (np.diff(found) != 0).sum() == 3
    assert evaluate.class_order(np.eye(20)).tolist() == list(range(20))


# Statistics ---------------------------------------------------------------------------------------

def entry_of(log_probs, temperature=None, names=None, seed=0, history=()):
    """A model that says what it is told to."""
    classes = log_probs.shape[1]
    info = {"class_names": names or [f"c{i}" for i in range(classes)], "num_classes": classes,
            "dataset": "made up", "versions": {}, "config": {"seed": seed, "dataset_dir": None},
            "model_name": "m", "run": "baseline", "epoch": 1, "val_accuracy": 0.5, "image_size": 32}
    model = torch.nn.Linear(1, 1)
    return evaluate.Entry(ROOT / "README.md", model, info, log_probs, temperature, list(history))


def answers(predicted, classes, sure=0.9):
    """Log-probabilities (N, C) of a model that gives `sure` to each of `predicted` (N,)."""
    probabilities = np.full((len(predicted), classes), (1 - sure) / (classes - 1))
    probabilities[np.arange(len(predicted)), predicted] = sure
    return np.log(probabilities)


def random_answers(n, classes, seed, scale=2.0):
    logits = scale * np.random.default_rng(seed).standard_normal((n, classes))
    return scipy.special.log_softmax(logits, axis=1)


def test_calibration_of_four_predictions_by_hand():
    """Confidences 0.95 right, 0.95 wrong, 0.55 right, 0.35 wrong in bins 15, 15, 9, 6 of 15."""
    probabilities = np.array([[0.95, 0.03, 0.02], [0.95, 0.03, 0.02], [0.25, 0.55, 0.20],
                              [0.33, 0.32, 0.35]])
    labels = np.array([0, 1, 1, 0])
    got = evaluate.calibration(np.log(probabilities), labels)
    ece = 2 / 4 * abs(0.5 - 0.95) + 1 / 4 * abs(1 - 0.55) + 1 / 4 * abs(0 - 0.35)
    assert got["ece"] == pytest.approx(ece)
    brier = [0.05**2 + 0.03**2 + 0.02**2, 0.95**2 + 0.97**2 + 0.02**2,
             0.25**2 + 0.45**2 + 0.2**2, 0.67**2 + 0.32**2 + 0.35**2]
    assert got["brier"] == pytest.approx(np.mean(brier))
    assert got["nll"] == pytest.approx(-np.log([0.95, 0.03, 0.55, 0.33]).mean())


def test_bins_are_equal_in_width_and_closed_above():
    log_probs = np.log([[12 / 15, 1 - 12 / 15], [12 / 15 + 1e-6, 3 / 15 - 1e-6], [1.0, 1e-300],
                        [0.5, 0.5]])
    _, _, counts = evaluate.reliability(log_probs, np.zeros(4, int))
    assert np.flatnonzero(counts).tolist() == [7, 11, 12, 14]


def test_scores_agree_with_scikit_learn():
    log_probs = random_answers(500, 7, 0)
    labels = np.random.default_rng(1).integers(0, 7, 500)
    got = evaluate.measure(entry_of(log_probs), labels)
    p = np.exp(log_probs)
    assert got["top5"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, p, k=5))
    assert got["calibration"]["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, p))
    brier = np.mean([np.sum((p[i] - np.eye(7)[labels[i]])**2) for i in range(500)])
    assert got["calibration"]["brier"] == pytest.approx(brier)


def test_temperature_scaling_finds_the_temperature():
    """Labels drawn from the probabilities; the model that says it twice as surely needs T = 2."""
    log_probs = random_answers(20000, 10, 0)
    uniform = np.random.default_rng(1).random((20000, 1))
    labels = (uniform > np.exp(log_probs).cumsum(1)).sum(1).clip(max=9)
    too_sure = scipy.special.log_softmax(2 * log_probs, axis=1)
    temperature = evaluate.best_temperature(too_sure, labels)
    assert temperature == pytest.approx(2, rel=0.03)
    scores = evaluate.measure(entry_of(too_sure, temperature), labels)
    assert scores["calibration_scaled"]["ece"] < 0.02 < 0.1 < scores["calibration"]["ece"]


def test_temperature_is_fitted_on_the_validation_images(trained):
    """From the checkpoint, on the split that the students were not trained on, by timm alone."""
    numbers = numbers_in(trained / "r" / "quick")
    args = config.parse_args("baseline", "", flags_of(trained))
    val = data_loader.open_dataset(args).val
    model, info = models.load_model(trained / "c" / "quick" / "distilled" / "best_model.pth")
    loader = data_loader.EvaluationLoader(val, info, args, torch.device("cpu"))
    logits, labels = models.infer(model, loader)
    log_probs = logits.double().log_softmax(1).numpy()
    wanted = evaluate.best_temperature(log_probs, labels.numpy())
    scaled = numbers["models"]["distilled"]["calibration_scaled"]
    assert scaled["temperature"] == pytest.approx(wanted, rel=1e-4)


def test_interval_over_images_agrees_with_scipys_t_and_bootstrap():
    gain = np.random.default_rng(0).choice([-1.0, 0, 1], size=800, p=[0.1, 0.75, 0.15])
    got = evaluate.interval(gain[None])
    assert got == pytest.approx(list(scipy.stats.ttest_1samp(gain, 0).confidence_interval()))
    drawn = scipy.stats.bootstrap([gain], np.mean, n_resamples=2000, batch=100, rng=1)
    assert got == pytest.approx(list(drawn.confidence_interval), abs=0.002)
    assert evaluate.interval(np.zeros((1, 50))) == evaluate.interval(np.zeros((3, 50))) == [0, 0]


def test_interval_over_seeds_and_images_by_hand():
    """Sums of squares written out."""
    gains = [[1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, -1, 0, 0, 0], [1, 1, 0, 1, 0, 1, 1, 0]]
    S, N, mean = 3, 8, sum(map(sum, gains)) / 24
    seeds = [sum(row) / N for row in gains]
    images = [sum(row[i] for row in gains) / S for i in range(N)]
    a = N * sum((x - mean)**2 for x in seeds) / (S - 1)
    b = S * sum((x - mean)**2 for x in images) / (N - 1)
    e = sum((gains[s][i] - seeds[s] - images[i] + mean)**2
            for s in range(S) for i in range(N)) / ((S - 1) * (N - 1))
    assert a > e
    half = scipy.stats.t.ppf(0.975, S - 1) * math.sqrt((a + b - e) / (S * N))
    assert evaluate.interval(np.array(gains)) == pytest.approx([mean - half, mean + half])
    alike = np.array([gains[0], gains[0][::-1]])  # no seed is better than another
    assert evaluate.interval(alike) == pytest.approx(evaluate.interval(alike.mean(0)[None]))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("scatter", [0, 0.1])
def test_interval_over_both_covers_the_truth_95_times_in_100(seeds, scatter):
    """1,000 comparisons of equal methods on 1,000 images of unequal difficulty. A training run is
    better or worse by chance, and each method has images that suit it."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        difficulty, taste = random.normal(1, 2, 1000), random.normal(0, 0.5, 1000)
        luck = random.normal(0, scatter, (2, seeds, 1))
        right = [random.random((seeds, 1000)) < scipy.special.expit(difficulty + side + chance)
                 for side, chance in zip((taste, -taste), luck, strict=True)]
        low, high = evaluate.interval(right[0].astype(float) - right[1])
        covered += low <= 0 <= high
    assert 930 <= covered <= 970


def test_t_interval_agrees_with_the_formula():
    values = [0.012, 0.02, 0.007, 0.015]
    interval, p = evaluate.t_test(values)
    reach = scipy.stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert interval == pytest.approx([np.mean(values) - reach, np.mean(values) + reach])
    assert p == pytest.approx(scipy.stats.ttest_rel(values, [0] * 4).pvalue)
    assert evaluate.t_test([0.1]) == evaluate.t_test([0.1, 0.1]) == (None, None)


def test_fidelity_by_hand_and_by_scipy():
    teacher, student = entry_of(random_answers(200, 6, 0)), entry_of(random_answers(200, 6, 1))
    got = evaluate.fidelity(student, teacher)
    pairs = list(zip(np.exp(teacher.log_probs), np.exp(student.log_probs), strict=True))
    assert got["kl"] == pytest.approx(np.mean([scipy.stats.entropy(t, s) for t, s in pairs]))
    same = [t.argmax() == s.argmax() for t, s in pairs]
    assert got["agreement"] == pytest.approx(np.mean(same))
    assert evaluate.fidelity(teacher, teacher) == {"agreement": 1, "kl": 0}


def pair_of(labels, wrong_baseline, wrong_distilled, seeds=1):
    """A pair that errs on the first so many, and the last so many, images; more with each seed."""
    def group(chosen):
        return [entry_of(answers(np.where(chosen(seed), (labels + 1) % 10, labels), 10), seed=seed)
                for seed in range(seeds)]
    place = np.arange(len(labels))
    return {"baseline": group(lambda seed: place < wrong_baseline + seed),
            "distilled": group(lambda seed: place >= len(labels) - wrong_distilled - 2 * seed)}


@pytest.mark.parametrize("wrong, verdict, words", [
    ((60, 20), "better", "is better than the baseline: +4.00 points"),
    ((20, 60), "worse", "is worse than the baseline: -4.00 points"),
    ((33, 30), "undecided", "cannot tell whether distillation helped: +0.30")])
def test_verdict_follows_the_interval(wrong, verdict, words):
    labels = np.arange(1000) % 10
    numbers = evaluate.compare(pair_of(labels, *wrong), labels, None)
    comparison = numbers["comparison"]
    low, high = comparison["interval_over_images"]
    assert comparison["difference"] == pytest.approx((wrong[0] - wrong[1]) / 1000)
    assert comparison["verdict"] == verdict and low < comparison["difference"] < high
    alone = (comparison["baseline_alone_right"], comparison["distilled_alone_right"])
    assert alone == (wrong[1], wrong[0])
    p = scipy.stats.binomtest(wrong[0], sum(wrong)).pvalue
    assert comparison["mcnemar_p_by_seed"] == [pytest.approx(p)]
    sentence, = evaluate.verdict_lines(numbers)
    assert words in sentence and "over test images" in sentence
    assert ("better" in sentence) == (verdict == "better")


def test_images_are_compared_in_pairs():
    """Both err on the same 200 images, one on 20 more: sure in pairs, and only in pairs."""
    labels = np.arange(1000) % 10
    wrong = np.where(np.arange(1000)[:, None] < [220, 200], (labels + 1)[:, None] % 10,
                     labels[:, None]).T
    entries = {run: [entry_of(answers(predicted, 10))]
               for run, predicted in zip(("baseline", "distilled"), wrong, strict=True)}
    comparison = evaluate.compare(entries, labels, None)["comparison"]
    right = (wrong == labels).astype(float)
    pairs = scipy.stats.ttest_rel(right[1], right[0]).confidence_interval()
    assert comparison["interval_over_images"] == pytest.approx(list(pairs))
    assert comparison["verdict"] == "better"
    assert scipy.stats.ttest_ind(right[1], right[0]).pvalue > 0.2


def test_mcnemar_on_a_published_table():
    """Fagerland, Lydersen and Laake (BMC Medical Research Methodology 2013, 13:91): p = 0.0525."""
    labels = np.arange(161) % 10
    for wrong, p in (((6, 16), 0.0525), ((16, 6), 0.0525), ((0, 0), 1), ((0, 5), 2 / 32)):
        comparison = evaluate.compare(pair_of(labels, *wrong), labels, None)["comparison"]
        assert comparison["mcnemar_p_by_seed"] == [pytest.approx(p, abs=5e-5)]


def test_from_three_seeds_on_the_verdict_rests_on_seeds_and_images():
    labels = np.arange(1000) % 10
    two, three = (evaluate.compare(pair_of(labels, 60, 20, seeds), labels, None)
                  for seeds in (2, 3))
    comparison, gains = three["comparison"], [0.040, 0.039, 0.038]
    assert two["comparison"]["rests_on"] == "images" and comparison["rests_on"] == "both"
    assert comparison["difference_by_seed"] == pytest.approx(gains)
    interval = scipy.stats.ttest_1samp(gains, 0).confidence_interval()
    assert comparison["interval_over_seeds"] == pytest.approx(list(interval))
    low, high = comparison["interval_over_both"]
    assert low < interval.low and interval.high < high  # images are few, seeds nearly alike
    first, second = evaluate.verdict_lines(three)
    assert f"{100 * low:+.2f} to {100 * high:+.2f} over 3 seeds and the test images" in first
    assert "Over the test images alone: " in second and "the seeds alone: +3." in second
    baseline = three["models"]["baseline"]
    assert baseline["top1"] == pytest.approx(0.939)
    assert baseline["sd"]["top1"] == pytest.approx(0.001) and three["seeds"] == [0, 1, 2]


def test_share_of_the_teachers_lead_and_what_it_cost():
    labels = np.arange(1000) % 10
    entries = pair_of(labels, 100, 70) | {"teacher": pair_of(labels, 50, 0)["baseline"]}
    for run, minutes in (("baseline", 90), ("distilled", 120), ("teacher", 300)):
        entries[run][0].history.append({"seconds": 60.0 * minutes})
    numbers = evaluate.compare(entries, labels, None)
    assert numbers["comparison"]["teacher_beats_baseline"]
    assert numbers["comparison"]["advantage_recovered"] == pytest.approx(0.03 / 0.05)
    numbers["timings"] = {"training_hours": evaluate.training_hours(entries)}
    assert evaluate.cost_lines(numbers)[1] == (
        "Training took 1.5 h for the baseline and 7.0 h for the distilled student, its teacher's "
        "5.0 h included.")
    weak = entries | {"teacher": entries["baseline"]}
    comparison = evaluate.compare(weak, labels, None)["comparison"]
    assert not comparison["teacher_beats_baseline"] and comparison["advantage_recovered"] is None


def test_seeds_with_equal_gains_do_not_prove_it():
    """One image of 360 more with each of three seeds, and seeds that all gain much."""
    labels = np.arange(360) % 10
    for more, verdict in ((1, "undecided"), (30, "better")):
        entries = {"baseline": [], "distilled": []}
        for seed in range(3):
            wrong = (np.arange(360) - 40 * seed) % 360 < more
            entries["baseline"].append(
                entry_of(answers(np.where(wrong, (labels + 1) % 10, labels), 10), seed=seed))
            entries["distilled"].append(entry_of(answers(labels, 10), seed=seed))
        numbers = evaluate.compare(entries, labels, None)
        comparison = numbers["comparison"]
        assert comparison["difference_by_seed"] == pytest.approx([more / 360] * 3)
        assert comparison["interval_over_seeds"] is comparison["t_test_p"] is None
        low, high = comparison["interval_over_both"]
        assert comparison["verdict"] == verdict and high - low > 0.005
        assert "the seeds alone: none, since they are alike" in evaluate.verdict_lines(numbers)[1]


def test_diagnostics_figure_shows_the_histories():
    """Two seeds, of one of which an epoch lacks its entropies: what is there is drawn, as it is."""
    def history(start, *columns):
        return [{"epoch": i, "ce_loss": start + i, **dict.fromkeys(columns, (start + i) / 100)}
                for i in (1, 2, 3)]
    columns = ("kd_loss", "entropy", "train_accuracy", "teacher_entropy", "target_entropy",
               "teacher_accuracy")
    first = history(10, *columns)
    second = [*history(20, "kd_loss", "train_accuracy"), dict(first[-1], epoch=4)]
    plain = history(30, "entropy", "train_accuracy")
    info = {"config": {"alpha": 0.75, "distillation_loss": "kd"}, "num_classes": 10,
            "teacher": {"val_accuracy": 0.5}}
    entries = {run: [types.SimpleNamespace(history=rows, info=info) for rows in group]
               for run, group in (("baseline", [plain, []]), ("distilled", [first, second]),
                                  ("teacher", [plain]))}
    figure = evaluate.diagnostics_figure(entries)
    drawn = {axis.get_title(): [(list(line.get_xdata()), list(line.get_ydata()))
                                for line in axis.lines] for axis in figure.axes}
    labels = {axis.get_title(): [text.get_text() for text in axis.get_legend().get_texts()]
              for axis in figure.axes}
    evaluate.plt.close(figure)

    def is_drawn(title, *lines):
        assert len(drawn[title]) == len(lines)
        for got, (x, y) in zip(drawn[title], lines, strict=True):
            assert got[0] == x and got[1] == pytest.approx(y)
    three, four, later, across = [1, 2, 3], [1, 2, 3, 4], [4], [0, 1]
    is_drawn("Parts of the distilled student's loss",
             (three, [.11 * .75, .12 * .75, .13 * .75]),
             (four, [.21 * .75, .22 * .75, .23 * .75, .13 * .75]),
             (three, [11 / 4, 12 / 4, 13 / 4]), (four, [21 / 4, 22 / 4, 23 / 4, 13 / 4]))
    twice = [(three, [.11, .12, .13]), (later, [.13])]
    is_drawn("Entropy of the predictions", (three, [.31, .32, .33]), *twice * 3,
             (across, [math.log(10)] * 2))
    is_drawn("Accuracy", (three, [31, 32, 33]), (three, [11, 12, 13]), (four, [21, 22, 23, 13]),
             (three, [11, 12, 13]), (later, [13]), (across, [50, 50]))
    assert labels["Parts of the distilled student's loss"] == [
        "0.75 × soft part (kd)", "0.25 × cross-entropy"]
    assert labels["Accuracy"] == ["Baseline", "Distilled", "Teacher",
                                  "Teacher on validation images"]


def test_statistics_and_figures_are_quick_and_small(tmp_path):
    """Three models, 10,000 images, 102 classes: 60 s of one core, and nothing images x images in
    memory."""
    classes, images = 102, 10_000
    labels = np.arange(images) % classes
    logits = 4 * np.eye(classes)[labels]
    logits = logits + np.random.default_rng(0).standard_normal((images, classes))
    history = [{"epoch": i, "ce_loss": 1 / i, "val_accuracy": i / 9, "seconds": 60.0}
               for i in range(1, 9)]
    names = [f"a class with a long name {i}" for i in range(classes)]
    entries = {}
    for i, run in enumerate(RUNS):
        noise = np.random.default_rng(i).standard_normal((images, classes))
        log_probs = scipy.special.log_softmax(logits + noise, axis=1)
        entries[run] = [entry_of(log_probs, 1.5, names, history=history)]
        entries[run][0].info["config"] |= {"alpha": 0.7, "distillation_loss": "kd"}
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    test = data_loader.Images(pixels, None, torch.from_numpy(labels), [])
    start = time.process_time()
    numbers = evaluate.compare(entries, labels, 500)
    evaluate.write_figures(entries, labels, test, numbers, tmp_path)
    assert time.process_time() - start < 60
    tracemalloc.start()
    evaluate.compare(entries, labels, 500)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20  # images x images would be 800 MB
    tracemalloc.stop()
    ones = dict.fromkeys(entries, 1.0)
    numbers |= {"notes": {"unfair": [], "no_teacher": None, "no_validation": None, "left_out": [],
                          "trained_on": []},
                "timings": {"training_hours": ones}}
    assert max(map(len, evaluate.write_report(numbers).splitlines())) <= 100


def font_with(characters, family, folder):
    """A font file with a square for each of the `characters`."""
    names = {ord(character): f"glyph{i}" for i, character in enumerate(characters)}
    glyphs = [".notdef", *names.values()]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(names)
    pen = TTGlyphPen(None)
    for move, corner in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 700)), (pen.lineTo, (700, 700))):
        move(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / f"{family}.ttf")
    return folder / f"{family}.ttf"


@pytest.mark.parametrize("installed", [False, True])
def test_class_names_in_any_script(tmp_path, monkeypatch, capsys, installed):
    """A script that matplotlib's own font lacks is drawn with an installed font, or the user is
    told; no name is a formula; no warnings. What the confusion matrices show, by hand."""
    names = ["漢字", "a$b$c", "$\\frac{$", "ä, ж, ع"]
    manager = evaluate.fontManager
    own = [font for font in manager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(manager, "ttflist", own)
    if installed:
        manager.addfont(font_with("漢字", "Made Up", tmp_path))
    labels = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    predicted = {"baseline": [0, 0, 1, 1, 1, 2, 3, 3], "distilled": [0, 0, 0, 1, 1, 3, 3, 2]}
    entries = {run: [entry_of(answers(np.array(one), 4), 1.5, names)]
               for run, one in predicted.items()}
    entries["distilled"][0].info["config"] |= {"alpha": 0.7, "distillation_loss": "kd"}
    test = data_loader.Images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), None, None, [])
    shown, draw = [], evaluate.confusion_figure
    monkeypatch.setattr(evaluate, "confusion_figure",
                        lambda entry, *how: shown.append(how[0]) or draw(entry, *how))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        numbers = evaluate.compare(entries, labels, 5)
        evaluate.write_figures(entries, labels, test, numbers, tmp_path)
    assert not caught
    assert ("Made Up" in evaluate.plt.rcParams["font.family"]) == installed
    assert ("no installed font has 字漢" in capsys.readouterr().out) == (not installed)
    assert np.allclose(shown[0][0], [2 / 3, 1 / 3, 0, 0]) and np.allclose(shown[1][2], [0, 0, 0, 1])
