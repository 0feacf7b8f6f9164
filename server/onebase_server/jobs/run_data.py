"""A run's data: uploaded files are checked, and a dataset of the server's disk is copied, both before its turn comes.

A dataset belongs to others, who go on writing it. The run keeps what lay there when it was ordered: a process that goes
on from a checkpoint, and the gate that measures afterwards, read what the first one has read.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from onebase.durable import copy_file, fsync_folder
from onebase.errors import InvalidInput
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.settle import JobError, job_error
from onebase_server.jobs.training_lines import FileProblem, check_training_file
from onebase_server.records.tables import JobRow

DATA_FILES: Final = (".jsonl", ".json")
MB: Final = 1_000_000


GoOn = Callable[[str | None], None]
"""Called often with how far it is, if that is worth saying; raises if the work is to end."""


def _to_the_end(_said: str | None) -> None:
    return


def check_files(job: JobRow, folder: RunFolder, go_on: GoOn = _to_the_end) -> int | JobError:
    """The number of training examples (0: the trainer counts them), or why the job can't be trained."""
    if job.dataset is not None:
        try:
            freeze_dataset(Path(job.dataset), folder, go_on)
        except InvalidInput as error:
            return job_error("invalid_dataset", error.message, "dataset")
        return 0
    try:
        return _judge_files(job, folder, go_on)
    except OSError as error:
        return job_error("internal_error", f"The job's files can't be read: {error.strerror}")


def _judge_files(job: JobRow, folder: RunFolder, go_on: GoOn) -> int | JobError:
    found = check_training_file(folder.training, go_on=go_on)
    if isinstance(found, FileProblem):
        return job_error(found.code, found.message, "training_file")
    if job.validation_file is not None:
        validation = check_training_file(folder.validation, kind="validation", minimum=1, go_on=go_on)
        if isinstance(validation, FileProblem):
            return job_error(validation.code, validation.message, "validation_file")
    return found.examples


def freeze_dataset(dataset: Path, folder: RunFolder, go_on: GoOn = _to_the_end) -> list[str]:
    """The run's own copies, by name. Made once, whole or not at all; however often it is called, and whatever becomes
    of the dataset, they stay the same. Raises InvalidInput for a dataset that can't be read or has no room."""
    if not folder.dataset.is_dir():
        part = folder.dataset_part
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _copy_files(files_of(dataset), part, go_on)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        fsync_folder(part)
        os.rename(part, folder.dataset)
        fsync_folder(folder.path)
    return sorted(map(str, folder.dataset.iterdir()))


def _copy_files(paths: list[Path], target: Path, go_on: GoOn) -> None:
    size, done = sum(path.stat().st_size for path in paths if path.is_file()), 0
    room = shutil.disk_usage(target).free
    if size > room:
        raise InvalidInput(
            f"it takes {size / MB:,.0f} MB, and the server's disk has {room / MB:,.0f} MB left", param="dataset"
        )

    def copied(piece: int) -> None:
        nonlocal done
        done += piece
        go_on(f"copying the dataset: {done / MB:,.0f} of {size / MB:,.0f} MB")

    for path in paths:
        try:
            copy_file(path.resolve(), target / path.name, copied)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise InvalidInput(f"{path.name} can't be read: {error.strerror}", param="dataset") from error


def files_of(dataset: Path) -> list[Path]:
    """The dataset itself, or the data files that its folder holds now, by name. A link that leads out is none of it.
    Raises InvalidInput if there is none."""
    if not dataset.is_dir():
        return [dataset]
    found = [path for path in sorted(dataset.iterdir()) if path.suffix.lower() in DATA_FILES and path.is_file()]
    inside = [path for path in found if path.resolve().is_relative_to(dataset.resolve())]
    if not inside:
        raise InvalidInput(f"the folder {dataset.name} holds no {' or '.join(DATA_FILES)} file", param="dataset")
    return inside
