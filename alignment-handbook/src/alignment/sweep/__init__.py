"""Sweeps: several settings of a recipe, each with several seeds, and one page on all of them.

The files meet a sweep in this order: `arms` makes its settings of what a user asks for, `commands` says how each run of
them is started and in which folder, `running` runs what is not there yet, so many at a time, `paired` takes differences
by seed and prompt, and `page` compares the runs.
"""
