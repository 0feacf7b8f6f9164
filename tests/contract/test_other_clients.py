"""litellm, LangChain and Simon Willison's `llm`, unchanged, against the server's own process over real weights.

They run from `.venv-clients` (`make setup` fills it from other_clients.txt), as their users would run them.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onebase.bases import EMBEDDED_ID
from real_process import Process

pytestmark = pytest.mark.slow

BIN = Path(__file__).parents[2] / ".venv-clients" / "bin"

LITELLM = """
import json, sys, litellm
url, model = sys.argv[1:]
common = dict(model=f"openai/{model}", api_base=url, api_key="none", max_tokens=12, temperature=0)
hi = [{"role": "user", "content": "Name three colours."}]
whole = litellm.completion(messages=hi, **common)
pieces = [c.choices[0].delta.content or "" for c in litellm.completion(messages=hi, stream=True, **common)]
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **common)
    overflow = None
except litellm.ContextWindowExceededError as error:
    overflow = type(error).__name__
try:
    litellm.completion(messages=hi, **{**common, "model": "openai/nobody"})
    unknown = None
except litellm.NotFoundError as error:
    unknown = type(error).__name__
print(json.dumps(dict(whole=whole.choices[0].message.content, streamed="".join(pieces), overflow=overflow,
    unknown=unknown, tokens=whole.usage.completion_tokens, finish=whole.choices[0].finish_reason)))
"""

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=12)
whole = chat.invoke("Name three colours.")
pieces = [chunk.content for chunk in chat.stream("Name three colours.")]
class Colour(BaseModel):
    name: str
    warm: bool
typed = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0).with_structured_output(Colour)
print(json.dumps(dict(whole=whole.content, streamed="".join(pieces), tokens=whole.usage_metadata["output_tokens"],
    typed=typed.invoke("Red is a colour. Describe it.").model_dump())))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Process(tmp_path_factory.mktemp("others") / "home")
    try:
        process.wait_for("ready: ")
        yield f"{process.url}/v1"
    finally:
        process.child.kill()
        process.child.wait()


def run(*words: str, **env: str) -> str:
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGCHAIN_TRACING_V2": "false", "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **offline, **env}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_litellm_completes_streams_and_knows_our_errors(url: str) -> None:
    seen = json.loads(run(str(BIN / "python"), "-c", LITELLM, url, EMBEDDED_ID).splitlines()[-1])
    assert seen["whole"].strip()
    assert seen["streamed"] == seen["whole"]
    assert (seen["overflow"], seen["unknown"]) == ("ContextWindowExceededError", "NotFoundError")
    assert seen["finish"] == ("length" if seen["tokens"] == 12 else "stop")


def test_langchain_invokes_streams_and_parses(url: str) -> None:
    seen = json.loads(run(str(BIN / "python"), "-c", LANGCHAIN, url, EMBEDDED_ID).splitlines()[-1])
    assert seen["whole"].strip()
    assert seen["streamed"] == seen["whole"]
    assert 0 < seen["tokens"] <= 12
    assert set(seen["typed"]) == {"name", "warm"}


def test_llm_talks_by_its_openai_compatible_config(url: str, tmp_path: Path) -> None:
    config = [{"model_id": "ours", "model_name": EMBEDDED_ID, "api_base": url, "api_key_name": "none"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(config))  # JSON is YAML
    words = ("-m", "ours", "--key", "none", "-o", "temperature", "0", "-o", "max_tokens", "12", "Name three colours.")
    streamed = run(str(BIN / "llm"), *words, LLM_USER_PATH=str(tmp_path))
    whole = run(str(BIN / "llm"), *words, "--no-stream", LLM_USER_PATH=str(tmp_path))
    assert streamed.strip()
    assert streamed == whole
