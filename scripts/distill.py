"""For ``accelerate launch``: the same as ``rlhf distill``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
