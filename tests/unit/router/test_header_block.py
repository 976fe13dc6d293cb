"""Header blocks against the decoder of the hpack library."""

import hpack
import pytest
from hpack.exceptions import InvalidTableSizeError

from router.grpc.header_block import LiteralEncoder

FIELDS = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"penstock-request-id", b"req-0123456789"),
    (b"empty", b""),
]


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 16_384, 70_000])
def test_a_value_of_any_length_arrives_as_it_is(size):
    decoder = hpack.Decoder(max_header_list_size=1 << 20)
    block = LiteralEncoder().encode([*FIELDS, (b"details-bin", b"\xff" * size)])
    assert list(decoder.decode(block, raw=True)) == [*FIELDS, (b"details-bin", b"\xff" * size)]


def test_a_decoder_keeps_nothing_of_many_blocks():
    encoder, decoder = LiteralEncoder(), hpack.Decoder()
    for _ in range(3):
        assert list(decoder.decode(encoder.encode(FIELDS), raw=True)) == FIELDS
    assert decoder.header_table_size == 0
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize("before", [0, 1], ids=["before the first block", "after it"])
def test_a_client_may_make_its_table_smaller_at_any_time(before):
    encoder, decoder = LiteralEncoder(), hpack.Decoder()
    for _ in range(before):
        decoder.decode(encoder.encode(FIELDS), raw=True)
    decoder.max_allowed_table_size = 100
    encoder.header_table_size = 100  # as h2 does with the client's settings
    assert list(decoder.decode(encoder.encode(FIELDS), raw=True)) == FIELDS


def test_the_decoder_would_notice_a_size_that_was_not_announced():
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 100
    with pytest.raises(InvalidTableSizeError):
        decoder.decode(hpack.Encoder().encode(FIELDS))
