"""Text from a model, which writes bytes: a token may end within a character."""

import codecs


class Utf8Stream:
    """Pieces of bytes in, whole characters out; what is no UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def end(self) -> str:
        return self._decoder.decode(b"", True)
