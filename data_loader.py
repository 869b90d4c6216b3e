"""Datasets, the train/validation/test split, augmentation and preprocessing.

Training and validation images come from `open_dataset`, test images from `open_test` alone, which only evaluate.py
calls. A loader yields `(images, labels)` on the device, images (B, 3, S, S) floats in [0, 1], not normalised.

Small square images of one size (CIFAR, digits) lie on the device as one uint8 tensor; photographs are decoded by
worker processes onto square canvases. Both are cropped, flipped and resized on the device by `resample`.
"""
import functools
import hashlib
import json
import math
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from timm.data import Mixup
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import transforms
from tqdm import tqdm

from utils import FORMAT_VERSION, UserError, WrongUse, first_line, load_file, save_file

SMALL = 96              # px: square images of one size up to this side are kept on the device
CROP_PADDING = 1 / 8    # of the side, on each side: 4 px for CIFAR, as everywhere since He et al. 2015
CROP_SCALE = (0.35, 1)  # share of a photograph's area that a random resized crop shows
CROP_RATIO = (3 / 4, 4 / 3)
PHOTO_RATIO = 3 / 2     # of sides; in photographs up to it the smallest crop still has the pixels to fill the output
DOWNLOAD_TIMEOUT = 20   # s without an answer
DOWNLOAD_MB = {"CIFAR100": 340, "CIFAR10": 340, "Flowers102": 700}  # archive and what is in it
EVAL_PIXELS = 32 * 224**2  # pixels of an evaluation batch: 32 images of 224 px, for which EfficientNet-B0 takes 0.44 GB in float32
INTERPOLATIONS = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}


CIFAR100_SUPERCLASSES = {  # Krizhevsky 2009, by torchvision's class names
    "aquatic mammals": "beaver dolphin otter seal whale", "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip", "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe", "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf", "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk", "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman", "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel", "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train", "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


class Images(NamedTuple):
    """One part of a dataset: `pixels` where all images are small, square and of one size, else `source` alone."""
    pixels: torch.Tensor | None  # (N, 3, H, H) uint8
    source: object               # source[i] is (PIL image, label); None where pixels hold all
    labels: torch.Tensor         # (N,) int64
    names: list                  # file names below the part's folder, or []

    def select(self, indices):
        pick = torch.as_tensor(indices)
        return Images(None if self.pixels is None else self.pixels[pick],
                      None if self.source is None else torch.utils.data.Subset(self.source, pick.tolist()),
                      self.labels[pick], [self.names[i] for i in indices] if self.names else [])


def picture(images, i):
    """Image `i` of one part as a person sees it: an RGB PIL image."""
    if images.pixels is not None:
        return Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy())
    return to_rgb(images.source[i][0])


class Dataset(NamedTuple):
    """What training may see of a dataset."""
    name: str
    class_names: list
    train: Images
    val: Images
    split_fingerprint: str  # SHA-256 of classes, training images and the choice of validation images
    augmentation: str       # none, crop, flip_crop or resized_crop


# Datasets -------------------------------------------------------------------------------------------------------

def open_dataset(args):
    """The training and validation images of args.dataset_name. Raises UserError where they cannot be had."""
    whole, class_names = read_part(args.dataset_name, "train", args)
    if args.dataset_name == "ImageFolder":
        check_class_folders(Path(args.dataset_dir), class_names)
    has_val = args.dataset_name == "Flowers102" or \
        args.dataset_name == "ImageFolder" and Path(args.dataset_dir, "val").is_dir()
    if has_val:
        train, (val, _) = whole, read_part(args.dataset_name, "val", args)
        chosen = {"val": val.labels.tolist(), "val_names": val.names}
    else:
        try:
            train_indices, val_indices = train_test_split(
                np.arange(len(whole.labels)), test_size=args.val_fraction, stratify=whole.labels.numpy(),
                random_state=args.split_seed)
        except ValueError as error:
            raise WrongUse(f"the {len(whole.labels)} training images cannot be split with --val-fraction "
                            f"{args.val_fraction:g}, every class on both sides: {error}") from None
        train_indices, val_indices = np.sort(train_indices), np.sort(val_indices)
        train, val = whole.select(train_indices), whole.select(val_indices)
        chosen = {"val_indices": val_indices.tolist()}
    if len(train.labels) < args.batch_size * args.accumulate_steps:
        times = f" --accumulate-steps {args.accumulate_steps}" * (args.accumulate_steps > 1)
        raise WrongUse(f"--batch-size {args.batch_size}{times} is more than the {len(train.labels)} training images")
    content = {"class_names": class_names, "labels": whole.labels.tolist(), "names": whole.names, **chosen}
    fingerprint = digest(json.dumps(content).encode())
    augmentation = args.augmentation
    if augmentation == "auto":
        augmentation = "crop" if args.dataset_name == "Digits" else "resized_crop" if train.pixels is None else "flip_crop"
    if train.pixels is None and augmentation in ("crop", "flip_crop"):
        raise WrongUse(f"--augmentation {augmentation} pads and crops small images; photographs take resized_crop or none")
    return Dataset(args.dataset_name, class_names, train, val, fingerprint, augmentation)


def open_test(name, args):
    """The test images of dataset `name` and its class names. Only evaluate.py calls this."""
    return read_part(name, "test", args)


def read_part(name, part, args):
    """The `part` (train, val or test) of dataset `name`: (Images, class names in the dataset's own order)."""
    if name == "Digits":
        digits = load_digits()
        train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = np.sort(test if part == "test" else train)
        gray = torch.from_numpy(np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8))  # 17 shades, 0 to 16
        labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
        return Images(gray[:, None].repeat(1, 3, 1, 1), None, labels, []), [str(i) for i in digits.target_names]
    if name == "ImageFolder":
        return read_folder(Path(args.dataset_dir, part), args.data_dir)
    cls = getattr(torchvision.datasets, name)
    source = download(cls, args.data_dir, **({"split": part} if name == "Flowers102" else {"train": part != "test"}))
    if name == "Flowers102":
        return Images(None, source, torch.tensor(source._labels), []), list(source.classes)  # no public name for labels
    pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, None, torch.tensor(source.targets), []), list(source.classes)


def download(cls, data_dir, **part):
    """Open a torchvision dataset, downloaded on first use. Raises UserError with what to do by hand."""
    folder = Path(data_dir, getattr(cls, "base_folder", "flowers-102"))
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    if not folder.exists() and (free := shutil.disk_usage(data_dir).free / 2**20) < DOWNLOAD_MB[cls.__name__]:
        raise UserError(f"{cls.__name__} needs {DOWNLOAD_MB[cls.__name__]} MB in {data_dir} while it is unpacked, and the disk has "
                        f"{free:.0f} MB left; make room or choose another --data-dir")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # urllib would wait for ever on a network that answers nothing
    try:
        return cls(root=data_dir, download=True, **part)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
            raise  # the disk, not the network
        if cls is torchvision.datasets.Flowers102:
            base, files = cls._download_url_prefix, [name for name, _ in cls._file_dict.values()]
            by_hand = f"{', '.join(base + name for name in files)} into {Path(data_dir, 'flowers-102')}"
        else:
            by_hand = f"{cls.url} into {data_dir}"
        reason = getattr(error, "reason", None) or error
        raise UserError(f"downloading {cls.__name__} failed ({reason}); download {by_hand} by hand and run the same "
                        f"command again, or try the project without any download with --quick") from None
    finally:
        socket.setdefaulttimeout(timeout)


def read_folder(folder, data_dir):
    """The pictures of `folder`/<class>/*, classes in sorted order: (Images, class names).

    All are decoded once, so that a broken one is found before training; what came out is kept in `data_dir`/decoded/
    for the next time, as long as names, sizes and dates of the files stay the same. Raises UserError for all faults at once.
    """
    try:
        source = torchvision.datasets.ImageFolder(str(folder), loader=read_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no folder of pictures in one folder per class: {first_line(error)}") from None
    files = [Path(file) for file, _ in source.samples]
    names = [file.relative_to(folder).as_posix() for file in files]
    stats = [file.stat() for file in files]
    signature = digest(json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)]).encode())
    kept = Path(data_dir, "decoded", f"{folder.parent.name}-{folder.name}-{digest(str(folder.resolve()).encode())[:12]}.pth")
    pixels, fits = load_decoded(kept, signature)
    if not fits:
        pixels = decode(folder, files)
        checksum = None if pixels is None else digest(pixels.numpy())
        try:
            save_file({"format_version": FORMAT_VERSION, "signature": signature, "checksum": checksum, "pixels": pixels}, kept)
        except OSError as error:
            print(f"the decoded pictures could not be kept in {kept} ({error.strerror}); they will be decoded again next time")
    return Images(pixels, None if pixels is not None else source, torch.tensor(source.targets), names), source.classes


def digest(content):
    return hashlib.sha256(content).hexdigest()


def load_decoded(kept, signature):
    """(pixels or None, whether the file of decoded pictures is there, whole, and of the same pictures)."""
    if not kept.exists():
        return None, False
    try:
        content = load_file(kept)
        if content["signature"] != signature:
            return None, False
        if content["pixels"] is None or digest(content["pixels"].numpy()) == content["checksum"]:
            return content["pixels"], True
    except (UserError, KeyError, AttributeError, TypeError, ValueError, RuntimeError):  # of a dict that is not what was saved
        pass
    print(f"{kept} is damaged and will be made again")
    return None, False


def decode(folder, files):
    """The pixels (N, 3, H, H) of small square pictures of one size, else None; reads every file and reports all faults."""
    def read(file):
        try:
            image = read_image(file)
        except UserError as error:
            return str(error)
        return np.asarray(image) if small else image.size

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        sizes = set(pool.map(image_size, files)) - {None}
        small = len(sizes) == 1 and all(width == height <= SMALL for width, height in sizes)
        images = list(tqdm(pool.map(read, files), total=len(files), desc=f"reading {folder}", leave=False, disable=None))
    faults = [fault for fault in images if isinstance(fault, str)]
    if faults:
        raise UserError(f"{len(faults)} of {len(files)} files in {folder} are at fault: {'; '.join(faults[:10])}"
                        f"{'; …' if len(faults) > 10 else ''}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() if small else None


def check_class_folders(folder, class_names):
    """Hold the names of the other parts' class folders against the training part's, without opening an image."""
    for part in ("val", "test"):
        if part == "val" and not (folder / part).is_dir():
            continue
        names = {entry.name for entry in (folder / part).iterdir() if entry.is_dir()} if (folder / part).is_dir() else set()
        if names != set(class_names):
            odd = sorted(names ^ set(class_names))
            raise UserError(f"{folder / part} must have the same class folders as {folder / 'train'}; {len(odd)} differ: "
                            f"{', '.join(odd[:10])}{', …' if len(odd) > 10 else ''}")


def image_size(file):
    """(width, height) of a picture, read from its head; None where it is no picture."""
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def read_image(file):
    """A picture file (path or open file) as an RGB PIL image, see `to_rgb`. Raises UserError where it cannot be read."""
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        name = file if isinstance(file, (str, Path)) else getattr(file, "filename", None) or getattr(file, "name", "the file")
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from None


def to_rgb(image):
    """Any PIL image (grey, palette, transparent, 16 bits, turned by EXIF) as people see it: upright RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: PIL's own conversion would clip them all to white
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# Preprocessing --------------------------------------------------------------------------------------------------

def crop_to_size(size, crop_pct, interpolation):
    """PIL image to PIL image: shorter side to size / crop_pct, then the square in the middle, as timm evaluates."""
    return transforms.Compose([to_rgb, transforms.Resize(math.floor(size / crop_pct), INTERPOLATIONS[interpolation]),
                               transforms.CenterCrop(size)])


def build_transform(info):
    """The preprocessing of one PIL image for the model of `info` (a checkpoint's dict): a tensor (3, S, S), normalised."""
    return transforms.Compose([crop_to_size(info["image_size"], info["crop_pct"], info["interpolation"]),
                               transforms.ToTensor(), transforms.Normalize(info["mean"], info["std"])])


def resample(images, boxes, flip, size, interpolation, margin=0):
    """Cut a box out of each image, resize it with PIL's antialiased filter, and mirror it where asked.

    images (B, 3, H, W) floats in [0, 1]; boxes (B, 4): top, left, height, width in pixels, which may reach `margin`
    pixels beyond the image, where it is black; flip (B,) bool. Returns (B, 3, size, size) floats in [0, 1].
    Resizing is separable, so each image takes one matrix per axis: the filter of PIL's Resample.c (bicubic with
    a = -0.5, or triangle, widened by the scale when shrinking), cut off at the box.
    """
    top, left, height, width = boxes.unbind(1)
    rows = resize_matrix(top, height, images.shape[2], size, interpolation, margin)  # (B, size, H)
    columns = resize_matrix(left, width, images.shape[3], size, interpolation, margin)
    return resize(images, rows, columns, flip)


def resize(images, rows, columns, flip):
    """images (B, 3, H, W) times the matrices rows (B or 1, S, H) and columns (B or 1, S, W), mirrored where flip (B or 1,), clipped
    to [0, 1] as PIL clips: (B, 3, S, S) in channels_last."""
    B, C, H, W = images.shape
    S = rows.shape[1]
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    # The channels lie side by side, so that each image takes one product an axis and not three.
    narrow = (images.reshape(B, C * H, W) @ columns.transpose(1, 2)).clamp_(0, 1)  # PIL clips between its two passes too
    wide = (rows @ narrow.view(B, C, H, S).transpose(1, 2).reshape(B, H, C * S)).clamp_(0, 1)
    return wide.view(B, S, C, S).transpose(1, 2).contiguous(memory_format=torch.channels_last)


def resize_matrix(start, length, pixels, size, interpolation, margin):
    """Weights (B, size, pixels) that resize `length` pixels from `start` on to `size` pixels; start, length (B,)."""
    scale = (length / size)[:, None, None]
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    at = torch.arange(-margin, pixels + margin, device=start.device) - start[:, None, None]  # position within the box
    x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()
    if interpolation == "bicubic":
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights * ((at >= 0) & (at < length[:, None, None]))
    weights = weights / weights.sum(2, keepdim=True)
    return weights[:, :, margin:margin + pixels]


def random_boxes(augmentation, number, side, generator):
    """Boxes for `number` images, as functions of nothing but the generator.

    For crop and flip_crop: (number, 4) top, left, height, width in pixels of images `side` pixels wide, whole numbers
    like torchvision's RandomCrop after padding. For resized_crop: (number, 10, 2), ten tries of log aspect ratio and area
    and (number, 2) positions in [0, 1), which `resized_boxes` makes boxes of once the picture's shape is known.
    """
    if augmentation == "resized_crop":
        low, high = torch.tensor([[math.log(CROP_RATIO[0]), CROP_SCALE[0]], [math.log(CROP_RATIO[1]), CROP_SCALE[1]]])
        tries = torch.rand(number, 10, 2, generator=generator) * (high - low) + low
        return torch.cat([tries.flatten(1), torch.rand(number, 2, generator=generator)], 1)
    boxes = torch.tensor([0.0, 0.0, side, side]).repeat(number, 1)
    if augmentation in ("crop", "flip_crop"):
        margin = crop_margin(side)
        boxes[:, :2] = torch.randint(-margin, margin + 1, (number, 2), generator=generator)
    return boxes


def crop_margin(side):
    return max(1, round(side * CROP_PADDING))


def resized_boxes(draws, aspect, side):
    """Boxes (B, 4) of random resized crops (Szegedy et al. 2015) on canvases of `side` pixels.

    `draws` (B, 22) from `random_boxes`, aspect (B,): width / height of the pictures that were stretched onto the
    canvases. Of the ten tries the first that fits is taken, else the largest central box with a legal ratio, as in
    torchvision's RandomResizedCrop. Whole pixels.
    """
    tries, position = draws[:, :20].view(-1, 10, 2), draws[:, 20:]
    ratio, area, aspect = tries[..., 0].exp(), tries[..., 1], aspect[:, None]
    shape = torch.stack([(area * aspect / ratio).sqrt(), (area * ratio / aspect).sqrt()], 2)  # height, width: (B, 10, 2)
    fits = (shape <= 1).all(2)
    first = fits.float().argmax(1)
    chosen = shape[torch.arange(len(shape), device=shape.device), first]
    central = torch.stack([(aspect[:, 0] / CROP_RATIO[0]).clamp(max=1), (CROP_RATIO[1] / aspect[:, 0]).clamp(max=1)], 1)
    chosen, position = torch.where(fits.any(1)[:, None], chosen, central), \
        torch.where(fits.any(1)[:, None], position, torch.full_like(position, 0.5))
    extent = (chosen * side).round().clamp(min=1)
    return torch.cat([(position * (side - extent + 1)).floor().clamp(min=0), extent], 1)


def mixing(num_classes, args):
    """timm's mixup and cutmix as the settings ask, or None. Label smoothing is the loss's."""
    if args.mixup_alpha or args.cutmix_alpha:
        return Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=num_classes)
    return None


# Loaders --------------------------------------------------------------------------------------------------------

class Photographs(torch.utils.data.Dataset):
    """Decodes pictures in worker processes: item i is (uint8 tensor (3, S, S), width / height, label), or a sentence that says
    why it cannot be had, since an exception would come out of a worker with its traceback in its text.

    For training the whole picture is stretched onto the canvas, whatever its shape; `resized_boxes` undoes that.
    """
    def __init__(self, images, size, crop=None):
        self.images, self.size, self.crop = images, size, crop

    def __getitem__(self, i):
        try:
            image, label = self.images.source[i]
            image = to_rgb(image)
        except UserError as error:
            return str(error)
        except (OSError, SyntaxError, ValueError) as error:  # of torchvision's own datasets
            return f"image {i} of the dataset cannot be read as a picture: {first_line(error)}"
        aspect = image.width / image.height
        canvas = self.crop(image) if self.crop else image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1), np.float32(aspect), label


def collate(items):
    """A batch of what `Photographs` returns, or the first sentence among it."""
    return next((item for item in items if isinstance(item, str)), None) or torch.utils.data.default_collate(items)


def leave_signals_to_the_parent(_):
    """Ctrl-C reaches the whole process group; a worker that died of it would end the training before it is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Batches of one part of a dataset, on the device.

    With a `seed` it trains: `epoch(n)` yields that epoch's batches, whose order, crops and flips follow from (seed, n)
    alone, so that any two runs see the same images and a run can go on in mid-epoch; the last incomplete batch is
    dropped. Without one, iterating yields all images once, in order, cropped in the middle.
    """
    def __init__(self, images, device, image_size, interpolation, crop_pct=1.0, batch_size=None, num_workers=0,
                 seed=None, augmentation="none", teacher_image_size=None, mixup=None, acc=1):
        self.acc = acc
        self.device, self.size, self.interpolation = device, image_size, interpolation
        self.seed, self.mixup = seed, mixup
        self.augmentation, self.teacher_size = augmentation, teacher_image_size or image_size
        self.batch_size = batch_size or evaluation_batch_size(image_size)
        self.labels, self.pixels = images.labels.to(device), None
        if images.pixels is not None:
            self.pixels, self.side = images.pixels.to(home_of(images.pixels, device)), images.pixels.shape[-1]
        else:
            self.side = self.size
            if seed is not None:
                self.side = math.ceil(max(self.size, self.teacher_size) / (CROP_SCALE[0] * CROP_RATIO[0] / PHOTO_RATIO) ** 0.5)
            crop = crop_to_size(image_size, crop_pct, interpolation) if seed is None else None
            self.batches = []  # of indices, which the DataLoader, keeping its workers, decodes epoch by epoch
            self.photographs = torch.utils.data.DataLoader(
                Photographs(images, self.side, crop), batch_sampler=self.batches, num_workers=num_workers, collate_fn=collate,
                pin_memory=device.type == "cuda", persistent_workers=num_workers > 0, worker_init_fn=leave_signals_to_the_parent,
                generator=torch.Generator())  # or it would draw from the global one, which dropout draws from too

        self.shifts = {}  # by output size, the matrices of whole images shifted by whole pixels: few, so made once
        if augmentation in ("crop", "flip_crop"):
            margin = crop_margin(self.side)
            starts = torch.arange(-margin, margin + 1.0, device=device)
            self.shifts = {size: resize_matrix(starts, torch.full_like(starts, self.side), self.side, size, interpolation, margin)
                           for size in (self.size, self.teacher_size)}

    def __len__(self):
        count = len(self.labels)
        return count // self.batch_size // self.acc * self.acc if self.seed is not None else math.ceil(count / self.batch_size)

    def __iter__(self):
        whole = torch.tensor([[0.0, 0.0, self.side, self.side]], device=self.device)
        upright = torch.zeros(1, dtype=torch.bool, device=self.device)
        indices = torch.arange(len(self.labels), device="cpu" if self.pixels is None else self.pixels.device)
        for pixels, labels, _ in self._decoded(indices.split(self.batch_size)):
            images = self._on_device(pixels)
            if self.side != self.size:  # workers have resized photographs already
                images = resample(images, whole, upright, self.size, self.interpolation)
            yield images.contiguous(memory_format=torch.channels_last), labels

    def epoch_for_two(self, epoch):
        for views, labels in self.epochs(epoch):
            yield (views[0], views[1], labels) if isinstance(views, tuple) else (views, views, labels)

    def epoch(self, epoch, start=0):
        for views, labels in self.epochs(epoch):
            yield (views[0] if isinstance(views, tuple) else views), labels

    def epochs(self, epoch, start=0):
        """Yield the batches of `epoch` from batch `start` on: (images, labels), or, where the teacher's images are of
        another size, ((the student's, the teacher's), labels). Mixed labels are (B, C) floats."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        count = len(self.labels)
        order = torch.randperm(count, generator=generator)
        if self.pixels is not None:
            order = order.to(self.pixels.device)  # once, for each copy from pageable memory waits for the device
        boxes = random_boxes(self.augmentation, count, self.side, generator).to(self.device)
        flips = torch.rand(count, generator=generator) < (0.5 if self.augmentation in ("flip_crop", "resized_crop") else 0)
        flips = flips.to(self.device)
        batches = order[:len(self) * self.batch_size].view(-1, self.batch_size)
        for number, (pixels, labels, aspect) in enumerate(self._decoded(batches[start:]), start):
            at = slice(number * self.batch_size, (number + 1) * self.batch_size)  # draws belong to places, not to images
            images = self._on_device(pixels)
            box = boxes[at]
            if self.augmentation == "resized_crop":
                box = resized_boxes(box, aspect, self.side)
            views = [self._view(images, box, flips[at], size) for size in dict.fromkeys((self.size, self.teacher_size))]
            if self.mixup:
                for i, view in enumerate(views):
                    np.random.seed(seed_of(self.seed, epoch, number))  # timm draws from numpy's global generator
                    views[i], mixed = self.mixup(view, labels)
                labels = mixed
            yield views[0] if len(views) == 1 else tuple(views), labels

    def _view(self, images, boxes, flip, size):
        """What `resample` makes of the images at `size`, with matrices made beforehand where there are some."""
        if size not in self.shifts:
            return resample(images, boxes, flip, size, self.interpolation)
        rows, columns = (self.shifts[size][boxes[:, axis].long() + crop_margin(self.side)] for axis in (0, 1))
        return resize(images, rows, columns, flip)

    def _decoded(self, batches):
        """For each batch of indices: uint8 pixels (B, 3, H, W), and on the device labels (B,) and aspect (B,).

        What comes from host memory comes through pinned copies, for which nothing waits.
        """
        if self.pixels is None:
            self.batches[:] = [chosen.tolist() for chosen in batches]
            for batch in self.photographs:
                if isinstance(batch, str):
                    raise UserError(batch)
                pixels, aspect, labels = batch
                yield pixels, labels.to(self.device, non_blocking=True), aspect.to(self.device, non_blocking=True)
            return
        square = torch.ones(self.batch_size, device=self.device)
        for chosen in batches:
            pixels = self.pixels[chosen]
            if self.pixels.device.type != self.device.type:  # "cuda" is no "cuda:0", so compare the types
                chosen, pixels = (tensor.pin_memory().to(self.device, non_blocking=True) for tensor in (chosen, pixels))
            yield pixels, self.labels[chosen], square[:len(pixels)]

    def _on_device(self, pixels):
        return pixels.to(self.device, non_blocking=True).float() / 255


def evaluation_batch_size(image_size):
    """Images at once where nothing is trained: as many as the memory that training takes has room for."""
    return min(512, max(16, EVAL_PIXELS // image_size**2))


def home_of(pixels, device):
    """Where the images live: on the device, or, where they would take more than half of its free memory, on the host."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a model before this one has left would count as taken
        size, free = pixels.numel(), torch.cuda.mem_get_info(device)[0]
        if size > free / 2:
            say_once(f"images: {size / 2**30:.1f} GB stay in host memory, since the GPU has {free / 2**30:.1f} GB free")
            return torch.device("cpu")
        say_once(f"images: {len(pixels)} of them, {size / 2**20:.0f} MB, live on the GPU")
    return device


@functools.cache
def say_once(line):
    """Print a line, however many loaders of the same images a run makes."""
    print(line)


def seed_of(*numbers):
    """One 32-bit seed out of several numbers, well spread."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def training_loader(data, info, args, device):
    """The loader of data.train for a model of `info`: what a fair pair shares but for the teacher's own view."""
    return Loader(data.train, device, info["image_size"], info["interpolation"], batch_size=args.batch_size,
                  num_workers=args.num_workers, seed=args.seed, augmentation=data.augmentation,
                  teacher_image_size=getattr(args, "teacher_image_size", None),
                  mixup=mixing(info["num_classes"], args), acc=args.accumulate_steps)


def evaluation_loader(images, info, args, device):
    """The loader of all `images`, once and in order, cropped as the model of `info` wants it."""
    return Loader(images, device, info["image_size"], info["interpolation"], crop_pct=info["crop_pct"],
                  num_workers=args.num_workers)
