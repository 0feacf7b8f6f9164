"""A wire model -> the bytes of a 200. Fields that were not set are left out; null ones that were set are sent."""

from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp
from pydantic import BaseModel


def json_reply(model: BaseModel) -> ASGIApp:
    return ASGIResponse(body=model.model_dump_json(exclude_unset=True).encode(), media_type="application/json")
