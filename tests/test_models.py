"""Losses against float64 formulas, models against timm, checkpoints against their contract.

    python -m pytest tests/test_models.py
"""
import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data_loader
import models
import train_baseline
import utils
from conftest import ROOT, save_best


def loss_of(student, teacher, labels, temperature=4, alpha=0.7, direction="forward", loss="kd",
            label_smoothing=0.0):
    """models.distillation_loss under these settings: (loss, cross-entropy, soft part)."""
    args = argparse.Namespace(temperature=temperature, alpha=alpha, kl_direction=direction,
                              distillation_loss=loss, label_smoothing=label_smoothing)
    return models.distillation_loss(student, teacher, labels, args)

# Losses -------------------------------------------------------------------------------------------



def softmax64(logits, temperature):
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_loss(student, teacher, labels, temperature, alpha, direction):
    """Hinton et al. 2015 in float64: alpha T^2 KL + (1 - alpha) CE, means over the batch."""
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    if direction == "reverse":
        p, q = q, p
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    ce = -np.log(softmax64(student, 1))[np.arange(len(labels)), labels.numpy()].mean()
    return alpha * temperature**2 * kl + (1 - alpha) * ce, ce, temperature**2 * kl


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(16, 100, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(0, 100, (16,), generator=generator)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature, alpha", [(1, 0.5), (4, 0.7), (20, 1.0)])
def test_loss_agrees_with_float64_reference(batch, temperature, alpha, direction):
    parts = loss_of(*batch, temperature, alpha, direction)
    wanted = reference_loss(*batch, temperature, alpha, direction)
    assert [part.item() for part in parts] == pytest.approx(wanted, rel=1e-5)


def test_directions_differ_and_are_the_right_way_round():
    """KL(teacher || student) is large where the student misses one of the teacher's modes."""
    teacher, student = torch.tensor([[2.0, 2.0, -9.0]]), torch.tensor([[9.0, -9.0, -9.0]])
    forward, reverse = (models.kd_loss(student, teacher, 1, way) for way in ("forward", "reverse"))
    assert forward > 5 > reverse


def test_equal_logits_have_no_kd_part(batch):
    student, _, labels = batch
    for direction in ("forward", "reverse"):
        _, _, soft = loss_of(student, student.clone(), labels, direction=direction)
        assert abs(soft.item()) < 1e-6


def test_alpha_zero_is_plain_cross_entropy(batch):
    student, teacher, labels = batch
    loss, _, _ = loss_of(student, teacher, labels, alpha=0.0)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(student, labels))


def test_loss_does_not_depend_on_batch_size(batch):
    once, _, _ = loss_of(*batch)
    twice, _, _ = loss_of(*(torch.cat([tensor, tensor]) for tensor in batch))
    assert twice.item() == pytest.approx(once.item(), rel=1e-5)


def test_no_gradient_reaches_the_teacher(batch):
    student, teacher, labels = batch
    student.requires_grad_()
    teacher.requires_grad_()
    loss_of(student, teacher, labels)[0].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_finite_for_large_half_precision_logits(batch, direction):
    student, teacher, labels = batch
    student = (student.sign() * 100).half().requires_grad_()
    loss, _, _ = loss_of(student, (teacher.sign() * 100).half(), labels, 1, 0.7, direction)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_gradient_keeps_its_scale_between_temperatures(batch):
    norms = []
    for temperature in (1, 20):
        student = (0.1 * batch[0]).requires_grad_()
        models.kd_loss(student, 0.1 * batch[1], temperature).backward()
        norms.append(student.grad.norm().item())
    assert 0.5 < norms[0] / norms[1] < 2


def reference_dist(student, teacher, labels, temperature):
    """Huang et al. 2022, equations 6 to 9, with numpy's correlation coefficient in float64."""
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (inter + intra)


def reference_lskd(student, teacher, labels, temperature):
    """Sun et al. 2024, algorithm 1, in float64: z-scores, then KL(teacher || student) at T."""
    def z(logits):
        logits = logits.double()
        return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    p, q = softmax64(z(teacher), temperature), softmax64(z(student), temperature)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize("loss, reference", [("dist", reference_dist), ("lskd", reference_lskd)])
@pytest.mark.parametrize("temperature", [1, 4])
def test_other_losses_agree_with_float64_references(batch, loss, reference, temperature):
    whole, ce, soft = loss_of(*batch, temperature, loss=loss)
    assert soft.item() == pytest.approx(reference(*batch, temperature), rel=1e-5)
    assert whole.item() == pytest.approx(0.7 * soft.item() + 0.3 * ce.item(), rel=1e-5)
    student, teacher, labels = batch
    assert abs(loss_of(teacher, teacher, labels, temperature, loss=loss)[2].item()) < 1e-4
    large = (student.sign() * 100).half().requires_grad_()
    loss_of(large, teacher.requires_grad_(), labels, temperature, loss=loss)[0].backward()
    assert torch.isfinite(large.grad).all() and teacher.grad is None


def test_reversed_lskd_swaps_the_roles(batch):
    student, teacher, labels = batch
    reverse = loss_of(student, teacher, labels, 2, 0.7, "reverse", loss="lskd")[2].item()
    assert reverse == pytest.approx(reference_lskd(teacher, student, labels, 2), rel=1e-5)
    assert abs(reverse - reference_lskd(student, teacher, labels, 2)) > 1e-3


def test_label_smoothing_and_soft_labels(batch):
    student, teacher, labels = batch
    _, hard, hard_kd = loss_of(student, teacher, labels, 4, 0.5, label_smoothing=0.1)
    smooth = torch.nn.functional.one_hot(labels, 100).float() * 0.9 + 0.1 / 100
    _, soft, soft_kd = loss_of(student, teacher, smooth, 4, 0.5)
    assert soft.item() == pytest.approx(hard.item(), rel=1e-5)
    assert torch.equal(soft_kd, hard_kd)  # labels do not touch the soft targets


def test_diagnosis_is_scipys_and_scikit_learns():
    logits, labels = torch.randn(64, 10) * 3, torch.randint(0, 10, (64,))
    wanted = scipy.stats.entropy(logits.double().softmax(1).numpy(), axis=1).mean()
    assert models.entropy(logits).item() == pytest.approx(wanted, rel=1e-5)
    right = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert models.accuracy(logits, labels).item() == pytest.approx(right)
    assert models.accuracy(logits, torch.rand(64, 10)).isnan()


# Models -------------------------------------------------------------------------------------------

def test_infer_keeps_order_and_eval_mode():
    model = models.build_model("test_efficientnet", 10).train()
    batches = [(torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(2)]
    logits, labels = models.infer(model, batches)
    assert not model.training and logits.shape == (16, 10)
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))
    torch.testing.assert_close(logits[8:], models.forward(model, batches[1][0]).detach())


@pytest.mark.parametrize("name, size, layer", [
    ("efficientnet_b0", 224, "conv_head"), ("tf_efficientnet_lite0", 224, "conv_head"),
    ("efficientnet_b0", 32, "blocks.3.0.conv_pw"), ("resnet18", 128, "layer4.1.conv2"),
    ("resnet18", 32, "layer2.1.conv2"), ("test_vit", 160, None)])
def test_gradcam_layer_is_the_last_whose_map_shows_something(name, size, layer):
    model = models.build_model(name, 10)
    assert models.gradcam_layer(model, size) == layer


def test_no_activation_clones_its_input():
    """timm's SiLU in place makes autograd do that; the gradients are the same to the bit."""
    class Clones(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    ours = models.build_model("test_efficientnet", 5)
    theirs = timm.create_model("test_efficientnet", num_classes=5)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(memory_format=torch.channels_last)
    images, counts, gradients = torch.rand(4, 3, 32, 32), [], []
    for model in (ours, theirs):
        with Clones() as clones:
            loss = model(images).square().sum()
        loss.backward()
        counts.append(clones.found)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert counts[0] == 0 < counts[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_same_seed_same_weights_new_head_included():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(models.build_model("test_efficientnet", 7).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
    assert states[0]["classifier.weight"].shape[0] == 7


def test_local_weights_are_loaded_but_for_the_head(tmp_path):
    torch.manual_seed(0)
    source = models.build_model("test_efficientnet", 1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(1)
    model = models.build_model("test_efficientnet", 5, pretrained=True,
                               weights=tmp_path / "weights.pth")
    assert torch.equal(model.conv_stem.weight, source.conv_stem.weight)
    assert model.classifier.out_features == 5


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_bad_weight_file_is_one_sentence(tmp_path, content):
    file = tmp_path / "weights.pth"
    if content is None:
        torch.save(timm.create_model("test_resnet").state_dict(), file)
    else:
        file.write_bytes(content)
    with pytest.raises(utils.UserError, match="cannot be loaded into test_efficientnet"):
        models.build_model("test_efficientnet", 5, pretrained=True, weights=file)


def test_weight_download_without_network_ends_in_seconds(tmp_path):
    """The real client against an address where nobody answers, with an empty cache."""
    code = "import models; models.build_model('efficientnet_b0', 10, pretrained=True)"
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "HF_HOME": str(tmp_path),
                                                 "HF_ENDPOINT": "http://127.0.0.1:9"})
    last = done.stderr.strip().splitlines()[-1]
    assert "--student-weights" in last and "--quick" in last and "model.safetensors" in last
    assert "Retry" not in done.stderr and time.time() - start < 40  # the import of torch included


def test_frozen_teacher_stays_in_eval_mode():
    teacher = models.freeze_teacher(models.build_model("test_efficientnet", 5), 32)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    teacher(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def seen_digits(model):
    """`model` in eval mode, its statistics those of digits, and 64 of them."""
    images = torch.from_numpy(load_digits().images[:64] / 16).float()[:, None].repeat(1, 3, 4, 4)
    with torch.no_grad():
        for _ in range(20):
            models.forward(model.train(), images)
    return model.eval(), images


@pytest.mark.parametrize("name, left", [("efficientnet_b2", 0), ("tf_efficientnet_lite0", 0),
                                        ("resnet18", 0), ("repvit_m0_9", 106)])
def test_folded_teacher_answers_as_before(name, left):
    """In float32 to 1e-4 of its logits; in bf16 no further away than autocast's own rounding. What
    only looks like a pair of layers, as in RepViT, stays."""
    torch.manual_seed(0)
    teacher, images = seen_digits(models.build_model(name, 10))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        wanted = models.forward(teacher, images)
        folded = models.freeze_teacher(copy.deepcopy(teacher), 32)
        logits = models.forward(folded, images)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == left
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        usual = models.forward(teacher, images).float()
        ours = models.forward(models.freeze_teacher(teacher, 32, torch.bfloat16), images).float()
    assert (ours - wanted).pow(2).mean() < 2 * (usual - wanted).pow(2).mean()


# CUDA graphs --------------------------------------------------------------------------------------

def pretended_capture(replays, fault=None):
    """As torch.cuda.make_graphed_callables does without a GPU's help: warm up, change forward."""
    def make(model, sample):
        for _ in range(3):
            model(*sample)
        if fault:
            raise fault
        mode, before = model.training, model.forward

        def forward(images):
            replays.append(model.training == mode)
            return before(images)
        model.forward = forward
    return make


@pytest.mark.parametrize("training", [True, False])
def test_captured_model_replays_in_its_mode_alone(arguments, monkeypatch, training):
    """In the precision of training; in the other mode it runs as before, in float32."""
    replays = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_capture(replays))
    args = arguments("baseline", "--cuda-graph", "--amp-dtype", "bf16", "--batch-size", "4")
    model, images = seen_digits(models.build_model("test_efficientnet", 10))
    before = copy.deepcopy(model.train(training).state_dict())
    models.capture_cuda_graph(model, 32, args)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert models.forward(model, images).dtype == torch.bfloat16
    assert models.forward(model.train(not training), images).dtype == torch.float32
    assert replays == [True, False]
    replays.clear()  # a second capture, of another seed's run, is not made of the first
    models.capture_cuda_graph(model.train(training), 32, args)
    models.forward(model, images)
    assert replays == [True]


@pytest.mark.parametrize("fault", [RuntimeError("operation not permitted\nmore"),
                                   AssertionError("Torch not compiled with CUDA enabled")])
def test_failed_capture_is_one_sentence(arguments, monkeypatch, fault):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_capture([], fault))
    model = models.build_model("test_efficientnet", 10)
    with pytest.raises(utils.UserError) as error:
        models.capture_cuda_graph(model.train(), 32, arguments("baseline", "--cuda-graph"))
    assert str(error.value) == f"--cuda-graph failed: {str(fault).splitlines()[0]}"


@pytest.mark.parametrize("classes, least", [(10, 0.3), (100, 0.04), (2, 0.75), (3, 2 / 3),
                                            (102, 2 / 102 + 0.02)])
def test_least_accuracy_of_a_teacher(classes, least):
    assert models.min_teacher_accuracy(classes) == pytest.approx(least)


# Checkpoints --------------------------------------------------------------------------------------

def test_checkpoint_is_plain_safe_and_usable_without_the_project(arguments):
    args = arguments("baseline", "--num-epochs", "1", "--seed", "3")
    data = data_loader.open_dataset(args)
    model = models.build_model("test_efficientnet", 10)
    info = models.build_info("baseline", model, "test_efficientnet", data, args)
    path = train_baseline.train(model, info, data, args)

    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {
        "format_version", "run", "model_name", "num_classes", "class_names", "image_size",
        "crop_pct", "interpolation", "mean", "std", "gradcam_layer", "state_dict", "epoch",
        "val_accuracy", "dataset", "split_fingerprint", "config", "versions"}
    plain = (str, int, float, bool, list, dict, type(None))
    assert all(type(value) in plain for name, value in checkpoint.items() if name != "state_dict")
    words = checkpoint["config"].pop("argv")
    assert words[-4:] == ["--num-epochs", "1", "--seed", "3"] and type(words) is list
    assert all(type(value) in plain[:4] + plain[-1:] for value in
               [*words, *checkpoint["config"].values(), *checkpoint["versions"].values()])
    for tensor in checkpoint["state_dict"].values():
        assert tensor.device.type == "cpu" and tensor.is_contiguous()
        assert tensor.dtype in (torch.float32, torch.int64)
    name, classes = checkpoint["model_name"], checkpoint["num_classes"]
    other = timm.create_model(name, num_classes=classes)
    other.load_state_dict(checkpoint["state_dict"])  # torch fills in BatchNorm's counts by itself
    other.eval()

    loaded, info = models.load_model(path)
    assert not loaded.training and "state_dict" not in info
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(other((images - mean) / std), models.forward(loaded, images),
                               rtol=1e-4, atol=1e-5)


def spoil(kind, good, folder):
    """Put a file of the given `kind`, made of the good one, into `folder`; returns its path."""
    file = folder / "best_model.pth"
    checkpoint = torch.load(good, weights_only=True)
    changes = {"whole model": {"model": torch.nn.Linear(2, 2)},  # a class: only code brings it back
               "other model": {"model_name": "test_resnet"},
               "other class count": {"num_classes": 7},
               "older format": {"format_version": 0},
               "unknown model": {"model_name": "resnet_99"}, "number": {"model_name": 5},
               "from a hub": {"model_name": "hf-hub:someone/something"},
               "from a folder": {"model_name": "local-dir:/somewhere"},
               "size in words": {"image_size": "big"}, "no settings": {"config": {}}}
    if kind == "folder":
        file.mkdir()
    elif kind == "picture":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    elif kind == "bare weights":
        torch.save(checkpoint["state_dict"], file)
    elif kind == "last.pth":
        file.write_bytes(good.with_name("last.pth").read_bytes())
    elif kind == "flipped bit":
        content = bytearray(good.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "packed":  # 100 MB of zeros in 100 kB
        checkpoint["state_dict"]["zeros"] = torch.zeros(25_000_000)
        utils.save_checkpoint(checkpoint, folder / "large.pth")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed, \
                zipfile.ZipFile(folder / "large.pth") as large:
            for name in large.namelist():
                packed.writestr(name, large.read(name))
    elif kind == "not finite":
        checkpoint["state_dict"]["classifier.bias"][0] = float("nan")
        utils.save_checkpoint(checkpoint, file)
    elif kind == "keys missing":
        utils.save_checkpoint({"state_dict": checkpoint["state_dict"]}, file)
    else:
        torch.save({**checkpoint, **changes[kind]}, file)
    return file


@pytest.mark.parametrize("kind, words", [
    ("folder", "there is no file"), ("picture", "is damaged"), ("whole model", "carries code"),
    ("other model", "does not fit test_resnet"), ("other class count", "does not fit"),
    ("older format", "format 3"), ("bare weights", "no checkpoint of this project"),
    ("last.pth", "holds no model"), ("unknown model", "resnet_99"), ("keys missing", "model_name"),
    ("number", "model_name"), ("from a hub", "hf-hub:someone"), ("from a folder", "local-dir:"),
    ("size in words", "image_size"), ("flipped bit", "is damaged"),
    ("packed", "was refused: unpacked"), ("not finite", "no finite numbers"),
    ("no settings", "see its accumulate_steps, argv")])
def test_hostile_and_damaged_models_are_one_sentence(tmp_path, kind, words):
    good = tmp_path / "good" / "best_model.pth"
    info = {"model_name": "test_efficientnet", "num_classes": 5, "class_names": list("abcde"),
            "image_size": 32, "config": dict.fromkeys(models.CONFIG), "dataset": "Digits",
            "split_fingerprint": "f", "interpolation": "bicubic", "mean": [0.5] * 3,
            "std": [0.5] * 3, "versions": {}}
    model = models.build_model("test_efficientnet", 5)
    save_best(good, model, info)
    utils.save_checkpoint({"history": [], "states": {}}, good.with_name("last.pth"))
    assert models.load_model(good)[1]["epoch"] == 1
    with pytest.raises(utils.UserError, match=words) as error:
        models.load_model(spoil(kind, good, tmp_path))
    assert "\n" not in str(error.value) and "best_model.pth" in str(error.value)


# The best student ---------------------------------------------------------------------------------

def student(folder, run, accuracy, model=None, **more):
    args = config.parse_args("baseline", "", ["--quick", "--image-size", "48"])
    data = data_loader.Dataset("Digits", list("0123456789"), pixels(), pixels(), "f", "crop")
    model = model or models.build_model("test_efficientnet", 10)
    info = models.build_info(run, model, "test_efficientnet", data, args) | more
    save_best(folder / run / "best_model.pth", model, info, accuracy)
    return info


def pixels():
    return data_loader.Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, torch.zeros(1), [])


@pytest.mark.parametrize("baseline, distilled, chosen", [
    (0.5, 0.6, "distilled"), (0.6, 0.5, "baseline"), (0.5, 0.5, "baseline")])
def test_best_student_is_chosen_on_validation_and_a_tie_goes_to_the_baseline(
        tmp_path, capsys, baseline, distilled, chosen):
    like = student(tmp_path, "baseline", baseline)
    student(tmp_path, "distilled", distilled)
    student(tmp_path, "teacher", 0.99)
    models.export_best_student(tmp_path, like)
    assert utils.load_checkpoint(tmp_path / "best_model.pth")["run"] == chosen
    assert f"best student so far: {chosen}" in capsys.readouterr().out


@pytest.mark.parametrize("odd", [{"split_fingerprint": "g"}, {"dataset": "CIFAR10"},
                                 {"class_names": list("abcdefghij")}])
def test_students_on_other_data_are_no_rivals(tmp_path, odd):
    student(tmp_path, "baseline", 0.9, **odd)
    models.export_best_student(tmp_path, student(tmp_path, "distilled", 0.5))
    assert utils.load_checkpoint(tmp_path / "best_model.pth")["run"] == "distilled"


@pytest.mark.parametrize("crop_pct, interpolation", [(1.0, "bicubic"), (0.875, "bilinear")])
def test_best_student_in_timms_own_layout(tmp_path, crop_pct, interpolation):
    """Folder and file give timm the same model, and its transform is the project's."""
    torch.manual_seed(0)
    model = models.build_model("test_efficientnet", 10)
    like = student(tmp_path, "baseline", 0.5)
    models.export_best_student(tmp_path, like)  # what lies there is replaced
    more = {"crop_pct": crop_pct, "interpolation": interpolation, "mean": [0.1, 0.2, 0.3]}
    student(tmp_path, "distilled", 0.6, model, **more)
    models.export_best_student(tmp_path, like)
    folder, file = tmp_path / "best_model", tmp_path / "best_model.pth"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "baseline", "best_model", "best_model.pth", "distilled"]
    written = json.loads((folder / "config.json").read_text())
    assert written["label_names"] == list("0123456789")
    assert written["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_file = timm.create_model("test_efficientnet", num_classes=10, checkpoint_path=file).eval()
    ours, info = models.load_model(file)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    for image in (*map(Image.fromarray, noise), Image.fromarray(noise[0, :8, :8])):
        images = transform(image)[None]
        assert torch.equal(images[0], data_loader.build_transform(info)(image))
        with torch.inference_mode():
            assert torch.equal(loaded(images), by_file(images))
            torch.testing.assert_close(loaded(images), ours(images), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-5, atol=1e-6)
