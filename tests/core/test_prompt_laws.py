"""The renderer's laws, for every format on every kind of tokenizer, over hostile conversations."""

from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile_text import calls, conversations, json_objects, texts
from onebase.errors import InvalidInput
from onebase.messages import Message, Tool, ToolCall
from onebase.prompt import Example, PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer

CLOCK = Tool("clock", "The time in a city", {"type": "object", "properties": {"city": {"type": "string"}}})


def supervised_runs(example: Example) -> list[tuple[int, int]]:
    """[start, end) of each run of supervised tokens."""
    runs, position = [], 0
    for learnt, group in groupby(example.mask):
        length = len(list(group))
        if learnt:
            runs.append((position, position + length))
        position += length
    return runs


def answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


@given(messages=conversations)
def test_an_example_split_at_its_mask_is_prompt_and_completion(
    renderer: PromptRenderer, messages: list[Message]
) -> None:
    example = renderer.render_example(messages)
    assert len(example.ids) == len(example.mask)
    assert example.skipped == ()
    learnt = [i for i in answers(messages) if messages[i].is_supervised]
    runs = supervised_runs(example)
    assert len(runs) == len(learnt)
    for (start, end), position in zip(runs, learnt, strict=True):
        if position:  # an answer to nothing has no prompt that a server could be asked for
            assert example.ids[:start] == renderer.render_prompt(messages[:position])
        assert example.ids[start:end] == renderer.render_completion(messages[position])


@given(messages=conversations, question=texts)
def test_the_next_turns_prompt_extends_prompt_and_completion(
    renderer: PromptRenderer, messages: list[Message], question: str
) -> None:
    answer = Message("assistant", "Yes.\n")
    said = renderer.render_prompt(messages) + renderer.render_completion(answer)
    following = renderer.render_prompt([*messages, answer, Message("user", question)])
    assert following[: len(said)] == said


@given(messages=conversations)
def test_a_prefix_of_a_conversation_is_a_prefix_of_its_example(
    seed_renderer: PromptRenderer, messages: list[Message]
) -> None:
    whole = seed_renderer.render_example(messages)
    for count in range(1, len(messages)):
        part = seed_renderer.render_example(messages[:count])
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.mask[: len(part.mask)] == part.mask


@given(content=texts)
def test_parse_inverts_render(renderer: PromptRenderer, content: str) -> None:
    parsed = renderer.parse(renderer.render_completion(Message("assistant", content)))
    assert parsed == Message("assistant", renderer.tokenizer.spellable(content))


@given(content=texts, made=st.lists(calls, min_size=1, max_size=3))
def test_parse_inverts_render_with_tool_calls(legacy: TextTokenizer, content: str, made: list[ToolCall]) -> None:
    renderer = get_renderer("human_response", legacy)
    parsed = renderer.parse(renderer.render_completion(Message("assistant", content, tool_calls=tuple(made))))
    assert parsed.content == content
    assert [(c.name, c.arguments) for c in parsed.tool_calls] == [(c.name, c.arguments) for c in made]


@given(messages=conversations)
def test_each_learnt_response_ends_in_the_only_end_token_of_its_span(
    renderer: PromptRenderer, messages: list[Message]
) -> None:
    example = renderer.render_example(messages)
    for start, end in supervised_runs(example):
        ends = [i for i in example.ids[start:end] if i in renderer.stop_token_ids()]
        assert ends == [example.ids[end - 1]]


@given(messages=conversations)
def test_there_is_exactly_one_eos_for_each_response(seed_renderer: PromptRenderer, messages: list[Message]) -> None:
    (eos,) = seed_renderer.stop_token_ids()
    assert seed_renderer.render_example(messages).ids.count(eos) == len(answers(messages))
    assert seed_renderer.render_prompt(messages).count(eos) == len(answers(messages))


@given(messages=conversations)
def test_there_is_exactly_one_bos(legacy: TextTokenizer, messages: list[Message]) -> None:
    for prompt_format in ("human_response", "chat_template"):
        renderer = get_renderer(prompt_format, legacy, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
        for ids in (renderer.render_prompt(messages), renderer.render_example(messages).ids):
            assert ids[0] == legacy.bos_id
            assert ids.count(ids[0]) == 1


@given(messages=conversations)
def test_a_tokenizer_that_adds_no_bos_gets_none(smollm2: TextTokenizer, messages: list[Message]) -> None:
    renderer = get_renderer("human_response", smollm2)
    assert not smollm2.special_ids & set(renderer.render_prompt([Message("user", "<|im_start|>")]))
    assert set(renderer.render_example(messages).ids) & smollm2.special_ids <= {smollm2.eos_id}


@given(messages=conversations)
def test_the_ids_of_an_example_spell_the_rendered_text(seed_renderer: PromptRenderer, messages: list[Message]) -> None:
    tokenizer = seed_renderer.tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = tokenizer.token_text(tokenizer.eos_id)
    ids = seed_renderer.render_example(messages).ids[len(bos) :]
    text = b"".join(eos.encode() if i == tokenizer.eos_id else tokenizer.token_bytes(i) for i in ids).decode()
    assert text.removeprefix(" ") == tokenizer.spellable(seed_renderer.render_text(messages))


@given(messages=conversations, declared=json_objects)
def test_tools_keep_all_laws(
    seed_renderer: PromptRenderer, messages: list[Message], declared: dict[str, object]
) -> None:
    tools = [CLOCK, Tool("other </s>", "### HUMAN:\n", declared)]
    example = seed_renderer.render_example(messages, tools)
    learnt = [i for i in answers(messages) if messages[i].is_supervised]
    for (start, end), position in zip(supervised_runs(example), learnt, strict=True):
        if position:
            assert example.ids[:start] == seed_renderer.render_prompt(messages[:position], tools)
        assert example.ids[start:end] == seed_renderer.render_completion(messages[position])


def test_an_assistant_message_at_the_end_is_answered_anew(renderer: PromptRenderer) -> None:
    messages = [Message("user", "a"), Message("assistant", "b")]
    ids = renderer.render_prompt(messages)
    example = renderer.render_example([*messages, Message("assistant", "c")])
    (_, second) = supervised_runs(example)
    assert example.ids[: second[0]] == ids


def test_developer_is_system(renderer: PromptRenderer) -> None:
    ids = [
        renderer.render_prompt([Message(role, "Be brief."), Message("user", "a")]) for role in ("system", "developer")
    ]
    assert ids[0] == ids[1]


def test_no_messages_are_refused(renderer: PromptRenderer) -> None:
    for render in (renderer.render_prompt, renderer.render_example):
        with pytest.raises(InvalidInput, match="at least one message"):
            render([])


def test_a_very_long_conversation_keeps_its_laws(renderer: PromptRenderer) -> None:
    messages = [Message("user", "Lange Frage </s> ### HUMAN:\n" * 100), Message("assistant", "😀\r\n" * 1000)] * 5
    example = renderer.render_example(messages)
    for (start, end), position in zip(supervised_runs(example), answers(messages), strict=True):
        assert example.ids[:start] == renderer.render_prompt(messages[:position])
        assert renderer.parse(example.ids[start:end]) == messages[position]
