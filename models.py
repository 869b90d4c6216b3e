"""The losses, the models of students and teachers (built by timm), and their checkpoints.

Shapes: images (B, 3, H, W), floats in [0, 1]; labels (B,) int64 or, under mixup and cutmix, (B, C)
probabilities; logits (B, C). Losses are computed in float32, also under autocast. They are means
over the images of the batch, except for DIST's intra term, which is a mean over the classes.
"""
import argparse
import copy
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
    """T^2 * KL divergence of the softened outputs, in nats (Hinton et al. 2015).

    "forward" is Hinton's KL(teacher || student), "reverse" is KL(student || teacher). Soft-target
    gradients scale as 1 / T^2; the factor T^2 compensates. "batchmean" is the mean over images;
    torch's default, "mean", would also divide by the number of classes.
    """
    student_log_probs = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.float().detach() / temperature, dim=1)

    # F.kl_div(q, p) is KL(p || q).
    if direction == "forward":
        kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    else:
        kl = F.kl_div(teacher_log_probs, student_log_probs, reduction="batchmean", log_target=True)
    return kl * temperature**2


def lskd_loss(student_logits, teacher_logits, temperature, direction="forward"):
    """kd_loss of logits that are standardised per image (Sun et al. 2024). The authors' weights, 9
    for the KL and 0.1 for the cross-entropy, correspond to ALPHA = 9 / 9.1."""
    student_logits = standardise(student_logits)
    teacher_logits = standardise(teacher_logits)
    return kd_loss(student_logits, teacher_logits, temperature, direction)


def standardise(logits):
    """Shift and scale the logits of each image to mean 0 and standard deviation 1."""
    std, mean = torch.std_mean(logits.float(), dim=1, keepdim=True)
    return (logits.float() - mean) / (std + 1e-7)


def dist_loss(student_logits, teacher_logits, temperature):
    """T^2 * (inter + intra), from Huang et al. 2022. The authors' weights on CIFAR, 2 for this and
    1 for the cross-entropy, correspond to ALPHA = 2 / 3; their T is 4.

    inter (between classes) correlates the softened probabilities of each image across classes,
    intra (within a class) those of each class across the images of the batch. The factor T^2 is
    taken from the authors' code.
    """
    student_probs = F.softmax(student_logits.float() / temperature, dim=1)
    teacher_probs = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    inter = correlation_distance(student_probs, teacher_probs)
    intra = correlation_distance(student_probs.T, teacher_probs.T)
    return temperature**2 * (inter + intra)


def correlation_distance(a, b):
    """1 - the Pearson correlation between matching rows of `a` and `b`, averaged over rows."""
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def distill_loss(student_logits, teacher_logits, args):
    """The loss that args.distillation_loss selects. The caller weights it with ALPHA."""
    if args.distillation_loss == "dist":
        return dist_loss(student_logits, teacher_logits, args.temperature)
    if args.distillation_loss == "lskd":
        return lskd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)
    return kd_loss(student_logits, teacher_logits, args.temperature, args.kl_direction)


def teacher_diagnostics(teacher_logits, labels, args):
    """The teacher's entropy and accuracy on a batch, and the entropy of its soft targets, which are
    standardised (lskd) and softened by the temperature."""
    target_logits = teacher_logits
    if args.distillation_loss == "lskd":
        target_logits = standardise(teacher_logits)
    return {
        "teacher_entropy": entropy(teacher_logits),
        "target_entropy": entropy(target_logits / args.temperature),
        "teacher_accuracy": accuracy(teacher_logits, labels),
    }


def accuracy(logits, labels):
    """Top-1 accuracy, a 0-d tensor; nan for soft labels (B, C)."""
    if labels.ndim == 2:
        return torch.full((), torch.nan, device=logits.device)
    return (logits.detach().argmax(1) == labels).float().mean()


def entropy(logits):
    """Entropy of softmax(logits) in nats, averaged over images, a 0-d tensor: from 0 (all on one
    class) to ln C (uniform)."""
    probabilities = F.softmax(logits.detach().float(), 1)
    return torch.special.entr(probabilities).sum(1).mean()


# Building -----------------------------------------------------------------------------------------

def build_model(name, num_classes, pretrained=False, weights=None):
    """Build a timm classifier in channels_last. A new head is initialised from torch's global
    generator.

    If pretrained, the weights come from the local file `weights`, or else from timm's download.
    Prints what was loaded from a file. Raises UserError if the weights are unavailable or do not
    fit.

    `forward` normalises images with two buffers, `pixel_scale` and `pixel_shift` (3, 1, 1). They
    are not in the state_dict, whose keys stay those of timm.
    """
    if pretrained and weights:
        model = timm.create_model(name, num_classes=num_classes)
        num_tensors, has_head = load_weights(model, weights)
        about_head = "the head is new"
        if has_head:
            about_head = f"including the head, which also has {num_classes} classes"
        utils.print_once(f"{name}: {num_tensors} tensors loaded from {weights}; {about_head}")
    elif pretrained:
        model = download_model(name, num_classes)
    else:
        model = timm.create_model(name, num_classes=num_classes)

    set_normalisation(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    for module in model.modules():
        if isinstance(module, torch.nn.SiLU):
            # In-place SiLU makes autograd clone the input first, at the cost of an extra kernel.
            module.inplace = False
    return model.to(memory_format=torch.channels_last)


def set_normalisation(model, mean, std):
    """Register the two buffers with which `forward` normalises images; on a second call, replace
    them. `mean` and `std` have a number for each channel."""
    mean = torch.tensor(mean)[:, None, None]
    std = torch.tensor(std)[:, None, None]
    model.register_buffer("pixel_scale", 1 / std, persistent=False)
    model.register_buffer("pixel_shift", -mean / std, persistent=False)


def download_model(name, num_classes):
    """A timm model with pretrained weights, downloaded or from the local cache of the Hub. Raises
    UserError if they are unavailable."""
    cfg = timm.get_pretrained_cfg(name)
    try:
        check_download(cfg)
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # network and Hub errors have no common base class
        message = f"the weights of {name} are unavailable: {utils.first_line(error)}"
        if cfg.hf_hub_id:
            message += ("; download model.safetensors from "
                        f"https://huggingface.co/{cfg.hf_hub_id} by hand and pass it with "
                        "--student-weights (a teacher's with --teacher-weights), or train with "
                        "--no-pretrained or --quick")
        raise utils.UserError(message) from None


def check_download(cfg):
    """Make one request to the Hub if the weights are not cached. Without a network it fails within
    seconds, whereas the download itself would retry for a minute."""
    if not cfg.hf_hub_id:
        return
    filename = cfg.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, filename)
    if not isinstance(cached, str):
        huggingface_hub.model_info(cfg.hf_hub_id, timeout=10)


# Weight files -------------------------------------------------------------------------------------

# Keys under which training scripts save a state_dict; EMA first.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
# Prefixes added by DataParallel, torch.compile and Lightning.
PREFIXES = r"(?:module\.|_orig_mod\.|model\.)*"


def load_weights(model, path):
    """Load a weight file into a newly built timm `model`; return the number of tensors loaded and
    whether the classifier was among them. Only the classifier may be missing or differ in shape;
    anything else raises UserError."""
    state_dict = find_state_dict(read_weight_file(path), path)
    state_dict = strip_prefixes(state_dict, model)
    state_dict = convert_names(state_dict, model)
    mismatch = describe_mismatch(state_dict, model)
    if mismatch:
        raise utils.UserError(
            f"{path} does not fit {model.pretrained_cfg['architecture']}: {mismatch}")

    expected = model.state_dict()
    head = head_names(model)
    has_head = all(name in state_dict and state_dict[name].shape == expected[name].shape
                   for name in head)
    matching = {}  # without the head if it does not fit as a whole
    for name, tensor in state_dict.items():
        is_usable = has_head or name not in head
        if name in expected and is_usable:
            matching[name] = tensor
    if not are_finite(matching.values()):
        raise utils.UserError(f"{path} is unusable: some of its weights are NaN or infinite")
    model.load_state_dict(matching, strict=False)  # not strict: the head may be missing
    return len(matching), has_head


def read_weight_file(path):
    """Load a .safetensors file or a file written by torch.save, without running code from it. The
    format is detected from the content, not the extension."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: 8 bytes of header length, then the header in JSON
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError:
            raise utils.UserError(f"{path} is damaged, or not a weight file at all") from None
    # timm's train.py also saves its arguments, a Namespace, which is harmless to unpickle.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return utils.load_torch_file(path)


def find_state_dict(content, path):
    """The tensors by name from the `content` of a weight file, which may nest them in a dict under
    one of STATE_DICT_KEYS."""
    if not isinstance(content, dict):
        raise utils.UserError(f"{path} contains a {type(content).__name__}, not a state_dict")

    state_dict = content
    for key in STATE_DICT_KEYS:
        value = content.get(key)
        if isinstance(value, dict) and value:  # {} is an EMA that was off
            state_dict = value
            break

    tensors = {str(name): value for name, value in state_dict.items()
               if isinstance(value, torch.Tensor)}
    if not tensors:
        names = ", ".join(str(name) for name in list(state_dict)[:3])
        raise utils.UserError(f"{path} contains no tensors at its top level, but: "
                              f"{names or 'nothing'}; save only the model's state_dict")
    return tensors


def strip_prefixes(state_dict, model):
    """Remove the wrappers' prefix from the names, and drop tensors without it: they belong to
    something else, such as the loss. If there is no known prefix, all names stay as they are."""
    # The prefix is what precedes the name of the model's first tensor.
    first_name = next(iter(model.state_dict()))
    pattern = re.compile(f"({PREFIXES}){re.escape(first_name)}")
    prefixes = [match[1] for match in map(pattern.fullmatch, state_dict) if match]
    if not prefixes:
        return state_dict

    prefix = prefixes[0]
    stripped = {}
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            stripped[name.removeprefix(prefix)] = tensor
    return stripped


def convert_names(state_dict, model):
    """Rename the tensors to timm's current names, if timm has a converter for this model. Some
    converters also read the files of a model's original authors."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state_dict
    try:
        return convert(dict(state_dict), model)
    except Exception:  # a converter may fail in any way on a file of another model
        return state_dict


def describe_mismatch(state_dict, model):
    """Why `state_dict` does not fit the backbone of `model`, with the first names concerned; "" if
    it fits."""
    expected = model.state_dict()
    if not expected.keys() & state_dict.keys():
        return f"it has none of the model's names, but {', '.join(list(state_dict)[:3])}"

    mismatches = []
    head = head_names(model)
    for name, tensor in expected.items():
        is_counter = name.endswith("num_batches_tracked")  # some files leave them out
        if name in head or (is_counter and name not in state_dict):
            continue
        if name not in state_dict:
            mismatches.append(f"{name} is missing")
        elif state_dict[name].shape != tensor.shape:
            shape = tuple(state_dict[name].shape)
            mismatches.append(f"{name} has shape {shape}, not {tuple(tensor.shape)}")

    # More blocks than the model has: the file is of a deeper model. A part that the model does not
    # have at all, such as an auxiliary classifier, is harmless.
    parts = {name.split(".")[0] for name in expected}
    for name in state_dict:
        if name not in expected and name not in head and name.split(".")[0] in parts:
            mismatches.append(f"{name} is unknown")

    text = "; ".join(mismatches[:3])
    if len(mismatches) > 3:
        text += f"; and {len(mismatches) - 3} more"
    return text


def are_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


def head_names(model):
    """Names of the classifier's tensors, whose shapes depend on the number of classes."""
    classifiers = model.pretrained_cfg["classifier"] or []
    if isinstance(classifiers, str):
        classifiers = [classifiers]
    prefixes = tuple(f"{classifier}." for classifier in classifiers)
    return [name for name in model.state_dict() if name.startswith(prefixes)]


# Forward and inference ----------------------------------------------------------------------------

def forward(model, images):
    """Logits (B, C) for `images` (B, 3, H, W) in [0, 1]."""
    # Normalised here and not by the loader, since teacher and student may have other means and
    # standard deviations: (images - mean) / std, in one operation.
    return model(torch.addcmul(model.pixel_shift, images, model.pixel_scale))


@torch.inference_mode()
def infer(model, loader):
    """Logits (N, C) in float32 and labels (N,), both on the CPU and in the order of `loader`. Puts
    the model into eval mode."""
    model.eval()
    # The last batch has a shape of its own, for which trying algorithms would not pay. Some of the
    # algorithms tried would also take much memory.
    tries_algorithms = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    all_logits = []
    all_labels = []
    for images, labels in loader:
        all_logits.append(forward(model, images).float())
        all_labels.append(labels)
    torch.backends.cudnn.benchmark = tries_algorithms
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


# The teacher: check, load, freeze -----------------------------------------------------------------

def teacher_mismatch(info, args, data):
    """Why the teacher with this `info` (from its checkpoint) cannot teach on `data`; "" if it can.
    """
    expected = {
        "dataset": data.name,
        "class_names": list(data.class_names),
        "split_fingerprint": data.split_fingerprint,
        "image_size": args.teacher_image_size,
    }
    if not args.teacher_checkpoint:  # a given checkpoint may be of any architecture
        expected["model_name"] = args.teacher_model

    mismatches = []
    for key, value in expected.items():
        if info[key] == value:
            continue
        if len(str(value)) < 60:  # not a long list of classes
            mismatch = f"its {key} is {info[key]}, not {value}"
        else:
            mismatch = f"its {key} differs"
        if key == "split_fingerprint":
            mismatch += ", so it may have been trained on the validation images"
        mismatches.append(mismatch)
    return ", ".join(mismatches)


def min_useful_accuracy(chance):
    """The accuracy above which a model counts as better than chance. `chance` is the accuracy of
    always predicting the largest class."""
    for_many_classes = 3 * chance               # 100 classes: 3 %
    for_few_classes = chance + (1 - chance) / 5  # two classes: 60 %
    return min(for_many_classes, for_few_classes)


def load_teacher_model(path, name, num_classes):
    """Load a teacher; return the model, in eval mode, and its `info`. If it was not trained by this
    project (see load_external_teacher), `info` is None; otherwise `name` and `num_classes` are not
    used, since the checkpoint has its own."""
    file = weight_file(path)
    content = read_weight_file(file)
    if isinstance(content, dict) and "format_version" in content:
        return load_model(file)
    return load_external_teacher(path, name, num_classes), None


def load_external_teacher(path, name, num_classes):
    """Load a teacher that was not trained by this project, in eval mode: the timm model `name` with
    the weights of `path`, a weight file (see load_weights) or a folder in timm's layout.

    Raises UserError if its classifier does not have `num_classes` classes. The file does not tell
    whether its classes are in the same order, so measure its accuracy.
    """
    file = weight_file(path)
    model = build_model(name, num_classes)
    if Path(path).is_dir():
        use_timm_config(model, Path(path, "config.json"))
    num_tensors, has_head = load_weights(model, file)
    if not has_head:
        raise utils.UserError(f"{path} cannot be the teacher: it does not have a classifier with "
                              f"the {num_classes} classes of this dataset")
    utils.print_once(f"{name}: {num_tensors} tensors loaded from {path}, including the head")
    return model.eval()


def load_recorded_teacher(path, recorded):
    """Load the teacher of a student: (model in eval mode, info). `recorded` is the entry "teacher"
    of the student's checkpoint. For an external teacher it contains the "info" that the teacher's
    own file lacks."""
    if "info" not in recorded:
        return load_model(path)
    info = dict(recorded["info"])
    info["epoch"] = 0  # unknown
    info["val_accuracy"] = recorded["val_accuracy"]
    model = load_external_teacher(path, info["model_name"], info["num_classes"])
    set_normalisation(model, info["mean"], info["std"])
    return model, info


def teacher_identity(recorded):
    """What must be equal for two students to have had the same teacher. `recorded` is the entry
    "teacher" of a student's checkpoint."""
    identity = {"sha256": recorded["sha256"]}
    if "info" in recorded:  # its file does not say for which model and which input it is
        for name in ("model_name", "image_size", "mean", "std", "crop_pct", "interpolation"):
            identity[name] = recorded["info"][name]
    return identity


def weight_file(path):
    """`path` itself or, if it is a folder in timm's layout, the weight file in it."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise utils.UserError(f"{path} is not a folder in timm's layout, which contains config.json "
                          "and model.safetensors")


def use_timm_config(model, file):
    """Take the preprocessing from the config.json of a timm folder: mean, std, crop_pct and
    interpolation. Raises UserError if the file is invalid or is for another model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        architecture = config["architecture"]
        cfg = config.get("pretrained_cfg", config)  # older versions of timm do not nest it
        model.pretrained_cfg |= {"mean": cfg["mean"], "std": cfg["std"],
                                 "crop_pct": float(cfg["crop_pct"]),
                                 "interpolation": cfg["interpolation"]}
        set_normalisation(model, cfg["mean"], cfg["std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise utils.UserError(f"{file} is missing, or is not a config.json of timm") from None
    if architecture != model.pretrained_cfg["architecture"]:
        raise utils.UserError(f"{file} is for the model {architecture}; pass it as --teacher-model")


# Compared by exact type: subclasses, such as weight-standardised convolutions, change the weights
# in their forward pass, so neither folding nor casting them is safe.
PLAIN_CONVOLUTIONS = (torch.nn.Conv2d, Conv2dSame)
CASTABLE_LAYERS = (*PLAIN_CONVOLUTIONS, torch.nn.Linear)


def freeze_teacher(teacher, image_size, dtype=torch.float32):
    """Freeze `teacher` (on the CPU): no gradients, BatchNorm folded, weights in `dtype`, always in
    eval mode. Use only the returned model: `teacher` may be left half changed.

    Casting once saves the casts that autocast would make in each step.
    """
    if not are_finite(teacher.parameters()):
        raise utils.UserError("some of the teacher's weights are NaN or infinite")
    teacher.requires_grad_(False)
    teacher.eval()
    teacher = fold_batch_norms(teacher, image_size)
    for module in teacher.modules():
        if type(module) in CASTABLE_LAYERS:
            module.to(dtype)
    if not are_finite(teacher.parameters()):
        raise utils.UserError("the teacher's weights overflow in fp16; use --amp-dtype bf16 or "
                              "fp32")
    teacher.train = lambda mode=True: teacher  # it stays in eval mode
    return teacher


def fold_batch_norms(model, image_size):
    """A copy of `model` (in eval mode, on the CPU) with each BatchNorm folded into the convolution
    before it. In eval mode a BatchNorm only scales and shifts, which the convolution's weights and
    bias can do as well. It saves a GPU an operation for each of them.

    Adjacent children need not be adjacent in the forward pass (RepViT). So the copy is tested on
    random images; if its logits differ, `model` itself is returned.
    """
    folded = copy.deepcopy(model)
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if not isinstance(norm, torch.nn.BatchNorm2d) or type(conv) not in PLAIN_CONVOLUTIONS:
                continue
            if conv.out_channels != norm.num_features:
                continue
            setattr(parent, conv_name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
            activation = getattr(norm, "act", torch.nn.Identity())  # timm's BatchNormAct2d has one
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

def capture_cuda_graph(model, image_size, args):
    """If args.cuda_graph, make `model` replay CUDA graphs of its forward and backward pass.

    With small batches a GPU waits for Python: one graph replaces hundreds of kernel launches.
    Graphs are replayed only in the model's current mode (train or eval). They need full batches
    (args.batch_size), which TrainingLoader yields. In the other mode the model runs as before.
    """
    if not args.cuda_graph:
        return

    # With several seeds a model may be captured again. A model and its graphs refer to each other,
    # so only the garbage collector frees the previous graphs and their memory.
    vars(model).pop("forward", None)
    gc.collect()

    eager_forward = model.forward
    captured_mode = model.training
    # The capture runs the model, which updates BatchNorm's running statistics.
    original_state = copy.deepcopy(model.state_dict())
    latest_logits = torch.empty(0)

    def forward_with_autocast(images):
        nonlocal latest_logits
        # torch calls this for the capture and, from then on, in the other mode: in evaluation,
        # which has no autocast.
        if model.training != captured_mode:
            return eager_forward(images)
        # Logits that stay alive hold every parameter's AccumulateGrad node, which belongs to the
        # stream of this call. torch keeps the logits of its last warm-up iteration and of the
        # capture. A later backward pass would reuse their nodes and synchronise streams once for
        # each parameter, so the nodes are released here.
        latest_logits.detach_()
        # Autocast must be inside what is captured (pytorch #71631, #120930).
        with utils.autocast(images.device, args):
            logits = eager_forward(images)
        if logits._is_view():
            logits = logits.clone()  # of a head that ends in Flatten: detach_ below refuses views
        latest_logits = logits
        return logits

    model.forward = forward_with_autocast
    images = torch.zeros(args.batch_size, 3, image_size, image_size,
                         device=model.pixel_scale.device)
    images = images.to(memory_format=torch.channels_last)
    # Gives autograd's thread a CUDA context. cuBLAS would warn if it had to do so.
    torch.ones(1, device=images.device, requires_grad=True).exp().backward()
    try:
        torch.cuda.make_graphed_callables(model, (images,))
    except (RuntimeError, AssertionError) as error:
        # Memory may have run out, in the warm-up before the capture or in the capture, whose end
        # may then have raised an error of its own.
        cause = error
        while cause is not None:
            if utils.find_known(cause) is not None:
                raise cause from None
            cause = cause.__context__
        # A failed capture may leave CUDA unusable, so there is no falling back to eager mode.
        reason = utils.first_line(error)
        raise utils.UserError("this model cannot run as a CUDA graph; add --no-cuda-graph "
                              f"({reason})") from None

    latest_logits.detach_()
    model.load_state_dict(original_state)


def wrap_ddp(model):
    """`model` in DistributedDataParallel under torchrun, else `model` itself.

    On GPUs its BatchNorms are converted to SyncBatchNorm, which normalises by the whole batch.
    """
    if utils.WORLD_SIZE == 1:
        return model

    if model.pixel_scale.is_cuda:
        convert_sync_batchnorm(model)  # in place
    elif any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        print("on CPUs the BatchNorm of each process normalises by its own part of the batch")

    ddp_model = torch.nn.parallel.DistributedDataParallel(model)
    # Only process 0 validates and saves, so its running statistics need not be broadcast.
    ddp_model.broadcast_buffers = False
    # models.forward reads these two from the model that it is given.
    ddp_model.pixel_scale = model.pixel_scale
    ddp_model.pixel_shift = model.pixel_shift
    return ddp_model


# Checkpoints as models ----------------------------------------------------------------------------

INFO_TYPES = {  # entries of a best_model.pth that load_model and its callers rely on
    "model_name": str,
    "num_classes": int,
    "class_names": list,
    "image_size": int,
    "crop_pct": float,
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
CONFIG_KEYS = {  # settings under "config" that evaluate.py relies on
    "dataset_name", "dataset_dir", "augmentation", "val_fraction", "split_seed", "batch_size",
    "accumulate_steps", "num_epochs", "seed", "argv"}


def build_info(run, model, name, data, args, **more):
    """The metadata of a checkpoint, plain values: everything but weights, epoch and validation
    accuracy.

    `run` is "baseline", "teacher" or "distilled", `name` the model's timm name. `more` is added as
    it is: gradcam_layer for every model, teacher for a distilled student.
    """
    cfg = model.pretrained_cfg
    crop_pct = float(cfg["crop_pct"])
    if data.train.pixels is not None:
        crop_pct = 1.0  # small datasets held in memory: no border crop
    interpolation = "bicubic"  # data_loader resizes in one of these two ways
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
        "value_range": list(data.train.value_range) if data.train.value_range else None,
        "dataset": data.name,
        "split_fingerprint": data.split_fingerprint,
        "config": recorded_settings(args),
        "versions": utils.versions(model.pixel_scale.device),
        **more,
    }


def recorded_settings(args):
    """`args` as a dict, with the SHA-256 of the weight file (None without one), whose path says
    nothing of what is in it."""
    settings = dict(vars(args))
    for name in {"student_weights", "weights"} & settings.keys():  # of a student, of a teacher
        path = settings[name]
        settings[f"{name}_sha256"] = utils.sha256(path) if path else None
    return settings


def gradcam_layer(model, image_size):
    """Name of the layer for GradCAM: the last convolution, except for shortcuts, with a feature map
    of at least 4 x 4. On smaller maps GradCAM shows nothing useful. None if there is no such layer,
    or if the model's features are not (B, C, H, W), as in most transformers.

    Runs `model` once. Raises UsageError if it cannot take images of this size.
    """
    map_sizes = {}  # {convolution: its shorter side}, in the order of the forward pass

    def record_map_size(module, _, output):
        if isinstance(module, torch.nn.Conv2d):
            map_sizes[module] = min(output.shape[-2:])

    was_training = model.training
    model.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=model.pixel_scale.device)
    register_hook = torch.nn.modules.module.register_module_forward_hook  # for all modules
    try:
        with torch.inference_mode(), register_hook(record_map_size):
            features = model.forward_features(image)
    except (RuntimeError, ValueError, AssertionError) as error:  # raised by convolutions and timm
        raise utils.UsageError(f"{model.pretrained_cfg['architecture']} cannot take images of "
                               f"{image_size} px: {utils.first_line(error)}") from None
    model.train(was_training)

    # Transformers have features (B, tokens, C), several of them, or (B, H, W, C): Swin.
    is_tensor = isinstance(features, torch.Tensor)
    if not is_tensor or features.ndim != 4 or features.shape[1] != model.num_features:
        return None

    names = {module: name for name, module in model.named_modules()}
    layer = None
    previous_names = []
    for convolution, size in map_sizes.items():
        name = names[convolution]
        if size >= 4 and not is_shortcut(name, previous_names):
            layer = name
        previous_names.append(name)
    return layer


def is_shortcut(name, previous_names):
    """Whether the convolution `name` is on the shortcut of a residual block.

    Some models also call a convolution between two stages "downsample". On a shortcut, other
    convolutions of the same block ran before.
    """
    block = re.split(r"\.(?:downsample|shortcut)\b", name)[0]
    if block == name:
        return False
    return any(previous.startswith(f"{block}.") for previous in previous_names)


def load_model(path, device="cpu"):
    """Load a best_model.pth: (model in eval mode, info without the weights). Raises UserError if it
    is not a valid one."""
    info = utils.load_checkpoint(path)
    invalid = invalid_entries(info)
    if invalid:
        raise utils.UserError(f"{path} is not a model of this project; missing or invalid: "
                              f"{', '.join(invalid)}")

    weights = info.pop("state_dict")
    name = info["model_name"]
    try:
        model = build_model(name, info["num_classes"])
        # As recorded: another version of timm may have another mean and std for this model.
        set_normalisation(model, info["mean"], info["std"])
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise utils.UserError(f"{path} does not fit {name}: {utils.first_line(error)}") from None
    if not are_finite(weights.values()):
        raise utils.UserError(f"{path} is unusable: some of its weights are not finite")
    return model.to(device).eval(), info


def invalid_entries(info):
    """Keys of a checkpoint's `info` that are missing or have a wrong type or value."""
    invalid = [key for key, kind in INFO_TYPES.items() if not isinstance(info.get(key), kind)]
    if invalid:
        return invalid
    if not timm.is_model(info["model_name"]):  # timm would download a model "hf-hub:<anything>"
        return [f"model_name {info['model_name']}"]
    return sorted(CONFIG_KEYS - info["config"].keys())


# The best student ---------------------------------------------------------------------------------

def export_best_student(checkpoint_dir, info):
    """Copy the best student to best_model.pth and export it, in timm's layout, to best_model/.

    Only students with the dataset, classes and split of `info` (from a checkpoint) compete. Prints
    the run, the epoch and the time of saving, so that an old file is not taken for a new one.
    """
    folder = Path(checkpoint_dir)
    # Two scripts may finish at the same time. All processes of torchrun must call lock_folder,
    # since it contains a barrier.
    with utils.lock_folder(folder / "best_model"):
        if utils.RANK == 0:
            copy_best_student(folder, info)


def copy_best_student(folder, info):
    """export_best_student, once the folder is locked."""
    target = folder / "best_model.pth"
    for half_written in folder.glob(f"{target.name}.*.tmp"):  # by a script that was killed
        half_written.unlink()

    best_path = choose_best_student(folder, info)
    if best_path is None:
        if target.exists():
            print(f"{target} was left unchanged: no student was trained on these images, classes "
                  "and split")
        return

    run = best_path.parent.relative_to(folder).as_posix()
    saved_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(best_path.stat().st_mtime))
    with utils.atomic_write(target, "wb") as file:
        file.write(best_path.read_bytes())
    best = utils.load_checkpoint(target)
    print(f"best student so far: {run}, {best['val_accuracy']:.2%} on validation images (epoch "
          f"{best['epoch']}, saved {saved_at}); copied to {target}")

    origin = {"run": run, "epoch": best["epoch"], "val_accuracy": best["val_accuracy"],
              "saved": saved_at}
    export_timm_folder(target, folder / "best_model", origin)


def choose_best_student(folder, info):
    """Path of the student below `folder` with the best validation accuracy, among those with the
    images of `info`; None if there is none. A tie goes to the baseline. An invalid checkpoint is
    left out with a warning, since the run that has just finished is not at fault."""
    best_path = None
    best_accuracy = -1.0
    for run in ("baseline", "distilled"):
        for path in student_checkpoints(folder / run):
            try:
                _, checkpoint = load_model(path)
            except utils.UserError as error:
                print(f"warning: not considered for the best student: {error}")
                continue
            has_same_images = all(checkpoint[key] == info[key] for key in
                                  ("dataset", "class_names", "split_fingerprint"))
            is_best = checkpoint["val_accuracy"] > best_accuracy
            if has_same_images and is_best:
                best_path = path
                best_accuracy = checkpoint["val_accuracy"]
    return best_path


def student_checkpoints(folder):
    """Every best_model.pth in a student's folder and its seed_<n>/ folders. Runs that were moved
    aside (seed_0.1) are left out."""
    folders = [folder]
    for path in folder.glob("seed_*"):
        if path.name.removeprefix("seed_").isdigit():
            folders.append(path)
    files = [path / "best_model.pth" for path in folders]
    return sorted(file for file in files if file.is_file())


def unfair_differences(info, other_info, may_differ):
    """Phrases for whatever makes two students an unfair pair: settings that both have and that
    differ, except for those in `may_differ`, another model or another split. [] for a fair pair."""
    settings = info["config"]
    other_settings = other_info["config"]
    phrases = []
    common = settings.keys() & other_settings.keys()
    for name in sorted(common - may_differ):
        if settings[name] != other_settings[name]:
            phrases.append(f"{name} differs ({settings[name]} and {other_settings[name]})")
    if "student_model" not in common and info["model_name"] != other_info["model_name"]:
        phrases.append("the model differs")  # one of them is a teacher
    if info["split_fingerprint"] != other_info["split_fingerprint"]:
        phrases.append("the images or their validation split differ")
    return phrases


def export_timm_folder(file, folder, origin):
    """Export the model of a best_model.pth to a folder in timm's layout: model.safetensors and
    config.json, which also records `origin` (a dict)."""
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
    model_config = {"label_names": info["class_names"], "sha256": utils.sha256(file),
                    "origin": origin}
    temporary = folder.with_name(".new_best")
    previous = folder.with_name(".previous_best")

    if previous.exists() and not folder.exists():  # an export was killed
        utils.replace(previous, folder)
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model = model.to(memory_format=torch.contiguous_format)
        timm.models.save_for_hf(model, temporary, model_config=model_config,
                                safe_serialization=True)
        if folder.exists():
            utils.replace(folder, previous)  # fails as a whole if a file in it is in use
        utils.replace(temporary, folder)
        shutil.rmtree(previous, ignore_errors=True)
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        # Tensors that share memory, a full disk, or a file in use. The previous folder stays.
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not folder.exists():
            utils.replace(previous, folder)
        print(f"warning: {folder}/ was not updated to {file}: {utils.first_line(error)}")
