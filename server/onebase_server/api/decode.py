"""Bytes of a request -> a wire model, or the error that OpenAI gives for it. Knows no handler and no engine.

Pydantic's own JSON parser reads the body once, straight into the model: strict as JSON is, and nesting beyond its
limit is an error like any other. Litestar would parse into objects first and answer 500 to deep nesting.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from litestar import Request
from litestar.plugins.pydantic import PydanticInitPlugin
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from onebase.errors import InvalidInput
from onebase_server.api.media import check_json
from onebase_server.api.schemas_common import RequestPart

Model = TypeVar("Model", bound=BaseModel)

# Pydantic's error types -> OpenAI's code and what is wrong in words. `{...}` are the error's own context.
# A bound's name says "integer" or "decimal" after the field's type, which pydantic shows in the bound.
BOUNDS = {
    "less_than_equal": ("above_max_value", "<= {le}"),
    "less_than": ("above_max_value", "< {lt}"),
    "greater_than_equal": ("below_min_value", ">= {ge}"),
    "greater_than": ("below_min_value", "> {gt}"),
}
LENGTHS = {
    "too_long": ("array_above_max_length", "an array with at most {max_length} items"),
    "too_short": ("array_below_min_length", "an array with at least {min_length} items"),
    "string_too_long": ("string_above_max_length", "a string with at most {max_length} characters"),
    "string_too_short": ("string_below_min_length", "a string with at least {min_length} characters"),
}
VALUES = {
    "literal_error": "expected one of {expected}",
    "enum": "expected one of {expected}",
    "string_pattern_mismatch": "expected to match {pattern}",
    "finite_number": "expected a finite number",
    "value_error": "{error}",
}
TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


NEWER = {"functions": "tools", "function_call": "tool_choice"}
"""Fields that OpenAI's API had once -> what says the same now."""


class RequestRefused(Exception):
    """Carries an InvalidInput out of msgspec, which would swallow a ValueError into its own error."""

    def __init__(self, error: InvalidInput) -> None:
        super().__init__(error.message)
        self.error = error


class RawJson:
    """A body that is not parsed yet."""

    def __init__(self, body: bytes) -> None:
        self.body = body


class WireRequest(Request[Any, Any, Any]):
    """Hands the body to `decode_body` as it came."""

    async def body(self) -> bytes:
        check_json(self.headers)
        return await super().body()

    async def json(self) -> Any:
        return RawJson(await self.body())


class WirePlugin(PydanticInitPlugin):
    """Litestar's pydantic plugin with our decoder in its place."""

    @classmethod
    def decoders(cls, validate_strict: bool = False) -> list[Any]:
        return [(is_model_class, decode_for_litestar)]


def is_model_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def decode_for_litestar(model: type[BaseModel], value: Any) -> BaseModel:
    try:
        return decode_body(model, value.body)
    except InvalidInput as error:
        raise RequestRefused(error) from error


def decode_body(model: type[Model], body: bytes) -> Model:
    """The body as `model`. Raises InvalidInput with OpenAI's code and the first wrong field's path."""
    try:
        value = model.model_validate_json(body)
    except ValidationError as error:
        raise to_invalid_input(error.errors(include_url=False, include_input=True)[0]) from error
    refuse_unknown(value, ())
    return value


def refuse_unknown(value: Any, loc: tuple[int | str, ...]) -> None:
    """A field that we don't know may be a misspelled one: refused by name, however deep in the body it stands. A null
    one means its default: it is dropped."""
    if isinstance(value, list):
        if value and isinstance(value[0], RequestPart):
            for i, each in enumerate(value):
                refuse_unknown(each, (*loc, i))
    elif isinstance(value, RequestPart):
        extra = value.model_extra
        if extra:
            for name, given in extra.items():
                if given is not None:
                    raise unknown(path_of((*loc, name)) or name)
            extra.clear()
        for name in value.model_fields_set:
            each = getattr(value, name, None)
            if isinstance(each, RequestPart | list):
                field = type(value).model_fields[name]
                refuse_unknown(each, (*loc, field.alias or name))


def unknown(param: str) -> InvalidInput:
    newer = NEWER.get(param)
    instead = f". Use '{newer}' instead." if newer else ""
    return InvalidInput(
        f"Unrecognized request argument supplied: {param}{instead}", param=param, code="unknown_parameter"
    )


def to_invalid_input(error: ErrorDetails) -> InvalidInput:
    """One pydantic error in OpenAI's words."""
    kind, context = error["type"], error.get("ctx", {})
    param = path_of(error["loc"])
    if kind == "json_invalid":
        return InvalidInput(f"We could not parse the JSON body of your request. ({context.get('error', '')})")
    if param is None:
        return InvalidInput("We could not parse the JSON body of your request: it must be a JSON object.")
    if kind == "missing":
        return InvalidInput(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind in BOUNDS:
        code, bound = BOUNDS[kind]
        number = "decimal" if isinstance(next(iter(context.values())), float) else "integer"
        message = f"Invalid '{param}': {number} {code.replace('_', ' ')}. Expected a value {bound.format(**context)}."
        return InvalidInput(message, param=param, code=f"{number}_{code}")
    if kind in LENGTHS:
        return bad_length(kind, context, param)
    if kind in VALUES:
        return InvalidInput(
            f"Invalid value for '{param}': {VALUES[kind].format(**context)}.", param=param, code="invalid_value"
        )
    expected = f"expected {TYPE_NAMES[kind]}" if kind in TYPE_NAMES else error["msg"]
    got = json_type_name(error["input"])
    return InvalidInput(
        f"Invalid type for '{param}': {expected}, but got {got} instead.", param=param, code="invalid_type"
    )


def bad_length(kind: str, context: dict[str, Any], param: str) -> InvalidInput:
    code, expected = LENGTHS[kind]
    if kind == "too_long" and context.get("field_type") == "Dictionary":
        code, expected = "object_above_max_properties", "an object with at most {max_length} properties"
    if kind == "too_short" and context.get("actual_length") == 0:
        code = "empty_array"
    words = expected.format(**context)
    return InvalidInput(f"Invalid '{param}': {code.replace('_', ' ')}. Expected {words}.", param=param, code=code)


def path_of(loc: Sequence[int | str]) -> str | None:
    """`("messages", 0, "#list", 1, "type")` -> `messages[0][1].type`: union tags are ours and left out, and so is
    pydantic's mark that it is the key which is wrong."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("#") and part != "[key]":
            path += f".{part}" if path else part
    return path or None


def json_type_name(value: Any) -> str:
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string"),
        (dict, "an object"), ((list, tuple), "an array"),
    ]  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "null")
