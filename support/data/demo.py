"""The demo's data: the documentation text inside the Python installation, as shards of bytes."""

import ast
import pydoc_data.topics
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from support.data.documents import Piece
from support.data.encodings import get_encoding
from support.data.shards import ShardWriter, Stream, new_record, write_shards
from support.files import own_name


def write_demo_shards(output_dir: Path) -> None:
    """Write `standard_library_prose` to `output_dir` in the bytes encoding, unless the folder exists."""
    if output_dir.exists():
        return
    python = f"Python {sys.version.split()[0]}"
    print(f"writing the demo's data, the documentation text inside {python}, to {output_dir}/ (2 MB)")
    temporary = own_name(output_dir)
    temporary.mkdir(parents=True)
    record = new_record(
        get_encoding("bytes"),
        {"dataset": f"prose of {python}'s library"},
        {"shard_size": 200_000, "max_tokens": None},
    )
    texts = enumerate(standard_library_prose())
    documents = Stream(Piece("standard library", i, text) for i, text in texts)
    try:
        write_shards([documents], ShardWriter(temporary, record))
        temporary.rename(output_dir)
    except OSError:
        if not (output_dir / "shards.json").exists():  # otherwise another demo was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def standard_library_prose() -> Iterator[str]:
    """The language reference's topics, then the docstrings of the standard library, read from its source
    files without importing them. About 2.2 million characters."""
    yield from pydoc_data.topics.topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    not_prose = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}
    sources = [path for path in library.rglob("*.py") if not not_prose & set(path.relative_to(library).parts)]
    for source in sorted(sources):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        docstrings = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        if text := "\n\n".join(docstring for docstring in docstrings if docstring):
            yield text
