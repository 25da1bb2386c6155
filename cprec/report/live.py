"""A run's page while the run goes on: a small server on this machine alone, which makes the page when it is asked for.

reads: the run folder, at every request after something in it changed. writes: nothing. Listens on 127.0.0.1: from
elsewhere through an SSH tunnel. Ends with Ctrl-C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cprec.errors import ConfigError, CPRecError
from cprec.log import get_logger
from cprec.process import is_being_written
from cprec.report import markup as m
from cprec.report.page import run_page

log = get_logger(__name__)
WATCHED = ("metrics.jsonl", "starts.jsonl", "checkpoints", "branches", "eval/*", "hang")
"""What the page follows from and what changes while a run goes on."""
Page = Callable[[], str]


class PageServer(ThreadingHTTPServer):
    """Serves one page at `url`. Raises ConfigError when the port is taken; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, make: Page, *, port: int) -> None:
        self.make = make
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as e:
            raise ConfigError(f"--port {port}: {e}; give another, or 0 for a free one") from None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)  # another site's name that was made to lead here
            return
        if self.path.partition("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = self.server.make().encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line each."""


def page_of(folder: Path, *, refresh_s: float) -> Page:
    """What makes the run's page, anew only when something in its folder has changed. A run that cannot be read in this
    moment gives a page that says so, and asks again."""
    lock = threading.Lock()
    state: list[int] | None = None
    page = ""

    def make() -> str:
        nonlocal state, page
        with lock:
            now = _state_of(folder)
            if now != state:
                try:
                    page, state = run_page(folder, refresh_s=refresh_s), now
                except (CPRecError, OSError) as e:
                    log.warning("%s", e)
                    return m.page("not readable now", [m.paragraph(str(e), kind="bad")], refresh_s=refresh_s)
            return page

    return make


def _state_of(folder: Path) -> list[int]:
    """Times of change, and whether somebody writes there: who is killed leaves no other trace."""
    paths = [p for pattern in WATCHED for p in sorted(folder.glob(pattern))]
    return [int(is_being_written(folder)), *(p.stat().st_mtime_ns for p in paths if p.exists())]
