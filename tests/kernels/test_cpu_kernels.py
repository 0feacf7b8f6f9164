"""The C++ matmul against the exact weight, at every batch size, on each compiler target; and how it gets built."""

import logging
import os
from pathlib import Path

import pytest
import torch

from nf4_weights import exact, random_weight
from onebase_server.kernels import cpu_build
from onebase_server.kernels.cpu_build import load_library
from onebase_server.kernels.cpu_ops import CpuKernels, repack
from onebase_server.kernels.torch_ops import dequantize

pytestmark = pytest.mark.slow

BATCHES = (1, 2, 7, 15, 16, 17, 31, 33, 48, 70)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("march", ["native", "x86-64-v3"])
def test_each_rows_bits_are_the_same_in_any_batch_and_right(march: str, dtype: torch.dtype, cache: Path) -> None:
    library = load_library(cache, march=march)
    if library is None:
        pytest.skip("no C++ compiler here")
    kernels = CpuKernels(library, dtype)
    for n, k in ((24, 128), (192, 576), (80, 1536)):
        weight = random_weight(n, k, "cpu")
        prepared = kernels.prepare(weight)
        x = torch.randn(max(BATCHES), k).to(dtype)
        whole = kernels.nf4_matmul(x, prepared)
        expected = x.double() @ dequantize(weight, dtype).double().T
        assert (whole - expected).norm() < (1e-6 if dtype == torch.float32 else 3e-3) * expected.norm()
        for m in BATCHES:
            assert torch.equal(kernels.nf4_matmul(x[:m], prepared), whole[:m])
            assert torch.equal(kernels.nf4_matmul(x[-m:], prepared), whole[-m:])


@pytest.mark.parametrize("amx", [True, False])
def test_repacking_keeps_every_code_and_absmax(amx: bool) -> None:
    """Read back by the layout's definition (cpu_ops.py), an output feature count that does not fill its last strip."""
    n, k = 20, 128
    weight = random_weight(n, k, "cpu")
    data = repack(weight, amx=amx).numpy()
    truth = exact(weight)
    for feature in range(n):
        for column in range(k):
            strip, row, block, at = feature // 16, feature % 16, column // 64, column % 64
            absmax = data[strip, block, :64].view("f4")[row]
            if amx:
                word = data[strip, block, 64:].view("u2")[row // 2 * 32 + at % 32]
                code = word >> (8 * (row % 2) + 4 * (at // 32)) & 15
            else:
                word = data[strip, block, 64:].view("u4")[at // 8 * 16 + row]
                code = word >> 4 * (at % 8) & 15
            assert float(weight.code[int(code)].double()) * float(absmax) == truth[feature, column]


def test_a_library_is_compiled_once_and_kept(tmp_path: Path) -> None:
    first = load_library(tmp_path, march="x86-64")
    if first is None:
        pytest.skip("no C++ compiler here")
    [library] = tmp_path.iterdir()
    before = library.stat().st_mtime_ns
    assert load_library(tmp_path, march="x86-64") is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


def test_no_compiler_is_a_warning_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_library(tmp_path / "cache") is None
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_a_warning_with_its_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) echo fake 1;; *) echo "no such target" >&2; exit 3;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with caplog.at_level(logging.WARNING):
        assert load_library(tmp_path / "cache") is None
    assert "no such target" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_source_takes_part_in_the_librarys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "forward.cpp").write_text("int one;")
    (sources / "part.h").write_text("a")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    before = cpu_build._key("/bin/echo", ("-O3",))
    (sources / "part.h").write_text("b")
    assert cpu_build._key("/bin/echo", ("-O3",)) != before
    assert cpu_build._key("/bin/echo", ("-O2",)) != cpu_build._key("/bin/echo", ("-O3",))
