"""Train the student by the labels alone: the baseline of the comparison.

    python train_baseline.py            # EfficientNet-B0 on CIFAR-100
    python train_baseline.py --quick    # a complete small run on scikit-learn's digits, no download

Writes checkpoints/baseline/ and results/baseline_history.csv. After an interruption the same command goes on where
it stopped. `train` stands here and in train_distillation.py, the same to the letter, so that each reads alone.
"""
import sys

import data_loader
import models
import utils


def main():
    args = utils.parse_args("baseline", __doc__)
    device = utils.setup(args)
    data = data_loader.open_dataset(args)

    def objective(images, logits, labels):
        ce = models.cross_entropy(logits, labels, args.label_smoothing)
        return {"loss": ce, "ce_loss": ce}

    for run_args in utils.each_seed(args):
        utils.seed_everything(run_args.seed)
        student = models.build_model(args.student_model, len(data.class_names), args.pretrained, args.student_weights).to(device)
        info = models.describe("baseline", student, args.student_model, data, run_args)
        best = train(student, objective, info, data, run_args, args.fresh)
    utils.choose_best(args, info)
    print(f"the baseline is in {best}; next: python train_distillation.py{' --quick' if args.quick else ''}")


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
