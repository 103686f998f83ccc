"""Read ranges of bytes of local files, or of objects behind URLs by fsspec: together, retried, and cached."""

import asyncio
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from contrastive.config import RemoteConfig, UserError
from contrastive.data.decode import SourceLost, Unreadable, why_unreadable
from contrastive.data.shards.chunk_cache import CHUNK, ChunkCache

logger = logging.getLogger(__name__)

# Ranges closer than this are fetched as one: a fraction of what a connection carries during its round trip.
_GAP = 16 * 2**10
# Largest request, so that a retry repeats little, and a time-out is not reached by size alone.
_MOST = 8 * 2**20
_AT_ONCE = 32  # requests of one process
# Tries after which a body that is too short is believed: the object ends there.
_SHORT_TRIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
# A server that answers so will not answer otherwise a second later.
_REFUSED = {401: "access is refused", 403: "access is refused", 404: "not found", 410: "is gone"}
_ENDS_BEFORE = 416

Answer = bytes | Unreadable


@dataclass(frozen=True)
class Place:
    """A file or an object.

    Attributes:
        url: A local path, or a URL with its protocol.
        size: Its bytes.
        version: Changes when its content does, for caches.
    """

    url: str
    size: int
    version: str

    @property
    def is_local(self) -> bool:
        """Whether ``url`` is a path of this machine."""
        return is_local(self.url)


@dataclass(frozen=True)
class Span:
    """A range of bytes of a place, ``stop`` exclusive."""

    place: Place
    start: int
    stop: int


def is_local(url: str) -> bool:
    """Return whether ``url`` is a path of this machine, not a URL."""
    return "://" not in url


def check_url(url: str) -> str:
    """Return ``url`` without a slash at its end.

    Raises:
        UserError: it holds a password or a signature, which configs and logs would show.
    """
    if not is_local(url) and ("@" in url.split("://", 1)[1].split("/", 1)[0] or "?" in url):
        raise UserError(
            f"{url.split('://', 1)[0]}://...: a URL with a user, a password or a signature would be written "
            "to configs and logs; leave it out, and give credentials as the service's own tools take them "
            "(environment variables, ~/.aws, ~/.netrc)"
        )
    return url.rstrip("/") if len(url) > 1 else url


class Ranges:
    """Reads spans, in any thread and any process (it may be pickled, and used on both sides of a fork).

    Args:
        config: Limits of retries and of the cache.
        clock: Returns seconds.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        config: RemoteConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._clock, self._sleep = config, clock, sleep
        self._cache = None if config.cache is None else ChunkCache(config.cache, config.cache_gib * 2**30)

    def read(self, spans: Sequence[Span]) -> list[Answer]:
        """Return the bytes of each span, or why they cannot be read: the place ends before.

        Raises:
            SourceLost: a place does not exist, access is refused, or there was no answer for ``retry_s``.
        """
        answers: list[Answer] = [b""] * len(spans)
        remote = [index for index, span in enumerate(spans) if not span.place.is_local]
        for index in set(range(len(spans))) - {*remote}:
            answers[index] = _read_local(spans[index])
        fetch = self._fetch_merged if self._cache is None else self._fetch_cached
        if remote:
            for index, answer in zip(remote, fetch([spans[index] for index in remote]), strict=True):
                answers[index] = answer
        return answers

    def whole(self, url: str) -> bytes | None:
        """Return the content of a small file or object; None if there is none.

        Raises:
            SourceLost: see ``read``.
        """
        try:
            return self.wholes([url])[0]
        except (_Missing, FileNotFoundError):
            return None

    def wholes(self, urls: Sequence[str]) -> list[bytes]:
        """Return the contents of small files or objects, all of one kind.

        Raises:
            SourceLost: see ``read``.
            FileNotFoundError: there is no such file on this machine.
        """
        if all(map(is_local, urls)):
            return [Path(url).read_bytes() for url in urls]
        answers = self._fetch([Span(Place(url, -1, ""), 0, -1) for url in urls])
        return [answer for answer in answers if isinstance(answer, bytes)]

    def size(self, url: str) -> int:
        """Return the bytes of a file or an object.

        Raises:
            UserError: it does not exist, or cannot be reached.
        """
        try:
            return os.stat(url).st_size if is_local(url) else int(_filesystem(url).size(url))
        except Exception as error:  # each protocol has its own
            raise UserError(f"{url}: cannot be reached ({why_unreadable(error)})") from error

    def forget(self, spans: Iterable[Span]) -> None:
        """Drop what the cache holds of some spans, which turned out to be damaged."""
        for part in (part for span in spans for part in _parts(span)):
            if self._cache is not None:
                self._cache.drop(_name(part.place), part.chunk)

    def _fetch_merged(self, spans: Sequence[Span]) -> list[Answer]:
        """Fetch spans that lie near each other by one request."""
        groups = list(_merge(spans, _GAP))
        answers: list[Answer] = [b""] * len(spans)
        fetched = self._fetch([span for span, _ in groups])
        for (span, members), answer in zip(groups, fetched, strict=True):
            for index in members:
                answers[index] = _cut(answer, span.start, spans[index])
        return answers

    def _fetch_cached(self, spans: Sequence[Span]) -> list[Answer]:
        """Read what the cache has, fetch the chunks that it lacks and keep them."""
        assert self._cache is not None
        parts: dict[_Part, Answer | None] = {
            part: self._cache.get(_name(part.place), part.chunk, part.start, part.stop)
            for span in spans
            for part in _parts(span)
        }
        missing = sorted(
            {(part.place, part.chunk) for part, data in parts.items() if data is None},
            key=lambda chunk: (chunk[0].url, chunk[1]),
        )
        fetched = dict(zip(missing, self._fetch_merged([_span_of(*chunk) for chunk in missing]), strict=True))
        for (place, chunk), answer in fetched.items():
            if isinstance(answer, bytes):
                self._cache.put(_name(place), chunk, answer)
        for part, data in parts.items():
            if data is None:
                answer = fetched[part.place, part.chunk]
                parts[part] = answer[part.start : part.stop] if isinstance(answer, bytes) else answer
        return [_join([parts[part] for part in _parts(span)]) for span in spans]

    def _fetch(self, spans: Sequence[Span]) -> list[Answer]:
        """Fetch spans, one request each, until each has an answer."""
        answers: list[Answer] = [b""] * len(spans)
        pending, began, pause, tries = list(range(len(spans))), self._clock(), _FIRST_PAUSE_S, 0
        while pending:
            tries += 1
            failed: dict[int, str] = {}
            for index, got in zip(pending, self._ask([spans[index] for index in pending]), strict=True):
                answer = _judge(spans[index], got, tries)
                if isinstance(answer, str):
                    failed[index] = answer
                else:
                    answers[index] = answer
            pending = list(failed)
            if pending:
                left_s = began + self._config.retry_s - self._clock()
                self._complain(spans[pending[0]].place.url, failed[pending[0]], tries, left_s)
                self._sleep(min(pause, max(left_s, 0.0)))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        return answers

    def _complain(self, url: str, reason: str, tries: int, left_s: float) -> None:
        if left_s <= 0:
            raise SourceLost(
                f"{url}: {reason}; gave up after {tries} tries in {self._config.retry_s:g} s "
                "(data.remote.retry_s); run the same command again when it is back"
            )
        logger.log(
            logging.WARNING if tries == 2 else logging.DEBUG, "%s: %s; trying for %.0f s", url, reason, left_s
        )

    def _ask(self, spans: Sequence[Span]) -> list[bytes | BaseException]:
        """Send one request for each span, together where the protocol can."""
        filesystem = _filesystem(spans[0].place.url)
        ranges = [
            (filesystem._strip_protocol(span.place.url), span.start, None if span.stop < 0 else span.stop)
            for span in spans
        ]
        timeout_s = self._config.timeout_s
        if filesystem.async_impl:
            from fsspec.asyn import sync

            answers: list[bytes | BaseException] = sync(
                filesystem.loop, _gather, filesystem, ranges, timeout_s
            )
            return answers
        return [_cat(filesystem, *each) for each in ranges]


class RangeFile(io.RawIOBase):
    """A place as a readable, seekable file without a buffer, for libraries that want one."""

    def __init__(self, ranges: Ranges, place: Place) -> None:
        self._ranges, self._place, self._at = ranges, place, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's length.

        Raises:
            UserError: it cannot be read.
        """
        stop = min(self._at + len(buffer), self._place.size)
        if stop <= self._at:
            return 0
        (answer,) = self._ranges.read([Span(self._place, self._at, stop)])
        if isinstance(answer, Unreadable):
            raise UserError(f"{self._place.url}: {answer}")
        buffer[: len(answer)] = answer
        self._at = stop
        return len(answer)


class _Missing(SourceLost):
    """There is no such object."""


def _read_local(span: Span) -> Answer:
    try:
        with open(span.place.url, "rb", buffering=0) as file:
            file.seek(span.start)
            data = file.read(span.stop - span.start)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise SourceLost(
            f"{span.place.url}: {error.strerror}; put it back, then run the same command again"
        ) from error
    except OSError as error:
        return Unreadable(why_unreadable(error))
    return data if len(data) == span.stop - span.start else _ends_before(span)


def _ends_before(span: Span) -> Unreadable:
    return Unreadable(f"{_base(span.place.url)} ends before byte {span.stop}: it is not the indexed shard")


def _base(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _judge(span: Span, got: bytes | BaseException, tries: int) -> Answer | str:
    """Return the final answer to a request, or as text why it is to be repeated."""
    wanted = span.stop - span.start
    if isinstance(got, bytes):
        if span.stop < 0 or len(got) == wanted:
            return got
        if len(got) > wanted:
            raise SourceLost(
                f"{span.place.url}: the server sent {len(got)} bytes of {wanted}, so it knows no ranges; "
                "use another server, or copy the shards to a disk"
            )
        return _ends_before(span) if tries >= _SHORT_TRIES else f"{len(got)} bytes of {wanted}"
    status = _status(got)
    if status == _ENDS_BEFORE:
        return _ends_before(span)
    if isinstance(got, FileNotFoundError):
        raise _Missing(f"{span.place.url}: not found; put it back, then run the same command again") from got
    if isinstance(got, PermissionError) or status in _REFUSED:
        reason = _REFUSED.get(status, "access is refused")
        raise SourceLost(
            f"{span.place.url}: {reason}; set this right, then run the same command again"
        ) from got
    if not isinstance(got, Exception):
        raise got
    return "no answer in time" if isinstance(got, TimeoutError) else why_unreadable(got)


def _status(error: BaseException) -> int:
    """Return the HTTP status behind an error of aiohttp, of botocore under s3fs, or of gcsfs; 0 if none."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = error.status if hasattr(error, "status") else getattr(error, "code", 0)
    return int(status) if str(status).isdigit() else 0


def _merge(spans: Sequence[Span], gap: int) -> Iterator[tuple[Span, list[int]]]:
    """Join spans of a place that lie within ``gap`` bytes; yield each with the numbers of its members."""
    members: list[int] = []
    hull = Span(Place("", 0, ""), 0, 0)
    for index in sorted(range(len(spans)), key=lambda index: (spans[index].place.url, spans[index].start)):
        span = spans[index]
        joined = replace(hull, stop=max(hull.stop, span.stop))
        is_near = span.place == hull.place and span.start <= hull.stop + gap
        if members and is_near and joined.stop - joined.start <= _MOST:
            hull = joined
            members.append(index)
        else:
            if members:
                yield hull, members
            hull, members = span, [index]
    if members:
        yield hull, members


def _cut(answer: Answer, start: int, span: Span) -> Answer:
    return answer if isinstance(answer, Unreadable) else answer[span.start - start : span.stop - start]


def _name(place: Place) -> str:
    return f"{place.url} {place.size} {place.version}"


class _Part(NamedTuple):
    """The bytes ``start`` to ``stop`` of a chunk."""

    place: Place
    chunk: int
    start: int
    stop: int


def _parts(span: Span) -> list[_Part]:
    """Cut a span into parts of chunks."""
    return [
        _Part(span.place, chunk, max(0, span.start - chunk * CHUNK), min(CHUNK, span.stop - chunk * CHUNK))
        for chunk in range(span.start // CHUNK, max(span.start, span.stop - 1) // CHUNK + 1)
    ]


def _span_of(place: Place, chunk: int) -> Span:
    return Span(place, chunk * CHUNK, min((chunk + 1) * CHUNK, place.size))


def _join(answers: Sequence[Answer | None]) -> Answer:
    for answer in answers:
        if isinstance(answer, Unreadable):
            return answer
    return b"".join(answer for answer in answers if isinstance(answer, bytes))


_filesystems: dict[tuple[int, str], Any] = {}


def _filesystem(url: str) -> Any:
    """Return the fsspec filesystem of a URL; each process has its own, since none survives a fork.

    Raises:
        UserError: fsspec, or what it needs for the protocol, is not installed; unknown protocol.
    """
    protocol = url.split("://", 1)[0]
    key = os.getpid(), protocol
    if key not in _filesystems:
        try:
            import fsspec

            _filesystems[key] = fsspec.filesystem(protocol)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(
                f"{protocol}://: cannot be read ({error}); s3, gs and https need "
                "pip install 'contrastive-pretrain[remote]'"
            ) from error
    return _filesystems[key]


def _cat(filesystem: Any, path: str, start: int, stop: int | None) -> bytes | BaseException:
    try:
        data: bytes = filesystem.cat_file(path, start=start, end=stop)
        return data
    except Exception as error:  # each protocol has its own
        return error


async def _gather(
    filesystem: Any, ranges: Sequence[tuple[str, int, int | None]], timeout_s: float
) -> list[bytes | BaseException]:
    free = asyncio.Semaphore(_AT_ONCE)

    async def ask(path: str, start: int, stop: int | None) -> bytes:
        async with free:
            whole = start == 0 and stop is None
            where = {} if whole else {"start": start, "end": stop}
            data: bytes = await asyncio.wait_for(filesystem._cat_file(path, **where), timeout_s)
            return data

    return await asyncio.gather(*(ask(*each) for each in ranges), return_exceptions=True)
