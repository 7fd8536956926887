"""The two kinds of failure a person can meet, and the exit codes they end with."""


class UserError(ValueError):
    """The input is wrong: a flag, a file, a row. The message is one line that says what was found and what is allowed.

    The command line prints the message alone, without a traceback, and ends with exit code 2.
    """


class RunFailure(RuntimeError):
    """The input was right but the work failed: a server died, answers are missing, training broke.

    The command line prints the message without a traceback and ends with exit code 1.
    """


def did_you_mean(name: str, known: "list[str]") -> str:
    """A closing clause such as `; did you mean 'ewc'?`, or an empty string when nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
