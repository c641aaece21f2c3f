"""Where a checkpoint comes from: a local folder, or a Hugging Face repository in its own cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import MonarchError, UsageError

DEFAULT_REPO = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

WANTED = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
# other forms of the same weights; Mistral's repositories hold all of them twice
UNWANTED = ["*/*", "consolidated*"]

MAX_FILE_BYTES = 256 * 2**20  # but for weights


def find_source(source: str) -> tuple[Path, str]:
    """The checkpoint's folder and the model's name."""
    folder = Path(source)
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.exists():
        raise UsageError(f"{source} is a file; name the folder that holds config.json and the safetensors")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UsageError(f"{source} is neither a folder nor a repo id such as {DEFAULT_REPO}")
    return download(source), source.rsplit("/", 1)[1]


def download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except HFValidationError as error:
        raise UsageError(f"{repo} is not a valid repo id: {first_line(error)}") from error
    except RepositoryNotFoundError as error:
        raise MonarchError(f"Hugging Face has no model {repo}, or it needs a login (hf auth login)") from error
    except LocalEntryNotFoundError as error:
        raise MonarchError(
            f"{repo} is not in the cache and Hugging Face cannot be reached; check the network, or name a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MonarchError(f"{repo} could not be fetched: {first_line(error)}; run again to resume") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_bytes(path: Path) -> bytes:
    """A whole small file; an ordinary one, since a pipe or a device may never end."""
    check_is_file(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise MonarchError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; it is damaged")
    return path.read_bytes()


def check_is_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise MonarchError(f"{path} is not an ordinary file; fetch it again")


def read_text(path: Path) -> str | None:
    """The text of a small file; None where there is none."""
    try:
        return read_bytes(path).decode("utf-8")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MonarchError(f"{path} is not UTF-8; fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MonarchError(f"{path} is not valid JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise MonarchError(f"{path} holds no JSON object; fetch it again")
    return value
