"""`/admin/keys` on the wire: this server's own, not OpenAI's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from onebase_server.api.caller import Scope
from onebase_server.api.schemas_common import ListPage, RequestBody, Wire
from onebase_server.records.tables import KeyRow

KeyName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
OwnerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1, le=10**12)]


class CreateKey(RequestBody):
    """`models` left out: every model that nobody else trained. `owner`: keys that share one share files and jobs."""

    name: KeyName
    scopes: Annotated[list[Scope], Field(min_length=1, default=["inference"])]
    owner: OwnerName | None = None
    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], Field(max_length=1000)] | None = None
    rpm: Count | None = None
    tpm: Count | None = None
    parallel: Count | None = None
    expires_in: Annotated[int, Field(ge=60, le=10**10)] | None = None
    """Seconds."""


class KeyObject(Wire):
    """A key without the key."""

    id: str
    object: Literal["key"]
    name: str
    owner: str
    scopes: list[str]
    models: list[str] | None
    rpm: int | None
    tpm: int | None
    parallel: int | None
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    """To the minute."""
    revoked_at: int | None


class CreatedKey(KeyObject):
    """The one time that the key itself is shown."""

    key: str


class KeyList(ListPage):
    data: list[KeyObject]


def key_object(row: KeyRow) -> KeyObject:
    return KeyObject.model_validate(_fields(row))


def created_key(row: KeyRow, key: str) -> CreatedKey:
    return CreatedKey.model_validate({**_fields(row), "key": key})


def _fields(row: KeyRow) -> dict[str, Any]:
    names = [name for name in KeyObject.model_fields if name != "object"]
    return {**{name: getattr(row, name) for name in names}, "object": "key"}
