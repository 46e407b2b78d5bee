"""A folder that one process holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from vdit.errors import UserError
from vdit.runtime.files import alone

HOLD = """
import sys, time
from pathlib import Path
from vdit.runtime.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another run"), alone(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
