"""Conversations in files: what was said, the tokens, and the state of the cache, so that nothing is read again.

    8 bytes   magic
    8 bytes   size of the description and its crc32, little-endian
    ...       description: JSON with messages, system, context and tokens
    ...       the sequence's state, as the library writes and checks it
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MonarchError
from .output_file import replaced

if TYPE_CHECKING:
    from .chat_session import Session

MAGIC = b"MONARCH1"
HEAD = struct.Struct("<8sII")


def save_session(session: Session, path: Path) -> int:
    """Writes the file whole or not at all, and returns its size. Replaces only what is a conversation, too."""
    if path.is_file() and not _is_session(path):
        raise MonarchError(f"{path} exists and is not a saved conversation: name another file")
    description = {
        "messages": session.messages, "system": session.system, "context": session.context,
        "tokens": session.decoder.held,
    }  # fmt: skip
    text = json.dumps(description).encode()
    state = session.llm.get_sequence_state()
    try:
        with replaced(path) as part, open(part, "wb") as file:
            file.writelines([HEAD.pack(MAGIC, len(text), zlib.crc32(text)), text, state])
    except OSError as error:
        raise MonarchError(f"cannot save {path}: {error.strerror}; the file is as it was") from error
    return path.stat().st_size


def load_session(session: Session, path: Path) -> int:
    """Puts the conversation in place of the present one and returns its tokens; on an error that one stays."""
    description, state = read_session(path)
    tokens = description["tokens"]
    if len(tokens) > session.decoder.n_ctx:
        raise MonarchError(f"{path} holds {len(tokens)} tokens: use --ctx-size {len(tokens)} or more")
    try:
        session.llm.set_sequence_state(state)
    except MonarchError as error:
        raise MonarchError(f"{path}: {error}") from error
    session.messages[:] = description["messages"]
    session.system = description["system"]
    session.context = description["context"]
    session.decoder.held = tokens
    return len(tokens)


def read_session(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MonarchError(f"cannot read {path}: {error.strerror}") from error
    if len(data) < HEAD.size or data[:8] != MAGIC:
        raise MonarchError(f"{path} is not a saved conversation")
    _, size, crc = HEAD.unpack_from(data)
    text = data[HEAD.size : HEAD.size + size]
    if len(text) != size or zlib.crc32(text) != crc:
        raise MonarchError(f"{path} is damaged: its description does not match its checksum")
    description = json.loads(text)
    if not _is_description(description):
        raise MonarchError(f"{path} is damaged: its description is not as expected")
    return description, data[HEAD.size + size :]


def _is_session(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("system", "context"))
        and isinstance(value.get("messages"), list)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value["messages"])
        and isinstance(value.get("tokens"), list)
        and all(isinstance(token, int) for token in value["tokens"])
    )
