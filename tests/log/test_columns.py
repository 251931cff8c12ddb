"""What goes into a column comes out of it, in both databases."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, delete, insert, select

from flash.log.columns import Array, Experts, Json, States, Words
from flash.log.schema import METADATA

TABLE = Table(
    "of_the_test",
    MetaData(),
    Column("i4", Array("<i4")),
    Column("f4", Array("<f4")),
    Column("f8", Array("<f8")),
    Column("words", Words),
    Column("json", Json),
    Column("states", States),
    Column("experts", Experts),
    Column("id", Integer, primary_key=True),
)
many = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(st.characters(exclude_characters="\U000f0000", exclude_categories=["Co"]))
texts_with_all = st.lists(st.sampled_from(["a", "\0", "\ud800", "\udfff", "é", "\U0001f600"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | texts
states = st.recursive(scalars, lambda s: st.lists(s).map(tuple) | st.frozensets(scalars))


@pytest.fixture
def through(store):
    """Writes a value into a column, and gives what is read."""
    TABLE.create(store.engine)

    def go(column, value):
        with store.transaction() as connection:
            connection.execute(delete(TABLE))
            connection.execute(insert(TABLE).values({column: value}))
        with store.transaction() as connection:
            return connection.scalar(select(TABLE.c[column]))

    return go


@many
@given(values=st.lists(st.integers(-(2**31), 2**31 - 1)))
@example(values=[])
@example(values=list(range(100_000)))
def test_whole_numbers_of_any_count_come_back(through, values):
    back = through("i4", values)
    assert back.tolist() == values
    assert back.dtype == np.dtype("<i4")


@many
@given(values=st.lists(st.floats(width=32)))
@example(values=[])
@example(values=[float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
def test_floats_come_back_bit_for_bit(through, values):
    for column, dtype in (("f4", "<f4"), ("f8", "<f8")):
        array = np.asarray(values, dtype)
        assert through(column, array).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [">i4", "<i8", "<u2"])
def test_an_array_lies_in_the_column_s_dtype_whatever_it_had(through, dtype):
    assert through("i4", np.array([1, 2, 3], dtype)[::-1]).tolist() == [3, 2, 1]


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (2000, 384)])
def test_experts_come_back_in_their_shape(through, shape):
    experts = np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape) % 128 - 1
    back = through("experts", experts.astype(np.int16))
    np.testing.assert_array_equal(back, experts)
    assert back.dtype == np.int16


@pytest.mark.parametrize("column", ["i4", "words", "json", "states", "experts"])
def test_nothing_comes_back_as_nothing(through, column):
    assert through(column, None) is None


@many
@given(text=texts_with_all.map("".join) | texts)
@example(text="")
@example(text="\0\ud800 \udfff")
def test_any_text_comes_back_also_one_that_no_database_takes(through, text):
    assert through("words", text) == text


@many
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
        lambda v: st.lists(v) | st.dictionaries(texts, v),
    )
)
@example(value={"text": "\ud800\0", "huge": 2**80})
def test_plain_data_comes_back_and_infinity_as_nothing(through, value):
    def finite(data):
        if isinstance(data, float):
            return data if abs(data) < float("inf") else None
        if isinstance(data, list):
            return [finite(item) for item in data]
        if isinstance(data, dict):
            return {key: finite(item) for key, item in data.items()}
        return data

    assert through("json", value) == finite(value)


@pytest.mark.parametrize(
    ("value", "comes_back"),
    [
        ({"of": np.float32(0.5), "array": np.arange(3)}, {"of": 0.5, "array": [0, 1, 2]}),
        ({1: float("nan"), "pair": (1, 2)}, {"1": None, "pair": [1, 2]}),
        ({"object": object}, {"object": "<class 'object'>"}),
        ({"set": {1}, "\ud800": {2}}, {"set": [1], "\ud800": [2]}),
    ],
)  # fmt: skip
def test_of_other_data_comes_back_what_json_can_hold(through, value, comes_back):
    assert through("json", value) == comes_back


@many
@given(values=st.lists(states))
@example(values=[(1, ("a", 2.5)), frozenset({"a"}), 2**70, b"\0", "\ud800", None, True, 1.0])
def test_states_that_were_equal_are_equal_and_others_are_not(through, values):
    """As far as they come back: of what can't, `repr` stands for it."""
    back = through("states", values)
    assert len(back) == len(values)
    for value, state in zip(values, back, strict=True):
        hash(state)
        assert state == value or repr(value) in repr(state) or _has_repr(value)
    assert through("states", back) == back or "nan" in repr(values)


def _has_repr(state):
    """Whether some part of it comes back as its `repr`."""
    if isinstance(state, tuple):
        return any(map(_has_repr, state))
    if isinstance(state, int):
        return not -(2**63) <= state < 2**64
    return isinstance(state, float | frozenset) or "\\ud" in ascii(state)


def test_arrays_are_read_with_numpy_alone():
    """As docs/durability.md says it."""
    raw = Array("<i4").process_bind_param([1, 2, 3], None)
    assert np.frombuffer(zlib.decompress(raw), "<i4").tolist() == [1, 2, 3]


def test_json_is_read_by_anybody():
    raw = Json().process_bind_param({"a": [1, None], "nan": float("nan")}, None)
    assert json.loads(raw) == {"a": [1, None], "nan": None}


def test_the_schema_has_no_other_kinds_of_arrays_than_these():
    dtypes = {
        column.type.dtype
        for table in METADATA.tables.values()
        for column in table.columns
        if isinstance(column.type, Array)
    }
    assert dtypes == {"<i4", "<f4", "<f8"}
