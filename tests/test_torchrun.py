"""torchrun: several processes on gloo compute what one does, speak once, and end together.

    python -m pytest tests/test_torchrun.py

Where nothing is said, weights may differ by 2e-5, which is what the order of float32 sums makes of
two epochs (measured: 6e-6 at most).
"""
import os
import signal
import subprocess
import sys
import types

import pytest
import torch

import config
import data_loader
import models
import train_baseline
import utils
from conftest import ROOT, SCRIPTS, children_of, ended, wait_for, write_pictures

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torch for Windows has no torchrun to test")
TOLERANCE = 2e-5
FLAGS = ["--quick", "--device", "cpu", "--student-model", "test_convnext", "--batch-size", "24",
         "--num-epochs", "2", "--ema-decay", "0.9", "--learning-rate", "1e-3"]  # no BatchNorm
BY_TEACHER = ["--teacher-model", "test_convnext2", "--teacher-epochs", "3"]
ACCUMULATED, MIXED = ["--accumulate-steps", "2"], ["--mixup-alpha", "0.5"]


def start(processes, script, folder, *flags):
    """`script` under torchrun; with one process, by itself."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    file = ROOT / SCRIPTS.get(script, script)
    command = [sys.executable, *(torchrun if processes > 1 else []), file]
    where = ["--checkpoint-dir", folder / "c", "--results-dir", folder / "r"]
    return subprocess.Popen(
        [*command, *(FLAGS if script != "evaluate" else ["--quick"]), *where, *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        start_new_session=True, env={**os.environ, "PYTHONUTF8": "1"})


def last(folder, run="baseline"):
    return folder / "c" / "quick" / run / "last.pth"


def assert_alike(one, other, run):
    """The last weights, their average, AdamW's moments, and all that is in the history."""
    one, other = (utils.load_checkpoint(last(folder, run)) for folder in (one, other))
    for identity in (one["identity"], other["identity"]):
        identity.pop("teacher", None)  # a checksum, and teachers differ by as much as students
    assert one["identity"] == other["identity"]
    for part in ("model", "ema"):
        assert one["states"][part].keys() == other["states"][part].keys()
        for name, weights in one["states"][part].items():
            assert (weights - other["states"][part][name]).abs().max() < TOLERANCE, name
    assert len(one["history"]) == len(other["history"])
    for mine, theirs in zip(one["history"], other["history"], strict=True):
        for column in {*mine} - {"seconds", "images_per_second", "peak_memory_mb"}:
            same = mine[column] is theirs[column] is None
            assert same or mine[column] == pytest.approx(theirs[column], rel=1e-4), column


def own_lines(err):
    """What stderr says but for torchrun's own report, whose traceback is of its own file."""
    assert 'train_baseline.py", line' not in err, err
    return [line for line in err.splitlines() if line.startswith(("error:", "stopped"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function: the folder in which one process has trained so, once."""
    made = {}

    def train(script, *flags):
        if (script, flags) not in made:
            made[script, flags] = tmp_path_factory.mktemp("alone")
            assert ended(start(1, script, made[script, flags], *flags))[0] == 0
        return made[script, flags]
    return train


@pytest.mark.parametrize("processes, script, flags", [
    (2, "baseline", ACCUMULATED + MIXED),
    (3, "distillation", [*BY_TEACHER, *ACCUMULATED, *MIXED, "--teacher-image-size", "48"])])
def test_several_processes_compute_what_one_does(tmp_path, alone, processes, script, flags):
    code, out, _ = ended(start(processes, script, tmp_path, *flags))
    runs = ["baseline"] if script == "baseline" else ["teacher", "distilled"]
    assert code == 0
    assert all(out.count(f"{run} epoch   2/") == 1 for run in runs)  # process 0 alone speaks
    for run in runs:
        assert_alike(tmp_path, alone(script, *flags), run)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_normalise_by_the_whole_batch(tmp_path):
    """With BatchNorm, in float32: the first epoch's losses are one GPU's, whose sums differ."""
    flags = ["--device", "cuda", "--amp-dtype", "fp32", "--student-model", "test_efficientnet"]
    histories = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        assert ended(start(processes, "baseline", folder, *flags))[0] == 0
        histories.append(utils.load_checkpoint(last(folder))["history"])
    one, two = (history[0] for history in histories)
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=0.02)


@pytest.mark.parametrize("how", ["kill one", "Ctrl-C"])
def test_all_end_together_and_another_number_goes_on(tmp_path, alone, how):
    """One is killed, or all meet Ctrl-C: one message, none is left; then, after the kill, three go
    on where two ended, to what one alone comes to."""
    process = start(2, "baseline", tmp_path)
    wait_for(lambda: last(tmp_path).exists() and utils.load_checkpoint(last(tmp_path))["history"])
    workers = children_of(process)
    assert len(workers) == 2
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    said = own_lines(err)
    assert len(said) == 1 and "the same command" in said[0], err
    assert how != "Ctrl-C" or said[0] == utils.STOPPED
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert len(utils.load_checkpoint(last(tmp_path))["history"]) == 1
    if how == "kill one":
        assert ended(start(3, "baseline", tmp_path))[0] == 0
        assert_alike(tmp_path, alone("baseline"), "baseline")


@pytest.mark.parametrize("script, flags, words", [
    ("baseline", ["--batch-size", "25"], "multiple of 2"), ("evaluate", [], "without torchrun"),
    ("baseline", ["--device", "cuda:99"], "torch has no cuda:99 here for each"),
    ("baseline", ["--dataset-name", "ImageFolder", "--dataset-dir", "BROKEN"], "are at fault")])
def test_what_is_wrong_is_said_once(tmp_path, script, flags, words):
    broken = write_pictures(tmp_path / "pictures")
    next(broken.glob("train/*/*")).write_bytes(b"no picture")
    flags = [broken if flag == "BROKEN" else flag for flag in flags]
    process = start(2, script, tmp_path, *flags)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count(words) == 1, err
    assert not (tmp_path / "c").exists()


def test_a_fault_of_one_process_is_said_once_and_ends_all(tmp_path):
    """Process 1 alone runs out of memory in its second epoch."""
    script = tmp_path / "train_baseline.py"
    script.write_text(f"""
import sys
import types
sys.path.insert(0, {str(ROOT)!r})
import config, models, train_baseline, utils
forward, calls = models.forward, []
def short_of_memory(model, images):
    calls.append(1)
    if utils.RANK == 1 and len(calls) == 60:
        raise MemoryError
    return forward(model, images)
models.forward = short_of_memory
sys.exit(utils.run_script(train_baseline.main, config.parse_args("baseline", "")))
""")
    process = start(2, script, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and len(own_lines(err)) == 1, err
    assert "there is too little memory" in err


@pytest.mark.parametrize("script, flags, words", [
    ("baseline", "--batch-size 25", "multiple of 2"),
    ("baseline", "--batch-size 26 --mixup-alpha 1", "multiple of 4"),
    ("baseline", "--cuda-graph", "no torchrun"),
    ("distillation", "--distillation-loss dist", "dist compares whole batches")])
def test_what_cannot_be_shared_is_wrong_use(arguments, monkeypatch, capsys, script, flags, words):
    assert arguments(script, *flags.split(), "--batch-size", "24")  # one process can
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit) as ended_with:
        arguments(script, *flags.split())
    assert ended_with.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("photographs", [False, True])
@pytest.mark.parametrize("processes, flags", [
    (1, []), (2, []), (3, ["--mixup-alpha", "0.5"]), (4, ["--cutmix-alpha", "1"]), (24, [])])
def test_parts_of_a_batch_make_it_up(
        arguments, monkeypatch, tmp_path, processes, flags, photographs):
    """Each image of each batch in one part alone, with the crop, mixture and label it has there."""
    args = arguments("baseline", "--batch-size", "24", "--num-workers", "0", *flags)
    if photographs:
        pictures = write_pictures(tmp_path / "pictures", counts=(("train", 28), ("test", 1)))
        args.dataset_name, args.dataset_dir = "ImageFolder", str(pictures)
    data = data_loader.open_dataset(args)
    info = {"image_size": 32, "interpolation": "bilinear", "num_classes": 10}

    def batches():
        loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
        return list(zip(loader.epoch(3), range(3), strict=False))
    whole = batches()
    parts = []
    monkeypatch.setattr(utils, "WORLD_SIZE", processes)
    for rank in range(processes):
        monkeypatch.setattr(utils, "RANK", rank)
        parts.append(batches())
    for number, ((images, labels), _) in enumerate(whole):
        mine = [part[number][0] for part in parts]
        assert all(len(one) == 24 // processes for one, _ in mine)
        got = torch.cat([one for one, _ in mine]).flatten(1)
        places = torch.cdist(got, images.flatten(1)).argmin(1)
        assert sorted(places.tolist()) == list(range(24))
        assert torch.equal(got, images.flatten(1)[places])
        assert torch.equal(torch.cat([label for _, label in mine]), labels[places])


def test_synchronised_batchnorms_keep_timms_names(monkeypatch):
    """As on GPUs, which alone can run them: all are converted, the checkpoint stays as it is."""
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
    for name in ("test_efficientnet", "test_resnet"):  # BatchNormAct2d and BatchNorm2d
        model = models.build_model(name, 10)
        norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        train_baseline.optimization(model, 10, types.SimpleNamespace(
            weight_decay=0.05, learning_rate=1e-3, accumulate_steps=1, warmup_epochs=1,
            num_epochs=3, amp_dtype="fp32", ema_decay=0))
        before = model.state_dict()
        scale = model.pixel_scale
        del model.pixel_scale
        model.pixel_scale = types.SimpleNamespace(is_cuda=True, device=scale.device)
        parallel = models.wrap_ddp(model)
        found = [module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
        assert len(found) == norms > 0 and parallel.module is model
        assert all(module.num_batches_tracked is not None for module in found)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("device, gpus", [("cuda", 1), ("cuda:1", 4), ("mps", 0)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_fewer_gpus_than_processes_are_wrong_use_for_each(
        arguments, monkeypatch, device, gpus, rank):
    """For process 0 too, which would else wait for the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(utils, "TORCHRUN", {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(utils.UsageError, match=f"torch has no {device} here for each"):
        utils.setup(arguments("baseline", "--device", device))


@pytest.mark.parametrize("script", ["baseline", "distillation"])
def test_processes_synchronise_once_an_update(train, monkeypatch, script):
    """What DistributedDataParallel goes by in each forward pass; --accumulate-steps makes three."""
    seen, forward = [], models.forward

    def spy(model, images):
        seen.append((model.training, vars(model).get("require_backward_grad_sync")))
        return forward(model, images)
    monkeypatch.setattr(models, "forward", spy)
    train(script, "--accumulate-steps", "3", "--batch-size", "64", "--num-epochs", "1")
    steps = [sync for training, sync in seen if training and sync is not None]
    assert len(steps) >= 18 and steps == [False, False, True] * (len(steps) // 3)


def test_evaluation_under_torchrun_is_wrong_use_with_one_process_too(monkeypatch, capsys):
    monkeypatch.setattr(utils, "TORCHRUN", {"WORLD_SIZE": "1"})
    with pytest.raises(SystemExit) as ended_with:
        config.parse_args("evaluate", "", ["--quick"])
    assert ended_with.value.code == 2 and "without torchrun" in capsys.readouterr().err
