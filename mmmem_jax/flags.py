"""Command-line flags of the binaries: short help, and one line for every mistake.

A binary keeps its flags in a set of its own, so two binaries import side by side and `--help`
shows no library's flags::

    FLAGS = flags.FlagValues()
    CONFIG = flags.define_config("configs/sib_grpo.py", FLAGS)
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=FLAGS)

    def main(argv):
        train(CONFIG.value, WORKDIR.value)

    if __name__ == "__main__":
        flags.run(main, FLAGS, name="main", usage=__doc__)
"""

import difflib
import glob
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

import ml_collections
from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging
from absl.flags import (
    DEFINE_bool,
    DEFINE_enum,
    DEFINE_float,
    DEFINE_integer,
    DEFINE_list,
    DEFINE_string,
    FlagValues,
)
from ml_collections import config_flags

from mmmem_jax.errors import UserError

__all__ = [
    "DEFINE_bool",
    "DEFINE_enum",
    "DEFINE_float",
    "DEFINE_integer",
    "DEFINE_list",
    "DEFINE_string",
    "FlagValues",
    "define_config",
    "log_plainly",
    "run",
]

_CONFIG_FLAG = re.compile(r"--?config(?:=(?P<file>.*))?$", re.DOTALL)
_OVERRIDE = re.compile(r"--?(?:no)?config\.(?P<key>[^=\[]*)")
_HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")


def define_config(default: str | None, flag_values: FlagValues) -> absl_flags.FlagHolder:
    """Defines `--config=FILE[:ARG]` and `--config.KEY=VALUE`.

    Args:
      default: the file (and argument) used where the command line names none, None for no default.
      flag_values: the binary's own set of flags.

    Returns:
      A holder whose `.value` is the locked `ConfigDict` of the file's `get_config(ARG)`, or None
      where neither the command line nor the default names a file.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, FILE or FILE:ARG; --config.KEY=VALUE sets one of its keys.",
        flag_values=flag_values,
    )
    # Set afterwards: given to DEFINE_config_file, it would be read at import.
    flag_values["config"].default = default
    return holder


def run(
    main_fn: Callable[[list[str]], int | None], flag_values: FlagValues, *, name: str, usage: str
) -> None:
    """Parses `sys.argv`, calls `main_fn(argv)` and exits with what it returns.

    A mistake of the user (a bad flag, or a `UserError` from anywhere below) is printed as one
    line on stderr and exits with 2, an interrupt with 130; other exceptions keep their traceback.

    Args:
      main_fn: takes the program name as a list of one, returns None or an exit code.
      flag_values: the binary's flags.
      name: what error lines start with.
      usage: the text of `--help`, above the list of flags.
    """

    def parse(argv: list[str]) -> list[str]:
        if any(arg in _HELP for arg in argv[1:]):
            print(_help(usage, flag_values))
            sys.exit(0)
        absl_flags.FLAGS(argv[:1])  # libraries below read theirs: defaults, marked as parsed
        return _parse(argv, flag_values)

    try:
        app.run(main_fn, flags_parser=parse)
    except UserError as error:
        _exit(f"{name}: {error}", 2)
    except KeyboardInterrupt:
        _exit(f"{name}: interrupted", 130)


def log_plainly() -> None:
    """Shows the package's own progress on stderr as plain lines; libraries report warnings only."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("mmmem_jax")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _exit(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _help(usage: str, flag_values: FlagValues) -> str:
    lines = [usage.strip(), "", "Flags:"]
    for flag_name in flag_values:
        flag = flag_values[flag_name]
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag_name}: {flag.help}{default}")
    return "\n".join(lines)


def _parse(argv: list[str], flag_values: FlagValues) -> list[str]:
    """Parses the flags of `argv` and returns its first element; raises UserError."""
    if "config" in flag_values:
        argv = _config_first(argv, flag_values["config"].default)
        _check_overrides(argv)
        sys.argv[:] = argv  # config_flags looks for overrides there
    try:
        rest = flag_values(argv)
    except absl_flags.UnrecognizedFlagError as error:
        hint = _did_you_mean(error.flagname, flag_values, "--{}", "--help lists the flags")
        raise UserError(f"unknown flag --{error.flagname}; {hint}") from error
    except (absl_flags.Error, ValueError) as error:
        raise UserError(f"{error}; --help explains the flags") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --NAME=VALUE")
    return rest


def _config_first(argv: list[str], default: str | None) -> list[str]:
    """Moves `--config` ahead of its overrides, where config_flags needs it, or adds the default."""
    program, *rest = argv
    others, file = [], default
    args = iter(rest)
    for arg in args:
        if match := _CONFIG_FLAG.match(arg):
            file = match["file"] if match["file"] is not None else next(args, "")
        else:
            others.append(arg)
    return [program, *([] if file is None else [f"--config={file}"]), *others]


def _check_overrides(argv: list[str]) -> None:
    """Raises UserError where an override names a key that the config does not have."""
    keys = [match["key"] for arg in argv if (match := _OVERRIDE.match(arg))]
    file = next((match["file"] for arg in argv if (match := _CONFIG_FLAG.match(arg))), None)
    if file is None:
        if keys:
            raise UserError(f"--config.{keys[0]} needs a config; name one with --config=FILE")
        return
    known = list(_keys(_load(file)))
    for key in keys:
        if key not in known:
            hint = _did_you_mean(key, known, "'{}'", "the file lists its keys")
            raise UserError(f"{file} has no key {key!r}; {hint}")


def _load(file_and_arg: str) -> ml_collections.ConfigDict:
    """Reads a config as its flag will, to say plainly what is wrong with it."""
    file, colon, arg = file_and_arg.partition(":")
    if not os.path.isfile(file):
        others = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(file)), "*.py")))
        hint = _did_you_mean(file, others, "{}", "give the path of a config file")
        raise UserError(f"no config file {file!r}; {hint}")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {file!r} must be a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{file} defines no get_config(); it must return a ConfigDict")
        config = module.get_config(*([arg] if colon else []))
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"cannot read config {file_and_arg}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{file}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all keys, sections included."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _did_you_mean(word: str, known: Iterable[str], form: str, otherwise: str) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {form.format(nearest[0])}?" if nearest else otherwise
