"""Compile the C++ kernels once, with the machine's own compiler and for its own processor, and keep the library.

The file's name holds a hash of sources, flags, compiler and processor, so a change of any of them compiles afresh and
an old library is never loaded by mistake. No compiler, or one that fails, is no error: the caller falls back.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-pthread", "-fPIC", "-shared", "-fno-math-errno", "-w")


def load_library(cache: Path, *, march: str = "native") -> ctypes.CDLL | None:
    """The compiled kernels, or None with a warning that says why.

    `march` is the compiler's name of the target; others than native serve the tests of the fallbacks.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        logger.warning("no C++ compiler (tried %s): serving on the CPU is several times slower", ", ".join(COMPILERS))
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, cache, march)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the CPU kernels did not build or load, serving is several times slower: %s", _reason(error))
        return None


def _built(compiler: str, cache: Path, march: str) -> Path:
    """Path of the library; compiles it when the cache has none. Safe between processes: the last rename wins."""
    flags = (*FLAGS, _target_flag(march))
    library = cache / f"onebase_cpu-{_key(compiler, flags)}.so"
    if library.is_file():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    handle, building = tempfile.mkstemp(suffix=".so", prefix=".building-", dir=cache)
    os.close(handle)
    try:
        command = [compiler, *flags, str(SOURCES / "forward.cpp"), "-o", building]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(building, library)
    finally:
        Path(building).unlink(missing_ok=True)
    logger.info("compiled the CPU kernels in %.1f s: %s", time.monotonic() - began, library)
    return library


def _target_flag(march: str) -> str:
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return f"-mcpu={march}" if arm else f"-march={march}"


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    digest.update("\0".join((version, *flags, _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What decides which instructions `native` means: the flags on Linux, the model elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} exited with {error.returncode}: {(error.stderr or '').strip()[-500:]}"
    return str(error)
