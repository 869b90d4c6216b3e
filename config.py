"""Every setting of the project: constants to edit, and below them the command line made of them.
Each constant is also a flag of the scripts it concerns: BATCH_SIZE is --batch-size, and its comment
here is the flag's help. A flag given by hand wins over --quick, and --quick over this file.
"""
import argparse
import contextlib
import difflib
import math
import re
import shlex
import sys
from pathlib import Path

import timm

import utils

# Data
DATASET_NAME = "CIFAR100"     # CIFAR100, CIFAR10, Flowers102, Digits or ImageFolder (own pictures)
DATASET_DIR = None            # folder of ImageFolder: train/<class>/*, test/<class>/*, perhaps val/
DATA_DIR = "data"             # folder of downloads and, in decoded/, of decoded pictures
IMAGE_SIZE = 224              # px, side of the square the student sees, at least 32
TEACHER_IMAGE_SIZE = None     # px, None: the student's; larger: the same crop in more detail
AUGMENTATION = "auto"         # none, crop (digits), flip_crop (small), resized_crop (photos), auto
VAL_FRACTION = 0.1            # share of the training images held out to choose the epoch, in (0, 1)
SPLIT_SEED = 0                # chooses the held-out images; one teacher serves every SEED
NUM_WORKERS = 2               # processes that decode photographs, make resized crops, 0 or more

# Models: any classifier of timm.list_models()
TEACHER_MODEL = "efficientnet_b2"   # timm's name of the teacher
STUDENT_MODEL = "efficientnet_b0"   # timm's name of the student
PRETRAINED = True             # start both from ImageNet weights
STUDENT_WEIGHTS = None        # student's weight file (.pth, .safetensors), None: timm's download
TEACHER_WEIGHTS = None        # teacher's weight file, None: timm's download
TEACHER_CHECKPOINT = None     # best_model.pth to teach with; None: TEACHER_MODEL, fine-tuned first

# Distillation: ALPHA * soft + (1 - ALPHA) * cross-entropy with the labels; soft is T^2 * KL for kd
DISTILLATION_LOSS = "kd"      # kd (Hinton), dist (Huang) or lskd (Sun): see models.py
TEMPERATURE = 4.0             # T that softens teacher and student, above 0; Hinton et al.: 1 to 20
ALPHA = 0.7                   # 0 to 1, weight of the soft targets; 0 is plain cross-entropy
KL_DIRECTION = "forward"      # forward: KL(teacher || student), Hinton's; reverse: the other way

# Optimisation: AdamW, linear warm-up, then cosine to zero, per update
BATCH_SIZE = 16               # images a step; fewer where GPU memory is short
ACCUMULATE_STEPS = 1          # batches to one update, which is a large batch's but for BatchNorm
NUM_EPOCHS = 50               # epochs of the student, baseline and distilled alike
LEARNING_RATE = 1e-3          # peak, above 0; for AdamW from pretrained weights
WEIGHT_DECAY = 0.05           # AdamW's, at least 0, kept off biases and norms
WARMUP_EPOCHS = 1.0           # epochs of linear warm-up, 0 to NUM_EPOCHS, fractions allowed
TEACHER_EPOCHS = 20           # epochs of the teacher's own fine-tuning
TEACHER_LEARNING_RATE = 1e-3  # peak, above 0, of the teacher's own fine-tuning
CLIP_GRAD = 1.0               # clip the gradient at this norm; 0: no clipping
LABEL_SMOOTHING = 0.1         # 0 to below 1, of the students' labels, not of the teacher's
MIXUP_ALPHA = 0.0             # Beta(alpha, alpha) of mixup; 0: off
CUTMIX_ALPHA = 0.0            # the same of cutmix; with mixup on too, each batch takes one of them
EMA_DECAY = 0.999             # of the weights' average, which is validated and kept; 0: off

# Run
SEED = 42                     # weights of the new head, order of images, augmentation, dropout
DEVICE = "auto"               # auto, cuda, cuda:1, mps, cpu; auto takes the first there is
DETERMINISTIC = False         # bit-identical runs on CUDA, slower; on CPUs equal threads suffice
AMP_DTYPE = "auto"            # auto, bf16, fp16, fp32; auto: on CUDA bf16 or else fp16; else fp32
CUDA_GRAPH = False            # on CUDA start a model's kernels as one graph; not tried on a GPU yet
CHECKPOINT_DIR = "checkpoints"   # folder of the checkpoints
RESULTS_DIR = "results"       # folder of histories, report and figures

# --quick: a complete small run in minutes without GPU, network or pretrained weights
QUICK = {
    "DATASET_NAME": "Digits", "DATASET_DIR": None, "IMAGE_SIZE": 32, "TEACHER_IMAGE_SIZE": None,
    "AUGMENTATION": "auto", "PRETRAINED": False, "STUDENT_WEIGHTS": None, "TEACHER_WEIGHTS": None,
    "TEACHER_CHECKPOINT": None, "BATCH_SIZE": 64, "NUM_EPOCHS": 10, "LEARNING_RATE": 3e-3,
    "TEACHER_EPOCHS": 22, "TEACHER_LEARNING_RATE": 3e-3, "LABEL_SMOOTHING": 0.0, "EMA_DECAY": 0.95,
    "ALPHA": 0.9,
}

# What a value may be ------------------------------------------------------------------------------

def value(convert, allowed, legal, names=(), none=False):
    """A `type` for argparse: converts a text, or says what is `allowed` and the closest `names`."""
    def parse(text):
        if text is None and none:  # as only a constant can be
            return None
        with contextlib.suppress(ValueError, TypeError):
            converted = convert(text)
            if text is not None and legal(converted):
                return converted
        raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}{closest(text, names)}")
    return parse


def closest(text, names):
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(text).lower(), lowered, n=3, cutoff=0.5)
    return f" (closest: {', '.join(lowered[name] for name in close)})" if close else ""


def whole(low, none=False):
    return value(int, f"a whole number of at least {low}", lambda x: x >= low, none=none)


def real(bounds, legal):
    return value(float, f"a number {bounds}", lambda x: math.isfinite(x) and legal(x))


def choice(*names):
    return value(str, f"one of {', '.join(names)}", lambda x: x in names, names)


MAX_SEED = 2**32 - 1  # numpy's
SEEDS = value(int, f"a whole number from 0 to {MAX_SEED}", lambda x: 0 <= x <= MAX_SEED)
POSITIVE = real("above 0", lambda x: x > 0)
NOT_NEGATIVE = real("of at least 0", lambda x: x >= 0)
BELOW_ONE = real("of at least 0 and below 1", lambda x: 0 <= x < 1)
BOOL = value({"True": True, "False": False}.get, "True or False", lambda x: x is not None)
PATH = value(str, "a path", bool)
FILE = value(str, "an existing file", lambda x: x and Path(x).is_file(), none=True)
FOLDER = value(str, "an existing folder", lambda x: x and Path(x).is_dir(), none=True)
MODELS = timm.list_models() + timm.list_pretrained()  # without and with a tag of weights
MODEL = value(str, "a classifier from timm.list_models()",
              lambda x: x in MODELS or (timm.is_model(x) and "." not in x), MODELS)

TRAINING = {  # both training scripts
    "DATASET_NAME": choice("CIFAR100", "CIFAR10", "Flowers102", "Digits", "ImageFolder"),
    "IMAGE_SIZE": whole(32), "VAL_FRACTION": real("above 0 and below 1", lambda x: 0 < x < 1),
    "AUGMENTATION": choice("auto", "none", "crop", "flip_crop", "resized_crop"),
    "STUDENT_MODEL": MODEL, "STUDENT_WEIGHTS": FILE, "PRETRAINED": BOOL,
    "BATCH_SIZE": whole(1), "ACCUMULATE_STEPS": whole(1), "NUM_EPOCHS": whole(1),
    "LEARNING_RATE": POSITIVE, "WEIGHT_DECAY": NOT_NEGATIVE, "WARMUP_EPOCHS": NOT_NEGATIVE,
    "CLIP_GRAD": NOT_NEGATIVE, "LABEL_SMOOTHING": BELOW_ONE, "EMA_DECAY": BELOW_ONE,
    "MIXUP_ALPHA": NOT_NEGATIVE, "CUTMIX_ALPHA": NOT_NEGATIVE, "SEED": SEEDS, "SPLIT_SEED": SEEDS,
    "DETERMINISTIC": BOOL, "CUDA_GRAPH": BOOL, "AMP_DTYPE": choice("auto", "bf16", "fp16", "fp32"),
}
DISTILLATION = {  # train_distillation.py
    "TEACHER_IMAGE_SIZE": whole(32, none=True), "KL_DIRECTION": choice("forward", "reverse"),
    "DISTILLATION_LOSS": choice("kd", "dist", "lskd"),
    "TEMPERATURE": POSITIVE, "ALPHA": real("from 0 to 1", lambda x: 0 <= x <= 1),
}
TEACHER = {  # train_distillation.py; they matter to the student through its teacher alone
    "TEACHER_MODEL": MODEL, "TEACHER_WEIGHTS": FILE, "TEACHER_CHECKPOINT": FILE,
    "TEACHER_EPOCHS": whole(1), "TEACHER_LEARNING_RATE": POSITIVE,
}
EVERYWHERE = {  # all three; a run goes on when they change, if AMP_DTYPE "auto" stays the same
    "DATASET_DIR": FOLDER, "DATA_DIR": PATH, "CHECKPOINT_DIR": PATH, "RESULTS_DIR": PATH,
    "NUM_WORKERS": whole(0), "DEVICE": value(str, "one of auto, cuda, cuda:1, mps, cpu",
                                             re.compile(r"auto|cuda(:\d+)?|mps|cpu").fullmatch),
}
SETTINGS = TRAINING | DISTILLATION | TEACHER | EVERYWHERE
FLAGS = {"baseline": TRAINING | EVERYWHERE, "distillation": SETTINGS, "evaluate": EVERYWHERE}
TEACHER_ONLY = {name.lower() for name in TEACHER}
MAY_CHANGE_ON_RESUME = {*map(str.lower, EVERYWHERE), "argv", "quick", "fresh", "fresh_teacher", "seeds"}


# Command line -------------------------------------------------------------------------------------

def parse_args(script, description, argv=None):
    """All settings of `script` ("baseline", "distillation", "evaluate") in lower case, its other
    flags and argv. Exits with status 2 and one sentence on what cannot work."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(None, argparse.SUPPRESS, description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if utils.RANK:
        parser.error = parser.print_help = lambda *_: sys.exit()  # process 0 says it
    add_settings(parser, script, argv)
    add_other_flags(parser, script)
    args, unknown = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    for word in (*unknown, *(word for word in argv if word.split("=")[-1] == "--")):
        parser.error(unknown_argument(word, script, args))
    if script == "evaluate" and utils.TORCHRUN:
        parser.error("evaluate.py runs as one process, without torchrun")
    if script != "evaluate":
        for conflict in conflicts(script, args, argv):
            parser.error(f"argument {conflict}")  # ends the script
        args.seed = (args.seeds or [args.seed])[0]  # the teacher's, which is trained once
    args.checkpoint_dir = str(Path(args.checkpoint_dir, "quick" if args.quick else ""))
    args.results_dir = str(Path(args.results_dir, "quick" if args.quick else ""))
    return args


def add_settings(parser, script, argv):
    """Make flags of the constants that concern `script`; all are held to the rules of flags."""
    text = Path(__file__).read_text(encoding="utf-8").split("# What a value may be")[0]
    quick = globals().get("QUICK")
    if not isinstance(quick, dict):
        parser.error(f"QUICK in config.py must be a dict of settings, not {quick!r}")
    texts = dict(re.findall(r"^(\w+) *[:=](?:.*?# *(.*)|.*)$", text, re.M))
    for name in sorted((SETTINGS.keys() - texts) | ({*texts, *quick} - {*SETTINGS, "QUICK"})):
        wrong = "is missing" if name in SETTINGS else f"is no setting{closest(name, SETTINGS)}"
        parser.error(f"{name} in config.py {wrong}")
    of_checkpoint = {"DATASET_DIR": None} if script == "evaluate" else {}
    changed = (quick if "--quick" in argv else {}) | of_checkpoint
    for name in [name for name in globals() if name in SETTINGS]:
        parse, default = SETTINGS[name], changed.get(name, globals()[name])
        try:
            default = parse(None if default is None else str(default))
        except argparse.ArgumentTypeError as error:
            parser.error(f"{name} in config.py {error}")
        if name in FLAGS[script]:
            how = {"action": argparse.BooleanOptionalAction} if parse is BOOL else {"type": parse}
            how["help"] = f"{texts.get(name, '')} (default: {default})".replace("%", "%%")
            parser.add_argument("--" + name.lower().replace("_", "-"), default=default, **how)


def add_other_flags(parser, script):
    parser.add_argument("--quick", action="store_true", help="small complete run, saved in quick/")
    if script == "evaluate":
        for run in ("baseline", "distilled"):
            parser.add_argument(f"--{run}-checkpoint", type=FILE, help=f"another {run} checkpoint")
        return
    parser.add_argument("--fresh", action="store_true", help="move a former run aside, start anew")
    if script == "distillation":
        parser.add_argument("--fresh-teacher", action="store_true", help="the same for the teacher")
    parser.add_argument("--seeds", type=SEEDS, nargs="+", help="a student for each of these seeds")


def constant_of(flag):
    """BATCH_SIZE of --batch-size=16, PRETRAINED of --no-pretrained."""
    return re.sub("^--(no-)?", "", flag.split("=")[0]).replace("-", "_").upper()


def unknown_argument(argument, script, args):
    flag, constant = argument.split("=")[0], constant_of(argument)
    homes = [f"train_{home}.py" for home, flags in FLAGS.items() if constant in flags]
    if flag.startswith("--") and homes and constant not in FLAGS[script]:
        return f"{flag} is no flag of this script but of {' and '.join(homes)}"
    known = ["--" + name.replace("_", "-") for name in vars(args)]
    return f"unknown argument {argument!r}{closest(flag, known)}; --help lists every flag"


def format_command(script, argv):
    """What to type for `script` with those flags of `argv` that it has, each once, but --fresh."""
    training, flags = script != "evaluate", {}
    for word in argv:
        if word.startswith("--"):
            words = flags[constant_of(word)] = []
        words.append(word)
    known = {*FLAGS[script], "QUICK", "SEEDS" if training else ""}
    kept = [word for name, words in flags.items() if name in known for word in words]
    return shlex.join(["python", f"train_{script}.py" if training else "evaluate.py", *kept])


def conflicts(script, args, argv):
    """Yield a sentence for each of the settings that are legal alone but cannot work together."""
    seeds = args.seeds or []
    if len({*seeds}) < len(seeds) or seeds and "SEED" in map(constant_of, argv):
        yield "--seeds: each seed once, and no --seed beside them"
    if (args.dataset_name == "ImageFolder") != bool(args.dataset_dir):
        yield "--dataset-dir: DIR with train/ and test/<class>/*, only for and with ImageFolder"
    if args.num_epochs < args.warmup_epochs:
        yield f"--num-epochs: {args.num_epochs} is less than --warmup-epochs {args.warmup_epochs:g}"
    if args.cuda_graph and args.accumulate_steps * utils.WORLD_SIZE > 1:
        yield "--cuda-graph: a replay writes over gradients, so no --accumulate-steps, no torchrun"
    unit = utils.WORLD_SIZE * (2 if args.mixup_alpha or args.cutmix_alpha else 1)
    if args.batch_size % unit:
        yield f"--batch-size: must be a multiple of {unit}, which torchrun, mixup and cutmix share"
    yield from model_conflicts("student", args.image_size, args)
    if script == "baseline":
        return
    yield from model_conflicts("teacher", args.teacher_image_size or args.image_size, args)
    loss = args.distillation_loss
    if args.teacher_epochs < args.warmup_epochs and not args.teacher_checkpoint:
        yield f"--teacher-epochs: less than --warmup-epochs {args.warmup_epochs:g}"
    parts = args.accumulate_steps * utils.WORLD_SIZE > 1
    if loss == "dist" and (args.batch_size < 3 or parts or args.kl_direction == "reverse"):
        yield "--distillation-loss: dist compares whole batches, 3 images or more, in no direction"
    if args.fresh_teacher and args.teacher_checkpoint:
        yield "--fresh-teacher: no teacher is trained where --teacher-checkpoint gives one"
    if args.cutmix_alpha and args.teacher_image_size not in (None, args.image_size):
        yield "--cutmix-alpha: cutmix cuts one size, so --teacher-image-size must be the student's"


def model_conflicts(role, size, args):
    name, weights = getattr(args, f"{role}_model"), getattr(args, f"{role}_weights")
    given = weights or (role == "teacher" and args.teacher_checkpoint)
    if weights and not args.pretrained:
        yield f"--{role}-weights: has no effect with --no-pretrained"
    if args.pretrained and not given and not timm.models.is_model_pretrained(name):
        yield f"--{role}-model: timm has no weights of {name}; --no-pretrained or --{role}-weights"
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size and cfg.input_size[-1] != size:
        yield f"--{role}-model: {name} takes images of {cfg.input_size[-1]} px alone, not {size}"
