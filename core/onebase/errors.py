"""Every error that onebase raises on purpose, one tree. No torch, no HTTP: the server maps the classes to statuses.

    OnebaseError
    ├── InvalidInput (ValueError)            the caller sent something wrong; `param` names the field
    │   ├── ContextLengthExceeded            prompt (+ answer) longer than the context
    │   ├── DatasetError                     a training file's broken lines, with their numbers
    │   ├── RecipeError                      a training recipe that does not parse or contradicts itself
    │   └── AdapterInvalid                   an adapter's files: all mismatches together
    ├── NotFound (LookupError)
    │   └── ModelNotFound                    an unknown model, version or base; carries near names
    ├── Conflict                             the state of a thing forbids the call
    ├── Unauthenticated                      no or wrong API key
    ├── Forbidden (PermissionError)          the key may not do this
    ├── RateLimited                          over the key's own limit; `retry_after_s`
    ├── Overloaded                           queue full, whoever asks; `retry_after_s`
    ├── NotReady                             the base is still being loaded, or the server is going down
    ├── DeadlineExceeded (TimeoutError)      a request's own deadline passed
    ├── BaseModelError                       the base is missing, half downloaded or not loadable
    ├── TrainingError                        a run failed for a reason that its user can act on
    └── EngineError                          our fault: the engine or the device failed

Adding one: subclass the nearest class here, give it a stdlib co-parent if one fits, add its row to the table in
`onebase_server/api/errors.py` only if its status differs from its parent's.
"""

from collections.abc import Sequence


class OnebaseError(Exception):
    """Root. `message` is for the user; `param` names the field or file; `code` is OpenAI's machine word."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidInput(OnebaseError, ValueError):
    """The caller sent something wrong and can mend it."""


class ContextLengthExceeded(InvalidInput):
    """More tokens than the base's context holds."""

    code = "context_length_exceeded"

    def __init__(self, limit: int, prompt_tokens: int, *, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your messages resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the messages.",
            param=param,
        )


class DatasetError(InvalidInput):
    """A training file that can't be used. `problems` holds one text a broken line, each with its number."""

    code = "invalid_training_file"

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = "; ".join(self.problems[:10])
        more = f"; and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
        super().__init__(f"{path}: {shown}{more}", param="training_file")


class RecipeError(InvalidInput):
    """A training recipe that does not parse or contradicts itself."""


class AdapterInvalid(InvalidInput):
    """Adapter files that can't be served. `problems` lists every mismatch found."""

    code = "invalid_adapter"

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"adapter at {path} refused: " + "; ".join(self.problems), param="adapter")


class NotFound(OnebaseError, LookupError):
    """A named thing does not exist."""


class ModelNotFound(NotFound):
    """An unknown model. The message keeps OpenAI's words, since clients search for them, and adds near names."""

    code = "model_not_found"

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        self.near = tuple(near)
        hint = f" Did you mean: {', '.join(near)}?" if near else ""
        super().__init__(f"The model `{name}` does not exist or you do not have access to it.{hint}")


class Conflict(OnebaseError):
    """The state of a thing forbids the call."""


class Unauthenticated(OnebaseError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"


class Forbidden(OnebaseError, PermissionError):
    """The key is known and may not do this."""

    code = "insufficient_permissions"


class RateLimited(OnebaseError):
    """The key is over its own limit; others are served. `kind` is OpenAI's: "requests" or "tokens"."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, kind: str = "requests") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.kind = kind


class Overloaded(OnebaseError):
    """The queue is full, whoever asks. Not the caller's own limit: that is `RateLimited`."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(OnebaseError):
    """The base is still being loaded, or the server is going down."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(OnebaseError, TimeoutError):
    """A request's own deadline passed before it finished."""

    code = "deadline_exceeded"


class BaseModelError(OnebaseError):
    """The base model is missing, half downloaded, of an unknown architecture, or not loadable."""


class TrainingError(OnebaseError):
    """A training run failed for a reason that its user can act on."""


class EngineError(OnebaseError):
    """Our fault: the engine or its device failed. The message says what the operator should look at."""
