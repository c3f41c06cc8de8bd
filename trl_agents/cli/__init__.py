# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The command `trl-agents`: play an environment, evaluate players, diagnose a model, read episodes, estimate costs.

Nothing here imports torch before a command needs it, so that help and mistakes answer at once. What a user got wrong
is a `ValueError` or an `OSError`, and becomes one line on stderr and the exit code 2; any other exception is a fault
of ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from .._version import __version__
from ..envs.imported import look_here
from . import diagnose, estimate, evaluate, play, view


COMMANDS = {"play": play, "eval": evaluate, "diagnose": diagnose, "view": view, "estimate": estimate}

EXAMPLES = """\
examples:
  trl-agents play trl_agents/Bandit-v0
  trl-agents eval random ucb outputs/grpo_bandit_tiny
  trl-agents diagnose outputs/grpo_bandit_tiny --output_dir outputs/diagnosis
  trl-agents view outputs/diagnosis --open
  trl-agents estimate recipes/configs/grpo_bandit_qlora.yaml --model Qwen/Qwen2.5-7B --gpu RTX4090

`trl-agents COMMAND --help` tells more, with examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` says (by default that of the command line), and return its exit code."""
    if argv is None:
        look_here()
    args = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `trl-agents ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ntrl-agents: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"trl-agents: error: {one_line(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        said = " ".join(message.split()).rstrip(".")
        self.exit(2, f"{self.prog}: error: {said}. `{self.prog} --help` tells more.\n")


def _note(message: Warning | str, category: type[Warning], *where) -> None:
    """A warning as a user reads it: without the line of ours that gave it, and nothing of what libraries deprecate."""
    if issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        return
    print(f"trl-agents: note: {' '.join(str(message).split())}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """What an exception says, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else error.strerror
    return " ".join(str(error).split())


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; `args.run(args)` runs the command."""
    parser = _Parser(
        prog="trl-agents",
        description="Play text environments, evaluate players and models in them, diagnose models, read episodes, and "
        "estimate what training takes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-agents {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser
