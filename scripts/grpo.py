"""For ``accelerate launch``: the same as ``rlhf grpo``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))
