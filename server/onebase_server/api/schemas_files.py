"""Wire schemas of /v1/files."""

from typing import Literal

from onebase_server.api.schemas_common import ListPage, Wire
from onebase_server.records.tables import FileRow


class FileObject(Wire):
    """OpenAI's File. `status` is deprecated there and still required."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None


class FileList(ListPage):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Wire):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(row: FileRow) -> FileObject:
    return FileObject(
        id=row.id,
        object="file",
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        filename=row.filename,
        purpose=row.purpose,
        status="processed",
        status_details=row.status_details,
    )
