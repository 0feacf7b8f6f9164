"""`onebase doctor`: is this machine fit to serve and train, and is the home folder whole. Every line says what to do.

Reads and measures only: nothing is fetched, loaded, migrated or mended. What it writes is a probe in the home folder,
gone at once.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from onebase.bases import list_bases, verify_base
from onebase.errors import OnebaseError
from onebase.home_version import CURRENT, version_of
from onebase.store import AdapterStore, Version
from onebase_server.memory import free_memory
from onebase_server.settings import Settings
from onebase_server.startup import LOW_DISK_MB, check_exposed, check_port_free, check_writable, free_mb, look_at_records

Verdict = Literal["ok", "warn", "fail"]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "litestar", "uvicorn", "sqlalchemy", "safetensors")
LOW_MEMORY_MB = 1500


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    verdict: Verdict
    words: str


def examine(settings: Settings, *, whole: bool = False) -> Iterator[Finding]:
    """One finding after the other. `whole` also reads every byte of bases and adapters."""
    checks: list[tuple[str, Callable[[], tuple[Verdict, str]]]] = [
        ("python", python),
        ("packages", packages),
        ("compiler", compiler),
        ("memory", memory),
        ("GPU", gpu),
        ("home folder", lambda: home(settings)),
        ("disk", lambda: disk(settings)),
        ("database", lambda: database(settings)),
        ("bases", lambda: bases(settings, whole)),
        ("adapters", lambda: adapters(settings, whole)),
        ("keys", lambda: keys(settings)),
        ("port", lambda: port(settings)),
    ]
    for what, check in checks:
        try:
            verdict, words = check()
        except OnebaseError as error:
            verdict, words = "fail", error.message
        except OSError as error:
            verdict, words = "fail", f"{error.strerror or error} ({error.filename})"
        yield Finding(what, verdict, words)


def python() -> tuple[Verdict, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    return ("ok", version) if sys.version_info >= (3, 11) else ("fail", f"{version}: 3.11 or newer is needed")


def packages() -> tuple[Verdict, str]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return "fail", f"missing: {', '.join(missing)}; install 'onebase[server,training]'"
    return "ok", ", ".join(found)


def compiler() -> tuple[Verdict, str]:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        return "warn", "no C++ compiler: the CPU kernels can't be built and plain torch is used (slower); install g++"
    return "ok", found


def memory() -> tuple[Verdict, str]:
    free = free_memory() // 1_000_000
    words = f"{free:,} MB free of {psutil.virtual_memory().total // 1_000_000:,} MB"
    return (
        ("ok", words) if free >= LOW_MEMORY_MB else ("warn", f"{words}: the embedded base and a training take 1.5 GB")
    )


def gpu() -> tuple[Verdict, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "ok", "none; the CPU serves"
    asked = [tool, "--query-gpu=name,memory.free,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        return "warn", f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:200]}"
    return "ok", "; ".join(done.stdout.strip().splitlines())


def home(settings: Settings) -> tuple[Verdict, str]:
    root = settings.home.root
    if not root.exists():
        return "ok", f"{root} is not there yet; the first start makes it"
    version = version_of(root)
    if version > CURRENT:
        return "fail", f"{root} is of version {version}; this onebase knows up to {CURRENT}: install the newer one"
    check_writable(root)
    if os.stat(root).st_mode & 0o077:
        return "warn", f"others may look into {root}: chmod 700 it"
    later = "" if version == CURRENT else f", upgraded to {CURRENT} at the next start"
    return "ok", f"{root}, version {version}{later}"


def disk(settings: Settings) -> tuple[Verdict, str]:
    folder = next(path for path in (settings.home.root, *settings.home.root.parents) if path.exists())
    free = free_mb(folder)
    if free < LOW_DISK_MB:
        return "fail", f"{free:,} MB free under {folder}: bases, adapters and uploads need more"
    return "ok", f"{free:,} MB free"


def database(settings: Settings) -> tuple[Verdict, str]:
    if settings.database is None and not (settings.home.root / "onebase.db").exists():
        return "ok", "SQLite, made at the first start"
    standing = look_at_records(settings)
    kind = "PostgreSQL answers" if settings.database else "SQLite is whole"
    if standing.damage is not None:
        return "fail", f"SQLite finds it damaged ({standing.damage}): put it aside and restore a backup"
    if not standing.is_known:
        return "fail", f"written by a newer onebase (revision {standing.revision}): install that one"
    if not standing.is_current:
        since = "without tables yet" if standing.revision is None else f"of an older onebase ({standing.revision})"
        return "warn", f"{kind}, {since}: the next start brings it up to date; make a backup before"
    return "ok", f"{kind} and up to date"


def bases(settings: Settings, whole: bool) -> tuple[Verdict, str]:
    if not settings.home.bases.is_dir():
        return "ok", "none yet; the embedded one is unpacked at the first start"
    found = list_bases(settings.home)
    for spec in found if whole else ():
        verify_base(spec)
    names = ", ".join(spec.id for spec in found) or "none yet"
    return "ok", f"{names}{', checksums right' if whole and found else ''}"


def adapters(settings: Settings, whole: bool) -> tuple[Verdict, str]:
    if not settings.home.adapters.is_dir():
        return "ok", "none yet"
    store = AdapterStore(settings.home.adapters)
    versions = [version for entry in store.list() for version in entry.versions]
    damaged = [version.id for version in versions if whole and not is_whole(version)]
    if damaged:
        return "fail", f"damaged: {', '.join(damaged)}; remove them or restore a backup"
    return "ok", f"{len(versions)} versions{', checksums right' if whole and versions else ''}"


def is_whole(version: Version) -> bool:
    manifest = version.manifest
    wanted = {"adapter_model.safetensors": manifest.weights_sha256, "adapter_config.json": manifest.config_sha256}
    return all(hashlib.sha256((version.path / name).read_bytes()).hexdigest() == sha for name, sha in wanted.items())


def keys(settings: Settings) -> tuple[Verdict, str]:
    made = (settings.home.root / "onebase.db").exists() or settings.database is not None
    has_keys = settings.has_keys or (made and look_at_records(settings).has_keys)
    check_exposed(settings, has_keys)
    return ("ok", "set") if has_keys else ("warn", "none: whoever reaches this machine's loopback may do everything")


def port(settings: Settings) -> tuple[Verdict, str]:
    check_port_free(settings.host, settings.port)
    return "ok", f"{settings.host}:{settings.port} is free"
