"`refcomm` after something was arranged: a name in `ARRANGED`, its value, and the arguments of `refcomm`."
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import refcomm.papers.eqc.run as eqc
from refcomm.cli import main
from refcomm.runs.store import Store, run_key
from refcomm.training import loop


def die(): os.kill(os.getpid(), signal.SIGKILL)


def no_training(_):
    def never(*a, **k): raise AssertionError("trained again")
    loop.train_epoch = never


def no_renaming(nth): # dies when it is to rename for the `nth` time
    real, names = os.rename, []
    def rename(*names_of_one):
        names.append(names_of_one)
        if len(names) == int(nth): die()
        real(*names_of_one)
    os.rename = rename


def no_clearing_up(_): # dies when all is done but the removal of the unfinished folder
    real = shutil.rmtree
    def rmtree(path, **k):
        if "unfinished" in str(path) and Store().keys(): die()
        real(path, **k)
    shutil.rmtree = rmtree


def small_files(n): # of bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(n), int(n)))


def counted(path): # the keys of what is trained
    real = eqc.run
    def run(specs, context):
        with open(path, "a") as f: print(*map(run_key, specs), file=f)
        return real(specs, context)
    eqc.run = run


def told(path): # made in the fourth epoch
    real = loop.train_step
    def step(t, *a):
        real(t, *a)
        if t.epoch == 3: Path(path).touch()
    loop.train_step = step


def killed_workers(_):
    def children(pid): return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    def kill():
        while not list(Store().root.glob("unfinished/*/members.json")): time.sleep(.02)
        time.sleep(1)
        workers = [w for server in children(os.getpid()) for w in children(server)]
        for w in workers: os.kill(int(w), signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()


ARRANGED = {f.__name__: f for f in (no_training, no_renaming, no_clearing_up, small_files, counted, told,
    killed_workers)}

if __name__ == "__main__":
    name, value, *args = sys.argv[1:]
    ARRANGED[name](value)
    sys.argv[1:] = args
    main()
