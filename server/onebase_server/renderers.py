"""A base's renderers, one for each prompt format, made once and shared by all requests."""

import json
import threading
from pathlib import Path

from onebase.errors import BaseModelError
from onebase.prompt import PromptFormat, PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer


class Renderers:
    """Thread-safe. Called with a format's name, it gives the renderer; InvalidInput if the base can't have it."""

    def __init__(self, tokenizer: TextTokenizer, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._lock = threading.Lock()
        self._made: dict[PromptFormat, PromptRenderer] = {}

    def __call__(self, prompt_format: PromptFormat) -> PromptRenderer:
        with self._lock:
            if prompt_format not in self._made:
                self._made[prompt_format] = get_renderer(prompt_format, self._tokenizer, self._chat_template)
            return self._made[prompt_format]

    def own_format(self, wanted: str = "auto") -> PromptFormat:
        """The bare base's format: its own chat template if it has one, else the seed's."""
        if wanted == "human_response":
            return "human_response"
        if wanted == "chat_template" or self._chat_template:
            self("chat_template")
            return "chat_template"
        return "human_response"


def read_chat_template(base: Path) -> str | None:
    """The template that a base's folder carries: a file of its own, or in its tokenizer_config.json."""
    file = base / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    try:
        value = json.loads((base / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{base}/tokenizer_config.json is not readable JSON: {error}", param="base") from error
    if isinstance(value, list):  # several by name, as transformers writes them
        value = next((each.get("template") for each in value if each.get("name") == "default"), None)
    return value if isinstance(value, str) else None
