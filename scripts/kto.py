"""For ``accelerate launch``: the same as ``rlhf kto``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["kto", *sys.argv[1:]]))
