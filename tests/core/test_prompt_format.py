"""What the human_response format looks like, letter for letter, and how it is read back."""

import pytest
from hypothesis import given

from hostile_text import conversations, texts
from onebase.errors import InvalidInput
from onebase.messages import Message, Role, Tool, ToolCall
from onebase.prompt import PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer

GOLDEN = "<s>### HUMAN:\nHello\n\n### RESPONSE:\nHi</s>\n\n### HUMAN:\nBye\n\n### RESPONSE:\nBye</s>\n\n"
CHAT = [
    Message("user", "Hello"),
    Message("assistant", "Hi"),
    Message("user", "Bye"),
    Message("assistant", "Bye"),
]


@pytest.fixture(scope="session")
def llama(legacy: TextTokenizer) -> PromptRenderer:
    return get_renderer("human_response", legacy)


def test_the_text_is_the_seeds(llama: PromptRenderer) -> None:
    assert llama.tokenizer.bos_token_text + llama.render_text(CHAT) == GOLDEN


@given(messages=conversations)
def test_the_text_is_the_seeds_for_any_conversation(llama: PromptRenderer, messages: list[Message]) -> None:
    """The seed's own code: user_header + value + blank line, response_header + value + eos + blank line."""
    chat = [m for m in messages if m.role in ("user", "assistant") and "### CALL" not in m.content]
    seed = "".join(
        f"### HUMAN:\n{m.content}\n\n" if m.role == "user" else f"### RESPONSE:\n{m.content}</s>\n\n" for m in chat
    )
    assert not chat or llama.render_text(chat) == seed


def test_system_messages_stand_where_they_were_said(llama: PromptRenderer) -> None:
    messages = [Message("system", "A"), Message("developer", "B"), Message("user", "C"), Message("system", "D")]
    assert llama.render_text(messages) == "### SYSTEM:\nA\n\n### SYSTEM:\nB\n\n### HUMAN:\nC\n\n### SYSTEM:\nD\n\n"


def test_a_prompt_ends_at_the_response_header(llama: PromptRenderer) -> None:
    text = llama.tokenizer.decode(llama.render_prompt(CHAT[:1])[1:], first=True)
    assert text == "### HUMAN:\nHello\n\n### RESPONSE:\n"


def test_tools_and_calls_are_plain_text(llama: PromptRenderer) -> None:
    clock = Tool("clock", "Time in a city", {"type": "object"})
    calls = (ToolCall("c1", "clock", '{"city": "Köln"}'), ToolCall("c2", "clock", "no json"))
    messages = [
        Message("system", "S"),
        Message("user", "Time?"),
        Message("assistant", "Let me see.", tool_calls=calls),
        Message("tool", "13:00", tool_call_id="c2"),
        Message("assistant", "", tool_calls=calls[:1]),
        Message("tool", "12:00", tool_call_id="c1"),
    ]
    assert llama.render_text(messages, [clock]) == (
        "### SYSTEM:\nS\n\n"
        '### TOOLS:\n{"name": "clock", "description": "Time in a city", "parameters": {"type": "object"}}\n\n'
        "### HUMAN:\nTime?\n\n"
        '### RESPONSE:\nLet me see.\n\n### CALL:\n{"name": "clock", "arguments": {"city": "Köln"}}\n'
        '{"name": "clock", "arguments": "no json"}</s>\n\n'
        "### TOOL:\n[2] clock\n13:00\n\n"
        '### RESPONSE:\n### CALL:\n{"name": "clock", "arguments": {"city": "Köln"}}</s>\n\n'
        "### TOOL:\n12:00\n\n"
    )


@pytest.mark.parametrize(
    "block", ["", "no json", '{"name": 1}', '{"name": "a"}', "[]", '{"name": "a", "arguments": {}}\n}']
)
def test_a_broken_call_stays_content(llama: PromptRenderer, block: str) -> None:
    text = f"Wait.\n\n### CALL:\n{block}"
    assert llama.parse_text(text) == Message("assistant", text)


def test_a_call_in_a_models_own_spacing_is_read(llama: PromptRenderer) -> None:
    message = llama.parse_text('### CALL:\n { "arguments" : {"a":1}, "name":"f" } \n')
    assert message == Message("assistant", "", tool_calls=(ToolCall("call_0", "f", '{"a": 1}'),))


@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
@pytest.mark.parametrize("header", ["### HUMAN:", "### TOOL:"])
def test_stop_text_never_leaks(seed_renderer: PromptRenderer, gap: str, header: str) -> None:
    ids = seed_renderer.tokenizer.encode(f"Sure.{gap}{header}\nAnd then?")
    assert seed_renderer.parse(ids).content == "Sure."


def test_an_end_token_ends_an_answer_that_quotes_a_header(seed_renderer: PromptRenderer) -> None:
    quoted = Message("assistant", "The header is\n\n### HUMAN:\nin this format.")
    ids = seed_renderer.render_completion(quoted)
    assert seed_renderer.parse([*ids, *seed_renderer.tokenizer.encode("more")]) == quoted


@given(answer=texts.filter(lambda text: "###" not in text and not text.endswith(("\n", "#", " "))), user=texts)
def test_a_base_that_plays_the_user_is_cut_off(seed_renderer: PromptRenderer, answer: str, user: str) -> None:
    played = f"{answer}\n\n### HUMAN:\n{user}"
    parsed = seed_renderer.parse(seed_renderer.tokenizer.encode(played))
    assert parsed.content == seed_renderer.tokenizer.spellable(answer)


def test_an_unknown_format_role_or_weight_is_named(legacy: TextTokenizer) -> None:
    unknown_format, unknown_role = "alpaca", "robot"
    with pytest.raises(InvalidInput, match="alpaca"):
        get_renderer(unknown_format, legacy)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="robot"):
        Message(unknown_role, "")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="weight"):
        Message("assistant", "", weight=0.5)
    with pytest.raises(InvalidInput, match="chat template"):
        get_renderer("chat_template", legacy)


@pytest.mark.parametrize("role", ["tool", "function"])
def test_a_tool_result_without_a_call_is_just_its_content(llama: PromptRenderer, role: Role) -> None:
    assert llama.render_text([Message(role, "12:00", tool_call_id="gone")]) == "### TOOL:\n12:00\n\n"


@pytest.mark.parametrize("hashes", ["###", "####", "######"])
@pytest.mark.parametrize("before", ["", "Like this:\n\n"])
def test_content_that_spells_a_call_stays_content(llama: PromptRenderer, hashes: str, before: str) -> None:
    spelt = Message("assistant", f'{before}{hashes} CALL:\n{{"name": "f", "arguments": {{}}}}')
    assert llama.parse(llama.render_completion(spelt)) == spelt
