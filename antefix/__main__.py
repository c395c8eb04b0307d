"""`python -m antefix`: the same as the `antefix` command."""

import sys

from antefix.cli import main

sys.exit(main())
