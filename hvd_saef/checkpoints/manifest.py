"""The files of a checkpoint: written whole or not at all, with their hashes in a sealed manifest. Local."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvd_saef.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "hvd_saef checkpoint 1"
_WORKERS = r"step\d{8,}-[0-9a-f]{8}-rank\d{5,}\.pt"
OURS = re.compile(rf"{_WORKERS}|\.({_WORKERS}|{re.escape(MANIFEST)})\.[0-9a-f]{{8}}\.tmp")
"""The exact names of workers' files, and of the temporary files that a killed save leaves."""


def file_of(rounds: int, nonce: str, rank: int) -> str:
    """Returns a worker's file name; `rank` is its first rank, `nonce` the set's 8 hexadecimal digits."""
    return f"step{rounds:08d}-{nonce}-rank{rank:05d}.pt"


def remove_others(folder: Path, files: list[dict[str, Any]]) -> None:
    """Deletes the sets before `files`, and the temporary files of killed saves; nothing else."""
    current = {file["name"] for file in files}
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in current and path.is_file():
            path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file whole or not at all: `write` fills a temporary file, which is synced, then renamed.

    Raises CheckpointError, naming the file and the reason, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save raises RuntimeError
            raise
        why = str(error) if isinstance(error, OSError) else _why_not(path.parent, error)
        raise CheckpointError(f"{path} cannot be written ({why})") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _why_not(folder: Path, error: Exception) -> str:
    """Returns in words why writing failed, since torch's error does not say that the disk is full."""
    free = shutil.disk_usage(folder).free
    return f"the disk is full or nearly: {free} bytes are free; {error}" if free < 1 << 26 else str(error)


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Returns the bytes of the manifest's file: JSON with a hash of the manifest in it."""
    return json.dumps({**manifest, "seal": _seal(manifest)}, indent=1).encode()


def _seal(manifest: Mapping[str, Any]) -> str:
    contents = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Returns a file's entry in the manifest: its name, size in bytes and SHA-256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest in `folder`. Raises CheckpointError, naming the file and its fault."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): no checkpoint is there") from error
    return opened(path, content)


def opened(path: Path, content: bytes) -> dict[str, Any]:
    """Returns the manifest in `content`. Raises CheckpointError, naming the file and its fault."""
    try:
        manifest: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of this version ({FORMAT!r})")
    # Every byte is compared: a copy with something appended, say, was not written here.
    if manifest.get("seal") != _seal(manifest) or content != sealed(manifest):
        raise CheckpointError(f"{path} is damaged: it does not hold what its seal says")
    for file in manifest["files"]:
        if Path(file["name"]).name != file["name"]:
            raise CheckpointError(f"{path} names a file outside its folder: {file['name']!r}")
    return manifest


def damage(folder: Path, files: list[dict[str, Any]]) -> dict[str, str]:
    """Returns in words what is wrong with `files`, by name; whole files are left out."""
    wrong = {}
    for file in files:
        path = folder / file["name"]
        if not path.is_file():
            wrong[file["name"]] = "is missing"
        elif path.stat().st_size != file["bytes"]:
            wrong[file["name"]] = f"has {path.stat().st_size} bytes instead of {file['bytes']}"
        elif _hash(path) != file["sha256"]:
            wrong[file["name"]] = "is damaged (its SHA-256 differs from the manifest's)"
    return wrong
