"""Distillation: a fair pair, a teacher that fits, is reused and stays frozen, and what it costs.

    python -m pytest tests/test_train_distillation.py
"""
import collections
import copy
import csv
import json
import math
import shutil
import types

import pytest
import scipy.special
import scipy.stats
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data_loader
import models
import train_baseline
import train_distillation
import utils
from conftest import (
    assert_equal_weights,
    assert_same_outcome,
    best_weights,
    history_of,
    outcome,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("few_images")
CPU = torch.device("cpu")


# What the loop computes ---------------------------------------------------------------------------

@pytest.fixture
def batches(monkeypatch):
    """A list to which every training batch is added: (images, teacher_images, labels)."""
    recorded = []
    epoch_with_teacher = data_loader.TrainingLoader.epoch_with_teacher

    def record(loader, epoch):
        for batch in epoch_with_teacher(loader, epoch):
            recorded.append([tensor.clone() for tensor in batch])
            yield batch

    monkeypatch.setattr(data_loader.TrainingLoader, "epoch_with_teacher", record)
    return recorded


@pytest.mark.parametrize("kind, teacher_size", [
    ("digits", 32), ("mixed digits", 48), ("photographs", 48), ("mixed photographs", 32)])
def test_fair_pair(train, tmp_path, batches, kind, teacher_size):
    """Bit-identical batches in the runs of both students, whatever the teacher's image size; the
    teacher learned in another order."""
    flags = []
    steps = 2 * 128 // 32  # of two epochs
    if "mixed" in kind:
        flags += ["--mixup-alpha", "0.4"]
    if "photographs" in kind:
        pictures = write_pictures(tmp_path / "pictures")
        flags += ["--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size", "4",
                  "--val-fraction", "0.25", "--num-workers", "0"]
        steps = 2 * 18 // 4 - 1

    train("baseline", *flags)
    of_baseline = batches.copy()
    batches.clear()
    train("distillation", *flags, "--teacher-image-size", teacher_size)
    of_teacher = batches[:len(of_baseline)]
    of_distilled = batches[len(of_baseline):]
    assert len(of_baseline) == len(of_distilled) == steps

    for baseline, distilled in zip(of_baseline, of_distilled, strict=True):
        images, _, labels = baseline
        assert torch.equal(images, distilled[0])
        assert torch.equal(labels, distilled[2])
        assert distilled[1].shape[-1] == teacher_size
        if teacher_size == 32:
            assert torch.equal(distilled[1], images)
    for baseline, teacher in zip(of_baseline, of_teacher, strict=True):
        same_images = torch.equal(baseline[0], teacher[0])
        same_labels = torch.equal(baseline[2], teacher[2])
        assert not (same_images and same_labels)


@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9", "--accumulate-steps", "2"]])
def test_distillation_with_alpha_0_is_the_baseline(train, flags):
    """Same initial weights, new head included; a frozen teacher leaves no trace in the student."""
    train("baseline", *flags)
    folder = train("distillation", "--alpha", "0", *flags)
    assert_equal_weights(best_weights(folder / "baseline"), best_weights(folder / "distilled"))


def test_best_distilled_model_is_the_one_validated(arguments, train):
    """With EMA, the history has the loss and accuracy of the EMA weights, which are saved."""
    flags = ["--ema-decay", "0.8", "--num-epochs", "2", "--batch-size", "32"]
    folder = train("distillation", *flags) / "distilled"
    model, info = models.load_model(folder / "best_model.pth")
    row = history_of(folder)[info["epoch"] - 1]
    args = arguments("distillation", *flags)
    val = data_loader.open_dataset(args).val
    loader = data_loader.EvaluationLoader(val, info, args, CPU)
    measured = train_baseline.validate(model, loader)
    assert measured["val_accuracy"] == row["val_accuracy"] == info["val_accuracy"]
    assert measured["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)


def test_resumed_distillation_ends_with_the_same_bits(train, monkeypatch):
    """Stopped at the end of its second epoch, with the same teacher."""
    flags = ["--num-epochs", "3", "--ema-decay", "0.9"]
    folder = train("distillation", *flags) / "distilled"
    whole = outcome(folder)

    validate = train_baseline.validate
    calls = []

    def stop_at_the_second(model, loader):
        calls.append(loader)
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return validate(model, loader)

    with monkeypatch.context() as patch:
        patch.setattr(train_baseline, "validate", stop_at_the_second)
        with pytest.raises(RuntimeError, match="stopped"):
            train("distillation", *flags, "--fresh")
    assert len(history_of(folder)) == 1
    train("distillation", *flags)
    assert_same_outcome(whole, outcome(folder))


def learning_rate_of(step, steps_per_epoch, peak):
    """Of `step` from 0: one epoch of linear warm-up, one of cosine to zero."""
    if step < steps_per_epoch:
        return peak / steps_per_epoch + (peak - peak / steps_per_epoch) * step / steps_per_epoch
    progress = (step - steps_per_epoch) / steps_per_epoch
    return peak * (1 + math.cos(math.pi * progress)) / 2


def test_loop_is_the_one_one_would_write(arguments, train):
    """Two epochs: teacher, student, alpha T^2 KL + (1 - alpha) CE, clip, AdamW, schedule."""
    flags = ["--teacher-image-size", "48", "--clip-grad", "0.5", "--num-epochs", "2",
             "--batch-size", "32"]
    folder = train("distillation", *flags)
    args = arguments("distillation", *flags)
    data = data_loader.open_dataset(args)
    teacher, _ = models.load_model(folder / "teacher" / "best_model.pth")
    # Folded as in the script: it rounds otherwise, and two epochs make much of that.
    teacher = models.freeze_teacher(teacher, 48)

    torch.manual_seed(args.seed)
    student = models.build_model("test_efficientnet", 10).train()
    info = models.build_info("distilled", student, "test_efficientnet", data, args)
    loader = data_loader.TrainingLoader(data, info, args, CPU)
    without_decay = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
    with_decay = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": without_decay, "weight_decay": 0.0},
                                   {"params": with_decay, "weight_decay": 0.05}], fused=True)
    log_softmax = torch.nn.functional.log_softmax

    step = 0
    entropies = []
    for epoch in range(2):
        for images, teacher_images, labels in loader.epoch_with_teacher(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_of(step, len(loader), args.learning_rate)
            with torch.no_grad():
                teacher_logits = models.forward(teacher, teacher_images)
            logits = models.forward(student, images)
            if step % len(loader) == 0:  # the one step of an epoch that is diagnosed here
                probabilities = scipy.special.softmax(logits.detach().double().numpy(), axis=1)
                entropies.append(scipy.stats.entropy(probabilities, axis=1).mean())
            kl = torch.nn.functional.kl_div(
                log_softmax(logits / 4, 1), log_softmax(teacher_logits / 4, 1),
                reduction="batchmean", log_target=True)
            ce_loss = torch.nn.functional.cross_entropy(logits, labels)
            loss = 0.7 * (kl * 16) + (1 - 0.7) * ce_loss

            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
            step += 1

    trained = utils.load_checkpoint(folder / "distilled" / "last.pth")["states"]["model"]
    plain = student.state_dict()
    assert trained.keys() == plain.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)
    for epoch, row in enumerate(history_of(folder / "distilled")):
        last_step = (epoch + 1) * len(loader) - 1
        expected = learning_rate_of(last_step, len(loader), args.learning_rate)
        assert row["learning_rate"] == pytest.approx(expected)
    measured = [row["entropy"] for row in history_of(folder / "distilled")]
    assert measured == pytest.approx(entropies, rel=1e-3)


@pytest.mark.parametrize("loss, temperature", [("kd", 4), ("lskd", 2)])
def test_diagnostics_are_of_the_teacher_and_of_what_the_loss_compares(arguments, loss, temperature):
    """By scipy from the teacher's logits, by counting, and from the loss itself."""
    args = arguments("distillation", "--distillation-loss", loss, "--temperature", temperature)
    logits = 3 * torch.randn(64, 10)
    labels = torch.arange(64) % 10
    measured = models.teacher_diagnostics(logits, labels, args)

    exact = logits.double().numpy()
    entropies = scipy.stats.entropy(scipy.special.softmax(exact, axis=1), axis=1)
    assert measured["teacher_entropy"].item() == pytest.approx(entropies.mean(), rel=1e-5)
    accuracy = (exact.argmax(1) == labels.numpy()).mean()
    assert measured["teacher_accuracy"].item() == pytest.approx(accuracy)

    if loss == "lskd":
        exact = scipy.stats.zscore(exact, axis=1, ddof=1)
    targets = scipy.special.softmax(exact / temperature, axis=1)
    target_entropy = scipy.stats.entropy(targets, axis=1).mean()
    assert measured["target_entropy"].item() == pytest.approx(target_entropy, rel=1e-5)

    # Against a student that knows nothing the KL is what the entropy lacks of ln C.
    distill_loss = models.distill_loss(torch.zeros(64, 10), logits, args)
    expected = temperature**2 * (math.log(10) - target_entropy)
    assert distill_loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("every", [1, 3])
def test_diagnostics_are_of_the_batches_they_name(arguments, train, every, monkeypatch):
    """The teacher's accuracy in the history: of each step or each third, at its own image size."""
    monkeypatch.setattr(train_baseline, "DIAGNOSE_EVERY", every)
    flags = ["--teacher-image-size", "48", "--num-epochs", "1", "--teacher-epochs", "1",
             "--batch-size", "32"]
    folder = train("distillation", *flags)
    args = arguments("distillation", *flags)
    data = data_loader.open_dataset(args)
    teacher, _ = models.load_model(folder / "teacher" / "best_model.pth")
    _, info = models.load_model(folder / "distilled" / "best_model.pth")
    loader = data_loader.TrainingLoader(data, info, args, CPU)
    accuracies = []
    for step, (_, teacher_images, labels) in enumerate(loader.epoch_with_teacher(0)):
        if step % every == 0:
            logits = models.forward(teacher, teacher_images)
            accuracies.append(models.accuracy(logits, labels).item())

    row, = history_of(folder / "distilled")
    assert len(accuracies) == {1: 4, 3: 2}[every]
    mean_accuracy = sum(accuracies) / len(accuracies)
    assert row["teacher_accuracy"] == pytest.approx(mean_accuracy, abs=1e-6)


def test_label_smoothing_is_the_students_alone(train):
    folder = train("distillation", "--label-smoothing", "0.1", "--num-epochs", "1")
    teacher = best_weights(folder / "teacher")
    student = best_weights(folder / "distilled")
    train("distillation", "--fresh-teacher", "--num-epochs", "1")
    assert_equal_weights(teacher, best_weights(folder / "teacher"))
    assert not torch.equal(student["conv_stem.weight"],
                           best_weights(folder / "distilled")["conv_stem.weight"])


def test_two_classes_are_too_few_for_lskd(train, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", classes=("cat", "dog"),
                              counts=(("train", 40), ("test", 3)), sizes=((32, 32),))
    with pytest.raises(utils.UsageError, match="lskd"):
        train("distillation", "--dataset-name", "ImageFolder", "--dataset-dir", pictures,
              "--distillation-loss", "lskd", "--batch-size", "16")
    assert not list((tmp_path / "checkpoints").rglob("*.pth"))


def test_outputs_of_a_run(train, tmp_path, capsys):
    folder = train("distillation", "--batch-size", "64")
    out = capsys.readouterr().out
    next_command = out[out.index("next: python train_baseline.py --quick"):]  # evaluate needs both
    assert f"--checkpoint-dir {tmp_path}/checkpoints" in next_command
    assert "--batch-size 64" in next_command
    assert "--teacher" not in next_command
    assert "best student so far: distilled" in out

    table = tmp_path / "results" / "quick" / "distilled_history.csv"
    with open(table, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        total = 0.7 * float(row["distill_loss"]) + 0.3 * float(row["ce_loss"])
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-4)
        for name in ("entropy", "teacher_entropy", "target_entropy"):
            assert 0 < float(row[name]) < math.log(10)
        for name in ("train_accuracy", "teacher_accuracy", "val_accuracy"):
            assert 0 <= float(row[name]) <= 1

    info = utils.load_checkpoint(folder / "distilled" / "best_model.pth")
    teacher_path = folder / "teacher" / "best_model.pth"
    assert info["teacher"] == {"path": teacher_path.as_posix(),
                               "sha256": utils.sha256(teacher_path),
                               "val_accuracy": utils.load_checkpoint(teacher_path)["val_accuracy"]}
    assert not any(name.startswith("teacher") for name in info["state_dict"])
    assert info["val_accuracy"] == max(float(row["val_accuracy"]) for row in rows)


# The teacher --------------------------------------------------------------------------------------

SHORT = ["--num-epochs", "1", "--teacher-epochs", "1"]


def test_teacher_is_reused_where_it_fits(train, capsys):
    folder = train("distillation", *SHORT)
    teacher = utils.sha256(folder / "teacher" / "best_model.pth")
    capsys.readouterr()
    train("distillation", *SHORT, "--alpha", "0.5", "--learning-rate", "0.001", "--seed", "7")
    out = capsys.readouterr().out
    assert "teacher epoch" not in out  # none of these is a reason to train it again
    assert "note" not in out
    assert "distilled epoch" in out
    assert utils.sha256(folder / "teacher" / "best_model.pth") == teacher

    # The previous student is moved aside, whole.
    assert "alpha" in out
    assert (folder / "distilled.1" / "best_model.pth").is_file()
    assert (folder / "distilled.1" / "distilled_history.csv").is_file()

    # Its own settings do not make it unfit, but what was asked for is not what is used.
    train("distillation", "--num-epochs", "1", "--teacher-epochs", "2")
    out = capsys.readouterr().out
    assert "teacher epoch" not in out
    assert "note" in out and "teacher_epochs 1 instead of 2" in out and "--fresh-teacher" in out
    assert utils.sha256(folder / "teacher" / "best_model.pth") == teacher


@pytest.mark.slow
def test_teacher_of_another_split_is_moved_aside(train, capsys):
    folder = train("distillation", *SHORT)
    teacher = utils.sha256(folder / "teacher" / "best_model.pth")
    capsys.readouterr()
    train("distillation", *SHORT, "--split-seed", "1")
    out = capsys.readouterr().out
    assert "validation images" in out  # it has seen the new ones
    assert "teacher epoch" in out
    assert utils.sha256(folder / "teacher.1" / "best_model.pth") == teacher


def test_wrong_file_in_the_place_of_last_pth_is_one_message(train):
    folder = train("distillation", *SHORT)
    for role in ("teacher", "distilled"):
        last_path = folder / role / "last.pth"
        right_content = last_path.read_bytes()
        shutil.copyfile(folder / role / "best_model.pth", last_path)
        with pytest.raises(utils.UserError, match=f"{role}.last.pth.*move the folder"):
            train("distillation", *SHORT, "--alpha", "0.5")
        last_path.write_bytes(right_content)

    # And the other way round, as if put there by hand
    shutil.copyfile(folder / "teacher" / "last.pth", folder / "teacher" / "best_model.pth")
    with pytest.raises(utils.UserError, match="best_model.pth"):
        train("distillation", *SHORT, "--alpha", "0.5")


@pytest.mark.slow
def test_fresh_teacher_alone_trains_it_again(train, capsys):
    folder = train("distillation", *SHORT)
    teacher_path = folder / "teacher" / "best_model.pth"
    saved = teacher_path.stat().st_mtime_ns
    capsys.readouterr()
    train("distillation", *SHORT, "--fresh")
    out = capsys.readouterr().out
    assert "teacher epoch" not in out
    assert "distilled epoch" in out
    assert teacher_path.stat().st_mtime_ns == saved
    assert (folder / "distilled.1" / "best_model.pth").is_file()

    train("distillation", *SHORT, "--fresh-teacher")
    assert "teacher epoch" in capsys.readouterr().out
    assert (folder / "teacher.1" / "best_model.pth").is_file()


@pytest.mark.slow
def test_student_of_another_teacher_is_trained_again(train, capsys):
    """Though its own settings are the same."""
    folder = train("distillation", *SHORT)
    previous = utils.load_checkpoint(folder / "distilled" / "best_model.pth")["teacher"]["sha256"]
    capsys.readouterr()
    train("distillation", *SHORT, "--fresh-teacher", "--teacher-learning-rate", "0.002")
    assert "distilled epoch" in capsys.readouterr().out
    teacher = utils.sha256(folder / "teacher" / "best_model.pth")
    assert teacher != previous
    best = utils.load_checkpoint(folder / "distilled" / "best_model.pth")
    assert best["teacher"]["sha256"] == teacher
    assert (folder / "distilled.1" / "best_model.pth").is_file()


@pytest.mark.slow
def test_unfinished_teacher_is_trained_to_its_end(train, capsys):
    """Its best_model.pth of the first epochs is there, and does not teach yet."""
    folder = train("distillation", "--teacher-epochs", "3", "--num-epochs", "1")
    last_path = folder / "teacher" / "last.pth"
    last = utils.load_checkpoint(last_path)
    last["history"] = last["history"][:2]
    torch.save(last, last_path)
    capsys.readouterr()
    train("distillation", "--teacher-epochs", "3", "--num-epochs", "1")
    out = capsys.readouterr().out
    assert "teacher epoch   3/3" in out
    assert "teacher epoch   1/3" not in out

    # From other initial weights it is another teacher.
    last["history"] = last["history"][:2]
    torch.save(last, last_path)
    flags = ["--pretrained"]
    for flag, run in (("--teacher-weights", "teacher"), ("--student-weights", "distilled")):
        flags += [flag, folder / f"{run}.pth"]
        torch.save(best_weights(folder / run), flags[-1])
    train("distillation", "--teacher-epochs", "3", "--num-epochs", "1", *flags)
    out = capsys.readouterr().out
    assert "teacher.1 (different pretrained, weights_sha256)" in out
    assert "teacher epoch   1/3" in out


def test_weight_file_with_another_content_is_another_run(train, capsys, tmp_path):
    folder = train("baseline", "--num-epochs", "1")
    weights = tmp_path / "weights.pth"
    flags = ["--pretrained", "--num-epochs", "1", "--student-weights", weights]
    state = best_weights(folder / "baseline")
    torch.save(state, weights)
    train("baseline", *flags)
    capsys.readouterr()
    train("baseline", *flags)
    assert "already trained" in capsys.readouterr().out

    name, tensor = next(iter(state.items()))
    torch.save({**state, name: tensor + 1}, weights)
    train("baseline", *flags)
    assert "different student_weights_sha256" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["best_model.pth", "best_model", "best_model/model.safetensors",
                                  "distilled/seed_1/best_model.pth"])
def test_teacher_that_the_command_replaces_is_refused(train, file):
    """Run again, the student would be its own teacher."""
    flags = [*SHORT, "--seeds", "1"]
    folder = train("distillation", *flags)
    flags += ["--teacher-model", "test_efficientnet", "--teacher-checkpoint", folder / file]
    with pytest.raises(utils.UsageError, match="copy it"):
        train("distillation", *flags)
    train("distillation", *flags, "--checkpoint-dir", folder / "other")  # replaces none of them


@pytest.mark.parametrize("script, flag, file", [
    ("baseline", "--student-weights", "best_model.pth"),
    ("baseline", "--student-weights", "baseline/best_model.pth"),
    ("distillation", "--student-weights", "distilled/best_model.pth"),
    ("distillation", "--teacher-weights", "teacher/best_model.pth")])
def test_weights_that_the_command_replaces_are_refused(train, tmp_path, script, flag, file):
    """Run again, the model would start from what it has become."""
    path = tmp_path / "checkpoints" / "quick" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(utils.UsageError, match=f"{flag}.*copy it"):
        train(script, "--pretrained", flag, path)


def test_teacher_of_the_folder_may_be_given(train):
    folder = train("distillation", *SHORT)
    train("distillation", *SHORT, "--teacher-checkpoint", folder / "teacher" / "best_model.pth")


def test_teacher_read_in_another_way_is_another_teacher(train, tmp_path, capsys):
    """In timm's layout, config.json says how to read a weight file."""
    folder = train("distillation", *SHORT, "--teacher-model", "test_efficientnet")
    given = tmp_path / "given"
    shutil.copytree(folder / "best_model", given)
    flags = [*SHORT, "--teacher-model", "test_efficientnet", "--teacher-checkpoint", given]
    train("distillation", *flags)
    capsys.readouterr()
    train("distillation", *flags)
    assert "already trained" in capsys.readouterr().out

    content = json.loads((given / "config.json").read_text(encoding="utf-8"))
    content["pretrained_cfg"]["mean"] = [0.4, 0.4, 0.4]
    (given / "config.json").write_text(json.dumps(content), encoding="utf-8")
    train("distillation", *flags)
    assert "different teacher" in capsys.readouterr().out


def test_unfair_pair_is_warned_about_before_the_training(train, capsys):
    """And evaluate.py is next only if the pair is fair."""
    folder = train("baseline", "--num-epochs", "1")
    assert "fair pair" not in capsys.readouterr().out
    train("distillation", *SHORT, "--learning-rate", "0.5", "--split-seed", "1")
    out = capsys.readouterr().out
    warning = next(line for line in out.splitlines() if "fair pair" in line)
    assert "learning_rate differs (0.5 and 0.003)" in warning
    assert "split_seed differs" in warning and "validation split" in warning
    assert "correct the flags" in warning
    assert out.index(warning) < out.index("teacher epoch")
    assert "next: python train_baseline.py" in out

    train("distillation", *SHORT)
    out = capsys.readouterr().out
    assert "fair pair" not in out
    assert "next: python evaluate.py" in out

    # Nor is an unfinished student half of a fair pair.
    last_path = folder / "baseline" / "last.pth"
    last = utils.load_checkpoint(last_path)
    utils.save_checkpoint({**last, "history": []}, last_path)
    train("distillation", *SHORT)
    assert "next: python train_baseline.py" in capsys.readouterr().out
    utils.save_checkpoint(last, last_path)
    train("baseline", "--num-epochs", "2")
    out = capsys.readouterr().out
    assert "distilled" in out and "num_epochs differs (2 and 1)" in out
    assert "next: python train_distillation.py" in out


@pytest.mark.parametrize("flags, word", [
    (["--pretrained", "--student-weights", __file__, "--teacher-weights", __file__], __file__),
    (["--student-model", "vit_tiny_patch16_224", "--teacher-model", "test_resnet"], "32 px")])
def test_faults_of_the_student_show_before_its_teacher_is_trained(train, tmp_path, monkeypatch,
                                                                  flags, word):
    monkeypatch.setattr(config, "check_model", lambda *_: None)
    monkeypatch.setattr(train_distillation, "find_or_train_teacher", None)
    with pytest.raises(utils.UserError, match=word):
        train("distillation", *SHORT, *flags)


def test_teacher_from_another_content_of_its_weight_file_is_named(train, capsys, tmp_path):
    folder = train("distillation", *SHORT)
    state = best_weights(folder / "teacher")
    torch.save(best_weights(folder / "distilled"), tmp_path / "student.pth")
    weights = tmp_path / "teacher.pth"
    flags = [*SHORT, "--pretrained", "--student-weights", tmp_path / "student.pth"]
    torch.save(state, weights)
    train("distillation", *flags, "--teacher-weights", weights, "--fresh-teacher")
    shutil.copy(weights, tmp_path / "copy.pth")
    capsys.readouterr()
    train("distillation", *flags, "--teacher-weights", tmp_path / "copy.pth")
    assert "note" not in capsys.readouterr().out

    name, tensor = next(iter(state.items()))
    torch.save({**state, name: tensor + 1}, weights)
    train("distillation", *flags, "--teacher-weights", weights)
    assert "SHA-256 of teacher_weights" in capsys.readouterr().out


def test_stop_after_the_teacher_does_not_train_it_again(train, capsys, monkeypatch):
    """As by a kill between the two trainings."""
    with monkeypatch.context() as patch:
        patch.setattr(train_distillation, "train", None)
        with pytest.raises(TypeError):
            train("distillation", *SHORT)
    assert "teacher epoch" in capsys.readouterr().out
    train("distillation", *SHORT)
    assert "teacher epoch" not in capsys.readouterr().out


def test_teacher_that_knows_nothing_is_refused(train, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "min_useful_accuracy", lambda chance: 1.1)
    with pytest.raises(utils.UserError, match="--teacher-epochs"):
        train("distillation", *SHORT)
    assert not (tmp_path / "checkpoints" / "quick" / "distilled").exists()


def test_teacher_that_only_knows_the_largest_class_is_refused(arguments):
    labels = torch.tensor([0] * 9 + [1])
    data = types.SimpleNamespace(val=types.SimpleNamespace(labels=labels))
    args = arguments("distillation")
    with pytest.raises(utils.UserError, match="90.0%"):
        train_distillation.check_teacher_accuracy(0.9, data, args)
    train_distillation.check_teacher_accuracy(0.95, data, args)


@pytest.mark.slow
def test_baseline_above_its_teacher_is_warned_about(train, capsys):
    folder = train("baseline", "--num-epochs", "1")
    best_path = folder / "baseline" / "best_model.pth"
    best = torch.load(best_path, weights_only=True)
    torch.save({**best, "val_accuracy": 1.0}, best_path)
    train("distillation", *SHORT)
    assert f"warning: {best_path} reaches 100.00%" in capsys.readouterr().out


@pytest.mark.slow
def test_given_teacher_must_fit(train, tmp_path):
    folder = train("distillation", *SHORT)
    given = tmp_path / "given.pth"
    (folder / "teacher" / "best_model.pth").rename(given)
    train("distillation", *SHORT, "--teacher-checkpoint", given, "--teacher-model",
          "efficientnet_b2", "--fresh")
    info = utils.load_checkpoint(folder / "distilled" / "best_model.pth")
    assert info["teacher"]["path"] == given.as_posix()

    with pytest.raises(utils.UserError, match="split_fingerprint"):
        train("distillation", *SHORT, "--teacher-checkpoint", given, "--split-seed", "1")
    with pytest.raises(utils.UserError, match="image_size.*32.*64"):
        train("distillation", *SHORT, "--teacher-checkpoint", given, "--teacher-image-size", "64")


def test_teacher_has_an_image_size_of_its_own(train):
    folder = train("distillation", "--teacher-image-size", "48", *SHORT)
    assert utils.load_checkpoint(folder / "teacher" / "best_model.pth")["image_size"] == 48
    assert utils.load_checkpoint(folder / "distilled" / "best_model.pth")["image_size"] == 32


@pytest.mark.slow
def test_teacher_has_epochs_seed_and_learning_rate_of_its_own(train):
    folder = train("distillation", "--teacher-learning-rate", "0.002", "--learning-rate", "0.001",
                   "--teacher-epochs", "3", "--seed", "5", "--warmup-epochs", "0")
    teacher = utils.load_checkpoint(folder / "teacher" / "last.pth")
    distilled = utils.load_checkpoint(folder / "distilled" / "last.pth")
    assert len(teacher["history"]) == 3
    assert len(distilled["history"]) == 2
    assert teacher["identity"]["seed"] == config.MAX_SEED - 5
    assert 0.001 < teacher["history"][0]["learning_rate"] < 0.002
    assert distilled["history"][0]["learning_rate"] < 0.001


def test_teacher_is_frozen_while_it_teaches(arguments):
    """Weights, statistics, eval mode and the lack of gradients outlast a training."""
    args = arguments("distillation", "--num-epochs", "1")
    data = data_loader.open_dataset(args)
    teacher = models.freeze_teacher(models.build_model("test_resnet", 10), 32)
    before = copy.deepcopy(teacher.state_dict())
    student = models.build_model("test_efficientnet", 10)
    about = {"path": "x", "sha256": "x", "val_accuracy": 0.5}
    info = models.build_info("distilled", student, "test_efficientnet", data, args, teacher=about)
    train_distillation.train(student, teacher, info, data, args)

    assert_equal_weights(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    for parameter in teacher.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


# Operations of a step -----------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts what a GPU starts a kernel for: every operation that makes or changes a tensor."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(value.alias_info and not value.alias_info.is_write
                      for value in function._schema.returns)
        if not is_view:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def count_operations(function):
    """How many operations a call of `function` takes, the second time."""
    function()
    with Operations() as counter:
        function()
    return counter.counts.total()


def count_operations_of_a_step(arguments, script, *flags):
    """In the scripts' own loops, all that a step takes: an epoch of 10 steps less one of 3. Both
    measure entropies once, in their first step, and read the metrics once, in their last."""
    totals = []
    for steps in (3, 10):
        args = arguments(script, "--student-model", "efficientnet_b0", "--amp-dtype", "bf16",
                         "--batch-size", "2", "--num-epochs", "1", "--fresh", *flags)
        data = data_loader.open_dataset(args)
        data = data._replace(train=data.train.select(range(2 * steps)),
                             val=data.val.select(range(16)))
        student = models.build_model(args.student_model, 10)
        info = models.build_info("baseline", student, args.student_model, data, args)
        if script == "baseline":
            with Operations() as counter:
                train_baseline.train(student, info, data, args)
        else:
            teacher = models.build_model("efficientnet_b2", 10)
            teacher = models.freeze_teacher(teacher, 32, torch.bfloat16)
            info |= {"run": "distilled", "teacher": {"sha256": "x"}}
            with Operations() as counter:
                train_distillation.train(student, teacher, info, data, args)
        totals.append(counter.counts.total())
    return (totals[1] - totals[0]) / 7


def bare_step():
    """Forward, loss, backward, clipping and update of a timm model as timm builds it."""
    model = timm.create_model("efficientnet_b0", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.rand(2, 3, 32, 32)
    labels = torch.tensor([0, 1])

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def teacher_pass(teacher):
    images = torch.rand(2, 3, 32, 32)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            models.forward(teacher, images)
    return run


@pytest.mark.slow
def test_operations_of_a_step(arguments):
    """At batch 16 a GPU waits for Python, which starts them one by one: none may be added unseen.
    tests/README.md has the table."""
    bare = count_operations(bare_step())
    teacher = models.build_model("efficientnet_b2", 10).eval()
    plain = count_operations(teacher_pass(teacher))
    teacher = models.freeze_teacher(teacher, 32, torch.bfloat16)
    folded = count_operations(teacher_pass(teacher))
    ce = count_operations_of_a_step(arguments, "baseline")
    ce_ema = count_operations_of_a_step(arguments, "baseline", "--ema-decay", "0.9")
    kd = count_operations_of_a_step(arguments, "distillation")
    lskd = count_operations_of_a_step(arguments, "distillation", "--distillation-loss", "lskd")
    print(f"bare {bare}, CE {ce}, with EMA {ce_ema}, teacher {plain}, folded {folded}, KD {kd}, "
          f"lskd {lskd}")
    assert folded < min(300, plain / 2)
    assert bare / 2 < ce <= bare - 22  # augmentation, metrics and schedule included
    assert ce_ema <= ce + 2
    assert kd <= ce + folded + 27
    assert lskd <= kd + 31
