"""Signatures and keys: published ones, and texts that are neither."""

import pytest

from appliance.errors import PathInfoError
from appliance.nix.signing import PublicKey, SecretKey, Signature
from tests.refusal import refused

# These keys are published: never use them.
SECRETS = {
    "do.not.use:sGPzxuK5WvWPraytx+6sjtaff866sYlfvErE6x0hFEhy5eqe7OVZ8ZMqZ/ME/HaRdKGNGvJkyGKXYTaeA6lR"
    "3A==": "do.not.use:cuXqnuzlWfGTKmfzBPx2kXShjRryZMhil2E2ngOpUdw=",
    "cache.example.com-1:cCta2MEsRNuYCgWYyeRXLyfoFpKhQJKn8gLMeXWAb7vIpRKKo/3JoxJ24OYa3DxT2JVV38KjK/1y"
    "wHWuMe2JEw==": "cache.example.com-1:yKUSiqP9yaMSduDmGtw8U9iVVd/Coyv9csB1rjHtiRM=",
}
DO_NOT_USE, EXAMPLE = SECRETS
CACHE = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
CURL = (
    "1;/nix/store/syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin;"
    "sha256:1b4sb93wp679q4zx9k1ignby1yna3z7c4c2ri3wphylbc2dwsys0;196040;"
    "/nix/store/0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0,"
    "/nix/store/6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115,"
    "/nix/store/j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12,"
    "/nix/store/yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n"
)
SIGNED = "TsTTb3WGTZKphvYdBHXwo6weVILmTytUjLB+vcX89fOjjRicCHmKA4RCPMVLkj6TMJ4GMX3HPVWRdD1hkeKZBQ=="


def test_published_signature_is_read_and_written() -> None:
    signature = Signature.parse(f"cache.nixos.org-1:{SIGNED}")

    assert signature.name == "cache.nixos.org-1"
    assert signature.data[:8].hex() == "4ec4d36f75864d92"
    assert str(signature) == f"cache.nixos.org-1:{SIGNED}"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (CACHE, "cache.nixos.org-1"),
        ("cheesecake:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=", "cheesecake"),
        ("test1:tLAEn+EeaBUJYqEpTd2yeerr7Ic6+0vWe+aXL/vYUpE=", "test1"),
    ],
)
def test_public_key_is_read_and_written(key: str, name: str) -> None:
    assert PublicKey.parse(key).name == name
    assert str(PublicKey.parse(key)) == key


@pytest.mark.parametrize(
    ("signature", "fingerprint", "is_valid"),
    [
        (f"cache.nixos.org-1:{SIGNED}", CURL, True),
        (f"cache.nixos.org:{SIGNED}", CURL, False),
        (f"cache.nixos.org-2:{SIGNED}", CURL, False),
        (f"cache.nixos.org-1:{SIGNED}", CURL[:5], False),
        (f"cache.nixos.org-1:TsTTb{'0' * 22}{SIGNED[27:]}", CURL, False),
    ],
    ids=["good", "shorter name", "another name", "another text", "another signature"],
)
def test_signature_is_valid_for_its_key_its_name_and_its_text(
    signature: str, fingerprint: str, *, is_valid: bool
) -> None:
    key = PublicKey.parse(CACHE)

    assert key.verifies(Signature.parse(signature), fingerprint) == is_valid


def test_key_under_another_name_verifies_what_has_that_name() -> None:
    key = PublicKey.parse(CACHE.replace("cache.nixos.org-1", "cache.nixos.org-2"))

    assert key.verifies(Signature.parse(f"cache.nixos.org-2:{SIGNED}"), CURL)


@pytest.mark.parametrize(
    ("secret", "signed"),
    [
        (
            DO_NOT_USE,
            "QQWJqsSgGYJiKl8ldFBwS8Q+6c1hK+FXBcy/Lqjx3wid1IdKtNTdWrmImTmuwIkCg1k+E+E4HmQQVGcslRO6BQ==",
        ),
        (
            EXAMPLE,
            "/hcsy64xvXyJC+CZfBquZ6pwnjJVuZ/Ik2tVJraDcLbPmJbjoptCBQ3FO1D5RQRAzjkOp/efwrMthhLoyKM/CA==",
        ),
    ],
)
def test_known_key_signs_as_published(secret: str, signed: str) -> None:
    key = SecretKey.parse(secret)
    signature = key.sign(CURL)

    assert str(key.public) == SECRETS[secret]
    assert str(signature) == f"{key.public.name}:{signed}"
    assert PublicKey.parse(SECRETS[secret]).verifies(signature, CURL)
    assert not PublicKey.parse(CACHE).verifies(signature, CURL)


BAD_SIGNATURES = {
    "too short": ("invalid-length", f"test:{SIGNED[:-28]}"),
    "newline in the name": ("invalid-name", f"test\n:{SIGNED}"),
    "space in the name": ("invalid-name", f"test :{SIGNED}"),
    "no name": ("invalid-name", f":{SIGNED}"),
    "no colon": ("missing-separator", SIGNED),
    "not base 64": ("decode-error", f"test:{SIGNED.replace('+', '-')}"),
    "no padding": ("decode-error", f"test:{SIGNED.rstrip('=')}"),
}


@pytest.mark.parametrize(("rule", "text"), BAD_SIGNATURES.values(), ids=BAD_SIGNATURES.keys())
def test_text_that_is_no_signature_is_refused(rule: str, text: str) -> None:
    with refused(PathInfoError, rule):
        Signature.parse(text)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("missing-separator", CACHE.partition(":")[2]),
        ("decode-error", CACHE[:-1]),
        ("invalid-length", CACHE[:-4]),
        ("missing-separator", ""),
    ],
)
def test_text_that_is_no_public_key_is_refused(rule: str, text: str) -> None:
    with refused(PathInfoError, rule):
        PublicKey.parse(text)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("decode-error", EXAMPLE[:-3]),
        ("missing-separator", EXAMPLE.replace(":", "")[:-3]),
        ("missing-separator", EXAMPLE.replace(":", "")),
        ("invalid-length", CACHE),
    ],
)
def test_text_that_is_no_secret_key_is_refused_without_showing_it(rule: str, text: str) -> None:
    with refused(PathInfoError, rule) as caught:
        SecretKey.parse(text)

    assert "cCta2MEs" not in str(caught.value)


def test_secret_key_with_the_public_half_of_another_is_refused() -> None:
    seed = DO_NOT_USE.partition(":")[2][:40]
    mixed = f"mixed:{seed}{EXAMPLE.partition(':')[2][40:]}"
    with refused(PathInfoError, "public-half-mismatch", match="belongs to another key"):
        SecretKey.parse(mixed)
