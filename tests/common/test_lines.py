"""Lines of text files: only a newline ends one, a byte order mark is no text, every mistake names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data.lines import prompts_of, read_json_lines, read_lines, read_rows, read_text, text_files
from tests.refusals import refused

# What str.splitlines takes for line ends besides the newline.
ODD = "form\ffeed, next\x85line, separator\u2028here, paragraph\u2029there, tab\vvertical, file\x1cend, return\rin it"


def test_only_a_newline_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(("\ufefffirst\r\n" + ODD + "\n\n  \nlast \ufeff").encode())
    assert list(read_lines(path)) == [(1, "first"), (2, ODD), (5, "last \ufeff")]
    assert list(read_lines(path, blank=True)) == [(1, "first"), (2, ODD), (3, ""), (4, "  "), (5, "last \ufeff")]
    path.write_bytes(b"")
    assert list(read_lines(path, blank=True)) == []


def test_json_lines_keep_what_captions_may_hold_and_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    rows = [{"text": ODD}, {"text": "\u732b \U0001f431"}, {"text": "", "label": 3}]
    raw = [json.dumps(rows[0], ensure_ascii=False), json.dumps(rows[1]), json.dumps(rows[2])]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(raw).encode())
    assert list(read_json_lines(path, "text")) == [(f"{path} line {n}", row) for n, row in zip((1, 3, 5), rows)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3: not JSON"),
        (b'{"text": "\xff"}', "line 3: not UTF-8 text"),
        (b'{"text": "a", "label": NaN}', "line 3: not JSON .NaN is no number"),
        (b"[" * 100_000, "line 3: nested too deeply"),
        (b'{"a": ' * 100_000, "line 3: nested too deeply"),
        (rb'{"text": "half \ud83d of it"}', "line 3: it holds half a surrogate pair"),
        (rb'{"deep": [{"\udc00": 1}], "text": ""}', "line 3: it holds half a surrogate pair"),
        (b'"text"', "line 3: expected an object"),
        (b'{"txt": "a"}', 'line 3: "text" is missing'),
        (b'{"text": null}', 'line 3: "text" must be a string, got None'),
        (b'{"n": ' + b"9" * 10_000 + b"}", "line 3: not JSON"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    refused(rf"some\.jsonl {message}", list, read_json_lines(path, "text"))


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    refused(r"absent\.txt: no such file", list, read_lines(tmp_path / "absent.txt"))
    refused("cannot be read", list, read_lines(tmp_path))
    refused(r"expected a file that ends in \.jsonl, \.csv, \.tsv or \.parquet", list, read_rows(tmp_path / "a.xlsx"))


def test_the_four_kinds_of_tables_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"file_name": "a.png", "text": 'a "small", red fox\u2028'}, {"file_name": "b.png", "text": "x" * 200_000}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
    csv_text = "\ufefffile_name,text\r\n" + "".join(f"{r['file_name']},{q}\r\n\r\n" for r, q in zip(rows, quoted))
    (tmp_path / "t.csv").write_bytes(csv_text.encode())
    tsv_text = "\ufefffile_name\ttext\n" + "".join(f"{row['file_name']}\t{row['text']}\n" for row in rows)
    (tmp_path / "t.tsv").write_bytes(tsv_text.encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.csv", "t.tsv", "t.parquet"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert [where for where, _ in read_rows(tmp_path / "t.csv")] == [f"{tmp_path}/t.csv line {n}" for n in (2, 4)]


def test_rows_with_more_cells_than_columns_are_refused_and_short_ones_end_in_none(tmp_path: Path) -> None:
    for name, sign in (("t.csv", ","), ("t.tsv", "\t")):
        (tmp_path / name).write_text(f"text{sign}label\na\nb{sign}1{sign}2\n")
        rows = read_rows(tmp_path / name)
        assert next(rows)[1] == {"text": "a", "label": None}
        refused(r"line 3: 3 cells, but the first line names 2 columns \(text, label\)", next, rows)
    (tmp_path / "t.csv").write_text('text\n"over\ntwo lines"\nlast\n')
    assert [(where[-6:], row["text"]) for where, row in read_rows(tmp_path / "t.csv")] == [
        ("line 3", "over\ntwo lines"),
        ("line 4", "last"),
    ]


def test_texts_are_found_and_read_by_the_same_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "B.TXT").write_bytes("\ufeffone\x85more\r\n\r\ntwo\u2028\x0c".encode())
    (tmp_path / "a.txt").write_text("x")
    for name in ("._a.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).write_bytes(b"\xff")
    assert text_files(tmp_path) == [tmp_path / "a.txt", tmp_path / "deep" / "B.TXT"]
    assert capsys.readouterr().err == f"{tmp_path}: 2 .txt files; 1 files passed over: notes.md\n"
    assert text_files(tmp_path / "notes.md") == [tmp_path / "notes.md"]
    assert read_text(tmp_path / "deep" / "B.TXT") == "one\x85more\n\ntwo\u2028\x0c\n"
    refused("notes.md line 1: not UTF-8 text", read_text, tmp_path / "notes.md")


@pytest.mark.parametrize(("name", "head", "sign"), [("a.csv", "file;text", "';'"), ("a.tsv", "file,text", "','")])
def test_cells_parted_by_another_sign_are_refused(tmp_path: Path, name: str, head: str, sign: str) -> None:
    (tmp_path / name).write_text(f"{head}\nb\n")
    refused(f"{name} line 1: cells parted by {sign}; expected", list, read_rows(tmp_path / name))


def test_prompts_come_from_words_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red ring\r\n\n two \u2028 hearts \n".encode())
    assert prompts_of(["a bell"], path, "x") == ["a bell", "a red ring", "two \u2028 hearts"]
    assert prompts_of(None, path, "x") == ["a red ring", "two \u2028 hearts"]
    refused('--prompt is missing, for example --prompt "a bell"', prompts_of, None, None, "a bell")
    path.write_text(" \n")
    refused("no prompt in it; expected one a line", prompts_of, None, path, "x")


@pytest.mark.parametrize("paper", ["ldm", "pixart", "instaflow", "slam", "hipa", "lightgen", "instella_t2i"])
def test_every_program_that_draws_words_takes_a_file_of_them(paper: str) -> None:
    from tests.programs import options_of

    names = {name for action, _ in options_of(f"{paper}.sample") for name in action.option_strings}
    assert {"--prompt", "--prompts"} <= names
