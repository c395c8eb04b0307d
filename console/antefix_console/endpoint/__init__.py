"""A client for any OpenAI- or Anthropic-compatible endpoint: requests, answers, times, reported usage.

`antefix load` and `antefix audit` use this client. The client knows nothing of Antefix, because the endpoint may be
anybody's.
"""
