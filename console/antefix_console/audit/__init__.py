"""`antefix audit`: finds out by requests alone how an endpoint's prefix cache really behaves.

The audit knows endpoints as their clients do, and nothing of the software behind them. Probes and sample sizes follow
two published audits: Gu et al., "Auditing Prompt Caching in Language Model APIs" (arXiv 2502.07776), and Fahey,
"CacheProbe" (arXiv 2605.30613).
"""
