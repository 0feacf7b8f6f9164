"""Logging, configured once for the process: one line an event on standard error, no prompt text."""

import logging.config


def configure_logging(level: str) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s %(name)s: %(message)s"}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {
                "onebase": {"level": level.upper()},
                "onebase_server": {"level": level.upper()},
                "uvicorn.error": {"level": "WARNING"},
            },
        }
    )
