"""`python -m trl_anatomy.cli`, for launchers that start modules."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
