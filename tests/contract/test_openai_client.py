"""The official `openai` package against a real server over loopback: what its users write, unchanged."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from api_world import BASE
from live_server import Live, live_server

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
CALL = '### CALL:\n{"name": "look", "arguments": {"q": "tea"}}'
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string"}},
            "required": ["q"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("openai")) as live:
        live.publish("pirate")
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[OpenAI]:
    live.says = "Hello there."
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    completion = client.chat.completions.create(model="pirate", messages=HI, max_tokens=100, user="ann", store=False)
    assert completion.choices[0].message.content == "pirate@1 says: Hello there."
    assert completion.choices[0].finish_reason == "stop"
    assert completion._request_id is not None
    assert completion._request_id.startswith("req_")
    assert completion.usage is not None
    assert completion.usage.total_tokens > 0


def test_a_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello there."
    assert chunks[-1].usage is not None


def test_the_stream_helper_accumulates_all_choices(client: OpenAI) -> None:
    with client.chat.completions.stream(model=BASE, messages=HI, n=3) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello there."] * 3
    assert [choice.message.role for choice in final.choices] == ["assistant"] * 3


def test_the_stream_helper_accumulates_calls(client: OpenAI, live: Live) -> None:
    live.says = CALL
    with client.chat.completions.stream(model=BASE, messages=HI, tools=[LOOK]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"q": "tea"}'
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_reply_can_be_sent_back_as_it_came(client: OpenAI, live: Live) -> None:
    live.says = CALL
    message = client.chat.completions.create(model=BASE, messages=HI, tools=[LOOK]).choices[0].message
    assert message.tool_calls is not None
    answer: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"}
    live.says = "Hello there."
    history: Any = [*HI, message, answer]
    assert client.chat.completions.create(model=BASE, messages=history, tools=[LOOK]).choices[0].message.content


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the package's own, at its typed message
def test_parsed_and_streamed_messages_can_be_sent_back_as_they_came(client: OpenAI, live: Live) -> None:
    """They hold more than the API gave: `parsed`, `parsed_arguments`, a call's `index`."""
    live.says = '{"name": "Ann", "age": 7}'
    parsed = client.chat.completions.parse(model=BASE, messages=HI, response_format=Person).choices[0].message
    live.says = CALL
    with client.chat.completions.stream(model=BASE, messages=HI, tools=[LOOK]) as stream:
        called = stream.get_final_completion().choices[0].message
    assert called.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "4"}
    live.says = "Hello there."
    for message in (called, called.model_dump()):
        history: Any = [*HI, parsed, *HI, message, result]
        assert client.chat.completions.create(model=BASE, messages=history, tools=[LOOK]).choices[0].message.content
        history[1] = parsed.model_dump()
        assert client.chat.completions.create(model=BASE, messages=history, tools=[LOOK]).choices[0].message.content


def test_a_responses_output_can_be_sent_back_as_input(client: OpenAI, live: Live) -> None:
    live.says = "Let me see.\n\n" + CALL
    tool: Any = {"type": "function", "name": "look", "parameters": LOOK["function"]["parameters"], "strict": True}
    with client.responses.stream(model=BASE, input="Hi", tools=[tool]) as stream:
        streamed = stream.get_final_response().output
    whole = client.responses.create(model=BASE, input="Hi", tools=[tool]).output
    live.says = "Hello there."
    for output in (streamed, whole, [item.model_dump() for item in streamed], [item.model_dump() for item in whole]):
        call_id = output[-1]["call_id"] if isinstance(output[-1], dict) else output[-1].call_id  # type: ignore[union-attr]
        items: Any = [*HI, *output, {"type": "function_call_output", "call_id": call_id, "output": "4"}]
        assert client.responses.create(model=BASE, input=items, tools=[tool]).output_text == "Hello there."


def test_parse_gives_a_typed_answer(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    parsed = client.chat.completions.parse(model=BASE, messages=HI, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ann", age=7)


def test_the_stream_helper_gives_a_typed_answer(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    with client.chat.completions.stream(model=BASE, messages=HI, response_format=Person) as stream:
        seen = [event.parsed for event in stream if event.type == "content.done"]
        final = stream.get_final_completion()
    assert seen == [Person(name="Ann", age=7)]
    assert final.choices[0].message.parsed == Person(name="Ann", age=7)


def test_the_helpers_work_by_their_older_names_too(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    older: Any = client.beta.chat.completions
    assert older.parse(model=BASE, messages=HI, response_format=Person).choices[0].message.parsed.name == "Ann"
    with older.stream(model=BASE, messages=HI, response_format=Person) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed.age == 7


def test_a_call_s_arguments_are_typed_by_either_helper(client: OpenAI, live: Live) -> None:
    live.says = CALL.replace("look", "Look")

    class Look(BaseModel):
        q: str

    tool = openai.pydantic_function_tool(Look)
    message = client.chat.completions.parse(model=BASE, messages=HI, tools=[tool]).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == Look(q="tea")
    with client.chat.completions.stream(model=BASE, messages=HI, tools=[tool]) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.tool_calls is not None
    assert streamed.tool_calls[0].function.parsed_arguments == Look(q="tea")


def test_parse_says_when_the_answer_was_cut(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=BASE, messages=HI, response_format=Person, max_tokens=5)


def test_logprobs_are_typed(client: OpenAI) -> None:
    completion = client.chat.completions.create(model=BASE, messages=HI, logprobs=True, top_logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2


def test_text_completions(client: OpenAI) -> None:
    completion = client.completions.create(model=BASE, prompt=["A", "B"], n=2, logprobs=1)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    pieces = client.completions.create(model=BASE, prompt="A", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello there."


def test_responses(client: OpenAI) -> None:
    first = client.responses.create(model=BASE, input="Hi", instructions="Be brief.")
    assert first.output_text == "Hello there."
    second = client.responses.create(model=BASE, input="And?", previous_response_id=first.id)
    assert client.responses.retrieve(second.id).output_text == "Hello there."
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_the_responses_stream_helper(client: OpenAI, live: Live) -> None:
    live.says = "Let me see.\n\n" + CALL
    tool: Any = {"type": "function", "name": "look", "parameters": LOOK["function"]["parameters"], "strict": True}
    with client.responses.stream(model=BASE, input="Hi", tools=[tool]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Let me see."
    assert [item.type for item in final.output] == ["message", "function_call"]


def test_responses_parse(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    assert client.responses.parse(model=BASE, input="Hi", text_format=Person).output_parsed == Person(name="Ann", age=7)


def test_the_responses_stream_helper_gives_text_and_a_typed_answer(client: OpenAI, live: Live) -> None:
    live.says = '{"name": "Ann", "age": 7}'
    with client.responses.stream(model=BASE, input="Hi", text_format=Person) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == live.says
    assert final.output_parsed == Person(name="Ann", age=7)


def test_a_call_and_its_output_by_responses(client: OpenAI, live: Live) -> None:
    live.says = CALL
    tool: Any = {"type": "function", "name": "look", "parameters": LOOK["function"]["parameters"], "strict": True}
    first = client.responses.create(model=BASE, input="Hi", tools=[tool])
    [call] = first.output
    assert call.type == "function_call"
    live.says = "Four pounds."
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    told = client.responses.create(model=BASE, input=[output], previous_response_id=first.id, tools=[tool])
    assert told.output_text == "Four pounds."
    again: Any = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output], output]
    assert client.responses.create(model=BASE, input=again, tools=[tool]).output_text == "Four pounds."


def test_input_items_are_walked_page_by_page(client: OpenAI) -> None:
    given: Any = [{"role": "user", "content": text} for text in "ABCDE"]
    made = client.responses.create(model=BASE, input=given)
    items: Any = client.responses.input_items.list(made.id, limit=2, order="asc")
    assert [item.content[0].text for item in items] == list("ABCDE")


def test_an_error_in_a_stream_of_responses_is_its_own_event(client: OpenAI, live: Live) -> None:
    live.runner.fail_next = RuntimeError("boom")
    *_, error, failed = client.responses.create(model=BASE, input="Hi", stream=True)
    assert error.type == "error"
    assert error.message.startswith("The server had an error")
    assert failed.type == "response.failed"
    assert failed.response.error is not None
    assert failed.response.error.code == "server_error"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "pirate"]
    assert client.models.retrieve(BASE).id == BASE, "its slash is quoted"
    assert client.models.retrieve("pirate").owned_by == "onebase"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE)


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"model": "nobody"}, openai.NotFoundError, "model_not_found", None),
    ({"temperature": 3}, openai.BadRequestError, "decimal_above_max_value", "temperature"),
    ({"messages": []}, openai.BadRequestError, "empty_array", "messages"),
    (
        {"messages": [{"role": "user", "content": "x" * 600}]},
        openai.BadRequestError,
        "context_length_exceeded",
        "messages",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "kind", "code", "param"), ERRORS, ids=[str(code) for _, _, code, _ in ERRORS])
def test_errors_are_the_classes_that_users_catch(
    client: OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": HI, "stream": stream, **fields})
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id is not None


def test_an_error_in_a_stream_is_raised(client: OpenAI, live: Live) -> None:
    live.runner.fail_next = RuntimeError("boom")
    with pytest.raises(openai.APIError, match="The server had an error"):
        for _ in client.chat.completions.create(model=BASE, messages=HI, stream=True):
            pass


def test_leaving_a_stream_cancels_it(client: OpenAI, live: Live) -> None:
    live.says = "x" * 400
    with client.chat.completions.create(model=BASE, messages=HI, stream=True) as stream:
        next(iter(stream))
    reply = client.chat.completions.create(model=BASE, messages=HI, max_tokens=1)
    assert reply.choices[0].finish_reason == "length"


async def chat_often(url: str, count: int) -> list[str | None]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = [BASE, "pirate"] * (count // 2)
        replies = await asyncio.gather(*(client.chat.completions.create(model=model, messages=HI) for model in models))
    return [reply.choices[0].message.content for reply in replies]


def test_many_at_once_each_get_their_own_answer(live: Live) -> None:
    import asyncio

    live.says = "Hello there."
    answers = asyncio.run(chat_often(live.url, 32))
    assert answers == ["Hello there.", "pirate@1 says: Hello there."] * 16


def test_an_unpublished_client_header_set_is_fine(live: Live) -> None:
    reply = httpx.get(f"{live.url}/v1/models", headers={"X-Stainless-Async": "false", "OpenAI-Beta": "x"}, timeout=None)
    assert reply.status_code == 200
