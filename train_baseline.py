"""Train the student by the labels alone: the baseline of the comparison.

    python train_baseline.py            # EfficientNet-B0 on CIFAR-100
    python train_baseline.py --quick    # a complete small run on scikit-learn's digits, no download

Writes checkpoints/baseline/ and results/baseline_history.csv. After an interruption the same
command goes on from the last whole epoch.
"""
import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback; later run_script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

try:
    import config
except Exception as error:  # people edit it
    print(f"error: config.py cannot be read: {error}", file=sys.stderr)
    sys.exit(2)
import data_loader
import models
import utils

DIAGNOSE_EVERY = 10  # steps between two looks at entropies, which cost kernels of their own


def main(args):
    device = utils.setup(args)
    data = data_loader.open_dataset(args)
    for run_args in each_seed(args):
        torch.manual_seed(run_args.seed)  # as in train_distillation.main: the same initial weights
        student = models.build_model(args.student_model, len(data.class_names), args.pretrained,
                                     args.student_weights).to(device)
        info = models.build_info("baseline", student, args.student_model, data, run_args)
        path = train(student, info, data, run_args)
    models.export_best_student(args.checkpoint_dir, info)  # of all students on these images and this split
    print(f"the baseline is in {path}; next: {next_command(args, 'distillation', 'distilled')}")


def train(model, info, data, args):
    """Train `model` on the labels for the args.num_epochs that are left; return best_model.pth.
    `info` is what the checkpoint says of itself (models.build_info). A former run in the same folder
    is gone on with where it fits, else moved aside."""
    run = utils.Run(info, run_identity(info), args)
    if run.finished:
        return run.best_path
    device = model.pixel_scale.device
    loader = data_loader.TrainingLoader(data, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)
    optimizer, scheduler, scaler, ema = optimization(model, len(loader), args)
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    parallel = models.wrap_ddp(models.capture_cuda_graph(model.train(), args.image_size, args))

    for epoch in range(len(run.history), args.num_epochs):
        torch.manual_seed(data_loader.derive_seed(args.seed, args.num_epochs + epoch) + utils.RANK)
        model.train()  # dropout draws from that seed, images from another
        meter = utils.EpochMetrics(run, loader)
        for step, (images, labels) in enumerate(meter.watch(loader.epoch(epoch)), 1):
            parallel.require_backward_grad_sync = step % args.accumulate_steps == 0  # for DDP
            with utils.autocast(device, args):
                logits = models.forward(parallel, images)
                loss = models.cross_entropy(logits, labels, args.label_smoothing)
            scaler.scale(loss / args.accumulate_steps).backward()

            meter.add(train_loss=loss, ce_loss=loss, train_accuracy=models.accuracy(logits, labels))
            if step % DIAGNOSE_EVERY == 1:
                meter.add(entropy=models.entropy(logits))
            if step % args.accumulate_steps:  # an epoch's batches are a multiple of it
                continue

            # One update: the fp16 scaler leaves it out where the gradient overflowed.
            scaler.unscale_(optimizer)
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            if ema:
                ema.update(model, step=scheduler.last_epoch)  # counts updates, whatever its name

        # History, best_model.pth, last.pth: from here the next run goes on.
        validated = ema.module if ema else model
        run.finish_epoch(meter.row() | validate(validated, val_loader), validated)
    return run.best_path


def validate(model, loader):
    """val_loss, plain cross-entropy, and val_accuracy on all images of `loader`; process 0's."""
    if utils.RANK:
        return {}
    torch.cuda.empty_cache()  # or what torch keeps for training and for evaluation would add up
    logits, labels = models.infer(model, loader)
    torch.cuda.empty_cache()
    return {"val_loss": models.cross_entropy(logits, labels).item(),
            "val_accuracy": models.accuracy(logits, labels).item()}


def is_finished(folder):
    """Whether the run in `folder` went to its end; a best_model.pth put there alone counts too."""
    done, last = True, folder / "last.pth"
    if last.is_file():
        saved = utils.load_checkpoint(last)
        done = len(saved["history"]) == saved["identity"]["num_epochs"]
    return done and (folder / "best_model.pth").is_file()


def each_seed(args):
    """The settings of each student to train: one of --seeds after the other, or --seed alone."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**{**vars(args), "seed": seed})


def next_command(args, script, run):
    """The command to type next, with this one's flags: `script`'s, which trains the other student,
    `run`, if there is none, else evaluate.py's."""
    there = models.student_checkpoints(Path(args.checkpoint_dir, run))
    return config.format_command("evaluate" if there else script, args.argv)


def run_identity(info):
    """What must be the same for a former run to be gone on with, of a checkpoint's `info`."""
    same = {name: value for name, value in info["config"].items() if name not in config.MAY_CHANGE_ON_RESUME}
    same |= {"model": info["model_name"], "images or split": info["split_fingerprint"]}
    if "teacher" in info:  # its file says all there is to say of it
        same = {name: value for name, value in same.items() if name not in config.TEACHER_ONLY}
        same["teacher"] = info["teacher"]["sha256"]
    return same


def optimization(model, batches, args):
    """AdamW, its schedule by the update, the fp16 scaler, and the average of the weights or None.
    No weight decay on biases and norms; linear warm-up, then cosine to zero. An epoch has so many
    `batches`."""
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    updates = batches // args.accumulate_steps  # an epoch
    warmup = min(round(args.warmup_epochs * updates), args.num_epochs * updates - 1)
    scheduler = CosineAnnealingLR(optimizer, args.num_epochs * updates - warmup)
    if warmup:
        rising = LinearLR(optimizer, 1 / warmup, total_iters=warmup)
        scheduler = SequentialLR(optimizer, [rising, scheduler], [warmup])
    for module in model.modules():
        if hasattr(module, "num_batches_tracked"):
            module.num_batches_tracked = None  # counted in each layer and step, read by nobody
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    return optimizer, scheduler, scaler, ema


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("baseline", __doc__)))
