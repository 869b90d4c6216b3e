"""Train the student by distillation, on a teacher's outputs as well as on the labels.

    python train_distillation.py            # EfficientNet-B0 distilled from B2, on CIFAR-100
    python train_distillation.py --quick    # a complete small run on drawn letters

Fine-tunes the teacher first, unless checkpoints/teacher/ has a finished one of the same model,
image size, classes and split. Writes checkpoints/distilled/ and results/distilled_history.csv; with
--seeds, each seed has its own checkpoints/distilled/seed_<n>/ and results/seed_<n>/. Copies the
best student so far to checkpoints/best_model.pth. After an interruption the same command, without
--fresh and --fresh-teacher, resumes after the last finished epoch.
"""
import argparse
import sys
from pathlib import Path

import torch

import config
import data_loader
import models
import train_baseline
import utils


def main(args):
    device = utils.setup(args)  # also replaces "auto" in args by what it chooses
    folders = [utils.run_folder("distilled", run_args)
               for run_args in train_baseline.args_of_each_seed(args)]
    if args.teacher_checkpoint is None:
        folders.append(utils.run_folder("teacher", teacher_args(args)))
    train_baseline.check_weight_files(args, folders)
    data = data_loader.open_dataset(args)
    num_classes = len(data.class_names)
    if args.distillation_loss == "lskd" and num_classes == 2:
        # Standardised, two logits are always 0.71 and -0.71: no matter how sure the teacher is.
        raise utils.UsageError("--distillation-loss lskd cannot be used with two classes, since "
                               "standardisation removes the teacher's confidence")

    # What is wrong with the student should show before its teacher is trained for hours.
    records = train_baseline.student_records(args, data)
    train_baseline.warn_of_unfair_pair(records, "baseline", args)
    check_student(args, num_classes)

    teacher_path = args.teacher_checkpoint
    if teacher_path is None:
        teacher_path = find_or_train_teacher(args, data, device)
    teacher, teacher_record = prepare_teacher(teacher_path, args, data, device)

    for run_args in train_baseline.args_of_each_seed(args):
        # Seeded right before building, as in train_baseline.main: both students start from the
        # same weights.
        torch.manual_seed(run_args.seed)
        student = models.build_model(run_args.student_model, num_classes, run_args.pretrained,
                                     run_args.student_weights)
        # Recorded for GradCAM recipes. It also checks that the model can take images of this size.
        gradcam_layer = models.gradcam_layer(student, run_args.image_size)
        student.to(device)
        info = models.build_info("distilled", student, run_args.student_model, data, run_args,
                                 gradcam_layer=gradcam_layer, teacher=teacher_record)
        train(student, teacher, info, data, run_args)

    # `info` is that of the last seed; dataset, classes and split are the same for all seeds.
    models.export_best_student(args.checkpoint_dir, info)
    command = train_baseline.next_command(records, "baseline", args)
    folder = Path(args.checkpoint_dir, "distilled")
    print(f"the distilled student is in {folder}; next: {command}")


def train(student, teacher, info, data, args):
    """Like train_baseline.train, but with a frozen `teacher`, which sees the same crops of the same
    images, perhaps at another size. The loop is written out again. It differs in the lines about
    the teacher and the distillation loss."""
    run = utils.Run(info, train_baseline.run_identity(info), args)
    run.tidy_after_a_kill()
    if run.finished:
        print(f"{run.title}: already trained with these settings; --fresh trains it again")
        return run.best_path

    # Data
    device = next(student.parameters()).device
    train_loader = data_loader.TrainingLoader(data, info, args, device)
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)

    # Optimizer, schedule, scaler (which does nothing unless fp16), EMA
    updates_per_epoch = len(train_loader) // args.accumulate_steps
    optimizer = train_baseline.build_optimizer(student, args)
    scheduler = train_baseline.build_scheduler(optimizer, updates_per_epoch, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp_dtype == "fp16")
    ema = train_baseline.EMA(student, args.ema_decay) if args.ema_decay else None
    model_to_save = ema.module if ema else student

    # Load the states of an interrupted run. From here on they are saved with every epoch.
    run.restore(model=student, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema)
    run.warn_if_disk_is_short(student)

    # For speed on an NVIDIA GPU: replaces `forward` of both by CUDA graphs. A graph only runs in
    # the mode it was captured in: the student's in train mode, the teacher's in eval mode, in which
    # a frozen teacher always is. With several GPUs: `ddp_student` also averages the gradients.
    student.train()
    models.capture_cuda_graph(student, args.image_size, args)
    models.capture_cuda_graph(teacher, args.teacher_image_size, args)
    ddp_student = models.wrap_ddp(student)  # `student` itself, unless under torchrun
    parameters = list(student.parameters())  # made once, since it walks through all modules

    # Training loop
    for epoch in range(len(run.history), args.num_epochs):
        student.train()
        train_baseline.seed_dropout(args, epoch)  # the loader seeds the augmentation itself
        metrics = utils.EpochMetrics(args.batch_size, device)
        progress = utils.progress_bar(train_loader.epoch_with_teacher(epoch), len(train_loader),
                                      epoch)
        for step, (images, teacher_images, labels) in enumerate(progress, start=1):
            is_update_step = step % args.accumulate_steps == 0
            if utils.WORLD_SIZE > 1:
                # DDP averages gradients over the processes only in a step with an update.
                ddp_student.require_backward_grad_sync = is_update_step

            with utils.autocast(device, args):
                with torch.no_grad():
                    teacher_logits = models.forward(teacher, teacher_images)
                logits = models.forward(ddp_student, images)
                ce_loss = models.cross_entropy(logits, labels, args.label_smoothing)
                distill_loss = models.distill_loss(logits, teacher_logits, args)
                # distill_loss already includes the factor T^2.
                loss = args.alpha * distill_loss + (1 - args.alpha) * ce_loss
            scaler.scale(loss / args.accumulate_steps).backward()

            learning_rate = optimizer.param_groups[0]["lr"]  # of this step; update() changes it
            if is_update_step:
                train_baseline.update(parameters, optimizer, scheduler, scaler, ema, args)

            metrics.add(train_loss=loss, ce_loss=ce_loss, distill_loss=distill_loss,
                        train_accuracy=models.accuracy(logits, labels))
            if (step - 1) % train_baseline.DIAGNOSE_EVERY == 0:  # as in the baseline
                metrics.add(entropy=models.entropy(logits),
                            **models.teacher_diagnostics(teacher_logits, labels, args))

            if step % train_baseline.LOG_EVERY == 0 or step == len(train_loader):
                where = f"by step {step} of epoch {epoch + 1}, learning rate {learning_rate:.2e}"
                utils.check_finite(metrics.means()["train_loss"], where)
                utils.check_scale(scaler, where)
                progress.set_postfix_str(metrics.progress_text())
                run.print_estimate(metrics, len(train_loader))

        # Validate, then save best_model.pth, last.pth and the history. The next start resumes here.
        row = metrics.row()
        row["learning_rate"] = learning_rate  # of the last step
        row |= train_baseline.validate(model_to_save, val_loader)
        run.finish_epoch(row, model_to_save)

    return run.best_path


def check_student(args, num_classes):
    """Raise UserError if the student cannot be built, or cannot take images of its size."""
    student = models.build_model(args.student_model, num_classes, args.pretrained,
                                 args.student_weights)
    models.gradcam_layer(student, args.image_size)  # runs it once


# The teacher --------------------------------------------------------------------------------------

def teacher_args(args):
    """The settings of the teacher's fine-tuning, in the form that train_baseline.train expects."""
    # Left out: settings that do not affect the teacher, since a change of one would make an
    # unfinished teacher start over; and TEACHER_*, which get the names that train_baseline.train
    # reads.
    left_out = {"student_model", "student_weights", "distillation_loss", "temperature", "alpha",
                "kl_direction", "teacher_image_size", *config.TEACHER_ONLY}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings["num_epochs"] = args.teacher_epochs
    settings["learning_rate"] = args.teacher_learning_rate
    settings["image_size"] = args.teacher_image_size
    settings["weights"] = args.teacher_weights  # recorded only, so that others are another run
    settings["seeds"] = None
    settings["fresh"] = args.fresh_teacher
    # Not the student's seed: with it the student would see the very crops that the teacher was
    # trained on, and on these the teacher is overconfident. MAX_SEED is odd, so this is never equal
    # to args.seed.
    settings["seed"] = config.MAX_SEED - args.seed
    # With label smoothing its outputs would say less about similar classes (Müller et al. 2019).
    settings["label_smoothing"] = 0.0
    return argparse.Namespace(**settings)


def find_or_train_teacher(args, data, device):
    """Return the path of a finished teacher that fits; fine-tune one if there is none. A teacher
    that does not fit is moved aside, and an unfinished run is resumed, by train_baseline.train."""
    run_args = teacher_args(args)
    folder = utils.run_folder("teacher", run_args)
    best_path = folder / "best_model.pth"
    # Meanwhile another process waits, and then reuses this teacher.
    with utils.lock_folder(folder):
        if not args.fresh_teacher and utils.is_finished(folder):
            _, info = models.load_model(best_path)
            mismatch = models.teacher_mismatch(info, args, data)
            if not mismatch:
                print_changed_settings(info, run_args, folder)
                return best_path
            print(f"the teacher in {folder} does not fit and will be moved aside: {mismatch}")

        torch.manual_seed(run_args.seed)
        teacher = models.build_model(args.teacher_model, len(data.class_names), args.pretrained,
                                     args.teacher_weights)
        gradcam_layer = models.gradcam_layer(teacher, run_args.image_size)
        teacher.to(device)
        info = models.build_info("teacher", teacher, args.teacher_model, data, run_args,
                                 gradcam_layer=gradcam_layer)
        return train_baseline.train(teacher, info, data, run_args)


def print_changed_settings(info, args, folder):
    """Say so if a finished teacher is reused although its settings are not those of `args`."""
    # teacher_args has changed these names.
    original_names = {"num_epochs": "teacher_epochs", "learning_rate": "teacher_learning_rate",
                      "weights_sha256": "SHA-256 of teacher_weights"}
    # The seed follows that of the student, but one teacher serves all of them.
    irrelevant = config.MAY_CHANGE_ON_RESUME | {"seed"}
    changed = []
    for name, value in models.recorded_settings(args).items():
        previous = info["config"].get(name)
        if name not in irrelevant and previous != value:
            changed.append(f"{original_names.get(name, name)} {previous} instead of {value}")
    if changed:
        print(f"note: the teacher in {folder} is reused, although it was trained with "
              f"{', '.join(changed)}; --fresh-teacher trains a new one")


def prepare_teacher(path, args, data, device):
    """Load, check and freeze the teacher of `path`. Return it, on `device`, and a record of it for
    the student's checkpoint. Raises UserError if it does not match the data or is too inaccurate.

    There are three kinds: the teacher that this project keeps in checkpoints/teacher/, another
    best_model.pth (args.teacher_checkpoint), and an external one, in a file without metadata
    (args.teacher_checkpoint too). The accuracy of the last two is measured here.
    """
    teacher, info = models.load_teacher_model(path, args.teacher_model, len(data.class_names))
    is_external = info is None  # not trained by this project
    if is_external:
        run_args = teacher_args(args)
        gradcam_layer = models.gradcam_layer(teacher, run_args.image_size)
        info = models.build_info("teacher", teacher, args.teacher_model, data, run_args,
                                 gradcam_layer=gradcam_layer)
        for name in ("config", "versions"):
            del info[name]  # they are those of this run, not of the teacher's training
        print(f"warning: {path} may have been trained on images that are used for validation here")
    else:
        mismatch = models.teacher_mismatch(info, args, data)
        if mismatch:
            raise utils.UserError(f"{path} cannot be the teacher: {mismatch}")

    if args.teacher_checkpoint:
        accuracy = measure_teacher(teacher, info, data, args, device)
    else:
        accuracy = info["val_accuracy"]  # measured by its own run, on the same images
    print(f"teacher: {info['model_name']} from {path}, {accuracy:.2%} on validation images")
    check_teacher_accuracy(accuracy, data, args)
    warn_if_baseline_is_as_good(accuracy, info, args)

    frozen = models.freeze_teacher(teacher, info["image_size"], utils.DTYPES[args.amp_dtype])
    record = {"path": Path(path).as_posix(), "sha256": utils.sha256(models.weight_file(path)),
              "val_accuracy": accuracy}
    if is_external:
        record["info"] = info  # evaluate.py needs it to load the teacher again
    return frozen.to(device), record


def measure_teacher(teacher, info, data, args, device):
    """Measure the accuracy of `teacher` on the validation images. It starts and ends on the CPU,
    where models.freeze_teacher needs it."""
    val_loader = data_loader.EvaluationLoader(data.val, info, args, device)
    logits, labels = models.infer(teacher.to(device), val_loader)
    teacher.cpu()
    return models.accuracy(logits, labels).item()


def check_teacher_accuracy(accuracy, data, args):
    """Raise UserError if the teacher is close to chance level on the validation images."""
    class_sizes = data.val.labels.bincount()
    chance = (class_sizes.max() / class_sizes.sum()).item()  # of predicting the largest class
    limit = models.min_useful_accuracy(chance)
    if accuracy > limit:
        return
    if args.teacher_checkpoint:
        advice = ("if it was better elsewhere, its classes may be in a different order (here it is "
                  "that of the sorted folder names, or the dataset's own), or it was trained on "
                  "images of a different size")
    else:
        advice = ("train it again with --fresh-teacher, and longer (--teacher-epochs) or with "
                  "another --teacher-learning-rate")
    raise utils.UserError(f"a teacher of {limit:.1%} or less is too close to chance level "
                          f"({chance:.1%}) and would teach noise; {advice}")


def warn_if_baseline_is_as_good(teacher_accuracy, teacher_info, args):
    """Print a warning for each baseline on the same split that is as good as the teacher."""
    for path in models.student_checkpoints(Path(args.checkpoint_dir, "baseline")):
        try:
            _, baseline = models.load_model(path)
        except utils.UserError:
            continue  # a damaged baseline is no reason to stop here; evaluate.py will say so
        has_same_split = baseline["split_fingerprint"] == teacher_info["split_fingerprint"]
        if has_same_split and baseline["val_accuracy"] >= teacher_accuracy:
            print(f"warning: {path} reaches {baseline['val_accuracy']:.2%} without a teacher; "
                  "distillation may not help")


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("distillation", __doc__)))
