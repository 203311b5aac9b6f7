"""Text files of the user's, line by line: a newline ends a line and nothing else does, a byte order mark is no text.

    for number, line in read_lines("prompts.txt"): ...             # blank lines are left out, numbers count them
    for where, row in read_json_lines("metadata.jsonl", "text"): ...  # objects whose "text" is a string
    for where, row in read_rows("table.tsv"): ...                  # .jsonl, .csv, .tsv or .parquet, a dictionary a row
    text = read_text("book.txt")                                   # the whole, by the same rules

`str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which captions may hold. `where` names file and
line for messages.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, first_line
from common.files import list_files
from common.processes import say_once


def read_lines(path: str | Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line without its `\n` or `\r\n`) of a UTF-8 file, with or without a byte order mark.

    Args:
        blank: give lines of nothing but spaces too.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8; named.
    """
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    line = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} line {number}: not UTF-8 text ({error.reason}); convert the file"
                    ) from None
                if blank or line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file without its byte order mark, lines ended by newlines alone.

    Raises:
        UserError: as `read_lines`.
    """
    return "".join(line + "\n" for _, line in read_lines(path, blank=True))


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        UserError: it has none, or as `read_lines`.
    """
    prompts = [line.strip() for _, line in read_lines(path)]
    if not prompts:
        raise UserError(f"{path}: no prompt in it; expected one a line")
    return prompts


def prompts_of(given: Sequence[str] | None, file: Path | None, example: str) -> list[str]:
    """The prompts of `--prompt`, then those of `--prompts FILE`.

    Args:
        example: of a prompt, for the message where there is none.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    found = [*(given or ()), *(read_prompts(file) if file is not None else ())]
    if not found:
        raise UserError(f'--prompt is missing, for example --prompt "{example}" (or --prompts FILE, one a line)')
    return found


def text_files(path: Path) -> list[Path]:
    """A text file, or the .txt files below a folder in the order of their names; others are said to be passed over."""
    if not path.is_dir():
        return [path]
    files = list_files(path)
    others = [file.relative_to(path).as_posix() for file in files if file.suffix.lower() != ".txt"]
    if others:
        listed = ", ".join(others[:3]) + (", ..." if others[3:] else "")
        say_once(f"{path}: {len(files) - len(others)} .txt files; {len(others)} files passed over: {listed}")
    return [file for file in files if file.suffix.lower() == ".txt"]


def read_json_lines(path: str | Path, *strings: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", object) of every line that is not blank.

    Args:
        strings: keys that every object must have, with a string as value.

    Raises:
        UserError: naming the line: not UTF-8, not JSON (NaN and Infinity are none), nested beyond reading, half a
            surrogate pair, no object, or a key of `strings` missing.
    """

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    for number, line in read_lines(path):
        where = f"{path} line {number}"
        try:
            row = json.loads(line, parse_constant=no_number)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # an escape may stand for half a surrogate pair
        except RecursionError:
            raise UserError(f"{where}: nested too deeply") from None
        except UnicodeEncodeError:
            raise UserError(f"{where}: it holds half a surrogate pair (\\ud800 to \\udfff), which is no text") from None
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected an object like {{"file_name": "a.png", "text": "a cat"}}')
        for key in strings:
            if key not in row:
                raise UserError(f'{where}: "{key}" is missing')
            if not isinstance(row[key], str):
                raise UserError(f'{where}: "{key}" must be a string, got {row[key]!r}')
        yield where, row


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", row by column) of a .jsonl, .csv, .tsv (no quoting) or .parquet file.

    Cells of .csv and .tsv are strings, and None where a line ends early.

    Raises:
        UserError: another suffix, or what is wrong, by line.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        yield from read_json_lines(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in (".csv", ".tsv"):
        names: list[str] = []
        for number, cells in (_csv_cells if suffix == ".csv" else _tsv_cells)(path):
            where = f"{path} line {number}"
            if not names:
                names = [cell.strip() for cell in cells]
                found = [sign for sign in _OTHER_SIGNS[suffix] if sign in names[0]]
                if len(names) == 1 and found:
                    raise UserError(f"{where}: cells parted by {found[0]!r}; expected {_SIGN[suffix]!r} in a {suffix}")
            elif len(cells) > len(names):
                named = ", ".join(names)
                raise UserError(f"{where}: {len(cells)} cells, but the first line names {len(names)} columns ({named})")
            else:
                yield where, dict(zip(names, [*cells, *[None] * (len(names) - len(cells))]))
    else:
        raise UserError(f"{path}: expected a file that ends in .jsonl, .csv, .tsv or .parquet")


_SIGN = {".csv": ",", ".tsv": "\t"}
_OTHER_SIGNS = {".csv": ";\t|", ".tsv": ",;|"}


def _tsv_cells(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in read_lines(path))


def _csv_cells(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters is less than a long document
    reader = csv.reader(line + "\n" for _, line in read_lines(path, blank=True))
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not a row of a .csv file ({error})") from None


def _parquet_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a string in it is not UTF-8 ({error.reason})") from None
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)}); fetch it again") from None
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row
