"""Every setting of the project: constants to edit, and below them the command line made of them.

Each constant is also a flag of the scripts it concerns: BATCH_SIZE is --batch-size, and its comment
here is the flag's help. A flag given by hand wins over --quick, and --quick over this file.
`python train_distillation.py --help` lists them all.
"""
import argparse
import contextlib
import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import timm

# Data
DATASET_NAME = "CIFAR100"     # CIFAR100, CIFAR10, Flowers102, Digits or ImageFolder (own pictures)
DATASET_DIR = None            # ImageFolder's: with train/<class>/*, test/<class>/* and perhaps val/
DATA_DIR = "data"             # folder of downloads, and of decoded pictures (in its decoded/)
IMAGE_SIZE = 224              # px, side of the square the student sees, at least 32
TEACHER_IMAGE_SIZE = None     # px, None: the student's; larger: the same crop in more detail
AUGMENTATION = "auto"         # auto (by the kind of images), none, crop, flip_crop, resized_crop
VAL_FRACTION = 0.1            # share of the training images held out to choose the epoch, in (0, 1)
SPLIT_SEED = 0                # chooses the held-out images; one teacher serves every SEED
NUM_WORKERS = 2               # processes that decode photographs; small images need none

# Models: any classifier of timm.list_models()
TEACHER_MODEL = "efficientnet_b2"   # timm's name of the teacher
STUDENT_MODEL = "efficientnet_b0"   # timm's name of the student
PRETRAINED = True             # start both from ImageNet weights
STUDENT_WEIGHTS = None        # local weight file (.pth, .safetensors) instead of timm's download
TEACHER_WEIGHTS = None        # the same for the teacher
TEACHER_CHECKPOINT = None     # best_model.pth to teach with, instead of fine-tuning TEACHER_MODEL

# Distillation: ALPHA * soft + (1 - ALPHA) * cross-entropy with the labels; soft is T^2 * KL for kd
DISTILLATION_LOSS = "kd"      # kd (Hinton), dkd (Zhao), dist (Huang) or lskd (Sun): see models.py
TEMPERATURE = 4.0             # T, above 0; Hinton et al. 2015 use 1 to 20
ALPHA = 0.7                   # 0 to 1, weight of the soft targets; 0 is plain cross-entropy
KL_DIRECTION = "forward"      # forward: KL(teacher || student), Hinton's; reverse: the other way

# Optimisation: AdamW, linear warm-up, then cosine to zero, per update
BATCH_SIZE = 16               # images a step; fits a 6 GB GPU at 224 px with room to spare
ACCUMULATE_STEPS = 1          # batches to one update, the large batch's but for BatchNorm
NUM_EPOCHS = 50               # epochs of the student, baseline and distilled alike
LEARNING_RATE = 1e-3          # peak, above 0; for AdamW from pretrained weights
WEIGHT_DECAY = 0.05           # AdamW's, kept off biases and norms
WARMUP_EPOCHS = 1.0           # epochs of linear warm-up, 0 to NUM_EPOCHS, fractions allowed
TEACHER_EPOCHS = 20           # epochs of the teacher's own fine-tuning
TEACHER_LEARNING_RATE = 1e-3  # peak, above 0, of the teacher's own fine-tuning
CLIP_GRAD = 1.0               # clip the gradient at this norm; 0: no clipping
LABEL_SMOOTHING = 0.0         # 0 to below 1, of the students' labels, not of the teacher's
MIXUP_ALPHA = 0.0             # Beta(alpha, alpha) of mixup, 0: off
CUTMIX_ALPHA = 0.0            # the same for cutmix; with both on, each batch takes one of them
EMA_DECAY = 0.0               # 0: off; 0.999, say: average of the weights, validated and kept

# Run
SEED = 42                     # weights of the new head, order of images, augmentation, dropout
DEVICE = "auto"               # auto, cuda, mps, cpu; auto takes the first there is
DETERMINISTIC = False         # bit-identical runs on CUDA too, slower; on CPUs they are anyway
AMP_DTYPE = "auto"            # auto, bf16, fp16, fp32; auto: on CUDA bf16 or else fp16; else fp32
CHECKPOINT_DIR = "checkpoints"   # folder of the checkpoints
RESULTS_DIR = "results"       # folder of histories, report and figures

# --quick: a complete small run in minutes without GPU, network or pretrained weights
QUICK = {
    "DATASET_NAME": "Digits", "DATASET_DIR": None, "IMAGE_SIZE": 32, "TEACHER_IMAGE_SIZE": None,
    "AUGMENTATION": "auto", "PRETRAINED": False, "STUDENT_WEIGHTS": None, "TEACHER_WEIGHTS": None,
    "TEACHER_CHECKPOINT": None, "BATCH_SIZE": 64, "NUM_EPOCHS": 15, "LEARNING_RATE": 4e-3,
    "TEACHER_EPOCHS": 22, "TEACHER_LEARNING_RATE": 3e-3,
}


# What the command line knows of a constant beyond its comment -------------------------------------

def value(convert, allowed, test, known=lambda: ()):
    """A parser of texts: `convert`s, then `test`s, or says what is `allowed`, closest names too."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if test(converted := convert(text)):
                return converted
        raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}{closest(text, known())}")
    return parse


def closest(text, known):
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(text.lower(), lowered, n=3, cutoff=0.5)
    return f" (closest: {', '.join(lowered[name] for name in close)})" if close else ""


def whole(low):
    return value(int, f"a whole number of at least {low}", lambda number: number >= low)


def real(bounds, test):
    return value(float, f"a number {bounds}", lambda number: math.isfinite(number) and test(number))


def choice(*names):
    return value(str, f"one of {', '.join(names)}", names.__contains__, lambda: names)


class Setting(NamedTuple):
    parse: object           # text to value; raises ArgumentTypeError with what is allowed
    optional: bool = False  # may be None
    neutral: bool = False   # changes nothing in what a run computes: a run goes on when it changes
    teacher: bool = False   # matters to a distilled student through its teacher alone
    scripts: tuple = ("baseline", "distillation")  # that have its flag


DISTILLATION, ALL = ("distillation",), ("baseline", "distillation", "evaluate")
MAX_SEED = 2**32 - 1  # numpy's
SEEDS = value(int, f"a whole number of at least 0 and at most {MAX_SEED}",
              lambda number: 0 <= number <= MAX_SEED)
BOOLEAN = value({"True": True, "False": False}.get, "True or False", lambda flag: flag is not None)
FILE = value(str, "an existing file", os.path.isfile)
PATH = value(str, "a path", bool)
MODEL = value(str, "a classifier from timm.list_models()",
              lambda name: name in timm.list_pretrained() or (timm.is_model(name) and "." not in name),
              lambda: timm.list_models() + timm.list_pretrained())
POSITIVE = real("above 0", lambda x: x > 0)

SETTINGS = {}
for names, setting in {
    "DATASET_NAME": Setting(choice("CIFAR100", "CIFAR10", "Flowers102", "Digits", "ImageFolder")),
    "DATASET_DIR": Setting(PATH, optional=True, neutral=True, scripts=ALL),
    "DATA_DIR CHECKPOINT_DIR RESULTS_DIR": Setting(PATH, neutral=True, scripts=ALL),
    "IMAGE_SIZE": Setting(whole(32)),
    "TEACHER_IMAGE_SIZE": Setting(whole(32), optional=True, scripts=DISTILLATION),
    "AUGMENTATION": Setting(choice("auto", "none", "crop", "flip_crop", "resized_crop")),
    "VAL_FRACTION": Setting(real("above 0 and below 1", lambda x: 0 < x < 1)),
    "SEED SPLIT_SEED": Setting(SEEDS),
    "NUM_WORKERS": Setting(whole(0), neutral=True, scripts=ALL),
    "STUDENT_MODEL": Setting(MODEL),
    "TEACHER_MODEL": Setting(MODEL, teacher=True, scripts=DISTILLATION),
    "PRETRAINED DETERMINISTIC": Setting(BOOLEAN),
    "STUDENT_WEIGHTS": Setting(FILE, optional=True),
    "TEACHER_WEIGHTS TEACHER_CHECKPOINT":
        Setting(FILE, optional=True, teacher=True, scripts=DISTILLATION),
    "DISTILLATION_LOSS": Setting(choice("kd", "dkd", "dist", "lskd"), scripts=DISTILLATION),
    "TEMPERATURE": Setting(POSITIVE, scripts=DISTILLATION),
    "ALPHA": Setting(real("from 0 to 1", lambda x: 0 <= x <= 1), scripts=DISTILLATION),
    "KL_DIRECTION": Setting(choice("forward", "reverse"), scripts=DISTILLATION),
    "BATCH_SIZE ACCUMULATE_STEPS NUM_EPOCHS": Setting(whole(1)),
    "TEACHER_EPOCHS": Setting(whole(1), teacher=True, scripts=DISTILLATION),
    "LEARNING_RATE": Setting(POSITIVE),
    "TEACHER_LEARNING_RATE": Setting(POSITIVE, teacher=True, scripts=DISTILLATION),
    "WEIGHT_DECAY WARMUP_EPOCHS CLIP_GRAD MIXUP_ALPHA CUTMIX_ALPHA":
        Setting(real("at least 0", lambda x: x >= 0)),
    "LABEL_SMOOTHING EMA_DECAY": Setting(real("at least 0 and below 1", lambda x: 0 <= x < 1)),
    "DEVICE": Setting(choice("auto", "cuda", "mps", "cpu"), neutral=True, scripts=ALL),
    "AMP_DTYPE": Setting(choice("auto", "bf16", "fp16", "fp32")),
}.items():
    SETTINGS |= dict.fromkeys(names.split(), setting)
NEUTRAL = {name.lower() for name, setting in SETTINGS.items() if setting.neutral}
NEUTRAL |= {"quick", "fresh", "fresh_teacher", "seeds"}  # flags that are no constants
TEACHER_ONLY = {name.lower() for name, setting in SETTINGS.items() if setting.teacher}


# Command line -------------------------------------------------------------------------------------

def comments():
    """{constant: its comment}, read from this file in its order, for --help."""
    text = Path(__file__).read_text(encoding="utf-8")
    joined = re.sub(r"\n +# ", " ", text)  # comments of several lines
    return dict(re.findall(r"^([A-Z_]+) = .*? +# (.*)$", joined, re.MULTILINE))


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print forty flags of usage above it
        self.exit(2, f"{self.prog}: error: {message}; --help lists every flag\n")


def parse_args(script, description, argv=None):
    """Parse the command line of `script`, "baseline", "distillation" or "evaluate".

    Returns a namespace with one attribute per setting in lower case, and quick, fresh, seeds,
    fresh_teacher, baseline_checkpoint, distilled_checkpoint where the script has them. Exits with
    status 2 and one sentence on what cannot work and can be seen before the work.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_settings(parser, script, QUICK if "--quick" in argv else {})
    add_other_flags(parser, script)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_argument(unknown[0], parser))
    for message in conflicts(script, args):
        parser.error(f"argument {message}")
    if getattr(args, "seeds", None):
        if any(argument.split("=")[0] == "--seed" for argument in argv):
            parser.error("argument --seed: give --seed or --seeds, not both")
        args.seed = args.seeds[0]  # the teacher's, which is trained once
    if args.quick:
        args.checkpoint_dir = str(Path(args.checkpoint_dir, "quick"))
        args.results_dir = str(Path(args.results_dir, "quick"))
    return args


def add_settings(parser, script, quick):
    """Make flags of the constants that concern `script`; all are held to the rules of flags."""
    helps = comments()
    for name, setting in SETTINGS.items():
        default = quick.get(name, globals()[name])
        if script == "evaluate" and name == "DATASET_DIR":
            default = None  # the checkpoint knows its own
        if not (default is None and setting.optional):
            try:
                default = setting.parse(str(default))
            except argparse.ArgumentTypeError as error:
                parser.error(f"{name} in config.py {error}")
        if script in setting.scripts:
            kind = {"type": setting.parse}
            if setting.parse is BOOLEAN:
                kind = {"action": argparse.BooleanOptionalAction}
            parser.add_argument("--" + name.lower().replace("_", "-"), default=default,
                                help=helps[name], **kind)


def add_other_flags(parser, script):
    switches = {"--quick": "small complete run on digits, into quick/ of both folders"}
    if script == "evaluate":
        for run in ("baseline", "distilled"):
            parser.add_argument(f"--{run}-checkpoint", type=FILE, help=f"another {run} checkpoint")
    else:
        parser.add_argument("--seeds", type=SEEDS, nargs="+",
                            help="one student for each of these seeds, finished ones are skipped")
        switches["--fresh"] = "move a former run aside and start anew"
    if script == "distillation":
        switches["--fresh-teacher"] = "move the teacher aside and train it again"
    for flag, text in switches.items():
        parser.add_argument(flag, action="store_true", help=text)


def unknown_argument(argument, parser):
    flag = argument.split("=")[0]
    constant = flag[2:].replace("no-", "", 1).replace("-", "_").upper()
    if flag.startswith("--") and constant in SETTINGS:
        scripts = [script for script in SETTINGS[constant].scripts if script != "evaluate"]
        homes = " and ".join(f"train_{script}.py" for script in scripts)
        return f"{flag} is no flag of this script but of {homes}"
    known = [option for action in parser._actions for option in action.option_strings]
    return f"unknown argument {argument!r}{closest(flag, known)}"


def conflicts(script, args):
    """Yield a sentence for each of the settings that are legal alone but cannot work together."""
    if args.dataset_dir and not Path(args.dataset_dir).is_dir():
        yield f"--dataset-dir: must be an existing folder, not {args.dataset_dir!r}"
    if script == "evaluate":
        return
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        yield "--seeds: each seed once"
    if args.dataset_name == "ImageFolder" and not args.dataset_dir:
        yield "--dataset-name: ImageFolder needs --dataset-dir DIR with train/ and test/<class>/*"
    if args.dataset_dir and args.dataset_name != "ImageFolder":
        yield f"--dataset-dir: only for --dataset-name ImageFolder, not for {args.dataset_name}"
    if args.num_epochs < args.warmup_epochs:
        yield f"--num-epochs: {args.num_epochs} is less than --warmup-epochs {args.warmup_epochs:g}"
    if (args.mixup_alpha or args.cutmix_alpha) and args.batch_size % 2:
        yield f"--batch-size: mixup and cutmix need an even number, not {args.batch_size}"
    yield from model_conflicts("student", args.image_size, args)
    if script == "distillation":
        yield from model_conflicts("teacher", args.teacher_image_size or args.image_size, args)
        yield from distillation_conflicts(args.distillation_loss, args)


def model_conflicts(role, size, args):
    name, weights = getattr(args, f"{role}_model"), getattr(args, f"{role}_weights")
    given = weights or (role == "teacher" and args.teacher_checkpoint)
    if weights and not args.pretrained:
        yield f"--{role}-weights: has no effect with --no-pretrained"
    if args.pretrained and not given and not timm.models.is_model_pretrained(name):
        ways = f"--no-pretrained or --{role}-weights FILE"
        yield f"--{role}-model: timm has no pretrained weights for {name}; {ways}"
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size and cfg.input_size[-1] != size:
        yield f"--{role}-model: {name} takes images of {cfg.input_size[-1]} px alone, not {size}"


def distillation_conflicts(loss, args):
    if args.teacher_epochs < args.warmup_epochs and not args.teacher_checkpoint:
        yield f"--teacher-epochs: less than --warmup-epochs {args.warmup_epochs:g}"
    if loss == "dkd" and (args.mixup_alpha or args.cutmix_alpha):
        yield "--distillation-loss: dkd knows no labels mixed by mixup or cutmix"
    if loss == "dist" and args.batch_size < 3:
        yield "--batch-size: dist correlates the images of a batch and needs at least 3 of them"
    if loss == "dist" and args.accumulate_steps > 1:
        yield "--accumulate-steps: dist compares the images of a whole batch, not of parts of it"
    if loss in ("dkd", "dist") and args.kl_direction == "reverse":
        yield f"--kl-direction: {loss} has no direction to reverse, kd and lskd have"
    if args.fresh_teacher and args.teacher_checkpoint:
        yield "--fresh-teacher: no teacher is trained where --teacher-checkpoint gives one"
    if args.cutmix_alpha and args.teacher_image_size not in (None, args.image_size):
        yield "--cutmix-alpha: cutmix cuts one size, so --teacher-image-size must be the student's"
