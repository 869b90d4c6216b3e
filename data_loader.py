"""Datasets, their split into training, validation and test images, and the loaders that yield
batches of them.

`open_dataset` loads the training and validation images. It never returns a test image: in a folder
of the user's own it only checks that the test pictures can be decoded. evaluate.py loads the test
images with `load_split`.

A loader yields images (B, 3, S, S) on the device: B images, S px wide and high, floats in [0, 1].
Each model normalises them itself. Datasets of small square images (CIFAR, letters) are kept in
memory as one uint8 tensor and augmented on the device, a whole batch at a time. Photographs are
decoded and cropped by worker processes. So are small images with the augmentation resized_crop, and
small validation or test images of a model that was trained on photographs (crop_pct below 1).
"""
import atexit
import collections
import contextlib
import functools
import gc
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
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm.contrib.concurrent import thread_map

import utils
from utils import UsageError, UserError, print_once

SMALL_SIDE = 96              # px, the largest side of images that are kept in memory as pixels
CROP_PADDING = 1 / 8         # of the side, on each side: 4 px for CIFAR, as in He et al. 2015
CROP_SCALE = (0.35, 1)       # share of a photograph's area that a random resized crop shows
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random resized crop
MAX_ASPECT_RATIO = 10        # longer pictures are cut before they are resized
FEW_VAL_IMAGES = 300         # below this, one image changes the validation accuracy noticeably
DOWNLOAD_TIMEOUT = 20        # s without an answer from the server
EVAL_PIXELS = 32 * 224**2    # pixels per evaluation batch: 0.44 GB for EfficientNet-B0 in float32

# Formats that Pillow opens although they are video, vector graphics or tables of numbers.
NON_PICTURE_FORMATS = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
HEIC_EXTENSIONS = {".heic", ".heif", ".hif"}  # pictures of iPhones, which Pillow cannot read
HEIC_HINT = "convert HEIC pictures to JPEG first, for example with the package pillow-heif"


class Images(NamedTuple):
    """The images of one part of a dataset (train, val or test): small ones as pixels, photographs
    as files."""
    pixels: torch.Tensor | None  # (N, 3, H, H) uint8; None if the images are files
    files: list | None           # N paths; None if the images are pixels
    labels: torch.Tensor         # (N,) int64
    names: list = []             # N paths within an image folder; [] for other datasets
    file_sizes: list = []        # N sizes of these files in bytes; [] for other datasets
    # (low, high) floats: in pictures of more than 8 bits, low becomes black and high white. None if
    # no training picture has more than 8 bits.
    value_range: tuple | None = None

    def select(self, indices):
        """Only the images at `indices`, without names and sizes of their files."""
        selected = self._replace(labels=self.labels[indices], names=[], file_sizes=[])
        if self.pixels is not None:
            return selected._replace(pixels=self.pixels[indices])
        return selected._replace(files=[self.files[i] for i in indices])


class Dataset(NamedTuple):
    """Everything that training may know of a dataset, which excludes the test images."""
    name: str
    class_names: list
    train: Images
    val: Images
    split_fingerprint: str  # SHA-256, see the function of this name
    augmentation: str       # none, crop, flip_crop or resized_crop


# Datasets -----------------------------------------------------------------------------------------

@utils.main_process_first()  # it downloads and decodes; the other processes find its files
def open_dataset(args):
    """Load the training and validation images of args.dataset_name; returns a `Dataset`.

    Raises UserError if they cannot be loaded, UsageError if the settings do not suit them.
    """
    name = args.dataset_name
    images, class_names = load_split(name, "train", args)
    if name == "ImageFolder":
        check_test_folder(class_names, images.value_range, args)
    predefined_val = load_predefined_val(class_names, images.value_range, args)

    if predefined_val is None:
        train_indices, val_indices = split_train_val(images, class_names, args)
        train = images.select(train_indices)
        val = images.select(val_indices)
        val_identity = {"val_indices": val_indices.tolist()}
    else:
        train = images
        val = predefined_val
        val_identity = {"val": val.labels.tolist(), "val_names": names_and_sizes(val)}
    fingerprint = split_fingerprint(class_names, images, val_identity)

    check_batch_size(train, args)
    augmentation = choose_augmentation(train, args)

    print(f"{name}: {len(class_names)} classes, {len(train.labels):,} training images, "
          f"{len(val.labels):,} validation images to choose the best epoch")
    if len(val.labels) < FEW_VAL_IMAGES:
        remedy = "a larger --val-fraction" if predefined_val is None else "more validation images"
        print("warning: the choice of the best epoch is unreliable, since one validation image "
              f"counts for {100 / len(val.labels):.1f} points of accuracy; {remedy} would help")
    return Dataset(name, class_names, train, val, fingerprint, augmentation)


def load_split(name, part, args, value_range=None):
    """Load the `part` of the dataset `name`: (Images, class names). `part` is train, test or, for
    the datasets that have one of their own (ImageFolder, Flowers102), val.

    Labels are indices into these class names. `value_range` (see Images) is that of the training
    pictures; it is not needed for "train", which determines it.
    """
    if name == "ImageFolder":
        return read_folder(Path(args.dataset_dir, part), args.data_dir, value_range)

    if name == "Digits":
        digits = load_digits()
        train_indices, test_indices = stratified_split(digits.target, fraction=0.2, seed=0)
        indices = test_indices if part == "test" else train_indices
        # Values from 0 to 16 become grey levels from 0 to 255.
        grey = torch.from_numpy(digits.images[indices] * (255 / 16)).round().byte()
        labels = torch.from_numpy(digits.target[indices]).long()
        return Images(grey_to_rgb(grey), None, labels), list("0123456789")

    if name == "Letters":
        pixels, labels = draw_letters(part)
        return Images(pixels, None, labels), list(LETTERS)

    if name == "Flowers102":
        flowers = download(datasets.Flowers102, args.data_dir, split=part)
        # torchvision has no public attribute for the labels and the files.
        labels = torch.tensor(flowers._labels)
        return Images(None, flowers._image_files, labels), list(flowers.classes)

    if name in ("CIFAR10", "CIFAR100"):
        cifar = download(getattr(datasets, name), args.data_dir, train=(part == "train"))
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # was (N, H, H, 3)
        return Images(pixels, None, torch.tensor(cifar.targets)), list(cifar.classes)

    # The command line allows no other name, but a checkpoint may contain any.
    raise UserError(f"there is no dataset {name!r}")


def grey_to_rgb(grey):
    """Pixels (N, H, H) as (N, 3, H, H)."""
    return grey[:, None].repeat(1, 3, 1, 1)


def check_test_folder(class_names, value_range, args):
    """Read the pictures and classes in test/, only so that a mistake in them shows before the
    training and not after it."""
    test, test_class_names = load_split("ImageFolder", "test", args, value_range)
    align_classes(test, test_class_names, class_names)


def align_classes(test, test_class_names, class_names):
    """The `test` images with labels that are indices into `class_names`, those of a model, and no
    longer into `test_class_names`. Raises UserError if they have a class that the model does not
    know; prints a warning if they lack one that it knows."""
    unknown = sorted(set(test_class_names) - set(class_names))
    if unknown:
        raise UserError(f"{len(unknown)} of the classes of the test images were not trained on: "
                        f"{', '.join(unknown[:10])}")

    missing = sorted(set(class_names) - set(test_class_names))
    if missing:
        print_once(f"warning: the test images lack {len(missing)} of {len(class_names)} classes: "
                   f"{', '.join(missing[:10])}; scores are computed over the other classes")

    new_labels = torch.tensor([class_names.index(name) for name in test_class_names])
    return test._replace(labels=new_labels[test.labels])


def load_predefined_val(class_names, value_range, args):
    """Load the validation images of a dataset that comes with its own. None if it does not."""
    name = args.dataset_name
    if name == "ImageFolder":
        has_own_val = Path(args.dataset_dir, "val").is_dir()
    else:
        has_own_val = name == "Flowers102"
    if not has_own_val:
        return None

    val, val_class_names = load_split(name, "val", args, value_range)
    mismatch = describe_class_mismatch(val_class_names, class_names)
    if mismatch:
        raise UserError(f"val/ and train/ must have the same class folders; {mismatch}")
    return val


def describe_class_mismatch(names, other_names):
    """How two lists of class names differ, as a phrase; "" if they are the same."""
    different = sorted(set(names) ^ set(other_names))
    if different:
        return f"{len(different)} differ: {', '.join(different[:10])}"
    if names != other_names:
        return "their order differs"
    return ""


def split_train_val(images, class_names, args):
    """Split `images` at random: (indices to train on, indices to validate on), both sorted."""
    labels = images.labels.numpy()
    counts = np.bincount(labels, minlength=len(class_names))
    too_few = [name for name, count in zip(class_names, counts, strict=True) if count < 2]
    if too_few:
        raise UserError("each class needs at least two training images, since one of them is used "
                        f"for validation; classes with fewer ({len(too_few)}): "
                        f"{', '.join(too_few[:10])}")
    return stratified_split(labels, args.val_fraction, args.split_seed)


def stratified_split(labels, fraction, seed):
    """Split `labels` (N,), stratified by class: (indices of the rest, indices of the images held
    out), both sorted. About `fraction` of all is held out. Each class has at least one image in
    each part, so it must have two or more."""
    # scikit-learn requires room for one image of each class in either part.
    num_classes = len(np.unique(labels))
    num_held_out = math.ceil(fraction * len(labels))
    num_held_out = max(num_held_out, num_classes)
    num_held_out = min(num_held_out, len(labels) - num_classes)
    rest, held_out = train_test_split(
        np.arange(len(labels)), test_size=num_held_out, stratify=labels, random_state=seed)

    # It rounds, though, so that a rare class can still be in one part only: a tenth of classes of
    # 100, 60 and 3 images is 11, 6 and 0 images.
    rest, held_out = move_missing_classes(rest, held_out, labels, seed)
    held_out, rest = move_missing_classes(held_out, rest, labels, seed)
    return np.sort(rest), np.sort(held_out)


def move_missing_classes(source, target, labels, seed):
    """Move one random index of each class that `target` lacks from `source` to `target`. Returns
    the new (source, target)."""
    for missing in np.setdiff1d(labels[source], labels[target]):
        candidates = np.sort(source[labels[source] == missing])
        moved = np.random.default_rng([seed, missing]).choice(candidates)
        source = source[source != moved]
        target = np.append(target, moved)
    return source, target


def split_fingerprint(class_names, images, val_identity):
    """SHA-256 of the class names, of labels, file names and file sizes of all training `images`,
    and of `val_identity`, a dict that says which images are for validation."""
    content = {"class_names": class_names, "labels": images.labels.tolist(),
               "names": names_and_sizes(images)}
    return sha256(json.dumps(content | val_identity).encode()).hexdigest()


def names_and_sizes(images):
    """[(name, size in bytes)] of the files in an image folder, [] for other datasets. The size
    nearly always shows if a picture was replaced by another under the same name (not in formats
    without compression). Unlike its date, it stays the same when the folder is copied."""
    return list(zip(images.names, images.file_sizes, strict=True))


def check_batch_size(train, args):
    """Raise UsageError if there are too few training images for a single update."""
    if len(train.labels) < args.batch_size * args.accumulate_steps:
        raise UsageError(f"--batch-size {args.batch_size} --accumulate-steps "
                         f"{args.accumulate_steps} needs more images for one update "
                         f"than the {len(train.labels)} training images")


def choose_augmentation(train, args):
    """The augmentation in `args` or, if that is "auto", the one that suits the images."""
    are_photographs = train.pixels is None
    if args.augmentation in ("crop", "flip_crop") and are_photographs:
        raise UsageError(f"--augmentation {args.augmentation} pads and crops small images; "
                         "for photographs use resized_crop or none")

    if args.augmentation != "auto":
        return args.augmentation
    if are_photographs:
        return "resized_crop"
    if args.dataset_name in ("Digits", "Letters"):
        return "crop"  # and no flip: a mirrored letter is not that letter any more
    return "flip_crop"


def duplicates_of_training_images(test, data):
    """Names of the `test` images that are identical to a training or validation image."""
    parts = (test, data.train, data.val)
    # If all are files, their bytes are compared, which saves decoding them.
    are_files = all(images.files is not None for images in parts)

    def digests(images):
        """Yield a hash of each image."""
        for i in range(len(images.labels)):
            if are_files:
                content = Path(images.files[i]).read_bytes()
            else:
                content = load_image(images, i).tobytes()
            yield sha256(content).digest()

    seen_in_training = set(digests(data.train)) | set(digests(data.val))
    duplicates = []
    for i, digest in enumerate(digests(test)):
        if digest in seen_in_training:
            duplicates.append(test.names[i] if test.names else f"number {i}")
    return duplicates


# The dataset Letters, which is drawn and not downloaded -------------------------------------------

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SIDE = 32             # px
LETTER_COUNTS = {"train": 90, "test": 120}   # images of each class
# Typefaces that come with matplotlib since 3.8 at the latest. It has more, but they lack some of
# these letters, or have symbols or unusual shapes in their place.
TYPEFACES = [
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10",
]


def draw_letters(part):
    """Draw the `part` (train or test) of Letters: pixels (N, 3, 32, 32) uint8 and labels (N,).

    Every class has the same number of images. Each image has a random typeface, size, angle,
    position, brightness and noise, all from a fixed seed. Two machines draw the same images, except
    for a few grey levels at the edges of letters if their versions of FreeType or Pillow differ.
    """
    rng = np.random.default_rng({"train": 0, "test": 1}[part])
    # A letter is drawn at twice its size and then reduced, so that rotating it does not blur it.
    canvas_side = 2 * LETTER_SIDE

    labels = np.tile(np.arange(len(LETTERS)), LETTER_COUNTS[part])
    count = len(labels)
    typefaces = rng.integers(len(TYPEFACES), size=count)
    font_sizes = rng.integers(32, 61, size=count)  # px on the canvas
    angles = rng.uniform(-30, 30, size=count)
    centers = rng.uniform(0.38, 0.62, size=(count, 2)) * canvas_side
    brightness = rng.uniform(0.5, 1, size=(count, 1, 1))
    noise = rng.normal(0, 0.12, size=(count, LETTER_SIDE, LETTER_SIDE))

    drawings = []
    for label, typeface, font_size, angle, center in zip(
            labels, typefaces, font_sizes, angles, centers, strict=True):
        canvas = Image.new("L", (canvas_side, canvas_side))
        font = load_typeface(TYPEFACES[typeface], int(font_size))
        ImageDraw.Draw(canvas).text(tuple(center), LETTERS[label], 255, font, anchor="mm")
        canvas = canvas.rotate(angle, Image.Resampling.BICUBIC, center=tuple(center))
        drawings.append(np.asarray(canvas.reduce(2)))

    grey = np.stack(drawings) / 255 * brightness + noise
    grey = (grey * 255).clip(0, 255).round().astype(np.uint8)
    return grey_to_rgb(torch.from_numpy(grey)), torch.from_numpy(labels)


@functools.cache
def load_typeface(name, size):
    """Load one of matplotlib's typefaces as a font of Pillow."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # Pillow's default layout engine depends on the machine, and may place a letter elsewhere.
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


# Downloads ----------------------------------------------------------------------------------------

def download(cls, data_dir, **part):
    """Open a dataset of torchvision, which is downloaded on first use. If that fails, the UserError
    says how to download the files by hand."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # urllib would wait forever for a silent server
    try:
        with contextlib.suppress(RuntimeError):  # not downloaded yet, or damaged
            return cls(root=data_dir, download=False, **part)
        # The other training script may have been started at the same time, and would write to the
        # same files.
        with utils.wait_for_lock(Path(data_dir, cls.__name__)):
            return cls(root=data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        # Errors of the disk have an errno, and utils.user_message explains them. Only these two
        # errors of the network have one too.
        is_network_error = isinstance(error, (ConnectionError, TimeoutError))
        if getattr(error, "errno", None) and not is_network_error:
            raise
        reason = getattr(error, "reason", None) or error  # urllib's errors wrap the reason
        raise UserError(f"downloading {cls.__name__} failed ({reason}); "
                        f"{download_hint(cls, data_dir)}") from None
    finally:
        socket.setdefaulttimeout(None)


def download_hint(cls, data_dir):
    """How to download the files of a torchvision dataset by hand, and which existing ones are
    damaged."""
    files = []  # (path, URL, MD5) of each
    if cls is datasets.Flowers102:
        for file, md5 in cls._file_dict.values():
            path = Path(data_dir, "flowers-102", file)
            files.append((path, cls._download_url_prefix + file, md5))
    else:
        files.append((Path(data_dir, cls.filename), cls.url, cls.tgz_md5))

    by_hand = ", ".join(f"{url} to {path}" for path, url, _ in files)
    hint = (f"download {by_hand} by hand and run the same command again, or try --quick, "
            "which downloads nothing")
    for path, _, md5 in files:
        if path.is_file() and not check_integrity(path, md5):
            hint += f"; {path} is damaged, its MD5 should be {md5}"
    return hint


# Folders of pictures ------------------------------------------------------------------------------

def read_folder(folder, data_dir, value_range=None):
    """Read the pictures of `folder`/<class>/*: (Images, sorted class names).

    All pictures are decoded once, so that a broken one is found before training. The result is
    cached in `data_dir`/decoded/ and used until a file's name, size or date changes.
    """
    class_names, files, labels = list_pictures(folder)
    names = [printable(file.relative_to(folder).as_posix()) for file in files]
    file_stats = [file.stat() for file in files]

    cache = cache_path(folder, data_dir)
    signature = cache_signature(names, file_stats, value_range)
    content = load_cache(cache)
    if content.get("signature") != signature:
        content = {"signature": signature, **decode_pictures(folder, files, value_range)}
        save_cache(content, cache)

    value_range = content["value_range"]
    extremes = {names[i]: low_and_high for i, low_and_high in content["extremes"].items()}
    if extremes:
        print_value_range(folder, extremes, value_range, len(files))
        if value_range is not None:
            warn_about_outliers(folder, extremes, value_range)

    pixels = content["pixels"]
    if pixels is not None:
        files = None  # not needed any more
    file_sizes = [stat.st_size for stat in file_stats]
    images = Images(pixels, files, labels, names=names, file_sizes=file_sizes,
                    value_range=value_range)
    return images, class_names


def cache_path(folder, data_dir):
    """The file in which the decoded pictures of `folder` are cached."""
    dataset_name = printable(folder.parent.name)[:40]  # the file's name must not be too long
    path_hash = sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    return Path(data_dir, "decoded", f"{dataset_name}-{folder.name}-{path_hash}.pth")


def cache_signature(names, file_stats, value_range):
    """SHA-256 of everything that the decoded pictures depend on."""
    states = []
    for name, stat in zip(names, file_stats, strict=True):
        states.append((name, stat.st_size, stat.st_mtime_ns))
    return sha256(json.dumps([states, value_range, SMALL_SIDE]).encode()).hexdigest()


def load_cache(cache):
    """Load the dict that save_cache has saved; {} if there is no such file, or it is damaged."""
    if not cache.exists():
        return {}
    try:
        return utils.load_checkpoint(cache)
    except UserError:
        print(f"{cache} is damaged; the pictures are decoded again")
        return {}


def save_cache(content, cache):
    """Save decoded pictures. If that fails, they only have to be decoded again next time."""
    try:
        utils.save_checkpoint(content, cache)
    except OSError as error:
        print(f"the decoded pictures could not be saved to {cache} ({error.strerror}); "
              "they will be decoded again next time")


def list_pictures(folder):
    """Find the pictures in `folder`/<class>/ and below: (sorted class names, paths, labels (N,)).

    Hidden files and files that Pillow cannot read are skipped, and counted in a printed line.
    Links to folders inside a class's folder are not followed, since they could lead in a circle.
    """
    check_layout(folder)
    # Sorted by name: on Windows, paths themselves are sorted without regard to case.
    class_folders = [entry for entry in folder.glob("[!.]*") if entry.is_dir()]
    class_folders.sort(key=lambda entry: entry.name)
    files = []
    labels = []
    all_skipped = collections.Counter()
    for label, class_folder in enumerate(class_folders):
        pictures, skipped = find_pictures(class_folder, folder)
        if not pictures:
            raise UserError(f"the class folder {printable(class_folder)} has no picture"
                            + describe_skipped(skipped))
        files += pictures
        labels += [label] * len(pictures)
        all_skipped += skipped

    # Test pictures may all be of one class, but a model cannot be trained on one.
    min_classes = 1 if folder.name == "test" else 2
    if len(class_folders) < min_classes:
        number = "one" if min_classes == 1 else "two"
        raise UsageError(f"{printable(folder)} must contain {number} or more folders with "
                         "pictures, one folder per class")
    if len(files) < 2:
        raise UsageError(f"{printable(folder)} must contain two or more pictures")
    if all_skipped:
        print_once(printable(folder) + describe_skipped(all_skipped))
    class_names = [printable(entry.name) for entry in class_folders]
    return class_names, files, torch.tensor(labels)


def check_layout(folder):
    """Raise UsageError if `folder`, the train/, val/ or test/ of a dataset, does not exist."""
    if folder.is_dir():
        return
    dataset_dir = folder.parent

    # A common mistake: --dataset-dir is pictures/train and not pictures.
    parent = dataset_dir.resolve().parent
    is_one_too_deep = dataset_dir.resolve().name in ("train", "val", "test")
    if is_one_too_deep and (parent / folder.name).is_dir():
        raise UsageError(f"--dataset-dir must be the folder that holds train/ and test/: "
                         f"{printable(parent)}, not {printable(dataset_dir)}")

    found = sorted(printable(entry.name) for entry in dataset_dir.glob("[!.]*") if entry.is_dir())
    raise UsageError(f"{printable(folder)} does not exist: pictures belong in train/<class>/ and "
                     f"test/<class>/; the folders found are {', '.join(found[:10]) or '(none)'}")


def find_pictures(class_folder, folder):
    """The pictures in `class_folder` and below: (sorted paths, Counter of why other files were
    skipped). `folder` is the folder of all classes."""
    def refuse(error):  # os.walk would pass over a folder that it cannot read
        if not is_hidden(Path(error.filename), folder):
            raise UserError(f"{printable(error.filename)} cannot be read: {error.strerror}")

    pictures = []
    skipped = collections.Counter()
    for parent, _, names in os.walk(class_folder, onerror=refuse):
        for name in names:
            path = Path(parent, name)
            reason = reason_to_skip(path, folder)
            if reason:
                skipped[reason] += 1
            else:
                pictures.append(path)
    return sorted(pictures, key=lambda path: path.parts), skipped


def is_hidden(path, folder):
    """Whether `path`, or a folder above it inside the class's folder in `folder`, is hidden."""
    return "/." in path.relative_to(folder).as_posix()


def reason_to_skip(path, folder):
    """Why a file in `folder` is not used as a picture, in a word or two; "" if it is used."""
    if is_hidden(path, folder):
        return "hidden"
    extension = path.suffix.lower()
    if extension not in picture_extensions():
        return printable(extension) or "without extension"
    if not path.is_file():
        return "broken links or special files"
    return ""


@functools.cache
def picture_extensions():
    """Extensions of the picture files that the installed Pillow can read."""
    formats = Image.registered_extensions()  # {extension: format}; loads all plugins of Pillow
    return {extension for extension, name in formats.items()
            if name in Image.OPEN and name not in NON_PICTURE_FORMATS}


def describe_skipped(counts):
    """How many files were skipped and why, as the end of a sentence; "" if there are none."""
    if not counts:
        return ""
    kinds = [f"{count} {kind}" for kind, count in sorted(counts.items())]
    number = sum(counts.values())
    text = f": {number} {'file was' if number == 1 else 'files were'} skipped ({', '.join(kinds)})"
    if counts.keys() & HEIC_EXTENSIONS:
        text += f"; {HEIC_HINT}"
    return text


def printable(path):
    """A path as text that can be printed and saved. File names from old archives may not be UTF-8;
    their bytes become escapes such as \\xf6."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode_pictures(folder, files, value_range):
    """Decode all pictures of `folder`. Raises a UserError that names those that cannot be read.

    Returns a dict:
    pixels        (N, 3, H, H) uint8 if all pictures are small, square and of one size, else None
    extremes      {i: (lowest, highest value)} of the pictures of more than 8 bits
    value_range   as in Images: from the extremes if these are training pictures, else as given
    """
    def read(file):
        """(the image, or None if it is not small and square; its extremes), or a UserError."""
        try:
            # This reduces a large JPEG, which saves time, but never so far that it looks small.
            image = read_image(file, min_side=2 * SMALL_SIDE)
        except UserError as error:
            return error
        small_image = None
        if image.width == image.height <= SMALL_SIDE:
            small_image = image
        return small_image, find_extremes(image)

    # Threads are enough, since Pillow releases Python's global lock while it decodes.
    results = thread_map(read, files, desc=f"reading {printable(folder)}", leave=False,
                         disable=None)
    errors = [str(result) for result in results if isinstance(result, UserError)]
    if errors:
        raise UserError(f"{len(errors)} of {len(files)} files in {printable(folder)} cannot be "
                        f"used: {'; '.join(errors[:10])}")

    small_images = []
    extremes = {}
    for i, (image, low_and_high) in enumerate(results):
        if image is not None:
            small_images.append(image)
        if low_and_high is not None:
            extremes[i] = low_and_high

    if extremes and folder.name == "train":
        lows, highs = zip(*extremes.values(), strict=True)
        value_range = (min(lows), max(highs))

    pixels = None
    are_all_small = len(small_images) == len(files)
    if are_all_small and len({image.size for image in small_images}) == 1:
        side = small_images[0].width
        pixels = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        for i, image in enumerate(small_images):
            pixels[i] = pil_to_tensor(to_rgb(image, value_range))
    return {"pixels": pixels, "extremes": extremes, "value_range": value_range}


def find_extremes(image):
    """The lowest and the highest finite value of an image of more than 8 bits. None if the image
    has 8 bits, or no finite value."""
    if not is_high_bit_depth(image):
        return None
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    return float(values.min()), float(values.max())


def print_value_range(folder, extremes, value_range, num_pictures):
    """Print how many pictures have more than 8 bits and how they are converted. `extremes` holds
    the (lowest, highest) value of each by its name."""
    if value_range is None:
        print_once(f"warning: {printable(folder)}: {len(extremes)} of {num_pictures} pictures have "
                   "more than 8 bits, but no training picture does")
    elif folder.name == "train":
        low, high = value_range
        print_once(f"{len(extremes)} of {num_pictures} training pictures have more than 8 bits: "
                   f"their values from {low:g} to {high:g} become black to white")


def warn_about_outliers(folder, extremes, value_range):
    """Warn if the values of a picture are far outside of the range of the training pictures.
    `extremes` holds the (lowest, highest) value of each picture by its name."""
    low, high = value_range
    if folder.name == "train" and len(extremes) > 2:
        # A training picture is always inside of the range, which it has helped to determine. It is
        # compared with the others, without the tenth that reaches furthest at either end: several
        # pictures may have the same fault, such as a white pixel.
        num_ignored = max(1, len(extremes) // 10)
        low = sorted(lowest for lowest, _ in extremes.values())[num_ignored]
        high = sorted(highest for _, highest in extremes.values())[-1 - num_ignored]

    margin = (high - low) / 2
    outliers = [name for name, (lowest, highest) in extremes.items()
                if lowest < low - margin or highest > high + margin]
    if outliers:
        name = outliers[0]
        lowest, highest = extremes[name]
        warning = (f"warning: {printable(folder)}: {name} reaches from {lowest:g} to {highest:g}, "
                   f"far outside the range of the others, {low:g} to {high:g}")
        if len(outliers) > 1:
            warning += f"; so do {len(outliers) - 1} more"
        print_once(warning)


# Pictures -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_image(file):
    """Open a picture (path or open file) with Pillow. Whatever Pillow raises on opening it and in
    the body of the `with` becomes a UserError."""
    try:
        with Image.open(file) as image:
            if image.format in NON_PICTURE_FORMATS:  # under whatever file name
                raise UnidentifiedImageError
            yield image
    except UnidentifiedImageError:
        message = f"{image_name(file)} is not a picture"
        if Path(image_name(file)).suffix.lower() in HEIC_EXTENSIONS:
            message += f" that Pillow reads; {HEIC_HINT}"
        raise UserError(message) from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        # An OSError's strerror is its text without the file name, which is already in the message.
        reason = getattr(error, "strerror", None) or utils.first_line(error)
        raise UserError(f"{image_name(file)} cannot be read as a picture: {reason}") from None


def image_name(file):
    """What to call a picture (path or open file) in a message."""
    if isinstance(file, (str, Path)):
        return printable(file)
    # An uploaded file has the sender's name for it in `filename`, any other its path in `name`.
    name = getattr(file, "filename", None) or getattr(file, "name", "the file")
    return str(name)


def read_image(file, min_side=None):
    """Read a picture (path or open file) as an upright PIL image. UserError if that fails.

    The image is RGB, on white if it is transparent. With more than 8 bits it stays grey and keeps
    its values: to_rgb converts it with the value range of a dataset. With `min_side`, a large JPEG
    is decoded at 1/2, 1/4 or 1/8 of its size, so that both sides still have that many px.
    """
    with open_image(file) as image:
        if has_16_bit_colours(image):
            print_once("some colour pictures have 16 bits per channel, of which Pillow reads only "
                       "the upper 8")
        if min_side:
            # This saves most of the time that a large JPEG takes. Other formats ignore it.
            image.draft("RGB", (min_side, min_side))
        upright = ImageOps.exif_transpose(image)
        return upright if is_high_bit_depth(upright) else to_rgb(upright)


def has_16_bit_colours(image):
    """Whether a picture that Pillow has just opened has 16 bits a channel in its file. image.mode
    is RGB even so; only the decoder's arguments tell, such as "RGB;16B"."""
    has_16_bits = any(";16" in str(tile.args) for tile in image.tile)
    return has_16_bits and not is_high_bit_depth(image)


def is_high_bit_depth(image):
    """Whether a PIL image has more than 8 bits a value (mode I, I;16 or F); it is grey then."""
    return image.mode.startswith(("I", "F"))


def to_rgb(image, value_range=None):
    """Convert any PIL image (grey, palette, transparent, 16 bits, rotated by EXIF) to RGB, upright
    and on white. `value_range` (see Images) is for more than 8 bits."""
    image = ImageOps.exif_transpose(image)
    if is_high_bit_depth(image):
        return to_8_bits(image, value_range).convert("RGB")

    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_8_bits(image, value_range=None):
    """Convert a grey PIL image of more than 8 bits to 8. The low end of the range and everything
    below it become black, as does NaN; the high end and everything above it become white.

    Without a `value_range`, the range is 0 to 1 for floats and 0 to 65,535 for integers. It does
    not depend on the values of the image.
    """
    if value_range is None:
        value_range = (0, 1) if image.mode == "F" else (0, 65535)
    low, high = value_range
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low)
    if high > low:
        scaled = (values - low) * (255 / (high - low))
    else:
        scaled = np.zeros_like(values)
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def load_image(images, i, min_side=None):
    """Image `i` of `images` as an RGB PIL image. `min_side` as in read_image."""
    if images.pixels is not None:
        return transforms.functional.to_pil_image(images.pixels[i])
    return to_rgb(read_image(images.files[i], min_side), images.value_range)


def jpeg_dimensions(images, i):
    """(width, height) of `load_image(images, i)` if it is in a JPEG file, which is opened for it
    but not decoded; else None."""
    if images.pixels is not None:
        return None
    with open_image(images.files[i]) as image:
        if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further images behind it
            return None
        width, height = image.size
        # These orientations swap width and height.
        is_sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if is_sideways else (width, height)


def build_transform(info):
    """The preprocessing for the model of `info` (the dict in a checkpoint): a function of a PIL
    image that returns a normalised tensor (3, S, S)."""
    normalise = transforms.Normalize(info["mean"], info["std"])
    return transforms.Compose([crop_to_size(info), transforms.ToTensor(), normalise])


def crop_to_size(info):
    """The geometric part of the preprocessing, PIL image to PIL image: resize the shorter side to
    size / crop_pct, as timm does, and cut out the square in the middle."""
    size = info["image_size"]
    shorter_side = math.floor(size / info["crop_pct"])
    return transforms.Compose([
        functools.partial(to_rgb, value_range=info.get("value_range")),
        limit_aspect_ratio,
        transforms.Resize(shorter_side, transforms.InterpolationMode(info["interpolation"])),
        transforms.CenterCrop(size),
    ])


def limit_aspect_ratio(image):
    """Cut the ends off a very long image. A square from its middle is all that is used later, but
    resizing comes first: an image of 65,000 x 1 px would take 17 GB at a height of 256 px."""
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width = min(image.width, longest)
    height = min(image.height, longest)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# Sources of batches: images in memory, or images made by worker processes -------------------------
#
# A view is an image as one network gets it, augmented and resized. A batch of a source has one
# tensor of views for the student and, if its teacher has another image size, one for the teacher.

class MemorySource:
    """Batches of images whose pixels are kept in memory: on the device or, if they do not fit
    there, on the host. `sizes` are the image sizes of the views."""

    def __init__(self, images, sizes, interpolation, augmentation, device):
        self.sizes = sizes
        self.interpolation = interpolation
        self.device = device
        self.pixels = images.pixels.to(storage_device(images.pixels, device))
        self.labels = images.labels.to(device)

        self.margin = 0  # px of black border, within which crops are shifted
        if augmentation != "none":
            side = images.pixels.shape[-1]
            self.margin = max(1, round(side * CROP_PADDING))
        self.flip_probability = 0.5 if augmentation == "flip_crop" else 0

    def batches(self, order, batch_size, generator, rank_rows=slice(None)):
        """Yield (views, labels (B,)) on the device for the images with the indices
        `order[rank_rows]`: views has a tensor (B, 3, S, S) for each of `sizes`, floats in [0, 1],
        channels_last."""
        # Random numbers are drawn for the whole of `order`. So an image gets the same crop in
        # whichever process of torchrun.
        corners = torch.randint(2 * self.margin + 1, (len(order), 2, 1), generator=generator)
        flips = torch.rand(len(order), 1, generator=generator) < self.flip_probability

        indices = order[rank_rows].to(self.pixels.device)
        labels = self.labels[order[rank_rows].to(self.device)]
        corners = corners[rank_rows].to(self.device)
        flips = flips[rank_rows].to(self.device)
        batches = zip(indices.split(batch_size), labels.split(batch_size),
                      corners.split(batch_size), flips.split(batch_size), strict=True)
        for batch_indices, batch_labels, batch_corners, batch_flips in batches:
            pixels = copy_without_waiting(self.pixels[batch_indices], self.device)
            crops = shift_and_flip(pixels, batch_corners, batch_flips, self.margin)
            views = [resize(crops, size, self.interpolation) for size in self.sizes]
            yield views, batch_labels


def storage_device(pixels, device):
    """Where to keep `pixels`: on the device, or on the host if they would take more than half of
    the device's free memory."""
    if device.type != "cuda":
        return device

    # Memory of a previous model would not count as free: its graphs, which only the garbage
    # collector frees, and what torch has cached.
    gc.collect()
    torch.cuda.empty_cache()
    size = pixels.numel()
    free, _ = torch.cuda.mem_get_info(device)
    if size <= free / 2:
        return device
    print_once(f"images: {size / 2**30:.1f} GB stay in host memory, since the GPU has only "
               f"{free / 2**30:.1f} GB free")
    return torch.device("cpu")


def copy_without_waiting(tensor, device):
    """`tensor` on the device. A copy from the host to a GPU does not wait for the GPU's work, for
    which the host's memory must be pinned."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def shift_and_flip(pixels, corners, flips, margin):
    """Pad uint8 `pixels` (B, 3, H, H) with a black margin and cut out a crop (H, H) of each image,
    as floats in [0, 1]. `corners` (B, 2, 1) holds the top and left of each crop, `flips` (B, 1)
    whether it is mirrored."""
    line = torch.arange(pixels.shape[-1], device=pixels.device)
    rows, columns = (corners + line).unbind(1)  # (B, H) each: which lines of the padded image
    columns = torch.where(flips, columns.flip(1), columns)

    # All crops in one indexing operation, with indices that broadcast to (B, 3, H, H). A loop over
    # the images would launch a CUDA kernel for each.
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channel = torch.arange(3, device=pixels.device)[:, None, None]
    row = rows[:, None, :, None]
    column = columns[:, None, None, :]
    padded = F.pad(pixels, [margin] * 4)
    return padded[image, channel, row, column] / 255


def resize(images, size, mode):
    """Resize images (B, 3, H, H) in [0, 1] to (B, 3, S, S), channels_last. As in PIL, it is
    antialiased, and the two axes are resized and clipped one after the other."""
    height = images.shape[2]
    for shape in ((height, size), (size, size)):
        images = F.interpolate(images, shape, mode=mode, antialias=True).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


class WorkerSource:
    """Batches of images that worker processes decode and crop. `make_views(i, seed)` returns the
    views of image i, a list of PIL images."""

    def __init__(self, labels, make_views, device, num_workers):
        self.labels = labels.tolist()
        self.device = device
        # One DataLoader is used for all epochs, and this list is filled anew for each. New workers
        # for each epoch would take seconds to start if they import torch again (Windows). Also,
        # Python loses an exception from a signal handler, such as Ctrl-C, while workers are forked
        # or ended.
        self.batches_to_read = []
        self.loader = torch.utils.data.DataLoader(
            EchoDataset(),
            batch_sampler=self.batches_to_read,
            collate_fn=functools.partial(read_batch, make_views),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=init_worker,
            pin_memory=device.type == "cuda",
            # By default it takes a number from torch's global generator, and dropout would change.
            generator=torch.Generator(),
        )

    def batches(self, order, batch_size, generator, rank_rows=slice(None)):
        """As MemorySource.batches. Raises UserError if a picture can no longer be read."""
        seeds = torch.randint(2**31, (len(order),), generator=generator)
        items = []
        for i, seed in zip(order[rank_rows].tolist(), seeds[rank_rows].tolist(), strict=True):
            items.append((i, seed, self.labels[i]))

        self.batches_to_read.clear()
        for start in range(0, len(items), batch_size):
            self.batches_to_read.append(items[start:start + batch_size])

        for batch in self.loader:
            if isinstance(batch, UserError):  # from read_batch
                raise batch
            # Only with CUDA: on an Apple GPU, torch may read the batch after Python has freed it
            # (pytorch #139550).
            non_blocking = self.device.type == "cuda"
            *views, labels = [tensor.to(self.device, non_blocking=non_blocking) for tensor in batch]
            views = [(view / 255).contiguous(memory_format=torch.channels_last) for view in views]
            yield views, labels


class EchoDataset:
    """Returns the item it is asked for. Usually a Dataset reads the image of an index. Here an item
    also has a seed, which depends on the epoch: so items come from the sampler, and read_batch,
    which makes a batch of them, reads the images."""

    def __getitem__(self, item):
        return item


def read_batch(make_views, items):
    """Make a batch of `items`, tuples (i, seed, label): a list of the views (B, 3, S, S) uint8 for
    each size, followed by the labels (B,).

    A UserError is returned and not raised, since the DataLoader would put the worker's traceback
    into its text.
    """
    samples = []
    try:
        for i, seed, label in items:
            views = [pil_to_tensor(view) for view in make_views(i, seed)]
            samples.append([*views, label])
    except UserError as error:
        return error
    return torch.utils.data.default_collate(samples)


def evaluation_views(images, info, i, seed):
    """The one view of image `i` for evaluation, in a list. Nothing is random in it, so that `seed`
    is not used."""
    return [crop_to_size(info)(load_image(images, i))]


def random_views(images, sizes, interpolation, augmentation, i, seed):
    """The views of image `i` for training, one for each of the `sizes`: the same random crop,
    mirrored or not. With the augmentation "none" the crop is the whole image."""
    decoded = {}  # {divisor: the image with sides divided by it}
    dimensions = jpeg_dimensions(images, i)
    is_jpeg = dimensions is not None
    if not is_jpeg:  # only a JPEG can be decoded at a fraction of its size
        decoded[1] = load_image(images, i)
        dimensions = decoded[1].size

    width, height = dimensions
    box = (0, 0, width, height)
    is_mirrored = False
    if augmentation != "none":
        box, is_mirrored = random_crop(width, height, seed)
    left, top, right, bottom = box

    views = []
    for size in sizes:
        # Decode as few pixels as possible without having to enlarge the crop. This depends on one
        # size only, so the student's view is the same with and without a teacher.
        enlargement = max(width / (right - left), height / (bottom - top))
        min_side = math.ceil(size * enlargement)
        divisor = jpeg_divisor(width, height, min_side) if is_jpeg else 1
        if divisor not in decoded:
            decoded[divisor] = load_image(images, i, min_side)
        image = decoded[divisor]

        # The same box in the decoded image, whose sides may have been rounded up.
        x_scale = image.width / width
        y_scale = image.height / height
        scaled_box = (left * x_scale, top * y_scale,
                      min(right * x_scale, image.width), min(bottom * y_scale, image.height))
        view = image.resize((size, size), Image.Resampling[interpolation.upper()], scaled_box)
        if is_mirrored:
            view = ImageOps.mirror(view)
        views.append(view)
    return views


def random_crop(width, height, seed):
    """A random resized crop (Szegedy et al. 2015): its box (left, top, right, bottom), and whether
    it is mirrored."""
    with torch.random.fork_rng(devices=[]):  # torchvision uses the CPU's global generator
        # torch.manual_seed would also reset the GPU's generator, and with it the dropout.
        torch.default_generator.manual_seed(seed)
        top, left, crop_height, crop_width = transforms.RandomResizedCrop.get_params(
            torch.empty(0, height, width), CROP_SCALE, CROP_RATIO)
        is_mirrored = torch.rand(()).item() < 0.5
    return (left, top, left + crop_width, top + crop_height), is_mirrored


def jpeg_divisor(width, height, min_side):
    """By what Pillow divides the sides of a JPEG that read_image reads with `min_side`."""
    for divisor in (8, 4, 2):
        if divisor * min_side <= min(width, height):
            return divisor
    return 1


def init_worker(worker_id):
    """Prepare a worker process: it ends when its parent ends, and leaves signals to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    # SIGTERM may also reach all processes (systemd, Slurm). If it killed a worker, torch would
    # raise an error in the parent and disturb its shutdown. An exit with status 0 is ignored.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Unless it was forked, a worker would shut its interpreter down, which can abort a thread that
    # is handing over images.
    atexit.register(os._exit, 0)
    # If the parent ends first, a thread that was handing over images fails. Its traceback would
    # only be confusing.
    sys.excepthook = lambda *_: None
    # torch's workers watch for the end of the process that started them. With forkserver, Python
    # 3.14's default, that is a server which lives as long as they do.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


# Loaders ------------------------------------------------------------------------------------------

class TrainingLoader:
    """Batches of data.train for the model of `info`. The order of the images and their augmentation
    depend on args.seed, the epoch and the images of an update, not on the number of processes.

    An update takes args.accumulate_steps batches. At the end of an epoch, images that are too few
    for another update are left out. Under torchrun each process yields its share of every batch.
    """

    def __init__(self, data, info, args, device):
        self.seed = args.seed
        self.device = device
        self.num_images = len(data.train.labels)
        self.batch_size = args.batch_size
        self.accumulate_steps = args.accumulate_steps
        self.rank_batch_size = self.batch_size // utils.WORLD_SIZE
        self.rank_positions = positions_of_this_rank(self.batch_size, self.rank_batch_size)

        # If student and teacher have the same size, they share one tensor.
        sizes = [info["image_size"]]
        teacher_size = getattr(args, "teacher_image_size", None)  # the baseline has no such flag
        if teacher_size and teacher_size not in sizes:
            sizes.append(teacher_size)

        if data.train.pixels is None or data.augmentation == "resized_crop":
            make_views = functools.partial(
                random_views, data.train, sizes, info["interpolation"], data.augmentation)
            self.source = WorkerSource(data.train.labels, make_views, device, args.num_workers)
        else:
            self.source = MemorySource(
                data.train, sizes, info["interpolation"], data.augmentation, device)

        self.mixup = None
        if args.mixup_alpha or args.cutmix_alpha:
            # Labels are smoothed by the loss, not here.
            self.mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, num_classes=info["num_classes"],
                               label_smoothing=0.0)

    def __len__(self):
        """Batches of an epoch."""
        updates = self.num_images // (self.batch_size * self.accumulate_steps)
        return updates * self.accumulate_steps

    def epoch(self, epoch):
        """Yield (images, labels) batch by batch. The labels are (B,) or, if mixed, (B, C) floats
        for C classes."""
        for images, _, labels in self.epoch_with_teacher(epoch):
            yield images, labels

    def epoch_with_teacher(self, epoch):
        """Yield (images, teacher_images, labels) batch by batch: the same crops in the size of the
        student and in that of the teacher. If the sizes are equal, both are the same tensor."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator)
        order = order[:len(self) * self.batch_size]

        # Rows of `order` that belong to this process, the same positions in each batch. With one
        # process these are all rows.
        rows = torch.arange(len(order)).view(-1, self.batch_size)
        rank_rows = rows[:, self.rank_positions].flatten()

        batches = self.source.batches(order, self.rank_batch_size, generator, rank_rows)
        # From 1, since to derive_seed (seed, epoch, 0) is the same as (seed, epoch).
        for batch_number, (views, labels) in enumerate(batches, start=1):
            if self.mixup:
                views, labels = self.mix(
                    views, labels, derive_seed(self.seed, epoch, batch_number))
            yield views[0], views[-1], labels  # the same view twice if there is one size

    def mix(self, views, labels, seed):
        """Apply mixup or CutMix in the same way to the views of each size. Returns them and their
        mixed labels (B, C)."""
        mixed_views = []
        for view in views:
            np.random.seed(seed)  # timm uses NumPy's global generator
            # The labels come out the same for each view. With CutMix they would depend on the size,
            # but config.py allows it for a single size only.
            mixed_view, mixed_labels = self.mixup(view, labels)
            mixed_views.append(mixed_view)
        return mixed_views, mixed_labels


def positions_of_this_rank(batch_size, rank_batch_size):
    """Which positions of a batch belong to this process of torchrun: (rank_batch_size,) int64.

    Mixup mixes image i with image B-1-i, so both belong to the same process.
    """
    def pair_number(i):
        return min(i, batch_size - 1 - i)

    by_pair = sorted(range(batch_size), key=pair_number)  # 0, B-1, 1, B-2, ...
    first = utils.RANK * rank_batch_size
    return torch.tensor(sorted(by_pair[first:first + rank_batch_size]))


def derive_seed(*numbers):
    """A 32-bit seed made of up to four numbers. Similar numbers give unrelated seeds, but zeros at
    the end do not count."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EvaluationLoader:
    """Yields (images, labels) for all `images` once and in order, preprocessed for the model of
    `info`."""

    def __init__(self, images, info, args, device):
        size = info["image_size"]
        self.num_images = len(images.labels)
        self.batch_size = min(512, max(16, EVAL_PIXELS // size**2))
        # Models of photographs crop small images too: crop_pct belongs to the training images.
        if images.pixels is None or info["crop_pct"] != 1:
            make_views = functools.partial(evaluation_views, images, info)
            # A worker without a batch would only cost the time to start it.
            num_batches = math.ceil(self.num_images / self.batch_size)
            num_workers = min(args.num_workers, num_batches)
            self.source = WorkerSource(images.labels, make_views, device, num_workers)
        else:
            self.source = MemorySource(images, [size], info["interpolation"], "none", device)

    def __iter__(self):
        order = torch.arange(self.num_images)
        unused_generator = torch.Generator()  # nothing is random here
        for (images,), labels in self.source.batches(order, self.batch_size, unused_generator):
            yield images, labels
