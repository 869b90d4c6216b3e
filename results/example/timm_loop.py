"""A peer: a student trained by a loop of timm's own parts instead of this project's, from the same
weights, with the same images, crops, length, learning rate and teacher.

    python results/example/timm_loop.py ...                              # the baseline
    python results/example/timm_loop.py --teacher-checkpoint FILE ...    # the distilled student

It takes the flags of train_baseline.py or, with a teacher, of train_distillation.py, but the
student always has the default losses and weight decay. An interrupted run starts over.
"""
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


def train_with_timm(student, teacher, info, data, args):
    """As train_distillation.train; without a teacher, as train_baseline.train."""
    run = utils.Run(info, train_baseline.run_identity(info), args)
    if run.finished:
        print(f"{run.title}: already trained")
        return run.best_path
    run.history = []

    device = next(student.parameters()).device
    loader = build_loader(data.train, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)
    train_epoch, ema = benchmark_training.timm_trainer(
        student, teacher, loader, device, args.amp_dtype, args.num_epochs, args.learning_rate)

    for _ in range(args.num_epochs):
        start = time.perf_counter()
        train_loss, learning_rate = train_epoch()
        speed = len(loader) * args.batch_size / (time.perf_counter() - start)
        row = dict.fromkeys(utils.HISTORY_COLUMNS)
        row |= {"train_loss": train_loss, "learning_rate": learning_rate,
                "images_per_second": speed}
        run.finish_epoch(row | train_baseline.validate(ema.module, val_loader), ema.module)
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
