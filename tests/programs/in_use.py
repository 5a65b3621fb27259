"Clean the store of everything and print what is in use."
from refcomm.runs.cleaning import clean

print(*clean(everything=True).in_use)
