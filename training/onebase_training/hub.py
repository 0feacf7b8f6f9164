"""To the hub: a folder or a file under `owner/name`. The only module that talks to it; no torch.

What the hub or the network says ends as one OnebaseError with what to do. The token is huggingface_hub's own matter
(`hf auth login`, or HF_TOKEN).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onebase.errors import InvalidInput, OnebaseError


def require_login(repository: str) -> None:
    """Before hours are spent on what is to be pushed: the id is one, and the hub knows the token.

    Raises OnebaseError, saying what is wrong with which.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InvalidInput(f"--push {repository}: {error}", param="push") from error
    if repository.count("/") != 1:
        raise InvalidInput(f"--push {repository}: must be owner/name", param="push")
    with _told(f"nothing was written: it could not be pushed to {repository}"):
        _api().whoami()


def push(path: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder's files, or one file, into the repository (made if it is not there); the commit's address.

    Raises OnebaseError when the hub refuses; what was written here stays.
    """
    with _told(f"{path} could not be pushed to {repository}"):
        api = _api()
        api.create_repo(repository, private=private, exist_ok=True)
        if path.is_dir():
            return str(api.upload_folder(repo_id=repository, folder_path=path))
        return str(api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name))


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


@contextmanager
def _told(what: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OnebaseError(f"{what}: no token. `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the hub does not know the token: `hf auth login`, or set HF_TOKEN",
            403: "the token may not write there: make one with write access, and look at the owner's name",
            404: "there is no such owner, or the token may not see it",
        }
        said = str(error.server_message or error).strip().splitlines()
        raise OnebaseError(f"{what}: {advice.get(status, f'the hub answered {status}')} ({said[0]})") from error
    except (httpx.HTTPError, OSError) as error:
        raise OnebaseError(f"{what}: {error or type(error).__name__}") from error
