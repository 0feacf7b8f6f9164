"""When a schedule's time comes: a cron line in a time zone, or a span. Pure functions of Unix seconds.

Cron's five fields are read by cronsim, which follows Debian's cron through changes of daylight saving time.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from onebase.errors import InvalidInput

SPAN: Final = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
SECONDS: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class Timing:
    """Exactly one of `cron` (such as "0 3 * * *") and `every` (such as "6h")."""

    cron: str | None = None
    every: str | None = None
    timezone: str = "UTC"

    def first_after(self, now: int) -> int:
        """Of a schedule that is made now. Raises InvalidInput for what can't be read or never comes."""
        if (self.cron is None) == (self.every is None):
            raise InvalidInput("Give either 'cron' or 'every'.", param="cron", code="invalid_value")
        zone_of(self.timezone)  # a span has no use for it, and shows it all the same
        if self.every is not None:
            return now + span_of(self.every)
        return self.next_after(now, now)

    def next_after(self, due: int, now: int) -> int:
        """The first time after `now`, in the row of times that has `due` in it. What was missed is passed over."""
        if self.every is not None:
            span = span_of(self.every)
            return due + span * ((now - due) // span + 1)
        moment = datetime.fromtimestamp(now, zone_of(self.timezone))
        try:
            return int(next(CronSim(self.cron or "", moment)).timestamp())
        except CronSimError as error:
            raise InvalidInput(
                f"'{self.cron}' is no cron line ({error}). Write five fields: minute, hour, day of the month, month, "
                "day of the week, as in '0 3 * * *'.",
                param="cron",
                code="invalid_value",
            ) from error
        except StopIteration as error:
            raise InvalidInput(f"'{self.cron}' names a day that never comes.", param="cron") from error


def span_of(text: str) -> int:
    """`6h` -> 21600. Raises InvalidInput."""
    match = SPAN.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"'{text}' is no span of time: write 30m, 6h, 1d or 2w.", param="every", code="invalid_value"
        )
    return int(match[1]) * SECONDS[match[2]]


def zone_of(name: str) -> tzinfo:
    """Raises InvalidInput for a zone that this machine does not know."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidInput(
            f"The time zone '{name}' is not known here. Name one such as UTC or Europe/Berlin.",
            param="timezone",
            code="invalid_value",
        ) from error
