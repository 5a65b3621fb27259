"Make a folder of the store's own, named in the first argument, print its path, and hold it."
import sys
import time

from refcomm.runs.store import Store

folder, held = Store().own_folder(sys.argv[1])
(folder/"work").write_text("queued")
print(folder, flush=True)
time.sleep(100)
