"""Every seeded mistake is caught, by the strict fake or by the interpreter's logits, as mistakes.py says of it."""

from mistakes import MISTAKES


def test_there_are_mistakes_of_both_kinds() -> None:
    for catcher in ("fake", "interpreter"):
        assert sum(mistake.caught_by == catcher for mistake in MISTAKES.values()) >= 15
