"""Datasets, split, preprocessing and loaders against torchvision, PIL and small files as they come.

    python -m pytest tests/test_data_loader.py
"""
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import threading
import time
import types
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_sharer

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image, ImageOps

import data_loader
import utils
from conftest import write_pictures

CPU = torch.device("cpu")
FLAGS = ["--dataset-name", "ImageFolder", "--val-fraction", "0.25", "--batch-size", "4",
         "--num-workers", "0"]
INFO = {"image_size": 32, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 10}


def folder_args(arguments, folder, *flags):
    return arguments("baseline", *FLAGS, "--dataset-dir", str(folder), *flags)


def made_up(pixels, augmentation):
    """A dataset of these pixels (N, 3, H, H), each image a class of its own."""
    images = data_loader.Images(pixels, None, torch.arange(len(pixels)), [])
    return data_loader.Dataset("made up", [], images, images, "", augmentation)


def loader_of(data, args, device=CPU, **info):
    return data_loader.TrainingLoader(data, INFO | info, args, device)


def assert_equal_batches(ours, theirs):
    """Both are the same batches to the bit, and some; returns how many."""
    number = 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        number += 1
    assert number
    return number


# Resizing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 64, 48, 32, 20])
def test_resizing_agrees_with_pil(size, interpolation):
    """Real edges and noise: PIL rounds to bytes twice, so within 1.5/255, 0.4/255 in the mean."""
    generator = np.random.default_rng(0)
    pixels = np.kron(generator.integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    pixels[::2] = generator.integers(0, 256, (16, 32, 3))
    mode = Image.Resampling[interpolation.upper()]
    wanted = np.asarray(Image.fromarray(pixels).resize((size, size), mode))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    got = data_loader.resize(images, size, interpolation)
    assert got.is_contiguous(memory_format=torch.channels_last)
    difference = np.abs(got[0].permute(1, 2, 0).numpy() - wanted / 255)
    assert difference.max() < 1.5 / 255 and difference.mean() < 0.4 / 255


# Split --------------------------------------------------------------------------------------------

def test_split_is_stratified_and_follows_split_seed_alone(arguments):
    one, two, three = (data_loader.open_dataset(arguments("baseline", *flags)) for flags in (
        ["--seed", "1"], ["--seed", "2", "--batch-size", "8"], ["--split-seed", "1"]))
    assert one.split_fingerprint == two.split_fingerprint != three.split_fingerprint
    assert torch.equal(one.val.pixels, two.val.pixels)
    assert not torch.equal(one.val.pixels, three.val.pixels)
    counts = torch.bincount(one.val.labels)
    assert len(one.train.labels) + len(one.val.labels) == 1437
    assert counts.max() - counts.min() <= 1
    digits = {image.numpy().tobytes() for image in one.train.pixels}
    assert not any(image.numpy().tobytes() in digits for image in one.val.pixels)


def test_digits_test_part_is_a_fixed_fifth_that_training_does_not_hold(arguments):
    args = arguments("baseline")
    test, names = data_loader.load_split("Digits", "test", args)
    data = data_loader.open_dataset(args)
    assert len(test.labels) == 360 and names == [str(i) for i in range(10)]
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    assert not any(image.numpy().tobytes() in seen for image in test.pixels)


def test_augmentation_suits_the_images(arguments, tmp_path):
    photographs = write_pictures(tmp_path / "photographs")
    small = write_pictures(tmp_path / "small", sizes=((32, 32),))
    assert data_loader.open_dataset(arguments("baseline")).augmentation == "crop"
    for folder, wanted in ((photographs, "resized_crop"), (small, "flip_crop")):
        assert data_loader.open_dataset(folder_args(arguments, folder)).augmentation == wanted
    with pytest.raises(utils.UsageError, match="--augmentation crop .* take resized_crop or none"):
        data_loader.open_dataset(folder_args(arguments, photographs, "--augmentation", "crop"))


@pytest.mark.parametrize("flags", [["--batch-size", "1294", "--accumulate-steps", "1"],
                                   ["--batch-size", "432", "--accumulate-steps", "3"]])
def test_an_update_of_more_images_than_there_are_is_refused(arguments, flags):
    with pytest.raises(utils.UsageError, match=f"^{' '.join(flags)} is more than the 1293 training"):
        data_loader.open_dataset(arguments("baseline", *flags))


# Training batches ---------------------------------------------------------------------------------

def test_epoch_follows_from_seed_and_number_alone(arguments):
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    loader = loader_of(data, args)
    number = assert_equal_batches(loader.epoch(3), loader_of(data, args).epoch(3))
    assert number == len(loader) == len(data.train.labels) // 64
    first, _ = next(loader.epoch(3))
    assert not torch.equal(first, next(loader.epoch(4))[0])
    other = arguments("baseline", "--augmentation", "flip_crop", "--seed", "6")
    assert not torch.equal(first, next(loader_of(data, other).epoch(3))[0])


@pytest.mark.parametrize("mixing", [["--mixup-alpha", "0.8"], ["--cutmix-alpha", "1"], []])
@pytest.mark.parametrize("augmentation", ["none", "crop", "flip_crop", "resized_crop"])
def test_epoch_does_not_depend_on_what_was_drawn_before(arguments, augmentation, mixing):
    """Neither before it nor between two of its batches, from any of the global generators."""
    args = arguments("baseline", "--augmentation", augmentation, *mixing)
    data = data_loader.open_dataset(args)

    def drawing(seed):
        for batch in loader_of(data, args).epoch(1):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield batch

    list(loader_of(data, args).epoch(0))
    assert_equal_batches(drawing(1), drawing(2))


@pytest.mark.parametrize("augmentation", ["flip_crop", "resized_crop"])
def test_accumulated_batches_are_the_large_batch(arguments, augmentation):
    """Four batches of 8 are the batch of 32 to the bit, whole updates only."""
    flags = ["--augmentation", augmentation]
    one = arguments("baseline", *flags, "--batch-size", "32")
    four = arguments("baseline", *flags, "--batch-size", "8", "--accumulate-steps", "4")
    data = data_loader.open_dataset(one)
    large, small = loader_of(data, one), list(loader_of(data, four).epoch(2))
    assert len(loader_of(data, four)) == len(small) == 4 * len(large) == 160  # of 1293 // 8 = 161
    parts = [[torch.cat(tensors) for tensors in zip(*small[i:i + 4], strict=True)]
             for i in range(0, len(small), 4)]
    assert_equal_batches(parts, large.epoch(2))


def test_accumulated_batches_of_photographs_are_the_large_batch(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    one = folder_args(arguments, folder, "--batch-size", "6")
    three = folder_args(arguments, folder, "--batch-size", "2", "--accumulate-steps", "3")
    data = data_loader.open_dataset(one)
    small = list(loader_of(data, three).epoch(2))
    assert len(small) == len(loader_of(data, three)) == 9  # 18 images
    parts = [[torch.cat(tensors) for tensors in zip(*small[i:i + 3], strict=True)]
             for i in range(0, 9, 3)]
    assert_equal_batches(parts, loader_of(data, one).epoch(2))


@pytest.mark.parametrize("augmentation", ["crop", "flip_crop"])
def test_training_images_are_pils_shifts_and_mirrors(arguments, augmentation):
    """Each is a shift or mirror that PIL makes of its source, within 1.5/255; all kinds occur."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    args = arguments("baseline", "--batch-size", "16")
    loader, found = loader_of(made_up(pixels, augmentation), args, image_size=64), set()
    for image, label in zip(*next(loader.epoch(0)), strict=True):
        source = Image.fromarray(pixels[label].permute(1, 2, 0).numpy())
        padded, errors = ImageOps.expand(source, 4), {}
        for top, left, flip in itertools.product(range(9), range(9), (False, True)):
            crop = padded.crop((left, top, left + 32, top + 32))
            crop = crop.resize((64, 64), Image.Resampling.BICUBIC)
            wanted = np.asarray(ImageOps.mirror(crop) if flip else crop, dtype=np.float32)
            difference = np.abs(wanted / 255 - image.permute(1, 2, 0).numpy())
            errors[top, left, flip] = difference.max()
        best = min(errors, key=errors.get)
        assert errors[best] < 1.5 / 255
        found.add(best)
    assert len({top for top, _, _ in found}) > 4
    assert len({left - top for top, left, _ in found}) > 4
    flips = {False, True} if augmentation == "flip_crop" else {False}
    assert {flip for *_, flip in found} == flips


def test_without_augmentation_images_stay_as_they_are(arguments):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    loader = loader_of(made_up(pixels, "none"), arguments("baseline", "--batch-size", "16"))
    images, labels = next(loader.epoch(0))
    assert torch.equal(images, pixels[labels] / 255) and labels.tolist() != list(range(16))


def test_mixing_is_timms_and_follows_the_seed(arguments):
    args = arguments("baseline", "--mixup-alpha", "0.8")
    data = data_loader.open_dataset(args)
    third = list(loader_of(data, args).epoch(0))[2]
    images, labels = third
    plain, hard = list(loader_of(data, arguments("baseline")).epoch(0))[2]
    torch.testing.assert_close(labels.sum(1), torch.ones(64))
    i = (hard != hard.flip(0)).nonzero()[0].item()
    share = labels[i, hard[i]]
    assert 0 < share < 1
    wanted = share * plain + (1 - share) * plain.flip(0)
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-5)
    assert_equal_batches([third], itertools.islice(loader_of(data, args).epoch(0), 2, 3))


def test_every_batch_is_mixed_by_a_share_of_its_own(arguments):
    args = arguments("baseline", "--mixup-alpha", "0.8")
    loader = loader_of(data_loader.open_dataset(args), args)
    shares = {round(labels.max(1).values.min().item(), 4) for _, labels in loader.epoch(0)}
    assert len(shares) > len(loader) / 2


@pytest.mark.parametrize("mixing", [[], ["--mixup-alpha", "0.8"], ["--cutmix-alpha", "1"]])
def test_equal_sizes_are_one_tensor_for_two(arguments, mixing):
    args = arguments("distillation", *mixing)
    data = data_loader.open_dataset(args)
    batches = list(loader_of(data, args).epoch_with_teacher(1))
    assert all(images is teacher_images for images, teacher_images, _ in batches)
    ours = [(images, labels) for images, _, labels in batches]
    assert_equal_batches(ours, loader_of(data, args).epoch(1))


@pytest.mark.parametrize("mixing", [[], ["--mixup-alpha", "0.8"]])
@pytest.mark.parametrize("augmentation", ["flip_crop", "resized_crop"])
def test_teacher_sees_the_same_crop_in_more_detail(arguments, augmentation, mixing):
    """The student's images are its own to the bit, mixed or not, and the baseline's."""
    flags = ["--augmentation", augmentation, *mixing]
    args = arguments("distillation", "--teacher-image-size", "64", *flags)
    data = data_loader.open_dataset(args)
    batches = list(loader_of(data, args).epoch_with_teacher(1))
    ours = [(images, labels) for images, _, labels in batches]
    assert_equal_batches(ours, loader_of(data, args).epoch(1))
    assert_equal_batches(ours, loader_of(data, arguments("baseline", *flags)).epoch(1))
    images, teacher_images, _ = batches[0]
    assert teacher_images.shape == (64, 3, 64, 64)
    small = torch.nn.functional.interpolate(teacher_images, size=32, mode="bicubic", antialias=True)
    assert (small - images).abs().mean() < 0.02


def test_photographs_for_two_are_those_of_the_epoch(arguments, tmp_path):
    """The student's pixels are the baseline's to the bit, whatever size the teacher has."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    data = data_loader.open_dataset(args)
    baseline = list(loader_of(data, args).epoch(1))
    for size in (40, 48, 96):
        args.teacher_image_size = size
        batches = list(loader_of(data, args).epoch_with_teacher(1))
        assert all(teacher_images.shape[-1] == size for _, teacher_images, _ in batches)
        assert_equal_batches([(images, labels) for images, _, labels in batches], baseline)
        images, teacher_images, _ = batches[0]
        small = torch.nn.functional.interpolate(teacher_images, size=32, mode="bicubic",
                                                antialias=True)
        assert (small - images).abs().mean() < 0.05  # the same crop


# Where the images are -----------------------------------------------------------------------------

@pytest.mark.parametrize("free, home", [(1000 * 2**20, "cuda"), (2**19, "cpu"), (2**17, "cpu")])
def test_images_that_do_not_fit_stay_in_host_memory(monkeypatch, capsys, free, home):
    cached = [2**32]  # of a former model: torch gives it back, or both would stay on the host
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0 if cached else free, 2**33))
    pixels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    data_loader.print_once.cache_clear()
    for _ in range(2):
        assert data_loader.storage_device(pixels, torch.device("cuda")).type == home
    assert capsys.readouterr().out.count("stay in host memory") == (home == "cpu")
    assert data_loader.storage_device(pixels, CPU) == CPU


def test_device_without_its_number_is_the_same_device(arguments):
    """torch.device("cuda") does not equal a tensor's "cuda:0"; seen here from "cpu" and "cpu:0"."""
    args = arguments("baseline")
    loader = loader_of(data_loader.open_dataset(args), args, torch.device("cpu", 0))
    assert loader.source.device != loader.source.pixels.device
    assert len(list(loader.epoch(0))) == len(loader)


@pytest.mark.cuda
def test_images_in_host_memory_make_the_same_batches(arguments, monkeypatch):
    args, device = arguments("baseline", "--augmentation", "flip_crop"), torch.device("cuda")
    data = data_loader.open_dataset(args)
    resident = loader_of(data, args, device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert_equal_batches(resident.epoch(1), loader_of(data, args, device).epoch(1))
    assert all(tensor.is_cuda for tensor in next(resident.epoch(1)))


# Photographs --------------------------------------------------------------------------------------

def smooth_photograph(file, width, height, **options):
    """A photograph without fine detail or sharp edges, saved as `file` and returned."""
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, **options)
    return image


def views_of(file, *sizes, seed=0, augmentation="resized_crop"):
    images = data_loader.Images(None, [file], torch.zeros(1), [])
    return data_loader.random_views(sizes, "bicubic", augmentation, images, 0, seed)


def test_photographs_are_cropped_by_torchvisions_rule(tmp_path):
    """A PNG is decoded whole, so the crop is PIL's to the bit; half of them are mirrored."""
    image, mirrored = smooth_photograph(tmp_path / "a.png", 300, 200), 0
    areas = []
    for seed in range(60):
        torch.manual_seed(seed)
        top, left, height, width = torchvision.transforms.RandomResizedCrop.get_params(
            image, data_loader.CROP_SCALE, data_loader.CROP_RATIO)
        wanted = image.resize((64, 64), Image.Resampling.BICUBIC,
                              (left, top, left + width, top + height))
        view, = views_of(tmp_path / "a.png", 64, seed=seed)
        is_mirrored = view.tobytes() == ImageOps.mirror(wanted).tobytes()
        assert is_mirrored or view.tobytes() == wanted.tobytes()
        mirrored += is_mirrored
        areas.append(width * height / (300 * 200))
    assert 15 < mirrored < 45 and min(areas) < 0.45 and max(areas) > 0.7
    whole, = views_of(tmp_path / "a.png", 64, augmentation="none")
    assert whole.tobytes() == image.resize((64, 64), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("turned", [1, 6])
def test_large_jpegs_are_decoded_in_part_and_look_the_same(tmp_path, monkeypatch, turned):
    """Turned by EXIF or not; never below the size that the crop needs, whatever the teacher's."""
    exif = Image.Exif()
    exif[data_loader.TURNED] = turned
    smooth_photograph(tmp_path / "a.jpg", 2400, 1600, quality=95, exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).save(tmp_path / "a.png")
    read, decoded = data_loader.read_image, []

    def watched(file, least=None):
        decoded.append(read(file, least))
        return decoded[-1]
    monkeypatch.setattr(data_loader, "read_image", watched)
    for seed in range(8):
        decoded.clear()
        small, large = views_of(tmp_path / "a.jpg", 64, 200, seed=seed)
        assert len(decoded) <= 2 and max(decoded[0].size) < 2400
        for image, size in ((decoded[0], 64), (decoded[-1], 200)):
            torch.manual_seed(seed)
            _, _, *crop = torchvision.transforms.RandomResizedCrop.get_params(
                image, data_loader.CROP_SCALE, data_loader.CROP_RATIO)
            assert min(crop) >= size - 1  # but for rounding
        assert small.tobytes() == views_of(tmp_path / "a.jpg", 64, seed=seed)[0].tobytes()
        assert large.tobytes() == views_of(tmp_path / "a.jpg", 200, seed=seed)[0].tobytes()
        for view, whole in zip((small, large), views_of(tmp_path / "a.png", 64, 200, seed=seed),
                               strict=True):
            difference = np.abs(np.asarray(view, float) - np.asarray(whole, float))
            assert difference.mean() < 1 and difference.max() < 12


def test_a_crop_is_never_enlarged_where_the_picture_has_the_pixels(tmp_path):
    smooth_photograph(tmp_path / "a.jpg", 1600, 1200)
    sizes = {least: data_loader.read_image(tmp_path / "a.jpg", least).size
             for least in (None, 601, 600, 301, 300, 150, 10)}
    assert sizes == {None: (1600, 1200), 601: (1600, 1200), 600: (800, 600), 301: (800, 600),
                     300: (400, 300), 150: (200, 150), 10: (200, 150)}


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
    words = "No such file" if fault == "lost" else "truncated"
    loader = loader_of(data, args)
    with pytest.raises(utils.UserError, match=f"{file.name} cannot be read .*{words}") as error:
        for epoch in range(10):  # the last incomplete batch is left out
            list(loader.epoch(epoch))
    assert "\n" not in str(error.value)


def test_photographs_leave_torchs_random_numbers_alone(arguments, tmp_path):
    """Dropout draws from the same generator, and a resumed run starts one more DataLoader."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    loader, before = loader_of(data_loader.open_dataset(args), args), torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(params=["fork", "spawn"])  # spawn is how Windows and macOS start workers
def start_method(request):
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_photographs_do_not_depend_on_workers(arguments, tmp_path, start_method):
    folder = write_pictures(tmp_path / "pictures")
    args, two = (folder_args(arguments, folder, "--num-workers", number) for number in "02")
    data = data_loader.open_dataset(args)
    assert data.augmentation == "resized_crop" and data.train.pixels is None
    alone, shared = loader_of(data, args), loader_of(data, two)
    for epoch in (0, 1):
        assert assert_equal_batches(alone.epoch(epoch), shared.epoch(epoch)) == 4
    images, _ = next(alone.epoch(0))
    assert images.shape == (4, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_repeated_images_are_found_where_one_part_is_kept_as_pixels_alone(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    shutil.copy(folder / "train" / "dog" / "001.png", folder / "test" / "cat" / "b.png")
    Image.new("RGB", (50, 40)).save(folder / "train" / "cat" / "large.png")
    args = folder_args(arguments, folder)
    data, (test, _) = data_loader.open_dataset(args), data_loader.load_split("ImageFolder", "test",
                                                                            args)
    assert data.train.pixels is None and test.pixels is not None
    assert data_loader.duplicates_of_training_images(test, data) == ["cat/b.png"]


@pytest.mark.parametrize("size", [32, 60])
def test_images_that_training_repeats_are_named(arguments, tmp_path, size):
    """To the bit, as pixels or as files, whether they train or validate."""
    folder = write_pictures(tmp_path / "pictures", sizes=((size, size), (size, size + size // 50)))
    args = folder_args(arguments, folder)
    data, (test, _) = data_loader.open_dataset(args), data_loader.load_split("ImageFolder", "test",
                                                                            args)
    assert (data.train.pixels is None) == (size == 60)
    assert data_loader.duplicates_of_training_images(test, data) == []
    for i in range(8):  # of which some are held out to validate
        picture = folder / "train" / "dog" / f"{i:03d}.png"
        shutil.copy(picture, folder / "test" / "cat" / f"b{i}.png")
    test, _ = data_loader.load_split("ImageFolder", "test", args)
    assert data_loader.duplicates_of_training_images(test, data) == [f"cat/b{i}.png" for i in range(8)]
    no_names = test._replace(names=[])
    assert data_loader.duplicates_of_training_images(no_names, data) == [f"number {3 + i}" for i in range(8)]


def test_an_epoch_left_early_does_not_disturb_the_next(arguments, tmp_path):
    """A run that was stopped within one, say, whose workers go on."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"), "--num-workers", "1")
    data = data_loader.open_dataset(args)
    loader = loader_of(data, args)
    next(loader.epoch(0))
    assert_equal_batches(loader.epoch(1), loader_of(data, args).epoch(1))


@pytest.mark.skipif(os.name == "nt", reason="Windows starts workers without a fork")
@pytest.mark.parametrize("is_worker", (True, False))
def test_worker_says_nothing_of_a_parent_that_ended(is_worker, capfd):
    """A tensor's memory is handed over by socket, and a parent that is stopped leaves it half-way:
    ConnectionResetError in a thread of the worker. The control without the hook is told of it."""
    def worker(connection):
        if is_worker:
            data_loader.init_worker(0)
        connection.send(resource_sharer.DupFd(os.pipe()[0])._id[0])
        connection.recv()
    fork = multiprocessing.get_context("fork")
    mine, its = fork.Pipe()
    process = fork.Process(target=worker, args=(its,))
    process.start()
    with socket.socket(socket.AF_UNIX) as half_way:
        half_way.connect(mine.recv())
    time.sleep(0.5)
    mine.send("end")
    process.join()
    assert ("Traceback" in capfd.readouterr().err) == (not is_worker)


# Evaluation batches -------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batch", [(32, 512), (64, 392), (224, 32), (1024, 16)])
def test_evaluation_takes_large_batches_of_bounded_memory(size, batch):
    images = made_up(torch.zeros(600, 3, 32, 32, dtype=torch.uint8), "none").val
    args = types.SimpleNamespace(num_workers=0)
    loader = data_loader.EvaluationLoader(images, INFO | {"image_size": size}, args, CPU)
    pixels, _ = next(iter(loader))
    assert pixels.shape == (batch, 3, size, size) and loader.batch_size == batch
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [32, 48])
def test_evaluation_yields_all_images_in_order_each_time(size):
    data = made_up(torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8), "none")
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
    test, _ = data_loader.load_split("ImageFolder", "test", args)
    info = {"image_size": size, "crop_pct": 1.0 if tolerance else 0.875,
            "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    loader = data_loader.EvaluationLoader(test, info, args, CPU)
    images = torch.cat([images for images, _ in loader])
    transform = data_loader.build_transform(info)
    mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
    allowed = tolerance / min(info["std"]) + 1e-6 if tolerance else 0
    files = sorted((folder / "test").glob("*/*.png"))
    for image, file in zip(images, files, strict=True):
        wanted = transform(Image.open(file))
        assert (wanted - (image - mean) / std).abs().max() <= allowed


# Downloads ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parts", [("CIFAR100", [{"train": True}]),
                                         ("CIFAR10", [{"train": True}]),
                                         ("Flowers102", [{"split": "train"}, {"split": "val"}])])
def test_training_opens_no_other_part_of_a_download(arguments, monkeypatch, name, parts):
    opened = []

    def open_part(self, root, download, **part):
        opened.append(part)
        self.data, self.classes = np.zeros((300, 32, 32, 3), np.uint8), ["a", "b", "c"]
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
    cls, contents = torchvision.datasets.CIFAR100, {}
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
    assert data.class_names[0] == "class 00" and data.augmentation == "flip_crop"
    assert len(data.train.labels) == len(data.val.labels) == 100
    whole, wanted = (pickle.loads(contents[part])["data"].reshape(-1, 3, 32, 32)
                     for part in ("train", "test"))
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    assert seen == {image.tobytes() for image in whole}
    test, _ = data_loader.load_split("CIFAR100", "test", args)
    assert np.array_equal(test.pixels.numpy(), wanted)


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
    words = f"127.0.0.1:9/{file} to .*{place}/{file}.* by hand"
    with pytest.raises(utils.UserError, match=words) as error:
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert time.time() - start < 10
    assert "--quick" in str(error.value) and "\n" not in str(error.value)
    assert "damaged" not in str(error.value)


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
    words = f"{archive} is damaged, its MD5 should be {md5}$"
    with pytest.raises(utils.UserError, match=words) as error:
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert str(error.value).count("is damaged, ") == 1


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
    def fail(self, **how):
        raise fault

    fake = type("CIFAR100", (torchvision.datasets.CIFAR100,), {"__init__": fail})
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    with pytest.raises(seen, match=fault.strerror):
        data_loader.open_dataset(arguments("baseline", "--dataset-name", "CIFAR100"))


def test_flowers102_keeps_its_own_split(arguments, tmp_path, monkeypatch, serve):
    """The real download of small files in the real layout: 306 JPEG pictures, a third a part."""
    server, cls = tmp_path / "server", torchvision.datasets.Flowers102
    server.mkdir()
    generator, ids = np.random.default_rng(0), np.arange(1, 307)
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
    assert len(data.train.labels) == len(data.val.labels) == 102 and len(data.class_names) == 102
    assert data.class_names[0] == "pink primrose" and data.augmentation == "resized_crop"
    images, labels = next(loader_of(data, args).epoch(0))
    assert images.shape == (8, 3, 32, 32) and labels.max() < 102
    test, _ = data_loader.load_split("Flowers102", "test", args)
    assert test.labels.tolist() == list(range(102))
    wanted = Image.open(tmp_path / "data" / "flowers-102" / "jpg" / "image_00208.jpg")
    assert np.array_equal(np.asarray(data_loader.load_image(test, 3)), np.asarray(wanted))


# Folders of pictures ------------------------------------------------------------------------------

def test_training_knows_of_test_pictures_only_whether_they_can_be_decoded(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    args = folder_args(arguments, folder)
    before = data_loader.open_dataset(args)
    for file in (folder / "test").glob("*/*.png"):
        Image.new("RGB", (20, 30)).save(file)
    after = data_loader.open_dataset(args)
    assert before.split_fingerprint == after.split_fingerprint
    assert_equal_batches(loader_of(before, args).epoch(0), loader_of(after, args).epoch(0))
    file.write_bytes(b"not a picture")
    with pytest.raises(utils.UserError, match="1 of 9 files .* at fault: .*cannot be read"):
        data_loader.open_dataset(args)


def test_what_is_no_picture_is_passed_over_and_counted(arguments, tmp_path, capsys):
    """Hidden files and folders, texts, a pipe, a dangling link, a link that leads in a circle."""
    folder = write_pictures(tmp_path / "pictures")
    before, cat = data_loader.open_dataset(folder_args(arguments, folder)), folder / "train" / "cat"
    for name in (".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a.png", "cat/._000.png",
                 "cat/notes.txt"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"no picture")
    os.mkfifo(cat / "pipe.png")
    (cat / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (cat / "circle").symlink_to(folder / "train")
    capsys.readouterr()
    data_loader.print_once.cache_clear()
    after = data_loader.open_dataset(folder_args(arguments, folder))
    assert after.split_fingerprint == before.split_fingerprint
    out = capsys.readouterr().out
    assert out.count("5 files are no pictures or hidden, and are passed over") == 1
    assert "ImageFolder: 3 classes, 18 training images, 6 validation images" in out


def test_image_folder_takes_its_own_validation_part(arguments, tmp_path):
    counts = (("train", 8), ("val", 2), ("test", 3))
    folder = write_pictures(tmp_path / "pictures", counts=counts)
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert len(data.train.labels) == 24 and len(data.val.labels) == 6
    assert data.class_names == ["cat", "dog", "eel"]


def test_small_pictures_of_one_size_are_kept_as_pixels(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.pixels.shape == (18, 3, 32, 32) and data.train.files is None
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    for file in (folder / "train").glob("*/*.png"):
        assert np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() in seen


@pytest.mark.parametrize("sizes", [((32, 40),), ((97, 97),), ((32, 32), (40, 40))])
def test_other_pictures_stay_files(arguments, tmp_path, sizes):
    """Not square, too large, or of two sizes."""
    folder = write_pictures(tmp_path / "pictures", sizes=sizes)
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.pixels is None and len(data.train.files) == 18


def spoil(folder, fault):
    """Give a dataset of pictures one of the faults of the next test."""
    dog = folder / "train" / "dog" / "002.png"
    if fault == "no test":
        for file in sorted((folder / "test").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (folder / "test").rmdir()
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


@pytest.mark.parametrize("fault, message", [
    ("no test", "pictures/test must have two or more folders with pictures"),
    ("one class", "pictures/train must have two or more folders with pictures"),
    ("empty test class", "test/fox should be a class and has no picture"),
    ("other class", "test/ and train/ .* the same class folders; 1 differ: fox"),
    ("broken", "2 of 24 files .* at fault: .*cat/001.png cannot be read"),
    ("truncated", "1 of 24 files .* at fault: .*dog/002.jpg cannot be read"),
    ("huge", "1 of 24 files .* at fault: .*dog/002.png cannot be read"),
    ("many", "12 of 24 files"), ("empty class", "eel"),
    ("no train", "pictures/train must have two or more"), ("one picture", "--val-fraction")])
def test_faults_of_a_folder_are_one_sentence(arguments, tmp_path, fault, message):
    folder = write_pictures(tmp_path / "pictures")
    spoil(folder, fault)
    with pytest.raises(utils.UserError, match=message) as error:
        data_loader.open_dataset(folder_args(arguments, folder))
    assert "\n" not in str(error.value) and str(error.value).count("cannot be read") <= 10


def replace_silently(file, content):
    """Other content of the same size and date, which only those who open the file can notice."""
    stat = file.stat()
    file.write_bytes(content[:stat.st_size].ljust(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_small_pictures_are_decoded_once(arguments, tmp_path, capsys):
    """Kept in data/, found again, made again when a file changes or is gone."""
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    args, cat = folder_args(arguments, folder), folder / "train" / "cat" / "000.png"
    first = data_loader.open_dataset(args).train.pixels
    original = cat.read_bytes()
    replace_silently(cat, b"not opened again")
    assert torch.equal(first, data_loader.open_dataset(args).train.pixels)
    cat.write_bytes(original)
    for file in sorted((folder / "train" / "cat").iterdir()):
        Image.new("RGB", (32, 32), "red").save(file)
    changed = data_loader.open_dataset(args).train.pixels
    assert not torch.equal(first, changed)
    (folder / "train" / "eel" / "007.png").unlink()
    assert len(data_loader.open_dataset(args).train.pixels) == len(first) - 1
    assert "damaged" not in capsys.readouterr().out


def test_damaged_file_of_decoded_pictures_is_made_again(arguments, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    args = folder_args(arguments, folder)
    pixels = data_loader.open_dataset(args).train.pixels
    kept, = (tmp_path / "data" / "decoded").glob("pictures-train-*.pth")
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    cuts = [whole[:length] for length in range(500, len(whole), len(whole) // 20)]
    for damaged in (bytes(flipped), b"", *cuts):
        kept.write_bytes(damaged)
        assert torch.equal(pixels, data_loader.open_dataset(args).train.pixels)
        assert "damaged" in capsys.readouterr().out
        assert torch.equal(pixels, data_loader.open_dataset(args).train.pixels)
        assert "damaged" not in capsys.readouterr().out


def test_decoded_pictures_that_cannot_be_kept_are_used_all_the_same(arguments, tmp_path, capsys):
    args = folder_args(arguments, write_pictures(tmp_path / "pictures", sizes=((32, 32),)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "decoded").write_text("a file where the folder should be")
    assert data_loader.open_dataset(args).train.pixels.shape == (18, 3, 32, 32)
    assert "the decoded pictures could not be kept in" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["date", "size"])
def test_photographs_are_checked_once_and_again_when_a_file_changes(arguments, tmp_path, change):
    """Its date alone, or its size alone."""
    folder = write_pictures(tmp_path / "pictures")
    args, file = folder_args(arguments, folder), folder / "train" / "cat" / "000.png"
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

def test_odd_pictures_become_upright_rgb(tmp_path):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))
    plain = np.asarray(data_loader.to_rgb(Image.fromarray(grey)))
    assert np.array_equal(plain, np.stack([grey] * 3, 2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(data_loader.to_rgb(deep)), plain)
    see_through = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert np.asarray(data_loader.to_rgb(see_through)).min() == 255
    palette = Image.fromarray(plain).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(np.asarray(data_loader.to_rgb(palette)).astype(int) - plain).max() <= 4
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright is a quarter turn clockwise
    Image.fromarray(plain).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(data_loader.read_image(tmp_path / "turned.png"))
    assert np.array_equal(upright, np.rot90(plain, -1))


@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_pictures_of_many_bits_are_as_bright_as_they_are(scale):
    """Floats to 1, bytes and 16 bits, all as Pillow's modes I and F."""
    ramp = np.linspace(0, scale, 256).reshape(16, 16)
    wanted = np.arange(256).reshape(16, 16)
    kinds = [np.float32] if scale == 1 else [np.float32, np.int32]
    for kind in kinds:
        image = np.asarray(data_loader.to_rgb(Image.fromarray(ramp.astype(kind))))
        assert np.abs(image - wanted[..., None]).max() <= 1


def test_a_person_sees_the_images_of_a_part(arguments, tmp_path):
    for name, sizes in (("small", ((32, 32),)), ("photographs", ((40, 60), (70, 50)))):
        folder = write_pictures(tmp_path / name, sizes=sizes)
        test, _ = data_loader.load_split("ImageFolder", "test", folder_args(arguments, folder))
        for i, file in enumerate(sorted((folder / "test").glob("*/*.png"))):
            seen = np.asarray(data_loader.load_image(test, i))
            assert np.array_equal(seen, np.asarray(Image.open(file)))


@pytest.mark.parametrize("attribute, name", [("filename", "page.png"), (None, "the file")])
def test_an_open_file_that_is_no_picture_is_named_where_it_has_a_name(attribute, name):
    """A web upload is an open file whose name is its `filename`."""
    class Upload(io.BytesIO):
        pass
    file = Upload(b"no picture")
    if attribute:
        setattr(file, attribute, name)
    with pytest.raises(utils.UserError, match=f"^{name} cannot be read as a picture: "):
        data_loader.read_image(file)
