"""What the flags of all tools share: a wrong one is one line."""

import argparse
from typing import NoReturn

from vdit.data.decode import one_line
from vdit.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)}; see --help")
