"""Train the student by a teacher and the labels: the distilled side of the comparison.

    python train_distillation.py            # EfficientNet-B0 taught by B2, on CIFAR-100
    python train_distillation.py --quick    # a complete small run on scikit-learn's digits

Fine-tunes the teacher first where checkpoints/teacher/ holds none that fits. Writes
checkpoints/distilled/ and results/distilled_history.csv. After an interruption the same command
goes on from the last whole epoch.
"""
import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback; later run_script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

try:
    import config
except Exception as error:  # people edit it
    print(f"error: config.py cannot be read: {error}", file=sys.stderr)
    sys.exit(2)
import data_loader
import models
import train_baseline
import utils


def main(args):
    device = utils.setup(args)
    data = data_loader.open_dataset(args)
    if args.distillation_loss == "lskd" and len(data.class_names) == 2:
        raise utils.UsageError("with two classes --distillation-loss lskd has nothing to say")
    path = args.teacher_checkpoint or train_teacher(args, data, device)
    teacher, about_teacher = load_teacher(path, args, data, device)
    for run_args in train_baseline.each_seed(args):
        torch.manual_seed(run_args.seed)  # as in train_baseline.main: the same initial weights
        student = models.build_model(args.student_model, len(data.class_names), args.pretrained,
                                     args.student_weights).to(device)
        info = models.build_info("distilled", student, args.student_model, data, run_args,
                               teacher=about_teacher)
        path = train(student, teacher, info, data, run_args)
    models.export_best_student(args.checkpoint_dir, info)  # of all students on these images and this split
    then = train_baseline.next_command(args, "baseline", "baseline")
    print(f"the distilled student is in {path}; next: {then}")


def train(student, teacher, info, data, args):
    """As train_baseline.train, but also by the frozen `teacher`, which sees the same crops."""
    run = utils.Run(info, train_baseline.run_identity(info), args)
    if run.finished:
        return run.best_path
    device = student.pixel_scale.device
    loader = data_loader.TrainingLoader(data, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)
    optimizer, scheduler, scaler, ema = train_baseline.optimization(student, len(loader), args)
    run.restore(model=student, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    parallel = models.wrap_ddp(models.capture_cuda_graph(student.train(), args.image_size, args))
    models.capture_cuda_graph(teacher, args.teacher_image_size or args.image_size, args)

    for epoch in range(len(run.history), args.num_epochs):
        torch.manual_seed(data_loader.derive_seed(args.seed, args.num_epochs + epoch) + utils.RANK)
        student.train()  # dropout draws from that seed, images from another
        meter = utils.EpochMetrics(run, loader)
        batches = meter.watch(loader.epoch_with_teacher(epoch))
        for step, (images, teacher_images, labels) in enumerate(batches, 1):
            parallel.require_backward_grad_sync = step % args.accumulate_steps == 0  # for DDP
            with utils.autocast(device, args):
                with torch.no_grad():
                    teacher_logits = models.forward(teacher, teacher_images)
                logits = models.forward(parallel, images)
                loss, ce, soft = models.distillation_loss(logits, teacher_logits, labels, args)
            scaler.scale(loss / args.accumulate_steps).backward()

            meter.add(train_loss=loss, ce_loss=ce, kd_loss=soft,
                      train_accuracy=models.accuracy(logits, labels))
            if step % train_baseline.DIAGNOSE_EVERY == 1:
                teacher_measured = models.teacher_diagnostics(teacher_logits, labels, args)
                meter.add(entropy=models.entropy(logits), **teacher_measured)
            if step % args.accumulate_steps:  # an epoch's batches are a multiple of it
                continue

            # One update: the fp16 scaler leaves it out where the gradient overflowed.
            scaler.unscale_(optimizer)
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            if ema:
                ema.update(student, step=scheduler.last_epoch)  # counts updates, whatever its name

        # History, best_model.pth, last.pth: from here the next run goes on.
        validated = ema.module if ema else student
        run.finish_epoch(meter.row() | train_baseline.validate(validated, val_loader), validated)
    return run.best_path


# The teacher --------------------------------------------------------------------------------------

def teacher_args(args):
    """The settings of the teacher's own fine-tuning, under the names train_baseline.train reads.
    Its seed is another than the student's, so that it does not teach on the very crops it learned,
    of which it is too sure. No label smoothing, which erases what the other classes have to say
    (Müller et al. 2019)."""
    unread = {"student_model", "student_weights", "distillation_loss", "temperature", "alpha",
              "kl_direction", "teacher_image_size", *config.TEACHER_ONLY}
    own = {name: value for name, value in vars(args).items() if name not in unread}
    own |= {"num_epochs": args.teacher_epochs, "learning_rate": args.teacher_learning_rate,
            "image_size": args.teacher_image_size or args.image_size,
            "seed": config.MAX_SEED - args.seed, "seeds": None, "fresh": args.fresh_teacher,
            "label_smoothing": 0.0}
    return argparse.Namespace(**own)


def train_teacher(args, data, device):
    """Path of the best weights of a former teacher that fits, or of one fine-tuned now."""
    own = teacher_args(args)
    folder = utils.run_folder("teacher", own)
    best = folder / "best_model.pth"
    with utils.lock_folder(folder):  # of several processes one trains it for all
        if train_baseline.is_finished(folder) and not args.fresh_teacher:
            unfit = models.teacher_mismatch(utils.load_checkpoint(best), args, data)
            if not unfit:
                return best
            print(f"the teacher in {folder} does not fit and will be moved aside: {unfit}")
        torch.manual_seed(own.seed)
        teacher = models.build_model(args.teacher_model, len(data.class_names), args.pretrained,
                                     args.teacher_weights).to(device)
        info = models.build_info("teacher", teacher, args.teacher_model, data, own)
        return train_baseline.train(teacher, info, data, own)


def load_teacher(path, args, data, device):
    """The frozen teacher of `path`, and what a student's checkpoint says about it. Raises UserError
    where it was trained on something else or knows too little to teach."""
    teacher, info = models.load_model(path)
    if unfit := models.teacher_mismatch(info, args, data):
        raise utils.UserError(f"{path} cannot teach here: {unfit}")
    accuracy, least = info["val_accuracy"], models.min_teacher_accuracy(info["num_classes"])
    print(f"teacher: {info['model_name']} from {path}, {accuracy:.2%} on validation images")
    if accuracy < least:
        raise utils.UserError(f"a teacher below {least:.1%} would teach noise; train it longer "
                              "(--teacher-epochs, --teacher-learning-rate, --fresh-teacher)")
    for baseline in models.student_checkpoints(Path(args.checkpoint_dir, "baseline")):
        rival = utils.load_checkpoint(baseline)
        score, same = rival["val_accuracy"], rival["split_fingerprint"] == info["split_fingerprint"]
        if same and score >= accuracy:
            print(f"warning: {baseline} reaches {score:.2%} without a teacher; this may not help")
    about = {"path": Path(path).as_posix(), "sha256": utils.sha256(path), "val_accuracy": accuracy}
    frozen = models.freeze_teacher(teacher, info["image_size"], utils.DTYPES[args.amp_dtype])
    return frozen.to(device), about


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("distillation", __doc__)))
