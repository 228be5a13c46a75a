"""For ``accelerate launch``: the same as ``rlhf reward``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["reward", *sys.argv[1:]]))
