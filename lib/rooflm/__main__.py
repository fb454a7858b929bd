"""`python -m rooflm`, the same as the command `rooflm`."""

import sys

from rooflm.roofline.cli import main

if __name__ == "__main__":
    sys.exit(main())
