"""The losses; students and teachers from timm, forward and inference; checkpoints as models.

Shapes: images (B, 3, H, W), floats in [0, 1]; labels (B,) int64 or, under mixup and cutmix, (B, C)
probabilities; logits (B, C). Every loss is a mean over the batch, computed in float32 also under
autocast.
"""
import argparse
import copy
import functools
import gc
import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, convert_sync_batchnorm

import utils

# Losses -------------------------------------------------------------------------------------------

def cross_entropy(logits, labels, label_smoothing=0.0):
    """Cross-entropy in nats."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def kd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """T^2 * KL of the softened outputs, in nats (Hinton et al. 2015).

    forward: KL(teacher || student), Hinton's; reverse: KL(student || teacher). Gradients of the KL
    fall off with 1 / T^2, which T^2 undoes. "batchmean" is the mean over images; torch's default,
    "mean", would divide by the number of classes too.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float().detach() / temperature, dim=1)

    # kl_div(q, p) is KL(p || q).
    if direction == "forward":
        kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    else:
        kl = F.kl_div(log_teacher, log_student, reduction="batchmean", log_target=True)
    return kl * temperature**2


def lskd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """kd_loss of standardised logits (Sun et al. 2024, who train with ALPHA = 0.989)."""
    student_logits = standardise(student_logits)
    teacher_logits = standardise(teacher_logits)
    return kd_loss(student_logits, teacher_logits, temperature, direction)


def standardise(logits):
    """Logits with mean 0 and standard deviation 1 in each image."""
    std, mean = torch.std_mean(logits.float(), dim=1, keepdim=True)
    return (logits.float() - mean) / (std + 1e-7)


def dist_loss(student_logits, teacher_logits, temperature):
    """T^2 * (inter + intra) (Huang et al. 2022, who train with ALPHA = 0.67 and T = 4 on CIFAR).

    inter compares the softened probabilities of each image over the classes, intra those of each
    class over the images of the batch. The factor T^2 is that of the authors' code.
    """
    student = F.softmax(student_logits.float() / temperature, dim=1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    inter = correlation_distance(student, teacher)
    intra = correlation_distance(student.T, teacher.T)
    return temperature**2 * (inter + intra)


def correlation_distance(a, b):
    """1 - Pearson's correlation of the rows of `a` and `b`, the mean over rows."""
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def distill_loss(student_logits, teacher_logits, args):
    """The distillation loss that args.distillation_loss names, unweighted."""
    if args.distillation_loss == "dist":
        return dist_loss(student_logits, teacher_logits, args.temperature)
    if args.distillation_loss == "lskd":
        return lskd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)
    return kd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)


def teacher_diagnostics(teacher_logits, labels, args):
    """How sure and how accurate the teacher is, and the entropy of its targets in the loss."""
    targets = teacher_logits
    if args.distillation_loss == "lskd":
        targets = standardise(teacher_logits)
    return {
        "teacher_entropy": entropy(teacher_logits),
        "target_entropy": entropy(targets / args.temperature),
        "teacher_accuracy": accuracy(teacher_logits, labels),
    }


def accuracy(logits, labels):
    """Share of the batch that is right, a 0-d tensor; nan for mixed labels (B, C)."""
    if labels.ndim == 2:
        return torch.full((), torch.nan, device=logits.device)
    return (logits.detach().argmax(1) == labels).float().mean()


def entropy(logits):
    """Mean entropy in nats of the softmax of `logits`, a 0-d tensor: 0 is sure, ln C undecided."""
    probabilities = F.softmax(logits.detach().float(), 1)
    return torch.special.entr(probabilities).sum(1).mean()


# Building -----------------------------------------------------------------------------------------

def build_model(name, num_classes, pretrained=False, weights=None):
    """A timm classifier in channels_last; a new head is drawn from torch's global generator.

    `weights` is a local file instead of timm's download; one line says what was loaded of it.
    UserError where weights cannot be had. The buffers `pixel_scale` and `pixel_shift` (3, 1, 1),
    with which `forward` normalises, are not in the state_dict, which stays timm's own.
    """
    if pretrained and weights:
        model = timm.create_model(name, num_classes=num_classes)
        num_tensors, has_head = load_weights(model, weights)
        head = "the head is new"
        if has_head:
            head = f"its head too, since it has {num_classes} classes as here"
        print_once(f"{name}: {num_tensors} tensors loaded from {weights}; {head}")
    elif pretrained:
        model = download_model(name, num_classes)
    else:
        model = timm.create_model(name, num_classes=num_classes)

    set_normalisation(model)
    for module in model.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = False  # in place autograd clones the input first: one more kernel
    return model.to(memory_format=torch.channels_last)


print_once = functools.cache(print)  # the same line once, however many seeds are trained


def set_normalisation(model):
    """Give `model` the buffers of `forward`, from the mean and std of its pretrained_cfg."""
    mean = torch.tensor(model.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(model.pretrained_cfg["std"])[:, None, None]
    model.register_buffer("pixel_scale", 1 / std, persistent=False)
    model.register_buffer("pixel_shift", -mean / std, persistent=False)


def download_model(name, num_classes):
    """A timm model with the ImageNet weights of timm's download, or of its cache."""
    cfg = timm.get_pretrained_cfg(name)
    try:
        check_download(cfg)
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # of the network or the hub: they take any form
        message = f"the weights of {name} cannot be had: {utils.first_line(error)}"
        if cfg.hf_hub_id:
            message += (f"; fetch model.safetensors from https://huggingface.co/{cfg.hf_hub_id} by "
                        "hand for --student-weights, --teacher-weights, or take --no-pretrained, "
                        "or --quick")
        raise utils.UserError(message) from None


def check_download(cfg):
    """Ask the hub once for weights that are not in its cache: it raises within seconds, where the
    download itself would try for a minute."""
    if not cfg.hf_hub_id:
        return
    filename = cfg.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, filename)
    if not isinstance(cached, str):
        huggingface_hub.model_info(cfg.hf_hub_id, timeout=10)


# Weight files -------------------------------------------------------------------------------------

# Under these keys training scripts save a state_dict, EMA weights first.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
# Before the names DataParallel, torch.compile and Lightning put these.
PREFIXES = r"(?:module\.|_orig_mod\.|model\.)*"


def load_weights(model, path):
    """Load a weight file into a fresh timm `model`; return the number of tensors and whether the
    classifier is among them, which alone may be missing or of another shape. UserError where
    anything else does not fit."""
    state_dict = find_state_dict(read_weight_file(path), path)
    state_dict = strip_prefixes(state_dict, model)
    state_dict = convert_names(state_dict, model)
    misfit = describe_misfit(state_dict, model)
    if misfit:
        raise utils.UserError(
            f"{path} does not fit {model.pretrained_cfg['architecture']}: {misfit}")

    expected = model.state_dict()
    head = head_names(model)
    has_head = all(name in state_dict and state_dict[name].shape == expected[name].shape
                   for name in head)
    fitting = {}
    for name, tensor in state_dict.items():
        if name in expected and (has_head or name not in head):
            fitting[name] = tensor
    model.load_state_dict(fitting, strict=False)  # a new head stays as it is
    return len(fitting), has_head


def read_weight_file(path):
    """The content of a .safetensors file or of what torch.save wrote, without running code. Which
    of them it is the content says, whatever the name."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the length of its header, which is JSON
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError:
            raise utils.UserError(f"{path} is damaged, or no weight file at all") from None
    # timm's training script saves its arguments too, as a Namespace, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return utils.load_torch_file(path)


def find_state_dict(content, path):
    """The tensors by name in the `content` of a weight file, also where a dict surrounds them."""
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise utils.UserError(f"{path} holds no state_dict but a {type(content).__name__}")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def strip_prefixes(state_dict, model):
    """`state_dict` without a wrapper's prefix, and without what is not below it, where that makes
    the names fit."""
    anchor = next(iter(model.state_dict()))
    for name in state_dict:
        match = re.fullmatch(f"({PREFIXES}){re.escape(anchor)}", name)
        if match:
            prefix = match[1]
            return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
                    if name.startswith(prefix)}
    return state_dict


def convert_names(state_dict, model):
    """`state_dict` under the names of today's timm, for models of which it also reads the original
    authors' files."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state_dict
    try:
        return convert(dict(state_dict), model)
    except Exception:  # made for files of this model, it takes others in any way
        return state_dict


def describe_misfit(state_dict, model):
    """Why `state_dict` is not the body of `model`, with the first names at fault; "" if it is."""
    if not state_dict:
        return "it holds no tensors"
    expected = model.state_dict()
    if not expected.keys() & state_dict.keys():
        return f"none of its names is the model's: {', '.join(list(state_dict)[:3])}"

    misfits = []
    head = head_names(model)
    for name, tensor in expected.items():
        is_counter = name.endswith("num_batches_tracked")  # some files leave them out
        if name in head or (is_counter and name not in state_dict):
            continue
        if name not in state_dict:
            misfits.append(f"{name} is missing")
        elif state_dict[name].shape != tensor.shape:
            shape = tuple(state_dict[name].shape)
            misfits.append(f"{name} is {shape}, not {tuple(tensor.shape)}")

    # More blocks than the model has belong to a deeper one. Parts that it lacks altogether, as an
    # auxiliary classifier, do no harm.
    parts = {name.split(".")[0] for name in expected}
    for name in state_dict:
        if name not in expected and name not in head and name.split(".")[0] in parts:
            misfits.append(f"{name} is unknown")

    text = "; ".join(misfits[:3])
    if len(misfits) > 3:
        text += f"; and {len(misfits) - 3} more"
    return text


def head_names(model):
    """Names of the classifier's tensors, those that depend on the number of classes."""
    classifiers = model.pretrained_cfg["classifier"] or []
    if isinstance(classifiers, str):
        classifiers = [classifiers]
    prefixes = tuple(f"{classifier}." for classifier in classifiers)
    return [name for name in model.state_dict() if name.startswith(prefixes)]


# Forward and inference ----------------------------------------------------------------------------

def forward(model, images):
    """Logits (B, C) for `images` (B, 3, H, W) in [0, 1], normalised as `model` was pretrained."""
    return model(torch.addcmul(model.pixel_shift, images, model.pixel_scale))


@torch.inference_mode()
def infer(model, loader):
    """Logits (N, C) float32 and labels (N,) on the CPU, in the order of `loader`; in eval mode."""
    model.eval()
    all_logits = []
    all_labels = []
    for images, labels in loader:
        all_logits.append(forward(model, images).float())
        all_labels.append(labels)
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


# The teacher: whether it may teach, and how it is frozen ------------------------------------------

def teacher_mismatch(info, args, data):
    """Why the teacher of `info` (a checkpoint's dict) cannot teach on `data`; "" where it can."""
    expected = {
        "dataset": data.name,
        "class_names": list(data.class_names),
        "split_fingerprint": data.split_fingerprint,
        "image_size": args.teacher_image_size or args.image_size,
    }
    if not args.teacher_checkpoint:  # which may hold any architecture
        expected["model_name"] = args.teacher_model

    mismatches = []
    for key, value in expected.items():
        if info[key] == value:
            continue
        if len(str(value)) < 60:
            mismatch = f"its {key} is {info[key]}, not {value}"
        else:
            mismatch = f"its {key} differs"
        if key == "split_fingerprint":
            mismatch += ", so it may have seen the validation images"
        mismatches.append(mismatch)
    return ", ".join(mismatches)


def min_teacher_accuracy(num_classes):
    """The validation accuracy below which a teacher teaches noise: three times chance level, from
    50 classes on twice and 2 points; with two or three classes half-way from chance level to 1."""
    if num_classes <= 3:
        return 0.5 + 0.5 / num_classes
    return max(3 / num_classes, 2 / num_classes + 0.02)


def load_teacher_model(path, name, num_classes):
    """(model in eval mode, info) of a checkpoint of this project, or (model, None) of weights of
    the timm model `name` that were trained elsewhere, with their head as it is.

    `path` is a weight file (see load_weights) or a folder in timm's layout. UserError where its
    classifier is not one of `num_classes` classes. That these are the same classes in the same
    order no file says: measure the model before it teaches.
    """
    file = weight_file(path)
    content = read_weight_file(file)
    if isinstance(content, dict) and "format_version" in content:
        return load_model(file)

    model = build_model(name, num_classes)
    if Path(path).is_dir():
        use_timm_config(model, Path(path, "config.json"))
    num_tensors, has_head = load_weights(model, file)
    if not has_head:
        raise utils.UserError(f"{path} cannot teach here: it has no classifier of {num_classes} "
                              "classes, the number of this dataset")
    print_once(f"{name}: {num_tensors} tensors loaded from {path}, its head included")
    return model.eval(), None


def load_recorded_teacher(path, recorded):
    """(model in eval mode, info) of the teacher that a student's checkpoint describes in its entry
    "teacher". That of a teacher made elsewhere has the "info" that its own file lacks."""
    if "info" not in recorded:
        return load_model(path)
    info = {**recorded["info"], "epoch": 0, "val_accuracy": recorded["val_accuracy"]}
    model, _ = load_teacher_model(path, info["model_name"], info["num_classes"])
    return model, info


def weight_file(path):
    """The file that holds the weights of `path`: itself, or in a folder the one timm looks for."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise utils.UserError(f"{path} is no folder in timm's layout, which holds config.json and "
                          "model.safetensors")


def use_timm_config(model, file):
    """Normalise as the config.json of a timm folder says; UserError if it is of another model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        architecture = config["architecture"]
        cfg = config.get("pretrained_cfg", config)  # older versions of timm have one level alone
        model.pretrained_cfg |= {"mean": cfg["mean"], "std": cfg["std"]}
        set_normalisation(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise utils.UserError(f"{file} is missing, or no config.json of timm") from None
    if architecture != model.pretrained_cfg["architecture"]:
        raise utils.UserError(f"{file} is of the model {architecture}; give it as --teacher-model")


FOLDABLE = (torch.nn.Conv2d, Conv2dSame, torch.nn.Linear)  # subclasses do more with their weights


def freeze_teacher(teacher, image_size, dtype=torch.float32):
    """`teacher` (on the CPU) as it teaches: without gradients, its BatchNorms folded, its weights
    cast to `dtype` as autocast would in each step, and in eval mode whatever calls train()."""
    teacher = fold_batch_norms(teacher.requires_grad_(False).eval(), image_size)
    for module in teacher.modules():
        if type(module) in FOLDABLE:
            module.to(dtype)
    if not all(weight.isfinite().all() for weight in teacher.parameters()):
        raise utils.UserError("the teacher's weights do not fit into fp16; take --amp-dtype bf16 "
                              "or fp32")
    teacher.train = lambda mode=True: teacher
    return teacher


def fold_batch_norms(model, image_size):
    """A copy of `model` (in eval mode, on the CPU) with BatchNorms folded into the convolutions
    before them, which halves the operations of its forward pass.

    A convolution and a BatchNorm that follow each other as children need not follow each other in
    the forward pass (RepViT). So the copy is tried, and where its logits differ `model` itself is
    returned.
    """
    folded = copy.deepcopy(model)
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if not isinstance(norm, torch.nn.BatchNorm2d) or type(conv) not in FOLDABLE:
                continue
            if len(conv.weight) != norm.num_features:
                continue
            setattr(parent, conv_name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
            activation = getattr(norm, "act", torch.nn.Identity())  # timm's norms hold their own
            setattr(parent, norm_name, activation)
    folded.eval()

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, image_size, image_size, generator=generator)
    with torch.no_grad():
        logits = forward(model, images)
        folded_logits = forward(folded, images)
    if (folded_logits - logits).abs().max() < 0.01 * logits.abs().max():
        return folded
    return model


# CUDA graphs and DDP ------------------------------------------------------------------------------

def capture_cuda_graph(model, size, args):
    """`model`, which with --cuda-graph replays CUDA graphs of its forward and backward pass.

    At batch 16 a GPU waits for Python, which then starts one graph instead of hundreds of kernels.
    Graphs are replayed in the model's present mode (train or eval) and on whole batches; elsewhere
    it runs as before.
    """
    if not args.cuda_graph:
        return model

    # A model may be captured once more, for the next seed. Graphs hold their models, and these
    # their graphs, so only a collection frees the previous ones.
    vars(model).pop("forward", None)
    gc.collect()

    eager_forward = model.forward
    captured_mode = model.training
    state = copy.deepcopy(model.state_dict())
    captured_logits = None

    def forward(images):
        nonlocal captured_logits
        # Autocast belongs inside what is captured (pytorch #71631, #120930). Evaluation has none.
        if model.training != captured_mode:
            return eager_forward(images)
        with utils.autocast(images.device, args):
            captured_logits = eager_forward(images)
        return captured_logits

    model.forward = forward
    images = torch.zeros(args.batch_size, 3, size, size, device=model.pixel_scale.device)
    images = images.to(memory_format=torch.channels_last)
    try:
        torch.cuda.make_graphed_callables(model, (images,))
    except torch.OutOfMemoryError:
        raise  # utils.user_message has advice on it
    except (RuntimeError, AssertionError) as error:  # after which CUDA may be of no more use
        raise utils.UserError(f"--cuda-graph failed: {utils.first_line(error)}") from None

    # The graph holds on to its logits, and through them to autograd nodes of all parameters that
    # belong to the stream of the capture. Reused, each would cost an event in every step.
    captured_logits.detach_()
    captured_logits = None
    model.load_state_dict(state)  # warming up has moved BatchNorm's statistics
    return model


def wrap_ddp(model):
    """`model` as a loop calls it: as it is or, under torchrun, in DistributedDataParallel.

    On GPUs its BatchNorms then normalise by the whole batch.
    """
    if utils.WORLD_SIZE == 1:
        return model

    if model.pixel_scale.is_cuda:
        convert_sync_batchnorm(model)  # in place
    elif any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        print("on CPUs each process normalises (BatchNorm) by its own part of a batch")

    ddp_model = torch.nn.parallel.DistributedDataParallel(model)
    # Process 0 alone validates and saves, so its running statistics need not be sent in each step.
    ddp_model.broadcast_buffers = False
    ddp_model.pixel_scale = model.pixel_scale
    ddp_model.pixel_shift = model.pixel_shift
    return ddp_model


# Checkpoints as models ----------------------------------------------------------------------------

INFO_TYPES = {  # of what load_model and its callers read in a best_model.pth
    "model_name": str,
    "num_classes": int,
    "class_names": list,
    "image_size": int,
    "interpolation": str,
    "mean": list,
    "std": list,
    "dataset": str,
    "split_fingerprint": str,
    "config": dict,
    "versions": dict,
    "epoch": int,
    "val_accuracy": float,
    "state_dict": dict,
}
CONFIG_KEYS = {"dataset_name", "dataset_dir", "augmentation", "val_fraction", "split_seed",
               "batch_size", "accumulate_steps", "num_epochs", "seed", "argv"}  # evaluate.py's


def build_info(run, model, name, data, args, **more):
    """What a checkpoint of `run` holds beside weights, epoch and accuracy: plain values.

    `more` is added as it is: gradcam_layer of every model, teacher of a distilled student.
    """
    cfg = model.pretrained_cfg
    crop_pct = float(cfg["crop_pct"])
    if data.train.pixels is not None:
        crop_pct = 1.0  # images of 32 px have no edges to spare
    interpolation = "bicubic"
    if cfg["interpolation"] == "bilinear":
        interpolation = "bilinear"

    return {
        "run": run,
        "model_name": name,
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "image_size": args.image_size,
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "mean": [float(value) for value in cfg["mean"]],
        "std": [float(value) for value in cfg["std"]],
        "dataset": data.name,
        "split_fingerprint": data.split_fingerprint,
        "config": dict(vars(args)),
        "versions": utils.versions(model.pixel_scale.device),
        **more,
    }


def gradcam_layer(model, image_size):
    """Name of the last convolution with a map of 4 x 4 or more, on which GradCAM shows something;
    None where there is none. Runs `model` once; UserError where it takes no images of that size."""
    map_sizes = {}  # by convolution, in the order in which they run

    def record_map_size(module, _, output):
        if isinstance(module, torch.nn.Conv2d):
            map_sizes[module] = min(output.shape[-2:])

    was_training = model.training
    model.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=model.pixel_scale.device)
    register_hook = torch.nn.modules.module.register_module_forward_hook  # of all modules
    try:
        with torch.inference_mode(), register_hook(record_map_size):
            features = model.forward_features(image)
    except (RuntimeError, ValueError, AssertionError) as error:  # what convolutions and timm raise
        raise utils.UserError(f"{model.pretrained_cfg['architecture']} cannot take images of "
                              f"{image_size} px: {utils.first_line(error)}") from None
    model.train(was_training)

    large = [convolution for convolution, size in map_sizes.items() if size >= 4]
    if features.ndim != 4 or not large:  # a transformer's features are (B, tokens, width)
        return None
    names = {module: name for name, module in model.named_modules()}
    return names[large[-1]]


def load_model(path, device="cpu"):
    """(model in eval mode, info without weights) of a best_model.pth; UserError if it is none."""
    info = utils.load_checkpoint(path)
    wrong = wrong_entries(info)
    if wrong:
        raise utils.UserError(
            f"{path} holds no model of this project (see its {', '.join(wrong)})")

    weights = info.pop("state_dict")
    name = info["model_name"]
    try:
        model = build_model(name, info["num_classes"])
        model.load_state_dict(weights)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise RuntimeError("some weights are not finite")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise utils.UserError(f"{path} does not fit {name}: {utils.first_line(error)}") from None
    return model.to(device).eval(), info


def wrong_entries(info):
    """Keys of a checkpoint's dict that are missing or hold something else than a model's."""
    wrong = [key for key, kind in INFO_TYPES.items() if not isinstance(info.get(key), kind)]
    if wrong:
        return wrong
    if not timm.is_model(info["model_name"]):  # timm would download what other names say
        return [f"model_name {info['model_name']}"]
    return sorted(CONFIG_KEYS - info["config"].keys())


# The best student ---------------------------------------------------------------------------------

def export_best_student(checkpoint_dir, info):
    """Copy the best student to best_model.pth and, as timm writes models, to best_model/.

    Students compete that have the dataset, classes and split of `info` (a checkpoint's dict). One
    line says which run and epoch it is, and from when, so that an old file is not taken for new.
    """
    folder = Path(checkpoint_dir)
    file = folder / "best_model.pth"
    _lock = utils.lock_folder(folder / "best_model")  # two scripts may end at the same time
    if utils.RANK:
        return

    best_path = choose_best_student(folder, info)
    if best_path is None:
        if file.exists():
            print(f"{file} is left as it is: it is of other images, classes or split than these")
        return

    best = utils.load_checkpoint(best_path)
    run = best_path.parent.relative_to(folder).as_posix()
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(best_path.stat().st_mtime))
    with utils.atomic_write(file, "wb") as best_model:
        best_model.write(best_path.read_bytes())
    print(f"best student so far: {run}, {best['val_accuracy']:.2%} on validation images (epoch "
          f"{best['epoch']}, saved {saved}); copied to {file}")

    origin = {"run": run, "epoch": best["epoch"], "val_accuracy": best["val_accuracy"],
              "saved": saved}
    export_timm_folder(file, folder / "best_model", origin)


def choose_best_student(folder, info):
    """Path of the best student below `folder` on the images of `info`, by validation accuracy; a
    tie goes to the baseline. None where no student has these images."""
    best_path = None
    best_accuracy = 0.0
    for run in ("baseline", "distilled"):
        for path in student_checkpoints(folder / run):
            checkpoint = utils.load_checkpoint(path)
            same_images = all(checkpoint[key] == info[key] for key in
                              ("dataset", "class_names", "split_fingerprint"))
            is_best = best_path is None or checkpoint["val_accuracy"] > best_accuracy
            if same_images and is_best:
                best_path = path
                best_accuracy = checkpoint["val_accuracy"]
    return best_path


def student_checkpoints(folder):
    """The best_model.pth of a student's folder and of its seed_<n>/, not of runs moved aside."""
    folders = [folder]
    for path in folder.glob("seed_*"):
        if path.name.removeprefix("seed_").isdigit():
            folders.append(path)
    files = [path / "best_model.pth" for path in folders]
    return sorted(file for file in files if file.is_file())


def export_timm_folder(file, folder, origin):
    """Write the model of a best_model.pth as timm writes models: config.json, which also says the
    model's `origin` (a dict), and model.safetensors."""
    model, info = load_model(file)
    model.pretrained_cfg |= {
        "mean": info["mean"],
        "std": info["std"],
        "interpolation": info["interpolation"],
        "crop_pct": info["crop_pct"],
        "input_size": (3, info["image_size"], info["image_size"]),
        "test_input_size": None,
        "test_crop_pct": None,
    }
    more = {"label_names": info["class_names"], "sha256": utils.sha256(file), "origin": origin}
    beside = folder.with_name(".new_best")

    shutil.rmtree(folder, ignore_errors=True)
    try:
        model = model.to(memory_format=torch.contiguous_format)
        timm.models.save_for_hf(model, beside, model_config=more, safe_serialization=True)
        utils.replace(beside, folder)
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        # Tensors that share memory, a full disk.
        print(f"warning: {folder}/ could not be written: {utils.first_line(error)}")
