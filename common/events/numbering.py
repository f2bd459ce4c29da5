"""Numbering: texts of a log (users, kinds) as small numbers, batch by batch and exactly; items as catalog rows.

Raw user ids live here alone, in memory, as long as a log is read; nothing writes them anywhere, but for the plain
copy of a log that is packed (`plain.py`).
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt
import polars as pl

from common.events.catalog import Catalog
from common.events.deidentify import Keyed
from common.events.ids import check_digits, id_expression
from common.events.near import near_ids, said_of_near, ways_of
from common.events.schema import DEFAULT_KIND, LogError

NOBODY = np.uint32(2**32 - 1)
"""Stands for the user of an event that names none."""

UNKNOWN_ITEM = -1
"""Stands for the row of an item that the catalog lacks."""

_UNKNOWN_AT_MOST = 100_000
"""Of a log's items that the catalog lacks, so many are held against it: a log may name any number."""

_KINDS_AT_MOST = int(np.iinfo(np.int16).max)


def tidied(texts: pl.Series) -> pl.Series:
    """Ids as `id_expression` has them: trimmed, and null where nothing is left or the encoding was another."""
    return pl.DataFrame({"text": texts}).select(id_expression("text", pl.String())).to_series()


class Numbers:
    """Texts as numbers, in the order in which they are first met: equal texts, equal numbers.

    Events are grouped by a 64-bit hash that is sorted, which is faster than a table with a million entries; what
    shares a hash is compared as text, so that two users can never become one.
    """

    def __init__(self) -> None:
        self.texts = pl.Series("text", [], dtype=pl.String)
        self._seed = secrets.randbits(64)
        self._hashes: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)  # sorted
        self._numbers: npt.NDArray[np.uint32] = np.empty(0, dtype=np.uint32)  # of those hashes
        self._colliding: dict[str, int] = {}  # texts whose hash another text has

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, texts: pl.Series) -> npt.NDArray[np.uint32]:
        """[texts] the number of each text, new ones for texts not met before; no text may be null."""
        if not len(texts):
            return np.empty(0, dtype=np.uint32)
        hashes = self._hash(texts)
        places = np.uint64(2 ** (len(texts) - 1).bit_length() - 1)
        packed = hashes & ~places
        packed |= np.arange(len(texts), dtype=np.uint64)
        packed.sort()  # by what is left of the hash, then by place: six times as fast as an argsort
        order = (packed & places).astype(np.int64)
        grouped = texts.gather(order)
        begins = (grouped != grouped.shift(1)).fill_null(True).to_numpy()
        heads = np.flatnonzero(begins)
        numbers = self._of_few(grouped.gather(heads), hashes[order[heads]])
        found = np.empty(len(texts), dtype=np.uint32)
        found[order] = np.repeat(numbers, np.diff(heads, append=len(texts)))
        return found

    def _hash(self, texts: pl.Series) -> npt.NDArray[np.uint64]:
        return texts.hash(self._seed).to_numpy()

    def _of_few(self, texts: pl.Series, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        numbers, known = self._known(texts, hashes)
        if not known.all():
            self._learn(texts.filter(pl.Series(~known)), hashes[~known])
            numbers, _ = self._known(texts, hashes)
        return numbers

    def _known(
        self, texts: pl.Series, hashes: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """The numbers of texts, and which of them have one."""
        if not len(self):
            return np.zeros(len(texts), dtype=np.uint32), np.zeros(len(texts), dtype=np.bool_)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        numbers = self._numbers[places]
        known = (self.texts.gather(numbers) == texts).to_numpy().copy()
        if self._colliding:
            for place in np.flatnonzero(~known):
                number = self._colliding.get(texts[int(place)])
                if number is not None:
                    numbers[place], known[place] = number, True
        return numbers, known

    def _learn(self, texts: pl.Series, hashes: npt.NDArray[np.uint64]) -> None:
        new = pl.DataFrame({"text": texts, "hash": hashes}).unique("text", maintain_order=True)
        numbers = np.arange(len(self), len(self) + len(new), dtype=np.uint32)
        self.texts = self.texts.append(new["text"]).rechunk()
        merged = np.concatenate([self._hashes, new["hash"].to_numpy()])
        order = np.argsort(merged, kind="stable")  # of equal hashes, the one met first comes first
        every = np.concatenate([self._numbers, numbers])[order]
        merged = merged[order]
        first = np.ones(len(merged), dtype=np.bool_)
        first[1:] = merged[1:] != merged[:-1]
        for number in every[~first]:
            self._colliding[self.texts[int(number)]] = int(number)
        self._hashes, self._numbers = merged[first], every[first]


class Users:
    """The users met so far, under their pseudonyms.

    Attributes, each [texts met] by number:
        same_as: the number of the user that a text names: its own, but for texts that are not trimmed; NOBODY
            where it names none.
        digests: [texts met, 16] uint8, the pseudonyms.
        buckets: uint8, their first bytes.
        tie_keys: uint64, as `deidentify.tie_key`.
    """

    def __init__(self, secret: bytes, *, untidy: bool) -> None:
        self._keyed, self._untidy = Keyed(secret), untidy
        self._numbers, self._all_themselves = Numbers(), True
        self.same_as = np.empty(0, dtype=np.uint32)
        self.digests = np.empty((0, 16), dtype=np.uint8)
        self.buckets = np.empty(0, dtype=np.uint8)
        self.tie_keys = np.empty(0, dtype=np.uint64)

    @property
    def count(self) -> int:
        """How many users there are."""
        return int((self.same_as == np.arange(len(self.same_as))).sum())

    def of(self, texts: pl.Series) -> npt.NDArray[np.uint32]:
        """[texts] the user of each event."""
        named = texts.is_not_null().to_numpy()
        every = bool(named.all())
        raw = self._numbers.of(texts if every else texts.drop_nulls())
        self._meet()
        users = raw if self._all_themselves else self.same_as[raw]
        if every:
            return users
        found = np.full(len(texts), NOBODY)
        found[named] = users
        return found

    def near(self) -> tuple[str, ...]:
        """What is to be said of users whose ids differ from another's by next to nothing.

        Raises:
            LogError: ids have lost their last digits.
        """
        check_digits(self._numbers.texts, "the column of users")
        own = np.flatnonzero(self.same_as == np.arange(len(self.same_as)))
        count, by = near_ids(self._numbers.texts.gather(own))
        said = said_of_near("users", count, len(own), by)
        return (said,) if said else ()

    def _meet(self) -> None:
        """Gives pseudonyms to those who were not met before: one keyed hash a user, not an event."""
        before = len(self.same_as)
        if len(self._numbers) == before:
            return
        same_as = np.arange(before, len(self._numbers), dtype=np.uint32)
        if self._untidy:
            new = self._numbers.texts[before:]
            tidy = tidied(new)
            changed = new.ne_missing(tidy).to_numpy()
            if changed.any():
                self._all_themselves = False
                names = tidy.filter(pl.Series(changed))
                same = np.full(len(names), NOBODY)
                same[names.is_not_null().to_numpy()] = self._numbers.of(names.drop_nulls())
                same_as[changed] = same
                added = np.arange(before + len(same_as), len(self._numbers), dtype=np.uint32)
                same_as = np.concatenate([same_as, added])
        digests = np.zeros((len(same_as), 16), dtype=np.uint8)
        tie_keys = np.zeros(len(same_as), dtype=np.uint64)
        own = np.flatnonzero(same_as == np.arange(before, before + len(same_as)))
        raw = self._numbers.texts[before:].gather(own).to_list()
        digests[own] = np.frombuffer(
            b"".join(self._keyed.pseudonym_bytes(user) for user in raw), dtype=np.uint8
        ).reshape(-1, 16)
        tie_keys[own] = [self._keyed.tie_key(user) for user in raw]
        self.same_as = np.concatenate([self.same_as, same_as])
        self.digests = np.concatenate([self.digests, digests])
        self.buckets = self.digests[:, 0].copy()
        self.tie_keys = np.concatenate([self.tie_keys, tie_keys])


class Kinds:
    """The kinds met so far; `names` are in the order of their numbers."""

    def __init__(self, default: str = DEFAULT_KIND, *, untidy: bool = False) -> None:
        self._default, self._untidy = default, untidy
        self.names: list[str] = []
        self._index: dict[str, int] = {}
        self._of_code = np.full(64, -1, dtype=np.int16)

    def of(self, kinds: pl.Series) -> npt.NDArray[np.int16]:
        """[events] the kind of each event.

        Args:
            kinds: categorical.

        Raises:
            LogError: there are more kinds than numbers for them.
        """
        codes = kinds.to_physical()
        if not codes.null_count():
            return self._of(codes.to_numpy(), kinds)
        found = np.full(len(kinds), self._number(None), dtype=np.int16)
        if codes.null_count() < len(codes):
            known = kinds.is_not_null().to_numpy()
            found[known] = self._of(codes.drop_nulls().to_numpy(), kinds.drop_nulls())
        return found

    def _of(self, codes: npt.NDArray[np.uint32], kinds: pl.Series) -> npt.NDArray[np.int16]:
        more = int(codes.max(initial=0)) + 1 - len(self._of_code)
        if more > 0:
            self._of_code = np.concatenate([self._of_code, np.full(more, -1, dtype=np.int16)])
        found = self._of_code[codes]
        if (new := found < 0).any():
            unseen, places = np.unique(codes[new], return_index=True)
            names = kinds.gather(np.flatnonzero(new)[places]).cast(pl.String)
            for code, name in zip(unseen, tidied(names) if self._untidy else names, strict=True):
                self._of_code[code] = self._number(name)
            found = self._of_code[codes]
        return found

    def _number(self, name: str | None) -> int:
        name = self._default if name is None else name
        number = self._index.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
            if len(self.names) > _KINDS_AT_MOST:
                raise LogError("the log has more than 32,767 kinds of events: map another column as kind")
        return number


class Items:
    """The rows of a catalog's items."""

    def __init__(self, catalog: Catalog, *, untidy: bool) -> None:
        ids = pl.Series("text", catalog.ids, dtype=pl.String)
        self._rows = pl.Enum(ids)
        self._untidy = untidy
        self._ids, self._unknown = ids, pl.Series("text", [], dtype=pl.String)
        # An id that is not trimmed is no id that a trimmed text can be.
        self._at_once = not untidy or bool(ids.equals(tidied(ids)))

    def expressions(self) -> tuple[pl.Expr, pl.Expr]:
        """Column "item" as `row`, null where it is not found at once, and the texts that were not: `missed`."""
        text = pl.col("item")
        if not self._at_once:
            return pl.lit(None, dtype=pl.Int32).alias("row"), text.alias("missed")
        found = text.cast(self._rows, strict=False)
        missed = pl.when(found.is_null()).then(text)
        return found.to_physical().cast(pl.Int32).alias("row"), missed.alias("missed")

    def of(self, batch: pl.DataFrame) -> pl.Series:
        """[events] rows: `UNKNOWN_ITEM` where the catalog lacks the item, null where none is named."""
        rows, missed = batch["row"], batch["missed"]
        places = np.flatnonzero(missed.is_not_null().to_numpy())
        if not len(places):
            return rows
        texts = missed.gather(places)
        if self._untidy:
            texts = tidied(texts)
        found = texts.cast(self._rows, strict=False).to_physical().cast(pl.Int32).fill_null(UNKNOWN_ITEM)
        named = found.set(texts.is_null(), None)
        if len(self._unknown) < _UNKNOWN_AT_MOST:
            new = texts.filter(found == UNKNOWN_ITEM).drop_nulls()
            self._unknown = self._unknown.append(new).unique()
        return rows.clone().scatter(places, named)

    def near(self) -> tuple[str, ...]:
        """What is to be said of items whose ids differ by next to nothing, in the catalog or between it and the log."""
        count, by = near_ids(self._ids)
        said = [said_of_near("items of the catalog", count, len(self._ids), by)]
        count, by = near_ids(self._unknown, self._ids)
        if count:
            said.append(f"{count:,} items of the log are not in the catalog, but for {ways_of(by)}")
        return tuple(filter(None, said))
