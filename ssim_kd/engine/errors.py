"""Errors before the first step: one line on the terminal, the traceback in the log file."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator

from torch.multiprocessing import ProcessRaisedException

logger = logging.getLogger("ssim_kd")

# What their messages leave open without their names.
_SELF_EXPLANATORY = (ValueError, RuntimeError, OSError)


class StartUpError(Exception):
    """An error before the first step, whose traceback is in the log file."""


@contextlib.contextmanager
def start_up() -> Iterator[None]:
    """Inside, an error becomes a :class:`StartUpError` with its message.

    Before there is a log file for the traceback, this is so for errors in values and files alone.
    """
    try:
        yield
    except Exception as error:
        logs = _log_files()
        explained = isinstance(error, _SELF_EXPLANATORY)
        if not logs and not explained:
            raise
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info()
        )
        for handler in logs:
            handler.handle(record)
        text = str(error)
        if not explained:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise StartUpError(text) from None


@contextlib.contextmanager
def with_one_line_errors() -> Iterator[None]:
    """Print a :class:`StartUpError` of this process or of a spawned one as one line, and exit.

    Raises:
        SystemExit: with status 1.
    """
    mark = f"{StartUpError.__module__}.{StartUpError.__qualname__}: "
    try:
        yield
    except StartUpError as error:
        message = str(error)
    except ProcessRaisedException as error:
        _, found, message = str(error).rpartition(mark)
        if not found:
            raise
    else:
        return
    sys.stdout.flush()
    sys.stderr.write(f"ERROR: {message.strip()}\n")
    raise SystemExit(1)


def _log_files() -> list[logging.Handler]:
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and handler.stream not in (sys.stdout, sys.stderr)
    ]
