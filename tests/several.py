"""Starts programs in several processes on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from cheap import FLAGS

ROOT = Path(__file__).parents[1]
LIMIT = 3000  # seconds; generous, because the machine may be busy


HELD: list[socket.socket] = []  # open until the tests end


def free_port() -> int:
    """A port for JAX's coordinator, held until then: gRPC may share it (SO_REUSEPORT), and the
    system gives it to no other program."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("", 0))
    HELD.append(held)
    return held.getsockname()[1]


def start(
    program: list[str], count: int, *args: str, devices: int = 1, toy: str = ""
) -> list["subprocess.Popen[str]"]:
    """Starts `program` in `count` processes of `devices` devices each; flags connect them."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TOY": toy}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    port, pipe = free_port(), subprocess.PIPE
    started = []
    for index in range(count):
        command = [sys.executable, *program, *args]
        if count > 1:
            flag = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process": index}
            command += [f"--{name}={value}" for name, value in flag.items()]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)
        )
    return started


def finish(started: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each."""
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=LIMIT)
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended
