"""How a user says what to run: TOML file, then command-line overrides, with ``--help`` from the field docs.

``parse(RunConfig, argv)`` takes ``[CONFIG.toml] [--section.key value ...]``; ``main(job)`` runs a job and turns a
user's mistake into one line on stderr and an exit code. Parsing, merging and help are pydantic-settings'.
"""

import difflib
import errno
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from sparktrain.errors import ConfigError, LaunchError, SparktrainError
from sparktrain.redaction import hidden

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

Config = TypeVar("Config", bound=BaseModel)


def parse(model: type[Config], argv: Sequence[str], base: Mapping[str, Any] | None = None) -> Config:
    """The settings in ``argv``: an optional TOML file first, unless there is a ``base``, then ``--section.key value``
    overrides.

    Raises :class:`ConfigError` with one line naming the file or flag, the key, and what was expected.
    """
    file = argv[0] if argv and not argv[0].startswith("-") and base is None else None
    flags = [_kebab(word) for word in (argv[1:] if file else argv)]
    values = _read_toml(Path(file), model) if file else base or {}
    settings = type(
        model.__name__,
        (BaseSettings, model),
        {
            "model_config": SettingsConfigDict(
                case_sensitive=True,
                nested_model_default_partial_update=True,
                cli_avoid_json=True,
                cli_exit_on_error=False,
                cli_hide_none_type=True,
                cli_implicit_flags=True,
                cli_kebab_case=True,
                cli_prog_name=f"{Path(sys.argv[0]).name} [CONFIG.toml] [--debug]",
            ),
            "settings_customise_sources": classmethod(_file_only),
            "__doc__": model.__doc__,
            "__module__": model.__module__,
        },
    )
    try:
        parsed: BaseModel = CliApp.run(settings, cli_args=flags, **values)
    except ValidationError as error:
        raise ConfigError(
            _first_line(error, model, "command line" if not file else f"{file} and command line")
        ) from None
    except SettingsError as error:
        raise ConfigError(_unrecognized(str(error), model)) from None
    return model.model_validate(parsed.model_dump())


def main(job: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run ``job(argv)`` and exit: with 0, or with one line on stderr and the error's code for a user's mistake.

    ``--debug`` anywhere in ``argv``, or ``SPARKTRAIN_DEBUG=1`` in the environment, shows the traceback of those, too.
    """
    code, words = 0, sys.argv[1:] if argv is None else argv
    debug = "--debug" in words or bool(os.environ.get("SPARKTRAIN_DEBUG"))
    try:
        job([word for word in words if word != "--debug"])
    except SparktrainError as error:
        if debug:
            raise
        print(f"error: {hidden(' '.join(str(error).split()))}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        remote = "://" in where
        if (error.errno not in _DISK and not remote) or debug:
            raise
        mend = "check its address and credentials" if remote else "make room or mend the file system"
        print(f"error: {error.strerror}{where}: {mend}, then run it again", file=sys.stderr)
        code = LaunchError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _file_only(cls: Any, /, settings_cls: Any, init_settings: Any, **others: Any) -> tuple[Any, ...]:
    """Besides the command line: a variable of the environment that happens to be called ``data`` is no setting."""
    return (init_settings,)


def _read_toml(file: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The file's values, checked strictly: a quoted number is a mistake in a file, though not on a command line."""
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise ConfigError(f"config file {file} {what}: give the path of a TOML file, such as conf/quickstart.toml")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply: expected sections of settings") from None
    try:
        text = json.dumps(values, default=str)
        if r"\u0000" in text.replace(r"\\", ""):
            raise ConfigError(f"{file} has a NUL character in a value: take it out")
        model.model_validate_json(text, strict=True)
    except ValidationError as error:
        # Keys may still come from the command line, and rules over several keys are checked once all are known.
        wrong = [e for e in error.errors() if e["type"] not in ("missing", "value_error")]
        if wrong:
            raise ConfigError(_describe(wrong[0], model, str(file))) from None
    return values


def _kebab(word: str) -> str:
    """``--data.sequence_length`` as the file spells it and ``--data.sequence-length`` are the same flag."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _first_line(error: ValidationError, model: type[BaseModel], where: str) -> str:
    return _describe(error.errors()[0], model, where)


def _describe(error: Any, model: type[BaseModel], where: str) -> str:
    """One line for one pydantic error: file, key, what was wrong, what was found, what to do."""
    kind, location = error["type"], [part for part in error["loc"] if isinstance(part, str)]  # no places in lists
    known = _keys(model, lists=True)
    # A tagged union puts its tag into the location (strategy.distro.lr); the user never wrote it.
    key = ".".join(location)
    if key not in known and len(location) > 2 and ".".join(location[:2]) not in known:
        key = ".".join(location[:1] + location[2:])
    if kind == "extra_forbidden":
        return f"{where}: unknown key {key}{_did_you_mean(key, known)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    found = "" if kind == "missing" else f", found {error['input']!r}"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}{found}; see --help"


def _unrecognized(message: str, model: type[BaseModel]) -> str:
    flag = re.search(r"unrecognized arguments: (\S+)", message)
    if not flag:
        return f"command line: {message.removeprefix('error parsing CLI: ')}; see --help"
    name = flag.group(1).split("=")[0].lstrip("-").replace("-", "_")
    if name.lower() in ("true", "false"):
        return "command line: a switch takes no value: write --section.key for true and --no-section.key for false"
    if name.endswith(".toml"):
        return f"command line: the config file {name} must come first"
    return f"command line: unknown option --{name}{_did_you_mean(name, _keys(model), '--')}"


def _did_you_mean(key: str, known: list[str], prefix: str = "") -> str:
    names = {k.rpartition(".")[2]: k for k in reversed(known)}
    name = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [names[n] for n in difflib.get_close_matches(name, names, n=1)]
    return f": did you mean {prefix}{near[0]}?" if near else "; see --help for all keys"


def _keys(model: type[BaseModel], prefix: str = "", lists: bool = False) -> list[str]:
    """Every dotted key of a settings tree; a union of sections counts as the sum of its members. A list of sections is
    one key, as its sections are written whole; with ``lists``, the keys of these, too."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        is_list = get_origin(field.annotation) is tuple
        members = [field.annotation, *(get_args(field.annotation) if lists or not is_list else ())]
        sections = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        for section in sections:
            keys += _keys(section, f"{prefix}{name}.", lists)
        if is_list or not sections:
            keys.append(prefix + name)
    return keys
