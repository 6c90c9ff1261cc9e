"""Tokenize a stream of documents, in threads."""

import contextlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from support.data.documents import Piece
from support.data.encodings import END_OF_TEXT

import numpy as np
import tiktoken

TASK = 250_000  # characters in a thread's task
REMARKS = {
    "null": "null rows skipped",
    "bad": "bad rows skipped",
    "empty": "empty documents (only their <|endoftext|> is written)",
    "replaced": "documents with bytes that are not UTF-8 or with lone surrogates (U+FFFD stands for each)",
    "nul": "documents with NUL characters (kept)",
    "end_of_text": "documents that contain the characters <|endoftext|> (kept as text; see --split_at)",
    "cut": "documents with words too long for the tokenizer (tokenized in parts)",
}
# A piece, its tokens (n,) uint16, and its remarks: keys of REMARKS, with the number of characters or places
Encoded = tuple[Piece, np.ndarray, dict[str, int]]


def encode_stream(stream: Iterable[Piece], encoding: tiktoken.Encoding, workers: int) -> Iterator[Encoded]:
    """Each piece with its tokens and remarks, in input order.

    Threads suffice: tiktoken releases the GIL while it works. At most three tasks per thread are waiting, so
    memory is bounded however large the input.
    """
    with ThreadPoolExecutor(workers) as pool:
        in_flight: deque[Future[list[Encoded]]] = deque()
        try:
            for task in in_tasks(stream):
                in_flight.append(pool.submit(encode_task, encoding, task))
                if len(in_flight) > 3 * workers:
                    yield from in_flight.popleft().result()
            while in_flight:
                yield from in_flight.popleft().result()
        finally:  # the caller may stop early (--max_tokens): drop pending tasks
            pool.shutdown(cancel_futures=True)


def in_tasks(stream: Iterable[Piece]) -> Iterator[list[Piece] | Exception]:
    """Group the pieces into lists of about TASK characters. A fault of the stream comes in its place: what
    was read before it counts, and it does not matter if nobody wants what comes after."""
    task: list[Piece] = []
    characters, fault = 0, None
    try:
        for piece in stream:
            task.append(piece)
            characters += len(piece.text or "") + 1
            if characters >= TASK:
                yield task
                task, characters = [], 0
    except Exception as error:
        fault = error
    if task:
        yield task
    if fault:
        yield fault


def encode_task(encoding: tiktoken.Encoding, pieces: list[Piece] | Exception) -> list[Encoded]:
    """Each piece with its tokens and remarks. One call encodes all pieces if none is special: every call ends
    by waiting for the GIL, which would be too slow for each of so many documents."""
    if isinstance(pieces, Exception):
        raise pieces
    texts = [piece.text for piece in pieces if piece.text and piece.begins and piece.ends]
    if len(texts) == len(pieces):
        joined = "".join(END_OF_TEXT + text for text in texts)
        # a ValueError: tiktoken can't encode a text, or one has END_OF_TEXT in it and counts as two documents
        with contextlib.suppress(ValueError):
            if "\0" in joined:
                raise ValueError
            tokens = encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype(np.uint16)
            documents = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token)[1:])
            return [(piece, tokens, {}) for piece, tokens in zip(pieces, documents, strict=True)]
    return [encode_piece(encoding, piece) for piece in pieces]


def encode_piece(encoding: tiktoken.Encoding, piece: Piece) -> Encoded:
    """A piece with its tokens, after <|endoftext|> if it begins a document, and its remarks."""
    if piece.text is None:
        return piece, np.empty(0, np.uint16), {"bad" if piece.bad else "null": 1}
    text, remarks = piece.text, Counter(cut=int(piece.cuts_word), nul=piece.text.count("\0"))
    remarks["end_of_text"] = text.count(END_OF_TEXT)
    try:
        parts = encode_text(encoding, text)
    except UnicodeEncodeError:  # lone surrogates become U+FFFD, as in tiktoken's encode_ordinary
        remarks["replaced"] = len(re.findall("[\ud800-\udfff]", text))
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts = encode_text(encoding, text)
    remarks["cut"] += len(parts) - 1
    if piece.begins:
        parts.insert(0, np.array([encoding.eot_token], np.uint32))
        remarks["empty"] = int(piece.ends and not text)
    return piece, np.concatenate(parts).astype(np.uint16), dict(+remarks)


def encode_text(encoding: tiktoken.Encoding, text: str) -> list[np.ndarray]:
    """The tokens of a text, in one array; in several if tiktoken can't tokenize it as a whole, because of a
    million characters of exotic white space. Such a text is cut at white space near its middle."""
    try:
        return [encoding.encode_to_numpy(text, disallowed_special=())]
    except UnicodeEncodeError:
        raise
    except ValueError:
        found = re.compile(r"\s").search(text, len(text) // 2)
        middle = found.start() if found else len(text) // 2
        return encode_text(encoding, text[:middle]) + encode_text(encoding, text[middle:])
