"""`python -m speedrun_mup`."""

import sys

from speedrun_mup.cli import main

sys.exit(main())
