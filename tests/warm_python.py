"""A Python in which modules are imported already: each program runs in a fork of it.

Importing JAX and what stands on it takes seconds, which dozens of programs would pay one by one.
`python warm_python.py SOCKET MODULE ...` imports the modules and waits; `call` has it run a program
as `python PROGRAM ARGUMENTS` or `python -c CODE` would, in a new process with the caller's folder,
environment and open files. Nothing is shared but what was imported: no device is touched before
the fork.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

BROKEN = 70  # the status where the warm Python gave no answer


def call(
    address: str, arguments: Sequence[str], executable: str, stdout: int = 1, stderr: int = 2
) -> int:
    """Runs a program and returns its exit status.

    Args:
      address: the warm Python's socket.
      arguments: the program and its arguments.
      executable: what the program finds as `sys.executable`, to start others with.
      stdout: file descriptor that gets what it prints.
      stderr: likewise.
    """
    files = {0: 0, 1: stdout, 2: stderr}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself is closed
            if number > 2 and os.get_inheritable(number):
                files[number] = number
    asked = {
        "arguments": list(arguments),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "executable": executable,
        "files": list(files),
    }
    data = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [struct.pack("!I", len(data))], list(files.values()))
        connection.sendall(data)
        answer = connection.recv(4)
    return struct.unpack("!i", answer)[0] if len(answer) == 4 else BROKEN


def serve(address: str, modules: Sequence[str]) -> dict[str, Any]:
    """Imports, then forks for each caller; returns in the fork, with what was asked for."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # who finds it can connect
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                sys.exit()  # it has ended, and with it whoever started this
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return answer(connection)


def answer(connection: socket.socket) -> dict[str, Any]:
    """Forks once more and returns there; the one that stays tells the caller how that one ended."""
    head, files, _, _ = socket.recv_fds(connection, 4, 64)
    data = b""
    while len(data) < struct.unpack("!I", head)[0]:
        data += connection.recv(1 << 16)
    program = os.fork()
    if program == 0:
        connection.close()
        asked: dict[str, Any] = json.loads(data)
        place(files, asked.pop("files"))
        return asked
    for file in files:
        os.close(file)
    ended = os.pidfd_open(program)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(program, signal.SIGKILL)  # the caller is gone
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    connection.sendall(struct.pack("!i", status if status >= 0 else 128 - status))
    os._exit(0)


def place(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Gives open files the numbers that they have in the caller."""
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def run(
    arguments: Sequence[str], folder: str, environment: dict[str, str], executable: str
) -> None:
    """Runs a program as the main module; processes that it starts by `sys.executable` are warm."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.executable = list(arguments), executable
    multiprocessing.set_executable(executable)
    own = environment.get("PYTHONPATH", "").split(os.pathsep)
    if arguments[0] == "-c":
        sys.path[:1] = ["", *filter(None, own)]
        code, sys.argv[1:2] = arguments[1], []
        exec(code, vars(sys.modules["__main__"]))
        return
    sys.path[:1] = [os.path.dirname(os.path.realpath(arguments[0])), *filter(None, own)]
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run(**serve(sys.argv[1], sys.argv[2:]))
