"""Every row of OpenAI's contract for what a chat request may not say: status 400, the code, and the field's path."""

from typing import Any

import pytest

from api_world import World, chat_body, error_of

HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
OLD_CALL = {"name": "look", "arguments": "{}"}


def said(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # missing
    ({"model": None}, "model", "invalid_type"),
    ({"messages": None}, "messages", "invalid_type"),
    (said({"content": "Hi"}), "messages[0].role", "missing_required_parameter"),
    (said({"role": "user"}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "user", "content": None}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "system", "content": None}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "assistant", "content": None}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "tool", "content": "1"}), "messages[0].tool_call_id", "missing_required_parameter"),
    (said({"role": "tool", "tool_call_id": "x"}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "function", "content": "1"}), "messages[0].name", "missing_required_parameter"),
    (
        said(HI, {"role": "user", "content": [{"type": "text"}]}),
        "messages[1].content[0].text",
        "missing_required_parameter",
    ),
    (said({"role": "user", "content": [{"text": "Hi"}]}), "messages[0].content[0].type", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing_required_parameter",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
    # wrong type
    ({"model": 7}, "model", "invalid_type"),
    ({"messages": "Hi"}, "messages", "invalid_type"),
    ({"messages": {"role": "user"}}, "messages", "invalid_type"),
    ({"messages": ["Hi"]}, "messages[0]", "invalid_type"),
    (said({"role": "user", "content": 5}), "messages[0].content", "invalid_type"),
    (said({"role": "user", "content": {"type": "text", "text": "Hi"}}), "messages[0].content", "invalid_type"),
    (said({"role": "user", "content": [5]}), "messages[0].content[0]", "invalid_type"),
    (said({"role": "user", "content": [{"type": "text", "text": 5}]}), "messages[0].content[0].text", "invalid_type"),
    (said({**HI, "name": 5}), "messages[0].name", "invalid_type"),
    (said({"role": "assistant", "tool_calls": "x"}), "messages[0].tool_calls", "invalid_type"),
    ({"temperature": "0.5"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": []}, "top_p", "invalid_type"),
    ({"n": "2"}, "n", "invalid_type"),
    ({"n": 1.5}, "n", "invalid_type"),
    ({"n": True}, "n", "invalid_type"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_completion_tokens": 2.5}, "max_completion_tokens", "invalid_type"),
    ({"seed": "7"}, "seed", "invalid_type"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": True, "stream_options": "x"}, "stream_options", "invalid_type"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_type"),
    ({"tools": {}}, "tools", "invalid_type"),
    ({"tool_choice": 5, "tools": [TOOL]}, "tool_choice", "invalid_type"),
    ({"response_format": "json"}, "response_format", "invalid_type"),
    ({"metadata": {"a": 5}}, "metadata.a", "invalid_type"),
    ({"user": 5}, "user", "invalid_type"),
    # out of range
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": 3}, "temperature", "decimal_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    ({"top_p": -0.5}, "top_p", "decimal_below_min_value"),
    ({"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value"),
    ({"presence_penalty": -2.5}, "presence_penalty", "decimal_below_min_value"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "decimal_above_max_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "decimal_below_min_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -5}, "max_tokens", "integer_below_min_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
    ({"seed": 2**63}, "seed", "integer_above_max_value"),
    ({"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "integer_below_min_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
    ({"logit_bias": {"5": -101}}, "logit_bias.5", "decimal_below_min_value"),
    ({"min_p": 1.5}, "min_p", "decimal_above_max_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "integer_above_max_value"),
    # arrays
    ({"messages": []}, "messages", "empty_array"),
    ({"stop": []}, "stop", "empty_array"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
    (said({"role": "user", "content": []}), "messages[0].content", "empty_array"),
    ({"tools": [TOOL] * 129}, "tools", "array_above_max_length"),
    # values
    (said({"role": "robot", "content": "Hi"}), "messages[0].role", "invalid_value"),
    (
        said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (
        said({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}),
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (said({**HI, "tool_calls": [CALL]}), "messages[0].tool_calls", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "string_below_min_length"),
    ({"logit_bias": {"hello": 5}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"300": 5}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [300]}, "stop_token_ids[0]", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "no spaces!", "schema": {}}}},
        "response_format.json_schema.name",
        "invalid_value",
    ),
    ({"tools": [{"type": "magic", "function": {"name": "x"}}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice.function.name",
        "invalid_value",
    ),
    ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
    ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    # one only with the other
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    # unknown
    ({"temprature": 0.5}, "temprature", "unknown_parameter"),
    ({"functions": [{"name": "look"}]}, "functions", "unknown_parameter"),
    ({"function_call": "auto"}, "function_call", "unknown_parameter"),
    # unknown in an object of the request
    (said({**HI, "contnt": "Hi"}), "messages[0].contnt", "unknown_parameter"),
    (said(HI, {**HI, "cache": {}}), "messages[1].cache", "unknown_parameter"),
    (
        said({"role": "user", "content": [{"type": "text", "text": "Hi", "bold": True}]}),
        "messages[0].content[0].bold",
        "unknown_parameter",
    ),
    (
        said(HI, {"role": "assistant", "tool_calls": [{**CALL, "when": "now"}]}),
        "messages[1].tool_calls[0].when",
        "unknown_parameter",
    ),
    (
        {"stream": True, "stream_options": {"include_usge": True}},
        "stream_options.include_usge",
        "unknown_parameter",
    ),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "unknown_parameter"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strct": True}}},
        "response_format.json_schema.strct",
        "unknown_parameter",
    ),
    ({"tools": [{**TOOL, "strict": True}]}, "tools[0].strict", "unknown_parameter"),
    (
        {"tools": [{"type": "function", "function": {"name": "x", "args": {}}}]},
        "tools[0].function.args",
        "unknown_parameter",
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}, "mode": "x"}},
        "tool_choice.mode",
        "unknown_parameter",
    ),
    # the only value that there is
    ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value"),
    ({"verbosity": "low"}, "verbosity", "invalid_value"),
    ({"web_search_options": {}}, "web_search_options", "unknown_parameter"),
    ({"audio": {"voice": "x", "format": "mp3"}}, "audio", "unknown_parameter"),
    # calls as they were
    (said({**HI, "function_call": OLD_CALL}), "messages[0].function_call", "invalid_value"),
    (
        said(HI, {"role": "assistant", "tool_calls": [CALL], "function_call": OLD_CALL}),
        "messages[1].function_call",
        "invalid_value",
    ),
    (
        said(HI, {"role": "assistant", "function_call": {}}),
        "messages[1].function_call.name",
        "missing_required_parameter",
    ),
    # metadata
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "object_above_max_properties"),
    ({"metadata": {"k" * 65: "x"}}, f"metadata.{'k' * 65}", "string_above_max_length"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "string_above_max_length"),
    ({"metadata": {"a": "x\x00"}}, "metadata.a", "invalid_value"),
    ({"metadata": {"a\x00": "x"}}, "metadata.a\x00", "invalid_value"),
    # a form that says itself where it ends
    ({"response_format": {"type": "json_object"}, "min_tokens": 5}, "min_tokens", "invalid_value"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}, "min_tokens": 1},
        "min_tokens",
        "invalid_value",
    ),
    ({"tools": [TOOL], "tool_choice": "required", "min_tokens": 5}, "min_tokens", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ({"tools": [TOOL], "ignore_eos": True}, "ignore_eos", "invalid_value"),
    # messages
    ({"messages": [HI] * 4097}, "messages", "array_above_max_length"),
    ({"messages": [HI] * 4096}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{param}-{code}-{i}" for i, (_, param, code) in enumerate(REFUSED)]
)
def test_a_wrong_field_is_named(world: World, fields: dict[str, Any], param: str, code: str) -> None:
    reply = world.chat(**fields)
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param.split(".")[-1].split("[")[0] in error["message"] or code == "context_length_exceeded"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_required_field_that_is_not_there_is_named(world: World, field: str) -> None:
    body = chat_body()
    del body[field]
    error = error_of(world.post("/v1/chat/completions", body))
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2},
    {"top_p": 0},
    {"top_p": 1},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"n": 1},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop": "x"},
    {"stop": ["a", "b", "c", "d"]},
    {"logit_bias": {}},
    {"logit_bias": {"5": -100, "299": 100}},
    {"max_tokens": 10**9},
    {"top_k": -1},
    {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 1},
    {"ignore_eos": False, "stop_token_ids": [7]},
    {"response_format": {"type": "text"}},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none"},
    {"tools": []},
    said({"role": "developer", "content": "Be brief."}, HI),
    said(HI, {"role": "system", "content": "late"}, {"role": "system", "content": "again"}),
    said(HI, {"role": "assistant", "content": "Well,"}),
    said({**HI, "name": "ann"}),
    said(HI, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "4"}),
    said(HI, {"role": "assistant", "content": "", "annotations": [], "audio": None, "function_call": None}, HI),
    said(HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, HI),
    said(HI, {"role": "assistant", "content": None, "refusal": "I won't."}, HI),
    said({"role": "function", "name": "look", "content": "4"}),
    said(
        HI,
        {"role": "assistant", "content": None, "function_call": OLD_CALL},
        {"role": "function", "name": "look", "content": "4"},
    ),
    said(HI, {"role": "assistant", "content": "Hm.", "function_call": OLD_CALL, "tool_calls": None}, HI),
    # as clients send a reply back
    said(HI, {"role": "assistant", "content": "{}", "annotations": [], "audio": None, "parsed": {}}, HI),
    said(
        HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ),
    # values that ask for nothing
    {"top_logprobs": 0},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "Hello"}},
    {"metadata": {}, "stop": None, "logit_bias": {}, "tools": [], "tool_choice": "none"},
    {"metadata": {"k" * 64: "x" * 512, **{str(i): "x" for i in range(15)}}},
    {"min_tokens": 0, "ignore_eos": False, "tools": [TOOL]},
    {"min_tokens": 2, "response_format": {"type": "text"}},
    {"min_tokens": 2, "tools": [TOOL], "tool_choice": "none"},
    {"audio": None, "prediction": None, "web_search_options": None, "moderation": None, "prompt_cache_options": None},
    {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": None}},
    # documented, without effect
    {"user": "ann", "safety_identifier": "a", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": True},
    {"service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": False, "store": False},
    # null means the default
    {
        name: None
        for name in (
            "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
            "logprobs", "top_logprobs", "stream", "stream_options", "max_tokens", "max_completion_tokens", "user",
            "metadata", "store", "service_tier", "tools", "tool_choice", "response_format", "modalities", "top_k",
        )
    },
    {"functions": None, "reasoning_effort": None},
]  # fmt: skip


@pytest.mark.parametrize(
    "fields", ACCEPTED, ids=[f"{'-'.join(list(fields)[:3])}-{i}" for i, fields in enumerate(ACCEPTED)]
)
def test_what_openai_takes_is_taken(world: World, fields: dict[str, Any]) -> None:
    reply = world.chat(**fields)
    assert reply.status_code == 200, reply.text


def test_the_first_wrong_field_is_the_one_named(world: World) -> None:
    error = error_of(world.chat(temperature="hot", top_p=7))
    assert error["param"] == "temperature"


def test_validation_comes_before_the_model_is_looked_up(world: World) -> None:
    assert error_of(world.chat(model="nobody", temperature=9))["param"] == "temperature"
    assert error_of(world.chat(model="nobody", top_logprobs=3))["param"] == "top_logprobs"


@pytest.mark.parametrize("fields", [{"temperature": 9}, {"model": "nobody"}, {"messages": []}], ids=str)
def test_what_is_known_before_the_first_token_is_a_plain_error_in_a_stream_too(
    world: World, fields: dict[str, Any]
) -> None:
    reply = world.chat(stream=True, **fields)
    assert reply.status_code in (400, 404)
    assert reply.headers["content-type"] == "application/json"
    error_of(reply)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_fills_the_context_is_refused_in_openais_words(world: World, stream: bool) -> None:
    reply = world.chat(messages=[{"role": "user", "content": "x" * 600}], stream=stream)
    error = error_of(reply)
    assert reply.status_code == 400
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert error["message"].startswith(
        "This model's maximum context length is 512 tokens. However, your messages resulted in "
    )


def test_a_configured_bound_on_n_is_kept(world: World) -> None:
    from api_world import with_settings

    error = error_of(with_settings(world, max_choices=4).chat(n=5))
    assert (error["param"], error["code"]) == ("n", "integer_above_max_value")
