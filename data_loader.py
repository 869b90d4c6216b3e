"""Datasets, their split into training, validation and test images, and the batches made of them.

`open_dataset` gives training and validation images; only evaluate.py calls `open_test`. A loader
yields images (B, 3, S, S) on the device, floats in [0, 1]; each model normalises them itself.

Small square images of one size (CIFAR, digits) lie on the device as one uint8 tensor; photographs
are decoded by worker processes onto square canvases. Both are cropped, mirrored and resized on the
device, a whole batch at a time.
"""
import functools
import json
import math
import shutil
import signal
import socket
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from torchvision import datasets, transforms
from tqdm.contrib.concurrent import thread_map

from utils import UserError, WrongUse, first_line, load_file, save_file

SMALL = 96                   # px: square images of one size up to this side are kept on the device
CROP_PADDING = 1 / 8         # of the side, on each side: 4 px for CIFAR, as in He et al. 2015
CROP_SCALE = (0.35, 1)       # share of a photograph's area that a random resized crop shows
CROP_RATIO = (3 / 4, 4 / 3)  # its width / height
SMALLEST_CROP = (CROP_SCALE[0] * CROP_RATIO[0] / 1.5) ** 0.5  # its side as a share, up to 3:2
EVAL_PIXELS = 32 * 224**2    # of an evaluation batch: 0.44 GB for EfficientNet-B0 in float32
DOWNLOAD_TIMEOUT = 20        # s without an answer
DOWNLOAD_MB = {"CIFAR100": 340, "CIFAR10": 340, "Flowers102": 700}  # archive and what is in it


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
    split_fingerprint: str  # SHA-256 of classes, training images and choice of validation images
    augmentation: str       # none, crop, flip_crop or resized_crop


# Datasets -----------------------------------------------------------------------------------------

def open_dataset(args):
    """The `Dataset` of args. Raises UserError if it cannot be had, WrongUse if args do not fit."""
    name, augmentation = args.dataset_name, args.augmentation
    whole, class_names = read_part(name, "train", args)
    if name == "ImageFolder":
        check_class_folders(Path(args.dataset_dir), class_names)
    if name == "Flowers102" or (name == "ImageFolder" and Path(args.dataset_dir, "val").is_dir()):
        train = whole
        val, _ = read_part(name, "val", args)
        chosen = {"val": val.labels.tolist(), "val_names": val.names}
    else:
        train_indices, val_indices = split(whole.labels.numpy(), args.val_fraction, args.split_seed)
        train, val = whole.select(train_indices), whole.select(val_indices)
        chosen = {"val_indices": val_indices.tolist()}
    content = {"class_names": class_names, "labels": whole.labels.tolist(), "names": whole.names}
    fingerprint = sha256(json.dumps(content | chosen).encode()).hexdigest()

    if len(train.labels) < args.batch_size * args.accumulate_steps:
        steps = f" --accumulate-steps {args.accumulate_steps}" if args.accumulate_steps > 1 else ""
        raise WrongUse(f"--batch-size {args.batch_size}{steps} is more than the "
                       f"{len(train.labels)} training images")
    if augmentation in ("crop", "flip_crop") and train.pixels is None:
        raise WrongUse(f"--augmentation {augmentation} pads and crops small images; "
                       "photographs take resized_crop or none")
    if augmentation == "auto":
        for_small = "crop" if name == "Digits" else "flip_crop"  # a mirrored digit is no digit
        augmentation = "resized_crop" if train.pixels is None else for_small
    return Dataset(name, class_names, train, val, fingerprint, augmentation)


def open_test(name, args):
    """The test images of dataset `name` and its class names. Only evaluate.py calls this."""
    return read_part(name, "test", args)


def split(labels, fraction, seed):
    """Indices of the larger and the smaller part of `labels` (N,), stratified, in their order."""
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels,
                                 random_state=seed)
    except ValueError as error:
        raise WrongUse(f"the {len(labels)} training images cannot be split with --val-fraction "
                       f"{fraction:g}, every class on both sides: {error}") from None
    return [np.sort(part) for part in parts]


def read_part(name, part, args):
    """The `part` (train, val or test) of dataset `name`: (Images, class names in its own order)."""
    if name == "ImageFolder":
        return read_folder(Path(args.dataset_dir, part), args.data_dir)
    if name == "Digits":
        digits = load_digits()
        train, test = split(digits.target, fraction=0.2, seed=0)
        chosen = test if part == "test" else train
        gray = torch.from_numpy(digits.images[chosen] * (255 / 16)).round().byte()  # of 0 to 16
        labels = torch.from_numpy(digits.target[chosen]).long()
        return Images(gray[:, None].repeat(1, 3, 1, 1), None, labels, []), list("0123456789")
    if name == "Flowers102":
        flowers = download(datasets.Flowers102, args.data_dir, split=part)
        labels = torch.tensor(flowers._labels)  # neither these nor the files have a public name
        return Images(None, flowers._image_files, labels, []), list(flowers.classes)
    cifar = download(getattr(datasets, name), args.data_dir, train=part != "test")
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, None, torch.tensor(cifar.targets), []), list(cifar.classes)


def download(cls, data_dir, **part):
    """A torchvision dataset, downloaded on first use. Raises UserError with what to do by hand."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    flowers, needed = cls is datasets.Flowers102, DOWNLOAD_MB[cls.__name__]
    folder = Path(data_dir, "flowers-102" if flowers else cls.base_folder)
    free = shutil.disk_usage(data_dir).free / 2**20
    if not folder.exists() and free < needed:
        raise UserError(f"{cls.__name__} needs {needed} MB in {data_dir} while it is unpacked, and "
                        f"the disk has {free:.0f} MB left; make room or choose another --data-dir")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # urllib would wait for ever for a silent server
    try:
        return cls(root=data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        of_network = isinstance(error, (ConnectionError, TimeoutError))
        if getattr(error, "errno", None) and not of_network:
            raise  # it is the disk
        if flowers:
            urls = [cls._download_url_prefix + file for file, _ in cls._file_dict.values()]
            by_hand = f"{', '.join(urls)} into {folder}"
        else:
            by_hand = f"{cls.url} into {data_dir}"
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"downloading {cls.__name__} failed ({reason}); download {by_hand} by hand and run the "
            "same command again, or try the project without any download with --quick") from None
    finally:
        socket.setdefaulttimeout(timeout)


# Pictures -----------------------------------------------------------------------------------------

def read_folder(folder, data_dir):
    """The pictures of `folder`/<class>/*, classes in sorted order: (Images, class names).

    All are decoded once, so that a broken one is found before training. What came out is kept in
    `data_dir`/decoded/ for the next time, while names, sizes and dates of the files stay the same.
    """
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no folder of pictures in one folder per class: "
                        f"{first_line(error)}") from None
    files, labels = [Path(file) for file, _ in found.samples], torch.tensor(found.targets)
    names = [file.relative_to(folder).as_posix() for file in files]
    stats = [file.stat() for file in files]
    known_by = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True)]
    signature = sha256(json.dumps(known_by).encode()).hexdigest()
    place = sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    kept = Path(data_dir, "decoded", f"{folder.parent.name}-{folder.name}-{place}.pth")
    content = load_decoded(kept, signature) if kept.exists() else None
    if content is None:
        pixels = decode(folder, files)
        content = {"signature": signature, "pixels": pixels,
                   "checksum": None if pixels is None else sha256(pixels.numpy()).hexdigest()}
        try:
            save_file(content, kept)
        except OSError as error:
            print(f"the decoded pictures could not be kept in {kept} ({error.strerror}); "
                  "they will be decoded again next time")
    pixels = content["pixels"]
    return Images(pixels, files if pixels is None else None, labels, names), found.classes


def load_decoded(kept, signature):
    """What the file `kept` holds; None where it is of other pictures, or damaged."""
    try:
        content = load_file(kept)
        if content["signature"] != signature:
            return None
        pixels = content["pixels"]
        if pixels is None or sha256(pixels.numpy()).hexdigest() == content["checksum"]:
            return content
    except (UserError, KeyError, AttributeError, TypeError, ValueError, RuntimeError):
        pass  # not what was saved
    print(f"{kept} is damaged and will be made again")
    return None


def decode(folder, files):
    """Pixels (N, 3, H, H) of small square pictures of one size, else None. Raises UserError."""
    def read(file):
        try:
            image = read_image(file)
        except UserError as error:
            return error
        return np.asarray(image) if image.width == image.height <= SMALL else None

    # Threads are enough, since Pillow decodes outside Python's lock.
    images = thread_map(read, files, desc=f"reading {folder}", leave=False, disable=None)
    faults = [str(image) for image in images if isinstance(image, UserError)]
    if faults:
        shown = "; ".join([*faults[:10], "…"] if len(faults) > 10 else faults)
        raise UserError(f"{len(faults)} of {len(files)} files in {folder} are at fault: {shown}")
    if any(image is None or image.shape != images[0].shape for image in images):
        return None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def check_class_folders(folder, class_names):
    """Hold the class folders of test/ and, where there is one, val/ against the training part's."""
    for part in (folder / "val", folder / "test"):
        odd = sorted({entry.name for entry in part.glob("*") if entry.is_dir()} ^ set(class_names))
        if odd and (part.name == "test" or part.is_dir()):
            more = ", …" if len(odd) > 10 else ""
            raise UserError(f"{part} must have the same class folders as {folder / 'train'}; "
                            f"{len(odd)} differ: {', '.join(odd[:10])}{more}")


def read_image(file):
    """A picture (path or open file) as an RGB PIL image; UserError where it cannot be read."""
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = file  # these are the errors that Pillow's decoders raise
        if not isinstance(file, (str, Path)):  # an upload's name is its `filename`
            name = getattr(file, "filename", None) or getattr(file, "name", "the file")
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from None


def to_rgb(image):
    """Any PIL image (grey, palette, transparent, 16 bits, turned by EXIF): upright RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: PIL would clip them all to white
        values = np.asarray(image, dtype=np.float64)
        scale = 257 if values.max() > 255 else 1
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def picture(images, i):
    """Image `i` of one part as a person sees it: an RGB PIL image."""
    if images.pixels is None:
        return read_image(images.files[i])
    return transforms.functional.to_pil_image(images.pixels[i])


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

def resize(images, rows, columns):
    """Resize images (B, 3, H, W) by the matrices rows (B or 1, S, H) and columns (B or 1, S, W) to
    (B, 3, S, S), channels_last. After each axis values are clipped to [0, 1], as PIL clips them."""
    B, C, H, W = images.shape
    S = rows.shape[1]
    # The channels lie side by side, so that each image takes one product an axis and not three.
    narrow = (images.reshape(B, C * H, W) @ columns.transpose(1, 2)).clamp_(0, 1)
    side_by_side = narrow.view(B, C, H, S).transpose(1, 2).reshape(B, H, C * S)
    resized = (rows @ side_by_side).clamp_(0, 1).view(B, S, C, S).transpose(1, 2)
    return resized.contiguous(memory_format=torch.channels_last)


def resize_matrices(start, length, side, size, interpolation):
    """Matrices (*, size, side), one for each start and length (*): it resizes `length` of an axis'
    `side` pixels, from `start` on, to `size`. The antialiased filter of PIL's Resample.c: bicubic
    with a = -0.5, or a triangle, widened by the scale when shrinking, cut off at both ends."""
    scale = (length / size)[..., None, None]
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(side, device=start.device) - start[..., None, None]
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    if interpolation == "bicubic":
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far) * (x < 2)
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length[..., None, None]))
    return weights / weights.sum(-1, keepdim=True)


def shift_matrices(side, margin, size, interpolation, device):
    """Matrices (2 * margin + 1, size, side), one for each place of a crop as large as the image in
    the image with a black border of `margin` pixels; without one, that of the whole image."""
    start, padded = torch.arange(2 * margin + 1.0, device=device), side + 2 * margin
    matrices = resize_matrices(start, torch.full_like(start, side), padded, size, interpolation)
    return matrices[..., margin:margin + side]  # black adds nothing


def draw_crops(number, generator):
    """What is random in `number` random resized crops: (number, 22), ten tries of log aspect ratio
    and area, then a position. `resized_boxes` makes boxes of it once the pictures are known."""
    low = torch.tensor([math.log(CROP_RATIO[0]), CROP_SCALE[0]])
    high = torch.tensor([math.log(CROP_RATIO[1]), CROP_SCALE[1]])
    tries = torch.rand(number, 10, 2, generator=generator) * (high - low) + low
    return torch.cat([tries.flatten(1), torch.rand(number, 2, generator=generator)], 1)


def resized_boxes(draws, aspect, side):
    """Random resized crops (Szegedy et al. 2015) of pictures of width / height `aspect` (B,), which
    were stretched onto canvases of `side` pixels: top and left (B, 2), height and width (B, 2).
    As in torchvision the first try that fits, or else the largest central box of a legal ratio."""
    log_ratio, area = draws[:, :20].view(-1, 10, 2).unbind(2)
    ratio, aspect = log_ratio.exp(), aspect[:, None]
    tries = torch.stack([area * aspect / ratio, area * ratio / aspect], 2).sqrt()  # (B, 10, 2)
    largest = torch.stack([aspect / CROP_RATIO[0], CROP_RATIO[1] / aspect], 2).clamp(max=1)
    shapes = torch.cat([tries, largest], 1)  # (B, 11, 2) shares of the canvas; the last fits
    first = (shapes <= 1).all(2).float().argmax(1)[:, None]
    extent = (shapes.take_along_dim(first[:, None], 1)[:, 0] * side).round().clamp(min=1)
    position = torch.where(first < 10, draws[:, 20:], 0.5)
    return (position * (side - extent + 1)).floor().clamp(min=0), extent


class SmallImages:
    """Small images of one size, on the device or, where they do not fit, in the host's memory."""
    def __init__(self, images, device):
        self.device = device
        self.pixels = images.pixels.to(home_of(images.pixels, device))
        self.labels = images.labels.to(device)

    def batches(self, order, batch_size):
        """Yield the images of the indices `order` (N,), `batch_size` at a time, all on the device:
        uint8 pixels (B, 3, H, H), labels (B,) and width / height (B,)."""
        for chosen in order.to(self.pixels.device).split(batch_size):
            pixels = self.pixels[chosen]
            if pixels.device.type != self.device.type:  # "cuda" is no "cuda:0", so compare types
                # Nothing waits for a copy out of pinned memory.
                pixels = pixels.pin_memory().to(self.device, non_blocking=True)
                chosen = chosen.pin_memory().to(self.device, non_blocking=True)
            yield pixels, self.labels[chosen], torch.ones(len(pixels), device=self.device)


class Photographs:
    """Photographs, decoded by worker processes and made square by `canvas`, a PIL transform."""
    def __init__(self, images, canvas, device, num_workers):
        self.device, self.labels = device, images.labels
        self.batch_indices = []  # refilled for each epoch, so that the DataLoader keeps its workers
        self.decoded = torch.utils.data.DataLoader(
            list(zip(images.files, images.labels.tolist(), strict=True)),
            batch_sampler=self.batch_indices, collate_fn=functools.partial(decode_batch, canvas),
            num_workers=num_workers, persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent, pin_memory=device.type == "cuda",
            generator=torch.Generator())  # or it would draw from the global one, as dropout does

    def batches(self, order, batch_size):
        """As SmallImages.batches. Raises UserError where a picture cannot be read any more."""
        self.batch_indices[:] = [indices.tolist() for indices in order.split(batch_size)]
        for batch in self.decoded:
            if isinstance(batch, UserError):
                raise batch
            yield [tensor.to(self.device, non_blocking=True) for tensor in batch]


def decode_batch(canvas, items):
    """What SmallImages.batches yields, but on the host, of (file, label) pairs; or a UserError:
    raised, it would come out of the worker with its traceback in its text."""
    batch = []
    try:
        for file, label in items:
            image = read_image(file)
            aspect = np.float32(image.width / image.height)
            batch.append((transforms.functional.pil_to_tensor(canvas(image)), label, aspect))
    except UserError as error:
        return error
    return torch.utils.data.default_collate(batch)


def leave_signals_to_the_parent(_):
    """Ctrl-C reaches workers too; one that died of it would end training before it is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def home_of(pixels, device):
    """Where images live: on the device, or on the host if they need over half its free memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a model before this one has left would count as taken
        size, free = pixels.numel(), torch.cuda.mem_get_info(device)[0]
        if size > free / 2:
            say_once(f"images: {size / 2**30:.1f} GB stay in host memory, since the GPU has "
                     f"{free / 2**30:.1f} GB free")
            return torch.device("cpu")
        say_once(f"images: {len(pixels)} of them, {size / 2**20:.0f} MB, live on the GPU")
    return device


say_once = functools.cache(print)  # a line, however many loaders of the same images a run makes


def seed_of(*numbers):
    """One 32-bit seed out of several numbers, well spread."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingLoader:
    """Batches of data.train for a model of `info`. All that is random in an epoch follows from
    (args.seed, epoch) alone. args.accumulate_steps batches make one update; what is left of an
    epoch after its last whole update is dropped."""
    def __init__(self, data, info, args, device):
        self.seed, self.device = args.seed, device
        self.batch_size, self.accumulate_steps = args.batch_size, args.accumulate_steps
        self.size, self.interpolation = info["image_size"], info["interpolation"]
        self.teacher_size = getattr(args, "teacher_image_size", None) or self.size
        if data.train.pixels is None:  # canvases on which no crop of the student's is enlarged; a
            self.side = math.ceil(self.size / SMALLEST_CROP)  # teacher's size must not change them
            canvas = transforms.Resize((self.side, self.side), transforms.InterpolationMode.BICUBIC)
            self.source = Photographs(data.train, canvas, device, args.num_workers)
        else:
            self.side = data.train.pixels.shape[-1]
            self.source = SmallImages(data.train, device)
        self.flip_share = 0.5 if data.augmentation in ("flip_crop", "resized_crop") else 0
        self.shifts = {}  # matrices by size, made once: they are few, and slow to make
        if data.augmentation != "resized_crop":
            margin = 0 if data.augmentation == "none" else max(1, round(self.side * CROP_PADDING))
            for size in (self.size, self.teacher_size):
                self.shifts[size] = shift_matrices(
                    self.side, margin, size, self.interpolation, device)
        self.mixup = None
        if args.mixup_alpha or args.cutmix_alpha:  # label smoothing is the loss's
            self.mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0,
                               num_classes=info["num_classes"])

    def __len__(self):
        updates = len(self.source.labels) // (self.batch_size * self.accumulate_steps)
        return updates * self.accumulate_steps

    def epoch(self, epoch):
        """Yield (images, labels) batch by batch; labels are (B,), or mixed (B, C) floats."""
        for images, _, labels in self.epoch_with_teacher(epoch):
            yield images, labels

    def epoch_with_teacher(self, epoch):
        """Yield (images, teacher_images, labels): the same crops of the same pictures, each at its
        own size; where the sizes are equal, the same tensor."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        count = len(self.source.labels)
        order = torch.randperm(count, generator=generator)[:len(self) * self.batch_size]
        if self.shifts:  # which of them, down and across
            draws = torch.randint(len(self.shifts[self.size]), (count, 2), generator=generator)
        else:
            draws = draw_crops(count, generator)
        flips = torch.rand(count, generator=generator) < self.flip_share
        draws, flips = draws.to(self.device), flips.to(self.device)
        for number, batch in enumerate(self.source.batches(order, self.batch_size)):
            pixels, labels, aspect = batch
            images, views = pixels.float() / 255, {}
            at = slice(number * self.batch_size, (number + 1) * self.batch_size)  # in the epoch
            for size in {self.size, self.teacher_size}:
                if self.shifts:
                    matrices = self.shifts[size][draws[at]]
                else:
                    boxes = resized_boxes(draws[at], aspect, self.side)
                    matrices = resize_matrices(*boxes, self.side, size, self.interpolation)
                rows, columns = matrices.unbind(1)  # each (B, size, side)
                columns = torch.where(flips[at, None, None], columns.flip(1), columns)
                views[size] = resize(images, rows, columns)
                if self.mixup:
                    np.random.seed(seed_of(self.seed, epoch, number))  # for timm, both views alike
                    views[size], mixed = self.mixup(views[size], labels)
            yield views[self.size], views[self.teacher_size], mixed if self.mixup else labels


class EvaluationLoader:
    """All `images` once, in order, as the model of `info` wants them: yields (images, labels)."""
    def __init__(self, images, info, args, device):
        size = info["image_size"]
        self.batch_size = min(512, max(16, EVAL_PIXELS // size**2))
        self.matrix = None  # photographs have their size from the workers
        if images.pixels is None:
            self.source = Photographs(images, crop_to_size(info), device, args.num_workers)
        else:
            self.source, side = SmallImages(images, device), images.pixels.shape[-1]
            if side != size:
                self.matrix = shift_matrices(side, 0, size, info["interpolation"], device)

    def __len__(self):
        return math.ceil(len(self.source.labels) / self.batch_size)

    def __iter__(self):
        order = torch.arange(len(self.source.labels))
        for pixels, labels, _ in self.source.batches(order, self.batch_size):
            images = pixels.float() / 255
            if self.matrix is not None:
                images = resize(images, self.matrix, self.matrix)
            yield images.contiguous(memory_format=torch.channels_last), labels
