"""The version, in a file of its own: the face of the package imports much else when it is asked for names."""

__version__ = "0.2.0"
