"""Compares cold runs with hits: prompts are run with and without a store, and every bit is compared (`antefix verify`).

models       what is verified: a model directory, and small random models with other layer plans and ratios
stores       stores for the runs: an empty one, a full one, or one that shows a prefix only
paired_runs  runs one prompt through the workers' own code, with a given restore plan
compare      compares two outcomes: equal bits, or how large the difference is and where
suite        the cases and their order
verdict      the results, by strategy and plan
"""
