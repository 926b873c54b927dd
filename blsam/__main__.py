"""`python -m blsam`, and `torchrun -m blsam train`."""

import sys

from .cli import main

sys.exit(main())
