"""Nothing lost: kills, full disks, two at once, divergence, hostile files, bad settings.

    python -m pytest tests/test_faults.py                  # -m "not slow" leaves the kills out
"""
import ctypes
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import config
import data_loader
import models
import train_baseline
import utils
from conftest import ROOT, TINY, write_pictures

TINY_BASELINE = ["--quick", "--device", "cpu", *TINY[:2], *TINY[4:]]


def start(folder, *flags, script="train_baseline.py", own_group=False):
    return subprocess.Popen([sys.executable, ROOT / script, *TINY_BASELINE, "--checkpoint-dir", str(folder / "c"),
                             "--results-dir", str(folder / "r"), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, encoding="utf-8", start_new_session=own_group, env={**os.environ, "PYTHONUTF8": "1"})


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def result(folder):
    """Weights, and history without its timings, of the baseline below `folder`."""
    run = folder / "c" / "quick" / "baseline"
    history = utils.load_file(run / "last.pth")["progress"]["history"]
    return (torch.load(run / "best_model.pth", weights_only=True)["state_dict"], utils.load_file(run / "last.pth")["states"]["model"],
            [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in history])


def assert_same(one, two):
    assert one[2] == two[2]
    for a, b in zip(one[:2], two[:2]):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Kills and stops --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_twenty_kills_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    """SIGKILL at random moments, resumed each time; the state is saved nearly every step, so that many fall into a save."""
    flags = ["--num-epochs", "30", "--batch-size", "32", "--save-minutes", "0.0005"]
    undisturbed = start(tmp_path / "whole", *flags)
    last, moments, kills, in_save = tmp_path / "killed" / "c" / "quick" / "baseline" / "last.pth", random.Random(0), 0, 0
    while kills < 20:
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start(tmp_path / "killed", *flags)
        wait_for(lambda: process.poll() is not None or last.exists() and last.stat().st_mtime_ns != before)
        assert process.poll() is None, f"done after {kills} kills: {process.communicate()}"
        time.sleep(moments.random() * 0.5)
        if kills % 2:  # every other time in the midst of writing
            wait_for(lambda: process.poll() is not None or last.with_name("last.pth.tmp").exists(), 20)
        process.kill()
        process.communicate()
        kills += 1
        in_save += last.with_name("last.pth.tmp").exists()
    process = start(tmp_path / "killed", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert undisturbed.communicate(timeout=300) and undisturbed.returncode == 0
    assert in_save >= 3, in_save
    assert_same(result(tmp_path / "whole"), result(tmp_path / "killed"))
    assert not [path for path in tmp_path.rglob("*.tmp")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(tmp_path, number, code):
    process = start(tmp_path, "--num-epochs", "200")
    last = tmp_path / "c" / "quick" / "baseline" / "last.pth"
    wait_for(last.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert "the same command (without --fresh) goes on from there" in out.splitlines()[-1]
    progress = utils.load_file(last)["progress"]
    assert progress["step"] > 0 or progress["epoch"] > 0


def test_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(utils, "_can_save", True)
    utils._on_signal(signal.SIGINT, None)
    assert utils._signal_code == 130
    with pytest.raises(SystemExit) as stop:
        utils._on_signal(signal.SIGINT, None)
    assert stop.value.code == 130


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to signal")
def test_ctrl_c_in_a_terminal_reaches_data_workers_too(tmp_path):
    """The whole process group gets the signal; the workers leave it to the training process, which saves."""
    pictures = write_pictures(tmp_path / "pictures", counts=(("train", 40), ("test", 2)))
    process = start(tmp_path, "--dataset-name", "ImageFolder", "--dataset-dir", str(pictures), "--batch-size", "4", "--num-epochs", "200",
                    "--num-workers", "2", own_group=True)
    wait_for((tmp_path / "c" / "quick" / "baseline" / "last.pth").exists)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and "all saved" in out


@pytest.mark.parametrize("flags, code, words", [
    (["--batch-size", "1"], 2, "--batch-size 1 cannot be trained with"),
    (["--student-model", "inception_v3"], 1, "inception_v3 cannot take images of 32 px")])
def test_what_only_the_model_can_tell_is_one_sentence(tmp_path, flags, code, words):
    process = start(tmp_path, *flags)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and words in err and "Traceback" not in err, err


def test_state_is_saved_within_an_epoch(arguments):
    args = arguments("baseline")
    model = models.build_model("test_efficientnet", 10)
    data = data_loader.open_dataset(args)
    info = models.describe("baseline", model, "test_efficientnet", data, args)
    state, saves = utils.new_state(model, 20, args), []
    loader = data_loader.training_loader(data, info, args, torch.device("cpu"))
    progress = utils.new_progress()
    utils.train_one_epoch(state, utils.training_step(state, objective, args), loader, progress,
                          lambda: saves.append(progress["step"]), 1e-9)
    assert saves == list(range(1, 21))


def objective(images, logits, labels):
    return dict.fromkeys(("loss", "ce_loss"), models.cross_entropy(logits, labels))


def test_reader_of_the_output_that_goes_away_meets_no_traceback(tmp_path):
    """As with `| head -1`: one sentence, and the same command goes on."""
    process = start(tmp_path, "--num-epochs", "2")
    assert process.stdout.readline().startswith("device")
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    message = process.stderr.read()
    process.stderr.close()
    assert message.startswith("error: what read this script's output has gone") and message.count("\n") == 1
    process = start(tmp_path, "--num-epochs", "2")
    assert process.communicate(timeout=120) and process.returncode == 0


# Two at once, disk, folders ---------------------------------------------------------------------------------------

def test_second_process_is_refused_while_the_first_lives_and_a_kill_leaves_no_lock(tmp_path):
    first = start(tmp_path, "--num-epochs", "200")
    wait_for((tmp_path / "c" / "quick" / "baseline" / "last.pth").exists)
    second = start(tmp_path, "--num-epochs", "200")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1 and "another process is training in" in err and "Traceback" not in err
    first.kill()
    first.communicate()
    third = start(tmp_path, "--num-epochs", "1")
    _, err = third.communicate(timeout=60)
    assert third.returncode == 0, err


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 8 MB of its own; needs the right to mount one."""
    folder = tmp_path / "small disk ü"
    folder.mkdir()
    if sys.platform != "linux" or ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=8m"):
        pytest.skip("may not mount a small filesystem here")
    yield folder
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def test_too_little_room_is_found_before_the_work(small_disk):
    (small_disk / "filler").write_bytes(bytes(5 * 2**20))
    process = start(small_disk)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "MB left; make room" in err and "epoch" not in out.replace("epochs of", "")
    assert not list(small_disk.rglob("*.pth"))


def test_full_disk_ends_with_one_message_and_the_last_good_checkpoint(small_disk):
    process = start(small_disk, "--num-epochs", "200")
    run = small_disk / "c" / "quick" / "baseline"
    wait_for((run / "last.pth").exists)
    with open(small_disk / "filler", "wb") as file:
        try:
            while True:
                file.write(bytes(2**14))
                file.flush()
        except OSError:
            pass
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "No space left on device" in err and "Traceback" not in err
    assert utils.load_file(run / "last.pth")["progress"]["epoch"] >= 1 and utils.load_file(run / "best_model.pth")
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    epochs = utils.load_file(run / "last.pth")["progress"]["epoch"]
    process = start(small_disk, "--num-epochs", "200")
    wait_for(lambda: utils.load_file(run / "last.pth")["progress"]["epoch"] > epochs)
    process.kill()
    process.communicate()


def test_read_only_folder(small_disk):
    ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(small_disk), b"tmpfs", 32 | 1, b"")  # MS_REMOUNT | MS_RDONLY
    process = start(small_disk, "--num-epochs", "1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Read-only file system" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--results-dir"])
def test_file_in_place_of_a_folder(tmp_path, flag):
    (tmp_path / "file").write_text("")
    process = start(tmp_path, flag, str(tmp_path / "file"), "--num-epochs", "1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith("error: ") and err.count("\n") == 1 and "file" in err


# Divergence -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip", ["0", "1"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_updates_stop_at_the_first_bad_step(arguments, clip, bad):
    args = arguments("baseline", "--clip-grad", clip)
    model, broken = models.build_model("test_efficientnet", 10), [False]

    def breakable(images, logits, labels):
        measured = objective(images, logits, labels)
        if broken[0]:  # an infinite loss, or the finite one with the gradient of a square root at zero
            measured["loss"] = measured["loss"] + (math.inf if bad == "loss" else (0 * logits.sum()).sqrt())
        return measured
    state = utils.new_state(model, 10, args)
    step = utils.training_step(state, breakable, args)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    assert bool(step(images, labels)["finite"])
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    broken[0] = True
    measured = step(images, labels)
    assert not bool(measured["finite"]) and math.isfinite(measured["loss"]) == (bad == "gradient")
    broken[0] = False
    step(images, labels)
    assert all(torch.equal(before, after) for before, after in zip(parameters, model.parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_diverging_run_keeps_what_was_saved(tmp_path):
    process = start(tmp_path, "--learning-rate", "1e30", "--clip-grad", "0", "--num-epochs", "3", "--warmup-epochs", "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert all(word in err for word in ("training diverged", "step", "learning rate", "--learning-rate", "--amp-dtype fp32"))
    for path in tmp_path.rglob("*.pth"):
        states = utils.load_file(path)
        weights = states.get("state_dict") or states["states"]["model"]
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_skipped_fp16_steps_are_counted_and_are_no_divergence(arguments, name):
    args = arguments("baseline")
    args.amp_dtype, device = "fp16", torch.device(name)
    model = models.build_model("test_efficientnet", 10).to(device)
    state = utils.new_state(model, 20, args)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**26})  # overflows at first, then settles
    data = data_loader.open_dataset(args)
    info = models.describe("baseline", model, "test_efficientnet", data, args)
    loader = data_loader.training_loader(data, info, args, device)
    row = utils.train_one_epoch(state, utils.training_step(state, objective, args), loader, utils.new_progress(), None, 10)
    assert 0 < row["skipped_steps"] < 20 and math.isfinite(row["train_loss"]) and all(torch.isfinite(parameter).all() for parameter in model.parameters())


# Reproducible -----------------------------------------------------------------------------------------------------

def test_same_seed_gives_the_same_bits_in_two_processes(tmp_path):
    processes = [start(tmp_path / name, "--num-epochs", "2") for name in ("a", "b")]
    assert all(process.communicate(timeout=120) and process.returncode == 0 for process in processes)
    assert_same(result(tmp_path / "a"), result(tmp_path / "b"))
    versions = utils.load_file(tmp_path / "a" / "c" / "quick" / "baseline" / "best_model.pth")["versions"]
    assert versions["device"].startswith("CPU") and versions["torch"] == torch.__version__ and "commit" in versions


# Bad settings -----------------------------------------------------------------------------------------------------

WRONG = {  # parser: values that lie outside its range or are of another type
    "integer": ["-1", "1.5", "nan", "inf", "", "many", "1e3", "0x10"],
    "number": ["nan", "inf", "-inf", "-0.1", "", "many", "1,5"],
    "choice": ["", "none of these", "NaN"],
    "model_name": ["", "efficientnet", "nan", "../b0"],
    "existing_file": ["", "/no/such/file", "."],
    "path": [""],
    "None": [],
}


def wrong_values():
    for name, (scripts, parse, _) in utils.SETTINGS.items():
        for value in WRONG[(parse.__qualname__ if parse else "None").split(".")[0]]:
            yield name, scripts[-1] if scripts != utils.ALL else "distillation", value
    yield from [("IMAGE_SIZE", "baseline", "31"), ("TEACHER_IMAGE_SIZE", "distillation", "0"), ("BATCH_SIZE", "baseline", "0"),
                ("NUM_EPOCHS", "baseline", "0"), ("TEACHER_EPOCHS", "distillation", "0"), ("ALPHA", "distillation", "1.01"),
                ("TEMPERATURE", "distillation", "0"), ("LEARNING_RATE", "baseline", "0"), ("VAL_FRACTION", "baseline", "0"),
                ("VAL_FRACTION", "baseline", "1"), ("LABEL_SMOOTHING", "baseline", "1"), ("EMA_DECAY", "baseline", "1"),
                ("SAVE_MINUTES", "baseline", "0"), ("TEACHER_LEARNING_RATE", "distillation", "0")]


@pytest.mark.parametrize("name, script, value", list(wrong_values()))
def test_value_out_of_range_names_the_setting_and_writes_nothing(name, script, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flag = "--" + name.lower().replace("_", "-")
    with pytest.raises(SystemExit) as stop:
        utils.parse_args(script, "", [f"{flag}={value}"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and f"argument {flag}: must be" in message
    assert not list(tmp_path.iterdir())


def test_every_constant_is_in_the_table():
    booleans = {name for name, (_, parse, _) in utils.SETTINGS.items() if parse is None}
    assert booleans == {"PRETRAINED", "DETERMINISTIC", "CUDA_GRAPH"} and all(isinstance(getattr(config, name), bool) for name in booleans)
    assert {name for name, _, _ in wrong_values()} == set(utils.SETTINGS) - booleans


@pytest.mark.parametrize("flags", [["--deterministic", "--device", "mps"]])
def test_combinations_that_cannot_work(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        utils.parse_args("baseline", "", flags)
    assert stop.value.code == 2 and "--deterministic" in capsys.readouterr().err


def test_four_hundred_random_command_lines_meet_no_traceback(tmp_path, monkeypatch, capsys):
    """Flags of all scripts with good, bad and missing values, in any order: parsed, or refused with one sentence."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    flags = ["--" + name.lower().replace("_", "-") for name in utils.SETTINGS] + [
        "--quick", "--fresh", "--fresh-teacher", "--seeds", "--no-pretrained", "--help", "--baseline-checkpoint", "--", "-x", "--sed"]
    values = ["0", "1", "16", "0.5", "-1", "nan", "1e9", "9" * 40, "", " ", "ü", "\0", "%s", "{}", "--", "-", "CIFAR100", "Digits",
              "ImageFolder", "efficientnet_b0", "vit_tiny_patch16_224", "resnet18.a1_in1k", ".", "/", "fp16", "cuda", "cpu", "forward", "crop"]
    parsed = 0
    for _ in range(400):
        arguments = []
        for _ in range(chance.randrange(1, 5)):
            flag, value = chance.choice(flags), chance.choice(values)
            arguments += chance.choice([[flag, value], [flag], [f"{flag}={value}"], [value]])
        script = chance.choice(utils.ALL)
        try:
            utils.parse_args(script, "", arguments)
            parsed += 1
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert stop.code == 2 and err.count("\n") == 1 and "error: " in err or stop.code == 0 and "usage" in out, (arguments, err)
    assert 0 < parsed < 400 and not list(tmp_path.iterdir())


def test_wrong_use_of_the_scripts_writes_nothing(tmp_path, monkeypatch):
    """What shows only with the data at hand is wrong use too."""
    process = start(tmp_path, "--batch-size", "5000")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--batch-size 5000 is more than the 1293 training images" in err
    assert not list(tmp_path.rglob("*.pth"))


# Hostile files ----------------------------------------------------------------------------------------------------

def hostile(folder, kind, good):
    """Put a file of the given `kind` into `folder`; returns its path."""
    file = folder / "best_model.pth"
    checkpoint = torch.load(good, weights_only=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(good.read_bytes()[:-5000])
    elif kind == "picture":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    elif kind == "whole model":  # torch.save(model): a class by name, which only code could bring back
        torch.save({**checkpoint, "model": torch.nn.Linear(2, 2)}, file)
    elif kind == "other model":
        torch.save({**checkpoint, "model_name": "test_resnet"}, file)
    elif kind == "other class count":
        torch.save({**checkpoint, "num_classes": 7}, file)
    elif kind == "older format":
        torch.save({**checkpoint, "format_version": 0}, file)
    elif kind == "bare weights":
        torch.save(checkpoint["state_dict"], file)
    elif kind == "last.pth":
        file.write_bytes(good.with_name("last.pth").read_bytes())
    elif kind == "unknown model":
        torch.save({**checkpoint, "model_name": "efficientnet_b99"}, file)
    elif kind == "keys missing":
        torch.save({"format_version": utils.FORMAT_VERSION, "state_dict": checkpoint["state_dict"]}, file)
    return file


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", *TINY_BASELINE, "--num-epochs", "1", "--checkpoint-dir", str(folder), "--results-dir", str(folder)])
        train_baseline.main()
    return folder / "quick" / "baseline" / "best_model.pth"


@pytest.mark.parametrize("kind, words", [
    ("folder", "is a folder"), ("empty", "is damaged"), ("truncated", "is damaged"), ("picture", "is damaged"),
    ("whole model", "carries code"), ("other model", "do not fit test_resnet"), ("other class count", "do not fit"),
    ("older format", "is in format 0"), ("bare weights", "no checkpoint of this project"), ("last.pth", "holds no model"),
    ("unknown model", "efficientnet_b99"), ("keys missing", "do not fit|lacks")])
def test_hostile_and_damaged_models_are_one_sentence(tmp_path, good, kind, words):
    with pytest.raises(utils.UserError, match=words) as error:
        models.load_model(hostile(tmp_path, kind, good))
    assert "\n" not in str(error.value) and "best_model.pth" in str(error.value) and error.value.code == 1
