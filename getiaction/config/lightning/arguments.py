"""Read a command line of the format: files, and keys as `--model.init_args.horizon 16` or `--model.horizon=16`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from getiaction.errors import InputError

NESTED = ("model", "data")  # sections whose keys may leave out `init_args`
FLAGS = ("print_config", "strict")


@dataclass
class Arguments:
    """Hold what a command line says.

    Args:
        content: the merged files and keys: `model`, `data`, `trainer`, ...
        files: the files, in their order.
        print_config: show the merged content and do nothing else.
        strict: refuse a file that contradicts itself instead of mending it.
    """

    content: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    print_config: bool = False
    strict: bool = False


def read_arguments(given: list[str]) -> Arguments:
    """Read a command line from left to right; what comes later wins.

    Raises:
        InputError: a file that cannot be read, a key without a value, or no option at all.
    """
    found = Arguments()
    left = list(given)
    while left:
        option = left.pop(0)
        if not option.startswith("--") and option != "-c":
            raise InputError(f"{option} is no option: files come with --config {option}, keys with --model.horizon 16")
        name, equals, value = option.lstrip("-").partition("=")
        if name in FLAGS and not equals:
            setattr(found, name, True)
            continue
        if not equals:
            if not left:
                raise InputError(f"--{name} needs a value")
            value = left.pop(0)
        if name in ("config", "c"):
            found.files.append(Path(value))
            content = read_file(Path(value))
        else:
            content = nest(full_name(name), read_value(name, value))
        merge(found.content, content)
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file; empty sections are left out, and keys without `init_args` brought there.

    Raises:
        InputError: it is not there, or no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"--config {path} does not exist")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path} must hold model:, data: and trainer:")
    sections = {str(name): section for name, section in content.items() if section is not None}
    for name in NESTED:
        if name in sections:
            sections[name] = with_init_args(name, sections[name])
    for name in ("trainer", "getiaction"):
        if not isinstance(sections.get(name, {}), dict):
            raise InputError(f"--config {path}: {name}={sections[name]} must hold keys")
    return sections


def with_init_args(name: str, section: Any) -> dict[str, Any]:
    """Return a section as `class_path` and `init_args`, however short it was written.

    Raises:
        InputError: it is neither.
    """
    if isinstance(section, str):
        return {"class_path": section}
    if not isinstance(section, dict) or not isinstance(section.get("init_args") or {}, dict):
        raise InputError(f"{name}={section} must be class_path: and init_args:")
    short = {key: value for key, value in section.items() if key not in ("class_path", "init_args")}
    path = {"class_path": section["class_path"]} if "class_path" in section else {}
    return {**path, "init_args": {**short, **(section.get("init_args") or {})}}


def merge(content: dict[str, Any], later: dict[str, Any]) -> None:
    """Bring what comes later into `content`: mappings key by key, anything else whole."""
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            merge(content[key], value)
        else:
            content[key] = value


def read_value(name: str, value: str) -> Any:
    """Read a value as YAML does; 5e-4 is a number.

    Raises:
        InputError: it is no YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)["value"]  # type: ignore
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"--{name} {value} cannot be read: lists are [1,2], words need no quotes") from error


def nest(name: str, value: Any) -> dict[str, Any]:
    """Return a dotted key as nested dictionaries; the names of observations keep their dots."""
    head, mark, observation = name.partition(".delta_timestamps.")
    parts = [*head.split("."), "delta_timestamps", observation] if mark else head.split(".")
    for part in reversed(parts):
        value = {part: value}
    return value


def full_name(name: str) -> str:
    """Return a key with its `init_args`: model.horizon -> model.init_args.horizon; `--model X` is its class."""
    section, _, rest = name.partition(".")
    if section not in NESTED:
        return name
    if not rest:
        return f"{section}.class_path"
    return name if rest.split(".")[0] in ("class_path", "init_args") else f"{section}.init_args.{rest}"
