"""config.py: constants, their flags and help, and what is refused.

    python -m pytest tests/test_config.py                  # all
    python -m pytest tests/test_config.py -m "not slow"    # seconds
"""
import argparse
import importlib.util
import io
import os
import random
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import config
import utils
from conftest import ROOT

SCRIPTS = ("baseline", "distillation", "evaluate")

# Written down once more: in which scripts a constant is a flag, and what may change on resume.
COMMON = {"DATASET_DIR", "DATA_DIR", "NUM_WORKERS", "DEVICE", "CHECKPOINT_DIR", "RESULTS_DIR"}
TEACHER_ONLY = {"TEACHER_MODEL", "TEACHER_WEIGHTS", "TEACHER_CHECKPOINT", "TEACHER_EPOCHS",
                "TEACHER_LEARNING_RATE"}
DISTILLATION_ONLY = TEACHER_ONLY | {"TEACHER_IMAGE_SIZE", "DISTILLATION_LOSS", "TEMPERATURE",
                                    "ALPHA", "KL_DIRECTION"}
MAY_BE_NONE = {"DATASET_DIR", "TEACHER_IMAGE_SIZE", "STUDENT_WEIGHTS", "TEACHER_WEIGHTS",
               "TEACHER_CHECKPOINT"}
BOOLEANS = ("PRETRAINED", "DETERMINISTIC", "CUDA_GRAPH")


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def has_flag(script, name):
    if script == "evaluate":
        return name in COMMON
    return script == "distillation" or name not in DISTILLATION_ONLY


def constants(source):
    """{constant: the comment on its line} of config.py, as Python's own tokenizer sees it."""
    comments = {}
    name = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[1] == 0 and token.string == "QUICK":
            return comments
        if token.start[1] == 0 and token.string.isupper():
            name = token.string
            comments[name] = ""
        elif token.type == tokenize.COMMENT and token.start[1] > 0:
            comments[name] = token.string.removeprefix("# ")
    raise AssertionError("no QUICK")


CONSTANTS = constants((ROOT / "config.py").read_text(encoding="utf-8"))


def refused(capsys, script, *flags, module=config):
    """The one sentence with which `script` refuses `flags`, at status 2."""
    with pytest.raises(SystemExit) as stop:
        module.parse_args(script, "", list(flags))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


def help_texts(capsys, script, module=config):
    """{flag: its help} as --help prints them, without line breaks."""
    with pytest.raises(SystemExit) as stop:
        module.parse_args(script, "", ["--help"])
    assert stop.value.code == 0
    texts = {}
    for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]:
        flag, *words = entry.split()
        texts[flag.rstrip(",")] = " ".join(words)
    return texts


def edited(folder, old, new):
    """A copy of config.py in which a person has put `new` in the place of `old`; its path."""
    text = (ROOT / "config.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    file = folder / "config.py"
    file.write_text(text.replace(old, new), encoding="utf-8")
    return file


def loaded(file):
    """Another config.py as a module."""
    spec = importlib.util.spec_from_file_location("edited_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break words at their hyphens


# Constants, flags and help ------------------------------------------------------------------------

def test_every_constant_is_a_setting_with_a_comment():
    assert set(CONSTANTS) == set(config.SETTINGS)
    assert all(CONSTANTS.values()), CONSTANTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_a_flag_with_its_comment_as_help_and_its_value_as_default(capsys, script):
    texts = help_texts(capsys, script)
    for name, comment in CONSTANTS.items():
        assert (flag_of(name) in texts) == has_flag(script, name), name
        if has_flag(script, name):
            wanted = f"{comment} (default: {getattr(config, name)})"
            assert texts[flag_of(name)].endswith(wanted), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_constants_in_the_order_of_the_file(capsys, script):
    flags = list(help_texts(capsys, script))
    settings = [flag_of(name) for name in CONSTANTS if has_flag(script, name)]
    assert flags[:len(settings)] == settings


@pytest.mark.parametrize("script, flags", [
    ("baseline", {"--quick", "--seeds", "--fresh"}),
    ("distillation", {"--quick", "--seeds", "--fresh", "--fresh-teacher"}),
    ("evaluate", {"--quick", "--baseline-checkpoint", "--distilled-checkpoint", "--no-timing"})])
def test_other_flags_have_help_too(capsys, script, flags):
    texts = help_texts(capsys, script)
    settings = {flag_of(name) for name in CONSTANTS}
    assert texts.keys() - settings == flags == config.OTHER_FLAGS[script]
    for flag in flags:
        assert len(texts[flag].split()) > 2


def test_help_is_the_scripts_description_line_by_line_and_then_the_flags(capsys):
    with pytest.raises(SystemExit):
        config.parse_args("baseline", "Train it.\n\n    python it.py", ["--help"])
    assert capsys.readouterr().out.startswith("Train it.\n\n    python it.py\n\noptions:\n  -h")


def test_every_legal_name_stands_in_the_comment():
    for name, count in [("DATASET_NAME", 6), ("AUGMENTATION", 5), ("DISTILLATION_LOSS", 3),
                        ("KL_DIRECTION", 2), ("DEVICE", 5), ("AMP_DTYPE", 4)]:
        names = allowed(name).removeprefix("one of ").split(", ")
        assert len(names) == count
        for legal in names:
            assert re.search(rf"\b{legal}\b", CONSTANTS[name]), f"{legal} of {name}"


@pytest.mark.parametrize("new, text", [
    ("BATCH_SIZE = 8  # 50% of mine", "50% of mine (default: 8)"),
    ("BATCH_SIZE=8 #mine", "mine (default: 8)"),
    ("BATCH_SIZE: int = 8  # mine", "mine (default: 8)"),
    ("BATCH_SIZE = 8", "(default: 8)")])
def test_a_person_may_write_any_comment_or_none(capsys, tmp_path, new, text):
    old = re.search("BATCH_SIZE = 16 .*", (ROOT / "config.py").read_text(encoding="utf-8"))[0]
    module = loaded(edited(tmp_path, old, new))
    assert help_texts(capsys, "baseline", module)["--batch-size"] == f"BATCH_SIZE {text}"
    assert module.parse_args("baseline", "", []).batch_size == 8


def test_defaults_of_the_design():
    defaults = {
        "DATASET_NAME": "CIFAR100", "TEACHER_MODEL": "efficientnet_b2",
        "STUDENT_MODEL": "efficientnet_b0", "TEMPERATURE": 4.0, "ALPHA": 0.7, "BATCH_SIZE": 16,
        "NUM_EPOCHS": 50, "IMAGE_SIZE": 224, "TEACHER_IMAGE_SIZE": None, "PRETRAINED": True,
        "STUDENT_WEIGHTS": None, "TEACHER_WEIGHTS": None, "TEACHER_CHECKPOINT": None,
        "DISTILLATION_LOSS": "kd", "KL_DIRECTION": "forward", "AMP_DTYPE": "auto", "SEED": 42,
        "SPLIT_SEED": 0, "VAL_FRACTION": 0.1, "DATA_DIR": "data", "CHECKPOINT_DIR": "checkpoints",
        "RESULTS_DIR": "results"}
    for name, default in defaults.items():
        assert getattr(config, name) == default, name


def test_what_may_change_on_resume():
    """And what may not, but for a student whose teacher's file is the same."""
    common = {name.lower() for name in COMMON}
    assert common | {"argv", "cuda_graph", "quick", "fresh", "seeds", "fresh_teacher",
                     "student_weights", "weights"} == config.MAY_CHANGE_ON_RESUME
    assert {name.lower() for name in TEACHER_ONLY} == config.TEACHER_ONLY


# Values -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_without_flags_the_values_are_those_of_the_file(script):
    args = vars(config.parse_args(script, "", []))
    for name in CONSTANTS:
        assert (name.lower() in args) == has_flag(script, name), name
        if has_flag(script, name) and name != "TEACHER_IMAGE_SIZE":
            assert args[name.lower()] == getattr(config, name), name


@pytest.mark.parametrize("flags, size", [
    ("", 224), ("--image-size 64", 64), ("--teacher-image-size None", 224), ("--quick", 32),
    ("--image-size 64 --teacher-image-size 96", 96)])
def test_teacher_has_the_students_image_size_unless_another_is_given(flags, size):
    """And whether it is given or not, the run is the same one."""
    args = config.parse_args("distillation", "", flags.split())
    assert args.teacher_image_size == size


def test_values_come_in_the_type_of_the_constant():
    flags = ("--batch-size 8 --alpha 1 --no-pretrained --deterministic --data-dir 8 "
             "--teacher-image-size 64 --kl-direction reverse --amp-dtype=fp32")
    args = config.parse_args("distillation", "", flags.split())
    values = [args.batch_size, args.alpha, args.pretrained, args.deterministic, args.data_dir,
              args.teacher_image_size, args.kl_direction, args.amp_dtype]
    assert values == [8, 1.0, False, True, "8", 64, "reverse", "fp32"]
    assert [type(value) for value in values[:5]] == [int, float, bool, bool, str]


def test_precedence_is_config_quick_flags():
    assert config.parse_args("baseline", "", []).image_size == config.IMAGE_SIZE
    quick = config.parse_args("baseline", "", ["--quick"])
    assert quick.image_size == config.QUICK["IMAGE_SIZE"]
    assert not quick.pretrained
    for flags in (["--quick", "--image-size", "64"], ["--image-size", "64", "--quick"]):
        assert config.parse_args("baseline", "", flags).image_size == 64


def is_none(args, name):
    """Whether a setting is None; of the teacher's image size: whether it is the student's."""
    value = vars(args)[name.lower()]
    return value == (args.image_size if name == "TEACHER_IMAGE_SIZE" else None)


def test_quick_is_small_and_needs_nothing_whatever_the_constants_say(monkeypatch):
    edits = {"DATASET_NAME": "ImageFolder", "DATASET_DIR": str(ROOT), "IMAGE_SIZE": 512,
             "TEACHER_IMAGE_SIZE": 640, "AUGMENTATION": "resized_crop",
             "STUDENT_WEIGHTS": __file__, "TEACHER_WEIGHTS": __file__,
             "TEACHER_CHECKPOINT": __file__, "NUM_EPOCHS": 500, "TEACHER_EPOCHS": 500}
    for name, content in edits.items():
        monkeypatch.setattr(config, name, content)
    quick = config.parse_args("distillation", "", ["--quick"])
    assert quick.dataset_name == "Letters"
    assert quick.augmentation == "auto"
    assert quick.image_size == 32
    assert quick.pretrained is False
    assert quick.num_epochs < 50
    assert quick.teacher_epochs < 50
    assert all(is_none(quick, name) for name in MAY_BE_NONE)

    # All that is trained is set there; seeds, hardware and folders are the user's.
    free = {"SEED", "SPLIT_SEED", "DETERMINISTIC", "AMP_DTYPE", "CUDA_GRAPH", *COMMON}
    assert config.QUICK.keys() >= config.SETTINGS.keys() - free


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_never_touches_a_real_run(script):
    flags = ["--quick", "--checkpoint-dir", "a", "--results-dir", "b"]
    args = config.parse_args(script, "", flags)
    assert Path(args.checkpoint_dir) == Path("a/quick")
    assert Path(args.results_dir) == Path("b/quick")


def test_several_seeds_are_kept_in_order_and_the_first_is_the_teachers():
    several = config.parse_args("distillation", "", ["--seeds", "7", "3", "4294967295"])
    assert several.seeds == [7, 3, config.MAX_SEED]
    assert several.seed == 7
    single = config.parse_args("distillation", "", ["--seed", "9"])
    assert single.seeds is None
    assert single.seed == 9


def test_evaluation_takes_the_folder_of_the_checkpoint_not_of_config(monkeypatch):
    monkeypatch.setattr(config, "DATASET_DIR", "/moved/since")
    assert config.parse_args("evaluate", "", []).dataset_dir is None
    assert config.parse_args("evaluate", "", ["--dataset-dir", str(ROOT)]).dataset_dir == str(ROOT)


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    """A shell leaves a quoted ~ as it is."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "weights.pth").touch()
    args = config.parse_args("distillation", "", [
        "--dataset-name", "ImageFolder", "--dataset-dir", "~/my pictures",
        "--student-weights", "~/weights.pth", "--teacher-checkpoint", "~/weights.pth",
        "--checkpoint-dir", "~/c"])
    assert Path(args.dataset_dir) == tmp_path / "my pictures"
    assert Path(args.student_weights) == tmp_path / "weights.pth"
    assert Path(args.teacher_checkpoint) == tmp_path / "weights.pth"
    assert Path(args.checkpoint_dir) == tmp_path / "c"


# Wrong use ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, words", [
    ("baseline", "--batchsize 4", ["--batchsize", "--batch-size", "--help"]),
    ("baseline", "--batch 4", ["'--batch'"]),  # no abbreviations
    ("baseline", "--tags 4", ["'--tags'", "--help"]),
    ("baseline", "--batch_size 4", ["'--batch_size'", "--batch-size"]),
    ("baseline", "stray", ["'stray'"]),
    ("baseline", "--temperature 4", ["--temperature", "train_distillation.py"]),
    ("evaluate", "--seed 1", ["--seed", "train_baseline.py", "train_distillation.py"]),
    ("evaluate", "--no-pretrained", ["train_baseline.py", "train_distillation.py"]),
    ("baseline", "--no-timing", ["--no-timing", "evaluate.py"]),
    ("evaluate", "--seeds 0 1", ["--seeds", "train_baseline.py", "train_distillation.py"]),
    ("baseline", "--fresh-teacher", ["--fresh-teacher", "train_distillation.py"]),
    ("baseline", "--pretrained False", ["'False'", "--no-pretrained"]),
    ("baseline", "--seeds 0,1,2", ["'0,1,2'", "separated by spaces"]),
    ("baseline", "--dataset-name CIFAR1000", ["CIFAR100", "Flowers102", "'CIFAR1000'"]),
    ("baseline", "--dataset-name digits", ["closest: Digits"]),
    ("baseline", "--student-model eficientnet_b0", ["closest: efficientnet_b0"]),
    ("baseline", "--student-model efficientnet_b0.ra_in1kk", ["closest: efficientnet_b0.ra_in1k"]),
    ("distillation", "--teacher-model efficientnet", ["timm.list_models()"]),
    ("distillation", "--kl-direction backward", ["forward", "reverse"]),
    ("distillation", "--distillation-loss kdd", ["kd", "dist", "lskd"]),
    ("baseline", "--batch-size", ["--batch-size", "one argument"]),
    ("baseline", "--seeds 0 x", ["--seeds", "whole number"]),
    ("baseline", "--seeds", ["--seeds", "at least one argument"]),
    ("baseline", "--seeds 0 1 0", ["--seeds", "once"]),
    ("baseline", "--seeds 0 1 --seed 2", ["--seeds", "with --seed"]),
    ("baseline", "--seed=42 --seeds 0 1", ["--seeds", "with --seed"]),
    ("evaluate", "--baseline-checkpoint /no/such/file", ["--baseline-checkpoint", "existing"]),
    ("evaluate", "--distilled-checkpoint /no/such/file", ["--distilled-checkpoint", "existing"]),
    ("baseline", "--dataset-name ImageFolder", ["--dataset-dir", "train/<class>/*"]),
    ("baseline", "--dataset-dir .", ["--dataset-dir", "--dataset-name ImageFolder"]),
    ("baseline", "--dataset-name ImageFolder --dataset-dir /no/such", ["existing folder"]),
    ("baseline", "--dataset-name ImageFolder --dataset-dir ~/no/such", ["existing folder"]),
    ("evaluate", "--dataset-dir /no/such", ["existing folder"]),
    ("baseline", "--num-epochs 2 --warmup-epochs 3", ["--num-epochs", "--warmup-epochs 3"]),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 3", ["--teacher-epochs", "3"]),
    ("baseline", "--mixup-alpha 0.2 --batch-size 15", ["--batch-size", "multiple of 2"]),
    ("baseline", "--cutmix-alpha 0.2 --batch-size 15", ["--batch-size", "multiple of 2"]),
    ("distillation", "--cutmix-alpha 1 --teacher-image-size 256", ["--teacher-image-size"]),
    ("baseline", "--student-weights config.py --no-pretrained", ["--no-pretrained"]),
    ("distillation", "--teacher-weights config.py --no-pretrained", ["--teacher-weights"]),
    ("baseline", "--student-model efficientnet_b8", ["--student-model", "no weights"]),
    ("distillation", "--teacher-model efficientnet_b8", ["--teacher-model", "--teacher-weights"]),
    ("baseline", "--student-model vit_tiny_patch16_224 --image-size 128", ["224 px", "128"]),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --teacher-image-size 96", ["224", "96"]),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --image-size 96", ["224", "96"]),
    ("distillation", "--distillation-loss dist --kl-direction reverse", ["--kl-direction", "dist"]),
    ("distillation", "--distillation-loss dist --batch-size 2", ["dist", "--batch-size", "3"]),
    ("distillation", "--distillation-loss dist --accumulate-steps 2", ["--accumulate-steps"]),
    ("distillation", "--fresh-teacher --teacher-checkpoint config.py", ["--teacher-checkpoint"]),
    ("distillation", "--teacher-weights config.py --teacher-checkpoint config.py",
     ["--teacher-weights", "no effect", "--teacher-checkpoint"]),
    ("distillation", "--teacher-model tf_efficientnet_b0_nss", ["closest: tf_efficientnet_b0"]),
    ("baseline", "--batch-size None", ["whole number", "'None'"]),
])
def test_wrong_use_is_one_sentence_and_status_2(script, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refused(capsys, script, *flags.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize("script, flags", [
    ("baseline", "--num-epochs 1 --warmup-epochs 1"),
    ("baseline", "--mixup-alpha 0.2 --cutmix-alpha 1 --batch-size 14"),
    ("baseline", "--batch-size 15"),
    ("baseline", "--student-model efficientnet_b0.ra_in1k"),
    ("baseline", "--student-model efficientnet_b8 --no-pretrained"),
    ("baseline", "--student-model efficientnet_b8 --student-weights config.py"),
    ("baseline", "--student-model tf_efficientnet_b0_ns"),  # a deprecated name
    ("baseline", "--student-model vit_tiny_patch16_224 --image-size 224"),
    ("baseline", "--dataset-name ImageFolder --dataset-dir ."),
    ("distillation", "--teacher-model efficientnet_b8 --teacher-weights config.py"),
    ("distillation", "--teacher-model efficientnet_b8 --teacher-checkpoint config.py"),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --teacher-image-size 224"),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 3 --teacher-checkpoint config.py"),
    ("distillation", "--teacher-checkpoint tests"),  # a folder
    ("distillation", "--teacher-model vit_tiny_patch16_224 --image-size 96 "
                     "--teacher-checkpoint config.py"),  # it may be of another model
    ("baseline", "--data-dir seed --seeds 1 2"),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 2"),
    ("distillation", "--distillation-loss kd --batch-size 1 --accumulate-steps 2"),
    ("distillation", "--distillation-loss dist --batch-size 3 --mixup-alpha 0"),
    ("distillation", "--distillation-loss lskd --kl-direction reverse"),
    ("distillation", "--kl-direction reverse --batch-size 2 --accumulate-steps 2"),
    ("distillation", "--cutmix-alpha 1 --teacher-image-size 224 --image-size 224"),
    ("distillation", "--mixup-alpha 1 --teacher-image-size 256"),
    ("distillation", "--fresh-teacher --fresh --seeds 0"),
    ("evaluate", "--baseline-checkpoint config.py --distilled-checkpoint config.py --no-timing"),
])
def test_what_can_work_is_not_refused(script, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    config.parse_args(script, "", flags.split())


def allowed(name):
    """What a value of the constant must be, in the words of its own message."""
    with pytest.raises(argparse.ArgumentTypeError) as error:
        config.SETTINGS[name]("")
    return re.fullmatch(r"must be (.*), not ''", str(error.value))[1]


WRONG_VALUES = {  # by how `allowed` begins: values of another type, or outside of any such range
    "a whole number": ["-1", "1.5", "nan", "inf", "", "many", "1e3", "0x10"],
    "a number": ["nan", "inf", "-inf", "-0.1", "", "many", "1,5"],
    "one of": ["", "none of these", "NaN"],
    "a classifier": ["", "efficientnet", "nan", "../b0"],
    "an existing file": ["", "/no/such/file", "~/no/such/file"],
    "an existing folder": ["", "/no/such/folder", __file__],
    "a path": [""],
}
OUTSIDE = {  # values just outside the range
    "IMAGE_SIZE": ["31"], "TEACHER_IMAGE_SIZE": ["31"], "BATCH_SIZE": ["0"],
    "ACCUMULATE_STEPS": ["0"], "NUM_EPOCHS": ["0"], "TEACHER_EPOCHS": ["0"], "NUM_WORKERS": ["-1"],
    "SEED": ["4294967296"], "SPLIT_SEED": ["4294967296"], "VAL_FRACTION": ["0", "1"],
    "ALPHA": ["-1e-9", "1.01"], "TEMPERATURE": ["0"], "LEARNING_RATE": ["0"],
    "TEACHER_LEARNING_RATE": ["0"], "WEIGHT_DECAY": ["-1e-9"], "WARMUP_EPOCHS": ["-1e-9"],
    "CLIP_GRAD": ["-1e-9"], "MIXUP_ALPHA": ["-1e-9"], "CUTMIX_ALPHA": ["-1e-9"],
    "LABEL_SMOOTHING": ["-1e-9", "1"], "EMA_DECAY": ["-1e-9", "1"],
}
FOLDERS = {"STUDENT_WEIGHTS": ["."], "TEACHER_WEIGHTS": ["."]}  # where a file is wanted
AT_THE_EDGE = {  # values that are just legal
    "IMAGE_SIZE": ["32"], "TEACHER_IMAGE_SIZE": ["32"], "BATCH_SIZE": ["1"],
    "ACCUMULATE_STEPS": ["1"], "NUM_EPOCHS": ["1"], "TEACHER_EPOCHS": ["1"], "NUM_WORKERS": ["0"],
    "SEED": ["0", "4294967295"], "SPLIT_SEED": ["0", "4294967295"],
    "VAL_FRACTION": ["1e-9", "0.999"], "ALPHA": ["0", "1"], "TEMPERATURE": ["1e-9"],
    "LEARNING_RATE": ["1e-9"], "TEACHER_LEARNING_RATE": ["1e-9"], "WEIGHT_DECAY": ["0", "7"],
    "WARMUP_EPOCHS": ["0"], "CLIP_GRAD": ["0", "7"], "MIXUP_ALPHA": ["0", "7"],
    "CUTMIX_ALPHA": ["0", "7"], "LABEL_SMOOTHING": ["0", "0.999"], "EMA_DECAY": ["0", "0.999"],
}


def wrong_values(name):
    kind = next(kind for kind in WRONG_VALUES if allowed(name).startswith(kind))
    return WRONG_VALUES[kind] + OUTSIDE.get(name, []) + FOLDERS.get(name, [])


@pytest.mark.parametrize("name", [name for name in CONSTANTS if name not in BOOLEANS])
def test_wrong_value_names_the_flag_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flag = flag_of(name)
    for script in ("baseline", "distillation"):
        if not has_flag(script, name):
            continue
        for value in wrong_values(name):
            message = refused(capsys, script, f"{flag}={value}")
            assert flag in message
            assert allowed(name) in message
            assert repr(value) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_values_at_the_edge_are_legal(name):
    flags = ["--warmup-epochs=0"]  # of which there may be no more than epochs
    for value in AT_THE_EDGE[name]:
        args = config.parse_args("distillation", "", [*flags, f"{flag_of(name)}={value}"])
        assert vars(args)[name.lower()] == float(value)


def test_every_number_has_its_edges_here():
    numbers = {name for name in CONSTANTS if "number" in allowed(name)}
    assert numbers == set(OUTSIDE) == set(AT_THE_EDGE)


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_take_no_value(name, capsys):
    assert isinstance(getattr(config, name), bool)
    assert flag_of(name) in refused(capsys, "baseline", f"{flag_of(name)}=1")
    args = config.parse_args("baseline", "", [flag_of(name).replace("--", "--no-")])
    assert vars(args)[name.lower()] is False


@pytest.mark.parametrize("name, value", [
    ("ALPHA", 2), ("BATCH_SIZE", "many"), ("PRETRAINED", 1), ("STUDENT_MODEL", "b0"),
    ("LEARNING_RATE", float("nan")), ("IMAGE_SIZE", 224.5), ("DATA_DIR", ""),
    ("DETERMINISTIC", "no")])
@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_config_is_held_to_the_rules_of_flags(name, value, flags, capsys, monkeypatch):
    """In every script: hours of the baseline would be lost on an ALPHA that is refused later."""
    monkeypatch.setattr(config, name, value)
    for script in SCRIPTS:
        message = refused(capsys, script, *flags)
        assert f"{name} in config.py" in message
        assert allowed(name) in message


@pytest.mark.parametrize("name, flags", [
    ("STUDENT_WEIGHTS", []), ("TEACHER_WEIGHTS", []), ("TEACHER_CHECKPOINT", []),
    ("DATASET_DIR", ["--dataset-name", "ImageFolder"])])
def test_file_of_config_must_exist_only_where_it_is_used(name, flags, capsys, monkeypatch):
    monkeypatch.setattr(config, name, "/no/such")
    message = refused(capsys, "distillation", *flags)
    assert f"{name} in config.py" in message
    assert allowed(name) in message

    config.parse_args("evaluate", "", [])
    config.parse_args("distillation", "", ["--quick"])
    config.parse_args("distillation", "", [flag_of(name), "None"])
    if name.startswith("TEACHER"):
        config.parse_args("baseline", "", [])


@pytest.mark.parametrize("name", sorted(MAY_BE_NONE))
def test_none_on_the_command_line_overrides_config(name, monkeypatch):
    monkeypatch.setattr(config, name, 64 if name == "TEACHER_IMAGE_SIZE" else str(ROOT / "tests"))
    args = config.parse_args("distillation", "", [flag_of(name), "None"])
    assert is_none(args, name)


def test_dataset_dir_of_config_and_another_dataset_have_a_way_out(capsys, monkeypatch):
    monkeypatch.setattr(config, "DATASET_NAME", "ImageFolder")
    monkeypatch.setattr(config, "DATASET_DIR", str(ROOT))
    assert "--dataset-dir None" in refused(capsys, "baseline", "--dataset-name", "CIFAR10")
    args = config.parse_args("baseline", "", ["--dataset-name", "CIFAR10", "--dataset-dir", "None"])
    assert args.dataset_dir is None


def test_deprecated_model_name_becomes_the_current_one():
    args = config.parse_args("baseline", "", ["--student-model", "tf_efficientnet_b0_ns"])
    assert args.student_model == "tf_efficientnet_b0.ns_jft_in1k"


def test_misspelt_flag_is_not_answered_with_a_name_that_is_no_flag(capsys):
    assert "--argv" not in refused(capsys, "baseline", "--args", "4")


def test_quicks_values_are_held_to_the_same_rules(capsys, monkeypatch):
    monkeypatch.setitem(config.QUICK, "ALPHA", 2)
    assert "ALPHA in QUICK" in refused(capsys, "distillation", "--quick")
    config.parse_args("distillation", "", [])


def test_constants_are_held_together_too(capsys, monkeypatch):
    monkeypatch.setattr(config, "NUM_EPOCHS", 1)
    monkeypatch.setattr(config, "WARMUP_EPOCHS", 2)
    message = refused(capsys, "baseline")
    assert "--num-epochs" in message
    assert "--warmup-epochs 2" in message


@pytest.mark.parametrize("name", CONSTANTS)
def test_five_constants_may_be_none(name, capsys, monkeypatch):
    assert (getattr(config, name) is None) == (name in MAY_BE_NONE)
    monkeypatch.setattr(config, name, None)
    if name in MAY_BE_NONE:
        assert is_none(config.parse_args("distillation", "", []), name)
    else:
        assert f"{name} in config.py" in refused(capsys, "distillation")


@pytest.mark.parametrize("old, new, words", [
    ("NUM_EPOCHS = 50", "NUM_EPOCH = 50", ["NUM_EPOCH in", "closest: NUM_EPOCHS"]),
    ("SEED = 42", "", ["SEED is missing"]),
    ("NUM_EPOCHS = 50", "#NUM_EPOCHS = 50", ["NUM_EPOCHS is missing"]),
    ("SEED = 42", "SEED = 42\nnum_epochs = 3", ["num_epochs in", "closest: NUM_EPOCHS"]),
    ("SEED = 42", "SEED: int = 42.5", ["SEED in", "whole number"]),
    ("SEED = 42", "SEED = 42\nTEMPERATUR = 2", ["TEMPERATUR in", "closest: TEMPERATURE"]),
    ('"BATCH_SIZE": 64', '"BATCHSIZE": 64', ["BATCHSIZE in QUICK", "closest: BATCH_SIZE"]),
    ("QUICK = {", "QUICK = 5, {", ["QUICK in", "dict", "(5, {"]),
    ("QUICK = {", "NO = {", ["NO in"]),
])
def test_misspelt_or_missing_constant_is_named(capsys, tmp_path, old, new, words):
    module = loaded(edited(tmp_path, old, new))
    message = refused(capsys, "baseline", "--quick", module=module)
    assert all(word in message for word in [*words, "config.py"]), message


def test_four_hundred_random_command_lines_meet_no_traceback(tmp_path, monkeypatch, capsys):
    """Flags of all scripts with good, bad and missing values: parsed, or refused in a sentence."""
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    flags = [flag_of(name) for name in CONSTANTS]
    flags += ["--quick", "--fresh", "--fresh-teacher", "--seeds", "--no-pretrained", "--help",
              "--baseline-checkpoint", "--", "-x", "--sed", "--SEED"]
    values = ["0", "1", "16", "0.5", "-1", "nan", "1e9", "9" * 40, "", " ", "ü", "\0", "%s", "{}",
              "--", "-", "CIFAR100", "Digits", "ImageFolder", "efficientnet_b0", "resnet18.a1_in1k",
              "vit_tiny_patch16_224", ".", "/", "~", "fp16", "cuda", "cpu", "forward", "crop"]
    parsed = 0
    for _ in range(400):
        line = []
        for _ in range(generator.randrange(1, 5)):
            flag = generator.choice(flags)
            value = generator.choice(values)
            line += generator.choice([[flag, value], [flag], [f"{flag}={value}"], [value]])
        try:
            config.parse_args(generator.choice(SCRIPTS), "", line)
            parsed += 1
        except SystemExit as stop:
            out, err = capsys.readouterr()
            if stop.code == 0:
                assert "options:" in out and not err, line
            else:
                assert stop.code == 2 and err.count("\n") == 1 and not out, (line, err)
    assert 0 < parsed < 400
    assert not list(tmp_path.iterdir())


def test_value_that_argparse_takes_for_an_empty_list_is_refused(capsys):
    assert "--results-dir=--" in refused(capsys, "evaluate", "--results-dir=--")


# The next command ---------------------------------------------------------------------------------

@pytest.mark.parametrize("script, argv, command", [
    ("distillation", ["--batch-size", "8"], "train_distillation.py --batch-size 8"),
    ("distillation", ["--fresh", "--quick"], "train_distillation.py --quick"),
    ("evaluate", ["--seeds", "0", "1", "--data-dir=d", "--no-pretrained"],
     "evaluate.py --data-dir=d"),
    ("baseline", ["--seeds", "0", "1", "--alpha", "0.5"], "train_baseline.py --seeds 0 1"),
    ("baseline", ["--seed", "1", "--seed", "2"], "train_baseline.py --seed 2"),
    ("baseline", ["--data-dir", "my data"], "train_baseline.py --data-dir 'my data'")])
def test_next_command_has_the_flags_of_its_script(script, argv, command):
    assert config.format_command(script, argv) == f"python {command}"


def test_next_command_is_quoted_for_its_shell(monkeypatch):
    argv = ["--dataset-dir", r"C:\a (1) & b", "--data-dir", r"D:\data-1"]
    monkeypatch.setattr(sys, "platform", "linux")
    command = config.format_command("evaluate", argv)
    assert command.endswith(r"--dataset-dir 'C:\a (1) & b' --data-dir 'D:\data-1'")
    monkeypatch.setattr(sys, "platform", "win32")
    command = config.format_command("evaluate", argv)
    assert command.endswith(r'--dataset-dir "C:\a (1) & b" --data-dir D:\data-1')


def test_next_command_works_in_the_folder_where_this_one_was_typed(monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    monkeypatch.setattr(sys, "argv", [f"{ROOT.name}/train_baseline.py"])
    assert config.format_command("evaluate", []) == f"python {ROOT.name}/evaluate.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_baseline.py"])
    assert config.format_command("evaluate", []) == "python evaluate.py"


# Processes and devices ----------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--help", "--batch"])
def test_of_torchruns_processes_the_first_alone_answers(flag, capsys, monkeypatch):
    monkeypatch.setattr(utils, "RANK", 1)
    with pytest.raises(SystemExit) as stop:
        config.parse_args("baseline", "", [flag])
    assert not stop.value.code  # torchrun reports the process that fails, which is the first
    out, err = capsys.readouterr()
    assert not out
    assert not err


def test_deterministic_runs_on_apple_gpus_are_wrong_use(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = config.parse_args("baseline", "", ["--deterministic", "--device", "mps"])
    with pytest.raises(utils.UsageError, match="--deterministic"):  # exit status 2
        utils.setup(args)


def ended(folder, *command):
    """A Python process with `command` that has run in `folder`."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_wrong_use(tmp_path):
    process = ended(tmp_path, ROOT / "train_baseline.py", "--quick", "--device", "cuda")
    assert process.returncode == 2
    assert "--device" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("new, word", [
    ("PRETRAINED = ", "invalid syntax"), ("PRETRAINED = true", "'true' is not defined")])
def test_config_that_python_cannot_read_names_the_file(tmp_path, new, word):
    edited(tmp_path, "PRETRAINED = True", new)
    code = (f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
            f"runpy.run_path({str(ROOT / 'train_baseline.py')!r})")
    process = ended(tmp_path, "-c", code)
    assert process.returncode != 0
    assert word in process.stderr
    assert "config.py" in process.stderr


@pytest.mark.slow
def test_wrong_edit_of_config_is_one_sentence_before_any_work(tmp_path):
    """As a person meets it: the project with one constant changed."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, 'KL_DIRECTION = "forward"', 'KL_DIRECTION = "forwards"')
    files = set(tmp_path.iterdir())
    process = ended(tmp_path, "-B", "train_baseline.py", "--quick")  # -B: no __pycache__
    assert process.returncode == 2
    assert not process.stdout
    assert process.stderr.count("\n") == 1
    for word in ("KL_DIRECTION in config.py", "'forwards'", "closest: forward"):
        assert word in process.stderr
    assert set(tmp_path.iterdir()) == files


# The seeds of --quick -----------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["baseline", "distillation"])
def test_quick_trains_its_own_seeds_unless_others_are_given(script):
    def seeds(*flags):
        args = config.parse_args(script, "", list(flags))
        return args.seeds, args.seed

    quick_seeds = list(config.QUICK["SEEDS"])
    assert seeds("--quick") == (quick_seeds, quick_seeds[0])
    assert seeds("--quick", "--seeds", "4", "5") == ([4, 5], 4)
    assert seeds("--quick", "--seed", "7") == (None, 7)
    assert seeds("--seed=7", "--quick") == (None, 7)
    assert seeds() == (None, config.SEED)


@pytest.mark.parametrize("wrong", [None, 3, "0 1", [0, -1], [0.5], [1, 1]])
def test_quicks_seeds_are_checked(capsys, monkeypatch, wrong):
    monkeypatch.setitem(config.QUICK, "SEEDS", wrong)
    with pytest.raises(SystemExit) as error:
        config.parse_args("baseline", "", ["--quick"])
    assert error.value.code == 2
    assert "seed" in capsys.readouterr().err.lower()
