from __future__ import annotations

import pyarrow as pa
import pytest

from opensora_repro.data.filter.expressions import compile_expression, split_conjunction, threshold_of
from opensora_repro.errors import DataError

BATCH = pa.RecordBatch.from_pydict(
    {
        "id": ["a", "b", "c", "d"],
        "motion": pa.array([0.2, 0.6, None, float("nan")]),
        "num_frames": [24, 60, 90, 1],
        "fps": [24.0, 30.0, 30.0, 0.0],
        "duplicate": [False, True, False, None],
        "caption": ["A Dog runs", "", "a cat", None],
        "two words": [1, 2, 3, 4],
        "class": pa.array(["x", "y", "x", None]).dictionary_encode(),
        "nothing": pa.nulls(4),
        "list": [[1], [2], [3], [4]],
    }
)


def rows(rule: str) -> list[bool | None]:
    return compile_expression(rule, BATCH.schema).array(BATCH).to_pylist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("motion > 0.5", [False, True, None, None]),
        ("0.1 < motion <= 0.2", [True, False, None, None]),
        ("motion > 0.5 or not duplicate", [True, True, True, None]),
        ("motion > 0.5 and not duplicate", [False, False, None, None]),
        ("motion > 0.5 and duplicate and num_frames > 50", [False, True, False, False]),  # decided by the other side
        ("missing(motion) or motion < 0.5", [True, False, True, True]),
        ("duration >= 2", [False, True, True, False]),  # 1, 2, 3 seconds, and an image
        ("-num_frames + 2 * fps - 1 / 2 < 0", [False, True, True, True]),
        ("num_frames / (fps - 24) > 0", [True, True, True, False]),  # 24 / 0 is infinite
        ("fps / fps == 1", [True, True, True, None]),
        ("abs(num_frames - 60) <= 30", [False, True, True, False]),
        ("len(caption) == 0", [False, True, False, None]),
        ("contains(lower(caption), 'dog')", [True, False, False, None]),
        ("startswith(caption, 'a') or endswith(caption, 'runs')", [True, False, True, None]),
        ("id in ('a', 'c')", [True, False, True, False]),
        ("column('class') not in ['x']", [False, True, False, None]),
        ("column('two words') > 3", [False, False, False, True]),
        ("duplicate == False", [True, False, True, None]),
        ("nothing > 1", [None] * 4),
        ("caption != 'a cat'", [True, True, False, None]),
    ],
)
def test_rules_are_computed_row_by_row(rule: str, expected: list[bool | None]) -> None:
    assert rows(rule) == expected


def test_duration_is_the_manifests_own_where_it_has_one() -> None:
    own = pa.RecordBatch.from_pydict({"duration": [5.0], "num_frames": [1], "fps": [1.0]})
    assert compile_expression("duration == 5", own.schema).array(own).to_pylist() == [True]
    timed = pa.RecordBatch.from_pydict({"start_time": [1.0, 3.0], "end_time": [2.5, None]})
    assert compile_expression("duration == 1.5", timed.schema).array(timed).to_pylist() == [True, None]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("moton > 1", "no column moton, did you mean motion?"),
        ("zzzzzz > 1", "no column zzzzzz (has id, motion"),
        ("caption > 1", "'1': is a number, expected text"),
        ("motion + caption > 1", "'caption': is text, expected a number"),
        ("not motion", "'motion': is a number, expected a truth value"),
        ("duplicate < True", "truth values have no order"),
        ("list > 1", "column list holds list"),
        ("motion >", "not an expression"),
        ("", "not an expression"),
        ("motion > 1; import os", "not an expression"),
        ("motion = 1", "not an expression"),
        ("motion > 1\0", "not an expression"),
        ("motion.real > 1", "Attribute is not allowed"),
        ("caption[0] == 'a'", "Subscript is not allowed"),
        ("__import__('os').system('true')", "the functions are abs, len"),
        ("().__class__.__bases__", "Attribute is not allowed"),
        ("eval('1')", "the functions are abs, len"),
        ("abs(motion, key=1)", "the functions are abs, len"),
        ("len(*caption)", "Starred is not allowed"),
        ("contains(caption, id)", "expected text in quotes"),
        ("contains(caption)", "contains takes 2 values"),
        ("(lambda: 1)()", "the functions are"),
        ("[x for x in id] == 1", "ListComp is not allowed"),
        ("f'{id}' == 'a'", "JoinedStr is not allowed"),
        ("(motion := 1) > 0", "NamedExpr is not allowed"),
        ("motion ** 9999 > 1", "Pow is not allowed"),
        ("motion << 9 > 1", "LShift is not allowed"),
        ("motion is 1", "Is is not allowed"),
        ("motion > None", "expected a number, text, True or False"),
        ("motion > 1j", "expected a number, text, True or False"),
        ("motion > 1" + "0" * 400, "too large a number"),
        ("motion > 1" + "0" * 9000, "not an expression"),
        ("id in (id, 'a')", "expected plain values"),
        ("id in 'abc'", "expected a list of values"),
        ("not " * 2000 + "duplicate", ""),
        ("(" * 500 + "motion" + ")" * 500 + " > 1", ""),
        ("motion > 1 or " * 2000 + "motion > 1", "at most 10000 are read"),
    ],
)
def test_mistakes_and_hostile_rules_are_refused_in_one_line(rule: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        compile_expression(rule, BATCH.schema)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_parts_joined_by_and_are_rules_of_their_own() -> None:
    parts = split_conjunction(" motion > 0.5 and (num_frames > 3 and not duplicate) and (fps > 1 or fps < 9) ")
    assert parts == ["motion > 0.5", "num_frames > 3", "not duplicate", "fps > 1 or fps < 9"]


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("motion > 0.5", ("motion", 0.5)),
        ("-2 <= abs(motion)", ("abs(motion)", -2.0)),
        ("0 < motion < 1", None),
        ("motion > fps", None),
        ("not duplicate", None),
        ("caption == 'x'", None),
    ],
)
def test_a_threshold_is_told_from_other_rules(rule: str, found: tuple[str, float] | None) -> None:
    assert threshold_of(rule) == found
