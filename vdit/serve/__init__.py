"""`vdit serve`: a page to play with, and the same over HTTP as JSON (docs/serve.md).

`folder` keeps results and uploads, `queue` runs one request at a time, `requests` checks what was
asked for, `work` generates it, `guard` says who may ask, `http` has the addresses, `start` listens.
`guard`, `requests`, `http` and `start` need the extra web; nothing outside of this room imports it.
"""

import importlib.util

from vdit.errors import UserError

NEEDED = ("fastapi", "uvicorn", "python_multipart")


def check_installed() -> None:
    """Refuses (UserError) to serve without the extra web."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"vdit serve needs {', '.join(missing)}: pip install 'vdit[web]'")
