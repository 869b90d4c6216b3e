"""Compare the baseline with the distilled student on the test images: report, numbers, figures.

    python evaluate.py            # the two students in checkpoints/
    python evaluate.py --quick    # those of the small run

Dataset, split, image size and crop are the checkpoints' own. Writes into results/: comparison_report.txt for people,
comparison.json and predictions.npz for programs, and every figure as PNG and PDF.
"""
import json
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn
import torch
from scipy.cluster import hierarchy
from sklearn import metrics

import data_loader
import models
import utils

matplotlib.use("Agg")  # no window, also without a display
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

SCRIPTS = {"baseline": "train_baseline.py", "distilled": "train_distillation.py"}
LABELS = {"baseline": "Baseline", "distilled": "Distilled", "teacher": "Teacher"}
COLOURS = {"baseline": "#0072B2", "distilled": "#E69F00", "teacher": "#595959"}  # Okabe-Ito: tell apart in grey too
HATCHES = {"baseline": "", "distilled": "//", "teacher": ".."}
WIDTH = 100  # columns of the report


# Loading and inference ------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """A model of the comparison: its checkpoint and what it says on the test images."""
    path: Path
    model: torch.nn.Module
    info: dict
    probabilities: np.ndarray  # (N, C) float32
    history: list              # rows of its training, [] where its last.pth is gone


def main():
    args = utils.parse_args("evaluate", __doc__)
    device = utils.setup(args)
    paths = find_checkpoints(args)
    loaded = {run: models.load_model(path, device) for run, path in paths.items()}
    infos = {run: info for run, (_, info) in loaded.items()}
    check_comparable(infos, paths)
    teacher_path, missing_teacher = find_teacher(infos["distilled"])
    if teacher_path:
        paths["teacher"], loaded["teacher"] = teacher_path, models.load_model(teacher_path, device)

    test = open_test_images(infos["distilled"], args)
    entries = {}
    for run, (model, info) in loaded.items():
        logits, labels = utils.infer(model, data_loader.evaluation_loader(test, info, args, device))
        entries[run] = Entry(paths[run], model, info, logits.double().softmax(1).float().numpy(), read_history(paths[run]))
    labels = labels.numpy()

    class_names = infos["baseline"]["class_names"]
    comparison = compare(entries, labels, class_names)
    comparison["unfair"] = differences(infos["baseline"], infos["distilled"])
    comparison["missing_teacher"] = missing_teacher
    comparison["timings"] = {"device": str(device), **time_models(entries, device), **training_times(entries)}

    results = Path(args.results_dir)
    with utils.write_into_place(results / "predictions.npz", "wb") as file:
        np.savez_compressed(file, labels=labels, class_names=np.array(class_names),
                            **{run: entry.probabilities for run, entry in entries.items()})
    with utils.write_into_place(results / "comparison.json") as file:
        json.dump(comparison, file, indent=1, ensure_ascii=False)
    report = write_report(comparison)
    with utils.write_into_place(results / "comparison_report.txt") as file:
        file.write(report)
    draw_figures(entries, labels, class_names, comparison, results)
    print(report)
    utils.choose_best(args, infos["distilled"])
    print(f"report, numbers and figures are in {results}")


def find_checkpoints(args):
    """Paths of the two students' best weights. Raises UserError with the command that makes a missing one."""
    paths = {}
    for run, script in SCRIPTS.items():
        paths[run] = Path(getattr(args, f"{run}_checkpoint") or utils.run_folder(run, args) / "best_model.pth")
        if not paths[run].is_file():
            raise utils.UserError(f"there is no {paths[run]}; make it with: python {script}{' --quick' if args.quick else ''}")
    return paths


def check_comparable(infos, paths):
    baseline, distilled = infos["baseline"], infos["distilled"]
    if baseline["dataset"] != distilled["dataset"] or baseline["class_names"] != distilled["class_names"]:
        raise utils.UserError(
            f"{paths['baseline']} and {paths['distilled']} cannot be compared: they tell apart other classes "
            f"({baseline['dataset']}, {baseline['num_classes']}; {distilled['dataset']}, {distilled['num_classes']})")


def find_teacher(info):
    """(path of the teacher recorded in the distilled student's `info`, None), or (None, why there is none)."""
    teacher = info.get("teacher")
    if not teacher:
        return None, "the distilled checkpoint names no teacher"
    path = Path(teacher["path"])
    if not path.is_file():
        return None, f"the teacher {path} is gone"
    if utils.sha256(path) != teacher["sha256"]:
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


def read_history(path):
    last = path.with_name("last.pth")
    return utils.load_file(last)["progress"]["history"] if last.is_file() else []


# Numbers --------------------------------------------------------------------------------------------------------

def compare(entries, labels, class_names):
    """Every number of the report but the timings, under the names that the README documents."""
    first = entries["baseline"].info
    numbers = {
        "dataset": {"name": first["dataset"], "num_classes": len(class_names), "test_images": len(labels)},
        "models": {run: measure(entry, labels, class_names) for run, entry in entries.items()},
    }
    top1 = {run: model["top1"] for run, model in numbers["models"].items()}
    numbers["comparison"] = {"difference": top1["distilled"] - top1["baseline"]}
    numbers["teacher_worth_hearing"] = top1["teacher"] > top1["baseline"] if "teacher" in top1 else None
    return numbers


def measure(entry, labels, class_names):
    """What one model's `entry` scores on the test images with `labels` (N,): fractions, and the loss in nats."""
    probabilities, info = entry.probabilities.astype(np.float64), entry.info
    predictions, classes = probabilities.argmax(1), np.arange(len(class_names))
    counts = metrics.confusion_matrix(labels, predictions, labels=classes)
    per_class = counts.diagonal() / counts.sum(1).clip(min=1)
    return {
        "model_name": info["model_name"], "epoch": info["epoch"], "val_accuracy": info["val_accuracy"],
        "image_size": info["image_size"],
        "top1": metrics.accuracy_score(labels, predictions),
        "top5": float(metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)) if len(classes) > 5 else 1.0,
        "macro_f1": metrics.f1_score(labels, predictions, labels=classes, average="macro", zero_division=0),
        "loss": float(-np.log(probabilities[np.arange(len(labels)), labels].clip(min=1e-45)).mean()),
        "per_class_accuracy": dict(zip(class_names, per_class.tolist())),
        "parameters": sum(parameter.numel() for parameter in entry.model.parameters()),
        "file_size_mb": round(entry.path.stat().st_size / 2**20, 2),
    }


def differences(baseline, distilled):
    """What differs between the two runs besides the teacher, one phrase each: [] is a fair pair."""
    ours, theirs = baseline["config"], distilled["config"]
    shared = (ours.keys() & theirs.keys()) - utils.NEUTRAL
    odd = [f"{name} ({ours[name]} and {theirs[name]})" for name in sorted(shared) if ours[name] != theirs[name]]
    if baseline["split_fingerprint"] != distilled["split_fingerprint"]:
        odd.append("the validation split")
    return odd


@torch.inference_mode()
def time_models(entries, device, seconds=6):
    """Latency at batch 1 (ms) and throughput at batch 64 (images/s) of each model at its own size, medians.

    The models take turns, so that a machine that slows down slows them all; at least five rounds.
    """
    def clock(model, images):
        start = time.perf_counter()
        utils.forward(model, images).cpu()  # waits for the device
        return time.perf_counter() - start

    timings = {}
    for batch, name in ((1, "latency_ms"), (64, "throughput")):
        inputs = {run: torch.rand(batch, 3, entry.info["image_size"], entry.info["image_size"], device=device)
                  .contiguous(memory_format=torch.channels_last) for run, entry in entries.items()}
        taken, end = {run: [] for run in entries}, time.perf_counter() + seconds / 2
        for run, entry in entries.items():
            clock(entry.model, inputs[run])
        while len(taken["baseline"]) < 5 or time.perf_counter() < end and len(taken["baseline"]) < 200:
            for run, entry in entries.items():
                taken[run].append(clock(entry.model, inputs[run]))
        timings[name] = {run: statistics.median(values) * 1000 if batch == 1 else batch / statistics.median(values)
                         for run, values in taken.items()}
    return timings


def training_times(entries):
    """Hours each model took to train; the distilled student's without its teacher's, which stand beside them."""
    return {"training_hours": {run: sum(row["seconds"] for row in entry.history) / 3600 if entry.history else None
                               for run, entry in entries.items()}}


# Report ---------------------------------------------------------------------------------------------------------

def write_report(numbers):
    """The comparison as text of at most 100 columns."""
    table, timings = numbers["models"], numbers["timings"]
    runs, dataset = list(table), numbers["dataset"]
    names = {run: table[run]["model_name"] for run in runs}
    taught_by = f"taught by {names['teacher']}" if "teacher" in names else "distilled"
    lines = [f"{names['baseline']} alone against {names['distilled']} {taught_by}",
             f"{dataset['name']}: {dataset['test_images']} test images of {dataset['num_classes']} classes", ""]
    lines += warnings(numbers)
    difference = 100 * numbers["comparison"]["difference"]
    lines += paragraph(f"The distilled student is {abs(difference):.2f} points {'above' if difference >= 0 else 'below'} "
                       "the baseline in top-1 accuracy.") + [""]

    def row(title, pattern, values):
        cells = [pattern.format(values[run]) if values[run] is not None else "not known" for run in runs]
        lines.append(f"{title:<40}" + "".join(f"{cell:>18}" for cell in cells))

    def column(key):
        return {run: table[run][key] for run in runs}

    row("", "{}", LABELS)
    row("model", "{}", names)
    row("top-1 accuracy", "{:.2%}", column("top1"))
    row("top-5 accuracy", "{:.2%}", column("top5"))
    row("macro-F1", "{:.4f}", column("macro_f1"))
    row("cross-entropy (nats)", "{:.4f}", column("loss"))
    row("validation accuracy", "{:.2%}", column("val_accuracy"))
    row("best epoch", "{}", column("epoch"))
    row("image size (px)", "{}", column("image_size"))
    row("parameters (millions)", "{:.2f}", {run: table[run]["parameters"] / 1e6 for run in runs})
    row("file (MB)", "{:.1f}", column("file_size_mb"))
    row("latency, batch 1 (ms)", "{:.2f}", timings["latency_ms"])
    row("throughput, batch 64 (images/s)", "{:.0f}", timings["throughput"])
    hours = timings["training_hours"]
    row("training time (h)", "{:.2f}", hours)
    lines += [""] + paragraph(cost(hours)) + [""] + per_class_lines(table)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def warnings(numbers):
    found = [f"The pair is not fair, these differ: {text}." for text in ["; ".join(numbers["unfair"])] if text]
    if numbers["missing_teacher"]:
        found.append(f"No column for the teacher: {numbers['missing_teacher']}.")
    if numbers["teacher_worth_hearing"] is False:
        found.append("The teacher is no better than the baseline on these images; expect little from it.")
    return [line for text in found for line in paragraph("WARNING: " + text)] + [""] * bool(found)


def cost(hours):
    if None in hours.values() or "teacher" not in hours:
        return "What training cost is not known for every model: a last.pth is gone."
    total = hours["distilled"] + hours["teacher"]
    return (f"Cost: {utils.duration(3600 * hours['baseline'])} of training for the baseline, "
            f"{utils.duration(3600 * total)} for the distilled student, the teacher's "
            f"{utils.duration(3600 * hours['teacher'])} included ({total / hours['baseline']:.1f} times as long).")


def paragraph(text):
    return textwrap.wrap(text, WIDTH, break_long_words=False)


def per_class_lines(table):
    """Accuracy of every class for both students, and what distillation changed, most gained first."""
    before, after = table["baseline"]["per_class_accuracy"], table["distilled"]["per_class_accuracy"]
    lines = ["Accuracy by class, largest gain first", f"{'':<40}{'Baseline':>18}{'Distilled':>18}{'points':>18}"]
    for name in sorted(before, key=lambda name: (before[name] - after[name], name)):
        lines.append(f"{textwrap.shorten(name, 38):<40}{before[name]:>18.1%}{after[name]:>18.1%}"
                     f"{100 * (after[name] - before[name]):>+18.1f}")
    return lines


# Figures --------------------------------------------------------------------------------------------------------

def draw_figures(entries, labels, class_names, numbers, results):
    """Write every figure as PNG (200 dpi) and PDF into `results`."""
    seaborn.set_theme(style="whitegrid", context="paper")
    for name, figure in (
            ("training_curves", curves_figure(entries)),
            ("accuracy_comparison", accuracy_figure(numbers)),
            *((f"confusion_matrix_{run}", figure) for run, figure in confusion_figures(entries, labels, class_names))):
        for kind in ("png", "pdf"):
            with utils.write_into_place(results / f"{name}.{kind}", "wb") as file:
                figure.savefig(file, format=kind, dpi=200, bbox_inches="tight",
                               metadata={"CreationDate": None} if kind == "pdf" else None)
        plt.close(figure)


def curves_figure(entries):
    """Training loss and validation accuracy over the epochs, with the epoch that was kept."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for run, entry in entries.items():
        if entry.history:
            epochs = [row["epoch"] for row in entry.history]
            style = dict(color=COLOURS[run], linestyle={"teacher": ":", "baseline": "-"}.get(run, "--"), label=LABELS[run])
            left.plot(epochs, [row["ce_loss"] for row in entry.history], **style)
            right.plot(epochs, [100 * row["val_accuracy"] for row in entry.history], **style)
            right.plot(entry.info["epoch"], 100 * entry.info["val_accuracy"], "o", color=COLOURS[run])
    left.set(title="Cross-entropy on training images", xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set(title="Validation accuracy (dot: the epoch kept)", xlabel="epoch", ylabel="accuracy (%)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return figure


def accuracy_figure(numbers):
    """Top-1, top-5 and macro-F1 side by side."""
    table, scores = numbers["models"], {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1"}
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    width = 0.8 / len(table)
    for i, run in enumerate(table):
        bars = axis.bar(np.arange(3) + (i - (len(table) - 1) / 2) * width, [100 * table[run][key] for key in scores], width,
                        color=COLOURS[run], hatch=HATCHES[run], edgecolor="white", label=LABELS[run])
        axis.bar_label(bars, fmt="%.1f", padding=2)
    axis.set_xticks(range(3), scores.values())
    axis.set(title=f"Scores on {numbers['dataset']['test_images']} test images of {numbers['dataset']['name']}",
             ylabel="score (%)", ylim=(0, 108))
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    return figure


def confusion_figures(entries, labels, class_names):
    """(run, figure) of each model's confusion matrix; beyond 20 classes alike ones stand together, in one order for all."""
    count = len(class_names)
    classes = np.arange(count)
    matrices = {run: metrics.confusion_matrix(labels, entry.probabilities.argmax(1), labels=classes, normalize="true")
                for run, entry in entries.items()}
    order = similarity_order(sum(matrices.values())) if count > 20 else classes
    names, side = [class_names[i] for i in order], max(5.0, 0.14 * count)
    for run, matrix in matrices.items():
        figure, axis = plt.subplots(figsize=(side, side * 0.93), layout="constrained")
        seaborn.heatmap(100 * matrix[np.ix_(order, order)], vmin=0, vmax=100, cmap="viridis" if count > 20 else "Blues", square=True, ax=axis,
                        annot=count <= 20, fmt=".0f", xticklabels=names, yticklabels=names,
                        cbar_kws={"label": "share of the true class (%)", "shrink": 0.7})
        axis.tick_params(labelsize=9 if count <= 20 else 6.5, rotation=0)
        axis.tick_params(axis="x", rotation=90 if count > 10 or max(map(len, names)) > 3 else 0)
        axis.set(title=f"{LABELS[run]} ({entries[run].info['model_name']}): what each class is taken for",
                 xlabel="predicted class", ylabel="true class")
        yield run, figure


def similarity_order(confusion):
    """Order of the classes in which those that are taken for each other are neighbours (average linkage)."""
    alike = confusion + confusion.T
    distance = 1 - alike / alike.max()
    condensed = distance[np.triu_indices(len(alike), k=1)]
    return hierarchy.leaves_list(hierarchy.linkage(condensed, "average", optimal_ordering=True))


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
