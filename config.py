"""Every setting of the project: constants to edit, and the command line that is built from them.

Each constant is also a flag of the scripts that use it: BATCH_SIZE is --batch-size, and the comment
on its line is the flag's help (read_comments reads this file). A flag overrides --quick, and
--quick overrides this file. Constants that may be None have flags that accept None as well:
--dataset-dir None.
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
DATASET_NAME = "CIFAR100"     # CIFAR100, CIFAR10, Flowers102, Digits, Letters or ImageFolder (own)
DATASET_DIR = None            # folder of ImageFolder: train/<class>/*, test/<class>/*, perhaps val/
DATA_DIR = "data"             # folder for downloads and, in decoded/, for decoded pictures
IMAGE_SIZE = 224              # side of the student's square input in px, at least 32
TEACHER_IMAGE_SIZE = None     # the teacher's image size, perhaps a larger one; None: IMAGE_SIZE
AUGMENTATION = "auto"         # none, crop (letters), flip_crop (small images), resized_crop, auto
VAL_FRACTION = 0.1            # share of the training images used for validation, above 0, below 1
SPLIT_SEED = 0                # seed of the validation split, the same for all students and teachers
NUM_WORKERS = 2               # processes that decode photos to train, as many to validate; 0: none

# Models: any classifier in timm.list_models()
TEACHER_MODEL = "efficientnet_b2"   # the teacher's timm name
STUDENT_MODEL = "efficientnet_b0"   # the student's timm name
PRETRAINED = True             # start teacher and student from ImageNet weights
STUDENT_WEIGHTS = None        # student's weight file (.pth, .safetensors); None: timm's download
TEACHER_WEIGHTS = None        # teacher's weight file; None: timm's download
# TEACHER_CHECKPOINT is a best_model.pth of this project, or weights of TEACHER_MODEL that include
# the head for these classes: a weight file, or a folder with config.json and model.safetensors.
TEACHER_CHECKPOINT = None     # an already fine-tuned teacher; None: fine-tune TEACHER_MODEL

# Distillation: loss = ALPHA * distill_loss + (1 - ALPHA) * cross-entropy, where distill_loss is
# T^2 * KL for kd. The three losses differ in scale, so each needs its own ALPHA and T.
DISTILLATION_LOSS = "kd"      # kd (Hinton 2015), lskd (Sun 2024) or dist (Huang 2022): see README
TEMPERATURE = 4.0             # softmax temperature T, above 0 (Hinton et al.: 1 to 20)
ALPHA = 0.7                   # weight of the distillation loss, 0 to 1; 0: cross-entropy only
KL_DIRECTION = "forward"      # forward: KL(teacher || student), Hinton's; reverse: the other way

# Optimisation: AdamW; linear warm-up, then cosine decay to zero, stepped per update
BATCH_SIZE = 16               # images per step, over all processes; lower it if memory runs out
ACCUMULATE_STEPS = 1          # batches per update; acts like a larger batch, except for BatchNorm
NUM_EPOCHS = 50               # epochs of each student, baseline and distilled
LEARNING_RATE = 1e-3          # peak learning rate, above 0; suits AdamW and pretrained weights
WEIGHT_DECAY = 0.05           # weight decay of AdamW, at least 0; not applied to biases and norms
WARMUP_EPOCHS = 1.0           # length of the linear warm-up in epochs, such as 0.5; 0: none
TEACHER_EPOCHS = 20           # epochs of the teacher's fine-tuning
TEACHER_LEARNING_RATE = 1e-3  # peak learning rate of the teacher's fine-tuning, above 0
CLIP_GRAD = 1.0               # maximum norm of the gradient; 0: no clipping
LABEL_SMOOTHING = 0.1         # label smoothing of both students, 0 to below 1; the teacher has none
MIXUP_ALPHA = 0.0             # alpha of mixup, which draws weights from Beta(alpha, alpha); 0: off
CUTMIX_ALPHA = 0.0            # the same for cutmix; if both are on, each batch gets one at random
EMA_DECAY = 0.999             # decay of the weights' moving average (EMA), which is saved; 0: off

# Run
SEED = 42                     # seed of the new classifier, image order, augmentation and dropout
DEVICE = "auto"               # cuda, cuda:1, mps, cpu; auto: the first available of cuda, mps, cpu
DETERMINISTIC = False         # bit-identical CUDA runs (slower); CPU runs are, with equal threads
AMP_DTYPE = "auto"            # bf16, fp16, fp32; auto: bf16 on CUDA (fp16 on older GPUs), else fp32
CUDA_GRAPH = True             # where possible, run models as CUDA graphs (faster; NVIDIA GPU only)
CHECKPOINT_DIR = "checkpoints"   # folder for checkpoints
RESULTS_DIR = "results"       # folder for histories, report and figures

# --quick: a complete small run in minutes, without a GPU, a network or pretrained weights. Some of
# these are the defaults above once more, so that --quick works whatever is edited there.
QUICK = {
    "SEEDS": [0, 1, 2, 3, 4],  # used unless --seeds or --seed is given
    "DATASET_NAME": "Letters",
    "DATASET_DIR": None,
    "IMAGE_SIZE": 32,
    "TEACHER_IMAGE_SIZE": None,
    "AUGMENTATION": "auto",
    "VAL_FRACTION": 0.1,
    "TEACHER_MODEL": "test_resnet",
    "STUDENT_MODEL": "test_efficientnet",
    "PRETRAINED": False,
    "STUDENT_WEIGHTS": None,
    "TEACHER_WEIGHTS": None,
    "TEACHER_CHECKPOINT": None,
    "DISTILLATION_LOSS": "kd",
    "TEMPERATURE": 4.0,
    "ALPHA": 0.9,
    "KL_DIRECTION": "forward",
    "BATCH_SIZE": 64,
    "ACCUMULATE_STEPS": 1,
    "NUM_EPOCHS": 7,
    "LEARNING_RATE": 3e-3,
    "WEIGHT_DECAY": 0.05,
    "WARMUP_EPOCHS": 2.0,
    "TEACHER_EPOCHS": 18,
    "TEACHER_LEARNING_RATE": 3e-3,
    "CLIP_GRAD": 1.0,
    "LABEL_SMOOTHING": 0.0,
    "MIXUP_ALPHA": 0.0,
    "CUTMIX_ALPHA": 0.0,
    "EMA_DECAY": 0.95,
}

# Parsing of single values -------------------------------------------------------------------------
#
# Each of these functions is an argparse `type`: it converts a text, or raises an error that says
# what is allowed. The constants above are turned into text and pass through the same functions.

MAX_SEED = 2**32 - 1  # NumPy's limit
MODEL_NAMES = timm.list_models() + timm.list_pretrained()  # the latter have tags: .ra_in1k
DEPRECATED_MODEL_NAMES = timm.models.get_deprecated_models()  # {old name: current name}


def suggestions(text, names):
    """The `names` most similar to a misspelt `text`, to append to a message; "" if there are none.
    """
    by_lower_case = {name.lower(): name for name in names}
    matches = difflib.get_close_matches(text.lower(), by_lower_case, n=3, cutoff=0.5)
    if not matches:
        return ""
    return f" (closest: {', '.join(by_lower_case[match] for match in matches)})"


def require(is_valid, text, allowed, names=()):
    """Raise an error for `text` unless `is_valid`. Its message says what is `allowed`, and suggests
    similar `names`."""
    if not is_valid:
        message = f"must be {allowed}, not {text!r}{suggestions(text, names)}"
        raise argparse.ArgumentTypeError(message)


def to_number(number_type, text):
    """`text` as an int or a float; nan, which is outside of every range, if it is not a number."""
    try:
        return number_type(text)
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


def parse_image_size(text):
    number = to_number(int, text)
    require(number >= 32, text, "a whole number of at least 32")
    return number


def parse_seed(text):
    number = to_number(int, text)
    require(0 <= number <= MAX_SEED, text, f"a whole number from 0 to {MAX_SEED}")
    return number


def parse_seed_of_several(text):
    number = to_number(int, text)
    require(0 <= number <= MAX_SEED, text,
            f"whole numbers from 0 to {MAX_SEED}, separated by spaces")
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


def zero_to_below_one(text):
    number = to_number(float, text)
    require(0 <= number < 1, text, "a number of at least 0 and below 1")
    return number


def above_zero_below_one(text):
    number = to_number(float, text)
    require(0 < number < 1, text, "a number above 0 and below 1")
    return number


def parse_boolean(text):
    require(text in ("True", "False"), text, "True or False")
    return text == "True"


def one_of(*names):
    """Make a parser that accepts only these `names`."""
    def parse(text):
        require(text in names, text, f"one of {', '.join(names)}", names)
        return text
    return parse


def or_none(parse):
    """Make a parser that accepts "None" and everything that `parse` accepts."""
    def parse_or_none(text):
        if text == "None":
            return None
        return parse(text)
    return parse_or_none


def parse_device(text):
    is_valid = re.fullmatch(r"auto|cuda(:(0|[1-9]\d?))?|mps|cpu", text)
    require(is_valid, text, "one of auto, cuda, cuda:1, mps, cpu")
    return text


def parse_model_name(text):
    name = DEPRECATED_MODEL_NAMES.get(text, text)
    require(name in MODEL_NAMES, text, "a classifier from timm.list_models()", MODEL_NAMES)
    return name


def parse_path(text):
    require(text != "", text, "a path")
    return os.path.expanduser(text)  # the shell leaves the ~ of a quoted "~/pictures"


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


# Which script has which settings, and how they are parsed -----------------------------------------

TRAINING_SETTINGS = {  # both training scripts
    "DATASET_NAME": one_of("CIFAR100", "CIFAR10", "Flowers102", "Digits", "Letters",
                           "ImageFolder"),
    "IMAGE_SIZE": parse_image_size,
    "AUGMENTATION": one_of("auto", "none", "crop", "flip_crop", "resized_crop"),
    "VAL_FRACTION": above_zero_below_one,
    "SPLIT_SEED": parse_seed,
    "STUDENT_MODEL": parse_model_name,
    "PRETRAINED": parse_boolean,
    "STUDENT_WEIGHTS": existing_file,
    "BATCH_SIZE": positive_int,
    "ACCUMULATE_STEPS": positive_int,
    "NUM_EPOCHS": positive_int,
    "LEARNING_RATE": positive_float,
    "WEIGHT_DECAY": nonnegative_float,
    "WARMUP_EPOCHS": nonnegative_float,
    "CLIP_GRAD": nonnegative_float,
    "LABEL_SMOOTHING": zero_to_below_one,
    "MIXUP_ALPHA": nonnegative_float,
    "CUTMIX_ALPHA": nonnegative_float,
    "EMA_DECAY": zero_to_below_one,
    "SEED": parse_seed,
    "DETERMINISTIC": parse_boolean,
    "AMP_DTYPE": one_of("auto", "bf16", "fp16", "fp32"),
    "CUDA_GRAPH": parse_boolean,
}
DISTILLATION_SETTINGS = {  # train_distillation.py; they affect what a student is taught
    "TEACHER_IMAGE_SIZE": parse_image_size,
    "DISTILLATION_LOSS": one_of("kd", "dist", "lskd"),
    "TEMPERATURE": positive_float,
    "ALPHA": zero_to_one,
    "KL_DIRECTION": one_of("forward", "reverse"),
}
TEACHER_SETTINGS = {  # train_distillation.py; they affect the student only through its teacher
    "TEACHER_MODEL": parse_model_name,
    "TEACHER_WEIGHTS": existing_file,
    "TEACHER_CHECKPOINT": existing_path,
    "TEACHER_EPOCHS": positive_int,
    "TEACHER_LEARNING_RATE": positive_float,
}
COMMON_SETTINGS = {  # all three scripts: folders and hardware, not what is trained
    "DATASET_DIR": existing_folder,
    "DATA_DIR": parse_path,
    "NUM_WORKERS": nonnegative_int,
    "DEVICE": parse_device,
    "CHECKPOINT_DIR": parse_path,
    "RESULTS_DIR": parse_path,
}
SETTINGS = TRAINING_SETTINGS | DISTILLATION_SETTINGS | TEACHER_SETTINGS | COMMON_SETTINGS
MAY_BE_NONE = {"DATASET_DIR", "TEACHER_IMAGE_SIZE", "STUDENT_WEIGHTS", "TEACHER_WEIGHTS",
               "TEACHER_CHECKPOINT"}
MUST_EXIST = {name for name, parse in SETTINGS.items()
              if parse in (existing_file, existing_path, existing_folder)}
SETTINGS_OF_SCRIPT = {
    "baseline": TRAINING_SETTINGS | COMMON_SETTINGS,
    "distillation": SETTINGS,
    "evaluate": COMMON_SETTINGS,
}
SCRIPT_OF_ROLE = {"baseline": "baseline", "distilled": "distillation"}  # trains the student
OTHER_FLAGS = {  # flags without a constant, see add_other_flags
    "baseline": {"--quick", "--fresh", "--seeds"},
    "distillation": {"--quick", "--fresh", "--seeds", "--fresh-teacher"},
    "evaluate": {"--quick", "--baseline-checkpoint", "--distilled-checkpoint", "--no-timing"},
}

# A run is resumed only if its settings are the same as before, except for those in TEACHER_ONLY and
# MAY_CHANGE_ON_RESUME. Both hold names as they are in `args`, in lower case.
#
# Of a student's teacher, the file is compared instead (models.teacher_identity).
TEACHER_ONLY = {name.lower() for name in TEACHER_SETTINGS}
# The device may change, and with it the use of CUDA graphs, which compute the same. The precision
# that AMP_DTYPE "auto" selects for the device may not.
MAY_CHANGE_ON_RESUME = {name.lower() for name in COMMON_SETTINGS}
MAY_CHANGE_ON_RESUME |= {"argv", "cuda_graph", "quick", "fresh", "fresh_teacher", "seeds"}
# Weight files may be elsewhere; their hashes, which models.recorded_settings adds, may not change.
MAY_CHANGE_ON_RESUME |= {"student_weights", "weights"}


# Command line -------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser that prints once under torchrun: process 0 prints help and errors, and the others
    exit silently with status 0."""

    def print_help(self, file=None):
        if utils.RANK == 0:
            super().print_help(file)

    def exit(self, status=0, message=None):
        if utils.RANK == 0:
            super().exit(status, message)
        sys.exit(0)


def parse_args(script, description, argv=None):
    """Parse the command line of `script` ("baseline", "distillation" or "evaluate").

    Returns a Namespace: the script's settings in lower case, its other flags, and argv. Invalid
    flags or constants print one sentence and exit with status 2.
    """
    if argv is None:
        argv = sys.argv[1:]
    argv = list(argv)
    parser = Parser(
        usage=argparse.SUPPRESS, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, script, argv)
    add_other_flags(parser, script)

    namespace = argparse.Namespace(argv=argv)  # the parser adds its flags to it
    args, unknown = parser.parse_known_args(argv, namespace)
    # argparse silently accepts "--", and reads "--flag=--" as an empty list.
    unknown += [word for word in argv if word == "--" or word.endswith("=--")]
    if unknown:
        parser.error(describe_unknown_argument(unknown[0], script, args))

    if script == "evaluate":
        if utils.TORCHRUN:
            parser.error("evaluate.py runs as one process, without torchrun")
    else:
        if args.quick and not args.seeds and "SEED" not in given_constants(argv):
            args.seeds = list(QUICK["SEEDS"])
        check_training(parser, args)
        if script == "distillation":
            if args.teacher_image_size is None:
                args.teacher_image_size = args.image_size
            check_distillation(parser, args)
        if args.seeds:
            # The students get one seed each. Their teacher is trained only once, with this one.
            args.seed = args.seeds[0]

    if args.quick:
        args.checkpoint_dir = str(Path(args.checkpoint_dir, "quick"))
        args.results_dir = str(Path(args.results_dir, "quick"))
    return args


def read_comments():
    """{constant: its comment} for the assignments at the top of this file, in their order."""
    source = Path(__file__).read_text(encoding="utf-8")
    constants = source.split("# Parsing of single values")[0]  # up to the heading of that section
    # NAME = value  # comment, or NAME: type = value. Without a comment the second group is "".
    return dict(re.findall(r"^(\w+) *[:=].*?(?:# *(.*))?$", constants, re.MULTILINE))


def add_settings(parser, script, argv):
    """Check all constants, and add a flag for each one that `script` uses."""
    comments = read_comments()
    check_names(parser, comments)
    quick_defaults = {}
    if "--quick" in argv:
        quick_defaults = parse_quick(parser)
    overridden = given_constants(argv) | quick_defaults.keys()
    defaults = parse_constants(parser, script, overridden) | quick_defaults

    for name, comment in comments.items():
        if name not in SETTINGS_OF_SCRIPT[script]:
            continue
        flag = "--" + name.lower().replace("_", "-")
        default = defaults[name]
        help_text = f"{comment} (default: {default})".replace("%", "%%")  # argparse formats it
        parse = SETTINGS[name]
        if parse is parse_boolean:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                                help=help_text)
            continue
        if name in MAY_BE_NONE:
            parse = or_none(parse)
        parser.add_argument(flag, type=parse, default=default, help=help_text)


def check_names(parser, constants):
    """Refuse misspelt names: a constant that is not a setting, or a setting without a constant."""
    for name in constants:
        if name not in SETTINGS and name != "QUICK":
            parser.error(f"{name} in config.py is not a setting{suggestions(name, SETTINGS)}")
    for name in [*SETTINGS, "QUICK"]:
        if name not in constants:
            parser.error(f"{name} is missing from config.py")


def parse_constants(parser, script, overridden):
    """Parse the constants: {name: value}. Those that `script` does not use are checked as well,
    since it is better to learn of an invalid ALPHA before the hours of the baseline than after.

    A file or folder need not exist if it is not used, or is `overridden`: it may have been deleted
    since. It is None then.
    """
    defaults = {}
    for name in SETTINGS:
        is_used = name in SETTINGS_OF_SCRIPT[script] and name not in overridden
        if script == "evaluate" and name == "DATASET_DIR":
            is_used = False  # the checkpoint records its folder
        if name in MUST_EXIST and not is_used:
            defaults[name] = None
        else:
            constant = globals()[name]
            defaults[name] = parse_value(parser, name, constant, label=name)
    return defaults


def parse_quick(parser):
    """Parse the settings in QUICK: {name: value}. SEEDS is only checked, since it is no setting."""
    if not isinstance(QUICK, dict):
        parser.error(f"QUICK in config.py must be a dict of settings, not {QUICK!r}")
    seeds = QUICK.get("SEEDS")
    if not isinstance(seeds, (list, tuple)):
        parser.error(f"SEEDS in QUICK in config.py must be a list of seeds, not {seeds!r}")
    for seed in seeds:
        parse_value(parser, "SEED", seed, label="SEEDS in QUICK")

    defaults = {}
    for name, value in QUICK.items():
        if name == "SEEDS":
            continue
        if name not in SETTINGS:
            parser.error(f"{name} in QUICK in config.py is not a setting"
                         f"{suggestions(name, SETTINGS)}")
        defaults[name] = parse_value(parser, name, value, label=f"{name} in QUICK")
    return defaults


def parse_value(parser, name, value, label):
    """Check the `value` of the setting `name` by the rules of its flag, and convert it. An error
    message calls it `label`."""
    if value is None:
        if name not in MAY_BE_NONE:
            parser.error(f"{label} in config.py must not be None")
        return None
    try:
        return SETTINGS[name](str(value))
    except argparse.ArgumentTypeError as error:
        parser.error(f"{label} in config.py {error}")


def add_other_flags(parser, script):
    """Add the flags that have no constant."""
    quick_help = "a complete small run in minutes, saved in quick/"
    if script == "evaluate":
        quick_help = "compare the students of the quick run, which are in quick/"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    if script == "evaluate":
        parser.add_argument("--baseline-checkpoint", type=existing_file,
                            help="evaluate this checkpoint as the baseline")
        parser.add_argument("--distilled-checkpoint", type=existing_file,
                            help="evaluate this checkpoint as the distilled student")
        parser.add_argument("--no-timing", action="store_true",
                            help="skip measuring the speed of inference")
    else:
        parser.add_argument("--fresh", action="store_true",
                            help="move the previous run aside and start over")
        parser.add_argument("--seeds", type=parse_seed_of_several, nargs="+",
                            help="train one student per seed; --quick has a list of its own")
    if script == "distillation":
        parser.add_argument("--fresh-teacher", action="store_true",
                            help="move the previous teacher aside and train a new one")


def constant_of(flag):
    """The constant of a flag: BATCH_SIZE for --batch-size=16, PRETRAINED for --no-pretrained."""
    name = flag.split("=")[0].removeprefix("--").removeprefix("no-")
    return name.replace("-", "_").upper()


def given_constants(argv):
    """The constants whose flags are in `argv`."""
    return {constant_of(word) for word in argv if word.startswith("--")}


def describe_unknown_argument(argument, script, args):
    """The error message for an argument that `script` does not have: is it another script's flag,
    or misspelt?"""
    flag = argument.split("=")[0]
    constant = constant_of(argument)
    owners = [script_name(owner) for owner, settings in SETTINGS_OF_SCRIPT.items()
              if constant in settings or flag in OTHER_FLAGS[owner]]
    is_of_this_script = constant in SETTINGS_OF_SCRIPT[script] or flag in OTHER_FLAGS[script]
    if flag.startswith("--") and owners and not is_of_this_script:
        return f"{flag} is not a flag of this script, but of {' and '.join(owners)}"
    if argument in ("True", "False"):
        return (f"unknown argument {argument!r}; a flag such as --pretrained takes no value, and "
                "its opposite is --no-pretrained")

    flags = ["--" + name.replace("_", "-") for name in vars(args) if name != "argv"]
    return f"unknown argument {argument!r}{suggestions(argument, flags)}; --help lists every flag"


def format_command(script, argv):
    """The command that runs `script` from the current folder, with those flags in `argv` that it
    has, except for --fresh and --fresh-teacher. If a flag is repeated, the last one counts."""
    words_by_constant = {}  # {BATCH_SIZE: ["--batch-size", "16"]}
    for word in argv:
        if word.startswith("--"):  # true of the first word: parse_args refuses any other
            constant = constant_of(word)
            words_by_constant[constant] = []
        words_by_constant[constant].append(word)

    allowed = {*SETTINGS_OF_SCRIPT[script], "QUICK"}
    if script != "evaluate":
        allowed.add("SEEDS")
    command = ["python", script_file(script)]
    for constant, words in words_by_constant.items():
        if constant in allowed:
            command += words
    if sys.platform == "win32":  # cmd.exe does not know single quotes, as shlex uses them
        return " ".join(word if re.fullmatch(r"[\w:\\/.=-]+", word) else f'"{word}"'
                        for word in command)
    return shlex.join(command)


def script_file(script):
    """The path of a script as one would type it now: proj/evaluate.py if the running script was
    started as proj/train_baseline.py."""
    name = script_name(script)
    sibling = Path(sys.argv[0]).parent / name
    if sibling.is_file():
        return sibling.as_posix()
    return name


def script_name(script):
    return "evaluate.py" if script == "evaluate" else f"train_{script}.py"


# Settings that are valid on their own but not together --------------------------------------------

def check_training(parser, args):
    """Refuse combinations that neither training script can run."""
    seeds = args.seeds or []
    if len(set(seeds)) < len(seeds):
        parser.error("argument --seeds: each seed may be given only once")
    if seeds and "SEED" in given_constants(args.argv):
        parser.error("argument --seeds: cannot be combined with --seed")

    if args.dataset_name == "ImageFolder" and not args.dataset_dir:
        parser.error("argument --dataset-dir: required by ImageFolder; give the folder that "
                     "contains train/<class>/* and test/<class>/*")
    if args.dataset_dir and args.dataset_name != "ImageFolder":
        parser.error(f"argument --dataset-dir: {args.dataset_name} has its own images; add "
                     "--dataset-name ImageFolder to train on those in the folder, or "
                     "--dataset-dir None")

    if args.num_epochs < args.warmup_epochs:
        parser.error(f"argument --num-epochs: {args.num_epochs} is less than --warmup-epochs "
                     f"{args.warmup_epochs:g}")

    # Each process of torchrun gets an equal part of the batch, and mixup and cutmix need pairs of
    # images in it.
    divisor = utils.WORLD_SIZE
    if args.mixup_alpha or args.cutmix_alpha:
        divisor *= 2
    if args.batch_size % divisor:
        parser.error(f"argument --batch-size: must be a multiple of {divisor}, since torchrun "
                     "divides a batch among processes, and mixup and cutmix divide it into pairs")

    check_model(parser, "student", args.student_model, args.student_weights, args.image_size, args)


def check_distillation(parser, args):
    """Refuse combinations that train_distillation.py in particular cannot run."""
    if args.teacher_checkpoint:
        # TEACHER_MODEL is not checked, since a best_model.pth records its own model.
        if args.fresh_teacher:
            parser.error("argument --fresh-teacher: has no effect with --teacher-checkpoint")
        if args.teacher_weights:
            parser.error("argument --teacher-weights: has no effect with --teacher-checkpoint; "
                         "leave one of them out, or set it to None")
    else:
        if args.teacher_epochs < args.warmup_epochs:
            parser.error(f"argument --teacher-epochs: {args.teacher_epochs} is less than "
                         f"--warmup-epochs {args.warmup_epochs:g}")
        check_model(parser, "teacher", args.teacher_model, args.teacher_weights,
                    args.teacher_image_size, args)

    if args.distillation_loss == "dist":
        if args.batch_size < 3:
            parser.error("argument --distillation-loss: dist compares the images of a batch, so "
                         "--batch-size must be at least 3")
        if args.accumulate_steps * utils.WORLD_SIZE > 1:
            parser.error("argument --distillation-loss: dist compares the images of a whole batch, "
                         "so it cannot be combined with --accumulate-steps or torchrun")
        if args.kl_direction == "reverse":
            parser.error("argument --kl-direction: has no effect with --distillation-loss dist")

    if args.cutmix_alpha and args.teacher_image_size != args.image_size:
        parser.error("argument --cutmix-alpha: cutmix needs images of one size, so "
                     "--teacher-image-size must be None or equal to --image-size")


def check_model(parser, role, name, weights, image_size, args):
    """Refuse a model (of `role` student or teacher) that has no pretrained weights although they
    are wanted, or whose input size is fixed and is not `image_size`."""
    if weights and not args.pretrained:
        parser.error(f"argument --{role}-weights: has no effect with --no-pretrained; leave "
                     "it out, or set it to None")

    has_weights = weights or timm.models.is_model_pretrained(name)
    if args.pretrained and not has_weights:
        parser.error(f"argument --{role}-model: timm has no weights of {name}; give "
                     f"--{role}-weights or --no-pretrained")

    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size:
        side = cfg.input_size[-1]  # of (3, H, W)
        if side != image_size:
            parser.error(f"argument --{role}-model: {name} takes only images of {side} px, not "
                         f"{image_size}")
