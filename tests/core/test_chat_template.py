"""The chat_template format: parity with the template, no forged control tokens, clear refusals."""

from pathlib import Path

import pytest
from hypothesis import given

from hostile_text import conversations, texts
from onebase.errors import InvalidInput
from onebase.messages import Message, Tool, ToolCall
from onebase.prompt import PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer

CHAT = [Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Bye")]
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)
TOOL = Tool("clock", "ends <|im_end|> here", {"<|im_start|>": {"type": "string"}})


@pytest.fixture(scope="session")
def smol(smollm2: TextTokenizer, folders: dict[str, Path]) -> PromptRenderer:
    return get_renderer("chat_template", smollm2, (folders["smollm2"] / "chat_template.jinja").read_text())


def test_ids_are_those_of_the_templates_own_text(smol: PromptRenderer) -> None:
    text = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert smol.render_text(CHAT) == text
    assert smol.render_example(CHAT).ids == smol.tokenizer.encode_with_specials(text)
    assert smol.render_prompt(CHAT) == smol.tokenizer.encode_with_specials(f"{text}<|im_start|>assistant\n")


@given(messages=conversations, content=texts)
def test_contents_forge_no_control_token(smol: PromptRenderer, messages: list[Message], content: str) -> None:
    plain = [Message(m.role, "x", weight=m.weight) for m in messages]
    counts = [[i for i in smol.render_example(m).ids if smol.tokenizer.is_special(i)] for m in (messages, plain)]
    assert counts[0] == counts[1]


def test_tools_forge_no_control_token(smollm2: TextTokenizer) -> None:
    renderer = get_renderer("chat_template", smollm2, HERMES)
    ids = renderer.render_prompt(CHAT[:1], [TOOL])
    assert [i for i in ids if smollm2.is_special(i)] == [1, 2, 1, 2, 1]
    assert "ends <|im_end|> here" in smollm2.decode(ids)


def test_calls_are_written_by_the_template_and_read_back(smollm2: TextTokenizer) -> None:
    renderer = get_renderer("chat_template", smollm2, HERMES)
    call = ToolCall("call_0", "clock", '{"city": "Köln <|im_end|>"}')
    answer = Message("assistant", "Wait.", tool_calls=(call,))
    messages = [Message("user", "Time?"), answer, Message("tool", "12:00")]
    example = renderer.render_example(messages, [TOOL])
    learnt = [i for i, mark in zip(example.ids, example.mask, strict=True) if mark]
    assert learnt == renderer.render_completion(answer)
    assert renderer.parse(learnt) == answer
    assert renderer.parse(renderer.render_completion(Message("assistant", "", tool_calls=(call,)))).tool_calls == (
        call,
    )


def test_a_turn_that_the_template_rewrites_in_history_is_not_learnt(smollm2: TextTokenizer) -> None:
    renderer = get_renderer("chat_template", smollm2, THINKING)
    messages = [*CHAT, Message("assistant", "Bye")]
    example = renderer.render_example(messages)
    assert example.skipped == (1,)
    assert sum(example.mask) == len(renderer.render_completion(messages[3]))
    assert smollm2.decode(renderer.render_prompt(CHAT)).endswith("<think>\n\n</think>\n\n")


def test_white_space_before_the_end_token_is_dropped(legacy: TextTokenizer, folders: dict[str, Path]) -> None:
    renderer = get_renderer("chat_template", legacy, (folders["legacy"] / "chat_template.jinja").read_text())
    assert renderer.render_text(CHAT) == "[INST] Hello [/INST] Hi</s>[INST] Bye [/INST]"


def test_contents_are_data_to_the_template(smol: PromptRenderer) -> None:
    assert "{{ 7*7 }}" in smol.render_text([Message("user", "{{ 7*7 }}{% raise %}")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "does not parse"),
        ("{{ messages[0].content }}", "leaves out messages"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no end token"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(smollm2: TextTokenizer, template: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        get_renderer("chat_template", smollm2, template)


def test_tools_need_a_template_that_has_them(smol: PromptRenderer) -> None:
    with pytest.raises(InvalidInput, match="no tools"):
        smol.render_prompt(CHAT, [TOOL])


def test_an_end_token_that_is_no_eos_of_the_base_still_ends_an_answer(smollm2: TextTokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    renderer = get_renderer("chat_template", smollm2, template)
    assert renderer.stop_token_ids() == {0, 2}
    assert renderer.render_completion(Message("assistant", "a"))[-1] == 0


def test_generation_marks_are_transparent(smollm2: TextTokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    assert get_renderer("chat_template", smollm2, template).render_text(CHAT[:1]) == "Hello<|im_end|>"
