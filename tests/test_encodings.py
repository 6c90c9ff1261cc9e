"""GPT-2's tokens, equal to tiktoken's own."""

import gzip
import hashlib
import random

from support.cli import InputError
from support.data import encodings
from support.data.encodings import MERGES, get_encoding, merges

import pytest

TEXTS = {
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],  # the lecture's
    "Hello world": [15496, 995],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],  # as ordinary text
    " don't 123 ": [836, 470, 17031, 220],
}


def test_known_texts_have_their_known_ids():
    encoding = get_encoding("gpt2")
    for text, ids in TEXTS.items():
        assert encoding.encode_ordinary(text) == ids, text
    assert (encoding.n_vocab, encoding.eot_token, encoding.name) == (50257, 50256, "gpt2")
    for i, token in {0: b"!", 220: b" ", 187: b"\xff", 188: b"\x00", 50255: b" gazed"}.items():
        assert encoding.decode_single_token_bytes(i) == token


def test_any_bytes_survive():
    encoding = get_encoding("gpt2")
    random.seed(0)
    for _ in range(50):
        data = random.randbytes(200)
        assert (
            encoding.decode_bytes(encoding.encode(data.decode("latin-1"))) == data.decode("latin-1").encode()
        )


def test_every_id_is_tiktokens(gpt2_data):
    """Against the vocabulary as tiktoken makes it of OpenAI's two files; vocab.bpe is ours to the byte."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = (gpt2_data / "tiktoken").iterdir()
    by_sum = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in files}
    vocab_bpe = by_sum[encodings.MERGES_SHA256]
    encoder_json = by_sum["196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"]
    theirs = data_gym_to_mergeable_bpe_ranks(str(vocab_bpe), str(encoder_json))
    assert get_encoding("gpt2")._mergeable_ranks == theirs
    assert gzip.decompress(MERGES.read_bytes()) == vocab_bpe.read_bytes()
    from tiktoken_ext import openai_public

    assert get_encoding("gpt2")._pat_str == openai_public.r50k_pat_str
    assert get_encoding("gpt2")._special_tokens == {"<|endoftext|>": 50256}


def test_a_damaged_vocabulary_is_named(tmp_path, monkeypatch):
    file = tmp_path / "merges.gz"
    file.write_bytes(gzip.compress(gzip.decompress(MERGES.read_bytes()).replace(b"h e\n", b"e h\n", 1)))
    monkeypatch.setattr(encodings, "MERGES", file)
    merges.cache_clear()
    with pytest.raises(InputError, match=r"merges\.gz: damaged"):
        merges()
    merges.cache_clear()


def test_what_is_refused():
    with pytest.raises(InputError, match="encoding 'cl100k' is unknown; there are 'gpt2' and 'bytes'"):
        get_encoding("cl100k")
    with pytest.raises(InputError, match="the model has 50304 tokens, its encoding 'gpt2' 50257"):
        get_encoding("gpt2", 50304)
    assert get_encoding("bytes", 257).n_vocab == 257
