"""Is the distilled student better than the baseline, where, and can one rely on it?

    python evaluate.py            # the two students in checkpoints/, all seeds that both have
    python evaluate.py --quick    # those of the small run

Dataset, split, image size and crop are the checkpoints' own. Writes into results/ the report for
people, comparison.json and predictions.npz for programs, and every figure as PNG and PDF.
"""
import argparse
import json
import math
import signal
import statistics
import sys
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback; later run_script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from scipy import optimize, stats
from scipy.cluster import hierarchy
from scipy.special import log_softmax
from sklearn import metrics

try:
    import config
except Exception as error:  # people edit it
    print(f"error: config.py cannot be read: {error}", file=sys.stderr)
    sys.exit(2)
import data_loader
import models
import utils
from utils import UserError

STUDENTS = ("baseline", "distilled")
SCORES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1",
          "val_accuracy": "validation accuracy"}
T_SEEDS = 3  # from so many seeds on, the verdict takes them for a sample too
BINS = 15    # of confidence, equal in width, for the calibration error: as Guo et al. 2017


def main(args):
    device = utils.setup(args)
    paths, left_out = find_students(args)
    _, first = models.load_model(paths["distilled"][0])
    test, data, no_validation = open_images(first, args)
    entries = {run: [load_entry(path, first, test, data, args, device) for path in paths[run]]
               for run in STUDENTS}
    teacher, no_teacher = find_teacher(entries["distilled"], args)
    if teacher:
        entries["teacher"] = [load_entry(teacher, first, test, data, args, device)]

    labels, results = test.labels.numpy(), Path(args.results_dir)
    numbers = compare(entries, labels, len(data.val.labels) if data else None)
    numbers |= {"timings": {"training_hours": training_hours(entries)}, "notes": {
        "unfair": differences(entries), "no_teacher": no_teacher, "left_out": left_out,
        "trained_on": data_loader.duplicates_of_training_images(test, data) if data else [],
        "no_validation": no_validation}}
    write_figures(entries, labels, test, numbers, results)
    report = write_report(numbers)
    write_files(entries, labels, numbers, report, results)
    models.export_best_student(args.checkpoint_dir, first)
    then = "\nNext, the real thing: python train_baseline.py" if args.quick else ""
    print("\n" + report.partition("Details\n")[0] + f"Details: {results / 'comparison_report.txt'}"
          f", to show: {results / 'accuracy_comparison.png'}{then}")


# Load ---------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One trained model of the comparison, and what it answers."""
    path: Path
    model: torch.nn.Module
    info: dict                 # all that its checkpoint says but the weights
    log_probs: np.ndarray      # (N, C) float64 log-probabilities of the test images
    temperature: float | None  # fitted on validation images; None where those cannot be had
    history: list              # a dict per epoch of its training, [] where its last.pth is gone

    @property
    def predictions(self):
        return self.log_probs.argmax(1)  # (N,)


def find_students(args):
    """Paths of the students to compare, {run: [one per seed]}: of the seeds that both runs have, if
    there are any, else the plain pair; and a phrase for each that is left out."""
    given = {"baseline": args.baseline_checkpoint, "distilled": args.distilled_checkpoint}
    folders = {run: Path(args.checkpoint_dir, run) for run in STUDENTS}
    plain = {run: Path(given[run] or folders[run] / "best_model.pth") for run in STUDENTS}
    seeds = {run: {int(path.parent.name.removeprefix("seed_")): path
                   for path in models.student_checkpoints(folders[run])
                   if path.parent != folders[run]} for run in STUDENTS}
    common = sorted(seeds["baseline"].keys() & seeds["distilled"].keys())
    paths = {run: [seeds[run][seed] for seed in common] for run in STUDENTS}
    left_out = [f"the plain {run} run" for run in STUDENTS if plain[run].is_file()]
    if not common or any(given.values()):
        for run in sorted(STUDENTS, key=lambda run: len(seeds[run])):  # that with fewer seeds
            if not plain[run].is_file():
                raise UserError(f"there is no {plain[run]}; make it with: {how_to_make(run, args)}")
        paths, left_out, common = {run: [plain[run]] for run in STUDENTS}, [], []
    left_out += [f"{run} seed {seed}" for run in STUDENTS for seed in sorted(seeds[run])
                 if seed not in common]
    if {*map(utils.sha256, paths["baseline"])} & {*map(utils.sha256, paths["distilled"])}:
        raise UserError("baseline and distilled student are one and the same checkpoint")
    return paths, left_out


def how_to_make(run, args):
    """The command that trains the student `run` as a fair pair to those of the other run."""
    other = Path(args.checkpoint_dir, "distilled" if run == "baseline" else "baseline")
    paths = models.student_checkpoints(other)
    seeded = [path for path in paths if path.parent != other]
    made = [models.load_model(path)[1]["config"]["argv"] for path in seeded or paths]
    seeds = ["--seeds", *(path.parent.name.removeprefix("seed_") for path in seeded)]
    return config.format_command("baseline" if run == "baseline" else "distillation",
                          [*sum(made, []), *args.argv, *(seeds if seeded else [])])


def open_images(info, args):
    """(test images, data to train and validate, None) of the dataset and the split of `info`, a
    checkpoint's dict, or (test images, None, why the others cannot be had)."""
    settings = argparse.Namespace(**{**info["config"], "data_dir": args.data_dir})
    settings.dataset_dir = args.dataset_dir or settings.dataset_dir  # it may lie elsewhere now
    if info["dataset"] == "ImageFolder" and not Path(settings.dataset_dir).is_dir():
        raise UserError(f"the pictures are no longer in {settings.dataset_dir}; "
                        "say where with --dataset-dir DIR")
    test, class_names = data_loader.load_split(info["dataset"], "test", settings)
    if odd := data_loader.describe_class_mismatch(class_names, info["class_names"]):
        raise UserError(f"the test images have other classes than the checkpoints; {odd}")
    try:
        data = data_loader.open_dataset(settings)
    except UserError as error:
        return test, None, str(error)
    if data.split_fingerprint != info["split_fingerprint"]:
        return test, None, "the training images are no longer those of the checkpoints"
    return test, data, None


def load_entry(path, first, test, data, args, device):
    """The Entry of a checkpoint. `first` is another's dict: the classes that this one must know,
    else UserError, and the split of `data` (or None)."""
    model, info = models.load_model(path, device)
    odd = data_loader.describe_class_mismatch(info["class_names"], first["class_names"])
    if odd or info["dataset"] != first["dataset"]:
        raise UserError(f"{path} cannot be compared with the distilled student: one is of "
                        f"{info['dataset']}, the other of {first['dataset']}{odd and '; ' + odd}")

    def answer(images):
        logits, _ = models.infer(model, data_loader.EvaluationLoader(images, info, args, device))
        return logits.double().log_softmax(1).numpy()
    temperature = None
    if data and info["split_fingerprint"] == first["split_fingerprint"]:  # else it trained on some
        temperature = best_temperature(answer(data.val), data.val.labels.numpy())
    last = path.with_name("last.pth")
    history = utils.load_checkpoint(last)["history"] if last.is_file() else []
    return Entry(path, model, info, answer(test), temperature, history)


def find_teacher(students, args):
    """(path of the teacher that these students record, None), or (None, why there is none)."""
    teachers = [entry.info.get("teacher") for entry in students]
    if not all(teachers):
        return None, "the distilled checkpoint names no teacher"
    if len({teacher["sha256"] for teacher in teachers}) > 1:
        return None, "the distilled students had different teachers"
    recorded = Path(teachers[0]["path"])  # the whole folder of checkpoints may have moved since
    for path in (recorded, Path(args.checkpoint_dir, "teacher", "best_model.pth")):
        if path.is_file() and utils.sha256(path) == teachers[0]["sha256"]:
            return path, None
    return None, f"the teacher {recorded} is gone, or has changed (its SHA-256 differs)"


def differences(entries):
    """What differs between the students besides the teacher, a phrase each; [] is a fair pair."""
    found, students = [], entries["baseline"] + entries["distilled"]
    reference = entries["distilled"][0].info
    may_differ = {"seed"} if len(students) > 2 else set()  # of many, both runs have the same seeds
    for info in (entry.info for entry in students):
        ours, theirs = info["config"], reference["config"]
        shared = (ours.keys() & theirs.keys()) - config.MAY_CHANGE_ON_RESUME - may_differ
        found += [f"{name} ({ours[name]} and {theirs[name]})"
                  for name in sorted(shared) if ours[name] != theirs[name]]
        phrases = {"model_name": "the model", "split_fingerprint": "the validation split"}
        found += [phrase for key, phrase in phrases.items() if info[key] != reference[key]]
    found += [f"{entry.path.parent} is not trained to its end" for entry in students
              if entry.history and len(entry.history) < entry.info["config"]["num_epochs"]]
    return [phrase for i, phrase in enumerate(found) if phrase not in found[:i]]


# Numbers ------------------------------------------------------------------------------------------

def compare(entries, labels, validation_images):
    """Every number of the report but notes and timings, by the names in results/README.md: of
    `entries` {run: [Entry per seed]}, the test images' `labels` (N,) and the number of
    `validation_images` or None. Accuracies are fractions, losses nats."""
    first = entries["baseline"][0].info
    scores = {run: over_seeds([measure(entry, labels) for entry in group])
              for run, group in entries.items()}
    name = Path(first["config"]["dataset_dir"] or first["dataset"]).resolve().name  # the folder's
    numbers = {
        "dataset": {"name": name, "num_classes": first["num_classes"],
                    "test_images": len(labels), "validation_images": validation_images},
        "seeds": [entry.info["config"]["seed"] for entry in entries["distilled"]],
        "versions": first["versions"], "models": scores, "comparison": verdict(entries, labels)}
    if "teacher" in entries:
        numbers["fidelity"] = {run: mean_of([fidelity(entry, entries["teacher"][0])
                                             for entry in entries[run]]) for run in STUDENTS}
        lead = scores["teacher"]["top1"] - scores["baseline"]["top1"]
        gain = scores["distilled"]["top1"] - scores["baseline"]["top1"]
        numbers["comparison"] |= {"teacher_beats_baseline": lead > 0,
                                  "advantage_recovered": gain / lead if lead > 0 else None}
    return numbers


def over_seeds(scores):
    """The mean of what `measure` returned by seed, and the main scores by seed with their sd."""
    by_seed = {key: [one[key] for one in scores] for key in SCORES}
    sd = {key: statistics.stdev(values) for key, values in by_seed.items() if len(scores) > 1}
    return {**mean_of(scores), "by_seed": by_seed, "sd": sd or None}


def mean_of(values):
    """The mean of floats, or of dicts key by key; anything else is alike in all, and kept."""
    if isinstance(values[0], float):
        return statistics.fmean(values)
    if isinstance(values[0], dict):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: mean_of([value[key] for value in values]) for key in shared}
    return values[0]


def measure(entry, labels):
    """What one model scores on the test images; a class without any counts as 0."""
    info, log_probs = entry.info, entry.log_probs
    _, recalls, f1, _ = metrics.precision_recall_fscore_support(
        labels, entry.predictions, labels=np.arange(info["num_classes"]), zero_division=0)
    top5 = np.argsort(log_probs, axis=1, kind="stable")[:, -5:]  # (N, 5), or all classes
    scores = {
        "model_name": info["model_name"], "epoch": float(info["epoch"]),
        "val_accuracy": info["val_accuracy"], "image_size": info["image_size"],
        "top1": float((entry.predictions == labels).mean()),
        "top5": float((top5 == labels[:, None]).any(1).mean()), "macro_f1": float(f1.mean()),
        "calibration": calibration(log_probs, labels),
        "per_class_accuracy": dict(zip(info["class_names"], recalls.tolist(), strict=True)),
        "parameters": sum(parameter.numel() for parameter in entry.model.parameters()),
        "file_size_mb": entry.path.stat().st_size / 2**20}
    if entry.temperature:
        scaled = log_softmax(log_probs / entry.temperature, axis=1)
        scores["calibration_scaled"] = {"temperature": entry.temperature,
                                        **calibration(scaled, labels)}
    return scores


def verdict(entries, labels):
    """The difference distilled - baseline in top-1 accuracy, and what follows from it. McNemar's
    test (1947) is exact and two-sided, on the images that one student alone gets right."""
    baseline, distilled = (np.array([entry.predictions == labels for entry in entries[run]])
                           for run in STUDENTS)  # whether right, (seeds, N)
    gains = distilled.astype(float) - baseline  # (seeds, N) of -1, 0, 1
    alone = [((one < 0).sum(), (one > 0).sum()) for one in gains]  # images, by seed
    by_seed = gains.mean(1).tolist()
    over_seeds, t_test_p = t_test(by_seed)
    over = {"images": interval(gains.mean(0, keepdims=True)), "both": interval(gains)}
    rests_on = "both" if len(by_seed) >= T_SEEDS else "images"
    low, high = over[rests_on]
    return {
        "difference": statistics.fmean(by_seed), "difference_by_seed": by_seed,
        "interval_over_images": over["images"], "interval_over_seeds": over_seeds,
        "interval_over_both": over["both"] if len(by_seed) > 1 else None,
        "interval_by_seed": [interval(one[None]) for one in gains],
        "baseline_alone_right": statistics.fmean(one for one, _ in alone),
        "distilled_alone_right": statistics.fmean(other for _, other in alone),
        "mcnemar_p_by_seed": [float(stats.binomtest(one, one + other).pvalue)
                              if one + other else 1.0 for one, other in alone],
        "t_test_p": t_test_p, "rests_on": rests_on,
        "verdict": "undecided" if low <= 0 <= high else "better" if low > 0 else "worse"}


def interval(gains):
    """95 % interval of the mean of `gains` (seeds, N), where seeds and images both are samples: of
    a two-way layout with random effects (Searle et al. 1992), with the seeds' degrees of freedom
    where they differ more than chance in the images makes them. By calculation the truth lies
    within in 94 to 97.4 of 100 comparisons, with three seeds in 92.5 at worst."""
    S, N = gains.shape
    over_images, over_seeds = gains.mean(0, keepdims=True), gains.mean(1, keepdims=True)
    mean, variance, freedom = gains.mean(), S * over_images.var(ddof=1), N - 1
    if S > 1:
        rest = ((gains - over_images - over_seeds + mean)**2).sum() / ((S - 1) * (N - 1))
        more = N * over_seeds.var(ddof=1) - rest  # mean squares
        if more > 0:
            variance, freedom = variance + more, S - 1
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance / (S * N))
    return [float(mean - half), float(mean + half)]


def t_test(by_seed):
    """95 % interval of the mean of paired differences, and p of no difference (Student 1908); none
    of one seed, nor where all are alike, which is no proof that the next would be."""
    if len(set(by_seed)) == 1:
        return None, None
    test = stats.ttest_1samp(by_seed, 0)
    return [float(bound) for bound in test.confidence_interval()], float(test.pvalue)


def fidelity(student, teacher):
    """How alike two entries answer; KL(teacher || student) in nats."""
    gap = teacher.log_probs - student.log_probs
    return {"agreement": float((student.predictions == teacher.predictions).mean()),
            "kl": float((np.exp(teacher.log_probs) * gap).sum(1).mean())}


def calibration(log_probs, labels):
    """NLL in nats, Brier score (Brier 1950, sum over classes), expected calibration error."""
    probabilities, rows = np.exp(log_probs), np.arange(len(labels))
    brier = (probabilities**2).sum(1) - 2 * probabilities[rows, labels] + 1
    confidence, accuracy, counts = reliability(log_probs, labels)
    return {"nll": float(-log_probs[rows, labels].mean()), "brier": float(brier.mean()),
            "ece": float((counts * np.abs(accuracy - confidence)).sum() / len(labels))}


def reliability(log_probs, labels):
    """Mean confidence (the top probability), accuracy and number of images, each (BINS,), by bins
    of confidence (0, 1/15], (1/15, 2/15], ...; an empty one has 0 of all three."""
    confidence, right = np.exp(log_probs.max(1)), log_probs.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, confidence, BINS), np.bincount(bins, right, BINS)
    return sums[0] / counts.clip(1), sums[1] / counts.clip(1), counts


def best_temperature(log_probs, labels):
    """The temperature with the least NLL (Guo et al. 2017), between 0.05 and 20."""
    def nll(temperature):
        return -log_softmax(log_probs / temperature, 1)[np.arange(len(labels)), labels].mean()
    return float(optimize.minimize_scalar(nll, bounds=(0.05, 20), method="bounded").x)


def training_hours(entries):
    """Hours each run's training took, mean over the seeds; None where a history is gone."""
    hours = {run: [sum(row["seconds"] for row in entry.history) / 3600 for entry in group]
             for run, group in entries.items()}
    return {run: statistics.fmean(each) if all(each) else None for run, each in hours.items()}


# Report -------------------------------------------------------------------------------------------

def write_report(numbers):
    """The comparison as text of at most 100 columns, the verdict first, the details last."""
    dataset, seeds = numbers["dataset"], ", ".join(map(str, numbers["seeds"]))
    names = {run: scores["model_name"] for run, scores in numbers["models"].items()}
    versions = [f"{name} {value}" for name, value in numbers["versions"].items() if value]
    sections = [
        [f"{names['baseline']} alone against {names['distilled']} taught by "
         f"{names.get('teacher', 'a teacher that is gone')}",
         f"{dataset['name']}: {dataset['test_images']} test images of {dataset['num_classes']} "
         f"classes, {'seeds' if len(numbers['seeds']) > 1 else 'seed'} {seeds}"],
        *[[f"WARNING: {text}."] for text in warning_texts(numbers)],
        verdict_lines(numbers),
        cost_lines(numbers),
        ["Details"],
        score_lines(numbers),
        ["Trained with " + ", ".join(versions)]]
    return "\n\n".join("\n".join(textwrap.fill(line, 100, break_on_hyphens=False)
                                 for line in lines) for lines in sections if lines) + "\n"


def table(title, heads, rows):
    """Lines of a table in columns of 38 + 20 + 20 + 20; rows are (label, cells)."""
    lines = [f"{title:<38}" + "".join(f"{head:>20}" for head in heads)]
    return lines + [f"  {label:<36}" + "".join(f"{text:>20}" for text in texts)
                    for label, texts in rows]


def cells(items, key, spec):
    """The cells of a row: `key` of each dict of `items`, ± its deviation over seeds, in points."""
    texts = []
    for item in items:
        text = "-" if item.get(key) is None else format(item[key], spec)
        deviation = (item.get("sd") or {}).get(key)
        texts.append(text if deviation is None else f"{text} ± {100 * deviation:.2f}")
    return texts


def warning_texts(numbers):
    notes = numbers["notes"]
    unfair, left_out = "; ".join(notes["unfair"]), ", ".join(notes["left_out"])
    count, known = len(notes["trained_on"]), ", ".join(notes["trained_on"][:5])
    weak = not numbers["comparison"].get("teacher_beats_baseline", True)
    texts = [
        (unfair, f"This is no fair pair, these differ between the two runs: {unfair}"),
        (weak, "The teacher does not beat the baseline on these images; "
               "little can be learned from it"),
        (notes["no_teacher"], f"No teacher in this report: {notes['no_teacher']}"),
        (known, f"{count} test images are, to the bit, among the training or validation images "
                f"too: {known}{', …' if count > 5 else ''}"),
        (notes["no_validation"], f"No temperature scaling: {notes['no_validation']}"),
        (left_out, f"Left out: {left_out}")]
    return [text for applies, text in texts if applies]


def verdict_lines(numbers):
    """The verdict, and with several seeds what seeds alone and images alone would say."""
    comparison, seeds = numbers["comparison"], f"{len(numbers['seeds'])} seeds"

    def span(over):
        low, high = comparison[f"interval_over_{over}"]
        return f"{100 * low:+.2f} to {100 * high:+.2f}"

    p = ", ".join(f"{value:.2g}" for value in comparison["mcnemar_p_by_seed"])
    basis = {"both": f"{seeds} and the test images", "images": f"test images, McNemar's p = {p}"}
    gain = (f"{100 * comparison['difference']:+.2f} points of top-1 accuracy (95 % interval "
            f"{span(comparison['rests_on'])} over {basis[comparison['rests_on']]})")
    first = f"The distilled student is {comparison['verdict']} than the baseline: {gain}."
    if comparison["verdict"] == "undecided":
        first = f"The data cannot tell whether distillation helped: {gain}, which includes zero."
    if len(numbers["seeds"]) == 1:
        return [first]
    p = comparison["t_test_p"]
    alone = f"{span('seeds')} (paired t-test p = {p:.2g})" if p else "none, since they are alike"
    return [first, f"Over the test images alone: {span('images')}; over the seeds alone: {alone}."]


def cost_lines(numbers):
    """Images that one student alone gets right, and what training took."""
    comparison, hours = numbers["comparison"], numbers["timings"]["training_hours"]
    alone = (f"Of {numbers['dataset']['test_images']} test images the distilled student alone gets "
             f"{comparison['distilled_alone_right']:.4g} right, the baseline alone "
             f"{comparison['baseline_alone_right']:.4g}.")
    missing = [run for run in (*STUDENTS, "teacher") if hours.get(run) is None]
    if missing:
        return [alone, f"What training cost is not known of: {', '.join(missing)}."]
    baseline, student, teacher = (3600 * hours[run] for run in (*STUDENTS, "teacher"))
    return [alone, f"Training took {utils.format_duration(baseline)} for the baseline and "
                   f"{utils.format_duration(student + teacher)} for the distilled student, its teacher's "
                   f"{utils.format_duration(teacher)} included."]


def score_lines(numbers):
    """The table of scores, ± the standard deviation over the seeds."""
    runs, scores = list(numbers["models"]), list(numbers["models"].values())
    plain = [one["calibration"] for one in scores]
    scaled = [one.get("calibration_scaled", {}) for one in scores]
    lines = table("Scores on the test images", map(str.capitalize, runs), [
        *[(label, cells(scores, key, ".2%")) for key, label in SCORES.items()],
        ("epoch kept, image size (px)",
         [f"{one['epoch']:.3g}, {one['image_size']}" for one in scores]),
        ("parameters (million), file (MB)",
         [f"{one['parameters'] / 1e6:.2f}, {one['file_size_mb']:.1f}" for one in scores])])
    kinds = (("nll", "cross-entropy (NLL)"), ("brier", "Brier score"),
             ("ece", "expected calibration error"))
    lines += table("Calibration (nats; sum over classes; 15 equal-width bins)", [], [
        *[(label, cells(plain, key, ".4f")) for key, label in kinds],
        *[(f"{label}, scaled", cells(scaled, key, ".4f")) for key, label in kinds],
        ("temperature, fitted on validation", cells(scaled, "temperature", ".4f"))])
    if "fidelity" in numbers:
        alike = [numbers["fidelity"].get(run, {}) for run in runs]
        lead = [{}, numbers["comparison"], {}]
        lines += table("Fidelity to the teacher", [], [
            ("same top-1 answer", cells(alike, "agreement", ".2%")),
            ("mean KL(teacher || student) (nats)", cells(alike, "kl", ".4f")),
            ("teacher's advantage recovered", cells(lead, "advantage_recovered", ".0%"))])
    return lines


def write_files(entries, labels, numbers, report, results):
    """predictions.npz (the first seed's), comparison.json and comparison_report.txt."""
    probabilities = {run: np.exp(group[0].log_probs).astype(np.float32)
                     for run, group in entries.items()}
    with utils.atomic_write(results / "predictions.npz", "wb") as file:
        np.savez_compressed(file, labels=labels, **probabilities,
                            class_names=entries["baseline"][0].info["class_names"])
    with utils.atomic_write(results / "comparison.json") as file:
        json.dump(numbers, file, indent=1, ensure_ascii=False, allow_nan=False)
    with utils.atomic_write(results / "comparison_report.txt") as file:
        file.write(report)


# Figures ------------------------------------------------------------------------------------------

matplotlib.use("Agg")  # no window, also without a display

# Colours of Okabe and Ito, which the colour-blind tell apart; lines and markers differ in grey too.
STYLES = {"baseline": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "Baseline"},
          "distilled": {"color": "#E69F00", "linestyle": "--", "marker": "s", "label": "Distilled"},
          "teacher": {"color": "#595959", "linestyle": ":", "marker": "^", "label": "Teacher"}}


def write_figures(entries, labels, test, numbers, results):
    """Write every figure as PNG and PDF into `results`."""
    seaborn.set_theme(style="whitegrid", context="paper", font=fonts_of(numbers), rc={
        "figure.constrained_layout.use": True, "savefig.dpi": 200, "savefig.bbox": "tight",
        "text.parse_math": False})  # a $ is no formula in a class name
    figures = {"training_curves": curves_figure(entries),
               "accuracy_comparison": accuracy_figure(numbers),
               "distillation_diagnostics": diagnostics_figure(entries),
               "reliability_diagram": reliability_figure(entries, labels),
               "class_changes": changes_figure(numbers),
               "gallery": gallery_figure(entries, labels, test)}
    confusion = {run: metrics.confusion_matrix(  # shares of each true class's images (rows)
        labels, group[0].predictions, labels=np.arange(numbers["dataset"]["num_classes"]),
        normalize="true") for run, group in entries.items()}
    order = class_order(sum(confusion.values()))
    for run, matrix in confusion.items():
        figures[f"confusion_matrix_{run}"] = confusion_figure(entries[run][0], matrix, order)
    for name, figure in figures.items():
        for kind, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            with utils.atomic_write(results / f"{name}.{kind}", "wb") as file:
                figure.savefig(file, format=kind, metadata=metadata)
        plt.close(figure)


def fonts_of(numbers):
    """DejaVu Sans, which matplotlib brings, and installed fonts with what it lacks of the names."""
    families, missing = ["DejaVu Sans"], set(json.dumps(numbers, ensure_ascii=False))
    fonts = [font for font in fontManager.ttflist if Path(font.fname).exists()]
    for font in sorted(fonts, key=lambda font: font.name not in families):
        known = {*map(chr, FT2Font(font.fname).get_charmap())} if missing else set()
        if missing & known and "Last Resort" not in font.name:  # has boxes for all there is
            families.append(font.name)
            missing -= known
    if missing:
        print(f"the figures have boxes, since no installed font has {''.join(sorted(missing))}")
        warnings.filterwarnings("ignore", "Glyph .* missing")
    return families


def draw(axis, group, column, scale=1, **style):
    """Draw a column of the history where it is not empty, a line a seed, the first labelled."""
    for entry in group:
        rows = [row for row in entry.history if row.get(column) is not None]
        if rows:
            values = [row[column] * scale for row in rows]
            axis.plot([row["epoch"] for row in rows], values, **{**style, "marker": None})
            style["label"] = None


def finish(axis, title, unit, **legend):
    axis.set(title=title, xlabel="epoch", ylabel=unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if axis.lines:
        axis.legend(**legend)


def curves_figure(entries):
    """Cross-entropy on training images and validation accuracy over the epochs, a line a seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for run, group in entries.items():
        draw(left, group, "ce_loss", **STYLES[run])
        draw(right, group, "val_accuracy", 100, **STYLES[run])
        for info in (entry.info for entry in group if entry.history):
            right.plot(info["epoch"], 100 * info["val_accuracy"], color=STYLES[run]["color"],
                       marker=STYLES[run]["marker"], fillstyle="none")  # hides none below
    finish(left, "Cross-entropy on training images, a line a seed", "cross-entropy (nats)")
    finish(right, "Validation accuracy; the mark is the epoch kept", "accuracy (%)")
    return figure


def diagnostics_figure(entries):
    """Why the teacher helped or not, on the training images as augmented, a line a seed."""
    figure, (parts, entropy, accuracy) = plt.subplots(1, 3, figsize=(12, 3.8))
    for run in STUDENTS:
        draw(entropy, entries[run], "entropy", **STYLES[run])
        draw(accuracy, entries[run], "train_accuracy", 100, **STYLES[run])
    distilled, info = entries["distilled"], entries["distilled"][0].info
    thin = {"color": "black", "linewidth": 0.8}
    if info.get("teacher"):  # --distilled-checkpoint may name a student that had none
        alpha, soft = info["config"]["alpha"], info["config"]["distillation_loss"]
        orange, grey = STYLES["distilled"]["color"], STYLES["teacher"]["color"]
        draw(parts, distilled, "distill_loss", alpha, color=orange, linestyle="-",
             label=f"{alpha:g} × soft part ({soft})")
        draw(parts, distilled, "ce_loss", 1 - alpha, color=orange, linestyle=":",
             label=f"{1 - alpha:.3g} × cross-entropy")
        draw(entropy, distilled, "target_entropy", color=grey, linestyle="-.",
             label="Soft targets, as the loss sees them")
        draw(entropy, distilled, "teacher_entropy", **STYLES["teacher"])
        draw(accuracy, distilled, "teacher_accuracy", 100, **STYLES["teacher"])
        accuracy.axhline(100 * info["teacher"]["val_accuracy"], **thin,
                         label="Teacher on validation images")
    entropy.axhline(np.log(info["num_classes"]), **thin, label=f"uniform, ln {info['num_classes']}")
    for axis, title, unit in (
            (parts, "Parts of the distilled student's loss", "as weighted in the loss"),
            (entropy, "Entropy of the predictions", "nats"), (accuracy, "Accuracy", "%")):
        axis.set_ylim(bottom=0)
        finish(axis, title, unit, fontsize="x-small", loc="upper center",
               bbox_to_anchor=(0.5, -0.2))
    figure.suptitle("On the training images as augmented, the students as they learned")
    return figure


def accuracy_figure(numbers):
    """Accuracies, ± the standard deviation over seeds, and the difference with its intervals."""
    comparison, dataset, seeds = numbers["comparison"], numbers["dataset"], numbers["seeds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for run, scores in numbers["models"].items():
        error = {"yerr": 100 * scores["sd"]["top1"], "capsize": 6} if scores["sd"] else {}
        bars = left.bar(run.capitalize(), 100 * scores["top1"], 0.6, color=STYLES[run]["color"],
                        **error)
        left.bar_label(bars, fmt="%.1f", padding=3)
    spread = ", ± deviation over seeds" if len(seeds) > 1 else ""
    left.set(ylabel=f"top-1 accuracy (%){spread}", ylim=(0, 109), title=f"{dataset['test_images']} "
             f"test images of {dataset['name']}, {dataset['num_classes']} classes")
    rows = list(zip([f"seed {seed}" for seed in seeds], comparison["difference_by_seed"],
                    comparison["interval_by_seed"], strict=True))
    if len(seeds) > 1:
        whole = comparison[f"interval_over_{comparison['rests_on']}"]
        rows.append(("together", comparison["difference"], whole))
    for y, (_, gain, (low, high)) in enumerate(rows):
        right.errorbar(100 * gain, y, xerr=[[100 * (gain - low)], [100 * (high - gain)]], capsize=6,
                       fmt="o", color="black" if y == len(rows) - 1 else "#999999")
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    right.set(ylim=(len(rows) - 0.5, -0.5), xlabel="points of accuracy, with 95 % intervals",
              title=f"Distilled minus baseline: {comparison['verdict']}")
    return figure


def reliability_figure(entries, labels):
    """Accuracy against confidence, seeds pooled; below the diagonal a model is too sure."""
    panels = {"As trained": {run: [entry.log_probs for entry in group]
                             for run, group in entries.items()}}
    scaled = {run: [log_softmax(entry.log_probs / entry.temperature, axis=1) for entry in group]
              for run, group in entries.items() if all(entry.temperature for entry in group)}
    if scaled:
        panels["Temperature fitted on validation images"] = scaled
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.4), squeeze=False)
    for axis, (title, answers) in zip(axes[0], panels.items(), strict=True):
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=1, label="perfectly calibrated")
        for run, seeds in answers.items():
            confidence, accuracy, counts = reliability(
                np.concatenate(seeds), np.tile(labels, len(seeds)))
            filled = counts >= 10  # the accuracy of fewer images is chance
            axis.plot(100 * confidence[filled], 100 * accuracy[filled], markersize=4, **STYLES[run])
        axis.set(title=title, xlabel="confidence (%)", ylabel="accuracy (%)",
                 xlim=(-1.5, 101.5), ylim=(-1.5, 101.5))
        axis.legend(loc="upper left")
    figure.suptitle("How often a model that is so sure is right, in bins of 10 images and more")
    return figure


def changes_figure(numbers):
    """Accuracy of every class with and without a teacher, in the order of the change."""
    before, after = (numbers["models"][run]["per_class_accuracy"] for run in STUDENTS)
    names = sorted(before, key=lambda name: after[name] - before[name])
    old, new = ([100 * values[name] for name in names] for values in (before, after))
    y, height = np.arange(len(names)), max(2.8, 0.8 + 0.135 * len(names))
    figure, axis = plt.subplots(figsize=(6.5, height))
    axis.hlines(y, old, new, color="#999999", linewidth=1)
    for run, values, size in (("baseline", old, 6.5), ("distilled", new, 3.5)):  # both show
        axis.plot(values, y, markersize=size, **{**STYLES[run], "linestyle": ""})
    axis.set_yticks(y, names, fontsize=9 if len(names) <= 20 else 6.5)
    each = numbers["dataset"]["test_images"] / len(names)
    axis.set(title=f"Accuracy by class, largest gain on top; one image is {100 / each:.1f} points",
             xlabel="accuracy (%)", xlim=(-2, 102), ylim=(-1, len(names)))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=2, frameon=False)
    return figure


def gallery_figure(entries, labels, test, most=8):
    """A random choice of the images that the distilled student corrects or newly gets wrong."""
    baseline, distilled = (entries[run][0] for run in STUDENTS)
    before, after, names = baseline.predictions, distilled.predictions, baseline.info["class_names"]
    found = {"corrected": np.flatnonzero((before != labels) & (after == labels)),
             "newly wrong": np.flatnonzero((before == labels) & (after != labels))}
    shown = [(change, i) for change, images in found.items() for i in
             np.random.default_rng(0).permutation(images)[:min(most, len(images) // 4 * 4 or 4)]]
    figure = plt.figure(figsize=(9, 0.4 + 2.3 * max(1, math.ceil(len(shown) / 4))))
    for place, (change, i) in enumerate(shown, 1):
        axis = figure.add_subplot(math.ceil(len(shown) / 4), 4, place)
        axis.axis("off")
        axis.imshow(data_loader.load_image(test, i))
        sure, newly_sure = (np.exp(entry.log_probs[i].max()) for entry in (baseline, distilled))
        axis.set_title(f"{change}: {names[labels[i]]!r}\nBaseline: {names[before[i]]!r} {sure:.0%}"
                       f"\nDistilled: {names[after[i]]!r} {newly_sure:.0%}", fontsize=8)
    counts = " and ".join(f"{len(images)} {change}" for change, images in found.items())
    figure.suptitle(f"Chosen by chance of the test images that the distilled student, seed "
                    f"{distilled.info['config']['seed']}, changes: {counts}", fontsize=10)
    return figure


def class_order(confusion):
    """The order of classes in a confusion matrix (C, C): their own up to 20, else one in which
    those that are taken for each other are neighbours (average linkage)."""
    if len(confusion) <= 20:
        return np.arange(len(confusion))
    alike = confusion + confusion.T
    distance = (1 - alike / alike.max())[np.triu_indices(len(alike), k=1)]
    return hierarchy.leaves_list(hierarchy.linkage(distance, "average", optimal_ordering=True))


def confusion_figure(entry, matrix, order):
    """A confusion matrix (C, C), classes in `order`; up to 20 of them with the numbers."""
    info, names = entry.info, np.array(entry.info["class_names"])[order]
    few, side = len(names) <= 20, max(5.0, 0.14 * len(names))
    title = f"{info['run'].capitalize()} ({info['model_name']}), one run: what is taken for what"
    figure, axis = plt.subplots(figsize=(side, side * 0.93))
    seaborn.heatmap(100 * matrix[np.ix_(order, order)], cmap="Blues", square=True, ax=axis,
                    norm=matplotlib.colors.PowerNorm(0.5, 0, 100),  # a few percent stay visible
                    annot=few, fmt=".0f", xticklabels=names, yticklabels=names,
                    linewidths=0 if few else 0.2, linecolor="#eeeeee",
                    cbar_kws={"label": "share of the true class (%)", "shrink": 0.7})
    axis.tick_params(labelsize=9 if few else 6.5, rotation=0)
    axis.tick_params(axis="x", rotation=0 if len("".join(names)) <= 30 else 90)
    axis.set_title(title if few else f"{title}; alike classes stand together",
                   fontsize=11 if few else 14)
    axis.set(xlabel="predicted class", ylabel="true class")
    return figure


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("evaluate", __doc__)))
