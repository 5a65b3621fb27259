"Hold locks of runs, whose keys are the arguments, and say so."
import contextlib
import sys
import time

from refcomm.runs.store import Store

with contextlib.ExitStack() as held:
    for key in sys.argv[1:]: held.enter_context(Store().lock("eqc", key))
    print("held", flush=True)
    time.sleep(100)
