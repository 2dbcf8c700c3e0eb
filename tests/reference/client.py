"""Call PyLate, which runs in a process and an environment of its own."""

import contextlib
import socket
import subprocess
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reference.environment import child_environment, pylate_python

SERVER = Path(__file__).with_name("pylate_server.py")
_LAST_BYTES = 4000


class PyLateError(RuntimeError):
    """A call failed in PyLate's process; the message holds the traceback from there."""


class PyLateReference:
    """One PyLate process that answers calls until it is closed.

    A single process serves a whole test session, as importing PyLate takes many seconds. The
    functions to call, and what each returns, are those of `pylate_server.py`.

    Args:
        python: The interpreter to run; by default that of the environment made for PyLate.
        timeout: The seconds a single call may take before the process is given up.
    """

    def __init__(self, python: Path | None = None, timeout: float = 600.0) -> None:
        python = python or pylate_python()
        self._timeout = timeout
        # What PyLate and its libraries print is kept aside, and shown only when the process dies.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [str(python), str(SERVER), str(theirs.fileno())],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self._receive("starting")
        except BaseException:
            self.close()
            raise

    def call(self, function: str, /, **kwargs: Any) -> Any:
        """Call a function of the server by its name and return what it returns.

        Args:
            function: The function's name.
            **kwargs: Its arguments: numpy arrays, strings, numbers, lists and dictionaries.

        Raises:
            PyLateError: The function raised, the process died, or the time ran out.
        """
        try:
            self._connection.send((function, kwargs))
        except OSError as error:  # closed, here or by the process's end
            raise PyLateError(f"{function}: {self._death()}") from error
        return self._receive(function)

    def close(self) -> None:
        """End the process. Closing twice does no harm."""
        self._connection.close()  # the server stops at the end of its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, function: str) -> Any:
        try:
            if not self._connection.poll(self._timeout):
                # A late answer would be taken for the next call's, so the process is of no use.
                self._process.kill()
                raise PyLateError(f"{function}: no answer in {self._timeout:.0f} s")
            succeeded, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise PyLateError(f"{function}: {self._death()}") from error
        if not succeeded:
            raise PyLateError(f"{function} raised in PyLate's process:\n{result}")
        return result

    def _death(self) -> str:
        """Say how the process ended and what it last printed."""
        if self._log.closed:
            return "PyLate's process was closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - _LAST_BYTES))
        printed = self._log.read().decode(errors="replace")
        return f"PyLate's process ended with status {self._process.returncode}:\n{printed}"
