"Play seven games with the game in the first folder and keep words and scores in the second file."
import sys

import torch
from safetensors.torch import save_file

import refcomm

game, x = refcomm.load_game(sys.argv[1]), torch.eye(11)[:7]
word = game.send(x).word
save_file(dict(word=word, scores=game.scores(word, x)), sys.argv[2])
