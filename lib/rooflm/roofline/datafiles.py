"""Where the package's data lies, and how a JSON file of unknown origin is read.

An installed wheel carries the data as `rooflm/_data`; a checkout reads its own `data/`.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from rooflm.roofline.numeric import shorten

LARGEST_FILE = 1_000_000  # bytes; a config.json takes a few thousand


def data_path(*parts: str) -> Path:
    """The path of a file or folder under the data folder.

    Parameters
    ----------
    parts : folder and file names, as in `data_path("models", "facebook", "opt-125m.json")`.
    """
    root = Path(__file__).resolve().parents[1] / "_data"
    if not root.is_dir():
        root = Path(__file__).resolve().parents[3] / "data"
    return root.joinpath(*parts)


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds.

    Parameters
    ----------
    path : a regular file of at most 1 MB, in UTF-8.

    Raises
    ------
    ValueError
        in one line, for whatever keeps the file from being read as a JSON object: a missing
        file, a folder, a pipe, noise, a name that stands twice, NaN.
    """
    shown = shorten(os.fspath(path), 200)
    try:
        text = _read_text(path, shown)
    except OSError as error:
        raise ValueError(f"cannot read {shown}: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown} is not UTF-8 (byte {error.start}); allowed: JSON") from None
    except ValueError as error:  # a NUL byte or a lone surrogate in the path
        raise ValueError(f"cannot read {shown}: {' '.join(str(error).split())}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_int=_int
        )
    except RecursionError:
        raise ValueError(f"{shown} nests too deeply; allowed: a flat JSON object") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{shown} is not JSON: {error.msg} at {where}") from None
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown} holds {_JSON_KINDS[type(value)]}; allowed: a JSON object")
    return value


_JSON_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _read_text(path: str | os.PathLike[str], shown: str) -> str:
    # The kind comes first: opening a pipe would wait for its other end.
    kind = os.stat(path)
    if stat.S_ISDIR(kind.st_mode):
        raise ValueError("it is a folder; allowed: a config.json file")
    if not stat.S_ISREG(kind.st_mode):
        raise ValueError("it is not a regular file; allowed: a config.json file")
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes; allowed: a config.json file")
    return content.decode("utf-8-sig")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shorten(twice)} stands twice; allowed: once")
    return found


def _no_constants(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number; allowed: finite numbers")


def _int(text: str) -> int:
    if len(text) > 1000:
        raise ValueError(f"an integer of {len(text)} digits; allowed: at most 1000 digits")
    return int(text)
