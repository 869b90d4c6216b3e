"""Errors and exit codes, files, a run's folder and its meter: nothing lost, one sentence each.

    python -m pytest tests/test_utils.py
"""
import ctypes
import itertools
import math
import os
import pickle
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

import models
import train_baseline
import utils
from conftest import (
    ROOT,
    assert_same_result,
    ended,
    result,
    start,
    wait_for,
    write_pictures,
)

# Exit ---------------------------------------------------------------------------------------------

TOO_LITTLE = "there is too little memory; close what else uses it, or halve --batch-size and double"


@pytest.mark.parametrize("error, code, words", [
    (utils.UserError("one sentence"), 1, "error: one sentence\n"),
    (utils.UsageError("no"), 2, "error: no"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, TOO_LITTLE), (MemoryError(), 1, TOO_LITTLE),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, TOO_LITTLE),
    (RuntimeError("GET was unable to find an engine to execute this computation"), 1,
     "where memory is not short, try another --amp-dtype"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), 1, "lower --num-workers"),
    (RuntimeError("x has no deterministic implementation"), 1, "--deterministic is not possible"),
    (ValueError("Expected more than 1 value per channel when training"), 2,
     "--batch-size 64 cannot be trained with"),
    (OSError(28, "No space left on device", "last.pth"), 1, "No space left on device: last.pth")])
def test_exit_codes(arguments, error, code, words, capsys):
    def main(args):
        raise error
    assert utils.run_script(main, arguments("baseline")) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes differ"),
                                   OSError(5, "Input/output error"), ValueError("a bug")])
def test_bug_keeps_its_traceback(arguments, error):
    def main(args):
        raise error
    with pytest.raises(type(error)):
        utils.run_script(main, arguments("baseline"))


WAITS_IN_C_CODE = """  # for a lock that nobody frees, deaf to signals, as for a GPU
import argparse, ctypes, os, signal, sys, threading
import utils
def main(args):
    print("begun", flush=True)
    threading.Timer(0.5, os.kill, (os.getpid(), {number})).start()
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
sys.exit(utils.run_script(main, argparse.Namespace({flag}=False)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' own lock")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("flag, words", [("fresh", utils.STOPPED), ("quick", "stopped")])
def test_signal_ends_a_script_that_waits_in_c_code(number, code, flag, words):
    script = WAITS_IN_C_CODE.format(number=int(number), flag=flag)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\n", words + "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' own lock")
@pytest.mark.parametrize("gone", ["reader", "torchrun"])
def test_signal_ends_a_script_whose_reader_or_torchrun_has_gone(gone):
    """As with `2>&1 | tee log`, which Ctrl-C ends first; or where torchrun was killed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0",
                "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = WAITS_IN_C_CODE.format(number=int(signal.SIGTERM), flag="fresh")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | (torchrun if gone == "torchrun" else {}))
    assert process.stdout.readline() == "begun\n"
    if gone == "reader":
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 143
    else:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143 and err.splitlines()[-1] == utils.STOPPED


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console")
@pytest.mark.parametrize("script", ["train_baseline.py", "train_distillation.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(script):
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / script],
                               stderr=subprocess.PIPE, text=True)
    seen = ""
    while "numpy" not in seen:  # torch is on its way
        seen = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err and "KeyboardInterrupt" not in err


def test_reader_of_the_output_that_goes_away_meets_no_traceback(tmp_path):
    """As with `| head -1`: one sentence, and the same command goes on."""
    process = start("baseline", tmp_path, "--num-epochs", "2")
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    message = process.stderr.read()
    process.stderr.close()
    assert message.startswith("error: what read this script's output has gone")
    assert message.count("\n") == 1
    assert ended(start("baseline", tmp_path, "--num-epochs", "2"))[0] == 0


@pytest.mark.parametrize("flags, code, words", [
    (["--batch-size", "1"], 2, "--batch-size 1 cannot be trained with"),
    (["--batch-size", "5000"], 2, "is more than the 1293 training images"),
    (["--student-model", "inception_v3"], 1, "inception_v3 cannot take images of 32 px")])
def test_what_only_the_work_can_tell_is_one_sentence(tmp_path, flags, code, words):
    status, _, err = ended(start("baseline", tmp_path, *flags))
    assert status == code and words in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("seconds, text", [(45, "45 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_read_well(seconds, text):
    assert utils.format_duration(seconds) == text


# Device -------------------------------------------------------------------------------------------

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left as they are")
def test_large_tensors_take_the_memory_of_those_before():
    pytest.importorskip("resource")
    # In a process of its own: small objects of other tests would make it a matter of chance.
    script = """
import argparse, resource, torch, utils
utils.setup(argparse.Namespace(device="cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(25_000_000)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    # Bytes that came anew: 2,000 MB without the call, 200 to 800 with it, by where the blocks lie.
    assert int(done.stdout.splitlines()[-1]) < 12 * 100e6


# Files --------------------------------------------------------------------------------------------

def test_reader_never_meets_half_a_file(tmp_path):
    target = tmp_path / "ünter" / "file.txt"
    with utils.atomic_write(target) as file:
        file.write("whole ü")
        file.flush()
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "whole ü"
    with pytest.raises(RuntimeError), utils.atomic_write(target) as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text(encoding="utf-8") == "whole ü"
    assert list(target.parent.iterdir()) == [target]


class Payload:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('mark').touch()",))


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text", "code", "other",
                                   "newer"])
def test_damaged_and_hostile_checkpoints_are_one_sentence(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "best_model.pth"
    utils.save_checkpoint({"x": torch.rand(1000)}, file)
    assert utils.load_checkpoint(file)["x"].shape == (1000,)
    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif fault in ("empty", "text"):
        file.write_bytes(b"" if fault == "empty" else b"just words")
    elif fault == "code":
        file.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"format_version": 99} if fault == "newer" else [1], file)
    with pytest.raises(utils.UserError, match="best_model.pth") as error:
        utils.load_checkpoint(file)
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()


def test_checkpoint_cut_anywhere_or_with_any_byte_changed_is_one_sentence_or_whole(tmp_path):
    """Cuts between 4 and 70 kB make torch raise an OSError with a number, as a broken disk does."""
    file = tmp_path / "last.pth"
    more = {str(i): torch.rand(30) for i in range(50)}
    utils.save_checkpoint({"weights": torch.rand(10_000), "more": more}, file)
    whole = file.read_bytes()
    contents = [whole[:length] for length in range(1000, len(whole), 500)]
    contents += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:]
                 for at in range(0, len(whole), 331)]
    refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            utils.load_checkpoint(file)
        except utils.UserError as error:
            assert "\n" not in str(error) and "last.pth" in str(error)
            refused += 1
    assert refused > len(whole) // 500 - 3  # all that were cut


# A run's folder -----------------------------------------------------------------------------------

def run_of(args, name="baseline", **identity):
    """A run of this name, with a small model and all that is kept beside it."""
    info = {"run": name, "model_name": "m", "config": vars(args), "split_fingerprint": "f"}
    model = models.build_model("test_efficientnet", 10)
    optimizer, scheduler, scaler, _ = train_baseline.optimization(model, 2, args)
    run = utils.Run(info, {"num_epochs": args.num_epochs, **identity}, args)
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=None)
    return run, model


def row_of(accuracy, **more):
    return dict.fromkeys(utils.HISTORY_COLUMNS, 0.0) | {"val_accuracy": accuracy, **more}


def test_best_epoch_is_kept_by_validation_accuracy_the_earlier_of_equals(arguments):
    run, model = run_of(arguments("baseline"))
    for accuracy in (0.5, 0.7, 0.7, 0.6):
        run.finish_epoch(row_of(accuracy), model)
    kept = utils.load_checkpoint(run.best_path)
    assert (kept["epoch"], kept["val_accuracy"]) == (2, 0.7)
    assert [row["epoch"] for row in utils.load_checkpoint(run.last_path)["history"]] == [1, 2, 3, 4]


def test_best_accuracy_is_remembered_when_a_run_goes_on(arguments):
    """A second part of a run whose epochs are worse does not replace the best of the first."""
    args = arguments("baseline")
    run, model = run_of(args)
    run.finish_epoch(row_of(0.7), model)
    again, model = run_of(args)
    again.finish_epoch(row_of(0.6), model)
    assert len(again.history) == 2 and utils.load_checkpoint(run.best_path)["epoch"] == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_epoch_that_diverged_is_not_saved(arguments, loss):
    run, model = run_of(arguments("baseline"))
    run.finish_epoch(row_of(0.5), model)
    before = {path: path.read_bytes() for path in (run.best_path, run.last_path, run.history_file)}
    with pytest.raises(utils.UserError, match="diverged.*after epoch 2.*--learning-rate"):
        run.finish_epoch(row_of(0.9, val_loss=loss), model)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_former_run_is_moved_aside_once_there_is_something_to_save(arguments, capsys):
    args = arguments("baseline")
    run, model = run_of(args, learning_rate=1)
    run.finish_epoch(row_of(0.5), model)
    other, model = run_of(args, learning_rate=2)
    assert other.history == [] and run.best_path.is_file()
    assert not run.folder.with_name("baseline.1").exists()
    other.finish_epoch(row_of(0.4), model)
    aside = run.folder.with_name("baseline.1")
    assert f"(other learning_rate) is now in {aside}" in capsys.readouterr().out
    assert utils.load_checkpoint(aside / "best_model.pth")["val_accuracy"] == 0.5
    assert (aside / "baseline_history.csv").is_file()
    assert utils.load_checkpoint(other.best)["val_accuracy"] == 0.4


def test_damaged_run_is_one_sentence_and_moved_aside_with_fresh(arguments):
    args = arguments("baseline")
    run, model = run_of(args)
    run.finish_epoch(row_of(0.5), model)
    run.last_path.write_bytes(run.last_path.read_bytes()[:-5000])
    with pytest.raises(utils.UserError, match="last.pth is damaged"):
        run_of(args)
    args.fresh = True
    again, model = run_of(args)
    again.finish_epoch(row_of(0.4), model)
    assert (again.folder.with_name("baseline.1") / "last.pth").is_file()


def test_history_of_another_checkpoint_folder_is_kept(arguments, tmp_path):
    args = arguments("baseline")
    run, model = run_of(args)
    run.finish_epoch(row_of(0.5), model)
    args.checkpoint_dir = str(tmp_path / "elsewhere")
    other, model = run_of(args)
    other.finish_epoch(row_of(0.4), model)
    aside = Path(args.checkpoint_dir) / "baseline.1" / "baseline_history.csv"
    assert "0.5" in aside.read_text(encoding="utf-8")
    assert "0.4" in run.history_file.read_text(encoding="utf-8")


def test_second_process_waits_while_the_first_lives_and_a_kill_leaves_no_lock(tmp_path):
    """Nor does a worker process keep it that the kill has left behind."""
    pictures = write_pictures(tmp_path / "pictures")
    flags = ["--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size", "4",
             "--val-fraction", "0.25", "--num-workers", "2", "--num-epochs", "2000"]
    folder = tmp_path / "checkpoints" / "quick"
    first = start("baseline", tmp_path, *flags)
    wait_for((folder / "baseline" / "last.pth").exists)
    second = start("baseline", tmp_path, *flags)
    line = next(line for line in second.stdout if "waiting for another process" in line)
    assert "checkpoints/quick/baseline" in line and first.poll() is second.poll() is None
    second.terminate()
    assert ended(second)[0] == 143
    first.kill()
    first.wait()
    with filelock.FileLock(folder / ".baseline.lock", timeout=1):  # its workers live some 5 s on
        pass
    first.communicate()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_graphs_without_a_gpu_are_wrong_use(arguments, device):
    """Also where there is one but the CPU is asked for: nothing would be computed by replays."""
    with pytest.raises(utils.UsageError, match="--cuda-graph: needs an NVIDIA GPU"):
        utils.setup(arguments("baseline", "--cuda-graph", "--device", device))


@pytest.mark.parametrize("asked, chosen", [("auto", []), ("cuda", []), ("cuda:1", [1])])
def test_any_gpu_can_be_asked_for(arguments, monkeypatch, capsys, asked, chosen):
    """On pretended GPUs, of which torch takes a number alone."""
    numbers = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", numbers.append, raising=False)
    args = arguments("baseline", "--device", asked)
    args.amp_dtype = "auto"
    assert utils.setup(args) == torch.device("cuda" if asked == "auto" else asked)
    assert numbers == chosen and args.amp_dtype == "bf16"
    assert "device: a GPU, bf16" in capsys.readouterr().out
    with pytest.raises(utils.UsageError, match="has no cuda:2"):
        utils.setup(arguments("baseline", "--device", "cuda:2"))


def test_two_processes_can_write_the_same_file_at_once(tmp_path):
    """checkpoints/best_model.pth, say: each has a temporary file of its own; the last one stays."""
    with utils.atomic_write(tmp_path / "file") as ours:
        ours.write("ours")
        child = os.fork()
        if not child:
            with utils.atomic_write(tmp_path / "file") as theirs:
                theirs.write("theirs")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and (tmp_path / "file").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours" and len(list(tmp_path.iterdir())) == 1


def test_seeds_of_two_processes_share_folders_and_teacher(tmp_path):
    """As on two GPUs: both started at once, one trains the teacher, the other waits for it."""
    few = ["--num-epochs", "1", "--batch-size", "64", "--teacher-epochs", "8"]
    processes = [start("distillation", tmp_path, "--seeds", seed, *few) for seed in (0, 1)]
    results = [ended(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sum("teacher epoch" in out for _, out, _ in results) == 1
    checkpoints = tmp_path / "checkpoints" / "quick"
    taught = [utils.load_checkpoint(checkpoints / "distilled" / f"seed_{seed}" / "best_model.pth")
              for seed in (0, 1)]
    assert taught[0]["teacher"] == taught[1]["teacher"]
    assert not list(checkpoints.glob("teacher.*")) and not list(tmp_path.rglob("*.tmp"))
    utils.load_checkpoint(checkpoints / "best_model.pth")


def held(file, seconds=0.0):
    """os.replace as Windows has it while another program keeps `file` open, so many seconds."""
    real, end = os.replace, time.time() + seconds

    def replace(source, target):
        if Path(target) == Path(file) and time.time() < end:
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        return real(source, target)
    return replace


def test_history_that_is_open_elsewhere_costs_no_epoch(train, tmp_path, monkeypatch, capsys):
    """Excel has it open all the while: the run goes on, and the next start writes it."""
    table = tmp_path / "results" / "quick" / "baseline_history.csv"
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", held(table, 1e9))
        folder = train("baseline") / "baseline"
    out = capsys.readouterr().out
    assert out.count("baseline_history.csv cannot be replaced, since another program") == 2
    assert len(utils.load_checkpoint(folder / "last.pth")["history"]) == 2 and not table.exists()
    train("baseline")
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("seconds, code", [(1, 0), (1e9, 1)])
def test_checkpoint_that_is_open_elsewhere_is_tried_again(
        arguments, train, monkeypatch, capsys, seconds, code):
    """A virus scanner lets go after a second; another program does not, and is named."""
    args = arguments("baseline", "--num-epochs", "1")
    file = utils.run_folder("baseline", args) / "best_model.pth"
    monkeypatch.setattr(os, "replace", held(file, seconds))
    assert utils.run_script(train_baseline.main, args) == code
    err = capsys.readouterr().err
    assert ("best_model.pth cannot be replaced, since another program" in err) == (code == 1)
    assert err.count("\n") == code


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 8 MB of its own; needs the right to mount one."""
    folder = tmp_path / "small disk ü"
    folder.mkdir()
    if sys.platform != "linux" or ctypes.CDLL(None).mount(
            b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=8m"):
        pytest.skip("may not mount a small filesystem here")
    yield folder
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def test_full_disk_ends_with_one_message_and_the_last_good_checkpoint(small_disk):
    process = start("baseline", small_disk, "--num-epochs", "200")
    run = small_disk / "checkpoints" / "quick" / "baseline"
    wait_for((run / "last.pth").exists)
    wait_for(lambda: utils.load_checkpoint(run / "last.pth")["history"])
    with open(small_disk / "filler", "wb") as file:
        try:
            while True:
                file.write(bytes(2**14))
                file.flush()
        except OSError:
            pass
    code, _, err = ended(process, 180)
    assert code == 1 and "No space left on device" in err and err.count("\n") == 1
    epochs = len(utils.load_checkpoint(run / "last.pth")["history"])
    assert epochs >= 1 and utils.load_checkpoint(run / "best_model.pth")
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    process = start("baseline", small_disk, "--num-epochs", "200")
    wait_for(lambda: len(utils.load_checkpoint(run / "last.pth")["history"]) > epochs)
    process.kill()
    process.communicate()


def test_read_only_folder(small_disk):
    read_only = 32 | 1  # MS_REMOUNT | MS_RDONLY
    ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(small_disk), b"tmpfs", read_only, b"")
    code, _, err = ended(start("baseline", small_disk, "--num-epochs", "1"), 180)
    assert code == 1 and "Read-only file system" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--results-dir"])
def test_file_in_place_of_a_folder(tmp_path, flag):
    (tmp_path / "file").write_text("")
    code, _, err = ended(start("baseline", tmp_path, flag, tmp_path / "file", "--num-epochs", "1"))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "file" in err


# The meter ----------------------------------------------------------------------------------------

class Batches:
    """So many batches that are numbers, on the CPU."""
    device, batch_size = torch.device("cpu"), 8

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.count))


def measure(args, losses, accuracy=0.5):
    """The meter of an epoch with these losses."""
    meter = utils.EpochMetrics(run_of(args)[0], Batches(len(losses)))
    for number in meter.watch(meter.loader):
        meter.add(train_loss=torch.tensor(losses[number]), train_accuracy=torch.tensor(accuracy))
        if number % 2 == 0:
            meter.add(entropy=torch.tensor(float(number)))
    return meter


def test_row_has_the_mean_of_what_was_measured(arguments):
    row = measure(arguments("baseline"), [1.0, 2.0, 6.0]).row()
    assert row["train_loss"] == 3 and row["entropy"] == 1  # of steps 0 and 2
    assert row["train_accuracy"] == 0.5 and row["images_per_second"] > 0
    assert measure(arguments("baseline"), [1.0], math.nan).row()["train_accuracy"] is None


@pytest.mark.parametrize("losses", [[1.0, math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0, -math.inf]])
def test_loss_that_is_not_finite_is_seen_at_the_next_look(arguments, losses):
    meter = measure(arguments("baseline"), losses)
    for look in (meter.look, meter.row):
        with pytest.raises(utils.UserError, match=f"diverged.*by step {len(losses)} of epoch 1"):
            look()


def test_diverged_run_does_not_go_on_for_hours(arguments, monkeypatch):
    """With a clock that goes on by a second whenever it is read: the epoch of 100 steps is left."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with pytest.raises(utils.UserError, match=r"by step \d of epoch 1"):
        measure(arguments("baseline"), [1.0, math.nan] + 98 * [1.0])


def test_gradient_that_overflows_at_any_scale_is_a_divergence(arguments):
    run, _ = run_of(arguments("baseline", "--amp-dtype", "fp16"))
    run.parts["scaler"].load_state_dict(run.parts["scaler"].state_dict() | {"scale": 0.5})
    meter = utils.EpochMetrics(run, Batches(1))
    for _ in meter.watch(meter.loader):
        meter.add(train_loss=torch.tensor(1.0))
    with pytest.raises(utils.UserError, match="fp16"):
        meter.row()


def test_time_to_go_comes_from_batches_as_they_arrive(arguments, monkeypatch, capsys):
    """A second for a batch to come and one for its step, in the first step nine more of each."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    args = arguments("baseline", "--num-epochs", "10")
    meter = utils.EpochMetrics(run_of(args)[0], Batches(20))

    def arriving():
        for number in range(20):
            now[0] += 1 if number else 10
            yield number
    for number in meter.watch(arriving()):
        now[0] += 1 if number else 10
        meter.add(train_loss=torch.tensor(1.0), train_accuracy=torch.tensor(1.0))
    out = capsys.readouterr().out  # said once, after the second step: 198 steps of two seconds
    assert out == "baseline: 10 epochs of 20 steps, about 7 min to go\n"


def test_run_says_how_long_it_takes(tmp_path):
    """The time to go that an epoch's line prints against the real one, of some twenty seconds."""
    process = start("baseline", tmp_path, "--num-epochs", "25")
    while "epoch   3/25" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    since = time.time()
    assert ended(process)[0] == 0
    said = float(re.search(r", (\d+) s to go", line)[1])
    assert 0.3 < said / (time.time() - since) < 3


def test_runs_of_two_processes_agree_to_the_bit_when_one_goes_on(tmp_path):
    """Stopped by SIGKILL after its first epoch, with --seeds."""
    flags = ["--num-epochs", "3", "--seeds", "1"]
    folders = [tmp_path / name / "checkpoints" / "quick" / "baseline" / "seed_1" for name in "ab"]
    assert ended(start("baseline", tmp_path / "a", *flags))[0] == 0
    process = start("baseline", tmp_path / "b", *flags)
    wait_for(lambda: (folders[1] / "last.pth").exists())
    process.kill()
    process.communicate()
    assert ended(start("baseline", tmp_path / "b", *flags))[0] == 0
    assert_same_result(*map(result, folders))
    assert Path(tmp_path, "b", "results", "quick", "seed_1", "baseline_history.csv").is_file()
