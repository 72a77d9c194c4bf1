"""`python -m launcher`, where the `slipway` script is not on PATH."""

import sys

from launcher.cli.app import main

sys.exit(main())
