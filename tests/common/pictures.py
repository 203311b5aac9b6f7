"""Small grey pictures in folders and tables, and what is read back of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture of one grey level, as a file holds it."""
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, "PNG")
    return out.getvalue()


def pictures(numbers: range) -> list[Any]:
    """Cells of a table's image column."""
    return [{"bytes": png(i), "path": None} for i in numbers]


def parquet(path: Path, row_group_size: int | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def captioned(root: Path, n: int) -> Path:
    """n grey squares; image i has grey level i and caption "grey i"."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (root / f"{i:03d}.png").write_bytes(png(i))
    rows = [{"file_name": f"{i:03d}.png", "text": f"grey {i}"} for i in range(n)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def level(item: dict[str, Any]) -> int:
    return int(item["image"][0, 0, 0])


def told(item: dict[str, Any]) -> tuple[int, str, int]:
    """Grey level, caption and label."""
    return level(item), item["caption"], item["label"]
