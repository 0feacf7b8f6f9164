"""`store: true` keeps the exchange as it was, streamed or not; feedback marks it; both stay the caller's own."""

import asyncio
import json
from typing import Any

import pytest

from api_world import BASE, World, error_of, text_of

CALL = '### CALL:\n{"name": "look", "arguments": {"q": "tea"}}'
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def kept(world: World, chat_id: str) -> dict[str, Any]:
    reply = world.get(f"/v1/chat/completions/{chat_id}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name not in names}


OURS = ("metadata", "rating", "better_answer", "version")


def test_a_stored_answer_is_the_answer_that_was_given(world: World) -> None:
    reply = world.chat(model="pirate", store=True, temperature=0.5, metadata={"team": "blue"}).json()
    found = kept(world, reply["id"])
    assert without(found, *OURS, "temperature") == reply
    assert (found["metadata"], found["version"], found["temperature"]) == ({"team": "blue"}, "pirate@2", 0.5)


def test_nothing_is_kept_unless_it_is_asked_for(own_world: World) -> None:
    chat_id = own_world.chat().json()["id"]
    own_world.chat(store=False)
    assert error_of(own_world.get(f"/v1/chat/completions/{chat_id}"))["param"] == "completion_id"
    assert own_world.get("/v1/chat/completions").json()["data"] == []


@pytest.mark.parametrize("fields", [{}, {"tools": [LOOK], "n": 2}, {"logprobs": True}], ids=str)
def test_a_streamed_answer_is_put_together_as_the_client_saw_it(world: World, fields: dict[str, Any]) -> None:
    world.says = CALL if "tools" in fields else "Hello there."
    chunks = world.chunks(store=True, stream_options={"include_usage": True}, **fields)
    found = kept(world, chunks[0]["id"])
    assert found["object"] == "chat.completion"
    assert found["usage"] == chunks[-1]["usage"]
    for index, choice in enumerate(found["choices"]):
        assert (choice["message"]["content"] or "") == text_of(chunks, index)
        deltas = [each["delta"] for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["id"] for call in choice["message"].get("tool_calls", [])] == [
            c["id"] for c in calls if c.get("id")
        ]
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    if "tools" in fields:
        function = found["choices"][1]["message"]["tool_calls"][0]["function"]
        assert (function["name"], json.loads(function["arguments"])) == ("look", {"q": "tea"})
    if "logprobs" in fields:
        assert "".join(each["token"] for each in found["choices"][0]["logprobs"]["content"]).startswith("Hello")


def test_chats_are_listed_filtered_paged_changed_and_deleted(own_world: World) -> None:
    own_world.publish("pirate")
    ids = [own_world.chat(store=True, model=model, metadata={"n": str(n)}).json()["id"]
           for n, model in enumerate(["pirate", BASE, "pirate"])]  # fmt: skip

    def listed(query: str = "") -> list[str]:
        return [chat["id"] for chat in own_world.get(f"/v1/chat/completions{query}").json()["data"]]

    assert listed() == ids
    assert listed("?order=desc&limit=2") == [ids[2], ids[1]]
    assert listed(f"?after={ids[0]}") == ids[1:]
    assert listed("?model=pirate") == [ids[0], ids[2]]
    assert listed("?metadata[n]=1") == [ids[1]]
    assert own_world.get("/v1/chat/completions?metadata=x").status_code == 400
    changed = own_world.post(f"/v1/chat/completions/{ids[1]}", {"metadata": {"n": "9"}})
    assert changed.json()["metadata"] == {"n": "9"}
    assert listed("?metadata[n]=1") == []
    messages = own_world.get(f"/v1/chat/completions/{ids[0]}/messages").json()
    assert [(m["role"], m["content"]) for m in messages["data"]] == [("user", "Hi")]
    after_all = f"/v1/chat/completions/{ids[0]}/messages?after={messages['last_id']}"
    assert own_world.get(after_all).json()["data"] == []
    assert error_of(own_world.get(f"{after_all}9"))["param"] == "after"
    assert own_world.request("DELETE", f"/v1/chat/completions/{ids[1]}").json()["deleted"]
    assert own_world.request("DELETE", f"/v1/chat/completions/{ids[1]}").status_code == 404
    assert listed() == [ids[0], ids[2]]


def test_feedback_marks_a_chat_and_the_newest_counts(world: World) -> None:
    chat_id = world.chat(store=True).json()["id"]

    def judge(**fields: Any) -> Any:
        return world.post("/v1/feedback", {"completion_id": chat_id, **fields})

    assert judge(rating="good").json()["object"] == "feedback"
    assert kept(world, chat_id)["rating"] == "good"
    assert judge(rating="bad", better_answer="Arr!", comment="too dry").status_code == 200
    found = kept(world, chat_id)
    assert (found["rating"], found["better_answer"]) == ("bad", "Arr!")
    assert error_of(judge())["param"] == "rating"
    assert error_of(judge(rating="fine"))["param"] == "rating"
    assert error_of(judge(better_answer="a\0b"))["param"] == "better_answer"
    assert judge(completion_id="chatcmpl-none", rating="good").status_code == 404


def test_a_chat_that_can_not_be_stored_is_answered_all_the_same(own_world: World, caplog: Any) -> None:
    async def drop() -> None:
        from sqlalchemy import text

        async with own_world.deps.durable.database.write() as session:
            await session.execute(text("DROP TABLE feedback"))
            await session.execute(text("DROP TABLE stored_chats"))

    own_world.loop.run_until_complete(drop())
    assert own_world.chat(store=True).status_code == 200
    assert own_world.chunks(store=True)
    assert "could not be stored" in caplog.text
    own_world.loop.run_until_complete(asyncio.sleep(0))


def test_a_stored_chat_tells_its_format_as_it_was_asked_for(world: World) -> None:
    world.says = '{"a": 1}'
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    chat_id = world.chat(store=True, response_format=asked).json()["id"]
    assert world.get(f"/v1/chat/completions/{chat_id}").json()["response_format"] == asked
