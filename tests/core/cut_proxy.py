"""A TCP proxy that cuts connections in the middle of an answer, delays answers, and notes what was asked."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from contextlib import suppress

_ASKED = re.compile(rb"^(GET|HEAD) (\S+) HTTP", re.MULTILINE)


class CutProxy:
    """Stands before the server at `port`; `cut(n_bytes, times)` ends each of the next `times` big answers early."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._lock = threading.Lock()
        self._cuts_left = self._cut_after = 0
        self.hold = threading.Event()
        """While set, big answers stop after their first bytes."""
        self.asked: Counter[str] = Counter()
        """GET requests by path."""
        self.n_cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self, n_bytes: int, times: int) -> None:
        with self._lock:
            self._cut_after, self._cuts_left, self.n_cut = n_bytes, times, 0

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(client, server), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        while data := _received(client):
            for verb, path in _ASKED.findall(data):
                if verb == b"GET":
                    with self._lock:
                        self.asked[path.decode().partition("?")[0]] += 1
            server.sendall(data)
        _end(server)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        n_sent = 0
        while data := _received(server):
            n_sent += len(data)
            with self._lock:
                cut = self._cuts_left > 0 and n_sent > self._cut_after
                self._cuts_left -= cut
                self.n_cut += cut
            if cut:
                break
            while n_sent > 4096 and self.hold.is_set():
                threading.Event().wait(0.01)
            try:
                client.sendall(data)
            except OSError:
                break
        _end(client)
        _end(server)


def _received(s: socket.socket) -> bytes:
    try:
        return s.recv(16 << 10)
    except OSError:
        return b""


def _end(s: socket.socket) -> None:
    with suppress(OSError):
        s.shutdown(socket.SHUT_RDWR)
    s.close()
