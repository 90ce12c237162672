"""Removal of local paths from published files: of an absolute or relative path, only the last component is kept.

Paths are found in three ways: values that are entirely a path, which may contain spaces; the words of a command; and
in other texts, such as a note of a report, the same paths again and anything else that looks like one.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# Keys of reports, configurations and recipes whose values are paths or Hub names.
PATH_KEYS = {
    "path", "data", "name", "file", "source", "model", "dense", "eval_data", "sensitivity", "plan", "recipe", "output",
    "tensorboard",
}  # fmt: skip
COMMAND, UNREADABLE = "command", "unreadable"
_END = r"\s'\"`<>|,;()\[\]{}"
_PART = rf"[^/\\{_END}]"
_START = r"(?<![\w.~/\\@-])"
_BEFORE = rf"(?:{_START}|(?<=\W-[A-Za-z])|(?<=^-[A-Za-z]))"
# "/home/me/x", also after a short option (-o/home/me/x) or as file:///home/me/x; "~/x", "~me/x"; "../x", "./x".
_POSIX = rf"{_BEFORE}(?:file:/+|/(?!/))(?:{_PART}+/)+{_PART}*"
_HOME = rf"{_START}~(?:[A-Za-z_][\w.-]*)?/(?:{_PART}+/)*{_PART}*"
_DOTS = rf"{_START}(?:\.\.?[/\\])+(?:{_PART}+[/\\])*{_PART}*"
_WINDOWS = rf"(?<!\w)[A-Za-z]:[\\/](?:{_PART}+[/\\])*{_PART}*"
_SHARE = rf"(?<![\w\\])\\\\(?:{_PART}+\\)+{_PART}*"
_ANY = re.compile("|".join((_POSIX, _HOME, _DOTS, _WINDOWS, _SHARE)))
_ADDRESS = re.compile(r"(?:https?|hf)://", re.IGNORECASE)
# A home folder has the name of its user.
_USER = re.compile(
    r"(?:/home/[^/:]+|/Users/[^/:]+|/root|[A-Za-z]:[\\/]Users[\\/][^/\\:]+|~[^/\\:]*)(?P<rest>:[^/\\]*)?"
)
_OPTION = re.compile(r"(?P<option>--[\w-]+=|-[A-Za-z]=?)(?P<value>.+)", re.DOTALL)
_SETTING = re.compile(r"(?P<key>[A-Za-z_][\w.-]*=)(?P<value>.+)", re.DOTALL)


def last_component(path: str) -> str:
    """Return the last component of a path of any system: "images:train" of "/home/me/images:train".

    The home folder becomes "~", the working directory ".", and the folder of temporary files "tmp".
    """
    stripped = re.sub(r"\Afile:/+", "/", path).rstrip("/\\")
    for root, name in _roots().items():
        if stripped == root or (stripped.startswith(f"{root}:") and not re.search(r"[/\\]", stripped[len(root) :])):
            return name + stripped[len(root) :]
    if match := _USER.fullmatch(stripped):
        return "~" + (match["rest"] or "")
    return re.split(r"[/\\]", stripped)[-1] or "."


class PathRemover:
    """Removes paths from texts and JSON values.

    Args:
        values: JSON values that are searched for paths, which are then removed from all texts.
        hub_names: repositories (owner/name) and datasets (owner/name:split) on the Hub, which are kept.
    """

    def __init__(self, values: Iterable[Any], hub_names: Collection[str] = ()):
        self._hub_names = frozenset(hub_names)
        texts = list(_list_texts(list(values)))
        self._commands = {text: self.clean_command(text) for key, text in texts if key == COMMAND}
        found = {path for key, text in texts for path in self._list_paths(key, text)} | set(_roots())
        # A folder with a space in its name is not recognised within a text, so parents of known paths are added.
        folders = {str(parent) for path in found for parent in PurePosixPath(path).parents}
        found |= {folder for folder in folders if re.search(rf"[{_END}]", folder)}
        # Longest first, so that a folder is not removed from the path of a file in it.
        known = "|".join(re.escape(path) for path in sorted(found - {"/", "."}, key=len, reverse=True))
        self._known = re.compile(rf"{_BEFORE}(?:{known})(?:[/\\]+{_PART}+)*[/\\]*(?![\w-])")

    def clean_text(self, text: str) -> str:
        """Reduce each path in a text to its last component."""
        for command, cleaned in self._commands.items():
            text = text.replace(command, cleaned)
        return _ANY.sub(_shorten, self._known.sub(_shorten, text))

    def clean_path(self, text: str) -> str:
        """Reduce a text that is entirely a path to its last component; Hub names and URLs are kept."""
        if _ADDRESS.match(text) or self._is_on_hub(text):
            return text
        return last_component(text) if _is_path(text) else text

    def clean_command(self, command: str) -> str:
        """Reduce each path in a command line, in its words and option values, to its last component."""
        try:
            words = shlex.split(command)
        except ValueError:  # an unclosed quote: word boundaries are unknown
            return " ".join(command.split()[:2])
        return shlex.join(self._change_word(word, self.clean_path) for word in words)

    def clean(self, value: Any, key: str = "") -> Any:
        """Reduce each path in the texts of a JSON value to its last component.

        The names of unreadable images are removed: `unreadable` becomes an empty list, and `unreadable_images` their
        number.

        Args:
            key: key of the value in its object.
        """
        if isinstance(value, str):
            if key == COMMAND:
                return self.clean_command(value)
            return self.clean_path(value) if key in PATH_KEYS or is_absolute(value) else self.clean_text(value)
        if isinstance(value, list):
            return [self.clean(part, key) for part in value]
        if not isinstance(value, dict):
            return value
        cleaned = {}
        for name, part in value.items():
            shown = self.clean_text(name) if isinstance(name, str) else name
            if name == UNREADABLE and isinstance(part, list):
                cleaned |= {name: [], **({f"{UNREADABLE}_images": len(part)} if part else {})}
            else:
                cleaned.setdefault(shown, self.clean(part, str(name)))
        return cleaned

    def _list_paths(self, key: str, text: str) -> Iterator[str]:
        """Yield the paths in a text of a JSON value that should also be removed from other texts."""

        def keep(word: str) -> str:
            if _is_path(word) and self.clean_path(word) != word:
                found.append(word.rstrip("/\\"))
            return word

        found: list[str] = []
        if key == COMMAND:
            try:
                words = shlex.split(text)
            except ValueError:
                words = []
            for word in words:
                self._change_word(word, keep)
        elif key in PATH_KEYS or is_absolute(text):
            keep(text)
        yield from filter(None, found)

    def _change_word(self, word: str, change: Callable[[str], str]) -> str:
        """Apply a function to the part of a command's word that may be a path."""
        if match := _OPTION.fullmatch(word):
            return match["option"] + self._change_word(match["value"], change)
        if (match := _SETTING.fullmatch(word)) and not self._is_on_hub(word):
            return match["key"] + self._change_word(match["value"], change)
        return change(word)

    def _is_on_hub(self, text: str) -> bool:
        return bool({text, re.split("[@:]", text)[0]} & self._hub_names)


def is_absolute(text: str) -> bool:
    """Return whether a text starts like an absolute path of any system."""
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _is_path(text: str) -> bool:
    """Return whether a text has more than one component, or is a user's home folder."""
    return bool(re.search(r"[/\\]", text)) or text.startswith("~")


def _shorten(match: re.Match[str]) -> str:
    return last_component(match.group())


def _roots() -> dict[str, str]:
    """Return folders whose names are not published, and their replacements."""
    roots = {tempfile.gettempdir(): "tmp", os.getcwd(): ".", str(Path.home()): "~"}
    return {root: name for root, name in roots.items() if root != "/"}


def _list_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts in a JSON value with the key of each."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _list_texts(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _list_texts(part, key)
    elif isinstance(value, str):
        yield key, value
