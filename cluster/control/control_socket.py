"""How commands talk to the process that runs a cluster: JSON lines over a unix socket.

One line asks; any number of lines answer, the last one with `done` or `error`. The socket stands in
a directory of its own that only its owner can enter, under a short path, since the kernel's limit
for such addresses is 108 bytes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cluster.base.errors import InternalError, PenstockError, UnavailableError, error_from_dict
from cluster.base.own_folder import OwnFolder, remove_left_folders

MAX_LINE_BYTES = 1 << 20
Tell = Callable[[dict[str, Any]], None]
"""Sends one line of the answer; does nothing once the asker is gone."""
Answer = Callable[[dict[str, Any], Tell], None]
"""Does what a question asks; a `PenstockError` becomes the last line."""


class ControlServer:
    """Answers questions, each in a thread of its own, from construction until `close`.

    What processes that were killed have left in the temporary directory goes at its start.
    """

    def __init__(self, answer: Answer) -> None:
        remove_left_folders()
        self._folder = OwnFolder("control")
        self.path = str(self._folder.path / "control")
        self._server = _Server(self.path, answer)
        threading.Thread(
            target=self._server.serve_forever, name="control-socket", daemon=True
        ).start()

    def close(self) -> None:
        """Take no more questions; one that is being answered goes on."""
        self._server.shutdown()
        self._server.server_close()
        self._folder.close()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, answer: Answer) -> None:
        self.answer = answer
        super().__init__(path, _Asker)


class _Asker(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        """One question to its end."""
        try:
            question = json.loads(self.rfile.readline(MAX_LINE_BYTES))
            self.server.answer(question, self._tell)
            self._tell({"done": True})
        except PenstockError as error:
            self._tell({"error": error.to_dict()})
        except Exception as error:
            fault = InternalError(f"{type(error).__name__}: {error}")
            self._tell({"error": fault.to_dict()})

    def _tell(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who asked has left; the work goes on
            self.wfile.write(json.dumps(line).encode() + b"\n")


def ask(path: str, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines that answer a question, as they come.

    Raises:
        UnavailableError: nobody answers at `path`, or stops in the middle.
        PenstockError: what the other side raised.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(path)
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for raw in lines:
                    line: dict[str, Any] = json.loads(raw)
                    if "error" in line:
                        raise error_from_dict(line["error"])
                    if "done" in line:
                        return
                    yield line
        except OSError as error:
            raise UnavailableError(
                f"The process that runs the cluster does not answer: {error}.",
                "`penstock status` says whether it runs.",
            ) from error
    raise UnavailableError(
        "The process that runs the cluster ended before it had answered.",
        "`penstock status` says what is left; its log says why.",
    )
