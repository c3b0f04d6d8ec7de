"""``torchrun --nproc-per-node N -m segmenter_fast.train ...`` takes what ``segmenter-fast train ...`` takes."""

import sys

from ..cli import app

app(["train", *sys.argv[1:]], prog_name="segmenter-fast")
