"""Train the student on the labels only, without distillation: the baseline of the comparison.

    python train_baseline.py            # EfficientNet-B0 on CIFAR-100
    python train_baseline.py --quick    # a complete small run on drawn letters, no download

Writes checkpoints/baseline/ and results/baseline_history.csv; with --seeds, each seed has its own
checkpoints/baseline/seed_<n>/ and results/seed_<n>/. Copies the best student so far to
checkpoints/best_model.pth. After an interruption the same command, without --fresh, resumes after
the last finished epoch.
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

LOG_EVERY = 20       # steps between readings of the metrics; a reading waits for the GPU
DIAGNOSE_EVERY = 10  # steps between measurements of entropies, which launch extra kernels


def main(args):
    device = utils.setup(args)  # also replaces "auto" in args by what it chooses
    check_weight_files(args, [utils.run_folder("baseline", run_args)
                              for run_args in args_of_each_seed(args)])
    data = data_loader.open_dataset(args)
    num_classes = len(data.class_names)
    records = student_records(args, data)
    warn_of_unfair_pair(records, "distilled", args)

    for run_args in args_of_each_seed(args):
        # Seeded right before building, as in train_distillation.main: both students start from the
        # same weights.
        torch.manual_seed(run_args.seed)
        student = models.build_model(run_args.student_model, num_classes, run_args.pretrained,
                                     run_args.student_weights)
        # Recorded for GradCAM recipes. It also checks that the model can take images of this size.
        gradcam_layer = models.gradcam_layer(student, run_args.image_size)
        student.to(device)
        info = models.build_info("baseline", student, run_args.student_model, data, run_args,
                                 gradcam_layer=gradcam_layer)
        train(student, info, data, run_args)

    # `info` is that of the last seed; dataset, classes and split are the same for all seeds.
    models.export_best_student(args.checkpoint_dir, info)
    command = next_command(records, "distilled", args)
    folder = Path(args.checkpoint_dir, "baseline")
    print(f"the baseline is in {folder}; next: {command}")


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
    device = next(model.parameters()).device
    train_loader = data_loader.TrainingLoader(data, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)

    # Optimizer, schedule, scaler (which does nothing unless fp16), EMA
    updates_per_epoch = len(train_loader) // args.accumulate_steps
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, updates_per_epoch, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    model_to_save = ema.module if ema else model

    # Load the states of an interrupted run. From here on they are saved with every epoch.
    run.restore(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    run.warn_if_disk_is_short(model)

    # For speed on an NVIDIA GPU: replaces model.forward by a CUDA graph, which only runs in the
    # mode it was captured in. With several GPUs: `ddp_model` also averages the gradients.
    model.train()
    models.capture_cuda_graph(model, args.image_size, args)
    ddp_model = models.wrap_ddp(model)  # `model` itself, unless under torchrun
    parameters = list(model.parameters())  # made once, since it walks through all modules

    # Training loop
    for epoch in range(len(run.history), args.num_epochs):
        model.train()
        seed_dropout(args, epoch)  # the loader seeds the augmentation itself
        metrics = utils.EpochMetrics(args.batch_size, device)
        progress = utils.progress_bar(train_loader.epoch(epoch), len(train_loader), epoch)
        for step, (images, labels) in enumerate(progress, start=1):
            is_update_step = step % args.accumulate_steps == 0
            if utils.WORLD_SIZE > 1:
                # DDP averages gradients over the processes only in a step with an update.
                ddp_model.require_backward_grad_sync = is_update_step

            with utils.autocast(device, args):
                logits = models.forward(ddp_model, images)
                loss = models.cross_entropy(logits, labels, args.label_smoothing)
            scaler.scale(loss / args.accumulate_steps).backward()

            learning_rate = optimizer.param_groups[0]["lr"]  # of this step; update() changes it
            if is_update_step:
                update(parameters, optimizer, scheduler, scaler, ema, args)

            # Here the loss is the cross-entropy. Both students have ce_loss in their histories.
            metrics.add(train_loss=loss, ce_loss=loss,
                        train_accuracy=models.accuracy(logits, labels))
            if (step - 1) % DIAGNOSE_EVERY == 0:  # from step 1 on: a short epoch is measured too
                metrics.add(entropy=models.entropy(logits))

            if step % LOG_EVERY == 0 or step == len(train_loader):
                where = f"by step {step} of epoch {epoch + 1}, learning rate {learning_rate:.2e}"
                utils.check_finite(metrics.means()["train_loss"], where)
                utils.check_scale(scaler, where)
                progress.set_postfix_str(metrics.progress_text())
                run.print_estimate(metrics, len(train_loader))

        # Validate, then save best_model.pth, last.pth and the history. The next start resumes here.
        row = metrics.row()
        row["learning_rate"] = learning_rate  # of the last step
        row |= validate(model_to_save, val_loader)
        run.finish_epoch(row, model_to_save)

    return run.best_path


def seed_dropout(args, epoch):
    """Seed torch's global generator for the epoch's dropout and drop path, differently in each
    process of torchrun."""
    # num_epochs + epoch is a number that the loader, which derives its seeds from (args.seed,
    # epoch), never uses.
    seed = data_loader.derive_seed(args.seed, args.num_epochs + epoch)
    torch.manual_seed(seed + utils.RANK)


def update(parameters, optimizer, scheduler, scaler, ema, args):
    """One optimizer step on the accumulated gradients, then the steps of schedule and EMA."""
    scaler.unscale_(optimizer)
    if args.clip_grad:
        torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
    scaler.step(optimizer)  # no step if a gradient overflowed in fp16; the others still advance
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    if ema:
        ema.update(num_updates=scheduler.last_epoch)  # last_epoch counts updates here, not epochs


def validate(model, loader):
    """Return val_loss, the cross-entropy in nats without label smoothing, and val_accuracy, both
    over all images of `loader`. Only process 0 validates; the others return {}."""
    if utils.RANK != 0:
        return {}

    # torch caches freed GPU memory. Unless it is released, the caches of training and evaluation
    # add up. (The memory of CUDA graphs stays.)
    torch.cuda.empty_cache()
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
    """Linear warm-up, then a cosine to zero. Call its step() after each update."""
    updates = args.num_epochs * updates_per_epoch
    warmup = round(args.warmup_epochs * updates_per_epoch)
    warmup = min(warmup, updates - 1)  # the cosine needs at least one update
    cosine = CosineAnnealingLR(optimizer, updates - warmup)
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], [warmup])


class EMA(ModelEmaV3):
    """Exponential moving average of the weights and of BatchNorm's statistics: average = decay *
    average + (1 - decay) * weights, after each update. timm's warm-up keeps the decay low in the
    first updates. `module` is the averaged model; it fluctuates less than the trained one.

    timm's own `update` builds two state_dicts at every step, which takes a tenth of an eager step
    on a GPU; here the tensors are listed once.
    """
    def __init__(self, model, decay):
        super().__init__(model, decay=decay, use_warmup=True)
        # If `model` was captured as a CUDA graph before (a benchmark trains the same model twice),
        # the copy has a `forward` that would run `model`, not the copy.
        vars(self.module).pop("forward", None)

        # Tensors of the EMA model, each list followed by the tensors of `model` that it tracks.
        self.averages = []
        self.sources = []
        self.counters = []
        self.counter_sources = []
        ema_state = self.module.state_dict()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.averages.append(ema_state[name])
                self.sources.append(tensor)
            else:  # BatchNorm's num_batches_tracked is copied
                self.counters.append(ema_state[name])
                self.counter_sources.append(tensor)

    @torch.no_grad()
    def update(self, num_updates):
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - self.get_decay(num_updates))
        if self.counters:
            torch._foreach_copy_(self.counters, self.counter_sources)


# Runs ---------------------------------------------------------------------------------------------
#
# Settings are compared for four reasons. May a run resume: run_identity. Do two students make a
# fair pair: pair_faults. Can a finished teacher teach here: models.teacher_mismatch. Did two
# students have the same teacher: models.teacher_identity.

def args_of_each_seed(args):
    """Yield the settings of each student to train: of every seed of --seeds, or only of --seed."""
    for seed in args.seeds or [args.seed]:
        settings = vars(args) | {"seed": seed}
        yield argparse.Namespace(**settings)


def check_weight_files(args, folders):
    """Refuse a weight file or teacher that this command itself replaces, such as --student-weights
    checkpoints/best_model.pth. The same command would start from other weights the next time.
    `folders` are those of the runs that it trains."""
    replaced = [Path(args.checkpoint_dir, "best_model.pth"),
                Path(args.checkpoint_dir, "best_model", "model.safetensors")]
    for folder in folders:
        replaced += [folder / "best_model.pth", folder / "last.pth"]
    replaced = [file.resolve() for file in replaced]

    for name in ("student_weights", "teacher_weights", "teacher_checkpoint"):
        path = getattr(args, name, None)  # the baseline has no flags for a teacher
        if path and models.weight_file(path).resolve() in replaced:
            raise utils.UsageError(f"argument --{name.replace('_', '-')}: this command replaces "
                                   f"{path}; copy it to another place first")


def run_identity(info):
    """What must be the same in two runs for one to resume the other: a dict, taken from the
    metadata `info`. Its keys appear in the message about a run that is not resumed."""
    identity = {}
    for name, value in info["config"].items():
        # A teacher is identified by its file, not by the settings that produced it.
        if name not in config.MAY_CHANGE_ON_RESUME and name not in config.TEACHER_ONLY:
            identity[name] = value

    identity["model"] = info["model_name"]
    identity["images or split"] = info["split_fingerprint"]
    if "teacher" in info:
        identity["teacher"] = models.teacher_identity(info["teacher"])
    return identity


def student_records(args, data):
    """A dict for each student to train, with what pair_faults reads of a checkpoint. Made before
    the training: recorded_settings hashes the weight file, which may be gone afterwards."""
    records = []
    for run_args in args_of_each_seed(args):
        records.append({
            "config": models.recorded_settings(run_args),
            "model_name": args.student_model,
            "split_fingerprint": data.split_fingerprint,
        })
    return records


def checkpoints_of(role, args):
    """Where the student of `role` has its checkpoint, for each seed."""
    return [utils.run_folder(role, run_args) / "best_model.pth"
            for run_args in args_of_each_seed(args)]


def pair_faults(record, path):
    """Phrases for whatever makes the student of `record` and the one in the file `path` an unfair
    pair; [] for a fair one."""
    try:
        _, info = models.load_model(path)
        faults = models.unfair_differences(record, info, config.MAY_CHANGE_ON_RESUME)
        if not utils.is_finished(path.parent):
            faults.append("its training is unfinished")
    except utils.UserError as error:
        faults = [str(error)]
    return faults


def warn_of_unfair_pair(records, other_role, args):
    """Say before the training, and not hours later, if a student of `other_role` does not make a
    fair pair with the one to train."""
    for record, path in zip(records, checkpoints_of(other_role, args), strict=True):
        if not path.is_file():
            continue
        faults = pair_faults(record, path)
        if faults:
            print(f"warning: {path} does not make a fair pair with this run: {'; '.join(faults)}. "
                  "Stop and correct the flags, or run the other training script again too")


def next_command(records, other_role, args):
    """The command to run next, with the same flags: the training of `other_role`, or evaluate.py if
    all students of that role are there and make fair pairs."""
    script = config.SCRIPT_OF_ROLE[other_role]
    pairs = zip(records, checkpoints_of(other_role, args), strict=True)
    if all(path.is_file() and not pair_faults(record, path) for record, path in pairs):
        script = "evaluate"
    return config.format_command(script, args.argv)


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("baseline", __doc__)))
