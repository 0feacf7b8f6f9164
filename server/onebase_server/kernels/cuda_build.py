"""CUDA C++ to running kernels without a toolkit: NVRTC (it comes with torch) compiles, the driver loads and launches.

Cubins are cached by a hash of source, options and compiler version. Launches go to torch's current stream, so they
are captured by CUDA graphs. Nothing here knows what a kernel computes. No library of CUDA's is loaded until used.
"""

import ctypes
import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from onebase.errors import OnebaseError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cuda"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAX_PARAMETERS = 24
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class CudaBuildError(OnebaseError):
    """A kernel could not be compiled, loaded or launched; the message holds the compiler's or driver's words."""


def _nvrtc_candidates() -> list[str]:
    found: list[str] = []
    for root in [Path(p) for p in sys.path if p]:
        for pattern in ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*"):
            found += [str(p) for p in sorted(root.glob(pattern)) if "alt" not in p.name and "builtins" not in p.name]
    return [*found, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]


@cache
def _nvrtc() -> ctypes.CDLL:
    for name in _nvrtc_candidates():
        try:
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # NVRTC looks it up by its bare name
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaBuildError("NVRTC was not found; install the CUDA build of torch (it brings nvidia-cuda-nvrtc).")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise CudaBuildError(f"The NVIDIA driver was not found: {e}") from e


def _check(status: int, what: str) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise CudaBuildError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {status})")


def _nvrtc_check(status: int, what: str) -> None:
    if status:
        raise CudaBuildError(f"{what} failed (NVRTC error {status})")


def read_source(*names: str, extra: Sequence[str] = ()) -> str:
    """One translation unit: common.cuh, the named files of this package's cuda folder, then `extra` lines."""
    return "\n".join([*((SOURCES / name).read_text() for name in ("common.cuh", *names)), *extra])


def is_hopper() -> bool:
    """Compute capability 9.0: the only one with wgmma."""
    return bool(torch.cuda.get_device_capability() == (9, 0))


def compile_cubin(source: str, architecture: str, defines: Sequence[str] = ()) -> bytes:
    """Compile for one real architecture (`sm_90`). Raises CudaBuildError with the compiler's log."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"onebase.cu", 0, None, None)
    _nvrtc_check(status, "nvrtcCreateProgram")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *defines]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, text)
            raise CudaBuildError(f"NVRTC could not compile a kernel for {architecture}:\n{text.value.decode()}")
        size = ctypes.c_size_t()
        _nvrtc_check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        cubin = ctypes.create_string_buffer(size.value)
        _nvrtc_check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc_check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"{major.value}.{minor.value}"


def cached_cubin(source: str, architecture: str, defines: Sequence[str], folder: Path | None) -> bytes:
    """As `compile_cubin`, through a folder of cubins (written to a temporary name, then renamed)."""
    if folder is None:
        return compile_cubin(source, architecture, defines)
    key = hashlib.sha256("\0".join([source, architecture, *defines, _nvrtc_version()]).encode()).hexdigest()
    path = folder / f"{key[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = compile_cubin(source, architecture, defines)
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as f:
        f.write(cubin)
        f.flush()
        os.fsync(f.fileno())
    Path(temporary).replace(path)
    return cubin


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_uint),
        ("y", ctypes.c_uint),
        ("z", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_thread = threading.local()


def _use_primary_context(device: int) -> None:
    """The driver API launches in the thread's current context: make torch's primary context of this device current.
    Once a thread, and again after torch has been told another device."""
    if getattr(_thread, "device", None) == device and torch._C._cuda_getDevice() == device:
        return
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _thread.device = device


class CudaFunction:
    """One kernel of a loaded module. Launch from one thread at a time."""

    def __init__(self, handle: ctypes.c_void_p, name: str, device: int) -> None:
        self._handle, self._name, self._device, self._shared = handle, name, device, 0
        self._overlap = _Attribute(id=_PROGRAMMATIC_SERIALIZATION, value=1)
        overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
        self._config = _LaunchConfig(
            block_y=1, block_z=1, attributes=ctypes.pointer(self._overlap), num_attributes=int(overlaps)
        )
        self._config_address = ctypes.byref(self._config)
        self._values = (ctypes.c_uint64 * _MAX_PARAMETERS)()
        start = ctypes.addressof(self._values)
        self._at = [start + 8 * i for i in range(_MAX_PARAMETERS)]
        self._addresses = (ctypes.c_void_p * _MAX_PARAMETERS)(*self._at)
        self._launch = _driver().cuLaunchKernelEx

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        stream: int | None = None,
    ) -> None:
        """`args`: integers (addresses too), or ctypes values for everything else. On torch's current stream unless
        `stream` says otherwise. May start while the kernel before it ends: the kernel itself waits."""
        _use_primary_context(self._device)
        if shared_bytes > self._shared:
            _check(_driver().cuFuncSetAttribute(self._handle, _MAX_DYNAMIC_SHARED, shared_bytes), self._name)
            self._shared = shared_bytes
        config, values, addresses = self._config, self._values, self._addresses
        config.x, config.y, config.z = grid
        config.threads = threads
        config.shared_bytes = shared_bytes
        config.stream = torch._C._cuda_getCurrentRawStream(self._device) if stream is None else stream
        for i, value in enumerate(args):
            if type(value) is int:
                values[i] = value
                addresses[i] = self._at[i]
            else:
                addresses[i] = ctypes.addressof(value)
        status = self._launch(self._config_address, self._handle, addresses, None)
        if status:
            _check(status, self._name)


class CudaModule:
    """A compiled translation unit, loaded on the current device."""

    def __init__(self, source: str, *, defines: Sequence[str] = (), cache_dir: Path | None = None) -> None:
        device = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(device)
        architecture = "sm_90a" if is_hopper() else f"sm_{major}{minor}"
        cubin = cached_cubin(source, architecture, defines, cache_dir)
        torch.zeros(1, device="cuda")  # creates the primary context
        _use_primary_context(device)
        self._device = device
        self._module = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")
        self._functions: dict[str, CudaFunction] = {}

    def function(self, name: str) -> CudaFunction:
        if name not in self._functions:
            handle = ctypes.c_void_p()
            _check(_driver().cuModuleGetFunction(ctypes.byref(handle), self._module, name.encode()), name)
            self._functions[name] = CudaFunction(handle, name, self._device)
        return self._functions[name]


_BFLOAT16, _SWIZZLE_128, _PROMOTE_256 = 9, 3, 3  # CUtensorMapDataType, ...Swizzle, ...L2promotion


def tensor_map(x: torch.Tensor, box_rows: int) -> "ctypes.Array[ctypes.c_uint64]":
    """x [M, K] bf16 for the bulk copy engine: boxes of 64 columns x `box_rows`, 128-byte swizzle, zeros outside."""
    room = (ctypes.c_uint64 * 24)()
    offset = -ctypes.addressof(room) % 64  # the driver wants 64-byte alignment
    result = (ctypes.c_uint64 * 16).from_buffer(room, offset)
    status = _driver().cuTensorMapEncodeTiled(
        result,
        _BFLOAT16,
        2,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]),
        (ctypes.c_uint64 * 1)(x.stride(0) * 2),
        (ctypes.c_uint32 * 2)(64, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128,
        _PROMOTE_256,
        0,
    )
    _check(status, "cuTensorMapEncodeTiled")
    return result


def pointer(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def available() -> bool:
    """A CUDA device of compute capability 8.0 or newer, a driver and NVRTC."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        _driver(), _nvrtc()
    except CudaBuildError as e:
        log.warning("CUDA kernels are off: %s", e)
        return False
    return True
