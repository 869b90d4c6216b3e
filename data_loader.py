"""Datasets, their split into training, validation and test images, and the batches made of them.

`open_dataset` gives training and validation images; of test images it sees but whether a folder's
can be decoded. A loader yields images (B, 3, S, S) on the device, floats in [0, 1]; each model
normalises them itself. Small square images of one size (CIFAR, digits) lie on the device as one
uint8 tensor and are augmented there by the batch; photographs, and resized crops of any image, by
worker processes.
"""
import contextlib
import functools
import json
import math
import os
import signal
import socket
import sys
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm.contrib.concurrent import thread_map

import utils
from utils import UserError, UsageError, first_line, load_checkpoint, save_checkpoint

SMALL = 96                   # px: square images of one size up to this side are kept on the device
CROP_PADDING = 1 / 8         # of the side, on each side: 4 px for CIFAR, as in He et al. 2015
CROP_SCALE = (0.35, 1)       # share of a photograph's area that a random resized crop shows
CROP_RATIO = (3 / 4, 4 / 3)  # its width / height
TURNED = 0x0112              # EXIF's tag of how a camera was held; from 5 on, width is height
DOWNLOAD_TIMEOUT = 20        # s without an answer
EVAL_PIXELS = 32 * 224**2    # of an evaluation batch: 0.44 GB for EfficientNet-B0 in float32


class Images(NamedTuple):
    """One part of a dataset: small images as pixels, or photographs as files."""
    pixels: torch.Tensor | None  # (N, 3, H, H) uint8
    files: list | None           # N paths; None where there are pixels
    labels: torch.Tensor         # (N,) int64
    names: list                  # of an image folder's files, for the fingerprint; else []

    def select(self, indices):
        if self.pixels is not None:
            return Images(self.pixels[indices], None, self.labels[indices], [])
        return Images(None, [self.files[i] for i in indices], self.labels[indices], [])


class Dataset(NamedTuple):
    """What training may see of a dataset."""
    name: str
    class_names: list
    train: Images
    val: Images
    split_fingerprint: str  # SHA-256 of classes, files' names, labels, choice of validation images
    augmentation: str       # none, crop, flip_crop or resized_crop


# Datasets -----------------------------------------------------------------------------------------

@utils.main_process_first()
def open_dataset(args):
    """The `Dataset` of args. Raises UserError if it cannot be had, UsageError if args do not fit."""
    name, augmentation = args.dataset_name, args.augmentation
    whole, class_names = load_split(name, "train", args)
    others = ["val"] if name == "Flowers102" else []
    if name == "ImageFolder":  # a fault in test/ would else show after the training
        others = ["test", "val"] if Path(args.dataset_dir, "val").is_dir() else ["test"]
    found = {part: load_split(name, part, args) for part in others}
    for part, (_, names) in found.items():
        if odd := describe_class_mismatch(names, class_names):
            raise UserError(f"{part}/ and train/ must have the same class folders; {odd}")
    if "val" in found:
        train, (val, _) = whole, found["val"]
        chosen = {"val": val.labels.tolist(), "val_names": val.names}
    else:
        train_indices, val_indices = stratified_split(whole.labels.numpy(), args.val_fraction, args.split_seed)
        train, val = whole.select(train_indices), whole.select(val_indices)
        chosen = {"val_indices": val_indices.tolist()}
    content = {"class_names": class_names, "labels": whole.labels.tolist(), "names": whole.names}
    fingerprint = sha256(json.dumps(content | chosen).encode()).hexdigest()
    if len(train.labels) < args.batch_size * args.accumulate_steps:
        raise UsageError(f"--batch-size {args.batch_size} --accumulate-steps {args.accumulate_steps} "
                       f"is more than the {len(train.labels)} training images")
    if augmentation in ("crop", "flip_crop") and train.pixels is None:
        raise UsageError(f"--augmentation {augmentation} pads and crops small images; "
                       "photographs take resized_crop or none")
    if augmentation == "auto":
        for_small = "crop" if name == "Digits" else "flip_crop"  # a mirrored digit is no digit
        augmentation = "resized_crop" if train.pixels is None else for_small
    print(f"{name}: {len(class_names)} classes, {len(train.labels)} training images, "
          f"{len(val.labels)} validation images")
    return Dataset(name, class_names, train, val, fingerprint, augmentation)


def describe_class_mismatch(one, other):
    """How two lists of class names differ, in a phrase; "" where they are alike."""
    odd = sorted(set(one) ^ set(other))
    return (f"{len(odd)} differ: {', '.join(odd[:10])}" if odd else
            "their order differs" if one != other else "")


def duplicates_of_training_images(test, data):
    """Names of the `test` images that training or validation images repeat to the bit."""
    as_files = all(images.files for images in (test, data.train, data.val))
    def digests(images):
        return [sha256(Path(images.files[i]).read_bytes() if as_files else
                       load_image(images, i).tobytes()).digest() for i in range(len(images.labels))]
    known = {*digests(data.train), *digests(data.val)}
    return [test.names[i] if test.names else f"number {i}"
            for i, digest in enumerate(digests(test)) if digest in known]


def stratified_split(labels, fraction, seed):
    """Indices of the larger and the smaller part of `labels` (N,), stratified, in their order."""
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels,
                                 random_state=seed)
    except ValueError as error:
        raise UsageError(f"the {len(labels)} training images cannot be split with --val-fraction "
                       f"{fraction:g}, every class on both sides: {error}") from None
    return [np.sort(part) for part in parts]


def load_split(name, part, args):
    """The `part` (train, val or test) of dataset `name`: (Images, class names in its own order)."""
    if name == "ImageFolder":
        return read_folder(Path(args.dataset_dir, part), args.data_dir)
    if name == "Digits":
        digits = load_digits()
        train, test = stratified_split(digits.target, fraction=0.2, seed=0)
        chosen = test if part == "test" else train
        gray = torch.from_numpy(digits.images[chosen] * (255 / 16)).round().byte()  # of 0 to 16
        labels = torch.from_numpy(digits.target[chosen]).long()
        return Images(gray[:, None].repeat(1, 3, 1, 1), None, labels, []), list("0123456789")
    if name == "Flowers102":
        flowers = download(datasets.Flowers102, args.data_dir, split=part)
        labels = torch.tensor(flowers._labels)  # neither these nor the files have a public name
        return Images(None, flowers._image_files, labels, []), list(flowers.classes)
    if name not in ("CIFAR10", "CIFAR100"):  # a checkpoint may say anything
        raise UserError(f"there is no dataset {name!r} here")
    cifar = download(getattr(datasets, name), args.data_dir, train=part != "test")
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, None, torch.tensor(cifar.targets), []), list(cifar.classes)


def download(cls, data_dir, **part):
    """A torchvision dataset, downloaded on first use. Raises UserError with what to do by hand."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # urllib would wait for ever for a silent server
    try:
        return cls(root=data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, (ConnectionError, TimeoutError)) and getattr(error, "errno", None):
            raise  # it is the disk
        if cls is datasets.Flowers102:
            files = {Path(data_dir, "flowers-102", file): (cls._download_url_prefix + file, md5)
                     for file, md5 in cls._file_dict.values()}
        else:
            files = {Path(data_dir, cls.filename): (cls.url, cls.tgz_md5)}
        reason = getattr(error, "reason", None) or error
        by_hand = ", ".join(f"{url} to {path}" for path, (url, _) in files.items())
        damaged = [f"; {path} is damaged, its MD5 should be {md5}" for path, (_, md5) in
                   files.items() if path.is_file() and not check_integrity(path, md5)]
        raise UserError(f"downloading {cls.__name__} failed ({reason}); download {by_hand} by hand "
                        "and run the same command again, or try the project without any download "
                        "with --quick" + "".join(damaged)) from None
    finally:
        socket.setdefaulttimeout(None)


# Pictures -----------------------------------------------------------------------------------------

def read_folder(folder, data_dir):
    """The pictures of `folder`/<class>/*, classes in sorted order: (Images, class names).

    All are decoded once, so that a broken one is found before training. What came out is kept in
    `data_dir`/decoded/ for the next time, while names, sizes and dates of the files stay the same.
    """
    class_names, files, labels = list_pictures(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    stats = [file.stat() for file in files]
    known_by = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True)]
    signature = sha256(json.dumps(known_by).encode()).hexdigest()
    place = sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    kept = Path(data_dir, "decoded", f"{folder.parent.name}-{folder.name}-{place}.pth")
    try:
        content = load_checkpoint(kept) if kept.exists() else {}
    except UserError:
        print(f"{kept} is damaged and will be made again")
        content = {}
    if content.get("signature") != signature:
        content = {"signature": signature, "pixels": decode(folder, files)}
        try:
            save_checkpoint(content, kept)
        except OSError as error:
            print(f"the decoded pictures could not be kept in {kept} ({error.strerror}); "
                  "they will be decoded again next time")
    pixels = content["pixels"]
    return Images(pixels, files if pixels is None else None, labels, names), class_names


def list_pictures(folder):
    """Class names, sorted, and paths and labels of the pictures below folder/<class>/. Links to
    folders in there (they may lead in a circle), hidden and other files are passed over."""
    found = sorted(entry for entry in folder.glob("[!.]*") if entry.is_dir())
    files, labels, passed = [], [], 0
    for label, class_folder in enumerate(found):
        paths = [Path(place, name) for place, _, names in os.walk(class_folder) for name in names]
        pictures = sorted(
            path for path in paths if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS
            and path.is_file() and "/." not in path.relative_to(folder).as_posix())
        if not pictures:
            raise UserError(f"{class_folder} should be a class and has no picture")
        files += pictures
        labels += [label] * len(pictures)
        passed += len(paths) - len(pictures)
    if len(found) < 2:
        raise UsageError(f"{folder} must have two or more folders with pictures, one for each class")
    if passed:
        print_once(f"{folder}: {passed} files are no pictures or hidden, and are passed over")
    return [entry.name for entry in found], files, torch.tensor(labels)


def decode(folder, files):
    """Pixels (N, 3, H, H) of small square pictures of one size, else None. Raises UserError."""
    def read(file):
        try:
            image = read_image(file, 2 * SMALL)
        except UserError as error:
            return error
        return np.asarray(image) if image.width == image.height <= SMALL else None

    # Threads are enough, since Pillow decodes outside Python's lock.
    images = thread_map(read, files, desc=f"reading {folder}", leave=False, disable=None)
    faults = [str(image) for image in images if isinstance(image, UserError)]
    if faults:
        raise UserError(f"{len(faults)} of {len(files)} files in {folder} are at fault: "
                        + "; ".join(faults[:10]))
    if any(image is None or image.shape != images[0].shape for image in images):
        return None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@contextlib.contextmanager
def open_image(file):
    """A picture (path or open file) as Pillow opens it; UserError for what its decoders raise."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        of_upload = getattr(file, "filename", None) or getattr(file, "name", "the file")
        name = file if isinstance(file, (str, Path)) else of_upload
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from None


def read_image(file, least=None):
    """A picture (path or open file) as an RGB PIL image; UserError where it cannot be read. A JPEG
    comes at a half, fourth or eighth of its size where both sides stay at `least` so many px."""
    with open_image(file) as image:
        if least:  # skips most of the decoding of a large picture
            image.draft("RGB", (least, least))
        return to_rgb(image)


def to_rgb(image):
    """Any PIL image (grey, palette, transparent, 16 bits, turned by EXIF): upright RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: PIL would clip them all to white
        values = np.asarray(image, dtype=np.float64)
        scale = 257 if values.max() > 255 else 1 / 255 if values.max() <= 1 else 1  # floats to 1
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(images, i, least=None):
    """Image `i` of one part as a person sees it: an RGB PIL image, perhaps reduced (read_image)."""
    if images.pixels is None:
        return read_image(images.files[i], least)
    return transforms.functional.to_pil_image(images.pixels[i])


def image_dimensions(images, i):
    """(width, height) of `picture(images, i)`, from the head of its file."""
    if images.pixels is not None:
        return images.pixels.shape[3], images.pixels.shape[2]
    with open_image(images.files[i]) as image:
        return image.size[::-1] if image.getexif().get(TURNED, 1) > 4 else image.size


def crop_to_size(info):
    """Transform of PIL images, as timm's: shorter side to size / crop_pct, middle square of it."""
    size, mode = info["image_size"], transforms.InterpolationMode(info["interpolation"])
    shorter = transforms.Resize(math.floor(size / info["crop_pct"]), mode)
    return transforms.Compose([to_rgb, shorter, transforms.CenterCrop(size)])


def build_transform(info):
    """PIL image to tensor (3, S, S), normalised, for the model of `info` (a checkpoint's dict)."""
    normalise = transforms.Normalize(info["mean"], info["std"])
    return transforms.Compose([crop_to_size(info), transforms.ToTensor(), normalise])


# Batches ------------------------------------------------------------------------------------------

class SmallImages:
    """Small images of one size, on the device or, where they do not fit, in the host's memory.
    `sizes` are those to crop them to: the student's and, where it is another, its teacher's."""
    def __init__(self, images, sizes, interpolation, augmentation, device):
        self.sizes, self.interpolation, self.device = sizes, interpolation, device
        self.pixels = images.pixels.to(storage_device(images.pixels, device))
        self.labels, side = images.labels.to(self.pixels.device), images.pixels.shape[-1]
        self.margin = 0 if augmentation == "none" else max(1, round(side * CROP_PADDING))
        self.flip_share = 0.5 if augmentation == "flip_crop" else 0

    def batches(self, order, batch_size, generator, mine=slice(None)):
        """Yield (views, labels (B,)) of the images `order[mine]` (indices), all on the device: for
        each of `sizes` the same crops (B, 3, S, S), floats in [0, 1], channels_last."""
        corners = torch.randint(2 * self.margin + 1, (len(order), 2, 1), generator=generator)[mine]
        flips = torch.rand(len(order), 1, generator=generator)[mine] < self.flip_share
        corners, flips = corners.to(self.device), flips.to(self.device)
        line = torch.arange(self.pixels.shape[-1], device=self.device)
        channel = torch.arange(3, device=self.device)[:, None, None]
        order = order[mine].to(self.pixels.device)
        parts = (part.split(batch_size) for part in (order, corners, flips))
        for chosen, corner, flip in zip(*parts, strict=True):
            pixels = self.pixels[chosen].to(self.device)  # a copy only where they are on the host
            rows, columns = (corner + line).unbind(1)  # each (B, H)
            columns = torch.where(flip, columns.flip(1), columns)
            image = torch.arange(len(pixels), device=self.device)[:, None, None, None]
            padded = F.pad(pixels, [self.margin] * 4)  # with black
            crops = padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]] / 255
            views = [resize(crops, size, self.interpolation) for size in self.sizes]
            yield views, self.labels[chosen].to(self.device)


def resize(images, size, mode):
    """Images (B, 3, H, H) in [0, 1] to (B, 3, S, S), channels_last, as PIL does: antialiased, one
    axis after the other, clipped after each."""
    for shape in ((images.shape[2], size), (size, size)):
        images = F.interpolate(images, shape, mode=mode, antialias=True).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


class Photographs:
    """Images of which workers make views: `view(images, i, seed)` is a list of PIL images."""
    def __init__(self, images, view, device, num_workers, keep_workers=False):
        self.device, self.labels = device, images.labels.tolist()
        self.items = []  # refilled for each epoch, so that the DataLoader keeps its workers
        self.decoded = torch.utils.data.DataLoader(
            EchoDataset(), batch_sampler=self.items, num_workers=num_workers,
            collate_fn=functools.partial(decode_batch, functools.partial(view, images)),
            persistent_workers=keep_workers and num_workers > 0,
            worker_init_fn=init_worker, pin_memory=device.type == "cuda",
            generator=torch.Generator())  # or it would draw from the global one, as dropout does

    def batches(self, order, batch_size, generator, mine=slice(None)):
        """As SmallImages.batches. Raises UserError where a picture cannot be read any more."""
        seeds = torch.randint(2**31, (len(order),), generator=generator)
        chosen = zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)
        items = [(i, seed, self.labels[i]) for i, seed in chosen]
        self.items[:] = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
        for batch in self.decoded:
            if isinstance(batch, UserError):
                raise batch
            *views, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield [(view / 255).contiguous(memory_format=torch.channels_last)
                   for view in views], labels


class EchoDataset:
    """A dataset of whatever it is asked for: here the sampler says it all."""
    def __getitem__(self, item):
        return item


def decode_batch(view, items):
    """[views (B, 3, S, S) uint8 of each size, labels (B,)] of (i, seed, label) triples; or a
    UserError: raised, it would come out of the worker with its traceback in its text."""
    try:
        batch = [[*map(pil_to_tensor, view(i, seed)), label] for i, seed, label in items]
    except UserError as error:
        return error
    return torch.utils.data.default_collate(batch)


def center_crop_view(info, images, i, seed):
    """What evaluation sees of a photograph; nothing is random in it."""
    return [crop_to_size(info)(load_image(images, i))]


def random_views(sizes, interpolation, augmentation, images, i, seed):
    """A random resized crop (Szegedy et al. 2015) of image `i`, mirrored or not, at each of the
    `sizes`. With augmentation "none" it is the whole image."""
    width, height = image_dimensions(images, i)
    top, left, h, w, flip = 0, 0, height, width, False
    if augmentation != "none":
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            top, left, h, w = transforms.RandomResizedCrop.get_params(
                torch.empty(0, height, width), CROP_SCALE, CROP_RATIO)
            flip = torch.rand(()).item() < 0.5
    views, decoded = [], {}
    for size in sizes:  # each from a decoding that follows from its own size alone
        least = math.ceil(size * max(width / w, height / h))  # so that no crop is enlarged for it
        shrink = next(s for s in (8, 4, 2, 1) if s == 1 or s * least <= min(width, height))
        if shrink not in decoded:
            decoded[shrink] = load_image(images, i, least)
        whole = decoded[shrink]
        x, y = whole.width / width, whole.height / height
        right, bottom = min((left + w) * x, whole.width), min((top + h) * y, whole.height)
        view = whole.resize((size, size), Image.Resampling[interpolation.upper()],
                            (left * x, top * y, right, bottom))
        views.append(ImageOps.mirror(view) if flip else view)
    return views


def init_worker(_):
    """Ctrl-C reaches workers too; one that died of it would end training before it is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *_: None  # of the thread that sends pictures, when the parent has ended


def storage_device(pixels, device):
    """Where images live: on the device, or on the host if they need over half its free memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a model before this one has left would count as taken
        size, free = pixels.numel(), torch.cuda.mem_get_info(device)[0]
        if size > free / 2:
            print_once(f"images: {size / 2**30:.1f} GB stay in host memory, since the GPU has "
                     f"{free / 2**30:.1f} GB free")
            return torch.device("cpu")
    return device


print_once = functools.cache(print)  # a line, however many loaders of the same images a run makes


def derive_seed(*numbers):
    """One 32-bit seed out of several numbers, well spread."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingLoader:
    """Batches of data.train for a model of `info`. All that is random in an epoch follows from
    (args.seed, epoch) alone. args.accumulate_steps batches make one update, and the last one that
    is not whole is dropped. Mixup mixes image i with B-1-i: a process takes such pairs whole."""
    def __init__(self, data, info, args, device):
        self.seed, self.device, self.count = args.seed, device, len(data.train.labels)
        self.batch_size, self.accumulate_steps = args.batch_size, args.accumulate_steps
        pairs = sorted(range(self.batch_size), key=lambda i: min(i, self.batch_size - 1 - i))
        self.part, size = self.batch_size // utils.WORLD_SIZE, info["image_size"]
        self.places = torch.tensor(sorted(pairs[utils.RANK * self.part:][:self.part]))
        sizes = list(dict.fromkeys((size, getattr(args, "teacher_image_size", None) or size)))
        how = sizes, info["interpolation"], data.augmentation
        if data.train.pixels is None or data.augmentation == "resized_crop":
            view = functools.partial(random_views, *how)
            self.source = Photographs(data.train, view, device, args.num_workers, True)
        else:
            self.source = SmallImages(data.train, *how, device)
        self.mixup = None
        if args.mixup_alpha or args.cutmix_alpha:  # label smoothing is the loss's
            self.mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0,
                               num_classes=info["num_classes"])

    def __len__(self):
        return self.count // (self.batch_size * self.accumulate_steps) * self.accumulate_steps

    def epoch(self, epoch):
        """Yield (images, labels) batch by batch; labels are (B,), or mixed (B, C) floats."""
        for images, _, labels in self.epoch_with_teacher(epoch):
            yield images, labels

    def epoch_with_teacher(self, epoch):
        """Yield (images, teacher_images, labels): the same crops of the same pictures, each at its
        own size; where the sizes are equal, the same tensor."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)[:len(self) * self.batch_size]
        mine = torch.arange(len(order)).view(-1, self.batch_size)[:, self.places].flatten()
        batches = self.source.batches(order, self.part, generator, mine)
        for number, (views, labels) in enumerate(batches):
            if self.mixup:
                mixed = []
                for view in views:
                    np.random.seed(derive_seed(self.seed, epoch, number))  # for timm, all views alike
                    mixed.append(self.mixup(view, labels))
                views, (labels, *_) = zip(*mixed, strict=True)
            yield views[0], views[-1], labels


class EvaluationLoader:
    """All `images` once, in order, as the model of `info` wants them: yields (images, labels)."""
    def __init__(self, images, info, args, device):
        size, self.count = info["image_size"], len(images.labels)
        self.batch_size = min(512, max(16, EVAL_PIXELS // size**2))
        if images.pixels is None:
            view = functools.partial(center_crop_view, info)
            self.source = Photographs(images, view, device, args.num_workers)
        else:
            self.source = SmallImages(images, [size], info["interpolation"], "none", device)

    def __iter__(self):
        order, nothing_random = torch.arange(self.count), torch.Generator()
        for (images,), labels in self.source.batches(order, self.batch_size, nothing_random):
            yield images, labels
