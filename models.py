"""Students and teachers from timm, forward and inference, the losses, and checkpoints as models.

Shapes: images (B, 3, H, W) floats in [0, 1], labels (B,) int64 or, mixed, (B, C) probabilities,
logits (B, C). Losses are means over the batch, in float32 also under autocast.
"""
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn.functional as F

import utils
from utils import UserError

# Building -----------------------------------------------------------------------------------------

def build_model(name, num_classes, pretrained=False, weights=None):
    """A timm classifier in channels_last with a new head, drawn from torch's global generator.

    `weights` is a local file instead of timm's download. `pixel_mean` and `pixel_std` (1, 3, 1, 1)
    are what `forward` normalises with, and no part of the state_dict, which keeps timm's own names.
    Raises UserError where weights cannot be had.
    """
    if pretrained and not weights:
        check_download(name)
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes,
                                  pretrained_cfg_overlay=weights and {"file": str(weights)})
    except Exception as error:
        if not pretrained:
            raise
        source, reason = weights or f"the weights of {name}", utils.first_line(error)
        raise UserError(f"{source} cannot be loaded into {name}: {reason}") from error
    for key in ("mean", "std"):
        value = torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1)
        model.register_buffer(f"pixel_{key}", value, persistent=False)
    for module in model.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = False  # in place autograd would clone its input first: a kernel more
    return model.to(memory_format=torch.channels_last)


def check_download(name):
    """Ask the hub once for a weight file that is not cached: its client retries for a minute."""
    cfg = timm.get_pretrained_cfg(name)
    repo, file = cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"
    if not repo or isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str):
        return
    try:
        huggingface_hub.model_info(repo, timeout=10)
    except Exception as error:
        raise UserError(
            f"downloading the ImageNet weights of {name} failed ({utils.first_line(error)}); fetch "
            f"{file} from https://huggingface.co/{repo} by hand and give it as --student-weights "
            "or --teacher-weights FILE, or start without them with --no-pretrained, or try the "
            "project without any download with --quick") from None


def why_unfit(info, args, data):
    """Why the teacher of `info` (a checkpoint's dict) cannot teach on `data`; None where it can."""
    size = args.teacher_image_size or args.image_size
    if info["model_name"] != args.teacher_model and not args.teacher_checkpoint:
        return f"it is {info['model_name']}, not {args.teacher_model}"
    if info["dataset"] != data.name or info["class_names"] != list(data.class_names):
        return f"it was trained on other classes ({info['dataset']}, {info['num_classes']} of them)"
    if info["split_fingerprint"] != data.split_fingerprint:
        return "it was trained on another split, and may have seen the validation images"
    if info["image_size"] != size:
        return f"it was trained at {info['image_size']} px, and --teacher-image-size is {size}"
    return None


def least_accuracy(num_classes):
    """Validation accuracy below which a teacher would teach noise: thrice chance, or half the way
    from chance to perfect where that is 1 or more."""
    least = max(3 / num_classes, 2 / num_classes + 0.02)
    return least if least < 1 else (1 + 1 / num_classes) / 2


def freeze(teacher):
    """Put `teacher` in eval mode for good, whatever calls train(), and out of every gradient."""
    teacher.requires_grad_(False).eval()
    teacher.train = lambda mode=True: teacher
    return teacher


# Forward and inference ----------------------------------------------------------------------------

def forward(model, images):
    """Logits (B, C) for `images` (B, 3, H, W) in [0, 1], normalised as `model` was pretrained."""
    return model((images - model.pixel_mean) / model.pixel_std)


@torch.inference_mode()
def infer(model, loader):
    """Logits (N, C) float32 and labels (N,) on the CPU, in the order of `loader`; in eval mode."""
    model.eval()
    batches = [(forward(model, images).float(), labels) for images, labels in loader]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def accuracy(logits, labels):
    """Share of the batch that is right, a 0-d tensor; nan for mixed labels (B, C)."""
    if labels.ndim == 2:
        return torch.full((), torch.nan, device=logits.device)
    return (logits.detach().argmax(1) == labels).float().mean()


def entropy(logits):
    """Mean entropy in nats of the softmax of `logits`, a 0-d tensor: how sure the model is."""
    log_probabilities = F.log_softmax(logits.detach().float(), 1)
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()


# Losses -------------------------------------------------------------------------------------------

def cross_entropy(logits, labels, label_smoothing=0.0):
    """Cross-entropy in nats."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def kd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """T^2 * KL between the softened outputs (Hinton et al. 2015).

    forward: KL(teacher || student); reverse: KL(student || teacher). The factor undoes the 1 / T^2
    by which gradients fall off, so that ALPHA means the same at every T.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float().detach() / temperature, dim=1)
    first, second = (student, teacher) if direction == "forward" else (teacher, student)
    # batchmean: the default "mean" divides by the number of classes too.
    return F.kl_div(first, second, reduction="batchmean", log_target=True) * temperature**2


def standardise(logits):
    """Each image's logits with mean 0 and standard deviation 1, for lskd (Sun et al. 2024), who
    use T = 2 or 3 and ALPHA = 0.989. Of two classes they are the same for all images."""
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def dkd_loss(student_logits, teacher_logits, labels, temperature, beta=8.0):
    """T^2 * (TCKD + beta * NCKD) (Zhao et al. 2022, Decoupled Knowledge Distillation).

    TCKD is the KL between the shares of the true class and of all others, NCKD the KL among the
    others alone, both KL(teacher || student); labels (B,) int64. The authors use T = 4, beta 8, 6
    or 2, by the models, and ALPHA = 0.5, raised over 20 epochs, which is not done here.
    """
    true = labels[:, None]
    others = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    others = others + (others >= true)  # (B, C - 1); a boolean mask would wait for the device

    def shares(logits):
        logits = logits.float() / temperature
        log_p = F.log_softmax(logits, 1)
        rest = log_p.gather(1, others).logsumexp(1, keepdim=True)
        binary = torch.cat([log_p.gather(1, true), rest], 1)
        return binary, F.log_softmax(logits.gather(1, others), 1)

    student_binary, student_others = shares(student_logits)
    teacher_binary, teacher_others = shares(teacher_logits.detach())
    tckd = F.kl_div(student_binary, teacher_binary, reduction="batchmean", log_target=True)
    nckd = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (tckd + beta * nckd)


def dist_loss(student_logits, teacher_logits, temperature):
    """T^2 * (inter + intra) (Huang et al. 2022, Knowledge Distillation from A Stronger Teacher).

    1 - Pearson's correlation between the softened probabilities (B, C) of both: inter over the
    classes of each image, intra over the images of each class. The T^2 is the authors' code's, not
    the paper's; they use ALPHA = 0.67, with T = 4 on CIFAR and 1 on ImageNet.
    """
    student = F.softmax(student_logits.float() / temperature, 1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, 1)
    inter = one_minus_correlation(student, teacher)
    intra = one_minus_correlation(student.T, teacher.T)
    return temperature**2 * (inter + intra)


def one_minus_correlation(a, b):
    """1 - Pearson's correlation between the rows of `a` and of `b`, a mean over them."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def distillation_loss(student_logits, teacher_logits, labels, args):
    """ALPHA * soft + (1 - ALPHA) * cross-entropy, and its two parts unweighted: three 0-d tensors.

    args.distillation_loss names the soft part: kd, dkd, dist or lskd. ALPHA weighs and TEMPERATURE
    softens each of them, but on a scale of its own, so that what suits one suits no other.
    """
    ce = cross_entropy(student_logits, labels, args.label_smoothing)
    if args.distillation_loss == "lskd":
        student_logits, teacher_logits = standardise(student_logits), standardise(teacher_logits)
    if args.distillation_loss == "dkd":
        soft = dkd_loss(student_logits, teacher_logits, labels, args.temperature)
    elif args.distillation_loss == "dist":
        soft = dist_loss(student_logits, teacher_logits, args.temperature)
    else:
        soft = kd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)
    return args.alpha * soft + (1 - args.alpha) * ce, ce, soft


def diagnose_teacher(teacher_logits, labels, args):
    """How sure and how often right the teacher is, and how sure its targets are in the loss."""
    targets = standardise(teacher_logits) if args.distillation_loss == "lskd" else teacher_logits
    return {"teacher_entropy": entropy(teacher_logits),
            "target_entropy": entropy(targets / args.temperature),
            "teacher_accuracy": accuracy(teacher_logits, labels)}


# Checkpoints as models ----------------------------------------------------------------------------

INFO = {"model_name": str, "class_names": list, "image_size": int, "config": dict,
        "dataset": str, "split_fingerprint": str, "val_accuracy": float, "state_dict": dict}
CONFIG = {"dataset_name", "dataset_dir", "augmentation", "val_fraction", "split_seed", "batch_size",
          "accumulate_steps", "num_epochs", "seed"}  # all that evaluate.py reads of it


def describe(run, model, name, data, args, **more):
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
        "config": dict(vars(args)), "versions": utils.versions(model.pixel_mean.device), **more,
    }


def gradcam_layer(model, image_size):
    """Name of the last convolution with the final feature map's size; None without one."""
    shapes, training = {}, model.training
    convolutions = {module: name for name, module in model.named_modules()
                    if isinstance(module, torch.nn.Conv2d)}
    hooks = [conv.register_forward_hook(
        lambda conv, _, output: shapes.update({conv: output.shape[-2:]})) for conv in convolutions]
    try:
        with torch.inference_mode():
            image = torch.zeros(1, 3, image_size, image_size, device=model.pixel_mean.device)
            features = model.eval().forward_features(image)
    except (RuntimeError, ValueError, AssertionError) as error:  # what convolutions and timm raise
        name, reason = model.pretrained_cfg["architecture"], utils.first_line(error)
        raise UserError(f"{name} cannot take images of {image_size} px: {reason}") from None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    final = features.shape[-2:] if features.ndim == 4 else None
    return next((convolutions[conv] for conv in reversed(shapes) if shapes[conv] == final), None)


def load_model(path, device="cpu"):
    """The model of a best_model.pth in eval mode, and its info: (model, dict without the weights).
    Raises UserError where the file is missing, damaged, or holds something else."""
    info = utils.load_file(path)
    wrong = [key for key, kind in INFO.items() if not isinstance(info.get(key), kind)]
    wrong = wrong or sorted(CONFIG - info["config"].keys())
    if wrong or not timm.is_model(info["model_name"]):  # timm would download what other names say
        raise UserError(f"{path} holds no model of this project (see its "
                        f"{', '.join(wrong) or info['model_name']})")
    weights, name = info.pop("state_dict"), info["model_name"]
    try:
        model = build_model(name, info["num_classes"])
        model.load_state_dict(weights)
        if not all(value.isfinite().all() for value in weights.values()):
            raise RuntimeError("some are no finite numbers")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"weights in {path} do not fit {name}: {utils.first_line(error)}") from None
    return model.to(device).eval(), info


def student_checkpoints(folder):
    """The best_model.pth of a student's folder and of its seed_<n>/, not of those moved aside."""
    seeds = [path for path in folder.glob("seed_*") if path.name.removeprefix("seed_").isdigit()]
    return sorted(file for path in [folder, *seeds] if (file := path / "best_model.pth").is_file())


def choose_best(checkpoint_dir, like):
    """Copy the best student by validation accuracy to best_model.pth; a tie goes to the baseline.
    Only students on the same dataset, classes and split as `like` (a checkpoint's dict) compete."""
    folder, same = Path(checkpoint_dir), ("dataset", "class_names", "split_fingerprint")
    infos = {path: utils.load_file(path) for run in ("baseline", "distilled")
             for path in student_checkpoints(folder / run)}
    rivals = {path: info["val_accuracy"] for path, info in infos.items()
              if all(info[key] == like[key] for key in same)}
    if not rivals:
        return
    best = max(rivals, key=rivals.get)  # the first of equals
    with utils.write_into_place(folder / "best_model.pth", "wb") as file:
        file.write(best.read_bytes())
    print(f"best student so far: {best.parent.relative_to(folder)}, {rivals[best]:.2%} on "
          f"validation images; copied to {folder / 'best_model.pth'}")
