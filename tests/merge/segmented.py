"""The offload command with options behind all others, where a test gives only what comes before them.

python segmented.py '["--segment-size", "50000", "--compress"]' merge -f LOGS -o OUT
"""

from __future__ import annotations

import json
import sys

from offload import cli

if __name__ == "__main__":
    options = json.loads(sys.argv.pop(1))
    sys.argv += options
    cli.main()
