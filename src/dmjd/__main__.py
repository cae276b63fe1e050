"""``python -m dmjd``, as torchrun starts it."""

import sys

try:
    from dmjd.cli.main import main
except KeyboardInterrupt:  # Ctrl-C within the first moments
    sys.exit(130)

sys.exit(main())
