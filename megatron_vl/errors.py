"""The one error a person's input raises: a sentence that says what is wrong, where, the mend."""


class InputError(ValueError):
    """Unusable arguments or input.

    The message is one sentence a user can act on: what is wrong, where (file, key, sample or
    argument), how to mend it. The command line prints it without a traceback and exits with 2.
    """


class CheckFailed(Exception):
    """A check that ran to its end and found a difference; the command line exits with 1."""
