"""The `moekern` command: runs the sub-commands and turns user errors into one line.

A sub-command is a module with `add_parser(subparsers)`. It sets `run=function` as a default of its parser, where
`function(args) -> int` returns the exit code. To add a command, add its module to COMMANDS.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from moekern import __version__
from moekern.backends.cuda.build.errors import KernelError

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

COMMANDS = ("moekern.cli.demo", "moekern.cli.doctor", "moekern.cli.bench", "moekern.cli.compile")

USAGE_ERROR = 2
INTERRUPTED = 130

EXAMPLES = """\
examples:
  moekern doctor                       what can this machine run, and does it compute correctly?
  moekern demo                         train a dense model and an MoE model on the same text, then compare them
  moekern demo --text ~/novels         the same on your own text
  moekern bench                        how fast is the layer here, and how far from the limit of the hardware?
  moekern COMMAND --help               options and more examples of one command

MOEKERN_DEBUG=1 prints the traceback of an error. The same program starts with: python -m moekern
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage text in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples and adds the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS):
            return f"{text} (default: %(default)s)"
        return text


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moekern",
        description="Mixture-of-Experts layers for PyTorch at the speed of the hardware.",
        epilog=EXAMPLES,
        formatter_class=HelpFormat,
    )
    parser.add_argument("--version", action="version", version=f"moekern {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name in COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def complaint(command: str, message: str) -> str:
    return f"moekern {command}: error: {message}\n"


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; an OSError reads 'No such file or directory: path'."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def open_closed_streams() -> None:
    """Open a stream that the caller closed (`>&-`) on the null device.

    Python has None for it, as in a program without a console, and the next file would get its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until the process ends


def discard_output() -> None:
    """Drop the text that stdout still holds and cannot write: the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process.

    Returns the exit code: 0 for success, 1 for problems found, 2 for bad input.
    """
    open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return USAGE_ERROR
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.exit(USAGE_ERROR, complaint(args.command, f"unknown arguments: {' '.join(unknown)}"))
    try:
        result: int = args.run(args)
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # `moekern doctor | head`: the reader is gone; an error message would reach nobody
        discard_output()
        return 0
    except (ValueError, TypeError, OSError, KernelError) as error:
        if os.environ.get("MOEKERN_DEBUG"):
            raise
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            discard_output()
        sys.stderr.write(complaint(args.command, one_line(error)))
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"\nmoekern {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
