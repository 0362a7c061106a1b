"""Reads json files in COCO's format: fast, and with errors that name set and file."""

import contextlib
import gc
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import msgspec
from detectron2.utils.file_io import PathManager

from ..sharing import without_queries

logger = logging.getLogger(__name__)

_LISTS = ("images", "annotations", "categories")
# Reading a file of this size takes seconds.
_LARGE = 100 * 2**20


class _Categories(msgspec.Struct):
    categories: list[Any]


def read_instances(where: str, json_file: str, *, annotated: bool) -> dict[str, Any]:
    """Read a file in COCO's instances format.

    Args:
        where: names the data set in messages.
        json_file: exists.
        annotated: whether annotations are needed.

    Raises:
        ValueError: no JSON, an object with a key twice, or a list that is missing or empty.
    """
    size, shown = 0, without_queries(json_file)
    try:
        path = PathManager.get_local_path(json_file)
        size = os.path.getsize(path)
        if size > _LARGE:
            logger.info("Reading %s (%d MB).", shown, size >> 20)
        with open(path, "rb") as file, no_garbage_collection():
            content = _parse(file.read())
    except _EqualKeysError as error:
        raise ValueError(f"{where}: {shown}: {error}") from None
    except (ValueError, RecursionError) as error:
        # Integers of thousands of digits, and lists in lists without end, are among these.
        raise ValueError(
            f"{where}: {shown} ({size} bytes) is not JSON: {error}. Expected COCO's format; "
            "the download may be cut short."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: {shown} holds a {type(content).__name__}, not an object with the lists "
            '"images", "annotations" and "categories". Is it a file of results?'
        )
    for key in _LISTS:
        if key == "annotations" and key not in content and not annotated:
            continue  # as COCO's test-dev: predictions are written, not scored
        if not isinstance(content.get(key), list):
            raise no_list(where, shown, key)
        if not content[key] and key != "annotations":
            raise ValueError(f'{where}: {shown}: "{key}" is empty. Expected at least one.')
    return content


def no_list(where: str, json_file: str, key: str) -> ValueError:
    """The error of a file without one of its lists."""
    return ValueError(
        f'{where}: {without_queries(json_file)} has no list "{key}". Expected COCO\'s instances '
        'format: "images", "annotations" and "categories".'
    )


def count_classes(json_file: str) -> int:
    """The number of categories of a COCO-format file; nothing else of it is built.

    Raises:
        ValueError: it is not readable, or has no list "categories".
    """
    try:
        path = PathManager.get_local_path(json_file)
        with open(path, "rb") as file:
            data = file.read()
        try:
            return len(msgspec.json.decode(data, type=_Categories).categories)
        except msgspec.MsgspecError:  # Python's reader takes NaN
            return len(json.loads(data)["categories"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{without_queries(json_file)} is not readable as a COCO-format file: "
            f"{type(error).__name__}: {error}. "
            'Expected JSON with the lists "images", "annotations" and "categories".'
        ) from error


def file_stamp(path: str) -> tuple[int, int]:
    """What changes with a file: its time in nanoseconds and its size."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage: searching for it would take most time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(data: bytes) -> Any:
    try:
        content = msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # Python's reader takes NaN and longer integers, and says what is wrong
    else:
        if _count_keys(content) == data.count(b'":'):
            return content
        del content
    return json.loads(data.decode(), object_pairs_hook=_without_equal_keys)


def _count_keys(value: Any) -> int:
    """Count keys as they are written, of which ``":`` is the end, if there is none twice.

    Spaces before a colon, ``":`` in a text and objects in a list of a row make another number:
    that is only slower.
    """
    if type(value) is dict:
        return len(value) + sum(map(_count_keys, value.values()))
    if type(value) is not list or set(map(type, value)) != {dict}:
        return 0
    count = sum(map(len, value))
    return count + sum(_count_keys(v) for row in value for v in row.values() if type(v) is dict)


class _EqualKeysError(Exception):
    """An object of JSON has a key twice, of which every reader keeps the last."""


def _without_equal_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        owner = f" with id {found['id']!r}" if "id" in found else ""
        raise _EqualKeysError(
            f'an object{owner} has the key "{twice}" twice, of which only the last would be read; '
            "expected one. Merge the two."
        )
    return found
