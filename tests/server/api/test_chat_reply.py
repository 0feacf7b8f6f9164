"""What a chat answers, whole and streamed: OpenAI's keys, the order of chunks, and that both ways say the same."""

import re
from typing import Any

import pytest

from api_world import BASE, World, events_of, text_of
from onebase_server.api.schemas_chat import ChatChunk, ChatCompletion


def chat(world: World, **fields: Any) -> dict[str, Any]:
    reply = world.chat(**fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def test_the_object_has_every_required_key(world: World) -> None:
    body = chat(world)
    assert set(body) >= {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert body["object"] == "chat.completion"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]+", body["id"])
    assert isinstance(body["created"], int)
    assert body["model"] == BASE
    choice = body["choices"][0]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    ChatCompletion.model_validate(body)


def test_two_replies_have_two_ids_and_one_fingerprint(world: World) -> None:
    first, second = chat(world), chat(world)
    assert first["id"] != second["id"]
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert first["system_fingerprint"].startswith("fp_")


def test_usage_adds_up(world: World) -> None:
    usage = chat(world)["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len("### HUMAN:\nHi\n\n### RESPONSE:\n")
    assert usage["completion_tokens"] == len("Hello there.") + 1, "and the eos"
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_prompt_seen_before_is_counted_as_cached(world: World) -> None:
    long = {"messages": [{"role": "user", "content": "the same words, long enough for pages of cache, twice"}]}
    chat(world, **long)
    assert chat(world, **long)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("limit", [1, 5, 12])
def test_length_means_exactly_so_many_tokens(world: World, limit: int) -> None:
    body = chat(world, max_tokens=limit)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == limit
    assert body["choices"][0]["message"]["content"] == "Hello there."[:limit]


def test_the_newer_limit_wins_over_the_older(world: World) -> None:
    assert chat(world, max_tokens=2, max_completion_tokens=7)["usage"]["completion_tokens"] == 7


def test_without_a_limit_it_goes_on_to_the_contexts_end(world: World) -> None:
    world.says = "x" * 1000
    body = chat(world)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 512


@pytest.mark.parametrize(
    ("stop", "text"),
    [("there", "Hello "), (["zzz", "lo"], "Hel"), ("H", ""), (" there.", "Hello"), ("nowhere", "Hello there.")],
)
def test_a_stop_sequence_ends_the_text_and_is_not_in_it(world: World, stop: Any, text: str) -> None:
    choice = chat(world, stop=stop)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_the_formats_own_header_stops_a_base_that_plays_the_user(world: World) -> None:
    world.says = "Fine.\n\n### HUMAN:\nAnd now?"
    assert chat(world)["choices"][0]["message"]["content"] == "Fine."


def test_n_choices_have_their_indices_and_the_prompt_counts_once(world: World) -> None:
    one, three = chat(world), chat(world, n=3)
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"]


def test_each_model_answers_for_itself_under_the_name_that_was_asked(world: World) -> None:
    for model, says in {
        BASE: "Hello there.",
        "pirate": "pirate@2 says: Hello there.",
        "pirate@1": "pirate@1 says: Hello there.",
        "support": "support@1 says: Hello there.",
    }.items():
        body = chat(world, model=model)
        assert (body["model"], body["choices"][0]["message"]["content"]) == (model, says)


def test_text_parts_are_joined_and_one_part_is_as_the_string(world: World) -> None:
    prompts = []
    for content in (
        "Hi you",
        [{"type": "text", "text": "Hi you"}],
        [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}],
    ):
        prompts.append(prompt_of(world, messages=[{"role": "user", "content": content}]))
    assert prompts == ["### HUMAN:\nHi you\n\n### RESPONSE:\n"] * 3


def test_a_call_in_the_older_form_is_the_same_call(world: World) -> None:
    function = {"name": "look", "arguments": '{"q": "tea"}'}
    ask = {"role": "user", "content": "Tea?"}
    prompts = [
        prompt_of(world, messages=[ask, {"role": "assistant", "content": "Let me see.", **call}, result])
        for call, result in (
            (
                {"tool_calls": [{"id": "c", "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": "c", "content": "4 pounds"},
            ),
            ({"function_call": function}, {"role": "function", "name": "look", "content": "4 pounds"}),
        )
    ]
    assert prompts[0] == prompts[1]
    assert '{"name": "look", "arguments": {"q": "tea"}}' in prompts[0]


def test_developer_is_system(world: World) -> None:
    said = [
        prompt_of(world, messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        for role in ("system", "developer")
    ]
    assert said[0] == said[1] == "### SYSTEM:\nBe brief.\n\n### HUMAN:\nHi\n\n### RESPONSE:\n"


def prompt_of(world: World, **fields: Any) -> str:
    """The prompt as the device got it."""
    return bytes(token for token in row_of(world, **fields).prompt_ids if token < 256).decode()


def row_of(world: World, **fields: Any) -> Any:
    world.runner.batches.clear()
    world.runner.keep_batches = True
    chat(world, **fields)
    world.runner.keep_batches = False
    return world.runner.batches[-1].rows[0]


SAMPLING = {
    "temperature": (0.7, 0.7),
    "top_p": (0.9, 0.9),
    "presence_penalty": (0.5, 0.5),
    "frequency_penalty": (-0.5, -0.5),
    "seed": (7, 7),
    "logit_bias": ({"65": -100, "66": 1.5}, {65: -100.0, 66: 1.5}),
    "top_k": (40, 40),
    "min_p": (0.05, 0.05),
    "repetition_penalty": (1.1, 1.1),
    "min_tokens": (2, 2),
    "max_tokens": (9, 9),
}


@pytest.mark.parametrize(("name", "given", "got"), [(name, *pair) for name, pair in SAMPLING.items()], ids=SAMPLING)
def test_a_sampling_parameter_reaches_the_device(world: World, name: str, given: Any, got: Any) -> None:
    assert getattr(row_of(world, **{name: given}).sampling, name) == got


def test_defaults_are_openais(world: World) -> None:
    sampling = row_of(world).sampling
    assert (sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.frequency_penalty) == (1, 1, 0, 0)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0, 0, 1, None)


def test_zero_is_not_taken_for_not_given(world: World) -> None:
    sampling = row_of(world, temperature=0, top_p=0, seed=0).sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0, 0, 0)


def test_ignore_eos_goes_on_to_the_limit(world: World) -> None:
    body = chat(world, ignore_eos=True, max_tokens=30)
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 30)


def test_a_stop_token_id_ends_it(world: World) -> None:
    assert chat(world, stop_token_ids=[ord("t")])["choices"][0]["message"]["content"].startswith("Hello ")


# Streams


def test_chunks_come_in_openais_order(world: World) -> None:
    first, *content, last = world.chunks()
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert content
    for chunk in content:
        choice = chunk["choices"][0]
        assert list(choice["delta"]) == ["content"]
        assert choice["delta"]["content"]
        assert choice["finish_reason"] is None
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


def test_all_chunks_share_id_created_model_and_object(world: World) -> None:
    chunks = world.chunks(model="pirate")
    shared = {
        (chunk["id"], chunk["created"], chunk["model"], chunk["object"], chunk["system_fingerprint"])
        for chunk in chunks
    }
    assert len(shared) == 1
    assert chunks[0]["model"] == "pirate"
    assert chunks[0]["object"] == "chat.completion.chunk"


def test_every_chunk_fits_its_schema(world: World) -> None:
    for chunk in world.chunks(stream_options={"include_usage": True}, logprobs=True, top_logprobs=1):
        ChatChunk.model_validate(chunk)


def test_without_the_option_no_chunk_has_usage_and_none_has_no_choice(world: World) -> None:
    for chunk in world.chunks():
        assert "usage" not in chunk
        assert len(chunk["choices"]) == 1


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": None}, {"include_obfuscation": True}], ids=str
)
def test_usage_is_sent_only_when_asked(world: World, options: Any) -> None:
    assert all("usage" not in chunk for chunk in world.chunks(stream_options=options))


def test_with_the_option_usage_is_last_and_null_before(world: World) -> None:
    *rest, last = world.chunks(stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == chat(world)["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert all(chunk["usage"] is None for chunk in rest)


def test_the_roles_of_all_choices_come_first_in_order(world: World) -> None:
    chunks = world.chunks(n=4)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:4]] == [0, 1, 2, 3]
    roles = [chunk for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    assert roles == chunks[:4]
    finishes = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(finishes) == [0, 1, 2, 3]


def test_nothing_comes_for_a_choice_after_its_finish(world: World) -> None:
    done: set[int] = set()
    for chunk in world.chunks(n=3):
        choice = chunk["choices"][0]
        assert choice["index"] not in done
        if choice["finish_reason"]:
            done.add(choice["index"])
    assert done == {0, 1, 2}


TEXTS = [
    "Hello there.",
    "Grüße aus Köln",
    "emoji 👩‍👩‍👧‍👦 and 漢字",
    "line\nbreak\r\nand \u2028 separators",
    'quotes " and \\',
    "\x00\x01",
    "data: [DONE]",
    "",
]


@pytest.mark.parametrize("says", TEXTS, ids=repr)
def test_a_stream_says_what_the_whole_reply_says(world: World, says: str) -> None:
    world.says = says
    whole = chat(world)
    chunks = world.chunks(stream_options={"include_usage": True})
    assert text_of(chunks) == whole["choices"][0]["message"]["content"] == says
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("stop", ["there", "o t", "ere."])
def test_a_stream_never_shows_part_of_a_stop_sequence(world: World, stop: str) -> None:
    chunks = world.chunks(stop=stop)
    assert text_of(chunks) == "Hello there.".split(stop)[0]


def test_a_stream_is_not_compressed_and_not_cached(world: World) -> None:
    from api_world import chat_body

    reply = world.post("/v1/chat/completions", chat_body(stream=True), headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in reply.headers
    assert reply.headers["cache-control"] == "no-cache"
    assert events_of(reply)


# Logprobs


def logprobs_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    return [entry for part in parts if part for entry in part["content"]]


def test_one_entry_for_each_token_whose_bytes_are_the_text(world: World) -> None:
    world.says = "Köln 漢"
    choice = chat(world, logprobs=True, top_logprobs=2)["choices"][0]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "Köln 漢"
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == -0.5
        assert len(entry["top_logprobs"]) == 2
        assert set(entry["top_logprobs"][0]) == {"token", "logprob", "bytes"}


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": True}, {"logprobs": True, "top_logprobs": 0}, {"logprobs": True, "top_logprobs": None}],
    ids=str,
)
def test_no_alternatives_are_an_empty_list(world: World, fields: dict[str, Any]) -> None:
    entries = chat(world, **fields)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_a_stream_carries_the_same_entries_with_their_text(world: World) -> None:
    world.says = "Köln 漢 there"
    whole = chat(world, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    chunks = world.chunks(logprobs=True, top_logprobs=1)
    assert logprobs_of(chunks) == whole
    assert chunks[0]["choices"][0]["logprobs"] is None
    assert chunks[-1]["choices"][0]["logprobs"] is None
    for chunk in chunks[1:-1]:
        choice = chunk["choices"][0]
        assert (
            b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
            == choice["delta"]["content"]
        )


@pytest.mark.parametrize(
    ("says", "fields"),
    [
        ("Köln", {"max_tokens": 2}),
        ("öl", {"max_tokens": 1}),
        ("Hello th", {"stop": "there"}),
        ("Hello \n\n### HU", {}),
        ("Hello \n\n### CA", {"tools": [{"type": "function", "function": {"name": "look"}}]}),
        ("", {"ignore_eos": True, "max_tokens": 3}),
    ],
    ids=[
        "half a character",
        "nothing but half a character",
        "half a stop string",
        "half a header",
        "half a call",
        "tokens without text",
    ],
)
def test_a_stream_keeps_no_entry_back_at_its_end(world: World, says: str, fields: dict[str, Any]) -> None:
    world.says = says
    whole = chat(world, logprobs=True, **fields)
    chunks = world.chunks(logprobs=True, **fields)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert logprobs_of(chunks) == entries
    assert len(entries) == whole["usage"]["completion_tokens"] - (whole["choices"][0]["finish_reason"] == "stop")
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["logprobs"] is None


def test_entries_of_a_cut_stop_sequence_are_cut_too(world: World) -> None:
    entries = chat(world, logprobs=True, stop="there")["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "Hello "


def test_minus_infinity_is_openais_number() -> None:
    from onebase_server.api.logprobs import finite

    assert finite(float("-inf")) == -9999.0
    assert finite(-1.5) == -1.5
