"""Logging, configured once for the process: a line an event on standard error, plain or as JSON; no prompt text."""

import json
import logging
import logging.config
from typing import Any, Literal

LogFormat = Literal["line", "json"]
# What a record always has: everything else was given as `extra`, and is told.
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: what was said, and the extra fields by their own names."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in PLAIN}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class LineFormatter(logging.Formatter):
    """A message that holds a line break can't pass for two events."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(level: str, log_format: str = "line") -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "line": {"()": LineFormatter, "format": "%(asctime)s %(levelname)-7s %(name)s: %(message)s"},
                "json": {"()": JsonFormatter},
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": log_format}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {
                "onebase": {"level": level.upper()},
                "onebase_server": {"level": level.upper()},
                "uvicorn.error": {"level": "WARNING"},
                "asyncio": {"level": "ERROR"},  # it warns of every write to a client that has left
            },
        }
    )
