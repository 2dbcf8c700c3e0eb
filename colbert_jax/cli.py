"""What all programs share: flags, one clear sentence for a user's error, exit status 2."""

import difflib
import itertools
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from colbert_jax.errors import Interrupted, UserError, printable
from colbert_jax.xla_flags import find_platform, set_flags

LONGEST_MESSAGE = 1000  # characters
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command will do later
LOST_HOST_STATUS = 69  # EX_UNAVAILABLE


def run_program(main: Callable[[], None], required: Sequence[str] = ()) -> None:
    """Parses the flags and runs `main`.

    Args:
      main: the program; reads its flags itself.
      required: names of flags that must be given.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse_flags(argv, required)
        except UserError as error:
            _fail(error)

    def guarded(argv: list[str]) -> None:
        del argv
        show_log()
        set_flags(find_platform())  # before `main` touches a device
        try:
            main()
        except UserError as error:
            _fail(error)
        except Interrupted as notice:
            print(printable(str(notice)), file=sys.stderr)
            sys.exit(INTERRUPTED_STATUS)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            from colbert_jax.sharding import lost_host  # here: who has mistyped needs no JAX

            if lost := lost_host(error):
                _end_alone(lost)
            raise

    app.run(guarded, flags_parser=parse)


def show_log() -> None:
    """Shows this project's log lines plainly, and of other libraries the warnings only."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("colbert_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(error: UserError) -> NoReturn:
    print(printable(f"error: {error}"), file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)


def _end_alone(lost: str) -> NoReturn:
    message = (
        f"error: another host of this run is gone ({' '.join(lost.split())[:300]}): end those that "
        "are left, and start the same command on all again, to go on from the newest checkpoint."
    )
    print(printable(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: JAX would first wait for the other host, 100 seconds long, and then abort.
    os._exit(LOST_HOST_STATUS)


def _parse_flags(argv: list[str], required: Sequence[str]) -> list[str]:
    _check_overrides(argv, required)
    rest = _parse(argv)
    for name in required:
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing: see {argv[0]} --help.")
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag: flags are written --name=value.")
    return rest


def _check_overrides(argv: list[str], required: Sequence[str]) -> None:
    """Checks the keys of `--config.KEY=VALUE` against the config file named in `--config=FILE`.

    The flag library would refuse an unknown key too, but only with a traceback.
    """
    matches = [re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv]
    keys = [match.group(1) for match in matches if match]
    files = [a.partition("=")[2] for a in argv if re.match(r"--?config=", a)]
    files += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
    if not files:
        if keys and "config" in required:
            raise UserError(f"--config is missing: see {argv[0]} --help.")
        return
    given, (file, _, argument) = _one_line(files[-1]), files[-1].partition(":")
    if not _is_file(file):
        raise UserError(
            f"--config={given}: there is no file {_one_line(file)}; configs/ holds some."
        )
    try:
        get_config = runpy.run_path(file)["get_config"]
        config = get_config(argument) if argument else get_config()
    except Exception as error:
        raise UserError(
            f"--config={given}: its get_config() fails ({type(error).__name__}: "
            f"{_one_line(error)})."
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={given}: its get_config() returns no ConfigDict, but a "
            f"{type(config).__name__}."
        )
    check_keys(config, keys)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte: nothing has such a name
        return False


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{_one_line(error)}.") from error
    except OSError as error:
        raise UserError(f"the config cannot be loaded: {_one_line(error)}.") from error
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"an override does not fit the config: {_one_line(error)}.") from error
    except (RecursionError, MemoryError) as error:  # as Python's parser calls brackets in brackets
        raise UserError("an override is nested too deeply: write a plain value.") from error


def check_keys(config: ConfigDict, keys: Sequence[str]) -> None:
    """Checks that overrides name keys that a config has.

    Args:
      config: the config as its file makes it.
      keys: dotted names, such as "optimizer.learning_rate".

    Raises:
      UserError: naming the first unknown key and the nearest real one.
    """
    names = leaf_names(config)
    for key in keys:
        if key in names:
            continue
        # Initials (`lr`), then the whole name, then its last part alone in whatever section.
        last = {name.rsplit(".", 1)[-1]: name for name in names}
        wanted = key.rsplit(".", 1)[-1]
        near = [name for n, name in last.items() if wanted == "".join(w[:1] for w in n.split("_"))]
        near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        near = near or [last[n] for n in difflib.get_close_matches(wanted, last, n=1, cutoff=0)]
        raise UserError(
            f"--config.{_one_line(key)}: the config has no such key; the nearest is "
            f"--config.{near[0]}."
        )


def leaf_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of a config's values."""
    names = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            names += leaf_names(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def _one_line(error: Exception | str) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2  # what is wrong stands at the end, behind the flag as it was given
    return f"{text[:half]} ... {text[-half:]}"
