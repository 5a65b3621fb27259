"Write a cached tensor where the system limits the size of files."
import resource

import torch

from refcomm import files

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
files.cached_tensor(files.home()/"x.safetensors", lambda: torch.ones(10_000), "features")
