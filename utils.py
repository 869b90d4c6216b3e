"""What every script needs: errors and exit status, processes, device and precision, files, the
folder of a run, metrics and progress. Nothing here builds a model or runs a loop."""
import contextlib
import csv
import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import io
import itertools
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
import torch.distributed as dist
from tqdm import tqdm

# tqdm's own lock is shared with forked processes, by a semaphore that Python 3.14 reports as leaked
# after an abrupt end. Only the main process draws bars.
tqdm.set_lock(threading.RLock())

FORMAT_VERSION = 4  # of checkpoints; goes up when older code could misread a newer file
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of --amp-dtype

# torchrun starts several processes and numbers them; without it there is one, with rank 0. Outside
# of torchrun its variables may be set for something else, and are not read.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK = int(TORCHRUN.get("RANK", 0))
WORLD_SIZE = int(TORCHRUN.get("WORLD_SIZE", 1))


# Errors and exit status ---------------------------------------------------------------------------

class UserError(Exception):
    """An error that the user can fix; its text is the one message they see."""
    exit_status = 1


class UsageError(UserError):
    """Settings that cannot work."""
    exit_status = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM. What handles Ctrl-C handles this too."""


def raise_terminated(signal_number, frame):
    raise Terminated


def run_script(main, args):
    """Call `main(args)` and return the exit status.

    0: done; 1: an error that the user can fix; 2: settings that cannot work; 130: Ctrl-C; 143:
    SIGTERM. Unless it is 0, there is one message on stderr. A bug keeps its traceback.
    """
    if RANK != 0:
        silence(sys.stdout)  # only process 0 prints
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in IDLE and notebooks
            stream.reconfigure(errors="replace")  # no crash on characters the terminal cannot show
    signal.signal(signal.SIGTERM, raise_terminated)

    try:
        status = call_and_report(main, args)
    except KeyboardInterrupt as stop:
        ignore_ends_of_data_workers()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would disturb the shutdown
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if RANK == 0:
            print_error(stop_message(args))
        status = 143 if isinstance(stop, Terminated) else 130

    if WORLD_SIZE > 1:
        if status == 0:
            dist.destroy_process_group()
        else:
            sys.stdout.flush()
            os._exit(status)  # at a normal exit NCCL could wait for processes that are gone
    return status


def call_and_report(main, args):
    """Call `main(args)`; return 0, or report what went wrong and return its exit status."""
    try:
        main(args)
        sys.stdout.flush()  # a broken pipe shows here, not at the interpreter's shutdown
        return 0
    except Exception as error:
        ignore_ends_of_data_workers()
        message = user_message(error)
        if message is None:  # a bug
            if WORLD_SIZE == 1:
                raise
            message = traceback.format_exc()  # if raised, run_script would not reach os._exit
        if isinstance(error, BrokenPipeError):
            silence(sys.stdout)  # or Python would complain again at the interpreter's shutdown
        if RANK != 0 or find_known(error) is LOST_CONNECTION:
            # This may only be the consequence of an error in another process. Then torchrun sends
            # SIGTERM during the sleep, and the message below, which would mislead, is not printed.
            time.sleep(3)
        print_error(f"error: {message}")
        return exit_status(error)


def ignore_ends_of_data_workers():
    """Remove torch's handler for the end of a data worker. It raises an error, which would disturb
    the report of an earlier error, or the shutdown."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def silence(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(message):
    try:
        tqdm.write(message, file=sys.stderr)  # below a progress bar, not in its line
    except OSError:  # nobody reads stderr any more; at its shutdown Python would try once more
        silence(sys.stderr)


@functools.cache
def print_once(line):
    """Print `line`, but only the first time: a run loads the same images for each of its loaders,
    and the same weights for each seed."""
    print(line)


def stop_message(args):
    """What was saved before Ctrl-C or SIGTERM, in one sentence."""
    if not Run.resume_point:
        return "stopped"
    # With these flags the same command would start over instead of resuming.
    start_over_flags = []
    if args.fresh and Run.saved_names - {"teacher"}:
        start_over_flags.append("--fresh")
    if getattr(args, "fresh_teacher", False) and "teacher" in Run.saved_names:
        start_over_flags.append("--fresh-teacher")
    command = "the same command"
    if start_over_flags:
        command += f" without {' and '.join(start_over_flags)}"
    return f"stopped {Run.resume_point}; {command} resumes there"


class KnownError(NamedTuple):
    """An error of torch or the system, and what the user can do about it."""
    types: tuple       # of the exception
    substrings: tuple  # of its text, one of which must occur; (): any text
    advice: str        # {reason} stands for the first line of the text
    exit_status: int = 1


SAME_COMMAND = "the same command (without --fresh and --fresh-teacher) resumes"
MEMORY_ADVICE = (
    "there is too little memory; close other programs that use it; in both training scripts, halve "
    "--batch-size and double --accumulate-steps (not with the dist loss), which gives the same "
    "updates except for BatchNorm, or lower --image-size; in evaluate.py, add --no-timing or "
    "--device cpu; if memory is not short (cuDNN reports other failures like this too), train with "
    "another --amp-dtype")
WORKER_ADVICE = (
    "a process that reads images was killed, usually because memory (in a container: /dev/shm) ran "
    "out; lower --num-workers; " + SAME_COMMAND)

LOST_CONNECTION = KnownError(
    (RuntimeError,), ("gloo", "NCCL", "Connection"),
    "the connection between the processes was lost: {reason}; " + SAME_COMMAND)

KNOWN_ERRORS = [  # the first match counts
    KnownError((MemoryError,), (), MEMORY_ADVICE),
    KnownError((Exception,), ("out of memory", "can't allocate memory", "ALLOC_FAILED",
                              "not enough memory", "Cannot allocate memory",
                              "unable to find an engine",         # cuDNN's
                              "WinError 1455"), MEMORY_ADVICE),  # Windows' paging file
    LOST_CONNECTION,
    KnownError((RuntimeError,), ("busy or unavailable",),
               "the GPU is busy or unavailable; nvidia-smi shows which programs use it; --device "
               "cpu trains without it"),
    KnownError((RuntimeError,), ("deterministic",),
               "--deterministic is not possible with this model: {reason}"),
    KnownError((ValueError,), ("more than 1 value per channel",),  # BatchNorm's
               "--batch-size is too small to train with: {reason}", exit_status=2),
    KnownError((BrokenPipeError,), (),
               "the program that reads this script's output has ended; " + SAME_COMMAND),
    KnownError((RuntimeError,), ("no kernel image",),
               "this build of torch does not support this GPU; install one that does "
               "(https://pytorch.org/get-started/locally), or use --device cpu"),
    KnownError((OSError, RuntimeError),
               ("Too many open files", "Resource temporarily unavailable"),
               "the system allows no more processes or open files ({reason}); lower --num-workers"),
    KnownError((ConnectionError, EOFError), (), WORKER_ADVICE),
    KnownError((RuntimeError,), ("DataLoader worker (pid", "shared memory"), WORKER_ADVICE),
]
# OSErrors of a disk or folder (full, write-protected, not a folder, gone), not of the script. Not
# every system has all of these names.
FOLDER_ERROR_NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST",
                      "EISDIR", "ENAMETOOLONG", "EINVAL", "ENOENT", "ENODEV", "EIO", "ESTALE",
                      "ENOLCK")
FOLDER_ERRORS = {getattr(errno, name, None) for name in FOLDER_ERROR_NAMES} - {None}


def user_message(error):
    """One message on what the user can do about `error`; None if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    known = find_known(error)
    if known is not None:
        return known.advice.format(reason=first_line(error))
    if isinstance(error, PermissionError) and error.filename2:  # set by os.replace
        return (f"{error.filename2} cannot be replaced, since another program has it open (Excel, "
                "for example, or a virus scanner); close it there")
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        return (f"{error.filename} cannot be a folder: this path, or a part of it, is a file or a "
                "link that leads nowhere")
    if isinstance(error, OSError) and error.errno in FOLDER_ERRORS:
        return (f"{error.strerror}: {error.filename or 'while writing'}; make room or check "
                "the folder, and run the same command again")
    return None


def find_known(error):
    """The row of KNOWN_ERRORS that fits `error`, or None."""
    text = str(error)
    for known in KNOWN_ERRORS:
        has_text = not known.substrings or any(part in text for part in known.substrings)
        if isinstance(error, known.types) and has_text:
            return known
    return None


def exit_status(error):
    if isinstance(error, UserError):
        return error.exit_status
    known = find_known(error)
    if known is not None:
        return known.exit_status
    return 1


def first_line(error):
    """The first line of the text of `error`, or its type if there is no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# Processes, device and precision ------------------------------------------------------------------

@contextlib.contextmanager
def main_process_first():
    """A decorator: process 0 runs the function first, the others when it has finished. Only process
    0 downloads, locks and writes. If it raises, the others wait until torchrun ends them.
    """
    if RANK != 0:
        dist.barrier()
    yield  # the decorated function runs here
    if WORLD_SIZE > 1 and RANK == 0:
        dist.barrier()


def setup(args):
    """Select and prepare the device, and return it. Raises UsageError if it is not available.

    For training it also sets precision (args.amp_dtype "auto" is replaced by what was chosen), CUDA
    graphs (args.cuda_graph becomes False where they are impossible), determinism and torchrun's
    process group. Evaluation has no such settings: it stays in float32.
    """
    device = select_device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    prepare_memory(device)
    # cuDNN can try several algorithms for each new shape. On an H200 the first epoch takes 20 to
    # 50 s longer, probably because of this. It pays in training, whose shapes stay the same.
    is_training = "amp_dtype" in args  # only the training scripts have this flag
    torch.backends.cudnn.benchmark = is_training
    if device.type == "cuda":
        # By default cuDNN computes float32 convolutions in TF32, with 10 bits of mantissa, and an
        # environment variable (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, set in some containers) can do the
        # same to matrix products. float32 means float32 here, in evaluation and with --amp-dtype
        # fp32. bf16 and fp16 do not change.
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    precision = "fp32"
    if is_training:
        precision = select_precision(args.amp_dtype, device)
        args.amp_dtype = precision
        args.cuda_graph = args.cuda_graph and can_use_cuda_graphs(args, device)
        if args.deterministic:
            use_deterministic_algorithms(device)
        if WORLD_SIZE > 1:
            join_process_group(device)

    line = f"device: {device_name(device)}, {precision}"
    if is_training and args.cuda_graph:
        line += ", CUDA graphs"
    if device.type == "cpu":
        line += "; large images are slow without a GPU (see README.md)"
    print(line)
    return device


def select_device(wanted):
    """The torch.device that `wanted` names: auto, cuda, cuda:1, mps or cpu. Under torchrun each
    process has a GPU of its own."""
    # device_count alone also counts GPUs whose driver is too old for this torch.
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        if num_gpus:
            wanted = "cuda"
        elif has_mps and WORLD_SIZE == 1:
            wanted = "mps"
        else:
            wanted = "cpu"

    device = torch.device(wanted)
    available = {"cuda": num_gpus > (device.index or 0), "mps": has_mps, "cpu": True}
    for_each = ""
    if WORLD_SIZE > 1:
        # Each process takes the GPU of its local rank, so --device cuda:1 is refused.
        available["cuda"] = wanted == "cuda" and num_gpus >= int(TORCHRUN["LOCAL_WORLD_SIZE"])
        available["mps"] = False
        for_each = " for each process"
    if not available[device.type]:
        raise UsageError(f"argument --device: torch finds no {wanted}{for_each} (cuda needs an "
                         "NVIDIA GPU, a recent driver and a CUDA build of torch, mps an Apple GPU)")
    if WORLD_SIZE > 1 and device.type == "cuda":
        device = torch.device("cuda", int(TORCHRUN["LOCAL_RANK"]))
    return device


def can_use_cuda_graphs(args, device):
    """Only on NVIDIA GPUs. A replay overwrites the gradients of the one before, so they cannot
    accumulate. DDP must see each gradient as it is computed, which a replay does not show."""
    return device.type == "cuda" and args.accumulate_steps == 1 and WORLD_SIZE == 1


def prepare_memory(device):
    """Tell the system how to allocate memory, since its default can be slow."""
    if device.type == "cpu":
        reuse_freed_memory()
    if device.type == "cuda" and os.name == "nt":
        # When GPU memory runs out, the Windows driver would use system memory, which is very slow.
        # With this limit torch raises OutOfMemoryError instead.
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free / total)


def reuse_freed_memory():
    """Tell glibc to keep freed blocks above 32 MB. Otherwise each large tensor is mapped anew: a
    training step at 224 px takes 14 % longer, evaluation 50 %."""
    if platform.libc_ver()[0] == "glibc":
        M_MMAP_MAX = -4  # names and numbers are those of malloc.h
        M_TRIM_THRESHOLD = -1
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def select_precision(wanted, device):
    """The precision for --amp-dtype: bf16, fp16 or fp32; for auto the fastest on `device`."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    # Emulated bf16 (GPUs before Ampere) is slower than fp16.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def use_deterministic_algorithms(device):
    if device.type == "mps":
        raise UsageError("argument --deterministic: torch does not guarantee it on Apple GPUs")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
    torch.use_deterministic_algorithms(True)
    # By default the line above also makes torch fill each new tensor: an extra kernel, and only of
    # use in debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def join_process_group(device):
    """Connect torchrun's processes: nccl between GPUs, gloo between CPUs."""
    # While process 0 downloads, waits for a lock or validates, the others wait at a barrier. torch
    # would give up after 10 or 30 minutes; this is in effect no limit.
    timeout = timedelta(days=30)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def autocast(device, args):
    """A context in which torch computes with the precision args.amp_dtype."""
    dtype = DTYPES[args.amp_dtype]
    # No cache of cast weights: a step uses each weight once, and a CUDA graph must not hold it.
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def device_name(device):
    """The device in words: the GPU's name, or the number of CPU threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    if device.type == "mps":
        return "Apple GPU"
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def versions(device):
    """What a model was trained with: the device, and the versions of Python and of packages."""
    found = {"device": device_name(device), "python": platform.python_version(),
             "torch": str(torch.__version__)}
    for package in ("timm", "torchvision", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


# Files --------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(target, mode="w"):
    """Open a temporary file beside `target` for writing (text as UTF-8), and rename it to `target`
    when it is complete, so that nobody ever reads half a file."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # one per process
    text_options = {}
    if "b" not in mode:
        # Paths that are not UTF-8 get replacement characters.
        text_options = {"encoding": "utf-8", "errors": "replace", "newline": ""}
    try:
        with open(unfinished, mode, **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(unfinished, target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a full disk
            error.filename = str(target)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def replace(source, target):
    """Move a file over another, or a folder to a new place. Retry for 4 s, since Windows refuses
    while another program has the file open."""
    for _ in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(0.2)
    os.replace(source, target)


def save_checkpoint(checkpoint, target):
    """Write `checkpoint`, a dict of tensors and plain values, to the file `target`, and
    FORMAT_VERSION with it."""
    # To memory first: if torch wrote to a file itself, it would hide the error of a full disk.
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **checkpoint}, buffer)
    with atomic_write(target, "wb") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path):
    """Load what save_checkpoint wrote, onto the CPU. Raises UserError if it is anything else."""
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not a checkpoint of this project, format {FORMAT_VERSION}")
    return checkpoint


def load_last(path):
    """Load a run's last.pth, onto the CPU. Raises UserError if it is damaged or something else."""
    try:
        saved = load_checkpoint(path)
        if not {"identity", "history", "states"} <= saved.keys():
            raise UserError(f"{path} is not the last.pth of a run")
    except UserError as error:
        raise UserError(f"{error}; move the folder {path.parent} to another place, and the same "
                        "command trains this run again") from None
    return saved


def load_torch_file(path):
    """Load what torch.save wrote, onto the CPU, without running any code in it. Raises UserError if
    the file is missing or damaged, holds code, or would unpack to more than its size."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} (the files of the quick run are in "
                        "checkpoints/quick/)")
    content = io.BytesIO(path.read_bytes())  # read here, so that errors below are not the disk's
    try:
        check_archive(content, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(content, map_location="cpu", weights_only=True)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a damaged file can cause any exception
        # torch.save writes pickles of protocol 2. Operand 149 is of protocol 4 and later, so
        # something else wrote this pickle.
        signs_of_code = ("Unsupported global", "Unsupported operand 149")
        if any(sign in str(error) for sign in signs_of_code):
            raise UserError(
                f"{path} contains code and was refused; none of it was run. If you trust it, load "
                "it yourself and save only its state_dict, for example as .safetensors") from None
        raise UserError(f"{path} is damaged, or not a checkpoint") from None


def check_archive(content, path):
    """Raise an exception for a zip bomb or a wrong checksum, neither of which torch notices.
    Rewinds `content`."""
    if zipfile.is_zipfile(content):
        archive = zipfile.ZipFile(content)
        for part in archive.infolist():
            if part.file_size > part.compress_size:
                raise UserError(f"{path} was refused: it would unpack to more than its own size")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile  # for load_torch_file, which calls the file damaged
    content.seek(0)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# The folder of a run ------------------------------------------------------------------------------

HISTORY_COLUMNS = (
    "epoch", "train_loss", "ce_loss", "distill_loss", "train_accuracy", "val_loss", "val_accuracy",
    "learning_rate", "images_per_second", "seconds", "peak_memory_mb", "entropy", "teacher_entropy",
    "target_entropy", "teacher_accuracy")


class Run:
    """A training run and its folder: best_model.pth, last.pth, and `history`, a dict per finished
    epoch.

    A previous run with the same `identity` is resumed. Any other is moved aside, but only once this
    run has an epoch to save. The constructor locks the folder for as long as the Run exists. It
    reads files but changes none.
    """
    # Shared by all runs of this process, for the message after Ctrl-C (stop_message):
    resume_point = ""    # from where the current run would resume, in words
    saved_names = set()  # names of the runs that have saved an epoch

    def __init__(self, info, identity, args):
        self.info = info
        self.identity = identity
        self.name = info["run"]
        self.title = self.name
        self.num_epochs = args.num_epochs
        self.epochs_of_later_seeds = 0
        if args.seeds:
            self.title = f"{self.name}, seed {args.seed}"
            num_later_seeds = len(args.seeds) - 1 - args.seeds.index(args.seed)
            self.epochs_of_later_seeds = num_later_seeds * args.num_epochs

        self.folder = run_folder(self.name, args)
        self.best_path = self.folder / "best_model.pth"
        self.last_path = self.folder / "last.pth"
        results_dir = Path(args.results_dir)
        if args.seeds:
            results_dir /= self.folder.name  # seed_<n>
        self.history_path = results_dir / f"{self.name}_history.csv"

        self.lock = lock_folder(self.folder)
        previous = {}  # the content of last.pth, if there is one and it is wanted
        if self.last_path.exists() and not args.fresh:
            previous = load_last(self.last_path)
        self.why_not_resumed = self.reason_not_to_resume(previous, args.fresh)
        if self.why_not_resumed:
            previous = {}
        self.history = previous.get("history", [])
        self.saved_states = previous.get("states", {})
        self.first_epoch = len(self.history) + 1  # the first that this process trains

        self.parts = {}  # what `restore` is given, and what is saved with every epoch
        self.epoch_start = time.perf_counter()
        self.has_printed_estimate = False

    @property
    def finished(self):
        return len(self.history) == self.num_epochs

    @property
    def epochs_to_go(self):
        """How many epochs this seed and the later ones still need."""
        return self.num_epochs - len(self.history) + self.epochs_of_later_seeds

    def reason_not_to_resume(self, previous, fresh):
        """Why a previous run in the folder cannot be resumed, in a few words; "" if it can, or if
        there is none. `previous` is the content of its last.pth, or {} if that was not read."""
        files = (self.best_path, self.last_path, self.history_path)
        if not any(file.exists() for file in files):
            return ""
        if fresh:
            return "--fresh"
        if not previous:
            return "unknown settings"  # it has no last.pth

        then = previous["identity"]
        now = self.identity
        changed = [name for name in then | now if then.get(name) != now.get(name)]
        if changed:
            return f"different {', '.join(changed)}"
        if previous["history"] and not self.best_path.exists():
            return "best_model.pth missing"
        return ""

    def tidy_after_a_kill(self):
        """Remove half-written files, and write the history file again, which may be an epoch behind
        last.pth. Makes the folder of the history, so that a wrong one shows before the training."""
        if RANK != 0:
            return
        results_dir = self.history_path.parent
        results_dir.mkdir(parents=True, exist_ok=True)
        for half_written in (*self.folder.glob("*.tmp"),
                             *results_dir.glob(f"{self.history_path.name}.*.tmp")):
            half_written.unlink()
        if self.history:
            self.write_history()

    def restore(self, **parts):
        """Load the previous run's states into `parts`: model, optimizer and so on, each with a
        state_dict, or None. From now on their states are saved with every epoch."""
        self.note_resume_point()  # from here on the run can be interrupted
        self.parts = {name: part for name, part in parts.items() if part is not None}
        for name, state in self.saved_states.items():
            self.parts[name].load_state_dict(state)
        self.saved_states = {}  # frees memory

    def note_resume_point(self):
        """Remember for the message after Ctrl-C which epochs are saved."""
        if self.history:
            Run.resume_point = f"after epoch {len(self.history)} of {self.num_epochs}"
        else:
            Run.resume_point = "before the end of the first epoch"
        Run.resume_point += f" ({self.title})"

    def warn_if_disk_is_short(self, model):
        """Print a warning if the disk has too little room for the files of the run."""
        # best_model.pth holds the weights once. last.pth holds up to four times as much: the
        # weights, their EMA, and AdamW's two moments. While it is replaced, it is there twice.
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        needed = weights + 2 * 4 * weights
        folder = self.folder.absolute().parent  # which exists since it was locked
        free = shutil.disk_usage(folder).free
        if free < needed:
            print(f"warning: the run needs about {needed / 1e6:.0f} MB in {folder}, which has "
                  f"{free / 1e6:.0f} MB free")

    @main_process_first()
    def finish_epoch(self, row, model):
        """Save a finished epoch: `model` as best_model.pth if it is the best so far, last.pth, and
        the history; print it in one line. `row` has a value for each of HISTORY_COLUMNS that was
        measured. Raises UserError if the validation loss is not finite."""
        if RANK != 0:
            self.history.append(row)
            return
        epoch = len(self.history) + 1
        check_finite(row["val_loss"], f"on the validation images after epoch {epoch}")

        now = time.perf_counter()
        seconds = now - self.epoch_start
        self.epoch_start = now
        empty_row = dict.fromkeys(HISTORY_COLUMNS)
        row = empty_row | row | {"epoch": epoch, "seconds": seconds}

        if epoch == 1:
            self.move_previous_run_aside()
            # Mark the run as unfinished. Otherwise a kill after save_best would leave a
            # best_model.pth without a last.pth, and is_finished would return True.
            self.save_last(states={}, history=[])

        previous_best = max((past["val_accuracy"] for past in self.history), default=-1.0)
        is_best = row["val_accuracy"] > previous_best
        if is_best:
            self.save_best(model, row)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.save_last(states, [*self.history, row])
        self.history.append(row)
        Run.saved_names.add(self.name)
        self.note_resume_point()
        self.write_history()
        self.print_epoch(row, is_best)

    def move_previous_run_aside(self):
        """Move the files of a run that is not resumed to the first free <name>.1, <name>.2, ..."""
        if not self.why_not_resumed:
            return
        for i in itertools.count(1):
            aside = self.folder.with_name(f"{self.folder.name}.{i}")
            if not aside.exists():
                break
        aside.mkdir(parents=True)
        moved = f"the previous {self.name} run"
        if not self.best_path.exists() and not self.last_path.exists():
            # A run in another checkpoint folder has the same results folder.
            moved = f"{self.history_path}, of a run that is not in {self.folder},"
        for file in (self.best_path, self.last_path):
            if file.exists():
                shutil.move(file, aside)
        if self.history_path.exists():
            shutil.copy2(self.history_path, aside)
            # On Windows a table that is open in Excel cannot be removed. It will be overwritten as
            # soon as it is closed.
            with contextlib.suppress(PermissionError):
                self.history_path.unlink()
        print(f"{moved} was moved to {aside} ({self.why_not_resumed})")

    def save_best(self, model, row):
        weights = {}
        for name, tensor in model.state_dict().items():
            weights[name] = tensor.cpu().contiguous()  # for other programs, not channels_last
        save_checkpoint({**self.info, "state_dict": weights, "epoch": row["epoch"],
                         "val_accuracy": row["val_accuracy"]}, self.best_path)

    def save_last(self, states, history):
        save_checkpoint({"identity": self.identity, "history": history, "states": states},
                        self.last_path)

    def write_history(self):
        try:
            with atomic_write(self.history_path) as file:
                writer = csv.DictWriter(file, HISTORY_COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.history)
        except PermissionError as error:  # last.pth has the history too
            print(f"warning: {user_message(error)}; it is written again after the next epoch or at "
                  "the next start")

    def print_estimate(self, metrics, steps_per_epoch):
        """Print once how long this seed and the later ones will still take: at the first reading of
        the metrics after 15 s, or at the end of the first epoch."""
        if self.has_printed_estimate:
            return
        is_last_step = metrics.num_steps == steps_per_epoch
        if metrics.elapsed() < 15 and not is_last_step:
            return
        self.has_printed_estimate = True

        epochs_text = f"{self.num_epochs} epochs"
        if self.num_epochs == 1:
            epochs_text = "1 epoch"
        elif self.first_epoch == self.num_epochs:  # resumed
            epochs_text = f"epoch {self.num_epochs}"
        elif self.first_epoch > 1:
            epochs_text = f"epochs {self.first_epoch} to {self.num_epochs}"
        steps_to_go = self.epochs_to_go * steps_per_epoch - metrics.num_steps
        duration = format_duration(steps_to_go * metrics.seconds_per_step())
        scope = " for this and the later seeds" if self.epochs_of_later_seeds else ""
        tqdm.write(f"{self.title}: {epochs_text} of {steps_per_epoch} steps, "
                   f"about {duration} to go{scope}")

    def print_epoch(self, row, is_best):
        """Print the epoch in one line, with a star if it is the best so far, and the time to go for
        this seed and the later ones."""
        train_accuracy = ""
        if row["train_accuracy"] is not None:
            train_accuracy = f"train {row['train_accuracy']:6.2%}  "
        star = "*" if is_best else " "
        to_go = ""
        # Not in the first line: print_estimate has printed it already, and this epoch includes the
        # start-up, on a GPU 20 to 50 s (capturing CUDA graphs, cuDNN's autotuning).
        if self.epochs_to_go and row["epoch"] > self.first_epoch:
            to_go = f", {format_duration(row['seconds'] * self.epochs_to_go)} to go"
        print(f"{self.title} epoch {row['epoch']:>3}/{self.num_epochs}"
              f"  loss {row['train_loss']:.4f}"
              f"  {train_accuracy}val {row['val_accuracy']:6.2%} {star}"
              f"  lr {row['learning_rate']:.1e}  {row['images_per_second']:.0f} images/s"
              f"  {row['seconds']:.0f} s{to_go}", flush=True)


@main_process_first()
def lock_folder(folder):
    """Lock the folder of a run, for all processes of torchrun; see wait_for_lock."""
    if RANK != 0:
        return contextlib.nullcontext()
    return wait_for_lock(folder)


def wait_for_lock(folder):
    """Lock `folder`; wait if another process holds the lock. Returns a context manager that
    releases it. So does the end of the last reference to it. A process can take it repeatedly."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that is using {folder}", flush=True)
        return lock.acquire()


def run_folder(name, args):
    """checkpoints/<name>/, or below it seed_<n>/ for a student of several seeds."""
    folder = Path(args.checkpoint_dir, name)
    if args.seeds:
        folder /= f"seed_{args.seed}"
    return folder


def is_finished(folder):
    """Whether the run in `folder` is finished. A best_model.pth without last.pth was put there by
    hand, and counts as finished."""
    if not (folder / "best_model.pth").is_file():
        return False
    last_path = folder / "last.pth"
    if not last_path.is_file():
        return True
    saved = load_last(last_path)
    return len(saved["history"]) == saved["identity"]["num_epochs"]


# The metrics of an epoch --------------------------------------------------------------------------

class EpochMetrics:
    """Means over the steps of an epoch, and its speed. The sums stay on the device: `add` does not
    synchronise with it, reading the means does."""
    def __init__(self, batch_size, device):
        self.batch_size = batch_size
        self.device = device
        # The keys are the names given in one call of `add`, as a tuple.
        self.sums = {}    # tensors (number of names,)
        self.counts = {}  # numbers of such calls
        self.num_steps = 0
        self.start = time.perf_counter()
        self.first_step_end = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add(self, **values):
        """Add 0-d tensors that a step measured, named as in HISTORY_COLUMNS. A call launches two
        kernels, however many values it has. The call with train_loss counts the step."""
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if WORLD_SIZE > 1:
            stacked /= WORLD_SIZE
            dist.all_reduce(stacked)  # to the mean over the processes, in place
        if names not in self.sums:
            self.sums[names] = torch.zeros_like(stacked)
            self.counts[names] = 0
        self.sums[names] += stacked
        self.counts[names] += 1

        if "train_loss" in values:
            self.num_steps += 1
            if self.num_steps == 1:
                self.first_step_end = time.perf_counter()

    def means(self):
        """The mean of every value so far, floats by name."""
        means = {}
        for names, total in self.sums.items():
            mean = (total / self.counts[names]).tolist()
            means |= dict(zip(names, mean, strict=True))
        return means

    def elapsed(self):
        return time.perf_counter() - self.start

    def seconds_per_step(self):
        """Mean over all steps but the first, in which cuDNN tries kernels and workers start."""
        if self.num_steps == 1:
            return self.elapsed()
        return (time.perf_counter() - self.first_step_end) / (self.num_steps - 1)

    def row(self):
        """The epoch's row of the history, without validation and learning rate. nan (the accuracy
        under mixup) becomes None."""
        row = {}
        for name, mean in self.means().items():
            row[name] = None if math.isnan(mean) else mean
        row["images_per_second"] = self.num_steps * self.batch_size / self.elapsed()
        if self.device.type == "cuda":
            row["peak_memory_mb"] = round(torch.cuda.max_memory_reserved() / 2**20)
        return row

    def progress_text(self):
        """Loss, accuracy, speed and GPU memory so far, for the progress bar."""
        row = self.row()
        texts = [f"loss {row['train_loss']:.2f}"]
        if row["train_accuracy"] is not None:
            texts.append(f"acc {row['train_accuracy']:.0%}")
        texts.append(f"{row['images_per_second']:.0f} images/s")
        if self.device.type == "cuda":
            texts.append(f"{torch.cuda.memory_reserved() / 2**30:.1f} GB")
        return ", ".join(texts)


# Progress and divergence --------------------------------------------------------------------------

def progress_bar(batches, total, epoch):
    """`batches` with a progress bar that is removed at the end."""
    disable = None  # to tqdm this means: disabled unless stderr is a terminal
    if RANK != 0:
        disable = True
    # Without tqdm's own speed, steps per second, the line fits into 80 characters.
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [<{remaining}{postfix}]"
    return tqdm(batches, total=total, desc=f"epoch {epoch + 1}", leave=False, disable=disable,
                bar_format=bar_format)


def format_duration(seconds):
    """A duration in words: '45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def check_finite(loss, where):
    """Raise UserError if `loss`, a float, is not finite; `where` names the step or epoch."""
    if not math.isfinite(loss):
        raise divergence_error(f"the loss is not finite {where}")


def check_scale(scaler, where):
    """Raise UserError if fp16's GradScaler fell below 1: gradients overflow at any scale."""
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise divergence_error(f"the gradient overflows in fp16 {where}")


def divergence_error(what):
    return UserError(f"training diverged: {what}; try a lower --learning-rate, a longer "
                     "--warmup-epochs or --amp-dtype fp32")
