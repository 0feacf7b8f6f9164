"""Which files and folders of the server's disk an admin may train on: those inside the dataset folders, links followed.

The folders are `<home>/datasets` and those of ONEBASE_DATASET_ROOTS. A relative path is looked for in each in turn.
"""

from collections.abc import Sequence
from pathlib import Path

from onebase.errors import InvalidInput
from onebase.home import Home


def find_dataset(given: str, home: Home, roots: Sequence[Path]) -> Path:
    """The real path of a file or a folder. Raises InvalidInput for one outside the folders, and for one that is not
    there. Which of a folder's files are trained on is seen when the run starts."""
    folders = [(home.root / "datasets").resolve(), *(root.resolve() for root in roots)]
    if not given or "\0" in given:
        raise refused("'dataset' must name a file or a folder")
    candidates = [Path(given)] if Path(given).is_absolute() else [folder / given for folder in folders]
    inside = [real for real in map(real_path, candidates) if any(real.is_relative_to(each) for each in folders)]
    if not inside:
        # the same words whether such a file exists outside or not: the answer must not tell
        raise refused(f"'dataset' must lie inside one of: {', '.join(map(str, folders))}")
    found = next((path for path in inside if is_there(path) and path not in folders), None)
    if found is None:
        raise refused(f"there is no file or folder '{given}' in {', '.join(map(str, folders))}")
    return found


def real_path(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise refused(f"'dataset' can't be read: {type(error).__name__}") from error


def is_there(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except OSError:  # such as a name that is too long
        return False


def refused(message: str) -> InvalidInput:
    return InvalidInput(message, param="dataset", code="invalid_value")
