"""A peer: a student trained by a loop of timm's own parts instead of this project's, from the same
weights, with the same images, length, learning rate and teacher, and the same kind of crops in
another random order.

    python results/example/timm_loop.py ...                              # the baseline
    python results/example/timm_loop.py --teacher-checkpoint FILE ...    # the distilled student

It takes the flags of train_baseline.py or, with a teacher, of train_distillation.py, and refuses
those that the loop does not follow. It never resumes: a previous run is moved aside. Give it
folders of its own (--checkpoint-dir, --results-dir). Ignore the command that it prints at the end,
which is for this project's own loop.
"""
import argparse
import sys
import time
from pathlib import Path

import timm
from torchvision import transforms

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
import benchmark_training  # noqa: E402
import config  # noqa: E402
import data_loader  # noqa: E402
import train_baseline  # noqa: E402
import train_distillation  # noqa: E402
import utils  # noqa: E402

# What the loop does not do otherwise.
FIXED = {"augmentation": "flip_crop", "distillation_loss": "kd", "kl_direction": "forward",
         "mixup_alpha": 0, "cutmix_alpha": 0, "accumulate_steps": 1}


def check(args, data):
    if data.train.pixels is None:
        raise utils.UsageError("timm's loop here is for small images, not for photographs")
    settings = vars(args) | {"augmentation": data.augmentation}
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise utils.UsageError(f"--{name.replace('_', '-')} must be {value} for timm's loop")
    if settings.get("teacher_image_size") not in (None, args.image_size):
        raise utils.UsageError("timm's loop shows teacher and student the same images, so "
                               "--teacher-image-size must be that of the student")
    if utils.WORLD_SIZE > 1:
        raise utils.UsageError("timm's loop runs in one process")


def train_with_timm(student, teacher, info, data, args):
    """As train_distillation.train; without a teacher, as train_baseline.train."""
    check(args, data)
    identity = train_baseline.run_identity(info) | {"loop": "timm"}
    run = utils.Run(info, identity, argparse.Namespace(**vars(args) | {"fresh": True}))

    device = next(student.parameters()).device
    loader = build_loader(data.train, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)
    train_epoch, ema = benchmark_training.timm_trainer(student, teacher, loader, device, args)

    for _ in range(args.num_epochs):
        start = time.perf_counter()
        train_loss, learning_rate = train_epoch()
        speed = len(loader) * args.batch_size / (time.perf_counter() - start)
        row = {"train_loss": train_loss, "learning_rate": learning_rate, "train_accuracy": None,
               "images_per_second": speed, **train_baseline.validate(ema.module, val_loader)}
        run.finish_epoch(row, ema.module)
        utils.Run.resume_point = ""  # after Ctrl-C nothing could be resumed
    return run.best_path


def build_loader(images, info, args, device):
    """timm's loader of PIL images, with the crops and flips of this project's small images."""
    pixels = images.pixels.permute(0, 2, 3, 1).numpy()
    side = pixels.shape[1]
    dataset = benchmark_training.PilImages(pixels, images.labels.tolist())
    loader = timm.data.create_loader(
        dataset, args.image_size, args.batch_size, is_training=True, mean=info["mean"],
        std=info["std"], num_workers=args.num_workers, device=device)
    dataset.transform = transforms.Compose([  # instead of the one that create_loader made
        transforms.RandomCrop(side, round(side * data_loader.CROP_PADDING)),
        transforms.RandomHorizontalFlip(),
        transforms.Resize(args.image_size, transforms.InterpolationMode(info["interpolation"])),
        transforms.PILToTensor()])
    return loader


def main(args):
    train_baseline.train = lambda student, *rest: train_with_timm(student, None, *rest)
    train_distillation.train = train_with_timm
    script = train_distillation if "teacher_checkpoint" in args else train_baseline
    script.main(args)


if __name__ == "__main__":
    has_teacher = any(word.startswith("--teacher-checkpoint") for word in sys.argv)
    script_name = "distillation" if has_teacher else "baseline"
    sys.exit(utils.run_script(main, config.parse_args(script_name, __doc__)))
