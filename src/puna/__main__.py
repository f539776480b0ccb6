"""`python -m puna VERB`, and so `torchrun --nproc-per-node N -m puna VERB`."""

import sys

from puna.cli import main

if __name__ == "__main__":
    sys.exit(main())
