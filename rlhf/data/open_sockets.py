"""The open connections of an HTTP client, so that requests which wait for an answer can be ended."""

import contextlib
import socket
import threading
import weakref
from collections.abc import Mapping
from typing import Any

# A connection over TLS has a socket of its own in place of the first one.
_OPENED = ("connection.connect_tcp.complete", "connection.start_tls.complete")


class OpenSockets:
    """Learns of connections by the ``trace`` extension of an HTTP client.

    Closing a client does not wake a thread that waits for an answer; shutting its socket down does.
    """

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember the socket of a new connection.

        Args:
            event: what the client does.
            info: ``return_value`` is the stream of a new connection.
        """
        if event not in _OPENED:
            return
        connection = info["return_value"].get_extra_info("socket")
        with self._lock:
            self._sockets.add(connection)

    def shut_down(self) -> None:
        """End all connections: whoever waits for an answer there gets an error, and the server sees the end."""
        with self._lock:
            for connection in list(self._sockets):
                # It may be closed already.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
