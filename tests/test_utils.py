"""Errors and exit status, device, files, the folder of a run, and the metrics of an epoch.

    python -m pytest tests/test_utils.py          # -m "not slow" leaves out whole scripts and disks
"""
import argparse
import csv
import ctypes
import gc
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import sys
import time
import types
from pathlib import Path

import filelock
import pytest
import torch

import config
import models
import train_baseline
import utils
from conftest import (
    assert_one_message,
    assert_same_outcome,
    finish,
    has_epoch,
    history_of,
    outcome,
    quick_folder,
    run_command,
    start,
    wait_until,
    write_pictures,
)

# Exit status and messages -------------------------------------------------------------------------

BUS_ERROR = ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
             "dataloader's workers are out of shared memory.")


@pytest.mark.parametrize("error, status, word", [
    (utils.UserError("a sentence"), 1, "error: a sentence\n"),
    (utils.UsageError("a sentence"), 2, "error: a sentence\n"),
    (MemoryError(), 1, "--batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--batch-size"),
    (OSError(12, "Cannot allocate memory"), 1, "--batch-size"),
    (OSError(24, "Too many open files"), 1, "--num-workers"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), 1,
     "--num-workers"),
    (BlockingIOError(11, "Resource temporarily unavailable"), 1, "--num-workers"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared "
                  "memory(shm) for file </torch_1_2_3>: No space left"), 1, "/dev/shm"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), 1,
     "--device cpu"),
    (RuntimeError("GET was unable to find an engine to execute this"), 1, "--amp-dtype"),
    (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"), 1,
     "nvidia-smi"),
    (RuntimeError("NCCL error: unhandled system error"), 1, "NCCL error"),
    (RuntimeError(BUS_ERROR), 1, "--num-workers"),
    (ConnectionResetError("Connection reset by peer"), 1, "--num-workers"),
    (EOFError(), 1, "--num-workers"),
    (RuntimeError("x has no deterministic implementation"), 1, "--deterministic"),
    (ValueError("Expected more than 1 value per channel when training"), 2, "--batch-size"),
    (OSError(28, "No space left on device", "last.pth"), 1, "last.pth"),
    (FileNotFoundError(2, "No such file or directory", "E:/results"), 1, "E:/results"),
    (OSError(22, "Invalid argument", "results?"), 1, "results?"),
    (OSError(5, "Input/output error", "last.pth"), 1, "last.pth"),
    (PermissionError(13, "Permission denied", "a.tmp", None, "a.csv"), 1, "a.csv"),
    (FileExistsError(17, "File exists", "checkpoints"), 1, "checkpoints cannot be a folder"),
    (NotADirectoryError(20, "Not a directory", "a/b"), 1, "a/b cannot be a folder"),
])
def test_error_that_the_user_can_fix_is_one_message(
        arguments, monkeypatch, capsys, error, status, word):
    def main(args):
        raise error

    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    assert utils.run_script(main, arguments("baseline")) == status
    assert_one_message(capsys.readouterr().err, "error: ", word)


@pytest.mark.parametrize("error", [
    ZeroDivisionError(), RuntimeError("shapes differ"), OSError("a bug"), ValueError("a bug"),
    FileExistsError("a bug")])
def test_bug_keeps_its_traceback(arguments, error):
    def main(args):
        raise error

    with pytest.raises(type(error)):
        utils.run_script(main, arguments("baseline"))


def test_error_of_a_writer_keeps_its_text(tmp_path):
    target = tmp_path / "a.png"
    with pytest.raises(OSError, match="encoder error"), utils.atomic_write(target, "wb"):
        raise OSError("encoder error -2 when writing image file")


def test_streams_of_an_editor_will_do(arguments, monkeypatch):
    """IDLE and notebooks replace them by their own, which have fewer methods."""
    stream = types.SimpleNamespace(write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    assert utils.run_script(lambda args: print("done"), arguments("baseline")) == 0


def test_script_that_ends_well_has_status_0_and_no_message(arguments, capsys):
    assert utils.run_script(lambda args: print("done"), arguments("baseline")) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_is_one_message(arguments, capsys, number, status):
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main(args):
        os.kill(os.getpid(), number)
        time.sleep(10)

    assert utils.run_script(main, arguments("baseline")) == status
    assert_one_message(capsys.readouterr().err, "stopped")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a second Ctrl-C disturbs nothing


def test_message_after_a_signal_names_the_last_whole_epoch(arguments):
    args = arguments("baseline", "--num-epochs", "5")
    assert utils.stop_message(args) == "stopped"  # nothing has begun

    run, model = open_run(args)
    assert "before the end of the first epoch (baseline)" in utils.stop_message(args)
    for epoch in (1, 2):
        run.finish_epoch(row_of(0.5), model)
        assert f"epoch {epoch} of 5 (baseline)" in utils.stop_message(args)
    assert "the same command resumes" in utils.stop_message(args)

    open_run(args)  # of the next process, before its first own epoch
    assert "epoch 2 of 5" in utils.stop_message(args)
    open_run(arguments("baseline", "--seeds", "3", "4"))
    assert "baseline, seed 3" in utils.stop_message(args)


@pytest.mark.parametrize("flags", [["--fresh"], ["--fresh-teacher"], ["--fresh",
                                                                     "--fresh-teacher"]])
def test_flags_of_what_is_saved_are_left_out_after_a_signal(arguments, flags):
    """With them the same command would start that anew; before there is an epoch they are needed.
    """
    args = arguments("distillation", *flags)
    teacher, model = open_run(args, "teacher")
    assert "without" not in utils.stop_message(args)

    teacher.finish_epoch(row_of(0.5), model)
    distilled, model = open_run(args, "distilled")
    message = utils.stop_message(args)
    assert ("without --fresh-teacher" in message) == ("--fresh-teacher" in flags)
    assert "without --fresh " not in message

    distilled.finish_epoch(row_of(0.5), model)
    assert f"without {' and '.join(flags)} resumes" in utils.stop_message(args)


# With forkserver, Python 3.14's default, a semaphore that is left behind is reported at the end.
WAITING_SCRIPT = """
import argparse, multiprocessing, sys, time
multiprocessing.set_start_method("forkserver")
import utils

def main(args):
    print("ready", flush=True)
    time.sleep(60)

sys.exit(utils.run_script(main, argparse.Namespace()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("gone", ["reader", "torchrun"])
def test_signal_ends_a_script_whose_reader_or_torchrun_is_gone(monkeypatch, gone):
    """As with `2>&1 | tee log`, which Ctrl-C ends first; or where torchrun was killed."""
    if gone == "torchrun":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, text in environment.items():
            monkeypatch.setenv(name, text)

    process = run_command([sys.executable, "-c", WAITING_SCRIPT])
    assert process.stdout.readline() == "ready\n"
    if gone == "reader":
        process.stdout.close()
        process.stderr.close()
        process.terminate()
        assert process.wait(60) == 143
    else:
        process.terminate()
        status, _, err = finish(process, 60)
        assert status == 143
        assert_one_message(err, "stopped")


DYING_WORKER_SCRIPT = """
import argparse, os, signal, sys, time
import utils

def raise_error(*_):  # as the handler that torch's DataLoader installs
    raise RuntimeError("a worker was killed")

def main(args):
    signal.signal(signal.SIGCHLD, raise_error)
    child = os.fork()
    if child == 0:
        time.sleep(1)
        os._exit(1)
    if sys.argv[1] == "error":
        raise utils.UserError("the first fault")
    raise KeyboardInterrupt

status = utils.run_script(main, argparse.Namespace(fresh=False))
time.sleep(3)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGCHLD")
@pytest.mark.parametrize("end, status, word", [("error", 1, "first fault"), ("stop", 130, "stop")])
def test_a_worker_that_ends_disturbs_neither_report_nor_shutdown(end, status, word):
    found, _, err = finish(run_command([sys.executable, "-c", DYING_WORKER_SCRIPT, end]), 60)
    assert found == status
    assert_one_message(err, word)


@pytest.mark.slow
def test_reader_of_the_output_that_goes_away_is_one_message(tmp_path):
    """As with `| head -1`; the same command resumes."""
    process = start("baseline", tmp_path, "--num-epochs", "2")
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert_one_message(process.stderr.read(), "error: ", "resumes")
    process.stderr.close()

    status, _, _ = finish(start("baseline", tmp_path, "--num-epochs", "2"))
    assert status == 0


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("flags, status, word", [
    (["--batch-size", "1"], 2, "--batch-size"),
    (["--batch-size", "5000"], 2, "1293"),  # training images
    (["--student-model", "inception_v3"], 2, "inception_v3"),  # does not take 32 px
])
def test_what_only_the_work_can_tell_is_one_message(
        arguments, tmp_path, capsys, flags, status, word):
    args = arguments("baseline", *flags)
    assert utils.run_script(train_baseline.main, args) == status
    assert_one_message(capsys.readouterr().err, word)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("seconds, text", [(45, "45 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_readable(seconds, text):
    assert utils.format_duration(seconds) == text


# Device -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wanted, chosen, selected", [
    ("auto", "cuda", []), ("cuda", "cuda", []), ("cuda:1", "cuda:1", [1])])
def test_any_gpu_can_be_chosen(arguments, monkeypatch, capsys, wanted, chosen, selected):
    """On pretended GPUs, of which torch is told the number alone."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", calls.append, raising=False)
    args = arguments("baseline", "--device", wanted, "--cuda-graph")
    args.amp_dtype = "auto"

    assert utils.setup(args) == torch.device(chosen)
    assert calls == selected
    assert args.amp_dtype == "bf16"
    assert args.cuda_graph
    assert "a GPU, bf16, CUDA graphs" in capsys.readouterr().out
    with pytest.raises(utils.UsageError, match="cuda:2"):
        utils.setup(arguments("baseline", "--device", "cuda:2"))


@pytest.mark.parametrize("script", ["baseline", "evaluate"])
def test_float32_is_never_tf32_on_a_gpu(arguments, monkeypatch, script):
    monkeypatch.setattr(utils, "select_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(utils, "prepare_memory", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        utils.setup(arguments(script))
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    finally:  # monkeypatch cannot restore them
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_gpu_with_an_old_driver_is_not_used(arguments, monkeypatch):
    """torch counts it, but cannot use it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert utils.select_device("auto") == torch.device("cpu")
    with pytest.raises(utils.UsageError, match="driver"):
        utils.select_device("cuda")


def test_deterministic_algorithms_without_filling_tensors(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # to be restored
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        utils.use_deterministic_algorithms(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_training_tries_algorithms(arguments, monkeypatch):
    before = torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)  # to be restored
    utils.setup(arguments("baseline", "--device", "cpu"))
    assert torch.backends.cudnn.benchmark is True
    utils.setup(arguments("evaluate", "--device", "cpu"))
    assert torch.backends.cudnn.benchmark is False


def test_cuda_graphs_only_where_a_replay_is_right(arguments, monkeypatch, capsys):
    cuda = torch.device("cuda")
    assert config.CUDA_GRAPH
    assert utils.can_use_cuda_graphs(arguments("baseline"), cuda)
    assert not utils.can_use_cuda_graphs(arguments("baseline", "--accumulate-steps", "2"), cuda)
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    assert not utils.can_use_cuda_graphs(arguments("baseline", "--batch-size", "16"), cuda)

    monkeypatch.setattr(utils, "WORLD_SIZE", 1)
    args = arguments("baseline", "--cuda-graph", "--device", "cpu")
    utils.setup(args)
    assert not args.cuda_graph
    assert "graphs" not in capsys.readouterr().out


@pytest.mark.parametrize("wanted, device, native_bf16, chosen", [
    ("auto", "cpu", True, "fp32"), ("auto", "mps", True, "fp32"), ("auto", "cuda", True, "bf16"),
    ("auto", "cuda", False, "fp16"), ("fp32", "cuda", True, "fp32"), ("bf16", "cpu", True, "bf16")])
def test_precision_is_the_fastest_of_the_device_or_the_one_asked_for(
        monkeypatch, wanted, device, native_bf16, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native_bf16)
    assert utils.select_precision(wanted, torch.device(device)) == chosen


ALLOCATING_SCRIPT = """
import argparse, resource, torch, utils

utils.setup(argparse.Namespace(device="cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(25_000_000)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left as they are")
def test_large_tensors_reuse_freed_memory():
    """In a process of its own, whose heap holds nothing of other tests."""
    pytest.importorskip("resource")
    status, out, _ = finish(run_command([sys.executable, "-c", ALLOCATING_SCRIPT]))
    assert status == 0
    # Bytes that came anew: 2,000 MB without the call, 200 to 800 with it, by where the blocks lie.
    assert int(out.splitlines()[-1]) < 12 * 100e6


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


def test_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Else a power failure could leave an empty file in the place of a good one."""
    fsync = os.fsync
    replace = os.replace
    events = []

    def record_fsync(descriptor):
        fsync(descriptor)
        events.append(("on the disk", os.fstat(descriptor).st_size))

    def record_replace(source, target):
        events.append(("named", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with utils.atomic_write(tmp_path / "file") as file:
        file.write("x" * 1000)
    assert events == [("on the disk", 1000), ("named", 1000)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_two_processes_can_write_the_same_file_at_once(tmp_path):
    """Each has a temporary file of its own; the last one stays."""
    target = tmp_path / "file"
    with utils.atomic_write(target) as file:
        file.write("parent")
        child = os.fork()
        if child == 0:
            with utils.atomic_write(target) as file_of_child:
                file_of_child.write("child")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert target.read_text() == "child"
    assert target.read_text() == "parent"
    assert list(tmp_path.iterdir()) == [target]


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('mark').touch()",))


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text", "code", "a list",
                                   "other format"])
def test_damaged_and_hostile_checkpoints_are_one_message(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "best_model.pth"
    utils.save_checkpoint({"x": torch.rand(1000)}, file)
    assert utils.load_checkpoint(file)["x"].shape == (1000,)

    if fault == "missing":
        file.unlink()
    elif fault == "empty":
        file.write_bytes(b"")
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif fault == "text":
        file.write_bytes(b"just words")
    elif fault == "code":
        file.write_bytes(pickle.dumps(Payload()))
    elif fault == "a list":
        torch.save([1], file)
    else:
        torch.save({"format_version": 99}, file)

    with pytest.raises(utils.UserError, match="best_model.pth") as error:
        utils.load_checkpoint(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists()


def test_checkpoint_cut_anywhere_or_with_any_byte_changed_is_one_message_or_whole(tmp_path):
    """Cuts between 4 and 70 kB make torch raise an OSError with a number, as a broken disk does."""
    file = tmp_path / "last.pth"
    more = {str(i): torch.rand(30) for i in range(50)}
    utils.save_checkpoint({"weights": torch.rand(10_000), "more": more}, file)
    whole = file.read_bytes()
    cut = [whole[:length] for length in range(1000, len(whole), 1000)]
    changed = []
    for at in range(0, len(whole), 663):
        changed.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])

    refused = []
    for content in cut + changed:
        file.write_bytes(content)
        try:
            utils.load_checkpoint(file)
        except utils.UserError as error:
            assert "\n" not in str(error)
            assert "last.pth" in str(error)
            refused.append(content)
    assert all(content in refused for content in cut)


def refuse_to_replace(target, seconds=math.inf):
    """os.replace as Windows has it while another program keeps `target` open, so many seconds."""
    original = os.replace
    end = time.time() + seconds

    def replace(source, destination):
        if Path(destination) == Path(target) and time.time() < end:
            raise PermissionError(13, "Permission denied", str(source), None, str(destination))
        return original(source, destination)
    return replace


def test_history_that_is_open_elsewhere_costs_no_epoch(train, tmp_path, monkeypatch, capsys):
    """Excel has it open all the while: training continues, and the next start writes it."""
    table = tmp_path / "results" / "quick" / "baseline_history.csv"
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse_to_replace(table))
        folder = train("baseline") / "baseline"
    warnings = re.findall("warning: .*baseline_history.csv", capsys.readouterr().out)
    assert len(warnings) == 2  # one an epoch
    assert len(history_of(folder)) == 2
    assert not table.exists()

    train("baseline")
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("seconds, status", [(1, 0), (math.inf, 1)])
def test_checkpoint_that_is_open_elsewhere_is_tried_again(
        arguments, monkeypatch, capsys, seconds, status):
    """A virus scanner lets go after a second; another program does not, and is named."""
    args = arguments("baseline", "--num-epochs", "1")
    best_path = utils.run_folder("baseline", args) / "best_model.pth"
    monkeypatch.setattr(os, "replace", refuse_to_replace(best_path, seconds))
    if status:
        monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)

    assert utils.run_script(train_baseline.main, args) == status
    err = capsys.readouterr().err
    if status:
        assert_one_message(err, "error: ", "best_model.pth")
    else:
        assert err == ""


# The folder of a run ------------------------------------------------------------------------------

def open_run(args, name="baseline", **identity):
    """(run, model): a Run as `train` opens it, for a small model."""
    info = {"run": name, "model_name": "m", "config": vars(args), "split_fingerprint": "f"}
    model = models.build_model("test_efficientnet", 10)
    optimizer = train_baseline.build_optimizer(model, args)
    run = utils.Run(info, {"num_epochs": args.num_epochs, **identity}, args)
    run.tidy_after_a_kill()
    run.restore(model=model, optimizer=optimizer, ema=None)
    return run, model


def row_of(val_accuracy, **more):
    return dict.fromkeys(utils.HISTORY_COLUMNS, 0.0) | {"val_accuracy": val_accuracy, **more}


def test_best_epoch_is_the_earlier_of_equals(arguments):
    run, model = open_run(arguments("baseline"))
    for accuracy in (0.5, 0.7, 0.7, 0.6):
        run.finish_epoch(row_of(accuracy), model)

    best = utils.load_checkpoint(run.best_path)
    assert best["epoch"] == 2
    assert best["val_accuracy"] == 0.7
    history = utils.load_checkpoint(run.last_path)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


def test_best_accuracy_is_remembered_when_a_run_resumes(arguments):
    """A second part of a run whose epochs are worse does not replace the best of the first."""
    args = arguments("baseline")
    run, model = open_run(args)
    run.finish_epoch(row_of(0.7), model)
    resumed, model = open_run(args)
    resumed.finish_epoch(row_of(0.6), model)
    assert len(resumed.history) == 2
    assert utils.load_checkpoint(run.best_path)["epoch"] == 1


class Killed(BaseException):
    """Ends a run in this process, as SIGKILL ends a script."""


@pytest.mark.parametrize("writes", range(1, 6))
def test_kill_after_any_checkpoint_loses_no_best_epoch(arguments, monkeypatch, writes):
    """Two epochs, the second better, write last.pth three times and best_model.pth twice."""
    args = arguments("baseline", "--num-epochs", "2")
    accuracies = (0.5, 0.7)
    save_checkpoint = utils.save_checkpoint
    written = []

    def save_until_killed(checkpoint, target):
        save_checkpoint(checkpoint, target)
        written.append(target)
        if len(written) == writes:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_checkpoint", save_until_killed)
        run, model = open_run(args)
        with pytest.raises(Killed):
            for accuracy in accuracies:
                run.finish_epoch(row_of(accuracy), model)

    resumed, model = open_run(args)
    for accuracy in accuracies[len(resumed.history):]:
        resumed.finish_epoch(row_of(accuracy), model)
    assert utils.load_checkpoint(resumed.best_path)["val_accuracy"] == 0.7


def test_history_has_every_column_in_both_files(arguments):
    run, model = open_run(arguments("baseline"))
    run.finish_epoch({"val_loss": 1.0, "val_accuracy": 0.5, "train_loss": 2.0,
                      "train_accuracy": None, "learning_rate": 0.1, "images_per_second": 9.0},
                     model)
    with open(run.history_path, encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    row, = utils.load_checkpoint(run.last_path)["history"]
    assert tuple(table[0]) == tuple(row) == utils.HISTORY_COLUMNS
    assert table[0]["epoch"] == "1"
    assert table[0]["distill_loss"] == ""
    assert row["seconds"] > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_epoch_that_diverged_is_not_saved(arguments, loss):
    run, model = open_run(arguments("baseline"))
    run.finish_epoch(row_of(0.5), model)
    files = (run.best_path, run.last_path, run.history_path)
    before = [path.read_bytes() for path in files]
    with pytest.raises(utils.UserError, match="epoch 2.*--learning-rate"):
        run.finish_epoch(row_of(0.9, val_loss=loss), model)
    assert [path.read_bytes() for path in files] == before


def test_previous_run_is_moved_aside_once_there_is_something_to_save(arguments, capsys):
    args = arguments("baseline")
    run, model = open_run(args, learning_rate=1)
    run.finish_epoch(row_of(0.5), model)
    aside = run.folder.with_name("baseline.1")

    other, model = open_run(args, learning_rate=2)
    assert other.history == []
    assert run.best_path.is_file()
    assert not aside.exists()

    other.finish_epoch(row_of(0.4), model)
    out = capsys.readouterr().out
    assert "learning_rate" in out
    assert str(aside) in out
    assert utils.load_checkpoint(aside / "best_model.pth")["val_accuracy"] == 0.5
    assert (aside / "baseline_history.csv").is_file()
    assert utils.load_checkpoint(other.best_path)["val_accuracy"] == 0.4


def test_damaged_run_is_one_message_and_moved_aside_with_fresh(arguments):
    args = arguments("baseline")
    run, model = open_run(args)
    run.finish_epoch(row_of(0.5), model)
    run.last_path.write_bytes(run.last_path.read_bytes()[:-5000])
    with pytest.raises(utils.UserError, match="last.pth"):
        open_run(args)

    args.fresh = True
    fresh, model = open_run(args)
    fresh.finish_epoch(row_of(0.4), model)
    assert (fresh.folder.with_name("baseline.1") / "last.pth").is_file()


def test_history_of_another_checkpoint_folder_is_moved_aside(arguments, tmp_path):
    args = arguments("baseline")
    run, model = open_run(args)
    run.finish_epoch(row_of(0.5), model)
    args.checkpoint_dir = str(tmp_path / "elsewhere")
    other, model = open_run(args)
    other.finish_epoch(row_of(0.4), model)
    aside = Path(args.checkpoint_dir) / "baseline.1" / "baseline_history.csv"
    assert "0.5" in aside.read_text(encoding="utf-8")
    assert "0.4" in run.history_path.read_text(encoding="utf-8")


def test_constructor_writes_nothing_but_the_lock(arguments, tmp_path):
    args = arguments("baseline")
    info = {"run": "baseline", "config": vars(args)}
    run = utils.Run(info, {"num_epochs": 10}, args)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [run.folder.with_name(".baseline.lock")]


def test_what_a_kill_left_is_tidied(arguments):
    """Half-written files go; a history that lacks an epoch is written anew."""
    args = arguments("baseline")
    run, model = open_run(args)
    run.finish_epoch(row_of(0.5), model)
    table = run.history_path.read_text(encoding="utf-8")
    half_written = (run.folder / "last.pth.123.tmp",
                    run.history_path.with_name("baseline_history.csv.123.tmp"))
    for file in half_written:
        file.touch()
    of_another_run = run.history_path.with_name("teacher_history.csv.123.tmp")
    of_another_run.touch()
    run.history_path.unlink()

    open_run(args)
    assert not any(file.exists() for file in half_written)
    assert of_another_run.exists()
    assert run.history_path.read_text(encoding="utf-8") == table


def test_folder_of_the_history_is_made_before_the_training(arguments, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OSError):
        open_run(arguments("baseline"))


def test_history_of_a_run_in_another_folder_is_moved_aside(arguments, tmp_path, capsys):
    run, model = open_run(arguments("baseline"))
    run.finish_epoch(row_of(0.5), model)
    table = run.history_path.read_bytes()
    other, _ = open_run(arguments("baseline", "--checkpoint-dir", tmp_path / "other"))
    assert other.history_path == run.history_path
    other.finish_epoch(row_of(0.7), model)
    moved = other.folder.with_name("baseline.1") / run.history_path.name
    assert moved.read_bytes() == table
    assert f"{run.history_path}, of a run that is not in" in capsys.readouterr().out


def test_history_open_in_another_program_does_not_stop_a_new_run(arguments, monkeypatch):
    """Windows then refuses to remove it."""
    run, model = open_run(arguments("baseline"))
    run.finish_epoch(row_of(0.5), model)
    unlink = Path.unlink

    def unlink_unless_open(file, **options):
        if file.suffix == ".csv":
            raise PermissionError(13, "The process cannot access the file", str(file))
        unlink(file, **options)

    monkeypatch.setattr(Path, "unlink", unlink_unless_open)
    run, model = open_run(arguments("baseline", "--fresh"))
    run.finish_epoch(row_of(0.7), model)
    aside = run.folder.with_name("baseline.1")
    assert {file.name for file in aside.iterdir()} == {
        "best_model.pth", "last.pth", "baseline_history.csv"}
    assert utils.load_checkpoint(run.best_path)["val_accuracy"] == 0.7
    assert "0.7" in run.history_path.read_text(encoding="utf-8")


def test_run_holds_its_lock_while_it_lives(arguments):
    run, _ = open_run(arguments("baseline"))
    other_lock = filelock.FileLock(run.folder.with_name(".baseline.lock"))
    with pytest.raises(filelock.Timeout):
        other_lock.acquire(timeout=0)

    utils.Run.resume_point = ""
    del run
    gc.collect()
    with other_lock.acquire(timeout=0):
        pass


@pytest.mark.parametrize("free, warns", [(0.9, True), (1.1, False)])
def test_short_disk_is_warned_about(arguments, monkeypatch, capsys, free, warns):
    """Free space measured by what a run with EMA really writes."""
    args = arguments("baseline", "--ema-decay", "0.9")
    run, model = open_run(args)
    optimizer = train_baseline.build_optimizer(model, args)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    run.restore(model=model, optimizer=optimizer, ema=train_baseline.EMA(model, 0.9))
    run.finish_epoch(row_of(0.5), model)
    needed = run.best_path.stat().st_size + 2 * run.last_path.stat().st_size
    capsys.readouterr()

    usage = argparse.Namespace(free=free * needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    run.warn_if_disk_is_short(model)
    out = capsys.readouterr().out
    assert out.startswith("warning: ") == warns
    assert out.count("\n") == warns


@pytest.mark.slow
def test_second_process_waits_while_the_first_lives_and_a_kill_leaves_no_lock(tmp_path):
    """Nor do the data workers hold it, which live on for a moment after the kill."""
    pictures = write_pictures(tmp_path / "pictures")
    flags = ["--dataset-name", "ImageFolder", "--dataset-dir", pictures, "--batch-size", "4",
             "--val-fraction", "0.25", "--num-workers", "2", "--num-epochs", "2000"]
    folder = quick_folder(tmp_path)
    first = start("baseline", tmp_path, *flags)
    wait_until(lambda: has_epoch(folder))

    second = start("baseline", tmp_path, *flags)
    line = next(line for line in second.stdout if "waiting" in line)
    assert str(folder) in line
    assert first.poll() is None
    assert second.poll() is None
    second.terminate()
    status, _, err = finish(second)
    assert status == 143
    assert_one_message(err, "stopped")

    first.kill()
    first.wait()
    with filelock.FileLock(folder.with_name(".baseline.lock"), timeout=1):
        pass
    first.communicate()


@pytest.mark.slow
def test_seeds_of_two_processes_share_folders_and_teacher(tmp_path):
    """As on two GPUs: both started at once, one trains the teacher, the other waits for it."""
    flags = ["--num-epochs", "1", "--batch-size", "64", "--teacher-epochs", "8"]
    processes = [start("distillation", tmp_path, "--seeds", seed, *flags) for seed in (0, 1)]
    outputs = []
    for process in processes:
        status, out, err = finish(process)
        assert status == 0, err
        outputs.append(out)
    assert sum("teacher epoch" in out for out in outputs) == 1

    folder = quick_folder(tmp_path, "distilled")
    teachers = [utils.load_checkpoint(folder / f"seed_{seed}" / "best_model.pth")["teacher"]
                for seed in (0, 1)]
    assert teachers[0] == teachers[1]
    assert not list(folder.parent.glob("teacher.*"))
    assert not list(tmp_path.rglob("*.tmp"))
    assert utils.load_checkpoint(folder.parent / "best_model.pth")


@pytest.mark.slow
def test_runs_of_two_processes_agree_to_the_bit_when_one_resumes(tmp_path):
    """Ended by SIGKILL after its first epoch, with --seeds."""
    flags = ["--num-epochs", "3", "--seeds", "1"]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    status, _, _ = finish(start("baseline", whole, *flags))
    assert status == 0

    process = start("baseline", killed, *flags)
    wait_until(lambda: has_epoch(quick_folder(killed) / "seed_1"))
    process.kill()
    process.communicate()
    status, _, _ = finish(start("baseline", killed, *flags))
    assert status == 0
    assert_same_outcome(outcome(quick_folder(whole) / "seed_1"),
                        outcome(quick_folder(killed) / "seed_1"))
    assert (killed / "results" / "quick" / "seed_1" / "baseline_history.csv").is_file()


# Disks --------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 8 MB of its own; needs the right to mount one."""
    if sys.platform != "linux":
        pytest.skip("mounts as Linux does")
    folder = tmp_path / "small disk ü"
    folder.mkdir()
    libc = ctypes.CDLL(None)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=8m") != 0:
        pytest.skip("may not mount a small filesystem here")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def fill(folder):
    """Write until the filesystem of `folder` is full; return the file."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:  # a buffer would fail again when it is closed
        try:
            while True:
                file.write(bytes(2**14))
        except OSError:
            return filler


@pytest.mark.slow
def test_full_disk_ends_with_one_message_and_the_last_good_checkpoint(small_disk):
    run_folder = quick_folder(small_disk)
    process = start("baseline", small_disk, "--num-epochs", "200")
    wait_until(lambda: has_epoch(run_folder))
    filler = fill(small_disk)
    status, _, err = finish(process, 180)
    assert status == 1
    assert_one_message(err, "error: ", "No space left on device", str(small_disk))

    epochs = len(history_of(run_folder))
    assert epochs >= 1
    assert utils.load_checkpoint(run_folder / "best_model.pth")
    assert not list(small_disk.rglob("*.tmp"))

    filler.unlink()
    process = start("baseline", small_disk, "--num-epochs", "200")
    wait_until(lambda: len(history_of(run_folder)) > epochs)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_read_only_folder_is_one_message(small_disk):
    remount_read_only = 32 | 1  # MS_REMOUNT | MS_RDONLY
    ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(small_disk), b"tmpfs", remount_read_only, b"")
    status, _, err = finish(start("baseline", small_disk, "--num-epochs", "1"), 180)
    assert status == 1
    assert_one_message(err, "error: ", "Read-only file system")


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--results-dir"])
def test_file_in_place_of_a_folder_is_one_message(arguments, tmp_path, capsys, flag):
    file = tmp_path / "file"
    file.write_text("")
    args = arguments("baseline", flag, file, "--num-epochs", "1")
    assert utils.run_script(train_baseline.main, args) == 1
    assert_one_message(capsys.readouterr().err, "error: ", "file")


# The metrics of an epoch --------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets clock["now"]."""
    times = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: times["now"])
    return times


def measure(losses, accuracy=0.5):
    """The metrics of an epoch with these losses, in batches of 8."""
    metrics = utils.EpochMetrics(8, CPU)
    for step, loss in enumerate(losses):
        metrics.add(train_loss=torch.tensor(loss), train_accuracy=torch.tensor(accuracy))
        if step % 2 == 0:
            metrics.add(entropy=torch.tensor(float(step)))
    return metrics


def test_row_has_the_mean_of_what_was_measured(clock):
    metrics = measure([1.0, 2.0, 6.0])
    clock["now"] = 2.0
    row = metrics.row()
    assert row == {"train_loss": 3.0, "train_accuracy": 0.5, "entropy": 1.0,  # of steps 0 and 2
                   "images_per_second": 3 * 8 / 2.0}


def test_accuracy_of_mixed_labels_is_empty():
    metrics = measure([1.0], accuracy=math.nan)
    assert metrics.row()["train_accuracy"] is None
    assert "acc" not in metrics.progress_text()


def test_first_step_does_not_count_for_the_speed(clock):
    """In it a GPU tries kernels and workers start."""
    metrics = utils.EpochMetrics(8, CPU)
    clock["now"] = 10.0
    metrics.add(train_loss=torch.tensor(1.0))
    assert metrics.seconds_per_step() == 10.0  # nothing else is known yet
    for _ in range(4):
        clock["now"] += 2.0
        metrics.add(train_loss=torch.tensor(1.0))
    assert metrics.seconds_per_step() == 2.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_a_divergence(loss):
    means = measure([1.0, loss, 1.0]).means()
    with pytest.raises(utils.UserError, match="diverged.*by step 3.*--learning-rate"):
        utils.check_finite(means["train_loss"], "by step 3")
    utils.check_finite(1.0, "by step 3")


def test_gradient_that_overflows_at_any_scale_is_a_divergence():
    scaler = torch.amp.GradScaler("cpu")
    utils.check_scale(scaler, "by step 3")
    scaler.load_state_dict(scaler.state_dict() | {"scale": 0.5})
    with pytest.raises(utils.UserError, match="diverged.*fp16.*by step 3"):
        utils.check_scale(scaler, "by step 3")
    utils.check_scale(torch.amp.GradScaler("cpu", enabled=False), "by step 3")


def estimate(run, clock, capsys, steps_per_epoch=100):
    """What `print_estimate` prints in the first epoch: (step, line) for each line. A step takes two
    seconds, the first of them twenty."""
    metrics = utils.EpochMetrics(8, CPU)
    lines = []
    for step in range(1, steps_per_epoch + 1):
        clock["now"] += 20 if step == 1 else 2
        metrics.add(train_loss=torch.tensor(1.0))
        if step % 4 == 0 or step == steps_per_epoch:
            run.print_estimate(metrics, steps_per_epoch)
            out = capsys.readouterr().out
            if out:
                lines.append((step, out))
    return lines


def test_estimate_is_printed_once_from_steps_that_count(arguments, clock, capsys):
    run, _ = open_run(arguments("baseline", "--num-epochs", "10"))
    (step, line), = estimate(run, clock, capsys)
    assert step == 4  # the first reading after 15 s
    assert "10 epochs of 100 steps" in line
    assert utils.format_duration((10 * 100 - 4) * 2) in line  # 33 min


def test_estimate_of_a_resumed_run_names_its_first_epoch(arguments, clock, capsys):
    args = arguments("baseline", "--num-epochs", "10")
    run, model = open_run(args)
    for _ in range(4):
        run.finish_epoch(row_of(0.5), model)
    del run
    resumed, _ = open_run(args)
    capsys.readouterr()
    (_, line), = estimate(resumed, clock, capsys)
    assert "epochs 5 to 10 of 100 steps" in line
    assert utils.format_duration((6 * 100 - 4) * 2) in line


def test_estimate_of_short_epochs_comes_at_the_end_of_the_first(arguments, clock, capsys):
    run, _ = open_run(arguments("baseline", "--num-epochs", "10"))
    metrics = utils.EpochMetrics(8, CPU)
    for step in range(1, 4):
        clock["now"] += 1
        metrics.add(train_loss=torch.tensor(1.0))
        run.print_estimate(metrics, steps_per_epoch=3)
        assert ("about 27 s" in capsys.readouterr().out) == (step == 3)


def test_estimate_counts_later_seeds(arguments, clock, capsys):
    args = arguments("baseline", "--num-epochs", "10", "--seeds", "3", "4", "5")
    args.seed = 4  # one of three is finished
    run, _ = open_run(args)
    (_, line), = estimate(run, clock, capsys)
    assert "seed 4" in line
    assert utils.format_duration((2 * 10 * 100 - 4) * 2) in line
    assert "later seeds" in line


def test_line_of_an_epoch(arguments, clock, capsys):
    """It names run, seed and epoch; a star marks the best so far; later seeds count. The first line
    of a process has no time to go, since that epoch includes the start."""
    args = arguments("baseline", "--num-epochs", "3", "--seeds", "3", "4")
    run, model = open_run(args)
    lines = []
    for accuracy in (0.5, 0.4, 0.3):
        clock["now"] += 10
        run.finish_epoch(row_of(accuracy), model)
        lines.append(capsys.readouterr().out)
    assert "baseline, seed 3" in lines[0]
    assert "1/3" in lines[0]
    assert "50.00% *" in lines[0]
    assert "to go" not in lines[0]
    assert "2/3" in lines[1]
    assert "*" not in lines[1]
    assert "40 s to go" in lines[1]  # of four epochs
    assert "30 s to go" in lines[2]


def test_first_epoch_after_resuming_has_no_time_to_go(arguments, capsys):
    args = arguments("baseline", "--num-epochs", "4")
    run, model = open_run(args)
    run.finish_epoch(row_of(0.5), model)
    del run  # and its lock
    capsys.readouterr()
    run, model = open_run(args)
    for expected in (False, True):
        run.finish_epoch(row_of(0.5), model)
        assert ("to go" in capsys.readouterr().out) == expected


def test_last_epoch_has_no_time_to_go(arguments, capsys):
    run, model = open_run(arguments("baseline", "--num-epochs", "1"))
    run.finish_epoch(row_of(0.5, train_accuracy=None), model)
    out = capsys.readouterr().out
    assert "1/1" in out
    assert "to go" not in out
    assert "train " not in out  # mixed labels


@pytest.mark.slow
def test_time_to_go_is_about_right(tmp_path):
    """What an epoch's line prints against the rest of a run of some twenty seconds."""
    process = start("baseline", tmp_path, "--num-epochs", "25")
    line = process.stdout.readline()
    while "epoch   3/25" not in line:
        assert line, process.communicate()
        line = process.stdout.readline()
    start_of_rest = time.time()
    status, _, _ = finish(process)
    assert status == 0
    predicted = float(re.search(r", (\d+) s to go", line)[1])
    assert 0.3 < predicted / (time.time() - start_of_rest) < 3
