"""`python -m zerotop`: the same as the zerotop command."""

import sys

from zerotop.cli import main

sys.exit(main())
