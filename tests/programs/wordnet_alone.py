"WordNet's distances need none of the packages for data."
import sys

from refcomm.data.wordnet import ood_synsets, path_similarity

path_similarity(ood_synsets())
assert not {"nltk", "pandas", "scipy", "sklearn"} & set(sys.modules)
