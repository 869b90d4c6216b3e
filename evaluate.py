"""Compare the distilled student with the baseline on the test images: how large the gain is, how
certain, and where it comes from.

    python evaluate.py            # the students in checkpoints/, for all seeds that both have
    python evaluate.py --quick    # the students of the quick run

Dataset, split, image size and crop are read from the checkpoints. Writes to results/: a report for
people, comparison.json and predictions.npz for programs, tables as Markdown, LaTeX and CSV, and
every figure as PNG and PDF.
"""
import argparse
import contextlib
import csv
import errno
import io
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
from matplotlib.font_manager import fontManager
from matplotlib.transforms import Bbox
from scipy import optimize, stats
from scipy.cluster import hierarchy
from scipy.special import log_softmax
from sklearn import metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import data_loader
import models
import utils
from utils import UserError

STUDENTS = ("baseline", "distilled")
ROLES = (*STUDENTS, "teacher")

SCORES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "macro_f1": "macro-F1",
    "val_accuracy": "validation accuracy",
}
MIN_SEEDS = 3          # with fewer, the verdict ignores the variation between seeds
MIN_DISCORDANT = 25    # images that only one student gets right; fewer leave it undecided
MIN_CLASSES_TOP5 = 6   # with five classes or fewer, top-5 accuracy is always 100 %
CALIBRATION_BINS = 15  # equal-width bins of confidence, as in Guo et al. 2017
CONFUSED_PAIRS = 10    # pairs of classes listed in comparison.json for each role

# Timing of inference. The models take turns, so that a busy machine slows all of them alike.
LATENCY_BATCH = 1
THROUGHPUT_BATCH = 64
PASSES_PER_ROUND = {LATENCY_BATCH: 10, THROUGHPUT_BATCH: 1}
MIN_ROUNDS = 3         # run even if they exceed SECONDS_LIMIT
MAX_ROUNDS = 30
SECONDS_LIMIT = 12     # for all rounds of one batch size
COMPARABLE_ROUNDS = 6  # needed to compare times: three models in each of their 3! = 6 orders

# The 20 superclasses of CIFAR-100 (Krizhevsky 2009), with class names as in the dataset's files.
CIFAR100_SUPERCLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def main(args):
    device = utils.setup(args)
    results_dir = Path(args.results_dir)

    # Load each model and run it once on the test images.
    paths, left_out = find_students(args)
    results_dir.mkdir(parents=True, exist_ok=True)  # a wrong folder shows before the work
    _, reference = models.load_model(paths["distilled"][0])
    test, data, missing_classes, no_validation = open_images(reference, args)
    trained = {}
    for role in STUDENTS:
        trained[role] = [load_trained(path, reference, test, data, args, device)
                         for path in paths[role]]
    teacher_path, no_teacher = find_teacher(trained["distilled"], args)
    if teacher_path:
        trained["teacher"] = [load_trained(teacher_path, reference, test, data, args, device,
                                           is_teacher=True)]

    # Numbers
    labels = test.labels.numpy()
    results = compare(trained, labels, data, args.dataset_dir)
    results["inference"] = measure_inference(trained, device, timed=not args.no_timing)
    results["timings"] = {"training_hours": training_hours(trained)}
    results["notes"] = {
        "unfair": find_differences(trained),
        "no_teacher": no_teacher,
        "left_out": left_out,
        "trained_on": data_loader.duplicates_of_training_images(test, data) if data else [],
        "no_validation": no_validation,
        "missing_classes": missing_classes,
    }

    # Numbers are written before the figures, so that an error in a figure loses none of them.
    report = report_text(results)
    write_numbers(trained, labels, results, report, results_dir)
    write_figures(trained, labels, test, results, results_dir)
    try:
        models.export_best_student(args.checkpoint_dir, reference)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # The checkpoints are someone else's.
        print(f"warning: the best student was not copied: {error}")

    print(f"\n{summary_text(results, results_dir)}")
    if args.quick:
        print(f"Start the full comparison with: {config.format_command('baseline', [])}")


# Load ---------------------------------------------------------------------------------------------

@dataclass
class TrainedModel:
    """One of the compared models, with its outputs on the test images."""
    path: Path
    model: torch.nn.Module
    info: dict                 # the checkpoint without the weights
    log_probs: np.ndarray      # (N, C) float64, log-probabilities on the test images
    temperature: float | None  # fitted on the validation images; None if that is not possible, or
                               # if an external teacher may have been trained on them
    history: list              # one dict per training epoch; [] if there is no last.pth

    @cached_property
    def predictions(self):
        """(N,) predicted class indices."""
        return self.log_probs.argmax(1)


def find_students(args):
    """Choose the students to compare: ({role: [path per seed]}, [name of each unused checkpoint]).

    These are the seeds that both roles have or, if there are none or a checkpoint was given on the
    command line, one checkpoint per role: the given one or that of the run without --seeds.
    """
    given = {"baseline": args.baseline_checkpoint, "distilled": args.distilled_checkpoint}
    folders = {role: Path(args.checkpoint_dir, role) for role in STUDENTS}
    single = {role: Path(given[role] or folders[role] / "best_model.pth") for role in STUDENTS}
    by_seed = {role: checkpoints_by_seed(folders[role]) for role in STUDENTS}
    common_seeds = sorted(by_seed["baseline"].keys() & by_seed["distilled"].keys())

    if common_seeds and not any(given.values()):
        paths = {role: [by_seed[role][seed] for seed in common_seeds] for role in STUDENTS}
    else:
        require_both(single, by_seed, args)
        paths = {role: [single[role]] for role in STUDENTS}

    left_out = []
    for role in STUDENTS:
        used = [path.resolve() for path in paths[role]]
        found = {f"the {role} run without --seeds": folders[role] / "best_model.pth"}
        for seed, path in sorted(by_seed[role].items()):
            found[f"{role} seed {seed}"] = path
        left_out += [name for name, path in found.items()
                     if path.is_file() and path.resolve() not in used]

    digests = {role: {utils.sha256(path) for path in paths[role]} for role in STUDENTS}
    if digests["baseline"] & digests["distilled"]:
        raise UserError("baseline and distilled student are the same checkpoint")
    return paths, left_out


def checkpoints_by_seed(folder):
    """{seed: path} of the checkpoints in the subfolders seed_<n>/ of a student's folder."""
    paths = {}
    for path in models.student_checkpoints(folder):
        if path.parent != folder:
            seed = int(path.parent.name.removeprefix("seed_"))
            paths[seed] = path
    return paths


def require_both(single, by_seed, args):
    """Raise UserError with the training command if a student is missing."""
    # If both files are missing, ask for the role that has fewer seeds: the other may be complete.
    fewer_seeds_first = sorted(STUDENTS, key=lambda role: len(by_seed[role]))
    for role in fewer_seeds_first:
        if not single[role].is_file():
            if by_seed[role] and (args.baseline_checkpoint or args.distilled_checkpoint):
                first_path = next(iter(by_seed[role].values()))
                raise UserError(f"{single[role]} does not exist; choose the checkpoint of one seed "
                                f"with --{role}-checkpoint, such as {first_path}")
            command = training_command(role, args)
            if not Path(args.checkpoint_dir).is_dir():
                raise UserError(f"there is no folder {args.checkpoint_dir}: give another with "
                                f"--checkpoint-dir, run the scripts in the folder in which you "
                                f"trained, or start with: {command}")
            raise UserError(f"{single[role]} does not exist; make it with: {command}")


def training_command(role, args):
    """The command that trains the student of `role` with the settings and seeds of the other."""
    other_role = "distilled" if role == "baseline" else "baseline"
    other_folder = Path(args.checkpoint_dir, other_role)
    seeds = checkpoints_by_seed(other_folder)

    argv = []  # may repeat a flag: format_command takes the last one
    for path in seeds.values() or models.student_checkpoints(other_folder):
        _, info = models.load_model(path)
        argv += info["config"]["argv"]
    argv += args.argv
    if seeds:
        argv += ["--seeds", *map(str, seeds)]
    return config.format_command(config.SCRIPT_OF_ROLE[role], argv)


def open_images(info, args):
    """Open the images that the model of `info` was trained for. Returns a tuple:

    test              test images, labelled as in the checkpoint
    data              its training and validation images; None if unreadable or changed since
    missing_classes   names of the classes without test images
    no_validation     why `data` is None, else None
    """
    settings = argparse.Namespace(**info["config"])
    if args.dataset_dir and info["dataset"] != "ImageFolder":
        raise utils.UsageError("--dataset-dir has no effect, since the students were trained on "
                               f"{info['dataset']}")
    settings.data_dir = args.data_dir
    settings.dataset_dir = args.dataset_dir or settings.dataset_dir  # it may have moved
    if info["dataset"] == "ImageFolder" and not Path(settings.dataset_dir).is_dir():
        raise UserError(f"there is no image folder {settings.dataset_dir}; "
                        "give its new location with --dataset-dir DIR")

    test, class_names = data_loader.load_split(info["dataset"], "test", settings,
                                               info.get("value_range"))
    test = data_loader.align_classes(test, class_names, info["class_names"])
    missing_classes = [name for name in info["class_names"] if name not in class_names]

    try:
        data = data_loader.open_dataset(settings)
    except UserError as error:
        return test, None, missing_classes, str(error)
    if data.split_fingerprint != info["split_fingerprint"]:
        no_validation = "the training images have changed since the checkpoints were made"
        return test, None, missing_classes, no_validation
    return test, data, missing_classes, None


def load_trained(path, reference, test, data, args, device, is_teacher=False):
    """Load a checkpoint as a TrainedModel and run it on the `test` images.

    `reference` is the first distilled student's info: UserError if the checkpoint is for another
    dataset or other classes. `data` (None if unavailable) has the reference's validation split. A
    teacher may be any weight file; reference["teacher"] describes how to load it.
    """
    if is_teacher:
        model, info = models.load_recorded_teacher(path, reference["teacher"])
        model.to(device)
    else:
        model, info = models.load_model(path, device)
    mismatch = data_loader.describe_class_mismatch(info["class_names"], reference["class_names"])
    reason = ""
    if info["dataset"] != reference["dataset"]:
        reason = f"it was trained on {info['dataset']}, the student on {reference['dataset']}"
    elif mismatch:
        reason = f"classes: {mismatch}"
    if reason:
        raise UserError(f"{path} cannot be compared with the distilled student: {reason}")

    # A model with another split has been trained on some of these validation images, and so may an
    # external teacher have been.
    is_external = is_teacher and "info" in reference["teacher"]
    temperature = None
    if data and not is_external and info["split_fingerprint"] == reference["split_fingerprint"]:
        val_log_probs = infer_log_probs(model, info, data.val, args, device)
        temperature = best_temperature(val_log_probs, data.val.labels.numpy())

    history = [] if is_external else training_history(path)
    log_probs = infer_log_probs(model, info, test, args, device)
    return TrainedModel(path, model, info, log_probs, temperature, history)


def training_history(path):
    """The history in the last.pth beside a run's best_model.pth, else []. A copy under another name
    may lie beside the last.pth of some other run."""
    last_path = path.with_name("last.pth")
    if path.name != "best_model.pth" or not last_path.is_file():
        return []
    try:
        return utils.load_checkpoint(last_path).get("history", [])
    except UserError as error:
        print(f"warning: no curves and no training time of {path}: {error}")
        return []


def infer_log_probs(model, info, images, args, device):
    """Log-probabilities (N, C) float64 of `images`; `info` describes the model's input."""
    loader = data_loader.EvaluationLoader(images, info, args, device)
    logits, _ = models.infer(model, loader)
    return logits.double().log_softmax(1).numpy()


def find_teacher(students, args):
    """Find the teacher recorded in the distilled students: (path, None) or (None, reason)."""
    recorded = [student.info.get("teacher") for student in students]
    if not all(recorded):
        return None, "the distilled checkpoint does not record a teacher"

    identity = models.teacher_identity(recorded[0])
    if any(models.teacher_identity(teacher) != identity for teacher in recorded):
        return None, "the distilled students had different teachers"

    # The checkpoint folder may have been moved as a whole, and the teacher moved aside (teacher.1).
    recorded_path = Path(recorded[0]["path"])
    moved_paths = sorted(Path(args.checkpoint_dir).glob("teacher*/best_model.pth"))
    for path in (recorded_path, *moved_paths):
        with contextlib.suppress(UserError):  # a folder without weights
            if path.exists() and utils.sha256(models.weight_file(path)) == identity["sha256"]:
                return path, None
    return None, f"the teacher {recorded_path} is gone or has changed (SHA-256 differs)"


def find_differences(trained):
    """Phrases for whatever makes the students an unfair pair, [] if nothing does: other settings,
    another model or split, unfinished training."""
    students = trained["baseline"] + trained["distilled"]
    reference = trained["distilled"][0].info
    # Settings of the teacher's training do not count, but its identity does.
    may_differ = config.MAY_CHANGE_ON_RESUME | config.TEACHER_ONLY
    if len(students) > 2:
        may_differ.add("seed")  # it differs within a role, and both roles have the same seeds

    phrases = []
    for student in students:
        phrases += models.unfair_differences(student.info, reference, may_differ)
    teachers = [models.teacher_identity(student.info["teacher"])
                for student in trained["distilled"] if student.info.get("teacher")]
    if any(teacher != teachers[0] for teacher in teachers):
        phrases.append("the seeds had different teachers")
    for student in students:
        epochs = len(student.history)
        if 0 < epochs < student.info["config"]["num_epochs"]:
            phrases.append(f"training in {student.path.parent} is unfinished")
    return list(dict.fromkeys(phrases))  # without duplicates


# Metrics ------------------------------------------------------------------------------------------

def compare(trained, labels, data=None, dataset_dir=None):
    """What was compared, and all numbers that follow from the predictions; results/README.md
    explains every key.

    `trained` is {role: [TrainedModel per seed]}, `labels` (N,) are the true classes, `data` is the
    dataset that was trained on, or None if it is unavailable, and `dataset_dir` the folder of the
    test images, if it is not the one that was trained on. Accuracies are fractions, losses are in
    nats.
    """
    first = trained["distilled"][0].info  # whose images are used
    name = first["dataset"]
    if name == "ImageFolder":  # it is called by its folder's name
        folder = Path(dataset_dir or first["config"]["dataset_dir"])
        name = data_loader.printable(folder.resolve().name)
    class_sizes = np.bincount(labels, minlength=first["num_classes"])
    results = {
        "dataset": {
            "name": name,
            "num_classes": first["num_classes"],
            "training_images": len(data.train.labels) if data else None,
            "validation_images": len(data.val.labels) if data else None,
            "test_images": len(labels),
            "images_per_class": dict(zip(first["class_names"], class_sizes.tolist(), strict=True)),
        },
        "seeds": [student.info["config"]["seed"] for student in trained["distilled"]],
        "training": training_settings(trained["distilled"][0].info),
        "versions": training_versions(trained),
        "models": {role: score_role(group, labels) for role, group in trained.items()},
        "comparison": compare_students(trained, labels),
        "class_changes": gains_by_class(trained, labels),
        "most_confused": most_confused_pairs(trained, labels),
    }
    if is_cifar100(first["class_names"]):
        results["superclasses"] = {role: superclass_errors(group, labels)
                                   for role, group in trained.items()}
    if "teacher" in trained:
        results["fidelity"] = {}
        for role in STUDENTS:
            by_seed = [fidelity(student, trained["teacher"][0]) for student in trained[role]]
            results["fidelity"][role] = mean_over_seeds(by_seed)
        results["teacher_effect"] = teacher_effect(trained, labels)
        results["comparison"] |= compare_with_teacher(trained, labels)
    return results


def training_settings(info):
    """The main training settings of a student; None for those that it does not have."""
    settings = info["config"]
    training = {
        "epochs": settings["num_epochs"],
        "distillation_loss": settings.get("distillation_loss"),
        "temperature": settings.get("temperature"),
        "alpha": settings.get("alpha"),
    }
    if settings.get("kl_direction") == "reverse":
        training["kl_direction"] = "reverse"
    return training


def training_versions(trained):
    """Device and versions that the students were trained with; if they differ, all of them."""
    found = {}
    for student in trained["baseline"] + trained["distilled"]:
        for name, version in student.info["versions"].items():
            values = found.setdefault(name, [])
            if version and version not in values:
                values.append(version)
    return {name: " / ".join(values) for name, values in found.items()}


def score_role(group, labels):
    """Scores of one role: means over its seeds; for those in SCORES also `by_seed` and the sd."""
    by_seed = [score_model(model, labels) for model in group]
    main_scores = {}
    for name in SCORES:
        if name in by_seed[0]:
            main_scores[name] = [scores[name] for scores in by_seed]

    sd = None
    if len(group) > 1:
        sd = {name: statistics.stdev(values) for name, values in main_scores.items()}
    return {
        "model_name": group[0].info["model_name"],
        "image_size": group[0].info["image_size"],
        "epochs": [model.info["epoch"] for model in group],  # the best epoch of each seed
        **mean_over_seeds(by_seed),
        # The t interval may exceed 100 %.
        "top1_ci": np.clip(interval_for_verdict(correct_answers(group, labels)), 0, 1).tolist(),
        "by_seed": main_scores,
        "sd": sd,
    }


def mean_over_seeds(by_seed):
    """Key-by-key means of one (nested) dict of numbers per seed; keys that a seed lacks are left
    out."""
    means = {}
    for key, first_value in by_seed[0].items():
        values = [scores[key] for scores in by_seed if key in scores]
        if len(values) < len(by_seed):
            continue
        if isinstance(first_value, dict):
            means[key] = mean_over_seeds(values)
        else:
            means[key] = statistics.fmean(values)
    return means


def score_model(model, labels):
    """Scores of one model on the test images; macro-F1 and per-class accuracy skip the classes
    without any."""
    classes = np.unique(labels)
    class_names = [model.info["class_names"][i] for i in classes]
    _, recalls, f1, _ = metrics.precision_recall_fscore_support(
        labels, model.predictions, labels=classes, zero_division=0)

    scores = {
        "val_accuracy": model.info["val_accuracy"],
        "top1": float((model.predictions == labels).mean()),
        "macro_f1": float(f1.mean()),
        "calibration": calibration(model.log_probs, labels),
        "per_class_accuracy": dict(zip(class_names, recalls.tolist(), strict=True)),
    }
    if model.info["num_classes"] >= MIN_CLASSES_TOP5:
        top5 = np.argsort(-model.log_probs, axis=1, kind="stable")[:, :5]  # (N, 5)
        scores["top5"] = float((top5 == labels[:, None]).any(1).mean())
    if model.temperature:
        scaled = scale_by_temperature(model.log_probs, model.temperature)
        scores["calibration_scaled"] = {"temperature": model.temperature}
        scores["calibration_scaled"] |= calibration(scaled, labels)
    return scores


def calibration(log_probs, labels):
    """NLL in nats, Brier score (Brier 1950, sum over classes), expected calibration error."""
    rows = np.arange(len(labels))
    probabilities = np.exp(log_probs)
    # sum_c (p_c - [c = label])**2, multiplied out
    brier = (probabilities**2).sum(1) - 2 * probabilities[rows, labels] + 1
    confidence, accuracy, counts = reliability(*top_answers(log_probs, labels))
    return {
        "nll": float(-log_probs[rows, labels].mean()),
        "brier": float(brier.mean()),
        "ece": float((counts * np.abs(accuracy - confidence)).sum() / len(labels)),
    }


def top_answers(log_probs, labels):
    """(N,) confidence, the largest probability, and (N,) whether that prediction is correct."""
    return np.exp(log_probs.max(1)), log_probs.argmax(1) == labels


def reliability(confidence, correct):
    """Mean confidence, accuracy and number of images in each bin of confidence, (0, 1/15],
    (1/15, 2/15], ..., as three arrays (CALIBRATION_BINS,); all are 0 in an empty bin."""
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1
    bins = np.clip(bins, 0, CALIBRATION_BINS - 1)

    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    confidence_sums = np.bincount(bins, confidence, CALIBRATION_BINS)
    correct_sums = np.bincount(bins, correct, CALIBRATION_BINS)
    divisors = counts.clip(1)
    return confidence_sums / divisors, correct_sums / divisors, counts


def best_temperature(log_probs, labels):
    """The temperature between 0.05 and 20 that minimises the NLL (Guo et al. 2017). None if all
    predictions are correct: then the NLL keeps falling as the temperature falls."""
    if (log_probs.argmax(1) == labels).all():
        return None
    rows = np.arange(len(labels))

    def nll(temperature):
        return -scale_by_temperature(log_probs, temperature)[rows, labels].mean()

    return float(optimize.minimize_scalar(nll, bounds=(0.05, 20), method="bounded").x)


def scale_by_temperature(log_probs, temperature):
    """Temperature-scaled log-probabilities. Log-probabilities are logits, shifted for each image,
    which the softmax ignores."""
    return log_softmax(log_probs / temperature, axis=1)


def fidelity(student, teacher):
    """Agreement of the top-1 predictions, and mean KL(teacher || student) in nats."""
    differences = teacher.log_probs - student.log_probs
    return {
        "agreement": float((student.predictions == teacher.predictions).mean()),
        "kl": float((np.exp(teacher.log_probs) * differences).sum(1).mean()),
    }


def training_hours(trained):
    """Training time of each role in hours, mean over the seeds; None if a history is missing."""
    hours = {}
    for role, group in trained.items():
        by_seed = [sum(row["seconds"] for row in model.history) / 3600 for model in group]
        hours[role] = None
        if all(by_seed):  # the sum over an empty history is 0
            hours[role] = statistics.fmean(by_seed)
    return hours


# Metrics: which classes are confused --------------------------------------------------------------

def confusion_counts(group, labels):
    """(C, C) numbers of test images by true (row) and predicted class, mean over the seeds."""
    classes = np.arange(group[0].info["num_classes"])
    by_seed = [metrics.confusion_matrix(labels, model.predictions, labels=classes)
               for model in group]
    return np.mean(by_seed, axis=0)


def most_confused_pairs(trained, labels):
    """{role: [a dict per confused pair of classes, the most frequent first]}.

    `images` is how many images of class `true` the role's model classifies as `predicted`; `share`
    is {role: the fraction of the images of class `true` classified so}, for comparison.
    """
    names = trained["baseline"][0].info["class_names"]
    counts = {role: confusion_counts(group, labels) for role, group in trained.items()}
    class_sizes = np.bincount(labels, minlength=len(names))

    pairs_by_role = {}
    for role in trained:
        errors = counts[role].copy()
        np.fill_diagonal(errors, 0)
        pairs_by_role[role] = []
        for flat_index in np.argsort(-errors, axis=None, kind="stable")[:CONFUSED_PAIRS]:
            true, predicted = np.unravel_index(flat_index, errors.shape)
            if errors[true, predicted] == 0:
                break
            share = {other: float(counts[other][true, predicted] / class_sizes[true])
                     for other in trained}
            pairs_by_role[role].append({
                "true": names[true],
                "predicted": names[predicted],
                "images": float(errors[true, predicted]),
                "share": share,
            })
    return pairs_by_role


def is_cifar100(class_names):
    return set(class_names) == set(itertools.chain(*CIFAR100_SUPERCLASSES.values()))


def superclass_errors(group, labels):
    """Errors, and those within the true class's superclass of CIFAR-100, means over the seeds."""
    superclass_of = {}
    for number, class_names in enumerate(CIFAR100_SUPERCLASSES.values()):
        for name in class_names:
            superclass_of[name] = number
    superclasses = np.array([superclass_of[name] for name in group[0].info["class_names"]])

    errors = 0
    errors_within = 0
    for model in group:
        wrong = model.predictions != labels
        same_superclass = superclasses[model.predictions] == superclasses[labels]
        errors += int(wrong.sum())
        errors_within += int((wrong & same_superclass).sum())
    return {
        "errors": errors / len(group),
        "errors_within": errors_within / len(group),
        "share_within": errors_within / errors if errors else None,
    }


def teacher_effect(trained, labels):
    """Four cells of test images: teacher right or wrong, baseline right or wrong.

    Each cell has its number of images, the distilled student's accuracy on them, and the gain: how
    many more of them the distilled student gets right than the baseline. Means over the seeds.
    """
    teacher_correct = trained["teacher"][0].predictions == labels
    seeds = len(trained["baseline"])
    cells = {}
    for teacher_word in ("right", "wrong"):
        for baseline_word in ("right", "wrong"):
            images = 0
            distilled_right = 0
            for baseline, distilled in zip(trained["baseline"], trained["distilled"], strict=True):
                baseline_correct = baseline.predictions == labels
                in_cell = ((teacher_correct == (teacher_word == "right"))
                           & (baseline_correct == (baseline_word == "right")))
                images += int(in_cell.sum())
                distilled_right += int((distilled.predictions == labels)[in_cell].sum())

            baseline_right = images if baseline_word == "right" else 0
            cells[f"teacher_{teacher_word}_baseline_{baseline_word}"] = {
                "images": images / seeds,
                "distilled_accuracy": distilled_right / images if images else None,
                "gain_in_images": (distilled_right - baseline_right) / seeds,
            }
    return cells


# Statistics ---------------------------------------------------------------------------------------

def correct_answers(group, labels):
    """(S, N) bool for S seeds and N test images: whether the prediction is correct."""
    return np.array([model.predictions == labels for model in group])


def compare_students(trained, labels):
    """The gain, top-1 accuracy of distilled minus baseline, with its intervals, tests and verdict.

    The two students of a seed are compared image by image, and by McNemar's test (1947). The
    verdict uses the interval over seeds and images, or that over images if there are fewer than
    MIN_SEEDS seeds.
    """
    baseline_correct = correct_answers(trained["baseline"], labels)
    distilled_correct = correct_answers(trained["distilled"], labels)
    gains = distilled_correct.astype(float) - baseline_correct  # (S, N), each -1, 0 or 1

    only_baseline = (gains < 0).sum(1).tolist()   # images, by seed
    only_distilled = (gains > 0).sum(1).tolist()
    mcnemar_p = []
    for counts in zip(only_baseline, only_distilled, strict=True):
        mcnemar_p.append(sign_test(*counts))

    gain_by_seed = gains.mean(1).tolist()
    ci_over_seeds, t_test_p = t_test(gain_by_seed)
    ci_over_images = confidence_interval(gains.mean(0, keepdims=True))
    ci_over_both = None
    if len(gain_by_seed) > 1:
        ci_over_both = confidence_interval(gains)

    discordant = int((gains != 0).any(0).sum())  # in at least one seed
    verdict_word, reason = verdict(interval_for_verdict(gains), discordant, mcnemar_p)
    return {
        "verdict": verdict_word,
        "undecided_because": reason,
        "gain": statistics.fmean(gain_by_seed),
        "gain_by_seed": gain_by_seed,
        "verdict_ci": "both" if len(gains) >= MIN_SEEDS else "images",
        "ci_over_images": ci_over_images,
        "ci_over_seeds": ci_over_seeds,
        "ci_over_both": ci_over_both,
        "ci_by_seed": [confidence_interval(row[None]) for row in gains],
        "discordant_images": discordant,
        "only_baseline_correct": statistics.fmean(only_baseline),
        "only_distilled_correct": statistics.fmean(only_distilled),
        "mcnemar_p_by_seed": mcnemar_p,
        "t_test_p": t_test_p,
    }


def verdict(ci, discordant, mcnemar_p):
    """(verdict, reason): "better", "worse" or "undecided", and why it is undecided, else None.

    `ci` is the interval of the gain, `discordant` the number of images that only one of the two
    students classifies correctly, `mcnemar_p` McNemar's p of each seed. The interval assumes that
    the mean gain is normally distributed, which fails with few discordant images. For a single
    seed the exact test must confirm the interval.
    """
    low, high = ci
    if discordant == 0:
        return "undecided", "both students classify the same images correctly"
    if low <= 0 <= high:
        return "undecided", "the interval includes zero"
    if discordant < MIN_DISCORDANT:
        return "undecided", (f"only {discordant} images are classified correctly by just one of "
                             f"the students; a verdict needs {MIN_DISCORDANT} or more")
    if len(mcnemar_p) == 1 and mcnemar_p[0] >= 0.05:
        return "undecided", (f"McNemar's exact test (p = {mcnemar_p[0]:.2g}) does not confirm the "
                             "interval")
    return "better" if low > 0 else "worse", None


def gains_by_class(trained, labels):
    """{class: {"gain": in accuracy, "p": of no gain}}, for the classes that have test images.

    A sign test for each class asks whether more of its images gain than lose, summed over the seeds
    (with one seed this is McNemar's exact test). `p` is adjusted for the number of classes
    (Benjamini, Hochberg 1995): of the classes with p < 0.05, at most 5 % are expected to differ
    only because of the choice of test images. The tests are for the trained students: students of
    other seeds may change in other classes.
    """
    gains = (correct_answers(trained["distilled"], labels).astype(float)
             - correct_answers(trained["baseline"], labels))
    class_names = trained["baseline"][0].info["class_names"]
    present = np.unique(labels)

    p_values = []
    for label in present:
        sums = gains[:, labels == label].sum(0)
        p_values.append(sign_test(int((sums < 0).sum()), int((sums > 0).sum())))
    adjusted = stats.false_discovery_control(p_values)

    changes = {}
    for label, p in zip(present, adjusted, strict=True):
        gain = float(gains[:, labels == label].mean())
        changes[class_names[label]] = {"gain": gain, "p": float(p)}
    return changes


def confidence_interval(values):
    """95 % confidence interval of the mean of `values` (S, N), for other seeds and other images.

    The S seeds and the N images are both samples: with other seeds or other images the mean would
    have been another. The interval covers both. With S = 1 it is the usual t interval over images.

    Two-way random-effects model with one observation per cell (Searle, Casella, McCulloch, Variance
    Components, 1992, chapter 4): value = mean + seed effect + image effect + residual. The expected
    mean squares are

        E[ms_seeds] = var_residual + N * var_seeds,   E[ms_images] = var_residual + S * var_images,
        E[ms_residual] = var_residual,

    so the variance of the mean, var_seeds / S + var_images / N + var_residual / (S * N), is
    estimated by (ms_seeds + ms_images - ms_residual) / (S * N). Its degrees of freedom are those of
    Satterthwaite (Biometrics Bulletin 2, 1946): close to S - 1 where most of the variance comes
    from the seeds, more where it comes from the images. If ms_seeds <= ms_residual, then var_seeds
    is taken as 0, and the interval is the t interval over the images, as for S = 1. So it may widen
    abruptly where ms_seeds begins to exceed ms_residual.

    The interval is approximate. For normal effects, at the least favourable variance ratio, it
    covers the true mean with a probability of 92 % with three seeds, 93.5 % with four, 94 % with
    five and 95 % with ten; at the most favourable, 97 % (simulated).
    """
    S, N = values.shape
    mean = values.mean()
    image_means = values.mean(0, keepdims=True)  # (1, N)
    seed_means = values.mean(1, keepdims=True)   # (S, 1)

    ms_images = S * image_means.var(ddof=1)
    scaled_variance = ms_images  # S * N times the variance of the mean
    degrees_of_freedom = N - 1
    if S > 1:
        residual_df = (S - 1) * (N - 1)
        residuals = values - image_means - seed_means + mean
        ms_residual = (residuals**2).sum() / residual_df
        ms_seeds = N * seed_means.var(ddof=1)
        if ms_seeds > ms_residual:
            scaled_variance = ms_images + (ms_seeds - ms_residual)
            degrees_of_freedom = scaled_variance**2 / (
                ms_seeds**2 / (S - 1) + ms_images**2 / (N - 1) + ms_residual**2 / residual_df)
            # With few images ms_images may fall below ms_residual.
            degrees_of_freedom = max(degrees_of_freedom, S - 1)

    standard_error = math.sqrt(scaled_variance / (S * N))
    half_width = stats.t.ppf(0.975, degrees_of_freedom) * standard_error
    return [float(mean - half_width), float(mean + half_width)]


def interval_for_verdict(values):
    """confidence_interval of `values` (S, N), but over the images only if there are fewer than
    MIN_SEEDS seeds: two seeds say too little of the variation between seeds, and the interval could
    be hundreds of points wide."""
    if len(values) < MIN_SEEDS:
        values = values.mean(0, keepdims=True)
    return confidence_interval(values)


def sign_test(losses, gains):
    """Two-sided p of the exact sign test of two counts. If these are the images that only the
    baseline and only the distilled student classifies correctly, it is McNemar's exact test."""
    changes = losses + gains
    if changes == 0:
        return 1.0
    return float(stats.binomtest(losses, changes).pvalue)


def t_test(gain_by_seed):
    """95 % CI of the mean of paired differences, and p of no difference (Student 1908). Both are
    None if there is one seed or all gains are equal, since the variance is then unknown."""
    if len(set(gain_by_seed)) == 1:
        return None, None
    test = stats.ttest_1samp(gain_by_seed, 0)
    return [float(bound) for bound in test.confidence_interval()], float(test.pvalue)


def compare_with_teacher(trained, labels):
    """The lead of this one teacher over the baseline with its interval, and the fraction of it that
    the distilled student gains: None if the lead may be noise, as the ratio is then meaningless."""
    baseline_correct = correct_answers(trained["baseline"], labels)
    distilled_correct = correct_answers(trained["distilled"], labels)
    teacher_correct = correct_answers(trained["teacher"], labels)  # (1, N)
    lead_ci = interval_for_verdict(teacher_correct.astype(float) - baseline_correct)

    lead = float(teacher_correct.mean() - baseline_correct.mean())
    gain = float(distilled_correct.mean() - baseline_correct.mean())
    return {
        "teacher_lead": lead,
        "teacher_lead_ci": lead_ci,
        "advantage_recovered": gain / lead if lead_ci[0] > 0 else None,
    }


# Inference ----------------------------------------------------------------------------------------

def measure_inference(trained, device, timed=True):
    """Cost of inference with each role's first model, in float32: size, operations and, if `timed`,
    latency and throughput. `_spread` is the 5th to 95th percentile over the rounds."""
    first = {role: group[0] for role, group in trained.items()}
    inference = {"device": utils.device_name(device), "rounds": None, "distilled_to_baseline": None}
    for role, model in first.items():
        inference[role] = {
            "image_size": model.info["image_size"],
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "macs": count_macs(model, device),
            "file_size_mb": models.weight_file(model.path).stat().st_size / 2**20,
            "latency_ms": None,
            "latency_ms_spread": None,
            "images_per_second": None,
            "images_per_second_spread": None,
            "peak_memory_mb": None,
        }
    if not timed:
        return inference

    latency = time_rounds(first, LATENCY_BATCH, device)
    throughput = time_rounds(first, THROUGHPUT_BATCH, device)
    for role, model in first.items():
        milliseconds = 1000 * latency[role]
        images_per_second = THROUGHPUT_BATCH / throughput[role]
        inference[role] |= {
            "latency_ms": float(np.median(milliseconds)),
            "latency_ms_spread": np.quantile(milliseconds, [0.05, 0.95]).tolist(),
            "images_per_second": float(np.median(images_per_second)),
            "images_per_second_spread": np.quantile(images_per_second, [0.05, 0.95]).tolist(),
        }
        if device.type == "cuda":
            inference[role]["peak_memory_mb"] = peak_memory_mb(model, device)

    inference["rounds"] = {"latency": len(latency["baseline"]),
                           "throughput": len(throughput["baseline"])}
    inference["distilled_to_baseline"] = {"latency": compare_times(latency),
                                          "throughput": compare_times(throughput)}
    return inference


def random_images(model, batch_size, device):
    """(B, 3, size, size) floats in [0, 1], channels_last as the loader yields them."""
    size = model.info["image_size"]
    images = torch.rand(batch_size, 3, size, size, device=device)
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def count_macs(model, device):
    """Multiply-accumulate operations for one image; FlopCounterMode counts each as two."""
    # The counter does not know the CPU's fused attention, so attention is computed step by step.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        models.forward(model.model, random_images(model, 1, device))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def time_rounds(models_by_role, batch_size, device):
    """Seconds per batch, {role: (rounds,)}. Every model has one turn in each round, and the rounds
    cycle through all orders of the models. A warm-up round before them is not counted."""
    images = {role: random_images(model, batch_size, device)
              for role, model in models_by_role.items()}
    passes = PASSES_PER_ROUND[batch_size]
    seconds = {role: [] for role in models_by_role}
    orders = itertools.cycle(itertools.permutations(models_by_role))

    for role, model in models_by_role.items():
        time_passes(model.model, images[role], passes, device)

    start = time.perf_counter()
    for finished_rounds in range(MAX_ROUNDS):
        if finished_rounds >= MIN_ROUNDS and time.perf_counter() - start > SECONDS_LIMIT:
            break
        for role in next(orders):
            model = models_by_role[role].model
            seconds[role].append(time_passes(model, images[role], passes, device))
    return {role: np.array(values) for role, values in seconds.items()}


def time_passes(model, images, passes, device):
    """Mean seconds of one forward pass, including the wait until the device has finished."""
    start = time.perf_counter()
    for _ in range(passes):
        models.forward(model, images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
    return (time.perf_counter() - start) / passes


def compare_times(seconds):
    """Ratio of distilled to baseline time within each round: median, 5th to 95th percentile
    (`range`), and whether these exclude 1 (`differ`, None if there are too few rounds)."""
    ratios = seconds["distilled"] / seconds["baseline"]
    low, high = np.quantile(ratios, [0.05, 0.95]).tolist()
    differ = None
    if len(ratios) >= COMPARABLE_ROUNDS:
        differ = not low <= 1 <= high
    return {"ratio": float(np.median(ratios)), "range": [low, high], "differ": differ}


@torch.inference_mode()
def peak_memory_mb(model, device):
    """MiB of GPU memory for a batch of THROUGHPUT_BATCH images: weights, images, activations."""
    # The GPU holds all models, so the weights of this one are counted and not measured.
    images = random_images(model, THROUGHPUT_BATCH, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    models.forward(model.model, images)
    activations = torch.cuda.max_memory_allocated(device) - before
    weights = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    return (weights + images.nbytes + activations) / 2**20


# Report -------------------------------------------------------------------------------------------

REPORT_NAME = "comparison_report.txt"
REPORT_WIDTH = 100


def report_text(results):
    """The whole report, wrapped at REPORT_WIDTH: warnings and verdict first, the tables last."""
    sections = [heading_lines(results)]
    for warning in warning_texts(results):
        sections.append([f"WARNING: {warning}."])
    sections.append(verdict_lines(results))
    sections.append(gain_source_lines(results))
    sections.append(cost_lines(results))

    sections.append(["Details"])
    sections.append(score_table(results) + calibration_table(results) + fidelity_table(results))
    sections.append(inference_table(results))
    sections.append(teacher_effect_table(results))
    sections.append(confusion_table(results))
    versions = [f"{name} {value}" for name, value in results["versions"].items() if value]
    sections.append(["Trained with: " + ", ".join(versions)])

    paragraphs = []
    for lines in sections:
        if lines:
            wrapped = [textwrap.fill(line, REPORT_WIDTH, break_on_hyphens=False) for line in lines]
            paragraphs.append("\n".join(wrapped))
    return "\n\n".join(paragraphs) + "\n"


def summary_text(results, results_dir):
    """What the script prints at the end: models, warnings, verdict, accuracies and paths."""
    lines = heading_lines(results)
    for warning in warning_texts(results):
        lines.append(f"WARNING: {warning}.")
    lines.append("")
    lines.append(verdict_lines(results)[0])
    accuracies = []
    for role, scores in results["models"].items():
        accuracies.append(f"{role} {scores['top1']:.2%}")
    lines.append(f"Top-1 accuracy: {', '.join(accuracies)}")
    lines.append(f"Figure: {results_dir / 'accuracy_comparison.png'}")
    lines.append(f"Report: {results_dir / REPORT_NAME}")
    return "\n".join(textwrap.fill(line, REPORT_WIDTH, break_on_hyphens=False,
                                   break_long_words=False) for line in lines)


def heading_lines(results):
    scores = results["models"]
    teacher = scores["teacher"]["model_name"] if "teacher" in scores else "not available"
    dataset = results["dataset"]
    images = f"{dataset['test_images']:,} test images"
    if dataset["training_images"]:
        images = (f"{dataset['training_images']:,} training, {dataset['validation_images']:,} "
                  f"validation and {images}")
    return [
        f"Baseline {scores['baseline']['model_name']} against distilled "
        f"{scores['distilled']['model_name']} (teacher: {teacher})",
        f"{dataset['name']}: {dataset['num_classes']} classes, {images}",
        f"Training: {', '.join(training_parts(results))}",
    ]


def seeds_text(results):
    seeds = results["seeds"]
    word = "seeds" if len(seeds) > 1 else "seed"
    return f"{word} {', '.join(map(str, seeds))}"


def warning_texts(results):
    notes = results["notes"]
    texts = []
    if notes["unfair"]:
        texts.append("This is not a fair pair: " + "; ".join(notes["unfair"]))
    texts += weakness_texts(results)
    if notes["missing_classes"]:
        texts.append("There are no test images of some classes, which are not scored: "
                     f"{len(notes['missing_classes'])} ({shorten_list(notes['missing_classes'])})")
    if notes["no_teacher"]:
        texts.append(f"The teacher is not evaluated: {notes['no_teacher']}")
    if notes["trained_on"]:
        texts.append(f"{len(notes['trained_on'])} of the test images are identical to training "
                     f"or validation images: {shorten_list(notes['trained_on'])}")
    if notes["no_validation"]:
        texts.append("No temperature scaling, and no search for test images among those trained "
                     f"on: {notes['no_validation']}")
    if notes["left_out"]:
        texts.append(f"Not compared: {', '.join(notes['left_out'])}")
    return texts


def weakness_texts(results):
    """Warnings of a teacher not clearly better than the baseline, of students near chance level."""
    texts = []
    comparison = results["comparison"]
    if "teacher_lead" in comparison:
        lead = (f"{signed_points(comparison['teacher_lead'])} percentage points, 95 % CI "
                f"{ci_text(comparison['teacher_lead_ci'])}")
        low, high = comparison["teacher_lead_ci"]
        if high < 0:
            texts.append(f"The teacher is worse than the baseline on the test images ({lead})")
        elif low <= 0:
            texts.append("It is unclear whether the teacher is better than the baseline on the "
                         f"test images ({lead})")

    class_sizes = results["dataset"]["images_per_class"].values()
    chance = max(class_sizes) / sum(class_sizes)  # accuracy of always predicting the largest class
    has_one_class = chance == 1  # of the test images; then there is no chance level
    for role in STUDENTS:
        accuracy = results["models"][role]["top1"]
        if accuracy <= models.min_useful_accuracy(chance) and not has_one_class:
            texts.append(f"The {role} student's accuracy, {accuracy:.2%}, is close to chance level "
                         f"({chance:.2%}); train it longer or on more images")
    return texts


def shorten_list(names, shown=5):
    text = ", ".join(names[:shown])
    return f"{text}, …" if len(names) > shown else text


def verdict_interval(comparison):
    return comparison[f"ci_over_{comparison['verdict_ci']}"]


def signed_points(fraction):
    return f"{100 * fraction:+.2f}"


def count_text(images, sign=""):
    """A mean number of images: 12 or 1,205.3; with `sign` "+" also +12."""
    return f"{images:{sign},.1f}".removesuffix(".0")


def ci_text(ci):
    low, high = ci
    return f"{signed_points(low)} to {signed_points(high)}"


def verdict_lines(results):
    """The verdict with its gain and interval, then the other intervals and tests."""
    comparison = results["comparison"]
    seeds = len(results["seeds"])
    basis = "over the test images"
    if comparison["verdict_ci"] == "both":
        basis = f"over {seeds} seeds and the test images"
    gain = (f"{signed_points(comparison['gain'])} percentage points of top-1 accuracy "
            f"(95 % CI {ci_text(verdict_interval(comparison))} {basis})")

    if comparison["verdict"] == "undecided":
        lines = [f"It is undecided whether distillation helped: the gain is {gain}; "
                 f"{comparison['undecided_because']}."]
    else:
        lines = [f"The distilled student is {comparison['verdict']} than the baseline: {gain}."]
    scores = results["models"]
    val_gain = scores["distilled"]["val_accuracy"] - scores["baseline"]["val_accuracy"]
    _, high = verdict_interval(comparison)
    if comparison["verdict"] != "better" and val_gain > max(0, high):
        lines.append("The test images do not confirm the gain on the validation images, "
                     f"{signed_points(val_gain)} percentage points. Validation accuracy is "
                     "optimistic, because it was used to choose the best epochs.")

    p_values = ", ".join(f"{p:.2g}" for p in comparison["mcnemar_p_by_seed"])
    if seeds == 1:
        lines.append(f"McNemar's exact test: p = {p_values}. With a single seed, the variation "
                     "between seeds is unknown.")
        return lines

    over_seeds = "undefined, since all seeds have the same gain"
    if comparison["ci_over_seeds"]:
        over_seeds = (f"{ci_text(comparison['ci_over_seeds'])} "
                      f"(paired t-test p = {comparison['t_test_p']:.2g})")
    lines.append(f"95 % CI over the test images only: {ci_text(comparison['ci_over_images'])}; "
                 f"over the seeds only: {over_seeds}. McNemar's exact test for each seed: p = "
                 f"{p_values}.")
    if comparison["verdict_ci"] == "images":
        lines.append("The verdict does not cover the variation between seeds; for that, "
                     f"{MIN_SEEDS} seeds are needed.")
    elif np.allclose(comparison["ci_over_both"], comparison["ci_over_images"], atol=1e-9):
        lines.append("The seeds differ by no more than the noise of the test images, so the "
                     "interval over seeds and images equals that over the images only.")
    return lines


def gain_source_lines(results):
    """Images that only one student classifies correctly, by whether the teacher is right there."""
    comparison = results["comparison"]
    average = "on average over the seeds, " if len(results["seeds"]) > 1 else ""
    lines = [f"Of {results['dataset']['test_images']:,} test images, {average}"
             f"{count_text(comparison['only_distilled_correct'])} are classified correctly by the "
             f"distilled student only, and {count_text(comparison['only_baseline_correct'])} by "
             "the baseline only."]

    effect = results.get("teacher_effect")
    if effect:
        change = {}
        for word in ("right", "wrong"):
            change[word] = (effect[f"teacher_{word}_baseline_wrong"]["gain_in_images"]
                            + effect[f"teacher_{word}_baseline_right"]["gain_in_images"])
        lines.append(f"Of this difference, {count_text(change['right'], '+')} comes from images on "
                     f"which the teacher is right, and {count_text(change['wrong'], '+')} from "
                     "images on which it is wrong.")
    return lines


def cost_lines(results):
    """Training time of a seed, and inference time of the two students."""
    lines = []
    hours = results["timings"]["training_hours"]
    missing = [role for role in STUDENTS if hours[role] is None]
    if missing:
        lines.append(f"Training time is unknown for: {', '.join(missing)}.")
    else:
        duration = dict.fromkeys(ROLES, "an unknown time")  # of an external teacher, perhaps
        for role, number in hours.items():
            if number is not None:
                duration[role] = utils.format_duration(3600 * number)
        per_seed = " per seed (mean)" if len(results["seeds"]) > 1 else ""
        lines.append(f"Training time{per_seed}: baseline {duration['baseline']}, distilled "
                     f"{duration['distilled']}, and once {duration['teacher']} for the teacher.")

    inference = results["inference"]
    if inference["distilled_to_baseline"]:
        lines.append(f"Inference on {inference['device']}:")
        lines.append(speed_text(inference, "latency", f"Latency at batch {LATENCY_BATCH}",
                                "latency_ms", ",.2f", "ms"))
        lines.append(speed_text(inference, "throughput", f"Throughput at batch {THROUGHPUT_BATCH}",
                                "images_per_second", ",.0f", "images/s"))
    return lines


def speed_text(inference, kind, name, key, spec, unit):
    """One measurement of both students, and whether their times differ by more than noise."""
    baseline = format(inference["baseline"][key], spec)
    distilled = format(inference["distilled"][key], spec)
    times = inference["distilled_to_baseline"][kind]
    low, high = times["range"]
    if times["differ"] is None:
        conclusion = f"{inference['rounds'][kind]} rounds are too few for a comparison"
    elif times["differ"]:
        conclusion = "the difference exceeds the noise between rounds"
    else:
        conclusion = "no difference beyond the noise between rounds"
    return (f"{name}: baseline {baseline} {unit}, distilled {distilled} {unit}. Distilled takes "
            f"{times['ratio']:.3f} times as long as the baseline (median of the rounds; 5th to "
            f"95th percentile {low:.3f} to {high:.3f}): {conclusion}.")


# Report: the tables -------------------------------------------------------------------------------

CELL_WIDTH = 20  # characters


def table_row(label, cells, indent="  "):
    """A line of the report's tables: a label of 38 characters and the cells."""
    return f"{indent + label:<38}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)


def number_cells(dicts, key, spec):
    """The cells of a row: `key` of each dict, "-" if it has none; if the dict has a standard
    deviation over the seeds for `key`, also ± that in percentage points."""
    texts = []
    for values in dicts:
        if values.get(key) is None:
            texts.append("-")
            continue
        text = format(values[key], spec)
        if values.get("sd") and key in values["sd"]:
            text += f" ± {100 * values['sd'][key]:.2f}"
        texts.append(text)
    return texts


def score_table(results):
    roles = list(results["models"])
    scores = list(results["models"].values())
    label = "Test scores"
    if scores[0]["sd"]:
        label = "Test scores (mean ± SD of seeds)"
    lines = [table_row(label, map(str.capitalize, roles), indent="")]
    for key, label in SCORES.items():
        if key in scores[0]:
            lines.append(table_row(label, number_cells(scores, key, ".2%")))
    best_epochs = []
    for role_scores in scores:
        epochs = [str(epoch or "-") for epoch in role_scores["epochs"]]  # 0: external
        best_epochs.append(", ".join(epochs))
    label = "best epoch of each seed" if len(results["seeds"]) > 1 else "best epoch"
    if max(map(len, best_epochs)) < CELL_WIDTH:
        lines.append(table_row(label, best_epochs))
    else:  # of many seeds
        lines += [f"  {label}, {role}: {text}"
                  for role, text in zip(roles, best_epochs, strict=True)]
    return lines


def calibration_table(results):
    plain = []
    scaled = []
    for scores in results["models"].values():
        plain.append(scores["calibration"])
        scaled.append(scores.get("calibration_scaled", {}))

    row_labels = {"nll": "NLL (nats)", "brier": "Brier score", "ece": "ECE"}
    lines = ["Calibration (lower is better): negative log-likelihood (NLL), Brier score summed "
             f"over classes, expected calibration error (ECE) with {CALIBRATION_BINS} bins"]
    for key, label in row_labels.items():
        lines.append(table_row(label, number_cells(plain, key, ".4f")))
    for key, label in row_labels.items():
        lines.append(table_row(f"{label}, temperature-scaled", number_cells(scaled, key, ".4f")))
    lines.append(table_row("temperature (from validation images)",
                           number_cells(scaled, "temperature", ".4f")))
    if not all(scaled) and results["dataset"]["validation_images"]:
        lines.append('  "-": not fitted, since all validation images are classified correctly, or '
                     "some were or may have been trained on")
    return lines


def fidelity_table(results):
    if "fidelity" not in results:
        return []
    fidelities = [results["fidelity"]["baseline"], results["fidelity"]["distilled"], {}]
    lines = [
        "Fidelity to the teacher",
        table_row("same top-1 prediction", number_cells(fidelities, "agreement", ".2%")),
        table_row("KL(teacher || student), T = 1 (nats)", number_cells(fidelities, "kl", ".4f")),
    ]
    if results["comparison"]["advantage_recovered"] is not None:
        recovered = [{}, results["comparison"], {}]  # of the distilled student only
        lines.append(table_row("gain / teacher's lead over baseline",
                               number_cells(recovered, "advantage_recovered", ".0%")))
    return lines


def inference_table(results):
    roles = list(results["models"])
    costs = [results["inference"][role] for role in roles]
    is_timed = results["inference"]["rounds"] is not None

    sizes = [f"{cost['image_size']}" for cost in costs]
    parameters = [f"{cost['parameters'] / 1e6:.2f}" for cost in costs]
    macs = [f"{cost['macs'] / 1e6:,.1f}" for cost in costs]
    lines = [table_row("Model size and inference", map(str.capitalize, roles), indent="")]
    lines.append(table_row("image size (px)", sizes))
    lines.append(table_row("parameters (million)", parameters))
    lines.append(table_row("multiply-accumulates/image (million)", macs))
    lines.append(table_row("checkpoint (MiB)", number_cells(costs, "file_size_mb", ".1f")))
    if is_timed:
        lines.append(table_row(f"latency, batch {LATENCY_BATCH} (ms)",
                               number_cells(costs, "latency_ms", ".2f")))
        lines.append(table_row("  5th to 95th percentile",
                               spread_cells(costs, "latency_ms", ".2f")))
        lines.append(table_row(f"throughput, batch {THROUGHPUT_BATCH} (images/s)",
                               number_cells(costs, "images_per_second", ",.0f")))
        lines.append(table_row("  5th to 95th percentile",
                               spread_cells(costs, "images_per_second", ",.0f")))
    if costs[0]["peak_memory_mb"] is not None:
        lines.append(table_row(f"GPU memory, batch {THROUGHPUT_BATCH} (MiB)",
                               number_cells(costs, "peak_memory_mb", ".0f")))
    return lines


def spread_cells(costs, key, spec):
    texts = []
    for cost in costs:
        low, high = cost[f"{key}_spread"]
        texts.append(f"{low:{spec}} to {high:{spec}}")
    return texts


def teacher_effect_table(results):
    effect = results.get("teacher_effect")
    if not effect:
        return []
    heads = ("test images", "distilled accuracy", "gain in images")
    lines = [table_row("Teacher and baseline right or wrong", heads, indent="")]
    for name, cell in effect.items():
        _, teacher_word, _, baseline_word = name.split("_")
        accuracy = "-" if cell["images"] == 0 else f"{cell['distilled_accuracy']:.2%}"
        texts = [count_text(cell["images"]), accuracy, count_text(cell["gain_in_images"], "+")]
        lines.append(table_row(f"teacher {teacher_word}, baseline {baseline_word}", texts))
    return lines


def confusion_table(results, shown=5):
    """The `shown` most confused pairs of each role, with every role's rate; for CIFAR-100 also the
    errors within superclasses."""
    roles = list(results["models"])
    pairs = {}
    for role in roles:
        for pair in results["most_confused"][role][:shown]:
            pairs[pair["true"], pair["predicted"]] = pair["share"]

    lines = []
    if pairs:
        lines.append(f"The {shown} most frequent confusions of each model (% of the images of the "
                     "true class)")
        lines.append(table_row("True class → predicted class", map(str.capitalize, roles)))
    for (true, predicted), share in sorted(pairs.items(), key=lambda pair: -pair[1]["baseline"]):
        label = f"{short_name(true, 17)} → {short_name(predicted, 16)}"
        lines.append(table_row(label, [f"{share[role]:.1%}" for role in roles]))
    if "superclasses" in results:
        superclasses = [results["superclasses"][role] for role in roles]
        lines.append("Errors within the true superclass")
        lines.append(table_row("share of all errors",
                               number_cells(superclasses, "share_within", ".1%")))
    return lines


# Files --------------------------------------------------------------------------------------------

def write_numbers(trained, labels, results, report, results_dir):
    """The report, comparison.json, the tables, and predictions.npz of the first seed."""
    write_text(results_dir / REPORT_NAME, report)
    write_text(results_dir / "comparison.json",
               json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(results_dir / "comparison_table.md", markdown_table(results))
    write_text(results_dir / "comparison_table.tex", latex_table(results))
    write_text(results_dir / "per_class_accuracy.csv", per_class_csv(results))

    probabilities = {}
    for role, group in trained.items():
        probabilities[role] = np.exp(group[0].log_probs).astype(np.float32)
    class_names = trained["baseline"][0].info["class_names"]
    with utils.atomic_write(results_dir / "predictions.npz", "wb") as file:
        np.savez_compressed(file, labels=labels, class_names=class_names, **probabilities)


def write_text(path, text):
    with utils.atomic_write(path) as file:
        file.write(text)


def setting_parts(results):
    """What was compared: dataset, models, distillation loss, epochs, seeds, each as a phrase."""
    dataset = results["dataset"]
    scores = results["models"]
    parts = [f"{dataset['name']}, {dataset['num_classes']} classes",
             f"{dataset['test_images']:,} test images",
             f"student {scores['distilled']['model_name']}"]
    if "teacher" in scores:
        parts.append(f"teacher {scores['teacher']['model_name']}")
    parts += training_parts(results)
    if results.get("notes", {}).get("unfair"):
        parts.append("not a fair pair, see the report")
    return parts


def training_parts(results):
    """How the students were trained: distillation loss, epochs, seeds, each as a phrase."""
    training = results["training"]
    parts = []
    if training["distillation_loss"]:
        loss = training["distillation_loss"]
        if "kl_direction" in training:
            loss += " with the KL reversed"
        parts.append(f"distillation loss {loss}, T = {training['temperature']:g}, "
                     f"α = {training['alpha']:g}")
    parts.append(f"{training['epochs']} {'epoch' if training['epochs'] == 1 else 'epochs'}")
    parts.append(seeds_text(results))
    return parts


def setting_line(results):
    return " · ".join(setting_parts(results))


def comparison_rows(results):
    """(column heads, rows of strings) of the table for a paper or README: teacher, baseline and
    distilled student, ± the standard deviation over the seeds."""
    heads = ["", "model", "top-1 (%)", "gain, points (95 % CI)"]
    if "top5" in results["models"]["baseline"]:
        heads.append("top-5 (%)")
    heads += ["macro-F1 (%)", "NLL", "parameters (M)", "MACs (M)"]

    rows = []
    for role in ("teacher", "baseline", "distilled"):
        if role not in results["models"]:
            continue
        scores = results["models"][role]
        cost = results["inference"][role]
        gain = ""
        if role == "distilled":
            comparison = results["comparison"]
            interval = ci_text(verdict_interval(comparison))
            gain = f"{signed_points(comparison['gain'])} ({interval})"
        row = [role, scores["model_name"], score_text(scores, "top1"), gain]
        if "top5" in scores:
            row.append(score_text(scores, "top5"))
        row.append(score_text(scores, "macro_f1"))
        row.append(f"{scores['calibration']['nll']:.3f}")
        row.append(f"{cost['parameters'] / 1e6:.2f}")
        row.append(f"{cost['macs'] / 1e6:,.1f}")
        rows.append(row)
    return heads, rows


def score_text(scores, key):
    text = f"{100 * scores[key]:.2f}"
    if scores["sd"]:
        text += f" ± {100 * scores['sd'][key]:.2f}"
    return text


def markdown_table(results):
    heads, rows = comparison_rows(results)
    lines = [setting_line(results), ""]
    for cells in (heads, ["---"] * len(heads), *rows):
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def latex_table(results):
    r"""A tabular for \usepackage{booktabs}."""
    heads, rows = comparison_rows(results)
    lines = [f"% {setting_line(results)}", rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
             r"\toprule", latex_row(heads), r"\midrule"]
    for row in rows:
        lines.append(latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def latex_row(cells):
    escaped = []
    for cell in cells:
        text = re.sub(r"([&%$#_{}])", r"\\\1", cell)
        text = re.sub(r"(^|[ (])-(?=\d)", r"\1$-$", text)  # a minus is longer than a hyphen
        escaped.append(text.replace("±", r"$\pm$"))
    return " & ".join(escaped) + r" \\"


def per_class_csv(results):
    """One row per class: test images, accuracy of each role, gain and p (see gains_by_class)."""
    roles = list(results["models"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "test_images", *roles, "gain", "p"])
    for name, images in results["dataset"]["images_per_class"].items():
        row = [name, images]
        change = results["class_changes"].get(name)
        if change is None:  # the class has no test images
            row += [""] * (len(roles) + 2)
        else:
            row += [results["models"][role]["per_class_accuracy"][name] for role in roles]
            row += [change["gain"], change["p"]]
        writer.writerow(row)
    return text.getvalue()


# Figures ------------------------------------------------------------------------------------------

matplotlib.use("Agg")  # draws into files; needs no display

FIGURE_WIDTH = 7      # inches, the text width of a page; text is 6 pt or larger
FIGURE_MARGIN = 0.05  # inches, above a figure and below its caption
MIN_BIN_IMAGES = 30   # predictions per point of a reliability diagram: standard error of one seed
                      # up to 9 %
MAX_CHANGES = 30      # classes shown in class_changes
MAX_NAMED = 50        # classes up to which a confusion matrix names all of them
MAX_CELLS = 250       # cells a side of the matrix without names; smaller ones are lost in a PNG
MAX_CONFUSED = 16     # with more: classes in a second matrix beside it, of the most confused ones;
                      # a number of three characters still fits into its cells
MAX_ANNOTATED = 20    # classes up to which each cell shows its number
MAX_ORDERED = 300     # classes up to which the optimal order is computed, in O(C**3)
GALLERY_COLUMNS = 4
MAX_GALLERY = 8       # images corrected, and images newly misclassified

# Okabe and Ito's colours, safe for the colour-blind. In greyscale, lines and markers still differ.
STYLES = {
    "baseline": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "Baseline"},
    "distilled": {"color": "#E69F00", "linestyle": "--", "marker": "s", "label": "Distilled"},
    "teacher": {"color": "#595959", "linestyle": ":", "marker": "^", "label": "Teacher"},
}
GAIN_COLOR = "#009E73"  # green
LOSS_COLOR = "#D55E00"  # orange

# Matplotlib draws each character in the first of these fonts that has it. DejaVu comes with
# Matplotlib; the others come with the systems, for Chinese, Japanese, Korean, Arabic and Hindi.
FONT_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari",  # Linux
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Segoe UI", "Nirmala UI",           # Windows
    "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS",           # macOS
)


def write_figures(trained, labels, test, results, results_dir):
    """Write every figure as PNG and PDF. One is closed before the next is drawn, to save memory."""
    set_figure_style()

    def save(name, figure):
        add_caption(figure, figure_caption(results, figure.get_figwidth()))
        area = drawn_area(figure)
        for extension, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            with utils.atomic_write(results_dir / f"{name}.{extension}", "wb") as file:
                figure.savefig(file, format=extension, metadata=metadata, bbox_inches=area)
        plt.close(figure)

    with warnings.catch_warnings():
        # Matplotlib draws a box for a character that no font has; no warning is needed.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        save("accuracy_comparison", plot_accuracy_comparison(results))
        save("training_curves", plot_training_curves(trained))
        save("distillation_diagnostics", plot_distillation_diagnostics(trained))
        save("reliability_diagram", plot_reliability_diagram(trained, labels, results))
        save("class_changes", plot_class_changes(results))
        save("gallery", plot_gallery(trained, labels, test))

        if "teacher" not in trained:  # of an earlier evaluation, perhaps with other images
            for extension in ("png", "pdf"):
                (results_dir / f"confusion_matrix_teacher.{extension}").unlink(missing_ok=True)
        shares = confusion_shares(trained, labels)
        names = trained["baseline"][0].info["class_names"]
        order = class_order(sum(shares.values()))
        confused = most_confused_classes(sum(shares.values()), MAX_CONFUSED)
        for role, matrix in shares.items():
            title = f"Confusion matrix, {role} ({results['models'][role]['model_name']})"
            if role in STUDENTS:
                title += seeds_suffix(results["seeds"])
            save(f"confusion_matrix_{role}",
                 plot_confusion_matrix(title, matrix, names, order, confused, SHARE_SCALE))
        difference = shares["distilled"] - shares["baseline"]
        title = ("Difference of the confusion matrices, distilled minus baseline"
                 f"{seeds_suffix(results['seeds'])}\n"
                 "(orange: predicted more often, which is a gain on the diagonal)")
        save("confusion_matrix_difference",
             plot_confusion_matrix(title, difference, names, order, confused,
                                   difference_scale(difference)))


def set_figure_style():
    installed = set(fontManager.get_font_names())
    families = [family for family in FONT_FAMILIES if family in installed]
    seaborn.set_theme(style="whitegrid", context="paper", font=families, rc={
        "figure.constrained_layout.use": True,
        "figure.dpi": 200,  # laid out as it is saved: the widths of text depend on the resolution
        "savefig.dpi": 200,
        "text.parse_math": False,  # a class name may contain $
        "figure.titlesize": 9,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "grid.color": "#e8e8e8",
        "legend.frameon": False,  # a frame only inside a panel, over the grid
    })


def figure_caption(results, width):
    """The setting's phrases, with line breaks only between phrases, for a width in inches."""
    parts = setting_parts(results)
    unbroken = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]
    text = "\N{NO-BREAK SPACE}· ".join(unbroken)
    lines = math.ceil(len(text) / (20 * width))  # in 6 pt, an inch holds some 22 characters
    # Lines of similar length, with some slack, since no phrase is broken.
    wrapped = textwrap.wrap(text, len(text) // lines + 12)
    return "\n".join(line.removesuffix("\N{NO-BREAK SPACE}·") for line in wrapped)


def add_caption(figure, caption):
    """Add the caption below everything already drawn, outside the figure's layout."""
    # The layout of a figure with square axes needs two passes, and must not change afterwards.
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    bottom = figure.get_tightbbox().y0  # inches, as are all numbers here
    figure.text(0.5, (bottom - 0.08) / figure.get_figheight(), caption, ha="center", va="top",
                fontsize=6, color="#595959")


def drawn_area(figure):
    """The area to save, in inches: the full width, so that text keeps its size on the page, and the
    height that is drawn on. Nothing is cut off if something exceeds the width."""
    drawn = figure.get_tightbbox()
    left = 0
    if drawn.x0 < left:
        left = drawn.x0 - FIGURE_MARGIN
    right = figure.get_figwidth()
    if drawn.x1 > right:
        right = drawn.x1 + FIGURE_MARGIN
    return Bbox.from_extents(left, drawn.y0 - FIGURE_MARGIN, right, drawn.y1 + FIGURE_MARGIN)


def with_minus(text):
    """`text` with the minus sign that axes have, which is longer than a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def seeds_suffix(seeds):
    """For a title: that the students' numbers are a mean over several seeds, or of which seed."""
    return f", mean of {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"


# Figures: scores ----------------------------------------------------------------------------------

def plot_accuracy_comparison(results):
    """The main figure: accuracies on the left, gains on the right with the verdict as title."""
    rows = len(gain_rows(results))
    figure, (left, right) = plt.subplots(1, 2, figsize=(FIGURE_WIDTH, 1.6 + 0.24 * rows))
    draw_accuracies(left, results)
    draw_gains(right, results)
    return figure


def draw_accuracies(axis, results):
    """Each role's mean accuracy with its 95 % CI, and faintly each seed."""
    roles = [role for role in ("teacher", "baseline", "distilled") if role in results["models"]]
    names = []
    for y, role in enumerate(roles):
        scores = results["models"][role]
        style = STYLES[role]
        mean = 100 * scores["top1"]
        low, high = scores["top1_ci"]
        axis.errorbar(mean, y, xerr=[[mean - 100 * low], [100 * high - mean]], capsize=4,
                      marker=style["marker"], color=style["color"])
        seeds = scores["by_seed"]["top1"]
        if len(seeds) > 1:
            axis.plot([100 * accuracy for accuracy in seeds], [y + 0.25] * len(seeds),
                      linestyle="", marker=style["marker"], markersize=3, alpha=0.45,
                      color=style["color"])
        names.append(f"{style['label']}  {mean:.2f} %")
    axis.set_yticks(range(len(roles)), names)
    axis.grid(visible=False, axis="y")
    title = "Top-1 accuracy on the test images\n"
    if len(results["seeds"]) == 1:
        title += "(with 95 % CI)"
    elif results["comparison"]["verdict_ci"] == "both":
        title += "(mean with 95 % CI; faint: each seed)"
    else:  # too few seeds
        title += "(mean with 95 % CI over images only; faint: each seed)"
    axis.set(ylim=(len(roles) - 0.4, -0.6), xlabel="top-1 accuracy (%)", title=title)


def gain_rows(results):
    """(name, gain, CI) of each seed and, if there are several, of all seeds."""
    comparison = results["comparison"]
    rows = []
    for seed, gain, ci in zip(results["seeds"], comparison["gain_by_seed"],
                              comparison["ci_by_seed"], strict=True):
        rows.append((f"seed {seed}", gain, ci))
    if len(rows) > 1:
        rows.append(("all seeds", comparison["gain"], verdict_interval(comparison)))
    return rows


def draw_gains(axis, results):
    """The gain with its 95 % CI, for each seed and for all."""
    rows = gain_rows(results)
    names = []
    for y, (name, gain, (low, high)) in enumerate(rows):
        color = "black" if y == len(rows) - 1 else "#999999"
        axis.errorbar(100 * gain, y, xerr=[[100 * (gain - low)], [100 * (high - gain)]],
                      capsize=4, fmt="o", markersize=5, color=color)
        names.append(with_minus(f"{name}  {signed_points(gain)}"))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), names)
    axis.get_yticklabels()[-1].set_fontweight("bold")
    axis.grid(visible=False, axis="y")

    comparison = results["comparison"]
    gain = (f"{signed_points(comparison['gain'])} points "
            f"(95 % CI {ci_text(verdict_interval(comparison))})")
    xlabel = "gain, percentage points of top-1 accuracy"
    if comparison["verdict_ci"] == "both":
        # This is why the interval of all seeds may be the widest.
        xlabel += "\n(95 % CI of one seed: over images only)"
    elif len(rows) > 1:
        xlabel += "\n(95 % CI: over images only)"
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel,
             title=f"Distilled against baseline: {comparison['verdict']}\n{with_minus(gain)}")


def plot_reliability_diagram(trained, labels, results):
    """Accuracy against confidence before and, if the students have temperatures, after temperature
    scaling; below each panel the number of images per bin."""
    panels = {"Without temperature scaling": False}  # title: is it scaled?
    if all(model.temperature for role in STUDENTS for model in trained[role]):
        panels["With temperature scaling, fitted on validation images"] = True

    figure, axes = plt.subplots(
        2, len(panels), figsize=(FIGURE_WIDTH * len(panels) / 2, 4.9), squeeze=False, sharex=True,
        sharey="row", height_ratios=(3, 1))
    figure.get_layout_engine().set(wspace=0.06)
    for (above, below), (title, is_scaled) in zip(axes.T, panels.items(), strict=True):
        above.plot([0, 100], [0, 100], color="#999999", linewidth=1, label="Perfectly calibrated")
        for role, group in trained.items():
            key = "calibration_scaled" if is_scaled else "calibration"
            if key not in results["models"][role]:
                continue  # a teacher that may have been trained on the validation images
            ece = results["models"][role][key]["ece"]
            draw_reliability(above, below, role, group, labels, is_scaled, ece)
        above.set(title=title, xlim=(-1.5, 101.5), ylim=(-1.5, 101.5))
        above.legend(loc="best", frameon=True)
        below.set_xlabel("confidence (%)")
    axes[0, 0].set_ylabel("accuracy (%)")
    ylabel = "test images"
    title = f"Reliability diagram: {CALIBRATION_BINS} bins of confidence"
    if len(trained["distilled"]) > 1:
        ylabel = "test images\nper seed"
        title += f", {len(trained['distilled'])} seeds together; ECE: mean over the seeds"
    axes[1, 0].set(ylabel=ylabel, ylim=(0, None))
    figure.suptitle(f"{title}\n(neighbouring bins with few predictions are merged into points of "
                    f"{MIN_BIN_IMAGES} or more)")
    return figure


def draw_reliability(above, below, role, group, labels, is_scaled, ece):
    """One role's curve, from the images of all seeds, and its number of images per bin. A model is
    overconfident where its curve is below the diagonal."""
    answers = []
    for model in group:
        log_probs = model.log_probs
        if is_scaled:
            log_probs = scale_by_temperature(log_probs, model.temperature)
        answers.append(top_answers(log_probs, labels))
    confidence = np.concatenate([seed_confidence for seed_confidence, _ in answers])
    correct = np.concatenate([seed_correct for _, seed_correct in answers])

    mean_confidence, accuracy, counts = reliability(confidence, correct)
    groups = merge_bins(counts)
    x = [100 * np.average(mean_confidence[bins], weights=counts[bins]) for bins in groups]
    y = [100 * np.average(accuracy[bins], weights=counts[bins]) for bins in groups]
    style = STYLES[role] | {"label": f"{STYLES[role]['label']}, ECE {ece:.3f}"}
    above.plot(x, y, markersize=3.5, **style)
    edges = np.linspace(0, 100, CALIBRATION_BINS + 1)
    below.stairs(counts / len(group), edges, color=style["color"], linestyle=style["linestyle"])


def merge_bins(counts):
    """Groups of neighbouring bins, as lists of their indices, with MIN_BIN_IMAGES images or more
    each; with fewer, an accuracy is mostly noise. Empty bins are in none."""
    groups = []
    group = []
    for index in np.flatnonzero(counts):
        group.append(int(index))
        if counts[group].sum() >= MIN_BIN_IMAGES:
            groups.append(group)
            group = []
    if group and groups:
        groups[-1] += group  # the rest, too few for a point of their own
    elif group:
        groups.append(group)
    return groups


# Figures: training --------------------------------------------------------------------------------

def plot_history(axis, group, column, scale=1, **style):
    """Plot a column of the histories against the epoch, skipping empty values. Several seeds get a
    faint line each and a labelled line for their mean over the epochs that all have."""
    style = {**style, "marker": None}
    values_by_seed = []
    for model in group:
        values = {row["epoch"]: row[column] * scale for row in model.history
                  if row.get(column) is not None}
        if values:
            values_by_seed.append(values)

    if len(values_by_seed) > 1:
        faint = {**style, "linewidth": 0.8, "alpha": 0.5, "label": None}
        for values in values_by_seed:
            axis.plot(list(values), list(values.values()), **faint)
    if values_by_seed:
        epochs = [epoch for epoch in values_by_seed[0]
                  if all(epoch in values for values in values_by_seed)]
        if len(epochs) == 1:
            style["marker"] = "."  # a line of one point would be invisible
        means = [statistics.fmean(values[epoch] for values in values_by_seed) for epoch in epochs]
        axis.plot(epochs, means, linewidth=1.8, **style)


def style_epoch_axis(axis, title, quantity):
    """Label a panel after its curves are drawn. One without curves says so: a history may be
    missing, and mixup leaves no training accuracy."""
    if not axis.lines:
        axis.text(0.5, 0.5, "not in the histories", transform=axis.transAxes, ha="center",
                  fontsize=7)
        axis.tick_params(labelbottom=False)
    axis.set(title=title, xlabel="epoch", ylabel=quantity)
    axis.xaxis.get_major_locator().set_params(integer=True)


def add_one_legend(figure, columns):
    """One legend without a frame below all panels, with each label once."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        # Placed relative to the figure: saving with bbox "tight" adds space below the panels.
        figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=columns,
                      handlelength=2.6,
                      bbox_to_anchor=(0.5, 0), bbox_transform=figure.transFigure)


def plot_training_curves(trained):
    """Losses and validation accuracy against the epoch."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(FIGURE_WIDTH, 2.9))
    draw_training_loss(left, trained)
    draw_validation_loss(middle, trained)
    draw_validation_accuracy(right, trained)
    add_one_legend(figure, columns=3)

    notes = [*seed_notes(trained), "marker: chosen epoch"]
    title = f"Training curves ({'; '.join(notes)})"
    smoothing = trained["baseline"][0].info["config"].get("label_smoothing")
    if smoothing:
        title += (f"\nLabel smoothing of {smoothing:g} is part of the students' cross-entropy on "
                  "training images only.")
    figure.suptitle(title)
    return figure


def seed_notes(trained):
    """For a title: how seeds are drawn, in a list; [] if only one has a history."""
    seeds = sum(bool(model.history) for model in trained["distilled"])
    return [f"bold: mean of {seeds} seeds, faint: each seed"] if seeds > 1 else []


def draw_training_loss(axis, trained):
    for role, group in trained.items():
        plot_history(axis, group, "ce_loss", **STYLES[role])
    style_epoch_axis(axis, "Training images", "cross-entropy (nats)")


def draw_validation_loss(axis, trained):
    for role, group in trained.items():
        plot_history(axis, group, "val_loss", **STYLES[role])
    style_epoch_axis(axis, "Validation images", "cross-entropy (nats)")


def draw_validation_accuracy(axis, trained):
    for role, group in trained.items():
        plot_history(axis, group, "val_accuracy", 100, **STYLES[role])
        for model in group:
            if model.history:
                axis.plot(model.info["epoch"], 100 * model.info["val_accuracy"], markersize=4,
                          color=STYLES[role]["color"], marker=STYLES[role]["marker"],
                          fillstyle="none")  # marks may coincide
    style_epoch_axis(axis, "Validation images", "accuracy (%)")


def plot_distillation_diagnostics(trained):
    """Loss terms, entropies and accuracies on the augmented training images: why distillation
    helped or not."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(FIGURE_WIDTH, 3.2))
    draw_loss_parts(left, trained["distilled"])
    draw_entropies(middle, trained)
    draw_training_accuracy(right, trained)
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    add_one_legend(figure, columns=3)
    title = "Distillation diagnostics on the augmented training images"
    for note in seed_notes(trained):
        title += f" ({note})"
    figure.suptitle(title)
    return figure


def draw_loss_parts(axis, distilled):
    info = distilled[0].info
    if info.get("teacher"):  # --distilled-checkpoint may be a student without a teacher
        alpha = info["config"]["alpha"]
        loss = info["config"]["distillation_loss"]
        plot_history(axis, distilled, "distill_loss", alpha, color=GAIN_COLOR, linestyle="-",
                     label=f"{alpha:g} × distillation loss ({loss})")
        plot_history(axis, distilled, "ce_loss", 1 - alpha, color="#56B4E9", linestyle="--",
                     label=f"{1 - alpha:.3g} × cross-entropy")
    style_epoch_axis(axis, "Terms of the distilled student's loss", "weighted loss term")


def draw_entropies(axis, trained):
    for role in STUDENTS:
        plot_history(axis, trained[role], "entropy", **STYLES[role])
    info = trained["distilled"][0].info
    if info.get("teacher"):
        plot_history(axis, trained["distilled"], "target_entropy", color="#CC79A7",
                     linestyle="-.", label="Soft targets in the loss")
        plot_history(axis, trained["distilled"], "teacher_entropy", **STYLES["teacher"])
    style_epoch_axis(axis, "Entropy of the predictions", "entropy (nats)")
    uniform = math.log(info["num_classes"])
    axis.axhline(uniform, color="black", linewidth=0.8)
    # The white box hides a grid line that would cross the text.
    axis.annotate(f"uniform prediction, ln {info['num_classes']}", (0.03, uniform), va="bottom",
                  fontsize=6.5, xycoords=("axes fraction", "data"), xytext=(0, 2),
                  textcoords="offset points",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axis.set_ylim(0, 1.15 * uniform)


def draw_training_accuracy(axis, trained):
    for role in STUDENTS:
        plot_history(axis, trained[role], "train_accuracy", 100, **STYLES[role])
    info = trained["distilled"][0].info
    if info.get("teacher"):
        plot_history(axis, trained["distilled"], "teacher_accuracy", 100, **STYLES["teacher"])
    style_epoch_axis(axis, "Accuracy", "accuracy (%)")
    if info.get("teacher"):
        axis.axhline(100 * info["teacher"]["val_accuracy"], linewidth=1, linestyle="-.",
                     color=STYLES["teacher"]["color"], label="Teacher on validation images")


# Figures: classes and pictures --------------------------------------------------------------------

def short_name(name, length):
    """`name` in at most `length` characters, cut in the middle: names often differ at the end."""
    if len(name) <= length:
        return name
    end = length // 3
    return f"{name[:length - 1 - end]}…{name[-end:]}"


def plot_class_changes(results):
    """Accuracy of both students by class, sorted by gain: all classes, or both ends of the list."""
    changes = results["class_changes"]
    names = sorted(changes, key=lambda name: changes[name]["gain"])
    title = f"Accuracy of each class{seeds_suffix(results['seeds'])}"
    if len(names) > MAX_CHANGES:
        half = MAX_CHANGES // 2
        title += f": the {half} largest and the {half} smallest gains of {len(names)}"
        names = names[:half] + names[-half:]
    else:
        title += ", sorted by gain"

    figure, axis = plt.subplots(figsize=(FIGURE_WIDTH, 1.3 + 0.16 * len(names)))
    draw_class_changes(axis, names, results)
    if len(names) < len(changes):
        middle = len(names) / 2 - 0.5
        axis.axhline(middle, color="#999999", linewidth=0.8, linestyle=":")
        axis.annotate(f"{len(changes) - len(names)} classes not shown", (0.99, middle),
                      xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=6.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})

    significance_note = "no change is significant"
    if any(changes[name]["p"] < 0.05 for name in names):
        significance_note = "* and strong colour: significant"
    elif any(change["p"] < 0.05 for change in changes.values()):
        significance_note = "no change shown here is significant"
    axis.set_title(f"{title}\n{significance_note} for these students (sign test, false discovery "
                   "rate 5 %)")

    for color, label in ((GAIN_COLOR, "Distilled better"), (LOSS_COLOR, "Distilled worse")):
        axis.plot([], [], color=color, linewidth=1.8, label=label)  # for the legend only
    add_one_legend(figure, columns=4)
    return figure


def draw_class_changes(axis, names, results):
    """A line from the baseline's to the distilled student's accuracy, by class; paler if the change
    may be noise."""
    before = results["models"]["baseline"]["per_class_accuracy"]
    after = results["models"]["distilled"]["per_class_accuracy"]
    tick_labels = []
    significant = []
    for y, name in enumerate(names):
        color = GAIN_COLOR if after[name] >= before[name] else LOSS_COLOR
        is_significant = results["class_changes"][name]["p"] < 0.05
        axis.plot([100 * before[name], 100 * after[name]], [y, y], color=color, zorder=1,
                  linewidth=1.8, alpha=1 if is_significant else 0.5)
        label = short_name(name, 30)
        tick_labels.append(f"* {label}" if is_significant else label)
        significant.append(is_significant)

    rows = np.arange(len(names))
    points_of = {"baseline": before, "distilled": after}
    for role, size in (("baseline", 6), ("distilled", 3.5)):  # both show if they coincide
        style = STYLES[role] | {"linestyle": "", "markersize": size}
        axis.plot([100 * points_of[role][name] for name in names], rows, **style)
    axis.set_yticks(rows, tick_labels)
    for text, is_significant in zip(axis.get_yticklabels(), significant, strict=True):
        text.set_fontweight("bold" if is_significant else "normal")
    axis.set(ylim=(-0.8, len(names) - 0.2), xlabel="accuracy (%)", ylabel="class")


def plot_gallery(trained, labels, test):
    """Random test images that the distilled student corrects or newly misclassifies."""
    baseline = trained["baseline"][0]
    distilled = trained["distilled"][0]
    was_correct = baseline.predictions == labels
    is_correct = distilled.predictions == labels
    corrected = np.flatnonzero(~was_correct & is_correct)
    misclassified = np.flatnonzero(was_correct & ~is_correct)
    shown = choose_gallery_images(corrected, misclassified)

    columns = min(GALLERY_COLUMNS, max(1, len(shown)))
    rows = max(1, len(shown) // columns)
    figure = plt.figure(figsize=(FIGURE_WIDTH * columns / GALLERY_COLUMNS, 0.5 + 2.25 * rows))
    first = {role: group[0] for role, group in trained.items()}
    crop = data_loader.crop_to_size(distilled.info)
    for position, i in enumerate(shown, start=1):
        axis = figure.add_subplot(rows, columns, position)
        image = crop(data_loader.load_image(test, i))
        draw_gallery_image(axis, image, i, labels[i], first, is_correct[i])

    seed = distilled.info["config"]["seed"]
    figure.suptitle(f"Seed {seed}: the distilled student corrects {len(corrected):,} test images "
                    f"(green)\nand newly misclassifies {len(misclassified):,} (orange); random "
                    "examples, with the models' confidence")
    return figure


def choose_gallery_images(corrected, misclassified):
    """Random indices of up to MAX_GALLERY images of each kind, the corrected ones first. If they
    need more than one row, the larger kind loses some so that all rows are full."""
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(images)[:MAX_GALLERY].tolist()
              for images in (corrected, misclassified)]
    total = len(chosen[0]) + len(chosen[1])
    if total > GALLERY_COLUMNS:
        for _ in range(total % GALLERY_COLUMNS):
            max(chosen, key=len).pop()
    return chosen[0] + chosen[1]


def draw_gallery_image(axis, image, i, label, model_by_role, is_corrected):
    """Draw an image as cropped for the model, titled with its class and each prediction."""
    names = model_by_role["baseline"].info["class_names"]
    lines = [f"Class: {short_name(names[label], 22)}"]
    for role, model in model_by_role.items():
        confidence = np.exp(model.log_probs[i].max())
        prediction = short_name(names[model.predictions[i]], 15)
        sign = "✓" if model.predictions[i] == label else "✗"
        lines.append(f"{STYLES[role]['label']}: {prediction} {sign} ({100 * confidence:.0f} %)")
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    axis.set_title("\n".join(lines), fontsize=6.5, loc="left")
    axis.spines[:].set(color=GAIN_COLOR if is_corrected else LOSS_COLOR, linewidth=2)


# Figures: confusion matrices ----------------------------------------------------------------------

class Scale(NamedTuple):
    """How a matrix is coloured."""
    cmap: str
    norm: matplotlib.colors.Normalize
    label: str
    ticks: list


# A square-root scale makes errors of a few percent visible.
SCALE_TICKS = (1, 5, 20, 50, 100)
SHARE_SCALE = Scale("Blues", matplotlib.colors.PowerNorm(0.5, 0, 100),
                    "share of the true class's images (%)\nsquare-root scale", [0, *SCALE_TICKS])


def difference_scale(difference):
    limit = max(1, 100 * np.abs(difference).max())
    norm = matplotlib.colors.FuncNorm((signed_root, signed_square), -limit, limit)
    # Ticks close to 0 would run together. A difference of 20 points may be 19.999999.
    ticks = [tick for tick in SCALE_TICKS if limit / 40 <= tick <= limit + 1e-9]
    return Scale("PuOr_r", norm, "difference in percentage points\nsquare-root scale",
                 [-tick for tick in ticks] + [0] + ticks)


def signed_root(values):
    return np.sign(values) * np.sqrt(np.abs(values))


def signed_square(values):
    return np.sign(values) * np.square(values)


def confusion_shares(trained, labels):
    """{role: (C, C) confusion matrix normalised over each row, a true class}, means over the seeds;
    0 in rows without images."""
    shares = {}
    for role, group in trained.items():
        counts = confusion_counts(group, labels)
        shares[role] = counts / counts.sum(1, keepdims=True).clip(1)
    return shares


def class_order(confusion):
    """The order of classes for drawing a confusion matrix (C, C): unchanged up to MAX_ANNOTATED
    classes, else by hierarchical clustering (average linkage): confused classes are adjacent."""
    if len(confusion) <= MAX_ANNOTATED:
        return np.arange(len(confusion))
    similarity = confusion + confusion.T
    distance = 1 - similarity / similarity.max()
    pairs = distance[np.triu_indices(len(distance), k=1)]
    tree = hierarchy.linkage(pairs, "average", optimal_ordering=len(confusion) <= MAX_ORDERED)
    return hierarchy.leaves_list(tree)


def most_confused_classes(confusion, count):
    """Indices of the `count` classes with the most frequent errors in a matrix (C, C), sorted."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    classes = []
    for flat_index in np.argsort(-errors, axis=None, kind="stable"):
        for label in np.unravel_index(flat_index, errors.shape):
            if label not in classes and len(classes) < count:
                classes.append(int(label))
        if len(classes) >= min(count, len(confusion)):
            break
    return sorted(classes)


def plot_confusion_matrix(title, matrix, names, order, part_indices, scale):
    """Figure of a matrix (C, C) with class names; with more than MAX_NAMED classes, of the matrix
    without names and, beside it, the part of the classes `part_indices` with names."""
    if len(names) <= MAX_NAMED:
        side = min(FIGURE_WIDTH - 0.5, 3 + 0.2 * len(names))
        figure, axis = plt.subplots(figsize=(side + 0.5, side))
        mesh = draw_matrix(axis, matrix, names, order, scale)
        axis.set_anchor("N")  # close to the title
        bar_width = 0.15 / side
        figure.colorbar(mesh, cax=axis.inset_axes([1.05, 0.15, bar_width, 0.7]),
                        label=scale.label, ticks=scale.ticks)
        if len(names) > MAX_ANNOTATED:
            title += "; similar classes adjacent"
    else:
        figure, (left, right) = plt.subplots(1, 2, figsize=(FIGURE_WIDTH, 4.9),
                                             width_ratios=(1, 1.7))
        block_side = math.ceil(len(names) / MAX_CELLS)
        cells = strongest_of_blocks(matrix[np.ix_(order, order)], block_side)
        mesh = draw_matrix(left, cells, None, np.arange(len(cells)), scale)
        left_title = f"All {len(names)} classes, similar ones adjacent"
        if block_side > 1:
            left_title += f"\n(each point: the strongest of {block_side} × {block_side} cells)"
        left.set_title(left_title)
        left.set_anchor("N")  # below it is room for the colour bar
        figure.colorbar(mesh, cax=left.inset_axes([0, -0.25, 1, 0.05]), ticks=scale.ticks,
                        label=scale.label, orientation="horizontal")

        part = matrix[np.ix_(part_indices, part_indices)]
        part_names = [names[i] for i in part_indices]
        draw_matrix(right, part, part_names, np.arange(len(part)), scale)
        right.set_title(f"The {len(part_indices)} classes that the models confuse most")
        right.set_anchor("N")
    figure.suptitle(title)
    return figure


def strongest_of_blocks(matrix, block_side):
    """`matrix` (C, C) reduced to one value for each block of block_side x block_side cells: the one
    furthest from 0. A mean would hide the thin diagonal of many classes."""
    padding = -len(matrix) % block_side
    padded = np.pad(matrix, (0, padding))
    num_blocks = len(padded) // block_side
    blocks = padded.reshape(num_blocks, block_side, num_blocks, block_side).swapaxes(1, 2)
    blocks = blocks.reshape(num_blocks, num_blocks, block_side**2)
    strongest = np.abs(blocks).argmax(2)[..., None]
    return np.take_along_axis(blocks, strongest, axis=2)[..., 0]


def draw_matrix(axis, matrix, names, order, scale):
    """Draw the cells in percent, with tick labels unless `names` is None, and with the number in
    each cell up to MAX_ANNOTATED classes."""
    cells = 100 * matrix[np.ix_(order, order)]
    # Rasterized, since a PDF viewer would take minutes for a million vector squares.
    mesh = axis.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm, rasterized=True)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.grid(visible=False)
    axis.set(xlabel="predicted class", ylabel="true class")
    if names is None:
        axis.set(xticks=[], yticks=[])
        return mesh

    centres = np.arange(len(order)) + 0.5
    ordered_names = [short_name(names[i], 16) for i in order]
    size = 7 if len(names) <= MAX_ANNOTATED else 6
    fits_horizontally = len(names) * max(map(len, ordered_names)) <= 30
    axis.set_xticks(centres, ordered_names, fontsize=size, rotation=0 if fits_horizontally else 90)
    axis.set_yticks(centres, ordered_names, fontsize=size)
    if len(names) <= MAX_ANNOTATED:
        for row, column in np.ndindex(*cells.shape):
            value = cells[row, column]
            if abs(value) > 0.5:
                luminance = np.dot(mesh.cmap(scale.norm(value))[:3], (0.299, 0.587, 0.114))
                axis.text(column + 0.5, row + 0.5, with_minus(f"{value:.0f}"), ha="center",
                          va="center", fontsize=6, color="white" if luminance < 0.5 else "black")
    return mesh


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("evaluate", __doc__)))
