"""Say what became of a command line of the format, and check it as training will."""

from __future__ import annotations

import re

import yaml

from getiaction.config.compose import compose
from getiaction.config.lightning.arguments import Arguments
from getiaction.config.lightning.translate import translate
from getiaction.config.lightning.translation import Translation
from getiaction.config.prepare import find_checked_data
from getiaction.errors import InputError


def print_config(arguments: Arguments) -> None:
    """Show the merged file."""
    print(yaml.safe_dump(arguments.content, sort_keys=False), end="")


def translate_aloud(arguments: Arguments) -> Translation:
    """Translate a command line, say what was changed and left out, and check what came of it.

    Raises:
        InputError: it cannot work; the message names the keys of the file.
    """
    found = translate(arguments)
    for line in found.changed:
        print(f"changed: {line}")
    for line in found.left_out:
        print(f"left out: {line}")
    for line in found.notes:
        print(f"note: {line}")
    try:
        find_checked_data(compose(found.overrides))
    except InputError as error:
        named = [f"{key} is {found.sources[key]}" for key in found.sources if names(str(error), key)]
        more = f"\n       ({', '.join(named)})" if named else ""
        raise InputError(f"{error}{more}") from error
    return found


def names(message: str, key: str) -> bool:
    """Tell whether a message is about a dotted key."""
    return "." in key and re.search(rf"\b{re.escape(key)}\b", message) is not None
