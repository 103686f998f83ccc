"""Serve a folder over HTTP with ranges, as object stores do, and misbehave on demand."""

import contextlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectServer:
    """A server on a loopback port, until ``close``.

    Args:
        folder: What it serves.
        delay_s: Seconds before each answer.

    Attributes:
        requests: (path, first byte, end) of every request that was answered with content.
        sent: Bytes of all bodies.
        most_shards: Requests for tar files after which it only answers 503; None has no end.
        faults: Faults of the next requests, first come first served: None for none, a status, ``cut`` (the
            connection is closed in the middle of the body), ``whole`` (ranges are ignored), ``slow``
            (a second late).
    """

    def __init__(self, folder: Path, delay_s: float = 0.0, port: int = 0) -> None:
        self.folder, self.delay_s = folder, delay_s
        self.requests: list[tuple[str, int, int]] = []
        self.sent = 0
        self.faults: list[int | str | None] = []
        self.most_shards: int | None = None
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def next_fault(self) -> int | str | None:
        with self._lock:
            if self.most_shards is not None and self.num_shard_requests >= self.most_shards:
                return 503
            return self.faults.pop(0) if self.faults else None

    @property
    def num_shard_requests(self) -> int:
        return sum(path.endswith(".tar") for path, _, _ in self.requests)

    def note(self, path: str, start: int, stop: int) -> None:
        with self._lock:
            self.requests.append((path, start, stop))
            self.sent += stop - start


class _Handler(BaseHTTPRequestHandler):
    owner: ObjectServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fault = self.owner.next_fault()
        time.sleep(1.0 if fault == "slow" else self.owner.delay_s)
        path = self.owner.folder / self.path.lstrip("/")
        if isinstance(fault, int) or not path.is_file():
            self._head(fault if isinstance(fault, int) else 404, 0)
            return
        size = os.path.getsize(path)
        start, stop, status = 0, size, 200
        if (asked := self.headers.get("Range")) is not None and fault != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last) + 1 if last else size), 206
        if start >= size:
            self._head(416, 0)
            return
        self._head(status, stop - start)
        if self.command == "HEAD":
            return
        with path.open("rb") as file, contextlib.suppress(ConnectionError):
            file.seek(start)
            body = file.read(stop - start)
            if fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.owner.note(self.path, start, stop)  # first: a client that has the body may look at once
            self.wfile.write(body)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()


def main() -> None:
    """Serve a folder until killed: ``python -m tests.object_server FOLDER [PORT] [DELAY_S]``."""
    import sys

    folder, port, delay_s = Path(sys.argv[1]), *([*map(float, sys.argv[2:]), 0.0, 0.0][:2])
    server = ObjectServer(folder, delay_s, int(port))
    print(server.url, flush=True)
    server._thread.join()


if __name__ == "__main__":
    main()
