"""`antefix audit`: what an endpoint's prefix cache really does, found by asking it.

Knows endpoints as their clients do, and nothing of what is behind them. Probes and sample sizes follow the published
audits: Gu et al., "Auditing Prompt Caching in Language Model APIs" (arXiv 2502.07776), and Fahey, "CacheProbe"
(arXiv 2605.30613).
"""
