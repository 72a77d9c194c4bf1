"""Ray's token on this host, in the place where Ray reads it.

What `up` replaces is kept beside our state and put back by `slipway cluster down`, which removes a token that was not
there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from pathlib import Path

from launcher.cluster.probe import state_folder, token_file, token_hash

_MARK = "token.json"
_BEFORE = "auth_token.before"


def new_token() -> str:
    """256 random bits, as Ray makes its own."""
    return secrets.token_hex(32)


def read() -> str | None:
    """This host's token, or None."""
    try:
        return Path(token_file()).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def put(token: str) -> None:
    """Make `token` this host's, mode 600 in a folder of mode 700. Raises OSError."""
    file, state = Path(token_file()), Path(state_folder())
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.parent.chmod(0o700)
    before = read()
    if before == token:
        file.chmod(0o600)
        return
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if before is not None and not (state / _MARK).exists():
        write_private(state / _BEFORE, before)
    write_private(state / _MARK, json.dumps({"hash": token_hash(token)}))
    write_private(file, token)


def restore() -> None:
    """Undo `put`: the token that was there before, or none. One that somebody else has put there since is left."""
    file, state = Path(token_file()), Path(state_folder())
    try:
        ours = json.loads((state / _MARK).read_text())["hash"]
    except FileNotFoundError:
        return
    token = read()
    if token is None or token_hash(token) == ours:
        before = state / _BEFORE
        if before.exists():
            write_private(file, before.read_text())
        else:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is more in it
                file.parent.rmdir()
    (state / _BEFORE).unlink(missing_ok=True)
    (state / _MARK).unlink()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    # Hosts may share HOME, and a process id is a host's own.
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    try:
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
