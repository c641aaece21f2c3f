"""Taking a paged state of one sequence apart and putting it together again, checksums made to fit."""

import dataclasses
import struct
import zlib

UPSTREAM = struct.Struct("<Ii")
HEADER = struct.Struct("<18IQ")
FIELDS = (
    "magic version fingerprint n_layer n_head_kv head_dim type_k type_v page_size bits_k bits_v residual_k scorer "
    "sink_tokens hot_window n_seqs n_pages n_hot n_page_outs"
).split()
SEQUENCE = struct.Struct("<iII")  # number, pages, hot tokens
PAGE = struct.Struct("<IiI")  # number, first position, mask
TOKEN = struct.Struct("<Ii")  # number, position
CRC = 4


@dataclasses.dataclass
class State:
    upstream: bytes
    header: dict[str, int]
    pages: list[tuple[int, int]]  # first position, mask
    positions: list[int]
    hot: bytes
    cold: list[bytes]  # of each page
    sticky: bytes

    def __bytes__(self) -> bytes:
        """As many pages and hot tokens as there are; the header says what it says."""
        parts = [HEADER.pack(*(self.header[name] for name in FIELDS))]
        parts += [SEQUENCE.pack(0, len(self.pages), len(self.positions))]
        parts += [PAGE.pack(i, *page) for i, page in enumerate(self.pages)]
        parts += [TOKEN.pack(*token) for token in enumerate(self.positions)]
        return self.upstream + b"".join(map(_sealed, [b"".join(parts), self.hot, *self.cold, self.sticky]))


def _sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def parse(data: bytes) -> State:
    header = dict(zip(FIELDS, HEADER.unpack_from(data, UPSTREAM.size), strict=True))
    at = UPSTREAM.size + HEADER.size

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    n_pages, n_hot = header["n_pages"], header["n_hot"]
    n_heads = header["n_layer"] * header["n_head_kv"]
    take(SEQUENCE.size)
    pages = [page[1:] for page in PAGE.iter_unpack(take(PAGE.size * n_pages))]
    positions = [pos for _, pos in TOKEN.iter_unpack(take(TOKEN.size * n_hot))]
    sticky_size = n_heads * (16 + n_pages * 5)
    take(CRC)
    hot = take(n_hot * n_heads * header["head_dim"] * 2 * 2)  # K and V in f16
    take(CRC)
    page_size = (len(data) - at - sticky_size - CRC) // n_pages - CRC
    cold = [(take(page_size), take(CRC))[0] for _ in range(n_pages)]
    state = State(data[: UPSTREAM.size], header, pages, positions, hot, cold, take(sticky_size))
    assert bytes(state) == data
    return state


def name_a_page_twice(data: bytes) -> bytes:
    """In a whole state of several sequences: half of the first page's tokens each time."""
    start = data.index(b"MCHC")
    n_seqs = HEADER.unpack_from(data, start)[FIELDS.index("n_seqs")]
    at = start + HEADER.size
    number, n_pages, n_hot = SEQUENCE.unpack_from(data, at)
    pages_at = at + SEQUENCE.size * n_seqs
    seqs = [SEQUENCE.unpack_from(data, at + SEQUENCE.size * i) for i in range(n_seqs)]
    end = pages_at + sum(PAGE.size * pages + TOKEN.size * hot for _, pages, hot in seqs)
    page, first_pos, _ = PAGE.unpack_from(data, pages_at)
    table = data[start:at] + SEQUENCE.pack(number, n_pages + 1, n_hot) + data[at + SEQUENCE.size : pages_at]
    table += PAGE.pack(page, first_pos, 0x00FF) + PAGE.pack(page, first_pos, 0xFF00) + data[pages_at + PAGE.size : end]
    return data[:start] + _sealed(table) + data[end + CRC :]
