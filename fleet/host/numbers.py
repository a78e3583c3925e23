"""Numbers in the output of hosts."""

_DIGITS_LIMIT = 20  # those of the largest number of 64 bits; others may be too large for a float


def is_count(word: str) -> bool:
    """Return whether a word is a whole number that is not negative, as kernels and programs print them."""
    return len(word) <= _DIGITS_LIMIT and word.isascii() and word.isdigit()


def parse_count(word: str) -> int:
    """Return the number that a word is. Raises ValueError."""
    if not is_count(word):
        raise ValueError(f"{word[:100]!r} is not a number")
    return int(word)
