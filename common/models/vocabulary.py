"""How much of a catalog a language model has words for.

Counted are tokens. Unknown is the tokenizer's unknown token (a Chinese character that the vocabulary lacks), and each
token of a word that is spelled out: three letters or more, none of its tokens longer than one letter, as a vocabulary
of English spells Arabic or Cyrillic. A word with a Chinese character in it counts as spelled out only where its
characters too are cut into bytes, as a character often is a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from common.models.model_folder import LanguageModelError

MOST_UNKNOWN = 0.1
"""Largest share of a catalog's tokens that may be unknown."""

MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
"""A model of 50 languages, as wide as the default one."""

_TEXTS = 20_000
_AT_ONCE = 1024
_LETTERS = 3
_LONGEST = 128


def check_vocabulary(tokenizer: Any, texts: Sequence[str]) -> None:
    """Refuses a catalog that the model has no words for.

    Raises:
        LanguageModelError: more than `MOST_UNKNOWN` of its tokens are unknown.
    """
    share = unknown_share(tokenizer, texts)
    if share > MOST_UNKNOWN:
        raise LanguageModelError(
            f"the language model does not know {share:.0%} of the catalog's tokens (at most {MOST_UNKNOWN:.0%} may be "
            f'unknown): set encoder = "{MULTILINGUAL}" under [model] in the plan, or another model of the '
            'catalog\'s language, or unknown_tokens = "allow" to train with it all the same'
        )


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Share of unknown tokens, 0 to 1, over all texts or 20,000 of them at equal distances; see the module."""
    spoken = [text for text in texts[:: -(-len(texts) // _TEXTS) or 1] if text.strip()]
    unknown = every = 0
    for start in range(0, len(spoken), _AT_ONCE):
        part = spoken[start : start + _AT_ONCE]
        fast = bool(getattr(tokenizer, "is_fast", False))
        more = {"return_offsets_mapping": True} if fast else {}
        cut = tokenizer(part, add_special_tokens=False, truncation=True, max_length=_LONGEST, **more)
        for row, (text, ids) in enumerate(zip(part, cut["input_ids"], strict=True)):
            odd = {place for place, number in enumerate(ids) if number == tokenizer.unk_token_id}
            if fast:
                odd |= _spelled_out(text, cut.word_ids(row), cut["offset_mapping"][row])
            unknown += len(odd)
            every += len(ids)
    return unknown / every if every else 0.0


def _spelled_out(text: str, words: Sequence[int | None], spans: Sequence[tuple[int, int]]) -> set[int]:
    """Places of the tokens of words that are spelled out."""
    of_word: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        if word is not None:
            of_word.setdefault(word, []).append(place)
    found: set[int] = set()
    for places in of_word.values():
        pieces = [text[slice(*spans[place])].strip() for place in places]
        if any(len(piece) > 1 for piece in pieces):
            continue
        letters = {
            spans[place]: piece for place, piece in zip(places, pieces, strict=True) if _is_letter(piece)
        }
        bytewise = len(places) > len({spans[place] for place in places})
        if bytewise or (len(letters) >= _LETTERS and not any(map(_is_ideograph, letters.values()))):
            found |= {place for place in places if _is_letter(text[slice(*spans[place])].strip())}
    return found


def _is_letter(piece: str) -> bool:
    """Of any script, or a vowel sign beside one."""
    return bool(piece) and unicodedata.category(piece[0])[0] in "LM"


def _is_ideograph(letter: str) -> bool:
    return "\u3400" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff" or letter >= "\U00020000"
