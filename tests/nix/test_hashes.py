"""Hashes in the forms that Nix writes."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import PathInfoError
from appliance.nix.hashes import DIGEST_SIZES, NixHash
from tests.refusal import refused

SHA256 = {
    "sha256-pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank/v1unTk=": (
        "a5ce9c155ed09397614646c9717fc7cd94b1023d7b76b618d409e4fefd6e9d39"
    ),
    # Without padding.
    "sha256-fgIr3TyFGDAXP5+qoAaiMKDg/a1MlT6Fv/S/DaA24S8": (
        "7e022bdd3c851830173f9faaa006a230a0e0fdad4c953e85bff4bf0da036e12f"
    ),
    # With bits past the last byte.
    "sha256-syceJMUEknBDCHK8eGs6rUU3IQn+HnQfURfCrDxYPa9=": (
        "b3271e24c5049270430872bc786b3aad45372109fe1e741f5117c2ac3c583daf"
    ),
    "sha256-E73Nt0NAKGxCnsyBFDUaCAbA+wiF5qjq1O9J7WrnT0E=": (
        "13bdcdb74340286c429ecc8114351a0806c0fb0885e6a8ead4ef49ed6ae74f41"
    ),
    "sha256:11vm2x1ajhzsrzw7lsyss51mmr3b6yll9wdjn51bh7liwkpc8ila": (
        "8a46c4eee4911eb842b1b2f144a9376be45a43d1da6b7af8cffa43a942177587"
    ),
}
# The same digest in base 16, base 64 and base 32, for each algorithm.
FORMS = {
    "md5": (
        "c4874a8897440b393d862d8fd459073f",
        "xIdKiJdECzk9hi2P1FkHPw==",
        "1z0xcx93rdhqykj2s4jy44m1y4",
    ),
    "sha1": (
        "6016777997c30ab02413cf5095622cd7924283ac",
        "YBZ3eZfDCrAkE89QlWIs15JCg6w=",
        "mj1l54np5ii9al6g2cjb02n3jxwpf5k0",
    ),
    "sha256": (
        "a5ce9c155ed09397614646c9717fc7cd94b1023d7b76b618d409e4fefd6e9d39",
        "pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank/v1unTk=",
        "0fcxdvyzxr09shcbcxkv7l1b356dqxzp3ja68rhrg4yhbqarrkm5",
    ),
    "sha512": (
        "ab40d0be3541f0774bba7815d13d10b03252e96e95f7dbb4ee99a3b431c21662"
        "fd6971a020160e39848aa5f305b9be0f78727b2b0789e39f124d21e92b8f39ef",
        "q0DQvjVB8HdLungV0T0QsDJS6W6V99u07pmjtDHCFmL9aXGgIBYOOYSKpfMFub4PeHJ7KweJ458STSHpK4857w==",
        "3pkk3rbx4hls4lzwf4hfavvf9w0zgmr0prsb2l47471c850f5lzsqhnq8qv98wrxssdpxwmdvlm4cmh20yx25bqp95"
        "pgw216nzd0h5b",
    ),
}
SHA512_HEX = (
    "ee0f754c1bd8a18428ad14eaa3ead80ff8b96275af5012e7a8384f1f10490da0"
    "56eec9ae3cc791a7a13a24e16e54df5bccdd109c7d53a14534bbd7360a300b11"
)
SHA512_SRI = (
    "sha512-7g91TBvYoYQorRTqo+rYD/i5YnWvUBLnqDhPHxBJDaBW7smuPMeRp6E6JOFuVN9bzN0QnH1ToUU0u9c2CjALEQ"
)
BAD = {
    "nothing": ("invalid-algo", ""),
    "no algorithm": ("invalid-algo", "pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank/v1unTk="),
    "unknown algorithm": (
        "invalid-algo",
        "sha384-o4UVSl89mIB0sFUK+3jQbG+C9Zc9dRlV/Xd3KAvXEbhqxu0J5OAdg6b6VHKHwQ7U",
    ),
    "truncated": ("invalid-digest-length", "sha256-pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank"),
    "not base 64": ("invalid-hash-encoding", "sha256-invalid=base64"),
    "two of them": (
        "invalid-hash-encoding",
        "sha256-pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank/v1unTk= sha256-"
        "pc6cFV7Qk5dhRkbJcX/HzZSxAj17drYY1Ank/v1unTk=",
    ),
    "base 64 without padding, but a colon": (
        "invalid-hash-encoding",
        "sha256:fgIr3TyFGDAXP5+qoAaiMKDg/a1MlT6Fv/S/DaA24S8",
    ),
    "bits past the last byte": (
        "invalid-hash-encoding",
        "sha256:syceJMUEknBDCHK8eGs6rUU3IQn+HnQfURfCrDxYPa9=",
    ),
    "not base 16": ("invalid-hash-encoding", "sha256:" + "0g" * 32),
    "base 16 with spaces": ("invalid-hash-encoding", "sha256:" + "00 " * 21 + "0"),
    "not base 32": ("invalid-hash-encoding", "sha256:" + "e" * 52),
    "base 16 too short": ("invalid-hash-encoding", "sha256:" + "00" * 31),
    "another algorithm's length": ("invalid-digest-length", "sha1:" + "00" * 32),
}


@pytest.mark.parametrize("text", SHA256)
def test_known_text_is_read(text: str) -> None:
    assert NixHash.parse(text) == ("sha256", bytes.fromhex(SHA256[text]))


@pytest.mark.parametrize("padding", ["", "=", "==", "==="])
def test_padding_after_a_dash_may_be_wrong(padding: str) -> None:
    assert NixHash.parse(SHA512_SRI + padding) == ("sha512", bytes.fromhex(SHA512_HEX))


@pytest.mark.parametrize(("rule", "text"), BAD.values(), ids=BAD.keys())
def test_text_that_is_no_digest_is_refused(rule: str, text: str) -> None:
    with refused(PathInfoError, rule):
        NixHash.parse(text)


@pytest.mark.parametrize("algorithm", DIGEST_SIZES)
def test_every_form_of_every_algorithm_is_read(algorithm: str) -> None:
    base16_text, base64_text, base32_text = FORMS[algorithm]
    expected = NixHash(algorithm, bytes.fromhex(base16_text))
    for text in (
        f"{algorithm}-{base64_text}",
        f"{algorithm}-{base64_text.rstrip('=')}",
        f"{algorithm}:{base16_text}",
        f"{algorithm}:{base16_text.upper()}",
        f"{algorithm}:{base32_text}",
        f"{algorithm}:{base64_text}",
    ):
        assert NixHash.parse(text) == expected
    assert str(expected) == f"{algorithm}:{base32_text}"
    assert expected.sri() == f"{algorithm}-{base64_text}"
    for text in (base16_text, base64_text, base32_text):
        with refused(PathInfoError, "invalid-algo"):
            NixHash.parse(text)


@given(st.sampled_from(sorted(DIGEST_SIZES)), st.randoms(use_true_random=False))
def test_written_digest_is_read_back(algorithm: str, random: object) -> None:
    digest = hashlib.new(algorithm, repr(random).encode()).digest()
    found = NixHash(algorithm, digest)
    assert NixHash.parse(str(found)) == found == NixHash.parse(found.sri())


@given(st.text(max_size=80))
def test_any_text_is_a_digest_or_refused(text: str) -> None:
    for prefix in ("", "sha256:", "md5-"):
        try:
            found = NixHash.parse(prefix + text)
        except PathInfoError:
            continue
        assert len(found.digest) == DIGEST_SIZES[found.algorithm]
