"""Is the distilled student better than the baseline, where, and can one rely on it? Read on the test images.

    python evaluate.py            # the two students in checkpoints/, all seeds that both have
    python evaluate.py --quick    # those of the small run

Dataset, split, image size and crop are the checkpoints' own. Writes into results/: comparison_report.txt for people,
comparison.json and predictions.npz for programs, and every figure as PNG and PDF.
"""
import argparse
import json
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.optimize
import scipy.stats
import seaborn
import torch
from scipy.cluster import hierarchy
from sklearn import metrics

import config
import data_loader
import models
import utils

matplotlib.use("Agg")  # no window, also without a display
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

SCRIPTS = {"baseline": "train_baseline.py", "distilled": "train_distillation.py"}
LABELS = {"baseline": "Baseline", "distilled": "Distilled", "teacher": "Teacher"}
COLOURS = {"baseline": "#0072B2", "distilled": "#E69F00", "teacher": "#595959"}  # Okabe-Ito: tell apart in grey too
STYLES = {"baseline": ("-", "", "o"), "distilled": ("--", "//", "s"), "teacher": (":", "..", "^")}  # line, hatch, marker
WIDTH = 100     # columns of the report
RESAMPLES = 10_000
BINS = 15       # of the calibration error: equal-width bins of confidence, as Guo et al. 2017
T_SEEDS = 3     # from so many seeds on, the verdict rests on the interval over seeds


# Loading and inference ------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One trained model of the comparison and what it says on the test and validation images."""
    path: Path
    model: torch.nn.Module
    info: dict
    log_probabilities: np.ndarray      # (N, C) float64, test images
    val_log_probabilities: np.ndarray  # (V, C) float64; None where the validation images cannot be had
    history: list                      # rows of its training, [] where its last.pth is gone


def main(args):
    device = utils.setup(args)
    pairs, left_out = find_pairs(args)
    infos = {run: [utils.load_file(path) for path in paths] for run, paths in pairs.items()}
    check_comparable(infos, pairs)
    teacher_path, no_teacher = find_teacher(infos["distilled"], args)
    paths = {**pairs, **({"teacher": [teacher_path]} if teacher_path else {})}

    first = infos["distilled"][0]
    test = open_test_images(first, args)
    val, no_val = open_validation_images(first, args)
    entries = {run: [load_entry(path, test, val, first, args, device) for path in paths[run]] for run in paths}
    labels, val_labels = test.labels.numpy(), val.labels.numpy() if val else None

    started = time.perf_counter()
    numbers = compare(entries, labels, val_labels)
    numbers["notes"] = {"unfair": differences(infos) + unfinished(pairs), "no_teacher": no_teacher, "no_validation": no_val, "left_out": left_out}
    write_figures(entries, labels, val_labels, test, numbers, Path(args.results_dir))
    seconds = time.perf_counter() - started
    numbers["timings"] = {"device": utils.device_name(device), **time_models(entries, device), **training_hours(entries),
                          "statistics_and_figures_seconds": seconds}
    report = write_report(numbers)
    write_files(entries, labels, numbers, report, Path(args.results_dir))
    print(report)
    utils.choose_best(args.checkpoint_dir, first)
    print(f"report, numbers and figures are in {args.results_dir}")


def find_pairs(args):
    """Paths of the students to compare, {run: [one per seed]}, and a phrase for each run that is left out.

    The seeds that both runs have, where there are any, else the plain pair. Raises UserError with the command that
    makes what is missing.
    """
    given = {run: getattr(args, f"{run}_checkpoint") for run in SCRIPTS}
    folders = {run: Path(args.checkpoint_dir, run) for run in SCRIPTS}
    seeds = {run: {int(path.parent.name[5:]) for path in utils.student_checkpoints(folders[run]) if path.parent != folders[run]}
             for run in SCRIPTS}
    common = sorted(seeds["baseline"] & seeds["distilled"])
    if any(given.values()) or not common:
        pairs = {run: [Path(given[run] or folders[run] / "best_model.pth")] for run in SCRIPTS}
        missing, seeded = [run for run in SCRIPTS if not pairs[run][0].is_file()], [run for run in SCRIPTS if seeds[run]]
        if missing and len(seeded) == 1 and not any(given.values()):
            [run], [other] = seeded, set(SCRIPTS) - set(seeded)
            raise utils.UserError(f"the {run} run has several seeds, the {other} run none; make them with: python {SCRIPTS[other]} "
                                  f"--seeds {' '.join(map(str, sorted(seeds[run])))}{' --quick' * args.quick}")
        for run in missing:
            raise utils.UserError(f"there is no {pairs[run][0]}; make it with: python {SCRIPTS[run]}{' --quick' * args.quick}")
        return pairs, [f"{run} seed {seed}" for run in SCRIPTS for seed in sorted(seeds[run])]
    pairs = {run: [folders[run] / f"seed_{seed}" / "best_model.pth" for seed in common] for run in SCRIPTS}
    left_out = [f"{run} seed {seed} (the other run lacks it)" for run in SCRIPTS for seed in sorted(seeds[run] - set(common))]
    left_out += [f"the plain {run} run" for run in SCRIPTS if (folders[run] / "best_model.pth").is_file()]
    return pairs, left_out


def check_comparable(infos, pairs):
    """Raise UserError unless all students tell apart the same classes of the same dataset."""
    all_infos, all_paths = sum(infos.values(), []), sum(pairs.values(), [])
    for info, path in zip(all_infos, all_paths):
        if "state_dict" not in info:
            raise utils.UserError(f"{path} holds no model; best_model.pth beside it may")
        if any(info[key] != all_infos[0][key] for key in ("dataset", "class_names")):
            raise utils.UserError(f"{all_paths[0]} and {path} cannot be compared: they tell apart other classes "
                                  f"({all_infos[0]['dataset']}, {all_infos[0]['num_classes']}; {info['dataset']}, "
                                  f"{info['num_classes']})")


def find_teacher(infos, args):
    """(path of the teacher that the distilled students record, None), or (None, why there is none).

    Where the recorded path leads nowhere, the teacher of this folder of checkpoints is taken if it is the very same.
    """
    teachers = [info.get("teacher") for info in infos]
    if not all(teachers):
        return None, "the distilled checkpoint names no teacher"
    if len({teacher["sha256"] for teacher in teachers}) > 1:
        return None, "the distilled students had different teachers"
    path, here = Path(teachers[0]["path"]), Path(args.checkpoint_dir, "teacher", "best_model.pth")
    if not path.is_file() and here.is_file() and utils.sha256(here) == teachers[0]["sha256"]:
        path = here
    if not path.is_file():
        return None, f"the teacher {path} is gone"
    if utils.sha256(path) != teachers[0]["sha256"]:
        return None, f"{path} is no longer the teacher that taught (its SHA-256 differs)"
    return path, None


def open_test_images(info, args):
    """The test images of the checkpoint's dataset; its folder may lie elsewhere now (--dataset-dir)."""
    args.dataset_dir = args.dataset_dir or info["config"]["dataset_dir"]
    if info["dataset"] == "ImageFolder" and not Path(args.dataset_dir).is_dir():
        raise utils.UserError(f"the pictures are no longer in {args.dataset_dir}; say where with --dataset-dir DIR")
    test, class_names = data_loader.open_test(info["dataset"], args)
    if class_names != info["class_names"]:
        raise utils.UserError(f"the test images have other classes than the checkpoints: {len(class_names)} against "
                              f"{info['num_classes']}")
    return test


def open_validation_images(info, args):
    """(validation images of the students' split, None), or (None, why they cannot be had); for temperature scaling alone."""
    settings = argparse.Namespace(**{**info["config"], "dataset_dir": args.dataset_dir, "data_dir": args.data_dir,
                                     "batch_size": 1, "accumulate_steps": 1, "augmentation": "auto"})  # nothing is trained
    try:
        data = data_loader.open_dataset(settings)
    except utils.UserError as error:
        return None, str(error)
    if data.split_fingerprint != info["split_fingerprint"]:
        return None, "the training images are no longer those of the checkpoints"
    return data.val, None


def load_entry(path, test, val, first, args, device):
    """Load the model of `path` and let it look at the test images, and at the validation images where they are its own too."""
    model, info = models.load_model(path, device)
    if info["split_fingerprint"] != first["split_fingerprint"]:
        val = None  # it was trained on some of these

    def look(images):
        if images is None:
            return None
        logits, _ = models.infer(model, data_loader.evaluation_loader(images, info, args, device))
        return logits.double().log_softmax(1).numpy()
    last = path.with_name("last.pth")
    history = utils.load_file(last)["history"] if last.is_file() else []
    return Entry(path, model, info, look(test), look(val), history)


# Numbers --------------------------------------------------------------------------------------------------------

def compare(entries, labels, val_labels):
    """Every number of the report but the timings, under the names that the README documents; fractions and nats."""
    first = entries["baseline"][0].info
    names = first["class_names"]
    numbers = {
        "dataset": {"name": first["dataset"], "num_classes": len(names), "test_images": len(labels),
                    "validation_images": None if val_labels is None else len(val_labels)},
        "seeds": [entry.info["config"]["seed"] for entry in entries["distilled"]],
        "versions": first["versions"],
        "models": {run: average([measure(entry, labels, val_labels) for entry in group]) for run, group in entries.items()},
    }
    numbers["comparison"] = verdict(entries, labels)
    if "teacher" in entries:
        teacher = entries["teacher"][0].log_probabilities
        top1 = {run: model["top1"] for run, model in numbers["models"].items()}
        numbers["fidelity"] = {run: average([fidelity(entry.log_probabilities, teacher, labels) for entry in entries[run]])
                               for run in SCRIPTS}
        ahead = top1["teacher"] - top1["baseline"]
        numbers["comparison"]["advantage_recovered"] = (top1["distilled"] - top1["baseline"]) / ahead if ahead > 0 else None
        numbers["comparison"]["teacher_beats_baseline"] = bool(ahead > 0)
    confusion = {run: confusions(entries[run], labels) for run in entries}
    numbers["confused_pairs"] = confused_pairs(confusion, names)
    numbers["superclasses"] = superclass_errors({run: entries[run] for run in SCRIPTS}, labels, names)
    return numbers


def predictions(entry):
    return entry.log_probabilities.argmax(1)


def measure(entry, labels, val_labels):
    """What one model scores on the test images with `labels` (N,)."""
    probabilities, info = np.exp(entry.log_probabilities), entry.info
    predicted, classes = probabilities.argmax(1), np.arange(info["num_classes"])
    recalls = metrics.recall_score(labels, predicted, labels=classes, average=None, zero_division=0)
    scores = {
        "model_name": info["model_name"], "epoch": float(info["epoch"]), "val_accuracy": info["val_accuracy"],
        "image_size": info["image_size"], "top1": float((predicted == labels).mean()),
        "top5": float(metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)) if len(classes) > 5 else 1.0,
        "macro_f1": float(metrics.f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)),
        "calibration": calibration(entry.log_probabilities, labels),
        "per_class_accuracy": dict(zip(info["class_names"], recalls.tolist())),
        "parameters": sum(parameter.numel() for parameter in entry.model.parameters()),
        "file_size_mb": entry.path.stat().st_size / 2**20,
    }
    if entry.val_log_probabilities is not None:
        temperature = best_temperature(entry.val_log_probabilities, val_labels)
        scores["calibration_scaled"] = {"temperature": temperature, **calibration(soften(entry.log_probabilities, temperature), labels)}
    return scores


def average(items):
    """The mean over seeds of dicts of numbers, key by key, dicts in dicts too; what is no float is alike in all, and kept.

    Where there are scores, also their values by seed and their standard deviation (None with one seed).
    """
    mean = {}
    for key, value in items[0].items():
        values = [item[key] for item in items]
        if None in values or not isinstance(value, (dict, float)):
            mean[key] = value
        else:
            mean[key] = average(values) if isinstance(value, dict) else statistics.fmean(values)
    if "top1" in mean:
        mean["by_seed"] = {key: [item[key] for item in items] for key in ("top1", "top5", "macro_f1", "val_accuracy")}
        mean["sd"] = {key: statistics.stdev(values) for key, values in mean["by_seed"].items()} if len(items) > 1 else None
    return mean


def verdict(entries, labels):
    """The difference distilled - baseline in top-1 accuracy, its 95 % intervals and tests, and what follows from them."""
    right = {run: np.array([predictions(entry) == labels for entry in entries[run]]) for run in SCRIPTS}  # (seeds, N)
    by_seed = [float(gain) for gain in right["distilled"].mean(1) - right["baseline"].mean(1)]
    alone = {"baseline": (right["baseline"] & ~right["distilled"]).sum(1), "distilled": (right["distilled"] & ~right["baseline"]).sum(1)}
    result = {
        "difference": statistics.fmean(by_seed), "difference_by_seed": by_seed,
        "interval_over_images": bootstrap_interval(right["distilled"].mean(0) - right["baseline"].mean(0)),
        "interval_over_seeds": t_interval(by_seed) if len(by_seed) > 1 else None,
        "baseline_alone_right": float(alone["baseline"].mean()), "distilled_alone_right": float(alone["distilled"].mean()),
        "mcnemar_p_by_seed": [mcnemar_p(int(b), int(d)) for b, d in zip(alone["baseline"], alone["distilled"])],
        "t_test_p": float(scipy.stats.ttest_1samp(by_seed, 0).pvalue) if len(set(by_seed)) > 1 else None,
        "rests_on": "seeds" if len(by_seed) >= T_SEEDS else "images",
    }
    low, high = result[f"interval_over_{result['rests_on']}"]
    result["verdict"] = "better" if low > 0 else "worse" if high < 0 else "undecided"
    return result


def bootstrap_interval(gain, seed=0):
    """95 % percentile interval of the mean of `gain` (N,) under the paired bootstrap over images (Efron 1979).

    Few different values occur (-1, 0, 1 with one seed), so a resample is a draw of how often each occurs, from the
    multinomial distribution: the same law as N draws with replacement, in no memory.
    """
    values, counts = np.unique(np.round(gain, 9), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(gain), counts / len(gain), size=RESAMPLES)
    return [float(bound) for bound in np.quantile(draws @ values / len(gain), (0.025, 0.975))]


def t_interval(differences):
    """95 % interval of the mean of paired differences over seeds, Student's t."""
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(scipy.stats.t.ppf(0.975, len(differences) - 1)) * error
    return [mean - reach, mean + reach]


def mcnemar_p(only_first, only_second):
    """Exact two-sided p of McNemar's test (1947): the discordant images fall to either side with probability 1/2."""
    discordant = only_first + only_second
    return float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def fidelity(student, teacher, labels):
    """How alike a student and its teacher answer; log-probabilities (N, C). KL(teacher || student) at T = 1, in nats."""
    same, wrong = student.argmax(1) == teacher.argmax(1), teacher.argmax(1) != labels
    return {"agreement": float(same.mean()), "kl": float((np.exp(teacher) * (teacher - student)).sum(1).mean()),
            "agreement_where_teacher_errs": float(same[wrong].mean()) if wrong.any() else None}


def calibration(log_probabilities, labels):
    """NLL in nats, Brier score (Brier 1950, sum over classes), expected calibration error over 15 equal-width bins."""
    probabilities, rows = np.exp(log_probabilities), np.arange(len(labels))
    brier = (probabilities**2).sum(1) - 2 * probabilities[rows, labels] + 1
    confidence, accuracy, weight = reliability(log_probabilities, labels)
    return {"nll": float(-log_probabilities[rows, labels].mean()), "brier": float(brier.mean()),
            "ece": float((weight * np.abs(accuracy - confidence)).sum())}


def reliability(log_probabilities, labels):
    """Mean confidence, accuracy and share of the images (BINS,) by bins (0, 1/15], ... of the top probability."""
    confidence, right = np.exp(log_probabilities.max(1)), log_probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    return (np.bincount(bins, confidence, BINS) / counts.clip(1), np.bincount(bins, right, BINS) / counts.clip(1),
            counts / len(labels))


def soften(log_probabilities, temperature):
    scaled = log_probabilities / temperature
    return scaled - scipy.special.logsumexp(scaled, axis=1, keepdims=True)


def best_temperature(log_probabilities, labels):
    """The temperature with the least NLL (Guo et al. 2017), between 0.05 and 20."""
    def nll(log_temperature):
        return -soften(log_probabilities, np.exp(log_temperature))[np.arange(len(labels)), labels].mean()
    return float(np.exp(scipy.optimize.minimize_scalar(nll, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def confusions(group, labels):
    """How often each class (rows) is taken for each (columns), as shares of the true class, mean over the seeds (C, C)."""
    classes = np.arange(group[0].info["num_classes"])
    return np.mean([metrics.confusion_matrix(labels, predictions(entry), labels=classes, normalize="true") for entry in group], axis=0)


def confused_pairs(confusion, names, most=8):
    """The mistakes either student makes most often, and how often both make them: shares of the true class's images."""
    wrong = {run: confusion[run] * (1 - np.eye(len(names))) for run in SCRIPTS}
    worst = np.maximum(wrong["baseline"], wrong["distilled"])
    order = [np.unravel_index(i, worst.shape) for i in np.argsort(-worst, axis=None, kind="stable")[:most]]
    return [{"true": names[i], "predicted": names[j], **{run: float(wrong[run][i, j]) for run in SCRIPTS}}
            for i, j in order if worst[i, j] > 0]


def superclass_errors(entries, labels, names):
    """Errors of each student and the share of them within the right superclass; None unless the classes are CIFAR-100's."""
    of = {name: title for title, members in data_loader.CIFAR100_SUPERCLASSES.items() for name in members.split()}
    if set(names) != set(of):
        return None
    titles = np.array([of[name] for name in names])
    result = {}
    for run, group in entries.items():
        wrong = [predictions(entry) != labels for entry in group]
        within = [(titles[predictions(entry)] == titles[labels])[bad].sum() for entry, bad in zip(group, wrong)]
        result[run] = {"errors": float(np.mean([bad.sum() for bad in wrong])), "within_superclass": float(np.mean(within))}
    return result


def differences(infos):
    """What differs between the two runs besides the teacher, one phrase each: [] is a fair pair."""
    odd = []
    pairs = [(*pair, set()) for pair in zip(infos["baseline"], infos["distilled"])]
    pairs += [(group[0], other, {"seed"}) for group in infos.values() for other in group[1:]]  # one seed with another
    for one, other, may_differ in pairs:
        ours, theirs = one["config"], other["config"]
        shared = (ours.keys() & theirs.keys()) - config.NEUTRAL - may_differ
        odd += [f"{name} ({ours[name]} and {theirs[name]})" for name in sorted(shared) if ours[name] != theirs[name]]
        odd += ["the model"] * (one["model_name"] != other["model_name"])
        odd += ["the validation split"] * (one["split_fingerprint"] != other["split_fingerprint"])
    return list(dict.fromkeys(odd))


def unfinished(pairs):
    """A phrase for each student whose training has not come to its end."""
    return [f"{path.parent} is not trained to its end" for path in sum(pairs.values(), []) if not utils.is_finished(path.parent)]


@torch.inference_mode()
def time_models(entries, device, seconds=6):
    """Latency at batch 1 (ms) and throughput at batch 64 (images/s) of each model at its own size, medians.

    The models take turns, so that a machine that slows down slows them all; at least five rounds.
    """
    def clock(model, images):
        start = time.perf_counter()
        models.forward(model, images).cpu()  # waits for the device
        return time.perf_counter() - start

    timings, first = {}, {run: group[0] for run, group in entries.items()}
    for batch, name in ((1, "latency_ms"), (64, "throughput")):
        inputs = {run: torch.rand(batch, 3, entry.info["image_size"], entry.info["image_size"], device=device)
                  .contiguous(memory_format=torch.channels_last) for run, entry in first.items()}
        taken, end = {run: [] for run in first}, time.perf_counter() + seconds / 2
        for run, entry in first.items():
            clock(entry.model, inputs[run])
        while len(taken["baseline"]) < 5 or time.perf_counter() < end and len(taken["baseline"]) < 200:
            for run, entry in first.items():
                taken[run].append(clock(entry.model, inputs[run]))
        timings[name] = {run: statistics.median(values) * 1000 if batch == 1 else batch / statistics.median(values)
                         for run, values in taken.items()}
    return timings


def training_hours(entries):
    """Hours each model took to train, mean over its seeds; the distilled student's without its teacher's, which stand beside."""
    return {"training_hours": {
        run: statistics.fmean(sum(row["seconds"] for row in entry.history) for entry in group) / 3600
        if all(entry.history for entry in group) else None for run, group in entries.items()}}


# Report ---------------------------------------------------------------------------------------------------------

def write_report(numbers):
    """The comparison as text of at most 100 columns, the verdict first, the timings last."""
    table, dataset, notes = numbers["models"], numbers["dataset"], numbers["notes"]
    names = {run: table[run]["model_name"] for run in table}
    title = f"{names['baseline']} alone against {names['distilled']} taught by {names.get('teacher', 'a teacher that is gone')}"
    seeds = f"seed{'s' * (len(numbers['seeds']) > 1)} {', '.join(map(str, numbers['seeds']))}"
    lines = [*paragraph(title), *paragraph(f"{dataset['name']}: {dataset['test_images']} test images of {dataset['num_classes']} classes, {seeds}"), ""]
    warnings = [f"This is no fair pair, these differ between the two runs: {'; '.join(notes['unfair'])}."] * bool(notes["unfair"])
    if numbers["comparison"].get("teacher_beats_baseline") is False:
        warnings.append("The teacher does not beat the baseline on these images; little can be learned from it.")
    warnings += [f"No teacher in this report: {notes['no_teacher']}."] * bool(notes["no_teacher"])
    warnings += [f"No temperature scaling: {notes['no_validation']}."] * bool(notes["no_validation"])
    warnings += [f"Left out: {', '.join(notes['left_out'])}."] * bool(notes["left_out"])
    for text in warnings:
        lines += paragraph("WARNING: " + text) + [""]
    lines += paragraph(verdict_sentence(numbers["comparison"])) + [""]
    lines += paragraph(alone_sentence(numbers["comparison"], dataset)) + paragraph(cost_sentence(numbers["timings"]["training_hours"]))
    lines += ["", *score_lines(numbers), "", *changes_lines(table), "", *pair_lines(numbers["confused_pairs"])]
    if numbers["superclasses"]:
        lines += ["", "Errors within the right one of CIFAR-100's 20 superclasses"]
        lines += [f"  {LABELS[run]:<12}{item['within_superclass']:>8.1f} of {item['errors']:.1f} errors "
                  f"({item['within_superclass'] / max(item['errors'], 1):.1%})" for run, item in numbers["superclasses"].items()]
    lines += ["", *paragraph("Trained with " + ", ".join(f"{key} {value}" for key, value in numbers["versions"].items() if value)),
              "", *timing_lines(numbers)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def paragraph(text):
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def cut(name, width):
    return name if len(name) <= width else name[:width - 1] + "…"


def points(fraction):
    return f"{100 * fraction:+.2f}"


def verdict_sentence(comparison):
    low, high = comparison[f"interval_over_{comparison['rests_on']}"]
    over = f"over {len(comparison['difference_by_seed'])} seeds" if comparison["rests_on"] == "seeds" else "over test images"
    if comparison["rests_on"] == "seeds":
        test = f"paired t-test p = {comparison['t_test_p']:.2g}" if comparison["t_test_p"] is not None else "all seeds alike"
    else:
        test = f"McNemar's exact p = {', '.join(f'{p:.2g}' for p in comparison['mcnemar_p_by_seed'])}"
    figures = f"{points(comparison['difference'])} points of top-1 accuracy (95 % interval {points(low)} to {points(high)} {over}, {test})"
    return {"better": f"The distilled student is better than the baseline: {figures}.",
            "worse": f"The distilled student is worse than the baseline: {figures}.",
            "undecided": f"The data cannot tell whether distillation helped: {figures}; the interval includes zero."}[comparison["verdict"]]


def alone_sentence(comparison, dataset):
    mean = " on average over the seeds" if len(comparison["difference_by_seed"]) > 1 else ""
    return (f"Of {dataset['test_images']} test images the distilled student alone gets {comparison['distilled_alone_right']:.4g} right, "
            f"the baseline alone {comparison['baseline_alone_right']:.4g}{mean}.")


def cost_sentence(hours):
    missing = [LABELS[run].lower() for run in LABELS if hours.get(run) is None]
    if missing:
        return f"What training cost is not known of: {', '.join(missing)}."
    total = hours["distilled"] + hours["teacher"]
    return (f"Training took {utils.duration(3600 * hours['baseline'])} for the baseline and {utils.duration(3600 * total)} for the "
            f"distilled student, its teacher's {utils.duration(3600 * hours['teacher'])} included.")


def score_lines(numbers):
    """The table of scores, a column a model, ± the standard deviation over seeds where there are several."""
    table, runs = numbers["models"], list(numbers["models"])
    lines = [f"{'Scores on the test images':<38}" + "".join(f"{LABELS[run]:>20}" for run in runs)]

    def row(title, cell):
        cells = {run: cell(run) for run in runs}
        lines.append(f"  {title:<36}" + "".join(f"{cells[run] if cells[run] is not None else '-':>20}" for run in runs))

    def percent(key):
        return lambda run: f"{table[run][key]:.2%}" + (f" ± {100 * table[run]['sd'][key]:.2f}" if table[run]["sd"] else "")

    def inner(section, key, pattern):
        def cell(run):
            value = numbers.get(section, {}).get(run, {}).get(key)
            return None if value is None else pattern.format(value)
        return cell

    def calibrated(section, key):
        return lambda run: f"{table[run][section][key]:.4f}" if section in table[run] else None
    row("top-1 accuracy", percent("top1"))
    row("top-5 accuracy", percent("top5"))
    row("macro-F1", percent("macro_f1"))
    row("validation accuracy", percent("val_accuracy"))
    row("epoch kept, image size (px)", lambda run: f"{table[run]['epoch']:.3g}, {table[run]['image_size']}")
    row("parameters (million), file (MB)", lambda run: f"{table[run]['parameters'] / 1e6:.2f}, {table[run]['file_size_mb']:.1f}")
    lines.append("Calibration (nats; sum over classes; 15 equal-width bins)")
    for section, note in (("calibration", ""), ("calibration_scaled", ", scaled")):
        for key, title in (("nll", "cross-entropy (NLL)"), ("brier", "Brier score"), ("ece", "expected calibration error")):
            row(title + note, calibrated(section, key))
    row("temperature, fitted on validation", calibrated("calibration_scaled", "temperature"))
    if "fidelity" in numbers:
        lines.append("Fidelity to the teacher")
        row("same top-1 answer", inner("fidelity", "agreement", "{:.2%}"))
        row("same answer where the teacher errs", inner("fidelity", "agreement_where_teacher_errs", "{:.2%}"))
        row("mean KL(teacher || student) (nats)", inner("fidelity", "kl", "{:.4f}"))
        share = numbers["comparison"]["advantage_recovered"]
        row("teacher's advantage recovered", lambda run: f"{share:.0%}" if run == "distilled" and share is not None else None)
    return lines


def changes_lines(table, most=5):
    """The classes whose accuracy distillation changed most, either way."""
    before, after = table["baseline"]["per_class_accuracy"], table["distilled"]["per_class_accuracy"]
    order = sorted(before, key=lambda name: before[name] - after[name])
    lines = [f"{'Accuracy by class, most gained and lost':<38}{'Baseline':>20}{'Distilled':>20}{'points':>20}"]
    gained = [name for name in order[:most] if after[name] > before[name]]
    lost = [name for name in order[::-1][:most][::-1] if after[name] < before[name]]
    return lines + [f"  {cut(name, 34):<36}{before[name]:>20.1%}{after[name]:>20.1%}{points(after[name] - before[name]):>20}"
                    for name in gained + lost]


def pair_lines(pairs):
    lines = [f"{'Most confused: true class, taken for':<38}{'Baseline':>20}{'Distilled':>20}{'points':>20}"]
    for pair in pairs:
        name = f"{cut(pair['true'], 16)}, {cut(pair['predicted'], 16)}"
        lines.append(f"  {name:<36}{pair['baseline']:>20.1%}{pair['distilled']:>20.1%}{points(pair['distilled'] - pair['baseline']):>20}")
    return lines


def timing_lines(numbers):
    timings, runs = numbers["timings"], list(numbers["models"])
    lines = [f"{'Timings on ' + timings['device']:<38.38}" + "".join(f"{LABELS[run]:>20}" for run in runs)]
    for key, title, pattern in (("latency_ms", "one image (ms)", "{:.2f}"), ("throughput", "batches of 64 (images/s)", "{:.0f}"),
                                ("training_hours", "training (h)", "{:.2f}")):
        values = timings[key]
        lines.append(f"  {title:<36}" + "".join(f"{pattern.format(values[run]) if values[run] is not None else 'not known':>20}" for run in runs))
    return lines


def write_files(entries, labels, numbers, report, results):
    """predictions.npz (the first seed's), comparison.json and comparison_report.txt."""
    first = {run: group[0] for run, group in entries.items()}
    with utils.write_into_place(results / "predictions.npz", "wb") as file:
        np.savez_compressed(file, labels=labels, class_names=np.array(first["baseline"].info["class_names"]),
                            **{run: np.exp(entry.log_probabilities).astype(np.float32) for run, entry in first.items()})
    with utils.write_into_place(results / "comparison.json") as file:
        json.dump(numbers, file, indent=1, ensure_ascii=False, allow_nan=False)
    with utils.write_into_place(results / "comparison_report.txt") as file:
        file.write(report)


# Figures --------------------------------------------------------------------------------------------------------

def write_figures(entries, labels, val_labels, test, numbers, results):
    """Write every figure as PNG (200 dpi) and PDF into `results`."""
    seaborn.set_theme(style="whitegrid", context="paper", rc={"hatch.linewidth": 0.8})
    names = entries["baseline"][0].info["class_names"]
    figures = [("training_curves", curves_figure(entries)), ("accuracy_comparison", accuracy_figure(numbers)),
               ("distillation_diagnostics", diagnostics_figure(entries)),
               ("reliability_diagram", reliability_figure(entries, labels, val_labels)), ("class_changes", changes_figure(numbers)),
               ("gallery", gallery_figure(entries, labels, test, names))]
    confusion = {run: confusions(group, labels) for run, group in entries.items()}
    order = similarity_order(sum(confusion.values())) if len(names) > 20 else np.arange(len(names))
    figures += [(f"confusion_matrix_{run}", confusion_figure(run, matrix, order, names, numbers)) for run, matrix in confusion.items()]
    for name, figure in figures:
        for kind in ("png", "pdf"):
            with utils.write_into_place(results / f"{name}.{kind}", "wb") as file:
                figure.savefig(file, format=kind, dpi=200, bbox_inches="tight",
                               metadata={"CreationDate": None} if kind == "pdf" else None)
        plt.close(figure)


def curves_figure(entries):
    """Cross-entropy on training images and validation accuracy over the epochs, a line a seed, the kept epoch marked."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for run, group in entries.items():
        for i, entry in enumerate(entry for entry in group if entry.history):
            epochs = [row["epoch"] for row in entry.history]
            style = dict(color=COLOURS[run], linestyle=STYLES[run][0], label=LABELS[run] if i == 0 else None)
            left.plot(epochs, [row["ce_loss"] for row in entry.history], **style)
            right.plot(epochs, [100 * row["val_accuracy"] for row in entry.history], **style)
            right.plot(entry.info["epoch"], 100 * entry.info["val_accuracy"], STYLES[run][2], color=COLOURS[run])
    left.set(title="Cross-entropy on training images, as augmented", xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set(title="Validation accuracy; the mark is the epoch kept", xlabel="epoch", ylabel="accuracy (%)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend()
    return figure


def diagnostics_figure(entries):
    """Why the teacher helped or not, on the training images as augmented, a line a seed: cross-entropy of both students, both parts
    of the distilled student's loss with their weights, how sure each model was, and how often right. The teacher is frozen."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    info = entries["distilled"][0].info
    alpha, loss = info["config"].get("alpha"), info["config"].get("distillation_loss", "kd")  # older checkpoints lack some settings

    def draw(axis, run, column, label, colour, style, scale=1):
        for entry in entries[run]:
            rows = [row for row in entry.history if row.get(column) is not None]  # older histories lack some
            if rows:
                axis.plot([row["epoch"] for row in rows], [row[column] * scale for row in rows], style, color=colour, label=label)
                label = None

    for run in SCRIPTS:
        for axis, column, scale in ((axes[0, 0], "ce_loss", 1), (axes[1, 0], "entropy", 1), (axes[1, 1], "train_accuracy", 100)):
            draw(axis, run, column, LABELS[run], COLOURS[run], STYLES[run][0], scale)
    if alpha is not None:
        draw(axes[0, 1], "distilled", "kd_loss", f"{alpha:g} × soft part ({loss})", COLOURS["distilled"], "-", alpha)
        draw(axes[0, 1], "distilled", "ce_loss", f"{1 - alpha:.3g} × cross-entropy", COLOURS["distilled"], ":", 1 - alpha)
    draw(axes[1, 0], "distilled", "target_entropy", "Soft targets, as the loss sees them", COLOURS["teacher"], "-.")
    draw(axes[1, 0], "distilled", "teacher_entropy", "Teacher", COLOURS["teacher"], STYLES["teacher"][0])
    axes[1, 0].axhline(np.log(info["num_classes"]), color="black", linewidth=0.8, label=f"uniform, ln {info['num_classes']}")
    draw(axes[1, 1], "distilled", "teacher_accuracy", "Teacher", COLOURS["teacher"], STYLES["teacher"][0], 100)
    if info.get("teacher"):
        axes[1, 1].axhline(100 * info["teacher"]["val_accuracy"], color="black", linewidth=0.8, label="Teacher on validation images")
    titles = ("Cross-entropy with the labels", "Parts of the distilled student's loss", "Entropy of the predictions", "Accuracy")
    for axis, title, unit in zip(axes.flat, titles, ("nats", "as weighted in the loss", "nats", "%")):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(fontsize="x-small")
    figure.suptitle("On the training images, as augmented: students as they learned, the teacher frozen")
    return figure


def accuracy_figure(numbers):
    """Top-1, top-5 and macro-F1 side by side, the standard deviation over seeds as whiskers."""
    table, scores = numbers["models"], {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1"}
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    width = 0.8 / len(table)
    for i, (run, model) in enumerate(table.items()):
        sd = [100 * model["sd"][key] for key in scores] if model["sd"] else None
        bars = axis.bar(np.arange(3) + (i - (len(table) - 1) / 2) * width, [100 * model[key] for key in scores], width, yerr=sd,
                        color=COLOURS[run], hatch=STYLES[run][1], edgecolor="white", label=LABELS[run], capsize=3)
        axis.bar_label(bars, fmt="%.1f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axis.set_xticks(range(3), scores.values())
    axis.set(title=f"Scores on {numbers['dataset']['test_images']} test images of {numbers['dataset']['num_classes']} classes",
             ylabel="score (%)", ylim=(0, 108))
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    return figure


def reliability_figure(entries, labels, val_labels):
    """Accuracy against confidence before and after temperature scaling; below the diagonal a model is too sure."""
    panels = {"As trained": lambda entry: entry.log_probabilities}
    if val_labels is not None:
        panels["Temperature fitted on validation images"] = lambda entry: soften(
            entry.log_probabilities, best_temperature(entry.val_log_probabilities, val_labels))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.4), layout="constrained", squeeze=False)
    for axis, (title, look) in zip(axes[0], panels.items()):
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=1, label="perfectly calibrated")
        for run, group in entries.items():
            confidence, accuracy, share = reliability(np.concatenate([look(entry) for entry in group]), np.tile(labels, len(group)))
            filled = share * len(labels) * len(group) >= 10  # the accuracy of fewer images is chance
            axis.plot(100 * confidence[filled], 100 * accuracy[filled], color=COLOURS[run], linestyle=STYLES[run][0],
                      marker=STYLES[run][2], markersize=4, label=LABELS[run])
        axis.set(title=title, xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(-1.5, 101.5), ylim=(-1.5, 101.5))
        axis.legend(loc="upper left")
    figure.suptitle(f"How often a model that is so sure is right: {BINS} equal-width bins, those of 10 images and more")
    return figure


def changes_figure(numbers):
    """Accuracy of every class with and without a teacher, in the order of the change."""
    before, after = (numbers["models"][run]["per_class_accuracy"] for run in SCRIPTS)
    names = sorted(before, key=lambda name: after[name] - before[name])
    figure, axis = plt.subplots(figsize=(6.5, max(2.8, 0.8 + 0.135 * len(names))), layout="constrained")
    y = np.arange(len(names))
    axis.hlines(y, [100 * before[name] for name in names], [100 * after[name] for name in names], color="#999999", linewidth=1)
    for run, values, size in (("baseline", before, 6.5), ("distilled", after, 3.5)):  # where they meet, both show
        axis.plot([100 * values[name] for name in names], y, STYLES[run][2], color=COLOURS[run], markersize=size, label=LABELS[run])
    axis.set_yticks(y, names, fontsize=9 if len(names) <= 20 else 6.5)
    axis.set(title="Accuracy by class, largest gain on top", xlabel="accuracy (%)", ylim=(-1, len(names)))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / figure.get_figheight()), ncols=2, frameon=False)
    return figure


def gallery_figure(entries, labels, test, names, most=8):
    """Test images that the distilled student corrects and that it newly gets wrong, those it is surest of first."""
    baseline, distilled = entries["baseline"][0], entries["distilled"][0]
    before, after = predictions(baseline), predictions(distilled)
    sure = distilled.log_probabilities.max(1)
    parts = []
    for title, chosen in (("corrected", (before != labels) & (after == labels)), ("newly wrong", (before == labels) & (after != labels))):
        found = np.flatnonzero(chosen)
        parts.append((title, found[np.argsort(-sure[found], kind="stable")][:most]))
    rows = [max(1, -(-len(found) // 4)) for _, found in parts]
    figure, axes = plt.subplots(sum(rows), 4, figsize=(9, 0.4 + 2.3 * sum(rows)), layout="constrained", squeeze=False)
    for top, (title, found) in zip((0, rows[0]), parts):
        for place, axis in enumerate(axes[top:top + rows[top > 0]].flat):
            axis.axis("off")
            if place < len(found):
                i = found[place]
                axis.imshow(data_loader.picture(test, i))
                axis.set_title(f"{title}: {names[labels[i]]}\n" + "\n".join(
                    f"{LABELS[run]}: {names[predicted[i]]} {np.exp(entry.log_probabilities[i, predicted[i]]):.0%}"
                    for run, entry, predicted in (("baseline", baseline, before), ("distilled", distilled, after))), fontsize=8)
    seed = f", seed {distilled.info['config']['seed']}," if len(entries["distilled"]) > 1 else ""
    figure.suptitle(f"Test images that the distilled student{seed} corrects (above) and newly gets wrong (below)")
    return figure


def confusion_figure(run, matrix, order, names, numbers):
    """A confusion matrix (C, C), classes in `order`."""
    count, side = len(names), max(5.0, 0.14 * len(names))
    names = [names[i] for i in order]
    figure, axis = plt.subplots(figsize=(side, side * 0.93), layout="constrained")
    seaborn.heatmap(100 * matrix[np.ix_(order, order)], cmap="Blues", square=True, ax=axis, annot=count <= 20, fmt=".0f",
                    norm=matplotlib.colors.PowerNorm(0.5, 0, 100),  # a mistake of a few percent stays visible
                    xticklabels=names, yticklabels=names, cbar_kws={"label": "share of the true class (%)", "shrink": 0.7},
                    linewidths=0.2 if count > 20 else 0, linecolor="#eeeeee")
    axis.tick_params(labelsize=9 if count <= 20 else 6.5, rotation=0)
    axis.tick_params(axis="x", rotation=90 if count > 10 or max(map(len, names)) > 3 else 0)
    axis.set_title(f"{LABELS[run]} ({numbers['models'][run]['model_name']}): what each class is taken for" +
                   "; alike classes stand together" * (count > 20), fontsize=11 if count <= 20 else 14)
    axis.set(xlabel="predicted class", ylabel="true class")
    return figure


def similarity_order(confusion):
    """Order of the classes in which those that are taken for each other are neighbours (average linkage)."""
    alike = confusion + confusion.T
    distance = 1 - alike / alike.max()
    condensed = distance[np.triu_indices(len(alike), k=1)]
    return hierarchy.leaves_list(hierarchy.linkage(condensed, "average", optimal_ordering=True))


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("evaluate", __doc__)))
