"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """An input that cannot be used; its message is one sentence: what, where, what to do.

    Programs in `launch/` print it without a traceback and end with exit status 2.
    """
