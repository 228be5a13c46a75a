"""For ``accelerate launch``: the same as ``rlhf dpo``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
