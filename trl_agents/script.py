# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a recipe's script begins and ends: its arguments from YAML and command line, what Ctrl-C and mistakes say."""

from __future__ import annotations

import argparse
import copy
import functools
import linecache
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import PartialState

from ._trl import TrlParser
from .checkpoints import NotWritten, last_checkpoint
from .envs.imported import look_here
from .envs.names import check_model_source, close_to
from .launch import check_processes, only_cpus
from .stages import what_is_kept


# Told between libraries about TRL's and transformers' defaults: who runs a recipe can do nothing about them
NOT_FOR_USERS = {
    ".*gradient_checkpointing.* is deprecated": FutureWarning,
    "'pin_memory' argument is set as true but no accelerator": UserWarning,
}


def parse_arguments(default_config: str | Path, *dataclass_types: type) -> tuple[Any, ...]:
    """
    A script's arguments, from `--config` and the command line. Without `--config` it is `default_config`, so that a
    recipe runs without any. What they name, such as `--env_id my_module:MyEnvironment`, may be in the current folder.

    Args:
        default_config (`str` or `Path`):
            YAML file.
        *dataclass_types (`type`):
            What the arguments become, as for [`~trl.TrlParser`]: one instance each is returned.
    """
    look_here()
    arguments = []
    for argument in sys.argv[1:]:  # TRL's parser knows no `--config=FILE`
        arguments += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if "--config" not in arguments:
        arguments += ["--config", str(default_config)]
    config = _named_config(arguments)
    parser = _Parser(default_config, dataclass_types)
    if only_cpus():
        parser.set_defaults_with_config(use_cpu=True)  # else each process would train alone
    try:
        parsed = parser.parse(arguments)
        for instance in parsed:
            check_choices(instance)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {config}: this is no YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{error}{_of_another_recipe(config)}") from error
    check_processes()
    for instance in parsed:
        if source := getattr(instance, "model_name_or_path", None):
            check_model_source(source)
    return parsed


class _Parser(TrlParser):
    """TRL's, whose mistakes are a line each, and not below a thousand lines of all arguments there are."""

    def __init__(self, default_config: str | Path, dataclass_types: tuple[type, ...]):
        super().__init__(dataclass_types, usage="%(prog)s [--config FILE] [--ARGUMENT VALUE ...]")
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,  # it is read before, and becomes no argument
            help=f"YAML of arguments; those of the command line come before it. (default: {default_config})",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, arguments: list[str]) -> tuple[Any, ...]:
        *parsed, of_config, typed = self.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        for strings, place in ((of_config, "the YAML"), (typed, "the command line")):
            if strings:
                name = strings[0].partition("=")[0]
                known = [option for option in self._option_string_actions if option.startswith("--")]
                raise ValueError(f"{place} has an unknown argument, {name}.{close_to(name, known)}")
        return tuple(parsed)


def _named_config(arguments: list[str]) -> Path:
    """The file behind `--config`; raises `ValueError` if there is none."""
    named = arguments[arguments.index("--config") + 1 :]
    if not named or named[0].startswith("--"):
        raise ValueError("--config is not followed by a file: name a YAML of arguments.")
    config = Path(named[0])
    if not config.is_file():
        files = [str(path) for path in config.parent.glob("*.yaml")]
        raise ValueError(f"--config {config}: there is no such file.{close_to(str(config), files)}")
    return config


def _of_another_recipe(config: Path) -> str:
    """What explains an error where `config` begins with the name of another script in this one's folder."""
    script = Path(sys.argv[0])
    recipes = [path.stem for path in script.parent.glob("*.py") if config.stem.startswith(path.stem)]
    recipe = max(recipes, key=len, default=script.stem)
    return f" ({config.name} is a file of {recipe}.py, and this is {script.name}.)" if recipe != script.stem else ""


def run(main: Callable[..., None], default_config: str | Path, *dataclass_types: type) -> None:
    """
    Run a recipe's script: `main`, with the arguments of [`parse_arguments`]. Ctrl-C and a user's mistake end it with
    one line on stderr; any other exception keeps its traceback.

    Args:
        main (`Callable`):
            What the script does with its arguments.
        default_config, dataclass_types:
            As for [`parse_arguments`].
    """
    for message, category in NOT_FOR_USERS.items():
        warnings.filterwarnings("ignore", message, category)
    output_dir = None
    try:
        parsed = parse_arguments(default_config, *dataclass_types)
        output_dir = next(each.output_dir for each in parsed if hasattr(each, "output_dir"))
        main(*parsed)
        _let_gloo_go()
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"\nInterrupted. {_how_to_go_on(output_dir)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, NotWritten, ImportError) as error:
        parsing = output_dir is None and not isinstance(error, ImportError)
        if not parsing and not _is_ours(error, main):
            raise
        told = f"{error}{_where_from(error, default_config)}"
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(told.split())}", file=sys.stderr)
        sys.exit(2)


def _where_from(error: Exception, default_config: str | Path) -> str:
    """Who names an environment of their own has not seen the arguments that the recipe's YAML has for another."""
    typed = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if "does not take env_kwargs=" not in str(error) or typed & {"--env_kwargs", "--config"}:
        return ""
    return f" They come from {default_config}: `--env_kwargs '{{}}'` does without."


def _let_gloo_go() -> None:
    """
    Gloo's threads that still hold a tensor when Python goes down abort the process ("terminate called without an
    active exception", pytorch#179291), and a run that was at its end counts as failed: a moment, and they let go.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        time.sleep(0.5)


def _how_to_go_on(output_dir: str | None) -> str:
    kept = what_is_kept(output_dir) if output_dir is not None else []
    if not kept:
        return "There is nothing yet to go on from: the same command begins anew."
    resume = " with --resume_from_checkpoint true" if last_checkpoint(output_dir) else ""
    return f"{str(output_dir)!r} keeps {', '.join(kept)}: the same command{resume} goes on from there."


def _is_ours(error: Exception, main: Callable[..., None]) -> bool:
    """Whether a `raise` of this package or the script made it: what others raise in the middle may be our fault."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    here = file == main.__code__.co_filename or Path(file).is_relative_to(Path(__file__).parent)
    return here and linecache.getline(file, line).lstrip().startswith("raise ")


def argument(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of arguments, with its help text; a list or dict is copied for each instance."""
    metadata = {"help": text, **metadata}
    if isinstance(default, (list, dict)):
        return field(default_factory=functools.partial(copy.copy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(arguments: Any) -> None:
    """
    Raises `ValueError` for what is none of a field's choices. The parser holds the command line to them, but not a
    YAML, whose values it takes for defaults.
    """
    for each in fields(arguments):
        value, choices = getattr(arguments, each.name), each.metadata.get("choices")
        if isinstance(value, str) and isinstance(default_of(each), list):
            raise ValueError(f"{each.name}={value!r}: give a list, [{value}].")
        if choices is None or value is None:
            continue
        if unknown := [one for one in (value if isinstance(value, list) else [value]) if one not in choices]:
            raise ValueError(f"{each.name}={value!r}: {unknown[0]!r} is unknown, choose from {', '.join(choices)}.")


def default_of(each: Field) -> Any:
    """The default of a dataclass's field, also where it is made anew for each instance."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def check_positive(arguments: Any, *names: str) -> None:
    """Raises `ValueError` for what is not above 0 where it must be; None is for the recipe to fill in."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r}: give more than 0.")
