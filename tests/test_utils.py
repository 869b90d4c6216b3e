"""Command line, step, schedule and files of utils.py.

    python -m pytest tests/test_utils.py
"""
import contextlib
import copy
import functools
import itertools
import math
import pickle
import platform
import re
import subprocess
import sys
import types
import weakref

import pytest
import scipy.stats
import sklearn.metrics
import timm
import torch
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data_loader
import models
import train_distillation
import utils
from conftest import ROOT, write_pictures

CONSTANTS = [name for name in vars(config) if name.isupper() and name != "QUICK"]


def refused(capsys, script, *flags):
    """The one sentence with which `script` refuses `flags`."""
    with pytest.raises(SystemExit) as stop:
        utils.parse_args(script, "", list(flags))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


# Command line -----------------------------------------------------------------------------------------------------

def test_every_constant_is_a_flag_with_help_and_default(capsys):
    assert set(CONSTANTS) == set(utils.SETTINGS)
    for script in utils.ALL:
        with pytest.raises(SystemExit):
            utils.parse_args(script, "", ["--help"])
        text = re.sub(r"\s+", " ", capsys.readouterr().out)
        for name, (scripts, _, help_text) in utils.SETTINGS.items():
            flag = "--" + name.lower().replace("_", "-")
            assert (f" {flag} " in text.replace(",", "")) == (script in scripts), flag
            assert (f"{help_text} (default: {getattr(config, name)})" in text) == (script in scripts), flag
    assert vars(utils.parse_args("baseline", "", []))["batch_size"] == 16


def test_design_defaults():
    wanted = dict(DATASET_NAME="CIFAR100", TEACHER_MODEL="efficientnet_b2", STUDENT_MODEL="efficientnet_b0", TEMPERATURE=4.0,
                  ALPHA=0.7, BATCH_SIZE=16, NUM_EPOCHS=50, IMAGE_SIZE=224, TEACHER_IMAGE_SIZE=None, PRETRAINED=True,
                  STUDENT_WEIGHTS=None, TEACHER_WEIGHTS=None, TEACHER_CHECKPOINT=None, KL_DIRECTION="forward", AMP_DTYPE="auto",
                  SEED=42, SPLIT_SEED=0, VAL_FRACTION=0.1, DATA_DIR="data", CHECKPOINT_DIR="checkpoints", RESULTS_DIR="results")
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_precedence_is_config_quick_flags():
    assert utils.parse_args("baseline", "", []).image_size == config.IMAGE_SIZE
    quick = utils.parse_args("baseline", "", ["--quick"])
    assert quick.image_size == config.QUICK["IMAGE_SIZE"] and not quick.pretrained
    assert utils.parse_args("baseline", "", ["--quick", "--image-size", "64"]).image_size == 64
    assert utils.parse_args("baseline", "", ["--image-size", "64", "--quick"]).image_size == 64


@pytest.mark.parametrize("script", utils.ALL)
def test_quick_never_touches_a_real_run(script):
    args = utils.parse_args(script, "", ["--quick", "--checkpoint-dir", "a", "--results-dir", "b"])
    assert args.checkpoint_dir.replace("\\", "/") == "a/quick" and args.results_dir.replace("\\", "/") == "b/quick"


@pytest.mark.parametrize("script, flags, words", [
    ("baseline", ["--batchsize", "4"], ["--batchsize", "--batch-size"]),
    ("baseline", ["--batch", "4"], ["unknown argument '--batch'"]),  # no abbreviations
    ("baseline", ["stray"], ["stray"]),
    ("baseline", ["--temperature", "4"], ["no flag of this script but of train_distillation.py"]),
    ("baseline", ["--dataset-name", "CIFAR1000"], ["CIFAR100", "Flowers102"]),
    ("baseline", ["--student-model", "eficientnet_b0"], ["closest: efficientnet_b0"]),
    ("baseline", ["--student-model", "efficientnet_b0.ra_in1kk"], ["closest: efficientnet_b0.ra_in1k"]),
    ("distillation", ["--teacher-model", "efficientnet"], ["timm.list_models()"]),
    ("distillation", ["--kl-direction", "backward"], ["forward, reverse"]),
    ("baseline", ["--batch-size", "0"], ["at least 1, not '0'"]),
    ("baseline", ["--batch-size", "16.5"], ["whole number"]),
    ("baseline", ["--learning-rate", "nan"], ["above 0"]),
    ("baseline", ["--learning-rate", "inf"], ["above 0"]),
    ("baseline", ["--val-fraction", "1"], ["above 0 and below 1"]),
    ("distillation", ["--alpha", "1.1"], ["at least 0 and at most 1"]),
    ("distillation", ["--temperature", "0"], ["above 0"]),
    ("baseline", ["--image-size", "16"], ["at least 32"]),
    ("baseline", ["--batch-size"], ["expected one argument"]),
    ("baseline", ["--student-weights", "/no/such/file"], ["existing file"]),
    ("distillation", ["--teacher-checkpoint", "/no/such/file"], ["existing file"]),
    ("baseline", ["--dataset-name", "ImageFolder"], ["--dataset-dir"]),
    ("baseline", ["--dataset-dir", "."], ["ImageFolder"]),
    ("baseline", ["--dataset-name", "ImageFolder", "--dataset-dir", "/no/such"], ["existing folder"]),
    ("baseline", ["--num-epochs", "2", "--warmup-epochs", "3"], ["--warmup-epochs 3"]),
    ("distillation", ["--teacher-epochs", "2", "--warmup-epochs", "3"], ["--teacher-epochs"]),
    ("baseline", ["--mixup-alpha", "0.2", "--batch-size", "15"], ["even number"]),
    ("distillation", ["--cutmix-alpha", "1", "--teacher-image-size", "256"], ["--teacher-image-size"]),
    ("baseline", ["--student-weights", "config.py", "--no-pretrained"], ["--no-pretrained"]),
    ("baseline", ["--student-model", "efficientnet_b8", "--pretrained"], ["no pretrained weights"]),
    ("baseline", ["--student-model", "vit_tiny_patch16_224", "--image-size", "128"], ["224 px alone"]),
    ("distillation", ["--distillation-loss", "dkd", "--mixup-alpha", "0.2"], ["--distillation-loss", "mixup"]),
    ("distillation", ["--distillation-loss", "dkd", "--cutmix-alpha", "1"], ["--distillation-loss", "cutmix"]),
    ("distillation", ["--distillation-loss", "dkd", "--kl-direction", "reverse"], ["--kl-direction", "no direction"]),
    ("distillation", ["--distillation-loss", "dist", "--kl-direction", "reverse"], ["--kl-direction", "no direction"]),
    ("distillation", ["--distillation-loss", "dist", "--batch-size", "2"], ["--batch-size", "at least 3"]),
    ("distillation", ["--distillation-loss", "dist", "--accumulate-steps", "2"], ["--accumulate-steps", "whole batch"]),
    ("distillation", ["--distillation-loss", "dkkd"], ["kd, dkd, dist, lskd"]),
    ("distillation", ["--fresh-teacher", "--teacher-checkpoint", "config.py"], ["no teacher is trained"]),
    ("baseline", ["--seed", "18446744073709551616"], ["at most 4294967295"]),
    ("baseline", ["--split-seed", "4294967296"], ["at most 4294967295"]),
    ("baseline", ["--seeds", "0", "1", "0"], ["each seed once"]),
    ("baseline", ["--seeds", "0", "1", "--seed", "2"], ["not both"]),
    ("baseline", ["--seeds", "0", "x"], ["whole number"]),
    ("evaluate", ["--seed", "1"], ["train_baseline.py and train_distillation.py"]),
    ("evaluate", ["--baseline-checkpoint", "/no/such/file"], ["existing file"]),
])
def test_wrong_use_is_one_sentence_and_status_2(script, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(utils.Path(__file__).parent.parent)
    message = refused(capsys, script, *flags)
    assert all(word in message for word in words), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_wrong_use(capsys):
    assert "CUDA" in refused(capsys, "baseline", "--device", "cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left as they are")
def test_large_tensors_take_the_memory_of_those_before():
    pytest.importorskip("resource")
    # In a process of its own: small objects of other tests between the large ones would make it a matter of chance.
    script = """
import argparse, resource, torch, utils
utils.setup(argparse.Namespace(device="cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(25_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 5 * 100e6  # bytes that came anew from the system, of 20 * 100 MB


@pytest.mark.parametrize("name, value", [("ALPHA", 2), ("BATCH_SIZE", "many"), ("PRETRAINED", 1), ("STUDENT_MODEL", "b0"),
                                         ("SEED", None), ("LEARNING_RATE", float("nan")), ("IMAGE_SIZE", 224.5)])
def test_config_is_held_to_the_rules_of_flags(name, value, capsys, monkeypatch):
    monkeypatch.setattr(config, name, value)
    assert f"{name} in config.py must be" in refused(capsys, "distillation")


# The step ---------------------------------------------------------------------------------------------------------

def test_decay_stays_off_biases_and_norms(arguments):
    model = models.build_model("efficientnet_b0", 10)
    state = utils.new_state(model, 10, arguments("baseline", "--weight-decay", "0.1"))
    decays = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0), name


def test_schedule_warms_up_linearly_then_follows_a_cosine(arguments):
    args = arguments("baseline", "--num-epochs", "10", "--warmup-epochs", "2", "--learning-rate", "0.5")
    state = utils.new_state(torch.nn.Linear(2, 2), 5, args)
    rates = []
    for _ in range(50):
        rates.append(state.scheduler.get_last_lr()[0])
        state.optimizer.step()
        state.scheduler.step()
    assert rates[:11] == pytest.approx([0.05, 0.095, 0.14, 0.185, 0.23, 0.275, 0.32, 0.365, 0.41, 0.455, 0.5])
    assert rates[10:] == pytest.approx([0.25 * (1 + torch.cos(torch.tensor(torch.pi * i / 40)).item()) for i in range(40)],
                                       abs=1e-6)
    assert state.scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


class TwoBatches:
    """A loader of fixed batches."""
    batch_size = 8

    def __init__(self, labels_of=10, poison=None):
        generator = torch.Generator().manual_seed(0)
        self.batches = [(torch.rand(8, 3, 32, 32, generator=generator), torch.randint(0, labels_of, (8,), generator=generator))
                        for _ in range(2)]
        if poison is not None:
            self.batches[poison][0][0, 0, 0, 0] = float("nan")

    def __len__(self):
        return 2

    def epoch(self, epoch, start=0):
        yield from self.batches[start:]


def cross_entropy_objective(images, logits, labels):
    return dict.fromkeys(("loss", "ce_loss"), models.cross_entropy(logits, labels))


def objective_of(teacher, args):
    """What the training scripts give `training_step`."""
    return functools.partial(train_distillation.distill, teacher, args=args) if teacher else cross_entropy_objective


def test_epoch_is_the_loop_one_would_write(arguments):
    """Bit for bit the plain PyTorch loop: normalise, forward, cross-entropy, backward, clip, AdamW, schedule."""
    args = arguments("baseline", "--num-epochs", "1", "--warmup-epochs", "0.5", "--clip-grad", "0.5")
    utils.seed_everything(0)
    model = models.build_model("test_efficientnet", 10)
    utils.seed_everything(0)
    plain = timm.create_model("test_efficientnet", num_classes=10).to(memory_format=torch.channels_last).train()
    loader = TwoBatches()
    state = utils.new_state(model, 2, args)
    row = utils.train_one_epoch(state, utils.training_step(state, cross_entropy_objective, args), loader,
                                utils.new_progress(), None, 10)

    no_decay = [p for p in plain.parameters() if p.ndim <= 1]
    decay = [p for p in plain.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": args.weight_decay}],
                                  fused=True)
    mean, std = (torch.tensor(plain.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    losses, correct = [], 0
    for (images, labels), rate in zip(loader.batches, (args.learning_rate, args.learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = plain((images - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
        correct += (logits.argmax(1) == labels).sum().item()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert row["train_loss"] == row["ce_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert row["train_accuracy"] == correct / 16 and row["kd_loss"] is None and row["images_per_second"] > 0


def test_loop_moves_the_schedule_by_a_step_each(arguments):
    """The rates that steps were made with are those of `new_state`'s schedule, one after the other."""
    args = arguments("baseline", "--num-epochs", "2", "--warmup-epochs", "0.5")
    rates, state = [], utils.new_state(models.build_model("test_efficientnet", 10), 2, args)
    step = utils.training_step(state, cross_entropy_objective, args)

    def noted(*batch):
        rates.append(state.optimizer.param_groups[0]["lr"])
        return step(*batch)
    for epoch in range(2):
        row = utils.train_one_epoch(state, noted, TwoBatches(), utils.new_progress() | {"epoch": epoch}, None, 10)
    alone = utils.new_state(models.build_model("test_efficientnet", 10), 2, args)
    expected = []
    for _ in range(4):
        expected.append(alone.optimizer.param_groups[0]["lr"])
        alone.optimizer.step(), alone.scheduler.step()
    assert rates == expected and len(set(rates)) > 2 and row["learning_rate"] == rates[-1]


def test_divergence_is_seen_within_the_epoch_and_names_its_first_step(arguments, monkeypatch):
    """Of two bad batches the first is named, and hours of an epoch that has diverged are not trained to the end."""
    clock, made = itertools.count(), []
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(clock))  # a second whenever it is read
    args, loader = arguments("baseline"), TwoBatches(poison=0)
    loader.batches = [*loader.batches[::-1], *loader.batches * 20]  # good, bad, bad, good, …
    monkeypatch.setattr(TwoBatches, "__len__", lambda loader: len(loader.batches))
    state = utils.new_state(models.build_model("test_efficientnet", 10), len(loader), args)
    step = utils.training_step(state, cross_entropy_objective, args)

    def noted(*batch):
        made.append(1)
        return step(*batch)
    with pytest.raises(utils.UserError, match="at step 2 of epoch 1"):
        utils.train_one_epoch(state, noted, loader, utils.new_progress(), None, 10)
    assert 2 <= len(made) < 15


@pytest.mark.parametrize("poison", [0, 1])
def test_loss_that_is_not_finite_stops_the_run_and_names_the_step(arguments, poison):
    model = models.build_model("test_efficientnet", 10)
    args = arguments("baseline")
    state = utils.new_state(model, 2, args)
    with pytest.raises(utils.UserError, match=f"diverged.* at step {poison + 1} of epoch 1"):
        utils.train_one_epoch(state, utils.training_step(state, cross_entropy_objective, args), TwoBatches(poison=poison),
                              utils.new_progress(), None, 10)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_mixed_precision_learns_in_float32_weights(arguments, precision, device):
    """One batch learned by heart under autocast, with the scaler under fp16; the loss itself in float32."""
    args = arguments("baseline", "--learning-rate", "0.003", "--warmup-epochs", "0")
    args.amp_dtype = precision
    model = models.build_model("test_efficientnet", 10).to(device)
    state = utils.new_state(model, 30, args)
    assert state.scaler.is_enabled() == (precision == "fp16")
    step = utils.training_step(state, cross_entropy_objective, args)
    images, labels = (tensor.to(device) for tensor in TwoBatches().batches[0])
    losses = [step(images, labels)["loss"] for _ in range(30)]
    assert losses[0].dtype == torch.float32 and losses[-1] < 0.5 * losses[0]
    assert all(parameter.dtype == torch.float32 and torch.isfinite(parameter).all() for parameter in model.parameters())


def test_accumulated_gradient_is_the_large_batchs(arguments):
    """BatchNorm in eval mode, where it knows no batch: 16 images at once or in four parts give one gradient."""
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    gradients, measured = [], []
    for parts in (1, 4):
        args = arguments("baseline", "--accumulate-steps", str(parts), "--clip-grad", "0")
        utils.seed_everything(0)
        state = utils.new_state(models.build_model("test_efficientnet", 10).eval(), 10, args)
        measured.append(utils.training_step(state, cross_entropy_objective, args)(images, labels))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    assert measured[0]["loss"].item() == pytest.approx(measured[1]["loss"].item(), rel=1e-6)
    assert measured[0]["accuracy"] == measured[1]["accuracy"]
    assert measured[0]["entropy"].item() == pytest.approx(measured[1]["entropy"].item(), rel=1e-6)


def test_accumulation_sees_the_images_of_the_large_batch(arguments):
    one, two = (arguments("baseline", *flags) for flags in (["--batch-size", "32"], ["--batch-size", "8", "--accumulate-steps", "4"]))
    data = data_loader.open_dataset(one)
    info = {"image_size": 32, "interpolation": "bicubic", "num_classes": 10}
    a, b = (next(data_loader.training_loader(data, info, args, torch.device("cpu")).epoch(0)) for args in (one, two))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    pair = (a[0], a[0][..., ::2])
    parts = list(utils.split(pair, a[1], 4))
    assert len(parts) == 4 and parts[1][0][1].shape == (8, 3, 32, 16) and torch.equal(parts[1][1], a[1][8:16])


def test_epoch_saved_after_its_last_step_keeps_that_steps_learning_rate(arguments):
    """A kill between the last save within an epoch and its end: the row of the history is the undisturbed one."""
    args, saved = arguments("baseline"), []
    state, progress = utils.new_state(models.build_model("test_efficientnet", 10), 2, args), utils.new_progress()
    step = utils.training_step(state, cross_entropy_objective, args)
    row = utils.train_one_epoch(state, step, TwoBatches(), progress, lambda: saved.append(copy.deepcopy(progress)), 0)
    assert saved[-1]["step"] == 2
    again = utils.train_one_epoch(state, step, TwoBatches(), saved[-1], None, 10)
    timed = ("seconds", "images_per_second")
    assert {key: row[key] for key in row if key not in timed} == {key: again[key] for key in row if key not in timed}


def test_epoch_gone_on_with_from_an_older_save_leaves_out_what_that_lacks(arguments):
    """A save whose sums hold the loss alone: what was not summed from the epoch's start on is nan, not a wrong number."""
    args = arguments("baseline")
    state = utils.new_state(models.build_model("test_efficientnet", 10), 2, args)
    progress = utils.new_progress() | {"step": 1, "sums": {"loss": 2.0, "ce_loss": 2.0, "correct": 8.0, "skipped": 0.0}}
    row = utils.train_one_epoch(state, utils.training_step(state, cross_entropy_objective, args), TwoBatches(), progress, None, 10)
    assert math.isnan(row["train_accuracy"]) and math.isnan(row["entropy"]) and 1 < row["train_loss"] < 5


@pytest.mark.parametrize("loss, batch, advice", [("kd", 16, "--batch-size 8 --accumulate-steps 2"), ("kd", 2, "--image-size"),
                                                 ("dist", 16, "--batch-size 8 or a smaller --image-size"),
                                                 ("kd", 15, "--batch-size 7 --accumulate-steps 2, which makes updates of 14 images")])
def test_out_of_memory_says_what_to_try(arguments, loss, batch, advice):
    def objective(images, logits, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")
    args = arguments("distillation", "--batch-size", str(batch), "--distillation-loss", loss)
    state = utils.new_state(models.build_model("test_efficientnet", 10), 10, args)
    with pytest.raises(utils.UserError, match=advice):
        utils.training_step(state, objective, args)(*TwoBatches().batches[0])


def test_out_of_memory_gives_the_peak_and_the_graphs_part(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**30)
    assert "a batch of 64 (5.0 GB in use at most); try --batch-size 32" in utils.out_of_memory(arguments("baseline"))
    assert "try --no-cuda-graph, which keeps less, or --batch-size 32" in utils.out_of_memory(arguments("baseline", "--cuda-graph"))


@pytest.mark.parametrize("error, expected, words", [
    (RuntimeError("FIND was unable to find an engine to execute this computation"), utils.UserError, "--batch-size 32.*another --amp-dtype than fp32"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), utils.UserError, "BatchNorm, or a smaller --image-size$"), (RuntimeError("shapes differ"), RuntimeError, "shapes differ")])
def test_what_is_and_is_not_a_lack_of_memory(arguments, error, expected, words):
    def objective(images, logits, labels):
        raise error
    args = arguments("baseline")
    state = utils.new_state(models.build_model("test_efficientnet", 10), 10, args)
    with pytest.raises(expected, match=words):
        utils.training_step(state, objective, args)(*TwoBatches().batches[0])


@pytest.fixture
def replays(monkeypatch):
    """A list that grows with every replay of a CUDA graph."""
    calls, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (calls.append(graph), replay(graph)))
    return calls


@pytest.mark.cuda
@pytest.mark.parametrize("graph", ["--no-cuda-graph", "--cuda-graph"])
@pytest.mark.parametrize("home", ["device", "host", "files"])
@pytest.mark.parametrize("precision, teacher_name, flags", [
    ("fp32", None, ["--ema-decay", "0.9"]), ("bf16", "test_resnet", ["--teacher-image-size", "64", "--mixup-alpha", "0.2"]),
    ("fp16", "test_resnet", ["--distillation-loss", "lskd", "--accumulate-steps", "2"])])
def test_loop_never_waits_for_the_device(arguments, graph, home, precision, teacher_name, flags, replays, monkeypatch, tmp_path):
    """The loop between its reads, on CUDA, wherever the images are: torch raises at any synchronisation."""
    if home == "files":
        flags = [*flags, "--dataset-name", "ImageFolder", "--batch-size", "8", "--num-workers", "0", "--dataset-dir",
                 str(write_pictures(tmp_path / "pictures", counts=(("train", 80), ("test", 3))))]
    args, device = arguments("distillation" if teacher_name else "baseline", graph, *flags), torch.device("cuda")
    args.amp_dtype = precision
    if home == "host":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    ticks = itertools.count()
    monkeypatch.setattr(utils.time, "perf_counter", lambda: 1e-6 * next(ticks))  # so that no read is due
    data = data_loader.open_dataset(args)
    model = models.build_model("test_efficientnet", len(data.class_names)).to(device).train()
    teacher = teacher_name and models.freeze(models.build_model(teacher_name, len(data.class_names)).to(device))
    info = models.describe("baseline", model, "test_efficientnet", data, args)
    loader = data_loader.training_loader(data, info, args, device)
    state, epoch = utils.new_state(model, len(loader), args), loader.epoch

    def watched(*where):
        try:
            for number, batch in enumerate(epoch(*where)):
                if number == utils.GRAPH_WARM_UP + 1:  # the capture itself waits
                    torch.cuda.set_sync_debug_mode("error")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    loader.epoch = watched
    try:
        utils.train_one_epoch(state, utils.training_step(state, objective_of(teacher, args), args), loader, utils.new_progress(), None, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == (len(loader) - utils.GRAPH_WARM_UP if graph == "--cuda-graph" else 0)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes operations that would wait for a GPU: values read one by one, sizes that depend on values, copies to the host, and
    copies from it that are not asked not to wait, or need the host to convert first."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if str(operation).startswith("aten.index.") else []
        if masks or any(name in str(operation) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")):
            self.found.append(str(operation))
        kwargs = kwargs or {}
        if "_to_copy" in str(operation) and args[0].device.type != "cpu" == getattr(kwargs.get("device"), "type", args[0].device.type):
            self.found.append(str(operation))
        if "_to_copy" in str(operation) and args[0].device.type == "cpu" != getattr(kwargs.get("device"), "type", "cpu"):
            if not kwargs.get("non_blocking") or kwargs.get("dtype", args[0].dtype) != args[0].dtype:
                self.found.append(str(operation))
        return operation(*args, **kwargs)


@pytest.mark.parametrize("flags", [[], ["--distillation-loss", "dkd"], ["--distillation-loss", "dist"], ["--distillation-loss", "lskd"],
                                   ["--kl-direction", "reverse"], ["--mixup-alpha", "0.2"], ["--accumulate-steps", "2"]])
def test_nothing_in_the_step_would_wait(arguments, flags):
    """Steps and batches of every loss read no value and have no size that depends on values; seen from the operations, on a CPU."""
    args = arguments("distillation", "--batch-size", "16", *flags)
    data = data_loader.open_dataset(args)
    teacher, student = (models.build_model(name, 10).eval() for name in ("test_resnet", "test_efficientnet"))
    info = models.describe("distilled", student, "test_efficientnet", data, args)
    state = utils.new_state(student.train(), 10, args)
    batches = data_loader.training_loader(data, info, args, torch.device("cpu")).epoch(0)
    step = utils.training_step(state, lambda *batch: train_distillation.distill(teacher, *batch, args), args)
    step(*next(batches))
    with Waits() as waits:
        step(*next(batches))
    assert not waits.found
    with Waits() as waits:
        float(torch.ones(3)[torch.tensor([True, False, False])])
    assert len(waits.found) == 2  # it would have been noticed


@pytest.mark.parametrize("home", ["device", "host", "files"])
@pytest.mark.parametrize("flags", [["--augmentation", "resized_crop"], ["--mixup-alpha", "0.2", "--teacher-image-size", "64"]])
def test_no_batch_would_wait(arguments, home, flags, monkeypatch, tmp_path):
    """Batches come to another device (torch's meta, which computes nothing) without a copy that waits, but at an epoch's start."""
    if home == "files":
        flags = [*flags, "--dataset-name", "ImageFolder", "--dataset-dir", str(write_pictures(tmp_path / "pictures")), "--num-workers", "0"]
    args = arguments("distillation", "--batch-size", "4", *flags)
    if home == "host":
        monkeypatch.setattr(data_loader, "home_of", lambda pixels, device: torch.device("cpu"))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    data = data_loader.open_dataset(args)
    info = {"image_size": 32, "interpolation": "bicubic", "num_classes": len(data.class_names), "crop_pct": 1.0}
    batches = data_loader.training_loader(data, info, args, torch.device("meta")).epoch(0)
    evaluated = iter(data_loader.evaluation_loader(data.train, info, args, torch.device("meta")))
    next(batches)
    with Waits() as waits:
        images, labels = next(batches)
    assert not waits.found and labels.is_meta and (images[0] if isinstance(images, tuple) else images).is_meta
    with Waits() as waits:
        next(evaluated)
    assert len(waits.found) <= 1  # the one box, for all batches
    with Waits() as waits:
        torch.ones(3).to("meta"), torch.ones(3, dtype=torch.float64).to("meta", torch.float32, non_blocking=True)
    assert len(waits.found) == 2  # it would have been noticed


def pretend(model, device="cuda"):
    """`model` with tensors that claim to be on `device` and hold no values (within a FakeTensorMode)."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                    tensors[name] = torch.nn.Parameter(empty, tensor.requires_grad) if tensors is module._parameters else empty
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests marked cuda do it in earnest")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning", "ignore:.*CUDA is not available:UserWarning")
@pytest.mark.parametrize("flags", [["--distillation-loss", "kd", "--teacher-image-size", "64", "--mixup-alpha", "0.2"],
                                   ["--distillation-loss", "dkd"], ["--distillation-loss", "dist", "--augmentation", "resized_crop"],
                                   ["--distillation-loss", "lskd", "--accumulate-steps", "2", "--clip-grad", "0"]])
def test_nothing_mixes_devices(arguments, flags, monkeypatch):
    """The training loop with loader, teacher, losses, clipping and optimizer, and evaluation, on tensors that torch takes for a
    GPU's and checks as such, under the name "cuda", which is no tensor's device. From the second step on nothing waits, and
    the first value is read at the epoch's end. All but the backward pass and the graph."""
    args, device = arguments("distillation", "--batch-size", "16", *flags), torch.device("cuda")
    data = data_loader.open_dataset(args)
    real = [models.build_model(name, 10) for name in ("test_resnet", "test_efficientnet")]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    ticks, steps, early = itertools.count(), [], []
    monkeypatch.setattr(utils.time, "perf_counter", lambda: 1e-6 * next(ticks))  # so that no read is due
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        teacher, student = map(pretend, real)
        models.freeze(teacher)

        def backward(loss):
            assert loss.is_cuda and loss.requires_grad
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        info = {"image_size": 32, "interpolation": "bicubic", "num_classes": 10, "crop_pct": 1.0}
        state = utils.new_state(student.train(), 10, args)
        step = utils.training_step(state, lambda *batch: train_distillation.distill(teacher, *batch, args), args)

        def noted(*batch):
            steps.append(step(*batch))
            assert {"loss", "ce_loss", "kd_loss", "entropy", "target_entropy", "finite"} <= steps[-1].keys()
            assert all(value.is_cuda and value.shape == () for value in steps[-1].values())
            early[:] = early or [len(waits.found)]
            return dict(steps[-1])
        loader = data_loader.training_loader(data, info, args, device)
        epoch = loader.epoch
        monkeypatch.setattr(loader, "epoch", lambda *where: itertools.islice(epoch(*where), 4))
        with Waits() as waits, pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):  # values there are none
            utils.train_one_epoch(state, noted, loader, utils.new_progress(), None, 10)
        assert len(steps) == 4 and len(waits.found) == early[0] + 1  # the read at the end
        for images, labels in data_loader.evaluation_loader(data.val, info, args, device):
            assert utils.forward(student.eval(), images).is_cuda and labels.is_cuda


def train_steps(args, device, steps, teacher=None):
    """A model after so many steps, each on a batch of its own, and the losses; the loop's own order of calls."""
    utils.seed_everything(0)
    model = models.build_model("test_efficientnet", 10).to(device).train()
    state = utils.new_state(model, steps, args)
    step, losses = utils.training_step(state, objective_of(teacher, args), args), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images, labels = torch.rand(16, 3, 32, 32, generator=generator), torch.randint(0, 10, (16,), generator=generator)
        losses.append(step(images.to(device), labels.to(device))["loss"].item())
        state.scheduler.step()
    return state, losses


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that live within it, in blocks of 512 as torch reserves them on a GPU."""
    def __init__(self, *tensors):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0
        for tensor in tensors:
            self.count(tensor)

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
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


MEMORY = [("efficientnet_b0", None, 1.5), ("efficientnet_b0", "efficientnet_b2", 2.5), ("efficientnet_b2", None, 3.0)]  # GB
EVALUATED = data_loader.EVAL_PIXELS // 224**2  # images at once


@pytest.mark.parametrize("name, teacher_name, limit", MEMORY)
@pytest.mark.parametrize("batch", [16, 64])
def test_memory_of_what_lives(arguments, name, teacher_name, limit, batch):
    """GB of tensors alive at once in steps at 224 px in bf16 and in evaluation, counted on tensors without values. A third of the
    limit is left for what only a GPU shows, cuDNN's workspaces and gaps between blocks; batches of 64 leave 1.5 of 6 GB."""
    args = arguments("distillation", "--batch-size", str(batch))
    args.amp_dtype = "bf16"
    real = [models.build_model(model, 100) for model in (name, teacher_name) if model]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        student, *teacher = (pretend(model, "cpu") for model in real)
        state = utils.new_state(student.train(), 20, args)
        step = utils.training_step(state, objective_of(models.freeze(teacher[0]) if teacher else None, args), args)
        images = torch.empty(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.int64)
        with Alive(images, *(tensor for model in (student, *teacher) for tensor in model.state_dict().values())) as alive:
            for _ in range(2):  # the first makes AdamW's moments
                step(images, labels)
            trained = alive.peak
            utils.infer(student, [(torch.empty(EVALUATED, 3, 224, 224), torch.zeros(EVALUATED, dtype=torch.int64))])
    print(f"{trained / 1e9:.2f} GB in a step, {alive.peak / 1e9:.2f} with evaluation")
    weights = sum(tensor.numel() * 4 for tensor in student.state_dict().values())
    assert trained > 4 * weights + batch * 30e6  # weights, gradient, moments, activations: it does count
    assert alive.peak < (2 / 3 * limit * 1e9 if batch == 16 else 4.5e9)


def test_accumulation_saves_memory(arguments):
    """Four parts of 16 images take little more than a batch of 16, for each part's activations go before the next one's come."""
    peaks, real = [], models.build_model("efficientnet_b0", 100).train()
    for flags in (["--batch-size", "16"], ["--batch-size", "16", "--accumulate-steps", "4"]):
        args = arguments("baseline", *flags)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            state = utils.new_state(pretend(real, "cpu"), 20, args)
            step, count = utils.training_step(state, cross_entropy_objective, args), 16 * args.accumulate_steps
            images = torch.empty(count, 3, 64, 64).contiguous(memory_format=torch.channels_last)
            with Alive() as alive:
                step(images, torch.zeros(count, dtype=torch.int64))
        peaks.append(alive.peak)
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.cuda
@pytest.mark.parametrize("name, teacher_name, limit", MEMORY)
@pytest.mark.parametrize("graph", ["--no-cuda-graph", "--cuda-graph"])
def test_peak_memory_at_the_default_batch(arguments, name, teacher_name, limit, graph, replays, monkeypatch):
    """GB reserved over ten steps at 224 px, batch 16, mixed precision; a 6 GB card is to take batch 64 too."""
    device, args = torch.device("cuda"), arguments("distillation", "--batch-size", "16", graph)
    args.amp_dtype = "auto"
    args.device = "cuda"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # which setup turns on
    utils.setup(args)
    teacher = models.freeze(models.build_model(teacher_name, 100).to(device)) if teacher_name else None
    state = utils.new_state(models.build_model(name, 100).to(device).train(), 20, args)
    step = utils.training_step(state, objective_of(teacher, args), args)
    images = torch.rand(16, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)

    def steps(count):
        for _ in range(count):
            step(images, torch.arange(16, device=device))
    evaluated = [(torch.rand(EVALUATED, 3, 224, 224, device=device), torch.arange(EVALUATED, device=device))]
    steps(5)  # in which cuDNN tries its kernels, as it does in the rehearsal
    utils.validate(state.model, evaluated)
    torch.cuda.reset_peak_memory_stats()
    state.model.train()
    steps(10)
    utils.validate(state.model, evaluated)
    assert torch.cuda.max_memory_reserved() < limit * 1e9
    assert len(replays) == (15 - utils.GRAPH_WARM_UP if graph == "--cuda-graph" else 0)


@pytest.mark.cuda
def test_step_that_reads_a_value_cannot_be_captured_and_is_trained_with_all_the_same(arguments, capsys):
    args = arguments("baseline", "--cuda-graph")
    state = utils.new_state(models.build_model("test_efficientnet", 10).to("cuda").train(), 10, args)

    def objective(images, logits, labels):
        ce = models.cross_entropy(logits, labels)
        return {"loss": ce * (1 + 0 * ce.item()), "ce_loss": ce}
    step, losses, stream = utils.training_step(state, objective, args), [], torch.cuda.current_stream()
    try:
        for images, labels in TwoBatches().batches * 4:
            losses.append(step(images.to("cuda"), labels.to("cuda"))["loss"].item())
    except utils.UserError as error:
        assert "--no-cuda-graph" in str(error)  # torch before about 2.13
    else:
        assert len(losses) == 8 and losses[-1] < losses[0] and "could not be captured" in capsys.readouterr().out
        assert torch.cuda.current_stream() == stream


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flags", [[], ["--accumulate-steps", "2", "--batch-size", "8"]])
def test_captured_and_eager_training_agree(arguments, precision, flags, replays, monkeypatch):
    """Fifty steps with a teacher: the same losses within 1 %; in half precision, where a learning rate rounded to float32
    alone moves single losses by 8 % in the end, within 5 % for ten steps and within 10 % in the mean of the last ten."""
    device, losses = torch.device("cuda"), {}
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU only emulates bf16")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    teacher = models.freeze(models.build_model("test_resnet", 10).to(device))
    for graph in ("--no-cuda-graph", "--cuda-graph"):
        args = arguments("distillation", "--num-epochs", "1", "--warmup-epochs", "0.1", graph, *flags)
        args.amp_dtype = precision
        state, losses[graph] = train_steps(args, device, 50, teacher)
        assert isinstance(state.optimizer.param_groups[0]["lr"], float)
    captured, eager = losses["--cuda-graph"], losses["--no-cuda-graph"]
    assert len(replays) == 50 - utils.GRAPH_WARM_UP
    if precision == "fp32":
        assert captured == pytest.approx(eager, rel=0.01)
    else:
        assert captured[:10] == pytest.approx(eager[:10], rel=0.05) and sum(captured[-10:]) == pytest.approx(sum(eager[-10:]), rel=0.1)


class Recording:
    """Stands in for torch.cuda.CUDAGraph without a GPU: `graph` undoes what the recorded step did, for recording
    computes nothing on a GPU, and `replay` makes the step on the recording's own batch and writes into its own results."""
    def __init__(self, monkeypatch):
        self.replays, self.states = 0, []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        for module, name in ((utils, "side_stream"), (torch.cuda, "current_stream")):
            monkeypatch.setattr(module, name, lambda: types.SimpleNamespace(wait_stream=lambda other: None))

    def update(self, state, update):
        def remembered(images, labels):
            self.state, self.again, self.batch = state, update, (images, labels)
            self.results = update(images, labels)
            return self.results
        return remembered

    @contextlib.contextmanager
    def graph(self, recording, **how):
        groups = self.state.optimizer.param_groups
        assert all(group["capturable"] and isinstance(group["lr"], torch.Tensor) for group in groups)  # or torch would refuse
        assert all(parameter.grad is None for group in groups for parameter in group["params"])  # so that they are the graph's
        assert how["capture_error_mode"] == "thread_local"
        before = [tensor.clone() for tensor in self.tensors()]
        yield
        for tensor, value in zip(self.tensors(), before):
            tensor.copy_(value)
        self.groups = [dict(group) for group in self.state.optimizer.param_groups]

    def tensors(self):
        kept = [value for state in self.state.optimizer.state.values() for value in state.values()]
        return [tensor.detach() for tensor in [*self.state.model.state_dict().values(), *kept]]

    def replay(self):
        self.replays += 1
        now = [dict(group) for group in self.state.optimizer.param_groups]
        for group, recorded in zip(self.state.optimizer.param_groups, self.groups):
            group.update(lr=recorded["lr"].item(), capturable=False)
        again = self.again(*self.batch)
        for group, outside in zip(self.state.optimizer.param_groups, now):
            group.update(outside)
        for name, value in again.items():
            self.results[name].copy_(value)


def test_captured_step_feeds_its_recording(arguments, monkeypatch):
    """Without a GPU: batches, learning rates and results go into and out of the recording as in eager training."""
    args = arguments("baseline", "--num-epochs", "1", "--warmup-epochs", "0.2")
    plain, expected = train_steps(args, torch.device("cpu"), 10)
    recording, training_step = Recording(monkeypatch), utils.training_step

    def captured_step(state, objective, args):
        update = recording.update(state, training_step(state, objective, args))
        return utils.captured(update, state.optimizer, state.scaler)
    monkeypatch.setattr(utils, "training_step", captured_step)
    state, losses = train_steps(args, torch.device("cpu"), 10)
    assert recording.replays == 10 - utils.GRAPH_WARM_UP
    assert losses == pytest.approx(expected, rel=1e-5)  # the recording's learning rate is a float32
    assert state.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]


def test_when_the_step_is_captured_changes_nothing(arguments, monkeypatch):
    """A resumed run warms up again, so steps that warm up are to the last bit what replays are."""
    args, weights, training_step = arguments("baseline", "--num-epochs", "1", "--warmup-epochs", "0.7"), [], utils.training_step
    for warm_up in (2, 9):  # the eighth step is one whose rate, as a float32, makes other weights
        recording = Recording(monkeypatch)
        monkeypatch.setattr(utils, "GRAPH_WARM_UP", warm_up)
        monkeypatch.setattr(utils, "training_step", lambda state, objective, args: utils.captured(
            recording.update(state, training_step(state, objective, args)), state.optimizer, state.scaler))
        weights.append(train_steps(args, torch.device("cpu"), 10)[0].model.state_dict())
        assert recording.replays == 10 - warm_up
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_goes_on_where_a_step_cannot_be_captured(arguments, monkeypatch, capsys):
    """A failure in the middle of the recording, which leaves the fp16 scaler half-way; eager training is not disturbed."""
    args = arguments("baseline", "--num-epochs", "1")
    args.amp_dtype = "fp16"
    plain, expected = train_steps(args, torch.device("cpu"), 8)
    Recording(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording, **how: contextlib.nullcontext())
    training_step = utils.training_step

    def captured_step(state, objective, args):
        def update(images, labels, calls=[0]):
            calls[0] += 1
            if calls[0] == utils.GRAPH_WARM_UP + 1:
                state.scaler.scale(state.model(images).sum()).backward()
                state.scaler.unscale_(state.optimizer)
                raise RuntimeError("operation not permitted when stream is capturing")
            return eager(images, labels)
        eager = training_step(state, objective, args)
        return utils.captured(update, state.optimizer, state.scaler)
    monkeypatch.setattr(utils, "training_step", captured_step)
    state, losses = train_steps(args, torch.device("cpu"), 8)
    assert capsys.readouterr().out.count("cuda graph: the step could not be captured (operation not permitted") == 1
    assert losses[:utils.GRAPH_WARM_UP] == expected[:utils.GRAPH_WARM_UP]
    assert losses == pytest.approx(expected, rel=0.05)  # the failed attempt moved BatchNorm's running means, nothing else


def test_epoch_of_replays_is_the_eager_epoch(arguments, monkeypatch):
    """The whole loop over a recording, which overwrites what it measured last: the row of its history is the eager one's."""
    args, rows = arguments("baseline", "--num-epochs", "1"), []
    data = data_loader.open_dataset(args)
    training_step = utils.training_step
    for recording in (None, Recording(monkeypatch)):
        utils.seed_everything(0)
        model = models.build_model("test_efficientnet", 10)
        loader = data_loader.training_loader(data, models.describe("baseline", model, "test_efficientnet", data, args), args, torch.device("cpu"))
        state = utils.new_state(model, len(loader), args)
        step = training_step(state, cross_entropy_objective, args)
        if recording:
            step = utils.captured(recording.update(state, step), state.optimizer, state.scaler)
        rows.append(utils.train_one_epoch(state, step, loader, utils.new_progress(), None, 10))
    assert recording.replays == len(loader) - utils.GRAPH_WARM_UP
    for name in ("train_loss", "ce_loss", "train_accuracy", "entropy", "skipped_steps"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-3), name


def test_torch_that_cannot_leave_a_failed_capture_ends_with_one_sentence(arguments, monkeypatch):
    """As torch did before about 2.13; the cause is named, not what came of it."""
    Recording(monkeypatch)

    def capture(recording, **how):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")

    def empty_cache():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    args, training_step = arguments("baseline"), utils.training_step
    monkeypatch.setattr(utils, "training_step", lambda state, objective, args: utils.captured(
        training_step(state, objective, args), state.optimizer, state.scaler))
    with pytest.raises(utils.UserError, match="operation not permitted.*--no-cuda-graph"):
        train_steps(args, torch.device("cpu"), 8)


def test_cuda_graph_without_a_gpu_says_so(arguments, capsys):
    args = arguments("baseline", "--cuda-graph")
    utils.setup(args)
    assert "cuda graph: only on NVIDIA GPUs" in capsys.readouterr().out


def test_diagnosis_is_scipys(arguments):
    logits, labels = torch.randn(64, 10) * 3, torch.randint(0, 10, (64,))
    measured = utils.diagnose(logits, labels)
    assert measured["entropy"].item() == pytest.approx(scipy.stats.entropy(logits.double().softmax(1).numpy(), axis=1).mean(), rel=1e-5)
    assert measured["accuracy"].item() == pytest.approx(sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    assert "accuracy" not in utils.diagnose(logits, torch.rand(64, 10))


def test_rehearsal_leaves_no_trace(arguments, capsys):
    model = models.build_model("test_efficientnet", 10)
    args, before = arguments("baseline"), {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    utils.rehearse(model, cross_entropy_objective, TwoBatches(), TwoBatches().batches, {"run": "baseline", "model_name": "m"}, args)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and "in all" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_that_does_not_fit_shows_in_the_rehearsal(arguments, monkeypatch):
    def infer(model, loader):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(utils, "infer", infer)
    with pytest.raises(utils.UserError, match="--batch-size 32 --accumulate-steps 2"):
        utils.rehearse(models.build_model("test_efficientnet", 10), cross_entropy_objective, TwoBatches(), TwoBatches().batches,
                       {"run": "baseline", "model_name": "m"}, arguments("baseline"))


def test_estimate_counts_steps_and_evaluation(arguments, monkeypatch, capsys):
    """With a clock that goes on by a second whenever it is read: 2 steps of one second and 2 evaluations of one second an epoch."""
    ticks = itertools.count()
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(ticks))
    utils.rehearse(models.build_model("test_efficientnet", 10), cross_entropy_objective, TwoBatches(), TwoBatches().batches,
                   {"run": "baseline", "model_name": "m"}, arguments("baseline", "--num-epochs", "15"))
    assert "15 epochs of 2 steps, about 60 s in all" in capsys.readouterr().out


def test_ema_is_what_is_validated(arguments):
    model = models.build_model("test_efficientnet", 10)
    args = arguments("baseline", "--ema-decay", "0.5")
    state = utils.new_state(model, 2, args)
    assert state.validated is state.ema.module
    step, seen = utils.training_step(state, cross_entropy_objective, args), [model.conv_stem.weight.detach().clone()]

    def noted(images, labels):
        measured = step(images, labels)
        seen.append(model.conv_stem.weight.detach().clone())
        return measured
    utils.train_one_epoch(state, noted, TwoBatches(), utils.new_progress(), None, 10)
    decays = [state.ema.get_decay(number) for number in (1, 2)]  # timm's, which rises to --ema-decay
    expected = seen[0]
    for decay, weight in zip(decays, seen[1:]):
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(state.validated.conv_stem.weight, expected)
    assert not torch.equal(state.validated.conv_stem.weight, model.conv_stem.weight) and not torch.equal(expected, seen[0])


def test_infer_keeps_order_and_eval_mode():
    model = models.build_model("test_efficientnet", 10).train()
    batches = TwoBatches().batches
    logits, labels = utils.infer(model, batches)
    assert not model.training and logits.shape == (16, 10)
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))
    torch.testing.assert_close(logits[8:], utils.forward(model, batches[1][0]).detach())


# Files ------------------------------------------------------------------------------------------------------------

def test_reader_never_meets_half_a_file(tmp_path):
    target = tmp_path / "ünter" / "file.txt"
    with utils.write_into_place(target) as file:
        file.write("whole ü")
        file.flush()
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "whole ü"
    with pytest.raises(RuntimeError), utils.write_into_place(target) as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text(encoding="utf-8") == "whole ü"


class Payload:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('mark').touch()",))


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text", "code", "other", "newer"])
def test_damaged_and_hostile_checkpoints_are_one_sentence(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "best_model.pth"
    torch.save({"format_version": utils.FORMAT_VERSION, "x": torch.rand(1000)}, file)
    assert utils.load_file(file)["x"].shape == (1000,)
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
        utils.load_file(file)
    assert "\n" not in str(error.value) and not (tmp_path / "mark").exists()


def test_checkpoint_cut_anywhere_or_with_any_byte_changed_is_one_sentence_or_whole(tmp_path):
    """Cuts between 4 and 70 kB make torch raise an OSError with a number, as a broken disk does."""
    file = tmp_path / "last.pth"
    torch.save({"format_version": utils.FORMAT_VERSION, "weights": torch.rand(10_000), "more": {str(i): torch.rand(30) for i in range(50)}}, file)
    whole = file.read_bytes()
    contents = [whole[:length] for length in range(1000, len(whole), 500)]
    contents += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:] for at in range(0, len(whole), 331)]
    refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            utils.load_file(file)
        except utils.UserError as error:
            assert "\n" not in str(error) and "last.pth" in str(error)
            refused += 1
    assert refused > len(whole) // 500 - 3  # all that were cut


def student(folder, run, accuracy, **more):
    info = {"format_version": utils.FORMAT_VERSION, "run": run, "dataset": "Digits", "class_names": ["a"],
            "split_fingerprint": "f", **more}
    utils.save_best(folder / run / "best_model.pth", torch.nn.Linear(1, 1), info, {"epoch": 1, "val_accuracy": accuracy})
    return info


@pytest.mark.parametrize("baseline, distilled, chosen", [(0.5, 0.6, "distilled"), (0.6, 0.5, "baseline"), (0.5, 0.5, "baseline")])
def test_best_student_is_chosen_on_validation_and_a_tie_goes_to_the_baseline(arguments, capsys, baseline, distilled, chosen):
    args = arguments("evaluate")
    folder = utils.Path(args.checkpoint_dir)
    like = student(folder, "baseline", baseline)
    student(folder, "distilled", distilled)
    student(folder, "teacher", 0.99)
    utils.choose_best(args, like)
    assert utils.load_file(folder / "best_model.pth")["run"] == chosen
    assert f"best student so far: {chosen}" in capsys.readouterr().out


@pytest.mark.parametrize("odd", [{"split_fingerprint": "g"}, {"dataset": "CIFAR10"}, {"class_names": ["b"]}])
def test_students_on_other_data_are_no_rivals(arguments, odd):
    args = arguments("evaluate")
    folder = utils.Path(args.checkpoint_dir)
    student(folder, "baseline", 0.9, **odd)
    utils.choose_best(args, student(folder, "distilled", 0.5))
    assert utils.load_file(folder / "best_model.pth")["run"] == "distilled"


@pytest.mark.parametrize("seconds, text", [(45, "45 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_read_well(seconds, text):
    assert utils.duration(seconds) == text


def test_best_epoch_is_kept_by_validation_accuracy_the_earlier_of_equals(arguments):
    args = arguments("baseline")
    info = {"format_version": utils.FORMAT_VERSION, "run": "baseline", "config": vars(args), "model_name": "m", "split_fingerprint": "f"}
    model = models.build_model("test_efficientnet", 10)
    state, progress = utils.new_state(model, 2, args), utils.new_progress()
    for epoch, accuracy in enumerate((0.5, 0.7, 0.7, 0.6), 1):
        row = dict.fromkeys(utils.HISTORY, 0.0) | {"epoch": epoch, "val_accuracy": accuracy, "val_seconds": 1.0}
        utils.finish_epoch(state, progress, row, info, args)
    kept = utils.load_file(utils.run_folder("baseline", args) / "best_model.pth")
    assert (kept["epoch"], kept["val_accuracy"]) == (2, 0.7)
    last = utils.load_file(utils.run_folder("baseline", args) / "last.pth")
    assert last["progress"]["epoch"] == 4 and last["progress"]["history"][0]["seconds"] == 1.0
