"""Datasets of the Hugging Face hub, and folders that `datasets` saved: rows one at a time, through that library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onebase.errors import DatasetError
from onebase_training.config import Source
from onebase_training.raw_record import RawRecord, plain


def hub_rows(source: Source) -> Iterator[RawRecord]:
    """Numbered from 1. Streamed, so nothing is stored; with HF_HUB_OFFLINE from the library's own cache.

    Raises DatasetError that says what to do: not there, gated, no network, no such split, no package.
    """
    datasets = _library(source.path, "no such file; to read it from the hub: pip install datasets")

    def opened() -> Any:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=not _is_offline()
        )

    yield from _rows(source, opened)


def saved_rows(path: Path, source: Source) -> Iterator[RawRecord]:
    """Of a folder that `save_to_disk` wrote, one dataset or several by split; any other folder is refused."""
    is_dict, is_one = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    if not is_dict and not is_one:
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file())[:5]
        raise DatasetError(
            source.path,
            [f"is a folder that datasets' save_to_disk did not write; name its files ({', '.join(files) or 'none'})"],
        )
    datasets = _library(source.path, "to read a folder that datasets saved: pip install datasets")

    def opened() -> Any:
        saved = datasets.load_from_disk(str(path))
        if is_dict and source.split not in saved:
            raise ValueError(f"no split {source.split!r}; there are {', '.join(saved)}")
        return saved[source.split] if is_dict else saved

    yield from _rows(source, opened)


def _rows(source: Source, opened: Any) -> Iterator[RawRecord]:
    number = 0
    try:
        for row in opened():
            number += 1
            yield RawRecord(number, plain(row))
    except Exception as error:  # the library raises its own, the hub client's, pyarrow's and fsspec's
        behind = f"broke off behind record {number}: " if number else ""
        raise DatasetError(source.path, [behind + _words(source, error)]) from error


def _words(source: Source, error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "gated" in text.lower() or type(error).__name__ == "GatedRepoError":
        page = f"https://huggingface.co/datasets/{source.path}"
        return f"is gated: agree to its terms on {page}, then log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, ConnectionError) or "offline" in text.lower():
        return (
            "no such file, and the hub can't be reached. Load it once where there is a network (HF_HUB_OFFLINE=1 then "
            f"reads the cache), or save it as JSON lines and give the file's path. The library says: {text[:300]}"
        )
    if type(error).__name__ == "DatasetNotFoundError" or isinstance(error, FileNotFoundError):
        return f"neither a file nor a hub dataset that can be seen with this login: {text[:300]}"
    return f"can't be read: {text[:500]}"


def _library(name: str, missing: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DatasetError(name, [missing]) from None
    return datasets


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
