"""Tokenizers: read from a text (`tokenizer.json`), completed by the five marker tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from rbm.errors import UserError
from rbm.model.prompt import MARKERS, check_instruction

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"


class Words:
    """A tokenizer that knows the markers.

    Args:
        text: content of a `tokenizer.json`.
        needed: other tokens that it must have.

    Raises:
        UserError: the text is no tokenizer, or a needed token is missing.
    """

    def __init__(self, text: str, needed: Sequence[str] = ()) -> None:
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{TOKENIZER} cannot be read: {' '.join(str(error).split())}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        missing = [token for token in needed if self.tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(f"the tokenizer lacks {', '.join(missing)}: it belongs to another model")
        self.added = [token for token in MARKERS if self.tokenizer.token_to_id(token) is None]
        if self.added:
            self.tokenizer.add_special_tokens(
                [AddedToken(token, special=True, normalized=False) for token in self.added]
            )
        self.markers = [self.id_of(token) for token in MARKERS]
        self._special = frozenset(
            {token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special}
            | {*MARKERS, *needed}
        )
        self._encode = lru_cache(maxsize=4096)(self._encoded)

    def __len__(self) -> int:
        """Rows that an embedding table for it has: the largest id + 1."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def rows(self) -> int:
        """Rows of an embedding table that holds all tokens but the markers."""
        known = self.tokenizer.get_vocab(with_added_tokens=True)
        return max(place for token, place in known.items() if token not in MARKERS) + 1

    def id_of(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer lacks {token}: it belongs to another model")
        return int(found)

    def to_str(self) -> str:
        return str(self.tokenizer.to_str())

    def check(self, task: str) -> None:
        """Raises UserError for an instruction with a special token in it: it would move every place behind it."""
        check_instruction(task, self._special)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, special tokens in it read as such: int64 (n,), read-only."""
        return self._encode(text)

    def _encoded(self, text: str) -> NDArray[np.int64]:
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        ids.flags.writeable = False
        return ids
