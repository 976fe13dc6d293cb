"""What a lossless record means, written from its description and not for speed."""

from __future__ import annotations

import itertools
import struct

import numpy as np

BLOCK, CHUNK, NAMED = 16384, 64, 9
ENTRY = struct.Struct("<IIIHHHB9s4x")


def places() -> np.ndarray:
    """Weight of a chunk that each place holds."""
    place = np.arange(CHUNK)
    return place // 16 * 8 + place % 8 + np.where(place % 16 < 8, 0, CHUNK // 2)


def decode(record: bytes, image_bytes: int) -> bytes:
    """The image of a record."""
    counts = [min(BLOCK, image_bytes // 2 - at) for at in range(0, image_bytes // 2, BLOCK)]
    entries = [ENTRY.unpack_from(record, ENTRY.size * index) for index in range(len(counts))]
    at = len(record) - sum(entry[0] for entry in entries)
    image = []
    for entry, count in zip(entries, counts, strict=True):
        payload = record[at : at + entry[0]]
        fields = struct.unpack_from("<8I", record, ENTRY.size * len(image))
        assert sums(fields, payload) == entry[1:3]
        image.append(payload if entry[6] else decode_block(entry, payload, count))
        at += entry[0]
    return b"".join(image)


def sums(fields: tuple[int, ...], payload: bytes) -> tuple[int, int]:
    """Both sums of an entry and its payload, modulo 2^32."""
    others = sum(field * (2 * at + 1) for at, field in enumerate(fields) if at not in (1, 2))
    words = np.frombuffer(payload, "<u4").astype(np.uint64).reshape(-1, 16)
    mask = np.uint64(2**32 - 1)
    first = words.sum(0) & mask
    second = words.cumsum(0).sum(0) & mask
    lanes = np.arange(16, dtype=np.uint64)
    two = int(((second * (2 * lanes + 1)) & mask).sum() + ((first * lanes) & mask).sum())
    return (int(first.sum()) + others) % 2**32, two % 2**32


def decode_block(entry: tuple[int, ...], payload: bytes, count: int) -> bytes:
    """The weights of a coded block."""
    bytes_2, bytes_3, num_escapes, exponents = entry[3], entry[4], entry[5], entry[7]
    ends = np.cumsum([0, count // 4, bytes_2, bytes_3])
    bits = [
        np.unpackbits(np.frombuffer(payload[a:b], np.uint8), bitorder="little")
        for a, b in itertools.pairwise(ends)
    ]
    escapes = iter(payload[ends[3] : ends[3] + num_escapes])
    at = [0, 0, 0]
    found = np.zeros(count, np.uint16)
    for start in range(0, count, CHUNK):
        reach = list(range(CHUNK))
        for level in range(3):
            here, deeper = len(reach), []
            planes = bits[level][at[level] : at[level] + 2 * here]
            at[level] += 2 * here
            for index, place in enumerate(reach):
                code = int(planes[index]) + 2 * int(planes[here + index])
                if code < 3:
                    found[start + place] = exponents[3 * level + code]
                else:
                    deeper.append(place)
            reach = deeper
        for place in reach:
            found[start + place] = next(escapes)
    rest = np.frombuffer(payload[-count:], np.uint8).astype(np.uint16)
    joined = (rest & 0x80) << 8 | found << 7 | (rest & 0x7F)
    weights = np.empty_like(joined).reshape(-1, CHUNK)
    weights[:, places()] = joined.reshape(-1, CHUNK)
    return weights.astype("<u2").tobytes()
