"""How near the training loop runs to the hardware's limit, on made-up images of CIFAR's shape.

    python tests/benchmark_training.py           # EfficientNet-B0, B2 as teacher, 224 px, batch 16
    python tests/benchmark_training.py --image-size 32 --batch-size 128 --json FILE

Three loops take turns, so that a machine that slows down slows them all; medians over the rounds:

(a) plain: what people write: torchvision's PIL transforms, a DataLoader with its best number of
    workers, NCHW, autocast, `.item()` in every step;
(b) project: train_baseline.train and train_distillation.train, as the scripts run them, the second
    of two epochs, from the history's own column;
(c) ceiling: forward, teacher, backward, clipping, optimizer on one batch that is already there.

Each for cross-entropy (CE) and for distillation (KD); then (b) and (c) for evaluation, in its own
larger batches and float32. Images are upscaled from 32 px to --image-size.
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

CLASSES = 100


class PlainDataset(torch.utils.data.Dataset):
    """Images as torchvision's CIFAR100 hands them out: PIL, through a transform."""

    def __init__(self, pixels, labels, size):
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def plain_loop(args, device, pixels, labels, workers):
    """(a): a function that trains a round and returns its images/s."""
    student, teacher = (models.build_model(name, CLASSES).to(
        device, memory_format=torch.contiguous_format) for name in (args.model, args.teacher))
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    loader = torch.utils.data.DataLoader(
        PlainDataset(pixels, labels, args.image_size), args.batch_size, shuffle=True,
        drop_last=True, num_workers=workers, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0)

    def loss_of(images, targets, distil):
        logits = student(images)
        loss = F.cross_entropy(logits, targets)
        if not distil:
            return loss
        with torch.no_grad():
            teacher_logits = teacher(images)
        kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher_logits / 4, 1),
                      reduction="batchmean")
        return 0.3 * loss + 0.7 * 16 * kl

    def run(distil):
        student.train()
        start = time.perf_counter()
        total = 0.0
        for images, targets in loader:
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            with utils.autocast(device, args):
                loss = loss_of(images, targets, distil)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            total += loss.item()
        return len(loader) * args.batch_size / (time.perf_counter() - start)
    return run


def settings_of(args, distil, folder="."):
    """The project's settings for this benchmark, from its own command line."""
    flags = ["--student-model", args.model, "--no-pretrained", "--image-size", args.image_size,
             "--batch-size", args.batch_size, "--learning-rate", "1e-4", "--num-epochs", "2",
             "--checkpoint-dir", folder, "--results-dir", folder, "--ema-decay", "0"]
    flags += ["--cuda-graph"] if args.cuda_graph else []
    if distil:
        flags += ["--teacher-model", args.teacher]
    script = "distillation" if distil else "baseline"
    settings = config.parse_args(script, "", [str(flag) for flag in flags])
    settings.amp_dtype = args.amp_dtype
    return settings


def made_up(pixels, labels):
    """A dataset of these images, sixteen of them for validation."""
    pixels, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)
    train = data_loader.Images(pixels.contiguous(), None, labels, [])
    names = [str(i) for i in range(CLASSES)]
    return data_loader.Dataset("made up", names, train, train.select(range(16)), "", "flip_crop")


def project_loop(args, device, pixels, labels, distil):
    """(b): a function that trains two epochs as the scripts do; the second one's images/s."""
    data = made_up(pixels, labels)
    student = models.build_model(args.model, CLASSES).to(device)
    teacher = models.freeze_teacher(models.build_model(args.teacher, CLASSES), args.image_size,
                            utils.DTYPES[args.amp_dtype]).to(device)

    def run():
        quiet = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, quiet:
            settings = settings_of(args, distil, folder)
            name = "distilled" if distil else "baseline"
            info = models.build_info(name, student, args.model, data, settings)
            if distil:
                info["teacher"] = {"sha256": ""}
                train_distillation.train(student, teacher, info, data, settings)
            else:
                train_baseline.train(student, info, data, settings)
            last = utils.load_checkpoint(utils.run_folder(name, settings) / "last.pth")
        return last["history"][1]["images_per_second"]
    return run


def recorded(step):
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
        return loss
    return replay


def ceiling_loop(args, device, distil):
    """(c): a function that makes as many steps on one resident batch and returns its images/s."""
    settings = settings_of(args, distil)
    student = models.build_model(args.model, CLASSES).to(device).train()
    teacher = models.freeze_teacher(models.build_model(args.teacher, CLASSES), args.image_size,
                            utils.DTYPES[args.amp_dtype]).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.05, fused=True,
                                  capturable=device.type == "cuda")
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (args.batch_size,), device=device)

    def step():
        with utils.autocast(device, args):
            logits = student(images)
            if distil:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                loss, _, _ = models.distillation_loss(logits, teacher_logits, labels, settings)
            else:
                loss = models.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss
    replay = recorded(step) if device.type == "cuda" else step

    def run():
        start = time.perf_counter()
        for _ in range(args.steps):
            loss = replay()
        float(loss.detach())  # waits for the device
        return args.steps * args.batch_size / (time.perf_counter() - start)
    return run


def evaluation_loops(args, device):
    """(b) and (c) of evaluation: as the scripts do it, and one resident batch again and again."""
    model = models.build_model(args.model, CLASSES).to(device).eval()
    random, settings = np.random.default_rng(0), settings_of(args, False)
    info = {"image_size": args.image_size, "interpolation": "bicubic", "crop_pct": 1.0}

    def loader_of(count):
        data = made_up(random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                       random.integers(0, CLASSES, count))
        return data_loader.EvaluationLoader(data.train, info, settings, device)
    size = loader_of(16).batch_size
    loader = loader_of(args.steps * size)
    images = torch.rand(size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def timed(infer):
        start = time.perf_counter()
        infer()
        return args.steps * size / (time.perf_counter() - start)

    @torch.inference_mode()
    def ceiling():
        for _ in range(args.steps):
            logits = model(images)
        logits.sum().item()  # waits for the device
    return {"project": lambda: timed(lambda: models.infer(model, loader)),
            "ceiling": lambda: timed(ceiling)}


def compare(args, name, loops):
    """A row of the table: the loops in turns."""
    for run in loops.values():
        run()
    rounds = [{loop: run() for loop, run in loops.items()} for _ in range(args.rounds)]
    row = {"what": name}
    row |= {loop: statistics.median(one[loop] for one in rounds) for loop in loops}
    for other in ("plain", "ceiling"):
        if other in loops:
            ratios = [one["project"] / one[other] for one in rounds]
            row[f"project / {other}"] = statistics.median(ratios)
    return row


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--teacher", default="efficientnet_b2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="steps a round; default 200 on a GPU, else 20")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+",
                        default=[n for n in (0, 2, 4, 8, 16) if n <= os.cpu_count()],
                        help="numbers of workers to choose the best of for (a)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp-dtype", default="auto")
    parser.add_argument("--cuda-graph", action="store_true", help="for (b)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def main():
    args = parse()
    device = utils.setup(args)
    args.steps = args.steps or (200 if device.type == "cuda" else 20)
    random = np.random.default_rng(0)
    count = args.steps * args.batch_size
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, count)

    tried = {workers: plain_loop(args, device, pixels, labels, workers)
             for workers in args.workers}
    warm = {workers: (run(False), run(False))[1] for workers, run in tried.items()}
    best = max(warm, key=warm.get)
    rows = [compare(args, "KD" if distil else "CE", {
        "plain": functools.partial(tried[best], distil),
        "project": project_loop(args, device, pixels, labels, distil),
        "ceiling": ceiling_loop(args, device, distil)}) for distil in (False, True)]
    rows.append(compare(args, "evaluation", evaluation_loops(args, device)))

    print(f"{args.model}, teacher {args.teacher}, {args.image_size} px, batch {args.batch_size}, "
          f"{utils.device_name(device)}, {args.amp_dtype}, torch {torch.__version__}; (a) with "
          f"{best} workers; images/s, medians of {args.rounds} rounds of {args.steps} steps")
    columns = {"plain": ".0f", "project": ".0f", "ceiling": ".0f", "project / plain": ".2f",
               "project / ceiling": ".3f"}
    print("| | (a) plain | (b) project | (c) ceiling | b/a | b/c |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [format(row[name], form) if name in row else "" for name, form in columns.items()]
        print(f"| {row['what']} |", " | ".join(cells), "|")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        text = json.dumps({"settings": settings, "rows": rows}, indent=1)
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
