"""Datasets, split, augmentation and preprocessing against torchvision, PIL and small files in the real layouts.

    python -m pytest tests/test_data_loader.py
"""
import hashlib
import io
import itertools
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
import types
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import v2

import data_loader
import utils
from conftest import write_pictures

CPU = torch.device("cpu")
FLAGS = ["--dataset-name", "ImageFolder", "--val-fraction", "0.25", "--batch-size", "4"]


def folder_args(arguments, folder, *flags):
    return arguments("baseline", *FLAGS, "--dataset-dir", str(folder), *flags)


# Resampling -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box, size", [
    ((0, 0, 32, 32), 224), ((0, 0, 32, 32), 48), ((0, 0, 32, 32), 32), ((0, 0, 32, 32), 20), ((3, 5, 20, 17), 64),
    ((-4, 2, 32, 32), 32), ((-4, 2, 32, 32), 64), ((4, -3, 32, 32), 48)])
@pytest.mark.parametrize("flip", [False, True])
def test_resample_agrees_with_torchvision(box, size, flip, interpolation):
    """Crop (from a black border where the box leaves the image), antialiased resize, flip: within 1e-5 of v2 on floats.

    v2 does not clip floats between its passes as PIL does on bytes, so the pixels stay off black and white here.
    """
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    padded = min(box[0], box[1]) < 0 or max(box[0] + box[2], box[1] + box[3]) > 32
    mode = torchvision.transforms.InterpolationMode(interpolation)
    wanted = v2.functional.pad(images, [4]) if padded else images
    top, left = (box[0] + 4, box[1] + 4) if padded else box[:2]
    wanted = v2.functional.resized_crop(wanted, top, left, *box[2:], [size, size], mode, antialias=True)
    wanted = v2.functional.horizontal_flip(wanted) if flip else wanted
    got = data_loader.resample(images, torch.tensor([box] * 2).float(), torch.tensor([flip] * 2), size, interpolation, margin=4)
    if padded and size > 32:
        wanted = wanted.clamp(0, 1)  # next to the black border both overshoot below black
        assert (got - wanted).abs().mean() < 2e-3
    else:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_every_image_has_parameters_of_its_own():
    images = torch.rand(3, 3, 32, 32)
    boxes, flips = torch.tensor([[0, 0, 32, 32], [2, 3, 10, 20], [-4, 4, 32, 32]]).float(), torch.tensor([True, False, True])
    together = data_loader.resample(images, boxes, flips, 40, "bicubic", 4)
    for i in range(3):
        alone = data_loader.resample(images[i:i + 1], boxes[i:i + 1], flips[i:i + 1], 40, "bicubic", 4)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [64, 224])
def test_upscaling_agrees_with_pil(size):
    """Real edges and noise: PIL rounds to bytes twice, so within 1.5/255 everywhere and 0.4/255 in the mean."""
    random = np.random.default_rng(0)
    pixels = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    pixels[::2] = random.integers(0, 256, (16, 32, 3))
    wanted = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)) / 255
    got = data_loader.resample(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, torch.tensor([[0.0, 0, 32, 32]]),
                               torch.tensor([False]), size, "bicubic")[0].permute(1, 2, 0).numpy()
    assert np.abs(got - wanted).max() < 1.5 / 255
    assert np.abs(got - wanted).mean() < 0.4 / 255


@pytest.mark.parametrize("aspect", [0.3, 0.8, 1.0, 1.5, 4.0])
def test_resized_boxes_are_legal_crops_of_the_picture(aspect):
    draws = data_loader.random_boxes("resized_crop", 500, 100, torch.Generator().manual_seed(0))
    boxes = data_loader.resized_boxes(draws, torch.full((500,), aspect), 100)
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 100).all()
    assert torch.equal(boxes, boxes.round())
    ratio, area = width / height * aspect, width * height / 100**2
    assert ((ratio > 0.7) & (ratio < 1.4)).all()  # 3/4 to 4/3 but for whole pixels
    if aspect in (0.8, 1.0):
        assert area.min() > 0.33 and area.max() > 0.9 and 0.55 < area.mean() < 0.75
        assert top.max() > 20 and len(top.unique()) > 15


# Split and loaders ------------------------------------------------------------------------------------------------

def test_split_is_stratified_and_follows_split_seed_alone(arguments):
    one, two, three = (data_loader.open_dataset(arguments("baseline", *flags)) for flags in (
        ["--seed", "1"], ["--seed", "2", "--batch-size", "8"], ["--split-seed", "1"]))
    assert one.split_fingerprint == two.split_fingerprint != three.split_fingerprint
    assert torch.equal(one.val.pixels, two.val.pixels) and not torch.equal(one.val.pixels, three.val.pixels)
    counts = torch.bincount(one.val.labels)
    assert len(one.train.labels) + len(one.val.labels) == 1437 and counts.max() - counts.min() <= 1
    digits = {image.numpy().tobytes() for image in one.train.pixels}
    shared = sum(image.numpy().tobytes() in digits for image in one.val.pixels)
    assert shared == 0


def test_digits_test_part_is_a_fixed_fifth_that_training_does_not_hold(arguments):
    args = arguments("baseline")
    test, names = data_loader.open_test("Digits", args)
    data = data_loader.open_dataset(args)
    assert len(test.labels) == 360 and names == [str(i) for i in range(10)]
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    assert not any(image.numpy().tobytes() in seen for image in test.pixels)


def loader_of(data, args, workers=0, seed=5, device=CPU, **more):
    return data_loader.Loader(data.train, device, 32, "bicubic", batch_size=args.batch_size, num_workers=workers, seed=seed,
                              augmentation=data.augmentation, **more)


def test_epoch_follows_from_seed_and_number_alone(arguments):
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    loader = loader_of(data, args)
    first, again = list(loader.epoch(3)), list(loader_of(data, args).epoch(3))
    assert len(first) == len(loader) == len(data.train.labels) // 64
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, again))
    tail = list(loader.epoch(3, start=7))
    assert len(tail) == len(loader) - 7
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first[7:], tail))
    assert not torch.equal(first[0][0], next(loader.epoch(4))[0])
    assert not torch.equal(first[0][0], next(loader_of(data, args, seed=6).epoch(3))[0])


@pytest.mark.parametrize("free, home", [(1000 * 2**20, "cuda"), (2**19, "cpu"), (2**17, "cpu")])
def test_images_that_do_not_fit_stay_in_host_memory(monkeypatch, capsys, free, home):
    cached = [2**32]  # what torch keeps of a former model is not taken; without this both would stay on the host
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0 if cached else free, 2**33))
    pixels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    data_loader.say_once.cache_clear()
    assert data_loader.home_of(pixels, torch.device("cuda")).type == home
    assert ("stay in host memory" if home == "cpu" else "live on the GPU") in capsys.readouterr().out and data_loader.home_of(pixels, CPU) == CPU


def test_crops_of_photographs_are_never_enlarged(arguments, tmp_path):
    """The canvas has enough pixels for the smallest random resized crop to fill the output, its shorter side too, up to sides of 3:2."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    loader = loader_of(data_loader.open_dataset(args), args)
    draws = data_loader.random_boxes("resized_crop", 20_000, loader.side, torch.Generator().manual_seed(0))
    smallest = [data_loader.resized_boxes(draws, torch.full((20_000,), aspect), loader.side)[:, 2:].min() for aspect in (2 / 3, 1, 3 / 2)]
    assert 32 <= min(smallest) < 34


@pytest.mark.parametrize("workers", [0, 1])
def test_photograph_that_is_lost_during_training_is_one_sentence(arguments, tmp_path, workers):
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    data = data_loader.open_dataset(args)
    lost = Path(data.train.source.dataset.samples[data.train.source.indices[0]][0])
    lost.unlink()
    loader = loader_of(data, args, workers)
    with pytest.raises(utils.UserError, match=f"{lost.name} cannot be read as a picture: .*No such file") as error:
        for epoch in range(10):  # the last incomplete batch is left out
            list(loader.epoch(epoch))
    assert "\n" not in str(error.value)


def test_photographs_leave_torchs_random_numbers_alone(arguments, tmp_path):
    """Dropout draws from the same generator, and a resumed epoch starts one more DataLoader."""
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"), "--num-workers", "0")
    loader, before = loader_of(data_loader.open_dataset(args), args), torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size, batch", [(32, 512), (64, 392), (224, 32), (1024, 16)])
def test_evaluation_takes_large_batches_of_bounded_memory(size, batch):
    images = data_loader.Images(torch.zeros(600, 3, 32, 32, dtype=torch.uint8), None, torch.zeros(600, dtype=torch.int64), [])
    info = {"image_size": size, "interpolation": "bicubic", "crop_pct": 1.0}
    pixels, _ = next(iter(data_loader.evaluation_loader(images, info, types.SimpleNamespace(num_workers=0), CPU)))
    assert pixels.shape == (batch, 3, size, size) and pixels.is_contiguous(memory_format=torch.channels_last)


def test_broken_picture_of_torchvisions_datasets_is_one_sentence():
    class Broken:
        def __getitem__(self, i):
            raise OSError("image file is truncated")
    images = data_loader.Images(None, Broken(), torch.zeros(3, dtype=torch.int64), [])
    loader = data_loader.Loader(images, CPU, 32, "bicubic", batch_size=2, seed=0, augmentation="resized_crop")
    with pytest.raises(utils.UserError, match=r"^image \d of the dataset cannot be read as a picture: image file is truncated$"):
        next(loader.epoch(0))


def test_device_without_its_number_is_the_same_device(arguments, monkeypatch):
    """torch.device("cuda") is not equal to the "cuda:0" of a tensor; seen here from "cpu" and "cpu:0"."""
    args = arguments("baseline")
    data = data_loader.open_dataset(args)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail("an image on the device went through the host"))
    loader = loader_of(data, args, device=torch.device("cpu", 0))
    assert loader.device != loader.pixels.device and len(list(loader.epoch(0))) == len(loader)


@pytest.mark.cuda
def test_images_in_host_memory_make_the_same_batches(arguments, monkeypatch):
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    make = lambda: data_loader.Loader(data.train, torch.device("cuda"), 32, "bicubic", batch_size=64, seed=5, augmentation="flip_crop")
    resident = make()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    for (a, b), (c, d) in zip(resident.epoch(1), make().epoch(1), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d) and a.is_cuda


def test_mixing_is_timms_and_follows_the_seed(arguments):
    args = arguments("baseline", "--mixup-alpha", "0.8")
    data = data_loader.open_dataset(args)
    loader = loader_of(data, args, mixup=data_loader.mixing(10, args))
    plain = loader_of(data, args)
    (images, labels), (unmixed, hard) = next(loader.epoch(0, 2)), next(plain.epoch(0, 2))
    torch.testing.assert_close(labels.sum(1), torch.ones(64))
    share = labels[hard != hard.flip(0)][0].max()
    share = labels[(hard != hard.flip(0)).nonzero()[0], hard[(hard != hard.flip(0)).nonzero()[0]]]
    torch.testing.assert_close(images, share * unmixed + (1 - share) * unmixed.flip(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, list(loader.epoch(0))[2][0])


@pytest.mark.parametrize("augmentation", ["crop", "flip_crop"])
def test_training_images_are_pils_shifts_and_mirrors(augmentation):
    """Every training image is one of the shifts and mirrors that PIL makes of its source, within 1.5/255; all kinds occur."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = data_loader.Images(pixels, None, torch.arange(16), [])  # the label says which image it was
    loader = data_loader.Loader(part, CPU, 64, "bicubic", batch_size=16, seed=0, augmentation=augmentation)
    (images, labels), found = next(loader.epoch(0)), set()
    for image, label in zip(images, labels):
        padded = ImageOps.expand(Image.fromarray(pixels[label].permute(1, 2, 0).numpy()), 4)
        errors = {}
        for top, left, flip in itertools.product(range(9), range(9), (False, True)):
            crop = padded.crop((left, top, left + 32, top + 32)).resize((64, 64), Image.Resampling.BICUBIC)
            crop = np.asarray(ImageOps.mirror(crop) if flip else crop, dtype=np.float32)
            errors[top, left, flip] = np.abs(crop / 255 - image.permute(1, 2, 0).numpy()).max()
        best = min(errors, key=errors.get)
        assert errors[best] < 1.5 / 255
        found.add(best)
    assert len({top for top, _, _ in found}) > 4 and len({left - top for top, left, _ in found}) > 4
    assert {flip for _, _, flip in found} == ({False, True} if augmentation == "flip_crop" else {False})


def test_matrices_made_beforehand_are_resamples(arguments):
    part = data_loader.Images(torch.randint(0, 256, (81, 3, 32, 32), dtype=torch.uint8), None, torch.arange(81), [])
    loader = data_loader.Loader(part, CPU, 48, "bilinear", batch_size=81, seed=0, augmentation="flip_crop", teacher_image_size=64)
    shifts = torch.cartesian_prod(torch.arange(-4.0, 5), torch.arange(-4.0, 5))  # every shift there is
    boxes, flips = torch.cat([shifts, torch.full_like(shifts, 32)], 1), torch.arange(81) % 2 == 0
    for size in (48, 64):
        wanted = data_loader.resample(part.pixels / 255, boxes, flips, size, "bilinear", margin=4)
        assert torch.equal(loader._view(part.pixels / 255, boxes, flips, size), wanted)


def test_teacher_sees_the_same_crop_in_more_detail(arguments):
    args = arguments("baseline", "--augmentation", "flip_crop")
    data = data_loader.open_dataset(args)
    (student, teacher), labels = next(loader_of(data, args, teacher_image_size=64).epoch(0))
    alone, alone_labels = next(loader_of(data, args).epoch(0))
    assert torch.equal(student, alone) and torch.equal(labels, alone_labels) and teacher.shape[-1] == 64
    small = torch.nn.functional.interpolate(teacher, size=32, mode="bicubic", antialias=True)
    assert (small - student).abs().mean() < 0.02


def test_photographs_do_not_depend_on_workers(arguments, tmp_path):
    args = folder_args(arguments, write_pictures(tmp_path / "pictures"))
    data = data_loader.open_dataset(args)
    assert data.augmentation == "resized_crop" and data.train.pixels is None
    pickle.dumps(loader_of(data, args).photographs.dataset)  # as Windows and macOS hand it to their workers
    alone, two = loader_of(data, args), loader_of(data, args, workers=2)
    for epoch in (0, 1):
        for (a, b), (c, d) in zip(alone.epoch(epoch), two.epoch(epoch), strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
            assert a.shape == (4, 3, 32, 32) and a.is_contiguous(memory_format=torch.channels_last)
            assert 0 <= a.min() and a.max() <= 1


@pytest.mark.parametrize("sizes, tolerance", [(((48, 48),), 1.5 / 255), (((40, 60), (70, 50)), 0)])
def test_evaluation_loader_agrees_with_build_transform(arguments, tmp_path, sizes, tolerance):
    """Photographs to the bit; resident images, resized on the device, within 1.5/255 of PIL's bytes before normalising."""
    folder = write_pictures(tmp_path / "pictures", sizes=sizes)
    args = folder_args(arguments, folder)
    test, _ = data_loader.open_test("ImageFolder", args)
    info = {"image_size": 64, "crop_pct": 1.0 if tolerance else 0.875, "interpolation": "bicubic",
            "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    images = torch.cat([images for images, _ in data_loader.evaluation_loader(test, info, args, CPU)])
    transform = data_loader.build_transform(info)
    for image, file in zip(images, sorted((folder / "test").glob("*/*.png"))):
        wanted = transform(Image.open(file))
        mean, std = (torch.tensor(info[key]).view(3, 1, 1) for key in ("mean", "std"))
        assert (wanted - (image - mean) / std).abs().max() <= tolerance / min(info["std"]) + 1e-6 * bool(tolerance)


# Datasets ---------------------------------------------------------------------------------------------------------

def test_training_never_opens_the_test_part(arguments, tmp_path, monkeypatch):
    """Neither images nor labels: only the test folder's class names may be listed."""
    folder = write_pictures(tmp_path / "pictures")
    for file in (folder / "test").glob("*/*.png"):
        file.write_bytes(b"not a picture")
    parts = []
    read_part = data_loader.read_part
    monkeypatch.setattr(data_loader, "read_part", lambda name, part, args: parts.append(part) or read_part(name, part, args))
    opened = []
    original = data_loader.Image.open
    monkeypatch.setattr(data_loader.Image, "open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    list(loader_of(data, types.SimpleNamespace(batch_size=4)).epoch(0))
    assert parts == ["train"] and opened and not any(f"{folder / 'test'}" in file for file in opened)
    for name in ("CIFAR100", "CIFAR10", "Flowers102"):
        made = []

        def make(self, root, download, **part):
            made.append(part)
            self.data, self.targets, self.classes = np.zeros((300, 32, 32, 3), np.uint8), [0, 1, 2] * 100, ["a", "b", "c"]
            self._labels = self.targets
        cls = getattr(torchvision.datasets, name)
        monkeypatch.setattr(data_loader.torchvision.datasets, name, type(name, (cls,), {"__init__": make}))
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
        assert made == ([{"split": "train"}, {"split": "val"}] if name == "Flowers102" else [{"train": True}])


@pytest.fixture
def serve():
    """A function that serves a folder over HTTP on this machine and returns its address."""
    servers = []

    def start(folder):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fake_cifar100(folder, monkeypatch, url):
    """The official archive in small: 200 training and 100 test images, in the real layout, with md5 sums to match."""
    random = np.random.default_rng(0)
    cls, contents = torchvision.datasets.CIFAR100, {}
    for part, count in (("train", 200), ("test", 100)):
        fine = [i % 100 for i in range(count)]
        contents[part] = pickle.dumps({"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": fine,
                                       "coarse_labels": [0] * count, "filenames": [""] * count, "batch_label": ""})
    contents["meta"] = pickle.dumps({"fine_label_names": [f"class {i:02d}" for i in range(100)], "coarse_label_names": []})
    archive = folder / cls.filename
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{cls.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(cls, "url", url)
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cls, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cls, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5["meta"]})
    return archive, contents


def test_cifar100_is_downloaded_checked_and_opened(arguments, tmp_path, monkeypatch, serve):
    _, contents = fake_cifar100(tmp_path / "server", monkeypatch, serve(tmp_path / "server") + "cifar-100-python.tar.gz")
    args = arguments("baseline", "--dataset-name", "CIFAR100", "--val-fraction", "0.5", "--batch-size", "16")
    data = data_loader.open_dataset(args)
    whole = pickle.loads(contents["train"])["data"].reshape(-1, 3, 32, 32)
    assert data.class_names[0] == "class 00" and len(data.train.labels) == len(data.val.labels) == 100
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    assert seen == {image.tobytes() for image in whole} and data.augmentation == "flip_crop"
    test, _ = data_loader.open_test("CIFAR100", args)
    assert np.array_equal(test.pixels.numpy(), pickle.loads(contents["test"])["data"].reshape(-1, 3, 32, 32))


def test_cifar100_archive_placed_by_hand_needs_no_network(arguments, tmp_path, monkeypatch):
    args = arguments("baseline", "--dataset-name", "CIFAR100", "--val-fraction", "0.5")
    archive, _ = fake_cifar100(tmp_path / "data", monkeypatch, url="http://127.0.0.1:9/none")
    assert str(archive.parent) == args.data_dir
    assert len(data_loader.open_dataset(args).train.labels) == 100


@pytest.mark.parametrize("name, file", [("CIFAR100", "cifar-100-python.tar.gz"), ("CIFAR10", "cifar-10-python.tar.gz"),
                                        ("Flowers102", "102flowers.tgz")])
def test_failed_download_ends_in_seconds_and_names_the_file(arguments, monkeypatch, name, file):
    cls = getattr(torchvision.datasets, name)
    if name == "Flowers102":
        monkeypatch.setattr(cls, "_download_url_prefix", "http://127.0.0.1:9/")
    else:
        monkeypatch.setattr(cls, "url", f"http://127.0.0.1:9/{file}")
    start = time.time()
    with pytest.raises(utils.UserError) as error:
        data_loader.open_dataset(arguments("baseline", "--dataset-name", name))
    assert time.time() - start < 10
    assert file in str(error.value) and "--quick" in str(error.value) and "\n" not in str(error.value)


def test_a_silent_server_is_given_up(arguments, monkeypatch):
    monkeypatch.setattr(data_loader, "DOWNLOAD_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, then says nothing
        monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz")
        with pytest.raises(utils.UserError, match="by hand"):
            data_loader.open_dataset(arguments("baseline", "--dataset-name", "CIFAR100"))
    assert socket.getdefaulttimeout() is None


def test_flowers102_keeps_its_own_split(arguments, tmp_path, monkeypatch, serve):
    """The real download code over small files in the real layout: 306 JPEG pictures, a third each for the three parts."""
    server, cls = tmp_path / "server", torchvision.datasets.Flowers102
    server.mkdir()
    random, ids = np.random.default_rng(0), np.arange(1, 307)
    with tarfile.open(server / "102flowers.tgz", "w:gz") as tar:
        for i in ids:
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (30 + i % 7, 40, 3), dtype=np.uint8)).save(stream, "JPEG")
            member = tarfile.TarInfo(f"jpg/image_{i:05d}.jpg")
            member.size = stream.tell()
            stream.seek(0)
            tar.addfile(member, stream)
    scipy.io.savemat(server / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    scipy.io.savemat(server / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    monkeypatch.setattr(cls, "_download_url_prefix", serve(server))
    monkeypatch.setattr(cls, "_file_dict", {
        key: (name, hashlib.md5((server / name).read_bytes()).hexdigest()) for key, (name, _) in cls._file_dict.items()})
    args = arguments("baseline", "--dataset-name", "Flowers102", "--batch-size", "8")
    data = data_loader.open_dataset(args)
    assert len(data.train.labels) == len(data.val.labels) == 102 and len(data.class_names) == 102
    assert data.class_names[0] == "pink primrose" and data.augmentation == "resized_crop"
    images, labels = next(loader_of(data, args, workers=1).epoch(0))
    assert images.shape == (8, 3, 32, 32) and labels.max() < 102
    test, _ = data_loader.open_test("Flowers102", args)
    assert len(test.labels) == 102


def test_image_folder_takes_its_own_validation_part(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", counts=(("train", 8), ("val", 2), ("test", 3)))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert len(data.train.labels) == 24 and len(data.val.labels) == 6
    assert data.class_names == ["cat", "dog", "eel"]


def test_small_pictures_of_one_size_are_kept_as_pixels(arguments, tmp_path):
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    data = data_loader.open_dataset(folder_args(arguments, folder))
    assert data.train.pixels.shape == (18, 3, 32, 32) and data.augmentation == "flip_crop"
    seen = {image.numpy().tobytes() for image in torch.cat([data.train.pixels, data.val.pixels])}
    for file in (folder / "train").glob("*/*.png"):
        assert np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() in seen


@pytest.mark.parametrize("fault, message", [
    ("no test", "must have the same class folders"), ("other class", "1 differ: fox"), ("broken", "2 of 24 files .* at fault: .*cat/001.png cannot be read"),
    ("truncated", "1 of 24 files .* dog/002.jpg|dog.002.jpg"), ("huge", "1 of 24 files"), ("many", "12 of 24 files"),
    ("empty class", "eel"), ("no train", "train is no folder of pictures"), ("one picture", "--val-fraction")])
def test_faults_of_a_folder_are_one_sentence(arguments, tmp_path, fault, message):
    folder = write_pictures(tmp_path / "pictures")
    if fault == "no test":
        for file in sorted((folder / "test").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (folder / "test").rmdir()
    elif fault == "other class":
        (folder / "test" / "fox").mkdir()
    elif fault == "broken":
        for name in ("cat/001.png", "dog/002.png"):
            (folder / "train" / name).write_bytes(b"no picture")
    elif fault == "many":
        for file in sorted((folder / "train").rglob("*.png"))[:12]:
            file.write_bytes(b"")
    elif fault == "truncated":
        stream = io.BytesIO()
        Image.open(folder / "train" / "dog" / "002.png").save(stream, "JPEG")
        (folder / "train" / "dog" / "002.png").unlink()
        (folder / "train" / "dog" / "002.jpg").write_bytes(stream.getvalue()[:-900])
    elif fault == "huge":  # a head of 50,000 x 50,000 pixels; nobody should try to decode it
        head = b"IHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
        (folder / "train" / "dog" / "002.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)))
    elif fault == "empty class":
        for file in (folder / "train" / "eel").iterdir():
            file.unlink()
    elif fault == "no train":
        (folder / "train").rename(folder / "images")
    else:
        for file in sorted((folder / "train" / "cat").iterdir())[1:]:
            file.unlink()
    with pytest.raises(utils.UserError, match=message) as error:
        data_loader.open_dataset(folder_args(arguments, folder))
    assert "\n" not in str(error.value) and str(error.value).count("cannot be read") <= 10


def test_pictures_are_decoded_once(arguments, tmp_path, monkeypatch, capsys):
    """Kept in data/, found again, rebuilt when a source file changes or the kept file is damaged."""
    folder = write_pictures(tmp_path / "pictures", sizes=((32, 32),))
    args, decoded = folder_args(arguments, folder), []
    original = data_loader.decode
    monkeypatch.setattr(data_loader, "decode", lambda *rest: decoded.append(1) or original(*rest))

    def open_again(times):
        data = data_loader.open_dataset(args)
        assert len(decoded) == times
        return data.train.pixels

    first = open_again(1)
    assert torch.equal(first, open_again(1))
    Image.new("RGB", (32, 32), "red").save(folder / "train" / "cat" / "000.png")
    changed = open_again(2)
    assert not torch.equal(first, changed) and torch.equal(changed, open_again(2))
    kept, = (tmp_path / "data" / "decoded").glob("pictures-train-*.pth")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 255
    whole = kept.read_bytes()
    for damage in (bytes(content), b"", *(whole[:length] for length in range(500, len(whole), len(whole) // 20))):
        kept.write_bytes(damage)
        times = len(decoded) + 1
        assert torch.equal(changed, open_again(times)) and "damaged" in capsys.readouterr().out
    (folder / "train" / "eel" / "007.png").unlink()
    assert len(open_again(len(decoded) + 1)) == len(changed) - 1
    monkeypatch.setattr(data_loader, "save_file", lambda *rest: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    Image.new("RGB", (32, 32), "blue").save(folder / "train" / "cat" / "000.png")
    open_again(len(decoded) + 1)
    assert "No space left on device" in capsys.readouterr().out


def test_photographs_are_checked_once_and_again_when_a_file_changes(arguments, tmp_path, monkeypatch):
    """Its date alone, or its size alone."""
    folder = write_pictures(tmp_path / "pictures")
    args, decoded, original = folder_args(arguments, folder), [], data_loader.decode
    monkeypatch.setattr(data_loader, "decode", lambda *rest: decoded.append(1) or original(*rest))
    file = folder / "train" / "cat" / "000.png"
    touched = file.stat().st_mtime_ns + 10**9
    for change, times in ((lambda: None, 1), (lambda: None, 1), (lambda: os.utime(file, ns=(touched, touched)), 2),
                          (lambda: (file.write_bytes(file.read_bytes() + b" "), os.utime(file, ns=(touched, touched))), 3)):
        change()
        assert data_loader.open_dataset(args).train.pixels is None and len(decoded) == times


def test_too_little_room_for_a_download_is_said_before_it(arguments, monkeypatch):
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=100 * 2**20))
    with pytest.raises(utils.UserError, match="CIFAR100 needs 340 MB in .* the disk has 100 MB left"):
        data_loader.open_dataset(arguments("baseline", "--dataset-name", "CIFAR100"))


# Pictures ---------------------------------------------------------------------------------------------------------

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
    assert np.array_equal(np.asarray(data_loader.read_image(tmp_path / "turned.png")), np.rot90(plain, -1))
