"""Students and teachers from timm, the losses, and checkpoints as models."""
import huggingface_hub
import timm
import torch
import torch.nn.functional as F

import utils
from utils import UserError


def build_model(name, num_classes, pretrained=False, weights=None):
    """A timm classifier with a new head for `num_classes`, in channels_last, that knows its own normalisation.

    `weights` is a local file instead of timm's download. The head's weights come from torch's global generator, so
    seed it just before. `model.pixel_mean` and `model.pixel_std` (1, 3, 1, 1) are what `utils.forward` normalises
    with; they are no part of the state_dict, which keeps timm's own names. Raises UserError where weights cannot be had.
    """
    if pretrained and not weights:
        check_download(name)
    overlay = {"file": str(weights)} if weights else None
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    except Exception as error:
        if not pretrained:
            raise
        source = weights or f"the weights of {name}"
        raise UserError(f"{source} cannot be loaded into {name}: {utils.first_line(error)}") from error
    for key in ("mean", "std"):
        model.register_buffer(f"pixel_{key}", torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1), persistent=False)
    return model.to(memory_format=torch.channels_last)


def check_download(name):
    """Ask the hub once for the weight file, if it is not cached: left alone, the hub's client retries for a minute."""
    cfg = timm.get_pretrained_cfg(name)
    if not (cfg and cfg.hf_hub_id):
        return
    repo, file = cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors"
    if isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, file), timeout=10)
    except huggingface_hub.errors.EntryNotFoundError:
        return  # the hub answers, and timm knows the older file names
    except Exception as error:
        raise UserError(
            f"downloading the ImageNet weights of {name} failed ({utils.first_line(error)}); fetch {file} from "
            f"https://huggingface.co/{repo} by hand and give it as --student-weights or --teacher-weights FILE, or start "
            "without them with --no-pretrained, or try the project without any download with --quick") from None


def gradcam_layer(model, image_size):
    """Name of the last convolution whose output is the final feature map, what GradCAM looks at; None without one."""
    seen = {}

    def remember(name):
        return lambda module, inputs, output: seen.update({name: tuple(output.shape[-2:])})
    hooks = [module.register_forward_hook(remember(name)) for name, module in model.named_modules()
             if isinstance(module, torch.nn.Conv2d)]
    training = model.training
    try:
        with torch.inference_mode():  # timm's models take any size or raise what convolutions raise
            features = model.eval().forward_features(torch.zeros(1, 3, image_size, image_size, device=model.pixel_mean.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{model.pretrained_cfg['architecture']} cannot take images of {image_size} px: {utils.first_line(error)}") from None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    shape = tuple(features.shape[-2:]) if features.ndim == 4 else None
    return next((name for name in reversed(seen) if seen[name] == shape), None)


def describe(run, model, name, data, args, **more):
    """What a checkpoint of `run` says about itself besides weights, epoch and accuracy: plain values alone, and `more`."""
    cfg = model.pretrained_cfg
    small = data.train.pixels is not None  # nothing to cut off at the edges of a 32 px image
    return {
        "format_version": utils.FORMAT_VERSION, "run": run, "model_name": name, "num_classes": len(data.class_names),
        "class_names": list(data.class_names), "image_size": args.image_size,
        "crop_pct": 1.0 if small else float(cfg["crop_pct"]),
        "interpolation": cfg["interpolation"] if cfg["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        "mean": [float(value) for value in cfg["mean"]], "std": [float(value) for value in cfg["std"]],
        "gradcam_layer": gradcam_layer(model, args.image_size), "dataset": data.name,
        "split_fingerprint": data.split_fingerprint, "config": vars(args).copy(), "versions": utils.versions(model.pixel_mean.device), **more,
    }


def load_model(path, device="cpu"):
    """The model of a best_model.pth in eval mode, and its info: (model, dict of everything but the weights).

    Raises UserError where the file is missing, damaged, or holds something else.
    """
    info = utils.load_file(path)
    weights = info.pop("state_dict", None)
    if weights is None:
        raise UserError(f"{path} holds no model; best_model.pth beside it may")
    try:
        model = build_model(info["model_name"], info["num_classes"])
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"the weights in {path} do not fit {info.get('model_name')}: "
                        f"{utils.first_line(error)}") from None
    return model.to(device).eval(), info


def unnormalise(images, info):
    """The picture in a normalised batch (B, 3, S, S), as floats in [0, 1], for showing it."""
    mean, std = (torch.tensor(info[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images.detach().cpu() * std + mean).clamp(0, 1)


# Losses ---------------------------------------------------------------------------------------------------------

def cross_entropy(logits, labels, label_smoothing=0.0):
    """Cross-entropy in float32; logits (B, C), labels (B,) int64 or (B, C) probabilities. In nats, a mean over B."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def kd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """T^2 * KL between the softened outputs (Hinton et al. 2015), logits (B, C), a mean over B, in float32.

    forward: KL(teacher || student); reverse: KL(student || teacher). Gradients fall off as 1 / T^2, which the
    factor undoes, so that the weight against the cross-entropy means the same at every temperature.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float().detach() / temperature, dim=1)
    first, second = (student, teacher) if direction == "forward" else (teacher, student)
    # batchmean: the default "mean" divides by the number of classes too, and makes the term as much weaker.
    return F.kl_div(first, second, reduction="batchmean", log_target=True) * temperature**2


def standardise(logits):
    """Each image's logits (B, C) with mean 0 and standard deviation 1, in float32 (Sun et al. 2024)."""
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def lskd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """kd_loss of standardised logits (Sun et al. 2024, Logit Standardization in Knowledge Distillation).

    The temperature divides them after that; the authors use 2 or 3, and weigh this 9 against a cross-entropy of 0.1, which is
    ALPHA = 0.989. With two classes nothing is left to learn from: standardised logits are then the same for all images.
    """
    return kd_loss(standardise(student_logits), standardise(teacher_logits), temperature, direction)


def dkd_loss(student_logits, teacher_logits, labels, temperature, beta=8.0):
    """T^2 * (TCKD + beta * NCKD), a mean over B in float32 (Zhao et al. 2022, Decoupled Knowledge Distillation).

    TCKD is the KL between the shares of the true class and of all others, NCKD the KL among the others alone, both
    KL(teacher || student); labels (B,) int64. The authors' beta is 8, 6 or 2, by the pair of models; they use T = 4, add this to
    a cross-entropy of weight 1, which is ALPHA = 0.5, and raise its weight from zero over the first 20 epochs, which is not done here.
    """
    true = labels[:, None]
    others = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    others = others + (others >= true)  # (B, C - 1); a boolean mask would wait for the device

    def shares(logits):
        logits = logits.float() / temperature
        log_p = F.log_softmax(logits, 1)
        binary = torch.cat([log_p.gather(1, true), log_p.gather(1, others).logsumexp(1, keepdim=True)], 1)
        return binary, F.log_softmax(logits.gather(1, others), 1)
    parts = [F.kl_div(student, teacher, reduction="batchmean", log_target=True)
             for student, teacher in zip(shares(student_logits), shares(teacher_logits.detach()))]
    return temperature**2 * (parts[0] + beta * parts[1])


def dist_loss(student_logits, teacher_logits, temperature):
    """T^2 * (inter + intra), in float32 (Huang et al. 2022, Knowledge Distillation from A Stronger Teacher).

    1 - Pearson's correlation between the two models' softened probabilities (B, C): inter over the classes of each image,
    intra over the images of each class, so it needs batches of more than a few images, whole. Each is a mean. The T^2 is the authors'
    code's, not the paper's; they add 2 * dist to a cross-entropy of weight 1, which is ALPHA = 0.67, with T = 4 on CIFAR and 1 on ImageNet.
    """
    student, teacher = (F.softmax(logits.float() / temperature, 1) for logits in (student_logits, teacher_logits.detach()))

    def one_minus_correlation(a, b):  # of the rows
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()
    return temperature**2 * (one_minus_correlation(student, teacher) + one_minus_correlation(student.T, teacher.T))


def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha, direction="forward", label_smoothing=0.0, loss="kd"):
    """alpha * soft + (1 - alpha) * cross-entropy, as a dict of its 0-d parts: loss, ce_loss, kd_loss (soft, unweighted).

    `loss` names the soft part: kd, dkd, dist or lskd. Logits (B, C). alpha weighs and temperature softens in all of them, but each
    has a scale of its own: lskd's temperature divides standardised logits, dkd's other classes count eightfold, dist ends at 4 T^2.
    """
    ce = cross_entropy(student_logits, labels, label_smoothing)
    if loss == "dkd":
        kd = dkd_loss(student_logits, teacher_logits, labels, temperature)
    elif loss == "dist":
        kd = dist_loss(student_logits, teacher_logits, temperature)
    else:
        kd = {"kd": kd_loss, "lskd": lskd_loss}[loss](student_logits, teacher_logits, temperature, direction)
    return {"loss": alpha * kd + (1 - alpha) * ce, "ce_loss": ce, "kd_loss": kd}


# Teachers -------------------------------------------------------------------------------------------------------

def why_unfit(info, args, data):
    """Why the teacher of `info` (a checkpoint's dict) cannot teach on `data`, in a few words; None where it can."""
    image_size = args.teacher_image_size or args.image_size
    if info["model_name"] != args.teacher_model and not args.teacher_checkpoint:
        return f"it is {info['model_name']}, not {args.teacher_model}"
    if info["dataset"] != data.name or info["class_names"] != list(data.class_names):
        return f"it was trained on other classes ({info['dataset']}, {info['num_classes']} of them)"
    if info["split_fingerprint"] != data.split_fingerprint:
        return "it was trained on another split, and may have seen the validation images"
    if info["image_size"] != image_size:
        return f"it was trained at {info['image_size']} px, and --teacher-image-size is {image_size}"
    return None


def least_accuracy(num_classes):
    """Validation accuracy below which a teacher knows too little to teach: thrice chance, or, with two or three classes,
    where nobody can reach that, half the way from chance to perfect."""
    least = max(3 / num_classes, 2 / num_classes + 0.02)
    return least if least < 1 else (1 + 1 / num_classes) / 2


def freeze(teacher):
    """Put `teacher` in eval mode for good, whatever calls train() on it later, and out of every gradient."""
    teacher.requires_grad_(False).eval()
    teacher.train = lambda mode=True: teacher
    return teacher
