"""The one door to files that may lie in a store: s3://, gs://, https:// and whatever else fsspec reads.

A store is slower than a disk and fails now and then. Every request is tried again, with growing and jittered waits; an
answer that is too short counts as a failure; a file that becomes another one while it is read is named. What is still
wrong then is one line (`StoreError`). Credentials in a URL (user:password@, the query of a presigned one) are used and
never shown.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fastssl.config import USER, printable, redacted

log = logging.getLogger(__name__)

Value = TypeVar("Value")

TRIES, WAIT = 5, 2.0  # FASTSSL_STORE_TRIES, FASTSSL_STORE_WAIT: seconds before the second try; they double
TIMEOUT = 60.0  # FASTSSL_STORE_TIMEOUT: seconds for one request
TOGETHER = 16  # requests at a time
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub"}
_VERSION = (
    *("ETag", "etag", "generation", "md5Hash", "content-md5", "Content-MD5", "blob_id", "LastModified"),
    *("last_modified", "Last-Modified", "updated", "mtime", "modificationTime", "modify", "created"),
)


class StoreError(OSError):
    """A store does not give what it was asked for; one line: which file, how often it was tried, the last reason."""

    def __init__(self, message: str, missing: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.strerror = message
        self.missing = missing  # it is not there
        self.refused = refused  # it may not be read; some stores say so of what is not there, too


# -- names -----------------------------------------------------------------------------------------------------------


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something in a store; file:// does not."""
    found = _SCHEME.match(os.fspath(path))
    return found is not None and found[1].lower() != "file"


def plain(path: str | os.PathLike[str]) -> str:
    """A path as text, without file://."""
    path = os.fspath(path)
    return unquote(path[len("file://") :]) if path.lower().startswith("file://") else path


def shown(path: str | os.PathLike[str]) -> str:
    """A path or URL as it may be printed and written down: one line, without credentials."""
    return printable(redacted(os.fspath(path)))


def beside(path: str, ending: str) -> str:
    """The name of a file that lies beside another one and is called like it, with something more at the end."""
    name, query = _cut(path)
    return f"{name}{ending}{query}"


def join(base: str, relative: str) -> str:
    """The path of something in a folder, or of a name relative to it; a name that is whole stays as it is."""
    if is_url(relative) or not is_url(base):
        return plain(relative) if is_url(relative) else os.path.join(plain(base), relative)
    name, query = _cut(base)
    return f"{name.rstrip('/')}/{quote(relative) if _web(base) else relative}{query}"


def folder(path: str) -> str:
    """The folder that a file lies in, for `join`."""
    if not is_url(path):
        return os.path.dirname(plain(path))
    name, query = _cut(path)
    return f"{name.rpartition('/')[0]}{query}"


def base(path: str) -> str:
    """The last part of a path, without credentials."""
    return _cut(plain(path))[0].rstrip("/").rpartition("/")[2]


def has_magic(path: str) -> bool:
    """Whether a path is a pattern of names: in the web, where ? begins a query, by * and [ alone."""
    return local_glob.has_magic(_cut(path)[0])


def _web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _cut(path: str) -> tuple[str, str]:
    """A path without, and only, the query of a URL. Elsewhere than in the web a ? without = is a pattern's."""
    if is_url(path):
        name, mark, query = path.partition("?")
        if mark and (_web(path) or "=" in query):
            return name, mark + query
    return path, ""


def natural(path: str) -> list:
    """Sorts names by the numbers in them: 2 before 10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path)]


# -- files -----------------------------------------------------------------------------------------------------------


class StoreFile:
    """A file in a store. Reading is safe from many threads and after a fork.

    Attributes:
        url: where it lies, with credentials if it needs them; print `shown(url)`.
        size: in bytes.
        etag: what tells this version from another one; empty where the store says nothing of it.

    Raises:
        StoreError: there is no such file, or the store does not answer.
    """

    def __init__(self, url: str, size: int | None = None, etag: str = "") -> None:
        self.url, self.etag = url, etag
        if size is None:
            size, self.etag = _facts(url)
        self.size = size

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to, not including, `end`. Raises StoreError."""
        if not 0 <= begin <= end <= self.size:
            raise StoreError(f"{shown(self.url)} has {self.size} bytes; {begin} to {end} were asked for")
        if begin == end:
            return b""
        return _again(self.url, lambda: self._read(begin, end))

    def read_all(self) -> bytes:
        """All of it. Raises StoreError."""
        return self.read(0, self.size)

    def _read(self, begin: int, end: int) -> bytes:
        fs, name = _filesystem(self.url)
        condition, data = {}, b""
        if _web(self.url) and self.etag:  # the server itself compares
            kind = "If-Match" if self.etag.startswith('"') else "If-Unmodified-Since" if "GMT" in self.etag else ""
            condition = {"headers": {kind: self.etag}} if kind else {}
        whole = (begin, end) == (0, self.size)
        data = fs.cat_file(name, **({} if whole else {"start": begin, "end": end}), **condition)
        if len(data) != end - begin:
            self._same()
            if len(data) == self.size:
                raise StoreError(f"{shown(self.url)}: the server sends whole files only; it has to know byte ranges")
            raise OSError(f"{len(data)} bytes came where {end - begin} were asked for")
        if not condition:
            self._same()
        return data

    def _same(self) -> None:
        size, etag = _facts(self.url, tries=False)
        if (size, etag.strip('"')) != (self.size, self.etag.strip('"')):  # a listing may leave the quotes out
            raise StoreError(f"{shown(self.url)} is another file now than when it was opened; start again")


def read_bytes(path: str) -> bytes:
    """A small file, whole. Raises OSError."""
    if is_url(path):
        return StoreFile(path).read_all()
    with open(plain(path), "rb") as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Writes a small file, whole or not at all. Raises OSError."""
    if is_url(path):

        def put() -> None:
            fs, name = _filesystem(path)
            fs.pipe_file(name, data)

        return _again(path, put)
    path = plain(path)
    new = f"{path}.{uuid.uuid4().hex}.partial"  # of no other process on any machine
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def put(file: str | os.PathLike[str], url: str) -> None:
    """Sends a local file to a store, where it stands under its name when it is whole. Raises StoreError."""

    def send() -> None:
        fs, name = _filesystem(url)
        fs.put_file(os.fspath(file), name)

    _again(url, send)


def exists(path: str, optional: bool = False) -> bool:
    """Whether there is such a file or folder; an optional one that a store refuses is `absent`.

    Raises:
        StoreError: a store does not answer, or refuses it.
    """
    if not is_url(path):
        return os.path.exists(plain(path))
    try:
        return bool(_kind(path))
    except StoreError as error:
        if optional and absent(error, path):
            return False
        raise


def absent(error: StoreError, path: str) -> bool:
    """Whether a file that may lie beside another one is not there. One that a store refuses counts as absent: without
    the right to list it says so of missing files, and a signature is good for one file; a line tells so."""
    if error.refused and not _cut(path)[1]:
        _say(f"{error}; taken as absent")
    return error.missing or error.refused


def is_folder(path: str) -> bool:
    """Whether a path names a folder; what begins the names of some files is one. The web has none.

    Raises:
        StoreError: a store does not answer.
    """
    if not is_url(path):
        return os.path.isdir(plain(path))
    return not _web(path) and not has_magic(path) and _kind(path) == "directory"


def _kind(url: str) -> str:
    """What a URL names: 'file' or 'directory'; empty where there is nothing. Raises StoreError."""
    try:
        return _again(url, lambda: _info(url)).get("type") or "file"
    except StoreError as error:
        if error.missing:
            return ""
        raise


@dataclass(frozen=True)
class Listed:
    """A file of a `listing`: its name relative to the folder, its bytes, and what tells its version."""

    name: str
    size: int
    etag: str


def glob(pattern: str) -> list[str]:
    """The files that a pattern names, numbers in the names in numerical order. Raises StoreError."""
    if not is_url(pattern):
        return sorted(local_glob.glob(plain(pattern)), key=natural)
    _listable(pattern)

    def find() -> list[str]:
        fs, name = _filesystem(pattern)
        return [_whole(pattern, name, fs._strip_protocol(found)) for found in fs.glob(name)]

    return sorted(_again(pattern, find), key=natural)


def listing(path: str) -> list[Listed]:
    """All files of a folder at any depth, by name. Raises StoreError (OSError of a local folder)."""
    if not is_url(path):
        top, found = plain(path), []
        for where, _, names in os.walk(top):
            for name in names:
                full = os.path.join(where, name)
                facts = os.stat(full)
                found.append(Listed(os.path.relpath(full, top), facts.st_size, str(facts.st_mtime_ns)))
        return sorted(found, key=lambda file: file.name)
    _listable(path)

    def find() -> list[Listed]:
        fs, name = _filesystem(path)
        start = name.rstrip("/") + "/"
        files = fs.find(name, detail=True).values()
        return [
            Listed(info["name"][len(start) :], int(info["size"]), _version(info))
            for info in files
            if info["name"].startswith(start) and info["name"] != start
        ]

    return sorted(_again(path, find), key=lambda file: file.name)


def together(function: Callable[[Any], Value], items: Iterable[Any]) -> list[Value]:
    """`function` of each item, in order, some at a time: a store's answers take long, and cost little."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(function, items))


def _listable(url: str) -> None:
    if _web(url):
        raise StoreError(
            f"{shown(url)} cannot be listed: the web has no folders; name the files (train-{{000..015}}.beton) or a "
            "manifest"
        )


def _whole(like: str, pattern: str, name: str) -> str:
    """The URL of a name that a file system gave for a pattern, `like` as a URL, with its credentials and host."""
    like, pattern, name = like.rstrip("/"), pattern.strip("/"), name.lstrip("/")
    while pattern and not like.endswith((f"/{pattern}", f"@{pattern}")):  # what stands elsewhere, as abfs://container@
        first, _, pattern = pattern.partition("/")
        name = name.removeprefix(f"{first}/")
    return f"{like[: len(like) - len(pattern)]}{name}"


def _info(url: str) -> dict[str, Any]:
    fs, name = _filesystem(url)
    return fs.info(name)


def _version(info: dict[str, Any]) -> str:
    found = next((info[key] for key in _VERSION if info.get(key)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)  # a listing may give seconds


def _facts(url: str, tries: bool = True) -> tuple[int, str]:
    info = _again(url, lambda: _info(url)) if tries else _info(url)
    if info.get("type") == "directory":
        raise StoreError(f"{shown(url)} is a folder")
    if info.get("size") is None:
        raise StoreError(f"{shown(url)}: the server does not say how many bytes it has")
    return int(info["size"]), _version(info)


# -- requests --------------------------------------------------------------------------------------------------------

_systems: dict[tuple[int, str], Any] = {}
_lock = threading.Lock()
_said = -60.0


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, one per process and host, and the name that the URL has there."""
    scheme, user, rest = _split(url)
    kind = _system(scheme, url)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("s3", "s3a"):
        if user:
            key, _, secret = user[:-1].partition(":")
            options |= {"key": unquote(key), "secret": unquote(secret)}
            url = f"{scheme}://{rest}"
        options["config_kwargs"] = {
            **{"connect_timeout": 10, "read_timeout": timeout()},
            **{"retries": {"max_attempts": 1}, "max_pool_connections": 2 * TOGETHER},
        }
    elif scheme not in ("http", "https"):
        options |= kind._get_kwargs_from_urls(url)  # host, account
    known = os.getpid(), f"{scheme} {options}"
    with _lock:
        if known not in _systems:
            _systems[known] = _connect(kind, scheme, options)
        fs = _systems[known]
    return fs, url if _web(url) else fs._strip_protocol(url)


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, user and password up to the @, and the rest of a URL."""
    scheme, _, rest = url.partition("://")
    clean = USER.sub("", url, count=1).partition("://")[2]
    return scheme.lower(), rest[: len(rest) - len(clean)], clean


def _system(scheme: str, url: str) -> Any:
    import fsspec  # comes with torch

    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError:
        need = f"needs a package that is not installed: pip install {_PACKAGES.get(scheme, 'fsspec[full]')}"
        raise StoreError(f"{shown(url)}: {scheme}:// {need}") from None
    except ValueError:
        raise StoreError(f"{shown(url)}: {scheme}:// is unknown; known: s3, gs, https and others of fsspec") from None


def _connect(kind: Any, scheme: str, options: dict[str, Any]) -> Any:
    if scheme in ("http", "https"):
        import aiohttp

        options = options | {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=timeout())}}
    fs = kind(**options)
    if hasattr(fs, "retries"):
        fs.retries = 1  # ours count
    return fs


def _again(url: str, call: Callable[[], Value]) -> Value:
    """What `call` gives, tried again while the fault may pass. Raises StoreError."""
    tries, wait = max(1, int(_number("TRIES", TRIES))), _number("WAIT", WAIT)
    for attempt in range(1, tries + 1):
        try:
            return call()
        except StoreError:
            raise
        except Exception as error:  # of fsspec, aiohttp, botocore and others, which have no common kind
            reason, passing = _judge(error)
            if not passing:
                missing, refused = reason == _MISSING, reason.startswith(_REFUSED)
                raise StoreError(f"{shown(url)} {reason}", missing, refused) from None
            if attempt == tries:
                raise StoreError(f"{shown(url)} cannot be read: tried {tries} times; the last time: {reason}") from None
        _say(f"{shown(url)}: {reason}; trying again")
        time.sleep(wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


def _say(line: str) -> None:
    global _said
    if time.monotonic() - _said > 30:
        _said = time.monotonic()
        log.warning("%s", line)


_MISSING, _REFUSED = "does not exist", "may not be read: the store refuses it"


def _judge(error: Exception) -> tuple[str, bool]:
    """A fault in words, and whether it may pass."""
    status, step, names, root = 0, error, [], error
    while step is not None:
        answer = getattr(step, "response", None)
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
        status = status or found or getattr(step, "status", 0) or getattr(step, "code", 0) or 0
        names.append(type(step).__name__)
        root = step
        step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)  # type: ignore[assignment]
    status = status if isinstance(status, int) and 400 <= status < 600 else 0
    words = redacted(printable(" ".join(str(root).split()))) or type(root).__name__
    words = words if len(words) <= 200 else f"{words[:200]}..."
    if "NoCredentialsError" in names or "PartialCredentialsError" in names:
        return "cannot be read: no credentials were found for this store", False
    if status >= 500 or status in (408, 429):
        return f"the store answers {status}", True
    if status == 412:
        return "is another file now than when it was opened; start again", False
    if status == 401:
        return f"cannot be read: the store asks for other credentials (401; {words})", False
    if isinstance(error, PermissionError) or status == 403:
        return f"{_REFUSED} ({words})", False
    if status == 416:
        return "has become shorter since it was opened", False
    if "ClientConnectorError" in names or "ServerDisconnectedError" in names:
        return f"no connection ({words})", True
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and not status):
        return _MISSING, False
    if status:
        return f"cannot be read: the store answers {status} ({words})", False
    if any("ParamValidation" in name for name in names) or isinstance(error, (ValueError, TypeError)):
        return f"cannot be read: {words}", False
    return words if isinstance(error, OSError) else f"{type(error).__name__}: {words}", True


def timeout() -> float:
    """Seconds that one request may take."""
    return _number("TIMEOUT", TIMEOUT)


def _number(name: str, default: float) -> float:
    text = os.environ.get(f"FASTSSL_STORE_{name}", "")
    try:
        return float(text or default)
    except ValueError:
        raise StoreError(f"FASTSSL_STORE_{name} is '{text}'; it must be a number") from None


def _forked() -> None:
    global _lock
    _lock = threading.Lock()
    _systems.clear()


os.register_at_fork(after_in_child=_forked)
