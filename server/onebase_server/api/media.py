"""What a body may come as: JSON, not compressed. Asked before a byte of it is read."""

from litestar.datastructures import Headers
from litestar.exceptions import HTTPException


class UnsupportedMedia(HTTPException):
    """415. Its words are for the caller."""

    status_code = 415


def check_json(headers: Headers) -> None:
    """Raises UnsupportedMedia. No content type at all is taken for JSON."""
    check_encoding(headers)
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in ("", "application/json") and not (given.startswith("application/") and given.endswith("+json")):
        raise UnsupportedMedia(
            f"Unsupported content type: '{given[:100]}'. This API method only accepts 'application/json' requests: "
            "send the header 'Content-Type: application/json'."
        )


def check_encoding(headers: Headers) -> None:
    """A compressed body may be a thousand times larger than what was sent, and no client of this API sends one."""
    given = headers.get("content-encoding", "").strip().lower()
    if given not in ("", "identity"):
        raise UnsupportedMedia(
            f"Unsupported content encoding: '{given[:100]}'. Send the body as it is, without the header "
            "'Content-Encoding'."
        )
