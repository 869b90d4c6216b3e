"""Every setting of the project: constants to edit, and below them the command line made of them.

Each constant is also a flag of the scripts it concerns: BATCH_SIZE is --batch-size, and the comment
on its line is the flag's help. A flag wins over --quick, and --quick over this file.
"""
import argparse
import difflib
import math
import os
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
NUM_WORKERS = 2               # processes that decode photographs and crop them, 0 or more

# Models: any classifier of timm.list_models()
TEACHER_MODEL = "efficientnet_b2"   # timm's name of the teacher
STUDENT_MODEL = "efficientnet_b0"   # timm's name of the student
PRETRAINED = True             # start both from ImageNet weights
STUDENT_WEIGHTS = None        # student's weight file (.pth, .safetensors), None: timm's download
TEACHER_WEIGHTS = None        # teacher's weight file, None: timm's download
# A teacher that knows the classes already: a best_model.pth of this project, or for TEACHER_MODEL a
# weight file of yours with its head, or a folder in timm's layout (config.json, model.safetensors).
TEACHER_CHECKPOINT = None     # teacher of one's own, file or folder; None: fine-tune TEACHER_MODEL

# Distillation: loss = ALPHA * distill_loss + (1 - ALPHA) * cross-entropy; distill_loss is
# T^2 * KL for kd. The three losses differ in scale: what suits one as ALPHA and T suits no other.
DISTILLATION_LOSS = "kd"      # kd (Hinton), dist (Huang) or lskd (Sun): see models.py
TEMPERATURE = 4.0             # T that softens teacher and student, above 0; Hinton et al.: 1 to 20
ALPHA = 0.7                   # weight of distill_loss, 0 to 1; 0 is plain cross-entropy
KL_DIRECTION = "forward"      # forward: KL(teacher || student), Hinton's; reverse: the other way

# Optimisation: AdamW, linear warm-up, then cosine to zero, per update
BATCH_SIZE = 16               # images a step; fewer where GPU memory is short
ACCUMULATE_STEPS = 1          # batches to one update, which is a large batch's but for BatchNorm
NUM_EPOCHS = 50               # epochs of the student, baseline and distilled alike
LEARNING_RATE = 1e-3          # peak, above 0; for AdamW from pretrained weights
WEIGHT_DECAY = 0.05           # AdamW's, at least 0; biases and norms have none
WARMUP_EPOCHS = 1.0           # epochs of linear warm-up, 0 to NUM_EPOCHS, fractions allowed
TEACHER_EPOCHS = 20           # epochs of the teacher's own fine-tuning
TEACHER_LEARNING_RATE = 1e-3  # peak, above 0, of the teacher's own fine-tuning
CLIP_GRAD = 1.0               # clip the gradient at this norm; 0: no clipping
LABEL_SMOOTHING = 0.1         # 0 to below 1, of the students' labels, not of the teacher's
MIXUP_ALPHA = 0.0             # Beta(alpha, alpha) of mixup; 0: off
CUTMIX_ALPHA = 0.0            # the same of cutmix; with mixup on too, each batch takes one of them
EMA_DECAY = 0.999             # of the EMA weights, which are validated and saved; 0: no EMA

# Run
SEED = 42                     # weights of the new head, order of images, augmentation, dropout
DEVICE = "auto"               # auto, cuda, cuda:1, mps, cpu; auto takes the first that is available
DETERMINISTIC = False         # bit-identical runs on CUDA, slower; on CPUs equal threads suffice
AMP_DTYPE = "auto"            # auto, bf16, fp16, fp32; auto: on CUDA bf16 or else fp16; else fp32
CUDA_GRAPH = False            # on CUDA start a model's kernels as one graph; not tried on a GPU yet
CHECKPOINT_DIR = "checkpoints"   # folder of the checkpoints
RESULTS_DIR = "results"       # folder of histories, report and figures

# --quick: a complete small run in minutes without GPU, network or pretrained weights
QUICK = {
    "DATASET_NAME": "Digits",
    "DATASET_DIR": None,
    "IMAGE_SIZE": 32,
    "TEACHER_IMAGE_SIZE": None,
    "AUGMENTATION": "auto",
    "PRETRAINED": False,
    "STUDENT_WEIGHTS": None,
    "TEACHER_WEIGHTS": None,
    "TEACHER_CHECKPOINT": None,
    "BATCH_SIZE": 64,
    "NUM_EPOCHS": 10,
    "LEARNING_RATE": 3e-3,
    "TEACHER_EPOCHS": 22,
    "TEACHER_LEARNING_RATE": 3e-3,
    "LABEL_SMOOTHING": 0.0,
    "EMA_DECAY": 0.95,
    "ALPHA": 0.9,
}

# Checks of single values --------------------------------------------------------------------------
#
# Each is a `type` of argparse: it turns a text into a value or says what is allowed. The constants
# pass the same checks as text, so that config.py and the command line follow one set of rules.

MAX_SEED = 2**32 - 1  # numpy's
MODEL_NAMES = timm.list_models() + timm.list_pretrained()  # without and with a tag of weights


def closest(text, names):
    """Suggestions for a misspelt `text`, to append to a message; "" where nothing is near."""
    by_lower_case = {name.lower(): name for name in names}
    matches = difflib.get_close_matches(text.lower(), by_lower_case, n=3, cutoff=0.5)
    if not matches:
        return ""
    return f" (closest: {', '.join(by_lower_case[match] for match in matches)})"


def require(is_legal, text, allowed, names=()):
    if not is_legal:
        message = f"must be {allowed}, not {text!r}{closest(text, names)}"
        raise argparse.ArgumentTypeError(message)


def to_number(kind, text):
    """kind(text), or nan, which lies in no range, where `text` is no such number."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def positive_int(text):
    number = to_number(int, text)
    require(number >= 1, text, "a whole number of at least 1")
    return number


def nonnegative_int(text):
    number = to_number(int, text)
    require(number >= 0, text, "a whole number of at least 0")
    return number


def image_side(text):
    number = to_number(int, text)
    require(number >= 32, text, "a whole number of at least 32")
    return number


def seed(text):
    number = to_number(int, text)
    require(0 <= number <= MAX_SEED, text, f"a whole number from 0 to {MAX_SEED}")
    return number


def positive_float(text):
    number = to_number(float, text)
    require(0 < number < math.inf, text, "a number above 0")
    return number


def nonnegative_float(text):
    number = to_number(float, text)
    require(0 <= number < math.inf, text, "a number of at least 0")
    return number


def zero_to_one(text):
    number = to_number(float, text)
    require(0 <= number <= 1, text, "a number from 0 to 1")
    return number


def below_one(text):
    number = to_number(float, text)
    require(0 <= number < 1, text, "a number of at least 0 and below 1")
    return number


def fraction(text):
    number = to_number(float, text)
    require(0 < number < 1, text, "a number above 0 and below 1")
    return number


def boolean(text):
    require(text in ("True", "False"), text, "True or False")
    return text == "True"


def one_of(*names):
    """A check that takes `names` alone."""
    def check(text):
        require(text in names, text, f"one of {', '.join(names)}", names)
        return text
    return check


def device(text):
    is_legal = re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", text)
    require(is_legal, text, "one of auto, cuda, cuda:1, mps, cpu")
    return text


def model_name(text):
    # is_model also knows deprecated names; of a name with a tag it looks at the first part alone.
    is_legal = text in MODEL_NAMES or ("." not in text and timm.is_model(text))
    require(is_legal, text, "a classifier from timm.list_models()", MODEL_NAMES)
    return text


def path(text):
    require(text, text, "a path")
    return os.path.expanduser(text)  # a quoted "~/pictures" reaches us as it is


def existing_file(text):
    file = os.path.expanduser(text)
    require(os.path.isfile(file), text, "an existing file")
    return file


def existing_path(text):
    file_or_folder = os.path.expanduser(text)
    require(os.path.exists(file_or_folder), text, "an existing file or folder")
    return file_or_folder


def existing_folder(text):
    folder = os.path.expanduser(text)
    require(os.path.isdir(folder), text, "an existing folder")
    return folder


# Which script has which setting, and the check of its value ---------------------------------------

TRAINING = {  # both training scripts
    "DATASET_NAME": one_of("CIFAR100", "CIFAR10", "Flowers102", "Digits", "ImageFolder"),
    "IMAGE_SIZE": image_side,
    "AUGMENTATION": one_of("auto", "none", "crop", "flip_crop", "resized_crop"),
    "VAL_FRACTION": fraction,
    "SPLIT_SEED": seed,
    "STUDENT_MODEL": model_name,
    "PRETRAINED": boolean,
    "STUDENT_WEIGHTS": existing_file,
    "BATCH_SIZE": positive_int,
    "ACCUMULATE_STEPS": positive_int,
    "NUM_EPOCHS": positive_int,
    "LEARNING_RATE": positive_float,
    "WEIGHT_DECAY": nonnegative_float,
    "WARMUP_EPOCHS": nonnegative_float,
    "CLIP_GRAD": nonnegative_float,
    "LABEL_SMOOTHING": below_one,
    "MIXUP_ALPHA": nonnegative_float,
    "CUTMIX_ALPHA": nonnegative_float,
    "EMA_DECAY": below_one,
    "SEED": seed,
    "DETERMINISTIC": boolean,
    "AMP_DTYPE": one_of("auto", "bf16", "fp16", "fp32"),
    "CUDA_GRAPH": boolean,
}
DISTILLATION = {  # train_distillation.py
    "TEACHER_IMAGE_SIZE": image_side,
    "DISTILLATION_LOSS": one_of("kd", "dist", "lskd"),
    "TEMPERATURE": positive_float,
    "ALPHA": zero_to_one,
    "KL_DIRECTION": one_of("forward", "reverse"),
}
TEACHER = {  # train_distillation.py; the student depends on them through its teacher alone
    "TEACHER_MODEL": model_name,
    "TEACHER_WEIGHTS": existing_file,
    "TEACHER_CHECKPOINT": existing_path,
    "TEACHER_EPOCHS": positive_int,
    "TEACHER_LEARNING_RATE": positive_float,
}
EVERYWHERE = {  # all three scripts; none of them changes what is computed
    "DATASET_DIR": existing_folder,
    "DATA_DIR": path,
    "NUM_WORKERS": nonnegative_int,
    "DEVICE": device,
    "CHECKPOINT_DIR": path,
    "RESULTS_DIR": path,
}
SETTINGS = TRAINING | DISTILLATION | TEACHER | EVERYWHERE
MAY_BE_NONE = {"DATASET_DIR", "TEACHER_IMAGE_SIZE", "STUDENT_WEIGHTS", "TEACHER_WEIGHTS",
               "TEACHER_CHECKPOINT"}
FLAGS = {
    "baseline": TRAINING | EVERYWHERE,
    "distillation": SETTINGS,
    "evaluate": EVERYWHERE,
}

# A run resumes although these differ. Another DEVICE may turn AMP_DTYPE "auto" into another
# precision, which is compared after that.
TEACHER_ONLY = {name.lower() for name in TEACHER}
MAY_CHANGE_ON_RESUME = {name.lower() for name in EVERYWHERE}
MAY_CHANGE_ON_RESUME |= {"argv", "quick", "fresh", "fresh_teacher", "seeds"}


# Command line -------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Answers --help and wrong use from process 0 of torchrun alone; the others end in silence."""

    def print_help(self, file=None):
        if utils.RANK == 0:
            super().print_help(file)

    def exit(self, status=0, message=None):
        if utils.RANK == 0:
            super().exit(status, message)
        sys.exit()


def parse_args(script, description, argv=None):
    """Parse the flags of `script` ("baseline", "distillation" or "evaluate").

    Returns a Namespace of its settings in lower case, its other flags, and argv. Wrong use, on the
    command line or in config.py, ends the process with status 2 and one sentence.
    """
    if argv is None:
        argv = sys.argv[1:]
    argv = list(argv)
    parser = Parser(
        usage=argparse.SUPPRESS, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, script, use_quick="--quick" in argv)
    add_other_flags(parser, script)

    args, unknown = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    # argparse takes "--" and "--flag=--" for empty lists and says nothing.
    unknown += [word for word in argv if word.split("=")[-1] == "--"]
    if unknown:
        parser.error(unknown_argument(unknown[0], script, args))

    if script == "evaluate":
        if utils.TORCHRUN:
            parser.error("evaluate.py runs as one process, without torchrun")
    else:
        check_training(parser, args)
        if script == "distillation":
            check_distillation(parser, args)
        if args.seeds:
            args.seed = args.seeds[0]  # of the teacher, which is trained once for all students

    if args.quick:
        args.checkpoint_dir = str(Path(args.checkpoint_dir, "quick"))
        args.results_dir = str(Path(args.results_dir, "quick"))
    return args


def read_comments():
    """{constant: its comment} of the assignments at the top of this very file, in their order."""
    source = Path(__file__).read_text(encoding="utf-8")
    constants = source.split("# Checks of single values")[0]
    return dict(re.findall(r"^(\w+) *[:=].*?(?:# *(.*))?$", constants, re.MULTILINE))


def add_settings(parser, script, use_quick):
    """Make a flag of every constant that concerns `script`; all constants are checked."""
    comments = read_comments()
    check_names(parser, comments)
    defaults = check_constants(parser, script)
    if use_quick:
        defaults |= check_quick(parser)

    for name, comment in comments.items():
        if name not in FLAGS[script]:
            continue
        flag = "--" + name.lower().replace("_", "-")
        default = defaults[name]
        help_text = f"{comment} (default: {default})".replace("%", "%%")
        if SETTINGS[name] is boolean:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                                help=help_text)
        else:
            parser.add_argument(flag, type=SETTINGS[name], default=default, help=help_text)


def check_names(parser, comments):
    """Every constant of config.py is a setting, and every setting stands there."""
    for name in comments:
        if name not in SETTINGS and name != "QUICK":
            parser.error(f"{name} in config.py is no setting{closest(name, SETTINGS)}")
    for name in [*SETTINGS, "QUICK"]:
        if name not in comments:
            parser.error(f"{name} in config.py is missing")


def check_constants(parser, script):
    """The constants as checked values, those that `script` does not read included: hours of a
    baseline would be lost on an ALPHA that is refused later."""
    defaults = {}
    for name in SETTINGS:
        if script == "evaluate" and name == "DATASET_DIR":
            defaults[name] = None  # the checkpoint knows its folder
        else:
            defaults[name] = check_value(parser, name, globals()[name], name)
    return defaults


def check_quick(parser):
    """The values of QUICK, checked."""
    if not isinstance(QUICK, dict):
        parser.error(f"QUICK in config.py must be a dict of settings, not {QUICK!r}")
    defaults = {}
    for name, value in QUICK.items():
        if name not in SETTINGS:
            parser.error(f"{name} in QUICK in config.py is no setting{closest(name, SETTINGS)}")
        defaults[name] = check_value(parser, name, value, f"{name} in QUICK")
    return defaults


def check_value(parser, name, value, label):
    if value is None:
        if name not in MAY_BE_NONE:
            parser.error(f"{label} in config.py must not be None")
        return None
    try:
        return SETTINGS[name](str(value))
    except argparse.ArgumentTypeError as error:
        parser.error(f"{label} in config.py {error}")


def add_other_flags(parser, script):
    """The flags that are no constants."""
    parser.add_argument("--quick", action="store_true",
                        help="a small complete run, saved in quick/")
    if script == "evaluate":
        parser.add_argument("--baseline-checkpoint", type=existing_file,
                            help="another checkpoint of the baseline")
        parser.add_argument("--distilled-checkpoint", type=existing_file,
                            help="another checkpoint of the distilled student")
        parser.add_argument("--no-timing", action="store_true",
                            help="leave out the measurement of inference")
    else:
        parser.add_argument("--fresh", action="store_true",
                            help="move the previous run aside and start anew")
        parser.add_argument("--seeds", type=seed, nargs="+",
                            help="train a student for each of these seeds")
    if script == "distillation":
        parser.add_argument("--fresh-teacher", action="store_true",
                            help="move the previous teacher aside and train it anew")


def constant_of(flag):
    """BATCH_SIZE of --batch-size=16, PRETRAINED of --no-pretrained."""
    name = flag.split("=")[0].removeprefix("--").removeprefix("no-")
    return name.replace("-", "_").upper()


def unknown_argument(argument, script, args):
    """Says of an argument that `script` lacks whether it is another script's, or misspelt."""
    flag = argument.split("=")[0]
    constant = constant_of(argument)
    owners = [f"train_{owner}.py" for owner, flags in FLAGS.items() if constant in flags]
    if flag.startswith("--") and owners and constant not in FLAGS[script]:
        return f"{flag} is no flag of this script but of {' and '.join(owners)}"

    flags = ["--" + name.replace("_", "-") for name in vars(args)]
    return f"unknown argument {argument!r}{closest(flag, flags)}; --help lists every flag"


def format_command(script, argv):
    """The command that runs `script` with those flags of `argv` that it has, each once, but without
    --fresh. It works as typed in the folder from which the present script was started."""
    words_by_flag = {}
    for word in argv:
        if word.startswith("--"):
            name = constant_of(word)
            words_by_flag[name] = []
        words_by_flag[name].append(word)

    command = ["python", script_file(script)]
    for name, words in words_by_flag.items():
        is_training_flag = name == "SEEDS" and script != "evaluate"
        if name in FLAGS[script] or name == "QUICK" or is_training_flag:
            command += words
    return shlex.join(command)


def script_file(script):
    """The script's file, in the folder as it was typed: proj/evaluate.py."""
    name = "evaluate.py" if script == "evaluate" else f"train_{script}.py"
    beside_this = Path(sys.argv[0]).parent / name
    if beside_this.is_file():
        return beside_this.as_posix()
    return name


# Settings that are legal alone but cannot work together -------------------------------------------

def check_training(parser, args):
    """What both training scripts refuse."""
    seeds = args.seeds or []
    if len(set(seeds)) < len(seeds):
        parser.error("argument --seeds: each seed once")
    if seeds and "SEED" in [constant_of(word) for word in args.argv]:
        parser.error("argument --seeds: no --seed beside them")

    if args.dataset_name == "ImageFolder" and not args.dataset_dir:
        parser.error("argument --dataset-dir: ImageFolder needs it; give the folder that holds "
                     "train/<class>/* and test/<class>/*")
    if args.dataset_dir and args.dataset_name != "ImageFolder":
        parser.error(f"argument --dataset-dir: {args.dataset_name} has images of its own; add "
                     "--dataset-name ImageFolder to train on those of the folder")

    if args.num_epochs < args.warmup_epochs:
        parser.error(f"argument --num-epochs: {args.num_epochs} is less than --warmup-epochs "
                     f"{args.warmup_epochs:g}")
    if args.cuda_graph and args.accumulate_steps * utils.WORLD_SIZE > 1:
        parser.error("argument --cuda-graph: a replay writes over gradients, so no "
                     "--accumulate-steps and no torchrun")

    # torchrun's processes share a batch, and mixup and cutmix pair each image with another.
    unit = utils.WORLD_SIZE
    if args.mixup_alpha or args.cutmix_alpha:
        unit *= 2
    if args.batch_size % unit:
        parser.error(f"argument --batch-size: must be a multiple of {unit}, by which torchrun, "
                     "mixup and cutmix divide it")

    check_model(parser, "student", args.student_model, args.student_weights, args.image_size, args)


def check_distillation(parser, args):
    """What train_distillation.py refuses beyond that."""
    if args.teacher_checkpoint:
        if args.fresh_teacher:
            parser.error("argument --fresh-teacher: no teacher is trained where "
                         "--teacher-checkpoint gives one")
    elif args.teacher_epochs < args.warmup_epochs:
        parser.error(f"argument --teacher-epochs: {args.teacher_epochs} is less than "
                     f"--warmup-epochs {args.warmup_epochs:g}")

    if args.distillation_loss == "dist":
        if args.batch_size < 3:
            parser.error("argument --distillation-loss: dist compares the images of a batch, so "
                         "--batch-size must be at least 3")
        if args.accumulate_steps * utils.WORLD_SIZE > 1:
            parser.error("argument --distillation-loss: dist compares the images of a whole batch, "
                         "so no --accumulate-steps and no torchrun")
        if args.kl_direction == "reverse":
            parser.error("argument --kl-direction: has no effect with --distillation-loss dist")

    teacher_size = args.teacher_image_size or args.image_size
    if args.cutmix_alpha and teacher_size != args.image_size:
        parser.error("argument --cutmix-alpha: cutmix cuts one size, so --teacher-image-size must "
                     "be the student's")
    check_model(parser, "teacher", args.teacher_model, args.teacher_weights, teacher_size, args)


def check_model(parser, role, name, weights, image_size, args):
    """Refuse a model whose weights cannot be had, or that takes images of another size."""
    if weights and not args.pretrained:
        parser.error(f"argument --{role}-weights: has no effect with --no-pretrained")

    has_weights = weights or timm.models.is_model_pretrained(name)
    if role == "teacher" and args.teacher_checkpoint:
        has_weights = True
    if args.pretrained and not has_weights:
        parser.error(f"argument --{role}-model: timm has no weights of {name}; give "
                     f"--{role}-weights or --no-pretrained")

    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size and cfg.input_size[-1] != image_size:
        parser.error(f"argument --{role}-model: {name} takes images of {cfg.input_size[-1]} px "
                     f"alone, not {image_size}")
