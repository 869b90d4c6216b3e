"""Losses against float64 formulas, models against timm, checkpoints against their contract.

    python -m pytest tests/test_models.py
"""
import copy
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch

import data_loader
import models
import train_baseline
import utils
from conftest import ROOT


def softmax64(logits, temperature):
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_loss(student, teacher, labels, temperature, alpha, direction):
    """Hinton et al. 2015, written out in float64: alpha T^2 KL + (1 - alpha) CE, means over the batch."""
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
    parts = models.distillation_loss(*batch, temperature, alpha, direction)
    for got, wanted in zip((parts["loss"], parts["ce_loss"], parts["kd_loss"]),
                           reference_loss(*batch, temperature, alpha, direction)):
        assert got.item() == pytest.approx(wanted, rel=1e-5)


def test_directions_differ_and_are_the_right_way_round():
    """KL(teacher || student) is large where the student misses a mode of the teacher's, KL(student || teacher) less so."""
    teacher, student = torch.tensor([[2.0, 2.0, -9.0]]), torch.tensor([[9.0, -9.0, -9.0]])
    assert models.kd_loss(student, teacher, 1, "forward") > 5 > models.kd_loss(student, teacher, 1, "reverse")


def test_equal_logits_have_no_kd_part(batch):
    student, _, labels = batch
    for direction in ("forward", "reverse"):
        assert abs(models.distillation_loss(student, student.clone(), labels, 4, 0.7, direction)["kd_loss"].item()) < 1e-6


def test_alpha_zero_is_plain_cross_entropy(batch):
    student, teacher, labels = batch
    assert torch.equal(models.distillation_loss(student, teacher, labels, 4, 0.0)["loss"],
                       torch.nn.functional.cross_entropy(student, labels))


def test_loss_does_not_depend_on_batch_size(batch):
    once = models.distillation_loss(*batch, 4, 0.7)["loss"]
    twice = models.distillation_loss(*(torch.cat([t, t]) for t in batch), 4, 0.7)["loss"]
    assert twice.item() == pytest.approx(once.item(), rel=1e-5)


def test_no_gradient_reaches_the_teacher(batch):
    student, teacher, labels = batch
    student.requires_grad_(), teacher.requires_grad_()
    models.distillation_loss(student, teacher, labels, 4, 0.7)["loss"].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_finite_for_large_half_precision_logits(batch, direction):
    student, teacher, labels = batch
    student = (student.sign() * 100).half().requires_grad_()
    loss = models.distillation_loss(student, (teacher.sign() * 100).half(), labels, 1, 0.7, direction)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_gradient_keeps_its_scale_between_temperatures(batch):
    norms = []
    for temperature in (1, 20):
        student = (0.1 * batch[0]).requires_grad_()
        models.kd_loss(student, 0.1 * batch[1], temperature).backward()
        norms.append(student.grad.norm().item())
    assert 0.5 < norms[0] / norms[1] < 2


def reference_dkd(student, teacher, labels, temperature, beta=8.0):
    """Zhao et al. 2022, equations 6 and 7, image by image in float64."""
    total = 0.0
    for p, q, t in zip(softmax64(teacher, temperature), softmax64(student, temperature), labels.tolist()):
        tckd = p[t] * np.log(p[t] / q[t]) + (1 - p[t]) * np.log((1 - p[t]) / (1 - q[t]))
        others = [i for i in range(len(p)) if i != t]
        nckd = sum(p[i] / (1 - p[t]) * np.log(p[i] / (1 - p[t]) / (q[i] / (1 - q[t]))) for i in others)
        total += tckd + beta * nckd
    return temperature**2 * total / len(labels)


def reference_dist(student, teacher, labels, temperature):
    """Huang et al. 2022, equations 6 to 9, with numpy's correlation coefficient in float64."""
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T)])
    return temperature**2 * (inter + intra)


def reference_lskd(student, teacher, labels, temperature):
    """Sun et al. 2024, algorithm 1: the z-score of the logits, then KL(teacher || student) at T, in float64."""
    def z(logits):
        logits = logits.double()
        return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    p, q = softmax64(z(teacher), temperature), softmax64(z(student), temperature)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize("loss, reference", [("dkd", reference_dkd), ("dist", reference_dist), ("lskd", reference_lskd)])
@pytest.mark.parametrize("temperature", [1, 4])
def test_other_losses_agree_with_float64_references(batch, loss, reference, temperature):
    parts = models.distillation_loss(*batch, temperature, 0.7, loss=loss)
    assert parts["kd_loss"].item() == pytest.approx(reference(*batch, temperature), rel=1e-5)
    assert parts["loss"].item() == pytest.approx(0.7 * parts["kd_loss"].item() + 0.3 * parts["ce_loss"].item(), rel=1e-5)
    student, teacher, labels = batch
    assert abs(models.distillation_loss(teacher, teacher, labels, temperature, 0.7, loss=loss)["kd_loss"].item()) < 1e-4
    large = (student.sign() * 100).half().requires_grad_()
    models.distillation_loss(large, teacher.requires_grad_(), labels, temperature, 0.7, loss=loss)["loss"].backward()
    assert torch.isfinite(large.grad).all() and teacher.grad is None


def test_reversed_lskd_swaps_the_roles(batch):
    student, teacher, labels = batch
    reverse = models.distillation_loss(student, teacher, labels, 2, 0.7, "reverse", loss="lskd")["kd_loss"].item()
    assert reverse == pytest.approx(reference_lskd(teacher, student, labels, 2), rel=1e-5) and \
        abs(reverse - reference_lskd(student, teacher, labels, 2)) > 1e-3


def test_dkd_with_beta_of_the_teachers_doubt_is_kd(batch):
    """The paper's equation 5: KD = TCKD + (1 - p_t) NCKD, image by image."""
    for i in range(4):
        student, teacher, labels = (tensor[i:i + 1] for tensor in batch)
        doubt = 1 - torch.softmax(teacher / 4, 1)[0, labels[0]].item()
        assert models.dkd_loss(student, teacher, labels, 4, beta=doubt).item() == pytest.approx(
            models.kd_loss(student, teacher, 4).item(), rel=1e-4)


def test_label_smoothing_and_soft_labels(batch):
    student, teacher, labels = batch
    hard = models.distillation_loss(student, teacher, labels, 4, 0.5, label_smoothing=0.1)
    smooth = torch.nn.functional.one_hot(labels, 100).float() * 0.9 + 0.1 / 100
    soft = models.distillation_loss(student, teacher, smooth, 4, 0.5)
    assert soft["ce_loss"].item() == pytest.approx(hard["ce_loss"].item(), rel=1e-5)
    assert torch.equal(soft["kd_loss"], hard["kd_loss"])  # labels do not touch the soft targets


@pytest.mark.parametrize("name, layer", [
    ("efficientnet_b0", "conv_head"), ("tf_efficientnet_lite0", "conv_head"),
    ("resnet18", "layer4.1.conv2"), ("test_vit", None)])
def test_gradcam_layer_is_the_last_feature_map(name, layer):
    size = timm.get_pretrained_cfg(name).input_size[-1] if name == "test_vit" else 64
    model = models.build_model(name, 10)
    assert models.gradcam_layer(model, size) == layer
    assert model.training


def test_same_seed_same_weights_new_head_included():
    states = []
    for seed in (1, 1, 2):
        utils.seed_everything(seed)
        states.append(models.build_model("test_efficientnet", 7).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
    assert states[0]["classifier.weight"].shape[0] == 7


def test_local_weights_are_loaded_but_for_the_head(tmp_path):
    utils.seed_everything(0)
    source = models.build_model("test_efficientnet", 1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    utils.seed_everything(1)
    model = models.build_model("test_efficientnet", 5, pretrained=True, weights=tmp_path / "weights.pth")
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
    """The real client against an address where nobody answers; an empty cache, so that nothing is found locally."""
    code = "import models; models.build_model('efficientnet_b0', 10, pretrained=True)"
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"})
    last = done.stderr.strip().splitlines()[-1]
    assert "--student-weights" in last and "--quick" in last and "model.safetensors" in last
    assert "Retry" not in done.stderr and time.time() - start < 40  # the import of torch included


def test_frozen_teacher_stays_in_eval_mode():
    teacher = models.freeze(models.build_model("test_efficientnet", 5))
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    teacher(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("classes, least", [(10, 0.3), (100, 0.04), (2, 0.75), (3, 2 / 3), (102, 2 / 102 + 0.02)])
def test_least_accuracy_of_a_teacher(classes, least):
    assert models.least_accuracy(classes) == pytest.approx(least)


def test_checkpoint_is_plain_safe_and_usable_without_the_project(arguments, capsys):
    args = arguments("baseline", "--num-epochs", "1")
    args.seed = 3
    data = data_loader.open_dataset(args)
    model = models.build_model("test_efficientnet", 10)
    info = models.describe("baseline", model, "test_efficientnet", data, args)
    path = train_baseline.train(model, lambda images, logits, labels: dict.fromkeys(
        ("loss", "ce_loss"), models.cross_entropy(logits, labels)), info, data, args, fresh=False)

    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {
        "format_version", "run", "model_name", "num_classes", "class_names", "image_size", "crop_pct", "interpolation",
        "mean", "std", "gradcam_layer", "state_dict", "epoch", "val_accuracy", "dataset", "split_fingerprint", "config",
        "versions"}
    assert all(type(value) in (str, int, float, bool, list, dict, type(None)) for name, value in checkpoint.items()
               if name != "state_dict")
    assert all(type(value) in (str, int, float, bool, type(None)) for value in
               [*checkpoint["config"].values(), *checkpoint["versions"].values()])
    for tensor in checkpoint["state_dict"].values():
        assert tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.int64)
    other = timm.create_model(checkpoint["model_name"], num_classes=checkpoint["num_classes"])
    other.load_state_dict(checkpoint["state_dict"])
    other.eval()

    loaded, info = models.load_model(path)
    assert not loaded.training and "state_dict" not in info
    images = torch.rand(2, 3, 32, 32)
    normalised = (images - torch.tensor(info["mean"]).view(3, 1, 1)) / torch.tensor(info["std"]).view(3, 1, 1)
    torch.testing.assert_close(other(normalised), utils.forward(loaded, images), rtol=1e-4, atol=1e-5)


def test_checkpoint_that_does_not_fit_is_one_sentence(tmp_path):
    model = models.build_model("test_efficientnet", 5)
    info = {"format_version": utils.FORMAT_VERSION, "model_name": "test_resnet", "num_classes": 5}
    utils.save_best(tmp_path / "best_model.pth", model, info, {"epoch": 1, "val_accuracy": 0.5})
    with pytest.raises(utils.UserError, match="do not fit test_resnet"):
        models.load_model(tmp_path / "best_model.pth")
