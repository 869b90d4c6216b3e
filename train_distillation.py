"""Train the student by a teacher and the labels: the distilled side of the comparison.

    python train_distillation.py            # EfficientNet-B0 taught by EfficientNet-B2, on CIFAR-100
    python train_distillation.py --quick    # a complete small run on scikit-learn's digits, no download

Fine-tunes the teacher first where checkpoints/teacher/ holds none that fits, then trains the student. Writes
checkpoints/distilled/ and results/distilled_history.csv. After an interruption the same command goes on where it
stopped. `train` stands here and in train_baseline.py, the same to the letter, so that each reads alone.
"""
import sys
from pathlib import Path

import torch

import data_loader
import models
import utils


def main():
    args = utils.parse_args("distillation", __doc__)
    device = utils.setup(args)
    data = data_loader.open_dataset(args)
    if args.distillation_loss == "lskd" and len(data.class_names) == 2:
        raise utils.WrongUse("--distillation-loss lskd says the same of every image where there are two classes; choose kd, dkd or dist")

    teacher_file = args.teacher_checkpoint or find_teacher(args, data) or train_teacher(args, data, device)
    teacher, about_teacher = load_teacher(teacher_file, args, data, device)

    def objective(images, logits, labels):
        return distill(teacher, images, logits, labels, args)

    for run_args in utils.each_seed(args):
        utils.seed_everything(run_args.seed)
        student = models.build_model(args.student_model, len(data.class_names), args.pretrained, args.student_weights).to(device)
        info = models.describe("distilled", student, args.student_model, data, run_args, teacher=about_teacher)
        best = train(student, objective, info, data, run_args, args.fresh)
    utils.choose_best(args, info)
    print(f"the distilled student is in {best}; next: python evaluate.py{' --quick' if args.quick else ''}")


def distill(teacher, images, logits, labels, args):
    """The student's objective: what it shares with `teacher` on the same pictures, and the labels; how the teacher did."""
    with torch.no_grad():
        teacher_logits = utils.forward(teacher, images[1] if isinstance(images, tuple) else images)
        targets = (models.standardise(teacher_logits) if args.distillation_loss == "lskd" else teacher_logits) / args.temperature
    measured = models.distillation_loss(logits, teacher_logits, labels, args.temperature, args.alpha, args.kl_direction,
                                        args.label_smoothing, args.distillation_loss)
    measured |= {f"teacher_{name}": value for name, value in utils.diagnose(teacher_logits, labels).items()}
    return measured | {"target_entropy": utils.diagnose(targets, labels)["entropy"]}


def find_teacher(args, data):
    """Path of the teacher of a former run where it is finished and fits, else None."""
    folder = utils.run_folder("teacher", utils.teacher_args(args))
    if args.fresh_teacher or not utils.is_finished(folder):
        return None
    unfit = models.why_unfit(utils.load_file(folder / "best_model.pth"), args, data)
    if unfit:
        print(f"the teacher in {folder} does not fit: {unfit}")
    return None if unfit else folder / "best_model.pth"


def train_teacher(args, data, device):
    """Fine-tune the teacher on the labels, after a rehearsal of the student's step; return the path of its best weights."""
    utils.seed_everything(utils.teacher_args(args).seed)
    teacher = models.build_model(args.teacher_model, len(data.class_names), args.pretrained, args.teacher_weights).to(device)
    student = models.build_model(args.student_model, len(data.class_names), args.pretrained, args.student_weights).to(device)

    info = models.describe("distilled", student, args.student_model, data, args)
    loaders = data_loader.training_loader(data, info, args, device), data_loader.evaluation_loader(data.val, info, args, device)
    utils.rehearse(student, lambda *batch: distill(teacher.eval(), *batch, args), *loaders, info, args)
    del student, loaders

    def objective(images, logits, labels):
        ce = models.cross_entropy(logits, labels, args.label_smoothing)
        return {"loss": ce, "ce_loss": ce}

    name, args = args.teacher_model, utils.teacher_args(args)
    info = models.describe("teacher", teacher, name, data, args)
    return train(teacher, objective, info, data, args, args.fresh)


def load_teacher(path, args, data, device):
    """The frozen teacher of `path`, and what a student's checkpoint says about it: path, SHA-256, validation accuracy.

    Raises UserError where it was trained on something else or knows too little to teach.
    """
    teacher, info = models.load_model(path, device)
    unfit = models.why_unfit(info, args, data)
    if unfit:
        raise utils.UserError(f"{path} cannot teach here: {unfit}")
    accuracy, least = info["val_accuracy"], models.least_accuracy(info["num_classes"])
    print(f"teacher: {info['model_name']} from {path}, {accuracy:.2%} on validation images")
    if accuracy < least:
        raise utils.UserError(f"a teacher below {least:.1%} on {info['num_classes']} classes would teach noise; train it "
                              "longer (--teacher-epochs, --teacher-learning-rate, --fresh-teacher)")
    for baseline in utils.student_checkpoints(Path(args.checkpoint_dir, "baseline")):
        other = utils.load_file(baseline)
        if other["split_fingerprint"] == info["split_fingerprint"] and other["val_accuracy"] >= accuracy:
            print(f"warning: {baseline} reaches {other['val_accuracy']:.2%} without a teacher; this one may not help")
    return models.freeze(teacher), {"path": Path(path).as_posix(), "sha256": utils.sha256(path), "val_accuracy": accuracy}


def train(model, objective, info, data, args, fresh):
    """Train `model` by `objective` for args.num_epochs, or what is left of them; return the path of its best weights.

    objective(images, logits, labels) returns a dict of 0-d tensors, "loss" and "ce_loss" among them. `info` is what
    the checkpoint says of itself (models.describe). A former run is gone on with where it fits, else moved aside.
    """
    last = utils.open_run(info, args, fresh)
    best = utils.run_folder(info["run"], args) / "best_model.pth"
    if last and last["progress"]["epoch"] == args.num_epochs:
        print(f"{info['run']}: already trained with these settings; --fresh trains it anew")
        return best

    device = model.pixel_mean.device
    loader = data_loader.training_loader(data, info, args, device)
    val_loader = data_loader.evaluation_loader(data.val, info, args, device)
    utils.check_room(model, info, args)
    utils.rehearse(model, objective, loader, val_loader, info, args)
    state = utils.new_state(model, len(loader), args)
    progress = utils.restore(last, state) if last else utils.new_progress()
    step = utils.training_step(state, objective, args)

    while progress["epoch"] < args.num_epochs:
        row = utils.train_one_epoch(state, step, loader, progress, lambda: utils.save_last(state, progress, info, args),
                                    args.save_minutes)
        row |= utils.validate(state.validated, val_loader)
        utils.finish_epoch(state, progress, row, info, args)
    return best


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
