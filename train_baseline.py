"""Train the student on the labels only, without distillation: the baseline of the comparison.

    python train_baseline.py            # EfficientNet-B0 on CIFAR-100
    python train_baseline.py --quick    # a complete small run on drawn letters, no download

Writes checkpoints/baseline/ and results/baseline_history.csv, with --seeds one seed_<n>/ each in
there, and copies the best student so far to checkpoints/best_model.pth. After an interruption the
same command resumes after the last finished epoch.
"""
import argparse
import sys
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import config
import data_loader
import models
import utils

LOG_EVERY = 20       # steps between updates of the progress bar; each waits for the GPU
DIAGNOSE_EVERY = 10  # steps between measurements of entropies, which launch extra kernels


def main(args):
    device = utils.setup(args)
    data = data_loader.open_dataset(args)
    num_classes = len(data.class_names)

    for run_args in args_of_each_seed(args):
        # Seeded right before building, as in train_distillation.main: both students start from the
        # same weights.
        torch.manual_seed(run_args.seed)
        student = models.build_model(args.student_model, num_classes, args.pretrained,
                                     args.student_weights)
        gradcam_layer = models.gradcam_layer(student, args.image_size)
        student.to(device)
        info = models.build_info("baseline", student, args.student_model, data, run_args,
                                 gradcam_layer=gradcam_layer)
        best_path = train(student, info, data, run_args)

    models.export_best_student(args.checkpoint_dir, info)
    print(f"the baseline is in {best_path}; "
          f"next: {next_command(args, 'distillation', 'distilled')}")


def train(model, info, data, args):
    """Train `model` on the labels for args.num_epochs; return the path of best_model.pth.

    `info` is the metadata that goes into the checkpoint (models.build_info). A previous run in the
    same folder is resumed if its settings are the same; otherwise it is moved aside once the first
    epoch is finished.
    """
    run = utils.Run(info, run_identity(info), args)
    run.tidy_after_a_kill()
    if run.finished:
        print(f"{run.title}: already trained with these settings; --fresh trains it again")
        return run.best_path

    # Data
    device = model.pixel_scale.device
    train_loader = data_loader.TrainingLoader(data, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)

    # Optimizer, schedule, fp16 scaler, EMA; all of them resume
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, len(train_loader) // args.accumulate_steps, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    model_to_save = ema.module if ema else model

    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    run.warn_if_disk_is_short(model)

    model.train()  # a graph is captured in the mode in which it will run
    models.capture_cuda_graph(model, args.image_size, args)
    ddp_model = models.wrap_ddp(model)

    # Training loop
    for epoch in range(len(run.history), args.num_epochs):
        model.train()
        seed_dropout(args, epoch)  # the loader seeds the augmentation itself
        metrics = utils.EpochMetrics(args.batch_size, device)
        progress = utils.progress_bar(train_loader.epoch(epoch), len(train_loader), epoch)
        for step, (images, labels) in enumerate(progress, start=1):
            is_update_step = step % args.accumulate_steps == 0
            if utils.WORLD_SIZE > 1:
                # DDP averages gradients over the processes only where an update follows.
                ddp_model.require_backward_grad_sync = is_update_step

            with utils.autocast(device, args):
                logits = models.forward(ddp_model, images)
                loss = models.cross_entropy(logits, labels, args.label_smoothing)
            scaler.scale(loss / args.accumulate_steps).backward()

            learning_rate = optimizer.param_groups[0]["lr"]  # of this step; the update changes it
            if is_update_step:
                update(model, optimizer, scheduler, scaler, ema, args)

            metrics.add(train_loss=loss, ce_loss=loss,
                        train_accuracy=models.accuracy(logits, labels))
            if step % DIAGNOSE_EVERY == 1:
                metrics.add(entropy=models.entropy(logits))

            if step % LOG_EVERY == 0 or step == len(train_loader):
                where = f"by step {step} of epoch {epoch + 1}, learning rate {learning_rate:.2e}"
                utils.check_finite(metrics.means()["train_loss"], where)
                utils.check_scale(scaler, where)
                progress.set_postfix_str(metrics.progress_text())
                run.print_estimate(metrics, len(train_loader))

        # Validate, then save best_model.pth, last.pth and the history. The next start resumes here.
        row = metrics.row() | {"learning_rate": learning_rate}
        row |= validate(model_to_save, val_loader)
        run.finish_epoch(row, model_to_save)

    return run.best_path


def update(model, optimizer, scheduler, scaler, ema, args):
    """One optimizer step on the accumulated gradients, then the steps of schedule and EMA."""
    scaler.unscale_(optimizer)
    if args.clip_grad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    scaler.step(optimizer)  # in fp16 it is skipped if a gradient overflowed; schedule and EMA go on
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    if ema:
        ema.update(num_updates=scheduler.last_epoch)  # despite its name it counts updates here


def validate(model, loader):
    """val_loss, plain cross-entropy in nats, and val_accuracy on all images of `loader`, for the
    history. Only process 0 validates; the others get {}."""
    if utils.RANK != 0:
        return {}
    torch.cuda.empty_cache()  # or the cached blocks of training and evaluation would add up
    logits, labels = models.infer(model, loader)
    torch.cuda.empty_cache()
    return {"val_loss": models.cross_entropy(logits, labels).item(),
            "val_accuracy": models.accuracy(logits, labels).item()}


# Optimizer, schedule, EMA -------------------------------------------------------------------------

def build_optimizer(model, args):
    """AdamW without weight decay on biases and norms."""
    groups = param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


def build_scheduler(optimizer, updates_per_epoch, args):
    """Linear warm-up, then cosine to zero, a step for each update."""
    updates = args.num_epochs * updates_per_epoch
    warmup = min(round(args.warmup_epochs * updates_per_epoch), updates - 1)
    cosine = CosineAnnealingLR(optimizer, updates - warmup)
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], [warmup])


class EMA(ModelEmaV3):
    """Exponential moving average of the weights and of BatchNorm's statistics, with timm's warm-up
    of the decay. `module` is the averaged model.

    timm's own `update` builds two state_dicts at every step, which takes a tenth of an eager step
    on a GPU; here the tensors are listed once.
    """
    def __init__(self, model, decay):
        super().__init__(model, decay=decay, use_warmup=True)
        # After a capture `model` has a forward of its own, which would run `model`, not the copy.
        vars(self.module).pop("forward", None)
        ema_state = self.module.state_dict()
        state = model.state_dict()
        is_average = {name: tensor.is_floating_point() for name, tensor in state.items()}
        self.averages = [ema_state[name] for name in state if is_average[name]]
        self.sources = [state[name] for name in state if is_average[name]]
        self.counters = [ema_state[name] for name in state if not is_average[name]]
        self.counter_sources = [state[name] for name in state if not is_average[name]]

    @torch.no_grad()
    def update(self, num_updates):
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - self.get_decay(num_updates))
        if self.counters:  # BatchNorm's num_batches_tracked
            torch._foreach_copy_(self.counters, self.counter_sources)


def seed_dropout(args, epoch):
    """Seed torch's global generator for the epoch's dropout and drop path, differently in each
    process of torchrun."""
    # The loader derives its seeds from (args.seed, epoch); behind num_epochs none of them occurs.
    seed = data_loader.derive_seed(args.seed, args.num_epochs + epoch)
    torch.manual_seed(seed + utils.RANK)


# Runs ---------------------------------------------------------------------------------------------

def args_of_each_seed(args):
    """The settings of each student to train: one of --seeds after the other, or --seed alone."""
    for seed in args.seeds or [args.seed]:
        yield argparse.Namespace(**{**vars(args), "seed": seed})


def run_identity(info):
    """What must be the same for a previous run to be resumed, from the `info` of its checkpoint."""
    identity = {}
    for name, value in info["config"].items():
        # A teacher is identified by the hash of its file, not by the settings that produced it.
        if name not in config.MAY_CHANGE_ON_RESUME and name not in config.TEACHER_ONLY:
            identity[name] = value

    identity["model"] = info["model_name"]
    identity["images or split"] = info["split_fingerprint"]
    if "teacher" in info:
        identity["teacher"] = info["teacher"]["sha256"]
    return identity


def is_finished(folder):
    """Whether the run in `folder` is finished. A best_model.pth without last.pth was put there by
    hand, and counts as finished."""
    if not (folder / "best_model.pth").is_file():
        return False
    last_path = folder / "last.pth"
    if not last_path.is_file():
        return True
    saved = utils.load_checkpoint(last_path)
    return len(saved["history"]) == saved["identity"]["num_epochs"]


def next_command(args, script, role):
    """The command to run next, with this one's flags: `script`, which trains the other student (of
    `role`), or evaluate.py if that student has a checkpoint already."""
    checkpoints = models.student_checkpoints(Path(args.checkpoint_dir, role))
    return config.format_command("evaluate" if checkpoints else script, args.argv)


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("baseline", __doc__)))
