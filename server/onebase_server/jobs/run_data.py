"""A run's data: uploaded files are checked, and a dataset of the server's disk is copied, both before its turn comes.

A dataset belongs to others, who go on writing it. The run keeps what lay there when it was ordered: a process that goes
on from a checkpoint, and the gate that measures afterwards, read what the first one has read.
"""

import os
import shutil
from pathlib import Path
from typing import Final

from onebase.durable import copy_file, fsync_folder
from onebase.errors import InvalidInput
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.settle import JobError, job_error
from onebase_server.jobs.training_lines import FileProblem, check_training_file
from onebase_server.records.tables import JobRow

DATA_FILES: Final = (".jsonl", ".json")


def check_files(job: JobRow, folder: RunFolder) -> int | JobError:
    """The number of training examples (0: the trainer counts them), or why the job can't be trained."""
    if job.dataset is not None:
        try:
            freeze_dataset(Path(job.dataset), folder)
        except InvalidInput as error:
            return job_error("invalid_dataset", error.message, "dataset")
        return 0
    try:
        return _judge_files(job, folder)
    except OSError as error:
        return job_error("internal_error", f"The job's files can't be read: {error.strerror}")


def _judge_files(job: JobRow, folder: RunFolder) -> int | JobError:
    found = check_training_file(folder.training)
    if isinstance(found, FileProblem):
        return job_error(found.code, found.message, "training_file")
    if job.validation_file is not None:
        validation = check_training_file(folder.validation, kind="validation", minimum=1)
        if isinstance(validation, FileProblem):
            return job_error(validation.code, validation.message, "validation_file")
    return found.examples


def freeze_dataset(dataset: Path, folder: RunFolder) -> list[str]:
    """The run's own copies, by name. Made once, whole or not at all; however often it is called, and whatever becomes
    of the dataset, they stay the same. Raises InvalidInput for a dataset that can't be read."""
    if not folder.dataset.is_dir():
        part = folder.dataset.with_name("dataset.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for path in files_of(dataset):
            try:
                copy_file(path.resolve(), part / path.name)
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise InvalidInput(f"{path.name} can't be read: {error.strerror}", param="dataset") from error
        fsync_folder(part)
        os.rename(part, folder.dataset)
        fsync_folder(folder.path)
    return sorted(map(str, folder.dataset.iterdir()))


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
