"""OpenAI's client for a onebase server: everything that `openai.OpenAI` does, and `.server` beside it.

    from onebase_client import Onebase

    client = Onebase()                         # http://127.0.0.1:8000, no key
    client.chat.completions.create(model="pirate", messages=[{"role": "user", "content": "Hi"}])
    run = client.server.retrain(adapter="pirate", dataset="pirate.jsonl")
    client.server.wait(run.id)
    client.server.rollback("pirate")

Knows HTTP only: no torch, nothing of the server's packages.
"""

from onebase_client.client import Onebase
from onebase_client.models import Adapter, Deleted, Key, ModelCard, NewKey, RetrainRun, Schedule, Version

__all__ = ["Adapter", "Deleted", "Key", "ModelCard", "NewKey", "Onebase", "RetrainRun", "Schedule", "Version"]
