"""Antefix: a disaggregated prefix cache for models built like DeepSeek-V4.

This package holds what the services share and imports none of them.
"""

__version__ = "0.1.0"
