"""Reads the JSON file of a data set in COCO's format."""

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from typing import Any

from detectron2.utils.file_io import PathManager


def read_instances(where: str, json_file: str, *, training: bool) -> dict[str, Any]:
    """Read a file in COCO's instances format.

    Args:
        where: names the data set in messages.
        json_file: exists.
        training: whether annotations are needed.

    Raises:
        ValueError: no JSON, an object with a key twice, or a list that is missing or empty.
    """
    try:
        # As pycocotools opens it: text, in which a byte order mark is no JSON.
        with open(PathManager.get_local_path(json_file)) as file, _no_garbage_collection():
            content = json.loads(file.read(), object_pairs_hook=_without_equal_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        size = os.path.getsize(json_file) if os.path.exists(json_file) else 0
        raise ValueError(
            f"{where}: {json_file} ({size} bytes) is not JSON: {error}. Expected COCO's format; "
            "the download may be cut short."
        ) from error
    except _EqualKeysError as error:
        raise ValueError(f"{where}: {json_file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: {json_file} holds a {type(content).__name__}, not an object with the lists "
            '"images", "annotations" and "categories". Is it a file of results?'
        )
    for key in ("images", "annotations", "categories"):
        if key == "annotations" and key not in content and not training:
            continue  # as COCO's test-dev: predictions are written, not scored
        if not isinstance(content.get(key), list):
            raise ValueError(
                f'{where}: {json_file} has no list "{key}". Expected COCO\'s instances format: '
                '"images", "annotations" and "categories".'
            )
        if not content[key] and key != "annotations":
            raise ValueError(f'{where}: {json_file}: "{key}" is empty. Expected at least one.')
    return content


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


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage: searching for it would take most time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
