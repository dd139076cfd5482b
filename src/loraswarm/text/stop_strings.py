"""Finds stop strings in text that comes in pieces, and holds back what may become one.

Knows nothing about tokens. Used by TextStream.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text of one sequence up to the first stop string.

    The stop string that is complete first ends the text (of several that end together the longest),
    so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._includes = include_in_output
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended it.

        A stop string counts only if its last character is in a `text` that `may_stop`.
        """
        if not self._stops or not text:
            return text, None
        num_old = len(self._held)
        text = self._held + text
        if may_stop and (found := self._find(text, num_old)):
            end, start, stop = found
            self._held = ""
            return text[: end if self._includes else start], stop
        certain = len(text) - max(_num_begun(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """What is still held, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, num_old: int) -> tuple[int, int, str] | None:
        """(end, start, stop string) of the first that ends after `num_old`; longest on a tie."""
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found, default=None)


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
