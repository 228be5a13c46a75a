"""For ``accelerate launch``: the same as ``rlhf online-dpo``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["online-dpo", *sys.argv[1:]]))
