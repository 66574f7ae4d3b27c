"""Load on a running server, and what becomes of it: ``python -m loadtests.load --help``, and docs/load-tests.md.

The servers are started as the tests start them, and hostile images are those of the tests; hence their folder is searched, too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
