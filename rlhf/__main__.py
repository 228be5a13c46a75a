"""``python -m rlhf COMMAND``, and ``accelerate launch -m rlhf COMMAND``."""

import sys

from rlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
