"""Captioned films in tables: Parquet files, and folders that the library `datasets` saved.

A row has a film, its bytes or the path of its file, and a caption. pyarrow reads both; a table is
never held in memory, and its films are read in the order of their rows.
"""

import ast
import collections
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vdit.data.captions import Row, Skipped, checked_caption
from vdit.data.decode import one_line, said
from vdit.data.shards import Index, Shards, shard_paths
from vdit.errors import UserError

BATCH = 16  # rows that are read at once
# Names of columns, the first that a table has, where the configuration gives none.
FILMS = ("video", "mp4", "webm", "film", "clip", "image", "png", "jpg", "bytes")
PATHS = ("video", "path", "video_path", "file", "file_name", "filename", "image")
CAPTIONS = ("caption", "text", "prompt", "txt")
ROW = "\0row"  # a column for the number of a row, beside those of a user


class Table(NamedTuple):
    """How a kind of file is read."""

    schema: Callable[[Path], Any]  # pyarrow.Schema
    # (file, columns, row) -> (first row, pyarrow.RecordBatch) from about that row on
    batches: Callable[[Path, Sequence[str], int], Iterator[tuple[int, Any]]]


def pyarrow() -> Any:
    """The module, which is an optional dependency."""
    try:
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "data.source=parquet and data.source=datasets need pyarrow: pip install 'vdit[parquet]'"
        ) from None
    return pyarrow


class Tables(Shards):
    """The films of tables. `video_field` and `caption_field` name their columns; `filter` is a list
    of conditions on columns, as text, in the form of `pyarrow.parquet.filters_to_expression`."""

    def __init__(
        self, kind: str, path: str, files: Sequence[Path], cache: str | os.PathLike[str],
        table: Table, fields: tuple[str, str], filter: str,
    ) -> None:  # fmt: skip
        condition, self._filter = _Condition(filter) if filter else None, filter

        def build(file: Path) -> Index:
            with _reading(file):
                return _build(table, file, *fields, condition)

        super().__init__(
            kind, path, files, cache, build, _Cells(table, fields[0]), (*fields, filter)
        )

    def rows(self, strict: bool, skipped: Skipped) -> list[Row]:
        """See `captioned.Store`."""
        if self._filter and not self._rows and not self._wrong:
            raise UserError(f"{self.where}: data.filter={self._filter} leaves no row of it")
        return super().rows(strict, skipped)


class Parquet(Tables):
    """The films of the Parquet files that `path` names (`shard_paths`)."""

    def __init__(
        self, path: str, cache: str | os.PathLike[str], video_field: str = "",
        caption_field: str = "", filter: str = "",
    ) -> None:  # fmt: skip
        table, fields = Table(_parquet_schema, _parquet), (video_field, caption_field)
        files = shard_paths(path, ".parquet", "parquet")
        super().__init__("parquet", path, files, cache, table, fields, filter)


class Saved(Tables):
    """The films of a folder that `datasets` wrote by `save_to_disk`; `name` chooses a split."""

    def __init__(
        self, path: str, cache: str | os.PathLike[str], video_field: str = "",
        caption_field: str = "", filter: str = "", name: str = "",
    ) -> None:  # fmt: skip
        table, fields = Table(_stream_schema, _stream), (video_field, caption_field)
        files = saved_files(path, name)
        super().__init__("datasets", path, files, cache, table, fields, filter)


def saved_files(path: str, split: str) -> list[Path]:
    """The Arrow files of a folder of `save_to_disk`, in order; of one split, "train" by default."""
    folder, where = Path(path), f"data.path={one_line(path)}"
    if not path or "://" in path or not folder.is_dir():
        raise UserError(f"{where}: a folder that datasets' save_to_disk wrote is allowed")
    if (folder / "dataset_dict.json").exists():
        splits = _json(folder / "dataset_dict.json").get("splits")
        named = map(str, splits if isinstance(splits, list) else ())
        known = [x for x in named if Path(x).name == x and (folder / x).is_dir()]
        split = split or ("train" if "train" in known or len(known) != 1 else known[0])
        if split not in known:
            raise UserError(
                f"{where} has no split {split}; data.name chooses one of {', '.join(known)}"
            )
        folder = folder / split
    elif split:
        raise UserError(f"data.name={split}: {where} has no splits; leave data.name empty")
    if not (folder / "state.json").exists():
        raise UserError(f"{where}: no state.json in it, which datasets' save_to_disk writes")
    listed = _json(folder / "state.json").get("_data_files")
    files = listed if isinstance(listed, list) else []
    names = [str(x.get("filename")) if isinstance(x, dict) else "" for x in files]
    if not names or not all(name and Path(name).name == name for name in names):
        raise UserError(f"{one_line(str(folder))}/state.json lists no files of a data set")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{where}: {one_line(missing[0])} is missing; copy the folder again")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{one_line(str(path))}: not JSON ({said(error)})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{one_line(str(path))}: not a JSON object")
    return fields


def _parquet_schema(path: Path) -> Any:
    return pyarrow().parquet.read_schema(path)


def _parquet(path: Path, columns: Sequence[str], row: int) -> Iterator[tuple[int, Any]]:
    """Batches of a Parquet file, from the row group of `row` on."""
    with pyarrow().parquet.ParquetFile(path, buffer_size=1 << 20) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first + count <= row:
                first += count
                continue
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=list(columns)):
                yield first, batch
                first += batch.num_rows


def _stream_schema(path: Path) -> Any:
    arrow = pyarrow()
    with arrow.memory_map(str(path)) as file:
        return arrow.ipc.open_stream(file).schema


def _stream(path: Path, columns: Sequence[str], row: int) -> Iterator[tuple[int, Any]]:
    """Batches of an Arrow stream."""
    arrow = pyarrow()
    with arrow.memory_map(str(path)) as file:
        first = 0
        for batch in arrow.ipc.open_stream(file):
            if first + batch.num_rows > row:
                yield first, batch.select(list(columns))
            first += batch.num_rows


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes pyarrow's errors a `UserError` with the path."""
    arrow, shown = pyarrow(), one_line(str(path))
    try:
        yield
    except UserError:
        raise
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        why = said(error).strip("'")
        raise UserError(
            f"{shown}: not a table that can be read ({why}); copy it again, or leave it out"
        ) from None


class _Condition:
    """A filter of rows: pyarrow's expression, and the columns that it reads."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            value = ast.literal_eval(text)
            self.expression = pyarrow().parquet.filters_to_expression(value)
            groups = [value] if isinstance(value[0], tuple) else value
            self.columns = {str(each[0]) for group in groups for each in group}
        except UserError:
            raise
        except Exception as error:  # of either parser, for any text
            raise UserError(
                f"data.filter={one_line(text)}: no list of conditions that pyarrow reads, such as"
                f" [('seconds', '>', 2)] ({said(error)})"
            ) from None

    def kept(self, path: Path, table: Any) -> Any:
        """The rows of a table that it keeps."""
        arrow = pyarrow()
        try:
            return table.filter(self.expression)
        except (arrow.ArrowException, TypeError, ValueError) as error:
            raise UserError(
                f"data.filter={one_line(self.text)} does not fit the columns of"
                f" {one_line(str(path))} ({said(error)})"
            ) from None


def _build(
    table: Table, path: Path, video: str, caption: str, condition: _Condition | None
) -> Index:
    """The index of a file."""
    arrow, where, schema = pyarrow(), one_line(str(path)), table.schema(path)
    video, caption = _video_column(where, schema, video), _caption_column(where, schema, caption)
    tested = condition.columns if condition else set()
    if unknown := sorted(tested - set(schema.names)):
        raise UserError(
            f"data.filter names the column {one_line(unknown[0])}; {where} has {_shown(schema)}"
        )
    columns = list(dict.fromkeys([caption, *sorted(tested)]))
    batches = [batch for _, batch in table.batches(path, columns, 0)]
    whole = arrow.Table.from_batches(batches, arrow.schema([schema.field(x) for x in columns]))
    if len(whole) and whole[caption].null_count == len(whole):
        raise UserError(
            f"{where}: the column {caption} holds nulls alone; data.caption_field names another of"
            f" {_shown(schema)}"
        )
    whole = whole.append_column(ROW, arrow.array(range(len(whole)), arrow.int64()))
    kept = condition.kept(path, whole) if condition else whole
    types = f"{video}: {_type(schema, video)}, {caption}: {_type(schema, caption)}"
    index = Index({}, [], [], [], f"the columns {types}")
    captions: dict[int, str] = {}
    for row, cell in zip(kept[ROW].to_pylist(), kept[caption], strict=True):
        try:
            captions[row] = checked_caption("the column " + caption, cell.as_py())
        except UnicodeDecodeError as error:
            index.wrong.append((_name(row), f"{caption} is not UTF-8 (byte {error.start})"))
        except UserError as error:
            index.wrong.append((_name(row), str(error)))
    _add_films(table, path, video, captions, index)
    return index


def _add_films(
    table: Table, path: Path, video: str, captions: dict[int, str], index: Index
) -> None:
    """Adds the films of the rows of `captions` to an index."""
    filled = not captions
    for first, batch in table.batches(path, [video], 0):
        for at, cell in enumerate(batch.column(0)):
            row, name = first + at, _name(first + at)
            value = _film(cell)
            filled = filled or value is not None
            if row not in captions:
                continue
            if isinstance(value, bytes):
                index.films[name] = row, hashlib.sha256(value).hexdigest()
                index.captions.append((name, name, captions[row]))
            elif value and "://" not in value and value.isprintable():
                file = str(path.parent / value)
                index.captions.append((name, file, captions[row]))
            else:
                why = f"{video} is no path of this machine" if value else f"{video} is empty"
                index.wrong.append((name, why))
    if not filled:
        raise UserError(f"{one_line(str(path))}: the column {video} holds nulls alone")


def _name(row: int) -> str:
    """What a row is called: names are in the order of the rows."""
    return f"row {row:07d}"


def _film(cell: Any) -> bytes | str | None:
    """A film's bytes, or the path of its file."""
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        return None
    if isinstance(value, dict):  # datasets' Video and Image
        value = value.get("bytes") or value.get("path")
    return value or None


class _Cells:
    """Reads a film of a table. Rows that rise, or fall by little, are read in one pass."""

    def __init__(self, table: Table, video: str) -> None:
        self._table, self._video = table, video
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._rest: Iterator[tuple[int, Any]] = iter(())
        self._last: collections.deque[tuple[int, Any]] = collections.deque(maxlen=3)

    def __call__(self, path: Path, row: int) -> Iterable[bytes]:
        with self._lock, _reading(path):
            value = self._cell(path, int(row))
        return [value] if isinstance(value, bytes) else []  # another digest is refused

    def _cell(self, path: Path, row: int) -> bytes | str | None:
        if path != self._path or (self._last and row < self._last[0][0]):
            self._path = None  # until it could be opened
            schema = self._table.schema(path)
            video = _video_column(one_line(str(path)), schema, self._video)
            self._rest = self._table.batches(path, [video], row)
            self._last.clear()
            self._path = path
        while True:
            for first, batch in self._last:
                if first <= row < first + batch.num_rows:
                    return _film(batch.column(0)[row - first])
            if (following := next(self._rest, None)) is None:
                self._path = None
                return None
            self._last.append(following)


def _video_column(where: str, schema: Any, given: str) -> str:
    """The column of films: the one that is given, or the first by its name and type."""
    types = pyarrow().types
    kinds = {field.name: _kind(types, field.type) for field in schema}
    stored = [name for name, kind in kinds.items() if kind == "bytes"]
    named = [name for name in FILMS if name in stored]
    named += stored if len(stored) == 1 else []
    named += [name for name in PATHS if kinds.get(name) == "text" and not stored]
    found = [given] if kinds.get(given) else [] if given else named
    if not found:
        what = f"column {one_line(given)} of films" if given else "column that is known to be films"
        raise UserError(
            f"{where}: no {what}, bytes or paths; data.video_field names one of {_shown(schema)}"
        )
    return found[0]


def _caption_column(where: str, schema: Any, given: str) -> str:
    """The column of captions, of text: the one that is given, or the first by its name."""
    types = pyarrow().types
    texts = {field.name for field in schema if _kind(types, field.type) == "text"}
    found = [name for name in ([given] if given else CAPTIONS) if name in texts]
    if not found:
        what = given or " or ".join(CAPTIONS)
        raise UserError(
            f"{where}: no column {one_line(what)} of text; data.caption_field names one of"
            f" {_shown(schema)}"
        )
    return found[0]


def _kind(types: Any, kind: Any) -> str:
    """ "bytes", "text", or nothing for other types of a column."""
    if types.is_struct(kind):  # of datasets' Video and Image
        return "bytes" if {"bytes", "path"} <= {field.name for field in kind} else ""
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "bytes"
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return "text" if text else ""


def _type(schema: Any, name: str) -> str:
    return one_line(str(schema.field(name).type), 60)


def _shown(schema: Any) -> str:
    """The columns of a table and their types."""
    return one_line(", ".join(f"{field.name} ({field.type})" for field in schema))
