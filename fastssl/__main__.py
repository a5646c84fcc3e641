"""`fastssl` as a module: `python -m fastssl COMMAND`, and torchrun's `-m fastssl`."""

import sys

from fastssl.cli import main

sys.exit(main())
