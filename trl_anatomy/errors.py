"""The one error that users are meant to read, and the one for a package that is not installed."""

from importlib.util import find_spec

# Import name of an optional package -> the extra that installs it
EXTRAS = {
    "sae_lens": "sae",
    "sknetwork": "sae",
    "plotly": "report",
    "wandb": "wandb",
    "evaluate": "evaluate",
}


class AnatomyError(ValueError):
    """Bad input, as one sentence that names the place and the remedy.

    Raised before long work starts. The command line prints its message without a traceback and exits with status 2.
    """


def require(*modules: str) -> None:
    """Refuse to begin what needs an optional package that is not installed.

    Args:
        modules: keys of `EXTRAS`.

    Raises:
        AnatomyError: naming the first one that is missing, and the extra that installs it.
    """
    for module in modules:
        try:
            there = find_spec(module) is not None
        except (ImportError, ValueError):  # what stands in its place cannot be looked at
            there = False
        if not there:
            raise AnatomyError(
                f"{module} is not installed, which this needs: pip install 'trl-anatomy[{EXTRAS[module]}]'."
            )
