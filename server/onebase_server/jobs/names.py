"""Ids and model names of jobs, in OpenAI's forms. Pure functions but for the random ids."""

import re
import secrets
from typing import Literal

ORGANIZATION = "onebase"
MAX_ADAPTER_NAME = 64


def new_id(prefix: str) -> str:
    """`ftjob-`, `ftevent-`, `ftckpt_` and so on, and 24 random letters and digits."""
    return f"{prefix}{secrets.token_hex(12)}"


def short(job_id: str) -> str:
    """The 8 characters that a job's model name ends in."""
    return job_id[-8:]


def slug(text: str) -> str:
    """What may stand in a name: `My Bot!` -> `my-bot`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def tuned_name(base: str, suffix: str | None, job_id: str) -> str:
    """`ft:{base}:{org}:{suffix}:{8 chars}`: what OpenAI calls `fine_tuned_model`, and the job's alias in the store."""
    return f"ft:{re.sub(r'[^!-~]', '-', base)}:{ORGANIZATION}:{slug(suffix or '')}:{short(job_id)}"


def checkpoint_name(tuned: str, step: int | Literal[""]) -> str:
    """Without a step: what the names of all of the job's checkpoints begin with."""
    return f"{tuned}:ckpt-step-{step}"


def adapter_name(base: str, suffix: str | None, job_id: str) -> str:
    """The store's name for a fine-tuning job's adapter: its own, so that no other key's job can move it."""
    end = f"-{short(job_id)}"
    start = slug(suffix or "") or slug(base.rpartition("/")[2]) or "adapter"
    return start[: MAX_ADAPTER_NAME - len(end)].strip("-") + end
