"""Uploaded and produced files: bytes under <home>/files/<id>, one row each. Knows no HTTP and no training.

A file is written beside its place, synced and renamed before its row is made: a row without bytes can't be, and bytes
without a row are swept at the next start. What the client called its file is data, never a path.
"""

import asyncio
import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from onebase.durable import fsync_folder
from onebase.errors import InvalidInput, NotFound, OnebaseError
from onebase_server.jobs.training_lines import find_broken_line
from onebase_server.records.files import FileRecords
from onebase_server.records.pages import Order, Page
from onebase_server.records.tables import FileRow

logger = logging.getLogger(__name__)

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
TRAINING = "fine-tune"
RESULTS = "fine-tune-results"
PART = ".part"
CHUNK = 1 << 20
MAX_NAME = 512
ABANDONED_S = 3600


class Upload:
    """A file on its way in. Always ends in `finish` (kept) or `discard`; `write` raises InvalidInput past `limit`."""

    def __init__(self, folder: Path, limit: int, file_id: str | None = None) -> None:
        self.id = file_id or f"file-{secrets.token_hex(12)}"
        self.bytes = 0
        self._limit = limit
        self._hash = hashlib.sha256()
        self.path = folder / self.id
        self.part = folder / (self.id + PART)
        folder.mkdir(parents=True, exist_ok=True)
        self._out: IO[bytes] = os.fdopen(os.open(self.part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | bytearray) -> None:
        self.bytes += len(data)
        if self.bytes > self._limit:
            raise InvalidInput(
                f"The file is larger than {self._limit} bytes, the largest that this server takes.",
                param="file",
                code="file_too_large",
            )
        self._hash.update(data)
        self._out.write(data)

    def sync(self) -> None:
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()

    def finish(self) -> None:
        """Move it to its place, durably. After `sync`."""
        os.rename(self.part, self.path)
        fsync_folder(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind. May be called at any time, any number of times."""
        self._out.close()
        self.part.unlink(missing_ok=True)


class FileService:
    """`limit` is the largest file in bytes. `now` gives Unix seconds. `owner=None` sees every file."""

    def __init__(
        self,
        folder: Path,
        records: FileRecords,
        *,
        limit: int = 512 << 20,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._records = records
        self._limit = limit
        self._now = now

    def begin(self) -> Upload:
        """A place for an upload's bytes; the caller passes it to `keep`, or discards it."""
        return Upload(self._folder, self._limit)

    async def keep(
        self,
        upload: Upload,
        *,
        filename: str,
        purpose: str,
        owner: str,
        expires_in: int | None = None,
        check_room: Callable[[int], None] | None = None,
    ) -> FileRow:
        """Check, sync and record an upload. Raises InvalidInput and keeps nothing if it may not be kept.

        `check_room` is told the bytes of the owner's files just before this one becomes one of them, and may raise an
        OnebaseError.
        """
        try:
            _check_names(filename, purpose)
            await asyncio.to_thread(upload.sync)
            if purpose == TRAINING:
                problem = await asyncio.to_thread(find_broken_line, upload.part)
                if problem is not None:
                    raise InvalidInput(problem, param="file", code="invalid_file_format")
            now = int(self._now())
            row = FileRow(
                id=upload.id,
                owner=owner,
                filename=filename,
                purpose=purpose,
                bytes=upload.bytes,
                sha256=upload.sha256,
                created_at=now,
                expires_at=None if expires_in is None else now + expires_in,
                status="processed",
            )
            await asyncio.to_thread(upload.finish)
        finally:
            upload.discard()
        try:
            await self._records.add(row, check_room)
        except OnebaseError:  # any other error may have come after the commit: then the bytes are needed, else swept
            upload.path.unlink(missing_ok=True)
            raise
        return row

    async def add_once(self, file_id: str, data: bytes, *, filename: str, purpose: str, owner: str) -> str:
        """Keep bytes that the server made, such as a job's results, under an id of its choice. Again: no change."""
        if await self._records.get(file_id, None) is None:
            upload = Upload(self._folder, self._limit, file_id)
            upload.write(data)
            await self.keep(upload, filename=filename, purpose=purpose, owner=owner)
        return file_id

    async def get(self, file_id: str, owner: str | None) -> FileRow:
        """Raises NotFound."""
        row = None if "\x00" in file_id else await self._records.get(file_id, owner)
        if row is None or (row.expires_at is not None and row.expires_at <= self._now()):
            raise NotFound(f"No such File object: {file_id}", param="id")
        return row

    async def list(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> Page[FileRow]:
        """One page. Raises InvalidInput if `after` is not in the list."""
        return await self._records.list(owner, purpose=purpose, after=after, limit=limit, order=order)

    def open(self, row: FileRow) -> IO[bytes]:
        """Its bytes, which stay readable even if the file is deleted meanwhile. Raises NotFound if it is gone."""
        try:
            return (self._folder / row.id).open("rb")
        except FileNotFoundError as error:
            raise NotFound(f"No such File object: {row.id}", param="id") from error

    def link(self, row: FileRow, target: Path) -> None:
        """Give a run its own name for the bytes, so that deleting the file does not take them from it."""
        try:
            os.link(self._folder / row.id, target)
        except FileNotFoundError as error:
            raise NotFound(f"No such File object: {row.id}", param="id") from error
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            with self.open(row) as source, target.open("wb") as copy:
                for chunk in chunks(source):
                    copy.write(chunk)

    async def delete(self, file_id: str, owner: str | None) -> None:
        """Raises NotFound. The row goes first: what a crash leaves is swept."""
        row = await self.get(file_id, owner)
        await self._records.delete(row.id)
        (self._folder / row.id).unlink(missing_ok=True)

    async def sweep(self) -> None:
        """Remove expired files, and bytes that no row names: left by a crash, or of an upload that comes in now.

        Which of the two, their age tells: nobody uploads for an hour without a byte.
        """
        for row in await self._records.expired(int(self._now())):
            await self._records.delete(row.id)
            (self._folder / row.id).unlink(missing_ok=True)
        if not self._folder.is_dir():
            return
        paths = list(self._folder.iterdir())
        known = await self._records.ids()
        for path in paths:
            if path.name not in known and path.is_file() and is_abandoned(path, self._now()):
                logger.info("removing %s: no record names it", path)
                path.unlink(missing_ok=True)


def is_abandoned(path: Path, now: float) -> bool:
    """Whether nothing was written there for an hour."""
    try:
        return now - path.stat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False


def _check_names(filename: str, purpose: str) -> None:
    if purpose not in (*PURPOSES, RESULTS):
        raise InvalidInput(
            f"'{purpose}' is not one of {list(PURPOSES)} - 'purpose'", param="purpose", code="invalid_value"
        )
    if not filename or len(filename) > MAX_NAME or "\x00" in filename:
        raise InvalidInput("The file needs a name of 1 to 512 characters.", param="file", code="invalid_value")
    if purpose == TRAINING and not filename.lower().endswith(".jsonl"):
        extension = filename.rpartition(".")[2] if "." in filename else filename
        raise InvalidInput(
            f"Invalid extension {extension}. A file for fine-tuning must end in .jsonl.",
            param="file",
            code="invalid_file_extension",
        )


def chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk
