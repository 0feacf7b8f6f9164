"""`/v1/completions`: every form of prompt, choices by prompt, the older logprobs, and streams of it."""

from typing import Any, cast

import pytest

from api_world import BASE, World, error_of, events_of, settled_stats, with_settings
from onebase_server.api.schemas_completions import Completion


def complete(world: World, **fields: Any) -> dict[str, Any]:
    reply = world.complete(**fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def test_the_object_has_every_required_key(world: World) -> None:
    body = complete(world)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == BASE
    assert body["choices"] == [{"text": "Hello there.", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 4
    Completion.model_validate(body)


def test_the_prompt_is_bare(world: World) -> None:
    world.runner.batches.clear()
    world.runner.keep_batches = True
    complete(world, prompt="### HUMAN:\nHi")
    world.runner.keep_batches = False
    assert bytes(world.runner.batches[-1].rows[0].prompt_ids) == b"### HUMAN:\nHi"


def test_the_default_limit_is_16_tokens(world: World) -> None:
    world.says = "x" * 100
    body = complete(world)
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_may_be_asked_for(world: World, stream: bool) -> None:
    reply = world.complete(max_tokens=0, echo=True, stream=stream)
    bodies = events_of(reply) if stream else [reply.json()]
    assert "".join(choice["text"] for body in bodies for choice in body["choices"]) == "Once"
    assert bodies[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("Once", 1),
        (["Once"], 1),
        (["Once", "Twice", "Thrice"], 3),
        ([79, 110], 1),
        ([[79], [110, 99]], 2),
        ("", 1),
        ([""], 1),
    ],
    ids=str,
)
def test_every_form_of_prompt_is_taken(world: World, prompt: Any, count: int) -> None:
    body = complete(world, prompt=prompt)
    assert [choice["index"] for choice in body["choices"]] == list(range(count))


def test_choices_belong_to_prompt_i_by_n_and_prompts_are_counted_once_each(world: World) -> None:
    body = complete(world, prompt=["A", "BB"], n=2, echo=True)
    assert [choice["text"][:2] for choice in body["choices"]] == ["AH", "AH", "BB", "BB"]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 4 * 13


@pytest.mark.parametrize("prompt", ["Once ", [79, 110, 99, 101, 32]], ids=str)
def test_echo_puts_the_prompt_in_front_and_leaves_usage_alone(world: World, prompt: Any) -> None:
    plain, echoed = complete(world, prompt=prompt), complete(world, prompt=prompt, echo=True)
    assert echoed["choices"][0]["text"] == "Once " + plain["choices"][0]["text"]
    assert echoed["usage"]["total_tokens"] == plain["usage"]["total_tokens"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": [[]]}, "prompt[0]", "empty_array"),
    ({"prompt": ["a", 5]}, "prompt[1]", "invalid_type"),
    ({"prompt": [5, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [-1]}, "prompt[0]", "integer_below_min_value"),
    ({"prompt": [300]}, "prompt", "invalid_value"),
    ({"prompt": [[5], [300]]}, "prompt[1]", "invalid_value"),
    ({"prompt": ["a"] * 129}, "prompt", "array_above_max_length"),
    ({"prompt": "x" * 600}, "prompt", "context_length_exceeded"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
    ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 3, "stream": True}, "best_of", "invalid_value"),
    ({"best_of": 1, "n": 2}, "best_of", "integer_below_min_value"),
    ({"best_of": 21}, "best_of", "integer_above_max_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "integer_above_max_value"),
    ({"prompt": [[5]] * 43, "n": 2, "best_of": 3}, "best_of", "integer_above_max_value"),
    ({"prompt": ["a"] * 128, "n": 128, "stream": True}, "n", "integer_above_max_value"),
]


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{param}-{code}-{i}" for i, (_, param, code) in enumerate(REFUSED)]
)
def test_a_wrong_field_is_named(world: World, fields: dict[str, Any], param: str, code: str) -> None:
    reply = world.complete(**fields)
    assert reply.status_code == 400, reply.text
    assert (error_of(reply)["param"], error_of(reply)["code"]) == (param, code)


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": None},
        {"suffix": ""},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"user": "ann"},
        {"echo": None, "logprobs": None},
        {"echo": False, "n": None, "stop": None, "max_tokens": None, "seed": None, "logit_bias": {}},
        {"best_of": 1, "n": 1, "stream": False},
        {"prompt": ["a"] * 64, "n": 2, "max_tokens": 1},
        {"prompt": [5] * 65, "n": 2, "max_tokens": 1},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(world: World, fields: dict[str, Any]) -> None:
    complete(world, **fields)


def test_best_of_returns_the_likeliest_choices_by_token_and_bills_all(own_world: World) -> None:
    own_world.runner.reply = None  # answers that differ by seed
    own_world.runner.logprob_of = lambda token: -token / 10
    fields = {"seed": 3, "max_tokens": 8, "prompt": ["A", "BB"]}
    every = complete(own_world, n=6, logprobs=0, **fields)
    best = complete(own_world, n=2, best_of=6, **fields)
    expected = []
    for start in (0, 6):
        rated = [
            (sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"]), choice["text"])
            for choice in every["choices"][start : start + 6]
        ]
        expected += [text for _, text in sorted(rated, reverse=True)[:2]]
    assert len(set(expected)) == 4
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"]), "they were not asked for"
    assert best["usage"] == every["usage"]


def test_best_of_no_tokens_is_n_empty_choices(world: World) -> None:
    assert [choice["text"] for choice in complete(world, n=2, best_of=4, max_tokens=0)["choices"]] == ["", ""]


def test_best_of_is_bounded_as_n_is(world: World) -> None:
    reply = with_settings(world, max_choices=2).complete(best_of=3)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "best_of")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echoed_prompt_has_logprobs_of_its_own(own_world: World, max_tokens: int, stream: bool) -> None:
    own_world.runner.logprob_of = lambda token: -token / 10
    text = "Once upon a time" * 20  # more than one step scores, and more than one page is cached
    for _ in range(2):
        reply = own_world.complete(
            prompt=[text, "Hi"], n=2, echo=True, logprobs=2, max_tokens=max_tokens, stream=stream
        )
        bodies = events_of(reply) if stream else [reply.json()]
        for index, prompt in enumerate([text, text, "Hi", "Hi"]):
            parts = [choice for body in bodies for choice in body["choices"] if choice["index"] == index]
            assert "".join(part["text"] for part in parts) == prompt + "Hello there."[:max_tokens]
            told = {
                key: [value for part in parts if part["logprobs"] for value in part["logprobs"][key]]
                for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            }
            said = prompt + "Hello there."[:max_tokens]
            assert "".join(told["tokens"]) == said
            assert told["text_offset"] == list(range(len(said)))
            assert told["token_logprobs"][0] is None
            assert told["top_logprobs"][0] is None
            assert told["token_logprobs"][1:] == pytest.approx([-ord(letter) / 10 for letter in said[1:]])
            before = [next(iter(top)) for top in told["top_logprobs"][1 : len(prompt)]]
            assert before == list(prompt[:-1]), "each is scored by what stands before it"
            assert [part["finish_reason"] for part in parts][-1] == "length"
    if not stream:
        assert bodies[0]["usage"]["completion_tokens"] == 4 * max_tokens


def test_scoring_a_prompt_leaves_others_their_steps_and_holds_nothing(own_world: World) -> None:
    complete(own_world, prompt="x" * 300, echo=True, logprobs=0, max_tokens=1)
    stats = settled_stats(own_world)
    assert (stats.num_running, stats.num_waiting, stats.pages_held) == (0, 0, 0)


def test_logprobs_have_the_older_form_with_equal_lengths(world: World) -> None:
    logprobs = complete(world, logprobs=2)["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello there."
    assert (
        len(logprobs["tokens"])
        == len(logprobs["token_logprobs"])
        == len(logprobs["top_logprobs"])
        == len(logprobs["text_offset"])
    )
    assert logprobs["text_offset"] == list(range(12))
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"])


def offsets_of(bodies: list[dict[str, Any]]) -> list[int]:
    parts = [choice["logprobs"] for body in bodies for choice in body["choices"] if choice["logprobs"]]
    return [offset for part in parts for offset in part["text_offset"]]


@pytest.mark.parametrize(
    ("says", "fields", "offsets"),
    [
        ("aöb", {}, [0, 1, 1, 2]),
        ("漢a", {}, [0, 0, 0, 1]),
        ("a漢", {"max_tokens": 3}, [0, 1, 1]),
        ("a", {"ignore_eos": True, "max_tokens": 3}, [0, 1, 1]),
        ("b漢", {"echo": True, "prompt": "ö"}, [0, 0, 1, 2, 2, 2]),
        ("b", {"echo": True, "prompt": [97, 0xC3]}, [0, 1, 2]),
    ],
    ids=["two bytes", "three bytes", "half a character", "no text", "echo", "half a character echoed"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_in_the_text_whatever_tokens_are_made_of(
    world: World, says: str, fields: dict[str, Any], offsets: list[int], stream: bool
) -> None:
    world.says = says
    reply = world.complete(logprobs=0, stream=stream, **fields)
    assert offsets_of(events_of(reply) if stream else [reply.json()]) == offsets


def test_a_space_that_the_tokenizer_puts_in_front_is_not_in_the_echoed_text() -> None:
    from fakes import FakeTokenizer
    from onebase.tokenizer import TextTokenizer
    from onebase_server.api.logprobs import echo_logprobs
    from onebase_server.engine.types import TokenLogprob

    ids = list(b" Once")
    scores = [TokenLogprob(token, -0.5) for token in ids[1:]]
    shown = echo_logprobs(ids, scores, "Once", cast(TextTokenizer, FakeTokenizer()))
    assert shown.text_offset == [0, 0, 1, 2, 3]


def test_a_stream_says_what_the_whole_reply_says(world: World) -> None:
    whole = complete(world, logprobs=1)
    *chunks, last = events_of(world.complete(logprobs=1, stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "Hello there."
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["choices"][0]["logprobs"]["text_offset"]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_a_stream_of_several_prompts_has_all_choices(world: World) -> None:
    chunks = events_of(world.complete(prompt=["A", "B", "C"], n=2, stream=True, echo=True))
    texts = {i: "" for i in range(6)}
    finished = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {i: "AABBCC"[i] + "Hello there." for i in range(6)}
    assert sorted(finished) == list(range(6))
