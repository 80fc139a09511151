"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Tokens in, text pieces out; holds back what may yet become a stop string or a character.

    Args:
        tokenizer: special tokens are left out of the text.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token (may be empty)."""
        self._ids.append(token_id)
        self.text = self._decode()
        found = [place for place in map(self.text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
            return self._take(len(self.text))
        if self.text.endswith("\ufffd"):  # in the middle of a character
            return ""
        return self._take(len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back."""
        return self._take(len(self.text))

    def _decode(self) -> str:
        return str(
            self._tokenizer.decode(
                self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return min(length, len(self.text))
        return 0

    def _take(self, stop: int) -> str:
        piece, self._sent = self.text[self._sent : stop], max(self._sent, stop)
        return piece
