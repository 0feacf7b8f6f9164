"""A multipart body straight onto disk: one `file` part and some short text fields. Knows no purpose and no record.

Litestar would spool the part into a temporary file of its own first; here its bytes are written once, with the limit
checked as they come, in the folder where the file is to stay.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from litestar import Request
from litestar.datastructures import Headers
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from onebase.errors import InvalidInput
from onebase_server.api.media import check_encoding
from onebase_server.jobs.files import FileService, Upload

MAX_FIELD = 4096
MAX_PARTS = 32
FLUSH = 1 << 20


@dataclass
class UploadForm:
    """What came: the file (not yet kept) with the name the client gave it, and the other fields."""

    upload: Upload | None = None
    filename: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def discard(self) -> None:
        if self.upload is not None:
            self.upload.discard()


async def receive_form(
    request: Request[Any, Any, Any], files: FileService, take: Callable[[int], None] | None = None
) -> UploadForm:
    """Read the whole body. `take` is told of the file's bytes before they are written and may refuse them.

    Raises InvalidInput, or what `take` raises, leaving nothing on disk, if it is no complete multipart form, and
    UnsupportedMedia if it is compressed.
    """
    check_encoding(request.headers)
    form = UploadForm()
    reader = _Reader(form, files, take)
    try:
        with PushMultipartParser(_boundary(request.headers), max_segment_count=MAX_PARTS) as parser:
            async for chunk in request.stream():
                for item in parser.parse(chunk) if chunk else ():
                    reader.take(item)
                if len(reader.waiting) >= FLUSH:
                    await asyncio.to_thread(reader.flush)
        await asyncio.to_thread(reader.flush)
    except MultipartError as error:
        form.discard()
        raise InvalidInput(f"The multipart body can't be read: {error}.", param="file") from error
    except BaseException:
        form.discard()
        raise
    return form


class _Reader:
    """Sorts the parser's items into the form: file bytes to the upload, everything else to short fields."""

    def __init__(self, form: UploadForm, files: FileService, take: Callable[[int], None] | None) -> None:
        self._form = form
        self._files = files
        self._take = take
        self._segment: MultipartSegment | None = None
        self._text = bytearray()
        self.waiting = bytearray()

    def take(self, item: MultipartSegment | bytearray | bytes | None) -> None:
        if isinstance(item, MultipartSegment):
            self._begin(item)
        elif item is not None and self._is_file:
            self.waiting += item
        elif item is not None:
            self._text += item
            if len(self._text) > MAX_FIELD:
                raise InvalidInput(f"The field '{self._name}' is longer than {MAX_FIELD} bytes.", param=self._name)
        elif not self._is_file:
            self._form.fields[self._name] = self._text.decode("utf-8", "replace")

    def flush(self) -> None:
        if self._form.upload is not None:
            if self._take is not None:
                self._take(len(self.waiting))
            self._form.upload.write(self.waiting)
        self.waiting = bytearray()

    def _begin(self, segment: MultipartSegment) -> None:
        self._segment = segment
        self._text = bytearray()
        if not self._is_file:
            return
        if self._form.upload is not None:
            raise InvalidInput("Send one file at a time.", param="file")
        self._form.upload = self._files.begin()
        self._form.filename = segment.filename or ""

    @property
    def _name(self) -> str:
        return "" if self._segment is None else self._segment.name

    @property
    def _is_file(self) -> bool:
        return self._segment is not None and self._segment.name == "file" and self._segment.filename is not None


def _boundary(headers: Headers) -> str:
    kind, options = parse_options_header(headers.get("content-type", ""))
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not re.fullmatch(r"[\x21-\x7e ]{1,200}", boundary):
        raise InvalidInput("Send the file as multipart/form-data, with the fields `file` and `purpose`.", param="file")
    return str(boundary)
