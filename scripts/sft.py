"""For ``accelerate launch``: the same as ``rlhf sft``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
