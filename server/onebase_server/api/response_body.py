"""OpenAI's Response object: begun from what was asked, ended with what came, and its items."""

import secrets
from collections.abc import Sequence
from typing import Any

from onebase.tokenizer import TextTokenizer
from onebase_server.api.chat_plan import ChatPlan
from onebase_server.api.logprobs import WaitingLogprobs
from onebase_server.api.schemas_chat import LogprobEntry, ToolCallBody
from onebase_server.api.schemas_response_reply import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseBody,
    ResponseUsage,
)
from onebase_server.api.schemas_responses import ResponseRequest, TextFormat, TextSettings
from onebase_server.api.tool_calls import CallReader, with_ids
from onebase_server.engine.handle import Completion
from onebase_server.engine.types import FinishReason, Usage


def begin_response(body: ResponseRequest, plan: ChatPlan) -> ResponseBody:
    """The response before its first token: what was asked, in full."""
    return ResponseBody(
        id=f"resp_{secrets.token_hex(16)}",
        object="response",
        created_at=plan.created,
        status="in_progress",
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=plan.model.id,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None, "summary": None},
        store=body.store is not False,
        temperature=plan.request.sampling.temperature,
        text=TextSettings(format=(body.text.format if body.text else None) or TextFormat(type="text")),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_p=plan.request.sampling.top_p,
        top_logprobs=plan.request.sampling.top_logprobs or 0,
        truncation="disabled",
        background=False,
        usage=None,
        user=body.user,
        metadata=body.metadata or {},
    )


def end_response(response: ResponseBody, output: Sequence[Any], reason: FinishReason, usage: Usage) -> None:
    """Fill in what came."""
    cut = reason is FinishReason.LENGTH
    response.output = list(output)
    response.status = "incomplete" if cut else "completed"
    response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if cut else None
    response.usage = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def whole_response(
    response: ResponseBody, plan: ChatPlan, choice: Completion, tokenizer: TextTokenizer
) -> tuple[str, list[ToolCallBody]]:
    """Complete `response`; gives its text and calls."""
    renderer = plan.model.renderer
    reader = CallReader(renderer.call_layout if plan.finds_calls else None, renderer.parse_text)
    said = [piece for piece in (*reader.feed(choice.text), *reader.finish()) if piece.call is None]
    text, named = "".join(piece.text for piece in said), with_ids(reader.calls)
    output: list[Any] = []
    if text or not named:
        entries: list[LogprobEntry] = []
        if plan.wants_logprobs:
            waiting = WaitingLogprobs(tokenizer)
            waiting.add(choice.logprobs)
            entries = waiting.take(said[-1].end if named else None)
        is_cut = choice.finish_reason is FinishReason.LENGTH and not named
        output.append(message_item(new_id("msg"), text, entries, "incomplete" if is_cut else "completed"))
    output += [call_item(new_id("fc"), call, "completed") for call in named]
    if named and reader.is_cut:
        output[-1].status = "incomplete"
    end_response(response, output, choice.finish_reason, choice.usage)
    return text, named


def message_item(item_id: str, text: str, logprobs: list[LogprobEntry], status: Any) -> OutputMessage:
    content = [] if status == "in_progress" else [text_part(text, logprobs)]
    return OutputMessage(id=item_id, type="message", role="assistant", status=status, content=content)


def text_part(text: str, logprobs: list[LogprobEntry]) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=logprobs)


def call_item(item_id: str, call: ToolCallBody, status: Any) -> OutputCall:
    function = call.function
    return OutputCall(
        id=item_id,
        type="function_call",
        status=status,
        call_id=call.id,
        name=function.name,
        arguments=function.arguments,
    )


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
