"""What programs have logged of their objects, `Genotype(normal=[...], normal_concat=range(2, 6))`: read, never run."""

from __future__ import annotations

import ast
from typing import Any

LONGEST_RANGE = 1000  # entries; more no genotype has


def logged_call(text: str) -> dict[str, Any]:
    """The keywords of a logged call: literals, `range(...)`, and `list` of either.

    Raises:
        ValueError: anything else.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("expected a call with keywords alone")
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("not a logged call") from None


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if node.keywords or name not in ("range", "list"):
        raise ValueError("expected range(...) or list(...)")
    values = [_value(argument) for argument in node.args]
    if name == "list":
        if len(values) > 1:
            raise ValueError("list takes one argument")
        return list(*values)
    found = range(*values)
    if len(found) > LONGEST_RANGE:
        raise ValueError(f"a range of {len(found)} numbers")
    return list(found)
