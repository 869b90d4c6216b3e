"""The loop: what it computes, how it diverges, resumes and stops, and what it costs.

    python -m pytest tests/test_train_baseline.py      # -m "not slow" leaves kills and signals out
"""
import gc
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
import weakref

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data_loader
import models
import train_baseline
import train_distillation
import utils
from conftest import (
    ROOT,
    assert_equal_weights,
    assert_one_message,
    assert_same_outcome,
    best_weights,
    children_of,
    finish,
    has_epoch,
    history_of,
    members_of_group,
    outcome,
    quick_folder,
    run_command,
    small_flags,
    start,
    wait_until,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("few_images")
CPU = torch.device("cpu")


def prepare(args, name="test_efficientnet"):
    """(model, info, data) of a baseline with these settings, as main() makes them."""
    data = data_loader.open_dataset(args)
    torch.manual_seed(args.seed)
    model = models.build_model(name, len(data.class_names))
    return model, models.build_info("baseline", model, name, data, args), data


def last_of(args, run="baseline"):
    return utils.load_checkpoint(utils.run_folder(run, args) / "last.pth")


# What the loop computes ---------------------------------------------------------------------------

def plain_training(args, info, data):
    """The same training in plain PyTorch and timm.

    Returns (model, EMA of its parameters, rows of the history). The learning rates are those of
    build_scheduler, which has a test of its own.
    """
    torch.manual_seed(args.seed)
    model = timm.create_model("test_efficientnet", num_classes=10)
    model = model.to(memory_format=torch.channels_last).train()
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    without_decay = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    with_decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW([
        {"params": without_decay, "weight_decay": 0.0},
        {"params": with_decay, "weight_decay": args.weight_decay}], fused=True)

    loader = data_loader.TrainingLoader(data, info, args, CPU)
    updates_per_epoch = len(loader) // args.accumulate_steps
    project_optimizer = train_baseline.build_optimizer(model, args)
    scheduler = train_baseline.build_scheduler(project_optimizer, updates_per_epoch, args)
    mean = torch.tensor(info["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(info["std"]).view(1, 3, 1, 1)

    num_updates = 0
    rows = []
    for epoch in range(args.num_epochs):
        losses = []
        accuracies = []
        for step, (images, labels) in enumerate(loader.epoch(epoch), start=1):
            logits = model(torch.addcmul(-mean / std, images, 1 / std))  # (images - mean) / std
            loss = torch.nn.functional.cross_entropy(logits, labels,
                                                     label_smoothing=args.label_smoothing)
            (loss / args.accumulate_steps).backward()
            losses.append(loss.item())
            accuracies.append((logits.argmax(1) == labels).float().mean().item())
            if step % args.accumulate_steps != 0:
                continue

            learning_rate = scheduler.get_last_lr()[0]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

            num_updates += 1
            decay = min(args.ema_decay, 1 - num_updates ** (-2 / 3))  # timm's warm-up
            for i, parameter in enumerate(model.parameters()):
                averages[i] = decay * averages[i] + (1 - decay) * parameter.detach()
        rows.append({"train_loss": sum(losses) / len(losses),
                     "train_accuracy": sum(accuracies) / len(accuracies),
                     "learning_rate": learning_rate})
    return model, averages, rows


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("flags", [
    ["--ema-decay", "0.9"], ["--clip-grad", "0"],
    ["--accumulate-steps", "2", "--label-smoothing", "0.1"]])
def test_loop_is_the_one_one_would_write(arguments, flags):
    """Two epochs, the weights to the bit: last.pth, best_model.pth and the history."""
    args = arguments("baseline", "--num-epochs", "2", "--batch-size", "32", *flags)
    model, info, data = prepare(args)
    train_baseline.train(model, info, data, args)
    last = last_of(args)
    plain, averages, rows = plain_training(args, info, data)

    assert_equal_weights(plain.state_dict(), last["states"]["model"])
    for row, expected in zip(last["history"], rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert row["ce_loss"] == row["train_loss"]
        assert row["distill_loss"] is None
        assert row["images_per_second"] > 0
    if args.ema_decay:
        for (name, _), average in zip(plain.named_parameters(), averages, strict=True):
            ema_weights = last["states"]["ema"][f"module.{name}"]
            torch.testing.assert_close(ema_weights, average, rtol=1e-3, atol=1e-4)


def test_best_model_has_the_ema_weights(train):
    folder = train("baseline", "--ema-decay", "0.9", "--num-epochs", "1") / "baseline"
    states = utils.load_checkpoint(folder / "last.pth")["states"]
    for name, tensor in best_weights(folder).items():
        assert torch.equal(tensor, states["ema"][f"module.{name}"])
    assert not torch.equal(best_weights(folder)["conv_stem.weight"],
                           states["model"]["conv_stem.weight"])


def test_ema_is_timms_to_the_bit():
    """Weights, BatchNorm's statistics and its counters, through the warm-up of the decay."""
    torch.manual_seed(0)
    model = models.build_model("test_efficientnet", 10).train()
    ours = train_baseline.EMA(model, 0.9)
    timms = ModelEmaV3(model, decay=0.9, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 40):
        model(torch.rand(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        ours.update(num_updates=step)
        timms.update(model, step=step)

    assert_equal_weights(ours.module.state_dict(), timms.module.state_dict())
    counters = [tensor for name, tensor in ours.module.state_dict().items()
                if name.endswith("num_batches_tracked")]
    assert counters
    assert all(counter == 39 for counter in counters)
    assert not torch.equal(ours.module.conv_stem.weight, model.conv_stem.weight)


@pytest.mark.slow
def test_counters_of_batchnorm_are_timms_in_checkpoints(train):
    """`num_batches_tracked` counts the steps of the run up to the saved epoch."""
    folder = train("baseline", "--ema-decay", "0.9") / "baseline"
    best = utils.load_checkpoint(folder / "best_model.pth")
    assert best["state_dict"].keys() == timm.create_model("test_efficientnet").state_dict().keys()
    counters = [tensor.item() for name, tensor in best["state_dict"].items()
                if name.endswith("num_batches_tracked")]
    assert set(counters) == {best["epoch"] * 128 // 32}


def expected_learning_rates(args, updates_per_epoch):
    """Of all updates: linear warm-up over WARMUP_EPOCHS, then cosine to zero."""
    total = args.num_epochs * updates_per_epoch
    warmup = round(args.warmup_epochs * updates_per_epoch)
    rates = []
    for step in range(warmup):
        rates.append(args.learning_rate * (1 / warmup + (1 - 1 / warmup) * step / warmup))
    for step in range(total - warmup):
        rates.append(args.learning_rate * (1 + math.cos(math.pi * step / (total - warmup))) / 2)
    return rates


@pytest.mark.parametrize("warmup", [0, 0.5, 2])
def test_schedule_warms_up_linearly_then_follows_a_cosine(arguments, warmup):
    args = arguments("baseline", "--num-epochs", "10", "--warmup-epochs", warmup,
                     "--learning-rate", "0.5")
    optimizer = train_baseline.build_optimizer(torch.nn.Linear(2, 2), args)
    scheduler = train_baseline.build_scheduler(optimizer, 10, args)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected_learning_rates(args, 10), abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_weight_decay_stays_off_biases_and_norms(arguments):
    model = models.build_model("efficientnet_b0", 10)
    optimizer = train_baseline.build_optimizer(model, arguments("baseline", "--weight-decay",
                                                                "0.1"))
    decays = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decays[parameter] = group["weight_decay"]
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.1 if parameter.ndim > 1 else 0.0
        assert decays[parameter] == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_mixed_precision_learns_in_float32_weights(arguments, precision, device):
    args = arguments("baseline", "--amp-dtype", precision, "--num-epochs", "3", "--batch-size",
                     "16")
    model, info, data = prepare(args)
    train_baseline.train(model.to(device), info, data, args)
    last = last_of(args)
    assert last["history"][2]["train_loss"] < 0.7 * last["history"][0]["train_loss"]
    has_scale = "scale" in last["states"]["scaler"]
    assert has_scale == (precision == "fp16")
    for tensor in last["states"]["model"].values():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.isfinite(tensor).all()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_skipped_fp16_steps_are_no_divergence(arguments, device):
    """A scale so large that the first gradients overflow; then it settles."""
    args = arguments("baseline", "--amp-dtype", "fp16", "--num-epochs", "2", "--batch-size", "8")
    model, info, data = prepare(args)
    train_baseline.train(model.to(device), info, data, args)
    last_path = utils.run_folder("baseline", args) / "last.pth"
    last = utils.load_checkpoint(last_path)
    del last["history"][1]
    last["states"]["scaler"]["scale"] = 2.0**18
    torch.save(last, last_path)

    train_baseline.train(model, info, data, args)
    last = utils.load_checkpoint(last_path)
    updates = last["states"]["optimizer"]["state"][0]["step"]
    skipped = last["states"]["scheduler"]["last_epoch"] - updates
    assert 0 < skipped < 16
    assert math.isfinite(last["history"][1]["train_loss"])
    for tensor in best_weights(last_path.parent).values():
        assert torch.isfinite(tensor).all()


def test_gradients_are_clipped_at_their_own_scale(arguments, monkeypatch):
    """Not at that of the fp16 scaler, which is 65,536 at first."""
    norms = {"fp32": [], "fp16": []}
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_record(parameters, max_norm):
        norms[precision].append(clip(parameters, max_norm).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_record)
    for precision in norms:
        args = arguments("baseline", "--amp-dtype", precision, "--num-epochs", "1", "--fresh",
                         "--batch-size", "16", "--warmup-epochs", "0")
        model, info, data = prepare(args)
        train_baseline.train(model, info, data, args)

    in_fp16 = [norm for norm in norms["fp16"] if math.isfinite(norm)]  # the others are skipped
    assert len(in_fp16) > 4
    assert min(in_fp16) > 0.1
    assert max(in_fp16) < 10 * max(norms["fp32"])


def test_mixed_labels_have_no_training_accuracy(train):
    folder = train("baseline", "--mixup-alpha", "0.4", "--num-epochs", "1")
    row, = history_of(folder / "baseline")
    assert row["train_accuracy"] is None
    assert row["train_loss"] > 0
    assert row["entropy"] > 0


def test_best_model_is_the_one_validated(arguments):
    """With EMA too: it has the accuracy on the validation images that it was chosen by."""
    args = arguments("baseline", "--ema-decay", "0.8", "--num-epochs", "3", "--batch-size", "32")
    model, info, data = prepare(args)
    best_path = train_baseline.train(model, info, data, args)
    best_model, about = models.load_model(best_path)
    history = last_of(args)["history"]
    row = history[about["epoch"] - 1]
    assert about["val_accuracy"] == row["val_accuracy"]
    assert about["val_accuracy"] == max(row["val_accuracy"] for row in history)

    loader = data_loader.EvaluationLoader(data.val, info, args, CPU)
    measured = train_baseline.validate(best_model, loader)
    assert measured["val_accuracy"] == about["val_accuracy"]
    assert measured["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)


def test_dropout_differs_by_epoch_seed_and_process(arguments, monkeypatch):
    args = arguments("baseline", "--num-epochs", "3")
    other_seed = arguments("baseline", "--num-epochs", "3", "--seed", args.seed + 1)

    def draw(args, epoch, rank=0):
        monkeypatch.setattr(utils, "RANK", rank)
        train_baseline.seed_dropout(args, epoch)
        return torch.rand(4).tolist()

    draws = [draw(args, 0), draw(args, 1), draw(args, 2), draw(other_seed, 0), draw(args, 0, 1)]
    assert len({tuple(numbers) for numbers in draws}) == len(draws)
    assert draw(args, 1) == draws[1]


def test_dropout_is_not_drawn_from_the_seeds_of_the_images(arguments):
    """Equal seeds would tie the dropout of an epoch to its order and crops."""
    args = arguments("baseline", "--num-epochs", "4", "--batch-size", "32")
    _, info, data = prepare(args)
    loader = data_loader.TrainingLoader(data, info, args, CPU)
    of_images = []

    def record_seed(order, batch_size, generator, rank_rows):
        of_images.append(generator.initial_seed())
        return []

    loader.source.batches = record_seed
    of_dropout = []
    for epoch in range(4):
        list(loader.epoch(epoch))
        train_baseline.seed_dropout(args, epoch)
        of_dropout.append(torch.initial_seed())
    assert len(set(of_images + of_dropout)) == 8


# Divergence ---------------------------------------------------------------------------------------

def test_diverging_run_keeps_what_was_saved(arguments, tmp_path, capsys):
    args = arguments("baseline", "--learning-rate", "1e30", "--clip-grad", "0", "--num-epochs",
                     "3", "--warmup-epochs", "2")
    assert utils.run_script(train_baseline.main, args) == 1
    assert_one_message(capsys.readouterr().err, "training diverged", "learning rate",
                       "--learning-rate", "--amp-dtype fp32")
    for path in tmp_path.rglob("*.pth"):
        checkpoint = utils.load_checkpoint(path)
        tensors = checkpoint.get("state_dict")
        if tensors is None:
            tensors = checkpoint["states"].get("model", {})
        for tensor in tensors.values():
            assert torch.isfinite(tensor).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["baseline", "distillation"])
def test_diverged_run_does_not_continue_for_hours(train, monkeypatch, script):
    """The step after which a loss is not finite is noticed at the next reading of the metrics, not
    at the end of the epoch, though no progress bar is shown."""
    monkeypatch.setattr(train_baseline, "LOG_EVERY", 3)
    if script == "distillation":
        train("distillation", "--num-epochs", "1")  # the teacher, too
    cross_entropy = models.cross_entropy
    calls = []

    def cross_entropy_until_step_2(*args):
        calls.append(args)
        loss = cross_entropy(*args)
        return loss * math.nan if len(calls) == 2 else loss

    monkeypatch.setattr(models, "cross_entropy", cross_entropy_until_step_2)
    with pytest.raises(utils.UserError, match="diverged.*step 3 of epoch 1"):
        train(script, "--fresh")
    assert len(calls) == 3  # of four steps


# Resuming -----------------------------------------------------------------------------------------

class Interrupted(BaseException):
    """Ends a run in this process, where a signal would end pytest."""


def interrupt_at_call(number, function):
    """`function`, which raises Interrupted when it is called for the so many-th time."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == number:
            raise Interrupted
        return function(*args)
    return interrupted


@pytest.mark.parametrize("flags", [
    [], ["--ema-decay", "0.9", "--mixup-alpha", "0.4", "--cutmix-alpha", "1"],
    ["--amp-dtype", "fp16"]])
def test_resumed_run_ends_with_the_same_bits(arguments, flags):
    """With dropout and drop path too, whatever was drawn before, and after each epoch."""
    args = arguments("baseline", "--num-epochs", "2", "--batch-size", "32", *flags)
    folder = utils.run_folder("baseline", args)

    def prepare_with_dropout():
        model, info, data = prepare(args)
        model.drop_rate = 0.3  # timm's head reads it
        for module in model.modules():
            if hasattr(module, "drop_path"):
                module.drop_path = timm.layers.DropPath(0.2)
        return model, info, data

    train_baseline.train(*prepare_with_dropout(), args)
    whole = outcome(folder)

    args.fresh = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_baseline, "validate", interrupt_at_call(2, train_baseline.validate))
        with pytest.raises(Interrupted):
            train_baseline.train(*prepare_with_dropout(), args)
    assert len(history_of(folder)) == 1

    args.fresh = False
    torch.rand(7)
    train_baseline.train(*prepare_with_dropout(), args)
    assert_same_outcome(whole, outcome(folder))


def test_best_epoch_is_remembered_when_a_run_resumes(arguments, monkeypatch):
    """The first of three is the best, and the run stops after it."""
    args = arguments("baseline", "--num-epochs", "3", "--batch-size", "32")
    accuracies = [0.9, None, 0.5, 0.6]

    def validate(model, loader):
        accuracy = accuracies.pop(0)
        if accuracy is None:
            raise Interrupted
        return {"val_loss": 1.0, "val_accuracy": accuracy}

    monkeypatch.setattr(train_baseline, "validate", validate)
    with pytest.raises(Interrupted):
        train_baseline.train(*prepare(args), args)
    best_path = train_baseline.train(*prepare(args), args)
    assert len(last_of(args)["history"]) == 3
    assert utils.load_checkpoint(best_path)["epoch"] == 1


@pytest.mark.slow
def test_kill_between_two_files_of_an_epoch(train, tmp_path):
    """Where best_model.pth or last.pth is an epoch ahead of the rest, the outcome is the same."""
    folder = quick_folder(tmp_path)
    last_path = folder / "last.pth"
    table = tmp_path / "results" / "quick" / "baseline_history.csv"
    flags = ["--num-epochs", "3"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_baseline, "validate", interrupt_at_call(3, train_baseline.validate))
        with pytest.raises(Interrupted):
            train("baseline", *flags)
    last_of_epoch_2 = last_path.read_bytes()
    table_of_epoch_2 = table.read_bytes()
    assert len(history_of(folder)) == 2
    train("baseline", *flags)
    whole = outcome(folder)
    whole_table = table.read_bytes()
    assert len(whole_table.splitlines()) == 4
    assert utils.is_finished(folder)

    # The last epoch's best_model.pth and last.pth were written, not the history.
    table.write_bytes(table_of_epoch_2)
    train("baseline", *flags)
    assert table.read_bytes() == whole_table

    # Its best_model.pth alone was written.
    table.write_bytes(table_of_epoch_2)
    last_path.write_bytes(last_of_epoch_2)
    assert not utils.is_finished(folder)
    train("baseline", *flags)
    assert_same_outcome(whole, outcome(folder))


def test_run_killed_within_the_first_epoch_is_not_finished(train, tmp_path, monkeypatch):
    """The first best_model.pth is not taken for one put there by hand, as a teacher's may be."""
    folder = quick_folder(tmp_path)
    save_checkpoint = utils.save_checkpoint
    is_finished = []

    def save_and_look(checkpoint, target):
        save_checkpoint(checkpoint, target)
        is_finished.append(utils.is_finished(folder))

    monkeypatch.setattr(utils, "save_checkpoint", save_and_look)
    train("baseline", "--num-epochs", "1")
    assert is_finished == [False, False, True]  # no epoch yet, best_model.pth, last.pth


def test_run_of_other_images_is_not_resumed(train, tmp_path, capsys):
    """A picture is renamed, everything else is the same."""
    pictures = write_pictures(tmp_path / "pictures")
    flags = ["--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size", "4",
             "--val-fraction", "0.25", "--num-workers", "0", "--num-epochs", "1"]
    train("baseline", *flags)
    (pictures / "train" / "cat" / "000.png").rename(pictures / "train" / "cat" / "a.png")
    folder = train("baseline", *flags)
    assert "different images or split" in capsys.readouterr().out
    assert (folder / "baseline.1" / "best_model.pth").is_file()


def test_run_that_lost_its_best_model_is_trained_again(train, capsys):
    """Else training, which calls it trained, and evaluate.py, which does not, would go in circles.
    """
    folder = train("baseline", "--num-epochs", "1")
    (folder / "baseline" / "best_model.pth").unlink()
    train("baseline", "--num-epochs", "1")
    out = capsys.readouterr().out
    assert "best_model.pth missing" in out
    assert "already trained" not in out
    assert (folder / "baseline" / "best_model.pth").is_file()


def test_finished_run_is_left_alone(train, capsys):
    folder = train("baseline")
    saved = (folder / "baseline" / "last.pth").stat().st_mtime_ns
    out = capsys.readouterr().out
    estimate = out.index("about")
    assert estimate < out.index("epoch   1/2") < out.index("next: python train_distillation.py")

    train("baseline")
    out = capsys.readouterr().out
    assert "already trained" in out
    assert "baseline epoch" not in out
    assert (folder / "baseline" / "last.pth").stat().st_mtime_ns == saved
    assert not (folder / "baseline.1").exists()


def test_next_command_has_the_flags_it_needs(arguments, tmp_path, monkeypatch):
    flags = ["--num-epochs", "3", "--no-pretrained", "--fresh", "--seeds", "0", "1"]
    args = arguments("baseline", *flags)
    folders = (f"--quick --device cpu --checkpoint-dir {tmp_path}/checkpoints "
               f"--results-dir {tmp_path}/results --data-dir {tmp_path}/data")
    records = train_baseline.student_records(args, types.SimpleNamespace(split_fingerprint="f"))
    assert train_baseline.next_command(records, "distilled", args) == (
        f"python train_distillation.py {folders} --student-model test_efficientnet "
        "--dataset-name Digits --ema-decay 0 --warmup-epochs 1 --num-epochs 3 --no-pretrained "
        "--seeds 0 1")

    # evaluate.py, once the other has all of these seeds
    monkeypatch.setattr(models, "load_model", lambda path: load_without_model(path, args))
    scripts = []
    for folder in ("", "seed_0", "seed_1"):
        distilled = quick_folder(tmp_path, "distilled") / folder / "best_model.pth"
        distilled.parent.mkdir(parents=True, exist_ok=True)
        distilled.touch()
        command = train_baseline.next_command(records, "distilled", args)
        scripts.append(command.split()[1])
    assert scripts == ["train_distillation.py", "train_distillation.py", "evaluate.py"]
    assert command == f"python evaluate.py {folders}"


def load_without_model(path, args):
    """What models.load_model returns, of a student that was trained as args say."""
    if not path.is_file():
        raise utils.UserError
    seed = int(path.parent.name.removeprefix("seed_"))
    config = models.recorded_settings(args) | {"seed": seed}
    return None, {"config": config, "model_name": args.student_model, "split_fingerprint": "f"}


@pytest.mark.slow
def test_several_seeds(train, tmp_path, capsys):
    """A folder each, the teacher once; each student depends on its seed alone."""
    folder = train("baseline", "--seeds", "3", "4", "--num-epochs", "1")
    train("baseline", "--seed", "4", "--num-epochs", "1")
    single = best_weights(folder / "baseline")
    seed_3 = best_weights(folder / "baseline" / "seed_3")
    assert_equal_weights(single, best_weights(folder / "baseline" / "seed_4"))
    assert not torch.equal(seed_3["conv_stem.weight"], single["conv_stem.weight"])

    capsys.readouterr()
    train("distillation", "--seeds", "3", "4", "--num-epochs", "1")
    out = capsys.readouterr().out
    assert out.count("teacher epoch   1/2") == 1
    for seed in (3, 4):
        assert f"distilled, seed {seed} epoch   1/1" in out
    assert not (folder / "teacher" / "seed_3").exists()
    assert (tmp_path / "results" / "quick" / "seed_4" / "distilled_history.csv").is_file()


@pytest.mark.slow
def test_finished_seeds_are_skipped_and_left_in_place(train, capsys):
    flags = ["--num-epochs", "1"]
    folder = train("baseline", "--seeds", "3", *flags) / "baseline"
    saved = (folder / "seed_3" / "last.pth").stat().st_mtime_ns
    capsys.readouterr()
    train("baseline", "--seeds", "5", "3", *flags)
    out = capsys.readouterr().out
    assert "baseline, seed 5 epoch   1/1" in out
    assert "baseline, seed 3: already trained" in out

    # A single run's --fresh moves that run aside, not the seeds below it.
    train("baseline", *flags)
    train("baseline", "--fresh", *flags)
    assert (folder / "seed_3" / "last.pth").stat().st_mtime_ns == saved
    assert (folder.with_name("baseline.1") / "best_model.pth").is_file()
    assert not list(folder.with_name("baseline.1").glob("seed_*"))

    train("baseline", "--seeds", "3", "--learning-rate", "0.001", *flags)
    assert (folder / "seed_3.1" / "best_model.pth").is_file()
    assert len(models.student_checkpoints(folder)) == 3


# Kills and signals --------------------------------------------------------------------------------

# Forks a process that trains for every line it reads, and prints its number and its exit status:
# the imports, most of a start, are made once.
FORKING_SCRIPT = """
import os, sys
import config, train_baseline, utils

for _ in sys.stdin:
    number = os.fork()
    if number == 0:
        os._exit(utils.run_script(train_baseline.main, config.parse_args("baseline", "")))
    print(number, flush=True)
    _, status = os.waitpid(number, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
def test_twenty_kills_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    """SIGKILL at random moments, every other time while files are written; resumed each time."""
    flags = ["--num-epochs", "60", "--batch-size", "32", "--ema-decay", "0.9"]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    last_path = quick_folder(killed) / "last.pth"
    moments = random.Random(0)

    def half_written():
        return [*quick_folder(killed).glob("*.tmp"), *(killed / "results").rglob("*.tmp")]

    def last_saved():
        return last_path.stat().st_mtime_ns if last_path.exists() else 0

    undisturbed = start("baseline", whole, *flags)
    command = [sys.executable, "-c", FORKING_SCRIPT, *small_flags("baseline", killed, *flags)]
    kills_while_writing = 0
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, bufsize=1) as forks:
        for kill in range(20):
            before = last_saved()
            forks.stdin.write("\n")
            number = next(int(line) for line in forks.stdout if line.strip().isdigit())
            wait_until(lambda: last_saved() != before)  # noqa: B023
            time.sleep(moments.random() * 0.3)
            if kill % 2 == 1:
                end = time.time() + 20
                while not half_written() and time.time() < end:
                    pass
            os.kill(number, signal.SIGKILL)
            status = next(line for line in forks.stdout if line.strip() in ("0", "-9"))
            assert status == "-9\n"
            kills_while_writing += bool(half_written())

    status, _, err = finish(start("baseline", killed, *flags))
    assert status == 0, err
    status, _, err = finish(undisturbed)
    assert status == 0, err
    assert kills_while_writing >= 3
    assert_same_outcome(outcome(quick_folder(whole)), outcome(quick_folder(killed)))
    assert not list(tmp_path.rglob("*.tmp"))


# As on a system where Python starts processes in this way.
TRAINING_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch.multiprocessing
import config, train_baseline, utils

if __name__ == "__main__":
    torch.multiprocessing.set_start_method({method!r})
    sys.exit(utils.run_script(train_baseline.main, config.parse_args("baseline", "")))
"""


def start_on_photographs(folder, method):
    """Start a training with two data workers in a session of its own; wait for its first epoch. An
    epoch takes a second or two, so that a signal comes in its midst."""
    pictures = write_pictures(folder / "pictures", counts=(("train", 80), ("test", 2)))
    script = folder / "train.py"
    script.write_text(TRAINING_SCRIPT.format(root=str(ROOT), method=method), encoding="utf-8")
    command = [sys.executable, script, *small_flags("baseline", folder), "--dataset-name",
               "ImageFolder", "--dataset-dir", pictures, "--batch-size", "4", "--num-epochs", "200",
               "--val-fraction", "0.05", "--num-workers", "2"]
    process = run_command(command, own_session=True)
    # In the first epoch a worker may still be importing torch, and answer Ctrl-C in its own way.
    wait_until(lambda: has_epoch(quick_folder(folder)), 300)
    wait_until(lambda: len(history_of(quick_folder(folder))) >= 2, 300)
    return process


ENDS = {"Ctrl-C": (signal.SIGINT, 130),          # a terminal sends it to the whole process group
        "SIGTERM": (signal.SIGTERM, 143),        # as kill does
        "SIGTERM to all": (signal.SIGTERM, 143),  # as systemd and Slurm do
        "SIGKILL": (signal.SIGKILL, -9)}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to signal")
@pytest.mark.parametrize("method, end", [
    ("fork", "Ctrl-C"), ("fork", "SIGTERM"), ("fork", "SIGTERM to all"), ("fork", "SIGKILL"),
    ("spawn", "Ctrl-C"), ("spawn", "SIGTERM"), ("spawn", "SIGKILL"),
    ("forkserver", "Ctrl-C"), ("forkserver", "SIGTERM"), ("forkserver", "SIGKILL")])
def test_no_process_survives_the_end(tmp_path, method, end):
    """One message after a signal, no traceback, and neither data workers nor Python's own helpers
    stay, whatever the start method of processes."""
    process = start_on_photographs(tmp_path, method)
    number, expected_status = ENDS[end]
    assert len(members_of_group(process.pid)) >= 3
    if end in ("Ctrl-C", "SIGTERM to all"):
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)

    status, _, err = finish(process, 120)
    assert status == expected_status
    if end != "SIGKILL":
        assert_one_message(err, "of 200", "baseline", "resumes")
        named = int(re.search(r"epoch (\d+) of 200", err)[1])
        saved = len(history_of(quick_folder(tmp_path)))
        assert named in (saved, saved - 1)  # the signal may come just when last.pth is in place
    wait_until(lambda: not members_of_group(process.pid), 30)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_data_worker_ends_training_with_one_message(tmp_path):
    """As the kernel kills where memory is short. DataLoader itself may say more as it is closed."""
    process = start_on_photographs(tmp_path, "fork")
    os.kill(children_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "--num-workers" in err.splitlines()[0]
    assert 'train_baseline.py", line' not in err
    wait_until(lambda: not members_of_group(process.pid), 30)


@pytest.mark.slow
def test_same_seed_gives_the_same_bits_in_two_processes(tmp_path):
    processes = [start("baseline", tmp_path / name, "--num-epochs", "2") for name in ("a", "b")]
    for process in processes:
        status, _, err = finish(process)
        assert status == 0, err
    one = quick_folder(tmp_path / "a")
    assert_same_outcome(outcome(one), outcome(quick_folder(tmp_path / "b")))

    versions = utils.load_checkpoint(one / "best_model.pth")["versions"]
    assert versions["device"].startswith("CPU")
    assert versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__


# Waiting for the GPU, seen without one ------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: values read, sizes that depend on them, blocking copies."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        kwargs = kwargs or {}
        if any(waiting in name for waiting in self.NAMES) or self.indexes_by_mask(name, args):
            self.found.append(name)
        if "_to_copy" in name and self.blocks(args[0], **kwargs):
            self.found.append(name)
        return operation(*args, **kwargs)

    def indexes_by_mask(self, name, args):
        if not name.startswith("aten.index."):
            return False
        return any(index is not None and index.dtype == torch.bool for index in args[1])

    def blocks(self, tensor, device=None, dtype=None, non_blocking=False, **_):
        source = tensor.device.type
        target = device.type if device is not None else source
        if source == target:
            return False
        converts = dtype not in (None, tensor.dtype)  # the host would have to, first
        return target == "cpu" or not non_blocking or converts


def test_what_waits_is_noticed():
    with Waits() as waits:
        float(torch.ones(3)[torch.tensor([True, False, False])])
        torch.ones(3).to("meta")
        torch.ones(3, dtype=torch.float64).to("meta", torch.float32, non_blocking=True)
    assert len(waits.found) == 4


KINDS = [["--distillation-loss", "kd", "--clip-grad", "0"],
         ["--distillation-loss", "dist", "--accumulate-steps", "1"],
         ["--distillation-loss", "lskd", "--accumulate-steps", "2"],
         ["--kl-direction", "reverse", "--teacher-image-size", "48", "--mixup-alpha", "0.2"]]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [*KINDS, ["--ema-decay", "0.9"]])
def test_nothing_in_the_loop_would_wait(arguments, flags):
    """An epoch of eight steps reads as many values as one of four: none of them in a step."""
    counts = []
    for batch_size in (16, 32):
        args = arguments("distillation", "--batch-size", batch_size, "--num-epochs", "1", "--fresh",
                         "--distillation-loss", "kd", *flags)
        student, info, data = prepare(args)
        teacher = models.freeze_teacher(models.build_model("test_resnet", 10), 32)
        info |= {"run": "distilled", "teacher": {"sha256": "x"}}
        with Waits() as waits:
            train_distillation.train(student, teacher, info, data, args)
        counts.append(len(waits.found))
    assert counts[0] == counts[1] < 40


# The loop on tensors without values ---------------------------------------------------------------

def pretend(model, device):
    """`model` with tensors that claim to be on `device` and hold no values."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype,
                                            device=device)
                if tensors is module._parameters:
                    empty = torch.nn.Parameter(empty, tensor.requires_grad)
                tensors[name] = empty
    return model


def fake_training(args, names, device, mode, monkeypatch):
    """Train on tensors without values until the first one is read, in the dispatch mode `mode`.

    `names` are the models', a teacher's second. Returns how many steps were made till then.
    """
    student, info, data = prepare(args, names[0])
    teachers = []
    for name in names[1:]:
        teacher = models.build_model(name, len(data.class_names))
        dtype = utils.DTYPES[args.amp_dtype]
        teachers.append(models.freeze_teacher(teacher, args.image_size, dtype))

    monkeypatch.setattr(train_baseline, "LOG_EVERY", 10**9)  # so that the epoch's end reads first
    values_are_read = torch._subclasses.fake_tensor.DataDependentOutputException
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for model in (student, *teachers):
            pretend(model, device)
        with mode, pytest.raises(values_are_read) as stopped:
            if teachers:
                info |= {"run": "distilled", "teacher": {"sha256": "x"}}
                train_distillation.train(student, teachers[0], info, data, args)
            else:
                train_baseline.train(student, info, data, args)

    frames = {entry.name: entry.locals for entry in stopped.traceback}
    assert "means" in frames  # the metrics' own reading
    return frames["train"]["step"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked cuda do it in earnest")
@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.9, at least, asks for a driver "
                    "even for tensors that have no values")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning",
                            "ignore:.*CUDA is not available:UserWarning")
@pytest.mark.parametrize("flags", KINDS)
def test_nothing_mixes_devices(arguments, flags, monkeypatch):
    """The whole loop on tensors that torch takes for a GPU's and checks as such.

    They lie on "cuda", which is no tensor's own device ("cuda:0" would be). From the second step on
    nothing waits, and the first value is read at the epoch's end. All but the backward pass.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")

    def backward(loss):
        assert loss.is_cuda
        assert loss.requires_grad

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    found = []
    for batch_size in (16, 32):
        args = arguments("distillation", "--batch-size", batch_size, *flags)
        waits = Waits()
        steps = fake_training(args, ["test_efficientnet", "test_resnet"], "cuda", waits,
                              monkeypatch)
        assert steps >= 4
        found.append(len(waits.found))
    assert found[0] == found[1]


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that live, in blocks of 512 as torch reserves them."""

    def __init__(self):
        super().__init__()
        self.known = set()
        self.now = 0
        self.peak = 0

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) in self.known:
            return
        size = math.ceil(storage.nbytes() / 512) * 512
        self.known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, id(storage), size)

    def forget(self, storage, size):
        self.known.remove(storage)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


MEMORY_LIMITS = [(["efficientnet_b0"], 1.5), (["efficientnet_b0", "efficientnet_b2"], 2.5),
                 (["efficientnet_b2"], 3.0)]  # GB


@pytest.mark.slow
@pytest.mark.parametrize("names, limit", MEMORY_LIMITS)
@pytest.mark.parametrize("batch_size", [16, 64])
def test_memory_of_what_lives(arguments, names, limit, batch_size, monkeypatch):
    """GB of tensors alive at once in steps at 224 px in bf16, counted on tensors without values.

    A third of the limit is left for what only a GPU shows, cuDNN's workspaces and gaps between
    blocks; batches of 64 leave 1.5 of 6 GB.
    """
    val_fraction = 1 - 2.2 * batch_size / 1437  # two steps
    args = arguments("distillation", "--batch-size", batch_size, "--image-size", "224",
                     "--amp-dtype", "bf16", "--val-fraction", val_fraction,
                     "--ema-decay", "0.999")
    alive = Alive()
    steps = fake_training(args, names, "cpu", alive, monkeypatch)
    print(f"batch {batch_size}, {' taught by '.join(names)}: {alive.peak / 1e9:.2f} GB")
    assert steps == 2  # the first makes AdamW's moments

    student = models.build_model(names[0], 10)
    weights = sum(tensor.nbytes for tensor in student.state_dict().values())
    # Weights, gradient, moments, EMA, activations.
    assert alive.peak > 5 * weights + batch_size * 30e6
    if batch_size == 16:
        assert alive.peak < 2 / 3 * limit * 1e9
    else:
        assert alive.peak < 4.5e9


@pytest.mark.slow
@pytest.mark.parametrize("name, limit", [("efficientnet_b0", 1.5), ("efficientnet_b2", 3.0)])
def test_memory_of_evaluation(name, limit):
    """Batches of evaluation at 224 px, in float32, take no more than training may."""
    count = data_loader.EVAL_PIXELS // 224**2
    model = models.build_model(name, 10)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        pretend(model, "cpu")
        images = torch.empty(count, 3, 224, 224)
        labels = torch.zeros(count, dtype=torch.int64)
        with Alive() as alive:
            models.infer(model, [(images, labels)])
    assert alive.peak > images.nbytes
    assert alive.peak < 2 / 3 * limit * 1e9


@pytest.mark.slow
def test_accumulation_saves_memory(arguments, monkeypatch):
    """Four batches of 16 to an update take little more than one: each one's activations go."""
    peaks = []
    for accumulate_steps in (1, 4):
        args = arguments("baseline", "--batch-size", "16", "--image-size", "64",
                         "--accumulate-steps", accumulate_steps)
        alive = Alive()
        fake_training(args, ["efficientnet_b0"], "cpu", alive, monkeypatch)
        peaks.append(alive.peak)
    assert peaks[1] < 1.1 * peaks[0]


# On a GPU -----------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("storage", ["device", "host", "files"])
@pytest.mark.parametrize("precision, flags", [
    ("fp32", ["--ema-decay", "0.9", "--cuda-graph"]),
    ("bf16", ["--teacher-image-size", "64", "--cuda-graph"]),
    ("fp16", ["--distillation-loss", "lskd", "--accumulate-steps", "2"])])
def test_loop_never_waits_for_the_device(
        arguments, storage, precision, flags, monkeypatch, tmp_path):
    """Between two readings of the metrics, wherever the images are: torch raises at any
    synchronisation."""
    if storage == "files":
        pictures = write_pictures(tmp_path / "pictures", counts=(("train", 80), ("test", 3)))
        flags = [*flags, "--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size",
                 "8", "--num-workers", "0"]
    if storage == "host":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(train_baseline, "LOG_EVERY", 10**9)  # so that the epoch's end reads first
    args = arguments("distillation", "--amp-dtype", precision, "--num-epochs", "1", *flags)
    epoch_with_teacher = data_loader.TrainingLoader.epoch_with_teacher

    def watched(loader, epoch):
        batches = iter(epoch_with_teacher(loader, epoch))
        try:
            for step in range(len(loader)):
                if step == 3:  # by when all has been made that is made once
                    torch.cuda.set_sync_debug_mode("error")
                batch = next(batches)
                if step == len(loader) - 1:  # this step reads the metrics
                    torch.cuda.set_sync_debug_mode("default")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(data_loader.TrainingLoader, "epoch_with_teacher", watched)
    student, info, data = prepare(args)
    teacher = models.build_model("test_resnet", len(data.class_names))
    teacher = models.freeze_teacher(teacher, 64, utils.DTYPES[precision]).cuda()
    info |= {"run": "distilled", "teacher": {"sha256": "x"}}
    train_distillation.train(student.cuda(), teacher, info, data, args)


@pytest.mark.cuda
@pytest.mark.parametrize("names, limit", MEMORY_LIMITS)
def test_peak_memory_at_the_default_batch(arguments, names, limit, monkeypatch):
    """GB reserved in an epoch at 224 px, batch 16, mixed precision, as the history has it."""
    gc.collect()
    torch.cuda.empty_cache()
    left_behind = torch.cuda.memory_reserved()  # by earlier tests, cuBLAS's workspaces among it
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as the scripts have it
    args = arguments("distillation", "--batch-size", "16", "--image-size", "224", "--num-epochs",
                     "2", "--amp-dtype", "bf16", "--val-fraction", "0.8", "--cuda-graph")
    student, info, data = prepare(args, names[0])
    if len(names) == 2:
        teacher = models.build_model(names[1], 10)
        teacher = models.freeze_teacher(teacher, 224, torch.bfloat16).cuda()
        info |= {"run": "distilled", "teacher": {"sha256": "x"}}
        train_distillation.train(student.cuda(), teacher, info, data, args)
    else:
        train_baseline.train(student.cuda(), info, data, args)
    row = last_of(args, info["run"])["history"][1]
    assert row["peak_memory_mb"] * 2**20 - left_behind < limit * 1e9


@pytest.mark.cuda
@pytest.mark.parametrize("script", ["baseline", "distillation"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("error")
def test_graphs_train_as_single_kernels_do(train, script, precision, capsys):
    """Two epochs with and without CUDA graphs, from the same weights on the same batches. What
    torch warns of, the scripts' users would see."""
    run = "baseline" if script == "baseline" else "distilled"
    histories = []
    for flags in ([], ["--cuda-graph", "--fresh"]):
        folder = train(script, "--device", "cuda", "--amp-dtype", precision, "--learning-rate",
                       "1e-4", "--seeds", "0", "1", *flags)  # the second seed captures again
        assert ("CUDA graphs" in capsys.readouterr().out) == ("--cuda-graph" in flags)
        histories.append(history_of(folder / run / "seed_1"))
    for eager, graphed in zip(*histories, strict=True):
        assert eager["train_loss"] == pytest.approx(graphed["train_loss"], rel=0.01)
        assert eager["val_loss"] == pytest.approx(graphed["val_loss"], rel=0.01)
