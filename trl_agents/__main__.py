# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`python -m trl_agents` is the command `trl-agents`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
