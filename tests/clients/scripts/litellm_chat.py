"""litellm against $ONEBASE_URL: a reply, a stream, the errors that it tells apart."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices

import litellm

AT = {"api_base": os.environ["ONEBASE_URL"], "api_key": "none", "num_retries": 0}
HI = [{"role": "user", "content": "Hi"}]
print("reply:", litellm.completion(model="openai/pirate", messages=HI, **AT).choices[0].message.content)
stream = litellm.completion(model="openai/pirate", messages=HI, stream=True, **AT)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))
try:
    litellm.completion(model="openai/pirate", messages=[{"role": "user", "content": "x" * 600}], **AT)
except litellm.ContextWindowExceededError:
    print("error: context")
try:
    litellm.completion(model="openai/nobody", messages=HI, **AT)
except litellm.NotFoundError:
    print("error: not found")
