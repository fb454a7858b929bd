"""Files of `data/` that are read only if they are what they were: checked by SHA-256.

Texts, the tokenizer and the checkpoints lie in folders that each hold a `SHA256SUMS` in the
format of the program sha256sum. Nothing is unpickled: weights are safetensors, all else is text.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rooflm.roofline.datafiles import data_path

SUMS = "SHA256SUMS"


def sha256(content: bytes) -> str:
    """The checksum in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_checked(path: Path) -> bytes:
    """The content of a file that stands in its folder's SHA256SUMS.

    Raises
    ------
    ValueError
        in one line: the file is missing, is not listed, or differs from its checksum.
    """
    sums = _sums(path.parent)
    shown = _shown(path)
    if path.name not in sums:
        raise ValueError(f"{shown} is not listed in {SUMS}; listed: {', '.join(sorted(sums))}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {shown}: {error.strerror}") from None
    found = sha256(content)
    if found != sums[path.name]:
        raise ValueError(
            f"{shown} is altered or cut short: of its {len(content)} bytes the SHA-256 is "
            f"{found[:12]}…, {SUMS} says {sums[path.name][:12]}…; restore the file"
        )
    return content


def write_checked(folder: Path, files: dict[str, bytes]) -> None:
    """Write files and their checksums into a folder, which holds the old set until all are written.

    An interrupt in the moment of the renames leaves a mixture, which `read_checked` refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = _sums(folder) if (folder / SUMS).exists() else {}
    sums |= {name: sha256(content) for name, content in files.items()}
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    _replace(
        {folder / name: content for name, content in files.items()}
        | {folder / SUMS: lines.encode("ascii")}
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary file beside the target, then rename: never half a file."""
    _replace({path: content})


def _replace(files: dict[Path, bytes]) -> None:
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in files:
            temporary[path].unlink(missing_ok=True)


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {_shown(folder / SUMS)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{_shown(folder / SUMS)} is altered: not in ASCII") from None
    pairs = [line.split("  ", 1) for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise ValueError(f"{_shown(folder / SUMS)} is altered: not in sha256sum's format")
    return {name: digest for digest, name in pairs}


def _shown(path: Path) -> str:
    try:
        return "data/" + path.relative_to(data_path()).as_posix()
    except ValueError:
        return str(path)
