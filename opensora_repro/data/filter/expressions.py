"""Expressions over a table's columns, such as `motion > 0.5 and not duplicate`, computed on record batches.

Python's own parser reads them and a list of allowed nodes decides what they may hold: nothing is evaluated as Python,
there are no attributes, and the only calls are those of FUNCTIONS. Types are checked before any row is read: numbers,
text and truth values do not mix. A missing value (null, or NaN) makes what is computed from it missing, except where
`and` and `or` are decided by their other side; `missing(x)` asks for it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from opensora_repro.data.tables import NULL, NUMBER, TEXT, TRUTH, Value, column_of
from opensora_repro.errors import DataError

MAX_CHARACTERS = 10_000
FUNCTIONS = ("abs", "len", "lower", "contains", "startswith", "endswith", "missing", "column")
_COMPARE = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_TEXT_TESTS = {"contains": "match_substring", "startswith": "starts_with", "endswith": "ends_with"}


def compile_expression(text: str, schema: Any) -> Value:
    """Return the expression over a pyarrow schema. Raises DataError, in one line that names the text at fault."""
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"a rule of {len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        return _Compiler(text, schema).value(_parse(text))
    except RecursionError:
        raise DataError(f"{_short(text)}: nested too deeply") from None


def split_conjunction(text: str) -> list[str]:
    """Return the parts of `a and b and c`, so that each can be counted on its own; other text is one part.

    A row passes all parts exactly where it passes the whole. Raises DataError.
    """
    node = _parse(text)
    if not (isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And)):
        return [text.strip()]
    parts = [ast.get_source_segment(text.strip(), part) or ast.unparse(part) for part in node.values]
    return [inner for part in parts for inner in split_conjunction(" ".join(part.split()))]


def threshold_of(text: str) -> tuple[str, float] | None:
    """Return (expression, number) of a rule that compares one with the other, or None."""
    node = _parse(text)
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], tuple(_COMPARE))):
        return None
    sides = (node.left, node.comparators[0])
    for side, other in (sides, sides[::-1]):
        number = _literal(other)
        if number is not None and _literal(side) is None:
            return ast.unparse(side), number
    return None


def _parse(text: str) -> ast.expr:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape": the parser's advice on Python code, not for a rule
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise DataError(f"{_short(text)}: not an expression ({error.msg})") from None
    except (ValueError, RecursionError, MemoryError):  # null characters, numbers or nesting beyond the parser's limits
        raise DataError(f"{_short(text)}: not an expression that can be read") from None


def _literal(node: ast.expr) -> float | None:
    """The number that the node writes out, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _literal(node.operand)
        return inner if inner is None or isinstance(node.op, ast.UAdd) else -inner
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        try:
            return float(node.value)
        except OverflowError:
            raise DataError(f"{_short(ast.unparse(node))}: too large a number") from None
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")


class _Compiler:
    """Turns allowed nodes into values; anything else is refused by name."""

    def __init__(self, text: str, schema: Any) -> None:
        self.text, self.schema = text, schema

    def fault(self, node: ast.AST, what: str) -> DataError:
        where = _short(ast.unparse(node))
        whole = _short(self.text)
        return DataError(f"{whole}: {what}" if where == whole else f"{whole}: {where}: {what}")

    def value(self, node: ast.expr) -> Value:
        handlers: Mapping[type[ast.expr], Callable[[Any], Value]] = {
            ast.BoolOp: self.bool_op,
            ast.UnaryOp: self.unary,
            ast.BinOp: self.binary,
            ast.Compare: self.compare,
            ast.Call: self.call,
            ast.Constant: self.literal,
            ast.Name: self.name,
        }
        handler = handlers.get(type(node))
        if handler is None:
            raise self.fault(node, f"{type(node).__name__} is not allowed in a rule")
        return handler(node)

    def typed(self, node: ast.expr, *kinds: str) -> Value:
        value = self.value(node)
        if value.kind not in (*kinds, NULL):
            raise self.fault(node, f"is {value.kind}, expected {' or '.join(kinds)}")
        if value.kind == NULL:
            return Value(kinds[0], _all_null(kinds[0], value.of), value.columns)
        return value

    def name(self, node: ast.Name) -> Value:
        return self.column(node, node.id)

    def column(self, node: ast.expr, name: str) -> Value:
        try:
            return column_of(name, self.schema)
        except DataError as error:
            raise DataError(f"{_short(self.text)}: {error}") from None

    def literal(self, node: ast.Constant) -> Value:
        import pyarrow as pa

        constant = node.value
        if isinstance(constant, bool):
            return Value(TRUTH, lambda _: pa.scalar(constant), constant=constant)
        if isinstance(constant, str):
            return Value(TEXT, lambda _: pa.scalar(constant), constant=constant)
        number = _literal(node)
        if number is None:
            raise self.fault(node, "expected a number, text, True or False")
        return Value(NUMBER, lambda _: pa.scalar(number), constant=number)

    def bool_op(self, node: ast.BoolOp) -> Value:
        import pyarrow.compute as pc

        values = [self.typed(part, TRUTH) for part in node.values]
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene

        def of(batch: Any) -> Any:
            result = values[0].of(batch)
            for value in values[1:]:
                result = join(result, value.of(batch))
            return result

        return Value(TRUTH, of, _columns(values))

    def unary(self, node: ast.UnaryOp) -> Value:
        import pyarrow.compute as pc

        if isinstance(node.op, ast.Not):
            value = self.typed(node.operand, TRUTH)
            return Value(TRUTH, lambda batch: pc.invert(value.of(batch)), value.columns)
        if not isinstance(node.op, ast.USub | ast.UAdd):
            raise self.fault(node, f"{type(node.op).__name__} is not allowed in a rule")
        value = self.typed(node.operand, NUMBER)
        if isinstance(node.op, ast.UAdd):
            return value
        return Value(NUMBER, lambda batch: pc.negate(value.of(batch)), value.columns)

    def binary(self, node: ast.BinOp) -> Value:
        import pyarrow.compute as pc

        name = _ARITHMETIC.get(type(node.op))  # type: ignore[call-overload]
        if name is None:
            raise self.fault(node, f"{type(node.op).__name__} is not allowed in a rule")
        left, right, compute = self.typed(node.left, NUMBER), self.typed(node.right, NUMBER), getattr(pc, name)

        def of(batch: Any) -> Any:
            result = compute(left.of(batch), right.of(batch))
            return pc.if_else(pc.is_nan(result), None, result)  # 0 / 0

        return Value(NUMBER, of, left.columns | right.columns)

    def compare(self, node: ast.Compare) -> Value:
        import pyarrow.compute as pc

        operands = [node.left, *node.comparators]
        steps = [self.step(op, operands[i], operands[i + 1], node) for i, op in enumerate(node.ops)]

        def of(batch: Any) -> Any:
            result = steps[0].of(batch)
            for step in steps[1:]:
                result = pc.and_kleene(result, step.of(batch))
            return result

        return Value(TRUTH, of, _columns(steps))

    def step(self, op: ast.cmpop, left: ast.expr, right: ast.expr, node: ast.expr) -> Value:
        """One comparison of a chain."""
        import pyarrow.compute as pc

        if isinstance(op, ast.In | ast.NotIn):
            return self.member(left, right, isinstance(op, ast.NotIn))
        name = _COMPARE.get(type(op))  # type: ignore[call-overload]
        if name is None:
            raise self.fault(node, f"{type(op).__name__} is not allowed in a rule")
        first, compute = self.value(left), getattr(pc, name)
        kinds = (first.kind,) if first.kind != NULL else (NUMBER, TEXT, TRUTH)
        second = self.typed(right, *kinds)
        first = self.typed(left, second.kind)
        if first.kind == TRUTH and name not in ("equal", "not_equal"):
            raise self.fault(node, "truth values have no order")
        return Value(TRUTH, lambda batch: compute(first.of(batch), second.of(batch)), first.columns | second.columns)

    def member(self, left: ast.expr, right: ast.expr, negated: bool) -> Value:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self.fault(right, "expected a list of values, such as ('a', 'b')")
        value = self.value(left)
        kind = value.kind if value.kind != NULL else TEXT
        items = [self.typed(item, kind) for item in right.elts]
        if any(item.columns for item in items):
            raise self.fault(right, "expected plain values")
        value, choices = self.typed(left, kind), pa.array([item.of(None).as_py() for item in items])

        def of(batch: Any) -> Any:
            array = value.array(batch)
            found = pc.is_in(array, choices)
            return pc.if_else(pc.is_null(array), None, pc.invert(found) if negated else found)

        return Value(TRUTH, of, value.columns)

    def call(self, node: ast.Call) -> Value:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords:
            raise self.fault(node, f"the functions are {', '.join(FUNCTIONS)}")
        name, count = node.func.id, 2 if node.func.id in _TEXT_TESTS else 1
        if len(node.args) != count:
            raise self.fault(node, f"{name} takes {count} value{'s' if count > 1 else ''}")
        if name == "column":
            return self.column(node, self.constant_text(node.args[0]))
        if name == "missing":
            value = self.value(node.args[0])
            return Value(TRUTH, lambda batch: pc.is_null(value.of(batch)), value.columns)
        if name == "abs":
            value = self.typed(node.args[0], NUMBER)
            return Value(NUMBER, lambda batch: pc.abs(value.of(batch)), value.columns)
        value = self.typed(node.args[0], TEXT)
        if name == "len":
            return Value(NUMBER, lambda batch: pc.utf8_length(value.of(batch)).cast(pa.float64()), value.columns)
        if name == "lower":
            return Value(TEXT, lambda batch: pc.utf8_lower(value.of(batch)), value.columns)
        test, pattern = getattr(pc, _TEXT_TESTS[name]), self.constant_text(node.args[1])
        return Value(TRUTH, lambda batch: test(value.of(batch), pattern=pattern), value.columns)

    def constant_text(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise self.fault(node, "expected text in quotes")


def _columns(values: list[Value]) -> frozenset[str]:
    return frozenset[str]().union(*(value.columns for value in values))


def _all_null(kind: str, of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    import pyarrow as pa

    arrow = {NUMBER: pa.float64(), TEXT: pa.string(), TRUTH: pa.bool_()}[kind]
    return lambda batch: of(batch).cast(arrow)
