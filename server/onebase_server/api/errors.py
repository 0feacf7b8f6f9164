"""One table from error class to OpenAI's error body, for every path: our own errors, Litestar's, and bugs.

The message of an error that is not ours is never shown: it may hold library names or paths. The log has it, with the
request id that the client was given.
"""

import errno
import logging
import math
from dataclasses import dataclass
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from onebase import errors as domain
from onebase_server.api.decode import RequestRefused
from onebase_server.api.media import UnsupportedMedia
from onebase_server.api.request_id import request_id_of
from onebase_server.api.schemas_common import ErrorBody, ErrorDetail
from onebase_server.api.waiting import ClientLeft

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """How one error class looks on the wire."""

    status: int
    type: str = "invalid_request_error"
    shows_code: bool = True
    """False: OpenAI has `code: null` here, whatever word the class carries."""
    is_our_fault: bool = False
    """The message is for the operator: it goes to the log, and the client gets the request id to ask about."""


# The nearest class in an error's MRO wins.
TABLE: dict[type[BaseException], Row] = {
    domain.InvalidInput: Row(400),
    domain.NotFound: Row(404),
    domain.Conflict: Row(409),  # SDKs retry 409: raise it only for a state that passes, else InvalidInput
    domain.Unauthenticated: Row(401),
    domain.Forbidden: Row(403),
    domain.RateLimited: Row(429, "requests"),
    domain.Overloaded: Row(429, "requests"),
    domain.NotReady: Row(503, "server_error", shows_code=False),
    domain.DeadlineExceeded: Row(503, "server_error"),
    domain.BaseModelError: Row(503, "server_error"),
    domain.TrainingError: Row(500, "server_error"),
    domain.EngineError: Row(500, "server_error", is_our_fault=True),
    domain.OnebaseError: Row(500, "server_error", is_our_fault=True),
}

# Litestar's own refusals, before a handler runs: the words are ours, since its own name the library's parts.
LITESTAR_WORDS: dict[int, tuple[str, str | None]] = {
    400: ("The request could not be understood.", None),
    401: ("You didn't provide an API key.", None),
    403: ("You may not do this.", "insufficient_permissions"),
    404: ("Invalid URL ({method} {path})", None),
    405: ("Not allowed to {method} on {path}.", "method_not_supported"),
    408: ("The request's body came too slowly.", "request_timeout"),
    413: ("The request body is larger than this server takes.", "request_too_large"),
    415: ("Unsupported content type: send application/json.", "unsupported_media_type"),
    429: ("Too many requests.", "rate_limit_exceeded"),
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DATABASE_AWAY = "The server's database does not answer: files, jobs and stored chats are not to be had just now."
CLIENT_LEFT = 499
"""Nobody reads this; it is for the log, as nginx has it."""
OUR_FAULT = "The server had an error while processing your request. Its log has the request id {request_id}."


@dataclass(frozen=True, slots=True)
class Answer:
    """An error, ready to send: as a response before the first byte, or as an event after it."""

    status: int
    body: ErrorBody
    headers: dict[str, str]


def answer_for(error: BaseException, *, request_id: str, method: str = "", path: str = "") -> Answer:
    """The answer to give for any error; an error that nobody meant is logged with its traceback."""
    if isinstance(error, RequestRefused):
        error = error.error
    if isinstance(error, domain.OnebaseError):
        return _ours(error, request_id)
    if isinstance(error, DataError) and "NUL" in str(error.orig):  # in an id of a path or of a query
        return _make(
            400, "No text of a request may hold a NUL character here.", "invalid_request_error", code="invalid_value"
        )
    trouble = storage_trouble(error)
    if trouble is not None:
        logger.error("request %s failed: %s (%s)", request_id, trouble, error)
        return _make(503, trouble, "server_error", headers={"Retry-After": "10"})
    if isinstance(error, ClientLeft):
        return _make(CLIENT_LEFT, "The client closed the connection.", "invalid_request_error")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return _litestar(error, method, path)
    return _our_fault(error, request_id)


def storage_trouble(error: BaseException) -> str | None:
    """Words for a disk or a database that does not do its part: it may again, so clients may come back."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "The server's disk is full: nothing can be stored just now."
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return "The server's disk can't be written to: nothing can be stored just now."
    if isinstance(error, DatabaseError) and not isinstance(error, IntegrityError | ProgrammingError):
        full = "full" in str(error.orig)
        return "The server's disk is full: nothing can be stored just now." if full else DATABASE_AWAY
    return DATABASE_AWAY if isinstance(error, PoolTimeout) else None


def _our_fault(error: BaseException, request_id: str, status: int = 500) -> Answer:
    logger.error("request %s failed", request_id, exc_info=error)
    return _make(status, OUR_FAULT.format(request_id=request_id), "server_error")


def _ours(error: domain.OnebaseError, request_id: str) -> Answer:
    row = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    if row.is_our_fault:
        return _our_fault(error, request_id, row.status)
    headers: dict[str, str] = {}
    retry_after = getattr(error, "retry_after_s", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if row.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    code = error.code if row.shows_code else None
    message = error.message
    if isinstance(error, domain.AdapterInvalid):  # its own message says where the files lie
        message = f"This adapter can't be served: {'; '.join(error.problems)}"
    kind = error.kind if isinstance(error, domain.RateLimited) else row.type
    return _make(row.status, message, kind, error.param, code, headers)


def _litestar(error: HTTPException, method: str, path: str) -> Answer:
    if isinstance(error, ValidationException):
        return _make(400, *_validation_words(error))
    words, code = LITESTAR_WORDS.get(error.status_code, LITESTAR_WORDS[400])
    headers = {}
    if error.status_code in (408, 413):  # the rest of the body is not waited for
        headers = {"Connection": "close"}
    if isinstance(error, UnsupportedMedia):
        words, headers = error.detail, {"Accept-Encoding": "identity"}
    else:
        words = words.format(method=method, path=path)
    return _make(error.status_code, words, "invalid_request_error", None, code, headers)


def _validation_words(error: ValidationException) -> tuple[str, str, str | None, str | None]:
    """Litestar's validation of path and query values, and of a body that is not there at all."""
    extra = error.extra if isinstance(error.extra, list) else []
    first: dict[str, Any] = extra[0] if extra and isinstance(extra[0], dict) else {}
    param = first.get("key")
    if param in (None, "data"):
        return "We could not parse the JSON body of your request: it is empty.", "invalid_request_error", None, None
    return f"Invalid value for '{param}': {first.get('message')}.", "invalid_request_error", param, "invalid_value"


def _make(
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    return Answer(status, body, headers or {})


def handle_any_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler for every class: registered once, on the app."""
    answer = answer_for(
        error,
        request_id=request_id_of(request.scope),
        method=str(request.scope.get("method", "")),
        path=str(request.scope.get("path", "")),
    )
    return Response(
        answer.body.model_dump_json().encode(),
        status_code=answer.status,
        headers=answer.headers,
        media_type="application/json",
    )
