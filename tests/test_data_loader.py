"""Datasets, split, preprocessing and loaders, against torchvision, Pillow and generated files.

    python -m pytest tests/test_data_loader.py -m "not slow"
"""
import contextlib
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import ExifTags, Image, ImageDraw, ImageOps, PngImagePlugin, features
from sklearn.model_selection import train_test_split

import data_loader
import utils
from conftest import ROOT, members_of_group, wait_until, write_pictures

CPU = torch.device("cpu")
FLAGS = ["--dataset-name", "ImageFolder", "--val-fraction", "0.25", "--batch-size", "4",
         "--num-workers", "0"]
INFO = {"image_size": 32, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 10}


def folder_args(arguments, folder, *flags):
    return arguments("baseline", *FLAGS, "--dataset-dir", str(folder), *flags)


def synthetic(pixels, augmentation):
    """A dataset of these pixels (N, 3, H, H), each image a class of its own."""
    images = data_loader.Images(pixels, None, torch.arange(len(pixels)))
    return data_loader.Dataset("synthetic", [], images, images, "", augmentation)


def open_few(args, count=128):
    """The dataset of args with only its first training images, for tests of whole epochs."""
    data = data_loader.open_dataset(args)
    return data._replace(train=data.train.select(torch.arange(count)))


def make_loader(data, args, device=CPU, **info):
    return data_loader.TrainingLoader(data, INFO | info, args, device)


def stop_workers(loader):
    """At once, where an epoch was left early: the garbage collector would wait for 5 s."""
    if loader.source.loader._iterator:
        loader.source.loader._iterator._shutdown_workers()


def load_test(args):
    images, _ = data_loader.load_split(args.dataset_name, "test", args)
    return images


def without_teacher(batches):
    return [(images, labels) for images, _, labels in batches]


def join_batches(batches, count):
    """Each `count` batches in a row as one."""
    groups = [batches[i:i + count] for i in range(0, len(batches), count)]
    return [[torch.cat(tensors) for tensors in zip(*group, strict=True)] for group in groups]


def assert_equal_batches(one, other):
    """Both are the same batches to the bit, at least one; returns how many."""
    number = 0
    for batch, other_batch in zip(one, other, strict=True):
        for tensor, other_tensor in zip(batch, other_batch, strict=True):
            assert torch.equal(tensor, other_tensor)
        number += 1
    assert number
    return number


def bytes_of(images):
    return {image.numpy().tobytes() for image in images}


# Resizing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 64, 48, 32, 20])
def test_resizing_agrees_with_pil(size, interpolation):
    """Real edges and noise: PIL rounds to bytes twice, so within 1.5/255, 0.4/255 in the mean."""
    generator = np.random.default_rng(0)
    pixels = np.kron(generator.integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    pixels[::2] = generator.integers(0, 256, (16, 32, 3))
    mode = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), mode))

    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    resized = data_loader.resize(images, size, interpolation)
    assert resized.is_contiguous(memory_format=torch.channels_last)
    difference = np.abs(resized[0].permute(1, 2, 0).numpy() - expected / 255)
    assert difference.max() < 1.5 / 255
    assert difference.mean() < 0.4 / 255


# Split --------------------------------------------------------------------------------------------

def test_split_is_stratified_and_follows_split_seed_alone(arguments):
    one = data_loader.open_dataset(arguments("baseline", "--seed", "1"))
    two = data_loader.open_dataset(arguments("baseline", "--seed", "2", "--batch-size", "8"))
    other = data_loader.open_dataset(arguments("baseline", "--split-seed", "1"))
    assert one.split_fingerprint == two.split_fingerprint != other.split_fingerprint
    assert torch.equal(one.val.pixels, two.val.pixels)
    assert not torch.equal(one.val.pixels, other.val.pixels)

    counts = torch.bincount(one.val.labels)
    assert counts.max() - counts.min() <= 1
    assert len(one.train.labels) + len(one.val.labels) == 1437
    assert not bytes_of(one.train.pixels) & bytes_of(one.val.pixels)


def test_split_stays_the_same_from_version_to_version(arguments):
    """Checkpoints record the fingerprint: with another one a teacher would be trained anew."""
    data = data_loader.open_dataset(arguments("baseline"))
    assert data.split_fingerprint.startswith("9260df50bd7e")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("counts", [(100, 60, 3), (2, 2, 2), (2, 500), (7, 300, 2, 2), (50,) * 10])
def test_each_class_is_on_both_sides(counts, fraction):
    """Of 100, 60 and 3 pictures a tenth is 11, 6 and 0 to scikit-learn. Where it gives each class
    an image on both sides, the split is its own."""
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(20):
        train, val = data_loader.stratified_split(labels, fraction, seed)
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
        assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
        in_train = np.bincount(labels[train], minlength=len(counts))
        in_val = np.bincount(labels[val], minlength=len(counts))
        assert in_train.min() >= 1 and in_val.min() >= 1
        assert np.abs(in_val - fraction * np.array(counts)).max() <= max(2, len(counts))

        try:
            expected = train_test_split(np.arange(len(labels)), test_size=fraction,
                                        stratify=labels, random_state=seed)
        except ValueError:  # fewer images than classes on one side
            continue
        if all(len(np.unique(labels[part])) == len(counts) for part in expected):
            assert np.array_equal(train, np.sort(expected[0]))
            assert np.array_equal(val, np.sort(expected[1]))


def test_image_of_a_small_class_follows_the_split_seed():
    """scikit-learn gives none of three images to validation; any of them can be moved there."""
    labels = np.repeat([0, 1, 2], [100, 60, 3])
    moved = set()
    for seed in range(30):
        _, val = data_loader.stratified_split(labels, 0.1, seed)
        moved |= set(val[labels[val] == 2].tolist())
        _, again = data_loader.stratified_split(labels, 0.1, seed)
        assert np.array_equal(val, again)
    assert moved == {160, 161, 162}


@pytest.mark.parametrize("count, is_warned", [(100, True), (1500, False)])
def test_few_validation_images_are_warned_about(arguments, monkeypatch, capsys, count, is_warned):
    images = data_loader.Images(torch.zeros(2 * count, 3, 8, 8, dtype=torch.uint8), None,
                                torch.arange(2 * count) % 2)
    monkeypatch.setattr(data_loader, "load_split", lambda *_: (images, ["a", "b"]))
    data_loader.open_dataset(arguments("baseline", "--val-fraction", "0.1"))
    out = capsys.readouterr().out
    assert f"{2 * count // 10} validation images" in out
    assert ("warning" in out) == is_warned


def test_digits_test_part_is_a_fixed_fifth_that_training_does_not_hold(arguments):
    args = arguments("baseline")
    test, names = data_loader.load_split("Digits", "test", args)
    data = data_loader.open_dataset(args)
    assert len(test.labels) == 360
    assert names == [str(i) for i in range(10)]
    assert not bytes_of(test.pixels) & bytes_of(torch.cat([data.train.pixels, data.val.pixels]))


def test_augmentation_suits_the_images(arguments, tmp_path):
    photographs = write_pictures(tmp_path / "photographs")
    small = write_pictures(tmp_path / "small", sizes=((32, 32),))
    assert data_loader.open_dataset(arguments("baseline")).augmentation == "crop"
    for folder, expected in ((photographs, "resized_crop"), (small, "flip_crop")):
        assert data_loader.open_dataset(folder_args(arguments, folder)).augmentation == expected
    with pytest.raises(utils.UsageError, match="--augmentation crop .*resized_crop"):
        data_loader.open_dataset(folder_args(arguments, photographs, "--augmentation", "crop"))


@pytest.mark.parametrize("flags", [["--batch-size", "1294", "--accumulate-steps", "1"],
                                   ["--batch-size", "432", "--accumulate-steps", "3"]])
def test_an_update_of_more_images_than_there_are_is_refused(arguments, flags):
    with pytest.raises(utils.UsageError, match=f"{' '.join(flags)} .*1293"):
        data_loader.open_dataset(arguments("baseline", *flags))


# Training batches ---------------------------------------------------------------------------------

def test_epoch_follows_from_seed_and_number_alone(arguments):
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    loader = make_loader(data, args)
    number = assert_equal_batches(loader.epoch(3), make_loader(data, args).epoch(3))
    assert number == len(loader) == len(data.train.labels) // 64

    first, _ = next(loader.epoch(3))
    next_epoch, _ = next(loader.epoch(4))
    other_args = arguments("baseline", "--augmentation", "flip_crop", "--seed", "6")
    other_seed, _ = next(make_loader(data, other_args).epoch(3))
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(first, other_seed)


def test_no_two_seeds_share_an_epoch(arguments):
    """Nor is the next epoch of one seed that of the next seed."""
    orders = set()
    for seed in range(3):
        args = arguments("baseline", "--seed", seed)
        loader = make_loader(synthetic(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), "none"), args)
        for epoch in range(3):
            _, labels = next(loader.epoch(epoch))
            orders.add(tuple(labels.tolist()))
    assert len(orders) == 9


def test_no_seed_is_used_twice(arguments, monkeypatch):
    """Neither that of an epoch nor that of a mixed batch."""
    seeds = []

    def noting(*numbers):
        seeds.append(derive_seed(*numbers))
        return seeds[-1]

    derive_seed = data_loader.derive_seed
    monkeypatch.setattr(data_loader, "derive_seed", noting)
    args = arguments("baseline", "--mixup-alpha", "0.8")
    loader = make_loader(data_loader.open_dataset(args), args)
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) > 2
    assert len(seeds) == len(set(seeds)) == 2 * (1 + len(loader))


@pytest.mark.parametrize("mixing", [["--mixup-alpha", "0.8"], ["--cutmix-alpha", "1"], []])
@pytest.mark.parametrize("augmentation", ["none", "crop", "flip_crop", "resized_crop"])
def test_epoch_does_not_depend_on_what_was_drawn_before(arguments, augmentation, mixing):
    """Neither before it nor between two of its batches, from any of the global generators."""
    args = arguments("baseline", "--augmentation", augmentation, *mixing)
    data = open_few(args)

    def disturbed_epoch(seed):
        for batch in make_loader(data, args).epoch(1):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield batch

    list(make_loader(data, args).epoch(0))
    assert_equal_batches(disturbed_epoch(1), disturbed_epoch(2))


@pytest.mark.parametrize("augmentation", ["flip_crop", "resized_crop"])
def test_accumulated_batches_are_the_large_batch(arguments, augmentation):
    """Four batches of 8 are the batch of 32 to the bit, whole updates only."""
    flags = ["--augmentation", augmentation]
    one = arguments("baseline", *flags, "--batch-size", "32")
    four = arguments("baseline", *flags, "--batch-size", "8", "--accumulate-steps", "4")
    data = open_few(one, count=173)
    large = list(make_loader(data, one).epoch(2))
    small = list(make_loader(data, four).epoch(2))
    assert len(make_loader(data, four)) == len(small) == 4 * len(large) == 20  # of 173 // 8 = 21
    assert_equal_batches(join_batches(small, 4), large)


def test_accumulated_batches_of_photographs_are_the_large_batch(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    one = folder_args(arguments, folder, "--batch-size", "6")
    three = folder_args(arguments, folder, "--batch-size", "2", "--accumulate-steps", "3")
    data = data_loader.open_dataset(one)
    small = list(make_loader(data, three).epoch(2))
    assert len(small) == len(make_loader(data, three)) == 9  # 18 images
    assert_equal_batches(join_batches(small, 3), make_loader(data, one).epoch(2))


@pytest.mark.parametrize("augmentation", ["crop", "flip_crop"])
def test_training_images_are_pils_shifts_and_mirrors(arguments, augmentation):
    """Each is a shift or mirror that PIL makes of its source, within 1.5/255; all kinds occur."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    args = arguments("baseline", "--batch-size", "16")
    loader = make_loader(synthetic(pixels, augmentation), args, image_size=64)

    found = set()
    for image, label in zip(*next(loader.epoch(0)), strict=True):
        source = Image.fromarray(pixels[label].permute(1, 2, 0).numpy())
        padded = ImageOps.expand(source, 4)
        errors = {}
        for top, left, is_mirrored in itertools.product(range(9), range(9), (False, True)):
            crop = padded.crop((left, top, left + 32, top + 32))
            crop = crop.resize((64, 64), Image.Resampling.BICUBIC)
            if is_mirrored:
                crop = ImageOps.mirror(crop)
            difference = np.asarray(crop) / 255 - image.permute(1, 2, 0).numpy()
            errors[top, left, is_mirrored] = np.abs(difference).max()
        best = min(errors, key=errors.get)
        assert errors[best] < 1.5 / 255
        found.add(best)

    assert len({top for top, _, _ in found}) > 4
    assert len({left - top for top, left, _ in found}) > 4
    expected = {False, True} if augmentation == "flip_crop" else {False}
    assert {is_mirrored for _, _, is_mirrored in found} == expected


def test_without_augmentation_images_stay_as_they_are(arguments):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    loader = make_loader(synthetic(pixels, "none"), arguments("baseline", "--batch-size", "16"))
    images, labels = next(loader.epoch(0))
    assert torch.equal(images, pixels[labels] / 255)
    assert labels.tolist() != list(range(16))


def test_mixing_is_timms_and_follows_the_seed(arguments):
    args = arguments("baseline", "--mixup-alpha", "0.8")
    data = data_loader.open_dataset(args)
    third = list(make_loader(data, args).epoch(0))[2]
    images, labels = third
    plain, hard = list(make_loader(data, arguments("baseline")).epoch(0))[2]

    torch.testing.assert_close(labels.sum(1), torch.ones(64))
    i = (hard != hard.flip(0)).nonzero()[0].item()
    share = labels[i, hard[i]]
    assert 0 < share < 1
    expected = share * plain + (1 - share) * plain.flip(0)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert_equal_batches([third], itertools.islice(make_loader(data, args).epoch(0), 2, 3))


def test_mixed_labels_are_not_smoothed_yet(arguments):
    """The loss smooths them: twice would be too much."""
    args = arguments("baseline", "--mixup-alpha", "0.8", "--label-smoothing", "0.1")
    _, labels = next(make_loader(data_loader.open_dataset(args), args).epoch(0))
    assert labels.count_nonzero(dim=1).max() == 2


def test_every_batch_is_mixed_by_a_share_of_its_own(arguments):
    args = arguments("baseline", "--mixup-alpha", "0.8")
    loader = make_loader(data_loader.open_dataset(args), args)
    shares = {round(labels.max(1).values.min().item(), 4) for _, labels in loader.epoch(0)}
    assert len(shares) > len(loader) / 2


@pytest.mark.parametrize("mixing", [[], ["--mixup-alpha", "0.8"], ["--cutmix-alpha", "1"]])
def test_equal_sizes_are_one_tensor_for_student_and_teacher(arguments, mixing):
    args = arguments("distillation", *mixing)
    data = data_loader.open_dataset(args)
    batches = list(make_loader(data, args).epoch_with_teacher(1))
    assert all(images is teacher_images for images, teacher_images, _ in batches)
    assert_equal_batches(without_teacher(batches), make_loader(data, args).epoch(1))


@pytest.mark.parametrize("mixing", [[], ["--mixup-alpha", "0.8"]])
@pytest.mark.parametrize("augmentation", ["flip_crop", "resized_crop"])
def test_teacher_sees_the_same_crop_in_more_detail(arguments, augmentation, mixing):
    """The student's images and labels are the baseline's to the bit, mixed or not."""
    flags = ["--augmentation", augmentation, *mixing]
    args = arguments("distillation", "--teacher-image-size", "64", *flags)
    data = open_few(args)
    batches = list(make_loader(data, args).epoch_with_teacher(1))
    assert_equal_batches(without_teacher(batches), make_loader(data, args).epoch(1))
    baseline_args = arguments("baseline", *flags)
    assert_equal_batches(without_teacher(batches), make_loader(data, baseline_args).epoch(1))

    images, teacher_images, _ = batches[0]
    assert teacher_images.shape == (64, 3, 64, 64)
    small = torch.nn.functional.interpolate(teacher_images, size=32, mode="bicubic", antialias=True)
    assert (small - images).abs().mean() < 0.02


def test_photographs_for_a_larger_teacher_are_those_of_the_epoch(arguments, tmp_path):
    """The student's pixels are the baseline's to the bit, whatever size the teacher has."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    data = data_loader.open_dataset(args)
    baseline = list(make_loader(data, args).epoch(1))
    for size in (40, 48, 96):
        args.teacher_image_size = size
        batches = list(make_loader(data, args).epoch_with_teacher(1))
        assert all(teacher_images.shape[-1] == size for _, teacher_images, _ in batches)
        assert_equal_batches(without_teacher(batches), baseline)
        images, teacher_images, _ = batches[0]
        small = torch.nn.functional.interpolate(teacher_images, size=32, mode="bicubic",
                                                antialias=True)
        assert (small - images).abs().mean() < 0.05  # the same crop


# Where the images are -----------------------------------------------------------------------------

@pytest.mark.parametrize("free, expected", [(1000 * 2**20, "cuda"), (2**19, "cpu"), (2**17, "cpu")])
def test_images_that_do_not_fit_stay_in_host_memory(monkeypatch, capsys, free, expected):
    # Cached by a model before this one: torch gives it back, or all would stay on the host.
    cached = [2**32]
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0 if cached else free, 2**33))
    pixels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    utils.print_once.cache_clear()
    for _ in range(2):
        assert data_loader.storage_device(pixels, torch.device("cuda")).type == expected
    assert capsys.readouterr().out.count("host memory") == (expected == "cpu")
    assert data_loader.storage_device(pixels, CPU) == CPU


def test_pixels_on_the_host_are_pinned_for_a_copy_that_does_not_wait(arguments, monkeypatch):
    """Seen without a GPU, from the calls; the same pixels arrive."""
    args = arguments("baseline")
    loader = make_loader(data_loader.open_dataset(args), args, CPU)
    expected = [images for images, _ in loader.epoch(0)]

    calls = []
    copy = torch.Tensor.to

    def recording_copy(tensor, *args, **kwargs):
        if args == (torch.device("cuda"),):
            calls.append(("copy", tensor.dtype, kwargs))
            return tensor
        return copy(tensor, *args, **kwargs)

    def recording_pin(tensor):
        calls.append(("pin", tensor.dtype))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", recording_copy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", recording_pin)
    loader.source.device = torch.device("cuda")
    batches = loader.epoch(0)
    for images in expected:
        calls.clear()
        assert torch.equal(next(batches)[0], images)
        assert calls[-2:] == [("pin", torch.uint8),
                              ("copy", torch.uint8, {"non_blocking": True})]
    assert len(calls) == 2  # nothing else is copied in a step


def test_device_without_its_number_is_the_same_device(arguments):
    """torch.device("cuda") does not equal a tensor's "cuda:0"; seen here from "cpu" and "cpu:0"."""
    args = arguments("baseline")
    loader = make_loader(data_loader.open_dataset(args), args, torch.device("cpu", 0))
    assert loader.source.device != loader.source.pixels.device
    assert len(list(loader.epoch(0))) == len(loader)


@pytest.mark.cuda
def test_images_in_host_memory_make_the_same_batches(arguments, monkeypatch):
    device = torch.device("cuda")
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    resident = make_loader(data, args, device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert_equal_batches(resident.epoch(1), make_loader(data, args, device).epoch(1))
    assert all(tensor.is_cuda for tensor in next(resident.epoch(1)))


# Photographs --------------------------------------------------------------------------------------

def smooth_photograph(file, width, height, **options):
    """A photograph without fine detail or sharp edges, saved as `file` and returned."""
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, **options)
    return image


def views_of(file, *sizes, seed=0, augmentation="resized_crop"):
    images = data_loader.Images(None, [file], torch.zeros(1))
    return data_loader.random_views(images, sizes, "bicubic", augmentation, 0, seed)


def test_photographs_are_cropped_by_torchvisions_rule(tmp_path):
    """A PNG is decoded whole, so the crop is PIL's to the bit; half of them are mirrored."""
    image = smooth_photograph(tmp_path / "a.png", 300, 200)
    num_mirrored = 0
    areas = []
    for seed in range(60):
        torch.manual_seed(seed)
        top, left, height, width = torchvision.transforms.RandomResizedCrop.get_params(
            image, data_loader.CROP_SCALE, data_loader.CROP_RATIO)
        expected = image.resize((64, 64), Image.Resampling.BICUBIC,
                                (left, top, left + width, top + height))
        view, = views_of(tmp_path / "a.png", 64, seed=seed)
        is_mirrored = view.tobytes() == ImageOps.mirror(expected).tobytes()
        assert is_mirrored or view.tobytes() == expected.tobytes()
        num_mirrored += is_mirrored
        areas.append(width * height / (300 * 200))
    assert 15 < num_mirrored < 45
    assert min(areas) < 0.45
    assert max(areas) > 0.7

    whole, = views_of(tmp_path / "a.png", 64, augmentation="none")
    assert whole.tobytes() == image.resize((64, 64), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_in_part_and_look_the_same(tmp_path, monkeypatch, orientation):
    """Turned by EXIF or not; never below the size that the crop needs, whatever the teacher's."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth_photograph(tmp_path / "a.jpg", 1200, 800, quality=95, exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).save(tmp_path / "a.png")

    read_image = data_loader.read_image
    decoded = []

    def recording_read_image(file, min_side=None):
        decoded.append(read_image(file, min_side))
        return decoded[-1]

    monkeypatch.setattr(data_loader, "read_image", recording_read_image)
    for seed in range(8):
        decoded.clear()
        views = views_of(tmp_path / "a.jpg", 32, 100, seed=seed)
        assert len(decoded) <= 2
        assert max(decoded[0].size) < 1200
        for image, size in ((decoded[0], 32), (decoded[-1], 100)):
            torch.manual_seed(seed)
            _, _, *crop = torchvision.transforms.RandomResizedCrop.get_params(
                image, data_loader.CROP_SCALE, data_loader.CROP_RATIO)
            assert min(crop) >= size - 1  # but for rounding

        for view, size in zip(views, (32, 100), strict=True):
            single, = views_of(tmp_path / "a.jpg", size, seed=seed)
            assert view.tobytes() == single.tobytes()
        of_png = views_of(tmp_path / "a.png", 32, 100, seed=seed)
        for view, expected in zip(views, of_png, strict=True):
            difference = np.abs(np.asarray(view, float) - np.asarray(expected, float))
            assert difference.mean() < 1
            assert difference.max() < 12


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_other_photographs_are_decoded_once_and_upright(tmp_path, monkeypatch, extension):
    """Pillow reports the size of a TIFF as turned by EXIF already; to look for EXIF in a PNG, it
    decodes the whole picture."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = tmp_path / f"a.{extension}"
    image = smooth_photograph(file, 300, 200, exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")

    read_image = data_loader.read_image
    decoded = []
    monkeypatch.setattr(data_loader, "read_image",
                        lambda *args: decoded.append(args) or read_image(*args))
    for seed in range(8):
        decoded.clear()
        views = views_of(file, 32, 64, seed=seed)
        assert len(decoded) == 1
        expected = views_of(tmp_path / "upright.png", 32, 64, seed=seed)
        assert [view.tobytes() for view in views] == [view.tobytes() for view in expected]

    if extension == "png":
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
        images = data_loader.Images(None, [file], torch.zeros(1))
        assert data_loader.jpeg_dimensions(images, 0) is None


def test_a_crop_is_never_enlarged_where_the_picture_has_the_pixels(tmp_path):
    smooth_photograph(tmp_path / "a.jpg", 1600, 1200)
    sizes = {min_side: data_loader.read_image(tmp_path / "a.jpg", min_side).size
             for min_side in (None, 601, 600, 301, 300, 150, 10)}
    assert sizes == {None: (1600, 1200), 601: (1600, 1200), 600: (800, 600), 301: (800, 600),
                     300: (400, 300), 150: (200, 150), 10: (200, 150)}


def test_subfolder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures") / "train"
    locked = folder / "cat" / "more"
    hidden = folder / "cat" / ".more"  # whose pictures are not wanted
    locked.mkdir()
    hidden.mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) in (str(locked), str(hidden)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(utils.UserError, match="more cannot be read"):
        data_loader.list_pictures(folder)
    locked.rmdir()
    assert len(data_loader.list_pictures(folder)[1]) == 24


def test_one_test_picture_is_refused_before_the_training(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", counts=[("train", 8)])
    (folder / "test" / "cat").mkdir(parents=True)
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "test" / "cat")
    with pytest.raises(utils.UsageError, match="two or more pictures"):
        data_loader.open_dataset(folder_args(arguments, folder))


def test_cached_pictures_depend_on_what_counts_as_small(monkeypatch):
    signature = data_loader.cache_signature([], [], None)
    monkeypatch.setattr(data_loader, "SMALL_SIDE", 128)
    assert data_loader.cache_signature([], [], None) != signature


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("fault", ["lost", "truncated"])
def test_photograph_that_breaks_in_training_is_one_sentence(arguments, tmp_path, workers, fault):
    folder = write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, folder, "--num-workers", workers)
    data = data_loader.open_dataset(args)
    file = data.train.files[0]
    if fault == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:2000])

    loader = make_loader(data, args)
    with pytest.raises(utils.UserError) as error:
        for epoch in range(10):  # the last incomplete batch is left out
            list(loader.epoch(epoch))
    stop_workers(loader)
    message = str(error.value)
    assert file.name in message
    assert ("No such file" if fault == "lost" else "truncated") in message
    assert "\n" not in message


def test_photographs_leave_torchs_random_numbers_alone(arguments, tmp_path):
    """Dropout draws from the same generator, and a resumed run starts one more DataLoader."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    loader = make_loader(data_loader.open_dataset(args), args)
    before = torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_left_early_does_not_disturb_the_next(arguments, tmp_path):
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"), "--num-workers", "1")
    data = data_loader.open_dataset(args)
    loader = make_loader(data, args)
    next(loader.epoch(0))
    assert_equal_batches(loader.epoch(1), make_loader(data, args).epoch(1))


# Workers ------------------------------------------------------------------------------------------

# Windows and macOS start workers by spawn, Python 3.14 on Linux by forkserver.
START_METHODS = [method for method in ("fork", "forkserver", "spawn")
                 if method in multiprocessing.get_all_start_methods()]


@pytest.fixture(params=[method if method == "fork" else pytest.param(method, marks=pytest.mark.slow)
                        for method in START_METHODS])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_photographs_do_not_depend_on_workers(arguments, tmp_path, start_method):
    folder = write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, folder)
    worker_args = folder_args(arguments, folder, "--num-workers", "2")
    data = data_loader.open_dataset(args)
    assert data.augmentation == "resized_crop"
    assert data.train.pixels is None

    loader = make_loader(data, args)
    worker_loader = make_loader(data, worker_args)
    for epoch in (0, 1):
        assert assert_equal_batches(loader.epoch(epoch), worker_loader.epoch(epoch)) == 4
    images, _ = next(loader.epoch(0))
    assert images.shape == (4, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert images.is_contiguous(memory_format=torch.channels_last)


SPAWNED_WORKER = """
import multiprocessing, os, sys
import torch
from PIL import Image
import data_loader

class Witness:
    def __del__(self, write=os.write):  # by then `os` may be gone
        write(2, b"an interpreter was shut down")

def make_views(i, seed):
    sys.witness = Witness() if i == 0 else sys.witness
    return [Image.new("RGB", (32, 32))]

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    source = data_loader.WorkerSource(torch.zeros(4).long(), make_views, torch.device("cpu"), 1)
    print(len(list(source.batches(torch.arange(4), 2, torch.Generator()))))
    del source  # an orderly end of the worker
"""


@pytest.mark.slow
def test_a_worker_ends_without_shutting_its_interpreter_down(tmp_path):
    """Or it could be aborted (std::terminate), if a thread was handing over a tensor."""
    script = tmp_path / "training.py"
    script.write_text(SPAWNED_WORKER)
    done = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\n"
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows starts workers without a fork")
@pytest.mark.parametrize("is_worker", [True, False])
def test_worker_prints_nothing_about_a_parent_that_ended(is_worker, capfd):
    """A tensor's memory is handed over by socket, and a parent that is stopped leaves it half-way:
    ConnectionResetError in a thread of the worker. The control without the hook prints it."""
    def worker(connection):
        if is_worker:
            data_loader.init_worker(0)
        connection.send(resource_sharer.DupFd(os.pipe()[0])._id[0])
        connection.recv()

    fork = multiprocessing.get_context("fork")
    connection, worker_connection = fork.Pipe()
    process = fork.Process(target=worker, args=(worker_connection,))
    process.start()
    with socket.socket(socket.AF_UNIX) as half_way:
        half_way.connect(connection.recv())
    time.sleep(0.5)
    connection.send("end")
    process.join()
    assert ("Traceback" in capfd.readouterr().err) == (not is_worker)


TRAINING = """
import multiprocessing, signal, sys, time, types
import torch
import data_loader

if __name__ == "__main__":
    _, folder, method, state = sys.argv
    multiprocessing.set_start_method(method)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background may ignore it
    args = types.SimpleNamespace(
        dataset_name="ImageFolder", dataset_dir=folder, data_dir=folder + "/data", batch_size=4,
        augmentation="auto", val_fraction=0.25, split_seed=0, accumulate_steps=1, seed=5,
        num_workers=2, mixup_alpha=0.0, cutmix_alpha=0.0)
    info = {"image_size": 32, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 3}
    data = data_loader.open_dataset(args)
    loader = data_loader.TrainingLoader(data, info, args, torch.device("cpu"))
    batches = loader.epoch(0)
    next(batches)  # the first worker's; the second one has started too when its own is there
    next(batches)
    if state == "between epochs":
        list(batches)
    try:
        print("training", flush=True)
        time.sleep(100)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals and process groups of POSIX")
@pytest.mark.parametrize("name, state", [
    ("SIGINT to all", "within an epoch"), ("SIGTERM", "within an epoch"),
    ("SIGKILL", "within an epoch"), ("SIGKILL", "between epochs")])
@pytest.mark.parametrize("method", START_METHODS)
def test_no_worker_outlives_its_training(tmp_path, method, name, state):
    """Whatever ends it: Ctrl-C reaches all processes of a terminal, kill one of them."""
    folder = write_pictures(tmp_path / "pictures")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    process = subprocess.Popen([sys.executable, script, folder, method, state],
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line == "training\n" for line in process.stdout)
        assert len(members_of_group(process.pid)) >= 3
        number = signal.Signals[name.split()[0]]
        if name.endswith("to all"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(timeout=60)
        wait_until(lambda: not members_of_group(process.pid), seconds=60)
        assert "Traceback" not in process.stderr.read()
    finally:
        for pid in members_of_group(process.pid):
            os.kill(pid, signal.SIGKILL)


# Test images that training repeats ----------------------------------------------------------------

def test_repeated_images_are_found_where_one_part_is_held_as_pixels_alone(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    shutil.copy(folder / "train" / "dog" / "001.png", folder / "test" / "cat" / "b.png")
    Image.new("RGB", (50, 40)).save(folder / "train" / "cat" / "large.png")
    args = folder_args(arguments, folder)
    data = data_loader.open_dataset(args)
    test = load_test(args)
    assert data.train.pixels is None
    assert test.pixels is not None
    assert data_loader.duplicates_of_training_images(test, data) == ["cat/b.png"]


@pytest.mark.parametrize("size", [32, 60])
def test_images_that_training_repeats_are_named(arguments, tmp_path, size):
    """To the bit, as pixels or as files, whether they train or validate."""
    folder = write_pictures(tmp_path / "pictures", sizes=((size, size), (size, size + size // 50)))
    args = folder_args(arguments, folder)
    data = data_loader.open_dataset(args)
    assert (data.train.pixels is None) == (size == 60)
    assert data_loader.duplicates_of_training_images(load_test(args), data) == []

    for i in range(8):  # of which some are held out to validate
        picture = folder / "train" / "dog" / f"{i:03d}.png"
        shutil.copy(picture, folder / "test" / "cat" / f"b{i}.png")
    test = load_test(args)
    by_name = [f"cat/b{i}.png" for i in range(8)]
    by_number = [f"number {3 + i}" for i in range(8)]
    assert data_loader.duplicates_of_training_images(test, data) == by_name
    without_names = test._replace(names=[])
    assert data_loader.duplicates_of_training_images(without_names, data) == by_number


# Evaluation batches -------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batch", [(32, 512), (64, 392), (224, 32), (1024, 16)])
def test_evaluation_takes_large_batches_of_bounded_memory(size, batch):
    images = synthetic(torch.zeros(600, 3, 32, 32, dtype=torch.uint8), "none").val
    args = types.SimpleNamespace(num_workers=0)
    loader = data_loader.EvaluationLoader(images, INFO | {"image_size": size}, args, CPU)
    pixels, _ = next(iter(loader))
    assert pixels.shape == (batch, 3, size, size)
    assert loader.batch_size == batch
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [32, 48])
def test_evaluation_yields_all_images_in_order_each_time(size):
    data = synthetic(torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8), "none")
    args = types.SimpleNamespace(num_workers=0)
    loader = data_loader.EvaluationLoader(data.val, INFO | {"image_size": size}, args, CPU)
    assert assert_equal_batches(loader, loader) == 2
    images, labels = (torch.cat(tensors) for tensors in zip(*loader, strict=True))
    assert torch.equal(labels, data.val.labels)
    if size == 32:
        assert torch.equal(images, data.val.pixels / 255)


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("sizes, tolerance", [(((48, 48),), 1.5 / 255), (((40, 60), (70, 50)), 0)])
def test_evaluation_loader_agrees_with_build_transform(
        arguments, tmp_path, size, sizes, tolerance):
    """Photographs to the bit; small images within 1.5/255 of PIL's bytes before normalising."""
    folder = write_pictures(tmp_path / "pictures", sizes=sizes)
    args = folder_args(arguments, folder)
    info = {"image_size": size, "crop_pct": 1.0 if tolerance else 0.875,
            "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    loader = data_loader.EvaluationLoader(load_test(args), info, args, CPU)
    images = torch.cat([images for images, _ in loader])

    transform = data_loader.build_transform(info)
    mean = torch.tensor(info["mean"]).view(3, 1, 1)
    std = torch.tensor(info["std"]).view(3, 1, 1)
    allowed = tolerance / min(info["std"]) + 1e-6 if tolerance else 0
    files = sorted((folder / "test").glob("*/*.png"))
    for image, file in zip(images, files, strict=True):
        expected = transform(Image.open(file))
        assert (expected - (image - mean) / std).abs().max() <= allowed


# Downloads ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parts", [("CIFAR100", [{"train": True}]),
                                         ("CIFAR10", [{"train": True}]),
                                         ("Flowers102", [{"split": "train"}, {"split": "val"}])])
def test_training_opens_no_other_part_of_a_download(arguments, monkeypatch, name, parts):
    opened = []

    def open_part(self, root, download, **part):
        opened.append(part)
        self.data = np.zeros((300, 32, 32, 3), np.uint8)
        self.classes = ["a", "b", "c"]
        self.targets = self._labels = [0, 1, 2] * 100
        self._image_files = ["none.jpg"] * 300

    cls = getattr(torchvision.datasets, name)
    fake = type(name, (cls,), {"__init__": open_part})
    monkeypatch.setattr(torchvision.datasets, name, fake)
    data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert opened == parts


@pytest.fixture
def serve():
    """A function that serves a folder over HTTP on this machine and returns its address."""
    servers = []

    def start(folder):
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def add_to(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def fake_cifar100(folder, monkeypatch, url):
    """The official archive in small, with md5 sums to match: 200 training and 100 test images."""
    generator = np.random.default_rng(0)
    cls = torchvision.datasets.CIFAR100
    contents = {}
    for part, count in (("train", 200), ("test", 100)):
        contents[part] = pickle.dumps({
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count,
            "filenames": [""] * count, "batch_label": ""})
    contents["meta"] = pickle.dumps({
        "fine_label_names": [f"class {i:02d}" for i in range(100)], "coarse_label_names": []})

    archive = folder / cls.filename
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            add_to(tar, f"{cls.base_folder}/{name}", content)

    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(cls, "url", url)
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cls, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cls, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5["meta"]})
    return archive, contents


def test_cifar100_is_downloaded_checked_and_opened(arguments, tmp_path, monkeypatch, serve):
    server = tmp_path / "server"
    _, contents = fake_cifar100(server, monkeypatch, serve(server) + "cifar-100-python.tar.gz")
    args = arguments("baseline", "--dataset-name", "CIFAR100", "--val-fraction", "0.5",
                     "--batch-size", "16")
    data = data_loader.open_dataset(args)
    assert data.class_names[0] == "class 00"
    assert data.augmentation == "flip_crop"
    assert len(data.train.labels) == len(data.val.labels) == 100

    train_pixels, test_pixels = (pickle.loads(contents[part])["data"].reshape(-1, 3, 32, 32)
                                 for part in ("train", "test"))
    assert (bytes_of(torch.cat([data.train.pixels, data.val.pixels]))
            == {image.tobytes() for image in train_pixels})
    assert np.array_equal(load_test(args).pixels.numpy(), test_pixels)


def test_two_scripts_do_not_download_into_the_same_files(arguments, tmp_path, monkeypatch, serve):
    """The second waits, then finds the files of the first."""
    server = tmp_path / "server"
    archive, _ = fake_cifar100(server, monkeypatch, serve(server) + "cifar-100-python.tar.gz")
    args = arguments("baseline", "--dataset-name", "CIFAR100", "--val-fraction", "0.5")

    locked = []

    @contextlib.contextmanager
    def other_script_first(folder):
        locked.append(folder)
        torchvision.datasets.CIFAR100(args.data_dir, download=True)
        archive.unlink()  # another download would fail
        yield

    monkeypatch.setattr(utils, "wait_for_lock", other_script_first)
    assert len(data_loader.open_dataset(args).train.labels) == 100
    assert locked == [Path(args.data_dir, "CIFAR100")]


def test_cifar100_archive_placed_by_hand_needs_no_network(arguments, tmp_path, monkeypatch):
    args = arguments("baseline", "--dataset-name", "CIFAR100", "--val-fraction", "0.5")
    archive, _ = fake_cifar100(tmp_path / "data", monkeypatch, url="http://127.0.0.1:9/none")
    assert str(archive.parent) == args.data_dir
    assert len(data_loader.open_dataset(args).train.labels) == 100


@pytest.mark.parametrize("name, file, place", [
    ("CIFAR100", "cifar-100-python.tar.gz", "data"), ("CIFAR10", "cifar-10-python.tar.gz", "data"),
    ("Flowers102", "102flowers.tgz", "flowers-102")])
def test_failed_download_ends_in_seconds_and_names_the_file(
        arguments, monkeypatch, name, file, place):
    cls = getattr(torchvision.datasets, name)
    if name == "Flowers102":
        monkeypatch.setattr(cls, "_download_url_prefix", "http://127.0.0.1:9/")
    else:
        monkeypatch.setattr(cls, "url", f"http://127.0.0.1:9/{file}")

    start = time.time()
    with pytest.raises(utils.UserError) as error:
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert time.time() - start < 10
    message = str(error.value)
    assert f"127.0.0.1:9/{file} to " in message
    assert f"{place}/{file}" in message
    assert "by hand" in message and "--quick" in message
    assert "\n" not in message
    assert "damaged" not in message


@pytest.mark.parametrize("name, file, md5", [
    ("CIFAR100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    ("Flowers102", "flowers-102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa")])
def test_damaged_archive_is_named_with_its_checksum(arguments, tmp_path, monkeypatch, name, file,
                                                    md5):
    cls = getattr(torchvision.datasets, name)
    monkeypatch.setattr(cls, "_download_url_prefix", "http://127.0.0.1:9/", raising=False)
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/x", raising=False)
    archive = tmp_path / "data" / file
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"the first half")
    if name == "Flowers102":  # has three files, of which this one is whole
        (archive.parent / "setid.mat").write_bytes(b"whole")
        whole = "setid.mat", hashlib.md5(b"whole").hexdigest()
        monkeypatch.setattr(cls, "_file_dict", {**cls._file_dict, "setid": whole})

    with pytest.raises(utils.UserError, match=f"{archive} is damaged.*{md5}") as error:
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert str(error.value).count("MD5") == 1


def test_a_silent_server_is_given_up(arguments, monkeypatch):
    monkeypatch.setattr(data_loader, "DOWNLOAD_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, then says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", url)
        with pytest.raises(utils.UserError, match="by hand"):
            data_loader.open_dataset(arguments("baseline", "--dataset-name", "CIFAR100"))
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("fault, seen", [
    (ConnectionResetError(104, "Connection reset by peer"), utils.UserError),
    (TimeoutError(110, "timed out"), utils.UserError), (OSError(28, "No space left"), OSError)])
def test_a_fault_of_the_disk_is_not_taken_for_the_network(arguments, monkeypatch, fault, seen):
    def fail(self, **options):
        raise fault

    fake = type("CIFAR100", (torchvision.datasets.CIFAR100,), {"__init__": fail})
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    with pytest.raises(seen, match=fault.strerror):
        data_loader.open_dataset(arguments("baseline", "--dataset-name", "CIFAR100"))


@pytest.mark.slow
def test_flowers102_keeps_its_own_split(arguments, tmp_path, monkeypatch, serve):
    """The real download of small files in the real layout: 306 JPEG pictures, a third a part."""
    server = tmp_path / "server"
    server.mkdir()
    cls = torchvision.datasets.Flowers102
    generator = np.random.default_rng(0)
    ids = np.arange(1, 307)
    with tarfile.open(server / "102flowers.tgz", "w:gz") as tar:
        for i in ids:
            pixels = generator.integers(0, 256, (30 + i % 7, 40, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG")
            add_to(tar, f"jpg/image_{i:05d}.jpg", stream.getvalue())
    scipy.io.savemat(server / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    scipy.io.savemat(server / "setid.mat",
                     {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    monkeypatch.setattr(cls, "_download_url_prefix", serve(server))
    monkeypatch.setattr(cls, "_file_dict", {
        key: (name, hashlib.md5((server / name).read_bytes()).hexdigest())
        for key, (name, _) in cls._file_dict.items()})

    args = arguments("baseline", "--dataset-name", "Flowers102", "--batch-size", "8",
                     "--num-workers", "1")
    data = data_loader.open_dataset(args)
    assert len(data.train.labels) == len(data.val.labels) == 102
    assert len(data.class_names) == 102
    assert data.class_names[0] == "pink primrose"
    assert data.augmentation == "resized_crop"
    images, labels = next(make_loader(data, args).epoch(0))
    assert images.shape == (8, 3, 32, 32)
    assert labels.max() < 102

    test = load_test(args)
    assert test.labels.tolist() == list(range(102))
    expected = Image.open(tmp_path / "data" / "flowers-102" / "jpg" / "image_00208.jpg")
    assert np.array_equal(np.asarray(data_loader.load_image(test, 3)), np.asarray(expected))


# Folders of pictures ------------------------------------------------------------------------------

def test_training_only_learns_whether_test_pictures_can_be_decoded(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, folder)
    before = data_loader.open_dataset(args)
    for file in (folder / "test").glob("*/*.png"):
        Image.new("RGB", (20, 30)).save(file)
    after = data_loader.open_dataset(args)
    assert before.split_fingerprint == after.split_fingerprint
    assert_equal_batches(make_loader(before, args).epoch(0), make_loader(after, args).epoch(0))

    file.write_bytes(b"not a picture")
    with pytest.raises(utils.UserError, match="1 of 9 .*" + file.name):
        data_loader.open_dataset(args)


def test_what_is_no_picture_is_skipped_and_counted(arguments, tmp_path, capsys):
    """Hidden files and folders, texts, a pipe, a dangling link, a link that leads in a circle."""
    folder = write_pictures(tmp_path / "pictures")
    before = data_loader.open_dataset(folder_args(arguments, folder))
    for name in (".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a.png", "cat/._000.png",
                 "cat/notes.txt"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"no picture")
    cat = folder / "train" / "cat"
    os.mkfifo(cat / "pipe.png")
    (cat / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (cat / "circle").symlink_to(folder / "train")

    capsys.readouterr()
    utils.print_once.cache_clear()
    after = data_loader.open_dataset(folder_args(arguments, folder))
    assert after.split_fingerprint == before.split_fingerprint
    out = capsys.readouterr().out
    assert out.count("skipped") == 1
    assert "5 files" in out and "1 .txt" in out and "2 hidden" in out
    assert "3 classes, 18 training images, 6 validation images" in out


def test_all_pictures_that_pillow_reads_are_taken(arguments, tmp_path, capsys):
    """JFIF, GIF, JPEG 2000 and whatever this Pillow reads; no PDF, no EPS and no film."""
    folder = write_pictures(tmp_path / "pictures")
    cat = folder / "train" / "cat"
    image = Image.open(cat / "000.png")
    taken = ["gif", "jfif", "jpe", "jp2", "webp", "tga", "ICO"]
    if features.check("avif"):
        taken.append("avif")
    for extension in taken:
        image.save(cat / f"a.{extension}")
    image.save(cat / "a.pdf")
    image.save(cat / "a.eps")
    for name in ("a.heic", "b.heic", "a.mpg", "README"):
        (cat / name).write_bytes(b"no picture to Pillow")

    utils.print_once.cache_clear()
    class_names, files, _ = data_loader.list_pictures(folder / "train")
    assert class_names == ["cat", "dog", "eel"]
    assert {file.name for file in files if file.stem == "a"} == {f"a.{name}" for name in taken}
    out = capsys.readouterr().out
    assert "6 files" in out
    assert all(kind in out for kind in ("1 .pdf", "1 .eps", "2 .heic", "1 .mpg", "pillow-heif"))
    data_loader.open_dataset(folder_args(arguments, folder))


def test_a_file_that_is_no_picture_is_refused_under_the_name_of_one(tmp_path):
    """Pillow would start Ghostscript for an EPS file."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.eps")
    with pytest.raises(utils.UserError, match="a.png is not a picture"):
        data_loader.read_image(upload((tmp_path / "a.eps").read_bytes(), "a.png"))


def test_a_class_of_heic_pictures_alone_names_the_way_out(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    for file in (folder / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".HEIC"))
    with pytest.raises(utils.UserError, match="dog .*8 .heic.*pillow-heif"):
        data_loader.open_dataset(folder_args(arguments, folder))
    with pytest.raises(utils.UserError, match="IMG_1.HEIC .*pillow-heif"):
        data_loader.read_image(upload(b"\0\0\0\x18ftypheic", "IMG_1.HEIC"))


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems allow no such names")
@pytest.mark.parametrize("size", [(32, 32), (40, 60)])
def test_names_that_are_not_utf_8_are_written_with_their_bytes(arguments, tmp_path, capsys, size):
    """Folders and files of an old archive: pictures are read, and all names can be printed."""
    folder = write_pictures(tmp_path / "pictures", sizes=(size,))
    for part in ("train", "test"):
        for old in (b"k\xf6nig", b"k\xe4nig"):
            target = os.path.join(os.fsencode(folder / part), old)
            shutil.copytree(os.fsencode(folder / part / "cat"), target)
            os.rename(os.path.join(target, b"000.png"), os.path.join(target, b"\xff.png"))
    odd_folder = tmp_path / os.fsdecode(b"bilder \xfc")
    folder.rename(odd_folder)
    (odd_folder / "train" / "cat" / os.fsdecode(b"a.\xfc")).write_bytes(b"")

    utils.print_once.cache_clear()
    args = folder_args(arguments, odd_folder)
    data = data_loader.open_dataset(args)
    test = load_test(args)
    assert data.class_names == ["cat", "dog", "eel", r"k\xe4nig", r"k\xf6nig"]
    assert r"k\xf6nig/\xff.png" in test.names
    (json.dumps([data.class_names, test.names]) + capsys.readouterr().out).encode()
    for i in range(len(test.labels)):
        data_loader.load_image(test, i)

    next((odd_folder / "train").glob("k*/*")).write_bytes(b"")
    with pytest.raises(utils.UserError) as error:
        data_loader.open_dataset(args)
    str(error.value).encode()


def test_a_name_of_any_length_and_alphabet(arguments, tmp_path):
    folder = write_pictures(tmp_path / ("図" * 80), classes=("猫" * 80, "犬"), sizes=((32, 32),))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.class_names == ["犬", "猫" * 80]


@pytest.mark.parametrize("size", [(32, 32), (40, 60)])
def test_test_images_may_lack_classes(arguments, tmp_path, capsys, size):
    """Of the middle, so that labels must be those of training; even all but one."""
    folder = write_pictures(tmp_path / "pictures", sizes=(size,))
    shutil.rmtree(folder / "test" / "dog")
    args = folder_args(arguments, folder)
    utils.print_once.cache_clear()
    data = data_loader.open_dataset(args)
    assert "1 of 3 classes: dog" in capsys.readouterr().out

    test, names = data_loader.load_split("ImageFolder", "test", args)
    aligned = data_loader.align_classes(test, names, data.class_names)
    assert aligned.labels.tolist() == [0, 0, 0, 2, 2, 2]
    shutil.rmtree(folder / "test" / "cat")
    test, names = data_loader.load_split("ImageFolder", "test", args)
    aligned = data_loader.align_classes(test, names, data.class_names)
    assert aligned.labels.tolist() == [2, 2, 2]


def test_a_test_class_that_was_not_trained_on_is_refused(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    test, names = data_loader.load_split("ImageFolder", "test", folder_args(arguments, folder))
    with pytest.raises(utils.UserError, match="test images .*eel"):
        data_loader.align_classes(test, names, ["cat", "dog", "fox"])
    aligned = data_loader.align_classes(test, names, ["eel", "dog", "cat"])
    assert aligned.labels.tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("given, words", [
    ("pictures/test", ["--dataset-dir", "holds train/", "pictures, not"]),
    ("pictures/train", ["--dataset-dir", "holds train/", "pictures, not"]),
    ("pictures/test/cat", ["train/<class>/"]),
    (".", ["train/<class>/", "pictures"])])
def test_a_wrong_dataset_dir_is_told_what_is_wanted(arguments, tmp_path, given, words):
    write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, tmp_path / given)
    for call in (lambda: data_loader.open_dataset(args), lambda: load_test(args)):
        with pytest.raises(utils.UsageError) as error:
            call()
        assert all(word in str(error.value) for word in words)


def test_image_folder_takes_its_own_validation_part(arguments, tmp_path):
    counts = (("train", 8), ("val", 2), ("test", 3))
    folder = write_pictures(tmp_path / "pictures", counts=counts)
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert len(data.train.labels) == 24
    assert len(data.val.labels) == 6
    assert data.class_names == ["cat", "dog", "eel"]


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change", ["other name", "other picture"])
def test_fingerprint_notices_other_pictures(arguments, tmp_path, part, change):
    counts = (("train", 8), ("val", 2), ("test", 3))
    folder = write_pictures(tmp_path / "pictures", counts=counts)
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    before = data_loader.open_dataset(folder_args(arguments, folder)).split_fingerprint
    assert data_loader.open_dataset(folder_args(arguments, copy)).split_fingerprint == before

    file = copy / part / "cat" / "000.png"
    if change == "other name":
        file.rename(file.with_name("other.png"))
    else:
        Image.new("RGB", Image.open(file).size, "red").save(file)
    assert data_loader.open_dataset(folder_args(arguments, copy)).split_fingerprint != before


def test_classes_are_in_the_order_of_torchvision(arguments, tmp_path):
    """A teacher trained elsewhere on the same folder has them in this order."""
    folder = write_pictures(tmp_path / "pictures", classes=("9", "10", "b", "aa", "a-b", "Z"))
    reference = torchvision.datasets.ImageFolder(folder / "train")
    train, class_names = data_loader.load_split("ImageFolder", "train",
                                                folder_args(arguments, folder))
    assert class_names == reference.classes
    label_of = dict(reference.samples)
    assert train.labels.tolist() == [label_of[str(file)] for file in train.files]


def test_small_pictures_of_one_size_are_held_as_pixels(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.pixels.shape == (18, 3, 32, 32)
    assert data.train.files is None
    seen = bytes_of(torch.cat([data.train.pixels, data.val.pixels]))
    for file in (folder / "train").glob("*/*.png"):
        assert np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() in seen


@pytest.mark.parametrize("sizes", [((32, 40),), ((97, 97),), ((32, 32), (40, 40))])
def test_other_pictures_stay_files(arguments, tmp_path, sizes):
    """Not square, too large, or of two sizes."""
    folder = write_pictures(tmp_path / "pictures", sizes=sizes)
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.pixels is None
    assert len(data.train.files) == 18


def spoil(folder, fault):
    """Give a dataset of pictures one of the faults of the next test."""
    dog = folder / "train" / "dog" / "002.png"
    if fault == "no test":
        shutil.rmtree(folder / "test")
    elif fault == "one class":
        shutil.rmtree(folder / "train" / "eel")
        shutil.rmtree(folder / "train" / "dog")
    elif fault == "empty test class":
        (folder / "test" / "fox").mkdir()
    elif fault == "other class":
        shutil.copytree(folder / "test" / "cat", folder / "test" / "fox")
    elif fault == "broken":
        for name in ("cat/001.png", "dog/002.png"):
            (folder / "train" / name).write_bytes(b"no picture")
    elif fault == "many":
        for file in sorted((folder / "train").rglob("*.png"))[:12]:
            file.write_bytes(b"")
    elif fault == "truncated":
        stream = io.BytesIO()
        Image.open(dog).save(stream, "JPEG")
        dog.unlink()
        dog.with_suffix(".jpg").write_bytes(stream.getvalue()[:-900])
    elif fault == "huge":  # a head of 50,000 x 50,000 pixels; nobody should try to decode it
        head = b"IHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
        checked = head + struct.pack(">I", zlib.crc32(head))
        dog.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + checked)
    elif fault == "empty class":
        for file in (folder / "train" / "eel").iterdir():
            file.unlink()
    elif fault == "no train":
        (folder / "train").rename(folder / "images")
    elif fault == "one picture":
        for file in sorted((folder / "train" / "cat").iterdir())[1:]:
            file.unlink()


@pytest.mark.parametrize("fault, words", [
    ("no test", ["pictures/test"]),
    ("one class", ["pictures/train", "two or more"]),
    ("empty test class", ["test/fox", "no picture"]),
    ("other class", ["test images", "fox", "not trained"]),
    ("broken", ["2 of 24", "cat/001.png", "dog/002.png"]),
    ("truncated", ["1 of 24", "dog/002.jpg", "truncated"]),
    ("huge", ["1 of 24", "dog/002.png"]),
    ("many", ["12 of 24", "cat/000.png"]),
    ("empty class", ["train/eel", "no picture"]),
    ("no train", ["pictures/train"]),
    ("one picture", ["cat", "two"])])
def test_faults_of_a_folder_are_one_sentence(arguments, tmp_path, fault, words):
    folder = write_pictures(tmp_path / "pictures")
    spoil(folder, fault)
    with pytest.raises(utils.UserError) as error:
        data_loader.open_dataset(folder_args(arguments, folder))
    message = str(error.value)
    assert all(word in message for word in words)
    assert "\n" not in message
    assert message.count(".png") <= 10  # each is named once


@pytest.mark.parametrize("fault", ["no test", "one class", "no train"])
def test_a_folder_of_another_layout_is_wrong_use(arguments, tmp_path, fault):
    folder = write_pictures(tmp_path / "pictures")
    spoil(folder, fault)
    with pytest.raises(utils.UsageError):  # exit status 2
        data_loader.open_dataset(folder_args(arguments, folder))


# Decoded once -------------------------------------------------------------------------------------

def replace_silently(file, content):
    """Other content of the same size and date, which only those who open the file can notice."""
    stat = file.stat()
    file.write_bytes(content[:stat.st_size].ljust(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_small_pictures_are_decoded_once(arguments, tmp_path, capsys):
    """Cached in data/, found again, made again when a file changes or is gone."""
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    args = folder_args(arguments, folder)
    cat = folder / "train" / "cat" / "000.png"
    first = data_loader.open_dataset(args).train.pixels
    original = cat.read_bytes()
    replace_silently(cat, b"not opened again")
    assert torch.equal(first, data_loader.open_dataset(args).train.pixels)

    cat.write_bytes(original)
    for file in sorted((folder / "train" / "cat").iterdir()):
        Image.new("RGB", (32, 32), "red").save(file)
    assert not torch.equal(first, data_loader.open_dataset(args).train.pixels)
    (folder / "train" / "eel" / "007.png").unlink()
    assert len(data_loader.open_dataset(args).train.pixels) == len(first) - 1
    assert "damaged" not in capsys.readouterr().out


def test_damaged_file_of_decoded_pictures_is_made_again(arguments, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    args = folder_args(arguments, folder)
    pixels = data_loader.open_dataset(args).train.pixels
    cache, = (tmp_path / "data" / "decoded").glob("pictures-train-*.pth")
    content = cache.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    cuts = [content[:length] for length in range(500, len(content), len(content) // 20)]
    for damaged in (bytes(flipped), b"", *cuts):
        cache.write_bytes(damaged)
        assert torch.equal(pixels, data_loader.open_dataset(args).train.pixels)
        assert "damaged" in capsys.readouterr().out
        assert torch.equal(pixels, data_loader.open_dataset(args).train.pixels)
        assert "damaged" not in capsys.readouterr().out


def test_decoded_pictures_that_cannot_be_saved_are_used_all_the_same(arguments, tmp_path, capsys):
    args = folder_args(arguments, write_pictures(tmp_path / "pictures", sizes=((32, 32),)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "decoded").write_text("a file where the folder should be")
    assert data_loader.open_dataset(args).train.pixels.shape == (18, 3, 32, 32)
    assert "could not be saved" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["date", "size"])
def test_photographs_are_checked_once_and_again_when_a_file_changes(arguments, tmp_path, change):
    """Its date alone, or its size alone."""
    folder = write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, folder)
    file = folder / "train" / "cat" / "000.png"
    assert data_loader.open_dataset(args).train.pixels is None
    replace_silently(file, b"no picture")
    data_loader.open_dataset(args)

    date = file.stat().st_mtime_ns
    if change == "date":
        date += 10**9
    else:
        file.write_bytes(file.read_bytes() + b" ")
    os.utime(file, ns=(date, date))
    with pytest.raises(utils.UserError, match="1 of 24 files"):
        data_loader.open_dataset(args)


# Pictures -----------------------------------------------------------------------------------------

def test_pictures_of_all_modes_become_upright_rgb(tmp_path):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))
    plain = np.asarray(data_loader.to_rgb(Image.fromarray(grey)))
    assert np.array_equal(plain, np.stack([grey] * 3, 2))

    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(data_loader.to_rgb(deep)), plain)

    transparent = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert np.asarray(data_loader.to_rgb(transparent)).min() == 255

    palette = Image.fromarray(plain).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(np.asarray(data_loader.to_rgb(palette)).astype(int) - plain).max() <= 4

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned: upright is clockwise by 90°
    Image.fromarray(plain).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(data_loader.read_image(tmp_path / "turned.png"))
    assert np.array_equal(upright, np.rot90(plain, -1))


@pytest.mark.parametrize("dtype, white", [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1)])
@pytest.mark.parametrize("share", [1, 256 / 65535, 255 / 65535])
def test_a_deep_picture_of_no_dataset_is_read_by_its_mode_alone(dtype, white, share):
    """Never by its values: a ramp to 255 must not come out brighter than one to 256."""
    ramp = (np.linspace(0, share * white, 256).reshape(16, 16)).astype(dtype)
    pixels = np.asarray(data_loader.to_rgb(Image.fromarray(ramp)))
    assert np.abs(pixels - ramp[..., None] / white * 255).max() <= 0.5


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_beyond_the_range_and_nan(mode):
    values = [[-5000, -1000, 0, 1000, 3000, 1e9]]
    expected = [0, 0, 64, 128, 255, 255]
    if mode == "F":
        values = [[*values[0], np.nan, np.inf, -np.inf]]
        expected = [*expected, 0, 255, 0]
    image = Image.fromarray(np.array(values, np.int32 if mode == "I" else np.float32))
    pixels = np.asarray(data_loader.to_rgb(image, (-1000.0, 3000.0)))
    assert pixels[0, :, 0].tolist() == expected
    # Where all training pictures are of one value, nothing can be seen.
    assert np.asarray(data_loader.to_rgb(image, (7.0, 7.0))).max() == 0


DEEP_SIZES = [((32, 32),), ((40, 60), (70, 50))]


def deepen(folder, scale, extension="png", dtype=np.uint16, offset=0):
    """Turn the pictures of a dataset into grey ones of more than 8 bits."""
    for file in folder.glob("*/*/*.png"):
        values = np.asarray(Image.open(file).convert("L")).astype(np.float64) * scale + offset
        file.unlink()
        Image.fromarray(values.astype(dtype)).save(file.with_suffix(f".{extension}"))
    return folder


@pytest.mark.parametrize("sizes", DEEP_SIZES)
@pytest.mark.parametrize("options", [
    {"scale": 16}, {"scale": 257}, {"scale": 1}, {"scale": 1 / 255, "extension": "tiff",
    "dtype": np.float32}, {"scale": 16, "extension": "tiff", "dtype": np.int32, "offset": -1024}])
def test_pictures_of_many_bits_share_the_range_of_the_training_pictures(
        arguments, tmp_path, capsys, options, sizes):
    """12 bits in 16, 16 bits, 8 bits in 16, floats to 1, a CT's negative values: all give the
    pixels of the same pictures of 8 bits with their darkest made black and their brightest white.
    """
    plain = write_pictures(tmp_path / "plain", sizes=sizes)
    deep = deepen(write_pictures(tmp_path / "deep", sizes=sizes), **options)
    grey = [np.asarray(Image.open(file).convert("L")) for file in plain.glob("train/*/*")]
    darkest = float(min(image.min() for image in grey))
    brightest = float(max(image.max() for image in grey))

    args = folder_args(arguments, deep)
    data = data_loader.open_dataset(args)
    offset = options.get("offset", 0)
    low = darkest * options["scale"] + offset
    high = brightest * options["scale"] + offset
    assert data.train.value_range == pytest.approx((low, high))
    out = capsys.readouterr().out
    assert "24 of 24 training pictures" in out
    assert f"from {low:g} to {high:g}" in out

    test, _ = data_loader.load_split("ImageFolder", "test", args, data.train.value_range)
    for part in (data.train, data.val, test):
        assert part.value_range == data.train.value_range
        for i in range(len(part.labels)):
            pixels = np.asarray(data_loader.load_image(part, i))
            assert (pixels == pixels[..., :1]).all()
    for i, file in enumerate(sorted(plain.glob("test/*/*"))):
        expected = np.asarray(Image.open(file).convert("L")).astype(float)
        expected = (expected - darkest) / (brightest - darkest) * 255
        pixels = np.asarray(data_loader.load_image(test, i))[..., 0]
        assert np.abs(pixels - expected.clip(0, 255)).max() <= 0.51

    images, _ = next(make_loader(data, args).epoch(0))  # what training sees, crops of the same
    assert 0.2 < images.mean() < 0.8
    from_cache = data_loader.open_dataset(args)
    assert from_cache.train.value_range == data.train.value_range


@pytest.mark.parametrize("sizes", DEEP_SIZES)
def test_own_validation_pictures_have_the_range_of_the_training_pictures(
        arguments, tmp_path, sizes):
    """Twice as bright as those, so that what is above their range is white."""
    counts = (("train", 8), ("val", 2), ("test", 3))
    folder = deepen(write_pictures(tmp_path / "pictures", counts=counts, sizes=sizes), scale=16)
    for file in folder.glob("val/*/*"):
        Image.fromarray(2 * np.asarray(Image.open(file))).save(file)

    data = data_loader.open_dataset(folder_args(arguments, folder))
    low, high = data.train.value_range
    assert high == max(np.asarray(Image.open(file)).max() for file in folder.glob("train/*/*"))
    for i, file in enumerate(sorted(folder.glob("val/*/*"))):
        values = np.asarray(Image.open(file)).astype(float)
        assert values.max() > high
        expected = ((values - low) / (high - low) * 255).clip(0, 255)
        pixels = np.asarray(data_loader.load_image(data.val, i))[..., 0]
        assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize("sizes", DEEP_SIZES)
def test_evaluation_and_transform_use_the_range_of_the_checkpoint(arguments, tmp_path, sizes):
    """Not that of the test pictures; a file that read_image has opened, or Pillow."""
    folder = deepen(write_pictures(tmp_path / "pictures", sizes=sizes), scale=16)
    args = folder_args(arguments, folder)
    for value_range in ((0.0, 4095.0), (-100.0, 9000.0)):
        info = INFO | {"mean": [0.0] * 3, "std": [1.0] * 3, "value_range": list(value_range)}
        test, _ = data_loader.load_split("ImageFolder", "test", args, value_range)
        loader = data_loader.EvaluationLoader(test, info, args, CPU)
        images = torch.cat([images for images, _ in loader])
        transform = data_loader.build_transform(info)
        files = sorted(folder.glob("test/*/*"))
        for image, file in zip(images, files, strict=True):
            for opened in (data_loader.read_image(file), Image.open(file)):
                torch.testing.assert_close(image, transform(opened), rtol=0, atol=1e-6)

        values = np.asarray(Image.open(files[0]), float)
        low, high = value_range
        expected = ((values - low) / (high - low) * 255).mean()
        seen = np.asarray(data_loader.load_image(test, 0)).mean()
        assert abs(seen - expected) < 0.5


def test_a_picture_far_outside_of_the_range_is_named(arguments, tmp_path, capsys):
    folder = deepen(write_pictures(tmp_path / "pictures"), scale=16)
    args = folder_args(arguments, folder)

    def printed():
        utils.print_once.cache_clear()
        capsys.readouterr()
        data_loader.open_dataset(args)
        return capsys.readouterr().out

    assert "far outside" not in printed()
    hot = np.zeros((40, 60), np.uint16)
    hot[5, 5] = 65535
    Image.fromarray(hot).save(folder / "test" / "cat" / "hot.png")
    for _ in range(2):  # the second time from the cache
        assert "far outside" in printed()
        assert "cat/hot.png" in printed()
    (folder / "test" / "cat" / "hot.png").rename(folder / "train" / "cat" / "hot.png")
    assert "cat/hot.png reaches from 0 to 65535, far outside" in printed()

    # A fault of several training pictures.
    for i in range(20):
        values = np.asarray(Image.open(folder / "train" / "dog" / "000.png"))
        Image.fromarray(values).save(folder / "train" / "dog" / f"more{i}.png")
    for name in ("hot1.png", "hot2.png"):
        Image.fromarray(hot).save(folder / "train" / "dog" / name)
    assert "cat/hot.png reaches from 0 to 65535, far outside" in printed()
    assert "so do 2 more" in printed()


def test_deep_test_pictures_of_a_model_that_saw_none_are_warned_about(arguments, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    Image.fromarray(np.full((40, 60), 30000, np.uint16)).save(folder / "test" / "cat" / "deep.png")
    utils.print_once.cache_clear()
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.value_range is None
    assert "1 of 10 pictures have more than 8 bits" in capsys.readouterr().out


def test_colours_of_16_bits_are_said_to_be_cut(tmp_path, capsys):
    """Pillow reads the upper 8 of them; a PNG by hand, since it cannot write one either."""
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    utils.print_once.cache_clear()
    image = data_loader.read_image(tmp_path / "a.png")
    assert np.asarray(image)[0, 0].tolist() == [0, 2, 4]
    assert "16 bits per channel" in capsys.readouterr().out


def upright_rgb(image, value_range=None):
    """The recipe of checkpoints/README.md for those who have Pillow and NumPy alone."""
    image = ImageOps.exif_transpose(image)  # as the camera was held
    if image.mode.startswith(("I", "F")):  # more than 8 bits
        low, high = value_range or ((0, 1) if image.mode == "F" else (0, 65535))
        values = np.nan_to_num(np.asarray(image, dtype="float64"), nan=low)
        values = (values - low) * (255 / (high - low))
        image = Image.fromarray(values.clip(0, 255).round().astype("uint8"))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV",
                                  "I", "F", "I;16", "transparent palette", "transparent grey"])
def test_recipe_with_pillow_alone_makes_the_same_pixels(tmp_path, mode):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (12, 20, 4), dtype=np.uint8)
    value_range = None
    if mode in ("I", "F", "I;16"):
        dtype = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        value_range = (20.0, 700.0)
        image = Image.fromarray(generator.uniform(0, 800, (12, 20)).astype(dtype))
    elif mode == "transparent palette":
        image = Image.fromarray(noise[..., :3]).quantize(8)
        image.info["transparency"] = 3
    elif mode == "transparent grey":
        image = Image.fromarray(noise[..., 0] // 32 * 32)
        image.info["transparency"] = 64
    else:
        image = Image.fromarray(noise)
        image = image.convert("LA" if mode == "PA" else "RGB" if mode == "HSV" else mode)
        image = image.convert(mode)
    image.getexif()[ExifTags.Base.Orientation] = 8

    expected = np.asarray(data_loader.to_rgb(image, value_range))
    assert expected.shape == (20, 12, 3)
    assert np.array_equal(np.asarray(upright_rgb(image, value_range)), expected)
    if value_range:
        by_mode = np.asarray(upright_rgb(image))
        assert np.array_equal(by_mode, np.asarray(data_loader.to_rgb(image)))


def test_a_person_sees_the_images_of_a_part(arguments, tmp_path):
    for name, sizes in (("small", ((32, 32),)), ("photographs", ((40, 60), (70, 50)))):
        folder = write_pictures(tmp_path / name, sizes=sizes)
        test = load_test(folder_args(arguments, folder))
        for i, file in enumerate(sorted((folder / "test").glob("*/*.png"))):
            seen = np.asarray(data_loader.load_image(test, i))
            assert np.array_equal(seen, np.asarray(Image.open(file)))


def test_small_images_are_cropped_for_a_model_of_photographs():
    """A folder whose test pictures all are small, while one of the training pictures is not."""
    pixels = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    images = data_loader.Images(pixels, None, torch.arange(3))
    info = INFO | {"crop_pct": 0.875}
    args = types.SimpleNamespace(num_workers=0)
    (got, _), = data_loader.EvaluationLoader(images, info, args, CPU)
    for image, expected in zip(got, pixels, strict=True):
        picture = Image.fromarray(expected.permute(1, 2, 0).numpy())
        cropped = np.asarray(data_loader.crop_to_size(info)(picture))
        assert np.array_equal((255 * image).round().permute(1, 2, 0), cropped)


def test_crops_leave_other_random_numbers_alone(monkeypatch):
    """Also those of a GPU, which torch.manual_seed would reset, and with them the dropout."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    assert data_loader.random_crop(70, 50, 3) == data_loader.random_crop(70, 50, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert not seeded


@pytest.mark.parametrize("width, height", [
    (65000, 1), (1, 65000), (30000, 40), (3, 400), (64, 64), (300, 200), (50, 399), (640, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_to_size_is_torchvisions(width, height, interpolation):
    """To the bit; of strips the middle is cut out first, half a pixel may be between the two."""
    ramp = np.add.outer(np.linspace(0, 128, height), np.linspace(0, 127, width)).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB")
    info = INFO | {"image_size": 56, "crop_pct": 0.875, "interpolation": interpolation}
    cropped = data_loader.crop_to_size(info)(image)
    assert cropped.size == (56, 56)

    if max(width, height) > 1000 * min(width, height):
        # torchvision would enlarge the whole strip; its middle is as good as one colour.
        expected = np.full((56, 56, 3), ramp[height // 2, width // 2])
    else:
        expected = np.asarray(torchvision.transforms.Compose([
            torchvision.transforms.Resize(
                64, torchvision.transforms.InterpolationMode(interpolation)),
            torchvision.transforms.CenterCrop(56)])(image))
    difference = np.abs(np.asarray(cropped, float) - expected).max()
    is_strip = max(width, height) > 10 * min(width, height)
    assert difference <= (1 if is_strip else 0)


def upload(content, filename):
    """An open file as Flask and Streamlit hand one over."""
    class Upload(io.BytesIO):
        pass

    file = Upload(content)
    file.filename = filename
    return file


@pytest.mark.parametrize("filename, name", [("a.txt", "a.txt"), (None, "the file")])
def test_an_upload_that_is_no_picture_is_called_so(filename, name):
    with pytest.raises(utils.UserError) as error:
        data_loader.read_image(upload(b"no picture", filename))
    assert str(error.value) == f"{name} is not a picture"


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "tiff", "webp", "bmp", "ico", "psd"])
def test_any_upload_ends_in_a_picture_or_a_user_error(extension):
    """Damaged in a hundred ways, cut off, or of another kind than its name says."""
    generator = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    if extension == "psd":  # which Pillow reads and does not write
        head = struct.pack(">4sH6xHIIHHIII", b"8BPS", 1, 3, 20, 20, 8, 3, 0, 0, 0)
        stream.write(head + struct.pack(">H", 0) + pixels.tobytes())
    else:
        Image.fromarray(pixels).save(stream, Image.registered_extensions()[f".{extension}"])
    whole = stream.getvalue()
    transform = data_loader.build_transform(
        INFO | {"mean": [0.5] * 3, "std": [0.2] * 3})

    num_read = 0
    for _ in range(100):
        content = bytearray(whole[:generator.randrange(len(whole) // 2, len(whole) + 1)])
        for _ in range(generator.randrange(6)):
            content[generator.randrange(min(len(content), 120))] = generator.randrange(256)
        try:
            image = data_loader.read_image(upload(bytes(content), "upload"))
        except utils.UserError as error:
            assert str(error).count("upload") == 1
        else:
            assert transform(image).shape == (3, 32, 32)
            num_read += 1
    assert num_read < 100


# Letters that are drawn ---------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "test"])
def test_letters_are_as_many_of_each_class(part):
    images, class_names = data_loader.load_split("Letters", part, None)
    count = data_loader.LETTER_COUNTS[part]
    assert class_names == list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert images.pixels.shape == (36 * count, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.bincount().tolist() == [count] * 36
    assert torch.equal(images.pixels[:, 0], images.pixels[:, 2])  # grey


@pytest.mark.slow
def test_letters_train_on_crops_without_their_test_images(arguments):
    args = arguments("baseline", "--dataset-name", "Letters")
    data = data_loader.open_dataset(args)
    test, _ = data_loader.load_split("Letters", "test", args)
    assert data.augmentation == "crop"
    assert len(test.labels) >= 3600
    assert not data_loader.duplicates_of_training_images(test, data)


@pytest.mark.slow
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
    np.testing.assert_allclose(grey.mean(), 28.02, atol=0.3)

    # The centres of mass of the first letters, in px.
    line = torch.arange(32.0)
    ink = (grey[:5] - 128).clamp(min=0)
    mass = ink.sum((1, 2))
    rows = (ink.sum(2) * line).sum(1) / mass
    columns = (ink.sum(1) * line).sum(1) / mass
    centers = [[16.3, 16.8], [13.0, 17.3], [15.8, 11.9], [17.6, 14.0], [14.8, 12.5]]
    np.testing.assert_allclose(torch.stack([rows, columns], 1), centers, atol=0.5)


@pytest.mark.slow
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
