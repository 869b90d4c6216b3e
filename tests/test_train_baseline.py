"""The loop: the plain one bit for bit, its precision, what it keeps, what it costs.

    python -m pytest tests/test_train_baseline.py          # -m "not slow" leaves the kills out
"""
import math
import os
import random
import signal
import subprocess
import sys
import time
import weakref

import pytest
import timm
import torch
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
    assert_same_result,
    children_of,
    ended,
    flags_of,
    result,
    start,
    wait_for,
    weights,
    write_pictures,
)


def whole_run(args, name="test_efficientnet", seed=None):
    """(model, info, data) of a baseline with these settings, as main() makes them."""
    data = data_loader.open_dataset(args)
    torch.manual_seed(args.seed if seed is None else seed)
    model = models.build_model(name, len(data.class_names))
    return model, models.build_info("baseline", model, name, data, args), data


def last_of(args, run="baseline"):
    return utils.load_checkpoint(utils.run_folder(run, args) / "last.pth")


# What the loop computes ---------------------------------------------------------------------------

def plain_training(args, info, data):
    """What plain PyTorch and timm make of these settings, and the history's columns epoch by epoch.

    Returns (model, average of its weights, rows). The learning rates are those of the schedule that
    `optimization` makes, which has a test of its own.
    """
    torch.manual_seed(args.seed)
    model = timm.create_model("test_efficientnet", num_classes=10)
    model = model.to(memory_format=torch.channels_last).train()
    average, done, rows = [p.detach().clone() for p in model.parameters()], 0, []
    groups = [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
              {"params": [p for p in model.parameters() if p.ndim > 1],
               "weight_decay": args.weight_decay}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
    _, scheduler, *_ = train_baseline.optimization(model, len(loader), args)
    mean, std = (torch.tensor(info[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for epoch in range(args.num_epochs):
        losses, right = [], []
        for number, (images, labels) in enumerate(loader.epoch(epoch), 1):
            logits = model(torch.addcmul(-mean / std, images, 1 / std))  # (images - mean) / std
            loss = torch.nn.functional.cross_entropy(logits, labels,
                                                     label_smoothing=args.label_smoothing)
            (loss / args.accumulate_steps).backward()
            losses.append(loss.item())
            right.append((logits.argmax(1) == labels).float().mean().item())
            if number % args.accumulate_steps:
                continue
            rate = scheduler.get_last_lr()[0]
            for group in optimizer.param_groups:
                group["lr"] = rate
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            done += 1
            decay = min(args.ema_decay, 1 - done ** (-2 / 3))  # timm's warm-up of the average
            average = [decay * kept + (1 - decay) * value.detach()
                       for kept, value in zip(average, model.parameters(), strict=True)]
        rows.append({"train_loss": sum(losses) / len(losses),
                     "train_accuracy": sum(right) / len(right), "learning_rate": rate})
    return model, average, rows


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9"], ["--clip-grad", "0"],
                                   ["--accumulate-steps", "2", "--label-smoothing", "0.1"]])
def test_loop_is_the_one_one_would_write(arguments, flags):
    """Two epochs, bit for bit but for the average: last.pth, best_model.pth and the history."""
    args = arguments("baseline", "--num-epochs", "2", "--batch-size", "64", *flags)
    model, info, data = whole_run(args)
    train_baseline.train(model, info, data, args)
    last, best = last_of(args), weights(utils.run_folder("baseline", args))
    plain, average, rows = plain_training(args, info, data)
    assert_equal_weights(plain.state_dict(), last["states"]["model"])
    for row, wanted in zip(last["history"], rows, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
        assert row["ce_loss"] == row["train_loss"] and row["kd_loss"] is None
        assert row["images_per_second"] > 0
    if args.ema_decay:
        for (name, _), kept in zip(plain.named_parameters(), average, strict=True):
            torch.testing.assert_close(best[name], kept, rtol=1e-3, atol=1e-4)
            assert best[name].equal(last["states"]["ema"][f"module.{name}"])


def rates_of(args, updates):
    """Learning rates of all updates: linear warm-up over WARMUP_EPOCHS, then cosine to zero."""
    total, warmup = args.num_epochs * updates, round(args.warmup_epochs * updates)
    rising = [args.learning_rate * (1 / warmup + (1 - 1 / warmup) * step / warmup)
              for step in range(warmup)]
    cosine = [args.learning_rate * (1 + math.cos(math.pi * step / (total - warmup))) / 2
              for step in range(total - warmup)]
    return rising + cosine


def test_decay_stays_off_biases_and_norms(arguments):
    model = models.build_model("efficientnet_b0", 10)
    args = arguments("baseline", "--weight-decay", "0.1")
    optimizer, *_ = train_baseline.optimization(model, 10, args)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups
              for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0), name


@pytest.mark.parametrize("warmup", [0, 0.5, 2])
def test_schedule_warms_up_linearly_then_follows_a_cosine(arguments, warmup):
    args = arguments("baseline", "--num-epochs", "10", "--warmup-epochs", warmup,
                     "--learning-rate", "0.5", "--accumulate-steps", "3")
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler, *_ = train_baseline.optimization(model, 30, args)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(rates_of(args, 10), abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_mixed_precision_learns_in_float32_weights(arguments, precision, device):
    args = arguments("baseline", "--amp-dtype", precision, "--num-epochs", "2")
    model, info, data = whole_run(args)
    train_baseline.train(model.to(device), info, data, args)
    last = last_of(args)
    assert last["history"][1]["train_loss"] < 0.7 * last["history"][0]["train_loss"]
    assert ("scale" in last["states"]["scaler"]) == (precision == "fp16")
    for value in last["states"]["model"].values():
        assert value.dtype in (torch.float32, torch.int64) and torch.isfinite(value).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_skipped_fp16_steps_are_no_divergence(arguments, device):
    """A scale so large that the first gradients overflow; then it settles."""
    args = arguments("baseline", "--amp-dtype", "fp16", "--num-epochs", "2")
    model, info, data = whole_run(args)
    train_baseline.train(model.to(device), info, data, args)
    file = utils.run_folder("baseline", args) / "last.pth"
    last = utils.load_checkpoint(file)
    del last["history"][1]
    last["states"]["scaler"]["scale"] = 2.0**26
    torch.save(last, file)
    train_baseline.train(model, info, data, args)
    row, states = last_of(args)["history"][1], last_of(args)["states"]
    made = states["optimizer"]["state"][0]["step"]
    assert 0 < states["scheduler"]["last_epoch"] - made < 20 and math.isfinite(row["train_loss"])
    assert all(torch.isfinite(value).all() for value in weights(file.parent).values())


def test_mixed_labels_have_no_training_accuracy(train):
    folder = train("baseline", "--mixup-alpha", "0.4", "--num-epochs", "1")
    row, = utils.load_checkpoint(folder / "baseline" / "last.pth")["history"]
    assert row["train_accuracy"] is None and row["train_loss"] > 0 and row["entropy"] > 0


def test_gradients_are_clipped_at_their_own_scale(arguments, monkeypatch):
    """Not at that of the fp16 scaler, which is 65,536 at first."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: norms.append(
        clip(parameters, most).item()))
    for precision in ("fp32", "fp16"):
        args = arguments("baseline", "--amp-dtype", precision, "--num-epochs", "1", "--fresh",
                         "--batch-size", "128", "--warmup-epochs", "0")
        model, info, data = whole_run(args)
        train_baseline.train(model, info, data, args)
    in_fp16 = [norm for norm in norms[len(norms) // 2:] if math.isfinite(norm)]  # not skipped
    assert len(in_fp16) > 4 and 0.1 < min(in_fp16) < max(in_fp16) < 10 * max(norms[:10])


def test_best_epoch_is_not_forgotten_when_a_run_goes_on(arguments, monkeypatch):
    """The first of three is the best, and the run stops after it."""
    args = arguments("baseline", "--num-epochs", "3", "--batch-size", "128")
    measured = iter([0.9, Interrupted(), 0.5, 0.6])

    def validate(model, loader):
        accuracy = next(measured)
        if isinstance(accuracy, Interrupted):
            raise accuracy
        return {"val_loss": 1.0, "val_accuracy": accuracy}
    monkeypatch.setattr(train_baseline, "validate", validate)
    model, info, data = whole_run(args)
    with pytest.raises(Interrupted):
        train_baseline.train(model, info, data, args)
    best = train_baseline.train(*whole_run(args), args)
    assert len(last_of(args)["history"]) == 3 and utils.load_checkpoint(best)["epoch"] == 1


def test_run_of_other_images_is_not_gone_on_with(train, tmp_path, capsys):
    """A picture is renamed, everything else is the same."""
    folder = write_pictures(tmp_path / "pictures")
    flags = ["--dataset-name", "ImageFolder", "--dataset-dir", folder, "--batch-size", "4",
             "--val-fraction", "0.25", "--num-workers", "0", "--num-epochs", "1"]
    train("baseline", *flags)
    (folder / "train" / "cat" / "000.png").rename(folder / "train" / "cat" / "a.png")
    checkpoints = train("baseline", *flags)
    assert "the former baseline run (other images or split) is now in" in capsys.readouterr().out
    assert (checkpoints / "baseline.1" / "best_model.pth").is_file()


def test_run_that_lost_its_best_model_is_trained_again(train, capsys):
    """What it says first, that it is trained, and evaluate.py, that it is not, would go in circles.
    """
    checkpoints = train("baseline")
    (checkpoints / "baseline" / "best_model.pth").unlink()
    train("baseline")
    out = capsys.readouterr().out
    assert "the former baseline run (best_model.pth gone) is now in" in out
    assert "already trained" not in out and (checkpoints / "baseline" / "best_model.pth").is_file()


def test_best_model_is_the_one_validated(arguments):
    """Under EMA too: its accuracy on the validation images is the one it is chosen by."""
    args = arguments("baseline", "--ema-decay", "0.8", "--num-epochs", "3")
    model, info, data = whole_run(args)
    best = train_baseline.train(model, info, data, args)
    kept, about = models.load_model(best)
    loader = data_loader.EvaluationLoader(data.val, info, args, torch.device("cpu"))
    row = last_of(args)["history"][about["epoch"] - 1]
    assert about["val_accuracy"] == row["val_accuracy"] == max(
        row["val_accuracy"] for row in last_of(args)["history"])
    measured = train_baseline.validate(kept, loader)
    assert measured["val_accuracy"] == about["val_accuracy"]
    assert measured["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)


# Divergence ---------------------------------------------------------------------------------------

def test_diverging_run_keeps_what_was_saved(tmp_path):
    code, _, err = ended(start("baseline", tmp_path, "--learning-rate", "1e30", "--clip-grad", "0",
                               "--num-epochs", "3", "--warmup-epochs", "2"))
    assert code == 1 and err.count("\n") == 1
    for word in ("training diverged", "learning rate", "--learning-rate", "--amp-dtype fp32"):
        assert word in err
    for path in tmp_path.rglob("*.pth"):
        states = utils.load_checkpoint(path)
        saved = states.get("state_dict") or states["states"].get("model", {})
        assert all(torch.isfinite(value).all() for value in saved.values())


# Going on -----------------------------------------------------------------------------------------

# A process that forks one that trains for every line it reads, and prints its number and its exit
# status: the imports, most of a start, are made once.
FORKS = """
import os, sys
import config, train_baseline, utils
for _ in sys.stdin:
    number = os.fork()
    if not number:
        os._exit(utils.run_script(train_baseline.main, config.parse_args("baseline", "")))
    print(number, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_twenty_kills_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    """SIGKILL at random moments, every other time while files are written; resumed each time."""
    flags = ["--num-epochs", "60", "--batch-size", "128", "--ema-decay", "0.9"]
    folders = [tmp_path / name / "checkpoints" / "quick" / "baseline"
               for name in ("whole", "killed")]
    last, moments, in_save = folders[1] / "last.pth", random.Random(0), 0

    def writing():
        return [*folders[1].glob("*.tmp"), *(tmp_path / "killed" / "results").rglob("*.tmp")]

    def saved():
        return last.stat().st_mtime_ns if last.exists() else 0
    undisturbed = start("baseline", tmp_path / "whole", *flags)
    command = [sys.executable, "-c", FORKS, *flags_of("baseline", tmp_path / "killed"), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, bufsize=1) as forks:
        for kill in range(20):
            before = saved()
            forks.stdin.write("\n")
            number = next(int(line) for line in forks.stdout if line.strip().isdigit())
            wait_for(lambda: saved() != before)  # noqa: B023
            time.sleep(moments.random() * 0.3)
            if kill % 2:
                end = time.time() + 20
                while not writing() and time.time() < end:
                    pass
            os.kill(number, signal.SIGKILL)
            assert next(line for line in forks.stdout if line.strip() in ("0", "-9")) == "-9\n"
            in_save += bool(writing())
    code, _, err = ended(start("baseline", tmp_path / "killed", *flags))
    assert code == 0, err
    assert ended(undisturbed)[0] == 0
    assert in_save >= 3, in_save
    assert_same_result(*map(result, folders))
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_between_two_files_of_an_epoch(train, tmp_path, monkeypatch):
    """Where best_model.pth or last.pth is an epoch ahead of the rest, the end is the same."""
    folder, flags = tmp_path / "checkpoints" / "quick" / "baseline", ["--num-epochs", "3"]
    csv_file = tmp_path / "results" / "quick" / "baseline_history.csv"
    monkeypatch.setattr(train_baseline, "validate", stop_after(3, train_baseline.validate))
    with pytest.raises(Interrupted):
        train("baseline", *flags)
    second = {file: file.read_bytes() for file in (folder / "last.pth", csv_file)}
    assert len(utils.load_checkpoint(folder / "last.pth")["history"]) == 2
    monkeypatch.undo()
    train("baseline", *flags)
    whole, table = result(folder), csv_file.read_text(encoding="utf-8")
    assert len(table.splitlines()) == 4 and train_baseline.is_finished(folder)

    csv_file.write_bytes(second[csv_file])  # the last epoch's best and last were written
    train("baseline", *flags)
    assert csv_file.read_text(encoding="utf-8") == table
    for file, content in second.items():  # its best alone was written
        file.write_bytes(content)
    assert not train_baseline.is_finished(folder)
    train("baseline", *flags)
    assert_same_result(whole, result(folder))


def test_killed_within_the_first_epoch_is_not_finished(train, tmp_path):
    """The first best_model.pth alone is not taken for one that was put there, as a teacher's is."""
    folder = tmp_path / "checkpoints" / "quick" / "baseline"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        save_checkpoint = utils.save_checkpoint
        patch.setattr(utils, "save_checkpoint", lambda content, target: (
            save_checkpoint(content, target), seen.append(train_baseline.is_finished(folder))))
        train("baseline", "--num-epochs", "1")
    assert seen == [False, False, True]  # a mark without an epoch, best_model.pth, last.pth


@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9", "--mixup-alpha", "0.4",
                                        "--cutmix-alpha", "1"],
                                   ["--amp-dtype", "fp16", "--val-fraction", "0.8"]])
def test_run_that_goes_on_ends_with_the_same_weights(arguments, flags):
    """With dropout and drop-path too, whatever was drawn before, and after each epoch."""
    args = arguments("baseline", "--num-epochs", "3", "--batch-size", "128", *flags)

    def build():
        model, info, data = whole_run(args)
        model.drop_rate = 0.3  # timm's head reads it
        for block in [module for module in model.modules() if hasattr(module, "drop_path")]:
            block.drop_path = timm.layers.DropPath(0.2)
        return model, info, data
    train_baseline.train(*build(), args)
    folder = utils.run_folder("baseline", args)
    whole = result(folder)

    args.fresh = True
    model, info, data = build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_baseline, "validate", stop_after(2, train_baseline.validate))
        with pytest.raises(Interrupted):
            train_baseline.train(model, info, data, args)
    assert len(last_of(args)["history"]) == 1
    args.fresh = False
    torch.rand(7)
    train_baseline.train(*build(), args)
    assert_same_result(whole, result(folder))


class Interrupted(BaseException):
    """Ends a run in this process, where a signal would end pytest."""


def stop_after(calls, function):
    """`function`, that is interrupted when it is called for the so many-th time."""
    def stopped(*args):
        nonlocal calls
        calls -= 1
        if not calls:
            raise Interrupted
        return function(*args)
    return stopped


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_say_what_is_saved_and_how_to_go_on(tmp_path, number, code):
    process = start("baseline", tmp_path, "--num-epochs", "200")
    last = tmp_path / "checkpoints" / "quick" / "baseline" / "last.pth"
    wait_for(lambda: last.exists() and utils.load_checkpoint(last)["history"])
    process.send_signal(number)
    status, out, err = ended(process, 120)
    epochs = len(utils.load_checkpoint(last)["history"])
    assert status == code and epochs > 0
    assert err.strip().splitlines()[-1] == utils.STOPPED


@pytest.fixture
def on_photographs(tmp_path):
    """A training with two data workers, a process group of its own, after its first epoch."""
    pictures = write_pictures(tmp_path / "pictures", counts=(("train", 40), ("test", 2)))
    process = start("baseline", tmp_path, "--dataset-name", "ImageFolder", "--dataset-dir",
                    pictures, "--batch-size", "4", "--num-epochs", "200", "--num-workers", "2",
                    own_group=True)
    last = tmp_path / "checkpoints" / "quick" / "baseline" / "last.pth"
    wait_for(lambda: last.exists() and utils.load_checkpoint(last)["history"])
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to signal")
def test_ctrl_c_in_a_terminal_reaches_data_workers_too(on_photographs):
    """The whole process group gets the signal; the workers leave it to the training process."""
    os.killpg(on_photographs.pid, signal.SIGINT)
    status, out, err = ended(on_photographs, 120)
    assert status == 130 and err.strip().splitlines()[-1].startswith("stopped; whole epochs")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_data_worker_ends_training_with_one_sentence(on_photographs):
    """As the kernel kills where memory is short. DataLoader itself may say more as it is closed."""
    os.kill(children_of(on_photographs)[0], signal.SIGKILL)
    _, err = on_photographs.communicate(timeout=120)
    assert on_photographs.returncode == 1
    assert err.startswith("error: a process that reads pictures was killed"), err
    assert 'train_baseline.py", line' not in err


def test_same_seed_gives_the_same_bits_in_two_processes(tmp_path):
    processes = [start("baseline", tmp_path / name, "--num-epochs", "2") for name in ("a", "b")]
    assert all(ended(process)[0] == 0 for process in processes)
    folders = [tmp_path / name / "checkpoints" / "quick" / "baseline" for name in ("a", "b")]
    assert_same_result(*map(result, folders))
    versions = utils.load_checkpoint(folders[0] / "best_model.pth")["versions"]
    assert versions["device"].startswith("CPU") and versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__


def test_finished_run_says_so_and_is_left_alone(train, capsys):
    folder = train("baseline")
    before = (folder / "baseline" / "last.pth").stat().st_mtime_ns
    out = capsys.readouterr().out
    assert "s to go" in out and "next: python train_distillation.py --quick" in out
    train("baseline")
    out = capsys.readouterr().out
    assert "already trained" in out and "baseline epoch" not in out
    assert (folder / "baseline" / "last.pth").stat().st_mtime_ns == before
    assert not (folder / "baseline.1").exists()


def test_next_command_has_the_flags_it_needs(arguments, tmp_path):
    flags = ["--num-epochs", "3", "--no-pretrained", "--fresh", "--seeds", "0", "1"]
    args = arguments("baseline", *flags)
    own = f"--quick --checkpoint-dir {tmp_path}/checkpoints --results-dir {tmp_path}/results "
    own += f"--data-dir {tmp_path}/data --device cpu"
    assert train_baseline.next_command(args, "distillation", "distilled") == (
        f"python train_distillation.py {own} --student-model test_efficientnet --ema-decay 0 "
        "--num-epochs 3 --no-pretrained --seeds 0 1")
    other = tmp_path / "checkpoints" / "quick" / "distilled" / "seed_0" / "best_model.pth"
    other.parent.mkdir(parents=True)
    other.touch()
    then = train_baseline.next_command(args, "distillation", "distilled")
    assert then == f"python evaluate.py {own}"


def test_several_seeds(train, tmp_path, capsys):
    """A folder each, the teacher once, each student its seed's alone; finished ones are skipped."""
    folder = train("baseline", "--seeds", "3", "4")
    train("baseline", "--seed", "4")
    assert_equal_weights(weights(folder / "baseline"), weights(folder / "baseline" / "seed_4"))
    other = weights(folder / "baseline" / "seed_3")
    assert not torch.equal(other["conv_stem.weight"],
                           weights(folder / "baseline")["conv_stem.weight"])
    train("distillation", "--seeds", "3", "4")
    assert capsys.readouterr().out.count("teacher epoch   1/2") == 1
    assert not (folder / "teacher" / "seed_3").exists()
    assert (tmp_path / "results" / "quick" / "seed_4" / "distilled_history.csv").is_file()
    before = (folder / "baseline" / "seed_3" / "last.pth").stat().st_mtime_ns
    train("baseline", "--seeds", "5", "3")
    out = capsys.readouterr().out
    assert out.count("already trained") == 1 and out.count("baseline epoch   2/2") == 1
    train("baseline", "--fresh")  # moves the plain run aside, not the seeds
    assert (folder / "baseline" / "seed_3" / "last.pth").stat().st_mtime_ns == before
    assert (folder / "baseline.1" / "best_model.pth").is_file()
    assert not list((folder / "baseline.1").glob("seed_*"))
    train("baseline", "--seeds", "3", "--learning-rate", "0.001")
    assert (folder / "baseline" / "seed_3.1" / "best_model.pth").is_file()
    assert len(models.student_checkpoints(folder / "baseline")) == 4


# What it costs ------------------------------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: values read, sizes that depend on them, blocking copies."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = str(operation), kwargs or {}
        by_mask = name.startswith("aten.index.") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or any(waiting in name for waiting in self.NAMES):
            self.found.append(name)
        if "_to_copy" in name and self.blocks(args[0], **kwargs):
            self.found.append(name)
        return operation(*args, **kwargs)

    def blocks(self, tensor, device=None, dtype=None, non_blocking=False, **_):
        here, there = tensor.device.type, getattr(device, "type", tensor.device.type)
        if here == there:
            return False
        converts = dtype not in (None, tensor.dtype)  # the host would have to, first
        return there == "cpu" or not non_blocking or converts


def test_what_waits_is_noticed():
    with Waits() as waits:
        float(torch.ones(3)[torch.tensor([True, False, False])])
        torch.ones(3).to("meta")
        torch.ones(3, dtype=torch.float64).to("meta", torch.float32, non_blocking=True)
    assert len(waits.found) == 4


KINDS = [["--distillation-loss", "kd", "--clip-grad", "0"], ["--distillation-loss", "dist"],
         ["--distillation-loss", "lskd"],
         ["--kl-direction", "reverse", "--teacher-image-size", "48"], ["--mixup-alpha", "0.2"],
         ["--accumulate-steps", "2"]]


@pytest.mark.parametrize("flags", [*KINDS, ["--ema-decay", "0.9"]])
def test_nothing_in_the_loop_would_wait(arguments, flags):
    """An epoch of 18 steps reads as many values as one of 8: none of them in a step."""
    counts = []
    for batch in (16, 32):
        args = arguments("distillation", "--batch-size", batch, "--num-epochs", "1", "--fresh",
                         "--val-fraction", "0.8", "--distillation-loss", "kd", *flags)
        student, info, data = whole_run(args)
        teacher = models.freeze_teacher(models.build_model("test_resnet", 10), 32)
        info |= {"run": "distilled", "teacher": {"sha256": "x"}}
        with Waits() as waits:
            train_distillation.train(student, teacher, info, data, args)
        counts.append(len(waits.found))
    assert counts[0] == counts[1] < 40


def pretend(model, device):
    """`model` with tensors that claim to be on `device` and hold no values."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.size(), tensor.stride(),
                                                dtype=tensor.dtype, device=device)
                    if tensors is module._parameters:
                        empty = torch.nn.Parameter(empty, tensor.requires_grad)
                    tensors[name] = empty
    return model


def fake_training(args, names, device, mode, monkeypatch):
    """Train on tensors without values until the first one is read, in the dispatch mode `mode`.

    `names` are the models', a teacher's second. Returns how many steps were made till then.
    """
    student, info, data = whole_run(args, names[0])
    teachers = [models.freeze_teacher(models.build_model(name, len(data.class_names)), args.image_size,
                              utils.DTYPES[args.amp_dtype]) for name in names[1:]]
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-6 * next(ticks))  # so that no look is due
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
    assert "row" in frames  # the first read is the meter's, at the epoch's end
    return frames["train"]["step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked cuda do it in earnest")
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
        assert loss.is_cuda and loss.requires_grad
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    found = []
    for batch in (16, 32):
        args = arguments("distillation", "--batch-size", batch, "--val-fraction", "0.8", *flags)
        waits = Waits()
        steps = fake_training(args, ["test_efficientnet", "test_resnet"], "cuda", waits,
                              monkeypatch)
        assert steps >= 8
        found.append(len(waits.found))
    assert found[0] == found[1]


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that live, in blocks of 512 as torch reserves them."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            size = -(-storage.nbytes() // 512) * 512
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


MEMORY = [(["efficientnet_b0"], 1.5), (["efficientnet_b0", "efficientnet_b2"], 2.5),
          (["efficientnet_b2"], 3.0)]  # GB


@pytest.mark.parametrize("names, limit", MEMORY)
@pytest.mark.parametrize("batch", [16, 64])
def test_memory_of_what_lives(arguments, names, limit, batch, monkeypatch):
    """GB of tensors alive at once in steps at 224 px in bf16, counted on tensors without values.

    A third of the limit is left for what only a GPU shows, cuDNN's workspaces and gaps between
    blocks; batches of 64 leave 1.5 of 6 GB.
    """
    args = arguments("distillation", "--batch-size", batch, "--image-size", "224", "--amp-dtype",
                     "bf16", "--val-fraction", str(1 - 2.2 * batch / 1437))
    alive = Alive()
    steps = fake_training(args, names, "cpu", alive, monkeypatch)
    print(f"{alive.peak / 1e9:.2f} GB")
    student = models.build_model(names[0], 10)
    weights = sum(tensor.nbytes for tensor in student.state_dict().values())
    assert steps == 2  # the first makes AdamW's moments
    assert alive.peak > 4 * weights + batch * 30e6  # weights, gradient, moments, activations
    assert alive.peak < (2 / 3 * limit * 1e9 if batch == 16 else 4.5e9)


@pytest.mark.parametrize("name, limit", [("efficientnet_b0", 1.5), ("efficientnet_b2", 3.0)])
def test_memory_of_evaluation(name, limit):
    """Batches of evaluation at 224 px, in float32, take no more than training may."""
    count = data_loader.EVAL_PIXELS // 224**2
    model = models.build_model(name, 10)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        pretend(model, "cpu")
        batch = torch.empty(count, 3, 224, 224), torch.zeros(count, dtype=torch.int64)
        with Alive() as alive:
            models.infer(model, [batch])
    assert count * 3 * 224 * 224 * 4 < alive.peak < 2 / 3 * limit * 1e9


def test_accumulation_saves_memory(arguments, monkeypatch):
    """Four batches of 16 to an update take little more than one: each one's activations go."""
    peaks = []
    for flags in ([], ["--accumulate-steps", "4"]):
        args = arguments("baseline", "--batch-size", "16", "--image-size", "64", "--val-fraction",
                         "0.9", *flags)
        alive = Alive()
        fake_training(args, ["efficientnet_b0"], "cpu", alive, monkeypatch)
        peaks.append(alive.peak)
    assert peaks[1] < 1.1 * peaks[0]


# On a GPU -----------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("home", ["device", "host", "files"])
@pytest.mark.parametrize("precision, flags", [
    ("fp32", ["--ema-decay", "0.9"]), ("bf16", ["--teacher-image-size", "64"]),
    ("fp16", ["--distillation-loss", "lskd", "--accumulate-steps", "2"])])
def test_loop_never_waits_for_the_device(arguments, home, precision, flags, monkeypatch, tmp_path):
    """The loop between its looks, wherever the images are: torch raises at any synchronisation."""
    if home == "files":
        pictures = write_pictures(tmp_path / "pictures", counts=(("train", 80), ("test", 3)))
        flags = [*flags, "--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size",
                 "8", "--num-workers", "0"]
    if home == "host":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-6 * next(ticks))  # so that no look is due
    args = arguments("distillation", "--amp-dtype", precision, "--num-epochs", "1", *flags)
    batches_of = data_loader.TrainingLoader.epoch_with_teacher

    def watched(loader, epoch):
        try:
            for number, batch in enumerate(batches_of(loader, epoch)):
                if number == 3:  # by when all has been made that is made once
                    torch.cuda.set_sync_debug_mode("error")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(data_loader.TrainingLoader, "epoch_with_teacher", watched)
    student, info, data = whole_run(args)
    teacher = models.freeze_teacher(models.build_model("test_resnet", len(data.class_names)), 64,
                            utils.DTYPES[precision]).cuda()
    info |= {"run": "distilled", "teacher": {"sha256": "x"}}
    train_distillation.train(student.cuda(), teacher, info, data, args)


@pytest.mark.cuda
@pytest.mark.parametrize("names, limit", MEMORY)
def test_peak_memory_at_the_default_batch(arguments, names, limit, monkeypatch):
    """GB reserved in an epoch at 224 px, batch 16, mixed precision, as the history has it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as the scripts have it
    args = arguments("distillation", "--batch-size", "16", "--image-size", "224", "--num-epochs",
                     "2", "--amp-dtype", "bf16", "--val-fraction", "0.8")
    student, info, data = whole_run(args, names[0])
    if len(names) == 2:
        teacher = models.freeze_teacher(models.build_model(names[1], 10), 224, torch.bfloat16).cuda()
        info |= {"run": "distilled", "teacher": {"sha256": "x"}}
        train_distillation.train(student.cuda(), teacher, info, data, args)
    else:
        train_baseline.train(student.cuda(), info, data, args)
    assert last_of(args, info["run"])["history"][1]["peak_memory_mb"] * 2**20 < limit * 1e9


@pytest.mark.cuda
@pytest.mark.parametrize("script", ["baseline", "distillation"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_train_as_single_kernels_do(train, script, precision):
    """Two epochs with and without --cuda-graph, from the same weights on the same batches."""
    run = "baseline" if script == "baseline" else "distilled"
    histories = []
    for flags in ([], ["--cuda-graph", "--fresh"]):
        folder = train(script, "--device", "cuda", "--amp-dtype", precision, "--learning-rate",
                       "1e-4", "--seeds", "0", "1", *flags)  # the second seed captures again
        histories.append(utils.load_checkpoint(folder / run / "seed_1" / "last.pth")["history"])
    for one, other in zip(*histories, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.01)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=0.01)
