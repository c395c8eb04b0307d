"""`python -m antefix_console`: the same as the `antefix` command."""

import sys

from antefix_console.cli import main

sys.exit(main())
