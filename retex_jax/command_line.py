"""Experiment files and the command line that overrides them; used by the programs only."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from retex_jax import files
from retex_jax.preemption import Preempted

flags.disclaim_key_flags()  # so that --help of a program shows the flags that are defined here


def as_dict(config: Any) -> Any:
    """A ConfigDict (or a part of one) as plain JSON-like values."""
    if isinstance(config, ml_collections.ConfigDict | dict):
        return {key: as_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [as_dict(value) for value in config]
    return config


def fingerprint(value: Any) -> str:
    """Eight hexadecimal digits that identify a JSON-like value."""
    return files.json_hash(value)[:8]


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE.py, with every entry overridable as --config.PATH=VALUE."""
    return config_flags.DEFINE_config_file(
        "config", help_string="experiment file, such as configs/demo.py; --config.x.y=V overrides"
    )


def define_dry_run() -> flags.FlagHolder:
    """Defines --dry_run."""
    return flags.DEFINE_bool("dry_run", False, "only check what is missing; downloads nothing")


def end_dry_run(
    problems: Sequence[str], downloads: Sequence[str], takes: Sequence[str]
) -> NoReturn:
    """Prints what keeps a program from running, what it downloads, and what it takes; exits.

    Args:
      problems: exit code 1 if there are any, else 0.
      downloads: what the program itself gets.
      takes: further lines.
    """
    lacks = [*problems, *downloads] or ["everything that this experiment needs is here"]
    print("\n".join([*lacks, *takes]))
    sys.exit(1 if problems else 0)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turns what the user can mend into one clear line, and ends the program; see `run` for its exit codes."""
    try:
        yield
    except Preempted as error:
        print(f"SIGTERM: {error.message}; the same command goes on from there", file=sys.stderr)
        raise
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        _stop(str(error))


def run(main: Callable[[], None], required: str) -> None:
    """Parses the command line, runs `main`, and turns what the user can mend into one clear line.

    Exit codes: 2 for an error, 75 where a SIGTERM has ended what can be resumed.

    Args:
      main: the program; it reads its flags itself.
      required: the flag that must be given.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (
            AttributeError,
            ImportError,
            KeyError,
            OSError,
            TypeError,
            ValueError,
            flags.Error,
        ) as error:
            reason = str(error).replace("\\'", "").replace("\\n", ". ")
            _stop(f"command line {' '.join(argv[1:])}: {reason}")
        if rest[1:]:
            _stop(f"arguments that are no flags: {rest[1:]}")
        value = flags.FLAGS[required].value
        if not value and not _wants_help():
            _stop(f"--{required} is missing; see --help")
        if required == "config" and value and not isinstance(value, ml_collections.ConfigDict):
            _stop(f"--config: no readable experiment file: {sys.argv[1:]}")
        return rest

    def call(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        with clear_errors():
            main()

    app.run(call, flags_parser=parse)


def _wants_help() -> bool:
    return any(flags.FLAGS[name].value for name in ("help", "helpfull", "helpshort"))


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
