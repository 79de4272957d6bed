"""`python -m userfault`: the command line."""

import sys

from userfault.cli import main

sys.exit(main())
