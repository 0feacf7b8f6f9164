"""`POST /v1/feedback`: say that a stored chat was good or bad, or what should have been answered."""

import time
from typing import Any

from litestar import Request, post
from litestar.params import JSONBody

from onebase.errors import InvalidInput
from onebase_server.api.caller import caller_of
from onebase_server.api.deps import Deps
from onebase_server.api.schemas_stored import CreateFeedback, FeedbackObject, feedback_object
from onebase_server.api.stored_chats import missing
from onebase_server.jobs.names import new_id
from onebase_server.records.tables import FeedbackRow


@post("/feedback", operation_id="createFeedback", status_code=200, tags=["Stored chats"])
async def create_feedback(
    data: JSONBody[CreateFeedback], request: Request[Any, Any, Any], deps: Deps
) -> FeedbackObject:
    """Judge a stored chat. The newest judgement counts; retraining can learn from what was found good."""
    if data.rating is None and data.better_answer is None:
        raise InvalidInput("Give a 'rating' or a 'better_answer'.", param="rating", code="missing_required_parameter")
    caller = caller_of(request)
    row = FeedbackRow(
        id=new_id("feedback-"),
        owner=caller.owner,
        chat_id=data.completion_id,
        created_at=int(time.time()),
        rating=data.rating,
        better_answer=data.better_answer,
        comment=data.comment,
    )
    if await deps.chats.judge(row, caller.sees) is None:
        missing(data.completion_id)
    return feedback_object(row)
