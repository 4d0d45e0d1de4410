"""Read a command line of the format: files, and keys as `--model.init_args.horizon 16` or `--model.horizon=16`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
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
    found, merged = Arguments(), DictConfig({})
    left = list(given)
    while left:
        option = left.pop(0)
        if not option.startswith("--"):
            raise InputError(f"{option} is no option: files come with --config {option}, keys with --model.horizon 16")
        name, equals, value = option[2:].partition("=")
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
            content = OmegaConf.create(nest(full_name(name), read_value(name, value)))
        merged.merge_with(content)
    found.content = plain(merged)
    return found


def read_file(path: Path) -> DictConfig:
    """Read a YAML file; `null` sections count as empty.

    Raises:
        InputError: it is not there, or no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"--config {path} does not exist")
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"--config {path} must hold model:, data: and trainer:")
    for section in list(content):
        if content[section] is None:
            del content[section]
    if isinstance(content.get("model"), str):
        content["model"] = {"class_path": content["model"]}
    return content


def read_value(name: str, value: str) -> Any:
    """Read a value as YAML does; 5e-4 is a number.

    Raises:
        InputError: it is no YAML.
    """
    try:
        return OmegaConf.from_dotlist([f"value={value}"])["value"]
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


def plain(content: Any) -> dict[str, Any]:
    """Return a merged config as plain data, with the keys that leave out `init_args` in their place."""
    merged: dict[str, Any] = OmegaConf.to_container(content, resolve=False)  # type: ignore[assignment]
    for section in NESTED:
        found = merged.get(section)
        if isinstance(found, dict):
            short = {key: found.pop(key) for key in list(found) if key not in ("class_path", "init_args")}
            found["init_args"] = {**short, **(found.get("init_args") or {})}
    return merged
