"""`python -m qclip` is the `qclip` command."""

import sys

from qclip.cli import main

sys.exit(main())
