"""Columns by name: a site's file is put in the server's order, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedweight import data
from fedweight.core.errors import DataError
from fedweight.data import Schema
from fedweight.data.files import load_one

SERVER = "age,dose,class\n1,10,0\n2,20,1\n3,30,2\n"


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "server.csv"
    path.write_text(SERVER)
    _, found = load_one(path)
    return found


def site(tmp_path, text):
    path = tmp_path / "site.csv"
    path.write_text(text)
    return path


def test_a_schema_says_what_a_file_holds(schema):
    assert schema == Schema(
        "server.csv", "class", (), {"age": "number", "dose": "number"}, (2,)
    )


def test_columns_are_put_in_the_servers_order(tmp_path, schema):
    path = site(tmp_path, "class,dose,age\n2,30,3\n0,10,1\n")
    client = data.load_client(path, 0.0, schema=schema)
    np.testing.assert_array_equal(client.train.x, [[3, 30], [1, 10]])
    assert client.train.y.tolist() == [2, 0]
    by_place = data.load_client(path, 0.0)  # What trained as "ok" without a schema.
    assert by_place.train.y.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("age,class\n1,0\n", "it lacks 'dose'"),
        ("age,dose,pulse,class\n1,2,3,0\n", "it has 'pulse' besides"),
        ("age,pulse,class\n1,2,0\n", "it lacks 'dose'; it has 'pulse' besides"),
        ("age,dose,class\n1,low,0\n", "'dose' holds a number there and a text here"),
        ("age,dose,outcome\n1,2,0\n", "no column 'class'"),
    ],
)
def test_other_columns_are_refused(tmp_path, schema, text, differs):
    path = site(tmp_path, text)
    with pytest.raises(DataError) as caught:
        data.load_client(path, 0.0, schema=schema)
    message = str(caught.value)
    assert str(path) in message
    assert differs in message
    if "no column" not in differs:
        assert "has other columns than server.csv" in message
    if "lacks" not in differs and "besides" in differs:
        client = data.load_client(path, 0.0, schema=schema, drop=["pulse"])
        assert client.train.x.tolist() == [[1, 2]]


def test_classes_have_the_servers_numbers(tmp_path, schema):
    from dataclasses import replace

    named = replace(schema, classes=("well", "ill"))
    path = site(tmp_path, "age,dose,class\n1,2,ill\n3,4,well\n")
    assert data.load_client(path, 0.0, schema=named).train.y.tolist() == [1, 0]
    with pytest.raises(
        DataError, match="holds 'dead', which is none of 'well' and 'ill'"
    ):
        data.load_client(site(tmp_path, "age,dose,class\n1,2,dead\n"), schema=named)
    numbers = replace(schema, classes=("0", "1"))
    path = site(tmp_path, "age,dose,class\n1,2,1.0\n3,4,0.0\n")
    assert data.load_client(path, 0.0, schema=numbers).train.y.tolist() == [1, 0]
    with pytest.raises(DataError, match="holds 2, which is none of '0' and '1'"):
        data.load_client(site(tmp_path, "age,dose,class\n1,2,2\n"), schema=numbers)


def test_arrays_are_compared_by_shape(tmp_path, schema):
    path = tmp_path / "site.npz"
    np.savez(path, x=np.ones((3, 2)), y=np.array([0, 1, 2]))
    assert len(data.load_client(path, 0.0, schema=schema).train) == 3
    np.savez(path, x=np.ones((3, 4)), y=np.array([0, 1, 2]))
    with pytest.raises(DataError, match=r"shape \[4\], one of server.csv \[2\]"):
        data.load_client(path, 0.0, schema=schema)
    _, arrays = load_one(path)
    assert (arrays.columns, arrays.shape) == ({}, (4,))
    with pytest.raises(
        DataError, match=r"2 feature columns, but .* site.npz has shape"
    ):
        data.load_client(site(tmp_path, SERVER), 0.0, schema=arrays)
    three = Schema("server.npz", "", ("0", "1"), {}, (4,))
    with pytest.raises(DataError, match=r"reach 2, but server.npz has 2 classes"):
        data.load_client(path, 0.0, schema=three)


def test_a_schema_is_json_and_reads_back(tmp_path, schema):
    assert Schema.read(schema.write()) == schema
    assert json.loads(schema.write())["columns"] == {"age": "number", "dose": "number"}
    path = tmp_path / "schema.json"
    path.write_text(schema.write())
    assert Schema.of_file(path) == schema


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "null", "{", '{"label": 3}', "[" * 10_000, "9" * 5000),
        '{"source": "", "label": "", "classes": 3, "columns": {}, "shape": []}',
        '{"source": "", "label": "", "classes": [], "columns": [1], "shape": []}',
        '{"source": "", "label": "", "classes": [], "columns": {}, "shape": ["a"]}',
    ],
)
def test_what_is_no_schema_is_told(tmp_path, text):
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"schema.json is none that .*--write-schema"):
        Schema.of_file(path)


def test_a_schemas_file_must_be_there(tmp_path):
    with pytest.raises(DataError, match="it does not exist"):
        Schema.of_file(tmp_path / "none.json")
    with pytest.raises(DataError, match="it is a folder"):
        Schema.of_file(tmp_path)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        Schema.of_file(tmp_path / "bad.json")
