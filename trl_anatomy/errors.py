"""The one error that users are meant to read."""


class AnatomyError(ValueError):
    """Bad input, as one sentence that names the place and the remedy.

    Raised before long work starts. The command line prints its message without a traceback and exits with status 2.
    """
