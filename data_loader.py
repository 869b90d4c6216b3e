"""Datasets, their split into training, validation and test images, and the batches made of them.

`open_dataset` gives the training and validation images. Of the test images it only learns whether
the files of a folder can be decoded; evaluate.py reads them with `load_split`.

A loader yields images (B, 3, S, S) on the device, floats in [0, 1]; each model normalises them
itself. Small square images of one size (CIFAR, letters) are held on the device as one uint8 tensor
and augmented there a batch at a time. Photographs, and random resized crops of any image, are made
by worker processes.
"""
import collections
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm.contrib.concurrent import thread_map

import utils
from utils import UsageError, UserError

SMALL_SIDE = 96              # px: square images of one size up to this side are held on the device
CROP_PADDING = 1 / 8         # of the side, on each side: 4 px for CIFAR, as in He et al. 2015
CROP_SCALE = (0.35, 1)       # share of a photograph's area that a random resized crop shows
CROP_RATIO = (3 / 4, 4 / 3)  # its width / height
EXIF_ORIENTATION = 0x0112    # the tag of how a camera was held; from 5 on, width and height swap
MAX_ASPECT_RATIO = 10        # of a picture that is resized whole before its middle is cut out
FEW_VAL_IMAGES = 300         # below it one image moves the validation accuracy noticeably
DOWNLOAD_TIMEOUT = 20        # s without an answer
EVAL_PIXELS = 32 * 224**2    # of an evaluation batch: 0.44 GB for EfficientNet-B0 in float32

# Formats that Pillow knows, but as video, vector graphics or tables of numbers.
NO_PICTURES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
HEIC = {".heic", ".heif", ".hif"}  # an iPhone's pictures, which need a package of their own
HEIC_HINT = "convert HEIC pictures to JPEG first, as with the package pillow-heif"


class Images(NamedTuple):
    """One part of a dataset: small images as pixels, or photographs as files."""
    pixels: torch.Tensor | None  # (N, 3, H, H) uint8
    files: list | None           # N paths; None where there are pixels
    labels: torch.Tensor         # (N,) int64
    names: list                  # of an image folder's files, for the fingerprint; else []
    value_range: tuple | None = None  # as in Dataset

    def select(self, indices):
        labels = self.labels[indices]
        if self.pixels is not None:
            return Images(self.pixels[indices], None, labels, [], self.value_range)
        files = [self.files[i] for i in indices]
        return Images(None, files, labels, [], self.value_range)


class Dataset(NamedTuple):
    """What training may see of a dataset."""
    name: str
    class_names: list
    train: Images
    val: Images
    split_fingerprint: str  # SHA-256 of classes, files' names, labels, choice of validation images
    augmentation: str       # none, crop, flip_crop or resized_crop
    # (low, high), floats: the values that become black and white in pictures of more than 8 bits;
    # None where no training picture has more.
    value_range: tuple | None = None


# Datasets -----------------------------------------------------------------------------------------

@utils.main_process_first()
def open_dataset(args):
    """The `Dataset` of args. UserError where it cannot be had, UsageError where args do not fit."""
    name = args.dataset_name
    images, class_names = load_split(name, "train", args)
    own_val = load_other_parts(class_names, images.value_range, args)

    if own_val is None:
        train_indices, val_indices = split_train_val(images, class_names, args)
        train = images.select(train_indices)
        val = images.select(val_indices)
        chosen = {"val_indices": val_indices.tolist()}
    else:
        train = images
        val = own_val
        chosen = {"val": val.labels.tolist(), "val_names": val.names}
    fingerprint = split_fingerprint(class_names, images, chosen)

    check_batch_size(train, args)
    augmentation = choose_augmentation(train, args)
    print(f"{name}: {len(class_names)} classes, {len(train.labels)} training images, "
          f"{len(val.labels)} validation images, which choose the epoch")
    if len(val.labels) < FEW_VAL_IMAGES:
        print(f"warning: one validation image is {100 / len(val.labels):.1f} points of accuracy; "
              "a larger --val-fraction chooses the epoch more reliably")
    return Dataset(name, class_names, train, val, fingerprint, augmentation, images.value_range)


def load_other_parts(class_names, value_range, args):
    """The validation images of a dataset that brings its own, else None. The pictures in test/ are
    only checked: a fault among them would otherwise show after the training."""
    parts = []
    if args.dataset_name == "Flowers102":
        parts = ["val"]
    elif args.dataset_name == "ImageFolder":
        parts = ["test"]
        if Path(args.dataset_dir, "val").is_dir():
            parts.append("val")

    own_val = None
    for part in parts:
        images, names = load_split(args.dataset_name, part, args, value_range)
        if part == "test":
            align_classes(images, names, class_names)
        elif mismatch := describe_class_mismatch(names, class_names):
            raise UserError(f"{part}/ and train/ must have the same class folders; {mismatch}")
        else:
            own_val = images
    return own_val


def align_classes(test, test_class_names, class_names):
    """The `test` images with the labels of a model that knows `class_names`. Raises UserError where
    they have a class that it does not know; prints which of its classes they lack."""
    unknown = sorted(set(test_class_names) - set(class_names))
    if unknown:
        raise UserError(f"the test images have {len(unknown)} classes that were not trained on: "
                        f"{', '.join(unknown[:10])}")
    missing = sorted(set(class_names) - set(test_class_names))
    if missing:
        print_once(f"warning: the test images lack {len(missing)} of {len(class_names)} classes: "
                   f"{', '.join(missing[:10])}; the scores are of the others")
    trained_labels = torch.tensor([class_names.index(name) for name in test_class_names])
    return test._replace(labels=trained_labels[test.labels])


def describe_class_mismatch(one, other):
    """How two lists of class names differ, in a phrase; "" where they are the same."""
    different = sorted(set(one) ^ set(other))
    if different:
        return f"{len(different)} differ: {', '.join(different[:10])}"
    if one != other:
        return "their order differs"
    return ""


def split_train_val(images, class_names, args):
    """Sorted indices of the images to train on and of those to validate on."""
    labels = images.labels.numpy()
    counts = np.bincount(labels, minlength=len(class_names))
    single = [name for name, count in zip(class_names, counts, strict=True) if count < 2]
    if single:
        raise UserError(f"a class needs two training images or more, one of them to validate on; "
                        f"{len(single)} have fewer: {', '.join(single[:10])}")
    return stratified_split(labels, args.val_fraction, args.split_seed)


def stratified_split(labels, fraction, seed):
    """Sorted indices of the larger and the smaller part of `labels` (N,), stratified by class. Each
    class has at least one image in both, for which it needs two."""
    num_classes = len(np.unique(labels))
    count = math.ceil(fraction * len(labels))
    count = min(max(count, num_classes), len(labels) - num_classes)
    larger, smaller = train_test_split(
        np.arange(len(labels)), test_size=count, stratify=labels, random_state=seed)

    # scikit-learn rounds: of 100, 60 and 3 images a tenth is 11, 6 and 0.
    larger, smaller = add_missing_classes(larger, smaller, labels, seed)
    smaller, larger = add_missing_classes(smaller, larger, labels, seed)
    return np.sort(larger), np.sort(smaller)


def add_missing_classes(source, target, labels, seed):
    """Move a random index of each class that `target` lacks from `source`; both, afterwards."""
    for missing in np.setdiff1d(labels[source], labels[target]):
        generator = np.random.default_rng([seed, missing])
        moved = generator.choice(np.sort(source[labels[source] == missing]))
        source = source[source != moved]
        target = np.append(target, moved)
    return source, target


def split_fingerprint(class_names, images, chosen):
    """SHA-256 of all training `images` and of those `chosen` among or beside them to validate."""
    content = {"class_names": class_names, "labels": images.labels.tolist(), "names": images.names}
    return sha256(json.dumps(content | chosen).encode()).hexdigest()


def check_batch_size(train, args):
    """UsageError where not even one update can be made of the training images."""
    if len(train.labels) < args.batch_size * args.accumulate_steps:
        raise UsageError(f"--batch-size {args.batch_size} --accumulate-steps "
                         f"{args.accumulate_steps} is more than the {len(train.labels)} "
                         "training images")


def choose_augmentation(train, args):
    """The augmentation that args name or, for "auto", the one that suits the images."""
    are_photographs = train.pixels is None
    if args.augmentation in ("crop", "flip_crop") and are_photographs:
        raise UsageError(f"--augmentation {args.augmentation} pads and crops small images; "
                         "photographs take resized_crop or none")
    if args.augmentation != "auto":
        return args.augmentation
    if are_photographs:
        return "resized_crop"
    if args.dataset_name in ("Digits", "Letters"):
        return "crop"  # a mirrored letter is no letter, or another
    return "flip_crop"


def load_split(name, part, args, value_range=None):
    """The `part` (train, val or test) of dataset `name`: (Images, class names in its own order).
    `value_range` is that of the training images (see Dataset), which "train" finds by itself."""
    if name == "ImageFolder":
        return read_folder(Path(args.dataset_dir, part), args.data_dir, value_range)

    if name == "Digits":
        digits = load_digits()
        train, test = stratified_split(digits.target, fraction=0.2, seed=0)
        chosen = test if part == "test" else train
        # Values from 0 to 16 become grey levels from 0 to 255.
        grey = torch.from_numpy(digits.images[chosen] * (255 / 16)).round().byte()
        labels = torch.from_numpy(digits.target[chosen]).long()
        return Images(grey[:, None].repeat(1, 3, 1, 1), None, labels, []), list("0123456789")

    if name == "Letters":
        pixels, labels = draw_letters(part)
        return Images(pixels, None, labels, []), list(LETTERS)

    if name == "Flowers102":
        flowers = download(datasets.Flowers102, args.data_dir, split=part)
        labels = torch.tensor(flowers._labels)  # neither these nor the files have a public name
        return Images(None, flowers._image_files, labels, []), list(flowers.classes)

    if name in ("CIFAR10", "CIFAR100"):
        cifar = download(getattr(datasets, name), args.data_dir, train=part != "test")
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, None, torch.tensor(cifar.targets), []), list(cifar.classes)

    # The command line allows no other name, but a checkpoint can hold any.
    raise UserError(f"there is no dataset {name!r} here")


def duplicates_of_training_images(test, data):
    """Names of the `test` images that equal a training or validation image to the bit."""
    parts = (test, data.train, data.val)
    # Files are compared unopened, unless one part is held as pixels alone.
    as_files = all(images.files is not None for images in parts)

    def digests(images):
        for i in range(len(images.labels)):
            if as_files:
                content = Path(images.files[i]).read_bytes()
            else:
                content = load_image(images, i).tobytes()
            yield sha256(content).digest()

    known = {*digests(data.train), *digests(data.val)}
    found = [i for i, digest in enumerate(digests(test)) if digest in known]
    return [test.names[i] if test.names else f"number {i}" for i in found]


# Letters, a dataset that is drawn -----------------------------------------------------------------

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SIDE = 32             # px
LETTER_COUNTS = {"train": 90, "test": 120}   # images of each class
# Typefaces in matplotlib's own folder that have all these letters, each in its usual shape.
TYPEFACES = [
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10",
]


def draw_letters(part):
    """The `part` (train or test) of Letters: pixels (N, 3, 32, 32) uint8 and labels (N,), as many
    of each class. Each image has its own typeface, size, angle, place and noise.

    All that is random comes from a fixed seed. Two machines draw the same images but for single
    grey levels at the edges of letters, where their versions of FreeType or Pillow differ.
    """
    rng = np.random.default_rng(["train", "test"].index(part))
    labels = np.tile(np.arange(len(LETTERS)), LETTER_COUNTS[part])
    count = len(labels)
    typefaces = rng.integers(len(TYPEFACES), size=count)
    sizes = rng.integers(32, 61, size=count)  # in half px
    angles = rng.uniform(-30, 30, size=count)
    centers = rng.uniform(0.38, 0.62, size=(count, 2)) * 2 * LETTER_SIDE
    inks = rng.uniform(0.5, 1, size=(count, 1, 1))
    noise = rng.normal(0, 0.12, size=(count, LETTER_SIDE, LETTER_SIDE))

    masks = []
    for label, typeface, size, angle, center in zip(
            labels, typefaces, sizes, angles, centers, strict=True):
        # Drawn at twice the size, so that turning it does not blur it.
        image = Image.new("L", (2 * LETTER_SIDE, 2 * LETTER_SIDE))
        font = load_typeface(TYPEFACES[typeface], int(size))
        ImageDraw.Draw(image).text(tuple(center), LETTERS[label], 255, font, anchor="mm")
        image = image.rotate(angle, Image.Resampling.BICUBIC, center=tuple(center))
        masks.append(np.asarray(image.reduce(2)))

    grey = np.stack(masks) / 255 * inks + noise
    grey = torch.from_numpy((grey * 255).clip(0, 255).round().astype(np.uint8))
    return grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(labels)


@functools.cache
def load_typeface(name, size):
    """One of matplotlib's typefaces. The simple layout engine is part of every Pillow; the other
    one, where it is installed, may place a letter elsewhere."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


# Downloads ----------------------------------------------------------------------------------------

def download(cls, data_dir, **part):
    """A torchvision dataset, downloaded on first use. Raises UserError with what to do by hand."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # urllib would wait for ever for a silent server
    try:
        return cls(root=data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        is_network = isinstance(error, (ConnectionError, TimeoutError))
        if getattr(error, "errno", None) and not is_network:
            raise  # the disk's, of which utils.user_message speaks
        reason = getattr(error, "reason", None) or error
        raise UserError(f"downloading {cls.__name__} failed ({reason}); "
                        f"{download_hint(cls, data_dir)}") from None
    finally:
        socket.setdefaulttimeout(None)


def download_hint(cls, data_dir):
    """Which files of a torchvision dataset to download by hand, where to, and which are damaged."""
    if cls is datasets.Flowers102:
        folder = Path(data_dir, "flowers-102")
        files = [(folder / file, cls._download_url_prefix + file, md5)
                 for file, md5 in cls._file_dict.values()]
    else:
        files = [(Path(data_dir, cls.filename), cls.url, cls.tgz_md5)]

    by_hand = ", ".join(f"{url} to {path}" for path, url, _ in files)
    hint = (f"download {by_hand} by hand and run the same command again, or try the project "
            "without any download with --quick")
    for path, _, md5 in files:
        if path.is_file() and not check_integrity(path, md5):
            hint += f"; {path} is damaged, its MD5 should be {md5}"
    return hint


# Folders of pictures ------------------------------------------------------------------------------

def read_folder(folder, data_dir, value_range=None):
    """The pictures of `folder`/<class>/*, classes in sorted order: (Images, class names).

    All are decoded once, so that a broken one is found before training. The result is cached in
    `data_dir`/decoded/, for as long as names, sizes and dates of the files stay the same.
    """
    class_names, files, labels = list_pictures(folder)
    names = [printable(file.relative_to(folder).as_posix()) for file in files]

    stats = [file.stat() for file in files]
    state = [(name, stat.st_size, stat.st_mtime_ns)
             for name, stat in zip(names, stats, strict=True)]
    signature = sha256(json.dumps([state, value_range]).encode()).hexdigest()
    place = sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    dataset = printable(folder.parent.name)[:40]  # a file's name must not become too long
    cache = Path(data_dir, "decoded", f"{dataset}-{folder.name}-{place}.pth")

    content = load_cache(cache)
    if content.get("signature") != signature:
        content = {"signature": signature, **decode(folder, files, value_range)}
        try:
            utils.save_checkpoint(content, cache)
        except OSError as error:
            print(f"the decoded pictures could not be saved to {cache} ({error.strerror}); "
                  "they will be decoded again next time")

    extremes = {names[i]: pair for i, pair in content["extremes"].items()}
    print_value_range(folder, extremes, content["value_range"], len(files))
    pixels = content["pixels"]
    images = Images(pixels, files if pixels is None else None, labels, names,
                    content["value_range"])
    return images, class_names


def load_cache(cache):
    """The content of a file of decoded pictures, {} where there is none that can be read."""
    if not cache.exists():
        return {}
    try:
        return utils.load_checkpoint(cache)
    except UserError:
        print(f"{cache} is damaged and will be made again")
        return {}


def list_pictures(folder):
    """Class names, sorted, and paths and labels of the pictures below folder/<class>/.

    Passed over are hidden files, files that Pillow does not read, and links to folders in there,
    which may lead in a circle.
    """
    check_layout(folder)
    class_folders = sorted(entry for entry in folder.glob("[!.]*") if entry.is_dir())
    files = []
    labels = []
    all_passed_over = collections.Counter()
    for label, class_folder in enumerate(class_folders):
        found = [Path(place, name) for place, _, names in os.walk(class_folder) for name in names]
        reasons = {path: reason_to_pass_over(path, folder) for path in found}
        pictures = sorted(path for path, reason in reasons.items() if not reason)
        passed_over = collections.Counter(filter(None, reasons.values()))
        if not pictures:
            raise UserError(f"{printable(class_folder)} should be a class and has no picture"
                            + describe_passed_over(passed_over))
        files += pictures
        labels += [label] * len(pictures)
        all_passed_over += passed_over

    # Test images may lack classes, but nothing can be learned of one class.
    if len(class_folders) < (1 if folder.name == "test" else 2):
        raise UsageError(f"{printable(folder)} must have two or more folders with pictures, "
                         "one for each class")
    if all_passed_over:
        print_once(printable(folder) + describe_passed_over(all_passed_over))
    class_names = [printable(entry.name) for entry in class_folders]
    return class_names, files, torch.tensor(labels)


def check_layout(folder):
    """UsageError where `folder`, the train/, val/ or test/ of an image dataset, does not exist."""
    if folder.is_dir():
        return
    dataset_dir = folder.parent
    parent = dataset_dir.resolve().parent
    if dataset_dir.resolve().name in ("train", "val", "test") and (parent / folder.name).is_dir():
        raise UsageError(f"--dataset-dir must be the folder that holds train/ and test/: "
                         f"{printable(parent)}, not {printable(dataset_dir)}")
    found = sorted(printable(entry.name) for entry in dataset_dir.glob("[!.]*") if entry.is_dir())
    raise UsageError(f"{printable(folder)} does not exist: pictures belong in train/<class>/ and "
                     f"test/<class>/; there are the folders {', '.join(found[:10]) or '(none)'}")


def reason_to_pass_over(path, folder):
    """What keeps a file below `folder` from being taken for a picture, in a word; "" if nothing."""
    if "/." in path.relative_to(folder).as_posix():
        return "hidden"
    extension = path.suffix.lower()
    if extension not in picture_extensions():
        return printable(extension) or "without extension"
    if not path.is_file():
        return "broken links or no files"
    return ""


@functools.cache
def picture_extensions():
    """Extensions of the files that the installed Pillow reads as one still picture of pixels."""
    formats = Image.registered_extensions()  # loads all plugins
    return {extension for extension, name in formats.items()
            if name in Image.OPEN and name not in NO_PICTURES}


def describe_passed_over(counts):
    """How many files were passed over and why, as the end of a sentence; "" where none were."""
    if not counts:
        return ""
    kinds = [f"{count} {kind}" for kind, count in sorted(counts.items())]
    text = f": {sum(counts.values())} files were passed over ({', '.join(kinds)})"
    if counts.keys() & HEIC:
        text += f"; {HEIC_HINT}"
    return text


def printable(path):
    """A path as text that can be printed and saved: bytes that are not UTF-8, which old archives
    have in their names, as \\xf6."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode(folder, files, value_range):
    """What the pictures of a folder hold, as a dict. Raises UserError where one cannot be read.

    pixels: (N, 3, H, H) of small square pictures of one size, else None
    extremes: by index the lowest and the highest value of each picture of more than 8 bits
    value_range: the one given or, for training pictures, the one that covers these extremes
    """
    def read(file):
        try:
            image = read_image(file, min_side=2 * SMALL_SIDE)
        except UserError as error:
            return error
        is_small = image.width == image.height <= SMALL_SIDE
        return image if is_small else None, find_extremes(image)

    # Threads are enough, since Pillow decodes outside Python's lock.
    results = thread_map(read, files, desc=f"reading {printable(folder)}", leave=False,
                         disable=None)
    faults = [str(result) for result in results if isinstance(result, UserError)]
    if faults:
        raise UserError(f"{len(faults)} of {len(files)} files in {printable(folder)} are at fault: "
                        + "; ".join(faults[:10]))

    small_images = [image for image, _ in results]
    extremes = {i: pair for i, (_, pair) in enumerate(results) if pair}
    if extremes and folder.name == "train":
        lows, highs = zip(*extremes.values(), strict=True)
        value_range = min(lows), max(highs)

    pixels = None
    sizes = {image.size if image else None for image in small_images}
    if len(sizes) == 1 and None not in sizes:
        side, _ = sizes.pop()
        pixels = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        for i, image in enumerate(small_images):
            pixels[i] = pil_to_tensor(to_rgb(image, value_range))
    return {"pixels": pixels, "extremes": extremes, "value_range": value_range}


def find_extremes(image):
    """The lowest and the highest finite value of a picture of more than 8 bits, else None."""
    if not is_deep(image):
        return None
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    return float(values.min()), float(values.max())


def print_value_range(folder, extremes, value_range, num_pictures):
    """Print what becomes of the pictures of more than 8 bits, of which there may be none, and name
    those that suit the others badly. `extremes` are theirs by name."""
    if not extremes:
        return
    if value_range is None:
        print_once(f"warning: {printable(folder)}: {len(extremes)} of {num_pictures} pictures have "
                   "more than 8 bits, and no training picture has")
        return
    low, high = value_range
    if folder.name == "train":
        print_once(f"{len(extremes)} of {num_pictures} training pictures have more than 8 bits: "
                   f"their values from {low:g} to {high:g} become black to white")
        # The range without the one picture that reaches lowest, and the one that reaches highest.
        by_low = sorted(extremes, key=lambda name: extremes[name][0])
        by_high = sorted(extremes, key=lambda name: extremes[name][1])
        if len(extremes) > 2:
            low = extremes[by_low[1]][0]
            high = extremes[by_high[-2]][1]

    margin = (high - low) / 2
    far_outside = [name for name, (lowest, highest) in extremes.items()
                   if lowest < low - margin or highest > high + margin]
    if far_outside:
        name = far_outside[0]
        lowest, highest = extremes[name]
        others = f" and {len(far_outside) - 1} more" if len(far_outside) > 1 else ""
        print_once(f"warning: {printable(folder)}: {name}{others} reaches from {lowest:g} to "
                   f"{highest:g}, far outside of the range of the others, {low:g} to {high:g}")


# Pictures -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_image(file):
    """A picture (path or open file) as Pillow opens it; UserError for all its decoders raise."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        name = image_name(file)
        hint = f" that Pillow reads; {HEIC_HINT}" if Path(name).suffix.lower() in HEIC else ""
        raise UserError(f"{name} is not a picture{hint}") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        # The text of an OSError repeats the file's name.
        reason = getattr(error, "strerror", None) or utils.first_line(error)
        raise UserError(f"{image_name(file)} cannot be read as a picture: {reason}") from None


def image_name(file):
    """What to call a picture (path or open file) in a message."""
    if isinstance(file, (str, Path)):
        return printable(file)
    # An upload has the sender's name as `filename`, an open file its path as `name`.
    return str(getattr(file, "filename", None) or getattr(file, "name", "the file"))


def read_image(file, min_side=None):
    """A picture (path or open file) as an upright PIL image; UserError where it cannot be read.

    It is RGB on white or, with more than 8 bits, grey and as it is in the file: `build_transform`
    knows the range that its model was trained on. With `min_side` a JPEG comes at a half, fourth or
    eighth of its size, no side below that many px.
    """
    with open_image(file) as image:
        if any(";16" in str(tile.args) for tile in image.tile) and not is_deep(image):
            print_once("some pictures in colour have 16 bits a channel, of which Pillow reads the "
                       "upper 8")
        if min_side:  # skips most of the decoding of a large picture
            image.draft("RGB", (min_side, min_side))
        upright = ImageOps.exif_transpose(image)
        return upright if is_deep(upright) else to_rgb(upright)


def is_deep(image):
    """Whether a PIL image has more than 8 bits a value; such ones are grey."""
    return image.mode.startswith(("I", "F"))


def to_rgb(image, value_range=None):
    """Any PIL image (grey, palette, transparent, 16 bits, turned by EXIF): upright RGB on white.
    `value_range` is a dataset's, for pictures of more than 8 bits."""
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        return to_8_bits(image, value_range).convert("RGB")

    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_8_bits(image, value_range=None):
    """A grey PIL image of more than 8 bits as one of 8: the range's ends become black and white,
    what is beyond them too, and NaN becomes black. A picture of no dataset has the range of its
    mode, 0 to 1 of floats and 0 to 65,535 of integers, whatever its own values are."""
    if value_range is None:
        value_range = (0, 1) if image.mode == "F" else (0, 65535)
    low, high = value_range
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low)
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def load_image(images, i, min_side=None):
    """Image `i` of one part as a person sees it: an RGB PIL image, perhaps reduced (read_image)."""
    if images.pixels is None:
        return to_rgb(read_image(images.files[i], min_side), images.value_range)
    return transforms.functional.to_pil_image(images.pixels[i])


def image_dimensions(images, i):
    """(width, height) of `load_image(images, i)`, a file's from its head alone."""
    if images.pixels is not None:
        height, width = images.pixels.shape[2:]
        return width, height
    with open_image(images.files[i]) as image:
        width, height = image.size
        is_on_its_side = image.getexif().get(EXIF_ORIENTATION, 1) > 4
    return (height, width) if is_on_its_side else (width, height)


def crop_to_size(info):
    """Transform of PIL images, as timm's: shorter side to size / crop_pct, middle square of it."""
    size = info["image_size"]
    shorter_side = math.floor(size / info["crop_pct"])
    return transforms.Compose([
        functools.partial(to_rgb, value_range=info.get("value_range")),
        cut_strip,
        transforms.Resize(shorter_side, transforms.InterpolationMode(info["interpolation"])),
        transforms.CenterCrop(size),
    ])


def cut_strip(image):
    """The middle of a very long picture, of which only the square in the middle will be seen. One
    of 65,000 x 1 px would take 17 GB with its shorter side enlarged to 256 px."""
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width = min(image.width, longest)
    height = min(image.height, longest)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def build_transform(info):
    """PIL image to tensor (3, S, S), normalised, for the model of `info` (a checkpoint's dict)."""
    normalise = transforms.Normalize(info["mean"], info["std"])
    return transforms.Compose([crop_to_size(info), transforms.ToTensor(), normalise])


# Sources of batches: pixels on the device, or workers that read files ----------------------------

class SmallImages:
    """Small images of one size, on the device or, where they do not fit, in the host's memory.
    `sizes` are those to resize them to: the student's and, where it is another, its teacher's."""

    def __init__(self, images, sizes, interpolation, augmentation, device):
        self.sizes = sizes
        self.interpolation = interpolation
        self.device = device
        self.pixels = images.pixels.to(storage_device(images.pixels, device))
        self.labels = images.labels.to(self.pixels.device)

        side = images.pixels.shape[-1]
        self.margin = 0 if augmentation == "none" else max(1, round(side * CROP_PADDING))
        self.flip_probability = 0.5 if augmentation == "flip_crop" else 0

    def batches(self, order, batch_size, generator, rank_rows=slice(None)):
        """Yield (views, labels (B,)) of the images `order[rank_rows]` (indices), all on the device:
        for each of `sizes` the same crops (B, 3, S, S), floats in [0, 1], channels_last."""
        # Drawn for all images of `order` at once, so that each process gets its rows of the same
        # numbers, and a batch of other size the same crops.
        corners = torch.randint(2 * self.margin + 1, (len(order), 2, 1), generator=generator)
        flips = torch.rand(len(order), 1, generator=generator) < self.flip_probability

        order = order[rank_rows].to(self.pixels.device)
        corners = corners[rank_rows].to(self.device)
        flips = flips[rank_rows].to(self.device)
        for indices, corner, flip in zip(order.split(batch_size), corners.split(batch_size),
                                         flips.split(batch_size), strict=True):
            pixels = self.pixels[indices].to(self.device)  # a copy only where they are on the host
            crops = shift_and_flip(pixels, corner, flip, self.margin)
            views = [resize(crops, size, self.interpolation) for size in self.sizes]
            yield views, self.labels[indices].to(self.device)


def shift_and_flip(pixels, corner, flip, margin):
    """Crops of uint8 `pixels` (B, 3, H, H) padded with a black margin, as floats in [0, 1].
    `corner` (B, 2, 1) holds each crop's top and left, `flip` (B, 1) whether it is mirrored."""
    line = torch.arange(pixels.shape[-1], device=pixels.device)
    rows, columns = (corner + line).unbind(1)  # each (B, H)
    columns = torch.where(flip, columns.flip(1), columns)

    # One gather for the whole batch; a loop over its images would launch a kernel for each.
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channel = torch.arange(3, device=pixels.device)[:, None, None]
    padded = F.pad(pixels, [margin] * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]] / 255


def resize(images, size, mode):
    """Images (B, 3, H, H) in [0, 1] to (B, 3, S, S), channels_last, as PIL does: antialiased, one
    axis after the other, clipped after each."""
    for shape in ((images.shape[2], size), (size, size)):
        images = F.interpolate(images, shape, mode=mode, antialias=True).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


class Photographs:
    """Images of which workers make views: `make_views(i, seed)` is a list of PIL images."""

    def __init__(self, labels, make_views, device, num_workers):
        self.labels = labels.tolist()
        self.device = device
        # The list of batches is refilled for each epoch, so that the DataLoader can stay, and with
        # it the workers, which take seconds to start where they are not forked.
        self.batches_to_read = []
        self.loader = torch.utils.data.DataLoader(
            EchoDataset(),
            batch_sampler=self.batches_to_read,
            collate_fn=functools.partial(read_batch, make_views),
            num_workers=num_workers,
            # New workers for each epoch would cost seconds where they import torch anew (Windows),
            # and Python drops what a signal's handler raises while it forks or ends them.
            persistent_workers=num_workers > 0,
            worker_init_fn=init_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one, as dropout does
        )

    def batches(self, order, batch_size, generator, rank_rows=slice(None)):
        """As SmallImages.batches. Raises UserError where a picture cannot be read any more."""
        seeds = torch.randint(2**31, (len(order),), generator=generator)
        items = [(i, seed, self.labels[i]) for i, seed in
                 zip(order[rank_rows].tolist(), seeds[rank_rows].tolist(), strict=True)]
        self.batches_to_read[:] = [items[start:start + batch_size]
                                   for start in range(0, len(items), batch_size)]

        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            *views, labels = (part.to(self.device, non_blocking=True) for part in batch)
            views = [(view / 255).contiguous(memory_format=torch.channels_last) for view in views]
            yield views, labels


class EchoDataset:
    """Returns what it is asked for: the sampler's items say all that a worker needs to know."""

    def __getitem__(self, item):
        return item


def read_batch(make_views, items):
    """[views (B, 3, S, S) uint8 of each size, labels (B,)] of (i, seed, label) triples. A UserError
    is returned: raised, it would come out of the worker with its traceback in its text."""
    try:
        batch = [[*map(pil_to_tensor, make_views(i, seed)), label] for i, seed, label in items]
    except UserError as error:
        return error
    return torch.utils.data.default_collate(batch)


def center_crop_view(images, info, i, seed):
    """What evaluation sees of image `i`, as a list of one; nothing is random in it."""
    return [crop_to_size(info)(load_image(images, i))]


def random_views(images, sizes, interpolation, augmentation, i, seed):
    """A random resized crop (Szegedy et al. 2015) of image `i`, mirrored or not, at each of the
    `sizes`. With augmentation "none" it is the whole image."""
    width, height = image_dimensions(images, i)
    if augmentation == "none":
        top, left, crop_height, crop_width = 0, 0, height, width
        is_mirrored = False
    else:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            top, left, crop_height, crop_width = transforms.RandomResizedCrop.get_params(
                torch.empty(0, height, width), CROP_SCALE, CROP_RATIO)
            is_mirrored = torch.rand(()).item() < 0.5

    views = []
    decoded = {}  # by what a JPEG's sides are divided by
    for size in sizes:
        # Enough pixels that the crop is not enlarged. It follows from this size alone, so that a
        # student sees the same pixels whatever the size of its teacher's.
        min_side = math.ceil(size * max(width / crop_width, height / crop_height))
        divisors = [divisor for divisor in (8, 4, 2) if divisor * min_side <= min(width, height)]
        divisor = max(divisors, default=1)
        if divisor not in decoded:
            decoded[divisor] = load_image(images, i, min_side)
        image = decoded[divisor]

        # The crop's edges in the decoded image; its sides may have been rounded up.
        x_scale = image.width / width
        y_scale = image.height / height
        right = min((left + crop_width) * x_scale, image.width)
        bottom = min((top + crop_height) * y_scale, image.height)
        view = image.resize((size, size), Image.Resampling[interpolation.upper()],
                            (left * x_scale, top * y_scale, right, bottom))
        views.append(ImageOps.mirror(view) if is_mirrored else view)
    return views


def init_worker(_):
    """Let a worker end with its parent, and leave signals to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    # SIGTERM may reach all too (systemd, Slurm). If it killed a worker, torch would raise in the
    # training process, amid its own answer to SIGTERM; an exit with status 0 it does not report.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Of the thread that hands over pictures, when the parent has ended.
    sys.excepthook = lambda *_: None
    # Under forkserver, which is Python 3.14's way, torch's own watch looks at the server, and that
    # lives as long as its workers.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def storage_device(pixels, device):
    """Where images live: on the device, or on the host if they need over half its free memory."""
    if device.type != "cuda":
        return device

    torch.cuda.empty_cache()  # what a model before this one has left would count as taken
    size = pixels.numel()
    free, _ = torch.cuda.mem_get_info(device)
    if size <= free / 2:
        return device
    print_once(f"images: {size / 2**30:.1f} GB stay in host memory, since the GPU has "
               f"{free / 2**30:.1f} GB free")
    return torch.device("cpu")


print_once = functools.cache(print)  # a line, however many loaders of the same images a run makes


def derive_seed(*numbers):
    """One 32-bit seed out of several numbers, well spread."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Loaders ------------------------------------------------------------------------------------------

class TrainingLoader:
    """Batches of data.train for a model of `info`. All that is random in an epoch follows from
    (args.seed, epoch) alone.

    args.accumulate_steps batches make one update, and the last update that is not whole is dropped.
    Of several processes each yields its rows of the same batches.
    """

    def __init__(self, data, info, args, device):
        self.seed = args.seed
        self.device = device
        self.num_images = len(data.train.labels)
        self.batch_size = args.batch_size
        self.accumulate_steps = args.accumulate_steps
        self.rank_batch_size = self.batch_size // utils.WORLD_SIZE
        self.rank_places = rank_places(self.batch_size, self.rank_batch_size)

        # One size where the teacher's is the student's, and then one tensor for both.
        sizes = [info["image_size"]]
        teacher_size = getattr(args, "teacher_image_size", None)
        if teacher_size and teacher_size not in sizes:
            sizes.append(teacher_size)

        if data.train.pixels is None or data.augmentation == "resized_crop":
            make_views = functools.partial(
                random_views, data.train, sizes, info["interpolation"], data.augmentation)
            self.source = Photographs(
                data.train.labels, make_views, device, args.num_workers)
        else:
            self.source = SmallImages(
                data.train, sizes, info["interpolation"], data.augmentation, device)

        self.mixup = None
        if args.mixup_alpha or args.cutmix_alpha:
            self.mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, num_classes=info["num_classes"],
                               label_smoothing=0.0)  # which the loss does

    def __len__(self):
        """Batches of an epoch."""
        updates = self.num_images // (self.batch_size * self.accumulate_steps)
        return updates * self.accumulate_steps

    def epoch(self, epoch):
        """Yield (images, labels) batch by batch; labels are (B,), or mixed (B, C) floats."""
        for images, _, labels in self.epoch_with_teacher(epoch):
            yield images, labels

    def epoch_with_teacher(self, epoch):
        """Yield (images, teacher_images, labels): the same crops of the same pictures, each at its
        own size; where the sizes are equal, the same tensor."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator)
        order = order[:len(self) * self.batch_size]
        rows = torch.arange(len(order)).view(-1, self.batch_size)
        rank_rows = rows[:, self.rank_places].flatten()

        batches = self.source.batches(order, self.rank_batch_size, generator, rank_rows)
        for number, (views, labels) in enumerate(batches):
            if self.mixup:
                views, labels = self.mix(views, labels, derive_seed(self.seed, epoch, number))
            yield views[0], views[-1], labels

    def mix(self, views, labels, seed):
        """Views mixed in the same way, and their labels (B, C)."""
        mixed_views = []
        for view in views:
            np.random.seed(seed)  # timm draws from NumPy's global generator
            mixed_view, mixed_labels = self.mixup(view, labels)
            mixed_views.append(mixed_view)
        return mixed_views, mixed_labels  # the same for all: CutMix takes no two sizes


def rank_places(batch_size, rank_batch_size):
    """The places within each batch that belong to this process. Mixup mixes image i with B-1-i, so
    each process takes such pairs whole."""
    by_pair = sorted(range(batch_size), key=lambda i: min(i, batch_size - 1 - i))
    first = utils.RANK * rank_batch_size
    return torch.tensor(sorted(by_pair[first:first + rank_batch_size]))


class EvaluationLoader:
    """All `images` once, in order, as the model of `info` wants them: yields (images, labels)."""

    def __init__(self, images, info, args, device):
        size = info["image_size"]
        self.num_images = len(images.labels)
        self.batch_size = min(512, max(16, EVAL_PIXELS // size**2))
        if images.pixels is None:
            make_views = functools.partial(center_crop_view, images, info)
            # A worker without a batch would only cost its start.
            num_batches = math.ceil(self.num_images / self.batch_size)
            num_workers = min(args.num_workers, num_batches)
            self.source = Photographs(images.labels, make_views, device, num_workers)
        else:
            self.source = SmallImages(images, [size], info["interpolation"], "none", device)

    def __iter__(self):
        order = torch.arange(self.num_images)
        unused_generator = torch.Generator()  # nothing is random here
        for (images,), labels in self.source.batches(order, self.batch_size, unused_generator):
            yield images, labels
