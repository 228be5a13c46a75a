"""For ``accelerate launch``: the same as ``rlhf best-of-n``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["best-of-n", *sys.argv[1:]]))
