"""`python -m mlxd` is `mlxd`.

It does not know commands.
"""

import sys

from mlxd.cli import main

sys.exit(main())
