"""For ``accelerate launch``: the same as ``rlhf ppo``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ppo", *sys.argv[1:]]))
