"""Draw results/length.png: accuracy of baseline and distilled student, and the gain, by the number
of epochs. It reads the reports that reports.sh makes.

    python results/example/length.py
"""
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

EPOCHS = (10, 25, 50)
LOSSES = {"kd": "kd, T = 4, α = 0.7", "lskd": "lskd, T = 2, α = 0.9"}
FOLDERS = {"kd": "results/length_kd_{}", "lskd": "results/length_{}"}  # {}: the number of epochs
COLORS = {"baseline": "#0072B2", "kd": "#E69F00", "lskd": "#009E73", "teacher": "#595959"}
MARKERS = {"baseline": "o", "kd": "s", "lskd": "D"}
SHIFTS = {"baseline": 0, "kd": -1, "lskd": 1}  # epochs, so that no marker hides another


def load_reports():
    """{loss: {epochs: the content of its comparison.json}}, of those that are there."""
    reports = {loss: {} for loss in LOSSES}
    for loss, folder in FOLDERS.items():
        for epochs in EPOCHS:
            path = Path(folder.format(epochs), "comparison.json")
            if path.is_file():
                reports[loss][epochs] = json.loads(path.read_text(encoding="utf-8"))
    return reports


def plot_accuracy(axis, reports):
    baseline = {}
    for loss, by_epochs in reports.items():
        distilled = {}
        for epochs, report in by_epochs.items():
            baseline[epochs] = 100 * report["models"]["baseline"]["top1"]
            distilled[epochs] = 100 * report["models"]["distilled"]["top1"]
            teacher = 100 * report["models"]["teacher"]["top1"]
        plot_points(axis, distilled, loss, f"distilled, {LOSSES[loss]}")
    plot_points(axis, baseline, "baseline", "baseline")
    axis.axhline(teacher, color=COLORS["teacher"], linestyle=":", label="teacher")
    axis.set(title="Accuracy", ylabel="test accuracy (%)")


def plot_points(axis, by_epochs, style, label):
    """Points joined by a line, which is interrupted at a number of epochs that was not trained."""
    shifted = [epochs + SHIFTS[style] for epochs in EPOCHS]
    values = [by_epochs.get(epochs, math.nan) for epochs in EPOCHS]
    axis.plot(shifted, values, linestyle="--", linewidth=0.8, color=COLORS[style],
              marker=MARKERS[style], markersize=4, label=label)


def plot_gain(axis, reports):
    for loss, by_epochs in reports.items():
        for epochs, report in by_epochs.items():
            gain = 100 * report["comparison"]["gain"]
            low, high = report["comparison"]["ci_over_images"]
            axis.errorbar(epochs + SHIFTS[loss], gain, [[gain - 100 * low], [100 * high - gain]],
                          color=COLORS[loss], marker=MARKERS[loss], markersize=4, capsize=3)
    axis.axhline(0, color="black", linewidth=1)
    axis.set(title="Gain over the baseline, 95 % CI over the test images",
             ylabel="percentage points")


if __name__ == "__main__":
    reports = load_reports()
    plt.rc("font", size=8)
    plt.rc("axes", titlesize=8)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    plot_accuracy(axes[0], reports)
    plot_gain(axes[1], reports)
    for axis in axes:
        axis.set_xticks(EPOCHS)
        axis.set_xlabel("epochs of the student (points shifted sideways)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    any_report = next(report for by_epochs in reports.values() for report in by_epochs.values())
    models = any_report["models"]
    seeds = any_report["seeds"]
    seeds_text = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    figure.suptitle(f"{models['teacher']['model_name']} → {models['distilled']['model_name']}, "
                    f"{any_report['dataset']['name']}, {seeds_text}", fontsize=9)
    figure.savefig("results/length.png", dpi=200)
