"""The command line of all scripts: flags, one-line error messages and exit statuses."""

import contextlib
import errno
import inspect
import io
import math
import os
import platform
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from support import VERSION

import tyro

# -----------------------------------------------------------------------------
# errors


class CommandError(Exception):
    """Ends a script with one line: the file or flag, what is wrong, what to do.

    Under torchrun, one process of each host prints it; with `this_process_only`, the process that met it.
    """

    def __init__(self, message: str, this_process_only: bool = False):
        super().__init__(message)
        self.this_process_only = this_process_only


class InputError(CommandError, ValueError):
    """Bad input: exit status 2."""


class RunFault(CommandError):
    """A fault while running: exit status 1."""


def in_words(error: BaseException) -> str:
    """The error as readable text: for an OSError, the file and the reason without the error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


REMEDIES = {  # by the name of an OSError's number
    "ENOSPC": "free some disk space",
    "EDQUOT": "free some disk space",  # of the user's quota
    "EFBIG": "allow larger files (ulimit -f), or choose another disk",
    "EMFILE": "allow more open files (ulimit -n)",
    "ENFILE": "end a program that holds many files open",
    "EACCES": "set the permissions, or choose another folder",
    "EPERM": "set the permissions, or choose another folder",
    "EROFS": "choose a folder that can be written to",
    "EIO": "check the disk, or the connection to it",
}


def remedy(error: BaseException | None) -> str | None:
    """What to do about an error of the system, such as a full disk; None for any other error."""
    text = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, written in Rust, names numbers so
    number = int(text[1]) if text else getattr(error, "errno", None)
    return REMEDIES.get(errno.errorcode.get(number or 0, ""))


def with_remedy(error: BaseException) -> str:
    """The error `in_words` and, if there is one, its `remedy`."""
    return "; ".join(filter(None, [in_words(error), remedy(error)]))


def advice(error: BaseException | None) -> str:
    """The `remedy`, or for any other error, words that fit into the same sentence."""
    return remedy(error) or "remove the cause"


def brief(error: BaseException) -> str:
    """The beginning of what the error says; a compiler's goes on for pages."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


# Numbers with bounds, for the fields of a script's flags. Any other number must be at least 0.
PositiveInt = Annotated[int, "positive"]
PositiveFloat = Annotated[float, "positive"]
Share = Annotated[float, "positive", "at most 1"]
Momentum = Annotated[float, "below 1"]
Seed = Annotated[int, "at most 2**64 - 1"]  # what torch takes


def check_numbers(config: Any) -> None:
    """Raises InputError if a number in a dataclass is not finite, or outside the bounds of its type."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if not isinstance(value, int | float):
            continue
        bounds = {bound for part in (hint, *get_args(hint)) for bound in getattr(part, "__metadata__", ())}
        if not (value > 0 if "positive" in bounds else value >= 0):  # written so that nan fails too
            least = "more than" if "positive" in bounds else "at least"
            raise InputError(f"--{name} {value}: must be {least} 0")
        if value == math.inf:
            raise InputError(f"--{name} {value}: must be finite")
        if value > 1 and "at most 1" in bounds:
            raise InputError(f"--{name} {value}: must be at most 1")
        if value >= 1 and "below 1" in bounds:
            raise InputError(f"--{name} {value}: must be below 1")
        if value >= 2**64 and "at most 2**64 - 1" in bounds:
            raise InputError(f"--{name} {value}: must be at most {2**64 - 1}")


# -----------------------------------------------------------------------------
# the command


def run_command(
    main: Callable[[Any], None], config: Any, *, default: Any = None, usual_flag: str = "--help"
) -> None:
    """Parse the command line into `config` (a dataclass, or a union of them: subcommands) and call `main`.

    Bad input ends with one line on standard error and exit status 2; a fault while running (a full disk, no
    permission) with one line and status 1; Ctrl-C with 130. No user error ends in a traceback.

    Args:
        default: an instance whose values replace the dataclass's defaults.
        usual_flag: the flag to suggest for a command line that begins with a bare word.
    """
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text may contain characters that the terminal can't show
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"{Path(sys.argv[0]).name} {VERSION}, Python {platform.python_version()}")
        return
    options = {} if default is None else {"default": default}
    try:
        check_first_word(config, arguments, usual_flag)
        if {"-h", "--help"} & set(arguments):
            print(help_of(config, options))
        else:
            main(parse(config, options))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CommandError, OSError) as error:
        if getattr(error, "this_process_only", True) or speaks_for_host():
            print(f"error: {with_remedy(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def open_standard_streams() -> None:
    """Where a daemon, `pythonw` or `>&-` has left out standard input, output or error, open the null device
    in its place. Otherwise the next file to be opened would get its number, and what a library writes to
    standard error would end up in that file."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the end


def speaks_for_host() -> bool:
    """Whether this process prints what all processes of a host have to say: torchrun's first one, or one
    alone, in whose environment LOCAL_RANK may be left over."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def parse(config: Any, options: dict[str, Any], arguments: list[str] | None = None) -> Any:
    """Parse the command line, or `arguments`, into an instance of `config`."""
    markers = (tyro.conf.DisallowNone,)  # A default may be None; nobody types it.
    with registry:
        return tyro.cli(config, args=arguments, use_underscores=True, config=markers, **options)


def check_first_word(config: Any, arguments: list[str], usual_flag: str) -> None:
    """Raises InputError if the first word is neither a flag nor a subcommand."""
    commands = [command.__name__.lower() for command in get_args(config)]
    word = arguments[0] if arguments else "--"
    if word.startswith("-") or word in commands:
        return
    hint = usual_flag if usual_flag == "--help" else f"{usual_flag} {word}"
    if word in getattr(config, "__dataclass_fields__", ()):
        hint = f"--{word}"
    raise InputError(f"{word!r} can't stand alone; did you mean {hint}?")


def whole_number(text: str) -> int:
    """Parse an integer as people write it: 19073, 524_288, 1e6."""
    try:
        return int(text)
    except ValueError:
        if float(text).is_integer():
            return int(float(text))
        raise ValueError(f"{text!r} is not a whole number") from None


registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def integers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def help_of(config: Any, options: dict[str, Any]) -> str:
    """tyro's --help, with --version and with the headings that stand in the dataclass as "# -- the model".
    Defaults of None are left out, since each flag explains its own."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            parse(config, options)
        except SystemExit as end:
            if end.code:  # an error, not a request for help: `--prompt -h`
                raise
    help = text.getvalue().replace("""'"'"'""", "'")  # an apostrophe quoted for the shell
    help = re.sub(r"\s+\(default:(\s+None)?\s*\)", "", help)
    help = re.sub(r"  -h, --help( .* )show.*exit", r"\g<0>\n  --version \1show the version and exit", help)
    source = "" if isinstance(config, types.UnionType) else inspect.getsource(config)
    for heading, flag in re.findall(r"# -- (.+)\n +(\w+):", source):
        help = re.sub(rf"\n(?=  --{flag}\b)", f"\n\n {heading}\n", help)
    return "\n".join(line.rstrip() for line in help.splitlines())


# -----------------------------------------------------------------------------
# numbers and text, for people


def plural(n: int, noun: str) -> str:
    """1 row, 2 rows, 1 process, 2 processes, 1,000 files."""
    ending = "" if n == 1 else "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """12 days, 13 h 20 min, 11 min, 2 min 33 s, 45 s."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def file_size(n_bytes: float) -> str:
    """1.2 GB, 350 MB; GB and MB are 10**9 and 10**6 bytes, as disks are sold."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{math.ceil(n_bytes / 1e6)} MB"


def printable(text: str) -> str:
    """A model's text for a terminal: line breaks are indented, other white space becomes a space, and
    unprintable characters become U+FFFD."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n    ".join(
        "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in lines
    )
