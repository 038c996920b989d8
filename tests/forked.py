"""Processes forked from a server that has imported everything: importing takes longer than what most of them do."""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["run_reward", "run_preference", "alignment.sampling.sample_file", "tests.launch_runs", "tests.engine",
     "tests.trainers", "tests.forked"]
)  # fmt: skip


def start(target: Callable[..., Any], *args: Any, log: str | Path = os.devnull, daemon: bool = True) -> BaseProcess:
    """Calls a function in a new process, whose output goes to a file. (A daemon may start none by multiprocessing.)"""
    child = CHILDREN.Process(target=_call, args=(target, args, str(log)), daemon=daemon)
    child.start()
    return child


def _call(target: Callable[..., Any], args: tuple[Any, ...], log: str) -> None:
    gc.freeze()  # what the server imported is no garbage
    with open(log, "a", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    target(*args)


def draw_nothing(replace: Callable[..., None] = setattr) -> None:
    """Runs write no report from here on: drawing one takes longer than a tiny run."""
    for module in ("alignment.report.callback", "alignment.job"):
        if module in sys.modules:
            replace(sys.modules[module], "write_report", lambda *args, **settings: None)


def run_as_main(argv: list[str]) -> None:
    """What `python FILE ARGUMENTS...` does, or `python -m MODULE ARGUMENTS...`."""
    draw_nothing()
    sys.argv[:] = argv[argv[0] == "-m" :]
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


#: Stands for the interpreter: the server forks a process that has its files, folder, environment and arguments.
CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1] == "-c":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"0"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit((server.recv(1) or b"x")[0])  # no code: it was killed
"""


def write_client(path: Path, address: str) -> str:
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)
    return str(path)


def serve(address: str) -> None:
    """Runs scripts for clients, each in a process of its own, for as long as it is left alive."""
    children: set[int] = set()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            client, _ = server.accept()
            children = {child for child in children if not os.waitpid(child, os.WNOHANG)[0]}
            child = os.fork()
            if not child:
                server.close()
                client.sendall(bytes([_answer(client)]))
                os._exit(0)
            client.close()
            children.add(child)


def _answer(client: socket.socket) -> int:
    """Runs what a client asks for; returns the exit code."""
    _, files, *_ = socket.recv_fds(client, 1, 3)
    for place, file in enumerate(files):
        os.dup2(file, place)
    argv, folder, env = json.loads(client.makefile("rb").read())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    try:
        run_as_main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
