"""Losses against float64 formulas and timm's own, models against timm, checkpoints as models.

    python -m pytest tests/test_models.py                  # all
    python -m pytest tests/test_models.py -m "not slow"    # seconds
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
import safetensors.torch
import scipy.stats
import sklearn.metrics
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data_loader
import models
import train_baseline
import utils
from conftest import ROOT, save_best

# Losses -------------------------------------------------------------------------------------------

def loss_args(loss="kd", temperature=4, direction="forward"):
    return argparse.Namespace(distillation_loss=loss, temperature=temperature,
                              kl_direction=direction)


def softmax64(logits, temperature):
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_ce(student, labels):
    """Cross-entropy in float64."""
    return -np.log(softmax64(student, 1))[np.arange(len(labels)), labels.numpy()].mean()


def reference_kd(student, teacher, temperature, direction="forward"):
    """Hinton et al. 2015 in float64: T^2 KL, the mean over the batch."""
    p = softmax64(teacher, temperature)
    q = softmax64(student, temperature)
    if direction == "reverse":
        p, q = q, p
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()


def reference_dist(student, teacher, temperature):
    """Huang et al. 2022, equations 6 to 9, with numpy's correlation coefficient in float64."""
    q = softmax64(student, temperature)
    p = softmax64(teacher, temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (inter + intra)


def reference_lskd(student, teacher, temperature):
    """Sun et al. 2024, algorithm 1, in float64: z-scores, then KL(teacher || student) at T."""
    def z_score(logits):
        logits = logits.double()
        return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    return reference_kd(z_score(student), z_score(teacher), temperature)


REFERENCES = {"kd": reference_kd, "dist": reference_dist, "lskd": reference_lskd}


@pytest.fixture
def batch():
    """Logits of student and teacher (16, 100), and labels."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(16, 100, generator=generator)
    teacher = 3 * torch.randn(16, 100, generator=generator)
    labels = torch.randint(0, 100, (16,), generator=generator)
    return student, teacher, labels


@pytest.mark.parametrize("loss", REFERENCES)
@pytest.mark.parametrize("temperature", [1, 4, 20])
def test_distillation_losses_agree_with_float64_references(batch, loss, temperature):
    student, teacher, _ = batch
    ours = models.distill_loss(student, teacher, loss_args(loss, temperature)).item()
    assert ours == pytest.approx(REFERENCES[loss](student, teacher, temperature), rel=1e-5)


@pytest.mark.parametrize("loss", ["kd", "lskd"])
def test_reverse_swaps_student_and_teacher(batch, loss):
    student, teacher, _ = batch
    reverse = models.distill_loss(student, teacher, loss_args(loss, 2, "reverse")).item()
    assert reverse == pytest.approx(REFERENCES[loss](teacher, student, 2), rel=1e-5)
    assert abs(reverse - REFERENCES[loss](student, teacher, 2)) > 1e-3


def test_directions_are_the_right_way_round():
    """KL(teacher || student) is large where the student misses one of the teacher's modes."""
    teacher = torch.tensor([[2.0, 2.0, -9.0]])
    student = torch.tensor([[9.0, -9.0, -9.0]])
    forward = models.kd_loss(student, teacher, 1, "forward")
    reverse = models.kd_loss(student, teacher, 1, "reverse")
    assert forward > 5 > reverse


class FixedLogits(torch.nn.Module):
    """A model that answers with its parameter."""
    num_classes = 100
    in_chans = 3
    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.1, 0.7, 1.0])
def test_kd_loss_and_its_gradient_are_those_of_timms_distillation(batch, temperature, alpha):
    distillation = pytest.importorskip("timm.task.distillation")
    student, teacher, labels = batch
    timms_student = FixedLogits(student)
    task = distillation.LogitDistillationTask(
        timms_student, FixedLogits(teacher), torch.nn.CrossEntropyLoss(),
        distill_loss_weight=alpha, task_loss_weight=1 - alpha, temperature=temperature,
        device=torch.device("cpu"), verbose=False)
    timms = task(torch.zeros(16, 3, 8, 8), labels)
    timms["loss"].backward()

    student.requires_grad_()
    kd_loss = models.kd_loss(student, teacher, temperature)
    loss = alpha * kd_loss + (1 - alpha) * models.cross_entropy(student, labels)
    loss.backward()
    torch.testing.assert_close(kd_loss, timms["kd_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, timms["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, timms_student.logits.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss, direction", [
    ("kd", "forward"), ("kd", "reverse"), ("lskd", "forward"), ("dist", "forward")])
def test_equal_logits_have_no_distillation_loss(batch, loss, direction):
    student, _, _ = batch
    ours = models.distill_loss(student, student.clone(), loss_args(loss, 4, direction))
    assert abs(ours.item()) < 1e-4


def test_cross_entropy_agrees_with_a_float64_reference(batch):
    student, _, labels = batch
    assert models.cross_entropy(student, labels).item() == pytest.approx(
        reference_ce(student, labels), rel=1e-5)


@pytest.mark.parametrize("loss", ["kd", "lskd"])
def test_loss_does_not_depend_on_the_batch_size(batch, loss):
    student, teacher, labels = batch
    once = models.distill_loss(student, teacher, loss_args(loss))
    twice = models.distill_loss(torch.cat([student, student]), torch.cat([teacher, teacher]),
                                loss_args(loss))
    assert twice.item() == pytest.approx(once.item(), rel=1e-5)


@pytest.mark.parametrize("loss", REFERENCES)
def test_gradients_reach_the_student_alone(batch, loss):
    student, teacher, _ = batch
    student.requires_grad_()
    teacher.requires_grad_()
    models.distill_loss(student, teacher, loss_args(loss)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss, direction", [
    ("kd", "forward"), ("kd", "reverse"), ("lskd", "forward"), ("dist", "forward")])
def test_finite_for_large_half_precision_logits(batch, loss, direction):
    student, teacher, _ = batch
    student = (student.sign() * 100).half().requires_grad_()
    teacher = (teacher.sign() * 100).half()
    ours = models.distill_loss(student, teacher, loss_args(loss, 1, direction))
    ours.backward()
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours)
    assert torch.isfinite(student.grad).all()


def test_gradient_keeps_its_scale_between_temperatures(batch):
    norms = []
    for temperature in (1, 20):
        student = (0.1 * batch[0]).requires_grad_()
        models.kd_loss(student, 0.1 * batch[1], temperature).backward()
        norms.append(student.grad.norm().item())
    assert 0.5 < norms[0] / norms[1] < 2


def test_label_smoothing_is_that_of_smoothed_labels(batch):
    student, _, labels = batch
    smoothed = torch.nn.functional.one_hot(labels, 100).float() * 0.9 + 0.1 / 100
    by_flag = models.cross_entropy(student, labels, label_smoothing=0.1)
    by_labels = models.cross_entropy(student, smoothed)
    assert by_flag.item() == pytest.approx(by_labels.item(), rel=1e-5)


def test_entropy_and_accuracy_are_scipys_and_scikit_learns():
    logits = torch.randn(64, 10) * 3
    labels = torch.randint(0, 10, (64,))
    entropy = scipy.stats.entropy(logits.double().softmax(1).numpy(), axis=1).mean()
    assert models.entropy(logits).item() == pytest.approx(entropy, rel=1e-5)
    accuracy = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert models.accuracy(logits, labels).item() == pytest.approx(accuracy)
    assert models.accuracy(logits, torch.rand(64, 10)).isnan()


# Building -----------------------------------------------------------------------------------------

def test_same_seed_same_weights_new_head_included():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(models.build_model("test_efficientnet", 7).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
    assert states[0]["classifier.weight"].shape[0] == 7


def test_state_dict_has_timms_own_names():
    ours = models.build_model("test_efficientnet", 7).state_dict()
    timms = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    assert list(ours) == list(timms)


def test_no_activation_clones_its_input():
    """timm's SiLU in place makes autograd do that; the gradients are the same to the bit."""
    class CloneCounter(TorchDispatchMode):
        clones = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.clones += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    ours = models.build_model("test_efficientnet", 5)
    timms = timm.create_model("test_efficientnet", num_classes=5)
    timms.load_state_dict(ours.state_dict())
    timms = timms.to(memory_format=torch.channels_last)

    images = torch.rand(4, 3, 32, 32)
    clones = []
    gradients = []
    for model in (ours, timms):
        with CloneCounter() as counter:
            loss = model(images).square().sum()
        loss.backward()
        clones.append(counter.clones)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert clones[0] == 0 < clones[1]
    for ours_grad, timms_grad in zip(*gradients, strict=True):
        assert torch.equal(ours_grad, timms_grad)


# Weight files -------------------------------------------------------------------------------------

@pytest.fixture
def source():
    """A model of 1000 classes whose weights are in a file."""
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet")


def from_file(file, num_classes=5, name="test_efficientnet"):
    torch.manual_seed(1)
    return models.build_model(name, num_classes, pretrained=True, weights=file)


def with_prefix(prefix, state_dict):
    return {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}


WEIGHT_FILES = {  # what people save, made of a state_dict
    "bare": lambda state_dict: state_dict,
    "timm's train.py": lambda state_dict: {
        "state_dict": dict.fromkeys(state_dict, torch.zeros(1)), "state_dict_ema": state_dict,
        "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}, "epoch": 3},
    "model": lambda state_dict: {"model": state_dict, "epoch": 3},
    "net": lambda state_dict: {"net": state_dict, "acc": 0.9},
    "model_state_dict": lambda state_dict: {"model_state_dict": state_dict},
    "DataParallel": lambda state_dict: with_prefix("module.", state_dict),
    "torch.compile": lambda state_dict: with_prefix("_orig_mod.", state_dict),
    "both": lambda state_dict: with_prefix("module._orig_mod.", state_dict),
    "Lightning": lambda state_dict: {
        "state_dict": {**with_prefix("model.", state_dict), "criterion.weight": torch.ones(5)}},
    "no counters": lambda state_dict: {
        name: tensor for name, tensor in state_dict.items() if "num_batches" not in name},
    "no head": lambda state_dict: {
        name: tensor for name, tensor in state_dict.items() if "classifier" not in name},
    "half precision": lambda state_dict: {
        name: tensor.half() for name, tensor in state_dict.items()},
}


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_weight_files_as_people_have_them_are_loaded_but_for_the_head(tmp_path, source, kind):
    file = tmp_path / "weights.pth"
    torch.save(WEIGHT_FILES[kind](source.state_dict()), file)
    model = from_file(file)

    torch.manual_seed(1)
    fresh = models.build_model("test_efficientnet", 5)
    assert torch.equal(model.classifier.weight, fresh.classifier.weight)
    for name, tensor in source.state_dict().items():
        if "classifier" in name:
            continue
        if kind == "half precision":
            tensor = tensor.half().to(tensor.dtype)
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_safetensors_are_known_by_their_content(tmp_path, source, name):
    safetensors.torch.save_file(source.state_dict(), tmp_path / name)
    model = from_file(tmp_path / name)
    assert torch.equal(model.conv_stem.weight, source.conv_stem.weight)


def test_torchs_files_are_known_by_their_content(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "weights.safetensors")
    model = from_file(tmp_path / "weights.safetensors")
    assert torch.equal(model.conv_stem.weight, source.conv_stem.weight)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weight_file_that_is_not_finite_is_refused(tmp_path, source, number):
    state_dict = source.state_dict()
    state_dict["conv_stem.weight"][0] = number
    torch.save(state_dict, tmp_path / "weights.pth")
    with pytest.raises(utils.UserError, match="NaN or infinite") as error:
        from_file(tmp_path / "weights.pth")
    assert "weights.pth" in str(error.value)


def test_head_is_kept_where_it_has_the_same_classes(tmp_path, source, capsys):
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    kept = from_file(tmp_path / "weights.pth", num_classes=1000)
    assert torch.equal(kept.classifier.weight, source.classifier.weight)
    line = capsys.readouterr().out
    assert f"{len(source.state_dict())} tensors" in line
    assert "including the head" in line

    from_file(tmp_path / "weights.pth")
    line = capsys.readouterr().out
    assert f"{len(source.state_dict()) - 2} tensors" in line
    assert "head is new" in line
    from_file(tmp_path / "weights.pth")  # another seed: the line is printed once
    assert not capsys.readouterr().out


def test_an_empty_ema_is_passed_over(tmp_path, source):
    torch.save({"state_dict_ema": {}, "state_dict": source.state_dict()},
               tmp_path / "weights.pth")
    from_file(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", [
    "test_resnet", "test_vit", "test_convnext", "test_nfnet",
    pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_timms_own_state_dict_fits_every_family(tmp_path, name):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    from_file(tmp_path / "weights.pth", name=name)


MISFITS = {  # state_dicts that are not test_efficientnet's, and a word of the message
    "empty": (lambda state_dict: {}, "no tensors"),
    "unknown key": (lambda state_dict: {"weights": state_dict, "epoch": 3}, "but: weights, epoch"),
    "ten of all tensors": (lambda state_dict: dict(list(state_dict.items())[:10]), "missing"),
    "no statistics of BatchNorm": (
        lambda state_dict: {name: tensor for name, tensor in state_dict.items()
                            if "running_" not in name}, "running_mean is missing"),
    "torchvision's": (lambda state_dict: torchvision.models.efficientnet_b0().state_dict(),
                      "features.0.0.weight"),
    "other model": (lambda state_dict: timm.create_model("test_resnet").state_dict(), "conv_stem"),
    "unknown prefix": (lambda state_dict: with_prefix("backbone.", state_dict), "backbone."),
    "another layer's shape": (
        lambda state_dict: {**state_dict, "conv_stem.weight": torch.ones(3, 3, 3, 3)}, "(3, 3"),
    "one more block": (
        lambda state_dict: {**state_dict, "blocks.0.9.conv.weight": torch.ones(1)}, "blocks.0.9"),
    "no dict": (lambda state_dict: [1, 2], "list"),
    "numbers for names": (lambda state_dict: {0: torch.ones(2)}, "names"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weight_file_that_does_not_fit_is_refused(tmp_path, source, kind):
    change, word = MISFITS[kind]
    file = tmp_path / "weights.pth"
    torch.save(change(source.state_dict()), file)
    with pytest.raises(utils.UserError) as error:
        from_file(file)
    assert str(file) in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no weights", b"12345678{ no safetensors"])
def test_damaged_weight_file_is_one_sentence(tmp_path, content):
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(utils.UserError, match="damaged"):
        from_file(file)


def test_weight_file_with_code_is_refused_with_a_way_out(tmp_path, source):
    torch.save(source, tmp_path / "weights.pth")  # the whole model: only code brings it back
    with pytest.raises(utils.UserError, match="state_dict") as error:
        from_file(tmp_path / "weights.pth")
    assert "safetensors" in str(error.value)


@pytest.mark.slow
def test_weight_download_without_network_ends_in_seconds(tmp_path):
    """The real client against an address where nobody answers, with an empty cache."""
    code = "import models; models.build_model('efficientnet_b0', 10, pretrained=True)"
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "HF_HOME": str(tmp_path),
                                                 "HF_ENDPOINT": "http://127.0.0.1:9"})
    last = done.stderr.strip().splitlines()[-1]
    for remedy in ("--student-weights", "--quick", "model.safetensors"):
        assert remedy in last
    assert "Retry" not in done.stderr
    assert time.time() - start < 40  # the import of torch included


# Forward and inference ----------------------------------------------------------------------------

def test_forward_normalises_as_the_model_was_pretrained():
    model = models.build_model("test_efficientnet", 10).eval()
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(3, 1, 1)
    torch.testing.assert_close(models.forward(model, images), model((images - mean) / std),
                               rtol=1e-4, atol=1e-5)


def test_infer_keeps_the_order_and_evaluates():
    model = models.build_model("test_efficientnet", 10).train()
    batches = [(torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(2)]
    logits, labels = models.infer(model, batches)
    assert not model.training
    assert logits.shape == (16, 10)
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))
    torch.testing.assert_close(logits[8:], models.forward(model, batches[1][0]).detach())


@pytest.mark.slow
@pytest.mark.parametrize("name, size, layer", [
    ("efficientnet_b0", 224, "conv_head"), ("tf_efficientnet_lite0", 224, "conv_head"),
    ("efficientnet_b0", 32, "blocks.3.0.conv_pw"), ("resnet18", 128, "layer4.1.conv2"),
    ("resnet18", 32, "layer2.1.conv2"), ("test_vit", 160, None),
    ("resnet10t", 128, "layer4.0.conv2"),  # the shortcut runs last
    ("convnext_atto", 128, "stages.3.blocks.1.mlp.fc2"),  # convolutions between stages are none
    ("crossvit_9_240", 240, None),  # features of two branches
    pytest.param("caformer_s18", 128, "stages.3.downsample.conv", marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", 224, None, marks=pytest.mark.slow)])
def test_gradcam_layer_is_the_last_whose_map_shows_something(name, size, layer):
    model = models.build_model(name, 10)
    state = copy.deepcopy(model.state_dict())
    assert models.gradcam_layer(model, size) == layer
    assert model.training
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_features_with_channels_last_have_no_gradcam_layer(monkeypatch):
    """As Swin's, quicker."""
    model = models.build_model("test_efficientnet", 10)
    convolutional = model.forward_features
    monkeypatch.setattr(model, "forward_features",
                        lambda images: convolutional(images).permute(0, 2, 3, 1))
    assert models.gradcam_layer(model, 160) is None


def test_image_size_that_the_model_cannot_take_is_one_sentence():
    with pytest.raises(utils.UserError, match="100 px"):
        models.gradcam_layer(models.build_model("test_vit", 10), 100)


# The teacher --------------------------------------------------------------------------------------

@pytest.mark.parametrize("chance, accuracy", [
    (0.1, 0.28), (0.01, 0.03), (0.5, 0.6), (0.9, 0.92), (0.001, 0.003)])
def test_close_to_chance(chance, accuracy):
    assert models.min_useful_accuracy(chance) == pytest.approx(accuracy)


def test_frozen_teacher_stays_in_eval_mode():
    teacher = models.freeze_teacher(models.build_model("test_efficientnet", 5), 32)
    state = copy.deepcopy(teacher.state_dict())
    teacher.train()
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    teacher(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_teacher_whose_weights_overflow_in_fp16_is_refused():
    teacher = models.build_model("test_efficientnet", 5)
    teacher.conv_stem.weight.data[0] = 1e6
    with pytest.raises(utils.UserError, match="fp16"):
        models.freeze_teacher(teacher, 32, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_teacher_that_is_not_finite_does_not_blame_fp16(dtype):
    teacher = models.build_model("test_efficientnet", 5)
    teacher.conv_stem.weight.data[0] = float("nan")
    with pytest.raises(utils.UserError, match="NaN or infinite") as error:
        models.freeze_teacher(teacher, 32, dtype)
    assert "fp16" not in str(error.value)


def with_digits_statistics(model):
    """`model` in eval mode, its BatchNorms' statistics those of digits, and 64 of them."""
    digits = torch.from_numpy(load_digits().images[:64] / 16).float()
    images = digits[:, None].repeat(1, 3, 4, 4)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            models.forward(model, images)
    return model.eval(), images


@pytest.mark.parametrize("name, remaining", [
    ("test_efficientnet", 0),
    pytest.param("efficientnet_b2", 0, marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_lite0", 0, marks=pytest.mark.slow),
    pytest.param("resnet18", 0, marks=pytest.mark.slow),
    pytest.param("repvit_m0_9", 106, marks=pytest.mark.slow)])
def test_folded_teacher_answers_as_before(name, remaining):
    """In float32 to 1e-4 of its logits; in bf16 no further away than autocast's own rounding. What
    only looks like a pair of layers, as in RepViT, stays: so many BatchNorms are `remaining`."""
    torch.manual_seed(0)
    teacher, images = with_digits_statistics(models.build_model(name, 10))
    with torch.no_grad():
        logits = models.forward(teacher, images)
        folded = models.freeze_teacher(copy.deepcopy(teacher), 32)
        folded_logits = models.forward(folded, images)
    assert (folded_logits - logits).abs().max() < 1e-4 * logits.abs().max()
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == remaining

    frozen = models.freeze_teacher(copy.deepcopy(teacher), 32, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        usual_logits = models.forward(teacher, images).float()
        frozen_logits = models.forward(frozen, images).float()
    usual_error = (usual_logits - logits).pow(2).mean()
    assert (frozen_logits - logits).pow(2).mean() < 2 * usual_error


def info_of_teacher():
    return {"dataset": "Digits", "class_names": list("ab"), "split_fingerprint": "f",
            "image_size": 32, "model_name": "test_resnet"}


@pytest.mark.parametrize("changed, words", [
    ({}, []), ({"dataset": "CIFAR10"}, ["dataset", "CIFAR10"]),
    ({"class_names": list("ba")}, ["class_names"]),
    ({"split_fingerprint": "g"}, ["split_fingerprint", "validation images"]),
    ({"image_size": 48}, ["image_size", "48"]), ({"model_name": "test_vit"}, ["test_vit"])])
def test_teacher_mismatch_names_what_differs(changed, words):
    args = argparse.Namespace(teacher_image_size=32, image_size=32, teacher_checkpoint=None,
                              teacher_model="test_resnet")
    data = data_loader.Dataset("Digits", list("ab"), pixels(), pixels(), "f", "crop")
    mismatch = models.teacher_mismatch({**info_of_teacher(), **changed}, args, data)
    assert bool(mismatch) == bool(words)
    assert all(word in mismatch for word in words)


def save_teacher(kind, path, num_classes=5):
    """A test_efficientnet as a person may have it; returns its path and the model."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    if kind == "weight file":
        path = path / "teacher.pth"
        torch.save({"state_dict": with_prefix("module.", model.state_dict())}, path)
    elif kind == "safetensors":
        path = path / "teacher.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
    elif kind == "timm folder":
        path = path / "teacher"
        model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.3, 0.3),
                                 "crop_pct": 0.6, "interpolation": "bilinear"}
        timm.models.save_for_hf(model, path, safe_serialization=True)
    return path, model.eval()


@pytest.mark.parametrize("kind", ["weight file", "safetensors", "timm folder"])
def test_teacher_made_elsewhere_is_loaded_with_its_head_and_its_normalisation(tmp_path, kind):
    path, source = save_teacher(kind, tmp_path)
    model, info = models.load_teacher_model(path, "test_efficientnet", 5)
    assert info is None
    assert not model.training
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(source.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(source.pretrained_cfg["std"]).view(3, 1, 1)
    torch.testing.assert_close(models.forward(model, images), source((images - mean) / std),
                               rtol=1e-4, atol=1e-5)
    assert models.weight_file(path).is_file()


def test_teacher_of_this_project_comes_with_its_info(tmp_path):
    info = save_student(tmp_path, "teacher", 0.9)
    _, loaded = models.load_teacher_model(tmp_path / "teacher" / "best_model.pth", "test_vit", 10)
    assert loaded["model_name"] == info["model_name"] == "test_efficientnet"
    assert loaded["val_accuracy"] == 0.9


@pytest.mark.parametrize("kind", ["weight file", "safetensors", "timm folder"])
def test_recorded_teacher_is_loaded_again(tmp_path, kind):
    """As a student's checkpoint describes it, whatever --teacher-model is by then."""
    path, _ = save_teacher(kind, tmp_path)
    teacher, _ = models.load_teacher_model(path, "test_efficientnet", 5)
    recorded = {"val_accuracy": 0.8, "info": {
        "model_name": "test_efficientnet", "num_classes": 5,
        "mean": list(teacher.pretrained_cfg["mean"]), "std": list(teacher.pretrained_cfg["std"])}}
    again, info = models.load_recorded_teacher(path, recorded)
    assert info["val_accuracy"] == 0.8
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(models.forward(again, images), models.forward(teacher, images))

    save_student(tmp_path, "teacher", 0.9)
    ours = tmp_path / "teacher" / "best_model.pth"
    assert models.load_recorded_teacher(ours, {"val_accuracy": 0.9})[1]["val_accuracy"] == 0.9


@pytest.mark.parametrize("kind", ["checkpoint", "weight file", "timm folder"])
def test_normalisation_is_the_recorded_one_whatever_timm_says_today(tmp_path, kind):
    mean = [0.11, 0.22, 0.33]
    std = [0.44, 0.55, 0.66]
    if kind == "checkpoint":
        save_student(tmp_path, "teacher", 0.9, mean=mean, std=std)
        model, _ = models.load_model(tmp_path / "teacher" / "best_model.pth")
    else:
        path, _ = save_teacher(kind, tmp_path)
        recorded = {"val_accuracy": 0.8, "info": {"model_name": "test_efficientnet",
                                                  "num_classes": 5, "mean": mean, "std": std}}
        model, _ = models.load_recorded_teacher(path, recorded)
    torch.testing.assert_close(model.pixel_scale.flatten(), 1 / torch.tensor(std))
    torch.testing.assert_close(model.pixel_shift.flatten(), -torch.tensor(mean) / torch.tensor(std))


def test_preprocessing_of_a_timm_folder_is_recorded(tmp_path):
    path, _ = save_teacher("timm folder", tmp_path, num_classes=10)
    teacher, _ = models.load_teacher_model(path, "test_efficientnet", 10)
    args = config.parse_args("baseline", "", ["--quick"])
    photographs = data_loader.Images(None, [], torch.zeros(1))
    data = data_loader.Dataset("ImageFolder", list("0123456789"), photographs, photographs, "f",
                               "resized_crop")
    info = models.build_info("teacher", teacher, "test_efficientnet", data, args)
    assert info["crop_pct"] == 0.6
    assert info["interpolation"] == "bilinear"
    assert info["mean"] == [0.1, 0.2, 0.3]


def test_exported_best_student_can_teach(tmp_path):
    model = models.build_model("test_efficientnet", 10)
    models.export_best_student(tmp_path, save_student(tmp_path, "baseline", 0.9, model))
    teacher, _ = models.load_teacher_model(tmp_path / "best_model", "test_efficientnet", 10)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(models.forward(teacher, images), models.forward(model.eval(), images))


@pytest.mark.parametrize("kind", ["weight file", "safetensors", "timm folder"])
def test_teacher_of_another_number_of_classes_is_refused(tmp_path, kind):
    path, _ = save_teacher(kind, tmp_path, num_classes=7)
    with pytest.raises(utils.UserError, match="5 classes"):
        models.load_teacher_model(path, "test_efficientnet", 5)


def test_timm_folder_of_another_model_names_it(tmp_path):
    path, _ = save_teacher("timm folder", tmp_path)
    with pytest.raises(utils.UserError, match="test_efficientnet; .*--teacher-model"):
        models.load_teacher_model(path, "test_resnet", 5)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_folder_that_is_not_timms_is_refused(tmp_path, content):
    path, _ = save_teacher("timm folder", tmp_path)
    if content is None:
        (path / "model.safetensors").unlink()
    else:
        (path / "config.json").write_text(content)
    with pytest.raises(utils.UserError, match=r"config\.json"):
        models.load_teacher_model(path, "test_efficientnet", 5)


# CUDA graphs --------------------------------------------------------------------------------------

def pretended_capture(replays, fault=None):
    """As torch.cuda.make_graphed_callables does, without a GPU: warm up, change forward."""
    def make_graphed(model, sample):
        for _ in range(3):
            model(*sample)
        if fault:
            raise fault
        captured_mode = model.training
        eager_forward = model.forward

        def forward(images):
            replays.append(model.training == captured_mode)
            return eager_forward(images)
        model.forward = forward
    return make_graphed


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_captured_model_replays_in_its_mode_alone(arguments, monkeypatch, training):
    """In the precision of training; in the other mode it runs as before, in float32."""
    replays = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_capture(replays))
    args = arguments("baseline", "--cuda-graph", "--amp-dtype", "bf16", "--batch-size", "4")
    model = models.build_model("test_efficientnet", 10)
    images = torch.rand(4, 3, 32, 32)
    state = copy.deepcopy(model.train(training).state_dict())

    models.capture_cuda_graph(model, 32, args)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert models.forward(model, images).dtype == torch.bfloat16
    assert models.forward(model.train(not training), images).dtype == torch.float32
    assert replays == [True, False]

    # The EMA model is a copy that runs itself, not the captured model.
    ema = train_baseline.EMA(model.train(training), 0.5)
    for parameter in ema.module.parameters():
        parameter.data.zero_()
    assert not models.forward(ema.module.eval(), images).any()

    # A second capture, of another seed's run, is not made of the first.
    replays.clear()
    models.capture_cuda_graph(model.train(training), 32, args)
    models.forward(model, images)
    assert replays == [True]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RuntimeError("operation not permitted\nmore"),
                                   AssertionError("Torch not compiled with CUDA enabled")])
def test_failed_capture_is_one_sentence(arguments, monkeypatch, fault):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_capture([], fault))
    model = models.build_model("test_efficientnet", 10)
    args = arguments("baseline", "--cuda-graph", "--batch-size", "4")
    with pytest.raises(utils.UserError, match="--no-cuda-graph") as error:
        models.capture_cuda_graph(model.train(), 32, args)
    assert "\n" not in str(error.value)
    assert str(fault).splitlines()[0] in str(error.value)


def gradient_nodes(model):
    """The autograd node that accumulates the gradient of each parameter, as long as one lives."""
    return [parameter.view_as(parameter).grad_fn.next_functions[0][0]
            for parameter in model.parameters()]


def mark_new_gradient_nodes(model):
    for node in gradient_nodes(model):
        assert "seen" not in node.metadata
        node.metadata["seen"] = True


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "flatten"])
def test_capture_leaves_no_autograd_nodes_behind(arguments, monkeypatch, head):
    """torch keeps the logits of its last trial during the capture, and those of the capture for as
    long as the model lives. Their autograd nodes, of other streams, must not be used again."""
    kept = []

    def make_graphed(model, sample):
        for _ in range(2):  # a trial and the capture, whose streams differ
            kept.append(model(*sample))
            mark_new_gradient_nodes(model)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed)
    args = arguments("baseline", "--cuda-graph", "--amp-dtype", "fp32", "--batch-size", "4")
    model = models.build_model("test_efficientnet", 10).train()
    if head == "flatten":  # its output is a view
        model.classifier = torch.nn.Sequential(
            model.classifier, torch.nn.Unflatten(1, (10, 1, 1)), torch.nn.Flatten())
    models.capture_cuda_graph(model, 32, args)

    assert [logits.grad_fn for logits in kept] == [None, None]
    mark_new_gradient_nodes(model)


@pytest.mark.parametrize("fault, word", [
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "--batch-size"),
    (RuntimeError("x does not have a deterministic implementation"), "--deterministic")])
def test_known_errors_of_a_capture_keep_their_advice(arguments, monkeypatch, fault, word):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_capture([], fault))
    args = arguments("baseline", "--cuda-graph", "--batch-size", "4")
    model = models.build_model("test_efficientnet", 10).train()
    with pytest.raises(type(fault)) as error:
        models.capture_cuda_graph(model, 32, args)
    assert word in utils.user_message(error.value)


def test_error_of_the_end_of_a_capture_does_not_hide_its_cause(arguments, monkeypatch):
    def make_graphed(model, sample):
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed)
    args = arguments("baseline", "--cuda-graph", "--batch-size", "4")
    model = models.build_model("test_efficientnet", 10).train()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        models.capture_cuda_graph(model, 32, args)


def test_inference_does_not_try_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = models.build_model("test_efficientnet", 10)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    models.infer(model, [(torch.rand(2, 3, 32, 32), torch.zeros(2))])
    assert seen == [False]
    assert torch.backends.cudnn.benchmark is True


# Checkpoints --------------------------------------------------------------------------------------

def assert_plain(value):
    """`value` and all in it are of the types that any version of Python and torch can load."""
    assert type(value) in (str, int, float, bool, list, dict, type(None))
    if type(value) is list:
        for entry in value:
            assert_plain(entry)
    if type(value) is dict:
        for entry in value.values():
            assert_plain(entry)


def test_checkpoint_is_plain_safe_and_usable_without_the_project(arguments):
    args = arguments("baseline", "--num-epochs", "1", "--batch-size", "128", "--seed", "3")
    data = data_loader.open_dataset(args)
    model = models.build_model("test_efficientnet", 10)
    info = models.build_info("baseline", model, "test_efficientnet", data, args,
                             gradcam_layer=models.gradcam_layer(model, args.image_size))
    path = train_baseline.train(model, info, data, args)

    checkpoint = torch.load(path, weights_only=True)
    state_dict = checkpoint.pop("state_dict")
    assert set(checkpoint) == {
        "format_version", "run", "model_name", "num_classes", "class_names", "image_size",
        "crop_pct", "interpolation", "mean", "std", "gradcam_layer", "epoch", "val_accuracy",
        "value_range", "dataset", "split_fingerprint", "config", "versions"}
    assert_plain(checkpoint)
    assert checkpoint["config"]["argv"][-2:] == ["--seed", "3"]
    assert checkpoint["config"]["student_weights_sha256"] is None  # not of a weight file
    for tensor in state_dict.values():
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.dtype in (torch.float32, torch.int64)

    other = timm.create_model(checkpoint["model_name"], num_classes=checkpoint["num_classes"])
    assert list(state_dict) == list(other.state_dict())
    other.load_state_dict(state_dict)
    other.eval()

    loaded, info = models.load_model(path)
    assert not loaded.training
    assert "state_dict" not in info
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(info["mean"]).view(3, 1, 1)
    std = torch.tensor(info["std"]).view(3, 1, 1)
    torch.testing.assert_close(other((images - mean) / std), models.forward(loaded, images),
                               rtol=1e-4, atol=1e-5)


CHANGES = {  # kinds of files that differ from a good one in a single entry
    "whole model": {"model": torch.nn.Linear(2, 2)},  # a class: only code brings it back
    "other model": {"model_name": "test_resnet"},
    "other class count": {"num_classes": 7},
    "older format": {"format_version": 0},
    "unknown model": {"model_name": "resnet_99"},
    "number": {"model_name": 5},
    "from a hub": {"model_name": "hf-hub:someone/something"},
    "from a folder": {"model_name": "local-dir:/somewhere"},
    "size in words": {"image_size": "big"},
    "no crop_pct": {"crop_pct": None},
    "mean in words": {"mean": ["a", "b", "c"]},
    "no settings": {"config": {}},
}


def spoil(kind, good, folder):
    """Put a file of the given `kind`, made of the good one, into `folder`; returns its path."""
    file = folder / "best_model.pth"
    checkpoint = torch.load(good, weights_only=True)
    if kind in CHANGES:
        torch.save({**checkpoint, **CHANGES[kind]}, file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "picture":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    elif kind == "bare weights":
        torch.save(checkpoint["state_dict"], file)
    elif kind == "last.pth":
        utils.save_checkpoint({"history": [], "states": {}}, file)
    elif kind == "flipped bit":
        content = bytearray(good.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "packed":  # 10 MB of zeros in 10 kB
        checkpoint["state_dict"]["zeros"] = torch.zeros(2_500_000)
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
    return file


@pytest.mark.slow
@pytest.mark.parametrize("kind, word", [
    ("folder", "no file"), ("picture", "damaged"), ("whole model", "code"),
    ("other model", "test_resnet"), ("other class count", "does not fit"),
    ("older format", f"format {utils.FORMAT_VERSION}"), ("bare weights", "not a checkpoint"),
    ("last.pth", "model_name"), ("unknown model", "resnet_99"), ("keys missing", "model_name"),
    ("number", "model_name"), ("from a hub", "hf-hub:someone"), ("from a folder", "local-dir:"),
    ("size in words", "image_size"), ("no crop_pct", "crop_pct"),
    ("mean in words", "does not fit"), ("flipped bit", "damaged"), ("packed", "refused"),
    ("not finite", "finite"), ("no settings", "argv")])
def test_hostile_and_damaged_models_are_one_sentence(tmp_path, kind, word):
    good = tmp_path / "good" / "best_model.pth"
    info = {"model_name": "test_efficientnet", "num_classes": 5, "class_names": list("abcde"),
            "image_size": 32, "config": dict.fromkeys(models.CONFIG_KEYS), "dataset": "Digits",
            "split_fingerprint": "f", "crop_pct": 1.0, "interpolation": "bicubic",
            "mean": [0.5] * 3, "std": [0.5] * 3, "versions": {}}
    save_best(good, models.build_model("test_efficientnet", 5), info)
    assert models.load_model(good)[1]["epoch"] == 1

    with pytest.raises(utils.UserError, match=word) as error:
        models.load_model(spoil(kind, good, tmp_path))
    assert "\n" not in str(error.value)
    assert "best_model.pth" in str(error.value)


# The best student ---------------------------------------------------------------------------------

def save_student(folder, run, accuracy, model=None, **changes):
    """A student's best_model.pth below `folder`; returns its info."""
    args = config.parse_args("baseline", "", ["--quick", "--image-size", "48"])
    data = data_loader.Dataset("Digits", list("0123456789"), pixels(), pixels(), "f", "crop")
    model = model or models.build_model("test_efficientnet", 10)
    info = models.build_info(run, model, "test_efficientnet", data, args)
    info.update(changes)
    save_best(folder / run / "best_model.pth", model, info, accuracy)
    return info


def pixels():
    return data_loader.Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, torch.zeros(1))


@pytest.mark.parametrize("baseline, distilled, best", [
    (0.5, 0.6, "distilled"), (0.6, 0.5, "baseline"), (0.5, 0.5, "baseline")])
def test_best_student_is_chosen_on_validation_and_a_tie_goes_to_the_baseline(
        tmp_path, capsys, baseline, distilled, best):
    info = save_student(tmp_path, "baseline", baseline)
    save_student(tmp_path, "distilled", distilled)
    save_student(tmp_path, "teacher", 0.99)
    models.export_best_student(tmp_path, info)
    assert utils.load_checkpoint(tmp_path / "best_model.pth")["run"] == best
    assert best in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"split_fingerprint": "g"}, {"dataset": "CIFAR10"},
                                     {"class_names": list("abcdefghij")}])
def test_students_on_other_data_do_not_compete(tmp_path, changes):
    save_student(tmp_path, "baseline", 0.9, **changes)
    models.export_best_student(tmp_path, save_student(tmp_path, "distilled", 0.5))
    assert utils.load_checkpoint(tmp_path / "best_model.pth")["run"] == "distilled"


def test_best_student_says_from_which_run_and_when(tmp_path, capsys):
    info = save_student(tmp_path, "baseline/seed_1", 0.9)
    os.utime(tmp_path / "baseline" / "seed_1" / "best_model.pth", (0, 1_600_000_000))
    models.export_best_student(tmp_path, info)
    out = capsys.readouterr().out
    for word in ("baseline/seed_1", "90.00%", "epoch 1", "2020-09-1"):
        assert word in out
    config_json = json.loads((tmp_path / "best_model" / "config.json").read_text())
    assert config_json["origin"]["run"] == "baseline/seed_1"
    assert config_json["origin"]["saved"].startswith("2020-09-1")


def test_best_model_of_other_images_is_left_and_said(tmp_path, capsys):
    info = save_student(tmp_path, "baseline", 0.9)
    models.export_best_student(tmp_path, info)
    content = (tmp_path / "best_model.pth").read_bytes()
    capsys.readouterr()
    models.export_best_student(tmp_path, {**info, "split_fingerprint": "another"})
    assert "best_model.pth" in capsys.readouterr().out
    assert (tmp_path / "best_model.pth").read_bytes() == content


@pytest.mark.parametrize("kind", ["flipped bit", "older format", "no crop_pct", "not finite"])
def test_invalid_checkpoint_of_another_run_is_left_out_with_a_warning(tmp_path, capsys, kind):
    info = save_student(tmp_path, "baseline", 0.5)
    save_student(tmp_path, "good", 0.9)
    (tmp_path / "distilled").mkdir()
    spoil(kind, tmp_path / "good" / "best_model.pth", tmp_path / "distilled")
    models.export_best_student(tmp_path, info)
    assert utils.load_checkpoint(tmp_path / "best_model.pth")["run"] == "baseline"
    assert "warning" in capsys.readouterr().out


def test_export_that_fails_leaves_the_previous_folder(tmp_path, capsys, monkeypatch):
    info = save_student(tmp_path, "baseline", 0.5)
    models.export_best_student(tmp_path, info)
    folder = tmp_path / "best_model"
    weights = (folder / "model.safetensors").read_bytes()

    def save_half(model, target, **options):
        target.mkdir()
        (target / "model.safetensors").touch()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(timm.models, "save_for_hf", save_half)
        save_student(tmp_path, "distilled", 0.9)
        models.export_best_student(tmp_path, info)
    out = capsys.readouterr().out
    assert "warning" in out
    assert "no space left" in out
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / ".new_best").exists()

    # A file of the folder, or of the new one, is in use: Windows lets nobody move it then.
    replace = utils.replace
    for in_use in (folder, tmp_path / ".new_best"):
        def refuse(source, target, in_use=in_use):
            if source == in_use:
                raise PermissionError("in use")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(utils, "replace", refuse)
            models.export_best_student(tmp_path, info)
        assert "in use" in capsys.readouterr().out
        assert (folder / "model.safetensors").read_bytes() == weights

    # Killed after the previous folder was moved, the next export brings it back.
    folder.rename(tmp_path / ".previous_best")
    with monkeypatch.context() as patch:
        patch.setattr(timm.models, "save_for_hf", save_half)
        models.export_best_student(tmp_path, info)
    assert (folder / "model.safetensors").read_bytes() == weights

    # What a killed export has left is replaced.
    (tmp_path / "best_model.pth.7.tmp").touch()
    (tmp_path / ".new_best").mkdir()
    (tmp_path / ".new_best" / "junk").touch()
    models.export_best_student(tmp_path, info)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["origin"]["run"] == "distilled"
    assert not (tmp_path / "best_model.pth.7.tmp").exists()
    assert not (tmp_path / ".previous_best").exists()


@pytest.mark.parametrize("crop_pct, interpolation", [(1.0, "bicubic"), (0.875, "bilinear")])
def test_best_student_in_timms_own_layout(tmp_path, crop_pct, interpolation):
    """Folder and file give timm the same model, and its transform is the project's."""
    torch.manual_seed(0)
    model = models.build_model("test_efficientnet", 10)
    info = save_student(tmp_path, "baseline", 0.5)
    models.export_best_student(tmp_path, info)  # the next export replaces it
    save_student(tmp_path, "distilled", 0.6, model, crop_pct=crop_pct,
                 interpolation=interpolation, mean=[0.1, 0.2, 0.3])
    models.export_best_student(tmp_path, info)

    folder = tmp_path / "best_model"
    file = tmp_path / "best_model.pth"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "baseline", "best_model", "best_model.pth", "distilled"]
    written = json.loads((folder / "config.json").read_text())
    assert written["label_names"] == list("0123456789")
    assert written["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_file = timm.create_model("test_efficientnet", num_classes=10, checkpoint_path=file).eval()
    ours, info = models.load_model(file)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(by_folder))
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    for image in (noise[0], noise[1], noise[0, :8, :8]):
        picture = Image.fromarray(image)
        images = transform(picture)[None]
        assert torch.equal(images[0], data_loader.build_transform(info)(picture))
        with torch.inference_mode():
            logits = by_folder(images)
            assert torch.equal(logits, by_file(images))
            torch.testing.assert_close(logits, ours(images), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(logits, model.eval()(images), rtol=1e-5, atol=1e-6)
