"""SHA-256 of files and of values."""

import hashlib
import json
from pathlib import Path


def hash_file(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def hash_value(value: object) -> str:
    """Of what JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
