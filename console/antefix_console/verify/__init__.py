"""Cold against hit: runs prompts with and without a store and compares every bit (`antefix verify`).

models       what is run: a model directory, and small random models of other plans and ratios
stores       what the runs see: nothing, everything, or a prefix of it
paired_runs  one prompt through the workers' own code, with the plan that is to be proved
compare      two outcomes: equal bits, or how far apart and where
suite        which cases, in which order
verdict      what came out, by strategy and plan
"""
