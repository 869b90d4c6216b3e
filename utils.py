"""What every script needs: errors, start and end, processes, device, files, a run, its meter.
Nothing here builds a model or runs a loop."""
import contextlib
import csv
import ctypes
import errno
import hashlib
import importlib.metadata
import io
import itertools
import math
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from tqdm import tqdm

FORMAT_VERSION = 4  # of every checkpoint; raised when an older reader could misread a new one
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
STOPPED = "stopped; whole epochs are saved: the same command, without --fresh, goes on after them"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # AMP_DTYPE's

# Errors, start and end of a script, its processes -------------------------------------------------

class UserError(Exception):
    """Something a person can put right; its text is the one message they see."""
    code = 1  # exit status


class UsageError(UserError):
    """Settings that cannot work, found before any work."""
    code = 2


def run_script(main, args):
    """Call `main(args)`; return the exit status: 0, or 1 or 2 with one message. A signal ends it
    with 130 or 143. Of torchrun's processes the first to fail says why, and all end."""
    if RANK:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # process 0 alone prints
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a class name the terminal cannot show stops nothing
    end_at_signals(STOPPED if hasattr(args, "fresh") else "stopped")
    try:
        main(args)
        sys.stdout.flush()  # here, where a broken pipe has its message
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        return 0
    except Exception as error:
        if not (known := user_message(error, args)):
            raise
        say_last(f"error: {known}")
        if WORLD_SIZE > 1:
            os._exit(1)  # torchrun's own status; at an orderly end NCCL could wait for the others
        return getattr(known, "code", 1)


def end_at_signals(message):
    """From now on Ctrl-C and SIGTERM end the script with `message`; its files are moved into place
    whole. A thread does it, since the main one hears nothing while it waits for a GPU."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    def end(held=writer):  # or it would be closed
        while number := reader.recv(1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):  # others tell DataLoader of its workers
                say_last(message)
                os._exit(128 + number)
    threading.Thread(target=end, daemon=True).start()
    signal.set_wakeup_fd(writer.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun's process 0 speaks for all
        signal.signal(number, signal.SIG_DFL if RANK else lambda *_: None)


def say_last(message):
    """Print to stderr, of torchrun's processes only the first that comes here."""
    with contextlib.suppress(RuntimeError):  # torchrun itself may be gone
        if WORLD_SIZE > 1:
            store = dist.TCPStore(TORCHRUN["MASTER_ADDR"], int(TORCHRUN["MASTER_PORT"]),
                                  is_master=False, timeout=timedelta(seconds=10))
            if store.add(f"ended {TORCHRUN['TORCHELASTIC_RESTART_COUNT']}", 1) > 1:
                return
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        with contextlib.suppress(OSError):  # nobody may listen any more
            print(text, end="", file=stream, flush=True)


NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "not enough memory",
             "unable to find an engine", "WinError 1455")  # cuDNN's; Windows' paging file
BAD_FOLDER = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
              errno.EISDIR, errno.ENAMETOOLONG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def user_message(error, args):
    """A UserError or a sentence on what a person can put right of an `error`, else None."""
    text = str(error)
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return ("there is too little memory; close what else uses it, or halve --batch-size and "
                "double --accumulate-steps, which makes the same updates but for BatchNorm, or "
                "lower --image-size; where memory is not short, try another --amp-dtype")
    if WORLD_SIZE > 1 and any(sign in text for sign in ("gloo", "NCCL", "Connection")):
        return f"the processes lost each other: {first_line(error)}; the same command goes on"
    if "deterministic" in text:
        return f"--deterministic is not possible with this model: {first_line(error)}"
    if "more than 1 value per channel" in text:  # BatchNorm's
        return UsageError(f"--batch-size {args.batch_size} cannot be trained with: {text}")
    if isinstance(error, BrokenPipeError):  # of `| head`, say; Python would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "what read this script's output has gone away; the same command goes on"
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in text:
        return ("a process that reads pictures was killed, mostly for want of memory or, in a "
                "container, of /dev/shm; lower --num-workers, and the same command goes on")
    if isinstance(error, PermissionError) and error.filename2:  # of `replace`
        return (f"{error.filename2} cannot be replaced, since another program has it open (Excel, "
                "say, or a virus scanner); close it there")
    if isinstance(error, OSError) and error.errno in BAD_FOLDER:
        return (f"{error.strerror}: {error.filename or 'while writing'}; make room or choose other "
                "folders, and the same command goes on from what was saved last")
    return None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def format_duration(seconds):
    """Seconds as a person says them: '45 s', '12 min', '3.4 h'."""
    return (f"{seconds:.0f} s" if seconds < 90 else
            f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h")


@contextlib.contextmanager
def main_process_first():
    """As a decorator: process 0, which alone downloads, locks and writes, goes first."""
    if RANK:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and not RANK:
        dist.barrier()


# Device and precision -----------------------------------------------------------------------------

def setup(args):
    """Make ready what computes: the device, which is returned, precision (args.amp_dtype "auto" is
    replaced), determinism, torchrun's group. UsageError where the device asked for is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    alone = WORLD_SIZE == 1  # else each of torchrun's processes has a GPU of its own
    kind = next(kind for kind in there if there[kind]) if args.device == "auto" else args.device
    device = torch.device(kind if alone or kind != "cuda" else f"cuda:{TORCHRUN['LOCAL_RANK']}")
    name = device.type
    needed = (device.index or 0) + 1 if alone else int(TORCHRUN["LOCAL_WORLD_SIZE"])
    if name != "cpu" and (there[name] < needed or not alone and kind != "cuda"):
        raise UsageError(f"argument --device: torch has no {kind} here{'' if alone else ' for each'} "
                       "(cuda needs an NVIDIA GPU and a CUDA build of torch, mps an Apple GPU)")
    if getattr(args, "amp_dtype", "fp32") == "auto":
        # Emulated bf16 (GPUs before Ampere) is slower than fp16, and both than fp32 elsewhere.
        native = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp_dtype = "bf16" if native else "fp16" if name == "cuda" else "fp32"
    if getattr(args, "cuda_graph", False) and name != "cuda":
        raise UsageError("argument --cuda-graph: needs an NVIDIA GPU")
    if getattr(args, "deterministic", False):
        if name == "mps":
            raise UsageError("argument --deterministic: torch promises no such runs on Apple GPUs")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    elif name == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay, but for a last batch
    if device.index:
        torch.cuda.set_device(device)
    if name == "cuda" and os.name == "nt":  # its driver would spill into system memory, and crawl
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free / total)
    if name == "cpu":
        reuse_freed_memory()
    if not alone:
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(days=9),
                                device_id=device if name == "cuda" else None)
    slow = "; without a GPU large images take long (see README)" if name == "cpu" else ""
    print(f"device: {device_name(device)}, {getattr(args, 'amp_dtype', 'fp32')}{slow}")
    return device


def autocast(device, args):
    """The precision to compute in, args.amp_dtype, as a context."""
    dtype = DTYPES[args.amp_dtype]  # no cache: a step uses each weight once; a graph forbids it
    return torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=False)


def reuse_freed_memory():
    """Tell glibc to keep freed blocks above 32 MB, which it would get anew from the system for each
    tensor: a step at 224 px would take a seventh longer, evaluation half as long again."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def device_name(device):
    """What a person calls the device: the GPU's name, or the number of CPU threads in use."""
    return (torch.cuda.get_device_name() if device.type == "cuda" else
            "Apple GPU" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads")


def versions(device):
    """What a model was trained with: the device, Python, torch and packages."""
    packages = {name: importlib.metadata.version(name) for name in ("timm", "torchvision", "numpy")}
    return {"device": device_name(device), "python": platform.python_version(),
            "torch": str(torch.__version__), **packages}


# Files --------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(target, mode="w"):
    """Open a file beside `target` to write (text as UTF-8) and move it there when it is whole."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # another process has its own
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(beside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def replace(source, target):
    """Move a file over another, for some seconds again where Windows has that refused."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    return os.replace(source, target)


def save_checkpoint(checkpoint, target):
    """Write a checkpoint into place; through memory, since torch hides a full disk's own error."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **checkpoint}, buffer)
    with atomic_write(target, "wb") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(target):
    """Load a checkpoint onto the CPU without running any code it may carry, or raise UserError."""
    target = Path(target)
    if not target.is_file():
        raise UserError(f"there is no file {target} (the quick run's are in checkpoints/quick/)")
    content = io.BytesIO(target.read_bytes())  # what fails from here on is the content's fault
    try:
        if zipfile.is_zipfile(content):
            archive = zipfile.ZipFile(content)
            if any(part.file_size > part.compress_size for part in archive.infolist()):
                raise UserError(f"{target} was refused: unpacked it would be larger than the file")
            if archive.testzip():  # torch does not look at checksums
                raise zipfile.BadZipFile
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # damage takes any form
        # Operand 149 opens a pickle of protocol 4 and later, which torch does not write.
        if any(f"Unsupported {sign}" in str(error) for sign in ("global", "operand 149")):
            raise UserError(f"{target} carries code and was refused; none of it was run") from None
        raise UserError(f"{target} is damaged, or no checkpoint at all") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{target} is no checkpoint of this project, format {FORMAT_VERSION}")
    return checkpoint


def sha256(target):
    return hashlib.sha256(Path(target).read_bytes()).hexdigest()


# A run's folder -----------------------------------------------------------------------------------

HISTORY_COLUMNS = ("epoch", "train_loss", "ce_loss", "kd_loss", "train_accuracy", "val_loss",
           "val_accuracy", "learning_rate", "images_per_second", "seconds", "peak_memory_mb",
           "entropy", "teacher_entropy", "target_entropy", "teacher_accuracy")


class Run:
    """One training: its folder with best_model.pth and last.pth, and `history`, a dict for each
    whole epoch. A former run with the same `identity` is gone on with; another one is moved aside,
    but not before this one has an epoch to save. While a Run lives no other can train there."""
    def __init__(self, info, identity, args):
        self.info, self.identity, self.name = info, identity, info["run"]
        self.num_epochs, self.folder = args.num_epochs, run_folder(self.name, args)
        self.best_path, self.last_path = self.folder / "best_model.pth", self.folder / "last.pth"
        results = Path(args.results_dir, self.folder.name if args.seeds else "")
        self.history_file = results / f"{self.name}_history.csv"
        self.lock = lock_folder(self.folder)
        former = load_checkpoint(self.last_path) if self.last_path.exists() and not args.fresh else {}
        self.why_not_resumed = self.reason_not_to_resume(former, args.fresh)
        kept = {} if self.why_not_resumed else former
        self.history, self.states = kept.get("history", []), kept.get("states", {})
        self.parts, self.estimated, self.since = {}, False, time.perf_counter()
        for half in (*self.folder.glob("*.tmp"), *results.glob(f"{self.name}_history.csv.*.tmp")):
            RANK or half.unlink()  # a kill has left it
        if self.history and not RANK:
            self.write_history()  # an epoch's last file, and a kill may have come before it
        self.finished = len(self.history) == self.num_epochs
        if self.finished:
            print(f"{self.name}: already trained with these settings; --fresh trains it anew")

    def reason_not_to_resume(self, former, fresh):
        """Why the folder's `former` run cannot be gone on with, in a few words; "" where it can."""
        if not former:
            there = any(map(Path.exists, (self.best_path, self.last_path, self.history_file)))
            return "" if not there else "--fresh" if fresh else "of unknown settings"
        before, now = former["identity"], self.identity
        if other := [name for name in before | now if before.get(name) != now.get(name)]:
            return f"other {', '.join(other)}"
        return "best_model.pth gone" if former["history"] and not self.best_path.exists() else ""

    def restore(self, **parts):
        """Set these `parts` (with a state_dict, or None) to a former run's; epochs save them."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        for name in self.states:
            self.parts[name].load_state_dict(self.states[name])
        self.states = {}

    @main_process_first()
    def finish_epoch(self, row, model):
        """Save a whole epoch: best_model.pth of `model` if it is the best, last.pth, the history.
        `row` has what was measured of HISTORY_COLUMNS. Raises UserError where its loss is not finite."""
        if RANK:
            self.history.append(row)
            return
        now, epoch = time.perf_counter(), len(self.history) + 1
        if not math.isfinite(row["val_loss"]):
            raise diverged(f"on the validation images after epoch {epoch}")
        row = dict.fromkeys(HISTORY_COLUMNS) | row | {"epoch": epoch, "seconds": now - self.since}
        self.since = now
        if not self.history:
            self.move_previous_run_aside()
        best = all(row["val_accuracy"] > former["val_accuracy"] for former in self.history)
        self.history.append(row)
        if best:
            weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
            kept = {"state_dict": weights, "epoch": epoch, "val_accuracy": row["val_accuracy"]}
            save_checkpoint({**self.info, **kept}, self.best_path)
        self.save_last({name: part.state_dict() for name, part in self.parts.items()})
        self.write_history()
        self.print_epoch(row, best)

    def move_previous_run_aside(self):
        """Move what another run left aside, and say where."""
        if self.why_not_resumed:
            beside = (self.folder.with_name(f"{self.folder.name}.{i}") for i in itertools.count(1))
            aside = next(path for path in beside if not path.exists())
            aside.mkdir(parents=True)
            for file in filter(Path.exists, (self.best_path, self.last_path, self.history_file)):
                shutil.move(file, aside)
            print(f"the former {self.name} run ({self.why_not_resumed}) is now in {aside}")
        self.save_last({})  # a best_model.pth without would be taken for one put there by hand

    def save_last(self, states):
        save_checkpoint({"identity": self.identity, "history": self.history, "states": states}, self.last_path)

    def write_history(self):
        try:
            with atomic_write(self.history_file) as file:
                writer = csv.DictWriter(file, HISTORY_COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.history)
        except PermissionError as error:  # last.pth has it too
            print(f"warning: {user_message(error, None)}; the next epoch or start writes it again")

    def print_epoch(self, row, best):
        """The epoch in one line, a star where it is the best so far, and the time left."""
        accuracy, left = row["train_accuracy"], self.num_epochs - row["epoch"]
        train = "" if accuracy is None else f"train {accuracy:6.2%}  "
        to_go = f", {format_duration(row['seconds'] * left)} to go" if left else ""
        print(f"{self.name} epoch {row['epoch']:>3}/{self.num_epochs}  loss {row['train_loss']:.4f}"
              f"  {train}val {row['val_accuracy']:6.2%}{' *' if best else '  '}"
              f"  lr {row['learning_rate']:.1e}  {row['images_per_second']:.0f} images/s"
              f"  {row['seconds']:.0f} s{to_go}", flush=True)


@main_process_first()
def lock_folder(folder):
    """Keep other processes out of a run's folder while what is returned lives; wait for one."""
    if RANK:
        return contextlib.nullcontext()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.lock")
    lock = filelock.FileLock(beside, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process, which is at work in {folder}", flush=True)
        lock.acquire()
    return lock


def run_folder(name, args):
    """checkpoints/<name>/, or below it seed_<n>/ for a student of several seeds."""
    folder = Path(args.checkpoint_dir, name)
    return folder / f"seed_{args.seed}" if args.seeds else folder


# A run's meter ------------------------------------------------------------------------------------

class EpochMetrics:
    """What an epoch of `run` measures: sums that stay on the device, a clock, a progress bar."""
    def __init__(self, run, loader):
        self.run, self.loader, self.sums, self.steps = run, loader, {}, 0
        self.learning_rate, self.on_gpu = None, loader.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.start = self.first = time.perf_counter()

    def watch(self, batches):
        """Yield `batches` behind a progress bar, and look at the sums a few times a second, which
        waits for the device, or every five seconds without a bar, so that divergence is seen."""
        looked, epoch = self.start, len(self.run.history) + 1
        with tqdm(total=len(self.loader), desc=f"epoch {epoch}", leave=False,
                  disable=True if RANK else None) as bar:
            for batch in batches:
                self.learning_rate = self.run.parts["optimizer"].param_groups[0]["lr"]
                yield batch
                self.steps += 1
                bar.update()
                now = time.perf_counter()
                if self.steps == 1:
                    self.first = now
                elif now - looked > (5 if bar.disable else 0.3):
                    looked = now
                    bar.set_postfix_str(self.look(), refresh=False)
                    if now - self.start > 15 and not self.run.estimated:
                        self.estimate(now)

    def add(self, **values):
        """Add what a step measured, 0-d tensors by column of HISTORY_COLUMNS; two kernels a call."""
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if WORLD_SIZE > 1:
            dist.all_reduce(stacked.div_(WORLD_SIZE))
        total, count = self.sums.get(names, (torch.zeros_like(stacked), 0))
        self.sums[names] = total + stacked, count + 1

    def means(self):
        """The mean of each column so far, and images a second. UserError where it diverged."""
        means, scaler = {}, self.run.parts["scaler"]
        for names, (total, count) in self.sums.items():
            means |= zip(names, (total / count).tolist(), strict=True)
        overflows = scaler.is_enabled() and scaler.get_scale() < 1
        if overflows or not math.isfinite(means["train_loss"]):
            raise diverged(f"by step {self.steps} of epoch {len(self.run.history) + 1}, learning "
                           f"rate {self.learning_rate:.2e}{', fp16' if overflows else ''}")
        elapsed = time.perf_counter() - self.start
        return means | {"images_per_second": self.steps * self.loader.batch_size / elapsed}

    def look(self):
        means = self.means()
        right, speed = means["train_accuracy"], f"{means['images_per_second']:.0f} images/s"
        memory = f", {torch.cuda.memory_reserved() / 2**30:.1f} GB" if self.on_gpu else ""
        accuracy = "" if math.isnan(right) else f"acc {right:.1%}, "
        return f"loss {means['train_loss']:.3f}, {accuracy}{speed}{memory}"

    def estimate(self, now):
        """Say how long the run will take, by all batches but the first, as a GPU tries kernels."""
        run, batches = self.run, len(self.loader)
        run.estimated, epochs = True, run.num_epochs - len(run.history)
        left = (epochs * batches - self.steps) * (now - self.first) / (self.steps - 1)
        tqdm.write(f"{run.name}: {epochs} epochs of {batches} steps, about {format_duration(left)} to go")

    def row(self):
        """The epoch's row of the history but for validation. Raises UserError as `means` does."""
        row = {name: None if math.isnan(mean) else mean for name, mean in self.means().items()}
        row["learning_rate"] = self.learning_rate
        if self.on_gpu:
            row["peak_memory_mb"] = round(torch.cuda.max_memory_reserved() / 2**20)
        return row


def diverged(where):
    """The error of a run whose loss is no longer finite."""
    return UserError(f"training diverged: the loss is not finite {where}; try a lower "
                     "--learning-rate, a longer --warmup-epochs or --amp-dtype fp32")
