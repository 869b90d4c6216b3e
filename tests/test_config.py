"""config.py: constants, their flags and help, what is refused and with which sentence.

    python -m pytest tests/test_config.py
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

import pytest
import torch

import config
import utils
from conftest import ROOT

SCRIPTS = ("baseline", "distillation", "evaluate")

# Written down once more: in which scripts a constant is a flag, and what a run may go on without.
EVERYWHERE = {"DATASET_DIR", "DATA_DIR", "NUM_WORKERS", "DEVICE", "CHECKPOINT_DIR", "RESULTS_DIR"}
ABOUT_TEACHER = {"TEACHER_MODEL", "TEACHER_WEIGHTS", "TEACHER_CHECKPOINT", "TEACHER_EPOCHS",
                 "TEACHER_LEARNING_RATE"}
DISTILLATION_ALONE = ABOUT_TEACHER | {"TEACHER_IMAGE_SIZE", "DISTILLATION_LOSS", "TEMPERATURE",
                                      "ALPHA", "KL_DIRECTION"}


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def has_flag(script, name):
    if script == "evaluate":
        return name in EVERYWHERE
    return script == "distillation" or name not in DISTILLATION_ALONE


def constants(text):
    """{constant: its comment} of a config.py's `text`, as Python's own tokenizer sees it.

    Lines of a comment are joined; a comment at the margin belongs to no constant.
    """
    comments, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[1] == 0 and token.string == "QUICK":
            return comments
        if token.start[1] == 0 and token.string.isupper():
            name = token.string
            comments[name] = ""
        elif token.type == tokenize.COMMENT and token.start[1] > 0:
            comments[name] = f"{comments[name]} {token.string.removeprefix('# ')}".strip()
    raise AssertionError("no QUICK")


CONSTANTS = constants((ROOT / "config.py").read_text(encoding="utf-8"))


def refused(capsys, script, *flags, module=config):
    """The one sentence with which `script` refuses `flags`."""
    with pytest.raises(SystemExit) as stop:
        module.parse_args(script, "", list(flags))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
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

def test_every_constant_has_its_setting_and_every_setting_its_constant():
    assert set(CONSTANTS) == set(config.SETTINGS)


def test_every_constant_says_what_it_is():
    assert all(CONSTANTS.values()), CONSTANTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_a_flag_with_its_comment_as_help_and_its_value_as_default(capsys, script):
    texts = help_texts(capsys, script)
    for name, comment in CONSTANTS.items():
        assert (flag_of(name) in texts) == has_flag(script, name), name
        if has_flag(script, name):
            wanted = f"{comment} (default: {getattr(config, name)})"
            assert texts[flag_of(name)].endswith(wanted), name


def test_other_flags_have_help_too(capsys):
    others = {"baseline": {"--quick", "--seeds", "--fresh"},
              "distillation": {"--quick", "--seeds", "--fresh", "--fresh-teacher"},
              "evaluate": {"--quick", "--baseline-checkpoint", "--distilled-checkpoint"}}
    for script, flags in others.items():
        texts = help_texts(capsys, script)
        settings = {flag_of(name) for name in CONSTANTS}
        assert texts.keys() - settings == flags
        assert all(len(texts[flag].split()) > 2 for flag in flags), texts


def test_help_is_what_the_script_says_of_itself_line_by_line_and_then_the_flags(capsys):
    with pytest.raises(SystemExit):
        config.parse_args("baseline", "Train it.\n\n    python it.py", ["--help"])
    assert capsys.readouterr().out.startswith("Train it.\n\n    python it.py\n\noptions:\n  -h")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_constants_in_the_order_of_the_file(capsys, script):
    flags = list(help_texts(capsys, script))
    settings = [flag_of(name) for name in CONSTANTS if has_flag(script, name)]
    assert flags[:len(settings)] == settings


def test_every_legal_name_stands_in_the_comment():
    choices = {}
    for name in CONSTANTS:
        kind = allowed(name)
        if kind.startswith("one of "):
            choices[name] = kind.removeprefix("one of ").split(", ")
    counts = {name: len(names) for name, names in choices.items()}
    assert counts == {"DATASET_NAME": 5, "AUGMENTATION": 5, "DISTILLATION_LOSS": 3,
                      "KL_DIRECTION": 2, "DEVICE": 5, "AMP_DTYPE": 4}
    for name, names in choices.items():
        for legal in names:
            assert re.search(rf"\b{legal}\b", CONSTANTS[name]), f"{legal} of {name}"


@pytest.mark.parametrize("new, text", [
    ("BATCH_SIZE = 8  # 50% of mine", "50% of mine (default: 8)"),
    ("BATCH_SIZE=8 #mine", "mine (default: 8)"),
    ("BATCH_SIZE = 8", "(default: 8)")])
def test_a_person_may_write_any_comment_or_none(capsys, tmp_path, new, text):
    old = re.search("BATCH_SIZE = 16 .*", (ROOT / "config.py").read_text(encoding="utf-8"))[0]
    module = loaded(edited(tmp_path, old, new))
    assert help_texts(capsys, "baseline", module)["--batch-size"] == f"BATCH_SIZE {text}"
    assert module.parse_args("baseline", "", []).batch_size == 8


def test_design_defaults():
    wanted = {"DATASET_NAME": "CIFAR100", "TEACHER_MODEL": "efficientnet_b2",
              "STUDENT_MODEL": "efficientnet_b0", "TEMPERATURE": 4.0, "ALPHA": 0.7,
              "BATCH_SIZE": 16, "NUM_EPOCHS": 50, "IMAGE_SIZE": 224, "TEACHER_IMAGE_SIZE": None,
              "PRETRAINED": True, "STUDENT_WEIGHTS": None, "TEACHER_WEIGHTS": None,
              "TEACHER_CHECKPOINT": None, "DISTILLATION_LOSS": "kd", "KL_DIRECTION": "forward",
              "AMP_DTYPE": "auto", "SEED": 42, "SPLIT_SEED": 0, "VAL_FRACTION": 0.1,
              "DATA_DIR": "data", "CHECKPOINT_DIR": "checkpoints", "RESULTS_DIR": "results"}
    found = {name: getattr(config, name) for name in wanted}
    assert found == wanted


def test_a_run_goes_on_when_these_change():
    """And a student whose teacher's file is the same, when settings of that teacher change."""
    neutral = {name.lower() for name in EVERYWHERE}
    about_teacher = {name.lower() for name in ABOUT_TEACHER}
    assert neutral | {"argv", "quick", "fresh", "seeds", "fresh_teacher"} == config.MAY_CHANGE_ON_RESUME
    assert about_teacher == config.TEACHER_ONLY


# Values -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_without_flags_the_values_are_those_of_the_file(script):
    args = vars(config.parse_args(script, "", []))
    for name in CONSTANTS:
        assert (name.lower() in args) == has_flag(script, name), name
        if has_flag(script, name):
            assert args[name.lower()] == getattr(config, name), name


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
    assert quick.image_size == config.QUICK["IMAGE_SIZE"] and not quick.pretrained
    for flags in (["--quick", "--image-size", "64"], ["--image-size", "64", "--quick"]):
        assert config.parse_args("baseline", "", flags).image_size == 64


def test_quick_is_small_and_needs_nothing_whatever_the_constants_say(monkeypatch):
    edits = {"DATASET_NAME": "ImageFolder", "DATASET_DIR": "/no/such/folder", "IMAGE_SIZE": 512,
             "TEACHER_IMAGE_SIZE": 640, "AUGMENTATION": "resized_crop",
             "STUDENT_WEIGHTS": "/no/such/file", "TEACHER_WEIGHTS": "/no/such/file",
             "TEACHER_CHECKPOINT": "/no/such/file", "NUM_EPOCHS": 500, "TEACHER_EPOCHS": 500}
    for name, content in edits.items():
        monkeypatch.setattr(config, name, content)
    quick = vars(config.parse_args("distillation", "", ["--quick"]))
    assert quick["dataset_name"] == "Digits" and quick["augmentation"] == "auto"
    assert quick["image_size"] == 32 and quick["pretrained"] is False
    assert quick["num_epochs"] < 50 and quick["teacher_epochs"] < 50
    for name in ("dataset_dir", "teacher_image_size", "student_weights", "teacher_weights",
                 "teacher_checkpoint"):
        assert quick[name] is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_never_touches_a_real_run(script):
    flags = ["--quick", "--checkpoint-dir", "a", "--results-dir", "b"]
    args = config.parse_args(script, "", flags)
    assert args.checkpoint_dir.replace("\\", "/") == "a/quick"
    assert args.results_dir.replace("\\", "/") == "b/quick"


def test_several_seeds_are_kept_in_order_and_the_first_is_the_teachers():
    args = config.parse_args("distillation", "", ["--seeds", "7", "3", "4294967295"])
    assert args.seeds == [7, 3, config.MAX_SEED] and args.seed == 7
    alone = config.parse_args("distillation", "", ["--seed", "9"])
    assert alone.seeds is None and alone.seed == 9


def test_evaluation_asks_the_checkpoint_for_its_folder_not_config(monkeypatch):
    monkeypatch.setattr(config, "DATASET_DIR", "/moved/since")
    assert config.parse_args("evaluate", "", []).dataset_dir is None
    assert config.parse_args("evaluate", "", ["--dataset-dir", str(ROOT)]).dataset_dir == str(ROOT)


# Wrong use ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, words", [
    ("baseline", "--batchsize 4", ["--batchsize", "--batch-size", "--help lists every flag"]),
    ("baseline", "--batch 4", ["unknown argument '--batch'"]),  # no abbreviations
    ("baseline", "--batch_size 4", ["unknown argument '--batch_size'", "--batch-size"]),
    ("baseline", "stray", ["unknown argument 'stray'"]),
    ("baseline", "--temperature 4", ["no flag of this script but of train_distillation.py"]),
    ("evaluate", "--seed 1", ["no flag of this", "of train_baseline.py and train_distillation.py"]),
    ("evaluate", "--no-pretrained", ["of train_baseline.py and train_distillation.py"]),
    ("baseline", "--dataset-name CIFAR1000", ["CIFAR100", "Flowers102", "not 'CIFAR1000'"]),
    ("baseline", "--dataset-name digits", ["closest: Digits"]),
    ("baseline", "--student-model eficientnet_b0", ["closest: efficientnet_b0"]),
    ("baseline", "--student-model efficientnet_b0.ra_in1kk", ["closest: efficientnet_b0.ra_in1k"]),
    ("distillation", "--teacher-model efficientnet", ["timm.list_models()"]),
    ("distillation", "--kl-direction backward", ["forward, reverse"]),
    ("distillation", "--distillation-loss kdd", ["kd, dist, lskd"]),
    ("baseline", "--batch-size 0", ["at least 1, not '0'"]),
    ("baseline", "--batch-size 16.5", ["whole number"]),
    ("baseline", "--batch-size", ["expected one argument"]),
    ("baseline", "--learning-rate nan", ["above 0"]),
    ("baseline", "--learning-rate inf", ["above 0"]),
    ("baseline", "--val-fraction 1", ["above 0 and below 1"]),
    ("distillation", "--alpha 1.1", ["from 0 to 1"]),
    ("distillation", "--temperature 0", ["above 0"]),
    ("baseline", "--image-size 16", ["at least 32"]),
    ("baseline", "--student-weights /no/such/file", ["existing file"]),
    ("distillation", "--teacher-checkpoint /no/such/file", ["existing file"]),
    ("evaluate", "--baseline-checkpoint /no/such/file", ["existing file"]),
    ("evaluate", "--distilled-checkpoint /no/such/file", ["existing file"]),
    ("baseline", "--seed 18446744073709551616", ["4294967295"]),
    ("baseline", "--split-seed 4294967296", ["4294967295"]),
    ("baseline", "--seeds 0 x", ["--seeds: must be a whole number"]),
    ("baseline", "--seeds", ["expected at least one argument"]),
    ("baseline", "--seeds 0 1 0", ["each seed once"]),
    ("baseline", "--seeds 0 1 --seed 2", ["no --seed beside"]),
    ("baseline", "--seed=42 --seeds 0 1", ["no --seed beside"]),
    ("baseline", "--dataset-name ImageFolder", ["--dataset-dir"]),
    ("baseline", "--dataset-dir .", ["only for and with ImageFolder"]),
    ("baseline", "--dataset-name ImageFolder --dataset-dir /no/such", ["existing folder"]),
    ("evaluate", "--dataset-dir /no/such", ["existing folder"]),
    ("baseline", "--num-epochs 2 --warmup-epochs 3", ["--num-epochs", "--warmup-epochs 3"]),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 3", ["--teacher-epochs"]),
    ("baseline", "--mixup-alpha 0.2 --batch-size 15", ["a multiple of 2"]),
    ("baseline", "--cutmix-alpha 0.2 --batch-size 15", ["a multiple of 2"]),
    ("distillation", "--cutmix-alpha 1 --teacher-image-size 256", ["--teacher-image-size"]),
    ("baseline", "--student-weights config.py --no-pretrained", ["--no-pretrained"]),
    ("distillation", "--teacher-weights config.py --no-pretrained", ["--teacher-weights"]),
    ("baseline", "--student-model efficientnet_b8", ["--student-model", "no weights of"]),
    ("distillation", "--teacher-model efficientnet_b8", ["--teacher-model", "--teacher-weights"]),
    ("baseline", "--student-model vit_tiny_patch16_224 --image-size 128", ["224 px alone"]),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --teacher-image-size 96", ["not 96"]),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --image-size 96", ["alone, not 96"]),
    ("distillation", "--distillation-loss dist --kl-direction reverse", ["in no direction"]),
    ("distillation", "--distillation-loss dist --batch-size 2", ["3 images or more"]),
    ("distillation", "--distillation-loss dist --accumulate-steps 2", ["whole batches"]),
    ("distillation", "--fresh-teacher --teacher-checkpoint config.py", ["no teacher is trained"]),
    ("baseline", "--cuda-graph --accumulate-steps 2", ["--cuda-graph", "--accumulate-steps"]),
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
    ("baseline", "--student-model vit_tiny_patch16_224 --image-size 224"),
    ("baseline", "--dataset-name ImageFolder --dataset-dir ."),
    ("distillation", "--teacher-model efficientnet_b8 --teacher-weights config.py"),
    ("distillation", "--teacher-model efficientnet_b8 --teacher-checkpoint config.py"),
    ("distillation", "--teacher-model vit_tiny_patch16_224 --teacher-image-size 224"),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 3 --teacher-checkpoint config.py"),
    ("distillation", "--teacher-epochs 2 --warmup-epochs 2"),
    ("distillation", "--distillation-loss kd --batch-size 1 --accumulate-steps 2"),
    ("distillation", "--distillation-loss dist --batch-size 3 --mixup-alpha 0"),
    ("distillation", "--distillation-loss lskd --kl-direction reverse"),
    ("distillation", "--kl-direction reverse --batch-size 2 --accumulate-steps 2"),
    ("distillation", "--cutmix-alpha 1 --teacher-image-size 224 --image-size 224"),
    ("distillation", "--mixup-alpha 1 --teacher-image-size 256"),
    ("distillation", "--fresh-teacher --fresh --seeds 0"),
    ("evaluate", "--baseline-checkpoint config.py --distilled-checkpoint config.py"),
])
def test_what_can_work_is_not_refused(script, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    config.parse_args(script, "", flags.split())


def allowed(name):
    """What a value of the constant must be, in the words of its own message."""
    with pytest.raises(argparse.ArgumentTypeError) as error:
        config.SETTINGS[name]("")
    return re.fullmatch(r"must be (.*), not ''", str(error.value))[1]


WRONG = {  # how `allowed` begins: values of another type, or outside of any such range
    "a whole number": ["-1", "1.5", "nan", "inf", "", "many", "1e3", "0x10"],
    "a number": ["nan", "inf", "-inf", "-0.1", "", "many", "1,5"],
    "one of": ["", "none of these", "NaN"],
    "a classifier": ["", "efficientnet", "nan", "../b0"],
    "an existing file": ["", "/no/such/file", "."],
    "an existing folder": ["", "/no/such/folder", __file__],
    "a path": [""],
}
EDGES = {  # (values just outside the range, values at its edge)
    "IMAGE_SIZE": (["31"], ["32"]), "TEACHER_IMAGE_SIZE": (["31"], ["32"]),
    "BATCH_SIZE": (["0"], ["1"]), "ACCUMULATE_STEPS": (["0"], ["1"]), "NUM_EPOCHS": (["0"], ["1"]),
    "TEACHER_EPOCHS": (["0"], ["1"]), "NUM_WORKERS": (["-1"], ["0"]),
    "SEED": (["4294967296"], ["0", "4294967295"]),
    "SPLIT_SEED": (["4294967296"], ["0", "4294967295"]),
    "VAL_FRACTION": (["0", "1"], ["1e-9", "0.999"]), "ALPHA": (["-1e-9", "1.01"], ["0", "1"]),
    "TEMPERATURE": (["0"], ["1e-9"]), "LEARNING_RATE": (["0"], ["1e-9"]),
    "TEACHER_LEARNING_RATE": (["0"], ["1e-9"]), "WEIGHT_DECAY": (["-1e-9"], ["0", "7"]),
    "WARMUP_EPOCHS": (["-1e-9"], ["0"]), "CLIP_GRAD": (["-1e-9"], ["0", "7"]),
    "MIXUP_ALPHA": (["-1e-9"], ["0", "7"]), "CUTMIX_ALPHA": (["-1e-9"], ["0", "7"]),
    "LABEL_SMOOTHING": (["-1e-9", "1"], ["0", "0.999"]),
    "EMA_DECAY": (["-1e-9", "1"], ["0", "0.999"]),
}
BOOLEANS = ("PRETRAINED", "DETERMINISTIC", "CUDA_GRAPH")


def wrong_values(name):
    [values] = [values for kind, values in WRONG.items() if allowed(name).startswith(kind)]
    outside, _ = EDGES.get(name, ([], []))
    return values + outside


@pytest.mark.parametrize("name", [name for name in CONSTANTS if name not in BOOLEANS])
def test_wrong_value_names_the_flag_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flag = flag_of(name)
    for script in ("baseline", "distillation"):
        if not has_flag(script, name):
            continue
        for value in wrong_values(name):
            message = refused(capsys, script, f"{flag}={value}")
            assert f"argument {flag}: must be {allowed(name)}, not {value!r}" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EDGES)
def test_values_at_the_edge_are_legal(name):
    _, edge = EDGES[name]
    flags = ["--warmup-epochs=0"]  # of which there may be no more than epochs
    for value in edge:
        args = config.parse_args("distillation", "", [*flags, f"{flag_of(name)}={value}"])
        assert vars(args)[name.lower()] == float(value)


def test_every_number_has_its_edges_here():
    numbers = {name for name in CONSTANTS if "number" in allowed(name)}
    assert numbers == set(EDGES)


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_take_no_value(name, capsys):
    assert isinstance(getattr(config, name), bool)
    assert f"argument {flag_of(name)}" in refused(capsys, "baseline", f"{flag_of(name)}=1")
    args = config.parse_args("baseline", "", [flag_of(name).replace("--", "--no-")])
    assert vars(args)[name.lower()] is False


@pytest.mark.parametrize("name, value", [
    ("ALPHA", 2), ("BATCH_SIZE", "many"), ("PRETRAINED", 1), ("STUDENT_MODEL", "b0"),
    ("SEED", None), ("LEARNING_RATE", float("nan")), ("IMAGE_SIZE", 224.5), ("DATA_DIR", ""),
    ("KL_DIRECTION", None), ("DETERMINISTIC", "no"), ("STUDENT_WEIGHTS", "/no/such/file")])
def test_config_is_held_to_the_rules_of_flags(name, value, capsys, monkeypatch):
    monkeypatch.setattr(config, name, value)
    for script in SCRIPTS:  # hours of the baseline would be lost on an ALPHA that is refused later
        assert f"{name} in config.py must be {allowed(name)}, not" in refused(capsys, script)


def test_constants_are_held_together_too(capsys, monkeypatch):
    monkeypatch.setattr(config, "NUM_EPOCHS", 0.5)
    assert "NUM_EPOCHS in config.py must be a whole number" in refused(capsys, "baseline")
    monkeypatch.setattr(config, "NUM_EPOCHS", 1)
    monkeypatch.setattr(config, "WARMUP_EPOCHS", 2)
    assert "--num-epochs: 1 is less than --warmup-epochs 2" in refused(capsys, "baseline")


OPTIONAL = {"DATASET_DIR", "TEACHER_IMAGE_SIZE", "STUDENT_WEIGHTS", "TEACHER_WEIGHTS",
            "TEACHER_CHECKPOINT"}


@pytest.mark.parametrize("name", CONSTANTS)
def test_five_constants_may_be_none(name, capsys, monkeypatch):
    assert (getattr(config, name) is None) == (name in OPTIONAL)
    monkeypatch.setattr(config, name, None)
    if name in OPTIONAL:
        assert vars(config.parse_args("distillation", "", []))[name.lower()] is None
    else:
        assert f"{name} in config.py must be" in refused(capsys, "distillation")


def test_deprecated_names_of_timm_are_models_too():
    args = config.parse_args("baseline", "", ["--student-model", "tf_efficientnet_b0_ns",
                                                 "--no-pretrained"])
    assert args.student_model == "tf_efficientnet_b0_ns"


def test_four_hundred_random_command_lines_meet_no_traceback(tmp_path, monkeypatch, capsys):
    """Flags of all scripts with good, bad and missing values: parsed, or refused in a sentence."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    flags = [flag_of(name) for name in CONSTANTS]
    flags += ["--quick", "--fresh", "--fresh-teacher", "--seeds", "--no-pretrained", "--help",
              "--baseline-checkpoint", "--", "-x", "--sed", "--SEED"]
    values = ["0", "1", "16", "0.5", "-1", "nan", "1e9", "9" * 40, "", " ", "ü", "\0", "%s", "{}",
              "--", "-", "CIFAR100", "Digits", "ImageFolder", "efficientnet_b0", "resnet18.a1_in1k",
              "vit_tiny_patch16_224", ".", "/", "fp16", "cuda", "cpu", "forward", "crop"]
    parsed = 0
    for _ in range(400):
        line = []
        for _ in range(chance.randrange(1, 5)):
            flag, value = chance.choice(flags), chance.choice(values)
            line += chance.choice([[flag, value], [flag], [f"{flag}={value}"], [value]])
        try:
            config.parse_args(chance.choice(SCRIPTS), "", line)
            parsed += 1
        except SystemExit as stop:
            out, err = capsys.readouterr()
            helped = stop.code == 0 and "options:" in out and not err
            told = stop.code == 2 and err.count("\n") == 1 and "error: " in err and not out
            assert helped or told, (line, err)
    with pytest.raises(SystemExit):  # argparse would take this for an empty list
        config.parse_args("evaluate", "", ["--results-dir=--"])
    assert "unknown argument '--results-dir=--'" in capsys.readouterr().err
    assert 0 < parsed < 400 and not list(tmp_path.iterdir())


# As a process -------------------------------------------------------------------------------------

def ended(folder, *command):
    """A Python process with `command` that has run in `folder`."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_wrong_use(tmp_path):
    process = ended(tmp_path, ROOT / "train_baseline.py", "--quick", "--device", "cuda")
    assert process.returncode == 2
    assert process.stderr.startswith("error: argument --device: ") and "CUDA" in process.stderr
    assert process.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_deterministic_runs_on_apple_gpus_are_wrong_use(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = config.parse_args("baseline", "", ["--deterministic", "--device", "mps"])
    with pytest.raises(utils.UsageError, match="--deterministic"):  # exit status 2
        utils.setup(args)


@pytest.mark.parametrize("old, new, sentence", [
    ("NUM_EPOCHS = 50", "NUM_EPOCH = 50", "NUM_EPOCH in config.py is no setting (closest: NUM_EPO"),
    ("SEED = 42", "", "SEED in config.py is missing"),
    ("NUM_EPOCHS = 50", "#NUM_EPOCHS = 50", "NUM_EPOCHS in config.py is missing"),
    ("SEED = 42", "SEED = 42\nnum_epochs = 3", "num_epochs in config.py is no setting (closest: N"),
    ("SEED = 42", "SEED: int = 42.5", "SEED in config.py must be a whole number"),
    ("SEED = 42", "SEED = 42\nTEMPERATUR = 2", "TEMPERATUR in config.py is no setting (closest: T"),
    ('"BATCH_SIZE": 64', '"BATCHSIZE": 64', "BATCHSIZE in config.py is no setting (closest: "),
    ("QUICK = {", "QUICK = 5, {", "QUICK in config.py must be a dict of settings, not (5, {"),
    ("QUICK = {", "NO = {", "QUICK in config.py must be a dict of settings, not None"),
    ('RESULTS_DIR = "results"', "RESULTS_DIR = None", "RESULTS_DIR in config.py must be a path, "),
])
def test_misspelt_or_missing_constant_is_named(tmp_path, old, new, sentence):
    (tmp_path / "config.py").write_bytes((ROOT / "config.py").read_bytes())
    edited(tmp_path, old, new)
    process = ended(tmp_path, "-c", "import config; config.parse_args('baseline', '', [])")
    assert process.returncode == 2 and f"error: {sentence}" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_baseline.py", "train_distillation.py", "evaluate.py"])
@pytest.mark.parametrize("new, sentence", [
    ("PRETRAINED = ", "invalid syntax (config.py, line 3"),
    ("PRETRAINED = true", "name 'true' is not defined"),
    ("PRETRAINED = 1 / 0", "division by zero")])
def test_config_that_python_cannot_read_is_one_sentence(tmp_path, script, new, sentence):
    (tmp_path / "config.py").write_bytes((ROOT / "config.py").read_bytes())
    edited(tmp_path, "PRETRAINED = True", new)
    code = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
    process = ended(tmp_path, "-c", code + f"runpy.run_path({str(ROOT / script)!r})")
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("error: config.py cannot be read: " + sentence)


def test_wrong_edit_of_config_is_one_sentence_before_any_work(tmp_path):
    """As a person meets it: the project with one constant changed."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, 'KL_DIRECTION = "forward"', 'KL_DIRECTION = "forwards"')
    files = set(tmp_path.iterdir())
    process = ended(tmp_path, "-B", "train_baseline.py", "--quick")  # -B: no __pycache__
    assert process.returncode == 2 and not process.stdout and process.stderr.count("\n") == 1
    wanted = "train_baseline.py: error: KL_DIRECTION in config.py must be one of forward, reverse, "
    assert process.stderr.startswith(wanted + "not 'forwards' (closest: forward")
    assert set(tmp_path.iterdir()) == files
