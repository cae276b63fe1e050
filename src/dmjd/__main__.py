"""``python -m dmjd``, as torchrun starts it."""

import sys

from dmjd.cli import main

sys.exit(main())
