"""`python -m antefix_console`, the same as `antefix`."""

import sys

from antefix_console.entry import main

sys.exit(main())
