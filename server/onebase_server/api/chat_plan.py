"""`ChatRequest` -> what to generate: the one place where chat's rules between fields and the prompt meet."""

import asyncio
import secrets
import time
from dataclasses import dataclass

from onebase.errors import InvalidInput
from onebase.messages import Message, Tool
from onebase_server.api.backend import Backend
from onebase_server.api.convert_messages import to_messages, to_tools
from onebase_server.api.convert_sampling import (
    LONG_TEXT,
    Extras,
    answer_limit,
    check_stream_options,
    choices_of,
    to_sampling,
)
from onebase_server.api.models_lookup import ServedModel
from onebase_server.api.schemas_chat import ChatRequest, NamedTool
from onebase_server.api.structured import constraint_of
from onebase_server.engine.types import GenerationRequest

MESSAGE = 64
"""What rendering a message costs besides its text, in characters."""


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request, checked and rendered."""

    id: str
    created: int
    model: ServedModel
    request: GenerationRequest
    finds_calls: bool
    wants_logprobs: bool
    include_usage: bool

    @property
    def n(self) -> int:
        return self.request.n


@dataclass(frozen=True, slots=True)
class ChatInput:
    """The part of a request that can be checked without a model: done before the model is looked up."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    n: int


def check_chat(body: ChatRequest, max_choices: int) -> ChatInput:
    """Rules between fields. Raises InvalidInput naming the field."""
    check_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidInput(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
    tools = to_tools(body.tools or [])
    check_tool_choice(body, tools)
    check_response_format(body)
    return ChatInput(to_messages(body.messages), tools, choices_of(body, max_choices))


def check_tool_choice(body: ChatRequest, tools: tuple[Tool, ...]) -> None:
    choice = body.tool_choice
    if choice is None:
        return
    if not tools and choice != "none":
        raise InvalidInput(
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
            param="tool_choice",
            code="invalid_value",
        )
    if isinstance(choice, NamedTool) and choice.function.name not in [tool.name for tool in tools]:
        raise InvalidInput(
            f"Invalid value for 'tool_choice.function.name': there is no tool '{choice.function.name}' in 'tools'.",
            param="tool_choice.function.name",
            code="invalid_value",
        )


def check_response_format(body: ChatRequest) -> None:
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
        raise InvalidInput(
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )


def check_ending(body: ChatRequest) -> None:
    """A grammar alone says where its text ends: nothing can follow, and it can't be made longer."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise InvalidInput(
                f"Invalid value for '{name}': with 'tools' or a JSON 'response_format' the answer's form says where it "
                f"ends. Leave '{name}' out.",
                param=name,
                code="invalid_value",
            )


def plan_chat(body: ChatRequest, given: ChatInput, model: ServedModel, backend: Backend) -> ChatPlan:
    """Render and size. Raises ContextLengthExceeded."""
    tools = () if body.tool_choice == "none" else given.tools
    prompt = model.renderer.render_prompt(given.messages, given.tools)
    asked = body.max_completion_tokens or body.max_tokens
    constraint = constraint_of(body, given.tools, model.renderer.call_layout)
    if constraint.grammar is not None:
        check_ending(body)
    extras = Extras(
        max_tokens=answer_limit(asked, len(prompt), backend.max_context, param="messages"),
        # a grammar that rules from the start ends by itself, and a header inside one of its strings is text
        stop=() if constraint.rules_at_once else model.renderer.stop_sequences(),
        grammar=constraint.grammar,
        trigger=constraint.trigger,
        stop_token_ids=model.renderer.stop_token_ids(),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    chat_id = f"chatcmpl-{secrets.token_hex(12)}"
    request = GenerationRequest(
        id=chat_id,
        prompt_ids=tuple(prompt),
        sampling=to_sampling(body, extras, backend.tokenizer.vocab_size),
        adapter=model.adapter,
        n=given.n,
    )
    return ChatPlan(
        id=chat_id,
        created=int(time.time()),
        model=model,
        request=request,
        finds_calls=bool(tools),
        wants_logprobs=bool(body.logprobs),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )


async def plan_chat_aside(body: ChatRequest, given: ChatInput, model: ServedModel, backend: Backend) -> ChatPlan:
    """As `plan_chat`, off the event loop where it takes milliseconds: other streams go on."""
    wants_grammar = body.response_format is not None or bool(body.tools)
    if wants_grammar or sum(len(message.content) + MESSAGE for message in given.messages) > LONG_TEXT:
        return await asyncio.to_thread(plan_chat, body, given, model, backend)
    return plan_chat(body, given, model, backend)
