"""GPT-2's encoding and the byte encoding. Neither needs a download: the vocabulary is beside this file."""

import functools
import gzip
import hashlib
from pathlib import Path

from support.cli import InputError

import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50_257  # 256 bytes + 50,000 merges + <|endoftext|> (GPT-2 paper, section 2.2)
MERGES = Path(__file__).with_name("gpt2_merges.txt.gz")  # OpenAI's vocab.bpe
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # the same as tiktoken's


def get_encoding(name: str, vocab_size: int | None = None) -> tiktoken.Encoding:
    """The encoding called `name`: "gpt2" (50,257 tokens) or "bytes" (256 single bytes and <|endoftext|>).

    Raises InputError for an unknown name, or if a model's `vocab_size` differs from the encoding's.
    """
    makers = {"gpt2": gpt2_encoding, "bytes": bytes_encoding}
    if name not in makers:
        raise InputError(f"encoding {name!r} is unknown; there are 'gpt2' and 'bytes'")
    encoding = makers[name]()
    if vocab_size not in (None, encoding.n_vocab):
        raise InputError(f"the model has {vocab_size} tokens, its encoding {name!r} {encoding.n_vocab}")
    return encoding


@functools.cache
def bytes_encoding() -> tiktoken.Encoding:
    single_bytes = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        "bytes", pat_str="(?s:.)", mergeable_ranks=single_bytes, special_tokens={END_OF_TEXT: 256}
    )


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """The same ids as `tiktoken.get_encoding("gpt2")`, which would download two files."""
    from tiktoken_ext.openai_public import r50k_pat_str  # how text is split before bytes are merged

    byte_of = {letter: byte for byte, letter in letters().items()}
    tokens = [bytes([byte]) for byte in letters()]
    tokens += [bytes(byte_of[letter] for letter in left + right) for left, right in merges()]
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


def letters() -> dict[int, str]:
    """A visible character for each byte, in the order of GPT-2's first 256 ids.

    OpenAI's files write tokens as text: a byte that is a visible Latin-1 character stands for itself; the
    others are mapped to the characters from U+0100 on. So a space is "Ġ".
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@functools.cache
def merges() -> list[tuple[str, str]]:
    """GPT-2's 50,000 merges in order: pairs of strings in the characters of `letters`."""
    text = gzip.decompress(MERGES.read_bytes())
    if hashlib.sha256(text).hexdigest() != MERGES_SHA256:
        raise InputError(f"{MERGES}: damaged; restore it with git checkout")
    pairs = [line.split(" ") for line in text.decode().splitlines()[1:]]  # skip the version line
    return [(left, right) for left, right in pairs]
