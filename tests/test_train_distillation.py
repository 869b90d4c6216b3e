"""The distilled side: a fair pair; a teacher that is kept, fits, knows its task, stays frozen.

    python -m pytest tests/test_train_distillation.py
"""
import collections
import copy
import csv
import math

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
from conftest import assert_equal_weights, weights, write_pictures


class Watched(data_loader.TrainingLoader):
    """A loader that remembers the batches it gave."""
    seen = []

    def epoch_with_teacher(self, epoch):
        for batch in super().epoch_with_teacher(epoch):
            Watched.seen.append([tensor.clone() for tensor in batch])
            yield batch


@pytest.mark.parametrize("kind, size", [
    ("digits", 32), ("mixed digits", 48), ("photographs", 48), ("mixed photographs", 32)])
def test_fair_pair(train, tmp_path, monkeypatch, kind, size):
    """Bit-identical batches in the runs of both students, whatever the teacher's image size; the
    teacher learned in another order."""
    flags = ["--mixup-alpha", "0.4"] if "mixed" in kind else []
    if "photographs" in kind:
        flags += ["--dataset-name", "ImageFolder", "--dataset-dir", write_pictures(tmp_path / "p"),
                  "--batch-size", "4", "--val-fraction", "0.25", "--num-workers", "0"]
    monkeypatch.setattr(data_loader, "TrainingLoader", Watched)
    Watched.seen = alone = []
    train("baseline", *flags)
    Watched.seen = taught = []
    train("distillation", *flags, "--teacher-image-size", size)
    teacher, distilled = taught[:len(alone)], taught[len(alone):]
    assert len(alone) == len(distilled) == 2 * (4 if "photographs" in kind else 1293 // 128)
    for one, other in zip(alone, distilled, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
        assert other[1].shape[-1] == size
        assert size > 32 or torch.equal(other[0], other[1])  # the teacher sees the very same
    assert not any(torch.equal(one[2], other[2]) and torch.equal(one[0], other[0])
                   for one, other in zip(alone, teacher, strict=True))


@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9", "--accumulate-steps", "2"]])
def test_distillation_with_alpha_0_is_the_baseline(train, flags):
    """Same initial weights, new head included; a frozen teacher leaves no trace in the student."""
    train("baseline", *flags)
    folder = train("distillation", "--alpha", "0", *flags)
    assert_equal_weights(weights(folder / "baseline"), weights(folder / "distilled"))


def test_loop_is_the_one_one_would_write(arguments, train):
    """Two epochs: teacher, student, alpha T² KL + (1 - alpha) CE, clip, AdamW, schedule."""
    folder = train("distillation", "--teacher-image-size", "48", "--clip-grad", "0.5")
    args = arguments("distillation", "--teacher-image-size", "48", "--clip-grad", "0.5",
                     "--num-epochs", "2", "--batch-size", "128")
    data = data_loader.open_dataset(args)
    teacher, _ = models.load_model(folder / "teacher" / "best_model.pth")
    teacher = models.freeze_teacher(teacher, 48)  # which rounds otherwise, and two epochs make much of that
    torch.manual_seed(args.seed)
    student = models.build_model("test_efficientnet", 10)
    info = models.build_info("distilled", student, "test_efficientnet", data, args)
    loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
    groups = [{"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
              {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    log_softmax, steps = torch.nn.functional.log_softmax, len(loader)
    student.train()
    for epoch in range(2):
        batches = enumerate(loader.epoch_with_teacher(epoch), epoch * steps)
        for step, (images, teacher_images, labels) in batches:
            for group in optimizer.param_groups:  # one epoch of warm-up, one of cosine
                group["lr"] = rate_of(step, steps, args.learning_rate)
            with torch.no_grad():
                teacher_logits = models.forward(teacher, teacher_images)
            logits = models.forward(student, images)
            kl = torch.nn.functional.kl_div(
                log_softmax(logits / 4, 1), log_softmax(teacher_logits / 4, 1),
                reduction="batchmean", log_target=True)
            loss = 0.7 * (kl * 16) + (1 - 0.7) * torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
    trained = utils.load_checkpoint(folder / "distilled" / "last.pth")["states"]["model"]
    plain = student.state_dict()
    for name, value in trained.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)
    assert all("num_batches_tracked" in name for name in plain.keys() - trained.keys())


def rate_of(step, steps, peak):
    """The learning rate of `step` from 0: `steps` of linear warm-up, as many of cosine to zero."""
    if step < steps:
        return peak / steps + (peak - peak / steps) * step / steps
    return peak * (1 + math.cos(math.pi * (step - steps) / steps)) / 2


@pytest.mark.parametrize("loss, temperature", [("kd", 4), ("lskd", 2)])
def test_diagnosis_is_of_the_teacher_and_of_what_the_loss_compares(arguments, loss, temperature):
    """By scipy from the teacher's logits, by counting, and from the loss itself."""
    args = arguments("distillation", "--distillation-loss", loss, "--temperature", temperature)
    logits, labels = 3 * torch.randn(64, 10), torch.arange(64) % 10
    measured = models.teacher_diagnostics(logits, labels, args)
    exact = logits.double().numpy()
    assert measured["teacher_entropy"].item() == pytest.approx(
        scipy.stats.entropy(scipy.special.softmax(exact, axis=1), axis=1).mean(), rel=1e-5)
    assert measured["teacher_accuracy"].item() == pytest.approx(
        (exact.argmax(1) == labels.numpy()).mean())
    if loss == "lskd":
        exact = scipy.stats.zscore(exact, axis=1, ddof=1)
    targets = scipy.special.softmax(exact / temperature, axis=1)
    wanted = scipy.stats.entropy(targets, axis=1).mean()
    assert measured["target_entropy"].item() == pytest.approx(wanted, rel=1e-5)
    # Against a student that knows nothing the KL is what the entropy lacks of log C.
    _, _, soft = models.distillation_loss(torch.zeros(64, 10), logits, labels, args)
    assert soft.item() == pytest.approx(temperature**2 * (math.log(10) - wanted), rel=1e-3)


def test_diagnostics_are_of_the_batches_they_name(arguments, train):
    """Every tenth step's teacher accuracy, at its own image size, in the history."""
    flags = ["--teacher-image-size", "48", "--num-epochs", "1", "--teacher-epochs", "1",
             "--batch-size", "32", "--mixup-alpha", "0"]
    folder = train("distillation", *flags)
    args = arguments("distillation", *flags)
    data = data_loader.open_dataset(args)
    teacher, _ = models.load_model(folder / "teacher" / "best_model.pth")
    _, info = models.load_model(folder / "distilled" / "best_model.pth")
    loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
    batches = enumerate(loader.epoch_with_teacher(0))
    looked = [batch for number, batch in batches if number % 10 == 0]
    right = [models.accuracy(models.forward(teacher, images), labels).item()
             for _, images, labels in looked]
    row = utils.load_checkpoint(folder / "distilled" / "last.pth")["history"][0]
    assert row["teacher_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_label_smoothing_is_the_students_alone(train):
    folder = train("distillation", "--label-smoothing", "0.1", "--num-epochs", "1")
    teacher, student = weights(folder / "teacher"), weights(folder / "distilled")
    train("distillation", "--fresh-teacher", "--num-epochs", "1")
    assert_equal_weights(teacher, weights(folder / "teacher"))
    assert not torch.equal(student["conv_stem.weight"],
                           weights(folder / "distilled")["conv_stem.weight"])


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
    command = f"next: python train_baseline.py --quick --checkpoint-dir {tmp_path}/checkpoints "
    assert command in out and "best student so far: distilled" in out  # evaluate.py needs both
    assert "--batch-size 64" in out and "--teacher" not in out[out.index(command):]
    file = tmp_path / "results" / "quick" / "distilled_history.csv"
    with open(file, encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    parts = [float(rows[0][name]) for name in ("train_loss", "ce_loss", "kd_loss")]
    assert parts[0] == pytest.approx(0.7 * parts[2] + 0.3 * parts[1], rel=1e-4)
    for row in rows:
        for name in ("entropy", "teacher_entropy", "target_entropy"):
            assert 0 < float(row[name]) < math.log(10)
        for name in ("train_accuracy", "teacher_accuracy", "val_accuracy"):
            assert 0 <= float(row[name]) <= 1
    info = utils.load_checkpoint(folder / "distilled" / "best_model.pth")
    teacher = folder / "teacher" / "best_model.pth"
    assert info["teacher"] == {"path": teacher.as_posix(), "sha256": utils.sha256(teacher),
                               "val_accuracy": utils.load_checkpoint(teacher)["val_accuracy"]}
    assert not any(name.startswith("teacher") for name in info["state_dict"])
    assert max(float(row["val_accuracy"]) for row in rows) == info["val_accuracy"]


# The teacher --------------------------------------------------------------------------------------

def test_teacher_is_kept_and_reused(train, capsys):
    folder = train("distillation")
    teacher = utils.sha256(folder / "teacher" / "best_model.pth")
    capsys.readouterr()
    train("distillation", "--alpha", "0.5", "--learning-rate", "0.001", "--seed", "7")
    out = capsys.readouterr().out  # none of these is a reason to train the teacher again
    assert "teacher epoch" not in out and "distilled epoch" in out
    assert utils.sha256(folder / "teacher" / "best_model.pth") == teacher
    assert (folder / "distilled.1" / "best_model.pth").is_file()
    assert "other" in out and "alpha" in out
    assert (folder / "distilled.1" / "distilled_history.csv").is_file()
    train("distillation", "--split-seed", "1")  # this one has seen the new validation images
    out = capsys.readouterr().out
    assert "may have seen the validation images" in out and "teacher epoch" in out
    assert utils.sha256(folder / "teacher.1" / "best_model.pth") == teacher


def test_fresh_teacher_alone_trains_it_again(train, capsys):
    folder = train("distillation")
    before = (folder / "teacher" / "best_model.pth").stat().st_mtime_ns
    capsys.readouterr()
    train("distillation", "--fresh")
    out = capsys.readouterr().out
    assert "teacher epoch" not in out and "distilled.1" in out and "distilled epoch" in out
    assert (folder / "teacher" / "best_model.pth").stat().st_mtime_ns == before
    train("distillation", "--fresh-teacher")
    assert "teacher epoch" in capsys.readouterr().out
    assert (folder / "teacher.1" / "best_model.pth").is_file()


def test_teacher_of_a_run_that_is_not_finished_is_trained_on(train, capsys):
    """Its best_model.pth of the first epoch is there, and does not teach yet."""
    folder = train("distillation", "--teacher-epochs", "3")
    last = utils.load_checkpoint(folder / "teacher" / "last.pth")
    last["history"] = last["history"][:2]
    torch.save(last, folder / "teacher" / "last.pth")
    capsys.readouterr()
    train("distillation", "--teacher-epochs", "3")
    out = capsys.readouterr().out
    assert "teacher epoch   3/3" in out and "teacher epoch   1/3" not in out


def test_teacher_that_knows_nothing_is_refused(train, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "min_teacher_accuracy", lambda classes: 1.1)
    with pytest.raises(utils.UserError, match="would teach noise"):
        train("distillation")
    assert not (tmp_path / "checkpoints" / "quick" / "distilled").exists()


def test_teacher_below_the_baseline_is_warned_about(train, capsys):
    folder = train("baseline")
    best = torch.load(folder / "baseline" / "best_model.pth", weights_only=True)
    torch.save({**best, "val_accuracy": 1.0}, folder / "baseline" / "best_model.pth")
    train("distillation")
    assert "best_model.pth reaches 100.00% without a teacher" in capsys.readouterr().out


def test_given_teacher_must_fit(train, tmp_path):
    folder = train("distillation")
    given = tmp_path / "given.pth"
    (folder / "teacher" / "best_model.pth").rename(given)
    folder = train("distillation", "--teacher-checkpoint", given, "--teacher-model",
                   "efficientnet_b2", "--fresh")
    info = utils.load_checkpoint(folder / "distilled" / "best_model.pth")
    assert info["teacher"]["path"] == given.as_posix()
    for flags, reason in ((["--split-seed", "1"], "split_fingerprint differs, so it may have"),
                          (["--teacher-image-size", "64"], "its image_size is 32, not 64$")):
        with pytest.raises(utils.UserError, match=reason):
            train("distillation", "--teacher-checkpoint", given, *flags)


def test_teacher_has_an_image_size_of_its_own(train):
    folder = train("distillation", "--teacher-image-size", "48", "--num-epochs", "1",
                   "--teacher-epochs", "1")
    assert utils.load_checkpoint(folder / "teacher" / "best_model.pth")["image_size"] == 48
    assert utils.load_checkpoint(folder / "distilled" / "best_model.pth")["image_size"] == 32


def test_teachers_settings_are_its_own(train):
    """Learning rate, epochs and seed are the teacher's; so its run is no student's by accident."""
    folder = train("distillation", "--teacher-learning-rate", "0.002", "--learning-rate", "0.001",
                   "--teacher-epochs", "3", "--seed", "5", "--warmup-epochs", "0")
    last = {run: utils.load_checkpoint(folder / run / "last.pth") for run in ("teacher", "distilled")}
    assert [len(last[run]["history"]) for run in last] == [3, 2]
    assert last["teacher"]["identity"]["seed"] == config.MAX_SEED - 5
    first = [last[run]["history"][0]["learning_rate"] for run in last]
    assert 0.001 < first[0] < 0.002 and first[1] < 0.001


def test_teacher_is_frozen_while_it_teaches(arguments, train):
    """What train() was given is what it was: weights, statistics, eval mode, no gradient."""
    folder = train("distillation")
    teacher, _ = models.load_model(folder / "teacher" / "best_model.pth")
    teacher = models.freeze_teacher(teacher, 32)
    before = copy.deepcopy(teacher.state_dict())
    args = arguments("distillation", "--num-epochs", "1", "--fresh")
    data = data_loader.open_dataset(args)
    student = models.build_model("test_efficientnet", 10)
    about = {"path": "x", "sha256": "x", "val_accuracy": 0.5}
    info = models.build_info("distilled", student, "test_efficientnet", data, args, teacher=about)
    train_distillation.train(student, teacher, info, data, args)
    assert_equal_weights(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_stop_after_the_teacher_does_not_train_it_again(train, arguments, capsys, monkeypatch):
    """As by a kill between the two trainings."""
    monkeypatch.setattr(train_distillation, "train", None)
    with pytest.raises(TypeError):
        train("distillation")
    assert "teacher epoch" in capsys.readouterr().out
    monkeypatch.undo()
    train_distillation.main(arguments("distillation", "--num-epochs", "1", "--batch-size", "128",
                                      "--teacher-epochs", "2"))
    assert "teacher epoch" not in capsys.readouterr().out


# Operations of a step -----------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts what a GPU starts a kernel for: every operation that makes or changes a tensor."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        if not any(value.alias_info and not value.alias_info.is_write for value in returns):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(function):
    """How many operations a call of `function` takes, the second time."""
    function()
    with Operations() as counter:
        function()
    return counter.counts.total()


def operations_of_a_step(arguments, script, *flags):
    """In the scripts' own loops, all that a step takes: an epoch of 22 steps less one of 12."""
    totals = []
    for steps in (12, 22):
        args = arguments(script, "--student-model", "efficientnet_b0", "--amp-dtype", "bf16",
                         "--batch-size", "2", "--num-epochs", "1", "--fresh", *flags)
        data = data_loader.open_dataset(args)
        data = data._replace(train=data.train.select(range(2 * steps)),
                             val=data.val.select(range(16)))
        student = models.build_model(args.student_model, 10)
        info = models.build_info("baseline", student, args.student_model, data, args)
        with Operations() as counter:
            if script == "baseline":
                train_baseline.train(student, info, data, args)
            else:
                teacher = models.freeze_teacher(models.build_model("efficientnet_b2", 10), 32,
                                        torch.bfloat16)
                info |= {"run": "distilled", "teacher": {"sha256": "x"}}
                train_distillation.train(student, teacher, info, data, args)
        totals.append(counter.counts.total())
    return (totals[1] - totals[0]) / 10


def bare_step():
    """Forward, loss, backward, clipping, update of a plain timm model: nobody can do with less."""
    model = timm.create_model("efficientnet_b0", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def teachers_pass(teacher):
    images = torch.rand(2, 3, 32, 32)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            models.forward(teacher, images)
    return run


def test_operations_of_a_step(arguments):
    """At batch 16 a GPU waits for Python, which starts them one by one: none may be added unseen.
    tests/README.md has the numbers."""
    bare = operations(bare_step())
    teacher = models.build_model("efficientnet_b2", 10)
    plain = operations(teachers_pass(teacher.eval()))
    folded = operations(teachers_pass(models.freeze_teacher(teacher, 32, torch.bfloat16)))
    ce = operations_of_a_step(arguments, "baseline")
    kd = operations_of_a_step(arguments, "distillation")
    lskd = operations_of_a_step(arguments, "distillation", "--distillation-loss", "lskd")
    print(f"bare {bare}, CE {ce}, teacher {plain}, folded {folded}, KD {kd}, lskd {lskd}")
    assert folded < min(300, plain / 2)
    assert bare / 2 < ce <= bare - 71  # augmentation, meter, schedule; no counts in BatchNorm
    assert kd <= ce + folded + 27 and lskd <= kd + 31
