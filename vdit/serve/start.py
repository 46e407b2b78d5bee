"""The server: an address to listen on, a token where others reach it, the model, the page."""

import contextlib
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from vdit.errors import UserError
from vdit.runtime.progress import say
from vdit.serve.folder import Folder
from vdit.serve.guard import LOCAL, is_local
from vdit.serve.http import application
from vdit.serve.queue import Queue
from vdit.serve.work import Studio, named

TOKEN = re.compile(r"[A-Za-z0-9_-]{8,200}")  # what a cookie and an address take as it is

EVERYWHERE = ("0.0.0.0", "::")


def serve(load: Any, name: str, out: Path, request: Mapping[str, Any]) -> None:
    """Listens until it is stopped. load(FILES) gives the model `name` with these adapters."""
    host, token = request["host"], chosen_token(request["host"], request["token"])

    with contextlib.closing(listening(host, request["port"])) as listener:
        lora = named(request["lora"])
        plain = load(list(lora.values()))  # with all of them: a wrong file is refused at once
        with contextlib.closing(Folder(out)) as folder:
            run(Studio(plain, load, folder, lora, name), listener, host, token)


def run(studio: Studio, listener: socket.socket, host: str, token: str) -> None:
    """Answers on `listener`."""
    hosts = frozenset({*LOCAL, host.lower()}) if is_local(host) else None
    with Queue(studio.work, studio.warm) as queue:
        config = uvicorn.Config(
            application(studio, queue, hosts, token), log_level="warning", server_header=False,
            ws="none",
        )  # fmt: skip
        name = socket.gethostname() if host in EVERYWHERE else host
        shown = f"[{name}]" if ":" in name else name
        say(f"results in {studio.folder.root}")
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        say(f"open {address}{f'?token={token}' if token else ''} (Ctrl-C stops)")
        uvicorn.Server(config).run(sockets=[listener])


def chosen_token(host: str, given: str | None) -> str:
    """The token to ask for; none where only this machine reaches the page, unless one is given."""
    if given is None:
        return "" if is_local(host) else secrets.token_urlsafe(24)
    if not TOKEN.fullmatch(given):
        raise UserError("--token: 8 to 200 letters, digits, - and _ are allowed")
    return given


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; `UserError` where that cannot be."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port}: 0 to {2**16 - 1} is allowed")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on --host={host} --port={port}: {why}") from error
