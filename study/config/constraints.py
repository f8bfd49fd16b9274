"""Conditions on a trial's parameters, `search.constraints`: comparisons of arithmetic over their names."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

MOST_LENGTH = 300
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def names(text: str) -> set[str]:
    """The parameters that a constraint is about.

    Raises:
        ValueError: it is not a comparison of arithmetic over names, numbers and texts.
    """
    found: set[str] = set()
    _evaluate(_parse(text), _Collector(found))
    return found


def holds(text: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the parameters satisfy a constraint. One that names a parameter that a trial lacks does not apply."""
    if not names(text) <= parameters.keys():
        return True
    try:
        return bool(_evaluate(_parse(text), parameters))
    except (TypeError, ZeroDivisionError, OverflowError):
        return False


class _Collector(dict[str, Any]):
    """Takes note of the names that are looked up; each is 1."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def __missing__(self, name: str) -> Any:
        self.names.add(name)
        return 1


def _parse(text: str) -> ast.expr:
    rule = "a constraint is a comparison such as 'alpha * epochs <= 4_000_000'"
    if len(text) > MOST_LENGTH:
        raise ValueError(f"{rule} of at most {MOST_LENGTH} characters, got {text[:40]!r}…")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{rule}, got {text!r}") from None
    if not isinstance(node, ast.Compare | ast.BoolOp):
        raise ValueError(f"{rule}, got {text!r}")
    try:
        _evaluate(node, _Collector(set()))
    except (TypeError, ZeroDivisionError, OverflowError):
        pass
    except ValueError as error:
        raise ValueError(f"{rule}: {error}, got {text!r}") from None
    return node


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And() | ast.Or() as op, values=parts):
            results = [bool(_evaluate(part, values)) for part in parts]  # all, so that every name is looked up
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.Compare():
            sides = [_evaluate(side, values) for side in (node.left, *node.comparators)]
            kinds = [type(op) for op in node.ops]
            if not all(kind in _COMPARISONS for kind in kinds):
                raise ValueError("only <, <=, >, >=, == and != compare")
            return all(
                _compare(kind, one, other, values) for kind, one, other in zip(kinds, sides, sides[1:], strict=False)
            )
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            one, other = _evaluate(node.left, values), _evaluate(node.right, values)
            if isinstance(one, str) or isinstance(other, str):
                raise ValueError("texts cannot be calculated with")
            return _ARITHMETIC[type(node.op)](one, other)
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand, values)
        case ast.Name():
            return values[node.id]
        case ast.Attribute():
            return values[_dotted(node)]
        case ast.Constant(value=int() | float() | str() as value):
            return value
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in it")


def _compare(kind: type[ast.cmpop], one: Any, other: Any, values: Mapping[str, Any]) -> bool:
    if isinstance(values, _Collector):
        return True
    return _COMPARISONS[kind](one, other)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in it")
