"""The version. The version has its own file, because importing names from the package loads many other modules."""

__version__ = "0.2.0"
