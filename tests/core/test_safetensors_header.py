"""The header reader against hostile files: it raises InvalidInput or agrees with safetensors itself, nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from onebase.errors import InvalidInput
from onebase.safetensors_header import MAX_HEADER_BYTES, read_header

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def two() -> Header:
    return {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
    }


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    save_file(
        {"x": np.zeros((2, 3), "f4"), "y": np.zeros((), "f2"), "e": np.zeros((0, 4), "f4")}, tmp_path / "m", {"k": "v"}
    )
    header = read_header(tmp_path / "m")
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "x": ("F32", (2, 3)),
        "y": ("F16", ()),
        "e": ("F32", (0, 4)),
    }
    assert header.metadata == {"k": "v"}


def changed(entry: str, **fields: Any) -> Callable[[], Header]:
    def make() -> Header:
        header = two()
        header[entry] = {key: value for key, value in (header[entry] | fields).items() if value != "absent"}
        return header

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed("b", data_offsets=[8, 16]), "overlaps"),
        (changed("b", data_offsets=[20, 28]), "hole"),
        (changed("b", data_offsets=[16, 32]), "do not span"),
        (changed("b", data_offsets=[24, 16]), "do not span"),
        (changed("b", data_offsets=[16]), "data_offsets"),
        (changed("b", data_offsets=[16.0, 24.0]), "data_offsets"),
        (changed("b", data_offsets=[-8, 0]), "data_offsets"),
        (changed("b", shape=[2, -2]), "shape"),
        (changed("b", shape=[True, 4]), "shape"),
        (changed("b", shape=[1] * 9), "shape"),
        (changed("b", shape=[1 << 40, 1 << 40], data_offsets=[16, 1 << 62]), "do not span"),
        (changed("b", shape=[500], data_offsets=[16, 1016]), "cut off"),
        (changed("b", dtype="F4"), "unknown dtype"),
        (changed("b", dtype=["F32"]), "unknown dtype"),
        (changed("b", dtype="absent"), "exactly dtype"),
        (changed("b", extra=1), "exactly dtype"),
        (lambda: two() | {"b": 3}, "exactly dtype"),
        (lambda: two() | {"__metadata__": {"a": 1}}, "__metadata__"),
        (lambda: {"a": two()["a"]}, "belong to none"),
        (lambda: b"[]", "not a JSON object"),
        (lambda: b"{", "not JSON"),
        (lambda: b"\xff", "not JSON"),
        (lambda: b'{"a": 1, "a": 2}', "twice"),
        (lambda: b'{"a": NaN}', "NaN"),
        (lambda: b'{"a": ' + b"[" * 200_000 + b"}", "nested|not JSON"),
        (lambda: b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, make: Callable[[], Header | bytes], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_header(write(tmp_path / "m", make(), bytes(24)))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 62, (1 << 64) - 1])
def test_a_huge_header_length_is_refused_before_reading(tmp_path: Path, length: int) -> None:
    (tmp_path / "m").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidInput, match="claims"):
        read_header(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 4, 8, 50])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    whole = save({"x": np.zeros((8, 8), "f4")})
    (tmp_path / "m").write_bytes(whole[:keep])
    with pytest.raises(InvalidInput, match=r"too short|cut off"):
        read_header(tmp_path / "m")
    (tmp_path / "m").write_bytes(whole[:-1])
    with pytest.raises(InvalidInput, match="cut off"):
        read_header(tmp_path / "m")


@given(noise=st.binary(max_size=200), position=st.integers(0, 120), cut=st.integers(0, 200))
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, position: int, cut: int
) -> None:
    whole = save({"x": np.zeros((4, 4), "f4"), "y": np.zeros((3,), "f2")})
    path = tmp_path_factory.mktemp("damaged") / "m"
    path.write_bytes((whole[:position] + noise + whole[position + len(noise) :])[: max(cut, position)])
    try:
        found = read_header(path).tensors
    except InvalidInput:
        return
    try:
        with safe_open(path, "numpy") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: tensor.shape for name, tensor in found.items()
            }
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
