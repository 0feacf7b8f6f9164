"""What a chat's answer must look like -> a grammar: `response_format`, and the calls that `tool_choice` demands."""

from collections.abc import Mapping, Sequence
from typing import Any

from onebase.errors import InvalidInput
from onebase.messages import Tool
from onebase.prompt_types import CallLayout
from onebase_server.api.schemas_chat import ChatRequest, NamedTool, ResponseFormat
from onebase_server.engine.grammar_llguidance import ANY_OBJECT, call_grammar, json_grammar

SCHEMA_PARAM = "response_format.json_schema.schema"


def grammar_of(body: ChatRequest, tools: Sequence[Tool], layout: CallLayout | None) -> str | None:
    """None: the model may say anything. Raises InvalidInput for a schema that can't be enforced.

    A demanded call wins over `response_format`: the answer that the format is meant for comes after the call.
    """
    wanted = demanded(body, tools)
    if wanted:
        if layout is None:
            raise InvalidInput(
                "Invalid value for 'tool_choice': this model's prompt format has no tool calls to demand.",
                param="tool_choice",
                code="invalid_value",
            )
        schemas = {tool.name: tool.parameters for tool in wanted}
        return call_grammar(schemas, layout, many=body.parallel_tool_calls is not False, param="tools")
    return None if body.response_format is None else format_grammar(body.response_format)


def demanded(body: ChatRequest, tools: Sequence[Tool]) -> Sequence[Tool]:
    """The tools of which one must be called."""
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in tools if tool.name == body.tool_choice.function.name]
    return tools if body.tool_choice == "required" else ()


def format_grammar(wanted: ResponseFormat) -> str | None:
    if wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return json_grammar(ANY_OBJECT, param="response_format")
    schema: Mapping[str, Any] = ANY_OBJECT if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
    return json_grammar(schema, param=SCHEMA_PARAM)


def takes_long(body: ChatRequest) -> bool:
    """Whether reading the request may take milliseconds: then it is done off the event loop."""
    wants_grammar = body.response_format is not None or bool(body.tools)
    return wants_grammar or sum(len(message.content or "") for message in body.messages) > 20_000
