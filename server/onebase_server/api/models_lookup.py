"""A `model` name -> what serves it: the base, or one immutable version. An unknown name is never the base."""

import difflib
from dataclasses import dataclass

from onebase.errors import InvalidInput, ModelNotFound, NotFound
from onebase.prompt import PromptFormat, PromptRenderer
from onebase.store import AdapterStore, Version
from onebase_server.api.backend import Backend
from onebase_server.engine.types import AdapterRef


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`id` is the name that the client asked for and gets back."""

    id: str
    adapter: AdapterRef | None
    prompt_format: PromptFormat
    renderer: PromptRenderer


def look_up(model: str, backend: Backend, store: AdapterStore) -> ServedModel:
    """Raises ModelNotFound with near names."""
    if model == backend.base.id:
        return ServedModel(model, None, backend.base_format, backend.renderer(backend.base_format))
    version = find_version(model, backend, store)
    prompt_format = version.prompt_format
    return ServedModel(model, to_ref(version), prompt_format, backend.renderer(prompt_format))


def find_version(model: str, backend: Backend, store: AdapterStore) -> Version:
    try:
        return store.resolve(model)
    except (NotFound, InvalidInput) as error:  # InvalidInput: no adapter can have such a name
        near = list(getattr(error, "near", ()))
        near += difflib.get_close_matches(model, [backend.base.id], n=1)
        raise ModelNotFound(model, near) from error


def to_ref(version: Version) -> AdapterRef:
    return AdapterRef(version.name, version.version, version.digest, version.path)
