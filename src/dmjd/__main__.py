"""``python -m dmjd``, as torchrun starts it."""

import sys

from dmjd.cli.main import main

sys.exit(main())
