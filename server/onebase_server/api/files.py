"""`/v1/files`: upload, list, get, content, delete."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from litestar import Request, delete, get, post
from litestar.datastructures import Headers
from litestar.openapi.spec import OpenAPIFormat, OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream

from onebase.errors import InvalidInput, OnebaseError
from onebase_server.api.caller import caller_of
from onebase_server.api.deps import Deps
from onebase_server.api.multipart import UploadForm, receive_form
from onebase_server.api.quota import room_for_file
from onebase_server.api.schemas_files import FileDeleted, FileList, FileObject, file_object
from onebase_server.jobs.files import PURPOSES, chunks

MIN_EXPIRY, MAX_EXPIRY = 3600, 2_592_000


@dataclass
class UploadOperation(Operation):
    """Says in openapi.yaml what the handler reads from the stream by itself."""

    def __post_init__(self) -> None:
        text = Schema(type=OpenAPIType.STRING)
        form = Schema(
            type=OpenAPIType.OBJECT,
            required=["file", "purpose"],
            properties={
                "file": Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY),
                "purpose": Schema(type=OpenAPIType.STRING, enum=list(PURPOSES)),
                "expires_after[anchor]": text,
                "expires_after[seconds]": text,
            },
        )
        self.request_body = RequestBody(content={"multipart/form-data": OpenAPIMediaType(schema=form)}, required=True)


# The handler bounds the body itself: a file may be far larger than any JSON.
@post(
    "/files",
    operation_id="createFile",
    status_code=200,
    tags=["Files"],
    request_max_body_size=None,
    operation_class=UploadOperation,
)
async def create_file(request: Request[Any, Any, Any], deps: Deps) -> FileObject:
    """Upload one file, streamed to disk. For fine-tuning: a .jsonl, every line a JSON object."""
    owner = caller_of(request).owner
    async with room_for_file(owner, deps) as room:
        form = await receive_form(request, deps.files, room.take if room else None)
        try:
            expires_in = _expiry(form.fields)
            upload, purpose = _complete(form)
        except OnebaseError:
            form.discard()
            raise
        row = await deps.files.keep(
            upload,
            filename=form.filename,
            purpose=purpose,
            owner=owner,
            expires_in=expires_in,
            check_room=room.check if room else None,
        )
        if room is not None:
            room.is_kept = True
    return file_object(row)


@get("/files", operation_id="listFiles", tags=["Files"])
async def list_files(
    request: Request[Any, Any, Any],
    deps: Deps,
    purpose: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 10_000,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
    after: FromQuery[str | None] = None,
) -> FileList:
    """The caller's files, newest first unless asked otherwise."""
    sees = caller_of(request).sees
    page = await deps.files.list(sees, purpose=purpose, after=after, limit=limit, order=order)
    data = [file_object(row) for row in page.rows]
    return FileList(
        object="list",
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@get("/files/{file_id:str}", operation_id="retrieveFile", tags=["Files"])
async def retrieve_file(file_id: FromPath[str], request: Request[Any, Any, Any], deps: Deps) -> FileObject:
    """One file's description."""
    return file_object(await deps.files.get(file_id, caller_of(request).sees))


@get("/files/{file_id:str}/content", operation_id="downloadFile", tags=["Files"], media_type="application/octet-stream")
async def download_file(file_id: FromPath[str], request: Request[Any, Any, Any], deps: Deps) -> Stream:
    """The bytes, exactly as they were uploaded."""
    row = await deps.files.get(file_id, caller_of(request).sees)
    source = deps.files.open(row)

    def content() -> Iterator[bytes]:
        with source:
            yield from chunks(source)

    headers = Headers({"content-length": str(row.bytes), "x-content-type-options": "nosniff"})
    return Stream(content(), headers=dict(headers), media_type="application/octet-stream")


@delete("/files/{file_id:str}", operation_id="deleteFile", status_code=200, tags=["Files"])
async def delete_file(file_id: FromPath[str], request: Request[Any, Any, Any], deps: Deps) -> FileDeleted:
    """Delete a file. Jobs that were made from it keep what they need."""
    await deps.files.delete(file_id, caller_of(request).sees)
    return FileDeleted(id=file_id, object="file", deleted=True)


def _complete(form: UploadForm) -> tuple[Any, str]:
    purpose = form.fields.get("purpose")
    for name, value in (("file", form.upload), ("purpose", purpose)):
        if value is None:
            raise InvalidInput(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return form.upload, purpose or ""


def _expiry(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidInput(
            "Invalid value for 'expires_after[anchor]': expected one of 'created_at'.",
            param="expires_after[anchor]",
            code="invalid_value",
        )
    if not (seconds and seconds.isascii() and seconds.isdigit() and MIN_EXPIRY <= int(seconds) <= MAX_EXPIRY):
        raise InvalidInput(
            f"Invalid 'expires_after[seconds]': expected an integer from {MIN_EXPIRY} to {MAX_EXPIRY}.",
            param="expires_after[seconds]",
            code="invalid_value",
        )
    return int(seconds)
