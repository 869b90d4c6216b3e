"""A control: distillation from a teacher whose logits of the wrong classes are shuffled, anew for
each image and step. What it still gains over the baseline is not knowledge of which classes look
alike.

    python results/example/control.py --distillation-loss lskd ...

It takes the flags of train_distillation.py.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder
import config  # noqa: E402
import models  # noqa: E402
import train_distillation  # noqa: E402
import utils  # noqa: E402

cross_entropy = models.cross_entropy
distill_loss = models.distill_loss
labels_of_step = None


def noting_cross_entropy(logits, labels, label_smoothing=0.0):
    """As models.cross_entropy. The training loop calls it just before the distillation loss, which
    is not given the labels, so they are noted here."""
    global labels_of_step
    labels_of_step = labels
    return cross_entropy(logits, labels, label_smoothing)


def shuffled_distill_loss(student_logits, teacher_logits, args):
    """As models.distill_loss, with the teacher's wrong classes shuffled."""
    return distill_loss(student_logits, shuffle_wrong_classes(teacher_logits, labels_of_step), args)


def shuffle_wrong_classes(logits, labels):
    """`logits` (B, C) with each image's own logit at its class of `labels` (B,), and its other
    logits in another order."""
    num_classes = logits.shape[1]
    wrong = torch.arange(num_classes - 1, device=labels.device)
    wrong = wrong + (wrong >= labels[:, None])  # (B, C - 1): all classes but the true one

    others = logits.gather(1, wrong)
    order = torch.rand(others.shape, device=others.device).argsort(1)
    return logits.scatter(1, wrong, others.gather(1, order))


def main(args):
    models.cross_entropy = noting_cross_entropy
    models.distill_loss = shuffled_distill_loss
    train_distillation.main(args)


if __name__ == "__main__":
    sys.exit(utils.run_script(main, config.parse_args("distillation", __doc__)))
