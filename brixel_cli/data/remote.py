"""Files of object stores and web servers, through fsspec (the extra `remote`): found, and read with patience.

Nothing here is called for a place that the user did not name as an input, and no web server can send brixel on to
another one. Credentials are those that the environment has for each store; of a URL only what stands before `?` is ever
shown or stored.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from brixel_cli.core.extras import require
from brixel_cli.core.files import SizedFile
from brixel_cli.core.identity import json_digest
from brixel_cli.errors import UnreachedError, UsageError

SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https", "hf", "az", "abfs", "abfss", "memory")
"""Of fsspec's those that read objects of a name; `::` and local ones are left out."""
CONTAINERS = ("abfs", "abfss", "az")
"""Of these, the schemes whose URLs may have the name of a container before `@`."""
ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt, at the most; the pauses double."""
TIME_OUT = 30.0
"""Seconds for one request, of at most PART bytes."""
PART = 1 << 22
"""Bytes of a request."""
LIBRARIES = frozenset(
    ("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "google", "fsspec", "adlfs", "azure", "huggingface_hub",
     "httpx", "httpcore", "requests", "urllib3")
)  # fmt: skip
"""Whose errors are those of a network or a server; every other error is ours."""
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS|CONNECTION_STRING", re.IGNORECASE)
"""In the names of environment variables."""
SIGNED = re.compile(r"(\b(?:x-amz-|x-goog-)?(?:sig|signature|credential|security-token|accountkey|sharedaccesskey)"
                    r"(?:=|%3d))[^&;\s'\"]+", re.IGNORECASE)  # fmt: skip
"""What signs a request, wherever it stands in the text of an error."""
Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class Url:
    """The name of a remote file; as a text, without what may be secret in it."""

    text: str = field(repr=False)

    def __str__(self) -> str:
        return without_secrets(self.text)

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """Scheme, bucket or host, and what lies between slashes after it, as `Path.parts`."""
        return (self.scheme, *(part for part in str(self).partition("://")[2].split("/") if part))

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def folder(self) -> str:
        """The text up to the last slash, with it."""
        return str(self).rpartition("/")[0] + "/"


Place = Path | Url


@dataclass(frozen=True)
class Status:
    """What a server says of a file.

    Attributes:
        num_bytes: its size.
        modified: time of the last change in nanoseconds; 0 where it is not known.
        version: digest of what the server calls this version of the contents; empty where it says nothing.
    """

    num_bytes: int
    modified: int
    version: str


def is_url(text: str) -> bool:
    """Whether a reference names a remote file, or tries to."""
    return "://" in text


def without_secrets(text: str) -> str:
    """A URL without user, password and what follows `?`, such as a signature; other texts as they are.

    In the names of object stores `?` stands for any letter, unless what follows it has a `=`, as a signature. Where one
    of the slashes of `://` is missing, the text is taken for a URL too.
    """
    found = re.match(r"([^/]*?)(:/{1,2})", text)
    if found is None or not (is_url(text) or found[1].lower() in SCHEMES):
        return text
    scheme, slashes, rest = _scheme(found[1]), found[2], text[found.end() :]
    rest = re.split(r"%3f(?=[^/]*(?:=|%3d))", rest, maxsplit=1, flags=re.IGNORECASE)[0]
    plain, _, query = rest.partition("?")
    if scheme.lower() not in SCHEMES or scheme.lower() in ("http", "https") or re.search("=|%3d", query, re.IGNORECASE):
        rest = plain
    if scheme.lower() not in CONTAINERS:
        host, slash, path = rest.partition("/")
        rest = host.rpartition("@")[2] + slash + path
    return f"{scheme}{slashes}{rest}"


def _scheme(text: str) -> str:
    """What stands before `://` without anything that is no scheme, such as a key in a connection string."""
    return re.split(r"[^A-Za-z0-9+.-]", text)[-1]


def to_url(text: str, option: str = "--input") -> Url:
    """A reference, or the value of another option, as a URL.

    Raises:
        UsageError: it is of a kind that is not read, or holds credentials.
    """
    scheme, _, rest = text.partition("://")
    if scheme.lower() not in SCHEMES or "::" in text or not rest.strip("/"):
        raise UsageError(
            f"{option} {_scheme(scheme)}://...: brixel reads URLs of {', '.join(SCHEMES)}, each with a path."
        )
    if "@" in rest.partition("/")[0] and scheme.lower() not in CONTAINERS:
        raise UsageError(
            f"{option} {scheme}://...: credentials do not belong into a URL, which is stored and shown. "
            "Set them in the environment, as docs/INPUTS.md says."
        )
    return Url(text)


def status_of(url: Url) -> Status:
    """What the server says of one file.

    Raises:
        UnreachedError: nothing, or that it is not there.
        UsageError: a package is missing.
    """
    system, path = _system(url)
    system.invalidate_cache()
    return _status(_patiently(lambda: _call(system, "info", path, TIME_OUT)), url)


def listed(url: Url, below: bool = False) -> list[tuple[Url, Status]]:
    """The files that a pattern names, or, below, all of a folder; sorted. Errors as `status_of`."""
    system, path = _system(url)
    system.invalidate_cache()
    name = "find" if below else "glob"
    found: dict[str, Any] = _patiently(lambda: _call(system, name, path, None, detail=True))
    files = {Url(system.unstrip_protocol(key)): info for key, info in found.items() if info.get("type") == "file"}
    return [(file, _status(info, file)) for file, info in sorted(files.items())]


def is_folder_url(url: Url) -> bool:
    """Whether a URL names what has files below it and is none itself; errors as `status_of`."""
    if url.scheme in ("http", "https"):
        return False
    system, path = _system(url)
    try:
        return bool(_patiently(lambda: _call(system, "info", path, TIME_OUT)).get("type") == "directory")
    except UnreachedError as error:
        if not error.missing:
            raise
        return False  # a row will tell


def fetch(url: Url, start: int, end: int) -> bytes:
    """Bytes from `start` up to `end` of a remote file.

    Raises:
        UnreachedError: they did not come, in several attempts where another one may help.
    """
    system, path = _system(url)
    parts = [_patiently(lambda at=at: _part(system, path, at, min(at + PART, end))) for at in range(start, end, PART)]  # type: ignore[misc]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def put(source: Path | bytes, url: Url) -> None:
    """Store a file, or bytes, under a URL; in object stores it appears as a whole, and replaces what is there.

    Raises:
        UnreachedError: the store did not take it, in several attempts where another one may help.
    """
    system, path = _system(url)
    if isinstance(source, bytes):
        _patiently(lambda: _call(system, "pipe_file", path, TIME_OUT, source))
        return
    _patiently(lambda: _call(system, "put_file", str(source), None, path))
    stored, size = status_of(url).num_bytes, source.stat().st_size
    if stored != size:
        raise UnreachedError(f"cut off: {stored:,} of {size:,} bytes are there")


class RemoteFile(SizedFile):
    """A remote file to be read forwards, or here and there, by requests of a block each.

    Args:
        url: of the file.
        num_bytes: its size.
        block: bytes of a request.
        ahead: whether the block after the one that is read is fetched meanwhile.
    """

    def __init__(self, url: Url, num_bytes: int, block: int, ahead: bool = False):
        super().__init__(num_bytes)
        self._url, self._block_size, self._start = url, block, 0
        self._block = b""
        self._next: tuple[int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1) if ahead else None

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        pieces = []
        while self._at < end:
            if not self._start <= self._at < self._start + len(self._block):
                self._move(self._at)
            piece = self._block[self._at - self._start : end - self._start]
            pieces.append(piece)
            self._at += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _move(self, start: int) -> None:
        if self._next is not None and self._next[0] == start:
            block = self._next[1].result()
        else:
            block = fetch(self._url, start, min(start + self._block_size, self._size))
        self._start, self._block, self._next = start, block, None
        after = start + len(block)
        if self._pool is not None and after < self._size:
            end = min(after + self._block_size, self._size)
            self._next = (after, self._pool.submit(fetch, self._url, after, end))


def _system(url: Url) -> tuple[Any, str]:
    """The file system of a URL, and what it calls the file."""
    require("remote", f"{url.scheme}://")
    if url.scheme in ("gs", "gcs"):
        require("gcs", f"{url.scheme}://")
    import fsspec

    settings = {"client_kwargs": {"trace_configs": [_watched()]}} if url.scheme in ("http", "https") else {}
    try:
        system, path = fsspec.core.url_to_fs(url.text, **settings)
    except ImportError as error:  # of stores that the extra does not cover
        raise UsageError(f"{url.scheme}:// cannot be read: {error}.") from error
    if isinstance(getattr(system, "retries", None), int):
        system.retries = 1  # trying again is done here, for all kinds of stores in one way
    return system, path


class _SentOnError(OSError):
    """A web server names another place for a file."""


@cache
def _watched() -> Any:
    """What ends a request of aiohttp, the library of web servers, before it follows a server elsewhere."""
    import aiohttp

    async def check(_: object, __: object, request: Any) -> None:
        answer = request.response
        here = answer.url
        there = here.join(type(here)(answer.headers.get("Location") or answer.headers.get("URI", "")))
        if (here.host, here.explicit_port) != (there.host, there.explicit_port):
            answer.close()
            raise _SentOnError(f"the server sends this request on to {there.host}, which --input does not name")

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(check)
    return config


def _call(system: Any, name: str, path: str, time_out: float | None, *then: Any, **more: Any) -> Any:
    """A method of a file system; of the asynchronous ones, given up after so many seconds."""
    if not system.async_impl:
        return getattr(system, name)(path, *then, **more)
    from fsspec.asyn import sync

    return sync(system.loop, getattr(system, f"_{name}"), path, *then, timeout=time_out, **more)


def _part(system: Any, path: str, start: int, end: int) -> bytes:
    data: bytes = _call(system, "cat_file", path, TIME_OUT, start=start, end=end)
    if len(data) > end - start:
        raise UnreachedError("the server sends whole files only, and parts of them are needed")
    if len(data) < end - start:
        raise _CutOffError(f"cut off: {len(data):,} of {end - start:,} bytes came")
    return data


class _CutOffError(OSError):
    """Fewer bytes than were asked for."""


def _patiently(call: Callable[[], Result]) -> Result:
    """The result of a call that is tried again where that may help, with pauses that double."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1))  # noqa: S311
        try:
            return call()
        except Exception as error:
            if missing := _refusal(error):
                raise UnreachedError(missing, missing=True) from None  # its text may hold what is secret
            if not _of_network(error):
                raise
            reason = _reason(error)
    raise UnreachedError(f"{reason} ({ATTEMPTS} attempts)")


def _refusal(error: Exception) -> str:
    """What a server says for good; empty for errors that may pass."""
    status = getattr(error, "status", None)
    if sent_on := next((cause for cause in (error, error.__cause__) if isinstance(cause, _SentOnError)), None):
        return str(sent_on)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "permission denied"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "nothing of that name"
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return "a folder"
    return "no credentials" if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError") else ""


def _of_network(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError | asyncio.TimeoutError) or (
        not isinstance(error, UnreachedError) and type(error).__module__.partition(".")[0] in LIBRARIES
    )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "timeout" in type(error).__name__.lower():
        return "timed out"
    text = re.sub(r"\s+", " ", re.sub(r"\?\S*", "?...", str(error))).strip()
    for name, value in os.environ.items():
        if SECRET.search(name):
            pairs = [item.partition("=") for item in value.split(";")]  # of a connection string
            signs = [part for key, _, part in pairs if re.search("key|signature", key, re.IGNORECASE)]
            for part in (value, value.lstrip("?"), *signs):
                text = text.replace(part, "***") if len(part) > 3 else text
    text = SIGNED.sub(r"\1***", text)
    return f"{type(error).__name__}: {text}"[:120].removeprefix("_CutOffError: ").removesuffix(": ")


def _status(info: dict[str, Any], url: Url) -> Status:
    if info.get("type") == "directory":
        raise UnreachedError("a folder", missing=True)
    if info.get("size") is None:
        raise UnreachedError("the server does not say how many bytes it has", missing=True)
    tags = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "crc32c", "blob_id") if info.get(key)]
    times = [info[key] for key in ("LastModified", "updated", "mtime", "last_modified", "created") if info.get(key)]
    size = int(info["size"])
    return Status(size, _nanoseconds(times[0]) if times else 0, json_digest([size, tags]) if tags else "")


def _nanoseconds(value: object) -> int:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return 0
    return int(value.timestamp() * 1000) * 10**6 if isinstance(value, datetime) else 0
