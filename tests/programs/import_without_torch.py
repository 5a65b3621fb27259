"The package's names are there before PyTorch is imported."
import sys

import refcomm

assert "torch" not in sys.modules and "train" in dir(refcomm)

from refcomm import load_objects, topsim, train # noqa: F401

assert "torch" in sys.modules
