"""The uploaded files that an order names: found as the caller sees them, and given to the run by names of its own."""

from onebase.errors import InvalidInput, NotFound
from onebase_server.jobs.files import TRAINING, FileService
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.records.tables import FileRow


async def find_file(files: FileService, file_id: str, owner: str | None, param: str) -> FileRow:
    """Raises InvalidInput, which names `param`, for a file that the owner does not have or that is not for training."""
    try:
        file = await files.get(file_id, owner)
    except NotFound as error:
        raise _unknown(file_id, param) from error
    if file.purpose != TRAINING:
        raise InvalidInput(
            f"File '{file_id}' was uploaded with the purpose '{file.purpose}'; it must be '{TRAINING}'.",
            param=param,
            code="invalid_file_purpose",
        )
    return file


def give(files: FileService, file: FileRow, folder: RunFolder, name: str) -> None:
    """`name`: training or validation. Raises InvalidInput for a file without bytes: deleted just now, or named by a
    restored database only."""
    try:
        files.link(file, getattr(folder, name))
    except NotFound as error:
        raise _unknown(file.id, f"{name}_file") from error


def _unknown(file_id: str, param: str) -> InvalidInput:
    return InvalidInput(f"File '{file_id}' does not exist.", param=param, code="invalid_value")
