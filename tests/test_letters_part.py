"""The letters that are drawn, and the seeds of --quick."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import config
import data_loader
from conftest import ROOT

# To append to tests/test_data_loader.py -----------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "test"])
def test_letters_are_as_many_of_each_class(part):
    images, class_names = data_loader.load_split("Letters", part, None)
    count = data_loader.LETTER_COUNTS[part]
    assert class_names == list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert images.pixels.shape == (36 * count, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.bincount().tolist() == [count] * 36
    assert torch.equal(images.pixels[:, 0], images.pixels[:, 2])  # grey


def test_letters_train_on_crops_without_their_test_images(arguments):
    args = arguments("baseline", "--dataset-name", "Letters")
    data = data_loader.open_dataset(args)
    test, _ = data_loader.load_split("Letters", "test", args)
    assert data.augmentation == "crop"
    assert len(test.labels) >= 3600
    assert not data_loader.duplicates_of_training_images(test, data)


def test_another_process_draws_the_same_letters():
    code = ("import data_loader, hashlib; "
            "print(hashlib.sha256(data_loader.draw_letters('train')[0].numpy()).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pixels, _ = data_loader.draw_letters("train")
    assert other.stdout.strip() == hashlib.sha256(pixels.numpy()).hexdigest()


def test_letters_are_those_of_every_machine():
    """Grey levels at edges may depend on the version of FreeType; what is drawn where may not."""
    pixels, labels = data_loader.draw_letters("test")
    grey = pixels[:, 0].float()
    assert labels[:3].tolist() == [0, 1, 2]
    np.testing.assert_allclose(grey.mean(), 27.78, atol=0.3)

    # The centres of mass of the first letters, in px.
    line = torch.arange(32.0)
    ink = (grey[:5] - 128).clamp(min=0)
    mass = ink.sum((1, 2))
    rows = (ink.sum(2) * line).sum(1) / mass
    columns = (ink.sum(1) * line).sum(1) / mass
    centers = [[16.3, 16.8], [13.0, 17.3], [15.8, 11.9], [18.3, 16.6], [14.8, 12.5]]
    np.testing.assert_allclose(torch.stack([rows, columns], 1), centers, atol=0.5)


def test_fingerprint_of_letters_does_not_depend_on_pixels(arguments, monkeypatch):
    args = arguments("baseline", "--dataset-name", "Letters")
    fingerprint = data_loader.open_dataset(args).split_fingerprint
    draw_letters = data_loader.draw_letters

    def draw_other_greys(part):
        pixels, labels = draw_letters(part)
        return pixels ^ 1, labels

    monkeypatch.setattr(data_loader, "draw_letters", draw_other_greys)
    assert data_loader.open_dataset(args).split_fingerprint == fingerprint


@pytest.mark.parametrize("name", data_loader.TYPEFACES)
def test_every_typeface_has_36_different_letters(name):
    font = data_loader.load_typeface(name, 40)
    pictures = set()
    for letter in [*data_loader.LETTERS, "\uffff"]:  # the last is the sign of a missing letter
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 32), letter, 255, font, anchor="mm")
        pictures.add(image.tobytes())
    assert len(pictures) == 37


# To append to tests/test_config.py ----------------------------------------------------------------

@pytest.mark.parametrize("script", ["baseline", "distillation"])
def test_quick_trains_its_own_seeds_unless_others_are_given(script):
    def seeds(*flags):
        args = config.parse_args(script, "", list(flags))
        return args.seeds, args.seed

    quick_seeds = list(config.QUICK["SEEDS"])
    assert seeds("--quick") == (quick_seeds, quick_seeds[0])
    assert seeds("--quick", "--seeds", "4", "5") == ([4, 5], 4)
    assert seeds("--quick", "--seed", "7") == (None, 7)
    assert seeds("--seed=7", "--quick") == (None, 7)
    assert seeds() == (None, config.SEED)


@pytest.mark.parametrize("wrong", [None, 3, "0 1", [0, -1], [0.5], [1, 1]])
def test_quicks_seeds_are_checked(capsys, monkeypatch, wrong):
    monkeypatch.setitem(config.QUICK, "SEEDS", wrong)
    with pytest.raises(SystemExit) as error:
        config.parse_args("baseline", "", ["--quick"])
    assert error.value.code == 2
    assert "seed" in capsys.readouterr().err.lower()
