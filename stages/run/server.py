"""An OpenAI-compatible server of the consolidated model: found on this machine, and started.

Servers are large and pin their own PyTorch, so they live in environments of their own: nothing is
installed here, and the program is looked up on the PATH and beside this Python.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages.run.errors import InputError
from stages.run.guard import become
from stages.run.server_address import is_loopback
from stages.run.settings import Settings

_HAS = "import sys; from importlib.util import find_spec; [find_spec(n) or sys.exit(1) for n in {}]"


@dataclass(frozen=True)
class Server:
    """`modules`: what the program's Python must have. `install`: how to get it, as the end of a
    sentence. `environment`: variables that the user has not set. `note`: what to expect."""

    name: str
    command: list[str]
    modules: tuple[str, ...]
    install: str
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def start(server: Server, settings: Settings) -> None:
    """Become the server. Raises InputError where it is not installed, or cannot listen."""
    print(f"$ {shlex.join(server.command)}", flush=True)
    program = find_program(server)
    if program is None:
        raise InputError(f"{server.name} is not installed: {server.install}")
    _refuse_port(settings.serve_host, settings.serve_port)
    if server.note:
        print(f"note: {server.note}", flush=True)
    if not is_loopback(settings.serve_host):
        print(
            f"warning: everyone who reaches SERVE_HOST={settings.serve_host} can ask this server: "
            "it has no users or passwords. Keep 127.0.0.1 and use ssh -L, or put a proxy before "
            "it.",
            file=sys.stderr,
        )
    become(program, server.command, {**server.environment, **os.environ})


def find_program(server: Server) -> str | None:
    """The path of the server's program, of an environment that has its modules."""
    name, *_ = server.command
    beside = Path(sys.executable).with_name(name)
    candidates = [shutil.which(name), str(beside) if os.access(beside, os.X_OK) else None]
    return next((path for path in candidates if path and _has(path, server.modules)), None)


def _has(program: str, modules: tuple[str, ...]) -> bool:
    """Whether the Python beside a program has `modules`; true where none is beside it."""
    python = Path(program).resolve().with_name("python")
    if not python.exists():
        return True
    code = _HAS.format(repr(modules))
    return subprocess.run([python, "-I", "-c", code], capture_output=True).returncode == 0


def _refuse_port(host: str, port: int) -> None:
    """Raise InputError where nothing can listen, before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"SERVE_HOST={host} SERVE_PORT={port}: nothing can listen there "
            f"({error.strerror or error}). Set another."
        ) from None
