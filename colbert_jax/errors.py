"""The one kind of error that is the user's to mend, and how it is shown."""


class UserError(Exception):
    """An input that cannot be used; its message is one sentence: what, where, what to do.

    Programs in `launch/` print it without a traceback and end with exit status 2.
    """


def printable(text: str) -> str:
    """Text that may hold names out of data, without what a terminal would obey or cannot show."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
        for mark in text
    )
