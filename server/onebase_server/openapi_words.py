"""What openapi.yaml says and neither Litestar nor pydantic can know: errors, streams, examples, descriptions."""

from collections.abc import Mapping
from typing import Any

from onebase_server.api.schemas_chat import ChatChunk, ChatCompletion
from onebase_server.api.schemas_common import ErrorBody
from onebase_server.api.schemas_completions import Completion
from onebase_server.api.schemas_fine_tuning import EventList, JobEvent
from onebase_server.api.schemas_response_reply import ResponseBody, ResponseEvent

ABOUT = """\
One frozen 4-bit base and many QLoRA adapters behind OpenAI's API. Name the base or an adapter (`name`, `name@3`, a
job's `ft:...`) in `model`. Streams are server-sent events as OpenAI writes them: `data: <json>`, an empty line, and
`data: [DONE]` last; an error after the first byte is an event `data: {"error": ...}`."""

TAGS = {
    "Chat": "Conversations, rendered in the model's own prompt format.",
    "Completions": "Bare prompts.",
    "Responses": "OpenAI's newer form of chat.",
    "Models": "The base and the adapters.",
    "Files": "Uploads.",
    "Fine-tuning": "Jobs that train an adapter.",
    "Stored chats": "Exchanges kept by `store: true`, and what people thought of them.",
    "Admin": "This server's own: residency, versions, retraining. Needs the admin key.",
    "Operations": "Health, without a key, and metrics: the metrics key, an admin key, or on loopback none.",
}


def _error(message: str, kind: str = "invalid_request_error", **rest: Any) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": rest.get("param"), "code": rest.get("code")}


# status -> (description, example)
ERRORS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "400": (
        "The request is not valid; `param` names the field.",
        _error(
            "Invalid 'temperature': decimal above max value. Expected a value <= 2.0.",
            param="temperature",
            code="decimal_above_max_value",
        ),
    ),
    "401": ("No API key, or a wrong one.", _error("Incorrect API key provided: ***.", code="invalid_api_key")),
    "403": ("The key may not do this.", _error("This key may not do this.", code="insufficient_permissions")),
    "404": (
        "There is no such thing.",
        _error("The model `x` does not exist or you do not have access to it.", code="model_not_found"),
    ),
    "409": ("The state of the thing forbids it.", _error("there is no earlier version to roll back to")),
    "408": (
        "The body came too slowly.",
        _error("The request's body came too slowly.", code="request_timeout"),
    ),
    "413": ("The body is too large.", _error("The request body is larger than this server takes.")),
    "415": (
        "The body is said to be no JSON, or is compressed.",
        _error("Unsupported content type: 'text/plain'. ...", code="unsupported_media_type"),
    ),
    "429": (
        "Over the key's own limits, or the queue is full.",
        _error("Too many requests.", "requests", code="rate_limit_exceeded"),
    ),
    "500": ("Our fault.", _error("The server had an error while processing your request.", "server_error")),
    "503": ("The base is still loading, or the server is going down.", _error("Not ready.", "server_error")),
}


def errors_of(path: str, method: str, *, has_body: bool) -> list[str]:
    """The statuses that an operation may answer besides 200."""
    if not path.startswith(("/v1", "/admin")):
        return {"/readyz": ["503"], "/metrics": ["401", "403", "503"]}.get(path, [])
    statuses = {"400", "401", "403", "500", "503"}
    if path.startswith("/admin") or method == "delete":
        statuses.add("409")
    if "{" in path or has_body:
        statuses.add("404")
    if has_body:
        statuses |= {"408", "413", "415"}
    if method != "get":
        statuses.add("429")  # reading is not counted
    return sorted(statuses)


def _ref(model: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _stream(*models: type, done: bool = True) -> dict[str, Any]:
    """One server-sent event of a stream, as schemas of `text/event-stream` are read in OpenAPI 3.1."""
    told: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(model) for model in (*models, ErrorBody)]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, told]} if done else told
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


# operation -> media type -> schema. Of a stream: one event, whose `data` is JSON.
REPLIES: Mapping[str, Mapping[str, Any]] = {
    "createChatCompletion": {"application/json": _ref(ChatCompletion), "text/event-stream": _stream(ChatChunk)},
    "createCompletion": {"application/json": _ref(Completion), "text/event-stream": _stream(Completion)},
    "createResponse": {"application/json": _ref(ResponseBody), "text/event-stream": _stream(ResponseEvent, done=False)},
    "listFineTuningEvents": {"application/json": _ref(EventList), "text/event-stream": _stream(JobEvent)},
    "downloadFile": {"application/octet-stream": {"type": "string", "format": "binary"}},
    "getMetrics": {"text/plain": {"type": "string"}},
}

_CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Where is the treasure?"}]}
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "createChatCompletion": {
        "whole": {**_CHAT, "temperature": 0, "max_tokens": 64},
        "streamed": {**_CHAT, "stream": True, "stream_options": {"include_usage": True}},
        "structured": {
            **_CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "place",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {"island": {"type": "string"}},
                        "required": ["island"],
                        "additionalProperties": False,
                    },
                },
            },
        },
    },
    "createFineTuningJob": {
        "supervised": {
            "model": "SmolLM2-135M-Instruct",
            "training_file": "file-abc",
            "suffix": "pirate",
            "seed": 7,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        }
    },
    "createFeedback": {
        "good": {"completion_id": "chatcmpl-abc", "rating": "good"},
        "better": {"completion_id": "chatcmpl-abc", "rating": "bad", "better_answer": "Arr, by the palm."},
    },
    "createResponse": {
        "text": {"model": "pirate", "input": "Where is the treasure?"},
        "streamed": {"model": "pirate", "input": [{"role": "user", "content": "Where?"}], "stream": True},
    },
    "createCompletion": {"whole": {"model": "pirate", "prompt": "Once upon a time", "max_tokens": 32}},
    "createRetrainRun": {
        "default": {"adapter": "pirate", "dataset": "pirate.jsonl", "preset": "default"},
        "gated": {"adapter": "pirate", "stored_chats": True, "from": "current", "gate": {"max_loss_increase": 0.02}},
        "shorter": {"adapter": "pirate", "dataset": "pirate.jsonl", "hyperparameters": {"epochs": 1, "r": 8}},
    },
    "createSchedule": {
        "nightly": {
            "adapter": "pirate",
            "cron": "0 3 * * *",
            "timezone": "Europe/Berlin",
            "retrain": {"stored_chats": True, "from": "current", "gate": True},
        },
        "every six hours": {"adapter": "pirate", "every": "6h", "retrain": {"dataset": "pirate.jsonl"}},
    },
    "publishVersion": {"one version": {"version": 3}, "a split": {"weights": {"3": 0.9, "4": 0.1}}},
    "rollbackAdapter": {"the one before": {}, "a version": {"version": 2}},
}
