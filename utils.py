"""What the scripts share: errors, command line, device and precision, the pass over a loader, checkpoints, resuming.

The order follows a run: arguments are parsed and checked, a device is chosen, a run folder is opened, steps are made
and counted, the state is saved. Nothing here reads `config` except `parse_args`.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import errno
import functools
import hashlib
import io
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import config

FORMAT_VERSION = 1  # of every checkpoint; raised when a reader of the former format could misread the new one


class UserError(Exception):
    """Something a person can put right; its text is the one message they see."""
    code = 1  # exit status


class WrongUse(UserError):
    """Settings that cannot work with the data at hand, found before any work."""
    code = 2


class Stopped(Exception):
    """SIGINT or SIGTERM arrived and the state is saved; `code` is the exit status."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code


# Command line ---------------------------------------------------------------------------------------------------

def integer(low, high=None):
    def parse(text):
        with contextlib.suppress(ValueError):
            if int(text) >= low and (high is None or int(text) <= high):
                return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}{f' and at most {high}' if high else ''}, not {text!r}")
    return parse


def number(low, high=math.inf, low_allowed=True, high_allowed=True):
    """Parser of a finite number between `low` and `high`, the bounds themselves legal where allowed."""
    bounds = f"{'at least' if low_allowed else 'above'} {low:g}"
    if high < math.inf:
        bounds += f" and {'at most' if high_allowed else 'below'} {high:g}"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            above = value >= low if low_allowed else value > low
            below = value <= high if high_allowed else value < high
            if above and below and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"must be a number {bounds}, not {text!r}")
    return parse


def choice(*names):
    def parse(text):
        if text in names:
            return text
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}{suggest(text, names)}")
    return parse


def model_name(text):
    """Parser of a timm model name, with or without the tag of its pretrained weights."""
    tagged = "." in text
    if text in timm.list_pretrained() or (not tagged and timm.is_model(text)):
        return text
    known = timm.list_pretrained() if tagged else timm.list_models()
    raise argparse.ArgumentTypeError(
        f"must be a classifier from timm.list_models(), not {text!r}{suggest(text, known)}")


def existing_file(text):
    if Path(text).is_file():
        return text
    raise argparse.ArgumentTypeError(f"must be an existing file, not {text!r}")


def path(text):
    if text:
        return text
    raise argparse.ArgumentTypeError("must be a path, not an empty text")


def suggest(text, known):
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(text.lower(), lowered, n=3, cutoff=0.5)
    return f" (closest: {', '.join(lowered[name] for name in close)})" if close else ""


MAX_SEED = 2**32 - 1  # numpy's
BOTH, DISTILLATION, ALL = ("baseline", "distillation"), ("distillation",), ("baseline", "distillation", "evaluate")
SETTINGS = {  # constant of config.py: (scripts with its flag, parser of its value, help)
    "DATASET_NAME": (BOTH, choice("CIFAR100", "CIFAR10", "Flowers102", "Digits", "ImageFolder"),
                     "dataset: CIFAR100, CIFAR10, Flowers102, Digits or ImageFolder"),
    "DATASET_DIR": (ALL, path, "folder with train/<class>/* and test/<class>/*, for ImageFolder"),
    "DATA_DIR": (ALL, path, "folder that datasets are downloaded to, and where decoded pictures are kept"),
    "IMAGE_SIZE": (BOTH, integer(32), "side of the square image the student sees, px"),
    "TEACHER_IMAGE_SIZE": (DISTILLATION, integer(32), "side of the same image for the teacher, px; None: as the student"),
    "AUGMENTATION": (BOTH, choice("auto", "none", "crop", "flip_crop", "resized_crop"),
                     "augmentation: auto, none, crop, flip_crop or resized_crop"),
    "VAL_FRACTION": (BOTH, number(0, 1, False, False), "share of the training images held out for validation"),
    "SPLIT_SEED": (BOTH, integer(0, MAX_SEED), "seed of the choice of validation images"),
    "NUM_WORKERS": (ALL, integer(0), "processes that decode photographs"),
    "TEACHER_MODEL": (DISTILLATION, model_name, "timm name of the teacher"),
    "STUDENT_MODEL": (BOTH, model_name, "timm name of the student"),
    "PRETRAINED": (BOTH, None, "start from ImageNet weights"),
    "STUDENT_WEIGHTS": (BOTH, existing_file, "local file of the student's pretrained weights, instead of a download"),
    "TEACHER_WEIGHTS": (DISTILLATION, existing_file, "local file of the teacher's pretrained weights"),
    "TEACHER_CHECKPOINT": (DISTILLATION, existing_file, "best_model.pth of a teacher, instead of fine-tuning one"),
    "DISTILLATION_LOSS": (DISTILLATION, choice("kd", "dkd", "dist", "lskd"), "loss against the teacher: kd, dkd, dist or lskd"),
    "TEMPERATURE": (DISTILLATION, number(0, low_allowed=False), "temperature T of the soft targets"),
    "ALPHA": (DISTILLATION, number(0, 1), "weight of the soft targets; the labels get the rest"),
    "KL_DIRECTION": (DISTILLATION, choice("forward", "reverse"),
                     "forward: KL(teacher ‖ student), reverse: KL(student ‖ teacher)"),
    "BATCH_SIZE": (BOTH, integer(1), "images that go through the model at once"),
    "ACCUMULATE_STEPS": (BOTH, integer(1), "batches a training step is made of, one after the other, to save memory"),
    "NUM_EPOCHS": (BOTH, integer(1), "epochs of the student"),
    "LEARNING_RATE": (BOTH, number(0, low_allowed=False), "peak learning rate of the student"),
    "WEIGHT_DECAY": (BOTH, number(0), "weight decay of AdamW, not on biases and norms"),
    "WARMUP_EPOCHS": (BOTH, number(0), "epochs of linear warm-up"),
    "TEACHER_EPOCHS": (DISTILLATION, integer(1), "epochs of the teacher's own fine-tuning"),
    "TEACHER_LEARNING_RATE": (DISTILLATION, number(0, low_allowed=False), "peak learning rate of the teacher's own fine-tuning"),
    "CLIP_GRAD": (BOTH, number(0), "largest norm of the gradient, 0: not clipped"),
    "LABEL_SMOOTHING": (BOTH, number(0, 1, True, False), "label smoothing of the students' cross-entropy"),
    "MIXUP_ALPHA": (BOTH, number(0), "alpha of mixup, 0: off"),
    "CUTMIX_ALPHA": (BOTH, number(0), "alpha of cutmix, 0: off"),
    "EMA_DECAY": (BOTH, number(0, 1, True, False), "decay of the average of the weights that is validated and kept, 0: off"),
    "SEED": (BOTH, integer(0, MAX_SEED), "seed of initial weights, order and augmentation"),
    "DEVICE": (ALL, choice("auto", "cuda", "mps", "cpu"), "device: auto, cuda, mps or cpu"),
    "DETERMINISTIC": (BOTH, None, "bit-identical runs on CUDA too, at a cost in speed; CPU runs always are"),
    "CUDA_GRAPH": (BOTH, None, "capture the training step as a CUDA graph, faster at small batches on an NVIDIA GPU; not yet run on one"),
    "SAVE_MINUTES": (BOTH, number(0, low_allowed=False), "minutes between saves of the state within an epoch"),
    "AMP_DTYPE": (BOTH, choice("auto", "bf16", "fp16", "fp32"), "precision: auto, bf16, fp16 or fp32"),
    "CHECKPOINT_DIR": (ALL, path, "folder of the checkpoints"),
    "RESULTS_DIR": (ALL, path, "folder of histories, report and figures"),
}
OPTIONAL = {"DATASET_DIR", "TEACHER_IMAGE_SIZE", "STUDENT_WEIGHTS", "TEACHER_WEIGHTS", "TEACHER_CHECKPOINT"}  # may be None
# Settings that do not change what a run computes, so that a run goes on when they change.
NEUTRAL = {"dataset_dir", "data_dir", "num_workers", "device", "checkpoint_dir", "results_dir", "quick", "fresh",
           "fresh_teacher", "seeds", "save_minutes", "cuda_graph"}
# Settings that matter to a distilled student through its teacher alone.
TEACHER_ONLY = {"teacher_model", "teacher_weights", "teacher_checkpoint", "teacher_epochs", "teacher_learning_rate"}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print forty flags of usage above it
        self.exit(2, f"{self.prog}: error: {message}; --help lists every flag\n")


def parse_args(script, description, argv=None):
    """Parse the command line of `script` ("baseline", "distillation" or "evaluate") over config.py's defaults.

    Returns a namespace with one attribute per setting in lower case, and quick, fresh, fresh_teacher,
    baseline_checkpoint, distilled_checkpoint where the script has them. Exits with status 2 and one sentence on
    anything that cannot work and can be seen before the work.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    defaults = {name: getattr(config, name) for name in SETTINGS}
    if "--quick" in argv:
        defaults.update(config.QUICK)
    if script == "evaluate":
        defaults["DATASET_DIR"] = None  # the checkpoint knows its own
    for name, (scripts, parse, text) in SETTINGS.items():
        if script in scripts:
            how = {"type": parse} if parse else {"action": argparse.BooleanOptionalAction}
            parser.add_argument("--" + name.lower().replace("_", "-"), default=check_default(name, defaults[name], parser),
                                help=text, **how)
    parser.add_argument("--quick", action="store_true", help="small complete run on scikit-learn's digits, into quick/ "
                                                             "of both folders; other flags still apply")
    if script == "evaluate":
        for run in ("baseline", "distilled"):
            parser.add_argument(f"--{run}-checkpoint", type=existing_file, help=f"other {run} checkpoint than the default")
    else:
        parser.add_argument("--seeds", type=integer(0, MAX_SEED), nargs="+", help="train one student for each of these seeds, a "
                                                                        "finished one skipped; in place of --seed")
        parser.add_argument("--fresh", action="store_true", help="move a former run aside and start anew")
    if script == "distillation":
        parser.add_argument("--fresh-teacher", action="store_true", help="move the teacher aside and train it again")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_argument(unknown[0], script, parser))
    check_combinations(script, args, parser)
    if getattr(args, "seeds", None):
        if any(flag.split("=")[0] == "--seed" for flag in argv):
            parser.error("argument --seed: give --seed or --seeds, not both")
        args.seed = args.seeds[0]  # the teacher's, which is trained once
    if args.quick:
        args.checkpoint_dir, args.results_dir = str(Path(args.checkpoint_dir, "quick")), str(Path(args.results_dir, "quick"))
    return args


def unknown_argument(argument, script, parser):
    flag = argument.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    constant = flag[2:].replace("no-", "", 1).replace("-", "_").upper()
    if flag.startswith("--") and constant in SETTINGS:
        homes = [f"train_{home}.py" if home != "evaluate" else "evaluate.py" for home in SETTINGS[constant][0]]
        return f"{flag} is no flag of this script but of {' and '.join(homes)}"
    return f"unknown argument {argument!r}{suggest(flag, known)}"


def check_default(name, value, parser):
    """Hold what config.py says to the same rules as flags."""
    parse = SETTINGS[name][1]
    if value is None and name in OPTIONAL:
        return None
    try:
        if parse is None and not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"must be True or False, not {value!r}")
        return parse(str(value)) if parse else value
    except argparse.ArgumentTypeError as error:
        parser.error(f"{name} in config.py {error}")


def check_combinations(script, args, parser):
    """Refuse settings that are legal one by one but cannot work together."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda needs an NVIDIA GPU and a CUDA build of torch, and this torch finds none")
    if args.device == "mps" and not torch.backends.mps.is_available():
        parser.error("argument --device: mps needs an Apple GPU, and this torch finds none")
    if getattr(args, "deterministic", False) and args.device == "mps":
        parser.error("argument --deterministic: torch promises no deterministic results on Apple GPUs")
    if args.dataset_dir and not Path(args.dataset_dir).is_dir():
        parser.error(f"argument --dataset-dir: must be an existing folder, not {args.dataset_dir!r}")
    if script == "evaluate":
        return
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error("argument --seeds: each seed once")
    if args.dataset_name == "ImageFolder" and not args.dataset_dir:
        parser.error("argument --dataset-name: ImageFolder needs --dataset-dir DIR with train/<class>/* and test/<class>/*")
    if args.dataset_dir and args.dataset_name != "ImageFolder":
        parser.error(f"argument --dataset-dir: only for --dataset-name ImageFolder, not for {args.dataset_name}")
    roles = [("student", args.image_size)]
    if script == "distillation":
        roles.append(("teacher", args.teacher_image_size or args.image_size))
        if args.teacher_epochs < args.warmup_epochs and not args.teacher_checkpoint:
            parser.error(f"argument --teacher-epochs: {args.teacher_epochs} is less than --warmup-epochs {args.warmup_epochs:g}")
        if args.distillation_loss == "dkd" and (args.mixup_alpha or args.cutmix_alpha):
            parser.error("argument --distillation-loss: dkd sets the true class apart and knows no labels mixed by mixup or cutmix")
        if args.distillation_loss == "dist" and args.batch_size < 3:
            parser.error("argument --batch-size: dist correlates the images of a batch and needs at least 3 of them")
        if args.distillation_loss == "dist" and args.accumulate_steps > 1:
            parser.error("argument --accumulate-steps: dist correlates the images of a whole batch, which parts of it cannot add up to")
        if args.distillation_loss in ("dkd", "dist") and args.kl_direction == "reverse":
            parser.error(f"argument --kl-direction: {args.distillation_loss} has no direction to reverse, kd and lskd have")
        if args.fresh_teacher and args.teacher_checkpoint:
            parser.error("argument --fresh-teacher: no teacher is trained where --teacher-checkpoint gives one")
        if args.cutmix_alpha and roles[0][1] != roles[1][1]:
            parser.error("argument --cutmix-alpha: cutmix cuts one size of picture, so it needs --teacher-image-size to be "
                         "the student's")
    if args.num_epochs < args.warmup_epochs:
        parser.error(f"argument --num-epochs: {args.num_epochs} is less than --warmup-epochs {args.warmup_epochs:g}")
    if (args.mixup_alpha or args.cutmix_alpha) and args.batch_size * args.accumulate_steps % 2:
        parser.error(f"argument --batch-size: mixup and cutmix pair images up and need an even number, not {args.batch_size}")
    for role, size in roles:
        name, weights = getattr(args, f"{role}_model"), getattr(args, f"{role}_weights")
        taught_by_file = role == "teacher" and args.teacher_checkpoint
        if weights and not args.pretrained:
            parser.error(f"argument --{role}-weights: has no effect with --no-pretrained")
        if args.pretrained and not weights and not taught_by_file and not timm.models.is_model_pretrained(name):
            parser.error(f"argument --{role}-model: timm has no pretrained weights for {name}; --no-pretrained or "
                         f"--{role}-weights FILE")
        cfg = timm.get_pretrained_cfg(name)
        if cfg and cfg.fixed_input_size and cfg.input_size[-1] != size:
            parser.error(f"argument --{role}-model: {name} takes images of {cfg.input_size[-1]} px alone, not {size}")


# Start and end of a script --------------------------------------------------------------------------------------

def run_script(main):
    """Call `main()` and exit as DESIGN promises: 0, 1 with one message, 2, 130 after Ctrl-C, 143 after SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a class name that the terminal cannot show is no reason to stop
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    code = 1
    try:
        main()
        sys.stdout.flush()  # here, where a broken pipe has its message
        return 0
    except UserError as error:
        message, code = str(error), error.code
    except Stopped as stop:
        return stop.code
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "deterministic" in str(error):
            message = f"--deterministic is not possible with this model: {first_line(error)}"
        elif lacks_memory(error):
            message = (f"there is too little memory for this{peak_memory()}; close what else uses it or, in training, try a smaller "
                       "--batch-size, with --accumulate-steps to make up for it, or a smaller --image-size")
        else:
            raise
    except BrokenPipeError:  # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more as it ends
        message = "what read this script's output has gone away; the same command goes on from what was saved last"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
                               getattr(errno, "EDQUOT", None)):
            raise
        message = (f"{error.strerror}: {error.filename or 'while writing'}; make room or choose other folders, and the same "
                   "command goes on from what was saved last")
    print(f"error: {message}", file=sys.stderr)
    return code


_signal_code = None  # 130 or 143 once asked to stop
_can_save = False    # while an epoch is under way, which ends by saving


def _on_signal(number, frame):
    global _signal_code
    again, _signal_code = _signal_code is not None, 128 + number
    if again or not _can_save:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(_signal_code)


def stop(place):
    print(f"stopped after {place}, all saved; the same command (without --fresh) goes on from there")
    raise Stopped(_signal_code)


def setup(args):
    """Choose the device and return it; replace the "auto" of args.amp_dtype; print what was chosen, why it may be slow."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    wanted = getattr(args, "amp_dtype", "fp32")
    if wanted == "auto":
        # Emulated bf16 (GPUs before Ampere) is slower than fp16; on CPUs and Apple GPUs both are slower than float32.
        native = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = "fp32" if name != "cuda" else "bf16" if native else "fp16"
    args.amp_dtype = wanted
    if getattr(args, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
        torch.use_deterministic_algorithms(True)
    elif name == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change within a pass
    if getattr(args, "cuda_graph", False) and name != "cuda":
        print("cuda graph: only on NVIDIA GPUs; training goes on without")
    slow = ""
    if name == "cpu":
        windows = " (the default torch for Windows has no CUDA: see README, Troubleshooting)" if os.name == "nt" else ""
        slow = f"; without a GPU large images take long{windows}"
        keep_freed_memory()
    print(f"device: {device_name(device)}, {wanted}{slow}")
    return device


def keep_freed_memory():
    """Let this process keep the memory of large tensors it has freed, where its malloc is glibc's (most of Linux).

    glibc gives blocks above 32 MB back to the system at once, and the next tensor of that size gets them anew, page by
    page: a seventh of a training step at 224 px, half of an evaluation at 64 px, for a fifth more memory.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def device_name(device):
    """What a person calls the device: the GPU's name, or the number of CPU threads in use."""
    return {"cuda": torch.cuda.get_device_name, "mps": lambda: "Apple GPU",
            "cpu": lambda: f"CPU, {torch.get_num_threads()} threads"}[device.type]()


def first_line(error):
    """What an exception says, in at most one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def versions(device):
    """What a model was trained with: device, versions, and the git commit of these scripts (None outside a repository)."""
    return {"device": device_name(device), "commit": git_commit(), "python": platform.python_version(),
            "torch": str(torch.__version__), "timm": str(timm.__version__), "torchvision": str(torchvision.__version__),
            "numpy": str(np.__version__)}


def git_commit():
    try:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    return git.stdout.strip() or None


def duration(seconds):
    """Seconds as a person says them: '45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# The training step ----------------------------------------------------------------------------------------------

class TrainState(NamedTuple):
    """All that changes as a model trains, each with a state_dict: what last.pth holds."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None

    @property
    def validated(self):
        """The model whose accuracy counts and which best_model.pth holds."""
        return self.ema.module if self.ema else self.model


def new_state(model, steps_per_epoch, args):
    """AdamW without decay on biases and norms, linear warm-up then cosine per step, scaler for fp16, EMA if asked."""
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), lr=args.learning_rate, fused=True)
    total = args.num_epochs * steps_per_epoch
    warmup = min(round(args.warmup_epochs * steps_per_epoch), total - 1)
    scheduler = CosineAnnealingLR(optimizer, total - warmup)
    if warmup:
        scheduler = SequentialLR(optimizer, [LinearLR(optimizer, 1 / warmup, total_iters=warmup), scheduler], [warmup])
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=args.amp_dtype == "fp16")
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    return TrainState(model, optimizer, scheduler, scaler, ema)


def forward(model, images):
    """Logits (B, C) for `images` (B, 3, H, W) in [0, 1], normalised as `model` was pretrained."""
    return model((images - model.pixel_mean) / model.pixel_std)


def diagnose(logits, labels):
    """How sure a model is and how often right on a batch: "entropy", the mean in nats of its softmax, and "accuracy" (absent
    for mixed labels), 0-d tensors. Logits (B, C), labels (B,) or, mixed, (B, C)."""
    log_probabilities = torch.log_softmax(logits.detach().float(), 1)
    measured = {"entropy": -(log_probabilities.exp() * log_probabilities).sum(1).mean()}
    if labels.ndim == 1:
        measured["accuracy"] = (logits.detach().argmax(1) == labels).float().mean()
    return measured


def training_step(state, objective, args):
    """The function `step(images, labels)` that makes one update and returns what it measured, all on the device.

    images (B, 3, H, W) in [0, 1], or a pair of such: the student's and the teacher's size of the same pictures;
    labels (B,) int64 or, mixed, (B, C) floats. They go through the model in args.accumulate_steps parts. Returns a dict
    of 0-d tensors, which the next step may overwrite: what `objective` returns, "loss" among it, what `diagnose` says of
    the model, and "finite", whether loss and gradient were. From the first step on that is not finite, no update is made;
    under fp16 the scaler skips just the steps it must. With args.cuda_graph the step is a `captured` one.
    """
    device, parameters = state.model.pixel_mean.device, list(state.model.parameters())
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[args.amp_dtype]
    diverged = torch.zeros((), device=device)

    def backward(images, labels):
        """Add the gradient of a part of the batch; return what was measured, its share of the whole."""
        student_images = images[0] if isinstance(images, tuple) else images
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits = forward(state.model, student_images)
            measured = objective(images, logits, labels)
        measured = {name: value / args.accumulate_steps for name, value in (measured | diagnose(logits, labels)).items()}
        state.scaler.scale(measured["loss"]).backward()
        return {name: value.detach() for name, value in measured.items()}

    def update(images, labels):
        state.optimizer.zero_grad(set_to_none=True)
        parts = [backward(*part) for part in split(images, labels, args.accumulate_steps)]
        measured = {name: sum(part[name] for part in parts) for name in parts[0]}
        state.scaler.unscale_(state.optimizer)
        if args.clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        finite = torch.isfinite(norm) & torch.isfinite(measured["loss"])
        if not state.scaler.is_enabled():
            diverged.logical_or_(~finite)
            state.optimizer.found_inf = diverged  # the fused optimizer leaves all as it is where this is 1, without a sync
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return {**measured, "finite": finite}

    if args.cuda_graph and device.type == "cuda":
        update = captured(update, state.optimizer, state.scaler)

    def step(images, labels):
        with memory_explained(args):
            return update(images, labels)
    return step


GRAPH_WARM_UP = 3  # eager steps before the capture, in which cuDNN chooses its kernels and the optimizer makes its state


def captured(update, optimizer, scaler):
    """The training step `update(images, labels)` as a CUDA graph: some thousand kernels that start with one call.

    The first GRAPH_WARM_UP calls are ordinary steps, on a side stream as graphs want it; the next one captures the step,
    which computes nothing, and every call from then on copies its batch into the graph's own and replays it. So no state
    needs restoring. The learning rate is a tensor that each step reads, filled with what the scheduler gave the
    optimizer. Batches must keep their shape; the memory of a step stays reserved. Where the capture fails, training goes
    on with `update` itself. Raises UserError where torch cannot.
    """
    calls, graph, batch, measured = 0, None, None, None
    learning_rate = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)

    @contextlib.contextmanager
    def tensor_rate(capturable):
        """The optimizer with its learning rate in a tensor, in eager steps too: a float has other last bits."""
        outside = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
        learning_rate.fill_(outside[0][0])
        for group in optimizer.param_groups:
            group.update(lr=learning_rate, capturable=capturable)
        try:
            yield
        finally:
            for group, (lr, capturable) in zip(optimizer.param_groups, outside):
                group.update(lr=lr, capturable=capturable)

    def capture(images, labels):
        nonlocal graph, batch, measured
        batch = [tensor.clone() for tensor in tensors_of(images, labels)]
        optimizer.zero_grad(set_to_none=True)  # so that the gradients are the graph's own
        try:
            new = torch.cuda.CUDAGraph()
            # The stream once more outside, since a failed capture would leave its own in force;
            # thread_local: the threads that pin photographs' memory meanwhile are no part of it.
            with tensor_rate(True), torch.cuda.stream(side_stream()), \
                    torch.cuda.graph(new, stream=side_stream(), capture_error_mode="thread_local"):
                measured = update(tuple(batch[:-1]) if len(batch) > 2 else batch[0], batch[-1])
            graph = new
        except RuntimeError as error:
            message = f"cuda graph: the step could not be captured ({first_line(error.__context__ or error)})"
            try:
                torch.cuda.empty_cache()
            except RuntimeError:  # before about torch 2.13 a failed capture never ends
                raise UserError(f"{message}, and this torch cannot go on after that; use --no-cuda-graph") from None
            if scaler.is_enabled():
                scaler.update(scaler.get_scale())  # forgets the step that was not finished
            print(f"{message}; training goes on without")

    def step(images, labels):
        nonlocal calls
        calls += 1
        if calls <= GRAPH_WARM_UP:
            with tensor_rate(False):
                side_stream().wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side_stream()):
                    done = update(images, labels)
            torch.cuda.current_stream().wait_stream(side_stream())
            return done
        if calls == GRAPH_WARM_UP + 1:
            capture(images, labels)
        if graph is None:
            return update(images, labels)
        for kept, tensor in zip(batch, tensors_of(images, labels)):
            kept.copy_(tensor)
        learning_rate.fill_(optimizer.param_groups[0]["lr"])
        graph.replay()
        return dict(measured)
    return step


@functools.cache
def side_stream():
    """One for all captures, since memory that was used on one stream is not given to another. So one graph at a time: when it
    goes, torch frees what cuBLAS keeps for its stream."""
    return torch.cuda.Stream()


def tensors_of(images, labels):
    return [*images, labels] if isinstance(images, tuple) else [images, labels]


def split(images, labels, parts):
    """A batch in so many equal parts: (images, labels) each, a pair of image sizes staying a pair."""
    if isinstance(images, tuple):
        return zip(zip(*(view.chunk(parts) for view in images)), labels.chunk(parts))
    return zip(images.chunk(parts), labels.chunk(parts))


def lacks_memory(error):
    """Whether an exception says that memory ran out. cuDNN, left without a workspace, says that it found no engine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in (
        "out of memory", "can't allocate memory", "ALLOC_FAILED", "not enough memory", "unable to find an engine"))


@contextlib.contextmanager
def memory_explained(args):
    """Raise UserError with what to do where memory runs out within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        engine = f", or, if memory is not short, another --amp-dtype than {args.amp_dtype}" if "an engine" in str(error) else ""
        raise UserError(out_of_memory(args) + engine) from None


def out_of_memory(args):
    """The message where training does not fit: the peak, and the next smaller batch that makes the same update."""
    problem, half = f"there is too little memory for a batch of {args.batch_size}{peak_memory()}; try", args.batch_size // 2
    if args.cuda_graph and torch.cuda.is_initialized():
        problem += " --no-cuda-graph, which keeps less, or"
    if args.batch_size < 4:
        return f"{problem} a smaller --image-size"
    if getattr(args, "distillation_loss", None) == "dist":  # which has no parts of a batch
        return f"{problem} --batch-size {half} or a smaller --image-size"
    same = "the same updates" if args.batch_size % 2 == 0 else f"updates of {2 * args.accumulate_steps * half} images"
    return (f"{problem} --batch-size {half} --accumulate-steps {2 * args.accumulate_steps}, which makes {same} but for BatchNorm, "
            "or a smaller --image-size")


def peak_memory():
    return f" ({torch.cuda.max_memory_allocated() / 2**30:.1f} GB in use at most)" if torch.cuda.is_initialized() else ""


def rehearse(model, objective, loader, val_loader, info, args):
    """Make a few full-size steps and evaluations on a copy of `model`, throw them away, and print how long the run will take.

    So that too little memory shows in the first minute, and a run's length before it is spent.
    """
    on_gpu = model.pixel_mean.is_cuda  # where the first steps are slow, for cuDNN tries its kernels
    state = new_state(copy.deepcopy(model).train(), len(loader), args)
    step = training_step(state, objective, args)
    images, labels = next(loader.epoch(0))
    with torch.random.fork_rng(devices=[model.pixel_mean.device] if on_gpu else []):
        for _ in range(3 + GRAPH_WARM_UP * args.cuda_graph if on_gpu else 2):
            start = time.perf_counter()
            try:
                float(step(images, labels)["loss"])  # waits for the device
            except ValueError as error:  # BatchNorm over a single value
                raise WrongUse(f"--batch-size {args.batch_size} cannot be trained with: {first_line(error)}") from None
            seconds = time.perf_counter() - start
    batch = next(iter(val_loader))
    for _ in range(2 if on_gpu else 1):
        with memory_explained(args):  # a captured step keeps its memory meanwhile
            val_seconds = validate(state.model, [batch])["val_seconds"]
    del state, step
    torch.cuda.empty_cache()
    print(f"{info['run']}: {info['model_name']}, {args.num_epochs} epochs of {len(loader)} steps, "
          f"about {duration((seconds * len(loader) + val_seconds * len(val_loader)) * args.num_epochs)} in all", flush=True)


def train_one_epoch(state, step, loader, progress, save, save_minutes):
    """Train over the rest of epoch progress["epoch"], from progress["step"] on; return the row of its history.

    The sums of what `step` measures stay on the device and are read a few times a second, since every read waits
    for the device. `save()` is called every `save_minutes`, and when a signal asks to stop, which raises `Stopped`.
    Raises UserError where training diverges.
    """
    global _can_save
    epoch, count, device = progress["epoch"], progress["step"], state.model.pixel_mean.device
    if progress["random_states"]:
        torch.set_rng_state(progress["random_states"]["cpu"])
        if device.type == "cuda" and progress["random_states"]["cuda"] is not None:
            torch.cuda.set_rng_state(progress["random_states"]["cuda"])
    sums = {name: torch.tensor(value, device=device) for name, value in progress["sums"].items()}
    bad_step = torch.tensor(-1, device=device)  # the first step whose loss or gradient is not finite
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state.model.train()
    bar = tqdm(total=len(loader), initial=count, desc=f"epoch {epoch + 1}", leave=False, disable=None, mininterval=0.3)
    start, start_step, seconds_before = time.perf_counter(), count, progress["seconds"]
    shown = saved = start
    learning_rate = progress.get("learning_rate") or state.scheduler.get_last_lr()[0]  # of the step made last
    scaled = state.scaler.is_enabled()

    def read():
        if not scaled and int(bad_step) >= 0 or scaled and state.scaler.get_scale() < 1:
            where = f"step {int(bad_step)}" if not scaled else f"step {count}, where the gradient overflows at any scale of the fp16 scaler"
            raise UserError(f"training diverged: the loss or its gradient is not finite at {where} of epoch {epoch + 1}, learning rate "
                            f"{learning_rate:.2e}{f', scale {state.scaler.get_scale():g}' if scaled else ''}; try a lower --learning-rate, "
                            "a longer --warmup-epochs or --amp-dtype fp32; what was saved before is kept")
        return {name: float(value) / count for name, value in sums.items()}

    def save_now():
        read()
        progress.update(step=count, sums={name: float(value) for name, value in sums.items()}, random_states=random_states(device),
                        learning_rate=learning_rate, seconds=seconds_before + time.perf_counter() - start)
        save()

    _can_save = True
    try:
        for images, labels in loader.epoch(epoch, count):
            learning_rate = state.scheduler.get_last_lr()[0]
            measured = step(images, labels)
            state.scheduler.step()
            if state.ema:
                state.ema.update(state.model, step=epoch * len(loader) + count + 1)
            count += 1
            finite = measured.pop("finite")
            bad_step = torch.where((bad_step < 0) & ~finite, count, bad_step)
            if scaled:  # a step that the scaler skips may have no finite loss to add up
                measured = {name: torch.nan_to_num(value, 0.0, 0.0, 0.0) for name, value in measured.items()}
            measured["skipped"] = (~finite).float()
            for name, value in measured.items():
                # A new tensor, since the next step may overwrite value; unknown where a save of an older version lacks it.
                sums[name] = sums.get(name, math.nan if start_step else 0.0) + value
            bar.update()
            now = time.perf_counter()
            if now - shown > (5 if bar.disable else 0.3):  # also without a bar: a run that diverged should not go on for hours
                shown, values = now, read()
                accuracy = f"acc {values['accuracy']:.1%}, " if "accuracy" in values else ""
                memory = f", {torch.cuda.memory_reserved() / 2**30:.1f} GB" if device.type == "cuda" else ""
                speed = (count - start_step) * loader.batch_size / (now - start)
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {accuracy}{speed:.0f} images/s{memory}", refresh=False)
            if _signal_code:
                save_now()
                bar.close()
                stop(f"step {count} of epoch {epoch + 1}")
            if now - saved > 60 * save_minutes:
                save_now()
                saved = time.perf_counter()
        values = read()
    finally:
        bar.close()
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1, "train_loss": values["loss"], "ce_loss": values["ce_loss"], "kd_loss": values.get("kd_loss"),
        "train_accuracy": values.get("accuracy"), "learning_rate": learning_rate,
        **{name: values.get(name) for name in ("entropy", "teacher_entropy", "target_entropy", "teacher_accuracy")},
        "skipped_steps": round(values["skipped"] * count),
        "images_per_second": (count - start_step) * loader.batch_size / seconds if count > start_step else None,
        "seconds": seconds_before + seconds, "peak_memory_mb": peak_memory_mb(device),
    }


def random_states(device):
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def peak_memory_mb(device):
    """MB (2^20 bytes) that the device reserved at most since the last reset; None where torch does not count it."""
    return round(torch.cuda.max_memory_reserved() / 2**20) if device.type == "cuda" else None


@torch.inference_mode()
def infer(model, loader):
    """Logits (N, C) float32 and labels (N,) on the CPU, for every image of `loader` in its order; `model` in eval mode."""
    model.eval()
    batches = [(forward(model, images).float(), labels) for images, labels in loader]
    return torch.cat([logits for logits, _ in batches]).cpu(), torch.cat([labels for _, labels in batches]).cpu()


def validate(model, loader):
    """Plain cross-entropy and accuracy on `loader`, as columns of the history, and the seconds it took."""
    start = time.perf_counter()
    torch.cuda.empty_cache()  # or what torch keeps for training's tensors and for evaluation's, of other sizes, would add up
    logits, labels = infer(model, loader)
    torch.cuda.empty_cache()
    return {"val_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
            "val_accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "val_seconds": time.perf_counter() - start}


# Files ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def write_into_place(target, mode="w"):
    """Open a file beside `target` to write (text as UTF-8) and move it there when whole: no reader meets half a file."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".tmp")
    try:
        with open(beside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def save_file(checkpoint, target):
    """Write a checkpoint into place; through memory, since torch hides a full disk behind an error of its own."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with write_into_place(target, "wb") as file:
        file.write(buffer.getbuffer())


def sha256(target):
    with open(target, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()  # Python 3.10


def load_file(target):
    """Load a checkpoint onto the CPU without running any code it may carry. Raises UserError where it cannot be read."""
    target = Path(target)
    if not target.is_file():
        raise UserError(f"{target} is a folder, not a checkpoint" if target.is_dir() else f"there is no {target}")
    content = io.BytesIO(target.read_bytes())  # what fails from here on is the content's fault, not the disk's
    try:
        with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else contextlib.nullcontext():
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damage takes any form
        if isinstance(error, pickle.UnpicklingError) and \
                ("Unsupported global" in str(error) or "Unsupported operand 149" in str(error)):  # 149: pickle protocol 4 and later
            raise UserError(f"{target} carries code and was refused; nothing of it was run. A checkpoint of this project holds "
                            "tensors and plain values alone") from None
        raise UserError(f"{target} is damaged, or no checkpoint at all") from None
    version = checkpoint.get("format_version") if isinstance(checkpoint, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{target} is no checkpoint of this project" if version is None else
                        f"{target} is in format {version}, and this project reads format {FORMAT_VERSION}")
    return checkpoint


# A run's folder -------------------------------------------------------------------------------------------------

HISTORY = ("epoch", "train_loss", "ce_loss", "kd_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate",
           "images_per_second", "seconds", "peak_memory_mb", "skipped_steps", "entropy", "teacher_entropy", "target_entropy",
           "teacher_accuracy")


def teacher_args(args):
    """The settings of the teacher's own fine-tuning, under the names that `train` reads.

    Its seed is another than the student's, which thus sees other crops than the teacher was trained with: on its own, epoch by
    epoch, a teacher is surer and more often right than on any others. No label smoothing, which erases what the
    other classes have to say (Müller et al. 2019, When Does Label Smoothing Help?).
    """
    own = {name: value for name, value in vars(args).items()
           if name not in ("student_model", "student_weights", "distillation_loss", "temperature", "alpha", "kl_direction", *TEACHER_ONLY)}
    own |= {"num_epochs": args.teacher_epochs, "learning_rate": args.teacher_learning_rate, "teacher_image_size": None,
            "image_size": args.teacher_image_size or args.image_size, "fresh": args.fresh_teacher, "seeds": None,
            "seed": MAX_SEED - args.seed, "label_smoothing": 0.0}
    return argparse.Namespace(**own)


def is_finished(folder):
    """Whether the run in `folder` went to its end; a best_model.pth that was put there alone counts as finished."""
    if not (folder / "best_model.pth").is_file():
        return False
    if not (folder / "last.pth").is_file():
        return True
    last = load_file(folder / "last.pth")
    return last["progress"]["epoch"] == last["identity"]["num_epochs"]


def each_seed(args):
    """The settings of each student to train: those of `args` with one seed of --seeds after the other, or alone."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**{**vars(args), "seed": seed})


def run_folder(run, args):
    """checkpoints/<run>/, or below it seed_<n>/ for a student of several seeds."""
    return Path(args.checkpoint_dir, run, *([f"seed_{args.seed}"] if getattr(args, "seeds", None) else []))


def history_file(run, args):
    return Path(args.results_dir, *([f"seed_{args.seed}"] if getattr(args, "seeds", None) else []), f"{run}_history.csv")


def student_checkpoints(folder):
    """The best_model.pth of a student's folder and of its seed_<n>/ folders, those moved aside not among them."""
    found = [folder / "best_model.pth", *(path / "best_model.pth" for path in folder.glob("seed_*") if path.name[5:].isdigit())]
    return sorted(path for path in found if path.is_file())


def identity(info):
    """What must be the same for a run to go on where it stopped, of a checkpoint's `info`: settings, images, teacher."""
    same = {name: value for name, value in info["config"].items() if name not in NEUTRAL}
    same |= {"model": info["model_name"], "images or split": info["split_fingerprint"]}
    if "teacher" in info:
        same = {name: value for name, value in same.items() if name not in TEACHER_ONLY}
        same["teacher"] = info["teacher"]["sha256"]
    return same


_locks = []  # open for as long as this process lives


def lock(folder):
    """Keep `folder` for this process; the system lets go of it when the process ends, however it ends.

    The lock lies beside the folder, which may be moved aside. Raises UserError where another process has it.
    """
    file = folder.with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = open(file, "a", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        if folder not in [mine for mine, _ in _locks]:  # locked twice by one process is fine
            raise UserError(f"another process is training in {folder}; wait for it, stop it, or choose another "
                            "--checkpoint-dir") from None
        return
    _locks.append((folder, handle))


def check_room(model, info, args):
    """Raise UserError where the disk has too little room for the checkpoints of a run, before it starts."""
    copies = 2 * (3 + bool(args.ema_decay)) + 2  # weights, two moments and EMA in last.pth, weights in best_model.pth, each twice
    needed = copies * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    folder = run_folder(info["run"], args)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"the checkpoints in {folder} need {needed / 2**20:.0f} MB, and the disk has {free / 2**20:.0f} MB left; "
                        "make room or choose another --checkpoint-dir")


def open_run(info, args, fresh):
    """The former last.pth to go on from, or None after moving whatever else lies in the run's folder aside."""
    run, same = info["run"], identity(info)
    folder = run_folder(run, args)
    lock(folder)
    history = history_file(run, args)
    for leftover in [*folder.glob("*.tmp"), history.with_name(history.name + ".tmp")]:
        leftover.unlink(missing_ok=True)  # of a run that was killed while it saved
    reason = "--fresh" if fresh else "other settings"
    if (folder / "last.pth").exists() and not fresh:
        last = load_file(folder / "last.pth")
        if last["identity"] == same:
            return last
        before = last["identity"]
        reason = "other " + ", ".join(name for name in before | same if before.get(name) != same.get(name))
    if (folder / "last.pth").exists() or (folder / "best_model.pth").exists():
        n = next(n for n in range(1, sys.maxsize) if not folder.with_name(f"{folder.name}.{n}").exists())
        aside = folder.with_name(f"{folder.name}.{n}")
        os.replace(folder, aside)
        for seeds in aside.glob("seed_*"):  # the runs of several seeds stay where they are
            folder.mkdir(exist_ok=True)
            os.replace(seeds, folder / seeds.name)
        with contextlib.suppress(FileNotFoundError):
            shutil.move(history, aside)
        print(f"the former {run} run ({reason}) is now in {aside}")
    elif history.exists():  # of a run with another --checkpoint-dir
        n = next(n for n in range(1, sys.maxsize) if not history.with_suffix(f".{n}.csv").exists())
        os.replace(history, history.with_suffix(f".{n}.csv"))
        print(f"the history of another {run} run is now in {history.with_suffix(f'.{n}.csv')}")
    return None


def new_progress():
    """Where a run stands: epochs and steps done, sums of the epoch under way, rows of history, best accuracy, the learning
    rate of the step made last, torch's random state (of models with dropout; None: as it is)."""
    return {"epoch": 0, "step": 0, "sums": {}, "seconds": 0.0, "history": [], "best_accuracy": -1.0, "learning_rate": None,
            "random_states": None}


def save_last(state, progress, info, args):
    states = {name: part.state_dict() for name, part in state._asdict().items() if part is not None}
    save_file({"format_version": FORMAT_VERSION, "identity": identity(info), "progress": progress, "states": states},
              run_folder(info["run"], args) / "last.pth")


def restore(last, state):
    """Put the states of `last` (a loaded last.pth) back into `state`; return its progress."""
    for name, part in state._asdict().items():
        if part is not None:
            part.load_state_dict(last["states"][name])
    return last["progress"]


def save_best(target, model, info, row):
    """Write best_model.pth: `info` (plain values), the weights as contiguous CPU tensors, epoch and accuracy."""
    weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    save_file({**info, "state_dict": weights, "epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}, target)


def finish_epoch(state, progress, row, info, args):
    """Record the epoch of `row`: best_model.pth where it is the best so far, history, last.pth; print one line."""
    global _can_save
    run, best = info["run"], row["val_accuracy"] > progress["best_accuracy"]
    folder = run_folder(run, args)
    if best:
        save_best(folder / "best_model.pth", state.validated, info, row)
        progress["best_accuracy"] = row["val_accuracy"]
    row["seconds"] += row.pop("val_seconds")
    progress["history"].append(row)
    progress.update(epoch=row["epoch"], step=0, sums={}, seconds=0.0, random_states=random_states(state.model.pixel_mean.device))
    write_history(history_file(run, args), progress["history"])
    save_last(state, progress, info, args)
    accuracy = f"train {row['train_accuracy']:6.2%}  " if row["train_accuracy"] is not None else ""
    speed = f"{row['images_per_second']:.0f} images/s  " if row["images_per_second"] else ""
    print(f"{run} epoch {row['epoch']:>3}/{args.num_epochs}  loss {row['train_loss']:.4f}  {accuracy}"
          f"val {row['val_accuracy']:6.2%}{' *' if best else '  '}  lr {row['learning_rate']:.1e}  {speed}"
          f"{row['seconds']:.0f} s", flush=True)
    _can_save = row["epoch"] < args.num_epochs  # what comes between two epochs is stopped by the next one, which says so
    if _signal_code:
        stop(f"epoch {row['epoch']}")


def write_history(target, rows):
    with write_into_place(target) as file:
        writer = csv.DictWriter(file, HISTORY)
        writer.writeheader()
        writer.writerows(rows)


def choose_best(args, like):
    """Copy the best student by validation accuracy to checkpoints/best_model.pth; a tie goes to the baseline.

    Only students on the same dataset, classes and split as `like` (a checkpoint's dict) are comparable.
    """
    folder, best = Path(args.checkpoint_dir), None
    for run in ("baseline", "distilled"):
        for candidate in student_checkpoints(folder / run):
            info = load_file(candidate)
            if all(info[key] == like[key] for key in ("dataset", "class_names", "split_fingerprint")) and \
                    (best is None or info["val_accuracy"] > best[1]["val_accuracy"]):
                best = candidate, info
    if best:
        with write_into_place(folder / "best_model.pth", "wb") as file, open(best[0], "rb") as source:
            shutil.copyfileobj(source, file)
        print(f"best student so far: {best[0].parent.relative_to(folder)}, {best[1]['val_accuracy']:.2%} on validation images; "
              f"copied to {folder / 'best_model.pth'}")
