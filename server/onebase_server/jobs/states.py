"""The states of a job and which may follow which. Pure data.

    validating_files -> queued -> running -> publishing -> succeeded
                          ^        |   |
                          |        |   +-> failed | cancelled         (cancelled: from any state before publishing;
                          |        |                                   failed: also from validating and publishing)
                          +--------+-> paused

A lost process sends `running` back to `queued`; so does resuming a paused job. `publishing` is ours: on the wire it
is `running`, but it can't be cancelled any more. Only `Ledger.change` moves a job, and names where it may come from.
"""

from typing import Final, Literal

State = Literal["validating_files", "queued", "running", "publishing", "paused", "succeeded", "failed", "cancelled"]

VALIDATING: Final = "validating_files"
QUEUED: Final = "queued"
RUNNING: Final = "running"
PUBLISHING: Final = "publishing"
PAUSED: Final = "paused"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

FINAL: Final = (SUCCEEDED, FAILED, CANCELLED)
STOPPABLE: Final = (VALIDATING, QUEUED, RUNNING, PAUSED)
WAITING: Final = (VALIDATING, QUEUED)
UNFINISHED: Final = (*STOPPABLE, PUBLISHING)

FINE_TUNING: Final = "fine_tuning"
RETRAIN: Final = "retrain"


def on_the_wire(state: str) -> str:
    return RUNNING if state == PUBLISHING else state
