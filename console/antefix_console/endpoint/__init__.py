"""Any OpenAI- or Anthropic-compatible endpoint, as a client sees it: requests, answers, times, reported usage.

For `antefix load` and `antefix audit`. Knows nothing of Antefix: the endpoint may be anybody's.
"""
