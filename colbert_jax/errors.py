"""What ends a program without being a bug, and how it is shown."""


class UserError(Exception):
    """An input that cannot be used; its message is one sentence: what, where, what to do.

    Programs in `launch/` print it without a traceback and end with exit status 2.
    """


class Interrupted(Exception):
    """A run was asked to stop and has saved all that it had done; the message says how to go on.

    Programs in `launch/` print it without a traceback and end with exit status 75.
    """


def printable(text: str) -> str:
    """Text that may hold names out of data, without what a terminal would obey or cannot show."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
        for mark in text
    )


def one_line(text: str, length: int = 300) -> str:
    """Text out of a file as a message shows it: in one line, and no more than its begin."""
    shown = printable(text[:length]).replace("\n", "\\n")
    return f"{shown}..." if len(text) > length else shown


def brief(error: BaseException) -> str:
    """What an error of a library says, in one line and at no length."""
    said = " ".join(str(error).split()).rstrip(".")
    return one_line(said) or type(error).__name__
