"""The base 32 of Nix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.nix.store_path import base32_size, decode_base32, encode_base32

VECTORS = {
    "": "",
    "0z": "1f",
    "00bgd045z0d4icpbc2yyz4gx48ak44la": "8a12321522fd91efbd60ebb2481af88580f61600",
    "0c5b8vw40dy178xlpddw65q9gf1h2186jcc3p4swinwggbllv8mk": (
        "b3a24de97a8fdbc835b9833169501030b8977031bcb54b3b3ac13740f846ab30"
    ),
    "14cx20k6z4hq508kqi2lm79qfld5f9mf7kiafpqsjs3zlmycza0k": (
        "13a8cf7ca57f68a9f1752acee36a72a55187d3a954443c112818926f26109d91"
    ),
    "1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0": (
        "407bcd9b608b7a78f9885930c2ce1fcafae0977d31ccd43fc1e998cb475a9aac"
    ),
    "syd87l2rxw8cbsxmxl853h0r6pdwhwjr": "5972c8db3519c05110edb5ebc510ef59d0839ad7",
    "1ak1ymbmsfx7z8kh09jzkr3a4dvkrfjw": "5cba3c77236ae4f9650270a27fbad375551fa60a",
    "1fnf2m46ya7r7afkcb8ba2j0sc4a85m749sh9jz64g4hx6z3r088": (
        "08813cbee9903c62be4c5027726a418a300da4500b2d369d3af9286f4815ceba"
    ),
    "1xqkzcb3909fp07qngljr4wcdnrh1gdam1m2n29i6hhrxlmkgkv1": (
        "61cf372bed19421393b0a286aada0b30dbc638c9923e8b0fb82e813416fb13f7"
    ),
    "11vm2x1ajhzsrzw7lsyss51mmr3b6yll9wdjn51bh7liwkpc8ila": (
        "8a46c4eee4911eb842b1b2f144a9376be45a43d1da6b7af8cffa43a942177587"
    ),
}


@pytest.mark.parametrize("text", VECTORS)
def test_known_texts_and_bytes_stand_for_each_other(text: str) -> None:
    data = bytes.fromhex(VECTORS[text])
    assert decode_base32(text) == data
    assert encode_base32(data) == text


def test_length_of_a_text_follows_from_that_of_the_bytes() -> None:
    assert [base32_size(size) for size in (0, 1, 16, 20, 32, 64)] == [*(0, 2, 26, 32, 52, 103)]


@pytest.mark.parametrize("text", ["zz", "c0", "0", "0zz", "0e", "0o", "0t", "0u", "0Z", "é0"])
def test_text_that_no_bytes_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        decode_base32(text)


@given(st.binary(max_size=70))
def test_any_bytes_come_back(data: bytes) -> None:
    assert decode_base32(encode_base32(data)) == data
