"""Foundation models in one small repository; README.md is the tour.

By default, OpenMP's threads spin for a while when they wait for each other. Where another program
needs a core, a spinning thread keeps the one that it waits for from running, and training takes
half as long again (benchmarks/busy.py). So they are told to sleep instead, which they must be
before torch loads. A setting of your own is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # libgomp, and others that follow the standard
os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's OpenMP: milliseconds of spinning
