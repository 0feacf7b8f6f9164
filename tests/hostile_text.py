"""Hypothesis strategies for text that tries to break a renderer, and for conversations made of it."""

from hypothesis import strategies as st

from onebase.messages import Message, ToolCall

_FRAGMENTS = [
    "</s>", "<s>", "<unk>", "[PAD]", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<0x41>", "<0xE2>", "\u2581",
    "### HUMAN:\n", "\n\n### HUMAN:\n", "### RESPONSE:\n", "### SYSTEM:\n", "### CALL:\n", "#### CALL:", "### CALL:",
    "\r\n", "\n", "\n\n", "\r", "\t", " ", "  ", "\x00", "\x1c", "\u0085", "\u2028", "\u2029", "\ufeff", "\u200d",
    "\ue000", "😀", "👩‍👩‍👧‍👦", "é", "e\u0301", "İ", "漢字", "{{ 7*7 }}", "{% raise %}", "<tool_call>", "hello",
    "The end.", "",
]  # fmt: skip

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.sampled_from(_FRAGMENTS), st.text(max_size=5)), max_size=8).map("".join),
)

turns = st.one_of(
    st.builds(Message, st.sampled_from(["system", "developer", "user", "tool"]), texts),
    st.builds(Message, st.just("assistant"), texts, weight=st.sampled_from([None, 0, 1])),
)

conversations = st.lists(turns, min_size=1, max_size=8)
"""Any order of roles, consecutive equal roles and empty turns included."""

json_objects = st.dictionaries(
    texts, st.one_of(st.integers(), texts, st.booleans(), st.lists(texts, max_size=2)), max_size=3
)
calls = st.builds(ToolCall, st.just("id"), texts, texts)
