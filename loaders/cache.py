"""The local cache of what lies in a store: blocks of some MiB, fetched once per machine, ahead of their use.

A block is a range of bytes of a file in a store. `hold` gives it as a local file that is open: of the cache folder,
which all processes of a machine share and which keeps what was fetched for the next epoch and the next run; or, where
that is full, gone or not wanted, in memory for a while (streaming). `ahead` says what will be asked for, and in which
order; threads fetch it before that.

The cache is bounded as a whole. Of data sets larger than that, a fixed part of the blocks (four fifths of the bound) is
kept for good and the others take turns: of a random order, the least recently used are just those that come next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import resource
import tempfile
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from fastssl.config import redacted
from fastssl.loaders.ahead import halted
from fastssl.loaders.store import StoreError, StoreFile, base, shown, timeout

log = logging.getLogger(__name__)

BLOCK = 8 << 20  # bytes: smaller pages are fetched together
GIGABYTES = 50.0  # of the cache, unless data.cache_gb or FASTSSL_CACHE_GB says otherwise
FREE = 0.05  # of its disk, stays free
KEPT = 0.8  # of the bound, for blocks that stay, where a data set is larger than it
THREADS = 16  # that fetch
AHEAD = 512 << 20  # bytes fetched before their use: a window of 64 pages
MEMORY = 5 * AHEAD // 2  # bytes of streamed blocks: the window in use, the next one, and some more
FILES = 1 << 16  # that may be open, where the system allows so many
FOLDER = "fastssl-blocks"  # below the cache's folder: all else there may be the user's
_PARTIAL, _STAYS = ".partial", "table-"
_OURS = re.compile(r"((table-)?\d+-\d+|[0-9a-f]{24}|table-index\.npz)(\.[0-9a-f]{32})?(\.partial)?")
_CRC = 4  # bytes behind a block on the disk: a crash may leave it with its size and without its content


@dataclass(frozen=True)
class Block:
    """A range of bytes of a file in a store, and its name in the cache.

    Attributes:
        file: where it lies.
        begin, end: its bytes.
        folder, name: below the cache's folder; an empty folder: not to be kept, as nothing tells the file's versions.
    """

    file: StoreFile
    begin: int
    end: int
    folder: str
    name: str

    @property
    def size(self) -> int:
        return self.end - self.begin


class Held:
    """An open local file with the bytes of a block, from its first byte on; closed when this object goes."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size, self._owner = fd, size, _Owner(fd)

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        return os.pread(self.fd, (self.size if end is None else end) - begin, begin)


class _Owner:
    """Closes a file. An object of its own: weak references to a `Held` are gone before this goes, so that nobody gets
    one whose file is closed (of an object with `__del__` itself they go after it)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        with contextlib.suppress(OSError, TypeError):  # TypeError: the interpreter is ending
            os.close(self._fd)


class Blocks:
    """A file in a store as blocks, one after the other.

    Args:
        file: the file.
        bounds: int64 [K + 1], where the blocks begin, and where the last one ends.
    """

    def __init__(self, file: StoreFile, bounds: np.ndarray) -> None:
        self.file, self.bounds = file, bounds
        self.folder = folder_of(file)
        _here().register(self.folder, int(bounds[-1] - bounds[0]))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def at(self, begin: np.ndarray) -> np.ndarray:
        """The numbers of the blocks that bytes lie in, int64 like `begin`; of bytes outside, the first or the last."""
        found = self.bounds.searchsorted(begin.astype(np.int64), "right") - 1
        return np.clip(found, 0, len(self) - 1)

    def block(self, number: int) -> Block:
        begin, end = int(self.bounds[number]), int(self.bounds[number + 1])
        return piece(self.file, begin, end, self.folder)

    def places(
        self, begin: np.ndarray, size: np.ndarray, good: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, list[Held]]:
        """Bytes as compiled code reads them: open files int64 [B], where in these int64 [B], and what keeps them open.
        A file is -1 where `good` does not hold, and where the bytes do not lie in one block.

        Args:
            begin, size: [B], which bytes.
            good: bool [B], which of them to look up; None: all.
        """
        begin = begin.astype(np.int64)
        number = self.at(begin)
        inside = (begin >= self.bounds[number]) & (begin + size.astype(np.int64) <= self.bounds[number + 1])
        good = inside if good is None else good & inside
        files, wanted = np.full(len(begin), -1, np.int64), np.unique(number[good])
        held = hold([self.block(k) for k in wanted.tolist()])
        if held:
            opened = np.array([one.fd for one in held], np.int64)
            files[good] = opened[wanted.searchsorted(number[good])]
        return files, begin - self.bounds[number], held

    def read(self, begin: int, end: int) -> bytes:
        """Some bytes: from blocks that are here or on their way, or else by a request for just these."""
        first, last = self.at(np.array([begin, max(begin, end - 1)])).tolist()
        if begin < self.bounds[0] or end > self.bounds[-1]:
            return self.file.read(begin, end)
        found = []
        for number in range(first, last + 1):
            block = self.block(number)
            held = _here().present(block)
            if held is None and not _here().expected(block):
                return self.file.read(begin, end)
            if held is None:
                (held,) = hold([block])
            else:
                _here().used([block])
            found.append(held.read(max(begin, block.begin) - block.begin, min(end, block.end) - block.begin))
        return b"".join(found)


def bounds(begin: int, end: int, unit: int) -> np.ndarray:
    """Bounds of blocks of a file from byte `begin` to `end`: whole units (pages), and at least BLOCK bytes."""
    step = unit * max(1, BLOCK // unit)
    inner = np.arange((begin // step + 1) * step, end, step, dtype=np.int64)
    return np.concatenate([[begin], inner, [end]]).astype(np.int64) if end > begin else np.array([begin, begin])


def folder_of(file: StoreFile) -> str:
    """Where a file's blocks lie in the cache; empty where nothing tells this version of it from another one."""
    if not file.etag:
        return ""
    # A query may say which file is meant, or only who may read it: with an ETag, the latter does no harm.
    url = redacted(file.url) if file.etag.startswith('"') else file.url
    facts = f"{url}\n{file.size}\n{file.etag}"
    return _folder_name(url, facts)


def _folder_name(url: str, facts: str) -> str:
    digest = hashlib.sha256(facts.encode(errors="surrogateescape")).hexdigest()
    return f"{base(redacted(url))[:60]}-{digest[:16]}"


def folder_for(url: str) -> str:
    """Where the files of a folder in a store lie in the cache, each as one block."""
    return _folder_name(url, redacted(url))


def register(folder: str, size: int) -> None:
    """Says that this process reads a data set of so many bytes, which lies in this folder of the cache."""
    _here().register(folder, size)


def piece(file: StoreFile, begin: int, end: int, folder: str | None = None) -> Block:
    """A range of bytes as a block."""
    return Block(file, begin, end, folder_of(file) if folder is None else folder, f"{begin}-{end}")


def kept(file: StoreFile, begin: int, end: int) -> bytes:
    """Some bytes of a file that every start needs (tables, side files), through the cache. Raises StoreError."""
    block = Block(file, begin, end, folder_of(file), f"{_STAYS}{begin}-{end}")
    return hold([block])[0].read() if end > begin else b""


def forget(block: Block) -> None:
    """Removes a block, which is damaged perhaps, so that it is fetched again."""
    _here().forget(block)


def forget_file(file: StoreFile) -> bool:
    """Removes all of a file's blocks; whether there were any."""
    return _here().forget_folder(folder_of(file))


def allow_files() -> None:
    """Lets this process open as many files as the system allows it: shards, and the blocks of a batch, are hundreds."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, min(most, FILES)), most))


def hold(blocks: Sequence[Block]) -> list[Held]:
    """Blocks as open local files, fetched where they are not here, several at a time.

    Raises:
        StoreError: one of them cannot be fetched.
        RuntimeError: the loader that this thread works for was closed meanwhile.
    """
    return _here().hold(blocks)


def ahead(count: int, block: Callable[[int], Block]) -> Reading:
    """Has `count` blocks fetched in the order of their use, before it. Close it when they are of no more use."""
    return _here().ahead(count, block)


def use(folder: str, gigabytes: float | None = None) -> None:
    """Sets this process's cache: a folder, 'none', or empty for FASTSSL_CACHE or ~/.cache/fastssl; and its bound.

    Raises:
        StoreError: FASTSSL_CACHE_GB is no number.
    """
    global _manager
    disk = _choose(folder, gigabytes)
    with _making:
        old = _manager.disk if _manager else None
        if not _manager or (old and (old.folder, old.bound)) != (disk and (disk.folder, disk.bound)):
            if _manager:
                _manager.end()
            _manager = _Manager(disk)


def folder() -> str:
    """The cache's folder; empty where there is none."""
    disk = _here().disk
    return str(disk.folder) if disk else ""


def described() -> str:
    """This process's cache in words, after 'data from a store'."""
    disk = _here().disk
    if not disk:
        return "kept nowhere (data.cache none) and fetched again in every epoch"
    return f"kept in {shown(str(disk.folder))} (at most {disk.bound / 1e9:g} GB)"


def default_folder() -> str:
    """The cache's folder unless `use` names another; empty where FASTSSL_CACHE is none."""
    named = os.environ.get("FASTSSL_CACHE", "") or os.path.join("~", ".cache", "fastssl")
    return "" if named == "none" else os.path.expanduser(named)


# -- fetching ---------------------------------------------------------------------------------------------------------


class Reading:
    """The blocks of one pass, in the order of their first use."""

    def __init__(self, count: int, block: Callable[[int], Block], close: Callable[[Reading], None]) -> None:
        self._count, self._block, self._close = count, block, close
        self._next = self._bytes = 0
        self._waiting: dict[tuple[str, str], int] = {}  # fetched or being fetched, not used yet: bytes
        self._early: set[tuple[str, str]] = set()  # used before it was their turn

    def take(self) -> Block | None:
        """The next one to fetch; None while enough are here that nobody has used yet."""
        while self._next < self._count and self._bytes < AHEAD:
            block = self._block(self._next)
            self._next += 1
            if _id(block) in self._early:
                self._early.discard(_id(block))
                continue
            self._waiting[_id(block)] = block.size
            self._bytes += block.size
            return block
        return None

    def used(self, block: Block) -> bool:
        """Notes that a block is in use; whether that makes room for others."""
        size = self._waiting.pop(_id(block), None)
        if size is None:
            if self._next < self._count:
                self._early.add(_id(block))
            return False
        self._bytes -= size
        return True

    def expects(self, block: Block) -> bool:
        return self._next < self._count or _id(block) in self._waiting

    def close(self) -> None:
        """Fetch no more of it."""
        self._close(self)


class _Job:
    def __init__(self, block: Block) -> None:
        self.block, self.wanted = block, False
        self.held: Held | None = None
        self.error: BaseException | None = None
        self.done = False


def _id(block: Block) -> tuple[str, str]:
    return block.folder or block.file.url, block.name


class _Manager:
    """This process's threads, what they fetch, and what is streamed."""

    def __init__(self, disk: _Disk | None) -> None:
        self.disk = disk
        self._changed = threading.Condition()
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._urgent: deque[_Job] = deque()
        self._readings: list[Reading] = []
        self._failed: dict[tuple[str, str], BaseException] = {}
        self._memory: OrderedDict[tuple[str, str], Held] = OrderedDict()
        self._open: WeakValueDictionary[tuple[str, str], Held] = WeakValueDictionary()  # on the disk, and in use
        self._bytes = self._threads = self._idle = 0
        self._ended = self._unnamed = False
        allow_files()

    def end(self) -> None:
        """Reads no more ahead, and lets the threads end when nobody waits for them."""
        with self._changed:
            self._ended, self._bytes = True, 0
            self._readings.clear()
            self._memory.clear()
            self._changed.notify_all()

    def register(self, folder: str, size: int) -> None:
        if self.disk and folder:
            self.disk.register(folder, size)
        elif self.disk and not self._unnamed:
            self._unnamed = True
            log.warning("the store tells no version of its files: they are not kept in the cache but fetched each time")

    def present(self, block: Block) -> Held | None:
        with self._changed:
            if (held := self._memory.get(_id(block))) is not None:
                self._memory.move_to_end(_id(block))
                return held
            if (held := self._open.get(_id(block))) is not None:
                return held
        held = self.disk.open(block) if self.disk and block.folder else None
        if held is not None:
            with self._changed:
                held = self._open.setdefault(_id(block), held)
        return held

    def expected(self, block: Block) -> bool:
        with self._changed:
            return _id(block) in self._jobs or any(reading.expects(block) for reading in self._readings)

    def forget(self, block: Block) -> None:
        with self._changed:
            if (held := self._memory.pop(_id(block), None)) is not None:
                self._bytes -= held.size
            self._open.pop(_id(block), None)
        if self.disk and block.folder:
            self.disk.remove(block)

    def forget_folder(self, folder: str) -> bool:
        return bool(self.disk and folder and self.disk.remove_all(folder))

    def ahead(self, count: int, block: Callable[[int], Block]) -> Reading:
        reading = Reading(count, block, self._close)
        with self._changed:
            self._readings.append(reading)
            self._start(THREADS)
            self._changed.notify_all()
        return reading

    def _close(self, reading: Reading) -> None:
        with self._changed:
            if reading in self._readings:
                self._readings.remove(reading)
            if not self._readings:
                self._failed.clear()

    def used(self, blocks: Sequence[Block]) -> None:
        """Tells what reads ahead that these are in use."""
        if self._readings:
            with self._changed:
                if any([reading.used(block) for reading in self._readings for block in blocks]):
                    self._changed.notify_all()

    def hold(self, blocks: Sequence[Block]) -> list[Held]:
        found: list[Held | None] = [self.present(block) for block in blocks]
        self.used(blocks)
        missing = [i for i, held in enumerate(found) if held is None]
        if missing:
            with self._changed:
                jobs = [self._want(blocks[i]) for i in missing]
                self._start(min(THREADS, len(missing)))
                self._changed.notify_all()
                while not all(job.done for job in jobs):
                    if halted():
                        raise RuntimeError("the loader was closed while its data was being fetched")
                    self._changed.wait(0.5)
            for i, job in zip(missing, jobs, strict=True):
                if job.error is not None:
                    raise job.error
                found[i] = job.held
        return [held for held in found if held is not None]

    def _want(self, block: Block) -> _Job:
        """The job that fetches a block, in the queue before all that is only read ahead."""
        if (job := self._jobs.get(_id(block))) is None:
            job = self._jobs[_id(block)] = _Job(block)
            if (error := self._failed.pop(_id(block), None)) is not None:  # it was tried long enough
                job.error, job.done = error, True
                del self._jobs[_id(block)]
            else:
                self._urgent.append(job)
        job.wanted = True
        return job

    def _start(self, count: int) -> None:
        """More threads, until so many are idle or there are enough."""
        for _ in range(min(count - self._idle, THREADS - self._threads)):
            self._threads += 1
            threading.Thread(target=self._work, name="fastssl-fetch", daemon=True).start()

    def _next(self) -> _Job | None:
        if self._urgent:
            return self._urgent.popleft()
        for reading in self._readings:
            while (block := reading.take()) is not None:
                if _id(block) not in self._jobs:
                    job = self._jobs[_id(block)] = _Job(block)
                    return job
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while (job := self._next()) is None and not self._ended:
                    self._changed.wait()
                self._idle -= 1
                if job is None:
                    self._threads -= 1
                    return
            try:
                job.held = self._fetch(job.block)
            except BaseException as error:
                job.error = error
            with self._changed:
                job.done = True
                del self._jobs[_id(job.block)]
                if job.error is not None and not job.wanted and self._readings:
                    self._failed[_id(job.block)] = job.error
                self._changed.notify_all()
            del job

    def _fetch(self, block: Block) -> Held:
        if (held := self.present(block)) is not None:
            return held
        data: bytes | None = None

        def read() -> bytes:
            nonlocal data
            data = block.file.read(block.begin, block.end)
            return data

        if self.disk and block.folder:
            try:
                if (held := self.disk.fetch(block, read)) is not None:
                    return held
            except StoreError:
                raise
            except OSError as error:
                self.disk.give_up(error)
        held = _in_memory(data if data is not None else read())
        with self._changed:
            if (old := self._memory.pop(_id(block), None)) is not None:
                self._bytes -= old.size
            self._memory[_id(block)] = held
            self._bytes += held.size
            while self._bytes > MEMORY and len(self._memory) > 1:
                self._bytes -= self._memory.popitem(last=False)[1].size
        return held


def _in_memory(data: bytes) -> Held:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("fastssl")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    held = Held(fd, len(data))
    _write(fd, data)
    return held


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# -- the folder -------------------------------------------------------------------------------------------------------


class _Disk:
    """The cache's folder, which all processes of a machine share: <folder>/<file>/<block>, each whole or not at all,
    with a CRC-32 behind it that a process compares when it first opens it."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self._mine: dict[str, int] = {}  # folders of the files that this process reads: bytes
        self._lock = threading.Lock()
        self._claims: set[int] = set()  # files that are being written, locked
        self._sound: set[int] = set()  # hashes of the blocks that were compared with their CRC
        self._stuck: set[Path] = set()  # what another process did not finish for long
        self._off = self._full = False

    def register(self, folder: str, size: int) -> None:
        with self._lock:
            self._mine[folder] = size
        with contextlib.suppress(OSError):
            os.utime(self.folder / folder)  # in use: files that nobody reads go first

    def open(self, block: Block) -> Held | None:
        try:
            fd = os.open(f"{self.folder}/{block.folder}/{block.name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        held, size = Held(fd, block.size), os.fstat(fd).st_size
        if size == block.size + _CRC and hash(_id(block)) not in self._sound:
            data = memoryview(os.pread(fd, size, 0))
            if data[block.size :] == _crc(data[: block.size]):
                self._sound.add(hash(_id(block)))
            else:
                size = -1
        if size != block.size + _CRC:  # cut short, or damaged
            self.remove(block)
            return None
        return held

    def remove(self, block: Block) -> None:
        self._sound.discard(hash(_id(block)))
        with contextlib.suppress(OSError):
            os.unlink(self.folder / block.folder / block.name)
            self._account(-block.size - _CRC)

    def remove_all(self, folder: str) -> bool:
        sizes = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder / folder):
                if _OURS.fullmatch(entry.name) and not entry.name.endswith(_PARTIAL):
                    sizes.append(entry.stat().st_size)
                    os.unlink(entry)
            self._account(-sum(sizes))
        return bool(sizes)

    def fetch(self, block: Block, read: Callable[[], bytes]) -> Held | None:
        """The block, read by this process or meanwhile by another one; None where it is not to be kept here.

        Raises:
            OSError: the folder cannot be written.
            StoreError: what `read` raises.
        """
        if self._off or not self._wanted(block):
            return None
        if not self.folder.is_dir():
            raise FileNotFoundError(2, "it is gone")
        place = self.folder / block.folder / block.name
        new = place.with_name(block.name + _PARTIAL)
        try:
            while (fd := self._claim(new, place)) is None:
                if (held := self.open(block)) is not None:
                    return held
        except TimeoutError:
            if not self._stuck:
                log.warning("another process does not finish %s; what it holds is streamed", shown(str(new)))
            self._stuck.add(place)
            return None
        try:
            if (held := self.open(block)) is not None:
                return held
            if not self._reserve(fd, block.size + _CRC):
                with contextlib.suppress(OSError):
                    os.unlink(new)
                return None
            try:
                data = read()
                _write(fd, data)
                _write(fd, _crc(data))
                os.replace(new, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(new)
                with contextlib.suppress(OSError):
                    self._account(-block.size - _CRC)
                raise
            self._sound.add(hash(_id(block)))
            return Held(os.dup(fd), block.size)
        finally:
            self._release(fd)

    def give_up(self, error: OSError) -> None:
        """Writes no more into the folder; says so once."""
        with self._lock:
            if self._off:
                return
            self._off = True
        log.warning(
            "the cache %s cannot be written (%s); what is not in it is streamed from now on, in every epoch again",
            *(shown(str(self.folder)), error.strerror or type(error).__name__),
        )

    def _claim(self, new: Path, place: Path) -> int | None:
        """The temporary file, opened and locked: no other process fetches the same. A dead one's lock is gone. None
        where another one has just brought it to its place. TimeoutError: another one holds it, and may have been
        stopped."""
        while True:
            new.parent.mkdir(exist_ok=True)
            try:
                fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # it was empty, and another process has just removed it
                continue
            try:
                _lock(fd, 0 if place in self._stuck else timeout())
                mine = os.fstat(fd)
                with contextlib.suppress(FileNotFoundError):
                    now = os.stat(new)
                    if (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
                        self._claims.add(fd)
                        return fd
            except BaseException:
                _unlock(fd)
                raise
            _unlock(fd)
            if place.exists():
                return None

    def _release(self, fd: int) -> None:
        self._claims.discard(fd)
        _unlock(fd)

    def forked(self) -> None:
        """In a child process: lets go of what its parent's threads were writing, and still do."""
        self._lock = threading.Lock()
        for fd in self._claims:
            os.close(fd)
        self._claims = set()

    def _wanted(self, block: Block) -> bool:
        with self._lock:
            total = sum(self._mine.values())
        if total <= self.bound or self._stays(block.folder, block.name, total):
            return True
        return (1 - KEPT) * self.bound >= MEMORY  # else those that take turns would push each other out unused

    def _stays(self, folder: str, name: str, total: int) -> bool:
        """Whether a block is one of those that are kept: the same ones in every process."""
        if name.startswith(_STAYS):
            return True
        return zlib.crc32(f"{folder}/{name}".encode(errors="surrogateescape")) < KEPT * self.bound / total * 2**32

    @contextlib.contextmanager
    def _counter(self) -> Iterator[tuple[int, int]]:
        """The file that counts the cache's bytes, locked, and its number; -1 in a new one."""
        fd = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(fd, 10 * timeout())
            text = os.pread(fd, 32, 0)
            yield fd, int(text) if text.strip().isdigit() else -1
        finally:
            _unlock(fd)

    def _account(self, size: int) -> None:
        with self._counter() as (fd, used):
            if used >= 0:
                _set(fd, max(0, used + size))

    def _reserve(self, file: int, size: int) -> bool:
        """Room for so many bytes in a new file, made where there is none; whether there is."""
        with self._counter() as (fd, used):
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize - int(FREE * disk.f_blocks * disk.f_frsize)
            if used < 0 or used + size > self.bound or size > free:
                used = self._evict(size, free)
                disk = os.statvfs(self.folder)
                free = disk.f_bavail * disk.f_frsize - int(FREE * disk.f_blocks * disk.f_frsize)
            fits = used + size <= self.bound and size <= free
            _set(fd, used + size if fits else used)
            if fits:
                os.ftruncate(file, size)  # whoever counts the files counts it
        if not fits and not self._full:
            self._full = True
            why = f"{self.bound / 1e9:g} GB, data.cache_gb" if used + size > self.bound else "little room on its disk"
            log.warning(
                "the cache %s is full (%s); what does not fit is streamed, in every epoch again", self.folder, why
            )
        return fits

    def _evict(self, size: int, free: int) -> int:
        """Removes what is of least use, until there is room for `size` bytes and some more; the bytes that are left."""
        with self._lock:
            mine, total = dict(self._mine), sum(self._mine.values())
        found, used = [], 0
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            opened, entries = folder.stat().st_mtime, list(os.scandir(folder))
            if not entries:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    if entry.name.endswith(_PARTIAL):
                        used += 0 if _remove_if_left(entry.path) else facts.st_size
                        continue
                    used += facts.st_size
                    if folder.name not in mine:
                        found.append((0, opened, facts.st_mtime, facts.st_size, entry.path))
                    elif total > self.bound and not self._stays(folder.name, entry.name, total):
                        found.append((1, 0.0, facts.st_mtime, facts.st_size, entry.path))
        room = min(size + self.bound // 50, self.bound)
        for *_, bytes_, path in sorted(found):
            if used + room <= self.bound and free >= room:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                used, free = used - bytes_, free + bytes_
        return used


def _remove_if_left(path: str) -> bool:
    """Removes a temporary file whose process has died: nobody has locked it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    return False


def _crc(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC, "little")


def _lock(fd: int, seconds: float) -> None:
    """Locks a file. Raises TimeoutError where another process holds it so long: it may have been stopped."""
    end, wait = time.monotonic() + seconds, 0.001
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() >= end:
            raise TimeoutError(errno.ETIMEDOUT, "another process does not let go of it")
        time.sleep(wait)
        wait = min(2 * wait, 0.05)


def _unlock(fd: int) -> None:
    """Closes a locked file. Closing alone does not unlock it while a duplicate is open: a `Held`, or a child's."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _set(fd: int, number: int) -> None:
    os.pwrite(fd, f"{number:<32}".encode(), 0)


# -- this process's own -----------------------------------------------------------------------------------------------

_manager: _Manager | None = None
_making = threading.Lock()


def _here() -> _Manager:
    global _manager
    with _making:
        if _manager is None:
            _manager = _Manager(_choose("", None))
        return _manager


def _choose(folder: str, gigabytes: float | None) -> _Disk | None:
    folder = os.path.expanduser(folder) or default_folder()
    if folder in ("", "none"):
        return None
    if gigabytes is None:
        text = os.environ.get("FASTSSL_CACHE_GB", "") or str(GIGABYTES)
        try:
            gigabytes = float(text)
        except ValueError:
            raise StoreError(f"FASTSSL_CACHE_GB is '{text}'; it must be a number of gigabytes") from None
    disk = _Disk(Path(folder, FOLDER), int(gigabytes * 1e9))
    try:
        os.makedirs(disk.folder, exist_ok=True)
    except OSError as error:
        disk.give_up(error)
    return disk


def _forked() -> None:
    global _manager, _making
    _making = threading.Lock()
    if _manager is not None:
        _manager = _Manager(_manager.disk)
        if _manager.disk:
            _manager.disk.forked()


os.register_at_fork(after_in_child=_forked)
