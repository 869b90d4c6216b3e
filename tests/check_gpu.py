"""Check this project on an NVIDIA GPU, in ten minutes, and print a table to paste into an issue.

    python tests/check_gpu.py                  # EfficientNet-B0, B2 as teacher, 224 px
    python tests/check_gpu.py --minutes 5      # ends in time; the table says what was cut off
    python tests/check_gpu.py --dry-run        # every stage with tiny models, on the CPU

Each stage is a process of its own and has a share of the minutes; what it does not use goes to the
next ones. So a stage that hangs or fails costs no more than its share. Results are written to --out
as they come: results.jsonl, table.md, and log.txt with everything that the stages print. Nothing is
downloaded: the images are synthetic, in CIFAR's shape, and the weights are random.
"""
# ruff: noqa: E402
import time

START = time.monotonic()  # here, since the imports take seconds of the minutes

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity

import benchmark_training
import config
import models
import train_baseline
import train_distillation
import utils

ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES = 100
LAST_SECONDS = 10  # kept back for ending the last stage
KILL_SECONDS = 5   # a process that hangs in the driver may not die at all
TOLERANCE = 0.02   # share of a loss by which CUDA graphs may differ where eager runs do not

SHARES = {  # of the minutes, as parts of their sum
    "facts": 2,
    "tests": 8,      # those marked cuda
    "same_bits": 4,  # what --deterministic promises
    "agreement": 3,  # of losses with CUDA graphs and without
    "speed": 15,     # and peak memory, of all loops; share of the time in which the GPU computes
}
MEMORY_LIMITS = {"baseline": "1.5", "distillation": "2.5", "teacher": "4 to 5"}  # GB, smaller batch

GRAPH = "default"
EAGER = "--no-cuda-graph"
CEILING = "ceiling"
PLAIN = "plain loop"
COLUMNS = (GRAPH, EAGER, CEILING, PLAIN)
ABOVE = "above the table"


# What is measured ---------------------------------------------------------------------------------

class Measurement(NamedTuple):
    """`function(args, *arguments)` returns a text for each of `rows` of the table in `column`."""
    stage: str
    rows: list
    column: str
    function: callable
    arguments: tuple = ()


def plan(args):
    """All measurements, in the order of the table."""
    small, large = args.batches
    loops = [("baseline", small), ("distillation", small),
             ("teacher", small),  # its own fine-tuning; the larger batch would not fit into 6 GB
             ("baseline", large), ("distillation", large)]

    measurements = [Measurement("facts", ["facts"], ABOVE, facts),
                    Measurement("tests", ["tests marked cuda"], GRAPH, cuda_tests)]

    promises = ["two deterministic runs", "interrupted and resumed", "alpha 0 and baseline"]
    for column in (EAGER, GRAPH):  # a failed capture may leave CUDA unusable
        measurements.append(Measurement("same_bits", promises, column, same_bits, (column,)))

    for loop in ("baseline", "distillation"):
        row = f"{loop}: largest difference of a loss"
        measurements.append(Measurement("agreement", [row], GRAPH, agreement, (loop,)))

    # All speeds in one process: on an H200, cuDNN's autotuning takes 20 to 50 s in each. First
    # without graphs, since a failed capture may leave CUDA unusable; the peers and the profiles
    # last, in case the time runs out.
    for column in (EAGER, GRAPH):
        for loop, batch in loops:
            rows = [f"{loop}, batch {batch}: images/s", f"{loop}, batch {batch}: peak GB"]
            if batch == small:
                rows[1] += f", limit {MEMORY_LIMITS[loop]}"
            measurements.append(Measurement("speed", rows, column, speed_and_memory,
                                            (loop, batch, column)))
    for column, speed in ((CEILING, ceiling_speed), (PLAIN, plain_speed)):
        for loop, batch in loops:
            if loop != "teacher":
                row = f"{loop}, batch {batch}: images/s"
                measurements.append(Measurement("speed", [row], column, speed, (loop, batch)))
    for loop in ("baseline", "distillation"):
        for column in (EAGER, GRAPH):
            row = f"{loop}, batch {small}: GPU busy"
            measurements.append(Measurement("speed", [row], column, busy_share, (loop, column)))
    return measurements


def facts(args):
    versions = utils.versions(torch.device(args.device))
    texts = [versions.pop("device"), *(f"{name} {text}" for name, text in versions.items()),
             platform.platform()]
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        texts.append(f"{card.total_memory / 1e9:.1f} GB, capability {card.major}.{card.minor}, "
                     f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for command in ("nvidia-smi --query-gpu=driver_version --format=csv,noheader",
                    "git rev-parse --short HEAD"):
        program, *_ = words = command.split()
        if not shutil.which(program):
            continue
        with contextlib.suppress(subprocess.SubprocessError):  # no driver, no repository, no answer
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=5,
                                  check=True)
            texts.append(f"{program} {utils.first_line(done.stdout)}")
    return ["; ".join(texts)]


def cuda_tests(args):
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}

    def counts():
        return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())

    class CountOutcomes:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or not report.passed:
                outcomes[report.outcome] += 1
                # Replaced by the next one; the last stands if this stage is cut off.
                record(args, "tests marked cuda", GRAPH, f"{counts()}, not all run")
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = crash.message if crash else report.longrepr
                record(args, f"failed: {report.nodeid}", ABOVE, utils.first_line(reason))

    status = pytest.main([str(ROOT / "tests"), "-m", "cuda", "-v", "-p", "no:cacheprovider",
                          "--continue-on-collection-errors"], plugins=[CountOutcomes()])
    return [f"{counts()} ({pytest.ExitCode(status).name})"]


def same_bits(args, column):
    batch = args.batches[0]
    flags = ["--deterministic", *graph_flags(column)]
    first = train(args, "baseline", batch, *flags)
    second = train(args, "baseline", batch, *flags)
    resumed = interrupt_and_resume(args, batch, *flags)
    alpha_0 = train(args, "distillation", batch, *flags, "--alpha", "0")
    return [compare_weights(first, other) for other in (second, resumed, alpha_0)]


def interrupt_and_resume(args, batch, *flags):
    """The outcome of a run that was interrupted in its second epoch, and resumed."""
    steps_per_epoch = args.images // batch
    folder = tempfile.mkdtemp(dir=args.work)
    step_numbers = itertools.count(1)

    def interrupt(loss):
        if next(step_numbers) == steps_per_epoch + 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(args, "baseline", batch, *flags, folder=folder, on_step=interrupt)

    losses = []
    last = train(args, "baseline", batch, *flags, folder=folder, on_step=losses.append)
    assert len(losses) == steps_per_epoch, "it did not resume after the first epoch"
    return last


def compare_weights(one, other):
    """Whether two runs (their last.pth) have the same weights, and the same EMA weights."""
    largest = 0.0
    is_same = True
    for part in ("model", "ema"):
        for name, tensor in one["states"][part].items():
            other_tensor = other["states"][part][name]
            is_same = is_same and torch.equal(tensor, other_tensor)
            largest = max(largest, (tensor - other_tensor).abs().max().item())
    return "same bits" if is_same else f"DIFFER by {largest:.1e}"


def agreement(args, loop):
    """CUDA graphs against an eager run, and beside it the noise between two eager runs."""
    eager = losses_of_run(args, loop, EAGER)
    noise = largest_difference(eager, losses_of_run(args, loop, EAGER))
    difference = largest_difference(eager, losses_of_run(args, loop, GRAPH))
    verdict = "agrees" if difference <= max(TOLERANCE, 5 * noise) else "DIFFERS"
    return [f"{verdict}: {difference:.1e}, between two eager runs {noise:.1e}"]


def losses_of_run(args, loop, column):
    """The loss of every step, and last that of the EMA weights on validation images."""
    losses = []
    last = train(args, loop, args.batches[0], *graph_flags(column),
                 on_step=lambda loss: losses.append(loss.clone()))
    return torch.tensor([*losses, last["history"][-1]["val_loss"]])


def largest_difference(losses, other_losses):
    return ((losses - other_losses).abs() / losses).max().item()


def speed_and_memory(args, loop, batch, column):
    # Earlier measurements of this process leave something behind, a cuBLAS workspace for each
    # stream of a capture. A user's run begins without, except for one workspace, some MB.
    left_behind = torch.cuda.memory_reserved()
    # The first epoch includes the autotuning, which takes time and memory.
    epoch = train(args, loop, batch, *graph_flags(column))["history"][1]
    speed = f"{epoch['images_per_second']:.0f}"
    if args.device == "cpu":
        return [speed, "not measured on CPUs"]
    peak = epoch["peak_memory_mb"] * 2**20 - left_behind
    return [speed, f"{peak / 1e9:.2f}"]


def ceiling_speed(args, loop, batch):
    """The same steps on one batch that is already there, as one CUDA graph."""
    settings, device = benchmark_settings(args, batch)
    run = benchmark_training.ceiling_loop(settings, device, loop == "distillation")
    run()
    return [f"{statistics.median(run() for _ in range(3)):.0f}"]


def plain_speed(args, loop, batch):
    """The loop people write."""
    settings, device = benchmark_settings(args, batch)
    pixels, labels = synthetic_images(args.images)
    run = benchmark_training.plain_loop(settings, device, pixels, labels, args.workers)
    run(loop == "distillation")
    return [f"{run(loop == 'distillation'):.0f}"]


def benchmark_settings(args, batch):
    """What the loops of benchmark_training.py read, and the device."""
    settings = argparse.Namespace(
        model=args.model, teacher=args.teacher, image_size=args.image_size, batch_size=batch,
        steps=args.images // batch, device=args.device, amp_dtype="auto", cuda_graph=False,
        deterministic=False)
    return settings, utils.setup(settings)


def busy_share(args, loop, column):
    """Time of the kernels in some steps of the third epoch, by torch's profiler, as a share of what
    a step takes in the second epoch, before the profiler starts: it slows down what comes after."""
    batch = args.batches[0]
    steps_per_epoch = args.images // batch
    profiled_steps = steps_per_epoch // 5
    schedule = torch.profiler.schedule(
        wait=steps_per_epoch // 2, warmup=1, active=profiled_steps, repeat=1)
    activities = [ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step_numbers = itertools.count(1)

    def advance(loss):
        if next(step_numbers) > 2 * steps_per_epoch:
            loss.item()  # waits for the GPU, or kernels of earlier steps would be counted too
            profiler.step()

    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        history = train(args, loop, batch, *graph_flags(column), "--num-epochs", "3",
                        on_step=advance)["history"]

    events = profiler.key_averages()
    print(events.table(sort_by="self_device_time_total", row_limit=20))
    kernel_ms = 0.0
    num_kernels = 0.0
    for event in events:
        is_label = event.is_user_annotation or event.key.startswith(("Optimizer.", "ProfilerStep"))
        if event.device_type.name == activities[-1].name and not is_label:
            kernel_ms += event.self_device_time_total / 1000 / profiled_steps
            num_kernels += event.count / profiled_steps
    step_ms = 1000 * batch / history[1]["images_per_second"]
    return [f"{kernel_ms / step_ms:.0%} of {step_ms:.1f} ms, {num_kernels:.0f} kernels"]


# The project's loops ------------------------------------------------------------------------------

def train(args, loop, batch, *flags, on_step=None, folder=None):
    """Train two epochs as the scripts do, from fixed weights; return the content of last.pth.

    `flags` override the settings, such as --num-epochs. `on_step` is called with the loss of each
    step, a 0-d tensor on the device. A previous run in `folder` is resumed.
    """
    folder = folder or tempfile.mkdtemp(dir=args.work)
    run_args = parse_settings(args, loop, batch, folder, flags)
    device = utils.setup(run_args)
    name = args.model
    if loop == "teacher":
        run_args = train_distillation.teacher_args(run_args)
        name = args.teacher
    data = benchmark_training.made_up(*synthetic_images(args.images))

    torch.manual_seed(0)
    model = models.build_model(name, NUM_CLASSES).to(device)
    info = models.build_info("distilled" if loop == "distillation" else loop, model, name, data,
                             run_args)
    with mock.patch.object(utils.EpochMetrics, "add", add_and_call(on_step)):
        if loop == "distillation":
            teacher = models.build_model(args.teacher, NUM_CLASSES)
            teacher = models.freeze_teacher(teacher, args.image_size,
                                            utils.DTYPES[run_args.amp_dtype]).to(device)
            info["teacher"] = {"sha256": ""}
            best_path = train_distillation.train(model, teacher, info, data, run_args)
        else:
            best_path = train_baseline.train(model, info, data, run_args)

    last = utils.load_checkpoint(best_path.with_name("last.pth"))
    shutil.rmtree(folder)
    return last


def parse_settings(args, loop, batch, folder, flags):
    """The settings as the scripts parse them, with the defaults of config.py, EMA among them."""
    words = ["--device", args.device, "--student-model", args.model, "--no-pretrained",
             "--image-size", args.image_size, "--batch-size", batch, "--num-epochs", 2,
             "--checkpoint-dir", folder, "--results-dir", folder, *flags]
    script = "baseline"
    if loop != "baseline":
        script = "distillation"
        words += ["--teacher-model", args.teacher, "--teacher-epochs", 2]
    return config.parse_args(script, "", [str(word) for word in words])


def graph_flags(column):
    """The flags of a column: --no-cuda-graph, or none. CPUs do without CUDA graphs in any case."""
    return [EAGER] if column == EAGER else []


def synthetic_images(count):
    """Pixels (N, 32, 32, 3) uint8 and labels (N,): noise with a tint for each class, so that there
    is something to learn."""
    random = np.random.default_rng(0)
    labels = random.integers(0, NUM_CLASSES, count)
    tints = random.integers(0, 128, (NUM_CLASSES, 1, 1, 3), dtype=np.uint8)
    noise = random.integers(0, 128, (count, 32, 32, 3), dtype=np.uint8)
    return noise + tints[labels], labels


def add_and_call(on_step):
    """EpochMetrics.add, which the loops call at the end of a step, with a call of `on_step`."""
    original_add = utils.EpochMetrics.add

    def add(metrics, **values):
        original_add(metrics, **values)
        if on_step and "train_loss" in values:
            on_step(values["train_loss"].detach())
    return add


# Stages and the table -----------------------------------------------------------------------------

def run_measurements(args):
    """What the process of a stage does."""
    for measurement in plan(args):
        if measurement.stage != args.stage:
            continue
        try:
            texts = measurement.function(args, *measurement.arguments)
        except (Exception, SystemExit) as error:  # SystemExit: settings that do not fit
            traceback.print_exc()
            reason = f"FAILED: {type(error).__name__}: {utils.first_line(error)}"
            texts = [reason.replace("|", "/")] * len(measurement.rows)  # "|" would end the cell
        for row, text in zip(measurement.rows, texts, strict=True):
            record(args, row, measurement.column, text)

        # What stays allocated would count in the peak of the next one.
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after a failure CUDA may be unusable
            torch.cuda.empty_cache()
        print(f"still allocated: {torch.cuda.memory_allocated() / 1e6:.0f} MB")


def record(args, row, column, text):
    """Write a cell of the table, at once."""
    with open(args.out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"row": row, "column": column, "text": text}) + "\n")
    print(f"{row}, {column}: {text}", flush=True)


def table(args):
    """The results so far, in Markdown."""
    lines = []
    texts = {}
    for line in (args.out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        texts[cell["row"], cell["column"]] = cell["text"]
        if cell["column"] == ABOVE:
            lines.append(f"- {cell['row']}: {cell['text']}")

    rows = {}
    for measurement in plan(args):
        for row in measurement.rows:
            text = texts.get((row, measurement.column), "MISSING")
            rows.setdefault(row, {})[measurement.column] = text

    lines += ["", f"| | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for row, cells in rows.items():
        if ABOVE not in cells:
            line = " | ".join(cells.get(column, "") for column in COLUMNS)
            lines.append(f"| {row} | {line} |")
    return "\n".join(lines) + "\n"


def run_stage(args, stage, seconds):
    """Run a stage as a process for so many seconds at most; return how it ended."""
    command = [sys.executable, __file__, "--stage", stage, "--out", str(args.out)]
    if args.dry_run:
        command.append("--dry-run")
    with open(args.out / "log.txt", "a", encoding="utf-8") as log:
        return run_limited(command, seconds, log)


def run_limited(command, seconds, log):
    environment = {**os.environ, "PYTHONUTF8": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                               stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(max(0, seconds))
    except subprocess.TimeoutExpired:
        return "CUT OFF"
    finally:
        if process.returncode is None:  # on Ctrl-C too
            kill_with_children(process)
    return "ended" if status == 0 else "FAILED"


def kill_with_children(process):
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def share_of(stage, remaining):
    """Seconds that a stage may take, of those that remain for it and the stages after it."""
    stages = list(SHARES)
    following = stages[stages.index(stage):]
    return remaining * SHARES[stage] / sum(SHARES[name] for name in following)


# Command line -------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10,
                        help="time limit of the whole check (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "check_gpu",
                        help="folder for the results (default: results/check_gpu)")
    parser.add_argument("--dry-run", action="store_true",
                        help="run every stage with tiny models, on the CPU")
    parser.add_argument("--stage", choices=SHARES,
                        help="run only this stage, in this process")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.work = args.out / "checkpoints"

    if args.dry_run:
        sizes = {"device": "cpu", "model": "test_efficientnet", "teacher": "test_resnet",
                 "image_size": 32, "batches": (4, 8), "images": 32, "workers": 0}
    else:
        sizes = {"device": "cuda", "model": "efficientnet_b0", "teacher": "efficientnet_b2",
                 "image_size": 224, "batches": (16, 64), "images": 1600,
                 "workers": min(8, os.cpu_count())}
    vars(args).update(sizes)
    return args


def main():
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no NVIDIA GPU here; --dry-run tries every stage on the CPU")

    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage:
        run_measurements(args)
        return

    for name in ("results.jsonl", "table.md", "log.txt"):
        (args.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the stage under way too
    end = START + 60 * args.minutes - LAST_SECONDS

    for stage in SHARES:
        start = time.monotonic()
        outcome = run_stage(args, stage, share_of(stage, end - start))
        record(args, f"stage {stage}", ABOVE, f"{outcome}, {time.monotonic() - start:.0f} s")
        (args.out / "table.md").write_text(table(args), encoding="utf-8")

    shutil.rmtree(args.work, ignore_errors=True)
    print(f"\nTo paste:\n\n{table(args)}")


if __name__ == "__main__":
    main()
