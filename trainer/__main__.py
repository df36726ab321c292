"""`python -m trainer` is rora-train; `torchrun -m trainer` is rora-train in several processes."""

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
