"""Students and teachers from timm, forward and inference, the losses, and checkpoints as models.

Shapes: images (B, 3, H, W) floats in [0, 1], labels (B,) int64 or, mixed, (B, C) probabilities,
logits (B, C). Losses are means over the batch, in float32 also under autocast.
"""
import copy
import gc
import itertools
import shutil
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub as hf
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.layers import Conv2dSame, convert_sync_batchnorm

import utils

# Building -----------------------------------------------------------------------------------------

def build_model(name, num_classes, pretrained=False, weights=None):
    """A timm classifier in channels_last with a new head, drawn from torch's global generator.
    `weights` is a local file instead of timm's download; UserError where they cannot be had. With
    `pixel_scale` and `pixel_shift` (3, 1, 1), not in the state_dict, `forward` normalises."""
    cfg, hub = timm.get_pretrained_cfg(name), None
    try:
        if pretrained and not weights and (hub := cfg.hf_hub_id) and not isinstance(
                hf.try_to_load_from_cache(hub, cfg.hf_hub_filename or "model.safetensors"), str):
            hf.model_info(hub, timeout=10)  # asks once, where timm's download would for a minute
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes,
                                  pretrained_cfg_overlay=weights and {"file": str(weights)})
    except Exception as error:
        if not pretrained:
            raise
        by_hand = (f"; fetch model.safetensors from https://huggingface.co/{hub} by hand for "
                   "--student-weights, --teacher-weights, or take --no-pretrained, or --quick")
        raise utils.UserError(f"{weights or 'the weights of timm'} cannot be loaded into {name}: "
                              f"{utils.first_line(error)}{by_hand if hub else ''}") from None
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    model.register_buffer("pixel_scale", 1 / std, persistent=False)
    model.register_buffer("pixel_shift", -mean / std, persistent=False)
    for silu in (module for module in model.modules() if isinstance(module, torch.nn.SiLU)):
        silu.inplace = False  # in place autograd would clone its input first: a kernel more
    return model.to(memory_format=torch.channels_last)


def teacher_mismatch(info, args, data):
    """How the teacher of `info` (a checkpoint's dict) is unfit to teach on `data`; "" if not."""
    wanted = {"dataset": data.name, "class_names": list(data.class_names),
              "split_fingerprint": data.split_fingerprint,
              "image_size": args.teacher_image_size or args.image_size,
              "model_name": info["model_name"] if args.teacher_checkpoint else args.teacher_model}
    return ", ".join(
        f"its {key} " + (f"is {info[key]}, not {value}" if len(str(value)) < 60 else "differs")
        + (", so it may have seen the validation images" if key == "split_fingerprint" else "")
        for key, value in wanted.items() if info[key] != value)


def min_teacher_accuracy(classes):
    """Below it a teacher teaches noise: thrice chance, from 50 classes on twice and 2 points."""
    return 0.5 + 0.5 / classes if classes < 4 else max(3 / classes, 2 / classes + 0.02)


def freeze_teacher(teacher, image_size, dtype=torch.float32):
    """`teacher` (on the CPU) as it teaches: in eval mode whatever calls train(), without gradients,
    BatchNorms folded into convolutions, weights cast to `dtype` as autocast would in each step."""
    plain = (torch.nn.Conv2d, Conv2dSame, torch.nn.Linear)  # others do more with their weights
    folded = copy.deepcopy(teacher.requires_grad_(False).eval())
    for parent in list(folded.modules()):
        for (name, conv), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if (type(conv) in plain and isinstance(norm, torch.nn.BatchNorm2d)
                    and len(conv.weight) == norm.num_features):
                setattr(parent, name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, getattr(norm, "act", torch.nn.Identity()))  # timm's has one
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, ours = forward(teacher, images), forward(folded, images)
    if (ours - right).abs().max() < 0.01 * right.abs().max():  # or these are no pairs, as in RepViT
        teacher = folded.eval()
    for module in filter(lambda module: type(module) in plain, teacher.modules()):
        module.to(dtype)
    teacher.train = lambda mode=True: teacher
    return teacher


def capture_cuda_graph(model, size, args):
    """`model`; with --cuda-graph it replays CUDA graphs of forward and backward, in its present
    mode on whole batches: at batch 16 a GPU waits for Python. Elsewhere it runs as before."""
    if not args.cuda_graph:
        return model
    vars(model).pop("forward", None)  # of a former capture
    gc.collect()  # graphs hold their models, and these their graphs
    plain, mode, kept = model.forward, model.training, copy.deepcopy(model.state_dict())
    images = torch.zeros(args.batch_size, 3, size, size, device=model.pixel_scale.device)
    def forward(images):  # autocast belongs inside (pytorch #71631, #120930); evaluation has none
        with utils.autocast(images.device, args) if model.training == mode else nullcontext():
            return plain(images)
    model.forward = forward
    try:
        torch.cuda.make_graphed_callables(model, (images.to(memory_format=torch.channels_last),))
    except (RuntimeError, AssertionError) as error:  # after which CUDA may be of no more use
        raise utils.UserError(f"--cuda-graph failed: {utils.first_line(error)}") from None
    model.load_state_dict(kept)  # warming up has moved BatchNorm's statistics
    return model


def wrap_ddp(model):
    """`model` as a loop calls it: as it is or, under torchrun, in DistributedDataParallel, on GPUs
    with BatchNorms that normalise by the whole batch."""
    if utils.WORLD_SIZE == 1:
        return model
    if model.pixel_scale.is_cuda:
        for module in convert_sync_batchnorm(model).modules():
            pass
    elif any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        print("on CPUs each process normalises (BatchNorm) by its own part of a batch")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel.broadcast_buffers = False  # in each step; process 0 alone keeps them
    parallel.pixel_scale, parallel.pixel_shift = model.pixel_scale, model.pixel_shift
    return parallel


# Forward and inference ----------------------------------------------------------------------------

def forward(model, images):
    """Logits (B, C) for `images` (B, 3, H, W) in [0, 1], normalised as `model` was pretrained."""
    return model(torch.addcmul(model.pixel_shift, images, model.pixel_scale))


@torch.inference_mode()
def infer(model, loader):
    """Logits (N, C) float32 and labels (N,) on the CPU, in the order of `loader`; in eval mode."""
    model.eval()
    batches = [(forward(model, images).float(), labels) for images, labels in loader]
    return [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]


def accuracy(logits, labels):
    """Share of the batch that is right, a 0-d tensor; nan for mixed labels (B, C)."""
    return (torch.full((), torch.nan, device=logits.device) if labels.ndim == 2
            else (logits.detach().argmax(1) == labels).float().mean())


def entropy(logits):
    """Mean entropy in nats of the softmax of `logits`, a 0-d tensor: how sure the model is."""
    return torch.special.entr(F.softmax(logits.detach().float(), 1)).sum(1).mean()


# Losses -------------------------------------------------------------------------------------------

def cross_entropy(logits, labels, label_smoothing=0.0):
    """Cross-entropy in nats."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def kd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """T^2 * KL of the softened outputs (Hinton et al. 2015), forward: KL(teacher || student),
    reverse: KL(student || teacher). T^2 undoes the 1 / T^2 by which gradients fall off. A mean over
    the batch: torch's default "mean" divides by the number of classes too."""
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float().detach() / temperature, dim=1)
    q, p = (student, teacher) if direction == "forward" else (teacher, student)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2  # KL(p || q)


def standardise(logits):
    """Logits with mean 0, deviation 1 in each image, for lskd (Sun et al. 2024: ALPHA = 0.989)."""
    std, mean = torch.std_mean(logits.float(), 1, keepdim=True)
    return (logits.float() - mean) / (std + 1e-7)


def dist_loss(student_logits, teacher_logits, temperature):
    """T^2 * (inter + intra) (Huang et al. 2022): 1 - Pearson's correlation of the softened
    probabilities, by image and by class. T^2 is their code's; ALPHA = 0.67, T = 4 on CIFAR."""
    def distance(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1).mean()
    student = F.softmax(student_logits.float() / temperature, 1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, 1)
    return temperature**2 * (distance(student, teacher) + distance(student.T, teacher.T))


def lskd_loss(s, t, temperature, direction="forward"):
    return kd_loss(standardise(s), standardise(t), temperature, direction)


def distill_loss(student_logits, teacher_logits, args):
    if args.distillation_loss == "dist":
        return dist_loss(student_logits, teacher_logits, args.temperature)
    if args.distillation_loss == "lskd":
        return lskd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)
    return kd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)


def teacher_diagnostics(teacher_logits, labels, args):
    """How sure and how often right the teacher is, and how sure its targets are in the loss."""
    targets = standardise(teacher_logits) if args.distillation_loss == "lskd" else teacher_logits
    return {"teacher_entropy": entropy(teacher_logits),
            "target_entropy": entropy(targets / args.temperature),
            "teacher_accuracy": accuracy(teacher_logits, labels)}


# Checkpoints as models ----------------------------------------------------------------------------

INFO = {"model_name": str, "class_names": list, "image_size": int, "config": dict, "epoch": int,
        "num_classes": int, "interpolation": str, "mean": list, "std": list, "versions": dict,
        "dataset": str, "split_fingerprint": str, "val_accuracy": float, "state_dict": dict}
CONFIG = {"dataset_name", "dataset_dir", "augmentation", "val_fraction", "split_seed", "batch_size",
          "accumulate_steps", "num_epochs", "seed", "argv"}  # what evaluate.py needs of it


def build_info(run, model, name, data, args, **more):
    """What a checkpoint of `run` says of itself besides weights, epoch, accuracy: plain values."""
    cfg, small = model.pretrained_cfg, data.train.pixels is not None
    return {
        "run": run, "model_name": name, "num_classes": len(data.class_names),
        "class_names": list(data.class_names), "image_size": args.image_size,
        "crop_pct": 1.0 if small else float(cfg["crop_pct"]),  # 32 px have no edges to cut off
        "interpolation": "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        **{key: [float(value) for value in cfg[key]] for key in ("mean", "std")},
        "gradcam_layer": gradcam_layer(model, args.image_size), "dataset": data.name,
        "split_fingerprint": data.split_fingerprint,
        "config": dict(vars(args)), "versions": utils.versions(model.pixel_scale.device), **more,
    }


def gradcam_layer(model, image_size):
    """Name of the last convolution with a map of 4 x 4 or more, or GradCAM were blank; or None."""
    shapes, names = {}, {module: name for name, module in model.named_modules()}
    image = torch.zeros(1, 3, image_size, image_size, device=model.pixel_scale.device)
    def note(module, _, output):
        if isinstance(module, torch.nn.Conv2d):
            shapes[module] = output.shape[-2:]
    try:
        with torch.inference_mode(), torch.nn.modules.module.register_module_forward_hook(note):
            features = model.eval().forward_features(image)
    except (RuntimeError, ValueError, AssertionError) as error:  # what convolutions and timm raise
        raise utils.UserError(f"{model.pretrained_cfg['architecture']} cannot take images of "
                              f"{image_size} px: {utils.first_line(error)}") from None
    large = [names[conv] for conv in shapes if min(shapes[conv]) >= 4 and features.ndim == 4]
    return large[-1] if large else None


def load_model(path, device="cpu"):
    """(model in eval mode, info without weights) of a best_model.pth; UserError if it is none."""
    info = utils.load_checkpoint(path)
    wrong = [key for key, kind in INFO.items() if not isinstance(info.get(key), kind)]
    wrong = wrong or sorted(CONFIG - info["config"].keys())
    if wrong or not timm.is_model(info["model_name"]):  # timm would download what other names say
        raise utils.UserError(f"{path} holds no model of this project (see its "
                              f"{', '.join(wrong) or info['model_name']})")
    weights, name = info.pop("state_dict"), info["model_name"]
    try:
        model = build_model(name, info["num_classes"])
        model.load_state_dict(weights)
        if not all(value.isfinite().all() for value in weights.values()):
            raise RuntimeError("some are no finite numbers")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise utils.UserError(f"{path} does not fit {name}: {utils.first_line(error)}") from None
    return model.to(device).eval(), info


def student_checkpoints(folder):
    """The best_model.pth of a student's folder and of its seed_<n>/, not of those moved aside."""
    seeds = [path for path in folder.glob("seed_*") if path.name.removeprefix("seed_").isdigit()]
    return sorted(file for path in [folder, *seeds] if (file := path / "best_model.pth").is_file())


def export_best_student(checkpoint_dir, like):
    """Copy the best student by validation accuracy, the baseline of equals, to best_model.pth and,
    as timm writes models, best_model/. Dataset, classes and split are those of `like` (an info)."""
    folder, same = Path(checkpoint_dir), ("dataset", "class_names", "split_fingerprint")
    file, export, beside = (folder / name for name in ("best_model.pth", "best_model", ".new_best"))
    _lock = utils.lock_folder(export)  # while it lives no other script that ends writes there
    infos = {path: utils.load_checkpoint(path) for run in ("baseline", "distilled")
             for path in student_checkpoints(folder / run)}
    rivals = {path: info["val_accuracy"] for path, info in infos.items()
              if all(info[key] == like[key] for key in same)}
    if utils.RANK or not rivals:
        return
    best = max(rivals, key=rivals.get)  # the first of equals
    with utils.atomic_write(file, "wb") as copy_of_it:
        copy_of_it.write(best.read_bytes())
    print(f"best student so far: {best.parent.relative_to(folder)}, {rivals[best]:.2%} on "
          f"validation images; copied to {file}")
    model, info = load_model(file)
    model.pretrained_cfg |= {key: info[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    model.pretrained_cfg |= {"input_size": (3, info["image_size"], info["image_size"]),
                             "test_input_size": None, "test_crop_pct": None}
    shutil.rmtree(export, ignore_errors=True)
    try:
        timm.models.save_for_hf(model.to(memory_format=torch.contiguous_format), beside, {
            "label_names": info["class_names"], "sha256": utils.sha256(file)}, None, True)
        utils.replace(beside, export)
    except (SafetensorError, RuntimeError, OSError) as error:  # tensors shared, the disk full
        print(f"warning: {export}/ could not be written: {utils.first_line(error)}")
