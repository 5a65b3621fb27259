"Are the messages of the tutorial's game, from the folder, those of its corpus? Print them if so."
import sys

import refcomm

folder = sys.argv[1]
game, corpus = refcomm.load_game(f"{folder}/birds"), refcomm.load_corpus(f"{folder}/birds/corpus.parquet")
task = refcomm.referential(refcomm.load_objects(f"{folder}/birds.csv"), distractors=9, valid=12, test=20)
print(game.send(task.seen("test")).symbols.flatten(1).tolist() == corpus.messages.tolist() and corpus.messages.tolist())
