"""Try temperatures and weights of the distillation loss on a few epochs each, and rank them by
validation accuracy.

    python results/example/search.py --teacher-checkpoint TEACHER ...

It passes its flags on to train_distillation.py. Interrupted, the same command resumes the search.
"""
import csv
import subprocess
import sys
from pathlib import Path

TEMPERATURES = (2, 4, 8)
ALPHAS = (0.7, 0.9)
NUM_EPOCHS = 2
NAME = "search"  # folder below checkpoints/ and results/; give each distillation loss its own

PROJECT = Path(__file__).resolve().parents[2]


def train(temperature, alpha, flags):
    folder = f"{NAME}/T{temperature}_alpha{alpha}"
    command = [sys.executable, PROJECT / "train_distillation.py", "--num-epochs", NUM_EPOCHS,
               "--temperature", temperature, "--alpha", alpha,
               "--checkpoint-dir", f"checkpoints/{folder}", "--results-dir", f"results/{folder}",
               *flags]
    subprocess.run([str(word) for word in command], check=True)


def best_val_accuracy(history):
    with open(history, encoding="utf-8") as file:
        return max(float(row["val_accuracy"]) for row in csv.DictReader(file))


if __name__ == "__main__":
    for temperature in TEMPERATURES:
        for alpha in ALPHAS:
            train(temperature, alpha, flags=sys.argv[1:])

    histories = Path("results", NAME).rglob("distilled_history.csv")
    for history in sorted(histories, key=best_val_accuracy, reverse=True):
        print(f"{best_val_accuracy(history):.2%}  {history.parent}")
