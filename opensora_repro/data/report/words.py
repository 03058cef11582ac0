"""What captions talk about: the words that most of them hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
KEPT = 200_000  # different words; rare ones are forgotten beyond
LONGEST = 5000  # characters of a caption that are looked at
PLAIN = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been being but by for from had has have he her his in into is it its of on or over she"
        " so some that the their them then there these they this those through to up was were which while who with",
    )
)  # English words that say nothing of a caption's subject


def frequent_words(captions: Iterable[str], count: int) -> list[tuple[str, int]]:
    """Return the words that most captions hold, with how many do, the most frequent first."""
    found: Counter[str] = Counter()
    for caption in captions:
        found.update({word.lower() for word in WORD.findall(caption[:LONGEST])} - PLAIN)
        if len(found) > KEPT:
            found = Counter(dict(found.most_common(KEPT // 2)))
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]
