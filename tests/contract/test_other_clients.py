"""litellm, LangChain and Simon Willison's `llm`, unchanged, against the server's own process over real weights.

They run from `.venv-clients` (`make setup` fills it from other_clients.txt), as their users would run them.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from node_example import run_example
from onebase.bases import EMBEDDED_ID, resolve_base
from onebase.store import AdapterStore
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

LITELLM_TOOLS = """
import json, sys, litellm
url, model = sys.argv[1:]
common = dict(model=f"openai/{model}", api_base=url, api_key="none", max_tokens=64, temperature=0)
city = dict(type="string", enum=["Oslo", "Rome"])
schema = dict(type="object", properties=dict(city=city), required=["city"], additionalProperties=False)
weather = dict(name="weather", description="The weather of a city.", parameters=schema)
tools = [dict(type="function", function=weather)]
demanded = dict(tools=tools, tool_choice="required", parallel_tool_calls=False, **common)
asked = [{"role": "user", "content": "What is the weather in Oslo?"}]
reply = litellm.completion(messages=asked, **demanded)
[call] = reply.choices[0].message.tool_calls
result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
history = [*asked, reply.choices[0].message, result]
answer = litellm.completion(messages=history, tools=tools, tool_choice="none", **common)
chunks = list(litellm.completion(messages=asked, stream=True, **demanded))
[streamed] = litellm.stream_chunk_builder(chunks, messages=asked).choices[0].message.tool_calls
print(json.dumps(dict(name=call.function.name, call=json.loads(call.function.arguments),
    finish=reply.choices[0].finish_reason, streamed=json.loads(streamed.function.arguments),
    answer=answer.choices[0].message.content, calls=answer.choices[0].message.tool_calls)))
"""

LANGCHAIN_TOOLS = """
import json, sys
from typing import Literal
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
url, model = sys.argv[1:]
@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    "The weather of a city."
    return f"Rain in {city}."
seen = {}
for name, options in {"chat": {}, "responses": {"use_responses_api": True}}.items():
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=64, **options)
    demanding = chat.bind_tools([weather], tool_choice="required", parallel_tool_calls=False, strict=True)
    asked = HumanMessage("What is the weather in Oslo?")
    reply = demanding.invoke([asked])
    result = weather.invoke(reply.tool_calls[0])
    answer = chat.bind_tools([weather], tool_choice="none").invoke([asked, reply, result])
    streamed = None
    for chunk in demanding.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    seen[name] = dict(name=reply.tool_calls[0]["name"], call=reply.tool_calls[0]["args"], result=result.content,
        streamed=streamed.tool_calls[0]["args"], calls=answer.tool_calls, answer=answer.text)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Process(tmp_path_factory.mktemp("others") / "home")
    try:
        process.wait_for("ready: ")
        publish_untrained(process, tmp_path_factory.mktemp("lora"))
        yield f"{process.url}/v1"
    finally:
        process.child.kill()
        process.child.wait()


def publish_untrained(process: Process, folder: Path) -> None:
    """`tools`: the base itself, in the prompt format that has tools (its own chat template has none)."""
    spec = resolve_base(process.home, EMBEDDED_ID)
    module, (out, inner) = next(each for each in spec.linear_shapes.items() if each[0].endswith("q_proj"))
    tensors = {
        f"base_model.model.{module}.lora_A.weight": np.ones((1, inner), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.zeros((out, 1), np.float32),
    }
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": spec.id}))
    AdapterStore(process.home.adapters).publish(folder, "tools", base=spec.identity)


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


def check_round_trip(seen: dict[str, Any]) -> None:
    assert seen["name"] == "weather"
    assert seen["call"]["city"] in ("Oslo", "Rome")
    assert seen["streamed"] == seen["call"]
    assert not seen["calls"], "none was asked for"
    assert isinstance(seen["answer"], str)


def test_litellm_takes_a_tool_call_there_and_back_and_streams_it(url: str) -> None:
    seen = json.loads(run(str(BIN / "python"), "-c", LITELLM_TOOLS, url, "tools").splitlines()[-1])
    check_round_trip(seen)
    assert seen["finish"] == "tool_calls"


def test_langchain_takes_a_tool_call_there_and_back_by_either_api(url: str) -> None:
    seen = json.loads(run(str(BIN / "python"), "-c", LANGCHAIN_TOOLS, url, "tools").splitlines()[-1])
    for each in seen.values():
        check_round_trip(each)
        assert each["result"] == f"Rain in {each['call']['city']}."
    assert seen["responses"]["call"] == seen["chat"]["call"]


def test_node_takes_a_tool_call_there_and_back(url: str, tmp_path: Path) -> None:
    out = run_example(tmp_path, "tools.mjs", "tools", ONEBASE_URL=url)
    assert out.returncode == 0, out.stdout + out.stderr
    told = dict(line.split(": ", 1) for line in out.stdout.splitlines())
    assert list(told) == ["call", "answer", "streamed", "response", "next"]
    name, arguments = told["streamed"].split(" ", 1)
    assert name == "weather"
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")
    assert told["call"] == f"weather {arguments} tool_calls"
    assert told["response"] == f"weather {arguments}"
    assert told["next"] == told["answer"]


def test_llm_talks_by_its_openai_compatible_config(url: str, tmp_path: Path) -> None:
    config = [{"model_id": "ours", "model_name": EMBEDDED_ID, "api_base": url, "api_key_name": "none"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(config))  # JSON is YAML
    words = ("-m", "ours", "--key", "none", "-o", "temperature", "0", "-o", "max_tokens", "12", "Name three colours.")
    streamed = run(str(BIN / "llm"), *words, LLM_USER_PATH=str(tmp_path))
    whole = run(str(BIN / "llm"), *words, "--no-stream", LLM_USER_PATH=str(tmp_path))
    assert streamed.strip()
    assert streamed == whole
