"""Names of blocks: stable bytes, chained, keyed, incremental."""

import dataclasses
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC
from hypothesis import given
from hypothesis import strategies as st

from antefix.block import (
    CPU_FLOAT32,
    Chain,
    Family,
    Fingerprint,
    HashKind,
    arithmetic_of,
    as_tokens,
    chain_of,
    check_arithmetic,
    differing_fields,
    exactness_of,
    hash_kind_of,
    root_of,
    tenant_key,
)
from antefix.block_v1 import digest_v1
from antefix.errors import InvalidRequest
from antefix.layout import KVFormat, KVGeometry
from antefix.secret import Keyring

GEOMETRY = KVGeometry.from_config({"num_hidden_layers": 4, "head_dim": 64, "index_head_dim": 32, "sliding_window": 64})
FINGERPRINT = Fingerprint(weights_revision="w1", geometry=GEOMETRY, kv_format=KVFormat.FP8, tokenizer="t1")
KEY = tenant_key(b"0123456789abcdef", "tenant")

# Fixed values. A change of any of these makes every existing store a miss.
GOLDEN_FINGERPRINT = "3b51db6012797243d4a7244b11b4e504f341d45d5fb0b952cbb5f5f784be6453"
GOLDEN_ROOT = "f2df178f57e478d0f7606d2d5ac132998fff4fd7b0d25b168c78f9f69923a558"
GOLDEN_HASHES = [
    "ab791971ff3629fe39cb2c3255739b1005ea0bf57a8997afb46975464394ae7c",
    "9daee169ad0526f3176c7b83aa2e5b3a007b6b9eec488cc7e80ad2aabe5a4617",
]
# Hash kind 1, with which names were made before.
GOLDEN_FINGERPRINT_KIND_1 = "ffcb08cd70d002c43a27baba8a62cf56b28d5bb0fcaf17305bb4e06b4be47dd6"
GOLDEN_HASHES_KIND_1 = [
    "93a3d7c26f2cc7a0f59c428b5e51673e83b3906dcddcd087af989833845b343e",
    "9a66ba180cc1cdec65fd5a5d9811667fecc31d13357c8bab72a8ef2444822210",
]
GOLDEN_STATEMENT = (
    b'{"arithmetic":"cpu-float32","exactness":"exact","family":"deepseek_v4",'
    b'"geometry":"67a9747b7a8c04684fcf04c61dc33a50","group":"","hash_kind":3,"kv_format":"fp8","namespace":"default",'
    b'"num_cards":1,"payload_version":1,"shard":"","tokenizer":"t1","version":2,"weights_revision":"w1"}'
)
GOLDEN_OWNER = "15d1cce7be34834ec610a799b8491445"
GOLDEN_USER = "ac61c6687c0b23c2"
GOLDEN_SEAL_KEY = "c404cd6ecaf4e48b1985f1f86ecbf281916f7a702c85eb06bb0f2776eadc8522"
# Version 1, whose stores must stay readable for ever.
GOLDEN_FINGERPRINT_V1 = "3a32963abd372277d6c3b4c10fb4e0be295298ac5ab5bf410d97ede5eb013a65"
GOLDEN_HASHES_V1 = [
    "0098bec8de3ecbe84a916f826e287caa60e3c4a10e0636072d154246e5db8a5a",
    "bd526ba9fe545b468d8960d26564fbd525db2f131a9dedf77cd743fed5d9f631",
]

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=64)


# The kinds whose names are made from tokens.
KINDS = (HashKind.CHAINED_BLAKE2B, HashKind.CHAINED_AES)
kinds = pytest.mark.parametrize("kind", KINDS)


def chain(tokens, key=KEY, digest=FINGERPRINT.digest, block_size=8, kind=HashKind.CHAINED_AES):
    return chain_of(tokens, fingerprint_digest=digest, key=key, block_size=block_size, kind=kind)


def test_names_are_the_golden_bytes():
    named = chain(range(16))
    assert FINGERPRINT.statement == GOLDEN_STATEMENT
    assert FINGERPRINT.digest.hex() == GOLDEN_FINGERPRINT
    assert named.root.hex() == GOLDEN_ROOT
    assert [name.hex() for name in named.hashes] == GOLDEN_HASHES


def test_names_of_kind_1_are_the_golden_bytes():
    digest = dataclasses.replace(FINGERPRINT, hash_kind=HashKind.CHAINED_BLAKE2B).digest
    assert digest.hex() == GOLDEN_FINGERPRINT_KIND_1
    named = chain(range(16), digest=digest, kind=HashKind.CHAINED_BLAKE2B)
    assert [name.hex() for name in named.hashes] == GOLDEN_HASHES_KIND_1


def test_names_of_version_1_are_the_golden_bytes():
    digest = digest_v1(FINGERPRINT)
    assert digest.hex() == GOLDEN_FINGERPRINT_V1
    named = chain(range(16), digest=digest, kind=HashKind.CHAINED_BLAKE2B)
    assert [name.hex() for name in named.hashes] == GOLDEN_HASHES_V1
    # In version 1, `exactness` also named the device that computed the KV.
    card = dataclasses.replace(FINGERPRINT, arithmetic="cuda-bfloat16")
    assert digest_v1(card) == digest_v1(dataclasses.replace(FINGERPRINT, exactness="exact-cuda-bfloat16"))


def test_owners_are_the_golden_bytes():
    keyring = Keyring(b"0123456789abcdef")
    assert keyring.owner("tenant").hex() == GOLDEN_OWNER + "00" * 8
    assert keyring.owner("tenant\x1fann").hex() == GOLDEN_OWNER + GOLDEN_USER
    assert keyring.seal_key(keyring.owner("tenant"), 1).hex() == GOLDEN_SEAL_KEY


@pytest.mark.services
def test_names_do_not_depend_on_the_process():
    code = (
        "from antefix.block import *; from antefix.layout import *;"
        "c = {'num_hidden_layers': 4, 'head_dim': 64, 'index_head_dim': 32, 'sliding_window': 64};"
        "g = KVGeometry.from_config(c);"
        "f = Fingerprint(weights_revision='w1', geometry=g, kv_format=KVFormat.FP8, tokenizer='t1');"
        "k = tenant_key(b'0123456789abcdef', 'tenant');"
        "print(chain_of(range(16), fingerprint_digest=f.digest, key=k, block_size=8).hashes[1].hex())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert out.stdout.strip() == GOLDEN_HASHES[1]


@kinds
@given(tokens=tokens_lists, cuts=st.lists(st.integers(0, 64), max_size=6))
def test_extending_in_pieces_names_the_same_blocks(kind, tokens, cuts):
    pieces = Chain(FINGERPRINT.digest, KEY, 8, kind)
    edges = sorted({0, len(tokens), *(min(cut, len(tokens)) for cut in cuts)})
    for first, stop in itertools.pairwise(edges):
        pieces.extend(tokens[first:stop])
    assert pieces.hashes == chain(tokens, kind=kind).hashes
    assert pieces.num_tokens == len(tokens)


@kinds
@given(tokens=st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24), index=st.integers(0, 23))
def test_a_changed_token_renames_its_block_and_all_later_ones(kind, tokens, index):
    other = list(tokens)
    other[index] ^= 1
    before, after = chain(tokens, kind=kind).hashes, chain(other, kind=kind).hashes
    first = index // 8
    assert before[:first] == after[:first]
    assert all(a != b for a, b in zip(before[first:], after[first:], strict=True))


def test_every_part_of_the_fingerprint_counts():
    changes = {
        "weights_revision": "w2",
        "geometry": dataclasses.replace(GEOMETRY, window=32),
        "kv_format": KVFormat.FLOAT32,
        "tokenizer": "t2",
        "exactness": "bounded-1",
        "namespace": "other",
        "arithmetic": "cuda-bfloat16",
        "family": Family.MLA,
        "num_cards": 2,
        "group": "c128",
        "shard": "0/4",
        "hash_kind": HashKind.CHAINED_BLAKE2B,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Fingerprint)}
    others = [dataclasses.replace(FINGERPRINT, **{name: value}) for name, value in changes.items()]
    assert len({other.digest for other in others} | {FINGERPRINT.digest}) == len(changes) + 1
    assert [differing_fields(FINGERPRINT.statement, other.statement) for other in others] == [(n,) for n in changes]


def test_what_computes_is_part_of_the_name_and_which_card_is_not():
    names = {
        dataclasses.replace(
            FINGERPRINT, exactness=exactness_of(windows), arithmetic=arithmetic_of(device, dtype)
        ).digest
        for windows in (0, 1)
        for device in ("cpu", "cuda")
        for dtype in ("float32", "bfloat16")
    }
    assert len(names) == 8
    assert arithmetic_of("cuda:1", "bfloat16") == arithmetic_of("cuda", "bfloat16")


def test_a_reproducible_worker_on_a_card_never_hits_what_the_fast_kernels_wrote():
    fast, exact = (arithmetic_of("cuda", "bfloat16", reproducible=reproducible) for reproducible in (False, True))
    assert fast != exact
    # On a CPU the setting changes no bits, so names stay the same.
    assert arithmetic_of("cpu", "float32", reproducible=True) == arithmetic_of("cpu", "float32")
    for arithmetic in (fast, exact, CPU_FLOAT32):
        assert check_arithmetic(arithmetic) == arithmetic


@pytest.mark.parametrize(
    "text", ["", "cuda", "cuda-float16", "-float32", "cpu-float32-reproducible", "cuda-bfloat16-x"]
)
def test_an_arithmetic_that_nothing_has_is_refused(text):
    with pytest.raises(InvalidRequest, match="device and a dtype"):
        check_arithmetic(text)


def test_parts_of_the_fingerprint_do_not_run_together():
    one = dataclasses.replace(FINGERPRINT, tokenizer="ab", exactness="c")
    two = dataclasses.replace(FINGERPRINT, tokenizer="a", exactness="bc")
    assert one.digest != two.digest


def test_tenants_never_share_a_name():
    other = tenant_key(b"0123456789abcdef", "another")
    assert not set(chain(range(64)).hashes) & set(chain(range(64), key=other).hashes)


@pytest.mark.parametrize("tokens", [[-1], [2**32], [[1, 2]], [1.5], ["a"], [None]])
def test_what_is_no_token_id_is_refused(tokens):
    with pytest.raises(InvalidRequest):
        as_tokens(tokens)


def test_wider_integers_become_u32_unharmed():
    wide = np.array([0, 1, 2**32 - 1], np.int64)
    assert as_tokens(wide).tolist() == wide.tolist()


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 65])
def test_a_bad_secret_is_refused(secret):
    with pytest.raises(InvalidRequest):
        tenant_key(secret, "tenant")


@given(tokens=st.lists(st.integers(0, 999), min_size=1, max_size=40), place=st.integers(0, 39))
def test_a_digest_names_every_token_and_no_block(tokens, place):
    chain = chain_of(tokens, fingerprint_digest=FINGERPRINT.digest, key=KEY, block_size=8)
    grown = Chain(FINGERPRINT.digest, KEY, 8)
    for token in tokens:
        grown.extend([token])
    assert grown.digest() == chain.digest() and chain.digest() not in chain.hashes
    other = [*tokens]
    other[place % len(tokens)] += 1
    for changed in (other, [*tokens, 1], tokens[:-1]):
        digest = chain_of(changed, fingerprint_digest=FINGERPRINT.digest, key=KEY, block_size=8).digest()
        assert digest != chain.digest()


def _by_the_text(tokens, root, block_size):
    """Names of kind 3 as docs/FORMAT.md describes them, block by block, with the library's CMAC."""

    def key_of(label):
        of = root + block_size.to_bytes(4, "little") + label
        return hashlib.blake2b(of, digest_size=32, key=KEY, person=b"antefix-lanes").digest()

    def aes(label, block):
        return Cipher(algorithms.AES(key_of(label)), modes.ECB()).encryptor().update(block)

    def xor(one, other):
        return bytes(a ^ b for a, b in zip(one, other, strict=True))

    names, states = [], {b"0": bytes(16), b"1": bytes(16)}
    for first in range(0, len(tokens) - block_size + 1, block_size):
        raw = b"".join(token.to_bytes(4, "little") for token in tokens[first : first + block_size])
        mac = CMAC(algorithms.AES(key_of(b"leaf")))
        mac.update(raw)
        leaf = mac.finalize()
        states = {lane: aes(b"c" + lane, xor(state, leaf)) for lane, state in states.items()}
        names.append(b"".join(aes(b"n" + lane, state) for lane, state in states.items()))
    return names


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8, 20, 128])
def test_names_of_kind_3_are_what_the_format_says(block_size):
    tokens = [(7 * number * number) % 2**32 for number in range(3 * block_size + 1)]
    named = chain(tokens, block_size=block_size)
    assert named.hashes == _by_the_text(tokens, root_of(FINGERPRINT.digest, KEY), block_size)


def test_names_of_a_long_prompt_are_those_of_its_parts():
    # The prompt is longer than the part that is hashed at a time.
    tokens = np.arange(128 * 2600, dtype=np.uint32)
    whole, parts = chain(tokens, block_size=128), Chain(FINGERPRINT.digest, KEY, 128)
    for first in range(0, len(tokens), 4000):
        parts.extend(tokens[first : first + 4000])
    assert parts.hashes == whole.hashes and len(set(whole.hashes)) == 2600


@kinds
def test_a_chain_goes_on_from_any_name(kind):
    whole = chain(range(40), kind=kind)
    for known in range(1, 5):
        later = Chain(FINGERPRINT.digest, KEY, 8, kind)
        later.hashes = whole.hashes[known - 1 : known]
        assert later.extend(range(8 * known, 40)) == whole.hashes[known:]


def test_the_size_of_a_block_is_part_of_its_name():
    # A block of 4 tokens must differ from a block of 3 tokens that is padded with a zero.
    assert chain([1, 2, 3, 0], block_size=4).hashes != chain([1, 2, 3], block_size=3).hashes


def test_a_statement_says_how_its_blocks_are_named():
    for kind in HashKind:
        assert hash_kind_of(dataclasses.replace(FINGERPRINT, hash_kind=kind).statement) is kind
    assert hash_kind_of(b"") is FINGERPRINT.hash_kind


def test_an_engines_names_are_not_made_of_tokens():
    with pytest.raises(InvalidRequest, match="engine"):
        Chain(FINGERPRINT.digest, KEY, 8, HashKind.ENGINE_KEY)
