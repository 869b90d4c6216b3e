"""How close the training loop comes to the hardware's limit, on synthetic images of CIFAR's shape.

    python tests/benchmark_training.py           # EfficientNet-B0, B2 as teacher, 224 px, batch 16
    python tests/benchmark_training.py --image-size 32 --batch-size 128 --json FILE

Four loops take turns, so that a machine that slows down affects all of them. The table has medians
over the rounds, of the speeds and of the ratios within each round.

(a) plain, as people usually write it: torchvision's PIL transforms, a DataLoader with the best
    number of workers, NCHW, autocast, `.item()` in every step;
(b) project: train_baseline.train and train_distillation.train with the default EMA, as the scripts
    run them: images/s of the second of two epochs, from the history;
(c) ceiling: forward, teacher, backward, clipping, optimizer on one batch that is already on
    the device;
(d) timm's own parts, put together as in timm's train.py: its loader (with as many workers as (a)),
    ClassificationTask or LogitDistillationTask, AdamW, cosine schedule, clipping and EMA.

Each is timed for cross-entropy (CE) and for distillation (KD); then (b) and (c) for evaluation,
with its own, larger batches and float32. Images are upscaled from 32 px to --image-size.
"""
import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timm
import timm.loss
import timm.optim
import timm.scheduler
import timm.task
import timm.utils
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import config
import data_loader
import models
import train_baseline
import train_distillation
import utils

NUM_CLASSES = 100
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
COLUMNS = {"plain": ".0f", "project": ".0f", "ceiling": ".0f", "timm": ".0f",
           "project / plain": ".2f", "project / ceiling": ".3f", "project / timm": ".2f"}


def made_up(pixels, labels):
    """A dataset of these images, (N, 32, 32, 3) uint8 and (N,); sixteen of them for validation."""
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    train = data_loader.Images(pixels, None, torch.from_numpy(labels))
    val = train.select(range(16))
    class_names = [str(i) for i in range(NUM_CLASSES)]
    return data_loader.Dataset("made up", class_names, train, val, "", "flip_crop")


def parse_settings(args, distill, folder="."):
    """The project's settings for this benchmark, from its own command line."""
    flags = ["--student-model", args.model, "--no-pretrained", "--image-size", args.image_size,
             "--batch-size", args.batch_size, "--learning-rate", "1e-4", "--num-epochs", "2",
             "--checkpoint-dir", folder, "--results-dir", folder]
    flags.append("--cuda-graph" if args.cuda_graph else "--no-cuda-graph")
    script = "baseline"
    if distill:
        flags += ["--teacher-model", args.teacher]
        script = "distillation"
    settings = config.parse_args(script, "", [str(flag) for flag in flags])
    settings.amp_dtype = args.amp_dtype
    return settings


def build_models(args, device):
    """(student, frozen teacher) as the scripts have them, with random weights."""
    student = models.build_model(args.model, NUM_CLASSES).to(device)
    teacher = models.build_model(args.teacher, NUM_CLASSES)
    dtype = utils.DTYPES[args.amp_dtype]
    return student, models.freeze_teacher(teacher, args.image_size, dtype).to(device)


# (a) plain ----------------------------------------------------------------------------------------

class PilImages(torch.utils.data.Dataset):
    """Images as torchvision's CIFAR100 hands them out: PIL, through a transform."""

    def __init__(self, pixels, labels, transform=None):
        self.pixels = pixels
        self.labels = labels
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def plain_loop(args, device, pixels, labels, num_workers):
    """A function of `distill` that trains a round and returns its images/s."""
    student = models.build_model(args.model, NUM_CLASSES)
    student = student.to(device, memory_format=torch.contiguous_format)
    teacher = models.build_model(args.teacher, NUM_CLASSES)
    teacher = teacher.to(device, memory_format=torch.contiguous_format).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    transform = transforms.Compose([
        transforms.RandomCrop(32, 4),
        transforms.RandomHorizontalFlip(),
        transforms.Resize(args.image_size, transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD)])
    loader = torch.utils.data.DataLoader(
        PilImages(pixels, labels, transform), args.batch_size, shuffle=True, drop_last=True,
        num_workers=num_workers, pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0)

    def loss_of(images, targets, distill):
        logits = student(images)
        ce_loss = F.cross_entropy(logits, targets)
        if not distill:
            return ce_loss
        with torch.no_grad():
            teacher_logits = teacher(images)
        kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher_logits / 4, 1),
                      reduction="batchmean")
        return 0.7 * 16 * kl + 0.3 * ce_loss

    def run(distill):
        student.train()
        start = time.perf_counter()
        total_loss = 0.0
        for images, targets in loader:
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            with utils.autocast(device, args):
                loss = loss_of(images, targets, distill)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            total_loss += loss.item()
        return len(loader) * args.batch_size / (time.perf_counter() - start)
    return run


def best_plain_loop(args, device, pixels, labels):
    """(number of workers, loop) of the fastest of args.workers, in a round after a first one."""
    loops = {}
    speeds = {}
    for num_workers in args.workers:
        loop = plain_loop(args, device, pixels, labels, num_workers)
        loop(False)
        loops[num_workers] = loop
        speeds[num_workers] = loop(False)
    best = max(speeds, key=speeds.get)
    return best, loops[best]


# (b) project --------------------------------------------------------------------------------------

def project_loop(args, device, pixels, labels, distill):
    """A function that trains two epochs as the scripts do and returns the second one's images/s."""
    data = made_up(pixels, labels)
    student, teacher = build_models(args, device)
    name = "distilled" if distill else "baseline"

    def run():
        with (tempfile.TemporaryDirectory() as folder,
              contextlib.redirect_stdout(io.StringIO())):
            settings = parse_settings(args, distill, folder)
            info = models.build_info(name, student, args.model, data, settings)
            if distill:
                info["teacher"] = {"sha256": ""}
                train_distillation.train(student, teacher, info, data, settings)
            else:
                train_baseline.train(student, info, data, settings)
            last = utils.load_checkpoint(utils.run_folder(name, settings) / "last.pth")
        return last["history"][1]["images_per_second"]
    return run


# (c) ceiling --------------------------------------------------------------------------------------

def ceiling_loop(args, device, distill):
    """A function that makes as many steps on one resident batch and returns its images/s."""
    settings = parse_settings(args, distill)
    student, teacher = build_models(args, device)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.05, fused=True,
                                  capturable=device.type == "cuda")
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (args.batch_size,), device=device)

    def step():
        with utils.autocast(device, args):
            logits = student(images)
            loss = models.cross_entropy(logits, labels)
            if distill:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                distill_loss = models.distill_loss(logits, teacher_logits, settings)
                loss = settings.alpha * distill_loss + (1 - settings.alpha) * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss

    if device.type == "cuda":
        step = record_graph(step)

    def run():
        start = time.perf_counter()
        for _ in range(args.steps):
            loss = step()
        loss.item()  # waits for the device
        return args.steps * args.batch_size / (time.perf_counter() - start)
    return run


def record_graph(step):
    """`step` as a CUDA graph.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    # thread_local: the DataLoaders of (a) have threads of their own.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        loss = step()

    def replay():
        graph.replay()
        return loss.detach()
    return replay


# (d) timm -----------------------------------------------------------------------------------------

def timm_loop(args, device, pixels, labels, num_workers, distill):
    """A function that trains an epoch with timm's own parts and returns its images/s."""
    student = models.build_model(args.model, NUM_CLASSES).to(device)
    teacher = models.build_model(args.teacher, NUM_CLASSES).to(device) if distill else None
    loader = timm.data.create_loader(
        PilImages(pixels, labels), args.image_size, args.batch_size, is_training=True,
        color_jitter=0.0, interpolation="bicubic", mean=MEAN, std=STD, num_workers=num_workers,
        persistent_workers=num_workers > 0, pin_memory=device.type == "cuda", device=device)
    settings = parse_settings(args, distill)
    run_epoch, _ = timm_trainer(student, teacher, loader, device, settings)

    def run():
        start = time.perf_counter()
        run_epoch()
        return len(loader) * args.batch_size / (time.perf_counter() - start)
    return run


def timm_trainer(student, teacher, loader, device, args):
    """timm's parts, put together as in its train.py. `args` are this project's settings.

    Returns a function that trains `student` for an epoch of timm's `loader` and returns the mean
    loss and the last learning rate, and the EMA of the weights. `teacher` is None for cross-entropy
    alone.
    """
    criterion = timm.loss.LabelSmoothingCrossEntropy(args.label_smoothing)
    if teacher is None:
        task = timm.task.ClassificationTask(student, criterion, device=device, verbose=False)
    else:
        task = timm.task.LogitDistillationTask(
            student, teacher, criterion, distill_loss_weight=args.alpha,
            task_loss_weight=1 - args.alpha, temperature=args.temperature, device=device,
            verbose=False)

    steps = len(loader)
    warmup = max(1, round(args.warmup_epochs * steps))
    optimizer = timm.optim.create_optimizer_v2(student, "adamw", lr=args.learning_rate,
                                               weight_decay=args.weight_decay)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, max(1, args.num_epochs * steps - warmup), warmup_t=warmup,
        warmup_lr_init=args.learning_rate / warmup, warmup_prefix=True, t_in_epochs=False)
    scaler = timm.utils.NativeScaler(device.type) if args.amp_dtype == "fp16" else None
    ema = timm.utils.ModelEmaV3(student, decay=args.ema_decay, use_warmup=True)
    clip_grad = args.clip_grad or None
    num_updates = 0

    def run_epoch():
        nonlocal num_updates
        student.train()
        losses = timm.utils.AverageMeter()
        for images, targets in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with utils.autocast(device, args):
                loss = task(images, targets)["loss"]

            learning_rate = optimizer.param_groups[0]["lr"]  # of this step
            if scaler:
                scaler(loss, optimizer, clip_grad=clip_grad, parameters=student.parameters())
            else:
                loss.backward()
                if clip_grad:
                    timm.utils.dispatch_clip_grad(student.parameters(), clip_grad)
                optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
            ema.update(student, num_updates)
            scheduler.step_update(num_updates)
            losses.update(loss.item(), len(images))
        return losses.avg, learning_rate
    return run_epoch, ema


# Evaluation ---------------------------------------------------------------------------------------

def evaluation_loops(args, device):
    """(b) and (c) of evaluation: as it follows each epoch of training, and one resident batch again
    and again."""
    model = models.build_model(args.model, NUM_CLASSES).to(device).eval()
    settings = parse_settings(args, distill=False)
    info = {"image_size": args.image_size, "interpolation": "bicubic", "crop_pct": 1.0}
    random = np.random.default_rng(0)

    def build_loader(count):
        data = made_up(random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                       random.integers(0, NUM_CLASSES, count))
        return data_loader.EvaluationLoader(data.train, info, settings, device)

    batch_size = build_loader(16).batch_size
    num_images = args.steps * batch_size
    loader = build_loader(num_images)
    images = torch.rand(batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def project():
        start = time.perf_counter()
        models.infer(model, loader)
        return num_images / (time.perf_counter() - start)

    @torch.inference_mode()
    def ceiling():
        start = time.perf_counter()
        for _ in range(args.steps):
            logits = model(images)
        logits.sum().item()  # waits for the device
        return num_images / (time.perf_counter() - start)

    return {"project": project, "ceiling": ceiling}


# The table ----------------------------------------------------------------------------------------

def compare(args, name, loops):
    """A row of the table: the loops in turns, medians of their images/s and of each round's ratios.
    """
    for run in loops.values():
        run()
    rounds = []
    for _ in range(args.rounds):
        rounds.append({loop: run() for loop, run in loops.items()})

    row = {"what": name}
    for loop in loops:
        row[loop] = statistics.median(speeds[loop] for speeds in rounds)
    for other in ("plain", "ceiling", "timm"):
        if other in loops:
            ratios = [speeds["project"] / speeds[other] for speeds in rounds]
            row[f"project / {other}"] = statistics.median(ratios)
    return row


def head_text(args, device, num_workers):
    return (f"{args.model}, teacher {args.teacher}, {args.image_size} px, batch {args.batch_size}, "
            f"{utils.device_name(device)}, {args.amp_dtype}, torch {torch.__version__}, "
            f"timm {timm.__version__}; (a) and (d) with {num_workers} workers; images/s, medians "
            f"of {args.rounds} rounds of {args.steps} steps\n"
            "| | (a) plain | (b) project | (c) ceiling | (d) timm | b/a | b/c | b/d |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |")


def row_text(row):
    cells = [row["what"]]
    for name, number_format in COLUMNS.items():
        cells.append(format(row[name], number_format) if name in row else "")
    return f"| {' | '.join(cells)} |"


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0", help="student (default: %(default)s)")
    parser.add_argument("--teacher", default="efficientnet_b2",
                        help="teacher of KD (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="px (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16,
                        help="images per training step (default: %(default)s)")
    parser.add_argument("--steps", type=int,
                        help="steps per round (default: 200 on a GPU, else 20)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="rounds, in each of which every loop runs (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+",
                        default=[number for number in (0, 2, 4, 8, 16) if number <= os.cpu_count()],
                        help="numbers of workers to try for (a); the fastest is used")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--amp-dtype", default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument("--deterministic", action="store_true",
                        help="use only deterministic algorithms")
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
                        help="on a GPU, use CUDA graphs in (b) (default: yes)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.set_defaults(accumulate_steps=1)  # which utils.setup reads
    return parser.parse_args()


def main():
    args = parse()
    device = utils.setup(args)
    if args.steps is None:
        args.steps = 200 if device.type == "cuda" else 20

    random = np.random.default_rng(0)
    count = args.steps * args.batch_size
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, NUM_CLASSES, count)
    num_workers, plain = best_plain_loop(args, device, pixels, labels)

    head = head_text(args, device, num_workers)
    print(head)
    rows = []
    for name in ("CE", "KD", "evaluation"):
        if name == "evaluation":
            loops = evaluation_loops(args, device)
        else:
            distill = name == "KD"
            loops = {
                "plain": functools.partial(plain, distill),
                "project": project_loop(args, device, pixels, labels, distill),
                "ceiling": ceiling_loop(args, device, distill),
                "timm": timm_loop(args, device, pixels, labels, num_workers, distill),
            }
        rows.append(compare(args, name, loops))
        print(row_text(rows[-1]), flush=True)

    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        text = json.dumps({"head": head, "settings": settings, "rows": rows}, indent=1)
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
