"""Token-level lookup drills: repeated segments, then key-value records in filler.

They work on ids, not text, so that lookup is learned for any token and thousands of rows cost little. Each row carries
a mask of the tokens whose prediction is scored.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_ORDINARY_ID = 13  # ids below are special tokens
MARKER_SIZES = (0.4, 0.5, 0.1)  # shares of markers and separators with none, one and two ids
REWORDED_SHARE = 0.12  # of rows whose queries use another separator than the records: much harder, learned last
NUMERAL_SHARE = 0.3  # of rows whose values are long and of few symbols, as digits are

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Drill:
    """Rows of one kind: `kind` is "repeats" or "records", `length` in tokens, `num_symbols` ids to draw from."""

    kind: str
    length: int
    num_symbols: int

    def rows(self, rng: np.random.Generator, count: int, vocab_size: int) -> tuple[Ids, Mask]:
        """`count` rows as ids and mask, each [count, length]."""
        make = repeats if self.kind == "repeats" else records
        made = [make(rng, self.length, alphabet(self.num_symbols, vocab_size)) for _ in range(count)]
        return np.stack([ids for ids, _ in made]), np.stack([mask for _, mask in made])


def alphabet(num_symbols: int, vocab_size: int) -> Ids:
    """A fixed subset of the ordinary ids; larger subsets contain the smaller ones."""
    order = np.random.default_rng(7).permutation(np.arange(FIRST_ORDINARY_ID, vocab_size))
    return order[:num_symbols]


def repeats(rng: np.random.Generator, length: int, symbols: Ids, max_segment: int = 20) -> tuple[Ids, Mask]:
    """Random ids in which segments come twice within 48 tokens; every repeated token after the first is scored."""
    ids, mask = rng.choice(symbols, length), np.zeros(length, dtype=bool)
    start = int(rng.integers(0, 6))
    while True:
        size, gap = int(rng.integers(4, max_segment)), int(rng.integers(0, 12))
        again, end = start + size + gap, start + 2 * size + gap
        if end > length:
            return ids, mask
        ids[again:end] = ids[start : start + size]
        mask[again + 1 : end] = True
        start = end


def records(rng: np.random.Generator, length: int, symbols: Ids, query_share: float = 0.35) -> tuple[Ids, Mask]:
    """Key-value records scattered in filler, then queries; the values in the queries are scored.

    Record and query share the form [marker, key, separator, value]; per row the marker and separator are one or two
    ids or missing, keys and values have one to three ids, and the query's separator may differ from the record's. In
    some rows the values are numerals: up to six ids of only ten, among which a pair of ids recurs by chance.
    """
    shuffled = rng.permutation(symbols)
    is_numeral = rng.random() < NUMERAL_SHARE
    key_size, value_size = int(rng.integers(1, 3)), int(rng.integers(3, 7) if is_numeral else rng.integers(1, 4))
    marker, separator, asked, spare = _markers(rng, shuffled)
    record_size = len(marker) + key_size + len(separator) + value_size
    query_size = len(marker) + key_size + len(asked) + value_size
    num_queries = max(2, int(length * query_share) // query_size)
    space = length - num_queries * query_size
    num_records = int(rng.integers(2, max(3, int(0.9 * space / record_size))))
    keys, filler_symbols = _keys(rng, spare, num_records, key_size)
    values = rng.choice(spare[-10:] if is_numeral else spare, (num_records, value_size))
    made = [np.concatenate((marker, keys[i], separator, values[i])) for i in range(num_records)]
    body = _scatter(rng, made, space, filler_symbols)
    order = _query_order(rng, num_records, num_queries)
    queries = [np.concatenate((marker, keys[i], asked, values[i])) for i in order]
    ids = np.concatenate((body, *queries))
    mask = np.zeros(length, dtype=bool)
    for offset in range(1, value_size + 1):
        mask[space + query_size - offset :: query_size] = True
    return ids, mask


def _markers(rng: np.random.Generator, shuffled: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Marker, record separator, query separator, and the symbols left over."""
    sizes = rng.choice((0, 1, 2), 2, p=MARKER_SIZES)
    marker, separator, spare = np.split(shuffled, np.cumsum(sizes))
    if rng.random() >= REWORDED_SHARE:
        return marker, separator, separator, spare
    asked, spare = np.split(spare, [int(rng.choice((0, 1, 2), p=MARKER_SIZES))])
    return marker, separator, asked, spare


def _keys(rng: np.random.Generator, spare: Ids, count: int, size: int) -> tuple[Ids, Ids]:
    """Distinct keys [count, size] and the symbols filler may use (none of them opens a key)."""
    if size == 1:
        num_openers = min(count, len(spare) - 8)
        openers = spare[:num_openers]
        keys = openers[np.arange(count) % num_openers][:, None]
    else:
        num_openers = max(1, int(count**0.5) + 1)
        pairs = rng.permutation(num_openers * (num_openers + 1))[:count]
        keys = np.stack((spare[pairs // (num_openers + 1)], spare[pairs % (num_openers + 1)]), axis=1)
    return keys, spare[num_openers + 1 :]


def _scatter(rng: np.random.Generator, made: list[Ids], space: int, filler_symbols: Ids) -> Ids:
    """The records in order with random stretches of filler between them, `space` ids in all."""
    num_filler = space - sum(len(record) for record in made)
    cuts = np.sort(rng.integers(0, num_filler + 1, len(made)))
    filler = np.split(rng.choice(filler_symbols, num_filler), cuts)
    pieces = [piece for pair in zip(filler, made, strict=False) for piece in pair]
    return np.concatenate((*pieces, filler[-1]))


def _query_order(rng: np.random.Generator, num_records: int, num_queries: int) -> Ids:
    rounds = -(-num_queries // num_records)
    return np.concatenate([rng.permutation(num_records) for _ in range(rounds)])[:num_queries]
