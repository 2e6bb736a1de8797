"""Codes <-> bytes: golden bytes, every byte value, every way of being wrong."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from quantization_utils.packing import CHUNK, CODES_PER_BYTE, ENCODINGS, entropy_bits, pack_codes, unpack_codes

EXAMPLE = [0, 1, -1, 1, 1, -1, 0]


def int8(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def random_codes(count: int, zero_fraction: float, bits, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 2 if bits == "ternary" else 128, count) * rng.choice([-1, 1], count)
    return torch.from_numpy((values * (rng.random(count) >= zero_fraction)).astype(np.int8))


def test_golden_bytes_of_the_specification():
    assert pack_codes(int8(EXAMPLE), "ternary") == ("trits", bytes.fromhex("8102"))
    gaps = bytes.fromhex("06000000 06000000 010000000001 12")
    for encoding, payload in (("trits", bytes.fromhex("8102")), ("gaps", gaps)):
        assert unpack_codes(payload, encoding, (7,), "ternary").tolist() == EXAMPLE
    assert pack_codes(int8([0] * 45), "ternary") == ("trits", bytes(9))  # gaps take as many bytes, and are less simple


def test_every_byte_of_trits_means_what_the_specification_says():
    for byte in range(243):
        digits = [byte // 3**i % 3 for i in range(5)]
        codes = [{0: 0, 1: 1, 2: -1}[d] for d in digits]
        assert unpack_codes(bytes([byte]), "trits", (5,), "ternary").tolist() == codes
        assert pack_codes(int8(codes), "ternary") == ("trits", bytes([byte]))
    for byte in range(243, 256):
        with pytest.raises(ValueError, match="at most 242"):
            unpack_codes(bytes([byte]), "trits", (5,), "ternary")


def test_all_8_bit_codes():
    codes = torch.arange(-127, 128, dtype=torch.int8)
    encoding, payload = pack_codes(codes, 8)
    assert (encoding, payload) == ("bytes", codes.numpy().tobytes())
    assert torch.equal(unpack_codes(payload, encoding, (255,), 8), codes)
    with pytest.raises(ValueError, match="-128"):
        unpack_codes(b"\x80", "bytes", (1,), 8)


@pytest.mark.parametrize("bits", ["ternary", 8])
@pytest.mark.parametrize("zero_fraction", [0, 0.3, 0.5, 0.7, 0.9, 0.99, 1])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 97, 254, 255, 256, 257, 511, 1025, 400_003, 1_100_000])
def test_round_trip(bits, zero_fraction, count):
    codes = random_codes(count, zero_fraction, bits)
    encoding, payload = pack_codes(codes, bits)
    assert encoding in ENCODINGS[bits] and count <= CODES_PER_BYTE * len(payload)
    assert torch.equal(unpack_codes(payload, encoding, (count,), bits), codes)
    assert pack_codes(codes, bits) == (encoding, payload)


def test_round_trip_of_gaps_that_end_with_a_chunk():
    codes = random_codes(16 * CHUNK, 0.95, "ternary")
    encoding, payload = pack_codes(codes, "ternary")
    assert "gaps" in encoding and torch.equal(unpack_codes(payload, encoding, codes.shape, "ternary"), codes)


@pytest.mark.parametrize("bits", ["ternary", 8])
@pytest.mark.parametrize("zero_fraction", [0.3, 0.9, 0.999])
def test_chunks_change_nothing(bits, zero_fraction, monkeypatch):
    codes = random_codes(20_000, zero_fraction, bits)
    packed = pack_codes(codes, bits)
    monkeypatch.setattr("quantization_utils.packing.CHUNK", 2)
    assert pack_codes(codes, bits) == packed
    assert torch.equal(unpack_codes(packed[1], packed[0], codes.shape, bits), codes)


def test_every_encoding_is_chosen_somewhere():
    chosen = {
        bits: {pack_codes(random_codes(200_000, f, bits), bits)[0] for f in (0.33, 0.5, 0.9, 1)} for bits in ENCODINGS
    }
    assert chosen == {bits: set(names) - ({"bytes"} if bits == 8 else set()) for bits, names in ENCODINGS.items()}


def test_shape_and_strides():
    codes = random_codes(2 * 3 * 5 * 7, 0.3, "ternary").view(2, 3, 5, 7)
    for variant in (codes, codes.permute(3, 0, 2, 1), codes[:, :, ::2], codes.to(memory_format=torch.channels_last)):
        encoding, payload = pack_codes(variant, "ternary")
        assert torch.equal(unpack_codes(payload, encoding, variant.shape, "ternary"), variant)


@pytest.mark.parametrize("zero_fraction", [0.33, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_within_three_percent_of_shannon(zero_fraction):
    codes = random_codes(500_000, zero_fraction, "ternary")
    assert len(pack_codes(codes, "ternary")[1]) * 8 <= 1.03 * entropy_bits(codes)


def test_whole_filters_of_zeros_cost_next_to_nothing():
    codes = random_codes(512 * 1000, 0.33, "ternary").view(512, 1000)
    codes[::2] = 0
    assert len(pack_codes(codes, "ternary")[1]) * 8 < 0.9 * codes.numel()


def test_entropy():
    assert entropy_bits(int8([0, 1, -1] * 100)) == pytest.approx(300 * np.log2(3))
    assert str(entropy_bits(int8([1] * 9))) == "0.0"
    assert entropy_bits(int8([0] * 50)) == 0 == entropy_bits(int8([]))


@pytest.mark.parametrize(("codes", "bits", "message"), [
    (int8([2]), "ternary", "lie in"), (int8([-2, 0]), "ternary", "lie in"), (int8([-128]), 8, "lie in"),
    (torch.zeros(3), "ternary", "int8"), (int8([0]), 4, "bits"),
])  # fmt: skip
def test_codes_that_cannot_be_packed(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits)


def frame(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def gaps_payload(gaps: bytes, values: bytes, length=None, stored=None) -> bytes:
    return (
        struct.pack("<II", len(gaps) if length is None else length, len(gaps) if stored is None else stored)
        + gaps
        + values
    )


MAGIC, ZEROS = bytes.fromhex("28b52ffd"), bytes.fromhex("a3000000")  # a last block that is 20 times the byte 0
WRONG = {
    "unknown encoding": (b"\x00", "nibbles", (5,), "ternary"),
    "encoding of other codes": (b"\x00", "bytes", (1,), "ternary"),
    "too short": (b"\x00", "trits", (6,), "ternary"),
    "too long": (b"\x00\x00", "trits", (5,), "ternary"),
    "padding": (b"\x03", "trits", (1,), "ternary"),
    "more codes than bytes allow": (frame(bytes(100_000)), "trits+zstd", (500_000,), "ternary"),
    "not a frame": (b"hello world", "trits+zstd", (55,), "ternary"),
    "frame of another size": (frame(bytes(20)), "trits+zstd", (95,), "ternary"),
    "frame and more": (frame(bytes(20)) + b"x", "trits+zstd", (100,), "ternary"),
    "frame cut off": (frame(bytes(range(200)))[:-1], "trits+zstd", (1000,), "ternary"),
    "frame without size": (frame(bytes(20), write_content_size=False), "trits+zstd", (100,), "ternary"),
    "frame with a bad byte": (frame(b"\xf3" * 20), "trits+zstd", (100,), "ternary"),
    "frame of a dictionary": (MAGIC + b"\x21\x07\x14" + ZEROS, "trits+zstd", (100,), "ternary"),
    "frame of a large window": (MAGIC + b"\x80\x70\x14\0\0\0" + ZEROS, "trits+zstd", (100,), "ternary"),
    "frame of nothing and more": (frame(b"") + b"x", "trits+zstd", (0,), "ternary"),
    "frame of nothing cut off": (frame(b"")[:-1], "trits+zstd", (0,), "ternary"),
    "frame of nothing that is long": (frame(b"")[:6] + b"\0\0\0" * 6 + b"\1\0\0", "trits+zstd", (0,), "ternary"),
    "values of nothing and more": (gaps_payload(frame(b"\5"), frame(b"") + b"x", length=1), "gaps+zstd", (5,), 8),
    "no gap header": (b"\x00" * 7, "gaps", (5,), "ternary"),
    "no gaps": (gaps_payload(b"", b""), "gaps", (0,), "ternary"),
    "gaps too few": (gaps_payload(b"\x03", b""), "gaps", (5,), "ternary"),
    "gaps too many": (gaps_payload(b"\x06", b""), "gaps", (5,), "ternary"),
    "gaps end in a run": (gaps_payload(b"\xff", b""), "gaps", (254,), "ternary"),
    "gap length of fewer": (gaps_payload(b"\x01\x03", b"\x01", length=1), "gaps", (5,), "ternary"),
    "gap length forged": (gaps_payload(b"\x05", b"", length=2**32 - 1), "gaps", (5,), "ternary"),
    "gap bytes forged": (gaps_payload(b"\x05", b"", stored=2**32 - 1), "gaps", (5,), "ternary"),
    "signs missing": (gaps_payload(b"\x01\x03", b""), "gaps", (5,), "ternary"),
    "signs too many": (gaps_payload(b"\x01\x03", b"\x01\x00"), "gaps", (5,), "ternary"),
    "sign padding": (gaps_payload(b"\x01\x03", b"\x02"), "gaps", (5,), "ternary"),
    "value zero": (gaps_payload(b"\x01\x03", b"\x00"), "gaps", (5,), 8),
    "value -128": (gaps_payload(b"\x01\x03", b"\x80"), "gaps", (5,), 8),
    "values missing": (gaps_payload(b"\x01\x03", b""), "gaps", (5,), 8),
    "values too many": (gaps_payload(b"\x01\x03", b"\x01\x01"), "gaps", (5,), 8),
}


def test_the_payloads_above_are_one_step_from_a_good_one():
    assert unpack_codes(gaps_payload(b"\x01\x03", b"\x01"), "gaps", (5,), "ternary").tolist() == [0, -1, 0, 0, 0]
    assert unpack_codes(gaps_payload(b"\x01\x03", b"\x81"), "gaps", (5,), 8).tolist() == [0, -127, 0, 0, 0]
    assert unpack_codes(gaps_payload(bytes(6), b"\0"), "gaps", (5,), "ternary").tolist() == [1] * 5  # as many as can be
    for header in (b"\x20\x14", b"\x80\x50\x14\0\0\0"):  # the second with a window of 1 MiB
        assert not unpack_codes(MAGIC + header + ZEROS, "trits+zstd", (100,), "ternary").any()
    assert unpack_codes(frame(b"", write_checksum=True), "trits+zstd", (0,), "ternary").shape == (0,)
    nothing = gaps_payload(frame(b"\5"), frame(b""), length=1)
    assert not unpack_codes(nothing, "gaps+zstd", (5,), 8).any()


@pytest.mark.parametrize("case", WRONG)
def test_payloads_that_are_not_right(case):
    with pytest.raises(ValueError):  # noqa: PT011  each has a sentence of its own
        unpack_codes(*WRONG[case])


def test_gaps_for_which_there_is_no_room_are_not_decompressed(monkeypatch):
    monkeypatch.setattr("quantization_utils.packing._unzstd", lambda *_: pytest.fail("decompressed"))
    payload = gaps_payload(frame(bytes(1 << 20)), b"", length=1 << 20)
    with pytest.raises(ValueError, match="longer than there is room for"):
        unpack_codes(payload, "gaps+zstd", (5,), "ternary")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 300), st.sampled_from([(e, b) for b in ENCODINGS for e in ENCODINGS[b]]))
def test_any_bytes_are_refused_or_are_codes(payload, count, kind):
    encoding, bits = kind
    try:
        codes = unpack_codes(payload, encoding, (count,), bits)
    except ValueError:
        return
    assert codes.shape == (count,) and codes.dtype == torch.int8
    if count:
        assert int(codes.abs().max()) <= (1 if bits == "ternary" else 127) and int(codes.min()) > -128
