"""`puna VERB`, `python -m puna VERB`, and so `torchrun --nproc-per-node N -m puna VERB`."""

import os
import signal
import sys


def main() -> int:
    """Runs the command line. Until its verb is imported, Ctrl-C ends the process at once: an exception may not pass
    through the C++ of an import (torch aborts), and nothing has been begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from puna.cli import main

    return main()


def _stop(signum: int, frame: object) -> None:
    os.write(2, b"puna: stopped\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
