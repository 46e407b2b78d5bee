"""The score table of one or more workdirs, as Markdown: `python -m tools.table WORKDIR ...`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdit.errors import UserError
from vdit.runtime.metrics import read

COLUMNS = ("colour", "shape", "size", "motion", "permanence", "every_attribute")
SPLITS = ("real", "reconstructed", "generated")
OBJECTS = ("one", "two", "all")


def cell(row: dict[str, Any], name: str) -> str:
    """A score with its 95% interval."""
    value = row.get(name)
    if value is None:
        return "–"
    text = f"{value:.2f}"
    if row["split"] == "generated" and row.get(f"{name}_low") is not None:
        text += f" ({row[f'{name}_low']:.2f}–{row[f'{name}_high']:.2f})"
    return text


def table(workdirs: Sequence[Path]) -> str:
    """Rows of the newest evaluation of each workdir; gravity is the median relative error."""
    heads = ["run", "clips", "objects", "n", *(name.replace("_", " ") for name in COLUMNS)]
    lines = ["| " + " | ".join([*heads, "gravity error"]) + " |"]
    lines.append("|" + "---|" * (len(heads) + 1))
    for workdir in workdirs:
        rows = {
            (row["split"], row["objects"]): row
            for row in read(workdir)
            if row["stage"] == "eval" and "split" in row
        }
        if not rows:
            raise UserError(f"{workdir}: no scores in metrics.jsonl; run the stage eval first")
        for split in SPLITS:
            for objects in OBJECTS:
                row = rows.get((split, objects))
                if row is None:
                    continue
                gravity = row.get("gravity_error_median")
                cells = [workdir.name, split, objects, str(row["clips"])]
                cells += [cell(row, name) for name in COLUMNS]
                cells.append("–" if gravity is None else f"{100 * gravity:.1f}%")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table; a workdir without scores is one line and exit status 2."""
    try:
        if not argv:
            raise UserError("usage: python -m tools.table WORKDIR ...")
        print(table([Path(name) for name in argv]))
        return 0
    except UserError as error:
        print(f"vdit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
