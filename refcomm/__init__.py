__version__ = "0.1.0"

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, submod_attrs={
    "own": ["Objects", "Run", "Trial", "load_objects", "make_game", "page", "plot_sweep", "referential", "sweep", "topsim",
        "train", "trial"],
    "keep": ["cross_play_of", "ease_of", "find_record", "load", "load_game", "probe_of", "push_game", "role_swap_of",
        "save_game"],
    "metrics.structure": ["bosdis", "entropy", "measure", "posdis", "topographic_similarity"],
    "metrics.task": ["n_unique"],
    "corpora": ["load_corpus", "load_elcc", "make_corpus", "save_corpus", "save_elcc"],
    "channels": ["make_bottleneck", "make_channel"],
    "games.referential": ["ReferentialGame"],
    "interact.explore": ["explore", "explore_games"],
    "runs.execute": ["execute"],
    "runs.experiments": ["experiment"],
})
