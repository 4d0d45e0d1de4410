"""Write overrides as Hydra reads them, and as a shell passes them on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def quote(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(quote(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{quote(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float):
        return str(value)
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value) and is_word(value):
        return value
    text = re.sub(r"(\\*)'", r"\1\1\\'", value)  # only backslashes before a quote, or at the end, escape
    return f"'{re.sub(r'(\\+)$', r'\1\1', text)}'"


def is_word(value: str) -> bool:
    """Tell whether a text without quotes stays a text: null, true and nan do not."""
    return isinstance(OmegaConf.from_dotlist([f"value={value}"])["value"], str)


def key_of(override: str) -> str:
    """Return the key of an override, without the signs that add or remove one."""
    return override.split("=", 1)[0].lstrip("+~")


def command_for(module: str, arguments: list[str], folder: Path) -> str:
    """Return the command that goes on in `folder`, for a shell: what was typed, and where it landed."""
    typed = [argument for argument in arguments if key_of(argument) != "output_dir"]
    return f"{shlex.join(['python', '-m', f'getiaction.{module}', *typed])} {as_override('output_dir', str(folder))}"


def as_override(key: str, value: Any) -> str:
    """Return `key=value` as a shell passes it on."""
    return f"{key}={shlex.quote(quote(value))}"
