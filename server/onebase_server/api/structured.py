"""What a chat's answer must look like -> a grammar: `response_format`, and the calls that may or must be made.

A call that is demanded is all the answer. One that the model may make (`auto`) leaves the text free until a call is
opened: from there on it is a call of a tool that was offered, with arguments of its schema.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.errors import InvalidInput
from onebase.messages import Tool
from onebase.prompt_types import CallLayout
from onebase_server.api.schemas_chat import ChatRequest, NamedTool, ResponseFormat
from onebase_server.engine.grammar_llguidance import ANY_OBJECT, CALL_HEAD, call_grammar, json_grammar
from onebase_server.engine.types import GrammarTrigger

SCHEMA_PARAM = "response_format.json_schema.schema"
Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Constraint:
    """`grammar` None: the model may say anything. `trigger` None: there are no calls in it."""

    grammar: str | None = None
    trigger: GrammarTrigger | None = None

    @property
    def rules_at_once(self) -> bool:
        return self.grammar is not None and (self.trigger is None or self.trigger.at_once)


def constraint_of(body: ChatRequest, tools: Sequence[Tool], layout: CallLayout | None) -> Constraint:
    """Raises InvalidInput for a schema that can't be enforced.

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
        grammar = call_grammar(schemas, layout, many=may_call_many(body), param="tools")
        return Constraint(grammar, trigger_of(layout, at_once=True))
    answer = None if body.response_format is None else answer_schema(body.response_format)
    if not tools or body.tool_choice == "none" or layout is None:
        return Constraint(None if answer is None else json_grammar(answer[0], param=answer[1]))
    if answer is not None:
        json_grammar(answer[0], param=answer[1])  # its own fault gets its own name
        return Constraint(offered_calls(body, layout, answer[0]), trigger_of(layout, at_once=True))
    return Constraint(offered_calls(body, layout, None), trigger_of(layout))


def demanded(body: ChatRequest, tools: Sequence[Tool]) -> Sequence[Tool]:
    """The tools of which one must be called."""
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in tools if tool.name == body.tool_choice.function.name]
    return tools if body.tool_choice == "required" else ()


def offered_calls(body: ChatRequest, layout: CallLayout, answer: Schema | None) -> str:
    """Calls of any tool. A schema that can't be enforced is an error with `strict`, else any object will do."""
    schemas: dict[str, Schema] = {}
    for i, tool in enumerate(body.tools or ()):
        function, param = tool.function, f"tools[{i}].function.parameters"
        schemas[function.name] = function.parameters or ANY_OBJECT
        try:
            call_grammar({function.name: schemas[function.name]}, layout, many=False, param=param)
        except InvalidInput:
            if function.strict:
                raise
            schemas[function.name] = ANY_OBJECT
    return call_grammar(schemas, layout, many=may_call_many(body), param="tools", answer=answer)


def trigger_of(layout: CallLayout, *, at_once: bool = False) -> GrammarTrigger:
    opening = layout.before.rstrip()
    return GrammarTrigger(opening, layout.own_paragraph, layout.before[len(opening) :] + CALL_HEAD, at_once)


def may_call_many(body: ChatRequest) -> bool:
    return body.parallel_tool_calls is not False


def answer_schema(wanted: ResponseFormat) -> tuple[Schema, str] | None:
    """What the text must match, and the parameter that says so."""
    if wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return ANY_OBJECT, "response_format"
    return (ANY_OBJECT if wanted.json_schema.schema_ is None else wanted.json_schema.schema_), SCHEMA_PARAM
