"""Dates in words, and the same dates in digits: a data set that is a function of (seed, row).

    "saturday, the third of march, nineteen eighty-four" -> "1984-03-03"

Every day of four centuries belongs to the training, the validation or the test rows, so that no date of one is in
another. Tokens are characters.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxdl import data

PAD, BOS, EOS = 0, 1, 2
SOURCE_CHARACTERS = " ,-.abcdefghijklmnopqrstuvwxyz0123456789"
TARGET_CHARACTERS = "-0123456789"
SOURCE_LENGTH, TARGET_LENGTH = 72, 11  # the longest phrase; ten characters and the end
FIRST_DAY, N_DAYS = datetime.date(1700, 1, 1), 146_097

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
    "twenty": "twentieth",
    "thirty": "thirtieth",
}
MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august"),
    *("september", "october", "november", "december"),
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Dates:
    """How many phrases, and how they are batched."""

    n_train: int = 40_000  # phrases to train on
    n_validation: int = 1_000  # phrases held out to choose the best checkpoint by; 0 for none
    n_test: int = 2_000  # phrases to report on
    batch_size: int = 64  # rows of a global batch
    eval_batch_size: int = 250  # rows of an evaluation batch

    def problems(self) -> Iterator[str]:
        counts = ("n_train", "n_test", "batch_size", "eval_batch_size")
        yield from (f"{name}={getattr(self, name)} must be at least 1." for name in counts if getattr(self, name) < 1)
        if self.n_validation < 0:
            yield f"n_validation={self.n_validation} must not be negative."
        if self.n_test + self.n_validation > N_DAYS // 2:
            yield f"n_test and n_validation take more than half of {N_DAYS} dates; leave more to the training."


def load(settings: Dates, seed: int) -> dict[str, data.ArraySource]:
    """The rows of `train`, `test` and, if any, `validation`; no date is in two of them.

    A row has `source` (S,), its `lengths`, `previous` and `targets` (T,): the target moved right, and the target.

    Example:
      >>> rows = load(Dates(n_train=5, n_validation=0, n_test=2), seed=0)
      >>> sorted(rows), rows["train"].arrays["previous"].shape
      (['test', 'train'], (5, 11))
    """
    days = np.random.default_rng(seed).permutation(N_DAYS)
    cuts = np.cumsum([settings.n_test, settings.n_validation])
    test, validation, train = np.split(days, cuts)
    sizes = {"test": (test, settings.n_test), "validation": (validation, settings.n_validation)}
    sizes["train"] = (train, settings.n_train)
    offsets = {"test": 0, "validation": 1, "train": 2}
    return {
        name: _rows(days[np.arange(n) % len(days)], (seed, offsets[name])) for name, (days, n) in sizes.items() if n
    }


def _rows(days: np.ndarray, seed: tuple[int, int]) -> data.ArraySource:
    dates = [FIRST_DAY + datetime.timedelta(days=int(day)) for day in days]
    phrases = [phrase(date, np.random.default_rng((*seed, row))) for row, date in enumerate(dates)]
    targets = np.stack([encode(date.isoformat(), TARGET_CHARACTERS, TARGET_LENGTH, end=True) for date in dates])
    previous = np.concatenate([np.full((len(days), 1), BOS, np.int32), targets[:, :-1]], 1)
    source = np.stack([encode(text, SOURCE_CHARACTERS, SOURCE_LENGTH) for text in phrases])
    lengths = np.array([len(text) for text in phrases], np.int32)
    return data.ArraySource({"source": source, "lengths": lengths, "previous": previous, "targets": targets})


def encode(text: str, characters: str, length: int, *, end: bool = False) -> np.ndarray:
    """Token numbers of a text, filled up with `PAD`.

    Example:
      >>> encode("1-", TARGET_CHARACTERS, 4, end=True).tolist()
      [5, 3, 2, 0]
    """
    tokens = [characters.index(character) + 3 for character in text] + [EOS] * end
    return np.array(tokens + [PAD] * (length - len(tokens)), np.int32)


def decode(tokens: np.ndarray, characters: str) -> str:
    """The text of token numbers, up to the end.

    Example:
      >>> decode(np.array([5, 3, 2, 0]), TARGET_CHARACTERS)
      '1-'
    """
    ends = np.flatnonzero((tokens == EOS) | (tokens == PAD))
    kept = tokens[: ends[0]] if len(ends) else tokens
    return "".join(characters[token - 3] if token >= 3 else "?" for token in kept)


def phrase(date: datetime.date, rng: np.random.Generator) -> str:
    """One of the ways to say a date.

    Example:
      >>> phrase(datetime.date(1984, 3, 3), np.random.default_rng(3))
      'saturday, march the third, nineteen eighty-four'
    """
    month, day = MONTHS[date.month - 1], _ordinal(number(date.day))
    year = _year(date.year, rng)
    weekday = f"{WEEKDAYS[date.weekday()]}, " if rng.random() < 0.25 else ""
    forms = (
        f"the {day} of {month}, {year}",
        f"{month} the {day}, {year}",
        f"{day} of {month} {year}",
        f"{month} {day}, {date.year}",
        f"the {date.day}. of {month[:3]}. {date.year}",
        f"{month[:3]}. {date.day}, {year}",
    )
    return weekday + forms[rng.integers(len(forms))]


def _year(year: int, rng: np.random.Generator) -> str:
    century, rest = divmod(year, 100)
    if century == 20 and (rest < 10 or rng.random() < 0.3):
        joint = " and " if rng.random() < 0.5 else " "
        return "two thousand" + (joint + number(rest) if rest else "")
    if rest < 10:
        low = rng.choice([" oh ", " hundred and "]) if rest else " hundred"
        return number(century) + str(low) + (number(rest) if rest else "")
    return f"{number(century)} {number(rest)}"


def number(n: int) -> str:
    """A number below 100 in words.

    Example:
      >>> number(84), number(20), number(7)
      ('eighty-four', 'twenty', 'seven')
    """
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def _ordinal(text: str) -> str:
    *first, last = text.split("-")
    return "-".join([*first, ORDINALS.get(last, f"{last}th")])
