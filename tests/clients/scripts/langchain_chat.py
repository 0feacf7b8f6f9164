"""langchain-openai against $ONEBASE_URL: invoke, stream, tools, structured output, an error."""

import os

import openai
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


chat = ChatOpenAI(base_url=os.environ["ONEBASE_URL"], api_key="none", model="pirate", max_retries=0)
print("invoke:", chat.invoke("Hi").content)
print("stream:", "".join(chunk.content for chunk in chat.stream("Hi")))
print("usage:", chat.invoke("Hi").usage_metadata["total_tokens"] > 0)
person = ChatOpenAI(base_url=os.environ["ONEBASE_URL"], api_key="none", model="person", max_retries=0)
print("structured:", person.with_structured_output(Person, method="json_schema").invoke("Hi"))
called = ChatOpenAI(base_url=os.environ["ONEBASE_URL"], api_key="none", model="caller", max_retries=0)
tool = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
}
print("tools:", [(call["name"], call["args"]) for call in called.bind_tools([tool]).invoke("Hi").tool_calls])
try:
    ChatOpenAI(base_url=os.environ["ONEBASE_URL"], api_key="none", model="nobody", max_retries=0).invoke("Hi")
except openai.NotFoundError as error:
    print("error:", error.code)
