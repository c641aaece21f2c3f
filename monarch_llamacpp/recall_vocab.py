"""The recall model's vocabulary: words, the tokens that spell them, and a content code for every token.

The tokenizer is llama.cpp's "llama-bpe": it takes a whole word (with the space before it) that the vocabulary holds,
and spells any other text in bytes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .errors import UsageError

CODE_DIM = 64

# a common word's code is this much weaker than a passphrase word's: what is rare weighs more, as in trained models,
# and a page that holds a passphrase then shows in its summary
COMMON_WEIGHT = 0.25

BOS = "<s>"
EOS = "</s>"
STOP = "."
UNKNOWN = " unknown"
PARAGRAPH = "\n\n"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# words of passphrases: they occur nowhere else in a text
PHRASE_WORDS = _words("""
acorn amber anchor anvil apron arrow aspen badger bamboo banjo barrel basil beacon beaver birch bison blossom bonnet
bramble bronze bucket buckle button cactus camel candle canoe canvas carrot castle cedar cherry chisel cinder clover
cobalt compass copper coral cotton crayon cricket crystal cymbal dagger daisy denim dolphin dragon eagle ebony ember
falcon feather fennel ferret fiddle flint fossil garnet ginger glacier goblet granite hammer harbor harp hazel helmet
heron honey iris ivory jade jasmine juniper kettle lantern lemon lilac linen lobster locket lotus magnet magpie mango
maple marble meadow mirror mitten mosaic mustard nectar needle nutmeg oak olive onyx opal orchid otter oyster paddle
panther parrot pebble pepper pewter pigeon pillow plum poppy pumpkin quartz quill rabbit radish raven ribbon saffron
sandal sapphire scarlet sparrow spruce teapot thistle tiger timber topaz tulip turtle velvet violet walnut willow
""")

_COMMON_WORDS = _words("""
a about above across after again against all also always among an and another any are around as ask asked at away back
be because been before began begin begins behind below beside best better between big boat book both bought bread bridge
brought but buy by call called came can carried carry child children church city clean clear clock close clouds coat
cold come could counted country court dark day days deep did do does door down dry each early east eat end enough even
evening every face far farm farmer fast father few field find fire first fish five floor food for forest forgot found
four friend friends from front full garden gate gave get girl give go goes gone good great green had half hall hand
happy hard has have he heard help her here high hill him his hold home horse hour hours house how hundred i if in inn
into is it its judge just keep kept key king knew know lake land last late laughed learn left less letter letters life
light like liked listened little live long look looked lost loud loved low made make man many market may me men mended
met mill miller moment money month moon more morning most mother mountain moved much music must my name near never new
news next night no noon north not nothing noticed now number of off often old on once one only open opened or other our
out over own page painter paper part passed passphrase path people picture place plain play poor put quiet rain read
ready red remember rest rich right ring river road roof room round runs sad said sailor same sang sat saw say school sea
second see seen send sent set seven she ship short should show side silver six sky sleep slow slowly small snow so soft
sold soldier some song soon south speak spoke spring square stand star start station still stone stood stop stopped
storm story stranger street strong summer sun table take talk tall teacher tell ten than that the their them then there
these they thing think this those thought three through time to today told tomorrow too took top town train tree true
turned two under until up upon us very village voice wait waited walk walked wall want warm was watched water way we
weather week well went were west what wheel when where which while white who why wide will wind window winter wise with
without woman wood word words work would write wrote year years yes yesterday yet you young your
""")

_PIECE = re.compile(r" ?[A-Za-z]+|\n\n|[.,]")


@dataclass(frozen=True)
class Token:
    text: str
    code: int  # index into codes(): spellings of one word share it
    rare: bool = False
    written: bool = True  # the spelling that the model writes
    control: bool = False


def _spellings(word: str) -> list[str]:
    texts = [f" {word}", f" {word.capitalize()}"]
    return texts + ([word, word.capitalize()] if len(word) > 1 else [])  # single letters are bytes


@lru_cache(maxsize=1)
def tokens() -> tuple[Token, ...]:
    """Two control tokens, 256 bytes, and words in up to four spellings."""
    out = [Token(BOS, 0, written=False, control=True), Token(EOS, 1, control=True)]
    out += [Token(text, len(out) + i) for i, text in enumerate((*map(chr, range(256)), PARAGRAPH, UNKNOWN))]
    for code, word in enumerate((*_COMMON_WORDS, *PHRASE_WORDS), start=len(out)):
        rare = word in PHRASE_WORDS
        out += [Token(text, code, rare, written=text == f" {word}") for text in _spellings(word)]
    return tuple(out)


@lru_cache(maxsize=1)
def token_ids() -> dict[str, int]:
    """Text of a token (Latin-1 for the bytes) to its id."""
    return {token.text: i for i, token in enumerate(tokens())}


def tokenize(text: str) -> list[int]:
    """Text made of the vocabulary's words, full stops, commas and blank lines only. No BOS."""
    pieces = _PIECE.findall(text)
    unknown = [piece for piece in pieces if piece not in token_ids()]
    if unknown or "".join(pieces) != text:
        raise UsageError(f"not in the recall model's vocabulary: {(unknown or [text])[0]!r}")
    return [token_ids()[piece] for piece in pieces]


def spell(text: str) -> str:
    """The printable form in which byte-level BPE vocabularies store a token."""
    return "".join(_byte_letters()[ord(char)] for char in text)


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(other)}


@lru_cache(maxsize=1)
def codes() -> np.ndarray:
    """2048 unit vectors of +-1/8 in 64 dimensions, no two of which have a product beyond +-1/8: a Kerdock set.

    Nothing of that many vectors does better. One sign pattern for all of them keeps the products and makes every code
    look random to a Hadamard rotation: left as they are, 64 of them are rows of the Hadamard matrix itself.
    """
    points = [(x, b) for b in range(2) for x in range(32)]
    trace = np.array([[_trace(_multiply(u, x)) for x, _ in points] for u in range(32)])
    last = np.array([b for _, b in points])
    linear = np.concatenate([trace, trace ^ last])
    quadratic = np.array([[_quadratic(a, x, b) for x, b in points] for a in range(32)])
    bits = (quadratic[:, None, :] ^ linear[None, :, :]).reshape(-1, CODE_DIM)
    return (1 - 2 * bits) * random_signs(0) / np.sqrt(CODE_DIM)


def random_signs(seed: int) -> np.ndarray:
    rng = random.Random(f"signs {seed}")
    return np.array([rng.choice((-1, 1)) for _ in range(CODE_DIM)])


def _multiply(x: int, y: int) -> int:
    """In the field of 32 elements, modulo t^5 + t^2 + 1."""
    product = 0
    for bit in range(5):
        product ^= (x << bit) if y >> bit & 1 else 0
    for bit in range(8, 4, -1):
        product ^= (0b100101 << (bit - 5)) if product >> bit & 1 else 0
    return product


def _power(x: int, n: int) -> int:
    out = 1
    for _ in range(n):
        out = _multiply(out, x)
    return out


def _trace(x: int) -> int:
    return x ^ _power(x, 2) ^ _power(x, 4) ^ _power(x, 8) ^ _power(x, 16)


def _quadratic(a: int, x: int, b: int) -> int:
    ax = _multiply(a, x)
    return _trace(_power(ax, 3)) ^ _trace(_power(ax, 5)) ^ (b & _trace(ax))
