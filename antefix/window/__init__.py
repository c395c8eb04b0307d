"""Window state: which checkpoints to leave (strategy), how to resume from what is there (planner), how fast (rates).

Pure: knows lengths, sizes and seconds; never tokens, tensors, hashes or stores. The services and `antefix simulate`
call the same functions.
"""

from antefix.window.planner import Plan, PlanKind, RestorePlanner, StoredPrefix
from antefix.window.rates import Rates
from antefix.window.sizes import Sizes
from antefix.window.strategy import (
    BudgetState,
    Mark,
    OutputFacts,
    PromptFacts,
    Reason,
    Strategies,
    Strategy,
    Tier,
    parse,
)

__all__ = [
    "BudgetState",
    "Mark",
    "OutputFacts",
    "Plan",
    "PlanKind",
    "PromptFacts",
    "Rates",
    "Reason",
    "RestorePlanner",
    "Sizes",
    "StoredPrefix",
    "Strategies",
    "Strategy",
    "Tier",
    "parse",
]
