"""Tests of reading one safetensors content: round trips, and headers that lie."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from retex_jax.snapshot.file import SafetensorsFile, parse_json

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(3.5, np.float16),
    "d": np.zeros((0, 2), np.int64),
    "e": np.array([True, False, True]),
    "f": np.arange(3, dtype=np.float64),
}


def content(header, data=b""):
    """A safetensors content of any header, given as bytes or as what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        assert got[name].tobytes() == x.tobytes()


def test_bytes_and_file(tmp_path):
    path = tmp_path / "any.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    for source in (path.read_bytes(), bytearray(path.read_bytes()), path, str(path)):
        file = SafetensorsFile(source)
        assert {n: (s.shape, s.dtype) for n, s in file.specs.items()} == {
            n: (x.shape, x.dtype) for n, x in TENSORS.items()
        }
        assert_same({name: file.read(name) for name in file.specs}, TENSORS)
        assert not file.read("a").flags.writeable


def test_float8_is_read():
    x = np.array([1.5, -2.0]).astype(ml_dtypes.float8_e4m3fn)
    got = SafetensorsFile(content({"x": entry("F8_E4M3", (2,), (0, 2))}, x.tobytes())).read("x")
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.astype(np.float32), [1.5, -2.0])


def test_data_need_not_be_aligned():
    data = content(
        b'{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}} ', np.float64(7).tobytes()
    )
    assert len(data) % 8  # so the data does not start at a multiple of its item size
    assert SafetensorsFile(data).read("x")[0] == 7


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_truncated(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(TENSORS)[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        SafetensorsFile(path)


def test_missing_and_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        SafetensorsFile(tmp_path / "absent")
    with pytest.raises(ValueError, match="not a regular file"):
        SafetensorsFile(tmp_path)


EIGHT = bytes(8)
LIES = {
    "length_beyond_the_file": (b"\xff" * 8 + b"{}", "header claims 18446744073709551615 bytes"),
    "length_one_beyond": ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes, expected at most 2"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
    "not_json": (content(b"{x"), "header is not JSON"),
    "not_text": (content(b'{"\xff":1}'), "header is not JSON"),
    "deep": (content(b"[" * 100_000), "header is not JSON: JSON nested too deeply"),
    "a_list": (content([1]), "header is not a JSON object"),
    "twice": (
        content(b'{"x":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"x":1}'),
        "key 'x' is there twice",
    ),
    "field_twice": (content(b'{"x":{"dtype":"I8","dtype":"U8"}}'), "key 'dtype' is there twice"),
    "no_offsets": (content({"x": {"dtype": "F32", "shape": [2]}}), "x: expected an object with"),
    "entry_is_a_number": (content({"x": 3}), "x: expected an object with"),
    "dtype": (content({"x": entry("F4")}, EIGHT), "dtype 'F4', expected one of F64"),
    "dtype_is_a_list": (content({"x": entry(["F32"])}, EIGHT), r"dtype \['F32'\]"),
    "negative_side": (content({"x": entry(shape=(-2,))}, EIGHT), r"shape \[-2\]"),
    "float_side": (content({"x": entry(shape=(2.0,))}, EIGHT), r"shape \[2\.0\]"),
    "bool_side": (content({"x": entry(shape=(True, 2))}, EIGHT), r"shape \[True, 2\]"),
    "many_axes": (content({"x": entry(shape=(1,) * 99)}, EIGHT), "at most 32 whole numbers"),
    "overflow": (content({"x": entry(shape=(2**33, 2**33))}, EIGHT), "larger than any memory"),
    "hidden_overflow": (
        content({"x": entry(shape=(0, 2**62), offsets=(0, 0))}),
        "larger than any memory",
    ),
    "wraps_to_8_bytes": (
        content({"x": entry(shape=(2**62 + 2,))}, EIGHT),
        "larger than any memory",
    ),
    "more_than_the_file": (
        content({"x": entry(shape=(2**40,))}, EIGHT),
        "takes 4398046511104 bytes",
    ),
    "out_of_range": (
        content({"x": entry(shape=(2**30,), offsets=(0, 2**32))}, EIGHT),
        "x: ends at byte 4294967296 of 8 bytes",
    ),
    "backwards": (content({"x": entry(offsets=(8, 0))}, EIGHT), "hold -8"),
    "three_offsets": (content({"x": entry(offsets=(0, 8, 8))}, EIGHT), "expected two whole"),
    "overlap": (
        content({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
        "y: overlaps x",
    ),
    "same_range": (content({"x": entry(), "y": entry()}, EIGHT), "y: overlaps x"),
    "gap": (content({"x": entry(offsets=(4, 12))}, bytes(12)), "4 bytes before it belong to no"),
    "rest": (content({"x": entry()}, bytes(12)), "the last 4 bytes belong to no tensor"),
}


@pytest.mark.parametrize("data, message", LIES.values(), ids=LIES)
def test_a_header_that_lies(data, message):
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFile(data)
    assert str(error.value).startswith("safetensors data: not a whole safetensors file: ")
    assert len(str(error.value)) < 1000


def test_all_problems_are_listed_and_many_are_counted():
    with pytest.raises(ValueError) as error:
        SafetensorsFile(content({"x": entry("Q"), "y": entry(shape=(3,)), "z": entry()}, EIGHT))
    assert "2 problem(s)\n  x: dtype" in str(error.value) and "\n  y: float32" in str(error.value)
    with pytest.raises(ValueError, match=r"90 problem\(s\)(?s:.*)and 70 more$"):
        SafetensorsFile(content({str(i): 0 for i in range(90)}))


def test_parse_json_keeps_what_is_right():
    assert parse_json(b'{"a": {"b": [1, null]}, "c": {"b": 2}}') == {
        "a": {"b": [1, None]},
        "c": {"b": 2},
    }


@pytest.mark.parametrize("depth", [66, 900, 100_000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_json_is_not_nested_deeply(depth, start, end):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(start * depth + "1" + end * depth)
    parse_json(start * 60 + "1" + end * 60)


def test_metadata_is_read_and_holds_texts_only():
    texts = {"format": "pt", "note": "ü"}
    assert SafetensorsFile(safetensors.numpy.save(TENSORS, texts)).metadata == texts
    assert SafetensorsFile(safetensors.numpy.save(TENSORS)).metadata == {}
    assert SafetensorsFile(content({"__metadata__": None, "x": entry()}, EIGHT)).metadata == {}
    for wrong in ({"a": 1}, [], "text"):
        with pytest.raises(ValueError, match="__metadata__ is not a JSON object of texts"):
            SafetensorsFile(content({"__metadata__": wrong, "x": entry()}, EIGHT))


GOOD = safetensors.numpy.save(
    {"a": TENSORS["a"], "c": TENSORS["c"], "e": TENSORS["f"]}, {"format": "pt"}
)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_corrupted_file_is_refused_or_read_within_its_bounds(data):
    corrupted = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        at = data.draw(st.integers(0, max(len(corrupted) - 1, 0)))
        byte = data.draw(st.integers(0, 255))
        if kind == "cut":
            del corrupted[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            corrupted[at:at] = bytes([byte]) * data.draw(st.integers(1, 9))
        elif kind == "digit":
            places = [i for i, c in enumerate(corrupted) if chr(c).isdigit()] or [at]
            corrupted[data.draw(st.sampled_from(places)) : at + 1] = str(byte).encode()
        elif corrupted:
            corrupted[at] = byte
    try:
        file = SafetensorsFile(bytes(corrupted))
    except ValueError:
        return
    # What is accepted is what the reference reader of the format reads as well.
    want = dict(safetensors.deserialize(bytes(corrupted)))
    assert file.specs.keys() == want.keys()
    for name, tensor in want.items():
        got = file.read(name)
        assert list(got.shape) == tensor["shape"] and got.tobytes() == bytes(tensor["data"])
