"Call what is pickled in the file: a function and its arguments."
import pickle
import sys

with open(sys.argv[1], "rb") as f: function, args = pickle.load(f)
function(*args)
