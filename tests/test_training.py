"""The two training scripts: a fair pair, a teacher that is kept, gated and frozen, runs that go on or are moved aside.

    python -m pytest tests/test_training.py
"""
import csv
import inspect
import math
import signal

import pytest
import scipy.special
import scipy.stats
import torch

import data_loader
import models
import train_baseline
import train_distillation
import utils
from conftest import TINY, write_pictures

FEW = ["--num-epochs", "2", "--teacher-epochs", "2", "--batch-size", "128"]
SCRIPTS = {"baseline": train_baseline, "distillation": train_distillation}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a script's main() on tiny models in the temporary folder and returns that folder."""
    def call(script, *flags):
        few = FEW if script == "distillation" else FEW[:2] + FEW[4:]
        tiny = TINY if script == "distillation" else TINY[:2] + TINY[4:]
        monkeypatch.setattr("sys.argv", ["x", "--quick", "--device", "cpu", "--checkpoint-dir", str(tmp_path / "c"),
                                         "--results-dir", str(tmp_path / "r"), *few, *tiny, *flags])
        SCRIPTS[script].main()
        return tmp_path / "c" / "quick"
    monkeypatch.setattr(models, "least_accuracy", lambda classes: 0.0)  # two epochs teach little
    return call


def weights(folder):
    return torch.load(folder / "best_model.pth", weights_only=True)["state_dict"]


def assert_equal_weights(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_loop_is_the_same_text_in_both_scripts():
    assert inspect.getsource(train_baseline.train) == inspect.getsource(train_distillation.train)


def test_fair_pair(run, monkeypatch):
    """Bit-identical initial weights, new head included, and bit-identical batches in both students' runs."""
    seen = {"baseline": [], "distilled": [], "teacher": []}

    def spy(state, step, loader, progress, *rest):
        name = current[-1]
        if progress["epoch"] == 0:
            seen[name].append({key: value.clone() for key, value in state.model.state_dict().items()})
        return original(state, lambda images, labels: (seen[name].append((images.clone(), labels.clone())), step(images, labels))[1],
                        loader, progress, *rest)
    current, original, new_state = [], utils.train_one_epoch, utils.open_run
    monkeypatch.setattr(utils, "train_one_epoch", spy)
    monkeypatch.setattr(utils, "open_run", lambda info, *rest: current.append(info["run"]) or new_state(info, *rest))
    run("baseline"), run("distillation")
    baseline, distilled = seen["baseline"], seen["distilled"]
    assert len(baseline) == len(distilled) == 1 + 2 * (1293 // 128)
    assert_equal_weights(baseline[0], distilled[0])
    for (images, labels), (same_images, same_labels) in zip(baseline[1:], distilled[1:]):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    for (_, labels), (_, others) in zip(distilled[1:], seen["teacher"][1:], strict=True):  # the teacher learned in another order
        assert not torch.equal(labels, others)


def test_distillation_with_alpha_0_is_the_baseline(run):
    """Teacher, frozen and in eval mode, and rehearsals leave no trace: alpha 0 ends with the baseline's very weights."""
    run("baseline")
    folder = run("distillation", "--alpha", "0")
    assert_equal_weights(weights(folder / "baseline"), weights(folder / "distilled"))


def test_diagnosis_of_the_teacher_is_the_teachers(arguments):
    """At the teacher's own image size, on the student's batch; entropy and accuracy by scipy and by counting."""
    args, labels = arguments("distillation", "--teacher-image-size", "64"), torch.arange(32) % 10
    student, teacher = (models.build_model(name, 10).eval() for name in ("test_efficientnet", "test_resnet"))
    images = torch.rand(32, 3, 32, 32), torch.rand(32, 3, 64, 64)
    measured = train_distillation.distill(teacher, images, utils.forward(student, images[0]), labels, args)
    probabilities = utils.forward(teacher, images[1]).detach().double().softmax(1).numpy()
    assert measured["teacher_entropy"].item() == pytest.approx(scipy.stats.entropy(probabilities, axis=1).mean(), rel=1e-5)
    assert measured["teacher_accuracy"].item() == (probabilities.argmax(1) == labels.numpy()).mean()


def test_label_smoothing_is_the_students_alone(run):
    folder = run("distillation", "--label-smoothing", "0.1", "--num-epochs", "1")
    teacher, student = weights(folder / "teacher"), weights(folder / "distilled")
    run("distillation", "--fresh-teacher", "--num-epochs", "1")
    assert_equal_weights(teacher, weights(folder / "teacher"))
    assert any(not torch.equal(student[name], value) for name, value in weights(folder / "distilled").items())


@pytest.mark.parametrize("loss, temperature", [("kd", 4), ("lskd", 2)])
def test_diagnosis_of_the_targets_is_of_what_the_loss_compares(arguments, loss, temperature):
    """By scipy from the teacher's logits, and from the loss itself."""
    args, labels = arguments("distillation", "--distillation-loss", loss, "--temperature", str(temperature)), torch.arange(16) % 10
    teacher, images = models.build_model("test_resnet", 10).eval(), torch.rand(16, 3, 32, 32)
    measured = train_distillation.distill(teacher, images, torch.zeros(16, 10), labels, args)
    logits = utils.forward(teacher, images).detach().double().numpy()
    if loss == "lskd":
        logits = scipy.stats.zscore(logits, axis=1, ddof=1)
    wanted = scipy.stats.entropy(scipy.special.softmax(logits / temperature, axis=1), axis=1).mean()
    assert measured["target_entropy"].item() == pytest.approx(wanted, rel=1e-5)
    # against a student that knows nothing, KL(targets || uniform) is what the targets' entropy lacks of log C
    assert measured["kd_loss"].item() == pytest.approx(temperature**2 * (math.log(10) - wanted), rel=1e-3)


def test_two_classes_are_too_few_for_lskd(run, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", classes=("cat", "dog"), counts=(("train", 40), ("test", 3)), sizes=((32, 32),))
    with pytest.raises(utils.WrongUse, match="lskd"):
        run("distillation", "--dataset-name", "ImageFolder", "--dataset-dir", str(pictures), "--distillation-loss", "lskd", "--batch-size", "16")
    assert not list(tmp_path.rglob("*.pth"))


def test_outputs_of_a_run(run, tmp_path, capsys):
    folder = run("baseline")
    out = capsys.readouterr().out
    assert "about" in out and "next: python train_distillation.py --quick" in out and "best student so far: baseline" in out
    folder = run("distillation")
    with open(tmp_path / "r" / "quick" / "distilled_history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "train_loss", "ce_loss", "kd_loss", "train_accuracy", "val_loss", "val_accuracy",
                             "learning_rate", "images_per_second", "seconds", "peak_memory_mb", "skipped_steps",
                             "entropy", "teacher_entropy", "target_entropy", "teacher_accuracy"]
    parts = [float(rows[0][name]) for name in ("train_loss", "ce_loss", "kd_loss")]
    assert parts[0] == pytest.approx(0.7 * parts[2] + 0.3 * parts[1], rel=1e-4)
    assert all(0 < float(row[name]) < math.log(10) for row in rows for name in ("entropy", "teacher_entropy"))
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("train_accuracy", "teacher_accuracy"))
    with open(tmp_path / "r" / "quick" / "baseline_history.csv", encoding="utf-8") as file:
        assert all(row["entropy"] and not row["teacher_entropy"] and not row["teacher_accuracy"] for row in csv.DictReader(file))
    info = utils.load_file(folder / "distilled" / "best_model.pth")
    teacher = folder / "teacher" / "best_model.pth"
    assert info["teacher"] == {"path": teacher.as_posix(), "sha256": utils.sha256(teacher),
                               "val_accuracy": utils.load_file(teacher)["val_accuracy"]}
    assert not any(name.startswith("teacher") for name in info["state_dict"])
    assert max(float(row["val_accuracy"]) for row in rows) == info["val_accuracy"]
    assert (folder / "best_model.pth").is_file() and not list(folder.rglob("*.tmp"))


def test_teacher_is_kept_and_reused(run, capsys):
    folder = run("distillation")
    teacher = utils.sha256(folder / "teacher" / "best_model.pth")
    capsys.readouterr()
    run("distillation", "--alpha", "0.5", "--learning-rate", "0.001", "--seed", "7")  # no reason to train it again
    out = capsys.readouterr().out
    assert "teacher epoch" not in out and "distilled epoch" in out
    assert utils.sha256(folder / "teacher" / "best_model.pth") == teacher
    assert (folder / "distilled.1" / "best_model.pth").is_file() and "other" in out and "alpha" in out
    assert (folder / "distilled.1" / "distilled_history.csv").is_file()
    run("distillation", "--split-seed", "1")  # this one has seen the new validation images
    out = capsys.readouterr().out
    assert "may have seen the validation images" in out and "teacher epoch" in out
    assert utils.sha256(folder / "teacher.1" / "best_model.pth") == teacher


def test_fresh_teacher_alone_trains_it_again(run, capsys):
    folder = run("distillation")
    before = (folder / "teacher" / "best_model.pth").stat().st_mtime_ns
    capsys.readouterr()
    run("distillation", "--fresh")
    out = capsys.readouterr().out
    assert "teacher epoch" not in out and "distilled.1" in out and "distilled epoch" in out
    assert (folder / "teacher" / "best_model.pth").stat().st_mtime_ns == before
    run("distillation", "--fresh-teacher")
    assert "teacher epoch" in capsys.readouterr().out and (folder / "teacher.1" / "best_model.pth").is_file()


def test_teacher_that_knows_nothing_is_refused(run, monkeypatch):
    monkeypatch.setattr(models, "least_accuracy", lambda classes: 1.1)
    with pytest.raises(utils.UserError, match="would teach noise"):
        run("distillation")


def test_teacher_below_the_baseline_is_warned_about(run, capsys):
    folder = run("baseline")
    best = torch.load(folder / "baseline" / "best_model.pth", weights_only=True)
    torch.save({**best, "val_accuracy": 1.0}, folder / "baseline" / "best_model.pth")
    run("distillation")
    assert "best_model.pth reaches 100.00% without a teacher" in capsys.readouterr().out


def test_given_teacher_must_fit(run, tmp_path):
    folder = run("distillation")
    given = tmp_path / "given.pth"
    (folder / "teacher" / "best_model.pth").rename(given)
    folder = run("distillation", "--teacher-checkpoint", str(given), "--teacher-model", "efficientnet_b2", "--fresh")
    assert utils.load_file(folder / "distilled" / "best_model.pth")["teacher"]["path"] == given.as_posix()
    for flags, reason in ((["--split-seed", "1"], "another split"), (["--teacher-image-size", "64"], "trained at 32 px")):
        with pytest.raises(utils.UserError, match=reason):
            run("distillation", "--teacher-checkpoint", str(given), *flags)


def test_teacher_has_an_image_size_of_its_own(run):
    folder = run("distillation", "--teacher-image-size", "48", "--num-epochs", "1", "--teacher-epochs", "1")
    assert utils.load_file(folder / "teacher" / "best_model.pth")["image_size"] == 48
    assert utils.load_file(folder / "distilled" / "best_model.pth")["image_size"] == 32


def test_finished_run_says_so_and_is_left_alone(run, capsys):
    folder = run("baseline")
    before = (folder / "baseline" / "last.pth").stat().st_mtime_ns
    capsys.readouterr()
    run("baseline")
    out = capsys.readouterr().out
    assert "already trained" in out and "epoch" not in out.replace("--num-epochs", "")
    assert (folder / "baseline" / "last.pth").stat().st_mtime_ns == before and not (folder / "baseline.1").exists()


def test_several_seeds(run, tmp_path, capsys):
    """A folder each, the teacher once, each student that of its seed alone; finished ones skipped; the plain run apart."""
    folder = run("baseline", "--seeds", "3", "4")
    run("baseline", "--seed", "4")
    assert_equal_weights(weights(folder / "baseline"), weights(folder / "baseline" / "seed_4"))
    assert not torch.equal(weights(folder / "baseline" / "seed_3")["conv_stem.weight"], weights(folder / "baseline")["conv_stem.weight"])
    run("distillation", "--seeds", "3", "4")
    assert capsys.readouterr().out.count("teacher epoch   1/2") == 1 and not (folder / "teacher" / "seed_3").exists()
    assert utils.load_file(folder / "teacher" / "best_model.pth")["config"]["seed"] == utils.MAX_SEED - 3
    assert (tmp_path / "r" / "quick" / "seed_4" / "distilled_history.csv").is_file()
    before = (folder / "baseline" / "seed_3" / "last.pth").stat().st_mtime_ns
    capsys.readouterr()
    run("baseline", "--seeds", "5", "3")
    out = capsys.readouterr().out
    assert out.count("already trained") == 1 and out.count("baseline epoch   2/2") == 1
    run("baseline", "--fresh")  # moves the plain run aside, not the seeds
    assert (folder / "baseline" / "seed_3" / "last.pth").stat().st_mtime_ns == before
    assert (folder / "baseline.1" / "best_model.pth").is_file() and not list((folder / "baseline.1").glob("seed_*"))
    run("baseline", "--seeds", "3", "--learning-rate", "0.001")
    assert (folder / "baseline" / "seed_3.1" / "best_model.pth").is_file()
    assert len(utils.student_checkpoints(folder / "baseline")) == 4


@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9", "--mixup-alpha", "0.4", "--cutmix-alpha", "1"]])
@pytest.mark.parametrize("signal_number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_goes_on_to_the_same_weights(run, tmp_path, monkeypatch, capsys, signal_number, code, flags):
    """Stopped in mid-epoch, saved, gone on: bit-identical to the run that was left alone, history too but for timings."""
    def forget(rows):
        return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in rows]

    build_model = models.build_model

    def with_dropout(*args):
        model = build_model(*args)
        model.drop_rate = 0.3  # timm's head reads it: torch's random state must go on as well
        return model
    monkeypatch.setattr(models, "build_model", with_dropout)
    folder = run("baseline", *flags)
    whole, history = weights(folder / "baseline"), utils.load_file(folder / "baseline" / "last.pth")["progress"]["history"]

    calls, training_step = [], utils.training_step

    def interrupt(*args):
        step = training_step(*args)

        def counted(images, labels):
            calls.append(1)
            if len(calls) == 2 + 13:  # after the rehearsal's two, in the second epoch
                signal.raise_signal(signal_number)
            return step(images, labels)
        return counted
    monkeypatch.setattr(utils, "training_step", interrupt)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert utils.run_script(lambda: run("baseline", "--fresh", *flags)) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "stopped after step 3 of epoch 2" in capsys.readouterr().out
    monkeypatch.setattr(utils, "training_step", training_step)
    monkeypatch.setattr(utils, "_signal_code", None)
    run("baseline", *flags)
    assert_equal_weights(whole, weights(folder / "baseline"))
    assert forget(utils.load_file(folder / "baseline" / "last.pth")["progress"]["history"]) == forget(history)


def test_signal_between_two_epochs_is_answered_like_any_other(run, monkeypatch, capsys):
    train_one_epoch = utils.train_one_epoch

    def signalled(state, step, loader, progress, *rest):
        if progress["epoch"] == 1:
            utils._on_signal(signal.SIGINT, None)
        return train_one_epoch(state, step, loader, progress, *rest)
    monkeypatch.setattr(utils, "train_one_epoch", signalled)
    with pytest.raises(utils.Stopped):
        run("baseline")
    assert "stopped after step 1 of epoch 2, all saved; the same command" in capsys.readouterr().out


def test_stop_after_the_teacher_does_not_train_it_again(run, monkeypatch, capsys):
    train = train_distillation.train

    def stop_at_student(model, objective, info, *rest):
        if info["run"] == "distilled":
            raise utils.Stopped(130)
        return train(model, objective, info, *rest)
    monkeypatch.setattr(train_distillation, "train", stop_at_student)
    with pytest.raises(utils.Stopped):
        run("distillation")
    assert "teacher epoch" in capsys.readouterr().out
    monkeypatch.setattr(train_distillation, "train", train)
    run("distillation")
    assert "teacher epoch" not in capsys.readouterr().out


def test_teacher_is_frozen_while_it_teaches(run, monkeypatch):
    teachers, distill = [], train_distillation.distill

    def spy(teacher, images, logits, labels, args):
        assert not teacher.training
        teachers.append(teacher)
        return distill(teacher, images, logits, labels, args)
    monkeypatch.setattr(train_distillation, "distill", spy)
    folder = run("distillation")
    teacher, kept = teachers[-1], weights(folder / "teacher")
    assert_equal_weights(teacher.state_dict(), kept)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


def test_data_of_other_shapes(arguments):
    for flags in (["--batch-size", "5000"], ["--val-fraction", "0.001"]):
        with pytest.raises(utils.WrongUse, match=" ".join(flags)) as error:
            data_loader.open_dataset(arguments("baseline", *flags))
        assert error.value.code == 2


@pytest.mark.parametrize("error, code, words", [
    (utils.UserError("one sentence"), 1, "error: one sentence\n"), (utils.Stopped(143), 143, ""),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "--batch-size"), (MemoryError(), 1, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--image-size"),
    (RuntimeError("GET was unable to find an engine to execute this computation"), 1, "too little memory"), (utils.WrongUse("no"), 2, "error: no"),
    (OSError(28, "No space left on device", "last.pth"), 1, "No space left on device: last.pth")])
def test_exit_codes(error, code, words, capsys):
    def main():
        raise error
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert utils.run_script(main) == code
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    assert words in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        utils.run_script(lambda: 1 / 0)
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
