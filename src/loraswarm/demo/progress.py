"""Progress of a long loop: a tqdm bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts steps towards `num_steps` and shows them under `label`."""

    def __init__(self, label: str, num_steps: int) -> None:
        self._label = label
        self._num_steps = num_steps
        self._num_done = 0
        self._started_s = time.monotonic()
        self._bar = tqdm(total=num_steps, desc=label, disable=not sys.stderr.isatty())

    def advance(self, note: str) -> None:
        """Count one step; `note` says how it went."""
        self._num_done += 1
        self._bar.update(1)
        self._bar.set_postfix_str(note)
        last = self._num_done == self._num_steps
        if self._bar.disable and (self._num_done % 50 == 0 or last):
            elapsed_s = time.monotonic() - self._started_s
            line = (
                f"{self._label} step={self._num_done}/{self._num_steps} elapsed_s={elapsed_s:.0f}"
            )
            print(f"{line} {note}", flush=True)
        if last:
            self._bar.close()
