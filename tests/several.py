"""Starting several processes on this machine, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from cheap import FLAGS

ROOT = Path(__file__).parents[1]
LIMIT = 3000  # seconds for what takes a few: the machine may be busy


HELD: list[socket.socket] = []


def free_port() -> int:
    """A port for a server of gRPC, which shares it with this process; nobody else is given it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("", 0))
    HELD.append(held)
    return held.getsockname()[1]


def start(
    program: list[str], count: int, *args: str, devices: int = 1, toy: str = ""
) -> list["subprocess.Popen[str]"]:
    """`program` in so many processes of so many devices; one process is told nothing of others."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TOY": toy}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    port, pipe = free_port(), subprocess.PIPE
    started = []
    for index in range(count):
        command = [sys.executable, *program, *args]
        if count > 1:
            told = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process": index}
            command += [f"--{name}={value}" for name, value in told.items()]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)
        )
    return started


def finish(started: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=LIMIT)
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended
