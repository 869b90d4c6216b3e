"""torchrun: several processes on gloo compute what one does, print once, and end together.

    python -m pytest tests/test_torchrun.py

Weights may differ by 2e-5, which is what the order of float32 sums makes of two epochs (measured:
6e-6 at most).
"""
import os
import signal
import sys
import types

import pytest
import torch

import config
import data_loader
import models
import train_baseline
import utils
from conftest import (
    ROOT,
    SCRIPTS,
    TIMINGS,
    children_of,
    finish,
    has_epoch,
    history_of,
    members_of_group,
    quick_folder,
    run_command,
    wait_until,
    write_pictures,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torch for Windows has no torchrun to test")

TOLERANCE = 2e-5
FLAGS = ["--device", "cpu", "--dataset-name", "Digits", "--warmup-epochs", "1",
         "--student-model", "test_convnext",  # which has no BatchNorm
         "--batch-size", "24", "--num-epochs", "2", "--ema-decay", "0.9", "--learning-rate", "1e-3"]
TEACHER_FLAGS = ["--teacher-model", "test_convnext2", "--teacher-epochs", "3"]
ACCUMULATED = ["--accumulate-steps", "2"]
MIXED = ["--mixup-alpha", "0.5"]


# Scripts under torchrun ---------------------------------------------------------------------------

def start(num_processes, script, folder, *flags):
    """Start a script under torchrun, in a session of its own; with one process, by itself."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={num_processes}"]
    command += [ROOT / SCRIPTS.get(script, script), "--quick"]
    command += ["--checkpoint-dir", folder / "checkpoints", "--results-dir", folder / "results"]
    if script != "evaluate":
        command += FLAGS
        if not {"--seed", "--seeds"} & set(flags):
            command += ["--seed", "42"]
    return run_command([*command, *flags], own_session=True)


def own_messages(err):
    """The messages of the scripts themselves. torchrun adds a report of its own, with a traceback
    of its own file."""
    assert 'train_baseline.py", line' not in err, err
    return [line for line in err.splitlines() if line.startswith(("error:", "stopped"))]


def assert_same_training(folder, other_folder, run):
    """The last weights, EMA weights, and all that is in the history."""
    one = utils.load_checkpoint(quick_folder(folder, run) / "last.pth")
    other = utils.load_checkpoint(quick_folder(other_folder, run) / "last.pth")
    for last in (one, other):
        last["identity"].pop("teacher", None)  # a checksum; teachers differ as much as students
    assert one["identity"] == other["identity"]

    for part in ("model", "ema"):
        assert one["states"][part].keys() == other["states"][part].keys()
        for name, tensor in one["states"][part].items():
            assert (tensor - other["states"][part][name]).abs().max() < TOLERANCE, name

    assert len(one["history"]) == len(other["history"])
    for row, other_row in zip(one["history"], other["history"], strict=True):
        for column in row.keys() - {*TIMINGS, "peak_memory_mb"}:
            if row[column] is None:
                assert other_row[column] is None, column
            else:
                assert row[column] == pytest.approx(other_row[column], rel=1e-4), column


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """A function: the folder in which one process has trained with these flags, once."""
    folders = {}

    def train(script, *flags):
        if (script, flags) not in folders:
            folder = tmp_path_factory.mktemp("single")
            status, _, err = finish(start(1, script, folder, *flags))
            assert status == 0, err
            folders[script, flags] = folder
        return folders[script, flags]
    return train


@pytest.mark.slow
@pytest.mark.parametrize("num_processes, script, flags, runs", [
    (2, "baseline", ACCUMULATED + MIXED, ["baseline"]),
    (3, "distillation", [*TEACHER_FLAGS, *ACCUMULATED, *MIXED, "--teacher-image-size", "48"],
     ["teacher", "distilled"])])
def test_several_processes_compute_what_one_does(
        tmp_path, single_process, num_processes, script, flags, runs):
    status, out, err = finish(start(num_processes, script, tmp_path, *flags))
    assert status == 0, err
    for run in runs:
        assert out.count(f"{run} epoch   2/") == 1  # process 0 alone prints
        assert_same_training(tmp_path, single_process(script, *flags), run)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_normalise_by_the_whole_batch(tmp_path):
    """With BatchNorm, in float32: the first epoch's losses are one GPU's, whose sums differ."""
    flags = ["--device", "cuda", "--amp-dtype", "fp32", "--student-model", "test_efficientnet"]
    first_rows = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        status, _, err = finish(start(num_processes, "baseline", folder, *flags))
        assert status == 0, err
        first_rows.append(history_of(quick_folder(folder))[0])
    one, two = first_rows
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill of one", "Ctrl-C", "SIGTERM"])
def test_all_processes_end_together(tmp_path, single_process, end):
    """One is killed, all meet Ctrl-C, or torchrun gets SIGTERM: one message, and no process is
    left. After the kill three resume where two ended, to what a single process comes to."""
    process = start(2, "baseline", tmp_path)
    run_folder = quick_folder(tmp_path)
    wait_until(lambda: has_epoch(run_folder))
    workers = children_of(process)
    assert len(workers) == 2
    if end == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif end == "SIGTERM":
        process.terminate()
    else:
        os.kill(workers[1], signal.SIGKILL)

    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    message, = own_messages(err)
    assert "the same command resumes" in message
    assert "epoch 1 of 2 (baseline)" in message
    wait_until(lambda: not members_of_group(process.pid), 30)
    assert len(history_of(run_folder)) == 1

    if end == "kill of one":
        status, _, err = finish(start(3, "baseline", tmp_path))
        assert status == 0, err
        assert_same_training(tmp_path, single_process("baseline"), "baseline")


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, word", [
    ("baseline", ["--batch-size", "25"], "multiple of 2"),
    ("evaluate", [], "torchrun"),
    ("baseline", ["--device", "cuda:99"], "cuda:99"),
    ("baseline", ["--dataset-name", "ImageFolder", "--dataset-dir", "BROKEN"], "000.png")])
def test_wrong_use_is_one_message(tmp_path, script, flags, word):
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "train" / "cat" / "000.png").write_bytes(b"no picture")
    flags = [pictures if flag == "BROKEN" else flag for flag in flags]
    process = start(2, script, tmp_path, *flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    messages = [line for line in err.splitlines() if "error: " in line and word in line]
    assert len(messages) == 1, err
    assert not (tmp_path / "checkpoints").exists()


SHORT_OF_MEMORY = """
import sys
sys.path.insert(0, {root!r})
import config, models, train_baseline, utils

forward = models.forward
calls = []

def short_of_memory(model, images):
    calls.append(1)
    if utils.RANK == 1 and len(calls) == 60:
        raise MemoryError
    return forward(model, images)

models.forward = short_of_memory
sys.exit(utils.run_script(train_baseline.main, config.parse_args("baseline", "")))
"""


@pytest.mark.slow
def test_fault_of_one_process_is_one_message_and_ends_all(tmp_path):
    """Process 1 alone runs out of memory in its second epoch; it says why, process 0 what is saved.
    """
    script = tmp_path / "train_baseline.py"
    script.write_text(SHORT_OF_MEMORY.format(root=str(ROOT)), encoding="utf-8")
    process = start(2, script, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    why, saved = sorted(own_messages(err))
    assert why.startswith("error: ")
    assert "--batch-size" in why
    assert "epoch 1 of 2" in saved
    wait_until(lambda: not members_of_group(process.pid), 30)


# Its parts, in this process -----------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, word", [
    ("baseline", "--batch-size 25", "multiple of 2"),
    ("baseline", "--batch-size 26 --mixup-alpha 1", "multiple of 4"),
    ("distillation", "--distillation-loss dist", "dist")])
def test_settings_that_processes_cannot_share_are_wrong_use(
        arguments, monkeypatch, capsys, script, flags, word):
    assert arguments(script, *flags.split(), "--batch-size", "24")  # one process can
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit) as exit_of_script:
        arguments(script, *flags.split())
    assert exit_of_script.value.code == 2
    assert word in capsys.readouterr().err


def test_evaluation_is_wrong_use_with_one_process_too(monkeypatch, capsys):
    monkeypatch.setattr(utils, "TORCHRUN", {"WORLD_SIZE": "1"})
    with pytest.raises(SystemExit) as exit_of_script:
        config.parse_args("evaluate", "", ["--quick"])
    assert exit_of_script.value.code == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("device, num_gpus", [("cuda", 1), ("cuda:1", 4), ("mps", 0)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_fewer_gpus_than_processes_are_wrong_use(arguments, monkeypatch, device, num_gpus, rank):
    """For process 0 too, which would else wait for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(utils, "TORCHRUN", {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(utils.UsageError, match=f"{device} for each process"):
        utils.setup(arguments("baseline", "--device", device))


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(utils, "TORCHRUN", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert utils.select_device("auto") == torch.device("cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize("photographs", [False, True])
@pytest.mark.parametrize("num_processes, flags", [
    (1, []), (2, []), (3, ["--mixup-alpha", "0.5"]), (4, ["--cutmix-alpha", "1"]), (24, [])])
def test_shares_of_a_batch_make_it_up(
        arguments, monkeypatch, tmp_path, num_processes, flags, photographs):
    """Each image of each batch is in one share, with the crop, mixture and label it has there."""
    args = arguments("baseline", "--batch-size", "24", "--num-workers", "0", *flags)
    if photographs:
        pictures = write_pictures(tmp_path / "pictures", counts=(("train", 28), ("test", 1)))
        args.dataset_name = "ImageFolder"
        args.dataset_dir = str(pictures)
    data = data_loader.open_dataset(args)
    info = {"image_size": 32, "interpolation": "bilinear", "num_classes": 10}

    def first_batches():
        loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
        epoch = loader.epoch(3)
        return [next(epoch) for _ in range(3)]

    whole_batches = first_batches()
    monkeypatch.setattr(utils, "WORLD_SIZE", num_processes)
    batches_by_rank = []
    for rank in range(num_processes):
        monkeypatch.setattr(utils, "RANK", rank)
        batches_by_rank.append(first_batches())

    for number, (images, labels) in enumerate(whole_batches):
        shares = [batches[number] for batches in batches_by_rank]
        for share_images, _ in shares:
            assert len(share_images) == 24 // num_processes
        joined_images = torch.cat([share_images for share_images, _ in shares]).flatten(1)
        joined_labels = torch.cat([share_labels for _, share_labels in shares])

        # Where in the whole batch each image of the shares stands.
        places = torch.cdist(joined_images, images.flatten(1)).argmin(1)
        assert sorted(places.tolist()) == list(range(24))
        assert torch.equal(joined_images, images.flatten(1)[places])
        assert torch.equal(joined_labels, labels[places])


class FakeDDP(torch.nn.Module):
    """DistributedDataParallel without processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_synchronised_batchnorms_keep_names_optimizer_and_ema(arguments, monkeypatch, name):
    """As on GPUs, which alone can run them: BatchNormAct2d and BatchNorm2d are all converted, in a
    model whose tensors the optimizer, the EMA and the checkpoint already hold."""
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", FakeDDP)
    model = models.build_model(name, 10)
    num_norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    before = model.state_dict()
    parameters = list(model.parameters())
    ema = train_baseline.EMA(model, 0.9)

    device = model.pixel_scale.device
    del model.pixel_scale
    model.pixel_scale = types.SimpleNamespace(is_cuda=True, device=device)
    ddp_model = models.wrap_ddp(model)
    assert ddp_model.module is model
    norms = [module for module in model.modules()
             if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) == num_norms > 0

    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.data_ptr() == before[key].data_ptr(), key
    for old, new in zip(parameters, model.parameters(), strict=True):
        assert old is new
    sources = {tensor.data_ptr() for tensor in ema.sources + ema.counter_sources}
    assert sources == {tensor.data_ptr() for tensor in after.values()}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["baseline", "distillation"])
def test_gradients_are_synchronised_once_an_update(train, monkeypatch, script):
    """What DistributedDataParallel goes by in each forward pass, with --accumulate-steps 2."""
    synchronised = []
    forward = models.forward

    def record(model, images):
        # Without DDP the flag is set on the model itself, which tells the student from a teacher.
        if model.training and hasattr(model, "require_backward_grad_sync"):
            synchronised.append(model.require_backward_grad_sync)
        return forward(model, images)

    flags = ["--accumulate-steps", "2", "--num-epochs", "1"]
    train(script, *flags)  # the teacher, too
    monkeypatch.setattr(models, "forward", record)
    monkeypatch.setattr(models, "wrap_ddp", lambda model: model)
    monkeypatch.setattr(utils, "WORLD_SIZE", 2)
    monkeypatch.setattr(utils, "join_process_group", lambda device: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    train(script, "--fresh", *flags)
    assert synchronised == [False, True] * 2  # four steps
