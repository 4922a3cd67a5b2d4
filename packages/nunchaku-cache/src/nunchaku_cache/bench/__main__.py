"""`python -m nunchaku_cache.bench`: what `nunchaku bench cache` does, where that command is not installed."""

import sys

from nunchaku_cache.bench.command import main

sys.exit(main())
