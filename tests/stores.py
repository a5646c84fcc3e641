"""A store for tests: moto's S3 in a thread, which counts requests, and fails, dawdles or cuts short to order."""

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from werkzeug.serving import make_server


class Store:
    """Attributes:
    url: of the server.
    log: (method, path, range) of each request.
    fault: for such a request, None or what goes wrong: '503' or another status, 'cut' (the connection ends in the
        middle), 'short' (a whole answer with half of the bytes), or seconds to wait.
    """

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server", reason="the package moto[s3], with flask, is not installed")
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.log: list[tuple[str, str, str]] = []
        self.fault: Callable[[str, str, str], str | float | None] = lambda *request: None
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def count(self, ending: str, method: str = "GET") -> int:
        """Requests for objects whose names end like this."""
        return sum(path.endswith(ending) for kind, path, _ in self.log if kind == method)

    def put(self, root: Path) -> None:
        """Puts the files of a folder into s3://bucket/d."""
        fs = fsspec.filesystem("s3")
        if not fs.exists("bucket"):
            fs.mkdir("bucket")
        for path in root.rglob("*"):
            if path.is_file():
                fs.put_file(str(path), f"bucket/d/{path.relative_to(root)}")

    @contextmanager
    def failing(self, fault: Callable[[str, str, str], str | float | None]) -> Iterator[None]:
        self.fault, before = fault, self.fault
        try:
            yield
        finally:
            self.fault = before

    def _answer(self, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")
        self.log.append(request)
        fault = self.fault(*request)
        if fault in ("cut", "short") and request[0] == "HEAD":
            fault = None
        if isinstance(fault, (int, float)):
            time.sleep(fault)
        if fault is None or isinstance(fault, (int, float)):
            return self._app(environ, start_response)
        if fault.isdigit():
            start_response(f"{fault} No", [("Content-Length", "0")])
            return [b""]
        head = []
        body = b"".join(self._app(environ, lambda status, headers, *_: head.extend((status, headers))))
        half = body[: len(body) // 2]
        status, headers = head
        if fault == "short":
            headers = [(key, str(len(half)) if key.lower() == "content-length" else value) for key, value in headers]
        start_response(status, headers)
        return [half]


@contextmanager
def children(count: int, function: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `function` gives in so many forked processes that run at the same time."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=lambda: queue.put(function())) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield [queue.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
