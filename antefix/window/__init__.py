"""Window state: which checkpoints to leave (strategy), how to resume from what is there (planner), how fast (rates).

The package knows only lengths, sizes and seconds; never tokens, tensors, hashes or stores. The services and `antefix
simulate` call the same functions.
"""

from antefix.window.marks import BudgetState, Mark, OutputFacts, PromptFacts, Reason, Strategy, Tier
from antefix.window.planner import Decision, Plan, PlanKind, RestorePlanner, StoredPrefix
from antefix.window.rates import RatePriors, Rates
from antefix.window.sizes import Sizes
from antefix.window.strategy import Strategies, check_bounded, check_exactness, in_force, parse
from antefix.window.turnover import Turnover

__all__ = [
    "BudgetState",
    "Decision",
    "Mark",
    "OutputFacts",
    "Plan",
    "PlanKind",
    "PromptFacts",
    "RatePriors",
    "Rates",
    "Reason",
    "RestorePlanner",
    "Sizes",
    "StoredPrefix",
    "Strategies",
    "Strategy",
    "Tier",
    "Turnover",
    "check_bounded",
    "check_exactness",
    "in_force",
    "parse",
]
