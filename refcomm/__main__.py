"`python -m refcomm` is the command `refcomm`."
from refcomm.cli import main

if __name__ == "__main__": main()
