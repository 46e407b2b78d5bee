"""The fuzzer: a few of its mutations, and that what it should count as a failure is one."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from tools import fuzz
from vdit.errors import UserError

QUICK = (
    "mp4", "gif", "png", "jsonl", "csv", "shots", "cache", "cache_json", "lora", "names", "flags",
    "tar", "parquet",
)  # fmt: skip


def test_mutations_end_in_what_was_read_or_one_line() -> None:
    said: list[str] = []
    counts, failures = fuzz.fuzz(QUICK, 20 * len(QUICK), 7, said.append)
    assert not failures, failures
    assert all(sum(row.values()) == 20 for row in counts.values())
    total = sum(counts.values(), fuzz.Counter())
    assert total["read"] > 5 and total["refused"] > 50
    assert fuzz.table(counts).splitlines()[-1].startswith(f"| all | {20 * len(QUICK)} |")


@pytest.mark.parametrize(
    ("raised", "what"),
    [
        (None, "read"),
        (UserError("no such film"), "refused"),
        (UserError("no such\nfilm"), "failed"),
        (OverflowError("too large"), "failed"),
        (RecursionError(), "failed"),
    ],
)
def test_what_counts_as_a_failure(tmp_path: Path, raised: Exception | None, what: str) -> None:
    def read(folder: Path) -> None:
        if raised is not None:
            raise raised

    outcome = fuzz.attempt(fuzz.Kind(lambda folder: [], read), tmp_path)
    assert outcome.what == what and ("\n" not in outcome.why)


def test_a_process_that_ends_or_hangs_is_a_failure_and_is_replaced() -> None:
    trier = fuzz.Trier(0)
    try:
        assert trier.run("jsonl", 0).what in ("read", "refused")
        trier.process.kill()
        trier.process.join()
        first = trier.process
        assert trier.run("jsonl", 1).what in ("read", "refused") and trier.process is not first
        trier.patience = 0.0  # no answer is as quick as that
        assert trier.run("jsonl", 2) == ("failed", "no answer in 0 s")
    finally:
        trier.close()


def test_mutations_change_most_files_and_come_again() -> None:
    data = bytes(range(256)) * 4
    made = [fuzz.mutate(data, np.random.default_rng(seed), False) for seed in range(50)]
    again = [fuzz.mutate(data, np.random.default_rng(seed), False) for seed in range(50)]
    assert made == again and sum(one != data for one in made) > 40


def test_a_mended_png_is_read_where_its_pixels_were_changed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = fuzz.Case("png", Path(folder) / "png")
        (path,) = case.good
        data = bytearray(case.good[path])
        at = data.index(b"IHDR") + 8 + 3  # the height's last byte
        data[at] -= 1
        path.write_bytes(data)
        assert fuzz.attempt(case.kind, case.folder).what == "refused"
        path.write_bytes(fuzz.mend_png(bytes(data)))
        assert fuzz.attempt(case.kind, case.folder).what == "read"


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [("--only=tiff", "known are mp4"), ("--mutations=0", "1 and more"), ("--at=x", "invalid int")],
)
def test_wrong_flags_are_one_line(
    flag: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.main([flag]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and allowed in said
