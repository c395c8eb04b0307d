"""A client for any OpenAI- or Anthropic-compatible endpoint: requests, answers, times, reported usage.

For `antefix load` and `antefix audit`. Knows nothing of Antefix: the endpoint may be anybody's.
"""
